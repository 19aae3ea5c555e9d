"""What the commands for many samples do: tiles, solve, plan."""

import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ._folder import folder_of
from ._memory import available, said_bytes
from ._parser_scale import ACTIVATIONS
from ._settings import Settings
from .checkpoints import first_samples, load_inputs
from .checkpoints.measure import tail_at
from .checkpoints.sources import in_one_line
from .runs.device import refuse_unusable, settled_device
from .runs.files import write_json
from .runs.progress import move, progress_bar
from .scale import check_counts, make_tiles, plan, solve

# The options of a network and of where it is cut.
NETWORK = (
    "model",
    "checkpoint",
    "inputs",
    "layer",
    "block",
    "until",
    "output",
    "batch_dim",
    "forward",
    "key",
)
SETTINGS = ("method", "points", "rule", "stabiliser")
# Samples that are made for a network of --widths.
TRIED = 1024


def tiles(options: Namespace) -> None:
    given = vars(options)
    out = folder_of(given.get("out", "tiles"))
    refuse_unusable(given.get("device", "auto"))
    with _in_one_line():
        settings = Settings(**_settings(given))
        f, x = _network(given, given.get("samples"))
    shard = given.get("shard", (1, 1))
    show = not options.quiet and find_spec("tqdm") is not None
    with progress_bar(100, 0, show, "%") as bar, _in_one_line():
        files = make_tiles(
            f, x, out, shard, settings, lambda share: move(bar, int(100 * share)), _command(given)
        )
    print(f"shard {shard[0]}/{shard[1]}: {len(files)} tiles in {out}")


def solve_folder(options: Namespace) -> None:
    given = vars(options)
    refuse_unusable(given.get("device", "auto"))
    chosen = {name: given[name] for name in ("solver", "negative", "device") if name in given}
    folder = folder_of(options.folder)
    say = None if options.quiet else lambda line: print(line, file=sys.stderr)
    with _in_one_line():
        m = solve(folder, **chosen, say=say)
    values = {name: value for name, value in m.to_dict().items() if not isinstance(value, (Tensor, dict))}
    for name, value in values.items():
        print(f"{name:16}  {value:.6g}" if isinstance(value, float) else f"{name:16}  {value}")
    try:
        write_json(folder / "lmn.json", values)
    except OSError as error:  # the numbers are printed already: a folder may be for reading alone
        raise OSError(f"out: cannot write {folder / 'lmn.json'}: {error.strerror or error}") from error
    for name in ("lmn.json", "connectivity.npy"):
        print(f"written: {folder / name}")


def plan_for(options: Namespace) -> None:
    given = vars(options)
    refuse_unusable(given.get("device", "auto"))
    more = {name: given[name] for name in ("samples", "ranks") if name in given}
    check_counts(**more)
    with _in_one_line():
        f, x = _planned(given)
        print(plan(f, x, **more, **_settings(given)))


def _planned(given: Mapping[str, Any]) -> tuple[nn.Module, Tensor]:
    """The network of a plan, and samples: of a model, or made of widths."""
    widths = given.get("widths")
    if widths is None:
        if "activation" in given:
            raise ValueError("activation: expected --widths with it")
        return _network(given, None)
    if wrong := [f"--{name.replace('_', '-')}" for name in (*NETWORK, "trust") if name in given]:
        raise ValueError(f"widths: expected no option of a model with it, got {', '.join(wrong)}")
    if "samples" not in given:
        raise ValueError("samples: expected a number with --widths, as --samples 20000")
    said = " ".join(map(str, widths))
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths: expected two or more of at least 1, got {said}")
    try:
        return _made_of(widths, given.get("activation", "silu"), settled_device(given.get("device", "auto")))
    except (RuntimeError, MemoryError, TypeError, OverflowError) as error:  # torch has no one error for it
        raise ValueError(f"widths: cannot make a network of {said}: {in_one_line(error)}") from error


def _made_of(widths: list[int], activation: str, device: str) -> tuple[nn.Module, Tensor]:
    """A network of Linear layers, and samples. Raises MemoryError before memory is taken that is not there."""
    numbers = TRIED * widths[0] + sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))
    free = available(torch.device("cpu"))
    if free is not None and 4 * numbers > free:
        raise MemoryError(
            f"it takes {said_bytes(4 * numbers)} with its samples, and {said_bytes(free)} are free"
        )
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), getattr(nn, ACTIVATIONS[activation])()]
    x = torch.randn(TRIED, widths[0], generator=generator)
    return nn.Sequential(*layers[:-1]).to(device), x.to(device)


def _network(given: Mapping[str, Any], samples: int | None) -> tuple[nn.Module, Tensor]:
    """The tail and its samples."""
    if "inputs" not in given or not {"layer", "block"} & set(given):
        raise ValueError("model: expected --inputs with it, and --layer or --block")
    if alone := [name for name in ("key", "trust") if name in given and "checkpoint" not in given]:
        raise ValueError(f"{alone[0]}: expected --checkpoint with it")
    inputs = load_inputs(given["inputs"])
    if samples is not None:
        inputs = first_samples(inputs, samples, given.get("batch_dim"))
    named = {name: given[name] for name in NETWORK if name in given} | {"inputs": inputs}
    output = named.get("output")
    if output is not None and re.fullmatch(r"-?[0-9]+", output):
        named["output"] = int(output)
    if given.get("trust"):
        print("lmnfast: warning: --trust: code that is in the checkpoint is run", file=sys.stderr)
    return tail_at(**named, device=given.get("device", "auto"), trust=given.get("trust", False))


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turns the errors of the user's network, which may be any, and of lacking memory into one line."""
    try:
        yield
    except (TypeError, RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(in_one_line(error)) from error


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in SETTINGS if name in given}


def _command(given: Mapping[str, Any]) -> str:
    """The command that makes all tiles which are not there."""
    words = ["lmnfast", "tiles"]
    for name, value in given.items():
        if name in (*NETWORK, *SETTINGS, "samples", "trust", "device", "out"):
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return shlex.join(words)
