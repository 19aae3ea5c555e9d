"""The generic route against a loop over chunks written by hand around the same network.

pytest bench/bench_connectivity.py
"""

import pytest
import torch
from torch import nn

import lmnfast
from lmnfast import reference
from lmnfast.quadrature import path_nodes

UNIFORM = path_nodes("uniform", 21)


class Residual(nn.Module):
    """Not a chain: goes the generic route."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = x + nn.functional.silu(self.first(x))
        x = x + nn.functional.silu(self.second(x))
        return self.last(x)


def by_hand(f, x, chunk=2048):
    """All 21 points of a chunk of pairs through f, then the definition in a few large operations."""
    pairs = torch.triu_indices(len(x), len(x), 1)
    t = UNIFORM[0].float()
    centred = (t - 0.5)[:, None]
    L = torch.ones(len(x), len(x))
    for first, second in zip(pairs[0].split(chunk), pairs[1].split(chunk)):
        y = f(torch.lerp(x[first, None], x[second, None], t[:, None]).flatten(0, 1)).unflatten(0, (-1, 21))
        y = y - y.mean(1, keepdim=True)
        r2 = ((centred * y).mean(1) ** 2 / ((centred**2).mean() * y.square().mean(1))).mean(1)
        L[first, second] = L[second, first] = r2
    return L


BARS = {
    "ours": lmnfast.connectivity,
    "by hand": by_hand,
    "reference": lambda f, x: reference.path_connectivity(f, x, *UNIFORM),
}


@pytest.mark.parametrize("bar", BARS)
def bench_generic_route(benchmark, bar):
    torch.manual_seed(0)
    f, x = Residual().requires_grad_(False), torch.randn(300, 64)
    benchmark.group = "connectivity, generic route, residual 64-64-64-10 N=300"
    benchmark.extra_info["bar"] = bar
    truth = reference.path_connectivity(f.double(), x.double(), *UNIFORM)
    assert (BARS[bar](f.float(), x) - truth).abs().max() < 2e-5
    benchmark.pedantic(BARS[bar], (f, x), rounds=7, warmup_rounds=1)
