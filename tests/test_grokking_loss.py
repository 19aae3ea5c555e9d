"""The dtype of the training's loss, and the round-off that it decides."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY
from torch.nn.functional import cross_entropy, one_hot

from lmnfast.grokking import read_run, train
from lmnfast.grokking.config import start
from lmnfast.grokking.gradients import Gradients, lost_gradients
from lmnfast.grokking.run import METRICS

FLOAT32 = replace(TINY, loss_dtype="float32")
SATURATED = replace(TINY, steps=100, every=100, learning_rate=0.01)  # memorises 20 samples to round-off
ADDED = ("optimizer", "batch", "train_fraction", "width", "depth", "loss_dtype")  # not in older runs


def gradients_of(model, task, loss_dtype):
    Gradients(model, task.train_inputs, task.train_labels, loss_dtype=loss_dtype)()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("factor", [1, 25], ids=["at the start", "memorised"])
def test_with_the_loss_in_float64_a_float32_network_has_the_gradients_of_float64(factor):
    task, model = start(TINY)
    with torch.no_grad():
        wanted = one_hot(task.train_labels, 5).float() * factor
        hidden = model[:-1](task.train_inputs)
        model.output.weight.copy_(torch.linalg.lstsq(hidden, wanted).solution.T)
        model.output.bias.zero_()
    ours, theirs = (gradients_of(model, task, dtype) for dtype in (torch.float64, torch.float32))
    model.double()
    loss = cross_entropy(model(task.train_inputs), task.train_labels)
    exact = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, expected in zip(ours, exact, strict=True):
        assert gradient.dtype == torch.float32 and expected.abs().max() > 0
        # The logits are of size `factor` and have the rounding of float32, which is the relative error of an exponential.
        error = (gradient - expected).abs().max() / expected.abs().max()
        assert error < 1e-4 * factor
    assert ours[-1].sum().abs() <= 1e-5 * ours[-1].abs().max()  # over the classes
    if factor > 1:
        lost = theirs[-1].double() - exact[-1]
        assert (
            lost.abs().max() > 0.5 * exact[-1].abs().max()
        )  # in float32 that of the true classes is missing
        assert (theirs[-1] > 0).all()


def test_the_gradients_of_the_loss_in_float32_are_to_the_bit_those_without_the_setting():
    task, model = start(replace(TINY, p=7))
    inputs, labels = task.train_inputs, task.train_labels
    embedding, w_1, b_1, w_2, b_2, w_3, b_3 = (p.detach() for p in model.parameters())
    first, second = w_1[:, :32], w_1[:, 32:]
    square = torch.mm(embedding, first.T)[:, None] + torch.addmm(b_1, embedding, second.T)
    a, b = inputs.unbind(1)
    z_1 = square[a, b]
    a_1 = torch.nn.functional.silu(z_1)
    z_2 = torch.addmm(b_2, a_1, w_2.T)
    a_2 = torch.nn.functional.silu(z_2)
    logits = torch.addmm(b_3[:, None], w_3, a_2.T)
    d = (torch.softmax(logits, 0) - one_hot(labels, 7).T) / len(inputs)
    d_2 = torch.ops.aten.silu_backward(torch.mm(d.T, w_3), z_2)
    d_1 = torch.ops.aten.silu_backward(torch.mm(d_2, w_2), z_1)
    square = torch.zeros(7, 7, 100)
    square[a, b] = d_1
    by_first, by_second = square.sum(1), square.sum(0)
    expected = [
        torch.addmm(by_first @ first, by_second, second),
        torch.cat([torch.mm(by_first.T, embedding), torch.mm(by_second.T, embedding)], 1),
        by_second.sum(0),
        torch.mm(d_2.T, a_1),
        d_2.sum(0),
        torch.mm(d, a_2),
        d.sum(1),
    ]
    for ours, theirs in zip(gradients_of(model, task, torch.float32), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(gradients_of(model, task, torch.float64)[-1], expected[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_lost_gradient_is_a_softmax_of_exactly_1_at_the_label(dtype):
    digits = 24 if dtype == torch.float32 else 53
    threshold = digits * math.log(2)
    gaps = torch.linspace(threshold - 2, threshold + 2, 1000)
    gaps = gaps[(gaps - threshold).abs() > 1e-5]  # nearer than that the rounding of the exponential decides
    logits = torch.stack([gaps, torch.zeros_like(gaps)], 1).to(dtype)
    labels = torch.zeros(len(gaps), dtype=torch.int64)
    alone = torch.stack([lost_gradients(z[None], y[None], dtype) for z, y in zip(logits, labels)])
    actual = torch.softmax(logits, 1)[:, 0] == 1
    assert torch.equal(alone == 1, actual) and 0 < actual.sum() < len(gaps)
    assert lost_gradients(logits, labels, dtype) == actual.sum()
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf, labels, reduction="sum").backward()
    assert torch.equal(leaf.grad[:, 0] == 0, actual)


def test_lost_are_those_that_a_sum_from_1_on_loses_and_no_order_of_summation_loses_others():
    rng = np.random.default_rng(0)
    others = rng.dirichlet(np.ones(30), 400) * 2 ** rng.uniform(-26, -18, (400, 1))
    logits = torch.from_numpy(np.log(np.concatenate([np.ones((400, 1)), others], 1)))
    labels = torch.zeros(400, dtype=torch.int64)
    counted = np.array([lost_gradients(z[None], labels[:1], torch.float32).item() for z in logits]) == 1
    assert 100 < counted.sum() < 300 and counted.sum() == lost_gradients(logits, labels, torch.float32)
    assert lost_gradients(logits, labels, torch.float64) == 0
    total = np.ones(400, np.float32)
    for e in others.astype(np.float32).T:
        total += e
    assert ((total == 1) == counted).all()
    for order in (slice(None), slice(None, None, -1), rng.permutation(31)):
        moved = logits.float()[:, np.arange(31)[order].copy()]
        softmax = [torch.softmax(moved, 1), torch.softmax(moved.T.contiguous(), 0).T]
        actual = np.array([(p.amax(1) == 1).numpy() for p in softmax])
        assert actual.any(1).all() and not (actual & ~counted).any()
    assert (counted >= (others.sum(1) <= 2**-24)).all()


def test_the_threshold_is_half_an_ulp_of_1():
    at = torch.tensor([[0.0, -24 * math.log(2), -40.0]], dtype=torch.float64)
    for more, count in ((-1e-9, 1), (1e-9, 0)):
        found = lost_gradients(at + torch.tensor([0, more, 0]), torch.tensor([0]), torch.float32)
        assert found == count


def test_a_sample_that_is_wrong_or_has_nan_has_lost_nothing():
    logits = torch.tensor([[50.0, 0.0], [1e30, 0.0], [float("nan"), 0.0], [0.0, float("nan")]])
    for label, count in ((0, 2), (1, 0)):
        labels = torch.full((4,), label)
        assert lost_gradients(logits, labels, torch.float32) == count


def test_a_run_loses_gradients_with_the_loss_in_float32_and_none_in_float64(tmp_path):
    lost = {}
    for dtype in ("float32", "float64"):
        run = train(replace(SATURATED, loss_dtype=dtype), tmp_path / dtype)
        lost[dtype] = [row["lost_gradients"] for row in run.rows]
        assert all(type(count) is int for count in lost[dtype])
        assert json.loads((run.path / "config.json").read_text())["loss_dtype"] == dtype
        assert run.rows[-1]["train_accuracy"] == 1
    assert lost["float32"][0] == 0 and 0 < lost["float32"][-1] <= 20
    assert lost["float64"] == [0, 0]


@pytest.fixture
def old_run(tmp_path):
    """A run, stopped at step 10, as older versions left it: without the settings and the column that are new."""
    path = tmp_path / "old"
    train(replace(FLOAT32, steps=10), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ADDED}))
    (path / "metrics.csv").write_text(without_the_column(path))
    return path


def without_the_column(path: Path) -> str:
    lines = [line.split(",") for line in (path / "metrics.csv").read_text().splitlines()]
    place = lines[0].index("lost_gradients")
    return "".join(",".join(line[:place] + line[place + 1 :]) + "\n" for line in lines)


def test_a_run_of_a_version_without_the_setting_is_float32_and_goes_on_to_the_same_bytes(old_run, tmp_path):
    assert read_run(old_run).config == replace(FLOAT32, steps=10)
    with pytest.raises(ValueError, match="loss_dtype is float32 there, float64 here"):
        train(TINY, old_run)
    whole = train(FLOAT32, tmp_path / "whole")
    run = train(FLOAT32, old_run)
    assert (old_run / "metrics.csv").read_text() == without_the_column(whole.path)
    assert [row["step"] for row in run.rows] == [0, 5, 10, 15, 20]
    for step in (15, 20):
        name = f"checkpoints/step_{step:08}.pt"
        assert (old_run / name).read_bytes() == (whole.path / name).read_bytes()


def test_only_a_float32_run_may_lack_the_column(finished, tmp_path):
    path = Path(shutil.copytree(finished.path, tmp_path / "run"))
    (path / "metrics.csv").write_text(without_the_column(path))
    with pytest.raises(ValueError, match="metrics.csv lacks the columns lost_gradients"):
        read_run(path)
    assert METRICS[-1] == "lost_gradients"  # what a table of an old run is read without
