"ES, GS, LS and what stands beside them: by hand, by brute force, and under every cut."

from dataclasses import replace

import numpy as np
import pytest
import torch

from malmen_repro.evaluation import MEASURES, Predictions, Scores, answer_predictions, evaluate, predict, score, share
from malmen_repro.facts import ConflictingFactsError, NoFactsError
from malmen_repro.weight_shifts import WeightShift, WeightShiftError
from tests.toy import toy_facts, toy_model


@pytest.fixture
def lm():
    return toy_model()


@pytest.fixture
def shift(lm):
    "A shift large enough to change what the model says."
    torch.manual_seed(3)
    return WeightShift({layer: torch.randn(shape) for layer, shape in lm.shapes.items()})


def brute_force(lm, prompt, answer):
    "Teacher forcing, one token after the other, with the plain model."
    prompt, answer = lm.tokenizer(prompt)["input_ids"], lm.tokenizer(answer)["input_ids"]
    said = []
    for i in range(len(answer)):
        logits = lm.model(torch.tensor([prompt + answer[:i]])).logits
        said.append(logits[0, -1].argmax().item())
    return said, answer


def test_predictions_are_those_of_the_plain_model_token_by_token(lm):
    pairs = [fact.pair for fact in toy_facts(9)]
    predicted, wanted = answer_predictions(lm, pairs, batch_size=4)
    assert list(zip(predicted, wanted, strict=True)) == [brute_force(lm, *pair) for pair in pairs]


def test_no_pairs_no_predictions(lm):
    assert answer_predictions(lm, []) == ([], [])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_do_not_depend_on_the_batch_size(lm, shift, batch_size):
    facts = toy_facts(11)
    one, other = evaluate(lm, facts, shift, 64), evaluate(lm, facts, shift, batch_size)
    for measure in MEASURES:
        assert np.array_equal(one.values[measure], other.values[measure], equal_nan=True)


def test_all_measures_against_their_definitions(lm, shift):
    facts = toy_facts(12)
    scores = evaluate(lm, facts, shift)
    assert set(scores.values) == set(MEASURES) and all(len(values) == 12 for values in scores.values.values())
    for i, fact in enumerate(facts):
        before = [brute_force(lm, *pair) for pair in (fact.pair, *fact.equivalent_pairs, fact.unrelated_pair)]
        with shift.applied(lm):
            after = [brute_force(lm, *pair) for pair in (fact.pair, *fact.equivalent_pairs, fact.unrelated_pair)]
        shares = [share(*pair) for pair in after]
        wanted = {
            "ES": shares[0],
            "GS": np.mean(shares[1:-1]),
            "LS": shares[-1],
            "ES exact": float(shares[0] == 1),
            "GS exact": np.mean([value == 1 for value in shares[1:-1]]),
            "LS agreement": share(after[-1][0], before[-1][0]),
            "ES before": share(*before[0]),
            "GS before": np.mean([share(*pair) for pair in before[1:-1]]),
            "LS before": share(*before[-1]),
        }
        assert {name: scores.values[name][i] for name in wanted} == pytest.approx(wanted)
        assert scores.phrasings[i] == pytest.approx(shares[1:-1])


def test_the_unedited_model_agrees_with_itself(lm):
    scores = evaluate(lm, toy_facts(5), None)
    assert scores.mean("LS agreement") == 1
    for measure in ("ES", "GS", "LS"):
        assert np.array_equal(scores.values[measure], scores.values[f"{measure} before"])


def test_facts_without_phrasings_or_unrelated_tuples_count_where_they_can(lm, shift):
    whole, bare = toy_facts(2)
    bare = replace(bare, equivalent_prompts=(), unrelated_prompt=None, unrelated_answer=None)
    scores = evaluate(lm, [whole, bare], shift)
    assert (
        np.isnan(scores.values["GS"][1])
        and np.isnan(scores.values["LS"][1])
        and np.isnan(scores.values["LS agreement"][1])
    )
    assert scores.mean("GS") == scores.values["GS"][0] and np.isfinite(scores.mean("ES"))
    alone = evaluate(lm, [bare], shift)
    assert np.isnan(alone.mean("GS")) and all(np.isnan(alone.interval("GS")))


def test_predictions_at_hand_are_not_asked_again(lm, shift):
    facts = toy_facts(4)
    before, _ = predict(lm, facts)
    one, other = evaluate(lm, facts, shift), evaluate(lm, facts, shift, before=before)
    assert all(np.array_equal(one.values[m], other.values[m]) for m in MEASURES)


def test_intervals_cover_the_mean_and_shrink_with_more_facts():
    rng = np.random.default_rng(0)
    few, many = (Scores({"ES": rng.random(count)}) for count in (20, 2000))
    for scores in (few, many):
        low, high = scores.interval("ES")
        assert low < scores.mean("ES") < high
        assert (low, high) == scores.interval("ES"), "the same draws every time"
    assert np.subtract(*few.interval("ES")[::-1]) > 3 * np.subtract(*many.interval("ES")[::-1])
    assert Scores({"ES": np.ones(5)}).interval("ES") == (1.0, 1.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = Scores({"ES": (rng.random(60) < 0.7).astype(float)}).interval("ES", resamples=400)
        covered += low <= 0.7 <= high
    assert 85 <= covered <= 100


def test_score_by_hand():
    wanted = Predictions([[1, 2]], [[[1, 2], [1, 2]]], [[5]])
    before = Predictions([[3, 3]], [[[3, 3], [3, 2]]], [[6]])
    after = Predictions([[1, 9]], [[[1, 2], [9, 9]]], [[6]])
    summary = score(before, after, wanted).summary()
    assert summary == {
        "ES": 0.5,
        "GS": 0.5,
        "LS": 0.0,
        "ES exact": 0.0,
        "GS exact": 0.5,
        "LS agreement": 1.0,
        "ES before": 0.0,
        "GS before": 0.25,
        "LS before": 0.0,
    }


def test_bad_input_is_refused(lm, shift):
    facts = toy_facts(2)
    with pytest.raises(NoFactsError):
        evaluate(lm, [], shift)
    with pytest.raises(ConflictingFactsError):
        evaluate(lm, [*facts, replace(facts[0], answer="w3 w3")], shift)
    with pytest.raises(WeightShiftError):
        evaluate(lm, facts, WeightShift({"transformer.h.1.mlp.c_proj": torch.zeros(3, 3)}))
