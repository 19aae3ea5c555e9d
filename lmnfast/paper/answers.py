"""The tables of answers: numbers of a run's checkpoints that the run itself does not have, for a task and a seed."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..cutting import cut
from ..grokking.config import Config, start
from ..grokking.run import load_checkpoint, read_config, read_run
from ..jacobian import linear_regions
from ..runs.tables import read_table, write_table
from ..spectrum import SETTINGS, SHARES, Measurement, measure
from .curves import LAYER, RISE, second_rise
from .maps import scores

# Each of the remaining two layers is one Linear away from LAYER or one of these. A Linear does not change LMN.
OTHER_LAYERS = ("embedding", "hidden_2")
STAND_INS = ("hermite", "hermite-midpoint", "jacobian")
RULES = (("lobatto", 7), ("lobatto", 9), ("uniform", 5), ("uniform", 11), ("uniform", 51), ("uniform", 101))
SIZES = (100, 200, 300, 400, 500, 600, 700, 800, 900)  # and all pairs
OUTPUTS = (1, 5, 31, 310)
EPSILON = "8e-8"  # the stabiliser in the denominator of r2, fitted to the paper's LMN at step 0
STABILISER = float(EPSILON)
COLUMNS = ("question", "variant", "step", "layer", "value", *SETTINGS, *SHARES)
OPTIONAL = tuple(name for name in COLUMNS if name not in ("step", "samples", "value"))

# A function from a layer to the tail, its training samples and its test samples.
Tails = Callable[[str], tuple[nn.Module, Tensor, Tensor]]
How = dict[str, Any]  # the rule and the number of points of a measurement


class Answers:
    """The table of a task and a seed. Each part is measured if the table lacks it, and is then written.

    Args:
        path: of the table.
        run: the directory of the finished run.
        how: the rule and the number of points of most measurements.
    """

    def __init__(self, path: Path, run: Path, how: How) -> None:
        self.path, self.run, self.how = path, run, how
        self.rows = read_answers(path)

    def at_start(self) -> None:
        """LMN and spectrum at step 0, with and without STABILISER in r2."""
        if not self._has("start"):
            for step, tails in tails_of(self.run, [0]):
                self._add(step, _at_start, step, tails)

    def at_milestones(self, milestones: Iterable[int], few: Iterable[int]) -> None:
        """The other layers, other samples and stand-ins; at a few of the steps other nodes and numbers of samples."""
        known = {row["step"] for row in self.rows if row["question"] == "samples"}
        for step, tails in tails_of(self.run, [step for step in milestones if step not in known]):
            self._add(step, _at_milestone, step, tails, self.how, step in few)

    def outputs(self) -> None:
        """The untrained network with other numbers of random outputs."""
        if not self._has("outputs"):
            self._add(0, _of_outputs, read_config(self.run), self.how)

    def maps(self) -> None:
        """Which samples share a map, at the valley and the top of the second rise. A run without such a rise has no answer."""
        task, _ = start(read_config(self.run))
        rise = second_rise(read_run(self.run))
        if rise is None or rise.top < RISE * rise.valley:
            return
        places = {"valley": rise.valley_step, "top": rise.top_step}
        for place, step in places.items():
            if not self._has("maps", f"{place}: "):
                for _, tails in tails_of(self.run, [step]):
                    self._add(step, _of_maps, step, place, tails, task.train_inputs, self.how)

    def regions(self, relu: Path, steps: Iterable[int]) -> None:
        """The linear regions of the run with ReLU that the training samples lie in."""
        if not self._has("regions"):
            for step, tails in tails_of(relu, steps):
                f, x = tails(LAYER)[:2]
                self.rows.append(row("regions", "relu", step, LAYER, len(x), linear_regions(f, x)))
            write_table(self.path, COLUMNS, self.rows)

    def _has(self, question: str, variant: str = "") -> bool:
        """Whether there are answers to a question, with variants that begin so."""
        return any(row["question"] == question and row["variant"].startswith(variant) for row in self.rows)

    def _add(self, step: int, measured: Callable[..., list[dict]], *given: Any) -> None:
        """Adds the rows of a function, and the seconds that it takes."""
        begin = time.perf_counter()
        self.rows += measured(*given)
        self.rows.append(row("seconds", "", step, "", 0, time.perf_counter() - begin))
        write_table(self.path, COLUMNS, self.rows)


def tails_of(run: Path, steps: Iterable[int]) -> Iterator[tuple[int, Tails]]:
    """The tails of the run's network at some of its steps."""
    task, model = start(read_config(run))

    def tails(layer: str) -> tuple[nn.Module, Tensor, Tensor]:
        f, samples = cut(model, layer, torch.cat([task.train_inputs, task.test_inputs]))
        train_samples, test_samples = samples.tensor_split([len(task.train_inputs)])
        return f, train_samples, test_samples

    for step in steps:
        load_checkpoint(model, run, step)
        yield step, tails


def row(
    question: str, variant: str, step: int, layer: str, m: Measurement | int, value: float | None = None
) -> dict:
    """A row of answers.

    Args:
        question: one of the report's questions.
        variant: of the question.
        step: of the run.
        layer: the layer at which the network is cut.
        m: the measurement, or only its number of samples.
        value: the answer; None: the measurement's LMN.
    """
    said = {"question": question, "variant": variant, "step": step, "layer": layer, "value": value}
    if isinstance(m, Measurement):
        said |= {name: getattr(m, name) for name in (*SETTINGS, *SHARES)}
        said["value"] = m.lmn if value is None else value
    else:
        said["samples"] = m
    return {**dict.fromkeys(COLUMNS, ""), **said}


def _at_start(step: int, tails: Tails) -> list[dict]:
    """By 21 uniform points, as the paper's, because a stabiliser is added to the variances of these points."""
    f, x, _ = tails(LAYER)
    rows = []
    for name, stabiliser in (("exact", 0.0), ("stabilised", STABILISER)):
        m = measure(f, x, stabiliser=stabiliser)
        n = m.samples
        entries = m.connectivity.double()[~torch.eye(n, dtype=torch.bool, device=m.connectivity.device)]
        falling = m.eigenvalues.sort(descending=True).values
        values = {
            "LMN": m.lmn,
            "mean": entries.mean().item(),
            "standard deviation": entries.std(correction=0).item(),
            "second eigenvalue": falling[1].item(),
            "first negative": float((falling >= 0).sum()),
        }
        rows += [row("start", f"{name}: {what}", step, LAYER, m, value) for what, value in values.items()]
    return rows


def _at_milestone(step: int, tails: Tails, how: How, long: bool) -> list[dict]:
    f, train_samples, test_samples = tails(LAYER)
    m = measure(f, train_samples)
    clipped = 2 ** ops.spectral_entropy(m.eigenvalues.clamp(min=0)).item()
    everywhere = torch.cat([train_samples, test_samples])
    small = train_samples[: len(test_samples)]
    rows = [
        row("samples", "train", step, LAYER, m),
        row("samples", "test", step, LAYER, measure(f, test_samples, **how)),
        row("samples", "train, as many as test", step, LAYER, measure(f, small, **how)),
        row("samples", "both", step, LAYER, measure(f, everywhere, **how)),
        row("negative", "clipped", step, LAYER, replace(m, negative="clip"), clipped),
        row("negative", "share", step, LAYER, m, m.negative_share),
    ]
    rows += [
        row("stand-ins", name, step, LAYER, measure(f, train_samples, method=name)) for name in STAND_INS
    ]
    for layer in OTHER_LAYERS:
        g, x, _ = tails(layer)
        rows.append(row("layers", "exact", step, layer, measure(g, x, **how)))
    rows.append(row("layers", "stabilised", step, "hidden_2", measure(g, x, stabiliser=STABILISER)))
    return rows + _at_few(step, tails, how) if long else rows


def _at_few(step: int, tails: Tails, how: How) -> list[dict]:
    f, train_samples, test_samples = tails(LAYER)
    rows = [
        row("nodes", f"{rule} {k}", step, LAYER, measure(f, train_samples, rule=rule, points=k))
        for rule, k in RULES
    ]
    pairs = torch.cat([train_samples, test_samples])
    # The sub-samples are nested: each is the beginning of one random order.
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    sizes = [*(size for size in SIZES if size < len(pairs)), len(pairs)]
    for size in sizes:
        m = measure(f, pairs[:size], observables="pooled_curvature", **how)
        rows += [
            row("number", "random", step, LAYER, m),
            row("number, curvature", "random", step, LAYER, m, m.observables["pooled_curvature"]),
        ]
    return rows


def _of_outputs(config: Config, how: How) -> list[dict]:
    task, model = start(config)
    hidden = [model.get_submodule(name) for name in ("hidden_2_pre", "hidden_2")]
    _, x = cut(model, LAYER, task.train_inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        lasts = [nn.Linear(config.width, outputs).to(x.device) for outputs in OUTPUTS]
    rows = []
    for outputs, last in zip(OUTPUTS, lasts, strict=True):
        m = measure(nn.Sequential(*hidden, last), x, observables=("curvature", "pooled_curvature"), **how)
        rows.append(row("outputs", f"LMN, {outputs}", 0, LAYER, m))
        rows += [
            row("outputs", f"{name}, {outputs}", 0, LAYER, m, value) for name, value in m.observables.items()
        ]
    return rows


def _of_maps(step: int, place: str, tails: Tails, inputs: Tensor, how: How) -> list[dict]:
    f, x, _ = tails(LAYER)
    m = measure(f, x, **how)
    found = scores(m.connectivity, inputs.cpu(), place)
    return [row("maps", f"{place}: {what}", step, LAYER, m, value) for what, value in found.items()]


def read_answers(path: Path) -> list[dict]:
    """The rows of a table of answers; an empty list if there is no table.

    Raises:
        ValueError: the table is damaged.
    """
    if not path.exists():
        return []
    try:
        return read_table(path, COLUMNS, optional=OPTIONAL)
    except ValueError:
        raise ValueError(
            f"out: cannot read {path}; delete it to make it again (it is damaged, or from another version of lmnfast)"
        ) from None
