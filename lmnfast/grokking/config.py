"""The settings of a run of the paper's training (arXiv 2310.05918, section 3).

The command line's help shows the defaults of `Config`. So what imports torch is imported where it is needed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from .choices import (
    ACTIVATIONS,
    DEPTH,
    HIDDEN,
    INITS,
    LOSS_DTYPES,
    OPTIMIZERS,
    PENALTIES,
    TRAIN_FRACTION,
    layers_of,
    task_sizes,
    training_samples,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..probe import Probe
    from .tasks import Task

# The largest widths and depths: a matrix of 8192 x 8192 weights takes 256 MiB, and deeper networks no longer train with
# PyTorch's initialisation.
WIDEST, DEEPEST = 8192, 64
PENALTY_SAMPLES = 64


@dataclass(frozen=True)
class Config:
    """The settings that determine a run. The defaults are the paper's.

    Raises:
        ValueError: a value that a run cannot have.

    Source: arXiv 2310.05918, section 3; for the loss in float64 arXiv 2605.06152.

    Example:
        >>> from lmnfast.grokking import Config
        >>> config = Config("modular-addition", p=7, depth=3, train_fraction=0.5)
        >>> config.trained_on, config.width, config.steps
        (24, 100, 20000)
    """

    task: str
    """"modular-addition", "s4" or "xor"."""
    p: int | None = None
    """The modulus of modular-addition; None: 31. Other tasks have none."""
    bits: int | None = None
    """The length of the numbers of xor; None: 5. Other tasks have none."""
    steps: int = 20_000
    """The number of updates, a multiple of `every`."""
    every: int = 100
    """The steps from one measurement to the next."""
    seed: int = 0
    """Of the generator that draws first the split, then the weights, then the batches."""
    layers: tuple[str, ...] = ("hidden_1",)
    """The layers that are measured: "embedding", and "hidden_1_pre" and "hidden_1" for each hidden layer."""
    points: int = 21
    """The number of nodes on a path, ends included."""
    rule: str = "uniform"
    """Where on a path they lie: "uniform" or "lobatto"."""
    method: str = "path"
    """Of the connectivity, as in `lmnfast.connectivity`."""
    samples: int | None = None
    """The number of training samples that are measured, the first ones in their random order; None: all. The LMN of fewer
    samples is not an estimate of the LMN of all samples."""
    negative: str = "absolute"
    """What negative eigenvalues count, as in `lmnfast.lmn`."""
    stabiliser: float = 0.0
    """Is added to the denominators of r2, as in `lmnfast.connectivity`; 8e-8 gives the paper's numbers at step 0."""
    observables: tuple[str, ...] = ()
    """Numbers that are measured beside LMN, as `lmnfast.observables` lists them."""
    init: str = "default"
    """The initialisation: "default" is PyTorch's, and the paper's. "lecun-first" is kept for runs begun with it."""
    activation: str = "silu"
    """Behind each hidden Linear: "silu" or "relu"."""
    device: str = "auto"
    """"auto": the device on which the run was started; for a new run "cuda" if there is a CUDA device, else "cpu"."""
    threads: int | None = None
    """None: the number with which the run was started; for a new run torch's number. It affects the last bits of sums."""
    learning_rate: float = 1e-3
    """Of the optimiser, constant."""
    weight_decay: float = 0.2
    """Of the optimiser: each step shrinks every parameter by learning_rate x weight_decay of itself."""
    optimizer: str = "adamw"
    """"adamw", or "sgd" without momentum."""
    batch: int | None = None
    """The number of training samples in an update; None: all. An epoch is one permutation of the samples, and leaves out what
    does not fill a batch at its end."""
    train_fraction: float = TRAIN_FRACTION
    """The share of all pairs that is for training. The others are for testing."""
    width: int = HIDDEN
    """The units of each hidden layer."""
    depth: int = DEPTH
    """The number of hidden layers."""
    loss_dtype: str = "float64"
    """"float64" or "float32": what the softmax of the loss and its difference from the labels are computed in. All else is
    float32. With "float32", round-off makes a long run unstable: see `lost_gradients` in its rows. Runs of versions without
    this setting are float32."""
    penalty: str | None = None
    """What `penalty_weight` times is added to the loss, of the map from "hidden_1" to the output: "pooled_curvature",
    "curvature", "lmn" or "complexity_bits", as `lmnfast.Penalty` computes them, or "jacobian_norm", the mean over samples of
    the squared Frobenius norm of the map's Jacobian; None: nothing."""
    penalty_weight: float | None = None
    """Belongs to a penalty. A weight that is too large stops the learning of the task; none is refused for that."""
    penalty_samples: int | None = None
    """The number of training samples of the penalty, drawn anew each time by a generator of its own; None: 64, or all if there
    are fewer. LMN and complexity_bits of so few samples are not estimates of those of all samples."""
    penalty_every: int = 4
    """The gradient of the penalty is added in updates whose number is a multiple of this, `penalty_every` times as large. An
    update with a curvature's gradient takes more than three times as long as one without: so the average update takes less
    than twice as long."""
    until_accurate: bool = False
    """Whether the run ends at the first measured step with test accuracy 1, if there is one before `steps`."""

    def __post_init__(self) -> None:
        from .._eigenvalues import check_negative
        from .._observables import Chosen
        from .._settings import Settings
        from ..runs.device import check_device

        self._check_kinds()
        sizes = task_sizes(self.task, p=self.p, bits=self.bits)
        object.__setattr__(self, "p", sizes.get("p"))
        object.__setattr__(self, "bits", sizes.get("bits"))
        object.__setattr__(
            self, "layers", (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        )
        self._check_counts()
        known_layers = layers_of(self.depth)
        unknown = [layer for layer in self.layers if layer not in known_layers]
        if unknown or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"layers: expected some of {', '.join(known_layers)}, each once, got {', '.join(self.layers) or 'none'}"
            )
        Settings(self.method, self.points, self.rule, stabiliser=self.stabiliser)
        check_negative(self.negative)
        object.__setattr__(self, "observables", Chosen(self.observables).names)
        for name, known in (
            ("init", INITS),
            ("activation", ACTIVATIONS),
            ("optimizer", OPTIMIZERS),
            ("loss_dtype", LOSS_DTYPES),
            ("penalty", (None, *PENALTIES)),
        ):
            if getattr(self, name) not in known:
                expected = ", ".join(each for each in known if each is not None)
                raise ValueError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        self._check_penalty()
        check_device(self.device)

    def _check_kinds(self) -> None:
        """Converts values that stand for an integer or a number to int or float, and refuses values of other types."""
        counts = (
            "p",
            "bits",
            "steps",
            "every",
            "seed",
            "points",
            "samples",
            "threads",
            "batch",
            "width",
            "depth",
            "penalty_samples",
            "penalty_every",
        )
        required = ("width", "depth", "penalty_every")
        for name in counts:
            value = getattr(self, name)
            try:
                optional = value is None and name not in required
                object.__setattr__(self, name, None if optional else operator.index(value))
            except TypeError:
                raise ValueError(f"{name}: expected an integer, got {value!r}") from None
        for name in ("learning_rate", "weight_decay", "train_fraction", "stabiliser", "penalty_weight"):
            value = getattr(self, name)
            if value is None and name == "penalty_weight":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name}: expected a number, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.until_accurate, bool):
            raise ValueError(f"until_accurate: expected True or False, got {self.until_accurate!r}")

    def _check_counts(self) -> None:
        for name, smallest, largest in (
            ("steps", 0, None),
            ("every", 1, None),
            ("seed", 0, None),
            ("threads", 1, None),
            ("width", 1, WIDEST),
            ("depth", 1, DEEPEST),
        ):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
            if value is not None and largest is not None and value > largest:
                raise ValueError(f"{name}: expected at most {largest}, got {value}")
        trained_on = self.trained_on
        for name, smallest in (("samples", 2), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and not smallest <= value <= trained_on:
                raise ValueError(
                    f"{name}: expected {smallest} to {trained_on}, all that are trained on, got {value}"
                )
        if self.steps % self.every:
            raise ValueError(f"steps: expected a multiple of every ({self.every}), got {self.steps}")

    def _check_penalty(self) -> None:
        if self.penalty is None:
            if self.penalty_samples == PENALTY_SAMPLES:  # in the config.json of earlier versions
                object.__setattr__(self, "penalty_samples", None)
            for name in ("penalty_weight", "penalty_samples", "penalty_every"):
                if getattr(self, name) != getattr(Config, name):
                    raise ValueError(
                        f"{name}: expected a penalty with it, got {getattr(self, name)} without one"
                    )
            return
        if self.penalty_weight is None:
            raise ValueError(f"penalty_weight: expected a number for the penalty {self.penalty}, got none")
        if self.penalty_samples is not None and not 2 <= self.penalty_samples <= self.trained_on:
            raise ValueError(
                f"penalty_samples: expected 2 to {self.trained_on}, all that are trained on, got {self.penalty_samples}"
            )
        if self.penalty_every < 1:
            raise ValueError(f"penalty_every: expected at least 1, got {self.penalty_every}")

    @property
    def beside(self) -> tuple[str, ...]:
        """The observables that a training measures. The L2 norm is a column of every run already."""
        return tuple(name for name in self.observables if name != "l2_norm")

    @property
    def trained_on(self) -> int:
        """The number of pairs for training."""
        return training_samples(self.task, fraction=self.train_fraction, p=self.p, bits=self.bits)

    def settled(self) -> Config:
        """The config with a definite device and numbers of threads and of the penalty's samples, if it has a penalty.
        What the config leaves open is taken from this machine and the task. Raises ValueError if the device is missing."""
        import torch

        from ..runs.device import settled_device

        threads = self.threads or torch.get_num_threads()
        count = self.penalty_samples
        if self.penalty is not None and count is None:
            count = min(PENALTY_SAMPLES, self.trained_on)
        return replace(self, device=settled_device(self.device), threads=threads, penalty_samples=count)


def start(config: Config, generator: torch.Generator | None = None) -> tuple[Task, nn.Sequential]:
    """The task and the untrained model, on the config's device.

    Args:
        config: of the run.
        generator: draws first the split and then the weights, on the CPU; None: one with the config's seed.
    """
    import torch

    from .model import make_model
    from .tasks import Task, make_task

    generator = generator or torch.Generator().manual_seed(config.seed)
    task = make_task(config.task, generator, fraction=config.train_fraction, p=config.p, bits=config.bits)
    model = make_model(
        task.vocabulary,
        generator,
        init=config.init,
        activation=config.activation,
        width=config.width,
        depth=config.depth,
    )
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
    from ..probe import Probe

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
        stabiliser=config.stabiliser,
        observables=tuple(dict.fromkeys(("lmn", *observables))) if observables else (),
    )
