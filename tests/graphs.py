"""Gradients of connectivities by autograd through all paths, in float64: what tests compare with."""

import copy

import torch
from torch import Tensor, nn

import lmnfast

LOBATTO = {"points": 7, "rule": "lobatto"}
DOUBLE = torch.float64


def plain_r2(f, x, first, second, *, pooled=False, stabiliser=0.0, points=7, rule="lobatto") -> Tensor:
    """r2 of pairs by the definition, which autograd can follow. No output is constant."""
    nodes, weights = lmnfast.quadrature.path_nodes(rule, points)
    at = nodes.reshape(-1, *[1] * (x.dim() - 1))
    y = (
        f((x[first, None] * (1 - at) + x[second, None] * at).flatten(0, 1))
        .flatten(1)
        .unflatten(0, (-1, points))
    )
    y, tau = y - torch.einsum("m,pmk->pk", weights, y)[:, None], nodes - weights @ nodes
    on_line = torch.einsum("m,pmk->pk", weights * tau, y) ** 2
    whole = (weights @ tau**2) * torch.einsum("m,pmk->pk", weights, y**2)
    if pooled:
        return on_line.sum(1) / (whole.sum(1) + stabiliser)
    return (on_line / (whole + stabiliser)).mean(1)


def by_autograd(f, x, gradient: Tensor, leaves, pairs=None, **statistic) -> list[Tensor]:
    """The gradients of ``(gradient * L).sum()``, by autograd through all paths."""
    if pairs is None:
        pairs = torch.triu_indices(len(x), len(x), 1)
        gradient = (gradient + gradient.T)[pairs[0], pairs[1]]
    total = (gradient * plain_r2(f, x, *pairs, **statistic)).sum()
    return list(torch.autograd.grad(total, leaves, materialize_grads=True, retain_graph=True))


def assert_same_gradients(found, expected, tolerance: float) -> None:
    """largest: a gradient that is 0 in exact arithmetic, as of the last bias, is rounding in both."""
    largest = max(float(each.abs().max()) for each in expected)
    assert largest > 0
    for own, other in zip(found, expected, strict=True):
        allowed = tolerance * max(float(other.abs().max()), 1e-2 * largest)
        assert own.shape == other.shape and float((own - other).abs().max()) <= allowed


def evaluated(f):
    """f in eval mode, as it is measured, in a copy with the same parameters."""
    if not isinstance(f, nn.Module):
        return f
    memo = {id(p): p for p in (*f.parameters(), *f.buffers())}
    return copy.deepcopy(f, memo).eval()
