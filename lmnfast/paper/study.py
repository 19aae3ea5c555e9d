"""The paper's experiment over many seeds (arXiv 2310.05918), and the numbers that answer further questions.

A study is a directory. study.json has its settings. runs/ has a run of `train` for every task and seed, and the shorter runs
that two of the questions need. answers/ has a table for every task and seed. If a study is stopped, all of these can be
continued. `report` makes the tables, figures and verdicts from a study.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..cutting import cut
from ..grokking.config import Config, start
from ..grokking.run import Run, load_checkpoint, read_config, read_run
from ..grokking.tasks import TASKS
from ..grokking.training import train
from ..jacobian import linear_regions
from ..runs.device import torch_threads
from ..runs.files import claimed, write_json
from ..runs.pool import Pool
from ..runs.progress import progress_bar
from ..runs.tables import check_continues, read_table, write_table
from ..spectrum import SETTINGS, SHARES, Measurement, measure

LAYER = "hidden_1"  # the paper measures at this layer
# Each of the remaining two layers is one Linear away from LAYER or one of these. A Linear does not change LMN.
OTHER_LAYERS = ("embedding", "hidden_2")
STAND_INS = ("hermite", "hermite-midpoint", "jacobian")
RULES = (("lobatto", 7), ("lobatto", 9), ("uniform", 5), ("uniform", 11), ("uniform", 51), ("uniform", 101))
SIZES = (100, 200, 300, 400, 500, 600, 700, 800, 900)  # and all pairs
COLUMNS = ("question", "variant", "step", "layer", "value", *SETTINGS, *SHARES)
OPTIONAL = tuple(name for name in COLUMNS if name not in ("step", "samples", "value"))
# The range of 6 seeds contains the median in 97 % of draws, the range of 5 seeds only in 94 %. So fewer than 6 seeds do not
# have a 95 % interval.
FEWEST_FOR_INTERVAL, FEWEST_FOR_VERDICT = 6, 4


@dataclass(frozen=True)
class Study:
    """The settings of a study, apart from its tasks and seeds. The defaults are the paper's."""

    steps: int = 20_000
    every: int = 100
    milestones: tuple[int, ...] = (0, 200, 400, 700, 1000, 1500, *range(2000, 20_001, 1000))
    """Steps at which the other layers, other samples and stand-ins are measured."""
    few: tuple[int, ...] = (0, 400, 4000, 20_000)
    """Steps of the measurements that take long: other nodes, other numbers of samples."""
    init_steps: int = 1000
    relu_steps: int = 5000
    relu_every: int = 250

    def config(self, task: str, seed: int, **changes: Any) -> Config:
        given = {"steps": self.steps, "every": self.every, "seed": seed, "threads": 1, **changes}
        return Config(task, layers=(LAYER,), **given)


QUICK = Study(
    steps=1000,
    milestones=(0, 400, 1000),
    few=(400,),
    init_steps=400,
    relu_steps=500,
    relu_every=100,
)


def run_study(
    out: Path, tasks: tuple[str, ...], seeds: int, jobs: int, study: Study, *, progress: bool = False
) -> None:
    """Runs the missing parts of a study, in `jobs` processes with one thread each.

    Args:
        out: the study's directory, which is made if it does not exist. Other tasks and more seeds are added to an existing
            study.
        tasks: some of TASKS.
        seeds: number of seeds, which begin at 0.
        jobs: number of processes. With 1, this process does the work, on the GPU if there is one.
        study: the settings of the study.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: a wrong argument; another process is at work in `out`; `out` holds another study, or something else;
            damaged runs (the message names all of them, after the others are done).
        OSError: `out` cannot be written; processes died again and again.
    """
    if not tasks or (unknown := [task for task in tasks if task not in TASKS]):
        raise ValueError(
            f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(unknown) if tasks else 'none'}"
        )
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    with claimed(out):
        _check_continues(out, study)
        write_json(out / "study.json", asdict(study))
        work = [(out, study, task, seed) for seed in range(seeds) for task in sorted(tasks, key=_cost)]
        with progress_bar(_total(study) * len(work), 0, progress) as bar:
            _run(work, min(jobs, len(work)), bar)


def _cost(task: str) -> int:
    """A key for sorting tasks. Tasks that take long come first, so that all processes end at about the same time."""
    return ("xor", "modular-addition", "s4").index(task)


def _check_continues(out: Path, study: Study) -> None:
    file = out / "study.json"
    if not file.exists():
        if strange := [item.name for item in out.iterdir() if item.name != ".lock"]:
            raise ValueError(f"out: {out} is not empty and is not a study: it holds {sorted(strange)[0]}")
        return
    try:
        stored = {
            name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(file.read_text()).items()
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"out: cannot read {file}: {error}") from None
    check_continues(out, "another study", stored, asdict(study), most=1)


# Processes -------------------------------------------------------------------------------------------------


Job = tuple[Path, Study, str, int]  # directory, settings, task, seed


def _run(work: list[Job], processes: int, bar: Any) -> None:
    """Does all jobs. A ValueError concerns only one run, so all ValueErrors are raised together, after all jobs are done."""
    failures: list[Exception] = []

    def show() -> None:
        if bar:
            _show(bar, work)

    if processes == 1:
        for job in work:
            try:
                do(*job)
            except ValueError as error:
                failures.append(error)
            show()
    else:
        with Pool(processes) as pool:
            for outcome in pool.outcomes(do, work, show):
                if isinstance(outcome.error, ValueError):
                    failures.append(outcome.error)
                elif outcome.error is not None:
                    raise outcome.error
    if failures:
        raise ValueError("; ".join(dict.fromkeys(map(str, failures))))


def _total(study: Study) -> int:
    """The bar's total for a task and seed: the measured steps of its runs, and the milestones."""
    runs = (
        study.steps // study.every
        + study.init_steps // study.every
        + study.relu_steps // study.relu_every
        + 3
    )
    return runs + len(study.milestones)


def _show(bar: Any, work: list[Job]) -> None:
    """Sets the bar from the files on disk, because any process may have written them."""
    done, at_work = 0, []
    for out, study, task, seed in work:
        paths = [path / "metrics.csv" for path in _runs(out, task, seed)]
        counts = [_lines(path) for path in paths]
        answers = _answers_file(out, task, seed)
        counts.append(_milestones(answers))
        done += sum(counts)
        if 0 < sum(counts) < _total(study):
            at_work.append(f"{task} {seed}")
    bar.set_postfix_str(", ".join(at_work), refresh=False)
    bar.update(done - bar.n)


def _milestones(answers: Path) -> int:
    try:
        return len({row["step"] for row in read_answers(answers) if row["question"] == "samples"})
    except ValueError:  # the worker reports this error
        return 0


def _lines(path: Path) -> int:
    try:
        return max(0, path.read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


# One task and seed -----------------------------------------------------------------------------------------


def run_path(out: Path, task: str, seed: int, kind: str = "") -> Path:
    """The run's directory; kind: "", "lecun-first" or "relu"."""
    return out / "runs" / "-".join(filter(None, (task, kind, f"seed{seed}")))


def _runs(out: Path, task: str, seed: int) -> list[Path]:
    return [run_path(out, task, seed, kind) for kind in ("", "lecun-first", "relu")]


def _answers_file(out: Path, task: str, seed: int) -> Path:
    return out / "answers" / f"{task}-seed{seed}.csv"


@torch_threads(1)
def do(out: Path, study: Study, task: str, seed: int) -> None:
    """Does all missing work for one task and seed.

    Raises:
        ValueError: files are damaged; the message names them.
    """
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"init": "lecun-first", "steps": study.init_steps},
        {"activation": "relu", "steps": study.relu_steps, "every": study.relu_every},
    )
    for path, change in zip(_runs(out, task, seed), changes, strict=True):
        try:
            train(study.config(task, seed, **change), path)
        except ValueError as error:
            raise ValueError(f"{error}; to run it again, delete {path} and repeat the command") from None
    main, _, relu = _runs(out, task, seed)
    answers = _answers_file(out, task, seed)
    rows = read_answers(answers)
    known = {row["step"] for row in rows if row["question"] == "samples"}
    for step, tails in _tails(main, [step for step in study.milestones if step not in known]):
        begin = time.perf_counter()
        rows += _at_milestone(step, tails)
        if step in study.few:
            rows += _at_few(step, tails)
        rows.append(_row("seconds", "", step, "", 0, time.perf_counter() - begin))
        write_table(answers, COLUMNS, rows)
    if not any(row["question"] == "regions" for row in rows):
        for step, tails in _tails(relu, range(0, study.relu_steps + 1, study.relu_every)):
            f, x = tails(LAYER)[:2]
            rows.append(_row("regions", "relu", step, LAYER, len(x), linear_regions(f, x)))
        write_table(answers, COLUMNS, rows)


# A function from a layer to the tail, its training samples and its test samples.
Tails = Callable[[str], tuple[nn.Module, Tensor, Tensor]]


def _tails(run: Path, steps: Iterable[int]) -> Iterator[tuple[int, Tails]]:
    task, model = start(read_config(run))

    def tails(layer: str) -> tuple[nn.Module, Tensor, Tensor]:
        f, samples = cut(model, layer, torch.cat([task.train_inputs, task.test_inputs]))
        train_samples, test_samples = samples.tensor_split([len(task.train_inputs)])
        return f, train_samples, test_samples

    for step in steps:
        load_checkpoint(model, run, step)
        yield step, tails


def _row(
    question: str, variant: str, step: int, layer: str, m: Measurement | int, value: float | None = None
) -> dict:
    """A row of answers.

    Args:
        question: one of the report's questions.
        variant: of the question.
        step: of the run.
        layer: the layer at which the network is cut.
        m: the measurement, or only its number of samples.
        value: the answer; None: the measurement's LMN.
    """
    said = {"question": question, "variant": variant, "step": step, "layer": layer, "value": value}
    if isinstance(m, Measurement):
        said |= {name: getattr(m, name) for name in (*SETTINGS, *SHARES)}
        said["value"] = m.lmn if value is None else value
    else:
        said["samples"] = m
    return {**dict.fromkeys(COLUMNS, ""), **said}


def _at_milestone(step: int, tails: Tails) -> list[dict]:
    f, train_samples, test_samples = tails(LAYER)
    n = len(train_samples)
    m = measure(f, train_samples)
    clipped = 2 ** ops.spectral_entropy(m.eigenvalues.clamp(min=0)).item()
    everywhere = torch.cat([train_samples, test_samples])
    small = train_samples[: len(test_samples)]
    rows = [
        _row("samples", "train", step, LAYER, m),
        _row("samples", "test", step, LAYER, measure(f, test_samples)),
        _row("samples", "train, as many as test", step, LAYER, measure(f, small)),
        _row("samples", "both", step, LAYER, measure(f, everywhere)),
        _row("negative", "clipped", step, LAYER, replace(m, negative="clip"), clipped),
        _row("negative", "share", step, LAYER, m, m.negative_share),
        _row("entries", "mean", step, LAYER, m, ((m.connectivity.double().sum() - n) / (n * (n - 1))).item()),
    ]
    rows += [_row("stand-ins", how, step, LAYER, measure(f, train_samples, method=how)) for how in STAND_INS]
    for layer in OTHER_LAYERS:
        g, x, _ = tails(layer)
        rows.append(_row("layers", "path", step, layer, measure(g, x)))
    return rows


def _at_few(step: int, tails: Tails) -> list[dict]:
    f, train_samples, test_samples = tails(LAYER)
    rows = [
        _row("nodes", f"{rule} {k}", step, LAYER, measure(f, train_samples, rule=rule, points=k))
        for rule, k in RULES
    ]
    pairs = torch.cat([train_samples, test_samples])
    # The sub-samples are nested: each is the beginning of one random order.
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    sizes = [*(size for size in SIZES if size < len(pairs)), len(pairs)]
    return rows + [_row("number", "random", step, LAYER, measure(f, pairs[:size])) for size in sizes]


@dataclass(frozen=True)
class Seed:
    """The content of a study for a task and a seed: its run, the runs with another initialisation and with ReLU, its
    answers."""

    run: Run
    lecun: Run
    relu: Run
    answers: list[dict]

    def answer(self, question: str, variant: str | None = None, layer: str | None = None) -> dict[int, float]:
        """The values of a question, by step."""
        return {
            row["step"]: row["value"]
            for row in self.answers
            if row["question"] == question
            and (variant is None or row["variant"] == variant)
            and (layer is None or row["layer"] == layer)
        }

    def lmn(self, layer: str) -> dict[int, float]:
        """LMN of the training samples at a layer, at the milestones, by step."""
        return self.answer("samples", "train") if layer == LAYER else self.answer("layers", layer=layer)

    def lmn_of_sizes(self, step: int) -> dict[int, float]:
        """LMN of random samples, by the number of samples; empty if the step has no such values."""
        return {
            row["samples"]: row["value"]
            for row in self.answers
            if row["question"] == "number" and row["step"] == step
        }


def read_study(out: Path, tasks: Iterable[str], seeds: int) -> dict[str, list[Seed]]:
    """The seeds of a study, by task.

    Raises:
        ValueError: a run or a table is missing or damaged.
    """
    return {
        task: [
            Seed(*_three_runs(out, task, seed), read_answers(_answers_file(out, task, seed)))
            for seed in range(seeds)
        ]
        for task in tasks
    }


def _three_runs(out: Path, task: str, seed: int) -> tuple[Run, Run, Run]:
    main, lecun, relu = map(read_run, _runs(out, task, seed))
    return main, lecun, relu


# Files -----------------------------------------------------------------------------------------------------


def read_answers(path: Path) -> list[dict]:
    """The rows of a table of answers; an empty list if there is no table.

    Raises:
        ValueError: the table is damaged.
    """
    if not path.exists():
        return []
    try:
        return read_table(path, COLUMNS, optional=OPTIONAL)
    except ValueError:
        raise ValueError(
            f"out: cannot read {path}; delete it to make it again (it is damaged, or from another version of lmnfast)"
        ) from None
