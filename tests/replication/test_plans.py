"""Experiments as data: methods, plans, cells, settings, and the configuration that a record is known by."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from malmen_repro.editors import EditorConfig
from malmen_repro.facts import sha256
from malmen_repro.methods.coachhook import CoachHooKConfig
from malmen_repro.methods.memit import MEMITConfig
from malmen_repro.methods.target_vectors import TargetConfig
from malmen_repro.protocol import find_editor
from malmen_repro.replication import benches
from malmen_repro.replication.bench_settings import BENCH_SETTINGS
from malmen_repro.replication.benches import TIERS
from malmen_repro.replication.plans import (
    ALL_METHODS,
    CONSECUTIVE_METHODS,
    EXPERIMENTS,
    MAIN_METHODS,
    METHODS,
    NOT_TINY,
    SETTINGS,
    Cell,
    EvaluationConfig,
    ExperimentError,
    Plan,
    UnknownExperimentError,
    altered,
    cells_of,
    configuration,
    find_experiment,
    slug,
    trained_for,
    training_settings,
)
from malmen_repro.replication.released_code import VARIANTS
from malmen_repro.replication.tier_settings import CRITICAL, PAPERS, READY, TINY, fitted, ready_settings
from malmen_repro.training import TrainingConfig

EVALUATION = EvaluationConfig(scored_facts=6, batch_size=4)

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


def toy_settings(tier, method, num_facts):
    training = TrainingConfig(num_facts=num_facts, steps=0 if "untrained" in method else 3, meta_learning_rate=1e-3)
    return EditorConfig(rank=4, blocks=1, learning_rate=0.01), training


def cell(method="MALMEN", num_facts=3, seed=0, **changes):
    given = {"train_num_facts": num_facts, "data_set": "toys", **changes}
    return Cell("toy", "decoder", method, num_facts, seed, "tiny", **given)


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
        assert families - {"base"} == set(benches.PAPER_FAMILIES) - {"subjects", "questions", "base"}


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
    monkeypatch.setitem(SETTINGS, "tiny", ({"rank": 5}, {"steps": {1: 10, 100: 20}}))
    assert training_settings("tiny", "MALMEN", 99)[0].rank == 5
    editor, training = training_settings("tiny", "MEND, locality 10", 100)
    assert (editor.rank, training.steps, training.locality_coefficient) == (5, 20, 10.0)
    assert training_settings("tiny", "MALMEN", 99)[1].steps == 10
    assert training_settings("tiny", "MALMEN, no regularisation", 99)[0].regularization == 0
    assert training_settings("tiny", "MALMEN, all tokens", 99)[0].tokens == "all"


def test_untrained_settings_do_not_hang_on_the_trained_ones(monkeypatch):
    before = training_settings("tiny", "MALMEN untrained", 16)
    monkeypatch.setitem(SETTINGS, "tiny", ({"rank": 5}, {"steps": {1: 10}}))
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
            whole = isinstance(one.default, int) or one.name in ("ramp_facts", "held_out")
            value = not one.default if isinstance(one.default, bool) else 77 if whole else 0.77

            def settings(*args, name=one.name, value=value):
                editor, training = toy_settings(*args)
                return editor, replace(training, **{name: value})

            hashes.add(sha256(configuration(cell(), settings, EVALUATION)))
    assert len(hashes) == 1 + 6 + 1 + len(fields(TrainingConfig)) - 2


def test_configuration_takes_both_seeds_from_the_cell():
    found = configuration(cell(seed=5), toy_settings)
    assert found["editor"]["seed"] == found["training"]["seed"] == 5


# --- methods and settings


def test_methods_are_well_formed():
    assert len({slug(name) for name in METHODS}) == len(METHODS) and set(MAIN_METHODS) <= set(METHODS)
    editors, trainings = ({one.name for one in fields(kind)} for kind in (EditorConfig, TrainingConfig))
    for name, method in METHODS.items():
        known = {one.name for one in fields(find_editor(method.ready).paper_config)} if method.ready else editors
        assert set(method.changes) <= known - {"seed"} and set(method.training) <= trainings - {"seed", "num_facts"}
        assert not (method.ready and method.trained), name
        assert method.layers in ("first", "second", "both") and callable(method.editor), name
    assert set(VARIANTS) < set(METHODS)
    assert [name for name, method in METHODS.items() if method.may_fail] == ["MALMEN, no regularisation"]


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


@pytest.mark.parametrize("tier", ["tiny", "small", "paper", "shapes"])
@pytest.mark.parametrize("method", READY)
def test_ready_settings_of_every_tier_survive_a_record(tier, method):
    for family in ("decoder", "gptj", "subjects"):
        config = fitted(ready_settings(tier, method), 3, tier, family)
        values = json.loads(json.dumps(asdict(config)))
        assert type(find_editor(method).paper_config)(**values) == config
        memit = getattr(config, "memit", config)
        if isinstance(memit, MEMITConfig):
            assert memit.blocks == CRITICAL.get((tier, family), (0,)) and memit.target.seed == 3
        else:
            assert config.seed == 3
    assert set(TINY) == set(PAPERS) == set(READY)
    assert all(METHODS[name].editor is find_editor(name) for name in READY)


def test_an_experiment_of_batches_says_so_in_its_plan():
    one = find_experiment("consecutive")
    assert one.batch == 16 and set(CONSECUTIVE_METHODS) <= set(METHODS) and set(ALL_METHODS) <= set(METHODS)
    cells = cells_of("consecutive", "tiny", full=True)
    assert {c.train_num_facts for c in cells} == {16} and {c.num_facts for c in cells} == {16, 64, 256}


def test_settings_of_experiments_exist():
    assert {one.setting for one in EXPERIMENTS.values()} - {""} <= BENCH_SETTINGS.keys()
