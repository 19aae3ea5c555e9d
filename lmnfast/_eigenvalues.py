"""From a connectivity matrix to its eigenvalues, its entropy, and the linear mapping number."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from . import _choices, _krylov, _native, ops
from ._checks import all_finite
from ._choices import NEGATIVE
from ._entropy import complexity_with_graph, entropy
from ._memory import available, said_bytes
from ._settings import check_flag
from ._threads import one_core_after_fork
from .ops.symmetric_eigenvalues import fits

SOLVERS = ("auto", "cpu", "cuda")
# Bytes that the dense solve takes for an entry of the matrix: float64, and LAPACK's copy of it.
DENSE_BYTES = 16
LARGE = 4096  # from this N on the memory is looked at, 0.1 ms


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
    check_fits(L.shape[-1], L.device)
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if solver == "cuda" and not L.is_cuda:
        raise ValueError(f"solver: 'cuda' solves matrices on a CUDA device, got one on {L.device}")
    L = L.detach()
    L = L if L.dtype == torch.float32 else L.double()
    values = None if solver == "cpu" else _by_kernel(L)
    if values is None or bool(values.isnan().any()):
        values = _by_library(L, solver)[0]
    return by_magnitude(values).to(L.device)


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
def by_magnitude(values: Tensor) -> Tensor:
    return values.gather(-1, values.abs().argsort(-1, descending=True))


def solved(L: Tensor, negative: str) -> tuple[Tensor, str, Tensor]:
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
    values = by_magnitude(values)
    return values, solver, entropy(values, negative)


def nonlinear_complexity(
    L: Tensor, *, negative: str = "absolute", differentiable: bool = False, solver: str = "dense"
) -> Tensor:
    """Nonlinear complexity S_NL in bits: the von Neumann entropy of a connectivity matrix.

    ``S_NL = -sum p log2 p`` with ``p = |w| / sum |w|`` over the eigenvalues w; 0 log 0 = 0. All of it in float64.

    Args:
        L: (..., N, N), floating point, symmetric; without a unit, as r2 has none.
        negative: the value that a negative eigenvalue counts as: "absolute" (the paper's) its magnitude, "clip" 0.
        differentiable: keep L's graph; the derivative is that of docs/mathematics.md, "The gradient". At an eigenvalue that is
            0 the entropy has a kink, and its derivative counts as 0.
        solver: "dense": all eigenvalues. "estimate": for one matrix of some thousand samples or more, an estimate from products
            with the matrix, which needs no second matrix and less time: 2 ** S_NL is within 1 % of its value in 95 % of
            cases or more. :func:`measure` gives the estimate with its errors. The same matrix gives the same estimate.

    Returns:
        (...) float64 on L's device, in bits, from 0 to log2 N.

    Raises:
        TypeError, ValueError: as :func:`eigenvalues`. ValueError also for another `negative`, and if the entropy is not
            defined: all eigenvalues are 0, or with "clip" none is above 0; for another solver, and for an estimate of several
            matrices, or with a graph.
        RuntimeError: differentiable, and L has no graph, or gradients are off.

    Warns:
        UserWarning: an estimate may be further than 1 % from the value.

    Source:
        arXiv 2310.05918, Eq. 3.

    Example:
        >>> lmnfast.nonlinear_complexity(torch.eye(8))
        tensor(3., dtype=torch.float64)
    """
    return _complexity(L, negative, differentiable, solver)


def _complexity(L: Tensor, negative: str, differentiable: bool, solver: str) -> Tensor:
    check_flag("differentiable", differentiable)
    check_negative(negative)
    check_solver(solver, differentiable)
    if differentiable:
        check_graph(L)
        return complexity_with_graph(L, negative)
    if solver == "dense":
        return entropy(eigenvalues(L), negative)
    check_matrix(L)
    if L.dim() != 2:
        raise ValueError(f"L: expected one matrix (N, N) for solver='estimate', got shape {tuple(L.shape)}")
    return L.new_tensor(estimated(L, negative, stacklevel=4).complexity_bits, dtype=torch.float64)


def estimated(L: Tensor, negative: str, stacklevel: int = 3) -> _krylov.SpectralEstimate:
    """The estimate of a checked matrix (N, N), with a warning if it is less exact than it should be."""
    found = _krylov.of_matrix(L, negative)
    warn_of_bar(found, stacklevel)
    return found


def warn_of_bar(found: _krylov.SpectralEstimate, stacklevel: int) -> None:
    """Warns if an estimate is less exact than it should be."""
    low, high = found.interval()
    bar = max(high / found.lmn, found.lmn / low) - 1
    if bar > 1.25 * _krylov.TOLERANCE:  # a bar varies by a tenth
        warnings.warn(
            f"solver: the estimated LMN of {found.lmn:.6g} may be up to {bar:.2%} from its value",
            stacklevel=stacklevel + 1,
        )


def linear_mapping_number(
    L: Tensor, *, negative: str = "absolute", differentiable: bool = False, solver: str = "dense"
) -> Tensor:
    """Linear mapping number ``2 ** S_NL`` of a connectivity matrix: 1 for one linear map, N for N unrelated linear maps.

    Args:
        L: (..., N, N), floating point, symmetric; without a unit, as r2 has none.
        negative: the value that a negative eigenvalue counts as: "absolute" (the paper's) its magnitude, "clip" 0.
        differentiable, solver: as in :func:`nonlinear_complexity`.

    Returns:
        (...) float64 on L's device, from 1 to N.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`nonlinear_complexity`.

    Warns:
        UserWarning: as :func:`nonlinear_complexity`.

    Source:
        arXiv 2310.05918, Eq. 3.

    Example:
        >>> lmnfast.linear_mapping_number(torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)))
        tensor(2.0000, dtype=torch.float64)
        >>> f = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> L = lmnfast.connectivity(f, torch.randn(30, 8), differentiable=True)
        >>> lmnfast.linear_mapping_number(L, differentiable=True).backward()
        >>> f[2].weight.grad.shape
        torch.Size([3, 16])
    """
    return torch.exp2(_complexity(L, negative, differentiable, solver))


def check_negative(negative: str) -> None:
    """Raises ValueError if `lmn` does not accept this `negative`."""
    if negative not in NEGATIVE:
        raise ValueError(f"negative: expected one of {', '.join(NEGATIVE)}, got {negative!r}")


def check_solver(solver: str, differentiable: bool = False, stacked: bool = False) -> None:
    """Raises ValueError if `lmn` does not accept this `solver`, or not with these."""
    if solver not in _choices.SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(_choices.SOLVERS)}, got {solver!r}")
    for name, given in (("differentiable=True", differentiable), ("stacked networks", stacked)):
        if given and solver == "estimate":
            raise ValueError(f"solver: 'estimate' does not go together with {name}; expected 'dense'")


def check_fits(samples: int, where: torch.device) -> None:
    """`check_dense` for matrices so large that memory may be lacking."""
    if samples >= LARGE:
        check_dense(samples, where)


def check_dense(samples: int, where: torch.device) -> None:
    """Raises ValueError if the dense solver needs more memory than a device has."""
    needed, free = DENSE_BYTES * samples**2, available(where)
    if free is not None and needed > free:
        raise ValueError(
            f"solver: 'dense' needs {said_bytes(needed)} of memory for N = {samples}, and {said_bytes(free)} are free on "
            f"{where}; expected solver 'estimate', or a machine with more memory"
        )


def check_graph(L: Tensor) -> None:
    """Raises the errors of a matrix that is to be differentiated in."""
    check_matrix(L)
    if not (torch.is_grad_enabled() and L.requires_grad):
        why = "it does not require grad" if torch.is_grad_enabled() else "gradients are off"
        raise RuntimeError(
            f"L: expected a matrix with a graph, as connectivity(..., differentiable=True) gives it; {why}"
        )


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
