"""Measuring a network while it trains."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from probed import Network
from support import CUDA

import lmnfast.probe
from lmnfast._enqueue import Enqueued, enqueue
from lmnfast.cutting import cut
from lmnfast.probe import COLUMNS, MOST_PENDING, Probe
from lmnfast.spectrum import measurement

DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


class Untraceable(Network):
    """Cut with a hook, as torch.fx cannot follow what depends on data."""

    def forward(self, x):
        return x if float(x.sum()) > 1e9 else super().forward(x)


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
            "stabiliser": 0.0,
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
    monkeypatch.setattr(Enqueued, "offset_problem", lambda self: "an offset")
    probe = Probe(model, x, "first", every=1)
    probe()
    with pytest.raises(UserWarning, match="layer 'first': an offset"):
        probe.history  # noqa: B018
    assert len(probe.history) == 1
    probe.close()


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


def test_an_error_names_layer_and_step(model, x):
    probe = Probe(model, x, ["first", "second"], every=1)
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf in sample 0.* \(probe of layer 'first', step 3\)"):
        probe(3)


def test_layers_may_be_patterns(model, x):
    with Probe(model, x, ["first", "s*"]) as probe:
        assert probe.layers == ("first", "second")


def test_a_probe_says_what_it_measures(model, x):
    with lmnfast.Probe(model, x, "*", every=[1, 10], points=9, rule="lobatto") as probe:
        layers = ", ".join(map(repr, probe.layers))
        assert (
            repr(probe) == f"Probe(layers=({layers}), every=[1, 10], method='path', points=9, rule='lobatto')"
        )
