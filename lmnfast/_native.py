"""The seam between Python and the compiled core: loads the core and turns tensors into addresses.

In an install without the core, `HAS_CORE` is False and `_C` is the module ``_without_core``. The ops then run by
``lmnfast.reference``.

The kernels trust what they get. Arguments of `linear` are checked here. All others are checked by ``lmnfast.ops`` before they
come here, with one exception: `find` of ``lmnfast/ops/check_outputs.py`` trusts its one caller and says why.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _without_core
from ._threads import cores_to_use


def _load() -> tuple[Any, str | None]:
    """The compiled core and None, or what stands in for it and why. A core that should load and does not is an error."""
    wanted = os.environ.get("LMNFAST_CORE") or "auto"
    if wanted not in ("auto", "on", "off"):
        raise RuntimeError(f"LMNFAST_CORE: expected auto, on or off, got {wanted!r}")
    reason = _without_core.ON_REQUEST if wanted == "off" else _without_core.left_out()
    if reason is not None:
        if wanted == "on":
            raise ImportError(
                f"LMNFAST_CORE is on, but lmnfast was installed without its compiled core, as {reason}"
            )
        if reason != _without_core.ON_REQUEST:
            warnings.warn(
                f"lmnfast runs without its compiled core, as {reason}: numbers are right, but take up to hundreds of times "
                "as long. With a compiler, pip install --force-reinstall --no-cache-dir lmnfast builds the core; "
                "LMNFAST_CORE=off means that it is left out on purpose, without this warning",
                stacklevel=2,
            )
        return _without_core, reason
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"lmnfast's compiled core is missing or does not load ({error}); build it with: pip install . "
            "LMNFAST_CORE=off runs without it, slowly"
        ) from error
    return _C, None


_C, without_core = _load()
HAS_CORE = without_core is None
"""Whether ops run in the compiled core. `without_core` is the reason why they do not."""

# Results of at least this many bytes get huge pages, because they often lie on pages fresh from the system, whose page faults
# are slow. With glibc a result of 32 MB or more always lies on fresh pages. A smaller result does if the heap was given back to
# the system in between, as between two calls of jacobians (12 MB: 9 ms in place of 8).
FRESH_PAGES = 4 * 2**20

Progress = Callable[[float], object]  # a function that receives the finished share of the work, from 0 to 1
_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)

_has_emulator = "emulated-cuda" in _C.isas()
_isa = os.environ.get("LMNFAST_ISA")
if _isa and not _C.use_isa(_isa):
    raise RuntimeError(f"LMNFAST_ISA: expected one of {', '.join(_C.isas())} on this machine, got {_isa!r}")


def has_kernels(tensor: Tensor) -> bool:
    """Whether every op takes tensors on the device of this tensor."""
    return tensor.device.type == "cpu" or on_cuda(tensor)


def by_reference(tensor: Tensor) -> bool:
    """Whether an op that has kernels for some devices runs in plain torch on the device of this tensor."""
    return not (HAS_CORE and has_kernels(tensor))


def on_cuda(tensor: Tensor) -> bool:
    """Whether this build has CUDA kernels for the device of a tensor, also emulated."""
    return cuda_built() if tensor.is_cuda else emulates_cuda(tensor)


def emulates_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels take this tensor on the CPU, in a build for their tests."""
    return _has_emulator and tensor.device.type == "cpu" and _C.isa() == "emulated-cuda"


def address(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor's values; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def plain(tensor: Tensor) -> Tensor:
    """The tensor, copied if needed, with its values one after the other at an address that is a multiple of their size."""
    if tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.resolve_neg().contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def rule_arguments(nodes: Tensor, weights: Tensor) -> tuple[list[float], list[float], float, float]:
    """A rule as the kernels take it: interior nodes, their weights, and mean and variance of t over all nodes."""
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
    """A context for a kernel: the CUDA device of its tensors is the current device.

    Raises:
        RuntimeError: the kernels cannot run on the device.
    """
    if problem := cuda_problem(device):
        raise RuntimeError(f"no CUDA kernel for {device}: {problem}")
    return _HERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


@cache
def cuda_problem(device: torch.device | None = None) -> str | None:
    """The reason why the CUDA kernels do not run on a device, in one sentence that says what to do; None if they do run.

    Args:
        device: None: the current CUDA device.
    """
    if not HAS_CORE:
        return f"lmnfast runs without its compiled core, as {without_core}"
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
    """The reason why torch sees no CUDA device; None if it sees one."""
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
    """``like.new_empty(shape)``, for results. A large result on the CPU gets huge pages, if the system has them."""
    result = like.new_empty(shape, dtype=dtype)
    if result.device.type == "cpu" and result.nbytes >= FRESH_PAGES:
        _C.advise_huge_pages(address(result), result.nbytes)
    return result


def run(call: Any, result: Tensor, *more: Tensor | None, reports: bool = True) -> Tensor:
    """Runs an op of the compiled core on the device of its results.

    Args:
        call: an object of the compiled core that holds the op's arguments. It holds addresses, not tensors: the caller keeps
            the tensors until this function returns.
        result: the first result, which the op writes.
        more: the other results, or None for a result that is not needed.
        reports: whether the op reports the finished share to the function of `reporting`.

    Returns:
        The first result.
    """
    results = [0 if one is None else one.data_ptr() for one in (result, *more)]
    if result.is_cuda:
        with on_device(result.device):
            size = call.workspace_cuda()
            memory = result.new_empty(size, dtype=torch.uint8) if size else None
            # The public functions for this address make a Stream object and take ten times as long. The code that torch.compile
            # generates calls this function too.
            stream = torch._C._cuda_getCurrentRawStream(result.device.index)
            call.run_cuda(*results, 0 if memory is None else memory.data_ptr(), stream)
    else:
        count = cores_to_use()
        memory, workspace = _workspace(result, call.workspace(count))
        # Python runs signal handlers only on its main thread.
        signals = threading.current_thread() is threading.main_thread()
        progress = _progress.get() if reports else None
        call.run(*results, workspace, count, signals, progress)
        del memory
    return result


HUGE_PAGE = 2 * 2**20


def _workspace(like: Tensor, size: int) -> tuple[Tensor | None, int]:
    """Memory on the CPU for a kernel, and its address. A large one lies on huge pages, if the system has them.

    Measured on path_connectivity_backward, whose panels take 0.3 MB a thread: 660 ms without huge pages, 540 ms with them.
    """
    if size == 0:
        return None, 0
    if size < FRESH_PAGES:
        memory = like.new_empty(size, dtype=torch.uint8)
        return memory, memory.data_ptr()
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    memory = like.new_empty(whole + HUGE_PAGE, dtype=torch.uint8)
    address = -(-memory.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    _C.advise_huge_pages(address, whole)
    return memory, address


# A float64 product on CUDA with at most this many multiply-adds is computed by the package's kernel, which converts the values
# to float64 as it loads them. Torch launches four kernels for such a product, three of them only to convert. For larger
# products torch's kernel should be faster (an estimate).
SMALL_LINEAR = 2**25


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of rows x (B, D) in float64.

    On the CPU the result has the same bits for any thread count and any number of rows. Torch's BLAS does not promise that,
    because it sums products in parts that depend on both. On the CPU there is no autograd. Without the compiled core the
    product is torch's.

    The tensors of several networks may be stacked, with one more dimension in front of all tensors. The result then has the
    same bits as the results of one network after the other.

    Raises ValueError for shapes or devices that do not fit.
    """
    _check_linear(x, weight, bias)
    alike = x.dtype in (torch.float32, torch.float64) and all(
        t is None or t.dtype == x.dtype for t in (weight, bias)
    )
    if not (alike and on_cuda(x) and x.shape[-2:].numel() * weight.shape[-2] <= SMALL_LINEAR):
        if x.dim() == 3:
            biases = [None] * len(x) if bias is None else bias
            return torch.stack([linear(*one) for one in zip(x, weight, biases)])
        if x.device.type != "cpu" or not HAS_CORE:
            with nullcontext() if HAS_CORE else torch.no_grad():
                return F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if not alike:
        x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    x, weight, bias = plain(x), plain(weight), None if bias is None else plain(bias)
    *networks, samples, inputs = x.shape
    outputs = weight.shape[-2]
    arrays = x.data_ptr(), weight.data_ptr(), address(bias)
    call = _C.Linear(x.dtype == torch.float64, *arrays, *(networks or (1,)), samples, inputs, outputs)
    return run(call, x.new_empty((*networks, samples, outputs), dtype=torch.float64), reports=False)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    networks, inputs = x.shape[:-2], x.shape[-1:]
    outputs = weight.shape[-2:-1]
    fits = x.dim() in (2, 3) and weight.dim() == x.dim() and weight.device == x.device
    if not fits or weight.shape != networks + outputs + inputs:
        raise ValueError(
            f"weight: expected (outputs, inputs) of samples {tuple(x.shape)} on {x.device}, "
            f"got shape {tuple(weight.shape)} on {weight.device}"
        )
    if bias is not None and (bias.shape != networks + outputs or bias.device != x.device):
        raise ValueError(
            f"bias: expected {tuple(networks + outputs)} on {x.device}, "
            f"got shape {tuple(bias.shape)} on {bias.device}"
        )


# Torch splits a pointwise function's numbers into equal shares, one per thread: for GELU if there are more than SERIAL numbers,
# for other functions if there are at least STRETCH, with at least STRETCH in each share. Measured with torch 2.13: at these
# sizes the bits begin to depend on the thread count.
SERIAL, STRETCH = 2**14, 2**15


def pointwise(function: Callable[..., Tensor], *z: Tensor) -> Tensor:
    """A pointwise function of torch, applied to tensors of one shape; on the CPU with the same bits for any thread count.

    Torch's loop works on vectors. The numbers that are left at the end of a thread's share go through other code, with other
    bits. Here every share consists of whole vectors.
    """
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
    """In this context, kernels report the finished share of their work to `progress`.

    A registered op cannot have a Python function as an argument, so this is a context.
    """
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def report(share: float) -> None:
    """Reports the finished share to the function of `reporting`, for an op that runs by its reference."""
    progress = _progress.get()
    if progress is not None:
        progress(share)


def info() -> dict[str, object]:
    """Facts about the build and its use: core, isa, isas, cuda_built, cuda_archs.

    core is "compiled", or the reason why there is none.
    """
    return {
        "core": "compiled" if without_core is None else f"none, as {without_core}",
        "isa": _C.isa(),
        "isas": _C.isas(),
        "cuda_built": cuda_built(),
        "cuda_archs": _C.cuda_archs,
    }
