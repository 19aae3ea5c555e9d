"""Which route a layer takes, and why."""

import pytest
import torch
from architectures import NETWORKS, Functional, vectors
from torch import nn

import lmnfast
from lmnfast import _route

EXPLAINED = {
    ("functional", "first"): ["fused kernel: 12 silu -> 9 gelu -> 3"],
    ("layer norm", "0"): ["generic", "LayerNorm '1' is neither a Linear nor a pointwise activation"],
    ("residual", "stem"): [
        "fused kernel: 10 -> 14 gelu -> 10 + -> 14 gelu -> 10 + -> 4; Jacobians by automatic differentiation"
    ],
    ("residual, layer norm", "stem"): ["generic", "LayerNorm 'blocks.0.0' is neither a Linear"],
    ("convolution", "features"): ["fused kernel: 6 -> 8 relu -> 3"],
    ("lstm", "lstm"): ["generic"],
}


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_says_which_route_and_why(case, with_inputs, capsys):
    make, draw, _ = NETWORKS[case[0]]
    lmnfast.explain(make(), case[1], draw() if with_inputs else None)
    said = capsys.readouterr().out
    assert said.startswith(f"{case[1]}:")
    for part in EXPLAINED[case] if with_inputs or case[0] != "lstm" else []:
        assert part in said
    assert ("samples of shape" in said) == with_inputs


def test_explain_says_why_a_hook_is_needed(capsys):
    class Counting(Functional):
        def forward(self, x):
            y = super().forward(x)
            return y if float(y.sum()) < 1e9 else x

    lmnfast.explain(Counting(), "first", vectors())
    said = capsys.readouterr().out
    assert "generic: a forward hook replaces the layer's output, as torch.fx cannot trace the model (" in said
    assert (
        "), and as the model reads values of the network (__float__); the parts before the layer run once in a"
        in said
    )


def test_explain_measures_whether_the_hoisted_maps_are_the_networks(monkeypatch):
    split = _route.affine_start

    def bent(f):
        first, rest = split(f)
        return nn.Sequential(first, nn.Tanh()), rest

    x = vectors()
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.LayerNorm(9), nn.SiLU(), nn.Linear(9, 3))
    right = lmnfast.explain(model, "0", x)["0"]
    before = lmnfast.lmn(*lmnfast.cut(model, "0", x))
    monkeypatch.setattr(_route, "affine_start", bent)
    wrong = lmnfast.explain(model, "0", x)["0"]
    assert (right.route, wrong.route) == ("hoisted", "generic") and right.reason == wrong.reason
    assert lmnfast.explain(model, "0")["0"].route == "hoisted"  # without inputs nothing is called
    after = lmnfast.lmn(*lmnfast.cut(model, "0", x))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=0)
