"""Write README.md from nbs/index.ipynb: prose as it is, code in fences, outputs below.

A cell with `#| echo: false` shows its outputs only.
With `--check` nothing is written: the exit status says whether README.md is in step.
"""

import sys
from pathlib import Path

import nbformat

from malmen_repro.files import write_text

ROOT = Path(__file__).resolve().parents[1]


def shown(cell):
    "A cell as Markdown."
    if cell.cell_type == "markdown":
        return cell.source.replace("](../", "](")  # links are written as seen from nbs/
    lines = cell.source.splitlines()
    code = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    hidden = any(line.replace(" ", "") == "#|echo:false" for line in lines)
    parts = [] if hidden or not code else [f"```python\n{code}\n```"]
    for output in cell.outputs:
        data = output.get("data", {})
        if "text/markdown" in data:
            parts.append(data["text/markdown"].replace("](../", "]("))
        elif output.output_type == "stream":
            parts.append(f"```\n{output.text.rstrip()}\n```")
    return "\n\n".join(parts)


def readme(path=ROOT / "nbs" / "index.ipynb"):
    "The whole page."
    cells = [shown(cell).strip() for cell in nbformat.read(path, as_version=4).cells]
    return "\n\n".join(cell for cell in cells if cell) + "\n"


if __name__ == "__main__":
    target = ROOT / "README.md"
    if "--check" in sys.argv:
        same = target.read_text(encoding="utf-8") == readme()
        sys.exit(0 if same else "README.md is not in step with nbs/index.ipynb: make readme")
    write_text(target, readme())
