"""The linear mapping number in a Lightning training: pip install lmnfast[lightning]."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .common import Recorder, refuse_sharded, required

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = required(("lightning.pytorch", "pytorch_lightning"), "lightning").Callback

SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}


class LMNCallback(Callback):
    """Measures a LightningModule's linear mapping number every so many optimizer steps.

        callback = LMNCallback(inputs, "network.*", every=100)
        Trainer(callbacks=[callback], ...).fit(module)
        callback.history

    A `Probe` of the module, counted by trainer.global_step: with accumulated gradients that is one per
    optimizer step. Each LMN goes to the trainer's loggers as lmn/<layer>, at the step it was measured at,
    some steps later; the rest at the end of the fit. It is no metric to monitor: only rank 0 has it.
    Checkpoints carry the history: a fit that resumes goes on with it and measures no step twice. Training
    with it ends in the same weights, bit for bit.

    Only rank 0 measures, the module itself and not what DDP made of it, without any collective; the others
    wait for it at the next one.

    inputs: samples for the module's forward, on any device. layers: as in `Probe`, names from the
    LightningModule on.
    every: in optimizer steps.
    settings: the others of `Probe` (method, points, rule, negative, budget, forward, output,
    writers).
    Raises ValueError at the start of a fit whose strategy shards parameters (FSDP, DeepSpeed).
    """

    def __init__(self, inputs: Any, layers: str | Sequence[str], every: int = 100, **settings: Any) -> None:
        super().__init__()
        self._recorder = Recorder(inputs, layers, every, settings)

    @property
    def history(self) -> list[dict[str, Any]]:
        """As `Probe.history`; on rank 0, elsewhere what a checkpoint brought."""
        return self._recorder.history

    @property
    def state_key(self) -> str:
        return self._generate_state_key(layers=self._recorder.layers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        refuse_sharded(pl_module, next(iter(names & SHARDING), None))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            refuse_sharded(pl_module)
            self._recorder.start(pl_module, pl_module.device, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self._recorder.measure(trainer.global_step)
            self._log(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._log(trainer, wait=True)  # a fit that resumes from it does not log these rows again

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, wait=True)
        self._recorder.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(Exception):  # the exception under way is the one to see
            self._log(trainer, wait=True)
        with suppress(Exception):
            self._recorder.close()

    def state_dict(self) -> dict[str, Any]:
        return self._recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recorder.load_state_dict(state_dict)

    def _log(self, trainer: Trainer, wait: bool = False) -> None:
        for step, values in self._recorder.new_steps(wait):
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)
