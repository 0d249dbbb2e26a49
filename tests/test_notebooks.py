"""Notebooks as a set: their numbers, and that what points to one points to it."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("**/*.ipynb"))
NUMBERED = [path for path in NOTEBOOKS if path.stem != "index"]
NUMBERS = {path.stem[:2]: path for path in NUMBERED}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+\.ipynb)\)")
MENTION = re.compile(r"\b[Nn]otebooks? ((?:\d\d?[a-d]?(?:, | and | to |–)?)+)")
PAGES = [*NOTEBOOKS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data_scripts/README.md"))]
MODULES = [path for path in (ROOT / "malmen_repro").glob("**/*.py") if path.name != "_modidx.py"]


def text_of(path):
    """The prose, code and shown text of a notebook; a page or module as it is."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        found.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            found.append("".join(output.get("data", {}).get("text/markdown", output.get("text", ""))))
    return "\n".join(found)


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def test_numbers_have_no_letters_and_each_is_used_once():
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem) for path in NUMBERED)
    assert not [number for number, times in Counter(path.stem[:2] for path in NUMBERED).items() if times > 1]


def test_folders_are_read_one_after_the_other():
    folders = ["", "methods", "replication", "results"]
    places = [folders.index("" if path.parent.name == "nbs" else path.parent.name) for path in NUMBERED]
    in_order = [place for _, place in sorted(zip([path.stem for path in NUMBERED], places, strict=True))]
    assert in_order == sorted(in_order)


def test_a_module_comes_from_the_notebook_folder_of_its_package():
    for path in NUMBERED:
        if name := re.search(r"default_exp ([\w.]+)", path.read_text(encoding="utf-8")):
            package = name[1].rpartition(".")[0]
            assert package == ("" if path.parent.name == "nbs" else path.parent.name), path.name


@pytest.mark.parametrize("path", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(path):
    base = path.parent
    for name, target in LINK.findall(text_of(path)):
        place = (base / target).resolve()
        assert place in NOTEBOOKS, f"[{name}]({target})"
        if number := re.search(r"\b\d\d\b", name):
            assert place.stem.startswith(number[0]), f"[{name}]({target})"


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=ids([*PAGES, *MODULES]))
def test_a_notebook_that_is_mentioned_is_there(path):
    mentioned = {number for run in MENTION.findall(text_of(path)) for number in re.findall(r"\d\d?[a-d]?", run)}
    assert mentioned <= NUMBERS.keys(), mentioned - NUMBERS.keys()
    assert not re.search(r"\b[Rr]ooms? \d", text_of(path)), "a room with a number is a notebook"
