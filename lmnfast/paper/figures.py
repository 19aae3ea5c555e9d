"""The paper's figures (arXiv 2310.05918) from a study: Figures 1, 3 and 4, Figure 2 over seeds, XOR's second rise, and
figures that answer the report's questions. All need matplotlib; draw_connectivity also needs scikit-learn."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import plot
from .._connectivity import connectivity
from .._drawing import BLACK, COLOURS, GREY, ORANGE, PURPLE, SKY, STYLES, band, log_axis
from .._eigenvalues import eigenvalues, linear_mapping_number
from ..cutting import cut
from ..grokking.config import start
from ..grokking.figures import ACCURACY, L2, LMN, paper_curves
from ..grokking.run import Run, load_checkpoint
from ..runs.figures import save
from .answers import EPSILON, RULES, STAND_INS
from .claims import PAPER, at_start
from .curves import COLUMN, LAYER, PAPER_ENDS, generalising, second_rise
from .rulers import Ruler, rulers
from .study import Seed

# With 256 colours a file has a third of the bytes. A figure with a colour bar needs all colours.
SMALL: dict[str, Any] = {"dpi": 110, "colours": 256}
STYLE: dict[Any, Any] = {"font.size": 11, "legend.frameon": False, "lines.linewidth": 1.8}
MORE = (PURPLE, ORANGE, SKY, BLACK)
CLUSTERS = 10  # as in the paper
LABEL = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}


def draw_idea(path: Path) -> Path:
    """Figure 1, the idea: a ReLU network on the plane with its linear regions, three pairs of samples, the outputs along their
    paths, and the connectivity matrix of all samples."""
    from matplotlib import rc_context
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    generator = torch.Generator().manual_seed(4)
    network = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
    samples = 4 * torch.rand(24, 2, generator=generator, dtype=torch.float64) - 2
    L = connectivity(network, samples)
    flat = (L + torch.diag(torch.full((len(L),), math.nan))).flatten()
    order = flat.argsort()[: flat.numel() - len(L)]
    pairs = [divmod(int(order[k]), len(L)) for k in (len(order) - 1, len(order) // 3, 0)]  # straight to bent

    axis = torch.linspace(-2, 2, 400, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        first = network[0](plane)
        signs = torch.cat([first > 0, network[2](first.relu()) > 0], dim=1).double()
    code = (signs @ 2.0 ** torch.arange(signs.shape[1], dtype=torch.float64)).unique(return_inverse=True)[1]
    shades = np.random.default_rng(0).uniform(0.75, 1, (int(code.max()) + 1, 3))
    with rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        left.imshow(
            code.view(400, 400).T.numpy(), origin="lower", extent=(-2, 2, -2, 2), cmap=ListedColormap(shades)
        )
        left.plot(*samples.T.numpy(), "k.", markersize=4)
        for (i, j), colour, name in zip(pairs, COLOURS, "ABC"):
            ends = samples[[i, j]]
            left.plot(*ends.T.numpy(), "o-", color=colour)
            place = {"xytext": (7, 7), "textcoords": "offset points"}
            left.annotate(name, ends.mean(0).tolist(), color=colour, weight="bold", bbox=LABEL, **place)
        left.set(xlabel="First input", ylabel="Second input")
        plot.paths(network, samples, pairs, labels="ABC", ax=middle)
        left.set_title(f"{int(code.max()) + 1} linear regions, {len(samples)} samples")
        middle.set_title("The output along three paths")
        plot.connectivity(_reordered(L, 4), ax=right)
        return save(figure, path, 110)


def _reordered(L: Tensor, clusters: int) -> Tensor:
    """The matrix with its rows and columns ordered by cluster, large clusters first, by scikit-learn's spectral clustering."""
    from sklearn.cluster import SpectralClustering
    from threadpoolctl import threadpool_limits

    model = SpectralClustering(clusters, affinity="precomputed", random_state=0)
    with threadpool_limits(1):  # many small steps are slower on several threads
        found = model.fit_predict(L.double().clamp(0, 1).numpy())
    counts = np.bincount(found, minlength=clusters)
    order = np.lexsort((found, -counts[found]))
    return L[order][:, order]


def draw_seeds(seeds: Sequence[Seed], path: Path) -> Path:
    """Figure 2 over seeds: medians, the middle half and the range, with the paper's curves on top."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    runs = [seed.run for seed in seeds]
    task = runs[0].config.task
    steps = [row["step"] for row in runs[0].rows]
    with rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.5), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
        accuracy = left.twinx()
        for axes, column, label, colour in (
            (left, COLUMN, "LMN", LMN),
            (left, "l2_norm", "L2 norm", L2),
            (accuracy, "test_accuracy", "test accuracy", ACCURACY),
        ):
            curves = [[row[column] for row in run.rows] for run in runs]
            band(axes, steps, curves, color=colour, label=label)
        paper = paper_curves(task)
        for column, colour in (("lmn", LMN), ("l2_norm", L2)):
            left.plot(
                paper["step"], paper[column], ".", color=colour, markersize=6, alpha=0.7, mec="k", mew=0.3
            )
        left.plot([], [], ".k", label="dots: the paper's")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10)
        left.set(xlabel="Training step", ylabel="LMN, L2 norm", ylim=(0, None), xlim=(0, steps[-1] or 1))
        left.set_title(f"{task}, {len(runs)} seeds", fontsize=11)
        left.locator_params(axis="x", nbins=5)
        accuracy.set_ylim(-0.03, 1.06)
        accuracy.set_ylabel("Test accuracy", color=ACCURACY)
        accuracy.tick_params(axis="y", colors=ACCURACY)
        rows = [found for run in runs if (found := generalising(run))]
        for axes, column, label in ((middle, COLUMN, "LMN"), (right, "l2_norm", "L2 norm")):
            if rows:
                plot.against(rows, column, "test_loss", ax=axes)
            axes.set(xlabel=f"{label} while generalising", ylabel="Test loss (nats)")
        return save(figure, path, **SMALL)


def _band_of(
    axes: Any, tables: Sequence[dict[int, float]], label: str, colour: str, style: str = "-"
) -> None:
    """A `band` from one table per seed. All tables have the same keys."""
    x = sorted(tables[0])
    curves = [[table[key] for key in x] for table in tables]
    band(axes, x, curves, color=colour, linestyle=style, label=label)


def draw_layers(seeds: dict[str, list[Seed]], path: Path) -> Path:
    """Figure 3: LMN of every layer, of the seeds that have it. A Linear between two layers does not change LMN."""
    layers = {
        "embedding (and before the first SiLU)": ("embedding", ACCURACY),
        "hidden_1 (and before the second SiLU)": (LAYER, LMN),
        "hidden_2": ("hidden_2", L2),
    }

    def panel(axes: Any, members: list[Seed]) -> None:
        for label, (layer, colour) in layers.items():
            _band_of(axes, [seed.lmn(layer) for seed in members if seed.relu is not None], label, colour)
        tables = [seed.answer("layers", "stabilised") for seed in members if seed.relu is not None]
        _band_of(axes, tables, f"hidden_2, {EPSILON} in r²", PURPLE)
        axes.set(xlabel="Training step", title=members[0].run.config.task)
        log_axis(axes.yaxis)

    return panels_of_tasks(seeds, path, panel, "LMN")


def panels_of_tasks(of_tasks: Mapping[str, Any], path: Path, panel: Callable, ylabel: str) -> Path:
    """One panel for each task, with one legend.

    Args:
        of_tasks: for each task what its panel shows.
        path: the file.
        panel: draws into the axes of a panel what it shows.
        ylabel: of the first panel.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(1 + 4 * len(of_tasks), 3.9), layout="constrained")
        row = figure.subplots(1, len(of_tasks), squeeze=False)[0]
        for axes, shown in zip(row, of_tasks.values(), strict=True):
            panel(axes, shown)
        row[0].set_ylabel(ylabel)
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(of_tasks))
        return save(figure, path, **SMALL)


def draw_connectivity(run: Run, path: Path) -> Path:
    """Figure 4: the matrix, reordered into clusters, and its eigenvalues; at step 0, memorised, generalised."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    known = {"at initialisation": 0, "memorised": run.memorised, "generalised": run.generalised}
    moments = {name: step for name, step in known.items() if step is not None}
    task, model = start(run.config)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(moments), 6.6), layout="constrained")
        matrices, spectra = figure.subplots(2, len(moments), height_ratios=[1.6, 1], squeeze=False)
        for upper, lower, (name, step) in zip(matrices, spectra, moments.items(), strict=True):
            load_checkpoint(model, run.path, step)
            L = connectivity(*cut(model, LAYER, task.train_inputs)).cpu()
            plot.connectivity(_reordered(L, CLUSTERS), ax=upper)
            upper.set_title(f"{name}, step {step}: LMN {linear_mapping_number(L):.1f}", fontsize=11)
            w = eigenvalues(L).sort(descending=True).values
            lower.plot(w.numpy(), ".", color=LMN, markersize=2)
            lower.axhline(0, color=GREY, linewidth=0.8)
            lower.set(yscale="symlog", ylim=(-1e3, 1e3), xlabel="Index of the eigenvalue")
            lower.set_yscale("symlog", linthresh=1e-2)
        spectra[0].set_ylabel("Eigenvalue")
        return save(figure, path, 80)


def draw_second_rise(seeds: Sequence[Seed], path: Path) -> Path:
    """LMN of every seed, with the valley and the top of its second rise, and the paper's curve."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    paper = paper_curves(seeds[0].run.config.task)
    columns, size = (min(4, len(seeds)), 3.2) if len(seeds) <= 8 else (8, 1.9)
    with rc_context(STYLE):
        rows = -(-len(seeds) // columns)
        figure = Figure(figsize=(size * columns, 0.8 * size * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for axes, seed in zip(grid, seeds):
            run = seed.run
            axes.plot(paper["step"], paper["lmn"], ".", color=GREY, markersize=3)
            axes.plot(
                [row["step"] for row in run.rows], [row[COLUMN] for row in run.rows], color=LMN, linewidth=1.2
            )
            if rise := second_rise(run):
                axes.plot(rise.valley_step, rise.valley, "v", color=ACCURACY)
                axes.plot(rise.top_step, rise.top, "^", color=L2)
            axes.axvline(PAPER_ENDS, color=GREY, linewidth=0.8, linestyle=":")
            axes.set_title(f"seed {run.config.seed}", fontsize=10)
        figure.supxlabel("Training step (dotted: where the paper ends; dots: the paper's curve)", fontsize=10)
        figure.supylabel("LMN", fontsize=10)
        return save(figure, path, **SMALL)


def draw_questions(seeds: Sequence[Seed], path: Path) -> Path:
    """The answers to the report's questions for one task: six panels, medians over seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(13, 7.6), layout="constrained")
        (init, nodes, number), (samples, negative, stand_ins) = figure.subplots(2, 3)
        for k, how in enumerate(("exact", "stabilised")):
            values = [at_start(seed, f"{how}: LMN") for seed in seeds]
            init.plot([k] * len(values), values, ".", color=(LMN, ACCURACY)[k])
        paper = PAPER[seeds[0].run.config.task]["LMN at step 0"]
        init.axhline(paper, color=GREY, linestyle=":", label="the paper's")
        init.set_xticks((0, 1), ("r² as defined", f"{EPSILON} in r²"))
        init.set(title="Step 0", ylabel="LMN", xlim=(-0.5, 1.5), ylim=(0, None))

        for k, (rule, points) in enumerate(RULES):
            errors = [relative_errors(seed, "nodes", f"{rule} {points}") for seed in seeds]
            values = [100 * abs(e) for table in errors for e in table.values()]
            nodes.plot(
                [k] * len(values), np.maximum(values, 1e-5), ".", color=L2 if rule == "lobatto" else LMN
            )
        nodes.set(title="Other nodes: error against 21 points", yscale="log", ylabel="Error of LMN (%)")
        nodes.set_xticks(range(len(RULES)), [f"{rule}\n{points}" for rule, points in RULES], fontsize=8)

        steps = sorted({row["step"] for row in seeds[0].answers if row["question"] == "number"})
        for step, colour in zip(steps, (ACCURACY, LMN, L2, *MORE)):
            _band_of(number, [seed.of_sizes(step) for seed in seeds], f"step {step}", colour)
        number.set(title="Number of samples N", xlabel="N", ylabel="LMN")

        _over_steps(samples, seeds, "samples", ("train", "both", "test", "train, as many as test"))
        samples.set_title("Which samples")
        for axis in (number.xaxis, number.yaxis, samples.yaxis):
            log_axis(axis)
        _over_steps(negative, seeds, "samples", ("train",), {"train": "absolute value"})
        _over_steps(negative, seeds, "negative", ("clipped",), {"clipped": "negative ones clipped"}, 1)
        negative.set(title="Negative eigenvalues")
        _over_steps(stand_ins, seeds, "samples", ("train",), {"train": "path (LMN)"})
        _over_steps(stand_ins, seeds, "stand-ins", STAND_INS, {}, 1)
        stand_ins.set(title="Stand-ins")
        for axes in (init, number, samples, negative, stand_ins):
            axes.legend(fontsize=9)
        return save(figure, path, **SMALL)


def _over_steps(
    axes: Any,
    seeds: Sequence[Seed],
    question: str,
    variants: Iterable[str],
    names: dict | None = None,
    skip: int = 0,
) -> None:
    for variant, colour, style in zip(variants, (LMN, ACCURACY, L2, *MORE)[skip:], (*STYLES, *STYLES)[skip:]):
        tables = [seed.answer(question, variant) for seed in seeds]
        _band_of(axes, tables, (names or {}).get(variant, variant), colour, style)
    axes.set(xlabel="Training step", ylabel="LMN")


def relative_errors(seed: Seed, question: str, variant: str) -> dict[int, float]:
    """Errors of a variant relative to the LMN of the training samples, by step."""
    exact = seed.lmn(LAYER)
    return {step: value / exact[step] - 1 for step, value in seed.answer(question, variant).items()}


def draw_regions(seeds: dict[str, list[Seed]], path: Path) -> Path:
    """ReLU networks: LMN, and the number of linear regions that the samples lie in, over training."""

    def panel(axes: Any, members: list[Seed]) -> None:
        asked = [(seed.relu, seed.answer("regions")) for seed in members if seed.relu is not None]
        rows = asked[0][0].rows
        curves = [[row[COLUMN] for row in relu.rows] for relu, _ in asked]
        band(axes, [row["step"] for row in rows], curves, color=LMN, label="LMN")
        _band_of(axes, [regions for _, regions in asked], "linear regions", ACCURACY)
        axes.axhline(rows[0]["samples"], color=GREY, linestyle=":", label="N")
        axes.set(xlabel="Training step", title=members[0].run.config.task)
        log_axis(axes.yaxis)

    return panels_of_tasks(seeds, path, panel, "LMN, regions")


def draw_rulers(seeds: dict[str, list[Seed]], path: Path) -> Path:
    """Every observable: its r with the test loss while generalising, and its lead, one dot a seed, with the medians."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(3 + 3.2 * len(seeds), 7), layout="constrained")
        grid = figure.subplots(2, len(seeds), squeeze=False, sharey=True)
        for (upper, lower), (task, members) in zip(grid.T, seeds.items(), strict=True):
            known = list(rulers(members))
            _dots(upper, known, [ruler.r.known for ruler in known])
            upper.set(title=task, xlabel="r with the test loss")
            _dots(lower, known, [ruler.lead.known for ruler in known])
            lower.axvline(0, color=GREY, linewidth=0.8)
            lower.set_xlabel("Lead (steps)")
        return save(figure, path, **SMALL)


def _dots(axes: Any, known: Sequence[Ruler], values: Sequence[Sequence[float]]) -> None:
    """One row for each observable, the first at the top."""
    for k, each in enumerate(values):
        axes.plot(each, [k] * len(each), ".", color=LMN, alpha=0.4)
        if each:
            axes.plot(np.median(each), k, "|", color=BLACK, markersize=14)
    axes.set_yticks(range(len(known)), [ruler.name for ruler in known], fontsize=9)
    axes.set_ylim(len(known) - 0.5, -0.5)
