"""The runner: what a cell edits, its editor, one record a cell, going on where records end, and what a record holds."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from malmen_repro import progress
from malmen_repro.editors import EditorConfig
from malmen_repro.evaluation import MEASURES, Scores, evaluate, plain
from malmen_repro.facts import Fact, sha256
from malmen_repro.methods.fine_tuning import FineTuning, FineTuningConfig, fine_tuned
from malmen_repro.methods.key_statistics import EmptyCorpusError
from malmen_repro.normal_equation import SingularGramError
from malmen_repro.protocol import find_editor
from malmen_repro.replication import runner
from malmen_repro.replication.extra_measures import EXTRAS
from malmen_repro.replication.figures import (
    draw_scaling,
    failure_table,
    residual_points,
    scaling_table,
    sequence_points,
)
from malmen_repro.replication.plans import (
    EXPERIMENTS,
    METHODS,
    Cell,
    Experiment,
    ExperimentError,
    configuration,
)
from malmen_repro.replication.records import (
    RecordConflictError,
    RecordError,
    RecordWarning,
    fingerprints,
    read_record,
    read_records,
    revived,
    write_record,
)
from malmen_repro.replication.released_code import VARIANTS
from malmen_repro.replication.runner import (
    CellError,
    beside,
    condensed,
    edited_in_batches,
    edited_model,
    editor_of,
    evaluation_blocks,
    pooled,
    run_cells,
)
from malmen_repro.replication.stand_ins import Bench
from malmen_repro.replication.tier_settings import READY, fitted, ready_editor
from malmen_repro.training import TrainingConfig
from malmen_repro.weight_shifts import NonFiniteShiftError, WeightShift
from tests.replication.test_plans import EVALUATION, MEMIT_TOY, READY_TOYS, cell, toy_settings
from tests.toy import knowing_bench, toy_classifier, toy_corpus, toy_encoder_decoder, toy_facts, toy_model

TOY_METHODS = ("MALMEN", "MEND", "MALMEN untrained")


def toy_bench(tier="tiny", family="decoder", seed=0):
    toys = toy_facts(10, seed=1, start=20)
    return Bench(toy_model(seed=seed), toy_facts(12), {"toys": toys}, {"made": "here"}, corpus=toy_corpus())


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
    assert len(steps) == 55 + 6  # the checkpoint was written on the way out, after 54 whole steps
    monkeypatch.undo()
    (straight,) = run([one], tmp_path / "other", settings=settings)
    assert record["per_fact"] == straight["per_fact"] and record["learned"] == straight["learned"]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_one_editor_serves_several_sets_and_m(tmp_path, monkeypatch):
    bench = toy_bench()
    bench.eval_facts["more"] = toy_facts(9, seed=3, start=40)
    cells = [cell(num_facts=m, train_num_facts=4, data_set=name) for m in (2, 4) for name in ("toys", "more")]
    trained = []
    real = runner._train
    monkeypatch.setattr(runner, "_train", lambda *args: trained.append(1) or real(*args))
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
    real = runner.run_cell

    def breaking(one, *args):
        if one.method == "MEND":
            raise NonFiniteShiftError("the shift of layer h is not finite")
        return real(one, *args)

    monkeypatch.setattr(runner, "run_cell", breaking)
    cells = [cell("MEND"), cell("MALMEN untrained")]
    with pytest.raises(CellError, match="1 of 2 cells broke down.*toys-mend-m3-s0"):
        run(cells, tmp_path)
    assert not (tmp_path / cells[0].path).exists() and (tmp_path / cells[1].path).exists()
    monkeypatch.undo()
    run(cells, tmp_path)
    monkeypatch.setattr(runner, "run_cell", breaking)
    with pytest.raises(CellError):
        run(cells, tmp_path, fresh=True)
    assert not (tmp_path / cells[0].path).exists()  # in a fresh run the old record does not stand for the new one


def test_a_bug_is_not_taken_for_a_breakdown(tmp_path, monkeypatch):
    def buggy(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(runner, "run_cell", buggy)
    with pytest.raises(ZeroDivisionError):
        run([cell()], tmp_path)


def test_progress_bars_show(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)  # where somebody looks on
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


@pytest.mark.filterwarnings("ignore:the editor's eta is below zero")  # of a few steps
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].may_fail])
def test_every_method_gives_a_record(method, tmp_path):
    (record,) = run_method(method, tmp_path)
    assert 0 <= record["scores"]["ES"]["mean"] <= 1 and record["blocks"] == [3] and "failure" not in record["extra"]
    assert bool(record["history"]) == METHODS[method].trained and read_record(tmp_path / cell(method).path) == record
    assert len(list((tmp_path / "editors").glob("*"))) == (not METHODS[method].ready)


SOME_TRAINED = ["MALMEN", "MALMEN, accumulated", "MALMEN, first layer", "MALMEN, all tokens"]


@pytest.mark.parametrize("method", [*SOME_TRAINED, next(iter(VARIANTS))])
def test_an_editor_read_again_is_the_editor_that_was_trained(method, tmp_path, monkeypatch):
    (straight,) = run_method(method, tmp_path)
    (tmp_path / cell(method).path).unlink()
    monkeypatch.setattr(runner, "_train", lambda *args: pytest.fail("it lies there"))
    (again,) = run_method(method, tmp_path)
    assert again["per_fact"] == straight["per_fact"] and again["learned"] == straight["learned"]
    one = cell(method, train_num_facts=3)
    bench = toy_bench()
    settings = configuration(one, method_settings, replace(EVALUATION, scored_facts=3))
    editor, story = editor_of(one, bench, settings, fingerprints(bench), tmp_path, False)
    assert type(editor) is METHODS[method].editor and story["history"] == straight["history"]
    assert editor.config == revived(EditorConfig, settings["editor"])


@pytest.mark.parametrize("order", [("MALMEN", "MALMEN, accumulated"), ("MALMEN, accumulated", "MALMEN")])
def test_methods_of_one_training_share_an_editor(order, tmp_path, monkeypatch):
    trained, real = [], runner._train
    monkeypatch.setattr(runner, "_train", lambda *args: trained.append(1) or real(*args))
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
    config = type(find_editor(method).paper_config)(**record["configuration"]["editor"])
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
    with pytest.raises(EmptyCorpusError, match="there is no corpus"):
        ready_editor("MEMIT", bench, asdict(MEMIT_TOY) | {"blocks": [0]}, tmp_path, False)


# --- batch after batch


def test_all_at_once_is_one_edit():
    calls = []

    class Noting(FineTuning):
        def edit(self, facts, batch_size, progress):
            calls.append(len(facts))
            return WeightShift({})

    edited_in_batches(Noting(toy_model()), toy_facts(7), 0, 8)
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

    monkeypatch.setattr(runner, "editor_of", breaking)
    (record,) = run_method("MALMEN, no regularisation", tmp_path)
    assert record["extra"]["failure"]["condition"] == expected
    assert (record["extra"]["failure"]["tokens"], record["extra"]["failure"]["key_size"]) == (3, 24)


def test_a_breakdown_after_the_training_keeps_its_story(tmp_path, monkeypatch):
    story = {"history": [{"step": 0, "loss": 1.0}], "seconds": 9.0, "memory_bytes": {"process": 5}}
    monkeypatch.setattr(runner, "editor_of", lambda *args: ("an editor", story))

    def breaking(*args):
        raise NonFiniteShiftError("no shift")

    monkeypatch.setattr(runner, "_measure", breaking)
    (record,) = run_method("MALMEN, no regularisation", tmp_path)
    assert record["history"] == story["history"] and record["seconds"]["training"] == 9.0
    assert 0 <= record["seconds"]["editing"] < 5 and record["seconds"]["evaluation"] == 0
    assert record["memory_bytes"]["training"] == {"process": 5} and record["memory_bytes"]["editing"]["process"] > 1e7


def test_another_breakdown_is_told_without_a_matrix(tmp_path, monkeypatch):
    def breaking(*args):
        raise NonFiniteShiftError("no shift")

    monkeypatch.setattr(runner, "editor_of", breaking)
    (record,) = run_method("MALMEN, no regularisation", tmp_path)
    assert record["extra"] == {"failure": {"error": "NonFiniteShiftError", "message": "no shift"}}


@pytest.mark.parametrize(
    ("method", "error", "raised"),
    [("MALMEN", NonFiniteShiftError("x"), CellError), ("MALMEN, no regularisation", ZeroDivisionError(), None)],
)
def test_no_other_breakdown_becomes_a_record(tmp_path, monkeypatch, method, error, raised):
    def breaking(*args):
        raise error

    monkeypatch.setattr(runner, "editor_of", breaking)
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
