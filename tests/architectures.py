"""Networks as people write them, with inputs and the layers to cut them at."""

import copy

import torch
import torch.nn.functional as F
from support import UNIFORM
from torch import nn

import lmnfast
from lmnfast import reference

FLOAT32 = (
    2e-5  # measured on these networks: the definition in float32 loses up to 6e-6, and so does what is tested
)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.third(F.gelu(self.second(F.silu(self.first(x)))))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 if n == 0 else 10, 10) for n in range(3))

    def forward(self, x):
        for n, layer in enumerate(self.layers):
            x = layer(x) if n == 2 else torch.tanh(layer(x))
        return x


class ResidualMLP(nn.Module):
    def __init__(self, normed=False):
        super().__init__()
        self.stem = nn.Linear(6, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *([nn.LayerNorm(10)] if normed else []), nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 10)
            )
            for _ in range(2)
        )
        self.after = nn.ModuleList(nn.Identity() for _ in range(2))
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x)
        for block, after in zip(self.blocks, self.after):
            x = after(x + block(x))
        return self.head(x)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.classifier(self.features(x))


class Block(nn.Module):
    def __init__(self, width=12, heads=2):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.heads = heads

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """GPT-like; logits at every position."""

    def __init__(self, vocabulary=11, length=4, width=12):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.embedded = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedded(self.token(tokens) + self.position(torch.arange(tokens.shape[1])))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(9, 5), nn.LSTM(5, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens):
        outputs, _ = self.lstm(self.embedding(tokens))
        return self.head(torch.tanh(outputs[:, -1]))


class Shared(nn.Module):
    """Tied embedding and unembedding."""

    def __init__(self):
        super().__init__()
        self.token, self.hidden = nn.Embedding(9, 6), nn.Linear(18, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens):
        return self.head(F.silu(self.hidden(self.token(tokens).flatten(1))))


def normed():
    return nn.Sequential(
        nn.Linear(6, 10), nn.LayerNorm(10), nn.SiLU(), nn.Linear(10, 8), nn.SiLU(), nn.Linear(8, 3)
    )


def vectors(n=14):
    return torch.randn(n, 6)


def images(n=9):
    return 5 * torch.randn(n, 1, 8, 8)


def tokens(n=12, length=4, vocabulary=9):
    return torch.randint(vocabulary, (n, length))


# model, inputs, layers to cut at, and whether the tail there is a chain
NETWORKS = {
    "sequential": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)),
        vectors,
        {"0": True, "1": True, "2": True, "3": True},
    ),
    "functional": (Functional, vectors, {"first": True, "second": True}),
    "module list": (Listed, vectors, {"layers.0": True, "layers.1": True}),
    "residual": (ResidualMLP, vectors, {"stem": True, "after.0": True, "after.1": True}),
    "residual, layer norm": (
        lambda: ResidualMLP(True),
        vectors,
        {"stem": False, "after.0": False, "after.1": True},
    ),
    "layer norm": (normed, vectors, {"0": False, "1": True, "2": True}),
    "convolution": (
        Convolutional,
        images,
        {"features.0": False, "features.3": False, "features": True, "classifier.0": True},
    ),
    "transformer": (
        Transformer,
        tokens,
        {"embedded": False, "blocks.0": False, "blocks.1": False, "norm": True},
    ),
    "lstm": (Recurrent, tokens, {"embedding": False, "lstm": False}),
    "shared weights": (Shared, lambda: tokens(length=3), {"token": True, "hidden": True}),
}


def trained_a_little(model, inputs):
    """Not at initialisation, where batch norm's statistics are 0 and 1; in training mode, as in a loop."""
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimiser.zero_grad()
        model(inputs).square().mean().backward()
        optimiser.step()
    return model


def snapshot(model):
    return [
        (name, tensor, tensor.clone(), tensor._version)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]


def truth(f, samples):
    """From the definition, in float64."""
    with torch.no_grad():
        return reference.path_connectivity(f, samples.double(), *UNIFORM)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.layer(torch.relu(self.layer(x)))))


def history_of(model, x, layers):
    with lmnfast.Probe(model, x, layers) as probe:
        probe(0)
        return probe.history


class Attention(nn.Module):
    """Takes its arguments as today's transformers do."""

    def __init__(self, width=6):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden, attention_mask=None, position_embeddings=None, **options):
        cos, sin = position_embeddings
        q, k = (part(hidden) * cos + part(hidden).roll(1, -1) * sin for part in (self.q, self.k))
        return F.scaled_dot_product_attention(q, k, self.v(hidden), attention_mask), None


class Masked(nn.Module):
    """Blocks with masks, embeddings of positions and a cache, around which skip connections go."""

    def __init__(self, width=6):
        super().__init__()
        self.stem, self.attention = nn.Linear(width, width), Attention(width)
        self.mlp, self.head = (
            nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width)),
            nn.Linear(width, 3),
        )
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, mask=None):
        x = self.stem(x)
        mask = None if mask is None else mask[:, None, :].expand(-1, x.shape[1], -1)
        angles = self.scale * torch.arange(x.shape[1]).float()[None, :, None]
        positions = angles.cos(), angles.sin()
        x = (
            x
            + self.attention(
                x, attention_mask=mask, position_embeddings=positions, past=None, cache={"n": 0}
            )[0]
        )
        return self.head(x + self.mlp(x))


def check_tail(tail, samples, expected):
    """The tail has the expected outputs, also in a larger batch, and its connectivity is that of the definition."""
    exact = copy.deepcopy(expected).double() if isinstance(expected, nn.Module) else expected
    with torch.no_grad():
        for x in (samples, torch.cat([samples.flip(0), samples])):
            torch.testing.assert_close(tail(x).double(), exact(x.double()), atol=1e-4, rtol=1e-4)
    assert (lmnfast.connectivity(tail, samples) - truth(exact, samples)).abs().max() < FLOAT32
