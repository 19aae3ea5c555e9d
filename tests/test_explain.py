"""Which route a layer takes, and why."""

import pytest
from architectures import NETWORKS, Functional, vectors

import lmnfast

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
            return super().forward(x) if float(x.sum()) < 1e9 else x

    lmnfast.explain(Counting(), "first", vectors())
    said = capsys.readouterr().out
    assert "generic: a forward hook replaces the layer's output, as torch.fx cannot trace the model (" in said
