"""Gradients of a curvature and of LMN in the weights of a tail and in its samples, forward and backward together: ours, and
autograd through the best PyTorch we can write.

pytest bench/bench_path_connectivity_backward.py
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from bench_path_connectivity import pairs_of, samples, tail
from timing import DEVICES, product_s
from torch import nn
from torch.utils.checkpoint import checkpoint

import lmnfast
from lmnfast.quadrature import path_nodes

RULES = {64: ("lobatto", 7), 768: ("uniform", 21)}
CHUNKS = {64: 4096, 768: 1024}  # of pairs: the fastest for autograd of 256 to 8192
WIDTHS = 100, 100, 31
CASES = pytest.mark.parametrize("device, n", [(d, n) for d in DEVICES for n in RULES], indirect=["device"])


def problem(
    n: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, torch.Tensor]:
    net = tail(*WIDTHS, device=device).to(dtype).requires_grad_(True)
    return net, samples(n, WIDTHS[0], device).to(dtype).requires_grad_(True)


def chunk_of_pairs(z, ends, weight, first, second, nodes, node_weights, pooled):
    """r2 of a chunk of pairs. The first layer is applied to the samples, and their outputs are known."""
    t, w = nodes.to(z), node_weights.to(z)
    inner = F.silu(torch.lerp(z[first, None], z[second, None], t[1:-1, None])) @ weight
    y = torch.cat((ends[first, None], inner, ends[second, None]), 1)
    y = y - torch.einsum("m,pmk->pk", w, y)[:, None]
    centred = t - w @ t
    on_line = torch.einsum("m,pmk->pk", w * centred, y).square()
    variance = torch.einsum("m,pmk,pmk->pk", w, y, y) * (w * centred**2).sum()
    return on_line.sum(1) / variance.sum(1) if pooled else (on_line / variance).mean(1)


def by_autograd(net: nn.Sequential, x: torch.Tensor, n: int, of: str, checkpointed: bool) -> torch.Tensor:
    """The mean of 1 - R2, or LMN."""
    z, weight = net[0](x), net[2].weight.T
    ends, pairs, parts = F.silu(z) @ weight, pairs_of(x), []
    rule, pooled = path_nodes(*RULES[n]), of == "pooled_curvature"
    for first, second in zip(pairs[0].split(CHUNKS[n]), pairs[1].split(CHUNKS[n])):
        arguments = z, ends, weight, first, second, *rule, pooled
        parts.append(
            checkpoint(chunk_of_pairs, *arguments, use_reentrant=False)
            if checkpointed
            else chunk_of_pairs(*arguments)
        )
    r2 = torch.cat(parts)
    if pooled:
        return 1 - r2.mean()
    L = torch.zeros(n, n, dtype=r2.dtype, device=r2.device).index_put((pairs[0], pairs[1]), r2).double()
    p = torch.linalg.eigvalsh(L + L.T + torch.eye(n, device=L.device)).abs()
    p = p / p.sum()
    return torch.exp2(-(p * p.log2()).sum())


def gradients(value: torch.Tensor, net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The last bias has no part in r2, and autograd does not reach it."""
    return list(torch.autograd.grad(value, [x, net[0].weight, net[0].bias, net[2].weight]))


@functools.cache
def truth(n: int, of: str, device: torch.device) -> list[torch.Tensor]:
    net, x = problem(n, device, torch.float64)
    return gradients(by_autograd(net, x, n, of, True), net, x)


def judged(found: list[torch.Tensor], n: int, of: str, device: torch.device) -> float:
    """The largest relative error of a gradient, in the norm."""
    errors = [
        float((own.double() - true).norm() / true.norm())
        for own, true in zip(found, truth(n, of, device), strict=True)
    ]
    assert max(errors) < (1e-3 if of == "pooled_curvature" else 1e-2)
    return max(errors)


@CASES
@pytest.mark.parametrize("of", ["pooled_curvature", "lmn"])
@pytest.mark.parametrize(
    "bar", ["ours", "ours, function", "forward alone", "eager autograd", "eager autograd, checkpointed"]
)
def bench_gradients(benchmark, measure, device, n, of, bar):
    """ "ours" is a `Penalty`; "ours, function" is `curvature` or `lmn` with differentiable=True; "forward alone" is our
    connectivity without gradients, and for LMN the eigenvalues. The floor: four products of the forward's size, at the rate
    of a large product. Without checkpoints, autograd takes gigabytes for 768 samples.
    """
    if bar == "eager autograd" and n > 64:
        pytest.skip("it takes gigabytes")
    net, x = problem(n, device)
    kind, points = RULES[n]
    how: dict = {"points": points, "rule": kind}
    benchmark.group = f"{of} and its gradients, N = {n}, {points} {kind} nodes, {device}"
    products = 4 * n * (n - 1) / 2 * (points - 2) * WIDTHS[1] * WIDTHS[2]
    benchmark.extra_info.update(bar=bar, floor_s=product_s(products, device=device))
    penalty = lmnfast.Penalty(net, of=of, **how)
    measured = lmnfast.curvature if of == "pooled_curvature" else lmnfast.lmn
    plain = functools.partial(lmnfast.connectivity, pooled=True) if of == "pooled_curvature" else lmnfast.lmn
    calls = {
        "ours": lambda: gradients(penalty(x), net, x),
        "ours, function": lambda: gradients(measured(net, x, differentiable=True, **how), net, x),
        "forward alone": lambda: plain(net, x.detach(), **how),
        "eager autograd": lambda: gradients(by_autograd(net, x, n, of, False), net, x),
        "eager autograd, checkpointed": lambda: gradients(by_autograd(net, x, n, of, True), net, x),
    }
    with torch.enable_grad():
        if bar != "forward alone":
            benchmark.extra_info["error"] = judged(calls[bar](), n, of, device)
        measure(calls[bar], (), rounds=200)
