"""The cost of public calls for the calling thread: numbers of torch's calls, kernels, copies and waits, and milliseconds.

python bench/calls.py [--samples N] [--device cuda | cpu] [NAME...]      one row per NAME; without NAME one row per call
python bench/calls.py --once NAME       makes only this call, once, between cudaProfilerStart and Stop: for ncu or nsys

"call ms" is the time until the call returns, "with its wait" the time until the device is done. Both are medians. On a CPU
nothing is launched.
"""

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

import lmnfast
from lmnfast._recognise import recognise
from lmnfast.quadrature import path_nodes

LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaLaunchCooperativeKernel",
)
COPIES = ("cudaMemcpyAsync", "cudaMemcpy", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
ROUNDS, SECONDS = 30, 1.0  # upper limits


class Own(nn.Module):
    """A model with its own forward, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 100)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 31))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(x))


def calls(samples: int, device: str) -> dict[str, Callable[[], object]]:
    """The calls by name. Each can be made any number of times."""
    torch.manual_seed(0)
    model, inputs = Own().to(device), torch.randn(samples, 64, device=device)
    tail, x = lmnfast.cut(model, "rest.0", inputs)
    plain, rule = nn.Sequential(*model.rest[1:]), path_nodes("uniform", 21)
    chain, nine = recognise(plain), {"points": 9, "rule": "lobatto"}
    models = [copy.deepcopy(plain) for _ in range(8)]
    stacked, xs = torch.func.stack_module_state(models), x.expand(8, *x.shape)
    probe = lmnfast.Probe(model, inputs, "rest.0", every=1)

    def probed() -> None:
        probe()
        probe.history  # noqa: B018  # waits, so that the solver's thread is not at work during the next call

    return {
        "path_connectivity, the op alone": lambda: lmnfast.ops.path_connectivity(chain, x, *rule),
        "connectivity": lambda: lmnfast.connectivity(tail, x),
        "connectivity, plain modules": lambda: lmnfast.connectivity(plain, x),
        "connectivity, 9 Lobatto points": lambda: lmnfast.connectivity(tail, x, **nine),
        "connectivity, hermite": lambda: lmnfast.connectivity(tail, x, method="hermite"),
        "connectivity, jacobian": lambda: lmnfast.connectivity(tail, x, method="jacobian"),
        "lmn": lambda: lmnfast.lmn(tail, x),
        "lmn, 8 networks stacked": lambda: lmnfast.lmn(plain, xs, stacked=stacked),
        "lmn, 8 networks in a loop": lambda: [lmnfast.lmn(f, x) for f in models],
        "measure": lambda: lmnfast.measure(tail, x),
        "jacobians": lambda: lmnfast.jacobians(plain, x),
        "jacobian_distances": lambda: lmnfast.jacobian_distances(plain, x),
        "Probe, one call and its row": probed,
        "cut": lambda: lmnfast.cut(model, "rest.0", inputs),
        "model(inputs)": lambda: model(inputs),
    }


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def counted(call: Callable[[], object], device: str) -> Counter:
    """Counts the calls of torch from this thread, without those from within torch's calls, and the calls of the driver."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
    counts: Counter = Counter()
    for event in profile.events():
        if event.name.startswith(("aten::", "lmnfast::")):
            counts["torch calls"] += event.cpu_parent is None
        counts["kernels"] += event.name in LAUNCHES
        counts["copies"] += event.name in COPIES
        counts["waits"] += event.name in WAITS
    return counts


def row(name: str, call: Callable[[], object], device: str) -> str:
    for _ in range(3):
        call()
    counts = counted(call, device)
    alone, together = [], []
    while len(alone) < ROUNDS and sum(together) < SECONDS:
        synchronise(device)
        start = time.perf_counter()
        call()
        alone.append(time.perf_counter() - start)
        synchronise(device)
        together.append(time.perf_counter() - start)
    numbers = [counts[kind] for kind in ("torch calls", "kernels", "copies", "waits")]
    times = [f"{statistics.median(seconds) * 1e3:.3f}" for seconds in (alone, together)]
    return f"| {name} | {' | '.join(map(str, [*numbers, *times]))} | `python bench/calls.py '{name}'` |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--once", action="store_true")
    chosen = parser.parse_args()
    known = calls(chosen.samples, chosen.device)
    if unknown := set(chosen.names) - set(known):
        parser.error(f"expected names among {', '.join(known)}, got {', '.join(unknown)}")
    names = chosen.names or list(known)
    if chosen.once:
        for name in names:
            known[name]()
        synchronise(chosen.device)
        torch.cuda.profiler.start()
        for name in names:
            known[name]()
        synchronise(chosen.device)
        torch.cuda.profiler.stop()
        return
    print(f"Public calls on {chosen.device}, N = {chosen.samples}, 100-100-31, torch {torch.__version__}:\n")
    print("| call | torch calls | kernels | copies | waits | call ms | with its wait | command |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    for name in names:
        print(row(name, known[name], chosen.device), flush=True)


if __name__ == "__main__":
    main()
