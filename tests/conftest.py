import os
import signal
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from support import EMULATED, LEVELS, has_cuda

from lmnfast import _native, _threads

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what a test starts
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=[*LEVELS, "cuda"])
def device(request):
    """Where the kernels get their tensors: the CPU, once per level that was built, and CUDA."""
    if request.param == "cuda" and not has_cuda():
        pytest.skip("no CUDA device")
    before = _native._C.isa()
    if request.param != "cuda" and not _native._C.use_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield torch.device("cuda" if request.param == "cuda" else "cpu")
    _native._C.use_isa(before)


@pytest.fixture
def emulated():
    """The CUDA kernels on the CPU."""
    before = _native._C.isa()
    if not _native._C.use_isa(EMULATED):
        pytest.skip("built without LMNFAST_CUDA=emulated")
    yield torch.device("cpu")
    _native._C.use_isa(before)


@pytest.fixture
def waits_are_errors():
    """A context in which a wait for a CUDA device raises."""

    @contextmanager
    def context():
        with warnings.catch_warnings():  # torch says that it does not notice all of them
            warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def precision():
    """Sets torch's float32 matmul precision; the one before comes back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def threads(monkeypatch):
    """Sets torch's thread count, which the kernels follow however few cores there are; the one before comes back."""
    before = torch.get_num_threads()
    monkeypatch.setattr(_threads, "cores", lambda: 64)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def interrupted(threads):
    """Ctrl-C in a call of a kernel that takes seconds: KeyboardInterrupt comes before the kernel is done."""
    threads(1)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(call: Callable[[], object]) -> None:
        shares: list[float] = []

        def progress(share: float) -> None:
            shares.append(share)
            if len(shares) == 1:
                threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

        with _native.reporting(progress), pytest.raises(KeyboardInterrupt):
            call()
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] < 0.9

    yield check
    signal.signal(signal.SIGINT, handler)
