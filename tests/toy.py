"The smallest language model and facts that the tests need, made on the spot."

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from malmen_repro.facts import Fact
from malmen_repro.language_models import LanguageModel

WORDS = [f"w{i}" for i in range(60)]


def toy_tokenizer():
    "One token a word."
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
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

    return [
        Fact(f"w{i % 60} w{i // 60} {words(1, 5)}", words(1, 3), (words(2, 6), words(2, 6)), words(2, 6), words(1, 3))
        for i in range(start, start + count)
    ]
