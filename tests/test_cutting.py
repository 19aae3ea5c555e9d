"""Cutting a network at a layer."""

import operator
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from spellings import (
    TOKENS,
    HiddenInPlace,
    Network,
    Steps,
    Tangled,
    TransposedWeight,
    TwoOutputs,
    mixed_modes,
)
from torch import fx, nn

from lmnfast._connectivity import connectivity
from lmnfast._enqueue import enqueue
from lmnfast._recognise import recognise
from lmnfast._settings import Settings
from lmnfast._undisturbed import evaluating
from lmnfast.cutting import cut


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.first(x)
        return h + self.second(F.relu(h))


@pytest.mark.parametrize("layer", ["embedding", "hidden", "act", "drop", "second", "out"])
def test_the_tail_of_every_layer_gives_the_networks_output(layer):
    model = Network()
    tail, samples = cut(model, layer, TOKENS)
    assert isinstance(tail, fx.GraphModule) and not samples.requires_grad
    with evaluating(model):
        before = samples.clone()
        assert torch.equal(tail(samples), model(TOKENS))
        assert torch.equal(samples, before), "an in-place layer reached the samples"
    expected = {"embedding": 3, "hidden": 2, "act": 2, "drop": 2, "second": 1, "out": 0}[layer]
    chain = recognise(tail)
    assert (0 if chain is None else len(chain.weights)) == expected


def test_samples_are_the_layers_output_before_anything_works_on_it_in_place():
    model = Network()
    _, samples = cut(model, "hidden", TOKENS)
    with torch.no_grad():
        assert torch.equal(samples, model.hidden(model.embedding(TOKENS).flatten(1)))
    assert (samples < 0).any()


def test_a_tail_follows_training():
    model = Network().eval()
    tail, samples = cut(model, "second", TOKENS)
    with torch.no_grad():
        model.out.weight.mul_(2)
        model.out.bias.zero_()
        assert torch.equal(tail(samples), model(TOKENS))
    assert {id(p) for p in tail.parameters()} == {id(p) for p in model.out.parameters()}


def test_what_is_computed_from_parameters_alone_belongs_to_the_tail():
    model = Steps(nn.Linear(3, 3), TransposedWeight(3, 3))
    x = torch.randn(5, 3)
    tail, samples = cut(model, "parts.0", x)
    assert isinstance(tail, fx.GraphModule)
    assert [id(p) for p in tail.parameters()] == [id(model.parts[1].weight)]
    with torch.no_grad():
        model.parts[1].weight.mul_(2)
        assert torch.equal(tail(samples), model(x))


def test_a_container_can_be_cut_at():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2))
    tail, samples = cut(model, "0", torch.randn(5, 3))
    assert len(recognise(tail).weights) == 1
    assert (samples >= 0).all()


class Untraceable(nn.Module):
    """Loops over data, which torch.fx cannot follow, the second one also a tape cannot."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, scale=None):
        h = self.first(x)
        for _ in range(int((x[0, 0] > 1e9).item()) + 2):
            h = F.tanh(h)
        h = self.second(h)
        if h.isnan().any():
            h = h.nan_to_num()
        return h if scale is None else h * scale


def test_what_cannot_be_traced_runs_with_a_hook():
    model = Untraceable()
    x = torch.randn(5, 3)
    tail, samples = cut(model, "first", x)
    assert not isinstance(tail, fx.GraphModule) and recognise(tail) is None
    with torch.no_grad():
        assert torch.equal(tail(samples), model(x))
        other = torch.randn(9, 4)
        assert torch.equal(tail(other), model.second(other.tanh().tanh()))
    assert not model.first._forward_hooks


class TakesTracedForOther(nn.Module):
    """What torch.fx sees is not what runs: its stand-ins are no tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        return self.second(h.sigmoid() if isinstance(h, torch.Tensor) else h)


def test_a_trace_that_differs_from_the_model_is_not_used():
    model = TakesTracedForOther()
    x = torch.randn(5, 3)
    tail, samples = cut(model, "first", x)
    assert recognise(tail).activations[0].name == "sigmoid", "what runs is written down instead"
    with torch.no_grad():
        assert torch.equal(tail(samples), model(x))


def test_a_hook_tail_does_not_change_its_samples():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), Untraceable())
    tail, samples = cut(model, "0", torch.randn(50, 3))
    assert not isinstance(tail, fx.GraphModule)
    assert (samples < 0).any()


def test_both_kinds_of_tail_agree():
    class Traceable(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.second(self.model.first(x).tanh().tanh())

    model = Untraceable()
    x = torch.randn(5, 3)
    traced, _ = cut(Traceable(model), "model.first", x)
    hooked, _ = cut(model, "first", x)
    assert type(traced) is not type(hooked)
    points = torch.randn(30, 4)
    torch.testing.assert_close(traced(points), hooked(points))


def test_several_inputs_are_passed_as_positional_arguments():
    model = Untraceable().eval()
    x, scale = torch.randn(5, 3), torch.rand(5, 1)
    with pytest.raises(ValueError, match="layer: the model's output depends on the inputs also by"):
        cut(model, "first", (x, scale))
    tail, samples = cut(model, "first", (x, torch.tensor(3.0)))
    assert torch.equal(tail(samples), model(x, torch.tensor(3.0)))

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.second(self.first(x + y))

    tail, samples = cut(Sum(), "first", [x, x])
    assert len(recognise(tail).weights) == 1 and samples.shape == (5, 4)


def test_a_skip_connection_around_the_layer_is_refused():
    with pytest.raises(ValueError, match="depends on the inputs also by another way than through 'second'"):
        cut(Residual(), "second", torch.randn(5, 3))
    tail, _ = cut(Residual(), "first", torch.randn(5, 3))  # the skip starts there: all passes through
    assert isinstance(tail, fx.GraphModule)


def test_work_in_place_that_the_graph_does_not_show_is_not_lost():
    model = HiddenInPlace()
    x = torch.randn(5, 3)
    tail, samples = cut(model, "first", x)
    with torch.no_grad():
        assert torch.equal(tail(samples), model(x))


# What shares memory with a layer's output: h is the layer's input.
ALIASES = {
    "skip from before": lambda m, z, h: m.third(m.second(z) + h),
    "view from before": lambda m, z, h: m.third(m.second(z)) + h.view(-1, 3)[:, :3],
    "worked on in place": lambda m, z, h: m.third(torch.tanh(h) + z.mul_(2)),
    "sum in place": lambda m, z, h: (operator.iadd(z, 1), m.third(torch.tanh(h)))[1],
    "result not used": lambda m, z, h: m.third(torch.tanh(m.second(h))),
}


class Aliasing(Tangled):
    def __init__(self, function, layer):
        super().__init__(function)
        self.layer = layer

    def forward(self, x):
        h = self.first(x)
        return self.function(self, self.layer(h), h)


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.5), nn.Flatten()])
def test_what_shares_memory_with_a_layers_output_passes_through_it(layer, alias):
    torch.manual_seed(0)
    model = Aliasing(ALIASES[alias], layer).eval()
    x = 2 * torch.randn(8, 3)
    tail, samples = cut(model, "layer", x)
    points = torch.rand(11, 3)
    before = points.clone()
    with torch.no_grad():
        torch.testing.assert_close(tail(samples), model(x))
        expected = model.function(model, *[points.clone()] * 2)
        torch.testing.assert_close(tail(points), expected)
    assert torch.equal(points, before)
    for method in ("path", "hermite"):
        truth = enqueue(lambda z: model.function(model, *[z.clone()] * 2), samples, Settings(method)).L
        assert (connectivity(tail, samples, method=method) - truth).abs().max() < 1e-5
    with pytest.raises(ValueError, match="also by another way than through 'layer'"):
        cut(Aliasing(ALIASES[alias], nn.Tanh()), "layer", x)


def test_a_parameter_that_a_layer_hands_on_is_not_written_to():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Parameter(torch.randn(5, 3)), nn.Identity()

        def forward(self, x):
            return torch.tanh(self.layer(self.table) + x) + self.table

    model = Own()
    before, version = model.table.clone(), model.table._version
    with pytest.raises(ValueError, match="also by another way than through 'layer'"):
        cut(model, "layer", torch.randn(5, 3))
    assert torch.equal(model.table, before) and model.table._version == version


def test_a_traced_tail_can_be_pickled():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    tail, samples = cut(model, "0", torch.randn(5, 3))
    again = pickle.loads(pickle.dumps(tail))
    assert torch.equal(again(samples), tail(samples)) and recognise(again) is not None


def test_attention_takes_its_fast_path_again_when_the_last_measurement_is_over():
    enabled = torch.backends.mha.get_fastpath_enabled
    assert enabled()
    with evaluating():
        with evaluating():
            assert not enabled()
        assert not enabled()
    assert enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating():
            pass
        assert not enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_layer_that_does_not_exist_is_refused_with_those_that_do():
    message = "layer: 'hiden' is not in the model; it has hidden, embedding, act, drop, second, out"
    with pytest.raises(ValueError, match="layer: '17' is not in the model; it has 1, 0, 2$"):
        cut(nn.Sequential(*[nn.Identity() for _ in range(3)]), "17", TOKENS)
    with pytest.raises(ValueError, match="layer: 'x' is not in the model; it has 0, 1, .*, 19 and 5 more$"):
        cut(nn.Sequential(*[nn.Identity() for _ in range(25)]), "x", TOKENS)
    with pytest.raises(ValueError, match=message):
        cut(Network(), "hiden", TOKENS)
    with pytest.raises(TypeError, match="layer: expected a name, got int"):
        cut(Network(), 0, TOKENS)


def test_a_layer_called_never_or_twice_is_refused():
    shared = nn.Linear(3, 3)
    model = Steps(shared, torch.relu, shared)
    with pytest.raises(
        ValueError, match="layer: 'parts.0' was called 2 times in one forward pass; expected once; which call"
    ):
        cut(model, "parts.0", torch.randn(5, 3))
    with pytest.raises(ValueError, match="layer: 'parts' was called 0 times"):
        cut(model, "parts", torch.randn(5, 3))


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (lambda h: (h.long(), 1), TypeError, "layer: the output of 'parts.1' is tuple; expected a floating"),
        (lambda h: h.long(), TypeError, r"layer: the output of 'parts.1' is a tensor of torch\.int64"),
        (lambda h: h.flatten(), ValueError, r"layer: the output of 'parts.1' has shape \(15,\) for 5 inputs"),
    ],
)
def test_a_layer_whose_output_is_no_batch_of_samples_is_refused(step, error, message):
    model = Steps(nn.Linear(3, 3), Steps(step), lambda h: torch.zeros(5, 1))
    with pytest.raises(error, match=message):
        cut(model, "parts.1", torch.randn(5, 3))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("text", TypeError, "inputs: expected a tensor, or a tuple or a dict of tensors, got str"),
        ((), TypeError, "inputs: expected a tensor, or a tuple or a dict of tensors, got nothing"),
        (torch.zeros(0, 3), ValueError, r"inputs: expected at least one sample, got shape \(0, 3\)"),
        (torch.tensor(1.0), ValueError, r"inputs: expected at least one sample, got shape \(\)"),
    ],
)
def test_inputs_that_are_no_samples_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        cut(nn.Sequential(nn.Linear(3, 3)), "0", inputs)


def test_models_that_return_no_tensor_are_refused():
    with pytest.raises(TypeError, match="model: its output is tuple; expected a floating-point tensor"):
        cut(nn.Sequential(nn.Identity(), TwoOutputs(3, 3)), "0", torch.randn(5, 3))
    with pytest.raises(TypeError, match="model: expected an nn.Module, got function"):
        cut(lambda x: x, "0", torch.randn(5, 3))


def test_inputs_that_require_grad_are_taken_and_nothing_returned_does():
    x = torch.randn(5, 3, requires_grad=True)
    for model in (Untraceable(), nn.Sequential(nn.Linear(3, 3), nn.ReLU())):
        _, samples = cut(model, next(model.named_children())[0], x)
        assert not samples.requires_grad
    assert x.grad is None


def test_inputs_that_the_model_would_change_in_place_are_kept():
    x = torch.randn(5, 3)
    before = x.clone()
    cut(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), "1", x)
    cut(Steps(nn.ReLU(inplace=True), Untraceable()), "parts.1.first", x)
    assert torch.equal(x, before)


def test_compiled_models_are_cut_under_the_names_of_the_original():
    model = torch.compile(Network(), backend="eager")
    tail, _ = cut(model, "hidden", TOKENS)
    assert len(recognise(tail).weights) == 2
    assert recognise(torch.compile(nn.Linear(3, 3), backend="eager")) is not None


def test_models_compiled_in_place_are_measured_uncompiled():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = Steps(nn.Linear(3, 4), torch.relu, nn.Linear(4, 2))
    model.compile(backend=backend)
    x = torch.randn(5, 3)
    model(x)
    tail, _ = cut(model, "parts.0", x)
    assert recognise(model) is not None and recognise(tail) is not None
    model(x)
    assert len(compilations) == 1
    inner = nn.Sequential(nn.Linear(3, 3), torch.compile(Steps(nn.Linear(3, 4), torch.relu), backend=backend))
    with torch.no_grad():
        inner(x)
        tail, _ = cut(inner, "1.parts.0", x)
        assert recognise(inner) is not None and isinstance(tail, fx.GraphModule)
        inner(x)
    assert len(compilations) == 2


class Talkative(nn.Module):
    """Does in forward all that a measure must undo: keeps tensors, counts, draws random numbers."""

    def __init__(self, failing_calls=()):
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.count = 0
        self.failing_calls = list(failing_calls)
        self.ever = SimpleNamespace(calls=0)  # an object of a class that measuring leaves alone

    def forward(self, x):
        self.calls += 1
        self.count = self.count + 1
        self.hidden = self.drop(self.first(x))
        self.ever.calls += 1
        if self.ever.calls in self.failing_calls:
            raise OverflowError("model failed")
        noise = torch.randn(1)
        self.last = noise.clone()
        return self.second(self.hidden) + 0 * noise


def state(model):
    """All that measuring could change."""
    return {
        "attributes": {name: sorted(vars(part)) for name, part in model.named_modules()},
        "modes": [part.training for part in model.modules()],
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()],
        "tensors": {name: value.tolist() for name, value in model.state_dict().items()},
        "versions": [p._version for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "count": getattr(model, "count", None),
        "random": torch.get_rng_state().tolist(),
        "grad_mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("model", [Network(), Talkative(), Residual()])
def test_cutting_and_recognising_leave_no_trace(model):
    mixed_modes(model)
    inputs = TOKENS if isinstance(model, Network) else torch.randn(5, 3)
    before = state(model)
    recognise(model)
    cut(model, "first" if isinstance(model, Residual) else "drop", inputs)
    assert state(model) == before


FAILING = {"for the samples": [1], "traced, and with the hook": [2, 3]}


@pytest.mark.parametrize("failing_calls", FAILING.values(), ids=FAILING)
def test_errors_leave_no_trace(failing_calls):
    model = mixed_modes(Talkative(failing_calls))
    x = torch.randn(5, 3)
    before = state(model)
    with pytest.raises(OverflowError, match="model failed"):
        cut(model, "first", x)
    assert state(model) == before and model.ever.calls == failing_calls[-1]


def test_dropout_in_training_is_measured_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 30), nn.Dropout(0.5), Untraceable())
    model[2].first, model[2].drop = nn.Linear(30, 4), nn.Dropout(0.5)
    x = torch.randn(5, 3)
    for layer in ("0", "1", "2.first"):
        tail, samples = cut(model, layer, x)
        with evaluating(tail, model):
            assert torch.equal(tail(samples), model(x))
        assert model.training and model[1].training
