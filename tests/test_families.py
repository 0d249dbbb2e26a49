"""Every family goes the whole way: shifts, both editors, Algorithm 2 and the scores, with no word of it their own."""

import copy

import pytest
import torch

from malmen_repro.editors import MALMEN, MEND, EditorConfig
from malmen_repro.evaluation import evaluate, predict
from malmen_repro.keys_and_gradients import fine_tuning_loss
from malmen_repro.training import Curriculum, TrainingConfig, cache_tokens, meta_gradient, meta_loss_terms, train
from malmen_repro.weight_shifts import WeightShift, overlaid
from tests.toy import toy_claims, toy_classifier, toy_encoder_decoder, toy_facts, toy_model

CONFIG = EditorConfig(rank=4, learning_rate=0.1, seed=1)
KINDS = ["gpt2", "bert", "t5", "bart"]


def toy(kind, dtype=torch.float32, **options):
    """A toy model of a family and facts for it."""
    if kind == "gpt2":
        return toy_model(dtype, **options), toy_facts(9)
    if kind == "bert":
        return toy_classifier(dtype, **options), toy_claims(9)
    return toy_encoder_decoder(dtype, kind=kind, **options), toy_facts(9)


@pytest.fixture(scope="module", params=KINDS)
def exact(request):
    """In float64."""
    return toy(request.param, torch.float64)


def ready(lm, facts, method=MALMEN, config=CONFIG):
    """An editor in the model's precision whose normalisers have seen something and whose networks do something."""
    editor = method(lm, config)
    editor.networks.to(lm.dtype)
    editor.observe(facts)
    torch.manual_seed(2)
    for network in editor.networks.values():
        for name, parameter in network.named_parameters():
            if not name.startswith("log_"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return editor


def answers(lm, facts):
    """The logits at the answer positions."""
    (batch,) = lm.batches([fact.pair for fact in facts])
    return lm.answer_logits(batch)


def test_a_shift_switches_on_and_off_exactly_and_merges(exact):
    lm, facts = exact
    shift = WeightShift({name: 0.1 * torch.randn(shape).double() for name, shape in lm.shapes.items()})
    before = answers(lm, facts)
    with shift.applied(lm):
        on = answers(lm, facts)
    assert torch.equal(answers(lm, facts), before) and not torch.allclose(on, before)
    merged = copy.deepcopy(lm)
    shift.merge_into(merged.model)
    torch.testing.assert_close(answers(merged, facts), on, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("method", [MEND, MALMEN])
def test_the_shift_does_not_depend_on_the_cut(exact, method, tokens):
    lm, facts = exact
    editor = ready(lm, facts, method, EditorConfig(rank=4, learning_rate=0.1, seed=1, tokens=tokens))
    whole = editor.edit(facts, batch_size=100)
    assert set(whole.shifts) == set(lm.layers) and all(shift.abs().max() > 0 for shift in whole.shifts.values())
    for batch_size in (1, 2, 4):
        cut = editor.edit(facts, batch_size=batch_size)
        torch.testing.assert_close(cut.shifts, whole.shifts, rtol=1e-7, atol=1e-10)


def test_a_small_step_along_an_edit_lowers_its_loss(exact):
    lm, facts = exact
    editor = ready(lm, facts, MEND, EditorConfig(rank=4, learning_rate=1e-5))
    (batch,) = lm.batches([fact.pair for fact in facts])
    before = fine_tuning_loss(lm.answer_logits(batch), batch)
    plain = MEND(lm, EditorConfig(rank=4, learning_rate=1e-5))
    plain.networks.to(lm.dtype), plain.observe(facts)
    with plain.edit(facts).applied(lm):
        assert fine_tuning_loss(lm.answer_logits(batch), batch) < before
    assert editor.edit(facts).shifts.keys() == lm.layers.keys()


@pytest.mark.parametrize("method", [MEND, MALMEN])
def test_the_split_meta_gradient_does_not_depend_on_the_cut(exact, method):
    lm, facts = exact
    found = []
    for rows, tokens in ((100, 4096), (2, 3)):
        editor = ready(lm, facts, method)
        config = TrainingConfig(num_facts=len(facts), lm_batch_size=rows, network_batch_size=tokens)
        losses = meta_gradient(editor, Curriculum(lm, facts, config).block(0), config, update_moments=False)
        found.append((losses, {name: p.grad for name, p in editor.networks.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
    # MEND has no normal equation, so nothing moves its lambda.
    moved = [g for name, g in found[0][1].items() if method is MALMEN or not name.endswith("regularization")]
    assert all(gradient.abs().max() > 0 for gradient in moved)


def test_the_meta_gradient_is_that_of_end_to_end_autograd(exact):
    lm, facts = exact
    editor = ready(lm, facts)
    config = TrainingConfig(num_facts=len(facts), locality_coefficient=0.7)
    block = Curriculum(lm, facts, config).block(0)
    meta_gradient(editor, block, config, update_moments=False)
    shifts = {}
    for layer, cached in cache_tokens(editor, block.edits, 64).items():
        gram = cached.keys.T @ cached.keys + editor.regularization(layer) * torch.eye(cached.keys.shape[1]).double()
        shifts[layer] = torch.linalg.solve(gram, cached.keys.T @ editor.outputs(layer, cached)).T
    loss = sum(term for _, term in meta_loss_terms(lm, shifts, block, 0.7, 64))
    expected = torch.autograd.grad(loss, editor.parameters())
    # T5 normalises in float32, whatever its precision.
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if lm.model.config.model_type == "t5" else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close([p.grad for p in editor.parameters()], list(expected), **tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [MEND, MALMEN])
def test_training_and_scores(kind, method):
    lm, facts = toy(kind)
    editor = method(lm, CONFIG)
    options = {"meta_learning_rate": 1e-3, "tuned_start": True, "progress": False}
    history = train(editor, facts, num_facts=4, steps=3, **options)
    assert len(history) == 3 and all(record["norm"] > 0 for record in history)
    scores = evaluate(lm, facts, editor.edit(facts))
    assert all(0 <= scores.mean(name) <= 1 for name in ("ES", "GS", "LS", "ES before", "LS agreement"))
    nothing = WeightShift({name: torch.zeros(shape) for name, shape in lm.shapes.items()})
    untouched = evaluate(lm, facts, nothing)
    assert untouched.mean("LS agreement") == 1 and untouched.mean("ES") == untouched.mean("ES before")


def test_an_edit_of_a_classifier_flips_its_labels():
    lm, facts = toy("bert")
    said = predict(lm, facts)[0].edits
    flipped = [
        type(fact)(fact.prompt, lm.model.config.id2label[1 - label[0]]) for fact, label in zip(facts, said, strict=True)
    ]
    editor = MALMEN(lm, CONFIG)
    rates = {"meta_learning_rate": 1e-2, "scalar_learning_rate": 0.1, "tuned_start": True}
    train(editor, flipped, num_facts=9, steps=25, locality_coefficient=0.0, progress=False, **rates)
    scores = evaluate(lm, flipped, editor.edit(flipped))
    assert scores.mean("ES before") == 0 and scores.mean("ES") > 0.5
    assert set(scores.values["ES"]) <= {0, 1}  # one label a claim: each is right or wrong


def test_an_edit_of_the_encoder_alone_changes_what_the_decoder_writes():
    lm, facts = toy("t5", torch.float64, layers="encoder.block.*.layer.1.DenseReluDense.wo")
    shift = ready(lm, facts).edit(facts)
    before = answers(lm, facts)
    with overlaid(lm, shift.shifts):
        assert not torch.allclose(answers(lm, facts), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_editor_is_saved_and_loaded(kind, tmp_path):
    lm, facts = toy(kind)
    editor = ready(lm, facts)
    editor.save_pretrained(tmp_path)
    again = MALMEN.from_pretrained(tmp_path, lm)
    torch.testing.assert_close(again.edit(facts).shifts, editor.edit(facts).shifts)
