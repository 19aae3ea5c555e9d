import platform

import pytest
import torch

from lmnfast import _native

ISAS = ["baseline", "avx2", "avx512"] if platform.machine() == "x86_64" else ["baseline"]


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction-set level that was built, one after the other."""
    before = _native._C.isa()
    if not _native._C.use_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _native._C.use_isa(before)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def threads():
    """Sets torch's thread count; the one before comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
