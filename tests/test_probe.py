"""Measuring a network while it trains."""

import functools
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmnfast.probe
from lmnfast import _native, _route
from lmnfast._connectivity import connectivity
from lmnfast._enqueue import Enqueued, enqueue
from lmnfast._python_state import python_state
from lmnfast._recognise import recognise
from lmnfast.cutting import cut
from lmnfast.probe import COLUMNS, MOST_PENDING, Probe
from lmnfast.spectrum import measurement

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.out(F.silu(self.norm(self.second(self.drop(F.silu(self.first(x)))))))


class Plain(Network):
    """All weights of its chain are parameters, and none computed."""

    def forward(self, x):
        return self.out(F.silu(self.second(F.silu(self.first(x)))))


class Untraceable(Network):
    """Cut with a hook, as torch.fx cannot follow what depends on data."""

    def forward(self, x):
        return x if float(x.sum()) > 1e9 else super().forward(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def x():
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(1))


def trained(network, probed, device, steps=7, failing=False, method="path"):
    """Parameters, buffers, optimiser moments and random state after training, with or without a probe."""
    torch.manual_seed(0)
    model = network().to(device)
    model.second.eval()  # a frozen part, among others in training
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(12, 5).to(device), torch.randint(3, (12,)).to(device)
    probe = Probe(model, x, ["first", "second"], every=2, method=method) if probed else None
    for step in range(steps):
        loss = F.cross_entropy(model(x), y)
        if probe:
            if failing:
                probe.inputs = torch.full_like(x, torch.nan)
                if step % 2 == 0 and device == "cpu":
                    with pytest.raises(ValueError, match="NaN"):
                        probe(step)
                else:
                    probe(step)
            else:
                probe(step)  # between forward and backward: the graph must survive it too
        loss.backward()
        optimizer.step()
        if step % 3:
            optimizer.zero_grad()
    if probe:
        probe.close()
        if failing and device != "cpu":
            with pytest.raises(RuntimeError, match="x: NaN or Inf in sample 0, the first of 12"):
                probe.history  # noqa: B018
        else:
            assert len(probe.history) == (0 if failing else 8)
    moments = [m for s in optimizer.state_dict()["state"].values() for m in s.values()]
    grads = [p.grad for p in model.parameters()]
    modes = torch.tensor([part.training for part in model.modules()])
    assert not any(part._forward_hooks for part in model.modules())
    random = [torch.get_rng_state(), torch.rand(3), torch.rand(3, device=device)]
    return [*model.state_dict().values(), *moments, *grads, modes, *random]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("failing", [False, True], ids=["measuring", "failing to measure"])
@pytest.mark.parametrize("network", [Network, Untraceable])
def test_training_with_a_probe_is_bit_identical_to_training_without(network, failing, device):
    with_probe, without = trained(network, True, device, failing=failing), trained(network, False, device)
    for ours, plain in zip(with_probe, without, strict=True):
        assert ours is plain is None or torch.equal(ours, plain)


@pytest.mark.parametrize("method", ["hermite-midpoint", "jacobian"])
@pytest.mark.parametrize("network", [Network, Untraceable])
def test_differentiating_for_a_probe_changes_no_bit_of_the_training_either(network, method):
    with_probe, without = trained(network, True, "cpu", method=method), trained(network, False, "cpu")
    for ours, plain in zip(with_probe, without, strict=True):
        assert ours is plain is None or torch.equal(ours, plain)


@pytest.mark.parametrize("method", ["hermite", "hermite-midpoint", "jacobian"])
@pytest.mark.parametrize("network", [Network, Untraceable])
def test_a_probe_measures_by_any_method_and_names_it(network, method, x):
    torch.manual_seed(0)
    model = network().eval()
    with Probe(model, x, "first", method=method) as probe:
        probe(0)
        (row,) = probe.history
    assert row["method"] == method
    traced = Network().eval()
    traced.load_state_dict(model.state_dict())
    expected = lmnfast.lmn(*cut(traced, "first", x), method=method).item()
    assert row["lmn"] == pytest.approx(expected, rel=1e-4)


def test_a_row_holds_what_measuring_the_cut_gives(model, x):
    probe = Probe(model, x, ["first", "second"], every=10, points=9, rule="lobatto")
    assert probe(20, loss=0.5, accuracy=torch.tensor(0.25))
    rows = probe.history
    assert [row["layer"] for row in rows] == ["first", "second"]
    for row in rows:
        assert tuple(row) == (*COLUMNS, "loss", "accuracy")
        expected = lmnfast.measure(*cut(model, row["layer"], x), points=9, rule="lobatto")
        assert row == {
            "step": 20,
            "layer": row["layer"],
            "lmn": expected.lmn,
            "complexity_bits": expected.complexity_bits,
            "samples": 12,
            "outputs": 3,
            "points": 9,
            "rule": "lobatto",
            "method": "path",
            "precision": "highest",
            "solver": "cpu",
            "negative": "absolute",
            "constant_share": 0.0,
            "negative_share": expected.negative_share,
            "loss": 0.5,
            "accuracy": 0.25,
        }
        assert 1 <= row["lmn"] <= 12 and type(row["accuracy"]) is float


def test_it_measures_at_step_zero_and_every_so_many_steps(model, x):
    probe = Probe(model, x, "first", every=3)
    assert [probe() for _ in range(7)] == [True, False, False, True, False, False, True]
    assert [row["step"] for row in probe.history] == [0, 3, 6]
    assert not probe(100) and not probe() and probe()  # its own count goes on from a step that was given
    assert probe.history[-1]["step"] == 102


def test_the_rows_follow_the_training(model, x):
    probe = Probe(model, x, "first", every=1)
    probe()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    probe()
    first, second = probe.history
    assert first["lmn"] != second["lmn"]


def test_a_dropout_model_in_training_is_measured_in_eval_mode(model, x):
    model.train()
    probe = Probe(model, x, "first", every=1)
    probe()
    assert all(part.training for part in model.modules())
    model.eval()
    probe()
    assert probe.history[0]["lmn"] == probe.history[1]["lmn"]


def test_the_eigenproblem_is_solved_on_one_background_thread(model, x, monkeypatch):
    threads = {"enqueue": set(), "measurement": set()}

    def recording(name):
        original = getattr(lmnfast.probe, name)

        def call(*args, **kwargs):
            threads[name].add(threading.get_ident())
            return original(*args, **kwargs)

        monkeypatch.setattr(lmnfast.probe, name, call)

    recording("enqueue")
    recording("measurement")
    probe = Probe(model, x, ["first", "second"], every=1)
    for _ in range(3):
        probe()
    assert len(probe.history) == 6
    assert threads["enqueue"] == {threading.get_ident()}
    assert len(threads["measurement"]) == 1 and threads["measurement"] != threads["enqueue"]


@pytest.fixture
def held(monkeypatch):
    """Solves wait until the event is set."""
    event = threading.Event()

    def wait(*arguments):
        assert event.wait(10)
        return measurement(*arguments)

    monkeypatch.setattr(lmnfast.probe, "measurement", wait)
    yield event
    event.set()


def test_training_goes_on_while_the_eigenproblem_is_solved(model, x, held):
    probe = Probe(model, x, ["first", "second"], every=5)
    assert probe(0) and not probe(1) and probe(5)
    assert probe.pending == 4 and not probe.ready(0) and not probe.ready(5)
    held.set()
    assert [row["step"] for row in probe.history] == [0, 0, 5, 5]
    assert probe.pending == 0 and probe.ready(0) and probe.ready(5) and not probe.ready(1)


def test_waiting_matrices_are_bounded(model, x, held):
    probe = Probe(model, x, "first", every=1)
    for _ in range(MOST_PENDING):
        probe()
    assert probe.pending == MOST_PENDING
    threading.Timer(0.1, held.set).start()
    probe()
    assert held.is_set() and probe.pending <= MOST_PENDING
    assert len(probe.history) == MOST_PENDING + 1


def test_a_solvers_error_is_raised_by_history(model, x, monkeypatch):
    probe = Probe(model, x, "second", every=1)

    def fail(*arguments):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(lmnfast.probe, "measurement", fail)
    assert probe(7)
    probe.close()
    assert probe.ready(7) and probe.pending == 0
    with pytest.raises(RuntimeError, match="solving layer 'second' at step 7 failed: did not converge"):
        probe.history  # noqa: B018


def test_a_step_that_fails_leaves_no_row(model, x, monkeypatch):
    probe = Probe(model, x, ["first", "second"], every=1)
    calls = []

    def fail_on_second(f, samples, settings, **more):
        calls.append(samples)
        if len(calls) in (2, 3):  # with the kept tail and with one cut anew
            raise ValueError("f: NaN")
        return enqueue(f, samples, settings, **more)

    monkeypatch.setattr(lmnfast.probe, "enqueue", fail_on_second)
    with pytest.raises(ValueError, match="f: NaN"):
        probe(0)
    assert probe.history == [] and not probe.ready(0) and probe.pending == 0
    assert probe(1) and len(probe.history) == 2


# ---- a tail that is kept ----


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
        return cut(*args, **keywords)

    monkeypatch.setattr(lmnfast.probe, "cut", counting)
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
        return cut(*args, **keywords)

    monkeypatch.setattr(lmnfast.probe, "cut", counting)
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


def test_the_precision_of_a_row_is_that_of_its_connectivity(x, held, precision):
    torch.manual_seed(0)
    precision("medium")
    probe = Probe(Untraceable(), x, "first", every=1)
    fused = Probe(Network(), x, "first", every=1)
    probe()
    fused()
    precision("highest")
    held.set()
    assert probe.history[0]["precision"] == "medium"
    assert fused.history[0]["precision"] == "highest"  # the CPU's kernels know no other


def test_a_probes_number_follows_its_convention(model, x):
    with Probe(model, x, "first", negative="clip") as probe:
        probe(0)
        (row,) = probe.history
    expected = lmnfast.measure(*cut(model, "first", x), negative="clip")
    assert (row["negative"], row["lmn"]) == ("clip", expected.lmn)
    assert row["negative_share"] == expected.negative_share > 0
    assert row["lmn"] != lmnfast.measure(*cut(model, "first", x)).lmn


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"points": 2}, ValueError, "points: expected at least 3"),
        ({"points": True}, TypeError, "points: expected an integer"),
        ({"points": 22, "rule": "lobatto"}, ValueError, "at most 21"),
        ({"rule": "simpson"}, ValueError, "rule: expected one of"),
        ({"negative": "drop"}, ValueError, "negative: expected one of absolute, clip, got 'drop'"),
    ],
)
def test_settings_that_no_row_can_have_are_refused_before_the_training(model, x, settings, error, message):
    with pytest.raises(error, match=message):
        Probe(model, x, "first", **settings)


def test_a_layer_whose_outputs_hide_behind_an_offset_is_named_once(x, monkeypatch):
    # Two pairs in a hundred, of 66 pairs and 3 outputs.
    torch.manual_seed(0)
    model = Untraceable()
    monkeypatch.setattr(Enqueued, "constants", property(lambda _: 4))
    with torch.no_grad():
        model.out.bias += 1e4
    with Probe(model, x, ["first", "second"], every=1) as probe:
        for _ in range(3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                probe()
                rows = probe.history
            said = [str(warning.message) for warning in caught]
            if len(rows) == 2:
                assert [text[:17] for text in said] == ["layer 'first': 2.", "layer 'second': 2"]
                assert "constant to rounding" in said[0] and caught[0].category is UserWarning
            else:
                assert not said
    assert [row["constant_share"] for row in rows] == [4 / (66 * 3)] * 6


def test_a_warning_that_is_an_error_loses_no_row(model, x, monkeypatch):
    monkeypatch.setattr(lmnfast.probe.Enqueued, "offset_problem", lambda self: "an offset")
    probe = Probe(model, x, "first", every=1)
    probe()
    with pytest.raises(UserWarning, match="layer 'first': an offset"):
        probe.history  # noqa: B018
    assert len(probe.history) == 1
    probe.close()


# ---- on a CUDA device ----


class Residual(nn.Module):
    """No chain."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = F.silu(self.first(x))
        return y + F.silu(self.second(y))


def chain():
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))


def on_cuda(network):
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # not the default one where there are more
    return network().to(device), ("first" if network is Residual else "0"), torch.randn(12, 5).to(device)


@CUDA
@pytest.mark.parametrize("network", [chain, Residual])
@pytest.mark.parametrize("own_stream", [False, True])
def test_training_may_go_on_at_once_and_does_not_change_the_value(network, own_stream):
    model, layer, x = on_cuda(network)
    expected = lmnfast.measure(*cut(model, layer, x)).lmn
    stream = torch.cuda.Stream(x.device) if own_stream else torch.cuda.default_stream(x.device)
    stream.wait_stream(torch.cuda.default_stream(x.device))
    with Probe(model, x, layer, every=1) as probe, torch.cuda.stream(stream):
        with torch.cuda.stream(probe._streams_on(x.device)[0]):
            torch.cuda._sleep(200_000_000)  # a tenth of a second: no connectivity before what follows
        loss = torch.ones((), device=x.device)
        probe(0, loss=loss)
        with torch.no_grad():
            for value in (*model.parameters(), loss):
                value.mul_(3)
    row = probe.history[0]
    assert row["lmn"] == pytest.approx(expected, rel=1e-5) and row["loss"] == 1 and row["solver"] == "cuda"


@CUDA
@pytest.mark.parametrize("network", [chain, Residual])
def test_the_calling_thread_does_not_wait_for_the_device(network, waits_are_errors):
    if not _native.cuda_built():
        pytest.skip("built without CUDA kernels")
    model, layer, x = on_cuda(network)
    with Probe(model, x, layer, every=1) as probe:
        probe(0)
        assert len(probe.history) == 1
        free = threading.Event()
        probe._solver.submit(free.wait, 60)  # it does wait, and the mode is for all threads
        try:
            with waits_are_errors():
                probe(1, loss=torch.ones((), device=x.device))
        finally:
            free.set()
    assert [row["lmn"] for row in probe.history] == pytest.approx([probe.history[0]["lmn"]] * 2, rel=1e-6)


def test_closing_waits_and_keeps_the_history(model, x):
    threads = set(threading.enumerate())
    with Probe(model, x, "first", every=1) as probe:
        probe()
    assert probe.pending == 0 and len(probe.history) == 1
    probe.close()
    with pytest.raises(RuntimeError, match="probe: closed; expected an open one"):
        probe()
    assert set(threading.enumerate()) <= threads


def test_seconds_is_the_time_spent_in_the_probe(model, x, held):
    probe = Probe(model, x, "first", every=2)
    at_start = probe.seconds
    probe(0)
    measured = probe.seconds
    probe(1)
    assert 0 < at_start < measured == probe.seconds
    threading.Timer(0.1, held.set).start()
    probe.close()
    assert probe.seconds - measured > 0.05


def test_history_hands_out_copies(model, x):
    probe = Probe(model, x, "first", every=1)
    probe()
    probe.history[0]["lmn"] = None
    assert probe.history[0]["lmn"] is not None


def test_inputs_and_model_that_require_grad_are_measured_without(model, x):
    inputs = x.clone().requires_grad_()
    probe = Probe(model, inputs, "first", every=1)
    probe()
    assert probe.history[0]["samples"] == 12 and inputs.grad is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "thrid"}, "layer: 'thrid' is not in the model; it has first"),
        ({"layers": []}, r"layers: expected one name or several different ones, got \[\]"),
        (
            {"layers": ["out", "out"]},
            "layers: expected one name or several different ones, got .'out', 'out'",
        ),
        ({"every": 0}, "every: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(model, x, arguments, message):
    with pytest.raises(ValueError, match=message):
        Probe(model, x, **{"layers": "first", **arguments})


def test_an_extra_named_like_a_column_is_refused(model, x):
    with pytest.raises(ValueError, match="extra: expected names not the probe's own, got lmn"):
        Probe(model, x, "first")(0, lmn=1.0)


def test_the_solver_takes_one_core_and_leaves_every_other_thread_its_count(model, x, monkeypatch):
    counts = []

    def counting(*args, **kwargs):
        counts.append(torch.get_num_threads())
        return measurement(*args, **kwargs)

    monkeypatch.setattr(lmnfast.probe, "measurement", counting)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Probe(model, x, "first") as probe:
            probe(0)
        newcomer = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        newcomer.start()
        newcomer.join()
        assert counts == [1, 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


class Recorder:
    """A writer."""

    def __init__(self):
        self.rows, self.threads, self.closed = [], set(), 0

    def write(self, row):
        assert not self.closed
        self.rows.append((row["step"], row["layer"], row["lmn"]))
        self.threads.add(threading.current_thread())

    def close(self):
        self.closed += 1


def seen_in(history):
    return [(row["step"], row["layer"], row["lmn"]) for row in history]


def test_new_rows_come_once_and_in_order(model, x):
    with Probe(model, x, ["first", "second"], every=2) as probe:
        rows = []
        for step in range(5):
            probe(step)
            rows += probe.new_rows()
        rows += probe.new_rows(wait=True)
        assert rows == probe.history and len(rows) == 6
        assert probe.new_rows(wait=True) == []


def test_writers_get_every_row_once_on_the_callers_thread(model, x):
    writers = Recorder(), Recorder()
    with Probe(model, x, ["first", "second"], writers=writers) as probe:
        for step in range(250):
            probe(step)
        history = probe.history
    for writer in writers:
        assert writer.rows == seen_in(history) and len(history) == 6
        assert writer.threads == {threading.current_thread()} and writer.closed == 1


def test_a_row_that_fails_keeps_no_other_from_the_writers(model, x, monkeypatch):
    calls = []

    def fail_once(*args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("by chance")
        return measurement(*args, **keywords)

    monkeypatch.setattr(lmnfast.probe, "measurement", fail_once)
    writer = Recorder()
    probe = Probe(model, x, ["first", "second"], every=1, writers=[writer])
    failed = "solving layer 'second' at step 0 failed: by chance"
    with pytest.raises(RuntimeError, match=failed), probe:
        monkeypatch.setattr(probe, "flush", lambda wait=False: wait and Probe.flush(probe, wait))
        probe(0)
        probe(1)
    assert [row[:2] for row in writer.rows] == [(0, "first"), (1, "first"), (1, "second")]
    assert writer.closed == 1


def test_a_probe_goes_on_from_a_state(model, x):
    first, again = Probe(model, x, "first", every=2), Probe(model, x, "first", every=2)
    for _ in range(5):
        first(loss=0.5)
    state = first.state_dict()
    again(0)
    again.load_state_dict(state)
    assert again.history == first.history
    again()  # step 5
    assert again()  # step 6
    rows = again.history
    assert [row["step"] for row in rows] == [0, 2, 4, 6] and rows[0]["loss"] == 0.5
    assert seen_in(again.new_rows(wait=True)) == seen_in(rows[-1:])


def test_a_count_that_jumps_or_stands_still_skips_no_measurement_and_takes_none_twice(model, x):
    writer = Recorder()
    probe = Probe(model, x, "first", every=4, writers=[writer])
    assert [step for step in (0, 0, 3, 6, 6, 7, 9, 17) if probe.reach(step)] == [0, 6, 9, 17]
    assert writer.rows == []  # before they are asked for
    probe.flush(wait=True)
    assert [row[0] for row in writer.rows] == [0, 6, 9, 17]
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="^LMN at step 20, layers first: .*NaN or Inf"):
        probe.reach(20)
    assert not probe.reach(20) and not probe.reach(23)


def test_writers_have_what_a_state_has(model, x):
    writer = Recorder()
    probe = Probe(model, x, "first", every=1, writers=[writer])
    probe(0)
    assert seen_in(probe.state_dict()["rows"]) == writer.rows != []


def test_an_error_names_layer_and_step(model, x):
    probe = Probe(model, x, ["first", "second"], every=1)
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf in sample 0.* \(probe of layer 'first', step 3\)"):
        probe(3)


def test_layers_may_be_patterns(model, x):
    with Probe(model, x, ["first", "s*"]) as probe:
        assert probe.layers == ("first", "second")
