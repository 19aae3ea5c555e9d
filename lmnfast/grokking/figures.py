"""A run in the form of a row of the paper's Figure 2 (arXiv 2310.05918), with the paper's curves beside ours."""

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import plot
from .._drawing import BLACK, BLUE, GREEN, VERMILION, log_axis, outer_legend, readable
from .._files import csv_entries
from ..runs.figures import save
from .config import Config
from .run import Run, read_run
from .tasks import task_sizes

LMN, L2, ACCURACY = VERMILION, GREEN, BLUE
METHOD_LINES = {
    "path": (LMN, "-"),
    "hermite": (ACCURACY, "--"),
    "hermite-midpoint": (BLACK, ":"),
    "jacobian": (L2, "-."),
}


def paper_curves(task: str) -> dict[str, list[float]]:
    """The paper's curves for a task: step, lmn of hidden_1, l2_norm. Values are NaN where another line covers the curve.

    Source: arXiv 2310.05918, Figure 2, read from the pixels. The error is about 0.15 in LMN and 0.1 in L2 norm.
    """
    lines = files(__package__).joinpath("figure2_curves.csv").read_text().splitlines()
    head, *entries = csv_entries("\n".join(line for line in lines if not line.startswith("#")))
    rows = [row for row in (dict(zip(head, line)) for line in entries) if row["task"] == task]
    return {name: [float(row[name] or "nan") for row in rows] for name in ("step", "lmn", "l2_norm")}


def draw(run: str | os.PathLike, *, log: bool = False) -> list[Path]:
    """Draws RUN/figures/figure2-LAYER.png for each measured layer. Needs matplotlib.

    Left: LMN, L2 norm and accuracies over the steps, with the paper's curves if the task has the paper's size.
    Right: test loss against LMN and against L2 norm, coloured by phase.

    Args:
        run: the run's directory.
        log: whether the axis of the steps is logarithmic.

    Returns:
        The paths of the figures.

    Raises:
        ValueError: not a run.
    """
    done = read_run(run)
    return [
        draw_layer(done, layer, done.path / "figures" / f"figure2-{layer}.png", log=log)
        for layer in done.config.layers
    ]


def draw_methods(table: Path, rows: list[dict]) -> Path:
    """Draws a table of `measure` with several methods, one panel per layer. Needs matplotlib.

    Args:
        table: the path of the table.
        rows: the rows of the table.

    Returns:
        RUN/figures/methods-LAYERS-METHODS-RULEPOINTS.png.
    """
    from matplotlib.figure import Figure

    methods = rows[0]["method"].split("+")
    layers = list(
        dict.fromkeys(
            name.removeprefix("lmn_").rpartition("_")[0] for name in rows[0] if name.startswith("lmn_")
        )
    )
    with readable():
        figure = Figure(figsize=(1.5 + 5 * len(layers), 4.4), layout="constrained")
        panels = figure.subplots(1, len(layers), squeeze=False)[0]
        for axes, layer in zip(panels, layers, strict=True):
            for method in methods:
                colour, style = METHOD_LINES[method]
                values = [row[f"lmn_{layer}_{method}"] for row in rows]
                axes.plot([row["step"] for row in rows], values, style, color=colour, label=method)
            axes.set(title=layer, xlabel="Training step", ylim=(0, None))
            axes.locator_params(axis="x", nbins=5)
        what = "LMN, and its stand-ins by name" if "path" in methods else "Stand-ins for LMN"
        panels[0].set_ylabel(f"{what}\n({rows[0]['samples']} samples)")
        outer_legend(figure, panels[0])
        return save(figure, table.parent / "figures" / f"methods{table.stem.removeprefix('measure')}.png")


def draw_layer(
    run: Run, layer: str, path: Path, dpi: int = 200, colours: int | None = None, log: bool = False
) -> Path:
    """Draws the figure of one layer, as in `draw`, into a file; returns the path of the file."""
    from matplotlib.figure import Figure

    config = run.config
    with readable():
        figure = Figure(figsize=(13, 4.8), layout="constrained")
        samples = run.rows[0].get("samples", config.samples)
        said = f"{config.task}, seed {config.seed}: LMN of {layer}, N = {samples}"
        figure.suptitle(said if config.method == "path" else f"{said}, {config.method}")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.15, 1])[0]
        _draw_curves(left, run, layer, log)
        _draw_losses(right, run, layer)
        return save(figure, path, dpi, colours)


def named(config: Config, samples: bool = True) -> str:
    """The label of a run's numbers: "LMN"; for a method other than path with the method in brackets, as "LMN (jacobian)".

    Args:
        config: of the run.
        samples: whether to add the number of samples, if not all samples are measured.
    """
    of = [config.method] * (config.method != "path")
    if samples and config.samples is not None:
        of.append(f"{config.samples} samples")
    return f"LMN ({', '.join(of)})" if of else "LMN"


def _draw_curves(figure: Any, run: Run, layer: str, log: bool) -> None:
    config, rows = run.config, run.rows
    axes = figure.subplots()
    accuracy = axes.twinx()
    steps = [row["step"] for row in rows]
    lines = []
    for column, label, colour in ((f"lmn_{layer}", named(config), LMN), ("l2_norm", "L2 norm", L2)):
        lines += axes.plot(steps, [row[column] for row in rows], color=colour, linewidth=2, label=label)
    for column, label, style in (
        ("test_accuracy", "Test accuracy", "-"),
        ("train_accuracy", "Train accuracy", "--"),
    ):
        values = [row[column] for row in rows]
        lines += accuracy.plot(steps, values, style, color=ACCURACY, linewidth=1.2, label=label)
    if task_sizes(config.task) == task_sizes(config.task, p=config.p, bits=config.bits):
        paper = paper_curves(config.task)
        for column, label, colour in (("lmn", "LMN, paper", LMN), ("l2_norm", "L2 norm, paper", L2)):
            if column == "l2_norm" or (layer == "hidden_1" and config.samples is None):
                dots = {"linestyle": "", "marker": ".", "markersize": 5, "alpha": 0.6}
                lines += axes.plot(paper["step"], paper[column], color=colour, label=label, **dots)
    axes.set(xlabel="Training step", ylabel="LMN, L2 norm", ylim=(0, None), xlim=(0, config.steps or 1))
    accuracy.set_ylabel("Accuracy", color=ACCURACY)
    accuracy.set_ylim(-0.03, 1.06)
    accuracy.tick_params(axis="y", colors=ACCURACY)
    axes.locator_params(axis="x", nbins=5)
    if log:
        log_axis(axes.xaxis)
    outer_legend(figure, axes, lines, most=3)


def _draw_losses(figure: Any, run: Run, layer: str) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    rows = [row | {"phase": run.phase(row)} for row in run.rows]
    ended = run.generalised is not None and any(row["phase"] == "generalising" for row in rows)
    columns = {f"lmn_{layer}": f"{named(run.config)} of {layer}", "l2_norm": "L2 norm"}
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        plot.against(rows, column, "test_loss", phase="generalising" if ended else None, ax=axes)
        if not ended:
            axes.set_title("")  # without an end of the phase there is no correlation over it
        axes.set(xlabel=label, ylabel="")
    panels[0].set_ylabel("Test loss (nats)")
    panels[1].get_legend().remove()
    outer_legend(figure, panels[0], most=3)
