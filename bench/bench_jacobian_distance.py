"""Distances of Jacobians, including their features, against PyTorch's Jacobians with cdist or the Gram form.

pytest bench/bench_jacobian_distance.py
"""

from importlib.util import find_spec

import pytest
import torch
from timing import best_of, product_s
from torch import nn

import lmnfast
from lmnfast import ops, reference

CLOSENESS = 1e-5  # distance of every second sample to the sample before; the Gram form has no correct digits for such pairs


def network(device, outputs=31):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, outputs)).to(device)


def samples(n, device):
    x = torch.randn(n, 100, generator=torch.Generator().manual_seed(1))
    x[1::2] = x[: n // 2 * 2 : 2] + CLOSENESS * torch.randn(
        n // 2, 100, generator=torch.Generator().manual_seed(2)
    )
    return x.to(device)


def through_cdist(f, x):
    J = reference.jacobian(f, x).flatten(1)
    return torch.cdist(J, J)


def through_gram(f, x):
    J = reference.jacobian(f, x).flatten(1)
    gram = J @ J.mT
    norms = gram.diagonal().clone()
    return gram.mul_(-2).add_(norms).add_(norms[:, None]).clamp_(min=0).sqrt_()


def fill(f, x):
    """The floor: write the result."""
    return x.new_ones(len(x), len(x))


BARS = {
    "ours": lmnfast.jacobian_distances,
    "ours, affine": lambda f, x: lmnfast.jacobian_distances(f, x, affine=True),
    "eager, vmap(jacrev), cdist": through_cdist,
    "eager, vmap(jacrev), Gram": through_gram,
    "torch.compile, vmap(jacrev), Gram": torch.compile(through_gram, dynamic=False),
    "fill": fill,
}
if find_spec("jax"):
    import in_jax

    BARS["jax.jit, vmap(jacrev), Gram"] = in_jax.jacobian_distances


def floor(x, units=100) -> float:
    """Seconds to write the result, or seconds of the products, whichever is longer. The products are the samples' features in
    float64 and half of their Gram matrix in float32."""
    n, inputs = x.shape
    features = product_s(n * units * (inputs + units), torch.float64, x.device)
    return max(best_of(lambda: fill(None, x)), features + product_s(n * n * units / 2, device=x.device))


def relative_error(d, f, x):
    """The largest relative error of the first samples' distances, with close pairs among them, against float64 Jacobians."""
    some = x[:100].double()
    J = reference.jacobian(f.double(), some).flatten(1)
    f.float()
    truth = reference.jacobian_distance(J, J, False)
    error = (d[:100, :100] - truth).abs()
    # The Gram form has an error of about the square root of epsilon at close pairs.
    assert error.max() < 1e-2 * truth.max()
    return float((error / truth).nan_to_num(0).max())


@pytest.mark.parametrize("n", [768, 961, 4096])
@pytest.mark.parametrize("bar", BARS)
def bench_jacobian_distances(benchmark, measure, precision, device, n, bar):
    benchmark.group = f"jacobian distances {n}, 100-100-31, {device.type}"
    benchmark.extra_info["bar"] = bar
    if bar.startswith("jax") and device.type != "cpu":
        pytest.skip("JAX joins on the CPU")
    f, x = network(device), samples(n, device)
    benchmark.extra_info["floor_s"] = floor(x)
    if bar not in ("fill", "ours, affine"):
        error = relative_error(BARS[bar](f, x), f, x)
        benchmark.extra_info["relative error"] = error
        assert error < 1e-4 or bar != "ours"
    measure(BARS[bar], (f, x), rounds=7)


def squared_differences(first, second):
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").float()


@torch.compile(dynamic=False)
def compiled(u, v):
    """All differences at once, fused by the compiler, which would unroll the reference's loop over rows."""
    return (u[:, None] - v).square().sum(-1).sqrt().float()


OPS = {
    "ours": lambda u, v: ops.jacobian_distance(u, v, False, torch.float32),
    "eager, cdist of differences": squared_differences,
    "torch.compile": compiled,
    "eager, reference": lambda u, v: reference.jacobian_distance(u, v, False).float(),
    "fill": lambda u, v: u.new_ones(len(u), len(v), dtype=torch.float32),
}


@pytest.mark.parametrize("m, n, width", [(768, 768, 100), (961, 250, 33), (200, 200, 3100)])
@pytest.mark.parametrize("bar", OPS)
def bench_jacobian_distance(benchmark, measure, device, m, n, width, bar):
    benchmark.group = f"jacobian_distance {m} x {n} x {width}, {device.type}"
    benchmark.extra_info["bar"] = bar
    u = torch.randn(m, width, device=device, dtype=torch.float64)
    v = u if m == n else torch.randn(n, width, device=device, dtype=torch.float64)
    multiply_adds = m * n * width / (2 if u is v else 1)
    benchmark.extra_info["floor_s"] = max(
        best_of(lambda: OPS["fill"](u, v)), product_s(multiply_adds, device=device)
    )
    if bar != "fill":
        truth = reference.jacobian_distance(u[:50], v, False)
        assert (OPS[bar](u, v)[:50] - truth).abs().max() < 1e-6 * truth.max()
    measure(OPS[bar], (u, v), rounds=7)
