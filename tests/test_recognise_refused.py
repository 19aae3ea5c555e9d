"""What is no chain, or does not show whether it is one, is not recognised as one."""

import operator

import pytest
import torch
import torch.nn.functional as F
from spellings import Added, HiddenInPlace, Steps, Tangled, TransposedWeight, TwoOutputs, residual
from torch import fx, nn
from torch.nn.utils import prune

from lmnfast._connectivity import connectivity
from lmnfast._enqueue import enqueue
from lmnfast._recognise import recognise
from lmnfast.cutting import cut


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        return self.first(x) if x.sum() > 0 else x


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return F.linear(x, y)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(self.out_features)


def with_hook(kind, path):
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    getattr(model.get_submodule(path), f"register_{kind}")(lambda module, *args: None)
    return model


def own_forward():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model[0].forward = lambda x: x
    return model


def own_forward_traced():
    model = fx.symbolic_trace(nn.Linear(3, 3))
    model.forward = lambda x: x
    return model


def hooked_traced():
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))
    model.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def pruned():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


NO_CHAINS = {
    "two activations in a row": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Tanh()),
    "two activations before the first weight": lambda: nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Linear(3, 3)),
    "no weight": lambda: nn.Sequential(nn.ReLU()),
    "in place, result unused": HiddenInPlace,
    "branch on data": Branching,
    "computed weight": lambda: TransposedWeight(3, 3),
    "two inputs": TwoInputs,
    "two outputs": lambda: TwoOutputs(3, 3),
    "noise": lambda: Noisy(3, 3),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
    "batch norm after an activation": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3)),
    "batch norm before an activation": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)),
    "batch norm of the batch": lambda: nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)
    ),
    "parametric relu": lambda: nn.Sequential(nn.Linear(3, 3), nn.PReLU()),
    "softmax": lambda: Steps(nn.Linear(3, 3), lambda h: h.softmax(-1)),
    "scaling": lambda: Steps(nn.Linear(3, 3), lambda h: 2 * h),
    "clamped relu": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU6()),
    "bilinear": lambda: Steps(nn.Linear(3, 3), lambda h: h * h),
    "flattened batch": lambda: Steps(nn.Linear(3, 3), lambda h: h.flatten()),
    "dropout that stays on": lambda: Steps(nn.Linear(3, 3), F.dropout),
    "unfitting widths": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 3)),
    "mixed dtypes": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double()),
    "complex weights": lambda: nn.Linear(3, 3, dtype=torch.complex64),
    "lazy weights": lambda: nn.LazyLinear(3),
    "hook on a layer": lambda: with_hook("forward_hook", "1"),
    "pre-hook on a layer": lambda: with_hook("forward_pre_hook", "0.0"),
    "hook on a container": lambda: with_hook("forward_hook", "0"),
    "hook on the root": lambda: with_hook("forward_hook", ""),
    "pruned by a hook": pruned,
    "sum of a result with itself": lambda: Steps(nn.Linear(3, 3), lambda h: h + h),
    "sum with a number": lambda: Steps(nn.Linear(3, 3), lambda h: h + 1),
    "sum with a parameter": lambda: Tangled(lambda m, h: h + m.shift),
    "scaled sum": lambda: residual(lambda h, block: torch.add(h, block, alpha=2)),
    "difference": lambda: residual(operator.sub),
    "gate": lambda: residual(operator.mul),
    "sum of three": lambda: residual(lambda h, block: h + block + h),
    "two branches": lambda: Tangled(lambda m, h: m.second(h) + m.third(h)),
    "projected skip": lambda: Tangled(lambda m, h: m.second(h) + m.third(torch.relu(h))),
    "sum that broadcasts": lambda: Added(nn.Linear(3, 1)),
    "sum across a flatten": lambda: Added(nn.Sequential(nn.Flatten(), nn.Linear(3, 3))),
    "sum with what relu_ has changed": lambda: residual(block=Steps(F.relu_, nn.Linear(3, 3))),
    "sum with what relu_ has changed by a view": lambda: residual(
        block=Steps(nn.Flatten(), F.relu_, nn.Linear(3, 3))
    ),
    "sum with what an inplace ReLU has changed": lambda: residual(
        block=nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    ),
    "sum with what a sum in place has changed": lambda: Tangled(
        lambda m, h: m.third(torch.relu(h.add_(m.second(h)))) + h
    ),
    "sum in place with what is used again": lambda: Tangled(
        lambda m, h: m.third(torch.relu(operator.iadd(m.second(h), h))) + h.relu_()
    ),
    "term of a sum used again": lambda: Tangled(
        lambda m, h: (lambda term: m.third(torch.relu(term + h)) + term)(m.second(h))
    ),
    "activation of an earlier result": lambda: Tangled(lambda m, h: m.second(torch.relu(h)) + torch.tanh(h)),
    "sum with what is before a batch norm": lambda: Added(
        nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    ),
    "batch norm between a sum and an activation": lambda: nn.Sequential(
        Added(nn.Linear(3, 3)), nn.BatchNorm1d(3), nn.ReLU()
    ),
    "activation after an activated sum": lambda: nn.Sequential(
        Added(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), nn.Tanh()
    ),
    "layer norm in a block": lambda: residual(block=nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))),
    "a forward of its own": own_forward,
    "a graph module with a forward of its own": own_forward_traced,
    "a graph module with a hook": hooked_traced,
}


@pytest.mark.parametrize("case", NO_CHAINS)
def test_what_is_no_chain_is_not_recognised(case):
    assert recognise(NO_CHAINS[case]()) is None


def aliased(m, h):
    """x += y changes what another name has; to torch.fx it makes a new value."""
    before = h
    h += m.second(F.silu(h))
    return m.third(F.silu(h)) + before


def test_a_sum_that_a_trace_shows_wrongly_is_not_used():
    model, x = Tangled(aliased), torch.randn(12, 3)
    assert (recognise(model)(x) - model(x)).abs().max() > 0.01
    assert torch.equal(connectivity(model, x), enqueue(model, x, fuse=False).L)
    tail, samples = cut(nn.Sequential(nn.Identity(), model), "0", x)
    assert torch.equal(tail(samples), model(x))
    assert (recognise(tail)(x) - model(x)).abs().max() < 1e-5, "a tape sees which tensors are the same"


def test_functions_are_not_traced():
    linear = nn.Linear(3, 3)
    assert recognise(lambda x: linear(x)) is None
    assert recognise(linear.forward) is None


def test_a_global_hook_prevents_recognition():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: 2 * output)
    try:
        assert recognise(nn.Linear(3, 3)) is None
    finally:
        handle.remove()


def test_hooks_are_not_run_on_proxies():
    seen = []
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert recognise(model) is None and seen == []
    tail, _ = cut(model, "0", torch.randn(5, 3))
    assert recognise(tail) is not None
    assert all(isinstance(value, torch.Tensor) for value in seen)
