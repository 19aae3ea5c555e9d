"""The hidden layer of a transformer's block along paths, as coefficients of polynomials, against the float64 reference."""

import math
import re
from pathlib import Path

import pytest
import torch
from chains import activation, assert_refused
from torch import Tensor

from lmnfast import _native, ops, reference
from lmnfast._chain import ACTIVATIONS
from lmnfast.ops.block_coefficients import MOST_COEFFICIENTS, Normalisation
from lmnfast.quadrature import orthonormal_polynomials, path_nodes

LANES = 16  # of the widest vectors in float32
SAMPLES = 6


class Problem:
    """A layer's pre-activations at a few samples, and rows, pairs of them. The first row's samples are far apart."""

    def __init__(
        self,
        rows: int,
        units: int,
        name: str = "gelu",
        rule: tuple[str, int] = ("uniform", 21),
        *,
        gated: bool = False,
        normalised: bool = False,
        shifted: bool = False,
        degrees: int = MOST_COEFFICIENTS,
    ) -> None:
        g = torch.Generator().manual_seed(rows + 1000 * units)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        width = units * (2 if gated else 1)
        self.z = 2 * draw(SAMPLES, width)
        self.z[1] = self.z[1].abs() + 1
        self.z[4] = 0.5 - self.z[1]
        self.first, self.second = torch.randint(SAMPLES, (2, rows), generator=g)
        self.first[:1], self.second[:1] = 1, 4
        self.activation, self.gated = activation(name), gated
        self.nodes, weights = path_nodes(*rule)
        self.polynomials = orthonormal_polynomials(self.nodes, weights)[:degrees]
        self.shift = draw(width) if shifted else None
        self.normalisation: Normalisation | None = None
        if normalised:
            x = draw(SAMPLES, 9)
            cross = (x[self.first] * x[self.second]).mean(-1)
            self.normalisation = Normalisation(x.square().mean(-1), cross, 1e-5)

    def measured(self, f, device, dtype, **more) -> tuple[Tensor, Tensor]:
        """What the op, or the reference, makes of it with its pre-activations in a dtype on a device; on the CPU."""
        on = torch.device(device)
        norm, shift = self.normalisation, self.shift
        if norm is not None:
            norm = Normalisation(norm.own.to(on), norm.cross.to(on), norm.epsilon)
        coefficients, energy = f(
            self.z.to(on, dtype),
            self.first.to(on),
            self.second.to(on),
            self.activation,
            self.nodes,
            self.polynomials,
            gated=self.gated,
            normalisation=norm,
            shift=None if shift is None else shift.to(on, dtype),
            **more,
        )
        assert coefficients.dtype == dtype and energy.dtype == torch.float64
        assert coefficients.device.type == energy.device.type == on.type
        return coefficients.cpu(), energy.cpu()

    def ours(self, device, dtype, **more) -> tuple[Tensor, Tensor]:
        return self.measured(ops.block_coefficients, device, dtype, **more)

    def plain(self, dtype) -> tuple[Tensor, Tensor]:
        return self.measured(reference.block_coefficients, "cpu", dtype)

    def largest(self) -> float:
        """No activation has larger values than this at a sample."""
        a = float(self.z.abs().max())
        a /= 1 if self.normalisation is None else math.sqrt(float(self.normalisation.own.min()))
        a = max(1.0, a + (0 if self.shift is None else float(self.shift.abs().max())))
        return a**2 if self.gated else a


def assert_right(problem: Problem, device, dtype) -> None:
    truth, energies = problem.plain(torch.float64)
    ours, energy = problem.ours(device, dtype)
    assert ours.shape == truth.shape and energy.shape == energies.shape
    if truth.numel() == 0:
        return
    assert truth.abs().max() > 0.01, "the layer is straight"
    plain, _ = problem.plain(dtype)
    epsilon = torch.finfo(dtype).eps
    # Twice what PyTorch loses, which in float64 is the truth itself, and a few roundings of the hidden values.
    error = 2 * float((plain.double() - truth).abs().max()) + 4 * epsilon * problem.largest()
    assert (ours.double() - truth).abs().max() <= error
    units = truth.shape[-1]
    of_coefficients = 2 * (energies * units).sqrt() * error + units * error**2  # Cauchy and Schwarz
    assert ((energy - energies).abs() <= of_coefficients + 4 * epsilon * energies).all()
    # A lane, or a thread, sums in the dtype.
    summed = ours.double().square().sum(-1).mT
    assert ((energy - summed).abs() <= (units / 4 + 4) * epsilon * summed).all()


@pytest.mark.parametrize("units", [1, 2, 3, 7, 8, 9, LANES - 1, LANES, LANES + 1, 100, 257])
@pytest.mark.parametrize("rows", [0, 1, 2, 50])
def test_any_number_of_rows_and_units(rows, units, device, dtype):
    assert_right(Problem(rows, units, "tanh", gated=units % 2 == 1, degrees=5), device, dtype)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_every_activation(name, gated, normalised, device, dtype):
    problem = Problem(8, LANES + 3, name, gated=gated, normalised=normalised, shifted=True, degrees=6)
    assert_right(problem, device, dtype)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_any_normalisation_and_shift(gated, normalised, shifted, device, dtype):
    problem = Problem(5, 7, "silu", gated=gated, normalised=normalised, shifted=shifted)
    assert_right(problem, device, dtype)


def test_no_rows_have_no_cross_products(device, dtype):
    coefficients, energy = Problem(0, 5, normalised=True).ours(device, dtype)
    assert coefficients.shape == (20, 0, 5) and energy.shape == (0, 20)


@pytest.mark.parametrize("name", ["gelu", "relu"])
@pytest.mark.parametrize("rule", [("uniform", p) for p in (3, 4, 21, 40, 66)] + [("lobatto", 9)])
def test_all_degrees_of_any_rule(rule, name, device, dtype):
    problem = Problem(4, LANES + 1, name, rule, gated=True, normalised=True, shifted=True)
    assert len(problem.polynomials) == min(rule[1] - 1, MOST_COEFFICIENTS)
    assert_right(problem, device, dtype)


@pytest.mark.parametrize("degrees", [1, 3, 4, 5, 9, 10, 11, 19, 20, 21, 39])
def test_any_number_of_degrees(degrees, device, dtype):
    """The CUDA kernel takes 20 of them in a pass, and 10 in float64, the CPU's four at a time."""
    assert_right(Problem(3, 5, "relu", ("uniform", 40), degrees=degrees), device, dtype)


@pytest.mark.parametrize(
    "begin, end",
    [(0, 0), (0, 1), (3, 6), (9, 11), (19, 21), (20, 30), (24, 24), (38, 39), (39, 39), (5, None)],
)
def test_only_some_degrees_are_returned_but_the_energy_of_all(begin, end, device, dtype):
    problem = Problem(3, LANES + 1, rule=("uniform", 40), gated=True, normalised=True)
    coefficients, energy = problem.ours(device, dtype)
    part, same = problem.ours(device, dtype, begin=begin, end=end)
    assert torch.equal(part, coefficients[begin:end]) and torch.equal(same, energy)


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_the_scale_brings_the_energy_of_tiny_and_huge_values_into_range(factor, device):
    problem = Problem(4, LANES + 1, "relu")
    coefficients, energy = problem.ours(device, torch.float32)
    problem.z *= factor
    scaled, same = problem.ours(device, torch.float32, scale=1 / factor)
    assert torch.equal(scaled, coefficients * factor) and torch.equal(same, energy)
    _, unscaled = problem.ours(device, torch.float32)
    if _native.HAS_CORE:  # the reference has float64 squares
        assert not (unscaled[0, 0] > 0) or unscaled[0, 0] == math.inf  # float32 squares


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_equal_samples_have_no_coefficients(name, gated, device, dtype):
    problem = Problem(3, LANES + 3, name, gated=gated, shifted=True)
    problem.z[2] = problem.z[0]
    problem.first, problem.second = torch.tensor([0, 2, 3]), torch.tensor([2, 2, 3])
    assert all((result == 0).all() for result in problem.ours(device, dtype))


def test_equal_samples_have_none_but_rounding_behind_a_normalisation(device, dtype):
    problem = Problem(3, LANES + 3, normalised=True)
    problem.second = problem.first
    own, _, epsilon = problem.normalisation
    problem.normalisation = Normalisation(own, own[problem.first], epsilon)
    coefficients, _ = problem.ours(device, dtype)
    assert coefficients.abs().max() <= 4 * torch.finfo(dtype).eps * problem.largest()


@pytest.mark.parametrize("name, sign", [("identity", 0), ("relu", 1), ("relu", -1)])
def test_a_straight_layer_has_no_coefficients(name, sign, device, dtype):
    problem = Problem(20, LANES + 3, name)
    problem.z = sign * problem.z.abs() if sign else problem.z
    assert all((result == 0).all() for result in problem.ours(device, dtype))


def test_a_gate_on_a_line_makes_a_parabola(device, dtype):
    """The residual is -t (1 - t) times both differences. Degrees are 1, 2, ...: but for the second they vanish."""
    problem = Problem(9, LANES + 1, "identity", gated=True)
    a, gate = (problem.z[problem.second] - problem.z[problem.first]).chunk(2, 1)
    t = problem.nodes
    second = -(problem.polynomials[1] @ (t * (1 - t))) * a * gate
    coefficients, _ = problem.ours(device, dtype)
    rounding = 8 * torch.finfo(dtype).eps * problem.largest()
    assert (coefficients[1] - second).abs().max() <= rounding and second.abs().max() > 0.1
    assert coefficients[[0, *range(2, 20)]].abs().max() <= rounding


def test_a_nan_stays_in_its_unit_and_in_the_rows_of_its_sample(device, dtype):
    problem = Problem(20, LANES + 3, gated=True)
    problem.z[3, 5] = math.nan
    coefficients, energy = problem.ours(device, dtype, end=4)
    hit = (problem.first == 3) | (problem.second == 3)
    expected = torch.zeros(20, LANES + 3, dtype=torch.bool)
    expected[:, 5] = hit
    assert 0 < hit.sum() < 20
    assert torch.equal(coefficients.isnan(), expected.expand(4, -1, -1))
    assert torch.equal(energy.isnan(), hit[:, None].expand_as(energy))


def test_values_that_lie_anywhere_in_memory(device, dtype):
    problem = Problem(20, LANES + 3, gated=True, shifted=True)
    expected = problem.ours(device, dtype)
    problem.z = problem.z.mT.contiguous().mT
    problem.shift = torch.stack([problem.shift] * 2, -1)[..., 0]
    problem.first = torch.cat([problem.first[:1], problem.first])[1:]
    problem.polynomials = problem.polynomials.mT.contiguous().mT
    assert all(map(torch.equal, problem.ours(device, dtype), expected))


def test_the_same_bits_for_any_thread_count(device, dtype, threads):
    problem = Problem(61, 131, gated=True, normalised=True)  # enough for threads to be worth it
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(problem.ours(device, dtype, end=3))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


def raw(dtype: torch.dtype = torch.float64, *, norm: bool = True) -> list:
    """The registered op's arguments: 5 rows, 6 samples, 4 units and their gates, 9 nodes, 8 degrees."""
    p = Problem(5, 4, "silu", ("uniform", 9), gated=True, normalised=True, shifted=True)
    tensors = [p.shift.to(dtype), p.normalisation.own, p.normalisation.cross] if norm else [None] * 3
    kind, parameters = ACTIVATIONS.index("silu"), [0.0, 0.0]
    rows = [p.z.to(dtype), p.first, p.second]
    return [*rows, kind, parameters, p.nodes, p.polynomials, True, *tensors, 1e-5, 2, 7, 0.5]


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm, dtype):
    torch.library.opcheck(torch.ops.lmnfast.block_coefficients.default, raw(dtype, norm=norm))


def test_torch_compile_gives_the_same_bits():
    def measured(z, *rest):
        coefficients, energy = torch.ops.lmnfast.block_coefficients(z * 2, *rest)
        return coefficients + 1, energy * 2

    compiled = torch.compile(measured, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*raw()), measured(*raw())))


NAMES = (
    "z",
    "first",
    "second",
    "activation",
    "parameters",
    "nodes",
    "polynomials",
    "gated",
    "shift",
    "own",
    "cross",
    "epsilon",
    "begin",
    "end",
    "scale",
)
_F64 = torch.float64


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("z", torch.zeros(6, 8, dtype=torch.int32), TypeError, "z: expected torch.float32 or torch.float64"),
        ("z", torch.zeros(6, 8).to_sparse(), TypeError, "z: expected a dense tensor"),
        (
            "z",
            torch.zeros(48, dtype=_F64),
            ValueError,
            r"z: expected \(samples, 2 \* units\), got shape \(48,\)",
        ),
        (
            "z",
            torch.zeros(6, 7, dtype=_F64),
            ValueError,
            r"z: expected \(samples, 2 \* units\), got shape \(6, 7\)",
        ),
        (
            "z",
            torch.zeros(6, 0, dtype=_F64),
            ValueError,
            r"z: expected \(samples, 2 \* units\), got shape \(6, 0\)",
        ),
        ("z", torch.zeros(6, 6, dtype=_F64), ValueError, r"shift: expected .*6.*, got shape \(8,\)"),
        ("z", torch.zeros(5, 8, dtype=_F64), ValueError, r"own: expected .*5.*, got shape \(6,\)"),
        ("first", torch.zeros(5), TypeError, "first: expected torch.int64"),
        ("first", torch.zeros(5, 1).long(), ValueError, r"first: expected \(rows,\), got shape \(5, 1\)"),
        ("first", torch.full((5,), -1), ValueError, "first: expected samples 0 to 5, got -1 to -1"),
        ("second", torch.zeros(5).long().to("meta"), TypeError, "second: expected torch.int64 on cpu"),
        ("second", torch.zeros(4).long(), ValueError, r"second: expected .*5.*, got shape \(4,\)"),
        ("second", torch.full((5,), 6), ValueError, "second: expected samples 0 to 5, got 6 to 6"),
        ("activation", -1, ValueError, "activation: expected a code from 0 to 10, got -1"),
        ("activation", 11, ValueError, "activation: expected a code from 0 to 10, got 11"),
        ("parameters", [0.0], ValueError, "parameters: expected 2 numbers, got 1"),
        ("parameters", [0.0, math.nan], ValueError, "parameters: expected finite numbers, got .*nan"),
        ("nodes", torch.zeros(9), TypeError, "nodes: expected torch.float64"),
        (
            "nodes",
            torch.zeros(2, dtype=_F64),
            ValueError,
            r"nodes: expected \(nodes,\), 3 to 66, got shape \(2,\)",
        ),
        (
            "nodes",
            torch.zeros(67, dtype=_F64),
            ValueError,
            r"nodes: expected \(nodes,\), 3 to 66, got shape \(67,\)",
        ),
        ("nodes", torch.zeros(9, 1, dtype=_F64), ValueError, r"nodes: expected \(nodes,\), 3 to 66"),
        ("nodes", torch.zeros(9, dtype=_F64), ValueError, "nodes: expected 0 first and 1 last"),
        ("polynomials", torch.zeros(8, 9), TypeError, "polynomials: expected torch.float64"),
        (
            "polynomials",
            torch.zeros(9, dtype=_F64),
            ValueError,
            r"polynomials: expected \(degrees, 9\), 1 to 64",
        ),
        ("polynomials", torch.zeros(0, 9, dtype=_F64), ValueError, r"polynomials: .*got shape \(0, 9\)"),
        ("polynomials", torch.zeros(65, 9, dtype=_F64), ValueError, r"polynomials: .*got shape \(65, 9\)"),
        ("polynomials", torch.zeros(8, 8, dtype=_F64), ValueError, r"polynomials: .*got shape \(8, 8\)"),
        ("shift", torch.zeros(8), TypeError, "shift: expected torch.float64"),
        ("shift", torch.zeros(4, dtype=_F64), ValueError, r"shift: expected .*8.*, got shape \(4,\)"),
        ("own", torch.zeros(6), TypeError, "own: expected torch.float64"),
        ("own", torch.zeros(5, dtype=_F64), ValueError, r"own: expected .*6.*, got shape \(5,\)"),
        ("own", None, ValueError, "own, cross: expected both or neither"),
        ("cross", None, ValueError, "own, cross: expected both or neither"),
        ("cross", torch.zeros(5), TypeError, "cross: expected torch.float64"),
        ("cross", torch.zeros(6, dtype=_F64), ValueError, r"cross: expected .*5.*, got shape \(6,\)"),
        ("begin", -1, ValueError, "begin, end: expected 0 <= begin <= end <= 8, got -1 and 7"),
        ("begin", 8, ValueError, "begin, end: expected 0 <= begin <= end <= 8, got 8 and 7"),
        ("end", 9, ValueError, "begin, end: expected 0 <= begin <= end <= 8, got 2 and 9"),
        ("scale", 0.0, ValueError, "scale: expected a number from .* for torch.float64, got 0.0"),
        ("scale", math.inf, ValueError, "scale: expected a number from .* for torch.float64, got inf"),
        ("scale", math.nan, ValueError, "scale: expected a number from .* for torch.float64, got nan"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name, value, error, message):
    arguments = raw()
    arguments[NAMES.index(name)] = value
    if (
        "expected samples 0" in message or "expected 0 first" in message
    ):  # values, which the fake implementation cannot see
        with pytest.raises(error, match=message):
            torch.ops.lmnfast.block_coefficients(*arguments)
    else:
        assert_refused(torch.ops.lmnfast.block_coefficients, arguments, error, message)


@pytest.mark.parametrize("scale", [2.0**-129, 2.0**128])
def test_a_scale_beyond_float32_is_refused(scale):
    arguments = [*raw(torch.float32)[:-1], scale]
    assert_refused(torch.ops.lmnfast.block_coefficients, arguments, ValueError, "scale: .* for torch.float32")
    torch.ops.lmnfast.block_coefficients(*raw()[:-1], scale)


def test_the_most_degrees_are_those_of_the_kernels():
    surface = (Path(__file__).parent.parent / "csrc/ops.h").read_text()
    assert int(re.search(r"kMostCoefficients = (\d+);", surface)[1]) == MOST_COEFFICIENTS
