"""Statistics of the curves of one run (arXiv 2310.05918): its peak, its phases, its second rise, late falls."""

import math
from dataclasses import dataclass

import numpy as np

from .._series import pearson
from ..grokking.run import Run
from .settings import LAYER

COLUMN = f"lmn_{LAYER}"
PAPER_ENDS = 15_000  # the last step of the paper's Figure 2 is 14 500
RISE = 1.1  # a rise by less than a tenth does not count
LATE = 10_000  # a fall after this step is a late one
SUDDEN = 1000  # a fall within so many steps is a sudden one


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


def largest(run: Run, column: str) -> float:
    return max(row[column] for row in run.rows if row["step"] <= PAPER_ENDS)


def fall(run: Run) -> float:
    """LMN at the end of the generalising phase, divided by its peak."""
    rows = generalising(run)
    return at(run, run.generalised or rows[-1]["step"]) / peak(run)[COLUMN] if rows else math.nan


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
    """The largest rise of LMN between its peak after memorisation and PAPER_ENDS; None if the run has not generalised, or is
    shorter."""
    first = peak(run)["step"]
    rows = [row for row in run.rows if first <= row["step"] <= PAPER_ENDS]
    if run.generalised is None or not rows or run.rows[-1]["step"] < PAPER_ENDS:
        return None
    best, valley = None, rows[0]
    for row in rows:
        valley = min(valley, row, key=lambda r: r[COLUMN])
        if best is None or row[COLUMN] - valley[COLUMN] > best.top - best.valley:
            best = Rise(valley["step"], valley[COLUMN], row["step"], row[COLUMN])
    return best


def late_fall(run: Run) -> float:
    """The smallest LMN after step LATE, divided by LMN at LATE; NaN if the run is shorter."""
    later = [row[COLUMN] for row in run.rows if row["step"] > LATE]
    return min(later) / at(run, LATE) if later else math.nan


def late_sudden_fall(run: Run) -> float:
    """The smallest ratio after step LATE of LMN to that of SUDDEN steps earlier; NaN if the run is shorter."""
    known = {row["step"]: row[COLUMN] for row in run.rows}
    ratios = [
        value / known[step - SUDDEN]
        for step, value in known.items()
        if step - SUDDEN >= LATE and step - SUDDEN in known
    ]
    return min(ratios, default=math.nan)
