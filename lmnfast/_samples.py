"""Checks of a function and its samples before a measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._chain import CHAIN_DTYPES


def checked_samples(f: Callable[[Tensor], Tensor], x: Tensor, detached: bool = True) -> Tensor:
    """The samples to measure: checked, detached if asked, and under autocast in float32. Raises TypeError or ValueError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor of samples, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x: expected floating-point samples, got {x.dtype}; integers (tokens) cannot be interpolated: "
            "cut the network at a layer with lmnfast.cut"
        )
    if x.layout != torch.strided or x.is_nested or x.dtype not in CHAIN_DTYPES:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(
            f"x: expected a dense tensor of float64, float32, float16 or bfloat16, got a {kind} one of {x.dtype}"
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected samples (N, *in) with N > 0, got shape {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError("x: on meta, where tensors have no values; expected samples on a real device")
    parameters = check_function(f, len(x)) if isinstance(f, nn.Module) else {}
    x = x.detach() if detached else x
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype in (torch.float16, torch.bfloat16):
        # Samples may be a layer's output in low precision. The paths between them need not be in low precision.
        x = x.float()
    for name, p in parameters.items():
        if p.device != x.device:
            raise ValueError(
                f"x: on {x.device}, but f's parameter {name!r} is on {p.device}; move one of them"
            )
    dtypes = _names_of_dtypes(parameters)
    if dtypes and x.dtype not in dtypes and not autocast:
        raise _other_dtype(dtypes, x)
    return x


SAME_OUTPUT_ULPS = 32  # kSameOutputUlps in csrc/statistics.h


def check_dtypes(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Raises TypeError if a parameter of f has another dtype than the samples. To be asked where f has failed on them.

    A module with parameters of several dtypes may do the casts itself.
    """
    dtypes = _names_of_dtypes(check_function(f, len(x))) if isinstance(f, nn.Module) else {}
    if dtypes.keys() - {x.dtype} and not torch.is_autocast_enabled(x.device.type):
        raise _other_dtype(dtypes, x)


def _names_of_dtypes(parameters: dict[str, Tensor]) -> dict[torch.dtype, str]:
    """The floating-point dtypes among parameters, each with the first name."""
    return {p.dtype: name for name, p in reversed(parameters.items()) if p.is_floating_point()}


def _other_dtype(dtypes: dict[torch.dtype, str], x: Tensor) -> TypeError:
    other, name = [(dtype, name) for dtype, name in dtypes.items() if dtype != x.dtype][-1]
    return TypeError(f"x: is {x.dtype}, but f's parameter {name!r} is {other}; convert one of them")


def same_output(again: Any, output: Tensor) -> bool | Tensor:
    """Whether two outputs are equal up to the rounding of the same operations in another order.

    Returns a bool if shape, dtype or device settle it, otherwise a 0-dim bool tensor on the outputs' device. Mostly the
    outputs are equal to the bit, as the shapes are the same.
    """
    if (
        not isinstance(again, Tensor)
        or again.device != output.device
        or again.shape != output.shape
        or again.dtype != output.dtype
    ):
        return False
    if output.numel() == 0:
        return True
    tolerance = SAME_OUTPUT_ULPS * torch.finfo(output.dtype).eps
    finite = output.isfinite()
    magnitude = torch.where(finite, output.abs(), 0)
    close = (again - output).abs() <= tolerance * magnitude + tolerance * magnitude.amax()
    equal = (again == output) | (again.isnan() & output.isnan())
    return torch.where(finite, close, equal).all()


def check_made(model: nn.Module, what: str) -> None:
    """Raises ValueError if lazy modules have no parameters yet. A measurement must not create them."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_values(name, tensor, what)


def _check_values(name: str, tensor: Tensor, what: str) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"{what}: {name!r} is lazy and has no values yet; run a batch through the model first"
        )


def check_function(f: nn.Module, samples: int) -> dict[str, Tensor]:
    """Returns the parameters of a module by name, from one walk over its parts.

    Raises ValueError if a parameter has no values yet, or if the module is certainly no function of single samples. All this
    is known without a call.
    """
    parameters: dict[str, Tensor] = {}
    for name, part in f.named_modules():
        for own in (part._parameters, part._buffers):
            for key, tensor in own.items():
                if tensor is not None:
                    path = f"{name}.{key}" if name else key
                    _check_values(path, tensor, "f")
                    if own is part._parameters:
                        parameters[path] = tensor
        if ".quantized.dynamic." in type(part).__module__:
            raise ValueError(
                f"f: {_part_name(name)} is quantised dynamically: no scale is part of its state, each call takes it from all "
                "rows of the batch, so a sample's outputs depend on the other samples; expected the float network, or static "
                "quantisation"
            )
        if _exported_for(part) == samples:
            raise ValueError(
                f"f: {_part_name(name)} was exported by torch.export for batches of {samples} samples alone, and is to be "
                "called on other numbers of them; export it with a dynamic first dimension: "
                'torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("samples")},))'
            )
    return parameters


def _part_name(name: str) -> str:
    """Names a part of f in an error message."""
    return f"its part {name.removeprefix('call.').removeprefix('model.')!r}" if name else "it"


def _exported_for(part: nn.Module) -> int | None:
    """The fixed batch size of a program of torch.export; None if the program takes other sizes, too."""
    hooks = part._forward_pre_hooks
    checks = [getattr(hook, "__name__", "") for hook in hooks.values()] if hooks else []
    is_program = "_check_input_constraints_pre_hook" in checks or type(part).__name__ == "UnflattenedModule"
    if not is_program:
        return None
    for node in getattr(part, "graph", fx.Graph()).nodes:
        shape: Sequence[Any] = getattr(node.meta.get("val"), "shape", ()) if node.op == "placeholder" else ()
        if len(shape):
            return shape[0] if isinstance(shape[0], int) else None
    return None
