"""The report of a study of 32 seeds, from given rows."""

import re
from dataclasses import replace

import numpy as np
import pytest
from runs_of_values import run

from lmnfast.grokking.run import METRICS
from lmnfast.paper import claims, figures, report
from lmnfast.paper.answers import OUTPUTS, RULES, SIZES, STAND_INS, row
from lmnfast.paper.report import write_report
from lmnfast.paper.settings import OBSERVABLES, Study
from lmnfast.paper.study import Seed
from lmnfast.runs.figures import save
from lmnfast.spectrum import SETTINGS, SHARES

STUDY = Study()
STEPS = np.arange(0, STUDY.steps + 1, STUDY.every)


def curve(*points: tuple[float, float]) -> np.ndarray:
    return np.interp(STEPS, *zip(*points))


def main_run(seed: int):
    """XOR as it goes: memorised at 200, generalised at about 3000, with a second rise on odd seeds."""
    grok = 3000 + 20 * seed
    top = 30 if seed % 2 else 15.2
    lmn = curve((0, 24), (200, 36 + seed / 10), (grok, 15.5), (4000, 15), (12_000, top), (20_000, top))
    loss = curve((0, 3.5), (200, 7), (grok, 0.1), (20_000, 0.01))
    found = run(
        lmn,
        generalised=grok // 100,
        test_loss=loss,
        l2_norm=curve((0, 33), (200, 42), (grok, 31), (10_000, 28), (20_000, 26)),
        test_accuracy=curve((0, 0), (1000, 0), (grok, 1), (20_000, 1)),
        observables={name: loss + k + 0.1 * lmn for k, name in enumerate(OBSERVABLES)},
    )
    settings = dict.fromkeys(SETTINGS, "x") | {
        "samples": 819,
        "outputs": 32,
        "points": 9,
        "rule": "lobatto",
    }
    shares = {f"{name}_hidden_1": 0.2 for name in SHARES}
    rows = [{**settings, **shares, **dict.fromkeys(METRICS, 0.0), **each} for each in found.rows]
    config = replace(found.config, seed=seed, device="cpu", threads=1)
    return replace(found, config=config, rows=rows, seconds={"training": 40.0, "measuring": 50.0})


def answers_of(seed: int) -> list[dict]:
    start = {
        "LMN": 33.7,
        "mean": 0.92,
        "standard deviation": 0.03,
        "second eigenvalue": 2.6,
        "first negative": 546.0,
    }
    rows = [
        row("start", f"{how}: {what}", 0, "hidden_1", 819, value * (1 + seed / 1000 - 0.0155))
        for how in ("exact", "stabilised")
        for what, value in start.items()
    ]
    if seed % 2:
        kinds = (
            "index, a bit, 3 patterns",
            "index of {} clusters, a bit, 3 patterns",
            "share, a bit, 3 patterns",
        )
        rows += [
            row("maps", f"{place}: {kind.format(clusters)}", 4000, "hidden_1", 819, 0.01 * seed)
            for place, clusters in (("valley", 15), ("top", 20))
            for kind in kinds
        ]
    if seed >= STUDY.asked:
        return rows
    for name in ("LMN", "curvature", "pooled_curvature"):
        rows += [row("outputs", f"{name}, {k}", 0, "hidden_1", 819, 1 / k) for k in OUTPUTS]
    for step in STUDY.milestones:
        exact = next(each["lmn_hidden_1"] for each in main_run(seed).rows if each["step"] == step)
        for variant in ("train", "test", "train, as many as test", "both"):
            rows.append(row("samples", variant, step, "hidden_1", 819, exact * 1.0001))
        rows += [
            row("negative", variant, step, "hidden_1", 819, 0.2 + step / 1e5)
            for variant in ("clipped", "share")
        ]
        rows += [row("stand-ins", how, step, "hidden_1", 819, exact * 0.9) for how in STAND_INS]
        rows += [row("layers", "exact", step, "embedding", 819, 40 + step / 100)]
        rows += [
            row("layers", "exact", step, "hidden_2", 819, 1.0),
            row("layers", "stabilised", step, "hidden_2", 819, 2.0),
        ]
        if step in STUDY.few:
            rows += [row("nodes", f"{rule} {k}", step, "hidden_1", 819, exact) for rule, k in RULES]
            for question in ("number", "number, curvature"):
                rows += [row(question, "random", step, "hidden_1", size, size / 20) for size in SIZES]
    rows += [
        row("regions", "relu", k, "hidden_1", 819, 819.0 - k / 100)
        for k in range(0, STUDY.relu_steps + 1, 250)
    ]
    return rows


def relu_run(seed: int):
    found = run(np.linspace(64, 40, STUDY.relu_steps // 250 + 1), every=250)
    return replace(
        found,
        rows=[{**each, "samples": 819} for each in found.rows],
        seconds={"training": 1.0, "measuring": 1.0},
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """The report of 32 seeds of XOR, 8 of which the questions are asked of."""
    out = tmp_path_factory.mktemp("report")
    members = {
        "xor": [Seed(main_run(k), relu_run(k) if k < STUDY.asked else None, answers_of(k)) for k in range(32)]
    }

    def drawn(*given: object) -> object:  # needs checkpoints
        from matplotlib.figure import Figure

        return save(Figure(), given[-1], 20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "read_study", lambda *_: members)
        patch.setattr(figures, "draw_connectivity", drawn)
        patch.setattr(claims, "linear_network_lmn", lambda _: 1.0)
        paths = write_report(out, ("xor",), 32, STUDY, "lmnfast paper --tasks xor")
    page = next(path for path in paths if path.suffix == ".html").read_text()
    text = next(path for path in paths if path.suffix == ".md").read_text()
    for link in re.findall(r"^- \[.*\]\(#(.*)\)$", text, re.MULTILINE):
        assert page.count(f'<a href="#{link}">') == page.count(f'<h2 id="{link}">') == 1
    assert "color-scheme: light dark" in page
    return text


def line(text: str, begin: str) -> str:
    return next(each for each in text.splitlines() if each.startswith(begin))


def test_claims_have_intervals_over_all_seeds(text):
    assert "32 seeds" in text and "ours (median, 95%)" in text and "94 % of draws of 32" in text
    falls = line(text, "| LMN falls while")
    assert falls.startswith("| LMN falls while") and "| xor | **holds** |" in falls
    assert re.search(r"\(\d.* to .*\) \| 32 of 32 \|$", falls)
    assert "| 8 of 32 |" in line(text, "| The embedding's LMN says less")
    assert "**holds**" in line(text, "| LMN at step 0 is the paper's with 8e-8")
    assert "(32 seeds: " in line(text, "| No late collapse") and "**holds**" in line(
        text, "| No late collapse"
    )


def test_a_number_has_the_papers_rank(text):
    assert line(text, "| LMN at step 0 | xor").endswith("| larger than all of n = 32 seeds |")
    assert re.search(r"larger than \d+ of n = 32 seeds \|$", line(text, "| LMN at step 0, stabilised"))
    assert line(text, "| LMN, peak").endswith("| smaller than all of n = 32 seeds |")


def test_every_question_has_its_table(text):
    assert line(text, "| xor | `pooled_curvature` |").count("|") == 9
    assert len([each for each in text.splitlines() if each.startswith("| xor | `")]) == len(OBSERVABLES) + 2
    assert "33.7 ± " in line(text, "| xor | stabilised")
    assert "0.160 (0.010 to 0.310)" in line(text, "| a bit, 3 patterns")
    assert "seeds 0 to 7" in text
    assert line(text, "| xor | 160 | 0.01 | 0.01 |")  # the error of the rule, over 8 seeds and 20 steps
    assert "16 of 32 seeds rise by a tenth or more." in text
    assert "lecun" not in text


def test_every_table_has_rows_as_long_as_its_head(text):
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 12
    for table in tables:
        assert len({each.count("|") for each in table.splitlines()}) == 1, table.splitlines()[0]


def test_the_report_begins_with_its_contents(text):
    titles = re.findall(r"^- \[(.*)\]\(#", text, re.MULTILINE)
    assert titles == ["The claims", "The numbers", "The figures", "Questions", "How this was made"]
    assert titles == [each for each in re.findall(r"^## (.*)$", text, re.MULTILINE) if each != "In short"]


@pytest.mark.parametrize(
    "steps, said",
    [
        (
            20_000,
            "the generalising phase of such a seed ends at step 15000, about where the paper ends, and its",
        ),
        (1000, "such a seed has no generalising phase, as the study ends before step 15000, and its"),
    ],
)
def test_seeds_that_do_not_generalise_are_spoken_of_as_long_as_the_runs_are(steps, said):
    members = {"s4": [Seed(run(np.ones(5)), None, [])]}
    assert f"1 of s4 (seeds 0). None is dropped: {said}" in report._unfinished(members, Study(steps=steps))


def test_what_lies_inside_and_outside_its_bound_is_said_in_words():
    def of(name: str, values: tuple[float, ...], verdict: str) -> claims.Statistic:
        return claims.Statistic(name, "s4", "", "10000", values, verdict)

    inside, above = of("a", (1e4,) * 4, "within 8%"), of("b", (2e4,) * 4, "outside 8%")
    never = of("c", (np.inf,) * 4, "outside 8%")
    said = report._summary([], [inside, above, never])
    assert "- Numbers within their bound: 1 of 3." in said
    smaller = "the paper's is smaller than all of n = 4 seeds."
    assert f"- Outside: b of s4, 20000 for the paper's 10000, +100.0%; {smaller}" in said
    assert f"- Outside: c of s4, never for the paper's 10000; {smaller}" in said
