"CoachHooK: MEMIT in its first batch, one least-squares problem over all, hook layers that leave other tokens alone."

import copy
import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from malmen_repro.consecutive import ConsecutiveRunError
from malmen_repro.evaluation import answer_predictions, evaluate
from malmen_repro.facts import Fact, NoFactsError
from malmen_repro.methods.coachhook import (
    COACHHOOK_CODE,
    COACHHOOK_TEXT,
    CoachHooK,
    CoachHooKConfig,
    HookedShift,
    HookedShiftError,
    Scoring,
    hook_layers,
    row_scores,
    z_scores,
)
from malmen_repro.methods.key_statistics import KeyStatisticsMismatchError, key_statistics
from malmen_repro.methods.memit import (
    MEMIT,
    MEMIT_CODE,
    MEMIT_TEXT,
    ROME,
    MEMITConfig,
    SubjectRows,
    at_subjects,
    memory_update,
)
from malmen_repro.methods.target_vectors import SubjectError, random_prefixes, subject_end, subject_tokens
from malmen_repro.protocol import EditorError, load_edit
from malmen_repro.weight_shifts import WeightShift, WeightShiftError, overlaid, read_tensors, write_tensors
from tests.methods.test_memit import CONFIG, LOWER, TEXTS
from tests.methods.test_target_vectors import DECODERS, QUICK
from tests.toy import toy_facts as facts
from tests.toy import toy_model

PLAIN = CoachHooKConfig(memit=CONFIG, hooks=False)


def coach(lm=None, config=PLAIN):
    lm = lm or toy_model(layers=LOWER, last=None)
    return CoachHooK(lm, key_statistics(lm, TEXTS), config)


def random_shifts(lm, scale=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in lm.shapes.items()}


# --- scores


def test_scores_are_those_of_each_row_alone():
    torch.manual_seed(0)
    norms, mask = torch.rand(4, 9), torch.arange(9) < torch.tensor([[9], [5], [2], [1]])
    scores = z_scores(norms, mask)
    for row, n in zip(range(4), (9, 5, 2), strict=False):
        alone = (norms[row, :n] - norms[row, :n].mean()) / norms[row, :n].std(correction=0)
        torch.testing.assert_close(scores[row, :n], alone)
        assert (scores[row, n:] == -math.inf).all()
    assert (scores[3] == -math.inf).all()  # one token has no score


def test_rows_without_spread_have_no_scores():
    assert (z_scores(torch.full((2, 4), 3.0), torch.ones(2, 4).bool()) == -math.inf).all()
    assert (z_scores(torch.zeros(2, 4), torch.ones(2, 4).bool()) == -math.inf).all()


@pytest.mark.parametrize("n", [2, 5, 30])
def test_no_score_exceeds_the_bound(n):
    norms = torch.zeros(1, n)
    norms[0, 0] = 1.0
    assert math.isclose(z_scores(norms, torch.ones(1, n).bool()).max().item(), math.sqrt(n - 1), rel_tol=1e-5)
    torch.manual_seed(n)
    assert z_scores(torch.rand(200, n), torch.ones(200, n).bool()).max() <= math.sqrt(n - 1) + 1e-5


@pytest.mark.parametrize("sample", [False, True])
def test_the_deviation_is_of_the_row_or_of_a_sample(sample):
    torch.manual_seed(0)
    norms, mask = torch.rand(4, 9).double(), torch.arange(9) < torch.tensor([[9], [5], [2], [1]])
    scores = z_scores(norms, mask, sample)
    for row, n in zip(range(3), (9, 5, 2), strict=True):
        alone = (norms[row, :n] - norms[row, :n].mean()) / norms[row, :n].std(correction=int(sample))
        torch.testing.assert_close(scores[row, :n], alone)
    assert (scores[3] == -math.inf).all() and (scores[~mask] == -math.inf).all()
    lone = torch.eye(7)[:1].double()
    bound = 6 / math.sqrt(7) if sample else math.sqrt(6)
    assert math.isclose(z_scores(lone, torch.ones(1, 7).bool(), sample).max().item(), bound, rel_tol=1e-12)


def test_padding_counts_if_it_shall():
    mask = torch.tensor([[True, True, False]])
    assert torch.equal(Scoring().counted(mask), mask) and Scoring(padding=True).counted(mask).all()
    assert torch.equal(mask, torch.tensor([[True, True, False]]))


# --- hook layers


@pytest.mark.parametrize("kind", DECODERS)
def test_off_means_the_very_same_bits(kind):
    lm = DECODERS[kind]()
    batch = next(lm.batches([fact.pair for fact in facts(5)], 5))
    with torch.no_grad():
        before = lm.answer_logits(batch)
        with HookedShift(random_shifts(lm), dict.fromkeys(lm.layers, 1.0)).applied(lm):
            on = lm.answer_logits(batch)
        after = lm.answer_logits(batch)
    assert torch.equal(before, after) and not torch.equal(before, on)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_a_threshold_that_nobody_reaches_changes_no_bit():
    lm = toy_model(torch.bfloat16)
    batch = next(lm.batches([fact.pair for fact in facts(5)], 5))
    with torch.no_grad(), hook_layers(lm, random_shifts(lm), dict.fromkeys(lm.layers, math.inf)):
        on = lm.answer_logits(batch)
    with torch.no_grad():
        assert torch.equal(on, lm.answer_logits(batch))


def test_a_threshold_that_everybody_reaches_is_the_plain_shift():
    lm = toy_model()
    batch = next(lm.batches([fact.pair for fact in facts(5)], 5))
    shifts = random_shifts(lm)
    with torch.no_grad(), hook_layers(lm, shifts, dict.fromkeys(lm.layers, -1e9)):
        on = lm.answer_logits(batch)
    with torch.no_grad(), overlaid(lm, shifts):
        torch.testing.assert_close(on, lm.answer_logits(batch))


def test_each_token_gets_one_layer_or_the_other():
    lm = toy_model(last=1)
    (name,) = lm.layers
    shifts, outputs = random_shifts(lm), {}
    batch = next(lm.batches([fact.pair for fact in facts(6)], 6))

    def run(which, context):
        handle = lm.layers[name].register_forward_hook(lambda _m, _a, output: outputs.update({which: output}))
        with torch.no_grad(), context:
            # The layer's own hooks run in the order they were registered: ours must come last.
            handle.remove()
            handle = lm.layers[name].register_forward_hook(lambda _m, _a, output: outputs.update({which: output}))
            lm.model(**batch.inputs)
        handle.remove()

    scores = row_scores(lm, [fact.pair for fact in facts(6)], shifts)[name]
    run("off", torch.no_grad())
    # `hook_layers` registers on entering, so the reader is registered inside.
    for which, context in (("hooked", hook_layers(lm, shifts, {name: 1.0})), ("shifted", overlaid(lm, shifts))):
        with context:
            run(which, torch.no_grad())
    owners = batch.rows[torch.nn.functional.pad(batch.rows.diff() != 0, (1, 0), value=True)]
    for row, owner in enumerate(owners.tolist()):
        for position, score in enumerate(scores[owner]):
            wanted = outputs["shifted" if score >= 1.0 else "off"][row, position]
            torch.testing.assert_close(outputs["hooked"][row, position], wanted)
    assert 0 < sum(int((s >= 1.0).sum()) for s in scores) < sum(map(len, scores))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_is_no_token(batch_size):
    lm, some = toy_model(), facts(12)
    shift = HookedShift(random_shifts(lm), dict.fromkeys(lm.layers, 1.2))
    with shift.applied(lm):
        wanted, _ = answer_predictions(lm, [fact.pair for fact in some], 1)
        found, _ = answer_predictions(lm, [fact.pair for fact in some], batch_size)
    assert wanted == found
    one = row_scores(lm, [fact.pair for fact in some], shift.shifts, 1)
    many = row_scores(lm, [fact.pair for fact in some], shift.shifts, batch_size)
    for name in lm.layers:
        for a, b in zip(one[name], many[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_row_is_judged_with_its_padding_if_that_counts():
    lm, shifts = toy_model(last=1), random_shifts(toy_model(last=1))
    (name,) = lm.layers
    pairs = [("w1 w2 w3 w4", "w5"), ("w1 w2 w3 w4 w5 w6 w7 w8 w9", "w10")]
    batch = next(lm.batches(pairs, 2))
    short = batch.owners.tolist().index(0)
    seen = {}
    handle = lm.layers[name].register_forward_hook(lambda _m, args, output: seen.update(entered=args[0], left=output))
    with torch.no_grad():
        lm.model(**batch.inputs)
    handle.remove()
    moved = seen["entered"] @ shifts[name].T
    norms = moved[short].norm(dim=-1)
    assert len(norms) == 9 and batch.inputs["attention_mask"][short].sum() == 4
    for sample in (False, True):
        whole = (norms - norms.mean()) / norms.std(correction=int(sample))
        scoring = Scoring(sample, True)
        torch.testing.assert_close(row_scores(lm, pairs, shifts, 2, scoring)[name][0], whole, rtol=1e-4, atol=1e-5)
        alpha = whole[:4].sort().values[1:3].mean().item()  # so that two of the four tokens pass
        with HookedShift(shifts, {name: alpha}, scoring=scoring).applied(lm), torch.no_grad():
            handle = lm.layers[name].register_forward_hook(lambda _m, _a, output: seen.update(hooked=output))
            lm.model(**batch.inputs)
            handle.remove()
        wanted = torch.where((whole >= alpha)[:, None], seen["left"][short] + moved[short], seen["left"][short])
        torch.testing.assert_close(seen["hooked"][short], wanted, rtol=1e-5, atol=1e-5)
    alone = row_scores(lm, pairs, shifts, 1, Scoring(padding=True))[name][0]
    torch.testing.assert_close(alone, row_scores(lm, pairs, shifts, 2)[name][0], rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_is_refused():
    lm = toy_model()
    ids = torch.tensor([[3, 4, 5]])
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with HookedShift(random_shifts(lm), dict.fromkeys(lm.layers, 1.0)).applied(lm) as model:
        with pytest.raises(HookedShiftError, match="use_cache=False"):
            model.generate(ids, **options)
        assert model.generate(ids, use_cache=False, **options).shape[1] > 3


def test_a_hooked_shift_is_saved_and_loaded(tmp_path):
    lm = toy_model()
    shift = HookedShift(random_shifts(lm), dict.fromkeys(lm.layers, 1.5), {"facts": 3})
    again = HookedShift.load(shift.save(tmp_path / "a" / "edit.safetensors"))
    assert again.thresholds == shift.thresholds and again.metadata == {"facts": 3}
    assert all(torch.equal(again.shifts[name], shift.shifts[name]) for name in lm.layers)
    with pytest.raises(WeightShiftError, match="damaged or no hooked shift"):
        HookedShift.load(tmp_path / "nothing")
    plain = WeightShift(shift.shifts).save(tmp_path / "plain.safetensors")
    with pytest.raises(WeightShiftError, match="holds no hooked shift"):
        HookedShift.load(plain)


def test_another_scoring_is_saved_and_the_usual_one_is_not_spoken_of(tmp_path):
    lm = toy_model()
    shifts, thresholds = random_shifts(lm), dict.fromkeys(lm.layers, 1.5)
    for scoring in (Scoring(), Scoring(sample=True), Scoring(padding=True), Scoring(True, True)):
        path = HookedShift(shifts, thresholds, {"facts": 3}, scoring).save(tmp_path / "edit")
        again = HookedShift.load(path)
        assert again.scoring == scoring and type(again.scoring) is Scoring and again.metadata == {"facts": 3}
        assert ("scoring" in read_tensors(path)[1]) == (scoring != Scoring())


@pytest.mark.parametrize("text", ["", "[]", "3", '{"sample": 1}', '{"sampled": true}', '{"padding": null}', "{"])
def test_a_scoring_that_is_none(tmp_path, text):
    lm = toy_model(last=1)
    header = {"format": HookedShift.file_format, "metadata": "{}", "scoring": text}
    header["thresholds"] = json.dumps(dict.fromkeys(lm.layers, 1.5))
    path = write_tensors(tmp_path / "edit", random_shifts(lm), header)
    with pytest.raises(WeightShiftError, match="damaged or no hooked shift"):
        HookedShift.load(path)


def test_a_hooked_shift_is_no_weight():
    lm = toy_model()
    shift = HookedShift(random_shifts(lm), dict.fromkeys(lm.layers, 1.5))
    with pytest.raises(HookedShiftError, match="no weight can do"):
        shift.merge_into(lm)
    with pytest.raises(WeightShiftError, match="has shape"):
        shift.check_fits(toy_model(width=8))
    with pytest.raises(WeightShiftError, match="thresholds of"):
        HookedShift(shift.shifts, {})
    with pytest.raises(WeightShiftError, match="not a finite matrix"):
        HookedShift({"a": torch.full((2, 2), math.nan)}, {"a": 1.0})


# --- the consecutive update


def test_the_first_batch_is_memits():
    lm, some = toy_model(layers=LOWER, last=None), facts(8)
    statistics = key_statistics(lm, TEXTS)
    memit = MEMIT(lm, statistics, CONFIG).edit(some)
    ours = CoachHooK(lm, statistics, PLAIN).edit(some)
    assert isinstance(ours, WeightShift)
    for name, shift in memit.shifts.items():
        torch.testing.assert_close(ours.shifts[name], shift, rtol=1e-4, atol=1e-6)


def test_with_hooks_the_first_layer_of_the_first_batch_is_memits_too():
    lm, some = toy_model(layers=LOWER, last=None), facts(8)
    statistics = key_statistics(lm, TEXTS)
    memit = MEMIT(lm, statistics, CONFIG).edit(some)
    ours = CoachHooK(lm, statistics, replace(PLAIN, hooks=True)).edit(some)
    assert isinstance(ours, HookedShift)
    name = next(iter(lm.layers))
    torch.testing.assert_close(ours.shifts[name], memit.shifts[name], rtol=1e-4, atol=1e-6)


def test_the_update_is_the_dense_solution_with_the_earlier_keys():
    lm = toy_model(torch.float64, layers="transformer.h.1.mlp.c_proj", last=None)
    (name,) = lm.layers
    editor = coach(lm)
    rows, batches = [], [facts(4), facts(4, start=4), facts(5, start=8)]
    for some in batches:
        with editor.shift.applied(lm):
            targets = editor.memit.targets(some)
            pairs = SubjectRows(lm, some, [""], CONFIG)
            keys = at_subjects(lm, pairs.keys, name, 0, 64)
            residuals = targets.z - at_subjects(lm, pairs.prompts, "transformer.h.1", 1, 64)
        before = editor.shifts[name].clone()
        editor.edit(some)
        old = editor.memit.old()[name]
        earlier = torch.cat(rows) if rows else keys[:0]
        root = torch.linalg.cholesky(old).T  # rows whose second moment is C_0
        stacked = torch.cat([root, earlier, keys]), torch.cat([torch.zeros(len(root) + len(earlier), 16), residuals])
        dense = torch.linalg.lstsq(*(part.double() for part in stacked)).solution.T
        assert ((editor.shifts[name] - before) - dense).abs().max() < 1e-8
        rows.append(keys)
    assert editor.batches == 3 and editor.facts == 13
    torch.testing.assert_close(editor.grams[name], torch.cat(rows).T @ torch.cat(rows), rtol=1e-6, atol=1e-8)


def plain_coachhook(lm, batches, statistics, config):
    "Fig. 2 on one text at a time: shifts and thresholds after every batch."
    names, last = list(lm.layers), "transformer.h.1"
    shifts = {name: torch.zeros(shape).double() for name, shape in lm.shapes.items()}
    grams = {name: torch.zeros(len(shift.T), len(shift.T)).double() for name, shift in shifts.items()}
    alphas, first = dict.fromkeys(names, config.alpha), True

    def largest(entered, shift):
        norms = [(row @ shift.T).norm(dim=-1) for row in entered]
        deviations = [one.std(correction=int(config.sample_deviation)) for one in norms]
        return [((one - one.mean()) / by).max().item() for one, by in zip(norms, deviations, strict=True)]

    def seen(ids, module):
        now = {}
        handle = lm.model.get_submodule(module).register_forward_hook(
            lambda _m, args, output: now.update({0: args[0], 1: output[0] if isinstance(output, tuple) else output})
        )
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([ids]))
        handle.remove()
        return now[0][0], now[1][0]

    for some in batches:
        scoring = Scoring(config.sample_deviation)
        with HookedShift(dict(shifts), dict(alphas), scoring=scoring).applied(lm):
            z = MEMIT(lm, statistics, config.memit).targets(some).z
        done, below = {}, dict(alphas)
        rows = [pair.prompt + pair.answer[:-1] for pair in lm.encode([fact.pair for fact in some])]
        for i, name in enumerate(names):
            ready = {one: shifts[one] + done[one] for one in done}
            allowed = alphas if first and not config.first_batch_lowers else below
            with overlaid(lm, {one: shifts[one] for one in names[i:]}), hook_layers(lm, ready, allowed, scoring):
                keys = torch.stack([seen(lm.tokenizer(fact.subject)["input_ids"], name)[0][-1] for fact in some])
                at = [subject_tokens(lm, [f.prompt], [subject_end(f.prompt, f.subject)])[0] for f in some]
                states = torch.stack([seen(row, last)[1][place] for row, place in zip(rows, at, strict=True)])
                entered = [seen(row, name)[0] for row in rows]
            old = config.memit.regularization * statistics.second_moments[name].double() + grams[name]
            done[name] = memory_update(keys, (z - states) / (len(names) - i), old)
            if not config.late_thresholds:
                below[name] = min(below[name], *largest(entered, shifts[name] + done[name]))
            grams[name] = grams[name] + keys.T @ keys
        shifts = {name: shifts[name] + done[name] for name in names}
        if config.late_thresholds:  # nothing is laid over the model
            below = {
                name: min(alphas[name], *largest([seen(row, name)[0] for row in rows], shifts[name])) for name in names
            }
        if first and not config.first_batch_lowers:
            below = alphas
        alphas, first = below, False
        yield shifts, alphas


CHANGES = [{}, {"late_thresholds": True}, {"sample_deviation": True}, {"first_batch_lowers": False}]
CHANGES += [{"late_thresholds": True, "sample_deviation": True, "first_batch_lowers": False}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_with_hooks_every_layer_is_solved_for_what_the_model_then_is(changes):
    lm = toy_model(torch.float64, layers=LOWER, last=None)
    config = replace(PLAIN, hooks=True, **changes)
    editor = coach(lm, config)
    batches = [facts(6), facts(5, start=6), facts(4, start=11)]
    plain = plain_coachhook(lm, batches, editor.memit.statistics, config)
    for some, (shifts, alphas) in zip(batches, plain, strict=True):
        editor.edit(some, batch_size=4)
        assert editor.thresholds == pytest.approx(alphas, rel=1e-8)
        for name, shift in shifts.items():
            torch.testing.assert_close(editor.shifts[name], shift, rtol=1e-8, atol=1e-9)


def test_rows_end_with_the_subject_unless_hook_layers_read_on():
    lm, some = toy_model(), facts(4)
    for keys in ("subject", "prompt"):
        config = replace(CONFIG, keys=keys)
        cut, whole = (SubjectRows(lm, some, ["", "w7"], config, whole=one) for one in (False, True))
        assert len(cut) == len(whole) == 4 and len(cut.keys) == len(whole.keys) == 8
        for short, long, fact in zip(cut.prompts, whole.prompts, some, strict=True):
            (pair,) = lm.encode([fact.pair])
            assert short.prompt == long.prompt and long.prompt + long.answer == pair.prompt + pair.answer
        assert (cut.keys == whole.keys) == (keys == "subject")
    plain = CoachHooK(lm := toy_model(layers=LOWER, last=None), key_statistics(lm, TEXTS), PLAIN).edit(some)
    with plain.applied(lm):  # without hook layers it makes no difference, by causality
        states = (
            at_subjects(lm, SubjectRows(lm, some, [""], CONFIG, whole=one).prompts, "transformer.h.1", 1, 3)
            for one in (False, True)
        )
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def test_the_search_and_the_keys_have_the_unedited_models_texts(monkeypatch):
    texts = []

    def drawn(*args):
        texts.append(random_prefixes(*args))
        return texts[-1]

    monkeypatch.setattr("malmen_repro.methods.memit.random_prefixes", drawn)
    monkeypatch.setattr("malmen_repro.methods.target_vectors.random_prefixes", lambda *args: pytest.fail("drawn twice"))
    behind = replace(CONFIG, target=replace(QUICK, prefix_lengths=(2, 3)))
    lm = toy_model(layers="transformer.h.1.mlp.c_proj", last=None)
    statistics = key_statistics(lm, TEXTS)
    coach, rome = CoachHooK(lm, statistics, CoachHooKConfig(memit=behind)), ROME(lm, statistics, behind)
    for some in (facts(4), facts(4, start=4)):
        coach.edit(some)
        rome.edit(some)
    MEMIT(lm, statistics, behind).edit(facts(3))
    assert texts == [random_prefixes(lm, (2, 3), 0)] * 5


def test_without_accumulation_the_earlier_keys_do_not_count():
    lm = toy_model(torch.float64, layers="transformer.h.1.mlp.c_proj", last=None)
    (name,) = lm.layers
    editor = coach(lm, replace(PLAIN, accumulate=False))
    first = editor.edit(facts(4))
    memit = MEMIT(lm, editor.memit.statistics, CONFIG)
    with first.applied(lm):
        second = memit.edit(facts(4, start=4))
    total = editor.edit(facts(4, start=4))
    torch.testing.assert_close(total.shifts[name], (first + second).shifts[name], rtol=1e-5, atol=1e-7)
    # With accumulation an earlier key moves less.
    careful = coach(lm)
    careful.edit(facts(4))
    keys = at_subjects(lm, SubjectRows(lm, facts(4), [""], CONFIG).keys, name, 0, 64)
    moved = {"no": keys @ (total.shifts[name] - first.shifts[name]).T}
    moved["yes"] = keys @ (careful.edit(facts(4, start=4)).shifts[name] - first.shifts[name]).T
    assert moved["yes"].norm() < moved["no"].norm()


def test_the_threshold_falls_to_what_lets_each_fact_pass():
    editor = coach(config=replace(PLAIN, hooks=True, alpha=2.2))
    some = facts(6)
    shift = editor.edit(some)
    first = dict(shift.thresholds)
    assert all(alpha <= 2.2 for alpha in first.values())
    name = next(iter(editor.lm.layers))
    scores = row_scores(editor.lm, [fact.pair for fact in some], {name: shift.shifts[name]})[name]
    assert math.isclose(first[name], min(2.2, *(row.max().item() for row in scores)), rel_tol=1e-4)
    editor.edit(facts(6, start=6))
    assert all(editor.thresholds[name] <= first[name] for name in first)
    fixed = coach(config=replace(PLAIN, hooks=True, alpha=3.0, dynamic=False))
    assert set(fixed.edit(some).thresholds.values()) == {3.0}


def test_eq_19_as_printed_leaves_the_first_batch_at_its_start():
    editor = coach(config=replace(PLAIN, hooks=True, first_batch_lowers=False))
    assert set(editor.edit(facts(6)).thresholds.values()) == {2.2}
    second = dict(editor.edit(facts(6, start=6)).thresholds)
    name = next(iter(editor.lm.layers))
    rows = row_scores(editor.lm, [fact.pair for fact in facts(6, start=6)], {name: editor.shifts[name]})[name]
    assert second[name] == pytest.approx(min(2.2, *(row.max().item() for row in rows)), rel=1e-4) and second[name] < 2.2
    editor.reset()
    assert set(editor.edit(facts(6)).thresholds.values()) == {2.2}


def test_late_thresholds_are_those_of_the_unedited_model_after_the_batch():
    editor, some = coach(config=replace(PLAIN, hooks=True, late_thresholds=True)), facts(6)
    thresholds = editor.edit(some).thresholds
    for name, rows in row_scores(editor.lm, [fact.pair for fact in some], editor.shifts).items():
        assert thresholds[name] == pytest.approx(min(2.2, *(row.max().item() for row in rows)), rel=1e-6)
    early = coach(config=replace(PLAIN, hooks=True)).edit(some).thresholds
    first, last = editor.lm.layers
    assert early[first] == pytest.approx(thresholds[first], rel=1e-6)  # nothing is below it, so both see the same
    assert early[last] != pytest.approx(thresholds[last], rel=1e-6)


def test_a_batch_whose_late_thresholds_fail_leaves_the_state(monkeypatch):
    editor = coach(config=replace(PLAIN, hooks=True, late_thresholds=True))
    editor.edit(facts(3))
    shifts, grams = ({n: t.clone() for n, t in part.items()} for part in (editor.shifts, editor.grams))
    monkeypatch.setattr("malmen_repro.methods.coachhook.row_scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        editor.edit(facts(3, start=3))
    assert editor.batches == 1 and all(torch.equal(editor.shifts[n], t) for n, t in shifts.items())
    assert all(torch.equal(editor.grams[n], t) for n, t in grams.items())


def test_the_edit_scores_as_its_configuration_says():
    for changes, scoring in (({}, Scoring()), ({"sample_deviation": True}, Scoring(sample=True))):
        assert coach(config=replace(PLAIN, hooks=True, **changes)).edit(facts(3)).scoring == scoring
    counting = replace(PLAIN, hooks=True, count_padding=True)
    assert coach(config=counting).edit(facts(3)).scoring == Scoring(padding=True) == counting.scoring


def test_the_text_the_code_and_the_paper_tier_have_names():
    switches = ("first_batch_lowers", "late_thresholds", "sample_deviation", "count_padding")
    named = {"text": COACHHOOK_TEXT, "code": COACHHOOK_CODE, "paper": CoachHooK.paper_config}
    assert {name: tuple(getattr(config, switch) for switch in switches) for name, config in named.items()} == {
        "text": (True, False, False, False),
        "code": (True, True, True, True),
        "paper": (True, True, True, False),  # a text's tokens are no padding
    }
    assert [config.memit for config in named.values()] == [MEMIT_TEXT, MEMIT_CODE, MEMIT.paper_config]
    assert CoachHooKConfig() == COACHHOOK_TEXT
    lm = toy_model(layers=LOWER, last=None)
    assert CoachHooK(lm, key_statistics(lm, TEXTS)).config == CoachHooK.paper_config


def test_a_row_of_one_token_has_no_part_in_the_threshold():
    short, config = Fact("w5", "w6", subject="w5"), replace(PLAIN, hooks=True)
    editor, others = coach(config=config), facts(5)
    thresholds = editor.edit([*others, short]).thresholds
    name, *_ = editor.lm.layers  # the layers above see what this one lets through
    scores = row_scores(editor.lm, [fact.pair for fact in others], {name: editor.shifts[name]})[name]
    assert thresholds[name] == pytest.approx(min(2.2, *(row.max().item() for row in scores)), rel=1e-4)
    assert all(map(math.isfinite, thresholds.values()))
    assert coach(config=config).edit([short]).thresholds == dict.fromkeys(editor.lm.layers, 2.2)


def test_the_model_stays_as_it_is_and_memory_does_not_grow():
    editor = coach(config=replace(PLAIN, hooks=True))
    before = copy.deepcopy(editor.lm.model.state_dict())
    sizes = []
    for start in range(0, 12, 4):
        editor.edit(facts(4, start=start))
        sizes.append(sum(t.numel() for t in (*editor.shifts.values(), *editor.grams.values())))
    assert len(set(sizes)) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in editor.lm.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in editor.lm.model.modules())


def test_it_can_be_scored_like_any_edit():
    editor = coach(config=replace(PLAIN, hooks=True))
    some = [replace(fact, unrelated_prompt="w8 w9", unrelated_answer="w1") for fact in facts(4)]
    scores = evaluate(editor.lm, some, editor.edit(some))
    assert set(scores.summary()) >= {"ES", "GS", "LS"}


def test_a_batch_that_fails_leaves_the_state():
    editor = coach(config=replace(PLAIN, hooks=True))
    editor.edit(facts(3))
    shifts, thresholds = {n: s.clone() for n, s in editor.shifts.items()}, dict(editor.thresholds)
    for bad, error in (([], NoFactsError), ([replace(fact, subject=None) for fact in facts(2)], SubjectError)):
        with pytest.raises(error):
            editor.edit(bad)
    assert editor.batches == 1 and editor.thresholds == thresholds
    assert all(torch.equal(editor.shifts[name], shift) for name, shift in shifts.items())


def test_reset_forgets():
    editor = coach()
    first = editor.edit(facts(3))
    editor.edit(facts(3, start=3))
    editor.reset()
    again = editor.edit(facts(3))
    assert all(torch.equal(again.shifts[name], shift) for name, shift in first.shifts.items())


# --- stopping and going on


def test_a_resumed_run_is_the_run_in_one_go(tmp_path):
    config = replace(PLAIN, hooks=True)
    whole, half = coach(config=config), coach(config=config)
    half.edit(facts(3))
    half.save(tmp_path / "run")
    rest = coach(config=config)
    rest.resume(tmp_path / "run")
    for editor in (whole, rest):
        if editor is whole:
            editor.edit(facts(3))
        last = editor.edit(facts(3, start=3))
        assert editor.batches == 2 and editor.facts == 6
        assert last.metadata["batches"] == 2
    for name in whole.lm.layers:
        assert torch.equal(whole.shifts[name], rest.shifts[name]) and torch.equal(whole.grams[name], rest.grams[name])
    assert whole.thresholds == rest.thresholds


def test_other_settings_or_another_model_are_refused(tmp_path):
    editor = coach()
    editor.edit(facts(3))
    editor.save(tmp_path)
    other = coach(config=replace(PLAIN, memit=replace(CONFIG, regularization=7.0), alpha=1.0))
    with pytest.raises(ConsecutiveRunError, match="alpha=2.2, now 1.0, memit.regularization=2.0, now 7"):
        other.resume(tmp_path)
    with pytest.raises(ConsecutiveRunError, match="another language model"):
        coach(toy_model(layers=LOWER, last=None, seed=4)).resume(tmp_path)
    lm = toy_model(layers=LOWER, last=None)
    with pytest.raises(ConsecutiveRunError, match="other settings: corpus="):
        CoachHooK(lm, key_statistics(lm, TEXTS[1:]), editor.config).resume(tmp_path)
    with pytest.raises(EditorError, match="no readable consecutive run"):
        coach().resume(tmp_path / "nowhere")
    (tmp_path / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(EditorError, match="no readable consecutive run"):
        coach().resume(tmp_path)


def test_statistics_of_another_model_are_refused():
    lm = toy_model(layers=LOWER, last=None)
    with pytest.raises(KeyStatisticsMismatchError):
        CoachHooK(toy_model(layers=LOWER, last=None, seed=1), key_statistics(lm, TEXTS))


def test_the_defaults_are_the_papers_and_survive_a_record():
    config = CoachHooKConfig()
    assert (config.alpha, config.memit.regularization, config.hooks, config.accumulate) == (2.2, 15_000, True, True)
    assert CoachHooKConfig(**asdict(config)) == config
    with pytest.raises(EditorError, match="alpha"):
        CoachHooKConfig(alpha=math.nan)


def test_one_batch_against_dense_least_squares():
    lm = toy_model(torch.float64, layers="transformer.h.0.mlp.c_proj", last=None)
    (name,) = lm.layers
    editor, some = coach(lm, replace(PLAIN, memit=MEMITConfig(3.0, keys="prompt", target=QUICK))), facts(10)
    targets = editor.memit.targets(some)
    keys = at_subjects(lm, SubjectRows(lm, some, [""], editor.config.memit).keys, name, 0, 64)
    wanted = memory_update(keys, targets.z - targets.hidden, 3.0 * editor.memit.statistics.second_moments[name])
    assert (editor.edit(some).shifts[name] - wanted).abs().max() < 1e-8


def test_an_edit_is_loaded_as_what_it_is(tmp_path):
    lm = toy_model()
    hook_layers = HookedShift(random_shifts(lm), dict.fromkeys(lm.layers, 1.5)).save(tmp_path / "a")
    plain = WeightShift(random_shifts(lm)).save(tmp_path / "b")
    assert isinstance(load_edit(hook_layers), HookedShift) and isinstance(load_edit(plain), WeightShift)
    with pytest.raises(WeightShiftError, match="there is no shift file"):
        load_edit(tmp_path / "c")
    (tmp_path / "d").write_text("no")
    with pytest.raises(WeightShiftError, match="damaged"):
        load_edit(tmp_path / "d")
