import os

# Before torch and transformers are imported: no network, and no fight over two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "agg")

import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# From here on every function of the package has the shapes in its signature checked at run time.
install_import_hook("malmen_repro", "beartype.beartype")
torch.set_num_threads(1)
