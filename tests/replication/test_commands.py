"""The replication's commands, from the outside: reproduce, list and tune."""

import json
import warnings
from functools import partial
from pathlib import Path

import pytest

from malmen_repro import cli
from malmen_repro.editors import EditorConfig
from malmen_repro.methods.fine_tuning import FineTuningConfig
from malmen_repro.replication import commands, plans, records, runner, stand_ins
from malmen_repro.replication.plans import EXPERIMENTS, EvaluationConfig
from malmen_repro.replication.records import read_record
from malmen_repro.replication.stand_ins import Bench
from malmen_repro.replication.tier_settings import READY
from malmen_repro.training import TrainingConfig
from malmen_repro.weight_shifts import NonFiniteShiftError
from tests.replication.test_plans import READY_TOYS
from tests.test_cli import call, fails
from tests.toy import toy_corpus, toy_facts, toy_model

# --- reproduce and list


@pytest.fixture
def toy_tier(monkeypatch, tmp_path):
    """The tiny tier with a toy for a model and no time to lose."""
    seeds = []

    def tiny_bench(seed, cache_dir, progress, architecture):
        seeds.append(seed)
        world = toy_facts(12, seed=1, start=20)
        sets = {"world": world, "claims": world}
        return Bench(toy_model(seed=seed), toy_facts(12), sets, {"made": "here"}, corpus=toy_corpus())

    def settings(tier, method, num_facts):
        if method == "FT":
            return FineTuningConfig(epochs=1), None
        if method in READY:
            return READY_TOYS[method], None
        training = TrainingConfig(num_facts=num_facts, steps=0 if "untrained" in method else 2)
        return EditorConfig(rank=4, blocks=1, learning_rate=0.01), training

    monkeypatch.setattr(stand_ins, "tiny_bench", tiny_bench)
    score(monkeypatch, 4, settings)
    monkeypatch.chdir(tmp_path)
    return seeds


RUN_CELLS = runner.run_cells


def score(monkeypatch, scored_facts, settings):
    """From now on `reproduce` has toy settings and scores so many facts."""
    toy = partial(RUN_CELLS, settings=settings, evaluation=EvaluationConfig(scored_facts=scored_facts))
    toy.settings = settings
    monkeypatch.setattr(runner, "run_cells", toy)


def test_reproduce_runs_prints_and_draws(toy_tier, capsys):
    line = "reproduce scaling_decoder --seeds 2 --ms 2 4 --out there --quiet"
    assert call(line) == 0
    text = capsys.readouterr().out
    assert "20 cells" in text and "| world | 2 | MALMEN " in text and "committed" in text
    assert len(list(Path("there/tiny/scaling_decoder").glob("*.json"))) == 20
    drawn = {path.name: path.read_bytes() for path in Path("there/figures").iterdir()}
    assert set(drawn) == {"tiny-scaling_decoder.png", "tiny-scaling_decoder.svg"}
    assert toy_tier == [0, 1]
    assert call(line) == 0 and toy_tier == [0, 1]  # nothing left to do
    assert capsys.readouterr().out == text
    assert {path.name: path.read_bytes() for path in Path("there/figures").iterdir()} == drawn


def test_reproduce_all_by_default_and_in_the_default_folder(toy_tier, capsys, monkeypatch):
    monkeypatch.setattr(plans, "EXPERIMENTS", dict(list(EXPERIMENTS.items())[:2]))
    monkeypatch.setattr(commands, "OTHERS", {"procedures": commands.OTHERS["procedures"]})
    assert call("reproduce --seeds 1 --ms 2 --quiet") == 0
    timed = json.loads(Path("runs/tiny/reproduce.json").read_text())
    cells = len(list(Path("runs/tiny").glob("*/*.json")))
    assert timed["cells"] == cells and timed["seconds"] > 0 and timed["tier"] == "tiny" and timed["num_facts"] == [2]
    text = capsys.readouterr().out
    assert "everything at the tiny tier" in text and "Verdicts of these records" in text and "| Fig. 4" in text
    for name, experiment in plans.EXPERIMENTS.items():
        assert ("tiny" not in experiment.plans) or list(Path("runs/tiny", name).glob("*.json"))
    assert len(list(Path("runs/figures").glob("procedures-fig[123].svg"))) == 3
    # What goes on from records says nothing of the whole, and neither does a single experiment.
    Path("runs/tiny/reproduce.json").unlink()
    assert call("reproduce --seeds 1 --ms 2 --quiet") == 0
    assert call(f"reproduce {next(iter(plans.EXPERIMENTS))} --seeds 1 --ms 2 --quiet --out other") == 0
    assert not list(Path().glob("*/tiny/reproduce.json"))


def test_reproduce_some_methods(toy_tier, capsys, monkeypatch):
    line = "reproduce scaling_decoder memory --seeds 1 --ms 2 --quiet"
    monkeypatch.setitem(commands.OTHERS, "memory", ("Fig. 9", ("tiny",), lambda args: pytest.fail("it has no methods")))
    assert cli.main([*line.split(), "--methods", "MEND", "MALMEN untrained"]) == 0
    made = {path.name for path in Path("runs/tiny").glob("*/*.json")}
    assert made == {"world-mend-m2-s0.json", "world-malmen_untrained-m2-s0.json"}
    assert "there are no cells of a method 'MENT' here; did you mean MEND" in fails(capsys, f"{line} --methods MENT")
    monkeypatch.setattr(plans, "EXPERIMENTS", dict(list(EXPERIMENTS.items())[:2]))
    assert cli.main(["reproduce", "--seeds", "1", "--ms", "2", "--quiet", "--out", "all", "--methods", "MEND"]) == 0
    assert not Path("all/tiny/reproduce.json").exists()  # it is no run of everything


def test_reproduce_shows_progress(toy_tier, capsys):
    assert call("reproduce scaling_decoder --seeds 1 --ms 2") == 0
    assert "cells:" in capsys.readouterr().err


def test_reproduce_beside_committed_records(toy_tier, capsys, monkeypatch):
    assert call("reproduce scaling_decoder --seeds 1 --ms 2 --out a --quiet") == 0
    monkeypatch.setattr(records, "committed_records", lambda: Path("a"))
    capsys.readouterr()
    assert call("reproduce scaling_decoder --seeds 1 --ms 2 --out b --quiet") == 0
    assert "5 of 5 cells have a committed record with the same settings" in capsys.readouterr().out


def test_reproduce_without_a_source_tree(toy_tier, capsys, monkeypatch):
    monkeypatch.setattr(records, "committed_records", lambda: None)
    assert call("reproduce scaling_decoder --seeds 1 --ms 2 --quiet") == 0
    assert "source tree, which is not here" in capsys.readouterr().out
    assert call("list") == 0 and "–" in capsys.readouterr().out


def test_reproduce_refuses_a_record_of_other_settings_and_fresh_overwrites_it(toy_tier, capsys, monkeypatch):
    line = "reproduce scaling_decoder --seeds 1 --ms 2 --quiet"
    assert call(line) == 0
    score(monkeypatch, 2, runner.run_cells.settings)
    assert "was made with other settings" in fails(capsys, line)
    assert call(f"{line} --fresh") == 0
    assert read_record("runs/tiny/scaling_decoder/world-mend-m2-s0.json")["blocks"] == [2]


def test_reproduce_tells_of_a_damaged_record(toy_tier, capsys):
    line = "reproduce scaling_decoder --seeds 1 --ms 2 --quiet"
    assert call(line) == 0
    path = Path("runs/tiny/scaling_decoder/world-mend-m2-s0.json")
    path.write_text("{")
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as for a user, not as in these tests
        assert call(line) == 0
    error = capsys.readouterr().err
    assert error.startswith("malmen-repro: note: the record") and "set aside as world-mend-m2-s0.json.damaged" in error
    assert read_record(path) and path.with_name(path.name + ".damaged").read_text() == "{"


def test_reproduce_shows_what_is_done_when_a_cell_breaks_down(toy_tier, capsys, monkeypatch):
    real = runner.run_cell

    def breaking(cell, *args):
        if cell.method == "MEND":
            raise NonFiniteShiftError("the shift of layer h is not finite")
        return real(cell, *args)

    monkeypatch.setattr(runner, "run_cell", breaking)
    assert call("reproduce scaling_decoder --seeds 1 --ms 2 --quiet") == 2
    both = capsys.readouterr()
    assert "1 of 5 cells broke down" in both.err and "| world | 2 | MALMEN " in both.out
    assert Path("runs/figures/tiny-scaling_decoder.png").exists()


def test_the_time_comparison_runs_what_it_needs(toy_tier, capsys):
    assert call("reproduce time --seeds 1 --ms 2 --quiet") == 0
    text = capsys.readouterr().out
    assert "time: seconds of the GPT-J stand-in" in text and "| world | 2 | MEMIT" in text
    assert "m = 2: MALMEN" in text and "scaled down" in text  # the verdict, of these records
    assert len(list(Path("runs/tiny/scaling_gptj").glob("*.json"))) == 5


def test_hyper_parameters_are_an_item(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("reproduce hyper-parameters --tier paper --quiet") == 0
    assert "| `rank`                   | 1,920 | 1,920" in capsys.readouterr().out


def test_list_counts_records(toy_tier, capsys):
    assert call("list") == 0
    text = capsys.readouterr().out
    for name, experiment in EXPERIMENTS.items():
        assert name in text and experiment.figure in text and all(tier in text for tier in experiment.plans)
    assert call("reproduce scaling_decoder --seeds 1 --ms 2 --quiet") == 0
    capsys.readouterr()
    assert call("list --out runs") == 0
    text = capsys.readouterr().out
    rows = text[text.index("scaling_decoder (") :].splitlines()
    row = next(row for row in rows if row.startswith("| tiny"))
    assert row.rstrip(" |").endswith("5")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("fig5", ["scaling_decoder"]),
        ("Fig. 9", ["memory"]),
        ("figure 2", ["procedures"]),
        ("table4", ["failures"]),
        ("table1", ["ablations_classifier", "ablations_decoder", "ablations_encoder_decoder"]),
        ("table2", ["ablations_gptj"]),
        ("fig7", ["scaling_gptj"]),
        ("MEMIT Table 1", ["editors_zsre"]),
        ("memit-fig5", ["counterfact"]),
        ("coachhook-table2", ["hundred_batches"]),
        ("memory", ["memory"]),
        ("cancellation", ["cancellation"]),
        ("scaling-decoder", ["scaling_decoder"]),
        ("time", ["scaling_gptj", "time"]),
        ("hyper-parameters", ["hyper_parameters"]),
    ],
)
def test_items_are_called_by_figure_or_table_too(asked, expected):
    assert commands.experiments_called(asked) == expected


def test_random_weights_are_a_tier_of_their_own(toy_tier, capsys, monkeypatch):
    monkeypatch.setattr(commands, "show", lambda *args: None)
    asked = []
    monkeypatch.setattr(runner, "run_cells", lambda cells, *args, **options: asked.extend(cells))
    assert call("reproduce fig5 --tier paper --random-weights --quiet") == 0
    assert {cell.tier for cell in asked} == {"shapes"}
    assert {cell.method for cell in asked} == {"MALMEN", "MEND", "FT", "MEMIT"}


def test_tuning_needs_data(capsys, monkeypatch):
    monkeypatch.delenv("MALMEN_DATA", raising=False)
    assert "--data" in fails(capsys, "tune")
