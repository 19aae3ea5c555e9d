"""The small calls of every op that bench/gpu.sh makes on a card: here on every level, held to the baseline."""

import pytest
import smoke_gpu
import torch
from support import fewer

from lmnfast import _native, ops


@pytest.fixture
def level(device):
    """What `device` chose; the expected results are the baseline's."""
    return _native._C.isa()


@pytest.mark.parametrize("op", ops.__all__)
def test_small_calls_of_an_op_give_on_every_device_what_the_baseline_gives(op, device, level, monkeypatch):
    monkeypatch.setattr(smoke_gpu, "SAMPLES", fewer(37, 13))
    for call in smoke_gpu.CALLS[op]():
        assert _native._C.use_isa("baseline")
        expected = call.on("cpu")
        assert _native._C.use_isa(level)
        smoke_gpu.error(call, device.type, expected)


def test_a_wrong_result_is_an_error():
    call = smoke_gpu.Call("wrong", lambda device: torch.ones(2), 1e-3)
    assert smoke_gpu.error(call, "cpu", torch.ones(2)) == 0
    with pytest.raises(AssertionError, match="wrong"):
        smoke_gpu.error(call, "cpu", torch.tensor([1.0, 1.1]))
    with pytest.raises(AssertionError, match="wrong"):
        smoke_gpu.error(call, "cpu", torch.tensor([1.0, float("nan")]))
