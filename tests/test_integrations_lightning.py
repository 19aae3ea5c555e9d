"""The callback for Lightning: what it logs, that training stays the same to the bit, and that it resumes."""

import copy
import glob
import os
import pickle
import re
import signal
import subprocess
import sys
import types
from contextlib import suppress

import lightning.pytorch as L
import pytest
import torch
from fitted import LABELS, Module, fit, trainer_of
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import Precision
from logged import X, read, same_weights, scalars, steps
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lmnfast
from lmnfast import Probe
from lmnfast.integrations import CSVWriter
from lmnfast.integrations import lightning as lightning_module
from lmnfast.integrations.lightning import LMNCallback as LightningCallback
from lmnfast.integrations.transformers import LMNCallback as TransformersCallback

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated"
    ),  # Lightning in torch's pytree
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


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
    trainer = trainer_of([callback], max_epochs=1)
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
        callback_metrics={},
        lr_scheduler_configs=[],
        precision_plugin=Precision(),
    )
    callback.on_train_start(trainer, module)
    with pytest.raises(RuntimeError, match="no eigenvalues at step 4"):
        for trainer.global_step in range(1, 7):
            callback.on_train_batch_end(trainer, module, None, None, 0)
        callback.on_train_end(trainer, module)
    callback.on_exception(trainer, module, RuntimeError())
    assert logged[:2] == [0, 2]


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
    trainer = types.SimpleNamespace(
        is_global_zero=False,
        global_step=0,
        loggers=[],
        callbacks=[callback],
        lr_scheduler_configs=[],
        strategy=object(),
    )
    callback.setup(trainer, Module(), "fit")
    callback.on_train_start(trainer, Module())
    callback.on_train_batch_end(trainer, Module(), None, None, 0)
    callback.on_train_end(trainer, Module())
    assert callback.history == [] and callback.state_dict()["rows"] == []


BEGINNING = """
import os
import socket

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
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


x = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
batches = DataLoader(TensorDataset(x), 4)
stop = EarlyStopping("lmn/net.0", check_on_train_epoch_end=True)  # it reads the value on each rank
settings = {
    "max_steps": 4, "accelerator": "cpu", "devices": 2, "logger": False,
    "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}
"""

DDP = """
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(free.getsockname()[1])
second = os.fork()  # behind the imports, which take longest: where there is a rank, Lightning starts no process
os.environ["LOCAL_RANK"] = "0" if second else "1"
weights = []
for callbacks in [], [LMNCallback(x[:20], "net.0", every=2), stop]:
    module = Module()
    L.Trainer(strategy="ddp", callbacks=callbacks, **settings).fit(module, batches)
    weights.append([p.detach().clone() for p in module.parameters()])
assert all(map(torch.equal, *weights))
steps = [row["step"] for row in callbacks[0].history]
print("rank", module.global_rank, "measured", steps, "monitored", stop.best_score.item(), flush=True)
if second:
    assert stop.best_score.item() == torch.tensor(callbacks[0].history[-1]["lmn"]).item()
    assert os.waitpid(second, 0)[1] == 0
"""


def said_by(folder, script):
    """What a script that starts processes prints. All such scripts begin alike."""
    (folder / "ddp.py").write_text(BEGINNING + script)
    with subprocess.Popen(
        [sys.executable, "ddp.py"], stdout=-1, stderr=-1, text=True, cwd=folder, start_new_session=True
    ) as process:
        try:
            said, errors = process.communicate(timeout=600)
        finally:
            with suppress(ProcessLookupError):  # the other processes, too, also where the first has died
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return said


def test_two_processes_train_as_without_and_the_first_measures(tmp_path):
    said = said_by(tmp_path, DDP)
    assert "rank 0 measured [0, 2, 4]" in said and "rank 1 measured []" in said
    values = re.findall(r"monitored (\S+)", said)
    assert len(values) == 2 and len(set(values)) == 1, said


LAUNCHED = """
if __name__ == "__main__":
    callback = LMNCallback(x[:20], "net.0", every=2)
    trainer = L.Trainer(strategy="ddp_fork", callbacks=[callback, stop], **settings)
    trainer.fit(Module(), batches)
    last = trainer.callback_metrics["lmn/net.0"].item() == torch.tensor(callback.history[-1]["lmn"]).item()
    print("measured", [row["step"] for row in callback.history], "the last is monitored", last)
"""


def test_processes_of_a_launcher_hand_the_history_and_the_metrics_back(tmp_path):
    assert "measured [0, 2, 4] the last is monitored True" in said_by(tmp_path, LAUNCHED)


def test_strategies_that_shard_parameters_are_refused():
    FSDPStrategy = type("FSDPStrategy", (), {})
    mine = type("Mine", (FSDPStrategy,), {})()
    with pytest.raises(
        ValueError, match="strategy: expected one that keeps the whole model .* got FSDPStrategy"
    ):
        LightningCallback(X, "net.0").setup(types.SimpleNamespace(strategy=mine), Module(), "fit")
    module = Module()
    module.net[0].weight.ds_id = 0  # DeepSpeed's mark of a parameter that is elsewhere
    trainer = types.SimpleNamespace(
        strategy=object(), is_global_zero=True, global_step=0, callbacks=[], lr_scheduler_configs=[]
    )
    with pytest.raises(ValueError, match="got DeepSpeed ZeRO stage 3, which shards it"):
        LightningCallback(X, "net.0").on_train_start(trainer, module)


@pytest.mark.parametrize("kind", [LightningCallback, TransformersCallback])
def test_bad_settings_are_refused_at_once(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        kind(X, "net.0", evry=3)
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        kind(X, "net.0", every=0)
    with pytest.raises(ValueError, match="layers: expected either layers or blocks, got both"):
        kind(X, "net.0", blocks="net.1")
    with pytest.raises(ValueError, match="layers: expected either layers or blocks, got neither"):
        kind(X)
    with pytest.raises(ValueError, match="stabiliser: expected a number of at least 0, got -1"):
        kind(X, "net.0", stabiliser=-1)
    with pytest.raises(ValueError, match="stabiliser: expected a method with paths, got 1.0 with"):
        kind(X, "net.0", stabiliser=1, method="jacobian")


def test_patterns_blocks_and_ends_go_through_the_callback():
    callbacks = [
        LightningCallback(X[:20], blocks=["net.0", "net.4"], every=2),
        LightningCallback(X[:20], "inputs", every=2, until="net.0"),
        LightningCallback(X[:20], "net.*", every=2),
    ]
    module = fit(callbacks, steps=2)
    assert [[row["layer"] for row in callback.history] for callback in callbacks] == [
        ["net.0", "net.4"] * 2,
        ["inputs"] * 2,
        [f"net.{n}" for n in range(5)] * 2,
    ]
    end = {"layer": "", "until": "net.0"}
    for callback, how in zip(callbacks, ({"block": "net.4"}, end, {"layer": "net.4"}), strict=True):
        expected = lmnfast.lmn(*lmnfast.cut(module, inputs=X[:20], **how)).item()
        assert callback.history[-1]["lmn"] == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_is_not_there_is_an_error_before_the_first_step():
    with pytest.raises(ValueError, match="layer: 'net.9' is not in the model"):
        fit([LightningCallback(X, "net.9")])


def test_lightning_logs_observables_and_takes_a_schedule(tmp_path):
    logger = CSVLogger(tmp_path, "csv")
    callback = LightningCallback(
        X[:20], ["net.0"], every=[0, 3, 7], observables=["lmn", "curvature", "l2_norm"]
    )
    assert same_weights(fit([]), fit([callback], logger=logger))
    assert steps(callback) == [0, 3, 7]
    logged = [row for row in read(glob.glob(f"{tmp_path}/csv/*/metrics.csv")[0]) if row["lmn/net.0"]]
    for name in ("lmn", "curvature", "l2_norm"):
        assert [float(row[f"{name}/net.0"]) for row in logged] == [row[name] for row in callback.history]
    plain, other = LightningCallback(X[:20], "net.0"), LightningCallback(X[:20], "net.0", observables="lmn")
    assert "observables" not in plain.state_key and plain.state_key != other.state_key
    with pytest.raises(ValueError, match="observables: expected among"):
        LightningCallback(X[:20], "net.0", observables="speed")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_lightning_callback_measures_with_its_stabiliser_and_resumes_rows_without_the_column(tmp_path):
    def callbacks(*stabilisers):
        return [LightningCallback(X[:20], "net.0", 2, stabiliser=stabiliser) for stabiliser in stabilisers]

    first = callbacks(0, 0.01)
    module = fit([*first, ModelCheckpoint(tmp_path, every_n_train_steps=4)], steps=4)
    tail, samples = lmnfast.cut(module, "net.0", X[:20])
    for callback, stabiliser in zip(first, (0.0, 0.01), strict=True):
        row = callback.history[-1]
        expected = lmnfast.lmn(tail, samples, stabiliser=stabiliser).item()
        assert (row["step"], row["stabiliser"], row["lmn"]) == (4, stabiliser, pytest.approx(expected))
    assert first[1].history[-1]["lmn"] > 1.01 * first[0].history[-1]["lmn"]
    assert "stabiliser" not in first[0].state_key and "'stabiliser': 0.01" in first[1].state_key
    (path,) = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=False)
    for row in checkpoint["callbacks"][first[0].state_key]["rows"]:
        del row["stabiliser"]  # as an earlier version left it
    torch.save(checkpoint, path)
    *resumed, other = callbacks(0, 0.01, 0.5)
    fit([*resumed, other], ckpt_path=path, steps=6)
    for before, after in zip(first, resumed, strict=True):
        assert after.history[:3] == before.history and steps(after) == [0, 2, 4, 6]
    assert steps(other) == [4, 6], "the rows of another stabiliser are not its own"
    other.load_state_dict(checkpoint["callbacks"][first[0].state_key])
    assert other.history == first[0].history, "also before a fit, and on other ranks"
