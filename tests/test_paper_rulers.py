"""The observables as progress measures, and the clusters of XOR, on given values."""

import math

import numpy as np
import pytest
import torch
from runs_of_values import run

import lmnfast
from lmnfast.grokking.config import Config, start
from lmnfast.grokking.run import load_checkpoint
from lmnfast.grokking.training import train
from lmnfast.paper import answers, claims, figures, maps, questions, rulers
from lmnfast.paper.curves import Rise
from lmnfast.paper.study import Seed

LMN = [24, 15, 30, 28, 22, 20, 14, 10, 8, 8]
LOSS = [3, 5, 9, 8, 7, 6, 5, 3, 1, 1]
ACCURACY = [0, 0, 0, 0, 0, 0.2, 0.5, 0.9, 1, 1]


def generalised(**observables):
    return run(LMN, generalised=8, test_loss=LOSS, test_accuracy=ACCURACY, observables=observables)


def test_r_is_pearsons_in_the_generalising_phase():
    line = [0, 0, *(1 - 2 * loss for loss in LOSS[2:8]), 50, 50]
    r = generalised(curvature=line)
    assert rulers.names_in(r) == ("lmn", "curvature", "l2_norm")
    # The row of the first test accuracy of 1 is no longer in the phase.
    expected = np.corrcoef(LOSS[2:8], LMN[2:8])[0, 1]
    assert rulers.correlation(r, "lmn") == pytest.approx(expected)
    assert rulers.correlation(r, "curvature") == pytest.approx(-1)
    # A falling line is as linear as a rising one.
    assert rulers.more_linear(r, "curvature") == pytest.approx(1 - expected)
    assert math.isnan(rulers.correlation(r, "l2_norm"))


def test_an_alarm_is_the_passing_of_the_middle_in_the_direction_of_the_phase():
    r = generalised()  # from 30 down to 10 in the phase
    assert rulers.alarms(r, "lmn") == [100, 500]  # 24 to 15 while memorising, 22 to 20
    assert rulers.half_generalised(r) == 600
    assert rulers.lead(r, "lmn") == 100
    assert rulers.false_alarms(r, "lmn") == 1
    rising = generalised(curvature=[0, 0, 0, 1, 2, 3, 4, 9, 9, 9])
    assert rulers.alarms(rising, "curvature") == [700] and rulers.lead(rising, "curvature") == -100
    assert rulers.false_alarms(rising, "curvature") == 0


def test_later_passings_are_false_up_to_the_papers_end():
    again = [30, 30, 30, 20, 10, 10, 40, 10, 40, 10]
    r = run(again, generalised=5, every=2000)  # 0 to 18 000
    assert rulers.alarms(r, "lmn") == [6000, 14_000] and rulers.false_alarms(r, "lmn") == 1


def test_a_run_that_does_not_generalise_has_false_alarms_alone():
    never = run([1, 1, 30, 20, 10, 5], test_accuracy=[0, 0, 0, 0.1, 0.3, 0.4], every=3000)
    assert rulers.alarms(never, "lmn") == [12_000] and rulers.false_alarms(never, "lmn") == 1
    assert math.isnan(rulers.lead(never, "lmn"))
    short = run([1, 1, 30, 20, 10, 5], test_accuracy=[0] * 6)
    assert rulers.alarms(short, "lmn") == [] and math.isnan(rulers.false_alarms(short, "lmn"))


def members(count: int, noise: float = 0.0) -> list[Seed]:
    """Seeds in which the curvature is linear in the test loss, LMN less so, and the participation ratio not."""
    ratio = [0, 0, 1, 3, 1, 3, 1, 3, 1, 3]
    return [
        Seed(generalised(curvature=np.array(LOSS) + noise * k, participation_ratio=ratio), None, [])
        for k in range(count)
    ]


def test_rulers_are_compared_with_lmn_seed_by_seed():
    found = {ruler.name: ruler for ruler in rulers.rulers(members(8, 0.1))}
    assert list(found) == ["lmn", "curvature", "participation_ratio", "l2_norm"]
    assert found["curvature"].r.middle == pytest.approx(1) and found["curvature"].more.verdict == "more"
    assert found["participation_ratio"].more.verdict == "less"
    assert found["lmn"].more.verdict == "" and found["l2_norm"].more.verdict == "not reached"
    assert found["lmn"].lead.values == (100,) * 8 and found["lmn"].lead.text == "100 (100 to 100)"
    assert sum(found["lmn"].false_alarms.values) == 8


def test_nothing_is_claimed_from_fewer_than_four_seeds():
    assert {ruler.more.verdict for ruler in rulers.rulers(members(3))} == {"", "3 seeds", "not reached"}


def test_the_table_and_the_figure_have_every_observable(tmp_path):
    lines = questions._progress({"xor": members(4)}, "figures/a.png")
    rows = [line for line in lines if line.startswith("| xor")]
    assert [line.split("|")[2].strip() for line in rows] == [
        "`lmn`", "`curvature`", "`participation_ratio`", "`l2_norm`",
    ]  # fmt: skip
    columns = {line.count("|") for line in lines if line.startswith("|")}
    assert columns == {9}
    assert "| 4 | 4 of 4 |" in rows[0] and "| more |" in rows[1]
    path = figures.draw_rulers({"xor": members(4)}, tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")


# XOR's maps


PAIRS = torch.cartesian_prod(torch.arange(32), torch.arange(32))[::3]


def test_patterns_are_those_of_a_parity_in_both_numbers():
    pairs = np.array([[0b00110, 0b00010], [0b00000, 0b00100], [0b10000, 0b00000]])
    assert maps.patterns(pairs, 0b00010, 4).tolist() == [3, 0, 0]
    assert maps.patterns(pairs, 0b00110, 4).tolist() == [1, 1, 0]  # 110 has an even number of set bits
    assert maps.patterns(pairs, 0b10000, 3).tolist() == [0, 0, 1]
    assert maps.patterns(pairs, 0b00100, 2).tolist() == [1, 1, 0]


def test_clusters_by_a_pattern_are_found_and_others_are_not():
    same = maps.patterns(PAIRS.numpy(), 0b00100, 4)
    L = torch.tensor(np.where(same[:, None] == same, 1.0, 0.5))
    found = maps.scores(L, PAIRS, "top")
    assert found["index, a bit, 4 patterns"] == pytest.approx(1)
    assert found["share, a bit, 4 patterns"] == pytest.approx(1)
    assert found["index, a bit, 2 patterns"] < 0.6 and abs(found["index, the answer"]) < 0.2
    assert found["index of 20 clusters, a bit, 4 patterns"] > 0.9  # there are no more than four to find
    hidden = maps.patterns(PAIRS.numpy(), 0b10110, 4)  # a parity of three bits
    found = maps.scores(torch.tensor(np.where(hidden[:, None] == hidden, 1.0, 0.5)), PAIRS, "valley")
    assert found["index, a parity, 4 patterns"] == pytest.approx(1)
    assert found["share, a bit, 4 patterns"] < 0.05
    assert "index of 15 clusters, a bit, 3 patterns" in found


def test_the_papers_reading_of_maps_for_each_bit_explains_its_own_matrix():
    kinds = [maps.patterns(PAIRS.numpy(), 1 << bit, 3) for bit in range(5)]
    L = torch.tensor(sum(0.2 * (kind[:, None] == kind) for kind in kinds))
    found = maps.scores(L, PAIRS, "valley")
    assert found["share, a bit, 3 patterns"] == pytest.approx(1)
    assert found["share, a bit, 2 patterns"] < 0.9


def test_a_random_matrix_has_no_such_clusters():
    x = torch.rand(len(PAIRS), len(PAIRS), dtype=torch.float64)
    found = maps.scores((x + x.mT) / 2, PAIRS, "valley")
    assert max(found.values()) < 0.1


def test_samples_of_a_group_with_smaller_entries_do_not_share_a_map():
    same = maps.patterns(PAIRS.numpy(), 1, 2)
    found = maps.scores(torch.tensor(np.where(same[:, None] == same, 0.5, 1.0)), PAIRS, "valley")
    assert found["share, a bit, 2 patterns"] < 1e-3  # the other bits, by chance
    answer = PAIRS[:, 0] ^ PAIRS[:, 1]
    found = maps.scores(torch.where(answer[:, None] == answer, 1.0, 0.5), PAIRS, "top")
    assert found["share, the answer"] == pytest.approx(1) and found["index, the answer"] == pytest.approx(1)


def test_a_matrix_of_equal_entries_is_explained_by_nothing():
    assert maps.explained(np.ones(10), [np.arange(10) > 4]) == 0.0
    assert maps.explained(np.arange(10.0), [np.ones(10)]) == 0.0


def test_maps_are_measured_at_the_valley_and_the_top_of_a_second_rise_once(tmp_path, monkeypatch):
    config = Config("xor", bits=3, steps=20, every=10, threads=1, device="cpu")
    path = train(config, tmp_path / "run").path
    monkeypatch.setattr(answers, "second_rise", lambda _: Rise(10, 15, 20, 16))
    asked = answers.Answers(tmp_path / "answers.csv", path, {"points": 9, "rule": "lobatto"})
    asked.maps()
    assert asked.rows == []  # a rise by less than a tenth
    monkeypatch.setattr(answers, "second_rise", lambda _: Rise(10, 15, 20, 20))
    asked.maps()
    rows = answers.read_answers(tmp_path / "answers.csv")
    places = {(row["variant"].partition(":")[0], row["step"]) for row in rows if row["question"] == "maps"}
    assert places == {("valley", 10), ("top", 20)}
    task, model = start(config)
    load_checkpoint(model, path, 20)
    L = lmnfast.connectivity(*lmnfast.cut(model, "hidden_1", task.train_inputs), points=9, rule="lobatto")
    expected = maps.scores(L, task.train_inputs, "top")
    found = {row["variant"]: row["value"] for row in rows}
    assert {
        f"top: {name}": pytest.approx(value, abs=1e-6) for name, value in expected.items()
    }.items() <= found.items()
    monkeypatch.setattr(answers, "_of_maps", lambda *_: pytest.fail("measured again"))
    answers.Answers(tmp_path / "answers.csv", path, {}).maps()


def test_the_table_of_maps_has_all_groupings_and_no_seed_is_no_table():
    from lmnfast.paper.answers import row

    same = maps.patterns(PAIRS.numpy(), 1, 4)
    L = torch.tensor(np.where(same[:, None] == same, 1.0, 0.5))
    rows = [
        row("maps", f"{place}: {what}", 100, "hidden_1", 9, value)
        for place in ("valley", "top")
        for what, value in maps.scores(L, PAIRS, place).items()
    ]
    lines = questions._maps([Seed(run(LMN), None, rows)])
    assert any(line.startswith("| a bit, 4 patterns | 1.000") for line in lines)
    assert len([line for line in lines if line.startswith("| a")]) == 7
    assert "No seed has a second rise to look at." in questions._maps([Seed(run(LMN), None, [])])


def test_leads_do_not_need_generalisation_to_the_end():
    """A seed with test accuracy 0.9 at the end has reached one half."""
    r = run([1, 1, 30, 20, 10, 5], test_accuracy=[0, 0, 0, 0.6, 0.8, 0.9], every=3000)
    assert rulers.lead(r, "lmn") == -3000 and claims.PAPER_ENDS == 15_000
