"Key statistics: the definition, no dependence on cuts, and files that say whose they are."

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from malmen_repro.methods.key_statistics import (
    EmptyCorpusError,
    KeyStatistics,
    KeyStatisticsError,
    KeyStatisticsMismatchError,
    cached_key_statistics,
    key_statistics,
    keys_of,
    text_batches,
    until_seen,
)
from tests.toy import toy_facts, toy_model

TEXTS = [f"{fact.prompt} {fact.answer}" for fact in toy_facts(30)]


def definition(lm, texts):
    "One text after another through the whole model, all inputs of the layers kept."
    rows = {name: [] for name in lm.layers}
    handles = [
        layer.register_forward_hook(lambda _m, args, _o, name=name: rows[name].append(args[0][0].double()))
        for name, layer in lm.layers.items()
    ]
    with torch.no_grad():
        for text in texts:
            lm.model(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    keys = {name: torch.cat(parts) for name, parts in rows.items()}
    return {name: k.T @ k / len(k) for name, k in keys.items()}, len(next(iter(keys.values())))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("layers", [{"last": 1}, {"last": 3}, {"layers": "transformer.h.0.mlp.c_fc", "last": None}])
def test_it_is_the_mean_over_all_tokens(batch_size, layers):
    lm = toy_model(**layers)
    wanted, tokens = definition(lm, TEXTS)
    found = key_statistics(lm, iter(TEXTS), batch_size)
    assert found.tokens == tokens and list(found.second_moments) == list(lm.layers)
    for name, moment in found.second_moments.items():
        assert moment.dtype == torch.float64
        torch.testing.assert_close(moment, wanted[name], rtol=1e-5, atol=1e-7)


def test_the_vocabulary_and_the_blocks_above_are_never_reached():
    lm, calls = toy_model(layers="transformer.h.0.mlp.c_proj", last=None), []
    for name in ("transformer.h.1", "transformer.ln_f", "lm_head"):
        lm.model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    key_statistics(lm, TEXTS)
    assert calls == []


def test_no_hook_stays_behind_even_after_an_error():
    lm = toy_model()
    key_statistics(lm, TEXTS[:2])
    with pytest.raises(ZeroDivisionError), until_seen(lm.layers):
        raise ZeroDivisionError
    assert not any(layer._forward_hooks for layer in lm.layers.values())


def test_an_incomplete_pass_shows_what_it_saw():
    lm = toy_model(last=2)
    below = {"transformer.h.0": lm.model.transformer.h[0]}
    batch = next(text_batches(lm, TEXTS[:3], 3))
    with until_seen(below) as seen:
        lm.model(**batch.inputs)
    assert set(seen) == set(below) and seen["transformer.h.0"][1].shape == (*batch.answer_mask.shape, 16)


def test_long_texts_are_cut_and_empty_ones_left_out():
    lm = toy_model()
    long = " ".join(["w1"] * 100)
    assert key_statistics(lm, [long]).tokens == lm.context
    assert key_statistics(lm, [long, "", "w2"], length=5).tokens == 6
    one = key_statistics(lm, [" ".join(["w1"] * 5)])
    cut = key_statistics(lm, [long], length=5)
    for name in lm.layers:
        torch.testing.assert_close(one.second_moments[name], cut.second_moments[name])


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_corpus_without_tokens(texts):
    with pytest.raises(EmptyCorpusError, match=f"{len(texts)} texts and no token"):
        key_statistics(toy_model(), texts)


def test_half_precision_models_give_float64_sums():
    found = key_statistics(toy_model(torch.bfloat16), TEXTS)
    wanted, _ = definition(toy_model(), TEXTS)
    for name, moment in found.second_moments.items():
        assert moment.dtype == torch.float64 and (moment - wanted[name]).norm() < 0.05 * wanted[name].norm()


def test_keys_of_float64_models_are_never_rounded(tmp_path):
    lm = toy_model(torch.float64)
    found, (wanted, _) = key_statistics(lm, TEXTS), definition(lm, TEXTS)
    again = KeyStatistics.load(found.save(tmp_path / "fine.safetensors"))
    kept = cached_key_statistics(lm, TEXTS, tmp_path, "fine")
    for name, moment in found.second_moments.items():
        torch.testing.assert_close(moment, wanted[name], rtol=1e-13, atol=1e-15)
        assert torch.equal(again.second_moments[name], moment) and torch.equal(kept.second_moments[name], moment)
        assert (moment != moment.float().double()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_is_as_fine_as_the_model(tmp_path, dtype):
    path = key_statistics(toy_model(dtype), TEXTS).save(tmp_path / "statistics.safetensors")
    fine = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for tensor in load_file(path).values()} == {fine}


@pytest.mark.parametrize("model", [None, 3, {}, {"weights": None}, {"weights": ["float16"]}])
def test_a_file_of_an_unknown_model_is_float32(tmp_path, model):
    statistics = KeyStatistics({"a": torch.eye(2).double()}, 1, {"language_model": model})
    assert load_file(statistics.save(tmp_path / "a.safetensors"))["a"].dtype == torch.float32


def test_text_batches_mark_every_token_and_only_those():
    lm = toy_model()
    for batch in text_batches(lm, TEXTS, 7):
        assert torch.equal(batch.answer_mask, batch.inputs["attention_mask"].bool())
    assert sum(int(batch.answer_mask.sum()) for batch in text_batches(lm, TEXTS, 7)) == sum(
        len(text.split()) for text in TEXTS
    )


def test_keys_of_are_the_inputs_at_the_marked_positions():
    lm = toy_model()
    batch = next(lm.batches([fact.pair for fact in toy_facts(5)], 5))
    keys = keys_of(lm, batch)
    with torch.no_grad(), until_seen({"lm_head": lm.model.lm_head}), until_seen(lm.layers) as seen:
        lm.model(**batch.inputs)
    for name, passage in seen.items():
        assert torch.equal(keys[name], passage.entered[batch.answer_mask])


# --- files


def test_a_file_comes_back_with_its_provenance(tmp_path):
    lm = toy_model()
    statistics = key_statistics(lm, TEXTS, length=9)
    again = KeyStatistics.load(statistics.save(tmp_path / "deep" / "statistics.safetensors"))
    assert again.tokens == statistics.tokens and again.provenance == statistics.provenance
    assert again.provenance["texts"] == 30 and again.provenance["length"] == 9
    for name, moment in again.second_moments.items():
        torch.testing.assert_close(moment, statistics.second_moments[name], rtol=1e-6, atol=1e-7)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["statistics.safetensors"]


def test_files_that_are_none(tmp_path):
    with pytest.raises(KeyStatisticsError, match="no readable key statistics"):
        KeyStatistics.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("no")
    with pytest.raises(KeyStatisticsError, match="no readable key statistics"):
        KeyStatistics.load(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(KeyStatisticsError, match="holds no key statistics"):
        KeyStatistics.load(tmp_path / "other")


def test_statistics_of_another_model_or_layer_are_refused():
    lm = toy_model(last=2)
    statistics = key_statistics(lm, TEXTS)
    statistics.check_fits(lm)
    statistics.check_fits(toy_model(last=1))  # some of its layers
    statistics.check_fits(toy_model(torch.bfloat16, last=2))  # the same model in another precision
    with pytest.raises(KeyStatisticsMismatchError, match=r"layer transformer.h.0.mlp.c_proj, only of: transformer.h.1"):
        statistics.check_fits(toy_model(last=3))
    with pytest.raises(KeyStatisticsMismatchError, match="another language model: its weights differ"):
        statistics.check_fits(toy_model(last=2, seed=1))
    with pytest.raises(KeyStatisticsMismatchError, match="another language model"):
        KeyStatistics(statistics.second_moments, 3).check_fits(lm)


def test_a_folder_keeps_them_and_tells_models_apart(tmp_path, monkeypatch):
    lm = toy_model()
    first = cached_key_statistics(lm, TEXTS, tmp_path, "toy")
    assert json.loads(json.dumps(first.provenance))["texts"] == 30
    with monkeypatch.context() as patch:
        patch.setattr("malmen_repro.methods.key_statistics.key_statistics", None)  # the model reads nothing
        again = cached_key_statistics(lm, iter(TEXTS), tmp_path, "toy")
    assert all(torch.equal(m, again.second_moments[name]) for name, m in first.second_moments.items())
    with pytest.raises(EmptyCorpusError):
        cached_key_statistics(lm, [], tmp_path, "another")
    with pytest.raises(EmptyCorpusError):
        cached_key_statistics(lm, [], tmp_path, "toy", length=3)
    with pytest.raises(EmptyCorpusError):
        cached_key_statistics(toy_model(seed=5), [], tmp_path, "toy")
    assert len(list(tmp_path.iterdir())) == 1


def test_other_texts_of_the_same_name_have_statistics_of_their_own(tmp_path):
    lm = toy_model()
    one, other = (cached_key_statistics(lm, texts, tmp_path, "toy") for texts in (TEXTS, TEXTS[:-1]))
    assert one.provenance["texts"] == other.provenance["texts"] + 1 and len(list(tmp_path.iterdir())) == 2
    (path,) = [path for path in tmp_path.iterdir() if KeyStatistics.load(path).provenance["texts"] == len(TEXTS)]
    other.save(path)
    with pytest.raises(KeyStatisticsMismatchError, match=f"another corpus; remove {path}"):
        cached_key_statistics(lm, TEXTS, tmp_path, "toy")


def test_a_damaged_file_of_the_cache_is_never_made_anew_in_silence(tmp_path):
    lm = toy_model()
    cached_key_statistics(lm, TEXTS, tmp_path, "toy")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(KeyStatisticsError, match=f"remove {path}"):
        cached_key_statistics(lm, TEXTS, tmp_path, "toy")
    path.unlink()
    assert cached_key_statistics(lm, TEXTS, tmp_path, "toy").tokens and path.exists()


def test_keys_that_are_not_finite_make_no_statistics(tmp_path):
    lm = toy_model()
    next(iter(lm.model.parameters())).data.fill_(torch.nan)
    with pytest.raises(KeyStatisticsError, match="not finite"):
        cached_key_statistics(lm, TEXTS, tmp_path, "toy")
    assert not list(tmp_path.iterdir())


def test_the_model_stays_as_it_is():
    lm = toy_model()
    before = copy.deepcopy(lm.model.state_dict())
    key_statistics(lm, TEXTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
