"""What a record holds beyond scores: residuals, failures, whole sequences, CounterFact's measures, hook layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from malmen_repro.editors import EditorConfig
from malmen_repro.keys_and_gradients import KeysAndGradients
from malmen_repro.methods.coachhook import CoachHooK, HookedShift
from malmen_repro.replication import extra_measures
from malmen_repro.replication.counterfact import Counterfactual, counterfact_scores
from malmen_repro.replication.extra_measures import (
    EXTRAS,
    FAILURES,
    WRITTEN,
    cases_of,
    counterfact_means,
    failure_cases,
    hook_use,
    pooled_means,
    residual_means,
    sequence_success,
)
from malmen_repro.replication.plans import METHODS
from malmen_repro.replication.stand_ins import Bench
from malmen_repro.training import cache_tokens
from malmen_repro.weight_shifts import WeightShift
from tests.toy import toy_claims, toy_classifier, toy_encoder_decoder, toy_facts, toy_model


@pytest.fixture
def shifted():
    "A model, facts, and a large random shift."
    lm, facts = toy_model(), toy_facts(8)
    torch.manual_seed(0)
    return lm, facts, WeightShift({name: torch.randn(shape) * 3 for name, shape in lm.shapes.items()})


@pytest.mark.parametrize("method", ["MALMEN", "MEND"])
def test_residual_means(method, tmp_path):
    lm, facts = toy_model(), toy_facts(6)
    editor = METHODS[method].editor(lm, EditorConfig(rank=4, blocks=1, learning_rate=0.01, regularization=1e-6))
    editor.observe(facts, 4, False)
    found = residual_means(editor, facts, 4)
    assert set(found) == set(lm.layers)
    cached = cache_tokens(editor, [fact.pair for fact in facts], 4)
    for layer, ways in found.items():
        assert set(ways) == {"sum", "normal equation"} and ways["sum"]["tokens"] == len(cached[layer].keys)
        assert 0 <= ways["normal equation"]["residual"] < ways["sum"]["residual"]
    whole = residual_means(editor, facts, 2)
    for layer in found:
        for way, part in found[layer].items():
            assert whole[layer][way] == pytest.approx(part, rel=1e-3, abs=1e-5)


def test_residual_means_of_a_perfect_and_of_no_fit():
    keys, wanted = torch.eye(3, 5), torch.ones(3, 4)
    tokens = KeysAndGradients(keys, torch.zeros(3, 4))
    perfect = extra_measures._fit(wanted.T @ keys, tokens, wanted)
    assert perfect == pytest.approx({"residual": 0.0, "share": 1.0, "tokens": 3})
    nothing = extra_measures._fit(torch.zeros(4, 5), tokens, wanted)
    assert nothing == pytest.approx({"residual": 1.0, "share": 0.0, "tokens": 3})
    wanted[0] = 0  # a token that wants nothing has no ratio, and is left out
    assert extra_measures._fit(0.5 * wanted.T @ keys, tokens, wanted)["share"] == pytest.approx(0.5)


def test_failure_cases_of_no_shift_and_of_a_large_one(shifted):
    lm, facts, shift = shifted
    none = WeightShift({name: torch.zeros(shape) for name, shape in lm.shapes.items()})
    assert failure_cases(lm, facts, none, 3)["counts"]["lost"] == 0  # nothing was lost where nothing changed
    found = failure_cases(lm, facts, shift, 3)
    counts = found["counts"]
    assert counts["facts"] == counts["unrelated"] == 8 and counts["edit or equivalent wrong"] == len(found["edits"])
    assert counts["edit wrong"] <= counts["edit or equivalent wrong"] <= 8
    both = counts["equivalent wrong in the same way"] + counts["equivalent right"]
    assert both <= counts["edit wrong"] and counts["wrong answers of several tokens"] <= counts["edit wrong"]
    assert {row["prompt"] for row in found["edits"]} <= {fact.prompt for fact in facts}
    assert set(found["edits"][0]) == {"prompt", "equivalent prompt", "target", "answer", "equivalent answer"}
    assert failure_cases(lm, facts, shift, 64) == found


def answers(monkeypatch, *calls):
    "Let the language model say what a test wants, call after call."
    waiting = list(calls)
    monkeypatch.setattr(extra_measures, "answer_predictions", lambda lm, pairs, batch_size: waiting.pop(0))


def test_failure_cases_count_what_the_appendix_says(monkeypatch, shifted):
    lm, facts, shift = shifted
    facts, wanted = facts[:5], [[2, 3], [2, 3], [2], [2], [2]]
    edits = [[2, 9], [9, 9], [9], [2], [2]]  # wrong by a token, by two, by one; right; right
    others = [[2, 9], [2, 3], [8], [9], [2]]  # the same way, right, another way; wrong; right
    before, after, right = [[4]] * 5, [[4], [5], [4], [4], [4]], [[4], [4], [4], [7], [4]]
    answers(monkeypatch, (before, right), (edits, wanted), (others, wanted), (after, right))
    found = failure_cases(lm, facts, shift, 4)
    assert found["counts"] == {
        "facts": 5, "unrelated": 5, "lost": 1, "edit or equivalent wrong": 4, "edit wrong": 3,
        "equivalent wrong in the same way": 1, "equivalent right": 1, "wrong answers of several tokens": 2,
        "share of their tokens that is right": 0.25,
    }  # fmt: skip
    assert found["unrelated"] == [
        {"prompt": facts[1].unrelated_prompt, "target": facts[1].unrelated_answer, "before": "w2", "after": "w3"}
    ]
    assert found["edits"][0]["answer"] == "w0 w7" and found["edits"][0]["prompt"] == facts[0].prompt


def test_failure_cases_keep_a_few(monkeypatch, shifted):
    lm, _, shift = shifted
    facts = toy_facts(20)
    asked = ([[2]] * 20, [[3]] * 20)
    answers(monkeypatch, ([[3]] * 20, [[3]] * 20), asked, asked, ([[2]] * 20, [[3]] * 20))
    found = failure_cases(lm, facts, shift, 4)
    assert len(found["edits"]) == len(found["unrelated"]) == FAILURES and found["counts"]["lost"] == 20
    assert found["counts"]["share of their tokens that is right"] is None  # single tokens all


def test_failure_cases_leave_facts_without_tuples_out(shifted):
    lm, facts, shift = shifted
    bare = [replace(facts[0], equivalent_prompts=()), replace(facts[1], unrelated_prompt=None, unrelated_answer=None)]
    counts = failure_cases(lm, [*bare, facts[2]], shift, 4)["counts"]
    assert (counts["facts"], counts["unrelated"]) == (2, 2)


def test_answers_as_text():
    assert toy_model().family.text_of([2, 4]) == "w0 w2"
    assert toy_classifier().family.text_of([1]) == "REFUTES"


def test_failure_cases_of_claims():
    lm = toy_classifier()
    shift = WeightShift({name: torch.randn(shape) for name, shape in lm.shapes.items()})
    found = failure_cases(lm, toy_claims(8), shift, 4)
    assert all({row["answer"], row["target"]} <= {"SUPPORTS", "REFUTES"} for row in found["edits"])
    assert found["counts"]["wrong answers of several tokens"] == 0


def test_sequence_success_counts_whole_sequences(monkeypatch, shifted):
    lm, facts, shift = shifted
    block = facts[:2]  # two tuples, each with two phrasings
    edits = ([[2, 3], [2, 4], [2, 3], [5], [5], [6]], [[2, 3]] * 3 + [[5]] * 3)
    answers(monkeypatch, ([[4], [4, 4]], [[4], [4, 4]]), edits, ([[4], [4, 5]], [[4], [4, 4]]))
    found = sequence_success(lm, block, shift, 4)
    assert found == pytest.approx({"edit success": 4 / 6, "drawdown": 0.5, "accuracy before": 1.0})


def test_sequence_success_without_a_change(shifted):
    lm, facts, shift = shifted
    none = WeightShift({name: torch.zeros(shape) for name, shape in lm.shapes.items()})
    assert sequence_success(lm, facts, none, 4)["drawdown"] == 0
    assert sequence_success(lm, facts, shift, 4) == sequence_success(lm, facts, shift, 64)


# --- counterfactuals


def toy_cases(count=6):
    "Cases of toy facts, the last of them without paraphrases."
    facts = [replace(fact, alternative="w2", answer="w4") for fact in toy_facts(count)]
    facts[-1] = replace(facts[-1], equivalent_prompts=())
    return [Counterfactual(f, (f.unrelated_prompt,), (f.prompt,), ("w1 w2 w3", "w4 w5")) for f in facts]


def case_bench(lm, cases):
    return Bench(lm, [], {"toys": [case.fact for case in cases]}, {}, cases=cases)


def test_cases_belong_to_facts():
    cases = toy_cases()
    bench = case_bench(toy_model(), cases)
    facts = bench.eval_facts["toys"]
    assert cases_of(bench, [facts[3], facts[0]]) == [cases[3], cases[0]]
    with pytest.raises(KeyError):
        cases_of(bench, toy_facts(9)[8:])


def test_counterfact_means_are_those_of_the_scores(shifted):
    lm, _, shift = shifted
    cases = toy_cases()
    found = counterfact_means(case_bench(lm, cases), [case.fact for case in cases], shift, 3)
    assert (found["cases"], found["written"]) == (6, 6)
    wanted = counterfact_scores(lm, cases, shift, 64).summary()
    assert {name: found["measures"][name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert {"GE", "RS", "GE before", "RS before", "S", "S before"} <= found["measures"].keys()


def test_what_does_not_change_the_model_changes_no_measure(shifted):
    lm, _, _ = shifted
    cases = toy_cases()
    none = HookedShift({n: torch.ones(s) for n, s in lm.shapes.items()}, dict.fromkeys(lm.layers, 99.0))
    found = counterfact_means(case_bench(lm, cases), [case.fact for case in cases], none, 4)["measures"]
    assert all(found[name] == found[f"{name} before"] for name in ("ES", "PS", "NS", "S", "GE", "RS"))


def test_an_encoder_decoder_writes_no_texts():
    lm, cases = toy_encoder_decoder(), toy_cases()
    shift = WeightShift({name: torch.randn(shape) for name, shape in lm.shapes.items()})
    found = counterfact_means(case_bench(lm, cases), [case.fact for case in cases], shift, 4)
    assert found["written"] == 0 and "GE" not in found["measures"] and "ES" in found["measures"]


def test_texts_are_written_of_the_first_cases(shifted, monkeypatch):
    lm, _, shift = shifted
    monkeypatch.setattr(extra_measures, "WRITTEN", 2)  # a case has one prompt
    cases = toy_cases()
    found = counterfact_means(case_bench(lm, cases), [case.fact for case in cases], shift, 4)
    assert found["written"] == 2 < WRITTEN


def test_blocks_are_pooled_by_their_cases(shifted):
    lm, _, shift = shifted
    cases = toy_cases(5)
    bench, facts = case_bench(lm, cases), [case.fact for case in cases]
    parts = [counterfact_means(bench, block, shift, 4) for block in (facts[:2], facts[2:])]
    whole = counterfact_means(bench, facts, shift, 4)["measures"]
    pooled = pooled_means(parts)
    for name in ("ES", "NS", "EM", "GE", "ES before", "S", "S before"):
        # EM is a difference of float32 probabilities, which round otherwise in a batch of another shape.
        assert pooled[name] == pytest.approx(whole[name], abs=1e-7), name


def test_a_block_without_a_measure_has_no_part_in_its_mean():
    measures = {"ES": 1.0, "PS": 1.0, "NS": 0.5, "S": 0.0, "ES before": 0.0, "PS before": 1.0, "NS before": 1.0}
    blocks = [{"measures": measures, "cases": 3, "written": 0}]
    blocks += [{"measures": measures | {"PS": None, "ES": 0.0}, "cases": 1, "written": 0}]
    pooled = pooled_means(blocks)
    assert pooled["PS"] == 1.0 and pooled["ES"] == 0.75 and pooled["S before"] == 0.0
    assert pooled["S"] == pytest.approx(3 / (1 / 0.75 + 1 + 2))


# --- hook layers


class HookEditor(CoachHooK):
    "What `hook_use` looks at."

    def __init__(self, lm):
        self.lm, self.config, self.grams = lm, None, {name: torch.zeros(d, d) for name, (_, d) in lm.shapes.items()}


def test_no_hook_layers_no_use(shifted):
    lm, facts, shift = shifted
    assert hook_use(HookEditor(lm), facts, shift, 4) == {}


@pytest.mark.parametrize(("alpha", "share"), [(99.0, 0.0), (-99.0, 1.0)])
def test_all_or_none_pass(shifted, alpha, share):
    lm, facts, shift = shifted
    found = hook_use(HookEditor(lm), facts, HookedShift(shift.shifts, dict.fromkeys(lm.layers, alpha)), 4)
    for kind in ("edits", "equivalents", "unrelated"):
        for layer in lm.layers:
            row = found[kind][layer]
            assert row["rows"] == row["tokens"] == share and len(row["largest"]) == 8 or kind == "equivalents"
    assert found["thresholds"] == dict.fromkeys(lm.layers, alpha)
    assert found["seconds"].keys() == {"before", "after"} and min(found["seconds"].values()) > 0
    assert found["state bytes"] == sum(4 * (v * d + d * d) for v, d in lm.shapes.values())


def test_the_scores_are_those_of_the_edited_model(shifted):
    lm, facts, shift = shifted
    edit = HookedShift(shift.shifts, dict.fromkeys(lm.layers, 1.0))
    first, last = lm.layers
    use = hook_use(HookEditor(lm), facts, edit, 4)["edits"]
    alone = hook_use(HookEditor(lm), facts, HookedShift({last: shift.shifts[last]}, {last: 1.0}), 4)["edits"]
    assert not np.allclose(use[last]["largest"], alone[last]["largest"])  # the layer below has changed its keys
    assert use[first]["largest"] != use[last]["largest"]


def test_all_are_found_by_name(shifted):
    lm, _, shift = shifted
    cases = toy_cases()
    facts = [case.fact for case in cases]
    editor = METHODS["MALMEN"].editor(lm, EditorConfig(rank=4, blocks=1, learning_rate=0.01))
    editor.observe(facts, 4, False)
    found = {name: extra(case_bench(lm, cases), editor, facts, shift, 4) for name, extra in EXTRAS.items()}
    assert found.pop("hooks") == {} and all(found.values())
