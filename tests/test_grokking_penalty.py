"""A penalty beside the loss of a run, and the end of a run at test accuracy 1."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY
from torch import nn
from torch.nn.functional import cross_entropy

from lmnfast import cli, cut, jacobians
from lmnfast.grokking import Config, read_run, train
from lmnfast.grokking.choices import PENALTIES
from lmnfast.grokking.config import start
from lmnfast.grokking.gradients import Gradients
from lmnfast.grokking.model import make_model
from lmnfast.grokking.penalty import WeightedPenalty, jacobian_norm
from lmnfast.grokking.tasks import make_task
from lmnfast.grokking.training import _Training
from lmnfast.runs.files import read_tensors, save_tensors

PENALISED = replace(TINY, penalty="jacobian_norm", penalty_weight=0.1, penalty_samples=8)
GROKS = Config(  # generalises at 360 of 400
    *("xor", None, 3, 400, 10, 1),
    samples=4,
    train_fraction=0.95,
    learning_rate=1e-2,
    threads=1,
    device="cpu",
)


def weights_of(path: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(path / f"checkpoints/step_{step:08}.pt")


# The Jacobian's norm


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_jacobian_norm_and_its_gradient_are_those_of_the_jacobians(depth, activation):
    generator = torch.Generator().manual_seed(0)
    task = make_task("modular-addition", generator, p=7)
    model = make_model(7, generator, width=9, depth=depth, activation=activation).double()
    inputs = task.train_inputs[:5]
    f, x = cut(model, "hidden_1", inputs)
    torch.testing.assert_close(
        jacobian_norm(model, inputs), jacobians(f, x).square().sum((1, 2)).mean(), rtol=1e-12, atol=0
    )
    behind = nn.Sequential(*list(model)[list(dict(model.named_children())).index("hidden_1") + 1 :])
    samples = model[:3](inputs)
    rows = [
        torch.autograd.functional.jacobian(behind, x, create_graph=True).square().sum()
        for x in samples.unbind()
    ]
    expected = torch.autograd.grad(sum(rows) / 5, list(model.parameters()), materialize_grads=True)
    ours = torch.autograd.grad(jacobian_norm(model, inputs), list(model.parameters()), materialize_grads=True)
    assert expected[-2].abs().max() > 0
    for gradient, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)


# The training


@pytest.mark.parametrize("every", [1, 3])
def test_an_update_takes_the_loss_plus_the_weighted_penalty(every):
    config = replace(PENALISED, penalty_every=every)
    task, model = start(config)
    ours = Gradients(model, task.train_inputs, task.train_labels)
    penalty = WeightedPenalty(model, task.train_inputs, config)
    drawn = torch.Generator().manual_seed(config.seed + 1_000_000_007)
    for step in range(1, 5):
        ours()
        penalty(step)
        loss = cross_entropy(model(task.train_inputs).double(), task.train_labels)
        if step % every == 0:
            samples = task.train_inputs[torch.randperm(len(task.train_inputs), generator=drawn)[:8]]
            value = jacobian_norm(model, samples)
            assert penalty.value.item() == pytest.approx(value.item(), rel=1e-6)
            loss = loss + 0.1 * every * value
        for p, wanted in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", PENALTIES)
def test_each_penalty_falls_where_its_weight_is_large(of, tmp_path):
    config = replace(TINY, every=20, learning_rate=1e-2, penalty=of, penalty_samples=16, penalty_weight=0.0)
    weak, strong = (
        train(replace(config, penalty_weight=weight), tmp_path / str(weight)) for weight in (0.0, 100.0)
    )
    assert strong.rows[0] == weak.rows[0] and weak.rows[0]["penalty"] > 0
    assert strong.rows[-1]["penalty"] < 0.7 * weak.rows[-1]["penalty"]


def test_without_a_penalty_the_bits_and_the_files_are_as_ever(finished, tmp_path):
    """A penalty of weight 0 draws its samples from numbers of its own."""
    run = train(replace(PENALISED, penalty_weight=0.0), tmp_path / "zero")
    for name, value in weights_of(finished.path, 20).items():
        assert torch.equal(weights_of(run.path, 20)[name], value), name
    assert "penalty" not in finished.rows[0] and "penalty" not in read_tensors(finished.path / "state.pt")
    assert [name for name in run.rows[0] if name not in finished.rows[0]] == ["penalty"]


@pytest.mark.parametrize("every", [1, 3, 7])
@pytest.mark.parametrize("of", ["jacobian_norm", "pooled_curvature"])
def test_a_stopped_run_continues_with_the_same_bytes(of, every, tmp_path):
    config = replace(PENALISED, penalty=of, penalty_every=every, batch=7)
    whole = train(config, tmp_path / "whole")
    for stopped in (5, 10):
        path = tmp_path / str(stopped)
        train(replace(config, steps=stopped), path)
        train(config, path)
        assert (path / "metrics.csv").read_bytes() == (whole.path / "metrics.csv").read_bytes()
        for name, value in weights_of(whole.path, 20).items():
            assert torch.equal(weights_of(path, 20)[name], value), name
    assert all(math.isfinite(row["penalty"]) for row in whole.rows)
    assert read_run(whole.path) == whole


def test_the_settings_are_written_and_another_one_is_refused(tmp_path):
    run = train(PENALISED, tmp_path)
    stored = json.loads((run.path / "config.json").read_text())
    assert (stored["penalty"], stored["penalty_weight"], stored["penalty_samples"]) == (
        "jacobian_norm",
        0.1,
        8,
    )
    for change, message in (
        ({"penalty_weight": 0.2}, "penalty_weight is 0.1 there, 0.2 here"),
        ({"penalty_samples": 9}, "penalty_samples is 8 there, 9 here"),
        ({"penalty_every": 2}, "penalty_every is 4 there, 2 here"),
        ({"penalty": "lmn"}, "penalty is jacobian_norm there, lmn here"),
    ):
        with pytest.raises(ValueError, match=message):
            train(replace(PENALISED, **change), tmp_path)


def test_a_run_of_a_version_without_these_settings_continues(finished, tmp_path):
    run = train(replace(TINY, steps=10), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    kept = {name: v for name, v in stored.items() if not name.startswith(("penalty", "until_accurate"))}
    assert len(kept) == len(stored) - 5
    (tmp_path / "config.json").write_text(json.dumps(kept))
    run = train(TINY, tmp_path)
    assert (run.path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()


def test_samples_that_are_not_set_are_64_or_all(tmp_path):
    config = replace(TINY, steps=5, penalty="lmn", penalty_weight=0.1)
    run = train(config, tmp_path)
    assert run.config.penalty_samples == config.trained_on == 20
    assert json.loads((tmp_path / "config.json").read_text())["penalty_samples"] == 20
    assert train(config, tmp_path) == run == train(replace(config, penalty_samples=20), tmp_path)
    assert replace(config, p=31).settled().penalty_samples == 64
    assert replace(TINY, penalty_samples=64) == TINY  # written by earlier versions without a penalty
    assert TINY.settled().penalty_samples is None


@pytest.mark.parametrize(
    "change",
    [
        {"penalty": None},
        {"penalty": {"generator": torch.zeros(3, dtype=torch.uint8), "value": torch.zeros(())}},
    ],
)
def test_a_state_without_the_penaltys_numbers_is_named(change, tmp_path):
    train(replace(PENALISED, steps=5), tmp_path)
    save_tensors(tmp_path / "state.pt", {**read_tensors(tmp_path / "state.pt"), **change})
    with pytest.raises(ValueError, match=r"^out: cannot read .*state\.pt, .*; --force starts the run anew"):
        train(PENALISED, tmp_path)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"penalty": "hessian"}, "penalty: expected one of pooled_curvature, .*jacobian_norm, got 'hessian'"),
        ({"penalty": "lmn"}, "penalty_weight: expected a number for the penalty lmn, got none"),
        (
            {"penalty": "lmn", "penalty_weight": -1},
            "penalty_weight: expected a finite number of at least 0, got -1",
        ),
        ({"penalty": "lmn", "penalty_weight": math.inf}, "penalty_weight: expected a finite number"),
        ({"penalty": "lmn", "penalty_weight": "1"}, "penalty_weight: expected a number, got '1'"),
        (
            {"penalty": "lmn", "penalty_weight": 1, "penalty_samples": 1},
            "penalty_samples: expected 2 to 20, .*, got 1",
        ),
        (
            {"penalty": "lmn", "penalty_weight": 1, "penalty_samples": 64},
            "penalty_samples: expected 2 to 20, .*, got 64",
        ),
        (
            {"penalty": "lmn", "penalty_weight": 1, "penalty_samples": 8.5},
            "penalty_samples: expected an integer, got 8.5",
        ),
        (
            {"penalty": "lmn", "penalty_weight": 1, "penalty_samples": 8, "penalty_every": 0},
            "penalty_every: expected at least 1, got 0",
        ),
        ({"penalty_weight": 0.1}, "penalty_weight: expected a penalty with it, got 0.1 without one"),
        ({"penalty_samples": 8}, "penalty_samples: expected a penalty with it, got 8 without one"),
        ({"penalty_every": 2}, "penalty_every: expected a penalty with it, got 2 without one"),
        ({"until_accurate": 1}, "until_accurate: expected True or False, got 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **given)


def test_the_command_line_has_every_setting(tmp_path, capsys):
    command = ["grok", "modular-addition", "--p=5", "--steps=2", "--every=1", f"--out={tmp_path}", "-q"]
    given = ["--penalty=jacobian_norm", "--penalty-weight=0.5", "--penalty-samples=7", "--penalty-every=2"]
    assert cli.main([*command, *given, "--until-accurate"]) == 0
    config = read_run(tmp_path).config
    assert (config.penalty, config.penalty_weight, config.penalty_samples, config.penalty_every) == (
        *("jacobian_norm", 0.5, 7, 2),
    )
    assert config.until_accurate
    assert "penalty         jacobian_norm x 0.5 of 7 samples: end " in capsys.readouterr().out
    assert cli.main([*command, "--penalty=lmn"]) == 2
    assert "penalty_weight: expected a number for the penalty lmn, got none" in capsys.readouterr().err


# The end at test accuracy 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = train(GROKS, tmp_path_factory.mktemp("whole"))
    assert run.generalised is not None and 0 < run.generalised < GROKS.steps - GROKS.every
    return run


def test_a_run_ends_where_it_is_accurate_and_goes_on_when_it_is_asked_to(whole, tmp_path, monkeypatch):
    short = train(replace(GROKS, until_accurate=True), tmp_path)
    assert short.rows == whole.rows[: len(short.rows)] and short.rows[-1]["step"] == whole.generalised
    with monkeypatch.context() as fixed:
        fixed.setattr(_Training, "_update", lambda *_: pytest.fail("trained on"))
        assert train(replace(GROKS, until_accurate=True), tmp_path) == short
        assert train(replace(GROKS, until_accurate=True, steps=500), tmp_path).rows == short.rows
    with pytest.raises(ValueError, match="steps is 500 there, 400 here"):
        train(GROKS, tmp_path)
    longer = train(replace(GROKS, steps=500), tmp_path)
    assert longer.rows[: len(whole.rows)] == whole.rows and longer.rows[-1]["step"] == 500
    with pytest.raises(ValueError, match="until_accurate is False there, True here"):
        train(replace(GROKS, steps=500, until_accurate=True), tmp_path)


def test_a_run_that_is_never_accurate_ends_at_its_last_step(finished, tmp_path):
    run = train(replace(TINY, until_accurate=True), tmp_path)
    assert run.rows == finished.rows
