"""``lmnfast::path_r2``: r2 along paths, from a network's outputs at the paths' nodes."""

import torch
from torch import Tensor

from .. import _native, reference
from .._native import plain
from .._settings import checked_stabiliser
from .._unresolved import LEAST_ROUNDING, RESOLVED_ULPS, UNRESOLVED
from ._checks import KERNEL_DTYPES, check_indices, check_rule, check_tensor


def path_r2(
    interior: Tensor,
    ends: Tensor,
    first: Tensor,
    second: Tensor,
    nodes: Tensor,
    weights: Tensor,
    *,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> Tensor:
    """:func:`lmnfast.reference.path_r2` in one pass over memory, without temporaries; float32 or float64.

    The statistics are those of the residual from the chord, ``y(t) - (y_i + t (y_j - y_i))``, so that an offset of y costs no
    digits. Pairs that the kernel leaves unresolved (docs/mathematics.md) are computed again in float64, from the same outputs.
    The call waits for CUDA to learn whether there are such pairs.

    ``torch.ops.lmnfast.path_r2`` leaves such pairs as UNRESOLVED. It returns r2; two counts, (2,) int64: the number of
    constant outputs over all resolved pairs, and the number of unresolved pairs; and r2 pooled over the outputs, (0,) if it was
    not asked for. Its argument `rounding`, (2, outputs) of
    interior's dtype, has two numbers per output. The first is f's own rounding of the output in machine epsilons. The second is
    the magnitude below which the rounding of the output is unknown; if it is negative, the rounding is known for an output of
    0. The op enqueues on the current stream and never waits. It can therefore not check indices of samples on CUDA: a pair with
    an index of no sample gets NaN.

    Args:
        interior: (pairs, nodes - 2, outputs), float32 or float64.
        ends: (samples, outputs), the same dtype.
        first, second: (pairs,) int64, samples at t = 0 and t = 1.
        nodes, weights: (nodes,) float64, on the CPU.
        stabiliser, pooled: as in :func:`lmnfast.connectivity`.

    Returns:
        (pairs,) of interior's dtype.

    Raises:
        TypeError: dtypes or devices differ, or are none of these.
        ValueError: shapes do not fit; on the CPU also an index of no sample.
        RuntimeError: the CUDA kernels do not run on that device.

    Example:
        >>> nodes, weights = lmnfast.quadrature.path_nodes("uniform", 3)
        >>> ends, i, j = torch.tensor([[0.0], [2.0]]), torch.tensor([0]), torch.tensor([1])
        >>> lmnfast.ops.path_r2(torch.tensor([[[1.0]]]), ends, i, j, nodes, weights)  # 0, 1, 2: a line
        tensor([1.])
    """
    arguments = interior, ends, first, second, nodes, weights
    r2, counts, pool = torch.ops.lmnfast.path_r2(*arguments, stabiliser=stabiliser, pooled=pooled)
    r2 = pool if pooled else r2
    if int(counts[1]):
        left = (r2 == UNRESOLVED).nonzero().flatten()
        y = _all_nodes(interior[left], ends, first[left], second[left]).double()
        rounding = torch.maximum(y[:, 0].abs(), y[:, -1].abs()) * torch.finfo(r2.dtype).eps
        rule = nodes.to(y.device), weights.to(y.device)
        if pooled:
            again = reference.pooled_r2_of_outputs(y, *rule, rounding, stabiliser=stabiliser)
        else:
            again = reference.r2_of_outputs(y, *rule, rounding, stabiliser=stabiliser)[0].mean(1)
        r2[left] = again.to(r2.dtype)
    return r2


def _all_nodes(interior: Tensor, ends: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([ends[first][:, None], interior, ends[second][:, None]], 1)


torch.library.define(
    "lmnfast::path_r2",
    "(Tensor interior, Tensor ends, Tensor first, Tensor second, Tensor nodes, Tensor weights, "
    "Tensor? rounding=None, float stabiliser=0.0, bool pooled=False) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("lmnfast::path_r2", "default")
def _path_r2(
    interior: Tensor,
    ends: Tensor,
    first: Tensor,
    second: Tensor,
    nodes: Tensor,
    weights: Tensor,
    rounding: Tensor | None = None,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(interior, ends, first, second, nodes, weights, rounding, stabiliser)
    if _native.by_reference(interior):
        rule = nodes.to(ends.device), weights.to(ends.device)
        with torch.no_grad():
            return _plain(interior, ends, first, second, *rule, rounding, stabiliser, pooled)
    interior, ends, first, second = map(plain, (interior, ends, first, second))
    rounding = None if rounding is None else plain(rounding)
    result, counts = interior.new_empty(len(interior)), interior.new_empty(2, dtype=torch.int64)
    call = _native._C.PathR2(
        interior.dtype == torch.float64,
        *map(_native.address, (interior, ends, first, second)),
        *_native.rule_arguments(nodes, weights),
        len(interior),
        *ends.shape,
        _native.address(rounding),
        stabiliser,
    )
    pool = interior.new_empty(len(interior) if pooled else 0)
    return _native.run(call, result, pool if pooled else None, counts), counts, pool


@torch.library.register_fake("lmnfast::path_r2")
def _(
    interior: Tensor,
    ends: Tensor,
    first: Tensor,
    second: Tensor,
    nodes: Tensor,
    weights: Tensor,
    rounding: Tensor | None = None,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(interior, ends, first, second, nodes, weights, rounding, stabiliser, fake=True)
    pairs = interior.shape[0]
    counts = interior.new_empty(2, dtype=torch.int64)
    return interior.new_empty(pairs), counts, interior.new_empty(pairs if pooled else 0)


def _plain(
    interior: Tensor,
    ends: Tensor,
    first: Tensor,
    second: Tensor,
    nodes: Tensor,
    weights: Tensor,
    own: Tensor | None,
    stabiliser: float,
    pooled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op by its reference. own: the op's argument `rounding`."""
    y = _all_nodes(interior, ends, first, second)
    r2, constant = reference.r2_of_outputs(y, nodes, weights, stabiliser=stabiliser)
    magnitude = torch.maximum(y[:, 0].abs(), y[:, -1].abs())
    computed_from = ends.abs().amax(0) * LEAST_ROUNDING
    if own is not None:
        constant &= (magnitude >= own[1].abs()) | ((magnitude == 0) & (own[1] < 0))
        computed_from = computed_from + own[0]
    ulps = RESOLVED_ULPS[y.dtype] / reference.CONSTANT_ULPS
    rounding = torch.finfo(y.dtype).eps * ulps * torch.hypot(magnitude, computed_from)
    unresolved = (reference.r2_of_outputs(y, nodes, weights, rounding)[1] & ~constant).any(1)
    counts = torch.stack([(constant & ~unresolved[:, None]).sum(), unresolved.sum()])
    pool = r2.new_empty(0)
    if pooled:
        pool = reference.pooled_r2_of_outputs(y, nodes, weights, stabiliser=stabiliser)
        pool = torch.where(unresolved, UNRESOLVED, pool)
    return torch.where(unresolved, UNRESOLVED, r2.mean(1)), counts, pool


def _check(
    interior: Tensor,
    ends: Tensor,
    first: Tensor,
    second: Tensor,
    nodes: Tensor,
    weights: Tensor,
    rounding: Tensor | None,
    stabiliser: float,
    fake: bool = False,
) -> None:
    checked_stabiliser(stabiliser)
    on = interior.device
    check_tensor("interior", interior, KERNEL_DTYPES, on)
    check_tensor("ends", ends, (interior.dtype,), on)
    check_tensor("first", first, (torch.int64,), on)
    check_tensor("second", second, (torch.int64,), on)
    check_rule(nodes, weights, fake=fake)
    if interior.dim() != 3 or interior.shape[1] != nodes.shape[0] - 2 or interior.shape[2] == 0:
        raise ValueError(
            f"interior: expected (pairs, {nodes.shape[0] - 2}, outputs), got shape {tuple(interior.shape)}"
        )
    if ends.dim() != 2 or ends.shape[1] != interior.shape[2]:
        raise ValueError(f"ends: expected (samples, {interior.shape[2]}), got shape {tuple(ends.shape)}")
    if rounding is not None:
        check_tensor("rounding", rounding, (interior.dtype,), on)
        if rounding.shape != (2, ends.shape[1]):
            raise ValueError(f"rounding: expected (2, {ends.shape[1]}), got shape {tuple(rounding.shape)}")
    for name, tensor in (("first", first), ("second", second)):
        if tensor.shape != interior.shape[:1]:
            raise ValueError(f"{name}: expected ({interior.shape[0]},), got shape {tuple(tensor.shape)}")
        check_indices(name, tensor, ends.shape[0], fake=fake)
