"""The callback for Lightning: precisions, values that other callbacks monitor, and processes that get a copy."""

import copy
import pickle
import time
from contextlib import nullcontext

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from fitted import LABELS, Module, fit, trainer_of
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from logged import X, same_weights, steps
from torch.utils.data import DataLoader, TensorDataset

import lmnfast
from lmnfast import Probe
from lmnfast.integrations import common
from lmnfast.integrations.lightning import LMNCallback as LightningCallback

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated"
    ),  # Lightning in torch's pytree
    pytest.mark.filterwarnings("ignore:The '(train_dataloader|val_dataloader)' does not have many workers"),
]


@pytest.mark.parametrize(
    "precision, dtype, recorded",
    [
        ("64-true", torch.float64, "float64"),
        ("bf16-true", torch.bfloat16, "bfloat16"),
        ("16-true", torch.float16, "float16"),
        ("bf16-mixed", torch.float32, "highest"),
    ],
)
def test_samples_follow_the_trainers_precision(precision, dtype, recorded):
    class Watched(Module):
        def on_train_start(self):
            self.begun = copy.deepcopy(self.net)

    # The fused kernel computes in float32 with the weights of the model, and rounds no outputs.
    callbacks = [
        LightningCallback(X[:20], "net.0", every=2),
        LightningCallback(X[:20], "net.0", every=2, output=torch.square),
    ]
    low = recorded in ("bfloat16", "float16")
    with pytest.warns(UserWarning, match=f"measured in {recorded}") if low else nullcontext():
        module = fit(callbacks, steps=1, module=Watched(plain=True), precision=precision)
    fused, unfused = callbacks
    assert steps(fused) == steps(unfused) == [0] and module.begun[0].weight.dtype == dtype
    assert fused.history[0]["precision"] == ("float64" if dtype == torch.float64 else "highest")
    assert unfused.history[0]["precision"] == recorded
    for row, output in ((fused.history[0], None), (unfused.history[0], torch.square)):
        cut = lmnfast.cut(module.begun, "0", X[:20].to(dtype), output=output)
        assert row["lmn"] == lmnfast.lmn(*cut).item()
    exact = lmnfast.lmn(*lmnfast.cut(module.begun.double(), "0", X[:20].to(dtype).double())).item()
    assert fused.history[0]["lmn"] == pytest.approx(exact, rel=0.02)


class Validated(Module):
    """With a validation, and a learning rate that a value governs."""

    def __init__(self, plateau=None):
        super().__init__()
        self.plateau = plateau

    def validation_step(self, batch, index):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.plateau is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, threshold=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.plateau}}


class Slow(Probe):
    """Solves each eigenproblem some time after the step."""

    def _solve(self, *arguments):
        time.sleep(0.05)
        return super()._solve(*arguments)


def validated(callbacks, module=None, **settings):
    L.seed_everything(0, verbose=False)
    module = module or Validated()
    trainer = trainer_of(callbacks, **settings)
    data = DataLoader(TensorDataset(X, LABELS), 16)  # four steps an epoch
    trainer.fit(module, data, DataLoader(TensorDataset(X, LABELS), 64))
    return trainer, module


class Watch(L.Callback):
    """Reads the callbacks' metrics where Lightning's own callbacks read them."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append((trainer.global_step, dict(trainer.callback_metrics)))


def test_what_is_monitored_is_the_value_of_the_last_measured_step(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "Probe", Slow)
    lmn = LightningCallback(X[:20], "net.0", every=3, observables=["lmn", "curvature"])
    second = LightningCallback(X[20:40], "net.0", every=3)
    saved = ModelCheckpoint(tmp_path, monitor="lmn-2/net.0", save_top_k=1, mode="min", filename="{epoch}")
    stop = EarlyStopping("curvature/net.0", patience=2, min_delta=1e9)
    watch = Watch()
    # EarlyStopping stands before the callback whose value it reads
    trainer, _ = validated([stop, watch, lmn, second, saved], Validated("lmn/net.0"), max_epochs=9)
    by_step = {row["step"]: row for row in lmn.history}
    assert [step for step, _ in watch.seen] == [4, 8, 12], "three epochs, as nothing falls by 1e9"
    for step, metrics in watch.seen:
        row = by_step[step // 3 * 3]
        for name in ("lmn", "curvature"):
            value = metrics[f"{name}/net.0"]
            assert value.dtype == torch.float32 and value.item() == torch.tensor(row[name]).item()
    at = {step: row["lmn"] for step, row in ((row["step"], row) for row in second.history)}
    best = min(at[step // 3 * 3] for step, _ in watch.seen)
    assert saved.best_model_score.item() == torch.tensor(best).item()
    least = min(by_step[step // 3 * 3]["lmn"] for step, _ in watch.seen)
    assert trainer.lr_scheduler_configs[0].scheduler.best == torch.tensor(least).item()


def test_nothing_waits_if_nothing_is_monitored(monkeypatch):
    monkeypatch.setattr(common, "Probe", Slow)
    waits = []
    monkeypatch.setattr(Slow, "flush", lambda self, wait=False: waits.append(wait) or Probe.flush(self, wait))
    callback = LightningCallback(X[:20], "net.0", every=2)
    trainer, _ = validated([callback, EarlyStopping("val_loss")], max_epochs=1)
    assert waits and not any(waits[:4]), "the last is that of the end"
    assert trainer.callback_metrics["lmn/net.0"].item() == torch.tensor(callback.history[-1]["lmn"]).item()


def test_training_with_a_monitored_value_is_the_same_to_the_bit():
    lmn = LightningCallback(X[:20], "net.0", every=1)
    _, module = validated([lmn, EarlyStopping("lmn/net.0", patience=99)], max_epochs=2)
    assert same_weights(module, validated([], max_epochs=2)[1])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_fit_has_the_last_value_before_it_measures(tmp_path):
    first = LightningCallback(X[:20], "net.0", every=3)
    fit([first, ModelCheckpoint(tmp_path, every_n_train_steps=4)], steps=4)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    seen = {}

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update(trainer.callback_metrics)

    fit([LightningCallback(X[:20], "net.0", every=3), Start()], ckpt_path=checkpoint, steps=5)
    assert seen["lmn/net.0"].item() == torch.tensor(first.history[-1]["lmn"]).item()


def test_a_callback_pickles_before_in_and_after_a_fit():
    class Pickled(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                self.copy = pickle.loads(pickle.dumps(callback))

    def again(rows):
        return pickle.loads(pickle.dumps(rows))

    callback, within = LightningCallback(X[:20], ["net.0", "net.1"], every=2), Pickled()
    before = again(callback)
    module = fit([callback, within], steps=4)
    after = again(callback)
    assert [row["step"] for row in within.copy.history] == [0, 0, 2, 2]
    assert within.copy.history == callback.history[:4] and after.history == callback.history
    assert before.history == [] and before.state_key == after.state_key == callback.state_key
    fit([before], steps=4)
    assert before.history == callback.history, "the copy measures as the callback does"
    fit([after], steps=4)
    assert after.history == callback.history and same_weights(module, fit([], steps=4))


def test_two_callbacks_that_differ_in_nothing_but_their_steps_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LMNCallback`"):
        fit([LightningCallback(X[:20], "net.0", every=every) for every in (2, 3)], steps=1)
