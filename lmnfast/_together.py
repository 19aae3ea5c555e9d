"""Measures several networks of one structure by one launch of each CUDA kernel."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from . import _native
from ._checks import StackFindings, is_like
from ._enqueue import Enqueued, offset_of
from ._outputs import Calls, first_outputs
from ._prepare import precision_of, prepared
from ._settings import Settings
from ._stacked import ChainStack, Stacked, loaded, stack_of
from ._undisturbed import evaluating
from .ops.path_connectivity import stack_connectivity


def enqueue_together(f: nn.Module, x: Tensor, settings: Settings, stacked: Stacked) -> list[Enqueued] | None:
    """`enqueue` of all stacked networks on samples (networks, N, *in).

    Returns None if no CUDA kernel takes the networks together: for a function that is no chain, for a chain whose weights are
    computed from the parameters, for method "jacobian", under autocast, and on other devices.
    """
    if settings.method == "jacobian" or not _native.on_cuda(x) or torch.is_autocast_enabled(x.device.type):
        return None
    x, setting = x.detach(), torch.get_float32_matmul_precision()
    found = _chains_and_outputs(f, x, settings, stacked)
    if found is None:
        return None
    chains, ends = found
    with torch.no_grad():
        outputs = chains(x)
        if not all(is_like(y, outputs[0]) for y in ends):
            return None
        nodes, weights = settings.nodes
        L, counts, pooled, each = stack_connectivity(
            chains, x, nodes, weights, settings.midpoint, settings.statistic
        )
        y, again = (torch.stack(ends), outputs) if ends else (outputs, None)
        findings = StackFindings(x, y, again, L, counts)
    return [
        Enqueued(
            one,
            precision_of(setting, True, x),
            y.shape[2],
            offset=partial(_offset_of_network, chains, y, number),
            findings=findings.of_network(number),
            together=(L, pooled),
        )
        for number, one in enumerate(each)
    ]


def _offset_of_network(chains: ChainStack, y: Tensor, number: int) -> Tensor:
    return offset_of(chains.of_network(number), y[number])


def _chains_and_outputs(
    f: nn.Module, x: Tensor, settings: Settings, stacked: Stacked
) -> tuple[ChainStack, list[Tensor]] | None:
    """The networks' chains and outputs, (N, K) each; None if the networks are not chains that one launch can take.

    The list of outputs is empty if the networks are sequences of torch's own modules: the chains then certainly give them.
    """
    with loaded(f, stacked, 0), prepared(f, x[0], settings.method, deferred=True, spare=True) as function:
        ends = [] if function.in_order else [function.ends]
        chain = function.chain
    chains = None if chain is None else stack_of(chain, stacked)
    if chains is None:
        return None
    first = chains.weights[0]
    if x[0, 0].numel() != first.shape[-1] or x.dtype != first.dtype:
        return None
    for number in range(1, len(x)) if ends else ():
        with loaded(f, stacked, number), evaluating(f) as kept:
            ends.append(first_outputs(Calls(f, kept.put_back), x[number], None))
    return chains, ends
