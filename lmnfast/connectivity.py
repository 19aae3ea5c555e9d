"""The linear connectivity matrix of a network on a set of samples."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _native
from ._native import Progress
from .cutting import affine_start
from .evaluation import (
    Calls,
    Checks,
    Findings,
    NotTheChain,
    StackFindings,
    bytes_of,
    check_budget,
    checked_samples,
    first_outputs,
    has_kernel_of,
    has_kernels,
    keep_freed_pages,
    on_device,
    out_of_memory,
    outputs_of,
    rows_again,
    rows_between,
    tile_bytes,
    tile_pairs,
    widened,
)
from .jacobian import Differentiated, other_features, tiled, with_features
from .network import Chain, Stacked, loaded, networks_in, recognise, stack_of
from .ops.path_connectivity import ChainConnectivity, chain_connectivity, stack_connectivity
from .quadrature import path_nodes
from .reference import CONSTANT_ULPS
from .state import alone, evaluating, one_core_after_fork
from .unresolved import CLOSE, LEAST_ROUNDING, RESOLVED_ULPS, UNRESOLVED, Widened, are_close, resolve

METHODS = ("path", "hermite", "hermite-midpoint", "jacobian")
# Share of constant outputs from which on an offset is warned of. Measured on an MLP with 5 outputs and 200 samples, by the
# size of the offset: LMN is 1 % low at a share of 0.1 %, 3 % at 0.8 %, 12 % at 2.7 %, 89 % at 50 %.
WARNED_SHARE = 0.002
# Share of the outputs that an offset must have, and above which one dead output among hundreds stays silent.
OFFSET_SHARE = 0.01


def connectivity(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int | None = None,
    stacked: Stacked | None = None,
    progress: bool | Progress = False,
) -> Tensor:
    """Linear connectivity matrix: how straight is f's output along the line between every two samples.

    ``L[i, j] = mean_k cov(y_k, t)^2 / (var(t) var(y_k))`` over the nodes t of the path ``x_i + t (x_j - x_i)``.
    An output that is constant to rounding counts 1. Chains of Linear and pointwise activations, also with residual
    blocks, run in one fused kernel; any other f is called on tiles of path points. An ``nn.Module`` is measured in eval
    mode and left as it was. The result carries no graph, whatever requires grad.

    The other methods stand in for it where f is dear, and are always to be named with the number; see docs/methods.md
    for how well each follows:
    "hermite" takes the cubic that has f's outputs and its slopes ``J_i (x_j - x_i)``, ``J_j (x_j - x_i)`` at both
    ends of the path, so f is differentiated at the samples and never evaluated between them. "hermite-midpoint" takes
    the quartic that also has f's outputs half way. "jacobian" compares the linear maps at the ends alone:
    ``L[i, j] = 1 - |J_i - J_j|^2 / (|J_i|^2 + |J_j|^2)``, Frobenius, from -1 to 1; 1 where both are zero.

    Args:
        f: maps a batch (B, *in) to (B, *out), one row independent of the others; outputs are flattened.
        x: (N, *in), floating point, the samples.
        method: "path", "hermite", "hermite-midpoint" or "jacobian".
        points: nodes on a path, ends included; of no effect on "jacobian".
        rule: "uniform" (the definition, with 21 points) or "lobatto" (approximates the 21-point sums with fewer).
        budget: bytes a tile of path points, or of Jacobians, and f's intermediate results may take together. None: 256 MiB on
            the CPU; on CUDA a quarter of the card's free memory, what torch's allocator holds for later included, and 4 GiB
            at most. On the CPU a tile of path points has 24 MiB at most, as caches are faster. A tile is whole pairs, one at
            least. Where a device has no memory left all the same, tiles are halved until it has.
        stacked: parameters and buffers of B networks like the module f, as torch.func.stack_module_state returns them;
            x is then (B, N, *in), each network's own samples. On CUDA chains are measured together, with the same bits.
        progress: True shows a bar (needs tqdm); a function is told the share that is done, from 0 to 1, about ten times a
            second, or after a tile of paths. It runs in this thread, and what it raises ends the measurement. A fused
            kernel on CUDA and method "jacobian" tell the end alone.

    Returns:
        (N, N), symmetric, ones on the diagonal; float64 for float64 samples, else float32. (B, N, N) with `stacked`.

    Raises:
        TypeError: x is not a floating-point tensor, f does not return one, or their dtypes do not fit.
        ValueError: no samples, unknown method or rule, points or budget out of range, x and f on different
            devices, or a NaN or Inf in samples, outputs or Jacobians (names the first sample); on CUDA, f may be
            called on samples that are not finite before it is raised; an f that is no chain and gives a sample other
            outputs when called on fewer; for the other methods, an f that cannot be differentiated.
        ImportError: progress is True and tqdm is missing.
        KeyboardInterrupt: Ctrl-C, also while a kernel is at work.
        Source: arXiv 2310.05918, Eq. 1-2.
    """
    settings: dict[str, Any] = {"method": method, "points": points, "rule": rule, "budget": budget}
    each = measured(f, x, stacked, progress=progress, **settings)
    warn_of_offsets(each)
    with one_core_after_fork():
        return each[0].L if stacked is None else stacked_matrices(each)


def stacked_matrices(each: Sequence["Enqueued"]) -> Tensor:
    """(networks, N, N); where one launch has measured all networks, what it has written."""
    together = each[0].together
    if together is not None and all(one.together is together for one in each):
        return together
    return torch.stack([one.L for one in each])


@alone()
def measured(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    stacked: Stacked | None = None,
    *,
    progress: bool | Progress = False,
    **settings: Any,
) -> list["Enqueued"]:
    """Checked connectivities with what is known of them: one, or one for each of the stacked networks.

    Arguments and errors as :func:`connectivity`.
    """
    with _reported(progress) as report:
        if stacked is not None:
            return _measured_stack(f, x, stacked, report, settings)
        enqueued = enqueue(f, x, progress=report, **settings)
        try:
            enqueued.check()
        except NotTheChain:
            enqueued = enqueue(f, x, fuse=False, progress=report, **settings)
            enqueued.check()
        if report is not None:
            report(1.0)
        return [enqueued]


def _measured_stack(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    stacked: Stacked,
    report: Progress | None,
    settings: dict[str, Any],
) -> list["Enqueued"]:
    """As `measured`. A device gets the work of all networks before anybody waits for that of one, of chains in one launch."""
    networks = _stacked_networks(f, x, stacked)

    def one(number: int, **more: Any) -> Enqueued:
        with loaded(f, stacked, number):
            return enqueue(f, x[number], progress=_share_of(report, number, networks), **settings, **more)

    results = _enqueue_together(f, x, stacked, **settings) or []
    if results and report is not None:
        report(1.0)
    for number in range(len(results), networks):
        results.append(one(number))
        if report is not None:
            report((number + 1) / networks)
    for number, enqueued in enumerate(results):
        try:
            enqueued.check()
        except NotTheChain:
            results[number] = one(number, fuse=False)
            results[number].check()
    return results


def warn_of_offsets(each: Sequence["Enqueued"], name: str = "f", stacklevel: int = 3) -> None:
    """Warns once where an offset hides the outputs of some of these connectivities.

    The stacklevel is that of the caller's caller.
    """
    if problems := [problem for enqueued in each if (problem := enqueued.offset_problem())]:
        warnings.warn(f"{name}: {problems[0]}", stacklevel=stacklevel)


@contextmanager
def _reported(progress: bool | Progress) -> Iterator[Progress | None]:
    """What is told the share that is done; None where nobody asked."""
    if callable(progress) or progress is False:
        yield progress or None
        return
    if progress is not True:
        raise TypeError(f"progress: expected a bool or a function of the share done, got {progress!r}")
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress: True shows a bar of tqdm, which is missing; pip install tqdm") from error
    with tqdm(total=1.0, bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
        yield lambda done: bar.update(done - bar.n)


def _share_of(report: Progress | None, number: int, count: int) -> Progress | None:
    """Tells `report` the share of all, where one of them after the other is measured."""
    return None if report is None else lambda done: report((number + done) / count)


def _stacked_networks(f: Callable[[Tensor], Tensor], x: Tensor, stacked: Stacked) -> int:
    """How many networks there are, with samples for each."""
    if not isinstance(f, nn.Module):
        raise TypeError(f"f: expected an nn.Module to load stacked parameters into, got {type(f).__name__}")
    networks = networks_in(stacked)
    if not isinstance(x, Tensor) or x.dim() < 3 or len(x) != networks:
        raise ValueError(
            f"x: expected samples ({networks}, N, *in), a set for each of the stacked networks, got shape "
            f"{tuple(getattr(x, 'shape', ()))}; x.expand({networks}, *x.shape) gives all of them the same"
        )
    return networks


@dataclass(frozen=True, eq=False)
class Enqueued:
    """A connectivity matrix on its way. Its values count once `check` has returned."""

    measured: ChainConnectivity
    precision: str
    """As `Measurement.precision`."""
    outputs: int
    """K, after flattening."""
    verdicts: Tensor | None = None
    """(checks, 2) int64, how many values fail a check and which is the first; None where all was looked at."""
    errors: tuple[Callable[[int, int], Exception], ...] = ()
    offset: Tensor | Callable[[], Tensor] | None = None
    """0-dim float64, as `_offset` gives it, or what gives it; None: of no interest, as next to no output counts as constant."""
    findings: Findings | None = None
    """In place of verdicts, of a chain on a device."""
    together: Tensor | None = None
    """(networks, N, N), of which L is one, where several networks were measured together."""

    @property
    def L(self) -> Tensor:
        return self.measured.L

    @property
    def constants(self) -> int:
        """Outputs that were counted as constant to rounding, over all pairs i < j."""
        if self.findings is not None and not self.findings.unresolved:
            return self.findings.constants
        return int(self.measured.counts[0])

    def check(self) -> None:
        """Raises what is wrong with samples, outputs or L, as `connectivity` does; waits for the device.

        Pairs that the samples' dtype cannot resolve are measured here, where that was not done before.
        """
        if self.findings is not None:
            self.findings.check()
            if self.findings.unresolved:
                self.measured.resolve()
                Checks(False).entries(self.L)
            else:
                self.findings.check_entries()
            return
        if self.verdicts is None:
            return
        for (failing, first), error in zip(self.verdicts.cpu().tolist(), self.errors, strict=True):
            if failing:
                raise error(failing, first)
        self.measured.resolve()
        Checks(False).entries(self.L)

    def constant_share(self) -> float:
        """Share of the pairs i < j, over all outputs, that count as constant; waits for the device."""
        pairs = len(self.L) * (len(self.L) - 1) // 2
        return self.constants / (pairs * self.outputs) if pairs else 0.0

    def offset_problem(self) -> str | None:
        """What is wrong where outputs vary so little beside their size that rounding hides it; waits for the device."""
        share = self.constant_share()
        if share < WARNED_SHARE or self.offset is None:
            return None
        offset = float(self.offset() if callable(self.offset) else self.offset)
        if offset == 0:
            return None
        size = (
            "outputs are the same large value for all samples"
            if math.isinf(offset)
            else f"outputs are {offset:.1e} times as large as their range over the samples"
        )
        return (
            f"{share:.1%} of the outputs' paths between two samples are constant to rounding and count as straight, "
            f"while some {size}; if an offset hides how they vary, measure in float64, or subtract it from the outputs "
            "(output=lambda y: y - offset, in lmnfast.cut and Probe)"
        )


@alone()
def enqueue(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int | None = None,
    fuse: bool = True,
    expected: Tensor | None = None,
    known: Chain | None = None,
    deferred: bool | None = None,
    stream: torch.cuda.Stream | None = None,
    progress: Progress | None = None,
) -> Enqueued:
    """:func:`connectivity` without waiting for a CUDA device, where f is a chain; of other functions it waits for the number of
    unresolved pairs, which are measured with the parameters of now.

    What a check has to read from the device is left to :meth:`Enqueued.check`. Elsewhere every check is made
    at once, before the work that follows it.

    Args:
        f, x, method, points, rule, budget: as there.
        fuse: use the fused kernel for a chain.
        expected: f(x), where that is known.
        known: what `recognise` gives for f, where that is known.
        deferred: leave the checks to `check`; None: on CUDA.
        stream: CUDA, another than the current one, that takes the work. What the current stream is given
            next may change f's parameters: a chain's are copied, else the current stream waits for `stream`.
            x itself must not change.
        progress: is told the share that is done.

    Raises:
        As connectivity; RuntimeError when f(x) is not what was expected; NotTheChain in `check` only, as
        elsewhere the chain is just not used.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    midpoint = method == "hermite-midpoint" if method.startswith("hermite") else None
    nodes, weights = path_nodes(rule, points)
    check_budget(budget)
    x = checked_samples(f, x)
    checks = Checks(x.is_cuda if deferred is None else deferred)
    precision = torch.get_float32_matmul_precision()
    with evaluating(f) as kept:
        calls = Calls(f, kept.put_back)
        if not checks.deferred:  # of not finite samples f may say anything
            checks.finite("x", x)
        chain = (known or recognise(f)) if fuse and has_kernels(x) and kept.in_order else None
        ends = first_outputs(calls, x, chain)
        allocated = 0  # bytes of f's results for all samples; of a chain nobody asks
        if fuse and has_kernels(x) and not kept.in_order:
            chain = known or recognise(f)
        if chain is not None and not (has_kernel_of(chain, x) and not (chain.skips and method == "jacobian")):
            chain = None
        if stream is not None:
            if chain is not None:
                chain = _copied(chain)
                for tensor in (x, ends, expected, *chain.weights, *chain.biases):
                    if tensor is not None:  # else its memory may be used again before `stream` has read it
                        tensor.record_stream(stream)
            stream.wait_stream(torch.cuda.current_stream(x.device))
        try:
            with on_stream(stream):
                if expected is not None:
                    expected = expected.reshape(len(x), -1)
                if chain is not None and checks.deferred and method != "jacobian":
                    # Of stateless modules in order nothing else can come out than what the chain gives.
                    again = None if kept.in_order else chain(x)
                    if all(t is None or _is_like(t, ends) for t in (again, expected)):
                        measured = chain_connectivity(chain, x, nodes, weights, midpoint)
                        return Enqueued(
                            measured,
                            _precision(precision, chain, x),
                            ends.shape[1],
                            offset=partial(_offset, chain, ends),
                            findings=Findings(x, ends, again, expected, measured.L, measured.counts),
                        )
                if checks.deferred:
                    checks.finite("x", x)
                checks.finite("f(x)", ends)
                if expected is not None:
                    checks.agree(ends, expected)
                if not (chain is None or kept.in_order or checks.reproduces(chain, x, ends)):
                    chain = None
                if chain is None:
                    for rows in rows_again(len(x)):
                        again, allocated = bytes_of(calls, x, rows, method != "path")
                        checks.repeats(calls, x, ends, again, rows, f"{len(rows)} samples alone")
                    if fuse and method != "jacobian":  # which depends on the coordinates
                        calls, x = _hoisted(calls, x, ends, checks)
                tile = tile_bytes(budget, x.device) if chain is None else 0
                if method == "jacobian":
                    L = _of_jacobians(calls, chain, x, ends, allocated, checks)
                    measured = ChainConnectivity(L, torch.zeros(2, dtype=torch.int64, device="cpu"), _nothing)
                elif chain is not None:
                    with _native.reporting(progress):
                        measured = chain_connectivity(chain, x, nodes, weights, midpoint)
                elif midpoint is None:
                    measured = _generic(calls, x, ends, nodes, weights, tile, allocated, checks, progress)
                else:
                    measured = _generic_hermite(
                        calls, x, ends, nodes, weights, midpoint, tile, allocated, checks, progress
                    )
                if not (checks.deferred and chain is not None):  # else by `check`, on the chain's own weights
                    measured.resolve()
                    checks.entries(measured.L)
                enqueued = Enqueued(
                    measured,
                    _precision(precision, chain, x),
                    ends.shape[1],
                    checks.pending(),
                    tuple(checks.errors),
                )
                if checks.deferred:
                    enqueued = replace(enqueued, offset=partial(_offset, chain, ends))
                elif enqueued.constant_share() >= WARNED_SHARE:
                    enqueued = replace(enqueued, offset=_offset(chain, ends))
                return enqueued
        finally:
            if stream is not None and chain is None:
                torch.cuda.current_stream(x.device).wait_stream(stream)


def _enqueue_together(
    f: nn.Module,
    x: Tensor,
    stacked: Stacked,
    *,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int | None = None,
) -> list[Enqueued] | None:
    """`enqueue` of all stacked networks by one launch of CUDA kernels; None where there are none for them: for what is no chain, or
    one of weights that are computed from the parameters, for method "jacobian", under autocast."""
    if method not in METHODS[:3] or not _native.on_cuda(x) or torch.is_autocast_enabled(x.device.type):
        return None
    x, precision = x.detach(), torch.get_float32_matmul_precision()
    midpoint = None if method == "path" else method == "hermite-midpoint"
    ends: list[Tensor] = []
    for number in range(len(x)):
        with loaded(f, stacked, number):
            if number == 0:
                nodes, weights = path_nodes(rule, points)
                check_budget(budget)
                checked_samples(f, x[0])
            with evaluating(f) as kept:
                if not kept.in_order:
                    ends.append(first_outputs(Calls(f, kept.put_back), x[number], None))
                if number == 0:
                    chain = recognise(f)
        if number == 0:
            chains = None if chain is None or not has_kernel_of(chain, x[0]) else stack_of(chain, stacked)
            width = None if chains is None else chains.weights[0].shape[-1]
            if chains is None or x[0, 0].numel() != width or chains.weights[0].dtype != x.dtype:
                return None
            if kept.in_order:  # of such nothing else can come out than what the chain gives
                break
    with torch.no_grad():
        outputs = chains(x)
        if ends and not all(_is_like(y, outputs[0]) for y in ends):
            return None
        L, counts, each = stack_connectivity(chains, x, nodes, weights, midpoint)
        y, again = (torch.stack(ends), outputs) if ends else (outputs, None)
        findings = StackFindings(x, y, again, L, counts)
    return [
        Enqueued(
            one,
            _precision(precision, chain, x),
            y.shape[2],
            offset=partial(lambda number: _offset(chains.of_network(number), y[number]), number),
            findings=findings.of_network(number),
            together=L,
        )
        for number, one in enumerate(each)
    ]


def _is_like(values: Tensor, ends: Tensor) -> bool:
    """Whether one pass can compare them."""
    return (values.shape, values.dtype, values.device) == (ends.shape, ends.dtype, ends.device)


def _precision(setting: str, chain: Chain | None, x: Tensor) -> str:
    """As `Measurement.precision`; the setting is torch's."""
    if x.dtype == torch.float64:
        return "float64"
    if chain is not None:
        return "highest" if x.device.type == "cpu" else setting
    if torch.is_autocast_enabled(x.device.type):
        return str(torch.get_autocast_dtype(x.device.type)).removeprefix("torch.")
    return setting if x.dtype == torch.float32 else str(x.dtype).removeprefix("torch.")


def _offset(chain: Chain | None, ends: Tensor) -> Tensor:
    """The size of outputs (N, K) in units of their range over the samples, which a hundredth of the outputs exceed.

    0 where the size is below ten ranges, or where rounding it hides less than a ten-thousandth of the range: saturated and
    dead units are constant by right. An output that is the same for all samples is dead, too, unless it is so large that
    rounding would hide as much of a range of 1: inf. The kernels of a chain leave its last bias out, so that is no offset.
    """
    if chain is not None and chain.biases[-1] is not None:
        ends = ends - chain.biases[-1]
    low, high = (values.double() for values in ends.aminmax(dim=0))
    size = torch.maximum(low.abs(), high.abs())
    tolerated = max(10.0, 1e-4 / (CONSTANT_ULPS * torch.finfo(ends.dtype).eps))
    swallowed = torch.where(size >= tolerated, math.inf, 0.0) if chain is None else torch.zeros_like(size)
    ratio = torch.where(high > low, size / (high - low), swallowed)
    ratio = ratio.topk(math.ceil(OFFSET_SHARE * len(ratio))).values[-1]
    return torch.where(ratio >= tolerated, ratio, 0.0)


def _hoisted(calls: Calls, x: Tensor, ends: Tensor, checks: Checks) -> tuple[Calls, Tensor]:
    """f without the affine maps that it begins with, and its samples behind those; f and x where it has none."""
    parts = affine_start(calls.f)
    if parts is None:
        return calls, x
    first, rest = parts
    samples = first(x).detach()
    if torch.is_autocast_enabled(x.device.type) and samples.dtype != x.dtype:
        samples = samples.to(x.dtype)  # paths between them need not be in low precision
    after = Calls(rest, calls.begin_anew, calls.shape)
    same = checks.same(outputs_of(after, samples.clone()), ends)
    return (after, samples) if same else (calls, x)


def _between(f: Calls, points: Tensor, x: Tensor, ends: Tensor, checks: Checks) -> Tensor:
    """f's outputs (B, K) at points (B + B', *in), of which the last B' are left to samples that have to come out as before:
    f may depend on how many rows there are, or on the calls before."""
    rows = rows_between(len(x))
    samples = points[len(points) - len(rows) :]
    for place, row in zip(samples, rows):
        place.copy_(x[row])
    y = outputs_of(f, points)
    checks.repeats(f, x, ends, y[-len(rows) :], rows, f"a batch of {len(points)}, after other batches")
    return y[: -len(rows)]


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    """Makes a stream the current one; None leaves CUDA alone, where torch's own context would initialise it."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _copied(chain: Chain) -> Chain:
    return replace(
        chain,
        weights=tuple(w.clone() for w in chain.weights),
        biases=tuple(None if b is None else b.clone() for b in chain.biases),
    )


def _generic(
    f: Calls,
    x: Tensor,
    ends: Tensor,
    nodes: Tensor,
    weights: Tensor,
    tile: int,
    allocated: int,
    checks: Checks,
    progress: Progress | None,
) -> ChainConnectivity:
    """Calls f on tiles of points of paths; the paths' ends are f's outputs on the samples. f took ``allocated`` bytes for all
    of these."""
    original, ends = ends, widened(ends)
    L = torch.ones(len(x), len(x), dtype=ends.dtype, device=x.device)
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    t = _like(x, nodes[1:-1]).reshape(-1, *[1] * (x.dim() - 1))
    if x.device.type == "cpu":
        keep_freed_pages()
    widened_f = Widened(f, x, original)
    samples = len(rows_between(len(x)))
    most = tile_pairs(tile, len(x), allocated, len(t))
    finished = 0
    for first, second in _pairs(len(x), most, x.device):
        pairs = len(first)
        # A path between close samples has few points in their own dtype.
        apart = ~_indistinct(x[first], x[second])
        if not apart.all():
            i, j = first[~apart], second[~apart]
            near = (x[i] != x[j]).flatten(1).any(1)  # the others are equal, and their entry is 1
            L[i[near], j[near]] = L[j[near], i[near]] = UNRESOLVED
            counts[1] += near.sum()
            first, second = first[apart], second[apart]
        r2 = x.new_empty(len(first), dtype=ends.dtype)
        done = 0
        while done < len(first):
            pair = slice(done, done + most)
            try:
                pairs = len(first[pair])
                points = x.new_empty(pairs * len(t) + samples, *x.shape[1:])
                on_paths = points[: pairs * len(t)].unflatten(0, (pairs, len(t)))
                torch.lerp(x[first[pair], None], x[second[pair], None], t, out=on_paths)
                y = widened(_between(f, points, x, original, checks)).reshape(-1, len(t), ends.shape[1])
                r2[pair], found = torch.ops.lmnfast.path_r2(
                    y, ends, first[pair], second[pair], nodes, weights, widened_f.rounding
                )
                counts += found
            except RuntimeError as error:
                if most == 1 or not out_of_memory(error):
                    raise
                most = -(-most // 2)  # for good; what has been measured stays
                continue
            done += most
        L[first, second] = r2
        L[second, first] = r2
        if progress is not None:
            finished += pairs
            progress(2 * finished / (len(x) * (len(x) - 1)))

    def resolved() -> None:
        if int(counts[1]):
            points = max(1, tile * len(x) // allocated // 4)  # float64 takes more memory
            values, noise = widened_f.values(), widened_f.noise()
            resolve(values, x, L, counts, nodes, weights, points=points, noise=noise)

    return ChainConnectivity(L, counts, resolved)


def _indistinct(first: Tensor, second: Tensor) -> Tensor:
    """Which pairs of samples are close, see `are_close`; in float64 only those that are equal."""
    if first.dtype == torch.float64:
        return (first == second).flatten(1).all(1)
    return are_close(first, second)


def _nothing() -> None:
    """There are no unresolved pairs."""


def _generic_hermite(
    f: Calls,
    x: Tensor,
    ends: Tensor,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool,
    tile: int,
    allocated: int,
    checks: Checks,
    progress: Progress | None,
) -> ChainConnectivity:
    """The polynomials' r2 from Jacobians of two tiles of samples at a time; f took ``allocated`` bytes for all samples.

    With A and B the slopes at both ends less the chord's and C the midpoint's distance from the chord, the residual is
    ``e(t) = A t (1-t)^2 - B t^2 (1-t) + 16 t^2 (1-t)^2 (C - (A - B)/8)``, without C the first two terms.
    """
    y, outputs, inputs = widened(ends), ends.shape[1], x[0].numel()
    L = torch.ones(len(x), len(x), dtype=y.dtype, device=x.device)
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    sample = torch.arange(len(x), device=x.device)
    differentiated = Differentiated(f, x, ends, allocated, tile // 2, checks)
    moments = _PolynomialMoments(nodes, weights, midpoint)
    widened_f = Widened(f, x, ends)
    # What outputs are computed from, and below what nothing is known of an output; see csrc/statistics.h.
    errors = torch.zeros_like(y) if widened_f.errors is None else widened_f.errors.to(y.dtype)
    rounding, least = y.abs().amax(0) * LEAST_ROUNDING + errors.amax(0), errors / CONSTANT_ULPS
    # A quarter of the tile for each of two tiles of Jacobians, half of it for what the pairs of them take.
    pair = y.element_size() * (inputs + 8 * outputs) + (-(-allocated // len(x)) if midpoint else 0)
    most = max(1, tile // max(4 * y.element_size() * outputs * inputs, 2 * pair))
    flat = widened(x.flatten(1))
    for begin in range(0, len(x), most):
        J_first = differentiated(begin, min(begin + most, len(x)))
        for other in range(begin, len(x), most):
            J_second = J_first if other == begin else differentiated(other, min(other + most, len(x)))
            together = max(1, tile // (2 * pair * len(J_second)))
            for i in range(begin, begin + len(J_first), together):
                first = slice(i, min(i + together, begin + len(J_first)))
                second = slice(max(i, other), other + len(J_second))
                # Differences before products: close samples keep their digits.
                step = flat[second] - flat[first, None]  # [first, second, inputs]
                chord = y[second] - y[first, None]  # [first, second, outputs]
                A = step @ J_first[first.start - begin : first.stop - begin].mT - chord
                B = (step.transpose(0, 1) @ J_second[second.start - other :].mT).transpose(0, 1) - chord
                values = [A, B]
                if midpoint:
                    values.append(_half_way(f, x, ends, first, second, checks))
                magnitude = torch.maximum(y[first, None].abs(), y[second].abs())
                length = step.abs().amax(-1)
                # The slopes of an output that is 0 at both ends may be rounding alone, as GELU's far below zero.
                slight = torch.where(magnitude == 0, torch.maximum(length[..., None], rounding), rounding)
                share, constant, unresolved = moments.nonlinear_share(
                    chord, values, magnitude, slight, torch.maximum(least[first, None], least[second])
                )
                left = unresolved.any(-1)
                if x.dtype != torch.float64:
                    largest = torch.maximum(flat[second].abs().amax(1), flat[first, None].abs().amax(2))
                    left |= length <= CLOSE * largest
                equal = (step == 0).all(-1)
                r2 = torch.where(left, UNRESOLVED, 1 - share.mean(-1))
                r2 = torch.where(equal, 1.0, r2)
                above = ~equal & (sample[second] > sample[first, None])
                counts[0] += (constant & (above & ~left)[..., None]).sum()
                counts[1] += (left & above).sum()
                if second.start == i:  # the samples' own paths, and those of one another twice
                    own = r2[:, : len(r2)]
                    own.copy_(own.triu(1) + own.triu(1).mT).fill_diagonal_(1)
                L[first, second], L[second, first] = r2, r2.mT
        if progress is not None:
            later = len(x) - begin - len(J_first)  # samples whose pairs among themselves are to come
            progress(1 - (later / len(x)) ** 2)

    def resolved() -> None:
        if int(counts[1]):
            points = max(1, tile // 4 * len(x) // allocated)
            values, noise = widened_f.values(), widened_f.noise()
            resolve(values, x, L, counts, nodes, weights, points=points, midpoint=midpoint, noise=noise)

    return ChainConnectivity(L, counts, resolved)


def _half_way(f: Calls, x: Tensor, ends: Tensor, first: slice, second: slice, checks: Checks) -> Tensor:
    """f's distance from the chord at the midpoints of the paths with i < j; 0 for the other pairs."""
    y = widened(ends)
    sample = torch.arange(len(x), device=x.device)
    i, j = (sample[second] > sample[first, None]).nonzero(as_tuple=True)
    result = y.new_zeros(first.stop - first.start, second.stop - second.start, y.shape[1])
    i, j = i + first.start, j + second.start
    if len(i):
        points = x.new_empty(len(i) + len(rows_between(len(x))), *x.shape[1:])
        torch.lerp(x[i], x[j], 0.5, out=points[: len(i)])
        middle = widened(_between(f, points, x, ends, checks))
        result[i - first.start, j - second.start] = middle - torch.lerp(y[i], y[j], 0.5)
    return result


class _PolynomialMoments:
    """Sums over the nodes of the polynomials that carry A, B and C, once; see csrc/statistics.h."""

    def __init__(self, nodes: Tensor, weights: Tensor, midpoint: bool) -> None:
        t = nodes - weights @ nodes
        self.variance_t = float(weights @ t**2)
        bump = 16 * (nodes * (1 - nodes)) ** 2
        half = bump / 8 if midpoint else 0 * bump
        phi = torch.stack(
            [nodes * (1 - nodes) ** 2 - half, half - nodes**2 * (1 - nodes), bump][: 2 + midpoint]
        )
        e, te = phi @ weights, phi @ (weights * t)
        self.te = te.tolist()
        # var(t) var(e) - cov(e, t)^2 as a quadratic form of the values
        self.residual = (
            self.variance_t * ((phi * weights) @ phi.mT - torch.outer(e, e)) - torch.outer(te, te)
        ).tolist()

    def nonlinear_share(
        self, chord: Tensor, values: list[Tensor], magnitude: Tensor, rounding: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """1 - r2, 0 for what is constant to rounding; what is constant; what is unresolved. ``values`` are overwritten."""
        scale = chord.abs()
        for value in values:
            torch.maximum(scale, value.abs(), out=scale)
        safe = torch.where(scale > 0, scale, 1.0)  # squares of tiny or huge outputs would not be finite
        covariance = chord * (self.variance_t / safe)
        for value, te in zip(values, self.te):
            covariance += value.div_(safe) * te
        nonlinear = torch.zeros_like(covariance)
        for v, value in enumerate(values):
            row = value * self.residual[v][v]
            for u in range(v):
                row += values[u] * (2 * self.residual[v][u])
            nonlinear += row.mul_(value)
        total = covariance.square_() + nonlinear.clamp_(min=0)
        epsilon = torch.finfo(chord.dtype).eps * self.variance_t**0.5
        variation = total.sqrt() * scale
        constant = (variation <= magnitude * (CONSTANT_ULPS * epsilon)) & (magnitude >= least)
        share = torch.where(constant, 0.0, nonlinear / total)  # of no use where it is unresolved
        ulps = RESOLVED_ULPS[chord.dtype]
        return share, constant, ~(variation > torch.hypot(magnitude, rounding) * (ulps * epsilon)) & ~constant


def _of_jacobians(
    f: Calls, chain: Chain | None, x: Tensor, ends: Tensor, allocated: int, checks: Checks
) -> Tensor:
    """1 - |J_i - J_j|^2 / (|J_i|^2 + |J_j|^2), from the distances of jacobian_distances."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if chain is None:
        rows = other_features(f, x, ends, allocated, False, checks)
        return _with_norms(rows, x, ends.shape[1] * x[0].numel(), dtype)[0]
    if all(a.name == "identity" for a in chain.activations):
        return torch.ones(len(x), len(x), dtype=dtype, device=x.device)
    return with_features(chain, x, ends, False, lambda rows, width: _with_norms(rows, x, width, dtype))


def _with_norms(
    rows: Callable[[int, int], Tensor], x: Tensor, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same of rows of features, in place of Jacobians; and the rows' norms (N, 1)."""
    norms = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def with_norms(begin: int, end: int) -> Tensor:
        features = rows(begin, end)
        norms[begin:end] = torch.linalg.vector_norm(features, dim=1)
        return features

    L = tiled(with_norms, len(x), width, False, dtype)
    # Distances over norms, and squared only then: squares of tiny or huge Jacobians would not be finite.
    for begin in range(0, len(x), 256):
        end = min(begin + 256, len(x))
        least, largest = (of(norms[begin:end, None], norms[begin:]) for of in (torch.minimum, torch.maximum))
        # Not torch's hypot, which has other last bits where it is not vectorised.
        both = largest * (1 + (least / torch.where(largest > 0, largest, 1.0)).square()).sqrt()
        share = L[begin:end, begin:] / torch.where(both > 0, both, 1.0)
        some = 1 - share.square()
        own = some[:, : end - begin]
        own.copy_(own.triu(1) + own.triu(1).mT).fill_diagonal_(1)
        L[begin:end, begin:] = some
        L[end:, begin:end] = some[:, end - begin :].mT
    return L, norms[:, None].to(dtype)


def _like(x: Tensor, values: Tensor) -> Tensor:
    """values in x's dtype on x's device."""
    return on_device(values.to(x.dtype), x.device)


def _pairs(samples: int, tile: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs i < j, row by row, in tiles; never all their indices at once."""
    row_starts = torch.arange(samples, device=device).neg().add(samples - 1).cumsum(0)
    for start in range(0, samples * (samples - 1) // 2, tile):
        pair = torch.arange(start, min(start + tile, samples * (samples - 1) // 2), device=device)
        first = torch.searchsorted(row_starts, pair, right=True)
        yield first, pair - row_starts[first] + samples
