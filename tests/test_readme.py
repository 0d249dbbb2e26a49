"""README.md as a newcomer meets it: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from malmen_repro import cli
from malmen_repro.replication.paper_models import random_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON, SHELL = (re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S) for language in ("python", "sh"))
COMMANDS = [line for block in SHELL for line in block.splitlines() if line.startswith("malmen-repro ")]
LINKS = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
HUB = '"gpt2"'  # the name that the README loads


def test_it_is_short_and_its_parts_stand_in_order():
    assert len(README.encode()) <= 9216
    parts = [
        "# malmen-repro",
        "figures/tiny-scaling_decoder.png",
        "does not lead",
        "```python",
        "pip install",
        "make rep",
    ]
    parts += ["## What was reproduced", "80_report.ipynb", "malmen_repro/  ", "## Reading path"]
    places = [README.index(part) for part in parts]
    assert places == sorted(places)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder with a random GPT-2 of three blocks, whose tokenizer knows the words of the README."
    torch.manual_seed(0)
    tokenizer = random_tokenizer("gpt2", 512, PYTHON)
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 64}
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(vocab_size=512, **sizes, **ids)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


def test_its_python_edits_a_model_and_switches_the_edit_off(folder, capsys):
    assert len(PYTHON) == 1 and PYTHON[0].count(HUB) == 1
    names = {}
    exec(compile(PYTHON[0].replace(HUB, repr(str(folder))), "README.md", "exec"), names)
    edited, off = (line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())
    fact, lm, shift = (names[name] for name in ("fact", "lm", "shift"))
    assert edited.startswith(f"{fact.prompt} {fact.answer}") and fact.answer not in off
    (written,) = folder.parent.glob("*.safetensors")
    loaded = type(shift).load(written)
    with loaded.applied(lm):
        assert names["ask"]() == edited
    assert names["ask"]() == off


def test_it_takes_twelve_lines():
    lines = [line for line in PYTHON[0].splitlines() if line.strip()]
    assert len(lines) <= 12


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_parse(command):
    args = cli.parser().parse_args(shlex.split(command)[1:])
    assert callable(args.run)


def test_every_command_of_an_editors_life_is_there():
    assert {"train", "edit", "evaluate"} == {command.split()[1] for command in COMMANDS}


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_its_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_what_it_installs_is_offered():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    asked = re.findall(r"pip install '\.\[(\w+)\]'", README)
    assert asked and all(re.search(rf"^{name} = \[", extras, re.M) for name in asked)


def test_its_targets_are_the_makefiles():
    targets = re.findall(r"^make (\w+)", "\n".join(SHELL), re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["reproduce", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
