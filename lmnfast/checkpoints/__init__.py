"""Measures checkpoints that others trained: loads them into the user's model, cuts, measures, keeps a table."""

from .figure import draw_checkpoints
from .measure import measure_checkpoints
from .sources import find_checkpoints, first_samples, load_inputs, read_state

__all__ = [
    "draw_checkpoints",
    "find_checkpoints",
    "first_samples",
    "load_inputs",
    "measure_checkpoints",
    "read_state",
]
