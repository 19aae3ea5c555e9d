"""Pairs that a dtype cannot resolve: dead and cancelling outputs, paths of another scale, samples that nearly agree."""

import copy
import re
from pathlib import Path

import pytest
import torch
from chains import cast, in_dtype, nearly_equal, random_chain, random_sums, samples, truth
from support import UNIFORM, fewer
from torch import nn

import lmnfast
from lmnfast import _generic, _polynomials, ops, reference
from lmnfast._chain import ACTIVATIONS, Activation, Chain
from lmnfast._samples import SAME_OUTPUT_ULPS
from lmnfast._unresolved import (
    CLOSE,
    LEAST_ROUNDING,
    RESOLVED_ULPS,
    TOTALS,
    UNRESOLVED,
    are_close,
)
from lmnfast.ops._hoisted import hoisted
from lmnfast.ops.path_connectivity import chain_connectivity

CONSTANTS = {
    "kUnresolved": UNRESOLVED,
    "kConstantUlps": reference.CONSTANT_ULPS,
    "kResolvedUlps32": RESOLVED_ULPS[torch.float32],
    "kResolvedUlps64": RESOLVED_ULPS[torch.float64],
    "kLeastTotal32": TOTALS[torch.float32][0],
    "kLargestTotal32": TOTALS[torch.float32][1],
    "kLeastTotal64": TOTALS[torch.float64][0],
    "kLargestTotal64": TOTALS[torch.float64][1],
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
    x = samples(fewer(20, 12), widths[0], seed=seed)
    L = ops.path_connectivity(cast(chain, dtype, device), x.to(device, dtype), *UNIFORM).cpu()
    assert (L - truth(cast(chain, dtype).__class__(*in_dtype(chain, dtype)), x.to(dtype))).abs().max() < 2e-4


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
    x, rounded = x.to(dtype), Chain(*in_dtype(chain, dtype))
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

    def counting(values, x, entries, *arguments, **settings):
        left.append(int(entries.counts[1]))
        resolve(values, x, entries, *arguments, **settings)

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


@pytest.mark.parametrize("distance", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("method", ["path", "hermite", "hermite-midpoint"])
def test_samples_that_nearly_agree_give_what_float64_gives(distance, method, device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    x = nearly_equal(distance, n=fewer(10, 6)).to(device)
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
    L, counts, _ = torch.ops.lmnfast.path_connectivity(*hoisted(chain, x).arguments(torch.float32), *UNIFORM)
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
    expected = truth(Chain(*in_dtype(chain, torch.float32)), x)
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
        parts = hoisted(chain, torch.cat([x, x + step]))
        points = parts.samples()
        y, slope, _ = parts.values().along(points[:9], points[9:] - points[:9])
        expected, expected_slope = torch.autograd.functional.jvp(chain, x, step)
        if chain.activations[-1].name == "identity" and chain.biases[-1] is not None:
            expected = expected - chain.biases[-1]
        scale = 1e-14 * (1 + expected.abs().max() + expected_slope.abs().max())
        assert (y - expected).abs().max() < scale and (slope - expected_slope).abs().max() < scale
