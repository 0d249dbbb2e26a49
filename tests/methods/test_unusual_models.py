"Models that pass tokens on in their own ways, and what else may be met: each works, or an error says what is wrong."

import inspect
import math
from dataclasses import replace

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

from malmen_repro.facts import Fact
from malmen_repro.language_models import LanguageModel, LayerPatternError
from malmen_repro.methods.causal_tracing import TracingError, mean_and_interval, subject_spans, trace
from malmen_repro.methods.coachhook import CoachHooK, CoachHooKConfig, hook_layers
from malmen_repro.methods.fine_tuning import FineTuning, FineTuningConfig, fine_tuned
from malmen_repro.methods.fine_tuning_variants import FT_M, LoRA, LoRAConfig, SteppedFineTuning
from malmen_repro.methods.key_statistics import (
    EmptyCorpusError,
    KeyStatisticsError,
    key_statistics,
    keys_of,
    passages,
    text_batches,
    until_seen,
)
from malmen_repro.methods.memit import (
    MEMIT,
    ROME,
    MEMITConfig,
    SingularStatisticsError,
    SubjectRows,
    check_used_once,
    critical_layers,
)
from malmen_repro.methods.target_vectors import (
    NonFiniteTargetError,
    SubjectError,
    TargetConfig,
    own_subject,
    random_prefixes,
    target_vectors,
)
from malmen_repro.protocol import EditorError
from tests.toy import WORDS, toy_corpus, toy_facts, toy_model, toy_tokenizer

TARGET = TargetConfig(prefix_lengths=(2,), steps=3)
CONFIG = MEMITConfig(regularization=2.0, blocks=(1,), target=TARGET)
FACTS = toy_facts(3)
SIZES = {"vocab_size": len(WORDS) + 2, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def opt(layers="model.decoder.layers.1.fc2"):
    "Its feed-forward network sees the tokens of all rows in one row."
    torch.manual_seed(0)
    rest = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 24, "init_std": 0.3}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return LanguageModel(OPTForCausalLM(OPTConfig(**SIZES, **rest, **ids, dropout=0.0)), toy_tokenizer(), layers)


def falcon(layers="transformer.h.1.mlp.dense_4h_to_h"):
    "It adds the attention's output to the feed-forward network's in place."
    torch.manual_seed(0)
    rest = {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return LanguageModel(FalconForCausalLM(FalconConfig(**SIZES, **rest, **ids)), toy_tokenizer(), layers)


UNUSUAL = {"OPT": opt, "Falcon": falcon}


@pytest.fixture(params=UNUSUAL)
def lm(request):
    return UNUSUAL[request.param]()


def editors(lm):
    "One of each kind on a model."
    statistics = key_statistics(lm, toy_corpus())
    return {
        "MEMIT": MEMIT(lm, statistics, CONFIG),
        "CoachHooK": CoachHooK(lm, statistics, CoachHooKConfig(CONFIG)),
        "FT": FineTuning(lm, FineTuningConfig(epochs=1)),
        "FT-M": SteppedFineTuning(lm, replace(FT_M, steps=2)),
        "LoRA": LoRA(lm, LoRAConfig(steps=2, rank=2)),
    }


def logits(lm):
    with torch.no_grad():
        return torch.cat([lm.answer_logits(batch) for batch in lm.batches([fact.pair for fact in FACTS], 2)])


def hooks(lm):
    return [h for m in lm.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


# --- tokens in one row, outputs that are changed in place


def test_every_editor_changes_what_an_unusual_model_says(lm):
    before = logits(lm)
    for name, editor in editors(lm).items():
        shift = editor.edit(FACTS)
        with shift.applied(lm):
            assert (logits(lm) - before).abs().max() > 1e-6, name
        assert torch.equal(logits(lm), before) and not hooks(lm)


def test_keys_are_those_of_the_batch_whatever_shape_the_layer_sees(lm):
    (name, layer), seen = *lm.layers.items(), []
    batch = next(lm.batches([fact.pair for fact in FACTS], 3))
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
        lm.model(**batch.inputs)
        handle.remove()
    wanted = seen[0].view(*batch.answer_mask.shape, -1)[batch.answer_mask]
    assert torch.equal(keys_of(lm, batch)[name], wanted)


def test_what_a_module_put_out_is_not_what_was_added_to_it_later():
    lm = falcon()
    (name, layer), seen = *lm.layers.items(), []
    batch = next(lm.batches([fact.pair for fact in FACTS], 3))
    with torch.no_grad():
        handle = layer.register_forward_hook(lambda _module, args, output: seen.append(output.clone()))
        left = passages(lm, batch, [name, "transformer.h.2"])[name].left  # the pass goes on behind the layer
        handle.remove()
    assert torch.equal(left, seen[0])


def test_loras_dropout_belongs_to_facts_in_a_model_with_one_row_of_tokens():
    lm = opt()
    one, other = (LoRA(lm, LoRAConfig(steps=2, rank=2)).edit(FACTS, batch_size=size) for size in (1, 3))
    for name, shift in one.shifts.items():
        torch.testing.assert_close(shift, other.shifts[name], rtol=1e-4, atol=1e-6)


def test_hook_layers_judge_rows_though_they_see_one():
    lm = opt()
    (name,) = lm.layers
    shift = torch.randn(lm.shapes[name], generator=torch.Generator().manual_seed(0))
    batch = next(lm.batches([fact.pair for fact in FACTS], 3))
    with torch.no_grad(), hook_layers(lm, {name: shift}, {name: 1.0}):
        together = lm.answer_logits(batch)
        alone = torch.cat([lm.answer_logits(b) for b in lm.batches([fact.pair for fact in FACTS], 1)])
    order = torch.cat([b.labels for b in lm.batches([fact.pair for fact in FACTS], 1)])
    assert torch.equal(order, batch.labels)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_mask_by_position_counts_as_one_by_name():
    lm = toy_model(last=1)
    (name,) = lm.layers
    shift = torch.randn(lm.shapes[name], generator=torch.Generator().manual_seed(0))
    batch = next(lm.batches([fact.pair for fact in FACTS], 3))
    names = list(inspect.signature(lm.model.forward).parameters)
    at = [batch.inputs.get(name) for name in names[: names.index("attention_mask") + 1]]
    with torch.no_grad(), hook_layers(lm, {name: shift}, {name: 1.0}):
        assert torch.equal(lm.model(*at).logits, lm.model(**batch.inputs).logits)


# --- layers that are used several times, never, or not known


def test_a_layer_that_a_pass_uses_twice_is_refused():
    lm = toy_model(layers="transformer.h.1.mlp.c_proj", last=None)
    statistics = key_statistics(lm, toy_corpus())
    lm.model.transformer.h[2] = lm.model.transformer.h[1]
    with pytest.raises(LayerPatternError, match=r"uses layer transformer.h.1.mlp.c_proj 2 times"):
        check_used_once(lm)
    assert not hooks(lm) and statistics.tokens
    with pytest.raises(LayerPatternError, match="several times"):
        passages(lm, next(lm.batches([FACTS[0].pair], 1)), ["transformer.h.1", "transformer.ln_f"])


def test_a_layer_that_takes_no_part_is_refused():
    lm = toy_model(layers="transformer.h.1.mlp.c_proj", last=None)
    lm.model.transformer.h[1].mlp.forward = lambda states: 0 * states
    with pytest.raises(LayerPatternError, match="transformer.h.1.mlp.c_proj takes no part"):
        key_statistics(lm, toy_corpus())
    with pytest.raises(LayerPatternError, match="0 times"):
        check_used_once(lm)


def test_an_unknown_architecture_is_edited_where_its_user_says():
    lm = opt("model.decoder.layers.*.fc2")
    assert list(critical_layers(lm, (0, 2)).layers) == [f"model.decoder.layers.{i}.fc2" for i in (0, 2)]
    assert list(fine_tuned(lm).layers) == list(lm.layers)
    assert list(SteppedFineTuning.of(lm).lm.layers) == ["model.decoder.layers.2.fc2"]
    assert MEMIT.of(lm, CONFIG, toy_corpus()).block == "model.decoder.layers.1"


@pytest.mark.parametrize(("blocks", "message"), [((1, 3), "no block 3 .* has 0 to 2"), ((1, 1), "none of them twice")])
def test_blocks_that_the_model_has_not_are_named(blocks, message):
    with pytest.raises(LayerPatternError, match=message):
        critical_layers(toy_model(), blocks)


# --- modes


def test_a_model_that_was_set_to_training_edits_as_ever():
    lm = toy_model(layers="transformer.h.1.mlp.c_proj", last=None)
    quiet = MEMIT(lm, key_statistics(lm, toy_corpus()), CONFIG).edit(FACTS)
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    lm.model.train()
    noisy = MEMIT(lm, key_statistics(lm, toy_corpus()), CONFIG).edit(FACTS)
    assert all(torch.equal(shift, noisy.shifts[name]) for name, shift in quiet.shifts.items())
    assert lm.model.training and lm.model.transformer.drop.training


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_editor_works_inside_modes_without_gradients(mode):
    lm = toy_model(layers="transformer.h.1.mlp.c_proj", last=None)
    wanted = {name: editor.edit(FACTS) for name, editor in editors(lm).items()}
    with mode():
        made = editors(lm)
        found = {name: editor.edit(FACTS) for name, editor in made.items()}
    for name, shift in wanted.items():
        assert all(torch.equal(one, found[name].shifts[layer]) for layer, one in shift.shifts.items()), name
    made["CoachHooK"].edit(toy_facts(2, start=20))  # goes on outside


# --- interrupts


def stop(*_args, **_options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "switch_on",
    [
        lambda lm: until_seen(lm.layers),
        lambda lm: hook_layers(lm, {n: torch.zeros(s) for n, s in lm.shapes.items()}, dict.fromkeys(lm.layers, 1.0)),
    ],
    ids=["until_seen", "hook_layers"],
)
def test_an_interrupt_between_two_hooks_leaves_none(switch_on):
    lm = toy_model(last=2)
    list(lm.layers.values())[1].register_forward_hook = stop
    with pytest.raises(KeyboardInterrupt), switch_on(lm):
        pass
    assert not hooks(lm)


# --- subjects


@pytest.mark.parametrize(
    ("prompt", "subject", "own"),
    [
        ("who is w1 W2 now", "w1 w2", "w1 W2"),
        ("where is A\u030angstro\u0308m", "\u00c5ngstr\u00f6m", "A\u030angstro\u0308m"),
        ("in \u1112\u1161\u11ab", "\ud55c", "\u1112\u1161\u11ab"),  # Hangul in parts
        ("STRASSE 5", "Stra\u00dfe", "STRASSE"),
        ("Emma, or emma", "emma", "emma"),  # as it is written comes first
    ],
)
def test_a_subject_is_spelled_as_its_prompt_spells_it(prompt, subject, own):
    assert own_subject(Fact(prompt, "w3", subject=subject)) == own


def test_half_a_letter_is_no_subject_and_the_nearest_text_is_shown():
    with pytest.raises(SubjectError, match="is not in the prompt"):
        own_subject(Fact("in \u1112\u1161\u11ab", "w3", subject="\ud558"))
    with pytest.raises(SubjectError, match="'Anna Maria' is not in the prompt .* it has 'Ana Maria'"):
        own_subject(Fact("who is Ana Maria", "w3", subject="Anna Maria"))


def test_keys_and_noise_are_of_the_prompts_own_text():
    lm, config = toy_model(), MEMITConfig(target=TargetConfig(prefix_lengths=()))
    fact = Fact("w5 w1 w2 w3", "w4", subject="W1 W2")
    rows = SubjectRows(lm, [fact], [""], config)
    assert lm.tokenizer.decode(rows.keys[0].prompt) == "w1 w2"
    assert rows.prompts[0].prompt[-2:] == rows.keys[0].prompt
    assert subject_spans(lm, [fact]) == [range(1, 3)]


# --- advice, and numbers that are none


@pytest.mark.parametrize("kind", [MEMIT, ROME, CoachHooK])
def test_a_corpus_that_is_too_small_is_called_that(kind):
    lm = toy_model(layers="transformer.h.1.mlp.c_proj", last=None)
    few = key_statistics(lm, toy_corpus()[:1])
    config = CoachHooKConfig(CONFIG) if kind is CoachHooK else CONFIG
    with pytest.raises(
        SingularStatisticsError, match=rf"{few.tokens} tokens of the corpus, keys of 24"
    ):
        kind(lm, few, config).edit(FACTS)


def test_a_large_corpus_that_says_the_same_over_and_over_leaves_gaps_and_does_no_harm():
    lm = toy_model(layers="transformer.h.1.mlp.c_proj", last=None)
    (name,) = lm.layers
    same = key_statistics(lm, toy_corpus()[:2] * 20)
    assert same.tokens > 24 and torch.linalg.matrix_rank(same.second_moments[name], rtol=1e-5) < 24
    shift = MEMIT(lm, same, CONFIG).edit(FACTS).shifts[name]
    rows = SubjectRows(lm, FACTS, MEMIT(lm, same, CONFIG).prefixes(), CONFIG)
    assert shift.isfinite().all() and 0 < shift.norm() < 100 and len(rows) == 3
    assert torch.linalg.matrix_rank(shift.double(), rtol=1e-4) <= 3  # three facts


def test_a_model_whose_outputs_are_no_numbers_gives_no_target():
    lm = toy_model()
    head = torch.nn.Linear(16, len(WORDS) + 2, bias=False)
    torch.nn.init.constant_(head.weight, math.nan)
    lm.model.lm_head = head.requires_grad_(False)
    with pytest.raises(NonFiniteTargetError, match="w0 w0"):
        target_vectors(lm, "transformer.h.1", FACTS[:1], replace(TARGET, prefix_lengths=()))
    with pytest.raises(NonFiniteTargetError, match="writes? no prefixes"):
        random_prefixes(lm, (2,))


def test_statistics_that_are_no_numbers_are_refused():
    lm = toy_model(layers="transformer.h.1.mlp.c_proj", last=None)
    good = key_statistics(lm, toy_corpus())
    (name,) = lm.layers
    spoilt = replace(good, second_moments={name: good.second_moments[name].clone().fill_(math.nan)})
    with pytest.raises(KeyStatisticsError, match=f"layer {name} are not finite"):
        MEMIT(lm, spoilt, CONFIG)
    with torch.no_grad():
        lm.model.transformer.h[0].mlp.c_proj.bias.fill_(math.nan)
    with pytest.raises(KeyStatisticsError, match=f"layer {name} are not finite"):
        key_statistics(lm, toy_corpus())


# --- loose values


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda lm: list(text_batches(lm, ["w1"], 0)), KeyStatisticsError, "batch_size=0"),
        (lambda lm: list(text_batches(lm, ["w1"], 2, 0)), KeyStatisticsError, "length=0"),
        (lambda lm: key_statistics(lm, "w1 w2"), KeyStatisticsError, "one text"),
        (lambda lm: key_statistics(lm, iter(["w1", 2])), KeyStatisticsError, "text 1 of the corpus"),
        (lambda lm: key_statistics(lm, []), EmptyCorpusError, "0 texts"),
        (lambda lm: target_vectors(lm, "transformer.h.1", FACTS, TARGET, 0), EditorError, "batch_size=0"),
        (lambda lm: random_prefixes(lm, (100,)), EditorError, "lengths"),
        (lambda lm: random_prefixes(lm, (2,), 2**70), EditorError, "seed"),
        (lambda lm: trace(lm, FACTS, seed=-1), TracingError, "seed=-1"),
        (lambda lm: mean_and_interval(torch.ones(2, 3), resamples=0), TracingError, "resamples=0"),
        (lambda lm: mean_and_interval(torch.ones(0, 3)), TracingError, "no facts"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(toy_model())
