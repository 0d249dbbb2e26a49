"""Run by `make wheel` in an environment that holds the wheel and its run-time requirements only."""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import malmen_repro

TOOLS = ("nbdev", "fastcore", "execnb", "ruff", "beartype", "hypothesis", "mypy")
EXTRAS = {"seaborn": "replication", "sklearn": "replication", "peft": "lora", "datasets": "datasets"}

assert "site-packages" in Path(malmen_repro.__file__).parts, f"not the installed wheel: {malmen_repro.__file__}"
assert malmen_repro.__version__ == importlib.metadata.version("malmen-repro")
present = [name for name in TOOLS if importlib.util.find_spec(name)]
assert not present, f"development tools in the clean environment: {present}"
not_extra = [name for name in EXTRAS if importlib.util.find_spec(name)]
assert not not_extra, f"packages of an extra in the clean environment: {not_extra}"
found = (module.name for module in pkgutil.walk_packages(malmen_repro.__path__, "malmen_repro."))
modules = [name for name in found if not name.endswith("._modidx")]
for name in modules:
    importlib.import_module(name)
command = Path(sys.executable).with_name("malmen-repro")
subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL, timeout=120)
from malmen_repro.facts import MissingExtraError, optional  # noqa: E402

for name, extra in EXTRAS.items():
    try:
        optional(name, extra)
    except MissingExtraError as error:
        assert f"malmen-repro[{extra}]" in str(error)
    else:
        raise AssertionError(f"{name} was found")
assert Path(malmen_repro.__file__).with_name("py.typed").exists()
print(f"wheel: malmen-repro {malmen_repro.__version__}, {len(modules)} modules imported without development tools")
