"""The curves of a table of checkpoints."""

import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ..runs.figures import COLOURS, save
from .steps import steps_of

STYLES = ("-", "--", ":", "-.")  # two equal curves have different styles, so that both are visible


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
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = [name for name in rows[0] if name.startswith("lmn_")]
    colours: Sequence[Any] = COLOURS
    if len(layers) > len(COLOURS):  # a scale of colours by depth
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers))).tolist()
    with matplotlib.rc_context({"font.size": 13, "legend.frameon": False, "lines.linewidth": 2}):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        steps = [row["step"] for row in rows]
        marker = "." if len(rows) <= 50 else ""
        for name, colour, style in zip(layers, colours, cycle(STYLES), strict=False):
            look = {"color": colour, "linestyle": style, "marker": marker, "label": name.removeprefix("lmn_")}
            axes.plot(steps, [row[name] for row in rows], **look)
        counted = steps_of([row["checkpoint"] for row in rows]) is None
        method = rows[0]["method"]
        axes.set(
            xlabel="Checkpoint, by name" if counted else "Step",
            ylabel="LMN" if method == "path" else f"LMN ({method})",
            ylim=(0, None),
        )
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=all(isinstance(step, int) for step in steps)))
        widest = max(map(len, layers))
        columns = max(1, min(len(layers), 60 // (widest + 4)))
        if len(layers) > 12:
            figure.legend(loc="outside right upper", fontsize=9, ncols=-(-len(layers) // 25))
        else:
            figure.legend(loc="outside upper center", ncols=columns)
        return save(figure, Path(out) / "lmn.png")
