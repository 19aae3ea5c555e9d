"""The settings of a run of the paper's training (arXiv 2310.05918, section 3)."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from .._observables import Chosen
from .._settings import METHODS
from ..probe import Probe
from ..quadrature import path_nodes
from ..runs.device import check_device, settled_device
from ..spectrum import check_negative
from .model import ACTIVATION_MODULES, INITS, LAYERS, make_model
from .tasks import Task, make_task, task_sizes, training_samples


@dataclass(frozen=True)
class Config:
    """The settings that determine a run. The defaults are the paper's.

    Raises:
        ValueError: a value that a run cannot have.
    """

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
    samples: int | None = None
    """The number of training samples that are measured, the first ones in their random order; None: all. The LMN of fewer
    samples is not an estimate of the LMN of all samples."""
    negative: str = "absolute"
    observables: tuple[str, ...] = ()
    """Numbers that are measured beside LMN, as `lmnfast.observables` lists them."""
    init: str = "default"
    activation: str = "silu"
    device: str = "auto"
    """"auto": the device on which the run was started; for a new run "cuda" if there is a CUDA device, else "cpu"."""
    threads: int | None = None
    """None: the number with which the run was started; for a new run torch's number. It affects the last bits of sums."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.2

    def __post_init__(self) -> None:
        self._check_kinds()
        sizes = task_sizes(self.task, p=self.p, bits=self.bits)
        object.__setattr__(self, "p", sizes.get("p"))
        object.__setattr__(self, "bits", sizes.get("bits"))
        object.__setattr__(self, "layers", tuple(self.layers))
        self._check_counts(training_samples(self.task, **sizes))
        unknown = [layer for layer in self.layers if layer not in LAYERS]
        if unknown or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"layers: expected some of {', '.join(LAYERS)}, each once, got {', '.join(self.layers)}"
            )
        object.__setattr__(self, "points", len(path_nodes(self.rule, self.points)[0]))
        check_negative(self.negative)
        object.__setattr__(self, "observables", Chosen(self.observables).names)
        for name, known in (("method", METHODS), ("init", INITS), ("activation", tuple(ACTIVATION_MODULES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_device(self.device)

    def _check_kinds(self) -> None:
        """Converts values that stand for an integer to int, and refuses values of other types."""
        for name in ("p", "bits", "steps", "every", "seed", "points", "samples", "threads"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, None if value is None else operator.index(value))
            except TypeError:
                raise ValueError(f"{name}: expected an integer, got {value!r}") from None
        for name in ("learning_rate", "weight_decay"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name}: expected a number, got {getattr(self, name)!r}")

    def _check_counts(self, trained_on: int) -> None:
        for name, smallest in (("steps", 0), ("every", 1), ("seed", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
        if self.samples is not None and not 2 <= self.samples <= trained_on:
            raise ValueError(
                f"samples: expected 2 to {trained_on}, all that are trained on, got {self.samples}"
            )
        if self.steps % self.every:
            raise ValueError(f"steps: expected a multiple of every ({self.every}), got {self.steps}")

    @property
    def beside(self) -> tuple[str, ...]:
        """The observables that a training measures. The L2 norm is a column of every run already."""
        return tuple(name for name in self.observables if name != "l2_norm")

    def settled(self) -> "Config":
        """The config with a definite device and number of threads, taken from this machine if the config leaves them open.
        Raises ValueError if the device is missing."""
        threads = self.threads or torch.get_num_threads()
        return replace(self, device=settled_device(self.device), threads=threads)


def start(config: Config) -> tuple[Task, nn.Sequential]:
    """The task and the untrained model, on the config's device. One generator draws first the split and then the weights."""
    generator = torch.Generator().manual_seed(config.seed)
    task = make_task(config.task, generator, p=config.p, bits=config.bits)
    model = make_model(task.vocabulary, generator, init=config.init, activation=config.activation)
    tensors = {
        f.name: getattr(task, f.name).to(config.device) for f in fields(Task) if f.name != "vocabulary"
    }
    return replace(task, **tensors), model.to(config.device)


def probe_of(
    model: nn.Module,
    inputs: Tensor,
    config: Config,
    every: int,
    until: str | None = None,
    observables: Sequence[str] = (),
) -> Probe:
    """A probe with the config's settings, of LMN and these observables. until: as in `Probe`."""
    return Probe(
        model,
        inputs,
        config.layers,
        until=until,
        every=every,
        method=config.method,
        points=config.points,
        rule=config.rule,
        negative=config.negative,
        observables=tuple(dict.fromkeys(("lmn", *observables))) if observables else (),
    )
