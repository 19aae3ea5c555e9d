"""Figures of your own measurements: the extra `plot`.

Each function draws into matplotlib Axes and returns them. With ax=None it makes a new figure of pyplot, which a notebook shows;
text and frames have the colours of matplotlib's style, light or dark.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from ._drawing import (
    KINDS,
    MARKERS,
    STYLES,
    WIDTH,
    band,
    colours,
    legend,
    log_axis,
    matplotlib,
    named,
    panels,
    scale,
    titled,
)
from ._eigenvalues import check_matrix, eigenvalues, linear_mapping_number
from ._extras import required
from ._outputs import outputs_of
from ._pairs import measured_pairs
from ._samples import checked_samples
from ._series import (
    Curve,
    Row,
    curves_of,
    label_of,
    label_of_layer,
    observables_in,
    pearson,
    points_of,
    runs_of,
    settings_of,
)
from ._settings import Settings
from ._undisturbed import evaluating

__all__ = ["against", "connectivity", "history", "paths", "spectrum"]

ROUNDING = 1e-9  # of the largest eigenvalue: what is below is rounding
SQUARE = (5.4, 4.6)  # inches of a panel with a matrix and its colour bar
MATRICES = {"jacobian": "2 ⟨Jᵢ, Jⱼ⟩ / (|Jᵢ|² + |Jⱼ|²)"}  # what an entry of the matrix is; r² by other methods


def history(
    rows: Any,
    observables: str | Sequence[str] | None = None,
    *,
    x: str = "step",
    log: bool = False,
    layers: str | Sequence[str] | None = None,
    ax: Any = None,
) -> Any:
    """Draws numbers over the steps of a training: one panel for each number, one curve for each layer.

    Of several runs it draws the median, the middle half of the runs (dark band) and their whole range (light band), at the
    steps that all of them have.

    Args:
        rows: a list of rows, as `Probe.history`, :func:`lmnfast.history` and `measure_checkpoints` return them; a list of such
            lists, one for each run; or a dict of either, whose keys name the curves. A pandas.DataFrame counts as a list.
        observables: names of columns, or of what columns such as lmn_LAYER begin with. None: LMN, or if the rows have none, the
            observables that they have.
        x: the column of the horizontal axis.
        log: whether that axis is logarithmic. A step 0 stands at its left end.
        layers: the layers to draw; None: all.
        ax: as many Axes as observables. None: a new figure, with the panels below one another.

    Returns:
        The Axes; for several observables a numpy array of them.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: the rows are none.
        ValueError: no rows; a column or a layer that the rows lack, or a column without numbers; runs that have no x in common.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> with lmnfast.Probe(model, torch.randn(30, 8), "0", every=10, observables=["lmn", "curvature"]) as probe:
        ...     measured = [probe(step) for step in range(50)]
        >>> ax = lmnfast.plot.history(probe.history)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('Training step', 'LMN (N = 30)')
        >>> lmnfast.plot.history(probe.history, ["lmn", "curvature"], log=True).shape
        (2,)
    """
    groups = runs_of(rows)
    names = observables_in(groups) if observables is None else _listed("observables", observables)
    drawn = [_bands(groups, name, x, None if layers is None else _listed("layers", layers)) for name in names]
    every = [row for runs in groups.values() for run in runs for row in run]
    keys = list(dict.fromkeys(key for bands in drawn for key in bands))
    layers_of = {layer for layer, _ in keys if layer}
    only = (
        layers_of.pop() if len(layers_of) == 1 else ""
    )  # one layer stands in the title, several in the legend
    counts = sorted({len(runs) for runs in groups.values()})
    with panels(ax, len(names), size=(WIDTH, 4.4 if len(names) == 1 else 2.8)) as axes:
        colour_of = dict(zip(keys, colours(axes[0], len(keys))))
        for each, name, bands in zip(axes, names, drawn):
            for (key, (places, curves)), style in zip(bands.items(), cycle(STYLES)):
                count = f"{len(curves)} runs" if len(counts) > 1 and len(curves) > 1 else ""
                label = named(", ".join(part for part in (*key, count) if part not in ("", only))) or None
                marker = "." if len(places) <= 50 else ""
                band(each, places, curves, color=colour_of[key], linestyle=style, marker=marker, label=label)
            each.set_ylabel(label_of(name, every))
            if log:
                log_axis(each.xaxis)
        axes[-1].set_xlabel(label_of(x, every))
        of = f"median, middle half and range of {counts[0] if len(counts) == 1 else 'the'} runs"
        said = [only] * bool(only) + [of if only else of.capitalize()] * (counts != [1])
        titled(axes[0], ": ".join(said))
        axes[0].figure.align_ylabels()
        legend(axes[0], ax is None)
    return axes[0] if len(names) == 1 else axes


def _listed(argument: str, names: Any) -> list[str]:
    found: list[Any] = [names] if isinstance(names, str) else []
    found = list(names) if not found and isinstance(names, Iterable) else found
    if not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{argument}: expected a name or several, got {names!r}")
    return found


def _bands(
    groups: Mapping[str, list[list[Row]]], name: str, x: str, layers: Sequence[str] | None
) -> dict[tuple[str, str], tuple[list[float], list[list[float]]]]:
    """What a panel shows: by layer and group, the places and the curve of every run."""
    found = {}
    for group, runs in groups.items():
        of_runs = [curves_of(run, name, x, "observables") for run in runs]
        there = list(of_runs[0])
        if several := next((list(curves) for curves in of_runs if list(curves) != there), None):
            raise ValueError(
                f"rows: expected runs with the same layers, got {', '.join(there)} and {', '.join(several)}"
            )
        if layers is not None and there != [""]:
            if unknown := [layer for layer in layers if layer not in there]:
                raise ValueError(f"layers: expected among {', '.join(there)}, got {unknown[0]!r}")
            there = [layer for layer in there if layer in layers]
        for layer in there:
            curves = [curves[layer] for curves in of_runs if layer in curves]
            found[layer, group] = _in_common(curves, x)
    return found


def _in_common(curves: Sequence[Curve], x: str) -> tuple[list[float], list[list[float]]]:
    places = [place for place in curves[0] if all(place in curve for curve in curves)]
    if not places:
        raise ValueError(f"x: expected runs that have some {x} in common, got none")
    return places, [[curve[place] for place in places] for curve in curves]


def against(
    rows: Any,
    x: str = "lmn",
    y: str = "test_loss",
    *,
    layer: str | None = None,
    colour: str | None = None,
    phase: str | None = None,
    ax: Any = None,
) -> Any:
    """Draws one number of the rows against another, a dot for each row, and says Pearson's r.

    Args:
        rows: as in :func:`history`. Of several runs the r is the median of theirs.
        x, y: names of columns, or of what columns such as lmn_LAYER begin with.
        layer: the layer whose numbers are drawn, if there are several.
        colour: the column that colours the dots: words, as phases, or numbers. None: "phase" if the rows have it, else "step".
        phase: r is that of the rows with this value in the column "phase". None: of all rows.
        ax: Axes. None: a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: the rows are none.
        ValueError: no rows; a column, layer or phase that the rows lack; several layers and none named; a column without
            numbers.

    Source:
        arXiv 2310.05918, Figure 2, right.

    Example:
        >>> rows = [{"step": s, "lmn": 10 - s + s % 2, "test_loss": 5 - s / 2, "samples": 500} for s in range(8)]
        >>> ax = lmnfast.plot.against(rows)
        >>> ax.get_xlabel(), ax.get_title()
        ('LMN (N = 500)', 'r = 0.976')
    """
    runs = [run for group in runs_of(rows).values() for run in group]
    points = [points_of(run, x, y, layer) for run in runs]
    every = [row for run in points for _, _, row in run]
    if not every:
        raise ValueError(f"rows: expected rows with numbers in {x!r} and {y!r}, got none")
    if phase is not None and phase not in (there := {row.get("phase") for row in every}):
        raise ValueError(
            f"phase: expected one of the rows' ({', '.join(sorted(map(str, there)))}), got {phase!r}"
        )
    colour = colour or ("phase" if any(row.get("phase") for row in every) else "step")
    values = [row.get(colour) for row in every]
    counted = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    r = [pearson([(a, b) for a, b, row in run if phase in (None, row.get("phase"))]) for run in points]
    with panels(ax, size=(6.2, 4.6)) as (axes,):
        a, b = ([*(p[0] for run in points for p in run)], [*(p[1] for run in points for p in run)])
        if counted:
            shown = axes.scatter(a, b, s=22, c=values, cmap=scale(axes), clip_on=False, zorder=3)
            axes.figure.colorbar(shown, ax=axes, label=label_of(colour, every))
        else:
            _scatter_kinds(axes, a, b, [str(value) for value in values])
        xlabel, ylabel = (label_of_layer(every, name, "x", layer) for name in (x, y))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        titled(axes, _said(r, phase))
        legend(axes, ax is None)
    return axes


def _scatter_kinds(axes: Any, a: Sequence[float], b: Sequence[float], values: Sequence[str]) -> None:
    """Dots by word, in the order in which the words come."""
    for (k, kind), marker in zip(enumerate(dict.fromkeys(values)), MARKERS * len(values)):
        chosen = [i for i, value in enumerate(values) if value == kind]
        look = {"color": KINDS[k % len(KINDS)], "marker": marker, "label": named(kind)}
        axes.scatter([a[i] for i in chosen], [b[i] for i in chosen], s=22, clip_on=False, zorder=3, **look)


def _said(r: Sequence[float], phase: str | None) -> str:
    known = [each for each in r if not math.isnan(each)]
    if not known:
        return ""
    said = f"r = {np.median(known):.3f}" + (f", median of {len(known)} runs" if len(r) > 1 else "")
    return f"{phase}: {said}" if phase else said


def connectivity(L: Any, *, cluster: bool = False, ax: Any = None) -> Any:
    """Draws a connectivity matrix, with its LMN.

    Args:
        L: (N, N), as :func:`lmnfast.connectivity` returns it; or a `Measurement`.
        cluster: reorder the samples so that those whose outputs run straight to each other stand together: the leaves of
            average linkage on the distance 1 - |L|. Needs scipy.
        ax: Axes. None: a new figure.

    Returns:
        The Axes. ``ax.images[0].set_clim(0.9, 1)`` changes the range of the colours.

    Raises:
        ImportError: matplotlib, or for clusters scipy, is not installed.
        TypeError, ValueError: as :func:`lmnfast.eigenvalues`; ValueError also for more than one matrix.

    Source:
        arXiv 2310.05918, Figure 4.

    Example:
        >>> groups = torch.arange(20) % 2
        >>> ax = lmnfast.plot.connectivity((groups == groups[:, None]).double(), cluster=True)
        >>> ax.get_title(), int(ax.images[0].get_array()[:10, :10].min())
        ('LMN 2, N = 20', 1)
    """
    matrix, title, method, _ = _matrix_of(L)
    order = _leaves(matrix) if cluster else np.arange(len(matrix))
    entries = matrix.double().numpy()[np.ix_(order, order)]
    below = entries.min() < -1e-3  # a stand-in: r2 has no negative entries
    with panels(ax, size=SQUARE) as (axes,):
        range_ = (
            {"vmin": -1, "vmax": 1, "cmap": "RdBu_r"} if below else {"vmin": 0, "vmax": 1, "cmap": "viridis"}
        )
        image = axes.imshow(entries, interpolation="antialiased", **range_)
        axes.figure.colorbar(image, ax=axes, label=MATRICES.get(method, "r²"))
        name = "Sample, by cluster" if cluster else "Sample"
        axes.set(xlabel=name, ylabel=name)
        titled(axes, title)
    return axes


def _leaves(matrix: Tensor) -> np.ndarray:
    hierarchy = required("scipy.cluster.hierarchy", "plot")
    if len(matrix) < 2:
        return np.arange(len(matrix))
    distances = (1 - matrix.double().abs()).clamp(min=0)
    first, second = torch.triu_indices(len(matrix), len(matrix), 1)
    return hierarchy.leaves_list(hierarchy.linkage(distances[first, second].numpy(), "average"))


def _matrix_of(L: Any) -> tuple[Tensor, str, str, str]:
    """The matrix on the CPU, its title, its method, and how negative eigenvalues count. L: a matrix or a measurement."""
    if hasattr(L, "connectivity"):
        fields = ("samples", "method", "negative", "stabiliser")
        said = settings_of([{name: getattr(L, name) for name in fields}])
        return L.connectivity.detach().cpu(), f"LMN {L.lmn:.4g}, {said}", L.method, L.negative
    check_matrix(L)
    if L.dim() != 2:
        raise ValueError(f"L: expected one matrix (N, N), got shape {tuple(L.shape)}")
    matrix = L.detach().cpu()
    return matrix, f"LMN {float(linear_mapping_number(matrix)):.4g}, N = {len(matrix)}", "path", "absolute"


def spectrum(L: Any, *, ax: Any = None) -> Any:
    """Draws the eigenvalues of a connectivity matrix by falling magnitude, negative ones marked, with its LMN.

    Args:
        L: (N, N), as :func:`lmnfast.connectivity` returns it; or a `Measurement`.
        ax: Axes. None: a new figure.

    Returns:
        The Axes. Eigenvalues below 1e-9 of the largest, which are rounding, are left out.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as :func:`lmnfast.eigenvalues`; ValueError also for more than one matrix.

    Source:
        arXiv 2310.05918, Figure 4.

    Example:
        >>> ax = lmnfast.plot.spectrum(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        >>> ax.get_title(), ax.lines[0].get_ydata()
        ('LMN 1.755, N = 2', array([1.5, 0.5]))
    """
    matrix, title, _, negative = _matrix_of(L)
    kept = hasattr(L, "connectivity")
    w = (L.eigenvalues.detach().cpu() if kept else eigenvalues(matrix)).numpy()
    rank, size = np.arange(1, len(w) + 1), np.abs(w)
    share = L.negative_share if kept else size[w < 0].sum() / size.sum()
    seen = size > ROUNDING * size.max()
    with panels(ax, size=(6.2, 4.6)) as (axes,):
        below, above = colours(axes, 2)
        small = {"linestyle": "", "markersize": 4 if len(w) > 100 else 6}
        axes.plot(rank[seen & (w > 0)], size[seen & (w > 0)], "o", color=above, label="positive", **small)
        if (negatives := seen & (w < 0)).any():
            clipped = ", count as 0" if negative == "clip" else ""
            label = f"negative, {100 * share:.2g} % of the sum{clipped}"
            axes.plot(rank[negatives], size[negatives], "x", color=below, label=label, **small)
            axes.legend(loc="upper right")
        axes.set(xlabel="Rank of the eigenvalue", ylabel="|Eigenvalue|", yscale="log")
        axes.set_ylim(min(0.5 * size[seen].min(), 1e-3 * size.max()), 3 * size.max())
        axes.set_xlim(1 - 0.03 * len(w), 1.03 * len(w))
        titled(axes, title)
    return axes


def paths(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    pairs: Sequence[tuple[SupportsIndex, SupportsIndex]],
    *,
    output: SupportsIndex | None = None,
    points: int = 21,
    rule: str = "uniform",
    labels: Sequence[str] | None = None,
    ax: Any = None,
) -> Any:
    """Draws what LMN sees: an output of f at the nodes of a few paths, with the chords between the paths' ends (dotted).

    The legend has the r2 of each pair, which is its entry of :func:`lmnfast.connectivity`, a mean over all outputs.

    Args:
        f: maps a batch (B, *in) to (B, *out), each row independent of the others. Outputs are flattened to K.
        x: (N, *in), floating point, the samples, of f's dtype and on its device.
        pairs: pairs (i, j) of different samples, by number from 0 on.
        output: the output to draw, from 0 to K - 1. None: the one that varies most along these paths.
        points, rule: as in :func:`lmnfast.connectivity`.
        labels: names of the pairs. None: "i → j".
        ax: Axes. None: a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as :func:`lmnfast.connectivity`. ValueError also for pairs or an output that there are not, and
            another number of labels.

    Source:
        arXiv 2310.05918, Figure 1 and Eq. 1.

    Example:
        >>> x = torch.linspace(-1, 1, 5)[:, None]
        >>> ax = lmnfast.plot.paths(torch.abs, x, [(0, 1), (0, 4)])
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['0 → 1: r² = 1.000', '0 → 4: r² = 0.000']
    """
    matplotlib()
    settings = Settings("path", points, rule)
    x = checked_samples(f, x)
    first, second = _checked_pairs(pairs, len(x))
    names = (
        [f"{i} → {j}" for i, j in zip(first.tolist(), second.tolist())] if labels is None else list(labels)
    )
    if len(names) != len(first):
        raise ValueError(f"labels: expected {len(first)}, one for each pair, got {len(names)}")
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    r2 = measured_pairs(f, x, settings, low, high).L.tolist()
    nodes = settings.nodes[0]
    t = nodes.to(x).reshape(-1, *[1] * (x.dim() - 1))
    with evaluating(f), torch.no_grad():
        of_pairs = [outputs_of(f, x[i] + t * (x[j] - x[i])).double().cpu() for i, j in zip(first, second)]
    y = torch.stack(of_pairs)  # (pairs, points, K)
    drawn = _output(output, y)
    with panels(ax, size=(6.2, 4.6)) as (axes,):
        for colour, name, curve, entry in zip(colours(axes, len(names)), names, y[..., drawn].numpy(), r2):
            axes.plot(nodes.numpy(), curve, ".-", color=colour, label=named(f"{name}: r² = {entry:.3f}"))
            axes.plot([0, 1], curve[[0, -1]], ":", color=colour)
        which = f"Output {drawn} (of 0 to {y.shape[-1] - 1})" if y.shape[-1] > 1 else "Output"
        axes.set(xlabel="t, from one sample to the other", ylabel=which)
        axes.legend(title=f"r²: mean over {y.shape[-1]} outputs" if y.shape[-1] > 1 else None)
    return axes


def _checked_pairs(pairs: Any, samples: int) -> tuple[Tensor, Tensor]:
    try:
        found = [(operator.index(i), operator.index(j)) for i, j in pairs]
    except (TypeError, ValueError):
        raise ValueError(f"pairs: expected pairs (i, j) of samples, got {pairs!r}") from None
    if not found:
        raise ValueError("pairs: expected one pair or more, got none")
    for i, j in found:
        if i == j or not (0 <= i < samples and 0 <= j < samples):
            raise ValueError(f"pairs: expected two different samples from 0 to {samples - 1}, got ({i}, {j})")
    first, second = torch.tensor(found).T
    return first, second


def _output(output: SupportsIndex | None, y: Tensor) -> int:
    if output is None:
        return int(y.var(1).sum(0).argmax())
    chosen, outputs = operator.index(output), y.shape[-1]
    if not 0 <= chosen < outputs:
        raise ValueError(f"output: expected 0 to {outputs - 1}, got {chosen}")
    return chosen


def matrix_and_spectrum(m: Any, *, cluster: bool = False, ax: Any = None) -> Any:
    """`connectivity` and `spectrum` side by side, for `Measurement.plot`. Returns the two Axes."""
    with panels(ax, 1, 2, SQUARE) as axes:
        connectivity(m, cluster=cluster, ax=axes[0])
        spectrum(m, ax=axes[1])
    return axes
