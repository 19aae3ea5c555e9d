"""Parts of models, stacked and in probes, and what patterns leave out."""

import pytest
import torch
from architectures import (
    Masked,
    ResidualMLP,
    Transformer,
    tokens,
    vectors,
)

import lmnfast
from lmnfast import cut


def test_stacked_networks_are_cut_from_layer_to_layer_and_at_modules_alone():
    torch.manual_seed(0)
    models, x = [ResidualMLP() for _ in range(3)], vectors()
    stacked = torch.func.stack_module_state(models)
    for how in ({"layer": "stem", "until": "after.0"}, {"block": "blocks.1"}, {"layer": ""}):
        tail, samples = cut(models[0], inputs=x, stacked=stacked, **how)
        together = lmnfast.lmn(tail, samples, stacked=stacked)
        alone = torch.stack([lmnfast.lmn(*cut(model, inputs=x, **how)) for model in models])
        torch.testing.assert_close(together, alone)
    masked = [Masked() for _ in range(2)]
    with torch.no_grad():
        masked[1].scale.mul_(2)
    with pytest.raises(ValueError, match="stacked: network 1 gives the block 'attention' other arguments"):
        cut(
            masked[0],
            block="attention",
            inputs=torch.randn(8, 5, 6),
            stacked=torch.func.stack_module_state(masked),
        )


@pytest.mark.parametrize(
    "how", [{"layer": "stem", "until": "attention"}, {"block": "attention"}, {"layer": ""}]
)
def test_a_cut_leaves_the_model_as_it_was(how):
    model, x = Masked().train(), torch.randn(8, 5, 6)
    before = [(name, list(vars(part)), part.training) for name, part in model.named_modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    tail, samples = cut(model, inputs=x, **how)
    lmnfast.lmn(tail, samples)
    assert before == [(name, list(vars(part)), part.training) for name, part in model.named_modules()]
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]


def test_a_probe_measures_from_layer_to_layer_and_modules_alone():
    torch.manual_seed(0)
    model, x = Masked(), torch.randn(8, 5, 6)
    asked = ({"layers": "stem", "until": "attention"}, {"blocks": ["attention", "mlp"]}, {"layers": ""})
    probes = [lmnfast.Probe(model, x, every=1, **how) for how in asked]
    for step in range(3):
        for probe in probes:
            probe(step)
        # The scale is no parameter of the block `attention`, and reaches it as an argument.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
    assert [probe.layers for probe in probes] == [("stem",), ("attention", "mlp"), ("inputs",)]
    for probe, how in zip(probes, asked, strict=True):
        for row in probe.history:
            again = Masked()
            again.load_state_dict(model.state_dict())
            with torch.no_grad():
                for parameter in again.parameters():
                    parameter.div_(1.2 ** (3 - row["step"]))
            names = (
                {"block": row["layer"]}
                if "blocks" in how
                else {"layer": row["layer"], "until": how.get("until")}
            )
            expected = float(lmnfast.lmn(*cut(again, inputs=x, **names)))
            assert row["lmn"] == pytest.approx(expected, rel=1e-3)
        probe.close()
    with pytest.raises(ValueError, match="layers: expected either layers or blocks, got both"):
        lmnfast.Probe(model, x, "stem", blocks="mlp")
    with pytest.raises(ValueError, match=r"blocks: expected one name or several different ones, got \[\]"):
        lmnfast.Probe(model, x, blocks=[])


def test_what_a_pattern_matches_and_cannot_be_measured_is_left_out_with_one_warning():
    model, x = Transformer(), tokens()
    assert lmnfast.match_layers(model, "blocks.*") == ("blocks.0", "blocks.1")
    assert lmnfast.match_layers(model, "*") == (
        "token",
        "position",
        "embedded",
        "blocks.0",
        "blocks.1",
        "norm",
        "head",
    )
    assert lmnfast.match_layers(model, "*.mlp*") == ("blocks.0.mlp", "blocks.1.mlp")
    with lmnfast.Probe(model, x, "blocks.*") as probe:
        assert probe.layers == ("blocks.0", "blocks.1")
    with (
        pytest.warns(UserWarning) as warned,
        lmnfast.Probe(model, x, ["*o*", "blocks.*.mlp", "norm"]) as probe,
    ):
        assert probe.layers == ("token", "blocks.0", "blocks.1", "norm")
    assert [str(warning.message) for warning in warned] == [
        "layers: '*o*' and 'blocks.*.mlp' also match what cannot be measured: 'position' (the output of it has shape (4, 12) "
        "for 12 inputs); 'blocks.0.mlp', 'blocks.1.mlp' (the model's output depends on the inputs also by another way than "
        "through it (a skip connection around it, say)); blocks= measures parts alone, until= ends the maps earlier"
    ]
    with pytest.raises(ValueError) as error:
        lmnfast.Probe(model, x, "blocks.*.mlp")
    assert str(error.value).startswith(
        "layers: nothing that matches 'blocks.*.mlp' can be measured: 'blocks.0.mlp', 'blocks.1.mlp' (the model's output "
    )
    with pytest.raises(ValueError, match="layer: the model's output depends .* through 'blocks.0.mlp'"):
        lmnfast.Probe(model, x, ["blocks.?", "blocks.0.mlp"])  # a name is asked for
    with lmnfast.Probe(model, x, blocks="blocks.*.mlp") as probe:
        assert probe.layers == ("blocks.0.mlp", "blocks.1.mlp")
    with pytest.warns(UserWarning, match=r"block: '\*' also matches .* 'token' \(it takes no float"):
        explained = lmnfast.explain(model, block="*", inputs=x)
    assert [route.layer for route in explained] == ["embedded", "blocks.0", "blocks.1", "norm", "head"]


def test_an_end_leaves_out_the_layers_behind_it():
    model, x = Transformer(), tokens()
    with pytest.warns(UserWarning) as warned, lmnfast.Probe(model, x, "*", until="blocks.1") as probe:
        assert probe.layers == ("token", "embedded", "blocks.0")
    assert str(warned[0].message) == (
        "layers: '*' also matches what cannot be measured: 'position' (the output of it has shape (4, 12) for 12 inputs); "
        "'blocks.1' (until: it is the layer itself); 'norm', 'head' (until: 'blocks.1' runs before it)"
    )
    for measure in (lmnfast.Probe, lmnfast.explain):
        with pytest.raises(ValueError, match="^until: 'blocks.9' is not in the model"):
            measure(
                model, inputs=x, until="blocks.9", **{"layers" if measure is lmnfast.Probe else "layer": "*"}
            )


def test_explain_says_the_route_of_a_part_with_and_without_inputs():
    model, x = ResidualMLP(), vectors()
    for inputs in (None, x):
        assert lmnfast.explain(model, block="blocks.0", inputs=inputs)["blocks.0"].route == "fused"
        assert lmnfast.explain(model, "stem", inputs, until="after.0")["stem"].route == "fused"
        assert lmnfast.explain(model, "inputs", inputs)["inputs"].route == "fused"
    assert "10 -> 14 gelu -> 10" in str(lmnfast.explain(model, block="blocks.0"))
    route = lmnfast.explain(Masked(), block="attention", inputs=torch.randn(8, 5, 6))["attention"]
    assert route.route == "generic" and not route.hooked and route.samples == (8, 5, 6)
    with pytest.raises(ValueError, match="until: 'nowhere' is not in the model"):
        lmnfast.explain(model, "stem", until="nowhere")
