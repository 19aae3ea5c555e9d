"""Fused path connectivity against the best PyTorch we can write.

pytest bench/bench_path_connectivity.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmnfast import ops
from lmnfast.network import recognise
from lmnfast.quadrature import path_nodes

UNIFORM = path_nodes("uniform", 21)
LOBATTO = path_nodes("lobatto", 9)
SIZES = [768, 961]


def tail(depth: int) -> nn.Sequential:
    """100 -> ... -> 100 -> 31 with SiLU, at PyTorch's initialisation."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(100, 100), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(100, 31)).requires_grad_(False)


def samples(n: int) -> torch.Tensor:
    return F.silu(torch.randn(n, 100, generator=torch.Generator().manual_seed(1)))


def pairs_of(n: int) -> torch.Tensor:
    return torch.triu_indices(n, n, 1)


def filled(r2: torch.Tensor, pairs: torch.Tensor, n: int) -> torch.Tensor:
    L = torch.ones(n, n)
    L[pairs[0], pairs[1]] = L[pairs[1], pairs[0]] = r2
    return L


def r2_from_sums(y, ty, yy, t_variance):
    """From the means of y, (t - mean t) y and y^2 over the nodes; (pairs, outputs) -> (pairs,)."""
    return (ty * ty / (t_variance * (yy - y * y))).mean(1)


def eager_whole(net, x, chunk):
    """All 21 points of each path through the whole tail, chunks of pairs; what one writes first."""
    t = UNIFORM[0].float()
    centred = t - t.mean()
    pairs = pairs_of(len(x))
    parts = []
    for first, second in zip(pairs[0].split(chunk), pairs[1].split(chunk)):
        y = net(torch.lerp(x[first, None], x[second, None], t[:, None]))
        y = y - y.mean(1, keepdim=True)
        covariance = torch.einsum("m,pmk->pk", centred, y) / len(t)
        parts.append((covariance**2 / (centred.square().mean() * y.square().mean(1))).mean(1))
    return filled(torch.cat(parts), pairs, len(x))


def eager_best(net, x, chunk):
    """First layer hoisted, half the pairs, ends from the samples, nodes outermost, buffers reused."""
    t = UNIFORM[0].tolist()
    mean_t, variance_t = 0.5, float((UNIFORM[0] - 0.5).square().mean())
    w, weight = 1 / len(t), net[2].weight.T.contiguous()
    z = F.linear(x, net[0].weight, net[0].bias)
    ends = F.linear(F.silu(z), net[2].weight)  # the last bias does not change r2
    pairs = pairs_of(len(x))
    parts = []
    buffers = [torch.empty(chunk, 100), torch.empty(chunk, 31)]
    for first, second in zip(pairs[0].split(chunk), pairs[1].split(chunk)):
        a, y = (b[: len(first)] for b in buffers)
        zi, yi = z[first], ends[first]
        zs, ys = (
            z[second].sub_(zi),
            ends[second].sub_(yi),
        )  # relative to the first end: no cancellation by an offset
        sum_y, sum_ty, sum_yy = ys * w, ys * (w * (1 - mean_t)), (ys * ys).mul_(w)
        for m in range(1, len(t) - 1):
            torch.add(zi, zs, alpha=t[m], out=a)
            torch.mm(F.silu(a, inplace=True), weight, out=y)
            y.sub_(yi)
            sum_y.add_(y, alpha=w)
            sum_ty.add_(y, alpha=w * (t[m] - mean_t))
            sum_yy.addcmul_(y, y, value=w)
        parts.append(r2_from_sums(sum_y, sum_ty, sum_yy, variance_t))
    return filled(torch.cat(parts), pairs, len(x))


@torch.compile(dynamic=False)
def _compiled_chunk(z, ends, weight, first, second, t):
    zi, zj, yi, yj = z[first], z[second], ends[first], ends[second]
    a = F.silu(torch.lerp(zi[:, None], zj[:, None], t[1:-1, None]))
    y = (a.flatten(0, 1) @ weight).unflatten(0, a.shape[:2]) - yi[:, None]
    last, count, centred = yj - yi, len(t), t - t.mean()
    mean = (y.sum(1) + last) / count
    covariance = ((centred[1:-1, None] * y).sum(1) + centred[-1] * last) / count
    square = (y.square().sum(1) + last.square()) / count
    return r2_from_sums(mean, covariance, square, centred.square().mean())


def compiled(net, x, chunk):
    """The same savings, left to the compiler."""
    z = F.linear(x, net[0].weight, net[0].bias)
    ends, weight, t = F.linear(F.silu(z), net[2].weight), net[2].weight.T.contiguous(), UNIFORM[0].float()
    pairs = pairs_of(len(x))
    padded = F.pad(pairs, (0, -pairs.shape[1] % chunk))  # one shape to compile for
    parts = [
        _compiled_chunk(z, ends, weight, first, second, t)
        for first, second in zip(padded[0].split(chunk), padded[1].split(chunk))
    ]
    return filled(torch.cat(parts)[: pairs.shape[1]], pairs, len(x))


# Chunks of pairs that were fastest on 2 cores with 1 MB of L2 each, among the powers of 2 from 32 to 8192.
RIVALS = {
    "eager, whole tail": (eager_whole, 256),
    "eager, best": (eager_best, 2048),
    "torch.compile": (compiled, 512),
}


def floor_seconds(n, rule, depth, sgemm_rate, activation_rate):
    points = n * (n - 1) / 2 * (len(rule[0]) - 2)
    return points * (3100 + (depth - 1) * 10000) / sgemm_rate + points * 100 * depth / activation_rate


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bar", ["ours", "ours, lobatto 9", *RIVALS])
def bench_shallow_tail(benchmark, n, bar, sgemm_rate, activation_rate):
    net, x = tail(1), samples(n)
    benchmark.group = f"path_connectivity 100-100-31 N={n}"
    benchmark.extra_info["bar"] = bar
    rule = LOBATTO if "lobatto" in bar else UNIFORM
    benchmark.extra_info["floor_s"] = floor_seconds(n, rule, 1, sgemm_rate, activation_rate)
    chain = recognise(net)
    truth = ops.path_connectivity(chain, x, *UNIFORM)
    if bar.startswith("ours"):
        call, arguments = ops.path_connectivity, (chain, x, *rule)
    else:
        rival, chunk = RIVALS[bar]
        call, arguments = rival, (net, x, chunk)
    assert (call(*arguments) - truth).abs().max() < (1e-3 if "lobatto" in bar else 2e-5)
    benchmark.pedantic(call, arguments, rounds=3 if "whole" in bar else 9, warmup_rounds=1)


@pytest.mark.parametrize("bar", ["ours", "sgemm of the same multiply-adds"])
def bench_deep_tail(benchmark, bar, sgemm_rate, activation_rate):
    """One more hidden layer: how much of the machine's own large-sgemm rate is left."""
    n, depth = 768, 2
    benchmark.group = f"path_connectivity 100-100-100-31 N={n}"
    benchmark.extra_info["bar"] = bar
    multiply_adds = n * (n - 1) / 2 * 19 * 13100
    benchmark.extra_info["floor_s"] = multiply_adds / sgemm_rate
    if bar == "ours":
        benchmark.pedantic(
            ops.path_connectivity, (recognise(tail(depth)), samples(n), *UNIFORM), rounds=7, warmup_rounds=1
        )
    else:
        side = round(multiply_adds ** (1 / 3))
        a, b, c = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
        benchmark.pedantic(lambda: torch.mm(a, b, out=c), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("widths", [(64, 64, 10), (100, 100, 1), (37, 53, 17), (512, 512, 10)])
def bench_other_sizes(benchmark, widths, sgemm_rate, activation_rate):
    """Awkward and wide tails: time over the floor."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(*widths[:2]), nn.SiLU(), nn.Linear(*widths[1:])).requires_grad_(False)
    n = 400
    benchmark.group = f"path_connectivity {'-'.join(map(str, widths))} N={n}"
    benchmark.extra_info["bar"] = "ours"
    points = n * (n - 1) / 2 * 19
    benchmark.extra_info["floor_s"] = points * widths[1] * (widths[2] / sgemm_rate + 1 / activation_rate)
    benchmark.pedantic(
        ops.path_connectivity,
        (recognise(net), torch.randn(n, widths[0]), *UNIFORM),
        rounds=7,
        warmup_rounds=1,
    )
