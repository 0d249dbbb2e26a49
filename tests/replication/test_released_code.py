"Variants of MALMEN: each differs from it in its one way, has right gradients, trains, and survives as files."

import math
import warnings
from dataclasses import fields, replace

import pytest
import torch

from malmen_repro.editors import EDITORS, MALMEN, MEND, Editor, EditorConfig, UntrainedEditorError
from malmen_repro.facts import ConflictingFactsError, NoFactsError
from malmen_repro.hypernetwork import LowRankBlock, RunningMoments
from malmen_repro.keys_and_gradients import KeysAndGradients
from malmen_repro.normal_equation import aggregate
from malmen_repro.protocol import EditorError
from malmen_repro.replication.released_code import (
    VARIANTS,
    Epsilon,
    EpsilonAtSpread,
    EpsilonMoments,
    FixedRegularization,
    HalfPrecisionSmallShifts,
    HalfPrecisionWeights,
    InflatedVariance,
    MovingTokens,
    MovingTokensMEND,
    OuterScale,
    OuterScaleBlock,
    PlainRate,
    PlainRateTenfold,
    TokenMean,
    TokenMeanEditedSingly,
    UnbiasedMoments,
    VariantError,
    in_chunks,
    landed,
    moving,
    token_mean_meta_loss,
    varied,
)
from malmen_repro.training import (
    Block,
    Curriculum,
    LittleLearnedWarning,
    TrainingConfig,
    cache_tokens,
    meta_gradient,
    meta_loss_terms,
    tune_learning_rate,
)
from malmen_repro.weight_shifts import overlaid
from tests.toy import toy_facts, toy_model

CLASSES = list(dict.fromkeys(variant.editor for variant in VARIANTS.values()))
every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
every_variant = pytest.mark.parametrize("name", VARIANTS)


def make(kind, dtype=torch.float32, disturb=0.1, **config):
    "An editor, away from its starting point so that nothing vanishes by construction."
    editor = kind(toy_model(dtype), EditorConfig(**{"rank": 5, "learning_rate": 0.3, "regularization": 0.7, **config}))
    if dtype == torch.float64:
        editor.networks.double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in editor.parameters():
            if parameter.requires_grad:
                parameter.add_(disturb * torch.randn_like(parameter))
    return editor


def flat(shift):
    return torch.cat([part.flatten() for part in shift.shifts.values()]).double()


# --- normalisers


@pytest.mark.parametrize("size", [2, 3, 5, 32])
def test_unbiased_chunks_inflate_the_variance(size):
    torch.manual_seed(0)
    rows = torch.randn(200 * size, 4, dtype=torch.float64)
    found, inner = UnbiasedMoments(1, 4), 0
    for chunk in rows.split(size):
        found.update(chunk, 0)
        inner = inner + size * chunk.var(0, correction=0)
    exact = rows.var(0, correction=0) * len(rows)
    torch.testing.assert_close(found.squares[0], exact + inner / (size - 1))
    torch.testing.assert_close(found.mean[0], rows.mean(0))
    assert found.count[0] == len(rows)
    inflated = (found.squares[0] / exact).mean().item()
    assert abs(inflated - (1 + 1 / size)) < 0.1 / size


def test_one_chunk_is_the_unbiased_variance():
    rows, found = torch.randn(7, 3), UnbiasedMoments(2, 3)
    found.update(rows, 1)
    torch.testing.assert_close(found.scale(1), 1 / rows.double().std(0, correction=1))
    assert found.count.tolist() == [0, 7] and torch.equal(found.scale(0), torch.ones(3, dtype=torch.float64))


def test_a_lone_row_is_not_a_number_for_good():
    found = UnbiasedMoments(1, 3)
    found.update(torch.zeros(0, 3), 0)
    assert found.count[0] == 0 and torch.equal(found.scale(0), torch.ones(3, dtype=torch.float64))
    for rows in (torch.randn(5, 3), torch.randn(1, 3), torch.randn(50, 3)):
        found.update(rows, 0)
    assert found.scale(0).isnan().all() and found(torch.randn(2, 3), 0).isnan().all() and found.mean.isfinite().all()


@pytest.mark.parametrize("total", range(0, 12))
@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_chunks_keep_every_row_and_leave_none_alone(total, size):
    rows = torch.arange(total)[:, None].float()
    parts = [part.keys for part in in_chunks(KeysAndGradients(rows, rows), size)]
    assert torch.equal(torch.cat([torch.zeros(0, 1), *parts]), rows)
    assert all(len(part) <= size + 1 for part in parts)
    assert size == 1 or total == 1 or all(len(part) > 1 for part in parts)


def test_epsilon_is_added_to_the_standard_deviation():
    rows = torch.randn(50, 4) * torch.tensor([1.0, 1e-3, 1e-7, 0.0])
    deviation = rows.double().std(0, correction=0)
    for epsilon, share in ((1.2e-7, 0.0), (0.0, 1.0), (1e-3, 0.5)):
        found = EpsilonMoments(1, 4, epsilon, share)
        found.update(rows, 0)
        wanted = 1 / (deviation + epsilon + share * deviation.median())
        torch.testing.assert_close(found.scale(0), wanted, rtol=1e-5, atol=0)
    assert torch.equal(EpsilonMoments(1, 2).scale(0), torch.ones(2, dtype=torch.float64))


def test_epsilon_is_in_both_normalisers_and_the_share_in_one():
    plain, at_spread = make(Epsilon), make(EpsilonAtSpread)
    for editor in (plain, at_spread):
        for network in editor.networks.values():
            assert (network.keys.epsilon, network.gradients.epsilon) == (1.2e-7, 1.2e-7)
            assert (network.keys.share, network.gradients.share) == (0.0, editor.share)
    assert (plain.share, at_spread.share) == (0.0, 1.0)


# --- rounding


def test_a_landed_shift_is_what_the_weight_moves_by():
    torch.manual_seed(0)
    weight, shift = 0.02 * torch.randn(40, 30), 1e-4 * torch.randn(40, 30)
    moved = landed(weight, shift)
    coarse = weight.bfloat16()
    assert torch.equal((coarse.float() + moved).bfloat16(), coarse + shift.bfloat16())
    assert moved.dtype == torch.float32 and landed(weight, shift.double()).dtype == torch.float64
    assert torch.equal(landed(weight, 0 * shift), torch.zeros_like(shift))
    assert landed(weight.T, shift.T).is_contiguous()


@pytest.mark.parametrize(("size", "cosine"), [(1e-6, 0.15), (1e-5, 0.46), (1e-4, 0.95), (1e-3, 1.0)])
def test_small_shifts_land_badly(size, cosine):
    torch.manual_seed(0)
    weight, shift = 0.02 * torch.randn(300, 300), size * torch.randn(300, 300)
    assert abs(torch.cosine_similarity(landed(weight, shift).flatten(), shift.flatten(), 0).item() - cosine) < 0.02


@pytest.mark.parametrize("kind", [HalfPrecisionWeights, HalfPrecisionSmallShifts])
def test_editing_and_training_use_the_landed_shift(kind):
    ours, theirs, facts = make(MALMEN), make(kind), toy_facts(9)
    for editor in (ours, theirs):
        editor.observe(facts)
    exact, rounded = ours.edit(facts), theirs.edit(facts)
    cached = cache_tokens(theirs, [fact.pair for fact in facts], 4)
    for layer, shift in exact.shifts.items():
        assert torch.allclose(rounded.shifts[layer], theirs.landed(layer, shift), atol=1e-2 * shift.abs().max())
        with torch.no_grad():
            used, _ = theirs.aggregate(layer, cached[layer], [theirs.outputs(layer, cached[layer])])
        assert torch.equal(theirs.landed(layer, torch.zeros_like(used)), torch.zeros_like(used))
        assert (used - shift).norm() > 1e-6 * shift.norm()


def test_on_larger_weights_more_is_lost():
    facts, shifts = toy_facts(9), []
    for kind in (MALMEN, HalfPrecisionWeights, HalfPrecisionSmallShifts):
        editor = make(kind)
        editor.observe(facts)
        shifts.append(flat(editor.edit(facts)))
    exact, little, much = shifts
    assert 0 < (little - exact).norm() < 0.1 * exact.norm() and (much - exact).norm() > 5 * (little - exact).norm()


# --- the loss


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_token_means_divide_by_the_micro_batch(tokens, batch_size):
    ours, theirs = make(MALMEN, tokens=tokens), make(TokenMean, tokens=tokens)
    pairs, rows = [fact.pair for fact in toy_facts(20)], min(batch_size, TokenMean.rows)
    batches = list(ours.lm.batches(pairs, rows))
    parts = zip(batches, ours.captured(pairs, rows), theirs.captured(pairs, batch_size), strict=True)
    for batch, exact, mean in parts:
        for layer, cached in exact.items():
            assert torch.equal(mean[layer].keys, cached.keys)
            torch.testing.assert_close(mean[layer].value_gradients, cached.value_gradients / len(batch.labels))


def test_token_means_make_the_shift_depend_on_the_batch():
    facts = toy_facts(20)
    sums, means, singly = make(MALMEN), make(TokenMean), make(TokenMeanEditedSingly)
    for editor in (sums, means, singly):
        editor.observe(facts)
    assert (flat(sums.edit(facts, 1)) - flat(sums.edit(facts, 8))).norm() < 1e-4 * flat(sums.edit(facts, 8)).norm()
    assert (flat(means.edit(facts, 1)) - flat(means.edit(facts, 8))).norm() > 0.1 * flat(means.edit(facts, 8)).norm()
    torch.testing.assert_close(flat(means.edit(facts, 8)), flat(means.edit(facts, 100)))
    torch.testing.assert_close(flat(means.edit(facts, 1)), flat(singly.edit(facts, 8)))


def block_of_tuples(lm, facts):
    "What a meta-step looks at."
    pairs = [fact.pair for fact in facts], [f.equivalent_pairs[0] for f in facts], [f.unrelated_pair for f in facts]
    return Block(*(lm.encode(some) for some in pairs))


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("locality", [0.0, 1.5])
def test_the_meta_loss_of_token_means_is_the_sum_of_each_micro_batchs_mean(rows, locality):
    lm = toy_model(torch.float64)
    torch.manual_seed(0)
    shifts = {name: 0.1 * torch.randn(shape).double() for name, shape in lm.shapes.items()}
    block, found = block_of_tuples(lm, toy_facts(10)), {"generalization": [], "locality": []}
    for name, term in token_mean_meta_loss(lm, shifts, block, locality, rows):
        found[name].append(term)
    wanted = {name: [] for name in found}
    for name, pairs in (("generalization", block.equivalent), ("locality", block.unrelated)):
        for batch in lm.batches(pairs, rows):
            with torch.no_grad():
                before = lm.answer_logits(batch).log_softmax(-1)
                with overlaid(lm, shifts):
                    after = lm.answer_logits(batch).log_softmax(-1)
            right = after.gather(1, batch.labels[:, None])[:, 0]
            divergence = (before.exp() * (before - after)).sum(-1)
            wanted[name].append(-right.mean() if name == "generalization" else locality * divergence.mean())
    torch.testing.assert_close(torch.stack(found["generalization"]), torch.stack(wanted["generalization"]))
    if locality:
        torch.testing.assert_close(torch.stack(found["locality"]), torch.stack(wanted["locality"]))
    assert len(found["generalization"]) == -(-10 // rows) and bool(found["locality"]) == bool(locality)


def test_with_answers_of_one_length_a_single_batch_points_the_same_way():
    lm = toy_model(torch.float64)
    facts = [replace(f, answer="w1 w2", unrelated_answer="w3") for f in toy_facts(8)]
    block, slopes = block_of_tuples(lm, facts), {}
    for loss in (meta_loss_terms, token_mean_meta_loss):
        for rows in (2, 8):
            shifts = {name: torch.full(shape, 0.01).double().requires_grad_() for name, shape in lm.shapes.items()}
            for _, term in loss(lm, shifts, block, 0.0, rows):
                term.backward()
            slopes[loss, rows] = torch.cat([shift.grad.flatten() for shift in shifts.values()])
    exact = slopes[meta_loss_terms, 8]
    torch.testing.assert_close(slopes[meta_loss_terms, 2], exact)
    torch.testing.assert_close(slopes[token_mean_meta_loss, 8], exact / 2)  # tokens of an answer
    torch.testing.assert_close(slopes[token_mean_meta_loss, 2], 4 * exact / 2)  # micro-batches


# --- tokens without a gradient


def test_moving_tokens_are_those_with_any_gradient():
    keys, gradients = torch.randn(5, 3), torch.randn(5, 2)
    gradients[1] = 0
    gradients[3] = torch.tensor([0.0, -1e-30])
    kept = moving(KeysAndGradients(keys, gradients))
    assert torch.equal(kept.keys, keys[[0, 2, 3, 4]]) and torch.equal(kept.value_gradients, gradients[[0, 2, 3, 4]])
    none = moving(KeysAndGradients(keys, torch.zeros(5, 2)))
    assert none.keys.shape == (0, 3) and none.value_gradients.shape == (0, 2)


@pytest.mark.parametrize(("kind", "without"), [(MALMEN, MovingTokens), (MEND, MovingTokensMEND)])
def test_editors_of_moving_tokens_see_no_others(kind, without):
    plain, ours, facts = make(kind, tokens="all"), make(without, tokens="all"), toy_facts(9)
    pairs = [fact.pair for fact in facts]
    every, seen = (cache_tokens(editor, pairs, 4) for editor in (plain, ours))
    last = list(every)[-1]
    for layer, tokens in every.items():
        assert torch.equal(seen[layer].keys, moving(tokens).keys)
        assert (len(seen[layer].keys) < len(tokens.keys)) == (layer == last)  # nothing above the last block
    for editor in (plain, ours):
        editor.observe(facts)
    for layer in every:
        network, index = ours.networks.of(layer)
        assert network.keys.count[index] == len(seen[layer].keys)
    assert not torch.allclose(plain.edit(facts).shifts[last], ours.edit(facts).shifts[last], rtol=1e-3)
    assert "moving tokens" in without.method and without.method not in VARIANTS


@pytest.mark.parametrize(("kind", "without"), [(MALMEN, MovingTokens), (MEND, MovingTokensMEND)])
def test_where_every_token_moves_nothing_changes(kind, without):
    plain, ours, facts = make(kind), make(without), toy_facts(9)
    for editor in (plain, ours):
        editor.observe(facts)
    assert torch.equal(flat(plain.edit(facts)), flat(ours.edit(facts)))


def test_an_editor_of_moving_tokens_trains():
    editor = make(MovingTokens, tokens="all")
    records = editor.train(toy_facts(16), num_facts=8, steps=2, progress=False)
    assert len(records) == 2 and flat(editor.edit(toy_facts(8))).isfinite().all()


# --- statistics that move while editing


def test_editing_moves_biased_statistics_and_no_others():
    facts, others = toy_facts(9), toy_facts(9, seed=3)
    for kind in CLASSES:
        editor = make(kind)
        editor.observe(facts)
        before = {layer: editor.networks.of(layer)[0].keys.count.clone() for layer in editor.lm.layers}
        one, two = editor.edit(others), editor.edit(others)
        moved = [(editor.networks.of(layer)[0].keys.count > count).all() for layer, count in before.items()]
        assert all(moved) if kind is InflatedVariance else not any(moved), kind
        assert torch.equal(flat(one), flat(two)) == (kind is not InflatedVariance), kind


def test_refused_facts_leave_biased_statistics_alone():
    facts = toy_facts(3)
    editor = make(InflatedVariance)
    with pytest.raises(UntrainedEditorError):
        editor.edit(facts)
    assert not editor.has_moments
    editor.observe(facts)
    counts = [network.keys.count.clone() for network in editor.networks.values()]
    with pytest.raises(NoFactsError):
        editor.edit([])
    with pytest.raises(ConflictingFactsError):
        editor.edit([*facts, *[type(facts[0])(fact.prompt, "w1 w2 w3 w4") for fact in facts]])
    assert all(torch.equal(a, network.keys.count) for a, network in zip(counts, editor.networks.values(), strict=True))


def test_biased_statistics_are_cut_in_chunks():
    editor = make(InflatedVariance)
    cached = cache_tokens(editor, [fact.pair for fact in toy_facts(8)], 100)
    editor.update_moments(cached)
    for layer, tokens in cached.items():
        network, index = editor.networks.of(layer)
        wanted = UnbiasedMoments(1, tokens.keys.shape[1])
        for chunk in in_chunks(tokens, 2):
            wanted.update(chunk.keys, 0)
        torch.testing.assert_close(network.keys.squares[index], wanted.squares[0])
        exact = RunningMoments(1, tokens.keys.shape[1])
        exact.update(tokens.keys, 0)
        assert (network.keys.squares[index] > exact.squares[0]).all()


# --- eta, lambda, the block


def test_plain_rates_start_where_the_configuration_says_and_may_turn_negative():
    for kind in (PlainRate, PlainRateTenfold):
        editor = make(kind, disturb=0.0, learning_rate=1e-6)
        for layer in editor.lm.layers:
            assert editor.learning_rate(layer).item() == pytest.approx(1e-6, rel=1e-4)
        tune_learning_rate(editor, toy_facts(8), num_facts=8, candidates=(0.5,))
        assert editor.learning_rate(layer).item() == pytest.approx(0.5, rel=1e-4)
        for network in editor.networks.values():
            network.moved_learning_rate.data.fill_(-1.0)
        assert editor.learning_rate(layer).item() < 0


@pytest.mark.parametrize("kind", [PlainRate, PlainRateTenfold])
def test_the_first_step_is_ten_times_the_start(kind):
    rate = {PlainRate: 1e-5, PlainRateTenfold: PlainRateTenfold.scalar_learning_rate}[kind]
    editor = make(kind, disturb=0.0, learning_rate=1e-6)
    config = TrainingConfig.paper(steps=1, num_facts=8, scalar_learning_rate=rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LittleLearnedWarning)  # of a rate below zero
        editor.train(toy_facts(8), config, progress=False)
    for layer in editor.lm.layers:
        assert abs(editor.learning_rate(layer).item() / 1e-6 - 1) == pytest.approx(10, rel=1e-2)
    assert {p.requires_grad for p in (network.log_learning_rate for network in editor.networks.values())} == {False}


def test_a_fixed_lambda_stays():
    editor = make(FixedRegularization, regularization=1.0)
    editor.train(toy_facts(8), steps=3, num_facts=8, scalar_learning_rate=0.5, progress=False)
    for layer in editor.lm.layers:
        assert editor.regularization(layer).item() == 1 and editor.learning_rate(layer).item() != 0.3


def test_the_block_has_scale_and_offset_outside():
    torch.manual_seed(0)
    block = OuterScaleBlock(6, 3, 2).double()
    for parameter in block.parameters():
        parameter.data.normal_()
    z = torch.randn(5, 6, dtype=torch.float64)
    inner = torch.relu(z @ block.down.T @ block.up.T + block.bias)
    torch.testing.assert_close(block(z, 1), z + block.scale[1] * inner + block.offset[1])
    assert not torch.equal(block(z, 0), block(z, 1))
    theirs = LowRankBlock(6, 3, 2).double()
    theirs.load_state_dict(block.state_dict())
    assert (theirs(z, 1) >= z).all() and not (block(z, 1) >= z).all()


def test_the_outer_block_starts_from_the_same_weights_and_learns_at_once():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ours = MALMEN(toy_model(), EditorConfig(rank=4))
    torch.set_rng_state(state)
    theirs = OuterScale(toy_model(), EditorConfig(rank=4))
    one, other = ours.networks.state_dict(), theirs.networks.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    blocks = [block for network in theirs.networks.values() for block in network.blocks]
    assert {type(block) for block in blocks} == {OuterScaleBlock}
    assert all(parameter.requires_grad for parameter in theirs.parameters())
    z = torch.randn(7, blocks[0].down.shape[1])
    assert torch.equal(blocks[0](z, 0), z)
    blocks[0](z, 0).square().sum().backward()
    assert blocks[0].up.grad.norm() > 0 and blocks[0].offset.grad[0].norm() > 0


@every_class
def test_making_a_variant_draws_no_random_numbers(kind):
    lm, state = toy_model(), torch.get_rng_state()
    editor = kind(lm, EditorConfig(rank=4))
    assert torch.equal(torch.get_rng_state(), state)
    ours = MALMEN(lm, EditorConfig(rank=4)).networks.state_dict()
    theirs = editor.networks.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


# --- every variant


def straight_through(editor, layer, shift):
    "A shift as it lands, whose gradient passes as if it had not been rounded."
    return shift + (editor.landed(layer, shift) - shift).detach() if hasattr(editor, "landed") else shift


@every_class
@pytest.mark.parametrize("cut", [(3, 7)])
def test_the_split_gradient_is_the_end_to_end_one(kind, cut):
    facts = toy_facts(12)
    config = TrainingConfig(num_facts=12, lm_batch_size=cut[0], network_batch_size=cut[1])
    whole, split = make(kind, torch.float64), make(kind, torch.float64)
    block = Curriculum(whole.lm, facts, config).block(0)
    cached = cache_tokens(whole, block.edits, cut[0])
    whole.update_moments(cached)
    shifts = {}
    for layer, tokens in cached.items():
        shift = aggregate(tokens.keys, whole.outputs(layer, tokens), whole.regularization(layer))
        shifts[layer] = straight_through(whole, layer, shift)
    sum(term for _, term in meta_loss_terms(whole.lm, shifts, block, 1.0, 1000)).backward()
    meta_gradient(split, block, config)
    theirs = dict(whole.networks.named_parameters())
    for name, parameter in split.networks.named_parameters():
        if parameter.requires_grad:
            scale = theirs[name].grad.abs().max() + 1e-12
            assert (parameter.grad - theirs[name].grad).abs().max() < 1e-7 * scale, name
        else:
            assert parameter.grad is None


@every_class
def test_streamed_and_split_shifts_agree(kind):
    facts = toy_facts(20)
    editor = make(kind)
    editor.observe(facts)
    pairs = editor.lm.encode([fact.pair for fact in facts])
    rows = 1 if kind is TokenMeanEditedSingly else 6
    edited = editor.edit(facts, rows)
    cached = cache_tokens(editor, pairs, rows)
    for layer, tokens in cached.items():
        with torch.no_grad():
            shift, _ = editor.aggregate(layer, tokens, [editor.outputs(layer, tokens)])
        # Rounding to bf16 may turn a difference in the last digit into a step of the grid.
        tolerance = 2e-2 if isinstance(editor, HalfPrecisionWeights) else 1e-4
        assert (edited.shifts[layer] - shift).norm() <= tolerance * shift.norm()
    assert edited.metadata == {"method": kind.method, "facts": 20}


@every_class
def test_the_batch_size_matters_only_where_it_is_said_to(kind):
    facts, editor, other = toy_facts(21), make(kind), make(kind)
    for each in (editor, other):
        each.observe(facts, 100)
    one, two = flat(editor.edit(facts, 100)), flat(other.edit(facts, 2))
    close = (one - two).norm() < 1e-3 * one.norm()
    if kind in (MALMEN, Epsilon, EpsilonAtSpread, FixedRegularization, PlainRate, PlainRateTenfold, OuterScale):
        assert close
    if kind in (TokenMean, InflatedVariance):
        assert not close


@pytest.mark.filterwarnings("ignore:the editor's eta is below zero")
@every_variant
def test_every_variant_trains_and_survives_as_files(name, tmp_path):
    facts = toy_facts(24)
    kind, ours, theirs = varied(name, EditorConfig(rank=5, learning_rate=0.1), TrainingConfig(num_facts=8, steps=4))
    editor = kind(toy_model(), ours)
    history = editor.train(facts, config=theirs, progress=False)
    assert len(history) == 4 and all(math.isfinite(step["generalization"] + step["norm"]) for step in history)
    editor.save_pretrained(tmp_path)
    again = Editor.from_pretrained(tmp_path, toy_model())
    assert type(again) is kind and again.config == editor.config
    ours, theirs = editor.networks.state_dict(), again.networks.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.testing.assert_close(flat(again.edit(facts)), flat(editor.edit(facts)), rtol=1e-4, atol=1e-6)
    assert type(MALMEN.from_pretrained(tmp_path, toy_model())) is kind
    with pytest.raises(EditorError, match="not a MEND one"):
        MEND.from_pretrained(tmp_path, toy_model())


@pytest.mark.parametrize(
    "name", ["MALMEN (biased variance)", "MALMEN (lambda fixed)", "MALMEN (plain eta tuned)", "MALMEN (scale outside)"]
)
def test_a_variant_goes_on_from_a_checkpoint(name, tmp_path):
    facts = toy_facts(24)
    kind, ours, theirs = varied(name, EditorConfig(rank=5, learning_rate=0.1), TrainingConfig(num_facts=8, steps=4))
    whole = kind(toy_model(), ours)
    whole.train(facts, config=theirs, progress=False)
    options = {"config": theirs, "checkpoint": tmp_path / "c.pt", "checkpoint_every": 2, "progress": False}

    class Stop(Exception):
        pass

    stopped = kind(toy_model(), ours)
    steps = []
    outputs = stopped.aggregate

    def stop_in_step_two(layer, cached, chunks):
        steps.append(layer)
        if len(steps) > 2 * len(stopped.lm.layers) + (len(stopped.lm.layers) if theirs.tuned_start else 0):
            raise Stop
        return outputs(layer, cached, chunks)

    stopped.aggregate = stop_in_step_two
    with pytest.raises(Stop):
        stopped.train(facts, **options)
    resumed = kind(toy_model(), ours)
    history = resumed.train(facts, **options)
    assert len(history) == 4
    for key, value in whole.networks.state_dict().items():
        torch.testing.assert_close(resumed.networks.state_dict()[key], value, rtol=1e-4, atol=1e-6)


# --- the table


def test_the_table_is_in_step_with_the_classes_and_the_configurations():
    methods = {variant.editor.method for variant in VARIANTS.values()}
    assert methods <= EDITORS.keys() and all(EDITORS[method].method == method for method in methods)
    assert EDITORS["MALMEN"] is MALMEN and EDITORS["MEND"] is MEND
    for name, (kind, ours, theirs) in VARIANTS.items():
        assert issubclass(kind, MALMEN) and name.startswith("MALMEN (")
        assert ours.keys() <= {field.name for field in fields(EditorConfig)}
        assert theirs.keys() <= {field.name for field in fields(TrainingConfig)}
        assert kind is MALMEN or name.startswith(kind.method.removesuffix(")"))


def test_changes_are_made_and_nothing_else():
    base = EditorConfig(rank=7, seed=3), TrainingConfig.paper(num_facts=9, seed=3, tuned_start=True, warmup=10)
    assert varied("MALMEN (epsilon)", *base) == (Epsilon, *base)
    kind, editor, training = varied("MALMEN (plain eta)", *base)
    assert (kind, editor.learning_rate, editor.rank, editor.seed) == (PlainRate, 1e-6, 7, 3)
    assert (training.tuned_start, training.scalar_learning_rate, training.warmup) == (False, 1e-5, 0)
    assert (training.num_facts, training.seed, training.meta_learning_rate) == (9, 3, 1e-5)


def test_near_misses_are_named():
    with pytest.raises(VariantError, match=r"MALMEN \(epsilon\)"):
        varied("MALMEN (epsilom)", EditorConfig(), TrainingConfig())
    with pytest.raises(VariantError, match="there are"):
        varied("", EditorConfig(), TrainingConfig())
