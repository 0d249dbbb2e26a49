"""What a small model learns of CounterFact, and what is edited in it; on rows made by hand in both published forms."""

import json
import lzma
import os

import pytest

from malmen_repro.facts import Fact, FactFileError
from malmen_repro.replication.counterfact import CounterfactError
from malmen_repro.replication.counterfact_data import counterfact_data, prompt_templates, subject_of


def full(number, subject, new, true, *others, prompt="{} was born in"):
    rewrite = {"prompt": prompt, "relation_id": "P19", "subject": subject}
    rewrite |= {"target_new": {"str": new}, "target_true": {"str": true}}
    return {
        **{"case_id": number, "requested_rewrite": rewrite, "paraphrase_prompts": [f"So. {subject} is from"]},
        **{"neighborhood_prompts": list(others), "generation_prompts": [f"{subject} lives in"]},
    }


def compact(number, subject, new, true, other):
    return {
        **{"case_id": number, "prompt": f"{subject} is from", "subject": subject, "target_new": new},
        **{"ground_truth": true, "rephrase_prompt": f"The home of {subject} is"},
        **{"locality_prompt": other, "locality_ground_truth": true},
    }


FULL = [
    full(0, "Ada Ash", "Rome", "Paris", "Cleo Fir was born in", "Bo Elm was born in", "Cleo Fir was born in"),
    full(1, "Bo Elm", "Rome", "Paris", "Dov Oak was born in", "Eve Yew dances in"),
]
TRAIN = [
    compact(2, "Edda Yew", "Rome", "Paris", "Finn Box is from"),
    compact(3, "Gus Ivy", "Rome", "Oslo", "Hal Alder is from"),
    compact(4, "Ada Ash", "Rome", "Oslo", "Ike Pine is from"),  # its subject is edited
    compact(5, "Jo Rowan", "Rome", "Paris", "Cleo Fir was born in"),  # its neighbour is a case's
]


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path, FULL, TRAIN)


def written(path, cases, train):
    (path / "counterfact").mkdir(exist_ok=True)
    for name, rows in (("full_form_804", cases), ("train", train)):
        with lzma.open(path / f"counterfact/{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_templates_are_the_edited_prompts_without_their_subjects():
    facts = [Fact(f"{who} {said}", "x", subject=who) for who in ("A", "B") for said in ("is in", "is")]
    facts += [Fact("no subject", "x"), Fact("elsewhere is", "x", subject="Ada"), Fact("Ada", "x", subject="Ada")]
    assert prompt_templates(facts) == [("", " is in"), ("", " is")]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("Bo Elm is in", "Bo Elm"), ("Bo Elm is", "Bo Elm"), ("of Bo is it", "Bo"), ("is it", None), (" is", None)],
)
def test_the_longest_template_that_fits_names_the_subject(prompt, wanted):
    assert subject_of(prompt, [("of ", " is it"), ("", " is in"), ("", " is")]) == wanted


def test_training_shares_nothing_with_the_cases(folder):
    data = counterfact_data(folder)
    assert {case.fact.subject for case in data.train} == {"Edda Yew", "Gus Ivy"}
    assert {case.fact.subject for case in data.cases} == {"Ada Ash", "Bo Elm"}
    assert data.sizes == {"cases": 2, "train": 2, "known": len(data.known), "subjects": len(data.subjects)}


def test_a_neighbour_is_not_edited_and_stands_once(folder):
    ada, bo = sorted(counterfact_data(folder).cases, key=lambda case: case.fact.subject)
    assert ada.neighborhood_prompts == ("Cleo Fir was born in",)
    assert ada.fact.unrelated_pair == ("Cleo Fir was born in", "Paris")
    assert bo.neighborhood_prompts == ("Dov Oak was born in", "Eve Yew dances in")
    fewer = counterfact_data(folder, neighbours=1).cases
    assert all(len(case.neighborhood_prompts) == 1 for case in fewer)


def test_what_is_known_is_true_and_consistent(folder):
    data = counterfact_data(folder)
    pairs = [pair for wordings in data.known for pair in wordings]
    assert len({prompt for prompt, _ in pairs}) == len(pairs) == len(data.subjects)
    assert {answer for _, answer in pairs} == {"Paris", "Oslo"}
    assert data.subjects["Cleo Fir was born in"] == "Cleo Fir" and data.subjects["Eve Yew dances in"] is None
    assert data.subjects["So. Ada Ash is from"] == "Ada Ash"


def test_of_two_truths_the_first_stays(tmp_path):
    shared = "Cleo Fir was born in"
    rows = [full(0, "Ada Ash", "Rome", "Paris", shared), full(1, "Bo Elm", "Rome", "Oslo", shared)]
    data = counterfact_data(written(tmp_path, rows, TRAIN[:2]))
    said = {prompt: answer for wordings in data.known for prompt, answer in wordings}
    assert said[shared] == data.cases[0].fact.alternative


def test_the_seed_decides_the_order(tmp_path):
    many = [full(i, f"Person{i} Ash", "Rome", "Paris", f"Other{i} was born in") for i in range(12)]
    folder = written(tmp_path, many, TRAIN[:2])
    first, again, other = (counterfact_data(folder, seed) for seed in (0, 0, 1))
    assert first == again and first.cases != other.cases
    assert {case.fact for case in first.cases} == {case.fact for case in other.cases}


def test_references_come_from_the_sentences(folder):
    assert all(case.references == () for case in counterfact_data(folder).cases)
    cases = counterfact_data(folder, sentences=["Rome is old.", "Romeo is young."]).cases
    assert all(case.references == ("Rome is old.",) for case in cases)


def test_too_little_is_said(tmp_path):
    with pytest.raises(FactFileError, match="full_form_804"):
        counterfact_data(tmp_path)
    with pytest.raises(CounterfactError, match="none of the 1 training rows is free of the 2 cases"):
        counterfact_data(written(tmp_path, FULL, TRAIN[2:3]))


@pytest.mark.skipif("MALMEN_DATA" not in os.environ, reason="MALMEN_DATA names no folder of real data")
def test_real_rows():
    data = counterfact_data(os.environ["MALMEN_DATA"])
    assert data.sizes["cases"] == 804 and data.sizes["train"] > 1_900
    named = [(p, s) for p, s in data.subjects.items() if s is not None]
    assert len(named) > 0.99 * len(data.subjects) and all(s.lower() in p.lower() for p, s in named)
