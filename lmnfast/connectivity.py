"""The linear connectivity matrix of a network on a set of samples."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import ops
from .network import Chain, evaluating, recognise
from .quadrature import path_nodes

METHODS = ("path",)
DEFAULT_BUDGET = 256 * 2**20
# A larger tile gains nothing on a CPU, and loses where single results pass 32 MB: the C library then maps fresh pages
# for every one of them. Measured on a residual network: 0.27 s with 64 MB, 0.75 s with 256 MB.
CPU_TILE = 64 * 2**20


def connectivity(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Linear connectivity matrix: how straight is f's output along the line between every two samples.

    ``L[i, j] = mean_k cov(y_k, t)^2 / (var(t) var(y_k))`` over the nodes t of the path ``x_i + t (x_j - x_i)``.
    An output that is constant to rounding counts 1. Chains of Linear and pointwise activations run in one fused
    kernel; any other f is called on tiles of path points. An ``nn.Module`` is measured in eval mode and left as
    it was. The result carries no graph, whatever requires grad.

    Args:
        f: maps a batch (B, *in) to (B, *out), one row independent of the others; outputs are flattened.
        x: (N, *in), floating point, the samples.
        method: "path".
        points: nodes on a path, ends included.
        rule: "uniform" (the definition, with 21 points) or "lobatto" (approximates the 21-point sums with fewer).
        budget: bytes a tile of path points and f's intermediate results may take together.

    Returns:
        (N, N), symmetric, ones on the diagonal; float64 for float64 samples, else float32.

    Raises:
        TypeError: x is not a floating-point tensor, f does not return one, or their dtypes do not fit.
        ValueError: no samples, unknown method or rule, points or budget out of range, x and f on different
            devices, or a NaN or Inf in samples or outputs (names the first sample).
        Source: arXiv 2310.05918, Eq. 1-2.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    nodes, weights = path_nodes(rule, points)
    if budget <= 0:
        raise ValueError(f"budget: expected a positive number of bytes, got {budget}")
    _check_samples(f, x)
    x = x.detach()
    with evaluating(f):
        with _AllocationCount() as allocated:
            ends = _outputs(f, x.clone())  # f may work in place
        _check_finite("f(x)", ends)
        chain = recognise(f) if x.device.type == "cpu" else None  # the kernel runs on the CPU alone
        if chain is not None and _reproduces(chain, x, ends):
            L = ops.path_connectivity(chain, x, nodes, weights)
        else:
            tile = min(budget, CPU_TILE) if x.device.type == "cpu" else budget
            L = _generic(f, x, ends, nodes, weights, tile * len(x) // allocated.bytes)
    if not L.isfinite().all():
        first, second = (~L.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"f: NaN or Inf in an output on the path from sample {first} to sample {second}")
    return L


def _generic(
    f: Callable[[Tensor], Tensor], x: Tensor, ends: Tensor, nodes: Tensor, weights: Tensor, rows: int
) -> Tensor:
    """Calls f on tiles of about ``rows`` points of paths; the paths' ends are f's outputs on the samples."""
    ends = _widened(ends)
    L = torch.ones(len(x), len(x), dtype=ends.dtype, device=x.device)
    t = nodes[1:-1].to(x).reshape(-1, *[1] * (x.dim() - 1))
    if len(t) == 0:
        return L
    for first, second in _pairs(len(x), max(1, rows // len(t)), x.device):
        points = torch.lerp(x[first, None], x[second, None], t).flatten(0, 1)
        y = _widened(_outputs(f, points)).reshape(len(first), len(t), -1)
        r2 = ops.path_r2(y, ends, first, second, nodes, weights)
        coincident = (x[first] == x[second]).flatten(1).all(1)
        L[first, second] = L[second, first] = torch.where(coincident, 1.0, r2)
    return L


def _pairs(samples: int, tile: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs i < j, row by row, in tiles; never all their indices at once."""
    row_starts = torch.arange(samples, device=device).neg().add(samples - 1).cumsum(0)
    for start in range(0, samples * (samples - 1) // 2, tile):
        pair = torch.arange(start, min(start + tile, samples * (samples - 1) // 2), device=device)
        first = torch.searchsorted(row_starts, pair, right=True)
        yield first, pair - row_starts[first] + samples


class _AllocationCount(TorchFunctionMode):
    """Counts the bytes of all results of torch calls: what f holds at a time is hardly ever more."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.bytes += value.numel() * value.element_size()
        return result


def _outputs(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = f(x)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError(f"f: expected a floating-point tensor, got {getattr(y, 'dtype', type(y).__name__)}")
    if y.dim() == 0 or len(y) != len(x) or y.numel() == 0:
        raise ValueError(
            f"f: expected outputs ({len(x)}, *out) for {len(x)} samples, got shape {tuple(y.shape)}"
        )
    return y.reshape(len(x), -1)


def _reproduces(chain: Chain, x: Tensor, ends: Tensor) -> bool:
    """Whether the recognised chain is f on the samples: a wrong number is worse than a slow one."""
    if x.dim() != 2 and not chain.flattens:
        return False
    y = chain(x)
    return y.shape == ends.shape and bool(
        ((y - ends).abs().amax(0) <= 1e-3 * ends.abs().amax(0) + 1e-30).all()
    )


def _widened(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()


def _check_samples(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor of samples, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x: expected floating-point samples, got {x.dtype}; integers (tokens) cannot be interpolated: "
            "cut the network at a layer with lmnfast.cut"
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected samples (N, *in) with N > 0, got shape {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError("x: on meta, where tensors have no values; expected samples on a real device")
    for name, p in f.named_parameters() if isinstance(f, nn.Module) else ():
        if p.device != x.device:
            raise ValueError(
                f"x: on {x.device}, but f's parameter {name!r} is on {p.device}; move one of them"
            )
        if p.is_floating_point() and p.dtype != x.dtype:
            raise TypeError(f"x: is {x.dtype}, but f's parameter {name!r} is {p.dtype}; convert one of them")
    _check_finite("x", x)


def _check_finite(name: str, values: Tensor) -> None:
    finite = values.isfinite().flatten(1).all(1)
    if not finite.all():
        sample = int((~finite).nonzero()[0])
        raise ValueError(f"{name}: NaN or Inf in sample {sample}, the first of {int((~finite).sum())}")
