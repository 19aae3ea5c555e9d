"""The generic route against a loop over chunks written by hand around the same network.

pytest bench/bench_connectivity.py
"""

import pytest
import torch
from conftest import best_of
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
    pairs = torch.triu_indices(len(x), len(x), 1, device=x.device)
    t = UNIFORM[0].to(x)
    centred = (t - 0.5)[:, None]
    L = torch.ones(len(x), len(x), device=x.device)
    for first, second in zip(pairs[0].split(chunk), pairs[1].split(chunk)):
        y = f(torch.lerp(x[first, None], x[second, None], t[:, None]).flatten(0, 1)).unflatten(0, (-1, 21))
        y = y - y.mean(1, keepdim=True)
        r2 = ((centred * y).mean(1) ** 2 / ((centred**2).mean() * y.square().mean(1))).mean(1)
        L[first, second] = L[second, first] = r2
    return L


# Chunks that were fastest on 2 cores; on a card they are tried in the run.
CHUNKS = {"cpu": [2048], "cuda": [2**k for k in range(12, 19, 2)]}
SAMPLES = {"cpu": 300, "cuda": 961}


@pytest.mark.parametrize("bar", ["ours", "by hand", "reference"])
def bench_generic_route(benchmark, measure, precision, device, bar):
    torch.manual_seed(0)
    n = SAMPLES[device.type]
    f, x = Residual().requires_grad_(False).to(device), torch.randn(n, 64).to(device)
    benchmark.group = f"connectivity, generic route, residual 64-64-64-10 N={n}, {device.type}"
    benchmark.extra_info["bar"] = bar
    calls = {
        "ours": lmnfast.connectivity,
        "by hand": by_hand,
        "reference": lambda f, x: reference.path_connectivity(f, x, *(v.to(device) for v in UNIFORM)),
    }
    arguments = (f, x)
    truth = calls["reference"](f.double(), x.double())
    f.float()
    if bar == "by hand":
        chunks = CHUNKS[device.type]
        chunk = (
            min(chunks, key=lambda c: best_of(lambda: by_hand(f, x, c), 2)) if len(chunks) > 1 else chunks[0]
        )
        benchmark.extra_info["chunk"] = chunk
        arguments = (f, x, chunk)
    assert (calls[bar](*arguments) - truth).abs().max() < 2e-5
    measure(calls[bar], arguments, rounds=7)
