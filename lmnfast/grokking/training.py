"""The paper's training (arXiv 2310.05918, section 3), and the linear mapping number during this training."""

import os
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._nested import mapped, tensors_in
from ..runs.device import torch_threads
from ..runs.files import claimed
from ..runs.progress import progress_bar
from .batches import Batches
from .config import Config, probe_of, start
from .gradients import Gradients, lost_gradients
from .measure import say_how_long
from .penalty import WeightedPenalty
from .record import MOST_UNWRITTEN, Record, begun
from .run import PENALTY, Run, read_run
from .tasks import Task


def train(config: Config, out: str | os.PathLike, *, force: bool = False, progress: bool = False) -> Run:
    """Trains and measures. If `out` has a run that was stopped, continues this run.

    A finished run with fewer steps than the config's is continued too, and so is one that has ended at test accuracy 1 if the
    config does not ask for that end. On the CPU the same config, machine and versions give
    the same metrics.csv, byte for byte, however often the run was stopped.

    Args:
        config: of the run.
        out: the run's directory, which is made if it does not exist.
        force: delete the run in `out`, whatever its config, and start anew. This deletes only files that a run writes, and
            follows no symbolic link below `out`.
        progress: show a bar (needs tqdm), and print at the beginning how long a measurement of many samples takes.

    Returns:
        The finished run.

    Raises:
        ValueError: no such device; another process is at work in `out`; `out` holds a run with another config (the message
            names the differences), or an incomplete or damaged run, or files that are not a run but have the names of a
            run's files.
        OSError: `out` cannot be written, or was deleted meanwhile.
        FloatingPointError: a loss is NaN or infinite.

    Source: arXiv 2310.05918, section 3.

    Example:
        >>> from lmnfast.grokking import Config, train
        >>> config = Config("modular-addition", p=7, steps=20, every=10, device="cpu")
        >>> run = train(config, "run")
        >>> [row["step"] for row in run.rows]
        [0, 10, 20]
        >>> run.rows[0]["lmn_hidden_1"] > 1, run.rows[-1]["lost_gradients"]
        (True, 0)
    """
    path = Path(out)
    with claimed(path):
        config = begun(config, path, force)
        assert config.threads is not None  # settled
        with torch_threads(config.threads):
            _Training(config, path).run(progress)
    return read_run(path)


def updates(config: Config) -> Callable[[int], None]:
    """The update of a new run, as a function of its number, from 1 on. Nothing is measured or written."""
    return _Training(config.settled(), Path())._update


def optimiser_of(parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """The optimiser of a run."""
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer]
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


class _Training(Record):
    """A run at work. `measure` starts a measurement. `write` writes its row when the probe's thread has finished it."""

    def __init__(self, config: Config, path: Path) -> None:
        super().__init__(config, path)
        generator = torch.Generator().manual_seed(config.seed)
        self.task, self.model = start(config, generator)
        self.loss_dtype = getattr(torch, config.loss_dtype)
        self.samples = self.task.train_inputs[: config.samples]
        self.gradients = Gradients(
            self.model,
            self.task.train_inputs,
            self.task.train_labels,
            loss_dtype=self.loss_dtype,
            batch=config.batch,
        )
        self.batches = (
            Batches(config.trained_on, config.batch, generator, config.device) if config.batch else None
        )
        self.penalty = WeightedPenalty(self.model, self.task.train_inputs, config) if config.penalty else None
        self.optimiser = optimiser_of(self.model.parameters(), config)
        self.unwritten = 0
        # The step and the copies of the last measurement, until `settle` has saved them.
        self.taken: tuple[int, HostCopy] | None = None
        self.settles_late = config.device == "cuda" and not config.until_accurate

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.batches:
            self.batches.load_state_dict(state["batches"])
        if self.penalty:
            self.penalty.load_state_dict(state["penalty"])

    def _update(self, step: int = 0) -> None:
        """step: the number of the update, from 1 on; 0: one without a penalty."""
        if self.batches:
            self.gradients.choose(self.batches.chosen)
        self.gradients()
        if self.penalty:
            self.penalty(step)
        self.optimiser.step()

    def run(self, progress: bool) -> None:
        config = self.config
        self.read(self._load, config.device)
        if progress and self.step >= 0:
            how = "finished at" if self.finished else "continues after"
            print(f"{self.path}: {how} step {self.step}")
        if self.finished:
            return
        if progress:
            done = self.step if self.step >= 0 else -config.every
            count = (config.steps - done) // config.every
            say_how_long(self.path, self.model, self.samples, (config,), count)
        # The capture of a CUDA graph fails if another thread calls CUDA. So it happens before the probe starts its thread.
        update: Callable[[int], None] = self._update
        if config.device == "cuda" and not self.penalty:
            update = captured(self._update, self.model, self.optimiser)
        with (
            probe_of(self.model, self.samples, config, config.every, None, config.beside) as self.probe,
            progress_bar(config.steps, max(self.step, 0), progress) as self.bar,
        ):
            if self.step < 0:
                self.measure(0)
            for step in range(max(self.step, 0) + 1, config.steps + 1):
                if self.batches:
                    self.batches.advance()
                update(step)
                if self.bar:
                    self.bar.update()
                if step % config.every == 0:
                    self.measure(step)
                    if config.until_accurate and self.accurate:
                        break
                elif self.unwritten and not self.probe.pending:
                    self.write()
            self.write()

    def measure(self, step: int) -> None:
        self.settle()
        metrics = _evaluate(self.model, self.task, self.loss_dtype)
        if self.penalty:
            metrics[PENALTY] = self.penalty.value
        states = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        if self.batches:
            states["batches"] = self.batches.state_dict()
        if self.penalty:
            states["penalty"] = self.penalty.state_dict()
        self.taken = step, HostCopy({"metrics": metrics, **states})
        if not self.settles_late:
            self.check_taken()
        self.tick("training")
        self.probe(step, **metrics)
        self.tick("measuring")
        if not self.settles_late:
            self.settle()
        self.unwritten += 1
        if self.unwritten > MOST_UNWRITTEN:  # solving is slower than training
            self.write()

    def settle(self) -> None:
        """Checks and saves the copies of the last measurement.

        On a card the next measurement calls this. By then the copies have arrived, and the training has not waited for them.
        """
        if self.taken is None:
            return
        self.check_taken()
        step, copy = self.taken
        self.taken = None
        self.keep_weights(step, copy.read()["model"])
        kept = {name: value for name, value in copy.read().items() if name != "metrics"}
        self.state = {"step": step, **kept}

    def check_taken(self) -> None:
        assert self.taken is not None
        step, copy = self.taken
        self.check_metrics(step, {name: value.item() for name, value in copy.read()["metrics"].items()})

    def write(self) -> None:
        self.settle()
        self.tick("training")
        history = self.probe.history  # waits for pending rows
        self.tick("measuring")
        self.keep(history, self.state)
        self.unwritten = 0
        if self.bar:
            row = self.rows[-1]
            shown = {
                "loss": f"{row['train_loss']:.1e}/{row['test_loss']:.1e}",
                "accuracy": f"{row['train_accuracy']:.2f}/{row['test_accuracy']:.2f}",
                "LMN": "/".join(f"{row[f'lmn_{layer}']:.1f}" for layer in self.config.layers),
            }
            if self.penalty:
                shown[PENALTY] = f"{row[PENALTY]:.1e}"
            self.bar.set_postfix(shown, refresh=False)


class HostCopy:
    """A copy on the CPU of tensors and plain values in dicts and lists, as they are at this moment.

    All tensors on a card are copied in one transfer. Only `read` waits for the transfer.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self._tensors = [tensor for tensor in tensors_in(content) if tensor.is_cuda]
        self._content = content if self._tensors else deepcopy(content)
        if self._tensors:
            there = packed(self._tensors)
            self._bytes = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            self._bytes.copy_(there, non_blocking=True)
            self._done = torch.cuda.Event(blocking=True)
            self._done.record()

    def read(self) -> dict[str, Any]:
        if self._tensors:
            self._done.synchronize()
            values = iter(unpacked(self._bytes, self._tensors))
            copied = mapped(self._content, lambda t: next(values) if t.is_cuda else t.clone())
            self._content, self._tensors = copied, []
        return self._content


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of the tensors one after the other, (bytes,) uint8."""
    return torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])


def unpacked(values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the bytes of `packed`. Each has its own memory.

    Args:
        values: (bytes,) uint8.
        like: tensors with the dtypes and shapes of the packed tensors.
    """
    parts = values.split([tensor.nbytes for tensor in like])
    return [part.clone().view(t.dtype).reshape(t.shape) for part, t in zip(parts, like, strict=True)]


def captured(
    update: Callable[..., None], model: nn.Module, optimiser: torch.optim.Optimizer
) -> Callable[[int], None]:
    """An update of the model as one CUDA graph, which is launched as a whole. A penalty cannot be a part of it."""

    def set_capturable(value: bool) -> None:
        # The value is True only during the capture, because torch warns if a capturable step is not captured.
        for group in optimiser.param_groups:
            if "capturable" in group:  # SGD has no such option, and needs none
                group["capturable"] = value

    set_capturable(False)
    # The warm-up and the capture use the same stream, because autograd remembers the stream on which it accumulates gradients.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _warm_up(update, model, optimiser)
    torch.cuda.current_stream().wait_stream(stream)
    set_capturable(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        update()
    return lambda step: graph.replay()


def _warm_up(update: Callable[[], None], model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Runs the update a few times, so that everything that first calls set up exists, and undoes the updates in place.

    Afterwards the optimiser has a state. If it had none before, the state is zero, which has the same effect as no state.
    """
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


@torch.no_grad()
def _evaluate(model: nn.Module, task: Task, loss_dtype: torch.dtype) -> dict[str, Tensor]:
    """METRICS of the model, as 0-dim tensors of 64 bits on its device. Does not wait for the device."""
    train, test = model(task.train_inputs), model(task.test_inputs)
    return metrics_from(train, test, task.train_labels, task.test_labels, model.parameters(), loss_dtype)


def metrics_from(
    train: Tensor,
    test: Tensor,
    train_labels: Tensor,
    test_labels: Tensor,
    parameters: Iterable[Tensor],
    loss_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """METRICS of a model with these parameters and these logits of its training and test samples."""
    return {
        "train_loss": cross_entropy(train.to(loss_dtype), train_labels).double(),
        "test_loss": cross_entropy(test.to(loss_dtype), test_labels).double(),
        "train_accuracy": (train.argmax(1) == train_labels).double().mean(),
        "test_accuracy": (test.argmax(1) == test_labels).double().mean(),
        "l2_norm": nn.utils.parameters_to_vector(parameters).double().norm(),
        "lost_gradients": lost_gradients(train, train_labels, loss_dtype),
    }
