"""Models that autograd does not differentiate everywhere: their numbers by derivatives are those of the model itself.

Each model has its own forward without torch.fx, a plain function, as the truth. Its derivative differs from that of the values.
"""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

import lmnfast
from lmnfast._hook_tail import HookTail
from lmnfast._probed import Tail

METHODS = ("path", "hermite", "hermite-midpoint", "jacobian")


class Straight(torch.autograd.Function):
    """A step in the values, the identity in the derivative."""

    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x) + 0.1 * torch.sin(9 * x)

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.rest(self.first(x))


class Region(Base):
    def rest(self, h):
        with torch.no_grad():
            gate = torch.sigmoid(self.second(h))
        return self.last(torch.tanh(h) * gate)


class Inference(Base):
    def rest(self, h):
        with torch.inference_mode():
            gate = torch.sigmoid(self.second(h))
        return self.last(torch.tanh(h) + gate)


class Switched(Base):
    """By a function, and on again inside."""

    def rest(self, h):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        g = torch.tanh(self.second(h))
        with torch.enable_grad():
            h = g + torch.sin(self.second(h))
        g = torch.cos(h)
        torch.set_grad_enabled(before)
        return self.last(h * g)


class Decorated(Base):
    """A part without gradients."""

    @torch.no_grad()
    def scale(self, h):
        return h.abs().amax(1, keepdim=True)

    def rest(self, h):
        return self.last(torch.tanh(h / self.scale(h)))


class Chain(Base):
    """What a kernel would take, but for its derivative."""

    def rest(self, h):
        h = torch.tanh(h)
        with torch.no_grad():
            skip = torch.tanh(self.second(h))
        return self.last(h + skip)


class SplitsThere(Base):
    def rest(self, h):
        with torch.no_grad():
            a, b = torch.tanh(self.second(h)).chunk(2, 1)
        return self.last(torch.cat([a * h[:, :4], b], 1) + h)


class WritesThere(Base):
    def rest(self, h):
        h = self.second(h)
        with torch.no_grad():
            h.mul_(torch.cos(h))
        return self.last(h)


class WritesBehind(Base):
    def rest(self, h):
        with torch.no_grad():
            g = torch.tanh(self.second(h))
        g.mul_(h)
        return self.last(g)


class Own(Base):
    def rest(self, h):
        return self.last(Straight.apply(self.second(h)))


class OwnInside(Base):
    """The region in the forward of the function is not the model's."""

    class Function(Straight):
        @staticmethod
        def forward(ctx, x):
            with torch.no_grad():
                return torch.tanh(x) * torch.cos(x)

    def rest(self, h):
        return self.last(self.Function.apply(self.second(h)) + h)


class OwnWeight(Base):
    """Of the weight, which has no path to the samples."""

    def rest(self, h):
        return self.last(torch.tanh(nn.functional.linear(h, Straight.apply(self.second.weight))))


class Detached(Base):
    def rest(self, h):
        h = torch.tanh(h)
        return self.last(h + torch.sin(self.second(h)).detach())


class DetachedFirst(Base):
    """Behind affine maps alone."""

    def rest(self, h):
        h = self.second(h)
        return self.last(torch.tanh(h.detach()) * torch.sin(h))


class Backwards(Base):
    """A hook at the derivative of a part of torch."""

    def __init__(self):
        super().__init__()
        self.second.register_full_backward_hook(lambda part, inputs, outputs: (3 * inputs[0],))

    def rest(self, h):
        return self.last(torch.tanh(self.second(torch.tanh(h))) + torch.sin(h))


class Nested(Base):
    """A hook at the derivative of a part that torch.fx would look into."""

    def __init__(self):
        super().__init__()
        self.part = Part()
        self.part.register_full_backward_hook(lambda part, inputs, outputs: (3 * inputs[0],))

    def rest(self, h):
        return self.last(self.part(h) + torch.sin(h))


class Part(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * x


MODELS = [
    *(Region, Inference, Switched, Decorated, Chain, SplitsThere, WritesThere, WritesBehind, Own, OwnInside),
    *(OwnWeight, Detached, DetachedFirst, Backwards, Nested),
]


def made(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return kind().to(dtype), torch.randn(12, 4, dtype=dtype)


def truth(model, layer):
    return (lambda x: model(x)) if layer == "inputs" else (lambda h: model.rest(h))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layer", ["inputs", "first"])
@pytest.mark.parametrize("method", METHODS)
def test_a_tail_has_the_derivative_of_the_model(kind, layer, method):
    model, x = made(kind)
    tail, samples = lmnfast.cut(model, layer, x)
    plain = truth(model, layer)
    L = lmnfast.connectivity(tail, samples, method=method)
    assert (L - lmnfast.connectivity(plain, samples, method=method)).abs().max() < 1e-9
    if method == "jacobian":
        J = lmnfast.jacobians(tail, samples)
        assert (J - jacobians_of(plain, samples)).abs().max() < 1e-10
    if layer == "inputs":
        assert (lmnfast.connectivity(model, x, method=method) - L).abs().max() < 1e-9


def jacobians_of(f, x):
    """By autograd, one output at a time."""
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.stack([torch.autograd.grad(c.sum(), x, retain_graph=True)[0] for c in y.unbind(1)], 1)


@pytest.mark.parametrize("kind", [Region, Own, Detached, Backwards, OwnInside])
def test_the_models_are_told_from_their_values(kind):
    """A derivative of the values gives another number: the tests above can fail."""
    model, x = made(kind)
    step = 1e-6
    at = [torch.eye(4, dtype=x.dtype)[d] * step for d in range(4)]
    values = torch.stack([(model(x + e) - model(x - e)) / (2 * step) for e in at], 2)
    assert (values - jacobians_of(model, x)).abs().max() > 0.01


@pytest.mark.parametrize("kind", [Region, Detached, Own])
def test_differentiation_forwards_is_given_up_where_it_has_another_derivative(kind):
    model, x = made(kind)
    model.last = nn.Linear(8, 9).double()  # more outputs than inputs
    assert (lmnfast.jacobians(lambda x: model(x), x) - jacobians_of(model, x)).abs().max() < 1e-12


def test_outputs_without_any_gradient_are_measured_on_paths_and_refused_by_derivatives():
    model, x = made(Base)
    model.rest = torch.no_grad()(lambda h: model.last(torch.tanh(model.second(h))))
    tail, samples = lmnfast.cut(model, "first", x)
    L = lmnfast.connectivity(tail, samples)
    assert (L - lmnfast.connectivity(model.rest, samples)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="cannot be differentiated"):
        lmnfast.connectivity(tail, samples, method="jacobian")


def test_a_frozen_part_in_front_of_the_layer_does_not_matter():
    class Frozen(Base):
        def forward(self, x):
            with torch.no_grad():
                h = self.first(x)
            return self.rest(h)

        def rest(self, h):
            return self.last(torch.tanh(self.second(h)))

    class Looks(Frozen):
        def forward(self, x):
            return x if x.sum() > 1e9 else super().forward(x)  # not for torch.fx

    for kind in (Frozen, Looks):
        model, x = made(kind)
        tail, samples = lmnfast.cut(model, "first", x)
        assert isinstance(tail, fx.GraphModule)
        for method in METHODS:
            L = lmnfast.connectivity(tail, samples, method=method)
            assert (L - lmnfast.connectivity(model.rest, samples, method=method)).abs().max() < 1e-9


def test_on_paths_a_region_without_gradients_costs_no_fused_kernel():
    model, x = made(Chain, torch.float32)
    tail, samples = lmnfast.cut(model, "first", x)
    assert lmnfast.explain(model, "first", x)["first"].route == "fused"
    assert Tail(tail, "path").chain() is not None and Tail(tail, "hermite").chain() is None
    L = lmnfast.connectivity(tail, samples)
    exact = copy.deepcopy(model).double()
    assert (L - lmnfast.connectivity(exact.rest, samples.double())).abs().max() < 1e-5


def test_a_copy_of_a_tail_has_its_derivative():
    model, x = made(Region)
    tail, samples = lmnfast.cut(model, "first", x)
    L = lmnfast.connectivity(model.rest, samples, method="hermite")
    for again in (copy.deepcopy(tail), pickle.loads(pickle.dumps(tail))):
        assert (lmnfast.connectivity(again, samples, method="hermite") - L).abs().max() < 1e-12


def test_a_function_with_a_backward_of_its_own_runs_in_the_model():
    for kind in (Own, OwnInside):
        model, x = made(kind)
        assert isinstance(lmnfast.cut(model, "first", x)[0], HookTail)
    model, x = made(OwnWeight)
    assert isinstance(lmnfast.cut(model, "first", x)[0], fx.GraphModule)


def test_a_probe_measures_the_derivative_of_the_model():
    model, x = made(Chain)
    with lmnfast.Probe(model, x, "first", every=1, method="hermite") as probe:
        for step in range(2):
            probe(step)
            assert (
                abs(
                    probe.history[-1]["lmn"]
                    - lmnfast.lmn(model.rest, model.first(x).detach(), method="hermite")
                )
                < 1e-6
            )


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_whose_derivative_runs_hooks_has_that_derivative(method):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(),
        torch.randn(12, 4).double(),
    )
    model[1].register_full_backward_hook(lambda part, inputs, outputs: (inputs[0].sign() * inputs[0] ** 2,))
    L = lmnfast.connectivity(model, x, method=method)
    assert (L - lmnfast.connectivity(lambda x: model(x), x, method=method)).abs().max() < 1e-9
