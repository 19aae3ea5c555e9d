"""The commands, their options and their help. What it imports does not import torch, so that the help comes at once."""

import argparse

from . import __version__
from ._choices import METHODS
from ._options import (
    INPUTS,
    MODEL,
    add_cut,
    add_layers,
    add_quiet,
    add_samples,
    add_settings,
    add_until,
    integer,
    methods,
    name,
)
from ._parser_scale import PLAN, SOLVE, TILES, add_plan, add_solve, add_tiles
from .grokking.choices import (
    ACTIVATIONS,
    INITS,
    LAYERS,
    LOSS_DTYPES,
    OPTIMIZERS,
    PENALTIES,
    SPLITS,
    TASKS,
)
from .grokking.config import PENALTY_SAMPLES, Config
from .paper.settings import FEWEST_FOR_INTERVAL, FEWEST_FOR_VERDICT, QUICK, QUICK_SEEDS, SEEDS

TASKS_ARE = (
    "tasks: modular-addition is (a + b) mod p; s4 is the product of two permutations of four things; xor is the bitwise "
    "exclusive or of two numbers. The network learns the answers to some of all pairs and is tested on the others."
)
METHODS_ARE = (
    "methods: path is the definition, the outputs along straight lines between the samples; hermite takes the outputs along "
    "a line from values and derivatives at its ends, hermite-midpoint also from the value in the middle; jacobian compares "
    "the derivatives at the samples alone. The last three are stand-ins for LMN (docs/methods.md)."
)
RULES_ARE = (
    "rules: uniform has equidistant nodes of equal weight, with 21 points the paper's; lobatto has nearly the same sums by "
    "fewer nodes, as 7 or 9, and takes less time."
)
GROK = f"""{TASKS_ARE}

{METHODS_ARE}

{RULES_ARE}

examples:
  lmnfast grok modular-addition                          the paper's run: minutes on two cores
  lmnfast grok xor --steps 4000 --seed 1                 a run that groks soon
  lmnfast grok s4 --layers embedding hidden_1 --rule lobatto --points 9 --out runs/s4
  lmnfast grok modular-addition --p 59 --train-fraction 0.4 --weight-decay 1 --samples 500
  lmnfast grok s4 --penalty pooled_curvature --penalty-weight 10 --until-accurate --out runs/straight
"""
MEASURE = f"""{METHODS_ARE}

{RULES_ARE}

examples:
  lmnfast measure runs/xor-seed1 --layers embedding hidden_1
  lmnfast measure runs/xor-seed1 --every 1000 --method path,hermite,hermite-midpoint
  lmnfast measure runs/xor-seed1 --split test --observables curvature,participation_ratio
"""
CHECKPOINTS = f"""{METHODS_ARE}

{RULES_ARE}

examples (docs/checkpoints.md has the files digits.py, step_*.pt and x.npy):
  lmnfast checkpoints --model digits:make --checkpoint 'step_*.pt' --inputs x.npy --layer 1 --layer 3
  lmnfast checkpoints --model digits:make --checkpoint step_0.pt step_40.pt --inputs x.npy --layer inputs --out first-and-last
  lmnfast checkpoints --model digits:make --checkpoint 'step_*.pt' --inputs x.npy --block 2 --samples 50 --out block
"""
PAPER = f"""{TASKS_ARE}

examples:
  lmnfast paper --quick                                  a small version of everything, in minutes
  lmnfast paper --tasks xor --seeds 8 --jobs 2 --out xor
  lmnfast paper                                          the whole study: more than an hour on two cores
  lmnfast paper --interventions --results docs/paper/results.csv.gz
"""
INFO = """examples:
  lmnfast info
  LMNFAST_ISA=baseline lmnfast info                      with another instruction set
"""


class _Formatter(argparse.HelpFormatter):
    """Wraps each paragraph of a text, and keeps lines that begin with a blank, such as examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            line if not line or line[0] == " " else super(_Formatter, self)._fill_text(line, width, indent)
            for line in lines
        )


def parser() -> argparse.ArgumentParser:
    """The parser of the command line. The parsed options have the command's name as `command`."""
    whole = argparse.ArgumentParser(
        prog="lmnfast",
        description="The linear mapping number of neural networks (arXiv 2310.05918).",
        epilog="lmnfast COMMAND --help has the options of a command, and examples.",
    )
    whole.add_argument("--version", action="version", version=f"lmnfast {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, description: str, epilog: str, after_interrupt: str = ""
    ) -> argparse.ArgumentParser:
        # An option that the user leaves out does not appear in the options. Every default is thus written once, in Config.
        added = commands.add_parser(
            name,
            help=description,
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            argument_default=argparse.SUPPRESS,
        )
        added.set_defaults(command=name, after_interrupt=after_interrupt)
        return added

    _add_grok(
        command(
            "grok",
            "Train the paper's network on a task, measure its LMN, draw its Figure 2.",
            GROK,
            "; the same command continues the run",
        )
    )
    _add_measure(command("measure", "Measure a run's checkpoints again; writes RUN/measure-*.csv.", MEASURE))
    _add_checkpoints(
        command(
            "checkpoints",
            "Measure checkpoints of any model, into a table and a figure (docs/checkpoints.md).",
            CHECKPOINTS,
            "; the same command goes on",
        )
    )
    _add_paper(
        command(
            "paper",
            "Reproduce the paper: every task and seed, figures, claims with intervals, and a report.",
            PAPER,
            "; the same command goes on",
        )
    )
    add_tiles(
        command(
            "tiles",
            "Measure tiles of the matrix of many samples, by any number of processes (docs/scale.md).",
            f"{METHODS_ARE}\n\n{RULES_ARE}\n\n{TILES}",
            "; the same command goes on",
        )
    )
    add_solve(command("solve", "The LMN of a folder of tiles.", SOLVE))
    add_plan(command("plan", "Say what the matrix of many samples takes: memory and time.", PLAN))
    command("info", "Show the versions, the instruction set in use, and CUDA.", INFO)
    return whole


def _add_grok(grok: argparse.ArgumentParser) -> None:
    grok.add_argument("task", choices=TASKS)
    grok.add_argument("--p", type=integer, help="modulus of modular-addition (31)")
    grok.add_argument("--bits", type=integer, help="length of the numbers of xor, in bits (5)")
    grok.add_argument(
        "--steps",
        type=integer,
        help=f"updates of the weights ({Config.steps}); more of them continue a finished run",
    )
    grok.add_argument(
        "--every", type=integer, help=f"updates from one measurement to the next ({Config.every})"
    )
    grok.add_argument(
        "--until-accurate",
        action="store_true",
        help="end at the first measured step with test accuracy 1; without it the same command goes on to the last step",
    )
    grok.add_argument("--seed", type=integer, help=f"of the split and the weights ({Config.seed})")
    grok.add_argument(
        "--init",
        choices=INITS,
        help=f"initialisation of the weights ({Config.init}: PyTorch's; the other is kept for runs begun with it)",
    )
    grok.add_argument("--activation", choices=ACTIVATIONS, help=f"between the layers ({Config.activation})")
    _add_training(grok)
    grok.add_argument("--threads", type=integer, help="threads on the CPU (the run's; torch's for a new one)")
    grok.add_argument("--out", metavar="RUN", help="the run's directory (runs/TASK-seedSEED)")
    grok.add_argument(
        "--force", action="store_true", help="delete the existing run (nothing else), start a new one"
    )
    names = f"some of {', '.join(LAYERS)} and those of --depth ({' '.join(Config.layers)})"
    grok.add_argument("--layers", nargs="+", metavar="LAYER", help=names)
    add_samples(grok, "of the training samples are measured, a fixed random choice (all)")
    grok.add_argument("--method", choices=METHODS, help=f"of the connectivity ({Config.method})")
    add_settings(grok, vars(Config))
    _add_penalty(grok)


def _add_training(grok: argparse.ArgumentParser) -> None:
    """The options of the network and of its training. Their defaults are the paper's."""
    grok.add_argument("--width", type=integer, help=f"units of a hidden layer ({Config.width})")
    grok.add_argument("--depth", type=integer, help=f"number of hidden layers ({Config.depth})")
    grok.add_argument("--optimizer", choices=OPTIMIZERS, help=f"sgd: without momentum ({Config.optimizer})")
    grok.add_argument(
        "--lr",
        dest="learning_rate",
        type=float,
        metavar="LR",
        help=f"learning rate, constant ({Config.learning_rate})",
    )
    grok.add_argument(
        "--weight-decay",
        type=float,
        help=f"of the optimiser: an update shrinks a weight by LR x WEIGHT_DECAY of itself ({Config.weight_decay})",
    )
    grok.add_argument("--batch", type=integer, help="training samples in an update (all)")
    grok.add_argument(
        "--train-fraction",
        type=float,
        metavar="SHARE",
        help=f"of all pairs, for training, between 0 and 1 ({Config.train_fraction})",
    )
    grok.add_argument(
        "--loss-dtype",
        choices=LOSS_DTYPES,
        help=f"of the softmax of the loss; with float32 long runs collapse by round-off ({Config.loss_dtype})",
    )


def _add_penalty(grok: argparse.ArgumentParser) -> None:
    """The options of what is added to the loss."""
    grok.add_argument(
        "--penalty",
        choices=PENALTIES,
        help="added to the loss, of the map from hidden_1 to the output: a measure of how it bends, or the mean squared norm "
        "of its Jacobian (none)",
    )
    grok.add_argument(
        "--penalty-weight",
        type=float,
        metavar="WEIGHT",
        help="what the penalty is multiplied by; too large a weight stops the learning of the task",
    )
    grok.add_argument(
        "--penalty-samples",
        type=integer,
        metavar="NUMBER",
        help=f"training samples of the penalty, drawn anew each time ({PENALTY_SAMPLES}, or all if there are fewer)",
    )
    grok.add_argument(
        "--penalty-every",
        type=integer,
        metavar="NUMBER",
        help="only each such update has the penalty's gradient, so many times as large: takes less time "
        f"({Config.penalty_every})",
    )


def _add_measure(again: argparse.ArgumentParser) -> None:
    again.add_argument("run", metavar="RUN", help="a directory that grok wrote")
    again.add_argument("--every", type=integer, help="only checkpoints at multiples of so many updates (1)")
    again.add_argument(
        "--force", action="store_true", help="replace the existing table, also one with more steps"
    )
    add_layers(again, f"some of {', '.join(LAYERS)} and others of the run's depth (the run's)")
    add_until(again)
    again.add_argument(
        "--split",
        choices=SPLITS,
        help="the samples to measure: those for training or for testing (train)",
    )
    add_samples(again, "of them are measured, a fixed random choice (the run's; of --split test all)")
    again.add_argument(
        "--method",
        type=methods,
        metavar="METHOD[,METHOD...]",
        help=f"of the connectivity, among {', '.join(METHODS)} (the run's); several go into one figure",
    )
    add_settings(again, dict.fromkeys(vars(Config), "the run's"))


def _add_checkpoints(other: argparse.ArgumentParser) -> None:
    other.add_argument("--model", required=True, metavar="MODULE:FACTORY", help=MODEL)
    other.add_argument(
        "--checkpoint",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="files or patterns, as 'ckpts/*'",
    )
    other.add_argument("--inputs", required=True, metavar="FILE", help=INPUTS)
    of = other.add_mutually_exclusive_group(required=True)
    add_layers(
        of, "names of the model's layers, or patterns, as 'blocks.*'; inputs: from the model's inputs on"
    )
    of.add_argument(
        "--blocks",
        "--block",
        nargs="+",
        action="extend",
        type=name,
        metavar="BLOCK",
        help="in place of layers: modules that are measured alone, also if skip connections go around them",
    )
    add_cut(other)
    add_samples(other, "of the inputs are measured, the first (all)")
    other.add_argument("--method", help=f"of the connectivity, one of {', '.join(METHODS)} ({Config.method})")
    add_settings(other, vars(Config))
    other.add_argument("--jobs", type=integer, help="processes at once (1)")
    other.add_argument("--out", metavar="DIR", help="where lmn.csv and lmn.png go (lmn)")
    other.add_argument("--force", action="store_true", help="begin a new table in place of the existing one")


def _add_paper(paper: argparse.ArgumentParser) -> None:
    paper.add_argument(
        "--seeds",
        type=integer,
        help=f"number of seeds of every task, from 0 on ({SEEDS}; {QUICK_SEEDS} with --quick); a verdict takes "
        f"{FEWEST_FOR_VERDICT}, an interval {FEWEST_FOR_INTERVAL}",
    )
    paper.add_argument(
        "--tasks", nargs="+", default=["all"], choices=("all", *TASKS), metavar="TASK",
        help=f"some of {', '.join(TASKS)} (all)",
    )  # fmt: skip
    paper.add_argument(
        "--jobs",
        type=integer,
        help="processes at once (as many as cores; 1 where there is a GPU, which trains all seeds of a task together)",
    )
    paper.add_argument("--out", default="paper", metavar="DIR", help="where everything goes (paper)")
    paper.add_argument(
        "--interventions",
        action="store_true",
        default=False,
        help="in place of the study: the same training with penalties on curvature, LMN and the Jacobian, and with another "
        "weight decay, each run until its test accuracy is 1; goes to DIR/interventions, and into the next report of the "
        "study in DIR",
    )
    paper.add_argument(
        "--results",
        metavar="FILE",
        help="with --interventions: the results.csv or .csv.gz of a study, whose runs are those without a penalty; seed 0 is "
        "run anew and must agree",
    )
    paper.add_argument(
        "--quick",
        action="store_true",
        default=False,
        help=f"{QUICK.steps} steps: XOR groks, the other tasks memorise; a look at everything in minutes; with --interventions "
        "too few steps to grok, in a minute",
    )
    add_quiet(paper)
