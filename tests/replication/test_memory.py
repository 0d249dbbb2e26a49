"Fig. 9: bytes are counted exactly, one graph gives the split gradient, a run of measurements stops and goes on."

import gc
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import malmen_repro.replication.memory
from malmen_repro.editors import MALMEN, MEND, EditorConfig
from malmen_repro.errors import MalmenError
from malmen_repro.facts import sha256
from malmen_repro.normal_equation import SingularGramError
from malmen_repro.replication.memory import (
    MEMORY_SETTINGS,
    PROCEDURES,
    MemoryLimitError,
    MemorySetting,
    TensorMemory,
    UnknownMemoryTierError,
    cached_bytes,
    concatenated_meta_gradient,
    draw_memory,
    first_not_fitting,
    inferred_bytes,
    line,
    measure,
    measure_apart,
    memory_configuration,
    memory_curves,
    memory_finding,
    memory_path,
    memory_table,
    out_of_memory,
    random_block,
    random_editor,
    resident_bytes,
    run_memory_experiment,
)
from malmen_repro.replication.records import RecordConflictError, RecordError, read_record, read_records
from malmen_repro.training import Block, Curriculum, TrainingConfig, cache_tokens, infer, meta_gradient
from malmen_repro.weight_shifts import NonFiniteShiftError
from tests.toy import toy_facts, toy_model

TOY = MemorySetting(
    what="toy shapes",
    model={"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 48},
    edited=2,
    prompt_tokens=5,
    answer_tokens=2,
    rank=8,
    num_facts=(4, 8, 16),
    lm_batch_size=4,
    network_batch_size=8,
)


# --- counting


def test_nothing_counts_nothing():
    with TensorMemory() as memory:
        pass
    assert (memory.current, memory.peak, memory.timeline) == (0, 0, [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_known_allocations(dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    with TensorMemory() as memory:
        first = torch.zeros(10, 10, dtype=dtype)
        second = torch.zeros(50, dtype=dtype)
        assert memory.current == 150 * size
        del first
        assert memory.current == 50 * size
        third = torch.zeros(70, dtype=dtype)
        assert memory.current == 120 * size
        del second, third
    assert (memory.current, memory.peak) == (0, 150 * size)
    assert max(memory.timeline) == memory.peak


def test_views_share_a_storage_and_keep_it_alive():
    with TensorMemory() as memory:
        whole = torch.zeros(4, 25)
        parts = [whole[1:], whole.T, whole.view(-1), whole.detach(), whole.expand(2, 4, 25), *whole.split(2)]
        assert memory.current == memory.peak == 400
        del whole
        assert memory.current == 400
        parts.clear()
        assert memory.current == 0


def test_results_in_place_and_into_given_tensors_bring_nothing_new():
    with TensorMemory() as memory:
        tensor = torch.zeros(100)
        tensor.add_(1).mul_(2)
        tensor[3].fill_(7)
        tensor[:50].copy_(tensor[50:])
        torch.add(tensor, 1, out=tensor)
        nn.functional.relu(tensor, inplace=True)
        assert memory.current == 400
    assert memory.peak == 400


def test_what_was_there_before_does_not_count():
    old = torch.zeros(1000)
    with TensorMemory() as memory:
        old.add_(1)
        old.view(10, 100)[2:].mul_(3)
        assert memory.current == 0
        new = old + 1
        assert memory.current == 4000
        del old
        assert memory.current == 4000
        del new
    assert (memory.current, memory.peak) == (0, 4000)


def test_tensors_made_of_numbers_count():
    with TensorMemory() as memory:
        tensor = torch.tensor([1.0, 2.0, 3.0])
        assert memory.current == 12
        assert len(tensor) == 3


def test_a_resized_tensor_counts_at_its_new_size():
    with TensorMemory() as memory:
        tensor = torch.zeros(10)
        tensor.resize_(100)
        assert memory.current == 400
        torch.add(torch.zeros(1), torch.zeros(1), out=tensor.resize_(0))
        assert memory.current == 400  # a storage does not shrink
        del tensor
    assert memory.current == 0 and memory.peak >= 400


def test_several_results_of_one_operation():
    with TensorMemory() as memory:
        values, indices = torch.arange(10.0).sort()
        assert memory.current == 10 * 4 + 10 * 8
        assert len(values) == len(indices)


def test_what_autograd_saves_counts_until_the_way_back():
    weight = torch.ones(50, 20, requires_grad=True)
    with TensorMemory() as memory:
        result = (torch.ones(10, 50) @ weight).exp().sum()
        assert memory.current == 10 * 50 * 4 + 10 * 20 * 4 + 4  # the input for the weight, the output of exp, the sum
        result.backward()
        del result
        assert memory.current == weight.grad.nbytes
        weight.grad = None
        assert memory.current == 0


def test_without_a_graph_nothing_is_saved():
    weight = torch.ones(50, 20, requires_grad=True)
    with torch.no_grad(), TensorMemory() as memory:
        result = (torch.ones(10, 50) @ weight).exp().sum()
        assert memory.current == result.nbytes == 4


def test_a_graph_that_is_dropped_is_freed():
    weight = torch.ones(50, 20, requires_grad=True)
    with TensorMemory() as memory:
        result = (weight * 2).exp()
        assert memory.current == 4000
        del result
        assert memory.current == 0


def test_a_loop_of_references_counts_until_it_is_collected():
    with TensorMemory() as memory:
        loop = [torch.zeros(10)]
        loop.append(loop)
        del loop
        assert memory.current == 40
        gc.collect()
        assert memory.current == 0


def test_depth_costs_memory_in_one_graph_only():
    layers = [torch.full((30, 30), 0.1, requires_grad=True) for _ in range(6)]

    def peak(steps):
        with TensorMemory() as memory:
            hidden = torch.ones(500, 30)
            for layer in layers[:steps]:
                hidden = hidden @ layer
            hidden.sum().backward()
        for layer in layers:
            layer.grad = None
        return memory.peak

    hidden, gradient = 500 * 30 * 4, 30 * 30 * 4
    # One more hidden state a layer; on the way back one of them makes room before a weight's gradient comes, or after.
    assert {peak(k + 1) - peak(k) for k in (2, 3, 4, 5)} <= {hidden, hidden + gradient}


def test_the_count_repeats_itself():
    def timeline():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        with TensorMemory() as memory:
            model(torch.randn(5, 8)).square().mean().backward()
        return memory.timeline

    assert timeline() == timeline()


def test_the_limit_stops_the_operation_that_passes_it():
    done = []
    with pytest.raises(MemoryLimitError, match="800 bytes above the start, 500 are allowed"), TensorMemory(500):
        done.append(torch.zeros(100))
        done.append(torch.zeros(100))
    assert len(done) == 1
    assert torch.zeros(1000).sum() == 0  # the limit is over


def test_the_limit_holds_on_the_way_back_too():
    weight = torch.ones(100, 100, requires_grad=True)
    with pytest.raises(MemoryLimitError), TensorMemory(50_000):
        loss = (weight * 1.0).sum()
        loss.backward()
        weight.grad.double()


def test_a_limit_that_is_just_met_is_met():
    with TensorMemory(400) as memory:
        torch.zeros(100)
    assert memory.peak == 400


def test_two_counts_one_inside_the_other():
    with TensorMemory() as outer:
        first = torch.zeros(10)
        with TensorMemory() as inner:
            second = first + 1
        assert (outer.current, inner.current) == (80, 40)
        assert len(second) == 10


# --- one graph


def make_editor(kind, dtype=torch.float64, *, disturb=0.1):
    "Away from its start, so that no part of the gradient vanishes by construction."
    editor = kind(toy_model(dtype), EditorConfig(rank=5, learning_rate=0.3, regularization=0.7))
    editor.networks.to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(disturb * torch.randn_like(parameter))
    return editor


def named_gradients(editor):
    return {name: p.grad for name, p in editor.networks.named_parameters() if p.grad is not None}


def toy_block(num_facts):
    return Curriculum(toy_model(), toy_facts(num_facts), TrainingConfig(num_facts=num_facts)).block(0)


@pytest.mark.parametrize("update_moments", [True, False])
@pytest.mark.parametrize("kind", [MEND, MALMEN])
@pytest.mark.parametrize("num_facts", [3, 17])  # fewer and more tokens than the keys' size
def test_both_procedures_give_one_gradient(kind, num_facts, update_moments):
    block, results = toy_block(num_facts), []
    config = TrainingConfig(locality_coefficient=0.8, lm_batch_size=2, network_batch_size=5)
    for procedure in (concatenated_meta_gradient, meta_gradient):
        editor = make_editor(kind)
        losses = procedure(editor, block, config, update_moments)
        results.append((losses, named_gradients(editor), editor.has_moments))
    (losses, ours, moments), (wanted_losses, wanted, wanted_moments) = results
    assert moments == wanted_moments == update_moments
    assert losses.keys() == wanted_losses.keys()
    assert all(math.isclose(losses[name], wanted_losses[name], rel_tol=1e-9) for name in losses)
    assert ours.keys() == wanted.keys()
    assert any("log_regularization" in name for name in ours) == (kind is MALMEN)
    for name, gradient in ours.items():
        assert gradient.norm() > 0
        assert (gradient - wanted[name]).norm() <= 1e-9 * wanted[name].norm(), name


def test_without_locality_and_without_unrelated_tuples():
    block = toy_block(5)
    without = [(TrainingConfig(locality_coefficient=0.0), block), (TrainingConfig(), block._replace(unrelated=[]))]
    for config, part in without:
        losses = concatenated_meta_gradient(make_editor(MALMEN), part, config)
        assert losses["locality"] == 0.0 and losses["generalization"] > 0


def test_gradients_add_up():
    editor, block = make_editor(MEND), toy_block(3)
    concatenated_meta_gradient(editor, block, TrainingConfig())
    once = {name: gradient.clone() for name, gradient in named_gradients(editor).items()}
    concatenated_meta_gradient(editor, block, TrainingConfig(), update_moments=False)
    for name, gradient in named_gradients(editor).items():
        assert torch.allclose(gradient, 2 * once[name])


@pytest.mark.parametrize("kind", [MEND, MALMEN])
def test_a_shift_that_is_not_finite_is_told(kind):
    editor = make_editor(kind)
    with torch.no_grad():
        for network in editor.networks.values():
            network.log_learning_rate.fill_(torch.inf)
    with pytest.raises((NonFiniteShiftError, ArithmeticError)):
        concatenated_meta_gradient(editor, toy_block(3), TrainingConfig())


def test_a_singular_system_is_told():
    editor = make_editor(MALMEN)
    with torch.no_grad():
        for network in editor.networks.values():
            network.log_regularization.fill_(-torch.inf)
    with pytest.raises(SingularGramError, match="c_proj"):
        concatenated_meta_gradient(editor, toy_block(3), TrainingConfig())


# --- what still grows


@pytest.mark.parametrize("num_facts", [4, 8, 32])  # up to and beyond the keys' 48 dimensions
def test_the_kept_bytes_are_the_formula(num_facts):
    configuration = memory_configuration(TOY, "tiny", "split", num_facts)
    editor, block = random_editor(configuration), random_block(configuration)
    tokens = num_facts * TOY.answer_tokens
    with TensorMemory() as memory:
        cached = cache_tokens(editor, block.edits, 3)
        assert memory.current == cached_bytes(editor.lm.shapes, tokens)
        before = memory.current
        inferred = infer(editor, cached, 7)
        assert memory.current - before == inferred_bytes(editor.lm.shapes, tokens)
        assert inferred.keys() == cached.keys()


def test_the_formulas_by_hand():
    assert cached_bytes({"a": (2, 3), "b": (4, 5)}, 7) == 7 * (5 + 9) * 4
    assert cached_bytes({"a": (2, 3)}, 7, itemsize=8) == 7 * 5 * 8
    assert inferred_bytes({"a": (2, 3)}, 2) == (2 * 2 + 6) * 4 + 4 * 8
    assert inferred_bytes({"a": (2, 3)}, 7) == (7 * 2 + 6) * 4 + 9 * 8


# --- measuring


def test_a_configuration_is_plain_json_and_builds_what_it_says():
    configuration = memory_configuration(TOY, "tiny", "split", 6, method="MEND", seed=3)
    assert json.loads(json.dumps(configuration)) == configuration
    editor, block = random_editor(configuration), random_block(configuration)
    assert isinstance(editor, MEND) and editor.config.rank == 8 and editor.config.seed == 3
    assert list(editor.lm.shapes.values()) == [(16, 48)] * 2
    assert isinstance(block, Block) and [len(tuples) for tuples in block] == [6, 6, 6]
    assert {(len(pair.prompt), len(pair.answer)) for tuples in block for pair in tuples} == {(5, 2)}
    other = memory_configuration(TOY, "tiny", "split", 6, method="MEND", seed=4)
    assert random_block(configuration) == block != random_block(other)


@pytest.mark.parametrize("tier", MEMORY_SETTINGS)
def test_the_settings_are_full_batches_and_the_papers_shapes(tier):
    setting = MEMORY_SETTINGS[tier]
    assert setting.lm_batch_size <= min(setting.num_facts)
    assert setting.network_batch_size <= min(setting.num_facts) * setting.answer_tokens
    assert setting.model["n_positions"] >= setting.prompt_tokens + setting.answer_tokens


def test_the_shapes_are_gpt2s():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**MEMORY_SETTINGS["shapes"].model))
    assert model.num_parameters() == 124_439_808
    assert MEMORY_SETTINGS["shapes"].rank == EditorConfig.paper().rank and MEMORY_SETTINGS["shapes"].edited == 6


@pytest.mark.parametrize("method", ["MEND", "MALMEN"])
def test_a_measurement(method):
    results = {name: measure(memory_configuration(TOY, "tiny", name, 16, method)) for name in PROCEDURES}
    one, split = results["concatenated"], results["split"]
    assert one["fingerprints"] == split["fingerprints"] and one["model"]["type"] == "gpt2"
    assert one["extra"]["fits"] and split["extra"]["fits"] and split["extra"]["reason"] is None
    assert one["extra"]["gradient_norm"] == pytest.approx(split["extra"]["gradient_norm"], rel=1e-4)
    start, left = one["memory_bytes"]["start"], one["memory_bytes"]["left"]
    assert start == split["memory_bytes"]["start"]
    editor = random_editor(memory_configuration(TOY, "tiny", "split", 16, method))
    assert start["editor"] == sum(t.nbytes for t in editor.networks.state_dict().values())
    learned = {name: p.nbytes for name, p in editor.networks.named_parameters()}
    assert left == sum(size for name, size in learned.items() if method == "MALMEN" or "regularization" not in name)
    assert one["memory_bytes"]["peak"] > split["memory_bytes"]["peak"] > sum(start.values()) + left
    assert one["seconds"]["meta_gradient"] >= 0 and json.dumps(one)


def test_a_measurement_repeats_itself():
    configuration = memory_configuration(TOY, "tiny", "split", 8)
    first, second = measure(configuration), measure(configuration)
    assert first["memory_bytes"]["peak"] == second["memory_bytes"]["peak"]
    assert first["extra"] == second["extra"] and first["fingerprints"] == second["fingerprints"]


def test_a_limit_is_an_answer():
    whole = measure(memory_configuration(TOY, "tiny", "concatenated", 16))["memory_bytes"]["peak"]
    exact, short = (replace(TOY, limit_bytes=whole - missing) for missing in (0, 1))
    assert measure(memory_configuration(exact, "tiny", "concatenated", 16))["extra"]["fits"]
    stopped = measure(memory_configuration(short, "tiny", "concatenated", 16))
    assert not stopped["extra"]["fits"] and stopped["extra"]["gradient_norm"] is None
    assert stopped["extra"]["reason"].startswith("MemoryLimitError: tensors hold")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), True),
        (MemoryLimitError("too much"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("allocate"), False),
    ],
)
def test_which_errors_are_a_lack_of_memory(error, wanted):
    assert out_of_memory(error) == wanted


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), MemoryError("no more")])
def test_a_lack_of_memory_is_an_answer(monkeypatch, error):
    def procedure(editor, block, config):
        raise error

    monkeypatch.setitem(PROCEDURES, "split", procedure)
    result = measure(memory_configuration(TOY, "tiny", "split", 4))
    assert not result["extra"]["fits"] and str(error) in result["extra"]["reason"]


def test_another_error_is_an_error(monkeypatch):
    def procedure(editor, block, config):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setitem(PROCEDURES, "split", procedure)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        measure(memory_configuration(TOY, "tiny", "split", 4))


def test_resident_bytes():
    found = resident_bytes()
    assert not found or 2**20 < found["now"] <= found["peak"]


def test_apart_is_the_same_and_its_resident_peak_is_of_the_tensors():
    roomy = replace(TOY, model=TOY.model | {"n_embd": 64, "n_inner": 512}, rank=256, lm_batch_size=64)
    configuration = memory_configuration(roomy, "tiny", "concatenated", 256)
    here, there = measure(configuration), measure_apart(configuration)
    for part in ("fingerprints", "extra", "model", "per_fact"):
        assert here[part] == there[part]
    ours, theirs = here["memory_bytes"], there["memory_bytes"]
    assert all(ours[name] == theirs[name] for name in ("start", "peak", "left"))
    if "resident_peak" in theirs:
        above = ours["peak"] - sum(ours["start"].values())
        resident = theirs["resident_peak"] - theirs["resident_before"]
        assert above > 30 * 2**20 and 0.8 * above < resident < 1.6 * above + 32 * 2**20


def test_a_process_that_fails_or_is_killed(monkeypatch):
    configuration = memory_configuration(TOY, "tiny", "split", 4)
    monkeypatch.setattr(malmen_repro.replication.memory, "_CHILD", "raise ValueError('something else')")
    with pytest.raises(RecordError, match="something else"):
        measure_apart(configuration)
    monkeypatch.setattr(malmen_repro.replication.memory, "_CHILD", "import os; os.kill(os.getpid(), 9)")
    killed = measure_apart(configuration)
    assert not killed["extra"]["fits"] and "killed" in killed["extra"]["reason"]
    for child in ("print('no record')", ""):
        monkeypatch.setattr(malmen_repro.replication.memory, "_CHILD", child)
        with pytest.raises(MalmenError, match="no readable JSON"):
            measure_apart(configuration)
    monkeypatch.setattr(malmen_repro.replication.memory, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(malmen_repro.replication.memory, "PATIENCE", 0.5)
    with pytest.raises(RecordError, match="took more than .* hours; take fewer facts"):
        measure_apart(configuration)


# --- records


@pytest.fixture
def here(monkeypatch):
    "Measurements in this process, counted."
    calls = []

    def counted(configuration):
        calls.append((configuration["cell"]["procedure"], configuration["cell"]["num_facts"]))
        return measure(configuration)

    monkeypatch.setattr(malmen_repro.replication.memory, "measure_apart", counted)
    return calls


def test_a_run_goes_on_where_its_records_end(tmp_path, here):
    settings = {"tiny": TOY}
    first = run_memory_experiment(tmp_path, "tiny", progress=False, num_facts=(4, 8), settings=settings)
    assert here == [("concatenated", 4), ("concatenated", 8), ("split", 4), ("split", 8)]
    again = run_memory_experiment(tmp_path, "tiny", progress=False, settings=settings)
    assert here[4:] == [("concatenated", 16), ("split", 16)]
    assert [r for r in again if r["configuration"]["cell"]["num_facts"] < 16] == first
    assert json.loads(json.dumps(again)) == again
    assert len(read_records(tmp_path, "memory", "tiny")) == 6
    for record in again:
        path = tmp_path / memory_path(record["configuration"]["cell"])
        assert read_record(path) == record and record["hash"] == sha256(record["configuration"])
        assert {"versions", "git", "hardware", "model", "memory_bytes", "extra", "seconds"} <= record.keys()
    run_memory_experiment(tmp_path, "tiny", progress=False, num_facts=(4,), settings=settings, fresh=True)
    assert here[6:] == [("concatenated", 4), ("split", 4)]


def test_a_run_stops_a_procedure_where_it_no_longer_fits(tmp_path, here):
    peak = measure(memory_configuration(TOY, "tiny", "concatenated", 8))["memory_bytes"]["peak"]
    settings = {"tiny": replace(TOY, limit_bytes=peak - 1)}
    records = run_memory_experiment(tmp_path, "tiny", progress=False, settings=settings)
    assert here == [("concatenated", 4), ("concatenated", 8), ("split", 4), ("split", 8), ("split", 16)]
    assert [r["extra"]["fits"] for r in records] == [True, False, True, True, True]
    assert first_not_fitting(records, "concatenated") == 8 and first_not_fitting(records, "split") is None
    assert {name: list(curve) for name, curve in memory_curves(records[::-1]).items()} == {
        "concatenated": [4],
        "split": [4, 8, 16],
    }


def test_records_of_another_setting_are_refused(tmp_path, here):
    run_memory_experiment(tmp_path, "tiny", progress=False, num_facts=(4,), settings={"tiny": TOY})
    with pytest.raises(RecordConflictError, match="limit_bytes"):
        other = {"tiny": replace(TOY, limit_bytes=7)}
        run_memory_experiment(tmp_path, "tiny", progress=False, num_facts=(4,), settings=other)


def test_a_tier_without_a_setting(tmp_path):
    with pytest.raises(UnknownMemoryTierError, match="'small', but at: tiny, shapes"):
        run_memory_experiment(tmp_path, "small", progress=False)


# --- the figure


def test_a_line():
    assert line({10: 1_000, 20: 1_500, 40: 2_500}) == pytest.approx((50, 500))
    assert line({10: 1_000, 20: 1_500, 40: 99_999}, among=(10, 20, 80)) == pytest.approx((50, 500))
    with pytest.raises(RecordError, match="two values"):
        line({10: 1_000, 20: 1_500}, among=(10, 30))


def test_the_figure_is_drawn_from_records_alone_and_is_deterministic(tmp_path, here):
    peak = measure(memory_configuration(TOY, "tiny", "concatenated", 16))["memory_bytes"]["peak"]
    settings = {"tiny": replace(TOY, limit_bytes=peak - 1)}
    records = run_memory_experiment(tmp_path, "tiny", progress=False, settings=settings)
    figure = draw_memory(records, tmp_path / "one")
    draw_memory(read_records(tmp_path, "memory", "tiny")[::-1], tmp_path / "two")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert "stopped here" in labels and "dotted: line fitted, not measured" in labels
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    with pytest.raises(RecordError, match="no records to draw"):
        draw_memory([])


def fake(procedure, num_facts, peak, *, fits=True, limit=2**30):
    cell = {"procedure": procedure, "num_facts": num_facts}
    held = {"peak": peak, "resident_before": 0, "resident_peak": 2 * peak}
    return {
        "configuration": {"cell": cell, "limit_bytes": limit},
        "memory_bytes": held,
        "seconds": {"meta_gradient": 1.25},
        "extra": {"fits": fits},
    }


def curve(procedure, slope, *counts, stopped=None):
    records = [fake(procedure, m, 1000 + slope * m) for m in counts]
    return records + ([fake(procedure, stopped, 2**30, fits=False)] if stopped else [])


@pytest.mark.parametrize(
    ("slope", "stopped", "counts", "wanted"),
    [
        (10_060, 64, (16, 32, 64), "reproduced"),
        (10_001, 64, (16, 32, 64), "too close to call"),  # within .5 % of ten times as many
        (9_999, 64, (16, 32, 64), "too close to call"),
        (9_940, 64, (16, 32, 64), "below"),
        (10_060, None, (16, 32, 64), "below"),  # never met the limit
        (10_060, 64, (16, 32), "below"),  # the split one was not seen to go further
    ],
)
def test_a_finding(slope, stopped, counts, wanted):
    records = curve("concatenated", slope, 16, 32, stopped=stopped) + curve("split", 1_000, *counts)
    text, verdict = memory_finding(records)
    assert verdict == wanted
    assert f"10 kB a fact against 1 kB, {slope / 1000:.1f} times" in text
    assert ("passes 1 GiB at m = 64" in text) == (stopped is not None and 64 in counts)


def test_a_table():
    records = curve("concatenated", 2**20, 16, stopped=32) + curve("split", 2**17, 16, 32)
    rows = memory_table(records).splitlines()
    assert rows[0].startswith("| m ") and len(rows) == 4
    assert [cell.strip() for cell in rows[3].split("|")[1:-1]] == ["32", "stopped", "2,048", "1.2", "4", "8", "1.2"]
    lonely = memory_table(curve("split", 2**20, 16)).splitlines()[2]
    assert [cell.strip() for cell in lonely.split("|")[1:-1]] == ["16", "–", "–", "–", "16", "32", "1.2"]
