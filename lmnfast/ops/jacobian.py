"""``lmnfast::jacobian``: Jacobians of a chain of Linear and pointwise activations, fused."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from ..network import ACTIVATIONS, Chain


def jacobian(chain: Chain, x: Tensor) -> Tensor:
    """``reference.jacobian(chain, x)``, fused; on the CPU, or on CUDA in a build with it.

    ``diag(a_L') W_L ... diag(a_1') W_1 diag(a_0')`` at each sample, multiplied from the side with fewer rows or columns
    and written once. What the slopes a' are taken at is summed in float64; the slopes themselves and the products are
    in the samples' dtype, half types widened to float32. At kinks the slopes are PyTorch's: ReLU'(0) = 0.
    On CUDA enqueued on the current stream: no synchronisation, memory from torch alone.

    Args:
        chain: weights on the samples' device, of their dtype.
        x: (N, D), or (N, *in) where the chain flattens.

    Returns:
        (N, K, D), float64 for float64 samples, else float32.

    Raises:
        TypeError: a dtype or device that is neither the samples' nor one of these.
        ValueError: shapes that do not fit.
        RuntimeError: the CUDA kernels do not run on that device.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.ops.lmnfast.jacobian(
        x.flatten(1).to(dtype),
        [w.to(dtype) for w in chain.weights],
        [None if b is None else b.to(dtype) for b in chain.biases],
        [ACTIVATIONS.index(a.name) for a in chain.activations],
        [parameter for a in chain.activations for parameter in (a.alpha, a.beta)],
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
    _check(x, weights, biases)
    x, weights = x.contiguous(), [w.contiguous() for w in weights]
    biases = [None if b is None else b.contiguous() for b in biases]
    call = _native._C.Jacobian(
        x.dtype == torch.float64,
        _native.address(x),
        [_native.address(w) for w in weights],
        [_native.address(b) for b in biases],
        [x.shape[1], *(len(w) for w in weights)],
        list(activations),
        list(parameters),
        len(x),
    )
    result = x.new_empty(len(x), len(weights[-1]), x.shape[1])
    if x.is_cuda:
        with _native.cuda_stream(x.device) as stream:
            workspace = x.new_empty(call.workspace_cuda(), dtype=torch.uint8)
            call.run_cuda(_native.address(result), _native.address(workspace), stream)
    else:
        threads = torch.get_num_threads()
        workspace = torch.empty(call.workspace(threads), dtype=torch.uint8)
        call.run(_native.address(result), _native.address(workspace), threads)
    return result


@torch.library.register_fake("lmnfast::jacobian")
def _(x, weights, biases, activations, parameters):
    return x.new_empty(x.shape[0], weights[-1].shape[0], x.shape[1])


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.device.type not in ("cpu", "cuda"):
        raise TypeError(f"x: expected float32 or float64 on the CPU or on CUDA, got {x.dtype} on {x.device}")
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"x: expected samples (N, D) with N > 0, got shape {tuple(x.shape)}")
    if not weights:
        raise ValueError("weights: expected one or more, got none")
    width = x.shape[1]
    for n, (w, b) in enumerate(zip(weights, biases, strict=True)):
        for name, tensor in (("weights", w), ("biases", b)):
            if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
                raise TypeError(
                    f"{name}[{n}]: expected {x.dtype} on {x.device}, got {tensor.dtype} on {tensor.device}"
                )
        if w.dim() != 2 or w.shape[1] != width or w.numel() == 0:
            raise ValueError(f"weights[{n}]: expected (out, {width}), got shape {tuple(w.shape)}")
        width = len(w)
        if b is not None and b.shape != (width,):
            raise ValueError(f"biases[{n}]: expected ({width},), got shape {tuple(b.shape)}")
