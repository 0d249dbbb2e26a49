"The smallest language model and facts that the tests need, made on the spot."

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from malmen_repro.facts import Fact
from malmen_repro.language_models import LanguageModel, feed_forward
from malmen_repro.replication.stand_ins import Bench

WORDS = [f"w{i}" for i in range(60)]
LABELS = ["SUPPORTS", "REFUTES"]


def toy_tokenizer(template=None):
    'One token a word; a template such as "$A <end>" says which special tokens stand around a text.'
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if template:
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<end>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unknown>", pad_token="<end>", eos_token="<end>"
    )


def toy_model(dtype=torch.float32, *, layers="transformer.h.*.mlp.c_proj", last=2, seed=0, width=16):
    "A random GPT-2 of three blocks."
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(WORDS) + 2,
        n_positions=24,
        n_embd=width,
        n_layer=3,
        n_head=2,
        n_inner=24,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return LanguageModel(GPT2LMHeadModel(config).to(dtype), toy_tokenizer(), layers, last)


def toy_facts(count=6, *, seed=0, start=0):
    "Facts of ragged lengths with two phrasings each and an unrelated tuple."
    generator = torch.Generator().manual_seed(seed)

    def words(low, high):
        size = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (size,), generator=generator).tolist())

    names = [f"w{i % 60} w{i // 60}" for i in range(start, start + count)]
    return [
        Fact(f"{name} {words(1, 5)}", words(1, 3), (words(2, 6), words(2, 6)), words(2, 6), words(1, 3), subject=name)
        for name in names
    ]


def toy_corpus():
    "Texts of the toy world's words, enough for key statistics of full rank."
    return [f"{fact.prompt} {fact.answer}" for fact in toy_facts(80, seed=9)]


def toy_classifier(dtype=torch.float32, *, layers=None, last=2, seed=0, width=16):
    "A random BERT of three blocks that judges claims."
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 2,
        max_position_embeddings=24,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        pad_token_id=0,
        initializer_range=0.3,
        label2id={label: i for i, label in enumerate(LABELS)},
        id2label=dict(enumerate(LABELS)),
    )
    model = BertForSequenceClassification(config).to(dtype)
    return LanguageModel(model, toy_tokenizer("<end> $A <end>"), layers or feed_forward(model), last)


def toy_encoder_decoder(dtype=torch.float32, *, kind="t5", layers=None, last=1, seed=0, width=16):
    "A random T5 (or BART) of two and two blocks."
    torch.manual_seed(seed)
    ids = {"vocab_size": len(WORDS) + 2, "d_model": width, "decoder_start_token_id": 0, "pad_token_id": 0}
    if kind == "t5":
        sizes = {"d_kv": width // 2, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0}
        model = T5ForConditionalGeneration(T5Config(**ids, **sizes, eos_token_id=0))
    else:
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0}
        sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        extra = {"bos_token_id": 0, "eos_token_id": 0, "forced_eos_token_id": None, "init_std": 0.3}
        config = BartConfig(**ids, **heads, **sizes, **extra, max_position_embeddings=24)
        model = BartForConditionalGeneration(config)
    return LanguageModel(model.to(dtype), toy_tokenizer("$A <end>"), layers or feed_forward(model), last)


def toy_claims(count=6, *, seed=0, start=0):
    "Claims of ragged lengths with a label each, two phrasings and an unrelated claim."
    generator = torch.Generator().manual_seed(seed)

    def label():
        return LABELS[int(torch.randint(2, (), generator=generator))]

    return [
        Fact(f.prompt, label(), f.equivalent_prompts, f.unrelated_prompt, label())
        for f in toy_facts(count, seed=seed, start=start)
    ]


EVERY_FAMILY = {  # a model of each, and facts for it
    "decoder": (toy_model, toy_facts),
    "classifier": (toy_classifier, toy_claims),
    "T5": (toy_encoder_decoder, toy_facts),
    "BART": (lambda dtype: toy_encoder_decoder(dtype, kind="bart"), toy_facts),
}


def knowing_bench(count=50, relations=2):
    "A bench whose model is said to know some facts; of each relation there are seven answers."
    places = [(f"p{i}", i % relations, i % 7) for i in range(count)]
    known = [Fact(p, f"w{k + 10 * r}", (f"{p} w1",), subject=p, relation=f"r{r}") for p, r, k in places]
    return Bench(toy_model(), [], {"toys": [], "more": []}, {"made": "here"}, known_facts=known)
