"""Measuring the checkpoints of a run again, and how long a measurement takes."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._connectivity import connectivity
from .._settings import METHODS
from ..cutting import cut
from ..runs.device import torch_threads
from ..runs.files import claimed
from ..runs.progress import progress_bar
from ..spectrum import linear_mapping_number
from .config import Config, probe_of, start
from .run import by_step, load_checkpoint, read_config, read_rows, steps_of, write_rows

TRIAL = 1024  # samples; for more of them the time is found out beforehand
LONG = 10.0  # seconds; a measurement that takes longer is announced


def measure(
    run: str | os.PathLike,
    *,
    layers: Sequence[str] | None = None,
    points: int | None = None,
    rule: str | None = None,
    method: str | Sequence[str] | None = None,
    samples: int | None = None,
    negative: str | None = None,
    device: str = "auto",
    every: int = 1,
    force: bool = False,
    progress: bool = False,
) -> tuple[Path, list[dict]]:
    """Measures a run's checkpoints again. An argument that is None stays as it was in the run.

    Args:
        run: the run's directory.
        layers: as in `Config`.
        points: as in `Config`.
        rule: as in `Config`.
        method: as in `Config`, one or several, whose numbers stand side by side.
        samples: as in `Config`.
        negative: as in `Config`.
        device: as in `Config`.
        every: only steps that are multiples of it.
        force: replace a table that has steps which this one will not have.
        progress: show a bar (needs tqdm), and say at the beginning how long a measurement of many samples takes.

    Returns:
        RUN/measure-LAYERS-METHODS-RULEPOINTS.csv, written, and its rows: the numbers are lmn_LAYER, or with several
        methods lmn_LAYER_METHOD. Where not all training samples are measured, the name ends in -NUMBERsamples, and in
        -clip where negative eigenvalues count 0.

    Raises:
        ValueError: not a run, a damaged one, no checkpoint, a table that has more steps, or as `Config`; another
            process is at work in the run.
    """
    path = Path(run)
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    stored = read_config(path)
    methods = (stored.method,) if method is None else (method,) if isinstance(method, str) else tuple(method)
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(
            f"method: expected some of {', '.join(METHODS)}, each once, got {', '.join(methods)}"
        )
    given = {"layers": layers, "points": points, "rule": rule, "samples": samples, "negative": negative}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    configs = [replace(stored, device=device, method=name, **changes).settled() for name in methods]
    config, together = configs[0], "+".join(methods)
    name = f"measure-{'+'.join(config.layers)}-{together}-{config.rule}{config.points}"
    name += "" if config.samples is None else f"-{config.samples}samples"
    name += "" if config.negative == "absolute" else f"-{config.negative}"
    table = path / f"{name}.csv"
    assert config.threads is not None  # settled
    with claimed(path, "run"), torch_threads(config.threads):
        steps = [step for step in steps_of(path) if step % every == 0]
        if not steps:
            raise ValueError(f"run: no checkpoints of such steps in {path}")
        if not force and (lost := _steps_in(table) - set(steps)):
            raise ValueError(
                f"run: {table} has {len(lost)} more steps than this would have, {min(lost)} for one; move it away, or "
                "--force to replace it"
            )
        task, model = start(config)
        inputs = task.train_inputs[: config.samples]
        if progress:
            say_how_long(path, model, inputs, configs, len(steps))
        rows: list[dict] = [{} for _ in steps]
        with progress_bar(len(steps) * len(methods), 0, progress) as bar:
            for each in configs:
                with probe_of(model, inputs, each, 1) as probe:
                    for step in steps:
                        load_checkpoint(model, path, step)
                        probe(step)
                        if bar:
                            bar.update()
                    measured = by_step(probe.history, f"_{each.method}" if len(methods) > 1 else "")
                for row, more in zip(rows, measured, strict=True):
                    row.update(more, method=together)
        write_rows(table, rows, ())
    return table, rows


def _steps_in(table: Path) -> set[int]:
    """The steps in a table of `measure`; none where it does not exist."""
    if not table.exists():
        return set()
    try:
        return {row["step"] for row in read_rows(table)}
    except ValueError as error:
        raise ValueError(f"run: {error}; move it away, or --force to replace it") from None


def say_how_long(path: Path, model: nn.Module, inputs: Tensor, configs: Sequence[Config], count: int) -> None:
    """Prints how long a measurement by the configs takes, and `count` of them, where that is longer than LONG."""
    if len(inputs) <= TRIAL:
        return
    seconds = sum(expected_seconds(model, inputs, config) for config in configs)
    if seconds > LONG:
        print(
            f"{path}: a measurement of {len(inputs)} samples will take about {_duration(seconds)}, "
            f"{count} of them about {_duration(count * seconds)}; --samples takes fewer samples",
            flush=True,
        )


def expected_seconds(model: nn.Module, inputs: Tensor, config: Config) -> float:
    """How long a measurement of the inputs takes on this machine, by a trial with TRIAL / 2 of them.

    The time of the connectivity grows with the square of their number, that of the eigenproblem with the cube. The
    probe solves the eigenproblem on one core, and so does the trial.
    """
    settings: dict[str, Any] = {"method": config.method, "points": config.points, "rule": config.rule}
    total = 0.0
    for layer in config.layers:
        # A first call loads libraries, so the trial with 16 samples goes before the one that counts.
        for count in (16, TRIAL // 2):
            ratio = len(inputs) / count
            f, x = cut(model, layer, inputs[:count])
            begin = time.perf_counter()
            L = connectivity(f, x, **settings)
            if L.is_cuda:
                torch.cuda.synchronize(L.device)
            between = time.perf_counter()
            with torch_threads(1):
                linear_mapping_number(L).item()
            seconds = (between - begin) * ratio**2 + (time.perf_counter() - between) * ratio**3
        total += seconds
    return total


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
