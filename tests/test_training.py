"Algorithm 2: the split meta-gradient is the end-to-end one under every cut; runs stop, continue and fail cleanly."

import math
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from malmen_repro import training
from malmen_repro.editors import MALMEN, MEND, EditorConfig
from malmen_repro.facts import ConflictingFactsError, NoFactsError
from malmen_repro.files import FileError
from malmen_repro.keys_and_gradients import NonFiniteGradientError, fine_tuning_loss
from malmen_repro.normal_equation import aggregate
from malmen_repro.training import (
    Curriculum,
    NonFiniteMetaGradientError,
    TrainingConfig,
    TrainingError,
    cache_tokens,
    meta_gradient,
    schedule,
    train,
    tune_learning_rate,
)
from malmen_repro.weight_shifts import overlaid
from tests.toy import toy_facts, toy_model

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
CUTS = [(1, 1), (3, 7), (5, 1000), (100, 4)]


def make_editor(kind, dtype, *, config=None, disturb=True):
    "An editor in a dtype, away from its starting point so that no gradient vanishes by construction."
    lm = toy_model(dtype)
    editor = kind(lm, config or EditorConfig(rank=5, learning_rate=0.3, regularization=0.7))
    editor.networks.to(dtype)
    if disturb:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in editor.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return editor


def concatenated_gradient(editor, block, config):
    "Fig. 1: one graph through hyper-network, normal equation and language model."
    lm = editor.lm
    cached = cache_tokens(editor, block.edits, 1000)
    editor.update_moments(cached)
    shifts = {}
    for layer, tokens in cached.items():
        outputs = editor.outputs(layer, tokens)
        summed = editor.method == "MEND"
        shifts[layer] = outputs if summed else aggregate(tokens.keys, outputs, editor.regularization(layer))
    loss = 0.0
    for pair in block.equivalent:
        (batch,) = lm.batches([pair])
        with overlaid(lm, shifts):
            loss = loss + fine_tuning_loss(lm.answer_logits(batch), batch) / len(block.equivalent)
    for pair in block.unrelated:
        (batch,) = lm.batches([pair])
        before = lm.answer_logits(batch).log_softmax(-1)
        with overlaid(lm, shifts):
            after = lm.answer_logits(batch).log_softmax(-1)
        divergence = (before.exp() * (before - after)).sum()
        loss = loss + config.locality_coefficient * divergence / len(block.unrelated)
    loss.backward()
    return loss.item(), named_gradients(editor)


def named_gradients(editor):
    "Gradients by name; they are taken away from the parameters."
    found = {name: p.grad.clone() for name, p in editor.networks.named_parameters() if p.grad is not None}
    editor.networks.zero_grad()
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", [MEND, MALMEN])
@pytest.mark.parametrize("num_facts", [3, 17])  # fewer and more tokens than the keys' size: dual and primal form
def test_split_gradient_is_the_end_to_end_gradient(kind, dtype, num_facts):
    config = TrainingConfig(num_facts=num_facts, locality_coefficient=0.8)
    block = Curriculum(toy_model(dtype), toy_facts(num_facts), config).block(0)
    loss, wanted = concatenated_gradient(make_editor(kind, dtype), block, config)
    for lm_batch_size, network_batch_size in CUTS:
        editor = make_editor(kind, dtype)
        cut = replace(config, lm_batch_size=lm_batch_size, network_batch_size=network_batch_size)
        losses = meta_gradient(editor, block, cut)
        assert math.isclose(sum(losses.values()), loss, rel_tol=10 * TOLERANCE[dtype])
        gradients = named_gradients(editor)
        assert gradients.keys() == wanted.keys()
        assert any("log_regularization" in name for name in gradients) == (kind is MALMEN)
        for name, gradient in gradients.items():
            error = (gradient - wanted[name]).norm() / wanted[name].norm()
            assert error <= TOLERANCE[dtype], (name, lm_batch_size, network_batch_size)


def test_blocks_cover_every_fact_once_an_epoch_and_keep_the_small_last_one():
    lm, facts = toy_model(), toy_facts(10)
    config = TrainingConfig(num_facts=4, seed=3)
    curriculum = Curriculum(lm, facts, config)
    sizes = [len(curriculum.block(step).edits) for step in range(6)]
    assert sizes == [4, 4, 2, 4, 4, 2]
    seen = [pair for step in range(3) for pair in curriculum.block(step).edits]
    assert sorted(seen) == sorted(lm.encode([fact.pair for fact in facts]))
    assert curriculum.block(0).edits != curriculum.block(3).edits
    assert Curriculum(lm, facts, config).block(5) == curriculum.block(5)
    assert len(Curriculum(lm, facts, replace(config, num_facts=100)).block(7).edits) == 10


def test_a_ramp_begins_with_smaller_blocks():
    curriculum = Curriculum(toy_model(), toy_facts(10), TrainingConfig(num_facts=6, ramp_facts=2, ramp_steps=3))
    assert [len(curriculum.block(step).edits) for step in range(6)] == [2, 2, 2, 6, 4, 6]


def test_facts_without_phrasings_or_unrelated_tuples_can_be_trained_on():
    facts = [
        replace(fact, equivalent_prompts=(), unrelated_prompt=None, unrelated_answer=None) for fact in toy_facts(4)
    ]
    editor = make_editor(MALMEN, torch.float32, disturb=False)
    history = train(editor, facts, steps=2, num_facts=2, progress=False)
    assert [record["locality"] for record in history] == [0.0, 0.0]
    assert all(record["generalization"] > 0 and record["norm"] > 0 for record in history)


@pytest.mark.parametrize("kind", [MEND, MALMEN])
def test_training_lowers_the_meta_loss(kind):
    editor = make_editor(kind, torch.float32, config=EditorConfig(rank=8, learning_rate=1e-3), disturb=False)
    history = train(
        editor, toy_facts(8), steps=40, num_facts=8, meta_learning_rate=1e-2, locality_coefficient=0.1, progress=False
    )
    first, last = (sum(r["generalization"] for r in part) for part in (history[:5], history[-5:]))
    assert last < 0.8 * first


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path):
    options = dict(num_facts=3, meta_learning_rate=1e-2, warmup=2, decay=True, progress=False)
    whole, parts = make_editor(MALMEN, torch.float32), make_editor(MALMEN, torch.float32)
    train(whole, toy_facts(7), TrainingConfig(steps=6), **options)
    config = TrainingConfig(steps=6, **{k: v for k, v in options.items() if k != "progress"})
    stopped = make_editor(MALMEN, torch.float32)
    calls = []

    def stop_after_four(*args, **kwargs):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return meta_gradient(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("malmen_repro.training.meta_gradient", stop_after_four)
        train(stopped, toy_facts(7), config, checkpoint=tmp_path / "run" / "c.pt", checkpoint_every=2, progress=False)
    history = train(parts, toy_facts(7), config, checkpoint=tmp_path / "run" / "c.pt", progress=False)
    assert [record["step"] for record in history] == list(range(6))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    for (name, one), other in zip(whole.networks.named_buffers(), parts.networks.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    train(make_editor(MALMEN, torch.float32), toy_facts(4), steps=1, num_facts=2, checkpoint=path, progress=False)
    with pytest.raises(TrainingError, match="num_facts"):
        train(make_editor(MALMEN, torch.float32), toy_facts(4), steps=2, num_facts=3, checkpoint=path, progress=False)
    with pytest.raises(TrainingError, match="method"):
        train(make_editor(MEND, torch.float32), toy_facts(4), steps=2, num_facts=2, checkpoint=path, progress=False)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match="damaged"):
        train(make_editor(MALMEN, torch.float32), toy_facts(4), steps=2, num_facts=2, checkpoint=path, progress=False)


def test_bad_input_is_refused_before_anything_runs():
    editor = make_editor(MALMEN, torch.float32, disturb=False)
    with pytest.raises(NoFactsError):
        train(editor, [], steps=1, progress=False)
    facts = toy_facts(2)
    with pytest.raises(ConflictingFactsError):
        train(editor, [*facts, replace(facts[0], answer="w59 w58 w57")], steps=1, progress=False)
    with pytest.raises(TypeError, match="num_fact"):
        train(editor, facts, num_fact=1)
    assert not editor.has_moments


def test_a_meta_gradient_that_is_not_finite_names_the_parameter_and_changes_nothing():
    editor = make_editor(MALMEN, torch.float32)
    before = [p.clone() for p in editor.parameters()]

    def poisoned(editor, *args, **kwargs):
        losses = meta_gradient(editor, *args, **kwargs)
        editor.parameters()[-1].grad.fill_(math.nan)
        return losses

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(NonFiniteMetaGradientError, match="up|down|bias|scale|offset|log"),
    ):
        patch.setattr("malmen_repro.training.meta_gradient", poisoned)
        train(editor, toy_facts(3), steps=1, num_facts=3, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(before, editor.parameters(), strict=True))


def test_moments_see_every_token_of_training_and_none_of_editing():
    editor = make_editor(MALMEN, torch.float32, disturb=False)
    facts = toy_facts(6)
    train(editor, facts, steps=2, num_facts=3, tuned_start=False, progress=False)
    tokens = sum(len(pair.answer) for pair in editor.lm.encode([fact.pair for fact in facts]))
    counts = [network.keys.count.clone() for network in editor.networks.values()]
    assert all((count == tokens).all() for count in counts)
    editor.edit(facts)
    assert all(
        torch.equal(network.keys.count, count) for network, count in zip(editor.networks.values(), counts, strict=True)
    )


@pytest.mark.parametrize("kind", [MEND, MALMEN])
def test_the_tuned_learning_rate_is_the_best_candidate(kind):
    editor = make_editor(kind, torch.float32, disturb=False)
    facts, rates = toy_facts(8), (1e-6, 1e-3, 1e-2, 1e3)
    best = tune_learning_rate(editor, facts, candidates=rates, num_facts=8)
    losses = {}
    block = Curriculum(editor.lm, facts, TrainingConfig(num_facts=8)).block(0)
    for rate in rates:
        for network in editor.networks.values():
            network.log_learning_rate.data.fill_(math.log(rate))
        losses[rate] = sum(meta_gradient(editor, block, TrainingConfig(num_facts=8), update_moments=False).values())
    assert best == min(losses, key=losses.get)


# --- stopped, killed, and gone wrong


FAST = dict(num_facts=3, meta_learning_rate=1e-2, warmup=2, decay=True, progress=False)


def bits(editor):
    "All that a training changes."
    return {name: tensor.clone() for name, tensor in editor.networks.state_dict().items()}


def same_bits(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def straight(steps=5):
    "A run that nothing stops."
    editor = make_editor(MALMEN, torch.float32)
    return bits(editor), train(editor, toy_facts(7), steps=steps, **FAST), bits(editor)


def without_seconds(history):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


@pytest.mark.parametrize("place", ["infer", "meta_loss", "backpropagate", "adam_step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_is_stopped_anywhere_leaves_the_last_whole_one(tmp_path, monkeypatch, place, error):
    _, expected, end = straight()
    editor, real, calls = make_editor(MALMEN, torch.float32), getattr(training, place), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            real(*args, **kwargs) if place == "backpropagate" else None
            raise error("stop")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(error, match="stop"):
        patch.setattr(training, place, stopping)
        train(editor, toy_facts(7), steps=5, checkpoint=tmp_path / "c.pt", **FAST)
    for again in (make_editor(MALMEN, torch.float32), editor):  # in another process, or in the same notebook
        history = train(again, toy_facts(7), steps=5, checkpoint=tmp_path / "c.pt", **FAST)
        assert without_seconds(history) == without_seconds(expected) and same_bits(bits(again), end)


@pytest.fixture
def ctrl_c():
    "Ctrl-C as on a terminal: a process that a shell started in the background is deaf to it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_within_adam_waits_until_the_step_is_whole(tmp_path, monkeypatch):
    real, handlers = torch.optim.Adam.step, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def pressed(self, *args):
        signal.raise_signal(signal.SIGINT)
        result = real(self, *args)
        signal.raise_signal(signal.SIGINT)
        return result

    editor, (_, expected, end) = make_editor(MALMEN, torch.float32), straight(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.Adam, "step", pressed)
        train(editor, toy_facts(7), steps=1, checkpoint=tmp_path / "c.pt", **FAST)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    history = train(make_editor(MALMEN, torch.float32), toy_facts(7), steps=1, checkpoint=tmp_path / "c.pt", **FAST)
    assert without_seconds(history) == without_seconds(expected) and same_bits(bits(editor), end)


def test_a_thread_can_train():
    found = []
    thread = threading.Thread(target=lambda: found.append(straight(1)[1]))
    thread.start()
    thread.join()
    assert without_seconds(found[0]) == without_seconds(straight(1)[1])


def test_a_training_killed_while_it_writes_goes_on_with_the_same_bits(tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
from malmen_repro import training
from tests.test_training import FAST, MALMEN, make_editor, toy_facts, torch
real, left = getattr(os, sys.argv[1]), [int(sys.argv[2])]
def killing(*args, **kwargs):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(os, sys.argv[1], killing)
torch.set_num_threads(1)
training.train(make_editor(MALMEN, torch.float32), toy_facts(7), steps=5, checkpoint={str(tmp_path / "c.pt")!r},
               checkpoint_every=1, **FAST)
"""
    _, expected, end = straight()
    run = subprocess.run([sys.executable, "-c", code, "replace", "3"], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(torch.load(tmp_path / "c.pt", weights_only=True)["history"]) == 2  # the third write was cut off
    editor = make_editor(MALMEN, torch.float32)
    history = train(editor, toy_facts(7), steps=5, checkpoint=tmp_path / "c.pt", **FAST)
    assert without_seconds(history) == without_seconds(expected) and same_bits(bits(editor), end)


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    path, editor = tmp_path / "c.pt", make_editor(MALMEN, torch.float32)
    train(editor, toy_facts(7), steps=2, checkpoint=path, **FAST)
    whole = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    def stopping(config, step):
        if step == 3:
            raise KeyboardInterrupt
        return schedule(config, step)

    with monkeypatch.context() as patch, pytest.raises(FileError, match="c.pt cannot be written: No space left"):
        patch.setattr(torch, "save", full)
        train(editor, toy_facts(7), steps=3, checkpoint=path, **FAST)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", full)
        patch.setattr(training, "schedule", stopping)
        with pytest.warns(UserWarning, match="steps since the last checkpoint are lost"):
            train(editor, toy_facts(7), steps=5, checkpoint=path, **FAST)
    assert path.read_bytes() == whole


def test_a_step_that_could_leave_a_parameters_range_is_not_taken(tmp_path):
    editor = make_editor(MALMEN, torch.float32)
    train(editor, toy_facts(7), steps=2, checkpoint=tmp_path / "c.pt", **FAST)
    before, state = bits(editor), (tmp_path / "c.pt").read_bytes()
    with pytest.raises(NonFiniteMetaGradientError, match="step 0: .* could make .* not finite: try lower rates"):
        train(editor, toy_facts(7), steps=1, **{**FAST, "meta_learning_rate": 1e38})
    assert same_bits(bits(editor), before) and (tmp_path / "c.pt").read_bytes() == state


def test_a_loss_that_is_not_finite_names_the_step(monkeypatch):
    editor = make_editor(MALMEN, torch.float32)
    before = bits(editor)
    monkeypatch.setattr(training, "meta_loss", lambda *_: ({"generalization": math.nan, "locality": 0.0}, {}))
    monkeypatch.setattr(training, "backpropagate", lambda *_: None)
    with pytest.raises(NonFiniteMetaGradientError, match="step 0: the generalization loss is nan"):
        train(editor, toy_facts(3), steps=1, **FAST)
    assert same_bits(bits(editor), before)


def test_an_editor_without_regularization_can_be_trained_and_goes_on(tmp_path):
    config = EditorConfig(rank=5, learning_rate=0.3, regularization=0.0)
    for steps in (1, 2):
        editor = make_editor(MEND, torch.float32, config=config, disturb=False)
        history = train(editor, toy_facts(7), steps=steps, checkpoint=tmp_path / "c.pt", **FAST)
    assert len(history) == 2


def test_gradients_of_a_step_that_was_stopped_do_not_flow_into_the_next_training():
    (_, expected, end), editor = straight(1), make_editor(MALMEN, torch.float32)
    for parameter in editor.parameters():
        parameter.grad = torch.ones_like(parameter)
    history = train(editor, toy_facts(7), steps=1, **FAST)
    assert without_seconds(history) == without_seconds(expected) and same_bits(bits(editor), end)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_moments_of_what_is_not_finite_are_never_kept(value):
    editor = make_editor(MALMEN, torch.float64)
    before = bits(editor)
    (cached,) = editor.captured([fact.pair for fact in toy_facts(3)], 3)
    list(cached.values())[-1].value_gradients[0, 0] = value
    with pytest.raises(NonFiniteGradientError, match="transformer.h.2.mlp.c_proj"):
        editor.update_moments(cached)
    assert same_bits(bits(editor), before)


# --- what a checkpoint belongs to


def test_a_checkpoint_of_other_facts_another_model_or_another_seed_is_refused(tmp_path):
    path, options = tmp_path / "c.pt", dict(num_facts=2, progress=False, checkpoint=tmp_path / "c.pt")
    train(make_editor(MALMEN, torch.float32), toy_facts(4), steps=1, **options)
    other = MALMEN(toy_model(seed=7), make_editor(MALMEN, torch.float32).config)
    for editor, facts, change, message in (
        (make_editor(MALMEN, torch.float32), toy_facts(4, seed=1), {}, "another run: facts differ"),
        (make_editor(MALMEN, torch.float32), toy_facts(4)[::-1], {}, "another run: facts differ"),
        (other, toy_facts(4), {}, "the language model .* differ"),
        (make_editor(MALMEN, torch.float32), toy_facts(4), {"seed": 5}, "another run: seed differ"),
        (make_editor(MALMEN, torch.float32, config=EditorConfig(rank=5)), toy_facts(4), {}, "editor's learning_rate"),
        (MALMEN(toy_model(last=1), other.config), toy_facts(4), {}, "edited layers"),
    ):
        before = bits(editor)
        with pytest.raises(TrainingError, match=message):
            train(editor, facts, steps=2, **options, **change)
        assert same_bits(bits(editor), before)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "run": {n: v for n, v in state["run"].items() if n != "facts"}}, path)  # as it once was
    with pytest.raises(TrainingError, match="facts differ; remove it"):
        train(make_editor(MALMEN, torch.float32), toy_facts(4), steps=2, **options)


def test_steps_that_are_done_are_not_taken_again(tmp_path):
    options = dict(num_facts=2, progress=False, checkpoint=tmp_path / "c.pt")
    first = train(make_editor(MALMEN, torch.float32), toy_facts(4), steps=2, **options)
    assert train(make_editor(MALMEN, torch.float32), toy_facts(4), steps=2, **options) == first
    with pytest.warns(UserWarning, match="has 2 steps, 1 are asked for"):
        assert train(make_editor(MALMEN, torch.float32), toy_facts(4), steps=1, **options) == first
    with pytest.raises(TrainingError, match="checkpoint_every must be at least 1"):
        train(make_editor(MALMEN, torch.float32), toy_facts(4), steps=3, checkpoint_every=0, **options)
