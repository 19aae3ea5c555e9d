"""Writers: what they log, and that a run goes on with its files; the pages' examples."""

import glob
import json
import os
import re
import struct
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fresh import run_fresh
from logged import X, read, scalars
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from lmnfast import Probe
from lmnfast.integrations import CSVWriter, TensorBoardWriter, WandbWriter

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated"
    ),  # Lightning in torch's pytree
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


def row(step, layer="first", lmn=2.5, **extra):
    return {"step": step, "layer": layer, "lmn": lmn, **extra}


def test_a_probe_writes_its_rows_to_a_csv_file_to_the_last_bit(tmp_path):
    model = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3))
    with Probe(model, X, ["0", "1"], every=2, writers=[CSVWriter(tmp_path / "new" / "lmn.csv")]) as probe:
        for step in range(5):
            probe(step, loss=step / 3)
    rows = read(tmp_path / "new" / "lmn.csv")
    assert rows == [{name: str(value) for name, value in row.items()} for row in probe.history]
    assert [(r["step"], r["layer"]) for r in rows] == [(s, n) for s in "024" for n in "01"]
    assert float(rows[0]["lmn"]) == probe.history[0]["lmn"]


@pytest.mark.parametrize("left", ["", "2,fir", '2,"fi', "2,first,2.5"])
def test_a_csv_file_of_a_killed_run_is_gone_on_with_without_a_row_twice(tmp_path, left):
    path = tmp_path / "lmn.csv"
    writer = CSVWriter(path)
    for step in (0, 1):
        writer.write(row(step))
    with open(path, "a") as file:
        file.write(left)
    writer = CSVWriter(path, resume=True)
    for step in range(4):
        writer.write(row(step))
    assert [(r["step"], r["lmn"]) for r in read(path)] == [(step, "2.5") for step in "0123"]


@pytest.mark.parametrize("left", ["0,first,2.5\n", "0,fir"])
def test_a_csv_file_of_an_earlier_run_is_refused_and_left_as_it_is(tmp_path, left):
    path, text = tmp_path / "lmn.csv", "step,layer,lmn\n" + left
    path.write_text(text)
    writer = CSVWriter(path)
    with pytest.raises(
        ValueError, match="path: expected a new file, got .*lmn.csv with rows of an earlier run"
    ):
        writer.write(row(0, lmn=3.0))
    assert path.read_text() == text


def test_a_writer_that_was_closed_begins_a_new_run(tmp_path):
    writer = CSVWriter(tmp_path / "lmn.csv")
    writer.write(row(0))
    writer.close()
    with pytest.raises(ValueError, match="rows of an earlier run"):
        writer.write(row(0))
    writer.resume()
    writer.write(row(1))
    assert [r["step"] for r in read(writer.path)] == ["0", "1"]


def test_a_csv_file_has_every_row_of_steps_that_begin_anew(tmp_path):
    model = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3))
    with Probe(model, X, "0", every=2, writers=[CSVWriter(tmp_path / "lmn.csv")]) as probe:
        for _ in range(3):
            for step in range(4):
                probe(step)
    assert [r["step"] for r in read(tmp_path / "lmn.csv")] == list("020202")


def test_a_step_measured_again_with_another_result_has_both_rows(tmp_path):
    path = tmp_path / "lmn.csv"
    writer = CSVWriter(path)
    writer.write(row(0))
    writer.write(row(1, loss=0.5))
    writer = CSVWriter(path, resume=True)
    writer.write(row(1, loss=0.25))  # another loss
    writer.write(row(0, seen=3))  # another column
    assert [(r["step"], r["loss"], r["seen"]) for r in read(path)] == [
        ("0", "", ""), ("1", "0.5", ""), ("1", "0.25", ""), ("0", "", "3")
    ]  # fmt: skip


def test_a_probe_that_goes_on_from_a_state_goes_on_with_its_files(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3))
    with Probe(model, X, "0", every=1, writers=[CSVWriter(tmp_path / "a.csv")]) as probe:
        for step in range(3):
            probe(step)
            if step == 1:
                state = probe.state_dict()
    rows = read(tmp_path / "a.csv")
    writers = [CSVWriter(tmp_path / "a.csv"), TensorBoardWriter(tmp_path)]
    with Probe(model, X, "0", every=1, writers=writers) as probe:
        probe.load_state_dict(state)
        for step in (2, 3):
            probe(step)
    assert read(tmp_path / "a.csv")[:3] == rows
    assert [r["step"] for r in read(tmp_path / "a.csv")] == list("0123")


def test_a_csv_file_takes_new_columns_and_rows_without_them(tmp_path):
    writer = CSVWriter(tmp_path / "lmn.csv")
    writer.write(row(0))
    writer.write(row(1, loss=0.5))
    writer.write(row(2))
    assert [r["loss"] for r in read(writer.path)] == ["", "0.5", ""]
    assert os.listdir(tmp_path) == ["lmn.csv"]


def test_a_file_that_is_no_log_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("buy milk")
    with pytest.raises(
        ValueError, match="path: expected a CSV file with columns step and layer, got .*notes.txt"
    ):
        CSVWriter(path)
    assert path.read_text() == "buy milk"


def test_tensorboard_shows_each_layer_at_its_step(tmp_path):
    own = SummaryWriter(tmp_path / "given")
    for to in (str(tmp_path / "folder"), own):
        writer = TensorBoardWriter(to)
        own.add_scalar("loss", 1.0, 900)
        for step in (0, 100):
            writer.write(row(step, "h.0", 1.5))
            writer.write(row(step, "h.1", 2.5))
        writer.close()
    own.add_scalar("loss", 2.0, 901)  # it is the user's to close
    own.close()
    expected = {"lmn/h.0": [(0, 1.5), (100, 1.5)], "lmn/h.1": [(0, 2.5), (100, 2.5)]}
    assert scalars(tmp_path / "folder") == expected
    assert scalars(tmp_path / "given", "lmn") == expected


def test_curves_of_an_earlier_run_are_added_to_only_when_told_to(tmp_path):
    SummaryWriter(tmp_path).close()  # the training's own is no earlier run's
    writer = TensorBoardWriter(tmp_path)
    writer.write(row(0))
    writer.close()
    for other in (writer, TensorBoardWriter(tmp_path)):
        with pytest.raises(ValueError, match="to: expected a folder without LMN curves, got .*resume=True"):
            other.write(row(0, lmn=9.0))
    writer = TensorBoardWriter(tmp_path, resume=True)
    writer.write(row(1))
    writer.close()
    assert scalars(tmp_path) == {"lmn/first": [(0, 2.5), (1, 2.5)]}


def wandb_records(folder):
    """The records of an offline run that are whole: LevelDB's log format after seven bytes of their own."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = glob.glob(f"{folder}/wandb/offline-run-*/*.wandb")
    data, at, whole = Path(path).read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data):  # it is being written
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, the last part of one
            yield Record.FromString(whole)
            whole = b""


def finished(run, folder):
    """All records, once they are there: on a busy machine the file is written some time after finish returns."""
    run.finish()
    for _ in range(600):
        records = list(wandb_records(folder))
        if any(record.WhichOneof("record_type") == "exit" for record in records):  # others may follow it
            return records
        time.sleep(0.1)
    raise TimeoutError(f"no end of the run in {folder} after a minute")


@pytest.mark.parametrize("commit", [False, True])
def test_late_rows_reach_wandb_and_drop_nothing_of_the_users(tmp_path, monkeypatch, commit):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="p", dir=tmp_path, mode="offline")
    writer = WandbWriter(run, commit=commit)
    for step in range(0, 50, 5):
        run.log({"loss": step / 10}, **({} if commit else {"step": step}))
        if step == 30:  # three at once, all late
            for late in (0, 10, 20):
                for layer in "ab":
                    writer.write(row(late, layer, late + (layer == "b")))
    writer.write(row(40, "a", 40.0))
    writer.close()
    records = finished(run, tmp_path)
    seen = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [h["loss"] for h in seen if "loss" in h] == [step / 10 for step in range(0, 50, 5)]
    for layer, more in (("a", 0), ("b", 1)):
        values = [(h["lmn_step"], h[f"lmn/{layer}"]) for h in seen if f"lmn/{layer}" in h]
        assert values == [(s, s + more) for s in ((0, 10, 20, 40) if layer == "a" else (0, 10, 20))]
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "lmn/*" and m.step_metric == "lmn_step" for m in metrics)


def test_wandb_gets_every_row_of_steps_that_begin_anew(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="p", dir=tmp_path, mode="offline")
    writer, rows = WandbWriter(run), [row(s, layer, lmn) for s, layer, lmn in
                                      [(0, "a", 1.0), (0, "b", 2.0), (0, "a", 3.0), (5, "a", 4.0), (0, "a", 5.0)]]  # fmt: skip
    for each in rows:
        writer.write(each)
    writer.close()
    seen = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in finished(run, tmp_path)
        if r.WhichOneof("record_type") == "history"
    ]
    for layer in "ab":
        values = [(h["lmn_step"], h[f"lmn/{layer}"]) for h in seen if f"lmn/{layer}" in h]
        assert values == [(r["step"], r["lmn"]) for r in rows if r["layer"] == layer]


@pytest.mark.parametrize(
    ("hidden", "code", "extra"),
    [
        (
            ["tensorboard"],
            "from lmnfast.integrations import TensorBoardWriter as W; W('runs')",
            "tensorboard",
        ),
        (["wandb"], "from lmnfast.integrations import WandbWriter as W; W(None)", "wandb"),
        (["lightning", "pytorch_lightning"], "import lmnfast.integrations.lightning", "lightning"),
        (["transformers"], "import lmnfast.integrations.transformers", "transformers"),
    ],
)
def test_a_missing_package_is_one_error_that_says_what_to_install(monkeypatch, hidden, code, extra):
    for name in list(sys.modules):
        if (
            name.startswith(("torch.utils.tensorboard", "lmnfast.integrations."))
            or name.split(".")[0] in hidden
        ):
            monkeypatch.delitem(sys.modules, name)
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"not installed; pip install lmnfast\[{extra}\]$"):
        exec(code, {})


def test_importing_the_integrations_imports_none_of_their_packages(tmp_path):
    packages = "{'lightning', 'pytorch_lightning', 'transformers', 'tensorboard', 'wandb'}"
    script = tmp_path / "code.py"
    script.write_text(f"import sys, lmnfast.integrations; assert not {packages} & set(sys.modules)")
    done = run_fresh(script, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_pages_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training-loops.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(block, names)
    assert "lmn" in capsys.readouterr().out


def test_writers_log_the_observables_that_were_asked_for(tmp_path):
    model = nn.Sequential(nn.Linear(5, 8), nn.Softmax(1), nn.Linear(8, 3))
    names = ["curvature", "local_complexity"]  # the latter does not apply
    logged = []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=lambda v, commit: logged.append(v), step=0)
    writers = [TensorBoardWriter(tmp_path), WandbWriter(run, commit=True), CSVWriter(tmp_path / "lmn.csv")]
    probe = Probe(model, X, "0", every="log", observables=names, writers=writers)
    with warnings.catch_warnings(record=True) as said, probe:
        warnings.simplefilter("always")
        for step in range(3):
            probe(step, curvature_of_mine=1.0)
    assert [str(each.message)[:48] for each in said] == ["layer '0': observable 'local_complexity' does no"]
    (first, *_), values = probe.history, scalars(tmp_path)
    assert set(values) == {"curvature/0"}, "no LMN was asked for, and what has no value is left out"
    assert values["curvature/0"][0] == (0, pytest.approx(first["curvature"]))
    assert logged[0] == {"curvature/0": first["curvature"], "lmn_step": 0} and len(logged) == 3
    row = read(tmp_path / "lmn.csv")[0]
    assert (row["lmn"], row["curvature"], row["local_complexity"]) == ("", str(first["curvature"]), "nan")
