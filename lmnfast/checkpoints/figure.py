"""The curves of a table of checkpoints."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import plot
from .._drawing import matplotlib, outer_legend, readable
from ..runs.figures import save
from .steps import steps_of


def draw_checkpoints(out: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> Path:
    """Draws OUT/lmn.png, a line for each layer. Needs matplotlib.

    Args:
        out: the directory.
        rows: as `measure_checkpoints` returns them.

    Returns:
        The path of the figure.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: `out` cannot be written.

    Example:
        >>> from lmnfast.checkpoints import draw_checkpoints
        >>> columns = ("step", "checkpoint", "method", "lmn_1")
        >>> values = (0, "step_0.pt", "path", 6.2), (10, "step_10.pt", "path", 4.1)
        >>> draw_checkpoints(".", [dict(zip(columns, row)) for row in values]).name
        'lmn.png'
    """
    matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with readable():
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        plot.history(rows, "lmn", ax=axes)
        outer_legend(figure, axes)
        axes.set_ylim(bottom=0)
        if steps_of([row["checkpoint"] for row in rows]) is None:
            axes.set_xlabel("Checkpoint, by name")
        axes.xaxis.set_major_locator(
            MaxNLocator(7, integer=all(isinstance(row["step"], int) for row in rows))
        )
        return save(figure, Path(out) / "lmn.png")
