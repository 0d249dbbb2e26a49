"""Keys and value gradients: against autograd, under every cut, in every precision; where the graph begins; errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from malmen_repro.facts import MalmenError
from malmen_repro.keys_and_gradients import (
    KeysAndGradients,
    NonFiniteGradientError,
    at_least_float32,
    capture,
    fine_tuning_loss,
    watched,
)
from malmen_repro.language_models import (
    EncodedPair,
    LanguageModel,
    LayerPatternError,
    feed_forward,
    linear_layers,
    weight_view,
)
from tests.toy import toy_claims, toy_classifier, toy_encoder_decoder, toy_facts

VOCABULARY = 40
GPT2 = "transformer.h.*.mlp.c_proj"
KINDS = ["gpt2", "gptj", "llama"]


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def make(kind="gpt2", pattern=None, last=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "vocab_size": VOCABULARY, "initializer_range": 0.2}
    gpt = {"n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2, **ids, **options}
    if kind == "gpt2":
        model, default = GPT2LMHeadModel(GPT2Config(**gpt)), GPT2
    elif kind == "gptj":
        model, default = GPTJForCausalLM(GPTJConfig(rotary_dim=4, **gpt)), "transformer.h.*.mlp.fc_out"
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=32, **sizes, **ids, **options))
        default = "model.layers.*.mlp.down_proj"
    return LanguageModel(model.to(dtype), tokenizer(), pattern or default, last)


def random_pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())

    return [EncodedPair(tokens(1, 8), tokens(1, 4)) for _ in range(count)]


PAIRS = random_pairs(7)


def one_batch(lm, pairs=PAIRS):
    (batch,) = lm.batches(pairs, len(pairs))
    return batch


def gradients_by_autograd(lm, batch, logits=None):
    weights = {name: layer.weight.requires_grad_() for name, layer in lm.layers.items()}
    loss = fine_tuning_loss(lm.answer_logits(batch), batch)
    found = torch.autograd.grad(loss, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return {
        name: gradient if gradient.shape == lm.shapes[name] else gradient.T
        for name, gradient in zip(weights, found, strict=True)
    }


def in_callers_order(lm, pairs, batch_size):
    """Captured answer tokens of all batches, ordered by pair."""
    rows, parts = [], {name: ([], []) for name in lm.layers}
    for batch in lm.batches(pairs, batch_size):
        rows.append(batch.rows)
        for name, (keys, gradients) in capture(lm, batch).items():
            parts[name][0].append(keys)
            parts[name][1].append(gradients)
    order = torch.cat(rows).argsort(stable=True)
    return {name: tuple(torch.cat(tensors)[order] for tensors in both) for name, both in parts.items()}


# --- against autograd


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_product_over_all_tokens_is_the_weight_gradient(kind, last):
    lm = make(kind, last=last)
    batch = one_batch(lm)
    expected = gradients_by_autograd(lm, batch)
    for name, (keys, gradients) in capture(lm, batch, tokens="all").items():
        torch.testing.assert_close(gradients.T @ keys, expected[name], rtol=1e-10, atol=1e-14)


def test_several_layers_of_a_block_at_once():
    lm = make(pattern=["transformer.h.*.mlp.c_proj", "transformer.h.*.mlp.c_fc", "transformer.h.1.attn.c_attn"])
    batch = one_batch(lm)
    expected, cached = gradients_by_autograd(lm, batch), capture(lm, batch, tokens="all")
    assert set(cached) == set(lm.layers) and len(cached) == 7
    for name, (keys, gradients) in cached.items():
        torch.testing.assert_close(gradients.T @ keys, expected[name], rtol=1e-10, atol=1e-14)


def test_parallel_layers_of_a_block():
    lm = make("llama", ["model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"])
    batch = one_batch(lm)
    expected = gradients_by_autograd(lm, batch)
    for name, (keys, gradients) in capture(lm, batch, tokens="all").items():
        torch.testing.assert_close(gradients.T @ keys, expected[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_answer_tokens_are_a_selection_of_all_tokens(kind):
    lm = make(kind)
    batch = one_batch(lm)
    answers, everything = capture(lm, batch), capture(lm, batch, tokens="all")
    chosen = batch.answer_mask[batch.inputs["attention_mask"].bool()]
    for name in lm.layers:
        assert len(everything[name].keys) == int(batch.inputs["attention_mask"].sum())
        assert len(answers[name].keys) == len(batch.labels) == len(batch.rows)
        for ours, whole in zip(answers[name], everything[name], strict=True):
            assert torch.equal(ours, whole[chosen])


def test_in_the_last_block_only_answer_positions_carry_gradient():
    lm = make()
    batch = one_batch(lm)
    chosen = batch.answer_mask[batch.inputs["attention_mask"].bool()]
    first, _, last = (gradients for _, gradients in capture(lm, batch, tokens="all").values())
    assert (last[~chosen] == 0).all() and (last[chosen].norm(dim=-1) > 0).all()
    assert (first[~chosen] != 0).any()


def test_a_key_times_the_weight_is_the_value():
    lm = make("gptj")
    batch = one_batch(lm)
    with watched(lm) as seen:
        lm.answer_logits(batch)
    for name, (keys, values) in seen.items():
        layer = lm.layers[name]
        torch.testing.assert_close(keys @ weight_view(layer).T + layer.bias, values)


def test_value_gradients_against_central_differences():
    lm = make(last=1)
    batch = one_batch(lm, PAIRS[:2])
    (name, layer), = lm.layers.items()
    gradients = capture(lm, batch)[name].value_gradients
    direction, step = torch.randn(gradients.shape), 1e-5

    def loss(sign):
        shift = torch.zeros(*batch.answer_mask.shape, gradients.shape[1])
        shift[batch.answer_mask] = sign * step * direction
        handle = layer.register_forward_hook(lambda _m, _a, output: output + shift)
        try:
            return fine_tuning_loss(lm.answer_logits(batch), batch)
        finally:
            handle.remove()

    difference = (loss(1) - loss(-1)) / (2 * step)
    torch.testing.assert_close(difference, (gradients * direction).sum(), rtol=1e-7, atol=1e-10)


# --- the other families


def both_families(kind, **options):
    """A toy of a family with pairs for it."""
    if kind == "bert":
        return toy_classifier(torch.float64, **options), [fact.pair for fact in toy_claims(7)]
    return toy_encoder_decoder(torch.float64, kind=kind, **options), [fact.pair for fact in toy_facts(7)]


OTHERS = ["bert", "t5", "bart"]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_the_product_over_all_tokens_is_the_weight_gradient_in_every_family(kind, which):
    lm, _ = both_families(kind)
    lm, pairs = both_families(kind, layers=feed_forward(lm.model, which), last=2)
    batch = one_batch(lm, pairs)
    expected = gradients_by_autograd(lm, batch)
    cached = capture(lm, batch, tokens="all")
    assert list(cached) == list(lm.layers)
    for name, (keys, gradients) in cached.items():
        torch.testing.assert_close(gradients.T @ keys, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_attention_layers_of_an_encoder_decoder_too(kind):
    patterns = ["*.k", "*.v", "*.q", "*.o"] if kind == "t5" else ["*_attn.*_proj"]
    lm, pairs = both_families(kind, layers=patterns, last=None)
    batch = one_batch(lm, pairs)
    expected = gradients_by_autograd(lm, batch)
    for name, (keys, gradients) in capture(lm, batch).items():  # without "all": every position counts anyway
        torch.testing.assert_close(gradients.T @ keys, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("last", [1, 2])
def test_encoder_and_decoder_layers_alone_and_together(last):
    together, pairs = both_families("t5", last=last)
    batch = one_batch(together, pairs)
    cached = capture(together, batch)
    assert len(cached) == 2 * last
    for pattern in feed_forward(together.model):
        alone, _ = both_families("t5", layers=pattern, last=last)
        for name, (keys, gradients) in capture(alone, batch).items():
            torch.testing.assert_close((keys, gradients), tuple(cached[name]), rtol=1e-10, atol=1e-13)


def test_all_and_answer_are_one_in_an_encoder_decoder():
    lm, pairs = both_families("t5", last=2)
    batch = one_batch(lm, pairs)
    some, every = capture(lm, batch), capture(lm, batch, tokens="all")
    for name in lm.layers:
        assert all(torch.equal(a, b) for a, b in zip(some[name], every[name], strict=True))
        side = "attention_mask" if name.startswith("encoder") else "decoder_attention_mask"
        assert len(some[name].keys) == int(batch.inputs[side].sum())


def test_in_a_classifiers_last_block_only_the_first_token_carries_gradient():
    lm, pairs = both_families("bert")
    batch = one_batch(lm, pairs)
    chosen = batch.answer_mask[batch.inputs["attention_mask"].bool()]
    first, last = (gradients for _, gradients in capture(lm, batch, tokens="all").values())
    assert (last[~chosen] == 0).all() and (last[chosen].norm(dim=-1) > 0).all() and (first[~chosen] != 0).any()
    assert [len(keys) for keys, _ in capture(lm, batch).values()] == [len(pairs)] * 2


def by_owner(lm, pairs, batch_size, tokens):
    """Every pair's cached tokens of each layer, whatever batch they came from."""
    found = {name: {} for name in lm.layers}
    for batch in lm.batches(pairs, batch_size):
        rows = batch.rows.unique_consecutive().tolist()
        for name, cached in capture(lm, batch, tokens).items():
            sizes = lm.family.cached_mask(name, batch, tokens).sum(1).tolist()
            parts = zip(cached.keys.split(sizes), cached.value_gradients.split(sizes), strict=True)
            found[name] |= dict(zip(rows, parts, strict=True))
    return found


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_neither_batch_size_nor_padding_matters_in_any_family(kind, batch_size):
    lm, pairs = both_families(kind, last=2)
    for tokens in ("answer", "all"):
        alone, together = by_owner(lm, pairs, 1, tokens), by_owner(lm, pairs, batch_size, tokens)
        torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_the_pairs_of_a_broken_token_are_named_in_every_family(kind, tokens):
    lm, pairs = both_families(kind, last=2)
    words = lm.model.get_input_embeddings().weight
    # One word stands in the prompts of pairs 2 and 5 alone.
    pairs = [(prompt.replace("w59", "w1"), answer.replace("w59", "w1")) for prompt, answer in pairs]
    pairs = [(f"{prompt} w59" if i in (2, 5) else prompt, answer) for i, (prompt, answer) in enumerate(pairs)]
    row = lm.tokenizer("w59", add_special_tokens=False)["input_ids"][0]
    if kind != "bert":  # or a broken word of the tied vocabulary would break every pair's logits
        lm.model.lm_head.weight = torch.nn.Parameter(words.clone(), requires_grad=False)
    words[row] = torch.nan
    named = set()
    for batch in lm.batches(pairs, 3):
        try:
            capture(lm, batch, tokens)
        except NonFiniteGradientError as error:
            named |= set(map(int, str(error).split("pairs ")[1].split(", counted")[0].split(", ")))
    assert named == {2, 5}


@pytest.mark.parametrize("pattern", ["bert.pooler.dense", "classifier"])
def test_a_layer_that_does_not_see_tokens_is_refused(pattern):
    lm, pairs = both_families("bert", layers=pattern, last=None)
    assert pattern in linear_layers(lm.model)
    with pytest.raises(LayerPatternError, match=f"layer {pattern} reads"):
        capture(lm, one_batch(lm, pairs))


# --- batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_the_batch_size_does_not_matter(kind, batch_size):
    lm = make(kind)
    alone, together = in_callers_order(lm, PAIRS, 1), in_callers_order(lm, PAIRS, batch_size)
    # Whatever the precision, GPT-J's attention computes its scores in float32.
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if kind == "gptj" else {"rtol": 1e-10, "atol": 1e-13}
    for name in lm.layers:
        torch.testing.assert_close(together[name], alone[name], **tolerance)


SHARED = make(last=2)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_any_cut_of_any_pairs_gives_the_same_tokens(count, batch_size, seed):
    pairs = random_pairs(count, seed)
    alone, cut = in_callers_order(SHARED, pairs, 1), in_callers_order(SHARED, pairs, batch_size)
    for name in SHARED.layers:
        torch.testing.assert_close(cut[name], alone[name], rtol=1e-9, atol=1e-12)


def test_the_loss_is_a_sum_in_nats():
    lm = make()
    batch = one_batch(lm)
    loss = fine_tuning_loss(lm.answer_logits(batch), batch)
    parts = sum(fine_tuning_loss(lm.answer_logits(b), b) for b in lm.batches(PAIRS, 1))
    torch.testing.assert_close(loss, parts, rtol=1e-12, atol=0)
    uniform = torch.zeros(len(batch.labels), VOCABULARY)
    torch.testing.assert_close(fine_tuning_loss(uniform, batch), len(batch.labels) * torch.tensor(VOCABULARY).log())


# --- what is built and what is left behind


@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_below_the_lowest_edited_layer(kind):
    lm = make(kind, last=2)
    blocks = lm.model.model.layers if kind == "llama" else lm.model.transformer.h
    seen = {}
    for i, block in enumerate(blocks):
        hook = lambda _m, _a, out, i=i: seen.update({i: (out[0] if isinstance(out, tuple) else out).requires_grad})  # noqa: E731
        block.register_forward_hook(hook)
    capture(lm, one_batch(lm))
    assert seen == {0: False, 1: True, 2: True}


def test_no_weight_has_a_gradient_and_nothing_is_left_behind():
    lm = make()
    capture(lm, one_batch(lm))
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_hooks_are_removed_after_an_error():
    lm = make()
    with pytest.raises(RuntimeError, match="stop"), watched(lm):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_watching_does_not_change_the_output():
    lm = make()
    batch = one_batch(lm)
    before = lm.answer_logits(batch)
    with watched(lm):
        watched_logits = lm.answer_logits(batch)
    assert torch.equal(watched_logits, before) and watched_logits.requires_grad and not before.requires_grad


def test_what_is_cached_holds_no_graph():
    lm = make()
    for cached in capture(lm, one_batch(lm)).values():
        assert not any(tensor.requires_grad for tensor in cached)


def test_capture_works_inside_no_grad():
    lm = make()
    batch = one_batch(lm)
    outside = capture(lm, batch)
    with torch.no_grad():
        inside = capture(lm, batch)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(inside[n].value_gradients, outside[n].value_gradients) for n in lm.layers)


def test_capture_twice_gives_the_same():
    lm = make()
    batch = one_batch(lm)
    first, second = capture(lm, batch), capture(lm, batch)
    assert all(torch.equal(a, b) for n in lm.layers for a, b in zip(first[n], second[n], strict=True))


# --- precision


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_or_better(kind, dtype, expected):
    lm = make(kind, dtype=dtype)
    for cached in capture(lm, one_batch(lm)).values():
        assert cached.keys.dtype == cached.value_gradients.dtype == expected


def test_bfloat16_is_near_float64():
    exact, rough = make(dtype=torch.float64), make(dtype=torch.bfloat16)
    a, b = capture(exact, one_batch(exact)), capture(rough, one_batch(rough))
    for name in exact.layers:
        for x, y in zip(a[name], b[name], strict=True):
            assert torch.nn.functional.cosine_similarity(x.flatten(), y.double().flatten(), dim=0) > 0.99


def test_at_least_float32():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        tensor = torch.ones(2, dtype=dtype)
        assert at_least_float32(tensor) is tensor


# --- chunks


@pytest.mark.parametrize("size", [1, 2, 5, 6, 100])
def test_rows_cut_and_join(size):
    cached = KeysAndGradients(torch.randn(5, 3), torch.randn(5, 2))
    chunks = [cached.rows(start, start + size) for start in range(0, 5, size)]
    assert all(isinstance(chunk, KeysAndGradients) for chunk in chunks)
    assert torch.equal(torch.cat([chunk.keys for chunk in chunks]), cached.keys)
    assert torch.equal(torch.cat([chunk.value_gradients for chunk in chunks]), cached.value_gradients)
    assert len(cached.rows(5, 9).keys) == 0


# --- errors


@pytest.mark.parametrize("tokens", ["answers", "", "ALL"])
def test_an_unknown_choice_of_tokens(tokens):
    lm = make()
    with pytest.raises(ValueError, match=f"not {tokens!r}"):
        capture(lm, one_batch(lm), tokens)


def broken(value, **options):
    """A model in which token 39 is not finite, and batches in which pairs 2 and 5 hold it."""
    lm = make(tie_word_embeddings=False, **options)
    lm.model.transformer.wte.weight[39] = value
    clean = [EncodedPair(tuple(t % 39 or 1 for t in p.prompt), tuple(t % 39 or 1 for t in p.answer)) for p in PAIRS]
    return lm, [pair._replace(prompt=(39, *pair.prompt)) if i in (2, 5) else pair for i, pair in enumerate(clean)]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_layer_and_pairs_of_a_key_that_is_not_finite(value, tokens):
    lm, pairs = broken(value)
    with pytest.raises(NonFiniteGradientError, match=r"a key at layer transformer\.h\.0\.mlp\.c_proj .*pairs 2, 5, "):
        capture(lm, one_batch(lm, pairs), tokens)


def test_the_pairs_are_the_callers_whatever_the_batch_size():
    lm, pairs = broken(torch.nan)
    found = set()
    for batch in lm.batches(pairs, 2):
        try:
            capture(lm, batch)
        except NonFiniteGradientError as error:
            numbers = str(error).split("pairs ")[1].split(", counted")[0]
            found |= set(map(int, numbers.split(", ")))
    assert found == {2, 5}


def test_a_value_gradient_that_is_not_finite():
    lm = make(last=1)
    batch = one_batch(lm)
    lm.model.transformer.ln_f.register_full_backward_hook(lambda _m, _g, _o: (torch.full_like(_g[0], torch.nan),))
    with pytest.raises(NonFiniteGradientError, match=r"a value gradient at layer transformer\.h\.2"):
        capture(lm, batch)


def test_many_pairs_are_counted_and_not_listed():
    lm, _ = broken(torch.nan)
    pairs = [EncodedPair((39,), (1,))] * 12
    with pytest.raises(NonFiniteGradientError, match=r"pairs 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"):
        capture(lm, one_batch(lm, pairs))


def test_the_error_is_a_malmen_error_and_arithmetic():
    assert issubclass(NonFiniteGradientError, MalmenError) and issubclass(NonFiniteGradientError, ArithmeticError)
