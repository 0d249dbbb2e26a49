"""The tables of hyper-parameters: complete, explained, and what the committed records were made with."""

import math

import pytest

from malmen_repro.replication.benches import TRAIN_FACTS
from malmen_repro.replication.hyper_parameters import (
    FT_PAPER,
    FT_REASONS,
    KEYS,
    MS,
    PAPER,
    REASONS,
    SHOWN_TIERS,
    difference_table,
    different,
    fine_tuning_table,
    hyper_parameter_table,
    in_words,
    shared_table,
    values,
)
from malmen_repro.replication.plans import SETTINGS, training_settings
from malmen_repro.replication.records import committed_records, read_records
from malmen_repro.replication.small_models import SmallConfig
from malmen_repro.replication.stand_ins import TinyConfig

STEPS = ("TrainingConfig", "steps")


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("method", ["MALMEN", "MEND"])
def test_the_paper_tier_has_the_papers_values(method):
    assert PAPER.keys() <= set(KEYS) and len(PAPER) == 6
    for key, value in PAPER.items():
        assert set(values("paper", key, method)) == {value}, key


@pytest.mark.parametrize("tier", SETTINGS)
def test_mend_gets_what_malmen_gets(tier):
    assert all(values(tier, key, "MEND") == values(tier, key) for key in KEYS)


def test_every_difference_has_a_reason_and_every_reason_a_difference():
    below = {key[1] for tier in ("small", "tiny") for key in different(tier)}
    assert below == REASONS.keys()
    assert {row[0].strip("`") for row in rows(difference_table())} == below and not different("paper")


def test_fine_tuning_is_the_papers_at_the_paper_tier_and_explained_elsewhere():
    ft = {tier: training_settings(tier, "FT", 64)[0] for tier in SHOWN_TIERS}
    assert all(getattr(ft["paper"], name) == value for name, value in FT_PAPER.items())
    changed = {name for tier in SHOWN_TIERS for name, value in FT_PAPER.items() if getattr(ft[tier], name) != value}
    assert changed == FT_REASONS.keys()
    found = {row[0].strip("`"): row[1:] for row in rows(fine_tuning_table())}
    assert found["batch_size"][0] == "not given" and found["epochs"][:4] == ["5", "5", "5", "20"]


def test_what_a_tier_shares_with_the_paper():
    assert rows(shared_table(("paper",))) == [
        ["A.6, MEND and MALMEN", "6 settings", "6 of 6: equal"],
        ["public code beside A.6", "3 settings", "3 of 3: equal"],
        ["A.5, fine-tuning", "3 settings", "3 of 3: equal"],
    ]
    tiny = [row[2] for row in rows(shared_table(("tiny",)))]
    assert tiny == [
        "3 of 6 (rank, meta_learning_rate, locality_coefficient differ)",
        "0 of 3 (plain_learning_rate, normal_start, pooled_moments differ)",
        "1 of 3 (learning_rate, epochs differ)",
    ]


def test_in_words():
    same = [5] * len(MS)
    assert in_words(same) == "5" and in_words([None] * len(MS)) == "–"
    assert in_words([5, *[1000] * (len(MS) - 1)]) == f"5; 1,000 from m = {MS[1]}"
    assert in_words(list(range(len(MS)))) == f"0 (m = {MS[0]}) to {len(MS) - 1} (m = {MS[-1]:,})"


def test_the_table_has_a_row_for_each_of_the_six():
    found = rows(hyper_parameter_table())
    assert [row[1].strip("`") for row in found] == [name for _, name in PAPER]
    assert found[0][2:] == ["1,920", "1,920", "512", "256"]


def test_a_rank_of_1920_is_no_low_rank_below_the_paper_and_its_rate_moves_nothing():
    rank, rate = PAPER["EditorConfig", "rank"], PAPER["TrainingConfig", "meta_learning_rate"]
    widths = {"tiny": TinyConfig().width + TinyConfig().inner, "small": 5 * SmallConfig().width}
    assert widths == {"tiny": 1408, "small": 1920}
    for tier, width in widths.items():
        assert width <= rank and rate * max(values(tier, STEPS)) < 0.004
    for tier, times in (("small", 200), ("tiny", 300)):
        assert all(math.isclose(v, times * rate) for v in values(tier, ("TrainingConfig", "meta_learning_rate")))


def test_one_pass_over_zsre_at_the_paper_tier():
    steps = dict(zip(MS, values("paper", STEPS), strict=True))
    rate = PAPER["TrainingConfig", "meta_learning_rate"]
    assert rate * steps[16384] < 3e-3 and all(steps[m] == TRAIN_FACTS["zsre"] // m + 1 for m in MS if m <= 4096)


@pytest.mark.parametrize("tier", ["small", "tiny"])
def test_the_records_of_fig_5_were_made_with_these_settings(tier):
    cells = [r["configuration"] for r in read_records(committed_records(), "scaling_decoder", tier)]
    trained = [one for one in cells if one["cell"]["method"] in ("MALMEN", "MEND")]
    assert trained
    for one in trained:
        m = one["cell"]["train_num_facts"]
        now = training_settings(tier, one["cell"]["method"], m)
        for config, name in PAPER:
            of = ("editor", "training")[config == "TrainingConfig"]
            assert one[of][name] == getattr(now[config == "TrainingConfig"], name), (name, m)
