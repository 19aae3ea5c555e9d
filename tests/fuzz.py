"""Connectivity matrices of random networks against a truth of their own.

    python tests/fuzz.py --count 10000 --seed 0 --jobs 2        a table, every failure, exit status 1 if there is one
    python tests/fuzz.py --only 1234 --show                     one case: sizes, worst pair, outputs along its path

Cases are drawn in fuzz_cases.py; fuzz_truth.py has the truth, fuzz_verdicts.py what lmnfast and PyTorch make of a case.

A case is one network (`Case`), one set of samples, a method and a rule. It is measured on every instruction set, by the
fused route, and a third of the cases by the generic route too. A measured matrix has to be symmetric to the bit, with ones
on its diagonal, in [0, 1], one where the outputs are the same along all of a path, and right:

    |L - truth| <= 2 * loss + floor + 4 epsilon

- truth: the definitions in numpy, float64 for float32 cases, else long double. No code of lmnfast is used.
- loss: the largest error of the case in plain PyTorch of the case's dtype, outputs at all nodes in one batch, statistics in
  float64; of close pairs (`NEAR`) by itself.
- floor: what a rounding of every operation costs an entry, to first order. `Rounded` carries it through the network;
  `Paths` carries it on into r2. Without it, a case would fail in which PyTorch is right by luck. Of float64 paths the fused
  route rounds as their larger end does, because it adds a chord and a residual. The generic route takes slopes for the Hermite
  methods from Jacobians times x_j - x_i, which may cancel: `OF_SLOPES` more in float64.

An output is constant, r2 = 1, where its standard deviation along a path is at most 4 epsilons of its magnitude at the ends.
Within a factor of 4 either way an implementation may decide either way. The fused route knows that a constant added to an
output does not matter, so its truth has no bias in the last Linear. It also measures close pairs of float32 samples in
float64 (`NEAR`): for these pairs epsilon is that of float64, in the rule and in the floor.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

if __name__ == "__main__":  # kernels and BLAS share the cores with the other processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


import numpy as np
import torch
from fuzz_cases import Case, draw
from fuzz_truth import distances, truth_of
from fuzz_verdicts import NEAR, Verdict, check, pytorchs

from lmnfast import _native


def show(case: Case, levels: list[str]) -> None:
    """Prints a case, its verdicts, and the outputs along the worst pair's path."""
    print(case)
    for w, b in zip(case.weights, case.biases):
        print(f"  weight {w.shape[1]} -> {w.shape[0]}, rms {np.sqrt((w**2).mean()):.3g}, bias", end=" ")
        print("none" if b is None else f"rms {np.sqrt((b**2).mean()):.3g}")
    print(f"  activations {case.activations}, skips {case.skips}, |x| up to {np.abs(case.x).max():.3g}")
    worst = None
    for verdict in check(case, levels):
        print(
            f"{verdict.level}, {verdict.route}: error {verdict.error:.3g}, PyTorch's {verdict.loss:.3g} {verdict.failure}"
        )
        print(f"    {verdict.text}")
        if " worst " in verdict.text:
            pair = verdict.text.split(" worst ")[1].split(":")[0].split(", ")
            worst = worst or (np.array([int(pair[0])]), np.array([int(pair[1])]))
    if worst is None:
        return
    with np.errstate(all="ignore"), torch.no_grad():
        fused_close = distances(case, *worst)[0] < NEAR and case.dtype == "float32"
        u = 2.0**-53 if fused_close else float(np.finfo(case.dtype).eps) / 2
        _, _, details = next(truth_of(case, *worst, u, case.dtype == "float64" or fused_close, details=True))
        again = pytorchs(case, *worst, getattr(torch, case.dtype), True)[2][0]
    print(
        f"relative distance {distances(case, *worst)[0]:.3g}{', measured in float64' if fused_close else ''}"
    )
    parts, y = details["plain"], details["y"][0]
    for k in np.argsort(-np.abs(1 - parts["r2"][0]))[:8]:
        state = (
            "constant" if parts["certain"][0, k] else "perhaps constant" if parts["possible"][0, k] else ""
        )
        print(
            f"output {k}: r2 {parts['r2'][0, k]:.6g}, floor {parts['floor'][0, k]:.2g}, deviation "
            f"{parts['deviation'][0, k]:.3g} {state}"
        )
        few = np.unique(np.linspace(0, len(y) - 1, 7).astype(int))
        print("    truth  ", " ".join(f"{float(v):.8g}" for v in y[few, k]))
        print("    PyTorch", " ".join(f"{v:.8g}" for v in again[few, k]))


def slice_of(seeds: list[int], levels: list[str]) -> list[Verdict]:
    torch.set_num_threads(1)
    return [verdict for seed in seeds for verdict in check(draw(seed), levels)]


def table(verdicts: list[Verdict]) -> list[str]:
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault((v.dtype, v.route, v.method, v.level), []).append(v)
    rows = [
        (
            "dtype",
            "route",
            "method",
            "level",
            "cases",
            "error: median",
            "worst",
            "to PyTorch's: median",
            "worst",
            "over",
        )
    ]
    for key, group in sorted(groups.items()):
        error = np.array([v.error for v in group])
        # A case in which PyTorch is right by luck says nothing: an epsilon is the least that it is said to lose.
        ratio = error / np.maximum([v.loss for v in group], np.finfo(key[0]).eps)
        numbers = [f"{v:.2g}" for v in (np.median(error), error.max(), np.median(ratio), ratio.max())]
        rows.append((*key, str(len(group)), *numbers, str(sum(bool(v.failure) for v in group))))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first case is a million times this one")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument(
        "--show", action="store_true", help="print the case and the outputs along its worst path"
    )
    parser.add_argument(
        "--isa", default=",".join(_native._C.isas()), help="levels, with commas between; all of this machine"
    )
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    levels = arguments.isa.split(",")
    begin = time.monotonic()
    if arguments.show:
        show(draw(arguments.only), levels)
        return 0
    start = 1_000_000 * arguments.seed
    seeds = [arguments.only] if arguments.only is not None else list(range(start, start + arguments.count))
    slices = [(seeds[k : k + 25], levels) for k in range(0, len(seeds), 25)]
    verdicts: list[Verdict] = []
    # New interpreters: a forked one cannot use the OpenMP threads of its parent.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for done, part in enumerate(pool.map(slice_of, *zip(*slices)), 1):
            verdicts += part
            if sys.stderr.isatty():
                print(f"\r{done} of {len(slices)}", end="", file=sys.stderr)
    failures = [v for v in verdicts if v.failure]
    for v in failures:
        print(
            f"{v.failure}: python tests/fuzz.py --only {v.seed} --show --isa {v.level}  # {v.dtype} {v.route} {v.method}"
        )
        print("    " + v.text.strip().replace("\n", "\n    "))
    print(*table(verdicts), sep="\n")
    print(
        f"{len(seeds)} cases, {len(verdicts)} matrices, {len(failures)} wrong, {time.monotonic() - begin:.0f} s"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
