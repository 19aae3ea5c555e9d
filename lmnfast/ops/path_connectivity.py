"""``lmnfast::path_connectivity``: linear connectivity of a chain of Linear and pointwise activations, fused."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from ..network import ACTIVATIONS, Activation, Chain


def path_connectivity(chain: Chain, x: Tensor, nodes: Tensor, weights: Tensor) -> Tensor:
    """``reference.path_connectivity(chain, x, nodes, weights)``, fused; on the CPU, or on CUDA in a build with it.

    A first Linear commutes with the path and is applied to the samples alone, in float64. float32 in, statistics and result:
    float32, sums over outputs compensated or in float64; float64: float64; half types are widened to float32 first.
    On CUDA float32 products follow ``torch.get_float32_matmul_precision()``: "highest" as exact as float32 (two TF32
    parts), else the residual from the chord is rounded to TF32, which costs 1 - r2 a relative 1e-3 at most.
    On CUDA enqueued on the current stream: no synchronisation, memory from torch alone.

    Args:
        chain: weights on the samples' device, of their dtype.
        x: (N, D), or (N, *in) where the chain flattens.
        nodes, weights: (nodes,) float64, as :func:`lmnfast.quadrature.path_nodes` returns them.

    Returns:
        (N, N). Raises as ``torch.ops.lmnfast.path_connectivity``: TypeError for a dtype, ValueError for a shape,
        RuntimeError where the CUDA kernels cannot run on the device.
    """
    return torch.ops.lmnfast.path_connectivity(*chain_arguments(chain, x), nodes, weights)


def chain_arguments(chain: Chain, x: Tensor) -> tuple:
    """A chain and its samples as the registered ops take them: z, weights, biases, activations, parameters, skips,
    shifts."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    z, linears, activations = x.flatten(1), list(zip(chain.weights, chain.biases)), list(chain.activations)
    skips = dict(chain.skips)
    affine = {0: z}  # values of the chain that are affine in the samples
    # Where a residual block follows a first Linear, its own first one is next to commute with the path.
    while linears and activations[0].name == "identity" and (len(affine) == 1 or skips):
        weight, bias = linears.pop(0)
        activations.pop(0)
        z = F.linear(z.double(), weight.double(), None if bias is None else bias.double())
        value = 2 * len(affine)
        z = z + affine[skips[value]] if value in skips else z
        affine[value] = z
    first = max(affine)  # becomes value 0, with what was added to it
    sources = [None, *map(skips.get, range(first + 1, first + 2 * len(activations)))] if skips else []
    return (
        z.to(dtype),
        [w.to(dtype) for w, _ in linears],
        [None if b is None else b.to(dtype) for _, b in linears],
        *activation_arguments(activations),
        [-1 if source is None or source in affine else source - first for source in sources],
        [affine[source].to(dtype) if source in affine else None for source in sources],
    )


def activation_arguments(activations: Sequence[Activation]) -> tuple[list[int], list[float]]:
    """Activations as the registered ops take them: codes, and two parameters for each."""
    codes = [ACTIVATIONS.index(a.name) for a in activations]
    return codes, [parameter for a in activations for parameter in (a.alpha, a.beta)]


torch.library.define(
    "lmnfast::path_connectivity",
    "(Tensor z, Tensor[] weights, Tensor?[] biases, int[] activations, float[] parameters, int[] skips, "
    "Tensor?[] shifts, Tensor nodes, Tensor node_weights) -> Tensor",
)


@torch.library.impl("lmnfast::path_connectivity", "default")
def _path_connectivity(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    skips: Sequence[int],
    shifts: Sequence[Tensor | None],
    nodes: Tensor,
    node_weights: Tensor,
) -> Tensor:
    return run(z, weights, biases, activations, parameters, skips, shifts, nodes, node_weights, None)


@torch.library.register_fake("lmnfast::path_connectivity")
def _(z, weights, biases, activations, parameters, skips, shifts, nodes, node_weights):
    return z.new_empty(z.shape[0], z.shape[0])


def run(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    skips: Sequence[int],
    shifts: Sequence[Tensor | None],
    nodes: Tensor,
    node_weights: Tensor,
    midpoint: bool | None,
) -> Tensor:
    """path_connectivity, or with a midpoint that is not None hermite_connectivity."""
    widths = check_chain("z", z, weights, biases)
    check_sums(z, widths, activations, skips, shifts)
    shifts = [None if s is None else s.contiguous() for s in shifts]
    z, weights = z.contiguous(), [w.contiguous() for w in weights]
    biases = [None if b is None else b.contiguous() for b in biases]
    call = _native._C.Connectivity(
        z.dtype == torch.float64,
        _native.address(z),
        [_native.address(w) for w in weights],
        [_native.address(b) for b in biases],
        widths,
        list(activations),
        list(parameters),
        list(skips),
        [_native.address(s) for s in shifts],
        *_native.path_nodes(nodes, node_weights),
        len(z),
        torch.get_float32_matmul_precision() != "highest",
        midpoint,
    )
    return _native.run(call, _native.empty(z, len(z), len(z)))


def check_chain(
    name: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[int]:
    """Raises what does not fit in samples (`name`) and Linear layers; returns the widths."""
    if x.dtype not in (torch.float32, torch.float64) or x.device.type not in ("cpu", "cuda"):
        raise TypeError(
            f"{name}: expected float32 or float64 on the CPU or on CUDA, got {x.dtype} on {x.device}"
        )
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"{name}: expected samples (N, D) with N > 0, got shape {tuple(x.shape)}")
    widths = [x.shape[1]]
    for n, (w, b) in enumerate(zip(weights, biases, strict=True)):
        for kind, tensor in (("weights", w), ("biases", b)):
            if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
                raise TypeError(
                    f"{kind}[{n}]: expected {x.dtype} on {x.device}, got {tensor.dtype} on {tensor.device}"
                )
        if w.dim() != 2 or w.shape[1] != widths[n] or w.numel() == 0:
            raise ValueError(f"weights[{n}]: expected (out, {widths[n]}), got shape {tuple(w.shape)}")
        widths.append(len(w))
        if b is not None and b.shape != (len(w),):
            raise ValueError(f"biases[{n}]: expected ({len(w)},), got shape {tuple(b.shape)}")
    return widths


def check_sums(
    z: Tensor,
    widths: list[int],
    activations: Sequence[int],
    skips: Sequence[int],
    shifts: Sequence[Tensor | None],
) -> None:
    """Raises what does not fit in skips, the earlier value added to each, -1 for none, and shifts, the tensor added to
    each; two values per activation, before it and after it."""
    if not skips and not shifts:
        return
    if not _native.knows_sums(z):
        raise RuntimeError("skips, shifts: no CUDA kernel for a chain with sums; expected none")
    if not len(skips) == len(shifts) == 2 * len(activations):
        raise ValueError(
            f"skips, shifts: expected {2 * len(activations)} of each, got {len(skips)} and {len(shifts)}"
        )
    for n, (source, shift) in enumerate(zip(skips, shifts)):
        width = widths[n // 2]
        if source != -1 and not (0 < source < n and widths[source // 2] == width):
            raise ValueError(f"skips[{n}]: expected an earlier value of width {width}, or -1, got {source}")
        if shift is not None and (shift.shape != (len(z), width) or shift.dtype != z.dtype):
            raise ValueError(
                f"shifts[{n}]: expected ({len(z)}, {width}) {z.dtype}, got {tuple(shift.shape)} {shift.dtype}"
            )
        if (source != -1 or shift is not None) and (n == 0 or (n % 2 and activations[n // 2] == 0)):
            raise ValueError(
                f"skips, shifts: expected nothing to add to value {n}, which no activation gives"
            )
