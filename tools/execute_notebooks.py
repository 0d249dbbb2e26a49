"""Execute notebooks in place and clean them: all of nbs/, or those named on the command line.

Cells that nbdev_test skips (`#| eval: false` and the flags in settings.ini) are not run and keep the outputs they have.
With `--slow` those flagged `#| slow` are run too, and write their records anew.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import extract_directives

from malmen_repro.files import replacing

ROOT = Path(__file__).resolve().parents[1]


class Client(NotebookClient):
    """nbclient that leaves flagged cells alone."""

    flags = set(get_config(path=ROOT).tst_flags.split())

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        directives = extract_directives(cell.copy(), remove=False) if cell.cell_type == "code" else {}
        if directives.get("eval:", [""])[0].lower() == "false" or self.flags & directives.keys():
            return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def execute(path):
    start, notebook = time.perf_counter(), nbformat.read(path, as_version=4)
    # Streams arrive in pieces cut by chance; joined, two runs give the same file.
    Client(notebook, timeout=None, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}).execute()
    with replacing(path) as part:
        nbformat.write(notebook, str(part))
    nbdev_clean(str(path))
    print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # the kernel's inline backend puts figures into the notebook
    # Progress bars hold times, and the warning that they lack a widget a path of this machine: no lesson in either.
    os.environ.update(TQDM_DISABLE="1", PYTHONWARNINGS="ignore:IProgress not found")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if "--slow" in sys.argv:
        Client.flags.discard("slow")
    named = [Path(name).resolve() for name in sys.argv[1:] if name != "--slow"]
    for notebook_path in named or sorted((ROOT / "nbs").glob("**/*.ipynb")):
        execute(notebook_path)
