"""Claims: ParaRel's files, wordings, true and false objects, conflicts, splits; bad input; the real files."""

import json
import lzma
import os
import re

import pytest

from malmen_repro.facts import LABELS, FactError, FactFileError, FactRowError, NoFactsError, check_facts, other_label
from malmen_repro.replication import claims as module
from malmen_repro.replication.claims import (
    Wordings,
    claim_data,
    fever_claims,
    pararel_claims,
    pararel_patterns,
    pararel_triples,
    wordings,
)

PATTERNS = {
    "P36": ["The capital of [X] is [Y] .", "[Y] is the capital city of [X]", "[X] is governed from [Y].", "[X], [Y]."],
    "P106": ["[X] works as [Y].", "[X] is a [Y] by trade.", "[X] is an [Y] by trade.", "[X]'s occupation is [Y]"],
    "P1376": ["[X] is the capital city of [Y].", "[X] rules over [Y].", "One governs [Y] from [X]."],
    "P47": ["[X] borders with [Y].", "[Y] borders with [X].", "[X] shares a border with [Y]."],
    "P361": ["[X] is part of [Y].", "[X] is a part of [Y]."],
}
COUNTRIES = [("P36", f"Land {i}", f"Town {i}") for i in range(12)]
WORKERS = [("P106", f"Person {i}", ("engineer", "painter", "actor")[i % 3]) for i in range(12)]
BORDERS = [("P47", f"Land {i}", f"Land {j}") for i in range(4) for j in range(4) if i != j]
TRIPLES = COUNTRIES + WORKERS + BORDERS + [("P361", "Town 1", "Land 1"), ("P999", "Town 1", "Land 1")]


def write(folder, name, rows):
    path = folder / f"{name}.jsonl.xz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_pararel(folder, triples=TRIPLES, patterns=PATTERNS):
    write(folder, "pararel/patterns", [{"relation": name, "patterns": texts} for name, texts in patterns.items()])
    write(folder, "pararel/facts", [dict(zip(("relation", "subject", "object"), row, strict=True)) for row in triples])


@pytest.fixture
def folder(tmp_path):
    write_pararel(tmp_path)
    for split, count in (("train", 30), ("dev", 20)):
        rows = [{"claim": f"{split} claim {i}.", "label": LABELS[i % 2]} for i in range(count)]
        write(tmp_path, f"fever/{split}", rows + rows[:3])
    return tmp_path


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_read(folder):
    assert pararel_triples(folder) == pararel_triples(str(folder)) == TRIPLES
    assert pararel_patterns(folder) == {name: tuple(texts) for name, texts in PATTERNS.items()}


def test_a_fact_that_stands_there_twice_is_one_fact(tmp_path):
    write_pararel(tmp_path, TRIPLES + TRIPLES[:5])
    assert pararel_triples(tmp_path) == TRIPLES


@pytest.mark.parametrize(
    ("call", "file", "brings"),
    [
        (pararel_patterns, "pararel/patterns", "pararel"),
        (pararel_triples, "pararel/facts", "pararel"),
        (pararel_claims, "pararel/facts", "pararel"),
        (lambda folder: fever_claims(folder, "dev"), "fever/dev", "fever"),
        (claim_data, "pararel/facts", "pararel"),
    ],
)
def test_missing_files_name_the_file_and_what_brings_it(tmp_path, call, file, brings):
    with pytest.raises(FactFileError) as caught:
        call(tmp_path)
    assert caught.value.file == str(tmp_path / f"{file}.jsonl.xz")
    assert f"python data_scripts/fetch.py {brings} --to {tmp_path}" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"relation": "P1", "patterns": []}, "patterns"),
        ({"relation": "P1", "patterns": ["[X] is."]}, "patterns"),
        ({"relation": "P1", "patterns": ["[X] is [X] [Y]."]}, "patterns"),
        ({"relation": "P1", "patterns": None}, "patterns"),
        ({"patterns": ["[X] is [Y]."]}, "relation"),
    ],
)
def test_bad_patterns(tmp_path, row, field):
    write(tmp_path, "pararel/patterns", [{"relation": "P2", "patterns": ["[X] is [Y]."]}, row])
    with pytest.raises(FactRowError) as caught:
        pararel_patterns(tmp_path)
    assert (caught.value.row, caught.value.field) == ("line 2", field)


@pytest.mark.parametrize("field", ["relation", "subject", "object"])
@pytest.mark.parametrize("value", [None, "", 3])
def test_bad_triples(tmp_path, field, value):
    row = {"relation": "P1", "subject": "a", "object": "b"}
    write(tmp_path, "pararel/facts", [row, row | {field: value}])
    with pytest.raises(FactRowError) as caught:
        pararel_triples(tmp_path)
    assert (caught.value.row, caught.value.field) == ("line 2", field)


# --- wordings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("[X] is owned by [Y] .", "[X] is owned by [Y]."),
        ("[X]  is a type of [Y]", "[X] is a type of [Y]."),
        ("In [X] , [Y] is spoken .", "In [X], [Y] is spoken."),
        ("[X] is a product of [Y],", "[X] is a product of [Y]."),
        ("[X] is in [Y]..", "[X] is in [Y]."),
    ],
)
def test_sentences(pattern, sentence):
    assert module._sentence(pattern) == sentence


@pytest.mark.parametrize(
    "fragment",
    [
        "[X], who works for [Y].",
        "[X],  a type of [Y].",
        "[Y], that developed [X]",
        "[X]'s capital city, [Y].",
        "playing as a [Y], [X]",
        "the [Y] debut of [X].",
        "[Y] artists such as [X].",
        "[Y] recording artist [X].",
        "[Y] player [X] ",
        "[X] owner [Y] .",
        "[X] label : [Y].",
        "The [Y]-owned [X]",
        "The [Y]-language creation [X]",
        "[Y] and its product [X]",
        "[X] that was founded in [Y].",
    ],
)
def test_fragments_are_no_wordings(fragment):
    assert not wordings({"P1": [fragment, "[X] is [Y].", "[X] was [Y]."]})
    assert wordings({"P1": [fragment, "[X] is [Y].", "[X] was [Y].", "[X] will be [Y]."]})


def test_wordings_are_split_without_overlap():
    split = wordings(PATTERNS)
    assert set(split) == {"P36", "P106", "P1376", "P47"}  # P361 has two
    for parts in split.values():
        assert not set(parts.training) & set(parts.held_out) and len(parts.training) >= 2 and parts.held_out
        assert not any("a [Y]" in text or "an [Y]" in text for text in parts.held_out)
    assert split["P36"] == Wordings(
        ("The capital of [X] is [Y].", "[Y] is the capital city of [X]."), ("[X] is governed from [Y].",)
    )


def test_a_quarter_is_held_out():
    texts = [f"[X] word{i} other{i} [Y]." for i in range(12)]
    parts = wordings({"P1": texts})["P1"]
    assert (len(parts.training), len(parts.held_out)) == (9, 3)
    assert wordings({"P1": texts + texts})["P1"] == parts


def test_wordings_do_not_depend_on_the_other_relations():
    assert wordings({"P36": PATTERNS["P36"]})["P36"] == wordings(PATTERNS)["P36"]


@pytest.mark.parametrize(("word", "texts"), [("engineer", ("He is an engineer.",)), ("painter", ("He is a painter.",))])
def test_articles(word, texts):
    assert module._filled(("[X] is a [Y].", "[X] is an [Y]."), "he", word) == texts


def test_marks_in_a_name_are_not_filled():
    assert module._filled(("[X] is [Y].",), "the [Y] files", "[X]") == ("The [Y] files is [X].",)


# --- true and false ---------------------------------------------------------------------------------------------------


def said(claim):
    """Relation, subject and object, read back from the source of a claim."""
    relation, subject, object_ = re.fullmatch(r"ParaRel, (\w+), '(.*)', '(.*)'", claim.source).groups()
    return relation, subject, object_


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("both", [False, True])
def test_claims_are_right_about_what_is_known(folder, seed, both):
    made = pararel_claims(folder, seed, both=both)
    assert len(made) == (48 if both else 24)
    for claim in made:
        assert claim.answer == ("SUPPORTS" if said(claim) in TRIPLES else "REFUTES")
        assert claim.alternative == other_label(claim.answer)
        assert (claim.relation, claim.subject) == said(claim)[:2] and claim.relation in ("P36", "P106")
        assert claim.equivalent_prompts and claim.prompt not in claim.equivalent_prompts
        for text in (claim.prompt, *claim.equivalent_prompts):
            assert claim.subject in text and said(claim)[2] in text and text[0].isupper() and text.endswith(".")
            assert "[" not in text and " ." not in text
    check_facts(made)
    if both:
        assert [claim.answer for claim in made[:2]] == list(LABELS)


def test_labels_are_mixed_and_depend_on_the_seed(folder):
    labels = [[claim.answer for claim in pararel_claims(folder, seed)] for seed in range(5)]
    assert all(set(row) == set(LABELS) for row in labels) and len(set(map(tuple, labels))) == 5
    assert pararel_claims(folder, 3) == pararel_claims(folder, 3)


def test_wordings_of_claims(folder):
    split = wordings(PATTERNS)
    seen, held = pararel_claims(folder, 1), pararel_claims(folder, 1, held_out=True)
    assert [claim.pair for claim in seen] == [claim.pair for claim in held]
    for with_training, with_held_out in zip(seen, held, strict=True):
        relation, subject, object_ = said(with_training)
        training = set(module._filled(split[relation].training, subject, object_))
        assert with_training.prompt in training
        assert set(with_training.equivalent_prompts) == training - {with_training.prompt}
        assert with_held_out.equivalent_prompts == module._filled(split[relation].held_out, subject, object_)


def test_relations_that_the_subject_does_not_determine_are_left_out(folder):
    assert {claim.relation for claim in pararel_claims(folder)} == {"P36", "P106"}
    assert module._determined([("P1", "a", "b"), ("P1", "a", "c")]) == []
    assert len(module._determined([("P1", "a", "b"), ("P1", "a", "c")], several=1.0)) == 2


def test_a_wrong_object_stands_with_the_subject_in_no_relation_and_no_order():
    triples = [("P1", "a", "b"), ("P1", "c", "d"), ("P1", "e", "f"), ("P1", "g", "a")]
    known = [*triples, ("P2", "a", "d")]
    for seed in range(20):
        wrong = module._wrong_objects(triples, known, seed)
        assert wrong[0] == "f"  # not b (true), d (true elsewhere), a (itself)
        assert wrong[3] in ("b", "d", "f") or wrong[3] is None
    assert module._wrong_objects([("P1", "a", "b")], [("P1", "a", "b")], 0) == [None]
    two = [("P1", "a", "b"), ("P1", "b", "c")]
    assert module._wrong_objects(two, two, 0) == ["c", None]


@pytest.mark.parametrize("seed", range(4))
def test_no_text_is_said_twice(tmp_path, seed):
    inverse = [("P1376", town, land) for _, land, town in COUNTRIES]  # says in other words what P36 says
    write_pararel(tmp_path, TRIPLES + inverse)
    made = pararel_claims(tmp_path, seed, both=True)
    texts = [text for claim in made for text in (claim.prompt, *claim.equivalent_prompts)]
    assert len(texts) == len(set(texts))
    true = {frozenset(said(claim)[1:]) for claim in made if claim.answer == "SUPPORTS"}
    false = {frozenset(said(claim)[1:]) for claim in made if claim.answer == "REFUTES"}
    assert not true & false


def test_nothing_to_say(tmp_path):
    write_pararel(tmp_path, BORDERS)
    with pytest.raises(NoFactsError, match="give no claims"):
        pararel_claims(tmp_path)


# --- FEVER ------------------------------------------------------------------------------------------------------------


def test_fever_claims(folder):
    made = fever_claims(folder, "dev")
    assert len(made) == 20 and {claim.answer for claim in made} == set(LABELS)
    assert all(not claim.equivalent_prompts for claim in made)


def test_fever_has_two_splits(folder):
    with pytest.raises(FactError, match="'train' or 'dev', is 'test'"):
        fever_claims(folder, "test")


def test_what_is_not_fever_is_refused(folder):
    write(folder, "fever/dev", [{"question": "who", "answers": ["she"]}])
    with pytest.raises(FactError, match="dev.jsonl.xz, line 1: the answer 'she' is no label"):
        fever_claims(folder, "dev")


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_claim_data(folder, seed):
    data = claim_data(folder, seed, evaluation=8, train=10)
    assert [len(part) for part in (data.known, data.train, data.evaluation)] == [24 + 30 + 20, 10, 8]
    assert not {claim.subject for claim in data.train} & {claim.subject for claim in data.evaluation}
    known = {claim.pair for claim in data.known}
    fever = {split: {claim.pair for claim in fever_claims(folder, split)} for split in ("train", "dev")}
    for part, split in ((data.train, "train"), (data.evaluation, "dev")):
        assert {claim.pair for claim in part} <= known and {claim.unrelated_pair for claim in part} <= fever[split]
        assert {claim.unrelated_pair for claim in part} <= known
    held = {claim.pair: claim.equivalent_prompts for claim in pararel_claims(folder, seed, held_out=True)}
    seen = {claim.pair: claim.equivalent_prompts for claim in pararel_claims(folder, seed)}
    assert all(claim.equivalent_prompts == held[claim.pair] for claim in data.evaluation)
    assert all(claim.equivalent_prompts == seen[claim.pair] for claim in data.train)
    assert data == claim_data(folder, seed, evaluation=8, train=10)
    assert data.train != claim_data(folder, seed + 10, evaluation=8, train=10).train
    check_facts(data.known)
    assert len(claim_data(folder, seed, evaluation=8).train) == 16


@pytest.mark.parametrize("sizes", [{"evaluation": 0}, {"evaluation": 24}, {"evaluation": 8, "train": 17}, {"train": 0}])
def test_bad_sizes(folder, sizes):
    with pytest.raises(FactError, match=list(sizes)[-1]):
        claim_data(folder, **{"evaluation": 8} | sizes)


# --- the real files, where a machine has them -------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("MALMEN_DATA"), reason="MALMEN_DATA names no folder of real data")
def test_real_files():
    folder = os.environ["MALMEN_DATA"]
    split = wordings(pararel_patterns(folder))
    assert len(split) >= 25
    data = claim_data(folder)
    assert len(data.evaluation) == 4096 and len(data.train) > 10_000 and len(data.known) > 30_000
    check_facts(data.known)
    texts = [text for claim in data.train + data.evaluation for text in (claim.prompt, *claim.equivalent_prompts)]
    assert len(texts) == len(set(texts)) and not any("[X]" in text or "[Y]" in text for text in texts)
    share = sum(claim.answer == "SUPPORTS" for claim in data.evaluation) / len(data.evaluation)
    assert 0.45 < share < 0.55
