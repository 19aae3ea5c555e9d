"""Every setting of the training and of its network: it reaches the training, config.json, a resumed run and a refusal."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY
from torch.nn.functional import cross_entropy

from lmnfast import cli
from lmnfast.grokking import train
from lmnfast.grokking.batches import Batches
from lmnfast.grokking.choices import layers_of, training_samples
from lmnfast.grokking.config import start
from lmnfast.grokking.figures import draw
from lmnfast.grokking.gradients import Gradients
from lmnfast.grokking.measure import measure
from lmnfast.grokking.model import make_model
from lmnfast.grokking.run import METRICS
from lmnfast.grokking.tasks import make_task
from lmnfast.runs.files import read_tensors, save_tensors

# A value of each setting that is not the default, and how the command line spells it.
OTHERS = {
    "learning_rate": (2e-3, "--lr=0.002"),
    "weight_decay": (0.5, "--weight-decay=0.5"),
    "train_fraction": (0.5, "--train-fraction=0.5"),
    "width": (20, "--width=20"),
    "depth": (3, "--depth=3"),
    "activation": ("relu", "--activation=relu"),
    "optimizer": ("sgd", "--optimizer=sgd"),
    "batch": (7, "--batch=7"),
    "loss_dtype": ("float32", "--loss-dtype=float32"),
}


def weights_of(path: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(path / f"checkpoints/step_{step:08}.pt")


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_changes_the_training_and_is_written_resumed_and_refused(name, finished, tmp_path):
    config = replace(TINY, **{name: OTHERS[name][0]})
    whole = train(config, tmp_path / "whole")
    assert json.loads((whole.path / "config.json").read_text())[name] == OTHERS[name][0]
    ours, default = (weights_of(path, 20) for path in (whole.path, finished.path))
    assert ours.keys() != default.keys() or not all(
        ours[key].shape == value.shape and torch.equal(ours[key], value) for key, value in default.items()
    )
    for stopped in (5, 10):  # batches: within an epoch, and at its end
        path = tmp_path / f"stopped-{stopped}"
        train(replace(config, steps=stopped), path)
        train(config, path)
        assert (path / "metrics.csv").read_bytes() == (whole.path / "metrics.csv").read_bytes()
    there, here = OTHERS[name][0], getattr(TINY, name)
    with pytest.raises(ValueError, match=f"{name} is {there} there, {here} here"):
        train(TINY, whole.path)


def test_the_command_line_has_every_setting(tmp_path):
    options = [option for _, option in OTHERS.values()]
    command = ["grok", "modular-addition", "--p=5", "--steps=2", "--every=1", *options]
    assert cli.main([*command, "--layers", "hidden_3", f"--out={tmp_path}"]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in OTHERS} == {name: value for name, (value, _) in OTHERS.items()}
    assert config["layers"] == ["hidden_3"]


# The network


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_gradients_are_autograds_at_any_width_and_depth(depth):
    generator = torch.Generator().manual_seed(0)
    task = make_task("modular-addition", generator, p=7)
    model = make_model(7, generator, width=9, depth=depth).double()
    Gradients(model, task.train_inputs, task.train_labels)()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    loss = cross_entropy(model(task.train_inputs), task.train_labels)
    assert len(ours) == 2 * depth + 3
    for gradient, expected in zip(ours, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_the_layers_that_can_be_measured_follow_the_depth(tmp_path):
    assert layers_of(1) == ("embedding", "hidden_1_pre", "hidden_1")
    run = train(replace(TINY, depth=3, width=8, steps=5, layers=layers_of(3)), tmp_path)
    assert all(row["lmn_hidden_1"] > row["lmn_hidden_3"] for row in run.rows)
    assert run.rows[0]["lmn_hidden_3"] == pytest.approx(1, abs=1e-3)  # from there on the network is affine
    with pytest.raises(
        ValueError, match="layers: expected some of embedding, .*hidden_3, each once, got hidden_4"
    ):
        measure(tmp_path, layers=["hidden_4"])
    with pytest.raises(ValueError, match="layers: expected some of .*hidden_1, each once, got hidden_2"):
        replace(TINY, depth=1, layers=("hidden_2",))


def test_force_deletes_the_figures_and_tables_of_deep_layers_too(tmp_path):
    train(replace(TINY, depth=3, steps=5, layers=("hidden_3_pre",)), tmp_path)
    written = [*draw(tmp_path), measure(tmp_path)[0]]
    assert all(file.exists() for file in written)
    train(replace(TINY, steps=5), tmp_path, force=True)
    assert not any(file.exists() for file in written)


# The split


def test_a_share_of_the_pairs_is_the_decimal_number_that_was_written():
    for percent in range(2, 100):  # 0.57 * 100 is less than 57 in floating point
        assert training_samples("modular-addition", p=10, fraction=percent / 100) == percent
    assert training_samples("s4", fraction=0.5) == 288
    task = make_task("modular-addition", torch.Generator().manual_seed(0), p=10, fraction=0.57)
    assert len(task.train_inputs) == 57 and len(task.test_inputs) == 43


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5, 0.07])
def test_a_share_that_leaves_too_few_pairs_is_refused(fraction):
    with pytest.raises(
        ValueError, match=f"train_fraction: expected a share .* of the 25 pairs .*, got {fraction}"
    ):
        replace(TINY, train_fraction=fraction)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": -1e-3}, "learning_rate: expected a finite number of at least 0, got -0.001"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number of at least 0, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number of at least 0, got inf"),
        ({"train_fraction": "half"}, "train_fraction: expected a number, got 'half'"),
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"width": 8193}, "width: expected at most 8192, got 8193"),
        ({"width": None}, "width: expected an integer, got None"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"depth": 65}, "depth: expected at most 64, got 65"),
        ({"depth": 2.0}, "depth: expected an integer, got 2.0"),
        ({"batch": 0}, "batch: expected 1 to 20, all that are trained on, got 0"),
        ({"batch": 21}, "batch: expected 1 to 20, all that are trained on, got 21"),
        ({"train_fraction": 0.5, "batch": 13}, "batch: expected 1 to 12, all that are trained on, got 13"),
        (
            {"train_fraction": 0.5, "samples": 13},
            "samples: expected 2 to 12, all that are trained on, got 13",
        ),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, sgd, got 'lion'"),
        ({"loss_dtype": "float16"}, "loss_dtype: expected one of float64, float32, got 'float16'"),
        ({"loss_dtype": ["float64"]}, "loss_dtype: expected one of float64, float32, got"),
    ],
)
def test_a_setting_that_no_run_can_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


# Batches and optimisers


@pytest.mark.parametrize(
    "change", [{"batch": 7}, {"batch": 20}, {"optimizer": "sgd"}, {"optimizer": "sgd", "batch": 3}]
)
def test_a_run_takes_the_steps_of_a_plain_loop(change, tmp_path):
    rate = 0.1 if "optimizer" in change else 1e-3
    config = replace(TINY, learning_rate=rate, **change)
    run = train(config, tmp_path)
    generator = torch.Generator().manual_seed(0)
    task, model = start(config, generator)
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    optimiser = kind(model.parameters(), lr=rate, weight_decay=0.2)
    size, step = config.batch or 20, 0
    while step < 20:
        order = torch.randperm(20, generator=generator) if config.batch else torch.arange(20)
        for chosen in order[: 20 // size * size].split(size):
            if step < 20:
                optimiser.zero_grad()
                cross_entropy(model(task.train_inputs[chosen]), task.train_labels[chosen]).backward()
                optimiser.step()
                step += 1
    found = weights_of(run.path, 20)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        loss = cross_entropy(model(task.train_inputs), task.train_labels)
    assert run.rows[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-4)  # of all samples


def test_an_epoch_has_every_sample_once_but_the_rest_and_a_copy_goes_on_with_the_same_batches():
    def drawn(batches, count):
        found = []
        for _ in range(count):
            batches.advance()
            found.append(batches.chosen.clone())
        return torch.stack(found)

    batches = Batches(10, 3, torch.Generator().manual_seed(1), "cpu")
    place = batches.chosen.data_ptr()
    epochs = drawn(batches, 30).view(10, 9)
    assert all(len(epoch.unique()) == 9 for epoch in epochs) and len(epochs.unique(dim=0)) == 10
    assert len(epochs.unique()) == 10  # what one epoch leaves out comes in others
    for taken in range(4):
        state = batches.state_dict()
        other = Batches(10, 3, torch.Generator().manual_seed(2), "cpu")
        other.load_state_dict(state)
        assert torch.equal(drawn(batches, 7), drawn(other, 7)), taken
    assert batches.chosen.data_ptr() == place


@pytest.mark.parametrize(
    "change", [None, {}, {"taken": 3}, {"taken": 1.0}, {"drawn_from": torch.zeros(3)}, {"taken": 1}]
)
def test_a_state_without_its_batches_is_named(change, tmp_path):
    config = replace(TINY, batch=7, steps=5)
    train(config, tmp_path)
    state = read_tensors(tmp_path / "state.pt")
    batches = state.pop("batches")
    assert batches["taken"] == 1  # so the last change is none
    if change is not None:
        state["batches"] = change and {**batches, **change}
    save_tensors(tmp_path / "state.pt", state)
    if change and type(change.get("taken")) is int and change["taken"] == 1:
        assert train(replace(config, steps=10), tmp_path).rows[-1]["step"] == 10
        return
    with pytest.raises(ValueError, match=r"^out: cannot read .*state\.pt, .*; --force starts the run anew"):
        train(replace(config, steps=10), tmp_path)


def test_a_batch_of_all_samples_is_the_full_batch_but_for_rounding(finished, tmp_path):
    run = train(replace(TINY, batch=20), tmp_path)
    for row, known in zip(run.rows, finished.rows, strict=True):
        assert all(row[name] == pytest.approx(known[name], rel=1e-4) for name in METRICS)
