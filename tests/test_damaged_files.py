"""Every kind of file that the package writes, damaged in dozens of ways: what is read is valid, or a typed error says
which file it was."""

import copy
import gzip
import json
import lzma
import math
import random
from contextlib import suppress
from dataclasses import replace
from functools import cache

import pytest
import torch

from malmen_repro.consecutive import STATE, RememberingMALMEN, consecutive
from malmen_repro.editors import MALMEN, Editor, EditorConfig
from malmen_repro.errors import MalmenError
from malmen_repro.facts import load_facts, save_facts
from malmen_repro.methods.coachhook import CoachHooK, CoachHooKConfig, HookedShift
from malmen_repro.methods.key_statistics import KeyStatistics, KeyStatisticsMismatchError, key_statistics
from malmen_repro.methods.memit import MEMITConfig
from malmen_repro.protocol import load_edit
from malmen_repro.training import train
from malmen_repro.weight_shifts import WeightShift, read_tensors, write_tensors
from tests.toy import toy_corpus, toy_facts, toy_model

LOWER = "transformer.h.[01].mlp.c_proj"
VALUES = [None, True, -1, 0, 2.5, 10**6, 10**30, math.inf, "x", "", [], [1], {}, {"x": 1}]


def an_editor(lm=None):
    editor = MALMEN(lm or toy_model(), EditorConfig(rank=4))
    editor.observe(toy_facts(6))
    return editor


def a_coach():
    lm = toy_model(layers=LOWER, last=None)
    return CoachHooK(lm, key_statistics(lm, toy_corpus()), CoachHooKConfig(memit=MEMITConfig(2.0)))


@cache
def an_only_run(kind):
    return kind.of(an_editor()) if kind is RememberingMALMEN else a_coach()


def a_run(kind=RememberingMALMEN):
    "With nothing edited yet."
    return consecutive(an_only_run(kind))


def finite(tensors):
    return all(torch.isfinite(tensor).all() for tensor in tensors)


# --- one way of reading for each kind of file: what it gives must be valid


def read_shift(path):
    edit = load_edit(path)
    assert finite(edit.shifts.values()) and isinstance(edit.metadata, dict)
    if isinstance(edit, HookedShift):
        assert not any(math.isnan(alpha) for alpha in edit.thresholds.values())


def read_statistics(path):
    statistics = KeyStatistics.load(path)
    assert finite(statistics.second_moments.values()) and statistics.tokens >= 1
    with suppress(KeyStatisticsMismatchError):  # which knows of no file
        statistics.check_fits(toy_model())


def read_run(path, kind=RememberingMALMEN):
    run = a_run(kind)
    run.resume(path.parent)
    assert run.batches == len(run.digests) and run.facts >= run.batches
    assert finite(run.shift.shifts.values())


def read_editor(path):
    lm = toy_model()
    editor = Editor.from_pretrained(path.parent, lm)
    assert finite(editor.edit(toy_facts(2)).shifts.values())


def read_facts(path):
    assert all(fact.prompt and fact.answer for fact in load_facts(path))


# --- what writes them


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A file of each kind, with what reads it."
    folder = tmp_path_factory.mktemp("whole")
    editor = an_editor()
    editor.save_pretrained(folder / "editor")
    shift = editor.edit(toy_facts(2)).save(folder / "shift")
    hooks = HookedShift(WeightShift.load(shift).shifts, dict.fromkeys(editor.lm.layers, 1.5), {"facts": 2})
    for kind, name in ((RememberingMALMEN, "run"), (CoachHooK, "coach")):
        run = a_run(kind)
        if kind is RememberingMALMEN:
            run.edit(toy_facts(2))
        else:
            run.batches, run.facts, run.digests = 1, 2, ["0" * 64]
        run.save(folder / name)
    save_facts(toy_facts(4), folder / "facts.jsonl")
    return {
        "shift": (shift, read_shift),
        "hooks": (hooks.save(folder / "hooks"), read_shift),
        "statistics": (key_statistics(editor.lm, toy_corpus()).save(folder / "statistics"), read_statistics),
        "run": (folder / "run" / STATE, read_run),
        "coach": (folder / "coach" / STATE, lambda path: read_run(path, CoachHooK)),
        "editor": (folder / "editor" / "editor.safetensors", read_editor),
        "config": (folder / "editor" / "config.json", read_editor),
        "facts": (folder / "facts.jsonl", read_facts),
    }


def tried(read, path, what):
    "Read a damaged file: it is valid, or an error of this package names the file or its folder."
    try:
        read(path)
    except MalmenError as error:
        assert str(path) in str(error) or str(path.parent) in str(error), (what, error)
        return False
    return True


def copied(path, folder):
    "The file with those beside it, somewhere else."
    place = folder / path.parent.name
    place.mkdir(exist_ok=True)
    for beside in path.parent.iterdir():
        if beside.is_file():
            (place / beside.name).write_bytes(beside.read_bytes())
    return place / path.name


KINDS = ["shift", "hooks", "statistics", "run", "coach", "editor", "config", "facts"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_or_with_changed_bytes(files, tmp_path, kind):
    path, read = files[kind]
    place = copied(path, tmp_path)
    assert tried(read, place, "whole")
    whole, generator = path.read_bytes(), random.Random(0)
    for keep in (0, 1, 7, 8, 9, len(whole) // 3, len(whole) - 1):
        place.write_bytes(whole[:keep])
        refused = not tried(read, place, f"{keep} bytes")
        assert refused or kind in ("config", "facts")  # the last byte is a line feed
    for turn in range(12):
        damaged = bytearray(whole)
        for _ in range(1 + turn % 3):
            place_of_it = generator.randrange(len(whole) if turn % 2 else min(len(whole), 400))
            damaged[place_of_it] ^= generator.randrange(1, 256)
        place.write_bytes(damaged)
        refused = not tried(read, place, f"turn {turn}")
        assert refused or kind in ("config", "facts")  # a changed letter of a text is a text
    place.write_bytes(whole + b"x")
    tried(read, place, "more")
    place.unlink()
    assert not tried(read, place, "nothing")


def changed_tensors(tensors):
    "The same tensors with one missing, added, or of another shape, dtype or content."
    for name in [*tensors][:: max(1, len(tensors) // 3)]:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        tensor = tensors[name]
        yield f"no {name}", rest
        yield f"twice {name}", {**tensors, name + "x": tensor.clone()}
        poisoned = tensor.clone()
        poisoned.view(-1)[0] = torch.nan
        for what, other in {
            "flat": tensor.reshape(-1),
            "scalar": tensor.reshape(-1)[0],
            "longer": torch.cat([tensor, tensor]),
            "turned": tensor.transpose(0, -1).contiguous(),
            "nothing": tensor[:0],
            "nan": poisoned,
            "whole": torch.ones_like(tensor).long(),
            "half": tensor.half(),
            "huge": torch.full_like(tensor, 1e300, dtype=torch.float64),
            "below zero": -torch.ones_like(tensor),
            "switch": torch.ones_like(tensor).bool(),
            "float8": tensor.to(torch.float8_e4m3fn),
        }.items():
            if other.shape != tensor.shape or other.dtype != tensor.dtype or not torch.equal(other, tensor):
                yield f"{what} {name}", {**rest, name: other.clone()}
    yield "none", {}


@pytest.mark.parametrize("kind", ["shift", "hooks", "statistics", "run", "coach"])
def test_tensors_that_are_others(files, tmp_path, kind):
    path, read = files[kind]
    place = copied(path, tmp_path)
    tensors, header = read_tensors(path)
    for what, others in changed_tensors(tensors):
        write_tensors(place, others, header)
        taken = tried(read, place, what)
        if what.startswith(("nan", "whole", "switch", "float8")):
            assert not taken, what


def test_tensors_of_an_editor_that_are_others(files, tmp_path):
    path, read = files["editor"]
    place = copied(path, tmp_path)
    tensors, _ = read_tensors(path)
    config = json.loads((path.parent / "config.json").read_text())
    from malmen_repro.files import file_hash

    for what, others in changed_tensors(tensors):
        write_tensors(place, others, {})
        assert not tried(read, place, what)  # the seal is broken
        config["files"]["editor.safetensors"] = file_hash(place)
        (place.parent / "config.json").write_text(json.dumps(config))
        assert not tried(read, place, what) or what.startswith(("half", "huge", "below zero")), what


def changed_values(value, path=()):
    "JSON with one value replaced by others, or gone."
    for other in VALUES:
        yield f"{'.'.join(map(str, path))} = {other!r}", other
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in list(parts)[:12]:
        if isinstance(value, dict):
            yield f"no {name}", {other: kept for other, kept in value.items() if other != name}
        for what, other in changed_values(part, (*path, name)):
            whole = copy.copy(value)
            whole[name] = other
            yield what, whole


@pytest.mark.parametrize("kind", ["shift", "hooks", "statistics", "run", "coach"])
def test_headers_that_are_others(files, tmp_path, kind):
    path, read = files[kind]
    place = copied(path, tmp_path)
    tensors, header = read_tensors(path)
    generator = random.Random(0)
    for name, text in header.items():
        write_tensors(place, tensors, {other: kept for other, kept in header.items() if other != name})
        assert not tried(read, place, f"no {name}")
        texts = ["", "x", "[" * 100_000, "9" * 5_000, "{", "NaN", text + text]
        if name != "format":
            every = list(changed_values(json.loads(text)))
            texts += [json.dumps(other) for _, other in generator.sample(every, min(len(every), 80))]
        for damaged in texts:
            write_tensors(place, tensors, {**header, name: damaged})
            tried(read, place, f"{name}: {damaged[:200]}")


def test_a_config_that_is_another(files, tmp_path):
    path, read = files["config"]
    place = copied(path, tmp_path)
    every = list(changed_values(json.loads(path.read_text())))
    inside = [one for one in every if "config" in one[0]]
    for what, other in inside + random.Random(0).sample(every, 100):
        place.write_text(json.dumps(other))
        taken = tried(read, place, what)
        assert not (taken and what.startswith(("config.rank", "config.blocks", "config.tokens", "method", "files")))


def test_a_million_blocks_are_refused_at_once(files, tmp_path):
    import time

    path, read = files["config"]
    place = copied(path, tmp_path)
    about, start = json.loads(path.read_text()), time.perf_counter()
    for change in ({"blocks": 10**6}, {"rank": 10**9}, {"blocks": 2**31 - 1, "rank": 2**31 - 1}):
        place.write_text(json.dumps({**about, "config": {**about["config"], **change}}))
        assert not tried(read, place, change)
    assert time.perf_counter() - start < 5


# --- a checkpoint


def test_a_checkpoint_damaged_in_any_part(tmp_path):
    path, options = tmp_path / "c.pt", dict(num_facts=3, progress=False)
    train(an_editor(), toy_facts(4), steps=2, checkpoint=path, **options)
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)

    def tried_to_go_on(what):
        editor = an_editor()
        before = copy.deepcopy(editor.networks.state_dict())
        try:
            train(editor, toy_facts(4), steps=3, checkpoint=path, **options)
        except MalmenError as error:
            assert str(path) in str(error), (what, error)
            assert all(torch.equal(tensor, before[name]) for name, tensor in editor.networks.state_dict().items())
            return False
        return True

    generator = random.Random(0)
    for keep in (0, 10, 1000, len(whole) - 1):
        path.write_bytes(whole[:keep])
        assert not tried_to_go_on(f"{keep} bytes")
    for turn in range(10):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 0xFF
        path.write_bytes(damaged)
        tried_to_go_on(f"turn {turn}")
    for part in state:
        torch.save({other: kept for other, kept in state.items() if other != part}, path)
        assert not tried_to_go_on(f"no {part}")
        for value in (None, 3, "x", [], [3], {}, {"x": torch.ones(2)}, torch.ones(2)):
            torch.save({**state, part: value}, path)
            assert not tried_to_go_on(f"{part} = {value}") or (part, value) == ("history", [])
    for part in ("networks", "optimizer"):
        for name in list(state[part])[:3]:
            torch.save({**state, part: {other: kept for other, kept in state[part].items() if other != name}}, path)
            assert not tried_to_go_on(f"no {name}")
    torch.save(state, path)
    assert tried_to_go_on("whole")


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("value", [torch.tensor(torch.nan), torch.ones(3, 3, 3), None, "x"])
def test_moments_of_adam_that_cannot_be(tmp_path, name, value):
    path, options = tmp_path / "c.pt", dict(num_facts=3, progress=False)
    train(an_editor(), toy_facts(3), steps=1, checkpoint=path, **options)
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0][name] = value
    torch.save(state, path)
    with pytest.raises(MalmenError, match="damaged"):
        train(an_editor(), toy_facts(3), steps=2, checkpoint=path, **options)


# --- packed facts


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_packed_facts_with_changed_bytes(tmp_path, pack):
    rows = [replace(fact, subject=f"{i}") for i, fact in enumerate(toy_facts(30))]
    save_facts(rows, tmp_path / "whole.jsonl")
    whole, place, generator = pack((tmp_path / "whole.jsonl").read_bytes()), tmp_path / "facts", random.Random(0)
    for turn in range(60):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        place.write_bytes(damaged)
        tried(read_facts, place, f"turn {turn}")
