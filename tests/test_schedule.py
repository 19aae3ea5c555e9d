"""When a probe measures."""

import copy

import numpy as np
import pytest
import torch

from lmnfast._schedule import Schedule
from lmnfast.probe import Probe

LOG = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def even_squares(step):
    return round(step**0.5) ** 2 == step and step % 2 == 0


SCHEDULES = {
    "number": (7, range(0, 1001, 7)),
    "written with a point": (7.0, range(0, 1001, 7)),
    "of numpy": (np.int64(250), range(0, 1001, 250)),
    "steps": ([3, 0, 900, 3, 77], [0, 3, 77, 900]),
    "range": (range(10, 50, 20), [10, 30]),
    "tensor": (torch.tensor([4, 8]), [4, 8]),
    "log": ("log", LOG),
    "function": (even_squares, [n * n for n in range(0, 32, 2)]),
}


@pytest.mark.parametrize("every, steps", SCHEDULES.values(), ids=SCHEDULES)
def test_the_due_steps(every, steps):
    schedule = Schedule(every)
    assert [step for step in range(1001) if schedule.due(step)] == list(steps)


@pytest.mark.parametrize("every, steps", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("stride", [1, 3, 64])
def test_a_due_step_is_passed_once(every, steps, stride):
    schedule, before, passed = Schedule(every), -1, 0
    for step in range(0, 1001, stride):
        expected = any(before < due <= step for due in steps)
        assert schedule.passed(before, step) == expected
        assert not schedule.passed(step, step)
        passed, before = passed + expected, step
    assert passed > 1 or len(list(steps)) == 2


def test_the_logarithmic_steps_go_on():
    schedule = Schedule("log")
    assert schedule.due(2_000_000) and schedule.due(10**9) and not schedule.due(3_000_000)
    assert (
        not schedule.due(-1) and schedule.passed(10**6, 2 * 10**6) and not schedule.passed(10**6, 10**6 + 1)
    )


@pytest.mark.parametrize(
    "every, kind, message",
    [
        (0, ValueError, "every: expected at least 1, got 0"),
        ([], ValueError, r"every: expected one step or more, none below 0, got \[\]"),
        ([5, -1], ValueError, r"every: expected one step or more, none below 0, got \[5, -1\]"),
        ("linear", ValueError, "every: expected a number of steps, .*, got 'linear'"),
        (2.5, TypeError, "every: expected a number of steps, .*, got 2.5"),
        ([2.5], TypeError, "every: expected a number of steps, .*, got 2.5"),
        (None, TypeError, "every: expected a number of steps, .*, got None"),
    ],
)
def test_other_schedules_are_refused(every, kind, message, model, x):
    with pytest.raises(kind, match=f"^{message}$"):
        Probe(model, x, "first", every=every)


@pytest.mark.parametrize(
    "every", [3, [0, 4, 5, 11], "log", even_squares], ids=["number", "steps", "log", "function"]
)
def test_a_resumed_probe_measures_the_steps_that_it_would_have_measured(every, model, x):
    whole = Probe(model, x, "first", every=every)
    for step in range(17):
        assert whole(step) == whole._schedule.due(step)
    for stop in (1, 5, 6):
        early = Probe(model, x, "first", every=every)
        for step in range(stop):
            early.reach(step)
        state = early.state_dict()
        early.close()
        late = Probe(model, x, "first", every=every)
        late.load_state_dict(copy.deepcopy(state))
        for step in range(stop - 1, 17):  # a resumed training reaches its last step again
            late.reach(step)
        assert [row["step"] for row in late.history] == [row["step"] for row in whole.history]
        late.close()
    whole.close()
