"""The stabiliser wherever measurements are made and kept; tables and states of versions that had none."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpointed import LAYERS, command, failure, table
from logged import read
from tiny import TINY

import lmnfast
from lmnfast import Probe, cli
from lmnfast.checkpoints import measure as measuring
from lmnfast.checkpoints import measure_checkpoints
from lmnfast.cutting import cut
from lmnfast.grokking import Config, read_run, train
from lmnfast.grokking.config import start
from lmnfast.grokking.measure import measure
from lmnfast.grokking.run import METRICS, load_checkpoint
from lmnfast.integrations import CSVWriter
from lmnfast.integrations.common import Plan, kept_state, new_state
from lmnfast.runs.tables import read_table, write_table
from lmnfast.spectrum import SETTINGS

S = 1e-3
LONG = 1 / 30_000  # has more digits than the numbers of a table
STABILISED = replace(TINY, stabiliser=LONG)
WITH_JACOBIAN = "stabiliser: expected a method with paths, got 0.001 with method 'jacobian'"


def without_the_column(path: Path) -> None:
    """Turns a table into one of a version without the column."""
    head, *lines = csv.reader(io.StringIO(path.read_text()))
    place = head.index("stabiliser")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([*line[:place], *line[place + 1 :]] for line in (head, *lines))
    path.write_text(text.getvalue())


def without_the_setting(path: Path) -> None:
    settings = json.loads(path.read_text())
    del settings["stabiliser"]
    path.write_text(json.dumps(settings))


# A probe


def test_a_probes_number_is_that_of_its_stabiliser(model, x):
    with Probe(model, x, ["inputs", "first"], stabiliser=S, observables=("lmn", "pooled_curvature")) as probe:
        probe(0)
    for row in probe.history:
        f, samples = cut(model, row["layer"], x)
        m = lmnfast.measure(f, samples, stabiliser=S, observables="pooled_curvature")
        assert row["lmn"] == m.lmn == lmnfast.lmn(f, samples, stabiliser=S).item()
        assert row["lmn"] > 1.01 * lmnfast.lmn(f, samples).item()
        assert row["pooled_curvature"] == m.observables["pooled_curvature"]
        assert row["stabiliser"] == S and list(row)[3 + len(SETTINGS)] == "stabiliser"


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"stabiliser": -1e-9}, ValueError, "stabiliser: expected a number of at least 0, got -1e-09"),
        ({"stabiliser": float("inf")}, ValueError, "stabiliser: expected a number of at least 0, got inf"),
        ({"stabiliser": float("nan")}, ValueError, "stabiliser: expected a number of at least 0, got nan"),
        ({"stabiliser": "8e-8"}, TypeError, "stabiliser: expected a number of at least 0, got '8e-8'"),
        ({"stabiliser": True}, TypeError, "stabiliser: expected a number of at least 0, got True"),
        ({"stabiliser": S, "method": "jacobian"}, ValueError, WITH_JACOBIAN),
    ],
)
def test_a_stabiliser_that_no_row_can_have_is_refused_before_any_work(settings, error, message, model, x):
    for made in (lambda: Probe(model, x, "first", **settings), lambda: Plan(x, "first", 1, settings)):
        with pytest.raises(error) as caught:
            made()
        assert str(caught.value) == message
    with pytest.raises(error) as caught:
        measure_checkpoints("no_such_module:make", "no_such_file.pt", "no_such_file.npy", "1", **settings)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="^stabiliser: expected a"):
        Config("xor", **settings)


def earlier(state):
    """A state of a version without the column."""
    rows = [{name: value for name, value in row.items() if name != "stabiliser"} for row in state["rows"]]
    return {**state, "rows": rows}


def test_a_probe_goes_on_from_a_state_of_an_earlier_version(model, x):
    with Probe(model, x, "first", every=1) as probe:
        probe(0, loss=0.5)
        state = earlier(probe.state_dict())
        whole = probe.history
    with Probe(model, x, "first", every=1, stabiliser=S) as probe:
        probe.load_state_dict(state)
        assert probe.history == whole and list(probe.history[0]) == list(whole[0])
        probe(1)
    assert [(row["step"], row["stabiliser"]) for row in probe.history] == [(0, 0.0), (1, S)]


def test_a_csv_file_of_an_earlier_version_is_gone_on_with_without_a_row_twice(model, x, tmp_path):
    path = tmp_path / "lmn.csv"

    def write(resume, steps, stabiliser=0.0):
        with Probe(
            model, x, "first", every=1, stabiliser=stabiliser, writers=[CSVWriter(path, resume=resume)]
        ) as probe:
            for step in steps:
                probe(step)

    write(False, (0, 1))
    without_the_column(path)
    write(True, (1, 2))
    rows = read(path)
    assert [(row["step"], row["stabiliser"]) for row in rows] == [("0", "0.0"), ("1", "0.0"), ("2", "0.0")]
    without_the_column(path)
    write(True, (2,), S)
    assert read(path)[:3] == rows
    assert [(row["step"], row["stabiliser"]) for row in read(path)[3:]] == [("2", "0.001")]


def test_a_plan_knows_its_rows_by_the_stabiliser_and_those_of_earlier_versions(model, x):
    names = "layers, until, blocks, method, points, rule, forward, output, batch_dim, negative, inputs"
    plain, zero, other = (Plan(x, "first", 1, how) for how in ({}, {"stabiliser": 0}, {"stabiliser": 1}))
    assert ", ".join(plain.identity) == names and zero.identity == plain.identity
    assert other.identity == plain.identity | {"stabiliser": 1.0}
    with other.probe(model, lambda tensor: tensor, 0, new_state(), lambda step, values: None) as probe:
        probe(0)
    expected = lmnfast.lmn(*cut(model, "first", x), stabiliser=1.0).item()
    assert (probe.history[0]["lmn"], probe.history[0]["stabiliser"]) == (expected, 1.0)
    state = {"step": 0, "rows": probe.history}
    assert kept_state(state) == state
    assert kept_state(earlier(state)) == {"step": 0, "rows": [probe.history[0] | {"stabiliser": 0.0}]}


# Tables


def test_a_table_of_an_earlier_version_is_read_with_stabiliser_0(tmp_path):
    path, columns = tmp_path / "a.csv", ("step", "lmn_a", "negative", "stabiliser", "constant_share_a")
    row = {"step": 0, "lmn_a": 0.5, "negative": "clip", "stabiliser": LONG, "constant_share_a": 0.0}
    write_table(path, columns, [row])
    assert read_table(path, columns) == [row]
    without_the_column(path)
    for asked in (columns, None):
        (found,) = read_table(path, asked)
        assert found == row | {"stabiliser": 0.0} and list(found) == list(columns)
    (found,) = read_table(path, [name for name in columns if name != "stabiliser"])
    assert "stabiliser" not in found
    with pytest.raises(ValueError, match="lacks the columns lmn_b, "):
        read_table(path, ("step", "lmn_b", *columns[2:]))
    with pytest.raises(ValueError, match="expected the columns lmn_a, step, "):
        read_table(path, ("lmn_a", "step", *columns[2:]))
    write_table(path, columns, [row | {"negative": "", "stabiliser": ""}])  # a row that is no measurement
    without_the_column(path)
    (found,) = read_table(path, columns, optional=("negative", "stabiliser"))
    assert found["stabiliser"] == ""


# Checkpoints


def test_checkpoints_are_measured_with_a_stabiliser_that_their_table_has(trained, capsys):
    import nets

    assert cli.main(command("--stabiliser=0.5")) == 0
    assert json.loads(Path("lmn/lmn.json").read_text())["stabiliser"] == 0.5
    x = torch.from_numpy(np.load("x.npy")).float()
    plain = measure_checkpoints(nets.make, "step_*.pt", x, LAYERS)
    for row, without in zip(table(), plain, strict=True):
        assert (row["stabiliser"], without["stabiliser"]) == ("0.5", 0.0)
        for layer in LAYERS:
            model = nets.make()
            model.load_state_dict(trained[int(row["step"])])
            expected = lmnfast.lmn(*cut(model, layer, x), stabiliser=0.5).item()
            assert float(row[f"lmn_{layer}"]) == pytest.approx(expected, rel=1e-6)
            assert expected > 1.001 * without[f"lmn_{layer}"]


def test_a_table_of_checkpoints_is_gone_on_with_by_its_stabiliser_alone(trained, capsys, monkeypatch):
    whole = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn", stabiliser=LONG)
    said = failure(capsys, command())
    assert f"a table with other settings: stabiliser is {LONG} there, 0.0 here; choose another --out" in said
    with monkeypatch.context() as context:
        context.setattr(measuring, "_measured", None)
        assert cli.main(command(f"--stabiliser={LONG}")) == 0
        again = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn", stabiliser=LONG)
    assert again == whole and {row["stabiliser"] for row in whole} == {LONG}
    without_the_column(Path("lmn/lmn.csv"))  # it is not of this stabiliser
    assert "cannot read lmn/lmn.csv: a row is not of this table" in failure(
        capsys, command(f"--stabiliser={LONG}")
    )


def test_a_table_of_checkpoints_of_an_earlier_version_is_gone_on_with(trained, capsys):
    whole = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="whole")
    Path("step_100.pt").rename("later.pt")
    measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn")
    Path("later.pt").rename("step_100.pt")
    without_the_setting(Path("lmn/lmn.json"))
    without_the_column(Path("lmn/lmn.csv"))
    assert "stabiliser is 0.0 there, 0.5 here" in failure(capsys, command("--stabiliser=0.5"))
    assert measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn") == whole
    assert Path("lmn/lmn.csv").read_bytes() == Path("whole/lmn.csv").read_bytes()
    assert json.loads(Path("lmn/lmn.json").read_text())["stabiliser"] == 0.0


# Runs of the paper's training


@pytest.fixture(scope="module")
def stabilised(tmp_path_factory):
    """A run with a stabiliser. Tests only read it."""
    return train(STABILISED, tmp_path_factory.mktemp("runs") / "stabilised")


def test_a_runs_numbers_are_those_of_its_stabiliser(stabilised, finished):
    assert json.loads((stabilised.path / "config.json").read_text())["stabiliser"] == LONG
    task, model = start(STABILISED)
    for row, plain in zip(stabilised.rows, finished.rows, strict=True):
        load_checkpoint(model, stabilised.path, row["step"])
        f, x = cut(model, "hidden_1", task.train_inputs)
        assert row["lmn_hidden_1"] == pytest.approx(lmnfast.lmn(f, x, stabiliser=LONG).item(), rel=1e-6)
        assert abs(row["lmn_hidden_1"] - plain["lmn_hidden_1"]) > 1e-5
        assert (row["stabiliser"], plain["stabiliser"]) == (LONG, 0.0)
        assert all(row[name] == plain[name] for name in METRICS), "the training is the same"


def test_a_run_is_gone_on_with_by_its_stabiliser_alone(stabilised, tmp_path):
    train(replace(STABILISED, steps=10), tmp_path)
    with pytest.raises(ValueError, match=f"another run: stabiliser is {LONG} there, 0.0 here"):
        train(TINY, tmp_path)
    train(STABILISED, tmp_path)
    assert (tmp_path / "metrics.csv").read_bytes() == (stabilised.path / "metrics.csv").read_bytes()
    without_the_column(tmp_path / "metrics.csv")
    with pytest.raises(ValueError, match="metrics.csv: row 1 is not one of this run"):
        read_run(tmp_path)


def test_a_run_of_an_earlier_version_has_stabiliser_0_and_is_gone_on_with(finished, tmp_path):
    train(replace(TINY, steps=10), tmp_path)
    without_the_setting(tmp_path / "config.json")
    without_the_column(tmp_path / "metrics.csv")
    run = read_run(tmp_path)
    assert run.config == replace(TINY, steps=10) and run.rows == finished.rows[:3]
    with pytest.raises(ValueError, match=f"stabiliser is 0.0 there, {LONG} here"):
        train(STABILISED, tmp_path)
    assert train(TINY, tmp_path).rows == finished.rows
    assert (tmp_path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["stabiliser"] == 0.0


def test_a_run_measured_again_names_another_stabiliser(stabilised, tmp_path):
    train(TINY, tmp_path)
    path, plain = measure(tmp_path)
    assert path.name == "measure-hidden_1-path-uniform21.csv"
    without_the_column(path)
    assert measure(tmp_path)[1] == plain, "the table of an earlier version is replaced"
    path, rows = measure(tmp_path, stabiliser=LONG)
    assert path.name == f"measure-hidden_1-path-uniform21-stabiliser{LONG}.csv"
    assert [row["lmn_hidden_1"] for row in rows] == pytest.approx(
        [row["lmn_hidden_1"] for row in stabilised.rows], rel=1e-6
    )
    assert {row["stabiliser"] for row in read(path)} == {str(LONG)}
    assert measure(stabilised.path, every=20)[0].name == path.name
    assert measure(stabilised.path, every=20, stabiliser=0)[1][0]["lmn_hidden_1"] == plain[0]["lmn_hidden_1"]
    path, _ = measure(tmp_path, stabiliser=8e-8, negative="clip", samples=9, observables="curvature")
    assert path.name == "measure-hidden_1-path-uniform21-9samples-clip-stabiliser8e-08-and-curvature.csv"
    train(TINY, tmp_path, force=True)
    assert not list(tmp_path.glob("measure*"))


def test_the_command_line_takes_a_stabiliser(tmp_path, capsys):
    run = tmp_path / "run"
    grok = ["grok", "modular-addition", "--p=5", "--steps=2", "--every=1", f"--out={run}"]
    assert cli.main([*grok, "--stabiliser=0.001"]) == 0
    assert "path, 21 uniform points, stabiliser 0.001)" in capsys.readouterr().out
    assert {row["stabiliser"] for row in read_run(run).rows} == {S}
    assert cli.main(["measure", str(run), "--stabiliser=8e-8"]) == 0
    assert (run / "measure-hidden_1-path-uniform21-stabiliser8e-08.csv").exists()
    assert "stabiliser is 0.001 there, 0.0 here" in failure(capsys, grok)
    for name in ("grok", "measure", "checkpoints"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert "--stabiliser NUMBER" in capsys.readouterr().out


def test_jacobians_with_a_stabiliser_are_one_error_and_leave_no_directory(trained, stabilised, capsys):
    more = ["--method=jacobian", "--stabiliser=0.001"]
    assert failure(capsys, command(*more)) == WITH_JACOBIAN
    assert failure(capsys, ["grok", "xor", *more, "--out=run"]) == WITH_JACOBIAN
    assert not Path("lmn").exists() and not Path("run").exists()
    before = sorted(stabilised.path.rglob("*"))
    said = failure(capsys, ["measure", str(stabilised.path), "--method=path,jacobian"])
    assert said == f"stabiliser: expected a method with paths, got {LONG} with method 'jacobian'"
    assert sorted(stabilised.path.rglob("*")) == before
    said = failure(capsys, ["grok", "xor", "--stabiliser=-1", "--out=run"])
    assert said == "stabiliser: expected a finite number of at least 0, got -1.0" and not Path("run").exists()
