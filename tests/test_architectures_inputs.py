"""What models take and return, and the layers of them that can be named."""

import dataclasses

import pytest
import torch
from architectures import (
    Functional,
    ResidualMLP,
    Transformer,
    Twice,
    history_of,
    tokens,
    vectors,
)
from torch import nn

import lmnfast
from lmnfast._recognise import recognise


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.first, self.second, self.wrap = nn.Linear(6, 8), nn.Linear(8, 3), wrap

    def forward(self, x):
        return self.wrap(self.second(torch.tanh(self.first(x))))


WRAPS = {
    "tuple": (lambda y: (y, y.sum()), 0),
    "dict": (lambda y: {"loss": y.sum(), "logits": y}, "logits"),
    "dataclass": (lambda y: Output(None, y), "logits"),
    "function": (lambda y: y.unsqueeze(1).expand(-1, 2, -1), lambda y: y[:, -1]),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_output_selects_what_counts(wrap):
    function, output = WRAPS[wrap]
    model, plain, x = Wrapped(function), Wrapped(lambda y: y), vectors()
    plain.load_state_dict(model.state_dict())
    tail, samples = lmnfast.cut(model, "first", x, output=output)
    assert recognise(tail) is not None or wrap == "function"
    assert torch.allclose(lmnfast.lmn(tail, samples), lmnfast.lmn(*lmnfast.cut(plain, "first", x)))


def test_output_that_is_not_there_names_what_is():
    with pytest.raises(
        ValueError, match="output: no 'logit' in what the model returns, a dict of 'loss', 'logits'"
    ):
        lmnfast.cut(Wrapped(WRAPS["dict"][0]), "first", vectors(), output="logit")
    with pytest.raises(ValueError, match="output: no 2 in what the model returns, a tuple of 2"):
        lmnfast.cut(Wrapped(WRAPS["tuple"][0]), "first", vectors(), output=2)
    with pytest.raises(TypeError, match="model: its output is tuple; .* output= selects the tensor in it"):
        lmnfast.cut(Wrapped(WRAPS["tuple"][0]), "first", vectors())


class Masked(nn.Module):
    """Takes a mask beside its input, and by keyword alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, *, mask, scale=1.0):
        return self.second(torch.relu(self.first(x)) * mask) * scale


def test_inputs_may_be_keywords_or_whatever_forward_takes():
    model, x = Masked(), vectors()
    mask = (torch.rand(8) > 0.5).float()
    tail, samples = lmnfast.cut(model, "first", {"x": x, "mask": mask})
    assert torch.equal(tail(samples), model(x, mask=mask))
    value = lmnfast.lmn(tail, samples)
    batch = {"data": [x, "a label"], "mask": mask}

    def forward(model, batch):
        return model(batch["data"][0], mask=batch["mask"], scale=2.0)

    assert lmnfast.lmn(*lmnfast.cut(model, "first", batch, forward=forward)) == pytest.approx(float(value))
    probe = lmnfast.Probe(model, batch, "first", forward=forward)
    probe(0)
    assert probe.history[0]["lmn"] == pytest.approx(float(value))


def test_an_input_of_each_sample_that_acts_behind_the_layer_is_named():
    model, x, mask = Masked(), vectors(), (torch.rand(14, 8) > 0.5).float()
    message = "another way than through 'first': through the input 'mask', not the same for all samples"
    for inputs in ({"x": x, "mask": mask}, {"mask": mask, "x": x}):
        with pytest.raises(ValueError, match=message) as refusal:
            lmnfast.cut(model, "first", inputs)
        assert "skip" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"through the input 'batch'\[1\], not the same"):
        lmnfast.cut(
            model,
            "first",
            {"batch": [x, mask]},
            forward=lambda m, b: m(b["batch"][0], mask=b["batch"][1]),
        )
    same = lmnfast.cut(model, "first", {"x": x, "mask": mask[:1].repeat(14, 1)})
    assert torch.equal(
        lmnfast.lmn(*same), lmnfast.lmn(*lmnfast.cut(model, "first", {"x": x, "mask": mask[0]}))
    )


def test_outputs_that_are_flattened_into_rows_get_the_advice_that_helps():
    model, x = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Flatten(0, 1)),
        torch.randn(9, 4, 6),
    )
    with pytest.raises(ValueError, match=r"output=lambda y: y.unflatten\(0, \(-1, 4\)\)$"):
        lmnfast.cut(model, "0", x)
    right = lmnfast.lmn(*lmnfast.cut(model[:3], "0", x))
    advised = lmnfast.cut(model, "0", x, output=lambda y: y.unflatten(0, (-1, 4)))
    assert float(lmnfast.lmn(*advised)) == pytest.approx(float(right), rel=1e-5)


def test_what_the_samples_are_counted_by_is_named():
    with pytest.raises(ValueError, match="for 1 inputs; .* the input 'scale' comes first and has 1"):
        lmnfast.cut(Masked(), "first", {"scale": torch.ones(1), "x": vectors(), "mask": torch.ones(8)})


def test_arguments_beside_tensors_and_those_that_a_hook_supplies_are_passed_on():
    class Optional(Functional):
        def forward(self, x, mask, scale, flag=None):
            assert mask is None and flag is None
            return super().forward(x) * scale

    model, x = Optional(), vectors()
    right = lmnfast.lmn(*lmnfast.cut(model, "first", x, forward=lambda m, x: m(x, None, 2.0)))
    torch.testing.assert_close(lmnfast.lmn(*lmnfast.cut(model, "first", (x, None, 2.0))), right)
    model.register_forward_pre_hook(lambda module, args: (args[0], None, 2.0))
    torch.testing.assert_close(lmnfast.lmn(*lmnfast.cut(model, "first", x)), right)
    torch.testing.assert_close(
        lmnfast.lmn(*lmnfast.cut(model, "first", {"x": x}, forward=lambda m, i: m(i["x"]))), right
    )
    model, x = Functional(), vectors()
    model.register_forward_pre_hook(lambda module, args: args[:1])  # takes labels off
    torch.testing.assert_close(
        lmnfast.lmn(*lmnfast.cut(model, "first", (x, torch.zeros(14)))),
        lmnfast.lmn(*lmnfast.cut(model, "first", x)),
    )


def test_labels_among_the_inputs_are_named():
    with pytest.raises(
        TypeError, match="inputs: do not fit the arguments of the model's forward .* without labels"
    ):
        lmnfast.cut(Functional(), "first", (vectors(), torch.zeros(14, dtype=torch.long)))


def test_a_loader_is_no_batch():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(vectors()), batch_size=4)
    with pytest.raises(TypeError, match="inputs: .* got DataLoader; gather the samples first"):
        lmnfast.cut(Functional(), "first", loader)


@pytest.mark.parametrize("traceable", [True, False])
def test_a_module_used_twice_is_cut_at_the_call_that_is_named(traceable):
    class Hidden(Twice):
        def forward(self, x):
            return super().forward(x) if len(x) or traceable else x

    model, x = (Twice() if traceable else Hidden()), vectors()
    with pytest.raises(ValueError, match="called 2 times .* name one, from 'layer@0' to 'layer@1'"):
        lmnfast.cut(model, "layer", x)
    with pytest.raises(ValueError, match="is its call 2, from 0 on, but there are 2"):
        lmnfast.cut(model, "layer@2", x)
    for call, expected in enumerate((model.layer(x), model.layer(torch.relu(model.layer(x))))):
        tail, samples = lmnfast.cut(model, f"layer@{call}", x)
        torch.testing.assert_close(samples, expected.detach())
        torch.testing.assert_close(tail(samples), model(x))
    assert [row["layer"] for row in history_of(model, x, ["layer@0", "layer@1"])] == ["layer@0", "layer@1"]


def test_globs_measure_every_layer_that_matches():
    model, x = Transformer(), tokens()
    rows = history_of(model, x, "blocks.?")
    assert [row["layer"] for row in rows] == ["blocks.0", "blocks.1"]
    assert lmnfast.match_layers(model, ["norm", "blocks.*.mlp"]) == ("norm", "blocks.0.mlp", "blocks.1.mlp")
    assert history_of(model, x, "blocks.*") == rows  # the blocks, without their parts
    with pytest.raises(ValueError, match=r"layer: nothing matches 'block.\*.mlp'; it has .*blocks.0.mlp"):
        lmnfast.match_layers(model, "block.*.mlp")


def test_a_skip_connection_names_the_part_around_it_that_can_be_measured():
    model, x = ResidualMLP(), vectors()
    with pytest.raises(ValueError, match="all of it passes through; block='blocks.0' measures that part"):
        lmnfast.cut(model, "blocks.0", x)  # the sum is outside of it
    many = nn.Sequential(nn.Linear(6, 10), nn.Sequential(*[Added() for _ in range(12)]))
    with pytest.raises(ValueError, match=r"through '1.11.mlp' .* as '1.11' is; block='1.11.mlp' measures"):
        lmnfast.cut(many, "1.11.mlp", x)
    assert lmnfast.match_layers(many, ["1.?", "1.??"]) == tuple(f"1.{n}" for n in range(12))
    assert lmnfast.match_layers(many, "1.*") == tuple(f"1.{n}" for n in range(12))


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(10, 10), nn.Tanh())

    def forward(self, x):
        return x + self.mlp(x)


def test_what_is_no_module_has_no_layers():
    with pytest.raises(TypeError, match="model: expected an nn.Module, got function"):
        lmnfast.match_layers(vectors, "*")


def test_the_last_position_alone():
    model, x = Transformer(), tokens()
    tail, samples = lmnfast.cut(model, "blocks.0", x, output=lambda logits: logits[:, -1])
    assert tail(samples).shape == (12, 11)
    assert lmnfast.connectivity(tail, samples).shape == (12, 12)
