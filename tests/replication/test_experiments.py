"""Experiments as data, methods, what is edited, the runner, and what a record holds beyond scores."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from malmen_repro.editors import EditorConfig
from malmen_repro.evaluation import MEASURES, Scores, evaluate, plain
from malmen_repro.facts import Fact, sha256
from malmen_repro.methods.coachhook import CoachHooKConfig
from malmen_repro.methods.fine_tuning import FineTuningConfig, fine_tuned
from malmen_repro.methods.key_statistics import EmptyCorpusError
from malmen_repro.methods.memit import MEMITConfig
from malmen_repro.methods.target_vectors import TargetConfig
from malmen_repro.normal_equation import SingularGramError
from malmen_repro.replication import benches, experiments
from malmen_repro.replication.benches import TIERS
from malmen_repro.replication.experiments import (
    ALL_METHODS,
    BENCH_SETTINGS,
    CONSECUTIVE_METHODS,
    EXPERIMENTS,
    EXTRAS,
    MAIN_METHODS,
    METHODS,
    NOT_TINY,
    Bench,
    Cell,
    CellError,
    EvaluationConfig,
    Experiment,
    ExperimentError,
    Plan,
    UnknownExperimentError,
    altered,
    beside,
    cells_of,
    condensed,
    configuration,
    edited_in_batches,
    edited_model,
    editor_of,
    evaluation_blocks,
    find_experiment,
    pooled,
    run_cells,
    slug,
    trained_for,
    training_settings,
)
from malmen_repro.replication.figures import (
    draw_scaling,
    failure_table,
    residual_points,
    scaling_table,
    sequence_points,
)
from malmen_repro.replication.records import (
    RecordConflictError,
    RecordError,
    RecordWarning,
    fingerprints,
    read_record,
    read_records,
    write_record,
)
from malmen_repro.replication.released_code import VARIANTS
from malmen_repro.replication.tier_settings import CRITICAL, PAPERS, READY, TINY, fitted, ready_editor, ready_settings
from malmen_repro.training import TrainingConfig
from malmen_repro.weight_shifts import NonFiniteShiftError, WeightShift
from tests.toy import knowing_bench, toy_classifier, toy_corpus, toy_encoder_decoder, toy_facts, toy_model

TOY_METHODS = ("MALMEN", "MEND", "MALMEN untrained")
EVALUATION = EvaluationConfig(scored_facts=6, batch_size=4)


def toy_bench(tier="tiny", family="decoder", seed=0):
    toys = toy_facts(10, seed=1, start=20)
    return Bench(toy_model(seed=seed), toy_facts(12), {"toys": toys}, {"made": "here"}, corpus=toy_corpus())


def toy_settings(tier, method, num_facts):
    training = TrainingConfig(num_facts=num_facts, steps=0 if "untrained" in method else 3, meta_learning_rate=1e-3)
    return EditorConfig(rank=4, blocks=1, learning_rate=0.01), training


def cell(method="MALMEN", num_facts=3, seed=0, **changes):
    given = {"train_num_facts": num_facts, "data_set": "toys", **changes}
    return Cell("toy", "decoder", method, num_facts, seed, "tiny", **given)


def run(cells, out, bench_for=toy_bench, settings=toy_settings, **options):
    options = {"evaluation": EVALUATION, "progress": False, **options}
    return run_cells(cells, out, bench_for, settings=settings, **options)


def no_bench(tier, family, seed):
    raise AssertionError("no bench was needed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the records of two seeds, two m and all methods, and the records; not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    cells = [cell(method, m, seed) for seed in (0, 1) for m in (2, 4) for method in TOY_METHODS]
    return out, cells, run(cells, out)


# --- the table


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_well_formed(name):
    experiment = EXPERIMENTS[name]
    assert experiment.title and experiment.figure and experiment.description and set(experiment.plans) <= set(TIERS)
    for tier in experiment.plans:
        cells = cells_of(name, tier)
        assert cells and len({one.path for one in cells}) == len(cells)
        for one in cells:
            editor, training = training_settings(tier, one.method, one.train_num_facts)
            assert json.dumps(configuration(one))
            assert fitted(editor, 0, tier, one.family) != fitted(editor, 5, tier, one.family)  # the cell sets the seed
            if training is not None:
                assert training.num_facts == one.train_num_facts and training.seed == 0
                assert (training.steps > 0) == METHODS[one.method].trained
            assert (training is None) == bool(METHODS[one.method].ready)


def test_tiny_plan_has_a_quick_and_a_full_size():
    quick, full = (cells_of("scaling_decoder", "tiny", full=full) for full in (False, True))
    assert {one.num_facts for one in quick} == {16, 64} and {one.seed for one in quick} == {0}
    assert {one.num_facts for one in full} == {16, 64, 256, 1024} and {one.seed for one in full} == {0, 1, 2}
    assert {one.method for one in full} == {*MAIN_METHODS, "MEMIT"} and set(quick) <= set(full)
    assert len(cells_of("scaling_decoder", "tiny", seeds=2, num_facts=[16, 256])) == 2 * 2 * 5
    quick, full = ({one.method for one in cells_of("released_code", "tiny", full=full)} for full in (False, True))
    assert quick < full == {"MALMEN", *VARIANTS}


def test_every_figure_and_table_of_the_paper_has_its_experiment_for_each_family():
    figures = {experiment.figure for experiment in EXPERIMENTS.values()}
    curves = {f"Fig. {number}" for number in range(4, 9)}
    assert curves | {"Table 1", "Table 2", "Table 3", "Tables 4 and 5"} <= figures
    for prefix in ("scaling", "ablations"):
        families = {one.family for name, one in EXPERIMENTS.items() if name.startswith(prefix)}
        assert families - {"base"} == set(benches.FAMILIES) - {"subjects", "questions", "base"}


def test_what_is_run_by_default_is_part_of_the_full_plan():
    for name, experiment in EXPERIMENTS.items():
        for tier in experiment.plans:
            quick, full = (cells_of(name, tier, full=full) for full in (False, True))
            sizes = [{one.num_facts for one in cells} for cells in (quick, full)]
            methods = [{one.method for one in cells} for cells in (quick, full)]
            assert methods[0] <= methods[1]
            assert sizes[0] <= sizes[1] or name.startswith(("ablations", "failures")) and max(sizes[0]) < min(sizes[1])


def test_small_plan_edits_all_zsre_rows_and_up_to_4096():
    cells = cells_of("scaling_decoder", "small")
    assert max(one.num_facts for one in cells if one.data_set == "zsre") == 1037
    assert {16, 4096} <= {one.num_facts for one in cells if one.data_set == "entity_questions"}


def test_paper_settings_are_the_papers():
    editor, training = training_settings("paper", "MALMEN", 512)
    assert (editor.rank, editor.blocks, editor.learning_rate) == (1920, 2, 1e-6)
    assert (training.meta_learning_rate, training.locality_coefficient, training.max_meta_gradient_norm) == (1e-5, 1, 1)
    assert training.steps == math.ceil(244_173 / 512)


def test_settings_of_a_method_go_over_those_of_the_tier(monkeypatch):
    monkeypatch.setitem(experiments.SETTINGS, "tiny", ({"rank": 5}, {"steps": {1: 10, 100: 20}}))
    assert training_settings("tiny", "MALMEN", 99)[0].rank == 5
    editor, training = training_settings("tiny", "MEND, locality 10", 100)
    assert (editor.rank, training.steps, training.locality_coefficient) == (5, 20, 10.0)
    assert training_settings("tiny", "MALMEN", 99)[1].steps == 10
    assert training_settings("tiny", "MALMEN, no regularisation", 99)[0].regularization == 0
    assert training_settings("tiny", "MALMEN, all tokens", 99)[0].tokens == "all"


def test_untrained_settings_do_not_hang_on_the_trained_ones(monkeypatch):
    before = training_settings("tiny", "MALMEN untrained", 16)
    monkeypatch.setitem(experiments.SETTINGS, "tiny", ({"rank": 5}, {"steps": {1: 10}}))
    assert training_settings("tiny", "MALMEN untrained", 16) == before


@pytest.mark.parametrize(
    ("trained_at", "m", "expected"), [((), 7, 7), ((512,), 16, 512), ((64, 512), 256, 64), ((64, 512), 1037, 512)]
)
def test_trained_for(trained_at, m, expected):
    assert trained_for(Plan({"x": (m,)}, 1, trained_at=trained_at), m) == expected


def test_unknown_names():
    with pytest.raises(UnknownExperimentError, match="did you mean scaling_decoder"):
        find_experiment("scaling_dekoder")
    with pytest.raises(UnknownExperimentError, match="there are: scaling_classifier"):
        find_experiment("zzz")
    with pytest.raises(UnknownExperimentError, match="no cells at the tier 'huge'"):
        cells_of("scaling_decoder", "huge")


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"num_facts": [16, 0]}])
def test_nothing_to_run(wrong):
    with pytest.raises(ExperimentError, match="at least 1"):
        cells_of("scaling_decoder", "tiny", **wrong)


def test_duplicate_numbers_of_facts_count_once():
    assert len(cells_of("scaling_decoder", "tiny", 1, [16, 16])) == 5


def test_cell_path():
    assert cell("MALMEN untrained", 16, 3).path == Path("tiny/toy/toys-malmen_untrained-m16-s3.json")
    assert slug("A b/c") == "a_b_c"


# --- configuration


def test_configuration_hash_sees_everything():
    base = configuration(cell(), toy_settings, EVALUATION)
    hashes = {sha256(base)}
    changes = {"num_facts": 4, "seed": 1, "method": "MEND", "data_set": "x", "train_num_facts": 9, "family": "f"}
    for name, value in changes.items():
        hashes.add(sha256(configuration(replace(cell(), **{name: value}), toy_settings, EVALUATION)))
    hashes.add(sha256(configuration(cell(), toy_settings, replace(EVALUATION, scored_facts=7))))
    for one in fields(TrainingConfig):
        if one.name not in ("seed", "num_facts"):
            value = {bool: True, int: 77}.get(type(one.default), 77 if one.name == "ramp_facts" else 0.77)

            def settings(*args, name=one.name, value=value):
                editor, training = toy_settings(*args)
                return editor, replace(training, **{name: value})

            hashes.add(sha256(configuration(cell(), settings, EVALUATION)))
    assert len(hashes) == 1 + 6 + 1 + len(fields(TrainingConfig)) - 2


def test_configuration_takes_both_seeds_from_the_cell():
    found = configuration(cell(seed=5), toy_settings)
    assert found["editor"]["seed"] == found["training"]["seed"] == 5


# --- a record of a run


def test_record_holds_what_a_reader_asks_for(finished):
    out, cells, records = finished
    for one, record in zip(cells, records, strict=True):
        assert record == read_record(out / one.path)
        assert record["configuration"] == configuration(one, toy_settings, EVALUATION)
        assert record["hash"] == sha256(record["configuration"])
        assert set(record["scores"]) == set(record["per_fact"]) == set(MEASURES)
        assert sum(record["blocks"]) == len(record["per_fact"]["ES"]) >= EVALUATION.scored_facts
        for name, part in record["scores"].items():
            assert part["interval"][0] <= part["mean"] <= part["interval"][1] and part["facts"] == sum(record["blocks"])
            assert part["mean"] == pytest.approx(np.mean(record["per_fact"][name]), abs=1e-4)
        assert {"python", "torch", "transformers", "malmen-repro"} <= record["versions"].keys()
        assert record["hardware"]["device"] == "cpu" and record["hardware"]["cpu"] and record["hardware"]["threads"]
        assert set(record["seconds"]) == {"training", "editing", "evaluation"} and record["seconds"]["editing"] > 0
        assert record["memory_bytes"]["editing"]["process"] > 1e7
        assert record["bench"] == {"made": "here"} and record["model"]["parameters"] > 1000 and record["extra"] == {}
        assert record["fingerprints"] == fingerprints(toy_bench(seed=one.seed))
        for learned in record["learned"].values():
            assert learned["learning_rate"] > 0 and learned["regularization"] > 0
        assert len(record["learned"]) == len(record["model"]["edited_layers"]) == 2


def test_history_is_there_for_the_trained_only(finished):
    for one, record in zip(*finished[1:], strict=True):
        assert bool(record["history"]) != one.method.endswith("untrained")


def test_condensed():
    history = [{"step": i, "loss": float(i), "seconds": 1.0} for i in range(25)]
    found = condensed(history)
    assert found == [
        {"step": 0, "loss": 4.5, "seconds": 1.0},
        {"step": 10, "loss": 14.5, "seconds": 1.0},
        {"step": 20, "loss": 22.0, "seconds": 1.0},
    ]
    assert condensed([]) == []
    assert condensed([{"step": 0, "loss": math.nan}]) == [{"step": 0, "loss": None}]


# --- what is edited


@pytest.mark.parametrize(
    ("size", "m", "scored", "expected"),
    [
        (1037, 16, 256, [16] * 16),
        (1037, 64, 256, [64] * 4),
        (1037, 100, 256, [100] * 3),
        (1037, 256, 256, [256]),
        (1037, 1037, 256, [1037]),
        (1037, 4096, 256, [1037]),
        (40, 16, 256, [16] * 2),
        (5, 1, 256, [1] * 5),
        (1, 1, 1, [1]),
    ],
)
def test_evaluation_blocks(size, m, scored, expected):
    facts = [Fact(f"p{i}", "a") for i in range(size)]
    blocks = evaluation_blocks(facts, m, 0, scored)
    assert [len(block) for block in blocks] == expected
    prompts = [fact.prompt for block in blocks for fact in block]
    assert len(set(prompts)) == len(prompts)
    assert blocks == evaluation_blocks(facts, m, 0, scored)


def test_other_seeds_edit_other_facts_and_larger_m_contains_smaller():
    facts = [Fact(f"p{i}", "a") for i in range(100)]
    assert evaluation_blocks(facts, 10, 0)[0] != evaluation_blocks(facts, 10, 1)[0]
    assert evaluation_blocks(facts, 50, 0)[0][:10] == evaluation_blocks(facts, 10, 0)[0]


def test_pooled():
    parts = [Scores({"ES": np.array([0.0, 1.0])}, [[0.5], []]), Scores({"ES": np.array([0.25])}, [[1.0, 0.0]])]
    both = pooled(parts)
    assert both.values["ES"].tolist() == [0, 1, 0.25] and both.phrasings == [[0.5], [], [1.0, 0.0]]


def test_a_record_is_what_editing_and_evaluating_by_hand_gives(tmp_path):
    one = cell("MEND", 3)
    (record,) = run([one], tmp_path)
    bench, (editor_config, training) = toy_bench(), toy_settings("tiny", "MEND", 3)
    editor = METHODS["MEND"].editor(bench.lm, editor_config)
    editor.train(bench.train_facts, config=training, progress=False)
    blocks = evaluation_blocks(bench.eval_facts["toys"], 3, 0, 6)
    assert record["blocks"] == [3, 3]
    expected = [evaluate(bench.lm, block, editor.edit(block)) for block in blocks]
    assert record["per_fact"]["ES"] == plain(np.concatenate([part.values["ES"] for part in expected]).tolist())
    assert record["per_fact"]["LS"] == plain(np.concatenate([part.values["LS"] for part in expected]).tolist())


def test_facts_without_unrelated_tuples_are_null_not_zero(tmp_path):
    bare = [replace(fact, unrelated_prompt=None, unrelated_answer=None) for fact in toy_facts(8, start=20)]
    bench = Bench(toy_model(), toy_facts(6), {"toys": bare}, {})
    (record,) = run([cell()], tmp_path, lambda tier, family, seed: bench)
    assert record["scores"]["LS"] == {"mean": None, "interval": [None, None], "facts": 0}
    assert set(record["per_fact"]["LS"]) == {None}
    assert "–" in scaling_table([record])
    assert draw_scaling([record])


# --- going on


def test_finished_cells_are_not_run_again(finished):
    out, cells, records = finished
    assert run(cells, out, no_bench) == records


def test_only_missing_cells_run_and_come_out_the_same(tmp_path):
    cells = [cell("MALMEN", m) for m in (2, 3)]
    first = run(cells, tmp_path)
    (tmp_path / cells[0].path).unlink()
    kept = (tmp_path / cells[1].path).stat().st_mtime_ns
    second = run(cells, tmp_path)
    assert (tmp_path / cells[1].path).stat().st_mtime_ns == kept
    assert [record["per_fact"] for record in second] == [record["per_fact"] for record in first]


def test_one_bench_serves_all_cells_of_a_seed(tmp_path):
    built = []

    def bench_for(tier, family, seed):
        built.append(seed)
        return toy_bench(tier, family, seed)

    run([cell("MALMEN untrained", m, seed) for m in (2, 3) for seed in (1, 0)], tmp_path, bench_for)
    assert built == [0, 1]


def test_records_come_in_the_order_of_the_cells(tmp_path):
    cells = [cell("MALMEN untrained", m, seed) for m in (3, 2) for seed in (1, 0)]
    found = [Cell(**record["configuration"]["cell"]) for record in run(cells, tmp_path)]
    assert found == cells


def test_a_record_of_other_settings_is_refused_before_any_work(finished, tmp_path):
    out, cells, records = finished
    write_record(records[0], tmp_path / cells[0].path)

    def others(*args):
        editor, training = toy_settings(*args)
        return editor, replace(training, steps=4)

    with pytest.raises(RecordConflictError, match="training.steps differ") as caught:
        run([cell("MEND"), cells[0]], tmp_path, no_bench, settings=others)
    wanted = sha256(configuration(cells[0], others, EVALUATION))
    assert records[0]["hash"][:16] in str(caught.value) and wanted[:16] in str(caught.value)
    assert cells[0].path.name in str(caught.value)
    assert read_record(tmp_path / cells[0].path) == records[0]


@pytest.mark.parametrize("change", ["language_model", "train_facts", "eval_facts"])
def test_records_of_another_bench_are_refused(finished, tmp_path, change):
    out, cells, records = finished
    write_record(records[0], tmp_path / cells[0].path)
    bench = toy_bench()
    other = {
        "language_model": replace(bench, lm=toy_model(seed=7)),
        "train_facts": replace(bench, train_facts=toy_facts(11)),
        "eval_facts": replace(bench, eval_facts={"toys": toy_facts(10, seed=2, start=20)}),
    }[change]
    for asked in (cells[:2], cells[1:2]):  # whether or not the run asks for the record that is there
        with pytest.raises(RecordConflictError, match=change):
            run(asked, tmp_path, lambda tier, family, seed: other)
        assert not (tmp_path / cells[1].path).exists()
    for text in ("{", json.dumps(records[0] | {"configuration": {}, "hash": sha256({})})):  # neither says a bench
        (tmp_path / cells[0].path).write_text(text)
        assert beside(cells[1:2], tmp_path) == []


def test_a_damaged_record_is_set_aside_and_runs_again(tmp_path):
    one = cell("MALMEN untrained")
    (first,) = run([one], tmp_path)
    path = tmp_path / one.path
    text = path.read_text()
    path.write_text(text[:100])
    with pytest.warns(RecordWarning, match=path.name):
        (second,) = run([one], tmp_path)
    assert second["per_fact"] == first["per_fact"]
    assert path.with_name(path.name + ".damaged").read_text() == text[:100]
    assert read_records(tmp_path, "toy", "tiny") == [second]


def test_fresh_runs_everything_anew(tmp_path):
    one = cell("MALMEN untrained")
    (first,) = run([one], tmp_path)
    (editor,) = (tmp_path / "editors").iterdir()
    made = (editor / "training.json").stat().st_mtime_ns
    (second,) = run([one], tmp_path, fresh=True)
    assert (editor / "training.json").stat().st_mtime_ns > made
    assert second["per_fact"] == first["per_fact"]


def test_fresh_is_the_way_round_a_conflict(tmp_path):
    one = cell("MALMEN untrained")
    run([one], tmp_path)
    (record,) = run([one], tmp_path, fresh=True, evaluation=replace(EVALUATION, scored_facts=3))
    assert record["blocks"] == [3] and read_record(tmp_path / one.path) == record


def test_a_stop_within_a_cell_goes_on_from_the_checkpoint(tmp_path, monkeypatch):
    from malmen_repro import training

    one, real, steps = cell("MALMEN"), training.adam_step, []

    def settings(*args):
        editor, config = toy_settings(*args)
        return editor, replace(config, steps=60)

    def stopping(*args):
        steps.append(1)
        if len(steps) == 55:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "adam_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run([one], tmp_path, settings=settings)
    assert not (tmp_path / one.path).exists() and list((tmp_path / "checkpoints").iterdir())
    (record,) = run([one], tmp_path, settings=settings)
    assert len(steps) == 55 + 10  # the checkpoint was written at step 50
    monkeypatch.undo()
    (straight,) = run([one], tmp_path / "other", settings=settings)
    assert record["per_fact"] == straight["per_fact"] and record["learned"] == straight["learned"]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_one_editor_serves_several_sets_and_m(tmp_path, monkeypatch):
    bench = toy_bench()
    bench.eval_facts["more"] = toy_facts(9, seed=3, start=40)
    cells = [cell(num_facts=m, train_num_facts=4, data_set=name) for m in (2, 4) for name in ("toys", "more")]
    trained = []
    real = experiments._train
    monkeypatch.setattr(experiments, "_train", lambda *args: trained.append(1) or real(*args))
    records = run(cells, tmp_path, lambda tier, family, seed: bench)
    assert len(trained) == 1 and len({json.dumps(record["learned"]) for record in records}) == 1
    assert len({record["hash"] for record in records}) == 4
    run(cells, tmp_path, lambda tier, family, seed: bench, fresh=True)
    assert len(trained) == 2  # once more in a fresh run, not once a cell


def test_an_editor_of_another_model_is_not_reused(tmp_path):
    one = cell("MALMEN untrained")
    run([one], tmp_path)
    (tmp_path / one.path).unlink()
    run([one], tmp_path, lambda tier, family, seed: toy_bench(seed=7))
    assert len(list((tmp_path / "editors").iterdir())) == 2


def test_untrained_is_the_identity_with_a_chosen_rate(finished):
    for one, record in zip(*finished[1:], strict=True):
        rates = {layer["learning_rate"] for layer in record["learned"].values()}
        if one.method.endswith("untrained"):
            assert len(rates) == 1 and {layer["regularization"] for layer in record["learned"].values()} == {1.0}


def test_unknown_data_set(tmp_path):
    with pytest.raises(ExperimentError, match="no set of facts 'zsre'; it has: toys"):
        run([cell(data_set="zsre")], tmp_path)


def test_a_cell_that_breaks_down_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    real = experiments.run_cell

    def breaking(one, *args):
        if one.method == "MEND":
            raise NonFiniteShiftError("the shift of layer h is not finite")
        return real(one, *args)

    monkeypatch.setattr(experiments, "run_cell", breaking)
    cells = [cell("MEND"), cell("MALMEN untrained")]
    with pytest.raises(CellError, match="1 of 2 cells broke down.*toys-mend-m3-s0"):
        run(cells, tmp_path)
    assert not (tmp_path / cells[0].path).exists() and (tmp_path / cells[1].path).exists()
    monkeypatch.undo()
    run(cells, tmp_path)
    monkeypatch.setattr(experiments, "run_cell", breaking)
    with pytest.raises(CellError):
        run(cells, tmp_path, fresh=True)
    assert not (tmp_path / cells[0].path).exists()  # in a fresh run the old record does not stand for the new one


def test_a_bug_is_not_taken_for_a_breakdown(tmp_path, monkeypatch):
    def buggy(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(experiments, "run_cell", buggy)
    with pytest.raises(ZeroDivisionError):
        run([cell()], tmp_path)


def test_progress_bars_show(tmp_path, capsys):
    run([cell()], tmp_path, progress=True)
    shown_bars = capsys.readouterr().err
    assert "cells" in shown_bars and "train MALMEN" in shown_bars


def test_read_records(finished, tmp_path):
    out, cells, made = finished
    found = read_records(out, "toy", "tiny")
    assert len(found) == len(made)
    assert read_records(out, "toy", "small") == read_records(tmp_path, "toy", "tiny") == []
    cells = [record["configuration"]["cell"] for record in found]
    assert [one["num_facts"] for one in cells if one["method"] == "MEND"] == [2, 2, 4, 4]
    (tmp_path / "tiny" / "toy").mkdir(parents=True)
    (tmp_path / "tiny" / "toy" / "x.json").write_text("{")
    with pytest.raises(RecordError, match="x.json is damaged"):
        read_records(tmp_path, "toy", "tiny")


# --- methods


TARGET = TargetConfig(steps=3, learning_rate=0.1, prefix_lengths=(2,), separator=" ", essence="{} w3")
MEMIT_TOY = MEMITConfig(regularization=2.0, target=TARGET)
READY_TOYS = {
    "FT-W": replace(PAPERS["FT-W"], steps=2),
    "FT-L": replace(PAPERS["FT-L"], steps=2),
    "FT-M": replace(PAPERS["FT-M"], steps=2),
    "LoRA": replace(PAPERS["LoRA"], steps=2),
    "MEMIT": MEMIT_TOY,
    "ROME": MEMIT_TOY,
    "CoachHooK": CoachHooKConfig(memit=MEMIT_TOY),
}


def method_settings(tier, method, num_facts):
    "As `training_settings`, but small."
    about = METHODS[method]
    if method == "FT":
        return FineTuningConfig(epochs=2, learning_rate=1e-3), None
    if about.ready:
        return READY_TOYS[about.ready], None
    editor = EditorConfig(**({"rank": 4, "blocks": 1, "learning_rate": 0.01} | about.changes))
    training = about.training | {"steps": 2 if about.trained else 0}
    return editor, TrainingConfig(num_facts=num_facts, **training)


def run_method(method, out, ms=(3,), bench_for=toy_bench, **options):
    cells = [cell(method, m, train_num_facts=3) for m in ms]
    return run(cells, out, bench_for, method_settings, evaluation=replace(EVALUATION, scored_facts=3), **options)


def test_methods_are_well_formed():
    assert len({slug(name) for name in METHODS}) == len(METHODS) and set(MAIN_METHODS) <= set(METHODS)
    editors, trainings = ({one.name for one in fields(kind)} for kind in (EditorConfig, TrainingConfig))
    for name, method in METHODS.items():
        known = {one.name for one in fields(READY[method.ready].config)} if method.ready else editors
        assert set(method.changes) <= known - {"seed"} and set(method.training) <= trainings - {"seed", "num_facts"}
        assert not (method.ready and method.trained), name
        assert method.layers in ("first", "second", "both") and callable(method.editor), name
    assert set(VARIANTS) < set(METHODS)
    assert [name for name, method in METHODS.items() if method.may_fail] == ["MALMEN, no regularisation"]


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].may_fail])
def test_every_method_gives_a_record(method, tmp_path):
    (record,) = run_method(method, tmp_path)
    assert 0 <= record["scores"]["ES"]["mean"] <= 1 and record["blocks"] == [3] and "failure" not in record["extra"]
    assert bool(record["history"]) == METHODS[method].trained and read_record(tmp_path / cell(method).path) == record
    assert len(list((tmp_path / "editors").glob("*"))) == (not METHODS[method].ready)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].ready and METHODS[name].changes])
def test_a_variant_of_a_ready_editor_differs_in_what_it_says(name):
    about = METHODS[name]
    tier = "small" if name in NOT_TINY else "tiny"  # which has no prefixes to leave out, and that lambda
    plain_one, variant = (configuration(replace(cell(method), tier=tier))["editor"] for method in (about.ready, name))
    wanted = json.loads(json.dumps(about.changes))
    for key, value in wanted.items():
        if isinstance(value, dict):
            value = plain_one[key] | value
        assert variant[key] == value != plain_one[key]
    assert {key: value for key, value in variant.items() if key not in wanted} == {
        key: value for key, value in plain_one.items() if key not in wanted
    }
    assert name.startswith(f"{about.ready}, ")


def test_settings_within_settings_are_altered_in_part():
    config = CoachHooKConfig(memit=MEMIT_TOY)
    changed = altered(config, {"alpha": 1.0, "memit": {"regularization": 7.0, "target": {"steps": 9}}})
    assert changed.alpha == 1.0 and changed.memit.regularization == 7.0 and changed.memit.target.steps == 9
    assert changed.memit.target.learning_rate == TARGET.learning_rate and config.memit == MEMIT_TOY


SOME_TRAINED = ["MALMEN", "MALMEN, accumulated", "MALMEN, first layer", "MALMEN, all tokens"]


@pytest.mark.parametrize("method", [*SOME_TRAINED, next(iter(VARIANTS))])
def test_an_editor_read_again_is_the_editor_that_was_trained(method, tmp_path, monkeypatch):
    (straight,) = run_method(method, tmp_path)
    (tmp_path / cell(method).path).unlink()
    monkeypatch.setattr(experiments, "_train", lambda *args: pytest.fail("it lies there"))
    (again,) = run_method(method, tmp_path)
    assert again["per_fact"] == straight["per_fact"] and again["learned"] == straight["learned"]
    one = cell(method, train_num_facts=3)
    bench = toy_bench()
    settings = configuration(one, method_settings, replace(EVALUATION, scored_facts=3))
    editor, story = editor_of(one, bench, settings, fingerprints(bench), tmp_path, False)
    assert type(editor) is METHODS[method].editor and story["history"] == straight["history"]
    assert editor.config == EditorConfig(**settings["editor"])


@pytest.mark.parametrize("order", [("MALMEN", "MALMEN, accumulated"), ("MALMEN, accumulated", "MALMEN")])
def test_methods_of_one_training_share_an_editor(order, tmp_path, monkeypatch):
    trained, real = [], experiments._train
    monkeypatch.setattr(experiments, "_train", lambda *args: trained.append(1) or real(*args))
    first, second = (run_method(method, tmp_path)[0] for method in order)
    assert len(trained) == 1 and first["learned"] == second["learned"]
    assert first["per_fact"] == second["per_fact"]  # of a single batch both say the same
    for method in METHODS.values():
        if method.trained_as:
            other = METHODS[method.trained_as]
            same = other.trained and other.changes == method.changes and other.training == method.training
            assert same and issubclass(method.editor, other.editor) and other.layers == method.layers


@pytest.mark.parametrize("method", [name for name in READY if name != "FT"])
def test_ready_editors_leave_a_record_of_their_settings(method, tmp_path):
    (record,) = run_method(method, tmp_path)
    config = READY[method].config(**record["configuration"]["editor"])
    assert config == fitted(READY_TOYS[method], 0, "tiny", "decoder") and record["configuration"]["training"] == {}
    assert record["learned"] == {} and record["history"] == [] and record["blocks"] == [3]
    needs_corpus = method in ("MEMIT", "ROME", "CoachHooK")
    assert bool(record["seconds"]["training"]) == needs_corpus == (tmp_path / "key_statistics").exists()
    edited = list(record["model"]["edited_layers"])
    assert edited == ["transformer.h.0.mlp.c_proj"] if needs_corpus else len(edited) in (1, 2)
    (tmp_path / cell(method).path).unlink()
    (again,) = run_method(method, tmp_path)
    assert again["per_fact"] == record["per_fact"] and again["seconds"]["training"] == record["seconds"]["training"]


def test_coachhook_starts_anew_for_each_block(tmp_path):
    options = {"evaluation": replace(EVALUATION, scored_facts=9)}
    (both,) = run([cell("CoachHooK", 3, train_num_facts=3)], tmp_path / "a", toy_bench, method_settings, **options)
    assert both["blocks"] == [3, 3, 3]
    (one,) = run_method("CoachHooK", tmp_path / "b")
    assert both["per_fact"]["ES"][:3] == one["per_fact"]["ES"]


def test_a_bench_without_a_corpus_has_no_memit(tmp_path):
    bench = replace(toy_bench(), corpus=[])
    with pytest.raises(EmptyCorpusError, match="this bench has no corpus"):
        ready_editor("MEMIT", bench, asdict(MEMIT_TOY) | {"blocks": [0]}, tmp_path, False)


@pytest.mark.parametrize("tier", ["tiny", "small", "paper", "shapes"])
@pytest.mark.parametrize("method", READY)
def test_ready_settings_of_every_tier_survive_a_record(tier, method):
    for family in ("decoder", "gptj", "subjects"):
        config = fitted(ready_settings(tier, method), 3, tier, family)
        values = json.loads(json.dumps(asdict(config)))
        assert READY[method].config(**values) == config
        memit = getattr(config, "memit", config)
        if isinstance(memit, MEMITConfig):
            assert memit.blocks == CRITICAL.get((tier, family), (0,)) and memit.target.seed == 3
        else:
            assert config.seed == 3
    assert set(TINY) == set(PAPERS) == set(READY)
    assert all(METHODS[name].editor is ready.editor for name, ready in READY.items())


# --- batch after batch


def test_all_at_once_is_one_edit():
    calls = []

    class Editor:
        lm, method = toy_model(), "toy"

        def edit(self, facts, batch_size, progress):
            calls.append(len(facts))
            return WeightShift({})

    edited_in_batches(Editor(), toy_facts(7), 0, 8)
    assert calls == [7]


@pytest.mark.parametrize("method", ["FT", "MEMIT", "CoachHooK"])
def test_batches_go_on_from_one_another(method, tmp_path):
    bench = toy_bench()
    config = fitted({"FT": FineTuningConfig(epochs=1), **READY_TOYS}[method], 0, "tiny", "decoder")
    editor = ready_editor(method, bench, asdict(config), tmp_path, False)
    facts = bench.eval_facts["toys"]
    whole = edited_in_batches(editor, facts[:6], 3, 8)
    first = edited_in_batches(editor, facts[:3], 3, 8)
    if method == "CoachHooK":
        second = editor.edit(facts[3:6], 8)
    else:
        with first.applied(editor.lm):
            second = first + editor.edit(facts[3:6], 8)
    for name, shift in whole.shifts.items():
        torch.testing.assert_close(second.shifts[name], shift, rtol=1e-5, atol=1e-7)


def test_an_experiment_of_batches_says_so_in_its_plan():
    one = find_experiment("consecutive")
    assert one.batch == 16 and set(CONSECUTIVE_METHODS) <= set(METHODS) and set(ALL_METHODS) <= set(METHODS)
    cells = cells_of("consecutive", "tiny", full=True)
    assert {c.train_num_facts for c in cells} == {16} and {c.num_facts for c in cells} == {16, 64, 256}


def test_fine_tuning_needs_no_training_and_leaves_nothing_behind(tmp_path):
    (record,) = run_method("FT", tmp_path)
    assert record["learned"] == {} and record["history"] == [] and record["seconds"]["training"] == 0
    assert record["configuration"]["training"] == {} and record["configuration"]["editor"]["epochs"] == 2
    assert set(record["model"]["edited_layers"]) == set(fine_tuned(toy_model()).layers)
    assert record["fingerprints"] == fingerprints(toy_bench())


@pytest.mark.parametrize(
    ("method", "names"),
    [("MALMEN", ["c_proj"]), ("MEND", ["c_proj"]), ("MALMEN, first layer", ["c_fc"])],
)
def test_edited_model_has_the_layers_of_the_method(method, names):
    lm = toy_model()
    edited = edited_model(lm, METHODS[method])
    assert {name.rsplit(".", 1)[1] for name in edited.layers} == set(names)
    assert edited.model is lm.model and edited.tokenizer is lm.tokenizer
    assert len(edited.layers) == len(lm.layers) and (edited is lm) == (names == ["c_proj"])


@pytest.mark.parametrize("make", [toy_classifier, toy_encoder_decoder])
def test_edited_model_of_other_families(make):
    lm = make(last=1)
    first = edited_model(lm, METHODS["MALMEN, first layer"])
    assert len(first.layers) >= len(lm.layers) and not set(first.layers) & set(lm.layers)


# --- a breakdown as a result


def test_a_method_that_may_fail_writes_its_breakdown_down(tmp_path):
    one = cell("MALMEN, no regularisation")
    (record,) = run_method(one.method, tmp_path)
    failure = record["extra"]["failure"]
    assert failure["error"] == "SingularGramError" and "is singular" in failure["message"]
    assert failure["tokens"] < failure["key_size"] == 24 and failure["layer"] in toy_model().layers
    assert failure["condition"] == "infinite" or failure["condition"] > 1e12
    assert record["scores"] == record["per_fact"] == record["learned"] == {}
    assert record["seconds"]["training"] > 0 == record["seconds"]["editing"] == record["seconds"]["evaluation"]
    assert record["memory_bytes"]["training"]["process"] > 1e7 and record["memory_bytes"]["editing"] == {}
    assert record["blocks"] == record["history"] == [] and record["fingerprints"] == fingerprints(toy_bench())
    assert read_record(tmp_path / one.path) == record
    assert run_method(one.method, tmp_path, bench_for=no_bench) == [record]  # a breakdown is finished too


@pytest.mark.parametrize(("condition", "expected"), [(1e17, 1e17), (math.inf, "infinite"), (math.nan, "infinite")])
def test_the_condition_of_a_breakdown_is_plain_json(tmp_path, monkeypatch, condition, expected):
    def breaking(*args):
        raise SingularGramError("h", 3, 24, 0.0, condition)

    monkeypatch.setattr(experiments, "editor_of", breaking)
    (record,) = run_method("MALMEN, no regularisation", tmp_path)
    assert record["extra"]["failure"]["condition"] == expected
    assert (record["extra"]["failure"]["tokens"], record["extra"]["failure"]["key_size"]) == (3, 24)


def test_a_breakdown_after_the_training_keeps_its_story(tmp_path, monkeypatch):
    story = {"history": [{"step": 0, "loss": 1.0}], "seconds": 9.0, "memory_bytes": {"process": 5}}
    monkeypatch.setattr(experiments, "editor_of", lambda *args: ("an editor", story))

    def breaking(*args):
        raise NonFiniteShiftError("no shift")

    monkeypatch.setattr(experiments, "_measure", breaking)
    (record,) = run_method("MALMEN, no regularisation", tmp_path)
    assert record["history"] == story["history"] and record["seconds"]["training"] == 9.0
    assert 0 <= record["seconds"]["editing"] < 5 and record["seconds"]["evaluation"] == 0
    assert record["memory_bytes"]["training"] == {"process": 5} and record["memory_bytes"]["editing"]["process"] > 1e7


def test_another_breakdown_is_told_without_a_matrix(tmp_path, monkeypatch):
    def breaking(*args):
        raise NonFiniteShiftError("no shift")

    monkeypatch.setattr(experiments, "editor_of", breaking)
    (record,) = run_method("MALMEN, no regularisation", tmp_path)
    assert record["extra"] == {"failure": {"error": "NonFiniteShiftError", "message": "no shift"}}


@pytest.mark.parametrize(
    ("method", "error", "raised"),
    [("MALMEN", NonFiniteShiftError("x"), CellError), ("MALMEN, no regularisation", ZeroDivisionError(), None)],
)
def test_no_other_breakdown_becomes_a_record(tmp_path, monkeypatch, method, error, raised):
    def breaking(*args):
        raise error

    monkeypatch.setattr(experiments, "editor_of", breaking)
    with pytest.raises(raised or type(error)):
        run_method(method, tmp_path)
    assert not (tmp_path / cell(method).path).exists()


# --- extras


def test_extras_of_experiments_exist_and_are_asked_for_block_by_block(tmp_path, monkeypatch):
    assert {name for one in EXPERIMENTS.values() for name in one.extras} == EXTRAS.keys()
    about = Experiment("Toy", "none", "decoder", "None.", extras=("residuals", "failures", "sequence_success"))
    monkeypatch.setitem(EXPERIMENTS, "toy", about)
    (record,) = run([cell("MALMEN", 3)], tmp_path)
    assert list(record["extra"]) == list(about.extras) and record["blocks"] == [3, 3]
    assert all(len(blocks) == 2 for blocks in record["extra"].values())
    assert [block["counts"]["facts"] for block in record["extra"]["failures"]] == [3, 3]
    assert rows_are_read(record)


def rows_are_read(record):
    return residual_points([record]) and sequence_points([record]) and failure_table([record])


# --- the bench in another setting

def test_a_setting_is_of_its_experiment_only_and_shares_no_bench(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", Experiment("Toy", "none", "decoder", "None.", setting="alternatives"))
    bench = replace(toy_bench(), known_facts=knowing_bench().known_facts)
    plain_cell = replace(cell("MALMEN untrained"), experiment="other")
    with_setting, without = run([cell("MALMEN untrained"), plain_cell], tmp_path, lambda *place: bench)
    assert with_setting["bench"]["setting"].startswith("alternative") and "setting" not in without["bench"]
    assert with_setting["fingerprints"]["language_model"] == without["fingerprints"]["language_model"]
    assert with_setting["fingerprints"]["train_facts"] != without["fingerprints"]["train_facts"]


def test_settings_of_experiments_exist():
    assert {one.setting for one in EXPERIMENTS.values()} - {""} <= BENCH_SETTINGS.keys()
