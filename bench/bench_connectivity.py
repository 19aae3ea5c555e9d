"""The generic route against a loop over chunks written by hand around the same network, and, of a residual network, which
is a chain on the CPU, against the fused kernel.

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
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = x + nn.functional.silu(self.first(x))
        x = x + nn.functional.silu(self.second(x))
        return self.last(x)


class Transformer(nn.Module):
    """The rest of one after its embedding: two blocks, logits at the last position."""

    def __init__(self, width=64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 31)

    def forward(self, x):
        return self.head(self.blocks(x)[:, -1])


def convolutional() -> nn.Module:
    """The rest of one after its first convolution."""
    return nn.Sequential(
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 10),
    )


# Network, shape of a sample, samples on the CPU and on a card.
NETWORKS = {
    "residual": (Residual, (64,), {"cpu": 300, "cuda": 961}),
    "convolutional": (convolutional, (8, 14, 14), {"cpu": 64, "cuda": 512}),
    "transformer": (Transformer, (3, 64), {"cpu": 64, "cuda": 512}),
}


def by_hand(f, x, chunk):
    """The points of a chunk of pairs through f, the ends but once, then the definition in a few large operations."""
    pairs = torch.triu_indices(len(x), len(x), 1, device=x.device)
    t = UNIFORM[0].to(x)
    centred = (t - 0.5)[:, None]
    inner = t[1:-1].reshape(-1, *[1] * (x.dim() - 1))
    ends = f(x)
    L = torch.ones(len(x), len(x), device=x.device)
    for first, second in zip(pairs[0].split(chunk), pairs[1].split(chunk)):
        y = f(torch.lerp(x[first, None], x[second, None], inner).flatten(0, 1)).unflatten(0, (-1, 19))
        y = torch.cat((ends[first, None], y, ends[second, None]), 1)
        y = y - y.mean(1, keepdim=True)
        r2 = ((centred * y).mean(1) ** 2 / ((centred**2).mean() * y.square().mean(1))).mean(1)
        L[first, second] = L[second, first] = r2
    return L


CHUNKS = {"cpu": [2**k for k in range(4, 12)], "cuda": [2**k for k in range(8, 19, 2)]}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bar", ["ours", "ours, torch.compile", "ours, fused", "by hand", "reference"])
def bench_connectivity(benchmark, measure, precision, device, network, bar):
    if bar == "ours, fused" and (network, device.type) != ("residual", "cpu"):
        pytest.skip("no chain, or none that the device's kernels know")
    torch.manual_seed(0)
    make, shape, samples = NETWORKS[network]
    n = samples[device.type]
    f, x = make().requires_grad_(False).to(device).eval(), torch.randn(n, *shape).to(device)
    benchmark.group = f"connectivity, generic route, {network} N={n}, {device.type}"
    benchmark.extra_info["bar"] = bar
    compiled = torch.compile(f)
    calls = {
        # A function goes the generic route, whatever it calls.
        "ours": lambda f, x: lmnfast.connectivity(lambda points: f(points), x),
        "ours, torch.compile": lambda f, x: lmnfast.connectivity(lambda points: compiled(points), x),
        "ours, fused": lmnfast.connectivity,
        "by hand": by_hand,
        "reference": lambda f, x: reference.path_connectivity(f, x, *(v.to(device) for v in UNIFORM)),
    }
    arguments = (f, x)
    truth = calls["reference"](f.double(), x.double())
    f.float()
    if bar == "by hand":
        chunk = min(CHUNKS[device.type], key=lambda c: best_of(lambda: by_hand(f, x, c), 2))
        benchmark.extra_info["chunk"] = chunk
        arguments = (f, x, chunk)
    assert (calls[bar](*arguments) - truth).abs().max() < 1e-4
    measure(calls[bar], arguments, rounds=5)
