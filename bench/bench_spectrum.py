"""The eigenproblem in float64, as it is solved, and in float32: time, and what the latter does to the value.

On a CUDA device: solved there, against a copy to the CPU and a solve there, from which CUDA_SOLVES_FROM is to be chosen.

pytest bench/bench_spectrum.py
"""

import pytest
import torch
from conftest import product_s
from torch import nn

import lmnfast
from lmnfast import reference

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def connectivity(n, device="cpu"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 100), nn.SiLU(), nn.Linear(100, 31)).requires_grad_(False).to(device)
    return lmnfast.connectivity(net, 2 * torch.randn(n, 16).to(device), rule="lobatto", points=7)


@pytest.mark.parametrize("n", [768, 961, 2048])
@pytest.mark.parametrize("bar", ["ours", "eager", "eigvalsh, float32"])
def bench_linear_mapping_number(request, benchmark, n, bar):
    L = connectivity(n)
    benchmark.group = f"linear_mapping_number N={n}"
    benchmark.extra_info["bar"] = bar

    def in_float32(L):
        return 2 ** lmnfast.ops.spectral_entropy(torch.linalg.eigvalsh(L))

    # Two thirds of N^3 multiply-adds make L tridiagonal.
    benchmark.extra_info["floor_s"] = product_s(2 / 3 * n**3, torch.float64)
    call = {"ours": lmnfast.linear_mapping_number, "eager": reference.linear_mapping_number}.get(
        bar, in_float32
    )
    benchmark.extra_info["relative difference"] = float(in_float32(L) / lmnfast.linear_mapping_number(L) - 1)
    rounds = min(5, request.config.getoption("rounds"))
    benchmark.pedantic(call, (L,), rounds=rounds, warmup_rounds=1)


@CUDA
@pytest.mark.parametrize("matrices", [1, 4])
@pytest.mark.parametrize("n", [768, 961, 2048, 4096])
@pytest.mark.parametrize(
    "bar", ["ours", "on the card, float64", "on the card, float32", "copied, float64", "copied, float32"]
)
def bench_solvers_on_cuda(benchmark, matrices, n, bar):
    L = connectivity(n, "cuda").expand(matrices, n, n).contiguous()
    benchmark.group = f"eigenvalues on CUDA, {matrices} x {n} x {n}"
    benchmark.extra_info["bar"] = bar

    def solve(L):
        if bar == "ours":
            values = lmnfast.eigenvalues(L)
        else:
            L = L.to(torch.float64 if bar.endswith("64") else torch.float32)
            values = torch.linalg.eigvalsh(L.cpu() if bar.startswith("copied") else L)
        values = values.cuda()
        torch.cuda.synchronize()
        return values

    truth = lmnfast.eigenvalues(L, solver="cpu").abs().sort().values
    error = (solve(L).double().abs().sort().values - truth).abs().max() / truth.max()
    assert error < (1e-4 if bar.endswith("32") else 1e-11)
    benchmark.extra_info["error over the largest"] = float(error)
    benchmark.pedantic(solve, (L,), rounds=5, warmup_rounds=1)
