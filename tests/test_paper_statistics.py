"""The statistics of a study, on runs of given values."""

import math
import re

import numpy as np
import pytest
from runs_of_values import run

from lmnfast.paper import answers, claims
from lmnfast.paper.claims import Statistic, interval, judged
from lmnfast.paper.curves import (
    fall,
    generalising,
    late_fall,
    late_sudden_fall,
    levelling,
    peak,
    r_squared,
    second_rise,
)
from lmnfast.paper.study import Seed
from lmnfast.paper.text import number


def test_an_interval_is_a_bootstrap_of_the_median():
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0, 100.0])
    assert 1 <= low < 3.5 < high <= 100
    assert interval([2.0] * 8) == (2, 2)
    for few in range(6):
        assert all(map(math.isnan, interval([1.0] * few)))


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([0.5, 0.6, 0.7, 0.5, 0.6, 0.7], "holds"),
        ([1.5, 1.6, 1.7, 1.5, 1.6, 1.7], "fails"),
        ([0.5, 0.5, 0.6, 1.6, 1.7, 1.7], "undecided"),
        ([0.5] * 8 + [1.7], "holds"),  # the interval of the median does not reach one seed of nine
        ([0.5, math.nan, 0.6, 0.5, 0.6, 0.7, 0.6], "holds"),
        # Four and five seeds: all of them.
        ([0.5, 0.6, 0.7, 0.6], "holds"),
        ([0.5, 0.6, 0.7, 0.6, 1.1], "undecided"),
        ([-3.0, -2.0, math.nan, 1.5, 2.0, -1.0], "undecided"),
        ([-3.0, -2.0, -1.5, -2.0, -1.0], "fails"),
        # Fewer have no verdict.
        ([0.5, 0.6, 0.7], "3 seeds"),
        ([-3.0, -2.0], "2 seeds"),
        ([0.5, math.nan, math.nan, math.nan], "1 seed"),
        ([math.nan, math.nan], "not reached"),
    ],
)
def test_a_claim_is_judged_by_its_whole_interval_and_not_by_a_few_seeds(values, verdict):
    assert judged(values, (0, 1)) == verdict


def test_a_claim_about_the_mean_or_about_all_seeds_is_judged_by_that():
    skewed = [0.9] * 30 + [4.0] * 10  # the median is 0.9, the mean 1.675
    assert judged(skewed, (0, 1.2)) == "holds" and judged(skewed, (0, 1.2), "mean") == "fails"
    assert judged(skewed, (0, 1.7), "mean") == "undecided"
    assert Statistic("", "s4", "", "1", tuple(skewed), "", "mean").middle == pytest.approx(1.675)
    assert judged([0.9] * 31 + [0.4], (0.5, math.inf)) == "holds"
    assert judged([0.9] * 31 + [0.4], (0.5, math.inf), "all") == "fails"
    assert judged([0.9] * 31 + [math.nan], (0.5, math.inf), "all") == "holds"
    assert judged([0.9] * 3, (0.5, math.inf), "all") == "3 seeds"
    assert (
        Statistic("", "s4", "", "-", (0.9,) * 31 + (0.4,), "", "all").text
        == "0.900 (32 seeds: 0.400 to 0.900)"
    )


def test_the_seconds_of_all_answers_count_also_those_of_one_step():
    rows = [
        answers.row("seconds", "", step, "", 0, seconds) for step, seconds in ((0, 1.5), (0, 2.0), (20, 3.0))
    ]
    assert Seed(run([1, 1]), None, rows).seconds == 6.5


def test_the_papers_rank_among_the_seeds():
    def rank(*values):
        return Statistic("", "s4", "", "20.2", values, "").rank

    assert rank(21.0, 22.0, 23.0) == "smaller than all of n = 3 seeds"
    assert rank(19.0, 20.0, math.nan) == "larger than all of n = 2 seeds"
    assert rank(19.0, 22.0, math.inf) == "larger than 1 of n = 3 seeds"
    assert rank(math.nan) == "-"


def test_a_late_collapse_is_told_from_a_late_generalisation():
    slow = run([1, 1, 30, *np.linspace(30, 20, 98), *np.linspace(20, 9, 100)])
    assert late_fall(slow) == pytest.approx(9 / 20) and late_sudden_fall(slow) > 0.85
    sudden = run([1, 1, *[20] * 149, *[3] * 50])
    assert late_fall(sudden) == late_sudden_fall(sudden) == pytest.approx(3 / 20)
    assert math.isnan(late_fall(run([1] * 101))) and math.isnan(late_sudden_fall(run([1] * 105)))
    late = [claim for claim in claims.CLAIMS if "late" in claim.name]
    assert [claim.name for claim in late] == ["No late collapse", "No sudden fall late"]
    for r, verdicts in ((sudden, ["fails", "fails"]), (slow, ["fails", "holds"])):
        seeds = [Seed(run([20] * 201), None, [])] * 4 + [Seed(r, None, [])]
        assert [claim.of_task("xor", seeds).verdict for claim in late] == verdicts


def test_step_0_is_compared_with_and_without_the_stabiliser():
    def seed(value: float) -> Seed:
        rows = [answers.row("start", "stabilised: LMN", 0, "hidden_1", 819, value)]
        return Seed(run([24, 1, 34.7, 20], generalised=3), None, rows)

    for factor, verdict in ((1.01, "holds"), (1.05, "fails"), (0.95, "fails")):
        members = [seed(33.68 * factor * (1 + k / 1000)) for k in range(-4, 5)]
        claim = next(claim for claim in claims.CLAIMS if claim.name.startswith("LMN at step 0"))
        assert claim.name.endswith("8e-8 in r²") and claim.of_task("xor", members).verdict == verdict
        numbers = {number.name: number for number in claims.numbers({"xor": members})}
        assert numbers["LMN at step 0"].middle == 24
        assert numbers["LMN at step 0, stabilised"].middle == pytest.approx(33.68 * factor)


def test_numbers_of_a_few_seeds_are_not_called_within_or_outside():
    for count, verdict in ((3, "3 seeds"), (4, "within 8%")):
        members = [Seed(run([1, 1, 34.7, 20], generalised=3), None, []) for _ in range(count)]
        found = {number.name: number for number in claims.numbers({"xor": members})}
        assert found["LMN, peak"].verdict == verdict
        assert found["LMN at step 0"].verdict == ""  # it has no bound
        assert found["L2 norm at step 10000"].verdict == "not reached"


def test_r_squared_is_of_the_generalising_phase_and_one_for_a_line():
    lmn = np.array([9, 3, 10, 20, 15, 10, 6, 5, 5.5])
    loss = 2 * lmn + 1
    loss[[0, 1, 7, 8]] = (7, 70, 3, 1)  # other phases do not count
    assert r_squared(run(lmn, generalised=7, test_loss=loss)) == pytest.approx(1)
    norm = [1, 1, 4, 2, 2, 1, 4, 1, 1]
    r = np.corrcoef(loss[2:7], norm[2:7])[0, 1]
    assert r_squared(run(lmn, generalised=7, test_loss=loss, l2_norm=norm), "l2_norm") == pytest.approx(r**2)
    later = np.corrcoef(loss[3:7], norm[3:7])[0, 1]
    found = r_squared(run(lmn, generalised=7, test_loss=loss, l2_norm=norm), "l2_norm", since_peak=True)
    assert found == pytest.approx(later**2)
    assert math.isnan(r_squared(run(lmn, generalised=None, test_loss=loss)))  # too short to tell


def test_a_seed_that_never_generalises_counts_up_to_the_papers_end():
    lmn = [1, 1, 30, 20, 10, 5]
    never = run(lmn, every=5000)
    assert [row["step"] for row in generalising(never)] == [10_000, 15_000]
    assert fall(never) == pytest.approx(20 / 30)
    steps = Statistic(
        "",
        "s4",
        "",
        "1",
        tuple(map(claims.NUMBERS["step of generalisation"], [Seed(never, None, [])] * 6)),
        "",
    )
    assert steps.middle == math.inf and steps.interval == (math.inf, math.inf)
    one = Statistic("", "s4", "", "1", (100.0, 150.0, 200.0, 300.0, math.inf, math.inf), "")
    assert one.middle == 250 and one.interval[1] == math.inf
    assert claims._within("s4", "step of generalisation", math.inf) == "outside a factor 1.6"


def test_levelling_compares_the_slopes_before_and_after_generalisation():
    falling, flat = list(range(100, 50, -2)), [50 - 0.1 * k for k in range(20)]
    r = run([1, 1, *falling, *flat], generalised=2 + len(falling))
    assert levelling(r) == pytest.approx(0.05)
    assert math.isnan(levelling(run([1, 1, *falling, *flat])))


def test_the_second_rise_is_the_largest_after_the_peak_and_before_the_papers_end():
    lmn = [5, 1, 30, 20, 12, 14, 10, 18, 9, 8, *([3] * 141), 60]  # the last is step 15 100
    rise = second_rise(run(lmn, generalised=8))
    assert (rise.valley_step, rise.valley, rise.top_step, rise.top) == (600, 10, 700, 18)
    assert peak(run(lmn, generalised=8))["step"] == 200
    assert second_rise(run(lmn)) is None
    assert second_rise(run(lmn[:150], generalised=8)) is None  # too short to tell


def test_the_papers_numbers_are_those_of_its_own_curves():
    """Both were read off Figure 2, to 0.15 in LMN and 0.1 in L2 norm."""
    columns, compared = {"LMN": ("lmn", 0.15), "L2 norm": ("l2_norm", 0.1)}, []
    for task, numbers in claims.PAPER.items():
        curve = claims.paper_curves(task)
        for name, value in numbers.items():
            if not (match := re.fullmatch(r"(LMN|L2 norm)(, peak| at step (?:4000|8000|10000))", name)):
                continue
            column, error = columns[match[1]]
            values = list(curve[column])
            if match[2] == ", peak":
                place = int(np.nanargmax(values))
                top, beside = values[place], values[max(place - 2, 0) : place + 3]
                assert value >= top - error, (task, name)
                # Where another line covers the curve at its peak, the peak may be higher than all that was read.
                if any(map(math.isnan, beside)):
                    continue
            else:
                top = values[list(curve["step"]).index(int(match[2].split()[-1]))]
            assert abs(top - value) <= error, (task, name)
            compared.append((task, name))
    assert len(compared) == 12 and {task for task, _ in compared} == set(claims.PAPER)


def test_numbers_are_compared_within_their_bounds():
    assert claims._within("s4", "LMN, peak", 1.07) == "within 8%"
    assert claims._within("s4", "LMN, peak", 0.91) == "outside 8%"
    assert claims._within("s4", "step of generalisation", 1 / 1.5) == "within a factor 1.6"
    assert claims._within("s4", "step of generalisation", 1.7) == "outside a factor 1.6"
    assert claims._within("xor", "LMN at step 4000", 2.0) == ""
    assert claims._within("s4", "LMN, peak", math.nan) == "not reached"


def test_a_statistic_counts_the_seeds_that_have_it():
    statistic = Statistic("name", "s4", "", "1", (1.0, math.nan, 3.0), "")
    assert statistic.middle == 2 and statistic.known == [1, 3]


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (-200.0, "-200"),
        (1.5e-4, "1.5e-04"),
        (0.25, "0.250"),
        (math.nan, "-"),
        (math.inf, "never"),
    ],
)
def test_numbers_as_text(value, text):
    assert number(value) == text
