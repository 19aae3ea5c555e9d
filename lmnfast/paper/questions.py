"""The part of the report that answers questions which the paper leaves open."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..grokking.run import pearson
from . import figures
from .claims import COLUMN, PAPER, PAPER_ENDS, at, peak
from .study import LAYER, RULES, SIZES, STAND_INS, Seed, Study
from .text import number, table

Members = dict[str, list[Seed]]  # by task


def questions(out: Path, members: Members, study: Study) -> list[str]:
    """Draws the figures of the questions into OUT/figures; returns the lines of the section."""
    folder = out / "figures"
    lines = ["## Questions", ""]
    for task, seeds in members.items():
        path = figures.draw_questions(seeds, folder / f"questions-{task}.png")
        lines += [
            f"![Questions, {task}]({path.relative_to(out).as_posix()})",
            "",
            f"*{task}: medians, the middle half and the range of the seeds.*",
            "",
        ]
    moments = [step for step in study.few if any(at(seeds[0].run, step) > 0 for seeds in members.values())]
    lines += _initialisation(members, study)
    lines += _nodes(members, moments)
    lines += _number_of_samples(members, moments)
    lines += _which_samples(members)
    lines += _negative_eigenvalues(members)
    lines += _stand_ins(members)
    path = figures.draw_regions(members, folder / "relu-regions.png")
    lines += _regions(members, study, path.relative_to(out).as_posix())
    if any(seed.run.rows[-1]["step"] > PAPER_ENDS for seeds in members.values() for seed in seeds):
        lines += _after_the_papers_end(members)
    return lines


def _question(
    title: str,
    text: str,
    members: Members,
    head: Sequence[str],
    row: Callable[[list[Seed]], Sequence[str]],
    figure: str | None = None,
) -> list[str]:
    """The lines of a question: its text, and a row for each task."""
    shown = [f"![{title.partition(':')[0]}]({figure})", ""] if figure else []
    rows = [(task, *row(seeds)) for task, seeds in members.items()]
    return [f"### {title}", "", text, "", *shown, *table(("task", *head), rows), ""]


def _initialisation(members: Members, study: Study) -> list[str]:
    def row(seeds: list[Seed]) -> list[str]:
        paper = PAPER[seeds[0].run.config.task]
        return [
            number(paper["LMN at step 0"]),
            _median(at(seed.run, 0) for seed in seeds),
            _median(at(seed.lecun, 0) for seed in seeds),
            number(paper["LMN, peak"]),
            _median(peak(seed.run)[COLUMN] for seed in seeds),
            _median(max(row[COLUMN] for row in seed.lecun.rows) for seed in seeds),
        ]

    text = (
        "`lecun-first` scales the first Linear's weights to standard deviation 1/8; all else is PyTorch's default. "
        f"Peak: within {study.init_steps} steps."
    )
    head = ("LMN at step 0, paper", "default", "lecun-first", "peak, paper", "default", "lecun-first")
    return _question("Which initialisation matches the paper's step 0?", text, members, head, row)


def _nodes(members: Members, moments: Sequence[int]) -> list[str]:
    text = (
        f"Largest error of LMN against 21 uniform points over all seeds, at steps {', '.join(map(str, moments))}, "
        "in per cent. A rule with other uniform points converges to another number, that of the continuous line; the "
        "Lobatto rules are made for the 21."
    )
    rules = [f"{rule} {points}" for rule, points in RULES]
    return _question(
        "21 points against others",
        text,
        members,
        rules,
        lambda seeds: [_largest_error(seeds, "nodes", rule) for rule in rules],
    )


def _number_of_samples(members: Members, moments: Sequence[int]) -> list[str]:
    text = (
        f"Random sub-samples of all pairs, {SIZES[0]} to all of them; exponent of a power law LMN ~ N^k fitted to the "
        "medians, and LMN of the smallest and of all."
    )
    return _question(
        "How does LMN grow with the number of samples?",
        text,
        members,
        [f"step {step}" for step in moments],
        lambda seeds: [_growth(seeds, step) for step in moments],
    )


def _which_samples(members: Members) -> list[str]:
    names = ("train", "both", "test", "train, as many as test")

    def row(seeds: list[Seed]) -> list[str]:
        return [
            _median(_peak_step(seed) for seed in seeds),
            *[_median(_at_peak(seed, seed.answer("samples", name)) for seed in seeds) for name in names],
            _median(
                _together(seed, "samples", "test", seed.answer("samples", "train, as many as test"))
                for seed in seeds
            ),
        ]

    text = (
        "Medians. The test samples are a fifth of all pairs, so they are compared with as many training samples; "
        "r: correlation of both over all milestones."
    )
    head = ("step", *names, "r, test with as many of train")
    return _question("Training samples, test samples, or both?", text, members, head, row)


def _negative_eigenvalues(members: Members) -> list[str]:
    def row(seeds: list[Seed]) -> list[str]:
        return [
            _median(seed.answer("negative", "share")[0] for seed in seeds),
            _median(max(seed.answer("negative", "share").values()) for seed in seeds),
            _median(_at_peak(seed, seed.lmn(LAYER)) for seed in seeds),
            _median(_at_peak(seed, seed.answer("negative", "clipped")) for seed in seeds),
            _median(_together(seed, "negative", "clipped") for seed in seeds),
        ]

    text = (
        "Share of the eigenvalues' mass that is negative, at step 0 and at its largest; LMN at the peak either way; r: "
        "over all milestones."
    )
    head = ("negative share at 0", "at most", "LMN, absolute", "clipped", "r")
    return _question("Absolute value, or negative eigenvalues clipped?", text, members, head, row)


def _stand_ins(members: Members) -> list[str]:
    def row(seeds: list[Seed]) -> list[str]:
        cells = []
        for name in STAND_INS:
            cells.append(_median(_together(seed, "stand-ins", name) for seed in seeds))
            errors = [
                _at_peak(seed, seed.answer("stand-ins", name)) / _at_peak(seed, seed.lmn(LAYER)) - 1
                for seed in seeds
            ]
            cells.append(_percent(errors))
        return cells

    text = "Against the exact LMN, over all milestones: r, and the error at the peak (medians)."
    head = [f"{name}: {what}" for name in STAND_INS for what in ("r", "error at the peak")]
    return _question("Stand-ins", text, members, head, row)


def _regions(members: Members, study: Study, figure: str) -> list[str]:
    def row(seeds: list[Seed]) -> list[str]:
        return [
            str(seeds[0].relu.rows[0]["samples"]),
            _median(seed.answer("regions")[0] for seed in seeds),
            _median(min(seed.answer("regions").values()) for seed in seeds),
            _median(seed.answer("regions")[study.relu_steps] for seed in seeds),
            _median(at(seed.relu, 0) for seed in seeds),
            _median(max(row[COLUMN] for row in seed.relu.rows) for seed in seeds),
            _median(at(seed.relu, study.relu_steps) for seed in seeds),
            _median(
                pearson([(row[COLUMN], seed.answer("regions")[row["step"]]) for row in seed.relu.rows])
                for seed in seeds
            ),
        ]

    text = (
        f"The same network with ReLU, {study.relu_steps} steps. Regions: distinct activation patterns at the training "
        "samples."
    )
    head = ("N", "regions at 0", "fewest", "at the end", "LMN at 0", "peak", "at the end", "r")
    return _question("ReLU networks: LMN against linear regions", text, members, head, row, figure)


def _after_the_papers_end(members: Members) -> list[str]:
    def row(seeds: list[Seed]) -> list[str]:
        return [
            _median(_late(seed, min, COLUMN)[COLUMN] for seed in seeds),
            _median(_late(seed, min, COLUMN)["step"] for seed in seeds),
            _median(_late(seed, max, "l2_norm")["l2_norm"] for seed in seeds),
            _median(_late(seed, max, "l2_norm")["step"] for seed in seeds),
        ]

    text = f"The paper does not go past step {PAPER_ENDS}. Lowest LMN and largest L2 norm after it, and where they are."
    head = ("LMN, lowest", "at step", "L2 norm, largest", "at step")
    return _question("What comes after the paper's end?", text, members, head, row)


def _late(seed: Seed, extreme: Callable, column: str) -> dict:
    return extreme((row for row in seed.run.rows if row["step"] > PAPER_ENDS), key=lambda row: row[column])


def _median(values: Iterable[float]) -> str:
    """The median, followed by the range in brackets if the values differ."""
    known = sorted(value for value in values if np.isfinite(value))
    if not known:
        return "-"
    text = number(float(np.median(known)))
    return (
        text
        if len(known) == 1 or known[0] == known[-1]
        else f"{text} ({number(known[0])} to {number(known[-1])})"
    )


def _percent(values: Iterable[float]) -> str:
    known = [value for value in values if np.isfinite(value)]
    return f"{np.median(known):+.1%}" if known else "-"


def _peak_step(seed: Seed) -> int:
    table = seed.lmn(LAYER)
    return max(table, key=lambda step: table[step])


def _at_peak(seed: Seed, table: dict[int, float]) -> float:
    return table[_peak_step(seed)]


def _together(seed: Seed, question: str, variant: str, other: dict[int, float] | None = None) -> float:
    other = other or seed.lmn(LAYER)
    return pearson([(value, other[step]) for step, value in seed.answer(question, variant).items()])


def _largest_error(seeds: Sequence[Seed], question: str, variant: str) -> str:
    errors = [abs(e) for seed in seeds for e in figures.relative_errors(seed, question, variant).values()]
    return f"{100 * max(errors):.2g}" if errors else "-"


def _growth(seeds: Sequence[Seed], step: int) -> str:
    tables = [seed.lmn_of_sizes(step) for seed in seeds]
    if not tables[0]:
        return "-"
    sizes = sorted(tables[0])
    medians = [np.median([table[size] for table in tables]) for size in sizes]
    exponent = np.polyfit(np.log(sizes), np.log(medians), 1)[0]
    return f"k = {exponent:.2f}; {number(medians[0])} ... {number(medians[-1])}"
