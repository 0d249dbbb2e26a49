"""Records: hashes and fingerprints, where and with what a run was made, writing, reading, going on."""

import itertools
import json
import math
import os
import platform
import subprocess
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from malmen_repro.evaluation import plain
from malmen_repro.facts import Fact, MalmenError, facts_hash, sha256
from malmen_repro.replication import records
from malmen_repro.replication.benches import TIERS
from malmen_repro.replication.commands import OTHERS
from malmen_repro.replication.plans import EXPERIMENTS, METHODS, Cell, configuration, trained_for
from malmen_repro.replication.records import (
    RecordConflictError,
    RecordError,
    RecordWarning,
    committed_records,
    differences,
    existing_record,
    fingerprints,
    git_state,
    hardware,
    model_size,
    peak_memory,
    processor,
    read_record,
    read_records,
    reset_peaks,
    resident_bytes,
    versions,
    weights_hash,
    write_record,
)
from malmen_repro.replication.stand_ins import Bench
from tests.handmade import broken, record, write
from tests.toy import toy_classifier, toy_encoder_decoder, toy_facts, toy_model

CPU = torch.device("cpu")


# --- hashes and fingerprints


def test_hash_does_not_depend_on_the_order_of_keys():
    assert sha256({"a": 1, "b": [2]}) == sha256({"b": [2], "a": 1}) != sha256({"a": 1, "b": [3]})
    assert len(sha256(None)) == 64 and set(sha256(1)) <= set("0123456789abcdef")


def test_hash_sees_the_order_of_lists_and_kinds_of_values():
    values = [[1, 2], [2, 1], "1", 1, 1.5, None, True, {}, [], ""]
    assert len({sha256(value) for value in values}) == len(values)


def test_hash_survives_a_trip_through_json():
    value = {"a": [1, 2.5, None, True, "é"], "b": {"c": 1e-06}}
    assert sha256(json.loads(json.dumps(value))) == sha256(value)


def test_hash_of_what_is_not_json():
    with pytest.raises(TypeError):
        sha256({"a": object()})


@pytest.mark.parametrize("make", [toy_model, toy_classifier, toy_encoder_decoder])
def test_weights_hash_sees_any_weight(make):
    lm = make()
    before = weights_hash(lm)
    assert before == weights_hash(make()) != weights_hash(make(seed=1))
    lm.model.get_input_embeddings().weight[3, 3] += 1e-6
    assert weights_hash(lm) != before
    assert weights_hash(make(torch.bfloat16)) != before


def test_weights_hash_does_not_depend_on_the_edited_layers():
    assert weights_hash(toy_model(last=1)) == weights_hash(toy_model(last=3))


def test_facts_hash_ignores_the_source_and_sees_the_order():
    facts = toy_facts(3)
    elsewhere = [replace(fact, source="elsewhere, line 1") for fact in facts]
    assert facts_hash(facts) == facts_hash(elsewhere) == facts_hash(iter(facts)) != facts_hash(facts[::-1])


def test_facts_hash_sees_every_field_but_the_source():
    fact = Fact("p", "a", ("q",), "u", "v", "s", "r", "b")
    hashes = {facts_hash([fact]), facts_hash([]), facts_hash([fact, fact])}
    names = [one.name for one in fields(Fact) if one.name != "source"]
    for name in names:
        hashes.add(facts_hash([replace(fact, **{name: ("z",) if name == "equivalent_prompts" else "z"})]))
    assert len(hashes) == 3 + len(names)


def test_fingerprints_tell_what_is_other():
    def bench(lm=None, train=3, evaluated=4, name="toys"):
        return Bench(lm or toy_model(), toy_facts(train), {name: toy_facts(evaluated, seed=1)}, {"made": "here"})

    base = fingerprints(bench())
    assert base == fingerprints(bench()) and json.loads(json.dumps(base)) == base
    assert differences(base, fingerprints(bench(toy_model(seed=1)))) == ["language_model"]
    assert differences(base, fingerprints(bench(train=2))) == ["train_facts"]
    assert differences(base, fingerprints(bench(evaluated=2))) == ["eval_facts.toys"]
    assert differences(base, fingerprints(bench(name="more"))) == ["eval_facts.more", "eval_facts.toys"]
    assert fingerprints(replace(bench(), provenance={})) == base  # what is in the hands, not what is said of it


# --- where and with what


def test_versions_name_what_results_depend_on():
    found = versions()
    assert {"python", "malmen-repro", "torch", "transformers", "tokenizers", "numpy", "scipy"} == found.keys()
    assert found["python"] == platform.python_version() and found["torch"].startswith(torch.__version__.split("+")[0])


def test_versions_leave_out_what_is_not_installed(monkeypatch):
    def version(name):
        if name == "malmen-repro":
            raise records.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(records, "version", version)
    assert "malmen-repro" not in versions() and versions()["numpy"] == "1"


def test_git_state_of_another_folder(tmp_path):
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None
    assert git_state(Path(__file__).parent) is None  # a folder inside a checkout is not the checkout


def test_git_state_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


def test_git_state_of_a_checkout(tmp_path):
    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *command], check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) is None  # nothing is committed yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    first = git_state(tmp_path)
    assert first["clean"] and len(first["commit"]) == 40
    (tmp_path / "b").write_text("nobody's")
    assert git_state(str(tmp_path)) == first  # an untracked file is not a change
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": first["commit"], "clean": False}


def test_hardware():
    found = hardware(CPU)
    assert found["device"] == "cpu" and found["cpu"] == processor() and found["threads"] == torch.get_num_threads()
    assert "accelerator" not in found and json.dumps(found) and found["cores"] >= 1
    assert found.get("memory_bytes", 1e9) > 1e8


@pytest.mark.parametrize("text", [None, "flags : none\n", ""])
def test_a_processor_without_a_name(monkeypatch, text):
    def read_text(self, *args, **kwargs):
        if text is None:
            raise OSError
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    assert processor() == (platform.processor() or platform.machine())


def test_a_processor_with_a_name(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "flags : x\nmodel name\t: Toy CPU: 2 GHz\nmodel name : other\n")
    assert processor() == "Toy CPU: 2 GHz"


@pytest.mark.skipif(not resident_bytes(), reason="the system does not tell what the process holds")
def test_a_peak_is_of_the_work_since_the_reset():
    held = torch.ones(2**26)  # 256 MiB
    before = peak_memory(CPU)["process"]
    del held
    reset_peaks(CPU)
    assert peak_memory(CPU)["process"] < before - 2**27


def test_peak_memory_is_in_bytes():
    found = peak_memory(CPU)
    assert set(found) == {"process"} and 3e7 < found["process"] < 1e12


@pytest.mark.parametrize(
    ("lm", "kind", "layers"),
    [(toy_model(), "gpt2", 2), (toy_classifier(last=1), "bert", 1), (toy_encoder_decoder(), "t5", 2)],
)
def test_model_size(lm, kind, layers):
    found = model_size(lm)
    assert found["type"] == kind and found["parameters"] == lm.model.num_parameters() and found["dtype"] == "float32"
    assert len(found["edited_layers"]) == layers and json.loads(json.dumps(found)) == found
    assert found["edited_layers"] == {name: list(shape) for name, shape in lm.shapes.items()}


def test_model_size_says_the_dtype():
    assert model_size(toy_model(torch.bfloat16))["dtype"] == "bfloat16"


# --- a file


def test_plain():
    assert plain({"a": [1.23456789, float("nan"), True, None], "b": ("x", math.inf)}) == {
        "a": [1.2346, None, True, None],
        "b": ["x", None],
    }


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(1 / 3, 2, 0.33), (7, 0, 7), (-math.inf, 4, None), ("1.23456", 2, "1.23456"), ([], 4, []), ({}, 4, {}),
     (1e-9, 4, 0.0), ({"a": {"b": [(0.125,)]}}, 2, {"a": {"b": [[0.12]]}})],
)
def test_plain_rounds_numbers_only(value, digits, expected):
    assert plain(value, digits) == expected


def test_record_round_trip(tmp_path):
    one = record()
    write_record(one, tmp_path / "a" / "b.json")
    assert read_record(tmp_path / "a" / "b.json") == read_record(str(tmp_path / "a" / "b.json")) == one
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    assert len((tmp_path / "a" / "b.json").read_text().splitlines()) == len(one) + 2  # a line a field


def test_a_record_keeps_its_order_and_its_bytes(tmp_path):
    one = record(extra={"text": "é\n\"quoted\""})
    write_record(one, tmp_path / "a.json")
    assert list(read_record(tmp_path / "a.json")) == list(one)
    write_record(read_record(tmp_path / "a.json"), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_write_record_refuses_nan_and_keeps_what_was_there(tmp_path):
    write_record({"a": 1}, tmp_path / "r.json")
    with pytest.raises(ValueError):
        write_record({"a": math.nan}, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}


def test_write_record_goes_over_what_is_there_and_over_a_part_left_behind(tmp_path):
    part = tmp_path / ".r.json.1-ab.part"  # of a process that was killed two days ago
    part.write_text("half of a rec")
    os.utime(part, (time.time() - 2 * 86_400,) * 2)
    for value in (1, 2):
        write_record({"a": value}, str(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "{}", '{"hash": 1}', "\x00" * 50, "1", '"text"'])
def test_damaged_records_are_told(tmp_path, damage):
    (tmp_path / "r.json").write_text(damage)
    with pytest.raises(RecordError, match="r.json is damaged"):
        read_record(tmp_path / "r.json")


def test_bytes_that_are_no_text_are_told(tmp_path):
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="r.json is damaged: .*codec can't decode"):
        read_record(tmp_path / "r.json")


def test_a_missing_record_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RecordError, match="is damaged") as caught:
            read_record(path)
        assert isinstance(caught.value, MalmenError) and str(path) in str(caught.value)


@pytest.mark.parametrize("drop", ["scores", "per_fact", "fingerprints", "seconds", "hash", "configuration"])
def test_incomplete_records_are_told(tmp_path, drop):
    write_record({name: value for name, value in record().items() if name != drop}, tmp_path / "r.json")
    with pytest.raises(RecordError, match="r.json is damaged"):
        read_record(tmp_path / "r.json")


def test_a_doctored_configuration_is_told(tmp_path):
    one = json.loads(json.dumps(record()))
    one["configuration"]["cell"]["seed"] = 99
    write_record(one, tmp_path / "r.json")
    with pytest.raises(RecordError, match=f"its configuration hashes to {sha256(one['configuration'])[:16]}, not"):
        read_record(tmp_path / "r.json")


def test_a_record_of_a_breakdown_is_whole(tmp_path):
    write_record(broken(), tmp_path / "r.json")
    assert read_record(tmp_path / "r.json")["extra"]["failure"]["condition"] == "infinite"


# --- going on


def test_no_record_yet(tmp_path):
    assert existing_record(tmp_path / "r.json", {}) is None and not list(tmp_path.iterdir())


def test_the_record_asked_for(tmp_path):
    one = record()
    write_record(one, tmp_path / "r.json")
    assert existing_record(tmp_path / "r.json", one["configuration"]) == one


def test_the_record_of_another_cell_is_in_the_way(tmp_path):
    write_record(record(seed=1), tmp_path / "r.json")
    wanted = record(seed=2)
    with pytest.raises(RecordConflictError, match="cell differ") as caught:
        existing_record(tmp_path / "r.json", wanted["configuration"] | {"cell": 1})
    with pytest.raises(RecordConflictError, match=r"\(hash .*cell.seed differ\): remove it") as caught:
        existing_record(tmp_path / "r.json", wanted["configuration"])
    text = str(caught.value)
    assert record(seed=1)["hash"][:16] in text and wanted["hash"][:16] in text and "r.json" in text
    assert read_record(tmp_path / "r.json")["configuration"]["cell"]["seed"] == 1  # it was left alone


def test_a_damaged_record_is_set_aside(tmp_path):
    path = tmp_path / "r.json"
    for text in ("{", "[1"):  # the second one takes the place of the first
        path.write_text(text)
        with pytest.warns(RecordWarning, match="r.json is damaged.*set aside as r.json.damaged, the cell runs again"):
            assert existing_record(path, {}) is None
        assert not path.exists() and (tmp_path / "r.json.damaged").read_text() == text


def test_differences_name_the_fields():
    theirs = {"schema": 1, "training": {"steps": 1, "seed": 0}, "gone": 1}
    ours = {"schema": 2, "training": {"steps": 2, "seed": 0}}
    assert differences(theirs, ours) == ["gone", "schema", "training.steps"]


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ({}, {}, []),
        ({"a": {"b": 1}}, {"a": {"b": 1}}, []),
        ({"a": {"b": 1}}, {"a": {"c": 1}}, ["a.b", "a.c"]),
        ({"training": {"steps": 1}}, {"training": {}}, ["training.steps"]),
        ({"a": {"b": 1}}, {"a": 1}, ["a"]),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, ["a.b"]),
        ({}, {"a": 1}, ["a"]),
    ],
)
def test_differences(theirs, ours, expected):
    assert differences(theirs, ours) == differences(ours, theirs) == expected


# --- many


def test_read_records_of_one_experiment_and_tier(tmp_path):
    grid = itertools.product(("toy", "other"), ("tiny", "small"))
    write([record(experiment=name, tier=tier, seed=seed) for name, tier in grid for seed in (0, 1)], tmp_path)
    found = read_records(str(tmp_path), "toy", "tiny")
    assert [one["configuration"]["cell"]["seed"] for one in found] == [0, 1]
    assert {(c["experiment"], c["tier"]) for c in (r["configuration"]["cell"] for r in found)} == {("toy", "tiny")}
    assert read_records(tmp_path, "nothing", "tiny") == read_records(tmp_path / "nowhere", "toy", "tiny") == []


def test_read_records_count_numbers_as_numbers(tmp_path):
    write([record(m=m, seed=seed) for m in (1024, 2, 16, 256) for seed in (10, 9)], tmp_path)
    cells = [one["configuration"]["cell"] for one in read_records(tmp_path, "toy", "tiny")]
    places = [(one["num_facts"], one["seed"]) for one in cells]
    assert places == sorted(places) and len(places) == 8


def test_read_records_leaves_other_files_alone(tmp_path):
    write([record()], tmp_path)
    for name in ("x.json.damaged", "x.json.part", "notes.txt"):
        (tmp_path / "tiny" / "toy" / name).write_text("{")
    assert len(read_records(tmp_path, "toy", "tiny")) == 1


def test_read_records_tells_of_a_damaged_one(tmp_path):
    write([record()], tmp_path)
    (tmp_path / "tiny" / "toy" / "x.json").write_text("{")
    with pytest.raises(RecordError, match="x.json is damaged"):
        read_records(tmp_path, "toy", "tiny")


def with_setting(one, **changes):
    "The record with other settings."
    asked = one["configuration"] | changes
    return one | {"configuration": asked, "hash": sha256(asked)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"tier": "small"}, "its tier is 'small'"), ({"experiment": "other"}, "its experiment is 'other'")],
)
def test_a_record_of_another_tier_or_experiment_is_refused(tmp_path, changes, reason):
    write([record()], tmp_path)
    write_record(record(seed=1, **changes), tmp_path / "tiny" / "toy" / "stray.json")
    with pytest.raises(RecordConflictError, match=f"stray.json does not belong there: {reason}"):
        read_records(tmp_path, "toy", "tiny")


def test_a_second_record_of_a_cell_is_refused(tmp_path):
    for copy in (record(mean=0.9), with_setting(record(), training={"steps": 9})):
        write([record()], tmp_path)
        write_record(copy, tmp_path / "tiny" / "toy" / "zzz.json")
        with pytest.raises(RecordConflictError, match="zzz.json is a second record of the cell of toys-malmen-m16-s0"):
            read_records(tmp_path, "toy", "tiny")


@pytest.mark.parametrize(
    ("theirs", "names"),
    [
        ({"training": {"steps": 9, "seed": 1}}, "training.steps differ"),
        ({"training": {"steps": 5, "seed": 1}, "editor": {"rank": 3}}, "editor differ"),
        ({"training": {"steps": 5, "seed": 1}, "schema": 2}, "schema differ"),
    ],
)
@pytest.mark.parametrize("place", [{"seed": 1}, {"m": 16, "data_set": "other"}])
def test_records_of_one_method_with_different_settings_are_refused(tmp_path, theirs, names, place):
    made = [with_setting(record(), training={"steps": 5, "seed": 0}), with_setting(record(**place), **theirs)]
    write(made, tmp_path)
    with pytest.raises(RecordConflictError, match=f"had different settings: {names}"):
        read_records(tmp_path, "toy", "tiny")


def test_other_methods_trainings_and_seeds_have_settings_of_their_own(tmp_path):
    made = [with_setting(record(seed=seed), training={"seed": seed, "inner": {"seed": seed}}) for seed in (0, 1)]
    made += [with_setting(record("MEND"), training={"seed": 0, "steps": 3}), record(m=64)]  # trained for 64
    write(made, tmp_path)
    assert len(read_records(tmp_path, "toy", "tiny")) == 4


def test_records_of_no_cell_are_read_wherever_they_lie(tmp_path):
    for name in ("a", "b"):
        asked = {"what": name}
        write_record(record() | {"configuration": asked, "hash": sha256(asked)}, tmp_path / "x" / "y" / f"{name}.json")
    assert [one["configuration"]["what"] for one in read_records(tmp_path, "y", "x")] == ["a", "b"]


def test_every_folder_of_committed_records_can_be_read():
    folders = {path.parent for path in committed_records().glob("**/*.json") if path.parts[-3] in TIERS}
    counts = {one: len(read_records(one.parents[1], one.name, one.parent.name)) for one in folders}
    assert counts and counts == {one: len(list(one.glob("*.json"))) for one in folders}


def test_committed_records_lie_in_the_source_tree(monkeypatch, tmp_path):
    assert committed_records() == Path(__file__).resolve().parents[2] / "records"
    monkeypatch.setattr(records, "SOURCE_TREE", tmp_path)
    assert committed_records() is None  # a package that was installed from a wheel
    (tmp_path / "records").mkdir()
    assert committed_records() == tmp_path / "records"


COMMITTED = sorted(path for tier in TIERS for path in (committed_records() / tier).glob("*/*.json"))
OF_CELLS = [path for path in COMMITTED if path.parent.name in EXPERIMENTS]


def place_of(path):
    return f"{path.parts[-3]}-{path.parts[-2]}-{path.stem}"


@pytest.mark.parametrize("path", COMMITTED, ids=place_of)
def test_a_committed_record_is_whole_and_names_no_place_of_a_machine(path):
    one = read_record(path)
    texts = json.dumps([one["configuration"], one["hardware"], one["versions"], one.get("bench")])
    assert not any(place in texts for place in ("/root", "/home", "/tmp", "/work"))
    assert one["git"] is None or len(one["git"]["commit"]) == 40


@pytest.mark.parametrize("path", OF_CELLS, ids=place_of)
def test_a_committed_record_of_a_cell_lies_where_the_cell_says(path):
    one = read_record(path)
    cell = Cell(**one["configuration"]["cell"])
    assert path == committed_records() / cell.path and cell.method in METHODS
    assert cell.tier in EXPERIMENTS[cell.experiment].plans
    scored = {"ES", "GS", "LS", "LS before"} <= one["scores"].keys()
    assert scored != bool(one["extra"].get("failure")) and one["model"]["parameters"] > 0
    assert one["extra"].get("failure") or set(EXPERIMENTS[cell.experiment].extras) <= one["extra"].keys()


# Records made with settings that are not those of the code now, and why they stand. Empty is best.
OTHER_SETTINGS: dict[str, str] = {}


def test_a_committed_record_of_a_cell_has_the_settings_of_the_code_now():
    now = {}
    for path in (*OF_CELLS, *(committed_records() / "h100").glob("*/*/*.json")):
        one = read_record(path)
        wanted = configuration(Cell(**one["configuration"]["cell"]))
        if one["hash"] != sha256(wanted):
            now[str(path.relative_to(committed_records()))] = differences(one["configuration"], wanted)
    assert now.keys() == OTHER_SETTINGS.keys(), {name: now.get(name) for name in now.keys() ^ OTHER_SETTINGS.keys()}


def test_a_committed_record_was_trained_as_its_experiment_plans():
    "Numbers of facts, seeds and methods may be more than the plan's; what an editor was trained for is the plan's."
    for path in OF_CELLS:
        cell = Cell(**read_record(path)["configuration"]["cell"])
        plan = EXPERIMENTS[cell.experiment].plans[cell.tier]
        assert cell.train_num_facts == trained_for(plan, cell.num_facts), path
        assert cell.family == EXPERIMENTS[cell.experiment].family and cell.method in (*plan.methods, *plan.full_methods)


def test_records_that_lie_in_a_tier_belong_to_an_item():
    assert COMMITTED and {path.parent.name for path in COMMITTED} <= EXPERIMENTS.keys() | OTHERS.keys()


@pytest.mark.parametrize("tier", TIERS)
def test_committed_records_of_one_experiment_and_seed_had_the_same_bench(tier):
    "What a figure compares was measured on one model. Two processors round differently, so experiments may have two."
    benches = {}
    for path in (path for path in OF_CELLS if path.parent.parent.name == tier):
        one = read_record(path)
        cell = Cell(**one["configuration"]["cell"])
        place = cell.experiment, cell.seed if tier == "tiny" else 0
        benches.setdefault(place, set()).add(sha256(one["fingerprints"]))
    assert all(len(hashes) == 1 for hashes in benches.values())
