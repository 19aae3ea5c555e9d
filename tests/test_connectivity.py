"""The public function: both routes, every bad input that its docstring names, nothing left behind."""

import copy
import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
import support
import torch
from chains import hermite_condition
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lmnfast
from lmnfast import _checks, _connectivity, _enqueue, _native, _route, _threads, _tiles, _together, reference
from lmnfast._chain import IDENTITY, Chain
from lmnfast._connectivity import measured
from lmnfast._enqueue import Enqueued, enqueue
from lmnfast._recognise import recognise
from lmnfast._settings import DEFAULT, METHODS, Settings
from lmnfast.grokking.model import make_model
from lmnfast.grokking.tasks import make_task
from lmnfast.quadrature import path_nodes

UNIFORM = path_nodes("uniform", 21)
# Float32: about twice the largest error of an entry that was measured on a card at "highest", 2.7e-5 (README, On a
# GPU). Float64: what the generic route's Hermite methods may lose (docs/number.md, How far from exact).
ON_A_CARD = {torch.float32: 5e-5, torch.float64: 1e-11}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def mlp(*widths: int, activation=nn.SiLU, seed: int = 0, gain: float = 2.0) -> nn.Sequential:
    return support.mlp(*widths, activation=activation, seed=seed, gain=gain)


def inputs(*shape: int, seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def counted(f):
    """f as a plain callable, which is never recognised, with the batch sizes it was called with."""

    def call(x):
        call.batches.append(len(x))
        return f(x)

    call.batches = []
    return call


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=2, max_size=5),
    st.integers(1, 20),
    st.sampled_from([nn.SiLU, nn.ReLU, nn.GELU, nn.Tanh]),
    st.integers(0, 1000),
)
def test_fused_and_generic_route_agree_with_the_definition(widths, n, activation, seed):
    net, x = mlp(*widths, activation=activation, seed=seed).double(), inputs(n, widths[0], seed=seed).double()
    with torch.no_grad():
        truth = reference.path_connectivity(net, x, *UNIFORM)
        points = torch.lerp(x[:, None, None], x[None, :, None], UNIFORM[0][:, None])
        y = net(points.flatten(0, 2)).reshape(n, n, len(UNIFORM[0]), -1)[~torch.eye(n, dtype=bool)]
    # Outputs of dead units are constant; what the products' rounding makes of that in the definition is no truth.
    assume((y.amax(1) - y.amin(1) > 1e-9 * y.abs().amax(1)).all())
    assert (lmnfast.connectivity(net, x) - truth).abs().max() < 1e-11
    assert (lmnfast.connectivity(counted(net), x) - truth).abs().max() < 1e-11


def test_a_chain_is_called_on_the_samples_alone_and_any_other_network_on_the_paths(monkeypatch):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(6, 20, 6)

        def forward(self, x):
            return x + self.net(x)

    f, x = Residual(), inputs(30, 6)
    rows = []
    f.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    L = lmnfast.connectivity(f, x)
    tiles = rows[4:]
    assert rows[:4] == [30, 7, 7, 30], "the samples, some of them again, and all in float64"
    assert sum(tiles) == 435 * 19 + 3 * len(tiles), "3 samples in a tile, not its ends"
    with torch.no_grad():
        assert (L - reference.path_connectivity(f, x, *UNIFORM)).abs().max() < 1e-5
    chain = mlp(6, 20, 4)
    forwarded = counted(chain)
    generic = lmnfast.connectivity(forwarded, x)
    assert sum(forwarded.batches) == 30 + 14 + 30 + 435 * 19 + 3 * (len(forwarded.batches) - 4)
    monkeypatch.setattr(_enqueue, "generic_paths", lambda *_: pytest.fail("the chain went the generic route"))
    assert (lmnfast.connectivity(chain, x) - generic).abs().max() < 1e-5


@pytest.mark.parametrize("budget", [1, 10_000, 100_000, 2**30])
def test_the_budget_changes_the_tiles_and_not_the_result(budget):
    net, x = mlp(6, 20, 4), inputs(25, 6)
    f = counted(net)
    L = lmnfast.connectivity(f, x, budget=budget)
    per_row = 4 * (20 + 20 + 4)  # results of two Linear and one SiLU
    tiles = f.batches[4:]  # behind the samples, some of them twice, and all in float64
    assert max(tiles) * per_row <= max(budget, (19 + 3) * per_row), "3 samples are in every tile"
    assert (L - lmnfast.connectivity(counted(net), x)).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5), (7,)])
def test_samples_and_outputs_of_any_shape(shape):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(inputs(*shape, 4))

        def forward(self, x):
            y = torch.tensordot(x, self.weight, x.dim() - 1)
            return torch.sin(y).reshape(len(x), 2, 2)

    net, x = Net(), inputs(12, *shape)
    with torch.no_grad():
        assert (
            lmnfast.connectivity(net, x) - reference.path_connectivity(net, x, *UNIFORM)
        ).abs().max() < 1e-5


def test_a_linear_layer_over_the_last_of_several_dimensions_is_not_taken_for_a_chain():
    net, x = mlp(5, 9, 3), inputs(10, 4, 5)
    with torch.no_grad():
        assert (
            lmnfast.connectivity(net, x) - reference.path_connectivity(net, x, *UNIFORM)
        ).abs().max() < 1e-5


class OneReal(nn.Module):
    """Its forward is the user's, so that its outputs are compared with the chain's."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("method", ["path", "hermite", "hermite-midpoint"])
@pytest.mark.parametrize("wrap", [lambda net: net, OneReal], ids=["torch's own", "the user's"])
def test_checks_behind_a_kernel_are_one_pass_and_read_once(wrap, method, monkeypatch, dtype):
    passes, reads = [], []
    read = _checks.Findings.read

    def counted(self):
        reads.append(self._numbers is None)
        return read(self)

    original = _checks.find
    monkeypatch.setattr(_checks.Findings, "read", counted)
    monkeypatch.setattr(
        _checks,
        "find",
        lambda *args: passes.append(args) or original(*args),
    )
    net, x = mlp(6, 20, 4).to(dtype), inputs(20, 6, dtype=dtype)
    truth = lmnfast.connectivity(wrap(net), x, method=method)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        enqueued = enqueue(wrap(net), x, Settings(method), deferred=True)
    assert len(passes) == 1 and not reads
    assert (passes[0][2] is None) == isinstance(wrap(net), nn.Sequential)
    names = [event.name for event in profile.events()]
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & set(names), "each would wait for a device"
    enqueued.check()
    assert enqueued.offset_problem() is None and enqueued.constants == 0
    assert sum(reads) == 1
    assert torch.equal(enqueued.L, truth)


def test_a_call_with_cuda_kernels_is_checked_behind_them(emulated):
    net, x = OneReal(mlp(6, 20, 4)), inputs(20, 6)
    enqueued = enqueue(net, x, expected=net(x).detach(), deferred=True)
    enqueued.check()
    with torch.no_grad():
        truth = reference.path_connectivity(copy.deepcopy(net).double(), x.double(), *UNIFORM)
        plain = reference.path_connectivity(net, x, *UNIFORM)
    assert (enqueued.L - truth).abs().max() <= 2 * (plain - truth).abs().max() + 16 * torch.finfo(
        torch.float32
    ).eps
    with pytest.raises(RuntimeError, match="not those of the model"):
        enqueue(net, x, expected=2 * net(x).detach(), deferred=True).check()
    x[3, 2] = NAN
    with pytest.raises(ValueError, match="x: NaN or Inf in sample 3, the first of 1"):
        enqueue(net, x, deferred=True).check()


def test_pairs_that_a_kernel_leaves_are_measured_behind_the_checks():
    net = mlp(6, 20, 4)
    x = inputs(12, 6)
    x[3] = x[5] * (1 + 1e-6)
    immediate, enqueued = enqueue(net, x), enqueue(net, x, deferred=True)
    assert enqueued.findings.unresolved > 0
    enqueued.check()
    assert torch.equal(enqueued.L, immediate.L) and enqueued.constants == immediate.constants


def test_an_offset_is_looked_at_where_outputs_are_constant(monkeypatch):
    net, x = mlp(6, 20, 4), inputs(30, 6)
    with torch.no_grad():  # one unit that is the same large number for all samples
        net[0].weight[3], net[0].bias[3], net[2].weight[:, 3] = 0, 1e5, 1
    monkeypatch.setattr(Enqueued, "constants", property(lambda _: 100))
    immediate, enqueued = enqueue(net, x), enqueue(net, x, deferred=True)
    enqueued.check()
    assert enqueued.offset_problem() == immediate.offset_problem()
    assert "some outputs are" in str(immediate.offset_problem())


def test_a_chain_that_does_not_give_the_networks_outputs_is_not_used(monkeypatch):
    class Own(nn.Sequential):  # whose forward may be anything, unlike that of torch's own
        pass

    net, x = Own(*mlp(6, 20, 4)), inputs(12, 6)
    wrong = Chain((torch.zeros(4, 6),), (None,), (IDENTITY,) * 2)
    truth = lmnfast.connectivity(net, x)
    monkeypatch.setattr(_route, "chain_or_reason", lambda f, *_: wrong)
    assert (lmnfast.connectivity(net, x) - truth).abs().max() < 1e-5
    with pytest.raises(_checks.NotTheChain, match="that chain has other outputs"):
        enqueue(net, x, deferred=True).check()
    monkeypatch.setattr(_connectivity, "enqueue", functools.partial(enqueue, deferred=True))
    assert (lmnfast.connectivity(net, x) - truth).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_widened(dtype):
    net, x = mlp(6, 20, 4).to(dtype), inputs(15, 6, dtype=dtype)
    L = lmnfast.connectivity(net, x)
    assert L.dtype == torch.float32
    wide = lmnfast.connectivity(mlp(6, 20, 4).to(dtype).float(), x.float())
    assert (L - wide).abs().max() < 1e-5
    generic = lmnfast.connectivity(counted(net), x)
    assert generic.dtype == torch.float32 and (generic - wide).abs().mean() < 0.05


def test_nine_lobatto_points_are_close_to_the_21_they_stand_for():
    net, x = mlp(16, 60, 60, 8, gain=1.5), inputs(150, 16)
    exact, lobatto = lmnfast.lmn(net, x), lmnfast.lmn(net, x, points=9, rule="lobatto")
    assert 2 < exact < 150
    assert abs(lobatto / exact - 1) < 5e-4
    assert abs(lmnfast.lmn(net, x, points=11) / exact - 1) > 2 * abs(lobatto / exact - 1)


# ---- the other methods ----

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


def test_the_default_budget_follows_the_free_memory_of_a_card(monkeypatch):
    card = torch.device("cuda", 1)
    free, reserved, allocated = {}, {}, {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[device])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[device])
    for gib, in_torch, of_these, expected in ((8, 0, 0, 2), (1, 8, 1, 2), (70, 0, 0, 4), (0, 2, 2, 0)):
        free[card], reserved[card], allocated[card] = (n * 2**30 for n in (gib, in_torch, of_these))
        assert _tiles.tile_bytes(None, card) == max(1, expected * 2**30)
        assert _tiles.tile_bytes(2**33, card) == 2**33
    cpu = torch.device("cpu")
    assert _tiles.tile_bytes(None, cpu) == _tiles.tile_bytes(2**33, cpu) == 24 * 2**20
    assert _tiles.tile_bytes(1000, cpu) == 1000


@pytest.mark.parametrize("tile", [0, 10**3, 10**5, 10**7])
def test_tiles_are_whole_paths_within_the_budget(tile):
    for samples, allocated, interior in ((12, 12 * 80, 19), (200, 10**6, 7), (2, 64, 1)):
        pairs, a_sample = _tiles.tile_pairs(tile, samples, allocated, interior), allocated / samples
        again, every = min(3, samples), samples * (samples - 1) // 2
        assert _tiles.tile_points(pairs, samples, interior) == pairs * interior + again
        assert pairs == 1 or (pairs * interior + again) * a_sample <= tile
        assert pairs == every or (
            pairs < every and ((pairs + 1) * interior + again) * a_sample > tile - a_sample
        )


@pytest.mark.parametrize("method", HERMITE)
@pytest.mark.parametrize("budget", [1, 20_000, 200_000, 2**30])
def test_tiles_of_jacobians_change_no_number(method, budget):
    net, x = mlp(6, 20, 4).double(), inputs(40, 6, dtype=torch.float64)
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

    def test_not_finite_samples_are_named(self, method, wrap):
        x = inputs(9, 6)
        x[4, 2] = NAN
        with pytest.raises(ValueError, match="x: NaN or Inf in sample 4, the first of 1"):
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
def test_peak_memory_of_hermite_on_the_generic_route(method):
    """A hundred inputs and outputs: all slopes at once would need 70 MB, all Jacobians 12 MB."""
    code = f"""
import resource, torch, lmnfast
from torch import nn
net = nn.Sequential(nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 100))
x = torch.randn(600, 100)
lmnfast.connectivity(lambda x: net(x), x[:50], method={method!r}, budget=2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
L = lmnfast.connectivity(lambda x: net(x), x, method={method!r}, budget=2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - L.numel() * 4 // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) / 1024 < 48


@CUDA
@OTHERS
@WRAPS
def test_every_method_on_cuda_is_that_on_the_cpu(method, wrap, dtype):
    net, x = mlp(6, 20, 4).to(dtype), inputs(25, 6, dtype=dtype)
    truth = definition(net, x, method)
    L = lmnfast.connectivity(wrap(net.cuda()), x.cuda(), method=method)
    assert L.is_cuda and (L.cpu() - truth).abs().max() < ON_A_CARD[dtype]


# ---- networks of the paper, at initialisation and after memorisation ----


@pytest.fixture(scope="module", params=[nn.SiLU, nn.GELU, nn.Tanh, nn.ReLU])
def memorised(request):
    """(activation, tail before training, its samples, tail at train accuracy 1, its samples); modular addition."""
    generator = torch.Generator().manual_seed(0)
    task = make_task("modular-addition", generator)
    model = make_model(task.vocabulary, generator)
    model.hidden_1, model.hidden_2 = request.param(), request.param()
    before = lmnfast.cut(copy.deepcopy(model), "hidden_1", task.train_inputs)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.2)
    for _ in range(1000):
        logits = model(task.train_inputs)
        if (logits.argmax(1) == task.train_labels).all():
            break
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits, task.train_labels).backward()
        optimiser.step()
    else:
        pytest.fail("did not memorise")
    return request.param, before, lmnfast.cut(model, "hidden_1", task.train_inputs)


def test_float32_is_right_to_2e_5_on_the_papers_networks(memorised):
    for tail, samples in memorised[1:]:
        x = samples[::5]
        ours = lmnfast.connectivity(tail, x)
        wide = copy.deepcopy(tail).double()
        with torch.no_grad():
            truth = reference.path_connectivity(wide, x.double(), *UNIFORM)
            plain = reference.path_connectivity(tail, x, *UNIFORM)
        assert truth.min() < 0.9
        error = (ours - truth).abs().max()
        assert error < 2e-5 and error <= 2 * (plain - truth).abs().max()
        assert (lmnfast.connectivity(wide, x.double()) - truth).abs().max() < 1e-12


def test_nine_lobatto_points_give_the_lmn_of_memorised_networks(memorised):
    activation, _, (tail, samples) = memorised
    exact = lmnfast.lmn(tail, samples)
    lobatto = lmnfast.lmn(tail, samples, rule="lobatto", points=9)
    assert 10 < exact < 768
    assert abs(lobatto / exact - 1) < (2e-3 if activation is nn.ReLU else 5e-4)


# ---- limit cases: 1, never NaN, never noise ----


@pytest.mark.parametrize("wrap", [lambda net: net, counted], ids=["fused", "generic"])
class TestLimits:
    def test_one_sample_has_lmn_one(self, wrap):
        assert lmnfast.lmn(wrap(mlp(5, 9, 3)), inputs(1, 5)).item() == 1

    def test_an_affine_network_has_lmn_one(self, wrap):
        # float32 rounding where an output hardly changes between two samples leaves a few 1e-5 in the generic route.
        assert lmnfast.lmn(wrap(mlp(5, 3)), inputs(60, 5)).item() == pytest.approx(1, abs=1e-3)

    def test_one_output(self, wrap):
        net, x = mlp(5, 9, 1).double(), inputs(12, 5).double()
        with torch.no_grad():
            truth = reference.path_connectivity(net, x, *UNIFORM)
        assert (lmnfast.connectivity(wrap(net), x) - truth).abs().max() < 1e-11

    def test_coincident_samples(self, wrap):
        x = inputs(5, 6).repeat(3, 1)
        L = lmnfast.connectivity(wrap(mlp(6, 20, 20, 4)), x)
        assert (L[:5, 5:10].diagonal() == 1).all() and (L[:5, 10:].diagonal() == 1).all()

    def test_all_samples_the_same(self, wrap):
        x = inputs(1, 6).expand(9, 6)
        assert lmnfast.lmn(wrap(mlp(6, 20, 4)), x).item() == pytest.approx(1, abs=1e-12)

    def test_a_constant_network(self, wrap):
        net = mlp(6, 20, 4)
        with torch.no_grad():
            net[2].weight.zero_()
        assert (lmnfast.connectivity(wrap(net), inputs(20, 6)) == 1).all()

    def test_dead_relu_units(self, wrap):
        net = mlp(6, 20, 4, activation=nn.ReLU)
        with torch.no_grad():
            net[0].bias.fill_(-1e3)
        assert (lmnfast.connectivity(wrap(net), inputs(20, 6)) == 1).all()

    @pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
    def test_saturated_units(self, activation, wrap):
        net = mlp(6, 20, 4, activation=activation)
        with torch.no_grad():
            net[0].bias.fill_(1e3)
        assert (lmnfast.connectivity(wrap(net), inputs(20, 6)) == 1).all()

    @pytest.mark.parametrize("activation", [nn.SiLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.GELU])
    def test_pre_activations_of_1e4(self, activation, wrap):
        net, x = nn.Sequential(activation(), nn.Linear(6, 4, bias=False)), inputs(20, 6) * 1e4
        with (
            torch.no_grad()
        ):  # no cancellation: PyTorch rounds equal rows of a batch differently, and f may do as it likes
            net[1].weight.copy_(torch.tensor([1, 2, 4, 8, 16, 32]).expand(4, 6))
        with torch.no_grad():
            truth = reference.path_connectivity(net.double(), x.double(), *UNIFORM)
        L = lmnfast.connectivity(wrap(net.float()), x)
        assert L.isfinite().all() and (L - truth).abs().max() < 2e-5

    def test_strided_and_expanded_samples(self, wrap):
        net, x = mlp(6, 20, 4), inputs(6, 24)
        assert torch.equal(
            lmnfast.connectivity(wrap(net), x.mT[::2]),
            lmnfast.connectivity(wrap(net), x.mT[::2].contiguous()),
        )
        expanded = inputs(10, 1).expand(10, 6)
        assert torch.equal(
            lmnfast.connectivity(wrap(net), expanded), lmnfast.connectivity(wrap(net), expanded.contiguous())
        )

    def test_the_result_is_detached(self, wrap):
        L = lmnfast.connectivity(wrap(mlp(6, 20, 4)), inputs(9, 6).requires_grad_())
        assert not L.requires_grad and L.grad_fn is None

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite_samples_are_named(self, bad, wrap):
        x = inputs(9, 6)
        x[4, 2] = x[7, 0] = bad
        with pytest.raises(ValueError, match="x: NaN or Inf in sample 4, the first of 2"):
            lmnfast.connectivity(wrap(mlp(6, 20, 4)), x)

    def test_not_finite_outputs_are_named(self, wrap):
        net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            net[0].weight.fill_(1e30)
            net[2].weight.fill_(1e30)
        with pytest.raises(ValueError, match=r"f\(x\): NaN or Inf in sample 1, the first of 2"):
            lmnfast.connectivity(wrap(net), torch.tensor([[-1.0], [1.0], [-2.0], [3.0]]))


def test_outputs_that_are_not_finite_between_the_samples_are_named():
    with pytest.raises(ValueError, match="f: NaN or Inf in an output on the path from sample 0 to sample 1"):
        lmnfast.connectivity(lambda x: 1 / (x - 1), torch.tensor([[4.0], [0.0], [2.0]]))


# ---- checks left for later ----


def scaled(factor):
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(factor)
        net[2].weight.fill_(factor)
    return net


NAN = float("nan")
WRONG = {
    "samples": (scaled(1), [[1.0], [NAN], [2.0], [NAN]]),
    "outputs": (scaled(1e30), [[-1.0], [1.0], [-2.0], [3.0]]),
    "both": (scaled(1e30), [[-1.0], [1.0], [NAN], [3.0]]),
    "outputs, generic": (lambda x: 1 / x, [[1.0], [2.0], [0.0]]),
    "between": (lambda x: 1 / (x - 1), [[4.0], [0.0], [2.0]]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_check_left_for_later_raises_what_an_immediate_one_does(name):
    f, x = WRONG[name][0], torch.tensor(WRONG[name][1])
    with pytest.raises(ValueError) as immediate:
        lmnfast.connectivity(f, x)
    enqueued = enqueue(f, x, deferred=True)
    with pytest.raises(ValueError) as deferred:
        enqueued.check()
    assert str(deferred.value) == str(immediate.value)


@pytest.mark.parametrize("wrap", [lambda net: net, counted], ids=["fused", "generic"])
def test_the_result_is_the_same_when_checks_are_left_for_later(wrap):
    net, x = mlp(6, 20, 4), inputs(20, 6)
    enqueued = enqueue(wrap(net), x, expected=net(x).detach(), deferred=True)
    enqueued.check()
    assert torch.equal(enqueued.L, lmnfast.connectivity(wrap(net), x))


def test_networks_of_a_stack_are_all_enqueued_before_one_is_checked(monkeypatch):
    models, x = [mlp(6, 20, 4, seed=seed) for seed in range(3)], inputs(12, 6).expand(3, 12, 6)
    stacked, order = torch.func.stack_module_state(models), []
    truth = torch.stack([lmnfast.connectivity(model, x[0]) for model in models])

    def counted(*args, **settings):
        order.append("enqueue")
        settings.pop("progress")
        return enqueue(*args, deferred=True, **settings)

    def check(self):
        order.append("check")
        checks(self)

    checks = Enqueued.check
    monkeypatch.setattr(_connectivity, "enqueue", counted)
    monkeypatch.setattr(Enqueued, "check", check)
    assert torch.equal(lmnfast.connectivity(models[0], x, stacked=stacked), truth)
    assert order == 3 * ["enqueue"] + 3 * ["check"]


def test_one_network_of_a_stack_that_is_no_chain_is_measured_anew(monkeypatch):
    """The second one has another chain than it looks like."""
    models, x = [mlp(6, 20, 4, seed=seed) for seed in range(3)], inputs(12, 6).expand(3, 12, 6)
    stacked, checked = torch.func.stack_module_state(models), []
    truth = torch.stack([lmnfast.connectivity(model, x[0]) for model in models])

    def check(self):
        checked.append(self)
        if len(checked) == 2:
            raise _checks.NotTheChain("f: looks like a chain")

    monkeypatch.setattr(Enqueued, "check", check)
    L = lmnfast.connectivity(models[0], x, stacked=stacked)
    assert len(checked) == 4 and (L - truth).abs().max() < 1e-5
    assert torch.equal(L[::2], truth[::2]) and not torch.equal(L[1], truth[1])


# ---- stacked networks in one launch, where there are CUDA kernels ----


class Same(nn.Sequential):
    """Whose forward may be anything, unlike that of torch's own: it is called, and compared with the chain."""


class WithNorm(nn.Module):
    """A chain whose first weights are computed from its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.SiLU(), nn.Linear(12, 4))

    def forward(self, x):
        return self.net(x)


class Tied(nn.Module):
    """Two layers with one weight, and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.second(nn.functional.silu(x)))


STACKED = {
    "in order": lambda: mlp(6, 20, 4),
    "own forward": lambda: Same(*mlp(6, 20, 16, 4)),
    "tied": Tied,
    "affine": lambda: nn.Linear(6, 4),
    "flattens": lambda: nn.Sequential(nn.Flatten(), *mlp(6, 20, 4)),
}


def stack_of(make, networks: int, n: int = 12, dtype=torch.float32):
    """Networks, what torch stacks of them, and samples for each, some of which are close."""
    models = []
    for seed in range(networks):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(make().to(dtype).eval())
            with torch.no_grad():
                for p in models[-1].parameters():
                    p.mul_(1 + 0.1 * torch.rand(p.shape, dtype=dtype))
    x = torch.stack([inputs(n, 6, seed=seed, dtype=dtype) for seed in range(networks)])
    x[-1, 3] = x[-1, 5] * (1 + 1e-6)
    return models, torch.func.stack_module_state(models), x


@pytest.fixture
def launches(monkeypatch):
    """How many networks each stack had that was measured together, in a list; -1 stands for one that was enqueued alone."""
    seen = []

    def together(chains, *rest):
        seen.append(len(chains.weights[0]))
        return original(chains, *rest)

    def alone(*args, **settings):
        seen.append(-1)
        return enqueue(*args, **settings)

    original = _together.stack_connectivity
    monkeypatch.setattr(_together, "stack_connectivity", together)
    monkeypatch.setattr(_connectivity, "enqueue", alone)
    return seen


@pytest.mark.parametrize("method", ["path", "hermite", "hermite-midpoint"])
@pytest.mark.parametrize("name", STACKED)
def test_stacked_networks_are_measured_in_one_launch(name, method, emulated, dtype, launches):
    models, stacked, x = stack_of(STACKED[name], 3, dtype=dtype)
    x = x.unflatten(2, (2, 3)) if name == "flattens" else x
    truth = torch.stack([lmnfast.connectivity(f, own, method=method) for f, own in zip(models, x)])
    launches.clear()
    shares = []
    L = lmnfast.connectivity(models[0], x, method=method, stacked=stacked, progress=shares.append)
    assert launches == [3] and shares == [1.0]
    assert torch.equal(L, truth) and (name == "affine" or not torch.equal(L[0], L[1]))


def test_what_a_launch_for_all_does_not_take_is_measured_one_by_one(emulated, launches):
    for make, chosen in (
        (WithNorm, {}),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), {}),
        (lambda: mlp(6, 20, 4), {"method": "jacobian"}),
    ):
        models, stacked, x = stack_of(make, 2)
        truth = torch.stack([lmnfast.connectivity(f, own, **chosen) for f, own in zip(models, x)])
        launches.clear()
        L = lmnfast.connectivity(models[0], x, stacked=stacked, **chosen)
        assert torch.equal(L, truth) and launches == [-1, -1]


def test_a_launch_for_all_costs_no_call_for_each(emulated, monkeypatch):
    """Neither in torch nor in kernels; the eigenvalues come in one batch, the numbers in two copies."""
    counts, passes, find = [], [], _checks.find
    monkeypatch.setattr(_checks, "find", lambda *args: passes.append(args) or find(*args))
    for networks in (2, 5):
        models, stacked, x = stack_of(lambda: mlp(6, 20, 4), networks)
        lmnfast.lmn(models[0], x, stacked=stacked)
        passes.clear()
        with torch.profiler.profile() as profile:
            values = lmnfast.lmn(models[0], x, stacked=stacked)
        assert len(passes) == 1
        names = [event.name for event in profile.events()]
        for op in ("path_connectivity", "symmetric_eigenvalues", "spectral_entropy"):
            assert names.count(f"lmnfast::{op}") == 1, op
        counts.append({name: names.count(name) for name in names if name not in ("aten::as_strided",)})
        alone = torch.stack([lmnfast.lmn(f, own) for f, own in zip(models, x)])
        torch.testing.assert_close(values, alone, rtol=1e-12, atol=0)
    for name in counts[1]:  # but for the views that are given out, and what is stacked in resolving
        assert counts[1][name] <= counts[0].get(name, 0) or name in ("aten::select", "aten::unbind"), name


def test_the_matrices_of_a_stack_are_not_copied(emulated):
    models, stacked, x = stack_of(lambda: mlp(6, 20, 4), 3)
    each = measured(models[0], x, DEFAULT, stacked)
    assert _connectivity.stacked_matrices(each).data_ptr() == each[0].L.data_ptr()


def test_wrong_numbers_in_a_stack_are_named_as_in_a_network_alone(emulated, launches):
    for name in ("in order", "own forward"):
        for change in ("samples", "weights", "weights of another"):
            models, stacked, x = stack_of(STACKED[name], 3)
            if change == "samples":
                x[1, 4:6, 2] = NAN
            else:
                number = 1 if change == "weights" else 2
                with torch.no_grad():
                    models[number][0].weight[2, 3] = stacked[0]["0.weight"][number, 2, 3] = float("inf")
            for f, own in zip(models, x):
                try:
                    lmnfast.connectivity(f, own)
                except ValueError as error:
                    alone = str(error)
            launches.clear()
            with pytest.raises(ValueError) as together:
                lmnfast.connectivity(models[0], x, stacked=stacked)
            assert str(together.value) == alone and "NaN or Inf in" in alone and launches == [3]


def test_a_network_of_a_stack_whose_chain_has_other_outputs_is_measured_anew(emulated, monkeypatch, launches):
    """Its forward knows a value of its parameters that the trace did not see."""

    class Knows(Same):
        def forward(self, x):
            y = super().forward(x)
            return y + y**2 if float(self[0].bias[0]) == 7 else y

    models, stacked, x = stack_of(lambda: Knows(*mlp(6, 20, 4)), 3)
    with torch.no_grad():
        models[1][0].bias[0] = stacked[0]["0.bias"][1, 0] = 7
    wanted = [lmnfast.connectivity(counted(models[1]), x[1]), lmnfast.connectivity(Same(*models[2]), x[2])]
    chain_or_reason = _route.chain_or_reason
    monkeypatch.setattr(_route, "chain_or_reason", lambda f, *_: chain_or_reason(nn.Sequential(*f)))
    launches.clear()
    L = lmnfast.connectivity(models[0], x, stacked=stacked)
    assert launches == [3, -1]
    assert (L[1] - wanted[0]).abs().max() < 1e-5 and torch.equal(L[2], wanted[1])


def test_what_a_stack_counts_as_constant_is_that_of_each_network(emulated):
    models, stacked, x = stack_of(lambda: mlp(6, 20, 4), 3)
    # One unit that is the same large number for all samples, and one output that reads no other.
    with torch.no_grad():
        for values in (dict(models[1].named_parameters()), {k: v[1] for k, v in stacked[0].items()}):
            values["0.weight"][3] = values["2.weight"][0] = 0
            values["0.bias"][3], values["2.weight"][:, 3] = 1e5, 1
    each = measured(models[0], x, DEFAULT, stacked)
    alone = [measured(f, own, DEFAULT)[0] for f, own in zip(models, x)]
    assert [one.constants for one in each] == [one.constants for one in alone] and each[1].constants > 0
    assert [one.offset_problem() for one in each] == [one.offset_problem() for one in alone]
    assert "some outputs are" in str(each[1].offset_problem())
    with pytest.warns(UserWarning, match="f: .* some outputs are"):
        lmnfast.lmn(models[0], x, stacked=stacked)


def test_outputs_other_than_expected_are_an_error():
    net, x = mlp(6, 20, 4), inputs(20, 6)
    y = net(x).detach()
    enqueue(net, x, expected=y * (1 + 1e-7))
    for other in (y + 1e-3 * y.abs().max(), y[:, :3], y.double(), torch.full_like(y, NAN)):
        with pytest.raises(RuntimeError, match="f: its outputs on the samples are not those of the model"):
            enqueue(net, x, expected=other)
        with pytest.raises(RuntimeError, match="f: its outputs on the samples are not those of the model"):
            enqueue(net, x, expected=other, deferred=True).check()


def test_the_precision_is_that_of_the_time_of_the_work():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        enqueued = enqueue(mlp(6, 20, 4), inputs(5, 6), fuse=False)  # whose products are torch's
        torch.set_float32_matmul_precision("medium")
        assert enqueued.precision == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# ---- on a CUDA device ----


@CUDA
@pytest.mark.parametrize("wrap", [lambda net: net, counted], ids=["fused", "generic"])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.GELU, nn.Tanh])
class TestCuda:
    def test_agrees_with_the_definition(self, wrap, activation, dtype):
        device = torch.device(
            "cuda", torch.cuda.device_count() - 1
        )  # not the default one where there are more
        net, x = mlp(16, 60, 60, 8, activation=activation, gain=1.5), inputs(90, 16, dtype=dtype)
        with torch.no_grad():
            truth = reference.path_connectivity(copy.deepcopy(net).double(), x.double(), *UNIFORM)
        net, x = net.to(device, dtype), x.to(device)
        for stream in (torch.cuda.default_stream(device), torch.cuda.Stream(device)):
            with torch.cuda.stream(stream):
                L = lmnfast.connectivity(wrap(net), x)
                assert L.device == device and L.dtype == dtype
                assert (L.cpu() - truth).abs().max() < ON_A_CARD[dtype]

    def test_is_enqueued_without_waiting_for_the_device(self, waits_are_errors, wrap, activation):
        if not _native.cuda_built():
            pytest.skip("built without CUDA kernels")
        net, x = mlp(6, 20, 4, activation=activation).cuda(), inputs(20, 6).cuda()
        f, stream = wrap(net), torch.cuda.Stream()
        if recognise(f) is None:
            pytest.skip(
                "unresolved pairs of other functions are measured at once, with the parameters of now"
            )
        lmnfast.connectivity(f, x)
        with waits_are_errors():
            enqueued = [enqueue(f, x, stream=s) for s in (None, stream)]
        torch.cuda.synchronize()
        for each in enqueued:
            each.check()
            assert (each.L - lmnfast.connectivity(f, x)).abs().max() < 1e-6

    def test_what_follows_on_the_current_stream_may_change_the_weights(self, wrap, activation):
        net, x = mlp(6, 20, 4, activation=activation).cuda(), inputs(20, 6).cuda()
        truth, stream = lmnfast.connectivity(wrap(net), x), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(
                200_000_000
            )  # a tenth of a second: nothing below can be done before what follows
        enqueued = enqueue(wrap(net), x, stream=stream)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(3)
        torch.cuda.synchronize()
        enqueued.check()
        assert (enqueued.L - truth).abs().max() < 1e-6


@CUDA
@pytest.mark.parametrize("name", WRONG)
def test_errors_on_cuda_are_those_on_the_cpu(name):
    f, x = copy.deepcopy(WRONG[name][0]), torch.tensor(WRONG[name][1])
    with pytest.raises(ValueError) as on_cpu:
        lmnfast.connectivity(f, x)
    with pytest.raises(ValueError) as on_cuda:
        lmnfast.connectivity(f.cuda() if isinstance(f, nn.Module) else f, x.cuda())
    assert str(on_cuda.value) == str(on_cpu.value)


@CUDA
def test_a_wrong_chain_on_cuda_falls_back_to_the_generic_route(monkeypatch):
    net, x = mlp(6, 20, 4).cuda(), inputs(12, 6).cuda()
    wrong = Chain((torch.zeros(4, 6, device="cuda"),), (None,), (IDENTITY,) * 2)
    truth = lmnfast.connectivity(net, x)
    monkeypatch.setattr(_route, "chain_or_reason", lambda f, *_: wrong)
    # Not the module itself: of torch's own modules in order the chain is not compared with f.
    assert (lmnfast.connectivity(lambda points: net(points), x) - truth).abs().max() < 1e-5


# ---- arguments ----


@pytest.mark.parametrize(
    "x, keywords, error, message",
    [
        (
            torch.ones(3, 6, dtype=torch.int64),
            {},
            TypeError,
            "x: expected floating-point samples, got torch.int64.*cut",
        ),
        ([[1.0] * 6], {}, TypeError, "x: expected a tensor of samples, got list"),
        (
            torch.zeros(0, 6),
            {},
            ValueError,
            r"x: expected samples \(N, \*in\) with N > 0, got shape \(0, 6\)",
        ),
        (torch.zeros(6), {}, ValueError, "x: expected samples"),
        (
            inputs(3, 6).double(),
            {},
            TypeError,
            "x: is torch.float64, but f's parameter '0.weight' is torch.float32",
        ),
        (
            inputs(3, 6),
            {"method": "magic"},
            ValueError,
            "method: expected one of path, hermite, .*jacobian, got 'magic'",
        ),
        (inputs(3, 6), {"rule": "simpson"}, ValueError, "rule: expected one of uniform, lobatto"),
        (inputs(3, 6), {"points": 2}, ValueError, "points: expected at least 3, .* got 2"),
        (inputs(3, 6), {"points": 2, "method": "hermite"}, ValueError, "points: expected at least 3"),
        (inputs(3, 6), {"points": 2, "method": "jacobian"}, ValueError, "points: expected at least 3"),
        (inputs(3, 6), {"points": 2.5}, TypeError, "points: expected an integer"),
        (inputs(3, 6), {"budget": 0}, ValueError, "budget: expected a positive number of bytes, got 0"),
        (torch.zeros(3, 6, device="meta"), {}, ValueError, "x: on meta, where tensors have no values"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(x, keywords, error, message):
    net = mlp(6, 20, 4)
    net.register_forward_hook(lambda *_: pytest.fail("f was called"))
    with pytest.raises(error, match=message):
        lmnfast.connectivity(net, x, **keywords)


def test_samples_on_another_device_than_the_model_are_refused():
    with pytest.raises(
        ValueError, match="x: on cpu, but f's parameter '0.weight' is on meta; move one of them"
    ):
        lmnfast.connectivity(mlp(6, 20, 4).to("meta"), inputs(3, 6))


@pytest.mark.parametrize(
    "f, error, message",
    [
        (lambda x: x.argmax(1), TypeError, "f: expected a floating-point tensor, got torch.int64"),
        (lambda x: (x, x), TypeError, "f: expected a floating-point tensor, got tuple"),
        (lambda x: x.sum(), ValueError, r"f: expected outputs \(5, \*out\) for 5 samples, got shape \(\)"),
        (lambda x: x[:2], ValueError, r"f: expected outputs \(5, \*out\) for 5 samples, got shape \(2, 6\)"),
        (lambda x: x[:, :0], ValueError, r"f: expected outputs .* got shape \(5, 0\)"),
    ],
)
def test_functions_that_do_not_map_batches_are_refused(f, error, message):
    with pytest.raises(error, match=message):
        lmnfast.connectivity(f, inputs(5, 6))


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_is_as_it_was(failing, wrapped):
    class Wrapped(nn.Module):  # not a chain
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net(x)
            if failing and not torch.is_grad_enabled():
                raise RuntimeError("deliberate")
            return y * y

    net = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4))
    net = Wrapped(net) if wrapped or failing else net
    x = inputs(9, 6).requires_grad_()
    net.train()(x).sum().backward()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters()]
    x_before, rng = x.detach().clone(), torch.get_rng_state()
    if failing:
        with pytest.raises(RuntimeError, match="deliberate"):
            lmnfast.connectivity(net, x)
    else:
        L = lmnfast.connectivity(net, x)
        assert torch.equal(L, lmnfast.connectivity(net.eval(), x)), "dropout was not in eval mode"
        net.train()
    assert all(m.training for m in net.modules()) and torch.is_grad_enabled()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters()))
    assert torch.equal(x, x_before) and torch.equal(rng, torch.get_rng_state())


def test_a_network_that_works_in_place_does_not_change_the_samples():
    x = inputs(9, 6)
    before = x.clone()
    lmnfast.connectivity(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), x)
    lmnfast.connectivity(lambda v: v.relu_().sin(), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("route, n, allowance_mb", [("fused", 961, 64), ("generic", 300, 256 + 64)])
def test_peak_memory_beyond_the_result(route, n, allowance_mb):
    """Tail 100 -> 100 -> 31; the generic route would need 2 GB for all paths at once: growth of the process's peak over
    its state before, less the result."""
    code = f"""
import resource, torch, lmnfast
from torch import nn
net = nn.Sequential(nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 31))
f = net if {route!r} == "fused" else lambda x: net(x)
x = torch.randn({n}, 100)
lmnfast.connectivity(f, x[:70])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
L = lmnfast.connectivity(f, x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - L.numel() * 4 // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) / 1024 < allowance_mb


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [True, False])
def test_progress_rises_to_one_and_changes_nothing(method, fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3) if fused else nn.LayerNorm(9))
    x, shares = torch.randn(30, 5), []
    L = lmnfast.measure(model, x, method=method, budget=20_000, progress=shares.append).connectivity
    assert shares == sorted(shares) and shares[-1] == 1
    assert fused or method == "jacobian" or len(shares) > 2
    assert torch.equal(L, lmnfast.measure(model, x, method=method, budget=20_000).connectivity)


def test_progress_of_stacked_networks_is_that_of_all():
    models, shares = [nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.LayerNorm(9)) for _ in range(2)], []
    stacked = torch.func.stack_module_state(models)
    lmnfast.connectivity(models[0], torch.randn(2, 8, 5), stacked=stacked, progress=shares.append)
    assert shares == sorted(shares) and {0.5, 1} <= set(shares)


@pytest.mark.parametrize("fused", [True, False])
def test_what_progress_raises_ends_the_measurement(fused, monkeypatch):
    def progress(_: float) -> None:
        raise KeyError("enough")

    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3) if fused else nn.LayerNorm(9))
    with pytest.raises(KeyError, match="enough"):
        lmnfast.measure(model, torch.randn(30, 5), progress=progress)


def test_a_bar_shows_progress(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    x = torch.randn(8, 5)
    lmnfast.measure(nn.Linear(5, 2), x, progress=True)
    assert "100%" in capsys.readouterr().err
    lmnfast.measure(nn.Linear(5, 2), x)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(
        ImportError, match="progress: True shows a bar of tqdm, which is missing; pip install tqdm"
    ):
        lmnfast.measure(nn.Linear(5, 2), x, progress=True)
    with pytest.raises(
        TypeError, match="progress: expected a bool or a function of the share done, got 'yes'"
    ):
        lmnfast.measure(nn.Linear(5, 2), x, progress="yes")


def test_numpys_integers_are_integers():
    m = lmnfast.measure(nn.Linear(5, 2), torch.randn(8, 5), points=np.int64(21))
    assert m.points == 21 and type(m.points) is int


@pytest.mark.parametrize("samples, inputs, units", [(34, 64, 100), (300, 500, 40), (211, 1000, 7)])
def test_one_matrix_for_any_thread_count(samples, inputs, units, threads):
    """The samples of a chain go through its first Linear once; a product of torch is another with other threads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, units), nn.Tanh(), nn.Linear(units, 3)).double()
    x, results = torch.randn(samples, inputs).double(), []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append([lmnfast.connectivity(model, x, method=method) for method in ("path", "hermite")])
        z = _native.linear(x, model[0].weight, model[0].bias)
        results[-1] += [z[:7], _native.linear(x[:7], model[0].weight, model[0].bias)]
    assert torch.equal(results[0][2], results[0][3]), "depends on the number of samples"
    assert (z - model[0](x)).abs().max() < 1e-13
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh])
@pytest.mark.parametrize("widths", [(60, 200, 200, 10), (60, 300, 600), (60, 130, 10)])
def test_one_number_for_any_thread_count(widths, activation, threads):
    """Pairs that are measured again in float64, features of Jacobians, eigenvalues."""
    torch.manual_seed(0)
    layers = [[nn.Linear(a, b), activation()] for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(nn.Linear(60, 60), *(part for pair in layers for part in pair))[:-1]
    x, results = torch.randn(200, 60), []
    x = torch.cat([x, x[:100] + 1e-7 * torch.randn(100, 60)])  # float64 takes most of the time
    # The paths of the widest network take 6 s, in the same code as the others'.
    methods = [method for method in METHODS if method != "path" or widths[-1] == 10]
    for count in (1, 2, 3):
        threads(count)
        results.append([lmnfast.connectivity(model, x, method=method) for method in methods])
        results[-1] += [lmnfast.linear_mapping_number(L) for L in results[-1][:2]]
        results[-1] += [lmnfast.jacobian_distances(model, x, affine=affine) for affine in (False, True)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("activation", [nn.Softplus, nn.Tanh, functools.partial(nn.GELU, "tanh")])
def test_one_number_in_float64_for_any_thread_count(activation, threads):
    """Torch computes the last numbers of a thread's share of a tensor by other code, here of the activations'."""
    torch.manual_seed(0)
    deep = nn.Sequential(
        nn.Linear(64, 101), activation(), nn.Linear(101, 101), activation(), nn.Linear(101, 31)
    ).double()
    shallow = nn.Sequential(nn.Linear(30, 101), activation(), nn.Linear(101, 7)).double()
    x, z, results = torch.randn(60, 64).double(), torch.randn(701, 30).double(), []
    x = torch.cat([x, x * (1 + 1e-12 * torch.randn_like(x))])
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(
            [lmnfast.connectivity(deep, x), lmnfast.connectivity(deep, x, method="hermite-midpoint")]
        )
        results[-1] += [lmnfast.lmn(deep, x), lmnfast.jacobian_distances(shallow, z, affine=True)]
        results[-1] += [lmnfast.connectivity(shallow, z, method="jacobian")]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_no_more_threads_than_cores_to_run_on(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert _threads.cores_to_use() == min(64, _threads.cores())
