"""What measuring leaves behind in other threads and processes, and in models that are spread over several: nothing."""

import copy
import multiprocessing
import os
import threading

import pytest
import support
import torch
from torch import Tensor, fx, nn

import lmnfast
from lmnfast._tracing import Tracer
from lmnfast._undisturbed import sharding_of


def samples(n: int, *shape: int) -> Tensor:
    return support.samples(n, *(shape or (6,)))


def mlp() -> nn.Sequential:
    return support.mlp(6, 16, 3)


# Threads ---------------------------------------------------------------------------------------------------


class Written(nn.Module):
    """Has to be traced."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.drop = nn.Dropout()

    def forward(self, z):
        return self.last(self.drop(torch.tanh(self.norm(self.first(z)))))


def run_together(*work) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_one_model_may_be_measured_by_several_threads_at_once():
    torch.manual_seed(0)
    model, x = Written(), samples(20)
    model(x)
    right = lmnfast.lmn(*lmnfast.cut(model, "first", x))
    before = copy.deepcopy(model.state_dict())
    numbers = []

    def work():
        numbers.extend([float(lmnfast.lmn(*lmnfast.cut(model, "first", x))) for _ in range(4)])

    assert run_together(work, work, work) == []
    assert numbers == pytest.approx([float(right)] * 12, rel=1e-6)
    assert all(part.training and not part._forward_hooks for part in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_thread_runs_its_model_while_this_one_traces():
    reached, go_on = threading.Event(), threading.Event()
    other, x = Written().eval(), samples(20)
    expected = other(x)

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, z):
            assert fx._symbolic_trace._is_fx_tracing_flag
            reached.set()
            assert go_on.wait(30)
            return self.inner(z)

    graphs = []

    def trace():
        graphs.append(Tracer().trace(Waits()))

    def run():
        assert reached.wait(30)
        try:
            assert torch.equal(other(x), expected) and other.first is other._modules["first"]
            assert not fx._symbolic_trace._is_fx_tracing_flag, "compiled functions would refuse to run"
            seen = []
            handle = other.last.register_forward_hook(lambda *_: seen.append(1))
            other(x)
            handle.remove()
            assert seen == [1]
        finally:
            go_on.set()

    assert run_together(trace, run) == []
    assert [node.op for node in graphs[0].nodes] == ["placeholder", *["call_module"] * 3, "output"]


def test_the_lock_is_free_after_an_error():
    model = Written()

    def fails(z):
        raise OverflowError

    for _ in range(2):
        with pytest.raises(OverflowError):
            lmnfast.lmn(fails, samples(5))
        stacked = {"first.weight": torch.zeros(2, 1)}, {}
        with pytest.raises(ValueError, match="stacked"):
            lmnfast.lmn(model, samples(2, 5, 6), stacked=stacked)
    assert run_together(lambda: lmnfast.lmn(mlp(), samples(5))) == []


# Processes -------------------------------------------------------------------------------------------------


def in_a_fork(work) -> object:
    """What a function returns, or raises, in a forked process."""

    def run(results):
        try:
            results.put(work())
        except Exception as error:
            results.put(f"{type(error).__name__}: {error}")

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=run, args=(results,))
    child.start()
    child.join(30)
    try:
        assert not child.is_alive(), "the forked process hangs"
        return results.get()
    finally:
        child.kill()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
quiet = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@needs_fork
@quiet
def test_a_forked_process_measures_on_one_core(threads):
    threads(2)
    x = samples(200, 64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 100), nn.SiLU(), nn.Linear(100, 31))
    generic = nn.Sequential(nn.Linear(64, 100), nn.Hardswish(), nn.Linear(100, 31))
    settings = {"rule": "lobatto", "points": 5}

    def work() -> list[float]:
        numbers = [float(lmnfast.lmn(f, x, **settings)) for f in (net, generic)]
        assert lmnfast.jacobian_distances(net, x).shape == (200, 200)
        with lmnfast.Probe(net, x, "0", every=1, **settings) as probe:
            probe(0)
        return [*numbers, probe.history[0]["lmn"], torch.get_num_threads()]

    right = work()
    assert in_a_fork(work) == pytest.approx(right, rel=1e-5)


@needs_fork
@quiet
def test_a_probe_from_before_a_fork_says_so_in_the_child():
    model, x = mlp(), samples(9)
    with lmnfast.Probe(model, x, "0", every=1) as probe:
        probe(0)
        assert len(probe.history) == 1
        for use in (lambda: probe(1), lambda: probe.history, probe.state_dict, probe.new_rows):
            assert "RuntimeError: probe: made before this process was forked" in in_a_fork(use)
        assert in_a_fork(probe.close) is None
        probe(1)
    assert len(probe.history) == 2


@needs_fork
@quiet
def test_a_fork_while_another_thread_measures_does_not_keep_its_lock():
    reached, go_on = threading.Event(), threading.Event()

    def f(z):
        reached.set()
        assert go_on.wait(30)
        return torch.tanh(z)

    def fork():
        assert reached.wait(30)
        try:
            assert in_a_fork(lambda: float(lmnfast.lmn(torch.tanh, samples(9)))) >= 1
        finally:
            go_on.set()

    assert run_together(lambda: lmnfast.lmn(f, samples(9)), fork) == []


# Models over several processes -----------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_sharded_parameters_are_refused_and_training_goes_on(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, x = mlp(), samples(9)
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    assert sharding_of(sharded) == "DTensor parameters" and sharding_of(plain) is None
    for measure in (
        lambda: lmnfast.lmn(sharded, x),
        lambda: lmnfast.measure(sharded, x),
        lambda: lmnfast.jacobians(sharded, x),
        lambda: lmnfast.cut(sharded, "0", x),
        lambda: lmnfast.Probe(sharded, x, "0"),
    ):
        with pytest.raises(ValueError, match=r"model: its parameters are sharded .*DTensor"):
            measure()
        for model in (plain, sharded):
            model.zero_grad()
            model(x).square().mean().backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
    for own, other in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(own, other.full_tensor())


def test_a_model_in_ddp_is_measured_without_collectives(process_group, monkeypatch):
    torch.manual_seed(0)
    model, x = Written(), samples(12)
    model(x)
    right = lmnfast.lmn(*lmnfast.cut(model, "first", x))
    whole = lmnfast.lmn(model, x)
    parallel = nn.parallel.DistributedDataParallel(model)
    with monkeypatch.context() as patched:
        patched.setattr(parallel, "_sync_buffers", lambda: pytest.fail("waits for the other processes"))
        cut = lmnfast.cut(parallel, "module.first", x)
        assert float(lmnfast.lmn(*cut)) == pytest.approx(float(right), rel=1e-5)
        assert float(lmnfast.lmn(parallel, x)) == pytest.approx(float(whole), rel=1e-5)
        lmnfast.jacobians(parallel, x)
    assert parallel.require_forward_param_sync and parallel.require_backward_grad_sync
    for _ in range(2):
        parallel(x).sum().backward()
