"""The interventions: the choice of weights, the runs, the statistics, the section of the report."""

import gzip
import json
import math
import multiprocessing
import random
from dataclasses import replace
from pathlib import Path

import pytest
from fresh import CONTEXT

import lmnfast
from lmnfast import _commands, cli
from lmnfast.grokking import read_run
from lmnfast.grokking.config import start
from lmnfast.grokking.run import load_checkpoint
from lmnfast.grokking.training import train
from lmnfast.paper import interventions
from lmnfast.paper.intervened import (
    SignTest,
    by_arm,
    claims_of_steps,
    draw,
    interval_of_order,
    section,
    sign_test,
    write_section,
)
from lmnfast.paper.interventions import (
    COLUMNS,
    choices,
    chosen_weight,
    matched_weight_decay,
    name_of,
    read_results,
    run_interventions,
    seconds_per_step,
    write_results,
)
from lmnfast.paper.settings import ARMS, PENALISED, QUICK_INTERVENTIONS, Interventions, Study

SMALL = Interventions(
    horizons={"s4": 20},
    every=10,
    tuning=(1000,),
    weights={"pooled_curvature": (0.1,), "lmn": (1e-4,), "jacobian_norm": (1e-3, 1e300)},
    weight_decays=(0.1, 10.0),
    penalty_samples=8,
)


def row(task="xor", arm="none", weight=None, seed=0, step=None, **more):
    """A row of 0s; a run that is not given a step is censored at 5000."""
    numbers = dict.fromkeys(interventions.NUMBERS, 1.0)
    known = {
        "task": task,
        "arm": arm,
        "weight": weight,
        "weight_decay": 0.2,
        "seed": seed,
        "seeds": "tuning" if seed >= 1000 else "reported",
        "source": "run",
        "ended": "horizon" if step is None else "accurate",
        "step": step,
        "last_step": step or 5000,
    }
    return {name: {**known, **numbers, **more}[name] for name in COLUMNS}


# The choice of the weights


def test_the_weight_of_the_smallest_median_step_is_chosen():
    steps = {0.1: (3000, 2000), 1.0: (2400, 2500), 10.0: (100, None)}  # a censored run counts as infinite
    rows = [row(weight=w, seed=1000 + k, step=s) for w, pair in steps.items() for k, s in enumerate(pair)]
    assert chosen_weight(rows) == 1.0
    equal = [row(weight=w, seed=1000, step=2000) for w in (10.0, 1.0)]
    assert chosen_weight(equal) == 1.0
    censored = [row(weight=w, seed=1000, test_accuracy=a) for w, a in ((0.1, 0.3), (1.0, 0.5), (10.0, 0.5))]
    assert chosen_weight(censored) == 1.0
    diverged = [row(weight=1.0, seed=1000, test_accuracy=None), row(weight=2.0, seed=1000, test_accuracy=0.0)]
    assert chosen_weight([*diverged, row(weight=3.0, seed=1000, test_accuracy=0.01)]) == 3.0


@pytest.mark.parametrize(
    "target, expected",
    [
        (36.0, 0.1),
        (35.0, 0.141),  # half of the way in the logarithm from 0.1 to 0.2
        (34.0, 0.2),
        (32.0, 0.252),  # a third of the way from 0.2 to 0.4
        (99.0, 0.1),
        (1.0, 0.4),
    ],
)
def test_the_weight_decay_is_interpolated_to_the_norm(target, expected):
    norms = {0.4: (27, 29), 0.1: (36, 36), 0.2: (34, 34)}
    rows = [{**row(), "weight_decay": d, "l2_norm": n} for d, pair in norms.items() for n in pair]
    assert matched_weight_decay(rows, target) == expected
    diverged = [{**row(), "weight_decay": 0.8, "l2_norm": None}]
    assert matched_weight_decay([*rows, *diverged], target) == expected


def test_the_norm_is_that_of_the_chosen_penalty_of_the_same_task():
    rows = [
        row(arm="pooled_curvature", weight=w, seed=1000, step=s, l2_norm=n)
        for w, s, n in ((0.1, 3000, 40.0), (1.0, 2000, 30.0))
    ]
    rows += [row(arm=arm, weight=0.5, seed=1000, step=100) for arm in ("lmn", "jacobian_norm")]
    rows += [
        {**row(arm="weight_decay", seed=1000, l2_norm=n), "weight_decay": d}
        for d, n in ((0.1, 40.0), (0.9, 30.0))
    ]
    others = [{**each, "task": "s4", "l2_norm": 35.0} for each in rows]
    assert choices([*others, *rows], "xor", SMALL) == {
        "none": None,
        "pooled_curvature": 1.0,
        "lmn": 0.5,
        "jacobian_norm": 0.5,
        "weight_decay": 0.9,
    }


# The runs


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """The study whose results take the place of runs: two seeds without a penalty."""
    out = tmp_path_factory.mktemp("study")
    lines = []
    for seed in (0, 1):
        config = replace(
            Study(steps=20, every=10).config("s4", seed), observables=("curvature", "pooled_curvature")
        )
        for each in train(config, out / str(seed)).rows:
            numbers = {name.removesuffix("_hidden_1"): value for name, value in each.items()}
            lines.append({"task": "s4", "seed": seed, "layer": "hidden_1", **numbers})
    text = [",".join(lines[0]), *(",".join(map(str, line.values())) for line in lines)]
    (out / "results.csv").write_text("\n".join(text) + "\n")
    return out / "results.csv"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, study) -> Path:
    out = tmp_path_factory.mktemp("interventions")
    with pytest.MonkeyPatch.context() as quick:  # processes that do not import PyTorch again
        quick.setattr(multiprocessing, "get_context", lambda _: CONTEXT)
        run_interventions(out, ("s4",), 2, 2, SMALL, results=study)
    return out / "interventions"


def test_every_arm_has_a_row_for_every_seed(finished):
    rows = read_results(finished / "results.csv.gz")
    reported = [each for each in rows if each["seeds"] == "reported"]
    assert [(each["arm"], each["seed"]) for each in reported] == [
        (arm, seed) for arm in ARMS for seed in (0, 1)
    ]
    tuning = [
        (each["arm"], each["weight"] or each["weight_decay"]) for each in rows if each["seeds"] == "tuning"
    ]
    assert tuning == [
        *(("pooled_curvature", 0.1), ("lmn", 1e-4), ("jacobian_norm", 1e-3), ("jacobian_norm", 1e300)),
        *(("weight_decay", 0.1), ("weight_decay", 10.0)),
    ]
    assert all(each["seed"] == 1000 for each in rows if each["seeds"] == "tuning")
    assert all(each["ended"] == "horizon" and each["last_step"] == 20 for each in reported)
    assert not list(finished.rglob("*.part"))


def test_a_weight_at_which_training_diverges_is_in_the_table_and_is_not_chosen(finished):
    rows = [each for each in read_results(finished / "results.csv.gz") if each["arm"] == "jacobian_norm"]
    assert [each["ended"] for each in rows if each["weight"] == 1e300] == ["diverged"]
    assert {each["weight"] for each in rows if each["seeds"] == "reported"} == {1e-3}


def test_a_row_is_what_the_public_functions_give_of_its_run(finished):
    for arm, weight in (("lmn", 1e-4), ("jacobian_norm", 1e-3)):
        path = finished / "runs" / name_of(("s4", arm, weight, 1))
        run = read_run(path)
        config = run.config
        assert (config.penalty, config.penalty_weight, config.penalty_samples) == (arm, weight, 8)
        assert config.until_accurate and config.weight_decay == 0.2
        task, model = start(config)
        load_checkpoint(model, path, 20)
        f, x = lmnfast.cut(model, "hidden_1", task.train_inputs)
        measured = lmnfast.measure(
            f, x, points=9, rule="lobatto", observables=("curvature", "pooled_curvature")
        )
        found = next(
            each
            for each in read_results(finished / "results.csv.gz")
            if (each["arm"], each["seed"]) == (arm, 1)
        )
        assert found["lmn"] == pytest.approx(measured.lmn, rel=1e-6)
        assert found["curvature"] == pytest.approx(measured.observables["curvature"], rel=1e-6)
        assert found["pooled_curvature"] == pytest.approx(measured.observables["pooled_curvature"], rel=1e-6)
        for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "l2_norm"):
            assert found[name] == pytest.approx(run.rows[-1][name], rel=1e-6), name
        assert [file.name for file in (path / "checkpoints").iterdir()] == ["step_00000020.pt"]


def test_the_matched_weight_decay_is_trained_with(finished):
    rows = read_results(finished / "results.csv.gz")
    decays = {each["weight_decay"] for each in rows if each["arm"] == "weight_decay" and each["seed"] < 1000}
    assert len(decays) == 1 and 0.1 <= min(decays) <= 10
    decay = decays.pop()
    assert (
        read_run(finished / "runs" / name_of(("s4", "weight_decay", decay, 0))).config.weight_decay == decay
    )


def test_runs_of_a_study_take_the_place_of_the_arm_without_a_penalty(finished, study):
    rows = [each for each in read_results(finished / "results.csv.gz") if each["arm"] == "none"]
    assert [each["source"] for each in rows] == ["run", "results.csv"]
    assert not (finished / "runs" / "s4-none-seed1").exists()
    there = [each for each in lmnfast.history(study) if each["step"] == 20]
    for mine, theirs in zip(rows, there, strict=True):
        for name in interventions.NUMBERS:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name


def test_what_is_there_is_not_made_again_and_the_table_has_the_same_bytes(finished, study, monkeypatch):
    before = (finished / "results.csv.gz").read_bytes()
    monkeypatch.setattr(interventions, "train_or_say", lambda *_: pytest.fail("trained again"))
    run_interventions(finished.parent, ("s4",), 2, 1, SMALL, results=study)
    assert (finished / "results.csv.gz").read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda text: text.replace(",lobatto,", ",uniform,"),
            "expected numbers at 9 lobatto points, got 9 uniform",
        ),
        (lambda text: "\n".join(text.splitlines()[:-1]) + "\n", "lacks step 20 of s4, seed 1; without it"),
        (lambda text: text.replace("task", "tusk"), "results: "),
        (lambda text: "nonsense", "results: expected a table of lmnfast"),
    ],
)
def test_a_table_that_cannot_take_the_place_is_named_before_any_work(change, message, study, tmp_path):
    file = tmp_path / "results.csv"
    file.write_text(change(study.read_text()))
    with pytest.raises(ValueError, match=message):
        run_interventions(tmp_path / "out", ("s4",), 2, 1, SMALL, results=file)
    assert not (tmp_path / "out").exists()


def test_a_table_with_other_numbers_than_a_run_here_is_refused(finished, study, tmp_path):
    head, *lines = study.read_text().splitlines()
    place = head.split(",").index("l2_norm")
    entries = [line.split(",") for line in lines]
    for entry in entries:
        entry[place] = str(float(entry[place]) * 1.001)
    file = tmp_path / "results.csv"
    file.write_text("\n".join([head, *map(",".join, entries)]) + "\n")
    with pytest.raises(
        ValueError, match=r"results: .* has the l2_norm \S+ for s4, seed 0, and a run here \S+; without"
    ):
        run_interventions(finished.parent, ("s4",), 2, 1, SMALL, results=file)


def test_wrong_arguments_are_named(tmp_path, finished):
    for given, message in (
        ({"tasks": ("s5",)}, "tasks: expected some of .*, got s5"),
        ({"seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"seeds": 1001}, "seeds: expected at most 1000, which tunes the weights, got 1001"),
        ({"jobs": 0}, "jobs: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run_interventions(
                **{"out": tmp_path, "tasks": ("s4",), "seeds": 1, "jobs": 1, "settings": SMALL, **given}
            )
    with pytest.raises(
        ValueError, match="holds interventions with other settings: penalty_every is 4 there, 1 here"
    ):
        run_interventions(finished.parent, ("s4",), 1, 1, replace(SMALL, penalty_every=1))
    assert not (tmp_path / "interventions").exists()


def test_damaged_files_are_named(finished, tmp_path):
    for name, message in (
        ("rows/s4-lmn0.0001-seed1000.json", "out: cannot read .*s4-lmn0.0001-seed1000.json"),
        ("study.json", "out: cannot read .*study.json"),
    ):
        file = finished / name
        before = file.read_text()
        file.write_text(before[:-9])
        try:
            with pytest.raises(ValueError, match=message):
                run_interventions(finished.parent, ("s4",), 2, 1, SMALL)
        finally:
            file.write_text(before)


def test_the_time_of_an_update_has_the_penaltys_time_in_it():
    settings = replace(SMALL, penalty_samples=400, penalty_every=1)
    assert seconds_per_step("s4", "pooled_curvature", settings) > 2 * seconds_per_step("s4", "none", settings)


# Statistics


def test_the_sign_test_is_that_of_fair_coins():
    test = sign_test("", "xor", [1, 1, 1, 1, 1, math.inf, 3, math.nan], [2, 2, 2, 2, 2, math.inf, 1, 1])
    assert (test.more, test.fewer, test.equal) == (5, 1, 1)
    assert test.p == pytest.approx(2 * (1 + 6) / 64)
    assert test.verdict == "undecided"
    assert SignTest("", "xor", 6, 0, 0).p == pytest.approx(2 / 64)
    assert SignTest("", "xor", 6, 0, 9).verdict == "holds" and SignTest("", "xor", 0, 6, 0).verdict == "fails"
    assert SignTest("", "xor", 0, 0, 9).p == 1
    assert SignTest("", "xor", 3, 0, 0).verdict == "3 seeds"


def test_the_interval_of_the_median_contains_it_in_enough_draws():
    draws = random.Random(0)
    for count, exact in ((6, 1 - 2 / 2**6), (8, 1 - 2 / 2**8), (32, 0.98)):  # 32: from the 10th to the 23rd
        inside = 0
        for _ in range(2000):
            low, high = interval_of_order([draws.random() for _ in range(count)])
            inside += low <= 0.5 <= high
        assert inside / 2000 == pytest.approx(exact, abs=0.012) and inside / 2000 >= 0.95
    assert interval_of_order([*range(6)]) == (0, 5) and interval_of_order([*range(32)]) == (9, 22)
    assert interval_of_order([3, 1, 2, math.inf, math.inf, math.inf]) == (1, math.inf)
    assert all(math.isnan(end) for end in interval_of_order([1, 2, 3, 4, 5]))


# The section


def given_rows() -> list[dict]:
    """32 seeds: XOR is accurate earlier with the penalty on the pooled curvature, and never with that on LMN."""
    rows = []
    for seed in range(32):
        steps = {
            "none": 2800,
            "pooled_curvature": 2300,
            "lmn": None,
            "jacobian_norm": 2800,
            "weight_decay": 2700,
        }
        for arm, step in steps.items():
            step = (
                None
                if step is None
                else step + 100 * (seed * 7 % 11) + (100 if arm == "jacobian_norm" and seed % 2 else 0)
            )
            weight = {"pooled_curvature": 10.0, "lmn": 1e-3, "jacobian_norm": 0.1}.get(arm)
            rows.append(
                row(arm=arm, weight=weight, seed=seed, step=step, lmn=20.0 + seed - (arm == "lmn") * 10)
            )
            if arm == "weight_decay":
                rows[-1]["weight_decay"] = 0.31
    return rows


def tuning_rows() -> list[dict]:
    grid = {"pooled_curvature": (1.0, 10.0), "lmn": (1e-3, 1e-2), "jacobian_norm": (0.1, 1.0)}
    rows = [
        row(
            arm=arm,
            weight=weight,
            seed=1000,
            step=None if weight == 1e-2 else 2500,
            train_accuracy=float(weight != 1e-2),
        )
        for arm, weights in grid.items()
        for weight in weights
    ]
    return [
        *rows,
        *({**row(arm="weight_decay", seed=1000, l2_norm=1.5 - d), "weight_decay": d} for d in (0.1, 0.8)),
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_results(tmp_path / "results.csv.gz", [*tuning_rows(), *given_rows()])
    (tmp_path / "study.json").write_text(json.dumps({"penalty_every": 4, "tuning": [1000]}))
    return tmp_path


def test_a_table_is_read_as_it_was_written(folder):
    assert read_results(folder / "results.csv.gz") == [*tuning_rows(), *given_rows()]
    text = gzip.decompress((folder / "results.csv.gz").read_bytes()).decode()
    assert text.splitlines()[0] == ",".join(COLUMNS)


def test_the_claims_follow_the_pairs():
    found = {claim.name: claim for claim in claims_of_steps(by_arm(given_rows()))}
    verdicts = {name: claim.verdict for name, claim in found.items()}
    assert verdicts["pooled curvature: accurate earlier than none"] == "holds"
    assert verdicts["LMN: accurate earlier than none"] == "fails"
    assert verdicts["jacobian norm: accurate earlier than none"] == "fails"
    assert (found["jacobian norm: accurate earlier than none"].fewer, len(given_rows())) == (16, 160)
    assert verdicts["pooled curvature: accurate earlier than weight decay"] == "holds"


def test_the_section_has_every_arm_every_weight_and_the_censored_seeds(folder):
    lines = section(folder, folder / "figure.png", "figures/figure.png")
    text = "\n".join(lines)
    assert "![Interventions](figures/figure.png)" in text and (folder / "figure.png").stat().st_size > 10_000
    assert "32 seeds of each task and arm" in text and "in one of 4 updates, 4 times as large" in text
    assert "| xor | penalty on LMN | 0.001 | never (never to never) | 32 of 32 | 25.5 (" in text
    assert "| xor | penalty on the pooled curvature | 10 | 2800 (2600 to 3000) | 0 of 32 |" in text
    assert "| xor | weight decay, matched in the norm | weight decay 0.31 |" in text
    assert "| pooled curvature: accurate earlier than none | xor | **holds** | 32 | 0 | 0 | 4.7e-10 |" in text
    assert "| LMN: smaller LMN at the end | xor | **holds** | 32 | 0 | 0 | 4.7e-10 |" in text
    assert "| xor | lmn | 0.01 | never | 0 | 1.000 | 1.000 | 1.000 |  |" in text
    assert "| xor | pooled_curvature | 1 | 2500 | 1.000 | 1.000 | 1.000 | 1.000 | chosen |" in text
    assert text.count("matched: ") == 2 and "earlier study" not in text


def test_the_section_stands_alone_and_says_which_runs_were_taken(finished):
    paths = write_section(finished)
    assert [path.name for path in paths] == ["report.md", "interventions.png", "results.csv.gz"]
    text = paths[0].read_text()
    assert text.startswith("# Interventions\n") and "](interventions.png)" in text
    assert "1 of the runs without a penalty are those of an earlier study (results.csv)" in text
    assert "| s4 | jacobian_norm | 1e+300 | never | diverged | diverged | diverged | diverged |  |" in text


def test_the_curves_are_the_shares_of_accurate_seeds(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    real = Axes.step

    def step(axes, x, y, **look):
        drawn[look["label"]] = list(x), list(y)
        return real(axes, x, y, **look)

    monkeypatch.setattr(Axes, "step", step)
    rows = [row(seed=k, step=s) for k, s in enumerate((300, 100, None, 200))]
    draw({"xor": {"none": rows}}, Interventions(), tmp_path / "figure.png")
    assert drawn == {"none (the paper's training)": ([0, 100, 200, 300, 5000], [0, 0.25, 0.5, 0.75, 0.75])}


# The command


def test_the_command_runs_the_interventions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_commands, "QUICK_INTERVENTIONS", SMALL)
    command = [
        "paper",
        "--interventions",
        "--quick",
        "--tasks",
        "s4",
        f"--out={tmp_path}",
        "--jobs=1",
        "--seeds=1",
    ]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert (
        "6 runs to choose weights, 5 to report" in said
        and "s4: until test accuracy 1, at most 20 steps" in said
    )
    assert f"written: {tmp_path / 'interventions' / 'report.md'}" in said
    assert "at most" in said and "min in 1 processes" in said
    assert cli.main(["paper", "--results=x.csv", f"--out={tmp_path}"]) == 2
    assert "results: expected --interventions with it, got x.csv without" in capsys.readouterr().err
    assert cli.main([*command, f"--results={tmp_path / 'none.csv'}"]) == 2
    assert "lmnfast: error: results: " in capsys.readouterr().err


def test_the_settings_of_the_commands_are_those_of_runs():
    for settings in (Interventions(), QUICK_INTERVENTIONS):
        assert set(settings.weights) == set(PENALISED) == set(ARMS) - {"none", "weight_decay"}
        for task in ("modular-addition", "s4", "xor"):
            for arm, weights in settings.weights.items():
                assert settings.config(task, arm, weights[0], 0).penalty == arm
            plain = settings.config(task, "none", None, 3)
            study = Study().config(task, 3)
            assert replace(
                study, steps=plain.steps, samples=64, points=7, observables=(), until_accurate=True
            ) == replace(plain, every=100)
