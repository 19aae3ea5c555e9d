"""The settings of a study. The command line's help reads them, so this module does not import torch."""

from dataclasses import dataclass
from typing import Any

from ..grokking.config import Config

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


# Seeds 0 to 3 of XOR generalise by step 3800, seed 0 by 2700.
QUICK = Study(
    steps=4000,
    asked=1,
    milestones=(0, 400, 1000, 2000, 3000, 4000),
    few=(400,),
    relu_steps=500,
    relu_every=100,
)
