"""Checks of the registered ops' arguments, before the compiled core gets addresses and lengths.

The fake implementations call the same functions without the checks of values.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._chain import ACTIVATIONS, check_layers

KERNEL_DTYPES = (torch.float32, torch.float64)
MOST_COEFFICIENTS = 64  # of block_coefficients; kMostCoefficients in csrc/ops.h
# The largest allowed difference from 1 of the sum of a rule's weights. Weights computed in float64 differ only by rounding.
# Weights that were rounded to float32 differ by 1e-8 and are refused.
WEIGHT_SUM_ERROR = 1e-9


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a tensor that is not a plain array of numbers: sparse, quantised, nested, mkldnn."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else str(tensor.layout)
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")


def check_tensor(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Raises TypeError for a tensor that is not dense, of another dtype, or on another device."""
    check_dense(name, tensor)
    if tensor.dtype not in dtypes or tensor.device != device:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: expected {expected} on {device}, got {tensor.dtype} on {tensor.device}")


def check_array(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises what `check_tensor` does, and ValueError for another shape; None fits."""
    if tensor is None:
        return
    check_tensor(name, tensor, (dtype,), device)
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {shape}, got shape {tuple(tensor.shape)}")


def check_indices(name: str, indices: Tensor, samples: int, *, fake: bool) -> None:
    """Raises ValueError for an index of no sample. Indices on a card are not looked at, because that would wait for it."""
    if fake or indices.device.type != "cpu" or indices.numel() == 0:
        return
    if not 0 <= int(indices.min()) <= int(indices.max()) < samples:
        raise ValueError(
            f"{name}: expected samples 0 to {samples - 1}, got {indices.min()} to {indices.max()}"
        )


def check_chain(
    name: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    *,
    fake: bool = False,
) -> list[int]:
    """Checks samples (`name` in messages), Linear layers and activations; returns the widths.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    check_dense(name, x)
    if x.dtype not in KERNEL_DTYPES or x.device.type not in ("cpu", "cuda", *["meta"] * fake):
        raise TypeError(
            f"{name}: expected float32 or float64 on the CPU or on CUDA, got {x.dtype} on {x.device}"
        )
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"{name}: expected samples (N, D) with N > 0, got shape {tuple(x.shape)}")
    for kind, tensors in (("weights", weights), ("biases", biases)):
        for n, tensor in enumerate(tensors):
            if tensor is not None:
                check_dense(f"{kind}[{n}]", tensor)
    widths = check_layers(x.shape[1], x.dtype, x.device, weights, biases)
    if len(activations) != len(widths):
        raise ValueError(
            f"activations: expected {len(widths)} for {len(weights)} weights, got {len(activations)}"
        )
    for n, code in enumerate(activations):
        if not 0 <= code < len(ACTIVATIONS):
            raise ValueError(
                f"activations[{n}]: expected a code from 0 to {len(ACTIVATIONS) - 1}, got {code}"
            )
    if len(parameters) != 2 * len(widths):
        raise ValueError(
            f"parameters: expected {2 * len(widths)}, two for each activation, got {len(parameters)}"
        )
    for n, parameter in enumerate(parameters):
        if not math.isfinite(parameter):
            raise ValueError(f"parameters[{n}]: expected a finite number, got {parameter}")
    return widths


def check_sums(
    z: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    skips: Sequence[int],
    shifts: Sequence[Tensor | None],
) -> None:
    """Checks skips and shifts. Both have two entries per activation: for the value before it and for the value after it.

    Args:
        z: (N, D), the samples.
        widths: of the layers.
        activations: codes.
        skips: the number of the earlier value that is added to each value, or -1.
        shifts: the tensor that is added to each value, or None.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    if not skips and not shifts:
        return
    if not len(skips) == len(shifts) == 2 * len(activations):
        raise ValueError(
            f"skips, shifts: expected {2 * len(activations)} of each, got {len(skips)} and {len(shifts)}"
        )
    for n, (source, shift) in enumerate(zip(skips, shifts)):
        width = widths[n // 2]
        if source != -1 and not (0 < source < n and widths[source // 2] == width):
            raise ValueError(f"skips[{n}]: expected an earlier value of width {width}, or -1, got {source}")
        if shift is not None:
            check_dense(f"shifts[{n}]", shift)
            if shift.device != z.device:
                raise TypeError(f"shifts[{n}]: expected {z.dtype} on {z.device}, got one on {shift.device}")
            if shift.shape != (z.shape[0], width) or shift.dtype != z.dtype:
                raise ValueError(
                    f"shifts[{n}]: expected ({z.shape[0]}, {width}) {z.dtype}, "
                    f"got {tuple(shift.shape)} {shift.dtype}"
                )
        if (source != -1 or shift is not None) and (n == 0 or (n % 2 and activations[n // 2] == 0)):
            raise ValueError(
                f"skips, shifts: expected nothing to add to value {n}, which no activation gives"
            )


def check_rule(nodes: Tensor, weights: Tensor, name: str = "weights", *, fake: bool = False) -> None:
    """Checks a quadrature rule on [0, 1] that includes both ends.

    Args:
        nodes: of the rule.
        weights: of the rule.
        name: of the weights, for messages.
        fake: whether to leave out the checks of values.

    Raises:
        TypeError, ValueError: the nodes and weights are not such a rule.
    """
    for kind, tensor in (("nodes", nodes), (name, weights)):
        on = tensor.device if fake and tensor.is_meta else torch.device("cpu")
        check_tensor(kind, tensor, (torch.float64,), on)
    if nodes.dim() != 1 or nodes.shape[0] < 3:
        raise ValueError(f"nodes: expected (nodes,), three or more, got shape {tuple(nodes.shape)}")
    if weights.shape != nodes.shape:
        raise ValueError(f"{name}: expected ({nodes.shape[0]},), got shape {tuple(weights.shape)}")
    if fake:
        return
    t, w = nodes.tolist(), weights.tolist()
    if t[0] != 0 or t[-1] != 1 or not all(before < after for before, after in itertools.pairwise(t)):
        raise ValueError(
            f"nodes: expected rising numbers from 0 to 1, got {t[0]} to {t[-1]}, or another order"
        )
    if not all(0 <= weight <= 1 for weight in w) or abs(math.fsum(w) - 1) > WEIGHT_SUM_ERROR:
        raise ValueError(
            f"{name}: expected numbers of at least 0 with sum 1, got sum {math.fsum(w)}, least {min(w)}"
        )
    if sum(weight > 0 for weight in w) < 2:
        raise ValueError(f"{name}: expected two or more above 0, or t has no variance; got one")
