"""Jacobians of an MLP tail, by the op and by the user's call, against PyTorch's and against writing the result.

pytest bench/bench_jacobian.py
"""

import itertools
from importlib.util import find_spec

import pytest
import torch
from timing import best_of, product_s
from torch import nn

import lmnfast
from lmnfast import ops, reference
from lmnfast._chain import Activation, Chain

TAIL = (100, 100, 31)
SHAPES = [(768, TAIL), (961, TAIL), (4096, TAIL), (961, (100, 100, 100, 31)), (257, (31, 100, 100, 97))]


def chain_of(widths, device):
    g = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g, device=device)

    return Chain(
        tuple(draw(o, i) / i**0.5 for i, o in itertools.pairwise(widths)),
        tuple(draw(o) for o in widths[1:]),
        tuple(Activation("silu" if 0 < n < len(widths) - 1 else "identity") for n in range(len(widths))),
    )


def one_product(chain, x):
    """Multiplies from the last layer backwards, with one product per layer for all samples."""
    z, slopes = x, []
    for weight, bias in list(zip(chain.weights, chain.biases))[:-1]:
        z = torch.nn.functional.linear(z, weight, bias)
        s = z.sigmoid()
        slopes.append(s * (1 + z * (1 - s)))
        z = z * s
    J = chain.weights[-1].expand(len(x), -1, -1)
    for weight, slope in zip(reversed(chain.weights[:-1]), reversed(slopes)):
        J = (J * slope[:, None]) @ weight
    return J


compiled = torch.compile(one_product, dynamic=False)


def fill(chain, x):
    """The floor: write the result."""
    return x.new_ones(len(x), len(chain.weights[-1]), x.shape[1])


BARS = {
    "ours": ops.jacobian,
    "eager, vmap(jacrev)": reference.jacobian,
    "eager, batched product": one_product,
    "torch.compile, batched product": compiled,
    "fill": fill,
}
CALLS = {"ours": lmnfast.jacobians, "eager, vmap(jacrev)": reference.jacobian, "fill": fill}
if find_spec("jax"):
    import in_jax

    BARS["jax.jit, vmap(jacrev)"] = CALLS["jax.jit, vmap(jacrev)"] = in_jax.jacobian


def floor(chain, x) -> float:
    """Seconds to write the result, or seconds of all products as one product, whichever is longer."""
    sizes = [weight.numel() for weight in chain.weights]
    backwards, forwards = len(chain.weights[-1]) * sum(sizes[:-1]), x.shape[1] * sum(sizes[1:])
    multiply_adds = len(x) * min(backwards, forwards)
    return max(best_of(lambda: fill(chain, x)), product_s(multiply_adds, device=x.device))


@pytest.mark.parametrize("n, widths", SHAPES, ids=str)
@pytest.mark.parametrize("bar", BARS)
def bench_jacobian(benchmark, measure, precision, device, n, widths, bar):
    benchmark.group = f"jacobian {n}, {'-'.join(map(str, widths))}, {device.type}"
    benchmark.extra_info["bar"] = bar
    if bar.startswith("jax") and device.type != "cpu":
        pytest.skip("JAX joins on the CPU")
    chain = chain_of(widths, device)
    x = torch.randn(n, widths[0], generator=torch.Generator(device).manual_seed(1), device=device)
    benchmark.extra_info["floor_s"] = floor(chain, x)
    if bar != "fill":
        double = Chain(
            tuple(w.double() for w in chain.weights),
            tuple(b.double() for b in chain.biases),
            chain.activations,
        )
        truth = reference.jacobian(double, x[:100].double())
        assert (BARS[bar](chain, x)[:100] - truth).abs().max() < 1e-5 * truth.abs().max()
    measure(BARS[bar], (chain, x), rounds=15, warmup_rounds=2)


def network(widths, device):
    chain, layers = chain_of(widths, device), []
    for weight, bias in zip(chain.weights, chain.biases):
        layers += [nn.Linear(weight.shape[1], len(weight), device=device), nn.SiLU()]
        layers[-2].weight.copy_(weight)
        layers[-2].bias.copy_(bias)
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("n, widths", SHAPES, ids=str)
@pytest.mark.parametrize("bar", CALLS)
def bench_jacobians(benchmark, measure, precision, device, n, widths, bar):
    benchmark.group = f"jacobians {n}, {'-'.join(map(str, widths))}, {device.type}"
    benchmark.extra_info["bar"] = bar
    if bar.startswith("jax") and device.type != "cpu":
        pytest.skip("JAX joins on the CPU")
    f, chain = network(widths, device), chain_of(widths, device)
    x = torch.randn(n, widths[0], generator=torch.Generator(device).manual_seed(1), device=device)
    benchmark.extra_info["floor_s"] = floor(chain, x)
    if bar == "fill":
        measure(fill, (chain, x), rounds=15, warmup_rounds=2)
        return
    truth = reference.jacobian(f.double(), x[:100].double())
    f.float()
    assert (CALLS[bar](f, x)[:100] - truth).abs().max() < 1e-5 * truth.abs().max()
    measure(CALLS[bar], (f, x), rounds=15, warmup_rounds=2)
