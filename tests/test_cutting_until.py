"""The map from one layer to a later one, and from the inputs on."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from architectures import (
    Functional,
    ResidualMLP,
    Transformer,
    Twice,
    check_tail,
    tokens,
    vectors,
)
from torch import fx, nn

import lmnfast
from lmnfast import cut
from lmnfast._run_to import Cutting, run_to


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
    check_tail(tail, samples, expected)
    assert isinstance(tail, fx.GraphModule) == (name != "by the hook")
    with torch.no_grad():  # it follows the training
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(tail(samples), cut(model, layer, x, until=until)[0](samples))


def test_calls_of_the_end_before_the_layer_count_although_they_are_replayed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.Tanh()
            self.stem = nn.Sequential(nn.Linear(6, 6), self.act, nn.Linear(6, 6))
            self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.act(self.stem(x))
            hidden = self.act(self.layer(x))
            return self.last(hidden if float(hidden.sum()) < 1e9 else 2 * hidden)

    torch.manual_seed(0)
    model, x = Model(), vectors()
    tail, samples = cut(model, "layer", x, until="act@2")
    check_tail(tail, samples, nn.Tanh())
    tail, samples = cut(model, "stem.0", x, until="act@1")
    check_tail(tail, samples, nn.Sequential(model.act, model.stem[2], model.act))
    with pytest.raises(ValueError, match="until: 'act' was called 3 times .* from 'act@0' to 'act@2'"):
        cut(model, "layer", x, until="act")
    with pytest.raises(ValueError, match="until: 'act@1' runs before 'layer'"):
        cut(model, "layer", x, until="act@1")


def test_a_layer_whose_memory_a_later_one_takes_is_replaced_there_too():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.SiLU(inplace=True))
    exact = nn.Sequential(nn.Linear(6, 4), nn.SiLU())
    exact[0].load_state_dict(model[2].state_dict())
    for block in (False, True):
        how = {"block": "2"} if block else {"layer": "1", "until": "3"}
        check_tail(*cut(model, inputs=vectors(), **how), exact[:1] if block else exact)
    check_tail(*cut(model, block="3", inputs=vectors()), nn.SiLU())


@pytest.mark.parametrize("model", [Functional(), Untraceable()])
@pytest.mark.parametrize("how", [{"layer": "first", "until": "third"}, {"block": "second"}, {"layer": ""}])
def test_tails_are_copied_and_pickled(model, how):
    tail, samples = cut(model, inputs=vectors(), **how)
    for again in (copy.deepcopy(tail), pickle.loads(pickle.dumps(tail))):
        with torch.no_grad():
            torch.testing.assert_close(again(samples), tail(samples))
        assert lmnfast.lmn(again, samples) == lmnfast.lmn(tail, samples)


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
    check_tail(
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
    check_tail(*cut(model, "first", x, until="lstm"), lambda z: exact.lstm(z)[0])
    last = {"until": "lstm", "output": lambda result: result[0][:, -1]}
    check_tail(*cut(model, "first", x, **last), lambda z: exact.lstm(z)[0][:, -1])
    check_tail(
        *cut(model, block="lstm", inputs=x, output=lambda r: r[1][0][0]), lambda z: exact.lstm(z)[1][0][0]
    )
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


def test_a_model_that_fails_before_the_end_raises_its_own_error():
    class Failing(Functional):
        def forward(self, x):
            self.first(x)
            raise OverflowError("model failed")

    for layer in ("", "first"):
        with pytest.raises(OverflowError, match="model failed"):
            cut(Failing(), layer, vectors(), until="second")
    with pytest.raises(TypeError, match="inputs: do not fit the arguments of the model's forward"):
        cut(Functional(), "", (vectors(), vectors()), until="second")

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return torch.vmap(self.inner)(self.first(x))

    with pytest.raises(ValueError, match="until: 'inner' is called under torch.vmap, one sample at a time"):
        cut(Mapped(), "first", vectors(), until="inner")


def test_an_end_that_is_called_twice_needs_a_number():
    model, x = Twice(), vectors()
    with pytest.raises(ValueError, match="until: 'layer' was called 2 times .* from 'layer@0' to 'layer@1'"):
        cut(model, "", x, until="layer")
    check_tail(*cut(model, "", x, until="layer@1"), nn.Sequential(model.layer, nn.ReLU(), model.layer))
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


def test_a_cut_from_the_inputs_on_is_the_whole_model():
    torch.manual_seed(0)
    model, x = Functional(), vectors()
    for layer in ("", "inputs"):
        tail, samples = cut(model, layer, x)
        assert torch.equal(samples, x) and samples is not x
        check_tail(tail, samples, model)
    assert lmnfast.explain(model, "inputs", x)["inputs"].route == "fused"
    assert float(lmnfast.lmn(*cut(model, "", x))) == float(lmnfast.lmn(model, x))

    class Conditioned(Functional):
        def forward(self, scale, x, flag=None):
            return super().forward(x * scale)

    model = Conditioned()
    scale = torch.full((14, 1), 0.7)
    tail, samples = cut(model, "", {"x": x, "scale": scale, "flag": None})
    exact = copy.deepcopy(model).double()
    check_tail(tail, samples, lambda z: exact(0.7, z))
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


def test_a_map_to_a_layer_costs_no_pass_of_its_own():
    """A cut runs the model once, to its end; a probe's later measurements only up to the end of the map."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2)
            self.ran = []

        def forward(self, x):
            if not isinstance(x, torch.fx.Proxy):
                COUNTS[0] += len(x) == 14
            y = self.second(torch.tanh(self.first(x)))
            if not isinstance(x, torch.fx.Proxy):
                COUNTS[1] += len(x) == 14
            return self.last(y)

    model, x = Counted(), vectors()
    for layer in ("first", "inputs"):
        COUNTS[:] = 0, 0
        run_to(model, layer, x, Cutting(until="second"))
        assert COUNTS == [1, 1]
    with lmnfast.Probe(model, x, "first", until="second", every=1) as probe:
        COUNTS[:] = 0, 0
        for step in range(3):
            with torch.no_grad():
                model.first.weight.mul_(1.1)
            probe(step)
        rows = probe.history
    assert COUNTS == [3, 0], "one pass for each measurement, and nothing behind the end"
    assert len({row["lmn"] for row in rows}) == 3
    assert rows[-1]["lmn"] == lmnfast.lmn(*cut(model, "first", x, until="second"))


COUNTS = [0, 0]


def test_a_probe_says_why_a_map_no_longer_ends():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = self.first(x)
            return self.second(h) if float(self.first.bias.sum()) < 100 else h[:, :4]

    model = Model()
    with lmnfast.Probe(model, vectors(), "first", until="second", every=1) as probe:
        with torch.no_grad():
            model.first.bias.fill_(1000)
        with pytest.raises(ValueError, match="until: 'second' was called 0 times in one forward pass"):
            probe(0)
