"""Networks as people write them: cut anywhere, measured by either route, and left as they were."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmnfast
from lmnfast import _enqueue, _generic, _prepare, _route, reference
from lmnfast._affine import affine_start
from lmnfast._enqueue import enqueue
from lmnfast._recognise import recognise
from lmnfast.quadrature import path_nodes

UNIFORM = path_nodes("uniform", 21)
FLOAT32 = (
    2e-5  # measured on these networks: the definition in float32 loses up to 6e-6, and so does what is tested
)


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


def test_an_input_of_each_sample_that_acts_behind_the_layer_is_named():
    model, x, mask = Masked(), vectors(), (torch.rand(14, 8) > 0.5).float()
    message = "another way than through 'first': by the input 'mask', not the same for all samples"
    for inputs in ({"x": x, "mask": mask}, {"mask": mask, "x": x}):
        with pytest.raises(ValueError, match=message) as refusal:
            lmnfast.cut(model, "first", inputs)
        assert "skip" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"by the input 'batch'\[1\], not the same"):
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


class Encoder(nn.Module):
    """torch.nn's own transformer, which in eval mode has a fast path."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 16), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, tokens, padded=None, mask=None):
        hidden = self.encoder(self.embedding(tokens), mask=mask, src_key_padding_mask=padded)
        return self.head(hidden[:, -1])


def truth(f, samples):
    """From the definition, in float64."""
    with torch.no_grad():
        return reference.path_connectivity(f, samples.double(), *UNIFORM)


def test_a_padding_mask_that_is_the_same_for_all_samples_is_measured():
    model, x = Encoder(), tokens(6, 5)
    padded = torch.zeros(6, 5, dtype=torch.bool)
    padded[:, 1] = True
    tail, samples = lmnfast.cut(model, "encoder.layers.0", (x, padded))
    exact = Encoder().double().eval()
    exact.load_state_dict(model.state_dict())

    def f(h):
        return exact.head(
            exact.encoder.layers[1](h, src_key_padding_mask=padded[:1].expand(len(h), 5))[:, -1]
        )

    with torch.enable_grad():  # of the fast path this is not the reference
        L = truth(f, samples)
    assert (lmnfast.connectivity(tail, samples) - L).abs().max() < FLOAT32 and L.min() < 0.999
    assert torch.backends.mha.get_fastpath_enabled()
    padded[3:, 2] = True
    with pytest.raises(
        ValueError, match="through 'encoder.layers.0': by the input 'padded', not the same for all"
    ):
        lmnfast.cut(model, "encoder.layers.0", (x, padded))
    assert torch.backends.mha.get_fastpath_enabled()
    lmnfast.cut(model, "encoder.layers.1", (x, padded))  # behind which it does not act


@pytest.mark.parametrize("samples", [5, 6])
def test_a_mask_of_tokens_by_tokens_is_shared_also_by_as_many_samples(samples):
    model, x = Encoder(), tokens(samples, 5)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    mask[-1, 1:3] = float("-inf")
    tail, h = lmnfast.cut(model, "encoder.layers.0", {"tokens": x, "mask": mask})
    exact = Encoder().double().eval()
    exact.load_state_dict(model.state_dict())
    L = truth(lambda h: exact.head(exact.encoder.layers[1](h, src_mask=mask.double())[:, -1]), h)
    assert (lmnfast.connectivity(tail, h) - L).abs().max() < FLOAT32 and L.min() < 0.999


class TimeFirst(nn.Module):
    def __init__(self, transposed=True):
        super().__init__()
        self.first, self.lstm, self.head = nn.Linear(6, 6), nn.LSTM(6, 8), nn.Linear(8, 3)
        self.transposed = transposed

    def forward(self, x):
        hidden = self.lstm(self.first(x.transpose(0, 1)))[0]
        return self.head(hidden[-1] if self.transposed else hidden)


def test_a_batch_that_is_not_the_first_dimension_is_told_so():
    message = r"layer: the output of 'first' has shape \(5, 7, 6\) for 7 inputs; .* first dimension: set batch_first"
    with pytest.raises(ValueError, match=message):
        lmnfast.cut(TimeFirst(), "first", torch.randn(7, 5, 6))
    with pytest.raises(
        ValueError, match=r"model: its output has shape \(5, 7, 3\) .* output=lambda y: y.transpose"
    ):
        lmnfast.cut(nn.Sequential(nn.Identity(), TimeFirst(False)), "0", torch.randn(7, 5, 6))
    tail, samples = lmnfast.cut(TimeFirst(), "lstm", torch.randn(7, 7, 6))
    with pytest.raises(ValueError, match=r"f: .* the first dimension \(batch_first=True\)"):
        lmnfast.lmn(tail, samples)


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
    with pytest.raises(
        ValueError, match=r"as 'blocks.0' is \(all such blocks, without their parts: 'blocks.\?'\)"
    ):
        lmnfast.Probe(model, x, "blocks.*")
    with pytest.raises(ValueError, match=r"layer: nothing matches 'block.\*.mlp'; it has .*blocks.0.mlp"):
        lmnfast.match_layers(model, "block.*.mlp")


def test_a_skip_connection_names_the_part_around_it_that_can_be_measured():
    model, x = ResidualMLP(), vectors()
    with pytest.raises(ValueError, match="expected a layer that all of it passes through$"):
        lmnfast.cut(model, "blocks.0", x)  # the sum is outside of it
    many = nn.Sequential(nn.Linear(6, 10), nn.Sequential(*[Added() for _ in range(12)]))
    with pytest.raises(ValueError, match=r"through '1.11.mlp' .* as '1.11' is \(.*: '1.\?' and '1.\?\?'\)"):
        lmnfast.cut(many, "1.11.mlp", x)
    assert lmnfast.match_layers(many, ["1.?", "1.??"]) == tuple(f"1.{n}" for n in range(12))


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


# What cannot be measured ----------------------------------------------------------------------------------


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


# What is no plain PyTorch ---------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 3))


@pytest.mark.filterwarnings("ignore")  # of torch.export
def test_exported_programs_are_measured_where_they_take_any_number_of_samples():
    model, x = mlp(), vectors()
    right = lmnfast.lmn(model, x)
    fixed = torch.export.export(model, (x,))
    for program in (
        fixed.module(),
        torch.export.unflatten(fixed),
        nn.Sequential(fixed.module(), nn.Identity()),
    ):
        for measure in (lmnfast.lmn, lmnfast.jacobians):
            with pytest.raises(
                ValueError, match="f: .* for batches of 14 samples alone, .* dynamic first dimension"
            ):
                measure(program, x)
    dynamic = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("samples")},))
    assert float(lmnfast.lmn(dynamic.module(), x)) == pytest.approx(float(right), rel=1e-5)
    with pytest.raises(ValueError, match="'0' was called 0 times .* torch.export.unflatten"):
        lmnfast.cut(dynamic.module(), "0", x)
    tail, samples = lmnfast.cut(torch.export.unflatten(dynamic), "0", x)
    right = lmnfast.lmn(*lmnfast.cut(model, "0", x))
    assert float(lmnfast.lmn(tail, samples)) == pytest.approx(float(right), rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, but its modules are about
def test_scripted_parts_are_measured_and_their_insides_refused():
    model, x = mlp(), vectors()
    right = float(lmnfast.lmn(*lmnfast.cut(model, "0", x)))
    partly = nn.Sequential(torch.jit.script(model[0]), model[1:])
    assert float(lmnfast.lmn(*lmnfast.cut(partly, "0", x))) == pytest.approx(right, rel=1e-5)
    for compiled in (torch.jit.script(model), torch.jit.trace(model, x)):
        assert float(lmnfast.lmn(compiled, x)) == pytest.approx(float(lmnfast.lmn(model, x)), rel=1e-5)
        with pytest.raises(ValueError, match="'0' was called 0 times .* lies in a scripted or traced module"):
            lmnfast.cut(compiled, "0", x)


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_names_need_not_have_what_wrappers_put_into_them():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, x = nn.Sequential(nn.Linear(6, 6), mlp()), vectors()
    right = float(lmnfast.lmn(*lmnfast.cut(model, "1.0", x)))
    wrapped = {
        "module.1.0": nn.DataParallel(model),
        "_orig_mod.1.0": torch.compile(model, backend="eager"),
        "_orig_mod.module.1.0": torch.compile(nn.DataParallel(model), backend="eager"),
        "1._checkpoint_wrapped_module.0": nn.Sequential(model[0], checkpoint_wrapper(model[1])),
        "1._orig_mod.0": nn.Sequential(model[0], torch.compile(model[1], backend="eager")),
    }
    for name, wrapper in wrapped.items():
        if name == "1._orig_mod.0":
            wrapper(x)  # compiled by now, without the hook
        for layer in (name, "1.0"):
            tail, samples = lmnfast.cut(wrapper, layer, x)
            assert float(lmnfast.lmn(tail, samples)) == pytest.approx(right, rel=1e-5)
        assert lmnfast.match_layers(wrapper, "1.?") == ("1.0", "1.1", "1.2")
        assert _history(wrapper, x, "1.0")[0]["lmn"] == pytest.approx(right, rel=1e-5)
    assert lmnfast.match_layers(nn.DataParallel(model), "module.1.?")[0] == "module.1.0"
    assert recognise(nn.DataParallel(mlp())) is not None
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        wrapper.register_forward_hook(lambda module, args, output: output.sin())
        tail, samples = lmnfast.cut(wrapper, "1.0", x)
        torch.testing.assert_close(tail(samples), model(x).sin())
    owner = nn.DataParallel(nn.Sequential())
    owner.module.module = nn.Sequential(mlp())  # a part that is called module is the user's
    assert torch.equal(lmnfast.cut(owner, "module.module.0.0", x)[1], owner.module.module[0][0](x).detach())


def test_the_copies_that_ddp_keeps_in_step_are_left_out_of_a_measurement():
    """On one rank alone its forward, which broadcasts the buffers, would wait for the others."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), vectors()
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.forward = None
        right = lmnfast.lmn(*lmnfast.cut(model, "0", x))
        for layer in ("0", "module.0"):
            assert torch.equal(lmnfast.lmn(*lmnfast.cut(parallel, layer, x)), right)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_dynamically_quantised_layers_are_refused_and_those_behind_them_measured():
    from torch.ao.quantization import quantize_dynamic

    x = vectors()
    half = nn.Sequential(
        quantize_dynamic(nn.Sequential(nn.Linear(6, 8)), {nn.Linear}), nn.Tanh(), nn.Linear(8, 3)
    )
    with pytest.raises(
        ValueError, match="f: its part '0.0' is quantised dynamically: no scale is part of its state"
    ):
        lmnfast.lmn(half, x)
    tail, samples = lmnfast.cut(half, "0", x)
    L = truth(copy.deepcopy(half[1:]).double(), samples)
    assert (lmnfast.connectivity(tail, samples) - L).abs().max() < FLOAT32


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_observers_of_quantisation_stand_still():
    from torch.ao import quantization

    model = nn.Sequential(quantization.QuantStub(), mlp(), quantization.DeQuantStub()).train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)
    x = vectors(20)
    x[-1] *= 5
    model(x[:10])
    before = snapshot(model)
    values = [float(lmnfast.lmn(model, x)) for _ in range(2)]
    for (_, tensor, value, _), (_, now, _, _) in zip(before, snapshot(model), strict=True):
        assert tensor is now and torch.equal(tensor, value)
    model.eval().apply(quantization.disable_observer)
    expected = truth(lambda z: model(z.float()), x)
    assert values == pytest.approx([float(lmnfast.linear_mapping_number(expected))] * 2, rel=0.01)


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_statically_quantised_networks_are_measured_between_floating_point_tensors():
    from torch.ao import quantization

    model = nn.Sequential(
        quantization.QuantStub(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), quantization.DeQuantStub()
    ).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    quantization.prepare(model, inplace=True)
    x = vectors()
    model(x)
    quantization.convert(model, inplace=True)
    expected = lmnfast.linear_mapping_number(truth(lambda z: model(z.float()), x))
    assert float(lmnfast.lmn(model, x)) == pytest.approx(float(expected), rel=0.01)
    with pytest.raises(TypeError, match="quint8; .* cut behind the DeQuantStub"):
        lmnfast.cut(model, "1", x)


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
    hoisted = affine_start(tail)
    assert hoisted[0](samples).shape == (9, 6)
    rows = []
    model.affine[1].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    lmnfast.connectivity(tail, samples)
    assert max(rows) > 9, "a hook of the user's sees every point, as it may do anything"
    model.affine[1]._forward_hooks.clear()
    calls = []
    outputs_of = _prepare.outputs_of
    monkeypatch.setattr(_prepare, "outputs_of", lambda f, x: calls.append(x.shape[1:]) or outputs_of(f, x))
    L = lmnfast.connectivity(tail, samples)
    assert calls[-1] == (6,) and (L - truth).abs().max() < 2e-5
    assert torch.equal(lmnfast.connectivity(tail, samples, method="hermite").diagonal(), torch.ones(9))


def test_an_affine_end_at_the_last_position_has_lmn_1():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 64), nn.Linear(64, 3)

        def forward(self, x):
            return self.head(self.first(x)[:, -1])

    tail, samples = lmnfast.cut(Last(), "first", 30 * torch.randn(20, 5, 6))
    first, rest = affine_start(tail)
    assert first(samples).shape == (20, 3) and torch.equal(rest(first(samples)), tail(samples))
    assert float(lmnfast.lmn(tail, samples)) == pytest.approx(1, abs=1e-9)
    moved = lmnfast.cut(nn.Sequential(nn.Identity(), RowsMoved()), "0", vectors())[0]
    assert affine_start(moved) is None  # an index of rows is none of values


class RowsMoved(nn.Linear):
    def __init__(self):
        super().__init__(6, 2)

    def forward(self, x):
        return super().forward(x[[*range(len(x))], :] if isinstance(x, torch.Tensor) else x[0:])


def test_what_is_used_again_later_is_not_taken_off_the_start():
    x = vectors()
    tail, _ = lmnfast.cut(ResidualMLP(), "stem", x)
    assert affine_start(tail) is None  # the block and the sum both take the samples
    tail, _ = lmnfast.cut(nn.Sequential(nn.Identity(), ResidualMLP()), "0", x)
    first, _ = affine_start(tail)
    assert first(x).shape == (14, 10)
    for other in (nn.Linear(3, 2), torch.tanh, lmnfast.cut(normed(), "0", x)[0]):
        assert affine_start(other) is None
    batch = nn.Sequential(
        nn.Identity(), nn.BatchNorm1d(6, track_running_stats=False), nn.PReLU(), nn.Linear(6, 2)
    )
    assert affine_start(lmnfast.cut(batch, "0", x)[0]) is None


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


def test_the_documentations_examples_run_and_print_what_it_shows(capsys):
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert re.search(r"```\n(0:\n.*?)```", page, re.DOTALL)[1] in capsys.readouterr().out
