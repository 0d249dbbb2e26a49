"""The wing's own files, damaged in some dozens of ways: an error that names the file, or a result that is right."""

import json
import random
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from malmen_repro.errors import MalmenError
from malmen_repro.facts import sha256
from malmen_repro.files import file_hash
from malmen_repro.replication import stand_ins
from malmen_repro.replication.benches import BenchError, TuningConfig, _tuned_already
from malmen_repro.replication.editor_tables import read_costs
from malmen_repro.replication.figures import scaling_table
from malmen_repro.replication.plans import configuration
from malmen_repro.replication.records import (
    RecordError,
    RecordWarning,
    fingerprints,
    read_record,
    read_rows,
    write_record,
)
from malmen_repro.replication.runner import run_cells, trained_editor
from malmen_repro.replication.small_models import byte_pair_tokenizer
from malmen_repro.replication.small_training import SmallRun, train_small_language_model
from malmen_repro.replication.stand_ins import StandInError, StandInWarning, tiny_bench
from tests.handmade import record
from tests.replication.test_plans import EVALUATION, cell, toy_settings
from tests.replication.test_runner import toy_bench
from tests.small import CONFIG, fresh, stopped_before, write_folder

INSTEAD = (None, "x", "", [], {}, -1, 10**400, True, 1e308, [[1]], {"x": 1})


def torn(data, rng):
    "The bytes of a file after a mishap."
    kind, place = rng.randrange(5), rng.randrange(max(1, len(data)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + b"\0" * (len(data) - place)
    if kind == 3:
        return data[:place] + data[place + rng.randrange(1, 9) :]
    return rng.choice([b"", b"[" * 10**5, b"9" * 5000])


def places(value, path=()):
    "Every place in plain JSON."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*path, name)
        yield from places(inner, (*path, name))


def changed(text, rng):
    "JSON that lacks a field, or has something else in one."
    value = json.loads(text)
    *path, last = rng.choice(list(places(value)))
    inner = value
    for name in path:
        inner = inner[name]
    if rng.random() < 0.3:
        del inner[last]
    else:
        inner[last] = rng.choice(INSTEAD)
    return json.dumps(value).encode()


def damaged(path, count, seed=0):
    "The file in its place, damaged again and again; whole again at the end."
    whole, rng = path.read_bytes(), random.Random(seed)
    for i in range(count):
        path.write_bytes(changed(whole, rng) if i % 2 and path.suffix == ".json" else torn(whole, rng))
        yield i
    path.write_bytes(whole)


def same_weights(one, two):
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- records


def test_a_damaged_record_is_named_or_read(tmp_path):
    path, refused = tmp_path / "r.json", 0
    one = record(extra={"failure": {"error": "x"}})
    one["scores"]["LS"] = {"mean": None, "interval": [None, None], "facts": 0}
    write_record(one | {"git": None, "history": [{"step": 0, "loss": 1.0}], "learned": {}}, path)
    for _ in damaged(path, 400):
        try:
            scaling_table([read_record(path)])
        except RecordError as error:
            assert "r.json" in str(error)
            refused += 1
    assert refused > 250 and read_record(path)["scores"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("scores", {"ES": 0.5}), ("scores", {}), ("per_fact", {"ES": ["x"]}), ("seconds", {"editing": "1"}),
     ("seconds", {"editing": float("nan")}), ("history", {}), ("git", "main"), ("fingerprints", None), ("hash", 3),
     ("blocks", [None])],
)  # fmt: skip
def test_a_value_of_another_kind_is_named(tmp_path, name, value):
    (tmp_path / "r.json").write_text(json.dumps(record() | {name: value}))
    with pytest.raises(RecordError, match=rf"r\.json is damaged: .*{name}"):
        read_record(tmp_path / "r.json")


def test_a_record_with_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(RecordError, match="r.json is not written.*not finite"):
        write_record(record() | {"learned": {"h": {"learning_rate": float("inf")}}}, tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_no_record(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for name in ("folder.json", "none.json", "zero\0byte.json"):
        with pytest.raises(RecordError, match="damaged"):
            read_record(tmp_path / name)


def test_rows_without_their_fields_are_named(tmp_path):
    path = tmp_path / "editors" / "memory.json"
    path.parent.mkdir()
    for text in ("[]", "{}", '{"rows": {}}', '{"rows": [1]}', '{"rows": [{"tier": "tiny"}]}', "[" * 10**5):
        path.write_text(text)
        with pytest.raises(RecordError, match=r"memory\.json is damaged"):
            read_costs(tmp_path)
    path.write_text('{"rows": [{"m": 1}]}')
    assert read_rows(path, m=int) == [{"m": 1}]


# --- tiny stand-ins


@pytest.fixture
def kept(monkeypatch, tmp_path):
    "A function that gives the bench of a small world, the folder it is kept in, and the bench as it was made."
    real = stand_ins.world_parts
    monkeypatch.setattr(stand_ins, "world_parts", lambda config: real(config, people=20, towns=12))
    small = {"width": 16, "heads": 2, "inner": 24, "known": 60, "evaluation": 10, "steps": 2, "batch_size": 16}
    config = replace(stand_ins.TinyConfig(), **small)
    made = tiny_bench(0, tmp_path, progress=False, config=config)
    (folder,) = tmp_path.iterdir()
    return lambda: tiny_bench(0, tmp_path, progress=False, config=config), folder, made


@pytest.mark.parametrize("name", ["model.safetensors", "provenance.json", "seal.json"])
def test_a_damaged_stand_in_is_trained_again(kept, name):
    again, folder, made = kept
    for _ in damaged(folder / name, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StandInWarning)
            found = again()
        assert same_weights(found.lm.model, made.lm.model)
        assert {**found.provenance, "training seconds": 0} == {**made.provenance, "training seconds": 0}


def test_weights_that_lack_or_are_one_too_many_are_not_loaded(kept):
    from safetensors.torch import load_file, save_file

    again, folder, made = kept
    whole = load_file(folder / "model.safetensors")
    name = next(name for name in whole if name.endswith("c_proj.weight"))
    wrong = [{n: w for n, w in whole.items() if n != name}, whole | {"more": torch.ones(1)}]
    wrong += [whole | {name: whole[name][:1].clone()}, whole | {name: whole[name] * float("nan")}]
    for weights in wrong:
        for sealed in (True, False):  # a folder of an older version has no seal
            save_file(weights, folder / "model.safetensors")
            if not sealed:
                (folder / "seal.json").unlink()
            with pytest.warns(StandInWarning, match="trained again"):
                assert same_weights(again().lm.model, made.lm.model)


def test_a_stand_in_of_an_older_version_is_taken_and_sealed(kept, monkeypatch):
    again, folder, made = kept
    (folder / "seal.json").unlink()
    monkeypatch.setattr(stand_ins, "train_language_model", None)  # a second training would fail
    assert same_weights(again().lm.model, made.lm.model) and again().provenance == made.provenance
    hashes = json.loads((folder / "seal.json").read_text())["files"]
    assert hashes == {name: file_hash(folder / name) for name in ("model.safetensors", "provenance.json")}


def test_a_training_that_is_not_finite_is_kept_nowhere(kept, monkeypatch):
    again, folder, _ = kept
    for path in folder.glob("*.json"):
        path.unlink()

    def diverge(lm, *args):
        with torch.no_grad():
            next(lm.model.parameters()).fill_(float("nan"))

    monkeypatch.setattr(stand_ins, "train_language_model", diverge)
    with pytest.raises(StandInError, match="not finite; lower learning_rate"):
        again()
    assert not list(folder.glob("*.json"))


# --- small training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of two steps that was saved, and what makes a fresh model for it."
    tokenizer = byte_pair_tokenizer(["who won? Ada Ash", "who lost? Bo Elm"], 300)
    one = SmallRun(tmp_path_factory.mktemp("run") / "k.pt", fresh(tokenizer), CONFIG)
    rows = one.lm.encode([("who won?", "Ada"), ("who lost?", "Bo")])
    for _ in range(2):
        one.advance(rows, rows)
    one.save()
    return one, lambda: SmallRun(one.path, fresh(tokenizer), CONFIG)


def same_run(one, two):
    return same_weights(one.lm.model, two.lm.model) and (one.step, one.tokens) == (two.step, two.tokens)


def test_a_damaged_checkpoint_is_named_or_goes_on(run):
    one, again = run
    refused = 0
    for _ in damaged(one.path, 40):
        try:
            assert same_run(again(), one)
        except MalmenError as error:
            assert "k.pt" in str(error)
            refused += 1
    assert refused > 25 and same_run(again(), one)


def test_a_checkpoint_whose_values_do_not_fit_is_named(run):
    one, again = run
    whole, text = torch.load(one.path, weights_only=True), one.path.read_bytes()
    name = next(iter(whole["model"]))
    adam, first = whole["optimizer"], whole["optimizer"]["state"][0]
    for changes in (
        *({part: value} for part in whole if part != "data" for value in (None, "x", -1, [], {})),
        {"data": "others"},
        {"model": {n: w for n, w in whole["model"].items() if n != name}},
        {"model": whole["model"] | {name: whole["model"][name][:1]}},
        {"model": whole["model"] | {name: whole["model"][name] * float("nan")}},
        {"optimizer": adam | {"state": {}}},
        {"optimizer": adam | {"state": adam["state"] | {0: first | {"exp_avg": torch.ones(3)}}}},
        {"optimizer": adam | {"state": adam["state"] | {0: first | {"step": torch.tensor(7.0)}}}},
        {"optimizer": adam | {"param_groups": adam["param_groups"][:1]}},
        {"step": 10**6},
        {"seconds": float("nan")},
    ):
        torch.save(whole | changes, one.path)
        with pytest.raises(StandInError, match=r"k\.pt"):
            again()
    one.path.write_bytes(text)
    assert same_run(again(), one)


def test_ctrl_c_saves_the_last_whole_step_and_none_in_half_a_step(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "data")
    options = {"config": CONFIG, "device": "cpu", "progress": False, "save_every": 1e9}
    straight, _ = train_small_language_model(folder, tmp_path / "straight", **options)
    real, steps = torch.optim.AdamW.step, []

    def stop(optimizer, *args):
        steps.append(None)
        if len(steps) == 5:  # in the middle of a step
            raise KeyboardInterrupt
        return real(optimizer, *args)

    with stopped_before(3):
        train_small_language_model(folder, tmp_path / "stopped", **options)
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"] == 3
    steps.extend([None] * 3)
    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train_small_language_model(folder, tmp_path / "stopped", **options)
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(torch.optim.AdamW, "step", real)
    continued, _ = train_small_language_model(folder, tmp_path / "stopped", **options)
    for ours, theirs in zip(continued.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)


def test_a_finished_model_that_is_damaged_is_named(tmp_path):
    folder, out = write_folder(tmp_path / "data"), tmp_path / "out"
    options = {"config": CONFIG, "device": "cpu", "progress": False}
    made, _ = train_small_language_model(folder, out, **options)
    inside = [f"final/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json", "seal.json")]
    for name in ("record.json", *inside):
        for _ in damaged(out / name, 8):
            try:
                assert same_weights(train_small_language_model(folder, out, **options)[0], made)
            except MalmenError as error:
                assert str(out) in str(error)
    (out / "final" / "seal.json").unlink()  # as an older version left it
    assert same_weights(train_small_language_model(folder, out, **options)[0], made)
    (out / "record.json").unlink()  # what the error advises
    assert same_weights(train_small_language_model(folder, out, **options)[0], made)


# --- editors of a run


def test_a_damaged_editor_of_a_run_is_set_aside_and_trained_again(tmp_path):
    one, bench = cell("MEND"), toy_bench()
    asked, found = configuration(one, toy_settings, EVALUATION), fingerprints(bench)
    give = lambda: trained_editor(one, bench.lm, bench.train_facts, asked, found, tmp_path, False)  # noqa: E731
    editor, story = give()
    (folder,) = (path for path in (tmp_path / "editors").iterdir() if path.is_dir())
    for name in sorted(path.name for path in folder.iterdir()):
        for _ in damaged(folder / name, 4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RecordWarning)
                again, told = give()
            assert same_weights(again.networks, editor.networks) and len(told["history"]) == len(story["history"])
    with pytest.warns(RecordWarning, match="set aside as .*damaged, the editor is trained again"):
        (folder / "training.json").write_text("{}")
        give()


def test_an_editor_of_another_training_is_not_taken(tmp_path):
    cells = [cell("MEND"), replace(cell("MEND"), seed=1)]
    run = {"settings": toy_settings, "evaluation": EVALUATION, "progress": False}
    records = run_cells(cells, tmp_path, toy_bench, **run)
    first, second = sorted(path for path in (tmp_path / "editors").iterdir() if path.is_dir())
    (tmp_path / cells[0].path).unlink()
    for path in first.iterdir():
        path.write_bytes((second / path.name).read_bytes())
    with pytest.warns(RecordWarning, match="tells of another training"):
        again = run_cells(cells, tmp_path, toy_bench, **run)
    assert [one["per_fact"] for one in again] == [one["per_fact"] for one in records]


# --- tuned classifiers


def test_a_damaged_tuning_is_named(tmp_path):
    config, out = TuningConfig(), tmp_path / "tuned"
    out.mkdir()
    (out / "model.safetensors").write_bytes(bytes(range(200)))
    about = {"config": asdict(config), "files": {"model.safetensors": file_hash(out / "model.safetensors")}}
    (out / "tuning.json").write_text(json.dumps(about))
    assert _tuned_already(out, config) == out
    for path in sorted(out.iterdir()):
        for _ in damaged(path, 40):
            try:
                assert _tuned_already(out, config) == out
                assert sha256(json.loads((out / "tuning.json").read_text())["config"]) == sha256(asdict(config))
            except BenchError as error:
                assert str(out) in str(error)
