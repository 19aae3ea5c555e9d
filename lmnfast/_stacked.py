"""Parameters of several networks of one structure, stacked as torch.func.stack_module_state returns them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._chain import Activation, Chain, values_of
from ._undisturbed import evaluating

Stacked = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # parameters and buffers of several networks
WHOLE = "_lmnfast_whole"  # attribute of a tail with stacked parameters: the model it was cut from, in a tuple


def networks_in(stacked: Stacked) -> int:
    """The number of networks. Raises TypeError for what is no such pair, and ValueError for no networks, or for stacks of
    different lengths."""
    pair = isinstance(stacked, (tuple, list)) and len(stacked) == 2
    if not pair or not all(
        isinstance(each, Mapping)
        and all(isinstance(value, Tensor) and value.dim() for value in each.values())
        for each in stacked
    ):
        raise TypeError(
            "stacked: expected the pair of parameters and buffers that torch.func.stack_module_state returns, got "
            f"{type(stacked).__name__}"
        )
    counts = {len(value) for values in stacked for value in values.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"stacked: expected parameters of one or more networks, got stacks of {sorted(counts)}"
        )
    return counts.pop()


@contextmanager
def loaded(f: nn.Module, stacked: Stacked, number: int) -> Iterator[None]:
    """Gives f the parameters and buffers of one of several networks, for as long as the context lasts.

    stacked: as torch.func.stack_module_state returns them, (B, ...) each. The names are those in f, or in the model that f
        was cut from. number: from 0 to B - 1.
    Raises ValueError for a parameter or buffer that is missing, or that has another shape than f's.
    """
    values = {**stacked[0], **stacked[1]}
    names: dict[int, str] = {}  # by tensor; the first name if several share a tensor
    whole = getattr(f, WHOLE, (f,))[0]
    for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
        names[id(tensor)] = name if name in values else name.removeprefix("model.")
    with evaluating(f, changed=True):
        for part in f.modules():
            for own in (part._parameters, part._buffers):
                for key, tensor in own.items():
                    if tensor is None or id(tensor) not in names:  # the tail's own, as fixed inputs
                        continue
                    value = values.get(names[id(tensor)])
                    if value is None or value.shape[1:] != tensor.shape:
                        got = "nothing of that name" if value is None else f"shape {tuple(value.shape)}"
                        expected = ", ".join(("networks", *map(str, tensor.shape)))
                        raise ValueError(f"stacked: {names[id(tensor)]!r}: expected ({expected}), got {got}")
                    own[key] = value[number].detach()  # type: ignore[assignment]  # a plain tensor meanwhile
        yield


@dataclass(frozen=True, eq=False)
class ChainStack:
    """Several chains of one structure. As `Chain`, but each tensor has one more dimension in front, for the networks."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: tuple[Activation, ...]
    skips: tuple[tuple[int, int], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """All chains in plain torch: x (networks, N, *in), flattened to (networks, N, D) -> (networks, N, K)."""

        def linear(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return z @ weight.mT if bias is None else torch.baddbmm(bias[:, None], z, weight.mT)

        return values_of(self, x.flatten(2), linear)[-1]

    def of_network(self, number: int) -> Chain:
        """One of the chains, for samples (N, D)."""
        biases = tuple(None if b is None else b[number] for b in self.biases)
        return Chain(tuple(w[number] for w in self.weights), biases, self.activations, skips=self.skips)


def stack_of(chain: Chain, stacked: Stacked) -> ChainStack | None:
    """The chains of networks with stacked parameters, as views of the stacks.

    chain: the chain with the parameters of the first network, see `loaded`.
    Returns None if a tensor of the chain is not in the stacks, for example because it is computed from the parameters.
    """
    stacks = {_place(value[0]): value.detach() for values in stacked for value in values.values()}
    weights = [stacks.get(_place(w)) for w in chain.weights]
    biases = [None if b is None else stacks.get(_place(b)) for b in chain.biases]
    found = tuple(w for w in weights if w is not None)
    if len(found) < len(weights) or any(
        stack is None and own is not None for stack, own in zip(biases, chain.biases)
    ):
        return None
    return ChainStack(found, tuple(biases), chain.activations, chain.skips)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The place of a tensor's values in memory, equal for all views of the same values."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
