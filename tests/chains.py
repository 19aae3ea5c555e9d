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
