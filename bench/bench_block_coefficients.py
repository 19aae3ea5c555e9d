"""The hidden layer of a transformer's block along paths, as coefficients of polynomials, against PyTorch's formula.

pytest bench/bench_block_coefficients.py
"""

import pytest
import torch
import torch.nn.functional as F
from timing import best_of, copy_rate

from lmnfast import ops, reference
from lmnfast._chain import Activation
from lmnfast.ops.block_coefficients import Normalisation
from lmnfast.quadrature import orthonormal_polynomials, path_nodes

UNITS, SAMPLES, DEGREES = 3072, 64, 6
RULE = path_nodes("uniform", 21)
POLYNOMIALS = orthonormal_polynomials(*RULE)
LAYERS = {
    "GELU": ("gelu", False, False),
    "SwiGLU": ("silu", True, False),
    "LayerNorm, GELU": ("gelu", False, True),
}
TORCHS = {"gelu": F.gelu, "silu": F.silu}


def eager(z, first, second, name, gated, norm):
    """The definition with as few passes as PyTorch allows, for the same results: the first degrees and all energies."""
    act, t = TORCHS[name], RULE[0].to(z)[:, None]
    a = torch.lerp(z[first][:, None], z[second][:, None], t)
    if norm is not None:
        own, cross, epsilon = norm
        s = RULE[0].to(own)
        square = (1 - s) ** 2 * own[first, None] + 2 * s * (1 - s) * cross[:, None] + s**2 * own[second, None]
        a = a * torch.rsqrt(square + epsilon).to(z)[..., None]
    h = act(a[..., :UNITS]) * a[..., UNITS:] if gated else act(a)
    residual = h - torch.lerp(h[:, :1], h[:, -1:], t)
    coefficients = POLYNOMIALS.to(z) @ residual  # (rows, degrees, units)
    return coefficients[:, :DEGREES].transpose(0, 1), coefficients.square().sum(-1).double()


def ours(z, first, second, name, gated, norm):
    return ops.block_coefficients(
        z, first, second, Activation(name), *rule_on(z), gated=gated, normalisation=norm, end=DEGREES
    )


def formula(z, first, second, name, gated, norm):
    coefficients, energy = reference.block_coefficients(
        z, first, second, TORCHS[name], *rule_on(z), gated=gated, normalisation=norm
    )
    return coefficients[:DEGREES], energy


def rule_on(z):
    return RULE[0].to(z.device), POLYNOMIALS.to(z.device)


BARS = {
    "ours": ours,
    "eager": eager,
    "torch.compile": torch.compile(eager, dynamic=False),
    "eager, reference": formula,
}


def floor(z, rows, name, gated):
    """Seconds: on the CPU the activations of all path points at PyTorch's rate in cache, and the multiply-adds of all degrees
    as one matrix product. On a card writing the coefficients.

    Prediction for 128 rows of 3072 units on a core with AVX2 at 3 GHz: 7.5 million GELUs at 4e8 / s take 19 ms. 20 x 19
    multiply-adds for each of 393 216 units are 1.5e8, at 16 a cycle 3 ms. Together 22 ms. For a
    card whose copies move 4.3 TB/s: 2048 rows write 151 MB of coefficients, which takes 35 us; the multiply-adds, 2.4e9 at
    3e13 / s, take 80 us, and the activations as long again. Not measured on a card yet.
    """
    points = rows * UNITS * (len(RULE[0]) - 2)
    if z.device.type == "cuda":
        return 4 * DEGREES * rows * UNITS / copy_rate()
    act, some = TORCHS[name], torch.randn(2**14)
    activations = best_of(lambda: [act(some) for _ in range(40)]) / (40 * len(some))
    left, right = POLYNOMIALS[:, 1:-1].float(), torch.randn(len(RULE[0]) - 2, 16 * UNITS)
    return points * activations + rows / 16 * best_of(lambda: left @ right)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bar", BARS)
def bench_block_coefficients(benchmark, measure, device, layer, bar):
    name, gated, normalised = LAYERS[layer]
    rows = 128 if device.type == "cpu" else 2048
    benchmark.group = f"block_coefficients {layer} {rows} x {UNITS}, {device.type}"
    benchmark.extra_info["bar"] = bar
    g = torch.Generator(device).manual_seed(0)
    z = torch.randn(SAMPLES, UNITS * (2 if gated else 1), generator=g, device=device)
    first, second = torch.randint(SAMPLES, (2, rows), generator=g, device=device)
    norm = None
    if normalised:
        x = torch.randn(SAMPLES, 768, generator=g, device=device, dtype=torch.float64)
        norm = Normalisation(x.square().mean(1), (x[first] * x[second]).mean(1), 1e-5)
    benchmark.extra_info["floor_s"] = floor(z, rows, name, gated)
    arguments = (z, first, second, name, gated, norm)
    # Only the first rows are checked: all rows in float64 would take longer than the benchmark.
    part = slice(0, 16)
    few = norm and Normalisation(norm.own, norm.cross[part], norm.epsilon)
    truth = formula(z.double(), first[part], second[part], name, gated, few)
    found = BARS[bar](*arguments)
    assert (found[0][:, part] - truth[0]).abs().max() < 2e-5
    assert (found[1][part] / truth[1] - 1)[:, :DEGREES].abs().nan_to_num(0).max() < 1e-2
    measure(BARS[bar], arguments, rounds=10)
