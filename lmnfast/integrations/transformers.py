"""The linear mapping number in a Hugging Face Trainer: pip install lmnfast[transformers]."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..files import write_file
from .common import Recorder, refuse_sharded, required

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    TrainerCallback = required("transformers", "transformers").TrainerCallback

HISTORY = "lmn_history.json"


class LMNCallback(TrainerCallback):
    """Measures a model's linear mapping number every so many optimizer steps of a Trainer.

        callback = LMNCallback(inputs, "transformer.h.?", every=100).attach(trainer)
        trainer.train()
        callback.history

    A `Probe` of the model, counted by the trainer's global_step. Each LMN goes, as lmn/<layer> and with the
    step it was measured at, to state.log_history, and to what args.report_to names. A callback is not told
    its trainer, so the latter takes `attach` in place of Trainer(callbacks=[callback]): it then calls on_log
    of the trainer's callbacks with a state at that step (Trainer.log would give the present one). Some of
    them rename: TensorBoard and W&B show train/lmn/<layer>.

    The history is kept in output_dir/lmn_history.json, written anew before each checkpoint is. A run that
    resumes takes from there what was measured up to its step, and measures no step twice. Training with the
    callback ends in the same weights, bit for bit. Only the process with is_world_process_zero measures,
    without any collective.

    inputs: samples, on any device: a dict is called as model(**inputs), a tensor as model(inputs); no labels
    needed.
    layers: as in `Probe`. every: in optimizer steps. output: what of the model's output counts.
    settings: the others of `Probe` (method, points, rule, negative, budget, forward, writers).
    Raises ValueError at the start of a training that shards parameters (FSDP, DeepSpeed).
    """

    def __init__(
        self,
        inputs: Any,
        layers: str | Sequence[str],
        every: int = 100,
        *,
        output: Any = "logits",
        **settings: Any,
    ) -> None:
        self._recorder = Recorder(inputs, layers, every, {"output": output, **settings})
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> LMNCallback:
        """Adds itself to the trainer, between what says when to save and what reports; returns itself."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(1, callbacks.pop())
        self._trainer = trainer
        return self

    @property
    def history(self) -> list[dict[str, Any]]:
        """As `Probe.history`; empty where the process is not the first."""
        return self._recorder.history

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
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
        file, step = Path(args.output_dir) / HISTORY, state.global_step
        kept = json.loads(file.read_text()) if step > 0 and file.exists() else {"step": step - 1, "rows": []}
        rows = [row for row in kept["rows"] if row["step"] <= step]
        self._recorder.load_state_dict({"step": min(kept["step"], step), "rows": rows})
        self._recorder.start(model, args.device, step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._recorder.measure(state.global_step)
            self._report(args, state, control, wait=control.should_save or control.should_training_stop)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._report(args, state, control, wait=control.should_save or control.should_training_stop)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:  # a save that on_step_end could not know of: of the best model, say
            self._report(args, state, control, wait=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._report(args, state, control, wait=True)
            self._recorder.close()

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, wait: bool
    ) -> None:
        for step, values in self._recorder.new_steps(wait):
            state.log_history.append({**values, "step": step})
            if self._trainer is not None:
                then = copy.copy(state)
                then.global_step = step
                # A copy of control, as on_log takes back a log of the trainer's own that is due.
                self._trainer.callback_handler.on_log(args, then, copy.copy(control), values)
        if wait:
            file = Path(args.output_dir) / HISTORY
            write_file(file, json.dumps(self._recorder.state_dict()).encode())
