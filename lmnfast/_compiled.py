"""Tails that torch.compile compiles: one graph for tiles of any number of points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ._hook_tail import MANY_ROWS
from ._outputs import COMPILED
from ._route import find_route
from ._undisturbed import evaluating


def compiled(tail: nn.Module, samples: Tensor, name: str) -> nn.Module:
    """The tail compiled, which takes seconds; the tail itself if a kernel measures it, as calls of it do not matter then.

    The parameters are arguments of what is compiled, so it follows the training. It runs on the paths alone: derivatives are
    those of the tail itself, see `prepared`.

    Raises:
        ValueError: the tail is no graph of torch's functions.
        RuntimeError: torch.compile does not work here, or not for this tail.
    """
    if not isinstance(tail, fx.GraphModule):
        why = getattr(tail, "why", "") or "torch.fx cannot trace it"
        raise ValueError(
            f"compile: the part behind {name!r} is no graph of torch's functions, as {why}; expected one, or compile=False"
        )
    if find_route(tail, samples, "path").kind in ("fused", "block"):
        return tail
    setattr(tail, COMPILED, True)
    result: Any = torch.compile(tail, fullgraph=True)
    try:
        with evaluating(result):  # as in a measurement: what is compiled holds for its grad mode
            rows = samples[torch.arange(MANY_ROWS, device=samples.device) % len(samples)].clone()
            torch._dynamo.mark_dynamic(rows, 0)
            result(rows)
    except Exception as error:  # torch has no common class for what may go wrong
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        raise RuntimeError(
            f"compile: torch.compile fails on the part behind {name!r} ({type(error).__name__}: {lines[0][:200]}); expected a "
            "machine with a compiler that it can use (g++ for CPUs, Triton for CUDA), or compile=False"
        ) from error
    return result
