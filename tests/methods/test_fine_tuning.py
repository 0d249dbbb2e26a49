"FT: AdamW on W + S is AdamW on the weights, nothing depends on the cuts, the model stays as it is."

import copy
import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from tokenizers.normalizers import Replace
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, T5Config, T5ForConditionalGeneration

from malmen_repro.evaluation import evaluate
from malmen_repro.facts import ConflictingFactsError, NoFactsError
from malmen_repro.language_models import (
    ContextLengthError,
    EmptyAnswerError,
    LanguageModel,
    LayerPatternError,
    feed_forward,
    match_layers,
    weight_view,
)
from malmen_repro.methods.fine_tuning import FineTuning, FineTuningConfig, ShiftAdamW, fine_tuned, fine_tuned_layers
from malmen_repro.protocol import EditorError
from malmen_repro.weight_shifts import NonFiniteShiftError, WeightShift
from tests.toy import toy_classifier, toy_facts, toy_model, toy_tokenizer

FFN = ["transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj"]
CONFIG = FineTuningConfig(learning_rate=0.01, weight_decay=0.3, epochs=3, batch_size=5)


def toy(dtype=torch.float64, **options):
    "The toy decoder as FT sees it, or with other layers."
    return toy_model(dtype, **{"layers": FFN, "last": 3, **options})


def difference(one, two):
    "The largest difference of two shifts of the same layers."
    assert list(one.shifts) == list(two.shifts)
    return max((one.shifts[name] - two.shifts[name]).abs().max().item() for name in one.shifts)


# --- the same as training the weights


def all_logits(lm, batch):
    "At the answer positions, with no hook."
    return lm.model(**batch.inputs).logits[batch.answer_mask]


def trained_weights(lm, facts, config, logits_of=all_logits):
    "The textbook: AdamW on the weights of a copy, in whole mini-batches; returns what changed."
    own = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, lm.pattern, lm.last)
    weights = [layer.weight.requires_grad_() for layer in own.layers.values()]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(facts), generator=generator).split(config.batch_size):
            (batch,) = own.batches([facts[i].pair for i in rows.tolist()], len(rows))
            loss = F.cross_entropy(logits_of(own, batch), batch.labels, reduction="sum") / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: weight_view(own.layers[name]).detach() - weight_view(lm.layers[name]) for name in lm.layers}


@pytest.mark.parametrize("options", [{}, {"layers": FFN[1], "last": 1}, {"layers": FFN[0], "last": 2}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("count", "mini"), [(1, 5), (5, 5), (12, 5), (3, 1)])
def test_the_shift_is_what_adamw_does_to_the_weights(count, mini, decay, options):
    lm, facts = toy(**options), toy_facts(count)
    config = replace(CONFIG, weight_decay=decay, batch_size=mini, seed=count)
    shift = FineTuning(lm, config).edit(facts)
    assert difference(shift, WeightShift(trained_weights(lm, facts, config))) < 1e-10


def test_every_family_is_fine_tuned_as_adamw_would(family):
    lm, facts = family
    ft = FineTuning.of(lm, CONFIG)
    wanted = WeightShift(trained_weights(ft.lm, facts, CONFIG, lambda own, batch: own.answer_logits(batch)))
    shift = ft.edit(facts)
    assert difference(shift, wanted) < 1e-10
    assert all(value.norm() > 0 for value in shift.shifts.values())
    assert shift.metadata["losses"][-1] < shift.metadata["losses"][0]
    assert difference(shift, ft.edit(facts, batch_size=2)) < 1e-10
    evaluate(lm, facts, shift)


def test_the_decay_acts_on_the_whole_weight_and_not_on_the_shift():
    lm, facts = toy(), toy_facts(4)
    with_decay = FineTuning(lm, replace(CONFIG, epochs=1)).edit(facts)  # one step
    without = FineTuning(lm, replace(CONFIG, epochs=1, weight_decay=0.0)).edit(facts)
    for name, layer in lm.layers.items():
        pull = -CONFIG.learning_rate * CONFIG.weight_decay * weight_view(layer)
        assert torch.allclose(with_decay.shifts[name] - without.shifts[name], pull, rtol=0, atol=1e-14)


def test_an_optimiser_step_clears_the_gradients():
    lm = toy()
    adam = ShiftAdamW(lm, CONFIG)
    sum(shift.sum() for shift in adam.shifts.values()).backward()
    adam.step()
    assert all(shift.grad is None for shift in adam.shifts.values())
    assert all(shift.requires_grad and shift.is_leaf for shift in adam.shifts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifts_are_float32_for_a_model_in_float32_or_less(dtype):
    lm, facts = toy(dtype), toy_facts(6)
    shift = FineTuning(lm, CONFIG).edit(facts)
    assert all(value.dtype == torch.float32 for value in shift.shifts.values())
    assert shift.metadata["losses"][-1] < shift.metadata["losses"][0]


# --- nothing depends on the cuts


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("mini", [1, 5, 100])
def test_the_shift_does_not_depend_on_the_batch_size(batch_size, mini):
    lm, facts = toy(), toy_facts(11)
    ft = FineTuning(lm, replace(CONFIG, batch_size=mini, epochs=2))
    whole, cut = ft.edit(facts, batch_size=1000), ft.edit(facts, batch_size=batch_size)
    assert difference(whole, cut) < 1e-10
    assert cut.metadata["losses"] == pytest.approx(whole.metadata["losses"], rel=1e-10)


def test_the_order_follows_the_seed_and_the_seed_alone():
    lm, facts = toy(), toy_facts(11)
    edit = {seed: FineTuning(lm, replace(CONFIG, seed=seed)).edit(facts) for seed in (0, 1)}
    torch.manual_seed(99)
    assert difference(edit[0], FineTuning(lm, CONFIG).edit(facts)) == 0
    assert difference(edit[0], edit[1]) > 1e-4


def test_each_epoch_is_shuffled_anew(monkeypatch):
    lm, facts, seen = toy(), toy_facts(11), []
    batches = lm.batches

    def watch(pairs, batch_size):
        seen.append(list(pairs))
        return batches(pairs, batch_size)

    monkeypatch.setattr(lm, "batches", watch)
    FineTuning(lm, replace(CONFIG, epochs=4)).edit(facts)
    assert [len(chosen) for chosen in seen] == [5, 5, 1] * 4
    epochs = [sum(seen[start : start + 3], []) for start in range(0, 12, 3)]
    assert all(sorted(epoch) == sorted(lm.encode([fact.pair for fact in facts])) for epoch in epochs)
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))


def test_the_random_state_of_the_caller_is_left_alone():
    lm, before = toy(), torch.get_rng_state()
    FineTuning(lm, CONFIG).edit(toy_facts(6))
    assert torch.equal(torch.get_rng_state(), before)


# --- an editor like the others


def test_editing_leaves_the_model_alone():
    lm, facts = toy(torch.float32), toy_facts(6)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    FineTuning(lm, CONFIG).edit(facts)
    assert not lm.model.training
    for name, p in lm.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and not p.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_editing_works_where_gradients_are_off():
    lm, facts = toy(), toy_facts(6)
    with torch.no_grad():
        shift = FineTuning(lm, CONFIG).edit(facts)
    assert difference(shift, FineTuning(lm, CONFIG).edit(facts)) == 0
    assert not any(value.requires_grad for value in shift.shifts.values())


def test_a_shift_after_each_epoch_is_the_shift_of_so_many_epochs():
    lm, facts = toy(), toy_facts(7)
    shifts = list(FineTuning(lm, CONFIG).after_each_epoch(facts))
    assert [shift.metadata["epochs"] for shift in shifts] == [1, 2, 3]
    assert [len(shift.metadata["losses"]) for shift in shifts] == [1, 2, 3]
    for epochs, shift in enumerate(shifts, 1):
        assert difference(shift, FineTuning(lm, replace(CONFIG, epochs=epochs)).edit(facts)) == 0


def test_the_first_loss_is_the_unedited_models_and_training_lowers_it():
    lm, facts = toy(), toy_facts(7)
    shift = FineTuning(lm, replace(CONFIG, weight_decay=0.0, batch_size=7, epochs=40)).edit(facts)
    (batch,) = lm.batches([fact.pair for fact in facts], 7)
    loss = F.cross_entropy(lm.answer_logits(batch), batch.labels, reduction="sum").item() / 7
    assert shift.metadata["losses"][0] == pytest.approx(loss, rel=1e-12)
    assert shift.metadata["losses"][-1] < 0.5 * loss
    assert evaluate(lm, facts, shift).mean("ES") == 1.0


def test_metadata_are_json_and_the_shift_survives_a_file(tmp_path):
    lm = toy(torch.float32)
    shift = FineTuning(lm, CONFIG).edit(toy_facts(3))
    assert shift.metadata["method"] == FineTuning.method == "FT"
    assert shift.metadata["facts"] == 3 and shift.metadata["epochs"] == 3
    assert json.loads(json.dumps(shift.metadata)) == shift.metadata
    assert difference(WeightShift.load(shift.save(tmp_path / "ft.safetensors")), shift) == 0


def test_a_shift_fits_the_model_under_any_wrapper():
    malmen = toy_model()
    ft = FineTuning.of(malmen, CONFIG)
    assert ft.lm.model is malmen.model and ft.lm.tokenizer is malmen.tokenizer and ft.config is CONFIG
    facts = toy_facts(4)
    shift = ft.edit(facts)
    with shift.applied(malmen):
        edited = [malmen.answer_logits(batch) for batch in malmen.batches([fact.pair for fact in facts])]
    own = LanguageModel(copy.deepcopy(malmen.model), malmen.tokenizer, malmen.pattern, malmen.last)
    shift.merge_into(own)
    merged = [own.answer_logits(batch) for batch in own.batches([fact.pair for fact in facts])]
    for one, two in zip(edited, merged, strict=True):
        assert torch.allclose(one, two, atol=1e-4)
    assert list(malmen.layers) == [f"transformer.h.{i}.mlp.c_proj" for i in (1, 2)]


def test_the_defaults_are_the_papers():
    config = FineTuning(toy()).config
    assert (config.learning_rate, config.weight_decay, config.epochs) == (5e-4, 5e-4, 5)
    with pytest.raises(FrozenInstanceError):
        config.epochs = 6


# --- which layers


def tuned(model):
    "Names of the layers FT takes."
    return list(match_layers(model, *fine_tuned_layers(model)))


def on_meta(kind, config):
    "A model without weights."
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize(("blocks", "first"), [(1, 0), (2, 0), (3, 0), (4, 1), (12, 9)])
def test_gpt2_has_both_layers_of_the_last_three_blocks(blocks, first):
    config = GPT2Config(n_embd=8, n_head=2, n_layer=blocks, vocab_size=10)
    wanted = [f"transformer.h.{i}.mlp.{fc}" for i in range(first, blocks) for fc in ("c_fc", "c_proj")]
    assert tuned(on_meta(GPT2LMHeadModel, config)) == wanted


@pytest.mark.parametrize(("blocks", "chosen"), [(28, 21), (4, 3), (3, 2), (2, 1), (1, 0)])
def test_gptj_has_the_second_layer_of_one_block(blocks, chosen):
    config = GPTJConfig(n_embd=8, n_head=2, rotary_dim=4, n_layer=blocks, vocab_size=10)
    assert tuned(on_meta(GPTJForCausalLM, config)) == [f"transformer.h.{chosen}.mlp.fc_out"]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (4, 3)])
def test_t5_has_all_layers_of_the_last_two_blocks_of_both_stacks(gated, blocks):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 10}
    sizes |= {"num_layers": blocks[0], "num_decoder_layers": blocks[1]}
    model = on_meta(T5ForConditionalGeneration, T5Config(**sizes, feed_forward_proj="gated-gelu" if gated else "relu"))
    depth, names = min(2, *blocks), ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
    assert set(tuned(model)) == {
        f"{stack}.block.{i}.layer.{place}.DenseReluDense.{name}"
        for stack, place, count in (("encoder", 1, blocks[0]), ("decoder", 2, blocks[1]))
        for i in range(count - depth, count)
        for name in names
    }


def test_bert_has_its_ffn_and_not_its_attention():
    model = toy_classifier().model
    assert tuned(model) == [
        f"bert.encoder.layer.{i}.{layer}.dense" for i in range(3) for layer in ("intermediate", "output")
    ]


def test_a_second_view_shares_the_model(family):
    lm, _ = family
    view = fine_tuned(lm)
    assert view.model is lm.model and view.tokenizer is lm.tokenizer and view.layers is not lm.layers
    assert set(view.layers) >= set(match_layers(lm.model, feed_forward(lm.model, "second"), 1))
    assert all(view.layers[name] is layer for name, layer in lm.layers.items() if name in view.layers)


def test_an_architecture_without_known_layers_is_named():
    lm = toy()
    lm.model.config.model_type = "abacus"
    with pytest.raises(LayerPatternError, match="abacus"):
        fine_tuned_layers(lm.model)
    assert list(fine_tuned(lm).layers) == list(lm.layers)  # those that it is wrapped with
    assert FineTuning(LanguageModel(lm.model, toy_tokenizer(), FFN, 1), CONFIG).edit(toy_facts(2)).shifts


# --- bad input


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ([], NoFactsError),
        ([replace(toy_facts(1)[0], answer=answer) for answer in ("w1", "w2")], ConflictingFactsError),
        ([replace(toy_facts(1)[0], prompt="w1 " * 40)], ContextLengthError),
    ],
)
def test_facts_that_cannot_be_edited_are_refused(facts, error):
    with pytest.raises(error):
        FineTuning(toy(), CONFIG).edit(facts)


def test_an_answer_that_tokenises_to_nothing_is_refused():
    lm = toy()
    lm.tokenizer.backend_tokenizer.normalizer = Replace("silence", "")
    with pytest.raises(EmptyAnswerError, match="'silence'"):
        FineTuning(lm, CONFIG).edit([replace(toy_facts(1)[0], answer="silence")])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("weight_decay", -1e-3),
        ("weight_decay", math.nan),
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", 1.01),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(EditorError, match=field):
        replace(CONFIG, **{field: value})


def test_no_rows_in_the_model_are_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        FineTuning(toy(), CONFIG).edit(toy_facts(2), batch_size=0)


@pytest.mark.parametrize("decay", [1e20, 1e32])
def test_a_run_away_training_says_so(decay):
    lm = toy(torch.float32)
    with pytest.raises(NonFiniteShiftError, match="weight decay"):
        FineTuning(lm, replace(CONFIG, weight_decay=decay)).edit(toy_facts(11))
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_a_model_that_is_not_finite_is_found_at_the_first_step():
    lm = toy(torch.float32)
    with torch.no_grad():
        lm.model.transformer.h[2].mlp.c_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteShiftError, match="learning rate"):
        FineTuning(lm, CONFIG).edit(toy_facts(2))
