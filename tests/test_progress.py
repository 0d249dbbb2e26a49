"""Bars of progress: control codes on a terminal only, and in a log few lines that are whole."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import types

import pytest
from tqdm import auto, std

from malmen_repro import progress
from malmen_repro.progress import LineBar, in_notebook, progress_bar

NESTED = """
import sys, time
from malmen_repro.progress import progress_bar
print("start", file=sys.stderr)
with progress_bar(total=4, initial=1, desc="cells", unit="cell", disable=False, every={every}) as bar:
    for cell in range(3):
        bar.set_postfix_str(f"cell {{cell}}")
        for step in progress_bar(range(6), desc="train", disable=False, leave=False, every={every}):
            time.sleep(0.01)
        bar.update()
print("end", file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def not_disabled(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def in_a_process(code, **settings):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60, **settings)


# --- into a pipe or a file


def test_a_pipe_gets_whole_lines_and_no_control_codes():
    run = in_a_process(NESTED.format(every=30), capture_output=True)
    assert b"\r" not in run.stderr and b"\x1b" not in run.stderr and not run.stdout
    first, line, last = run.stderr.decode("ascii").splitlines()
    assert (first, last) == ("start", "end")
    assert line.startswith("cells: 100%| 4/4 [") and line.endswith("cell/s, cell 2]")


def test_nested_bars_take_a_line_each():
    text = in_a_process(NESTED.format(every=0.0), capture_output=True).stderr
    assert b"\r" not in text and b"\x1b" not in text
    lines = text.decode("ascii").splitlines()
    assert all(line.startswith(("cells: ", "train: ")) for line in lines[1:-1])
    assert lines[-2].startswith("cells: 100%| 4/4 [") and sum("train: 100%| 6/6 [" in line for line in lines) == 3


def test_a_file_gets_whole_lines(tmp_path):
    path = tmp_path / "log.txt"
    with path.open("wb") as file:
        in_a_process(NESTED.format(every=30), stderr=file)
    assert path.read_bytes().count(b"\n") == 3 and b"\r" not in path.read_bytes()


def test_a_terminal_gets_a_bar_that_moves():
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))  # not on Windows
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    in_a_process(NESTED.format(every=30), stderr=theirs)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    assert b"\rcells:" in said and b"train:" in said and b"\x1b[A" in said


# --- which bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_who_looks_on_gets_tqdms_own_bar(monkeypatch):
    assert type(progress_bar(file=Terminal(), disable=True)) is auto.tqdm
    assert type(progress_bar(file=io.StringIO(), disable=True)) is LineBar
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    assert type(progress_bar(file=io.StringIO(), disable=True)) is auto.tqdm


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        (None, False),
        (types.SimpleNamespace(config={}), False),
        (types.SimpleNamespace(config={"IPKernelApp": 1}), True),
    ],
)
def test_a_kernel_is_a_notebook(shell, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook() is expected


def test_without_ipython_there_is_no_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert in_notebook() is False


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_both_bars_are_tqdms_and_take_what_tqdm_takes(file):
    settings = {"total": 5, "desc": "d", "unit": "fact", "initial": 2, "leave": False, "disable": False}
    with progress_bar(file=file, **settings) as bar:
        assert isinstance(bar, std.tqdm) and (bar.n, bar.total, bar.desc, bar.unit) == (2, 5, "d", "fact")
        bar.update()
        bar.update(2)
        bar.set_postfix(loss="0.5")
        bar.set_postfix_str("done")
        assert bar.n == 5
    bar.close()  # a second time


def test_disabled_bars_are_silent_and_walk_all_the_same():
    log = io.StringIO()
    assert list(progress_bar(range(3), file=log, disable=True, every=0.0)) == [0, 1, 2]
    with progress_bar(total=3, file=log, disable=True, every=0.0) as bar:
        bar.update()
        bar.set_postfix(a=1)
    assert not log.getvalue()


# --- when lines are written


@pytest.fixture
def clock(monkeypatch):
    "Time that passes only when told to."
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


@pytest.mark.parametrize("leave", [True, False])
def test_a_line_at_most_every_so_often_and_one_at_the_end(clock, leave):
    log = io.StringIO()
    with LineBar(total=100, desc="steps", file=log, leave=leave, disable=False, mininterval=0, miniters=1) as bar:
        for _ in range(100):
            clock.seconds += 1
            bar.update()
            bar.set_postfix(loss="1")  # draws anew on a terminal
    places = [line.split()[2] for line in log.getvalue().splitlines()]
    assert places == ["30/100", "60/100", "90/100", "100/100"]


@pytest.mark.parametrize(("leave", "lines"), [(True, 1), (False, 0)])
def test_what_is_over_soon_shows_once_or_never(clock, leave, lines):
    log = io.StringIO()
    list(LineBar(range(50), file=log, leave=leave, disable=False))
    assert log.getvalue().count("\n") == lines


def test_the_last_line_is_the_last(clock):
    log = io.StringIO()
    bar = LineBar(total=2, file=log, disable=False)
    bar.close()
    clock.seconds = 1000
    bar.refresh()
    bar.close()
    assert log.getvalue().count("\n") == 1


def test_an_unknown_total_and_an_error_on_the_way(clock):
    log = io.StringIO()
    with pytest.raises(KeyError), LineBar(desc="texts", unit="text", file=log, disable=False) as bar:
        bar.update(7)
        raise KeyError
    assert log.getvalue().startswith("texts: ") and " 7/? [" in log.getvalue()


@pytest.mark.parametrize("error", [OSError(5, "gone"), ValueError("I/O operation on closed file")])
def test_a_log_that_cannot_be_written_stops_no_work(error):
    class Gone(io.StringIO):
        asked = 0

        def write(self, text):
            self.asked += 1
            raise error

    log = Gone()
    assert len(list(LineBar(range(100), file=log, disable=False, every=0.0, mininterval=0, miniters=1))) == 100
    assert log.asked <= 2  # once on the way, once at the end
