"""From a connectivity matrix to its eigenvalues, its entropy, and the linear mapping number."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _native, ops
from ._checks import all_finite
from ._connectivity import measured, stacked_matrices, warn_of_offsets
from ._enqueue import Enqueued
from ._native import Progress
from ._observables import Chosen, Values, problem_of, settings_for
from ._observed import Observation, Spectrum
from ._settings import Settings
from ._stacked import Stacked
from ._threads import one_core_after_fork
from .ops.symmetric_eigenvalues import fits

SOLVERS = ("auto", "cpu", "cuda")
NEGATIVE = ("absolute", "clip")
# A number also depends on these, beside network and samples. Every table has them as columns, named as in `Measurement`.
SETTINGS = ("samples", "outputs", "points", "rule", "method", "precision", "solver", "negative", "stabiliser")
SHARES = ("constant_share", "negative_share")


def eigenvalues(L: Tensor, solver: str = "auto") -> Tensor:
    """Eigenvalues of a connectivity matrix, by falling magnitude; equal to a sorted ``torch.linalg.eigvalsh``.

    Always solved in float64. Near rank one hundreds of eigenvalues lie below float32 rounding, and their noise adds up:
    measured, in float32 an affine network has an LMN of 1.0001 instead of 1 at N = 768 and 4096.

    Args:
        L: (..., N, N), floating point, symmetric.
        solver: where a matrix on a CUDA device is solved. "cuda": on that device, by the package's kernel if the matrix fits
            (up to N = 2304 on an H200), otherwise by cuSOLVER; if cuSOLVER fails, on the CPU. "cpu": on the CPU. "auto": as
            "cuda". A matrix on the CPU is always solved on the CPU.

    Returns:
        (..., N) float64 on L's device.

    Raises:
        TypeError: L is not a floating-point tensor.
        ValueError: L is not square, is empty, not finite, not symmetric to 1e-4 of its largest entry, or all 0; unknown
            solver, or "cuda" for a matrix elsewhere.

    Example:
        >>> lmnfast.eigenvalues(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        tensor([1.5000, 0.5000], dtype=torch.float64)
    """
    check_matrix(L)
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if solver == "cuda" and not L.is_cuda:
        raise ValueError(f"solver: 'cuda' solves matrices on a CUDA device, got one on {L.device}")
    L = L.detach()
    L = L if L.dtype == torch.float32 else L.double()
    values = None if solver == "cpu" else _by_kernel(L)
    if values is None or bool(values.isnan().any()):
        values = _by_library(L, solver)[0]
    return _by_magnitude(values).to(L.device)


def _by_kernel(L: Tensor) -> Tensor | None:
    """The eigenvalues of a matrix by the package's CUDA kernel, in any order, without waiting for it.

    NaN if the kernel gives up, as not all of its blocks run at once. None if it does not take the matrix.
    """
    if not (_native.on_cuda(L) and fits(L)):
        return None
    try:
        return ops.symmetric_eigenvalues(L)
    except RuntimeError:  # the launch of all blocks at once may be refused, for example on a share of a card
        return None


@one_core_after_fork()
def _by_library(L: Tensor, solver: str = "auto") -> tuple[Tensor, str]:
    """The eigenvalues by cuSOLVER or LAPACK, on the device of the solver, and the solver's name."""
    if L.is_cuda and solver != "cpu":
        try:
            return torch.linalg.eigvalsh(L.double()), "cusolver"
        except torch.linalg.LinAlgError:  # cuSOLVER fails on some nearly rank-one matrices
            pass
    return ops.symmetric_eigenvalues(L.cpu()), "cpu"


@one_core_after_fork()
def _by_magnitude(values: Tensor) -> Tensor:
    return values.gather(-1, values.abs().argsort(-1, descending=True))


def _spectrum(L: Tensor, negative: str) -> tuple[Tensor, str, Tensor]:
    """Eigenvalues of a connectivity (..., N, N) whose checks have passed, the solver's name, and their entropy in bits.

    Eigenvalues of solver "cuda" are in any order, others by falling magnitude. A CUDA device is waited for once, for the
    entropy: it is NaN if an eigenvalue is NaN or no eigenvalue is left.
    """
    L = L.detach()
    values = _by_kernel(L)
    if values is not None:
        bits = ops.spectral_entropy(values.clamp(min=0) if negative == "clip" else values)
        if all(map(math.isfinite, bits.reshape(-1).tolist())):
            return values, "cuda", bits
    values, solver = _by_library(L)
    values = _by_magnitude(values)
    return values, solver, _complexity(values, negative)


def nonlinear_complexity(L: Tensor, *, negative: str = "absolute") -> Tensor:
    """Nonlinear complexity S_NL in bits: the von Neumann entropy of a connectivity matrix.

    ``S_NL = -sum p log2 p`` with ``p = |w| / sum |w|`` over the eigenvalues w; 0 log 0 = 0. All of it in float64.

    Args:
        L: (..., N, N), floating point, symmetric; without a unit, as r2 has none.
        negative: the value that a negative eigenvalue counts as: "absolute" (the paper's) its magnitude, "clip" 0.

    Returns:
        (...) float64 on L's device, in bits, from 0 to log2 N.

    Raises:
        TypeError, ValueError: as :func:`eigenvalues`. ValueError also for another `negative`, and if the entropy is not
            defined: all eigenvalues are 0, or with "clip" none is above 0.

    Source:
        arXiv 2310.05918, Eq. 3.

    Example:
        >>> lmnfast.nonlinear_complexity(torch.eye(8))
        tensor(3., dtype=torch.float64)
    """
    check_negative(negative)
    return _complexity(eigenvalues(L), negative)


def linear_mapping_number(L: Tensor, *, negative: str = "absolute") -> Tensor:
    """Linear mapping number ``2 ** S_NL`` of a connectivity matrix: 1 for one linear map, N for N unrelated linear maps.

    Args:
        L: (..., N, N), floating point, symmetric; without a unit, as r2 has none.
        negative: the value that a negative eigenvalue counts as: "absolute" (the paper's) its magnitude, "clip" 0.

    Returns:
        (...) float64 on L's device, from 1 to N.

    Raises:
        TypeError, ValueError: as :func:`nonlinear_complexity`.

    Source:
        arXiv 2310.05918, Eq. 3.

    Example:
        >>> lmnfast.linear_mapping_number(torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)))
        tensor(2.0000, dtype=torch.float64)
    """
    return torch.exp2(nonlinear_complexity(L, negative=negative))


@dataclass(frozen=True, eq=False)
class Measurement:
    """A linear mapping number with everything that it depends on; :func:`measure` returns it.

    ``float(m)`` is ``m.lmn``. Two measurements are equal if all their values are equal, including the tensors' values. To keep
    a measurement, save its dict: it has plain values and tensors, so that torch.load reads it without running code. The LMN of
    some of the samples is no estimate of the LMN of all samples: LMN grows with their number.

    Example:
        >>> m = lmnfast.measure(nn.Sequential(nn.Linear(8, 16), nn.SiLU()), torch.randn(30, 8))
        >>> torch.save(m.to_dict(), "measurement.pt")
        >>> lmnfast.Measurement(**torch.load("measurement.pt")) == m
        True
    """

    lmn: float
    """2 ** complexity_bits. With a method other than "path", that method's stand-in for LMN."""
    complexity_bits: float
    """S_NL in bits."""
    eigenvalues: Tensor
    """(samples,) float64, by falling magnitude, with their signs."""
    connectivity: Tensor
    """(samples, samples); float64 for float64 samples, otherwise float32."""
    samples: int
    """N."""
    outputs: int
    """K, the number of f's outputs after flattening. r2 is a mean over them, so LMN depends on K."""
    points: int
    """Nodes on a path, ends included. "jacobian" uses no nodes."""
    rule: str
    """The places of the nodes on the path, as in :func:`connectivity`."""
    method: str
    """As in :func:`connectivity`."""
    precision: str
    """The precision of f's products. "highest", "high", "medium": float32. A fused kernel on the CPU is always "highest".
    Otherwise this is ``torch.get_float32_matmul_precision()`` at the time. Fused kernels on CUDA follow that setting:
    "highest" splits chord residuals and weights into two halves each, "high" and "medium" round each to one half of 11 bits.
    torch's own products in any other f follow it, too, if the device has units for it. "float64", "bfloat16", "float16": the
    samples' dtype, or the dtype that autocast computes in."""
    solver: str
    """The solver of the eigenproblem, in float64: "cpu" (LAPACK), "cuda" (the package's kernel) or "cusolver"."""
    negative: str
    """The treatment of negative eigenvalues: "absolute" or "clip"."""
    constant_share: float
    """Share of the paths, over all pairs and outputs, that are constant to rounding and so count as straight (with a
    stabiliser as bent). 0 for "jacobian", which uses no path."""
    negative_share: float
    """sum |w| over the negative eigenvalues, as a share of sum |w| over all eigenvalues."""
    stabiliser: float = 0.0
    """What was added to the denominators of r2, as in :func:`connectivity`."""
    observables: dict[str, float] = field(default_factory=dict)
    """The observables that were asked for, by name; NaN for one that does not apply."""

    def __repr__(self) -> str:
        names = [
            f.name
            for f in fields(self)
            if f.type is not Tensor and (f.name != "observables" or self.observables)
        ]
        return f"Measurement({', '.join(f'{name}={_formatted(getattr(self, name))}' for name in names)})"

    def __float__(self) -> float:
        return self.lmn

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Measurement):
            return NotImplemented
        return all(_same(value, getattr(other, name)) for name, value in self.to_dict().items())

    def __hash__(self) -> int:
        return hash(
            tuple(value for value in self.to_dict().values() if not isinstance(value, (Tensor, dict)))
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields by their names: plain values, and the two tensors without a copy."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _formatted(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dtype == other.dtype and torch.equal(value.cpu(), other.cpu())
    if isinstance(value, dict):  # NaN is the same as NaN
        return list(value) == list(other) and all(
            value[name] == other[name] or (math.isnan(value[name]) and math.isnan(other[name]))
            for name in value
        )
    return value == other


def measurement(enqueued: Enqueued, settings: Settings, negative: str = "absolute") -> Measurement:
    """Solves the eigenproblem of a connectivity (N, N) whose checks have passed."""
    values, solver, bits = _spectrum(enqueued.L, negative)
    values = _by_magnitude(values) if solver == "cuda" else values
    below_zero = values.clamp(max=0).abs().sum() / values.abs().sum()
    # Three numbers in one copy: each copy from a card would wait for it.
    lmn, complexity_bits, share = torch.stack([torch.exp2(bits), bits, below_zero]).tolist()
    return Measurement(
        lmn=lmn,
        complexity_bits=complexity_bits,
        eigenvalues=values.to(enqueued.L.device),
        connectivity=enqueued.L,
        solver=solver,
        negative_share=share,
        **unsolved(enqueued, settings, negative),
    )


def unsolved(enqueued: Enqueued, settings: Settings, negative: str) -> dict[str, Any]:
    """The fields of a `Measurement` that no eigenvalue is needed for, but for the matrix."""
    return {
        "samples": len(enqueued.L),
        "outputs": enqueued.outputs,
        "points": settings.points,
        "rule": settings.rule,
        "method": settings.method,
        "precision": enqueued.precision,
        "negative": negative,
        "constant_share": enqueued.constant_share(),
        "stabiliser": settings.stabiliser,
    }


def measure(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int | None = None,
    negative: str = "absolute",
    progress: bool | Progress = False,
    stabiliser: float = 0.0,
    observables: str | Sequence[str] = (),
) -> Measurement:
    """Linear mapping number of f on the samples x, with its matrix, eigenvalues and settings.

    Args:
        f: maps a batch (B, *in) to (B, *out), each row independent of the others. Outputs are flattened to K.
        x: (N, *in), floating point, the samples, of f's dtype and on its device.
        method, points, rule, budget: as in :func:`connectivity`.
        negative: the value that a negative eigenvalue counts as: "absolute" (the paper's) its magnitude, "clip" 0.
        progress: a bar (True), or a function of the share done, as in :func:`connectivity`.
        stabiliser: as in :func:`connectivity`; 0 is the definition.
        observables: names of numbers to measure beside LMN, as :func:`lmnfast.observables` lists them.

    Returns:
        The `Measurement`. LMN has no unit and lies between 1 and N. It carries no autograd graph.

    Raises:
        TypeError, ValueError: as :func:`connectivity`. ValueError also for another `negative`, and an unknown observable.

    Warns:
        UserWarning: in 0.2 % of the paths or more, outputs vary so little against their size that rounding hides it; or an
            observable does not apply.

    Source:
        arXiv 2310.05918, Eq. 1-3.

    Example:
        >>> m = lmnfast.measure(nn.Sequential(nn.Linear(8, 16), nn.SiLU()), torch.randn(30, 8))
        >>> m.samples, m.outputs, m.eigenvalues.shape, m.connectivity.shape
        (30, 16, torch.Size([30]), torch.Size([30, 30]))
        >>> 1 < m.lmn < 30
        True
        >>> m = lmnfast.measure(nn.Linear(8, 3), torch.randn(30, 8), observables=["curvature", "local_complexity"])
        >>> {name: round(value, 6) for name, value in m.observables.items()}
        {'curvature': 0.0, 'local_complexity': 0.0}
    """
    check_negative(negative)
    chosen = Chosen(observables)
    settings = settings_for(chosen, Settings(method, points, rule, budget, stabiliser))
    each = measured(f, x, settings, progress=progress)
    warn_of_offsets(each)
    m = measurement(each[0], settings, negative)
    m, problems = with_observables(m, each[0], chosen, x, f, f if isinstance(f, nn.Module) else None)
    for problem in problems:
        warnings.warn(f"f: {problem}", stacklevel=2)
    return m


def with_observables(
    m: Measurement,
    enqueued: Enqueued,
    chosen: Chosen,
    x: Tensor,
    f: Callable[[Tensor], Tensor],
    model: nn.Module | None,
) -> tuple[Measurement, list[str]]:
    """The measurement of f on x with its observables, and the warnings for those that do not apply."""
    if not chosen.names:
        return m, []
    values = Values(chosen)
    o = Observation(enqueued.L, enqueued.pooled, spectrum_of(m), x, f, model)
    values.observe((*chosen.at_step, *chosen.later), o)
    m = replace(m, observables=values.numbers())
    return m, [problem_of(name, reason) for name, reason in values.problems.items()]


def spectrum_of(m: Measurement) -> Spectrum:
    """What observables read of a measurement."""
    return Spectrum(m.lmn, m.complexity_bits, m.negative_share)


def lmn(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int | None = None,
    stacked: Stacked | None = None,
    negative: str = "absolute",
    stabiliser: float = 0.0,
) -> Tensor:
    """Linear mapping number of f on the samples x: ``linear_mapping_number(connectivity(f, x))``.

    Args:
        f: maps a batch (B, *in) to (B, *out), each row independent of the others. Outputs are flattened to K.
        x: (N, *in), floating point, the samples, of f's dtype and on its device; (B, N, *in) with `stacked`.
        method: as in :func:`connectivity`. With a method other than "path" the number is that method's stand-in for LMN; name
            the method with it.
        points, rule, budget, stacked: as in :func:`connectivity`.
        negative: the value that a negative eigenvalue counts as: "absolute" (the paper's) its magnitude, "clip" 0.
        stabiliser: as in :func:`connectivity`; 0 is the definition.

    Returns:
        0-dim float64 tensor on x's device, without a unit, from 1 to N; (B,) with `stacked`. It carries no autograd graph.

    Raises:
        TypeError, ValueError: as :func:`connectivity`. ValueError also for another `negative`.

    Warns:
        UserWarning: in 0.2 % of the paths or more, outputs vary so little against their size that rounding hides it.

    Source:
        arXiv 2310.05918, Eq. 1-3.

    Example:
        >>> round(float(lmnfast.lmn(nn.Linear(64, 10), torch.randn(500, 64))), 6)  # one linear map
        1.0
    """
    check_negative(negative)
    each = measured(f, x, Settings(method, points, rule, budget, stabiliser), stacked)
    warn_of_offsets(each)
    L = each[0].L if stacked is None else stacked_matrices(each)
    return torch.exp2(_spectrum(L, negative)[2].to(L.device))


def _complexity(values: Tensor, negative: str) -> Tensor:
    """Entropy of eigenvalues (..., N), in bits."""
    if negative == "clip":
        values = values.clamp(min=0)
    total = values.abs().sum(-1)
    if not (good := (total > 0) & (total < float("inf"))).all():
        raise ValueError(
            f"L: expected eigenvalues whose magnitudes have a finite sum above 0, got a sum of {float(total[~good][0])} "
            f"(negative={negative!r})"
        )
    return ops.spectral_entropy(values)


def check_negative(negative: str) -> None:
    """Raises ValueError if `lmn` does not accept this `negative`."""
    if negative not in NEGATIVE:
        raise ValueError(f"negative: expected one of {', '.join(NEGATIVE)}, got {negative!r}")


def check_matrix(L: Tensor) -> None:
    if isinstance(L, np.ndarray):
        raise TypeError("L: expected a floating-point tensor, got a numpy array; torch.from_numpy(L) is one")
    if not isinstance(L, Tensor) or not L.is_floating_point():
        raise TypeError(f"L: expected a floating-point tensor, got {getattr(L, 'dtype', type(L).__name__)}")
    if L.dim() < 2 or L.shape[-1] != L.shape[-2] or L.shape[-1] == 0:
        raise ValueError(f"L: expected square matrices (..., N, N) with N > 0, got shape {tuple(L.shape)}")
    if not all_finite(L):
        raise ValueError("L: expected finite entries, got NaN or Inf")
    if not _symmetric(L):
        raise ValueError("L: expected a symmetric matrix; eigenvalues would be those of its lower triangle")


def _symmetric(L: Tensor) -> bool:
    """Whether L is symmetric to 1e-4 of its largest entry.

    By tiles this takes 9 ms at N = 2048 on 2 cores; torch.allclose takes 66 ms.
    """
    L = L.detach()
    tolerance = 1e-4 * L.abs().amax()
    return all(
        bool((L[..., i : i + 256, i:] - L[..., i:, i : i + 256].mT).abs().amax() <= tolerance)
        for i in range(0, L.shape[-1], 256)
    )
