"""What all figures share: colours, new axes, bands over runs, logarithmic axes, legends. Needs matplotlib when it is used.

Text, ticks and frames have matplotlib's own colours (rcParams), so that a figure is light or dark as its style says. The
colours of data are chosen by the colour of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ._extras import required

# The colours of Okabe and Ito, which colour-blind readers can distinguish.
VERMILION, BLUE, GREEN, PURPLE = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
COLOURS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY)
DARK = (
    VERMILION,
    SKY,
    GREEN,
    PURPLE,
    ORANGE,
    "#F0E442",
)  # their blue is too dark on black, their yellow too light on white
GREY = "#888888"
KINDS = (
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    GREEN,
    VERMILION,
)  # of dots by word: on white and on black, none like LMN beside them
STYLES = ("-", "--", ":", "-.")  # two equal curves have different styles, so that both are visible
MARKERS = ("o", "^", "s", "D", "v", "P")
FONT = 13  # points; a figure of 7 inches is read at half its size
MANY = 12  # curves in a legend above the axes; more of them have one at the side
WIDTH = 7.0  # inches of a panel


def matplotlib() -> Any:
    """The package. Raises ImportError, which names the extra, if it is not installed."""
    return required("matplotlib", "plot")


@contextmanager
def readable() -> Iterator[None]:
    """Figures that are made within have letters of at least FONT points, and legends without frames."""
    mpl = matplotlib()
    size = max(FONT, mpl.rcParams["font.size"])
    with mpl.rc_context({"font.size": size, "axes.titlesize": "medium", "legend.frameon": False}):
        yield


@contextmanager
def panels(
    ax: Any, rows: int = 1, columns: int = 1, size: tuple[float, float] = (WIDTH, 4.4)
) -> Iterator[Any]:
    """The axes to draw into, as a flat array: those that were given, or those of a new figure of pyplot, which notebooks show.

    Args:
        ax: the argument of that name: None, Axes, or a sequence of as many Axes as there are panels.
        rows, columns: of panels in a new figure. Panels below one another share their horizontal axis.
        size: of a panel in a new figure, in inches.
    """
    matplotlib()
    if ax is not None:
        given = np.array(ax, dtype=object).reshape(-1)
        if len(given) != rows * columns or not all(hasattr(each, "set_xlabel") for each in given):
            raise ValueError(f"ax: expected {rows * columns} Axes of matplotlib or None, got {ax!r}")
        yield given
        return
    from matplotlib import pyplot

    with readable():
        _, grid = pyplot.subplots(
            rows, columns, figsize=(columns * size[0], rows * size[1]), squeeze=False, layout="constrained",
            sharex="col" if rows > 1 else False,
        )  # fmt: skip
        yield grid.reshape(-1)
        for axes in grid.reshape(
            -1
        ):  # ticks are made when the figure is drawn, and would then take the size of that time
            axes.tick_params(labelsize=pyplot.rcParams["font.size"])


def on_dark(axes: Any) -> bool:
    """Whether the background is dark, as the text on it is light. (The background itself may be transparent.)"""
    from matplotlib.colors import to_rgb

    return sum(to_rgb(axes.xaxis.label.get_color())) > 1.5


def scale(axes: Any) -> Any:
    """The colours of viridis that are seen on the background."""
    from matplotlib.colors import ListedColormap

    low, high = (0.25, 1.0) if on_dark(axes) else (0.0, 0.8)
    return ListedColormap(matplotlib().colormaps["viridis"](np.linspace(low, high, 256)))


def colours(axes: Any, count: int) -> list[Any]:
    """So many colours that are seen on the background: different ones, or a scale by depth for many."""
    if count > len(COLOURS):
        return scale(axes)(np.linspace(0, 1, count)).tolist()
    return list(DARK if on_dark(axes) else COLOURS)[:count]


def band(axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], **look: Any) -> None:
    """One curve; or of several the median, the middle half (dark) and the range (light).

    Args:
        axes: to draw into.
        x: where all curves have their values.
        curves: one or several, each as long as x. Where one of them is NaN, nothing is drawn.
        look: color, label and others of the line.
    """
    low, first, middle, third, high = np.quantile(
        np.asarray(curves, dtype=float), (0, 0.25, 0.5, 0.75, 1), axis=0
    )
    if len(curves) > 1:
        alphas = (0.25, 0.45) if on_dark(axes) else (0.14, 0.3)
        for lower, upper, alpha in zip((low, first), (high, third), alphas):
            axes.fill_between(x, lower, upper, color=look["color"], alpha=alpha, linewidth=0)
    axes.plot(x, middle, **look)


def log_axis(axis: Any) -> None:
    """Makes an axis that has data logarithmic, with plain numbers at its ticks. If the data have a 0, that stands at the lower
    end, and the part up to the smallest positive value is linear."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    (low, high), first = axis.get_data_interval(), axis.get_minpos()
    if not (math.isfinite(first) and high > 0):
        return
    narrow = high < 100 * first
    steps = (1, 2, 5) if narrow else (1,)
    set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    if low > 0:
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=steps))
    else:
        set_scale("symlog", linthresh=first, linscale=0.4)
        decades = range(math.floor(math.log10(first)), math.ceil(math.log10(high)) + 1)
        marks = [step * 10.0**decade for decade in decades for step in steps]
        axis.set_major_locator(FixedLocator([0.0, *(m for m in marks if m >= 0.999 * first)]))
    axis.set_major_formatter(FuncFormatter(lambda value, place: _plain(value)))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    return rf"${value / 10.0**exponent:g}\times10^{{{exponent}}}$".replace(r"1\times", "")


def outer_legend(figure: Any, axes: Any, lines: Sequence[Any] | None = None, most: int = 4) -> None:
    """One legend outside the axes, above them, with as many columns as fit; at the side if there are many curves.

    Args:
        figure: of constrained layout.
        axes: whose curves it names. A legend that these have is removed.
        lines: what it names; None: all of the axes that have a label.
        most: columns at most.
    """
    handles = axes.get_legend_handles_labels()[0] if lines is None else lines
    if (own := axes.get_legend()) is not None:
        own.remove()
    if len(handles) > MANY:
        figure.legend(
            handles=handles, loc="outside right upper", fontsize="small", ncols=-(-len(handles) // 25)
        )
    elif handles:
        widest = max(len(handle.get_label()) for handle in handles)
        letters = figure.bbox.width / figure.dpi * 10  # about so many letters of FONT points fit into an inch
        columns = max(1, min(len(handles), most, int(letters // (widest + 5))))
        figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def legend(axes: Any, own: bool) -> None:
    """The legend of a function's curves, if these have labels: outside the axes of an own figure, inside given axes."""
    if not axes.get_legend_handles_labels()[0]:
        return
    if own:
        outer_legend(axes.figure, axes)
    else:
        axes.legend()


def named(text: str) -> str:
    """A text of the user as a label: matplotlib takes $ for mathematics, and hides a label that begins with _."""
    text = str(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def titled(axes: Any, text: str) -> None:
    """A title, unless the axes have one."""
    if text and not axes.get_title():
        axes.set_title(named(text))
