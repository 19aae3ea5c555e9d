"""What does not fit the fused kernel is named, by the registered op and by the compiled core."""

import pytest
import torch
from chains import (
    LAYERS_THAT_DO_NOT_FIT,
    RULE,
    RULES_THAT_DO_NOT_FIT,
    assert_refused,
    random_chain,
    raw,
)
from support import COMPILED

from lmnfast import _native


@pytest.mark.parametrize("position, value, error, message", LAYERS_THAT_DO_NOT_FIT)
def test_layers_that_do_not_fit_are_named(position, value, error, message):
    arguments = raw()
    arguments[position] = value
    assert_refused(torch.ops.lmnfast.path_connectivity, arguments, error, message)


@pytest.mark.parametrize("position, value, error, message", RULES_THAT_DO_NOT_FIT)
def test_rules_that_do_not_fit_are_named(position, value, error, message):
    arguments = raw()
    arguments[7:9] = RULE
    arguments[7 + position] = value
    assert_refused(
        torch.ops.lmnfast.path_connectivity, arguments, error, message.replace("weights", "node_weights")
    )


@pytest.mark.parametrize(
    "skips, shifts, message",
    [
        ([-1] * 4, [None] * 6, "skips, shifts: expected 6 of each, got 4 and 6"),
        ([-1] * 6, [], "skips, shifts: expected 6 of each, got 6 and 0"),
        (
            [-1, -1, -1, 3, -1, -1],
            [None] * 6,
            r"skips\[3\]: expected an earlier value of width 7, or -1, got 3",
        ),
        (
            [-1, -1, 1, -1, -1, -1],
            [None] * 6,
            r"skips\[2\]: expected an earlier value of width 7, or -1, got 1",
        ),
        (
            [-1, 0, -1, -1, -1, -1],
            [None] * 6,
            r"skips\[1\]: expected an earlier value of width 5, or -1, got 0",
        ),
        (
            [-1] * 6,
            [None, torch.zeros(12, 1), *[None] * 4],
            r"shifts\[1\]: expected \(12, 5\) torch.float32, got",
        ),
        ([-1] * 6, [None, torch.zeros(12, 5).double(), *[None] * 4], r"shifts\[1\]: .* torch.float64"),
        ([-1] * 6, [None, torch.zeros(11, 5), *[None] * 4], r"shifts\[1\]: expected \(12, 5\)"),
        (
            [-1] * 6,
            [*[None] * 5, torch.zeros(12, 3)],
            "expected nothing to add to value 5, which no activation",
        ),
    ],
)
def test_sums_that_do_not_fit_are_named(skips, shifts, message):
    arguments = raw()
    arguments[5:7] = skips, shifts
    assert_refused(torch.ops.lmnfast.path_connectivity, arguments, ValueError, message)


@pytest.mark.parametrize(
    "shift, message",
    [
        (torch.zeros(12, 5, device="meta"), r"shifts\[1\]: expected torch.float32 on cpu, got one on meta"),
        (torch.zeros(12, 5).to_sparse(), r"shifts\[1\]: expected a dense tensor"),
    ],
)
def test_shifts_that_are_elsewhere_are_named(shift, message):
    arguments = raw()
    arguments[5:7] = [-1] * 6, [None, shift, *[None] * 4]
    assert_refused(torch.ops.lmnfast.path_connectivity, arguments, TypeError, message)


@COMPILED
def test_the_compiled_core_looks_at_lengths_too():
    """Whatever a mistake in Python hands over, no kernel reads past an end."""
    right = [
        False,
        0,
        [1, 1],
        [0, 0],
        [5, 7, 3],
        [4, 1, 0],
        [0.0] * 6,
        [],
        [],
        [0.5],
        [0.5],
        0.5,
        0.1,
        2,
        False,
        1,
        1,
        5,
        0,
        1,
        0.0,
        0,
        0,
        0,
        False,
    ]
    _native._C.PathConnectivity(*right)
    for position, value in [
        (2, [1]),
        (3, [0]),
        (4, [5, 7]),
        (5, [4, 1]),
        (5, [4, 11, 0]),
        (5, [4, -1, 0]),
        (6, [0.0] * 5),
        (7, [-1] * 6),
        (9, [0.5, 0.6]),
        (0, True),
        (16, 0),
        (17, 4),
        (18, -1),
        (19, 0),
        (20, -1.0),
        (21, 1),
        (22, 1),
        (23, 3),
    ]:
        wrong = list(right)
        wrong[position] = value
        with pytest.raises(ValueError, match="a length or a value that does not fit"):
            _native._C.PathConnectivity(*wrong)
        with pytest.raises(ValueError, match="a length or a value that does not fit"):
            _native._C.HermiteConnectivity(*wrong, False)
    with pytest.raises(ValueError, match="skips"):
        _native._C.PathConnectivity(*right[:7], [-1, 9, *[-1] * 4], [0] * 6, *right[9:])
    jacobian = [False, 0, [1, 1], [0, 0], [5, 7, 3], [4, 1, 0], [0.0] * 6, 2]
    _native._C.Jacobian(*jacobian)
    for position, value in [(2, []), (3, [0]), (4, [5]), (5, []), (6, [])]:
        wrong = list(jacobian)
        wrong[position] = value
        with pytest.raises(ValueError, match="a length or a value that does not fit"):
            _native._C.Jacobian(*wrong)


def test_the_core_refuses_on_the_cpu_what_cuda_kernels_alone_take():
    core, result = _native._C, torch.zeros(4, 4)
    several = core.Linear(False, *[result.data_ptr()] * 3, 2, 1, 1, 1)
    ratios = core.JacobianDistance(False, *[result.data_ptr()] * 2, 1, 1, 1, False, True)
    for call, argument in ((several, "networks"), (ratios, "connectivity")):
        with pytest.raises(ValueError, match=f"{argument}: a length or a value that does not fit"):
            _native.run(call, result)
    isometry = core.JacobianIsometry(False, *[result.data_ptr()] * 2, 1, 1, 1)
    assert isometry.workspace(1) == 0
    with pytest.raises(RuntimeError, match="^jacobian_isometry: no kernel on the CPU$"):
        _native.run(isometry, result, result)


@pytest.mark.parametrize("skips", [((2, 2),), ((2, 4),), ((4, 1),), ((5, 2),), ((2, 0), (2, 0))])
def test_a_chain_refuses_sums_with_no_earlier_value(skips):
    with pytest.raises(ValueError, match="skips: .* is no earlier value for a later one, once"):
        random_chain([3, 3, 3], ["identity", "silu", "identity"], skips)
