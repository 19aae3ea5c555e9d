"""The registry of observables: numbers that stand beside the linear mapping number in rows and measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from . import _observed
from ._observed import DoesNotApply, Observation, number_of
from ._settings import Settings
from ._undisturbed import evaluating

READABLE = tuple(each.name for each in fields(Observation))
# What belongs to the moment: the training changes it after the step.
OF_THE_STEP = ("network", "model")
# Columns of rows and tables that no observable may have as its name, beside the names of the package's own observables.
TAKEN = (
    *("step", "layer", "checkpoint", "samples", "outputs", "points", "rule", "method", "precision", "solver"),
    *("negative", "constant_share", "stabiliser", "pooled"),
)

Function = Callable[[Observation], Any]


@dataclass(frozen=True)
class Observable:
    """A number that is measured beside the linear mapping number."""

    name: str
    formula: str
    source: str
    cost: str
    """On top of a connectivity matrix of N samples."""
    invariances: str
    limits: str
    """What it cannot show, and where it does not apply."""
    reads: tuple[str, ...]
    """The fields of :class:`lmnfast.Observation` that its function reads."""
    function: Function = field(repr=False)
    own: bool = field(default=False, repr=False)
    """Whether a user has registered it."""

    @property
    def at_step(self) -> bool:
        """Whether it must be computed while the parameters are those of the step."""
        return any(name in OF_THE_STEP for name in self.reads)

    def __str__(self) -> str:
        lines = ("formula", "source", "cost", "invariances", "limits")
        said = [f"{name}: {text}" for name in lines if (text := getattr(self, name))]
        return "\n  ".join([f"{self.name}:", *said])


MATRIX = "one pass over the matrix"
BUILT_IN = (
    Observable(
        "lmn",
        "2 ** complexity_bits",
        "arXiv 2310.05918, Eq. 3",
        "one eigenproblem of N x N, shared with complexity_bits and negative_share",
        "shifts and scales of each output",
        "grows with the number of samples and falls with the number of outputs; not comparable between tasks with others",
        ("spectrum",),
        _observed.lmn,
    ),
    Observable(
        "complexity_bits",
        "-sum p log2 p, p = |w| / sum |w|, over the eigenvalues w of the connectivity",
        "arXiv 2310.05918, Eq. 3",
        "one eigenproblem of N x N, shared with lmn and negative_share",
        "shifts and scales of each output",
        "as lmn",
        ("spectrum",),
        _observed.complexity_bits,
    ),
    Observable(
        "curvature",
        "1 - mean over pairs i < j of L[i, j]",
        "the mean of arXiv 2310.05918, Eq. 2",
        MATRIX,
        "shifts and scales of each output; no trend with the number of samples",
        "not how many linear maps there are, nor which samples share one; depends on the basis of the outputs",
        ("connectivity",),
        _observed.curvature,
    ),
    Observable(
        "pooled_curvature",
        "1 - mean over pairs i < j of sum_k cov(y_k, t)^2 / (var(t) sum_k var(y_k))",
        "the same, with the variances added over the outputs before the division",
        f"{MATRIX}, and one division a pair",
        "rotations, shifts and a common scale of the outputs; no trend with the number of samples",
        "outputs that hardly vary do not count; not how many linear maps there are; needs a method that has paths",
        ("pooled",),
        _observed.pooled_curvature,
    ),
    Observable(
        "participation_ratio",
        "N^2 / |L|_F^2, which is (sum w)^2 / sum w^2 over the eigenvalues w, with their signs",
        "the participation ratio of the spectrum; no eigenvalues are needed, as all L[i, i] are 1",
        MATRIX,
        "shifts and scales of each output; reaches a constant as the number of samples grows",
        "a number near 1, also where lmn is large: not how many linear maps there are",
        ("connectivity",),
        _observed.participation_ratio,
    ),
    Observable(
        "negative_share",
        "sum of |w| over the eigenvalues w < 0, over sum |w|",
        "the small negative eigenvalues of arXiv 2310.05918, Figure 4",
        "one eigenproblem of N x N, shared with lmn",
        "shifts and scales of each output",
        "says how far the connectivity is from a covariance, not how bent the network is",
        ("spectrum",),
        _observed.negative_share,
    ),
    Observable(
        "jacobian_rank",
        "exp(entropy) of the eigenvalues, as shares of their sum, of G[i, j] = <J_i, J_j>",
        "the effective rank of Roy and Vetterli (2007), of the Jacobians at the samples",
        "Jacobians of N samples, and one more eigenproblem, of N x N or of the features of the Jacobians (hidden units of a "
        "chain with one hidden layer) if these are fewer; waits for a CUDA device",
        "rotations and a common scale of the outputs, shifts; rotations of the samples",
        "sees the network at the samples alone, not between them; common parts of the Jacobians bring it near 1; does not "
        "apply where a layer has no derivative",
        ("samples", "network"),
        _observed.jacobian_rank,
    ),
    Observable(
        "local_complexity",
        "mean over pairs i < j of the number of units of the first hidden layer with z_i z_j < 0, z the pre-activations: "
        "sum over units of n+ n- / (N (N - 1) / 2)",
        "the count of arXiv 2310.12977 and 2402.15555, along paths in place of a neighbourhood",
        "one forward pass of N samples; waits for a CUDA device",
        "scales of each unit; scales and rotations of the samples with the weights; everything behind the first hidden layer",
        "the first hidden layer alone, and not how strongly a unit bends; a z of exactly 0 counts on neither side; smooth "
        "activations count where their sigmoid crosses its half; behind a normalisation z is not affine, and only "
        "paths with ends on two sides count; does not apply to other networks than chains and blocks, nor to sin",
        ("samples", "network"),
        _observed.local_complexity,
    ),
    Observable(
        "representation_rank",
        "exp(entropy) of the singular values, as shares of their sum, of the samples at the cut (N, D), not centred",
        "RankMe, arXiv 2210.02885, without its epsilon of 1e-7",
        "one singular value decomposition of N x D",
        "rotations and a common scale of the samples",
        "the samples alone, not the network behind the cut; a large mean of the samples brings it near 1",
        ("samples",),
        _observed.representation_rank,
    ),
    Observable(
        "l2_norm",
        "root of the sum of squares of all parameters of the model",
        "arXiv 2310.05918, Figure 2",
        "one pass over the parameters",
        "permutations of the units; the same for all layers and samples",
        "changes with scales that the outputs do not show, as before a normalisation; does not apply to plain functions",
        ("model",),
        _observed.l2_norm,
    ),
)
_registry: dict[str, Observable] = {each.name: each for each in BUILT_IN}


@dataclass(frozen=True, repr=False)
class Observables:
    """A list of observables; ``str`` gives a text for people."""

    all: tuple[Observable, ...]

    def __iter__(self) -> Iterator[Observable]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, name: str) -> Observable:
        """Raises KeyError for a name that is not in the list."""
        return {each.name: each for each in self.all}[name]

    def __str__(self) -> str:
        return "\n".join(map(str, self.all))

    __repr__ = __str__

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The fields of each observable but its function, by name, as plain values that json accepts."""
        names = ("formula", "source", "cost", "invariances", "limits")
        return {
            each.name: {name: getattr(each, name) for name in names} | {"reads": list(each.reads)}
            for each in self.all
        }


def observables() -> Observables:
    """Lists the observables that `Probe` and `measure` can measure beside the linear mapping number.

    Returns:
        Those of the package, then those of :func:`register_observable`. Each has name, formula, source, cost, invariances and
        limits (what it cannot show).

    Raises:
        KeyError: ``observables()[name]`` with an unknown name.

    Example:
        >>> print(lmnfast.observables()["curvature"].formula)
        1 - mean over pairs i < j of L[i, j]
        >>> [each.name for each in lmnfast.observables()][:4]
        ['lmn', 'complexity_bits', 'curvature', 'pooled_curvature']
    """
    return Observables(tuple(_registry.values()))


def register_observable(
    name: str,
    function: Function,
    *,
    reads: Sequence[str] = ("connectivity", "samples", "network", "model"),
    formula: str = "",
    source: str = "",
    cost: str = "",
    invariances: str = "",
    limits: str = "",
) -> Observable:
    """Registers an observable of your own, for this process. Registering a name again replaces it.

    Args:
        name: a Python identifier; the column's name.
        function: of an :class:`lmnfast.Observation`. Returns a number, a 0-dim tensor, a function without arguments that
            returns one of these (a probe calls it on its solver's thread), or None where the observable does not apply: its
            column then has NaN. What the function changes in the model, and draws from torch, is put back (parameters from a
            copy that is kept while it runs); it runs in eval mode and without gradients.
        reads: the fields of the `Observation` that the function reads. "pooled", "spectrum" and "model" are None for a
            function that does not read them, and "network" refuses to be called. An observable that reads neither "network" nor
            "model" is computed on the probe's solver thread, beside the training. "spectrum" does not go together with these
            two.
        formula, source, cost, invariances, limits: texts for :func:`observables`.

    Returns:
        The observable, as :func:`observables` lists it.

    Raises:
        TypeError: the function cannot be called.
        ValueError: the name is no identifier, or is one of the package's; reads names another field.

    Example:
        >>> registered = lmnfast.register_observable(
        ...     "worst_pair", lambda o: 1 - o.connectivity.min(), reads=["connectivity"], formula="1 - min L"
        ... )
        >>> m = lmnfast.measure(nn.Sequential(nn.Linear(8, 16), nn.SiLU()), torch.randn(30, 8), observables="worst_pair")
        >>> 0 < m.observables["worst_pair"] < 1
        True
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: expected a Python identifier, got {name!r}")
    if name in TAKEN or name.startswith("lmn_") or (name in _registry and not _registry[name].own):
        raise ValueError(f"name: expected one that is not the package's own, got {name!r}")
    if not callable(function):
        raise TypeError(f"function: expected a function of an Observation, got {type(function).__name__}")
    named = _names("reads", reads)
    if unknown := [each for each in named if each not in READABLE]:
        raise ValueError(f"reads: expected among {', '.join(READABLE)}, got {unknown[0]!r}")
    if "spectrum" in named and any(each in OF_THE_STEP for each in named):
        raise ValueError("reads: expected 'spectrum' without 'network' and 'model', got both")
    _registry[name] = Observable(
        name, formula, source, cost, invariances, limits, named, _undisturbing(function, named), own=True
    )
    return _registry[name]


def _undisturbing(function: Function, reads: tuple[str, ...]) -> Function:
    """The user's function with a model in eval mode, which is left as it was; or without the model, if it does not read it."""

    def withheld(x: Any) -> Any:
        raise ValueError("expected 'network' among `reads` of an observable that calls the network")

    unread: dict[str, Any] = {name: None for name in ("pooled", "spectrum", "model") if name not in reads}

    def observed(o: Observation) -> Any:
        if "model" not in reads and "network" not in reads:
            return function(replace(o, **unread, network=withheld))
        network = o.network if "network" in reads else withheld
        with evaluating(o.model, o.network, changed=True), _parameters_kept(o.model, o.network):
            return function(replace(o, **unread, network=network))

    return observed


@contextmanager
def _parameters_kept(*modules: Any) -> Iterator[None]:
    """Puts back the parameters, from copies. `evaluating` does not: a forward pass leaves parameters alone."""
    roots = [module for module in modules if isinstance(module, nn.Module)]
    parameters = list(dict.fromkeys(p for module in roots for p in module.parameters()))
    kept = [(p, p._version, p.detach().clone(), p.requires_grad) for p in parameters]
    with ExitStack() as stack:
        for p in parameters:  # values that are put back are no change that autograd must know of
            stack.enter_context(torch.autograd._unsafe_preserve_version_counter(p))
        try:
            yield
        finally:
            for p, version, value, needs in kept:
                if p.requires_grad != needs:
                    p.requires_grad_(needs)
                if p._version != version:
                    p.data.copy_(value)


def _names(argument: str, names: Any) -> tuple[str, ...]:
    """Names as a tuple, also a single one. Raises TypeError for anything else."""
    if isinstance(names, str):
        return (names,)
    found = tuple(names) if isinstance(names, Iterable) else (None,)
    if not all(isinstance(name, str) for name in found):
        raise TypeError(f"{argument}: expected a name or a sequence of names, got {names!r}")
    return found


class Chosen:
    """The observables of a measurement, by their names.

    Raises:
        TypeError: no names.
        ValueError: an unknown name (the message lists the known ones), or a name twice.
    """

    def __init__(self, names: str | Sequence[str] = ()) -> None:
        self.names = _names("observables", names)
        if unknown := [name for name in self.names if name not in _registry]:
            raise ValueError(f"observables: expected among {', '.join(_registry)}, got {unknown[0]!r}")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"observables: expected different ones, got {', '.join(self.names)}")
        self.at_step = tuple(_registry[name] for name in self.names if _registry[name].at_step)
        self.later = tuple(_registry[name] for name in self.names if not _registry[name].at_step)

    def __reduce__(self) -> tuple[type[Chosen], tuple[tuple[str, ...]]]:
        return Chosen, (self.names,)  # functions need not be picklable

    def read(self, name: str) -> bool:
        """Whether some of them read this field of an `Observation`."""
        return any(name in each.reads for each in (*self.at_step, *self.later))

    @property
    def solves(self) -> bool:
        """Whether the eigenproblem of the connectivity must be solved. Without observables: yes."""
        return not self.names or self.read("spectrum")


def settings_for(chosen: Chosen, settings: Settings) -> Settings:
    """The settings with the pooled matrix, if an observable reads it. Without paths there is none."""
    return replace(settings, pooled=chosen.read("pooled") and settings.method != "jacobian")


class Values:
    """The values of the observables of one measurement, and why some have none."""

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self.problems: dict[str, str] = {}
        self._values: dict[str, Any] = {}

    def observe(self, which: Sequence[Observable], o: Observation) -> None:
        """Calls the functions of some of them."""
        for each in which:
            try:
                self._values[each.name] = each.function(o)
            except DoesNotApply as error:
                self._values[each.name], self.problems[each.name] = None, str(error)
            except Exception as error:
                if each.own:
                    raise _failed(each.name, error) from error
                raise

    def convert(self, convert: Callable[[Any], Any]) -> None:
        """Replaces the values that are there."""
        self._values = {name: convert(value) for name, value in self._values.items()}

    def numbers(self) -> dict[str, float]:
        """The values by name, in the order that was asked for. NaN for those that do not apply."""
        found: dict[str, float] = {}
        for name in self.chosen.names:
            try:
                number = number_of(self._values[name])
            except DoesNotApply as error:
                number, self.problems[name] = None, str(error)
            except Exception as error:
                raise _failed(name, error) from error
            if number is None:
                self.problems.setdefault(name, "its function says so")
            found[name] = float("nan") if number is None else number
        return found


def _failed(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"observable {name!r}: {type(error).__name__}: {error}; expected a function that returns a number, a tensor of one "
        "number, a function of no arguments that returns one of these, or None"
    )


def problem_of(name: str, reason: str) -> str:
    """The warning for an observable that does not apply."""
    return f"observable {name!r} does not apply, its value is NaN: {reason}"
