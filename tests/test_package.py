"""The package as a whole: version, dependencies, notebooks and modules in step, nothing of one machine in the files."""

import ast
import configparser
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import malmen_repro

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("**/*.ipynb"))
MODULES = sorted(path for path in (ROOT / "malmen_repro").glob("**/*.py") if path.name != "_modidx.py")
DEVELOPMENT_ONLY = {"nbdev", "fastcore", "execnb", "ghapi", "IPython", "pytest", "hypothesis", "beartype"}


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def settings():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def imports(tree, *, lazy):
    """Top-level names a module imports: when it is imported, or (lazy) anywhere in it."""
    nodes = ast.walk(tree) if lazy else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


# --- version and dependencies


def test_version_in_step():
    assert malmen_repro.__version__ == settings()["version"] == version("malmen-repro")


def test_constraints_pin_the_tested_torch():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)  # no index, no file, no local version


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_module_imports_no_development_tool(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not DEVELOPMENT_ONLY & set(imports(tree, lazy=True))
    assert "datasets" not in set(imports(tree, lazy=False)), "import `datasets` inside the function that needs it"


def test_importing_everything_pulls_in_no_development_tool():
    modules = [module.name for module in pkgutil.walk_packages(malmen_repro.__path__, "malmen_repro.")]
    modules = [name for name in modules if not name.endswith("._modidx")]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"nbdev", "fastcore", "execnb", "datasets"} & set(run.stdout.split())


def test_shapes_are_checked_in_these_tests():
    from malmen_repro.normal_equation import aggregate

    with pytest.raises(TypeCheckError):
        aggregate(torch.zeros(3, 2), torch.zeros(4, 2), 1.0)


# --- three wings: replication -> methods -> library


def wing(module):
    """0 for the library, 1 for the other editors, 2 for the replication."""
    return {"methods": 1, "replication": 2}.get(f"{module}.".split(".")[1], 0)


def imported(path):
    """The modules of this package that a module imports, anywhere in it, and those it names in a string."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    package = name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            yield from (part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and part.value)


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_arrows_point_one_way(path):
    own = wing(".".join(path.relative_to(ROOT).parts))
    found = {name for name in imported(path) if str(name).startswith("malmen_repro.") and wing(name) > own}
    assert not found, "the library knows nothing of the methods, and neither of the replication"


def test_the_search_for_arrows_finds_them(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "malmen_repro" / "methods").mkdir(parents=True)
    path = tmp_path / "malmen_repro" / "methods" / "one.py"
    lines = ["from ..replication import records", "def f():"]
    lines += ["    from .memit import MEMIT", "    import malmen_repro.cli"]
    path.write_text("\n".join(lines))
    found = set(imported(path))
    assert {"malmen_repro.replication.records", "malmen_repro.methods.memit", "malmen_repro.cli"} <= found
    assert wing("malmen_repro.replication.records") == 2 and wing("malmen_repro.methods") == 1


def test_a_fact_walks_to_a_shift_without_the_replication():
    code = """
import sys, malmen_repro
from malmen_repro import MALMEN, Fact, LanguageModel, WeightShift, evaluate, find_editor, load_edit, load_facts
from malmen_repro import cli, consecutive, training
find_editor("MEMIT"), find_editor("FT")
print(*[name for name in sys.modules if name.startswith("malmen_repro.replication")])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


# --- the front door


def test_the_top_level_has_its_names_and_imports_nothing_heavy():
    code = "import sys, malmen_repro; print(*malmen_repro.__all__); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, heavy = run.stdout.splitlines()
    assert heavy == "False"
    assert set(listed.split()) == set(malmen_repro._PLACES) and len(malmen_repro._PLACES) <= 12
    for name in malmen_repro.__all__:
        assert getattr(malmen_repro, name).__module__ == f"malmen_repro.{malmen_repro._PLACES[name]}"
    assert set(malmen_repro.__all__) <= set(dir(malmen_repro))
    with pytest.raises(AttributeError, match="nothing_like_this"):
        malmen_repro.nothing_like_this  # noqa: B018


def test_help_needs_no_torch():
    lines = ("import sys", "from malmen_repro.cli import main")
    code = "\n".join([*lines, "try: main(['--help'])", "finally: print('torch' in sys.modules)"])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "False" and "reproduce" in run.stdout


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "malmen_repro" / "py.typed").exists() and "py.typed" in (ROOT / "pyproject.toml").read_text()


# --- notebooks and modules


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    """A copy in which the modules are written anew from the notebooks, and the notebooks then cleaned."""
    copy = tmp_path_factory.mktemp("regenerated")
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*", "_*"))
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    for command in ("from nbdev.doclinks import nbdev_export as f", "from nbdev.clean import nbdev_clean as f"):
        run = [sys.executable, "-c", f"{command}; f()"]
        subprocess.run(run, cwd=copy, env=environment, check=True, stdout=subprocess.DEVNULL)
    return copy


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_is_clean(path, regenerated):
    name = path.relative_to(ROOT)
    assert path.read_bytes() == (regenerated / name).read_bytes(), f"run `nbdev_clean --fname {name}`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_was_executed_without_errors(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs or not cells, f"committed without outputs: run `python tools/execute_notebooks.py {path}`"
    assert not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_stays_readable(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 80 and path.stat().st_size <= 500_000
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")


def test_modules_in_step_with_notebooks(regenerated):
    written = {path.relative_to(regenerated): path for path in (regenerated / "malmen_repro").glob("**/*.py")}
    fresh = {str(name): path.read_text(encoding="utf-8") for name, path in written.items()}
    stored = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in MODULES}
    generated = {name for name, text in stored.items() if "AUTOGENERATED! DO NOT EDIT!" in text[:2000]}
    generated |= {name for name in fresh if not name.endswith(("_modidx.py", "__init__.py"))}
    stale = [name for name in sorted(generated) if stored.get(name) != fresh.get(name)]
    assert not stale, "run `make export`, or remove the modules that no notebook exports"


def test_export_leaves_the_settings_alone(regenerated):
    for name in ("settings.ini", "pyproject.toml"):
        assert (regenerated / name).read_text() == (ROOT / name).read_text()


# --- names


TWICE = {  # public names of two modules -> why they may be
    "train": "the command is called after what it does, as the function is",
    "evaluate": "the same",
}


def public_names(path):
    """The public names that a module defines; a function whose first parameter is `self` is a method of a class."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            defined = [] if node.args.args and node.args.args[0].arg == "self" else [node.name]
        elif isinstance(node, ast.Assign):
            parts = [part for target in node.targets for part in getattr(target, "elts", [target])]
            defined = [part.id for part in parts if isinstance(part, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            defined = [node.target.id]
        else:
            defined = [node.name] if isinstance(node, ast.ClassDef) else []
        yield from (name for name in defined if not name.startswith("_"))


def test_one_name_stands_for_one_thing():
    owners = {}
    for path in MODULES:
        for name in public_names(path):
            owners.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    twice = {name: sorted(paths) for name, paths in owners.items() if len(paths) > 1}
    assert not {name: paths for name, paths in twice.items() if name not in TWICE}
    assert set(TWICE) <= set(twice), "a name that only one module has needs no exception"


# --- files


def tracked_files():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in run.stdout.split("\0") if name]


def readable_text(path):
    """The text of a file, without a notebook's pictures; nothing for a binary file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, FileNotFoundError):
        return ""
    if path.suffix != ".ipynb":
        return text
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output["data"] = {kind: data for kind, data in output.get("data", {}).items() if "image/png" not in kind}
    return re.sub(r"\\[nt]", " ", json.dumps(notebook))


def test_no_path_of_one_machine_in_the_files():
    homes = re.compile(r"(?<![\w./-])/(?:root|work|home|Users|tmp|private|opt|var/folders)/[\w.~-]+")
    found = {str(path.relative_to(ROOT)): homes.findall(readable_text(path)) for path in tracked_files()}
    assert not {name: paths for name, paths in found.items() if paths}


def test_no_large_file():
    large = [path.name for path in tracked_files() if path.exists() and path.stat().st_size > 5_000_000]
    assert not large


def test_the_readme_is_in_step_with_the_index_notebook():
    command = [sys.executable, ROOT / "tools" / "make_readme.py", "--check"]
    check = subprocess.run(command, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
