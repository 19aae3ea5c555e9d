"""The paper's training (arXiv 2310.05918, section 3), its linear mapping number, and the run it leaves.

A run is a directory: config.json; metrics.csv, one row for every measured step, where row s is the network
after s updates; checkpoints/, the weights at those steps; state.pt, from where to go on; figures/. Every file
is written under another name and then renamed, and state.pt only once all rows up to it are in metrics.csv:
so a run killed at any moment continues, and ends in the same metrics.csv, byte for byte, as one never killed.
"""

import csv
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..connectivity import METHODS
from ..files import claimed, write_file
from ..probe import Probe
from ..quadrature import path_nodes
from ..spectrum import SETTINGS, SHARES, check_negative
from .gradients import Gradients
from .model import ACTIVATIONS, INITS, LAYERS, make_model
from .tasks import Task, make_task, task_sizes

METRICS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "l2_norm")
INTEGERS = ("step", "samples", "outputs", "points")
WORDS = tuple(name for name in SETTINGS if name not in INTEGERS)  # the other columns hold floats
LEFT_BEHIND = ("metrics.csv", "state.pt", "checkpoints", "figures")


@dataclass(frozen=True)
class Config:
    """What determines a run; the defaults are the paper's. ValueError for anything that no run can have."""

    task: str
    p: int | None = None
    bits: int | None = None
    steps: int = 20_000
    every: int = 100
    seed: int = 0
    layers: tuple[str, ...] = ("hidden_1",)
    points: int = 21
    rule: str = "uniform"
    method: str = "path"
    negative: str = "absolute"
    init: str = "default"
    activation: str = "silu"
    device: str = "auto"
    """"auto" is the device the run was started on; for a new run "cuda" if there is one, else "cpu"."""
    threads: int | None = None
    """None is the number the run was started with; for a new run torch's. Sums differ in their last bits."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.2

    def __post_init__(self) -> None:
        sizes = task_sizes(self.task, p=self.p, bits=self.bits)
        object.__setattr__(self, "p", sizes.get("p"))
        object.__setattr__(self, "bits", sizes.get("bits"))
        object.__setattr__(self, "layers", tuple(self.layers))
        for name, smallest in (("steps", 0), ("every", 1), ("seed", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
        if self.steps % self.every:
            raise ValueError(f"steps: expected a multiple of every ({self.every}), got {self.steps}")
        unknown = [layer for layer in self.layers if layer not in LAYERS]
        if unknown or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"layers: expected some of {', '.join(LAYERS)}, each once, got {', '.join(self.layers)}"
            )
        object.__setattr__(self, "points", len(path_nodes(self.rule, self.points)[0]))
        check_negative(self.negative)
        for name, known in (("method", METHODS), ("init", INITS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device: expected auto, cpu or cuda, got {self.device!r}")

    def settled(self) -> "Config":
        """This machine's device and threads where they are left open; ValueError for a missing device."""
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise ValueError("device: cuda is not available")
        device = ("cuda" if cuda else "cpu") if self.device == "auto" else self.device
        return replace(self, device=device, threads=self.threads or torch.get_num_threads())


@dataclass(frozen=True)
class Run:
    """A run as read back: the rows of metrics.csv, and the seconds spent in "training" and "measuring"."""

    path: Path
    config: Config
    rows: list[dict]
    seconds: dict[str, float]

    @property
    def memorised(self) -> int | None:
        """First measured step with train accuracy 1."""
        return next((row["step"] for row in self.rows if row["train_accuracy"] == 1), None)

    @property
    def generalised(self) -> int | None:
        """First measured step with test accuracy 1."""
        return next((row["step"] for row in self.rows if row["test_accuracy"] == 1), None)

    def phase(self, row: dict) -> str:
        """memorising until train accuracy is 1, generalising until test accuracy is 1, then finalising."""
        if self.generalised is not None and row["step"] >= self.generalised:
            return "finalising"
        return "memorising" if self.memorised is None or row["step"] < self.memorised else "generalising"

    def correlation(self, column: str) -> float:
        """Pearson's r of a column with the test loss while generalising; NaN for less than 3 rows."""
        rows = [row for row in self.rows if self.phase(row) == "generalising"]
        return pearson([(row["test_loss"], row[column]) for row in rows])


def pearson(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's r; NaN for less than 3 pairs, or where one of the two is constant."""
    if len(pairs) < 3 or min(len(set(series)) for series in zip(*pairs)) == 1:
        return float("nan")
    return torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1].item()


def train(config: Config, out: str | os.PathLike, *, force: bool = False, progress: bool = False) -> Run:
    """Trains and measures, or continues the run in `out` where it stopped, or finds it finished.

    A run with fewer steps than asked for is continued. On the CPU the same config, machine and versions give
    the same metrics.csv, byte for byte, however often the run was stopped.

    Args:
        config: of the run.
        out: its directory; made if it does not exist.
        force: delete the run that is there, whatever its config, and start anew.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: no such device; another process is at work in `out`; `out` holds a run with another config
            (the message names the differences), or an incomplete one.
        OSError: `out` cannot be written.
        FloatingPointError: a loss is NaN or infinite.
    """
    path = Path(out)
    with claimed(path):
        stored = read_config(path) if (path / "config.json").exists() and not force else None
        if stored is None:
            _clear(path, force)
        else:
            config = replace(
                config,
                device=stored.device if config.device == "auto" else config.device,
                threads=config.threads or stored.threads,
            )
        config = config.settled()
        if stored is not None:
            _check_continues(config, stored, path)
        write_file(path / "config.json", json.dumps(asdict(config), indent=2).encode() + b"\n")
        with torch_threads(config.threads):
            _Training(config, path).run(progress)
    return read_run(path)


class _Training:
    """A run at work. What `measure` starts, `write` writes once the probe's thread has solved it."""

    def __init__(self, config: Config, path: Path) -> None:
        self.config, self.path = config, path
        self.task, self.model = start(config)
        self.gradients = Gradients(self.model, self.task.train_inputs, self.task.train_labels)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.step = -1  # the last one measured
        self.rows: list[dict] = []
        self.seconds = {"training": 0.0, "measuring": 0.0}
        if (path / "state.pt").exists():
            self._resume()
        self.unwritten = 0
        self.clock = time.perf_counter()

    def _resume(self) -> None:
        file, metrics = self.path / "state.pt", self.path / "metrics.csv"
        try:
            state = torch.load(file, map_location=self.config.device, weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            file = metrics
            written = _read_csv(metrics) if metrics.exists() else []
        except OSError:
            raise
        except Exception as error:  # a damaged file raises anything
            raise ValueError(
                f"out: cannot read {file}, {type(error).__name__}; --force starts the run anew"
            ) from None
        _check_columns("out", self.path, written, self.config)
        self.rows = [row for row in written if row["step"] <= self.step]
        if [row["step"] for row in self.rows] != list(range(0, self.step + 1, self.config.every)):
            raise ValueError(f"out: {metrics} lacks rows that it had; --force starts the run anew")

    def _update(self) -> None:
        self.gradients()
        self.optimiser.step()

    def _captured(self) -> Callable[[], None]:
        """The update as one CUDA graph, launched as a whole."""

        def set_capturable(value: bool) -> None:  # true only for the capture: a step outside of one warns
            for group in self.optimiser.param_groups:
                group["capturable"] = value

        set_capturable(False)
        stream = torch.cuda.Stream()  # one for both, as autograd remembers where it accumulates gradients
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _warm_up(self._update, self.model, self.optimiser)
        torch.cuda.current_stream().wait_stream(stream)
        set_capturable(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._update()
        return graph.replay

    def run(self, progress: bool) -> None:
        config, task = self.config, self.task
        if progress and self.step >= 0:
            how = "finished at" if self.step == config.steps else "continues after"
            print(f"{self.path}: {how} step {self.step}")
        if self.step == config.steps:
            return
        # Before the probe's thread is there: a capture does not stand other threads' calls of CUDA.
        update = self._captured() if config.device == "cuda" else self._update
        with (
            _probe(self.model, task.train_inputs, config, config.every) as self.probe,
            progress_bar(config.steps, max(self.step, 0), progress) as self.bar,
        ):
            if self.step < 0:
                self.measure(0)
            for step in range(max(self.step, 0) + 1, config.steps + 1):
                update()
                if self.bar:
                    self.bar.update()
                if step % config.every == 0:
                    self.measure(step)
                elif self.unwritten and not self.probe.pending:
                    self.write()
            self.write()

    def measure(self, step: int) -> None:
        metrics = _evaluate(self.model, self.task)
        for name, value in metrics.items():
            if not abs(value) < float("inf"):
                raise FloatingPointError(f"training diverged: {name} is {value} at step {step}")
        self.tick("training")
        self.probe(step, **metrics)
        self.tick("measuring")
        save_tensors(checkpoint_of(self.path, step), self.model.state_dict())
        snapshot = {"step": step, "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        self.state = deepcopy(snapshot)
        self.unwritten += 1
        if self.unwritten > 4:  # solving is slower than training from one to the next: bound what waits
            self.write()

    def write(self) -> None:
        self.tick("training")
        history = self.probe.history  # waits for what is pending
        self.tick("measuring")
        self.rows += _by_step(row for row in history if row["step"] > self.step)
        _write_csv(self.path / "metrics.csv", self.rows, METRICS)
        self.step, self.unwritten = self.state["step"], 0
        save_tensors(self.path / "state.pt", {**self.state, "seconds": self.seconds})
        if self.bar:
            row = self.rows[-1]
            shown = {
                "loss": f"{row['train_loss']:.1e}/{row['test_loss']:.1e}",
                "accuracy": f"{row['train_accuracy']:.2f}/{row['test_accuracy']:.2f}",
                "LMN": "/".join(f"{row[f'lmn_{layer}']:.1f}" for layer in self.config.layers),
            }
            self.bar.set_postfix(shown, refresh=False)

    def tick(self, activity: str) -> None:
        """Counts the time since the last tick for `activity`."""
        now = time.perf_counter()
        self.seconds[activity] += now - self.clock
        self.clock = now


def _warm_up(update: Callable[[], None], model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Runs the update a few times, so that all that it sets up at first is there, and undoes it in place: the
    optimiser's state exists afterwards, and counts as none if there was none."""
    parameters = list(model.parameters())
    before = [
        (p.detach().clone(), {name: value.clone() for name, value in optimiser.state.get(p, {}).items()})
        for p in parameters
    ]
    for _ in range(3):
        update()
    with torch.no_grad():
        for p, (weights, moments) in zip(parameters, before, strict=True):
            p.copy_(weights)
            for name, value in optimiser.state[p].items():
                value.copy_(moments[name] if moments else torch.zeros_like(value))


def measure(
    run: str | os.PathLike,
    *,
    layers: Sequence[str] | None = None,
    points: int | None = None,
    rule: str | None = None,
    method: str | Sequence[str] | None = None,
    negative: str | None = None,
    device: str = "auto",
    every: int = 1,
    progress: bool = False,
) -> tuple[Path, list[dict]]:
    """Measures a run's checkpoints again; what is None stays as it was in the run.

    Args:
        run: the run's directory.
        layers, points, rule, method, negative, device: as in Config; several methods stand side by side.
        every: only steps that are multiples of it.
        progress: show a bar (needs tqdm).

    Returns:
        RUN/measure-LAYERS-METHODS-RULEPOINTS.csv, written, and its rows: the numbers are lmn_LAYER, or with several
        methods lmn_LAYER_METHOD. The name ends in -clip.csv where negative eigenvalues count 0.

    Raises:
        ValueError: not a run, no checkpoint, or as Config.
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
    given = {"layers": layers, "points": points, "rule": rule, "negative": negative}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    configs = [replace(stored, device=device, method=name, **changes).settled() for name in methods]
    config = configs[0]
    steps = [int(file.stem[5:]) for file in sorted(path.glob("checkpoints/step_*.pt"))]
    steps = [step for step in steps if step % every == 0]
    if not steps:
        raise ValueError(f"run: no checkpoints of such steps in {path}")
    task, model = start(config)
    together = "+".join(methods)
    rows: list[dict] = [{} for _ in steps]
    with torch_threads(config.threads), progress_bar(len(steps) * len(methods), 0, progress) as bar:
        for each in configs:
            with _probe(model, task.train_inputs, each, 1) as probe:
                for step in steps:
                    load_checkpoint(model, path, step)
                    probe(step)
                    if bar:
                        bar.update()
                measured = _by_step(probe.history, f"_{each.method}" if len(methods) > 1 else "")
            for row, more in zip(rows, measured, strict=True):
                row.update(more, method=together)
    clip = "" if config.negative == "absolute" else f"-{config.negative}"
    name = f"measure-{'+'.join(config.layers)}-{together}-{config.rule}{config.points}{clip}.csv"
    _write_csv(path / name, rows, ())
    return path / name, rows


def read_run(path: str | os.PathLike) -> Run:
    """The run in a directory. Raises ValueError if there is none."""
    path = Path(path)
    config = read_config(path)
    try:
        rows = _read_csv(path / "metrics.csv")
        seconds = torch.load(path / "state.pt", weights_only=True)["seconds"]
    except FileNotFoundError as error:
        raise ValueError(f"run: {path} has no {Path(error.filename).name} yet") from None
    except OSError:
        raise
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"run: {path} is damaged, {type(error).__name__}: {error}") from None
    _check_columns("run", path, rows, config)
    return Run(path, config, rows, seconds)


def read_config(path: Path) -> Config:
    """The config of the run in a directory. Raises ValueError if there is none."""
    try:
        return Config(**json.loads((path / "config.json").read_text()))
    except FileNotFoundError:
        raise ValueError(f"run: {path} is not a run, it holds no config.json") from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"run: cannot read {path / 'config.json'}: {error}") from None


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08}.pt"


def load_checkpoint(model: nn.Module, run: Path, step: int) -> None:
    """Gives the model the weights that a run had at a step. Raises ValueError for a file that is missing or damaged."""
    file, device = checkpoint_of(run, step), next(model.parameters()).device
    try:
        model.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    except Exception as error:  # a damaged file raises anything
        raise ValueError(
            f"run: cannot read {file}, {type(error).__name__}; delete {run} to run it anew"
        ) from None


def save_tensors(path: Path, content: dict) -> None:
    """torch.save of tensors and plain values, loadable with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def _clear(path: Path, force: bool) -> None:
    """Removes what a run leaves behind, its config last; nothing else, and nothing at all without `force`."""
    there = [path / name for name in LEFT_BEHIND if (path / name).exists()]
    if there and not force:
        raise ValueError(f"out: {path} holds {there[0].name} but no config.json; --force deletes it")
    for item in [*there, *path.glob("measure-*.csv"), path / "config.json"]:
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)


def _check_continues(config: Config, stored: Config, path: Path) -> None:
    old, new = asdict(stored), asdict(config)
    differences = [
        f"{name} is {old[name]} there, {new[name]} here"
        for name in new
        if old[name] != new[name] and not (name == "steps" and new[name] > old[name])
    ]
    if differences:
        raise ValueError(
            f"out: {path} holds another run: {'; '.join(differences)}; "
            "choose another --out, or --force to delete it"
        )


def start(config: Config) -> tuple[Task, nn.Module]:
    """The task and the untrained model, on the device. One generator draws the split, then the weights."""
    generator = torch.Generator().manual_seed(config.seed)
    task = make_task(config.task, generator, p=config.p, bits=config.bits)
    model = make_model(task.vocabulary, generator, init=config.init, activation=config.activation)
    tensors = {
        f.name: getattr(task, f.name).to(config.device) for f in fields(Task) if f.name != "vocabulary"
    }
    return replace(task, **tensors), model.to(config.device)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _probe(model: nn.Module, inputs: Tensor, config: Config, every: int) -> Probe:
    return Probe(
        model,
        inputs,
        config.layers,
        every=every,
        method=config.method,
        points=config.points,
        rule=config.rule,
        negative=config.negative,
    )


@contextmanager
def progress_bar(total: int, initial: int, progress: bool) -> Iterator:
    """A tqdm bar, or None."""
    if not progress:
        yield None
        return
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file gets a few lines
    with tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, mininterval=interval) as bar:
        yield bar


@torch.no_grad()
def _evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """METRICS of the model."""
    train, test = model(task.train_inputs), model(task.test_inputs)
    return {
        "train_loss": cross_entropy(train, task.train_labels).item(),
        "test_loss": cross_entropy(test, task.test_labels).item(),
        "train_accuracy": (train.argmax(1) == task.train_labels).double().mean().item(),
        "test_accuracy": (test.argmax(1) == task.test_labels).double().mean().item(),
        "l2_norm": nn.utils.parameters_to_vector(model.parameters()).double().norm().item(),
    }


def _by_step(history: Iterable[dict], suffix: str = "") -> list[dict]:
    """The probe's rows, one per step and layer, as one per step; the suffix ends the names of what layers differ in."""
    steps: dict[int, dict] = {}
    for row in history:
        one = steps.setdefault(row["step"], dict(row))
        one |= {f"{name}_{row['layer']}{suffix}": row[name] for name in ("lmn", *SHARES)}
        one |= {
            name: "+".join(sorted({*one[name].split("+"), row[name]})) for name in ("precision", "solver")
        }
    return list(steps.values())


def _write_csv(path: Path, rows: list[dict], metrics: Sequence[str]) -> None:
    numbers, *shares = ([n for n in rows[0] if n.startswith(f"{kind}_")] for kind in ("lmn", *SHARES))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = ["step", *metrics, *numbers, *SETTINGS, *shares[0], *shares[1]]
    table.writerow(columns)
    # Seven digits: what float32 holds, and the same again when read back and written.
    table.writerows(
        [f"{row[c]:.7g}" if isinstance(row[c], float) else row[c] for c in columns] for row in rows
    )
    write_file(path, text.getvalue().encode())


def _check_columns(argument: str, path: Path, rows: list[dict], config: Config) -> None:
    """ValueError for rows of metrics.csv that another version of lmnfast wrote, with fewer columns."""
    of_layers = [f"{kind}_{layer}" for kind in ("lmn", *SHARES) for layer in config.layers]
    wanted = ("step", *METRICS, *SETTINGS, *of_layers)
    if rows and (lacking := [name for name in wanted if name not in rows[0]]):
        raise ValueError(
            f"{argument}: {path / 'metrics.csv'} lacks the columns {', '.join(lacking)}, as another version of lmnfast "
            "wrote it; lmnfast grok with --force starts the run anew"
        )


def _read_csv(path: Path) -> list[dict]:
    def typed(name: str, text: str) -> int | str | float:
        return int(text) if name in INTEGERS else text if name in WORDS else float(text)

    with open(path, newline="") as file:
        return [{name: typed(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
