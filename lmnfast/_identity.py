"""What is measured, in a form that processes and files can compare: the network, the samples and the settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ._chain import Chain
from ._checks import Checks
from ._outputs import Calls, outputs_of
from ._samples import checked_samples
from ._settings import Settings
from ._undisturbed import evaluating
from ._whole import Part

PARTS = {"network": "another network", "samples": "other samples", "settings": "other settings"}
# Samples and outputs of each that are compared, spread over all.
ROWS, OUTPUTS = 16, 64
# Bytes of samples that are read at one time.
CHUNK = 2**26


@dataclass(frozen=True)
class Identity:
    """A network, samples and settings, as hashes and plain values."""

    network: str
    """A hash of the classes, shown arguments, parameters and buffers of a module, or of a chain; "" for another function."""
    samples: str
    settings: dict[str, Any]
    outputs: list[list[float]]
    """Some outputs of f at some samples: of a function that is no module they are all that is known."""
    tolerance: float
    """Up to which outputs count as the same, as a share of the spread of that output: machines round differently."""
    rounding: float
    """The same as a share of that output's size: an offset may be larger than the spread."""

    @property
    def hash(self) -> str:
        """One hash for all but the outputs."""
        every = json.dumps([self.network, self.samples, self.settings], sort_keys=True)
        return hashlib.sha256(every.encode()).hexdigest()

    def differs(self, other: Identity) -> list[str]:
        """Which of PARTS are not the same in another one, in their order."""
        network = self.network == other.network and self._same_outputs(other)
        same = (network, self.samples == other.samples, self.settings == other.settings)
        if not same[1]:  # outputs at other samples say nothing about the network
            same = (self.network == other.network, *same[1:])
        return [name for name, equal in zip(PARTS, same) if not equal]

    def settings_said(self, other: Identity, here: str, there: str) -> str:
        """The settings that another one has otherwise, with both values, for messages."""
        names = [
            name
            for name in {**self.settings, **other.settings}
            if self.settings.get(name) != other.settings.get(name)
        ]
        return ", ".join(
            f"{name} {self.settings.get(name)} {here}, {other.settings.get(name)} {there}" for name in names
        )

    def _same_outputs(self, other: Identity) -> bool:
        mine, others = (torch.tensor(o.outputs, dtype=torch.float64, device="cpu") for o in (self, other))
        if mine.shape != others.shape:
            return False
        known = mine.nan_to_num()
        spread, size = known.amax(0) - known.amin(0), known.abs().amax(0)
        allowed = max(self.tolerance, other.tolerance) * spread + max(self.rounding, other.rounding) * size
        same = ((mine - others).abs() <= allowed + 1e-30) | (mine.isnan() & others.isnan()) | (mine == others)
        return bool(same.all())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def identity_of(f: Callable[[Tensor], Tensor], x: Tensor, settings: Settings, **more: Any) -> Identity:
    """The identity of a measurement. more: what else must be the same, with the settings.

    Raises TypeError or ValueError for samples that `connectivity` refuses, and what f raises.
    """
    few = sorted({len(x) * row // ROWS for row in range(ROWS)}) if isinstance(x, Tensor) and x.dim() else []
    checked_samples(f, x)
    samples = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    for start, chunk in _chunks(x):
        numbers = torch.arange(start, start + len(chunk), device="cpu")
        Checks(False, Part(numbers)).finite("x", chunk)
        samples.update(_bytes(chunk))
    own = x[few].clone()
    with evaluating(f) as kept:
        y = outputs_of(Calls(f, kept.put_back), own)
    y = y[:, torch.linspace(0, y.shape[1] - 1, min(OUTPUTS, y.shape[1]), device=y.device).long()]
    rounded = 1e-4 if torch.get_float32_matmul_precision() == "highest" else 1e-3
    return Identity(
        network=_network(f),
        samples=samples.hexdigest(),
        settings={
            "samples": len(x),
            "method": settings.method,
            "points": settings.points,
            "rule": settings.rule,
            "stabiliser": settings.stabiliser,
            "pooled": settings.pooled,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "autocast": _autocast(x.device.type),
            "outputs": str(y.dtype),
            "lmnfast": version("lmnfast"),
            **more,
        },
        outputs=y.double().tolist(),
        tolerance=max(rounded, 2 * torch.finfo(y.dtype).eps),
        rounding=2 * torch.finfo(y.dtype).eps if y.dtype.itemsize == 2 else 64 * torch.finfo(y.dtype).eps,
    )


def _autocast(device: str) -> str | None:
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def _chunks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Runs of samples with the number of the first, some bytes at a time: x may be a file that is mapped into memory."""
    rows = max(1, CHUNK // (x[0].numel() * x.element_size()))
    for start in range(0, len(x), rows):
        yield start, x[start : start + rows]


def hash_of(tensor: Tensor) -> str:
    """A hash of a tensor's dtype, shape and entries."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _network(f: Any) -> str:
    """The hash of a module's or a chain's tensors and of what it is made of; "" for another function."""
    digest = hashlib.sha256()
    if isinstance(f, nn.Module):
        parts = [
            f"{name} {type(part).__module__}.{type(part).__qualname__} {_arguments(part)}"
            for name, part in f.named_modules()
        ]
        tensors: list[tuple[str, Tensor | None]] = [*f.named_parameters(), *f.named_buffers()]
    elif isinstance(f, Chain):
        parts = [repr((f.activations, f.flattens, f.skips))]
        tensors = [(str(n), tensor) for n, tensor in enumerate((*f.weights, *f.biases))]
    else:
        return ""
    digest.update("\n".join(parts).encode())
    for name, tensor in tensors:
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _arguments(part: nn.Module) -> str:
    """What a module shows of its arguments, as the slope of a LeakyReLU."""
    with suppress(Exception):  # code of the user, for people to read
        return str(part.extra_repr())
    return ""
