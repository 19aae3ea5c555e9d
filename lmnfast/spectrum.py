"""From a connectivity matrix to its eigenvalues, its entropy, and the linear mapping number."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .connectivity import connectivity
from .evaluation import DEFAULT_BUDGET, all_finite
from .network import Stacked

SOLVERS = ("auto", "cpu", "cuda")
# An estimate until it is measured on a card: cuSOLVER's dense solver is a long sequence of small dependent steps,
# so latency bounds it where the matrix is small, and LAPACK on the CPU is ahead.
CUDA_SOLVES_FROM = 2048


def eigenvalues(L: Tensor, solver: str = "auto") -> Tensor:
    """Eigenvalues of a connectivity matrix, by falling magnitude; equal to a sorted ``torch.linalg.eigvalsh``.

    Always solved in float64: near rank one, hundreds of eigenvalues lie below float32 rounding, and their noise
    counts (measured: an affine network's LMN of 1 comes out as 1.0001 at N = 768 and 4096).

    Args:
        L: (..., N, N), floating point, symmetric.
        solver: where a matrix on a CUDA device is solved. "cpu"; "cuda", but on the CPU where the device's solver
            fails; "auto" is "cuda" from N = CUDA_SOLVES_FROM on.

    Returns:
        (..., N) float64 on L's device.

    Raises:
        TypeError: L is not a floating-point tensor.
        ValueError: L is not square, is empty, not finite, or not symmetric to 1e-4; unknown solver, or "cuda" for
            a matrix elsewhere.
    """
    return _solved(L, solver)[0].to(L.device)


def _solved(L: Tensor, solver: str = "auto") -> tuple[Tensor, str]:
    """The eigenvalues, where they were solved for, and where that was."""
    _check_matrix(L)
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if solver == "cuda" and not L.is_cuda:
        raise ValueError(f"solver: 'cuda' solves matrices on a CUDA device, got one on {L.device}")
    L, values, used = L.detach(), None, "cpu"
    if L.is_cuda and (solver == "cuda" or (solver == "auto" and L.shape[-1] >= CUDA_SOLVES_FROM)):
        try:
            values, used = torch.linalg.eigvalsh(L.double()), "cuda"
        except torch.linalg.LinAlgError:  # GPU solvers fail on some nearly rank-one matrices
            pass
    if values is None:
        values = torch.linalg.eigvalsh(L.cpu().double())
    return values.gather(-1, values.abs().argsort(-1, descending=True)), used


def nonlinear_complexity(L: Tensor) -> Tensor:
    """Nonlinear complexity S_NL in bits: the von Neumann entropy of a connectivity matrix.

    ``S_NL = -sum p log2 p`` with ``p = |w| / sum |w|`` over the eigenvalues w.

    Args:
        L: (..., N, N), floating point, symmetric.

    Returns:
        (...) float64. Raises as :func:`eigenvalues`. Source: arXiv 2310.05918, Eq. 3.
    """
    return ops.spectral_entropy(eigenvalues(L))


def linear_mapping_number(L: Tensor) -> Tensor:
    """Linear mapping number ``2 ** S_NL`` of a connectivity matrix: 1 for one linear map, N for N of them.

    Args:
        L: (..., N, N), floating point, symmetric.

    Returns:
        (...) float64. Raises as :func:`eigenvalues`. Source: arXiv 2310.05918, Eq. 3.
    """
    return torch.exp2(nonlinear_complexity(L))


@dataclass(frozen=True, eq=False)
class Measurement:
    """A linear mapping number with all it depends on. A sub-sample's value is no estimate of the whole's."""

    lmn: float
    complexity_bits: float
    eigenvalues: Tensor
    """(samples,) float64, by falling magnitude."""
    connectivity: Tensor
    """(samples, samples)."""
    samples: int
    points: int
    rule: str
    method: str
    """As in `connectivity`; what another than "path" gives stands in for LMN, and "jacobian" has no nodes."""
    precision: str
    """``torch.get_float32_matmul_precision()`` when the connectivity was computed. In float32 on CUDA, fused
    kernels follow it: "highest" keeps float32's last bits by a split into two TF32 parts, "high" and "medium"
    use TF32 on the distance from the chord. On the CPU they are "highest" whatever it says."""
    solver: str
    """Where the eigenproblem was solved, in float64: "cpu" or "cuda"."""

    def __repr__(self) -> str:
        return (
            f"Measurement(lmn={self.lmn:.6g}, complexity_bits={self.complexity_bits:.6g}, samples={self.samples}, "
            f"points={self.points}, rule={self.rule!r}, method={self.method!r}, precision={self.precision!r}, "
            f"solver={self.solver!r})"
        )


def measurement(
    L: Tensor, *, points: int, rule: str, method: str = "path", precision: str | None = None
) -> Measurement:
    """Solves the eigenproblem of a connectivity matrix that :func:`connectivity` returned; (N, N).

    precision: that of its computation; None: the present one.
    """
    values, solver = _solved(L)
    bits = ops.spectral_entropy(values)
    return Measurement(
        lmn=float(torch.exp2(bits)),
        complexity_bits=float(bits),
        eigenvalues=values.to(L.device),
        connectivity=L,
        samples=len(L),
        points=points,
        rule=rule,
        method=method,
        precision=precision or torch.get_float32_matmul_precision(),
        solver=solver,
    )


def measure(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int = DEFAULT_BUDGET,
) -> Measurement:
    """Linear mapping number of f on the samples x, with its matrix, eigenvalues and settings.

    Arguments, errors and detachment as :func:`connectivity`.
    """
    precision = torch.get_float32_matmul_precision()
    L = connectivity(f, x, method=method, points=points, rule=rule, budget=budget)
    return measurement(L, points=points, rule=rule, method=method, precision=precision)


def lmn(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int = DEFAULT_BUDGET,
    stacked: Stacked | None = None,
) -> Tensor:
    """Linear mapping number of f on the samples x: ``linear_mapping_number(connectivity(f, x))``.

    With another method than "path" it is that method's stand-in for it, and goes by the method's name.
    Arguments, errors and detachment as :func:`connectivity`.

    Returns:
        0-dim float64 tensor; (B,) with `stacked`. Source: arXiv 2310.05918, Eq. 1-3.
    """
    L = connectivity(f, x, method=method, points=points, rule=rule, budget=budget, stacked=stacked)
    return linear_mapping_number(L)


def _check_matrix(L: Tensor) -> None:
    if not isinstance(L, Tensor) or not L.is_floating_point():
        raise TypeError(f"L: expected a floating-point tensor, got {getattr(L, 'dtype', type(L).__name__)}")
    if L.dim() < 2 or L.shape[-1] != L.shape[-2] or L.shape[-1] == 0:
        raise ValueError(f"L: expected square matrices (..., N, N) with N > 0, got shape {tuple(L.shape)}")
    if not all_finite(L):
        raise ValueError("L: expected finite entries, got NaN or Inf")
    if not torch.allclose(L, L.mT, rtol=0.0, atol=1e-4):
        raise ValueError("L: expected a symmetric matrix; eigenvalues would be those of its lower triangle")
