"""Files are written whole, by any number of processes, threads and machines at once."""

import os
import threading
import time
from pathlib import Path

import pytest
from support import GONE

from lmnfast import _files
from lmnfast._files import part_name, remove_parts, write_file

DAY = 24 * 3600


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.csv"


def names(path):
    return {file.name for file in path.parent.iterdir()}


def elsewhere(monkeypatch, do):
    """Does something as a process of another machine, from which no process of this one can be seen."""
    with monkeypatch.context() as patched:
        patched.setattr(_files, "machine", lambda: "0123abcd")
        patched.setattr(_files, "_alive", lambda _: False)
        return do()


def test_what_a_killed_write_has_left_is_deleted_by_the_next_and_others_parts_are_not(path):
    left, others = part_name("a.csv", GONE), {part_name("a.csv", os.getppid()), part_name("b.csv", GONE)}
    for name in (left, *others):
        (path.parent / name).touch()
    write_file(path, b"x")
    assert names(path) == {"a.csv", *others}
    with pytest.raises(IsADirectoryError):
        write_file(path.parent, b"x")


def test_machines_that_write_one_file_at_once_do_not_disturb_each_other(path, monkeypatch):
    def content(file):
        file.write(b"ours, ")
        file.flush()
        elsewhere(monkeypatch, lambda: write_file(path, b"theirs"))
        assert path.read_bytes() == b"theirs"
        file.write(b"whole")

    write_file(path, content)
    assert path.read_bytes() == b"ours, whole" and names(path) == {"a.csv"}


def test_parts_of_another_machine_are_deleted_when_they_are_old(path, monkeypatch):
    new, old = (elsewhere(monkeypatch, lambda n=n: part_name("a.csv", os.getpid() + n)) for n in (0, 1))
    for name, age in ((new, 0.9 * DAY), (old, 1.1 * DAY)):
        (path.parent / name).touch()
        os.utime(path.parent / name, times=(time.time() - age,) * 2)
    write_file(path, b"x")
    assert names(path) == {"a.csv", new}


def test_machines_containers_processes_and_threads_have_parts_of_their_own(monkeypatch):
    found = {part_name("a", 1), part_name("a", 2)}
    thread = threading.Thread(target=lambda: found.add(part_name("a", 1)))
    thread.start()
    thread.join()
    with monkeypatch.context() as patched:
        patched.setattr(_files.socket, "gethostname", lambda: "another")
        found.add(part_name("a", 1))
    with monkeypatch.context() as patched:  # containers whose machines have one name
        patched.setattr(os, "readlink", lambda _: "pid:[1]")
        found.add(part_name("a", 1))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", lambda _: "another boot")
        found.add(part_name("a", 1))
    assert len(found) == 6 and _files.machine() == _files.machine()


def test_a_system_without_proc_has_a_word_for_its_machine(monkeypatch):
    def missing(_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert len(_files.machine()) == 8


def test_a_part_that_has_gone_is_one_error_that_names_the_file(path):
    def content(file):
        file.write(b"x")
        (part,) = path.parent.iterdir()
        part.unlink()

    with pytest.raises(FileNotFoundError, match=r"its part a\.csv\..*\.part was deleted .*a\.csv'$"):
        write_file(path, content)
    assert names(path) == set()


def test_a_part_that_only_its_owner_may_delete_stays_and_the_file_is_written(path, monkeypatch):
    left = part_name("a.csv", GONE)
    (path.parent / left).touch()

    def refused(self, missing_ok=False):
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refused)
    write_file(path, b"x")
    assert names(path) == {"a.csv", left}


def test_files_that_are_named_alike_are_no_parts(path):
    mine = {"a.csv.part", "a.csv.mine.part", f"a.csv.{GONE}.part", f"a.csv.0123ABCD-{GONE}-1.part"}
    for name in mine:
        (path.parent / name).touch()
        os.utime(path.parent / name, times=(0, 0))
    remove_parts(path)
    assert names(path) == mine
