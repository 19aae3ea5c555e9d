"""The paper's experiment (arXiv 2310.05918): its tasks, its network, its training, and the LMN during this training."""

from .config import Config
from .run import Run, read_run
from .training import train

__all__ = ["Config", "Run", "read_run", "train"]
