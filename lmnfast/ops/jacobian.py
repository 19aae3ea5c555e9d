"""``lmnfast::jacobian``: Jacobians of a chain of Linear and pointwise activations, fused."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .._chain import ACTIVATIONS, Activation, Chain
from .._native import plain
from ._checks import check_chain
from ._hoisted import activation_arguments, slopes_behind


def jacobian(chain: Chain, x: Tensor) -> Tensor:
    """``reference.jacobian(chain, x)``, fused; on the CPU, or on CUDA in a build with CUDA.

    ``diag(a_L') W_L ... diag(a_1') W_1 diag(a_0')`` at each sample. The product is computed from the side with fewer rows or
    columns, and the result is written once. The arguments of the slopes a' are summed in float64. The slopes and the products
    have the samples' dtype; half types are widened to float32. At kinks the slopes are PyTorch's: ReLU'(0) = 0.
    On CUDA the op is enqueued on the current stream. It never synchronises, and takes all memory from torch.

    Args:
        chain: weights on the samples' device, of their dtype.
        x: (N, D), or (N, *in) where the chain flattens.

    Returns:
        (N, K, D), float64 for float64 samples, else float32.

    Raises:
        TypeError: a dtype or device that is neither the samples' nor one of these.
        ValueError: shapes that do not fit; a chain with skips, which the kernels do not differentiate.
        RuntimeError: the CUDA kernels do not run on that device.

    Example:
        >>> chain = lmnfast.ops.recognise(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)))
        >>> lmnfast.ops.jacobian(chain, torch.randn(50, 8)).shape
        torch.Size([50, 3, 8])
    """
    return torch.ops.lmnfast.jacobian(*_arguments(chain, x))


def at_once(chain: Chain, x: Tensor, with_outputs: bool = False) -> tuple[Tensor, Tensor | None]:
    """:func:`jacobian` of samples that the chain takes, on the CPU or on CUDA, and with_outputs, on CUDA alone, what the chain
    gives, (N, K) of the same dtype, each sum in float64. Torch's dispatcher, and another look at every layer, take longer than
    the kernel. A chain has checked its layers itself, so what is left is whether the samples are its own.

    Raises ValueError for samples of another width or on another device, and as `jacobian` for a chain with skips."""
    width, on = chain.weights[0].shape[1], chain.weights[0].device
    if x.dim() < 2 or x.shape[1:].numel() != width or x.device != on or not (x.is_cuda or on.type == "cpu"):
        raise ValueError(
            f"x: expected samples of {width} elements on {on}, got shape {tuple(x.shape)} on {x.device}"
        )
    arguments = _arguments(chain, x)
    if not _native.HAS_CORE:
        return _plain(*arguments, with_outputs)
    call, J, y, kept = _native_call(*arguments, with_outputs)
    _native.run(call, J, y)
    del kept
    return J, y


def _arguments(
    chain: Chain, x: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor | None], list[int], list[float]]:
    if chain.skips:
        raise ValueError(f"chain: expected one without skips, got skips {chain.skips}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.flatten(1).to(dtype),
        [w.to(dtype) for w in chain.weights],
        [None if b is None else b.to(dtype) for b in chain.biases],
        *activation_arguments(chain.activations),
    )


torch.library.define(
    "lmnfast::jacobian",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, int[] activations, float[] parameters) -> Tensor",
)


@torch.library.impl("lmnfast::jacobian", "default")
def _jacobian(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
) -> Tensor:
    _check(x, weights, biases, activations, parameters)
    if not _native.HAS_CORE:
        return _plain(x, weights, biases, activations, parameters, False)[0]
    call, J, _, kept = _native_call(x, weights, biases, activations, parameters)
    _native.run(call, J, None)
    del kept
    return J


def _native_call(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    with_outputs: bool = False,
) -> tuple[Any, Tensor, Tensor | None, list[Any]]:
    """The object of the compiled core for checked arguments, its empty results, and the tensors that must exist until it has
    run."""
    x, weights = plain(x), [plain(w) for w in weights]
    biases = [None if b is None else plain(b) for b in biases]
    widths = [x.shape[1], *(w.shape[0] for w in weights)]
    call = _native._C.Jacobian(
        x.dtype == torch.float64,
        _native.address(x),
        [_native.address(w) for w in weights],
        [_native.address(b) for b in biases],
        widths,
        activations,
        parameters,
        x.shape[0],
    )
    outputs = x.new_empty(x.shape[0], widths[-1]) if with_outputs else None
    return call, _native.empty(x, x.shape[0], widths[-1], widths[0]), outputs, [x, weights, biases]


# Numbers of the derivatives of a layer's values that `_plain` holds at a time.
PLAIN_VALUES = 2**20


def _plain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    with_outputs: bool,
) -> tuple[Tensor, Tensor | None]:
    """The op in torch and float64, for some samples at a time: ``diag(a_L') W_L ... diag(a_0')`` from the narrower side.

    The reference, torch.func.jacrev under vmap, copies each weight for every sample and output.
    """
    wide = [w.detach().double() for w in weights]
    shifts = [None if b is None else b.detach().double() for b in biases]
    steps = [
        Activation(ACTIVATIONS[code], *parameters[2 * n : 2 * n + 2]) for n, code in enumerate(activations)
    ]
    outputs, inputs = len(wide[-1]), x.shape[1]
    most = max(1, PLAIN_VALUES // (min(outputs, inputs) * max(inputs, *map(len, wide))))
    J, y = x.new_empty(len(x), outputs, inputs), x.new_empty(len(x), outputs)
    with torch.no_grad():
        for rows in torch.arange(len(x), device=x.device).split(most):
            a, slopes = x[rows].double(), []
            for n, activation in enumerate(steps):
                z = F.linear(a, wide[n - 1], shifts[n - 1]) if n else a
                a = activation(z)
                slopes.append(slopes_behind(activation, torch.ones_like(z), z, a))
            y[rows] = a.to(y.dtype)
            if outputs <= inputs:
                product = slopes[-1].diag_embed()
                for slope, weight in zip(slopes[-2::-1], wide[::-1]):
                    product = product @ weight * slope[:, None]
            else:
                product = slopes[0].diag_embed()
                for slope, weight in zip(slopes[1:], wide):
                    product = weight @ product * slope[:, :, None]
            J[rows] = product.to(J.dtype)
    return J, y if with_outputs else None


@torch.library.register_fake("lmnfast::jacobian")
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
) -> Tensor:
    _check(x, weights, biases, activations, parameters, fake=True)
    return x.new_empty(x.shape[0], weights[-1].shape[0], x.shape[1])


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    fake: bool = False,
) -> list[int]:
    """Raises what does not fit; returns the widths."""
    if not weights:
        raise ValueError("weights: expected one or more, got none")
    return check_chain("x", x, weights, biases, activations, parameters, fake=fake)
