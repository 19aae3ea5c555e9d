"""Finds the affine maps at the beginning of a traced tail."""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from ._chain import IDENTITY
from ._tracing import graph_after
from ._undisturbed import hooked
from ._vocabulary import FLATTEN, FUNCTIONS, MODULES, TENSOR_METHODS, is_plain

# Affine in eval mode.
AFFINE_MODULES = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AvgPool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
    ),
)
AFFINE_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def affine_start(f: Any) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """Splits a traced tail into the affine maps at its beginning and the rest.

    An affine map commutes with the path. If it is applied to the N samples, it need not be applied to the points between
    them. Returns None if f is no traced tail, or does not begin with an affine map.
    """
    if not isinstance(f, fx.GraphModule) or not is_plain(f):
        return None
    end = start = next(node for node in f.graph.nodes if node.op == "placeholder")
    maps = 0
    while len(end.users) == 1:
        node = next(iter(end.users))
        step = _affine_step(node, end, f)
        if step is None:
            break
        maps += step
        end = node
    if not maps:
        return None
    first = fx.Graph()
    copies = {start: first.placeholder("samples")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = first.node_copy(node, copied)
        return copies[node]

    first.output(copied(end))
    return fx.GraphModule(f, first), graph_after(f.graph, f, [end])


def _affine_step(node: fx.Node, before: fx.Node, root: nn.Module) -> int | None:
    """Counts the affine maps in a step: 1 for an affine map, 0 for a step that only moves values, None for other steps.

    The step may work on the result `before` and on parameters only.
    """
    if not node.args or node.args[0] is not before:
        return None
    if any(other is not before and other.op != "get_attr" for other in node.all_input_nodes):
        return None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if not is_plain(module) or hooked(module, backward=True):
            return None
        if type(module) in AFFINE_MODULES:
            # Batch norm without running statistics uses those of the batch, so it is not affine.
            return 1 if getattr(module, "running_mean", True) is not None else None
        return 0 if type(module) in MODULES and MODULES[type(module)](module) in (IDENTITY, FLATTEN) else None
    if node.target in AFFINE_FUNCTIONS:
        return 1
    if node.target == "detach":  # in front of the path it would have no effect
        return None
    table: dict[Any, Any] = FUNCTIONS if node.op == "call_function" else TENSOR_METHODS
    step = table[node.target](*node.args, **node.kwargs) if node.target in table else None
    if node.target is operator.getitem and _keeps_rows(node.args[1]):
        return 0
    return 0 if step in (IDENTITY, FLATTEN) else None


def _keeps_rows(index: Any) -> bool:
    """Whether an index takes the same elements of every sample, as [:, -1] does."""
    fixed = isinstance(index, tuple) and index[:1] == (slice(None),)
    return fixed and all(type(i) in (int, slice, type(None), type(...)) for i in index)
