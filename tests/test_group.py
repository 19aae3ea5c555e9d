"""Measurements by the processes of a group: the same bits for any number of them, and one error on all."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import DEAD, on_ranks
from support import COMPILED, mlp, samples
from tiled import FEW, network
from torch import nn

import lmnfast
from lmnfast import _group


class Dying(nn.Module):
    """Linear layers; some outputs of them are constant between many samples."""

    def __init__(self):
        super().__init__()
        self.net = mlp(6, 10, 3, activation=nn.ReLU, gain=3.0)

    def forward(self, x):
        return torch.relu(self.net(x))


def everything(rank):
    f, x = network(), samples(800, 6)
    counted = []
    measured = _group.measured
    _group.measured = lambda f, x, *more, **how: (
        counted.append(len(x) * (len(x) - 1) // 2),
        measured(f, x, *more, **how),
    )[1]
    world = dist.group.WORLD
    found = {"fused": lmnfast.connectivity(f, x, **FEW, group=world)}
    pairs = sum(counted)
    found["pooled"] = lmnfast.connectivity(f, x, **FEW, pooled=True, group=world)
    x = x[:100]
    found["generic"] = lmnfast.connectivity(lambda z: torch.sin(f(z)), x, **FEW, group=world)
    for method in ("hermite", "jacobian"):
        found[method] = lmnfast.connectivity(f, x, method=method, group=world)
    found["double"] = lmnfast.connectivity(network().double(), x.double(), **FEW, group=world)
    found["lmn"] = lmnfast.lmn(f, x, **FEW, group=world)
    m = lmnfast.measure(Dying(), x, **FEW, group=world, observables=["curvature", "pooled_curvature"])
    own = torch.Generator().manual_seed(rank)
    drawn = lmnfast.curvature(f, x, pairs=300, generator=own, group=world, **FEW)
    every = lmnfast.curvature(f, x, group=world, **FEW)
    one = lmnfast.connectivity(f, x[:1], group=world)
    return found, m, drawn, every, one, pairs


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    (result,) = on_ranks(1, everything, tmp_path_factory.mktemp("one"))
    return result


@COMPILED
@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_gives_the_same_bits(count, by_one, tmp_path):
    found, m, drawn, every, one, pairs = by_one
    work = []
    for of_rank in on_ranks(count, everything, tmp_path):
        assert not isinstance(of_rank, Exception), of_rank
        assert all(torch.equal(of_rank[0][name], L) for name, L in found.items())
        assert of_rank[1:5] == (m, drawn, every, one)
        work.append(of_rank[5])
    assert sum(work) == pairs and max(work) < 1.01 * pairs / count
    assert pairs < 1.4 * 800 * 799 / 2  # with the pairs within a block, which are measured several times


@COMPILED
def test_a_group_measures_what_one_process_measures(by_one):
    found, m, drawn, every, one, _ = by_one
    f, x = network(), samples(800, 6)
    assert torch.equal(found["fused"], lmnfast.connectivity(f, x, **FEW))
    assert torch.equal(found["pooled"], lmnfast.connectivity(f, x, **FEW, pooled=True))
    x = x[:100]
    assert torch.equal(found["double"], lmnfast.connectivity(network().double(), x.double(), **FEW))
    assert torch.equal(found["hermite"], lmnfast.connectivity(f, x, method="hermite"))
    torch.testing.assert_close(
        found["jacobian"], lmnfast.connectivity(f, x, method="jacobian"), rtol=0, atol=1e-6
    )
    generic = lmnfast.connectivity(lambda z: torch.sin(f(z)), x, **FEW)
    torch.testing.assert_close(found["generic"], generic, rtol=0, atol=1e-5)
    assert found["lmn"] == lmnfast.lmn(f, x, **FEW)
    alone = lmnfast.measure(Dying(), x, **FEW, observables=["curvature", "pooled_curvature"])
    assert m.constant_share == alone.constant_share > 0.01  # pairs within a block count once
    assert m.lmn == pytest.approx(alone.lmn, rel=1e-5) and m.precision == alone.precision
    assert m.observables == pytest.approx(alone.observables, rel=1e-5)
    own = torch.Generator().manual_seed(0)  # rank 0's
    assert drawn.value == pytest.approx(
        lmnfast.curvature(f, x, pairs=300, generator=own, **FEW).value, rel=1e-6
    )
    assert every == lmnfast.curvature(f, x, **FEW) and torch.equal(one, torch.ones(1, 1))


def other_things(rank):
    f, x, world = network(), samples(60, 6), dist.group.WORLD
    moved = network()
    with torch.no_grad():
        moved[0].bias[3] += 1e-6 * (rank == 1)
    cases = {
        "network": (moved, x, {}),
        "class": (f if rank != 2 else mlp(6, 10, 3, activation=nn.ReLU, gain=3.0), x, {}),
        "samples": (f, x + 1e-6 * (rank > 0), {}),
        "settings": (f, x, {"points": 5 + rank}),
        "function": (lambda z: f(z) * (1 + rank), x, {}),
        "kind": (f if rank else lambda z: f(z), x[: 60 - rank], {}),
        "rounding": (lambda z: f(z) * (1 + 1e-6 * rank), x, {}),
    }
    said = {}
    for name, (own, y, how) in cases.items():
        try:
            said[name] = tuple(lmnfast.connectivity(own, y, **how, group=world).shape)
        except ValueError as error:
            said[name] = str(error)
    try:
        lmnfast.curvature(f, x, pairs=20 + rank, group=world)
    except ValueError as error:
        said["pairs"] = str(error)
    return said


def test_processes_that_measure_other_things_all_say_so(tmp_path):
    begin = "group: expected the same network, samples and settings on all ranks, got "
    expected = {
        "network": f"{begin}another network on rank 1 than on rank 0",
        "class": f"{begin}another network on rank 2 than on rank 0",
        "samples": f"{begin}other samples on ranks 1, 2 than on rank 0",
        "settings": f"{begin}other settings on ranks 1, 2 (points 5 on rank 0, 6 on rank 1) than on rank 0",
        "function": f"{begin}another network on ranks 1, 2 than on rank 0",
        "kind": f"{begin}another network on ranks 1, 2 and other samples on ranks 1, 2 and other settings on ranks 1, 2 "
        "(samples 60 on rank 0, 59 on rank 1) than on rank 0",
        "rounding": (60, 60),
        "pairs": f"{begin}other settings on ranks 1, 2 (pairs 20 on rank 0, 21 on rank 1) than on rank 0",
    }
    assert on_ranks(3, other_things, tmp_path) == [expected] * 3


def failing(rank, how):
    """Fails on one rank, in the middle of the measurement."""
    net, calls = network(), []

    def f(x):
        calls.append(len(x))
        if len(calls) > 12 and rank == 1:
            if how == "dies":
                os._exit(1)
            raise ArithmeticError("no more")
        return torch.sin(net(x))

    return lmnfast.connectivity(f, samples(60, 6), **FEW, group=dist.group.WORLD)


def test_a_process_that_fails_ends_the_others(tmp_path):
    other, own = on_ranks(2, failing, tmp_path, "fails")
    assert type(own) is ValueError and "ArithmeticError: no more" in str(own)
    assert type(other) is RuntimeError
    assert str(other) == f"group: another process failed, rank 1: ValueError: {own}"


def test_a_process_that_dies_ends_the_others(tmp_path):
    other, own = on_ranks(2, failing, tmp_path, "dies")
    assert own == DEAD and isinstance(other, RuntimeError)


def calls_of(rank):
    """Calls in which rank 1 differs: for each what it is called with there, and elsewhere."""
    f, x, world = network(), samples(60, 6), dist.group.WORLD
    rows = lmnfast.connectivity(f, x, **FEW, group=world, gather=False)
    probe = lmnfast.Probe(f, x, "0", every=1, **FEW, group=world)
    V = torch.ones(60, 2)

    def one(function, name, odd, usual, *given, **how):
        return lambda: function(*given, **how, **{name: odd if rank == 1 else usual})

    def probed(**at):
        return lambda: probe(**(at["odd"] if rank == 1 else at["usual"]))

    of_rank = {"group": world, **FEW}
    return {
        "samples": lambda: lmnfast.lmn(f, x if rank != 1 else torch.zeros(60, 6).long(), **of_rank),
        "points": one(lmnfast.connectivity, "points", 1, 9, f, x, group=world),
        "gather": one(lmnfast.connectivity, "gather", 1, True, f, x, **of_rank),
        "progress": one(lmnfast.connectivity, "progress", "yes", False, f, x, **of_rank),
        "differentiable": one(lmnfast.connectivity, "differentiable", True, False, f, x, **of_rank),
        "stacked": one(lmnfast.lmn, "stacked", torch.func.stack_module_state([f]), None, f, x, **of_rank),
        "negative": one(lmnfast.lmn, "negative", "none", "clip", f, x, **of_rank),
        "observables": one(lmnfast.measure, "observables", ["none"], [], f, x, **of_rank),
        "pairs": one(lmnfast.curvature, "pairs", 1, None, f, x, **of_rank),
        "generator": one(lmnfast.curvature, "generator", 3, None, f, x, pairs=9, **of_rank),
        "V": lambda: rows.product(V if rank != 1 else V[1:]),
        "extra": probed(odd={"lmn": 3.0}, usual={"loss": 3.0}),
        "other negative": one(lmnfast.lmn, "negative", "absolute", "clip", f, x, **of_rank),
        "other solver": one(lmnfast.measure, "solver", "estimate", "dense", f, x, **of_rank),
        "other observables": one(lmnfast.measure, "observables", ["curvature"], [], f, x, **of_rank),
        "other pairs": one(lmnfast.curvature, "pairs", 20, None, f, x, **of_rank),
        "other function": lambda: (lmnfast.lmn if rank == 1 else lmnfast.connectivity)(f, x, **of_rank),
        "other step": probed(odd={"step": 7}, usual={"step": 8}),
        "other V": lambda: rows.product(V + (rank == 1)),
        "none": lambda: lmnfast.lmn(f, x, **of_rank),
    }


def told(rank):
    said = {}
    for name, call in calls_of(rank).items():
        try:
            said[name] = call()
        except (ValueError, TypeError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


REFUSED = {
    "samples": "TypeError: x: expected floating-point samples",
    "points": "ValueError: points: expected ",
    "gather": "TypeError: gather: expected True or False, got 1",
    "progress": "TypeError: progress: expected ",
    "differentiable": 'ValueError: group: expected "alone" with differentiable, got ',
    "stacked": 'ValueError: group: expected "alone" with stacked, got ',
    "negative": "ValueError: negative: expected one of absolute, clip, got 'none'",
    "observables": "ValueError: observables: expected among ",
    "pairs": "ValueError: pairs: ",
    "generator": "TypeError: generator: ",
    "V": "ValueError: V: expected (60, vectors), got shape (59, 2)",
    "extra": "ValueError: extra: expected names not the probe's own, got lmn",
}
DIFFERENT = {
    "other negative": "negative clip on rank 0, absolute on rank 1",
    "other solver": "solver dense on rank 0, estimate on rank 1",
    "other observables": "observables () on rank 0, ('curvature',) on rank 1",
    "other pairs": "pairs None on rank 0, 20 on rank 1",
    "other function": "function connectivity on rank 0, lmn on rank 1",
    "other step": "step 8 on rank 0, 7 on rank 1",
}


@COMPILED
def test_what_one_process_refuses_or_has_otherwise_ends_all_at_once(tmp_path):
    every = on_ranks(3, told, tmp_path)
    for rank, said in enumerate(every):
        assert set(said) == {*REFUSED, *DIFFERENT, "other V", "none"}
        for name, expected in REFUSED.items():
            own = f"RuntimeError: group: another process failed, rank 1: {expected}"
            assert str(said[name]).startswith(expected if rank == 1 else own), said[name]
        for name, expected in DIFFERENT.items():
            assert f"got other settings on rank 1 ({expected}" in str(said[name]), said[name]
        assert said["other V"] == (
            "ValueError: V: expected the same vectors on all ranks, got others on rank 1 than on rank 0"
        )
        assert said["none"] == lmnfast.lmn(network(), samples(60, 6), **FEW)  # the group is in step


def cut_on_one(rank):
    """A probe of a group whose model cannot be cut on rank 1."""
    model, x = network(), samples(60, 6)
    said = []
    with lmnfast.Probe(model, x, "0", every=1, **FEW, group=dist.group.WORLD) as probe:
        if rank == 1:
            model[2] = nn.Linear(4, 3)
        try:
            probe(0)
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
        model[2] = nn.Linear(10, 3)
        with torch.no_grad():
            model[2].weight.fill_(0.5)
            model[2].bias.zero_()
        probe(1)
    return said, [row["lmn"] for row in probe.history]


@COMPILED
def test_a_model_that_one_process_cannot_cut_ends_the_step_of_all(tmp_path):
    other, own = on_ranks(2, cut_on_one, tmp_path)
    assert len(own[0]) == 1 and other[0][0].startswith("group: another process failed, rank 1: ")
    assert own[1] == other[1] and len(own[1]) == 1


def saturated(rank):
    f, x, world = network_of_shares(), 100 * samples(100, 3), dist.group.WORLD
    own = torch.Generator().manual_seed(0)
    drawn = lmnfast.curvature(f, x, pairs=900, generator=own, group=world).value
    others = [
        lmnfast.connectivity(
            lambda z, to=to: torch.tanh(3 * z).to(to), samples(40, 6, dtype=of), **FEW, group=world
        )
        for of, to in DTYPES
    ]
    return lmnfast.measure(f, x, group=world), drawn, others


DTYPES = ((torch.float64, torch.float32), (torch.float32, torch.float64))


def network_of_shares():
    torch.manual_seed(14)
    return nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1))


def test_what_is_constant_to_rounding_follows_from_all_samples(tmp_path):
    f, x = network_of_shares(), 100 * samples(100, 3)
    alone = lmnfast.measure(f, x)
    drawn = lmnfast.curvature(f, x, pairs=900, generator=torch.Generator().manual_seed(0)).value
    assert alone.constant_share > 0.01
    for m, of_group, others in on_ranks(2, saturated, tmp_path):
        for (of, to), L in zip(DTYPES, others, strict=True):  # outputs of another dtype than the samples
            one = lmnfast.connectivity(
                lambda z, to=to: torch.tanh(3 * z).to(to), samples(40, 6, dtype=of), **FEW
            )
            torch.testing.assert_close(L, one, rtol=0, atol=1e-6)
        assert (m.lmn, m.constant_share) == pytest.approx((alone.lmn, alone.constant_share), rel=1e-4)
        assert of_group == pytest.approx(drawn, rel=1e-4)


def interrupted(rank):
    """An interrupt that one process catches."""
    net, x, world = network(), samples(60, 6), dist.group.WORLD

    class Odd(ValueError):
        def __str__(self):
            raise ArithmeticError

    said = []
    for kind in (KeyboardInterrupt, SystemExit, Odd):

        def f(z, kind=kind):
            if rank == 1:
                raise kind
            return net(z)

        try:
            lmnfast.lmn(f, x, **FEW, group=world)
        except BaseException as error:
            said.append(type(error).__name__ if rank == 1 else str(error))
    try:
        lmnfast.lmn(f if rank == 1 else net, x[:1], **FEW, group=world)
    except (RuntimeError, ValueError) as error:
        said.append(type(error).__name__)
    return [*said, lmnfast.lmn(net, x, **FEW, group=world)]


@COMPILED
def test_an_interrupt_of_one_process_ends_the_call_of_all(tmp_path):
    other, own = on_ranks(2, interrupted, tmp_path)
    assert own[:2] == ["KeyboardInterrupt", "SystemExit"]
    for said, kind in zip(other[:3], ("KeyboardInterrupt", "SystemExit", ""), strict=True):
        assert said.startswith(f"group: another process failed, rank 1: {kind}")
    assert other[4] == own[4] == lmnfast.lmn(network(), samples(60, 6), **FEW)


def odd_probes(rank):
    """Probes that one process makes or reads in another way."""
    model, x, world = mlp(6, 8, 8, 3, gain=3.0), samples(60, 6), dist.group.WORLD
    how = {"every": 1, **FEW, "group": world}
    said = []

    def note(call):
        try:
            call()
        except (ValueError, RuntimeError, UserWarning) as error:
            said.append(f"{type(error).__name__}: {error}")

    def raising(o):
        if rank == 1:
            raise ArithmeticError("not here")
        return 1.0

    lmnfast.register_observable("odd", raising, reads=["model"])
    note(lambda: lmnfast.Probe(model, x, "0" if rank != 1 else "none", **how))
    note(lambda: lmnfast.Probe(model, x, ["0", "2"] if rank != 1 else ["0"], **how))
    with lmnfast.Probe(model, x, ["0", "2"], **how) as probe, warnings.catch_warnings():
        warnings.simplefilter("error" if rank == 1 else "ignore")
        probe._problems["0", "odd"] = "a warning of an earlier step"
        note(lambda: probe(0))
        note(lambda: probe(1))
    with lmnfast.Probe(model, x, ["0", "2"], **how, observables=["odd"]) as other:
        note(lambda: other(0))
    return said, [row["step"] for row in probe.history], lmnfast.lmn(model, x, **FEW, group=world)


@COMPILED
def test_a_probe_that_one_process_makes_otherwise_ends_all(tmp_path):
    alone = lmnfast.lmn(mlp(6, 8, 8, 3, gain=3.0), samples(60, 6), **FEW)
    for rank, (said, steps, last) in enumerate(on_ranks(2, odd_probes, tmp_path)):
        assert len(said) == 4, said
        assert "none" in said[0] and ("another process failed, rank 1: " in said[0]) is (rank == 0)
        assert said[1] == (
            "ValueError: layers: expected the same on all ranks, got ('0',) on rank 1 and ('0', '2') on rank 0"
        )
        assert "a warning of an earlier step" in said[2] and "not here" in said[3]
        assert steps == [1, 1] and last == alone


def probed(rank):
    model, x = network(), samples(60, 6)
    with lmnfast.Probe(model, x, "0", every=1, **FEW, group=dist.group.WORLD) as probe:
        for step in range(2):
            with torch.no_grad():
                model[2].weight.mul_(1 + step)
            probe(step)
    return probe.history


@COMPILED
def test_a_probe_of_a_group_has_the_rows_of_a_probe(tmp_path):
    model, x = network(), samples(60, 6)
    with lmnfast.Probe(model, x, "0", every=1, **FEW) as probe:
        for step in range(2):
            with torch.no_grad():
                model[2].weight.mul_(1 + step)
            probe(step)
    assert on_ranks(2, probed, tmp_path) == [probe.history] * 2 and len(probe.history) == 2


def test_a_nan_is_named_by_its_number_among_all_samples(tmp_path):
    (said,) = on_ranks(1, with_nan, tmp_path)
    assert said == (
        "x: NaN or Inf in sample 57",
        "f(x): NaN or Inf in sample 57",
    )


def with_nan(rank):
    x = samples(60, 6)
    marked = x[57].clone()
    said = []
    for f, y in (
        (network(), torch.where(torch.arange(60)[:, None] == 57, torch.nan, x)),
        (lambda z: network()(z) + torch.where((z == marked).all(1, keepdim=True), torch.nan, 0.0), x),
    ):
        try:
            lmnfast.connectivity(f, y, **FEW, group=dist.group.WORLD)
        except ValueError as error:
            said.append(str(error))
    return tuple(said)


def test_a_group_that_cannot_be_used_is_refused():
    f, x = network(), samples(20, 6)
    assert not dist.is_initialized()
    expected = (
        'group: expected "alone" or a process group of torch.distributed, got None without an initialised one; '
        "torch.distributed.group.WORLD is None before torch.distributed.init_process_group"
    )
    calls = (
        lambda: lmnfast.connectivity(f, x, group=dist.group.WORLD),
        lambda: lmnfast.lmn(f, x, group=dist.group.WORLD),
        lambda: lmnfast.measure(f, x, group=dist.group.WORLD),
        lambda: lmnfast.curvature(f, x, group=dist.group.WORLD),
        lambda: lmnfast.Probe(f, x, "0", group=dist.group.WORLD),
    )
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == expected
    with pytest.raises(ValueError, match='gather: expected True with group "alone", got False'):
        lmnfast.connectivity(f, x, gather=False)


def refused(rank):
    f, x, world = network(), samples(20, 6), dist.group.WORLD
    said = []
    for call in (
        lambda: lmnfast.connectivity(f, x, group="all"),
        lambda: lmnfast.connectivity(f, x, group=dist.new_group([1])),
        lambda: lmnfast.connectivity(f, x, group=world, differentiable=True),
        lambda: lmnfast.lmn(f, x[None], group=world, stacked=torch.func.stack_module_state([f])),
        lambda: lmnfast.curvature(f, x, group=world, differentiable=True),
    ):
        try:
            call()
        except (ValueError, TypeError) as error:
            said.append(str(error))
    return said


def test_what_no_group_takes_is_refused(tmp_path):
    said = on_ranks(2, refused, tmp_path)[0]
    assert said[0] == (
        "group: expected \"alone\" or a process group of torch.distributed that this process is in, got 'all'"
    )
    assert said[1].startswith('group: expected "alone" or a process group')
    for text, name in zip(said[2:], ("differentiable", "stacked", "differentiable"), strict=True):
        assert text.startswith(f'group: expected "alone" with {name}, got <')
