"Target vectors: subjects by offsets, passes that begin in the middle, batched equal to serial."

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from malmen_repro.facts import Fact
from malmen_repro.language_models import LanguageModel, LayerPatternError, feed_forward
from malmen_repro.methods.target_vectors import (
    NonFiniteTargetError,
    SubjectError,
    TargetConfig,
    block_of,
    block_output,
    prefixed,
    random_prefixes,
    resumed_after,
    subject_end,
    subject_tokens,
    target_vectors,
)
from malmen_repro.protocol import EditorError
from malmen_repro.weight_shifts import WeightShift
from tests.toy import WORDS, toy_claims, toy_classifier, toy_encoder_decoder, toy_model, toy_tokenizer
from tests.toy import toy_facts as facts

QUICK = TargetConfig(steps=6, learning_rate=0.1, prefix_lengths=(), separator=" ", essence="{} w3", stop_loss=0.0)


def gptj(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS) + 2, "n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4}
    config = GPTJConfig(**sizes, n_inner=24, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.2)
    model = GPTJForCausalLM(config).to(dtype)
    return LanguageModel(model, toy_tokenizer(), feed_forward(model), 2)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS) + 2, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 24}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).to(dtype)
    return LanguageModel(model, toy_tokenizer(), feed_forward(model), 2)


DECODERS = {"gpt2": lambda dtype=torch.float32: toy_model(dtype), "gptj": gptj, "llama": llama}
BLOCKS = {"gpt2": "transformer.h.1", "gptj": "transformer.h.1", "llama": "model.layers.1"}

# --- subjects


@pytest.mark.parametrize(
    ("prompt", "subject", "end"),
    [
        ("Oslo lies in", "Oslo", 4),
        ("the capital of Norway", "Norway", 21),
        ("Anna met Ann", "Ann", 12),  # a whole word, though "Ann" is in "Anna"
        ("Annapolis", "Anna", 4),  # part of a word if there is nothing better
        ("who is OSLO", "Oslo", 11),
        ("C++ (language) is", "C++ (language)", 14),
        ("São Paulo is", " São Paulo ", 9),
    ],
)
def test_where_a_subject_ends(prompt, subject, end):
    assert subject_end(prompt, subject) == end


@pytest.mark.parametrize("subject", [None, ""])
def test_a_fact_without_a_subject(subject):
    with pytest.raises(SubjectError, match="'who rules' names no subject"):
        subject_end("who rules", subject)


def test_a_subject_that_is_not_there():
    with pytest.raises(SubjectError, match="the subject 'Rome' is not in the prompt 'Oslo lies in'"):
        subject_end("Oslo lies in", "Rome")


def byte_level(**options):
    "A BPE tokenizer on bytes, as GPT-2 has one."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the mother tongue of Danielle Darrieux is", "Ångström lived in Uppsala"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_tokenizer(tokenizer):
    "A language model with another tokenizer."
    lm = toy_model()
    lm.tokenizer = tokenizer
    return lm


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("the mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("Danielle Darrieux", "Danielle Darrieux"),
        ("Ångström lived in Uppsala", "Ångström"),
        ("in Uppsala lived Ångström, 1814", "Ångström"),
    ],
)
def test_the_last_token_covers_the_last_character(text, subject, space):
    tokenizer = byte_level(add_prefix_space=space)
    end = subject_end(text, subject)
    (position,) = subject_tokens(with_tokenizer(tokenizer), [text], [end])
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids[: position + 1]).strip().startswith(text[:end])
    assert not tokenizer.decode(ids[:position]).strip().startswith(text[:end])


def test_special_tokens_in_front_are_not_the_subject():
    lm = with_tokenizer(toy_tokenizer("<end> $A <end>"))
    assert subject_tokens(lm, ["w1 w2 w3"], [5]) == [2]


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(SubjectError, match="load the fast one"):
        subject_tokens(with_tokenizer(Slow()), ["w1"], [2])


def test_a_place_that_no_token_covers():
    with pytest.raises(SubjectError, match="covers character 6"):
        subject_tokens(toy_model(), ["w1 w2"], [7])


# --- blocks


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("transformer.h.5.mlp.c_proj", "transformer.h.5"),
        ("model.layers.31.mlp.down_proj", "model.layers.31"),
        ("decoder.block.2.layer.2.DenseReluDense.wo", "decoder.block.2"),
    ],
)
def test_the_block_of_a_layer(layer, block):
    assert block_of(layer) == block


def test_a_layer_in_no_block():
    with pytest.raises(LayerPatternError, match="'lm_head' is in no numbered block"):
        block_of("lm_head")


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_a_blocks_states_is_the_whole_model(kind, which, dtype):
    lm = DECODERS[kind](dtype)
    block = BLOCKS[kind][:-1] + str(which)
    batch = next(lm.batches([fact.pair for fact in facts(5)], 5))
    states, as_tuple = block_output(lm, block, batch)
    assert states.dtype == dtype and states.shape == (*batch.answer_mask.shape, 16)
    with torch.no_grad(), resumed_after(lm, block, lambda: states, as_tuple):
        resumed = lm.answer_logits(batch)
    with torch.no_grad():
        assert torch.equal(resumed, lm.answer_logits(batch))


def test_the_blocks_come_back_after_an_error():
    lm = toy_model()
    blocks = list(lm.model.transformer.h)
    with pytest.raises(ZeroDivisionError), resumed_after(lm, "transformer.h.1", lambda: None, False):
        assert lm.model.transformer.h[0] is not blocks[0] and lm.model.transformer.h[2] is blocks[2]
        raise ZeroDivisionError
    assert list(lm.model.transformer.h) == blocks


def test_the_skipped_blocks_do_no_work():
    lm, calls = toy_model(), []
    lm.model.transformer.h[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    batch = next(lm.batches([fact.pair for fact in facts(2)], 2))
    states = torch.zeros(*batch.answer_mask.shape, 16)
    with resumed_after(lm, "transformer.h.1", lambda: states, False):
        lm.answer_logits(batch)
    assert calls == []


# --- prefixes


def test_prefixes_are_drawn_with_a_seed_and_the_first_is_empty():
    lm = toy_model()
    texts = random_prefixes(lm, (2, 5, 5), 3)
    assert texts[0] == "" and [len(text.split()) for text in texts] == [0, 2, 5, 5]
    assert texts == random_prefixes(lm, (2, 5, 5), 3) != random_prefixes(lm, (2, 5, 5), 4)
    assert random_prefixes(lm, (), 3) == [""]
    assert not any("<end>" in text for text in texts)


def test_prompts_behind_prefixes_know_where_their_subject_ends():
    some = facts(3)
    texts, ends = prefixed(some, ["", "w9 w8"], " : ")
    assert texts[:2] == [some[0].prompt, f"w9 w8 : {some[0].prompt}"] and len(texts) == 6
    assert all(text[:end].endswith(some[i // 2].subject) for i, (text, end) in enumerate(zip(texts, ends, strict=True)))


# --- the search


def with_delta(lm, block, fact, delta, texts, reduction="sum"):
    "-log p(o), a text at a time, by a plain hook that adds delta at the subject's last token."
    total = []
    for text in texts:
        (position,) = subject_tokens(lm, [text], [text.index(fact.prompt) + subject_end(fact.prompt, fact.subject)])

        def add(_module, _args, output, position=position):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[0, position] += delta.to(states.dtype)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handle = lm.model.get_submodule(block).register_forward_hook(add)
        try:
            (batch,) = lm.batches([(text, fact.answer)], 1)
            logits = lm.answer_logits(batch).float()
        finally:
            handle.remove()
        total.append(torch.nn.functional.cross_entropy(logits, batch.labels, reduction=reduction))
    return torch.stack(total).mean()


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("prefixes", [(), (2, 3)])
def test_the_loss_it_reports_is_the_models_with_z_in_place(kind, prefixes):
    lm, some = DECODERS[kind](), facts(4)
    config = replace(QUICK, prefix_lengths=prefixes)
    found = target_vectors(lm, BLOCKS[kind], some, config)
    texts = random_prefixes(lm, prefixes, config.seed)
    for i, fact in enumerate(some):
        asked = [f"{text} {fact.prompt}".strip() for text in texts]
        loss = with_delta(lm, BLOCKS[kind], fact, found.z[i] - found.hidden[i], asked)
        torch.testing.assert_close(found.losses[i], loss, rtol=1e-4, atol=1e-4)
        assert loss < with_delta(lm, BLOCKS[kind], fact, torch.zeros(16), asked)


def textbook(lm, block, fact, config):
    "The search for one fact as one would write it down: hooks, autograd and Adam."
    texts = [fact.prompt] + [f"{t} {fact.prompt}" for t in random_prefixes(lm, config.prefix_lengths, config.seed)[1:]]
    delta = torch.zeros(16, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=config.learning_rate)
    # What comes after the subject does not depend on what is written behind it.
    said_of = config.essence.format(fact.subject) if config.kl_at == "end" else fact.subject
    essence = Fact(said_of, "w1", subject=fact.subject)
    (batch,) = lm.batches([essence.pair], 1)
    hidden = block_output(lm, block, next(lm.batches([fact.pair], 1))).states[0, 1]  # subjects are the first two words

    def said(delta):
        end = subject_end(essence.prompt, essence.subject)
        (position,) = subject_tokens(lm, [essence.prompt], [end])

        def add(_module, _args, output):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[0, position] += delta
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handle = lm.model.get_submodule(block).register_forward_hook(add)
        try:
            return lm.answer_logits(batch).log_softmax(-1)[0]
        finally:
            handle.remove()

    before = said(torch.zeros(16)).detach()
    for _ in range(config.steps):
        wrong = with_delta(lm, block, fact, delta, texts, "sum" if config.answer_loss == "sum" else "mean")
        if wrong <= config.stop_loss:
            break
        after = said(delta)
        p, q = (before, after) if config.kl_direction == "before || after" else (after, before)
        moved = (p.exp() * (p - q)).sum()
        long = delta.norm() ** (2 if config.decay_on == "squared length" else 1) / hidden.norm() ** 2
        loss = wrong + config.kl_factor * moved + config.weight_decay * long
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= min(1.0, (config.clamp * hidden.norm() / delta.norm()).item())
    return hidden + delta.detach()


OPTIONS = [{}, {"prefix_lengths": (2, 4)}, {"clamp": 0.05}, {"kl_factor": 3.0}, {"stop_loss": 4.0}]
FORMS = {"answer_loss": "token mean", "decay_on": "length", "kl_direction": "after || before", "kl_at": "subject"}
STRONG = {"kl_factor": 30.0, "learning_rate": 0.5, "steps": 8}  # so that a wrong form would be seen
OPTIONS += [{name: form} | STRONG for name, form in FORMS.items()]
OPTIONS += [FORMS | {"kl_factor": 3.0, "prefix_lengths": (2, 4)}, {"answer_loss": "token mean", "stop_loss": 3.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_textbooks_search(options):
    lm, some, config = toy_model(), facts(5), replace(QUICK, **options)
    found = target_vectors(lm, "transformer.h.1", some, config)
    for i, fact in enumerate(some):
        torch.testing.assert_close(found.z[i], textbook(lm, "transformer.h.1", fact, config), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_the_loss_makes_a_difference(name):
    lm, some, config = toy_model(torch.float64), facts(5), replace(QUICK, **STRONG)
    usual = target_vectors(lm, "transformer.h.1", some, config)
    other = target_vectors(lm, "transformer.h.1", some, replace(config, **{name: FORMS[name]}))
    assert torch.equal(usual.hidden, other.hidden) and (usual.z - other.z).norm() > 2e-2 * usual.z.norm()


def test_without_a_kl_term_its_forms_make_none():
    lm, some, config = toy_model(torch.float64), facts(3), replace(QUICK, kl_factor=0.0)
    forms = {name: FORMS[name] for name in ("kl_direction", "kl_at")}
    found = [target_vectors(lm, "transformer.h.1", some, replace(config, **change)) for change in ({}, forms)]
    assert torch.equal(found[0].z, found[1].z)


def test_of_answers_of_one_token_the_mean_is_the_sum():
    lm, some = toy_model(torch.float64), [replace(fact, answer="w7") for fact in facts(3)]
    forms = [replace(QUICK, answer_loss=form) for form in ("sum", "token mean")]
    found = [target_vectors(lm, "transformer.h.1", some, config) for config in forms]
    assert torch.equal(found[0].z, found[1].z)


def test_the_loss_it_reports_is_a_sum_whatever_is_searched_by():
    lm, some = toy_model(), facts(4)
    found = target_vectors(lm, "transformer.h.1", some, replace(QUICK, answer_loss="token mean"))
    for i, fact in enumerate(some):
        loss = with_delta(lm, "transformer.h.1", fact, found.z[i] - found.hidden[i], [fact.prompt])
        torch.testing.assert_close(found.losses[i], loss, rtol=1e-4, atol=1e-4)


def test_by_default_the_forms_are_the_texts():
    assert [getattr(TargetConfig(), name) for name in FORMS] == ["sum", "squared length", "before || after", "end"]


@pytest.mark.parametrize("stop", [0.0, 3.5])
@pytest.mark.parametrize("batch_size", [1, 4, 9, 100])
def test_batched_is_serial(batch_size, stop):
    lm, some = toy_model(torch.float64), facts(7)
    config = replace(QUICK, prefix_lengths=(2,), stop_loss=stop, **(FORMS if batch_size == 4 else {}))
    found = target_vectors(lm, "transformer.h.1", some, config, batch_size)
    for i, fact in enumerate(some):
        alone = target_vectors(lm, "transformer.h.1", [fact], config, 1)
        torch.testing.assert_close(found.z[i], alone.z[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(found.losses[i], alone.losses[0], rtol=0, atol=1e-9)


def test_a_fact_that_is_known_stays_where_it_is():
    lm, some = toy_model(), facts(3)
    found = target_vectors(lm, "transformer.h.1", some, replace(QUICK, stop_loss=1e6))
    assert torch.equal(found.z, found.hidden)


def test_the_clamp_holds():
    found = target_vectors(toy_model(), "transformer.h.0", facts(5), replace(QUICK, clamp=0.1, learning_rate=1.0))
    assert ((found.z - found.hidden).norm(dim=-1) <= 0.1 * found.hidden.norm(dim=-1) * 1.0001).all()


def test_half_precision_models_give_float32_targets():
    found = target_vectors(toy_model(torch.bfloat16), "transformer.h.1", facts(3), QUICK)
    assert found.z.dtype == found.hidden.dtype == torch.float32


def test_the_edit_that_is_on_counts():
    lm, some = toy_model(), facts(3)
    shift = WeightShift({name: 0.1 * torch.ones(shape) for name, shape in lm.shapes.items()})
    with shift.applied(lm):
        on = target_vectors(lm, "transformer.h.2", some, QUICK)
    assert not torch.allclose(on.hidden, target_vectors(lm, "transformer.h.2", some, QUICK).hidden)


@pytest.mark.parametrize("make", [lambda: (toy_encoder_decoder(), facts()), lambda: (toy_classifier(), toy_claims())])
def test_other_families_are_refused(make):
    lm, some = make()
    with pytest.raises(EditorError, match="are for decoders"):
        target_vectors(lm, "encoder.block.0", some, QUICK)


def test_a_fact_whose_subject_is_missing_is_named():
    with pytest.raises(SubjectError, match="is not in the prompt"):
        target_vectors(toy_model(), "transformer.h.1", [replace(facts(1)[0], subject="w59 w59")], QUICK)


def test_a_search_that_runs_away_is_named():
    lm = toy_model()
    with torch.no_grad():
        lm.model.transformer.h[1].mlp.c_proj.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteTargetError, match="is not finite"):
        target_vectors(lm, "transformer.h.1", facts(2), QUICK)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"kl_factor": -1.0}, "kl_factor"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"clamp": -1.0}, "clamp"),
        ({"essence": "is a"}, "essence"),
        ({"prefix_lengths": (0,)}, "at least 1 token"),
        ({"answer_loss": "mean"}, "answer_loss='mean': must be 'sum' or 'token mean'"),
        ({"decay_on": "square"}, "decay_on='square': must be 'squared length' or 'length'"),
        ({"kl_direction": "both"}, "kl_direction='both': must be 'before || after' or 'after || before'"),
        ({"kl_at": "start"}, "kl_at='start': must be 'end' or 'subject'"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(EditorError, match=message):
        TargetConfig(**wrong)
