"""What the commands share: tables, worker processes, the device."""

import os
import time
from pathlib import Path

import pytest
import torch
from fresh import CONTEXT

from lmnfast.runs import pool as pool_module
from lmnfast.runs.device import settled_device, torch_threads
from lmnfast.runs.pool import Pool
from lmnfast.runs.tables import check_continues, joined, read_table, write_table

COLUMNS = ("step", "checkpoint", "lmn_a", "samples", "negative_share_a")


def rows(*steps):
    return [
        {"step": step, "checkpoint": 'a, "b"', "lmn_a": 1 / 3, "samples": 12, "negative_share_a": 0.25}
        for step in steps
    ]


# Tables


def test_a_table_has_seven_digits_and_is_the_same_when_written_again(tmp_path):
    path = tmp_path / "new" / "a.csv"
    write_table(path, COLUMNS, rows(0, 0.123456789, 12345678))
    text = path.read_bytes()
    assert text.splitlines()[1] == b'0,"a, ""b""",0.3333333,12,0.25'
    read = read_table(path, COLUMNS)
    assert [row["step"] for row in read] == [0, 0.123456789, 12345678] and type(read[0]["step"]) is int
    assert read[1]["lmn_a"] == 0.3333333 and read[1]["checkpoint"] == 'a, "b"'
    write_table(path, COLUMNS, read)
    assert path.read_bytes() == text and read_table(path) == read


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda text: text[:-1], "its last line has no end"),
        (
            lambda text: text.replace(b"lmn_a", b"lmn_b"),
            "lacks the columns lmn_a, another version of lmnfast",
        ),
        (lambda text: text.replace(b"lmn_a,samples", b"samples,lmn_a"), "expected the columns step, "),
        (lambda text: text.replace(b",12,", b",12,3,", 1), "expected 5 entries in line 2, got 6"),
        (lambda text: text.replace(b",12,", b",1.5,"), "invalid literal"),
        (lambda text: text.replace(b"0.3333333", b"nan"), "lmn_a is nan"),
        (lambda text: text.replace(b"0.3333333", b""), "could not convert string to float"),
        (lambda text: b"\xef\xbb\xbf" + text, "lacks the columns step"),
    ],
)
def test_a_damaged_table_is_refused_with_the_reason(damage, said, tmp_path):
    path = tmp_path / "a.csv"
    write_table(path, COLUMNS, rows(0, 1))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=said):
        read_table(path, COLUMNS)


def test_a_share_may_be_nan_and_what_is_optional_may_be_empty(tmp_path):
    path = tmp_path / "a.csv"
    write_table(path, COLUMNS, [row | {"negative_share_a": float("nan"), "samples": ""} for row in rows(0)])
    (row,) = read_table(path, COLUMNS, optional=("samples",))
    assert row["negative_share_a"] != row["negative_share_a"] and row["samples"] == ""
    with pytest.raises(ValueError, match="invalid literal"):
        read_table(path, COLUMNS)


def test_what_does_not_continue_is_refused_by_its_differences():
    stored = {"steps": 10, "layers": ["a"], "seed": 0}

    def check(given, **more):
        check_continues(Path("run"), "another run", stored, given, otherwise=", or --force", **more)

    def grows(name, old, new):
        return name == "steps" and new > old

    check(stored)
    check(stored | {"steps": 20}, may_change=grows)
    with pytest.raises(ValueError) as error:
        check(stored | {"steps": 5, "layers": ["a", "b"]}, may_change=grows)
    said = "out: run holds another run: steps is 10 there, 5 here; layers is a there, a, b here; choose another --out"
    assert str(error.value) == f"{said}, or --force"
    with pytest.raises(ValueError, match="steps is 10 there, 5 here; choose"):
        check({"steps": 5, "seed": 1}, most=1)


def test_words_of_several_layers_are_joined_once():
    assert joined("cpu", "cpu") == "cpu" and joined("cuda", "cpu") == joined("cpu+cuda", "cpu") == "cpu+cuda"


# Processes


def double(number):
    return 2 * number


def fail_or_wait(folder, number):
    if number == 0:
        raise ValueError("zero")
    Path(folder, str(number)).touch()
    time.sleep(0.2)
    return number


def die_once(file):
    if not os.path.exists(file):
        Path(file).touch()
        os._exit(1)
    return os.getpid()


def die(_):
    os._exit(1)


def begin(folder, threads):
    Path(folder, str(os.getpid())).touch()
    torch.set_num_threads(threads)


def threads_of(_):
    return torch.get_num_threads()


@pytest.fixture
def quick(monkeypatch):
    """The pool's processes start without an import of PyTorch. Those of tests/test_checkpoints.py start as a user's do."""
    monkeypatch.setattr(pool_module.multiprocessing, "get_context", lambda _: CONTEXT)


def test_every_job_has_its_outcome_and_each_process_begins_as_told(quick, tmp_path):
    ticks = []
    with Pool(2, begin, (str(tmp_path), 1)) as pool:
        found = {
            outcome.job: outcome.result
            for outcome in pool.outcomes(double, [(n,) for n in range(5)], lambda: ticks.append(1))
        }
        assert found == {(n,): 2 * n for n in range(5)} and ticks
    assert 1 <= len(list(tmp_path.iterdir())) <= 2
    with Pool(1, begin, (str(tmp_path), 1)) as pool:
        assert [outcome.result for outcome in pool.outcomes(threads_of, [(0,)])] == [1]


def test_a_job_that_fails_ends_no_other_and_those_not_begun_can_be_left(quick, tmp_path):
    jobs = [(str(tmp_path), n) for n in range(30)]
    with Pool(1) as pool:
        outcomes = list(pool.outcomes(fail_or_wait, jobs[:4]))
    assert [outcome.result for outcome in outcomes] == [None, 1, 2, 3]
    assert isinstance(outcomes[0].error, ValueError) and outcomes[1].error is None
    with Pool(1) as pool:
        kept = []
        for outcome in pool.outcomes(fail_or_wait, jobs):
            kept.append(outcome)
            pool.leave_waiting()
    assert kept[0].error is not None and len(kept) < 10


def wait_then_die(folder, number):
    """The second job of two processes dies, when the first has failed and its error is known."""
    if number == 0:
        raise ValueError("no")
    if number == 1:
        while not Path(folder, "left").exists():
            time.sleep(0.01)
        os._exit(1)
    time.sleep(600)


def test_a_process_may_die_after_jobs_were_dropped(quick, tmp_path):
    with Pool(1) as pool:
        (outcome,) = (
            leave(pool, tmp_path, outcome)
            for outcome in pool.outcomes(wait_then_die, [(str(tmp_path), n) for n in range(30)])
        )
    assert outcome.job == (str(tmp_path), 0) and isinstance(outcome.error, ValueError)


def leave(pool, folder, outcome):
    pool.leave_waiting()
    (folder / "left").touch()
    return outcome


def test_an_error_of_the_caller_ends_the_processes_at_once(quick):
    started = time.monotonic()
    with pytest.raises(KeyError), Pool(1) as pool:
        outcomes = pool.outcomes(time.sleep, [(0,), (600,)])
        next(outcomes)
        raise KeyError
    assert time.monotonic() - started < 300


def test_a_process_that_dies_is_replaced_but_not_for_ever(quick, tmp_path, capfd, monkeypatch):
    with Pool(1) as pool:
        (outcome,) = pool.outcomes(die_once, [(str(tmp_path / "died"),)])
    assert outcome.result not in (None, os.getpid())
    assert capfd.readouterr().err.count("a process died; going on with what it left") == 1
    monkeypatch.setattr(pool_module, "DEATHS", 1)  # each costs the start of a process
    with pytest.raises(OSError, match="jobs: a process died again and again"), Pool(1) as pool:
        list(pool.outcomes(die, [(0,)]))
    assert capfd.readouterr().err.count("a process died; going on") == 1


# Device


def test_auto_is_the_stored_device_or_the_best_there_is(monkeypatch):
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert settled_device("auto") == ("cuda" if cuda else "cpu")
        assert settled_device("auto", "cpu") == settled_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, stored in (("cuda", None), ("auto", "cuda")):
        with pytest.raises(ValueError, match="device: cuda is not available"):
            settled_device(name, stored)
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda, got 'tpu'"):
        settled_device("tpu")


def test_the_number_of_threads_comes_back_also_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
