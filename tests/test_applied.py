"An edit that is on is there, whatever somebody did to the model; or an error says why it is not."

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import AlbertConfig, AlbertForSequenceClassification, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from malmen_repro.editors import MALMEN, EditorConfig
from malmen_repro.evaluation import evaluate
from malmen_repro.keys_and_gradients import capture, fine_tuning_loss, watched
from malmen_repro.language_models import (
    BusyModelError,
    LanguageModel,
    LanguageModelError,
    LayerPatternError,
    NonFiniteLogitsError,
    feed_forward,
    hooked,
    in_eval_mode,
    own_turn,
    uncompiled,
)
from malmen_repro.weight_shifts import WeightShift, WeightShiftError, overlaid
from tests.toy import LABELS, WORDS, toy_facts, toy_model, toy_tokenizer

IDS = torch.tensor([[5, 6, 7]])


def shift_of(lm, size=0.5, seed=0):
    torch.manual_seed(seed)
    return WeightShift({name: size * torch.randn(shape) for name, shape in lm.shapes.items()})


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def merged(lm, shift):
    return logits(shift.merge_into(copy.deepcopy(lm.model)))


# --- compiled models


@pytest.mark.parametrize("compiled", ["in place", "wrapped", "wrapped before", "parts"])
def test_a_compiled_model_is_edited_too(compiled):
    lm = toy_model()
    shift, wanted, model = shift_of(lm), merged(lm, shift_of(lm)), lm.model
    if compiled == "in place":
        model.compile(backend="eager")
    elif compiled == "parts":
        for block in model.transformer.h:
            block.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    before = logits(model)  # compiles
    if compiled == "wrapped before":
        lm = LanguageModel(model, lm.tokenizer, last=2)
    with shift.applied(model if compiled == "wrapped" else lm):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), before)


def test_a_compiled_models_facts_are_read_and_scored():
    lm, facts = toy_model(), toy_facts(4)
    shift = shift_of(lm)
    editor = MALMEN(lm, EditorConfig(rank=4))
    editor.observe(facts)
    wanted, scores = editor.edit(facts), evaluate(lm, facts, shift).summary()
    lm.model.compile(backend="eager")
    logits(lm.model)
    found = editor.edit(facts)
    assert all(torch.equal(found.shifts[name], wanted.shifts[name]) for name in wanted.shifts)
    assert evaluate(lm, facts, shift).summary() == scores


def test_overlapping_contexts_leave_the_compiler_as_it_was():
    model = torch.compile(toy_model().model, backend="eager")
    one, two = uncompiled(), uncompiled()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)  # not in the order of a stack, as two threads may do
    hook = model._orig_mod.transformer.h[1].mlp.c_proj.register_forward_hook(lambda *_: 0 * _[2])
    assert torch.equal(logits(model), logits(model._orig_mod))
    hook.remove()
    two.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "default"


# --- a layer that is not where it seems to be


class Around(nn.Module):
    "A feed-forward network whose code reads the weight and does not call the layer."

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        hidden = self.inner.act(self.inner.c_fc(x))
        return hidden @ self.inner.c_proj.weight + self.inner.c_proj.bias


def test_a_layer_that_the_model_goes_around_cannot_be_edited():
    lm = toy_model(layers="transformer.h.2.mlp.c_proj", last=None)
    lm.model.transformer.h[2].mlp = Around(lm.model.transformer.h[2].mlp)
    around = LanguageModel(lm.model, lm.tokenizer, "transformer.h.2.mlp.inner.c_proj")
    with shift_of(around).applied(around), pytest.raises(WeightShiftError, match="edit had no effect"):
        logits(around.model)
    with pytest.raises(LayerPatternError, match="goes around"):
        capture(around, next(around.batches([("w1 w2", "w3")])))


def test_a_layer_that_is_used_several_times_is_refused():
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = AlbertConfig(
        vocab_size=len(WORDS) + 2, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=24, **labels,
    )  # fmt: skip
    lm = LanguageModel(AlbertForSequenceClassification(config), toy_tokenizer("$A <end>"), "*.ffn_output")
    batch = next(lm.batches([("w1 w2", "REFUTES")]))
    with pytest.raises(LayerPatternError, match="more than once"):
        capture(lm, batch, "all")
    with shift_of(lm).applied(lm):  # an overlay counts in all uses
        edited = lm.answer_logits(batch)
    shift_of(lm).merge_into(lm)
    torch.testing.assert_close(lm.answer_logits(batch), edited, rtol=1e-4, atol=1e-5)


def test_opts_flattened_tokens_are_put_back_into_rows():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(WORDS) + 2, hidden_size=16, ffn_dim=24, word_embed_proj_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=24, dropout=0.0, pad_token_id=1, bos_token_id=0, eos_token_id=0,
        init_std=0.2,
    )  # fmt: skip
    lm = LanguageModel(OPTForCausalLM(config), toy_tokenizer(), "model.decoder.layers.*.fc2")
    batch = next(lm.batches([fact.pair for fact in toy_facts(3)]))
    found = capture(lm, batch, "all")
    leaves = {name: torch.zeros(shape, requires_grad=True) for name, shape in lm.shapes.items()}
    with overlaid(lm, leaves):
        fine_tuning_loss(lm.answer_logits(batch), batch).backward()
    for name, leaf in leaves.items():  # for a linear layer the gradient by S is the sum over tokens
        torch.testing.assert_close(found[name].value_gradients.T @ found[name].keys, leaf.grad, rtol=1e-4, atol=1e-6)


class AddsInPlace(nn.Module):
    "As Falcon's blocks do with what their feed-forward network gives."

    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        out = self.inner(x)
        out *= self.factor
        return out


def test_what_is_changed_in_place_behind_a_layer_is_read_before_the_change():
    lm = toy_model()
    for block in lm.model.transformer.h[1:]:
        block.mlp = AddsInPlace(block.mlp, 3.0)
    lm = LanguageModel(lm.model, lm.tokenizer, "*.inner.c_proj")
    batch = next(lm.batches([fact.pair for fact in toy_facts(3)]))
    found = capture(lm, batch, "all")
    leaves = {name: torch.zeros(shape, requires_grad=True) for name, shape in lm.shapes.items()}
    with overlaid(lm, leaves):
        fine_tuning_loss(lm.answer_logits(batch), batch).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name].value_gradients.T @ found[name].keys, leaf.grad, rtol=1e-4, atol=1e-6)


# --- modes, interrupts, threads


def test_a_model_in_training_mode_is_read_without_dropout_and_left_in_that_mode():
    lm, facts = toy_model(), toy_facts(4)
    editor = MALMEN(lm, EditorConfig(rank=4))
    editor.observe(facts)
    wanted, scores = editor.edit(facts), evaluate(lm, facts, None).summary()
    for module in lm.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    lm.model.train()
    lm.model.lm_head.eval()
    found = editor.edit(facts)
    assert all(torch.equal(found.shifts[name], wanted.shifts[name]) for name in wanted.shifts)
    assert evaluate(lm, facts, None).summary() == scores
    assert lm.model.training and lm.model.transformer.h[0].training and not lm.model.lm_head.training


def test_edits_are_made_in_inference_mode_too():
    lm, facts = toy_model(), toy_facts(4)
    editor = MALMEN(lm, EditorConfig(rank=4))
    editor.observe(facts)
    wanted = editor.edit(facts)
    with torch.inference_mode():
        found, scores = editor.edit(facts), evaluate(lm, facts, wanted).summary()
    assert all(torch.equal(found.shifts[name], wanted.shifts[name]) for name in wanted.shifts)
    assert scores == evaluate(lm, facts, wanted).summary()
    assert not any(shift.is_inference() for shift in found.shifts.values())
    with torch.inference_mode():
        model = copy.deepcopy(lm.model)
    with pytest.raises(LanguageModelError, match="inference_mode"):
        LanguageModel(model, lm.tokenizer)


@pytest.mark.parametrize("use", ["applied", "watched"])
def test_an_interrupt_while_hooks_are_registered_leaves_none(use):
    lm = toy_model()
    before, second = logits(lm.model), lm.model.transformer.h[2].mlp.c_proj

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    second.register_forward_hook = stop
    with pytest.raises(KeyboardInterrupt), shift_of(lm).applied(lm) if use == "applied" else watched(lm):
        pass
    assert torch.equal(logits(lm.model), before) and not lm.model.transformer.h[1].mlp.c_proj._forward_hooks


def test_a_second_thread_is_refused_while_the_first_edits_or_reads():
    lm, facts = toy_model(), toy_facts(3)
    met = []

    def other():
        for use in (lambda: evaluate(lm, facts, None), lambda: shift_of(lm).applied(lm).__enter__()):
            try:
                use()
            except BusyModelError as error:
                met.append(str(error))

    with shift_of(lm).applied(lm):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        evaluate(lm, facts, None)  # the same thread may
    assert len(met) == 2 and "take turns" in met[0]
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(met) == 2  # nobody is at it any more


def test_turns_and_modes_end_with_an_error_too():
    lm = toy_model()
    lm.model.train()
    for use in (own_turn(lm.model), in_eval_mode(lm.model), uncompiled(), hooked([(lm.model, print)])):
        with pytest.raises(ZeroDivisionError), use:
            raise ZeroDivisionError
    assert lm.model.training and not lm.model._forward_hooks


# --- numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_no_scores(value):
    lm, facts = toy_model(), toy_facts(4)
    lm.model.transformer.h[2].mlp.c_proj.bias.data.fill_(value)
    for shift in (None, shift_of(lm)):
        with pytest.raises(NonFiniteLogitsError, match="pairs 0, 1, 2, 3"):
            evaluate(lm, facts, shift)


def test_a_token_that_the_model_rules_out_may_have_minus_infinity():
    lm, facts = toy_model(), toy_facts(4)
    lm.model.lm_head = nn.Linear(16, len(WORDS) + 2)
    lm.model.lm_head.bias.data[3] = -float("inf")
    assert evaluate(lm, facts, None).summary()


# --- weights that cannot take a shift


class Codes(nn.Linear):
    "A layer that keeps codes of 8 bits and a scale for each row."

    def __init__(self, layer):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.weight.shape[0], layer.weight.shape[1], layer.bias
        weight = layer.weight.detach().T
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def coded(model):
    model.transformer.h[2].mlp.c_proj = Codes(model.transformer.h[2].mlp.c_proj)


def computed(model):
    parametrize.register_parametrization(model.transformer.h[2].mlp.c_proj, "weight", Halved())


def shared(model):
    model.transformer.h[2].mlp.c_proj.weight = model.transformer.h[1].mlp.c_proj.weight


def off_loaded(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("spoil", [coded, computed, shared, off_loaded])
def test_a_shift_is_not_merged_where_it_would_be_lost_but_lies_over_it(spoil):
    lm = toy_model()
    spoil(lm.model)
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items() if not weight.is_meta}
    shift, plain = shift_of(lm), logits(lm.model)
    with pytest.raises(WeightShiftError, match="cannot be merged"):
        shift.merge_into(lm.model)
    for name, weight in before.items():
        assert torch.equal(lm.model.state_dict()[name], weight)
    with shift.applied(lm.model):
        edited = logits(lm.model)
    assert torch.isfinite(edited).all() and not torch.allclose(edited, plain)
    assert torch.equal(logits(lm.model), plain)


def test_an_off_loaded_models_facts_are_read():
    accelerate = pytest.importorskip("accelerate")
    lm, facts = toy_model(), toy_facts(4)
    editor = MALMEN(lm, EditorConfig(rank=4))
    editor.observe(facts)
    wanted = editor.edit(facts)
    accelerate.cpu_offload(lm.model, execution_device=torch.device("cpu"))
    found = editor.edit(facts)
    assert all(torch.allclose(found.shifts[name], wanted.shifts[name], atol=1e-6) for name in wanted.shifts)


def test_a_sum_beyond_half_precision_leaves_every_layer_as_it_was():
    lm = toy_model(torch.float16)
    names = list(lm.shapes)
    shift = WeightShift({names[0]: torch.ones(lm.shapes[names[0]]), names[1]: torch.full(lm.shapes[names[1]], 1e5)})
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    with pytest.raises(WeightShiftError, match="does not fit in torch.float16"):
        shift.merge_into(lm)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())


# --- wrappers


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_model_inside_pefts_wrapper_is_found_and_edited():
    peft = pytest.importorskip("peft")
    lm = toy_model()
    plain = copy.deepcopy(lm.model)
    for targets, end in ((["c_attn"], ""), (["mlp.c_proj"], ".base_layer")):
        config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True)
        model = peft.get_peft_model(copy.deepcopy(plain), config)
        assert feed_forward(model) == [f"base_model.model.transformer.h.*.mlp.c_proj{end}"]
        wrapped = LanguageModel(model, lm.tokenizer, feed_forward(model), last=2)
        assert isinstance(next(iter(wrapped.layers.values())), Conv1D)
        editor = MALMEN(wrapped, EditorConfig(rank=4))
        editor.observe(toy_facts(4))
        with editor.edit(toy_facts(4)).applied(wrapped):
            assert torch.isfinite(logits(model)).all()


def test_an_unusual_feed_forward_network_is_an_error_with_near_misses():
    model = toy_model().model
    for block in model.transformer.h:
        block.mlp = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(LayerPatternError, match="near misses"):
        feed_forward(model)


def test_generation_with_a_static_cache_says_what_the_merged_model_says():
    lm = toy_model()
    shift = shift_of(lm, 2.0)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}

    def said(model):
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)

    before, wanted = said(lm.model), said(shift.merge_into(copy.deepcopy(lm.model)))
    with shift.applied(lm):
        found = said(lm.model)
    assert torch.equal(found, wanted) and not torch.equal(found, before) and torch.equal(said(lm.model), before)
