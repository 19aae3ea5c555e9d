"""The map from one layer to another, of one module alone, and from the inputs on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import FLOAT32, Functional, ResidualMLP, Transformer, Twice, tokens, truth, vectors
from torch import fx, nn

import lmnfast
from lmnfast import cut


def check(tail, samples, expected):
    """The tail has the expected outputs, also in a larger batch, and its connectivity is that of the definition."""
    exact = copy.deepcopy(expected).double() if isinstance(expected, nn.Module) else expected
    with torch.no_grad():
        for x in (samples, torch.cat([samples.flip(0), samples])):
            torch.testing.assert_close(tail(x).double(), exact(x.double()), atol=1e-4, rtol=1e-4)
    assert (lmnfast.connectivity(tail, samples) - truth(exact, samples)).abs().max() < FLOAT32


class Untraceable(Functional):
    """torch.fx cannot trace it, and neither can a tape be made of it."""

    def forward(self, x):
        hidden = F.silu(self.first(x))
        return self.third(F.gelu(self.second(hidden if float(hidden.sum()) < 1e9 else 2 * hidden)))


class Watched(nn.Module):
    """Whether a part behind the end of a map runs."""

    def __init__(self, model):
        super().__init__()
        self.model, self.runs = model, []

    def forward(self, x):
        y = self.model(x)
        self.runs.append(len(x))
        return {"loss": y.mean()}  # no row per sample


# model, inputs, layer, until, and the map between their outputs
MAPS = {
    "chain": (Functional, vectors, "first", "second", lambda m: nn.Sequential(nn.SiLU(), m.second)),
    "by the hook": (Untraceable, vectors, "first", "second", lambda m: nn.Sequential(nn.SiLU(), m.second)),
    "residual": (ResidualMLP, vectors, "stem", "after.0", lambda m: lambda x: x + m.blocks[0](x)),
    "two blocks": (lambda: ResidualMLP(True), vectors, "stem", "after.1", None),
    "blocks of a transformer": (Transformer, tokens, "blocks.0", "blocks.1", lambda m: m.blocks[1]),
    "inside a block": (
        Transformer,
        tokens,
        "blocks.0.norm_2",
        "blocks.0.mlp.2",
        lambda m: m.blocks[0].mlp,
    ),
    "to a layer around": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.SiLU(), nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2)),
        vectors,
        "1.1",
        "1",
        lambda m: m[1][2],
    ),
    "calls by number": (
        Twice, vectors, "layer@0", "layer@1", lambda m: nn.Sequential(nn.ReLU(), m.layer)
    ),
    "from the inputs on": (Functional, vectors, "", "first", lambda m: m.first),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_a_map_from_one_layer_to_another_is_what_lies_between(name):
    torch.manual_seed(0)
    make, inputs, layer, until, between = MAPS[name]
    model, x = make().eval(), inputs()
    tail, samples = cut(model, layer, x, until=until)
    if between is None:
        exact = copy.deepcopy(model).double()

        def expected(z):
            z = z + exact.blocks[0](z)
            return z + exact.blocks[1](z)
    else:
        expected = between(copy.deepcopy(model).double())
    check(tail, samples, expected)
    assert isinstance(tail, fx.GraphModule) == (name != "by the hook") or name == "by the hook"
    with torch.no_grad():  # it follows the training
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(tail(samples), cut(model, layer, x, until=until)[0](samples))


def test_nothing_behind_the_end_of_a_map_runs_and_its_output_does_not_matter():
    model, x = Watched(Untraceable()), vectors()
    with pytest.raises(TypeError, match="model: its output is dict"):
        cut(model, "model.first", x)
    tail, samples = cut(model, "model.first", x, until="model.second")
    runs = len(model.runs)
    lmnfast.lmn(tail, samples)
    assert len(model.runs) == runs

    class Failing(Functional):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no labels")

    model = Failing()
    check(
        *cut(model, "first", x, until="third"), nn.Sequential(nn.SiLU(), model.second, nn.GELU(), model.third)
    )
    with pytest.raises(RuntimeError, match="no labels"):
        cut(model, "first", x)


def test_the_output_of_a_map_is_the_first_tensor_or_the_one_that_is_asked_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lstm, self.last = (
                nn.Linear(3, 5),
                nn.LSTM(5, 7, batch_first=True),
                nn.Linear(7, 2),
            )

        def forward(self, x):
            return self.last(self.lstm(self.first(x))[0])

    model, x = Model(), torch.randn(9, 4, 3)
    exact = copy.deepcopy(model).double()
    check(*cut(model, "first", x, until="lstm"), lambda z: exact.lstm(z)[0])
    last = {"until": "lstm", "output": lambda result: result[0][:, -1]}
    check(*cut(model, "first", x, **last), lambda z: exact.lstm(z)[0][:, -1])
    check(*cut(model, block="lstm", inputs=x, output=lambda r: r[1][0][0]), lambda z: exact.lstm(z)[1][0][0])
    with pytest.raises(ValueError, match="output: no 'logits' in what the model returns, a tuple of 2"):
        cut(model, "first", x, until="lstm", output="logits")


UNTIL_ERRORS = {
    ("0", "9"): "until: '9' is not in the model; it has 0, 1, 1.0, 1.1, 2, unused",
    ("0", "0"): "until: '0' is the layer itself; expected one that runs behind it",
    ("2", "0"): "until: '0' runs before '2'; expected a layer that runs behind it",
    ("1", "1.0"): "until: '1.0' is inside '1' and returns before it; expected a layer that runs behind it",
    ("0", "1@2"): "until: '1@2' is its call 2, from 0 on, but there are 1 in a forward pass",
    (
        "0",
        "unused",
    ): "until: 'unused' was called 0 times in one forward pass; expected once; these inputs do not",
    (
        "unused",
        "2",
    ): "layer: 'unused' was called 0 times in one forward pass; expected once; these inputs do not",
}


@pytest.mark.parametrize("names", UNTIL_ERRORS)
def test_a_layer_that_is_no_end_is_refused(names):
    class Model(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 8), nn.Sequential(nn.SiLU(), nn.Linear(8, 8)), nn.Linear(8, 2))
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            return self[2](self[1](self[0](x)))

    with pytest.raises(ValueError) as error:
        cut(Model(), names[0], vectors(), until=names[1])
    assert str(error.value).startswith(UNTIL_ERRORS[names])


def test_an_end_that_is_called_twice_needs_a_number():
    model, x = Twice(), vectors()
    with pytest.raises(ValueError, match="until: 'layer' was called 2 times .* from 'layer@0' to 'layer@1'"):
        cut(model, "", x, until="layer")
    check(*cut(model, "", x, until="layer@1"), nn.Sequential(model.layer, nn.ReLU(), model.layer))
    with pytest.raises(ValueError, match="until: 'layer@0' runs before 'layer@1'"):
        cut(model, "layer@1", x, until="layer@0")


def test_a_way_around_the_layer_is_refused_and_the_end_is_named():
    model, x = Transformer(), tokens()
    for layer in ("blocks.0.mlp", "blocks.0.norm_1"):
        with pytest.raises(ValueError) as error:
            cut(model, layer, x, until="blocks.0")
        assert str(error.value) == (
            f"layer: the output of 'blocks.0' depends on the inputs also by another way than through {layer!r} (a skip "
            f"connection around it, say); expected a layer that all of it passes through; block={layer!r} measures that "
            "part alone"
        )
    with pytest.raises(
        ValueError, match="the output of 'norm' depends .* as 'blocks.0' is; block='blocks.0.mlp' measures"
    ):
        cut(model, "blocks.0.mlp", x, until="norm")


class Attention(nn.Module):
    """Takes its arguments as today's transformers do."""

    def __init__(self, width=6):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden, attention_mask=None, position_embeddings=None, **options):
        cos, sin = position_embeddings
        q, k = (part(hidden) * cos + part(hidden).roll(1, -1) * sin for part in (self.q, self.k))
        return F.scaled_dot_product_attention(q, k, self.v(hidden), attention_mask), None


class Masked(nn.Module):
    """Blocks with masks, embeddings of positions and a cache, around which skip connections go."""

    def __init__(self, width=6):
        super().__init__()
        self.stem, self.attention = nn.Linear(width, width), Attention(width)
        self.mlp, self.head = (
            nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width)),
            nn.Linear(width, 3),
        )
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, mask=None):
        x = self.stem(x)
        mask = None if mask is None else mask[:, None, :].expand(-1, x.shape[1], -1)
        angles = self.scale * torch.arange(x.shape[1]).float()[None, :, None]
        positions = angles.cos(), angles.sin()
        x = (
            x
            + self.attention(
                x, attention_mask=mask, position_embeddings=positions, past=None, cache={"n": 0}
            )[0]
        )
        return self.head(x + self.mlp(x))


def test_a_module_alone_is_measured_although_skip_connections_go_around_it():
    torch.manual_seed(0)
    x = vectors()
    model = ResidualMLP(True)
    tail, samples = cut(model, block="blocks.1", inputs=x)
    torch.testing.assert_close(
        samples, model.after[0](model.stem(x) + model.blocks[0](model.stem(x))).detach()
    )
    check(tail, samples, model.blocks[1])
    assert lmnfast.explain(ResidualMLP(), block="blocks.0", inputs=x)["blocks.0"].route == "fused"
    model, x = Transformer().eval(), tokens()
    for name in ("blocks.0", "blocks.1.mlp", "blocks.1.norm_1", "blocks.0.out", "head"):
        tail, samples = cut(model, block=name, inputs=x)
        check(tail, samples, model.get_submodule(name))
        assert isinstance(tail, fx.GraphModule)


def test_the_other_arguments_of_a_module_stay_as_they_are():
    torch.manual_seed(0)
    model, x = Masked(), torch.randn(8, 5, 6)
    exact = copy.deepcopy(model).double()
    angles = torch.arange(5.0).double()[None, :, None]
    positions = {"position_embeddings": (angles.cos(), angles.sin())}
    check(*cut(model, block="attention", inputs=x), lambda z: exact.attention(z, **positions)[0])
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[:, 3:] = False

    def masked(z):
        return exact.attention(z, mask[:1, None, :].expand(len(z), 5, 5), **positions)[0]

    check(*cut(model, block="attention", inputs=(x, mask)), masked)
    five = torch.randn(5, 5, 6)  # as many samples as tokens
    check(*cut(model, block="attention", inputs=five), lambda z: exact.attention(z, **positions)[0])


def test_an_argument_that_differs_between_samples_is_refused_by_name_if_it_matters():
    torch.manual_seed(0)
    model, x, mask = Masked(), torch.randn(8, 5, 6), torch.ones(8, 5, dtype=torch.bool)
    mask[:3, 3:] = False
    with pytest.raises(ValueError) as error:
        cut(model, block="attention", inputs=(x, mask))
    assert str(error.value) == (
        "block: the output of 'attention' depends also on 'attention_mask', not the same for all samples; expected one value "
        "of it for all samples (of a padding mask: samples of equal length, or one mask, repeated)"
    )
    check(*cut(model, block="mlp", inputs=(x, mask)), model.mlp)  # the mask does not reach it
    with pytest.raises(
        ValueError, match="layer: the model's output depends also on the input 'mask', not the same"
    ):
        cut(model, "", (x, mask))

    class Ignoring(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.part = nn.Linear(6, 6), Part()

        def forward(self, x, label):
            return x[:, :2] + self.part(self.first(x), label=label)

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x, label):
            return torch.tanh(self.layer(x)) + 0 * label[:, None]

    model = Ignoring()  # the labels differ, and change nothing
    check(
        *cut(model, block="part", inputs=(vectors(), torch.arange(14.0))),
        nn.Sequential(model.part.layer, nn.Tanh()),
    )


def test_one_tensor_in_several_arguments_is_replaced_in_all():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2).eval()
    x = torch.randn(8, 4, 6)
    exact = copy.deepcopy(encoder).double()
    tail, samples = cut(encoder, block="layers.0.self_attn", inputs=x)
    assert torch.equal(samples, x)
    check(tail, samples, lambda z: exact.layers[0].self_attn(z, z, z, need_weights=False)[0])
    check(*cut(encoder, block="layers.1", inputs=x), encoder.layers[1])


class Cache:
    """As the caches of keys and values are: every call adds to it."""

    def __init__(self):
        self.values = []


def test_an_object_among_the_arguments_is_as_it_was_before_the_call():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x, cache):
            cache.values.append(self.layer(x))
            return sum(cache.values)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Cached()

        def forward(self, x):
            return x + self.part(x, cache=Cache())

    torch.manual_seed(0)
    model = Model()
    check(*cut(model, block="part", inputs=vectors()), model.part.layer)


def test_a_module_that_cannot_be_measured_alone_is_told_why():
    model, x = Transformer(), tokens()
    with pytest.raises(ValueError, match="block: 'blocks.9' is not in the model; it has"):
        cut(model, block="blocks.9", inputs=x)
    with pytest.raises(
        TypeError,
        match=r"block: 'token' takes no floating-point tensor with a row for each of 12 samples, but 'input' \(12, 4\) of "
        "torch.int64",
    ):
        cut(model, block="token", inputs=x)
    with pytest.raises(
        ValueError, match="block: 'blocks' was called 0 times .* a container that has no forward"
    ):
        cut(model, block="blocks", inputs=x)
    twice, x = Twice(), vectors()
    with pytest.raises(ValueError, match="block: 'layer' was called 2 times .* from 'layer@0' to 'layer@1'"):
        cut(twice, block="layer", inputs=x)
    tail, samples = cut(twice, block="layer@1", inputs=x)
    torch.testing.assert_close(samples, torch.relu(twice.layer(x)).detach())
    check(tail, samples, twice.layer)
    with pytest.raises(ValueError, match="layer: expected either layer or block, got both"):
        cut(twice, "layer", x, block="layer")
    with pytest.raises(ValueError, match="layer: expected either layer or block, got neither"):
        cut(twice, inputs=x)
    with pytest.raises(
        ValueError, match="until: expected with a layer alone, as a block ends where its module ends"
    ):
        cut(twice, block="layer@0", inputs=x, until="last")

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    with pytest.raises(ValueError, match=r"block: the output of '0' has shape \(\) for 14 inputs"):
        cut(nn.Sequential(Mean()), block="0", inputs=x)

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return torch.vmap(self.inner)(x)

    with pytest.raises(ValueError, match="block: 'inner' is called under torch.vmap, one sample at a time"):
        cut(Mapped(), block="inner", inputs=x)


def test_a_cut_from_the_inputs_on_is_the_whole_model():
    torch.manual_seed(0)
    model, x = Functional(), vectors()
    for layer in ("", "inputs"):
        tail, samples = cut(model, layer, x)
        assert torch.equal(samples, x) and samples is not x
        check(tail, samples, model)
    assert lmnfast.explain(model, "inputs", x)["inputs"].route == "fused"
    assert float(lmnfast.lmn(*cut(model, "", x))) == float(lmnfast.lmn(model, x))

    class Conditioned(Functional):
        def forward(self, scale, x, flag=None):
            return super().forward(x * scale)

    model = Conditioned()
    scale = torch.full((14, 1), 0.7)
    tail, samples = cut(model, "", {"x": x, "scale": scale, "flag": None})
    exact = copy.deepcopy(model).double()
    check(tail, samples, lambda z: exact(0.7, z))
    with pytest.raises(
        ValueError, match="layer: the model's output depends also on the input 'x', not the same"
    ):
        cut(model, "", {"scale": scale, "x": x})
    named = nn.ModuleDict({"inputs": nn.Linear(6, 3)})
    named.forward = lambda x: named["inputs"](x)
    assert cut(named, "inputs", x)[1].shape == (14, 3) and cut(named, "", x)[1].shape == (14, 6)


def test_tokens_are_no_samples():
    with pytest.raises(TypeError) as error:
        cut(Transformer(), "", tokens())
    assert str(error.value) == (
        "layer: '' is the model's input, of torch.int64; integers (tokens) cannot be interpolated: cut at the embedding, as "
        "'token', or name a floating-point input first"
    )


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
