"""Networks as people write them: cut anywhere, measured by either route, and left as they were."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmnfast
from lmnfast import reference
from lmnfast.network import recognise
from lmnfast.quadrature import path_nodes

module = sys.modules["lmnfast.connectivity"]  # the name in lmnfast is the function
UNIFORM = path_nodes("uniform", 21)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.third(F.gelu(self.second(F.silu(self.first(x)))))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 if n == 0 else 10, 10) for n in range(3))

    def forward(self, x):
        for n, layer in enumerate(self.layers):
            x = layer(x) if n == 2 else torch.tanh(layer(x))
        return x


class ResidualMLP(nn.Module):
    def __init__(self, normed=False):
        super().__init__()
        self.stem = nn.Linear(6, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *([nn.LayerNorm(10)] if normed else []), nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 10)
            )
            for _ in range(2)
        )
        self.after = nn.ModuleList(nn.Identity() for _ in range(2))
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x)
        for block, after in zip(self.blocks, self.after):
            x = after(x + block(x))
        return self.head(x)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.classifier(self.features(x))


class Block(nn.Module):
    def __init__(self, width=12, heads=2):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.heads = heads

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """GPT-like; logits at every position."""

    def __init__(self, vocabulary=11, length=4, width=12):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.embedded = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedded(self.token(tokens) + self.position(torch.arange(tokens.shape[1])))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(9, 5), nn.LSTM(5, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens):
        outputs, _ = self.lstm(self.embedding(tokens))
        return self.head(torch.tanh(outputs[:, -1]))


class Shared(nn.Module):
    """Tied embedding and unembedding."""

    def __init__(self):
        super().__init__()
        self.token, self.hidden = nn.Embedding(9, 6), nn.Linear(18, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens):
        return self.head(F.silu(self.hidden(self.token(tokens).flatten(1))))


def normed():
    return nn.Sequential(
        nn.Linear(6, 10), nn.LayerNorm(10), nn.SiLU(), nn.Linear(10, 8), nn.SiLU(), nn.Linear(8, 3)
    )


def vectors(n=14):
    return torch.randn(n, 6)


def images(n=9):
    return 5 * torch.randn(n, 1, 8, 8)


def tokens(n=12, length=4, vocabulary=9):
    return torch.randint(vocabulary, (n, length))


# model, inputs, layers to cut at, and whether the tail there is a chain
NETWORKS = {
    "sequential": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)),
        vectors,
        {"0": True, "1": True, "2": True, "3": True},
    ),
    "functional": (Functional, vectors, {"first": True, "second": True}),
    "module list": (Listed, vectors, {"layers.0": True, "layers.1": True}),
    "residual": (ResidualMLP, vectors, {"stem": True, "after.0": True, "after.1": True}),
    "residual, layer norm": (
        lambda: ResidualMLP(True),
        vectors,
        {"stem": False, "after.0": False, "after.1": True},
    ),
    "layer norm": (normed, vectors, {"0": False, "1": True, "2": True}),
    "convolution": (
        Convolutional,
        images,
        {"features.0": False, "features.3": False, "features": True, "classifier.0": True},
    ),
    "transformer": (
        Transformer,
        tokens,
        {"embedded": False, "blocks.0": False, "blocks.1": False, "norm": False},
    ),
    "lstm": (Recurrent, tokens, {"embedding": False, "lstm": False}),
    "shared weights": (Shared, lambda: tokens(length=3), {"token": True, "hidden": True}),
}
CASES = [(name, layer) for name, (_, _, layers) in NETWORKS.items() for layer in layers]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained_a_little(model, inputs):
    """Not at initialisation, where batch norm's statistics are 0 and 1; in training mode, as in a loop."""
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimiser.zero_grad()
        model(inputs).square().mean().backward()
        optimiser.step()
    return model


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
    assert (L - truth).abs().max() < 2e-4
    assert L.min() < 0.999 or layer == list(chains)[-1], "the tail does not exercise the nonlinearity"


@pytest.mark.parametrize(("name", "layer"), [case for case in CASES if NETWORKS[case[0]][2][case[1]]])
def test_fused_and_generic_routes_agree(name, layer):
    make, draw, _ = NETWORKS[name]
    inputs = draw()
    tail, samples = lmnfast.cut(trained_a_little(make(), inputs), layer, inputs)
    fused = lmnfast.connectivity(tail, samples)
    generic = module.enqueue(tail, samples, fuse=False).L
    assert (fused - generic).abs().max() < 2e-5


def snapshot(model):
    return [
        (name, tensor, tensor.clone(), tensor._version)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]


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
        monkeypatch.setattr(module, "widened", lambda y: 1 / 0)
        monkeypatch.setattr(module.ops, "path_connectivity", lambda *_: 1 / 0)
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


# What models take and return ------------------------------------------------------------------------------


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


def test_masks_per_sample_go_through_the_hook():
    model, x, mask = Masked(), vectors(), (torch.rand(14, 8) > 0.5).float()
    with pytest.raises(ValueError, match="depends on the inputs also by another way"):
        lmnfast.cut(model, "first", {"x": x, "mask": mask})


def test_labels_among_the_inputs_are_named():
    with pytest.raises(
        TypeError, match="inputs: do not fit the arguments of the model's forward .* without labels"
    ):
        lmnfast.cut(Functional(), "first", (vectors(), torch.zeros(14, dtype=torch.long)))


def test_a_loader_is_no_batch():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(vectors()), batch_size=4)
    with pytest.raises(TypeError, match="inputs: .* got DataLoader; gather the samples first"):
        lmnfast.cut(Functional(), "first", loader)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.layer(torch.relu(self.layer(x)))))


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
    assert [row["layer"] for row in _history(model, x, ["layer@0", "layer@1"])] == ["layer@0", "layer@1"]


def _history(model, x, layers):
    with lmnfast.Probe(model, x, layers) as probe:
        probe(0)
        return probe.history


def test_globs_measure_every_layer_that_matches():
    model, x = Transformer(), tokens()
    rows = _history(model, x, "blocks.?")
    assert [row["layer"] for row in rows] == ["blocks.0", "blocks.1"]
    assert lmnfast.match_layers(model, ["norm", "blocks.*.mlp"]) == ("norm", "blocks.0.mlp", "blocks.1.mlp")
    with pytest.raises(ValueError, match=r"layer: nothing matches 'block.\*.mlp'; it has .*blocks.0.mlp"):
        lmnfast.match_layers(model, "block.*.mlp")


def test_what_is_no_module_has_no_layers():
    with pytest.raises(TypeError, match="model: expected an nn.Module, got function"):
        lmnfast.match_layers(vectors, "*")


def test_the_last_position_alone():
    model, x = Transformer(), tokens()
    tail, samples = lmnfast.cut(model, "blocks.0", x, output=lambda logits: logits[:, -1])
    assert tail(samples).shape == (12, 11)
    assert lmnfast.connectivity(tail, samples).shape == (12, 12)


# What cannot be measured ----------------------------------------------------------------------------------


class Noisy(Twice):
    def forward(self, x):
        return self.last(F.dropout(torch.tanh(self.layer(x)), 0.5))


def test_a_model_that_is_random_in_eval_mode_is_refused():
    tail, samples = lmnfast.cut(Noisy(), "layer", vectors())
    with pytest.raises(ValueError, match="f: gives other outputs .* it is random"):
        lmnfast.connectivity(tail, samples)
    with pytest.raises(
        ValueError, match=r"f: gives other outputs for sample \d+ when called on 7 samples alone"
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


# Low precision --------------------------------------------------------------------------------------------


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
        if len(points) > max(19 * limit, len(x)):
            raise torch.OutOfMemoryError("no memory")
        most.append(len(points))
        return f(points)

    assert torch.equal(lmnfast.connectivity(starved, x), lmnfast.connectivity(f, x)) or limit < 100
    assert (lmnfast.connectivity(starved, x) - lmnfast.connectivity(f, x)).abs().max() < 1e-5
    assert max(most) <= max(19 * limit, len(x))

    def never(points):
        if len(points) > len(x):
            raise torch.OutOfMemoryError("no memory at all")
        return f(points)

    with pytest.raises(torch.OutOfMemoryError, match="at all"):
        lmnfast.connectivity(never, x)


# Affine maps at the start ---------------------------------------------------------------------------------


class Starts(nn.Module):
    """Affine maps of every kind behind the layer, then no chain."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3)
        self.affine = nn.Sequential(
            nn.Dropout(),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(45, 7),
        )
        self.weight = nn.Parameter(torch.randn(6, 7))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(F.linear(self.affine(self.layer(x)), self.weight)))


def test_affine_maps_at_the_start_run_on_the_samples_alone(monkeypatch):
    x = images()
    model = trained_a_little(Starts(), x)
    tail, samples = lmnfast.cut(model, "layer", x)
    with torch.no_grad():
        truth = reference.path_connectivity(tail.double().eval(), samples.double(), *UNIFORM)
    tail.float()
    hoisted = module.affine_start(tail)
    assert hoisted[0](samples).shape == (9, 6)
    rows = []
    model.affine[1].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    lmnfast.connectivity(tail, samples)
    assert max(rows) > 9, "a hook of the user's sees every point, as it may do anything"
    model.affine[1]._forward_hooks.clear()
    calls = []
    outputs_of = module.outputs_of
    monkeypatch.setattr(module, "outputs_of", lambda f, x: calls.append(x.shape[1:]) or outputs_of(f, x))
    L = lmnfast.connectivity(tail, samples)
    assert calls[-1] == (6,) and (L - truth).abs().max() < 2e-5
    assert torch.equal(lmnfast.connectivity(tail, samples, method="hermite").diagonal(), torch.ones(9))


def test_what_is_used_again_later_is_not_taken_off_the_start():
    x = vectors()
    tail, _ = lmnfast.cut(ResidualMLP(), "stem", x)
    assert module.affine_start(tail) is None  # the block and the sum both take the samples
    tail, _ = lmnfast.cut(nn.Sequential(nn.Identity(), ResidualMLP()), "0", x)
    first, _ = module.affine_start(tail)
    assert first(x).shape == (14, 10)
    for other in (nn.Linear(3, 2), torch.tanh, lmnfast.cut(normed(), "0", x)[0]):
        assert module.affine_start(other) is None
    batch = nn.Sequential(
        nn.Identity(), nn.BatchNorm1d(6, track_running_stats=False), nn.PReLU(), nn.Linear(6, 2)
    )
    assert module.affine_start(lmnfast.cut(batch, "0", x)[0]) is None


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


# Explaining -----------------------------------------------------------------------------------------------


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


def test_the_documentations_examples_run_and_print_what_it_shows(capsys):
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert re.search(r"```\n(0:\n.*?)```", page, re.DOTALL)[1] in capsys.readouterr().out
