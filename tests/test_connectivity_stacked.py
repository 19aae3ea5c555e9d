"""Networks of a stack, in one launch where there are CUDA kernels: what each gives alone."""

import pytest
import torch
from networks import NAN, counted, inputs, mlp
from torch import nn

import lmnfast
from lmnfast import _checks, _measured, _route, _together
from lmnfast._enqueue import Enqueued, enqueue
from lmnfast._measured import measured, measured_stack
from lmnfast._settings import DEFAULT


def test_networks_of_a_stack_are_all_enqueued_before_one_is_checked(monkeypatch):
    models, x = [mlp(6, 20, 4, seed=seed) for seed in range(3)], inputs(12, 6).expand(3, 12, 6)
    stacked, order = torch.func.stack_module_state(models), []
    truth = torch.stack([lmnfast.connectivity(model, x[0]) for model in models])

    def counted(*args, **settings):
        order.append("enqueue")
        settings.pop("progress")
        return enqueue(*args, deferred=True, **settings)

    def check(self):
        order.append("check")
        checks(self)

    checks = Enqueued.check
    monkeypatch.setattr(_measured, "enqueue", counted)
    monkeypatch.setattr(Enqueued, "check", check)
    assert torch.equal(lmnfast.connectivity(models[0], x, stacked=stacked), truth)
    assert order == 3 * ["enqueue"] + 3 * ["check"]


def test_one_network_of_a_stack_that_is_no_chain_is_measured_anew(monkeypatch):
    """The second one has another chain than it looks like."""
    models, x = [mlp(6, 20, 4, seed=seed) for seed in range(3)], inputs(12, 6).expand(3, 12, 6)
    stacked, checked = torch.func.stack_module_state(models), []
    truth = torch.stack([lmnfast.connectivity(model, x[0]) for model in models])

    def check(self):
        checked.append(self)
        if len(checked) == 2:
            raise _checks.NotTheChain("f: looks like a chain")

    monkeypatch.setattr(Enqueued, "check", check)
    L = lmnfast.connectivity(models[0], x, stacked=stacked)
    assert len(checked) == 4 and (L - truth).abs().max() < 1e-5
    assert torch.equal(L[::2], truth[::2]) and not torch.equal(L[1], truth[1])


class Same(nn.Sequential):
    """Whose forward may be anything, unlike that of torch's own: it is called, and compared with the chain."""


class WithNorm(nn.Module):
    """A chain whose first weights are computed from its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.SiLU(), nn.Linear(12, 4))

    def forward(self, x):
        return self.net(x)


class Tied(nn.Module):
    """Two layers with one weight, and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.second(nn.functional.silu(x)))


STACKED = {
    "in order": lambda: mlp(6, 20, 4),
    "own forward": lambda: Same(*mlp(6, 20, 16, 4)),
    "tied": Tied,
    "affine": lambda: nn.Linear(6, 4),
    "flattens": lambda: nn.Sequential(nn.Flatten(), *mlp(6, 20, 4)),
}


def stack_of(make, networks: int, n: int = 12, dtype=torch.float32):
    """Networks, what torch stacks of them, and samples for each, some of which are close."""
    models = []
    for seed in range(networks):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(make().to(dtype).eval())
            with torch.no_grad():
                for p in models[-1].parameters():
                    p.mul_(1 + 0.1 * torch.rand(p.shape, dtype=dtype))
    x = torch.stack([inputs(n, 6, seed=seed, dtype=dtype) for seed in range(networks)])
    x[-1, 3] = x[-1, 5] * (1 + 1e-6)
    return models, torch.func.stack_module_state(models), x


@pytest.fixture
def launches(monkeypatch):
    """How many networks each stack had that was measured together, in a list; -1 stands for one that was enqueued alone."""
    seen = []

    def together(chains, *rest):
        seen.append(len(chains.weights[0]))
        return original(chains, *rest)

    def alone(*args, **settings):
        seen.append(-1)
        return enqueue(*args, **settings)

    original = _together.stack_connectivity
    monkeypatch.setattr(_together, "stack_connectivity", together)
    monkeypatch.setattr(_measured, "enqueue", alone)
    return seen


@pytest.mark.parametrize("method", ["path", "hermite", "hermite-midpoint"])
@pytest.mark.parametrize("name", STACKED)
def test_stacked_networks_are_measured_in_one_launch(name, method, emulated, dtype, launches):
    models, stacked, x = stack_of(STACKED[name], 3, dtype=dtype)
    x = x.unflatten(2, (2, 3)) if name == "flattens" else x
    truth = torch.stack([lmnfast.connectivity(f, own, method=method) for f, own in zip(models, x)])
    launches.clear()
    shares = []
    L = lmnfast.connectivity(models[0], x, method=method, stacked=stacked, progress=shares.append)
    assert launches == [3] and shares == [1.0]
    assert torch.equal(L, truth) and (name == "affine" or not torch.equal(L[0], L[1]))


def test_what_a_launch_for_all_does_not_take_is_measured_one_by_one(emulated, launches):
    for make, chosen in (
        (WithNorm, {}),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), {}),
        (lambda: mlp(6, 20, 4), {"method": "jacobian"}),
    ):
        models, stacked, x = stack_of(make, 2)
        truth = torch.stack([lmnfast.connectivity(f, own, **chosen) for f, own in zip(models, x)])
        launches.clear()
        L = lmnfast.connectivity(models[0], x, stacked=stacked, **chosen)
        assert torch.equal(L, truth) and launches == [-1, -1]


def test_a_launch_for_all_costs_no_call_for_each(emulated, monkeypatch):
    """Neither in torch nor in kernels; the eigenvalues come in one batch, the numbers in two copies."""
    counts, passes, find = [], [], _checks.find
    monkeypatch.setattr(_checks, "find", lambda *args: passes.append(args) or find(*args))
    for networks in (2, 5):
        models, stacked, x = stack_of(lambda: mlp(6, 20, 4), networks)
        lmnfast.lmn(models[0], x, stacked=stacked)
        passes.clear()
        with torch.profiler.profile() as profile:
            values = lmnfast.lmn(models[0], x, stacked=stacked)
        assert len(passes) == 1
        names = [event.name for event in profile.events()]
        for op in ("path_connectivity", "symmetric_eigenvalues", "spectral_entropy"):
            assert names.count(f"lmnfast::{op}") == 1, op
        counts.append({name: names.count(name) for name in names if name not in ("aten::as_strided",)})
        alone = torch.stack([lmnfast.lmn(f, own) for f, own in zip(models, x)])
        torch.testing.assert_close(values, alone, rtol=1e-12, atol=0)
    for name in counts[1]:  # but for the views that are given out, and what is stacked in resolving
        assert counts[1][name] <= counts[0].get(name, 0) or name in ("aten::select", "aten::unbind"), name


def test_the_matrices_of_a_stack_are_not_copied(emulated):
    models, stacked, x = stack_of(lambda: mlp(6, 20, 4), 3)
    each = measured_stack(models[0], x, DEFAULT, stacked=stacked)
    assert _measured.stacked_matrices(each).data_ptr() == each[0].L.data_ptr()


def test_wrong_numbers_in_a_stack_are_named_as_in_a_network_alone(emulated, launches):
    for name in ("in order", "own forward"):
        for change in ("samples", "weights", "weights of another"):
            models, stacked, x = stack_of(STACKED[name], 3)
            if change == "samples":
                x[1, 4:6, 2] = NAN
            else:
                number = 1 if change == "weights" else 2
                with torch.no_grad():
                    models[number][0].weight[2, 3] = stacked[0]["0.weight"][number, 2, 3] = float("inf")
            for f, own in zip(models, x):
                try:
                    lmnfast.connectivity(f, own)
                except ValueError as error:
                    alone = str(error)
            launches.clear()
            with pytest.raises(ValueError) as together:
                lmnfast.connectivity(models[0], x, stacked=stacked)
            assert str(together.value) == alone and "NaN or Inf in" in alone and launches == [3]


def test_a_network_of_a_stack_whose_chain_has_other_outputs_is_measured_anew(emulated, monkeypatch, launches):
    """Its forward knows a value of its parameters that the trace did not see."""

    class Knows(Same):
        def forward(self, x):
            y = super().forward(x)
            return y + y**2 if float(self[0].bias[0]) == 7 else y

    models, stacked, x = stack_of(lambda: Knows(*mlp(6, 20, 4)), 3)
    with torch.no_grad():
        models[1][0].bias[0] = stacked[0]["0.bias"][1, 0] = 7
    wanted = [lmnfast.connectivity(counted(models[1]), x[1]), lmnfast.connectivity(Same(*models[2]), x[2])]
    chain_or_reason = _route.chain_or_reason
    monkeypatch.setattr(_route, "chain_or_reason", lambda f, *_: chain_or_reason(nn.Sequential(*f)))
    launches.clear()
    L = lmnfast.connectivity(models[0], x, stacked=stacked)
    assert launches == [3, -1]
    assert (L[1] - wanted[0]).abs().max() < 1e-5 and torch.equal(L[2], wanted[1])


def test_what_a_stack_counts_as_constant_is_that_of_each_network(emulated):
    models, stacked, x = stack_of(lambda: mlp(6, 20, 4), 3)
    # One unit that is the same large number for all samples, and one output that reads no other.
    with torch.no_grad():
        for values in (dict(models[1].named_parameters()), {k: v[1] for k, v in stacked[0].items()}):
            values["0.weight"][3] = values["2.weight"][0] = 0
            values["0.bias"][3], values["2.weight"][:, 3] = 1e5, 1
    each = measured_stack(models[0], x, DEFAULT, stacked=stacked)
    alone = [measured(f, own, DEFAULT)[0] for f, own in zip(models, x)]
    assert [one.constants for one in each] == [one.constants for one in alone] and each[1].constants > 0
    assert [one.offset_problem() for one in each] == [one.offset_problem() for one in alone]
    assert "some outputs are" in str(each[1].offset_problem())
    with pytest.warns(UserWarning, match="f: .* some outputs are"):
        lmnfast.lmn(models[0], x, stacked=stacked)


@pytest.mark.parametrize("stacked", [{}, "x", 3, ({"a": 1}, {}), ({}, {}, {})], ids=str)
def test_what_is_no_stack_is_named(stacked):
    f = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(TypeError, match="stacked: expected the pair of parameters and buffers"):
        lmnfast.lmn(f, torch.randn(2, 9, 4), stacked=stacked)
