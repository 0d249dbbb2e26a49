"""The files of this package: whole or not at all, one unit where two belong together, and every error a typed one."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from malmen_repro import files
from malmen_repro.files import (
    FileError,
    check_output,
    file_hash,
    folder_replacing,
    locked,
    parse_json,
    read_bytes,
    read_json,
    read_sealed,
    replacing,
    write_bytes,
    write_json,
    write_sealed,
    write_text,
)

posix = pytest.mark.skipif(os.name != "posix", reason="what POSIX systems do")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- one file


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_what_the_umask_says(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as part:
            part.unlink()
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))  # as some libraries write
        with folder_replacing(tmp_path / "b") as part:
            (part / "c").write_text("c")
            (part / "c").chmod(0o600)
        write_sealed(tmp_path / "d.json", {}, {"e": lambda part: part.write_text("e")})
    finally:
        os.umask(old)
    for path in (tmp_path / "a", tmp_path / "b" / "c", tmp_path / "d.json", tmp_path / "e"):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    write_text(tmp_path / "a", "old")
    with pytest.raises(error), replacing(tmp_path / "a") as part:
        part.write_text("ne")
        raise error
    with pytest.raises(error), folder_replacing(tmp_path / "b") as part:
        (part / "c").write_text("ne")
        raise error
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("two\nlines"), ValueError("no")])
def test_what_a_writing_library_raises_becomes_an_error_with_the_files_name(tmp_path, error):
    with pytest.raises(FileError, match=f"{tmp_path / 'a'} cannot be written: (No space|two|no$)"):
        with replacing(tmp_path / "a"):
            raise error
    assert not names(tmp_path)


def test_threads_that_write_the_same_file_do_not_mix(tmp_path):
    texts, errors = [str(i) * 100_000 for i in range(4)], []

    def write(text):
        try:
            for _ in range(10):
                write_text(tmp_path / "a", text)
                assert (tmp_path / "a").read_text() in texts
        except BaseException as error:  # a thread's error is lost otherwise
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and (tmp_path / "a").read_text() in texts and names(tmp_path) == ["a"]


@posix
def test_a_full_disk_leaves_the_old_file(tmp_path):
    import resource
    import signal

    write_bytes(tmp_path / "a", b"old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # the nearest to a full disk that needs no root
    try:
        with pytest.raises(FileError, match="a cannot be written: File too large"):
            write_bytes(tmp_path / "a", bytes(2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_what_dead_processes_left_is_removed_after_a_day(tmp_path):
    for name, age in ((".a.1-x.part", 100_000), (".a.2-x.part", 10), (".b.1-x.part", 100_000)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, (tmp_path / name).stat().st_mtime - age))
    write_text(tmp_path / "a", "new")
    assert names(tmp_path) == [".a.2-x.part", ".b.1-x.part", "a"]


# --- a folder, and files that belong together, stopped at every point


class Stop(BaseException):
    "The process is gone: no handler runs any more."


def stopped_at_every_point(monkeypatch, make, check):
    "Run `make` again and again, stopped before its 1st, 2nd, … change of the disk; `check` looks at what is there."
    changes = ("replace", "rename", "open", "fsync", "mkdir", "unlink", "rmdir", "chmod")
    for point in range(1, 200):
        left, dead = [point], []

        def counted(real, left=left, dead=dead):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] <= 0:
                    dead.append(True)
                    raise Stop
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in changes:
                patch.setattr(os, name, counted(getattr(os, name)))
            real = files._exchange
            patch.setattr(files, "_exchange", counted(real))
            try:
                make()
            except Stop:
                pass
        check()
        if not dead:
            return point
    raise AssertionError("it never came to an end")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_the_old_or_the_new_one_wherever_its_writer_is_stopped(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    place, seen = tmp_path / "folder", set()

    def fill(text):
        with folder_replacing(place) as part:
            (part / "a").write_text(text)
            (part / "b").write_text(text)

    def check():
        if not exchange and not place.exists():  # stopped between two moves: the next writer puts the old one back
            with pytest.raises(ZeroDivisionError), folder_replacing(place):
                raise ZeroDivisionError
        found = {(place / name).read_text() for name in ("a", "b")}
        assert len(found) == 1
        seen.update(found)
        fill("old")

    fill("old")
    assert stopped_at_every_point(monkeypatch, lambda: fill("new"), check) > 5
    assert seen == {"old", "new"}


def test_files_that_belong_together_are_old_or_new_wherever_their_writer_is_stopped(tmp_path, monkeypatch):
    seal, seen = tmp_path / "config.json", set()

    def write(text):
        write_sealed(seal, {"is": text}, {"weights": lambda part: part.write_text(text)})

    def check():
        about = read_sealed(seal)
        assert about["is"] == (tmp_path / "weights").read_text()
        seen.add(about["is"])

    for text in ("old", "new", "newer"):  # each begins where the last one was stopped
        write("old")
        assert stopped_at_every_point(monkeypatch, lambda text=text: write(text), check) > 5
    assert seen == {"old", "new", "newer"}
    write("last")
    assert [name for name in names(tmp_path) if not name.endswith(".part")] == ["config.json", "weights"]


def test_a_stop_between_two_neighbours_is_noticed(tmp_path):
    seal = tmp_path / "config.json"
    write_sealed(seal, {}, {name: lambda part: part.write_text("old") for name in "ab"})
    read_sealed(seal)
    (tmp_path / "a").write_text("new")
    with pytest.raises(FileError, match=r"config.json and the files beside it do not belong together"):
        read_sealed(seal)
    (tmp_path / "a").unlink()
    with pytest.raises(FileError, match=f"there is no file {tmp_path / 'a'}"):
        read_sealed(seal)


@pytest.mark.parametrize("names", [None, 3, [], {"": "0"}, {"..": "0"}, {"../a": "0"}, {"a/b": "0"}])
def test_a_seal_names_files_beside_it_and_no_others(tmp_path, names):
    write_json(tmp_path / "config.json", {"files": names})
    with pytest.raises(FileError, match="does not say which files belong to it"):
        read_sealed(tmp_path / "config.json")


def test_a_first_write_that_was_stopped_before_its_last_move_is_whole(tmp_path):
    write_sealed(tmp_path / "c.json", {"is": "new"}, {"a": lambda part: part.write_text("new")})
    (tmp_path / "c.json").rename(tmp_path / ".c.json.next")
    assert read_sealed(tmp_path / "c.json")["is"] == "new"


# --- reading


@posix
def test_what_is_no_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    wrong = {tmp_path / "pipe": "no ordinary file", tmp_path: "a folder", tmp_path / "none": "no file", "a\0b": "null"}
    for path, message in wrong.items():
        for read in (read_bytes, read_json, file_hash):
            with pytest.raises(FileError, match=message):
                read(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5_000, b"\xff\xfe", '"a', "{} {}"])
def test_what_is_no_json_is_a_typed_error(tmp_path, text):
    with pytest.raises(FileError, match="a.json"):
        parse_json(text, "a.json")
    write_bytes(tmp_path / "a.json", text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError, match="a.json"):
        read_json(tmp_path / "a.json")


def test_a_file_above_the_limit_is_refused(tmp_path):
    write_bytes(tmp_path / "a", bytes(9))
    with pytest.raises(FileError, match="has 9 bytes; at most 8 are read"):
        read_bytes(tmp_path / "a", limit=8)
    assert read_bytes(tmp_path / "a", limit=9) == bytes(9)


def test_json_comes_back(tmp_path):
    value = {"ä": [1, 2.5, None, "\u2028"]}
    assert read_json(write_json(tmp_path / "deep" / "a.json", value, indent=1)) == value
    assert json.loads((tmp_path / "deep" / "a.json").read_text(encoding="utf-8")) == value


# --- before the work


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    check_output(tmp_path / "new" / "deep" / "a")
    check_output(tmp_path / "file")
    check_output(tmp_path / "folder", folder=True)
    for path, options, message in (
        (tmp_path / "folder", {}, "is a folder; a file is to be written"),
        (tmp_path / "file", {"folder": True}, "is a file; a folder is to be written"),
        (tmp_path / "file" / "a", {}, "file is a file"),
        (tmp_path / "a", {"room": 10**18}, r"its disk has [\d,.]+ MB left"),
        ("a\0b", {}, "cannot be written"),
    ):
        with pytest.raises(FileError, match=message):
            check_output(path, **options)
    assert names(tmp_path) == ["file", "folder"]


# --- one at a time


def test_a_lock_is_held_by_one_thread_at_a_time_and_freed_after_an_error(tmp_path):
    told = []
    with locked(tmp_path / "state"):
        with pytest.raises(FileError, match="in use by another process"):
            with locked(tmp_path / "state", 0, lambda: told.append("somebody has it")):
                raise AssertionError("two hold the lock")
    assert told == ["somebody has it"]
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "state"):
        raise ZeroDivisionError
    with locked(tmp_path / "state", 0):
        pass


def test_ten_threads_that_add_to_a_file_lose_nothing(tmp_path):
    write_json(tmp_path / "count", 0)

    def add():
        with locked(tmp_path / "count"):
            write_json(tmp_path / "count", read_json(tmp_path / "count") + 1)

    threads = [threading.Thread(target=add) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_json(tmp_path / "count") == 10


def test_an_error_of_files_is_an_os_error_with_a_name():
    assert issubclass(FileError, OSError)
    with pytest.raises(OSError, match="nowhere"):
        read_bytes(Path("nowhere"))
