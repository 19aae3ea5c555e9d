"""What has no gradient, or none any more, is an error."""

import itertools

import pytest
import torch
from graphs import LOBATTO
from support import mlp, samples
from torch import Tensor, nn

import lmnfast


def graph_of(kind: str) -> tuple[Tensor, nn.Module]:
    f = mlp(6, 9, 4) if kind == "chain" else nn.Sequential(mlp(6, 9, 4), nn.Softmax(1))
    return lmnfast.curvature(f, samples(6, 6), **LOBATTO, differentiable=True), f


@pytest.mark.parametrize("kind", ["chain", "function"])
def test_a_change_in_place_before_the_backward_pass_is_an_error(kind):
    c, f = graph_of(kind)
    with torch.no_grad():
        next(f.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        c.backward()


@pytest.mark.parametrize("kind", ["chain", "function"])
def test_there_is_no_second_derivative_and_no_second_pass(kind):
    c, f = graph_of(kind)
    (first,) = torch.autograd.grad(c, [next(f.parameters())], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    c, f = graph_of(kind)
    c.backward()
    with pytest.raises(RuntimeError, match="second time"):
        c.backward()


CHAIN, X = mlp(6, 9, 4), samples(6, 6)
FROZEN = mlp(6, 9, 4).requires_grad_(False)
ERRORS = {
    "method": (
        ValueError,
        "method 'path'",
        lambda: lmnfast.connectivity(CHAIN, X, method="hermite", differentiable=True),
    ),
    "stacked": (
        ValueError,
        "without stacked",
        lambda: lmnfast.lmn(CHAIN, X, stacked=torch.func.stack_module_state([CHAIN]), differentiable=True),
    ),
    "frozen": (RuntimeError, "no graph", lambda: lmnfast.lmn(FROZEN, X, differentiable=True)),
    "frozen function": (
        RuntimeError,
        "no graph",
        lambda: lmnfast.lmn(lambda x: torch.softmax(FROZEN(x), 1), X, differentiable=True),
    ),
    "detached": (
        RuntimeError,
        "no grad_fn",
        lambda: lmnfast.curvature(
            lambda x: CHAIN(x).detach(), X.clone().requires_grad_(), differentiable=True
        ),
    ),
    "one sample": (ValueError, "two samples", lambda: lmnfast.curvature(CHAIN, X[:1], differentiable=True)),
    "no pairs": (
        ValueError,
        "pairs: expected 2",
        lambda: lmnfast.curvature(CHAIN, X, pairs=0, differentiable=True),
    ),
    "L": (
        RuntimeError,
        "does not require grad",
        lambda: lmnfast.participation_ratio(torch.eye(3), differentiable=True),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_has_no_gradient_is_an_error(name):
    error, message, call = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_gradients_must_be_on():
    L = lmnfast.connectivity(CHAIN, X, differentiable=True)
    for off, call in itertools.product(
        (torch.no_grad, torch.inference_mode),
        (
            lambda: lmnfast.connectivity(CHAIN, X, differentiable=True),
            lambda: lmnfast.nonlinear_complexity(L, differentiable=True),
        ),
    ):
        with off(), pytest.raises(RuntimeError, match="gradients"):
            call()
