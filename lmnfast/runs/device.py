"""The device and the number of threads that a command computes with."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import _native
from .._choices import DEVICES


def check_device(device: str) -> None:
    """Raises ValueError if the name is not one of DEVICES."""
    if device not in DEVICES:
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")


def settled_device(device: str, stored: str | None = None) -> str:
    """The device for a name of DEVICES on this machine: "cpu" or "cuda".

    Args:
        device: "auto" stands for `stored`. If `stored` is None, it stands for "cuda" if there is a CUDA device, else for "cpu".
        stored: the device on which the work was begun; None for new work.

    Raises:
        ValueError: an unknown name; "cuda" without a CUDA device.
    """
    check_device(device)
    cuda = torch.cuda.is_available()
    if device == "auto":
        device = stored or ("cuda" if cuda else "cpu")
    if device == "cuda" and not cuda:
        raise ValueError("device: cuda is not available")
    return device


def refuse_unusable(device: str) -> None:
    """Raises ValueError, with the reason, if the kernels cannot run on the device with this name."""
    reason = _native.no_cuda_device() if device == "cuda" else None
    if device != "cpu" and torch.cuda.is_available() and _native.cuda_built():
        reason = _native.cuda_problem()  # for example, the kernels were not built for this card
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
    """Sets torch's number of threads, and restores the earlier number at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
