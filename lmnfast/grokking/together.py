"""Trains many seeds of one config as one: stacked weights, one update and one measurement for all, a run on disk for each."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runs.device import torch_threads
from ..runs.files import claimed
from .choices import DEPTH, EMBEDDING
from .config import Config, start
from .gradients import Gradients
from .penalty import LAYER
from .record import MOST_UNWRITTEN, Record, begun
from .stacked import OBSERVED, Networks
from .training import HostCopy, captured, optimiser_of

# Runs at once: each has a locked file, of which a process may have 1024, and more networks would not train faster.
MOST = 256
# What the runs may take of the memory that a card has left. The rest is for workspaces and for fragments.
SHARE = 0.6


def train_together(
    configs: Sequence[Config], paths: Sequence[Path], meanwhile: Callable[[], None] = lambda: None
) -> None:
    """`train` of each config into the directory beside it, in one training for all.

    The runs on disk are those of `train`: each seed has its own split and weights, drawn as there, the same files,
    and the same numbers to rounding. Either function continues what the other has begun. A run that `train` would refuse to
    continue, or that was begun on another device, is left out and left as it is.

    Args:
        configs: equal but for their seeds.
        paths: the runs' directories.
        meanwhile: is called now and then, when rows have been written.

    Raises:
        ValueError: configs that differ in more than their seeds, or that cannot be trained so.
        OSError: a directory cannot be written, or was deleted meanwhile.
        FloatingPointError: a loss is NaN or infinite; the message names the run.
    """
    if not configs:
        return
    if len({replace(config, seed=0) for config in configs}) > 1:
        raise ValueError("configs: expected settings that differ in the seed alone, got others")
    _check(configs[0])
    settled = configs[0].settled()
    assert settled.threads is not None
    with torch_threads(settled.threads):
        work = list(zip(configs, paths, strict=True))
        count = -(-len(work) // seeds_at_once(settled))
        for chunk in range(count):
            _train_chunk(work[chunk::count], settled.device, meanwhile)


def _check(config: Config) -> None:
    """Raises ValueError for a config whose seeds cannot be trained together."""
    needed = {"layers": (LAYER,), "depth": DEPTH, "method": "path", "batch": None, "penalty": None}
    for name, value in {**needed, "until_accurate": False}.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}: expected {value} for seeds that train together, got {getattr(config, name)}"
            )
    if others := [name for name in config.beside if name not in OBSERVED]:
        raise ValueError(
            f"observables: expected some of {', '.join(OBSERVED)} for seeds that train together, got {others[0]}"
        )


def bytes_of_a_seed(config: Config) -> int:
    """What one of the seeds takes of a card's memory, about: 16 MB on modular addition, so that 256 take 4 GB."""
    samples, measured = config.trained_on, config.samples or config.trained_on
    tokens, width = round((samples / config.train_fraction) ** 0.5) + 1, config.width
    weights = tokens * EMBEDDING + (2 * EMBEDDING + width + tokens) * width
    # Weights, gradients, two moments and two copies; pre-activations and activations; the loss in float64; all pairs.
    training = 4 * (6 * weights + 2 * DEPTH * samples * width + tokens**2 * width) + 4 * 8 * tokens * samples
    # The connectivity, the pooled one, and the first in float64; the samples and their features in float64.
    measuring = (4 + 4 + 8) * measured**2 + 6 * 8 * measured * width
    return training + measuring


def seeds_at_once(config: Config) -> int:
    """How many seeds of a settled config train together on its device."""
    if config.device != "cuda":
        return MOST
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(MOST, int(SHARE * free / bytes_of_a_seed(config))))


def _train_chunk(work: Sequence[tuple[Config, Path]], device: str, meanwhile: Callable[[], None]) -> None:
    with ExitStack() as claims:
        seeds: list[_Seed] = []
        for config, path in work:
            try:
                with ExitStack() as own:
                    own.enter_context(claimed(path))
                    seed = _Seed(begun(config, path), path)
                    if seed.config.device == device:
                        claims.enter_context(own.pop_all())
                        seeds.append(seed)
            except ValueError:  # `train` of this run says what is wrong
                continue
        while at_work := [seed for seed in seeds if not seed.finished]:
            # After a stop within a write some runs are ahead of others. Those behind come first, up to the next ones.
            first, *later = sorted({seed.step for seed in at_work})
            until = later[0] if later else at_work[0].config.steps
            group = [seed for seed in at_work if seed.step == first]
            _Together(group, until, meanwhile).run()
            for seed in group:
                if not seed.finished:
                    seed.load()


class _Seed(Record):
    """A run of the chunk, with model and optimiser as its files have them, on the CPU."""

    def __init__(self, config: Config, path: Path) -> None:
        super().__init__(config, path)
        self.load()

    def load(self) -> None:
        self.task, self.model = start(replace(self.config, device="cpu"))
        self.optimiser = optimiser_of(self.model.parameters(), self.config)
        self.waiting: list[dict] = []  # rows that are not written yet

        def take(state: dict[str, Any]) -> None:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])

        self.read(take, "cpu")


class _Together:
    """Runs that are at the same step, trained up to another one, which is measured and written."""

    def __init__(self, seeds: Sequence[_Seed], until: int, meanwhile: Callable[[], None]) -> None:
        self.seeds, self.until, self.meanwhile = seeds, until, meanwhile
        self.config = seeds[0].config
        self.networks = Networks([s.model for s in seeds], [s.task for s in seeds], self.config)
        self.model, task = self.networks.model, self.networks.task
        self.gradients = Gradients(
            self.model, task.train_inputs, task.train_labels, loss_dtype=self.networks.loss_dtype
        )
        self.optimiser = optimiser_of(self.model.parameters(), self.config)
        if seeds[0].step >= 0:
            self.optimiser.load_state_dict(_stacked([s.optimiser.state_dict() for s in seeds]))
        self.writing: Future[None] | None = None
        self.unwritten = 0

    def _update(self, step: int = 0) -> None:
        self.gradients()
        self.optimiser.step()

    def run(self) -> None:
        step, self.clock = self.seeds[0].step, time.perf_counter()
        update: Callable[[int], None] = self._update
        if (
            self.config.device == "cuda"
        ):  # before the writer's thread begins, as another thread may not call CUDA meanwhile
            update = captured(self._update, self.model, self.optimiser)
        # The thread writes the files of one measurement while the networks train to the next.
        with ThreadPoolExecutor(1, thread_name_prefix="lmnfast-writer") as self.writer:
            if step < 0:
                self.measure(0)
            for number in range(max(step, 0) + 1, self.until + 1):
                update(number)
                if number % self.config.every == 0:
                    self.measure(number)
            self.settle()

    def measure(self, step: int) -> None:
        metrics = self.networks.evaluate()
        for seed, found in zip(self.seeds, metrics, strict=True):
            try:
                seed.check_metrics(step, found)
            except FloatingPointError as error:
                raise FloatingPointError(f"{seed.path}: {error}") from None
        copy = HostCopy({"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()})
        self.tick("training")
        rows = self.networks.measure()
        self.tick("measuring")
        self.settle()
        for seed, row, found in zip(self.seeds, rows, metrics, strict=True):
            seed.waiting.append({"step": step, **row, **found})
        self.unwritten += 1
        whole = self.unwritten > MOST_UNWRITTEN or step == self.until
        self.unwritten = 0 if whole else self.unwritten
        self.writing = self.writer.submit(self.write, step, copy, whole)

    def settle(self) -> None:
        """Waits for the files of the last measurement, and raises the errors of writing them."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None
            if self.unwritten == 0:
                self.meanwhile()

    def write(self, step: int, copy: HostCopy, whole: bool) -> None:
        """Writes the checkpoints of a step. whole: also the rows and the states."""
        content = copy.read()
        for number, seed in enumerate(self.seeds):
            weights = {name: stack[number].clone() for name, stack in content["model"].items()}
            seed.keep_weights(step, weights)
            if whole:
                state = {"step": step, "model": weights, "optimiser": _part(content["optimiser"], number)}
                seed.keep(seed.waiting, state)
                seed.waiting = []

    def tick(self, activity: str) -> None:
        """Adds to each run its share of the time since the last tick."""
        now = time.perf_counter()
        for seed in self.seeds:
            seed.seconds[activity] += (now - self.clock) / len(self.seeds)
        self.clock = now


def _stacked(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of an optimiser of stacked parameters, of those of their parts. All parts have taken as many steps."""

    def stack(parameter: int, name: str, value: Tensor) -> Tensor:
        return torch.stack([each["state"][parameter][name] for each in states]) if value.dim() else value

    state = {
        parameter: {name: stack(parameter, name, value) for name, value in values.items()}
        for parameter, values in states[0]["state"].items()
    }
    return {**states[0], "state": state}


def _part(state: dict[str, Any], number: int) -> dict[str, Any]:
    """The state of the optimiser of one of the networks."""
    parts = {
        parameter: {name: (value[number] if value.dim() else value).clone() for name, value in values.items()}
        for parameter, values in state["state"].items()
    }
    return {**state, "state": parts}
