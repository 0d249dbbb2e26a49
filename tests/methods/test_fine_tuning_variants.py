"FT-W, FT-L, FT-M and LoRA: the steps are Adam's and peft's, nothing depends on the cuts, the model stays as it is."

import copy
import json
import math
import sys
from dataclasses import FrozenInstanceError, replace
from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM

from malmen_repro.evaluation import evaluate
from malmen_repro.facts import ConflictingFactsError, MissingExtraError, NoFactsError
from malmen_repro.language_models import (
    ContextLengthError,
    LanguageModel,
    LayerPatternError,
    weight_view,
)
from malmen_repro.methods import fine_tuning_variants
from malmen_repro.methods.fine_tuning_variants import (
    FT_L,
    FT_M,
    FT_W,
    LOSSES,
    FactDropout,
    LoRA,
    LoRAConfig,
    StepConfig,
    SteppedFineTuning,
    SteppedFineTuningConfig,
    TunedAdapters,
    TunedShifts,
    adapter,
    mini_batches,
    prompt_alone,
    stepped_layer,
    swapped,
)
from malmen_repro.protocol import EditorError
from malmen_repro.weight_shifts import NonFiniteShiftError, WeightShift, overlaid
from tests.toy import toy_classifier, toy_encoder_decoder, toy_facts, toy_model

LAST = "prompt's last token"
CONFIG = SteppedFineTuningConfig(learning_rate=0.01, weight_decay=0.3, steps=5, batch_size=5)
LORA = LoRAConfig(learning_rate=0.01, steps=5, rank=3, alpha=6.0, dropout=0.0)
EDITORS = {
    "FT": lambda lm, **changes: SteppedFineTuning(lm, replace(CONFIG, **changes)),
    "LoRA": lambda lm, **changes: LoRA(lm, replace(LORA, **{"batch_size": 5, "dropout": 0.3, **changes})),
}


@pytest.fixture(params=EDITORS.values(), ids=EDITORS)
def make(request):
    "How either editor is made, with changed settings."
    return request.param


def difference(one, two):
    "The largest difference of two shifts of the same layers."
    assert list(one.shifts) == list(two.shifts)
    return max((one.shifts[name] - two.shifts[name]).abs().max().item() for name in one.shifts)


def state_of(lm):
    "All there is to a model: names, tensors, switches and hooks."
    tensors = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    modules = [(name, id(module), module.training) for name, module in lm.model.named_modules()]
    switches = [(name, p.requires_grad, p.grad is None, id(p)) for name, p in lm.model.named_parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()]
    return tensors, modules, switches, hooks, sorted(vars(lm.model))


def assert_same(before, after):
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert not any("lora" in name for name in after[0])


# --- losses, from one pass a fact, without any hook


def loss_by_hand(lm, fact, kind):
    "The sum over an answer's tokens, from a single unpadded row."
    ((prompt, answer),) = lm.encode([fact.pair])
    ids = torch.tensor([prompt if kind == LAST else (*prompt, *answer)])
    log_p = lm.model(input_ids=ids).logits[0].log_softmax(-1)
    places = [len(prompt) - 1] * len(answer) if kind == LAST else range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return -sum(log_p[place, token] for place, token in zip(places, answer, strict=True))


def losses_of(lm, facts, kind, batch_size=100):
    "A loss a fact, by batches."
    pairs, loss = lm.encode([fact.pair for fact in facts]), LOSSES[kind]
    parts = [
        loss.of(lm.answer_logits(batch), batch, pairs)
        for batch in lm.batches([loss.reads(pair) for pair in pairs], batch_size)
    ]
    return sum(parts), parts


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_that_of_single_rows(kind, batch_size):
    lm, facts = toy_model(torch.float64), toy_facts(11)
    losses, _ = losses_of(lm, facts, kind, batch_size)
    wanted = torch.stack([loss_by_hand(lm, fact, kind) for fact in facts])
    assert losses.shape == (11,) and torch.allclose(losses, wanted, rtol=1e-10)


@pytest.mark.parametrize("kind", LOSSES)
def test_facts_outside_a_batch_have_no_loss(kind):
    lm, facts = toy_model(), toy_facts(5)
    _, parts = losses_of(lm, facts, kind, 2)
    assert [int((part != 0).sum()) for part in parts] == [2, 2, 1]
    assert ((torch.stack(parts) != 0).sum(0) == 1).all()


def test_the_losses_agree_on_answers_of_one_token_and_on_no_other():
    lm, facts = toy_model(torch.float64), toy_facts(30)
    one, two = (losses_of(lm, facts, kind)[0] for kind in LOSSES)
    short = torch.tensor([len(fact.answer.split()) == 1 for fact in facts])
    assert 5 < short.sum() < 25
    assert torch.allclose(one[short], two[short], rtol=1e-12)
    assert ((one - two).abs()[~short] > 1e-3).all()


def test_a_token_that_comes_twice_counts_twice():
    lm = toy_model(torch.float64)
    once, twice = (replace(toy_facts(1)[0], answer=answer) for answer in ("w7", "w7 w7"))
    assert losses_of(lm, [twice], LAST)[0] == pytest.approx(2 * losses_of(lm, [once], LAST)[0].item())


def test_the_model_reads_the_prompt_alone():
    lm = toy_model()
    for pair in lm.encode([fact.pair for fact in toy_facts(8)]):
        (batch,) = lm.batches([prompt_alone(pair)])
        assert tuple(batch.inputs["input_ids"][0].tolist()) == pair.prompt
        assert batch.answer_mask.nonzero().tolist() == [[0, len(pair.prompt) - 1]]


def test_losses_are_float32_for_a_model_in_less():
    for kind in LOSSES:
        losses, _ = losses_of(toy_model(torch.bfloat16), toy_facts(3), kind)
        assert losses.dtype == torch.float32


@pytest.mark.parametrize("kind", LOSSES)
def test_equal_one_token_answers_give_equal_shifts(kind):
    lm = toy_model(torch.float64)
    facts = [replace(fact, answer=fact.answer.split()[0]) for fact in toy_facts(6)]
    assert difference(*(SteppedFineTuning(lm, replace(CONFIG, loss=kind)).edit(facts) for kind in LOSSES)) < 1e-10


def test_the_last_tokens_loss_has_a_floor():
    lm, fact = toy_model(torch.float64, width=64), replace(toy_facts(1)[0], answer="w3 w4 w5")
    config = replace(FT_L, learning_rate=0.05, steps=60)
    losses = SteppedFineTuning.of(lm, config).edit([fact]).metadata["losses"]
    assert 3 * math.log(3) <= losses[-1] < 3 * math.log(3) + 0.2 < losses[0]


# --- the same as training the weights


def all_logits(lm, batch):
    "At the answer positions, with no hook."
    return lm.model(**batch.inputs).logits[batch.answer_mask]


def textbook(lm, facts, config, parameters, loss_of):
    "Adam on parameters, in whole mini-batches."
    decay = getattr(config, "weight_decay", 0.0)
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=decay)
    for rows in islice(mini_batches(len(facts), config), config.steps):
        loss = loss_of([facts[i] for i in rows.tolist()]) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sum_of_losses(lm, chosen, kind="answer"):
    "Of some facts in one batch, with no hook."
    if kind == LAST:
        return sum(loss_by_hand(lm, fact, kind) for fact in chosen)
    (batch,) = lm.batches([fact.pair for fact in chosen], len(chosen))
    logits = all_logits(lm, batch) if lm.family.name == "decoder" else lm.answer_logits(batch)
    return F.cross_entropy(logits, batch.labels, reduction="sum")


def trained_weights(lm, facts, config):
    "Adam on the weights of a copy; returns what changed."
    own = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, lm.pattern, lm.last)
    weights = [layer.weight.requires_grad_() for layer in own.layers.values()]
    textbook(own, facts, config, weights, lambda chosen: sum_of_losses(own, chosen, config.loss))
    return WeightShift({n: weight_view(own.layers[n]).detach() - weight_view(lm.layers[n]) for n in lm.layers})


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("count", "mini"), [(1, 5), (12, 5), (12, None), (3, 1)])
def test_the_shift_is_what_adam_does_to_the_weights(count, mini, decay, kind):
    lm, facts = toy_model(torch.float64), toy_facts(count)
    config = replace(CONFIG, weight_decay=decay, batch_size=mini, seed=count, loss=kind)
    assert difference(SteppedFineTuning(lm, config).edit(facts), trained_weights(lm, facts, config)) < 1e-10


def test_every_family_is_tuned_as_adam_would(family):
    lm, facts = family
    ft = SteppedFineTuning.of(lm, CONFIG)
    shift = ft.edit(facts)
    assert len(shift.shifts) == 1
    assert difference(shift, trained_weights(ft.lm, facts, CONFIG)) < 1e-10
    assert difference(shift, ft.edit(facts, batch_size=2)) < 1e-10
    evaluate(lm, facts, shift)


def test_an_optimiser_step_clears_the_gradients():
    adam = TunedShifts(toy_model(), CONFIG)
    sum(shift.sum() for shift in adam.shifts.values()).backward()
    adam.step()
    assert all(shift.grad is None and shift.requires_grad and shift.is_leaf for shift in adam.shifts.values())
    assert all(not value.requires_grad for value in adam.values().values())


# --- steps


@pytest.mark.parametrize(("count", "size"), [(1, None), (7, None), (7, 1), (7, 3), (7, 7), (7, 100)])
def test_mini_batches_pass_over_the_facts_in_a_new_order_each_time(count, size):
    config = StepConfig(batch_size=size, seed=1)
    size = min(size or count, count)
    a_pass = -(-count // size)
    drawn = [rows.tolist() for rows in islice(mini_batches(count, config), 3 * a_pass)]
    passes = [drawn[i : i + a_pass] for i in range(0, 3 * a_pass, a_pass)]
    assert all(sorted(sum(one, [])) == list(range(count)) for one in passes)
    assert all(rows == sorted(rows) and len(rows) <= size for rows in drawn)
    assert size in (1, count) or passes[0] != passes[1]
    again = [rows.tolist() for rows in islice(mini_batches(count, config), 3 * a_pass)]
    assert again == drawn


def test_a_step_of_all_facts_does_not_depend_on_the_seed():
    lm, facts = toy_model(), toy_facts(6)
    one, two = (SteppedFineTuning(lm, replace(CONFIG, batch_size=None, seed=s)).edit(facts) for s in (0, 1))
    assert difference(one, two) == 0


def test_the_order_of_mini_batches_follows_the_seed(make):
    lm, facts = toy_model(torch.float64), toy_facts(11)
    edit = {seed: make(lm, seed=seed).edit(facts) for seed in (0, 1)}
    torch.manual_seed(99)
    assert difference(edit[0], make(lm).edit(facts)) == 0
    assert difference(edit[0], edit[1]) > 1e-4


@pytest.mark.parametrize("mini", [None, 4])
def test_training_stops_before_the_step_after_a_low_loss(make, mini):
    lm, facts = toy_model(torch.float64), toy_facts(6)
    about = {"steps": 30, "learning_rate": 0.02, "batch_size": mini}
    if make is EDITORS["FT"]:
        about["weight_decay"] = 0.0
    shift = make(lm, stop_loss=7.0, **about).edit(facts)
    taken, losses = shift.metadata["steps"], shift.metadata["losses"]
    assert 1 < taken < 30 and len(losses) == taken + 1
    assert difference(shift, make(lm, **{**about, "steps": taken}).edit(facts)) == 0
    if mini is None:
        assert losses[-1] < 7 <= min(losses[:-1])
    never = make(lm, **about).edit(facts).metadata
    assert never["steps"] == 30 == len(never["losses"]) and never["losses"][: taken + 1] == losses


def test_a_low_loss_at_the_start_leaves_everything_as_it_is(make):
    shift = make(toy_model(), stop_loss=1e3, batch_size=None).edit(toy_facts(4))
    assert shift.metadata["steps"] == 0 and len(shift.metadata["losses"]) == 1
    assert all((value == 0).all() for value in shift.shifts.values())


def test_mini_batches_stop_when_all_facts_were_seen_and_not_before():
    metadata = EDITORS["FT"](toy_model(), stop_loss=1e3, batch_size=2).edit(toy_facts(7)).metadata
    assert metadata["steps"] == 3 and len(metadata["losses"]) == 4  # 2, 2, 2 and 1 facts


def test_a_stop_in_mini_batches_is_by_the_latest_loss_of_each_fact(monkeypatch):
    lm, facts, latest = toy_model(torch.float64), toy_facts(6), {}
    config = replace(CONFIG, weight_decay=0.0, batch_size=4, steps=30, learning_rate=0.02, stop_loss=7.0)
    accumulate = fine_tuning_variants._accumulate

    def watch(editor, tuned, pairs, rows, *rest):
        losses = accumulate(editor, tuned, pairs, rows, *rest)
        latest.update(zip(rows.tolist(), losses.tolist(), strict=True))
        means.append(sum(latest.values()) / len(latest) if len(latest) == 6 else math.inf)
        return losses

    means = []
    monkeypatch.setattr(fine_tuning_variants, "_accumulate", watch)
    taken = SteppedFineTuning(lm, config).edit(facts).metadata["steps"]
    assert taken + 1 == len(means) < 30 and means[-1] < 7 <= min(means[:-1])


def test_the_first_loss_is_the_unedited_models_and_training_lowers_it(make):
    lm, facts = toy_model(torch.float64), toy_facts(7)
    changes = {"steps": 40, "batch_size": None}
    changes |= {"weight_decay": 0.0} if make is EDITORS["FT"] else {"dropout": 0.0}
    shift = make(lm, **changes).edit(facts)
    wanted = sum_of_losses(lm, facts).item() / 7
    assert shift.metadata["losses"][0] == pytest.approx(wanted, rel=1e-12)
    assert shift.metadata["losses"][-1] < 0.8 * wanted
    scores = evaluate(lm, facts, shift)
    assert scores.mean("ES") > scores.mean("ES before")


class Bar(tqdm):
    "A bar that is never drawn, and is remembered."

    made: list["Bar"] = []

    def __init__(self, total, desc, disable, leave):
        super().__init__(total=total, disable=True)
        self.asked, self.seen = (total, desc, disable, leave), 0
        self.made.append(self)

    def update(self, n=1):
        self.seen += n


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize(("mini", "total"), [(None, 5 * 7), (3, 3 + 3 + 1 + 3 + 3), (100, 5 * 7)])
def test_the_bar_counts_facts_to_its_end(make, monkeypatch, mini, total, progress):
    monkeypatch.setattr(fine_tuning_variants, "progress_bar", Bar)
    editor = make(toy_model(), batch_size=mini)
    editor.edit(toy_facts(7), batch_size=2, progress=progress)
    bar = Bar.made.pop()
    assert bar.asked == (total, editor.method, not progress, False) and bar.seen == total


# --- nothing depends on the cuts


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("mini", [1, 5, None])
def test_the_shift_does_not_depend_on_the_batch_size(make, batch_size, mini):
    lm, facts = toy_model(torch.float64), toy_facts(11)
    editor = make(lm, batch_size=mini)
    whole, cut = editor.edit(facts, batch_size=1000), editor.edit(facts, batch_size=batch_size)
    assert difference(whole, cut) < 1e-10
    assert cut.metadata["losses"] == pytest.approx(whole.metadata["losses"], rel=1e-10)


def test_the_last_tokens_loss_does_not_depend_on_the_batch_size(make):
    lm, facts = toy_model(torch.float64), toy_facts(11)
    one, two = (make(lm, loss=LAST).edit(facts, batch_size=size) for size in (2, 100))
    assert difference(one, two) < 1e-10


def test_lora_with_dropout_does_not_depend_on_the_batch_size_in_any_family(family):
    lm, facts = family
    editor = EDITORS["LoRA"](lm, dropout=0.5)
    assert difference(editor.edit(facts, batch_size=2), editor.edit(facts, batch_size=100)) < 1e-10


# --- an editor like the others


def test_editing_leaves_the_model_alone(make):
    lm, facts = toy_model(), toy_facts(6)
    before = state_of(lm)
    make(lm).edit(facts)
    assert_same(before, state_of(lm))
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())


def test_the_random_state_of_the_caller_is_left_alone(make):
    lm, before = toy_model(), torch.get_rng_state()
    make(lm).edit(toy_facts(6))
    assert torch.equal(torch.get_rng_state(), before)


def test_editing_works_where_gradients_are_off(make):
    lm, facts = toy_model(), toy_facts(6)
    with torch.no_grad():
        shift = make(lm).edit(facts)
    assert difference(shift, make(lm).edit(facts)) == 0
    assert not any(value.requires_grad for value in shift.shifts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifts_are_float32_for_a_model_in_float32_or_less(make, dtype):
    shift = make(toy_model(dtype), batch_size=None, steps=20).edit(toy_facts(6))
    assert all(value.dtype == torch.float32 for value in shift.shifts.values())
    assert shift.metadata["losses"][-1] < shift.metadata["losses"][0]


def test_an_edit_adds_to_one_that_is_on(make):
    lm, facts = toy_model(torch.float64), toy_facts(8)
    changes = {"weight_decay": 0.0} if make is EDITORS["FT"] else {}  # a decay pulls on W + S, and W will differ
    first = make(lm, **changes).edit(facts[:4])
    with first.applied(lm):
        second = make(lm, **changes).edit(facts[4:])
    own = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, lm.pattern, lm.last)
    first.merge_into(own)
    assert difference(second, make(own, **changes).edit(facts[4:])) < 1e-10


def test_metadata_are_json_and_the_shift_survives_a_file(make, tmp_path):
    editor = make(toy_model())
    shift = editor.edit(toy_facts(3))
    assert shift.metadata["method"] == editor.method
    assert shift.metadata["facts"] == 3 and shift.metadata["steps"] == 5 == len(shift.metadata["losses"])
    assert json.loads(json.dumps(shift.metadata)) == shift.metadata
    assert difference(WeightShift.load(shift.save(tmp_path / "ft.safetensors")), shift) == 0


def test_the_methods_have_their_names():
    lm = toy_model()
    assert [SteppedFineTuning.of(lm, config).method for config in (FT_W, FT_L, FT_M)] == ["FT-W", "FT-L", "FT-M"]
    assert LoRA(lm).method == "LoRA" and SteppedFineTuning(lm).method == "FT-M"


def test_the_ready_settings_are_the_papers():
    for config in (FT_W, FT_L, FT_M):
        assert (config.learning_rate, config.steps, config.batch_size, config.depth) == (5e-4, 25, None, 0.75)
    assert [(c.weight_decay, c.stop_loss) for c in (FT_W, FT_L, FT_M)] == [(5e-4, 1e-2), (0, 0), (0, 0)]
    assert [c.loss for c in (FT_W, FT_L, FT_M)] == ["answer", LAST, "answer"]
    lora = LoRA(toy_model()).config
    assert (lora.rank, lora.alpha, lora.dropout, lora.learning_rate, lora.steps) == (8, 32, 0.1, 1e-3, 30)
    with pytest.raises(FrozenInstanceError):
        FT_W.steps = 6


# --- which layer


def on_meta(kind, config):
    "A model without weights."
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize(("depth", "block"), [(0.0, 0), (0.5, 14), (0.75, 21), (0.7499, 20), (0.999, 27), (1.0, 27)])
def test_a_depth_chooses_a_block_of_gptj(depth, block):
    model = on_meta(GPTJForCausalLM, GPTJConfig(n_embd=8, n_head=2, rotary_dim=4, n_layer=28, vocab_size=10))
    assert stepped_layer(model, replace(FT_M, depth=depth)) == f"transformer.h.{block}.mlp.fc_out"


def test_a_block_over_the_number_of_blocks_is_that_block():
    for blocks in (1, 3, 12, 49, 98):
        config = GPT2Config(n_embd=2, n_head=1, n_inner=2, n_layer=blocks, vocab_size=2, n_positions=2)
        model = on_meta(GPT2LMHeadModel, config)
        for block in range(0, blocks, 1 + blocks // 12):
            name = stepped_layer(model, replace(FT_M, depth=block / blocks))
            assert name == f"transformer.h.{block}.mlp.c_proj"


def test_of_an_encoder_decoder_it_is_the_decoder():
    t5, bart = toy_encoder_decoder().model, toy_encoder_decoder(kind="bart").model
    assert stepped_layer(t5, FT_M) == "decoder.block.1.layer.2.DenseReluDense.wo"
    assert stepped_layer(bart, replace(FT_M, depth=0.0)) == "model.decoder.layers.0.fc2"


def test_of_a_classifier_it_is_a_block():
    assert stepped_layer(toy_classifier().model, FT_M) == "bert.encoder.layer.2.output.dense"


def test_a_view_for_one_layer_shares_the_model():
    lm = toy_model()
    ft = SteppedFineTuning.of(lm, FT_L)
    assert ft.lm.model is lm.model and ft.lm.tokenizer is lm.tokenizer and ft.config is FT_L
    assert list(ft.lm.layers) == ["transformer.h.2.mlp.c_proj"]
    assert list(lm.layers) == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]


def test_an_architecture_without_known_layers_is_named():
    lm = toy_model()
    lm.model.config.model_type = "abacus"
    with pytest.raises(LayerPatternError, match="abacus"):
        stepped_layer(lm.model, CONFIG)
    assert list(SteppedFineTuning.of(lm).lm.layers) == ["transformer.h.2.mlp.c_proj"]  # of its own pattern
    assert SteppedFineTuning(lm, CONFIG).edit(toy_facts(2)).shifts


# --- LoRA is peft's


def lora_by_peft(lm, facts, config):
    "peft on a copy of the whole model, with the same start, trained without any hook, and merged by peft."
    import peft

    own = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, lm.pattern, lm.last)
    before = {name: weight_view(layer).clone() for name, layer in own.layers.items()}
    transposed = any(not isinstance(layer, nn.Linear) for layer in own.layers.values())
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(own.layers), fan_in_fan_out=transposed
    )
    theirs = peft.LoraModel(own.model, settings, "default")
    start = TunedAdapters(lm, config).adapters
    for name in own.layers:
        layer = own.model.get_submodule(name)
        layer.lora_A["default"].load_state_dict(start[name].lora_A["default"].state_dict())
    trained = [p for p in theirs.parameters() if p.requires_grad]
    textbook(own, facts, config, trained, lambda chosen: sum_of_losses(own, chosen))
    merged = theirs.merge_and_unload()
    after = {name: weight_view(merged.get_submodule(name)).detach() for name in before}
    return WeightShift({name: after[name] - before[name] for name in before})


@pytest.mark.parametrize("mini", [None, 4])
def test_lora_is_what_peft_trains_and_merges(family, mini):
    lm, facts = family
    config = replace(LORA, batch_size=mini, seed=3)
    shift = LoRA(lm, config).edit(facts)
    assert list(shift.shifts) == list(lm.layers)
    assert difference(shift, lora_by_peft(lm, facts, config)) < 1e-10
    for value in shift.shifts.values():
        assert 1 <= torch.linalg.matrix_rank(value) <= 3


def test_a_shift_is_peft_s_own_delta_in_the_papers_layout(family):
    lm, _ = family
    tuned = TunedAdapters(lm, LORA)
    for one in tuned.adapters.values():
        nn.init.normal_(one.lora_B["default"].weight)
    for name, shift in tuned.values().items():
        one = tuned.adapters[name]
        delta = one.get_delta_weight("default")
        assert shift.shape == lm.shapes[name] and not shift.requires_grad
        assert torch.allclose(shift, delta.T if one.fan_in_fan_out else delta, atol=1e-12)
        assert torch.allclose(shift, 2.0 * one.lora_B["default"].weight @ one.lora_A["default"].weight, atol=1e-12)


def test_a_model_with_adapters_says_what_the_shifted_model_says(family):
    lm, facts = family
    tuned = TunedAdapters(lm, LORA)
    for one in tuned.adapters.values():
        nn.init.normal_(one.lora_B["default"].weight)
    (batch,) = lm.batches([fact.pair for fact in facts])
    with torch.no_grad():
        with tuned.on(range(len(facts)), 0):
            adapted = lm.answer_logits(batch)
        with overlaid(lm, tuned.values()):
            shifted = lm.answer_logits(batch)
        plain = lm.answer_logits(batch)
    assert torch.allclose(adapted, shifted, atol=1e-10) and not torch.allclose(adapted, plain, atol=1e-3)


def test_layers_of_both_kinds_are_adapted_at_once():
    lm = toy_model(torch.float64, last=1)
    block = lm.model.transformer.h[1].mlp
    linear = nn.Linear(24, 16).double().requires_grad_(False)
    linear.weight.copy_(block.c_proj.weight.T)
    linear.bias.copy_(block.c_proj.bias)
    block.c_proj = linear
    both = LanguageModel(lm.model, lm.tokenizer, ["transformer.h.*.mlp.c_proj"], 2)
    assert len({type(layer) for layer in both.layers.values()}) == 2
    wanted = LoRA(toy_model(torch.float64), LORA).edit(toy_facts(5))
    assert difference(LoRA(both, LORA).edit(toy_facts(5)), wanted) < 1e-10


@pytest.mark.parametrize(
    ("dtype", "own"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_adapters_train_in_float32_or_better(dtype, own):
    tuned = TunedAdapters(toy_model(dtype), LORA)
    for one in tuned.adapters.values():
        trained = {name: p for name, p in one.named_parameters() if p.requires_grad}
        assert list(trained) == ["lora_A.default.weight", "lora_B.default.weight"]
        assert all(p.dtype == own for p in trained.values())
        assert one.base_layer.weight.dtype == dtype


def test_the_start_follows_the_seed():
    lm = toy_model()
    start = [TunedAdapters(lm, replace(LORA, seed=seed)).adapters for seed in (0, 0, 1)]
    for name in lm.layers:
        first, same, other = (one[name].lora_A["default"].weight for one in start)
        assert torch.equal(first, same) and not torch.equal(first, other)
        assert (start[0][name].lora_B["default"].weight == 0).all()


def test_the_models_own_dropout_stays_off():
    lm = toy_model(torch.float64)
    for module in lm.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    shift = EDITORS["LoRA"](lm).edit(toy_facts(4))
    assert difference(shift, EDITORS["LoRA"](toy_model(torch.float64)).edit(toy_facts(4))) == 0


# --- dropout


def dropped(facts=(0, 1, 2), *, step=0, salt="x", probability=0.4, shape=(6, 50)):
    "What is left of ones."
    dropout = FactDropout(probability, salt)
    dropout.facts, dropout.step = facts, step
    return dropout(torch.ones(len(facts), *shape, dtype=torch.float64))


def test_dropout_keeps_the_right_share_and_the_mean():
    left = dropped(range(40), shape=(10, 100))
    assert set(left.unique().tolist()) == {0.0, 1 / (1 - 0.4)}
    assert (left == 0).double().mean().item() == pytest.approx(0.4, abs=0.01)
    assert left.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_changes_training_and_is_no_part_of_the_result():
    lm, facts = toy_model(torch.float64), toy_facts(4)
    without, some, more = (LoRA(lm, replace(LORA, dropout=p)).edit(facts) for p in (0.0, 0.1, 0.5))
    assert difference(without, some) > 1e-4 and difference(some, more) > 1e-4


def test_a_mask_belongs_to_its_fact_step_and_layer():
    whole = dropped((0, 1, 2))
    assert torch.equal(dropped((2, 0)), whole[[2, 0]])
    assert torch.equal(dropped((1,), shape=(4, 50)), whole[1:2, :4])  # less padding
    assert torch.equal(dropped((1,), shape=(90, 50))[:, :6], whole[1:2])  # more
    others = [dropped((1, 0, 2)), dropped(step=1), dropped(salt="y"), dropped((3, 4, 5))]
    assert not any(torch.equal(whole[0], other[0]) for other in others)
    assert torch.equal(dropped(probability=0.0), torch.ones(3, 6, 50, dtype=torch.float64))


def test_dropout_needs_a_row_a_fact():
    dropout = FactDropout(0.1, "x")
    dropout.facts = (0, 1)
    with pytest.raises(EditorError, match="6 rows for 2 facts: LoRA on this layer needs dropout=0"):
        dropout(torch.ones(6, 4))
    dropout.probability = 0.0
    assert torch.equal(dropout(torch.ones(6, 4)), torch.ones(6, 4))


# --- whatever happens, the model stays as it is


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize("place", ["answer_logits", "step", "inject_adapter_in_model"])
def test_an_interruption_leaves_the_model_alone(monkeypatch, place, call, error):
    import peft

    lm, facts = toy_model(last=3), toy_facts(4)
    owner = {"answer_logits": lm, "step": TunedAdapters, "inject_adapter_in_model": peft}[place]
    wrapped, calls = getattr(owner, place), []

    def interrupted(*args, **kwargs):
        calls.append(place)
        if len(calls) == min(call, 3 if owner is peft else call):
            raise error("stop here")
        return wrapped(*args, **kwargs)

    before = state_of(lm)
    monkeypatch.setattr(owner, place, interrupted)
    with pytest.raises(error, match="stop here"):
        EDITORS["LoRA"](lm, batch_size=None).edit(facts)
    monkeypatch.undo()
    assert calls
    assert_same(before, state_of(lm))


def test_a_failing_backward_pass_leaves_the_model_alone(monkeypatch, make):
    lm = toy_model()
    before = state_of(lm)

    def fail(*_args, **_kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    with pytest.raises(MemoryError):
        make(lm).edit(toy_facts(3))
    monkeypatch.undo()
    assert_same(before, state_of(lm))


def test_swapping_reaches_every_place_of_a_module_and_no_other():
    shared, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Module()
    model.one, model.two = shared, nn.ModuleList([other, shared, shared])
    before, new = list(model.named_modules(remove_duplicate=False)), nn.Linear(2, 2)
    with swapped(model, {shared: new}):
        assert model.one is new and list(model.two) == [other, new, new]
    assert list(model.named_modules(remove_duplicate=False)) == before
    with pytest.raises(KeyboardInterrupt), swapped(model, {shared: new}):
        raise KeyboardInterrupt
    assert list(model.named_modules(remove_duplicate=False)) == before


# --- bad input


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ([], NoFactsError),
        ([replace(toy_facts(1)[0], answer=answer) for answer in ("w1", "w2")], ConflictingFactsError),
        ([replace(toy_facts(1)[0], prompt="w1 " * 40)], ContextLengthError),
    ],
)
def test_facts_that_cannot_be_edited_are_refused(make, facts, error):
    lm = toy_model()
    before = state_of(lm)
    with pytest.raises(error):
        make(lm).edit(facts)
    assert_same(before, state_of(lm))


SHARED = [
    ("learning_rate", 0.0, "one above 0 and at most 1"),
    ("learning_rate", -1.0, "above 0"),
    ("learning_rate", 1.01, "at most 1"),
    ("learning_rate", math.nan, "above 0"),
    ("steps", 0, "at least 1"),
    ("batch_size", 0, "at least 1, or None for all facts"),
    ("batch_size", -3, "at least 1"),
    ("stop_loss", -0.1, "at least 0"),
    ("stop_loss", math.inf, "finite"),
    ("stop_loss", math.nan, "finite"),
    ("loss", "perplexity", "one of 'answer', \"prompt's last token\""),
]


@pytest.mark.parametrize(
    ("config", "field", "value", "wanted"),
    [(config, *row) for config in (CONFIG, LORA) for row in SHARED]
    + [(CONFIG, "weight_decay", value, "a finite one, at least 0") for value in (-1e-3, math.nan, math.inf)]
    + [(CONFIG, "depth", value, "one from 0") for value in (-0.01, 1.01, 21.0, math.nan)]
    + [(LORA, "rank", value, "at least 1") for value in (0, -1)]
    + [(LORA, "alpha", value, "a finite one above 0") for value in (0.0, -1.0, math.nan, math.inf)]
    + [(LORA, "dropout", value, "one from 0 to below 1") for value in (-0.1, 1.0, math.nan)],
)
def test_a_setting_out_of_range_is_refused_by_name(config, field, value, wanted):
    with pytest.raises(EditorError, match=field) as refused:
        replace(config, **{field: value})
    assert f"{field}={value!r}" in str(refused.value) and wanted in str(refused.value)


def test_the_bounds_themselves_are_fine():
    replace(CONFIG, learning_rate=1.0, steps=1, batch_size=1, weight_decay=0.0, depth=0.0)
    replace(LORA, rank=1, dropout=0.0, batch_size=None, stop_loss=0.0)


@pytest.mark.parametrize("build", [toy_classifier, toy_encoder_decoder], ids=["classifier", "encoder-decoder"])
@pytest.mark.parametrize("make_one", [SteppedFineTuning.of, lambda lm, _: LoRA(lm, replace(LORA, loss=LAST))])
def test_the_last_tokens_loss_is_for_decoders(build, make_one):
    with pytest.raises(EditorError, match="is for decoders, and this is an encoder-.*: use 'answer'"):
        make_one(build(), FT_L)


def test_no_rows_in_the_model_are_refused(make):
    with pytest.raises(ValueError, match="batch_size=0"):
        make(toy_model()).edit(toy_facts(2), batch_size=0)


def test_a_run_away_training_says_so():
    with pytest.raises(NonFiniteShiftError, match=r"LoRA ran away, its loss is .* at step \d: lower .* \(0.01\)"):
        EDITORS["LoRA"](toy_model(), alpha=1e41).edit(toy_facts(11))


@pytest.mark.parametrize(("steps", "message"), [(1, "the shift of layer .* is not finite"), (2, "FT in steps ran")])
def test_a_step_too_far_is_found_at_the_end_too(monkeypatch, steps, message):
    monkeypatch.setattr(TunedShifts, "step", lambda self: [s.data.fill_(math.inf) for s in self.shifts.values()])
    with pytest.raises(NonFiniteShiftError, match=message):
        EDITORS["FT"](toy_model(), steps=steps).edit(toy_facts(4))


def test_a_model_that_is_not_finite_is_found_at_the_first_step(make):
    lm = toy_model()
    with torch.no_grad():
        lm.model.transformer.h[2].mlp.c_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteShiftError, match="at step 1: lower the learning rate"):
        make(lm).edit(toy_facts(2))


def test_a_missing_peft_is_named_and_fine_tuning_works_without(monkeypatch):
    lm = toy_model()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"needs peft: pip install 'malmen-repro\[lora\]'"):
        LoRA(lm, LORA).edit(toy_facts(2))
    assert SteppedFineTuning(lm, CONFIG).edit(toy_facts(2)).shifts


def test_a_layer_that_peft_cannot_adapt_is_named():
    lm = toy_model()
    lm.layers["transformer.ln_f"] = lm.model.transformer.ln_f
    before = state_of(lm)
    with pytest.raises(EditorError, match="peft cannot adapt layer transformer.ln_f, which is a LayerNorm"):
        LoRA(lm, LORA).edit(toy_facts(2))
    assert_same(before, state_of(lm))


def test_an_adapter_keeps_the_layer_it_is_given():
    layer = nn.Linear(4, 3).requires_grad_(False)
    weight = layer.weight.clone()
    one = adapter("fc", layer, LORA)
    assert one.base_layer is layer and torch.equal(layer.weight, weight) and not layer.weight.requires_grad
    assert one.lora_A["default"].weight.shape == (3, 4) and one.lora_B["default"].weight.shape == (3, 3)
