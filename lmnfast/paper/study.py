"""The paper's experiment over many seeds (arXiv 2310.05918), and the numbers that answer further questions.

A study is a directory. study.json has its settings. runs/ has a run of `train` for every task and seed, and the shorter runs
that two of the questions need. answers/ has a table for every task and seed. If a study is stopped, all of these can be
continued. `report` makes the tables, figures and verdicts from a study.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..grokking.choices import TASKS
from ..grokking.config import Config
from ..grokking.run import Run, read_run
from ..grokking.together import train_together
from ..grokking.training import train
from ..runs.device import settled_device, torch_threads
from ..runs.files import claimed, write_json
from ..runs.pool import Pool
from ..runs.progress import progress_bar
from ..runs.tables import check_continues
from .answers import Answers, read_answers
from .settings import INTERVENTIONS, LAYER, Study


def run_study(
    out: Path, tasks: tuple[str, ...], seeds: int, jobs: int, study: Study, *, progress: bool = False
) -> None:
    """Runs the missing parts of a study, in `jobs` processes with one thread each. One process with a GPU trains all seeds of a
    task together, and then answers the questions of one after the other.

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
    check_arguments(tasks, seeds, jobs)
    with claimed(out):
        _check_continues(out, study)
        write_json(out / "study.json", asdict(study))
        work = [(out, study, task, seed) for seed in range(seeds) for task in sorted(tasks, key=_cost)]
        with progress_bar(sum(_total(study, job[-1]) for job in work), 0, progress) as bar:
            if jobs == 1 and settled_device("auto") == "cuda":
                for task in sorted(tasks, key=_cost):
                    train_seeds(out, study, task, seeds, lambda: _show(bar, work))
            do_all(do, work, jobs, lambda: _show(bar, work))


def check_arguments(tasks: Sequence[str], seeds: int, jobs: int) -> None:
    """Raises ValueError, which names the argument, for unknown tasks and numbers below 1."""
    if not tasks or (unknown := [task for task in tasks if task not in TASKS]):
        raise ValueError(
            f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(unknown) if tasks else 'none'}"
        )
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _cost(task: str) -> int:
    """A key for sorting tasks. Tasks that take long come first, so that all processes end at about the same time."""
    return ("xor", "modular-addition", "s4").index(task)


def _check_continues(out: Path, study: Study) -> None:
    file = out / "study.json"
    if not file.exists():
        if strange := [item.name for item in out.iterdir() if item.name not in (".lock", INTERVENTIONS)]:
            raise ValueError(f"out: {out} is not empty and is not a study: it holds {sorted(strange)[0]}")
        return
    try:
        stored = {
            name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(file.read_text()).items()
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"out: cannot read {file}: {error}") from None
    if differing := sorted(stored.keys() ^ asdict(study).keys()):
        raise ValueError(
            f"out: {out} holds a study of another version of lmnfast, with other settings ({', '.join(differing)}); "
            "choose another --out"
        )
    check_continues(out, "another study", stored, asdict(study), most=1)


# Processes -------------------------------------------------------------------------------------------------


Job = tuple[Path, Study, str, int]  # directory, settings, task, seed


def do_all(
    function: Callable[..., None], work: Sequence[tuple[Any, ...]], processes: int, show: Callable[[], None]
) -> None:
    """Calls the function once per job. A ValueError concerns only one run, so all ValueErrors are raised together, after all
    jobs are done.

    Args:
        function: a function that processes can import.
        work: the arguments of each call.
        processes: number of processes. With 1, this process does the work.
        show: a function that is called now and then meanwhile.
    """
    failures: list[Exception] = []
    if min(processes, len(work)) <= 1:
        for job in work:
            try:
                function(*job)
            except ValueError as error:
                failures.append(error)
            show()
    else:
        with Pool(min(processes, len(work))) as pool:
            for outcome in pool.outcomes(function, work, show):
                if isinstance(outcome.error, ValueError):
                    failures.append(outcome.error)
                elif outcome.error is not None:
                    raise outcome.error
    if failures:
        raise ValueError("; ".join(dict.fromkeys(map(str, failures))))


def _total(study: Study, seed: int) -> int:
    """The bar's total for a task and seed: the measured steps of its runs, and the milestones."""
    total = study.steps // study.every + 1
    if seed < study.asked:
        total += study.relu_steps // study.relu_every + 1 + len(study.milestones)
    return total


def _show(bar: Any, work: list[Job]) -> None:
    """Sets the bar, if there is one, from the files on disk, because any process may have written them."""
    if bar is None:
        return
    done, at_work = 0, []
    for out, study, task, seed in work:
        counts = [_lines(run_path(out, task, seed, kind) / "metrics.csv") for kind in ("", "relu")]
        counts.append(_milestones(_answers_file(out, task, seed)))
        done += sum(counts)
        if 0 < sum(counts) < _total(study, seed):
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
    """The run's directory; kind: "" or "relu"."""
    return out / "runs" / "-".join(filter(None, (task, kind, f"seed{seed}")))


def _answers_file(out: Path, task: str, seed: int) -> Path:
    return out / "answers" / f"{task}-seed{seed}.csv"


@torch_threads(1)
def do(out: Path, study: Study, task: str, seed: int) -> None:
    """Does all missing work for one task and seed.

    Raises:
        ValueError: files are damaged; the message names them.
    """
    main, relu = run_path(out, task, seed), run_path(out, task, seed, "relu")
    train_or_say(study.config(task, seed), main)
    answers = Answers(_answers_file(out, task, seed), main, {"points": study.points, "rule": study.rule})
    answers.at_start()
    if task == "xor":
        answers.maps()
    if seed < study.asked:
        answers.outputs()
        answers.at_milestones(study.milestones, study.few)
        train_or_say(study.relu_config(task, seed), relu)
        answers.regions(relu, range(0, study.relu_steps + 1, study.relu_every))


def train_seeds(out: Path, study: Study, task: str, seeds: int, meanwhile: Callable[[], None]) -> None:
    """Trains the runs of a task that `do` would train one after the other, all seeds together. What it leaves out because a run
    cannot be continued, `do` reports."""
    runs = (study.config, "", seeds), (study.relu_config, "relu", min(seeds, study.asked))
    for config_of, kind, count in runs:
        train_together(
            [config_of(task, seed) for seed in range(count)],
            [run_path(out, task, seed, kind) for seed in range(count)],
            meanwhile,
        )


def train_or_say(config: Config, path: Path) -> None:
    """`train`. An error says what to do with a damaged run."""
    try:
        train(config, path)
    except ValueError as error:
        raise ValueError(f"{error}; to run it again, delete {path} and repeat the command") from None


@dataclass(frozen=True)
class Seed:
    """The content of a study for a task and a seed: its run, its answers, and the run with ReLU if the questions are asked of
    this seed."""

    run: Run
    relu: Run | None
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
        """LMN of the training samples at a layer, at the milestones, by step; of LAYER by 21 points."""
        if layer == LAYER:
            return self.answer("samples", "train")
        return self.answer("layers", "exact", layer)

    @property
    def seconds(self) -> float:
        """The time of all answers but the regions of ReLU."""
        return sum(row["value"] for row in self.answers if row["question"] == "seconds")

    def of_sizes(self, step: int, question: str = "number") -> dict[int, float]:
        """LMN of random samples, by the number of samples; empty if the step has no such values. question: "number", or
        "number, curvature" for the pooled curvature."""
        return {
            row["samples"]: row["value"]
            for row in self.answers
            if row["question"] == question and row["step"] == step
        }


def read_study(out: Path, tasks: Iterable[str], seeds: int, study: Study) -> dict[str, list[Seed]]:
    """The seeds of a study, by task.

    Raises:
        ValueError: a run or a table is missing or damaged.
    """
    return {task: [_read_seed(out, task, seed, study) for seed in range(seeds)] for task in tasks}


def _read_seed(out: Path, task: str, seed: int, study: Study) -> Seed:
    relu = read_run(run_path(out, task, seed, "relu")) if seed < study.asked else None
    return Seed(read_run(run_path(out, task, seed)), relu, read_answers(_answers_file(out, task, seed)))
