"""The part of the report that answers questions which the paper leaves open."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from .._series import pearson
from . import figures
from .answers import EPSILON, OUTPUTS, RULES, SIZES, STAND_INS
from .claims import FIGURE_4, PAPER, at_start
from .curves import COLUMN, LAYER, PAPER_ENDS, at
from .maps import READING
from .rulers import HALF, rulers
from .settings import Study
from .study import Seed
from .text import number, table

Members = dict[str, list[Seed]]  # by task


def questions(out: Path, members: Members, study: Study) -> list[str]:
    """Draws the figures of the questions into OUT/figures; returns the lines of the section."""
    folder = out / "figures"
    asked = {task: [seed for seed in seeds if seed.relu is not None] for task, seeds in members.items()}
    lines = ["## Questions", ""]
    lines += _progress(
        members, figures.draw_rulers(members, folder / "observables.png").relative_to(out).as_posix()
    )
    lines += _step_0(members)
    if "xor" in members:
        lines += _maps(members["xor"])
    count = len(next(iter(asked.values())))
    lines += [
        f"The questions below are asked of {'seed 0' if count == 1 else f'seeds 0 to {count - 1}'}.",
        "",
    ]
    for task, seeds in asked.items():
        path = figures.draw_questions(seeds, folder / f"questions-{task}.png")
        lines += [
            f"![Questions, {task}]({path.relative_to(out).as_posix()})",
            "",
            f"*{task}: medians, the middle half and the range of the seeds.*",
            "",
        ]
    moments = [step for step in study.few if any(at(seeds[0].run, step) > 0 for seeds in asked.values())]
    lines += _rule(asked, study)
    lines += _nodes(asked, moments)
    lines += _number_of_samples(asked, moments)
    lines += _number_of_outputs(asked)
    lines += _which_samples(asked)
    lines += _negative_eigenvalues(asked)
    lines += _stand_ins(asked)
    path = figures.draw_regions(asked, folder / "relu-regions.png")
    lines += _regions(asked, study, path.relative_to(out).as_posix())
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


def _progress(members: Members, figure: str) -> list[str]:
    text = (
        "r: Pearson's, with the test loss, over the measured steps of the generalising phase. More linear than LMN: the size "
        "of r less that of LMN's in the same run, with its verdict. An alarm is a step at which the observable passes the "
        "middle of the range that it has in the generalising phase, in the direction in which it goes from the beginning of "
        "this phase to its end. The lead is the number of steps from the first alarm after memorisation to test accuracy "
        f"{HALF:g}; below 0 the alarm is late. All other alarms up to step {PAPER_ENDS} are false, and so is every alarm of a "
        f"run that does not reach test accuracy {HALF:g}. The middle of a range is known only afterwards, so none of this "
        "is a forecast. `lmnfast.observables()` has the formulas."
    )
    head = (
        "task",
        "observable",
        "r",
        "r in size, less LMN's",
        "more linear",
        "lead, steps",
        "false alarms",
        "in seeds",
    )
    rows = []
    for task, seeds in members.items():
        for ruler in rulers(seeds):
            wrong = ruler.false_alarms.known
            rows.append(
                (task, f"`{ruler.name}`", ruler.r.text, "" if ruler.name == "lmn" else ruler.more.text,
                 ruler.more.verdict, ruler.lead.text, f"{sum(wrong):.0f}" if wrong else "-",
                 f"{sum(value > 0 for value in wrong)} of {len(wrong)}")
            )  # fmt: skip
    title = "Which observable follows the test loss?"
    return [f"### {title}", "", text, "", f"![{title}]({figure})", "", *table(head, rows), ""]


def _step_0(members: Members) -> list[str]:
    variants = ("LMN", "mean", "standard deviation", "second eigenvalue", "first negative")
    rows = []
    for task, seeds in members.items():
        paper = {"LMN": PAPER[task]["LMN at step 0"], **(FIGURE_4 if task == "modular-addition" else {})}
        rows.append((task, "paper", *(number(paper[name]) if name in paper else "-" for name in variants)))
        for how in ("exact", "stabilised"):
            cells = [
                _mean_and_deviation(at_start(seed, f"{how}: {variant}") for seed in seeds)
                for variant in variants
            ]
            rows.append((task, how, *cells))
    text = (
        f"Stabilised: with {EPSILON} in the denominator of r², `lmnfast.measure(f, x, stabiliser={EPSILON})`, on "
        "the same weights. The number was fitted once, to the paper's LMN at step 0 on three tasks. At initialisation the "
        "outputs hardly vary, and it counts those that vary least as bent; later it changes nothing. Mean over the seeds ± "
        "standard deviation over the seeds; of the entries of L off its diagonal the mean and standard deviation, and of "
        "the falling eigenvalues the second and the index (from 0) of the first negative one. The paper's are read off its "
        "Figures 2 and 4."
    )
    head = ("task", "r²", "LMN", "mean of L", "its standard deviation", "second eigenvalue", "first negative")
    return ["### What explains the paper's step 0?", "", text, "", *table(head, rows), ""]


def _mean_and_deviation(values: Iterable[float]) -> str:
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "-"
    return number(float(np.mean(known))) + (
        f" ± {number(float(np.std(known, ddof=1)))}" if len(known) > 1 else ""
    )


def _maps(seeds: list[Seed]) -> list[str]:
    text = (
        "The paper reads the valley's LMN as 15 = 5 x 3 and the top's as 20 = 5 x 4: three or four linear maps for each bit. "
        "Samples that share a map are then those with the same pattern of a bit in their two numbers: 00, 01, 10, 11 (four), "
        "or without order (three); two patterns: whether the answer's bit is set. The network does not know which of the 31 "
        "parities are the bits, so any parity is tried as well. Index: the largest adjusted Rand index (0: random, 1: equal) "
        "of such a grouping and the clusters of L (average linkage on 1 - L), as many as groups, or 15 or 20. "
        "Share: of the variance of L's entries that all groupings of a kind explain together, if samples of one group have "
        "larger entries. Medians and ranges of the seeds with a second rise."
    )
    kinds = list(
        dict.fromkeys(
            row["variant"].partition(", ")[2]
            for seed in seeds
            for row in seed.answers
            if row["question"] == "maps" and ": share" in row["variant"]
        )
    )
    places = list(READING)

    def cell(place: str, what: str) -> str:
        variant = f"{place}: {what}"
        return _median(value for seed in seeds for value in seed.answer("maps", variant).values())

    rows = [
        (
            kind,
            *(
                text
                for place in places
                for text in (
                    cell(place, f"index, {kind}"),
                    cell(place, f"index of {READING[place][0]} clusters, {kind}"),
                    cell(place, f"share, {kind}"),
                )
            ),
        )
        for kind in kinds
    ]
    head = [
        f"{place}: {what}"
        for place in places
        for what in ("index", f"index of {READING[place][0]} clusters", "share")
    ]
    shown = table(("samples grouped by", *head), rows) if rows else ["No seed has a second rise to look at."]
    return ["### XOR: which samples share a map?", "", text, "", *shown, ""]


def _rule(members: Members, study: Study) -> list[str]:
    def errors(seeds: list[Seed]) -> list[str]:
        found = [
            at(seed.run, step) / exact - 1
            for seed in seeds
            for step, exact in seed.lmn(LAYER).items()
            if not np.isnan(at(seed.run, step))
        ]
        sizes = [100 * abs(error) for error in found]
        return [str(len(found)), f"{np.median(sizes):.2g}", f"{max(sizes):.2g}"] if sizes else ["0", "-", "-"]

    text = (
        f"The runs are measured by {study.points} {study.rule} points, and at {len(study.milestones)} steps by the 21 uniform "
        "points of the definition as well. The difference in LMN, in per cent."
    )
    return _question("The error of the rule", text, members, ("measurements", "median", "largest"), errors)


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
        "medians, and LMN of the smallest and of all. The same for the pooled curvature, which has no trend with N."
    )
    kinds = {"LMN": "number", "pooled curvature": "number, curvature"}
    return _question(
        "How does LMN grow with the number of samples?",
        text,
        members,
        [f"{name}, step {step}" for name in kinds for step in moments],
        lambda seeds: [_growth(seeds, step, kind) for kind in kinds.values() for step in moments],
    )


def _number_of_outputs(members: Members) -> list[str]:
    kinds = ("LMN", "curvature", "pooled_curvature")
    text = (
        "The hidden layers of the untrained network with K random outputs in place of its own, N training samples. LMN of "
        "tasks with different K are not comparable. The pooled curvature of one output is the curvature."
    )
    return _question(
        "How does LMN depend on the number of outputs?",
        text,
        members,
        ["N", *(f"{kind}, K = {k}" for kind in kinds for k in OUTPUTS)],
        lambda seeds: [
            str(seeds[0].run.rows[0]["samples"]),
            *(
                _median(seed.answer("outputs", f"{kind}, {k}").get(0, np.nan) for seed in seeds)
                for kind in kinds
                for k in OUTPUTS
            ),
        ],
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
        asked = [(seed.relu, seed.answer("regions")) for seed in seeds if seed.relu is not None]
        return [
            str(asked[0][0].rows[0]["samples"]),
            _median(regions[0] for _, regions in asked),
            _median(min(regions.values()) for _, regions in asked),
            _median(regions[study.relu_steps] for _, regions in asked),
            _median(at(relu, 0) for relu, _ in asked),
            _median(max(row[COLUMN] for row in relu.rows) for relu, _ in asked),
            _median(at(relu, study.relu_steps) for relu, _ in asked),
            _median(
                pearson([(row[COLUMN], regions[row["step"]]) for row in relu.rows]) for relu, regions in asked
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


def _growth(seeds: Sequence[Seed], step: int, question: str) -> str:
    tables = [seed.of_sizes(step, question) for seed in seeds]
    if not tables[0]:
        return "-"
    sizes = sorted(tables[0])
    medians = [np.median([table[size] for table in tables]) for size in sizes]
    exponent = np.polyfit(np.log(sizes), np.log(medians), 1)[0]
    return f"k = {exponent:.2f}; {number(medians[0])} ... {number(medians[-1])}"
