"""Facts: every format in every wrapping, every kind of bad input, round trips, conflicts, pairs, templates, splits."""

import gzip
import importlib.util
import json
import lzma
import os
import pickle
import string
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from malmen_repro import facts as checked
from malmen_repro.facts import (
    ENTITY_QUESTION_TEMPLATES,
    HELD_OUT,
    HELD_OUT_TEMPLATES,
    LABELS,
    TRAINING_TEMPLATES,
    ConflictingFactsError,
    Fact,
    FactError,
    FactFileError,
    FactRowError,
    FactWarning,
    MalmenError,
    NoFactsError,
    TemplateError,
    add_rephrases,
    check_facts,
    drop_conflicts,
    drop_repeats,
    flipped,
    load_facts,
    near_misses,
    other_label,
    pair_unrelated,
    save_facts,
    split_facts,
)

MEND = {
    "subject": "Ramalinaceae",
    "src": "Which family does Ramalinaceae belong to?",
    "pred": "Ramalinales",
    "rephrase": "What family are Ramalinaceae?",
    "alt": "Lamiinae",
    "answers": ["Lecanorales", "Lecanoromycetes"],
    "loc": "nq question: types of skiing in the winter olympics 2018",
    "loc_ans": "Downhill",
    "cond": "Ramalinales >> Lamiinae || Which family does Ramalinaceae belong to?",
}
MALMEN = {"src": "Who is it?", "rephrase": "Who may it be?", "ans": "Çelebi", "loc": "when was it", "loc_ans": "2018"}
ENTITY = {"relation": "P19", "question": "Where was Zoë born?", "subject": "Zoë", "answers": ["Paris", "Lutetia"]}
ORIGINAL_ENTITY = {"question": "Where was Zoë born?", "answers": ["Paris", "Lutetia"]}
NQ = {"question": "when does season 3 start", "answers": ["in 2019", "2019"]}
NQ_TEXT = {"question": "when is it out", "answers": "February 16 , 2018"}
NQ_OPEN = {"question": "when is it out", "answer": ["February 16 , 2018"]}
FEVER = {"claim": "Zoë was born in Paris.", "label": "SUPPORTS"}
FEVER_ORIGINAL = {"id": 7, "claim": "Zoë has never lived.", "label": "REFUTES", "evidence": [[[1, 2, "Zoë", 0]]]}
MEND_FEVER = {  # De Cao et al.'s form: what their model said, and what opposes that
    "id": "7",
    "input": "Zoë was born in Paris.",
    "output": [{"provenance": []}, {"answer": "SUPPORTS", "provenance": []}],
    "prediction": "REFUTES",
    "alternatives": ["SUPPORTS"],
    "filtered_rephrases": ["Paris is where Zoë was born.", "Zoë was born in Paris.", "Paris is where Zoë was born."],
    "logit": -1.5,
}
MEND_ZSRE = {
    "input": "Where was Zoë born?",
    "output": [{"answer": "Paris"}, {"answer": "Lutetia"}],
    "prediction": "Rome",
    "alternatives": ["Lyon", "Nice"],
    "filtered_rephrases": ["What is the birthplace of Zoë?"],
}
MALMEN_FEVER = {
    "prompt": "Zoë was born in Paris.",
    "equiv_prompt": ["Paris is where Zoë was born.", "Zoë's birthplace is Paris."],
    "alt": "REFUTES",
    "unrel_prompt": "The Seine is a lake.",
    "unrel_ans": "REFUTES",
}
COUNTERFACT = {
    "case_id": 3,
    "prompt": "The mother tongue of Zoë is",
    "target_new": "English",
    "subject": "Zoë",
    "ground_truth": "French",
    "rephrase_prompt": "Zoë grew up speaking",
    "locality_prompt": "The mother tongue of Max is",
    "locality_ground_truth": "French",
}
ROME = {
    "case_id": 3,
    "pararel_idx": 4,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Zoë",
    },
    "paraphrase_prompts": ["It rained. Zoë grew up speaking", "Zoë, a native speaker of"],
    "neighborhood_prompts": ["The mother tongue of Max is", "Ann spoke the language"],
    "attribute_prompts": ["Bob speaks"],
    "generation_prompts": ["Zoë likes"],
}
NATIVE = {
    "prompt": "Where was Zoë born?",
    "answer": "Paris",
    "equivalent_prompts": ["What is the birthplace of Zoë?", "Zoë was born where?"],
    "unrelated_prompt": "who sang it",
    "unrelated_answer": "Billy Idol",
    "subject": "Zoë",
    "relation": "P19",
    "alternative": "Rome",
}

ROWS = {
    "mend": (
        MEND,
        Fact(
            MEND["src"],
            "Lecanorales",
            (MEND["rephrase"],),
            "types of skiing in the winter olympics 2018",
            "Downhill",
            subject="Ramalinaceae",
            alternative="Lamiinae",
        ),
    ),
    "malmen": (MALMEN, Fact("Who is it?", "Çelebi", ("Who may it be?",), "when was it", "2018")),
    "entity": (ENTITY, Fact("Where was Zoë born?", "Paris", subject="Zoë", relation="P19")),
    "entity_original": (ORIGINAL_ENTITY, Fact("Where was Zoë born?", "Paris")),
    "nq": (NQ, Fact("when does season 3 start", "in 2019")),
    "nq_text": (NQ_TEXT, Fact("when is it out", "February 16 , 2018")),
    "nq_open": (NQ_OPEN, Fact("when is it out", "February 16 , 2018")),
    "fever": (FEVER, Fact("Zoë was born in Paris.", "SUPPORTS", alternative="REFUTES")),
    "fever_original": (FEVER_ORIGINAL, Fact("Zoë has never lived.", "REFUTES", alternative="SUPPORTS")),
    "mend_fever": (
        MEND_FEVER,
        Fact("Zoë was born in Paris.", "SUPPORTS", ("Paris is where Zoë was born.",), alternative="REFUTES"),
    ),
    "mend_zsre": (
        MEND_ZSRE,
        Fact("Where was Zoë born?", "Paris", ("What is the birthplace of Zoë?",), alternative="Lyon"),
    ),
    "malmen_fever": (
        MALMEN_FEVER,
        Fact(
            "Zoë was born in Paris.",
            "SUPPORTS",
            ("Paris is where Zoë was born.", "Zoë's birthplace is Paris."),
            "The Seine is a lake.",
            "REFUTES",
            alternative="REFUTES",
        ),
    ),
    "counterfact": (
        COUNTERFACT,
        Fact(
            "The mother tongue of Zoë is",
            "English",
            ("Zoë grew up speaking",),
            "The mother tongue of Max is",
            "French",
            subject="Zoë",
            alternative="French",
        ),
    ),
    "rome": (
        ROME,
        Fact(
            "The mother tongue of Zoë is",
            "English",
            ("It rained. Zoë grew up speaking", "Zoë, a native speaker of"),
            "The mother tongue of Max is",
            "French",
            subject="Zoë",
            relation="P103",
            alternative="French",
        ),
    ),
    "native": (
        NATIVE,
        Fact(**{**NATIVE, "equivalent_prompts": tuple(NATIVE["equivalent_prompts"])}),
    ),
    "native_least": ({"prompt": "Who?", "answer": "She"}, Fact("Who?", "She")),
    "native_nulls": (
        {"prompt": "Who?", "answer": "She", "equivalent_prompts": None, "unrelated_prompt": None, "subject": None},
        Fact("Who?", "She"),
    ),
}
LAYOUTS = {
    "list": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "indented": lambda rows: json.dumps(rows, indent=2).encode(),
    "lines": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
    "unended": lambda rows: "\n".join(json.dumps(row) for row in rows).encode(),
    "blank_lines": lambda rows: "\n\n \n".join(json.dumps(row) for row in rows).encode(),
    "crlf": lambda rows: "\r\n".join(json.dumps(row) for row in rows).encode(),
    "bom": lambda rows: b"\xef\xbb\xbf" + "\n".join(json.dumps(row) for row in rows).encode(),
    "bom_list": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode(),
}
WRAPPINGS = {
    "plain": bytes,
    "gz": gzip.compress,
    "xz": lzma.compress,
    "lzma_best": lambda data: lzma.compress(data, preset=9),
}


# The tests run with the types in signatures checked, which catches a wrong type before the module's own check does.
# A user's program runs without, so what happens there to a wrong type is tested on a copy of the module without.
_spec = importlib.util.spec_from_file_location("malmen_repro.unchecked_facts", checked.__file__)
unchecked = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(unchecked)


def written(tmp_path, content, name="facts.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def lines(*rows):
    return LAYOUTS["lines"](rows)


# --- a fact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MEMTI", "did you mean MEMIT?"),
        ("memit", "did you mean MEMIT?"),  # whatever its case
        ("FT-X", "did you mean FT-W or FT-L?"),
        ("zzz", "there are: MEMIT, FT-L, FT-W"),  # nothing is near: all, as they come
        ("", "there are: MEMIT, FT-L, FT-W"),
    ],
)
def test_near_misses(name, said):
    assert near_misses(name, iter(["MEMIT", "FT-L", "FT-W"])) == said


def test_pairs():
    fact = ROWS["native"][1]
    assert fact.pair == ("Where was Zoë born?", "Paris")
    assert fact.equivalent_pairs == (("What is the birthplace of Zoë?", "Paris"), ("Zoë was born where?", "Paris"))
    assert fact.unrelated_pair == ("who sang it", "Billy Idol")
    assert Fact("Who?", "She").unrelated_pair is None
    assert Fact("Who?", "She").equivalent_pairs == ()


def test_texts_stay_as_they_are_and_lists_become_tuples():
    fact = Fact(" Who?\n\n", "\tShe ", (" Which one? ",))
    assert (fact.prompt, fact.answer, fact.equivalent_prompts) == (" Who?\n\n", "\tShe ", (" Which one? ",))
    for prompts in ("Which one?", ["Which one?"]):
        assert unchecked.Fact("Who?", "She", prompts).equivalent_prompts == ("Which one?",)


def test_rows_of_data_sets_are_tidied_and_rows_of_ones_own_are_not(tmp_path):
    own = {"prompt": "<user>Who?\n\n", "answer": " She"}
    (found,) = load_facts(written(tmp_path, json.dumps(own).encode()))
    assert (found.prompt, found.answer) == ("<user>Who?\n\n", " She")
    zsre = {"src": " Who? ", "ans": " She ", "rephrase": " Which one? "}
    zsre |= {"loc": " nq question: who sang", "loc_ans": " He "}
    (found,) = load_facts(written(tmp_path, json.dumps(zsre).encode()))
    assert found.pair == ("Who?", "She") and found.equivalent_prompts == ("Which one?",)
    assert found.unrelated_pair == ("who sang", "He")


def test_a_text_whose_name_says_packed_is_not_read_as_plain(tmp_path):
    for suffix in ("gz", "xz"):
        with pytest.raises(FactFileError, match=f"its name says {suffix}"):
            checked.text_lines(written(tmp_path, b"plain", f"text.{suffix}"))


def test_a_fact_is_frozen_hashable_and_picklable():
    fact = ROWS["native"][1]
    with pytest.raises(FrozenInstanceError):
        fact.answer = "Rome"
    assert len({fact, replace(fact), replace(fact, answer="Rome")}) == 2
    assert pickle.loads(pickle.dumps(fact)) == fact


def test_the_source_is_not_compared():
    assert Fact("Who?", "She", source="a.jsonl, line 1") == Fact("Who?", "She", source="b.jsonl, line 9")
    assert "line 1" not in repr(Fact("Who?", "She", source="a.jsonl, line 1"))


FIELDS = ["prompt", "answer", "unrelated_prompt", "unrelated_answer", "subject", "relation", "alternative"]


@pytest.mark.parametrize("field", [*FIELDS, "equivalent_prompts"])
@pytest.mark.parametrize("value", ["", " \n", 7, 1.5, True, {"a": 1}, [""], [3], [None], "\ud800"])
def test_fact_refuses_empty_and_non_text_fields(field, value):
    with pytest.raises(unchecked.FactRowError) as caught:
        unchecked.Fact(**NATIVE | {field: value})
    assert caught.value.field == field and field in str(caught.value)


@pytest.mark.parametrize("field", ["prompt", "answer", "unrelated_prompt", "unrelated_answer", "equivalent_prompts"])
def test_fact_needs_its_fields(field):
    with pytest.raises(unchecked.FactRowError) as caught:
        unchecked.Fact(**NATIVE | {field: None})
    assert caught.value.field == field


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [FactFileError, FactRowError, NoFactsError, ConflictingFactsError, TemplateError], ids=lambda e: e.__name__
)
def test_error_family(error):
    assert issubclass(error, FactError) and issubclass(error, MalmenError) and issubclass(error, ValueError)


@pytest.mark.parametrize(
    "error",
    [FactFileError("is odd", "a.json"), FactRowError("is odd", "a.json", "line 3", "src"), FactRowError("is odd")],
)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


def test_row_error_names_all_it_knows():
    assert str(FactRowError("is odd", "a.json", "line 3", "src")) == "a.json, line 3, field 'src': is odd"
    assert str(FactRowError("is odd", field="src")) == "field 'src': is odd"
    assert str(FactRowError("is odd")) == "is odd"


# --- every format in every layout and wrapping ------------------------------------------------------------------------


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROWS)
def test_formats(tmp_path, name, layout, wrapping):
    row, fact = ROWS[name]
    path = written(tmp_path, WRAPPINGS[wrapping](LAYOUTS[layout]([row, row, row])), "facts")
    assert load_facts(path) == [fact] * 3
    assert load_facts(str(path), limit=2) == [fact] * 2


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".gz", ".xz", ".txt", ""])
def test_the_name_of_the_file_does_not_matter(tmp_path, suffix):
    for wrap in WRAPPINGS.values():
        assert load_facts(written(tmp_path, wrap(lines(NQ)), "facts" + suffix)) == [ROWS["nq"][1]]


def test_concatenated_gzip_members_and_xz_streams(tmp_path):
    for wrap in (gzip.compress, lzma.compress):
        assert len(load_facts(written(tmp_path, wrap(lines(NQ)) + wrap(lines(ENTITY))))) == 2


def test_formats_may_be_mixed(tmp_path):
    rows, facts = zip(*ROWS.values(), strict=True)
    assert load_facts(written(tmp_path, lines(*rows))) == list(facts)


def test_rephrase_may_be_a_list(tmp_path):
    path = written(tmp_path, lines(MEND | {"rephrase": ["One?", "Two?"]}, MALMEN | {"rephrase": ["Three?"]}))
    assert [fact.equivalent_prompts for fact in load_facts(path)] == [("One?", "Two?"), ("Three?",)]


def test_line_separators_of_unicode_do_not_cut_a_row(tmp_path):
    row = {"prompt": "a\u2028b\u0085c\x0bd", "answer": "e\u2029f"}
    path = written(tmp_path, lines(row))
    assert load_facts(path)[0].pair == (row["prompt"], row["answer"])


def test_sources_name_file_and_row(tmp_path):
    path = written(tmp_path, b"\n" + lines(NQ) + b"\n" + lines(NQ), "some.jsonl")
    assert [fact.source for fact in load_facts(path)] == ["some.jsonl, line 2", "some.jsonl, line 4"]
    path = written(tmp_path, LAYOUTS["list"]([NQ, NQ]), "some.json")
    assert [fact.source for fact in load_facts(path)] == ["some.json, item 0", "some.json, item 1"]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "correct"), [(MEND, "Lecanorales"), (NATIVE, "Paris")])
def test_alternative_answer(tmp_path, row, correct):
    path = written(tmp_path, lines(row))
    alternative = row.get("alt", row.get("alternative"))
    fact = load_facts(path, answer="correct")[0]
    assert (fact.answer, fact.alternative) == (correct, alternative)
    fact = load_facts(path, answer="alternative")[0]
    assert (fact.answer, fact.alternative) == (alternative, correct)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (MEND | {"alt": ""}, "alt"),
        (MEND | {"alt": " "}, "alt"),
        (MEND | {"alt": None}, "alt"),
        ({k: v for k, v in MEND.items() if k != "alt"}, "alt"),
        (MALMEN, "alt"),
        (NQ, "alternative"),
        (ENTITY, "alternative"),
        ({"prompt": "Who?", "answer": "She"}, "alternative"),
    ],
)
def test_alternative_missing_matters_only_when_asked_for(tmp_path, row, field):
    path = written(tmp_path, lines(row))
    assert load_facts(path)[0].alternative is None
    with pytest.raises(FactRowError) as caught:
        load_facts(path, answer="alternative")
    assert (caught.value.file, caught.value.row, caught.value.field) == (str(path), "line 1", field)


def test_nq_prefix(tmp_path):
    path = written(tmp_path, lines(MEND, MALMEN, NATIVE | {"unrelated_prompt": "nq question: who sang it"}))
    expected = ["types of skiing in the winter olympics 2018", "when was it", "who sang it"]
    assert [fact.unrelated_prompt for fact in load_facts(path)] == expected
    kept = [fact.unrelated_prompt for fact in load_facts(path, strip_nq_prefix=False)]
    assert kept == ["nq question: " + expected[0], expected[1], "nq question: " + expected[2]]


@pytest.mark.parametrize("bare", ["nq question: ", "nq question:   "])
def test_nothing_left_behind_the_nq_prefix_is_an_empty_field(tmp_path, bare):
    with pytest.raises(FactRowError, match="line 1"):
        load_facts(written(tmp_path, lines(NATIVE | {"unrelated_prompt": bare})))


def test_limit(tmp_path):
    path = written(tmp_path, lines(NQ, ENTITY, MEND) + b"not JSON")
    assert [fact.prompt for fact in load_facts(path, limit=2)] == [NQ["question"], ENTITY["question"]]
    assert len(load_facts(path, limit=3)) == 3
    with pytest.raises(FactFileError, match="line 4"):
        load_facts(path, limit=4)
    assert len(load_facts(written(tmp_path, lines(NQ)), limit=99)) == 1


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"limit": -1}, {"answer": "wrong"}, {"answer": None}, {"on_bad_row": "ignore"}]
)
def test_bad_options(tmp_path, options):
    with pytest.raises(unchecked.FactError) as caught:
        unchecked.load_facts(written(tmp_path, lines(NQ)), **options)
    assert next(iter(options)) in str(caught.value)


def test_bad_rows_can_be_skipped_but_not_in_silence(tmp_path):
    path = written(tmp_path, lines(MEND | {"alt": ""}, MEND, MEND | {"src": 3}, MEND))
    with pytest.warns(FactWarning, match=r"2 bad rows left out; the first: .*line 1, field 'alt'"):
        facts = load_facts(path, answer="alternative", on_bad_row="skip")
    assert [fact.source[-6:] for fact in facts] == ["line 2", "line 4"]
    with pytest.warns(FactWarning, match="1 bad rows"):
        assert len(load_facts(path, on_bad_row="skip", limit=3)) == 3


def test_skipping_everything_leaves_no_facts(tmp_path):
    path = written(tmp_path, lines(MALMEN))
    with pytest.warns(FactWarning), pytest.raises(NoFactsError, match="only bad rows"):
        load_facts(path, answer="alternative", on_bad_row="skip")


# --- bad files --------------------------------------------------------------------------------------------------------

NAMES = {"gz": "cut.jsonl.gz", "xz": "cut.jsonl.xz"}


@pytest.mark.parametrize("skip", ["raise", "skip"])
@pytest.mark.parametrize("wrapping", NAMES)
@pytest.mark.parametrize("kept", [7, 20, 0.5, -20, -9, -1])
def test_truncated_compression(tmp_path, wrapping, kept, skip):
    whole = WRAPPINGS[wrapping](lines(*[MEND | {"subject": str(i)} for i in range(200)]))
    kept = int(len(whole) * kept) if isinstance(kept, float) else kept
    path = written(tmp_path, whole[:kept], NAMES[wrapping])
    with pytest.raises(FactFileError) as caught:
        load_facts(path, limit=1, on_bad_row=skip)
    assert caught.value.file == str(path) and str(path) in str(caught.value)


@pytest.mark.parametrize("wrapping", NAMES)
def test_flipped_byte_in_compression(tmp_path, wrapping):
    whole = bytearray(WRAPPINGS[wrapping](lines(*[MEND | {"subject": str(i)} for i in range(200)])))
    whole[len(whole) // 2] ^= 0xFF
    with pytest.raises(FactFileError):
        load_facts(written(tmp_path, bytes(whole)))


@pytest.mark.parametrize("layout", ["list", "indented", "lines", "crlf", "bom"])
def test_truncated_json(tmp_path, layout):
    whole = LAYOUTS[layout]([MEND, MEND]).rstrip()
    for cut in (1, 2, 30, len(whole) // 4):
        path = written(tmp_path, whole[:-cut])
        with pytest.raises(FactFileError, match=r"line \d+, column \d+"):
            load_facts(path, on_bad_row="skip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question": "où"}]'.encode("latin-1"), "UTF-8"),
        (lines(NQ).decode().encode("utf-16"), "UTF-8"),
        (gzip.compress("où".encode("latin-1")), "UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "UTF-8"),
        (b"question,answers\nwho,she\n", "line 1, column 1"),
        (lines(NQ) + b"\n\n{oops}\n", "line 4, column 2"),
        (b'[\n{"question": "who",\n oops}]', "line 3, column 2"),
        (lines(NQ)[:-1] + b" " + lines(NQ), "line 1"),
        (b"[" * 100_000, "line 1"),
        (b'{"question": ' + b"9" * 5_000 + b"}", "line 1"),
        (b"PK\x03\x04 an archive", "line 1"),
    ],
    ids=["latin1", "utf16", "latin1-gz", "png", "csv", "bad-line", "bad-list", "two-a-line", "deep", "long", "zip"],
)
def test_damaged_content(tmp_path, content, message):
    with pytest.raises(FactFileError, match=message):
        load_facts(written(tmp_path, content))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FactFileError, match="no such file"):
        load_facts(tmp_path / "nowhere.jsonl")
    with pytest.raises(FactFileError, match="cannot be read"):
        load_facts(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    path = written(tmp_path, lines(NQ))
    path.chmod(0)
    with pytest.raises(FactFileError, match="cannot be read"):
        load_facts(path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b" [ ] ", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_no_facts(tmp_path, content, wrapping):
    with pytest.raises(NoFactsError, match="holds no facts"):
        load_facts(written(tmp_path, WRAPPINGS[wrapping](content)))


# --- bad rows ---------------------------------------------------------------------------------------------------------

REQUIRED = [
    *((MEND, field) for field in ("src", "rephrase", "answers", "loc", "loc_ans")),
    *((MALMEN, field) for field in ("src", "rephrase", "loc", "loc_ans")),
    *((ENTITY, field) for field in ("question", "answers")),
    *((NATIVE, field) for field in ("prompt", "answer")),
]
OPTIONAL = [(MEND, "alt"), (MEND, "subject"), (ENTITY, "subject"), (ENTITY, "relation")]
LISTS = {"rephrase", "answers", "ans", "answer", "equivalent_prompts"}


def refused_row(tmp_path, row, layout="lines"):
    path = written(tmp_path, LAYOUTS[layout]([NQ, NQ, row]))
    with pytest.raises(FactRowError) as caught:
        load_facts(path)
    assert caught.value.file == str(path) and str(path) in str(caught.value)
    assert caught.value.row == ("item 2" if layout == "list" else "line 3")
    assert caught.value.row in str(caught.value)
    return caught.value


@pytest.mark.parametrize("layout", ["list", "lines"])
@pytest.mark.parametrize(("row", "field"), REQUIRED)
def test_missing_field(tmp_path, row, field, layout):
    for bad in ({k: v for k, v in row.items() if k != field}, row | {field: None}):
        error = refused_row(tmp_path, bad, layout)
        assert (error.field or field) == field and ("missing" in str(error) or "no known format" in str(error))


@pytest.mark.parametrize(("row", "field"), REQUIRED)
def test_missing_field_is_named(tmp_path, row, field):
    assert refused_row(tmp_path, row | {field: None}).field == field


@pytest.mark.parametrize("value", ["", "  ", 3, False, {"a": "b"}, "\ud800"], ids=repr)
@pytest.mark.parametrize(("row", "field"), [*REQUIRED, (MALMEN, "ans"), (NQ_OPEN, "answer")])
def test_empty_or_non_text_field(tmp_path, row, field, value):
    path = written(tmp_path, LAYOUTS["unended"]([NQ, NQ, row | {field: value}]))
    with pytest.raises(FactRowError) as caught:
        load_facts(path)
    assert (caught.value.file, caught.value.row, caught.value.field) == (str(path), "line 3", field)


@pytest.mark.parametrize("value", [3, ["a"], {"a": "b"}], ids=repr)
@pytest.mark.parametrize(("row", "field"), OPTIONAL)
def test_optional_field_of_another_type(tmp_path, row, field, value):
    assert refused_row(tmp_path, row | {field: value}).field == field


@pytest.mark.parametrize(("row", "field"), OPTIONAL)
def test_optional_field_may_be_absent_or_empty(tmp_path, row, field):
    for odd in ({k: v for k, v in row.items() if k != field}, row | {field: ""}, row | {field: None}):
        name = "alternative" if field == "alt" else field
        assert getattr(load_facts(written(tmp_path, lines(odd)))[0], name) is None


@pytest.mark.parametrize(
    ("row", "field"),
    [(MEND, "rephrase"), (MEND, "answers"), (MALMEN, "ans"), (ENTITY, "answers"), (NQ_OPEN, "answer")],
)
def test_bad_lists(tmp_path, row, field):
    assert "empty list" in str(refused_row(tmp_path, row | {field: []}))
    for bad, problem in ((["a", ""], "item 1 is empty"), (["a", "b", 3], "item 2 must be text, is int")):
        error = refused_row(tmp_path, row | {field: bad})
        assert error.field == field and problem in str(error)


@pytest.mark.parametrize("row", [["who", "she"], "who", 3, None, True, []], ids=repr)
@pytest.mark.parametrize("layout", ["list", "lines"])
def test_row_that_is_no_object(tmp_path, row, layout):
    assert "JSON object" in str(refused_row(tmp_path, row, layout))


@pytest.mark.parametrize(
    "row",
    [
        {"text": "It is.", "verdict": "SUPPORTS"},
        {"known_id": 3, "prompt": "The mother tongue of Zoë is", "attribute": "English", "subject": "Zoë"},
        {"relation": "P19", "subject": "Zoë", "object": "Paris"},
        {},
    ],
    ids=["other_claims", "known", "pararel", "empty"],
)
def test_unknown_format_names_keys_and_known_formats(tmp_path, row):
    message = str(refused_row(tmp_path, row))
    if row:
        assert "no known format" in message and all(key in message for key in row)
        assert all(word in message for word in ("MEND", "MALMEN", "EntityQuestions", "NQ", "FEVER", "CounterFact"))
        assert "equivalent_prompts" in message


def test_misspelt_field_of_a_fact(tmp_path):
    error = refused_row(tmp_path, NATIVE | {"equivalent_prompt": ["Who?"]})
    assert error.field == "equivalent_prompt" and "equivalent_prompts" in str(error)


@pytest.mark.parametrize("field", ["unrelated_prompt", "unrelated_answer"])
def test_half_an_unrelated_pair(tmp_path, field):
    assert refused_row(tmp_path, {k: v for k, v in NATIVE.items() if k != field}).field == field


# --- claims and CounterFact ------------------------------------------------------------------------------------------

NEW_REQUIRED = [
    *((FEVER, name) for name in ("claim", "label")),
    *((MEND_FEVER, name) for name in ("input", "output")),
    *((MALMEN_FEVER, name) for name in MALMEN_FEVER),
    *((COUNTERFACT, name) for name in COUNTERFACT if name != "case_id"),
    *((ROME, name) for name in ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")),
]


@pytest.mark.parametrize(("row", "field"), NEW_REQUIRED)
def test_missing_or_odd_field_of_the_newer_formats(tmp_path, row, field):
    assert refused_row(tmp_path, row | {field: None}).field == field
    assert refused_row(tmp_path, {k: v for k, v in row.items() if k != field}).field == field
    for bad in ("" if field not in ("alt", "label", "unrel_ans") else "NOT ENOUGH INFO", 3, {"a": 1}):
        assert refused_row(tmp_path, row | {field: bad}).field in (field, "prompt")


@pytest.mark.parametrize("row", [FEVER, FEVER_ORIGINAL, MALMEN_FEVER], ids=["fever", "original", "malmen"])
@pytest.mark.parametrize("label", ["NOT ENOUGH INFO", "supports", "", 0, 1.0, True, ["SUPPORTS"]], ids=repr)
def test_labels(tmp_path, row, label):
    field = "alt" if "alt" in row else "label"
    error = refused_row(tmp_path, row | {field: label})
    assert error.field == field and "SUPPORTS or REFUTES" in str(error)
    assert ("which class a number means" in str(error)) == isinstance(label, (int, float))


def test_claims_without_a_verdict_can_be_skipped(tmp_path):
    path = written(tmp_path, lines(FEVER, FEVER | {"label": "NOT ENOUGH INFO"}, FEVER_ORIGINAL))
    with pytest.warns(FactWarning, match="1 bad rows"):
        assert [fact.answer for fact in load_facts(path, on_bad_row="skip")] == ["SUPPORTS", "REFUTES"]


def test_the_alternative_of_a_label_opposes_the_label_not_the_prediction(tmp_path):
    fact = load_facts(written(tmp_path, lines(MEND_FEVER)), answer="alternative")[0]
    assert (fact.answer, fact.alternative) == ("REFUTES", "SUPPORTS")


@pytest.mark.parametrize("rephrases", [None, [], ["Zoë was born in Paris."]])
def test_rephrases_may_be_missing_or_repeat_the_claim(tmp_path, rephrases):
    row = MEND_FEVER | {"filtered_rephrases": rephrases}
    assert load_facts(written(tmp_path, lines(row)))[0].equivalent_prompts == ()
    plain = {name: MEND_FEVER[name] for name in ("id", "input", "output")}  # as KILT distributes it
    assert load_facts(written(tmp_path, lines(plain)))[0].pair == (FEVER["claim"], "SUPPORTS")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("output", "Paris", "list of objects"),
        ("output", ["Paris"], "list of objects"),
        ("output", [], "holds no answer"),
        ("output", [{"provenance": []}], "holds no answer"),
        ("output", [{"answer": 3}], "must be text"),
        ("alternatives", [3], "item 0 must be text"),
        ("filtered_rephrases", ["a", ""], "item 1 is empty"),
        ("filtered_rephrases", 3, "text or a list of texts"),
    ],
)
def test_odd_back_translated_rows(tmp_path, field, value, problem):
    error = refused_row(tmp_path, MEND_ZSRE | {field: value})
    assert error.field == field and problem in str(error)


def test_a_kilt_row_without_alternatives_has_none(tmp_path):
    path = written(tmp_path, lines(MEND_ZSRE | {"alternatives": []}))
    assert load_facts(path)[0].alternative is None
    with pytest.raises(FactRowError, match="alternative"):
        load_facts(path, answer="alternative")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": "The mother tongue is"}, "prompt"),
        ({"prompt": "{} and {}"}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"subject": ""}, "subject"),
        ({"subject": None}, "subject"),
        ({"target_new": {"id": "Q1"}}, "str"),
        ({"target_true": None}, "target_true"),
        ({"target_true": {"str": " "}}, "target_true"),
    ],
)
def test_odd_rewrites(tmp_path, changes, field):
    row = ROME | {"requested_rewrite": ROME["requested_rewrite"] | changes}
    assert refused_row(tmp_path, row).field == field


def test_a_subject_with_braces(tmp_path):
    row = ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"subject": "{x} {}"}}
    assert load_facts(written(tmp_path, lines(row)))[0].prompt == "The mother tongue of {x} {} is"


def test_counterfact_can_be_edited_towards_the_truth(tmp_path):
    for row in (COUNTERFACT, ROME):
        fact = load_facts(written(tmp_path, lines(row)), answer="alternative")[0]
        assert (fact.answer, fact.alternative) == ("French", "English")


def test_flipped():
    claims = [ROWS["fever"][1], ROWS["malmen_fever"][1], Fact("Zoë lives.", "REFUTES")]
    turned = flipped(claims)
    assert [fact.answer for fact in turned] == ["REFUTES", "REFUTES", "SUPPORTS"]
    assert [fact.alternative for fact in turned] == ["SUPPORTS", "SUPPORTS", "REFUTES"]
    for before, after in zip(claims, turned, strict=True):
        assert replace(after, answer=before.answer, alternative=before.alternative) == before
        assert after.unrelated_pair == before.unrelated_pair
    assert flipped([]) == []


def test_flipping_what_is_no_claim():
    with pytest.raises(FactError, match="a.jsonl, line 7: the answer 'Paris' is no label"):
        flipped([Fact("Where?", "Paris", source="a.jsonl, line 7")])
    with pytest.raises(FactError, match="'Where\\?'"):
        flipped([Fact("Where?", "Paris")])


def test_other_label():
    assert [other_label(label) for label in LABELS] == ["REFUTES", "SUPPORTS"]
    with pytest.raises(FactError, match="'maybe'"):
        other_label("maybe")


# --- saving -----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
MAYBE = st.none() | TEXT


VALUES = st.tuples(
    st.tuples(TEXT, TEXT, st.lists(TEXT, max_size=3).map(tuple)),
    st.tuples(TEXT, TEXT) | st.just((None, None)),
    st.tuples(MAYBE, MAYBE, MAYBE),
)


@given(rows=st.lists(VALUES, min_size=1, max_size=5), suffix=st.sampled_from(["", ".gz", ".xz"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_saved_is_loaded(tmp_path, rows, suffix):
    facts = [Fact(*edit, *unrelated, *rest) for edit, unrelated, rest in rows]
    path = tmp_path / f"facts.jsonl{suffix}"
    save_facts(facts, path)
    assert load_facts(path, strip_nq_prefix=False) == facts


@pytest.mark.parametrize(("suffix", "start"), [(".gz", b"\x1f\x8b"), (".xz", b"\xfd7zXZ"), (".jsonl", b"{")])
def test_the_suffix_chooses_the_compression(tmp_path, suffix, start):
    facts = [fact for _, fact in ROWS.values()]
    path = tmp_path / f"facts{suffix}"
    save_facts(facts, path)
    first = path.read_bytes()
    assert first.startswith(start) and load_facts(path) == facts
    save_facts(facts, path)
    assert path.read_bytes() == first  # no time of day in it
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_saved_rows_hold_no_empty_fields(tmp_path):
    save_facts([Fact("Who?", "Çelebi", source="x")], tmp_path / "facts.jsonl")
    assert (tmp_path / "facts.jsonl").read_text(encoding="utf-8") == '{"prompt": "Who?", "answer": "Çelebi"}\n'


def test_save_refuses_nothing_and_nowhere(tmp_path):
    with pytest.raises(NoFactsError):
        save_facts([], tmp_path / "facts.jsonl")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FactFileError, match="cannot be written"):
        save_facts([Fact("Who?", "She")], tmp_path / "no" / "such" / "facts.jsonl")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "facts.jsonl"
    save_facts([Fact("Who?", "She")], path)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(FactFileError, match="No space left"):
        save_facts([Fact("Who?", "He")] * 9, path)
    assert load_facts(path) == [Fact("Who?", "She")]


# --- conflicts --------------------------------------------------------------------------------------------------------


def test_check_facts_lets_sound_facts_and_repeats_through():
    facts = [fact for _, fact in ROWS.values() if fact.prompt not in ("Who?", "Where was Zoë born?")]
    assert check_facts(drop_repeats(facts)) is None
    check_facts([facts[0], replace(facts[0], subject="another")])


def test_check_facts_refuses_nothing():
    with pytest.raises(NoFactsError):
        check_facts([])


@pytest.mark.parametrize("thing", [("Who?", "She"), "Who?", None, {"prompt": "Who?", "answer": "She"}])
def test_check_facts_refuses_what_is_no_fact(thing):
    with pytest.raises(unchecked.FactError, match="item 1 .* not a Fact"):
        unchecked.check_facts([unchecked.Fact("Who?", "She"), thing])


def test_conflict_names_both_rows(tmp_path):
    rows = [{"question": "Who?", "answers": [a]} for a in ("She", "She", "He")]
    facts = load_facts(written(tmp_path, lines(NQ, *rows), "some.jsonl"))
    with pytest.raises(ConflictingFactsError) as caught:
        check_facts(facts)
    message = str(caught.value)
    assert all(part in message for part in ("'Who?'", "'She'", "'He'", "some.jsonl, line 2", "some.jsonl, line 4"))


def test_conflict_of_facts_made_by_hand():
    with pytest.raises(ConflictingFactsError, match=r"fact 0.*fact 2"):
        check_facts([Fact("Who?", "She"), Fact("What?", "It"), Fact(" Who? ", "He")])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), max_size=8))
def test_drop_conflicts_leaves_what_check_facts_accepts(pairs):
    facts = [Fact(*pair) for pair in pairs]
    kept, dropped = drop_conflicts(facts)
    assert sorted(map(id, kept + dropped)) == sorted(map(id, facts))
    assert not {fact.prompt for fact in kept} & {fact.prompt for fact in dropped}
    if kept:
        check_facts(kept)
    for fact in dropped:
        assert any(other.prompt == fact.prompt and other.answer != fact.answer for other in dropped)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), max_size=8))
def test_drop_repeats_keeps_each_pair_once_in_order(pairs):
    assert [fact.pair for fact in drop_repeats([Fact(*pair) for pair in pairs])] == list(dict.fromkeys(pairs))


def test_drop_repeats_keeps_the_first():
    assert drop_repeats([Fact("Who?", "She", subject="1"), Fact("Who?", "She", subject="2")])[0].subject == "1"


# --- unrelated pairs --------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 30), size=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_pairs_are_dealt_evenly(count, size, seed):
    facts = [Fact(f"prompt {i}", "answer") for i in range(count)]
    deck = [(f"unrelated {i}", f"{i}") for i in range(size)]
    paired = pair_unrelated(facts, deck, seed)
    assert [fact.pair for fact in paired] == [fact.pair for fact in facts]
    counts = [sum(fact.unrelated_pair == pair for fact in paired) for pair in deck]
    assert sum(counts) == count and max(counts) - min(counts) <= 1
    assert paired == pair_unrelated(facts, deck, seed)


def test_the_seed_matters_and_facts_serve_as_pairs():
    facts = [Fact(f"prompt {i}", "answer") for i in range(20)]
    deck = [Fact(f"unrelated {i}", f"{i}", unrelated_prompt="x", unrelated_answer="y") for i in range(20)]
    assert pair_unrelated(facts, deck, 1) != pair_unrelated(facts, deck, 2)
    assert pair_unrelated(facts, deck, 1) == pair_unrelated(facts, [fact.pair for fact in deck], 1)
    assert {fact.unrelated_pair for fact in pair_unrelated(facts, deck)} == {fact.pair for fact in deck}


def test_what_is_edited_is_not_unrelated():
    facts = [Fact("Who?", "She", ("Which one?",)), Fact("What?", "It", unrelated_prompt="a", unrelated_answer="b")]
    deck = [("Who?", "He"), ("Which one?", "He"), ("When?", "Now")]
    assert {fact.unrelated_pair for fact in pair_unrelated(facts, deck)} == {("When?", "Now")}
    for useless in (deck[:2], []):
        with pytest.raises(NoFactsError, match=f"none of the {len(useless)} unrelated"):
            pair_unrelated(facts, useless)


def test_a_bad_pair_is_refused():
    with pytest.raises(FactRowError):
        pair_unrelated([Fact("Who?", "She")], [("When?", " ")])


def test_no_facts_to_pair():
    assert pair_unrelated([], [("When?", "Now")]) == []


# --- templates --------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "P17": "Which country is [X] located in?",
    "P19": "Where was [X] born?",
    "P20": "Where did [X] die?",
    "P26": "Who is [X] married to?",
    "P36": "What is the capital of [X]?",
    "P40": "Who is [X]'s child?",
    "P50": "Who is the author of [X]?",
    "P69": "Where was [X] educated?",
    "P106": "What kind of work does [X] do?",
    "P112": "Who founded [X]?",
    "P127": "Who owns [X]?",
    "P131": "Where is [X] located?",
    "P136": "What type of music does [X] play?",
    "P159": "Where is the headquarter of [X]?",
    "P170": "Who was [X] created by?",
    "P175": "Who performed [X]?",
    "P176": "Which company is [X] produced by?",
    "P264": "What music label is [X] represented by?",
    "P276": "Where is [X] located?",
    "P407": "Which language was [X] written in?",
    "P413": "What position does [X] play?",
    "P495": "Which country was [X] created in?",
    "P740": "Where was [X] founded?",
    "P800": "What is [X] famous for?",
}


def plain(text):
    return "".join(c for c in text.casefold() if c not in string.punctuation.replace("[]", "")).split()


def test_templates_cover_the_relations_of_entity_questions():
    assert set(ENTITY_QUESTION_TEMPLATES) == set(QUESTIONS)
    assert all(len(texts) >= 6 for texts in ENTITY_QUESTION_TEMPLATES.values())


@pytest.mark.parametrize("relation", QUESTIONS)
def test_templates_are_tidy_questions(relation):
    for text in ENTITY_QUESTION_TEMPLATES[relation]:
        assert text == " ".join(text.split()) and text.endswith("?") and text.count("[X]") == 1
        assert text[0].isupper() or text.startswith("[X]")


def test_no_two_templates_and_no_question_are_alike():
    every = [plain(text) for texts in ENTITY_QUESTION_TEMPLATES.values() for text in texts]
    assert len(set(map(tuple, every))) == len(every)
    assert not {tuple(plain(text)) for text in QUESTIONS.values()} & set(map(tuple, every))


@pytest.mark.parametrize("relation", QUESTIONS)
def test_the_last_template_is_held_out(relation):
    texts = ENTITY_QUESTION_TEMPLATES[relation]
    assert HELD_OUT_TEMPLATES[relation] == (texts[HELD_OUT],) == texts[-1:]
    assert TRAINING_TEMPLATES[relation] == texts[:-1]
    assert TRAINING_TEMPLATES[relation] + HELD_OUT_TEMPLATES[relation] == texts


@pytest.mark.parametrize("relation", QUESTIONS)
def test_a_held_out_template_has_a_word_of_its_own(relation):
    others = {word for text in (*TRAINING_TEMPLATES[relation], QUESTIONS[relation]) for word in plain(text)}
    assert set(plain(HELD_OUT_TEMPLATES[relation][0])) - others


def asked(relation, subject="Zoë Dupont"):
    return Fact(QUESTIONS[relation].replace("[X]", subject), "Paris", subject=subject, relation=relation)


@pytest.mark.parametrize("relation", QUESTIONS)
def test_all_templates_in_order(relation):
    fact = add_rephrases([asked(relation)])[0]
    expected = tuple(text.replace("[X]", "Zoë Dupont") for text in ENTITY_QUESTION_TEMPLATES[relation])
    assert fact.equivalent_prompts == expected
    assert fact == replace(asked(relation), equivalent_prompts=expected)


@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    subjects=st.lists(TEXT.map(str.strip), min_size=1, max_size=6),
    relation=st.sampled_from(list(QUESTIONS)),
)
@settings(deadline=None)
def test_drawn_rephrases(count, seed, subjects, relation):
    facts = [asked(relation, subject) for subject in subjects]
    drawn = add_rephrases(facts, TRAINING_TEMPLATES, count=count, seed=seed)
    for fact, before in zip(drawn, facts, strict=True):
        every = [text.replace("[X]", fact.subject).strip() for text in TRAINING_TEMPLATES[relation]]
        assert len(fact.equivalent_prompts) == min(count, 5) == len(set(fact.equivalent_prompts))
        assert set(fact.equivalent_prompts) <= set(every) and fact.prompt not in fact.equivalent_prompts
        # What one fact gets doesn't depend on the others.
        assert add_rephrases([before], TRAINING_TEMPLATES, count=count, seed=seed) == [fact]


def test_the_seed_chooses_the_rephrases():
    facts = [asked("P19", f"Zoë {i}") for i in range(20)]
    assert add_rephrases(facts, count=2, seed=1) == add_rephrases(facts, count=2, seed=1)
    assert add_rephrases(facts, count=2, seed=1) != add_rephrases(facts, count=2, seed=2)


def test_the_prompt_and_what_is_there_are_not_added():
    templates = {"P19": ["Where was [X] born?", "[X] was born where?", "[X] was born where?", "Where is [X] from?"]}
    fact = replace(asked("P19", "Zoë"), equivalent_prompts=("Where is Zoë from?",))
    assert add_rephrases([fact], templates)[0].equivalent_prompts == ("Where is Zoë from?", "Zoë was born where?")
    assert add_rephrases([fact], templates, count=3)[0].equivalent_prompts[1:] == ("Zoë was born where?",)


def test_a_subject_with_the_mark_in_it():
    fact = add_rephrases([asked("P19", "the [X] files")], {"P19": ["Birth of [X]?"]})[0]
    assert fact.equivalent_prompts == ("Birth of the [X] files?",)


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        (Fact("Who?", "She", relation="P19", source="a.jsonl, line 7"), "a.jsonl, line 7: the fact has no subject"),
        (Fact("Who?", "She", subject="Zoë"), "'Who\\?': the fact has no relation"),
        (Fact("Who?", "She", subject="Zoë", relation="P1"), "no templates for the relation 'P1'"),
    ],
)
def test_facts_that_no_template_fits(fact, message):
    with pytest.raises(TemplateError, match=message):
        add_rephrases([fact])


@pytest.mark.parametrize("templates", [{"P19": "Where was [X] born?"}, {"P19": ["Where?"]}, {"P19": [3]}])
def test_bad_templates(templates):
    fact = unchecked.Fact("Where was Zoë born?", "Paris", subject="Zoë", relation="P19")
    with pytest.raises(unchecked.TemplateError, match="P19 must have a list of texts"):
        unchecked.add_rephrases([fact], templates)


@pytest.mark.parametrize("count", [0, -2])
def test_bad_count(count):
    with pytest.raises(TemplateError, match="count"):
        add_rephrases([asked("P19")], count=count)


# --- splits -----------------------------------------------------------------------------------------------------------


@given(subjects=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), seed=st.integers(0, 99), data=st.data())
def test_split_by_subject(subjects, seed, data):
    facts = [Fact(f"{i}?", "answer", subject=subject) for i, subject in enumerate(subjects)]
    sizes = data.draw(st.lists(st.integers(0, len(facts)), min_size=1, max_size=3))
    try:
        parts = split_facts(facts, sizes, seed)
    except FactError as error:
        assert "ask for fewer" in str(error)
        return
    assert [len(part) for part in parts] == sizes
    seen = [fact for part in parts for fact in part]
    assert len(set(seen)) == len(seen) and set(seen) <= set(facts)
    subjects_of = [{fact.subject for fact in part} for part in parts]
    assert sum(map(len, subjects_of)) == len(set().union(*subjects_of))
    assert parts == split_facts(facts, sizes, seed)


def test_split_by_prompt_when_there_is_no_subject():
    facts = [Fact(f"{i // 2}?", f"{i}") for i in range(20)]
    first, second = split_facts(facts, (10, 10))
    assert not {fact.prompt for fact in first} & {fact.prompt for fact in second}
    assert split_facts(facts, (10, 10), seed=1) != [first, second]


def test_split_of_too_few():
    with pytest.raises(FactError, match="3 facts give parts of 2, 1, not 2, 2"):
        split_facts([Fact(f"{i}?", "x") for i in range(3)], (2, 2))


# --- ordinary text ----------------------------------------------------------------------------------------------------


def test_lines_of_text(tmp_path):
    plain, packed, cut = (tmp_path / name for name in ("a.txt", "a.txt.xz", "b.txt.xz"))
    plain.write_text("  One line. \n\n\t\nÄnother.", encoding="utf-8")
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert checked.text_lines(plain) == checked.text_lines(packed) == ["One line.", "Änother."]
    cut.write_bytes(packed.read_bytes()[:-20])
    (tmp_path / "latin.txt").write_bytes("Ä".encode("latin-1"))
    for bad in (cut, tmp_path / "latin.txt", tmp_path / "missing.txt"):
        with pytest.raises(FactFileError, match=bad.name):
            checked.text_lines(bad)


# --- sizes, and what is no file ---------------------------------------------------------------------------------------


def packed_again_and_again(path, unit, times):
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with open(path, "wb") as file:
        for _ in range(times):
            file.write(packer.compress(unit))
        file.write(packer.flush())


@pytest.mark.parametrize("unit", [b"\n", b" \n", b" "])
def test_what_unpacks_to_a_lot_of_nothing_takes_little_memory(tmp_path, monkeypatch, unit):
    import tracemalloc

    monkeypatch.setattr(checked, "LONGEST_LINE", 2**24)
    packed_again_and_again(tmp_path / "facts.gz", unit * (2**22 // len(unit)), 16)
    tracemalloc.start()
    with pytest.raises(NoFactsError, match="holds no facts"):
        load_facts(tmp_path / "facts.gz")
    assert checked.text_lines(tmp_path / "facts.gz") == [] if b"\n" in unit else True
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_blank_lines_are_counted_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(checked, "BLOCK", 7)
    path = written(tmp_path, b"\n" * 20 + lines(NQ) + b" \n" * 9 + lines(NQ) + b"\n{oops}")
    with pytest.raises(FactFileError, match="line 33, column 2"):
        load_facts(path)
    assert [fact.source for fact in load_facts(path, limit=2)] == ["facts.jsonl, line 21", "facts.jsonl, line 31"]


@pytest.mark.parametrize("block", [3, 10, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_depends_on_the_size_of_a_block(tmp_path, monkeypatch, block, layout):
    path = written(tmp_path, LAYOUTS[layout]([MEND, NQ, MEND]))
    expected = [(fact, fact.source) for fact in load_facts(path)]
    monkeypatch.setattr(checked, "BLOCK", block)
    assert [(fact, fact.source) for fact in load_facts(path)] == expected


def test_a_line_or_a_list_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checked, "LONGEST_LINE", 1000)
    monkeypatch.setattr(checked, "LONGEST_LIST", 2000)
    monkeypatch.setattr(checked, "BLOCK", 100)
    with pytest.raises(FactFileError, match="line 2 is longer than 1,000 bytes"):
        load_facts(written(tmp_path, lines(NQ) + b'{"question": "' + b"x" * 2000))
    with pytest.raises(FactFileError, match="JSON list of more than 2,000 bytes; save it as JSON Lines"):
        load_facts(written(tmp_path, b"[" + b" " * 2000 + b"]"))


@pytest.mark.skipif(os.name != "posix", reason="there are named pipes")
def test_a_pipe_or_a_zero_byte_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (load_facts, checked.text_lines):
        for path in (tmp_path / "pipe", tmp_path / "a\0b", tmp_path):
            with pytest.raises(FactFileError, match="cannot be read"):
                read(path)


def test_text_may_be_packed_and_old(tmp_path):
    text = "\ufeffOne line.\r\nÄnother.\rA third\u2028one.\n".encode()
    for pack in (bytes, gzip.compress, lzma.compress):
        (tmp_path / "text").write_bytes(pack(text))
        assert checked.text_lines(tmp_path / "text") == ["One line.", "Änother.", "A third\u2028one."]


# --- real data, where a machine has it --------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("MALMEN_DATA"), reason="MALMEN_DATA names no folder of real data")
def test_real_files():
    from pathlib import Path

    folder = Path(os.environ["MALMEN_DATA"])
    rows = {"zsre/mend_train_1000": 1000, "zsre/mend_eval_1037": 1037, "entity_questions/dev": 22_068, "nq/dev": 2593}
    rows |= {"fever/train": 8904, "fever/dev": 6666}
    rows |= {"counterfact/train": 10_000, "counterfact/edit": 10_000, "counterfact/full_form_804": 804}
    facts = {name: load_facts(folder / f"{name}.jsonl.xz") for name in rows}
    assert {name: len(loaded) for name, loaded in facts.items()} == rows
    check_facts(facts["zsre/mend_eval_1037"])  # all of them can be edited at once
    check_facts(drop_conflicts(facts["entity_questions/dev"])[0])
    assert len(add_rephrases(facts["entity_questions/dev"])) == 22_068
    assert {fact.answer for fact in facts["fever/train"] + facts["fever/dev"]} == set(LABELS)
    assert flipped(flipped(facts["fever/dev"])) == facts["fever/dev"]
    assert all(fact.answer != fact.alternative for fact in facts["counterfact/train"])
    assert all(fact.subject in fact.prompt and fact.unrelated_pair for fact in facts["counterfact/full_form_804"])
