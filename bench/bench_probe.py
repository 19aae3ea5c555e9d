"""What one value costs the training thread: a probe's call against the kernel alone and against the whole measurement.

pytest bench/bench_probe.py
"""

import pytest
import torch
from torch import nn

import lmnfast
from lmnfast import ops
from lmnfast.network import recognise
from lmnfast.quadrature import path_nodes


@pytest.mark.parametrize("bar", ["ours", "kernel alone", "measured on the training thread"])
def bench_one_value(benchmark, bar):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.SiLU(), nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 31))
    x = torch.randn(768, 64)
    tail, samples = lmnfast.cut(model, "1", x)
    benchmark.group = "one probe value 100-100-31 N=768"
    benchmark.extra_info["bar"] = bar
    with lmnfast.Probe(model, x, "1", every=1) as probe:
        calls = {
            "ours": probe,
            "kernel alone": lambda: ops.path_connectivity(
                recognise(tail), samples, *path_nodes("uniform", 21)
            ),
            "measured on the training thread": lambda: lmnfast.lmn(tail, samples),
        }
        # The solver's thread must not run into the next round's time.
        benchmark.pedantic(calls[bar], setup=lambda: probe.history and None, rounds=9, warmup_rounds=1)
