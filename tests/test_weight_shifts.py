"""Weight shifts: the overlay against changed weights, on/off, gradients, precision, merging, algebra, files, errors."""

import json
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
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
from malmen_repro.language_models import LanguageModel, linear_layers, match_layers, weight_view
from malmen_repro.weight_shifts import WeightShift, WeightShiftError, overlaid

PATTERNS = {
    "gpt2": "transformer.h.*.mlp.c_proj",
    "gptj": "transformer.h.*.mlp.fc_out",
    "llama": "model.layers.*.mlp.down_proj",
}
INPUTS = torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(0))


def make(kind="gpt2", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    ids = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.1}
    gpt = {"n_positions": 8, "n_embd": 16, "n_layer": 3, "n_head": 2, **ids}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, **ids}
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt)),
        "gptj": lambda: GPTJForCausalLM(GPTJConfig(rotary_dim=4, **gpt)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(max_position_embeddings=8, **sizes)),
    }[kind]()
    return model.to(dtype).eval().requires_grad_(False)


def random_shift(model, pattern, seed=0, scale=0.1, dtype=torch.float32, **metadata):
    generator = torch.Generator().manual_seed(seed)
    layers = match_layers(model, pattern)
    return WeightShift(
        {n: (torch.randn(weight_view(w).shape, generator=generator) * scale).to(dtype) for n, w in layers.items()},
        metadata,
    )


def logits(model):
    with torch.no_grad():
        return model(INPUTS).logits


def changed_by_hand(model, shift):
    for name, S in shift.shifts.items():
        weight_view(linear_layers(model)[name]).add_(S)
    return model


def same(a, b):
    return list(a.shifts) == list(b.shifts) and all(torch.equal(a.shifts[n], b.shifts[n]) for n in a.shifts)


# --- the overlay


@pytest.mark.parametrize("kind", PATTERNS)
def test_the_overlay_is_the_changed_model(kind):
    model = make(kind)
    shift = random_shift(model, PATTERNS[kind])
    with shift.applied(model) as edited:
        during = logits(edited)
    torch.testing.assert_close(during, logits(changed_by_hand(make(kind), shift)), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(during, logits(model))


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_switching_on_and_off_is_exact(kind, dtype):
    model = make(kind, dtype)
    before, weights = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    shift = random_shift(model, PATTERNS[kind])
    for _ in range(50):
        with shift.applied(model):
            pass
    with shift.applied(model):
        during = logits(model)
    assert during.dtype == dtype and not torch.equal(during, before)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_every_kind_of_layer_takes_a_shift():
    model = make()
    shift = random_shift(model, "transformer.h.*")
    assert len(shift.shifts) == 12  # c_attn, c_proj, c_fc, c_proj of three blocks
    with shift.applied(model):
        during = logits(model)
    torch.testing.assert_close(during, logits(changed_by_hand(make(), shift)), rtol=1e-6, atol=1e-7)


def test_a_shift_of_zero_changes_nothing():
    model = make()
    before = logits(model)
    with random_shift(model, PATTERNS["gpt2"], scale=0).applied(model):
        assert torch.equal(logits(model), before)
    with WeightShift({}).applied(model):
        assert torch.equal(logits(model), before)


def test_switched_off_after_an_error():
    model = make()
    before = logits(model)
    with pytest.raises(RuntimeError, match="stop"), random_shift(model, PATTERNS["gpt2"]).applied(model):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)


def test_a_language_model_is_as_good_as_its_model():
    model = make()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    lm, shift = LanguageModel(model, tokenizer), random_shift(model, PATTERNS["gpt2"])
    with shift.applied(model) as bare:
        expected = logits(bare)
    with shift.applied(lm) as edited:
        assert edited is model and torch.equal(logits(edited), expected)
    shift.check_fits(lm)
    assert shift.merge_into(lm) is model
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nesting_adds_up_and_leaves_in_any_order(order):
    model = make()
    before = logits(model)
    a = random_shift(model, PATTERNS["gpt2"], dtype=torch.float64)
    b = random_shift(model, "transformer.h.*.mlp.c_*", seed=1, dtype=torch.float64)
    with (a + b).applied(model):
        expected = logits(model)
    contexts = [a.applied(model), b.applied(model)]
    for context in contexts:
        context.__enter__()
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-12)
    for i in order:
        contexts[i].__exit__(None, None, None)
    assert torch.equal(logits(model), before)


def test_the_same_shift_twice_counts_twice():
    model = make()
    shift = random_shift(model, PATTERNS["gpt2"])
    with (shift + shift).applied(model):
        expected = logits(model)
    with shift.applied(model), shift.applied(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-8)


# --- precision


def test_a_small_shift_is_not_lost_on_a_bfloat16_model():
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 64, bias=False).to(torch.bfloat16).requires_grad_(False)
    layer.weight.zero_()  # what is left is the shift
    model, shift = torch.nn.ModuleDict({"layer": layer}), torch.randn(64, 512) * 1e-5
    key = torch.randn(1, 512).bfloat16()
    with overlaid(model, {"layer": shift}):
        value = layer(key)
    assert torch.equal(value, (key.float() @ shift.T).bfloat16())


def test_the_overlays_sum_is_rounded_once():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=False).to(torch.bfloat16).requires_grad_(False)
    model, shift, key = torch.nn.ModuleDict({"layer": layer}), torch.randn(32, 64), torch.randn(200, 64).bfloat16()
    before = layer(key)
    with overlaid(model, {"layer": shift}):
        assert torch.equal(layer(key), (before.float() + key.float() @ shift.T).bfloat16())


def test_a_float32_shift_does_not_make_a_float64_model_worse():
    model = make()
    shift = random_shift(model, PATTERNS["gpt2"])
    with shift.applied(model):
        during = logits(model)
    torch.testing.assert_close(during, logits(changed_by_hand(make(), shift)), rtol=1e-12, atol=1e-14)


# --- gradients


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_reach_the_shift_and_nothing_else(kind, dtype):
    model = make(kind, dtype)
    leaves = {n: S.requires_grad_() for n, S in random_shift(model, PATTERNS[kind]).shifts.items()}
    for _ in range(2):
        with overlaid(model, leaves):
            loss = model(INPUTS).logits.float().square().mean()
        loss.backward()  # outside of the overlay, as in training
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.norm() > 0 for leaf in leaves.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_is_the_changed_weights_gradient():
    model, other = make(), make()
    shift = random_shift(model, PATTERNS["gpt2"], dtype=torch.float64)
    leaves = {name: S.requires_grad_() for name, S in shift.shifts.items()}
    with overlaid(model, leaves):
        model(INPUTS).logits.square().mean().backward()
    with torch.no_grad():
        changed_by_hand(other, shift)
    weights = {name: linear_layers(other)[name].weight.requires_grad_() for name in leaves}
    other(INPUTS).logits.square().mean().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, weights[name].grad.T, rtol=1e-10, atol=1e-14)


def test_gradients_accumulate_in_float32_on_a_bfloat16_model():
    """1,000 small gradients after a large one: in bfloat16 their sum would stay where the first one put it."""
    layer = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16).requires_grad_(False)
    model, leaf = torch.nn.ModuleDict({"layer": layer}), torch.zeros(1, 1, requires_grad=True)
    for size in [1.0] + [2.0**-10] * 1000:
        with overlaid(model, {"layer": leaf}):
            layer(torch.tensor([[size]]).bfloat16()).sum().backward()
    assert leaf.grad.item() == 1 + 1000 * 2.0**-10


# --- the thing itself


def test_shifts_are_kept_in_float32_or_better_without_touching_the_callers():
    given_shifts = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.ones(2, 3, dtype=torch.float64)}
    shift = WeightShift(given_shifts)
    assert shift.shifts["a"].dtype == torch.float32 and shift.shifts["b"].dtype == torch.float64
    assert given_shifts["a"].dtype == torch.bfloat16 and shift.shifts is not given_shifts
    assert shift.metadata == {}


def test_a_shift_is_frozen_hashable_and_equal_to_itself():
    shift = WeightShift({"a": torch.ones(2, 3)})
    with pytest.raises(FrozenInstanceError):
        shift.shifts = {}
    assert shift == shift and shift != WeightShift({"a": torch.ones(2, 3)}) and len({shift, shift}) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_shift_that_is_not_finite(value):
    wrong = torch.zeros(2, 3)
    wrong[1, 2] = value
    with pytest.raises(WeightShiftError, match="layer b is not a finite matrix"):
        WeightShift({"a": torch.zeros(2, 3), "b": wrong})


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), ()])
def test_a_shift_that_is_no_matrix(shape):
    with pytest.raises(WeightShiftError, match="not a finite matrix"):
        WeightShift({"a": torch.zeros(shape)})


# --- does it fit?

BAD = {
    "missing": ({"transformer.h.9.mlp.c_proj": torch.zeros(16, 64)}, "no linear layer transformer.h.9.mlp.c_proj"),
    "transposed": ({"transformer.h.0.mlp.c_proj": torch.zeros(64, 16)}, r"\(16, 64\), its shift \(64, 16\)"),
    "output embedding": ({"lm_head": torch.zeros(30, 16)}, "no linear layer lm_head"),
    "not linear": ({"transformer.ln_f": torch.zeros(16, 16)}, "no linear layer transformer.ln_f"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_shift_that_does_not_fit_leaves_the_model_alone(case):
    shifts, says = BAD[case]
    model = make()
    before = logits(model)
    shift = WeightShift({"transformer.h.1.mlp.c_proj": torch.ones(16, 64), **shifts})
    for use in (shift.check_fits, shift.merge_into, lambda m: shift.applied(m).__enter__()):
        with pytest.raises(WeightShiftError, match=says):
            use(model)
    with pytest.raises(WeightShiftError, match=says), overlaid(model, shift.shifts):
        pass
    assert torch.equal(logits(model), before) and not any(module._forward_hooks for module in model.modules())


def test_errors_are_values_and_malmen_errors():
    assert issubclass(WeightShiftError, MalmenError) and issubclass(WeightShiftError, ValueError)


# --- merging


@pytest.mark.parametrize("kind", PATTERNS)
def test_merging_gives_the_overlaid_model(kind):
    model = make(kind)
    shift = random_shift(model, PATTERNS[kind])
    with shift.applied(model):
        during = logits(model)
    assert shift.merge_into(model) is model
    torch.testing.assert_close(logits(model), during, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_rounds_once(dtype):
    model = make(dtype=dtype)
    shift = random_shift(model, PATTERNS["gpt2"], scale=1e-3)
    wanted = {n: weight_view(linear_layers(model)[n]).float() + S for n, S in shift.shifts.items()}
    shift.merge_into(model)
    for name, weight in wanted.items():
        merged = weight_view(linear_layers(model)[name])
        assert merged.dtype == dtype and torch.equal(merged, weight.to(dtype))


def test_merging_changes_the_named_layers_only():
    model = make()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_shift(model, "transformer.h.1.mlp.c_proj").merge_into(model)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert changed == ["transformer.h.1.mlp.c_proj.weight"]


def test_a_merged_shift_comes_off_in_float64():
    model = make()
    before, shift = logits(model), random_shift(make(), PATTERNS["gpt2"])
    (-shift).merge_into(shift.merge_into(model))
    torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-12)


def test_merging_works_on_weights_that_require_gradients():
    model = make().requires_grad_(True)
    random_shift(model, PATTERNS["gpt2"]).merge_into(model)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


# --- algebra

layers = st.dictionaries(st.sampled_from("abc"), st.integers(-8, 8).map(lambda v: torch.full((2, 3), float(v))))


@settings(max_examples=60, deadline=None)
@given(layers, layers, layers)
def test_addition_is_what_it_should_be(x, y, z):
    x, y, z = WeightShift(x), WeightShift(y), WeightShift(z)

    def entries(shift):
        return {name: S[0, 0].item() for name, S in shift.shifts.items()}

    names = {*x.shifts, *y.shifts}
    zero = dict.fromkeys(names, 0.0)
    assert entries(x + y) == {n: (zero | entries(x))[n] + (zero | entries(y))[n] for n in names}
    assert entries(x - y) == {n: (zero | entries(x))[n] - (zero | entries(y))[n] for n in names}
    assert entries(x + y) == entries(y + x) and entries((x + y) + z) == entries(x + (y + z))
    minus = -x
    assert entries(-minus) == entries(x) and set(entries(x - x).values()) <= {0.0}
    assert entries(x + WeightShift({})) == entries(x)


def test_sums_are_new_and_leave_the_parts_alone():
    a, b = WeightShift({"a": torch.ones(2, 3)}, {"m": 1}), WeightShift({"a": torch.ones(2, 3)}, {"m": 2})
    total = a + b
    assert total.shifts["a"][0, 0] == 2 and a.shifts["a"][0, 0] == b.shifts["a"][0, 0] == 1
    assert total.metadata == {} and (-a).metadata == {"m": 1}


@pytest.mark.parametrize("operation", [lambda a, b: a + b, lambda a, b: a - b])
def test_shifts_of_different_models_do_not_add(operation):
    a, b = WeightShift({"x": torch.ones(2, 3)}), WeightShift({"y": torch.ones(1, 1), "x": torch.ones(3, 2)})
    with pytest.raises(WeightShiftError, match="layer x differ in shape"):
        operation(a, b)


# --- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shift_survives_saving(tmp_path, dtype):
    shift = random_shift(make(), PATTERNS["gpt2"], dtype=dtype, method="MALMEN", facts=3, note="čÿ", more={"a": [1]})
    path = shift.save(tmp_path / "new" / "folder" / "shift.safetensors")
    again = WeightShift.load(str(path))
    assert same(again, shift) and again.metadata == shift.metadata
    assert [p.name for p in path.parent.iterdir()] == ["shift.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["metadata"])["method"] == "MALMEN"


def test_saving_replaces_an_older_file(tmp_path):
    path = tmp_path / "shift.safetensors"
    WeightShift({"a": torch.ones(2, 3)}).save(path)
    WeightShift({"b": torch.zeros(1, 1)}).save(str(path))
    assert list(WeightShift.load(path).shifts) == ["b"]


def test_views_gradients_and_shared_memory_can_be_saved(tmp_path):
    whole = torch.randn(4, 6)
    parts = {"a": whole, "b": whole, "c": whole.T, "d": whole[1:3, ::2], "e": torch.ones(2, 2, requires_grad=True)}
    shift = WeightShift(parts)
    again = WeightShift.load(shift.save(tmp_path / "shift.safetensors"))
    assert set(again.shifts) == set(parts) and all(torch.equal(again.shifts[n], parts[n]) for n in parts)


def test_an_empty_shift_survives(tmp_path):
    assert WeightShift.load(WeightShift({}).save(tmp_path / "empty.safetensors")).shifts == {}


def test_metadata_that_are_no_json(tmp_path):
    with pytest.raises(WeightShiftError, match="plain JSON"):
        WeightShift({"a": torch.ones(2, 3)}, {"when": object()}).save(tmp_path / "shift.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(WeightShiftError, match="there is no shift file"):
            WeightShift.load(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_file_that_was_cut_short(tmp_path, keep):
    path = WeightShift({"a": torch.ones(8, 8)}).save(tmp_path / "shift.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightShiftError, match="damaged or not a shift file"):
        WeightShift.load(path)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("{}")
    with pytest.raises(WeightShiftError, match="damaged or not"):
        WeightShift.load(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.ones(2, 3)}, path, metadata=metadata)
        with pytest.raises(WeightShiftError, match="not a weight shift"):
            WeightShift.load(path)


@pytest.mark.parametrize("metadata", [{}, {"metadata": "{"}, {"metadata": ""}])
def test_a_header_that_is_damaged(tmp_path, metadata):
    path = tmp_path / "shift.safetensors"
    save_file({"a": torch.ones(2, 3)}, path, metadata={"format": "malmen-repro weight shift", **metadata})
    with pytest.raises(WeightShiftError, match="damaged or not"):
        WeightShift.load(path)


def test_a_file_with_a_shift_that_is_not_finite(tmp_path):
    path = tmp_path / "shift.safetensors"
    metadata = {"format": "malmen-repro weight shift", "metadata": "{}"}
    save_file({"a": torch.full((2, 3), torch.nan)}, path, metadata=metadata)
    with pytest.raises(WeightShiftError, match="not a finite matrix"):
        WeightShift.load(path)
