"""How deep a call is. Work that is enqueued: its checks may be left for later, and then say what immediate ones do."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from networks import NAN, WRONG, counted, inputs, mlp
from support import COMPILED, UNIFORM
from torch import nn

import lmnfast
from lmnfast import _checks, _native, reference
from lmnfast._enqueue import Enqueued, enqueue
from lmnfast._settings import Settings

MOST_FRAMES = 10


class Block(nn.Module):
    """A feed-forward block."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def functions():
    """For every route, and for every way to compare Jacobians, a function of six numbers."""
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))
    shallow = mlp(6, 20, 4)
    return {
        "fused": deep,
        "one hidden layer": shallow,
        "block": Block(),
        "hoisted": lambda x: torch.softmax(deep(x), 1),
        "generic": lambda x: deep(x * x),
    }


def public_calls(f, x):
    for method in ("path", "hermite", "hermite-midpoint", "jacobian"):
        yield lmnfast.connectivity, (f, x), {"method": method}
        yield lmnfast.lmn, (f, x), {"method": method}
        yield lmnfast.measure, (f, x), {"method": method}
        if isinstance(f, nn.Module):
            parameters, xs = torch.func.stack_module_state([f, f]), x.expand(2, *x.shape)
            yield lmnfast.connectivity, (f, xs), {"method": method, "stacked": parameters}
    yield lmnfast.connectivity, (f, x.clone().requires_grad_()), {"differentiable": True}
    yield lmnfast.jacobians, (f, x), {}
    yield lmnfast.jacobian_distances, (f, x), {}
    yield lmnfast.curvature, (f, x), {}
    L = torch.eye(len(x))
    for function in (lmnfast.eigenvalues, lmnfast.nonlinear_complexity, lmnfast.linear_mapping_number):
        yield function, (L,), {}


@COMPILED
@pytest.mark.parametrize("name", functions())
def test_a_public_call_crosses_few_frames_to_a_kernel(name, monkeypatch):
    """Counted are the package's own frames, from the public function to `run` of the seam.

    Kernels are those of registered ops. A float64 product (`Linear`) is a step of other computations, as those of torch are.
    """
    run, here, depths = _native.run, Path(lmnfast.__file__).parent, {}

    def counted(call, *arguments, **options):
        frame, names = sys._getframe(1), ["run"]
        while frame.f_code.co_filename != __file__:
            if here in Path(frame.f_code.co_filename).parents:
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        if type(call) is not _native._C.Linear:
            depths[type(call).__name__, names[-1]] = max(names[::-1], depths.get(type(call), []), key=len)
        return run(call, *arguments, **options)

    monkeypatch.setattr(_native, "run", counted)
    for function, arguments, options in public_calls(functions()[name], inputs(12, 6)):
        function(*arguments, **options)
    assert len(depths) > 5
    assert {key: names for key, names in depths.items() if len(names) > MOST_FRAMES} == {}


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
    with pytest.raises(ValueError, match="x: NaN or Inf in sample 3$"):
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
