"""Checks of a model's inputs, and error messages that help."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ._nested import entries_of, tensors_in
from ._samples import check_made
from ._tracing import Forward

# Parts of the names of inputs that have one entry for each position of a sequence.
PER_TOKEN = ("mask", "padd", "position", "token_type")


def check_rows(what: str, value: Tensor, rows: int, named: list[tuple[str, Tensor]], why: str) -> None:
    """Raises ValueError, with advice, if the first dimension of a tensor is not one row per sample.

    named: the inputs, see `named_inputs`. why: what speaks against samples along other dimensions.
    """
    if value.shape[:1] == (rows,):
        return
    shape, of_model = tuple(value.shape), what.startswith("model")
    hint = ""
    if rows in shape:
        hint = ", along the first dimension"
        hint += "" if what.startswith("block") else ", or along the one that batch_dim= names"
        hint += f", or that output=lambda y: y.transpose(0, {shape.index(rows)}) moves" if of_model else ""
    elif of_model and shape and shape[0] % rows == 0:
        hint = f", as by output=lambda y: y.unflatten(0, (-1, {shape[0] // rows}))"
    else:
        (first, _), *others = named
        if shape and any(other.shape[:1] == shape[:1] for _, other in others):
            hint = f"; {first} comes first and has {rows}: name first one that has a row per sample"
    tried = f" ({why})" if rows in shape else ""
    raise ValueError(f"{what} has shape {shape} for {rows} inputs; expected one row per input{hint}{tried}")


def check_inputs(inputs: Any, forward: Forward) -> None:
    """Raises TypeError or ValueError if the inputs have no samples."""
    tensors = list(tensors_in(inputs))
    plain = isinstance(inputs, (Tensor, Mapping)) or (
        isinstance(inputs, (tuple, list)) and not any(entries_of(i) for i in inputs)
    )
    if not tensors or (forward is None and not plain):
        got = type(inputs).__name__
        if isinstance(inputs, (tuple, list)):
            got = ", ".join(type(i).__name__ for i in inputs) or "nothing"
        gather = ""
        if not isinstance(inputs, (tuple, list, Mapping)) and hasattr(inputs, "__iter__"):
            gather = "; gather the samples first, for instance torch.cat([x for x, labels in loader])"
        raise TypeError(f"inputs: expected a tensor, or a tuple or a dict of tensors, got {got}{gather}")
    if tensors[0].ndim == 0 or len(tensors[0]) == 0:
        raise ValueError(f"inputs: expected at least one sample, got shape {tuple(tensors[0].shape)}")


def check_devices(model: nn.Module) -> None:
    """Raises ValueError if a model's parameters have no values, or are on several devices."""
    check_made(model, "model")
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    if any(device.type == "meta" for device in devices):
        name = next(name for device, name in devices.items() if device.type == "meta")
        raise ValueError(
            f"model: its parameter {name!r} is on meta, where tensors have no values; load its weights"
        )
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"model: its parameters are on several devices ({where}); expected one")


def check_fit(model: nn.Module, inputs: Any, forward: Forward, error: Exception) -> None:
    """Raises a short error if the model failed because model and inputs do not fit together. torch's own message is long."""
    _check_masks(named_inputs(model, inputs, forward), error)
    if forward is not None:
        return
    device = next((parameter.device for parameter in model.parameters()), None)
    for tensor in tensors_in(inputs):
        if isinstance(error, RuntimeError) and device not in (None, tensor.device):
            raise ValueError(
                f"inputs: on {tensor.device}, but the model is on {device}; move one of them"
            ) from error
    if isinstance(inputs, Tensor) or not isinstance(error, TypeError):
        return
    try:
        fits = inspect.signature(model.forward).bind
    except (TypeError, ValueError):  # a scripted module has no signature
        return
    try:
        fits(**inputs) if isinstance(inputs, Mapping) else fits(*inputs)
    except TypeError as misfit:
        raise TypeError(
            f"inputs: do not fit the arguments of the model's forward ({misfit}); expected those alone, without labels; "
            "forward= runs a model that is called otherwise"
        ) from error


def _check_masks(named: list[tuple[str, Tensor]], error: Exception) -> None:
    """Raises ValueError if the model failed and a mask or the like has other lengths than the first input."""
    (first, samples), *others = named
    of_model = isinstance(error, (RuntimeError, ValueError, AssertionError, IndexError))
    if not of_model or str(error).startswith("output: ") or samples.ndim < 2:
        return
    lengths = tuple(samples.shape[:2])
    said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    for name, tensor in others:
        shape = tuple(tensor.shape)
        per_token = tensor.dtype == torch.bool or any(word in name.lower() for word in PER_TOKEN)
        square = len(shape) == 2 and shape[0] == shape[1] and shape[0] in lengths
        if per_token and len(shape) == 2 and not square and sorted(shape) != sorted(lengths):
            raise ValueError(
                f"inputs: {name} has shape {shape}, but {first} has {tuple(samples.shape)}; expected {lengths}, an entry "
                f"for each position; the model fails on them ({said})"
            ) from error


def named_inputs(model: nn.Module, inputs: Any, forward: Forward) -> list[tuple[str, Tensor]]:
    """The tensors in the inputs, in order, each with the name by which an error message calls it."""
    names: dict[Any, str] = {}
    if forward is None and isinstance(inputs, (tuple, list)):
        with suppress(TypeError, ValueError):  # a scripted module has no signature
            names = dict(enumerate(inspect.signature(model.forward).bind(*inputs).arguments))

    def walk(value: Any, said: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield said, value
        for key, entry in entries_of(value):
            yield from walk(entry, f"{said}[{key!r}]")

    if isinstance(inputs, Tensor):
        return [("the input", inputs)]
    return [
        named
        for key, entry in entries_of(inputs)
        for named in walk(entry, f"the input {names.get(key, key)!r}")
    ]


def check_floating(what: str, value: Any, hint: str = "") -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, Tensor) and value.is_quantized:
            hint = "; quantised values cannot be interpolated: cut behind the DeQuantStub"
        raise TypeError(f"{what} is {got}; expected a floating-point tensor{hint}")
