"""What the commands do. The command line imports this module, and torch with it, when a command runs."""

import math
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from . import __version__, _native
from ._commands_scale import plan_for, solve_folder, tiles
from ._threads import cores
from .checkpoints import draw_checkpoints, first_samples, load_inputs, measure_checkpoints
from .grokking.choices import TASKS
from .grokking.config import Config
from .grokking.figures import draw, draw_methods, named
from .grokking.measure import measure
from .grokking.run import Run
from .grokking.training import train
from .paper.settings import (
    INTERVENTIONS,
    QUICK,
    QUICK_INTERVENTIONS,
    QUICK_SEEDS,
    SEEDS,
    Interventions,
    Study,
)
from .paper.study import run_study
from .runs.device import refuse_unusable


def _grok(options: Namespace) -> None:
    _need_extra()
    _need_device(options)
    given = _given_options(options)
    out, force = given.pop("out", None), given.pop("force", False)
    config = Config(**given)
    out = out or f"runs/{config.task}-seed{config.seed}"
    run = train(config, out, force=force, progress=not options.quiet)
    draw(run.path)
    print(_summary(run))


def _paper(options: Namespace) -> None:
    _need_extra("paper", ("markdown", "matplotlib", "pandas", "scipy", "sklearn", "tqdm"))
    _need_device(options)
    tasks = tuple(TASKS) if "all" in options.tasks else tuple(dict.fromkeys(options.tasks))
    seeds = getattr(options, "seeds", QUICK_SEEDS if options.quick else SEEDS)
    jobs = getattr(options, "jobs", 1 if torch.cuda.is_available() else cores())
    _say_jobs(jobs, options)
    out = Path(options.out)
    results = getattr(options, "results", None)
    if options.interventions:
        _intervene(out, tasks, seeds, jobs, results, options)
        return
    if results is not None:
        raise ValueError(f"results: expected --interventions with it, got {results} without")
    from .paper.report import write_report

    study = QUICK if options.quick else Study()
    run_study(out, tasks, seeds, jobs, study, progress=not options.quiet)
    given = {"seeds": seeds, "tasks": " ".join(options.tasks), "out": options.out}
    command = " ".join(f"--{name} {value}" for name, value in given.items())
    for path in write_report(
        out, tasks, seeds, study, f"lmnfast paper {command}{' --quick' * options.quick}"
    ):
        print(f"written: {path}")


def _intervene(
    out: Path, tasks: Sequence[str], seeds: int, jobs: int, results: str | None, options: Namespace
) -> None:
    from .paper.intervened import write_section
    from .paper.interventions import run_interventions

    run_interventions(
        *(out, tasks, seeds, jobs, QUICK_INTERVENTIONS if options.quick else Interventions()),
        results=None if results is None else Path(results),
        progress=not options.quiet,
    )
    for path in write_section(out / INTERVENTIONS):
        print(f"written: {path}")


def _measure(options: Namespace) -> None:
    _need_extra()
    _need_device(options)
    given = _given_options(options)
    path, rows = measure(**given, progress=not options.quiet)
    _print_rows(
        rows,
        given.get("observables", ()),
        [path, draw_methods(path, rows)] if "+" in rows[0]["method"] else [path],
    )


def _checkpoints(options: Namespace) -> None:
    _need_extra()
    _need_device(options)
    given = _given_options(options)
    inputs, samples = load_inputs(given.pop("inputs")), given.pop("samples", None)
    if samples is not None:
        inputs = first_samples(inputs, samples, given.get("batch_dim"))
    output = given.pop("output", None)
    out = Path(given.pop("out", "lmn"))
    _say_jobs(given.get("jobs", 1), options)
    if given.get("trust"):
        print("lmnfast: warning: --trust: code that is in the checkpoints is run", file=sys.stderr)
    rows = measure_checkpoints(
        given.pop("model"),
        given.pop("checkpoint"),
        inputs,
        output=int(output) if output is not None and re.fullmatch(r"-?[0-9]+", output) else output,
        out=out,
        progress=not options.quiet,
        **given,
    )
    asked = given.get("observables", ())
    _print_rows(rows, asked, [out / "lmn.csv", draw_checkpoints(out, rows)])


def _print_rows(rows: Sequence[Mapping[str, Any]], asked: Sequence[str], written: Sequence[Path]) -> None:
    """Prints the LMN and the observables of each row that were asked for, and the names of the written files."""
    kinds = ("lmn_", *(f"{name}_" for name in asked))
    columns = [name for name in rows[0] if name == "step" or name.startswith(kinds)]
    widths = [max(16, len(name)) for name in columns]
    print(*(f"{name:>{width}}" for name, width in zip(columns, widths)))
    for row in rows:
        cells = [f"{row[name]:.6g}" if name != "step" else str(row[name]) for name in columns]
        print(*(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    for path in written:
        print(f"written: {path}")


def _say_jobs(jobs: int, options: Namespace) -> None:
    if jobs > cores() and not options.quiet:
        print(f"jobs: {jobs} processes on {cores()} cores", file=sys.stderr)


def _info(options: Namespace) -> None:
    native = _native.info()
    facts = [
        ("lmnfast", __version__),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        (
            "instruction set",
            f"{native['isa']} (of {', '.join(cast(list[str], native['isas']))}; LMNFAST_ISA chooses)",
        ),
        ("compiled core", str(native["core"])),
        ("CUDA kernels", _kernels(str(native["cuda_archs"]).split())),
    ]
    if reason := _native.no_cuda_device():
        facts.append(("CUDA device", f"none: {reason}"))
    cards = range(torch.cuda.device_count() if reason is None else 0)
    facts += [(f"CUDA device {n}", _device(torch.device("cuda", n))) for n in cards]
    for name, value in facts:
        print(f"{name:15}  {value}")


def _kernels(targets: list[str]) -> str:
    if not targets:
        return f"none: {_native.cuda_problem()}"
    return f"for {', '.join(f'sm_{target}' for target in targets)}, and as PTX for later cards"


def _device(device: torch.device) -> str:
    card = torch.cuda.get_device_properties(device)
    found = f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB"
    problem = _native.cuda_problem(device) if _native.cuda_built() else None
    return f"{found}; not usable: {problem}" if problem else found


def _summary(run: Run) -> str:
    def at(step: int | None) -> str:
        return "-" if step is None else f"step {step}"

    def r(column: str) -> str:
        value = run.correlation(column)
        return "-" if math.isnan(value) else f"{value:.4f}"

    config, last, seconds = run.config, run.rows[-1], run.seconds
    of = "" if config.samples is None else f"of {config.trained_on} "
    lines = [
        f"{config.task}, seed {config.seed}: {last['step']} steps, measured every {config.every} on "
        f"{last['samples']} {of}samples ({_how(config)})",
        f"memorised at    {at(run.memorised)}",
        f"generalised at  {at(run.generalised)}",
    ]
    name = named(config, samples=False)
    for layer in config.layers:
        column = f"lmn_{layer}"
        peak = max(run.rows, key=lambda row: row[column])
        lines.append(
            f"{name:<15} {layer}: peak {peak[column]:.1f} at step {peak['step']}, end {last[column]:.1f}"
        )
    correlations = [
        *(f"{name} {layer} {r(f'lmn_{layer}')}" for layer in config.layers),
        f"L2 norm {r('l2_norm')}",
    ]
    if config.penalty:
        lines.append(
            f"penalty         {config.penalty} x {config.penalty_weight:g} of {config.penalty_samples} samples: "
            f"end {last['penalty']:.4g}"
        )
    lost = [row for row in run.rows if row.get("lost_gradients")]  # older runs have no such column
    if lost:
        most = max(row["lost_gradients"] for row in lost)
        since = f"round-off       reaches true-class gradients from step {lost[0]['step']} on"
        lines.append(f"{since}, at most {most} of {config.trained_on}")
    lines += [
        f"Pearson r       of test loss while generalising, with {', '.join(correlations)}",
        f"time            training {seconds['training']:.0f} s, measuring {seconds['measuring']:.0f} s",
        f"left in         {run.path}",
    ]
    return "\n".join(lines)


def _how(config: Config) -> str:
    nodes = "" if config.method == "jacobian" else f", {config.points} {config.rule} points"
    clipped = ", negative eigenvalues clipped" if config.negative == "clip" else ""
    stabilised = f", stabiliser {config.stabiliser}" if config.stabiliser else ""
    return config.method + nodes + clipped + stabilised


def _given_options(options: Namespace) -> dict[str, Any]:
    """The options that are arguments of what the command calls."""
    ours = ("command", "after_interrupt", "quiet")
    return {name: value for name, value in vars(options).items() if name not in ours}


def _need_extra(extra: str = "grok", modules: Iterable[str] = ("matplotlib", "tqdm")) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ValueError(f"this command needs {' and '.join(missing)}: pip install 'lmnfast[{extra}]'")


def _need_device(options: Namespace) -> None:
    refuse_unusable(getattr(options, "device", "auto"))


COMMANDS = {
    "grok": _grok,
    "measure": _measure,
    "checkpoints": _checkpoints,
    "paper": _paper,
    "tiles": tiles,
    "solve": solve_folder,
    "plan": plan_for,
    "info": _info,
}
