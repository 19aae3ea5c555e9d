"""A probe's observables: their columns, what they cost, and that they leave the training as it is."""

import copy
import math
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from probed import Network
from support import CUDA

import lmnfast
from lmnfast import _observables
from lmnfast.cutting import cut
from lmnfast.probe import COLUMNS, Probe

NAMES = [each.name for each in _observables.BUILT_IN]
FREE = ["curvature", "participation_ratio", "local_complexity", "l2_norm"]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A test begins with the package's own observables. What it registers is gone after it."""
    own = {each.name: each for each in _observables.BUILT_IN}
    monkeypatch.setattr(_observables, "_registry", own)


def noisy(o):
    """Draws, counts a batch in train mode, and calls a layer with dropout."""
    o.model.train()
    return o.model(torch.rand(7, 5).to(o.samples)).sum() + o.connectivity.sum()


class Untraceable(Network):
    """Cut with a hook, as torch.fx cannot follow what depends on data."""

    def forward(self, x):
        return x if float(x.sum()) > 1e9 else super().forward(x)


def trained(network, device, observables, steps=7):
    """Everything that a training leaves, with a probe or (observables None) without."""
    torch.manual_seed(0)
    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(12, 5).to(device), torch.randint(3, (12,)).to(device)
    probe = observables and Probe(model, x, ["inputs", "first"], every=2, observables=observables)
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if probe:
            probe(step)
        loss.backward()
        optimizer.step()
    if probe:
        probe.close()
        assert len(probe.history) == 8
        unknown = {"local_complexity"} if network is Untraceable else set()
        for row in probe.history:
            assert {name for name in observables if not math.isfinite(row[name])} <= unknown
    moments = [m for s in optimizer.state_dict()["state"].values() for m in s.values()]
    grads = [p.grad for p in model.parameters()]
    assert all(part.training for part in model.modules())
    random = [torch.get_rng_state(), torch.rand(3), torch.rand(3, device=device)]
    return [*model.state_dict().values(), *moments, *grads, *random]


@pytest.mark.filterwarnings("ignore:.*local_complexity. does not apply")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", [Network, Untraceable])
def test_training_with_all_observables_is_bit_identical_to_training_without(network, device):
    lmnfast.register_observable("noisy", noisy)
    with_all = trained(network, device, [*NAMES, "noisy"])
    for ours, plain in zip(with_all, trained(network, device, None), strict=True):
        assert torch.equal(ours, plain)


def test_a_row_holds_what_measuring_the_cut_gives(model, x):
    names = [name for name in NAMES if name != "l2_norm"]
    with Probe(model, x, ["inputs", "first"], observables=NAMES) as probe:
        probe(0, loss=0.5)
    norm = torch.cat([p.flatten() for p in model.parameters()]).double().norm().item()
    for row in probe.history:
        assert tuple(row) == (*COLUMNS, *[name for name in NAMES if name not in COLUMNS], "loss")
        m = lmnfast.measure(*cut(model, row["layer"], x), observables=names)
        assert {name: row[name] for name in names} == pytest.approx(m.observables, rel=1e-12)
        assert row["l2_norm"] == pytest.approx(norm, rel=1e-12) and row["lmn"] == m.lmn


def test_without_observables_the_rows_are_those_of_before(model, x, monkeypatch):
    monkeypatch.setattr(_observables, "number_of", None)
    with Probe(model, x, "first") as probe:
        probe(0)
    assert tuple(probe.history[0]) == COLUMNS


def test_observables_without_eigenvalues_solve_no_eigenproblem(model, x, monkeypatch):
    def never(*args):
        raise AssertionError

    for name in ("measurement", "spectrum_of"):
        monkeypatch.setattr(lmnfast.probe, name, never)
    with Probe(model, x, "first", observables=FREE) as probe:
        probe(0)
    (row,) = probe.history
    assert tuple(row) == (*COLUMNS, *FREE)
    empty = {"lmn", "complexity_bits", "solver", "negative_share"}
    assert {name for name, value in row.items() if value is None} == empty
    monkeypatch.undo()
    assert (
        row["curvature"]
        == lmnfast.measure(*cut(model, "first", x), observables="curvature").observables["curvature"]
    )


@pytest.mark.parametrize("name", ["complexity_bits", "negative_share"])
def test_one_observable_of_the_spectrum_fills_the_columns_of_lmn(name, model, x):
    with Probe(model, x, "first", observables=name) as probe:
        probe(0)
    assert tuple(probe.history[0]) == COLUMNS and None not in probe.history[0].values()


def test_observables_of_the_model_are_those_of_the_step(model, x):
    """Though the solver takes its time, and the parameters change at once."""
    free = threading.Event()
    lmnfast.register_observable("slow", lambda o: free.wait(60), reads=["connectivity"])
    lmnfast.register_observable("one_weight", lambda o: o.model.out.weight[0, 0], reads=["model"])
    names = ["slow", "l2_norm", "local_complexity", "jacobian_rank", "one_weight", "representation_rank"]
    before = copy.deepcopy(model)
    probe = Probe(model, x, "first", observables=names)
    probe(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    free.set()
    probe.close()
    with Probe(before, x, "first", observables=names) as expected:
        expected(0)
    assert probe.history == expected.history
    assert probe.history[0]["one_weight"] == before.out.weight[0, 0].item()


def test_samples_that_the_training_overwrites_are_those_of_the_step():
    class Kept(torch.nn.Module):
        """Its layer returns the inputs themselves."""

        def __init__(self):
            super().__init__()
            self.layer, self.out = torch.nn.Identity(), torch.nn.Linear(5, 3)

        def forward(self, x):
            return self.out(self.layer(x))

    free, x = threading.Event(), torch.randn(12, 5)
    lmnfast.register_observable("slow", lambda o: free.wait(60), reads=["connectivity"])
    expected = lmnfast.measure(Kept(), x, observables="representation_rank").observables
    with Probe(Kept(), x, "layer", observables=["slow", "representation_rank"]) as probe:
        probe(0)
        x.copy_(torch.ones(12, 5))
        free.set()
    assert probe.history[0]["representation_rank"] == expected["representation_rank"]


def test_what_does_not_apply_is_named_once_for_each_layer(x):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Softmax(1), torch.nn.Linear(4, 3))
    names = ["local_complexity", "curvature"]
    probe = Probe(model, x, ["0", "1"], every=1, observables=names)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(4):
            probe(step)
        probe.close()
    assert len(said) == 1 and str(said[0].message).startswith(
        "layer '0': observable 'local_complexity' does not apply"
    )
    rows = probe.history
    assert [math.isnan(row["local_complexity"]) for row in rows] == [True, False] * 4
    assert all(0 <= row["curvature"] < 1 for row in rows)


def test_an_observable_that_raises_is_named_with_its_step(model, x):
    def fails(o):
        raise ValueError("no number")

    lmnfast.register_observable("now", fails)
    lmnfast.register_observable("later", fails, reads=["connectivity"])
    probe = Probe(model, x, "first", observables="now")
    with (
        probe,
        pytest.raises(
            ValueError,
            match=r"observable 'now': ValueError: no number; .* \(probe of layer 'first', step 100\)",
        ),
    ):
        probe(100)
    with Probe(model, x, "first", observables="later") as probe:
        probe(100)
    with pytest.raises(
        RuntimeError,
        match="solving layer 'first' at step 100 failed: observable 'later': ValueError: no number",
    ):
        probe.history  # noqa: B018


def test_names_are_checked_when_the_probe_is_made(model, x):
    with pytest.raises(ValueError, match="^observables: expected among lmn, .*, got 'speed'$"):
        Probe(model, x, "first", observables=["lmn", "speed"])
    probe = Probe(model, x, "first", observables="curvature")
    with probe, pytest.raises(ValueError, match="extra: expected names not the probe's own, got curvature"):
        probe(0, curvature=1.0)


def test_a_copied_and_a_resumed_probe_go_on_with_the_same_observables(model, x):
    lmnfast.register_observable(
        "own", lambda o: 1.5, reads=["connectivity"]
    )  # a function that cannot be pickled
    with Probe(model, x, "first", observables=["own", "curvature"]) as probe:
        probe(0)
        copies = [copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))]
        resumed = Probe(model, x, "first", observables=["own", "curvature"])
        resumed.load_state_dict(probe.state_dict())
        probe(100)
    for other in (*copies, resumed):
        with other:
            other(100)
        assert other.history == probe.history


def test_a_probe_by_jacobians_has_no_pooled_matrix(model, x):
    probe = Probe(model, x, "first", method="jacobian", observables=["curvature", "pooled_curvature"])
    probe(0)
    with pytest.warns(UserWarning, match="layer 'first': observable 'pooled_curvature' does not apply"):
        probe.close()
    assert 0 < probe.history[0]["curvature"] < 2


def test_no_warning_comes_where_all_apply(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Probe(model, x, "first", observables=FREE) as probe:
            probe(0)
