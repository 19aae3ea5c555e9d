"""A chain evaluates its formula and refuses what does not fit."""

import pytest
import torch
from torch import nn

from lmnfast._chain import Activation, Chain
from lmnfast._recognise import recognise


def test_a_chain_refuses_samples_of_another_width():
    chain = recognise(nn.Linear(3, 2))
    assert chain(torch.zeros(5, 3, 1)).shape == (5, 2)
    assert chain(torch.zeros(0, 3)).shape == (0, 2)
    with pytest.raises(ValueError, match=r"x: expected samples of 3 elements, got shape \(5, 4, 3\)"):
        chain(torch.zeros(5, 4, 3))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="name: expected one of identity, relu, .*, sin, got 'swish'"):
        Activation("swish")


def test_chain_evaluates_the_formula():
    torch.manual_seed(0)
    w, v, b = torch.randn(4, 3), torch.randn(2, 4), torch.randn(4)
    chain = Chain((w, v), (b, None), tuple(map(Activation, ("sin", "relu", "tanh"))))
    x = torch.randn(6, 3)
    torch.testing.assert_close(chain(x), torch.tanh(torch.relu(x.sin() @ w.T + b) @ v.T))
    activations = chain.activations[1:2] * 3 + chain.activations[2:]
    z = x.relu() @ w.T + b
    s = (z.relu() + z) @ w + x.relu()
    u = s.relu() @ v[:, :3].T
    chain = Chain((w, w.T, v[:, :3]), (b, None, None), activations, skips=((3, 2), (4, 1), (7, 6)))
    torch.testing.assert_close(chain(x), u.tanh() + u)


@pytest.mark.parametrize(
    "part, value, error, message",
    [
        ("weights", (), ValueError, "weights: expected one or more, got none"),
        (
            "weights",
            (torch.ones(3), torch.ones(2, 4)),
            ValueError,
            r"weights\[0\]: expected \(out, in\), got shape \(3,\)",
        ),
        (
            "weights",
            (torch.ones(4, 3), torch.ones(2, 5)),
            ValueError,
            r"weights\[1\]: expected \(out, 4\), got shape \(2, 5\)",
        ),
        (
            "weights",
            (torch.ones(4, 3), torch.ones(2, 4).double()),
            TypeError,
            r"weights\[1\]: expected torch.float32",
        ),
        (
            "weights",
            (torch.ones(4, 3), torch.ones(2, 4, device="meta")),
            TypeError,
            r"weights\[1\]: .* on meta",
        ),
        (
            "weights",
            (torch.ones(4, 3).int(), torch.ones(2, 4).int()),
            TypeError,
            r"weights\[0\]: .* got torch.int32",
        ),
        ("biases", (None,), ValueError, "biases: expected 2, a tensor or None for each weight, got 1"),
        ("biases", (torch.ones(3), None), ValueError, r"biases\[0\]: expected \(4,\), got shape \(3,\)"),
        ("biases", (torch.ones(4).half(), None), TypeError, r"biases\[0\]: expected torch.float32"),
        (
            "activations",
            (Activation("relu"),) * 2,
            ValueError,
            "activations: expected 3 for 2 weights, got 2",
        ),
        ("skips", ((6, 0),), ValueError, "skips: .* is no earlier value for a later one, once"),
        ("skips", ((2, 1),), ValueError, r"skips: \(2, 1\) adds a value of width 3 to one of width 4"),
    ],
)
def test_a_chain_refuses_what_does_not_fit(part, value, error, message):
    parts = {
        "weights": (torch.ones(4, 3), torch.ones(2, 4)),
        "biases": (None, None),
        "activations": (Activation("relu"),) * 3,
    }
    Chain(**parts)
    with pytest.raises(error, match=message):
        Chain(**{**parts, part: value})
