"""Which route a measurement of a function takes: the only place that decides it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, fx

from . import _native
from ._affine import affine_start
from ._chain import Chain
from ._recognise import NotAChain, chain_or_reason

# Methods that use Jacobians. The kernels do not differentiate residual sums. A Jacobian depends on the coordinates of the
# samples, so no affine map may be taken out of the function.
DIFFERENTIATING = ("jacobian", "jacobians")
# The number of linear regions is counted on the whole chain, in plain torch.
REGIONS = "linear regions"
OTHER_OUTPUTS = "the chain of Linear and activations that they look like has other outputs"


@dataclass(frozen=True, eq=False)
class Route:
    """How a function is measured, and why.

    "fused": the function is a chain, and a kernel takes all of it. "hoisted": the function begins with affine maps, which
    commute with a path. They are applied to the samples alone, and the rest of the function is called on tiles of path points.
    "generic": the whole function is called on tiles of path points, or of samples.
    """

    kind: Literal["fused", "hoisted", "generic"]
    reason: str = ""
    """Why the route is not "fused", in words that can follow "as"."""
    chain: Chain | None = None
    """For "fused": the chain that the kernel measures."""
    parts: tuple[fx.GraphModule, fx.GraphModule] | None = None
    """For "hoisted": the affine maps, and the rest of the function."""


def find_route(
    f: Callable[[Tensor], Tensor],
    x: Tensor | None,
    method: str,
    *,
    fuse: bool = True,
    known: Chain | None = None,
    put_back: Callable[[], None] | None = None,
) -> Route:
    """The route for f on samples x, found without a call of f.

    Args:
        f: the function to measure.
        x: (N, *in), the samples. None: unknown; the route is then the one for vectors on a device with kernels.
        method: as in :func:`lmnfast.connectivity`, "jacobians" or REGIONS.
        fuse: False leaves out "fused" and "hoisted".
        known: the chain that f is, if the caller knows it.
        put_back: as in `chain_or_reason`.
    """
    if not fuse:
        return Route("generic", "it is to be called as it is")
    try:
        chain = known or chain_or_reason(f, put_back, method not in ("path", REGIONS))
    except NotAChain as error:
        return _unfused(f, method, str(error))
    reason = why_no_kernel(chain, x, method)
    return Route("fused", chain=chain) if reason is None else _unfused(f, method, reason)


def refuted(route: Route, f: Callable[[Tensor], Tensor], method: str) -> Route:
    """The next route for f after the chain, or the affine maps, of this route turned out to have other outputs than f."""
    if route.kind == "fused":
        return _unfused(f, method, OTHER_OUTPUTS)
    return replace(route, kind="generic", parts=None)


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
