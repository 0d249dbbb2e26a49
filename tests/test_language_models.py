"""Language models: weight layout, layer patterns, token batches, families, gathering, padding, errors, fingerprints."""

import copy
import json
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from malmen_repro.facts import MalmenError
from malmen_repro.language_models import (
    FAMILIES,
    FEED_FORWARD,
    ContextLengthError,
    Decoder,
    EmptyAnswerError,
    EncodedPair,
    EncoderClassifier,
    EncoderDecoder,
    LanguageModel,
    LanguageModelError,
    LayerPatternError,
    TokenBatch,
    UnknownLabelError,
    UnsupportedFamilyError,
    family_of,
    feed_forward,
    fingerprint,
    gathered,
    linear_layers,
    match_layers,
    same_model,
    weight_view,
)
from tests.toy import LABELS, toy_claims, toy_classifier, toy_encoder_decoder, toy_facts

WORDS = "[unk] [bos] [eos] what is the capital of france italy ? paris rome new york city".split()
PAIRS = [
    ("what is the capital of france ?", "paris"),
    ("capital of italy ?", "rome"),
    ("what city ?", "new york city"),
    ("is", "new york"),
]
IDS = {"bos_token_id": 1, "eos_token_id": 2}
PATTERNS = {
    "gpt2": "transformer.h.*.mlp.c_proj",
    "gptj": "transformer.h.*.mlp.fc_out",
    "llama": "model.layers.*.mlp.down_proj",
}


def word_tokenizer(template=None, **options):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [("[bos]", 1), ("[eos]", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"unk_token": "[unk]", "bos_token": "[bos]", "eos_token": "[eos]", "pad_token": "[eos]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **options})


def byte_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["what is the capital of france ? paris"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def make_model(kind, **options):
    torch.manual_seed(0)
    gpt = {"vocab_size": len(WORDS), "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2, **IDS, **options}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**gpt))
    if kind == "gptj":
        return GPTJForCausalLM(GPTJConfig(rotary_dim=4, **gpt))
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = {"vocab_size": len(WORDS), "max_position_embeddings": 16, **sizes, **IDS, **options}
    return LlamaForCausalLM(LlamaConfig(**config))


# Two for hypothesis, which draws many examples from one fixture.
SHARED, BYTES = LanguageModel(make_model("gpt2"), word_tokenizer()), byte_tokenizer()


@pytest.fixture(params=list(PATTERNS))
def lm(request):
    return LanguageModel(make_model(request.param), word_tokenizer(), PATTERNS[request.param])


@pytest.fixture
def gpt2():
    return LanguageModel(make_model("gpt2"), word_tokenizer())


def words(ids):
    return [WORDS[i] for i in ids]


def plain_logits(lm, pair):
    """The logits of one unpadded row by the plain forward pass, at the answer positions."""
    (encoded,) = lm.encode([pair])
    row = torch.tensor([(encoded.prompt + encoded.answer)[:-1]])
    logits = lm.model(input_ids=row, use_cache=False).logits[0]
    return logits[len(encoded.prompt) - 1 :]


# --- layers


@pytest.mark.parametrize("kind", PATTERNS)
def test_weight_view_is_the_papers_layout(kind):
    for layer in linear_layers(make_model(kind)).values():
        key = torch.randn(weight_view(layer).shape[1])
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(weight_view(layer) @ key + bias, layer(key[None])[0])


@pytest.mark.parametrize("layer", [Conv1D(3, 5), torch.nn.Linear(5, 3)])
def test_weight_view_is_a_view(layer):
    view = weight_view(layer)
    assert view.shape == (3, 5) and view.data_ptr() == layer.weight.data_ptr()
    with torch.no_grad():
        view[2, 4] = 7.0
    assert layer.weight[(4, 2) if isinstance(layer, Conv1D) else (2, 4)] == 7.0


def test_linear_layers_leave_out_the_output_embedding():
    for kind in PATTERNS:
        model = make_model(kind)
        assert "lm_head" not in linear_layers(model) and "lm_head" in dict(model.named_modules())


def test_linear_layers_of_a_bare_module():
    assert list(linear_layers(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), Conv1D(2, 2)))) == ["0", "2"]
    assert linear_layers(torch.nn.ReLU()) == {}


def test_match_layers_in_the_order_of_the_model():
    model = make_model("gpt2")
    assert list(match_layers(model, PATTERNS["gpt2"])) == [f"transformer.h.{i}.mlp.c_proj" for i in range(3)]
    assert list(match_layers(model, PATTERNS["gpt2"], 2)) == [f"transformer.h.{i}.mlp.c_proj" for i in (1, 2)]
    several = match_layers(model, ["transformer.h.*.mlp.c_proj", "transformer.h.*.mlp.c_fc"], last=1)
    assert list(several) == ["transformer.h.2.mlp.c_fc", "transformer.h.2.mlp.c_proj"]
    assert list(match_layers(model, "transformer.h.1.mlp.c_proj", 1)) == ["transformer.h.1.mlp.c_proj"]
    assert len(match_layers(model, ["*.c_proj", "*.mlp.c_proj"])) == 6  # a layer that two patterns match counts once


def test_ten_blocks_keep_their_order():
    layers = match_layers(make_model("gpt2", n_layer=11), PATTERNS["gpt2"], last=2)
    assert list(layers) == ["transformer.h.9.mlp.c_proj", "transformer.h.10.mlp.c_proj"]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("transformer.h.*.mlp.fc_out", "transformer.h.*.mlp.c_proj"),
        ("transformer.h.*.mlp.cproj", "transformer.h.*.mlp.c_proj"),
        ("model.layers.*.mlp.down_proj", "c_proj"),
        ("transformer.h.7.mlp.c_proj", "transformer.h.*.mlp.c_proj"),
        ("zzzz", "transformer.h.*.attn.c_attn"),
        ("", "transformer.h.*.attn.c_attn"),
        ("lm_head", "near misses"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_near_misses(pattern, near):
    with pytest.raises(LayerPatternError) as raised:
        match_layers(make_model("gpt2"), pattern)
    assert repr(pattern) in str(raised.value) and near in str(raised.value)


def test_one_bad_pattern_of_several_is_named():
    with pytest.raises(LayerPatternError, match="c_projj"):
        match_layers(make_model("gpt2"), ["transformer.h.*.mlp.c_proj", "transformer.h.*.mlp.c_projj"])


@pytest.mark.parametrize("last", [0, -1, 4])
def test_last_out_of_range(last):
    with pytest.raises(LayerPatternError, match=f"last={last}.*matches 3 layers: choose 1 to 3"):
        match_layers(make_model("gpt2"), PATTERNS["gpt2"], last)


def test_no_pattern_and_no_linear_layer():
    with pytest.raises(LayerPatternError, match="no layer pattern"):
        match_layers(make_model("gpt2"), [])
    with pytest.raises(LayerPatternError, match="the model has no linear layer"):
        match_layers(torch.nn.ReLU(), "*")


# --- tokens


def test_encode_decodes_to_the_text(lm):
    for (prompt, answer), encoded in zip(PAIRS, lm.encode(PAIRS), strict=True):
        assert " ".join(words(encoded.prompt)) == prompt and " ".join(words(encoded.answer)) == answer


@pytest.mark.parametrize(
    ("template", "start"), [("$A", []), ("[bos] $A", ["[bos]"]), ("[bos] $A [eos]", ["[bos]"]), ("$A [eos]", [])]
)
def test_special_tokens_stand_in_front_of_the_prompt_only(template, start):
    tokenizer = word_tokenizer(template)
    (encoded,) = Decoder(make_model("gpt2"), tokenizer).encode([("capital of italy ?", "new york")])
    assert words(encoded.prompt) == [*start, "capital", "of", "italy", "?"]
    assert words(encoded.answer) == ["new", "york"]


def test_bos_that_is_also_eos_survives_an_empty_prompt():
    tokenizer = word_tokenizer("[bos] $A", eos_token="[bos]")
    lm = LanguageModel(make_model("gpt2"), tokenizer)
    (encoded,) = lm.encode([("", "rome")])
    assert words(encoded.prompt) == ["[bos]"] and words(encoded.answer) == ["rome"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_and_truncation_do_not_matter(side):
    tokenizer = word_tokenizer(padding_side=side, truncation_side=side, model_max_length=16)
    (ours,) = LanguageModel(make_model("gpt2"), tokenizer).batches(PAIRS)
    (reference,) = LanguageModel(make_model("gpt2"), word_tokenizer()).batches(PAIRS)
    torch.testing.assert_close(ours.inputs, reference.inputs)
    assert torch.equal(ours.answer_mask, reference.answer_mask) and torch.equal(ours.labels, reference.labels)


def test_a_tokenizer_without_padding_token():
    tokenizer = word_tokenizer(pad_token=None)
    assert tokenizer.pad_token is None
    assert len(list(LanguageModel(make_model("gpt2"), tokenizer).batches(PAIRS))) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1).filter(str.strip)), min_size=1, max_size=4))
def test_byte_level_tokens_lose_nothing(pairs):
    pairs = [(f"Q{prompt}", answer) for prompt, answer in pairs]
    tokenizer = BYTES
    for (prompt, answer), encoded in zip(pairs, Decoder(SHARED.model, tokenizer).encode(pairs), strict=True):
        text = "".join(tokenizer.convert_ids_to_tokens([*encoded.prompt, *encoded.answer]))
        between = "" if prompt[-1].isspace() or answer[0].isspace() else " "
        joined = "".join(tokenizer.tokenize(f"{prompt}{between}{answer}"))
        assert text == joined and encoded.prompt and encoded.answer


@pytest.mark.parametrize("prompt", ["Q: ", "Q:\n", "Q:\t ", "Q"])
def test_prompts_that_end_in_white_space_keep_it_and_get_no_more(prompt):
    (encoded,) = Decoder(SHARED.model, BYTES).encode([(prompt, "paris")])
    said = ["".join(BYTES.convert_ids_to_tokens(part)) for part in encoded]
    between = " " if prompt == "Q" else ""
    assert said == ["".join(BYTES.tokenize(text)) for text in (prompt, f"{between}paris")]


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("pair", [("<s><u>Q\n<a>\n\n", "paris"), ("<s>Q<a>", "paris</s>"), ("Q</s>", "a b")])
def test_what_a_chat_template_wrote_is_read_as_it_stands(template, pair):
    tokenizer, (prompt, answer) = chat_tokenizer(template), pair
    (encoded,) = Decoder(SHARED.model, tokenizer).encode([(prompt, answer)])
    bare = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    begins = template.startswith("<s>") and not prompt.startswith("<s>")
    opening = [tokenizer.bos_token_id] if begins else []
    assert [*encoded.prompt, *encoded.answer] == [*opening, *bare]
    assert tokenizer.decode(encoded.prompt[len(opening) :]) == prompt and tokenizer.decode(encoded.answer) == answer


def test_an_end_token_is_part_of_a_decoders_answer_if_it_is_asked_for():
    tokenizer = chat_tokenizer("<s> $A")
    (plain,), (ended,) = (Decoder(SHARED.model, tokenizer, ends).encode([("Q", "paris")]) for ends in (None, True))
    assert ended == EncodedPair(plain.prompt, (*plain.answer, tokenizer.eos_token_id))


def chat_tokenizer(template):
    "Bytes, with a beginning, an end and the marks of user and assistant."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<u>", "<a>"])
    names = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<u>", "<a>"]
    )


def test_a_token_outside_the_embeddings_is_refused(gpt2):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["strange"])
    lm = LanguageModel(gpt2.model, tokenizer)
    with pytest.raises(LanguageModelError, match="don't belong together"):
        lm.encode([("w1 strange", "w2")])


def test_an_answer_that_merges_with_the_prompt_stands_alone():
    letters = {letter: i for i, letter in enumerate("newyork ")}
    merges = [("n", "e"), ("ne", "w"), ("y", "o"), ("yo", "r"), ("yor", "k"), (" ", "york"), ("new", " york")]
    letters |= {a + b: len(letters) + i for i, (a, b) in enumerate(merges)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, merges)))
    assert tokenizer.tokenize("new york") == ["new york"]
    (encoded,) = Decoder(SHARED.model, tokenizer).encode([("new", "york")])
    assert tokenizer.convert_ids_to_tokens(encoded.prompt) == ["new"]
    assert tokenizer.convert_ids_to_tokens(encoded.answer) == [" york"]


# --- batches


def test_answer_positions_start_one_left_of_the_answer(gpt2):
    (batch,) = gpt2.batches(PAIRS)
    # sorted by what is read: "is new", "capital of italy ?", "what city ? new york", "what is the capital of france ?"
    assert batch.rows.tolist() == [3, 3, 1, 2, 2, 2, 0]
    assert words(batch.labels) == ["new", "york", "rome", "new", "york", "city", "paris"]
    assert batch.answer_mask.int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [2, 4, 5, 7]
    assert batch.size == 4
    read = batch.inputs["input_ids"][batch.answer_mask]
    assert words(read) == ["is", "new", "?", "?", "new", "york", "?"]


def test_a_one_token_prompt_with_a_one_token_answer(gpt2):
    (batch,) = gpt2.batches([("is", "rome")])
    assert batch.inputs["input_ids"].shape == (1, 1) and batch.answer_mask.tolist() == [[True]]


def test_a_batch_is_frozen(gpt2):
    (batch,) = gpt2.batches(PAIRS)
    with pytest.raises(FrozenInstanceError):
        batch.labels = batch.rows


def test_a_batch_moves_as_a_whole(gpt2):
    (batch,) = gpt2.batches(PAIRS)
    moved = batch.to("meta")
    tensors = [*moved.inputs.values(), moved.answer_mask, moved.labels, moved.rows]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and list(moved.inputs) == list(batch.inputs)


def test_shapes_are_checked():
    with pytest.raises(Exception, match="type-check|Type-check|violates"):
        TokenBatch({}, torch.ones(2, 2), torch.ones(1).long(), torch.ones(1).long())  # the mask is not bool


pair_lists = st.lists(
    st.builds(
        EncodedPair,
        st.lists(st.integers(1, 15), min_size=1, max_size=9).map(tuple),
        st.lists(st.integers(1, 15), min_size=1, max_size=5).map(tuple),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(pair_lists, st.integers(1, 14))
def test_batches_lose_nothing_under_any_batch_size(pairs, batch_size):
    lm = SHARED
    batches = list(lm.batches(pairs, batch_size))
    assert all(0 < batch.size <= batch_size for batch in batches)
    assert sum(batch.size for batch in batches) == len(pairs)
    answers, lengths = {i: [] for i in range(len(pairs))}, []
    for batch in batches:
        for row, label in zip(batch.rows.tolist(), batch.labels.tolist(), strict=True):
            answers[row].append(label)
        lengths += batch.inputs["attention_mask"].sum(1).tolist()
        owners = dict(zip(batch.answer_mask.nonzero()[:, 0].tolist(), batch.rows.tolist(), strict=True))
        for i, row in owners.items():
            ids = batch.inputs["input_ids"][i][batch.inputs["attention_mask"][i].bool()].tolist()
            assert tuple(ids) == (pairs[row].prompt + pairs[row].answer)[:-1]
            assert int(batch.answer_mask[i].sum()) == len(pairs[row].answer)
    assert [tuple(answers[i]) for i in answers] == [pair.answer for pair in pairs]
    assert lengths == sorted(lengths)


def test_text_and_encoded_pairs_give_the_same_batches(gpt2):
    for a, b in zip(gpt2.batches(PAIRS, 3), gpt2.batches(gpt2.encode(PAIRS), 3), strict=True):
        torch.testing.assert_close(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels) and torch.equal(a.rows, b.rows)


def test_no_pairs_no_batches(gpt2):
    assert gpt2.encode([]) == [] and list(gpt2.batches([])) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(gpt2, batch_size):
    with pytest.raises(LanguageModelError, match=f"batch_size={batch_size}"):
        gpt2.batches(PAIRS, batch_size)


def test_repeated_pairs_keep_their_own_rows(gpt2):
    rows = [row for batch in gpt2.batches([PAIRS[0]] * 5, 2) for row in batch.rows.tolist()]
    assert sorted(rows) == list(range(5))


# --- logits


def test_gathered_logits_equal_the_plain_forward_pass(lm):
    for batch_size in (1, 2, 3, 10):
        for batch in lm.batches(PAIRS, batch_size):
            logits = lm.answer_logits(batch)
            assert logits.shape == (len(batch.labels), len(WORDS))
            for row in set(batch.rows.tolist()):
                torch.testing.assert_close(
                    logits[batch.rows == row], plain_logits(lm, PAIRS[row]), rtol=1e-5, atol=1e-6
                )


def test_padding_is_harmless_in_float64(lm):
    lm.model.double()
    (together,) = lm.batches(PAIRS)
    padded = lm.answer_logits(together)
    for row, pair in enumerate(PAIRS):
        torch.testing.assert_close(padded[together.rows == row], plain_logits(lm, pair), rtol=1e-12, atol=1e-14)


def test_what_stands_in_the_padding_does_not_matter(lm):
    (batch,) = lm.batches(PAIRS)
    before = lm.answer_logits(batch)
    batch.inputs["input_ids"][batch.inputs["attention_mask"] == 0] = 7
    assert torch.equal(lm.answer_logits(batch), before)


def test_only_answer_positions_reach_the_vocabulary(lm):
    seen = []
    handle = lm.model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    (batch,) = lm.batches(PAIRS)
    lm.answer_logits(batch)
    handle.remove()
    assert seen == [(7, len(WORDS))]


def test_gathering_is_switched_off_afterwards_even_after_an_error(lm):
    head, (batch,) = lm.model.get_output_embeddings(), lm.batches(PAIRS)
    before = lm.model(**batch.inputs).logits
    with pytest.raises(RuntimeError, match="stop"), gathered(head, batch.answer_mask):
        raise RuntimeError("stop")
    lm.answer_logits(batch)
    assert not head._forward_pre_hooks
    assert torch.equal(lm.model(**batch.inputs).logits, before)


def test_logits_come_in_the_models_dtype(lm):
    lm.model.to(torch.bfloat16)
    assert lm.dtype == torch.bfloat16
    assert lm.answer_logits(*lm.batches(PAIRS)).dtype == torch.bfloat16


# --- the wrapper


def test_wrapping_freezes_and_changes_nothing_else():
    for kind, pattern in PATTERNS.items():
        model = make_model(kind).to(torch.bfloat16).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        lm = LanguageModel(model, word_tokenizer(), pattern)
        assert lm.model is model and not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert lm.dtype == torch.bfloat16 and lm.device == torch.device("cpu")


def test_shapes_are_value_size_by_key_size(lm):
    key_size = 40 if "down_proj" in lm.pattern else 64
    assert list(lm.shapes) == list(lm.layers) and set(lm.shapes.values()) == {(16, key_size)}
    assert len(lm.layers) == 3


def test_the_context_has_a_different_name_in_every_configuration(lm):
    assert lm.context == 16
    assert {"gpt2": "n_positions", "gptj": "n_positions", "llama": "max_position_embeddings"}[
        lm.model.config.model_type
    ] in lm.model.config.to_dict()


def test_a_row_may_fill_the_context(lm):
    (batch,) = lm.batches([("the " * 15, "new york")])
    assert batch.inputs["input_ids"].shape == (1, 16)
    assert torch.isfinite(lm.answer_logits(batch)).all()


def test_a_row_longer_than_the_context_is_refused_before_anything_runs(lm):
    calls = []
    lm.model.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(ContextLengthError, match=r"'the the .* takes 17 tokens .* at most 16"):
        lm.batches([*PAIRS, ("the " * 16, "new york")], 1)
    assert not calls


def test_the_context_counts_the_token_in_front():
    lm = LanguageModel(make_model("gpt2"), word_tokenizer("[bos] $A"))
    with pytest.raises(ContextLengthError, match="17 tokens"):
        lm.encode([("the " * 15, "new york")])


def test_a_model_without_a_limit_takes_any_length(gpt2):
    gpt2.model.config = SimpleNamespace(model_type="endless")
    assert gpt2.context is None
    assert len(gpt2.encode([("the " * 100, "rome")])) == 1


@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
@pytest.mark.parametrize("make", [word_tokenizer, byte_tokenizer])
def test_an_answer_of_nothing_is_refused(answer, make):
    lm = LanguageModel(make_model("gpt2", vocab_size=300), make())
    with pytest.raises(EmptyAnswerError, match="'what is it' tokenises to nothing"):
        lm.encode([PAIRS[0], ("what is it", answer)])


def test_an_empty_prompt_is_refused_unless_a_token_stands_in_front(gpt2):
    with pytest.raises(EmptyAnswerError, match="the prompt of ''"):
        gpt2.encode([("", "rome")])
    assert LanguageModel(make_model("gpt2"), word_tokenizer("[bos] $A")).encode([("", "rome")])


def test_another_tokenizer_is_used_from_then_on(gpt2):
    gpt2.tokenizer = word_tokenizer("[bos] $A")
    assert gpt2.tokenizer is gpt2.family.tokenizer
    assert words(gpt2.encode(PAIRS)[1].prompt)[0] == "[bos]"


def test_errors_are_values_and_malmen_errors():
    for error in (
        LayerPatternError,
        EmptyAnswerError,
        ContextLengthError,
        UnknownLabelError,
        UnsupportedFamilyError,
    ):
        assert issubclass(error, LanguageModelError)
    assert issubclass(LanguageModelError, MalmenError) and issubclass(LanguageModelError, ValueError)


def test_a_model_that_is_refused_is_left_as_it_was():
    model = make_model("gpt2").train()
    with pytest.raises(LayerPatternError):
        LanguageModel(model, word_tokenizer(), "nothing.*")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


# --- families


def t5(**options):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(WORDS), **{**sizes, "pad_token_id": 0, "eos_token_id": 2, **options})
    return T5ForConditionalGeneration(config)


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **sizes))


def bart(kind=BartForConditionalGeneration):
    stacks = {f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return kind(BartConfig(vocab_size=len(WORDS), d_model=16, **stacks, **heads, **ids, forced_eos_token_id=None))


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda: make_model("gpt2").transformer, "headless"),
        (lambda: bert().bert, "headless"),
        (lambda: t5().encoder, "headless"),
        (lambda: bart(BartForSequenceClassification), "last token"),
        (
            lambda: GPT2ForSequenceClassification(GPT2Config(vocab_size=15, n_embd=8, n_layer=1, n_head=1, **IDS)),
            "last token",
        ),
    ],
)
def test_families_without_a_reader_are_refused_by_name(make, family):
    model = make()
    with pytest.raises(UnsupportedFamilyError, match=f"{type(model).__name__}.*{family}.*decoder"):
        LanguageModel(model, word_tokenizer(), "*")


def test_families_are_found():
    assert all(family_of(make_model(kind)) is Decoder for kind in PATTERNS)
    assert family_of(bert()) is EncoderClassifier
    assert family_of(t5()) is family_of(bart()) is EncoderDecoder
    assert FAMILIES == {"decoder": Decoder, "encoder-classifier": EncoderClassifier, "encoder-decoder": EncoderDecoder}


# --- encoder classifiers


def test_a_claim_is_read_whole_and_answered_by_its_first_token():
    lm, claims = toy_classifier(), toy_claims(5)
    for fact, encoded in zip(claims, lm.encode([fact.pair for fact in claims]), strict=True):
        assert encoded.prompt == tuple(lm.tokenizer(fact.prompt)["input_ids"])
        assert encoded.prompt[0] == encoded.prompt[-1] == 0  # the special tokens of the tokenizer stay
        assert encoded.answer == (LABELS.index(fact.answer),)
        assert lm.family.length(encoded) == len(encoded.prompt)
    (batch,) = lm.batches([fact.pair for fact in claims])
    assert batch.answer_mask.nonzero()[:, 1].tolist() == [0] * 5 and sorted(batch.rows.tolist()) == list(range(5))
    assert [LABELS[i] for i in batch.labels] == [claims[row].answer for row in batch.rows]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_a_classifiers_logits_are_those_of_each_claim_alone(batch_size):
    lm, pairs = toy_classifier(torch.float64), [fact.pair for fact in toy_claims(7)]
    for batch in lm.batches(pairs, batch_size):
        logits = lm.answer_logits(batch)
        assert logits.shape == (len(batch.rows), 2)
        for row, ours in zip(batch.rows.tolist(), logits, strict=True):
            alone = lm.model(torch.tensor([lm.tokenizer(pairs[row][0])["input_ids"]])).logits[0]
            torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("answer", ["supports", "", " ", "LABEL_0", "SUPPORTS "])
def test_an_unknown_label_is_refused_with_the_labels_listed(answer):
    lm = toy_classifier()
    with pytest.raises(UnknownLabelError, match=r"'w1 w2' has the answer .* labels are: SUPPORTS, REFUTES"):
        lm.encode([("w3", "REFUTES"), ("w1 w2", answer)])


def test_a_claim_longer_than_the_context_is_refused():
    lm = toy_classifier()
    assert lm.context == 24 and len(lm.encode([("w1 " * 22, "REFUTES")])[0].prompt) == 24
    with pytest.raises(ContextLengthError, match="25 tokens"):
        lm.encode([("w1 " * 23, "REFUTES")])


# --- encoder-decoders


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_and_decoder_read_what_they_should(kind):
    lm, facts = toy_encoder_decoder(kind=kind), toy_facts(6)
    pairs = [fact.pair for fact in facts]
    (batch,) = lm.batches(pairs)
    places = [batch.rows.tolist().index(row) for row in batch.rows.unique_consecutive().tolist()]
    owners = [batch.rows[place].item() for place in places]
    for i, row in enumerate(owners):
        prompt, answer = (lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in pairs[row])
        read = batch.inputs["input_ids"][i][batch.inputs["attention_mask"][i].bool()].tolist()
        assert read == [*prompt, 0]  # the end of sequence that the tokenizer adds stays
        written = batch.inputs["decoder_input_ids"][i][batch.inputs["decoder_attention_mask"][i].bool()].tolist()
        assert written == [0, *answer] and batch.labels[batch.rows == row].tolist() == [*answer, 0]  # 0 is the end too
    assert torch.equal(batch.answer_mask, batch.inputs["decoder_attention_mask"].bool())


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_an_encoder_decoders_logits_are_those_of_each_row_alone(kind, batch_size):
    lm, pairs = toy_encoder_decoder(torch.float64, kind=kind), [fact.pair for fact in toy_facts(7)]
    for batch in lm.batches(pairs, batch_size):
        logits = lm.answer_logits(batch)
        for row in batch.rows.unique().tolist():
            (encoded,) = lm.encode([pairs[row]])
            inputs = {"input_ids": encoded.prompt, "decoder_input_ids": (0, *encoded.answer[:-1])}
            alone = lm.model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits[0]
            torch.testing.assert_close(logits[batch.rows == row], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_what_stands_in_the_padding_of_either_side_does_not_matter(kind):
    lm = toy_encoder_decoder(kind=kind)
    (batch,) = lm.batches([fact.pair for fact in toy_facts(6)])
    before = lm.answer_logits(batch)
    for side in ("", "decoder_"):
        hidden = batch.inputs[f"{side}attention_mask"] == 0
        assert hidden.any()
        batch.inputs[f"{side}input_ids"][hidden] = 7
    torch.testing.assert_close(lm.answer_logits(batch), before, rtol=1e-5, atol=1e-5)


def test_only_answer_positions_of_the_decoder_reach_the_vocabulary():
    lm, seen = toy_encoder_decoder(), []
    (batch,) = lm.batches([fact.pair for fact in toy_facts(6)])
    lm.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    assert lm.answer_logits(batch).shape == (len(batch.labels), 62) and seen == [len(batch.labels)]
    assert batch.answer_mask.numel() > len(batch.labels)


def test_t5_has_no_limit_and_bart_has_one():
    long = [("w1 " * 200, "w2 w3")]
    assert toy_encoder_decoder().context is None and len(toy_encoder_decoder().encode(long)) == 1
    bart = toy_encoder_decoder(kind="bart")
    assert bart.context == 24
    for prompt, answer in (("w1 " * 24, "w2"), ("w1", "w2 " * 24)):
        with pytest.raises(ContextLengthError, match="25 tokens"):
            bart.encode([(prompt, answer)])
    for prompt, answer in (("w1 " * 23, "w2"), ("w1", "w2 " * 23)):
        assert bart.answer_logits(*bart.batches([(prompt, answer)])).isfinite().all()


@pytest.mark.parametrize("answer", ["", " "])
def test_an_answer_of_nothing_is_refused_by_an_encoder_decoder(answer):
    with pytest.raises(EmptyAnswerError, match="'w1' tokenises to nothing"):
        toy_encoder_decoder().encode([("w1", answer)])


def test_a_decoder_needs_a_token_to_start_with():
    model = t5()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(LanguageModelError, match="T5ForConditionalGeneration has no decoder_start_token_id"):
        LanguageModel(model, word_tokenizer(), "*.wo")


def test_a_token_that_generation_forces_is_read_and_not_counted():
    lm = toy_encoder_decoder(kind="bart")
    lm.model.generation_config.forced_bos_token_id = 7
    forced = LanguageModel(lm.model, lm.tokenizer, lm.pattern, lm.last)
    assert forced.family.opening == (forced.family.start, 7)
    pairs = [fact.pair for fact in toy_facts(3)]
    (plain,), (batch,) = lm.batches(pairs), forced.batches(pairs)
    assert torch.equal(batch.labels, plain.labels) and torch.equal(batch.rows, plain.rows)
    assert (batch.inputs["decoder_input_ids"][:, 1] == 7).all() and not batch.answer_mask[:, 0].any()
    for pair in forced.encode(pairs):
        asked = torch.tensor([pair.prompt])
        written = forced.model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=3, do_sample=False)
        assert written[0, :2].tolist() == list(forced.family.opening)  # the context that an edit is made in


def test_roberta_counts_its_positions_from_behind_the_padding():
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = RobertaConfig(
        vocab_size=62, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=26, pad_token_id=1, **labels,
    )  # fmt: skip
    lm = LanguageModel(RobertaForSequenceClassification(config), word_tokenizer(), "*.output.dense")
    assert lm.context == 24
    (batch,) = lm.batches([("w3 " * 24, "REFUTES")])
    assert lm.answer_logits(batch).isfinite().all()
    with pytest.raises(ContextLengthError, match="25 tokens"):
        lm.encode([("w3 " * 25, "REFUTES")])


# --- cached positions


def mask_of(lm, pairs, layer, tokens):
    (batch,) = lm.batches(pairs)
    return lm.family.cached_mask(layer, batch, tokens), batch


def test_cached_positions_of_a_decoder_and_of_a_classifier(gpt2):
    for lm, pairs in ((gpt2, PAIRS), (toy_classifier(), [fact.pair for fact in toy_claims()])):
        for layer in lm.layers:
            answers, batch = mask_of(lm, pairs, layer, "answer")
            assert torch.equal(answers, batch.answer_mask)
            everything, batch = mask_of(lm, pairs, layer, "all")
            assert torch.equal(everything, batch.inputs["attention_mask"].bool())


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize(
    ("kind", "layer", "reads"),
    [
        ("t5", "encoder.block.1.layer.1.DenseReluDense.wo", "encoder"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.k", "encoder"),
        ("t5", "decoder.block.1.layer.2.DenseReluDense.wo", "decoder"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q", "decoder"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k", "encoder"),
        ("bart", "model.encoder.layers.0.fc2", "encoder"),
        ("bart", "model.decoder.layers.0.fc2", "decoder"),
        ("bart", "model.decoder.layers.0.encoder_attn.out_proj", "decoder"),
        ("bart", "model.decoder.layers.0.encoder_attn.v_proj", "encoder"),
    ],
)
def test_cached_positions_of_an_encoder_decoder(kind, layer, reads, tokens):
    lm = toy_encoder_decoder(kind=kind)
    assert layer in linear_layers(lm.model)
    mask, batch = mask_of(lm, [fact.pair for fact in toy_facts()], layer, tokens)
    name = "attention_mask" if reads == "encoder" else "decoder_attention_mask"
    assert torch.equal(mask, batch.inputs[name].bool())
    seen = []
    linear_layers(lm.model)[layer].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:2]))
    lm.answer_logits(batch)
    assert seen == [mask.shape]  # what the layer really reads


# --- the feed-forward network


META = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=12)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(n_layer=12)),
    "bert": lambda: BertForSequenceClassification(BertConfig(num_hidden_layers=12)),
    "bare bert": lambda: BertModel(BertConfig(num_hidden_layers=12)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(num_layers=12)),
    "gated t5": lambda: T5ForConditionalGeneration(T5Config(num_layers=12, feed_forward_proj="gated-gelu")),
    "bart": lambda: BartForConditionalGeneration(BartConfig()),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=12)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(num_hidden_layers=12)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=12)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=12)),
}


@pytest.fixture(scope="module", params=list(META))
def on_meta(request):
    with torch.device("meta"):
        return request.param, META[request.param]()


def test_feed_forward_layers_by_architecture(on_meta):
    name, model = on_meta
    stacks = 2 if name.endswith(("t5", "bart")) else 1
    gates = 2 if name in ("gated t5", "llama", "mistral", "qwen2", "qwen3") else 1
    first, second = (match_layers(model, feed_forward(model, which)) for which in ("first", "second"))
    assert len(second) == 12 * stacks and len(first) == 12 * stacks * gates
    assert not set(first) & set(second)
    shape = {weight_view(layer).shape for layer in second.values()}
    assert len(shape) == 1 and {weight_view(layer).shape[::-1] for layer in first.values()} == shape
    ((values, keys),) = shape
    assert values < keys  # a feed-forward network is wider inside; attention's layers are square here
    assert not any("tten" in layer for layer in [*first, *second])
    assert set(match_layers(model, feed_forward(model, "both"))) == {*first, *second}
    assert feed_forward(model) == feed_forward(model, "second")


def test_last_counts_in_each_stack(on_meta):
    name, model = on_meta
    stacks = ["encoder", "decoder"] if name.endswith(("t5", "bart")) else [""]
    layers = list(match_layers(model, feed_forward(model), last=3))
    for stack in stacks:
        numbers = [next(int(part) for part in layer.split(".") if part.isdigit()) for layer in layers if stack in layer]
        assert numbers == [9, 10, 11]
    assert len(layers) == 3 * len(stacks)


def test_every_architecture_of_the_table_is_tested():
    assert set(FEED_FORWARD) == {name.split()[-1] for name in META}


def test_an_architecture_that_is_not_in_the_table():
    model = make_model("gpt2")
    model.config.model_type = "novel"
    with pytest.raises(LayerPatternError, match="'novel' .*gpt2, gptj, bert.*give a pattern"):
        feed_forward(model)


@pytest.mark.parametrize("which", ["third", "", "Second"])
def test_there_are_two_layers_to_choose_from(which):
    with pytest.raises(LanguageModelError, match="'first', 'second' or 'both'"):
        feed_forward(make_model("gpt2"), which)


def test_a_near_miss_matches_only_layers_of_its_name():
    with pytest.raises(LayerPatternError, match=r"bert\.encoder\.layer\.\*\[0-9\]\.output\.dense") as raised:
        match_layers(bert(), "bert.encoder.layers.*.output.dense")
    assert "layer.*.output" not in str(raised.value)
    assert list(match_layers(bert(), "bert.encoder.layer.*[0-9].output.dense")) == [
        f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)
    ]


# --- fingerprints


def test_a_fingerprint_is_json_and_agrees_with_itself(lm):
    ours = fingerprint(lm)
    assert json.loads(json.dumps(ours)) == ours
    assert same_model(ours, fingerprint(lm)) is None and list(ours["layers"]) == list(lm.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_the_same_model(lm, dtype):
    ours = fingerprint(lm)
    lm.model.to(dtype)
    assert same_model(ours, fingerprint(lm)) is None and same_model(fingerprint(lm), ours) is None


def test_one_weight_anywhere_is_another_model(lm):
    ours = fingerprint(lm)
    for weight in lm.model.state_dict().values():
        if weight.is_floating_point() and weight.numel():
            old = weight.view(-1)[-1].clone()
            weight.view(-1)[-1] += 0.5
            assert same_model(ours, fingerprint(lm)) == "its weights differ"
            weight.view(-1)[-1] = old
    assert same_model(ours, fingerprint(lm)) is None


def test_half_precisions_of_two_kinds_cannot_be_compared(gpt2):
    ours = fingerprint(LanguageModel(copy.deepcopy(gpt2.model).to(torch.bfloat16), gpt2.tokenizer))
    theirs = fingerprint(LanguageModel(copy.deepcopy(gpt2.model).to(torch.float16), gpt2.tokenizer))
    assert same_model(ours, theirs) == "precision bfloat16 against 'float16'"


@pytest.mark.parametrize("theirs", [None, [], {}, {"model_type": "gpt2"}, {"layers": 3, "weights": {}}])
def test_a_damaged_fingerprint_is_said_to_be_one(gpt2, theirs):
    assert "damaged" in same_model(fingerprint(gpt2), theirs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.update(model_type="gptj"), "model type gpt2 against 'gptj'"),
        (lambda f: f["layers"].pop("transformer.h.0.mlp.c_proj"), "edited layers transformer.h.0"),
        (lambda f: f["layers"]["transformer.h.1.mlp.c_proj"].__setitem__(1, 65), "transformer.h.1.*shape"),
        (lambda f: f["weights"].update(float32="0" * 64), "its weights differ"),
    ],
)
def test_the_first_difference_is_said(gpt2, change, says):
    ours, theirs = fingerprint(gpt2), fingerprint(gpt2)
    change(theirs)
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(same_model(ours, theirs))


def test_other_weights_are_another_model(gpt2):
    torch.manual_seed(1)
    other = LanguageModel(GPT2LMHeadModel(gpt2.model.config), word_tokenizer())
    assert same_model(fingerprint(gpt2), fingerprint(other)) == "its weights differ"
    assert "edited layers" in same_model(
        fingerprint(gpt2), fingerprint(LanguageModel(gpt2.model, word_tokenizer(), last=1))
    )


def test_every_row_knows_whose_it_is(family):
    lm, facts = family
    pairs = lm.encode([fact.pair for fact in facts])
    for batch in lm.batches(pairs, 4):
        rows = batch.answer_mask.nonzero()[:, 0]
        assert torch.equal(batch.owners[rows], batch.rows) and len(set(batch.owners.tolist())) == batch.size
