"""The study of the paper: its runs, its statistics, its report."""

import csv
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import CONTEXT

import lmnfast
from lmnfast import cli
from lmnfast.grokking.config import Config, start
from lmnfast.grokking.run import Run, load_checkpoint
from lmnfast.grokking.training import train
from lmnfast.paper import claims, stand_ins, study
from lmnfast.paper.claims import Statistic, interval, judged, levelling, peak, r_squared, second_rise
from lmnfast.paper.report import write_report
from lmnfast.paper.study import Seed, Study, read_study, run_path, run_study
from lmnfast.runs.files import claimed

TINY = Study(steps=20, every=10, milestones=(0, 20), few=(20,), init_steps=10, relu_steps=10, relu_every=10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Two seeds of S4, the smallest task; a worker is killed on the way."""
    out = tmp_path_factory.mktemp("study") / "paper"

    def kill_one() -> None:
        deadline = time.monotonic() + 600  # a busy machine takes long to start a process
        while not run_path(out, "s4", 0).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.MonkeyPatch.context() as quick:  # processes that do not import PyTorch again
        quick.setattr(multiprocessing, "get_context", lambda _: CONTEXT)
        run_study(out, ("s4",), 2, 2, TINY)
    killer.join()
    return out


def run(lmn, *, memorised=2, generalised=None, test_loss=None, l2_norm=None, every=100) -> Run:
    """A run of these values of LMN, one each `every` steps."""
    n = len(lmn)
    rows = [
        {
            "step": k * every,
            "lmn_hidden_1": float(value),
            "test_loss": float(value if test_loss is None else test_loss[k]),
            "l2_norm": float(1 if l2_norm is None else l2_norm[k]),
            "train_accuracy": float(k >= memorised),
            "test_accuracy": float(generalised is not None and k >= generalised),
        }
        for k, value in zip(range(n), lmn)
    ]
    return Run(Path("run"), Config("xor"), rows, {})


# Statistics


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


def test_numbers_of_a_few_seeds_are_not_called_within_or_outside():
    for count, verdict in ((3, "3 seeds"), (4, "within 8%")):
        members = [Seed(run([1, 1, 34.7, 20], generalised=3), None, None, []) for _ in range(count)]
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
    assert [row["step"] for row in claims.generalising(never)] == [10_000, 15_000]
    assert claims.fall(never) == pytest.approx(20 / 30)
    steps = Statistic(
        "", "s4", "", "1", tuple(map(claims.NUMBERS["step of generalisation"], [never] * 6)), ""
    )
    assert steps.median == math.inf and steps.interval == (math.inf, math.inf)
    one = Statistic("", "s4", "", "1", (100.0, 150.0, 200.0, 300.0, math.inf, math.inf), "")
    assert one.median == 250 and one.interval[1] == math.inf
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
    assert statistic.median == 2 and statistic.known == [1, 3]


# The study


def test_a_killed_worker_is_replaced_and_nothing_is_missing(finished):
    seeds = read_study(finished, ("s4",), 2)["s4"]
    for number, seed in enumerate(seeds):
        assert seed.run.config.seed == number
        assert [row["step"] for row in seed.run.rows] == [0, 10, 20]
        assert seed.lecun.config.init == "lecun-first" and seed.lecun.rows[-1]["step"] == 10
        assert seed.relu.config.activation == "relu"
        assert sorted(seed.answer("samples", "train")) == [0, 20]


def test_answers_are_what_the_public_functions_give(finished):
    seed = read_study(finished, ("s4",), 2)["s4"][1]
    task, model = start(seed.run.config)
    file = finished / "runs/s4-seed1/checkpoints/step_00000020.pt"
    model.load_state_dict(torch.load(file, weights_only=True))
    for layer in ("embedding", "hidden_2"):
        expected = lmnfast.lmn(*lmnfast.cut(model, layer, task.train_inputs)).item()
        assert seed.answer("layers", layer=layer)[20] == pytest.approx(expected, rel=1e-6)
    f, x = lmnfast.cut(model, "hidden_1", task.train_inputs)
    L = lmnfast.connectivity(f, x)
    w = lmnfast.eigenvalues(L)
    p = w.clamp(min=0) / w.clamp(min=0).sum()
    entropy = -(p * p.clamp(min=1e-300).log2()).sum()
    assert seed.answer("samples", "train")[20] == pytest.approx(seed.run.rows[-1]["lmn_hidden_1"], rel=1e-6)
    assert seed.answer("negative", "clipped")[20] == pytest.approx(2 ** entropy.item(), rel=1e-6)
    assert seed.answer("negative", "share")[20] == pytest.approx(
        (-w[w < 0].sum() / w.abs().sum()).item(), rel=1e-6
    )
    off = L[~torch.eye(len(L), dtype=torch.bool)]
    assert seed.answer("entries", "mean")[20] == pytest.approx(off.double().mean().item(), rel=1e-6)
    expected = lmnfast.lmn(f, x, method="hermite").item()
    assert seed.answer("stand-ins", "hermite")[20] == pytest.approx(expected, rel=1e-6)
    expected = lmnfast.lmn(f, x, points=11).item()
    assert seed.answer("nodes", "uniform 11")[20] == pytest.approx(expected, rel=1e-6)
    _, test_samples = lmnfast.cut(model, "hidden_1", task.test_inputs)
    assert seed.answer("samples", "test")[20] == pytest.approx(lmnfast.lmn(f, test_samples).item(), rel=1e-6)
    sizes = {row["samples"]: row["value"] for row in seed.answers if row["question"] == "number"}
    assert sorted(sizes) == [100, 200, 300, 400, 500, 576]
    assert sizes[576] == pytest.approx(
        seed.answer("samples", "both")[20], rel=1e-6
    )  # another order of the same


def test_what_is_there_is_not_made_again(finished, monkeypatch):
    before = {path: path.read_bytes() for path in finished.rglob("*.csv")}
    monkeypatch.setattr(study, "_at_milestone", lambda *_: pytest.fail("measured again"))
    run_study(finished, ("s4",), 2, 1, TINY)
    assert {path: path.read_bytes() for path in finished.rglob("*.csv")} == before


def test_the_report_shows_every_figure_and_stands_alone(finished, monkeypatch):
    paths = write_report(finished, ("s4",), 2, TINY, "lmnfast paper --test")
    assert [path.name for path in paths] == ["report.html", "report.md", "results.csv"]
    text, page = (paths[1].read_text(), paths[0].read_text())
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert {f"figures/{path.name}" for path in (finished / "figures").iterdir()} == set(shown)
    assert page.count("data:image/png;base64,") == len(shown)
    assert not re.search(r'(src|href)="(?!data:|https://arxiv\.org)', page)
    assert "lmnfast paper --test" in text and f"torch {torch.__version__}" in text
    assert "**2 seeds**" in text and "(2 seeds: " in text and "ours (median)" in text
    assert not re.search(
        r"\*\*(holds|fails|undecided)\*\*|95 ?%\)|bootstrap|(within|outside) (\d+%|a factor)", text
    )
    with open(paths[2], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 + 2 * 2)  # seeds; hidden_1 at 3 steps, two layers at 2 milestones
    assert len({(row["task"], row["seed"], row["step"], row["layer"]) for row in rows}) == len(rows)
    assert not list(finished.rglob("*.part"))


def test_a_full_disk_is_one_error_and_the_study_goes_on_afterwards(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(study, "write_json", full)
    with pytest.raises(OSError, match="No space left on device"):
        run_study(tmp_path / "paper", ("s4",), 1, 1, TINY)
    monkeypatch.undo()
    monkeypatch.setattr(study, "do", lambda *_: None)
    run_study(tmp_path / "paper", ("s4",), 1, 1, TINY)


def test_a_damaged_run_is_named_once_the_others_are_done(tmp_path, monkeypatch):
    done = []
    (run_path(tmp_path, "s4", 0)).mkdir(parents=True)
    (run_path(tmp_path, "s4", 0) / "config.json").write_text("{")
    (tmp_path / "study.json").write_text('{"steps": 20}')
    monkeypatch.setattr(study, "_check_continues", lambda *_: None)
    real = study.do

    def do(out, what, task, seed):
        if seed == 0:
            real(out, what, task, seed)
        done.append(seed)

    monkeypatch.setattr(study, "do", do)
    with pytest.raises(ValueError, match="s4-seed0"):
        run_study(tmp_path, ("s4",), 2, 1, TINY)
    assert done == [1]


def test_a_damaged_or_missing_checkpoint_is_named(finished, tmp_path):
    source = run_path(finished, "s4", 0)
    run = run_path(tmp_path, "s4", 0)
    (run / "checkpoints").mkdir(parents=True)
    whole = (source / "checkpoints/step_00000010.pt").read_bytes()
    (run / "checkpoints/step_00000010.pt").write_bytes(whole[: len(whole) // 2])
    _, model = start(Config("s4", device="cpu"))
    for step in (10, 20):
        with pytest.raises(ValueError, match=f"cannot read .*step_000000{step}.pt.*delete .*s4-seed0"):
            load_checkpoint(model, run, step)


@pytest.mark.parametrize(
    "text",
    [
        b"question,variant,step\nsamples,train,x\n",
        b"question,variant,step,layer,samples,value\nsamples,train,0,hidden_1,460,16",  # cut in its last number
        b"question,variant,step,layer,samples,value\nsamples,train,0,hidden_1\n",
        b"\xff\n",
        b"",
    ],
)
def test_a_damaged_table_of_answers_is_named(text, tmp_path):
    (tmp_path / "a.csv").write_bytes(text)
    with pytest.raises(ValueError, match=r"cannot read .*a\.csv; delete it"):
        study.read_answers(tmp_path / "a.csv")


# Stand-ins


PAGE = "".join(
    f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in ("SiLU", "ReLU", "Lobatto", "facts")
)


def test_the_page_of_the_stand_ins_has_their_values_and_nothing_is_measured_again(
    tmp_path, monkeypatch, capsys
):
    config = Config("modular-addition", p=5, steps=20, every=5, threads=1, device="cpu")
    runs = [train(replace(config, activation=name), tmp_path / name).path for name in ("silu", "relu")]
    page, values = tmp_path / "page.md", tmp_path / "values.csv"
    page.write_text(PAGE)
    arguments = [*map(str, runs), "--every=5", f"--page={page}", f"--values={values}"]
    stand_ins.main(arguments)
    table, text = values.read_bytes(), page.read_text()
    task, model = start(config)
    load_checkpoint(model, runs[0], 10)
    f, x = lmnfast.cut(model, "hidden_1", task.train_inputs)
    for row in csv.DictReader(table.decode().splitlines()):
        if (row["run"], row["step"], row["layer"]) == ("silu", "10", "hidden_1"):
            how = {"method": row["method"]}
            if row["method"].startswith("lobatto"):
                how = {"rule": "lobatto", "points": int(row["method"][-1])}
            assert float(row["value"]) == pytest.approx(lmnfast.lmn(f, x, **how).item(), rel=1e-6)
    assert "old" not in text and "| `hermite-midpoint` |" in text and "| `linear_regions` |" in text
    assert "SiLU: 1 runs, 5 checkpoints of each; ReLU: 1 runs, 5 checkpoints of each" in text
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(stand_ins, "_function", lambda method: pytest.fail("measured again"))
    stand_ins.main(arguments)
    assert values.read_bytes() == table and page.read_text() == text


# The command line


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["paper", *arguments]) == 2
    return capsys.readouterr().err


def test_two_studies_in_one_directory_are_refused(tmp_path, capsys):
    with claimed(tmp_path):
        assert "another process is at work" in refused(capsys, "--out", str(tmp_path))


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
def test_fewer_than_one_is_refused(option, tmp_path, capsys):
    assert f"{option[2:]}: expected at least 1, got 0" in refused(
        capsys, option, "0", "--out", str(tmp_path / "a")
    )
    assert not (tmp_path / "a").exists()


def test_an_unknown_task_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["paper", "--tasks", "mul"])
    assert "invalid choice: 'mul'" in capsys.readouterr().err


def test_another_study_or_anything_else_in_the_directory_is_refused(finished, tmp_path, capsys):
    said = refused(capsys, "--quick", "--tasks", "s4", "--out", str(finished))
    assert "holds another study: steps is 20 there, 1000 here" in said
    (tmp_path / "thesis.tex").touch()
    assert "holds thesis.tex" in refused(capsys, "--out", str(tmp_path))


def test_more_jobs_than_cores_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run_study", lambda *_, **__: None)
    monkeypatch.setattr("lmnfast.paper.report.write_report", lambda *_: [])
    assert cli.main(["paper", "--jobs", "9999", "--out", str(tmp_path)]) == 0
    assert "jobs: 9999 processes on" in capsys.readouterr().err
