"""r2 pooled over the outputs, and with a stabiliser, by every route, against the definition in float64."""

import copy
import warnings

import pytest
import torch
from support import samples
from torch import nn

import lmnfast
from lmnfast import reference
from lmnfast._route import find_route
from lmnfast.quadrature import path_nodes

UNIFORM = path_nodes("uniform", 21)
METHODS = ("path", "hermite", "hermite-midpoint")


def mlp(*, outputs: int = 7, activation: type = nn.SiLU, width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, outputs)
    )


class Gated(nn.Module):
    """A block: RMSNorm, SwiGLU, and the sum with its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.RMSNorm(6, eps=1e-5)
        self.gate, self.up, self.down = nn.Linear(6, 40), nn.Linear(6, 40), nn.Linear(40, 6)

    def forward(self, x):
        n = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


def softmax() -> nn.Sequential:
    """No chain, and it begins with an affine map."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.Softmax(-1), nn.Linear(5, 7))


FIRST, LAST = samples(6, 20, seed=5), samples(20, 7, seed=6)


def plain(x):
    return torch.sin(x @ FIRST.to(x)) @ LAST.to(x)


def functions():
    return {"fused": mlp(), "block": Gated(), "module": softmax(), "generic": plain}


def truth(f, x, method, **how):
    if isinstance(f, nn.Module):
        f = copy.deepcopy(f).double()
    x = x.double()
    with torch.no_grad():
        if method == "path":
            return reference.path_connectivity(f, x, *UNIFORM, **how)
        return reference.hermite_connectivity(f, x, *UNIFORM, method == "hermite-midpoint", **how)


@pytest.mark.parametrize("stabiliser", [0.0, 8e-8, 0.05])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", functions())
def test_every_route_gives_the_definition(name, pooled, stabiliser):
    f, x = functions()[name], samples(18, 6)
    x[5] = x[11]
    how = {"pooled": pooled, "stabiliser": stabiliser}
    assert find_route(f, x, "path").kind == (name if name in ("fused", "block") else "generic")
    for method in METHODS:
        expected = truth(f, x, method, **how)
        for dtype, allowed in ((torch.float32, 5e-5), (torch.float64, 1e-9)):
            if isinstance(f, nn.Module):
                f = f.to(dtype)
            L = lmnfast.connectivity(f, x.to(dtype), method=method, **how)
            assert L.dtype == dtype and torch.equal(L, L.mT) and (L.diagonal() == 1).all() and L[5, 11] == 1
            assert (L - expected).abs().max() < allowed, (method, dtype)
    assert expected.min() < 0.99, "something bends"


def test_a_rotation_and_a_common_scale_of_the_outputs_do_not_matter_pooled():
    f, x = mlp(outputs=12).double(), samples(30, 6).double()
    Q = torch.linalg.qr(samples(12, 12, seed=3).double()).Q
    plain = lmnfast.connectivity(f, x, pooled=True)
    mean = lmnfast.connectivity(f, x)
    for scale in (1.0, 1e3, 1e-3):
        turned = copy.deepcopy(f)
        with torch.no_grad():
            turned[-1].weight.copy_(scale * Q @ f[-1].weight)
        narrow = lmnfast.connectivity(copy.deepcopy(turned).float(), x.float(), pooled=True)
        assert (narrow - plain).abs().max() < 1e-6
        for g in (turned, lambda t: turned(t)):  # noqa: B023
            assert (lmnfast.connectivity(g, x, pooled=True) - plain).abs().max() < 1e-9
            assert (lmnfast.connectivity(g, x) - mean).abs().max() > 1e-3


def test_pooling_is_the_share_of_all_variance_and_not_the_mean():
    """One output is straight and large, one is bent and small: pooled, the bent one hardly counts."""
    x = torch.tensor([[-1.0], [1.0]])

    def f(t):
        return torch.cat([10 * t, t.square()], 1)

    L = lmnfast.connectivity(f, x)[0, 1]
    assert abs(L - 0.5) < 1e-6
    t = UNIFORM[0] * 2 - 1
    straight, bent = (100 * t.var(correction=0), t.square().var(correction=0))
    assert abs(lmnfast.connectivity(f, x, pooled=True)[0, 1] - straight / (straight + bent)) < 1e-6


def test_a_stabiliser_counts_small_outputs_as_bent():
    x = torch.tensor([[0.0], [1.0]])
    variance = float(UNIFORM[0].var(correction=0))
    for size in (1e-6, 1e-3, 1.0):
        expected = size**2 * variance**2 / (size**2 * variance**2 + 8e-8)
        for f in (lambda t: size * t, nn.Linear(1, 1, bias=False)):  # noqa: B023
            if isinstance(f, nn.Module):
                f.weight.data.fill_(size)
            assert abs(lmnfast.connectivity(f, x, stabiliser=8e-8)[0, 1] - expected) < 1e-6
            assert lmnfast.connectivity(f, x)[0, 1] > 1 - 1e-6


@pytest.mark.parametrize("wrapped", [False, True])
def test_outputs_of_any_size_dead_outputs_and_near_duplicates(wrapped):
    f, x = mlp(outputs=6, activation=nn.ReLU), samples(14, 6)
    x[9] = x[2] * (1 + 1e-6)
    with torch.no_grad():
        f[-1].weight *= torch.tensor([1e-12, 1e-3, 1.0, 1e3, 1e12, 0.0])[:, None]
        f[-1].bias[5] = 3.0
    for how in ({"pooled": True}, {"stabiliser": 1e-8}, {"pooled": True, "stabiliser": 1e20}):
        expected = truth(f, x, "path", **how)
        g = (lambda t: f(t)) if wrapped else f
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the dead output's offset
            L = lmnfast.connectivity(g, x, **how)
        far = torch.ones_like(L, dtype=torch.bool)
        far[2, 9] = far[9, 2] = wrapped  # its own rounding moves it
        assert (L - expected)[far].abs().max() < 1e-4, how
        assert L.isfinite().all() and L.min() >= 0 and L.max() <= 1 + 1e-6


def test_networks_in_a_stack_and_samples_of_one_point():
    nets = [mlp() for _ in range(3)]
    for n, net in enumerate(nets):
        net[0].weight.data.mul_(1 + n)
    stacked, x = torch.func.stack_module_state(nets), samples(9, 6)
    many = x.expand(3, *x.shape).clone()
    L = lmnfast.connectivity(mlp(), many, stacked=stacked, pooled=True, stabiliser=1e-3)
    for n, net in enumerate(nets):
        assert torch.equal(L[n], lmnfast.connectivity(net, x, pooled=True, stabiliser=1e-3))
    same = x[:1].repeat(4, 1)
    for dtype in (torch.float32, torch.float64):
        for f in (mlp().to(dtype), lambda t: t.square()):
            L = lmnfast.connectivity(f, same.to(dtype), stabiliser=1e-3)
            assert (L == 1).all(), "equal samples are one sample"


def test_the_stabiliser_is_kept_with_the_number():
    f, x = mlp(), samples(20, 6)
    m = lmnfast.measure(f, x, stabiliser=1e-3)
    assert m.stabiliser == 1e-3 and m.to_dict()["stabiliser"] == 1e-3
    assert m.lmn == pytest.approx(float(lmnfast.lmn(f, x, stabiliser=1e-3)), rel=1e-12)
    assert lmnfast.measure(f, x).stabiliser == 0 and abs(m.lmn - lmnfast.measure(f, x).lmn) > 1e-2


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_a_stabiliser_out_of_range_is_refused(value):
    for call in (lmnfast.connectivity, lmnfast.measure, lmnfast.lmn, lmnfast.curvature):
        with pytest.raises(ValueError, match=r"^stabiliser: expected a number of at least 0, got"):
            call(mlp(), samples(5, 6), stabiliser=value)
    for wrong in ("8e-8", None, True):
        with pytest.raises(TypeError, match=r"^stabiliser: expected a number"):
            lmnfast.connectivity(mlp(), samples(5, 6), stabiliser=wrong)


def test_the_method_without_paths_has_neither():
    for how in ({"pooled": True}, {"stabiliser": 1e-8}):
        with pytest.raises(ValueError, match="expected a method with paths"):
            lmnfast.connectivity(mlp(), samples(5, 6), method="jacobian", **how)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stabiliser_far_below_the_outputs_size_still_makes_constant_outputs_bent(wrapped, method):
    f, x = mlp(outputs=3), samples(8, 6)
    with torch.no_grad():
        f[-1].weight *= torch.tensor([1e18, 1e18, 0.0])[:, None]
        f[-1].bias[2] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the dead output's offset
        L = lmnfast.connectivity((lambda t: f(t)) if wrapped else f, x, stabiliser=8e-8, method=method)
    off = ~torch.eye(8, dtype=torch.bool)
    assert (L[off] <= 2 / 3 + 1e-6).all() and L[off].max() > 0.5


@pytest.mark.parametrize("pooled", [False, True])
def test_a_map_that_is_constant_everywhere_is_bent_with_a_stabiliser(pooled):
    """Samples whose first pre-activations agree are not the same sample."""
    f, x = nn.Linear(4, 3), samples(12, 4)
    nn.init.zeros_(f.weight)
    x[7] = x[2]
    off = ~torch.eye(12, dtype=torch.bool)
    off[2, 7] = off[7, 2] = False
    for dtype in (torch.float32, torch.float64):
        f, x = f.to(dtype), x.to(dtype)
        for g in (f, lambda t: f(t)):  # noqa: B023
            L = lmnfast.connectivity(g, x, stabiliser=1e-2, pooled=pooled)
            assert (L[off] == 0).all() and L[2, 7] == 1
            assert (lmnfast.connectivity(g, x, pooled=pooled) == 1).all()
        estimate = lmnfast.curvature(f, x[:7], pairs=10, stabiliser=1e-2, pooled=pooled)
        assert estimate.value == 1


@pytest.mark.parametrize("size", [1e-150, 1.0, 1e155, 1e250])
def test_float64_outputs_of_any_size_that_a_square_would_not_hold(size):
    f, x = mlp(outputs=3, activation=nn.Tanh).double(), samples(9, 6).double()
    truth = lmnfast.connectivity(f, x), lmnfast.connectivity(f, x, pooled=True)
    f[-1].weight.data *= size
    f[-1].bias = None
    for pooled in (False, True):
        L = lmnfast.connectivity(f, x, pooled=pooled)
        assert (L - truth[pooled]).abs().max() < 1e-9
