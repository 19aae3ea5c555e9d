"""The command line: ``lmnfast grok``, ``measure``, ``checkpoints``, ``paper``, ``info``."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from . import __version__, _native
from ._eigenvalues import NEGATIVE
from ._observables import observables
from ._settings import METHODS
from ._threads import cores
from .checkpoints import draw_checkpoints, first_samples, load_inputs, measure_checkpoints
from .grokking.config import LOSS_DTYPES, OPTIMIZERS, Config
from .grokking.figures import draw, draw_methods, named
from .grokking.measure import measure
from .grokking.model import ACTIVATION_MODULES, INITS, LAYERS
from .grokking.run import Run
from .grokking.tasks import TASKS
from .grokking.training import train
from .paper.study import FEWEST_FOR_INTERVAL, FEWEST_FOR_VERDICT, QUICK, QUICK_SEEDS, SEEDS, Study, run_study
from .quadrature import RULES
from .runs.device import DEVICES, refuse_unusable

INTERRUPTED = 130  # the exit code that a shell reports after Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the arguments of the command line; None: those of this process.

    Returns:
        The exit code: 0; 2 for bad input, which an error message names in one line; 130 after Ctrl-C.
    """
    options = _parser().parse_args(_in_new_spelling(sys.argv[1:] if arguments is None else arguments))
    try:
        options.command(options)
    except KeyboardInterrupt:
        print(f"\nlmnfast: interrupted{options.after_interrupt}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"lmnfast: error: {error}", file=sys.stderr)
        return 2
    return 0


def _in_new_spelling(arguments: list[str]) -> list[str]:
    """Turns the old name ``measure --model`` into ``checkpoints --model``, and prints a note."""
    names = {argument.partition("=")[0] for argument in arguments}
    if arguments[:1] != ["measure"] or not names & {"--model", "--mode", "--mod", "--mo"}:
        return arguments
    print(
        "lmnfast: measure --model has a name of its own now: lmnfast checkpoints --model ...", file=sys.stderr
    )
    return ["checkpoints", *arguments[1:]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmnfast", description="The linear mapping number of neural networks (arXiv 2310.05918)."
    )
    parser.add_argument("--version", action="version", version=f"lmnfast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable, description: str, after_interrupt: str = ""
    ) -> argparse.ArgumentParser:
        # An option that the user leaves out does not appear in the options. Every default is thus written once, in Config.
        added = commands.add_parser(
            name, help=description, description=description, argument_default=argparse.SUPPRESS
        )
        added.set_defaults(command=run, after_interrupt=after_interrupt)
        return added

    _add_grok(
        command(
            "grok",
            _grok,
            "Train the paper's network on a task, measure its LMN, draw its Figure 2.",
            "; the same command continues the run",
        )
    )
    _add_measure(command("measure", _measure, "Measure a run's checkpoints again; writes RUN/measure-*.csv."))
    _add_checkpoints(
        command(
            "checkpoints",
            _checkpoints,
            "Measure checkpoints of any model, into a table and a figure (docs/checkpoints.md).",
            "; the same command goes on",
        )
    )
    _add_paper(
        command(
            "paper",
            _paper,
            "Reproduce the paper: every task and seed, figures, claims with intervals, and a report.",
            "; the same command goes on",
        )
    )
    command("info", _info, "Show the versions, the instruction set in use, and CUDA.")
    return parser


def _add_grok(grok: argparse.ArgumentParser) -> None:
    grok.add_argument("task", choices=TASKS)
    grok.add_argument("--p", type=int, help="modulus of modular-addition (31)")
    grok.add_argument("--bits", type=int, help="length of the numbers of xor (5)")
    grok.add_argument(
        "--steps", type=int, help=f"updates ({Config.steps}); more of them continue a finished run"
    )
    grok.add_argument("--every", type=int, help=f"steps from one measurement to the next ({Config.every})")
    grok.add_argument("--seed", type=int, help=f"of the split and the weights ({Config.seed})")
    grok.add_argument(
        "--init",
        choices=INITS,
        help=f"initialisation of the weights ({Config.init}: PyTorch's; the other is kept for runs begun with it)",
    )
    grok.add_argument(
        "--activation", choices=ACTIVATION_MODULES, help=f"between the layers ({Config.activation})"
    )
    _add_training(grok)
    grok.add_argument("--threads", type=int, help="on the CPU (the run's; torch's for a new one)")
    grok.add_argument("--out", metavar="RUN", help="the run's directory (runs/TASK-seedSEED)")
    grok.add_argument(
        "--force", action="store_true", help="delete the existing run (nothing else), start a new one"
    )
    names = f"some of {', '.join(LAYERS)} and those of --depth ({' '.join(Config.layers)})"
    grok.add_argument("--layers", nargs="+", metavar="LAYER", help=names)
    _add_samples(grok, "of the training samples are measured, a fixed random choice (all)")
    grok.add_argument("--method", choices=METHODS, help=f"of the connectivity ({Config.method})")
    _add_settings(grok, vars(Config))


def _add_training(grok: argparse.ArgumentParser) -> None:
    """The options of the network and of its training. Their defaults are the paper's."""
    grok.add_argument("--width", type=int, help=f"units of a hidden layer ({Config.width})")
    grok.add_argument("--depth", type=int, help=f"number of hidden layers ({Config.depth})")
    grok.add_argument("--optimizer", choices=OPTIMIZERS, help=f"sgd: without momentum ({Config.optimizer})")
    grok.add_argument(
        "--lr", dest="learning_rate", type=float, metavar="LR", help=f"learning rate ({Config.learning_rate})"
    )
    grok.add_argument("--weight-decay", type=float, help=f"of the optimiser ({Config.weight_decay})")
    grok.add_argument("--batch", type=int, help="training samples in an update (all)")
    grok.add_argument(
        "--train-fraction",
        type=float,
        metavar="SHARE",
        help=f"of all pairs, for training ({Config.train_fraction})",
    )
    grok.add_argument(
        "--loss-dtype",
        choices=LOSS_DTYPES,
        help=f"of the softmax of the loss; with float32 long runs collapse by round-off ({Config.loss_dtype})",
    )


def _add_measure(again: argparse.ArgumentParser) -> None:
    again.add_argument("run", metavar="RUN", help="a directory that grok wrote")
    again.add_argument("--every", type=int, help="only checkpoints at multiples of this step (1)")
    again.add_argument(
        "--force", action="store_true", help="replace the existing table, also one with more steps"
    )
    _add_layers(again, f"some of {', '.join(LAYERS)} and others of the run's depth (the run's)")
    _add_until(again)
    _add_samples(again, "of the training samples are measured, a fixed random choice (the run's)")
    again.add_argument(
        "--method",
        type=_methods,
        metavar="METHOD[,METHOD...]",
        help=f"of the connectivity, among {', '.join(METHODS)} (the run's); several go into one figure",
    )
    _add_settings(again, dict.fromkeys(vars(Config), "the run's"))


def _add_checkpoints(other: argparse.ArgumentParser) -> None:
    other.add_argument(
        "--model", required=True, metavar="MODULE:FACTORY", help="called without arguments, returns the model"
    )
    other.add_argument(
        "--checkpoint",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="files or patterns, as 'ckpts/*'",
    )
    other.add_argument("--inputs", required=True, metavar="FILE", help=".npy, .npz, .pt or .safetensors")
    of = other.add_mutually_exclusive_group(required=True)
    _add_layers(
        of, "names of the model's layers, or patterns, as 'blocks.*'; inputs: from the model's inputs on"
    )
    of.add_argument(
        "--blocks",
        "--block",
        nargs="+",
        action="extend",
        metavar="BLOCK",
        help="in place of layers: modules that are measured alone, also if skip connections go around them",
    )
    other.add_argument(
        "--until", metavar="LAYER", help="the layer with whose output the maps end (the model's output)"
    )
    other.add_argument(
        "--output", metavar="KEY", help="which of the model's outputs counts: key, attribute or index"
    )
    other.add_argument(
        "--batch-dim", type=int, metavar="D", help="dimension of the samples: 1 for an nn.LSTM by default (0)"
    )
    other.add_argument("--forward", metavar="MODULE:FUNCTION", help="called as function(model, inputs)")
    other.add_argument("--key", help="where in a checkpoint the state dict is, as state.ema")
    _add_samples(other, "of the inputs are measured, the first (all)")
    other.add_argument("--method", help=f"of the connectivity, one of {', '.join(METHODS)} ({Config.method})")
    _add_settings(other, vars(Config))
    other.add_argument("--jobs", type=int, help="processes (1)")
    other.add_argument("--out", metavar="DIR", help="where lmn.csv and lmn.png go (lmn)")
    other.add_argument("--force", action="store_true", help="begin a new table in place of the existing one")


def _add_paper(paper: argparse.ArgumentParser) -> None:
    paper.add_argument(
        "--seeds",
        type=int,
        help=f"of every task, from 0 on ({SEEDS}; {QUICK_SEEDS} with --quick); a verdict takes {FEWEST_FOR_VERDICT}, an "
        f"interval {FEWEST_FOR_INTERVAL}",
    )
    paper.add_argument(
        "--tasks", nargs="+", default=["all"], choices=("all", *TASKS), metavar="TASK",
        help=f"some of {', '.join(TASKS)} (all)",
    )  # fmt: skip
    paper.add_argument("--jobs", type=int, help="processes (as many as cores; 1 where there is a GPU)")
    paper.add_argument("--out", default="paper", metavar="DIR", help="where everything goes (paper)")
    paper.add_argument(
        "--quick",
        action="store_true",
        default=False,
        help=f"{QUICK.steps} steps: XOR groks, the other tasks memorise; a look at everything in minutes",
    )


def _add_layers(parser: argparse._ActionsContainer, text: str) -> None:
    parser.add_argument("--layers", "--layer", nargs="+", action="extend", metavar="LAYER", help=text)


def _add_until(parser: argparse.ArgumentParser) -> None:
    text = "the layer with whose output the measured maps end (the model's output)"
    parser.add_argument("--until", metavar="LAYER", help=text)


def _add_samples(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument(
        "--samples",
        type=int,
        help=f"how many {of}; the LMN of fewer samples is no estimate of the LMN of all",
    )


def _add_settings(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """The options of every measurement."""
    parser.add_argument("--points", type=int, help=f"nodes on a path, ends included ({defaults['points']})")
    parser.add_argument("--rule", choices=RULES, help=f"where on the path they lie ({defaults['rule']})")
    parser.add_argument(
        "--negative", choices=NEGATIVE, help=f"what negative eigenvalues count ({defaults['negative']})"
    )
    parser.add_argument(
        "--stabiliser",
        type=float,
        metavar="NUMBER",
        help=f"added to the denominators of r2; 8e-8 for the paper's numbers at step 0 ({defaults['stabiliser']})",
    )
    parser.add_argument(
        "--observables",
        type=_names,
        metavar="NAME[,NAME...]",
        help=f"numbers beside LMN, among {', '.join(each.name for each in observables())} "
        f"({defaults['observables'] or 'none'})",
    )
    parser.add_argument("--device", choices=DEVICES, help="where to compute (auto)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _methods(text: str) -> tuple[str, ...]:
    methods = tuple(text.split(","))
    if unknown := [method for method in methods if method not in METHODS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    return methods


def _grok(options: argparse.Namespace) -> None:
    _need_extra()
    _need_device(options)
    given = _given_options(options)
    out, force = given.pop("out", None), given.pop("force", False)
    config = Config(**given)
    run = train(config, out or f"runs/{config.task}-seed{config.seed}", force=force, progress=True)
    draw(run.path)
    print(_summary(run))


def _paper(options: argparse.Namespace) -> None:
    _need_extra("paper", ("markdown", "matplotlib", "pandas", "scipy", "sklearn", "tqdm"))
    _need_device(options)
    from .paper.report import write_report

    study = QUICK if options.quick else Study()
    tasks = tuple(TASKS) if "all" in options.tasks else tuple(dict.fromkeys(options.tasks))
    seeds = getattr(options, "seeds", QUICK_SEEDS if options.quick else SEEDS)
    jobs = getattr(options, "jobs", 1 if torch.cuda.is_available() else cores())
    _say_jobs(jobs)
    out = Path(options.out)
    run_study(out, tasks, seeds, jobs, study, progress=True)
    given = {"seeds": seeds, "tasks": " ".join(options.tasks), "out": options.out}
    command = " ".join(f"--{name} {value}" for name, value in given.items())
    for path in write_report(
        out, tasks, seeds, study, f"lmnfast paper {command}{' --quick' * options.quick}"
    ):
        print(f"written: {path}")


def _measure(options: argparse.Namespace) -> None:
    _need_extra()
    _need_device(options)
    given = _given_options(options)
    path, rows = measure(**given, progress=True)
    _print_rows(
        rows,
        given.get("observables", ()),
        [path, draw_methods(path, rows)] if "+" in rows[0]["method"] else [path],
    )


def _checkpoints(options: argparse.Namespace) -> None:
    _need_extra()
    _need_device(options)
    given = _given_options(options)
    inputs, samples = load_inputs(given.pop("inputs")), given.pop("samples", None)
    if samples is not None:
        inputs = first_samples(inputs, samples, given.get("batch_dim"))
    output = given.pop("output", None)
    out = Path(given.pop("out", "lmn"))
    _say_jobs(given.get("jobs", 1))
    rows = measure_checkpoints(
        given.pop("model"),
        given.pop("checkpoint"),
        inputs,
        output=int(output) if output is not None and re.fullmatch(r"-?[0-9]+", output) else output,
        out=out,
        progress=True,
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


def _say_jobs(jobs: int) -> None:
    if jobs > cores():
        print(f"jobs: {jobs} processes on {cores()} cores", file=sys.stderr)


def _info(options: argparse.Namespace) -> None:
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


def _given_options(options: argparse.Namespace) -> dict:
    return {
        name: value for name, value in vars(options).items() if name not in ("command", "after_interrupt")
    }


def _need_extra(extra: str = "grok", modules: Iterable[str] = ("matplotlib", "tqdm")) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ValueError(f"this command needs {' and '.join(missing)}: pip install 'lmnfast[{extra}]'")


def _need_device(options: argparse.Namespace) -> None:
    refuse_unusable(getattr(options, "device", "auto"))


if __name__ == "__main__":
    sys.exit(main())
