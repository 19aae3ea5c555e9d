"""The eigenproblem in float64, as it is solved, and in float32: time, and what the latter does to the value.

pytest bench/bench_spectrum.py
"""

import pytest
import torch
from torch import nn

import lmnfast


@pytest.mark.parametrize("n", [768, 961, 2048])
@pytest.mark.parametrize("bar", ["ours", "eigvalsh, float32"])
def bench_linear_mapping_number(benchmark, n, bar):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 100), nn.SiLU(), nn.Linear(100, 31)).requires_grad_(False)
    L = lmnfast.connectivity(net, 2 * torch.randn(n, 16), rule="lobatto", points=7)
    benchmark.group = f"linear_mapping_number N={n}"
    benchmark.extra_info["bar"] = bar

    def in_float32(L):
        return 2 ** lmnfast.ops.spectral_entropy(torch.linalg.eigvalsh(L))

    call = lmnfast.linear_mapping_number if bar == "ours" else in_float32
    benchmark.extra_info["relative difference"] = float(in_float32(L) / lmnfast.linear_mapping_number(L) - 1)
    benchmark.pedantic(call, (L,), rounds=5, warmup_rounds=1)
