"Notebook 76: what the committed trainings with the paper's settings were made with, and that they edit."

import math

import pytest

from malmen_repro.editors import EditorConfig
from malmen_repro.replication.benches import TRAIN_FACTS
from malmen_repro.replication.figures import training_curves
from malmen_repro.replication.paper_models import PAPER_MODELS
from malmen_repro.replication.plans import (
    FACTORS,
    LEAST_STEPS,
    TRAININGS,
    cells_of,
    training_settings,
    whole_epochs,
)
from malmen_repro.replication.records import committed_records, read_records, revived
from malmen_repro.training import TrainingConfig

EXACT = "MALMEN, paper at its rank"
FREE = {"steps", "num_facts", "lm_batch_size", "held_out", "score_every", "seed"}  # sizes, speed and looks


@pytest.fixture(scope="module")
def records():
    return read_records(committed_records(), "training_settings", "tiny")


def of(records, method):
    return [record for record in records if record["configuration"]["cell"]["method"] == method]


def test_every_training_of_the_plan_was_run(records):
    assert {r["configuration"]["cell"]["method"] for r in records} == set(TRAININGS)
    assert {one.method for one in cells_of("training_settings", "tiny", full=True)} == set(TRAININGS)


def test_one_training_has_exactly_the_paper_tiers_settings(records):
    editor, training = training_settings("paper", "MALMEN", 1024)
    for record in of(records, EXACT):
        made = revived(EditorConfig, record["configuration"]["editor"])
        assert made == EditorConfig.paper(seed=made.seed) and editor == EditorConfig.paper()
        trained = revived(TrainingConfig, record["configuration"]["training"])
        assert all(getattr(trained, n) == getattr(training, n) for n in vars(training) if n not in FREE)
        assert trained.num_facts == 64 and trained.steps == 240


def test_the_papers_settings_teach_an_editor_to_edit(records):
    for record in of(records, EXACT) + of(records, "MALMEN, paper"):
        assert record["scores"]["ES"]["mean"] >= 0.8 > record["scores"]["ES before"]["mean"] + 0.5


def test_a_logarithm_at_the_papers_rate_teaches_nothing(records):
    for record in of(records, "MALMEN, paper but plain eta") + of(records, "MALMEN, only one rate"):
        assert record["scores"]["ES"]["mean"] < record["scores"]["ES before"]["mean"] + 0.05
        assert all(layer["learning_rate"] == pytest.approx(1e-6, rel=0.02) for layer in record["learned"].values())


@pytest.mark.parametrize("m", sorted({m for model in PAPER_MODELS.values() for m in model.num_facts}))
def test_each_m_of_the_paper_has_steps_enough_to_move_eta_and_to_edit(m, records):
    _, training = training_settings("paper", "MALMEN", m)
    assert training.steps == whole_epochs(m) >= LEAST_STEPS
    epoch = math.ceil(TRAIN_FACTS["zsre"] / m)
    assert training.steps % epoch == 0 and training.steps - epoch < LEAST_STEPS
    scores, rates = (training_curves(records, name)[EXACT] for name in ("ES", "eta"))
    reached = max(done for done in scores if done <= training.steps)
    assert scores[reached] >= 0.8 and rates[reached] > 100 * 1e-6


def test_every_factor_stands_alone_and_is_left_out_once():
    for name, (editing, training) in FACTORS.items():
        alone, without = TRAININGS[f"MALMEN, only {name}"], TRAININGS[f"MALMEN, paper but {name}"]
        for field, value in (editing | training).items():
            on = alone.changes if field in editing else alone.training
            off = without.changes if field in editing else without.training
            assert on[field] == value and off.get(field) != value
