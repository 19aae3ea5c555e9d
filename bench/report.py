"""A document that compares, for every op, our time, PyTorch's best (eager and compiled), JAX and the floor, and shows how times
scale.

python -m bench.report                          runs everything, from the repository's root; 12 minutes on 2 cores
python -m bench.report path_r2 scaling --quick  runs only these parts, with one or few rounds; the numbers are not reliable
python -m bench.report --redraw                 writes the document again from OUT/benchmarks.json

The command writes OUT/benchmarks.md, its figures, and the numbers in OUT/benchmarks.json. If a part fails, the exit code is 1,
and the document has the other parts and a note about the failure. The extra `bench` is needed; JAX is included if it is
installed.
"""

import argparse
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lmnfast import _native
from lmnfast._drawing import BLACK, BLUE, GREEN, PURPLE, VERMILION
from lmnfast._files import write_file

from .results import machine, table

ROOT = Path(__file__).parent.parent
PARTS = {  # the text of the document about each bench/bench_PART.py
    "path_connectivity": "Floor: the kernel's multiply-adds at the run's own large-sgemm rate, plus its activations at "
    "the best rate seen. Below 1 the products ran faster than PyTorch's `mm`.",
    "path_r2": "Floor: a sum of y, which reads as much.",
    "block_coefficients": "The hidden layer of a transformer's block. Floor: its activations at PyTorch's rate in cache, and "
    "the multiply-adds of all degrees as one matrix product.",
    "connectivity": "Networks that are no chain. Floor: the network alone on the points of all paths, in batches of the "
    "best of five sizes, nothing interpolated or reduced. Below 1: what is affine at the beginning runs on the samples "
    "alone, or tiles stay in cache.",
    "cutting": "Models of Hugging Face, most of which torch.fx cannot trace, and of torch.nn, small, so that the cost of each "
    "call shows. `by hand` is the part behind the layer in a few lines; `the model with a hook` runs all of the model for each "
    "path point. No floor.",
    "path_connectivity_backward": "A curvature, or LMN, and its gradients in weights and samples, forward and backward "
    "together. The rivals are autograd through all paths, where the first layer is applied to the samples alone. Floor: four "
    "products of the forward's size as one matrix product; `forward alone` is ours without gradients.",
    "hermite_connectivity": "Floor: all products of a Jacobian and a sample as one matrix product; the moments of every "
    "pair and output come on top. With more hidden layers ours is further above it: it forms no Jacobian, but carries "
    "the slopes of every pair from layer to layer. `ours, exact` and `lobatto` are the path's own r2, for comparison.",
    "jacobian": "Floor: writing the result, or its multiply-adds as one matrix product, whichever takes longer. "
    "`jacobian` is the op, `jacobians` the user's call.",
    "jacobian_distance": "Floor: writing the result, or the products (features in float64, half a Gram matrix in "
    "float32), whichever takes longer. Every second sample is close to another; such pairs are taken again in float64, "
    "which the floor leaves out and the rivals' Gram forms get wrong.",
    "check_outputs": "Floor: the largest and the smallest of the same values. Made for CUDA, where it is one kernel "
    "in place of thirty; on the CPU every check is made before the work that follows it, and this op is not used.",
    "estimate": "A draw of pairs, and PyTorch by hand on the same pairs. All pairs, and LMN alone, for comparison. No floor.",
    "spectral_entropy": "Floor: a sum of the same values. A logarithm of each is dearer than an addition; at 768 values "
    "it is the call that takes the time.",
    "symmetric_eigenvalues": "On the CPU this is LAPACK, on one core up to N = 1024 for the same bits. Floor: two thirds of "
    "N^3 multiply-adds as one float64 matrix product.",
    "spectrum": "Floor: two thirds of N^3 multiply-adds as one float64 matrix product. LAPACK makes half of them in "
    "matrix-vector products, which memory limits.",
    "grokking": "A step of the reference trainer. Floor: the products of the second and third Linear, forward and backward, "
    "at the run's own large-sgemm rate. SiLU and its derivative, the sums over tokens and the optimiser come on top.",
    "probe": "Floor: the kernel alone. The eigenproblem runs on another thread.",
}
SCALING = "scaling"
SECONDS = 400  # the time limit of a part
KINDS = ("ours", "eager", "torch.compile", "jax.jit")  # the beginnings of the names of the bars
MARKS = {
    "ours": ("o", VERMILION),
    "eager": ("s", BLUE),
    "torch.compile": ("^", GREEN),
    "jax.jit": ("D", PURPLE),
    "floor": ("|", BLACK),
}


@dataclass(frozen=True)
class Fit:
    """time = factor * value^exponent, by least squares of the logarithms. error: one standard deviation of the exponent."""

    exponent: float
    error: float  # NaN if there are only two points
    factor: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        return self.factor * value**self.exponent

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" + ("" if math.isnan(self.error) else f" ± {self.error:.2f}")


def fit(points: Iterable[tuple[float, float]]) -> Fit:
    """The fit of points (value, seconds), with at least two different values."""
    points = sorted(points)
    x, y = np.log(np.asarray(points, dtype=float)).T
    if len(np.unique(x)) < 2:
        raise ValueError(f"points: expected two different values at least, got {len(np.unique(x))}")
    centred = x - x.mean()
    exponent = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - exponent * centred
    free = len(x) - 2
    error = math.sqrt(residual @ residual / free / (centred @ centred)) if free else math.nan
    return Fit(exponent, error, math.exp(y.mean() - exponent * x.mean()), points[0][0], points[-1][0])


def problems(records: list[dict]) -> dict[str, dict[str, dict]]:
    """The fastest record of every kind, by group, for groups with a record of ours."""
    found: dict[str, dict[str, dict]] = {}
    for record in records:
        bar = record["extra_info"].get("bar", record["name"])
        kind = bar.partition(",")[0]
        if kind not in KINDS or (kind == "ours" and bar != "ours"):
            continue  # an approximation of ours, or not a rival
        best = found.setdefault(record["group"], {})
        if kind not in best or record["stats"]["median"] < best[kind]["stats"]["median"]:
            best[kind] = record
    return {group: best for group, best in found.items() if "ours" in best}


def plain(group: str) -> str:
    """The group's name without the parts that are the same for all problems on one machine."""
    return group.removesuffix(", highest").removesuffix(", cpu")


def bars_table(records: list[dict]) -> list[str]:
    """Lines of Markdown with the bars of every problem. Rivals have their milliseconds and their multiple of our time."""
    lines = [
        f"| problem, ms | ours | {' | '.join(KINDS[1:])} | floor | ours over it |",
        "|---|" + "--:|" * (len(KINDS) + 2),
    ]
    for group, best in problems(records).items():
        ours, floor = best["ours"]["stats"]["median"], best["ours"]["extra_info"].get("floor_s")
        rivals = (best[kind]["stats"]["median"] if kind in best else None for kind in KINDS[1:])
        cells = [
            plain(group),
            f"**{milliseconds(ours)}**",
            *(f"{milliseconds(rival)} ({rival / ours:.2g}x)" if rival else "" for rival in rivals),
            *((milliseconds(floor), f"{ours / floor:.2g}") if floor else ("", "")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with three digits and without an exponent."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:#.3g}".rstrip(".")


def scaling_table(sweeps: list[dict]) -> list[str]:
    lines = [
        "| time of | against | from, to | ours | eager, over its own range | of the work | in the limit |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for sweep in sweeps:
        fits = {bar: fit(points) for bar, points in sweep["bars"].items()}
        ours, eager = fits["ours"], fits.get("eager")
        shorter = f", to {eager.last:g}" if eager and eager.last != ours.last else ""
        cells = [
            sweep["name"],
            sweep["variable"],
            f"{ours.first:g}, {ours.last:g}",
            f"**{ours}**",
            f"{eager}{shorter}" if eager else "",
            f"{fit(sweep['work']).exponent:.2f}",
            sweep["order"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def document(results: dict) -> str:
    records, sweeps = results["benchmarks"], results["scaling"]
    facts = {"date": results["date"], **results["machine"], "took": f"{results['seconds'] / 60:.0f} minutes"}
    lines = [
        "# Benchmarks",
        "",
        f"Written by `{results['command']}`; all numbers are of that one run.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
    ]
    if results["quick"]:
        lines += ["**A trial with --quick: one or few rounds, not to be believed.**", ""]
    if results["failed"]:
        lines += [f"**Failed, and missing here: {'; '.join(results['failed'])}.**", ""]
    if problems(records):
        lines += [
            "## Ours, the rivals, the floor",
            "",
            "Medians of warm calls, float32 unless a name says otherwise, networks at initialisation; in brackets the time "
            "over ours. *eager* is the fastest plain PyTorch we could write, at its best chunk; *torch.compile* the same "
            "savings left to the compiler; *jax.jit* the same in JAX on the CPU, on a thread for every processor. The "
            "*floor* is a predicted time: the cheapest call that touches the same bytes, or the same multiply-adds in one "
            "large matrix product, measured in the run. Every result was held to a float64 reference, or to ours, before "
            "it was timed.",
            "",
            *bars_table(records),
            "",
            "![Times of all problems](benchmarks-bars.png)",
            "",
        ]
    if sweeps:
        lines += [
            "## Scaling",
            "",
            "Exponents of time = c value^e, by least squares in the logarithms over the range given, with their standard "
            "errors; times are the least of interleaved calls. *Of the work*: the same fit to the multiply-adds and "
            "activations that are predicted to count, which at these sizes need not have reached the limit.",
            "",
            *scaling_table(sweeps),
            "",
            "![Times against sizes](benchmarks-scaling.png)",
            "",
        ]
    lines += ["## Every bar", ""]
    for part, note in PARTS.items():
        own = [{**r, "group": plain(r["group"])} for r in records if r["part"] == part]
        if own:
            lines += [f"### {part}", "", note, "", *table(own), ""]
    lines += [
        "## Not measured",
        "",
        "- No GPU: for the CUDA kernels see bench/results; `bench/gpu.sh` measures them.",
        "- Other processors, and more threads than those above.",
        *([] if "jax" in facts else ["- JAX: it was not installed."]),
        "",
    ]
    return "\n".join(lines)


def figures(results: dict) -> dict[str, bytes]:
    """The figures as PNG files, by name."""
    from matplotlib import rc_context

    drawn = {}
    with rc_context({"font.size": 9, "legend.frameon": False, "lines.linewidth": 1.2}):
        if best := problems(results["benchmarks"]):
            drawn["benchmarks-bars.png"] = _png(_draw_bars(best))
        if results["scaling"]:
            drawn["benchmarks-scaling.png"] = _png(_draw_scaling(results["scaling"]))
    return drawn


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _draw_bars(best: dict[str, dict[str, dict]]):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8.5, 0.24 * len(best) + 1.2), layout="constrained")
    axes = figure.subplots()
    for kind, (marker, colour) in MARKS.items():
        if kind == "floor":
            seconds = [of["ours"]["extra_info"].get("floor_s") for of in best.values()]
        else:
            seconds = [of[kind]["stats"]["median"] if kind in of else None for of in best.values()]
        rows = [(1e3 * s, row) for row, s in enumerate(seconds) if s]
        if rows:
            axes.plot(*zip(*rows), marker, color=colour, label=kind, markersize=12 if kind == "floor" else 5)
    axes.set_yticks(range(len(best)), map(plain, best), fontsize=8)
    axes.set(xscale="log", xlabel="ms", ylim=(len(best) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(FuncFormatter("{0:g}".format))
    axes.grid(axis="both", color="#e0e0e0", linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=len(MARKS))
    return figure


def _draw_scaling(sweeps: list[dict]):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

    columns = min(3, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure = Figure(figsize=(3.8 * columns, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, sweep in zip(grid, sweeps):
        for bar, points in sweep["bars"].items():
            marker, colour = MARKS[bar]
            line = fit(points)
            axes.plot(*zip(*((v, 1e3 * s) for v, s in points)), marker, color=colour, markersize=4)
            ends = (line.first, line.last)
            axes.plot(ends, [1e3 * line(v) for v in ends], "-", color=colour, label=f"{bar}: {line}")
        axes.set(xscale="log", yscale="log", xlabel=sweep["variable"], ylabel="ms")
        axes.set_title(sweep["name"], fontsize=9)
        values = [value for value, _ in sweep["bars"]["ours"]]
        axes.set_xticks(values[:: 1 if len(values) < 6 else 2])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter("{0:g}".format))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
    for axes in grid:
        axes.set_visible(False)
    return figure


def run(part: str, quick: bool, results: dict) -> None:
    """Runs one part in its own process, and adds its records to `results`, and a note if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        left, log = Path(folder, "left.json"), Path(folder, "log")
        if part == SCALING:
            arguments = ["bench/scaling.py", str(left), *(["--quick"] if quick else [])]
        else:
            arguments = ["-m", "pytest", f"bench/bench_{part}.py", "-p", "no:cacheprovider", "-k", "not cuda"]
            arguments += ["-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning", "--tb=short"]
            arguments += [f"--benchmark-json={left}", *(["--rounds=1"] if quick else [])]
        # The part uses the lmnfast of this process, also if another one is installed.
        known = os.environ.get("PYTHONPATH")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *([known] if known else [])])}
        print(f"{part} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        with open(log, "w") as output:
            stderr = None if part == SCALING else subprocess.STDOUT
            command = [sys.executable, *arguments]
            with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=stderr) as child:
                try:
                    code = child.wait(SECONDS) and f"exit code {child.returncode}"
                except subprocess.TimeoutExpired:
                    code = f"out of time after {SECONDS} s"
                    stop(child)
                except BaseException:
                    stop(child)
                    raise
        what = json.loads(left.read_text() or "{}") if left.exists() else {}
        if part == SCALING:
            results["scaling"] = what or []
        else:
            results["benchmarks"] += [slim(part, record) for record in what.get("benchmarks", [])]
        print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if code:
            results["failed"].append(f"{part} ({code})")
            said = [
                line for line in log.read_text().splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))
            ]
            print(*said[-20:], f"{part}: failed, {code}", sep="\n", file=sys.stderr, flush=True)


def stop(child: subprocess.Popen) -> None:
    """Ends a process. SIGINT comes first, so that pytest still writes its results so far."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(20)
    except subprocess.TimeoutExpired:
        child.kill()


def slim(part: str, record: dict) -> dict:
    """The parts of pytest-benchmark's record that tables and figures need."""
    return {
        "part": part,
        **{key: record[key] for key in ("group", "name", "extra_info")},
        "stats": {key: record["stats"][key] for key in ("median", "min", "rounds", "iterations")},
    }


def facts() -> dict[str, str]:
    known = {**machine(), "instruction set": _native.info()["isa"], "Python": platform.python_version()}
    if find_spec("jax"):
        known["jax"] = f"{version('jax')}, {len(os.sched_getaffinity(0))} threads"
    return known


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*PARTS, SCALING]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(every)}")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="directory (docs)")
    parser.add_argument("--redraw", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in every:
            parser.exit(2, f"bench.report: error: PART: expected one of {', '.join(every)}, got {part!r}\n")
    if options.redraw and (options.parts or options.quick):
        parser.exit(
            2, "bench.report: error: --redraw: expected without PART and --quick: nothing is measured\n"
        )
    options.parts = options.parts or every
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    numbers = options.out / "benchmarks.json"
    try:
        needed = ["matplotlib", *([] if options.redraw else ["pytest", "pytest_benchmark"])]
        if missing := [name for name in needed if not find_spec(name)]:
            raise RuntimeError(f"this needs {' and '.join(missing)}: pip install -e '.[bench]'")
        if options.redraw:
            results = json.loads(numbers.read_text())
        else:
            options.out.mkdir(parents=True, exist_ok=True)
            results = measured(options)
            write_file(numbers, json.dumps(results, indent=1).encode())
        for name, png in figures(results).items():
            write_file(options.out / name, png)
        write_file(options.out / "benchmarks.md", document(results).encode())
    except KeyboardInterrupt:
        print("bench.report: interrupted, nothing written", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"bench.report: error: {error}", file=sys.stderr)
        return 2
    for line in [*bars_table(results["benchmarks"]), "", *scaling_table(results["scaling"])]:
        print(line)
    print(f"written: {options.out / 'benchmarks.md'}, its figures, {numbers}")
    return 1 if results["failed"] else 0


def measured(options: argparse.Namespace) -> dict:
    start = time.perf_counter()
    shown = ["python", "-m", "bench.report", *(sys.argv[1:] if sys.argv[0].endswith("report.py") else [])]
    results = {
        "date": str(date.today()),
        "command": shlex.join(shown),
        "quick": options.quick,
        "machine": facts(),
        "failed": [],
        "benchmarks": [],
        "scaling": [],
    }
    for part in options.parts:
        run(part, options.quick, results)
    return {**results, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    sys.exit(main())
