"Algorithm 1: the efficient forms are the naive ones, nothing depends on the cuts, editors survive as files."

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.normalizers import Replace

from malmen_repro.editors import MALMEN, MEND, EditorConfig, EditorModelMismatchError, UntrainedEditorError
from malmen_repro.facts import ConflictingFactsError, NoFactsError
from malmen_repro.keys_and_gradients import capture
from malmen_repro.language_models import ContextLengthError, EmptyAnswerError
from malmen_repro.protocol import EditorError
from malmen_repro.weight_shifts import NonFiniteShiftError, check_finite
from tests.test_training import make_editor
from tests.toy import toy_facts, toy_model


@pytest.fixture(params=[MEND, MALMEN], ids=lambda kind: kind.method)
def editor(request):
    "An editor off its starting point, with moments."
    editor = make_editor(request.param, torch.float32)
    editor.observe(toy_facts(20))
    return editor


def naive_shift(editor, layer, cached):
    "Algorithm 1 as it is written: a shift a token, then the sum or the least squares, in float64."
    pseudo = editor.networks.pseudo(layer, cached)
    shifts = -editor.learning_rate(layer) * pseudo.value_gradients[:, :, None] * pseudo.keys[:, None, :]
    shifts, keys = shifts.double(), cached.keys.double()
    if editor.method == "MEND":
        return shifts.sum(0)
    differences = torch.einsum("nvk,nk->nv", shifts, keys)
    gram = keys.T @ keys + editor.regularization(layer).double() * torch.eye(keys.shape[1])
    return differences.T @ keys @ torch.linalg.inv(gram)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_edit_is_algorithm_1(editor, count):
    facts = toy_facts(count)
    (batch,) = editor.lm.batches([fact.pair for fact in facts], 100)
    with torch.no_grad():
        wanted = {layer: naive_shift(editor, layer, cached) for layer, cached in capture(editor.lm, batch).items()}
    shift = editor.edit(facts)
    assert shift.metadata["method"] == editor.method and shift.metadata["facts"] == count
    for layer, value in wanted.items():
        assert shift.shifts[layer].dtype == torch.float32 and shift.shifts[layer].shape == editor.lm.shapes[layer]
        assert torch.allclose(shift.shifts[layer].double(), value, rtol=1e-4, atol=1e-5 * value.abs().max())


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_the_shift_does_not_depend_on_the_batch_size_or_the_order(editor, batch_size):
    facts = toy_facts(33)
    whole, cut = editor.edit(facts, batch_size=1000), editor.edit(facts[::-1], batch_size=batch_size)
    for layer, shift in whole.shifts.items():
        assert (cut.shifts[layer] - shift).norm() <= 1e-4 * shift.norm()


def test_editing_leaves_the_model_alone(editor):
    before = {name: p.clone() for name, p in editor.lm.model.named_parameters()}
    with editor.edit(toy_facts(3)).applied(editor.lm):
        pass
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in editor.lm.model.named_parameters())


def test_layers_of_one_shape_share_a_network_and_others_do_not():
    lm = toy_model(layers=["transformer.h.*.mlp.c_proj", "transformer.h.*.mlp.c_fc"], last=2)
    editor = MALMEN(lm, EditorConfig(rank=4))
    assert sorted(editor.networks) == ["16x24", "24x16"]
    (one, i), (other, j) = (
        editor.networks.of("transformer.h.1.mlp.c_proj"),
        editor.networks.of("transformer.h.2.mlp.c_proj"),
    )
    assert one is other and (i, j) == (0, 1)
    assert editor.networks.of("transformer.h.1.mlp.c_fc")[0] is not one
    editor.observe(toy_facts(4))
    assert set(editor.edit(toy_facts(4)).shifts) == set(lm.layers)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, other = (MALMEN(toy_model(), EditorConfig(rank=4, seed=s)).networks.state_dict() for s in (1, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = MALMEN(toy_model(), EditorConfig(rank=4, seed=2)).networks.state_dict()
    assert any(not torch.equal(one[name], different[name]) for name in one)
    del state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_precision_models(dtype):
    editor = MALMEN(toy_model(dtype), EditorConfig(rank=4, learning_rate=1e-2))
    facts = toy_facts(5)
    editor.train(facts, steps=2, num_facts=3, progress=False)
    shift = editor.edit(facts)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for tensor in shift.shifts.values()} == {wanted}


def test_all_tokens_can_be_cached():
    editor = MALMEN(toy_model(), EditorConfig(rank=4, tokens="all"))
    facts = toy_facts(4)
    editor.observe(facts)
    read = sum(editor.lm.family.length(pair) for pair in editor.lm.encode([fact.pair for fact in facts]))
    assert all((network.keys.count == read).all() for network in editor.networks.values())


def test_bad_input_is_refused(editor):
    facts = toy_facts(3)
    with pytest.raises(NoFactsError):
        editor.edit([])
    with pytest.raises(ConflictingFactsError):
        editor.edit([*facts, replace(facts[0], answer="w1 w1 w1 w1")])
    with pytest.raises(ContextLengthError):
        editor.edit([*facts, replace(facts[0], prompt=" ".join(["w1"] * 30))])
    with pytest.raises(UntrainedEditorError):
        type(editor)(editor.lm, editor.config).edit(facts)
    with pytest.raises(NonFiniteShiftError, match="some.layer"):
        check_finite({"some.layer": torch.tensor([[float("nan")]])})


def test_an_answer_that_tokenises_to_nothing_is_named(editor):
    editor.lm.tokenizer.backend_tokenizer.normalizer = Replace("silence", "")
    with pytest.raises(EmptyAnswerError, match="'silence'.*tokenises to nothing"):
        editor.edit([replace(toy_facts(1)[0], answer="silence")])


def test_round_trip_as_files(editor, tmp_path):
    editor.save_pretrained(tmp_path / "deep" / "editor")
    again = type(editor).from_pretrained(tmp_path / "deep" / "editor", toy_model())
    facts = toy_facts(9)
    one, other = editor.edit(facts), again.edit(facts)
    assert again.config == editor.config
    for layer, shift in one.shifts.items():
        torch.testing.assert_close(other.shifts[layer], shift, rtol=1e-4, atol=1e-5)


def test_an_editor_for_another_model_or_method_or_a_damaged_one_is_refused(editor, tmp_path):
    editor.save_pretrained(tmp_path)
    with pytest.raises(EditorModelMismatchError, match="weights"):
        type(editor).from_pretrained(tmp_path, toy_model(seed=7))
    with pytest.raises(EditorModelMismatchError, match="edited layers"):
        type(editor).from_pretrained(tmp_path, toy_model(last=1))
    with pytest.raises(EditorModelMismatchError, match="shape"):
        type(editor).from_pretrained(tmp_path, toy_model(width=8))
    other = MEND if editor.method == "MALMEN" else MALMEN
    with pytest.raises(EditorError, match=editor.method):
        other.from_pretrained(tmp_path, editor.lm)
    type(editor).from_pretrained(tmp_path, toy_model(torch.bfloat16))  # another precision is the same model
    (tmp_path / "editor.safetensors").write_bytes(b"short")
    with pytest.raises(EditorError, match="no readable editor"):
        type(editor).from_pretrained(tmp_path, editor.lm)
    with pytest.raises(EditorError, match="no readable editor"):
        type(editor).from_pretrained(tmp_path / "nowhere", editor.lm)


# --- two files, one editor


def test_a_save_that_is_stopped_leaves_the_old_editor(editor, tmp_path, monkeypatch):
    editor.save_pretrained(tmp_path)
    old = {name: tensor.clone() for name, tensor in editor.networks.state_dict().items()}
    with torch.no_grad():
        next(iter(editor.parameters())).add_(1.0)
    real = Path.replace

    for moves in (0, 1, 2):  # of the weights, of the new description beside its place, of the description
        left = [moves]

        def stopping(self, target, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(self, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", stopping)
            editor.save_pretrained(tmp_path)
        found = type(editor).from_pretrained(tmp_path, toy_model()).networks.state_dict()
        new = editor.networks.state_dict()
        assert any(all(torch.equal(tensor, known[n]) for n, tensor in found.items()) for known in (old, new))


def test_an_editor_that_is_not_finite_is_not_saved(editor, tmp_path):
    with torch.no_grad():
        next(iter(editor.parameters())).view(-1)[0] = torch.nan
    with pytest.raises(EditorError, match="not made of finite numbers; nothing was written"):
        editor.save_pretrained(tmp_path / "editor")
    assert not list(tmp_path.iterdir())


def test_who_merged_an_edit_is_told_how_to_edit_again(editor, tmp_path):
    editor.save_pretrained(tmp_path)
    editor.edit(toy_facts(2)).merge_into(editor.lm)
    with pytest.raises(EditorModelMismatchError, match=r"unmerged.*--state DIR.*consecutive\(editor\) in Python"):
        type(editor).from_pretrained(tmp_path, editor.lm)


def test_an_editor_whose_weights_were_exchanged_is_refused(editor, tmp_path):
    editor.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        next(iter(editor.parameters())).add_(1.0)
    editor.save_pretrained(tmp_path / "other")
    (tmp_path / "one" / "editor.safetensors").write_bytes((tmp_path / "other" / "editor.safetensors").read_bytes())
    with pytest.raises(EditorError, match="do not belong together"):
        type(editor).from_pretrained(tmp_path / "one", toy_model())


def test_the_regularization_may_be_switched_off(tmp_path):
    editor = MALMEN(toy_model(), EditorConfig(rank=4, regularization=0.0))
    editor.observe(toy_facts(9))
    editor.save_pretrained(tmp_path)
    assert MALMEN.from_pretrained(tmp_path, toy_model()).regularization("transformer.h.1.mlp.c_proj") == 0
