"""What the tests of connectivity share: networks, samples, and calls that are counted."""

import support
import torch
from torch import nn

# Float32: about twice the largest error of an entry that was measured on a card at "highest", 2.7e-5 (docs/gpu.md).
# Float64: what the generic route's Hermite methods may lose (docs/number.md, How far from exact).
ON_A_CARD = {torch.float32: 5e-5, torch.float64: 1e-11}


def mlp(*widths: int, activation=nn.SiLU, seed: int = 0, gain: float = 2.0) -> nn.Sequential:
    return support.mlp(*widths, activation=activation, seed=seed, gain=gain)


def inputs(*shape: int, seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def counted(f):
    """f as a plain callable, which is never recognised, with the batch sizes it was called with."""

    def call(x):
        call.batches.append(len(x))
        return f(x)

    call.batches = []
    return call


def scaled(factor):
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(factor)
        net[2].weight.fill_(factor)
    return net


NAN = float("nan")
WRONG = {
    "samples": (scaled(1), [[1.0], [NAN], [2.0], [NAN]]),
    "outputs": (scaled(1e30), [[-1.0], [1.0], [-2.0], [3.0]]),
    "both": (scaled(1e30), [[-1.0], [1.0], [NAN], [3.0]]),
    "outputs, generic": (lambda x: 1 / x, [[1.0], [2.0], [0.0]]),
    "between": (lambda x: 1 / (x - 1), [[4.0], [0.0], [2.0]]),
}
