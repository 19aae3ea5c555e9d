"""The report of a study: report.md, report.html with the figures in it, results.csv."""

import base64
import html
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas
import torch

from .. import __version__, _native
from .._files import write_file
from ..grokking.figures import draw_layer
from ..grokking.run import METRICS
from ..spectrum import SETTINGS, SHARES
from . import figures
from .answers import OTHER_LAYERS
from .claims import CONFIDENCE, Statistic, claims, numbers, too_few
from .curves import COLUMN, LAYER, PAPER_ENDS, RISE, second_rise
from .intervened import section
from .questions import questions
from .rulers import column, names_in
from .settings import FEWEST_FOR_INTERVAL, FEWEST_FOR_VERDICT, INTERVENTIONS, Study
from .study import Seed, read_study
from .text import number, table

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "matplotlib")
# Colours are those of the browser, light or dark; lines and grounds are half-transparent, to fit both.
STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem }
table { display: block; overflow-x: auto }
th, td { border: 1px solid #8886; padding: 0.25rem 0.6rem; text-align: left } th { background: #8882 }
code { background: #8882; padding: 0 0.2rem } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886 }
@media (max-width: 40rem) { p:has(> img) { overflow-x: auto } p > img { max-width: none; width: 44rem } }
"""


def write_report(out: Path, tasks: Sequence[str], seeds: int, study: Study, command: str) -> list[Path]:
    """Draws the figures of a finished study and writes its report; returns the paths of the files.

    Raises:
        ValueError: a run is missing or damaged.
        OSError: `out` cannot be written.
    """
    members = read_study(out, tasks, seeds, study)
    results = _results(members)
    write_file(out / "results.csv", results.to_csv(index=False, float_format="%.7g").encode())
    text = _report(out, members, study, command)
    write_file(out / "report.md", text.encode())
    write_file(out / "report.html", _html(text, out).encode())
    return [out / name for name in ("report.html", "report.md", "results.csv")]


def _results(members: dict[str, list[Seed]]) -> pandas.DataFrame:
    """One row for every task, seed, step and layer."""
    rows = []
    for task, seeds in members.items():
        for seed in seeds:
            config = seed.run.config
            common = {row["step"]: {name: row[name] for name in METRICS} for row in seed.run.rows}
            for layer in (LAYER, *OTHER_LAYERS):
                rows += [
                    {
                        "task": task, "seed": config.seed, "step": step, "layer": layer, **known,
                        "phase": seed.run.phase({"step": step}), **common[step],
                    }
                    for step, known in _measured(seed, layer).items()
                ]  # fmt: skip
    return pandas.DataFrame(rows)


def _measured(seed: Seed, layer: str) -> dict[int, dict]:
    """LMN of a layer, and the settings of the measurement, by step."""
    if layer == LAYER:
        names = {"lmn": COLUMN, **{n: n for n in SETTINGS}, **{n: f"{n}_{LAYER}" for n in SHARES}}
        names |= {name: column(name) for name in names_in(seed.run) if name != "l2_norm"}
        rows = seed.run.rows
    else:
        names = {"lmn": "value", **{name: name for name in (*SETTINGS, *SHARES)}}
        rows = [
            row
            for row in seed.answers
            if (row["question"], row["variant"], row["layer"]) == ("layers", "exact", layer)
        ]
    return {row["step"]: {name: row[column] for name, column in names.items()} for row in rows}


# Markdown --------------------------------------------------------------------------------------------------


def _report(out: Path, members: dict[str, list[Seed]], study: Study, command: str) -> str:
    count = len(next(iter(members.values())))
    found, measured = claims(members), numbers(members)
    pages = [*_figures(out, members), *questions(out, members, study), *_interventions(out)]
    pages += _how(members, study, command)
    ours = f"ours (median, {CONFIDENCE:.0%})" if count >= FEWEST_FOR_INTERVAL else "ours (median)"
    lines = [
        "# Grokking as compression, reproduced",
        "",
        f"Every figure of [arXiv 2310.05918](https://arxiv.org/abs/2310.05918), its numbers and its claims, by lmnfast: "
        f"{len(members)} task{'s' * (len(members) > 1)}, {count} seed{'s' * (count > 1)} (split and weights), "
        f"{study.steps} steps each, the linear mapping number (LMN) every {study.every} steps on all training samples, from "
        f"`{LAYER}` on at {study.points} {study.rule} points. The network, the optimiser and the tasks are the paper's. The "
        "initialisation, which the paper does not state, is PyTorch's; the early growth of the paper's L2 norm is that of this "
        "initialisation. The softmax of the loss is in float64, all else in float32.",
        "",
        _judging(count, [*found, *measured]),
        "",
        f"Memorised and generalised: the first measured step with accuracy 1 on the training and on the test samples. "
        f"{_unfinished(members, study)}",
        "",
        *_contents(["## The claims", "## The numbers", *pages]),
        *_summary(found, measured),
        "## The claims",
        "",
        *table(
            ("claim", "task", "verdict", "statistic", "paper", ours, "seeds"),
            [(c.name, c.task, f"**{c.verdict}**", c.meaning, c.paper, c.text, _counted(c)) for c in found],
        ),
        "",
        "## The numbers",
        "",
        "The paper's are read off its figures (about ±0.15 in LMN, ±0.1 in L2 norm).",
        "",
        *table(
            ("number", "task", "paper", ours, "seeds", "difference", "bound", "the paper's value is"),
            [(c.name, c.task, c.paper, c.text, _all(c), _difference(c), c.verdict, c.rank) for c in measured],
        ),
        "",
        *pages,
    ]
    return "\n".join(lines) + "\n"


def _interventions(out: Path) -> list[str]:
    """The section on the interventions, if they are there."""
    folder = out / INTERVENTIONS
    if not (folder / "results.csv.gz").exists():
        return []
    return section(folder, out / "figures" / "interventions.png", "figures/interventions.png")


def _contents(lines: Iterable[str]) -> list[str]:
    """Links to the parts."""
    titles = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    return [*(f"- [{title}](#{title.lower().replace(' ', '-')})" for title in titles), ""]


def _judging(count: int, statistics: Sequence[Statistic]) -> str:
    """The text that explains the verdicts, for this number of seeds."""
    bounds = (
        "A claim about the mean is judged by the mean's interval in the same way. A claim about all seeds holds if it does for "
        "each, and fails else. The bounds were set before the seeds were looked at, and none was fitted."
    )
    fewer = (
        f"Fewer than {FEWEST_FOR_INTERVAL} seeds that have a value give no {CONFIDENCE:.0%} interval: their number and their "
        f"range are in the brackets, and the range is judged; fewer than {FEWEST_FOR_VERDICT} are not judged, and their "
        "number stands in place of a verdict."
    )
    if count < FEWEST_FOR_INTERVAL:
        words = (
            f'Ours is the median of the seeds. A claim "holds" where all of them are on its side, "fails" where all are on '
            f'the other, and is "undecided" else. {fewer}'
        )
        return f"{words} {bounds}"
    words = (
        f"Ours is the median of the seeds with a {CONFIDENCE:.0%} bootstrap interval of that median (percentiles of 9999 "
        "resamples of the seeds; of normal values it contains the true median in 94 % of draws of 32, in 93 % of draws of 8). "
        'A claim "holds" where that whole interval is on its side, "fails" where all of it is on '
        f'the other, and is "undecided" else. {bounds}'
    )
    some = any(0 < len(statistic.known) < FEWEST_FOR_INTERVAL for statistic in statistics)
    return f"{words} {fewer}" if some else words


def _unfinished(members: dict[str, list[Seed]], study: Study) -> str:
    """The text about seeds that do not generalise: their number, and how they are treated."""
    counts = {
        task: [seed.run.config.seed for seed in seeds if seed.run.generalised is None]
        for task, seeds in members.items()
    }
    named = [
        f"{len(missing)} of {task} (seeds {', '.join(map(str, missing))})"
        for task, missing in counts.items()
        if missing
    ]
    if not named:
        return "All seeds reach both."
    phase = (
        f"the generalising phase of such a seed ends at step {PAPER_ENDS}, about where the paper ends"
        if study.steps >= PAPER_ENDS
        else f"such a seed has no generalising phase, as the study ends before step {PAPER_ENDS}"
    )
    return (
        f"Not all reach the second: {'; '.join(named)}. None is dropped: {phase}, and its step of generalisation counts as "
        'infinite. A seed that has no value for a row is missing in the column "seeds".'
    )


def _summary(found: list[Statistic], measured: list[Statistic]) -> list[str]:
    verdicts = [
        "with too few seeds" if claim.verdict == too_few(len(claim.known)) else claim.verdict
        for claim in found
    ]
    asked = [each for each in measured if each.verdict.startswith(("within", "outside"))]
    off = [each for each in asked if each.verdict.startswith("outside")]
    lines = [
        "## In short",
        "",
        f"- Verdicts of {len(found)} claims, one for each task: "
        + ", ".join(f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts))
        + ".",
    ]
    lines += [
        f"- {verdict.capitalize()}: {'; '.join(names)}."
        for verdict in ("fails", "undecided")
        if (names := [f"{claim.name} ({claim.task})" for claim in found if claim.verdict == verdict])
    ]
    if asked:
        lines.append(f"- Numbers within their bound: {len(asked) - len(off)} of {len(asked)}.")
    lines += [f"- Outside: {_outside(each)}." for each in off]
    return [*lines, ""]


def _outside(statistic: Statistic) -> str:
    """What a number outside its bound is, in words."""
    ours, difference = number(statistic.middle), _difference(statistic)
    by = f", {difference}" if difference != "-" else ""
    text = f"{statistic.name} of {statistic.task}, {ours} for the paper's {statistic.paper}{by}"
    return f"{text}; the paper's is {statistic.rank}"


def _counted(statistic: Statistic) -> str:
    return f"{len(statistic.known)} of {len(statistic.values)}"


def _all(statistic: Statistic) -> str:
    if len(statistic.values) <= 8 or not statistic.known:
        return ", ".join(map(number, statistic.values))
    return f"{number(min(statistic.known))} to {number(max(statistic.known))} ({_counted(statistic)})"


def _difference(statistic: Statistic) -> str:
    ratio = statistic.middle / float(statistic.paper)
    return f"{ratio - 1:+.1%}" if np.isfinite(ratio) else "-"


def _figures(out: Path, members: dict[str, list[Seed]]) -> list[str]:
    """Draws all figures; returns the lines of Markdown that show them."""
    folder = out / "figures"
    shown: list[str] = []

    def show(title: str, caption: str, path: Path) -> None:
        shown.extend([f"### {title}", "", f"![{title}]({path.relative_to(out).as_posix()})", "", caption, ""])

    shown += ["## The figures", ""]
    show(
        "Figure 1: the idea",
        "A small ReLU network on the plane. Left: its linear regions, one colour each, samples, and three pairs of them. "
        "Middle: its output along the straight lines between the pairs (dotted: the chord). Right: the connectivity of all "
        "pairs of samples, reordered.",
        figures.draw_idea(folder / "figure1.png"),
    )
    for task, seeds in members.items():
        show(
            f"Figure 2, {task}, seed 0",
            "Dots: the paper's curves, read off by pixel.",
            draw_layer(seeds[0].run, LAYER, folder / f"figure2-{task}-seed0.png", **figures.SMALL),
        )
        show(
            f"Figure 2, {task}, {len(seeds)} seeds",
            "Left: median, the middle half and the range; dots: the paper's curves. Right: test loss against LMN and against "
            "the L2 norm while generalising, coloured by step.",
            figures.draw_seeds(seeds, folder / f"figure2-{task}.png"),
        )
    show(
        "Figure 3: LMN from every layer on",
        "Median, the middle half and the range of the seeds that are measured there. From `hidden_2` on the rest is linear: "
        "its LMN is 1 with r² as defined. A stabiliser in r² gives it the curve of the paper's figure, which falls while the "
        "network memorises.",
        figures.draw_layers(members, folder / "figure3.png"),
    )
    for task, seeds in members.items():
        show(
            f"Figure 4, {task}, seed 0",
            f"The connectivity matrix of the training samples, reordered into {figures.CLUSTERS} spectral clusters, and its "
            "eigenvalues (symmetric logarithmic axis).",
            figures.draw_connectivity(seeds[0].run, folder / f"figure4-{task}.png"),
        )
    if "xor" in members:
        show(
            "XOR's second rise, every seed",
            "Triangles: the valley and the top of the largest rise between the peak after memorisation and step "
            f"{PAPER_ENDS}.",
            figures.draw_second_rise(members["xor"], folder / "xor-second-rise.png"),
        )
        shown += [*_rises(members["xor"]), ""]
    return shown


def _rises(seeds: Sequence[Seed]) -> list[str]:
    rises = [(seed, second_rise(seed.run)) for seed in seeds]
    risen = [rise for _, rise in rises if rise is not None and rise.top / rise.valley >= RISE]
    return [
        f"{len(risen)} of {len(seeds)} seeds rise by a tenth or more.",
        "",
        *table(
            ("seed", "generalised", "valley at step", "LMN there", "top at step", "LMN there", "ratio"),
            [
                (seed.run.config.seed, seed.run.generalised, rise.valley_step, number(rise.valley), rise.top_step,
                 number(rise.top), f"{rise.top / rise.valley:.2f}")
                for seed, rise in rises
                if rise is not None
            ],
        ),
    ]  # fmt: skip


def _how(members: dict[str, list[Seed]], study: Study, command: str) -> list[str]:
    runs = [
        run
        for seeds in members.values()
        for seed in seeds
        for run in (seed.run, seed.relu)
        if run is not None
    ]
    training, measuring = (sum(run.seconds[name] for run in runs) for name in ("training", "measuring"))
    answers = sum(seed.seconds for seeds in members.values() for seed in seeds)
    main = [seed.run for seeds in members.values() for seed in seeds]
    native = _native.info()
    return [
        "## How this was made",
        "",
        f"- Command: `{command}`; the same command goes on where it was stopped, and makes nothing twice.",
        f"- lmnfast {__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        + f"; instruction set {native['isa']}, {main[0].config.device}, "
        f"float32 products at {torch.get_float32_matmul_precision()!r}, {main[0].config.threads} thread a process.",
        f"- Time, summed over processes: training {training / 60:.0f} min, measuring while training {measuring / 60:.0f} min, "
        f"the other layers and the questions {answers / 60:.0f} min. One run's training takes "
        f"{np.median([run.seconds['training'] for run in main]):.0f} s, its measuring "
        f"{np.median([run.seconds['measuring'] for run in main]):.0f} s (medians).",
        "- `results.csv`: one row for every task, seed, step and layer. `runs/` and `answers/`: everything else.",
        "",
    ]


def _html(text: str, out: Path) -> str:
    """The report as one page that needs no other files."""
    from markdown import markdown

    def embedded(match: re.Match) -> str:
        content = base64.b64encode((out / html.unescape(match[1])).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'

    body = re.sub(r'src="([^":]+\.png)"', embedded, markdown(text, extensions=["tables", "toc"]))
    title = html.escape(text.partition("\n")[0].lstrip("# "))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )
