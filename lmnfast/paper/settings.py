"""The settings of a study. The command line's help reads them, so this module does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..grokking.config import Config

INTERVENTIONS = "interventions"  # the folder of a study with the runs that have a penalty
LAYER = "hidden_1"  # the paper measures at this layer
# Measured at each logging step beside LMN. The L2 norm is a column of every run.
OBSERVABLES = (
    *("complexity_bits", "curvature", "pooled_curvature", "participation_ratio", "negative_share"),
    *("jacobian_rank", "local_complexity", "representation_rank"),
)
SEEDS, QUICK_SEEDS = 32, 4
# The range of 6 seeds contains the median in 97 % of draws, the range of 5 seeds only in 94 %. So fewer than 6 seeds do not
# have a 95 % interval.
FEWEST_FOR_INTERVAL, FEWEST_FOR_VERDICT = 6, 4


@dataclass(frozen=True)
class Study:
    """The settings of a study, apart from its tasks and seeds. The network and its training are the paper's."""

    steps: int = 20_000
    every: int = 100
    points: int = 9
    rule: str = "lobatto"
    observables: tuple[str, ...] = OBSERVABLES
    asked: int = 8
    """The number of seeds, from 0 on, that most questions are asked of: 21 points, other layers, other samples, ReLU."""
    milestones: tuple[int, ...] = (
        *(0, 200, 400, 700, 1000, 1500),
        *range(2000, 10_000, 1000),
        *range(10_000, 20_001, 2000),
    )
    """Steps at which 21 points, the other layers, other samples and stand-ins are measured."""
    few: tuple[int, ...] = (0, 400, 4000, 20_000)
    """Steps of the measurements that take long: other nodes, other numbers of samples."""
    relu_steps: int = 5000
    relu_every: int = 250

    def config(self, task: str, seed: int, **changes: Any) -> Config:
        given: dict[str, Any] = {
            name: getattr(self, name) for name in ("steps", "every", "points", "rule", "observables")
        }
        given |= {"seed": seed, "threads": 1, **changes}
        return Config(task, layers=(LAYER,), **given)

    def relu_config(self, task: str, seed: int) -> Config:
        """The config of the run with ReLU."""
        steps, every = self.relu_steps, self.relu_every
        return self.config(task, seed, activation="relu", steps=steps, every=every, observables=())


# The arms of the interventions; what each adds to the training of the paper.
PENALISED = ("pooled_curvature", "lmn", "jacobian_norm")
ARMS = ("none", *PENALISED, "weight_decay")
MATCHED = "pooled_curvature"  # weight_decay has the final L2 norm of this arm


@dataclass(frozen=True)
class Interventions:
    """The settings of the interventions, apart from their tasks and seeds: the same runs with a penalty, or with another weight
    decay, each until its test accuracy is 1."""

    horizons: Mapping[str, int] = field(
        default_factory=lambda: {"modular-addition": 10_000, "s4": 10_000, "xor": 5000}
    )
    """The largest number of steps, by task. A run that is not accurate by then is censored."""
    every: int = 100
    tuning: Sequence[int] = (1000, 1001)
    """The seeds by which weights are chosen. They are not reported."""
    weights: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {
            "pooled_curvature": (1.0, 10.0, 100.0, 1000.0),
            "lmn": (1e-4, 1e-3, 1e-2),
            "jacobian_norm": (1e-3, 1e-2, 1e-1),
        }
    )
    """By arm, the weights to choose from."""
    weight_decays: Sequence[float] = (0.1, 0.2, 0.4, 0.8)
    """Those between which the matched weight decay is interpolated."""
    penalty_samples: int = 64
    penalty_every: int = 4
    points: int = 9
    """Of the measurement at the end of a run, on all training samples."""
    rule: str = "lobatto"

    def config(self, task: str, arm: str, weight: float | None, seed: int) -> Config:
        """The config of a run. weight: of the penalty, or the weight decay of the arm weight_decay; None for the arm none."""
        given: dict[str, Any] = {}
        if arm in PENALISED:
            given = {"penalty": arm, "penalty_weight": weight, "penalty_samples": self.penalty_samples}
            given["penalty_every"] = self.penalty_every
        elif weight is not None:
            given = {"weight_decay": weight}
        # While it trains, LMN is measured of few samples, which takes no time.
        return Config(
            task, layers=(LAYER,), seed=seed, steps=self.horizons[task], every=self.every, samples=64, points=7,
            rule="lobatto", threads=1, until_accurate=True, **given,
        )  # fmt: skip


# Seeds 0 to 3 of XOR generalise by step 3800, seed 0 by 2700.
QUICK = Study(
    steps=4000,
    asked=1,
    milestones=(0, 400, 1000, 2000, 3000, 4000),
    few=(400,),
    relu_steps=500,
    relu_every=100,
)

# No arm is accurate by then. Every part of the work is done once.
QUICK_INTERVENTIONS = Interventions(
    horizons={"modular-addition": 100, "s4": 100, "xor": 100},
    tuning=(1000,),
    weights={"pooled_curvature": (0.1, 1.0), "lmn": (1e-4, 1e-3), "jacobian_norm": (1e-3, 1e-2)},
    weight_decays=(0.1, 0.4),
)
