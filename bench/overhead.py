"""The cost of the checks around a fused kernel: a call of connectivity against the same work without checks.

python bench/overhead.py

Without checks: the chain is recognised, its first Linear is applied, and its pairs are measured. The two calls take turns, and
the cost is the median of their differences, because the machines' rates drift. The least time of each call is its time without
disturbance.
"""

import statistics
import time

import torch
from bench_path_connectivity import UNIFORM, samples, tail

import lmnfast
from lmnfast._recognise import recognise
from lmnfast.ops.path_connectivity import chain_connectivity

ROUNDS = {50: 500, 768: 15}


def main() -> None:
    # CPU time does not contain the machine's other processes. With one thread it is the time of a call.
    torch.set_num_threads(1)
    net = tail(100, 100, 31, device=torch.device("cpu"))
    print(
        "| N | connectivity, CPU ms: median | least | without checks: median | least | checks: median | of least |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for n, rounds in ROUNDS.items():
        x = samples(n)

        def unchecked(x: torch.Tensor = x) -> None:
            with torch.no_grad():
                chain_connectivity(recognise(net), x, *UNIFORM).resolve()

        calls = (lambda x=x: lmnfast.connectivity(net, x), unchecked)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for call, times in zip(calls, seconds):
                begin = time.process_time()
                call()
                times.append(time.process_time() - begin)
        whole, bare = (1e3 * statistics.median(times) for times in seconds)
        least, bare_least = (1e3 * min(times) for times in seconds)
        checks = 1e3 * statistics.median(a - b for a, b in zip(*seconds))
        print(
            f"| {n} | {whole:.2f} | {least:.2f} | {bare:.2f} | {bare_least:.2f} | {checks:.2f} ({checks / bare:.1%}) "
            f"| {least - bare_least:.2f} ({(least - bare_least) / bare_least:.1%}) |"
        )


if __name__ == "__main__":
    main()
