"""What a penalty refuses, and what a failed call or an outdated cut leaves behind."""

import copy

import pytest
import torch
from support import mlp, samples
from torch import nn
from torch.utils.checkpoint import checkpoint

import lmnfast
from lmnfast import penalty as penalty_module

X = samples(8, 6)


def refused(name: str) -> tuple:
    return {
        "nan": (ValueError, "weight: expected a finite number, got nan", float("nan")),
        "text": (TypeError, "weight: expected a number, got 'a'", "a"),
        "none": (TypeError, "weight: expected a number, got None", None),
        "several": (TypeError, "weight: expected a number, got tensor", torch.ones(2)),
        "graph": (TypeError, "weight: .* requires grad", torch.tensor(0.1, requires_grad=True)),
    }[name]


@pytest.mark.parametrize("name", ["nan", "text", "none", "several", "graph"])
def test_a_weight_is_checked_also_when_it_is_set(name):
    error, message, weight = refused(name)
    with pytest.raises(error, match=message):
        lmnfast.Penalty(mlp(6, 9, 4), weight=weight)
    penalty = lmnfast.Penalty(mlp(6, 9, 4), weight=0.5)
    with pytest.raises(error, match=message):
        penalty.weight = weight
    assert penalty.weight == 0.5 and copy.deepcopy(penalty).weight == 0.5
    penalty.weight = torch.tensor(0.25)
    assert type(penalty.weight) is float and penalty.weight == 0.25


@pytest.mark.parametrize(
    "pairs, error, message",
    [
        (-1, ValueError, "pairs: expected 2 or more, or None for all, got -1"),
        (0, ValueError, "pairs: expected 2 or more, or None for all, got 0"),
        (1, ValueError, "pairs: expected 2 or more, or None for all, got 1"),
        (2.5, TypeError, "pairs: expected an integer or None, got 2.5"),
    ],
)
def test_a_number_of_pairs_that_no_samples_have_is_refused_at_once(pairs, error, message):
    with pytest.raises(error, match=message):
        lmnfast.Penalty(mlp(6, 9, 4), pairs=pairs)


def test_a_failed_call_does_not_count():
    penalty = lmnfast.Penalty(mlp(6, 9, 4), every=2)
    for _ in range(2):
        with pytest.raises(ValueError, match="two samples"):
            penalty(X[:1])
        with pytest.raises(RuntimeError, match="gradients on"), torch.no_grad():
            penalty(X)
    assert penalty.step == 0 and penalty.value is None
    assert penalty(X).requires_grad and penalty.step == 1
    assert not penalty(X).requires_grad and penalty.step == 2


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("of", ["pooled_curvature", "lmn"])
@pytest.mark.parametrize("calls", [0, 2])
def test_under_checkpoint_the_gradient_is_the_same(calls, of, softmax):
    model = nn.Sequential(mlp(6, 9), nn.SiLU(), nn.Linear(9, 4), *[nn.Softmax(1)] * softmax)
    parameters = list(model.parameters())
    penalty = lmnfast.Penalty(model, "0", of=of)
    expected = torch.autograd.grad(lmnfast.Penalty(model, "0", of=of)(X), parameters)
    for _ in range(calls):
        penalty(X)
    own = torch.autograd.grad(checkpoint(penalty, X, use_reentrant=False), parameters)
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


SCALE = {"it": 1.0}


class Outside(nn.Module):
    """A model that reads what no cut can see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.last((SCALE["it"] * self.first(x)).tanh())


def test_an_outdated_cut_is_made_again(monkeypatch):
    model = Outside()
    penalty = lmnfast.Penalty(model, "first")
    before = float(penalty(X).detach())
    cuts, cut_at = [], penalty_module.cut_at
    monkeypatch.setattr(penalty_module, "cut_at", lambda *args: cuts.append(1) or cut_at(*args))
    monkeypatch.setitem(SCALE, "it", 3.0)
    after = float(penalty(X).detach())
    assert len(cuts) == 1 and float(penalty(X).detach()) == after and len(cuts) == 1
    assert after == float(lmnfast.Penalty(model, "first")(X).detach()) != before


def test_an_error_of_the_measurement_is_shown_and_not_tried_twice(monkeypatch):
    penalty = lmnfast.Penalty(mlp(6, 9, 4))
    penalty(X)
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("no more memory")

    monkeypatch.setattr(penalty_module, "measure_with_graph", fails)
    with pytest.raises(RuntimeError, match="no more memory"):
        penalty(X)
    assert calls == [1]


def test_inputs_of_another_dtype_than_the_weights_are_named():
    model = nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 4))
    message = (
        r"inputs: are torch.bfloat16, but the model's parameter '0.weight' is torch.float32; .*"
        r"expected inputs.to\(torch.float32\)"
    )
    for layer in ("0", ""):
        penalty = lmnfast.Penalty(model, layer)
        with torch.autocast("cpu", torch.bfloat16):
            made = torch.nn.functional.linear(X, torch.eye(6))
            assert made.dtype == torch.bfloat16
            with pytest.raises(TypeError, match=message):
                penalty(made)
            assert penalty(made.float()).isfinite()


L = torch.eye(3).requires_grad_()


@pytest.mark.parametrize(
    "call",
    [
        lambda flag: lmnfast.connectivity(mlp(6, 9, 4), X, differentiable=flag),
        lambda flag: lmnfast.lmn(mlp(6, 9, 4), X, differentiable=flag),
        lambda flag: lmnfast.curvature(mlp(6, 9, 4), X, differentiable=flag),
        lambda flag: lmnfast.nonlinear_complexity(L, differentiable=flag),
        lambda flag: lmnfast.linear_mapping_number(L, differentiable=flag),
        lambda flag: lmnfast.participation_ratio(L, differentiable=flag),
    ],
)
@pytest.mark.parametrize("flag", ["no", 1, None])
def test_differentiable_is_true_or_false(call, flag):
    with pytest.raises(TypeError, match=f"differentiable: expected True or False, got {flag!r}"):
        call(flag)
