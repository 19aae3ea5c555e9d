"""The paper's claims and numbers (arXiv 2310.05918). Each is a statistic of a run, computed for all seeds of a study."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ..grokking.config import start
from ..grokking.figures import paper_curves
from ..grokking.run import Run, pearson
from ..grokking.tasks import TASKS, task_sizes
from ..spectrum import lmn
from .study import FEWEST_FOR_INTERVAL, FEWEST_FOR_VERDICT, LAYER, Seed

COLUMN = f"lmn_{LAYER}"
PAPER_ENDS = 15_000  # the last step of the paper's Figure 2 is 14 500
CONFIDENCE = 0.95
RISE = 1.1  # a rise by less than a tenth does not count

# Read from the pixels of Figure 2. The errors are 0.15 in LMN, 0.1 in L2 norm, and a few hundred in steps of generalisation.
PAPER = {
    "modular-addition": {
        "LMN at step 0": 32.1,
        "LMN, lowest before memorisation": 23.4,
        "LMN, peak": 53.9,
        "LMN at step 4000": 39.1,
        "LMN at step 8000": 16.4,
        "L2 norm at step 0": 33.75,
        "L2 norm, peak": 44.3,
        "L2 norm at step 10000": 32.7,
        "test loss, peak": 15.8,
        "step of generalisation": 7600,
    },
    "s4": {
        "LMN at step 0": 22.3,
        "LMN, lowest before memorisation": 15.9,
        "LMN, peak": 28.75,
        "LMN at step 4000": 20.2,
        "LMN at step 8000": 10.8,
        "L2 norm at step 0": 30.2,
        "L2 norm, peak": 38.3,
        "L2 norm at step 10000": 30.3,
        "test loss, peak": 14.3,
        "step of generalisation": 10_000,
    },
    "xor": {
        "LMN at step 0": 33.7,
        "LMN, peak": 34.7,
        "LMN at step 4000": 14.9,
        "LMN at step 8000": 19.7,
        "L2 norm at step 0": 32.65,
        "L2 norm, peak": 41.2,
        "L2 norm at step 10000": 27.9,
        "test loss, peak": 7.3,
        "step of generalisation": 3100,
    },
}
# A number counts as reproduced if the median of the seeds differs from the paper's number by at most this share.
TOLERANCES = {"LMN, peak": 0.08, "LMN at step 4000": 0.15, "L2 norm at step 10000": 0.03}
FACTOR = 1.6  # the step of generalisation counts as reproduced if it is within this factor of the paper's
NO_TOLERANCE = {("xor", "LMN at step 4000")}  # the second rise of XOR begins about there


@dataclass(frozen=True)
class Statistic:
    """A number for every seed, the paper's number, and a verdict.

    Attributes:
        name: of the claim or the number.
        task: one of TASKS.
        meaning: what is computed, and for which values the claim holds.
        paper: the paper's number.
        values: one for each seed; NaN if a run has no value, infinite for a step that a run does not reach.
        verdict: of `judged`, or how far the median is from the paper's number.
    """

    name: str
    task: str
    meaning: str
    paper: str
    values: tuple[float, ...]
    verdict: str

    @property
    def known(self) -> list[float]:
        """The values of the seeds that have one."""
        return [value for value in self.values if not math.isnan(value)]

    @property
    def median(self) -> float:
        return float(np.median(self.known)) if self.known else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.known)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrap interval of the median with CONFIDENCE, by percentiles. Needs scipy.

    Args:
        values: fewer than FEWEST_FOR_INTERVAL give NaN.
    """
    if len(values) < FEWEST_FOR_INTERVAL:
        return math.nan, math.nan
    from scipy.stats import bootstrap

    never = 1e30  # in place of infinity, which has no differences
    result = bootstrap(
        (np.minimum(values, never),),
        np.median,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = (
        float(end) if end < never / 100 else math.inf
        for end in (result.confidence_interval.low, result.confidence_interval.high)
    )
    return low, high


def judged(values: Sequence[float], holds: tuple[float, float]) -> str:
    """The verdict of a claim: "holds", "fails", "undecided", "not reached", or the number of seeds if there are too few.

    Args:
        values: for each seed.
        holds: the two numbers between which the claim holds. It holds if the whole interval lies between them, and fails if the
            whole interval lies outside. If there are too few seeds for an interval, the range of the values takes its place.
    """
    reached = [value for value in values if not math.isnan(value)]
    if not reached:
        return "not reached"
    if few := too_few(len(reached)):
        return few
    low, high = interval(reached)
    if math.isnan(low):
        low, high = min(reached), max(reached)
    if holds[0] <= low and high <= holds[1]:
        return "holds"
    return "fails" if high < holds[0] or low > holds[1] else "undecided"


def too_few(seeds: int) -> str:
    """The text in place of a verdict, "3 seeds"; empty if there are enough seeds."""
    return "" if seeds >= FEWEST_FOR_VERDICT else "1 seed" if seeds == 1 else f"{seeds} seeds"


# Of one run ------------------------------------------------------------------------------------------------


def at(run: Run, step: int, column: str = COLUMN) -> float:
    """The number at a step; NaN if it was not measured."""
    return next((row[column] for row in run.rows if row["step"] == step), math.nan)


def generalising(run: Run) -> list[dict]:
    """The rows from memorisation to generalisation. If the run does not generalise, the rows up to PAPER_ENDS; no rows if the
    run is shorter."""
    ends = run.generalised
    if ends is None:
        ends = PAPER_ENDS if run.rows[-1]["step"] >= PAPER_ENDS else -1
    return [row for row in run.rows if run.phase(row) == "generalising" and row["step"] <= ends]


def peak(run: Run) -> dict:
    """The row of the largest LMN after memorisation."""
    rows = [row for row in run.rows if run.phase(row) == "generalising"]
    return max(rows, key=lambda row: row[COLUMN], default={"step": -1, COLUMN: math.nan})


def _largest(run: Run, column: str) -> float:
    return max(row[column] for row in run.rows if row["step"] <= PAPER_ENDS)


def fall(run: Run) -> float:
    """LMN at the end of the generalising phase, divided by its peak."""
    rows = generalising(run)
    return at(run, run.generalised or rows[-1]["step"]) / peak(run)[COLUMN] if rows else math.nan


def _papers_fall(task: str) -> float:
    curve = paper_curves(task)
    known = [(step, value) for step, value in zip(curve["step"], curve["lmn"]) if not math.isnan(value)]
    steps, values = zip(*known, strict=True)
    return float(np.interp(PAPER[task]["step of generalisation"], steps, values)) / PAPER[task]["LMN, peak"]


def r_squared(run: Run, column: str = COLUMN, since_peak: bool = False) -> float:
    """R² of a linear fit of the test loss while generalising: the square of Pearson's r."""
    first = peak(run)["step"] if since_peak else 0
    rows = [row for row in generalising(run) if row["step"] >= first]
    return pearson([(row["test_loss"], row[column]) for row in rows]) ** 2


def levelling(run: Run) -> float:
    """Slope of LMN from generalisation to PAPER_ENDS, divided by its slope from the peak to generalisation."""
    if run.generalised is None:
        return math.nan
    top = peak(run)["step"]
    before = [row for row in run.rows if top <= row["step"] <= run.generalised]
    after = [row for row in run.rows if run.generalised <= row["step"] <= PAPER_ENDS]
    if min(len(before), len(after)) < 5:
        return math.nan
    slopes = [
        np.polyfit([r["step"] for r in rows], [r[COLUMN] for r in rows], 1)[0] for rows in (after, before)
    ]
    return float(slopes[0] / slopes[1])


@dataclass(frozen=True)
class Rise:
    valley_step: int
    valley: float
    top_step: int
    top: float


def second_rise(run: Run) -> Rise | None:
    """The largest rise of LMN between its peak after memorisation and PAPER_ENDS; None if the run has not generalised."""
    first = peak(run)["step"]
    rows = [row for row in run.rows if first <= row["step"] <= PAPER_ENDS]
    if run.generalised is None or not rows:
        return None
    best, valley = None, rows[0]
    for row in rows:
        valley = min(valley, row, key=lambda r: r[COLUMN])
        if best is None or row[COLUMN] - valley[COLUMN] > best.top - best.valley:
            best = Rise(valley["step"], valley[COLUMN], row["step"], row[COLUMN])
    return best


def layers_r_squared(seed: Seed, layer: str) -> float:
    """As `r_squared`, for any layer, over the milestones, because only there all layers are measured."""
    values = seed.lmn(layer)
    rows = [row for row in generalising(seed.run) if row["step"] in values]
    return pearson([(row["test_loss"], values[row["step"]]) for row in rows]) ** 2


def linear_network_lmn(run: Run) -> float:
    """LMN of the run's untrained network without its activations, measured at the embedding."""
    task, model = start(run.config)
    layers = [module for module in model if isinstance(module, nn.Linear)]
    with torch.no_grad():
        return lmn(nn.Sequential(*layers), model.get_submodule("embedding")(task.train_inputs)).item()


# Over the seeds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Claim:
    """A claim of the paper for some tasks: a number for each seed, and the two numbers between which the claim holds."""

    name: str
    meaning: str
    paper: str | Callable[[str], str]  # the paper's number, or a function from the task to it
    of: Callable[[Seed], float]
    holds: tuple[float, float]
    tasks: tuple[str, ...] = tuple(TASKS)

    def of_task(self, task: str, seeds: Sequence[Seed]) -> Statistic:
        paper = self.paper if isinstance(self.paper, str) else self.paper(task)
        values = tuple(self.of(seed) for seed in seeds)
        return Statistic(self.name, task, self.meaning, paper, values, judged(values, self.holds))


def _of_rise(value: Callable[[Rise], float]) -> Callable[[Seed], float]:
    """A number of a seed's second rise; NaN if it has no second rise."""
    return lambda seed: math.nan if (rise := second_rise(seed.run)) is None else value(rise)


CLAIMS = (
    _Claim(
        "A linear network has LMN 1", "LMN - 1", "0",
        lambda seed: linear_network_lmn(seed.run) - 1, (-1e-6, 1e-6),
    ),
    _Claim(
        "The network is near linear at initialisation", "mean entry of L at step 0; holds from 0.9", "near 1",
        lambda seed: seed.answer("entries", "mean").get(0, math.nan), (0.9, 1),
    ),
    _Claim(
        "LMN falls while the network generalises", "LMN when generalised / its peak; holds below 1",
        lambda task: f"{_papers_fall(task):.2f}",
        lambda seed: fall(seed.run), (0, 1),
    ),
    _Claim(
        "Test loss is linear in LMN while generalising", "R² of a linear fit; holds from 0.9", "near 1",
        lambda seed: r_squared(seed.run), (0.9, 1),
    ),
    _Claim(
        "More so than in the L2 norm", "R² with LMN - R² with L2 norm; holds above 0", "above 0",
        lambda seed: r_squared(seed.run) - r_squared(seed.run, "l2_norm"), (1e-9, 1),
    ),
    _Claim(
        "The same, from the peak of LMN on", "R² with LMN - R² with L2 norm; holds above 0", "above 0",
        lambda seed: r_squared(seed.run, since_peak=True) - r_squared(seed.run, "l2_norm", since_peak=True),
        (1e-9, 1),
    ),
    _Claim(
        "LMN levels off once generalised", "slope after / slope before, to step 15 000; holds within 0.2", "near 0",
        lambda seed: levelling(seed.run), (-0.2, 0.2), tuple(task for task in TASKS if task != "xor"),
    ),
    _Claim(
        "XOR: LMN rises a second time", f"top / valley before it; holds from {RISE}", "1.36",
        _of_rise(lambda rise: rise.top / rise.valley), (RISE, math.inf), ("xor",),
    ),
    _Claim(
        "XOR: the valley is 15 = 5 x 3", "LMN at the valley; holds within 10 %", "14.9",
        _of_rise(lambda rise: rise.valley), (13.5, 16.5), ("xor",),
    ),
    _Claim(
        "XOR: the top is 20 = 5 x 4", "LMN at the top; holds within 10 %", "20.2",
        _of_rise(lambda rise: rise.top), (18, 22), ("xor",),
    ),
    _Claim(
        "The embedding's LMN says less", "R² with hidden_1's LMN - R² with embedding's; holds above 0", "above 0",
        lambda seed: layers_r_squared(seed, LAYER) - layers_r_squared(seed, "embedding"), (1e-9, 1),
    ),
    _Claim(
        "The second hidden layer's LMN says nothing", "largest LMN - 1 over all steps", "0",
        lambda seed: max(seed.lmn("hidden_2").values(), default=math.nan) - 1, (-1e-6, 1e-6),
    ),
)  # fmt: skip


def claims(seeds: dict[str, list[Seed]]) -> list[Statistic]:
    """The paper's claims in the paper's order, each with a verdict."""
    return [claim.of_task(task, seeds[task]) for claim in CLAIMS for task in seeds if task in claim.tasks]


NUMBERS: dict[str, Callable[[Run], float]] = {
    "LMN at step 0": lambda run: at(run, 0),
    "LMN, lowest before memorisation": lambda run: min(
        (row[COLUMN] for row in run.rows if row["step"] <= (run.memorised or 0)), default=math.nan
    ),
    "LMN, peak": lambda run: peak(run)[COLUMN],
    "LMN at step 4000": lambda run: at(run, 4000),
    "LMN at step 8000": lambda run: at(run, 8000),
    "L2 norm at step 0": lambda run: at(run, 0, "l2_norm"),
    "L2 norm, peak": lambda run: _largest(run, "l2_norm"),
    "L2 norm at step 10000": lambda run: at(run, 10_000, "l2_norm"),
    "test loss, peak": lambda run: _largest(run, "test_loss"),
    "step of generalisation": lambda run: (
        run.generalised or (math.inf if run.rows[-1]["step"] >= PAPER_ENDS else math.nan)
    ),
}


def numbers(seeds: dict[str, list[Seed]]) -> list[Statistic]:
    """The paper's numbers and ours. The tasks must have the paper's sizes."""
    found = []
    for task, members in seeds.items():
        config = members[0].run.config
        assert task in TASKS and task_sizes(task) == task_sizes(task, p=config.p, bits=config.bits)
        for name, paper in PAPER[task].items():
            values = tuple(NUMBERS[name](seed.run) for seed in members)
            measured = Statistic(name, task, "", f"{paper:g}", values, "")
            verdict = _within(task, name, measured.median / paper)
            if verdict.startswith(("within", "outside")):
                verdict = too_few(len(measured.known)) or verdict
            found.append(replace(measured, verdict=verdict))
    return found


def _within(task: str, name: str, ratio: float) -> str:
    if math.isnan(ratio):
        return "not reached"
    if name == "step of generalisation":
        return f"{'within' if 1 / FACTOR <= ratio <= FACTOR else 'outside'} a factor {FACTOR}"
    tolerance = None if (task, name) in NO_TOLERANCE else TOLERANCES.get(name)
    if tolerance is None:
        return ""
    return f"{'within' if abs(ratio - 1) <= tolerance else 'outside'} {tolerance:.0%}"
