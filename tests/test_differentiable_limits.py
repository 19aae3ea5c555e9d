"""Gradients where f changes, branches, or has samples and outputs of unusual size."""

import pytest
import torch
from graphs import LOBATTO
from support import mlp, samples
from torch import Tensor, nn

import lmnfast
from lmnfast import _threads, reference
from lmnfast.quadrature import path_nodes

DOUBLE = torch.float64
RULE = path_nodes("lobatto", LOBATTO["points"])


def gradients(value: Tensor, f: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(f.parameters()), materialize_grads=True))


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.factor = normed(), torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.factor * self.net(x))


def changed_running_statistics(f: nn.Module, x: Tensor) -> None:
    f.train()(x)


def changed_attribute(f: nn.Module, x: Tensor) -> None:
    f.factor.mul_(1.5)


@pytest.mark.parametrize("change", [changed_running_statistics, changed_attribute])
def test_a_change_of_f_before_the_backward_pass_is_an_error(change):
    torch.manual_seed(0)
    x = 2 * samples(12, 4, dtype=DOUBLE) + 1
    f = Doubling()
    if change is changed_running_statistics:
        f = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.LayerNorm(6)).double()
    value = lmnfast.curvature(f, x, **LOBATTO, differentiable=True)
    change(f, x)
    with pytest.raises(RuntimeError, match="other outputs in the backward pass"):
        value.backward()
    value = lmnfast.curvature(f, x, **LOBATTO, differentiable=True)
    value.backward()  # nothing has changed since


class Routed(nn.Module):
    """Each sample goes to one of three networks."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(4, 3)
        self.networks = nn.ModuleList(mlp(4, 6, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.route(x).argmax(-1)
        y = x.new_zeros(len(x), 2)
        for n, network in enumerate(self.networks):
            own = (chosen == n).nonzero()[:, 0]
            if len(own):
                y = y.index_copy(0, own, network(x[own]))
        return y


def test_parameters_that_few_samples_reach_get_their_gradient():
    torch.manual_seed(0)
    f, x = Routed().double(), samples(20, 4, dtype=DOUBLE)
    assert f.route(x).argmax(-1).unique().numel() == 3
    own = gradients(lmnfast.connectivity(f, x, **LOBATTO, differentiable=True).sum(), f.networks)
    true = reference.path_connectivity_backward(
        f, x, torch.ones(20, 20, dtype=DOUBLE), *RULE, [*f.networks.parameters()]
    )[1:]
    for mine, other in zip(own, true, strict=True):
        assert (mine - other).abs().max() <= 1e-9


class Counting(nn.Module):
    """Its outputs depend on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = normed(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.calls * self.net(x))


def test_every_call_behaves_like_the_first():
    torch.manual_seed(0)
    f, x = Counting(), samples(70, 4, dtype=DOUBLE)
    own = gradients(lmnfast.connectivity(f, x, **LOBATTO, differentiable=True).sum(), f)
    once = nn.Sequential(f.net, nn.Tanh())
    true = reference.path_connectivity_backward(once, x, torch.ones(70, 70), *RULE, [*f.parameters()])[1:]
    for mine, other in zip(own, true, strict=True):
        assert (mine - other).abs().max() <= 1e-9 * max(t.abs().max() for t in true)
    assert f.calls == 0


@pytest.mark.parametrize("kind", ["chain", "function"])
@pytest.mark.parametrize("asked", ["x", "weight"])
def test_a_second_derivative_in_some_tensors_is_an_error(kind, asked):
    f = mlp(4, 6, 2).double() if kind == "chain" else normed()
    x = samples(8, 4, dtype=DOUBLE).requires_grad_()
    first, second = (x, f[0].weight) if asked == "weight" else (f[0].weight, x)
    value = lmnfast.connectivity(f, x, **LOBATTO, differentiable=True).sum()
    (gradient,) = torch.autograd.grad(value, first, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(
            lambda z: lmnfast.curvature(f, z, **LOBATTO, differentiable=True), x.detach()
        )


@pytest.mark.parametrize("kind", ["chain", "function"])
@pytest.mark.parametrize("distance", [1e-8, 1e-10, 1e-12, 1e-14])
def test_nearly_equal_samples_have_the_gradient_of_equal_ones(kind, distance):
    f = (
        mlp(10, 30, 3).double()
        if kind == "chain"
        else nn.Sequential(mlp(10, 30, 3), nn.LayerNorm(3)).double()
    )
    x = samples(8, 10, dtype=DOUBLE)
    x[1] = x[0]
    found = []
    for step in (0.0, distance):
        z = x.clone()
        z[1] += step * samples(1, 10, seed=5, dtype=DOUBLE)[0]
        value = lmnfast.connectivity(f, z.requires_grad_(), **LOBATTO, differentiable=True).sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, [z, *f.parameters()])]))
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()


def test_float32_outputs_near_the_smallest_numbers():
    """The gradient in such an output is larger than float32 numbers; that in the parameters in front is not."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 2, bias=False))
    x = samples(8, 4)
    usual = gradients(lmnfast.connectivity(f, x, **LOBATTO, differentiable=True).sum(), f[:3])
    with torch.no_grad():
        f[3].weight.mul_(2.0**-118)
    tiny = gradients(lmnfast.connectivity(f, x, **LOBATTO, differentiable=True).sum(), f[:3])
    for mine, other in zip(tiny, usual, strict=True):
        assert (mine - other).abs().max() <= 1e-3 * max(g.abs().max() for g in usual)


def test_complex_parameters_are_refused():
    W = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    with pytest.raises(TypeError, match="expected real parameters, got a tensor of torch.complex128"):
        lmnfast.connectivity(
            lambda x: (x.to(W.dtype) @ W).abs().tanh(), samples(6, 4, dtype=DOUBLE), differentiable=True
        )


@pytest.mark.parametrize("of", [lmnfast.connectivity, lmnfast.curvature])
def test_a_forked_process_uses_one_core(of, monkeypatch):
    """After a fork, OpenMP's other threads are missing, and torch's products wait for them."""
    monkeypatch.setattr(_threads, "_forked", True)
    counts, product = [], torch.nn.functional.linear

    def counted(*arguments):
        counts.append(torch.get_num_threads())
        return product(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        of(mlp(4, 6, 2), samples(6, 4), differentiable=True)
    finally:
        torch.set_num_threads(before)
    assert counts and set(counts) == {1}
