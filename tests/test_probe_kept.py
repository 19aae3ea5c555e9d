"""A tail that a probe keeps from one measurement to the next, and a model that changes between them."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from probed import Network
from torch import nn

import lmnfast.probe
from lmnfast import _route
from lmnfast._connectivity import connectivity
from lmnfast._enqueue import enqueue
from lmnfast._python_state import python_state
from lmnfast._recognise import recognise
from lmnfast.cutting import cut, cut_at
from lmnfast.probe import Probe


class Plain(Network):
    """All weights of its chain are parameters, and none computed."""

    def forward(self, x):
        return self.out(F.silu(self.second(F.silu(self.first(x)))))


class Scaled(Network):
    """Its forward reads Python values of every kind that tracing makes a constant of."""

    gain = 1.0

    def __init__(self):
        super().__init__()
        self.slope = 1.0
        self.options = {"offsets": [0.0, 0.0]}
        self.settings = types.SimpleNamespace(power=1)
        self.scale = torch.ones(1)

    def forward(self, x):
        y = self.second(F.silu(self.first(x)))
        y = F.silu(self.gain * self.slope * self.scale * y + self.options["offsets"][1])
        return self.out(y) ** self.settings.power


def weight_replaced(model):
    model.out.weight = nn.Parameter(model.out.weight.detach().cumsum(0))


def module_replaced(model):
    model.second = nn.Sequential(model.second, nn.ReLU())


CHANGES = {
    "nothing": lambda model: None,
    "training mode": lambda model: model.train(not model.training),
    "values of parameters": lambda model: [p.data.mul_(2) for p in model.parameters()],
    "values of a tensor": lambda model: model.scale.mul_(3),
    "an attribute": lambda model: setattr(model, "slope", 4.0),
    "an entry of a list in a dict": lambda model: model.options["offsets"].__setitem__(1, 2.0),
    "an attribute of an attribute": lambda model: setattr(model.settings, "power", 2),
    "a tensor": lambda model: setattr(model, "scale", torch.full((1,), 3.0)),
    "a parameter": weight_replaced,
    "a module": module_replaced,
    "a hook": lambda model: model.out.register_forward_hook(lambda module, args, y: y.sin()),
    "the dtype": lambda model: model.double(),
    "what only outputs show": None,
}
FOLLOWED = ("nothing", "training mode", "values of parameters")
SAME_NUMBER = ("nothing", "training mode", "the dtype")


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_is_measured_as_it_is(change, x, monkeypatch):
    torch.manual_seed(0)
    model, cuts = Scaled(), []
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)

    def counting(*args, **keywords):
        cuts.append(args)
        return cut_at(*args, **keywords)

    monkeypatch.setattr(lmnfast.probe, "cut_at", counting)
    probe = Probe(model, x, "first", every=1)
    probe()
    assert len(cuts) == 1
    before = connectivity(*cut(model, "first", x))
    if change == "what only outputs show":
        monkeypatch.setattr(Scaled, "gain", 5.0)
    else:
        CHANGES[change](model)
        if change == "the dtype":
            probe.inputs = x.double()
    probe()
    probe()
    expected = lmnfast.measure(*cut(model, "first", probe.inputs))
    assert [row["lmn"] for row in probe.history[1:]] == pytest.approx([expected.lmn] * 2, rel=1e-6)
    if change not in SAME_NUMBER:
        assert (expected.connectivity - before).abs().max() > 1e-3, "the change was to make a difference"
    assert len(cuts) == (1 if change in FOLLOWED else 2)


def moved(model):
    """The same numbers, times 3, in other memory."""
    for p in model.parameters():
        p.data = 3 * p.data


def patched(part, function):
    part.forward = lambda z: function(type(part).forward(part, z))


# With a chain behind the layer, which is kept, too: whether another one is measured afterwards, and the tail cut anew.
CHAIN_CHANGES = {
    "nothing": (lambda model, patch: None, False, False),
    "training mode": (lambda model, patch: model.train(not model.training), False, False),
    "what requires grad": (lambda model, patch: model.requires_grad_(False), False, False),
    "values in place": (lambda model, patch: [p.data.mul_(3) for p in model.parameters()], True, False),
    "memory of parameters": (lambda model, patch: moved(model), True, False),
    "a parameter": (lambda model, patch: weight_replaced(model), True, True),
    "a module": (lambda model, patch: module_replaced(model), True, True),
    "a hook": (
        lambda model, patch: model.out.register_forward_hook(lambda m, a, y: (9 * y).sin()),
        True,
        True,
    ),
    "a forward": (lambda model, patch: patched(model.second, torch.sin), True, True),
    "a class": (
        lambda model, patch: patch(nn.Linear, "forward", lambda m, z: F.linear(z, m.weight).sin()),
        True,
        True,
    ),
    "a function": (lambda model, patch: patch(F, "silu", lambda z: z.sin()), True, True),
    "a hook for all": (lambda model, patch: patch_hooks(patch), True, True),
}


def patch_hooks(patch):
    everywhere = torch.nn.modules.module
    hook = lambda m, a, y: 3 * y.sin() if isinstance(m, nn.Linear) else None  # noqa: E731
    patch(everywhere, "_global_forward_hooks", {0: hook})


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("network", [Plain, Network])
@pytest.mark.parametrize("change", CHAIN_CHANGES)
def test_a_chain_that_is_kept_is_measured_as_it_is(change, network, deferred, x, monkeypatch):
    torch.manual_seed(0)
    model, cuts = network(), []
    alter, differs, anew = CHAIN_CHANGES[change]

    def counting(*args, **keywords):
        cuts.append(args)
        return cut_at(*args, **keywords)

    monkeypatch.setattr(lmnfast.probe, "cut_at", counting)
    monkeypatch.setattr(lmnfast.probe, "enqueue", functools.partial(enqueue, deferred=deferred))
    with Probe(model, x, "first", every=1) as probe:
        probe()
        assert recognise(cut(model, "first", x)[0]) is not None
        before = connectivity(*cut(model, "first", x))
        alter(model, monkeypatch.setattr)
        probe()
        probe()
        expected = lmnfast.measure(*cut(model, "first", x))
        assert [row["lmn"] for row in probe.history[1:]] == pytest.approx([expected.lmn] * 2, rel=1e-6)
        assert ((expected.connectivity - before).abs().max() > 1e-3) == differs
        assert len(cuts) == (2 if anew else 1)


def test_a_chain_is_recognised_once(x, monkeypatch):
    calls = []
    monkeypatch.setattr(_route, "chain_or_reason", lambda f, *_: calls.append(f))
    with Probe(Plain(), x, "first", every=1) as probe:
        for _ in range(3):
            probe()
        assert len(probe.history) == 3
    assert not calls


def test_measuring_does_not_change_the_python_state(model, x):
    before = python_state(model, x)
    Probe(model, x, ["first", "second"], every=1)()
    assert python_state(model, x) == before != python_state(model, x.clone())
    model.numbers = list(range(10_000))  # too long to be compared: as if it had changed
    assert python_state(model, x) != python_state(model, x)


def test_where_checks_wait_a_change_that_only_outputs_show_fails_that_row_and_no_other(x, monkeypatch):
    torch.manual_seed(0)
    probe = Probe(Scaled(), x, "first", every=1)
    monkeypatch.setattr(lmnfast.probe, "enqueue", functools.partial(enqueue, deferred=True))
    probe()
    assert len(probe.history) == 1
    monkeypatch.setattr(Scaled, "gain", 5.0)
    probe()
    with pytest.raises(
        RuntimeError, match="layer 'first' at step 1 failed: f: its outputs on the samples are not"
    ):
        probe.history  # noqa: B018
    probe()
    assert probe._rows[2][0].result()["lmn"] > 1
