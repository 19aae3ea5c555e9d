"""Seeds that train together on a card: their time, and some of them held to their runs alone.

python bench/seeds.py [--seeds 256] [--steps 1000] [--task modular-addition] [--device cuda | cpu]

It trains the study's runs of a task for some steps, all seeds together, as `lmnfast paper` does on a card. Then it trains the
first, the middle and the last seed alone. The largest relative differences up to step HELD are printed. Later the two may
differ by more, as training amplifies rounding. The exit code is 1 if a difference is above TOLERANCE.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from lmnfast.grokking.config import Config
from lmnfast.grokking.run import Run, read_run
from lmnfast.grokking.together import bytes_of_a_seed, seeds_at_once, train_together
from lmnfast.grokking.training import train
from lmnfast.paper.settings import Study

HELD = 300
# A loss of 1e-3 at step 300 has lost three digits to the growth of rounding.
TOLERANCE = 2e-3
COLUMNS = (
    "train_loss",
    "test_loss",
    "l2_norm",
    "lmn_hidden_1",
    "curvature_hidden_1",
    "pooled_curvature_hidden_1",
)
RANKS = tuple(f"{name}_hidden_1" for name in ("jacobian_rank", "local_complexity", "representation_rank"))


def largest_differences(together: Run, alone: Run) -> dict[str, float]:
    """By column, the largest relative difference of the rows up to step HELD."""
    rows = [pair for pair in zip(together.rows, alone.rows, strict=True) if pair[0]["step"] <= HELD]
    return {
        name: max(abs(row[name] - own[name]) / abs(own[name]) for row, own in rows)
        for name in (*COLUMNS, *RANKS)
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--task", default="modular-addition")
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    study = Study(steps=chosen.steps, every=min(Study.every, chosen.steps))
    configs: list[Config] = [
        replace(study.config(chosen.task, seed), device=chosen.device).settled()
        for seed in range(chosen.seeds)
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(config.seed)) for config in configs]
        begin = time.perf_counter()
        train_together(configs, paths)
        wall = time.perf_counter() - begin
        runs = {seed: read_run(paths[seed]) for seed in sorted({0, chosen.seeds // 2, chosen.seeds - 1})}
        begin = time.perf_counter()
        alone = {seed: train(runs[seed].config, Path(folder, f"alone-{seed}")) for seed in runs}
        wall_alone = (time.perf_counter() - begin) / len(alone)
    training, measuring = (chosen.seeds * runs[0].seconds[name] for name in ("training", "measuring"))
    measured = len(runs[0].rows)
    print(
        f"{chosen.task}, {chosen.seeds} seeds together, {seeds_at_once(configs[0])} at most at once "
        f"({bytes_of_a_seed(configs[0]) / 1e6:.0f} MB each by calculation), {chosen.steps} steps on {chosen.device}, "
        f"torch {torch.__version__}\n"
    )
    print("| what | value |\n|---|--:|")
    print(f"| all of it, with the files | {wall:.1f} s |")
    print(f"| the same for 20 000 steps, by proportion | {wall * 20_000 / chosen.steps / 60:.1f} min |")
    print(f"| an update of all seeds | {1e3 * training / chosen.steps:.2f} ms |")
    print(f"| a measurement of all seeds | {measuring / measured:.3f} s |")
    print(f"| one seed alone | {wall_alone:.1f} s |")
    if chosen.device == "cuda":
        print(f"| most memory in use | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB |")
    failed = False
    for seed in runs:
        for name, difference in largest_differences(runs[seed], alone[seed]).items():
            print(f"| seed {seed}, {name}: largest relative difference | {difference:.1e} |")
            failed = failed or not difference <= TOLERANCE
    if failed:
        print(f"expected differences of at most {TOLERANCE}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
