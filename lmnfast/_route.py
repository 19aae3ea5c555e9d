"""Which route a measurement of a function takes: the only place that decides it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from . import _native
from ._affine import affine_start
from ._block import Block, wide_block
from ._chain import Chain
from ._recognise import NotAChain, chain_or_reason
from ._recognise_block import block_or_reason
from .ops._checks import KERNEL_DTYPES, MOST_COEFFICIENTS

# Methods that use Jacobians. The kernels do not differentiate residual sums. A Jacobian depends on the coordinates of the
# samples, so no affine map may be taken out of the function.
DIFFERENTIATING = ("jacobian", "jacobians")
# The number of linear regions is counted on the whole chain, in plain torch.
REGIONS = "linear regions"
OTHER_OUTPUTS = "the chain of Linear and activations that they look like has other outputs"

OTHER_BLOCK = "the transformer's block that they look like has other outputs"


@dataclass(frozen=True, eq=False)
class Route:
    """How a function is measured, and why.

    "fused": the function is a chain, and a kernel takes all of it. "block": the function is a block of a transformer. A kernel
    takes its hidden layer, and its last Linear is applied to as few coefficients as are needed. "hoisted": the function begins
    with affine maps, which commute with a path. They are applied to the samples alone, and the rest of the function is called
    on tiles of path points. "generic": the whole function is called on tiles of path points, or of samples.
    """

    kind: Literal["fused", "block", "hoisted", "generic"]
    reason: str = ""
    """Why the route is not "fused", in words that can follow "as"."""
    chain: Chain | None = None
    """For "fused": the chain that the kernel measures."""
    parts: tuple[fx.GraphModule, fx.GraphModule] | None = None
    """For "hoisted": the affine maps, and the rest of the function."""
    block: Block | None = None
    """For "block"."""


def find_route(
    f: Callable[[Tensor], Tensor],
    x: Tensor | None,
    method: str,
    *,
    fuse: bool = True,
    known: Chain | None = None,
    put_back: Callable[[], None] | None = None,
    points: int = 3,
) -> Route:
    """The route for f on samples x, found without a call of f.

    Args:
        f: the function to measure.
        x: (N, *in), the samples. None: unknown; the route is then the one for vectors on a device with kernels.
        method: as in :func:`lmnfast.connectivity`, "jacobians" or REGIONS.
        fuse: False takes "generic".
        known: the chain that f is, if the caller knows it.
        put_back: as in `chain_or_reason`.
        points: of the rule. A block takes MOST_COEFFICIENTS + 1 at most.
    """
    if not fuse:
        return Route("generic", "it is to be called as it is")
    as_block = method == "path" and points <= MOST_COEFFICIENTS + 1
    try:
        chain = known or chain_or_reason(f, put_back, method not in ("path", REGIONS))
        reason = why_no_kernel(chain, x, method)
    except NotAChain as error:
        chain, reason = None, str(error)
    if chain is None or reason is not None:
        block = _block(f, x, put_back) if as_block else None
        return _unfused(f, method, str(reason)) if block is None else Route("block", str(reason), block=block)
    block = wide_block(chain) if as_block else None
    if block is not None and _takes_block(block, x) and (x is None or not _native.on_cuda(x)):
        return Route("block", "a few coefficients give its many outputs", block=block)
    return Route("fused", chain=chain)


def refuted(route: Route, f: Callable[[Tensor], Tensor], method: str) -> Route:
    """The next route for f after the chain, or the affine maps, of this route turned out to have other outputs than f."""
    if route.kind == "fused":
        return _unfused(f, method, OTHER_OUTPUTS)
    if route.kind == "block":
        return _unfused(f, method, OTHER_BLOCK)
    return replace(route, kind="generic", parts=None)


def _block(
    f: Callable[[Tensor], Tensor], x: Tensor | None, put_back: Callable[[], None] | None
) -> Block | None:
    try:
        block = block_or_reason(f, put_back)
    except NotAChain:
        return None
    return block if _takes_block(block, x) else None


def _takes_block(block: Block, x: Tensor | None) -> bool:
    """Whether there is a kernel for the block on these samples."""
    dtype = block.first.dtype
    if x is None:
        return dtype in KERNEL_DTYPES
    return (
        x.dtype == dtype in KERNEL_DTYPES
        and _native.has_kernels(x)
        and x.dim() > 1
        and x.shape[-1] == block.first.shape[1]
        and not torch.is_autocast_enabled(x.device.type)
    )


def _unfused(f: Callable[[Tensor], Tensor], method: str, reason: str) -> Route:
    parts = None if method in (*DIFFERENTIATING, REGIONS) else affine_start(f)
    return Route("generic", reason) if parts is None else Route("hoisted", reason, parts=parts)


def why_no_kernel(chain: Chain, x: Tensor | None, method: str) -> str | None:
    """The reason why no kernel measures a chain; None if a kernel does. For REGIONS no kernel is needed."""
    if x is not None and method != REGIONS and not _native.has_kernels(x):
        return f"there is no kernel for {x.device}"
    if x is not None and x.dim() != 2 and not chain.flattens:
        return f"samples of shape {tuple(x.shape[1:])} are no vectors, and nothing flattens them"
    if chain.skips and method in DIFFERENTIATING:
        return "the kernels differentiate no residual sums"
    return None
