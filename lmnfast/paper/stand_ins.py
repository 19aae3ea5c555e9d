"""Compares the stand-ins for LMN with LMN over training: the tables and the figure of docs/methods.md.

lmnfast grok TASK --seed SEED --every 500 --out RUNS/TASK-SEED   for every task and seed; only the checkpoints are used
python -m lmnfast.paper.stand_ins RUNS/*                         measures values missing in VALUES, then writes both

``--relu DIRECTORY`` first trains a network with ReLU in place of SiLU for every task, and measures it too, with linear_regions.
Values in the file VALUES are not measured again, so a stopped study can be continued. To begin anew, delete the file.
"""

import argparse
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._connectivity import connectivity
from .._drawing import BLACK
from .._eigenvalues import linear_mapping_number
from .._series import pearson
from ..cutting import cut
from ..grokking.choices import TASKS
from ..grokking.config import Config, start
from ..grokking.figures import ACCURACY, L2, LMN
from ..grokking.run import load_checkpoint, read_config, steps_of
from ..grokking.training import train
from ..jacobian import linear_regions
from ..runs.device import processor
from ..runs.figures import save
from ..runs.tables import read_table, write_table
from .answers import STAND_INS

COLUMNS = ("run", "task", "seed", "activation", "step", "layer", "method", "value", "seconds")
# The last layer's tail is linear.
LAYERS = ("embedding", "hidden_1_pre", "hidden_1", "hidden_2_pre")
# A Linear between two layers does not change the paths between the samples, so both layers have the same exact LMN.
SAME_PATHS = {"hidden_1_pre": "embedding", "hidden_2_pre": "hidden_1"}
LOBATTO = tuple(f"lobatto {points}" for points in range(4, 10))
MARKS = {"hermite": ("s", ACCURACY), "hermite-midpoint": ("D", BLACK), "jacobian": ("^", L2)}
RELU: dict[str, Any] = {
    "activation": "relu",
    "steps": 5000,
    "every": 250,
    "points": 4,
    "rule": "lobatto",
    "threads": 1,
}


def _trained_with_relu(directory: Path) -> list[Path]:
    runs = [directory / f"{task}-relu" for task in TASKS]
    for task, run in zip(TASKS, runs, strict=True):
        train(Config(task, **RELU), run, progress=True)
    return runs


def _function(method: str) -> Callable[[nn.Module, Tensor], Tensor | int]:
    """The function that is timed: it returns the matrix, or the number of regions."""
    if method == "linear_regions":
        return linear_regions
    if method.startswith("lobatto"):
        return lambda f, x: connectivity(f, x, rule="lobatto", points=int(method.split()[1]))
    return lambda f, x: connectivity(f, x, method=method)


def _methods_of(layer: str, relu: bool) -> list[str]:
    if layer in SAME_PATHS:
        return ["jacobian"]
    return ["jacobian", "path", "hermite", "hermite-midpoint", *["linear_regions"] * relu]


def measure_all(runs: Sequence[Path], values: Path, every: int) -> None:
    """Measures the runs' checkpoints at multiples of `every`, and adds missing values to the table `values`.

    Raises:
        ValueError: not a run; a damaged checkpoint or table.
    """
    for run in runs:
        relu = _is_relu(run)
        _measure(run, values, every, {layer: _methods_of(layer, relu) for layer in LAYERS})
    # One seed of each task is enough to compare the rules. The embedding is measured last because its values can wait.
    for layer in ("hidden_1", "embedding"):
        for run in runs:
            if read_config(run).seed == 0:
                _measure(run, values, every, {layer: LOBATTO})


def _is_relu(run: Path) -> bool:
    return read_config(run).activation == "relu"


def _measure(run: Path, values: Path, every: int, methods: dict[str, Sequence[str]]) -> None:
    """Measures a run with these methods of each layer, if the table lacks their values."""
    rows = _read(values)
    known = {tuple(row[c] for c in ("run", "step", "layer", "method")) for row in rows}
    config = read_config(run)
    task, model = start(config)
    said = {
        "run": run.name,
        "task": config.task,
        "seed": config.seed,
        "activation": "ReLU" if _is_relu(run) else "SiLU",
    }
    for step in steps_of(run):
        if step % every:
            continue
        load_checkpoint(model, run, step)
        for layer, names in methods.items():
            missing = [name for name in names if (run.name, step, layer, name) not in known]
            if not missing:
                continue
            tail, samples = cut(model, layer, task.train_inputs)
            for method in missing:
                begin = time.perf_counter()
                result = _function(method)(tail, samples)
                seconds = time.perf_counter() - begin
                value = result if isinstance(result, int) else linear_mapping_number(result).item()
                rows.append(
                    said
                    | {"step": step, "layer": layer, "method": method, "value": value, "seconds": seconds}
                )
        write_table(values, COLUMNS, rows)
    print(run.name, flush=True)


def _read(values: Path) -> list[dict[str, Any]]:
    if not values.exists():
        return []
    try:
        return read_table(values, COLUMNS)
    except ValueError as error:
        raise ValueError(f"values: cannot read {values}: {error}; delete it to make it again") from None


class Values:
    """Values and seconds of a table."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.value: dict[tuple, dict[int, float]] = defaultdict(dict)  # by run, layer, method; then by step
        self.seconds: dict[tuple, list[float]] = defaultdict(list)  # by task, activation, layer, method
        self.runs: dict[tuple, list[str]] = defaultdict(list)  # by task, activation
        for row in rows:
            self.value[row["run"], row["layer"], row["method"]][row["step"]] = row["value"]
            self.seconds[row["task"], row["activation"], row["layer"], row["method"]].append(row["seconds"])
            runs = self.runs[row["task"], row["activation"]]
            if row["run"] not in runs:
                runs.append(row["run"])

    def pair(self, run: str, layer: str, method: str) -> Tensor:
        """(2, checkpoints): the exact LMN and the stand-in's value, at the checkpoints that have both."""
        source = SAME_PATHS.get(layer, layer)
        ours = self.value.get((run, layer, method)) or self.value[run, source, method]
        exact = self.value[run, source, "path"]
        steps = sorted(exact.keys() & ours.keys())
        return torch.tensor([[exact[s] for s in steps], [ours[s] for s in steps]], dtype=torch.float64)

    def milliseconds(self, task: str, activation: str, layer: str, method: str) -> float:
        key = task, activation, layer, method
        if key not in self.seconds:
            key = task, activation, SAME_PATHS.get(layer, layer), method
        return 1e3 * min(self.seconds[key])


def _bias_at_peak(pair: Tensor) -> float:
    """The stand-in's error at the checkpoint with the largest exact LMN, in per cent."""
    peak = pair[0].argmax()
    return 100 * (pair[1, peak] / pair[0, peak] - 1).item()


def _spread(numbers: list[float], digits: int) -> str:
    """Median and range."""
    numbers = sorted(numbers)
    if any(map(math.isnan, numbers)):
        return "constant"
    text = f"{statistics.median(numbers):.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ({numbers[0]:.{digits}f} to {numbers[-1]:.{digits}f})"


def _table(
    values: Values, activation: str, methods: Iterable[str], layers: Iterable[str], digits: int = 1
) -> list[str]:
    lines = [
        "| task | layer | method | r | bias at the peak, % | largest error, % | ms | exact, ms |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for (task, known), runs in values.runs.items():
        for layer in layers if known == activation else ():
            for method in methods:
                pairs = [values.pair(run, layer, method) for run in runs]
                pairs = [pair for pair in pairs if pair.shape[1] > 2]  # Lobatto rules only have seed 0
                if not pairs:
                    continue
                cells = [
                    task,
                    f"`{layer}`",
                    f"`{method}`",
                    _spread([pearson(pair.T.tolist()) for pair in pairs], 4),
                    _spread([_bias_at_peak(pair) for pair in pairs], digits),
                    _spread([100 * (pair[1] / pair[0] - 1).abs().max().item() for pair in pairs], digits),
                    f"{values.milliseconds(task, activation, layer, method):.0f}",
                    f"{values.milliseconds(task, activation, layer, 'path'):.0f}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(values: Values, path: Path) -> None:
    """Draws the error of LMN, as the median over checkpoints and the largest, against the time of the matrix."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown: dict[str, list[tuple[str, str, str]]] = {layer: [] for layer in ("hidden_1", "embedding")}
    for (task, activation), (run, *_) in values.runs.items():  # seed 0's run comes first
        for layer, panels in shown.items():
            if activation == "SiLU" and (run, layer, LOBATTO[0]) in values.value:
                panels.append((task, layer, run))
    shown = {layer: panels for layer, panels in shown.items() if panels}
    with rc_context({"font.size": 12, "legend.frameon": False, "lines.linewidth": 1.5}):
        columns = max(map(len, shown.values()))
        figure = Figure(figsize=(4.2 * columns + 1, 4 * len(shown) + 0.5), layout="constrained")
        grid = figure.subplots(len(shown), columns, sharey=True, squeeze=False)
        for row, panels in zip(grid, shown.values(), strict=True):
            for axes, panel in zip(row, panels):
                _draw_panel(axes, values, *panel)
            row[0].set_ylabel("Error of LMN (%)")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
        save(figure, path, dpi=110)


def _draw_panel(axes: Any, values: Values, task: str, layer: str, run: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    def point(method: str) -> tuple[float, float, float]:
        pair = values.pair(run, layer, method)
        error = 100 * (pair[1] / pair[0] - 1).abs()
        return values.milliseconds(task, "SiLU", layer, method), error.median().item(), error.max().item()

    costs, medians, largest = zip(*map(point, LOBATTO), strict=True)
    axes.plot(costs, medians, "o-", color=LMN, label="Lobatto, 4 to 9 nodes")
    axes.vlines(costs, medians, largest, color=LMN, alpha=0.4)
    for name, x, y in zip(LOBATTO, costs, medians, strict=True):
        axes.annotate(name.split()[1], (x, y), (5, 4), textcoords="offset points", annotation_clip=True)
    for method, (marker, colour) in MARKS.items():
        cost, middle, most = point(method)
        axes.plot(cost, middle, marker, color=colour, label=method, markersize=8)
        axes.vlines(cost, middle, most, color=colour, alpha=0.4)
    exact = values.milliseconds(task, "SiLU", layer, "path")
    axes.axvline(exact, color="#888888", linestyle=":", label="exact, 21 points")
    axes.set(title=f"{task}, {layer}", xscale="log", yscale="log", xlabel="Time of the matrix (ms)")
    axes.set_ylim(1e-3, 200)  # smaller errors do not matter
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _counts(values: Values) -> Iterable[str]:
    for activation in dict.fromkeys(activation for _, activation in values.runs):
        runs = [run for (_, known), runs in values.runs.items() if known == activation for run in runs]
        numbers = sorted({len(values.value[run, "hidden_1", "path"]) for run in runs})
        yield f"{activation}: {len(runs)} runs, {' or '.join(map(str, numbers))} checkpoints of each"
    lobatto = next(steps for (*_, method), steps in values.value.items() if method == LOBATTO[0])
    yield f"Lobatto: seed 0 alone, {len(lobatto)} checkpoints"


def write(values: Values, page: Path) -> None:
    """Puts the tables in the page, between its marks.

    Raises:
        ValueError: the page lacks a mark.
    """
    text = page.read_text()
    facts = f"processor {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if torch.cuda.is_available():
        facts = f"card {torch.cuda.get_device_name()}, {facts}"
    sections = {
        "SiLU": _table(values, "SiLU", STAND_INS, LAYERS),
        "ReLU": _table(
            values,
            "ReLU",
            ("linear_regions", *STAND_INS, "lobatto 7", "lobatto 9"),
            ("embedding", "hidden_1"),
        ),
        "Lobatto": _table(values, "SiLU", LOBATTO, ("embedding", "hidden_1"), digits=2),
        "facts": [f"{'; '.join(_counts(values))}. {facts}."],
    }
    for name, lines in sections.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = f"({marks[0]}\n).*?({marks[1]})"
        found = re.search(pattern, text, re.DOTALL)
        if not found:
            raise ValueError(f"{page}: lacks the marks {' and '.join(marks)}")
        body = "".join(f"{line}\n" for line in lines)
        text = text[: found.end(1)] + body + text[found.start(2) :]
    page.write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, draws the figure beside the page, and writes the tables of the page."""
    parser = argparse.ArgumentParser(
        prog="python -m lmnfast.paper.stand_ins",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument(
        "--every", type=int, default=1000, help="only checkpoints at multiples of this step (1000)"
    )
    parser.add_argument("--values", type=Path, default=Path("methods.csv"), help="the table (methods.csv)")
    parser.add_argument("--page", type=Path, default=Path("docs/methods.md"), help="(docs/methods.md)")
    parser.add_argument("--relu", type=Path, metavar="DIRECTORY")
    options = parser.parse_args(arguments)
    relu = _trained_with_relu(options.relu) if options.relu else []
    measure_all([run for run in options.runs if run.is_dir()] + relu, options.values, options.every)
    values = Values(_read(options.values))
    draw(values, options.page.with_suffix(".png"))
    write(values, options.page)


if __name__ == "__main__":
    main()
