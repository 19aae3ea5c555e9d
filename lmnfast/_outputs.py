"""Calls the user's network on samples, checks its outputs, and chooses the samples for repeated calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._chain import IDENTITY, Chain
from .ops._checks import KERNEL_DTYPES

# Set on a tail that `cut` has compiled.
COMPILED = "_lmnfast_compiled"


def original_of(f: Any) -> Any:
    """What torch.compile has compiled; any other function itself."""
    return getattr(f, "_orig_mod", getattr(f, "_torchdynamo_orig_callable", f))


class Calls:
    """The function f as it is measured: every call behaves like the first call, on any number of samples.

    begin_anew: puts back the state that f keeps between calls; `put_back` of `_undisturbed.evaluating`.
    shape: the shape of f's outputs on all samples, once it is known.
    """

    def __init__(
        self, f: Callable[[Tensor], Tensor], begin_anew: Callable[[], None], shape: torch.Size | None = None
    ) -> None:
        self.f, self.begin_anew, self.shape = f, begin_anew, shape

    def __call__(self, x: Tensor) -> Tensor:
        self.begin_anew()
        if self.shape is None or len(x) == self.shape[0] or torch.is_grad_enabled():
            return self.f(x)  # with gradients on, the caller explains errors
        try:
            return self.f(x)
        except Exception as error:
            if out_of_memory(error):
                raise
            first = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"f: fails on another number of samples, {len(x)} for {self.shape[0]}: {type(error).__name__}: {first}; "
                "expected a function of a batch of any size (a hidden state or a mask may have that of one batch)"
            ) from error


def first_outputs(f: Calls, x: Tensor, chain: Chain | None) -> Tensor:
    """`outputs_of` f on all samples. f may work in place, and may return a buffer that its next call overwrites.

    chain: the chain that f is, if f is a sequence of torch's own modules, otherwise None. Without an activation on the input
    such a chain overwrites nothing but its own results, and needs no copies.
    """
    if chain is not None and chain.activations[0] == IDENTITY:
        return outputs_of(f, x)
    return outputs_of(f, x.clone()).clone()


def gives_outputs(chain: Chain, x: Tensor) -> bool:
    """Whether a chain's kernels give f's outputs on these samples, to rounding, if f is a sequence of torch's own modules.

    f then need not be called; on CUDA a call takes as long as the kernels. If not, f computes in another precision, or raises
    an error that the user should see.
    """
    return (
        x.dtype == chain.weights[0].dtype in KERNEL_DTYPES
        and x.numel() == x.shape[0] * chain.weights[0].shape[1]
        and not torch.is_autocast_enabled(x.device.type)
    )


def outputs_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f's outputs (B, K) on a batch. Raises TypeError or ValueError if they are not usable."""
    y = f(x)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError(f"f: expected a floating-point tensor, got {getattr(y, 'dtype', type(y).__name__)}")
    known = f.shape if isinstance(f, Calls) else None
    if y.dim() == 0 or len(y) != len(x) or y.numel() == 0 or (known is not None and y.shape[1:] != known[1:]):
        expected: tuple[Any, ...] = ("*out",) if known is None else known[1:]
        hint = ""
        if known is not None:
            hint = f", though it gives {tuple(known)} for {known[0]}; does the shape follow the number of samples?"
        shape = ", ".join(map(str, (len(x), *expected)))
        raise ValueError(
            f"f: expected outputs ({shape}) for {len(x)} samples, got shape {tuple(y.shape)}{hint}; samples are rows along "
            "the first dimension (batch_first=True); lmnfast.cut takes those along another by batch_dim="
        )
    if isinstance(f, Calls) and known is None:
        f.shape = y.shape
    return y.reshape(len(x), -1)


def rows_again(samples: int) -> tuple[list[int], list[int]]:
    """Samples on which f is called again: the last quarter and the first quarter, each in reversed order.

    The outputs change if rows depend on the rows before or after them, or on all rows. They also change if rows depend on one
    extreme sample, as at least one quarter lacks it. Both calls have the same shape, so a state that the first call leaves
    shows in the second.
    """
    quarter = max(1 if samples < 4 else 2, samples // 4)
    return list(range(samples - 1, samples - 1 - quarter, -1)), list(range(quarter - 1, -1, -1))


def rows_between(samples: int) -> list[int]:
    """Samples that are added to the points of every batch: the first, the middle and the last, in reversed order."""
    return sorted({0, samples // 2, samples - 1}, reverse=True)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies the values to the device without waiting for a GPU. A copy from memory that is not page-locked would wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def widened(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()


def out_of_memory(error: Exception) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
