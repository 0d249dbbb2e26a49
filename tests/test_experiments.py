"""Experiments, records, the runner, tables and figures."""

import itertools
import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from malmen_repro import benches, experiments, records
from malmen_repro.benches import (
    MissingDataError,
    ModelNotFoundError,
    UnknownTierError,
    bench_loader,
    check_model,
    check_tier,
    load_language_model,
)
from malmen_repro.editors import EditorConfig, NonFiniteShiftError
from malmen_repro.evaluation import MEASURES, Scores, evaluate
from malmen_repro.experiments import (
    EXPERIMENTS,
    MAIN_METHODS,
    METHODS,
    TIERS,
    Bench,
    Cell,
    CellError,
    EvaluationConfig,
    ExperimentError,
    Plan,
    UnknownExperimentError,
    cells_of,
    condensed,
    configuration,
    evaluation_blocks,
    find_experiment,
    pooled,
    run_cells,
    slug,
    trained_for,
    training_settings,
)
from malmen_repro.facts import Fact, MalmenError
from malmen_repro.figures import (
    compare_tables,
    draw_scaling,
    figure_title,
    scaling_points,
    scaling_table,
    shown,
    spread_note,
)
from malmen_repro.records import (
    RecordConflictError,
    RecordError,
    RecordWarning,
    differences,
    facts_hash,
    fingerprints,
    git_state,
    plain,
    read_record,
    read_records,
    sha256,
    weights_hash,
    write_record,
)
from malmen_repro.training import TrainingConfig
from tests.toy import toy_facts, toy_model

TOY_METHODS = ("MALMEN", "MEND", "MALMEN untrained")
EVALUATION = EvaluationConfig(scored_facts=6, batch_size=4)


def toy_bench(tier="tiny", family="decoder", seed=0):
    return Bench(toy_model(seed=seed), toy_facts(12), {"toys": toy_facts(10, seed=1, start=20)}, {"made": "here"})


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
            assert json.dumps(configuration(one)) and editor.seed == 0  # the seed is the cell's to set
            if training is not None:
                assert training.num_facts == one.train_num_facts and training.seed == 0
                assert (training.steps > 0) == METHODS[one.method].trained
            assert (training is None) == (one.method == "FT")


def test_tiny_plan_has_a_quick_and_a_full_size():
    quick, full = (cells_of("scaling_decoder", "tiny", full=full) for full in (False, True))
    assert {one.num_facts for one in quick} == {16, 64} and {one.seed for one in quick} == {0}
    assert {one.num_facts for one in full} == {16, 64, 256, 1024} and {one.seed for one in full} == {0, 1, 2}
    assert {one.method for one in full} == set(MAIN_METHODS) and set(quick) <= set(full)
    assert len(cells_of("scaling_decoder", "tiny", seeds=2, num_facts=[16, 256])) == 2 * 2 * 4


def test_every_figure_and_table_of_the_paper_has_its_experiment_for_each_family():
    figures = {experiment.figure for experiment in EXPERIMENTS.values()}
    curves = {f"Fig. {number}" for number in range(4, 9)}
    assert curves | {"Table 1", "Table 2", "Table 3", "Tables 4 and 5"} <= figures
    for prefix in ("scaling", "ablations"):
        families = {one.family for name, one in EXPERIMENTS.items() if name.startswith(prefix)}
        assert families == set(benches.FAMILIES)


def test_what_is_run_by_default_is_part_of_the_full_plan():
    for name, experiment in EXPERIMENTS.items():
        for tier in experiment.plans:
            sizes = [{one.num_facts for one in cells_of(name, tier, full=full)} for full in (False, True)]
            assert sizes[0] <= sizes[1] or name.startswith("ablations") or name == "failures"


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
    with pytest.raises(UnknownTierError, match="no tier 'huge'"):
        check_tier("huge", None)


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"num_facts": [16, 0]}])
def test_nothing_to_run(wrong):
    with pytest.raises(ExperimentError, match="at least 1"):
        cells_of("scaling_decoder", "tiny", **wrong)


def test_duplicate_numbers_of_facts_count_once():
    assert len(cells_of("scaling_decoder", "tiny", 1, [16, 16])) == 4


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


def test_hash_does_not_depend_on_the_order_of_keys():
    assert sha256({"a": 1, "b": [2]}) == sha256({"b": [2], "a": 1}) != sha256({"a": 1, "b": [3]})


def test_differences_name_the_fields():
    theirs = {"schema": 1, "training": {"steps": 1, "seed": 0}, "gone": 1}
    ours = {"schema": 2, "training": {"steps": 2, "seed": 0}}
    assert differences(theirs, ours) == ["gone", "schema", "training.steps"]


# --- fingerprints and provenance


def test_weights_hash_sees_any_weight():
    lm = toy_model()
    before = weights_hash(lm)
    assert before == weights_hash(toy_model()) != weights_hash(toy_model(seed=1))
    lm.model.get_input_embeddings().weight[3, 3] += 1e-6
    assert weights_hash(lm) != before
    assert weights_hash(toy_model(torch.bfloat16)) != before


def test_facts_hash_ignores_the_source_and_sees_the_order():
    facts = toy_facts(3)
    elsewhere = [replace(fact, source="elsewhere, line 1") for fact in facts]
    assert facts_hash(facts) == facts_hash(elsewhere) != facts_hash(facts[::-1])


def test_git_state_of_another_folder(tmp_path):
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None
    assert git_state(Path(__file__).parent) is None  # a folder inside a checkout is not the checkout


def test_git_state_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


# --- records


def test_plain():
    assert plain({"a": [1.23456789, float("nan"), True, None], "b": ("x", math.inf)}) == {
        "a": [1.2346, None, True, None],
        "b": ["x", None],
    }


def test_record_round_trip(finished, tmp_path):
    record = finished[2][0]
    write_record(record, tmp_path / "a" / "b.json")
    assert read_record(tmp_path / "a" / "b.json") == record
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    assert len((tmp_path / "a" / "b.json").read_text().splitlines()) == len(record) + 2  # a line a field


def test_write_record_refuses_nan_and_keeps_what_was_there(tmp_path):
    write_record({"a": 1}, tmp_path / "r.json")
    with pytest.raises(ValueError):
        write_record({"a": math.nan}, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "{}", '{"hash": 1}', "\x00" * 50])
def test_damaged_records_are_told(tmp_path, damage):
    (tmp_path / "r.json").write_text(damage)
    with pytest.raises(RecordError, match="r.json is damaged"):
        read_record(tmp_path / "r.json")


@pytest.mark.parametrize("drop", ["scores", "per_fact", "fingerprints", "seconds", "hash", "configuration"])
def test_incomplete_records_are_told(finished, tmp_path, drop):
    record = {name: value for name, value in finished[2][0].items() if name != drop}
    write_record(record, tmp_path / "r.json")
    with pytest.raises(RecordError, match="r.json is damaged"):
        read_record(tmp_path / "r.json")


def test_a_doctored_configuration_is_told(finished, tmp_path):
    record = json.loads(json.dumps(finished[2][0]))
    record["configuration"]["training"]["steps"] = 99
    write_record(record, tmp_path / "r.json")
    with pytest.raises(RecordError, match="its configuration hashes to"):
        read_record(tmp_path / "r.json")


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
    with pytest.raises(RecordConflictError, match=change):
        run(cells[:2], tmp_path, lambda tier, family, seed: other)
    assert not (tmp_path / cells[1].path).exists()


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


# --- tables and figures


def fake(method, m, seed, mean, data_set="toys", tier="tiny", before=0.9):
    part = {"mean": mean, "interval": [mean - 0.05, mean + 0.05], "facts": 10}
    scores = {name: dict(part) for name in ("ES", "GS", "LS")} | {"LS before": {**part, "mean": before}}
    setting = {"cell": asdict(Cell("toy", "decoder", method, m, seed, tier, data_set, m))}
    model = {"type": "gpt2", "parameters": 1_500_000}
    return {"hash": sha256(setting), "configuration": setting, "scores": scores, "model": model}


def test_scaling_points_average_over_seeds():
    (point,) = scaling_points([fake("MALMEN", 16, seed, mean) for seed, mean in enumerate((0.8, 0.9, 1.0))])
    assert point["seeds"] == 3 and point["ES"] == pytest.approx((0.9, 0.8, 1.0))


def test_a_single_seed_shows_the_interval():
    (point,) = scaling_points([fake("MALMEN", 16, 0, 0.8)])
    assert shown(point, "ES") == "80.0 [75.0, 85.0]"
    assert shown(None, "ES") == "–"


def test_spread_note():
    assert "1 seed" in spread_note([{"seeds": 1}]) and "bootstrap" in spread_note([{"seeds": 1}])
    assert spread_note([{"seeds": 3}, {"seeds": 3}]) == "mean ± standard deviation over 3 seeds"
    assert "bootstrap" in spread_note([{"seeds": 3}, {"seeds": 1}])


def test_scaling_table_in_the_order_of_m_and_methods():
    records = [fake(method, m, seed, 0.5) for m in (256, 16) for method in TOY_METHODS[::-1] for seed in (1, 0)]
    rows = scaling_table(records).splitlines()
    assert rows[0].startswith("| set") and [row.split("|")[2:4] for row in rows[2:8]] == [
        [f" {m} ".ljust(5), f" {method} ".ljust(18)] for m in (16, 256) for method in TOY_METHODS
    ]
    assert "50.0 ± 0.0" in rows[2] and "90.0 ± 0.0" in rows[2]
    assert rows[-1] == "Per cent, mean ± standard deviation over 2 seeds."
    assert scaling_table([]) == "There are no records."


def test_compare_tables():
    new = [fake("MALMEN", m, seed, 0.8) for m in (16, 64) for seed in (0, 1)]
    old = [fake("MALMEN", 16, seed, 0.7) for seed in (0, 1, 2)]
    text = compare_tables(new, old)
    row = text.splitlines()[2]
    assert "80.0 ± 0.0" in row and "70.0 ± 0.0" in row and "2 / 3" in row
    assert text.splitlines()[3].count("–") == 3 and "2 / 0" in text
    assert "2 of 4 cells have a committed record with the same settings" in text
    assert "0 of 4 cells" in compare_tables(new, []) and compare_tables([], old) == "There are no records."


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


def test_a_figure_is_drawn_from_records_alone_and_is_deterministic(finished, tmp_path):
    records = read_records(finished[0], "toy", "tiny")
    draw_scaling(records, tmp_path / "a" / "one.v1")
    draw_scaling(records[::-1], tmp_path / "a" / "two.v1")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["one.v1.png", "one.v1.svg", "two.v1.png", "two.v1.svg"]
    for kind in ("png", "svg"):
        one, two = ((tmp_path / "a" / f"{name}.v1.{kind}").read_bytes() for name in ("one", "two"))
        assert one == two and len(one) > 5000
    assert b"<dc:date>" not in (tmp_path / "a" / "one.v1.svg").read_bytes()


def test_figure_says_tier_model_and_seeds():
    grid = itertools.product(TOY_METHODS, (16, 1037), (0, 1), ("a", "b"))
    records = [fake(method, m, seed, 0.5, name) for method, m, seed, name in grid]
    figure = draw_scaling(records)
    title = figure.get_suptitle()
    assert "Tiny tier" in title and "1.5 M" in title and "2 seeds" in title and "standard deviation" in title
    assert len(figure.axes) == 6 and [ax.get_title() for ax in figure.axes[:3]] == ["ES", "GS", "LS"]
    assert [label.get_text() for label in figure.axes[5].get_xticklabels()] == ["16", "1037"]
    lines = figure.axes[2].get_lines()
    assert lines[-1].get_linestyle() == "--" and lines[-1].get_ydata().tolist() == [0.9, 0.9]
    assert len(figure.axes[0].get_lines()) == 3 and figure.axes[0].get_ylabel() == "a"


@pytest.mark.parametrize(("size", "text"), [(6.05e9, "6.05 B"), (124_439_808, "124 M"), (27_424, "27,424")])
def test_figure_title_says_the_size(size, text):
    record = fake("MEND", 16, 0, 0.5)
    record["model"]["parameters"] = int(size)
    assert f"gpt2 of {text} parameters, 1 seed" in figure_title([record])


def test_figure_of_one_seed_says_so():
    assert "bootstrap interval over facts, 1 seed" in draw_scaling([fake("MEND", 16, 0, 0.5)]).get_suptitle()


def test_figure_of_nothing():
    with pytest.raises(RecordError, match="no records to draw"):
        draw_scaling([])


def test_a_method_nobody_knows_is_drawn_too():
    assert draw_scaling([fake("MEMIT", m, 0, 0.5) for m in (1, 2)]).axes[0].get_lines()


def test_committed_records_are_whole_and_fit_the_table():
    folder = records.committed_records()
    for name in EXPERIMENTS:
        for tier in TIERS if folder else ():
            for record in read_records(folder, name, tier):
                one = Cell(**record["configuration"]["cell"])
                assert (folder / one.path).exists() and one.experiment == name and one.tier == tier


# --- models and data from outside


@pytest.fixture
def saved(tmp_path):
    lm = toy_model()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_load_language_model_from_a_folder(saved):
    lm = load_language_model(str(saved), last=1, device="cpu", progress=False)
    assert weights_hash(lm) == weights_hash(toy_model()) and list(lm.layers) == ["transformer.h.2.mlp.c_proj"]


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no config.json"):
        check_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "no-such/model", "not/a/name", "missing folder"])
def test_no_model_and_no_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=name) as caught:
        check_model(name)
    assert isinstance(caught.value, MalmenError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("tier", ["small", "paper"])
def test_tiers_without_data_fail_at_once(tier, tmp_path):
    with pytest.raises(MissingDataError, match="MALMEN_DATA.*--tier tiny"):
        check_tier(tier, None)
    with pytest.raises(MissingDataError, match="no folder zsre"):
        bench_loader(tmp_path, tmp_path)(tier, "decoder", 0)


def test_tiny_tier_needs_nothing():
    check_tier("tiny", None)


def zsre_row(i):
    return {"src": f"w{i}", "rephrase": f"w{i} w1", "answers": ["w2"], "alt": "w3", "loc": "w4", "loc_ans": "w5"}


def test_paper_tier_without_the_hub_says_what_can_be_run(tmp_path):
    (tmp_path / "zsre").mkdir()
    with pytest.raises(MissingDataError, match=r"has no file \*train\*"):
        check_tier("paper", tmp_path)
    for split in ("train", "eval"):
        (tmp_path / "zsre" / f"x_{split}.jsonl").write_text(json.dumps(zsre_row(1)) + "\n")
    with pytest.raises(ModelNotFoundError, match="--tier small"):
        check_tier("paper", tmp_path)
    (tmp_path / "zsre" / "y_train.jsonl").write_text("")
    with pytest.raises(MissingDataError, match="2 files"):
        check_tier("paper", tmp_path)


def test_paper_tier_takes_no_smaller_data_for_the_published(tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "check_model", lambda name: None)
    monkeypatch.setattr(benches, "paper_model", lambda name, source: toy_model())
    (tmp_path / "zsre").mkdir()
    for split in ("train", "eval"):
        (tmp_path / "zsre" / f"{split}.jsonl").write_text("".join(json.dumps(zsre_row(i)) + "\n" for i in range(5)))
    with pytest.raises(MissingDataError, match="holds 5 facts"):
        benches.paper_bench(tmp_path)
    monkeypatch.setitem(benches.TRAIN_FACTS, "zsre", 5)
    bench = bench_loader(tmp_path, tmp_path)("paper", "decoder", 0)
    assert len(bench.eval_facts["zsre"]) == 5 and bench.provenance["facts"]["train"]["facts"] == 5
    assert bench.train_facts[0].answer == "w2"  # the correct one, section 5.1


def test_bench_loader_remembers_the_last_bench(monkeypatch, tmp_path):
    from malmen_repro import stand_ins

    built = []

    def tiny_bench(seed, cache_dir, progress, architecture):
        built.append(seed)
        return toy_bench(seed=seed)

    monkeypatch.setattr(stand_ins, "tiny_bench", tiny_bench)
    bench_for = bench_loader(None, tmp_path, progress=False)
    assert bench_for("tiny", "decoder", 0) is bench_for("tiny", "decoder", 0) is not bench_for("tiny", "decoder", 1)
    assert built == [0, 1]


def test_small_and_paper_tier_share_one_model_among_seeds(monkeypatch, tmp_path):
    from malmen_repro import small_stand_in

    built = []

    def small_bench(data_dir, cache_dir, seed, progress, architecture):
        built.append(seed)
        return toy_bench()

    monkeypatch.setattr(small_stand_in, "small_bench", small_bench)
    (tmp_path / "zsre").mkdir()
    bench_for = bench_loader(tmp_path, tmp_path, progress=False)
    assert bench_for("small", "decoder", 0) is bench_for("small", "decoder", 3) and built == [0]
