"""Several networks of one structure with stacked parameters: their metrics, LMN and observables, each by one call for all."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .. import ops
from .._eigenvalues import solved
from .._measured import measured, stacked_matrices, warn_of_offsets
from .._observables import Chosen, settings_for
from .._observed import mean_bend, participation
from .._settings import Settings
from ..spectrum import unsolved
from .config import Config
from .penalty import LAYER, slopes_of
from .tasks import Task
from .training import metrics_from

# Is added to the diagonal of a matrix whose diagonal entries are 1 and which rounding can make indefinite by 1e-14.
RIDGE = 1e-12


def stacked_model(models: Sequence[nn.Sequential]) -> nn.Sequential:
    """A model whose parameters are those of these models, stacked: (networks, ...) each. It cannot be called."""
    stack = deepcopy(models[0])
    for name, parameter in stack.named_parameters():
        parameter.data = torch.stack([model.get_parameter(name).detach() for model in models])
    return stack


@dataclass(frozen=True, eq=False)
class Observed:
    """What the observables of several networks are computed from."""

    complexity_bits: Tensor
    """(networks,) float64."""
    negative_share: Tensor
    """(networks,) float64."""
    L: Tensor
    """(networks, N, N), the connectivities."""
    pooled: Tensor | None
    """As L; None if no observable reads it."""
    samples: Tensor
    """(networks, N, D), at the cut."""
    first: tuple[Tensor, Tensor]
    """Weights and biases of the first Linear behind the cut, (networks, units, D) and (networks, units)."""
    last: Tensor
    """(networks, K, units), the weights of the second and last Linear."""
    activation: nn.Module
    """Between the two."""

    def before_activation(self, dtype: torch.dtype) -> Tensor:
        """(networks, N, units)."""
        weight, bias = (value.to(dtype) for value in self.first)
        return torch.baddbmm(bias[:, None], self.samples.to(dtype), weight.mT)


def local_complexity(o: Observed) -> Tensor:
    z = o.before_activation(o.samples.dtype)
    pairs = max(1, z.shape[1] * (z.shape[1] - 1) // 2)
    return ((z > 0).sum(1) * (z < 0).sum(1)).sum(1).double() / pairs


def pooled_curvature(o: Observed) -> Tensor:
    assert o.pooled is not None
    return vmap(mean_bend)(o.pooled)


def jacobian_rank(o: Observed) -> Tensor:
    """By the Gram matrix of the features ``B s`` with ``B^T B = (W3^T W3) * (W2 W2^T)``, see docs/mathematics.md."""
    first, last = o.first[0].double(), o.last.double()
    M = (last.mT @ last) * (first @ first.mT)
    norms = M.diagonal(dim1=1, dim2=2).sqrt()
    used = torch.where(norms > 0, norms, 1.0)  # units with norm 0 change no Jacobian
    ridge = RIDGE * torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    root = torch.linalg.cholesky_ex(M / (used[:, :, None] * used[:, None]) + ridge).L
    features = slopes_of(o.activation, o.before_activation(torch.float64)) @ (norms[..., None] * root)
    return _effective_rank(_eigenvalues(features.mT @ features))


def representation_rank(o: Observed) -> Tensor:
    """Singular values are roots of eigenvalues here. One below 1e-7 of the largest is wrong by about as much, which moves the
    rank by less than 1e-5 of itself."""
    x = o.samples.double()
    return _effective_rank(_eigenvalues(x.mT @ x if x.shape[2] <= x.shape[1] else x @ x.mT).sqrt())


def _eigenvalues(G: Tensor) -> Tensor:
    """The eigenvalues of matrices (networks, N, N) that have none below 0."""
    values = ops.symmetric_eigenvalues(G)
    if bool(values.isnan().any()):  # the kernel may give up
        values = ops.symmetric_eigenvalues(G.cpu()).to(G.device)
    return values.clamp(min=0)


def _effective_rank(values: Tensor) -> Tensor:
    """exp(entropy) of the rows of values >= 0; NaN for a row of zeros."""
    some = values.sum(1) > 0
    ranks = torch.exp2(ops.spectral_entropy(torch.where(some[:, None], values, 1.0)))
    return torch.where(some, ranks, float("nan"))


# The observables that are computed for all networks together. Their formulas are those of `lmnfast.observables`.
OBSERVED: dict[str, Callable[[Observed], Tensor]] = {
    "lmn": lambda o: torch.exp2(o.complexity_bits),
    "complexity_bits": lambda o: o.complexity_bits,
    "negative_share": lambda o: o.negative_share,
    "curvature": lambda o: vmap(mean_bend)(o.L),
    "pooled_curvature": pooled_curvature,
    "participation_ratio": lambda o: participation(o.L),
    "jacobian_rank": jacobian_rank,
    "local_complexity": local_complexity,
    "representation_rank": representation_rank,
}


class Networks:
    """Several networks with the tasks that they are trained on, on a device.

    Args:
        models: as make_model returns them, with two hidden layers, and of one structure.
        tasks: as many, of one size.
        config: of one of the runs, settled. What the others have otherwise, as the seed, is not read.

    Attributes:
        model: `stacked_model` of the models.
        task: the tasks, with one more dimension in front of their tensors.
    """

    def __init__(self, models: Sequence[nn.Sequential], tasks: Sequence[Task], config: Config) -> None:
        self.config, self.loss_dtype = config, getattr(torch, config.loss_dtype)
        self.model = stacked_model(models).to(config.device)
        names = [field.name for field in fields(Task) if field.name != "vocabulary"]
        stacks = {name: torch.stack([getattr(task, name) for task in tasks]) for name in names}
        self.task = Task(
            tasks[0].vocabulary, **{name: stack.to(config.device) for name, stack in stacks.items()}
        )
        self._one = deepcopy(models[0]).to(config.device)  # is called with the parameters of each network
        behind = [name for name, _ in self._one.named_children()].index(LAYER) + 1
        self._before, self._tail = self._one[:behind], self._one[behind:]

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, float]]:
        """METRICS of each network. Waits for the device."""

        def one(
            parameters: dict[str, Tensor],
            train: Tensor,
            test: Tensor,
            train_labels: Tensor,
            test_labels: Tensor,
        ) -> dict[str, Tensor]:
            logits = [functional_call(self._one, parameters, (inputs,)) for inputs in (train, test)]
            return metrics_from(
                *(logits[0], logits[1], train_labels, test_labels), parameters.values(), self.loss_dtype
            )

        task = self.task
        inputs, labels = (task.train_inputs, task.test_inputs), (task.train_labels, task.test_labels)
        found = vmap(one)(self._parameters_of(self.model), *inputs, *labels)
        counts = {name for name, values in found.items() if not values.is_floating_point()}
        return [
            {name: int(value) if name in counts else value for name, value in row.items()}
            for row in _rows(found)
        ]

    @torch.no_grad()
    def measure(self) -> list[dict]:
        """The row of each network as a probe has it, without step and metrics. Waits for the device."""
        config, chosen = self.config, Chosen(self.config.beside)
        settings = settings_for(
            chosen, Settings(config.method, config.points, config.rule, stabiliser=config.stabiliser)
        )
        inputs = self.task.train_inputs[:, : config.samples]
        parameters = self._parameters_of(self._before)
        x = vmap(lambda own, tokens: functional_call(self._before, own, (tokens,)))(parameters, inputs)
        tail = self._parameters_of(self._tail)
        each = measured(self._tail, x, settings, (tail, {}))
        warn_of_offsets(each, f"layer {LAYER!r}")
        L = stacked_matrices(each)
        values, solver, bits = solved(L, config.negative)  # on the CPU if LAPACK had to solve it
        below_zero = (values.clamp(max=0).abs().sum(-1) / values.abs().sum(-1)).to(L.device)
        bits = bits.to(L.device)
        first, activation, last = self._tail.named_children()
        o = Observed(
            bits,
            below_zero,
            L,
            stacked_matrices(each, pooled=True) if settings.pooled else None,
            x,
            (tail[f"{first[0]}.weight"], tail[f"{first[0]}.bias"]),
            tail[f"{last[0]}.weight"],
            activation[1],
        )
        names = dict.fromkeys(("lmn", "complexity_bits", "negative_share", *chosen.names))
        numbers = {name: OBSERVED[name](o) for name in names}
        return [
            {"layer": LAYER, **unsolved(one, settings, config.negative), "solver": solver, **row}
            for one, row in zip(each, _rows(numbers), strict=True)
        ]

    def _parameters_of(self, part: nn.Module) -> dict[str, Tensor]:
        """The stacked parameters of a part, by their names in it."""
        return {name: self.model.get_parameter(name).detach() for name, _ in part.named_parameters()}


def _rows(columns: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Columns (networks,) as one dict for each network. All come from a device in one copy."""
    table = torch.stack([column.double() for column in columns.values()], 1)
    return [dict(zip(columns, row, strict=True)) for row in table.tolist()]
