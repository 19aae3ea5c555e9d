"""The linear mapping number of a function on samples, with everything that it depends on."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import plot
from ._differentiable import check_differentiable, with_graph
from ._eigenvalues import by_magnitude, check_fits, check_negative, check_solver, estimated, solved
from ._enqueue import Enqueued
from ._entropy import complexity_with_graph
from ._group import ALONE, Group, is_alone, measurer, refuse_group, refused_together, sharded
from ._group_rows import Rows
from ._kept import formatted, html_table, read_values, write_values
from ._krylov import ESTIMATOR, interval
from ._measured import stacked_matrices, warn_of_offsets
from ._native import Progress
from ._observables import Chosen, Values, problem_of, settings_for
from ._observed import Observation, Spectrum
from ._settings import Settings, check_flag, check_level
from ._stacked import Stacked

# A number also depends on these, beside network and samples. Every table has them as columns, named as in `Measurement`.
SETTINGS = ("samples", "outputs", "points", "rule", "method", "precision", "solver", "negative", "stabiliser")
SHARES = ("constant_share", "negative_share")


@dataclass(frozen=True, eq=False)
class Measurement:
    """A linear mapping number with everything that it depends on; :func:`measure` returns it.

    ``float(m)`` is ``m.lmn``. Two measurements are equal if all their values are equal, including the tensors' values. A
    notebook shows a measurement as a table. The LMN of some of the samples is no estimate of the LMN of all samples: LMN grows
    with their number.

    Example:
        >>> m = lmnfast.measure(nn.Sequential(nn.Linear(8, 16), nn.SiLU()), torch.randn(30, 8))
        >>> m.save("measurement.npz")
        >>> lmnfast.Measurement.load("measurement.npz") == m
        True
        >>> matrix, spectrum = m.plot()  # matplotlib's Axes
    """

    lmn: float
    """2 ** complexity_bits. With a method other than "path", that method's stand-in for LMN."""
    complexity_bits: float
    """S_NL in bits."""
    eigenvalues: Tensor
    """(samples,) float64, by falling magnitude, with their signs. An estimate has the extreme ones that it found, fewer."""
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
    """The solver of the eigenproblem, in float64: "cpu" (LAPACK), "cuda" (the package's kernel) or "cusolver"; or the estimator
    in place of it, "krylov-chebyshev"."""
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
    standard_error: float = 0.0
    """Of `lmn` as an estimate of the matrix's LMN, from the draw of random vectors. 0 if all eigenvalues were solved."""
    bound: float = 0.0
    """The error of an estimated `lmn` beside that, at most. 0 if all eigenvalues were solved."""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """An interval that contains the LMN of the measured matrix in a share `level` of all draws, or more.

        Args:
            level: above 0 and below 1.

        Returns:
            The lower and the upper end; both are `lmn` if all eigenvalues were solved.

        Raises:
            TypeError: the level is no number.
            ValueError: a level out of range.

        Source:
            docs/mathematics.md, "An estimate for large N".
        """
        check_level(level)
        return interval(self.lmn, self.standard_error, self.bound, level, self.samples)

    def __repr__(self) -> str:
        names = [f.name for f in fields(self) if f.type is not Tensor and f.name not in self._unsaid()]
        return f"Measurement({', '.join(f'{name}={formatted(getattr(self, name))}' for name in names)})"

    def _unsaid(self) -> set[str]:
        """Fields that a text leaves out, as they say nothing."""
        errors = set() if self.solver == ESTIMATOR else {"standard_error", "bound"}
        return errors if self.observables else errors | {"observables"}

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all fields to one file, in numpy's format .npz. The file is written whole or not at all.

        Args:
            path: the file; nothing is added to its name. Missing folders are made.

        Raises:
            OSError: the file cannot be written.
        """
        every = self.to_dict()
        arrays = {n: v.detach().cpu().numpy() for n, v in every.items() if isinstance(v, Tensor)}
        write_values(path, "Measurement", {n: every[n] for n in every if n not in arrays}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Measurement":
        """Reads a file of `save`; no code in it is run. The measurement is equal to the saved one, with tensors on the CPU.

        Args:
            path: the file.

        Raises:
            ValueError: another file, or a damaged one.
            OSError: there is no file, or it cannot be read.
        """
        try:
            values, arrays = read_values(path, "Measurement")
            return cls(**_checked_fields(values, arrays))
        except ValueError as error:
            where = os.fspath(path)
            raise ValueError(f"path: expected a file of Measurement.save, got {where}: {error}") from None

    def plot(self, *, cluster: bool = False, ax: Any = None) -> Any:
        """Draws the matrix and the spectrum side by side, by `lmnfast.plot`. Needs matplotlib.

        Args:
            cluster: as in `lmnfast.plot.connectivity`.
            ax: two Axes to draw into. None: a new figure.

        Returns:
            The two Axes, as a numpy array.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot.matrix_and_spectrum(self, cluster=cluster, ax=ax)

    def _repr_html_(self) -> str:
        said = {n: v for n, v in self.to_dict().items() if n not in self._unsaid()}
        plain = {n: v for n, v in said.items() if not isinstance(v, (Tensor, dict))}
        return html_table("Measurement", plain | self.observables)


def _checked_fields(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a measurement as a file has them. Raises ValueError if they are not those of one."""
    if wrong := [name for name, array in arrays.items() if array.dtype.kind not in "biufc"]:
        raise ValueError(f"{wrong[0]} is an array of {arrays[wrong[0]].dtype}")
    given = {**values, **{name: torch.from_numpy(array) for name, array in arrays.items()}}
    kinds = {each.name: dict if each.name == "observables" else each.type for each in fields(Measurement)}
    later = {"stabiliser", "observables", "standard_error", "bound"}  # than the first version
    if not kinds.keys() - later <= given.keys() <= kinds.keys():
        raise ValueError(f"it has the fields {', '.join(sorted(given))}")
    if wrong := [name for name, value in given.items() if type(value) is not kinds[name]]:
        raise ValueError(f"{wrong[0]} is a {type(given[wrong[0]]).__name__}")
    if wrong := [name for name in arrays if not given[name].is_floating_point()]:
        raise ValueError(f"{wrong[0]} is of {given[wrong[0]].dtype}")
    if wrong := [
        name for name, value in given.get("observables", {}).items() if not isinstance(value, float)
    ]:
        raise ValueError(f"the observable {wrong[0]} is no number")
    n, shapes = given["samples"], {name: tuple(given[name].shape) for name in arrays}
    if given["solver"] == ESTIMATOR and shapes["eigenvalues"] == (len(given["eigenvalues"]),):
        shapes["eigenvalues"] = (max(n, *shapes["eigenvalues"]),)  # not all of them are known
    if shapes != {"eigenvalues": (n,), "connectivity": (n, n)}:
        raise ValueError(f"its tensors have the shapes {shapes} for {n} samples")
    return given


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dtype == other.dtype and torch.equal(value.cpu(), other.cpu())
    if isinstance(value, dict):  # NaN is the same as NaN
        return list(value) == list(other) and all(
            value[name] == other[name] or (math.isnan(value[name]) and math.isnan(other[name]))
            for name in value
        )
    return value == other


def measurement(
    enqueued: Enqueued,
    settings: Settings,
    negative: str = "absolute",
    on: torch.device | None = None,
    solver: str = "dense",
) -> Measurement:
    """Solves or estimates the eigenproblem of a connectivity (N, N) whose checks have passed.

    on: where; None: where the matrix is.
    """
    L = enqueued.L if on is None else enqueued.L.to(on)
    if solver == "estimate":
        found = estimated(L, negative, stacklevel=4)
        names = "lmn", "complexity_bits", "negative_share", "standard_error", "bound"
        return Measurement(
            eigenvalues=found.eigenvalues.to(enqueued.L.device),
            connectivity=enqueued.L,
            solver=ESTIMATOR,
            **{name: getattr(found, name) for name in names},
            **unsolved(enqueued, settings, negative),
        )
    values, by, bits = solved(L, negative)
    values = by_magnitude(values) if by == "cuda" else values
    below_zero = values.clamp(max=0).abs().sum() / values.abs().sum()
    # Three numbers in one copy: each copy from a card would wait for it.
    lmn, complexity_bits, share = torch.stack([torch.exp2(bits), bits, below_zero]).tolist()
    return Measurement(
        lmn=lmn,
        complexity_bits=complexity_bits,
        eigenvalues=values.to(enqueued.L.device),
        connectivity=enqueued.L,
        solver=by,
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
    solver: str = "dense",
    group: Group = ALONE,
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
        solver: "dense": all eigenvalues. "estimate": the measurement has an estimate of the LMN of all samples, with its errors
            and a bar of 1 % or less, in less time and memory from some thousand samples on; see
            :func:`nonlinear_complexity`.
        group: as in :func:`connectivity`. Every process of the group solves the eigenproblem and returns the whole measurement.

    Returns:
        The `Measurement`. LMN has no unit and lies between 1 and N. It carries no autograd graph.

    Raises:
        TypeError, ValueError: as :func:`connectivity`. ValueError also for another `negative` or `solver`, an unknown
            observable, and for more samples than the memory suffices for with the dense solver.

    Warns:
        UserWarning: in 0.2 % of the paths or more, outputs vary so little against their size that rounding hides it; or an
            observable does not apply; or the bar of an estimate is above 1 %.

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
    with refused_together(group):
        check_negative(negative)
        check_solver(solver)
        chosen = Chosen(observables)
        _check_fits(x, solver)
        settings = settings_for(chosen, Settings(method, points, rule, budget, stabiliser))
        measuring = measurer(
            group, function="measure", negative=negative, solver=solver, observables=chosen.names
        )
    each = measuring(f, x, settings, progress)
    warn_of_offsets(each)
    m = measurement(each[0], settings, negative, solver=solver)
    m, problems = with_observables(m, each[0], chosen, x, f, f if isinstance(f, nn.Module) else None)
    for problem in problems:
        warnings.warn(f"f: {problem}", stacklevel=2)
    return m


def _check_fits(x: Tensor, solver: str) -> None:
    """Raises ValueError for more samples than the dense solver has memory for. Other checks of the samples follow."""
    if solver == "dense" and isinstance(x, Tensor) and x.dim():
        check_fits(len(x), x.device)


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
    differentiable: bool = False,
    solver: str = "dense",
    group: Group = ALONE,
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
        differentiable: give the number a graph to x and to all tensors behind f that require grad, as in :func:`connectivity`.
        solver: "dense" or "estimate", as in :func:`nonlinear_complexity`. An estimate is of one network, without a graph.
        group: as in :func:`connectivity`, without `stacked` and `differentiable`. With solver "estimate" no process holds the
            whole matrix.

    Returns:
        0-dim float64 tensor on x's device, without a unit, from 1 to N; (B,) with `stacked`. It carries no autograd graph
        unless it is asked for.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`connectivity`. ValueError also for another `negative` or `solver`, and
            for more samples than the memory suffices for with the dense solver.

    Warns:
        UserWarning: in 0.2 % of the paths or more, outputs vary so little against their size that rounding hides it; or an
            estimate may be further than 1 % from the value.

    Source:
        arXiv 2310.05918, Eq. 1-3.

    Example:
        >>> round(float(lmnfast.lmn(nn.Linear(64, 10), torch.randn(500, 64))), 6)  # one linear map
        1.0
        >>> f = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> lmnfast.lmn(f, torch.randn(30, 8), differentiable=True).backward()
        >>> f[0].weight.grad.shape
        torch.Size([16, 8])
    """
    with refused_together(group):
        check_flag("differentiable", differentiable)
        check_negative(negative)
        check_solver(solver, differentiable, stacked is not None)
        if stacked is None and not differentiable:
            _check_fits(x, solver)
        refuse_group(group, stacked=stacked, differentiable=differentiable)
        settings = Settings(method, points, rule, budget, stabiliser)
        if differentiable:
            check_differentiable(settings, stacked)
        measuring = measurer(group, stacked, function="lmn", negative=negative, solver=solver)
    if differentiable:
        found = with_graph(f, x, settings)
        warn_of_offsets([found.enqueued])
        return torch.exp2(complexity_with_graph(found.entries, negative))
    if solver == "estimate" and not is_alone(group):
        value, enqueued = _estimated_by_group(f, x, settings, negative, group)
        warn_of_offsets([enqueued])
        return value
    each = measuring(f, x, settings)
    warn_of_offsets(each)
    if solver == "estimate":
        return each[0].L.new_tensor(estimated(each[0].L, negative).lmn, dtype=torch.float64)
    L = each[0].L if stacked is None else stacked_matrices(each)
    return torch.exp2(solved(L, negative)[2].to(L.device))


def _estimated_by_group(
    f: Callable[[Tensor], Tensor], x: Tensor, settings: Settings, negative: str, group: Any
) -> tuple[Tensor, Enqueued]:
    """`lmn` by solver "estimate", with the matrix left in rows; and what is known of these."""
    enqueued, first = sharded(
        f, x, settings, group, gather=False, function="lmn", negative=negative, solver="estimate"
    )
    found = Rows.of(enqueued.L, first, len(x), group).estimate(negative=negative)
    return x.new_tensor(found.lmn, dtype=torch.float64), enqueued
