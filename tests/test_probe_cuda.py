"""A probe of a network on a CUDA device: training neither waits for it nor changes what it measures."""

import threading

import pytest
import torch
import torch.nn.functional as F
from support import CUDA
from torch import nn

import lmnfast.probe
from lmnfast import _native
from lmnfast.cutting import cut
from lmnfast.probe import Probe


class Residual(nn.Module):
    """No chain."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = F.silu(self.first(x))
        return y + F.silu(self.second(y))


def chain():
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))


def on_cuda(network):
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # not the default one where there are more
    return network().to(device), ("first" if network is Residual else "0"), torch.randn(12, 5).to(device)


@CUDA
@pytest.mark.parametrize("network", [chain, Residual])
@pytest.mark.parametrize("own_stream", [False, True])
def test_training_may_go_on_at_once_and_does_not_change_the_value(network, own_stream):
    model, layer, x = on_cuda(network)
    expected = lmnfast.measure(*cut(model, layer, x)).lmn
    stream = torch.cuda.Stream(x.device) if own_stream else torch.cuda.default_stream(x.device)
    stream.wait_stream(torch.cuda.default_stream(x.device))
    with Probe(model, x, layer, every=1) as probe, torch.cuda.stream(stream):
        with torch.cuda.stream(probe._streams_on(x.device)[0]):
            torch.cuda._sleep(200_000_000)  # a tenth of a second: no connectivity before what follows
        loss = torch.ones((), device=x.device)
        probe(0, loss=loss)
        with torch.no_grad():
            for value in (*model.parameters(), loss):
                value.mul_(3)
    row = probe.history[0]
    assert row["lmn"] == pytest.approx(expected, rel=1e-5) and row["loss"] == 1 and row["solver"] == "cuda"


@CUDA
@pytest.mark.parametrize("network", [chain, Residual])
def test_the_calling_thread_does_not_wait_for_the_device(network, waits_are_errors):
    if not _native.cuda_built():
        pytest.skip("built without CUDA kernels")
    model, layer, x = on_cuda(network)
    with Probe(model, x, layer, every=1) as probe:
        probe(0)
        assert len(probe.history) == 1
        free = threading.Event()
        probe._solver.submit(free.wait, 60)  # it does wait, and the mode is for all threads
        try:
            with waits_are_errors():
                probe(1, loss=torch.ones((), device=x.device))
        finally:
            free.set()
    assert [row["lmn"] for row in probe.history] == pytest.approx([probe.history[0]["lmn"]] * 2, rel=1e-6)
