"""Fused path connectivity against the best PyTorch we can write.

pytest bench/bench_path_connectivity.py
"""

import functools
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from timing import DEVICES, best_of
from torch import nn

import lmnfast
from lmnfast import ops, reference
from lmnfast._recognise import recognise
from lmnfast.ops.path_connectivity import chain_connectivity
from lmnfast.quadrature import path_nodes

UNIFORM = path_nodes("uniform", 21)
LOBATTO = path_nodes("lobatto", 9)
SIZES = {"cpu": [768, 961], "cuda": [768, 961, 2048, 4096]}
# PyTorch's settings for float32 matrix products. The CPU kernels always compute as with "highest".
PRECISIONS = {"cpu": ["highest"], "cuda": ["highest", "high"]}


def cases(sizes: dict[str, list[int]]):
    return pytest.mark.parametrize(
        "device, precision, n",
        [(d, p, n) for d in DEVICES for p in PRECISIONS[d] for n in sizes[d]],
        indirect=["device", "precision"],
    )


def tail(*widths: int, device: torch.device) -> nn.Sequential:
    """Linear layers of these widths with SiLU between them, with PyTorch's initialisation."""
    torch.manual_seed(0)
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.SiLU())]
    return nn.Sequential(*layers[:-1]).requires_grad_(False).to(device)


def samples(n: int, width: int = 100, device: torch.device | str = "cpu") -> torch.Tensor:
    return F.silu(torch.randn(n, width, generator=torch.Generator().manual_seed(1))).to(device)


@functools.cache
def truth(widths: tuple[int, ...], n: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """The definition in float64, and its LMN."""
    net, x = tail(*widths, device=device).double(), samples(n, widths[0], device).double()
    L = reference.path_connectivity(net, x, *(v.to(device) for v in UNIFORM))
    return L.float(), float(lmnfast.linear_mapping_number(L))


def judge(
    benchmark, L: torch.Tensor, widths: tuple[int, ...], rival: bool, lobatto: bool, precision: str
) -> None:
    """Checks L before it is timed, and records the errors of L and of its LMN."""
    L_true, lmn_true = truth(widths, len(L), L.device)
    error = (L - L_true).abs()
    benchmark.extra_info["L error"] = float(error.max())
    benchmark.extra_info["LMN error"] = abs(float(lmnfast.linear_mapping_number(L)) / lmn_true - 1)
    if (
        rival and precision != "highest"
    ):  # the rivals round the outputs themselves to TF32, so an entry of a short path may have any value
        assert error.mean() < 1e-2
    elif precision != "highest":  # a path with a short chord compared with its length may lose more
        assert (error > 1e-3).float().mean() < 1e-3 and benchmark.extra_info["LMN error"] < 1e-4
    else:
        # With one output nothing averages the error of a path with a short chord. Float32 PyTorch loses 9e-5 there.
        exact = 2e-5 if widths[-1] > 1 else 5e-5
        assert error.max() < (1e-3 if lobatto else exact)


def pairs_of(x: torch.Tensor) -> torch.Tensor:
    return torch.triu_indices(len(x), len(x), 1, device=x.device)


def filled(r2: torch.Tensor, pairs: torch.Tensor, n: int) -> torch.Tensor:
    L = torch.ones(n, n, device=r2.device)
    L[pairs[0], pairs[1]] = L[pairs[1], pairs[0]] = r2
    return L


def r2_from_sums(y, ty, yy, t_variance):
    """r2 from the means of y, (t - mean t) y and y^2 over the nodes; (pairs, outputs) -> (pairs,)."""
    return (ty * ty / (t_variance * (yy - y * y))).mean(1)


def eager_whole(net, x, chunk):
    """The simplest code: all 21 points of each path go through the whole tail, in chunks of pairs."""
    t = UNIFORM[0].to(x)
    centred = t - t.mean()
    pairs = pairs_of(x)
    parts = []
    for first, second in zip(pairs[0].split(chunk), pairs[1].split(chunk)):
        y = net(torch.lerp(x[first, None], x[second, None], t[:, None]))
        y = y - y.mean(1, keepdim=True)
        covariance = torch.einsum("m,pmk->pk", centred, y) / len(t)
        parts.append((covariance**2 / (centred.square().mean() * y.square().mean(1))).mean(1))
    return filled(torch.cat(parts), pairs, len(x))


def eager_best(net, x, chunk, nodes=UNIFORM[0]):
    """The fastest eager code that we know: the first layer is applied to the samples, only half of the pairs are computed, the
    outputs at the ends come from the samples, nodes are the outer loop, and buffers are used again."""
    t = nodes.tolist()
    mean_t, variance_t = 0.5, float((nodes - 0.5).square().mean())
    w, weights = 1 / len(t), [layer.weight.T.contiguous() for layer in net[2::2]]
    biases = [layer.bias for layer in net[2:-1:2]]  # without the last bias, which does not change r2
    z = F.linear(x, net[0].weight, net[0].bias)
    ends = net[1:](z) - net[-1].bias
    pairs = pairs_of(x)
    parts = []
    buffers = [x.new_empty(chunk, layer.out_features) for layer in net[::2]]
    for first, second in zip(pairs[0].split(chunk), pairs[1].split(chunk)):
        *inner, y = (b[: len(first)] for b in buffers)
        zi, yi = z[first], ends[first]
        zs, ys = (
            z[second].sub_(zi),
            ends[second].sub_(yi),
        )  # values are relative to the first end, so that an offset costs no digits
        sum_y, sum_ty, sum_yy = ys * w, ys * (w * (1 - mean_t)), (ys * ys).mul_(w)
        for m in range(1, len(t) - 1):
            torch.add(zi, zs, alpha=t[m], out=inner[0])
            for a, weight, bias, out in zip(inner, weights, biases, inner[1:]):
                torch.addmm(bias, F.silu(a, inplace=True), weight, out=out)
            torch.mm(F.silu(inner[-1], inplace=True), weights[-1], out=y)
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
    """The same savings as in `eager_best`, compiled."""
    z = F.linear(x, net[0].weight, net[0].bias)
    ends, weight, t = F.linear(F.silu(z), net[2].weight), net[2].weight.T.contiguous(), UNIFORM[0].to(x)
    pairs = pairs_of(x)
    padded = F.pad(pairs, (0, -pairs.shape[1] % chunk))  # all chunks have one shape: one compilation
    parts = [
        _compiled_chunk(z, ends, weight, first, second, t)
        for first, second in zip(padded[0].split(chunk), padded[1].split(chunk))
    ]
    return filled(torch.cat(parts)[: pairs.shape[1]], pairs, len(x))


RIVALS = {"eager, whole tail": eager_whole, "eager, best": eager_best, "torch.compile": compiled}
# Pairs per chunk. For the CPU: the fastest of the powers of 2 from 32 to 8192 on 2 cores with 1 MB of L2 each. For a card: the
# sizes that the run tries at N = 961. There are fewer of them for compiled code, because each size is compiled again.
CHUNKS = {
    "cpu": {"eager, whole tail": [256], "eager, best": [2048], "torch.compile": [512]},
    "cuda": {
        "eager, whole tail": [2**k for k in range(12, 18)],
        "eager, best": [2**k for k in range(13, 19)],
        "torch.compile": [2**14, 2**16, 2**18],
    },
}
if find_spec("jax"):
    import in_jax

    RIVALS["jax.jit"] = in_jax.path_connectivity
    CHUNKS["cpu"]["jax.jit"] = [512, 2048, 8192]


@functools.cache
def best_chunk(rival: str, device: torch.device, precision: str) -> int:
    chunks = CHUNKS[device.type][rival]
    if len(chunks) == 1:
        return chunks[0]
    net, x = tail(100, 100, 31, device=device), samples(961, device=device)
    return min(chunks, key=lambda chunk: best_of(lambda: RIVALS[rival](net, x, chunk), 3))


@pytest.mark.parametrize("bar", ["ours", "ours, lobatto 9", *RIVALS])
@cases(SIZES)
def bench_shallow_tail(benchmark, measure, path_connectivity_floor, device, precision, n, bar):
    widths = 100, 100, 31
    net, x = tail(*widths, device=device), samples(n, device=device)
    if bar == "eager, whole tail" and n > 961:
        pytest.skip("no rival where its time is known from smaller sizes")
    if bar == "jax.jit" and device.type != "cpu":
        pytest.skip("JAX joins on the CPU")
    benchmark.group = f"path_connectivity 100-100-31 N={n}, {device.type}, {precision}"
    benchmark.extra_info["bar"] = bar
    rule = LOBATTO if "lobatto" in bar else UNIFORM
    benchmark.extra_info.update(path_connectivity_floor(n, len(rule[0]) - 2, widths))
    rival = not bar.startswith("ours")
    if rival:
        torch.compiler.reset()  # each chunk and N is compiled again, and torch limits the number of compilations
        chunk = best_chunk(bar, device, precision)
        benchmark.extra_info["chunk"] = chunk
        call, arguments = RIVALS[bar], (net, x, chunk)
    else:
        call, arguments = ops.path_connectivity, (recognise(net), x, *rule)
    judge(benchmark, call(*arguments), widths, rival, "lobatto" in bar, precision)
    # The whole call waits for the device to learn which pairs are unresolved. The enqueued part does not wait.
    enqueued = None if rival else chain_connectivity
    measure(call, arguments, rounds=3 if "whole" in bar else 9, enqueued=enqueued)


@pytest.mark.parametrize("bar", ["ours", "matrix product of the same multiply-adds"])
@cases({"cpu": [768], "cuda": [961, 4096]})
def bench_deep_tail(benchmark, measure, path_connectivity_floor, device, precision, n, bar):
    """One more hidden layer: shows how close the kernel is to the rate of the machine's large matrix products."""
    widths = 100, 100, 100, 31
    benchmark.group = f"path_connectivity 100-100-100-31 N={n}, {device.type}, {precision}"
    benchmark.extra_info["bar"] = bar
    benchmark.extra_info.update(path_connectivity_floor(n, 19, widths))
    if bar == "ours":
        arguments = recognise(tail(*widths, device=device)), samples(n, device=device), *UNIFORM
        judge(benchmark, ops.path_connectivity(*arguments), widths, False, False, precision)
        measure(ops.path_connectivity, arguments, rounds=7, enqueued=chain_connectivity)
    else:
        side = round((n * (n - 1) / 2 * 19 * 13100) ** (1 / 3))
        a, b, c = (torch.randn(side, side, device=device) for _ in range(3))
        measure(lambda: torch.mm(a, b, out=c), (), rounds=7)


@pytest.mark.parametrize(
    "widths",
    [(64, 64, 10), (100, 100, 1), (37, 53, 17), (512, 512, 10), (512, 512, 512, 10), (100, 100, 1000)],
)
@cases({"cpu": [400], "cuda": [961]})
def bench_other_sizes(benchmark, measure, path_connectivity_floor, device, precision, n, widths):
    """Tails of odd and of large widths: time over the floor."""
    if len(widths) > 3 and device.type == "cpu":
        pytest.skip("for a card")
    benchmark.group = f"path_connectivity {'-'.join(map(str, widths))} N={n}, {device.type}, {precision}"
    benchmark.extra_info["bar"] = "ours"
    benchmark.extra_info.update(path_connectivity_floor(n, 19, widths))
    arguments = recognise(tail(*widths, device=device)), samples(n, widths[0], device), *UNIFORM
    judge(benchmark, ops.path_connectivity(*arguments), widths, False, False, precision)
    measure(ops.path_connectivity, arguments, rounds=7, enqueued=chain_connectivity)


@pytest.mark.parametrize("widths", [(100, 100, 31), (100, 100, 100, 31)], ids=["shallow", "deep"])
@pytest.mark.parametrize("bar", ["ours", "matrix product of the same multiply-adds"])
def bench_float64(benchmark, measure, device, widths, bar):
    n = {"cpu": 400, "cuda": 961}[device.type]
    benchmark.group = f"path_connectivity {'-'.join(map(str, widths))} N={n}, {device.type}, float64"
    benchmark.extra_info["bar"] = bar
    points = n * (n - 1) / 2 * 19
    if bar == "ours":
        chain = recognise(tail(*widths, device=device).double())
        arguments = chain, samples(n, device=device).double(), *UNIFORM
        L_true, _ = truth(widths, n, device)
        assert (ops.path_connectivity(*arguments).float() - L_true).abs().max() < 1e-6
        measure(ops.path_connectivity, arguments, rounds=5, enqueued=chain_connectivity)
    else:
        side = round((points * sum(k * m for k, m in pairwise(widths[1:]))) ** (1 / 3))
        a, b, c = (torch.randn(side, side, device=device, dtype=torch.float64) for _ in range(3))
        measure(lambda: torch.mm(a, b, out=c), (), rounds=5)
