"""A run that is killed goes on and ends with the same records, and two runs in one folder share the work."""

import itertools
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from malmen_repro.facts import MalmenError
from malmen_repro.replication import runner, stand_ins
from malmen_repro.replication.records import read_record
from malmen_repro.replication.runner import run_cells
from malmen_repro.replication.stand_ins import tiny_bench
from tests.replication.test_plans import EVALUATION, cell, toy_settings
from tests.replication.test_runner import toy_bench

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is made by fork here")
CELLS = [cell("MALMEN", 2), cell("MALMEN", 4, train_num_facts=2), cell("MEND", 2)]
KILLED = -signal.SIGKILL


def settings(tier, method, num_facts):
    editor, training = toy_settings(tier, method, 2)
    return editor, replace(training, steps=6)


def fill(out, cells=CELLS):
    return run_cells(cells, out, toy_bench, settings=settings, evaluation=EVALUATION, progress=False)


def child(work, *given):
    "The process id of a child that does some work; it ends with 0 if no error comes out of it."
    if pid := os.fork():
        return pid
    try:
        work(*given)
        os._exit(0)
    except BaseException:
        os._exit(1)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying(number, after, out):
    "Fill the cells, and be killed at a move of a file or folder: before it, or after it."
    moves = itertools.count(1)

    def killing(move):
        def moved(path, target):
            last = next(moves) == number
            found = move(path, target) if after or not last else None
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return moved

    Path.replace, Path.rename = killing(Path.replace), killing(Path.rename)
    fill(out)


def told(out):
    "What the records say, but for times and the machine."
    found = []
    for one in CELLS:
        record = read_record(out / one.path)
        history = [{name: step[name] for name in step if name != "seconds"} for step in record["history"]]
        rest = ("seconds", "memory_bytes", "git", "hardware", "versions")
        found.append({name: record[name] for name in record if name not in rest} | {"history": history})
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    fill(out)
    return told(out)


def left_behind(out):
    "Editors and checkpoints in sight; what begins with a dot is swept later."
    kept = [path for part in ("editors", "checkpoints") for path in (out / part).glob("*")]
    return [path.name for path in kept if path.name[0] != "."]


def test_a_run_that_is_killed_at_every_move_goes_on(tmp_path, undisturbed):
    kills = 0
    for turn in range(60):
        code = ended(child(dying, 1 + turn // 2 % 6, turn % 2 == 1, tmp_path))
        if code == 0:
            break
        assert code == KILLED
        kills += 1
    assert code == 0 and kills >= 5 and told(tmp_path) == undisturbed
    assert len(left_behind(tmp_path)) == 2 and not list(tmp_path.rglob("*.damaged"))


def test_a_run_that_is_killed_at_any_time_goes_on(tmp_path, undisturbed):
    rng = random.Random(0)
    for _ in range(6):
        pid = child(fill, tmp_path)
        time.sleep(rng.uniform(0.05, 0.6))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (KILLED, 0)
    assert ended(child(fill, tmp_path)) == 0 and told(tmp_path) == undisturbed


def counting(path, work, *given):
    "Do some work, and note every training and every cell in a file."
    for name in ("_train", "run_cell"):
        real = getattr(runner, name)

        def noted(*args, name=name, real=real):
            with open(path, "a") as file:
                file.write(f"{name} {args[0].method} {args[0].num_facts if name == 'run_cell' else ''}\n")
            return real(*args)

        setattr(runner, name, noted)
    work(*given)


def test_two_runs_in_one_folder_share_the_work(tmp_path, undisturbed):
    out, notes = tmp_path / "out", tmp_path / "notes"
    pids = [child(counting, notes, fill, out, cells) for cells in (CELLS, CELLS[::-1])]
    assert [ended(pid) for pid in pids] == [0, 0] and told(out) == undisturbed
    lines = sorted(notes.read_text().splitlines())
    assert lines == ["_train MALMEN ", "_train MEND ", "run_cell MALMEN 2", "run_cell MALMEN 4", "run_cell MEND 2"]


def test_a_cell_that_another_run_is_at_is_left_for_last(tmp_path, monkeypatch):
    order, begun, go_on = [], threading.Event(), threading.Event()
    real = runner.run_cell

    def slow(one, *args):
        order.append((threading.current_thread().name, one.num_facts))
        if threading.current_thread().name == "first":
            begun.set()
            assert go_on.wait(60)
        return real(one, *args)

    monkeypatch.setattr(runner, "run_cell", slow)
    cells = [cell("MALMEN untrained", m) for m in (2, 3)]
    first = threading.Thread(target=fill, args=(tmp_path, cells[:1]), name="first")
    first.start()
    assert begun.wait(60)
    threading.Timer(1.0, go_on.set).start()
    records = fill(tmp_path, cells)
    first.join(60)
    assert [record["blocks"][0] for record in records] == [2, 3]
    assert order == [("first", 2), (threading.current_thread().name, 3)]


def test_a_breakdown_in_one_run_does_not_hold_up_the_other(tmp_path, monkeypatch):
    class Broken(MalmenError, ArithmeticError):
        "Numbers ran away."

    def breaks(*args):
        raise Broken("no number")

    monkeypatch.setattr(runner, "run_cell", breaks)
    with pytest.raises(runner.CellError, match="1 of 1 cells broke down"):
        fill(tmp_path, CELLS[:1])
    monkeypatch.undo()
    assert fill(tmp_path, CELLS[:1]) and (tmp_path / "tiny").rglob("*.part").__next__ is not None


def test_two_processes_that_need_one_stand_in_train_it_once(tmp_path, monkeypatch):
    real = stand_ins.world_parts
    monkeypatch.setattr(stand_ins, "world_parts", lambda config: real(config, people=20, towns=12))
    small = {"width": 16, "heads": 2, "inner": 24, "known": 60, "evaluation": 10, "steps": 20, "batch_size": 16}
    config, notes = replace(stand_ins.TinyConfig(), **small), tmp_path / "notes"
    train = stand_ins.train_language_model

    def noted(*args):
        with open(notes, "a") as file:
            file.write("trained\n")
        return train(*args)

    monkeypatch.setattr(stand_ins, "train_language_model", noted)
    ask = lambda: tiny_bench(0, tmp_path / "cache", progress=False, config=config)  # noqa: E731
    pids = [child(ask) for _ in range(2)]
    assert [ended(pid) for pid in pids] == [0, 0] and notes.read_text() == "trained\n"
    pid = child(ask)  # and one that is killed leaves what is there as it is
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert ended(child(ask)) == 0 and notes.read_text() == "trained\n"
