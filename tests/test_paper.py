"""The study of the paper: its runs, its statistics, its report."""

import csv
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fresh import CONTEXT

import lmnfast
from lmnfast import _commands, cli
from lmnfast.grokking import training
from lmnfast.grokking.config import Config, start
from lmnfast.grokking.run import load_checkpoint
from lmnfast.grokking.training import train
from lmnfast.paper import answers, claims, stand_ins, study
from lmnfast.paper.report import write_report
from lmnfast.paper.settings import OBSERVABLES, Study
from lmnfast.paper.study import read_study, run_path, run_study
from lmnfast.runs.files import claimed

TINY = Study(steps=20, every=10, asked=1, milestones=(0, 20), few=(20,), relu_steps=10, relu_every=10)


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


# The study


def test_a_killed_worker_is_replaced_and_nothing_is_missing(finished):
    seeds = read_study(finished, ("s4",), 2, TINY)["s4"]
    for number, seed in enumerate(seeds):
        assert seed.run.config.seed == number
        assert [row["step"] for row in seed.run.rows] == [0, 10, 20]
        assert (seed.run.config.rule, seed.run.config.points, seed.run.config.loss_dtype) == (
            "lobatto",
            9,
            "float64",
        )
        assert sorted(seed.answer("start", "stabilised: LMN")) == [0]
        asked = number == 0  # most questions are asked of the first seeds alone
        assert (seed.relu.config.activation == "relu") if asked else seed.relu is None
        assert sorted(seed.answer("samples", "train")) == ([0, 20] if asked else [])


def tail_of(finished: Path, step: int):
    """The task, the model and the cut of seed 0 at a step."""
    seed = read_study(finished, ("s4",), 1, TINY)["s4"][0]
    task, model = start(seed.run.config)
    file = finished / f"runs/s4-seed0/checkpoints/step_{step:08}.pt"
    model.load_state_dict(torch.load(file, weights_only=True))
    return seed, task, model, *lmnfast.cut(model, "hidden_1", task.train_inputs)


def test_answers_are_what_the_public_functions_give(finished):
    seed, task, model, f, x = tail_of(finished, 20)
    lobatto = {"rule": "lobatto", "points": 9}
    for layer in ("embedding", "hidden_2"):
        expected = lmnfast.lmn(*lmnfast.cut(model, layer, task.train_inputs), **lobatto).item()
        assert seed.lmn(layer)[20] == pytest.approx(expected, rel=1e-6)
    expected = lmnfast.lmn(*lmnfast.cut(model, "hidden_2", task.train_inputs), stabiliser=8e-8).item()
    assert seed.answer("layers", "stabilised")[20] == pytest.approx(expected, rel=1e-6)
    w = lmnfast.eigenvalues(lmnfast.connectivity(f, x))
    p = w.clamp(min=0) / w.clamp(min=0).sum()
    entropy = -(p * p.clamp(min=1e-300).log2()).sum()
    assert seed.answer("samples", "train")[20] == pytest.approx(lmnfast.lmn(f, x).item(), rel=1e-6)
    assert seed.run.rows[-1]["lmn_hidden_1"] == pytest.approx(lmnfast.lmn(f, x, **lobatto).item(), rel=1e-6)
    assert seed.answer("negative", "clipped")[20] == pytest.approx(2 ** entropy.item(), rel=1e-6)
    share = (-w[w < 0].sum() / w.abs().sum()).item()
    assert seed.answer("negative", "share")[20] == pytest.approx(share, rel=1e-6)
    expected = lmnfast.lmn(f, x, method="hermite").item()
    assert seed.answer("stand-ins", "hermite")[20] == pytest.approx(expected, rel=1e-6)
    expected = lmnfast.lmn(f, x, points=11).item()
    assert seed.answer("nodes", "uniform 11")[20] == pytest.approx(expected, rel=1e-6)
    _, test_samples = lmnfast.cut(model, "hidden_1", task.test_inputs)
    expected = lmnfast.lmn(f, test_samples, **lobatto).item()
    assert seed.answer("samples", "test")[20] == pytest.approx(expected, rel=1e-6)
    sizes = seed.of_sizes(20)
    assert sorted(sizes) == [100, 200, 300, 400, 500, 576]
    assert sizes[576] == pytest.approx(
        seed.answer("samples", "both")[20], rel=1e-6
    )  # another order of the same


def test_observables_are_measured_at_each_logging_step(finished):
    seed, *_, f, x = tail_of(finished, 20)
    m = lmnfast.measure(f, x, rule="lobatto", points=9, observables=OBSERVABLES)
    for name, value in m.observables.items():
        assert seed.run.rows[-1][f"{name}_hidden_1"] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("how, stabiliser", [("exact", 0.0), ("stabilised", 8e-8)])
def test_step_0_is_measured_with_and_without_the_stabiliser(finished, how, stabiliser):
    seed, *_, f, x = tail_of(finished, 0)
    L = lmnfast.connectivity(f, x, stabiliser=stabiliser).double()
    w = torch.linalg.eigvalsh(L).flip(0)
    off = L[~torch.eye(len(L), dtype=torch.bool)]
    expected = {
        "LMN": lmnfast.linear_mapping_number(L).item(),
        "mean": off.mean().item(),
        "standard deviation": ((off - off.mean()) ** 2).mean().sqrt().item(),
        "second eigenvalue": w[1].item(),
        "first negative": next(k for k, value in enumerate(w.tolist()) if value < 0),
    }
    for variant, value in expected.items():
        assert claims.at_start(seed, f"{how}: {variant}") == pytest.approx(value, rel=1e-5), variant


def test_lmn_falls_with_the_number_of_outputs_and_curvature_does_not(finished):
    seed = tail_of(finished, 0)[0]
    lmns, curvatures = (
        [seed.answer("outputs", f"{name}, {k}")[0] for k in (1, 5, 31, 310)] for name in ("LMN", "curvature")
    )
    assert all(more > 1.5 * fewer for more, fewer in pairwise(lmns))
    assert max(curvatures) < 2.5 * min(curvatures)
    rows = [row for row in seed.answers if row["question"] == "outputs" and row["variant"].startswith("LMN")]
    assert [(row["samples"], row["outputs"]) for row in rows] == [(460, k) for k in (1, 5, 31, 310)]


def test_what_is_there_is_not_made_again(finished, monkeypatch):
    before = {path: path.read_bytes() for path in finished.rglob("*.csv")}
    for name in ("_at_milestone", "_at_start", "_of_outputs", "linear_regions"):
        monkeypatch.setattr(answers, name, lambda *_: pytest.fail("measured again"))
    run_study(finished, ("s4",), 2, 1, TINY)
    assert {path: path.read_bytes() for path in finished.rglob("*.csv")} == before


def test_one_process_with_a_card_trains_all_seeds_of_a_task_together(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "settled_device", lambda device: "cuda")  # the runs themselves stay on the CPU
    monkeypatch.setattr(training._Training, "_update", lambda *_: pytest.fail("trained alone"))
    run_study(tmp_path, ("s4",), 2, 1, TINY)
    for seed, known in zip(
        *(read_study(out, ("s4",), 2, TINY)["s4"] for out in (tmp_path, finished)), strict=True
    ):
        for run, own in ((seed.run, known.run), (seed.relu, known.relu)):
            assert (run is None) == (own is None)
            for row, same in zip(run.rows, own.rows, strict=True) if run else ():
                assert row == {
                    name: pytest.approx(value, rel=1e-4, abs=1e-9) if isinstance(value, float) else value
                    for name, value in same.items()
                }
        assert [row["question"] for row in seed.answers] == [row["question"] for row in known.answers]


def test_a_damaged_run_is_named_where_seeds_train_together(finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "paper")
    (run_path(out, "s4", 1) / "metrics.csv").write_text("step\n")
    shutil.rmtree(run_path(out, "s4", 0))
    monkeypatch.setattr(study, "settled_device", lambda device: "cuda")
    with pytest.raises(ValueError, match="s4-seed1.*delete .*s4-seed1"):
        run_study(out, ("s4",), 2, 1, TINY)
    assert run_path(out, "s4", 0).exists()


def test_the_report_shows_every_figure_and_stands_alone(finished, monkeypatch):
    paths = write_report(finished, ("s4",), 2, TINY, "lmnfast paper --test")
    assert [path.name for path in paths] == ["report.html", "report.md", "results.csv"]
    text, page = (paths[1].read_text(), paths[0].read_text())
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert {f"figures/{path.name}" for path in (finished / "figures").iterdir()} == set(shown)
    assert page.count("data:image/png;base64,") == len(shown)
    assert not re.search(r'(src|href)="(?!data:|#|https://arxiv\.org)', page)
    assert "lmnfast paper --test" in text and f"torch {torch.__version__}" in text
    assert "**2 seeds**" in text and "(2 seeds: " in text and "ours (median)" in text
    assert not re.search(
        r"\*\*(holds|fails|undecided)\*\*|95 ?%\)|bootstrap|(within|outside) (\d+%|a factor)", text
    )
    with open(paths[2], newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        len(rows) == 2 * 3 + 2 * 2
    )  # hidden_1 of two seeds at 3 steps, two layers of one seed at 2 milestones
    assert all(float(row["curvature"]) > 0 for row in rows if row["layer"] == "hidden_1")
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
        answers.read_answers(tmp_path / "a.csv")


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
    assert "holds another study: steps is 20 there, 4000 here" in said
    (tmp_path / "old").mkdir()
    (tmp_path / "old/study.json").write_text('{"steps": 20000, "every": 100, "init_steps": 1000}')
    said = refused(capsys, "--out", str(tmp_path / "old"))
    assert "holds a study of another version of lmnfast, with other settings (asked, few, init_steps" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    assert "holds thesis.tex" in refused(capsys, "--out", str(tmp_path / "mine"))


def test_more_jobs_than_cores_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_commands, "run_study", lambda *_, **__: None)
    monkeypatch.setattr("lmnfast.paper.report.write_report", lambda *_: [])
    assert cli.main(["paper", "--jobs", "9999", "--out", str(tmp_path)]) == 0
    assert "jobs: 9999 processes on" in capsys.readouterr().err
