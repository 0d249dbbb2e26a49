"""The command line, from the outside."""

import argparse
import inspect
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from malmen_repro import cli, progress
from malmen_repro.consecutive import RememberingMALMEN, consecutive
from malmen_repro.editors import MALMEN, Editor, EditorConfig
from malmen_repro.evaluation import MEASURES, evaluate
from malmen_repro.facts import FactFileError, save_facts
from malmen_repro.language_models import LanguageModel, module_hash
from malmen_repro.methods.coachhook import CoachHooK, HookedShift
from malmen_repro.methods.memit import MEMIT, ROME
from malmen_repro.protocol import find_editor, load_edit
from malmen_repro.replication import commands, plans
from malmen_repro.replication.tier_settings import PAPERS, READY
from malmen_repro.training import TrainingConfig, without_training
from malmen_repro.weight_shifts import WeightShift, read_tensors
from tests.toy import toy_claims, toy_classifier, toy_corpus, toy_encoder_decoder, toy_facts, toy_model

COMMANDS = ("reproduce", "list", "train", "edit", "evaluate")
TRAIN = "--num-facts 4 --rank 4 --learning-rate 0.05 --meta-learning-rate 0.01 --steps 2 --device cpu --quiet"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, facts, trained editors and a shift; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    lm = toy_model()
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    save_facts(toy_facts(8), folder / "train.jsonl")
    save_facts(toy_facts(5, seed=1, start=20), folder / "new.jsonl")
    on = f"--model {folder / 'model'}"
    assert call(f"train {on} --facts {folder / 'train.jsonl'} --last 2 {TRAIN} --out {folder / 'editor'}") == 0
    trained = f"--last 2 --method MEND {TRAIN} --out {folder / 'mend-editor'}"
    assert call(f"train {on} --facts {folder / 'train.jsonl'} {trained}") == 0
    there = f"--editor {folder / 'editor'} --out {folder / 'shift.safetensors'} --quiet"
    assert call(f"edit {on} --facts {folder / 'new.jsonl'} {there}") == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """An empty working folder in which the made things have short names."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MALMEN_DATA", raising=False)
    return tmp_path


def call(line):
    """The exit code of a command line."""
    try:
        return cli.main(line.split())
    except SystemExit as stop:
        return stop.code or 0


def fails(capsys, line, code=2):
    """What a failing command line says on standard error: one line."""
    capsys.readouterr()
    assert call(line) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# --- help


@pytest.mark.parametrize("line", ["--help", *(f"{command} --help" for command in COMMANDS)])
def test_help(line, capsys):
    assert call(line) == 0
    text = capsys.readouterr().out
    assert "usage: malmen-repro" in text
    assert "example" in text or line == "list --help"
    assert all(len(row) <= 130 for row in text.splitlines())


def test_help_names_every_command(capsys):
    call("--help")
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_help_loads_nothing_heavy():
    code = "import sys; from malmen_repro.cli import parser; parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "matplotlib"} & set(done.stdout.split())


@pytest.mark.parametrize("line", ["", "nonsense", "reproduce --tier huge", "reproduce --ms x", "train", "edit"])
def test_wrong_usage(line, capsys):
    assert "usage:" in fails(capsys, line)


@pytest.mark.parametrize("line", ["reproduce --seeds 0", "train --model m --facts f --out o --num-facts -1"])
def test_numbers_count_from_one(line, capsys):
    assert "must be at least 1" in fails(capsys, line)


def test_data_defaults_to_the_environment(monkeypatch):
    monkeypatch.setenv("MALMEN_DATA", "somewhere")
    assert cli.parser().parse_args(["reproduce"]).data == Path("somewhere")
    assert cli.parser().parse_args(["reproduce", "--data", "else"]).data == Path("else")
    monkeypatch.setenv("MALMEN_DATA", "")
    assert cli.parser().parse_args(["reproduce"]).data is None


def test_defaults():
    args = cli.parser().parse_args(["reproduce"])
    assert (args.tier, args.out, args.experiments, args.fresh) == ("tiny", Path("runs"), [], False)
    assert args.seeds is args.ms is args.methods is None


@pytest.mark.parametrize(("setting", "editor", "training"), [
    ("tuned", EditorConfig(), TrainingConfig(lm_batch_size=32)),
    ("paper", EditorConfig.paper(), TrainingConfig.paper(lm_batch_size=32)),
])
def test_the_settings_of_train_are_those_of_their_name(setting, editor, training):
    args = cli.parser().parse_args(f"train --model m --facts f --out o --setting {setting}".split())
    assert cli.settings_of(args) == (editor, training)


def test_tuned_is_what_train_does_without_flags():
    args = cli.parser().parse_args("train --model m --facts f --out o".split())
    assert args.setting == "tuned" and cli.settings_of(args)[0] == EditorConfig()


def test_an_option_replaces_what_the_setting_has():
    line = "train --model m --facts f --out o --setting paper --rank 7 --no-plain-learning-rate --warmup 3 --locality 2"
    editor, training = cli.settings_of(cli.parser().parse_args(line.split()))
    assert editor == EditorConfig.paper(rank=7, plain_learning_rate=False)
    assert training == TrainingConfig.paper(warmup=3, locality_coefficient=2.0, lm_batch_size=32)


@pytest.mark.parametrize(("options", "tuned"), [
    ("", True), ("--learning-rate 0.1", False), ("--learning-rate 0.1 --tuned-start", True),
    ("--no-tuned-start", False),
])
def test_a_rate_to_start_at_is_taken_at_its_word(options, tuned):
    args = cli.parser().parse_args(f"train --model m --facts f --out o {options}".split())
    assert cli.settings_of(args)[1].tuned_start is tuned


# --- train, edit, evaluate


def test_train_writes_an_editor_and_its_history(made):
    names = {path.name.split("-")[0] for path in (made / "editor").iterdir()}
    assert names == {"config.json", "editor.safetensors", "history.json", "checkpoint"}
    history = json.loads((made / "editor" / "history.json").read_text())
    assert [step["step"] for step in history] == [0, 1]
    config = json.loads((made / "editor" / "config.json").read_text())
    assert config["method"] == "MALMEN" and config["last"] == 2 and config["config"]["rank"] == 4


def test_edit_is_what_the_editor_does(made):
    from malmen_repro.editors import MALMEN

    lm = toy_model()
    expected = MALMEN.from_pretrained(made / "editor", lm).edit(toy_facts(5, seed=1, start=20))
    found = WeightShift.load(made / "shift.safetensors")
    assert found.metadata == {"method": "MALMEN", "facts": 5} and found.shifts.keys() == expected.shifts.keys()
    for name, shift in expected.shifts.items():
        torch.testing.assert_close(found.shifts[name], shift)


@pytest.fixture
def corpus(here, monkeypatch):
    """Ordinary text, and a place for what is read off it."""
    monkeypatch.setenv("MALMEN_CACHE", str(here / "cache"))
    Path("corpus.txt").write_text("\n".join(toy_corpus()))


def edit_line(method, changes=None, facts="new.jsonl"):
    """The start of a command line that edits by a method that needs no training, in no time."""
    more = "--corpus corpus.txt --blocks 0" if method in ("MEMIT", "ROME", "CoachHooK") else ""
    small = {"MEMIT": {"target": QUICK}, "ROME": {"target": QUICK}, "CoachHooK": {"memit": {"target": QUICK}}}
    small = small.get(method, {"FT": {"epochs": 1}}.get(method, {"steps": 2}))
    settings = json.dumps(small | (changes or {})).replace(" ", "")
    return f"edit --model model --facts {facts} --method {method} {more} --settings {settings}"


@pytest.mark.parametrize("method", READY)
def test_edit_with_a_method_that_needs_no_training(corpus, capsys, method):
    assert call(f"{edit_line(method)} --out a/edit --quiet") == 0
    assert f"5 facts edited by {method}" in capsys.readouterr().out
    assert call("evaluate --model model --facts new.jsonl --shift a/edit --quiet") == 0
    assert "| ES " in capsys.readouterr().out
    edit = load_edit("a/edit")
    assert isinstance(edit, HookedShift) == (method == "CoachHooK") and edit.metadata["facts"] == 5


QUICK = {"steps": 2, "prefix_lengths": [2], "separator": "_", "essence": "{}_w3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give either --editor DIR"),
        ("--editor editor --method FT", "give either --editor DIR"),
        ("--method MEMIT", "MEMIT needs --corpus FILE"),
        ("--method MEMIT --corpus none.txt --blocks 0", "none.txt: there is no such file"),
        ("--method LoRA --state new.jsonl", "--state new.jsonl is a file"),
        ("--method CoachHooK --corpus new.jsonl", "CoachHooK needs --corpus FILE"),
        ("--method CoachHooK --merge-into there", "can't be merged"),
        ("--method LoRA --settings {", "--settings must be a JSON object"),
        ("--method LoRA --settings 3", "--settings must be a JSON object"),
        ('--method LoRA --settings {"speed":1}', "LoRA has no setting 'speed'; it has: learning_rate"),
        ('--method LoRA --settings {"rank":0}', "rank=0"),
        ('--method LoRA --settings {"rank":"8"}', "LoRA's rank cannot be '8': it is 8 by default"),
        ('--method LoRA --settings {"rank":true}', "LoRA's rank cannot be True"),
        ('--method MEMIT --settings {"target":3}', "and for MEMIT's target is 3"),
        ('--method MEMIT --settings {"target":{"speed":1}}', "MEMIT's target has no setting 'speed'; it has: steps"),
        ('--method CoachHooK --settings {"memit":{"target":{"steps":"x"}}}', "target's steps cannot be 'x'"),
        ("--method MEMIT --corpus new.jsonl --blocks 7", "there is no block 7 to edit"),
    ],
)
def test_edit_says_what_is_missing(here, capsys, monkeypatch, options, message):
    monkeypatch.setenv("MALMEN_CACHE", str(here / "cache"))
    assert message in fails(capsys, f"edit --model model --facts new.jsonl --out s {options} --quiet")


@pytest.mark.parametrize("text", [b"", b"\n \n\t\n"])
@pytest.mark.parametrize("method", ["MEMIT", "ROME", "CoachHooK"])
def test_a_corpus_without_text_is_refused(corpus, capsys, method, text):
    Path("corpus.txt").write_bytes(text)
    assert "corpus.txt holds no text" in fails(capsys, f"{edit_line(method)} --out s --quiet")


def test_a_corpus_that_is_no_text_is_refused(corpus, capsys):
    Path("corpus.txt").write_bytes(b"\xff\xfe\x00")
    assert "corpus.txt: isn't UTF-8 text" in fails(capsys, f"{edit_line('MEMIT')} --out s --quiet")


def test_a_corpus_may_be_packed(corpus, capsys):
    Path("corpus.txt.xz").write_bytes(lzma.compress(Path("corpus.txt").read_bytes()))
    for name, suffix in (("plain", ""), ("packed", ".xz")):
        assert call(f"{edit_line('MEMIT').replace('corpus.txt', f'corpus.txt{suffix}')} --out {name} --quiet") == 0
    plain, packed = (WeightShift.load(name).shifts for name in ("plain", "packed"))
    assert all(torch.equal(plain[name], shift) for name, shift in packed.items())


@pytest.mark.parametrize("method", ["MEMIT", "CoachHooK"])
def test_edits_show_progress_unless_quiet(corpus, capsys, method, monkeypatch):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)  # where somebody looks on
    assert call(f"{edit_line(method)} --out s") == 0
    error = capsys.readouterr().err
    assert all(bar in error for bar in ("keys of a corpus", "target vectors", "spread"))
    assert call(f"{edit_line(method)} --out s --quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", ["LoRA", "MEMIT", "CoachHooK"])
@pytest.mark.parametrize("state", ["", "--state run"])
@pytest.mark.parametrize(("asked", "expected"), [("", None), ("--batch-size 3", 3)])
def test_rows_at_once_are_the_methods_own_unless_asked(corpus, monkeypatch, method, state, asked, expected):
    real, seen = find_editor(method).edit, []

    def noted(self, *args, **options):
        seen.append(options.get("batch_size"))
        return real(self, *args, **options)

    monkeypatch.setattr(find_editor(method), "edit", noted)
    assert call(f"{edit_line(method)} --out s --quiet {state} {asked}") == 0
    assert seen == [expected]


def test_the_methods_of_the_command_line_are_those_there_are(capsys):
    assert all(cli.ready_method(name) == name for name in READY)
    assert all(cli.trained_method(name) == name for name in ("MALMEN", "MEND", "MALMEN untrained"))
    assert cli.UNTRAINED in plans.METHODS
    call("edit --help")
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in READY)


def test_a_method_that_is_not_trained_is_made_by_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--model", "m", "--facts", "f", "--out", "o", "--method", "FT"])
    assert "FT needs no training: malmen-repro edit --method" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["edit", "--model", "m", "--facts", "f", "--out", "o", "--method", "MEMAT"])
    assert "no editor 'MEMAT' is installed; did you mean MEMIT" in capsys.readouterr().err


def test_rows_at_once_are_as_the_help_says(capsys):
    call("edit --help")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 32; 64 for MEMIT, ROME and CoachHooK" in text and "in their papers' setting 21)" in text
    for kind in map(find_editor, READY):
        rows = inspect.signature(kind.edit).parameters["batch_size"].default
        assert rows == (64 if kind in (MEMIT, ROME, CoachHooK) else 32)
    assert {len(c.target.prefix_lengths) + 1 for c in (PAPERS["MEMIT"], PAPERS["ROME"], PAPERS["CoachHooK"].memit)} == {
        21
    }


@pytest.mark.parametrize("method", ["MALMEN", "MEND", "MALMEN untrained", "MALMEN, accumulated"])
def test_a_method_with_an_editor_is_not_made_by_name(capsys, method):
    with pytest.raises(SystemExit):
        cli.main(["edit", "--model", "m", "--facts", "f", "--out", "o", "--method", method])
    assert f"{method} has an editor, which `train` writes: give it by --editor DIR" in capsys.readouterr().err


def test_untrained_malmen_is_the_experiments(here, capsys):
    line = f"train --model model --facts train.jsonl --last 2 {TRAIN} --out plain".split()
    assert cli.main([*line, "--method", "MALMEN untrained"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("MALMEN untrained for 2 layers: ") and "no steps; η is " in text
    lm, facts = toy_model(), toy_facts(8)
    expected = MALMEN(lm, EditorConfig(rank=1, blocks=1))
    rate = without_training(expected, facts, TrainingConfig(num_facts=4, lm_batch_size=32))
    assert f"η is {rate:.3g} for every layer" in text
    assert {path.name for path in Path("plain").iterdir()} == {"config.json", "editor.safetensors", "history.json"}
    assert call("edit --model model --editor plain --facts new.jsonl --out s --quiet") == 0
    found, wanted = WeightShift.load("s"), expected.edit(toy_facts(5, seed=1, start=20))
    for layer, shift in wanted.shifts.items():
        torch.testing.assert_close(found.shifts[layer], shift)


# --- batch after batch

EDITOR = {"MALMEN": "editor", "MEND": "mend-editor"}


@pytest.fixture
def batches(corpus):
    """Two files of facts, and the line that edits one of them by a method."""
    save_facts(toy_facts(3, seed=1, start=20), "1.jsonl")
    save_facts(toy_facts(4, seed=1, start=30), "2.jsonl")

    def line(method, number, changes=None):
        if method not in READY:
            return f"edit --model model --editor {EDITOR.get(method, method)} --facts {number}.jsonl --quiet"
        return f"{edit_line(method, changes, f'{number}.jsonl')} --quiet"

    return line


def run_of(method):
    """What the command line goes on with, in Python."""
    if method in EDITOR:
        editor = Editor.from_pretrained(EDITOR[method], toy_model())
        return consecutive(RememberingMALMEN.of(editor) if method == "MALMEN" else editor)
    args = cli.parser().parse_args(f"{edit_line(method)} --out o --quiet".split())
    return consecutive(cli.ready(args, LanguageModel.from_pretrained("model", device="cpu")))


@pytest.mark.parametrize("method", [*EDITOR, *READY])
def test_later_edits_go_on_from_earlier_ones(batches, capsys, method):
    assert call(f"{batches(method, 1)} --state a/run --out 1") == 0
    assert "State: a/run, with 3 facts in 1 batches" in capsys.readouterr().out
    assert call(f"{batches(method, 2)} --state a/run --out 2") == 0
    text = capsys.readouterr().out
    assert "4 facts edited by" in text and "State: a/run, with 7 facts in 2 batches" in text
    run = run_of(method)
    for number, count, start in ((1, 3, 20), (2, 4, 30)):
        expected, found = run.edit(toy_facts(count, seed=1, start=start)), load_edit(str(number))
        assert found.metadata == expected.metadata and found.metadata["batches"] == number
        for layer, shift in expected.shifts.items():
            torch.testing.assert_close(found.shifts[layer], shift, rtol=1e-4, atol=1e-6)
    assert call(f"{batches(method, 2)} --out alone") == 0  # without a state an edit is of its own facts
    assert load_edit("alone").metadata["facts"] == 4


def test_malmen_goes_on_accumulated(batches):
    for number in (1, 2):
        assert call(f"{batches('MALMEN', number)} --state run --out {number}") == 0
    assert load_edit("2").metadata == {"method": "MALMEN, accumulated", "facts": 7, "batches": 2}


@pytest.mark.parametrize("method", ["MALMEN", "LoRA", "CoachHooK"])
def test_a_batch_that_fails_leaves_the_state(batches, capsys, monkeypatch, method):
    assert call(f"{batches(method, 1)} --state run --out 1") == 0
    before = Path("run/state.safetensors").read_bytes()
    Path("file").write_text("")
    fails(capsys, f"{batches(method, 2)} --state run --out file/2")  # the shift cannot be written
    rows = [{"prompt": "w1 " * 40, "answer": "w2", "subject": "w1"}]  # longer than the model's context
    Path("3.jsonl").write_text(json.dumps(rows[0]) + "\n")
    fails(capsys, f"{batches(method, 3)} --state run --out 3")
    assert Path("run/state.safetensors").read_bytes() == before and not Path("3").exists()
    assert [path.name for path in Path("run").iterdir()] == ["state.safetensors"]
    assert call(f"{batches(method, 2)} --state run --out 2") == 0
    assert load_edit("2").metadata["batches"] == 2


def test_a_first_batch_that_fails_begins_no_run(batches, capsys):
    Path("file").write_text("")
    fails(capsys, f"{batches('LoRA', 1)} --state run --out file/1")
    assert not Path("run").exists()


def test_a_run_goes_on_with_the_same_editor_only(batches, capsys):
    for method in ("CoachHooK", "LoRA", "MALMEN"):
        assert call(f"{batches(method, 1)} --state {method}-run --out 1") == 0
    before = {path: path.read_bytes() for path in Path().glob("*-run/*")}
    for line, message in (
        (batches("CoachHooK", 2, {"alpha": 1.0}) + " --state CoachHooK-run", "other settings: alpha=2.2, now 1.0"),
        (batches("MEMIT", 2) + " --state CoachHooK-run", "was begun by CoachHooK, not by MEMIT"),
        (batches("LoRA", 2, {"rank": 2}) + " --state LoRA-run", "other settings: rank=8, now 2"),
        (batches("MEND", 2) + " --state MALMEN-run", "was begun by MALMEN, accumulated, not by MEND"),
    ):
        error = fails(capsys, f"{line} --out 2")
        assert message in error and error.count("\n") == 1
    Path("corpus.txt").write_text("\n".join(toy_corpus()[1:]))
    assert "other settings: corpus=" in fails(capsys, f"{batches('CoachHooK', 2)} --state CoachHooK-run --out 2")
    assert call(f"train --model model --facts train.jsonl --last 2 {TRAIN} --seed 1 --out other") == 0
    assert "other settings: networks=" in fails(capsys, f"{batches('other', 2)} --state MALMEN-run --out 2")
    other = toy_model(seed=3)
    other.model.save_pretrained("another")
    other.tokenizer.save_pretrained("another")
    line = f"{batches('LoRA', 2)} --state LoRA-run --out 2".replace("--model model", "--model another")
    assert "edits another language model: its weights differ" in fails(capsys, line)
    Path("LoRA-run/state.safetensors").write_bytes(b"damaged")
    assert "holds no readable consecutive run" in fails(capsys, f"{batches('LoRA', 2)} --state LoRA-run --out 2")
    before.pop(Path("LoRA-run/state.safetensors"))
    assert all(path.read_bytes() == there for path, there in before.items()) and not Path("2").exists()


def test_a_run_can_be_merged_and_still_goes_on(batches):
    for number in (1, 2):
        assert call(f"{batches('MALMEN', number)} --state run --out {number} --merge-into edited{number}") == 0
    lm, facts = toy_model(), toy_facts(4, seed=1, start=30)
    merged = evaluate(LanguageModel.from_pretrained("edited2", last=2, device="cpu"), facts, None)
    assert evaluate(lm, facts, WeightShift.load("2")).values["ES"].tolist() == merged.values["ES"].tolist()


def test_training_goes_on_where_it_stopped(here, capsys):
    steps = TRAIN.replace("--steps 2", "--steps {}")
    for count in (1, 3):
        assert call(f"train --model model --facts train.jsonl --last 2 {steps.format(count)} --out mine") == 0
    assert "3 steps" in capsys.readouterr().out
    assert call(f"train --model model --facts train.jsonl --last 2 {steps.format(3)} --out straight") == 0
    mine, straight = (json.loads(Path(name, "history.json").read_text()) for name in ("mine", "straight"))
    assert [step["generalization"] for step in mine] == [step["generalization"] for step in straight]


def test_other_facts_do_not_go_on_from_that_checkpoint(here, capsys):
    assert call(f"train --model model --facts train.jsonl --last 2 {TRAIN} --out mine") == 0
    before = {path: path.read_bytes() for path in Path("mine").iterdir()}
    error = fails(capsys, f"train --model model --facts new.jsonl --last 2 {TRAIN} --out mine")
    assert "--out mine holds another run's work (config.json), which would be overwritten" in error
    assert {path: path.read_bytes() for path in Path("mine").iterdir()} == before
    assert call(f"train --model model --facts new.jsonl --last 2 {TRAIN} --out yours") == 0
    assert len([path for name in ("mine", "yours") for path in Path(name).glob("checkpoint-*.pt")]) == 2


def test_other_settings_in_the_same_folder_are_refused(here, capsys):
    assert call(f"train --model model --facts train.jsonl --last 2 {TRAIN} --out mine") == 0
    error = fails(capsys, f"train --model model --facts train.jsonl --last 2 {TRAIN} --rank 5 --out mine")
    assert "belongs to another run: editor's rank differ" in error


def test_mend_is_trained_too(here):
    assert call(f"train --model model --facts train.jsonl --last 1 --method MEND {TRAIN} --out mend") == 0
    assert call("edit --model model --editor mend --facts new.jsonl --out deep/er/mend.safetensors --quiet") == 0
    assert WeightShift.load("deep/er/mend.safetensors").metadata["method"] == "MEND"


def test_bare_facts_are_noted_and_paired(here, capsys):
    rows = [{"prompt": f"w{i} w1", "answer": f"w{i}"} for i in range(5)]
    Path("bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"w{i} w2 w3", "answer": "w5"} for i in range(3)]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(f"train --model model --facts bare.jsonl --last 1 {TRAIN} --out a") == 0
    notes = capsys.readouterr().err
    assert "5 of 5 facts have no equivalent prompts" in notes and "5 of 5 facts have no unrelated tuple" in notes
    assert call(f"train --model model --facts bare.jsonl --unrelated other.jsonl --last 1 {TRAIN} --out b") == 0
    assert "unrelated" not in capsys.readouterr().err
    assert all(step["locality"] > 0 for step in json.loads(Path("b/history.json").read_text()))


def test_merged_copy_says_what_the_shift_says(here):
    on = "--model model --editor editor --facts new.jsonl"
    assert call(f"edit {on} --out s.safetensors --merge-into edited --quiet") == 0
    lm, facts = toy_model(), toy_facts(5, seed=1, start=20)
    edited = LanguageModel.from_pretrained("edited", last=2, device="cpu")
    with_shift = evaluate(lm, facts, WeightShift.load("s.safetensors"))
    merged = evaluate(edited, facts, None)
    assert with_shift.values["ES"].tolist() == merged.values["ES"].tolist()
    assert module_hash(edited.model) != module_hash(lm.model)
    assert module_hash(lm.model) == module_hash(LanguageModel.from_pretrained("model", last=2, device="cpu").model)


def test_merging_never_overwrites_the_model(here, capsys):
    error = fails(capsys, "edit --model model --editor editor --facts new.jsonl --out s.st --merge-into model")
    assert "would overwrite the model" in error and not Path("s.st").exists()


def test_evaluate_prints_and_writes_what_evaluate_gives(here, capsys):
    assert call("evaluate --model model --facts new.jsonl --shift shift.safetensors --out a/scores.json --quiet") == 0
    text = capsys.readouterr().out
    assert all(name in text and meaning in text for name, meaning in MEASURES.items())
    written = json.loads(Path("a/scores.json").read_text())
    scores = evaluate(toy_model(), toy_facts(5, seed=1, start=20), WeightShift.load("shift.safetensors"))
    assert written["per_fact"]["ES"] == pytest.approx(scores.values["ES"].tolist(), abs=1e-4)
    assert written["shift"] == {"method": "MALMEN", "facts": 5} and written["facts"] == 5


def test_evaluate_without_a_shift_scores_the_unedited_model(here, capsys):
    assert call("evaluate --model model --facts new.jsonl --out scores.json --quiet") == 0
    written = json.loads(Path("scores.json").read_text())
    assert written["per_fact"]["ES"] == written["per_fact"]["ES before"] and written["shift"] is None
    assert set(written["per_fact"]["LS agreement"]) == {1.0}


def test_measures_without_tuples_show_a_dash(here, capsys):
    Path("bare.jsonl").write_text('{"prompt": "w1", "answer": "w2"}\n')
    assert call("evaluate --model model --facts bare.jsonl --quiet") == 0
    assert any(row.startswith("| LS ") and "–" in row for row in capsys.readouterr().out.splitlines())


# --- bad input: one line, exit code 2


@pytest.mark.parametrize("command", ["train --out x", "edit --editor editor --out x", "evaluate"])
def test_bad_facts_are_found_before_the_model_is_loaded(here, capsys, command):
    Path("bad.jsonl").write_text('{"prompt": "w1", "answer": "w2"}\n{"prompt": "w3", "answer": ""}\n')
    on = f"{command} --model nowhere"
    assert fails(capsys, f"{on} --facts bad.jsonl").endswith(": error: bad.jsonl, line 2, field 'answer': is empty\n")
    assert "there is no such file" in fails(capsys, f"{on} --facts missing.jsonl")
    Path("two.jsonl").write_text('{"prompt": "w1", "answer": "w2"}\n{"prompt": "w1", "answer": "w3"}\n')
    assert "has the answers 'w2'" in fails(capsys, f"{on} --facts two.jsonl")
    Path("none.jsonl").write_text("")
    assert "holds no facts" in fails(capsys, f"{on} --facts none.jsonl")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train --model model --facts train.jsonl --layers h.*.c_proj --num-facts 4 --out x --quiet", "near misses:"),
        ("train --model model --facts train.jsonl --last 9 --num-facts 4 --out x --quiet", "last=9"),
        ("train --model model --facts train.jsonl --num-facts 9 --out x", "--num-facts 9 asks for more than the 8"),
        ("train --model nowhere --facts train.jsonl --num-facts 4 --out x", "'nowhere' is not on this machine"),
        ("train --model gpt2 --facts train.jsonl --num-facts 4 --out x", "'gpt2' is not on this machine"),
        ("edit --model model --editor nothing --facts new.jsonl --out x", "nothing holds no readable editor"),
        ("edit --model model --editor model --facts new.jsonl --out x", "model holds no readable editor"),
        ("evaluate --model model --facts new.jsonl --shift nothing.st", "there is no shift file 'nothing.st'"),
        ("evaluate --model model --facts new.jsonl --shift new.jsonl", "new.jsonl is damaged or not a shift file"),
        ("evaluate --model editor --facts new.jsonl", "cannot be loaded"),
        ("reproduce scaling_decodr", "did you mean scaling_decoder"),
        ("reproduce --tier small", "give their folder with --data, or set MALMEN_DATA"),
        ("reproduce --tier small --data nowhere", "nowhere lacks fever/train.jsonl.xz"),
        ("reproduce --tier paper", "without them there is the tiny tier"),
    ],
)
def test_clean_errors(here, capsys, line, expected):
    start = time.perf_counter()
    error = fails(capsys, line)
    assert expected in error and error.startswith("malmen-repro: error: ") and error.count("\n") == 1
    assert time.perf_counter() - start < 10
    assert not Path("x").exists()


def test_an_editor_of_another_model_is_refused(here, capsys):
    other = toy_model(seed=3)
    other.model.save_pretrained("other")
    other.tokenizer.save_pretrained("other")
    error = fails(capsys, "edit --model other --editor editor --facts new.jsonl --out x --quiet")
    assert "trained for another language model" in error


def test_an_output_that_cannot_be_written_is_one_line(here, capsys):
    Path("file").write_text("")
    assert "error:" in fails(capsys, f"train --model model --facts train.jsonl --last 1 {TRAIN} --out file/editor")


def test_debug_shows_the_traceback(here):
    with pytest.raises(FactFileError):
        cli.main("evaluate --model model --facts missing.jsonl --debug".split())


def test_a_bug_is_one_line_and_debug_shows_its_traceback(here, capsys, monkeypatch):
    monkeypatch.setattr(commands, "list_experiments", lambda args: 1 / 0)
    error = fails(capsys, "list")
    assert error.startswith("malmen-repro: error: unexpected, perhaps a fault of this program: ZeroDivisionError: ")
    assert "--debug" in error and error.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        cli.main(["list", "--debug"])


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "list_experiments", stopped)
    assert "same command again" in fails(capsys, "list", 130)


# --- nothing that is read is written over

SAFE = "edit --model model --facts new.jsonl --quiet --device cpu"
OVER = {  # what a slip of the hand may ask for -> what is said
    f"{SAFE} --editor editor --out new.jsonl": "--out new.jsonl would overwrite the facts",
    f"{SAFE} --editor editor --out ./x/../new.jsonl": "would overwrite the facts",
    f"{SAFE} --editor editor --out link.jsonl": "would overwrite the facts",
    f"{SAFE} --editor editor --out editor": "would overwrite the editor",
    f"{SAFE} --editor editor --out editor/config.json": "--out editor/config.json lies inside the editor",
    f"{SAFE} --editor editor --out model/config.json": "lies inside the model",
    f"{SAFE} --editor editor --out other/model.safetensors": "into a folder that holds a language model",
    f"{SAFE} --editor editor --out mend-editor/editor.safetensors": "into a folder that holds an editor",
    f"{SAFE} --editor editor --out run/state.safetensors": "into a folder that holds the state of a run",
    f"{SAFE} --editor editor --out s --merge-into editor": "would overwrite the editor",
    f"{SAFE} --editor editor --out s --merge-into mend-editor": "into a folder that holds an editor",
    f"{SAFE} --editor editor --out s --merge-into other": "into a folder that holds a language model",
    f"{SAFE} --editor editor --out s --merge-into full": "--merge-into full is there and not empty",
    f"{SAFE} --editor editor --out s --merge-into s": "would overwrite --out",
    f"{SAFE} --editor editor --out s --merge-into .": "lies inside --merge-into .",
    f"{SAFE} --editor editor --out s --state editor": "would overwrite the editor",
    f"{SAFE} --editor editor --out s --state mend-editor": "into a folder that holds an editor",
    f"{SAFE} --editor editor --out days/s --state days": "--out lies inside --state days",
    f"{SAFE} --method LoRA --corpus text --out text": "would overwrite the corpus",
    "evaluate --model model --facts new.jsonl --out new.jsonl": "would overwrite the facts",
    "evaluate --model model --facts new.jsonl --shift shift.safetensors --out shift.safetensors": "overwrite the shift",
    "evaluate --model model --facts new.jsonl --out model/config.json": "lies inside the model",
    "train --model model --facts train.jsonl --out model": "would overwrite the model",
    "train --model model --facts train.jsonl --out model/editor": "lies inside the model",
    "train --model model --facts train.jsonl --unrelated new.jsonl --out new.jsonl": "overwrite the unrelated facts",
    "train --model model --facts train.jsonl --out other": "into a folder that holds a language model",
    "train --model gpt2 --facts train.jsonl --out gpt2": "would overwrite the model",
    "train --model model --facts full/facts.jsonl --out full": "the facts lies inside --out full",
    "reproduce --out other": "into a folder that holds a language model",
}


@pytest.fixture
def full_of_things(here):
    """More that could be lost, beside the made things; gives what is in all files."""
    shutil.copytree("model", "other")
    Path("run").mkdir()
    for name in ("run/state.safetensors", "full/facts.jsonl", "text"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("something")
    Path("link.jsonl").symlink_to("new.jsonl")
    return lambda: {path: path.read_bytes() for path in sorted(here.rglob("*")) if path.is_file()}


def test_nothing_that_is_read_is_written_over(full_of_things, capsys):
    before = full_of_things()
    for line, message in OVER.items():
        error = fails(capsys, line)
        assert message in error and error.count("\n") == 1, (line, error)
    assert full_of_things() == before


def test_a_training_goes_into_no_folder_of_another(here, capsys):
    line = f"train --model model --facts train.jsonl --last 2 {TRAIN}"
    shutil.copytree(Path("editor").resolve(), "mine")
    assert call(f"{line} --out mine") == 0  # its own: the same model and facts
    next(Path("mine").glob("checkpoint-*.pt")).unlink()
    before = {path: path.read_bytes() for path in Path("mine").iterdir()}
    assert "--out mine holds another run's work" in fails(capsys, f"{line} --out mine")
    with pytest.raises(cli.UsageError, match="holds another run's work"):
        cli.check_own(Path("mine"), None)
    assert {path: path.read_bytes() for path in Path("mine").iterdir()} == before


# --- outputs are checked before any work


@pytest.fixture
def no_work(monkeypatch):
    """Nothing is edited, trained or scored."""
    for kind in (Editor, find_editor("LoRA")):
        monkeypatch.setattr(kind, "edit", lambda *_, **__: pytest.fail("there was work"))
    monkeypatch.setattr(Editor, "train", lambda *_, **__: pytest.fail("there was work"))
    monkeypatch.setattr(LanguageModel, "batches", lambda *_, **__: pytest.fail("there was work"))


UNWRITABLE = ["file/s", "folder", "a\0b"] + (["/dev/null", "/dev/full", "/proc/s"] if os.path.exists("/proc") else [])


@pytest.mark.parametrize("place", UNWRITABLE)
def test_an_output_that_cannot_be_written_is_found_before_the_work(here, capsys, no_work, place):
    Path("file").touch()
    Path("folder").mkdir()
    for line in (f"{SAFE} --editor editor", "evaluate --model model --facts new.jsonl --device cpu"):
        capsys.readouterr()
        assert cli.main([*line.split(), "--out", place]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "unexpected" not in error
    other = "file" if place == "folder" else place  # where a folder is wanted
    lines = (f"train --model model --facts train.jsonl --last 2 {TRAIN} --out", f"{SAFE} --method LoRA --out s --state")
    for line in (*lines, f"{SAFE} --method LoRA --out s --merge-into"):
        assert cli.main([*line.split(), other]) == 2
        assert "unexpected" not in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir() if not path.is_symlink()) == ["file", "folder"]


def test_room_on_the_disk_is_asked_for_before_the_work(here, capsys, no_work, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for line in (
        f"{SAFE} --editor editor --out s",
        f"{SAFE} --editor editor --out s --merge-into merged",
        f"train --model model --facts train.jsonl --last 2 {TRAIN} --out e",
    ):
        assert "MB, and its disk has 0.0 MB left" in fails(capsys, line)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=6000))  # enough for the shift alone
    assert "merged will take about" in fails(capsys, f"{SAFE} --editor editor --out s --merge-into merged")


@pytest.fixture
def disk(tmp_path):
    """Makes a disk of its own: almost full, or read only. For root only."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def make(how):
        subprocess.run(["umount", mounted], capture_output=True)
        mode = "ro" if how == "read-only" else "rw"
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=1m,{mode}", "tmpfs", mounted], capture_output=True)
        if made.returncode:
            pytest.skip("a disk can be made by root only")
        if how == "full":
            about = os.statvfs(mounted)
            (mounted / "filling").write_bytes(bytes(about.f_bavail * about.f_frsize))

    yield make
    subprocess.run(["umount", mounted], capture_output=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="for root only")
@pytest.mark.parametrize("measured", [True, False])  # a disk may fill up after it was asked for room
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_full_or_read_only_disk_is_one_line(here, disk, capsys, monkeypatch, how, measured):
    if not measured:
        usage = shutil.disk_usage(".")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    there = (f"{SAFE} --editor editor --out disk/s", f"{SAFE} --editor editor --out s --state disk/st")
    there += (f"train --model model --facts train.jsonl --last 2 {TRAIN} --out disk/e",)
    there += (f"{SAFE} --editor editor --out s --merge-into disk/m", "evaluate --model model --facts new.jsonl")
    for line in (*there[:-1], f"{there[-1]} --quiet --out disk/scores.json"):
        disk(how)
        error = fails(capsys, line)
        assert "unexpected, perhaps" not in error and error.count("\n") == 1, line
        assert how == "full" or "Read-only file system" in error


def test_a_merged_copy_is_there_whole_or_not_at_all(here, capsys, monkeypatch):
    line = f"{SAFE} --editor editor --out s --merge-into merged"
    Path("merged").mkdir()

    def stopped(self, folder, **options):
        Path(folder, "half").touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", stopped)
        assert "merged cannot be written: No space left on device" in fails(capsys, line)
    assert not any(Path("merged").iterdir()) and not list(Path().glob(".merged*.part"))
    assert call(line) == 0 and call("evaluate --model merged --facts new.jsonl --quiet") == 0


# --- a batch is in a state once


def test_the_same_command_edits_once(batches, capsys):
    for method in ("MALMEN", "LoRA", "CoachHooK"):
        line = f"{batches(method, 1)} --state {method}-run --out"
        assert call(f"{batches(method, 2)} --state {method}-run --out 0") == 0
        assert call(f"{line} 1") == 0
        before = Path(f"{method}-run/state.safetensors").read_bytes()
        capsys.readouterr()
        assert call(f"{line} 2") == 0
        said = capsys.readouterr()
        assert f"already in {method}-run, as batch 2; --again edits them once more" in said.err
        assert "edited by" not in said.out and "Shift: 2" in said.out
        assert Path(f"{method}-run/state.safetensors").read_bytes() == before
        one, two = load_edit("1"), load_edit("2")
        assert one.metadata == two.metadata and all(torch.equal(one.shifts[n], two.shifts[n]) for n in one.shifts)
        assert call(f"{line} 3 --again") == 0 and load_edit("3").metadata["batches"] == 3
    assert "--again is for --state DIR" in fails(capsys, f"{batches('LoRA', 1)} --out 4 --again")


# In a process of its own: everything is imported once, and each command runs in a child.
CHILDREN = """
import os, signal, sys
import malmen_repro.consecutive
from malmen_repro import cli

def child(line, stop=None):
    "Run a command in a child, killed at its stop-th move or flush of a file; its exit code."
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    seen = [0]
    for name in ("replace", "rename", "fsync"):
        def counted(*args, real=getattr(os, name), **options):
            for when in range(2):  # before it, and after it
                if seen[0] == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen[0] += 1
                done = real(*args, **options) if not when else done
            return done
        setattr(os, name, counted)
    os._exit(cli.main(line.split()))

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def children(code):
    """What a script with children prints."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILDREN + code], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_killed_command_given_again_leaves_what_an_undisturbed_one_does(batches):
    lines = [f"{batches('MALMEN', number)} --device cpu --state {{}} --out {number}" for number in (1, 2)]
    for line in lines:
        assert call(line.format("straight")) == 0
    expected, header = read_tensors(Path("straight/state.safetensors"))
    assert call(lines[0].format("begun")) == 0
    killed = children(f"""
import shutil
for stop in range(100):
    shutil.copytree("begun", f"run{{stop}}")
    line = {lines[1]!r}.format(f"run{{stop}}")
    code = ended(child(line, stop))
    assert ended(child(line)) == 0
    print(code)
    if code == 0:
        break
""")
    assert killed[-1] == "0" and set(killed[:-1]) == {"-9"} and len(killed) > 4
    for stop in range(len(killed)):
        found, said = read_tensors(Path(f"run{stop}/state.safetensors"))
        assert said == header and found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    shift = WeightShift.load("2")
    assert shift.metadata["batches"] == 2 and shift.metadata["facts"] == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_commands_at_the_same_time_lose_nothing(batches):
    lines = []
    for i in range(6):
        save_facts(toy_facts(2, seed=i, start=20 + 5 * i), f"{i}.jsonl")
        lines.append(f"{batches('MALMEN', i)} --device cpu --state run --out {i}")
    assert children(f"print(*map(ended, [child(line) for line in {lines!r}]))") == ["0"] * 6
    assert sorted(load_edit(str(i)).metadata["batches"] for i in range(6)) == [1, 2, 3, 4, 5, 6]
    assert call(f"{lines[0]} --again") == 0 and load_edit("0").metadata["batches"] == 7


# --- errors, and advice that can be followed


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("evaluate --model model --facts new.jsonl --device gpu", "there is no device 'gpu' here; there is: cpu"),
        ("tune --device gpu", "there is no device 'gpu' here"),
        (f"{SAFE} --editor editor --out s --layers x", "--layers and --last are for --method"),
        (f"{SAFE} --method LoRA --out s --last 9", "choose 1 to 3 (--layers PATTERN)"),
        (f"{SAFE} --method MEMIT --corpus text --blocks 0 --layers x --out s", "leave --layers and --last out"),
        (f"{SAFE} --method MEMIT --corpus text --blocks 0 --out s", "--corpus text is too small"),
        (f'{SAFE} --method MEMIT --out s --settings {{"target":{{"prefix_lengths":["x"]}}}}', "cannot be ['x']"),
        (f'{SAFE} --method LoRA --out s --settings {{"learning_rate":1{"0" * 400}}}', "learning_rate cannot be 1000"),
        (f"{SAFE} --method LoRA --out s --settings {'[' * 99999}", "--settings must be a JSON object"),
        (f'{SAFE} --method MEMIT --out s --settings {{"target":{{"separator":"\\ud800"}}}}', "separator cannot be"),
        ("list --out new.jsonl", "--out new.jsonl is a file"),
        ("reproduce --out new.jsonl", "new.jsonl is a file; a folder is to be written"),
    ],
)
def test_what_was_typed_wrong_is_one_line(here, capsys, monkeypatch, line, expected):
    monkeypatch.setenv("MALMEN_CACHE", str(here / "cache"))
    Path("text").write_text("w1 w2 w3\n")
    error = fails(capsys, line)
    assert expected in error and error.count("\n") == 1 and len(error) < 600


@pytest.mark.parametrize("option", ["learning-rate nan", "meta-learning-rate inf", "locality nan", "seed -1"])
def test_numbers_that_are_none_are_refused(option, capsys):
    assert " must be a " in fails(capsys, f"train --model m --facts f --out o --{option}")


def test_a_seed_is_one_that_generators_take(capsys):
    assert "from 0 to 9,223," in fails(capsys, f"train --model m --facts f --out o --seed {2**70}")
    assert cli.seed(str(2**63 - 1)) == 2**63 - 1


@pytest.mark.parametrize("make", [toy_classifier, toy_encoder_decoder])
def test_training_without_layers_takes_the_second_feed_forward_layers(here, capsys, make):
    lm = make(last=None)
    lm.model.save_pretrained("another")
    lm.tokenizer.save_pretrained("another")
    save_facts((toy_claims if make is toy_classifier else toy_facts)(8), "facts.jsonl")
    assert call(f"train --model another --facts facts.jsonl {TRAIN} --out e") == 0
    assert f"{len(lm.layers)} layers: {', '.join(lm.layers)}" in capsys.readouterr().out
    assert call("edit --model another --facts facts.jsonl --editor e --out s --quiet --device cpu") == 0


def unknown_architecture():
    """A model that `feed_forward` does not know, in the folder neox."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=62, max_position_embeddings=24, **sizes)
    GPTNeoXForCausalLM(config).save_pretrained("neox")
    toy_model().tokenizer.save_pretrained("neox")


def test_an_unknown_architecture_is_edited_at_layers_of_a_pattern(here, capsys):
    unknown_architecture()
    line = "edit --model neox --facts new.jsonl --method LoRA --out s --quiet --device cpu"
    error = fails(capsys, line)
    assert "no feed-forward layers are known for 'gpt_neox'" in error and "--layers PATTERN" in error
    assert call(f"{line} --layers *.dense_4h_to_h --last 1 --settings {{\"steps\":1}}") == 0
    assert list(load_edit("s").shifts) == ["gpt_neox.layers.1.mlp.dense_4h_to_h"]


def test_an_editor_of_the_model_before_a_merge_is_told_of_the_state(here, capsys):
    assert call(f"{SAFE} --editor editor --out s --merge-into merged") == 0
    error = fails(capsys, f"{SAFE.replace('--model model', '--model merged')} --editor editor --out t")
    assert "trained for another language model" in error and "--state DIR" in error


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_memory_that_runs_out_is_one_line(monkeypatch, capsys, error):
    def fail(args):
        raise error

    monkeypatch.setattr(commands, "list_experiments", fail)
    said = fails(capsys, "list")
    assert "the memory does not suffice" in said and "--batch-size" in said and said.count("\n") == 1


def test_commands_of_a_package_that_is_damaged_are_left_out(monkeypatch, capsys):
    def damaged(self):
        raise ImportError("no such module")

    monkeypatch.setattr("importlib.metadata.EntryPoint.load", damaged)
    assert call("--help") == 0
    said = capsys.readouterr()
    assert "train" in said.out and "note: the commands 'replication' cannot be loaded: no such module" in said.err


@pytest.mark.parametrize("line", ["train --help", "evaluate --model m --facts Ω.jsonl"])
def test_output_works_in_an_old_encoding(line, tmp_path):
    code = "import sys; from malmen_repro.cli import main; sys.exit(main())"
    run = {"capture_output": True, "cwd": tmp_path}
    run["env"] = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", code, *line.split()], **run)
    said = (ran.stdout + ran.stderr).decode("cp1252")
    assert "Traceback" not in said and "?.jsonl" in said if ran.returncode else "usage" in said
    assert ran.returncode == (0 if "--help" in line else 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
def test_output_that_nobody_can_take_is_one_line(tmp_path):
    code = "import sys; from malmen_repro.cli import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        run = {"stdout": full, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        run["env"] = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
        ran = subprocess.run([sys.executable, "-c", code, "list"], **run)
    assert ran.returncode == 2 and ran.stderr == "malmen-repro: error: [Errno 28] No space left on device\n"


# --- stopped


def test_being_terminated_is_taken_as_an_interruption(monkeypatch, capsys):
    seen = []

    def terminated(args):
        try:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(5)
        finally:
            seen.append("cleaned up")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(commands, "list_experiments", terminated)
    assert "stopped; the same command again begins anew" in fails(capsys, "list", 143)
    assert seen == ["cleaned up"] and signal.getsignal(signal.SIGTERM) == before


def test_the_last_line_says_truly_whether_the_same_command_goes_on(here, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    train = f"train --model model --facts train.jsonl --last 2 {TRAIN}"
    with monkeypatch.context() as patch:
        patch.setattr(Editor, "train", stopped)
        patch.setattr(Editor, "edit", stopped)
        patch.setattr("malmen_repro.evaluation.evaluate", stopped)
        patch.setattr("malmen_repro.replication.plans.cells_of", stopped)
        assert "there is no checkpoint yet" in fails(capsys, f"{train} --out e", 130)
        shutil.copytree(Path("editor").resolve(), "mine")
        assert "goes on from the checkpoint in mine" in fails(capsys, f"{train} --out mine", 130)
        edit = f"{SAFE} --editor editor --out s"
        assert "the same command again begins anew" in fails(capsys, edit, 130)
        error = fails(capsys, f"{edit} --state run", 130)
        assert "this batch is not in run: the same command edits it, and never twice" in error
        assert "begins anew" in fails(capsys, "evaluate --model model --facts new.jsonl", 130)
        assert "the same command goes on after them" in fails(capsys, "reproduce scaling_decoder", 130)
        assert "command, without --fresh, goes on" in fails(capsys, "reproduce scaling_decoder --fresh", 130)
    assert not Path("run").exists()


def test_other_packages_commands_say_what_they_like_when_stopped():
    top = argparse.ArgumentParser().add_subparsers()
    assert cli.command(top, "one", print, "do it", "").parse_args([]).stopped(None) == cli.ANEW
    assert cli.command(top, "two", print, "do it", "", lambda _: "gone").parse_args([]).stopped(None) == "gone"
