"""What the checks around a fused kernel cost: a call of connectivity against its registered op on the same arguments.

python bench/overhead.py
"""

import statistics
import time

import torch
from bench_path_connectivity import UNIFORM, samples, tail

import lmnfast
from lmnfast.network import recognise
from lmnfast.ops.path_connectivity import chain_arguments

ROUNDS = {50: 300, 768: 15}


def main() -> None:
    torch.set_num_threads(
        1
    )  # so that CPU time, which does not see the machine's other processes, is a call's time
    net = tail(100, 100, 31, device=torch.device("cpu"))
    print("| N | connectivity, CPU ms | its op | checks | checks, share |\n|--:|--:|--:|--:|--:|")
    for n, rounds in ROUNDS.items():
        x = samples(n)
        arguments = (*chain_arguments(recognise(net), x), *UNIFORM)
        calls = (
            lambda x=x: lmnfast.connectivity(net, x),
            lambda a=arguments: torch.ops.lmnfast.path_connectivity(*a),
        )
        seconds: tuple[list[float], list[float]] = ([], [])
        for call in calls:
            call()
        for _ in range(rounds):  # in turns: these machines drift
            for call, times in zip(calls, seconds):
                begin = time.process_time()
                call()
                times.append(time.process_time() - begin)
        whole, op = (1e3 * statistics.median(times) for times in seconds)
        checks = 1e3 * statistics.median(a - b for a, b in zip(*seconds))
        print(f"| {n} | {whole:.2f} | {op:.2f} | {checks:.2f} | {checks / op:.1%} |")


if __name__ == "__main__":
    main()
