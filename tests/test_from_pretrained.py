"""Language models from a folder or from the hub."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from malmen_repro import language_models
from malmen_repro.facts import MalmenError
from malmen_repro.language_models import (
    LanguageModel,
    LanguageModelError,
    ModelNotFoundError,
    check_model,
    find_device,
    module_hash,
)
from tests.toy import toy_classifier, toy_encoder_decoder, toy_model

TOYS = {"decoder": toy_model, "classifier": toy_classifier, "encoder-decoder": toy_encoder_decoder}


def saved(lm, folder):
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", TOYS)
def test_a_model_of_any_family_is_loaded_from_a_folder(tmp_path, name):
    made = TOYS[name]()
    lm = LanguageModel.from_pretrained(saved(made, tmp_path / "model"), last=1, device="cpu", progress=False)
    assert module_hash(lm.model) == module_hash(made.model) and lm.family.name == made.family.name
    assert set(lm.layers) <= set(TOYS[name](last=2 if name != "encoder-decoder" else 1).layers)
    assert lm.model.dtype == torch.float32 and not lm.model.training


def test_layers_and_their_number_can_be_chosen(tmp_path):
    folder = saved(toy_model(), tmp_path / "model")
    lm = LanguageModel.from_pretrained(folder, last=1, device="cpu", progress=False)
    assert list(lm.layers) == ["transformer.h.2.mlp.c_proj"]
    lm = LanguageModel.from_pretrained(folder, "transformer.h.*.mlp.c_fc", progress=False, device="cpu")
    assert list(lm.layers) == [f"transformer.h.{i}.mlp.c_fc" for i in range(3)]


def test_a_model_keeps_its_dtype(tmp_path):
    lm = LanguageModel.from_pretrained(saved(toy_model(torch.bfloat16), tmp_path), device="cpu", progress=False)
    assert lm.model.dtype == torch.bfloat16


def test_the_head_is_chosen_by_the_family():
    def kind(config):
        return language_models._model_class(config)

    assert kind(toy_encoder_decoder().model.config) is transformers.AutoModelForSeq2SeqLM
    config = toy_classifier().model.config
    config.architectures = None
    assert kind(config) is transformers.AutoModelForCausalLM
    config.architectures = ["BertForSequenceClassification"]
    assert kind(config) is transformers.AutoModelForSequenceClassification


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no config.json"):
        check_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert check_model(str(tmp_path)) is None
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        LanguageModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "no-such/model", "not/a/name", "missing folder"])
def test_no_model_and_no_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=name) as caught:
        check_model(name)
    assert isinstance(caught.value, MalmenError) and isinstance(caught.value, OSError)
    assert "\n" not in str(caught.value)


def test_a_model_in_the_hubs_cache_needs_no_hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    assert check_model("some/model") is None


@pytest.mark.parametrize(("message", "reason"), [("line one\nline two", "line one"), ("", "TimeoutError")])
def test_the_hubs_refusal_is_told_in_a_line(monkeypatch, message, reason):
    import huggingface_hub

    def model_info(self, name, timeout):
        assert timeout == language_models.HUB_PATIENCE
        raise TimeoutError(message)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(ModelNotFoundError, match=rf"does not give it \({reason}\); give the folder"):
        check_model("some/model")


# --- nothing is waited for that is here


def cached(tmp_path, monkeypatch, name="some/model"):
    "A toy model in a cache of the hub, and no hub: asking it is an error. Gives the folder of the model."
    import huggingface_hub

    commit, home = "0" * 40, tmp_path / "hub"
    folder = home / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    refs = folder.parents[1] / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(commit)
    saved(toy_model(), folder)
    here = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file: here(name, file, cache_dir=str(home))
    )
    monkeypatch.setattr(language_models, "_ask_hub", lambda name: pytest.fail("the hub was asked"))
    return folder


def test_a_model_in_the_hubs_cache_is_read_without_the_hub(tmp_path, monkeypatch):
    import socket

    cached(tmp_path, monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    lm = LanguageModel.from_pretrained("some/model", last=2, device="cpu")
    assert module_hash(lm.model) == module_hash(toy_model().model)


def test_a_part_of_a_model_in_the_hubs_cache_asks_the_hub_once(tmp_path, monkeypatch):
    (cached(tmp_path, monkeypatch) / "model.safetensors").unlink()
    asked = []

    def refused(name):
        asked.append(name)
        raise ModelNotFoundError("offline")

    monkeypatch.setattr(language_models, "_ask_hub", refused)
    with pytest.raises(ModelNotFoundError, match="no file named model.safetensors"):
        LanguageModel.from_pretrained("some/model", device="cpu")
    assert asked == ["some/model"]


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(language_models, "HUB_PATIENCE", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: time.sleep(5))
    start = time.perf_counter()
    with pytest.raises(ModelNotFoundError, match="no answer in 0.2 seconds"):
        check_model("some/model")
    assert time.perf_counter() - start < 4


# --- nothing that comes with a model is run, and nothing that it lacks is made up


def test_code_of_a_model_is_never_run(tmp_path, monkeypatch):
    folder = Path(saved(toy_model(), tmp_path / "model"))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    about = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.Tok", None]}
    (folder / "config.json").write_text(json.dumps(about | {"model_type": "mine", "auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(ModelNotFoundError, match="asks to run code of its own, which is never done here"):
        LanguageModel.from_pretrained(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_every_loader_is_told_to_trust_nothing(tmp_path, monkeypatch):
    told = []
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM):

        def noted(*args, real=kind.from_pretrained, **options):
            told.append(options["trust_remote_code"])
            return real(*args, **options)

        monkeypatch.setattr(kind, "from_pretrained", noted)
    LanguageModel.from_pretrained(saved(toy_model(), tmp_path), device="cpu")
    assert len(told) >= 3 and not any(told)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_among_the_weights_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(saved(toy_model(), tmp_path / "model"))
    torch.save({**load_file(folder / "model.safetensors"), "x": Hostile()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="nothing in it was run"):
        LanguageModel.from_pretrained(folder, device="cpu")
    assert not Path("ran").exists()


def changed(folder, change):
    "The weights of a saved model, changed."
    weights = change({name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_a_checkpoint_lacks_are_named(tmp_path):
    folder = Path(saved(toy_model(), tmp_path / "model"))
    changed(folder, lambda weights: {name: w for name, w in weights.items() if "h.2.mlp" not in name})
    with pytest.raises(LanguageModelError, match="no weights for transformer.h.2.mlp.c_fc.bias and 3 more$"):
        LanguageModel.from_pretrained(folder, device="cpu")


def test_weights_of_another_shape_are_named(tmp_path):
    folder = Path(saved(toy_model(), tmp_path / "model"))
    changed(folder, lambda weights: weights | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(3, 3)})
    with pytest.raises(LanguageModelError, match=r"c_fc.weight has the shape \(3, 3\) in the checkpoint, and \(16, 24"):
        LanguageModel.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("make", [toy_model, toy_encoder_decoder, lambda: toy_encoder_decoder(kind="bart")])
def test_tied_weights_are_not_missing(tmp_path, make):
    folder = saved(make(), tmp_path / "model")
    tied = set(make().model.state_dict()) - set(load_file(Path(folder) / "model.safetensors"))
    assert tied and LanguageModel.from_pretrained(folder, device="cpu")


DAMAGE = {
    "cut": ("model.safetensors", lambda old: old[: len(old) // 2]),
    "empty": ("model.safetensors", lambda old: b""),
    "no numbers": ("config.json", lambda old: old.replace(b'"n_layer": 3', b'"n_layer": "three"')),
    "no heads": ("config.json", lambda old: old.replace(b'"n_head": 2', b'"n_head": 0')),
    "no JSON": ("config.json", lambda old: b"{"),
    "no dictionary": ("tokenizer.json", lambda old: b"[]"),
    "no tokenizer": ("tokenizer.json", lambda old: old.replace(b'"WordLevel"', b'"Nothing"')),
    "deep": ("tokenizer_config.json", lambda old: b"[" * 100_000),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_model_is_one_sentence(tmp_path, what):
    name, damage = DAMAGE[what]
    path = Path(saved(toy_model(), tmp_path / "model")) / name
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    with pytest.raises(ModelNotFoundError, match="model' cannot be loaded: ") as caught:
        LanguageModel.from_pretrained(path.parent, device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    toy_model().model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelNotFoundError, match="cannot be loaded: its tokenizer has no vocabulary"):
        LanguageModel.from_pretrained(tmp_path / "model", device="cpu")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelNotFoundError, match="is no folder"):
        check_model(str(tmp_path / "pipe"))
    folder = saved(toy_model(), tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "merges.txt")
    with pytest.raises(ModelNotFoundError, match="merges.txt is no ordinary file"):
        LanguageModel.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_names_that_no_disk_takes(name):
    with pytest.raises(ModelNotFoundError, match="no model on the hub can have that name") as caught:
        LanguageModel.from_pretrained(name, device="cpu")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["gpu", "meta", "", "cuda:99", "cpu:x", "hpu"])
def test_a_device_that_is_not_here_is_found_before_anything_is_read(name, monkeypatch):
    monkeypatch.setattr(language_models, "_folder_of", lambda name: pytest.fail("the model was looked for"))
    with pytest.raises(LanguageModelError, match=f"there is no device {name!r} here; there is: cpu"):
        LanguageModel.from_pretrained("some/model", device=name)


def test_the_device_is_the_accelerator_if_there_is_one():
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device(torch.device("cpu")) == find_device("cpu") == torch.device("cpu")
