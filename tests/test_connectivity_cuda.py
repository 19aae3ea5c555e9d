"""The public function on a CUDA device: what it gives on the CPU."""

import copy

import pytest
import torch
from networks import ON_A_CARD, WRONG, counted, inputs, mlp
from support import CUDA, UNIFORM
from torch import nn

import lmnfast
from lmnfast import _native, _route, reference
from lmnfast._chain import IDENTITY, Chain
from lmnfast._enqueue import enqueue
from lmnfast._recognise import recognise


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
