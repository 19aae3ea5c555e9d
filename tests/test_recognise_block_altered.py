"""Graphs of blocks that are altered at random are refused, or are what the recognised block computes."""

import copy
import operator
import random

import pytest
import torch
import torch.nn.functional as F
from test_recognise_block import FORMS, UNITS, WIDTH, written
from torch import fx

from lmnfast._recognise import NotAChain
from lmnfast._recognise_block import block_or_reason

NUMBERS = [0, 1, 2, -1, 0.5, 1e-5, 1e-3, 3.0, WIDTH, UNITS]
BINARY = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.iadd,
    operator.imul,
    torch.maximum,
]
UNARY = [torch.tanh, torch.sigmoid, F.silu, F.gelu, torch.relu, torch.neg, torch.square, F.relu_, torch.clone]
PARTS = [0, (..., slice(None, UNITS)), (..., slice(-4, None)), slice(None, -1)]


def other_number(argument, draw):
    return draw.choice(NUMBERS) if type(argument) in (int, float) and draw.random() < 0.6 else argument


def inserted(graph, node, before, draw):
    """A call on the result of a node, in its place."""
    calls = [
        lambda: graph.call_function(draw.choice(UNARY), (node,)),
        lambda: graph.call_function(draw.choice(BINARY), (node, draw.choice([*before, *NUMBERS]))),
        lambda: graph.call_method("view", (node, -1, draw.choice([WIDTH, UNITS]))),
        lambda: graph.call_method("mean", (node, draw.choice([-1, 1])), {"keepdim": True}),
        lambda: graph.call_function(operator.getitem, (node, draw.choice(PARTS))),
        lambda: graph.call_method("flatten", (node, draw.choice([0, 1]), draw.choice([-1, -2]))),
    ]
    with graph.inserting_after(node):
        made = draw.choice(calls)()
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def altered(module, draw):
    module = copy.deepcopy(module)
    graph = module.graph
    for _ in range(draw.choice([1, 1, 2])):
        node = draw.choice(
            [n for n in graph.nodes if n.op in ("call_function", "call_method", "call_module")]
        )
        nodes = list(graph.nodes)
        before = nodes[: nodes.index(node)]
        how = draw.randrange(5)
        if how == 0:
            node.replace_input_with(draw.choice(node.all_input_nodes), draw.choice(before))
        elif how == 1:
            node.args = fx.node.map_aggregate(node.args, lambda a: other_number(a, draw))
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: other_number(a, draw))
        elif how == 2 and node.op == "call_function":
            node.target = draw.choice(BINARY if len(node.args) > 1 else UNARY)
        elif how == 3:
            node.replace_all_uses_with(draw.choice(node.all_input_nodes))
        else:
            inserted(graph, node, before, draw)
    module.recompile()
    return module


@pytest.fixture(scope="module")
def traced():
    return [fx.symbolic_trace(written(forward).double().eval()) for forward, *_ in FORMS.values()]


@pytest.mark.parametrize("seed", range(3))
def test_an_altered_block_is_refused_or_is_what_is_recognised(seed, traced):
    draw, compared, refused = random.Random(seed), 0, 0
    for _ in range(90):
        try:
            f = altered(draw.choice(traced), draw)
            block = block_or_reason(f)
        except (NotAChain, SyntaxError):  # as a number on the left of +=
            refused += 1
            continue
        for shape in ((7, WIDTH), (7, 3, WIDTH), (1, 3, WIDTH), (7, 1, WIDTH)):
            x = torch.randn(shape, dtype=torch.float64)
            try:
                with torch.no_grad():
                    y = f.forward(x.clone())  # a call would print where it fails
            except Exception:  # an altered graph may fail, on some shapes or on all
                continue
            if len(y) == len(x):
                compared += 1
                torch.testing.assert_close(
                    block(x).flatten(), y.flatten(), rtol=1e-9, atol=1e-10, equal_nan=True, msg=f.code
                )
    assert compared > 20 and refused > 20
