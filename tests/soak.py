"""Two thousand measurements in one process: memory, file descriptors and threads have to stay as they are.

python tests/soak.py
"""

import argparse
import os
import sys
import threading

import support
import torch
from torch import nn

import lmnfast

MOST_GROWTH = 4 * 2**20  # bytes, after the first quarter: the C library's heap breathes by about as much


def resources() -> tuple[int, int, int]:
    """Resident bytes, open file descriptors, threads of the process."""
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    fused = nn.Sequential(nn.Linear(20, 30), nn.SiLU(), nn.Linear(30, 5))
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), support.Residual(20, 5))
    inputs, x = torch.randn(40, 8), torch.randn(40, 20)
    x[1] = x[0] * (1 + 1e-6)  # a pair for float64
    probe = lmnfast.Probe(model, inputs, "0", every=1)
    history: list[dict] = []

    def probed(n: int) -> None:
        probe(n)
        history.extend(probe.new_rows(wait=n % 50 == 0))

    def cut(n: int) -> None:
        tail, samples = lmnfast.cut(model, "1", inputs)
        lmnfast.connectivity(tail, samples, method="hermite")

    def probed_anew(n: int) -> None:
        with lmnfast.Probe(model, inputs, "1", every=1) as other:
            other(0)
            assert other.history, "waits for the row"

    calls = (
        lambda n: lmnfast.lmn(fused, x),
        lambda n: lmnfast.lmn(lambda z: fused(z), x),
        lambda n: lmnfast.measure(support.Residual(20, 5), x),
        lambda n: lmnfast.jacobian_distances(fused, x),
        probed,
        cut,
        probed_anew,
    )
    seen = []
    quarter = max(1, arguments.count // 4)
    for n in range(arguments.count + 1):
        calls[n % len(calls)](n)
        if n % quarter == 0:
            history.clear()
            seen.append(resources())
            resident, descriptors, threads = seen[-1]
            print(
                f"{n:6}: {resident / 2**20:.1f} MB, {descriptors} descriptors, {threads} threads", flush=True
            )
    probe.close()
    first, last = seen[1], seen[-1]
    grown = last[0] - first[0] > MOST_GROWTH or last[1] > first[1] or last[2] > first[2]
    print(
        f"after {quarter}: {(last[0] - first[0]) / 2**20:+.1f} MB, {last[1] - first[1]:+} descriptors, "
        f"{last[2] - first[2]:+} threads"
    )
    print("a leak" if grown else "flat", f"({threading.active_count()} Python threads at the end)")
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
