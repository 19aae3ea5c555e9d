"""The paper's experiment (arXiv 2310.05918): its tasks, its network, its training, and the LMN during this training."""

from typing import TYPE_CHECKING

from .._lazy import lazy as _lazy

if TYPE_CHECKING:
    from .config import Config
    from .run import Run, read_run
    from .training import train
else:  # the command line's help reads modules of this package without torch
    __getattr__, __dir__ = _lazy(globals(), {"config": "Config", "run": "Run read_run", "training": "train"})

__all__ = ["Config", "Run", "read_run", "train"]
