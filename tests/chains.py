"""Random chains of Linear and activations, shared by the tests of the fused route."""

import torch
from torch import Tensor

from lmnfast.network import ACTIVATIONS, Activation, Chain

PARAMETERS = {"leaky_relu": (0.1, 0.0), "elu": (0.7, 0.0), "softplus": (1.5, 20.0)}


def activation(name: str) -> Activation:
    return Activation(name, *PARAMETERS.get(name, (0.0, 0.0)))


def random_chain(
    widths: list[int],
    names: list[str],
    skips: tuple[tuple[int, int], ...] = (),
    *,
    seed: int = 0,
    scale: float = 1.5,
    bias: bool = True,
) -> Chain:
    """float64; as many Linear layers as steps in widths, names[l] after the l-th (names[0] on the input)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Chain(
        weights=tuple(scale * draw(o, i) / i**0.5 for i, o in zip(widths, widths[1:])),
        biases=tuple(draw(o) if bias else None for o in widths[1:]),
        activations=tuple(map(activation, names)),
        skips=skips,
    )


# Widths, activations, and what is added to what: see Chain.
SUMS = {
    "block(h) + h, twice": (
        [6, 9, 7, 9, 5, 9, 4],
        "identity identity silu identity gelu identity identity",
        ((6, 2), (10, 6)),
    ),
    "act(block(h) + h)": ([5, 9, 7, 9, 3], "identity relu tanh relu identity", ((6, 3),)),
    "W act(h) + h": ([9, 9, 9, 33], "silu gelu tanh identity", ((2, 0), (4, 2))),
    "act(W h) + h": ([9, 9, 9, 4], "identity silu elu identity", ((3, 0), (5, 3))),
    "both of one layer": ([9, 9, 9], "tanh leaky_relu identity", ((1, 0), (2, 1), (3, 1))),
    "one for all": ([9, 9, 9, 9, 9], "silu sigmoid softplus sin identity", ((3, 1), (4, 1), (5, 1), (8, 1))),
    "one in another": ([9] * 6, "silu silu silu silu silu identity", ((3, 1), (6, 5), (8, 5), (10, 3))),
    "to outputs behind an activation": ([9, 9, 9], "identity gelu tanh", ((4, 3), (5, 3))),
    "to outputs from the samples alone": ([9, 9, 9], "identity silu identity", ((4, 0),)),
    "no nonlinearity": ([9, 9, 9], "identity identity identity", ((2, 0), (4, 2))),
}


def chain_with(sums: str, **settings) -> Chain:
    widths, names, skips = SUMS[sums]
    return random_chain(widths, names.split(), skips, **settings)


def random_sums(seed: int, scale: float = 0.8) -> Chain:
    """Two odd widths, any activations, and at most places where a sum is possible one with anything earlier."""
    generator = torch.Generator().manual_seed(seed)

    def draw(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    layers = 2 + draw(5)
    widths = [(7, 13)[draw(2)] for _ in range(layers + 1)]
    names = [ACTIVATIONS[draw(len(ACTIVATIONS))] for _ in range(layers + 1)]
    values = [v for v in range(2 * layers + 2) if v % 2 == 0 or names[v // 2] != "identity"]
    skips = []
    for into in values[1:]:
        fitting = [v for v in values if v < into and widths[v // 2] == widths[into // 2]]
        if fitting and draw(3):
            skips.append((into, fitting[draw(len(fitting))]))
    return random_chain(widths, names, tuple(skips), seed=seed, scale=scale)


def cast(chain: Chain, dtype: torch.dtype, device: torch.device | str = "cpu") -> Chain:
    return Chain(
        tuple(w.to(device, dtype) for w in chain.weights),
        tuple(None if b is None else b.to(device, dtype) for b in chain.biases),
        chain.activations,
        skips=chain.skips,
    )


def samples(n: int, width: int, *, seed: int = 1) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


assert len(ACTIVATIONS) == 11
