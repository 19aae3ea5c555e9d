"""The callback for Hugging Face's Trainer: what it reports, that training stays the same to the bit, and that it resumes."""

import json
import pickle
import types

import pytest
import torch
from logged import same_weights, scalars, steps
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import lmnfast
from lmnfast.integrations.transformers import LMNCallback as TransformersCallback

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


@pytest.mark.parametrize(
    "how",
    [
        {"layers": "transformer.h.0", "until": "transformer.h.1"},
        {"layers": None, "blocks": "transformer.h.*"},
        {"layers": None, "blocks": ["transformer.h.0.mlp", "transformer.h.1.attn"]},
    ],
)
def test_blocks_alone_and_maps_between_them_are_measured_in_a_trainer(how, tmp_path):
    bare, callback = trainer_in(tmp_path / "bare", steps=4), watching(every=4, **how)
    bare.train()
    trainer = trainer_in(tmp_path, callback, steps=4)
    trainer.train()
    assert same_weights(bare.model, trainer.model)
    names = BLOCKS if how.get("blocks") == "transformer.h.*" else how.get("blocks") or ["transformer.h.0"]
    assert [(r["step"], r["layer"]) for r in callback.history] == [
        (s, name) for s in (0, 4) for name in names
    ]
    for row in callback.history[-len(names) :]:
        of = {"layer": row["layer"], "until": how["until"]} if "until" in how else {"block": row["layer"]}
        tail, samples = lmnfast.cut(trainer.model, inputs={"input_ids": IDS[:6]}, **of)
        assert row["lmn"] == pytest.approx(float(lmnfast.lmn(tail, samples)), rel=1e-5)
        assert {f"lmn/{row['layer']}"} <= {key for entry in trainer.state.log_history for key in entry}


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


def test_a_trainer_reports_observables_on_a_schedule_and_resumes_with_them(tmp_path):
    names = ["curvature", "representation_rank", "l2_norm"]  # without eigenvalues
    bare = trainer_in(tmp_path / "bare")
    bare.train()
    callback = watching(every="log", layers="transformer.h.1", observables=names)
    trainer = trainer_in(tmp_path, callback, save_strategy="steps", save_steps=4)
    trainer.train()
    assert same_weights(bare.model, trainer.model)
    assert steps(callback) == [0, 1, 2, 5]
    for name in names:
        values = [(row["step"], row[name]) for row in callback.history]
        key = f"{name}/transformer.h.1"
        assert [(e["step"], e[key]) for e in trainer.state.log_history if key in e] == values
    assert not any(key.startswith("lmn/") for entry in trainer.state.log_history for key in entry)
    again = watching(every="log", layers="transformer.h.1", observables=names)
    trainer_in(tmp_path, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.history == callback.history


def test_a_trainer_measures_with_a_stabiliser_and_resumes_rows_without_the_column(tmp_path):
    def attached(steps):
        trainer = trainer_in(tmp_path, steps=steps, save_strategy="steps", save_steps=4)
        made = [watching(layers="transformer.h.1", **how) for how in ({}, {"stabiliser": 0.01})]
        return trainer, [callback.attach(trainer) for callback in made]

    trainer, first = attached(4)
    trainer.train()
    tail, samples = lmnfast.cut(trainer.model, "transformer.h.1", {"input_ids": IDS[:6]}, output="logits")
    for callback, stabiliser in zip(first, (0.0, 0.01), strict=True):
        row = callback.history[-1]
        expected = lmnfast.lmn(tail, samples, stabiliser=stabiliser).item()
        assert (row["step"], row["stabiliser"]) == (4, stabiliser)
        assert row["lmn"] == pytest.approx(expected, rel=1e-5)
    assert first[1].history[-1]["lmn"] > 1.01 * first[0].history[-1]["lmn"]
    path = tmp_path / "lmn_history.json"
    kept = json.loads(path.read_text())
    plain, other = kept
    assert "stabiliser" not in plain and json.loads(other)["stabiliser"] == 0.01
    for row in kept[plain]["rows"]:
        del row["stabiliser"]  # as an earlier version left it
    path.write_text(json.dumps(kept))
    trainer, second = attached(6)
    trainer.train(resume_from_checkpoint=True)
    for before, after in zip(first, second, strict=True):
        assert after.history[:3] == before.history and steps(after) == [0, 2, 4, 6]


def test_a_callback_pickles_before_in_and_after_a_training(tmp_path):
    class Pickled(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.copy = pickle.loads(pickle.dumps(callback))

    callback, within = watching(), Pickled()
    before = pickle.loads(pickle.dumps(callback))
    trainer = trainer_in(tmp_path / "first", callback, steps=4)
    trainer.add_callback(within)
    trainer.train()
    after = pickle.loads(pickle.dumps(callback))
    assert sorted({row["step"] for row in within.copy.history}) == [0, 2]
    assert within.copy.history == callback.history[:4] and after.history == callback.history
    assert before.history == []
    trainer_in(tmp_path / "second", before, steps=4).train()
    assert before.history == callback.history, "the copy measures as the callback does"
