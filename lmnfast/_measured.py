"""Checked connectivities, with progress, and of several networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from . import _native
from ._block import wide_block
from ._chain import Chain
from ._checks import Checks, NotTheChain
from ._enqueue import Enqueued, enqueue
from ._native import Progress
from ._prepare import precision_of
from ._route import why_no_kernel
from ._settings import Settings
from ._stacked import Stacked, loaded, networks_in
from ._threads import alone
from ._together import enqueue_together
from ._whole import Part
from .ops.path_connectivity import ChainConnectivity, chain_connectivity


def matrix_of(enqueued: Enqueued, pooled: bool) -> Tensor:
    """L, or r2 pooled over the outputs."""
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
    return torch.stack([matrix_of(one, pooled) for one in each])


def measured(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    progress: bool | Progress = False,
    known: Chain | None = None,
    expected: Tensor | None = None,
    part: Part | None = None,
) -> list[Enqueued]:
    """One checked connectivity.

    Arguments and errors as in :func:`lmnfast.connectivity`. known, expected, part: as of `enqueue`.
    """
    with alone(), reported(progress) as report:
        how = partial(enqueue, f, x, settings, progress=report, expected=expected, part=part)
        enqueued = _checked(how(known=known), partial(how, fuse=False))
        if report is not None:
            report(1.0)
        return [enqueued]


def measured_chain(
    chain: Chain,
    x: Tensor,
    expected: Tensor | None,
    settings: Settings,
    run: Callable[[], ChainConnectivity] | None = None,
) -> Enqueued | None:
    """`measured` of a function that is known to be a chain, in the time of the kernel: the function is not called.

    expected: the function's outputs, against which the chain is checked. None: the caller answers for the chain.
    run: calls the kernel in place of `chain_connectivity`, after the checks of the samples and the outputs.
    None where `measured` would do something else: on CUDA, under autocast, for a chain that is measured as a block, and if the
    chain's outputs are not the expected ones.
    """
    if (
        _native.on_cuda(x)
        or torch.is_autocast_enabled(x.device.type)
        or x.dtype != chain.weights[0].dtype
        or why_no_kernel(chain, x, "path")
        or wide_block(chain)
    ):
        return None
    checks = Checks(deferred=False)
    checks.finite("x", x)
    if expected is not None:
        ends = expected.reshape(len(x), -1)
        checks.finite("f(x)", ends)
        if not checks.reproduces(chain, x, ends):
            return None
    how = *settings.nodes, settings.midpoint, settings.statistic
    found = chain_connectivity(chain, x, *how) if run is None else run()
    found.resolve()
    checks.entries(found.L)
    precision = precision_of(torch.get_float32_matmul_precision(), True, x)
    return Enqueued(found, precision, len(chain.weights[-1]), kind="fused")


def _checked(enqueued: Enqueued, again: Callable[[], Enqueued]) -> Enqueued:
    """The connectivity after its check; of `again` if f turns out not to be its chain."""
    try:
        enqueued.check()
    except NotTheChain:
        enqueued = again()
        enqueued.check()
    return enqueued


def measured_stack(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    progress: bool | Progress = False,
    *,
    stacked: Stacked,
) -> list[Enqueued]:
    """A checked connectivity for each of the stacked networks; arguments and errors as in :func:`lmnfast.connectivity`.

    A device gets the work of all networks before this function waits for any of them. Chains go in one launch.
    """
    with alone(), reported(progress) as report:
        f, networks = _stacked_networks(f, x, stacked)

        def again(number: int) -> Enqueued:
            with loaded(f, stacked, number):
                return enqueue(f, x[number], settings, progress=shares[number], fuse=False)

        shares = [share_of(report, number, networks) for number in range(networks)]
        results = enqueue_together(f, x, settings, stacked) or []
        if results and report is not None:
            report(1.0)
        for number in range(len(results), networks):
            with loaded(f, stacked, number):
                results.append(enqueue(f, x[number], settings, progress=shares[number]))
            if report is not None:
                report((number + 1) / networks)
        return [_checked(each, partial(again, number)) for number, each in enumerate(results)]


def warn_of_offsets(each: Sequence[Enqueued], name: str = "f") -> None:
    """Warns the caller of the caller, once, if an offset hides the outputs in some of these connectivities."""
    if problems := [problem for enqueued in each if (problem := enqueued.offset_problem())]:
        warnings.warn(f"{name}: {problems[0]}", stacklevel=3)


@contextmanager
def reported(progress: bool | Progress) -> Iterator[Progress | None]:
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
