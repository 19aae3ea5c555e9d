"""The linear mapping number in a Hugging Face Trainer: pip install lmnfast[transformers]."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .._extras import required
from .._files import write_file
from .._schedule import Every
from ..probe import Probe
from .common import Plan, named, refuse_sharded, state_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    TrainerCallback = required("transformers", "transformers").TrainerCallback

HISTORY = "lmn_history.json"


class LMNCallback(TrainerCallback):
    """Measures a model's linear mapping number every so many optimizer steps of a Trainer.

    The callback has a `Probe` of the model. Steps are the trainer's global_step. Each LMN goes to state.log_history, as
    lmn/<layer> (an observable under its own name, as curvature/<layer>) with the step at which it was measured, and to the
    reporters in args.report_to. A callback does not know its trainer, so reporting needs `attach` in place of
    Trainer(callbacks=[callback]). The callback then calls on_log of the trainer's callbacks with a state at the measured step
    (Trainer.log would give the present step). TensorBoard and W&B add a prefix: they show train/lmn/<layer>.

    The history is kept in output_dir/lmn_history.json, which is rewritten before each checkpoint. A resumed run takes the rows
    up to its step from that file, and measures no step twice. Training with the callback ends in the same weights, bit for
    bit. Only the process with is_world_process_zero measures, without a collective.

    One trainer may have several callbacks, each with its own rows. The file distinguishes them by inputs, layers and settings
    (a function counts by its name). The first callback that measures a layer logs lmn/<layer>, those attached later log
    lmn-2/<layer>, lmn-3/<layer> and so on.

    Args:
        inputs: samples, on any device. A dict is passed as model(**inputs), a tensor as model(inputs). Labels are not needed.
        layers: as in `Probe`.
        every: as in `Probe`, in optimizer steps.
        output: selects the output of the model that counts, as in `cut`. With until or blocks, "logits" selects nothing.
        settings: the other arguments of `Probe` (until, blocks, method, points, rule, negative, stabiliser, observables,
            budget, forward, batch_dim, compile, writers).

    Raises:
        TypeError, ValueError: a setting that no row can have, as every < 1 or a stabiliser below 0. ValueError also at the
            start of a training that shards parameters (FSDP, DeepSpeed).

    Example:
        Whole in examples/huggingface_trainer.py::

            callback = LMNCallback(inputs, "transformer.h.*", every=100).attach(trainer)
            trainer.train()
            callback.history
    """

    def __init__(
        self,
        inputs: Any,
        layers: str | Sequence[str] | None = None,
        every: Every = 100,
        *,
        output: Any = "logits",
        **settings: Any,
    ) -> None:
        inside = settings.get("until") is not None or settings.get("blocks") is not None
        output = None if inside and output == "logits" else output
        self._plan = Plan(inputs, layers, every, {"output": output, **settings})
        self._probe: Probe | None = None
        self._trainer: Trainer | None = None
        # The arguments of the present event. Rows are logged within it.
        self._now: tuple[TrainingArguments, TrainerState, TrainerControl]

    def __getstate__(self) -> dict[str, Any]:
        """A copy, deep or by pickle, has the rows. It belongs to no trainer, and to no event of one."""
        return {name: value for name, value in vars(self).items() if name != "_now"} | {"_trainer": None}

    def attach(self, trainer: Trainer) -> LMNCallback:
        """Adds the callback to the trainer, after the callback that decides when to save and before those that report.

        Args:
            trainer: its list of callbacks is changed.

        Returns:
            The callback itself.

        Raises:
            ValueError: the trainer already has a callback that lmn_history.json could not distinguish from this one.
        """
        for other in trainer.callback_handler.callbacks:
            if isinstance(other, LMNCallback) and other._key == self._key:
                raise ValueError(
                    "attach: expected a callback with other inputs, layers or settings than the trainer's, got the same "
                    "again (a function counts by its name)"
                )
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        before = sum(isinstance(callback, LMNCallback) for callback in callbacks[:-1])
        callbacks.insert(1 + before, callbacks.pop())
        self._trainer = trainer
        return self

    @property
    def history(self) -> list[dict[str, Any]]:
        """As `Probe.history`; empty in all processes but the first."""
        return self._probe.history if self._probe else []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None, "a Trainer gives its model"
        strategy = "FSDP" if args.fsdp else "DeepSpeed" if args.deepspeed else None
        refuse_sharded(model, strategy)
        if not state.is_world_process_zero:
            return
        if args.report_to and self._trainer is None:
            warnings.warn(
                f"lmn/<layer> goes to state.log_history alone; LMNCallback(...).attach(trainer), in place of "
                f"callbacks=, also sends it to {', '.join(args.report_to)}",
                stacklevel=2,
            )
        step = state.global_step
        kept = _read(args).get(self._key)
        if step == 0:
            kept = None
        rows = [row for row in kept["rows"] if row["step"] <= step] if kept else []
        last = min(kept["step"], step) if kept else step - 1
        self._probe = self._plan.probe(
            model, lambda tensor: tensor.to(args.device), step, {"step": last, "rows": rows}, self._log
        )
        self._probe.reach(step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._probe is not None and state.is_world_process_zero:
            self._probe.reach(state.global_step)
            self._flush(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._flush(args, state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # on_step_end does not announce every save, for example not that of the best model.
        self._flush(args, state, control, saving=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._flush(args, state, control, saving=True)
        if self._probe is not None:
            self._probe.close()

    def _flush(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, saving: bool = False
    ) -> None:
        """Logs the rows that are ready. Before a checkpoint is saved, it waits for all rows and writes them to the file."""
        if self._probe is None or not state.is_world_process_zero:
            return
        saving = saving or control.should_save or control.should_training_stop
        self._now = args, state, control
        self._probe.flush(saving)
        if saving:
            kept = {**_read(args), self._key: state_of(self._probe)}
            write_file(_history_file(args), json.dumps(kept).encode())

    def _log(self, step: int, by_layer: dict[str, dict[str, float]]) -> None:
        assert self._probe is not None
        args, state, control = self._now
        callbacks = self._trainer.callback_handler.callbacks if self._trainer else [self]
        values = named(by_layer, self._probe, (c._probe for c in callbacks if isinstance(c, LMNCallback)))
        state.log_history.append({**values, "step": step})
        if self._trainer is not None:
            then = copy.copy(state)
            then.global_step = step
            # on_log may reset should_log, and so drop a log of the trainer that is due. It gets a copy of control.
            self._trainer.callback_handler.on_log(args, then, copy.copy(control), values)

    @property
    def _key(self) -> str:
        return json.dumps(self._plan.identity)


def _history_file(args: TrainingArguments) -> Path:
    assert args.output_dir is not None, "TrainingArguments has a default"
    return Path(args.output_dir) / HISTORY


def _read(args: TrainingArguments) -> dict[str, dict[str, Any]]:
    """The states of the callbacks in lmn_history.json, by the callbacks' keys."""
    file = _history_file(args)
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text())
        for state in kept.values():
            if not isinstance(state["step"], int) or not all(
                isinstance(row["step"], int) for row in state["rows"]
            ):
                raise ValueError("steps that are no integers")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"output_dir: cannot read {file}: {type(error).__name__}: {error}; delete it to continue without it"
        ) from None
    return kept
