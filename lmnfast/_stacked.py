"""Parameters of several networks of one structure, stacked as torch.func.stack_module_state returns them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ._undisturbed import evaluating

Stacked = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # parameters and buffers of several networks
WHOLE = "_lmnfast_whole"  # of a tail to be measured with stacked parameters: the model it was cut from, in a tuple


def networks_in(stacked: Stacked) -> int:
    """How many networks; ValueError for none, or numbers that differ."""
    counts = {len(value) for values in stacked for value in values.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"stacked: expected parameters of one or more networks, got stacks of {sorted(counts)}"
        )
    return counts.pop()


@contextmanager
def loaded(f: nn.Module, stacked: Stacked, number: int) -> Iterator[None]:
    """f with the parameters and buffers of one of several networks, for as long as the context lasts.

    stacked: as torch.func.stack_module_state returns them, (B, ...) each, by the names in f, or in the model that f was
        cut from. number: from 0 to B - 1.
    Raises ValueError for a parameter or buffer that is missing, or has another shape than f's.
    """
    values = {**stacked[0], **stacked[1]}
    names: dict[int, str] = {}  # the first of those that share a tensor
    whole = getattr(f, WHOLE, (f,))[0]
    for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
        names[id(tensor)] = name if name in values else name.removeprefix("model.")
    with evaluating(f, changed=True):
        for part in f.modules():
            for own in (part._parameters, part._buffers):
                for key, tensor in own.items():
                    if tensor is None:
                        continue
                    value = values.get(names[id(tensor)])
                    if value is None or value.shape[1:] != tensor.shape:
                        got = "nothing of that name" if value is None else f"shape {tuple(value.shape)}"
                        expected = ", ".join(("networks", *map(str, tensor.shape)))
                        raise ValueError(f"stacked: {names[id(tensor)]!r}: expected ({expected}), got {got}")
                    own[key] = value[number].detach()  # type: ignore[assignment]  # for the time being no Parameter
        yield
