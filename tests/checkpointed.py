"""What the tests of checkpoints share: a module of networks, the command and its table."""

import csv

import torch

from lmnfast import cli

LAYERS = ("1", "3")

NETS = """
import os, time, torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 10), nn.SiLU(), nn.Linear(10, 3))

class Noisy(nn.Module):
    "Has something random that no checkpoint has."
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)
        self.register_buffer("mask", torch.randn(10), persistent=False)
    def forward(self, x):
        return self.last(torch.tanh(self.first(x) * self.mask))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(7, 4), nn.Linear(8, 9), nn.Linear(9, 3)
    def forward(self, tokens, scale=None):
        x = self.embedding(tokens).flatten(1)
        x = x if scale is None else x * scale
        return {"logits": self.last(torch.tanh(self.first(x))), "other": x}

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 7), nn.Linear(7, 7, bias=False)
        self.head.weight = self.embedding.weight
    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)))

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 9), nn.SiLU(), nn.Linear(9, 8)) for _ in range(2))
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 5)
    def forward(self, x):
        x = torch.tanh(2 * self.hidden(x))
        return self.a(x), self.b(x)

class Slow(nn.Sequential):
    "Takes its time for all checkpoints but the first."
    def load_state_dict(self, *args, **kwargs):
        if os.path.exists("loaded"):
            time.sleep(60)
        open("loaded", "w").close()
        return super().load_state_dict(*args, **kwargs)

def slow():
    return Slow(*make())

def dies():
    if "spawn" in __import__("multiprocessing").current_process().name.lower():
        os._exit(1)
    return make()

def twice(model, inputs):
    return model(2 * inputs)

def fails():
    raise RuntimeError("out of\\nluck")

def needs(width):
    return make()

def number():
    return 3

net = make()
table = {}
"""


def random_state(model, generator):
    return {
        name: torch.randn(value.shape, generator=generator).clone()
        for name, value in model.state_dict().items()
    }


def command(*more, model="nets:make", checkpoint="step_*.pt", inputs="x.npy", layers=LAYERS):
    given = [f"--layer={layer}" for layer in layers]
    return [
        "checkpoints", f"--model={model}", f"--checkpoint={checkpoint}", f"--inputs={inputs}", *given, *more
    ]  # fmt: skip


def failure(capsys, arguments):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith("lmnfast: error: ")
    return lines[0].removeprefix("lmnfast: error: ")


def table(path="lmn/lmn.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
