"""The generic route's reduction against PyTorch and against a copy of its input.

pytest bench/bench_path_r2.py
"""

import pytest
import torch

from lmnfast import ops, reference
from lmnfast.quadrature import path_nodes

RULE = path_nodes("uniform", 21)


def eager(interior, ends, first, second, nodes, weights):
    """The sums of the definition as products with (nodes,) vectors: three passes over y, no copy of it."""
    t = (nodes - 0.5).float()
    w = weights.float()
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
    """The floor: read y and write it elsewhere; ours only reads."""
    out = copied.setdefault(interior.shape, torch.empty_like(interior))
    return out.copy_(interior)


BARS = {
    "ours": ops.path_r2,
    "eager": eager,
    "torch.compile": compiled,
    "reference": reference.path_r2,
    "copy of y": copy,
}


@pytest.mark.parametrize("pairs, outputs", [(40000, 31), (100000, 10), (1000000, 1), (1500, 1000)])
@pytest.mark.parametrize("bar", BARS)
def bench_path_r2(benchmark, pairs, outputs, bar):
    g = torch.Generator().manual_seed(0)
    benchmark.group = f"path_r2 {pairs} x 19 x {outputs}"
    benchmark.extra_info["bar"] = bar
    first, second = torch.randint(700, (2, pairs), generator=g)
    ends = torch.randn(700, outputs, generator=g)
    arguments = (torch.randn(pairs, 19, outputs, generator=g), ends, first, second, *RULE)
    if bar != "copy of y":
        truth = reference.path_r2(arguments[0].double(), ends.double(), first, second, *RULE)
        assert (BARS[bar](*arguments) - truth).abs().max() < 2e-5
    benchmark.pedantic(BARS[bar], arguments, rounds=15, warmup_rounds=2)
