"""The observables as progress measures: each against the test loss while the network generalises, and as an alarm."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .._series import pearson
from ..grokking.run import Run
from .claims import Statistic, judged
from .curves import LAYER, PAPER_ENDS, generalising
from .study import Seed

HALF = 0.5  # a run has an event to be early for if its test accuracy reaches this
VERDICTS = {"holds": "more", "fails": "less"}


def names_in(run: Run) -> tuple[str, ...]:
    """The observables that a run has: LMN, those of its config, and the L2 norm."""
    return tuple(dict.fromkeys(("lmn", *run.config.observables, "l2_norm")))


def column(name: str) -> str:
    """The column of an observable in the rows of a run."""
    return name if name == "l2_norm" else f"{name}_{LAYER}"


def correlation(run: Run, name: str) -> float:
    """Pearson's r of an observable with the test loss in the generalising phase."""
    return pearson([(row["test_loss"], row[column(name)]) for row in generalising(run)])


def more_linear(run: Run, name: str) -> float:
    """|r| of an observable less that of LMN, in the same run."""
    return abs(correlation(run, name)) - abs(correlation(run, "lmn"))


def alarms(run: Run, name: str) -> list[int]:
    """The steps up to PAPER_ENDS at which an observable passes the middle of its range in the generalising phase, in the
    direction in which it goes from the beginning of this phase to its end."""
    phase = [row[column(name)] for row in generalising(run)]
    if len(phase) < 2:
        return []
    middle = (min(phase) + max(phase)) / 2
    sign = math.copysign(1, phase[-1] - phase[0])
    rows = [row for row in run.rows if row["step"] <= PAPER_ENDS]
    beyond = [sign * (row[column(name)] - middle) >= 0 for row in rows]
    return [row["step"] for row, before, now in zip(rows[1:], beyond, beyond[1:]) if now and not before]


def half_generalised(run: Run) -> float:
    """The first measured step up to PAPER_ENDS with test accuracy HALF; NaN if there is none."""
    steps = (row["step"] for row in run.rows if row["test_accuracy"] >= HALF and row["step"] <= PAPER_ENDS)
    return next(steps, math.nan)


def _true_alarm(run: Run, name: str) -> float:
    if math.isnan(half_generalised(run)):
        return math.nan
    return next((step for step in alarms(run, name) if step >= (run.memorised or 0)), math.nan)


def lead(run: Run, name: str) -> float:
    """The steps from the first alarm after memorisation to test accuracy HALF; below 0 if the alarm is late; NaN without
    both."""
    return half_generalised(run) - _true_alarm(run, name)


def false_alarms(run: Run, name: str) -> float:
    """The number of alarms but the first after memorisation; of all alarms in a run that does not reach test accuracy HALF. NaN
    if the run has no generalising phase to set the middle."""
    if len(generalising(run)) < 2:
        return math.nan
    return float(len(alarms(run, name)) - (not math.isnan(_true_alarm(run, name))))


@dataclass(frozen=True)
class Ruler:
    """An observable over the seeds of a task."""

    name: str
    r: Statistic
    more: Statistic
    """|r| less that of LMN; the verdict is "more" or "less" linear than LMN."""
    lead: Statistic
    false_alarms: Statistic


def rulers(seeds: Sequence[Seed]) -> Iterator[Ruler]:
    """Every observable that all runs of a task have."""
    task = seeds[0].run.config.task

    def over_seeds(name: str, of: Callable[[Run, str], float]) -> Statistic:
        return Statistic(of.__name__, task, "", "", tuple(of(seed.run, name) for seed in seeds), "")

    for name in names_in(seeds[0].run):
        more = over_seeds(name, more_linear)
        verdict = judged(more.values, (1e-9, 2))
        yield Ruler(
            name,
            over_seeds(name, correlation),
            Statistic(
                more.name, task, "", "", more.values, "" if name == "lmn" else VERDICTS.get(verdict, verdict)
            ),
            over_seeds(name, lead),
            over_seeds(name, false_alarms),
        )
