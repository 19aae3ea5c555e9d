"""Measures the checkpoints of a run again, and estimates how long a measurement takes."""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._choices import METHODS
from .._connectivity import connectivity
from .._eigenvalues import linear_mapping_number
from .._observables import Chosen
from ..cutting import cut
from ..runs.device import torch_threads
from ..runs.files import claimed
from ..runs.progress import progress_bar
from .choices import SPLITS
from .config import Config, probe_of, start
from .run import by_step, load_checkpoint, read_config, read_rows, steps_of, write_rows

TRIAL = 1024  # samples; with more samples the time of a measurement is estimated before it
LONGEST_NAME = 200  # file systems take 255 bytes, and a figure's name is a little longer than its table's
LONG = 10.0  # seconds; the estimate is printed if it is longer


def measure(
    run: str | os.PathLike,
    *,
    layers: Sequence[str] | None = None,
    until: str | None = None,
    points: int | None = None,
    rule: str | None = None,
    method: str | Sequence[str] | None = None,
    split: str = "train",
    samples: int | None = None,
    negative: str | None = None,
    stabiliser: float | None = None,
    observables: str | Sequence[str] | None = None,
    device: str = "auto",
    every: int = 1,
    force: bool = False,
    progress: bool = False,
) -> tuple[Path, list[dict]]:
    """Measures a run's checkpoints again. An argument that is None has the run's value.

    Args:
        run: the run's directory.
        layers: as in `Config`.
        until: the layer with whose output the measured maps end, as in `cut`; None: the model's output.
        points: as in `Config`.
        rule: as in `Config`.
        method: as in `Config`; or several methods, whose numbers become columns beside each other.
        split: "train": the samples are those that the run was trained on. "test": those that it was tested on.
        samples: as in `Config`, of the split; None with "test": all.
        negative: as in `Config`.
        stabiliser: as in `Config`.
        observables: as in `Config`.
        device: as in `Config`.
        every: only steps that are multiples of this number are measured.
        force: replace the existing table also if it has steps that the new table will not have.
        progress: show a bar (needs tqdm), and print at the beginning how long a measurement of many samples takes.

    Returns:
        The path of the written table, RUN/measure-LAYERS-METHODS-RULEPOINTS.csv, and its rows. The columns of numbers are
        lmn_LAYER, or with several methods lmn_LAYER_METHOD. If test samples are measured, its name also has -test; if not
        all samples of the split are measured, -NUMBERsamples; if negative eigenvalues count as 0, -clip; with a stabiliser
        above 0 -stabiliserNUMBER, with observables -and-NAMES, and with `until` -until-LAYER. A name of more than 200
        letters is cut and ends in a digest.

    Raises:
        ValueError: not a run; a damaged run; no checkpoint; the existing table has more steps; an argument that `Config`
            refuses; `until` is not behind the layers; another process is at work in the run.
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
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    tested = split == "test"
    given: dict[str, Any] = {"layers": layers, "points": points, "rule": rule}
    given |= {"negative": negative, "stabiliser": stabiliser, "samples": None if tested else samples}
    changes = {name: value for name, value in given.items() if value is not None}
    configs = [replace(stored, device=device, method=name, **changes).settled() for name in methods]
    config, together = configs[0], "+".join(methods)
    beside = Chosen(stored.observables if observables is None else observables).names
    count = samples if tested else config.samples
    table = path / f"{_table_name(config, together, count, beside, until, split)}.csv"
    assert config.threads is not None  # settled
    with claimed(path, "run"), torch_threads(config.threads):
        steps = [step for step in steps_of(path) if step % every == 0]
        if not steps:
            raise ValueError(f"run: no checkpoints at multiples of {every} steps in {path}")
        if not force and (lost := _steps_in(table) - set(steps)):
            raise ValueError(
                f"run: {table} has {len(lost)} more steps than the new table, {min(lost)} for one; move it away, or "
                "--force to replace it"
            )
        task, model = start(config)
        inputs = _first(task.test_inputs if tested else task.train_inputs, count)
        if progress:
            say_how_long(
                path, model, inputs, configs, len(steps)
            )  # of maps to the output, which take longest
        rows: list[dict] = [{} for _ in steps]
        with progress_bar(len(steps) * len(methods), 0, progress) as bar:
            for each in configs:
                with probe_of(model, inputs, each, 1, until, beside) as probe:
                    for step in steps:
                        load_checkpoint(model, path, step)
                        probe(step)
                        if bar:
                            bar.update()
                    suffix = f"_{each.method}" if len(methods) > 1 else ""
                    measured = by_step(probe.history, suffix, beside)
                for row, more in zip(rows, measured, strict=True):
                    row.update(more, method=together)
        write_rows(table, rows, (), beside)
    return table, rows


def _table_name(
    config: Config, methods: str, count: int | None, beside: Sequence[str], until: str | None, split: str
) -> str:
    """The name of a table. Settings that most tables have are not in it."""
    parts = (
        f"measure-{'+'.join(config.layers)}-{methods}-{config.rule}{config.points}",
        "" if split == "train" else split,
        "" if count is None else f"{count}samples",
        "" if config.negative == "absolute" else config.negative,
        f"stabiliser{config.stabiliser!r}" if config.stabiliser else "",
        f"and-{'+'.join(beside)}" if beside else "",
        "" if until is None else f"until-{until}",
    )
    name = "-".join(part for part in parts if part)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def _first(inputs: Tensor, count: int | None) -> Tensor:
    """The first inputs; None: all."""
    if count is not None and not 2 <= count <= len(inputs):
        raise ValueError(f"samples: expected 2 to {len(inputs)}, all of this split, got {count}")
    return inputs[:count]


def _steps_in(table: Path) -> set[int]:
    """The steps in a table of `measure`; an empty set if the table does not exist."""
    if not table.exists():
        return set()
    try:
        return {row["step"] for row in read_rows(table)}
    except ValueError as error:
        raise ValueError(f"run: {error}; move it away, or --force to replace it") from None


def say_how_long(path: Path, model: nn.Module, inputs: Tensor, configs: Sequence[Config], count: int) -> None:
    """Prints how long one measurement with these configs takes, and how long `count` of them take, if one is longer than
    LONG."""
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
    """An estimate of the time of a measurement of the inputs on this machine, from a trial with TRIAL / 2 of the inputs.

    The time of the connectivity grows with the square of the number of inputs. The time of the eigenproblem grows with the
    cube. The trial solves the eigenproblem on one core, as the probe does.
    """
    settings: dict[str, Any] = {"method": config.method, "points": config.points, "rule": config.rule}
    total = 0.0
    for layer in config.layers:
        # The first call also loads libraries. It uses 16 samples, and only the second call counts.
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
