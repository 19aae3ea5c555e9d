"""The files of a run: killed, continued, damaged, begun anew."""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh import start_fresh
from support import Killed, killed_at
from tiny import TINY

from lmnfast._files import part_name
from lmnfast.grokking import training
from lmnfast.grokking.figures import draw
from lmnfast.grokking.measure import measure
from lmnfast.grokking.run import read_run
from lmnfast.grokking.training import train
from lmnfast.runs import files as run_files
from lmnfast.runs import tables
from lmnfast.runs.files import claimed, read_tensors, save_tensors


def files(path):
    return {file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_run_killed_before_or_within_any_write_ends_as_one_never_stopped(finished, tmp_path, monkeypatch):
    fatal, survived = 0, False
    while not survived:
        fatal += 1
        path, write = tmp_path / f"killed-{fatal}", killed_at(fatal)
        with monkeypatch.context() as patched:
            for place in (run_files, tables):
                patched.setattr(place, "write_file", write)
            try:
                train(TINY, path)
                survived = True
            except Killed:
                pass
        assert train(TINY, path).rows == finished.rows
        assert (path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()
        assert not list(path.rglob("*.part"))
    assert fatal > 8  # config, five checkpoints, metrics and state at least once


@pytest.mark.parametrize("more", [{}, {"batch": 7}], ids=["all samples", "batches"])
def test_a_run_ended_by_sigkill_continues_to_the_same_bytes(more, tmp_path):
    config = replace(TINY, steps=1000, every=50, **more)
    script = tmp_path / "command.py"
    script.write_text("from lmnfast.cli import main; main()")
    for attempt in range(10):  # on a busy machine a run may end before the signal comes
        path = tmp_path / f"killed-{attempt}"
        options = ["--p=5", "--steps=1000", "--every=50", "--threads=1", "--device=cpu", f"--out={path}"]
        options += [f"--{name}={value}" for name, value in more.items()]
        process = start_fresh(script, tmp_path, "grok", "modular-addition", *options)
        while not (path / "state.pt").exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(int.from_bytes(os.urandom(1), "big") / 2000)  # up to 0.13 s: anywhere in most of the run
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL and read_run(path).rows[-1]["step"] < 1000:
            break
    assert torch.load(path / "state.pt", weights_only=True)["step"] < 1000
    train(config, path)
    train(config, tmp_path / "never")
    assert (path / "metrics.csv").read_bytes() == (tmp_path / "never" / "metrics.csv").read_bytes()


def test_a_finished_run_is_left_as_it_is_and_more_steps_continue_it(finished, tmp_path, capsys):
    path = tmp_path / "run"
    train(replace(TINY, steps=10), path)
    before = files(path)
    train(replace(TINY, steps=10), path, progress=True)
    assert "finished at step 10" in capsys.readouterr().out
    assert files(path) == before
    train(TINY, path)
    assert (path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()


def test_left_open_threads_and_device_are_those_the_run_was_started_with(tmp_path):
    threads = 1 if torch.get_num_threads() > 1 else 2
    train(replace(TINY, steps=5, threads=threads), tmp_path)
    assert train(replace(TINY, threads=None, device="auto"), tmp_path).config == replace(
        TINY, threads=threads
    )


def test_another_config_is_refused_by_its_differences_and_force_starts_anew(finished, tmp_path):
    path = tmp_path / "run"
    train(replace(TINY, seed=3, steps=25), path)
    measure(path)
    before = files(path)
    with pytest.raises(ValueError, match=r"steps is 25 there, 20 here; seed is 3 there, 0 here; .*--force"):
        train(TINY, path)
    assert files(path) == before
    train(TINY, path, force=True)
    assert (path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()
    assert not list(path.glob("measure-*")) and not (path / "checkpoints/step_00000025.pt").exists()


def test_force_deletes_only_files_that_a_run_writes(tmp_path):
    path = tmp_path / "run"
    train(replace(TINY, steps=25, seed=1), path)
    draw(path)
    for name in ("state.pt", "config.json", "checkpoints/step_00000005.pt"):
        (path / part_name(name, os.getppid())).touch()
    mine = [
        "notes.txt",
        "measure-mine.csv",
        "checkpoints/mine.pt",
        "checkpoints/step_best.pt",
        "figures/figure2-mine.png",
    ]
    for name in mine:
        (path / name).write_text("mine")
    (path / "checkpoints" / "more").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (path / "figures/figure2-hidden_2.png").symlink_to(elsewhere)
    train(TINY, path, force=True)
    assert all((path / name).read_text() == "mine" for name in mine) and (path / "checkpoints/more").is_dir()
    assert elsewhere.read_text() == "mine"
    steps = [f"checkpoints/step_{step:08}.pt" for step in range(0, 21, 5)]
    left = {".lock", "config.json", "metrics.csv", "state.pt", *steps}
    assert {str(name) for name in files(path)} == {*mine, *left}


@pytest.mark.parametrize(
    "config", [None, "{}", '{"task": "translation", "steps": 3, "every": 1, "seed": 0}', "[]", "model: x"]
)
def test_force_refuses_a_directory_that_is_no_run(config, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_00000001.pt").write_text("mine")
    if config:
        (tmp_path / "config.json").write_text(config)
    before = files(tmp_path)
    with pytest.raises(
        ValueError, match="out: .* no run; choose another|no run's, and --force deletes runs alone"
    ):
        train(TINY, tmp_path, force=True)
    assert {**files(tmp_path), Path(".lock"): b""} == {**before, Path(".lock"): b""}


def test_force_follows_no_link_out_of_the_run(tmp_path):
    path, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(replace(TINY, steps=5), path)
    (path / "checkpoints").rename(elsewhere)
    (path / "checkpoints").symlink_to(elsewhere)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="checkpoints is a symbolic link, which --force does not follow"):
        train(TINY, path, force=True)
    assert files(tmp_path) == before


def test_a_run_whose_directory_is_deleted_ends_and_leaves_none(tmp_path, monkeypatch):
    evaluate, path = training._evaluate, tmp_path / "run"

    def deleted(*arguments):
        if len(list(path.glob("checkpoints/*"))) == 2:
            shutil.rmtree(path)
        return evaluate(*arguments)

    monkeypatch.setattr(training, "_evaluate", deleted)
    with pytest.raises(FileNotFoundError, match="out: .*run was deleted while the run was at work"):
        train(TINY, path)
    assert not path.exists()


def test_a_directory_with_parts_of_a_run_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("mine")
    with pytest.raises(ValueError, match="holds metrics.csv but no config.json"):
        train(TINY, tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "mine"
    path = tmp_path / "run"
    train(replace(TINY, steps=5), path)
    (path / "metrics.csv").unlink()
    with pytest.raises(ValueError, match="lacks rows that it had"):
        train(TINY, path)


@pytest.mark.parametrize("name", ["state.pt", "metrics.csv"])
def test_a_damaged_run_is_refused_and_left_as_it_is(name, finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    damaged = tmp_path / "run" / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    before = damaged.read_bytes()
    with pytest.raises(ValueError, match=f"^out: .*{name}.*--force starts the run anew"):
        train(replace(TINY, steps=25), tmp_path / "run")
    assert damaged.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-3],  # within the last word
        lambda text: text[:-1],
        lambda text: text[: text.rindex(b"\n", 0, -1) + 1],  # a row less
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"lmn_hidden_1", b"lmn_hidden_2"),
        lambda text: text.replace(b"\n5,", b"\n6,"),
        lambda text: text.replace(b",path,", b",pbth,", 1),
        lambda text: text.replace(b",21,", b",,", 1),
        lambda text: text.replace(b"\n10,", b"\n10,nan,", 1),
        lambda text: b"\xff" + text,
        lambda text: b"",
    ],
)
def test_a_damaged_table_of_metrics_is_named_and_not_gone_on_with(damage, finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    (path / "metrics.csv").write_bytes(damage((path / "metrics.csv").read_bytes()))
    with pytest.raises(ValueError, match=r"^run: .*metrics\.csv"):
        read_run(path)
    with pytest.raises(ValueError, match=r"^out: .*metrics\.csv.*; --force starts the run anew"):
        train(replace(TINY, steps=25), path)


def test_any_changed_byte_of_a_file_of_tensors_is_noticed(tmp_path):
    path, content = tmp_path / "tensors.pt", {"step": 5, "weights": torch.arange(40.0)}
    save_tensors(path, content)
    for read in (read_tensors(path), torch.load(path, weights_only=True)):
        assert read["step"] == 5 and torch.equal(read["weights"], content["weights"])
    whole = path.read_bytes()
    for position in {*range(0, len(whole), 5), *range(len(whole) - 200, len(whole))}:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"cannot read .*tensors.pt, .*checksum"):
            read_tensors(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="checksum"):
        read_tensors(path)
    torch.save(content, path)  # without a checksum of the whole file
    assert torch.equal(read_tensors(path)["weights"], content["weights"])
    whole = path.read_bytes()
    position = whole.index(content["weights"].numpy().tobytes()) + 70
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
    with pytest.raises(ValueError, match="the checksum of .*data/0 is wrong"):
        read_tensors(path)


def changed(file, position=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 0x40
    file.write_bytes(content)


def test_a_changed_byte_of_a_checkpoint_or_a_state_stops_what_would_use_it(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    changed(path / "checkpoints/step_00000010.pt")
    with pytest.raises(
        ValueError, match=r"run: cannot read .*step_00000010.pt, .*checksum.*delete .*run to run it"
    ):
        measure(path)
    changed(path / "state.pt")
    with pytest.raises(
        ValueError, match=r"out: cannot read .*state.pt, .*checksum.*--force starts the run anew"
    ):
        train(replace(TINY, steps=25), path)
    with pytest.raises(ValueError, match=r"run: cannot read .*state.pt, .*checksum"):
        read_run(path)


@pytest.mark.parametrize(
    "change", [{"step": 10.0}, {"step": 7}, {"seconds": None}, {"seconds": {"training": 1.0}}, {"model": {}}]
)
def test_a_state_that_no_run_writes_is_named(change, finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    state = read_tensors(path / "state.pt")
    save_tensors(path / "state.pt", {**state, **change})
    with pytest.raises(ValueError, match=r"^out: cannot read .*state\.pt, .*; --force starts the run anew"):
        train(replace(TINY, steps=25), path)


def test_a_directory_at_work_is_refused(tmp_path):
    with claimed(tmp_path), pytest.raises(ValueError, match="out: another process is at work"):
        train(TINY, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_directory_that_cannot_be_written_is_one_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_Training", None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="out: cannot write to .*file/run: Not a directory"):
        train(TINY, tmp_path / "file" / "run")


def test_tensors_come_in_one_copy_as_they_were():
    tensors = [
        torch.randn(3, 5).T,
        torch.tensor(7),
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.zeros(0, 4),
        torch.randn(3).bfloat16(),
        torch.nn.Parameter(torch.randn(2, 2)),
    ]
    copies = training.unpacked(training.packed(tensors), tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor) and not copy.requires_grad
        assert copy.untyped_storage().nbytes() == tensor.nbytes  # what torch.save would write


def test_a_copy_for_later_does_not_change_with_what_was_copied():
    content = {"step": 3, "model": {"weight": torch.ones(2)}, "groups": [{"lr": 0.1, "betas": (0.9, 0.98)}]}
    copy = training.HostCopy(content)
    content["model"]["weight"].mul_(2)
    content["groups"][0]["lr"] = 0.2
    read = copy.read()
    assert read["model"]["weight"].tolist() == [1, 1] and read["groups"] == [
        {"lr": 0.1, "betas": (0.9, 0.98)}
    ]
