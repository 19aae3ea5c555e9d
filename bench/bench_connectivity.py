"""The generic route against a hand-written loop over chunks of pairs, with the same network. For a residual network, which is a
chain on the CPU, also against the fused kernel. The MLP blocks of a transformer, which take a route of their own, against the
same loop.

pytest bench/bench_connectivity.py
"""

import functools

import pytest
import torch
from timing import best_of
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
    """The part of a transformer after its embedding: two blocks, and logits at the last position."""

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
    """The part of a convolutional network after its first convolution."""
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


# Network, shape of a sample, numbers of samples on the CPU and on a card.
NETWORKS = {
    "residual": (Residual, (64,), {"cpu": 300, "cuda": 961}),
    "convolutional": (convolutional, (8, 14, 14), {"cpu": 64, "cuda": 512}),
    "transformer": (Transformer, (3, 64), {"cpu": 64, "cuda": 512}),
}


def by_hand(f, x, chunk):
    """Computes f at the points of a chunk of pairs, at the samples only once, and then the definition in a few large
    operations."""
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


@functools.cache
def problem(network: str, device: torch.device):
    """A network, its samples, and their connectivity in float64."""
    torch.manual_seed(0)
    make, shape, samples = NETWORKS[network]
    f = make().requires_grad_(False).to(device).eval()
    x = torch.randn(samples[device.type], *shape).to(device)
    truth = definition(f.double(), x.double())
    return f.float(), x, truth


def definition(f, x):
    return reference.path_connectivity(f, x, *(v.to(x.device) for v in UNIFORM))


@functools.cache
def floor_and_chunk(network: str, device: torch.device) -> tuple[float, int]:
    """The seconds that the network alone takes for all points, without interpolation and reduction; and the fastest chunk of
    the hand-written loop."""
    f, x, _ = problem(network, device)
    chunks = CHUNKS[device.type]
    points = len(x) * (len(x) - 1) / 2 * 19 + len(x)
    batches = [x[torch.arange(19 * chunk) % len(x)] for chunk in chunks[:5]]
    floor = points * min(best_of(functools.partial(f, batch), 3) / len(batch) for batch in batches)
    return floor, min(chunks, key=lambda c: best_of(lambda: by_hand(f, x, c), 1))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "bar",
    [
        "ours",
        "ours, torch.compile",
        "ours, fused",
        "eager, by hand",
        "torch.compile, by hand",
        "eager, reference",
    ],
)
def bench_connectivity(benchmark, measure, precision, device, network, bar):
    if bar == "ours, fused" and (network, device.type) != ("residual", "cpu"):
        pytest.skip("no chain, or none that the device's kernels know")
    f, x, truth = problem(network, device)
    benchmark.group = f"connectivity, generic route, {network} N={len(x)}, {device.type}"
    benchmark.extra_info["bar"] = bar
    benchmark.extra_info["floor_s"], chunk = floor_and_chunk(network, device)
    run = torch.compile(f) if "compile" in bar else f
    call, arguments = definition, (run, x)
    if bar == "ours, fused":
        call = lmnfast.connectivity
    elif bar.startswith("ours"):
        call = lmnfast.connectivity
        if network == "residual":  # a function, unlike a module, always takes the generic route
            arguments = (lambda points: run(points), x)
    if "by hand" in bar:
        benchmark.extra_info["chunk"] = chunk
        call, arguments = by_hand, (run, x, chunk)
    assert (call(*arguments) - truth).abs().max() < 1e-4
    measure(call, arguments, rounds=5)


class Mlp(nn.Module):
    """The MLP of a transformer's block of GPT-2's width: [norm], a hidden layer, gated or not, [+ x]."""

    def __init__(
        self, norm: nn.Module, activation: nn.Module, gated: bool, adds: bool, width=768, units=3072
    ):
        super().__init__()
        self.norm, self.activation, self.adds = norm, activation, adds
        self.first, self.last = nn.Linear(width, units), nn.Linear(units, width)
        self.gate = nn.Linear(width, units) if gated else None

    def forward(self, x):
        n = self.norm(x)
        h = self.activation(self.first(n))
        y = self.last(h if self.gate is None else h * self.gate(n))
        return x + y if self.adds else y


BLOCKS = {
    "GELU": lambda: Mlp(nn.Identity(), nn.GELU(), False, False),
    "SwiGLU": lambda: Mlp(nn.Identity(), nn.SiLU(), True, False),
    "x + GELU of LayerNorm": lambda: Mlp(nn.LayerNorm(768), nn.GELU(), False, True),
    "x + SwiGLU of RMSNorm": lambda: Mlp(nn.RMSNorm(768), nn.SiLU(), True, True),
}
# At 256 samples on 2 cores the loop takes about a minute. With few samples, what ours does once counts for more.
BLOCK_SAMPLES = {"cpu": 24, "cuda": 512}


@functools.cache
def block_problem(block: str, device: torch.device):
    """A block, its samples, their connectivity by hand in float64 on some of them, and the best chunk."""
    torch.manual_seed(0)
    f = BLOCKS[block]().requires_grad_(False).to(device).eval()
    x = torch.randn(BLOCK_SAMPLES[device.type], 768, device=device)
    some = x[:8]
    truth = definition(f.double(), some.double())
    f.float()
    chunks = [2, 4, 8, 16, 28] if device.type == "cpu" else [64, 256, 1024]
    chunk = min(chunks, key=lambda c: best_of(lambda: by_hand(f, some if device.type == "cpu" else x, c), 2))
    return f, x, truth, chunk


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bar", ["ours", "ours, generic route", "eager, by hand", "torch.compile, by hand"])
def bench_block(benchmark, measure, precision, device, block, bar):
    """Predicted, of the loop's time: it multiplies at 19 nodes by two Linears, or three with a gate; ours by one, for 6 to 8
    coefficients, and spends about a fifth of that time on the hidden layer. So 1 / 4 to 1 / 5, and 1 / 6 to 1 / 8 with a gate.
    Measured at N = 256 on 2 cores with AVX-512: 1 / 4.5 and 1 / 6.5; behind a normalisation 1 / 3.7 and 1 / 5.9.
    There 8 or 9 coefficients are needed, as the bound asks for more than the truth.
    """
    f, x, truth, chunk = block_problem(block, device)
    benchmark.group = f"connectivity, MLP block 768-3072-768, {block}, N={len(x)}, {device.type}"
    benchmark.extra_info["bar"] = bar
    run = torch.compile(f) if "compile" in bar else f
    call, arguments = lmnfast.connectivity, (f, x)
    if bar == "ours, generic route":  # a function, unlike a module, is not looked into
        arguments = (lambda points: f(points), x)
    elif "by hand" in bar:
        call, arguments = by_hand, (run, x, chunk)
    assert (call(*arguments)[:8, :8] - truth).abs().max() < 1e-5
    measure(call, arguments, rounds=3)


STACK = 8  # networks with the shape of the paper's tail, all with the same number of samples
STACK_SAMPLES = {"cpu": 128, "cuda": 961}


@functools.cache
def stack(device: torch.device):
    """Networks, the same networks as torch stacks them, samples for each, and the connectivities from a loop over the
    networks."""
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 31))
        .to(device)
        .eval()
        .requires_grad_(False)
        for _ in range(STACK)
    ]
    x = torch.randn(STACK, STACK_SAMPLES[device.type], 100, device=device)
    truth = torch.stack([definition(f.double(), own.double()) for f, own in zip(models, x)])
    models = [f.float() for f in models]
    return models, torch.func.stack_module_state(models), x, truth


@pytest.mark.parametrize("bar", ["ours", "a loop of public calls"])
@pytest.mark.parametrize("number", ["connectivity", "lmn"])
def bench_stacked(benchmark, measure, precision, device, number, bar):
    models, stacked, x, truth = stack(device)
    benchmark.group = f"{number}, {STACK} networks, N={x.shape[1]}, {device.type}"
    benchmark.extra_info["bar"] = bar
    function = getattr(lmnfast, number)

    def together():
        return function(models[0], x, stacked=stacked)

    def one_by_one():
        return torch.stack([function(f, own) for f, own in zip(models, x)])

    call = together if bar == "ours" else one_by_one
    wanted = truth if number == "connectivity" else lmnfast.linear_mapping_number(truth)
    assert (call() - wanted).abs().max() < 1e-4 * wanted.abs().max()
    measure(call, (), rounds=5)
