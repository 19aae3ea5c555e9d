"""What the report says of the interventions: a table of the arms, claims with verdicts, a figure, the whole grid of weights."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from .._drawing import BLACK, COLOURS, STYLES
from .claims import CONFIDENCE, too_few
from .figures import panels_of_tasks
from .interventions import Row, choices, read_results, read_settings, steps_to_accuracy
from .settings import ARMS, MATCHED, PENALISED, Interventions
from .text import number, table

LABELS = {
    "none": "none (the paper's training)",
    "pooled_curvature": "penalty on the pooled curvature",
    "lmn": "penalty on LMN",
    "jacobian_norm": "penalty on the Jacobian's norm",
    "weight_decay": "weight decay, matched in the norm",
}
# Arms, and the arms that they are compared with in the claims about steps.
COMPARED = (
    *((arm, "none") for arm in ARMS[1:]),
    *((MATCHED, other) for other in ("weight_decay", "jacobian_norm")),
)


@dataclass(frozen=True)
class SignTest:
    """A claim about pairs of runs with one seed: how many are as claimed, how many the other way round, how many equal."""

    name: str
    task: str
    more: int
    fewer: int
    equal: int

    @property
    def p(self) -> float:
        """Of a two-sided sign test without the equal pairs: the probability of so uneven a split of fair coins."""
        count, most = self.more + self.fewer, max(self.more, self.fewer)
        tail = sum(math.comb(count, k) for k in range(most, count + 1)) / 2**count
        return min(1.0, 2 * tail)

    @property
    def verdict(self) -> str:
        """ "holds" or "fails" if p is below 1 - CONFIDENCE, else "undecided"; the number of seeds if there are too few."""
        if few := too_few(self.more + self.fewer + self.equal):
            return few
        if self.p >= 1 - CONFIDENCE:
            return "undecided"
        return "holds" if self.more > self.fewer else "fails"


def sign_test(name: str, task: str, ours: Sequence[float], theirs: Sequence[float]) -> SignTest:
    """The claim that our values are the smaller ones, pair by pair. Two infinite values are equal, and NaN is in no pair."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if not (math.isnan(a) or math.isnan(b))]
    more, fewer = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    return SignTest(name, task, more, fewer, len(pairs) - more - fewer)


def interval_of_order(values: Sequence[float]) -> tuple[float, float]:
    """The interval of the median with CONFIDENCE by order statistics: from the k-th smallest to the k-th largest value.

    Of fair coins, fewer than k of n are heads with a probability of at most (1 - CONFIDENCE) / 2, and k is the largest such
    number. No distribution is assumed, and values may be infinite. NaN for fewer values than 6, which have no such k.
    """
    count, below, k = len(values), 0.0, 0
    while (below := below + math.comb(count, k) / 2**count) <= (1 - CONFIDENCE) / 2:
        k += 1
    if k == 0:
        return math.nan, math.nan
    known = sorted(values)
    return known[k - 1], known[-k]


# The section of the report ---------------------------------------------------------------------------------


def section(folder: Path, figure: Path, shown_as: str) -> list[str]:
    """Draws the figure; returns the lines of the section.

    Args:
        folder: of finished interventions.
        figure: the file to write.
        shown_as: the path of the figure in the report.

    Raises:
        ValueError: files of the folder are missing or damaged.
    """
    rows, settings = read_results(folder / "results.csv.gz"), read_settings(folder)
    reported = by_arm([row for row in rows if row["seeds"] == "reported"])
    tuning = [row for row in rows if row["seeds"] == "tuning"]
    draw(reported, settings, figure)
    found = [*claims_of_steps(reported), *claims_of_numbers(reported)]
    return [
        "## Interventions",
        "",
        *_how(reported, settings),
        f"![Interventions]({shown_as})",
        "",
        "*Seeds with test accuracy 1, as a share, over the steps of training. Runs end there or at the last step shown.*",
        "",
        *_arms(reported, settings),
        *_claims(found),
        *_grid(tuning, settings),
    ]


def write_section(folder: Path) -> list[Path]:
    """Writes the section as a report of its own beside the table of results; returns the paths of the files."""
    lines = section(folder, folder / "interventions.png", "interventions.png")
    report = folder / "report.md"
    report.write_text("\n".join(["#" + lines[0].removeprefix("##"), *lines[1:]]) + "\n")
    return [report, folder / "interventions.png", folder / "results.csv.gz"]


Reported = dict[str, dict[str, list[Row]]]  # by task and arm, in the order of the seeds


def by_arm(rows: Iterable[Row]) -> Reported:
    """The rows of each task and arm, by seed."""
    found: Reported = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        found.setdefault(row["task"], {arm: [] for arm in ARMS})[row["arm"]].append(row)
    return found


def _values(rows: Iterable[Row], name: str) -> list[float]:
    """The numbers of a column; NaN where a run has none."""
    return [math.nan if row[name] is None else float(row[name]) for row in rows]


def claims_of_steps(reported: Reported) -> list[SignTest]:
    """Which arms are accurate earlier than others."""
    return [
        sign_test(
            f"{_short(arm)}: accurate earlier than {_short(other)}",
            task,
            *([steps_to_accuracy(row) for row in arms[name]] for name in (arm, other)),
        )
        for arm, other in COMPARED
        for task, arms in reported.items()
    ]


def claims_of_numbers(reported: Reported) -> list[SignTest]:
    """Which arms have a smaller LMN at the end than the paper's training."""
    return [
        sign_test(
            f"{_short(arm)}: smaller LMN at the end", task, *(_values(arms[a], "lmn") for a in (arm, "none"))
        )
        for arm in ARMS[1:]
        for task, arms in reported.items()
    ]


def _short(arm: str) -> str:
    return arm.replace("_", " ") if arm != "lmn" else "LMN"


def _how(reported: Reported, settings: Interventions) -> list[str]:
    count = len(next(iter(reported.values()))["none"])
    horizons = ", ".join(f"{settings.horizons[task]} for {task}" for task in reported)
    seeds = ", ".join(map(str, settings.tuning))
    n = settings.penalty_every
    when = "in every update" if n == 1 else f"in one of {n} updates, {n} times as large"
    taken = [row for arms in reported.values() for row in arms["none"] if row["source"] != "run"]
    lines = [
        f"Does a network grok earlier if its map is made more linear? {count} seed{'s' * (count > 1)} of each task and arm "
        "train as the paper's, with one thing added: a penalty on the map from `hidden_1` to the output (its pooled curvature, "
        f"its LMN, or the mean squared norm of its Jacobian, each of {settings.penalty_samples} training samples, drawn "
        f"anew, {when}), or another weight decay than the paper's. A run ends at the first measured step (every "
        f"{settings.every}) with test accuracy 1, at the latest at step {horizons}. A run that is not accurate by then is "
        "censored, and its step counts as infinite. No seed is dropped.",
        "",
        f"The weights are chosen by runs on other seeds ({seeds}), which are not reported: the weight of the smallest median "
        "step; among equal ones that of the largest mean test accuracy at the end; then the smallest. The weight decay is "
        "interpolated so that the mean L2 norm at the end is that of the chosen penalty on the pooled curvature. These rules "
        "were fixed before the runs. The whole grid is below.",
        "",
    ]
    if taken:
        names = ", ".join(sorted({row["source"] for row in taken}))
        lines += [
            f"{len(taken)} of the runs without a penalty are those of an earlier study ({names}). Seed 0 of each task was run "
            "anew and gives the same numbers.",
            "",
        ]
    return lines


def _arms(reported: Reported, settings: Interventions) -> list[str]:
    head = (
        *("task", "arm", "weight", f"step of test accuracy 1 (median, {CONFIDENCE:.0%})", "censored"),
        *("LMN", "pooled curvature", "curvature", "L2 norm", "test accuracy"),
    )
    columns = ("lmn", "pooled_curvature", "curvature", "l2_norm", "test_accuracy")
    rows = [
        (
            *(task, LABELS[arm], _weight(own[0]), _median([steps_to_accuracy(row) for row in own])),
            f"{sum(row['step'] is None for row in own)} of {len(own)}",
            *(_median(_values(own, column), interval=column == "lmn") for column in columns),
        )
        for task, arms in reported.items()
        for arm, own in arms.items()
        if own
    ]
    return [
        *table(head, rows),
        "",
        f"LMN and all to its right: medians at the end of the runs, on all training samples ({settings.points} {settings.rule} "
        "points). The runs of an arm end at different steps, and LMN falls while they train. Intervals are of the median, by "
        "order statistics.",
        "",
    ]


def _weight(row: Row) -> str:
    if row["arm"] == "none":
        return f"weight decay {row['weight_decay']:g}"
    return f"weight decay {row['weight_decay']:g}" if row["arm"] == "weight_decay" else f"{row['weight']:g}"


def _median(values: Sequence[float], interval: bool = True) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    low, high = interval_of_order(known)
    if not interval or math.isnan(low):
        return number(median(known))
    return f"{number(median(known))} ({number(low)} to {number(high)})"


def _claims(found: Sequence[SignTest]) -> list[str]:
    return [
        "A claim compares runs of one seed in two arms, pair by pair. It holds, or fails, if a two-sided sign test rejects "
        f"chance at {1 - CONFIDENCE:.0%}; two censored runs are equal, and equal pairs do not count. p is not corrected for "
        "the number of claims.",
        "",
        *table(
            ("claim", "task", "verdict", "as claimed", "other way round", "equal", "p"),
            [(c.name, c.task, f"**{c.verdict}**", c.more, c.fewer, c.equal, f"{c.p:.2g}") for c in found],
        ),
        "",
    ]


def _grid(tuning: Sequence[Row], settings: Interventions) -> list[str]:
    """Every weight that was tried, also those at which the network does not learn."""
    rows = []

    def key(row: Row) -> tuple[str, str, float]:
        return row["task"], row["arm"], row["weight"] if row["arm"] in PENALISED else row["weight_decay"]

    chosen = {task: choices(tuning, task, settings) for task in dict.fromkeys(row["task"] for row in tuning)}
    for (task, arm, weight), group in groupby(tuning, key):
        own = list(group)
        taken = chosen[task][arm]
        mark = f"matched: {taken:g}" if arm == "weight_decay" else "chosen" if weight == taken else ""
        rows.append(
            (
                *(task, arm, f"{weight:g}", ", ".join(number(steps_to_accuracy(row)) for row in own)),
                *(_listed(own, column) for column in ("train_accuracy", "test_accuracy", "l2_norm", "lmn")),
                mark,
            )
        )
    return [
        f"The weights that were tried, on the seeds {', '.join(map(str, settings.tuning))} (one number for each). Where the "
        "training accuracy is below 1 at the end, the weight stops the learning.",
        "",
        *table(
            (
                *("task", "arm", "weight", "step of test accuracy 1", "train accuracy", "test accuracy"),
                *("L2 norm", "LMN", ""),
            ),
            rows,
        ),
        "",
    ]


def _listed(rows: Iterable[Row], column: str) -> str:
    return ", ".join("diverged" if row[column] is None else number(row[column]) for row in rows)


# The figure ------------------------------------------------------------------------------------------------


def draw(reported: Reported, settings: Interventions, path: Path) -> Path:
    """The share of the seeds with test accuracy 1 over the steps, one panel a task, one line an arm."""
    looks = {
        arm: {"color": colour, "linestyle": style, "linewidth": 2.4}
        for arm, colour, style in zip(ARMS, (BLACK, *COLOURS), (STYLES[0], *STYLES))
    }

    def panel(axes: Any, of_task: tuple[str, dict[str, list[Row]]]) -> None:
        task, arms = of_task
        for arm, rows in arms.items():
            steps = sorted(step for row in rows if math.isfinite(step := steps_to_accuracy(row)))
            shares = [k / len(rows) for k in range(len(steps) + 1)]
            x = [0.0, *steps, float(settings.horizons[task])]
            axes.step(x, [*shares, shares[-1]], where="post", label=LABELS[arm], **looks[arm])
        axes.set(xlabel="Training step", title=task, xlim=(0, settings.horizons[task]), ylim=(-0.03, 1.03))
        axes.locator_params(axis="x", nbins=5)

    return panels_of_tasks(dict(zip(reported, reported.items())), path, panel, "Share of the seeds")
