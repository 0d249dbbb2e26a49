import os

# Before torch and transformers are imported: no network, and no fight over two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402
import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.signatures  # noqa: E402, F401 - the hook looks it up by name and does not import it

# From here on every function of the package has the shapes in its signature checked at run time.
install_import_hook("malmen_repro", "tests.signatures.check")
torch.set_num_threads(1)

from tests.toy import EVERY_FAMILY  # noqa: E402


@pytest.fixture(params=EVERY_FAMILY.values(), ids=EVERY_FAMILY)
def family(request):
    "A model of each family in float64, wrapped for MALMEN, and facts for it."
    make, facts = request.param
    return make(torch.float64), facts(9)
