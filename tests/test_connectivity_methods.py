"""The methods by derivatives: their definitions, limit cases, what they evaluate."""

import copy
import warnings

import pytest
import torch
from chains import hermite_condition
from fresh import run_fresh
from networks import NAN, ON_A_CARD, counted, inputs, mlp
from support import CUDA, UNIFORM
from torch import nn

import lmnfast
from lmnfast import reference
from lmnfast._enqueue import enqueue
from lmnfast._settings import Settings
from lmnfast.quadrature import path_nodes

HERMITE = {"hermite": False, "hermite-midpoint": True}
OTHERS = pytest.mark.parametrize("method", [*HERMITE, "jacobian"])
WRAPS = pytest.mark.parametrize("wrap", [lambda net: net, counted], ids=["fused", "generic"])


def definition(net, x, method, dtype=torch.float64):
    """From automatic differentiation."""
    net, x = copy.deepcopy(net).to(dtype), x.to(dtype)
    if method in HERMITE:
        with torch.no_grad():
            return reference.hermite_connectivity(net, x, *UNIFORM, HERMITE[method])
    J = reference.jacobian(net, x).detach().flatten(1)
    squares = J.square().sum(1)
    return 1 - (J[:, None] - J).square().sum(-1) / (squares[:, None] + squares)


@OTHERS
@WRAPS
@pytest.mark.parametrize("widths", [(6, 20, 4), (6, 20, 12, 4), (1, 9, 1), (3, 9, 30)])
def test_every_method_agrees_with_its_definition(widths, method, wrap, dtype):
    net, x = mlp(*widths).to(dtype), inputs(25, widths[0], dtype=dtype)
    x[7] = x[3]
    truth = definition(net, x, method)
    L = lmnfast.connectivity(wrap(net), x, method=method)
    assert L.dtype == dtype and torch.equal(L, L.mT) and (L.diagonal() == 1).all() and L[3, 7] == 1
    # In epsilons: twice what PyTorch loses in float32, and a few roundings of the outputs.
    single, narrow = copy.deepcopy(net).float(), x.float()
    plain = (
        definition(single, narrow, method, torch.float32) - definition(single, narrow, method)
    ).abs().max() / torch.finfo(torch.float32).eps
    allowed = 2 * plain + 4
    if method in HERMITE:
        with torch.no_grad():
            wide = copy.deepcopy(net).double()
            allowed = allowed + 4 * hermite_condition(wide, x.double(), UNIFORM[0], HERMITE[method])
    assert truth.min() < 0.9 and ((L - truth).abs() <= allowed * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("wrap", [lambda f: f, counted], ids=["itself", "counted"])
@pytest.mark.parametrize("size, width", [(1e150, 320), (1e-150, 8), (1e-130, 320)])
def test_jacobians_of_very_different_sizes(size, width, wrap):
    """A diagonal of 2 |x|, so that the connectivity of two samples of one size is known. 320: more than one tile."""
    x = inputs(40, width).double()
    J = 2 * x.abs()
    squares = J.square().sum(1)
    truth = 1 - (J[:, None] - J).square().sum(-1) / (squares[:, None] + squares)
    truth[:30, 30:] = truth[30:, :30] = 0
    x[30:] *= size
    L = lmnfast.connectivity(wrap(lambda t: t * t.abs()), x, method="jacobian")
    assert (L - truth).abs().max() <= 1e-12 and (L.mT == L).all()


def test_samples_whose_units_are_all_dead_are_compared_by_their_small_jacobians():
    net, x = mlp(2, 4, 1, activation=nn.GELU).double(), 100 * inputs(100, 2).double()
    truth = definition(net, x, "jacobian")
    seen = truth.isfinite()  # the definition's own squares vanish
    L = lmnfast.connectivity(net, x, method="jacobian")
    assert L.isfinite().all() and (L - truth)[seen].abs().max() < 1e-9
    assert (lmnfast.connectivity(lambda t: net(t), x, method="jacobian") - L).abs().max() < 1e-9


@pytest.mark.parametrize("method", HERMITE)
@pytest.mark.parametrize("budget", [1, 20_000, 200_000, 2**30])
def test_tiles_of_jacobians_change_no_number(method, budget):
    n = 16 if budget == 1 else 40  # then every pair is a tile
    net, x = mlp(6, 20, 4).double(), inputs(n, 6, dtype=torch.float64)
    f, truth = counted(net), definition(net, x, method)
    assert (lmnfast.connectivity(f, x, method=method, budget=budget) - truth).abs().max() < 1e-12


@pytest.mark.parametrize("method, rows", [("hermite", 0), ("hermite-midpoint", 30 * 29 // 2)])
def test_hermite_evaluates_nothing_between_the_samples_but_midpoints(method, rows):
    net, x, evaluated = mlp(6, 20, 4), inputs(30, 6), []

    def f(x):
        if not torch._C._functorch.is_batchedtensor(x):
            evaluated.extend(x.detach().tolist())
        return net(x)

    lmnfast.connectivity(f, x, method=method)
    samples = {tuple(sample) for sample in x.tolist()}
    assert sum(tuple(point) not in samples for point in evaluated) == rows


@pytest.mark.parametrize("method", HERMITE)
@pytest.mark.parametrize("rule", [("uniform", 3), ("uniform", 4), ("uniform", 51), ("lobatto", 9)])
def test_hermite_sums_over_the_nodes_that_are_asked_for(method, rule):
    net, x, (rule, points) = mlp(6, 20, 4).double(), inputs(15, 6, dtype=torch.float64), rule
    with torch.no_grad():
        truth = reference.hermite_connectivity(net, x, *path_nodes(rule, points), HERMITE[method])
    for f in (net, counted(net)):
        L = lmnfast.connectivity(f, x, method=method, rule=rule, points=points)
        assert (L - truth).abs().max() < 1e-12


def test_nodes_do_not_matter_to_jacobian():
    net, x = mlp(6, 20, 4), inputs(15, 6)
    results = [
        lmnfast.connectivity(net, x, method="jacobian", points=n, rule=r)
        for n, r in ((21, "uniform"), (5, "lobatto"))
    ]
    assert torch.equal(*results)


@OTHERS
@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 5)])
def test_every_method_takes_samples_and_outputs_of_any_shape(method, shape):
    weight = inputs(*shape, 4).double()

    def net(x):
        return torch.tensordot(x, weight.to(x), x.dim() - 1).sin().reshape(len(x), 2, 2)

    x = inputs(12, *shape).double()
    if method in HERMITE:
        truth = reference.hermite_connectivity(net, x, *UNIFORM, HERMITE[method])
    else:
        J = reference.jacobian(net, x).flatten(1)
        squares = J.square().sum(1)
        truth = 1 - (J[:, None] - J).square().sum(-1) / (squares[:, None] + squares)
    assert (lmnfast.connectivity(net, x, method=method) - truth).abs().max() < 1e-11


@OTHERS
@WRAPS
class TestLimitsOfEveryMethod:
    def test_an_affine_network_has_lmn_one(self, method, wrap):
        L = lmnfast.connectivity(wrap(mlp(5, 3).double()), inputs(40, 5).double(), method=method)
        assert lmnfast.linear_mapping_number(L).item() == pytest.approx(1, abs=1e-9)

    def test_what_does_not_depend_on_the_samples_is_one(self, method, wrap):
        net, x = mlp(6, 20, 4, activation=nn.ReLU), inputs(20, 6)
        with torch.no_grad():
            net[0].bias.fill_(-1e3)
        assert (lmnfast.connectivity(wrap(net), x, method=method) == 1).all()
        assert (lmnfast.connectivity(lambda x: torch.ones(len(x), 3), x, method=method) == 1).all()

    def test_one_sample(self, method, wrap):
        assert lmnfast.lmn(wrap(mlp(5, 9, 3)), inputs(1, 5), method=method).item() == 1

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_the_scale_of_the_outputs_does_not_matter(self, method, wrap, scale):
        net, x = mlp(6, 20, 4), inputs(12, 6)
        truth = definition(net, x, method)
        plain = (definition(net, x, method, torch.float32) - truth).abs().max()
        with torch.no_grad():
            net[2].weight.mul_(scale)
            net[2].bias.mul_(scale)
        L = lmnfast.connectivity(wrap(net), x, method=method)
        assert (L - truth).abs().max() <= 2 * plain + 8 * torch.finfo(torch.float32).eps

    @pytest.mark.parametrize("scale", [1e-300, 1e-165, 1e160, 1e290])
    def test_outputs_whose_squares_are_no_float64(self, method, wrap, scale):
        net, x = mlp(6, 20, 4).double(), inputs(12, 6).double()
        truth = definition(net, x, method)
        rank = lmnfast.measure(net, x, observables="jacobian_rank").observables["jacobian_rank"]
        with torch.no_grad():
            net[2].weight.mul_(scale)
            net[2].bias.mul_(scale)
        m = lmnfast.measure(wrap(net), x, method=method, observables="jacobian_rank")
        assert (m.connectivity - truth).abs().max() <= 1e-11
        assert m.observables["jacobian_rank"] == pytest.approx(rank, rel=1e-12)

    def test_not_finite_samples_are_named(self, method, wrap):
        x = inputs(9, 6)
        x[4, 2] = NAN
        with pytest.raises(ValueError, match="x: NaN or Inf in sample 4$"):
            lmnfast.connectivity(wrap(mlp(6, 20, 4)), x, method=method)

    def test_checks_left_for_later_change_nothing(self, method, wrap):
        net, x = mlp(6, 20, 4), inputs(20, 6)
        enqueued = enqueue(wrap(net), x, Settings(method), deferred=True)
        enqueued.check()
        assert torch.equal(enqueued.L, lmnfast.connectivity(wrap(net), x, method=method))


@OTHERS
def test_what_cannot_be_differentiated_is_refused(method):
    with pytest.raises(ValueError, match="f: cannot be differentiated"):
        lmnfast.connectivity(lambda x: x.detach() ** 2, inputs(9, 6), method=method)


@OTHERS
def test_a_jacobian_that_is_not_finite_is_an_error_and_no_number(method):
    x = inputs(9, 3)
    x[4, 1] = 0
    with pytest.raises(ValueError, match="f: NaN or Inf in"):
        lmnfast.connectivity(lambda x: x.abs().sqrt(), x, method=method)


@pytest.mark.parametrize("method", HERMITE)
def test_peak_memory_of_hermite_on_the_generic_route(method, tmp_path):
    """300 outputs: all slopes at once would need 73 MB."""
    (tmp_path / "code.py").write_text(f"""
import resource, torch, lmnfast
from torch import nn
net = nn.Sequential(nn.Linear(40, 20), nn.SiLU(), nn.Linear(20, 300))
x = torch.randn(350, 40)
lmnfast.connectivity(lambda x: net(x), x[:50], method={method!r}, budget=2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
L = lmnfast.connectivity(lambda x: net(x), x, method={method!r}, budget=2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - L.numel() * 4 // 1024)
""")
    done = run_fresh(tmp_path / "code.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < 48


@CUDA
@OTHERS
@WRAPS
def test_every_method_on_cuda_is_that_on_the_cpu(method, wrap, dtype):
    net, x = mlp(6, 20, 4).to(dtype), inputs(25, 6, dtype=dtype)
    truth = definition(net, x, method)
    L = lmnfast.connectivity(wrap(net.cuda()), x.cuda(), method=method)
    assert L.is_cuda and (L.cpu() - truth).abs().max() < ON_A_CARD[dtype]


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_what_torch_says_of_itself_does_not_reach_the_user(kind, monkeypatch):
    jacfwd, said = torch.func.jacfwd, []

    def loud(*given, **how):
        def call(x):
            said.append(1)
            warnings.warn(
                "`torch.jit.script` is deprecated. Please switch to `torch.compile`.", kind, stacklevel=2
            )
            return jacfwd(*given, **how)(x)

        return call

    monkeypatch.setattr(torch.func, "jacfwd", loud)
    x = torch.randn(6, 2, dtype=torch.float64)
    J = lmnfast.jacobians(lambda x: torch.cat([x.sin(), x.cos()], 1), x)
    torch.testing.assert_close(J[:, :2], torch.diag_embed(x.cos()))
    assert said
