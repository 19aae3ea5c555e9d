import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpointed import NETS, random_state
from probed import Network
from support import EMULATED, LEVELS, has_cuda, samples
from tiled import FEW, network
from tiny import TINY

import lmnfast
from lmnfast import _native, _threads
from lmnfast.grokking.training import train

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what a test starts
    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With -k emulated, leaves out files without such a test: what these import, such as Lightning, takes 10 s."""
    if config.option.keyword != "emulated" or not collection_path.match("test_*.py"):
        return None
    return None if re.search(r"\b(device|emulated|EMULATED|LEVELS)\b", collection_path.read_text()) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests on a device or an instruction set that is not here: to skip thousands of them takes time."""
    here = {*_native._C.isas(), *(["cuda"] if has_cuda() else [])}

    def needed(item: pytest.Item) -> str | None:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return EMULATED if "emulated" in item.fixturenames else parameters.get("device")

    absent = [item for item in items if needed(item) not in (None, *here)]
    if absent:
        config.hook.pytest_deselected(items=absent)
        left_out = set(absent)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=[*LEVELS, "cuda"])
def device(request):
    """Where the kernels get their tensors: the CPU, once per level that was built, and CUDA."""
    before = _native._C.isa()
    assert request.param == "cuda" or _native._C.use_isa(request.param)
    yield torch.device("cuda" if request.param == "cuda" else "cpu")
    _native._C.use_isa(before)


@pytest.fixture
def emulated():
    """The CUDA kernels on the CPU."""
    before = _native._C.isa()
    assert _native._C.use_isa(EMULATED)
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
    if not _native.HAS_CORE:
        pytest.skip("without the compiled core, Python itself looks for signals")
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


@pytest.fixture
def model():
    """The network that tests of probes train."""
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def x():
    """Samples for it."""
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run never stopped. Tests only read it."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return train(TINY, path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty current directory with the module nets, and what imports leave undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("nets.py").write_text(NETS)
    yield tmp_path
    for name in ("nets", "broken", "absent", "digits"):
        sys.modules.pop(name, None)


@pytest.fixture
def trained(place):
    """step_2.pt, step_10.pt, step_100.pt of nets:make, and x.npy."""
    sys.path.insert(0, str(place))
    import nets

    generator = torch.Generator().manual_seed(0)
    states = {}
    for step in (2, 10, 100):
        states[step] = random_state(nets.make(), generator)
        torch.save(states[step], f"step_{step}.pt")
    np.save("x.npy", torch.randn(12, 6, generator=generator, dtype=torch.float64).numpy())
    return states


@pytest.fixture
def folder(tmp_path):
    """A whole folder of tiles, of `network` on 60 samples."""
    lmnfast.tiles(network(), samples(60, 6), tmp_path / "tiles", **FEW)
    return tmp_path / "tiles"
