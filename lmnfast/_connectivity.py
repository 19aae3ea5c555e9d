"""The linear connectivity matrix of a network on a set of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

from torch import Tensor

from ._differentiable import check_differentiable, with_graph
from ._group import ALONE, Group, is_alone, measurer, refuse_group, refused_together, sharded
from ._group_rows import Rows
from ._measured import matrix_of, stacked_matrices, warn_of_offsets
from ._native import Progress
from ._settings import Settings, check_flag
from ._stacked import Stacked
from ._threads import one_core_after_fork


@overload
def connectivity(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = ...,
    points: int = ...,
    rule: str = ...,
    budget: int | None = ...,
    stacked: Stacked | None = ...,
    progress: bool | Progress = ...,
    pooled: bool = ...,
    stabiliser: float = ...,
    differentiable: bool = ...,
    group: Group = ...,
    gather: Literal[True] = ...,
) -> Tensor: ...


@overload
def connectivity(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = ...,
    points: int = ...,
    rule: str = ...,
    budget: int | None = ...,
    progress: bool | Progress = ...,
    pooled: bool = ...,
    stabiliser: float = ...,
    group: Group,
    gather: Literal[False],
) -> Rows: ...


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
    differentiable: bool = False,
    group: Group = ALONE,
    gather: bool = True,
) -> Tensor | Rows:
    """Linear connectivity matrix: how straight f's outputs run along the line between every two samples.

    ``L[i, j] = mean_k cov(y_k, t)^2 / (var(t) var(y_k))`` over the nodes t of the path ``x_i + t (x_j - x_i)``.
    An output that is constant to rounding counts 1. Chains of Linear and pointwise activations, also with residual
    blocks, run in one fused kernel. Any other f is called on tiles of path points. An ``nn.Module`` is measured in eval
    mode and left as it was. The result carries no autograd graph unless it is asked for.

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
        differentiable: give the result, whose values are the same, a graph to x and to the leaf tensors behind f that require
            grad, its parameters and others; a captured tensor that is no leaf gets no gradient itself. The backward pass
            computes the outputs along the paths again and stores none of them: a chain's in a fused kernel, any other f's by
            calls with gradients on tiles within the budget. f is differentiated in eval mode, too. There is no second
            derivative. Only with method "path", without `stacked`; docs/mathematics.md, "The gradient".
        group: a process group of torch.distributed, as torch.distributed.group.WORLD: its processes, which all make this call
            with the same arguments, measure a part of the pairs each. The result has the same bits for any number of processes
            with the same number of threads; docs/scale.md. Without `stacked` and `differentiable`. "alone": no group.
        gather: False leaves each process of the group with the rows of some samples. No process then holds the whole matrix.

    Returns:
        (N, N), symmetric, ones on the diagonal; float64 for float64 samples, otherwise float32. (B, N, N) with `stacked`.
        With gather=False a `Rows`.

    Raises:
        TypeError: x is not a floating-point tensor, f does not return a floating-point tensor, or the dtypes do not fit;
            differentiable is no bool.
        ValueError: no samples; unknown method or rule; points, budget or stabiliser out of range; pooled or a stabiliser with
            method "jacobian"; x and f on different devices; a NaN or
            Inf in samples, outputs or Jacobians (the message names the first sample; on CUDA, f may be called before this
            check); an f that is no chain and gives a sample other outputs in a smaller batch; with a method other than
            "path", an f that cannot be differentiated; differentiable with another method than "path", or with stacked; a group
            that is not initialised, or whose processes have different networks, samples or settings (on all of them, before any
            measuring; the message names what differs and where); gather=False without a group.
        RuntimeError: differentiable, and gradients are off, or neither x nor a tensor behind f requires grad; another process
            of the group failed.
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
        >>> L = lmnfast.connectivity(f, torch.randn(50, 8), differentiable=True)
        >>> (1 - L).mean().backward()
        >>> f[0].weight.grad.shape
        torch.Size([16, 8])
    """
    with refused_together(group):
        check_flag("differentiable", differentiable)
        check_flag("gather", gather)
        refuse_group(group, stacked=stacked, differentiable=differentiable)
        if not gather and is_alone(group):
            raise ValueError(f'gather: expected True with group "{ALONE}", got False')
        settings = Settings(method, points, rule, budget, stabiliser, bool(pooled))
        if differentiable:
            check_differentiable(settings, stacked)
    if differentiable:
        graph = with_graph(f, x, settings, progress=progress)
        warn_of_offsets([graph.enqueued])
        return graph.entries
    if not gather:
        found, first = sharded(
            f, x, settings, group, gather=False, progress=progress, function="connectivity"
        )
        rows = Rows.of(matrix_of(found, settings.pooled), first, len(x), group)
        warn_of_offsets([found])
        return rows
    each = measurer(group, stacked, function="connectivity")(f, x, settings, progress)
    warn_of_offsets(each)
    with one_core_after_fork():
        return (
            matrix_of(each[0], settings.pooled)
            if stacked is None
            else stacked_matrices(each, settings.pooled)
        )
