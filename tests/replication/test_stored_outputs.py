"""What the notebooks show of committed records is what the records say now: tables, printed lines, committed pictures.

No list of tables is kept here. A cell counts if committed records reach it: it calls a reader of records, names a path
below records/, or uses what such a cell made. It runs anew, with only those statements of earlier cells that it needs,
and what it shows is compared with the stored outputs. A plot that a cell draws for itself is not compared.
"""

import ast
import base64
import contextlib
import functools
import io
import json
import re
import symtable
import sys
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from IPython.display import Image, Markdown

from malmen_repro.replication import costs, figures, paper_models, provenance
from malmen_repro.replication.records import read_record

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "nbs").glob("**/*.ipynb"))
READERS = {"committed_records", "committed_figure", "read_records", "verdict", "verdict_table", "verdict_grid"}
READERS |= {"verdict_counts", "changed_verdicts", "changed_table"}
READERS |= {name for module in (costs, provenance) for name in module.__all__}  # they read records, or count for them
EXPORTED = re.compile(r"^#\|\s*(export|default_exp)", re.MULTILINE)  # the module has it
NOT_RUN = re.compile(r"^#\|\s*(slow|gpu|notest|eval:\s*false)", re.MULTILINE)


def within(table):
    "The symbol tables within one."
    for inner in table.get_children():
        yield inner
        yield from within(inner)


def changed(node):
    "The name of a list or dictionary that a piece of code fills, such as x in `x.append(1)` and `x[1] = 1`."
    fills = isinstance(node, ast.Attribute) and node.attr in ("add", "append", "extend", "setdefault", "update")
    if fills or (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)):
        return node.value.id if isinstance(node.value, ast.Name) else None


class Statement:
    "A statement at the top of a cell: the names that it makes and needs, and whether it reads records."

    def __init__(self, node):
        self.node, top = node, symtable.symtable(ast.unparse(node), "cell", "exec")
        self.imports = isinstance(node, (ast.Import, ast.ImportFrom))
        self.makes = {one.get_name() for one in top.get_symbols() if one.is_assigned()}
        self.needs = {one.get_name() for one in top.get_symbols() if one.is_referenced()}
        self.needs |= {one.get_name() for scope in within(top) for one in scope.get_symbols() if one.is_global()}
        if not isinstance(node, (ast.Assign, ast.AugAssign)):  # a loop needs no variable of its own
            self.needs -= self.makes
        self.changes = {name for part in ast.walk(node) if (name := changed(part))}
        texts = (str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant))
        self.reads = bool(self.needs & READERS) or any("../records/" in text for text in texts)


class Cell:
    "A code cell: its statements and what it shows."

    def __init__(self, cell):
        self.id, source = cell["id"], "".join(cell["source"])
        self.statements = [Statement(node) for node in ast.parse(source).body]
        self.silent = source.rstrip().endswith(";")
        self.shows = [part for output in cell["outputs"] for part in parts(output)]


def parts(output):
    "The text or the picture of a stored output."
    data = output.get("data", {})
    if output["output_type"] == "stream":
        yield "".join(output["text"])
    elif "text/markdown" in data:
        yield "".join(data["text/markdown"])
    elif "image/png" in data:
        yield base64.b64decode("".join(data["image/png"]))


def cells_of(notebook):
    "The cells that run in a test of the notebook, but for those in its module."
    code = [(cell, "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [Cell(cell) for cell, source in code if not EXPORTED.search(source) and not NOT_RUN.search(source)]


def reached(cells):
    "The cells that show something and that committed records reach."
    carriers, found = set(), []
    for cell in cells:
        touched = False
        for one in cell.statements:
            hit = one.reads or bool(one.needs & carriers)
            carriers = carriers | one.makes | one.changes if hit else carriers - one.makes
            touched = touched or hit
        if touched and cell.shows:
            found.append(cell)
    return found


def needed(cells, wanted):
    "The statements of the wanted cells, all imports, and the statements that make or fill what these need."
    missing, found = set(), set()
    for part, one in [(cell, one) for cell in cells for one in cell.statements][::-1]:
        if part in wanted or one.imports or (one.makes | one.changes) & missing:
            missing = missing - one.makes | one.needs
            found.add(one)
    return found


def run(cell, statements, names):
    "What a cell shows when some of its statements run."
    found, printed = [], io.StringIO()
    names["display"] = found.append
    last = cell.statements[-1] if cell.statements else None
    with contextlib.redirect_stdout(printed):
        for one in (one for one in cell.statements if one in statements):
            if one is last and isinstance(one.node, ast.Expr) and not cell.silent:
                found.append(eval(compile(ast.Expression(one.node.value), cell.id, "eval"), names))
            else:
                exec(compile(ast.Module([one.node], []), cell.id, "exec"), names)
    plt.close("all")
    texts = [printed.getvalue()] if printed.getvalue() else []
    return texts + [one.data for one in found if isinstance(one, (Markdown, Image))]


def stale(notebook):
    "The cells that show something else now."
    cells = cells_of(notebook)
    wanted = reached(cells)
    statements, names = needed(cells, wanted), {}
    if module := re.search(r"default_exp ([\w.]+)", json.dumps(notebook)):
        names |= vars(import_module(f"malmen_repro.{module[1]}"))
    ids = []
    for cell in cells:
        now = run(cell, statements, names)
        texts = [sorted(one for one in shown if isinstance(one, str)) for shown in (now, cell.shows)]
        if cell in wanted and (texts[0] != texts[1] or not all(one in cell.shows for one in now)):
            ids.append(cell.id)
    return ids


READ_ONCE, BUILT_ONCE = functools.cache(read_record), functools.cache(paper_models.skeleton)


@pytest.fixture
def looking_on(monkeypatch):
    "Committed pictures are looked at, not drawn; records are read once, and skeletons of models built once."
    save = figures.save_figure

    def kept(figure, path):
        written = [Path(f"{path}.png"), Path(f"{path}.svg")]
        return written if Path(path).parent.resolve() == ROOT / "figures" else save(figure, path)

    def has_picture(name, records, path):
        return figures.SHOWN_AS[figures.EXPERIMENTS[name].shown_as][1] is not None

    instead = {"save_figure": kept, "read_record": READ_ONCE, "skeleton": BUILT_ONCE}
    for module in [module for name, module in list(sys.modules.items()) if name.startswith("malmen_repro.")]:
        for name in instead.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, instead[name])
    monkeypatch.setattr(figures, "draw", has_picture)
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.chdir(ROOT / "nbs")


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


REACHED = {path: {cell.id for cell in reached(cells_of(load(path)))} for path in NOTEBOOKS}
SHOWING = [path for path, ids in REACHED.items() if ids]


@pytest.mark.parametrize("path", SHOWING, ids=lambda path: path.stem)
def test_what_a_notebook_shows_of_records_is_what_they_say(path, looking_on, monkeypatch):
    monkeypatch.chdir(path.parent)
    cells = stale(load(path))
    assert not cells, f"cells {cells} are not what records/ gives: python tools/execute_notebooks.py {path}"


# --- the search itself


def written(*sources, texts=()):
    "A notebook with these code cells and, for the last ones, stored Markdown."
    cells = [{"cell_type": "code", "id": f"c{i}", "source": [text], "outputs": []} for i, text in enumerate(sources)]
    for cell, text in zip(cells[::-1], texts[::-1], strict=False):
        cell["outputs"] = [{"output_type": "execute_result", "data": {"text/markdown": [text]}}]
    return {"cells": cells}


HEAD = "from IPython.display import Markdown\nfrom malmen_repro.replication.records import committed_records"


def test_a_stale_output_is_found_and_a_fresh_one_is_not(looking_on):
    cells = (HEAD, "name = committed_records().name", "Markdown(f'from {name}')")
    assert stale(written(*cells, texts=["from records"])) == []
    assert stale(written(*cells, texts=["from elsewhere"])) == ["c2"]
    assert stale(written(*cells[:2], "Markdown('x'); None", texts=["from records"])) == []  # no records reach it
    assert stale(written(*cells[:2], "None if name else 0", texts=["from records"])) == ["c2"]  # what it showed is gone
    printed = written(*cells[:2], "print(name)")
    printed["cells"][-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["records\n"]}]
    assert stale(printed) == []


def test_only_what_is_needed_runs(looking_on):
    costly = "raise AssertionError('not needed')"
    found = "rows = []\nother = 1 / 0\nfor letter in committed_records().name:\n    rows.append(letter)"
    last = "def text(rows):\n    return 'from ' + ''.join(rows)\n\n\nMarkdown(text(rows))"
    cells = (HEAD, costly, f"#| slow\n{costly}", f"#| export\n{costly}", found, last)
    assert stale(written(*cells, texts=["from records"])) == []


def test_no_table_of_records_is_passed_over():
    kinds = ("table_of(", "verdict_table(", "verdict_grid(", "_table(records)", "memory_table(", "scaling_table(")
    for path in NOTEBOOKS:
        for cell in (cell for cell in load(path)["cells"] if cell["cell_type"] == "code" and cell["outputs"]):
            source = "".join(cell["source"])
            if any(kind in source for kind in kinds) and not EXPORTED.search(source) and not NOT_RUN.search(source):
                assert cell["id"] in REACHED[path], f"{path.name}, cell {cell['id']}"


def test_every_notebook_of_results_is_looked_at():
    results = [path for path in NOTEBOOKS if path.parent.name == "results" or path.name == "index.ipynb"]
    assert len(results) > 15 and set(results) <= set(SHOWING)
