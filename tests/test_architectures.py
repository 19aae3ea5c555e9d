"""Networks as people write them: cut anywhere, measured by either route, and left as they were."""

import re
from pathlib import Path

import pytest
import torch
from architectures import FLOAT32, NETWORKS, Functional, ResidualMLP, snapshot, trained_a_little, vectors
from support import UNIFORM
from torch import nn

import lmnfast
from lmnfast import _enqueue, _generic, reference
from lmnfast._enqueue import enqueue
from lmnfast._recognise import recognise

CASES = [(name, layer) for name, (_, _, layers) in NETWORKS.items() for layer in layers]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_measured_from_any_layer_as_the_definition_says(name, layer):
    make, draw, chains = NETWORKS[name]
    inputs = draw()
    model = trained_a_little(make(), inputs)
    tail, samples = lmnfast.cut(model, layer, inputs)
    model.eval()
    with torch.no_grad():
        expected = model(inputs)
        torch.testing.assert_close(tail(samples), expected)
        L = lmnfast.connectivity(tail, samples)
        truth = reference.path_connectivity(tail.double(), samples.double(), *UNIFORM)
    assert (recognise(tail) is not None) == chains[layer]
    assert (L - truth).abs().max() < FLOAT32
    assert L.min() < 0.999 or layer == list(chains)[-1], "the tail does not exercise the nonlinearity"


@pytest.mark.parametrize(("name", "layer"), [case for case in CASES if NETWORKS[case[0]][2][case[1]]])
def test_fused_and_generic_routes_agree(name, layer):
    make, draw, _ = NETWORKS[name]
    inputs = draw()
    tail, samples = lmnfast.cut(trained_a_little(make(), inputs), layer, inputs)
    fused = lmnfast.connectivity(tail, samples)
    generic = enqueue(tail, samples, fuse=False).L
    assert (fused - generic).abs().max() < FLOAT32


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_measuring_leaves_no_trace(name, fails, monkeypatch):
    make, draw, layers = NETWORKS[name]
    inputs = draw()
    model = trained_a_little(make(), inputs)
    layer = next(iter(layers))
    before, modes = snapshot(model), [part.training for part in model.modules()]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    if fails:
        monkeypatch.setattr(_generic, "widened", lambda y: 1 / 0)
        monkeypatch.setattr(_enqueue, "chain_connectivity", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lmnfast.lmn(*lmnfast.cut(model, layer, inputs))
    else:
        lmnfast.lmn(*lmnfast.cut(model, layer, inputs))
    for (name, tensor, value, version), (now, other, _, _) in zip(before, snapshot(model), strict=True):
        assert name == now and tensor is other and torch.equal(tensor, value) and tensor._version == version
    assert modes == [part.training for part in model.modules()]
    assert all(
        torch.equal(g, p.grad)
        for g, p in zip(gradients, (p for p in model.parameters() if p.grad is not None))
    )
    assert torch.equal(random, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# Low precision --------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A layer in low precision and float32 adapters beside it, as fine-tuning has them."""

    def __init__(self, casts=True):
        super().__init__()
        self.layer, self.adapter = nn.Linear(6, 6, dtype=torch.bfloat16), nn.Linear(6, 6)
        self.casts = casts

    def forward(self, x):
        beside = self.adapter(x.float() if self.casts else x)
        return torch.tanh(self.layer(x) + beside.to(x.dtype))


def test_parts_in_another_dtype_are_measured_where_the_model_casts():
    x = vectors().bfloat16()
    model = nn.Sequential(nn.Identity(), Adapted())
    L = lmnfast.connectivity(*lmnfast.cut(model, "0", x))
    assert torch.equal(L, lmnfast.connectivity(lambda z: model(z), x)) and L.min() < 0.99
    for f in (Adapted(casts=False), nn.Linear(6, 3)):
        with pytest.raises(TypeError, match="x: is torch.bfloat16, but f's parameter .* is torch.float32"):
            lmnfast.connectivity(f, x)


@pytest.mark.parametrize("name", ["functional", "transformer"])
def test_bf16_models_are_measured_in_float32(name):
    make, draw, layers = NETWORKS[name]
    model, inputs, layer = make(), draw(), next(iter(layers))
    exact = float(lmnfast.lmn(*lmnfast.cut(model, layer, inputs)))
    model.bfloat16()
    half = inputs.bfloat16() if inputs.is_floating_point() else inputs
    m = lmnfast.measure(*lmnfast.cut(model, layer, half))
    assert m.connectivity.dtype == torch.float32 and m.eigenvalues.dtype == torch.float64
    assert m.lmn == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("name", ["functional", "transformer", "convolution"])
def test_under_autocast(name):
    make, draw, layers = NETWORKS[name]
    model, inputs, layer = make(), draw(), next(iter(layers))
    exact = float(lmnfast.lmn(*lmnfast.cut(model, layer, inputs)))
    with torch.autocast("cpu", torch.bfloat16):
        m = lmnfast.measure(*lmnfast.cut(model, layer, inputs))
        assert torch.is_autocast_enabled("cpu")
    assert m.lmn == pytest.approx(exact, rel=0.1)


# Memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_out_of_memory_halves_the_tiles_and_changes_nothing(limit):
    f, x = ResidualMLP(normed=True).eval(), vectors()
    most = []

    def starved(points):
        if len(points) > max(19 * limit + 3, len(x)):
            raise torch.OutOfMemoryError("no memory")
        most.append(len(points))
        return f(points)

    assert torch.equal(lmnfast.connectivity(starved, x), lmnfast.connectivity(f, x)) or limit < 100
    assert (lmnfast.connectivity(starved, x) - lmnfast.connectivity(f, x)).abs().max() < 1e-5
    assert max(most) <= max(19 * limit + 3, len(x)), "3 samples are in every tile"

    def never(points):
        if len(points) > len(x):
            raise torch.OutOfMemoryError("no memory at all")
        return f(points)

    with pytest.raises(torch.OutOfMemoryError, match="at all"):
        lmnfast.connectivity(never, x)


# Several networks at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequential", "residual", "convolution", "shared weights"])
def test_stacked_networks_are_measured_as_one_after_the_other(name):
    make, draw, layers = NETWORKS[name]
    inputs, layer = draw(), next(iter(layers))
    models = [trained_a_little(make(), inputs).eval() for _ in range(3)]
    stacked = torch.func.stack_module_state(models)
    base, before = make(), None
    before = snapshot(base)
    tail, samples = lmnfast.cut(base, layer, inputs, stacked=stacked)
    expected = [lmnfast.cut(model, layer, inputs) for model in models]
    assert torch.equal(samples, torch.stack([own for _, own in expected]))
    L = lmnfast.connectivity(tail, samples, stacked=stacked)
    assert torch.equal(L, torch.stack([lmnfast.connectivity(*each) for each in expected]))
    values = lmnfast.lmn(tail, samples, stacked=stacked)
    assert values.shape == (3,)
    torch.testing.assert_close(values, torch.stack([lmnfast.lmn(*each) for each in expected]))
    for (_, tensor, value, version), (_, other, _, _) in zip(before, snapshot(base), strict=True):
        assert tensor is other and torch.equal(tensor, value) and tensor._version == version


def test_stacks_that_do_not_fit_are_named():
    models, x = [Functional() for _ in range(2)], vectors()
    stacked = torch.func.stack_module_state(models)
    with pytest.raises(ValueError, match=r"x: expected samples \(2, N, \*in\), .* got shape \(14, 6\)"):
        lmnfast.connectivity(models[0], x, stacked=stacked)
    with pytest.raises(ValueError, match="stacked: 'first.weight': .* got nothing of that name"):
        lmnfast.connectivity(Functional(), x.expand(2, 14, 6), stacked=({"other": torch.zeros(2)}, {}))
    wide = {name: value[:, :1] for name, value in stacked[0].items()}
    with pytest.raises(ValueError, match=r"stacked: 'first.weight': expected \(networks, 12, 6\), got shape"):
        lmnfast.connectivity(Functional(), x.expand(2, 14, 6), stacked=(wide, {}))
    with pytest.raises(TypeError, match="f: expected an nn.Module to load"):
        lmnfast.connectivity(torch.sin, x.expand(2, 14, 6), stacked=stacked)
    uneven = (stacked[0], {"buffer": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"stacked: .* got stacks of \[2, 5\]"):
        lmnfast.connectivity(Functional(), x.expand(2, 14, 6), stacked=uneven)


# Documentation --------------------------------------------------------------------------------------------


def test_the_documentations_examples_run_and_print_what_it_shows(capsys):
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert re.search(r"```\n(0:\n.*?)```", page, re.DOTALL)[1] in capsys.readouterr().out
