"""What makes the records of an editor's memory, speed and recall, and of CoachHooK's scores: at toy size."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from malmen_repro.evaluation import answer_predictions
from malmen_repro.methods.causal_tracing import ROLES, trace
from malmen_repro.replication import editor_records
from malmen_repro.replication.editor_records import (
    BRIEF,
    edit_memory,
    key_record,
    made_editor,
    memory_record,
    random_decoder,
    recall_record,
    recall_rows,
    speed_record,
)
from malmen_repro.replication.plans import ALL_METHODS, METHODS, SETTINGS
from malmen_repro.replication.records import committed_records
from malmen_repro.replication.stand_ins import Bench, TinySubjectsConfig, world_parts
from malmen_repro.replication.tier_settings import ready_settings
from tests.toy import toy_corpus, toy_facts, toy_model


def committed(name):
    return json.loads((committed_records() / name).read_text(encoding="utf-8"))


def toy_bench(count=6, **more):
    "A toy model with facts to look at and to edit, and a corpus."
    about = {"corpus": toy_corpus(), **more}
    return Bench(toy_model(), toy_facts(6, start=20), {"toys": toy_facts(count)}, {"made": "here"}, **about)


# --- making an editor


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_is_made_and_edits(method, tmp_path):
    bench = toy_bench()
    changes = BRIEF.get(method, {"steps": 2}) if METHODS[method].ready else {"rank": 4}
    editor = made_editor("tiny", bench, method, changes, tmp_path)
    assert editor.edit(bench.eval_facts["toys"], 64).shifts


def test_settings_are_the_tiers_but_for_the_changes(tmp_path):
    found = made_editor("tiny", toy_bench(), "MEMIT", BRIEF["MEMIT"], tmp_path).config
    own = ready_settings("tiny", "MEMIT")
    assert found.target.steps == 2 and own.target.steps > 2
    assert replace(found, target=replace(found.target, steps=own.target.steps), blocks=own.blocks) == own
    trained = made_editor("tiny", toy_bench(), "MEND", {"rank": 4}, tmp_path).config
    assert trained.rank == 4 and trained.regularization == SETTINGS["tiny"][0].get("regularization", 1.0)


# --- memory


@pytest.fixture(scope="module")
def world():
    return world_parts(TinySubjectsConfig())


@pytest.fixture(scope="module")
def tiny(world):
    "The tiny stand-in's architecture and its world."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editor_records, "world_parts", lambda _: world)
        return random_decoder("tiny"), world.known, world.edits


@pytest.mark.parametrize("method", ["MALMEN", "MEND", "FT-W", "MEMIT"])
def test_memory_is_what_the_committed_record_says(tiny, method):
    "Bytes of tensors do not depend on the machine."
    recorded = {(r["tier"], r["method"], r["m"]): r["bytes"] for r in committed("editors/memory.json")["rows"]}
    # When the record was made, MEMIT looked for infinite sums while their factor was there: a matrix of d x d more.
    d = next(iter(tiny[0].shapes.values()))[1]
    wanted = recorded["tiny", method, 64] - (8 * d * d if method == "MEMIT" else 0)
    assert edit_memory("tiny", *tiny, method, 64) == pytest.approx(wanted, rel=0.01)


def test_memory_of_some_methods(tiny, monkeypatch):
    monkeypatch.setattr(editor_records, "world_parts", lambda _: (tiny[1][:1000], tiny[2][:80], []))
    record = memory_record({"tiny": lambda: tiny[0]}, ("FT-W", "MALMEN", "ROME"), sizes=(2, 8))
    places = [(row["tier"], row["method"], row["m"]) for row in record["rows"]]
    assert places == [("tiny", name, m) for name in ("FT-W", "MALMEN") for m in (2, 8)] + [("tiny", "ROME", 1)]
    few, many = (next(r["bytes"] for r in record["rows"] if (r["method"], r["m"]) == ("MALMEN", m)) for m in (2, 8))
    assert 0 < few < many
    assert list(record) == ["what", "hardware", "versions", "git", "rows"]
    old = committed("editors/memory.json")
    assert old["what"] == record["what"] and list(old["rows"][0]) == list(record["rows"][0])


def test_both_models_have_the_words_of_the_tiny_world(tiny, world, monkeypatch):
    monkeypatch.setattr(editor_records, "world_parts", lambda _: world)
    one, other = tiny[0], random_decoder("small")
    assert len(one.tokenizer) == len(other.tokenizer)
    assert other.model.num_parameters() > 5 * one.model.num_parameters()


# --- speed


def test_speed_of_some_methods():
    benches = {"tiny": toy_bench(8), "small": toy_bench(8)}
    there = {tier: (bench, bench.eval_facts["toys"]) for tier, bench in benches.items()}
    record, old = speed_record(there, ("MALMEN untrained", "FT-W")), committed("editors/speed.json")
    assert [row["tier"] for row in record["rows"]] == ["tiny"] * 2 + ["small"] * 2
    assert all(row["seconds"] > 0 for row in record["rows"])
    assert list(record) == list(old) and list(record["rows"][0]) == list(old["rows"][0])
    assert record["what"] == old["what"]


def test_only_the_second_edit_is_timed(monkeypatch):
    "The first one warms up, and what CoachHooK remembers of it is forgotten."
    calls = []
    editor = SimpleNamespace(edit=lambda facts, _: calls.append(len(facts)), reset=lambda: calls.append("reset"))
    monkeypatch.setattr(editor_records, "made_editor", lambda *_: editor)
    monkeypatch.setattr(editor_records.time, "perf_counter", lambda: calls.append("clock") or 0.0)
    assert editor_records.edit_seconds("tiny", toy_bench(), toy_facts(70), "CoachHooK") == 0
    assert calls == [4, "reset", "clock", 64, "clock"]


# --- recall at a subject


def told(count=12):
    "What the toy model says: answers of one token and of two."
    lm, facts = toy_model(), [replace(fact, answer="w1 w1") for fact in toy_facts(count, start=60)]
    for place in (0, 1):  # the second token follows the first one, once that is the model's own
        said, _ = answer_predictions(lm, [fact.pair for fact in facts])
        for i, tokens in enumerate(said):
            words = facts[i].answer.split()[:place] + lm.tokenizer.convert_ids_to_tokens(tokens)[place:]
            facts[i] = replace(facts[i], answer=" ".join(words))
    facts = [fact for fact in facts if "<" not in fact.answer]  # <end> is a token that an answer drops
    return [replace(f, answer=f.answer.split()[0]) if i % 2 else f for i, f in enumerate(facts)]


def test_recall_is_the_trace_at_the_last_subject_token():
    bench, known = toy_bench(known_facts=told()), told()
    one, several = recall_rows("toy", bench, count=4, samples=2)
    assert (one["tokens"], several["tokens"]) == ("one", "several")
    assert (one["facts"], one["of"], several["of"]) == (4, 5, 6)
    random.Random(0).shuffle(known)
    traced = trace(bench.lm, [fact for fact in known if " " not in fact.answer][:4], "state", samples=2)
    lost = (traced.clean.mean() - traced.corrupted.mean()).item()
    effects = traced.effects[ROLES.index("last subject token")].tolist()
    assert one["given back, by block"] == pytest.approx([effect / lost for effect in effects], abs=1e-3)


def test_counterfactuals_are_asked_for_the_true_object():
    cases = [SimpleNamespace(fact=replace(f, answer="w9", alternative=f.answer)) for f in told()]
    known, cases = toy_bench(known_facts=told()), toy_bench(cases=cases)
    assert recall_rows("toy", known, 4, 2) == [
        one | {"given back, by block": pytest.approx(one["given back, by block"], abs=1e-3)}
        for one in recall_rows("toy", cases, 4, 2)
    ]


def test_recall_record():
    bench, old = toy_bench(known_facts=told()), committed("editors/recall.json")
    record = recall_record({"one": bench, "other": bench}, 4, 2)
    assert [row["stand-in"] for row in record["rows"]] == ["one", "one", "other", "other"]
    assert record["what"] == old["what"] and list(record["rows"][0]) == list(old["rows"][0])


# --- who passes a threshold


def test_key_record():
    facts = [replace(fact, equivalent_prompts=(f"w3 {fact.prompt}",)) for fact in toy_facts(12)]
    bench, old = toy_bench(), committed("coachhook/keys.json")
    record = key_record(bench, facts, batch=4)
    assert list(record) == list(old) and record["what"] == old["what"]
    assert record["settings"].keys() == old["settings"].keys() and record["bench"] == {"made": "here"}
    assert [row["rows"] for row in record["rows"]] == ["edits", "rephrases"]
    for row, recorded in zip(record["rows"], old["rows"], strict=True):
        assert list(row) == list(recorded)
        through = [sum(z >= record["threshold"] for z in row[name]) for name in ("keys", "others")]
        tokens = len(row["keys"]) + len(row["others"])  # so few that all are kept
        assert len(row["keys"]) == 12 and row["instances"] == pytest.approx(through[0] / 12, abs=1e-3)
        assert row["unwanted tokens"] == pytest.approx(through[1] / tokens, abs=1e-3)
