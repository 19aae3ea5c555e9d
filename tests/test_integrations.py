"""Writers and callbacks: what they log, that training stays the same to the bit, and that it resumes."""

import copy
import csv
import glob
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import Precision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import lmnfast
from lmnfast import Probe
from lmnfast.integrations import CSVWriter, TensorBoardWriter, WandbWriter
from lmnfast.integrations import lightning as lightning_module
from lmnfast.integrations.lightning import LMNCallback as LightningCallback
from lmnfast.integrations.transformers import LMNCallback as TransformersCallback

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated"
    ),  # Lightning in torch's pytree
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 3


def scalars(folder, part=""):
    """{name: [(step, value), ...]} of TensorBoard's event files below a folder."""
    found = {}
    for path in sorted(glob.glob(f"{folder}/**/events*", recursive=True)):
        events = EventAccumulator(path).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((e.step, e.value) for e in events.Scalars(name))
    return {name: values for name, values in found.items() if part in name}


def same_weights(a, b):
    return all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def row(step, layer="first", lmn=2.5, **extra):
    return {"step": step, "layer": layer, "lmn": lmn, **extra}


# Writers ---------------------------------------------------------------------------------------------------


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


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
    """The records of an offline run: LevelDB's log format after seven bytes of their own."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = glob.glob(f"{folder}/wandb/offline-run-*/*.wandb")
    data, at, whole = Path(path).read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
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
        if records and records[-1].WhichOneof("record_type") == "exit":
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


def test_importing_the_integrations_imports_none_of_their_packages():
    packages = "{'lightning', 'pytorch_lightning', 'transformers', 'tensorboard', 'wandb'}"
    code = f"import sys, lmnfast.integrations; assert not {packages} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Lightning -------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self, optimizers=1):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.count = optimizers
        self.automatic_optimization = optimizers == 1

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, labels = batch
        loss = F.cross_entropy(self(x), labels)
        self.log("loss", loss)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(x), labels))
                optimizer.step()
        return loss

    def configure_optimizers(self):
        made = [torch.optim.AdamW(self.parameters(), lr=1e-2) for _ in range(self.count)]
        return made[0] if self.count == 1 else made


def fit(callbacks, steps=10, module=None, ckpt_path=None, logger=False, **settings):
    L.seed_everything(0, verbose=False)
    module = module or Module()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, LABELS), 8, shuffle=True), ckpt_path=ckpt_path)
    return module


def steps(callback):
    return [r["step"] for r in callback.history]


def test_lightning_training_is_the_same_to_the_bit_and_logs_each_step(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv")]
    callback = LightningCallback(X[:20], ["net.0", "net.1"], every=4)
    assert same_weights(fit([]), fit([callback], logger=loggers))
    assert [(r["step"], r["layer"]) for r in callback.history] == [
        (s, layer) for s in (0, 4, 8) for layer in ("net.0", "net.1")
    ]
    for layer in ("net.0", "net.1"):
        values = [(r["step"], r["lmn"]) for r in callback.history if r["layer"] == layer]
        assert [(s, pytest.approx(v)) for s, v in values] == scalars(tmp_path / "tb")[f"lmn/{layer}"]
        logged = [r for r in read(glob.glob(f"{tmp_path}/csv/*/metrics.csv")[0]) if r[f"lmn/{layer}"]]
        assert [(int(r["step"]), float(r[f"lmn/{layer}"])) for r in logged] == values


def test_lightning_counts_optimizer_steps_and_not_batches():
    callback = LightningCallback(X[:20], "net.0", every=1)
    fit([callback], steps=5, accumulate_grad_batches=3)
    assert steps(callback) == list(range(6))
    assert len({r["lmn"] for r in callback.history}) == 6, "each step was to have weights of its own"


def test_several_optimizers_a_batch_skip_no_measurement():
    callback = LightningCallback(X[:20], "net.0", every=4)
    fit([callback], steps=12, module=Module(optimizers=3))  # global_step 3, 6, 9, 12
    assert steps(callback) == [0, 6, 9, 12]


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"
)
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_fit_goes_on_with_the_history(tmp_path):
    save, first = (
        ModelCheckpoint(tmp_path, every_n_train_steps=5),
        LightningCallback(X[:20], "net.0", every=2),
    )
    fit([first, save], steps=7)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    resumed = LightningCallback(X[:20], "net.0", every=2)
    module = fit([resumed], ckpt_path=checkpoint, logger=TensorBoardLogger(tmp_path / "tb"), steps=10)
    assert steps(resumed) == [0, 2, 4, 6, 8, 10] and resumed.history[:3] == first.history[:3]
    assert [step for step, _ in scalars(tmp_path / "tb")["lmn/net.0"]] == [6, 8, 10]
    assert same_weights(module, fit([], ckpt_path=checkpoint, steps=10))
    again = LightningCallback(X[:20], "net.0", every=5)
    fit([again], ckpt_path=checkpoint, steps=10)
    assert steps(again) == [0, 2, 4, 10], "the step it was stopped at was not to be measured once more"


def test_a_second_fit_starts_anew():
    callback, firsts = LightningCallback(X[:20], "net.0", every=2), []
    for factor in (1, 5):
        module = Module()
        module.net[4].weight.data.mul_(torch.arange(8) * factor + 1)
        fit([callback], steps=3, module=module)
        assert steps(callback) == [0, 2]
        firsts.append(callback.history[0]["lmn"])
    assert firsts[0] != firsts[1]


def test_fitting_further_goes_on():
    callback, module = LightningCallback(X[:20], "net.0", every=2), Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[callback], enable_model_summary=False, max_epochs=1, **quiet
    )
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, DataLoader(TensorDataset(X, LABELS), 16))
    assert steps(callback) == [0, 2, 4, 6, 8]


def test_a_model_that_becomes_nan_is_an_error_that_says_when_and_where(tmp_path):
    class Break(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                nn.init.constant_(pl_module.net[0].weight, torch.nan)

    callback = LightningCallback(X[:20], "net.0", every=1, writers=[CSVWriter(tmp_path / "lmn.csv")])
    with pytest.raises(RuntimeError, match="LMN at step 5, layers net.0: .*NaN or Inf in sample 0"):
        fit([Break(), callback])
    assert [r["step"] for r in read(tmp_path / "lmn.csv")] == list("01234"), "rows before it were to be kept"


def test_a_row_that_fails_later_does_not_take_those_before_it_along(monkeypatch):
    solve = Probe._solve

    def failing(self, step, *arguments):
        if step == 4:
            raise RuntimeError("no eigenvalues at step 4")
        return solve(self, step, *arguments)

    monkeypatch.setattr(Probe, "_solve", failing)
    logged = []
    logger = types.SimpleNamespace(log_metrics=lambda values, step: logged.append(step))
    callback, module = LightningCallback(X[:20], "net.0", every=2), Module()
    trainer = types.SimpleNamespace(
        is_global_zero=True,
        global_step=0,
        loggers=[logger],
        callbacks=[callback],
        precision_plugin=Precision(),
    )
    callback.on_train_start(trainer, module)
    with pytest.raises(RuntimeError, match="no eigenvalues at step 4"):
        for trainer.global_step in range(1, 7):
            callback.on_train_batch_end(trainer, module, None, None, 0)
        callback.on_train_end(trainer, module)
    callback.on_exception(trainer, module, RuntimeError())
    assert logged[:2] == [0, 2]


@pytest.mark.parametrize(
    "precision, dtype",
    [
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("bf16-mixed", torch.float32),
    ],
)
def test_samples_follow_the_trainers_precision(precision, dtype):
    class Watched(Module):
        def on_train_start(self):
            self.begun = copy.deepcopy(self.net)

    callback = LightningCallback(X[:20], "net.0", every=2)
    module = fit([callback], steps=1, module=Watched(), precision=precision)
    assert steps(callback) == [0] and module.begun[0].weight.dtype == dtype
    assert callback.history[0]["lmn"] == lmnfast.lmn(*lmnfast.cut(module.begun, "0", X[:20].to(dtype))).item()


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"
)
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_callbacks_of_one_layer_go_side_by_side_and_resume_with_their_own_rows(tmp_path):
    def of_first_outputs(outputs):
        return outputs[:, :2]

    def callbacks():
        kinds = [
            (X[:20], {}),
            (X[20:40], {}),
            (X[:20], {"points": 5}),
            (X[:20], {"output": of_first_outputs}),
        ]
        made = [LightningCallback(x, "net.0", every=2, **kind) for x, kind in kinds]
        return [*made, LightningCallback(X[:20], ["net.0", "net.2"], every=2)]

    first, save = callbacks(), ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4)
    fit([*first, save], steps=4, logger=CSVLogger(tmp_path, "csv"))
    assert len({callback.history[0]["lmn"] for callback in first[:4]}) == 4
    logged = read(glob.glob(f"{tmp_path}/csv/*/metrics.csv")[0])
    names = ["lmn/net.0", "lmn-2/net.0", "lmn-3/net.0", "lmn-4/net.0", "lmn-5/net.0"]
    for name, callback in zip(names, first, strict=True):
        values = [r["lmn"] for r in callback.history if r["layer"] == "net.0"]
        assert [float(r[name]) for r in logged if r[name]] == values
    assert any(r["lmn/net.2"] for r in logged) and "lmn-2/net.2" not in logged[0]
    (checkpoint,) = (tmp_path / "kept").glob("*.ckpt")
    second = callbacks()[::-1]  # the order of a list is no identity
    fit(second, ckpt_path=checkpoint, steps=6)
    for before, after in zip(first, second[::-1], strict=True):
        assert after.history[: len(before.history)] == before.history
        assert sorted(set(steps(after))) == [0, 2, 4, 6]


def test_processes_that_a_strategy_makes_hand_the_history_back(monkeypatch):
    callback = LightningCallback(X[:20], "net.0", every=2)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lightning_module, "os", types.SimpleNamespace(getpid=lambda: -1))
        spawned = pickle.loads(pickle.dumps(callback))
        fit([spawned], steps=4)
        expected = spawned.history
    assert [row["step"] for row in expected] == [0, 2, 4] and callback._returned.exists()
    other = copy.deepcopy(callback)
    assert other.history == [] and callback.history == expected and callback.state_dict()["rows"] == expected
    assert not callback._returned.exists()


def test_other_ranks_measure_nothing_and_do_not_wait():
    callback = LightningCallback(X[:20], "net.0", every=1)
    trainer = types.SimpleNamespace(is_global_zero=False, global_step=0, loggers=[], strategy=object())
    callback.setup(trainer, Module(), "fit")
    callback.on_train_start(trainer, Module())
    callback.on_train_batch_end(trainer, Module(), None, None, 0)
    callback.on_train_end(trainer, Module())
    assert callback.history == [] and callback.state_dict()["rows"] == []


DDP = """
import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lmnfast.integrations.lightning import LMNCallback


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3))

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


x, weights = torch.randn(32, 5, generator=torch.Generator().manual_seed(0)), []
for callbacks in [], [LMNCallback(x[:20], "net.0", every=2)]:
    module = Module()
    L.Trainer(
        max_steps=4, accelerator="cpu", devices=2, strategy="ddp", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(TensorDataset(x), 4))
    weights.append([p.detach().clone() for p in module.parameters()])
assert all(map(torch.equal, *weights))
steps = [row["step"] for row in callbacks[0].history]
print("rank", module.global_rank, "measured", steps, flush=True)
"""


def test_two_processes_train_as_without_and_the_first_measures(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    with subprocess.Popen(
        [sys.executable, script], stdout=-1, stderr=-1, text=True, cwd=tmp_path, start_new_session=True
    ) as process:
        try:
            said, errors = process.communicate(timeout=600)
        finally:
            with suppress(ProcessLookupError):  # the second process, too, also where the first has died
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert "rank 0 measured [0, 2, 4]" in said and "rank 1 measured []" in said


def test_strategies_that_shard_parameters_are_refused():
    FSDPStrategy = type("FSDPStrategy", (), {})
    mine = type("Mine", (FSDPStrategy,), {})()
    with pytest.raises(
        ValueError, match="strategy: expected one that keeps the whole model .* got FSDPStrategy"
    ):
        LightningCallback(X, "net.0").setup(types.SimpleNamespace(strategy=mine), Module(), "fit")
    module = Module()
    module.net[0].weight.ds_id = 0  # DeepSpeed's mark of a parameter that is elsewhere
    trainer = types.SimpleNamespace(strategy=object(), is_global_zero=True, global_step=0)
    with pytest.raises(ValueError, match="got DeepSpeed ZeRO stage 3, which shards it"):
        LightningCallback(X, "net.0").on_train_start(trainer, module)


@pytest.mark.parametrize("kind", [LightningCallback, TransformersCallback])
def test_bad_settings_are_refused_at_once(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        kind(X, "net.0", evry=3)
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        kind(X, "net.0", every=0)


def test_a_layer_that_is_not_there_is_an_error_before_the_first_step():
    with pytest.raises(ValueError, match="layer: 'net.9' is not in the model"):
        fit([LightningCallback(X, "net.9")])


# Hugging Face ----------------------------------------------------------------------------------------------

IDS = torch.randint(0, 50, (32, 8), generator=torch.Generator().manual_seed(0))
BLOCKS = ("transformer.h.0", "transformer.h.1")


def gpt():
    config = GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config)


def trainer_in(folder, callback=None, steps=8, attach=True, **settings):
    set_seed(0)
    arguments = {"save_strategy": "no", "report_to": "none", "logging_steps": 2, **settings}
    trainer = Trainer(
        gpt(),
        TrainingArguments(
            str(folder),
            use_cpu=True,
            per_device_train_batch_size=8,
            max_steps=steps,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in IDS],
        callbacks=[callback] if callback and not attach else None,
    )
    if callback and attach:
        callback.attach(trainer)
    return trainer


def watching(every=2, layers="transformer.h.?", **settings):
    return TransformersCallback({"input_ids": IDS[:6]}, layers, every, **settings)


def test_hugging_face_training_is_the_same_to_the_bit_and_reports_each_step(tmp_path):
    bare, callback = trainer_in(tmp_path / "bare"), watching(every=3)
    bare.train()
    trainer = trainer_in(tmp_path, callback, report_to="tensorboard")
    trainer.train()
    assert same_weights(bare.model, trainer.model)
    assert [(r["step"], r["layer"]) for r in callback.history] == [(s, b) for s in (0, 3, 6) for b in BLOCKS]
    log = trainer.state.log_history
    for block in BLOCKS:
        values = [(r["step"], r["lmn"]) for r in callback.history if r["layer"] == block]
        assert [(e["step"], e[f"lmn/{block}"]) for e in log if f"lmn/{block}" in e] == values
        assert scalars(tmp_path, "lmn")[f"train/lmn/{block}"] == [(s, pytest.approx(v)) for s, v in values]
    losses = [e["loss"] for e in bare.state.log_history if "loss" in e]
    assert [e["loss"] for e in log if "loss" in e] == losses and len(losses) == 4
    assert "train_runtime" in log[-1]


def test_without_attaching_the_log_history_has_it_and_a_warning_says_what_has_not(tmp_path):
    trainer = trainer_in(tmp_path, watching(every=4), attach=False)
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "lmn/transformer.h.0" in e] == [0, 4, 8]
    trainer = trainer_in(tmp_path, watching(), attach=False, steps=1, report_to="tensorboard")
    with pytest.warns(
        UserWarning, match=r"attach\(trainer\), in place of callbacks=, also sends it to tensorboard"
    ):
        trainer.train()


def test_a_trainer_counts_optimizer_steps_and_not_batches(tmp_path):
    callback = watching(every=1, layers="transformer.h.1")
    trainer_in(tmp_path, callback, steps=3, gradient_accumulation_steps=2).train()
    assert steps(callback) == [0, 1, 2, 3]


def test_a_resumed_trainer_goes_on_with_the_history(tmp_path):
    whole = watching()
    straight = trainer_in(tmp_path / "whole", whole, save_strategy="steps", save_steps=4)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:  # three steps after the last checkpoint, a measurement lost with them
                raise KeyboardInterrupt

    stopped = trainer_in(tmp_path / "stopped", watching(), save_strategy="steps", save_steps=4)
    stopped.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = watching()
    again = trainer_in(tmp_path / "stopped", resumed, save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=True)
    assert resumed.history == whole.history and steps(whole) == [s for s in range(0, 9, 2) for _ in BLOCKS]
    assert same_weights(straight.model, again.model)
    (kept,) = json.loads((tmp_path / "stopped" / "lmn_history.json").read_text()).values()
    assert kept["rows"] == whole.history and not list((tmp_path / "stopped").glob("*.part"))


def test_rows_measured_after_the_checkpoint_are_measured_again(tmp_path):
    trainer_in(tmp_path, watching(), steps=8, save_strategy="steps", save_steps=4).train()
    callback = watching()
    trainer_in(tmp_path, callback, steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert steps(callback) == [s for s in (0, 2, 4, 6) for _ in BLOCKS]


def test_an_epoch_and_a_best_model_that_are_saved_keep_the_history(tmp_path):
    callback = watching(every=1, layers="transformer.h.1")
    trainer = trainer_in(tmp_path, callback, steps=8, save_strategy="epoch")
    kept = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (state,) = json.loads((tmp_path / "lmn_history.json").read_text()).values()
            kept.append(state["rows"][-1]["step"])

    trainer.add_callback(Look())
    trainer.train()
    assert kept == [4, 8]


def test_callbacks_of_one_block_go_side_by_side_in_a_trainer(tmp_path):
    def attached(steps):
        callbacks = [
            watching(layers="transformer.h.1"),
            watching(layers="transformer.h.1", points=5),
            TransformersCallback({"input_ids": IDS[6:12]}, "transformer.h.1", 2),
        ]
        trainer = trainer_in(tmp_path, steps=steps, save_strategy="steps", save_steps=4)
        return trainer, [callback.attach(trainer) for callback in callbacks]

    trainer, first = attached(4)
    trainer.train()
    assert len({callback.history[0]["lmn"] for callback in first}) == 3
    for name, callback in zip(("lmn", "lmn-2", "lmn-3"), first, strict=True):
        logged = [entry[f"{name}/transformer.h.1"] for entry in trainer.state.log_history
                  if f"{name}/transformer.h.1" in entry]  # fmt: skip
        assert logged == [row["lmn"] for row in callback.history]
    trainer, second = attached(6)
    trainer.train(resume_from_checkpoint=True)
    for before, after in zip(first, second, strict=True):
        assert after.history[:3] == before.history and steps(after) == [0, 2, 4, 6]
    with pytest.raises(
        ValueError, match="attach: expected a callback with other inputs, .* got the same again"
    ):
        watching(layers="transformer.h.1").attach(trainer)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"step": 3, "rows": []}', '{"x": {"step": 0.5, "rows": []}}']
)
def test_a_damaged_history_file_is_named_before_the_training(content, tmp_path):
    (tmp_path / "lmn_history.json").write_text(content)
    args = TrainingArguments(str(tmp_path), report_to="none")
    state = types.SimpleNamespace(is_world_process_zero=True, global_step=0)
    with pytest.raises(ValueError, match="output_dir: cannot read .*lmn_history.json"):
        watching().on_train_begin(args, state, None, model=gpt())


def test_only_the_first_process_measures_a_trainers_model(tmp_path):
    callback = watching()
    args = TrainingArguments(str(tmp_path), report_to="none")
    state, control = types.SimpleNamespace(is_world_process_zero=False, global_step=0), None
    callback.on_train_begin(args, state, control, model=gpt())
    for event in (callback.on_step_end, callback.on_epoch_end, callback.on_save, callback.on_train_end):
        event(args, state, control)
    assert callback.history == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("setting", "name"), [("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")])
def test_a_trainer_that_shards_parameters_is_refused(setting, name):
    args = types.SimpleNamespace(**{"fsdp": None, "deepspeed": None, setting: "on"})
    with pytest.raises(ValueError, match=f"got {name}, which shards it; measure saved checkpoints instead"):
        watching().on_train_begin(args, None, None, model=gpt())


def test_a_language_model_that_becomes_nan_is_an_error_that_says_when_and_where(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                nn.init.constant_(model.transformer.wte.weight, torch.nan)

    trainer = trainer_in(tmp_path, watching(every=1, layers="transformer.h.1"))
    trainer.add_callback(Break())
    with pytest.raises(RuntimeError, match="LMN at step 3, layers transformer.h.1: .*NaN or Inf"):
        trainer.train()


# Documentation ---------------------------------------------------------------------------------------------


def test_the_pages_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training-loops.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(block, names)
    assert "lmn" in capsys.readouterr().out
