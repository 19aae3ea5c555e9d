"""The linear connectivity matrix of a network on a set of samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ._chain import Chain
from ._checks import NotTheChain
from ._enqueue import Enqueued, enqueue
from ._native import Progress
from ._settings import Settings
from ._stacked import Stacked, loaded, networks_in
from ._threads import alone, one_core_after_fork
from ._together import enqueue_together


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
    pooled: bool = False,
    stabiliser: float = 0.0,
) -> Tensor:
    """Linear connectivity matrix: how straight f's outputs run along the line between every two samples.

    ``L[i, j] = mean_k cov(y_k, t)^2 / (var(t) var(y_k))`` over the nodes t of the path ``x_i + t (x_j - x_i)``.
    An output that is constant to rounding counts 1. Chains of Linear and pointwise activations, also with residual
    blocks, run in one fused kernel. Any other f is called on tiles of path points. An ``nn.Module`` is measured in eval
    mode and left as it was. The result carries no autograd graph.

    The other methods are stand-ins for an f that is expensive to call. Always name the method with the number.
    docs/methods.md says how well each follows the definition.
    "hermite" replaces f on the path by the cubic that has f's outputs and its slopes ``J_i (x_j - x_i)``,
    ``J_j (x_j - x_i)`` at both ends. It differentiates f at the samples and never evaluates f between them.
    "hermite-midpoint" replaces f by the quartic that also has f's outputs at the midpoint. "jacobian" compares only the
    linear maps at the ends: ``L[i, j] = 1 - |J_i - J_j|^2 / (|J_i|^2 + |J_j|^2)``, in the Frobenius norm, from -1 to 1; 1 if
    both Jacobians are zero.

    Args:
        f: maps a batch (B, *in) to (B, *out), each row independent of the others. Outputs are flattened.
        x: (N, *in), floating point, the samples.
        method: "path", "hermite", "hermite-midpoint" or "jacobian".
        points: nodes on a path, ends included. No effect on "jacobian".
        rule: "uniform" (the definition, with 21 points) or "lobatto" (approximates the 21-point sums with fewer points).
        budget: bytes for a tile of path points or Jacobians together with f's intermediate results, as many as exist at one
            time. None: 256 MiB on the CPU. On CUDA a quarter of the card's free memory, at most 4 GiB; memory that torch's
            allocator holds unused counts as free. On the CPU a tile of path points has at most 8 MiB (24 if f is compiled), so
            that it stays near the caches. A tile has whole pairs, at least one. If a device still runs out of memory, tiles are
            halved until they fit.
        stacked: parameters and buffers of B networks with the structure of the module f, as torch.func.stack_module_state
            returns them. x is then (B, N, *in), samples for each network. On CUDA chains are measured together, with the
            same bits.
        progress: True shows a bar (needs tqdm). A function receives the share that is done, from 0 to 1, about ten times a
            second, or after each tile of paths. It runs in this thread, and an exception from it ends the measurement. A
            fused kernel on CUDA and method "jacobian" report only the end.
        pooled: pool the outputs: ``R2[i, j] = sum_k cov(y_k, t)^2 / (var(t) sum_k var(y_k))``, the share of the path's variance
            on its regression line. A rotation or a common scale of the outputs does not change it. docs/mathematics.md.
        stabiliser: is added to the denominators, ``cov^2 / (var(t) var(y) + stabiliser)``, in the square of the outputs' unit.
            An output that hardly varies then counts as bent, and the scale of the outputs matters. The definition has 0; the
            matrices of the paper's figures are those of 8e-8.

    Returns:
        (N, N), symmetric, ones on the diagonal; float64 for float64 samples, otherwise float32. (B, N, N) with `stacked`.

    Raises:
        TypeError: x is not a floating-point tensor, f does not return a floating-point tensor, or the dtypes do not fit.
        ValueError: no samples; unknown method or rule; points, budget or stabiliser out of range; pooled or a stabiliser with
            method "jacobian"; x and f on different devices; a NaN or
            Inf in samples, outputs or Jacobians (the message names the first sample; on CUDA, f may be called before this
            check); an f that is no chain and gives a sample other outputs in a smaller batch; with a method other than
            "path", an f that cannot be differentiated.
        ImportError: progress is True and tqdm is missing.
        KeyboardInterrupt: Ctrl-C, also while a kernel runs.

    Source:
        arXiv 2310.05918, Eq. 1-2. "hermite" and "hermite-midpoint": docs/methods.md. `pooled`, `stabiliser`: docs/number.md.

    Example:
        >>> f = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> L = lmnfast.connectivity(f, torch.randn(50, 8))
        >>> L.shape, bool((L == L.T).all()), bool((L.diagonal() == 1).all())
        (torch.Size([50, 50]), True, True)
        >>> bool((lmnfast.connectivity(nn.Linear(8, 3), torch.randn(50, 8)) > 0.9999).all())  # a linear map
        True
    """
    settings = Settings(method, points, rule, budget, stabiliser, bool(pooled))
    each = measured(f, x, settings, stacked, progress)
    warn_of_offsets(each)
    with one_core_after_fork():
        return (
            _matrix(each[0], settings.pooled) if stacked is None else stacked_matrices(each, settings.pooled)
        )


def _matrix(enqueued: Enqueued, pooled: bool) -> Tensor:
    if not pooled:
        return enqueued.L
    assert enqueued.pooled is not None
    return enqueued.pooled


def stacked_matrices(each: Sequence[Enqueued], pooled: bool = False) -> Tensor:
    """Connectivities as (networks, N, N). If one launch has measured all networks, its result without a copy."""
    together = each[0].together
    if together is not None and all(one.together is together for one in each):
        whole = together[int(pooled)]
        assert whole is not None
        return whole
    return torch.stack([_matrix(one, pooled) for one in each])


def measured(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    stacked: Stacked | None = None,
    progress: bool | Progress = False,
    known: Chain | None = None,
    expected: Tensor | None = None,
) -> list[Enqueued]:
    """Checked connectivities: one, or one for each of the stacked networks.

    Arguments and errors as in :func:`connectivity`. known, expected: as of `enqueue`, without `stacked`.
    """
    with alone(), _reported(progress) as report:
        if stacked is not None:
            return _measured_stack(f, x, settings, stacked, report)
        how = partial(enqueue, f, x, settings, progress=report, expected=expected)
        enqueued = _checked(how(known=known), partial(how, fuse=False))
        if report is not None:
            report(1.0)
        return [enqueued]


def _checked(enqueued: Enqueued, again: Callable[[], Enqueued]) -> Enqueued:
    """The connectivity after its check; of `again` if f turns out not to be its chain."""
    try:
        enqueued.check()
    except NotTheChain:
        enqueued = again()
        enqueued.check()
    return enqueued


def _measured_stack(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    stacked: Stacked,
    report: Progress | None,
) -> list[Enqueued]:
    """As `measured`. A device gets the work of all networks before this function waits for any of them.

    Chains go in one launch.
    """
    f, networks = _stacked_networks(f, x, stacked)

    def one(number: int, fuse: bool = True) -> Enqueued:
        with loaded(f, stacked, number):
            return enqueue(f, x[number], settings, progress=share_of(report, number, networks), fuse=fuse)

    results = enqueue_together(f, x, settings, stacked) or []
    if results and report is not None:
        report(1.0)
    for number in range(len(results), networks):
        results.append(one(number))
        if report is not None:
            report((number + 1) / networks)
    return [_checked(each, partial(one, number, fuse=False)) for number, each in enumerate(results)]


def warn_of_offsets(each: Sequence[Enqueued], name: str = "f") -> None:
    """Warns the caller of the caller, once, if an offset hides the outputs in some of these connectivities."""
    if problems := [problem for enqueued in each if (problem := enqueued.offset_problem())]:
        warnings.warn(f"{name}: {problems[0]}", stacklevel=3)


@contextmanager
def _reported(progress: bool | Progress) -> Iterator[Progress | None]:
    """The function that receives the share that is done; None if no progress is asked for."""
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


def share_of(report: Progress | None, number: int, count: int) -> Progress | None:
    """Turns the share done of one measurement into the share done of all, for measurements one after the other."""
    return None if report is None else lambda done: report((number + done) / count)


def _stacked_networks(f: Callable[[Tensor], Tensor], x: Tensor, stacked: Stacked) -> tuple[nn.Module, int]:
    """f, and the number of networks. Checks that x has samples for each network."""
    if not isinstance(f, nn.Module):
        raise TypeError(f"f: expected an nn.Module to load stacked parameters into, got {type(f).__name__}")
    networks = networks_in(stacked)
    if not isinstance(x, Tensor) or x.dim() < 3 or len(x) != networks:
        raise ValueError(
            f"x: expected samples ({networks}, N, *in), a set for each of the stacked networks, got shape "
            f"{tuple(getattr(x, 'shape', ()))}; x.expand({networks}, *x.shape) gives all of them the same"
        )
    return f, networks
