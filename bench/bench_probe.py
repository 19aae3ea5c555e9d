"""The cost of one value for the training: a probe's call against the kernel alone and against the whole measurement.

On a CUDA device: the time of the calling thread, and the delay of the training's stream, between two events around the call.
The connectivity itself runs on another stream, where it shares the device's units with the kernels that follow.

pytest bench/bench_probe.py
"""

import pytest
import torch
from timing import best_of
from torch import nn

import lmnfast
from lmnfast import ops
from lmnfast._recognise import recognise
from lmnfast.quadrature import path_nodes

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def network(device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.SiLU(), nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 31))
    return model.to(device), torch.randn(768, 64).to(device)


@pytest.mark.parametrize("bar", ["ours", "kernel alone", "measured on the training thread"])
def bench_one_value(request, benchmark, bar):
    model, x = network()
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
        benchmark.extra_info["floor_s"] = best_of(calls["kernel alone"], 3)
        rounds = min(9, request.config.getoption("rounds"))
        # The setup waits until the solver's thread has finished, so that the thread does not disturb the next round.
        benchmark.pedantic(calls[bar], setup=lambda: probe.history and None, rounds=rounds, warmup_rounds=1)


@CUDA
@pytest.mark.parametrize("bar", ["ours", "a forward and backward pass", "cut anew"])
def bench_one_call_on_cuda(benchmark, bar):
    model, x = network("cuda")
    benchmark.group = "one probe call on CUDA, the thread's time, 100-100-31 N=768"
    benchmark.extra_info["bar"] = bar

    def training_pass():
        with torch.enable_grad():
            model(x).square().mean().backward()

    with lmnfast.Probe(model, x, "1", every=1) as probe:
        expected = lmnfast.lmn(*lmnfast.cut(model, "1", x)).item()
        calls = {
            "ours": probe,
            "a forward and backward pass": training_pass,
            "cut anew": lambda: lmnfast.cut(model, "1", x),
        }

        def settle():
            assert all(row["lmn"] == pytest.approx(expected, rel=1e-5) for row in probe.history)
            torch.cuda.synchronize()

        benchmark.pedantic(calls[bar], setup=settle, rounds=20, warmup_rounds=3)

        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        milliseconds = []
        for _ in range(20):
            settle()
            torch.cuda._sleep(
                20_000_000
            )  # meanwhile the thread runs ahead, so that its own time is not between the events
            before.record()
            calls[bar]()
            after.record()
            torch.cuda.synchronize()
            milliseconds.append(before.elapsed_time(after))
        benchmark.extra_info["stream's ms, median"] = sorted(milliseconds)[10]
