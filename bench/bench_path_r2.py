"""The generic route's reduction against PyTorch and against a copy of its input.

pytest bench/bench_path_r2.py
"""

import pytest
import torch
from timing import best_of, copy_rate

from lmnfast import ops, reference
from lmnfast.quadrature import path_nodes

RULE = path_nodes("uniform", 21)
# On a card there are eight times as many pairs, so that y is several times as large as the L2 cache. Prediction for an H200,
# whose copies move 4.3 TB/s: reading y, 320 000 x 19 x 31 floats, takes 0.18 ms, and copying it takes 0.35 ms. Our kernel
# should take at most 1.3 times the copy, 0.46 ms.
ON_A_CARD = 8


def eager(interior, ends, first, second, nodes, weights):
    """The sums of the definition as products with (nodes,) vectors: three passes over y, without a copy of y."""
    t = (nodes - 0.5).to(interior)
    w = weights.to(interior)
    yi, yj = ends[first], ends[second]
    y = interior - yi[:, None]
    last = yj - yi
    mean = torch.einsum("m,pmk->pk", w[1:-1], y) + w[-1] * last
    covariance = torch.einsum("m,pmk->pk", (w * t)[1:-1], y) + (w * t)[-1] * last
    square = torch.einsum("m,pmk->pk", w[1:-1], y.square_()) + w[-1] * last.square()
    return (covariance**2 / ((w * t * t).sum() * (square - mean**2))).mean(1)


compiled = torch.compile(eager, dynamic=False)
copied = {}


def copy(interior, *_):
    """The floor: reads y and writes a copy. Our kernel only reads y."""
    out = copied.setdefault((interior.device, interior.shape), torch.empty_like(interior))
    return out.copy_(interior)


BARS = {  # PyTorch's functions need the rule on y's device
    "ours": ops.path_r2,
    "eager": eager,
    "torch.compile": compiled,
    "eager, reference": reference.path_r2,
    "copy of y": copy,
}


@pytest.mark.parametrize("pairs, outputs", [(40000, 31), (100000, 10), (1000000, 1), (1500, 1000)])
@pytest.mark.parametrize("bar", BARS)
def bench_path_r2(benchmark, measure, precision, device, pairs, outputs, bar):
    g = torch.Generator(device).manual_seed(0)
    pairs *= ON_A_CARD if device.type == "cuda" else 1
    benchmark.group = f"path_r2 {pairs} x 19 x {outputs}, {device.type}"
    benchmark.extra_info["bar"] = bar
    first, second = torch.randint(700, (2, pairs), generator=g, device=device)
    ends = torch.randn(700, outputs, generator=g, device=device)
    rule = RULE if bar == "ours" else [v.to(device) for v in RULE]
    arguments = (torch.randn(pairs, 19, outputs, generator=g, device=device), ends, first, second, *rule)
    if device.type == "cuda":
        benchmark.extra_info["floor_s"] = arguments[0].nbytes / copy_rate()
    else:
        benchmark.extra_info["floor_s"] = best_of(arguments[0].sum)  # reads y and writes nothing
    if bar != "copy of y":
        # Only the first and the last pairs are checked: float64 outputs of all pairs would not fit every card.
        parts = [slice(0, 1500), slice(pairs - 1500, pairs)]
        r2 = BARS[bar](*arguments)
        for part in parts:
            y, i, j = arguments[0][part].double(), first[part], second[part]
            truth = reference.path_r2(y, ends.double(), i, j, *(v.to(device) for v in RULE))
            assert (r2[part] - truth).abs().max() < 2e-5
    measure(BARS[bar], arguments, rounds=15, warmup_rounds=2)
    copied.clear()
