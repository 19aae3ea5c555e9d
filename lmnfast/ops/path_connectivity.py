"""``lmnfast::path_connectivity``: linear connectivity of a chain of Linear and pointwise activations, fused."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .._chain import Chain
from .._native import plain
from .._settings import PLAIN, Statistic, checked_stabiliser
from .._stacked import ChainStack
from .._unresolved import Entries, ListEntries
from ._by_reference import by_reference, parts_of_arguments, resolve_in_float64
from ._checks import check_chain, check_indices, check_rule, check_sums, check_tensor
from ._hoisted import Hoisted, hoisted, parts_of


def path_connectivity(
    chain: Chain,
    x: Tensor,
    nodes: Tensor,
    weights: Tensor,
    *,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> Tensor:
    """``reference.path_connectivity`` of the same arguments, fused; on the CPU, or on CUDA in a build with CUDA.

    A first Linear commutes with the path, so it is applied only to the samples, in float64. With float32 samples the statistics
    and the result are float32, and sums over outputs are compensated or float64. With float64 samples everything is float64.
    Half types are first widened to float32. Pairs that float32 cannot resolve are measured in float64 afterwards, see
    docs/mathematics.md.

    On CUDA float32 products follow ``torch.get_float32_matmul_precision()``. At "highest" each residual from the chord and each
    weight is split into two halves, which keeps 22 of float32's 24 bits. At "high" and "medium" each is one half, of 11 bits,
    as in TF32. This changes r2 by at most about 2^-11 of the last hidden units' residuals over the output's spread. Most
    entries change by less than 1e-4. If a path's chord is short compared with its length, its entry changes by some 1e-3 if
    tens of outputs average the error, and by 0.02 with one output. Each unit has a power of two that brings its values into a
    half's range; if that fails, the pair is measured in float64.

    Args:
        chain: weights on the samples' device, of their dtype.
        x: (N, D), or (N, *in) where the chain flattens.
        nodes, weights: (nodes,) float64, as :func:`lmnfast.quadrature.path_nodes` returns them.
        stabiliser, pooled: as in :func:`lmnfast.connectivity`.

    Returns:
        (N, N) float64 for float64 samples, else float32.

    Raises:
        TypeError: a dtype that the kernels do not take, or dtypes that differ.
        ValueError: shapes that do not fit together.
        RuntimeError: the CUDA kernels cannot run on the device.

    Source:
        arXiv 2310.05918, Eq. 1-2; the residual from the chord: docs/mathematics.md.

    Example:
        >>> chain = lmnfast.ops.recognise(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)))
        >>> rule = lmnfast.quadrature.path_nodes("uniform", 21)
        >>> lmnfast.ops.path_connectivity(chain, torch.randn(50, 8), *rule).shape
        torch.Size([50, 50])
    """
    measured = chain_connectivity(chain, x, nodes, weights, statistic=Statistic(stabiliser, pooled))
    measured.resolve()
    return measured.L if measured.pooled is None else measured.pooled


class ChainConnectivity(NamedTuple):
    """A connectivity matrix, or the entries of a list of pairs, as the kernels leave it."""

    L: Tensor
    """(N, N) or (pairs,), with UNRESOLVED in place of an entry that the dtype cannot resolve. On CUDA the kernels themselves
    measure most of the pairs that float32 cannot resolve."""
    counts: Tensor
    """(2,) int64 on L's device: outputs counted as constant over the resolved pairs; unresolved pairs."""
    resolve: Callable[[], None]
    """Measures the unresolved pairs and completes L, pooled and counts. Waits for the device."""
    pooled: Tensor | None = None
    """As L, r2 pooled over the outputs; None if it was not asked for."""


def chain_connectivity(
    chain: Chain,
    x: Tensor,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool | None = None,
    statistic: Statistic = PLAIN,
) -> ChainConnectivity:
    """`path_connectivity`, or `hermite_connectivity` if midpoint is not None, before the unresolved pairs are measured.

    On CUDA the op is enqueued on the current stream. It never synchronises, and takes all memory from torch.
    """
    parts = hoisted(chain, x)
    L, counts, pooled = _measured(parts, x, nodes, weights, midpoint, statistic)
    entries = Entries(L, pooled, counts, statistic.stabiliser)
    resolved = partial(_resolved, lambda: parts, x, entries, nodes, weights, midpoint)
    return ChainConnectivity(L, counts, resolved, pooled)


# The memory of the kernel for the samples of a list of pairs, and what it takes of it for each value of a sample.
LIST_BYTES = 32 * 2**20
NUMBERS_PER_VALUE = 8


def chain_pairs(
    chain: Chain,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool | None = None,
    statistic: Statistic = PLAIN,
) -> ChainConnectivity:
    """`chain_connectivity` of some pairs of samples alone, on the CPU. first, second: (pairs,) int64; no pair of a sample with
    itself.

    The memory does not depend on the number of samples: if they are many, the kernel takes some pairs at a time, and their
    samples.
    """
    values = sum(map(len, chain.weights)) + chain.weights[0].shape[1]
    samples = LIST_BYTES // (NUMBERS_PER_VALUE * x.element_size() * values)
    most = max(len(first), 1) if len(x) <= samples else max(64, samples // 2)
    parts = []
    for pair in torch.arange(len(first), device=first.device).split(most):
        used, places = torch.stack([first[pair], second[pair]]).unique(return_inverse=True)
        own = hoisted(chain, x[used])
        parts.append((_measured(own, x[used], nodes, weights, midpoint, statistic, *places), used, places))
    r2, counts, pooled = map(list, zip(*(found for found, *_ in parts)))
    L, total, whole = (
        torch.cat(r2),
        torch.stack(counts).sum(0),
        torch.cat(pooled) if statistic.pooled else None,
    )

    def resolved() -> None:
        for n, (_, used, (i, j)) in enumerate(parts):
            if int(counts[n][1]) == 0:
                continue
            own, its_x = slice(n * most, (n + 1) * most), x[used]
            part = None if whole is None else whole[own]
            entries = ListEntries(L[own], part, counts[n], statistic.stabiliser, first=i, second=j)
            _resolved(partial(hoisted, chain, its_x), its_x, entries, nodes, weights, midpoint)
        total.copy_(torch.stack(counts).sum(0))

    return ChainConnectivity(L, total, resolved, whole)


def stack_connectivity(
    chains: ChainStack,
    x: Tensor,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool | None = None,
    statistic: Statistic = PLAIN,
) -> tuple[Tensor, Tensor, Tensor | None, list[ChainConnectivity]]:
    """`chain_connectivity` of several networks on x (networks, N, *in), with the same bits. On CUDA all networks share one
    launch.

    Returns:
        L (networks, N, N); counts (networks, 2); pooled as L, or None; and per network its parts of these.
    """
    parts = hoisted(chains, x)
    L, counts, pooled = _measured(parts, x, nodes, weights, midpoint, statistic)
    each = []
    for n in range(len(L)):
        entries = Entries(L[n], None if pooled is None else pooled[n], counts[n], statistic.stabiliser)
        resolved = partial(_resolved, partial(parts.of_network, n), x[n], entries, nodes, weights, midpoint)
        each.append(ChainConnectivity(entries.L, entries.counts, resolved, entries.pooled))
    return L, counts, pooled, each


def _measured(
    parts: Hoisted,
    x: Tensor,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool | None,
    statistic: Statistic,
    first: Tensor | None = None,
    second: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """L, counts and pooled, as the registered ops return them; None for a pooled result that was not asked for."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not _native.HAS_CORE:
        given = parts, x, dtype, nodes, weights, midpoint, statistic, first, second
        L, counts, pooled = by_reference(*given)
        return L, counts, pooled if statistic.pooled else None
    arguments = (
        *parts.arguments(dtype),
        nodes,
        weights,
    )
    at_once: dict[str, Any] = {**statistic._asdict(), "first": first, "second": second}
    if _native.on_cuda(x) and x.dtype != torch.float64:
        at_once |= {"exact": parts.samples(), "inputs": x.flatten(parts.z.dim() - 1).float()}
    if midpoint is None:
        L, counts, pooled = torch.ops.lmnfast.path_connectivity(*arguments, **at_once)
    else:
        L, counts, pooled = torch.ops.lmnfast.hermite_connectivity(*arguments, midpoint, **at_once)
    return L, counts, pooled if statistic.pooled else None


def _resolved(
    parts_of: Callable[[], Hoisted],
    x: Tensor,
    entries: Entries,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool | None,
) -> None:
    """`ChainConnectivity.resolve` of one network."""
    if int(entries.counts[1]) == 0:  # saves widening the network to float64
        return
    resolve_in_float64(parts_of(), x, entries, nodes, weights, midpoint)


torch.library.define(
    "lmnfast::path_connectivity",
    "(Tensor z, Tensor[] weights, Tensor?[] biases, int[] activations, float[] parameters, int[] skips, "
    "Tensor?[] shifts, Tensor nodes, Tensor node_weights, Tensor? exact=None, Tensor? inputs=None, float stabiliser=0.0, "
    "bool pooled=False, Tensor? first=None, Tensor? second=None) -> (Tensor, Tensor, Tensor)",
)


OPTIONAL = ("exact", "inputs", "stabiliser", "pooled", "first", "second")


def fake(*arguments: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes that `run` returns for the same arguments, without midpoint. Tensors need no values."""
    z, given = arguments[0], {**dict(zip(OPTIONAL, arguments[9:])), **more}
    pooled, first = given.pop("pooled", False), given.get("first")
    check_arguments(*arguments[:9], **given, fake=True)
    shape = (*z.shape[:-1], z.shape[-2]) if first is None else first.shape
    counts = z.new_empty(*z.shape[:-2], 2, dtype=torch.int64)
    return z.new_empty(shape), counts, z.new_empty(shape if pooled else (0,))


def check_arguments(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    skips: Sequence[int],
    shifts: Sequence[Tensor | None],
    nodes: Tensor,
    node_weights: Tensor,
    exact: Tensor | None = None,
    inputs: Tensor | None = None,
    stabiliser: float = 0.0,
    first: Tensor | None = None,
    second: Tensor | None = None,
    *,
    fake: bool = False,
) -> list[int]:
    """Raises TypeError or ValueError for arguments that do not fit; returns the widths. fake: does not read tensors' values."""
    checked_stabiliser(stabiliser)
    _check_pairs(z, first, second, fake)
    if z.dim() == 3:
        _check_stacks(z, weights=weights, biases=biases, shifts=shifts, exact=[exact], inputs=[inputs])
        z, weights, biases, shifts, exact, inputs = parts_of(0, z, weights, biases, shifts, exact, inputs)
    widths = check_chain("z", z, weights, biases, activations, parameters, fake=fake)
    check_sums(z, widths, activations, skips, shifts)
    check_rule(nodes, node_weights, "node_weights", fake=fake)
    _check_exact(z, shifts, exact, inputs)
    return widths


def _check_pairs(z: Tensor, first: Tensor | None, second: Tensor | None, fake: bool) -> None:
    """Raises TypeError or ValueError for a list of pairs that does not fit."""
    if first is None and second is None:
        return
    elsewhere = z.device.type not in ("cpu", "meta") or _native.emulates_cuda(z)
    if first is None or second is None or z.dim() != 2 or elsewhere:
        raise ValueError(
            f"first, second: expected both or neither, and these with samples (N, D) on the CPU, got {z.dim()} dimensions "
            f"on {z.device}"
        )
    for name, tensor in (("first", first), ("second", second)):
        check_tensor(name, tensor, (torch.int64,), z.device)
        if tensor.dim() != 1 or tensor.shape != first.shape:
            raise ValueError(f"{name}: expected ({first.numel()},), got shape {tuple(tensor.shape)}")
        check_indices(name, tensor, len(z), fake=fake)


def _check_stacks(z: Tensor, **lists: Sequence[Tensor | None]) -> None:
    """Raises ValueError if z has no network, or if another tensor does not have as many networks as z."""
    if len(z) == 0:
        raise ValueError(f"z: expected samples of one or more networks, got shape {tuple(z.shape)}")
    for name, tensors in lists.items():
        for n, tensor in enumerate(tensors):
            if tensor is not None and (tensor.dim() == 0 or len(tensor) != len(z)):
                place = name if name in ("exact", "inputs") else f"{name}[{n}]"
                raise ValueError(
                    f"{place}: expected ({len(z)}, ...), a network each, got shape {tuple(tensor.shape)}"
                )


def _check_exact(
    z: Tensor, shifts: Sequence[Tensor | None], exact: Tensor | None, inputs: Tensor | None
) -> None:
    """Checks the arguments that are only for float32 samples. They come both or not at all.

    Args:
        z: (N, D), the samples.
        shifts: as in `run`.
        exact: (N, widths of z and the shifts) float64, the samples before they were rounded.
        inputs: (N, *) float32, the network's inputs.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    if exact is None and inputs is None:
        return
    if exact is None or inputs is None or z.dtype != torch.float32:
        raise ValueError("exact, inputs: expected both or neither, and these with samples of torch.float32")
    check_tensor("exact", exact, (torch.float64,), z.device)
    check_tensor("inputs", inputs, (torch.float32,), z.device)
    width = z.shape[1] + sum(s.shape[1] for s in shifts if s is not None)
    if exact.shape != (z.shape[0], width):
        raise ValueError(f"exact: expected ({z.shape[0]}, {width}), got shape {tuple(exact.shape)}")
    if inputs.dim() != 2 or inputs.shape[0] != z.shape[0]:
        raise ValueError(f"inputs: expected ({z.shape[0]}, *), got shape {tuple(inputs.shape)}")


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
    exact: Tensor | None = None,
    inputs: Tensor | None = None,
    stabiliser: float = 0.0,
    pooled: bool = False,
    first: Tensor | None = None,
    second: Tensor | None = None,
    *,
    midpoint: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """path_connectivity, or hermite_connectivity if midpoint is not None.

    The tensors of several networks may be stacked: all tensors except those of the rule then have one more dimension in front.
    The results have the same bits as those of one network after the other. On CUDA all networks share one launch.

    Args:
        z, weights, biases, activations, parameters, skips, shifts: as `chain_arguments` returns them.
        nodes, node_weights: the rule, as in `path_connectivity`.
        exact: z and the shifts side by side in float64, or None.
        inputs: the network's inputs in float32, or None. With `exact` and `inputs` the CUDA kernels measure most unresolved
            pairs. The CPU kernels do not read them.
        stabiliser, pooled: as in `Statistic`.
        first, second: (pairs,) int64, a list of pairs; on the CPU. None: all pairs.
        midpoint: as in `hermite_connectivity`.

    Returns:
        L, counts and pooled, see `ChainConnectivity`; pooled is (0,) if it was not asked for.
    """
    chain = z, weights, biases, activations, parameters, skips, shifts
    widths = check_arguments(*chain, nodes, node_weights, exact, inputs, stabiliser, first, second)
    if not _native.HAS_CORE:
        how = nodes, node_weights, midpoint, Statistic(stabiliser, pooled)
        return by_reference(parts_of_arguments(*chain), z, z.dtype, *how, first, second)
    if z.dim() == 3 and not _native.on_cuda(z):  # on the CPU one network keeps all cores busy
        L = _native.empty(z, len(z), z.shape[1], z.shape[1])
        counts = z.new_empty(len(z), 2, dtype=torch.int64)
        pool = _native.empty(z, *(L.shape if pooled else (0,)))
        for n in range(len(z)):
            own_z, own_weights, own_biases, own_shifts = parts_of(n, z, weights, biases, shifts)
            own = own_z, own_weights, own_biases, activations, parameters, skips, own_shifts
            L[n], counts[n], one = run(
                *own, nodes, node_weights, stabiliser=stabiliser, pooled=pooled, midpoint=midpoint
            )
            if pooled:
                pool[n] = one
        return L, counts, pool
    made = _native._C.PathConnectivity if midpoint is None else _native._C.HermiteConnectivity
    more = () if midpoint is None else (midpoint,)
    call, kept = native_call(
        made, chain, widths, (nodes, node_weights), stabiliser, pooled, first, second, exact, inputs, more
    )
    shape = (*z.shape[:-1], z.shape[-2]) if first is None else first.shape
    counts = z.new_empty(*z.shape[:-2], 2, dtype=torch.int64)
    L, pool = _native.empty(z, *shape), _native.empty(z, *(shape if pooled else (0,)))
    if first is not None and len(first) == 0:  # an array of no pairs has no address
        return L, counts.zero_(), pool
    _native.run(call, L, pool if pooled else None, counts)
    del kept
    return L, counts, pool


ChainArguments = tuple[
    Tensor,
    Sequence[Tensor],
    Sequence[Tensor | None],
    Sequence[int],
    Sequence[float],
    Sequence[int],
    Sequence[Tensor | None],
]


def native_call(
    made: Callable[..., Any],
    chain: ChainArguments,
    widths: list[int],
    rule: tuple[Tensor, Tensor],
    stabiliser: float,
    pooled: bool,
    first: Tensor | None,
    second: Tensor | None,
    exact: Tensor | None = None,
    inputs: Tensor | None = None,
    more: Sequence[Any] = (),
) -> tuple[Any, list[Any]]:
    """The object of the compiled core for checked arguments, and the tensors that must exist until it has run.

    Args:
        made: the class of the object.
        chain, rule, stabiliser, pooled, first, second, exact, inputs: as in `run`.
        widths: of the chain.
        more: the arguments that the class has in addition to those of PathConnectivity.
    """
    z, weights, biases, activations, parameters, skips, shifts = chain
    z, weights = plain(z), [plain(w) for w in weights]
    biases, shifts = ([None if t is None else plain(t) for t in tensors] for tensors in (biases, shifts))
    exact, inputs, first, second = (None if t is None else plain(t) for t in (exact, inputs, first, second))
    call = made(
        z.dtype == torch.float64,
        _native.address(z),
        [_native.address(w) for w in weights],
        [_native.address(b) for b in biases],
        widths,
        list(activations),
        list(parameters),
        list(skips),
        [_native.address(s) for s in shifts],
        *_native.rule_arguments(*rule),
        z.shape[-2],
        torch.get_float32_matmul_precision() != "highest",
        _native.address(exact),
        _native.address(inputs),
        0 if exact is None else exact.shape[-1],
        0 if inputs is None else inputs.shape[-1],
        z.shape[:-2].numel(),
        stabiliser,
        _native.address(first),
        _native.address(second),
        0 if first is None else len(first),
        pooled,
        *more,
    )
    return call, [z, weights, biases, shifts, exact, inputs, first, second]


torch.library.impl("lmnfast::path_connectivity", "default", run)
torch.library.register_fake("lmnfast::path_connectivity", fake)
