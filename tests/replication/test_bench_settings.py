"""The same bench in another setting: alternative answers, counterfactuals, two relations and both."""

from dataclasses import replace

import pytest

from malmen_repro.replication.bench_settings import (
    BENCH_SETTINGS,
    MIXTURES,
    alternatives,
    counterfacts,
    mixed_relations,
)
from malmen_repro.replication.benches import BenchError
from malmen_repro.replication.counterfact import CounterfactError
from malmen_repro.replication.records import fingerprints
from tests.toy import knowing_bench, toy_claims


def test_alternatives_edit_known_facts():
    bench = knowing_bench()
    changed = BENCH_SETTINGS["alternatives"](bench, 0)
    known = {fact.prompt: fact for fact in bench.known_facts}
    train, new = changed.train_facts, changed.eval_facts["toys"]
    assert len(train) == len(new) == 20 and changed.eval_facts["more"] == new and changed.lm is bench.lm
    for fact in train + new:
        was = known[fact.prompt]
        pool = {one.answer for one in known.values() if one.relation == was.relation}
        assert fact.alternative == was.answer != fact.answer in pool
        assert fact.unrelated_answer == known[fact.unrelated_prompt].answer
    groups = [{fact.prompt for fact in part} for part in (train, new)]
    groups += [{fact.unrelated_prompt for fact in part} for part in (train, new)]
    assert len(set.union(*groups)) == sum(map(len, groups)) == len(known)  # no fact serves twice
    assert changed.provenance == {"made": "here", "setting": "alternative answers to known facts"}
    assert bench.eval_facts["toys"] == [] and bench.provenance == {"made": "here"}  # the bench stays as it is


def test_alternatives_are_drawn_by_the_seed():
    bench = knowing_bench()
    assert fingerprints(alternatives(bench, 1)) == fingerprints(alternatives(bench, 1))
    assert fingerprints(alternatives(bench, 1)) != fingerprints(alternatives(bench, 2))


def test_alternatives_need_known_facts():
    with pytest.raises(BenchError, match="names no facts that its language model knows"):
        alternatives(replace(knowing_bench(), known_facts=[]), 0)


# --- counterfactuals


def test_counterfacts_are_against_what_is_known():
    bench = knowing_bench(200)
    changed = counterfacts(bench, 0)
    known = {fact.prompt: fact for fact in bench.known_facts}
    edited = changed.eval_facts["counterfact"]
    assert [case.fact for case in changed.cases] == edited and changed.lm is bench.lm
    for fact in edited + changed.train_facts:
        assert fact.alternative == known[fact.prompt].answer != fact.answer
        assert fact.unrelated_answer == known[fact.unrelated_prompt].answer == fact.alternative
    taught = {p for fact in changed.train_facts for p in (fact.prompt, fact.unrelated_prompt)}
    asked = {p for case in changed.cases for p in case.prompts}
    assert taught.isdisjoint(asked)
    assert changed.provenance["setting"] == "counterfactuals of known facts" and "setting" not in bench.provenance


def test_a_bench_with_cases_stays_as_it_is():
    bench = counterfacts(knowing_bench(200), 0)
    assert counterfacts(bench, 5) is bench


def test_counterfacts_are_drawn_by_the_seed():
    bench = knowing_bench(200)
    assert fingerprints(counterfacts(bench, 1)) == fingerprints(counterfacts(bench, 1))
    assert fingerprints(counterfacts(bench, 1)) != fingerprints(counterfacts(bench, 2))


def test_counterfacts_need_known_facts_with_objects():
    with pytest.raises(BenchError, match="names no facts that its language model knows"):
        counterfacts(replace(knowing_bench(), known_facts=[]), 0)
    with pytest.raises(CounterfactError, match="claims have a label"):
        counterfacts(replace(knowing_bench(), known_facts=toy_claims(8)), 0)


# --- two relations


def test_relations_apart_and_mixed():
    changed = mixed_relations(knowing_bench(300, 3), 0)
    first, second, both = changed.eval_facts.values()
    names = changed.provenance["relations"]
    assert [{fact.relation for fact in facts} for facts in (first, second)] == [{names[0]}, {names[1]}]
    assert len(first) == len(second) and len(both) == 2 * (len(first) // 2)
    assert [fact.relation for fact in both[:4]] == [names[0], names[1]] * 2  # any first m of it are mixed
    assert set(both) <= {*first, *second}


def test_the_papers_four_pairs_where_the_bench_has_their_relations():
    pairs = [names[:2] for scenario, names in MIXTURES.items() if scenario]
    papers = list(dict.fromkeys(name for pair in pairs for name in pair))
    bench = knowing_bench(700)
    known = [replace(fact, relation=papers[i // 14 % 7]) for i, fact in enumerate(bench.known_facts)]
    changed = mixed_relations(replace(bench, known_facts=known), 0)
    assert set(changed.eval_facts) == {*papers, *(" and ".join(pair) for pair in pairs)}
    assert changed.provenance["relations"] == papers
    for first, second in pairs:
        alone, other, both = (changed.eval_facts[name] for name in (first, second, f"{first} and {second}"))
        assert [f.relation for f in both[:4]] == [first, second] * 2 and set(both) <= {*alone, *other}
        assert {f.relation for f in alone} == {first} and {f.relation for f in other} == {second}
        assert len(both) == 2 * (min(len(alone), len(other)) // 2)


def test_mixing_takes_two_relations():
    with pytest.raises(BenchError, match="two relations; the bench names r0"):
        mixed_relations(knowing_bench(100, 1), 0)


def test_all_settings_are_found_by_name():
    for name, setting in BENCH_SETTINGS.items():
        changed = setting(knowing_bench(200), 0)
        assert changed.train_facts and all(changed.eval_facts.values()), name
