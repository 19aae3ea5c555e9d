"""Time against N, widths, depth, nodes and threads. bench/report.py fits and draws the results.

python bench/scaling.py FILE.json [--quick]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_hermite_connectivity import eager as eager_hermite
from bench_jacobian_distance import network, through_cdist
from bench_jacobian_distance import samples as close_samples
from bench_path_connectivity import eager_best, samples, tail

import lmnfast
from lmnfast import ops
from lmnfast._recognise import recognise
from lmnfast.quadrature import path_nodes

ROUNDS, SWEEP_SECONDS = 9, 15.0  # a sweep ends at the first of these limits, but after at least 3 rounds
# One SiLU takes as long as so many multiply-adds: in the run of docs/benchmarks.md the rates were 8.4 G/s and 93 G/s.
PER_ACTIVATION = 10
BUFFER = 2048 * 100  # numbers in a chunk of the eager rival; the fastest size at width 100
TAIL = (100, 100, 31)


@dataclass(frozen=True)
class Sweep:
    name: str
    variable: str
    order: str  # of the dominant work
    values: tuple[int, ...]
    calls: Callable[[int], dict[str, Callable]]  # by bar; without rivals that take too long
    work: Callable[[int], float]  # in any unit


def path(n, widths=TAIL, points=21, rival=True):
    net, x, (nodes, weights) = (
        tail(*widths, device="cpu"),
        samples(n, widths[0]),
        path_nodes("uniform", points),
    )
    bars = {"ours": partial(ops.path_connectivity, recognise(net), x, nodes, weights)}
    if rival:
        bars["eager"] = partial(eager_best, net, x, BUFFER // max(widths), nodes)
    return bars


def path_work(n, widths=TAIL, points=21):
    products = sum(k * m for k, m in pairwise(widths[1:])) + PER_ACTIVATION * sum(widths[1:-1])
    return n * (n - 1) / 2 * (points - 2) * products


def hermite(n):
    net, x = tail(*TAIL, device="cpu"), F.silu(samples(n))
    bars = {"ours": partial(ops.hermite_connectivity, recognise(net), x, *path_nodes("uniform", 21), False)}
    if n <= 1024:
        bars["eager"] = partial(eager_hermite, net, x)
    return bars


def distances(n):
    f, x = network("cpu").requires_grad_(False), close_samples(n, "cpu")
    return {
        "ours": partial(lmnfast.jacobian_distances, f, x),
        "eager": partial(through_cdist, f, x),
    }


def eigenvalues(n):
    L = ops.path_connectivity(recognise(tail(*TAIL, device="cpu")), samples(n), *path_nodes("lobatto", 5))
    return {"ours": partial(lmnfast.eigenvalues, L)}


def on_threads(count):
    def run(call):
        torch.set_num_threads(count)
        call()

    return {bar: partial(run, call) for bar, call in path(768).items()}


def deep(depth):
    return (100, *[100] * depth, 31)


SWEEPS = (
    Sweep(
        "path connectivity, 100-100-31", "N", "2", (128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
        lambda n: path(n, rival=n <= 1024), path_work,
    ),
    Sweep(
        "path connectivity, 100-H-31, N=256", "H", "1", (32, 64, 128, 256, 512, 1024),
        lambda h: path(256, (100, h, 31)), lambda h: path_work(256, (100, h, 31)),
    ),
    Sweep(
        "path connectivity, 100-H-H-31, N=256", "H", "2", (32, 64, 128, 256, 512),
        lambda h: path(256, (100, h, h, 31)), lambda h: path_work(256, (100, h, h, 31)),
    ),
    Sweep(
        "path connectivity, hidden layers of 100, N=256", "hidden layers", "1", (1, 2, 3, 4, 6, 8),
        lambda d: path(256, deep(d)), lambda d: path_work(256, deep(d)),
    ),
    Sweep(
        "path connectivity, 100-100-31, N=512", "nodes between the ends", "1", (1, 3, 5, 9, 13, 19, 29, 39),
        lambda m: path(512, points=m + 2), lambda m: path_work(512, points=m + 2),
    ),
    Sweep(
        "path connectivity, 100-100-31, N=768", "threads", "-1",
        tuple(2**k for k in range(torch.get_num_threads().bit_length())),
        on_threads, lambda threads: 1 / threads,
    ),
    Sweep(
        "jacobian_distances, 100-100-31", "N", "2", (256, 512, 1024, 2048, 4096),
        distances, lambda n: n * 100 * 200 + n * n / 2 * 100,
    ),
    Sweep(
        "hermite connectivity, 100-100-31", "N", "2", (128, 256, 512, 768, 1024, 2048),
        hermite, lambda n: n * n,
    ),
    Sweep("eigenvalues, float64", "N", "3", (128, 256, 512, 768, 1024, 2048), eigenvalues, lambda n: n**3),
)  # fmt: skip


def timed(sweep: Sweep, quick: bool) -> dict:
    """The least seconds of every bar at every value. All calls take turns, so that a slow minute of the machine affects all."""
    threads = torch.get_num_threads()
    values = sweep.values[:3] if quick else sweep.values
    calls = {(bar, value): call for value in values for bar, call in sweep.calls(value).items()}
    seconds = dict.fromkeys(calls, float("inf"))
    began = time.perf_counter()
    for call in calls.values():
        call()
    for done in range(1 if quick else ROUNDS):
        if done >= 3 and time.perf_counter() - began > SWEEP_SECONDS:
            break
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key] = min(seconds[key], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {
        "name": sweep.name,
        "variable": sweep.variable,
        "order": sweep.order,
        "bars": {
            bar: [[value, seconds[bar, value]] for value in values if (bar, value) in seconds]
            for bar in dict.fromkeys(bar for bar, _ in calls)
        },
        "work": [[value, sweep.work(value)] for value in values],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round of the first values, to try it")
    options = parser.parse_args()
    sweeps = []
    with torch.no_grad():
        for sweep in SWEEPS:
            print(f"  {sweep.name}, against {sweep.variable}", file=sys.stderr, flush=True)
            sweeps.append(timed(sweep, options.quick))
            options.file.write_text(json.dumps(sweeps))  # after each sweep, in case a later sweep fails


if __name__ == "__main__":
    main()
