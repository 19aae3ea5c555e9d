"""The seam: loads the compiled core and turns tensors into addresses.

Everything the kernels must be able to trust is checked before this point, by ``lmnfast.ops``.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._threads import cores_to_use

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"lmnfast's compiled core is missing or does not load ({error}); build it with: pip install ."
    ) from error

# Bytes from which a result may well lie on pages fresh from the system: from 32 MB on it always does (glibc), and a
# smaller one where the heap was given back in between, as between two calls of jacobians (12 MB: 9 ms for 8).
FRESH_PAGES = 4 * 2**20

Progress = Callable[[float], object]  # is told the share that is done, from 0 to 1
_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)

_has_emulator = "emulated-cuda" in _C.isas()
_isa = os.environ.get("LMNFAST_ISA")
if _isa and not _C.use_isa(_isa):
    raise RuntimeError(f"LMNFAST_ISA: expected one of {', '.join(_C.isas())} on this machine, got {_isa!r}")


def has_kernels(tensor: Tensor) -> bool:
    """Whether this build has kernels for the device of a tensor."""
    return tensor.device.type == "cpu" or on_cuda(tensor)


def on_cuda(tensor: Tensor) -> bool:
    """Whether this build has CUDA kernels for the device of a tensor, also emulated."""
    return cuda_built() if tensor.is_cuda else emulates_cuda(tensor)


def emulates_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels take this tensor on the CPU, in a build for their tests."""
    return _has_emulator and tensor.device.type == "cpu" and _C.isa() == "emulated-cuda"


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor's values lie; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def plain(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory one after the other, at an address that is a multiple of their size."""
    if tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.resolve_neg().contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def path_nodes(nodes: Tensor, weights: Tensor) -> tuple[list[float], list[float], float, float]:
    """A rule as the kernels use it: interior nodes, their weights, and mean and variance of t over all nodes."""
    t, w = nodes.tolist(), weights.tolist()
    return t[1:-1], w[1:-1], *_moments(tuple(t), tuple(w))


@lru_cache(maxsize=16)
def _moments(t: tuple[float, ...], w: tuple[float, ...]) -> tuple[float, float]:
    nodes, weights = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (t, w))
    mean = weights @ nodes
    return float(mean), float(weights @ (nodes - mean) ** 2)


def cuda_built() -> bool:
    return bool(_C.cuda_archs)


_HERE = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which the CUDA device of a tensor is the current one, for a kernel.

    Raises RuntimeError where the kernels cannot run there.
    """
    if problem := cuda_problem(device):
        raise RuntimeError(f"no CUDA kernel for {device}: {problem}")
    return _HERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


@cache
def cuda_problem(device: torch.device | None = None) -> str | None:
    """Why the CUDA kernels do not run on a device (None: the current one), in one sentence that says what to do;
    None where they do."""
    if not cuda_built():
        return (
            "this build of lmnfast has none; install it again with nvcc on the path, or with LMNFAST_CUDA=on"
        )
    if reason := no_cuda_device():
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    oldest = min(map(int, _C.cuda_archs.split()))
    if 10 * major + minor < oldest:
        return (
            f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, the oldest target of this build sm_{oldest}; "
            f"build lmnfast with LMNFAST_CUDA_ARCHS={major}{minor} (8.0 or newer), or measure on the CPU"
        )
    return None


def no_cuda_device() -> str | None:
    """Why torch sees no CUDA device; None where it sees one."""
    if torch.cuda.is_available():
        return None
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a CPU build; install one for CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # torch knows whether the driver is missing or too old
        return str(error).splitlines()[0]
    return "torch does not say why; look at the driver with nvidia-smi, and at CUDA_VISIBLE_DEVICES"


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape)``, for results: a large one on huge pages, where the system has them."""
    result = like.new_empty(shape, dtype=dtype)
    if result.device.type == "cpu" and result.nbytes >= FRESH_PAGES:
        _C.advise_huge_pages(address(result), result.nbytes)
    return result


def run(call: Any, result: Tensor, *more: Tensor | None, reports: bool = True) -> Tensor:
    """Runs a call, an object of the compiled core that holds an op's arguments, on the device of its results; returns the
    first.

    The call says how much memory it needs there, which is kept until it has run; so must be the tensors that it was made of.
    reports: whether it tells `reporting`'s function how much is done.
    """
    results = [0 if one is None else one.data_ptr() for one in (result, *more)]
    if result.is_cuda:
        with on_device(result.device):
            size = call.workspace_cuda()
            memory = result.new_empty(size, dtype=torch.uint8) if size else None
            # Public ways to this address make a Stream, and take ten times as long; code that torch.compile makes calls this
            # one.
            stream = torch._C._cuda_getCurrentRawStream(result.device.index)
            call.run_cuda(*results, 0 if memory is None else memory.data_ptr(), stream)
    else:
        count = cores_to_use()
        size = call.workspace(count)
        memory = result.new_empty(size, dtype=torch.uint8) if size else None
        signals = threading.current_thread() is threading.main_thread()  # Python handles them there alone
        progress = _progress.get() if reports else None
        call.run(*results, 0 if memory is None else memory.data_ptr(), count, signals, progress)
    return result


# Multiply-adds up to which a product in float64 is one kernel of the package's on CUDA, which converts as it loads. Torch
# launches four kernels for it, three of them to convert. For larger products torch's kernel should be the faster one (an
# estimate).
SMALL_LINEAR = 2**25


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of rows x (B, D) in float64. On the CPU it has the same bits for any thread count and any number of rows,
    which torch's BLAS does not: it sums products in parts that depend on both. No autograd there.

    Also of several networks, with one more dimension in front of all: the same bits as of one after the other."""
    alike = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if alike and on_cuda(x) and x.shape[-2:].numel() * weight.shape[-2] <= SMALL_LINEAR:
        return _linear(x, weight, bias)
    if x.dim() == 3:
        biases = [None] * len(x) if bias is None else bias
        return torch.stack([linear(*one) for one in zip(x, weight, biases)])
    if x.device.type != "cpu":
        return F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if not alike:
        x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight, bias = plain(x), plain(weight), None if bias is None else plain(bias)
    *networks, samples, inputs = x.shape
    outputs = weight.shape[-2]
    arrays = x.data_ptr(), weight.data_ptr(), address(bias)
    call = _C.Linear(x.dtype == torch.float64, *arrays, *(networks or (1,)), samples, inputs, outputs)
    return run(call, x.new_empty((*networks, samples, outputs), dtype=torch.float64), reports=False)


# Torch gives each thread an equal share of a pointwise function's numbers: for GELU from more than SERIAL numbers on, for the
# others from STRETCH on, at least STRETCH to a thread. Measured with torch 2.13: from there on the bits follow the thread
# count.
SERIAL, STRETCH = 2**14, 2**15


def pointwise(function: Callable[..., Tensor], *z: Tensor) -> Tensor:
    """A pointwise function of torch's, of tensors of one shape. On the CPU it has the same bits for any thread count: torch
    computes the last numbers of a thread's share, fewer than its loop over vectors takes, by other code. Here all shares are
    whole vectors."""
    if z[0].device.type != "cpu":
        return function(*z)
    count, block = z[0].numel(), STRETCH * torch.get_num_threads()
    whole = count - count % block

    def parts(values: Tensor) -> list[Tensor]:
        flat = values.reshape(-1)
        rest = [F.pad(part, (0, -len(part) % 64)) for part in flat[whole:].split(SERIAL)]
        return [*flat[:whole].split(block), *rest] if whole else rest

    values = [function(*part) for part in zip(*map(parts, z))]
    return (values[0] if len(values) == 1 else torch.cat(values))[:count].reshape(z[0].shape)


@contextmanager
def reporting(progress: Progress | None) -> Iterator[None]:
    """Has the kernels called in this context tell `progress` the share that is done; a registered op has no argument for
    a Python function."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def info() -> dict[str, object]:
    """What was built and what is in use: isa, isas, cuda_built, cuda_archs."""
    return {
        "isa": _C.isa(),
        "isas": _C.isas(),
        "cuda_built": cuda_built(),
        "cuda_archs": _C.cuda_archs,
    }
