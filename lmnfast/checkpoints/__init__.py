"""Measures checkpoints of any training: loads them into the user's model, cuts the model, measures, and writes a table."""

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
