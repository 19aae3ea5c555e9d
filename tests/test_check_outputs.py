"""What is wrong with samples, outputs and a matrix, against the reference: to the last bit, as it has no sum of floats."""

import pytest
import torch
from chains import assert_refused

from lmnfast import ops, reference
from lmnfast._checks import Checks, Findings, NotTheChain
from lmnfast._samples import same_output

NAN, INF = float("nan"), float("inf")


def numbers(samples=7, inputs=5, outputs=3, dtype=torch.float32, seed=0):
    """x, y, again, expected, L and counts with nothing wrong: outputs of another order of operations."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (samples, inputs), (samples, outputs), (samples, samples)
    x, y, L = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    y *= torch.logspace(-3, 3, outputs, dtype=dtype)
    signs = torch.randint(-1, 2, y.shape, generator=generator)
    near = y * (1 + 4 * torch.finfo(dtype).eps * signs)
    return [x, y, near, near.flip(0).flip(0), L, torch.tensor([5, 2**40])]


def found_by_both(arguments, epsilon, device):
    there = [None if a is None else a.to(device) for a in arguments]
    ours = ops.check_outputs(*there, epsilon)
    assert ours.device.type == device.type and ours.dtype == torch.int64
    truth = reference.check_outputs(*arguments, epsilon)
    assert ours.cpu().tolist() == truth.tolist()
    return truth.tolist()


@pytest.mark.parametrize(
    "samples, inputs, outputs", [(1, 1, 1), (2, 3, 1), (7, 5, 3), (33, 31, 33), (40, 65, 64), (70, 2, 100)]
)
@pytest.mark.parametrize("without", ["nothing", "again", "expected", "both"])
def test_any_shape(samples, inputs, outputs, without, device, dtype):
    arguments, epsilon = numbers(samples, inputs, outputs, dtype), torch.finfo(dtype).eps
    if without in ("again", "both"):
        arguments[2] = None
    if without in ("expected", "both"):
        arguments[3] = None
    found = found_by_both(arguments, epsilon, device)
    assert found[:5] == [0] * 5 and found[7:] == [0, 0, 0, 5, 2**40]
    assert (found[6] > 0) == (arguments[3] is not None)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", range(5))
def test_what_is_not_finite_is_counted_wherever_it_is(which, bad, device, dtype):
    for seed in range(5):
        arguments, epsilon = numbers(37, 6, 40, dtype, seed), torch.finfo(dtype).eps
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(arguments[which].numel(), (1 + seed,), generator=generator)
        arguments[which].view(-1)[places] = bad
        found = found_by_both(arguments, epsilon, device)
        width = arguments[which].shape[1]
        if which in (0, 1):
            rows = (places // width).unique()
            assert found[2 * which : 2 * which + 2] == [len(rows), 37 - int(rows.min())]
        if which == 4:
            assert found[8:10] == [len(places.unique()), 37**2 - int(places.min())]
        assert (found[4] > 0) == (which in (1, 3)) and (found[7] > 0) == (which in (1, 2))


def test_the_same_infinities_and_nan_are_what_was_expected(device, dtype):
    arguments = numbers(9, 4, 5, dtype)
    arguments[1][2, 3], arguments[1][4, 1] = INF, NAN
    arguments[3] = arguments[1].clone()
    assert found_by_both(arguments, torch.finfo(dtype).eps, device)[4] == 0
    arguments[3][2, 3] = -INF
    assert found_by_both(arguments, torch.finfo(dtype).eps, device)[4] == 1


def test_an_output_that_another_function_gives_is_told_from_one_that_it_does_not(device, dtype):
    x, y, again, expected, L, counts = numbers(50, 4, 70, dtype)
    epsilon, other = torch.finfo(dtype).eps, [3, 31, 32, 69]
    spread = y.amax(0) - y.amin(0)
    again = y.clone()
    again[17] += 0.9e-3 * spread
    assert found_by_both([x, y, again, expected, L, counts], epsilon, device)[7] == 0
    again[17, other] += 0.3e-3 * spread[other]
    assert found_by_both([x, y, again, expected, L, counts], epsilon, device)[7] == len(other)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_verdicts_are_those_of_separate_checks(scale, device, dtype):
    generator = torch.Generator().manual_seed(1)
    for error in (0.0, 1e-7, 1e-5, 1e-3, 1.0):
        x, y, _, _, L, counts = numbers(30, 4, 6, dtype)
        y *= scale
        other = y + error * scale * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
        agrees = bool(same_output(y, other))
        reproduces = Checks(False).same(other, y)
        there = [t.to(device) for t in (x, y, other, L, counts)]
        x, y, other, L, counts = there
        findings = Findings(x, y, None, other, L, counts)
        if agrees:
            findings.check()
        else:
            with pytest.raises(
                RuntimeError, match="f: its outputs on the samples are not those of the model"
            ):
                findings.check()
        findings = Findings(x, y, other, None, L, counts)
        if reproduces:
            findings.check()
        else:
            with pytest.raises(NotTheChain, match="that chain has other outputs"):
                findings.check()
        assert findings.constants == 5 and findings.unresolved == 2**40
    assert not agrees and not reproduces  # the last error is as large as the outputs


@pytest.mark.parametrize("columns", [1, 31, 300, 1025])
def test_a_matrix_of_any_width_or_none(columns, device, dtype):
    x, y, _, _, _, counts = numbers(37, 6, 4, dtype)
    assert found_by_both([x, y, None, None, None, None], 1e-7, device)[7:] == [0] * 5
    matrix = torch.ones(37, columns, dtype=dtype)
    assert found_by_both([x, y, None, None, matrix, counts], 1e-7, device)[7:] == [0, 0, 0, 5, 2**40]
    for place in (37 * columns - 1, 18 * columns + columns // 2, 0):
        matrix.view(-1)[place] = NAN
    found = found_by_both([x, y, None, None, matrix, None], 1e-7, device)
    assert found[8:] == [3, 37 * columns, 0, 0]


def test_many_outputs_and_many_samples(device):
    arguments = numbers(2100, 3, 2, torch.float32)
    arguments[4][2099, 2099] = NAN
    assert found_by_both(arguments, 2.0**-23, device)[8:10] == [1, 1]
    arguments = numbers(3, 3, 5000, torch.float32)
    arguments[2][1, 4999] += 1e6
    assert found_by_both(arguments, 2.0**-23, device)[7] == 1


def test_strided_arguments(device, dtype):
    arguments = [a.mT.contiguous().mT if a.dim() == 2 else a for a in numbers(9, 6, 5, dtype)]
    found_by_both(arguments, torch.finfo(dtype).eps, device)


def test_opcheck(dtype):
    arguments = numbers(6, 3, 4, dtype)
    torch.library.opcheck(torch.ops.lmnfast.check_outputs.default, (*arguments, 1e-7))
    arguments[2] = arguments[3] = None
    torch.library.opcheck(torch.ops.lmnfast.check_outputs.default, (*arguments, 1e-7))


def test_torch_compile_gives_the_same_numbers():
    x, *others = numbers()
    compiled = torch.compile(
        lambda x, *others: ops.check_outputs(x * 2, *others, 1e-7) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, *others), ops.check_outputs(x * 2, *others, 1e-7) + 1)


@pytest.mark.parametrize(
    "which, value, error, message",
    [
        (0, torch.ones(7, 5, dtype=torch.int64), TypeError, "x: expected torch.float32 or torch.float64"),
        (0, torch.ones(7), ValueError, r"x: expected samples \(N, D\) with N > 0, got shape \(7,\)"),
        (1, torch.ones(6, 3), ValueError, r"y: expected \(7, outputs\) with outputs > 0, got shape \(6, 3\)"),
        (
            1,
            torch.ones(7, 3).double(),
            TypeError,
            "y: expected torch.float32 on cpu, got torch.float64 on cpu",
        ),
        (2, torch.ones(7, 4), ValueError, r"again: expected \(7, 3\), got shape \(7, 4\)"),
        (3, torch.ones(21), ValueError, r"expected: expected \(7, 3\), got shape \(21,\)"),
        (4, torch.ones(6, 7), ValueError, r"matrix: expected \(7, M\) with M > 0, got shape \(6, 7\)"),
        (4, torch.ones(7, 0), ValueError, r"matrix: expected \(7, M\) with M > 0, got shape \(7, 0\)"),
        (5, torch.ones(2), TypeError, "counts: expected torch.int64 on cpu, got torch.float32 on cpu"),
        (5, torch.ones(3, dtype=torch.int64), ValueError, r"counts: expected \(2,\), got shape \(3,\)"),
        (6, 0.0, ValueError, "epsilon: expected a number between 0 and 1, got 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(which, value, error, message):
    arguments = [*numbers(), 1e-7]
    arguments[which] = value
    assert_refused(torch.ops.lmnfast.check_outputs, arguments, error, message)
