"""Options that several commands have. What it imports does not import torch."""

import argparse
from collections.abc import Mapping
from typing import Any

from ._choices import DEVICES, METHODS, NEGATIVE, OBSERVABLES, RULES

INPUTS = ".npy, .npz, .pt or .safetensors"
MODEL = "called without arguments, returns the model"


def add_cut(parser: argparse.ArgumentParser) -> None:
    """How a model is cut and called, and its checkpoints read."""
    parser.add_argument(
        "--until", metavar="LAYER", help="the layer with whose output the maps end (the model's output)"
    )
    parser.add_argument(
        "--output", metavar="KEY", help="which of the model's outputs counts: key, attribute or index"
    )
    parser.add_argument(
        "--batch-dim",
        type=integer,
        metavar="D",
        help="dimension of the samples: 1 for an nn.LSTM by default (0)",
    )
    parser.add_argument("--forward", metavar="MODULE:FUNCTION", help="called as function(model, inputs)")
    parser.add_argument("--key", type=name, help="where in a checkpoint the state dict is, as state.ema")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="also read checkpoints that hold other objects, such as whole modules; runs code that is in the files",
    )


def add_layers(parser: argparse._ActionsContainer, text: str) -> None:
    parser.add_argument(
        "--layers", "--layer", nargs="+", action="extend", type=name, metavar="LAYER", help=text
    )


def add_until(parser: argparse.ArgumentParser) -> None:
    text = "the layer with whose output the measured maps end (the model's output)"
    parser.add_argument("--until", metavar="LAYER", help=text)


def add_samples(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument(
        "--samples",
        type=integer,
        help=f"how many {of}; the LMN of fewer samples is no estimate of the LMN of all",
    )


def add_settings(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """The options of every measurement."""
    add_rule(parser, defaults)
    add_negative(parser, defaults)
    parser.add_argument(
        "--observables",
        type=names,
        metavar="NAME[,NAME...]",
        help=f"numbers beside LMN, among {', '.join(OBSERVABLES)} ({defaults['observables'] or 'none'})",
    )
    add_device(parser)
    add_quiet(parser)


def add_rule(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """The options of a path."""
    parser.add_argument(
        "--points", type=integer, help=f"nodes on a path, ends included ({defaults['points']})"
    )
    parser.add_argument("--rule", choices=RULES, help=f"where on the path they lie ({defaults['rule']})")
    parser.add_argument(
        "--stabiliser",
        type=float,
        metavar="NUMBER",
        help="added to the denominators of r2, in squared units of the outputs; 8e-8 for the paper's numbers at step 0 "
        f"({defaults['stabiliser']})",
    )


def add_negative(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    parser.add_argument(
        "--negative", choices=NEGATIVE, help=f"what negative eigenvalues count ({defaults['negative']})"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, help="where to compute (auto)")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=False,
        help="no progress and no estimates of the time; results only",
    )


def integer(text: str) -> int:
    """An integer, also as 1e4."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if not value.is_integer() or abs(value) >= 2**53:  # float64 holds all integers up to there
        raise argparse.ArgumentTypeError(f"expected an integer, as 10000 or 1e4, got {text!r}")
    return int(value)


def name(text: str) -> str:
    """A name, which is not empty: an empty one may come of a variable of a shell that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, got ''")
    return text


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def methods(text: str) -> tuple[str, ...]:
    methods = tuple(text.split(","))
    if unknown := [method for method in methods if method not in METHODS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    return methods
