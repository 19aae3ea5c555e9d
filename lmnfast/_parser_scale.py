"""The options and the help of the commands for many samples: tiles, solve, plan."""

import argparse
import re

from ._choices import METHODS, SOLVERS
from ._options import (
    INPUTS,
    MODEL,
    add_cut,
    add_device,
    add_negative,
    add_quiet,
    add_rule,
    add_samples,
    integer,
    name,
)
from .grokking.config import Config

# What `lmnfast plan --widths` may have between its layers.
ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "tanh": "Tanh"}

TILES = """examples (docs/checkpoints.md has the files digits.py, step_*.pt and x.npy):
  lmnfast tiles --model digits:make --checkpoint step_40.pt --inputs x.npy --layer 1 --out lmn-tiles
  lmnfast tiles --model digits:make --checkpoint step_40.pt --inputs x.npy --layer 1 --out two --shard 1/2
  lmnfast tiles --model digits:make --checkpoint step_40.pt --inputs x.npy --layer 1 --out two --shard 2/2
"""
SOLVE = """examples:
  lmnfast solve lmn-tiles                                after all shards of lmnfast tiles --out lmn-tiles
  lmnfast solve two --negative clip
"""
PLAN = """examples (docs/checkpoints.md has the files digits.py and x.npy):
  lmnfast plan --samples 20000 --widths 100 100 31 --points 5 --rule lobatto
  lmnfast plan --samples 20000 --model digits:make --inputs x.npy --layer 1 --ranks 8
"""


def add_tiles(tiles: argparse.ArgumentParser) -> None:
    tiles.add_argument("--model", required=True, metavar="MODULE:FACTORY", help=MODEL)
    tiles.add_argument("--inputs", required=True, metavar="FILE", help=INPUTS)
    _add_place(tiles, required=True)
    add_samples(tiles, "of the inputs are measured, the first (all)")
    _add_rule(tiles)
    tiles.add_argument(
        "--shard",
        type=_shard,
        metavar="K/N",
        help="the K-th of N parts of the tiles, K from 1 to N, each by a process of its own (1/1: all that are not there)",
    )
    tiles.add_argument(
        "--out", metavar="DIR", help="the folder of the tiles, one for each measurement (tiles)"
    )
    add_device(tiles)
    add_quiet(tiles)


def add_solve(solve: argparse.ArgumentParser) -> None:
    solve.add_argument("folder", metavar="DIR", help="the folder of lmnfast tiles --out")
    solve.add_argument(
        "--solver",
        choices=SOLVERS,
        help="dense: all eigenvalues, in float64; estimate: LMN with a bar of 1 %%, from products with the matrix (dense)",
    )
    add_negative(solve, vars(Config))
    add_device(solve)
    add_quiet(solve)


def add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--samples", type=integer, metavar="N", help="of the matrix (those of --inputs); needed with --widths"
    )
    plan.add_argument("--ranks", type=integer, help="processes that share the work, each like this one (1)")
    of = plan.add_mutually_exclusive_group(required=True)
    of.add_argument(
        "--widths",
        nargs="+",
        type=integer,
        metavar="WIDTH",
        help="a network of Linear layers with these widths, from the samples to the outputs, in place of a model",
    )
    of.add_argument("--model", metavar="MODULE:FACTORY", help=MODEL)
    plan.add_argument(
        "--activation", choices=tuple(ACTIVATIONS), help="between the layers of --widths (silu)"
    )
    plan.add_argument("--inputs", metavar="FILE", help=f"of --model: {INPUTS}")
    _add_place(plan, required=False)
    _add_rule(plan)
    add_device(plan)
    add_quiet(plan)


def _add_place(parser: argparse.ArgumentParser, required: bool) -> None:
    """The checkpoint of a model, and where it is cut."""
    parser.add_argument("--checkpoint", metavar="FILE", help="its weights (those that the factory gives)")
    of = parser.add_mutually_exclusive_group(required=required)
    of.add_argument(
        "--layer", type=name, metavar="LAYER", help="a layer's name; inputs: from the model's inputs on"
    )
    of.add_argument(
        "--block",
        type=name,
        metavar="BLOCK",
        help="in place of a layer: a module that is measured alone, as checkpoints does",
    )
    add_cut(parser)


def _add_rule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, help=f"of the connectivity ({Config.method})")
    add_rule(parser, vars(Config))


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    shard = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= shard[0] <= shard[1]:
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, as 3/8, got {text!r}")
    return shard
