"""How often the interval of `solver="estimate"` contains the LMN of LAPACK's eigenvalues, at three sizes and four stages of a
training. Prints the table of docs/mathematics.md, "An estimate for large N". Half an hour on 2 cores, the dense solves in it.

python -m bench.coverage FOLDER [--draws 100] [--full 0]

The folder keeps the trained network, the matrices and their eigenvalues. A draw is for the diagonal matrix of the eigenvalues,
which differs for the estimate by the rounding of products alone; --full is the number of draws for the matrix itself.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lmnfast
from lmnfast._krylov import SpectralEstimate, estimate, student
from lmnfast.grokking import Config, train
from lmnfast.grokking.config import start
from lmnfast.grokking.run import load_checkpoint, steps_of

SIZES = (2048, 4096, 8192)
SETTINGS = {"rule": "lobatto", "points": 5}
CONFIG = Config(
    "modular-addition",
    p=97,
    steps=4000,
    every=40,
    samples=200,
    points=7,
    rule="lobatto",
    batch=1024,
    device="cpu",
    threads=1,
    until_accurate=True,
)


def stages(folder: Path) -> dict[str, Tensor]:
    """Connectivities of the largest size: untrained, early, at the largest LMN, and when the test accuracy is 1."""
    try:
        run = train(CONFIG, folder / "run")
    except ValueError as error:
        what = str(error).partition("; choose another")[0]  # the way out is that of another command
        raise SystemExit(
            f"{folder}: expected an empty folder, or one of this benchmark with the same settings; {what}"
        ) from None
    peak = max(run.rows, key=lambda row: row["lmn_hidden_1"])["step"]
    task, model = start(run.config)
    inputs = torch.cat([task.train_inputs, task.test_inputs])[: max(SIZES)]
    found = {}
    for name, step in (("initial", 0), ("step 40", 40), ("peak", peak), ("late", steps_of(run.path)[-1])):
        file = folder / f"{name}.npy"
        if not file.exists():
            load_checkpoint(model, run.path, step)
            np.save(file, lmnfast.connectivity(*lmnfast.cut(model, "hidden_1", inputs), **SETTINGS).numpy())
        found[name] = torch.from_numpy(np.load(file, mmap_mode="c"))
    return found


def eigenvalues_of(matrix: Tensor, file: Path) -> Tensor:
    if not file.exists():
        np.save(file, lmnfast.eigenvalues(matrix).numpy())
    return torch.from_numpy(np.load(file))


def draw(matrix: Tensor, seed: int) -> SpectralEstimate:
    """matrix: (N, N), or the diagonal (N,)."""

    def product(v: Tensor) -> Tensor:
        return matrix @ v if matrix.dim() == 2 else matrix[:, None] * v

    squares = sum(float(rows.double().square().sum()) for rows in matrix.split(1024))
    trace = float((matrix.diagonal() if matrix.dim() == 2 else matrix).sum(dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    return estimate(product, len(matrix), squares=squares, trace=trace, generator=generator)


def line(name: str, exact: float, draws: list[SpectralEstimate]) -> str:
    errors = [math.log(each.lmn / exact) for each in draws]
    inside = sum(low <= exact <= high for low, high in (each.interval() for each in draws))
    chance = sum(abs(e) <= student(0.95) * d.standard_error / d.lmn for e, d in zip(errors, draws))
    bar = max(each.interval()[1] / each.lmn - 1 for each in draws)
    spread = f"{np.mean(errors):+.2%} ± {np.std(errors):.2%}"
    bound, degree, products = (
        np.mean([getattr(d, what) / of for d, of in pairs])
        for what, pairs in (
            ("bound", [(d, d.lmn) for d in draws]),
            ("degree", [(d, 1) for d in draws]),
            ("products", [(d, 1) for d in draws]),
        )
    )
    counts = f"{inside} of {len(draws)} | {chance} of {len(draws)}"
    return f"| {name} | {exact:.2f} | {counts} | {spread} | {bound:.2%} | {bar:.2%} | {degree:.0f} | {products:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--full", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(
        "| matrix | LMN | inside | by chance | error, mean ± sd | bound | largest bar | degree | products |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for stage, whole in stages(options.folder).items():
        for n in SIZES:
            matrix = whole[:n, :n].contiguous()
            values = eigenvalues_of(matrix, options.folder / f"{stage} {n}.npy")
            size = values.abs() / values.abs().sum()
            exact = math.exp(-float(torch.special.xlogy(size, size).sum()))
            name = f"{stage}, N = {n}"
            if options.draws:
                draws = [draw(values.float(), seed) for seed in range(options.draws)]
                print(line(name, exact, draws), flush=True)
            if options.full:
                draws = [draw(matrix, seed) for seed in range(options.full)]
                print(line(f"{name}, full", exact, draws), flush=True)


if __name__ == "__main__":
    main()
