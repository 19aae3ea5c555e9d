"""What a penalty on LMN or curvature does to grokking: the paper's training in several arms, each run until it is accurate.

The arms are the paper's training; the same with one of three penalties; and the same with another weight decay, which gives the
weights the norm that they have with the penalty on the pooled curvature. Every weight is chosen by runs on seeds that are not
reported, by a rule that is fixed beforehand (`chosen_weight`, `matched_weight_decay`).

The folder OUT/interventions has study.json, the settings; runs/, the directories of runs; rows/, one row for each finished
run; and results.csv.gz, all rows. If the work is stopped, all of these can be continued.
"""

import gzip
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .._files import csv_line, write_file
from .._history import history
from ..cutting import cut
from ..grokking.config import start
from ..grokking.run import checkpoint_of, load_checkpoint, read_run, steps_of
from ..grokking.training import updates
from ..runs.device import torch_threads
from ..runs.files import claimed, write_json
from ..runs.progress import move, progress_bar
from ..runs.tables import check_continues
from ..spectrum import measure
from .settings import ARMS, INTERVENTIONS, LAYER, MATCHED, PENALISED, Interventions
from .study import check_arguments, do_all, train_or_say

Row = dict[str, Any]
# step: of the first measured test accuracy 1, None if the run is censored. seeds: "tuning" or "reported". source: "run", or
# the name of a table from which the row was taken.
NAMES = ("task", "arm", "weight", "weight_decay", "seed", "seeds", "source", "ended", "step", "last_step")
NUMBERS = (
    *("train_accuracy", "test_accuracy", "train_loss", "test_loss", "l2_norm"),
    *("lmn", "curvature", "pooled_curvature"),
)
COLUMNS = (*NAMES, *NUMBERS)
TRIAL = 24  # updates of the trial from which the time is estimated
SAME = 1e-5  # relative difference of numbers that are the same: tables have seven digits


def run_interventions(
    out: Path,
    tasks: Sequence[str],
    seeds: int,
    jobs: int,
    settings: Interventions,
    *,
    results: Path | None = None,
    progress: bool = False,
) -> list[Row]:
    """Runs the missing parts, in `jobs` processes with one thread each.

    Args:
        out: the study's directory; the work goes into its folder "interventions".
        tasks: some of TASKS.
        seeds: number of reported seeds of each arm, which begin at 0.
        jobs: number of processes.
        settings: of the runs.
        results: the results.csv, or .csv.gz, of a study. Its runs are those of the arm "none". Seed 0 of each task is run all
            the same, and must give the same numbers.
        progress: print the plan and the time that it takes at most, and show a bar (needs tqdm).

    Returns:
        The rows of results.csv.gz.

    Raises:
        ValueError: a wrong argument; another process is at work; other work is in the folder; `results` has other numbers, or
            lacks some; damaged runs.
        OSError: the folder cannot be written; processes died again and again.
    """
    check_arguments(tasks, seeds, jobs)
    if seeds > min(settings.tuning):
        raise ValueError(
            f"seeds: expected at most {min(settings.tuning)}, which tunes the weights, got {seeds}"
        )
    folder = out / INTERVENTIONS
    known = {} if results is None else baseline(results, tasks, seeds, settings)
    with claimed(folder):
        check_same(folder, settings)
        write_json(folder / "study.json", asdict(settings))
        tuning = tuning_jobs(tasks, settings)
        one_by_one = [(task, arm, None, seed) for seed in range(seeds) for task in tasks for arm in ARMS]
        planned = [
            job for job in one_by_one if (job[0], job[3]) not in known or job[1] != "none" or job[3] == 0
        ]
        if progress:
            _say_plan(folder, [*tuning, *planned], len(tuning), jobs, settings)
        with progress_bar(len(tuning) + len(planned), 0, progress, "run") as bar:
            _do(folder, settings, tuning, jobs, bar)
            chosen = {task: choices(rows_of(folder, tuning), task, settings) for task in tasks}
            reported = [(task, arm, chosen[task][arm], seed) for task, arm, _, seed in planned]
            _do(folder, settings, reported, jobs, bar)
        rows = _with_baseline(rows_of(folder, reported), known, results)
        rows = [*rows_of(folder, tuning), *sorted(rows, key=_order)]
        write_results(folder / "results.csv.gz", rows)
    return rows


def _order(row: Row) -> tuple[str, int, int]:
    return row["task"], ARMS.index(row["arm"]), row["seed"]


def check_same(folder: Path, settings: Interventions) -> None:
    """Raises ValueError if the folder has work with other settings."""
    file = folder / "study.json"
    if file.exists():
        stored, given = read_json(file), json.loads(json.dumps(asdict(settings)))
        check_continues(folder, "interventions with other settings", stored, given, most=1)


def read_json(file: Path) -> dict[str, Any]:
    """The content of a file of `write_json`.

    Raises:
        ValueError: there is no file, or it is damaged.
    """
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {content!r}")
        return content
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise ValueError(f"out: cannot read {file}: {error}") from None


# The plan --------------------------------------------------------------------------------------------------


Job = tuple[str, str, float | None, int]  # task, arm, weight or weight decay, seed


def tuning_jobs(tasks: Iterable[str], settings: Interventions) -> list[Job]:
    """The runs from which the weights are chosen."""
    grids = {**settings.weights, "weight_decay": settings.weight_decays}
    return [
        (task, arm, weight, seed)
        for task in tasks
        for arm, weights in grids.items()
        for weight in weights
        for seed in settings.tuning
    ]


def _say_plan(folder: Path, work: Sequence[Job], tuning: int, jobs: int, settings: Interventions) -> None:
    """Prints how many runs there are, and how long they take if all go to their last step."""
    tasks = dict.fromkeys(job[0] for job in work)
    left = [job for k, job in enumerate(work) if k >= tuning or not row_file(folder, job).exists()]
    kinds = dict.fromkeys((task, arm) for task, arm, _, _ in left)
    per_step = {kind: seconds_per_step(*kind, settings) for kind in kinds}
    total = sum(per_step[task, arm] * settings.horizons[task] for task, arm, _, _ in left)
    print(f"{folder}: {tuning} runs to choose weights, {len(work) - tuning} to report")
    for task in tasks:
        times = [f"{arm} {1000 * per_step[task, arm]:.1f}" for arm in ARMS if (task, arm) in per_step]
        print(
            f"{task}: until test accuracy 1, at most {settings.horizons[task]} steps; ms a step: {', '.join(times)}"
        )
    print(
        f"at most {total / 60 / jobs:.0f} min in {jobs} processes; less where runs are accurate before their last step, or are "
        "there already",
        flush=True,
    )


def seconds_per_step(task: str, arm: str, settings: Interventions) -> float:
    """The time of an update on one thread, by a trial of TRIAL updates."""
    weight = settings.weights[arm][0] if arm in PENALISED else None
    config = replace(settings.config(task, arm, weight, 0), device="cpu")
    with torch_threads(1):
        update = updates(config)
        for step in range(1, settings.penalty_every + 1):
            update(step)
        begin = time.perf_counter()
        for step in range(1, TRIAL + 1):
            update(step)
        return (time.perf_counter() - begin) / TRIAL


def chosen_weight(rows: Sequence[Row]) -> float:
    """The weight of a penalty, from its rows on the tuning seeds: that of the smallest median step of test accuracy 1, where a
    censored run counts as infinite; among equal ones that of the largest mean test accuracy at the end; then the smallest."""

    def key(weight: float) -> tuple[float, float, float]:
        own = [row for row in rows if row["weight"] == weight]
        return median(map(steps_to_accuracy, own)), -fmean(row["test_accuracy"] or 0.0 for row in own), weight

    return min({row["weight"] for row in rows}, key=key)


def matched_weight_decay(rows: Sequence[Row], target: float) -> float:
    """The weight decay at which the mean L2 norm at the end is the target, from rows on the tuning seeds.

    It is interpolated between neighbouring values of the grid, linearly in its logarithm, and rounded to three digits. If
    several neighbours have the target between them, the smallest are taken; if none has, the value whose norm is nearest.
    """
    decays = sorted({row["weight_decay"] for row in rows})
    norms = {decay: _norm([row for row in rows if row["weight_decay"] == decay]) for decay in decays}
    for low, high in pairwise(decays):
        a, b = norms[low], norms[high]
        if min(a, b) <= target <= max(a, b) < math.inf and a != b:
            share = (target - a) / (b - a)
            return float(f"{math.exp((1 - share) * math.log(low) + share * math.log(high)):.3g}")
    return min(decays, key=lambda decay: (abs(norms[decay] - target), decay))


def choices(rows: Sequence[Row], task: str, settings: Interventions) -> dict[str, float | None]:
    """The weight of every arm, from the rows of the tuning seeds; the weight decay of the arm weight_decay."""
    own = [row for row in rows if row["task"] == task]
    by_arm = {arm: [row for row in own if row["arm"] == arm] for arm in ARMS}
    chosen: dict[str, float | None] = {arm: chosen_weight(by_arm[arm]) for arm in PENALISED}
    target = _norm([row for row in by_arm[MATCHED] if row["weight"] == chosen[MATCHED]])
    return {"none": None, **chosen, "weight_decay": matched_weight_decay(by_arm["weight_decay"], target)}


def _norm(rows: Sequence[Row]) -> float:
    """The mean L2 norm at the end; infinite if a run has diverged."""
    return fmean(math.inf if row["l2_norm"] is None else row["l2_norm"] for row in rows)


def steps_to_accuracy(row: Row) -> float:
    """The step of test accuracy 1, infinite for a run that is censored."""
    return math.inf if row["step"] is None else float(row["step"])


# The runs --------------------------------------------------------------------------------------------------


def name_of(job: Job) -> str:
    """The name of a run's directory and of the file of its row."""
    task, arm, weight, seed = job
    return "-".join([task, arm + ("" if weight is None else f"{weight!r}"), f"seed{seed}"])


def row_file(folder: Path, job: Job) -> Path:
    return folder / "rows" / f"{name_of(job)}.json"


def rows_of(folder: Path, jobs: Iterable[Job]) -> list[Row]:
    """The rows of finished runs.

    Raises:
        ValueError: a row is missing or damaged.
    """
    rows = []
    for job in jobs:
        row = read_json(row_file(folder, job))
        if list(row) != list(COLUMNS) or (row["task"], row["arm"], row["seed"]) != (job[0], job[1], job[3]):
            raise ValueError(
                f"out: cannot read {row_file(folder, job)}: it is not a row of this run; delete it"
            )
        rows.append(row)
    return rows


def _do(folder: Path, settings: Interventions, work: Sequence[Job], jobs: int, bar: Any) -> None:
    before = bar.n if bar is not None else 0
    do_all(do, [(folder, settings, *job) for job in work], jobs, partial(_show, folder, work, bar, before))
    _show(folder, work, bar, before)


def _show(folder: Path, work: Sequence[Job], bar: Any, before: int) -> None:
    move(bar, before + sum(row_file(folder, job).exists() for job in work))


@torch_threads(1)
def do(folder: Path, settings: Interventions, task: str, arm: str, weight: float | None, seed: int) -> None:
    """Trains one run to its end, measures it there and writes its row. Of its checkpoints the last is kept.

    Raises:
        ValueError: files are damaged; the message names them.
    """
    job = task, arm, weight, seed
    path, config = folder / "runs" / name_of(job), settings.config(task, arm, weight, seed)
    if row_file(folder, job).exists():
        return
    row: Row = dict.fromkeys(COLUMNS)
    row |= {
        "task": task,
        "arm": arm,
        "weight": weight if arm in PENALISED else None,
        "seed": seed,
        "source": "run",
    }
    row |= {"weight_decay": config.weight_decay, "seeds": "tuning" if seed in settings.tuning else "reported"}
    try:
        train_or_say(config, path)
    except FloatingPointError:  # the weight is too large
        row |= {"ended": "diverged"}
    else:
        row |= _at_end(path, settings)
    write_json(row_file(folder, job), row)
    for step in steps_of(path)[:-1]:
        checkpoint_of(path, step).unlink()


def _at_end(path: Path, settings: Interventions) -> Row:
    """The numbers of a finished run."""
    run = read_run(path)
    last = run.rows[-1]
    task, model = start(run.config)
    load_checkpoint(model, path, last["step"])
    f, x = cut(model, LAYER, task.train_inputs)
    names = ("curvature", "pooled_curvature")
    found = measure(f, x, points=settings.points, rule=settings.rule, observables=names)
    return {
        "ended": "horizon" if run.generalised is None else "accurate",
        "step": run.generalised,
        "last_step": last["step"],
        **{name: last[name] for name in NUMBERS if name in last},
        "lmn": found.lmn,
        **{name: found.observables[name] for name in names},
    }


# The runs of an earlier study --------------------------------------------------------------------------------


def baseline(
    file: Path, tasks: Iterable[str], seeds: int, settings: Interventions
) -> dict[tuple[str, int], Row]:
    """Rows of the arm "none" from the table of a study, by task and seed.

    Raises:
        ValueError: the file is no such table, has other settings, or lacks steps.
    """
    try:
        table = [row for row in history(file) if row.get("layer") == LAYER and {"task", "seed"} <= set(row)]
    except (ValueError, OSError) as error:
        raise ValueError(f"results: {str(error).removeprefix('path: ')}") from None
    found = {}
    for task in tasks:
        for seed in range(seeds):
            rows = [row for row in table if (row["task"], row["seed"]) == (task, seed)]
            found[task, seed] = _ended(rows, file, task, seed, settings)
    return found


def _ended(rows: Sequence[Row], file: Path, task: str, seed: int, settings: Interventions) -> Row:
    """The row of a run of a study at its first accurate step, or at the horizon."""
    by_step = {row["step"]: row for row in rows}
    last: Row = {}
    for step in range(0, settings.horizons[task] + 1, settings.every):
        if step not in by_step:
            raise ValueError(
                f"results: {file} lacks step {step} of {task}, seed {seed}; without it the runs are made anew"
            )
        last = by_step[step]
        if last["test_accuracy"] == 1:
            break
    if (last["points"], last["rule"]) != (settings.points, settings.rule):
        raise ValueError(
            f"results: expected numbers at {settings.points} {settings.rule} points, got {last['points']} {last['rule']} in "
            f"{file}"
        )
    accurate = last["test_accuracy"] == 1
    config = settings.config(task, "none", None, seed)
    return {
        **dict.fromkeys(COLUMNS), "task": task, "arm": "none", "weight_decay": config.weight_decay, "seed": seed,
        "seeds": "reported", "source": file.name, "ended": "accurate" if accurate else "horizon",
        "step": last["step"] if accurate else None, "last_step": last["step"],
        **{name: last[name] for name in NUMBERS},
    }  # fmt: skip


def _with_baseline(rows: Sequence[Row], known: Mapping[tuple[str, int], Row], file: Path | None) -> list[Row]:
    """The rows, with those of the earlier study that were not run. A row that was run must have its numbers."""
    own = {(row["task"], row["seed"]): row for row in rows if row["arm"] == "none"}
    for key in known.keys() & own.keys():
        for name in ("step", "last_step", *NUMBERS):
            there, here = known[key][name], own[key][name]
            if there != here and not (there and here and math.isclose(there, here, rel_tol=SAME)):
                raise ValueError(
                    f"results: {file} has the {name} {there} for {key[0]}, seed {key[1]}, and a run here {here}; without it "
                    "the runs are made anew"
                )
    return [*rows, *(row for key, row in known.items() if key not in own)]


# The table ---------------------------------------------------------------------------------------------------


def write_results(path: Path, rows: Iterable[Row]) -> None:
    """Writes all rows as a compressed table, with the same bytes for the same rows."""
    lines = [csv_line(COLUMNS), *(csv_line(_written(row[name]) for name in COLUMNS) for row in rows)]
    write_file(path, gzip.compress(b"".join(lines), mtime=0))


def _written(value: Any) -> Any:
    return "" if value is None else f"{value:.7g}" if isinstance(value, float) else value


def read_results(path: Path) -> list[Row]:
    """The rows of a table of `write_results`.

    Raises:
        ValueError: the file is damaged.
    """
    rows = history(path)
    if rows and list(rows[0]) != list(COLUMNS):
        raise ValueError(f"out: cannot read {path}: it is no table of interventions")
    return rows


def read_settings(folder: Path) -> Interventions:
    """The settings of the work in a folder.

    Raises:
        ValueError: study.json is missing or damaged.
    """
    try:
        return Interventions(**read_json(folder / "study.json"))
    except TypeError as error:
        raise ValueError(f"out: cannot read {folder / 'study.json'}: {error}") from None
