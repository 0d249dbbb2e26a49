"""Language models from a folder or from the hub."""

import pytest
import torch
import transformers

from malmen_repro import language_models
from malmen_repro.facts import MalmenError
from malmen_repro.language_models import LanguageModel, ModelNotFoundError, check_model, module_hash
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
