"""Every CPU kernel against the fastest eager PyTorch of its benchmark, alone and beside one other busy process.

python bench/beside.py prints a table in Markdown. Nothing else may run on the machine.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import bench_hermite_connectivity
import bench_jacobian
import bench_jacobian_distance
import bench_path_r2
import torch
from bench_path_connectivity import UNIFORM, eager_best, samples, tail

import lmnfast
from lmnfast import ops, reference
from lmnfast._recognise import recognise

N = 961
CPU = torch.device("cpu")
Call = Callable[[], object]


def problems() -> dict[str, tuple[Call, list[Call]]]:
    """For each kernel our call and the eager PyTorch calls, with the sizes of its benchmark."""
    net, x = tail(100, 100, 31, device=CPU), samples(N)
    chain = recognise(net)
    jacobian_chain, inputs = bench_jacobian.chain_of(bench_jacobian.TAIL, CPU), torch.randn(N, 100)
    distance_net, distance_x = bench_jacobian_distance.network(CPU), bench_jacobian_distance.samples(N, CPU)
    interior, ends = torch.randn(40000, 19, 31), torch.randn(700, 31)
    first, second = torch.randint(700, (2, 40000))
    pairs = (interior, ends, first, second, *UNIFORM)
    rows = torch.randn(64, 768, dtype=torch.float64)
    return {
        "path_connectivity": (
            lambda: ops.path_connectivity(chain, x, *UNIFORM),
            [lambda: eager_best(net, x, 256)],
        ),
        "hermite_connectivity": (
            lambda: ops.hermite_connectivity(chain, x, *UNIFORM, False),
            [lambda: bench_hermite_connectivity.eager(net, x)],
        ),
        "jacobian": (
            lambda: ops.jacobian(jacobian_chain, inputs),
            [lambda: bench_jacobian.one_product(jacobian_chain, inputs)],
        ),
        "jacobian_distances": (
            lambda: lmnfast.jacobian_distances(distance_net, distance_x),
            [
                lambda: bench_jacobian_distance.through_cdist(distance_net, distance_x),
                lambda: bench_jacobian_distance.through_gram(distance_net, distance_x),
            ],
        ),
        "path_r2": (lambda: ops.path_r2(*pairs), [lambda: bench_path_r2.eager(*pairs)]),
        "spectral_entropy": (
            lambda: ops.spectral_entropy(rows),
            [lambda: reference.spectral_entropy(rows)],
        ),
    }


@contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def median_s(call: Call, seconds: float) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each call, in each of the two states")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| kernel | ours alone, ms | beside | PyTorch alone, ms | beside | ratio alone | beside | kept |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    with torch.no_grad():
        for name, (ours, rivals) in problems().items():
            times = []
            for state in (nullcontext, busy_process):
                with state():
                    times.append(
                        (median_s(ours, options.seconds), min(median_s(r, options.seconds) for r in rivals))
                    )
            (alone, rival), (beside, rival_beside) = times
            ratio, ratio_beside = rival / alone, rival_beside / beside
            print(
                f"| `{name}` | {alone * 1e3:.2f} | {beside * 1e3:.2f} | {rival * 1e3:.2f} | {rival_beside * 1e3:.2f} "
                f"| {ratio:.1f} | {ratio_beside:.1f} | {ratio_beside / ratio:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
