"""The polynomials' connectivity against our exact connectivity, and against the same computation from Jacobians in PyTorch.

pytest bench/bench_hermite_connectivity.py
"""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from bench_path_connectivity import LOBATTO, UNIFORM, cases, samples, tail
from timing import product_s
from torch import Tensor

from lmnfast import ops
from lmnfast._recognise import recognise
from lmnfast.ops.path_connectivity import chain_connectivity
from lmnfast.quadrature import path_nodes

BARS = {
    "ours": (ops.hermite_connectivity, (*UNIFORM, False)),
    "ours, midpoint": (ops.hermite_connectivity, (*UNIFORM, True)),
    "ours, exact at 21 points": (ops.path_connectivity, UNIFORM),
    "ours, lobatto 9": (ops.path_connectivity, LOBATTO),
    "ours, lobatto 7": (ops.path_connectivity, path_nodes("lobatto", 7)),
}


def eager(net, x: Tensor, block: int = 32) -> Tensor:
    """Computes N Jacobians, all J_i x_j as one product, and then per block of samples the moments of the cubics at the
    nodes."""
    t = UNIFORM[0].to(x)
    w, centred = 1 / len(t), t - 0.5
    first, second = t * (1 - t) ** 2, -(t**2) * (1 - t)
    y, n = net(x), len(x)
    J = torch.func.vmap(torch.func.jacrev(net))(x)
    moved = J.flatten(0, 1) @ x.T  # (N K, N), computed as a whole; everything else is computed in blocks
    moved = moved.view(n, -1, n)
    own = moved.diagonal(dim1=0, dim2=2).T  # J_i x_i
    L = x.new_empty(n, n)
    for rows in torch.arange(n).split(block):
        chord = y - y[rows, None]
        start = moved[rows].mT - own[rows, None] - chord  # (block, N, K)
        end = own - moved[:, :, rows].permute(2, 0, 1) - chord
        sums = [w * v.sum() for v in (first, second, centred * first, centred * second)]
        squares = [w * v.sum() for v in (first**2, first * second, second**2)]
        e, te = start * sums[0] + end * sums[1], start * sums[2] + end * sums[3]
        ee = start**2 * squares[0] + 2 * start * end * squares[1] + end**2 * squares[2]
        variance_t = w * (centred**2).sum()
        covariance = chord * variance_t + te
        variance = chord**2 * variance_t + 2 * chord * te + ee - e**2
        L[rows] = (covariance**2 / (variance_t * variance)).mean(2)
    return L.fill_diagonal_(1)


@torch.compile(dynamic=False)
def compiled(net, x: Tensor) -> Tensor:
    """All samples as one block, fused by the compiler, which would unroll a loop over blocks."""
    return eager(net, x, len(x))


RIVALS = {"eager, by Jacobians": eager, "torch.compile, by Jacobians": compiled}
if find_spec("jax"):
    import in_jax

    RIVALS["jax.jit, by Jacobians"] = in_jax.hermite_connectivity


@pytest.mark.parametrize("widths", [(100, 100, 31), (100, 100, 100, 100, 31)], ids=["shallow", "deep"])
@pytest.mark.parametrize("bar", [*BARS, *RIVALS])
@cases({"cpu": [768], "cuda": [961]})
def bench_hermite_connectivity(benchmark, measure, device, precision, n, widths, bar):
    benchmark.group = f"hermite_connectivity {'-'.join(map(str, widths))} N={n}, {device.type}, {precision}"
    benchmark.extra_info["bar"] = bar
    if bar.startswith("jax") and device.type != "cpu":
        pytest.skip("JAX joins on the CPU")
    net, x = tail(*widths, device=device), F.silu(samples(n, device=device))
    # The floor: all J_i x_j as one product.
    benchmark.extra_info["floor_s"] = product_s(n * n * widths[0] * widths[-1], device=device)
    if bar in BARS:
        call, rest = BARS[bar]
        measure(call, (recognise(net), x, *rest), rounds=5, enqueued=chain_connectivity)
    else:
        ours = ops.hermite_connectivity(recognise(net), x, *UNIFORM, False)
        assert (RIVALS[bar](net, x) - ours).abs().max() < 1e-3
        measure(RIVALS[bar], (net, x), rounds=5)
