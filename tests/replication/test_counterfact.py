"CounterFact: the forms of a case, which object is preferred, what the model writes, and the measures by hand."

import ast
import json
import math
import os
import random
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from malmen_repro.evaluation import Scores, evaluate
from malmen_repro.facts import (
    ConflictingFactsError,
    Fact,
    FactError,
    FactFileError,
    FactRowError,
    NoFactsError,
    check_facts,
    load_facts,
)
from malmen_repro.language_models import ContextLengthError, EmptyAnswerError
from malmen_repro.replication import counterfact
from malmen_repro.replication.counterfact import (
    COUNTERFACT_MEASURES,
    CombinedScores,
    CounterfactError,
    Counterfactual,
    Preferences,
    counterfact_scores,
    generated,
    generation_entropy,
    generation_scores,
    generations,
    harmonic_mean,
    load_counterfactuals,
    log_probabilities,
    n_gram_entropy,
    prefer,
    reference_score,
    reference_texts,
    score_counterfacts,
    switched,
    tiny_counterfactuals,
    without_conflicts,
    words_and_marks,
    zsre_measures,
    zsre_scores,
)
from malmen_repro.replication.stand_ins import PEOPLE, invent_world, tell_claims
from malmen_repro.weight_shifts import WeightShift
from tests.toy import toy_claims, toy_classifier, toy_encoder_decoder, toy_facts, toy_model

FULL = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{}, the",
        "relation_id": "P413",
        "target_new": {"str": "goaltender", "id": "Q1"},
        "target_true": {"str": "linebacker", "id": "Q2"},
        "subject": "Percy Snow",
    },
    "paraphrase_prompts": ["Percy Snow plays as", "What is Percy Snow? A"],
    "neighborhood_prompts": ["Clay Matthews Jr., the", "Omar Gaither, the", "Mike Curtis plays as"],
    "attribute_prompts": ["Ken Dryden, the"],
    "generation_prompts": ["Percy Snow is good at", "Percy Snow is good at"],
}
COMPACT = {
    "case_id": 7,
    "prompt": "Percy Snow, the",
    "target_new": "goaltender",
    "subject": "Percy Snow",
    "ground_truth": "linebacker",
    "rephrase_prompt": "Percy Snow plays as",
    "locality_prompt": "Omar Gaither, the",
    "locality_ground_truth": "linebacker",
}


@pytest.fixture
def lm():
    return toy_model(torch.float64)


@pytest.fixture
def shift(lm):
    "A shift large enough to change what the model prefers."
    torch.manual_seed(3)
    return WeightShift({layer: torch.randn(shape) for layer, shape in lm.shapes.items()})


def toy_cases(count=6, *, seed=0):
    "Cases of ragged lengths, with different numbers of prompts of each kind."
    rng, cases = random.Random(seed), []

    def words(low, high):
        return " ".join(f"w{rng.randrange(60)}" for _ in range(rng.randint(low, high)))

    for i, fact in enumerate(toy_facts(count, seed=seed)):
        fact = replace(fact, alternative=words(1, 3), equivalent_prompts=fact.equivalent_prompts[: i % 3])
        near = tuple(words(2, 6) for _ in range((i + 1) % 4))
        cases.append(Counterfactual(fact, near, (words(1, 3), words(1, 3)), (words(8, 9), words(5, 9))))
    return cases


def written(path, rows):
    "A file of JSON Lines."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def without(row, name, inside=None):
    "A copy of a row that lacks a field."
    row = json.loads(json.dumps(row))
    del (row[inside] if inside else row)[name]
    return row


def having(row, name, value, inside=None):
    "A copy of a row with another value."
    row = json.loads(json.dumps(row))
    (row[inside] if inside else row)[name] = value
    return row


# --- a case


def test_a_case_knows_its_prompts_and_pairs():
    fact = Fact("a", "new", ("b", "c"), alternative="old")
    case = Counterfactual(fact, (" d ",), ("e",))
    assert case.prompts == ("a", "b", "c", "d") and case.generation_prompts == ("e",) and case.references == ()
    assert case.pairs == [(p, o) for o in ("new", "old") for p in "abcd"]
    with pytest.raises(FrozenInstanceError):
        case.references = ("f",)


@pytest.mark.parametrize(
    ("fact", "rest", "message"),
    [
        (Fact("a", "b"), {}, "field 'alternative': is missing; a counterfactual needs the true object"),
        (Fact("a", "b", alternative="b"), {}, "field 'alternative': is 'b', and so is the new object"),
        (Fact("a", "b", alternative="c"), {"neighborhood_prompts": ("d", " ")}, "prompts': item 1 is empty"),
        (Fact("a", "b", alternative="c"), {"references": ("d", "")}, "field 'references': item 1 is empty"),
        (Fact("a", "b", alternative="c"), {"generation_prompts": ("",)}, "'generation_prompts': item 0 is empty"),
    ],
)
def test_a_case_that_is_none(fact, rest, message):
    with pytest.raises(FactRowError, match=message):
        Counterfactual(fact, **rest)


# --- files


def test_the_full_form(tmp_path):
    path = written(tmp_path / "full.jsonl", [FULL])
    (case,) = load_counterfactuals(path)
    assert case.fact == load_facts(path)[0] and case.fact.source == "full.jsonl, line 1"
    assert case.fact.prompt == "Percy Snow, the" and case.fact.pair in case.pairs
    assert (case.fact.answer, case.fact.alternative) == ("goaltender", "linebacker")
    assert (case.fact.subject, case.fact.relation) == ("Percy Snow", "P413")
    assert case.fact.equivalent_prompts == tuple(FULL["paraphrase_prompts"])
    assert case.neighborhood_prompts == tuple(FULL["neighborhood_prompts"])
    assert case.generation_prompts == ("Percy Snow is good at",) * 2 and case.references == ()


def test_targets_as_plain_text_and_no_generation_prompts(tmp_path):
    row = having(without(FULL, "generation_prompts"), "target_new", "goaltender", "requested_rewrite")
    row["requested_rewrite"]["target_true"] = "linebacker"
    (case,) = load_counterfactuals(written(tmp_path / "f.jsonl", [row]))
    assert (case.fact.answer, case.fact.alternative, case.generation_prompts) == ("goaltender", "linebacker", ())


def test_the_compact_form(tmp_path):
    path = written(tmp_path / "compact.jsonl", [COMPACT])
    (case,) = load_counterfactuals(path)
    assert case.fact == load_facts(path)[0]
    assert case.prompts == ("Percy Snow, the", "Percy Snow plays as", "Omar Gaither, the")
    assert case.generation_prompts == case.references == ()


def test_both_forms_in_a_json_list_and_a_limit(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([FULL, COMPACT, {"no": "case"}]))
    assert len(load_counterfactuals(path, 2)) == 2  # what lies below is not looked at
    assert load_counterfactuals(str(path), limit=1)[0].fact.source == "list.json, item 0"
    with pytest.raises(FactRowError, match=r"list.json, item 2: is no row of CounterFact, neither full .*its keys: no"):
        load_counterfactuals(path)


REWRITE = "requested_rewrite"


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        (without(FULL, "neighborhood_prompts"), "neighborhood_prompts", "is missing"),
        (having(FULL, "neighborhood_prompts", []), "neighborhood_prompts", "is an empty list"),
        (having(FULL, "neighborhood_prompts", ["a", 3]), "neighborhood_prompts", "item 1 must be text, is int"),
        (without(FULL, "paraphrase_prompts"), "paraphrase_prompts", "is missing"),
        (having(FULL, "generation_prompts", 3), "generation_prompts", "must be text or a list of texts, is int"),
        (having(FULL, "generation_prompts", [""]), "generation_prompts", "item 0 is empty"),
        (having(FULL, "prompt", "no place", REWRITE), "prompt", "must hold {} once"),
        (without(FULL, "subject", REWRITE), "subject", "is missing"),
        (without(FULL, "target_true", REWRITE), "target_true", "is missing"),
        (having(FULL, "target_new", {"id": "Q1"}, REWRITE), "str", "is missing"),
        (having(FULL, "target_new", " linebacker", REWRITE), "target_new", "is 'linebacker', and so is the true"),
        (having(FULL, REWRITE, "text"), REWRITE, "must be an object, is str"),
        (having(COMPACT, "target_new", "linebacker"), "target_new", "is 'linebacker', and so is the true object"),
        (without(COMPACT, "locality_ground_truth"), "locality_ground_truth", "is missing"),
        (having(COMPACT, "locality_ground_truth", "x"), "locality_ground_truth", "is 'x', but the true object is"),
        (having(COMPACT, "rephrase_prompt", None), "rephrase_prompt", "is missing"),
        (without(COMPACT, "ground_truth"), "ground_truth", "is missing"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, field, problem):
    path = written(tmp_path / "f.jsonl", [COMPACT, row])
    with pytest.raises(FactRowError) as caught:
        load_counterfactuals(path)
    error = caught.value
    assert (error.file, error.row, error.field) == (str(path), "line 2", field) and error.problem.startswith(problem)


@pytest.mark.parametrize("row", [{"src": "a", "answers": ["b"]}, {"prompt": "a", "answer": "b"}, {}, [1], "text"])
def test_rows_of_another_kind(tmp_path, row):
    with pytest.raises(FactRowError, match="(line 1|item 0): (is no row of CounterFact|must be a JSON|is of no known)"):
        load_counterfactuals(written(tmp_path / "f.jsonl", [row]))


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(NoFactsError, match="holds no cases"):
        load_counterfactuals(written(tmp_path / "empty.jsonl", []))
    with pytest.raises(FactFileError, match="there is no such file"):
        load_counterfactuals(tmp_path / "none.jsonl")
    with pytest.raises(FactError, match="limit must be at least 1"):
        load_counterfactuals(tmp_path / "none.jsonl", 0)


def test_the_first_of_conflicting_cases_stays():
    def case(prompt, answer, subject="s"):
        return Counterfactual(Fact(prompt, answer, subject=subject, alternative="true"))

    cases = [case("a", "x"), case("b", "y"), case("a", "z"), case("a", "x"), case("b", "x", "t"), case("c", "z")]
    kept = without_conflicts(cases)
    assert kept == [cases[i] for i in (0, 1, 3, 5)]
    check_facts([case.fact for case in kept])
    assert without_conflicts([]) == [] and without_conflicts(kept) == kept


# --- references


def test_references_are_whole_words_in_the_same_case():
    case = Counterfactual(Fact("p", "New York", alternative="x"))
    corpus = ["I like New York.", "new york", "New Yorkers", "ANew York", "(New York)", "New York City", " New\tYork"]
    (found,) = reference_texts([case], corpus)
    assert found.references == ("I like New York.", "(New York)", "New York City")
    (found,) = reference_texts([replace(case, references=("old",))], iter(corpus), most=1)
    assert found.references == ("I like New York.",)  # what was there is replaced
    (found,) = reference_texts([case], ["nothing here", "New York", "New York", "New York "])
    assert found.references == ("New York",)  # none twice


def test_references_against_a_search_one_by_one():
    rng = random.Random(0)
    parts = ["New", "York", "C", "C++", "St.", "John's", "'s-Gravenhage", "É", "Élan", "a_b", "a", "10", "U.S."]
    objects = sorted({" ".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(40)} | {"++", "'s"})
    lines = [(rng.choices([*parts, "s", " "], k=8), rng.choices(parts, k=9)) for _ in range(300)]
    corpus = ["".join(one) + " " + " ".join(other) for one, other in lines]
    cases = [Counterfactual(Fact(f"p{i}", name, alternative="none")) for i, name in enumerate(objects)]
    counts = []
    for case in reference_texts(cases, corpus, most=7):
        name = case.fact.answer
        left, right = (r"(?<!\w)" if name[0].isalnum() else ""), (r"(?!\w)" if name[-1].isalnum() else "")
        if not re.search(r"\w", name):  # an object without a letter or digit is no word of any text
            assert case.references == ()
            continue
        pattern = f"{left}{re.escape(name)}{right}"
        stripped = [line.strip() for line in corpus]
        assert case.references == tuple(dict.fromkeys(line for line in stripped if re.search(pattern, line)))[:7], name
        counts.append(len(case.references))
    assert sum(counts) > 50


@pytest.mark.parametrize(
    ("sentences", "most", "message"),
    [([], 5, "the corpus is empty"), (["a"], 0, "most=0.*must be at least 1"), ("a text", 5, "type str.*a list")],
)
def test_no_corpus(sentences, most, message):
    with pytest.raises(CounterfactError, match=message):
        reference_texts([Counterfactual(Fact("p", "o", alternative="x"))], sentences, most)


# --- the tiny world


@pytest.fixture(scope="module")
def world():
    return SimpleNamespace(known_facts=invent_world(0, 320, 4)[0])


def test_tiny_cases_are_what_they_say(world):
    cases = tiny_counterfactuals(world, seed=1, count=100)
    facts = {fact.prompt: fact for fact in world.known_facts}
    assert len(cases) == 100 == len({case.fact.prompt for case in cases})
    for case in cases:
        fact, known = case.fact, facts[case.fact.prompt]
        assert fact.alternative == known.answer != fact.answer and fact.equivalent_prompts == known.equivalent_prompts
        assert fact.unrelated_pair == (case.neighborhood_prompts[0], known.answer)
        assert 1 <= len(case.neighborhood_prompts) <= 10
        first = PEOPLE[fact.relation][1][0]
        for prompt in case.neighborhood_prompts:
            near = facts[prompt]
            assert near.relation == fact.relation and near.answer == fact.alternative and near.subject != fact.subject
            assert prompt == first.replace("[X]", near.subject)  # the same wording
        assert case.generation_prompts == (fact.subject, fact.prompt, *fact.equivalent_prompts)
        assert case.references and all(text.endswith(f" {fact.answer}") for text in case.references)
        true = {f"{p} {f.answer}" for f in world.known_facts for p in (f.prompt, *f.equivalent_prompts)}
        assert set(case.references) <= true
        assert not any(text.removesuffix(f" {fact.answer}") == fact.prompt for text in case.references)
    edited = {case.fact.prompt for case in cases}
    assert not edited & {prompt for case in cases for prompt in case.neighborhood_prompts}
    check_facts([case.fact for case in cases])


def test_tiny_cases_depend_on_the_seed_and_not_on_the_count(world):
    cases = tiny_counterfactuals(world, 0, 40)
    assert cases == tiny_counterfactuals(world, 0, 60)[:40] == tiny_counterfactuals(world, count=40)
    assert cases != tiny_counterfactuals(world, 1, 40)
    few = tiny_counterfactuals(world, 0, 40, most=2)
    assert [case.neighborhood_prompts for case in few] == [case.neighborhood_prompts[:2] for case in cases]


def test_too_few_facts_and_claims(world):
    with pytest.raises(CounterfactError, match=r"^2560 known facts give \d+ cases, not 5000: ask for fewer"):
        tiny_counterfactuals(world, 0, 5000)
    for options in ({"count": 0}, {"most": 0}):
        with pytest.raises(CounterfactError, match="both must be at least 1"):
            tiny_counterfactuals(world, **options)
    with pytest.raises(CounterfactError, match="^claims have a label and no object"):
        tiny_counterfactuals(SimpleNamespace(known_facts=tell_claims(world.known_facts)), 0, 4)


# --- the probability of an answer


def plain_log_probability(lm, prompt, answer):
    "One token after the other, with the plain model."
    prompt, answer = lm.tokenizer(prompt)["input_ids"], lm.tokenizer(answer)["input_ids"]
    found = []
    for i, token in enumerate(answer):
        logits = lm.model(torch.tensor([prompt + answer[:i]])).logits
        found.append(logits[0, -1].log_softmax(-1)[token].item())
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_probabilities_are_those_of_the_plain_model(lm, batch_size):
    pairs = [fact.pair for fact in toy_facts(9)]
    pairs += pairs[3:5]
    plain = [plain_log_probability(lm, *pair) for pair in pairs]
    found = log_probabilities(lm, pairs, batch_size)
    assert found.dtype == torch.float64 and found.device.type == "cpu"
    assert found.tolist() == pytest.approx([sum(values) for values in plain], abs=1e-12)
    each = log_probabilities(lm, pairs, batch_size, per_token=True, progress="ask")
    assert each.tolist() == pytest.approx([sum(values) / len(values) for values in plain], abs=1e-12)


def test_answers_of_one_token_add_up_to_one(lm):
    pairs = [("w1 w2", f"w{i}") for i in range(60)] + [("w1 w2", "<unknown>")]  # all but the end, which is no answer
    end = lm.model(torch.tensor([lm.tokenizer("w1 w2")["input_ids"]])).logits[0, -1].softmax(-1)[0].item()
    assert log_probabilities(lm, pairs).exp().sum().item() == pytest.approx(1 - end)
    assert log_probabilities(lm, []).shape == (0,)


def test_the_other_families():
    lm = toy_classifier(torch.float64)
    claim = toy_claims(1)[0].prompt
    assert log_probabilities(lm, [(claim, "SUPPORTS"), (claim, "REFUTES")]).exp().sum().item() == pytest.approx(1)
    lm, (fact,) = toy_encoder_decoder(torch.float64), toy_facts(1)
    found = log_probabilities(lm, [fact.pair, (fact.prompt, "w3")])
    read, wanted = (torch.tensor([list(ids)]) for ids in lm.encode([fact.pair])[0])
    logits = lm.model(input_ids=read, labels=wanted).logits.log_softmax(-1)
    assert found[0].item() == pytest.approx(logits.gather(-1, wanted.unsqueeze(-1)).sum().item(), abs=1e-12)


def test_half_precision_is_summed_in_double():
    pairs = [fact.pair for fact in toy_facts(5)]
    low, high = (log_probabilities(toy_model(dtype), pairs) for dtype in (torch.bfloat16, torch.float64))
    assert low.dtype == torch.float64 and torch.allclose(low, high, rtol=0.05)


def test_pairs_the_model_cannot_read(lm):
    with pytest.raises(EmptyAnswerError):
        log_probabilities(lm, [("w1", " ")])
    with pytest.raises(ContextLengthError):
        log_probabilities(lm, [("w1 " * 30, "w2")])


# --- ES, PS, NS and S


@pytest.mark.parametrize("per_token", [False, True])
def test_all_measures_against_their_definitions(lm, shift, per_token):
    cases = toy_cases(8)
    scores = counterfact_scores(lm, cases, shift, per_token=per_token)

    def value(prompt, answer):
        found = plain_log_probability(lm, prompt, answer)
        return math.exp(sum(found) / (len(found) if per_token else 1))

    for i, case in enumerate(cases):
        for when, edit in ((" before", None), ("", shift)):
            fact = case.fact
            with switched(edit, lm):
                odds = [(value(p, fact.answer), value(p, fact.alternative)) for p in case.prompts]
            kinds = {"E": odds[:1], "P": odds[1 : 1 + i % 3], "N": [pair[::-1] for pair in odds[1 + i % 3 :]]}
            for kind, pairs in kinds.items():
                success = np.mean([a > b for a, b in pairs]) if pairs else np.nan
                magnitude = np.mean([a - b for a, b in pairs]) if pairs else np.nan
                assert scores.values[f"{kind}S{when}"][i] == pytest.approx(success, nan_ok=True)
                assert scores.values[f"{kind}M{when}"][i] == pytest.approx(magnitude, nan_ok=True, abs=1e-12)
    means = {name: np.nanmean(values) for name, values in scores.values.items()}
    parts = [float(means[name]) for name in ("ES", "PS", "NS")]
    assert scores.mean("S") == pytest.approx(0 if 0 in parts else 3 / sum(1 / part for part in parts))
    assert set(scores.values) == {f"{name}{when}" for name in COUNTERFACT_MEASURES for when in ("", " before")}
    assert list(scores.summary())[-2:] == ["S", "S before"]
    assert scores.summary()["NS"] == pytest.approx(means["NS"]) and 0 < means["NS"] < 1


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_scores_do_not_depend_on_the_batch_size(lm, shift, batch_size):
    cases = toy_cases(7)
    one, other = counterfact_scores(lm, cases, shift), counterfact_scores(lm, cases, shift, batch_size)
    for measure, values in one.values.items():
        np.testing.assert_allclose(values, other.values[measure], atol=1e-12)


def test_before_can_be_given_and_the_unedited_model_stays(lm, shift):
    cases = toy_cases(5)
    before = prefer(lm, cases)
    given, asked = counterfact_scores(lm, cases, shift, before=before), counterfact_scores(lm, cases, shift)
    plain = counterfact_scores(lm, cases)
    for measure in COUNTERFACT_MEASURES:
        assert np.array_equal(given.values[measure], asked.values[measure], equal_nan=True)
        assert np.array_equal(plain.values[measure], given.values[f"{measure} before"], equal_nan=True)
    again = prefer(lm, cases)
    assert all(np.array_equal(*pair) for pair in zip(before.new + before.true, again.new + again.true, strict=True))
    assert not np.array_equal(plain.values["EM"], given.values["EM"])


def test_anything_that_can_be_switched_on_is_an_edit(lm, shift):
    class Recorded:
        on = 0

        @contextmanager
        def applied(self, target):
            self.on += 1
            with shift.applied(target):
                yield

    edit, cases = Recorded(), toy_cases(3)
    one, other = counterfact_scores(lm, cases, edit), counterfact_scores(lm, cases, shift)
    assert edit.on == 1 and all(np.array_equal(one.values[n], other.values[n], equal_nan=True) for n in one.values)


def case_of(paraphrases=0, neighbours=0):
    "A case with so many prompts."
    fact = Fact("a", "o", tuple(f"b{i}" for i in range(paraphrases)), alternative="c")
    return Counterfactual(fact, tuple(f"d{i}" for i in range(neighbours)))


def preferences(*rows):
    "From rows of (probability of the new object, of the true one), a row a prompt, a list a case."
    logs = [np.log(np.array(case, dtype=float)) for case in rows]
    return Preferences([case[:, 0] for case in logs], [case[:, 1] for case in logs])


def test_scores_by_hand():
    cases = [case_of(2, 2), case_of(0, 1)]
    before = preferences([(0.1, 0.9)] * 5, [(0.2, 0.7)] * 2)
    after = preferences([(0.8, 0.1), (0.5, 0.4), (0.2, 0.3), (0.1, 0.2), (0.6, 0.2)], [(0.3, 0.3), (0.25, 0.25)])
    scores = score_counterfacts(cases, before, after)
    rows = {"ES": [1, 0], "PS": [0.5, np.nan], "NS": [0.5, 0], "EM": [0.7, 0], "PM": [0, np.nan], "NM": [-0.15, 0]}
    for name, row in rows.items():  # a tie is a success of neither
        np.testing.assert_allclose(scores.values[name], row, atol=1e-12)
    assert scores.mean("S") == pytest.approx(3 / (1 / 0.5 + 1 / 0.5 + 1 / 0.25))
    assert scores.mean("S before") == 0 and scores.mean("NS before") == 1  # harmonic mean with a zero


def test_without_paraphrases_there_is_no_s():
    scores = score_counterfacts([case_of(0, 1)] * 2, *[preferences(*[[(0.1, 0.9)] * 2] * 2)] * 2)
    assert math.isnan(scores.mean("PS")) and math.isnan(scores.mean("S")) and scores.mean("NS") == 1
    assert all(math.isnan(bound) for bound in scores.interval("S")) and scores.interval("NS") == (1, 1)


def test_tiny_probabilities_are_still_compared():
    cases, logs = [case_of()], (np.array([-2000.0]), np.array([-2001.0]))
    scores = score_counterfacts(cases, Preferences([logs[1]], [logs[0]]), Preferences([logs[0]], [logs[1]]))
    assert (scores.mean("ES"), scores.mean("ES before"), scores.mean("EM")) == (1, 0, 0)


def test_bad_input_of_scores(lm, shift):
    cases = toy_cases(4)
    with pytest.raises(NoFactsError):
        counterfact_scores(lm, [])
    other = replace(cases[0], fact=replace(cases[0].fact, answer="w1 w1"))
    with pytest.raises(ConflictingFactsError):
        counterfact_scores(lm, [*cases, other])
    with pytest.raises(CounterfactError, match="the preferences before are not those of these 4 cases"):
        counterfact_scores(lm, cases, shift, before=prefer(lm, cases[:3]))
    with pytest.raises(CounterfactError, match="the preferences before are not those of these 4 cases"):
        counterfact_scores(lm, cases, before=prefer(lm, toy_cases(5)[1:]), edit=shift)
    right = prefer(lm, cases)
    with pytest.raises(CounterfactError, match="the preferences are not those"):
        score_counterfacts(cases, right, Preferences(right.new, right.true[::-1]))


# --- combined scores


@pytest.mark.parametrize(
    ("values", "mean"), [([1, 1], 1), ([0.5, 1], 2 / 3), ([0, 1], 0), ([0.3], 0.3), ([0.0, 0.0], 0), ([2, 3, 6], 3)]
)
def test_harmonic_mean(values, mean):
    assert harmonic_mean(values) == pytest.approx(mean)


def test_harmonic_mean_of_nothing_known():
    assert math.isnan(harmonic_mean([0.5, math.nan])) and math.isnan(harmonic_mean([0.0, math.nan]))
    for values in ([], [0.5, -0.1]):
        with pytest.raises(CounterfactError, match="needs at least one value and none below 0"):
            harmonic_mean(values)


def test_the_interval_of_a_harmonic_mean_draws_its_parts_together():
    rng = np.random.default_rng(1)
    a, b = rng.random(40), rng.random(40)
    b[:10] = np.nan
    scores = CombinedScores({"a": a, "b": b}, combined={"h": ("a", "b")})
    draws, picker = [], np.random.default_rng(5)
    for _ in range(200):
        rows = picker.integers(40, size=40)
        draws.append(2 / (1 / np.mean(a[rows]) + 1 / np.nanmean(b[rows])))
    assert scores.interval("h", 0.9, 200, 5) == pytest.approx(tuple(np.quantile(draws, [0.05, 0.95])))
    low, high = scores.interval("h")
    assert low < scores.mean("h") < high
    wide = scores.interval("h", level=0.99)
    assert wide[0] < low and wide[1] > high and scores.interval("h") == scores.interval("h")
    assert scores.interval("a") == Scores({"a": a}).interval("a")


def test_draws_without_a_case_are_left_out():
    scores = CombinedScores(
        {"a": np.array([0.5, 0.5]), "b": np.array([np.nan, 0.5])}, combined={"h": ("a", "b")}
    )  # a quarter of all draws holds no b
    assert scores.interval("h") == pytest.approx((0.5, 0.5)) and scores.mean("h") == 0.5


# --- zsRE


def test_zsre_measures_are_es_gs_ls_and_their_harmonic_mean(lm, shift):
    scores = evaluate(lm, toy_facts(9), shift)
    found, ours = zsre_measures(scores), scores.summary()
    for when in ("", " before"):
        parts = [ours[f"{name}{when}"] for name in ("ES", "GS", "LS")]
        assert [found[f"{name}{when}"] for name in ("efficacy", "paraphrase", "specificity")] == parts
        assert found[f"score{when}"] == pytest.approx(0 if 0 in parts else 3 / sum(1 / part for part in parts))
    assert len(found) == 8 and zsre_scores(scores).interval("efficacy") == scores.interval("ES")
    assert np.array_equal(zsre_scores(scores).values["specificity before"], scores.values["LS before"])


def test_zsre_of_facts_without_unrelated_prompts(lm, shift):
    facts = [replace(fact, unrelated_prompt=None, unrelated_answer=None) for fact in toy_facts(3)]
    found = zsre_measures(evaluate(lm, facts, shift))
    assert math.isnan(found["specificity"]) and math.isnan(found["score"]) and found["efficacy"] >= 0


def test_for_answers_of_one_token_efficacy_counts_whole_objects(lm, shift):
    facts = [replace(fact, answer=fact.answer.split()[0]) for fact in toy_facts(12)]
    scores = evaluate(lm, facts, shift)
    assert np.array_equal(zsre_scores(scores).values["efficacy"], scores.values["ES exact"])


# --- texts


PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7", "w1 w2 w3", "w8 w9", "w4", "w10", "w1 w2 w3"]


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"use_cache": False}, {"progress": True}])
def test_texts_depend_on_no_cut(lm, options):
    assert generated(lm, PROMPTS, 12, **options) == generated(lm, PROMPTS, 12)


def test_texts_depend_on_no_order(lm):
    texts = generated(lm, PROMPTS, 12)
    order = random.Random(0).sample(range(len(PROMPTS)), len(PROMPTS))
    shuffled = generated(lm, [PROMPTS[i] for i in order], 12)
    assert sorted(shuffled) == sorted(texts)  # the times of a prompt change places with each other
    first = [text for prompt, text in zip(PROMPTS, texts, strict=True) if prompt == PROMPTS[0]]
    again = [text for i, text in zip(order, shuffled, strict=True) if PROMPTS[i] == PROMPTS[0]]
    assert first == again and len(set(first)) == 3
    assert generated(lm, PROMPTS[4:5], 12) == texts[4:5]


def with_logits(lm, tokens, value):
    "Make the model find some tokens this probable."

    def hook(module, args, output):
        output.logits[..., tokens] = value

    lm.model.register_forward_hook(hook)


def test_texts_have_their_prompt_and_their_length(lm):
    with_logits(lm, [0, 1], -1e9)  # words alone, no special token
    for tokens in (4, 12, 24, 100):
        for prompt, text in zip(PROMPTS, generated(lm, PROMPTS, tokens), strict=True):
            assert text.startswith(f"{prompt} ") and len(lm.tokenizer(text)["input_ids"]) == min(tokens, 24)
    assert generated(lm, []) == []


def test_the_seed_counts(lm):
    texts = [generated(lm, PROMPTS, 12, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] and not set(texts[0]) & set(texts[2])


def test_one_candidate_is_greedy(lm):
    lm.tokenizer.eos_token = None
    lm.model.generation_config.eos_token_id = None
    ids = lm.tokenizer("w1 w2 w3")["input_ids"]
    while len(ids) < 10:
        ids.append(lm.model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert generated(lm, ["w1 w2 w3"], 10, top_k=1) == [lm.tokenizer.decode(ids, skip_special_tokens=True)]


@pytest.mark.parametrize("top_k", [3, 10_000])
def test_tokens_are_drawn_with_their_probabilities(lm, top_k):
    counts = Counter(generated(lm, ["w1 w2 w3"] * 4000, 4, top_k=top_k, batch_size=1000))
    logits = lm.model(torch.tensor([lm.tokenizer("w1 w2 w3")["input_ids"]])).logits[0, -1]
    best = logits.topk(min(top_k, len(logits)))
    shares = dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))
    texts = {lm.tokenizer.decode(lm.tokenizer("w1 w2 w3")["input_ids"] + [t], skip_special_tokens=True) for t in shares}
    assert set(counts) <= texts
    for token, share in shares.items():
        text = f"w1 w2 w3 {lm.tokenizer.decode([token])}"
        if "<" not in text:
            assert abs(counts[text] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000) + 1e-9


def end_soon(lm, after):
    "Make the model draw its end-of-sequence token behind a word, and that word behind any other."
    word = lm.tokenizer(after)["input_ids"][0]

    def hook(module, args, output):
        ids = hook.ids
        output.logits[..., word] += 1e4
        output.logits[:, -1, 0] += torch.where(ids[:, -1] == word, 2e4, 0.0).to(output.logits.dtype)
        return output

    lm.model.register_forward_pre_hook(
        lambda module, args, options: setattr(hook, "ids", options["input_ids"]), with_kwargs=True
    )
    lm.model.register_forward_hook(hook)


@pytest.mark.parametrize("where", ["tokenizer", "model", "list"])
def test_a_text_ends_at_its_end(lm, where):
    end_soon(lm, "w7")
    if where != "tokenizer":
        lm.tokenizer.eos_token = None
        lm.model.generation_config.eos_token_id = 0 if where == "model" else [0, 1]
    assert generated(lm, ["w1", "w2", "w3 w7"], 12) == ["w1 w7", "w2 w7", "w3 w7"]


def test_an_edit_is_on_while_texts_are_written(lm, shift):
    plain = generated(lm, PROMPTS, 12)
    edited = generated(lm, PROMPTS, 12, edit=shift)
    with shift.applied(lm):
        assert generated(lm, PROMPTS, 12) == edited != plain
    assert generated(lm, PROMPTS, 12) == plain


def test_the_models_own_sampling_settings_do_not_count(lm):
    plain = generated(lm, PROMPTS, 12)
    for name, value in {"do_sample": True, "temperature": 0.1, "top_k": 1, "max_length": 5, "num_beams": 2}.items():
        setattr(lm.model.generation_config, name, value)
    assert generated(lm, PROMPTS, 12) == plain


def test_float32_and_bfloat16_write_too():
    for dtype in (torch.float32, torch.bfloat16):
        lm = toy_model(dtype)
        assert generated(lm, PROMPTS, 12) == generated(lm, PROMPTS, 12)


@pytest.mark.parametrize("make", [toy_classifier, toy_encoder_decoder])
def test_only_decoders_write(make):
    lm = make()
    with pytest.raises(CounterfactError, match=f"^only a decoder continues a text, and this .* an {lm.family.name}$"):
        generated(lm, ["w1"])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["w1", ""], {}, "the prompt '' tokenises to nothing"),
        (["w1 " * 24], {}, "takes 24 tokens of the 24 of a text, so none is left to draw"),
        (["w1 w2 w3"], {"tokens": 3}, "^the prompt 'w1 w2 w3' takes 3 tokens of the 3 of a text"),
        (["w1"], {"top_k": 0}, "^top_k=0, batch_size=32: both must be at least 1$"),
        (["w1"], {"batch_size": 0}, "batch_size=0: both must be at least 1"),
    ],
)
def test_prompts_that_cannot_be_continued(lm, prompts, options, message):
    with pytest.raises(CounterfactError, match=message):
        generated(lm, prompts, **options)


def test_a_broken_model_is_an_error(lm):
    with_logits(lm, [3], torch.nan)
    with pytest.raises(CounterfactError, match="^the model's logits are not numbers: the edit is too strong"):
        generated(lm, ["w1"], 12)


# --- entropy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The mayor's 2nd term, over.", ["The", "mayor", "'", "s", "2nd", "term", ",", "over", "."]),
        ("  a\n b_c  ", ["a", "b_c"]),
        ("Élan—vital…", ["Élan", "—", "vital", "…"]),
        (" ", []),
    ],
)
def test_words_and_marks(text, words):
    assert words_and_marks(text) == words


@pytest.mark.parametrize(
    ("words", "n", "bits"),
    [
        ("a b a b a", 2, 1),
        ("a b a b a", 3, math.log2(3) - 2 / 3),
        ("a b a b a", 1, -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))),
        ("a b c d e", 2, 2),
        ("a b c d e", 3, math.log2(3)),
        ("a a a a", 2, 0),
        ("a b", 3, 0),
        ("", 2, 0),
    ],
)
def test_n_gram_entropy_by_hand(words, n, bits):
    found = n_gram_entropy(words.split(), n)
    assert found == pytest.approx(bits) and math.copysign(1, found) == 1


def test_generation_entropy_is_the_equation_averaged_over_texts():
    texts = ["a b a b a", "a b c d e", "x", ""]
    wanted = [2 / 3 + 4 / 3 * (math.log2(3) - 2 / 3), 2 / 3 * 2 + 4 / 3 * math.log2(3), 0, 0]
    assert [generation_entropy([text]) for text in texts] == pytest.approx(wanted)
    assert generation_entropy(texts) == pytest.approx(sum(wanted) / 4)
    rng = random.Random(0)
    words = [rng.choice("abc") for _ in range(200)]
    entropy = {}
    for n in (2, 3):
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        entropy[n] = -sum(c / counts.total() * math.log2(c / counts.total()) for c in counts.values())
    assert generation_entropy([" ".join(words)]) == pytest.approx(2 / 3 * entropy[2] + 4 / 3 * entropy[3])
    with pytest.raises(CounterfactError, match="no text"):
        generation_entropy([])


# --- likeness to references


def plain_cosine(text, reference, documents):
    "TF-IDF and its cosine, written out."

    def words(document):
        return re.findall(r"\b\w\w+\b", document.lower())

    documents = [set(words(document)) for document in set(documents)]

    def vector(text):
        found = Counter(words(text))
        holds = {word: sum(word in document for document in documents) for word in found}
        return {word: n * (math.log((1 + len(documents)) / (1 + holds[word])) + 1) for word, n in found.items()}

    one, two = vector(text), vector(reference)
    lengths = [math.sqrt(sum(value**2 for value in side.values())) for side in (one, two)]
    return sum(one[word] * two[word] for word in one if word in two) / math.prod(lengths) if all(lengths) else 0.0


def test_reference_score_written_out():
    texts = [["The goalie stops a puck.", "the net"], ["A linebacker tackles."], ["the the"], ["!?"]]
    references = [["Goalie and net.", "The puck"], ["The puck"], ["the"], ["a net"]]
    documents = [text for group in references for text in group]
    found = reference_score(texts, references)
    rows = zip(texts, references, strict=True)
    assert found.tolist() == pytest.approx([plain_cosine(" ".join(t), " ".join(r), documents) for t, r in rows])
    assert found[2] == pytest.approx(1) and found[1] == found[3] == 0 < found[0] < 1


def test_the_texts_of_one_case_do_not_weigh_in_another():
    references = [["Goalie and net.", "The puck"], ["The goalie"]]
    one, other = (reference_score([["goalie puck"], [text]], references) for text in ("goalie", "net puck the and"))
    assert one[0] == other[0] and one[1] != other[1]
    assert reference_score([["goalie"]], [["goalie"]])[0] > reference_score([["goalie plays"]], [["goalie"]])[0] > 0


def test_reference_score_of_what_is_missing():
    found = reference_score([["word"], [], ["word"]], [["word"], ["word"], []])
    assert found[0] == pytest.approx(1) and np.isnan(found[1:]).all()
    assert reference_score([["a !"], ["word"]], [["?"], ["a"]]).tolist() == [0, 0]
    assert np.isnan(reference_score([["word"]], [[]])).all() and reference_score([], []).shape == (0,)
    with pytest.raises(CounterfactError, match="texts of 1 cases, references of 2"):
        reference_score([["a"]], [["a"], ["b"]])


def test_scikit_learn_is_imported_where_it_is_needed():
    tree = ast.parse(Path(counterfact.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name.startswith("sklearn")]


# --- both, for cases


def test_texts_of_a_case_do_not_depend_on_the_other_cases(lm, shift):
    cases = toy_cases(5)
    shared = replace(cases[0], generation_prompts=("w1 w2", "w3", "w1 w2"))
    other, none = (replace(cases[1], generation_prompts=prompts) for prompts in (("w3", "w1 w2"), ()))
    cases = [shared, *cases[1:], other, none]
    texts = generations(lm, cases, shift, tokens=12)
    assert [len(group) for group in texts] == [len(case.generation_prompts) for case in cases]
    for case, group in zip(cases, texts, strict=True):
        assert generations(lm, [case], shift, tokens=12, batch_size=1) == [group]
        assert all(text.startswith(prompt) for prompt, text in zip(case.generation_prompts, group, strict=True))
    assert texts[0][0] != texts[0][2] and texts[5] == [texts[0][1], texts[0][0]]  # a shared prompt is continued once
    assert generations(lm, [], shift) == []


def test_generation_scores_of_cases(lm, shift):
    cases = toy_cases(4)
    cases[1] = replace(cases[1], references=())
    cases[2] = replace(cases[2], generation_prompts=())
    before, after = (generations(lm, cases, edit, tokens=12) for edit in (None, shift))
    scores = generation_scores(cases, after, before)
    references = [case.references for case in cases]
    for when, texts in ((" before", before), ("", after)):
        wanted = reference_score(texts, references)
        np.testing.assert_allclose(scores.values[f"RS{when}"], wanted)
        assert np.isnan(wanted).tolist() == [False, True, True, False]
        entropies = [generation_entropy(group) if group else np.nan for group in texts]
        np.testing.assert_allclose(scores.values[f"GE{when}"], entropies)
    assert scores.interval("GE")[0] <= scores.mean("GE") <= scores.interval("GE")[1]
    alone = generation_scores(cases, after)
    assert set(alone.values) == {"GE", "RS"} and np.array_equal(alone.values["GE"], scores.values["GE"], equal_nan=True)


def test_generation_scores_of_what_is_missing():
    cases = [case_of(), case_of()]
    scores = generation_scores(cases, [["a b c"], ["d e"]], [[], []])
    assert np.isnan(scores.values["RS"]).all() and np.isnan(scores.values["GE before"]).all() and scores.mean("GE") > 0
    for after, before, message in (
        ([["a"]], None, "1 groups of texts for 2 cases"),
        ([["a"], ["b"]], [["a"]], "1 groups of texts before for 2 cases"),
    ):
        with pytest.raises(CounterfactError, match=message):
            generation_scores(cases, after, before)


# --- real data, where a machine has it --------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("MALMEN_DATA"), reason="MALMEN_DATA names no folder of real data")
def test_real_files():
    import lzma

    folder = Path(os.environ["MALMEN_DATA"])
    full = load_counterfactuals(folder / "counterfact" / "full_form_804.jsonl.xz")
    assert len(full) == 804 and {len(case.neighborhood_prompts) for case in full} == {10}
    assert all(len(case.fact.equivalent_prompts) == 2 and case.fact.relation for case in full)
    assert [case.fact for case in full] == load_facts(folder / "counterfact" / "full_form_804.jsonl.xz")
    for name, left in {"train": 9926, "edit": 9921}.items():
        compact = load_counterfactuals(folder / "counterfact" / f"{name}.jsonl.xz")
        assert len(compact) == 10_000 and all(len(case.prompts) == 3 for case in compact)
        kept = without_conflicts(compact)
        check_facts([case.fact for case in kept])
        assert len(kept) == left
    with lzma.open(folder / "corpus" / "trex_sentences.txt.xz", "rt", encoding="utf-8") as sentences:
        known = reference_texts(full, sentences)
    assert {len(case.references) for case in known} == {5}
    assert all(case.fact.answer in text for case in known for text in case.references)
