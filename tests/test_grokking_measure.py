"""Measuring the checkpoints of a run again."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY

import lmnfast
from lmnfast.grokking import figures
from lmnfast.grokking import measure as measuring
from lmnfast.grokking.config import start
from lmnfast.grokking.measure import measure
from lmnfast.grokking.run import METRICS, load_checkpoint, read_run
from lmnfast.grokking.training import train
from lmnfast.runs.files import claimed


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"{",
        b'{"task": "s4", "colour": 1}',
        b'{"task": "s4", "seed": 1.5}',
        b'{"task": ["s4"]}',
        b'{"task": "modular-addition", "p": 1000000}',
        b"[]",
        b"[" * 100_000,
        b'{"task": "s\xff"}',
    ],
)
def test_what_is_not_a_run_is_named(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"):
        measure(tmp_path)


def test_a_run_that_has_measured_nothing_yet_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task": "s4"}))
    with pytest.raises(ValueError, match="has no metrics.csv yet"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no checkpoints"):
        measure(tmp_path)


def test_measuring_the_checkpoints_again_gives_the_runs_numbers(finished):
    path, _ = measure(finished.path)
    assert path.name == "measure-hidden_1-path-uniform21.csv"
    with open(path) as again, open(finished.path / "metrics.csv") as first:
        for row, known in zip(csv.DictReader(again), csv.DictReader(first), strict=True):
            assert row == {name: known[name] for name in row}


def test_checkpoints_can_be_measured_at_other_layers_nodes_and_steps(finished):
    path, rows = measure(finished.path, layers=["embedding", "hidden_2"], rule="lobatto", points=9, every=10)
    assert path.name == "measure-embedding+hidden_2-path-lobatto9.csv"
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert all(row["lmn_embedding"] > 2 and row["lmn_hidden_2"] == pytest.approx(1, abs=1e-3) for row in rows)
    with pytest.raises(ValueError, match="every"):
        measure(finished.path, every=0)


def test_the_name_of_a_table_is_no_longer_than_a_file_system_takes(finished):
    everything = [each.name for each in lmnfast.observables() if not each.own]
    most = {"until": "hidden_2_pre", "observables": everything}
    names = []
    for layers in (["embedding", "hidden_1_pre", "hidden_1"], ["embedding", "hidden_1"]):
        path, rows = measure(finished.path, every=20, layers=layers, **most)
        assert path.exists() and len(path.name) <= 204 and len(rows) == 2
        names.append(path.name)
    assert names[0] != names[1]


def test_checkpoints_can_be_measured_up_to_a_layer(finished):
    path, rows = measure(finished.path, layers=["embedding"], until="hidden_1", every=20)
    assert path.name == "measure-embedding-path-uniform21-until-hidden_1.csv"
    task, model = start(finished.config)
    load_checkpoint(model, finished.path, 20)
    tail, samples = lmnfast.cut(model, "embedding", task.train_inputs, until="hidden_1")
    assert rows[-1]["lmn_embedding"] == pytest.approx(float(lmnfast.lmn(tail, samples)), rel=1e-6)
    with pytest.raises(ValueError, match="until: 'embedding' runs before 'hidden_2'"):
        measure(finished.path, layers=["hidden_2"], until="embedding")


def test_a_table_that_has_more_steps_is_replaced_only_by_force(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    table, rows = measure(path)
    before = table.read_bytes()
    with pytest.raises(ValueError, match=r"run: .*uniform21.csv has 2 more steps .* 5 for one; move it away"):
        measure(path, every=10)
    assert table.read_bytes() == before and measure(path)[1] == rows
    assert len(measure(path, every=10, force=True)[1]) == 3
    assert measure(path)[1] == rows  # more steps than there are replace them without a word
    table.write_bytes(before[:-3])
    with pytest.raises(ValueError, match=r"run: cannot read .*uniform21.csv, .*; move it away, or --force"):
        measure(path)


def test_a_run_at_work_is_not_measured_and_a_file_that_is_no_checkpoint_is_named(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    with claimed(path), pytest.raises(ValueError, match="run: another process is at work in .*run"):
        measure(path)
    (path / "checkpoints/step_foo.pt").touch()
    with pytest.raises(
        ValueError, match="run: expected checkpoints named step_ and a number, got .*step_foo.pt"
    ):
        measure(path)


def test_fewer_samples_are_the_same_of_every_step_and_named_wherever_their_number_is(finished, tmp_path):
    run = train(replace(TINY, samples=8), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["samples"] == 8
    task, model = start(TINY)
    for row, known in zip(run.rows, finished.rows, strict=True):
        load_checkpoint(model, finished.path, row["step"])
        expected = lmnfast.lmn(*lmnfast.cut(model, "hidden_1", task.train_inputs[:8])).item()
        assert row["lmn_hidden_1"] == pytest.approx(expected, rel=1e-6) and row["samples"] == 8
        assert all(row[name] == known[name] for name in METRICS)
    path, rows = measure(finished.path, samples=8)
    assert path.name == "measure-hidden_1-path-uniform21-8samples.csv"
    assert [row["lmn_hidden_1"] for row in rows] == pytest.approx([row["lmn_hidden_1"] for row in run.rows])
    assert measure(tmp_path)[0].name == path.name
    assert figures.named(run.config) == "LMN (8 samples)" and figures.named(TINY) == "LMN"
    with pytest.raises(ValueError, match="samples is 8 there, None here"):
        train(TINY, tmp_path)


def test_a_long_measurement_is_announced_by_trials_of_few_samples(finished, monkeypatch, capsys):
    now, sizes = [0.0], []

    def connectivity(f, x, **settings):
        sizes.append(len(x))
        now[0] += 1e-3 * len(x) ** 2
        return torch.eye(len(x))

    def linear_mapping_number(L):
        now[0] += 1e-4 * len(L) ** 3
        return torch.ones(())

    monkeypatch.setattr(measuring, "TRIAL", 8)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measuring, "connectivity", connectivity)
    monkeypatch.setattr(measuring, "linear_mapping_number", linear_mapping_number)
    config = replace(TINY, p=31, layers=("hidden_1", "embedding"))
    task, model = start(config)
    seconds = 2 * (1e-3 * 768**2 + 1e-4 * 768**3)
    assert measuring.expected_seconds(model, task.train_inputs, config) == pytest.approx(seconds)
    assert max(sizes) <= 16 and now[0] < 3
    measuring.say_how_long(Path("run"), model, task.train_inputs, (config,), 5)
    assert capsys.readouterr().out == (
        "run: a measurement of 768 samples will take about 25 h, 5 of them about 127 h; --samples takes fewer samples\n"
    )
    measuring.say_how_long(Path("run"), model, task.train_inputs[:20], (config,), 5)
    assert capsys.readouterr().out == ""  # no 10 s


def test_several_methods_are_measured_side_by_side(finished):
    path, rows = measure(
        finished.path, layers=["hidden_1", "embedding"], method=["path", "jacobian"], every=10
    )
    assert path.name == "measure-hidden_1+embedding-path+jacobian-uniform21.csv"
    with open(path) as file:
        read = list(csv.DictReader(file))
    names = [
        f"lmn_{layer}_{method}" for method in ("path", "jacobian") for layer in ("hidden_1", "embedding")
    ]
    shares = [name.replace("lmn", kind) for kind in lmnfast.spectrum.SHARES for name in names]
    assert list(read[0]) == ["step", *names, *lmnfast.spectrum.SETTINGS, *shares]
    assert {row["method"] for row in read} == {"path+jacobian"}
    for method in ("path", "jacobian"):
        alone = measure(finished.path, method=method, every=10, force=True)[1]
        assert [row["lmn_hidden_1"] for row in alone] == [row[f"lmn_hidden_1_{method}"] for row in rows]
    for method in ([], ["path", "path"]):
        with pytest.raises(ValueError, match="method: expected some of path, hermite, .*, each once"):
            measure(finished.path, method=method)


@pytest.mark.parametrize("count", [None, 3])
def test_test_samples_are_measured_on_request(finished, count):
    table, rows = measure(finished.path, split="test", samples=count, every=10)
    assert table.name == f"measure-hidden_1-path-uniform21-test{'' if count is None else '-3samples'}.csv"
    task, model = start(finished.config)
    x = task.test_inputs[:count]
    assert len(x) == (count or len(task.test_inputs))
    for row in rows:
        load_checkpoint(model, finished.path, row["step"])
        assert row["samples"] == len(x)
        assert row["lmn_hidden_1"] == pytest.approx(
            lmnfast.lmn(*lmnfast.cut(model, "hidden_1", x)).item(), rel=1e-6
        )


def test_more_test_samples_than_there_are_or_another_split_are_refused(finished):
    there = len(start(finished.config)[0].test_inputs)
    with pytest.raises(
        ValueError, match=f"^samples: expected 2 to {there}, all of this split, got {there + 1}$"
    ):
        measure(finished.path, split="test", samples=there + 1)
    with pytest.raises(ValueError, match="^split: expected one of train, test, got 'valid'$"):
        measure(finished.path, split="valid")
