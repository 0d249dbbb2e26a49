"Consecutive batches: shifts that add up, and a MALMEN that remembers its keys."

import copy
import json
from pathlib import Path

import pytest
import torch

from malmen_repro.consecutive import STATE, Consecutive, ConsecutiveRunError, RememberingMALMEN, consecutive
from malmen_repro.editors import MALMEN, MEND, EditorConfig
from malmen_repro.facts import NoFactsError
from malmen_repro.methods.coachhook import CoachHooK, CoachHooKConfig
from malmen_repro.methods.fine_tuning import FineTuning, FineTuningConfig
from malmen_repro.methods.key_statistics import key_statistics
from malmen_repro.methods.memit import MEMIT
from malmen_repro.protocol import EditorError
from malmen_repro.training import cache_tokens
from malmen_repro.weight_shifts import WeightShift, read_tensors, write_tensors
from tests.methods.test_memit import CONFIG, LOWER, TEXTS
from tests.toy import toy_facts as facts
from tests.toy import toy_model

NETWORK = EditorConfig(rank=4, blocks=1, learning_rate=0.05, regularization=0.5)


def hyper(kind, lm=None):
    editor = kind(lm or toy_model(torch.float64), NETWORK)
    editor.observe(facts(20, start=100))
    return editor


def memit(lm):
    return MEMIT(lm, key_statistics(lm, TEXTS), CONFIG)


EDITORS = {
    "MALMEN": lambda: hyper(MALMEN),
    "MEND": lambda: hyper(MEND),
    "remembering": lambda: hyper(RememberingMALMEN),
    "FT": lambda: FineTuning(toy_model(), FineTuningConfig(epochs=1)),
    "MEMIT": lambda: memit(toy_model(layers=LOWER, last=None)),
}


@pytest.mark.parametrize("name", EDITORS)
def test_each_batch_is_edited_on_the_model_as_the_last_one_left_it(name):
    one, two = EDITORS[name](), EDITORS[name]()
    run = Consecutive(one)
    first = run.edit(facts(4))
    second = run.edit(facts(4, start=4))
    alone = two.edit(facts(4))
    with alone.applied(two.lm):
        onto = two.edit(facts(4, start=4))
    for layer in one.lm.layers:
        torch.testing.assert_close(first.shifts[layer], alone.shifts[layer], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(second.shifts[layer], (alone + onto).shifts[layer], rtol=1e-5, atol=1e-7)
    assert second.metadata == {"method": one.method, "facts": 8, "batches": 2}


@pytest.mark.parametrize("name", EDITORS)
def test_reset_forgets_and_a_failure_leaves_the_state(name):
    run = Consecutive(EDITORS[name]())
    first = run.edit(facts(3))
    run.edit(facts(3, start=3))
    with pytest.raises(NoFactsError):
        run.edit([])
    assert run.batches == 2
    run.reset()
    again = run.edit(facts(3))
    for layer, shift in first.shifts.items():
        torch.testing.assert_close(again.shifts[layer], shift, rtol=1e-6, atol=1e-9)


def test_the_first_edit_that_remembers_is_malmens():
    plain, ours = hyper(MALMEN).edit(facts(5)), hyper(RememberingMALMEN).edit(facts(5))
    for layer, shift in plain.shifts.items():
        torch.testing.assert_close(ours.shifts[layer], shift, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [3, 30])  # fewer and more tokens than the 24 dimensions of a key
def test_earlier_keys_are_rows_with_the_value_difference_zero(count):
    editor = hyper(RememberingMALMEN)
    batches = [facts(count), facts(count, start=40), facts(count, start=80)]
    seen = {layer: [] for layer in editor.lm.layers}
    for batch in batches:
        with torch.no_grad():
            cached = cache_tokens(editor, [fact.pair for fact in batch], 64)
            wanted = {
                layer: (tokens.keys, MALMEN.outputs(editor, layer, tokens), editor.regularization(layer))
                for layer, tokens in cached.items()
            }
        found = editor.edit(batch)
        for layer, (keys, differences, strength) in wanted.items():
            earlier = torch.cat(seen[layer]) if seen[layer] else keys[:0]
            everything = torch.cat([earlier, keys, strength.sqrt() * torch.eye(24).double()])
            targets = torch.cat([differences.new_zeros(len(earlier), 16), differences, differences.new_zeros(24, 16)])
            dense = torch.linalg.lstsq(everything, targets).solution.T
            torch.testing.assert_close(found.shifts[layer], dense, rtol=1e-6, atol=1e-8)
            seen[layer].append(keys)


def test_what_it_remembers_does_not_grow():
    editor = hyper(RememberingMALMEN)
    for start in range(0, 120, 30):
        editor.edit(facts(30, start=start))
    for tokens in editor.remembered.values():
        assert tokens._waiting == [] and tokens._sums[0].shape == (24, 24)


def test_the_model_stays_as_it_is():
    lm = toy_model(torch.float64)
    before = copy.deepcopy(lm.model.state_dict())
    run = Consecutive(hyper(MALMEN, lm))
    run.edit(facts(3))
    run.edit(facts(3, start=3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


def test_coachhook_needs_no_wrapping():
    lm = toy_model(layers=LOWER, last=None)
    coach = CoachHooK(lm, key_statistics(lm, TEXTS), CoachHooKConfig(memit=CONFIG))
    with pytest.raises(EditorError, match="HookedShift, which can't be added up"):
        Consecutive(coach).edit(facts(3))
    assert isinstance(Consecutive(EDITORS["MALMEN"]()).shift, WeightShift)


def test_any_editor_as_one_that_goes_on_from_its_last_edit():
    lm = toy_model(layers=LOWER, last=None)
    coach = CoachHooK(lm, key_statistics(lm, TEXTS), CoachHooKConfig(memit=CONFIG))
    coach.edit(facts(3))
    assert consecutive(coach) is coach and coach.batches == 0  # anew
    run = consecutive(EDITORS["MEMIT"]())
    assert isinstance(run, Consecutive) and run.batches == 0
    assert run.edit(facts(3)).metadata["batches"] == 1


# --- stopping and going on


@pytest.mark.parametrize("count", [2, 30])  # fewer and more tokens than the 24 dimensions of a key
@pytest.mark.parametrize("name", EDITORS)
def test_a_resumed_run_is_the_run_in_one_go(tmp_path, name, count):
    whole, half, rest = (Consecutive(EDITORS[name]()) for _ in range(3))
    for start in (0, 40):
        half.edit(facts(count, start=start))
        whole.edit(facts(count, start=start))
    assert half.save(tmp_path / "run") == tmp_path / "run"
    rest.resume(tmp_path / "run")
    assert (rest.batches, rest.facts, rest.shift.metadata) == (2, 2 * count, half.shift.metadata)
    expected, found = (run.edit(facts(count, start=80)) for run in (whole, rest))
    assert found.metadata == expected.metadata == {"method": whole.method, "facts": 3 * count, "batches": 3}
    for layer, shift in expected.shifts.items():
        torch.testing.assert_close(found.shifts[layer], shift, rtol=1e-6, atol=1e-9)
    if name == "remembering":
        ours, theirs = rest.editor.remembered, whole.editor.remembered
        assert all(ours[layer].tokens == theirs[layer].tokens for layer in ours)
        for layer in ours:
            torch.testing.assert_close(ours[layer].gram, theirs[layer].gram)


def test_a_run_without_batches_can_be_kept(tmp_path):
    run = Consecutive(EDITORS["remembering"]())
    run.save(tmp_path)
    run.edit(facts(3))
    run.resume(tmp_path)
    assert run.batches == 0 and run.shift.shifts == {}


def test_a_run_is_kept_after_its_edit_was_merged(tmp_path):
    run = Consecutive(EDITORS["MALMEN"]())
    run.edit(facts(3)).merge_into(run.lm)
    run.save(tmp_path)
    rest = Consecutive(EDITORS["MALMEN"]())
    rest.resume(tmp_path)
    assert rest.batches == 1


def test_another_editor_does_not_go_on(tmp_path):
    run = Consecutive(EDITORS["MALMEN"]())
    run.edit(facts(3))
    run.save(tmp_path)
    trained = hyper(MALMEN)
    next(trained.networks.parameters()).data += 1
    lm = toy_model(torch.float64)
    for other, message in (
        (hyper(MEND), "begun by MALMEN, not by MEND"),
        (hyper(RememberingMALMEN), "begun by MALMEN, not by MALMEN, accumulated"),
        (trained, "other settings: networks="),
        (MALMEN(lm, EditorConfig(rank=5, blocks=1)), "other settings: .*rank=4, now 5"),
        (hyper(MALMEN, toy_model(torch.float64, seed=4)), "another language model"),
    ):
        with pytest.raises(ConsecutiveRunError, match=message):
            Consecutive(other).resume(tmp_path)
    with pytest.raises(EditorError, match="no readable consecutive run"):
        run.resume(tmp_path / "nowhere")
    assert run.batches == 1


def test_other_key_statistics_do_not_go_on(tmp_path):
    run = Consecutive(EDITORS["MEMIT"]())
    run.save(tmp_path)
    lm = toy_model(layers=LOWER, last=None)
    with pytest.raises(ConsecutiveRunError, match="other settings: corpus="):
        Consecutive(MEMIT(lm, key_statistics(lm, TEXTS[1:]), CONFIG)).resume(tmp_path)


def test_a_malmen_that_remembers_has_the_networks_of_its_origin():
    editor = EDITORS["MALMEN"]()
    ours = RememberingMALMEN.of(editor)
    assert ours.networks is editor.networks and ours.lm is editor.lm and ours.config == editor.config
    assert all(earlier.tokens == 0 for earlier in ours.remembered.values())


def test_rows_at_once_are_the_editors_own_unless_asked():
    seen = []

    class Noting(MALMEN):
        def edit(self, facts, batch_size=5, progress=False):
            seen.append(batch_size)
            return super().edit(facts, batch_size, progress)

    run = Consecutive(hyper(Noting))
    run.edit(facts(3))
    run.edit(facts(3), 2)
    assert seen == [5, 2]


# --- which batches went in


@pytest.mark.parametrize("name", EDITORS)
def test_a_run_knows_its_batches(tmp_path, name):
    run, first, second = Consecutive(EDITORS[name]()), facts(3), facts(2, start=40)
    assert run.holds(first) is None
    run.edit(first)
    run.edit(second)
    assert (run.holds(first), run.holds(second), run.holds(first[:2]), run.holds(first[::-1])) == (1, 2, None, None)
    run.save(tmp_path)
    rest = Consecutive(EDITORS[name]())
    rest.resume(tmp_path)
    assert (rest.holds(first), rest.holds(second), rest.batches) == (1, 2, 2)
    rest.reset()
    assert rest.holds(first) is None


def test_a_batch_that_fails_is_not_held():
    run = Consecutive(EDITORS["MALMEN"]())
    with pytest.raises(NoFactsError):
        run.edit([])
    assert run.holds([]) is None and run.digests == []


def test_coachhook_knows_its_batches_too(tmp_path):
    lm = toy_model(layers=LOWER, last=None)
    statistics, config = key_statistics(lm, TEXTS), CoachHooKConfig(memit=CONFIG, hooks=False)
    run = consecutive(CoachHooK(lm, statistics, config))
    assert isinstance(run, CoachHooK) and run.holds(facts(3)) is None
    run.edit(facts(3)).merge_into(lm)  # the state is still one of the model as it was
    run.save(tmp_path)
    lm = toy_model(layers=LOWER, last=None)
    rest = CoachHooK(lm, statistics, config)
    rest.resume(tmp_path)
    assert rest.holds(facts(3)) == 1 and rest.holds(facts(2)) is None


OTHERS = [{"digests": None}, {"digests": ["x"]}, {"batches": 2}, {"facts": 0}, {"tokens": {}}]


@pytest.mark.parametrize("change", OTHERS)
def test_a_state_that_does_not_say_what_went_in_is_refused_and_the_run_stays(tmp_path, change):
    run = Consecutive(EDITORS["remembering"]())
    run.edit(facts(3))
    run.save(tmp_path)
    tensors, header = read_tensors(tmp_path / STATE)
    write_tensors(tmp_path / STATE, tensors, {**header, "about": json.dumps(json.loads(header["about"]) | change)})
    rest = Consecutive(EDITORS["remembering"]())
    rest.edit(facts(2, start=40))
    before = rest.shift, rest.digests, dict(rest.editor.remembered)
    with pytest.raises(EditorError, match=f"{tmp_path} holds no readable consecutive run"):
        rest.resume(tmp_path)
    assert (rest.shift, rest.digests, rest.editor.remembered) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says which files are mapped")
def test_no_file_stays_open_after_reading(tmp_path):
    run = Consecutive(EDITORS["MALMEN"]())
    run.edit(facts(3)).save(tmp_path / "shift")
    run.save(tmp_path)
    rest = Consecutive(EDITORS["MALMEN"]())
    rest.resume(tmp_path)
    shift = WeightShift.load(tmp_path / "shift")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text() and shift.shifts and rest.shift.shifts
