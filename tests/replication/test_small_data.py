"""The small tier's facts: splits, sentences, lessons; on invented data in the real formats."""

import random
from dataclasses import replace

import pytest

from malmen_repro.facts import Fact, FactError, FactFileError, check_facts, other_label
from malmen_repro.replication.small_data import (
    claim_facts,
    claim_lessons,
    corpus_sentences,
    halves,
    known_questions,
    small_tier_data,
    subject_extras,
    subject_facts,
    subject_lessons,
    unambiguous,
    what_it_should_know,
)
from tests.small import CONFIGS, prompts, write_folder

SUBJECTS = CONFIGS["gpt2-subjects"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(folder):
    return small_tier_data(folder, known=12)


def test_the_same_seed_gives_the_same_splits(folder, data):
    assert small_tier_data(folder, known=12) == data != small_tier_data(folder, 1, known=12)


def test_nothing_that_is_edited_is_learned(data):
    learned = {p for p, _ in data.nq_train} | prompts(data.known_facts)
    for part in (data.train_facts, data.zsre_train, data.zsre_eval, data.eq_dev):
        assert not learned & prompts(part)
        check_facts(part)
    assert not prompts(data.train_facts) & prompts(data.eq_dev)


def test_unrelated_tuples_of_training_and_evaluation_are_apart_and_known(data):
    a, b = ({p for p, _ in part} for part in (data.nq_a, data.nq_b))
    assert not a & b and a | b == {p for p, _ in data.nq_train} and len(a) == len(b)
    assert {f.unrelated_prompt for f in data.train_facts + data.zsre_train} <= a
    assert {f.unrelated_prompt for f in data.eq_dev + data.zsre_eval} <= b
    assert not {p for p, _ in data.nq_dev} & (a | b)


def test_the_answer_that_zsre_asks_for_is_the_one_learned(data):
    assert {f.unrelated_pair for f in data.zsre_eval} <= set(data.nq_train)


def test_training_does_not_see_the_held_out_wording(data):
    held_out = {p for p, _ in what_it_should_know(data)["known, held-out wording"]}
    assert len(held_out) == 12 and not held_out & prompts(data.known_facts)
    assert all(len(f.equivalent_prompts) == 2 for f in data.eq_dev)


def test_ambiguous_questions_are_left_out(data):
    everything = prompts(data.known_facts + data.train_facts + data.eq_dev)
    assert "Where is Elm Hall located?" not in everything and "Where was Zed Ash born?" not in everything
    assert len(data.known_facts) == len(data.train_facts) == 12 and len(data.eq_dev) == 12


def test_unambiguous_compares_all_wordings():
    first = Fact("Where was Ada Elm born?", "Kent", subject="Ada Elm", relation="P19")
    assert unambiguous([first]) == [first]
    assert unambiguous([first, replace(first, prompt="What is the birthplace of Ada Elm?")]) == []


def test_known_questions_takes_the_first_row_that_asks():
    rows = [Fact("p", "a", unrelated_prompt="q", unrelated_answer=answer) for answer in ("first", "second")]
    assert known_questions([Fact("q", "other"), Fact("r", "own")], rows) == [("q", "first"), ("r", "own")]


@pytest.mark.parametrize("kept", [0, 1, 4, 7, 8])
def test_halves(kept):
    pairs = [(str(i), "a") for i in range(8)]
    a, b = halves(pairs, {str(i) for i in range(kept)}, random.Random(0))
    assert sorted(a + b) == pairs and {str(i) for i in range(kept)} <= {p for p, _ in b} and len(a) == min(4, 8 - kept)


def test_too_many_known_facts(folder):
    with pytest.raises(FactError, match="24"):
        small_tier_data(folder, known=24)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FactFileError, match="mend_train_1000"):
        small_tier_data(tmp_path)
    with pytest.raises(FactFileError, match="trex_sentences"):
        corpus_sentences(tmp_path)
    whole = (folder / "corpus/trex_sentences.txt.xz").read_bytes()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/trex_sentences.txt.xz").write_bytes(whole[:-20])
    with pytest.raises(FactFileError, match="trex_sentences"):
        corpus_sentences(tmp_path)


def test_corpus_sentences(folder):
    lines = corpus_sentences(folder, trex=5, bing=3)
    assert lines == corpus_sentences(folder, trex=5, bing=3) != corpus_sentences(folder, 1, trex=5, bing=3)
    assert len(set(lines)) == 8 and sum(line.startswith("trex") for line in lines) == 5
    assert len(corpus_sentences(folder)) == 72 and all(20 <= len(line) <= 400 for line in corpus_sentences(folder))


def test_claims_are_learned_right_and_edited_wrong(folder):
    config = CONFIGS["bert"]
    lessons, (train, sets) = claim_lessons(folder, config), claim_facts(folder, config)
    known = dict(pair for facts, _ in lessons.sources.values() for pairs in facts for pair in pairs)
    own = [fact for fact in train if not fact.equivalent_prompts]  # FEVER's, which bring no phrasings
    assert len(train) == 12 + len(own) and len(own) == 10 and train[12:] == own
    assert not {fact.prompt for fact in own} & {fact.unrelated_prompt for fact in train}
    assert {name: len(facts) for name, facts in sets.items()} == {"pararel": 8, "fever": 10}
    for fact in [*train, *sets["pararel"], *sets["fever"]]:
        assert known[fact.prompt] == other_label(fact.answer) == fact.alternative
        assert known[fact.unrelated_prompt] == fact.unrelated_answer
    assert all(prompt in known for fact in train for prompt in fact.equivalent_prompts)
    assert not any(prompt in known for fact in sets["pararel"] for prompt in fact.equivalent_prompts)
    unseen = lessons.checks["unseen twins"]
    assert unseen and not any(prompt in known for prompt, _ in unseen)
    assert {fact.unrelated_prompt for fact in train} <= {prompt for prompt, _ in lessons.checks["fever_train"]}
    assert {fact.unrelated_prompt for fact in sets["pararel"]} <= {prompt for prompt, _ in lessons.checks["fever_dev"]}


def test_the_truth_is_learned_and_the_new_objects_are_edited(folder):
    lessons = subject_lessons(folder, SUBJECTS)
    train, edits = subject_facts(folder, SUBJECTS)
    extras = subject_extras(folder, SUBJECTS)
    said = {pair for wordings in lessons.sources["known"].facts for pair in wordings}
    assert edits["counterfact"] == [case.fact for case in extras["cases"]]
    for fact in train + edits["counterfact"]:
        assert (fact.prompt, fact.alternative) in said and fact.pair not in said and fact.unrelated_pair in said
    assert {f"{prompt} {answer}" for prompt, answer in said} <= set(extras["corpus"])
