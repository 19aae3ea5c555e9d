"""The device and the number of threads that a command computes with."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import _native

DEVICES = ("auto", "cpu", "cuda")


def check_device(device: str) -> None:
    """Raises ValueError for a name that is none of DEVICES."""
    if device not in DEVICES:
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")


def settled_device(device: str, stored: str | None = None) -> str:
    """The device that a name of DEVICES stands for on this machine.

    Args:
        device: "auto" is `stored`, or where that is None "cuda" if there is one, else "cpu".
        stored: the device that the work was begun on.

    Raises:
        ValueError: an unknown name; no CUDA device.
    """
    check_device(device)
    cuda = torch.cuda.is_available()
    if device == "auto":
        device = stored or ("cuda" if cuda else "cpu")
    if device == "cuda" and not cuda:
        raise ValueError("device: cuda is not available")
    return device


def refuse_unusable(device: str) -> None:
    """Raises ValueError with the reason where the kernels cannot run on the device of this name."""
    reason = _native.no_cuda_device() if device == "cuda" else None
    if device != "cpu" and torch.cuda.is_available() and _native.cuda_built():
        reason = _native.cuda_problem()  # a card that the kernels were not built for
    if reason:
        raise ValueError(f"device: cuda is not available: {reason}; --device=cpu computes on the CPU")


def processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with this number of threads; the number before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
