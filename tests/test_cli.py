"""The command line, from the outside."""

import inspect
import json
import lzma
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tests.holds_stub  # noqa: F401
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
from malmen_repro.weight_shifts import WeightShift
from tests.toy import toy_corpus, toy_facts, toy_model

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


def test_train_defaults_are_the_papers():
    args = cli.parser().parse_args("train --model m --facts f --out o".split())
    editor, training = EditorConfig(), TrainingConfig()
    assert (args.rank, args.blocks, args.learning_rate) == (editor.rank, editor.blocks, editor.learning_rate)
    assert (args.meta_learning_rate, args.locality) == (training.meta_learning_rate, training.locality_coefficient)


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
        ("--method MEMIT --corpus none.txt --blocks 0", "No such file or directory: 'none.txt'"),
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
        ("--method MEMIT --corpus new.jsonl --blocks 7", "no linear layer matches"),
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
    assert "corpus.txt: cannot be read ('utf-8' codec" in fails(capsys, f"{edit_line('MEMIT')} --out s --quiet")


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
    assert "edits another language model: the weights of" in fails(capsys, line)
    Path("LoRA-run/state.safetensors").write_bytes(b"damaged")
    assert "holds no readable consecutive run" in fails(capsys, f"{batches('LoRA', 2)} --state LoRA-run --out 2")
    before.pop(Path("LoRA-run/state.safetensors"))
    assert all(path.read_bytes() == there for path, there in before.items()) and not Path("2").exists()


def test_a_run_can_be_merged_and_still_goes_on(batches):
    for number in (1, 2):
        assert call(f"{batches('MALMEN', number)} --state run --out {number} --merge-into edited") == 0
    lm, facts = toy_model(), toy_facts(4, seed=1, start=30)
    merged = evaluate(LanguageModel.from_pretrained("edited", last=2, device="cpu"), facts, None)
    assert evaluate(lm, facts, WeightShift.load("2")).values["ES"].tolist() == merged.values["ES"].tolist()


def test_training_goes_on_where_it_stopped(here, capsys):
    steps = TRAIN.replace("--steps 2", "--steps {}")
    for count in (1, 3):
        assert call(f"train --model model --facts train.jsonl --last 2 {steps.format(count)} --out mine") == 0
    assert "3 steps" in capsys.readouterr().out
    assert call(f"train --model model --facts train.jsonl --last 2 {steps.format(3)} --out straight") == 0
    mine, straight = (json.loads(Path(name, "history.json").read_text()) for name in ("mine", "straight"))
    assert [step["generalization"] for step in mine] == [step["generalization"] for step in straight]


def test_other_facts_do_not_go_on_from_that_checkpoint(here):
    assert call(f"train --model model --facts train.jsonl --last 2 {TRAIN} --out mine") == 0
    assert call(f"train --model model --facts new.jsonl --last 2 {TRAIN} --out mine") == 0
    assert len(list(Path("mine").glob("checkpoint-*.pt"))) == 2


def test_other_settings_in_the_same_folder_are_refused(here, capsys):
    assert call(f"train --model model --facts train.jsonl --last 2 {TRAIN} --out mine") == 0
    error = fails(capsys, f"train --model model --facts train.jsonl --last 2 {TRAIN} --rank 5 --out mine")
    assert "belongs to another run: rank differ" in error


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
    assert "has the answer 'w2'" in fails(capsys, f"{on} --facts two.jsonl")
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
        ("evaluate --model model --facts new.jsonl --shift nothing.st", "there is no shift file nothing.st"),
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


def test_a_bug_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr(commands, "list_experiments", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["list"])


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "list_experiments", stopped)
    assert "same command again" in fails(capsys, "list", 130)
