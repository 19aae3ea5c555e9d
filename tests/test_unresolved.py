"""Pairs that a dtype cannot resolve: dead and cancelling outputs, paths of another scale, samples that nearly agree."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from chains import assert_refused, cast, random_chain, random_sums, samples
from torch import nn

import lmnfast
from lmnfast import _generic, _native, _polynomials, ops, reference
from lmnfast._chain import ACTIVATIONS, Activation, Chain
from lmnfast._samples import SAME_OUTPUT_ULPS
from lmnfast._unresolved import (
    CLOSE,
    LEAST_ROUNDING,
    RESOLVED_ULPS,
    UNRESOLVED,
    Widened,
    are_close,
    resolve,
)
from lmnfast.ops.path_connectivity import _hoisted, chain_connectivity
from lmnfast.quadrature import path_nodes

UNIFORM = path_nodes("uniform", 21)


CONSTANTS = {
    "kUnresolved": UNRESOLVED,
    "kConstantUlps": reference.CONSTANT_ULPS,
    "kResolvedUlps32": RESOLVED_ULPS[torch.float32],
    "kResolvedUlps64": RESOLVED_ULPS[torch.float64],
    "kCloseSamples": CLOSE,
    "kLeastRounding": LEAST_ROUNDING,
    "kSameOutputUlps": SAME_OUTPUT_ULPS,
}


def test_python_has_the_numbers_of_the_kernels():
    text = (Path(__file__).parent.parent / "csrc/statistics.h").read_text()
    numbers = {
        name: float.fromhex(value) if value.startswith("0x") else float(value)
        for line in re.findall(r"^constexpr (?:int|double) ([^;]*);", text, re.MULTILINE)
        for name, value in re.findall(r"(k\w+) = ([^,]+)", line)
    }
    assert {name: numbers.get(name) for name in CONSTANTS} == CONSTANTS


def chain_of(weights, activations, biases=None) -> Chain:
    weights = tuple(torch.tensor(w, dtype=torch.float64) for w in weights)
    return Chain(weights, biases or (None,) * len(weights), tuple(map(Activation, activations)))


def truth(f, x):
    """float64, by the definition."""
    with torch.no_grad():
        return reference.path_connectivity(f, x.double(), *UNIFORM)


def test_an_output_that_is_dead_everywhere_is_exactly_constant(device, dtype):
    """Output 0 is 0 for every input, as its pre-activation is never positive; the chord's rounding is."""
    chain = chain_of([[[0.3], [0.7]], [[-0.71, 0.3042], [1.0, 1.0]]], ["identity", "relu", "relu"])
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    alone = chain_of([[[0.3], [0.7]], [[1.0, 1.0]]], ["identity", "relu", "relu"])
    L = ops.path_connectivity(cast(chain, dtype, device), x.to(device, dtype), *UNIFORM).cpu()
    expected = (1 + truth(alone, x)) / 2
    assert expected.min() < 0.8, "output 1 is straight"
    assert (L - expected).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("widths", [(2, 8, 6, 8), (4, 4, 4, 4), (10, 4, 10)])
def test_narrow_relu_networks_without_biases(seed, widths, device, dtype):
    chain = random_chain(list(widths), ["relu"] * len(widths), seed=seed, bias=False)
    x = samples(20, widths[0], seed=seed)
    L = ops.path_connectivity(cast(chain, dtype, device), x.to(device, dtype), *UNIFORM).cpu()
    assert (L - truth(cast(chain, dtype).__class__(*_rounded(chain, dtype)), x.to(dtype))).abs().max() < 2e-4


def _rounded(chain: Chain, dtype: torch.dtype) -> tuple:
    """The chain's weights as they are in a dtype, in float64."""
    return (
        tuple(w.to(dtype).double() for w in chain.weights),
        tuple(None if b is None else b.to(dtype).double() for b in chain.biases),
        chain.activations,
    )


@pytest.mark.parametrize("name, right", [("gelu", 1.0), ("gelu_tanh", 1.0), ("relu", 1.0)])
def test_a_unit_that_cancels_to_rounding_is_constant(name, right, device, dtype):
    """The output's pre-activation is -1000 and -500 at the ends and about 0 nowhere: a dead region."""
    chain = chain_of([[[1.0, -1.0]]], [name, name])
    x = torch.tensor([[2000.0, 3000.0], [-1000.0, -500.0]], dtype=torch.float64)
    L = ops.path_connectivity(cast(chain, dtype, device), x.to(device, dtype), *UNIFORM)
    assert L[0, 1] == right


def test_large_inputs_give_finite_entries(device, dtype):
    chain = chain_of([[[1.0, -1.0]]], ["silu", "silu"])
    x = torch.tensor([[2000.0, 3000.0], [-1000.0, -500.0]], dtype=torch.float64)
    L = ops.path_connectivity(cast(chain, dtype, device), x.to(device, dtype), *UNIFORM).cpu()
    assert (L - truth(chain, x)).abs().max() < 1e-5


def test_one_outlier_does_not_make_the_other_paths_straight(device, dtype):
    """The outputs' spread is the outlier's: paths between the others vary by less than 1e-20 of it."""
    chain = random_chain([8, 16, 4], ["identity", "silu", "identity"])
    x = samples(12, 8)
    x[0] *= 1e22
    x, rounded = x.to(dtype), Chain(*_rounded(chain, dtype))
    L = ops.path_connectivity(cast(chain, dtype, device), x.to(device), *UNIFORM).cpu()
    expected = truth(rounded, x)
    assert expected[1:, 1:].min() < 0.9
    assert (L - expected).abs().max() < 1e-4


@pytest.mark.parametrize("midpoint", [None, True])
def test_an_activation_does_not_hide_what_rounding_has_hidden(midpoint, device, dtype):
    """The output is dead at both ends and not half way, where huge numbers cancel: a chord's rounding there is dead, too."""
    size = 1e13 if dtype == torch.float32 else 1e22
    weights, biases = [[[1.0], [-1.0]], [[-1.0, -1.0]]], (None, torch.tensor([1.0], dtype=torch.float64))
    chain = chain_of(weights, ["identity", "gelu", "gelu"], biases)
    x = torch.tensor([[-size], [size]], dtype=torch.float64)
    expected = truth(chain, x)
    if midpoint:
        expected = reference.hermite_connectivity(chain, x, *UNIFORM, midpoint=True)
    assert expected[0, 1] < 1e-9
    L = chain_connectivity(cast(chain, dtype, device), x.to(device, dtype), *UNIFORM, midpoint)
    L.resolve()
    assert (L.L.cpu() - expected).abs().max() < 1e-6


def test_the_last_step_of_a_path_from_an_outlier(device):
    """The outputs are dead along all of the path but at its other end, where the outlier's rounding does not reach."""
    x = torch.tensor([[-1e22], [1.0]], dtype=torch.float64)
    chain = chain_of([[[1.0]]], ["identity", "relu"], (torch.tensor([-0.5]).double(),))
    L = chain_connectivity(cast(chain, torch.float32, device), x.to(device, torch.float32), *UNIFORM)
    L.resolve()
    # The output is 0 at 20 nodes and 1/2 at the last: cov^2 / (var var) = (1/21 * 1/2)^2 / (var(t) * 20/441) = 3/22.
    assert L.L[0, 1].item() == pytest.approx(3 / 22, abs=1e-6)


@pytest.mark.parametrize("method", ["hermite", "hermite-midpoint"])
def test_small_outputs_that_are_zero_at_both_ends_are_alive(method):
    for f in (lambda z: 1e-17 * z * (1 - z), lambda z: z[:, :1] * (1 - z[:, :1])):
        x = torch.tensor([[0.0, 1e17], [1.0, 2e17], [3.0, 3e17]])
        L = lmnfast.connectivity(f, x if f(x).shape[1] == 1 else x[:, :1], method=method)
        assert L[0, 1] < 1e-6


def test_dead_outputs_of_a_network_that_is_no_chain_are_constant_at_once(monkeypatch):
    """A ReLU's output that is 0 is known, and not worth float64; a GELU's is not."""
    resolve, left = _generic.resolve, []

    def counting(values, x, L, counts, *arguments, **settings):
        left.append(int(counts[1]))
        resolve(values, x, L, counts, *arguments, **settings)

    for module in (_generic, _polynomials):
        monkeypatch.setattr(module, "resolve", counting)
    for activation in (nn.ReLU(), nn.GELU()):
        torch.manual_seed(0)
        f = nn.Sequential(
            nn.Linear(20, 50), nn.LayerNorm(50), nn.ReLU(), nn.Linear(50, 20), activation
        ).requires_grad_(False)
        f[3].bias[0] = -6.5  # in float32 the GELU's first output is 0 for most samples, in float64 for none
        x = torch.randn(40, 20)
        assert (f(x)[:, 0] == 0).sum() > 20
        for method in ("path", "hermite", "hermite-midpoint"):
            left.clear()
            lmnfast.connectivity(f, x, method=method)
            pairs = 40 * 39 / 2
            assert sum(left) < 0.05 * pairs if isinstance(activation, nn.ReLU) else sum(left) > 0.3 * pairs


@pytest.mark.parametrize("generic", [False, True])
def test_gelu_that_is_zero_where_its_slope_is_not(generic):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU())
    with torch.no_grad():
        net[0].bias -= 13
    x = torch.randn(9, 3)
    f = (lambda z: net(z)) if generic else net
    for method in ("hermite", "hermite-midpoint"):
        assert (lmnfast.connectivity(f, x, method=method) == 1).all()


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("method", ["path", "hermite", "hermite-midpoint"])
def test_samples_apart_by_float64s_rounding_beside_large_outputs(generic, method):
    """The outputs' rounding is that of terms much larger than they are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 3))
    with torch.no_grad():
        for n in (0, 2):
            net[n].bias += 100
        net[4].weight *= 10
        net[4].bias -= net(torch.zeros(1, 6))[0].round()
    x = 1e-15 * torch.randn(5, 6)
    f = (lambda z: net(z)) if generic else net
    assert (lmnfast.connectivity(f, x, method=method) == 1).all()


@pytest.mark.parametrize("end", [nn.Softmax(-1), nn.Sigmoid(), nn.Softplus()])
def test_outputs_of_many_magnitudes(end):
    """Probabilities from 1 down to 1e-30 side by side."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.SiLU(), nn.Linear(32, 10), end).requires_grad_(False)
    net[2].weight.mul_(20)
    x = 2 * torch.randn(24, 10)
    exact = copy.deepcopy(net).double()
    for f in (net, lambda z: net(z)):
        L = lmnfast.connectivity(f, x)
        # The rule for constant outputs is that of float32: saturated outputs are constant in it, and not in float64.
        with torch.no_grad():
            y = exact(torch.lerp(x[:, None, None].double(), x[None, :, None].double(), UNIFORM[0][:, None]))
        rounding = torch.finfo(torch.float32).eps * torch.maximum(y[:, :, 0].abs(), y[:, :, -1].abs())
        expected = reference.r2_of_outputs(y, *UNIFORM, rounding)[0].mean(-1)
        off = ~torch.eye(len(x), dtype=torch.bool)
        assert (L - expected)[off].abs().max() < 0.02


def test_a_path_that_rises_above_the_ends_spread_does_not_overflow():
    """f is 1e-27 or less at the samples and 1 between them."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([0.3 * torch.randn(8, 1, generator=g) + side for side in (-2, 2)])

    def bump(z):
        return torch.sigmoid(40 * (1 - z**2))

    L = lmnfast.connectivity(bump, x)
    assert L.isfinite().all()
    assert (L[:8, 8:] - truth(bump, x)[:8, 8:]).abs().max() < 1e-3


@pytest.mark.parametrize("method", ["path", "hermite", "hermite-midpoint"])
@pytest.mark.parametrize("bias", [0.5, 2000.0, 1e6])
def test_a_chains_last_bias_does_not_matter_at_all(bias, method, device, dtype):
    net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)).to(device, dtype).requires_grad_(False)
    x = samples(20, 8).to(device, dtype)
    net[2].bias.zero_()
    without = lmnfast.connectivity(net, x, method=method)
    net[2].bias.fill_(bias)
    assert torch.equal(lmnfast.connectivity(net, x, method=method), without)


def nearly_equal(distance: float, width: int = 8) -> torch.Tensor:
    """Ten float32 samples, and each again a relative `distance` off."""
    x = samples(10, width).float()
    return torch.cat([x, x * (1 + distance * samples(10, width, seed=2).float())])


@pytest.mark.parametrize("distance", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("method", ["path", "hermite", "hermite-midpoint"])
def test_samples_that_nearly_agree_give_what_float64_gives(distance, method, device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    x = nearly_equal(distance).to(device)
    expected = lmnfast.connectivity(copy.deepcopy(net).to(device).double(), x.double(), method=method)
    net = net.to(device)
    for f in (net, lambda z: net(z)):
        L = lmnfast.connectivity(f, x, method=method)
        assert L.dtype == torch.float32 and torch.equal(L, L.mT)
        assert (L - expected).abs().max() < 1e-3
        right = lmnfast.linear_mapping_number(expected)
        assert abs(lmnfast.linear_mapping_number(L) / right - 1) < 1e-3


def test_a_kink_between_samples_that_nearly_agree_counts(device):
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).requires_grad_(False).to(device)
    for parameter, value in zip(net.parameters(), (1.0, -0.5, 1.0, 0.0), strict=True):
        parameter.fill_(value)
    x = torch.tensor([[0.5 - 5e-5], [0.5 + 5e-5]], device=device)
    right = truth(copy.deepcopy(net).double(), x)[0, 1]
    assert 0.75 < right < 0.85
    for f in (net, lambda z: net(z)):
        assert abs(lmnfast.connectivity(f, x)[0, 1] - right) < 1e-3


def test_the_registered_op_leaves_and_counts_what_it_cannot_resolve(device):
    chain = cast(random_chain([6, 12, 4], ["identity", "tanh", "identity"]), torch.float32, device)
    x = nearly_equal(1e-6, 6).to(device)
    L, counts = torch.ops.lmnfast.path_connectivity(*_hoisted(chain, x).arguments(torch.float32), *UNIFORM)
    left = L == UNRESOLVED
    assert left.diagonal(10)[:10].all() and torch.equal(left, left.mT)
    assert counts.tolist() == [0, int(left.sum()) // 2]
    measured = chain_connectivity(chain, x, *UNIFORM)
    measured.resolve()
    assert measured.counts[1] == 0 and (measured.L >= 0).all()


@pytest.mark.parametrize("bias", [-80.0, -88.0, -100.0])
@pytest.mark.parametrize("name", ["sigmoid", "silu", "softplus"])
def test_outputs_that_underflow_are_not_constant(name, bias, device):
    """In float32 the first output is 0, or below its normal numbers, at some or all samples; it varies all the same."""
    chain = random_chain([6, 2], ["identity", name])
    chain.biases[0][0] = bias
    x = samples(12, 6).float()
    expected = truth(Chain(*_rounded(chain, torch.float32)), x)
    L = ops.path_connectivity(cast(chain, torch.float32, device), x.to(device), *UNIFORM).cpu()
    assert expected.min() < 0.9 and (L - expected).abs().max() < 1e-4


def test_constant_outputs_are_counted_over_all_pairs(device, dtype):
    """Two of five outputs are saturated everywhere."""
    chain = random_chain([6, 5], ["identity", "sigmoid"])
    chain.biases[0][:2] = 1e3
    x = 0.1 * samples(23, 6)
    measured = chain_connectivity(cast(chain, dtype, device), x.to(device, dtype), *UNIFORM)
    measured.resolve()
    assert measured.counts.tolist() == [2 * 23 * 22 // 2, 0]


def test_equal_samples_are_one_and_are_not_counted(device):
    chain = cast(random_chain([6, 12, 4], ["identity", "tanh", "identity"]), torch.float32, device)
    x = samples(8, 6).float().to(device)
    measured = chain_connectivity(chain, x.repeat(2, 1), *UNIFORM)
    measured.resolve()
    assert (measured.L.diagonal(8) == 1).all() and measured.counts.tolist() == [0, 0]


@pytest.mark.parametrize(
    "distance, close", [(0.0, True), (CLOSE / 2, True), (CLOSE * 0.999, True), (CLOSE * 1.001, False)]
)
def test_samples_are_close_by_their_largest_coordinate(distance, close):
    first = torch.tensor([[1.0, -2.0, 0.0]], dtype=torch.float64)
    second = first + torch.tensor([[0.0, 0.0, 2 * distance]])
    assert are_close(first, second).tolist() == [close]


@pytest.mark.parametrize("where", ["between kinks", "at kinks"])
def test_slopes_of_a_chain_are_those_of_autograd(where):
    for seed, name in enumerate(ACTIVATIONS):
        chain = (
            random_sums(seed) if where == "between kinks" else random_chain([5, 7, 3], [name] * 3, bias=False)
        )
        x, step = samples(9, len(chain.weights[0].mT)), samples(9, len(chain.weights[0].mT), seed=2)
        x = x if where == "between kinks" else torch.zeros_like(x)
        parts = _hoisted(chain, torch.cat([x, x + step]))
        points = parts.samples()
        y, slope, _ = parts.values().along(points[:9], points[9:] - points[:9])
        expected, expected_slope = torch.autograd.functional.jvp(chain, x, step)
        if chain.activations[-1].name == "identity" and chain.biases[-1] is not None:
            expected = expected - chain.biases[-1]
        scale = 1e-14 * (1 + expected.abs().max() + expected_slope.abs().max())
        assert (y - expected).abs().max() < scale and (slope - expected_slope).abs().max() < scale


# The kernel for them on CUDA ----------------------------------------------------------------------------------


def measured_by(chain: Chain, x: torch.Tensor, midpoint: bool | None, rule=UNIFORM):
    """L and counts as the device leaves them, of a float32 chain; and those that Python gives for the same unresolved pairs,
    with how many these were."""
    parts = _hoisted(chain, x)
    op = torch.ops.lmnfast.path_connectivity if midpoint is None else torch.ops.lmnfast.hermite_connectivity
    arguments = (*parts.arguments(torch.float32), *rule, *(() if midpoint is None else (midpoint,)))
    found = op(*arguments, exact=parts.samples(), inputs=x)
    L, counts = op(*arguments)
    pairs, settings = int(counts[1]), {"points": 2**18, "midpoint": midpoint, "inputs": x}
    assert pairs == int((L == UNRESOLVED).sum()) // 2
    resolve(parts.values(), parts.samples(), L, counts, *rule, **settings)
    return found, (L, counts), pairs


def assert_measured_on_the_device(
    chain: Chain, x: torch.Tensor, midpoint: bool | None, rule=UNIFORM, tolerance: float = 3e-7
) -> None:
    (L, counts), (expected, expected_counts), pairs = measured_by(chain, x, midpoint, rule)
    assert pairs > 0, "nothing to measure"
    assert counts.tolist() == expected_counts.tolist() and torch.equal(L, L.mT)
    assert (L - expected).abs().max() < tolerance


@pytest.fixture
def on_cuda(device):
    if not _native.on_cuda(torch.empty(0, device=device)):
        pytest.skip("for CUDA's kernels alone")
    return device


def short_chords(width: int, distance: float, seed: int = 1) -> torch.Tensor:
    """Samples, each again close by, and some of them twice."""
    x = samples(7, width, seed=seed)
    return torch.cat([x, x * (1 + distance * samples(7, width, seed=seed + 1)), x[:2]]).float()


@pytest.mark.parametrize("midpoint", [None, False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_device_measures_chains_with_sums_as_python_does(seed, midpoint, on_cuda):
    chain = cast(random_sums(seed), torch.float32, on_cuda)
    x = short_chords(len(chain.weights[0].mT), 10.0 ** -(3 + seed % 5), seed).to(on_cuda)
    assert_measured_on_the_device(chain, x, midpoint)


@pytest.mark.parametrize("midpoint", [None, False, True])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_device_measures_every_activation_as_python_does(name, last, midpoint, on_cuda):
    chain = random_chain([6, 17, 9, 5], ["identity", name, name, name if last else "identity"], seed=3)
    assert_measured_on_the_device(
        cast(chain, torch.float32, on_cuda), short_chords(6, 1e-5).to(on_cuda), midpoint
    )


@pytest.mark.parametrize("midpoint", [None, True])
@pytest.mark.parametrize(
    "widths", [[7, 7, 1], [7, 33, 70], [130, 64, 130, 31], [5, 100, 100, 100, 31], [3, 512, 9], [4, 40, 1000]]
)
def test_the_device_measures_every_width_as_python_does(widths, midpoint, on_cuda):
    """512 units of paths do not fit in shared memory, nor 1000 outputs."""
    names = ["identity", *["silu"] * (len(widths) - 2), "identity"]
    chain = cast(random_chain(widths, names), torch.float32, on_cuda)
    assert_measured_on_the_device(chain, short_chords(widths[0], 1e-6).to(on_cuda), midpoint)


@pytest.mark.parametrize("midpoint", [None, True])
@pytest.mark.parametrize("rule", [("uniform", 3), ("uniform", 40), ("uniform", 64), ("lobatto", 9)])
def test_the_device_measures_by_every_rule_as_python_does(rule, midpoint, on_cuda):
    chain = cast(random_chain([6, 20, 4], ["identity", "tanh", "identity"]), torch.float32, on_cuda)
    assert_measured_on_the_device(chain, short_chords(6, 1e-6).to(on_cuda), midpoint, path_nodes(*rule))


@pytest.mark.parametrize("midpoint", [None, True])
def test_what_the_device_does_not_measure_is_left_to_python(midpoint, on_cuda):
    """More nodes than its kernel takes, and outputs that are not finite."""
    chain = cast(random_chain([6, 20, 4], ["identity", "tanh", "identity"]), torch.float32, on_cuda)
    x = short_chords(6, 1e-6).to(on_cuda)
    (L, counts), _, pairs = measured_by(chain, x, midpoint, path_nodes("uniform", 65))
    assert counts[1] == pairs and (L == UNRESOLVED).sum() == 2 * pairs > 0
    chain.weights[1].mul_(3e38)  # beyond float32 and not float64
    assert_measured_on_the_device(chain, x, midpoint)
    huge = cast(random_chain([6, 20, 4], ["identity", "relu", "relu"]), torch.float32, on_cuda)
    huge.weights[1].fill_(torch.inf)
    (L, counts), _, pairs = measured_by(huge, x[:7], midpoint)
    assert counts[1] == pairs > 0 and (L == UNRESOLVED).sum() == 2 * pairs


@pytest.mark.parametrize("midpoint", [None, False, True])
@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "sigmoid"])
def test_the_device_finds_dead_outputs_as_python_does(name, midpoint, on_cuda):
    """Outputs that vary by a millionth of their size, that are dead, and that hardly live."""
    chain = random_chain([6, 24, 70], ["identity", name, name])
    chain.weights[1].mul_(1e-6 if name == "sigmoid" else 1.0)
    chain.biases[1][::3] = -60.0
    chain.biases[1][1::3] = -9.0
    x = torch.cat([short_chords(6, 1e-4), samples(9, 6, seed=5).float()]).to(on_cuda)
    # Between close samples outputs vary by 1e-10 of what they are computed from: float64's rounding shows in 1 - r2.
    assert_measured_on_the_device(cast(chain, torch.float32, on_cuda), x, midpoint, tolerance=1e-5)


@pytest.mark.parametrize("midpoint", [None, False])
def test_the_device_measures_the_same_bits_every_time(midpoint, on_cuda):
    chain = cast(random_sums(4), torch.float32, on_cuda)
    x = short_chords(len(chain.weights[0].mT), 1e-6).to(on_cuda)
    results = [chain_connectivity(chain, x, *UNIFORM, midpoint) for _ in range(3)]
    assert all(torch.equal(r.L, results[0].L) and r.counts[1] == 0 for r in results)


@pytest.mark.parametrize("midpoint", [None, True])
def test_exact_samples_are_optional_arguments_of_the_ops(midpoint):
    chain = cast(random_chain([6, 12, 4], ["identity", "tanh", "identity"]), torch.float32)
    x = short_chords(6, 1e-6)
    parts = _hoisted(chain, x)
    op = torch.ops.lmnfast.path_connectivity if midpoint is None else torch.ops.lmnfast.hermite_connectivity
    arguments = (*parts.arguments(torch.float32), *UNIFORM, *(() if midpoint is None else (midpoint,)))
    torch.library.opcheck(op.default, arguments, {"exact": parts.samples(), "inputs": x})


@pytest.mark.parametrize("midpoint", [None, True])
def test_equal_inputs_are_one_sample_on_the_device_whatever_rounding_made_of_them(midpoint, on_cuda):
    """A ReLU has its kink between the first two samples."""
    one, half = torch.ones(1, 1, device=on_cuda), torch.full((1,), -0.5, device=on_cuda)
    exact = torch.tensor([[0.5 - 1e-6], [0.5 + 1e-6], [1.0], [2.0]], dtype=torch.float64, device=on_cuda)
    codes = [ACTIVATIONS.index(name) for name in ("identity", "relu", "identity")]
    op = torch.ops.lmnfast.path_connectivity if midpoint is None else torch.ops.lmnfast.hermite_connectivity
    arguments = (exact.float(), [one, one], [half, None], codes, [0.0] * 6, [], [], *UNIFORM)
    arguments = (*arguments, *(() if midpoint is None else (midpoint,)))
    L, counts = op(*arguments)
    assert L[0, 1] == UNRESOLVED and counts[1] == 1
    for inputs, same in (
        (torch.tensor([1.0, 1, 2, 3], device=on_cuda)[:, None], True),
        (exact.float(), False),
    ):
        L, counts = op(*arguments, exact=exact, inputs=inputs)
        assert counts.tolist() == [0, 0] and (L[0, 1] == 1 if same else 0.7 < L[0, 1] < 0.95)


@pytest.mark.parametrize("midpoint", [None, True])
def test_short_chords_on_the_device_agree_with_float64(midpoint, on_cuda):
    chain = random_chain([6, 30, 20, 5], ["identity", "gelu", "tanh", "identity"])
    x = short_chords(6, 1e-3)
    exact = Chain(*_rounded(chain, torch.float32))
    expected = truth(exact, x)
    if midpoint:
        expected = reference.hermite_connectivity(exact, x.double(), *UNIFORM, midpoint=True)
    measured = chain_connectivity(cast(chain, torch.float32, on_cuda), x.to(on_cuda), *UNIFORM, midpoint)
    assert measured.counts[1] == 0
    assert (measured.L.cpu() - expected).diagonal(7)[:7].abs().max() < 1e-6
    assert (measured.L.cpu() - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "exact, inputs, error, message",
    [
        (None, torch.zeros(9, 6), ValueError, "exact, inputs: expected both or neither"),
        (torch.zeros(9, 12), torch.zeros(9, 6), TypeError, "exact: expected torch.float64"),
        (torch.zeros(9, 11).double(), torch.zeros(9, 6), ValueError, r"exact: expected \(9, 12\)"),
        (
            torch.zeros(9, 12).double(),
            torch.zeros(9, 6).double(),
            TypeError,
            "inputs: expected torch.float32",
        ),
        (torch.zeros(9, 12).double(), torch.zeros(8, 6), ValueError, r"inputs: expected \(9, \*\)"),
    ],
)
def test_exact_samples_that_do_not_fit_are_refused(exact, inputs, error, message):
    chain = cast(random_chain([6, 12, 4], ["identity", "tanh", "identity"]), torch.float32)
    arguments = _hoisted(chain, torch.zeros(9, 6)).arguments(torch.float32)
    for op, more in (
        (torch.ops.lmnfast.path_connectivity, ()),
        (torch.ops.lmnfast.hermite_connectivity, (True,)),
    ):
        assert_refused(op, [*arguments, *UNIFORM, *more, exact, inputs], error, message)


# f in float64 ----------------------------------------------------------------------------------------------


class Casting(nn.Module):
    """Says its dtypes itself, in every usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.register_buffer("shift", torch.linspace(0, 1, 4))

    def forward(self, z):
        z = z.to(self.linear.weight.dtype).float()
        h = self.linear(z).to(torch.float32) + self.shift.type_as(z)
        return torch.softmax(h, -1, dtype=torch.float32) + torch.zeros(4, dtype=torch.float32)


class InPlace(nn.Module):
    """Fills a new tensor column by column, and changes what it has."""

    def forward(self, z):
        out = torch.zeros(len(z), 3)
        for k in range(3):
            out[:, k] = torch.tanh(z[:, k] * z[:, -1])
        return out.mul_(2).add_(torch.ones(3)).relu_()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten()),
        lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.GRU(1, 4, batch_first=True)),
        lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.LayerNorm(4), nn.Flatten()),
        Casting,
        InPlace,
    ],
)
def test_a_network_in_float32_is_evaluated_in_float64(make):
    torch.manual_seed(0)
    net = make().requires_grad_(False).eval()
    recurrent = isinstance(net, nn.Sequential) and isinstance(net[-1], nn.GRU)
    last = (lambda z: net(z)[0][:, -1]) if recurrent else net
    x = torch.randn(7, 5)
    exact = copy.deepcopy(net).double()
    if isinstance(net, InPlace):
        expected = torch.relu(2 * torch.tanh(x[:, :3].double() * x[:, -1:].double()) + 1)
    elif isinstance(net, Casting):
        h = torch.nn.functional.linear(x.double(), exact.linear.weight, exact.linear.bias) + exact.shift
        expected = torch.softmax(h, -1)
    else:
        expected = exact(x.double())
        expected = expected[0][:, -1] if isinstance(expected, tuple) else expected
    y, _ = Widened(last, x, last(x).flatten(1)).values().at(x.double())
    assert y.dtype == torch.float64
    assert (y - expected.flatten(1)).abs().max() < 1e-14
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda z: torch.from_numpy(z.float().numpy()) if z.dtype == torch.float32 else 1 / 0,
        lambda z: z.abs() if z.dtype == torch.float32 else z.square(),
    ],
)
def test_what_cannot_be_evaluated_in_float64_says_so_and_is_measured_as_it_is(spoil):
    x = torch.randn(6, 3)
    with pytest.warns(UserWarning, match="^f: cannot be evaluated in float64"):
        values = Widened(spoil, x, spoil(x)).values()
    y, _ = values.at(x.double())
    assert y.dtype == torch.float64 and torch.equal(y.float(), spoil(x))


@pytest.mark.parametrize("shift", [12.0, 15.0, 18.0, 25.0])
@pytest.mark.parametrize("head", ["log_softmax", "loss", "complement"])
def test_outputs_that_are_nothing_but_rounding_in_float32(head, shift):
    """Numbers near 0 that are computed from numbers near 1, as the losses of a confident classifier."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 5)).requires_grad_(False)
    net[2].bias[0] += shift
    x = torch.randn(16, 8)

    def f(z):
        y = net(z) if z.dtype == torch.float32 else exact(z)
        if head == "loss":
            return torch.logsumexp(y, 1, keepdim=True) - y[:, :1]
        return torch.log_softmax(y, 1) if head == "log_softmax" else 1 - torch.sigmoid(y[:, :1])

    exact = copy.deepcopy(net).double()
    right = lmnfast.lmn(f, x.double())
    assert lmnfast.lmn(lambda z: f(z), x) == pytest.approx(right.item(), rel=0.01)


@pytest.mark.parametrize("warm", [True, False])
def test_a_buffer_that_a_forward_pass_writes_and_reads(warm):
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
            self.register_buffer("gate", torch.zeros(4096, 16))

        def forward(self, z):
            h = self.first(z)
            self.gate[: len(h)] = torch.sigmoid(h)
            return self.last(h * self.gate[: len(h)])

    torch.manual_seed(0)
    net, x = Static().requires_grad_(False), nearly_equal(1e-6)
    right = lmnfast.lmn(copy.deepcopy(net).double(), x.double())
    if warm:
        net(x)
    assert lmnfast.lmn(net, x) == pytest.approx(right.item(), rel=1e-3)


def test_a_scripted_network_is_evaluated_in_float64_as_a_copy():
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 3)),
        nearly_equal(1e-6),
    )
    right = lmnfast.lmn(copy.deepcopy(net).double(), x.double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(net, x)
    assert lmnfast.lmn(scripted, x) == pytest.approx(right.item(), rel=1e-3)
    assert all(p.dtype == torch.float32 for p in scripted.parameters())


@pytest.mark.parametrize("convert", [lambda y: y.type(torch.FloatTensor), lambda y: torch.tensor(y.tolist())])
def test_outputs_that_f_converts_to_float32_are_no_float64(convert):
    net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)).requires_grad_(False)
    with pytest.warns(UserWarning, match="it converts its outputs to float32"):
        lmnfast.lmn(lambda z: convert(net(z)), nearly_equal(1e-6))


def test_equal_samples_need_no_second_look():
    x = torch.randn(6, 3).repeat(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        L = lmnfast.connectivity(lambda z: torch.tanh(z) if z.dtype == torch.float32 else 1 / 0, x)
    assert (L.diagonal(6) == 1).all()


def test_no_warning_where_nothing_is_unresolved():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lmnfast.lmn(lambda z: torch.tanh(z) if z.dtype == torch.float32 else 1 / 0, torch.randn(9, 3))
