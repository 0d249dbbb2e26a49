"""The rule of closeness: at, above and below the least distance, in both directions, with one seed and with several."""

import math
import statistics

import pytest

from malmen_repro.replication.closeness import (
    LEAST,
    ROUNDING,
    TOO_CLOSE,
    UNDECIDABLE,
    VERDICTS,
    WORST_FIRST,
    Finding,
    best,
    curve_means,
    curves,
    decided,
    judged,
    less,
    mean_score,
    over,
    over_places,
    over_sets,
    paired,
    seed_mean,
    standard_error,
    success,
    within,
    worst,
)
from tests.handmade import broken, record

# --- verdicts


def test_every_verdict_has_its_place_in_both_orders():
    assert sorted(VERDICTS) == sorted(WORST_FIRST) and len(set(VERDICTS)) == 5
    assert (TOO_CLOSE, UNDECIDABLE) == ("too close to call", "not decidable here")
    assert not any("," in kind for kind in VERDICTS)  # what follows a comma is cut off where verdicts are counted


@pytest.mark.parametrize(
    ("verdicts", "least", "most"),
    [
        (("reproduced", TOO_CLOSE), TOO_CLOSE, "reproduced"),
        (("below", TOO_CLOSE, "reproduced"), "below", "reproduced"),
        (("above", UNDECIDABLE, TOO_CLOSE), "above", TOO_CLOSE),
        ((TOO_CLOSE, UNDECIDABLE), UNDECIDABLE, TOO_CLOSE),
        (("above", "below"), "below", "above"),
        (("reproduced",), "reproduced", "reproduced"),
    ],
)
def test_the_worst_and_the_best(verdicts, least, most):
    assert worst(*verdicts) == worst(*verdicts[::-1]) == least and best(*verdicts) == best(*verdicts[::-1]) == most


def test_judged():
    assert judged([]) is None
    assert judged([("a", "reproduced")]) == Finding("a", "reproduced")
    assert judged([("a", "reproduced"), ("b", TOO_CLOSE), ("c", "below")]) == Finding("a; b; c", "below")


# --- seeds


def test_the_standard_error():
    assert standard_error({0: 1.0, 1: 2.0, 2: 4.0}) == pytest.approx(statistics.stdev([1, 2, 4]) / 3**0.5)
    assert standard_error({0: 1.0}) == standard_error({}) == standard_error({0: 1.0, 1: math.inf}) == 0


def test_common_seeds_are_paired():
    ours, theirs = {0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.6, 3: 0.0}
    assert less(ours, theirs) == pytest.approx({0: 0.1, 1: 0.1}) and over(ours, {0: 0.25, 1: 0.0})[1] == math.inf
    assert over({0: 3.0, 1: 8.0}, {0: 2.0, 1: 4.0}) == {0: 1.5, 1: 2.0}
    assert less({4: 0.5}, {4: 0.2}) == pytest.approx({4: 0.3})  # one seed, the same


def test_where_seeds_differ_means_are_compared():
    several, one = {0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4}
    assert less(several, one) == pytest.approx({0: 0.1, 1: 0.3, 2: 0.5})
    assert less(one, several) == pytest.approx({0: -0.1, 1: -0.3, 2: -0.5})
    assert seed_mean(less(several, one)) == pytest.approx(seed_mean(several) - seed_mean(one))
    assert less({0: 0.5}, {1: 0.2}) == pytest.approx({0: 0.3})
    assert paired({0: 1.0, 1: 3.0}, {5: 4.0, 6: 6.0}, lambda a, b: a * b) == {0: 5.0, 1: 15.0}


def test_over_places():
    assert over_places([{0: 1.0, 1: 2.0}, {0: 3.0, 1: 6.0}]) == {0: 2.0, 1: 4.0}
    assert over_places([{0: 1.0, 1: 2.0}, {0: 3.0}]) == {0: 2.25}
    assert over_places([{7: 1.0}]) == {7: 1.0}


# --- the rule


@pytest.mark.parametrize("bound", [-0.02, 0.0, 0.2])
@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (0.1, "reproduced"),
        (LEAST + 1e-6, "reproduced"),
        (LEAST, "reproduced"),  # at it a number decides
        (LEAST - 1e-6, TOO_CLOSE),
        (0.0, TOO_CLOSE),
        (-LEAST + 1e-6, TOO_CLOSE),
        (-LEAST, "below"),
        (-LEAST - 1e-6, "below"),
        (-0.1, "below"),
    ],
)
def test_one_seed(bound, distance, expected):
    assert decided({0: bound + distance}, bound) == expected
    assert decided({0: bound - distance}, bound, at_most=True) == expected
    other = "above" if expected == "below" else expected
    assert decided({0: bound - distance}, bound, at_most=True, fails="above") == other


@pytest.mark.parametrize(
    ("spread", "distance", "expected"),
    [
        (0.03, 0.0173 + 1e-4, "reproduced"),  # an error of .03 / sqrt 3
        (0.03, 0.0173 - 1e-4, TOO_CLOSE),
        (0.03, -0.0173 + 1e-4, TOO_CLOSE),
        (0.03, -0.0173 - 1e-4, "below"),
        (0.001, LEAST - 1e-4, TOO_CLOSE),  # seeds that agree don't make the least distance smaller
        (0.001, LEAST + 1e-4, "reproduced"),
        (0.001, -LEAST - 1e-4, "below"),
    ],
)
def test_three_seeds(spread, distance, expected):
    values = {seed: 0.5 + distance + spread * side for seed, side in enumerate((-1, 0, 1))}
    assert decided(values, 0.5) == expected
    assert decided({seed: 1 - value for seed, value in values.items()}, 0.5, at_most=True) == expected


def test_two_seeds_have_an_error():
    assert decided({0: 0.6, 1: 0.5}, 0.51) == TOO_CLOSE and decided({0: 0.6, 1: 0.5}, 0.49) == "reproduced"


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.2498, TOO_CLOSE), (1.2502, TOO_CLOSE), (1.2436, "reproduced"), (1.2438, TOO_CLOSE), (1.2564, "below")],
)
def test_a_ratio_has_a_scale_of_its_own(ratio, expected):
    assert decided({0: ratio}, 1.25, at_most=True, relative=True) == expected


def test_a_large_ratio():
    assert decided({0: 100.4}, 100, relative=True) == decided({0: 99.6}, 100, relative=True) == TOO_CLOSE
    assert decided({0: 100.5}, 100, relative=True) == "reproduced" and decided({0: 99.5}, 100, relative=True) == "below"
    assert decided({0: math.inf}, 10_000, at_most=True, relative=True, fails="above") == "above"
    assert decided({0: 1.0}, math.inf, at_most=True) == "reproduced"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, "reproduced"), (0.606, "above"), (0.604, TOO_CLOSE), (0.595, "reproduced"), (0.396, TOO_CLOSE),
     (0.394, "below")],
)  # fmt: skip
def test_within(value, expected):
    assert within({0: value}, 0.5, 0.1) == expected


def test_rounding_decides_nothing():
    assert 0.2 + LEAST - 0.2 < LEAST + ROUNDING and decided({0: 0.1 + 0.2 + LEAST}, 0.3) == "reproduced"


# --- curves


def test_scores_of_a_record():
    one = record(ES=0.5, GS=0.25, LS=0.0)
    assert success(one) == 0.375 and mean_score("LS")(one) == 0 and mean_score("ES", "LS")(one) == 0.25
    assert success(record(ES=0.5, GS=None)) == 0.5 and math.isnan(mean_score("GS")(record(GS=None)))
    assert math.isnan(success(broken())) and math.isnan(mean_score("ES before")(record()))


def test_curves_keep_the_seeds():
    made = [record("MALMEN", m, seed, (seed + 1) / m) for m in (64, 16) for seed in (1, 0)]
    made += [record("MEND", 16, 0, 0.75, data_set="b")]
    assert curves(made) == {
        "toys": {"MALMEN": {16: {0: 1 / 16, 1: 2 / 16}, 64: {0: 1 / 64, 1: 2 / 64}}},
        "b": {"MEND": {16: {0: 0.75}}},
    }
    assert curves(made, mean_score("LS before"))["b"]["MEND"][16] == {0: 0.9} and curves([]) == {}
    assert curve_means(curves(made)["toys"]) == {"MALMEN": {16: pytest.approx(1.5 / 16), 64: pytest.approx(1.5 / 64)}}


def test_curves_over_sets():
    made = [record("MEMIT", 16, mean=0.5), record("MEMIT", 16, mean=0.25, data_set="b"), record("MEMIT", 64, mean=1.0)]
    assert over_sets(made, success) == {"MEMIT": {16: {0: 0.375}, 64: {0: 1.0}}} and over_sets([], success) == {}
