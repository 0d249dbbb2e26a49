"""Causal tracing: against forward passes written out by hand, exact identities, every cut into batches, bad input."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from matplotlib.container import BarContainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from malmen_repro import progress
from malmen_repro.facts import Fact, NoFactsError
from malmen_repro.language_models import FEED_FORWARD, LanguageModel
from malmen_repro.methods.causal_tracing import (
    ATTENTION,
    KINDS,
    RESTORED,
    ROLES,
    SEVERED,
    Patch,
    Trace,
    TracedFact,
    TracedRun,
    TracingError,
    answer_probabilities,
    critical_layers_by_gap,
    draw_severed,
    draw_traces,
    mean_and_interval,
    replaced,
    severed_effects,
    subject_noise,
    subject_spans,
    token_roles,
    trace,
    traced_modules,
    tracing_record,
    window,
)
from malmen_repro.methods.target_vectors import SubjectError, subject_end, subject_tokens
from tests.toy import WORDS, toy_classifier, toy_encoder_decoder, toy_model, toy_tokenizer

FACTS = [
    Fact("w1 w2 w3 w4 w5 w6 w7", "w8 w9", subject="w2 w3 w4"),
    Fact("w10 w11", "w12", subject="w11"),
    Fact("w13 w14 w15", "w16", subject="w13 w14"),
    Fact("w20 w21 w22 w23 w24 w25 w26 w27", "w28 w29 w30", subject="w21 w22 w23 w24"),
]
IDS = {"vocab_size": len(WORDS) + 2, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}


def make(kind="gpt2", dtype=torch.float64):
    if kind == "gpt2":
        return toy_model(dtype)
    torch.manual_seed(0)
    if kind == "gptj":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 24, "n_positions": 24, "rotary_dim": 4}
        model, layers = GPTJForCausalLM(GPTJConfig(**sizes, **IDS)), "transformer.h.*.mlp.fc_out"
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=24, **sizes, **IDS))
        layers = "model.layers.*.mlp.down_proj"
    return LanguageModel(model.to(dtype), toy_tokenizer(), layers)


@pytest.fixture(scope="module", params=["gpt2", "gptj"])
def lm(request):
    return make(request.param)


@pytest.fixture(scope="module")
def gpt2():
    return make()


def close(lm, found, wanted):
    "Equal to rounding; GPT-J's attention computes in float32 whatever the weights are."
    rtol, atol = (1e-4, 1e-9) if lm.model.config.model_type == "gptj" else (1e-9, 1e-15)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, equal_nan=True)


def hooks(lm):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules())


def by_hand(lm, pair, noise=None, start=0, change=lambda kind, layer, states: states):
    "p(answer) by the two architectures' equations, one row, no hook; `change` sees what each module puts out."
    body, parallel = lm.model.transformer, lm.model.config.model_type == "gptj"
    ids = torch.tensor([(pair.prompt + pair.answer)[:-1]])
    positions, length = torch.arange(ids.shape[1])[None], ids.shape[1]
    states = body.wte(ids)
    if noise is not None:
        states[0, start : start + len(noise)] += noise
    if not parallel:
        states = states + body.wpe(positions)
    future = torch.full((1, 1, length, length), torch.finfo(states.dtype).min, dtype=states.dtype).triu(1)
    for layer, block in enumerate(body.h):
        normed = block.ln_1(states)
        where = {"position_ids": positions} if parallel else {}
        attention = change("attention", layer, block.attn(normed, attention_mask=future, **where)[0])
        mlp = change("mlp", layer, block.mlp(normed if parallel else block.ln_2(states + attention)))
        states = change("state", layer, states + attention + mlp)
    probabilities = lm.model.lm_head(body.ln_f(states))[0].softmax(-1)
    first = len(pair.prompt) - 1
    return math.prod(probabilities[first + i, token].item() for i, token in enumerate(pair.answer))


def note(lm, pair, noise=None, start=0):
    "What each module puts out in a run by hand, and p."
    seen = {}

    def change(kind, layer, states):
        seen[kind, layer] = states.clone()
        return states

    return seen, by_hand(lm, pair, noise, start, change)


def put(values, places, at):
    "Those outputs at one token instead of what a run has there."

    def change(kind, layer, states):
        if (kind, layer) in places:
            states = states.clone()
            states[0, at] = values[kind, layer][0, at]
        return states

    return change


def deviation(lm, facts=FACTS, times=3.0):
    ids = [lm.tokenizer(fact.subject)["input_ids"] for fact in facts]
    embeddings = lm.model.get_input_embeddings().weight[torch.tensor(sum(ids, []))]
    return times * embeddings.flatten().std().item()


def answered(lm, facts=FACTS):
    "The same facts with the answers that the model gives."
    found = []
    for fact in facts:
        ids = lm.tokenizer(fact.prompt)["input_ids"]
        for _ in fact.answer.split():
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        words = lm.tokenizer.convert_ids_to_tokens(ids)[len(fact.prompt.split()) :]
        found.append(replace(fact, answer=" ".join(words)))
    return found


# --- tokens and roles

FIRST, MIDDLE, LAST, SUBSEQUENT, FURTHER, END = ROLES


@pytest.mark.parametrize(
    ("length", "subject", "wanted"),
    [
        (7, range(1, 5), [None, FIRST, MIDDLE, MIDDLE, LAST, SUBSEQUENT, END]),
        (8, range(0, 2), [FIRST, LAST, SUBSEQUENT, FURTHER, FURTHER, FURTHER, FURTHER, END]),
        (3, range(1, 3), [None, FIRST, LAST]),
        (3, range(0, 2), [FIRST, LAST, END]),
        (3, range(2, 3), [None, None, LAST]),
        (1, range(0, 1), [LAST]),
        (3, range(0, 1), [LAST, SUBSEQUENT, END]),
        (5, range(0, 3), [FIRST, MIDDLE, LAST, SUBSEQUENT, END]),
    ],
)
def test_roles(length, subject, wanted):
    roles = token_roles(length, subject)
    assert [roles.get(t) for t in range(length)] == wanted
    assert list(roles) == list(range(subject.start, length))  # in the order of the prompt


def test_spans_are_the_subjects_words(gpt2):
    assert subject_spans(gpt2, FACTS) == [range(1, 4), range(1, 2), range(0, 2), range(1, 5)]


def test_spans_of_a_byte_level_vocabulary_hold_every_byte(gpt2):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lm = LanguageModel(gpt2.model, PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    asked = {"Éva": "ask Éva who", "José": "ask José who", "本": "日本", "日本": "日本"}
    facts = [Fact(prompt, "x", subject=subject) for subject, prompt in asked.items()]
    spans = subject_spans(lm, facts)
    for fact, span in zip(facts, spans, strict=True):
        ids = lm.tokenizer(fact.prompt)["input_ids"]
        assert lm.tokenizer.decode(ids[span.start : span.stop]).strip() == fact.subject
    ends = [subject_end(fact.prompt, fact.subject) for fact in facts]
    assert subject_tokens(lm, [fact.prompt for fact in facts], ends) == [span[-1] for span in spans]


def test_a_subject_without_regard_to_case(gpt2):
    assert subject_spans(gpt2, [Fact("w1 w2 w3", "w4", subject="W2")]) == [range(1, 2)]


@pytest.mark.parametrize("run", [trace, severed_effects])
@pytest.mark.parametrize(
    ("fact", "message"),
    [
        (Fact("w1 w2", "w3"), "names no subject"),
        (Fact("w1 w2", "w3", subject="w9"), "the subject 'w9' is not in the prompt"),
    ],
)
def test_a_subject_that_is_not_there(gpt2, run, fact, message):
    with pytest.raises(SubjectError, match=message):
        run(gpt2, [*FACTS, fact])
    assert not hooks(gpt2)


# --- modules


def test_modules_of_three_architectures(gpt2):
    assert traced_modules(gpt2, "state") == [f"transformer.h.{i}" for i in range(3)]
    assert traced_modules(gpt2, "mlp") == [f"transformer.h.{i}.mlp" for i in range(3)]
    assert traced_modules(gpt2, "attention") == [f"transformer.h.{i}.attn" for i in range(3)]
    assert traced_modules(make("gptj"), "attention") == [f"transformer.h.{i}.attn" for i in range(3)]
    llama = make("llama")
    assert traced_modules(llama, "state") == [f"model.layers.{i}" for i in range(3)]
    assert traced_modules(llama, "mlp") == [f"model.layers.{i}.mlp" for i in range(3)]
    assert traced_modules(llama, "attention") == [f"model.layers.{i}.self_attn" for i in range(3)]


def test_every_architecture_has_its_feed_forward_network():
    assert ATTENTION.keys() <= FEED_FORWARD.keys()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (toy_encoder_decoder, "is for decoders, and T5ForConditionalGeneration is of the family encoder-decoder"),
        (toy_classifier, "is for decoders, and BertForSequenceClassification is of the family encoder-classifier"),
    ],
)
@pytest.mark.parametrize("run", [trace, severed_effects])
def test_other_families(other, message, run):
    with pytest.raises(TracingError, match=message):
        run(other(), FACTS)


def test_an_architecture_that_is_not_in_the_table():
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"word_embed_proj_dim": 16, "max_position_embeddings": 24}
    model = OPTForCausalLM(OPTConfig(vocab_size=IDS["vocab_size"], **sizes))
    lm = LanguageModel(model, toy_tokenizer(), "*.fc2")
    with pytest.raises(TracingError, match=r"OPTForCausalLM \(opt\) calls its attention, only for: gpt2, gptj, llama"):
        trace(lm, FACTS)


def test_a_kind_that_there_is_not(gpt2):
    with pytest.raises(TracingError, match="kind='ffn': choose one of state, mlp, attention"):
        trace(gpt2, FACTS, "ffn")


@pytest.mark.parametrize(
    ("block", "width", "blocks", "wanted"),
    [
        (14, 10, 28, range(9, 19)),
        (0, 10, 28, range(0, 5)),
        (27, 10, 28, range(22, 28)),
        (1, 3, 3, range(0, 3)),
        (0, 3, 3, range(0, 2)),
        (2, 1, 3, range(2, 3)),
        (1, 99, 3, range(0, 3)),
    ],
)
def test_windows(block, width, blocks, wanted):
    assert window(block, width, blocks) == wanted


# --- other outputs


def test_replaced_outputs_are_those_and_no_others(lm):
    torch.manual_seed(1)
    case = TracedFact(lm, FACTS[0], 0.5, samples=1)
    for kind in KINDS:
        name = traced_modules(lm, kind)[1]
        before = case.outputs([name], [TracedRun(), TracedRun()])[name]
        value = torch.randn(1, before.shape[-1], dtype=before.dtype)
        with replaced(lm, {name: Patch(torch.tensor([1]), torch.tensor([3]), value)}):
            after = case.outputs([name], [TracedRun(), TracedRun()])[name]
        assert torch.equal(after[1, 3], value[0])
        after[1, 3] = before[1, 3]
        assert torch.equal(after, before)
    assert not hooks(lm)


def test_hooks_go_whatever_happens(gpt2):
    patch = Patch(torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 16, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="on purpose"), replaced(gpt2, {"transformer.h.0": patch}):
        assert hooks(gpt2) == 1
        raise RuntimeError("on purpose")
    assert not hooks(gpt2)
    with pytest.raises(AttributeError), replaced(gpt2, {"transformer.h.0": patch, "transformer.nothing": patch}):
        pass
    assert not hooks(gpt2)
    wrong = patch._replace(positions=torch.tensor([99]))
    with pytest.raises(IndexError), replaced(gpt2, {"transformer.h.0": wrong}):
        gpt2.model(input_ids=torch.tensor([[1, 2]]))
    assert not hooks(gpt2)


def test_nothing_replaced_is_the_model(lm):
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), replaced(lm, {}):
        assert torch.equal(lm.model(input_ids=ids).logits, lm.model(input_ids=ids).logits)


# --- probabilities and noise


def test_probability_of_a_whole_answer(lm):
    encoded = lm.encode([fact.pair for fact in FACTS])
    batch = lm.family.collate(encoded, range(len(FACTS)))
    wanted = torch.tensor([by_hand(lm, pair) for pair in encoded], dtype=torch.float64)
    close(lm, answer_probabilities(lm, batch), wanted)


def test_noise_depends_on_fact_seed_and_number_alone():
    first = subject_noise(FACTS[0], (3, 16), 4)
    assert first.shape == (4, 3, 16) and first.dtype == torch.float32
    assert torch.equal(first[:2], subject_noise(FACTS[0], (3, 16), 2))
    others = [
        subject_noise(FACTS[0], (3, 16), 4, seed=1),
        subject_noise(FACTS[3], (3, 16), 4),
        subject_noise(replace(FACTS[0], prompt="w0 w2 w3 w4"), (3, 16), 4),
    ]
    assert all(not torch.isclose(first, other).any() for other in others)
    assert all(not torch.isclose(a, b).any() for a, b in pairwise(first))
    many = subject_noise(FACTS[0], (50, 200), 4)
    assert abs(many.std() - 1) < 0.02 and abs(many.mean()) < 0.02


def test_the_noise_is_three_standard_deviations_of_the_subjects_embeddings(lm):
    traced = trace(lm, FACTS, samples=1, only_known=False)
    assert math.isclose(traced.deviation, deviation(lm), rel_tol=1e-9)
    half = trace(lm, FACTS, samples=1, noise=1.5, only_known=False)
    assert math.isclose(half.deviation, deviation(lm) / 2, rel_tol=1e-9)
    case = TracedFact(lm, FACTS[0], traced.deviation, samples=2)
    ids = torch.tensor(lm.tokenizer(FACTS[0].subject)["input_ids"])
    added = case.noisy - lm.model.get_input_embeddings()(ids)
    torch.testing.assert_close(added, traced.deviation * subject_noise(FACTS[0], (3, 16), 2).double())


def test_the_noise_of_a_fact_is_the_same_in_any_company(gpt2):
    alone = TracedFact(gpt2, FACTS[0], 0.7, samples=2)
    more = TracedFact(gpt2, FACTS[0], 0.7, samples=5, batch_size=2)
    assert torch.equal(alone.noisy, more.noisy[:2])


# --- identities


def test_clean_and_corrupted_by_hand(lm):
    for fact in FACTS:
        case = TracedFact(lm, fact, 0.6, samples=3)
        noise = 0.6 * subject_noise(fact, (len(case.subject), 16), 3).double()
        wanted = [by_hand(lm, case.pair), *(by_hand(lm, case.pair, one, case.subject.start) for one in noise)]
        found = case.probabilities([TracedRun(), TracedRun(0), TracedRun(1), TracedRun(2)])
        close(lm, found, torch.tensor(wanted, dtype=torch.float64))


def test_everything_restored_is_clean_and_nothing_restored_is_corrupted(lm):
    case = TracedFact(lm, FACTS[0], 0.6, samples=2)
    names = {kind: traced_modules(lm, kind) for kind in KINDS}
    case.note([name for some in names.values() for name in some], [name for some in names.values() for name in some])
    everywhere = tuple(range(len(case.pair.prompt) + len(case.pair.answer) - 1))  # also the answer's tokens
    runs = [
        TracedRun(),
        TracedRun(0, everywhere, tuple(names["state"])),
        TracedRun(1, everywhere, (names["state"][0],)),
        TracedRun(1, tuple(case.subject), (names["state"][0],)),  # the tokens behind have read the noise in block 0
        TracedRun(0),
        TracedRun(0, everywhere),
        TracedRun(0, (), tuple(names["state"])),
        TracedRun(0, everywhere, (), tuple(names["attention"] + names["mlp"])),  # held at what they are
    ]
    p = case.probabilities(runs)
    close(lm, p[1:3], p[:1].expand(2))
    close(lm, p[4:], p[4:5].expand(4))
    assert not torch.isclose(p[0], p[4]) and not torch.isclose(p[0], p[3])


def test_the_last_state_at_the_last_token_gives_a_single_token_back(lm):
    facts = [replace(fact, answer=fact.answer.split()[0]) for fact in FACTS]
    traced = trace(lm, facts, samples=2, only_known=False)
    whole = (traced.clean[:, None] - traced.corrupted).mean(-1)
    for i, fact in enumerate(facts):
        at_the_end = fact.prompt.endswith(fact.subject)  # then the subject's last token is the prompt's
        role = ROLES.index(LAST if at_the_end else END)
        close(lm, traced.by_fact[i, role, -1], whole[i])


def test_the_last_state_anywhere_else_gives_nothing_back(lm):
    traced = trace(lm, FACTS[:1], samples=2, only_known=False)
    close(lm, traced.by_fact[0, :-1, -1], torch.zeros(5, dtype=torch.float64))


def test_tokens_before_the_subject_have_no_effect(lm):
    case = TracedFact(lm, FACTS[0], 0.6, samples=1).note(clean=traced_modules(lm, "state"))
    p = case.probabilities([TracedRun(0), *(TracedRun(0, (0,), (name,)) for name in traced_modules(lm, "state"))])
    close(lm, p[1:], p[:1].expand(3))


@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_no_effect(lm, kind):
    traced = trace(lm, FACTS, kind, samples=2, width=2, noise=0.0, only_known=False)
    close(lm, traced.corrupted, traced.clean[:, None].expand(-1, 2))
    close(lm, traced.by_fact.nan_to_num(0), torch.zeros_like(traced.by_fact))
    for entering in RESTORED.values():
        for effects in severed_effects(lm, FACTS, 2, noise=0.0, only_known=False, entering=entering).values():
            close(lm, effects, torch.zeros(4, 3, dtype=torch.float64))


# --- whole traces against forward passes by hand


@pytest.mark.parametrize(("kind", "width"), [("state", 10), ("mlp", 1), ("mlp", 2), ("attention", 3), ("mlp", 10)])
def test_a_trace_by_hand(lm, kind, width):
    samples, sigma = 2, deviation(lm)
    traced = trace(lm, FACTS, kind, samples=samples, width=width, seed=3, only_known=False)
    wanted = torch.full((len(FACTS), len(ROLES), 3), math.nan, dtype=torch.float64)
    for i, (fact, pair) in enumerate(zip(FACTS, lm.encode([fact.pair for fact in FACTS]), strict=True)):
        words = fact.prompt.split()
        start = words.index(fact.subject.split()[0])
        span = range(start, start + len(fact.subject.split()))
        noises = sigma * subject_noise(fact, (len(span), 16), samples, seed=3).double()
        clean, p = note(lm, pair)
        close(lm, traced.clean[i], torch.tensor(p, dtype=torch.float64))
        for role in ROLES:
            at = [t for t, name in token_roles(len(words), span).items() if name == role]
            for layer in range(3) if at else ():
                wide = 1 if kind == "state" else width
                places = {(kind, each) for each in range(layer - wide // 2, layer - wide // 2 + wide)}
                gains = [
                    by_hand(lm, pair, noise, start, put(clean, places, t)) - by_hand(lm, pair, noise, start)
                    for t in at
                    for noise in noises
                ]
                wanted[i, ROLES.index(role), layer] = sum(gains) / len(gains)
    close(lm, traced.by_fact, wanted)
    close(lm, traced.effects, wanted.nanmean(0))
    assert traced.counts.tolist() == [3, 2, 4, 2, 2, 3]
    assert traced.by_fact.nan_to_num(0).abs().max() > 1e-4  # there was something to agree on


@pytest.mark.parametrize("entering", RESTORED.values(), ids=RESTORED)
def test_severed_effects_by_hand(lm, entering):
    samples, sigma = 2, deviation(lm)
    found = severed_effects(lm, FACTS, samples, seed=5, only_known=False, entering=entering)
    assert list(found) == list(SEVERED) == ["plain", "attention severed", "mlp severed"]
    wanted = torch.zeros(3, len(FACTS), 3, dtype=torch.float64)
    for f, (fact, pair) in enumerate(zip(FACTS, lm.encode([fact.pair for fact in FACTS]), strict=True)):
        words, size = fact.prompt.split(), len(fact.subject.split())
        start = words.index(fact.subject.split()[0])
        at, (clean, _) = start + size - 1, note(lm, pair)
        for noise in sigma * subject_noise(fact, (size, 16), samples, seed=5).double():
            corrupted, p = note(lm, pair, noise, start)
            for row, kind in enumerate(SEVERED.values()):
                for layer in range(3):
                    own = entering and kind == "mlp"
                    held = {(kind, later) for later in range(layer + (not own), 3)}
                    restored, heard = {("state", layer)}, noise
                    if entering:
                        restored = {("state", layer - 1), ("attention", layer)}
                        heard = noise if layer else torch.cat([noise[:-1], torch.zeros(1, 16, dtype=noise.dtype)])
                    restore, hold = put(clean, restored, at), put(corrupted, held, at)

                    def both(sort, each, states, restore=restore, hold=hold):
                        return restore(sort, each, hold(sort, each, states))

                    wanted[row, f, layer] += by_hand(lm, pair, heard, start, both) - p
    wanted /= samples
    close(lm, torch.stack(list(found.values())), wanted)
    for severed in wanted[1:, :, :2].mean(1):  # there was something to tell apart
        assert not torch.isclose(wanted[0, :, :2].mean(0), severed).any()


def test_a_network_without_output_has_no_gap_of_its_own(lm):
    silent = make(lm.model.config.model_type)
    for name in traced_modules(silent, "mlp"):
        for parameter in silent.model.get_submodule(name).parameters():
            torch.nn.init.zeros_(parameter)
    effects = severed_effects(silent, FACTS, 2, only_known=False, entering=True)
    close(silent, effects["mlp severed"], effects["plain"])


def test_severed_effects_and_the_trace_agree(lm):
    severed = severed_effects(lm, FACTS, 3, only_known=False)
    traced = trace(lm, FACTS, samples=3, only_known=False)
    close(lm, severed["plain"], traced.by_fact[:, ROLES.index(LAST)])
    for way in SEVERED:  # above the last block there is nothing to sever
        close(lm, severed[way][:, -1], severed["plain"][:, -1])


# --- nothing depends on the cut


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_size_gives_the_same(lm, kind, batch_size):
    options = {"samples": 2, "only_known": False}
    wanted, found = (trace(lm, FACTS[:2], kind, width=2, batch_size=size, **options) for size in (64, batch_size))
    close(lm, found.by_fact, wanted.by_fact)
    close(lm, found.corrupted, wanted.corrupted)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_any_batch_size_severs_the_same(lm, batch_size):
    options = {"samples": 2, "only_known": False}
    wanted, found = (severed_effects(lm, FACTS[:2], batch_size=size, **options) for size in (64, batch_size))
    assert list(found) == list(wanted)
    close(lm, torch.stack(list(found.values())), torch.stack(list(wanted.values())))


def test_seeds_and_samples(gpt2):
    options = {"only_known": False}
    first, again, other = (trace(gpt2, FACTS, samples=2, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first.by_fact.nan_to_num(0), again.by_fact.nan_to_num(0))
    assert not torch.isclose(first.corrupted, other.corrupted).any()
    more = trace(gpt2, FACTS, samples=5, **options)
    torch.testing.assert_close(more.corrupted[:, :2], first.corrupted)


def test_the_order_of_the_facts_changes_the_order_alone(gpt2):
    forward, backward = (trace(gpt2, some, samples=2, only_known=False) for some in (FACTS, FACTS[::-1]))
    torch.testing.assert_close(forward.by_fact, backward.by_fact.flip(0), equal_nan=True)
    torch.testing.assert_close(forward.effects, backward.effects, equal_nan=True)
    assert backward.facts == FACTS[::-1]


def test_global_random_state_is_left_alone(gpt2):
    before = torch.get_rng_state()
    trace(gpt2, FACTS, samples=1, only_known=False)
    assert torch.equal(before, torch.get_rng_state())


# --- which facts


def test_facts_that_the_model_does_not_answer_are_left_out_and_counted(lm):
    known = answered(lm)
    mixed = [known[0], replace(FACTS[1], answer="w59"), known[3], replace(known[3], answer=f"{known[3].answer} w59")]
    assert mixed[1] != known[1]
    traced = trace(lm, mixed, samples=2)
    assert traced.facts == [mixed[0], mixed[2]] and traced.left_out >= 1
    assert traced.left_out == len(mixed) - len(traced.facts)
    everything = trace(lm, mixed, samples=2, only_known=False)
    assert everything.facts == mixed and everything.left_out == 0
    # Those left out don't enter the variance either.
    assert math.isclose(traced.deviation, deviation(lm, traced.facts), rel_tol=1e-9)
    same = severed_effects(lm, mixed, 2), severed_effects(lm, traced.facts, 2)
    torch.testing.assert_close(*same)


@pytest.mark.parametrize("run", [trace, severed_effects])
def test_no_fact_is_known(gpt2, run):
    wrong = [replace(fact, answer="w59 w59 w59") for fact in FACTS]
    with pytest.raises(TracingError, match="the model answers none of the 4 facts rightly: trace facts that it knows"):
        run(gpt2, wrong)


@pytest.mark.parametrize("run", [trace, severed_effects])
def test_no_facts(gpt2, run):
    with pytest.raises(NoFactsError, match="there are no facts to trace"):
        run(gpt2, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"noise": -1.0}, "noise=-1.0: must be finite and not negative"),
        ({"noise": math.inf}, "noise=inf: must be finite"),
        ({"noise": math.nan}, "noise=nan: must be finite"),
    ],
)
@pytest.mark.parametrize("run", [trace, severed_effects])
def test_bad_numbers(gpt2, run, options, message):
    with pytest.raises(TracingError, match=message):
        run(gpt2, FACTS, only_known=False, **options)


def test_bad_width(gpt2):
    with pytest.raises(TracingError, match="width=0: must be at least 1"):
        trace(gpt2, FACTS, "mlp", width=0)


def test_a_model_that_puts_out_no_number():
    lm = make()
    lm.model.transformer.h[1].mlp.c_proj.weight[0, 0] = math.nan
    for run in (trace, severed_effects):
        with pytest.raises(TracingError, match="the model's probabilities for 'w1 w2 w3 w4 w5 w6 w7' are not finite"):
            run(lm, FACTS, samples=1, only_known=False)
    assert not hooks(lm)


# --- precision, and what is left behind


@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_half_precision(kind):
    half, full = make(kind, torch.bfloat16), make(kind, torch.float32)
    for name in KINDS:
        few, many = (trace(lm, FACTS, name, samples=4, width=2, only_known=False) for lm in (half, full))
        assert few.by_fact.dtype == many.by_fact.dtype == torch.float32
        scale = many.by_fact.nan_to_num(0).abs().max().item()
        torch.testing.assert_close(few.by_fact, many.by_fact, rtol=0.2, atol=0.2 * scale, equal_nan=True)
    assert severed_effects(half, FACTS, 2, only_known=False)["plain"].dtype == torch.float32
    assert next(half.model.parameters()).dtype == torch.bfloat16


def test_a_third_architecture_runs():
    lm = make("llama")
    traced = trace(lm, FACTS, "attention", samples=2, only_known=False)
    assert traced.effects.shape == (6, 3) and traced.effects.isfinite().all()
    severed = severed_effects(lm, FACTS, 2, only_known=False)
    torch.testing.assert_close(severed["plain"], trace(lm, FACTS, samples=2, only_known=False).by_fact[:, 2])
    entering = severed_effects(lm, FACTS, 2, only_known=False, entering=True)
    gap = entering["plain"] - entering["mlp severed"]
    assert gap[:, :2].all() and gap[:, 2].nonzero().tolist() == [[1]]  # the last network acts at the prompt's end alone


def test_the_model_stays_as_it_was(lm):
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    trace(lm, FACTS, samples=1, only_known=False)
    severed_effects(lm, FACTS, 1, only_known=False)
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert not hooks(lm) and not lm.model.training and not any(p.grad is not None for p in lm.model.parameters())


def test_fields_of_a_trace(gpt2):
    traced = trace(gpt2, FACTS, "mlp", samples=2, width=2, only_known=False)
    assert (traced.kind, traced.width, traced.left_out, traced.facts) == ("mlp", 2, 0, FACTS)
    assert traced.by_fact.shape == (4, 6, 3) and traced.clean.shape == (4,) and traced.corrupted.shape == (4, 2)
    assert traced.by_fact.device.type == "cpu" and not traced.by_fact.requires_grad
    assert trace(gpt2, FACTS, samples=1, width=2, only_known=False).width == 1


def test_a_role_that_no_fact_has(gpt2):
    traced = trace(gpt2, FACTS[1:2], samples=1, only_known=False)
    assert traced.counts.tolist() == [0, 0, 1, 0, 0, 0]
    assert traced.effects.isfinite().any(-1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("run", [trace, severed_effects])
def test_progress(gpt2, run, capsys, monkeypatch):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)  # where somebody looks on
    run(gpt2, FACTS, samples=1, only_known=False)
    assert "causal tracing" not in capsys.readouterr().err
    run(gpt2, FACTS, samples=1, only_known=False, progress=True)
    assert "causal tracing" in capsys.readouterr().err


# --- the range


@pytest.mark.parametrize(
    ("gap", "share", "wanted"),
    [
        ([0.1, 0.5, 1.0, 0.6, 0.2], 0.5, range(1, 4)),
        ([0.1, 0.5, 1.0, 0.6, 0.2], 1.0, range(2, 3)),
        ([1.0, 0.9, 0.1, 0.9], 0.5, range(0, 2)),
        ([0.2, 0.1, 0.9, 1.0], 0.5, range(2, 4)),
        ([0.3], 0.5, range(0, 1)),
        ([-1.0, 0.1, -1.0], 0.5, range(1, 2)),
        ([0.1, 0.1, 0.1], 0.5, range(0, 3)),
    ],
)
def test_range_by_gap(gap, share, wanted):
    assert critical_layers_by_gap(gap, share - 1e-6) == wanted


def test_no_gap():
    with pytest.raises(TracingError, match="takes nothing from any state"):
        critical_layers_by_gap([0.0, -0.1, 0.0])


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, math.nan])
def test_bad_share(share):
    with pytest.raises(TracingError, match=f"share={share}: must be above 0 and at most 1"):
        critical_layers_by_gap([1.0], share)


# --- means, intervals, records


def test_means_and_intervals_of_the_facts_that_have_a_value():
    by_fact = torch.randn(400, 2, 3, generator=torch.Generator().manual_seed(0)) + torch.arange(3.0)
    by_fact[100:, 0, 1], by_fact[:, 1, 0] = math.nan, math.nan
    found = mean_and_interval(by_fact)
    mean, interval = torch.tensor(found["mean"]), torch.tensor(found["interval"])
    torch.testing.assert_close(mean, by_fact.nanmean(0), equal_nan=True)
    assert interval.shape == (2, 3, 2) and interval.isnan().nonzero().tolist() == [[1, 0, 0], [1, 0, 1]]
    assert str(found) == str(mean_and_interval(by_fact))  # as text, for no NaN is equal to another
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2)):
        values = by_fact[:, i, j][by_fact[:, i, j].isfinite()]
        half = 1.96 * values.std() / len(values) ** 0.5
        torch.testing.assert_close(interval[i, j], mean[i, j] + torch.stack([-half, half]), rtol=0, atol=0.2 * half)


def test_interval_of_one_fact_or_of_equal_ones():
    for count in (1, 5):
        assert mean_and_interval(torch.full((count, 1), 0.25)) == {"mean": [0.25], "interval": [[0.25, 0.25]]}


def test_a_record_holds_the_traces_and_the_severed_effects(gpt2):
    options = {"samples": 2, "seed": 3, "noise": 2.0, "only_known": False}
    record = tracing_record(gpt2, FACTS, width=2, **options)
    assert json.loads(json.dumps(record)).keys() == {"traces", "severed"}  # plain, apart from its NaN
    for kind, each in zip(KINDS, record["traces"], strict=True):
        traced = trace(gpt2, FACTS, kind, width=2, **options)
        assert (each["kind"], each["width"]) == (kind, 1 if kind == "state" else 2)
        assert (each["facts"], each["samples"], each["left out"], each["counts"]) == (4, 2, 0, traced.counts.tolist())
        torch.testing.assert_close(torch.tensor(each["effects"]["mean"]).double(), traced.effects, equal_nan=True)
        assert each["clean"] == pytest.approx(traced.clean.mean().item())
        assert each["corrupted"] == pytest.approx(traced.corrupted.mean().item())
        assert each["deviation"] == pytest.approx(traced.deviation)
    assert list(record["severed"]) == list(RESTORED)
    for name, entering in RESTORED.items():
        effects = severed_effects(gpt2, FACTS, entering=entering, **options)
        found = record["severed"][name]
        assert list(found) == [*SEVERED, "gap"]
        for way in SEVERED:
            assert found[way]["mean"] == pytest.approx(effects[way].mean(0).tolist())
        by_fact = effects["plain"] - effects["mlp severed"]  # so the interval is that of differences
        assert found["gap"] == mean_and_interval(by_fact)


# --- pictures


def made(kind="state", blocks=3, facts=4):
    by_fact = torch.rand(facts, len(ROLES), blocks, generator=torch.Generator().manual_seed(0))
    by_fact[1:, 1] = math.nan
    between, width = (torch.full((facts,), 0.5), torch.full((facts, 2), 0.25)), 1 if kind == "state" else 10
    return Trace(kind, by_fact, *between, FACTS[:facts], 0, 0.1, width)


def test_picture_of_traces():
    figure = draw_traces([made(kind).summary() for kind in KINDS])
    axes = [ax for ax in figure.axes if ax.get_title()]
    titles = ["state", "feed-forward, 10 in a run", "attention, 10 in a run"]
    assert [ax.get_title() for ax in axes] == titles
    assert [ax.get_xlabel() for ax in axes] == ["block", "middle block", "middle block"]
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == [f"{role} ({1 if role == MIDDLE else 4})" for role in ROLES]
    assert not axes[1].get_yticklabels()
    assert "4 facts × 2 noises: p(object) = 0.50 clean, 0.25 corrupted" in figure.get_suptitle()
    scales = {ax.collections[0].get_clim() for ax in axes}
    assert len(scales) == 1 and next(iter(scales))[0] == 0
    assert len(axes[0].texts) == 18  # a number a cell
    small = replace(made(), by_fact=-1e-6 * made().by_fact).summary()
    assert [text.get_text() for text in draw_traces([small]).axes[0].texts] == ["0.00"] * 18


def test_picture_of_a_role_that_no_fact_has():
    summary = made().summary()
    summary["effects"]["mean"][1] = [None] * 3  # what a record has for NaN
    assert len(draw_traces([summary]).axes[0].texts) == 15


def test_picture_of_one_trace_of_many_blocks():
    figure = draw_traces([made(blocks=28).summary()])
    assert not figure.axes[0].texts


def test_picture_of_no_effect_at_all():
    flat = made()
    draw_traces([replace(flat, by_fact=torch.zeros_like(flat.by_fact)).summary()])


def test_no_picture_of_nothing():
    with pytest.raises(TracingError, match="there are no traces to draw"):
        draw_traces([])


def test_picture_of_severed_effects():
    effects = {way: torch.rand(9, 3, generator=torch.Generator().manual_seed(i)) for i, way in enumerate(SEVERED)}
    panel = {way: mean_and_interval(each) for way, each in effects.items()}
    figure = draw_severed({"one": panel, "other": panel})
    assert [ax.get_title() for ax in figure.axes] == ["restored: one", "restored: other"]
    for ax in figure.axes:
        bars = [each for each in ax.containers if isinstance(each, BarContainer)]
        heights = [[bar.get_height() for bar in each] for each in bars]
        torch.testing.assert_close(
            torch.tensor(heights).float(), torch.stack([each.mean(0) for each in effects.values()])
        )
        ends = [[line[:, 1].tolist() for line in each.errorbar.lines[2][0].get_segments()] for each in bars]
        torch.testing.assert_close(torch.tensor(ends), torch.tensor([each["interval"] for each in panel.values()]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(SEVERED)
