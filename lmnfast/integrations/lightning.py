"""The linear mapping number in a Lightning training: pip install lmnfast[lightning]."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._extras import required
from .._files import write_file
from .._schedule import Every
from ..probe import Probe
from .common import Plan, kept_state, named, new_state, of_last_step, refuse_sharded, state_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = required(("lightning.pytorch", "pytorch_lightning"), "lightning").Callback

SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}


def _remove(file: Path, process: int) -> None:
    if os.getpid() == process:
        file.unlink(missing_ok=True)


class LMNCallback(Callback):
    """Measures a LightningModule's linear mapping number every so many optimizer steps.

    The callback has a `Probe` of the module. Steps are those of trainer.global_step, which counts one per optimizer step, also
    with accumulated gradients. Each LMN goes to the trainer's loggers as lmn/<layer>, each observable under its own name, as
    curvature/<layer>, some steps later, under the step at which it was measured; the last ones at the end of the fit.
    Checkpoints carry the history: a resumed fit continues with it and measures no step twice. Training with the callback ends
    in the same weights, bit for bit.

    The same names are in trainer.callback_metrics, as float32 on the CPU. If a callback or a learning rate scheduler has one of
    them as its monitor (ModelCheckpoint, EarlyStopping, ReduceLROnPlateau), the training waits at each measured step until its
    values are ready, and rank 0 sends them to the other ranks. So what is monitored is always the value of the last measured
    step, on all ranks. Otherwise nothing waits, and callback_metrics has the latest value that is ready, on rank 0 alone.

    One trainer may have several callbacks, each with its own rows. A checkpoint distinguishes them by inputs, layers and
    settings (a function counts by its name). The first callback that measures a layer logs lmn/<layer>, the next ones log
    lmn-2/<layer>, lmn-3/<layer> and so on, in the trainer's order.

    Only rank 0 measures. It measures the module itself, not the DDP wrapper. There is no collective, unless a value is
    monitored. The other ranks wait for it at their next collective. If a strategy spawns or forks its processes, rank 0 hands
    the history back at the end of the fit.

    Args:
        inputs: samples for the module's forward, on any device. Floating-point samples are converted to the dtype that the
            trainer's precision gives its batches: float64 for "64-true", bfloat16 for "bf16-true", float16 for "16-true".
        layers: as in `Probe`; names begin at the LightningModule.
        every: as in `Probe`, in optimizer steps.
        settings: the other arguments of `Probe` (until, blocks, method, points, rule, negative, stabiliser, observables,
            budget, forward, output, batch_dim, compile, writers).

    Raises:
        TypeError, ValueError: a setting that no row can have, as every < 1 or a stabiliser below 0. ValueError also at the
            start of a fit, if the strategy shards parameters (FSDP, DeepSpeed).

    Example:
        Whole in examples/lightning_callback.py::

            callback = LMNCallback(inputs, "network.*", every=100)
            Trainer(callbacks=[callback], ...).fit(module)
            callback.history
    """

    def __init__(
        self, inputs: Any, layers: str | Sequence[str] | None = None, every: Every = 100, **settings: Any
    ) -> None:
        super().__init__()
        self._plan = Plan(inputs, layers, every, settings)
        self._probe: Probe | None = None
        self._state = new_state()  # used until the probe exists
        self._monitored = False
        self._reached = 0  # the step of the last call
        self._last: dict[
            str, float
        ] = {}  # the numbers of the last step whose rows are ready, by the names they are logged under
        self._expect_return()

    def _expect_return(self) -> None:
        """Chooses the file in which a process of the strategy leaves its rows for this process before it ends."""
        self._made_in = os.getpid()
        self._returned = Path(tempfile.gettempdir()) / f"lmnfast-{uuid.uuid4().hex}.json"
        weakref.finalize(self, _remove, self._returned, self._made_in)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._made_in == os.getpid():  # a copy in the same process has its own rows and needs its own file
            self._expect_return()

    @property
    def history(self) -> list[dict[str, Any]]:
        """As `Probe.history` on rank 0; on other ranks the rows of the checkpoint."""
        self._take_returned()
        return self._probe.history if self._probe else [dict(row) for row in self._state["rows"]]

    def _take_returned(self) -> None:
        if os.getpid() == self._made_in and self._returned.exists():
            self.load_state_dict(json.loads(self._returned.read_text()))
            self._returned.unlink()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**self._plan.identity)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        refuse_sharded(pl_module, next(iter(names & SHARDING), None))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitored = any(map(self._logs, _monitors(trainer)))
        self._reached = trainer.global_step
        self._last = {}
        if trainer.is_global_zero:
            refuse_sharded(pl_module)

            def prepare(tensor: Tensor) -> Tensor:
                return trainer.precision_plugin.convert_input(tensor.to(pl_module.device))

            step = trainer.global_step
            if self._probe is not None:  # the probe of an earlier fit
                self._state = state_of(self._probe) if self._probe.next_step <= step + 1 else new_state()
            self._probe = self._plan.probe(pl_module, prepare, step, self._state, partial(self._log, trainer))
            rows = self._probe.history
            self._publish(
                trainer, named(of_last_step(rows, self._plan.observables), self._probe, _probes(trainer))
            )
            self._probe.reach(step)
        self._share(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._reached = self._reached, trainer.global_step
        if self._probe is not None and trainer.is_global_zero:
            self._probe.reach(trainer.global_step)
            self._probe.flush()
        if self._monitored and self._plan.schedule.passed(before, trainer.global_step):
            self._share(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Pending rows are logged first: a fit that resumes from the checkpoint does not log them again.
        if self._probe is not None:
            self._probe.flush(wait=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            if self._probe is not None:
                self._probe.close()
        finally:
            self._hand_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(Exception):  # the user must see the original exception
            self.on_train_end(trainer, pl_module)

    def _hand_back(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and os.getpid() != self._made_in:
            write_file(self._returned, json.dumps(self.state_dict()).encode())

    def state_dict(self) -> dict[str, Any]:
        self._take_returned()
        return state_of(self._probe) if self._probe else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self._probe = kept_state(state_dict), None

    def _log(self, trainer: Trainer, step: int, by_layer: dict[str, dict[str, float]]) -> None:
        assert self._probe is not None
        values = named(by_layer, self._probe, _probes(trainer))
        self._publish(trainer, values)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def _logs(self, name: str) -> bool:
        """Whether this callback logs under such a name, or may, without the layers, which other ranks do not know."""
        return name.partition("/")[0].partition("-")[0] in ("lmn", *self._plan.observables) and "/" in name

    def _publish(self, trainer: Trainer, values: dict[str, float]) -> None:
        self._last = values
        trainer.callback_metrics.update(
            {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
        )

    def _share(self, trainer: Trainer) -> None:
        """If a value is monitored: waits for those of the last measured step, and sends them to all ranks."""
        if not self._monitored:
            return
        if self._probe is not None and trainer.is_global_zero:
            self._probe.flush(wait=True)
        if trainer.world_size > 1:
            self._publish(trainer, trainer.strategy.broadcast(self._last))


def _probes(trainer: Trainer) -> list[Probe | None]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set outside of the class, by its connector
    return [callback._probe for callback in callbacks if isinstance(callback, LMNCallback)]


def _monitors(trainer: Trainer) -> Iterator[str]:
    """The names that the trainer's callbacks and learning rate schedulers monitor."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # as above
    for holder in (*callbacks, *trainer.lr_scheduler_configs):
        if isinstance(name := getattr(holder, "monitor", None), str):
            yield name
