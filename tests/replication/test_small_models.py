"""The small tier's models: tokens, configurations, architectures."""

from dataclasses import asdict, replace

import pytest
import torch

from malmen_repro.facts import digest
from malmen_repro.replication.paper_models import PAPER_MODELS
from malmen_repro.replication.small_data import corpus_sentences
from malmen_repro.replication.small_models import (
    FRAMES,
    SmallBaseConfig,
    SmallConfig,
    byte_pair_tokenizer,
    small_config,
)
from malmen_repro.replication.small_training import small_bench
from malmen_repro.replication.stand_ins import StandInError
from tests.small import CONFIGS, EACH, fresh, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return byte_pair_tokenizer(corpus_sentences(folder), 400)


@pytest.mark.parametrize("text", ["Ada Ash", "naïve 東京 🙂", "a  b\tc", "(x) 3.5 %"])
def test_any_text_can_be_written(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("Q?")["input_ids"] + tokenizer(" " + text)["input_ids"] == tokenizer("Q? " + text)["input_ids"]


def test_special_tokens(tokenizer):
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2 and len(tokenizer) <= 400


@pytest.mark.parametrize("name,ends", [("t5", (False, True)), ("bert", (True, True))])
def test_frames(folder, tmp_path, name, ends):
    tokenizer = byte_pair_tokenizer(corpus_sentences(folder), 400, FRAMES[name])
    ids, end = tokenizer("Ada Ash")["input_ids"], tokenizer.eos_token_id
    assert (ids[0] == end, ids[-1] == end) == ends
    assert tokenizer("Ada", add_special_tokens=False) == tokenizer(" Ada", add_special_tokens=False)


def test_the_first_stand_in_is_the_one_that_records_stand_on():
    assert digest(asdict(SmallConfig())) == "6ad4e578395c" and small_config("gpt2") == SmallConfig()


def test_a_configuration_may_say_how_many_blocks_are_edited():
    lm = fresh(byte_pair_tokenizer(["a b c"], 300), CONFIGS["gpt2-base"])
    assert list(lm.layers) == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    gpt2, base = PAPER_MODELS["GPT-2"], SmallBaseConfig()
    assert (base.layers, base.width, base.heads) == tuple(gpt2.sizes[name] for name in ("n_layer", "n_embd", "n_head"))
    assert base.edited == gpt2.last


def test_an_architecture_that_is_not_there():
    with pytest.raises(StandInError, match="gpt2, gptj, t5, bert, gpt2-subjects, gpt2-recall, gpt2-base"):
        small_config("gpt3")
    with pytest.raises(StandInError, match="gpt3"):
        small_bench("nowhere", architecture="gpt3")


@EACH
def test_model_of_each_architecture(tokenizer, config):
    config = replace(config, layers=3)
    lm, again = fresh(tokenizer, config), fresh(tokenizer, config)
    assert lm.model.config.model_type == config.architecture.split("-")[0]
    assert all(map(torch.equal, lm.model.parameters(), again.model.parameters()))
    stacks = 2 if config.architecture == "t5" else 1
    assert len(lm.layers) == 2 * stacks and len(set(lm.shapes.values())) == 1
    [(value_size, key_size)] = set(lm.shapes.values())
    assert value_size == config.width < key_size
