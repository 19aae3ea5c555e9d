"""Networks as they are written: cut, and recognised as a chain or not."""

import operator

import torch
import torch.nn.functional as F
from torch import nn


class Steps(nn.Module):
    """Applies modules and functions one after the other, as a hand-written forward does."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class FunctionalLinear(nn.Module):
    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


class Network(nn.Module):
    """The paper's shape: tokens, an embedding, two hidden layers, with all that training needs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(8, 10)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(10, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, tokens, return_hidden=False):
        h = self.drop(self.act(self.hidden(self.embedding(tokens).flatten(1))))
        if return_hidden:
            return h
        return self.out(F.dropout(F.silu(self.second(h)), training=self.training))


TOKENS = torch.arange(14).remainder(7).reshape(7, 2)


class Added(nn.Module):
    """A residual block: the sum, by some spelling, of its input and of what a block makes of it."""

    def __init__(self, block, add=operator.add):
        super().__init__()
        self.block, self.add = block, add

    def forward(self, h):
        return self.add(h, self.block(h))


class HiddenInPlace(nn.Module):
    """relu_ changes h, though nothing uses what it returns."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.first(x)
        F.relu_(h)
        return self.second(h)


class TransposedWeight(FunctionalLinear):
    def forward(self, x):
        return F.linear(x, self.weight.t())


class TwoOutputs(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Tangled(nn.Module):
    """A forward of three Linear layers that is given as a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))
        self.shift = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.function(self, self.first(x))


def residual(add=operator.add, block=None):
    block = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)) if block is None else block
    return nn.Sequential(nn.Linear(3, 3), Added(block, add), nn.Linear(3, 2))


def mixed_modes(model):
    """A model in training, but for one frozen part."""
    model.train()
    next(model.children()).eval()
    return model
