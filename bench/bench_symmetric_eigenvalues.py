"""Eigenvalues in float64. On the CPU: LAPACK on one core against LAPACK on all cores. On a card: the package's kernel,
cuSOLVER, and a copy to the CPU with LAPACK there.

pytest bench/bench_symmetric_eigenvalues.py
"""

import pytest
import torch
from bench_spectrum import connectivity
from timing import product_s

from lmnfast import ops, reference

BARS = {
    "ours": ops.symmetric_eigenvalues,
    "eager": reference.symmetric_eigenvalues,
    "eager, float32": lambda L: torch.linalg.eigvalsh(L.float()),
    "copied to the CPU": lambda L: reference.symmetric_eigenvalues(L.cpu()).to(L.device),
    "ours, and the entropy": lambda L: ops.spectral_entropy(ops.symmetric_eigenvalues(L)),
}


@pytest.mark.parametrize(
    "matrices, n",
    [(1, 64), (1, 768), (1, 961), (1, 1280), (1, 1664), (1, 2048), (1, 2304), (8, 768), (8, 961), (64, 768)],
)
@pytest.mark.parametrize("bar", BARS)
def bench_symmetric_eigenvalues(request, benchmark, device, matrices, n, bar):
    if device.type == "cpu" and (n > 1024 or matrices > 1 or bar.startswith("copied")):
        pytest.skip("for a card")
    L = connectivity(n, device).expand(matrices, n, n).contiguous()
    benchmark.group = f"symmetric_eigenvalues {matrices} x {n} x {n}, {device.type}"
    benchmark.extra_info["bar"] = bar

    def solve(L):
        values = BARS[bar](L)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return values

    truth = reference.symmetric_eigenvalues(L.cpu())
    if bar == "ours, and the entropy":
        assert torch.allclose(solve(L).cpu(), reference.spectral_entropy(truth), rtol=1e-9)
    else:
        error = float((solve(L).cpu().double() - truth).abs().max() / truth.abs().max())
        assert error < (1e-4 if bar.endswith("float32") else 1e-12)
        benchmark.extra_info["error over the largest"] = error
    # The reduction of a matrix to tridiagonal form takes two thirds of N^3 multiply-adds.
    benchmark.extra_info["floor_s"] = matrices * product_s(2 / 3 * n**3, torch.float64, device)
    benchmark.pedantic(solve, (L,), rounds=min(9, request.config.getoption("rounds")), warmup_rounds=1)
