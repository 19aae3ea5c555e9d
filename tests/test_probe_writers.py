"""What a probe hands on: new rows, to writers, and a state to go on from."""

import threading

import pytest
import torch

import lmnfast.probe
from lmnfast.probe import Probe
from lmnfast.spectrum import measurement


class Recorder:
    """A writer."""

    def __init__(self):
        self.rows, self.threads, self.closed = [], set(), 0

    def write(self, row):
        assert not self.closed
        self.rows.append((row["step"], row["layer"], row["lmn"]))
        self.threads.add(threading.current_thread())

    def close(self):
        self.closed += 1


def seen_in(history):
    return [(row["step"], row["layer"], row["lmn"]) for row in history]


def test_new_rows_come_once_and_in_order(model, x):
    with Probe(model, x, ["first", "second"], every=2) as probe:
        rows = []
        for step in range(5):
            probe(step)
            rows += probe.new_rows()
        rows += probe.new_rows(wait=True)
        assert rows == probe.history and len(rows) == 6
        assert probe.new_rows(wait=True) == []


def test_writers_get_every_row_once_on_the_callers_thread(model, x):
    writers = Recorder(), Recorder()
    with Probe(model, x, ["first", "second"], writers=writers) as probe:
        for step in range(250):
            probe(step)
        history = probe.history
    for writer in writers:
        assert writer.rows == seen_in(history) and len(history) == 6
        assert writer.threads == {threading.current_thread()} and writer.closed == 1


def test_a_row_that_fails_keeps_no_other_from_the_writers(model, x, monkeypatch):
    calls = []

    def fail_once(*args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("by chance")
        return measurement(*args, **keywords)

    monkeypatch.setattr(lmnfast.probe, "measurement", fail_once)
    writer = Recorder()
    probe = Probe(model, x, ["first", "second"], every=1, writers=[writer])
    failed = "solving layer 'second' at step 0 failed: by chance"
    with pytest.raises(RuntimeError, match=failed), probe:
        monkeypatch.setattr(probe, "flush", lambda wait=False: wait and Probe.flush(probe, wait))
        probe(0)
        probe(1)
    assert [row[:2] for row in writer.rows] == [(0, "first"), (1, "first"), (1, "second")]
    assert writer.closed == 1


def test_a_probe_goes_on_from_a_state(model, x):
    first, again = Probe(model, x, "first", every=2), Probe(model, x, "first", every=2)
    for _ in range(5):
        first(loss=0.5)
    state = first.state_dict()
    again(0)
    again.load_state_dict(state)
    assert again.history == first.history
    again()  # step 5
    assert again()  # step 6
    rows = again.history
    assert [row["step"] for row in rows] == [0, 2, 4, 6] and rows[0]["loss"] == 0.5
    assert seen_in(again.new_rows(wait=True)) == seen_in(rows[-1:])


def test_a_count_that_jumps_or_stands_still_skips_no_measurement_and_takes_none_twice(model, x):
    writer = Recorder()
    probe = Probe(model, x, "first", every=4, writers=[writer])
    assert [step for step in (0, 0, 3, 6, 6, 7, 9, 17) if probe.reach(step)] == [0, 6, 9, 17]
    assert writer.rows == []  # before they are asked for
    probe.flush(wait=True)
    assert [row[0] for row in writer.rows] == [0, 6, 9, 17]
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="^LMN at step 20, layers first: .*NaN or Inf"):
        probe.reach(20)
    assert not probe.reach(20) and not probe.reach(23)


def test_writers_have_what_a_state_has(model, x):
    writer = Recorder()
    probe = Probe(model, x, "first", every=1, writers=[writer])
    probe(0)
    assert seen_in(probe.state_dict()["rows"]) == writer.rows != []
