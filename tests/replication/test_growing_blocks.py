"""Notebook 52: what its records say of growing blocks and of first step sizes, and the functions that make them."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest

from malmen_repro.editors import EditorConfig
from malmen_repro.replication import growing_blocks
from malmen_repro.replication.figures import mean_at
from malmen_repro.replication.growing_blocks import (
    FOLDER,
    GROWN,
    OTHER_STARTS,
    grown_decoder,
    grown_encoder_decoder,
    history_of,
    learning_rate_starts,
    loss_ratio,
    other_starts,
)
from malmen_repro.replication.records import committed_records, read_records
from malmen_repro.replication.stand_ins import Bench
from malmen_repro.training import CANDIDATES, TrainingConfig
from tests.toy import toy_facts, toy_model

FOLDER = committed_records() / FOLDER
SCORES = ("ES", "GS", "LS")


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def decoder():
    return read_records(committed_records(), "scaling_decoder", "small")


@pytest.fixture(scope="module")
def gptj():
    return read_records(committed_records(), "scaling_gptj", "small")


# --- an encoder-decoder breaks where its blocks grow


def test_losses_where_the_blocks_grow(gptj):
    ours, theirs = read("zsre")["history"], history_of(gptj)
    assert 3.5 < loss_ratio(theirs, "generalization", 160) < 4.5 and 5.5 < loss_ratio(theirs, "locality", 160) < 7
    assert loss_ratio(ours, "generalization", 160) > 10 and loss_ratio(ours, "locality", 160) > 50
    assert 2.5 < loss_ratio(theirs, "locality", 190) < 3.5 and 15 < loss_ratio(ours, "locality", 190) < 25
    assert loss_ratio(theirs, "generalization", 190) > 3.5 and loss_ratio(ours, "generalization", 190) > 15


def test_scores_with_growing_blocks_and_with_blocks_of_64():
    records, rows = read_records(committed_records(), "scaling_encoder_decoder", "small"), read("zsre")["rows"]
    assert [row["m"] for row in rows] == [16, 256, 1037]
    for row in rows:
        now = mean_at(records, "MALMEN", row["m"], "zsre")
        assert now["ES"] > row["ES"] + 0.1 and now["GS"] > row["GS"] + 0.25
    assert (round(100 * now["ES"]), round(100 * row["ES"])) == (96, 49)


def test_the_training_differs_in_its_blocks_alone():
    records = read_records(committed_records(), "scaling_encoder_decoder", "small")
    now = next(r["configuration"]["training"] for r in records if r["configuration"]["cell"]["method"] == "MALMEN")
    assert read("zsre")["training"] == now | {"num_facts": 512} and now["num_facts"] == 64


def test_the_record_is_what_git_has_of_it():
    look = ["git", "cat-file", "-e", GROWN]
    if not shutil.which("git") or subprocess.run(look, cwd=FOLDER, capture_output=True).returncode:
        pytest.skip("the history of this checkout does not go back so far")
    assert json.dumps(grown_encoder_decoder()) == json.dumps(read("zsre"))  # the order of its parts, too


# --- what growing blocks cost on a decoder


def test_locality_loss_of_mend(decoder, gptj):
    mend = history_of(gptj, "MEND")
    assert loss_ratio(mend, "locality", 160) > 45 and loss_ratio(mend, "locality", 190) > 10
    assert loss_ratio(history_of(decoder, "MEND"), "locality", 160) > 30
    assert all(loss_ratio(history_of(decoder), part, 160) < 4 for part in ("generalization", "locality"))


def test_scores_on_a_decoder():
    steady, grown = read_records(committed_records(), "editors_zsre", "small"), read("decoder")["rows"]
    gain, other, kept = {}, {}, {}
    for row in grown:
        before, place = mean_at(steady, row["method"], row["m"]), (row["method"], row["m"])
        gain[place], other[place], kept[place] = (row["scores"][name]["mean"] - before[name] for name in SCORES)
    assert -0.07 < gain["MEND", 64] < -0.05 and 0.11 < gain["MEND", 256] < 0.13
    assert -0.09 < other["MEND", 64] < -0.08 and 0.08 < other["MEND", 256] < 0.09
    assert abs(gain["MALMEN", 64]) < 0.01 and 0.02 < min(gain["MALMEN", 256], other["MALMEN", 256]) < 0.03
    assert kept["MALMEN", 256] > 0.05 and kept["MEND", 256] > 0.22
    assert all(row["fingerprints"] == steady[0]["fingerprints"] for row in grown)


# --- where MEND's learning rate starts


def mend_records(decoder):
    "By seed, data set and m."
    cells = [(r["configuration"]["cell"], r) for r in decoder]
    return {(c["seed"], c["data_set"], c["num_facts"]): r for c, r in cells if c["method"] == "MEND"}


def test_starts_and_ends(decoder):
    starts, mend = read("starts")["rows"], mend_records(decoder)
    for seed in range(3):
        ends = [layer["learning_rate"] for layer in mend[seed, "zsre", 16]["learned"].values()]
        es = [mend[seed, name, 16]["scores"]["ES"]["mean"] for name in ("zsre", "entity_questions")]
        assert all(2 < end / starts[str(seed)] < 4 for end in ends)
        low, high = min(es), max(es)
        assert (1 / 8 < low < 1 / 6 < 1 / 4 < high < 0.3) if seed < 2 else (0.55 < low < 0.6 < 0.7 < high)
    assert starts["0"] == starts["1"] == 1e-4 < 3e-4 < starts["2"] < 3.2e-4


def test_each_seed_does_from_the_others_start_what_the_other_did(decoder):
    starts, mend, gains = read("starts")["rows"], mend_records(decoder), {}
    swapped = read("other_starts")["rows"]
    assert [run["seed"] for run in swapped] == [0, 2]
    for run in swapped:
        assert run["own start"] == starts[str(run["seed"])] and run["start"] == starts[str(2 - run["seed"])]
        for place, after in run["scores"].items():
            seed, (data_set, m) = run["seed"], place.split()
            old, other = (mend[one, data_set, int(m)]["scores"]["ES"]["mean"] for one in (seed, 2 - seed))
            gains[seed, data_set, int(m)] = after["ES"] - old, after["ES"] - other
    assert len(gains) == 12
    for (seed, _, m), (gain, left) in gains.items():
        assert abs(left) < 0.08  # of the other's lead
        assert (1 if seed == 0 else -1) * gain > (0.25 if m < 256 else 0.03)
    better = swapped[0]["scores"]
    for data_set, times in (("zsre", 4), ("entity_questions", 2.5)):
        old = better[f"{data_set} 16"]["ES"] - gains[0, data_set, 16][0]
        assert abs(better[f"{data_set} 16"]["ES"] / old - times) < 0.35
    assert 0.6 < better["zsre 16"]["ES"] < 2 / 3 and 0.15 < better["zsre 256"]["ES"] < 0.17
    assert 0.89 < mean_at(decoder, "MALMEN", 256, "zsre")["ES"] < 0.92


# --- the functions, on a toy


def toy_bench(tier, family, seed):
    assert (tier, family, seed) in {("small", "decoder", 0), ("small", "questions", 0)}
    sets = {name: toy_facts(6, seed=i, start=20 + 6 * i) for i, name in enumerate(("zsre", "entity_questions"))}
    return Bench(toy_model(), toy_facts(12), sets, {"made": "here"})


def toy_settings(tier, method, num_facts):
    training = TrainingConfig(num_facts=num_facts, steps=4, tuned_start=True, ramp_facts=2, ramp_steps=2)
    return EditorConfig(rank=4, blocks=1), replace(training, meta_learning_rate=1e-3)


TOY = {"growth": 4, "settings": toy_settings}


def form(value):
    "The keys of nested dictionaries, in order."
    return {name: form(inner) for name, inner in value.items()} if isinstance(value, dict) else None


def test_growing_blocks_on_a_toy():
    record = grown_decoder(toy_bench, ms=(2, 3), **TOY)
    committed = read("decoder")
    assert list(record) == list(committed) and record["what"] == committed["what"]
    assert [(row["method"], row["m"]) for row in record["rows"]] == [(n, m) for n in ("MALMEN", "MEND") for m in (2, 3)]
    assert all(list(row) == list(committed["rows"][0]) for row in record["rows"])
    assert [step["step"] for step in record["rows"][0]["history"]][0] == 0 and json.dumps(record)


def test_starts_on_a_toy_are_of_the_list_and_depend_on_the_seed_alone():
    one, two = (learning_rate_starts(toy_bench, seeds=(0, 1), **TOY) for _ in range(2))
    committed = read("starts")
    assert one["rows"] == two["rows"] and set(one["rows"].values()) <= set(CANDIDATES)
    assert list(one) == list(committed) and one["what"] == committed["what"] and one["bench"] == {"made": "here"}


def test_other_starts_on_a_toy():
    record = other_starts(toy_bench, starts={1: 1e-3}, ms=(2,), **TOY)
    committed, (row,) = read("other_starts"), record["rows"]
    assert list(record) == list(committed) and record["what"] == committed["what"]
    assert list(row) == list(committed["rows"][0]) and form(row["editor"]) == form(committed["rows"][0]["editor"])
    assert row["own start"] == learning_rate_starts(toy_bench, seeds=(1,), **TOY)["rows"][1]
    assert row["seed"] == row["editor"]["seed"] == row["training"]["seed"] == 1 and row["start"] == 1e-3
    assert list(row["scores"]) == ["zsre 2", "entity_questions 2"] and row["training"]["tuned_start"]
    assert all(abs(layer["learning_rate"] / 1e-3 - 1) < 0.1 for layer in row["learned"].values())


def test_a_training_from_another_start_is_that_of_a_seed_that_starts_there():
    "Started where it starts anyway, an editor comes out as it does from its own training."
    own = learning_rate_starts(toy_bench, seeds=(0,), **TOY)["rows"][0]
    (row,) = other_starts(toy_bench, starts={0: own}, ms=(2,), **TOY)["rows"]
    bench = toy_bench("small", "decoder", 0)
    editing, training = growing_blocks.seeded(toy_settings, 0, 4)
    editor = growing_blocks.METHODS["MEND"].editor(bench.lm, editing)
    editor.train(bench.train_facts, config=training, progress=False)
    assert row["learned"] == growing_blocks.learned(editor)


def test_the_starts_are_those_of_the_record():
    assert {row["seed"]: row["start"] for row in read("other_starts")["rows"]} == OTHER_STARTS


def test_a_commit_that_is_not_at_hand_is_named():
    with pytest.raises(growing_blocks.RecordError, match="commit 0123456 is not at hand.*whole history"):
        growing_blocks.old_record(16, "0123456")
