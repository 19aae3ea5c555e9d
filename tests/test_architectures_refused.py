"""Models that cannot be measured are told why."""

import pytest
import torch
import torch.nn.functional as F
from architectures import Functional, Listed, Twice, vectors
from torch import nn

import lmnfast


class Noisy(Twice):
    def forward(self, x):
        return self.last(F.dropout(torch.tanh(self.layer(x)), 0.5))


def test_a_model_that_is_random_in_eval_mode_is_refused():
    tail, samples = lmnfast.cut(Noisy(), "layer", vectors())
    with pytest.raises(ValueError, match="f: gives other outputs .* it is random"):
        lmnfast.connectivity(tail, samples)
    with pytest.raises(
        ValueError, match=r"f: gives other outputs for sample \d+ when called on 3 samples alone"
    ):
        lmnfast.connectivity(Noisy(), vectors())


def test_a_function_whose_rows_depend_on_each_other_is_refused():
    with pytest.raises(ValueError, match="rows of a batch depend on each other"):
        lmnfast.connectivity(lambda x: torch.sin(x - x.mean(0)), vectors())


def test_meta_and_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="model: its parameter 'first.weight' is on meta"):
        lmnfast.cut(Functional().to("meta"), "first", vectors())
    model = Functional()
    model.third = nn.Linear(9, 3, device="meta")
    with pytest.raises(ValueError, match="model: its parameter 'third.weight' is on meta"):
        lmnfast.cut(model, "first", vectors())
    with pytest.raises(ValueError, match="inputs: on meta, but the model is on cpu"):
        lmnfast.cut(Functional(), "first", vectors().to("meta"))


def test_a_layer_that_is_never_called_is_told_why():
    x = torch.randn(6, 5, 16)
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(
        ValueError, match="'self_attn.out_proj' was called 0 times .* its weights are used without a call"
    ):
        lmnfast.cut(attention, "self_attn.out_proj", x)
    with pytest.raises(
        ValueError, match="a container that has no forward: name its parts, as 'layers.0', 'layers.1'"
    ):
        lmnfast.cut(Listed(), "layers", vectors())
    model = Functional()
    model.other = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="'other@1' was called 0 times .* these inputs do not reach it"):
        lmnfast.cut(model, "other@1", vectors())


def test_a_layer_under_vmap_is_told_so():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Functional()

        def forward(self, x):
            return torch.vmap(self.inner)(x)

    with pytest.raises(
        ValueError, match="layer: 'inner.first' is called under torch.vmap, one sample at a time"
    ):
        lmnfast.cut(Mapped(), "inner.first", vectors())


LAZY = {
    "linear": lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Linear(8, 3)),
}


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize(
    "measure",
    [
        lambda model, x: lmnfast.cut(model, "0", x),
        lambda model, x: lmnfast.lmn(model, x),
        lambda model, x: lmnfast.jacobians(model, x),
        lambda model, x: lmnfast.Probe(model, x, "0"),
        lambda model, x: lmnfast.explain(model, "0"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_refused_until_a_batch_has_made_their_weights(lazy, measure):
    model, x = LAZY[lazy](), vectors()
    with pytest.raises(
        ValueError, match="is lazy and has no values yet; run a batch through the model first"
    ):
        measure(model, x)
    assert any(map(nn.parameter.is_lazy, (*model.parameters(), *model.buffers())))
    model(x)
    measure(model, x)
