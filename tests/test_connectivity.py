"""The public function: both routes, every bad input that its docstring names, nothing left behind."""

import functools
import itertools
import sys

import numpy as np
import pytest
import torch
from fresh import run_fresh
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import counted, inputs, mlp
from support import COMPILED, UNIFORM
from torch import nn

import lmnfast
from lmnfast import _checks, _enqueue, _measured, _native, _route, _threads, _tiles, reference
from lmnfast._chain import IDENTITY, Chain
from lmnfast._enqueue import enqueue
from lmnfast._settings import METHODS


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=2, max_size=5),
    st.integers(1, 20),
    st.sampled_from([nn.SiLU, nn.ReLU, nn.GELU, nn.Tanh]),
    st.integers(0, 1000),
)
def test_fused_and_generic_route_agree_with_the_definition(widths, n, activation, seed):
    net, x = mlp(*widths, activation=activation, seed=seed).double(), inputs(n, widths[0], seed=seed).double()
    with torch.no_grad():
        truth = reference.path_connectivity(net, x, *UNIFORM)
        points = torch.lerp(x[:, None, None], x[None, :, None], UNIFORM[0][:, None])
        y = net(points.flatten(0, 2)).reshape(n, n, len(UNIFORM[0]), -1)[~torch.eye(n, dtype=bool)]
    # Outputs of dead units are constant; what the products' rounding makes of that in the definition is no truth.
    assume((y.amax(1) - y.amin(1) > 1e-9 * y.abs().amax(1)).all())
    assert (lmnfast.connectivity(net, x) - truth).abs().max() < 1e-11
    assert (lmnfast.connectivity(counted(net), x) - truth).abs().max() < 1e-11


def test_a_chain_is_called_on_the_samples_alone_and_any_other_network_on_the_paths(monkeypatch):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(6, 20, 6)

        def forward(self, x):
            return x + self.net(x)

    f, x = Residual(), inputs(30, 6)
    rows = []
    f.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    L = lmnfast.connectivity(f, x)
    tiles = rows[4:]
    assert rows[:4] == [30, 7, 7, 30], "the samples, some of them again, and all in float64"
    assert sum(tiles) == 435 * 19 + 3 * len(tiles), "3 samples in a tile, not its ends"
    with torch.no_grad():
        assert (L - reference.path_connectivity(f, x, *UNIFORM)).abs().max() < 1e-5
    chain = mlp(6, 20, 4)
    forwarded = counted(chain)
    generic = lmnfast.connectivity(forwarded, x)
    assert sum(forwarded.batches) == 30 + 14 + 30 + 435 * 19 + 3 * (len(forwarded.batches) - 4)
    monkeypatch.setattr(_enqueue, "GenericPaths", lambda *_: pytest.fail("the chain went the generic route"))
    assert (lmnfast.connectivity(chain, x) - generic).abs().max() < 1e-5


@pytest.mark.parametrize("budget", [1, 10_000, 100_000, 2**30])
def test_the_budget_changes_the_tiles_and_not_the_result(budget):
    net, x = mlp(6, 20, 4), inputs(25, 6)
    f = counted(net)
    L = lmnfast.connectivity(f, x, budget=budget)
    per_row = 4 * (20 + 20)  # the first Linear's results and the SiLU's, which exist at one time
    tiles = f.batches[4:]  # behind the samples, some of them twice, and all in float64
    assert max(tiles) * per_row <= max(budget, (19 + 3) * per_row), "3 samples are in every tile"
    assert (L - lmnfast.connectivity(counted(net), x)).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5), (7,)])
def test_samples_and_outputs_of_any_shape(shape):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(inputs(*shape, 4))

        def forward(self, x):
            y = torch.tensordot(x, self.weight, x.dim() - 1)
            return torch.sin(y).reshape(len(x), 2, 2)

    net, x = Net(), inputs(12, *shape)
    with torch.no_grad():
        assert (
            lmnfast.connectivity(net, x) - reference.path_connectivity(net, x, *UNIFORM)
        ).abs().max() < 1e-5


def test_a_linear_layer_over_the_last_of_several_dimensions_is_not_taken_for_a_chain():
    net, x = mlp(5, 9, 3), inputs(10, 4, 5)
    with torch.no_grad():
        assert (
            lmnfast.connectivity(net, x) - reference.path_connectivity(net, x, *UNIFORM)
        ).abs().max() < 1e-5


def test_a_chain_that_does_not_give_the_networks_outputs_is_not_used(monkeypatch):
    class Own(nn.Sequential):  # whose forward may be anything, unlike that of torch's own
        pass

    net, x = Own(*mlp(6, 20, 4)), inputs(12, 6)
    wrong = Chain((torch.zeros(4, 6),), (None,), (IDENTITY,) * 2)
    truth = lmnfast.connectivity(net, x)
    monkeypatch.setattr(_route, "chain_or_reason", lambda f, *_: wrong)
    assert (lmnfast.connectivity(net, x) - truth).abs().max() < 1e-5
    with pytest.raises(_checks.NotTheChain, match="that chain has other outputs"):
        enqueue(net, x, deferred=True).check()
    monkeypatch.setattr(_measured, "enqueue", functools.partial(enqueue, deferred=True))
    assert (lmnfast.connectivity(net, x) - truth).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_widened(dtype):
    net, x = mlp(6, 20, 4).to(dtype), inputs(15, 6, dtype=dtype)
    L = lmnfast.connectivity(net, x)
    assert L.dtype == torch.float32
    wide = lmnfast.connectivity(mlp(6, 20, 4).to(dtype).float(), x.float())
    assert (L - wide).abs().max() < 1e-5
    generic = lmnfast.connectivity(counted(net), x)
    assert generic.dtype == torch.float32 and (generic - wide).abs().mean() < 0.05


def test_nine_lobatto_points_are_close_to_the_21_they_stand_for():
    net, x = mlp(16, 60, 60, 8, gain=1.5), inputs(150, 16)
    exact, lobatto = lmnfast.lmn(net, x), lmnfast.lmn(net, x, points=9, rule="lobatto")
    assert 2 < exact < 150
    assert abs(lobatto / exact - 1) < 5e-4
    assert abs(lmnfast.lmn(net, x, points=11) / exact - 1) > 2 * abs(lobatto / exact - 1)


def test_the_default_budget_follows_the_free_memory_of_a_card(monkeypatch):
    card = torch.device("cuda", 1)
    free, reserved, allocated = {}, {}, {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[device])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[device])
    for gib, in_torch, of_these, expected in ((8, 0, 0, 2), (1, 8, 1, 2), (70, 0, 0, 4), (0, 2, 2, 0)):
        free[card], reserved[card], allocated[card] = (n * 2**30 for n in (gib, in_torch, of_these))
        assert _tiles.tile_bytes(None, card) == max(1, expected * 2**30)
        assert _tiles.tile_bytes(2**33, card) == 2**33
    cpu = torch.device("cpu")
    assert _tiles.tile_bytes(None, cpu) == _tiles.tile_bytes(2**33, cpu) == 8 * 2**20
    assert _tiles.tile_bytes(None, cpu, differentiated=True) == 24 * 2**20
    assert _tiles.tile_bytes(None, cpu, of_block=True) == 32 * 2**20
    assert _tiles.tile_bytes(1000, cpu) == 1000


@pytest.mark.parametrize("tile", [0, 10**3, 10**5, 10**7])
def test_tiles_are_whole_paths_within_the_budget(tile):
    for samples, allocated, interior in ((12, 12 * 80, 19), (200, 10**6, 7), (2, 64, 1)):
        pairs, a_sample = _tiles.tile_pairs(tile, samples, allocated, interior), allocated / samples
        again, every = min(3, samples), samples * (samples - 1) // 2
        assert _tiles.tile_points(pairs, samples, interior) == pairs * interior + again
        assert pairs == 1 or (pairs * interior + again) * a_sample <= tile
        assert pairs == every or (
            pairs < every and ((pairs + 1) * interior + again) * a_sample > tile - a_sample
        )


@pytest.mark.parametrize(
    "x, keywords, error, message",
    [
        (
            torch.ones(3, 6, dtype=torch.int64),
            {},
            TypeError,
            "x: expected floating-point samples, got torch.int64.*cut",
        ),
        ([[1.0] * 6], {}, TypeError, "x: expected a tensor of samples, got list"),
        (
            torch.zeros(0, 6),
            {},
            ValueError,
            r"x: expected samples \(N, \*in\) with N > 0, got shape \(0, 6\)",
        ),
        (torch.zeros(6), {}, ValueError, "x: expected samples"),
        (
            inputs(3, 6).double(),
            {},
            TypeError,
            "x: is torch.float64, but f's parameter '0.weight' is torch.float32",
        ),
        (
            inputs(3, 6),
            {"method": "magic"},
            ValueError,
            "method: expected one of path, hermite, .*jacobian, got 'magic'",
        ),
        (inputs(3, 6), {"rule": "simpson"}, ValueError, "rule: expected one of uniform, lobatto"),
        (inputs(3, 6), {"points": 2}, ValueError, "points: expected at least 3, .* got 2"),
        (inputs(3, 6), {"points": 2, "method": "hermite"}, ValueError, "points: expected at least 3"),
        (inputs(3, 6), {"points": 2, "method": "jacobian"}, ValueError, "points: expected at least 3"),
        (inputs(3, 6), {"points": 2.5}, TypeError, "points: expected an integer"),
        (inputs(3, 6), {"budget": 0}, ValueError, "budget: expected a positive number of bytes, got 0"),
        (torch.zeros(3, 6, device="meta"), {}, ValueError, "x: on meta, where tensors have no values"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(x, keywords, error, message):
    net = mlp(6, 20, 4)
    net.register_forward_hook(lambda *_: pytest.fail("f was called"))
    with pytest.raises(error, match=message):
        lmnfast.connectivity(net, x, **keywords)


def test_samples_on_another_device_than_the_model_are_refused():
    with pytest.raises(
        ValueError, match="x: on cpu, but f's parameter '0.weight' is on meta; move one of them"
    ):
        lmnfast.connectivity(mlp(6, 20, 4).to("meta"), inputs(3, 6))


@pytest.mark.parametrize(
    "f, error, message",
    [
        (lambda x: x.argmax(1), TypeError, "f: expected a floating-point tensor, got torch.int64"),
        (lambda x: (x, x), TypeError, "f: expected a floating-point tensor, got tuple"),
        (lambda x: x.sum(), ValueError, r"f: expected outputs \(5, \*out\) for 5 samples, got shape \(\)"),
        (lambda x: x[:2], ValueError, r"f: expected outputs \(5, \*out\) for 5 samples, got shape \(2, 6\)"),
        (lambda x: x[:, :0], ValueError, r"f: expected outputs .* got shape \(5, 0\)"),
    ],
)
def test_functions_that_do_not_map_batches_are_refused(f, error, message):
    with pytest.raises(error, match=message):
        lmnfast.connectivity(f, inputs(5, 6))


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_is_as_it_was(failing, wrapped):
    class Wrapped(nn.Module):  # not a chain
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net(x)
            if failing and not torch.is_grad_enabled():
                raise RuntimeError("deliberate")
            return y * y

    net = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4))
    net = Wrapped(net) if wrapped or failing else net
    x = inputs(9, 6).requires_grad_()
    net.train()(x).sum().backward()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters()]
    x_before, rng = x.detach().clone(), torch.get_rng_state()
    if failing:
        with pytest.raises(RuntimeError, match="deliberate"):
            lmnfast.connectivity(net, x)
    else:
        L = lmnfast.connectivity(net, x)
        assert torch.equal(L, lmnfast.connectivity(net.eval(), x)), "dropout was not in eval mode"
        net.train()
    assert all(m.training for m in net.modules()) and torch.is_grad_enabled()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters()))
    assert torch.equal(x, x_before) and torch.equal(rng, torch.get_rng_state())


def test_a_network_that_works_in_place_does_not_change_the_samples():
    x = inputs(9, 6)
    before = x.clone()
    lmnfast.connectivity(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), x)
    lmnfast.connectivity(lambda v: v.relu_().sin(), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("route, n, allowance_mb", [("fused", 500, 24), ("generic", 200, 64)])
def test_peak_memory_beyond_the_result(route, n, allowance_mb, tmp_path):
    """Tail 100 -> 100 -> 31; the generic route would need 400 MB for all paths at once: growth of the process's peak over
    its state before, less the result."""
    (tmp_path / "code.py").write_text(f"""
import resource, torch, lmnfast
from torch import nn
net = nn.Sequential(nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 31))
f = net if {route!r} == "fused" else lambda x: net(x)
x = torch.randn({n}, 100)
lmnfast.connectivity(f, x[:70])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
L = lmnfast.connectivity(f, x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - L.numel() * 4 // 1024)
""")
    done = run_fresh(tmp_path / "code.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < allowance_mb * (
        1 if _native.HAS_CORE else 4
    )  # the reference has temporaries


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [True, False])
def test_progress_rises_to_one_and_changes_nothing(method, fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3) if fused else nn.LayerNorm(9))
    x, shares = torch.randn(30, 5), []
    L = lmnfast.measure(model, x, method=method, budget=20_000, progress=shares.append).connectivity
    assert shares == sorted(shares) and shares[-1] == 1
    assert fused or method == "jacobian" or len(shares) > 2
    assert torch.equal(L, lmnfast.measure(model, x, method=method, budget=20_000).connectivity)


def test_progress_of_stacked_networks_is_that_of_all():
    models, shares = [nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.LayerNorm(9)) for _ in range(2)], []
    stacked = torch.func.stack_module_state(models)
    lmnfast.connectivity(models[0], torch.randn(2, 8, 5), stacked=stacked, progress=shares.append)
    assert shares == sorted(shares) and {0.5, 1} <= set(shares)


@pytest.mark.parametrize("fused", [True, False])
def test_what_progress_raises_ends_the_measurement(fused, monkeypatch):
    def progress(_: float) -> None:
        raise KeyError("enough")

    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3) if fused else nn.LayerNorm(9))
    with pytest.raises(KeyError, match="enough"):
        lmnfast.measure(model, torch.randn(30, 5), progress=progress)


def test_a_bar_shows_progress(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    x = torch.randn(8, 5)
    lmnfast.measure(nn.Linear(5, 2), x, progress=True)
    assert "100%" in capsys.readouterr().err
    lmnfast.measure(nn.Linear(5, 2), x)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(
        ImportError, match="progress: True shows a bar of tqdm, which is missing; pip install tqdm"
    ):
        lmnfast.measure(nn.Linear(5, 2), x, progress=True)
    with pytest.raises(
        TypeError, match="progress: expected a bool or a function of the share done, got 'yes'"
    ):
        lmnfast.measure(nn.Linear(5, 2), x, progress="yes")


def test_numpys_integers_are_integers():
    m = lmnfast.measure(nn.Linear(5, 2), torch.randn(8, 5), points=np.int64(21))
    assert m.points == 21 and type(m.points) is int


@COMPILED
@pytest.mark.parametrize("samples, inputs, units", [(34, 64, 100), (300, 500, 40), (211, 1000, 7)])
def test_one_matrix_for_any_thread_count(samples, inputs, units, threads):
    """The samples of a chain go through its first Linear once; a product of torch is another with other threads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, units), nn.Tanh(), nn.Linear(units, 3)).double()
    x, results = torch.randn(samples, inputs).double(), []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append([lmnfast.connectivity(model, x, method=method) for method in ("path", "hermite")])
        z = _native.linear(x, model[0].weight, model[0].bias)
        results[-1] += [z[:7], _native.linear(x[:7], model[0].weight, model[0].bias)]
    assert torch.equal(results[0][2], results[0][3]), "depends on the number of samples"
    assert (z - model[0](x)).abs().max() < 1e-13
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@COMPILED
@pytest.mark.parametrize(
    "widths, half, activation",
    [
        *(((60, 200, 200, 10), 60, activation) for activation in (nn.ReLU, nn.GELU, nn.Tanh)),
        *(((60, 130, 10), 100, activation) for activation in (nn.ReLU, nn.GELU, nn.Tanh)),
        ((60, 300, 600), 75, nn.GELU),
    ],
)
def test_one_number_for_any_thread_count(widths, half, activation, threads):
    """Pairs that are measured again in float64, features of Jacobians, eigenvalues."""
    torch.manual_seed(0)
    layers = [[nn.Linear(a, b), activation()] for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(nn.Linear(60, 60), *(part for pair in layers for part in pair))[:-1]
    x, results = torch.randn(half, 60), []
    x = torch.cat([x, x + 1e-7 * torch.randn(half, 60)])  # float64 takes most of the time
    # The paths of the widest network take seconds, in the same code as the others'.
    methods = [method for method in METHODS if method != "path" or widths[-1] == 10]
    for count in (1, 2, 3):
        threads(count)
        results.append([lmnfast.connectivity(model, x, method=method) for method in methods])
        results[-1] += [lmnfast.linear_mapping_number(L) for L in results[-1][:2]]
        results[-1] += [lmnfast.jacobian_distances(model, x, affine=affine) for affine in (False, True)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@COMPILED
@pytest.mark.parametrize("activation", [nn.Softplus, nn.Tanh, functools.partial(nn.GELU, "tanh")])
def test_one_number_in_float64_for_any_thread_count(activation, threads):
    """Torch computes the last numbers of a thread's share of a tensor by other code, here of the activations'."""
    torch.manual_seed(0)
    deep = nn.Sequential(
        nn.Linear(64, 101), activation(), nn.Linear(101, 101), activation(), nn.Linear(101, 31)
    ).double()
    shallow = nn.Sequential(nn.Linear(30, 101), activation(), nn.Linear(101, 7)).double()
    x, z, results = torch.randn(60, 64).double(), torch.randn(701, 30).double(), []
    x = torch.cat([x, x * (1 + 1e-12 * torch.randn_like(x))])
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(
            [lmnfast.connectivity(deep, x), lmnfast.connectivity(deep, x, method="hermite-midpoint")]
        )
        results[-1] += [lmnfast.lmn(deep, x), lmnfast.jacobian_distances(shallow, z, affine=True)]
        results[-1] += [lmnfast.connectivity(shallow, z, method="jacobian")]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@COMPILED
def test_no_more_threads_than_cores_to_run_on(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert _threads.cores_to_use() == min(64, _threads.cores())
