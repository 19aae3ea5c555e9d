"""The eigenproblem in float64, as the package solves it, and in float32: the time, and the error of the float32 value; and the
estimate from products with the matrix, with its bar. The benchmark for a card is bench_symmetric_eigenvalues.py.

pytest bench/bench_spectrum.py
"""

import pytest
import torch
from timing import best_of, product_s
from torch import nn

import lmnfast
from lmnfast import _krylov, reference
from lmnfast._krylov import PROBES


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

    # The reduction of L to tridiagonal form takes two thirds of N^3 multiply-adds.
    benchmark.extra_info["floor_s"] = product_s(2 / 3 * n**3, torch.float64)
    call = {"ours": lmnfast.linear_mapping_number, "eager": reference.linear_mapping_number}.get(
        bar, in_float32
    )
    benchmark.extra_info["relative difference"] = float(in_float32(L) / lmnfast.linear_mapping_number(L) - 1)
    rounds = min(5, request.config.getoption("rounds"))
    benchmark.pedantic(call, (L,), rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("n", [2048, 4096, 8192])
@pytest.mark.parametrize("bar", ["ours", "eager"])
def bench_estimate_of_linear_mapping_number(request, benchmark, n, bar):
    """Ours is solver="estimate", which has a bar of 1 %; eager all eigenvalues by LAPACK."""
    L = connectivity(n)
    benchmark.group = f"estimate of linear_mapping_number N={n}"
    benchmark.extra_info["bar"] = bar
    exact, found = reference.linear_mapping_number(L), _krylov.of_matrix(L, "absolute")
    benchmark.extra_info["relative difference"] = float(found.lmn / exact - 1)
    benchmark.extra_info["half of the interval"] = found.interval()[1] / found.lmn - 1
    vectors = torch.randn(n, PROBES)
    benchmark.extra_info["floor_s"] = found.products / PROBES * best_of(lambda: L @ vectors)
    call = {"ours": lambda: lmnfast.linear_mapping_number(L, solver="estimate")}.get(
        bar, lambda: reference.linear_mapping_number(L)
    )
    benchmark.pedantic(call, rounds=min(3, request.config.getoption("rounds")), warmup_rounds=1)
