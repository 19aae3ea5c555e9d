"""Tails compiled by torch.compile: once, for tiles of any size, with the parameters of the training."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import fx, nn

import lmnfast
from lmnfast import _tiles
from lmnfast._outputs import original_of

compile_by_torch = torch.compile


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.first(x)
        h = h + torch.softmax(h @ h.mT, -1) @ self.inner(self.norm(h))
        return self.last(torch.tanh(h)).mean(1)


class Python(Attends):
    """torch.fx cannot trace it; a tape can."""

    def forward(self, x):
        return super().forward(x if x.shape[0] > 0 else x + 1)


class Reads(Attends):
    """No graph."""

    def forward(self, x):
        y = super().forward(x)
        return y if float(y.sum()) < 1e9 else 2 * y


@pytest.fixture
def backend(monkeypatch):
    """torch.compile without code in C++: the tests of what is compiled, and when. Gives the sizes of the batches that run."""
    torch._dynamo.reset()
    rows, graphs = [], []

    def run(graph, inputs):
        graphs.append(graph)

        def call(*args):
            rows.append(max(len(a) for a in args if isinstance(a, torch.Tensor) and a.dim() == 3))
            return graph(*args)

        return call

    monkeypatch.setattr(torch, "compile", partial(compile_by_torch, backend=run))
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield rows, graphs
    torch._dynamo.reset()


def made(kind=Attends, samples=14):
    torch.manual_seed(0)
    return kind(), torch.randn(samples, 5, 3)


@pytest.mark.parametrize("kind", [Attends, Python])
def test_one_graph_takes_tiles_of_all_sizes_and_gives_the_numbers_of_the_tail(kind, backend, monkeypatch):
    rows, graphs = backend
    model, x = made(kind)
    plain, samples = lmnfast.cut(model, "first", x)
    tail, same = lmnfast.cut(model, "first", x, compile=True)
    assert torch.equal(samples, same) and isinstance(original_of(tail), fx.GraphModule) and len(graphs) == 1
    for tile in (20_000, 100_000, 2**23):
        monkeypatch.setattr(_tiles, "CPU_TILE_COMPILED", tile)
        assert (lmnfast.connectivity(tail, samples) - lmnfast.connectivity(plain, samples)).abs().max() < 1e-6
    assert len(graphs) == 1 and len(set(rows)) > 5


def test_a_compiled_tail_follows_the_training(backend):
    rows, graphs = backend
    model, x = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    tail, _ = lmnfast.cut(model, "first", x, compile=True)
    with lmnfast.Probe(model, x, "first", every=1, compile=True) as probe:
        for step in range(3):
            probe(step)
            plain, samples = lmnfast.cut(model, "first", x)
            L = lmnfast.connectivity(plain, samples)
            assert (lmnfast.connectivity(tail, samples) - L).abs().max() < 1e-6
            assert abs(probe.history[-1]["lmn"] - float(lmnfast.lmn(plain, samples))) < 1e-4
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert len({round(row["lmn"], 4) for row in probe.history}) == 3
    assert len(graphs) == 2, "one for the tail, one for the probe"
    assert rows


def test_maps_and_blocks_are_compiled(backend):
    model, x = made()
    for how in (
        {"layer": "first", "until": "inner"},
        {"block": "norm"},
        {"layer": "", "output": lambda y: y[:, :1]},
    ):
        plain, samples = lmnfast.cut(model, inputs=x, **how)
        tail, _ = lmnfast.cut(model, inputs=x, compile=True, **how)
        assert original_of(tail) is not tail
        assert (lmnfast.connectivity(tail, samples) - lmnfast.connectivity(plain, samples)).abs().max() < 1e-6


def test_samples_along_another_dimension_are_compiled(backend):
    class Model(Attends):
        def forward(self, x):
            return super().forward(x.transpose(0, 1))

    model, x = made(Model)
    tail, samples = lmnfast.cut(model, "inputs", x.transpose(0, 1), batch_dim=1, compile=True)
    assert (
        lmnfast.connectivity(tail, samples) - lmnfast.connectivity(lambda x: Attends.forward(model, x), x)
    ).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["hermite", "hermite-midpoint", "jacobian"])
def test_derivatives_are_those_of_the_tail_itself(method, backend):
    rows, graphs = backend
    model, x = made()
    tail, samples = lmnfast.cut(model, "first", x, compile=True)
    ran = len(rows)
    L = lmnfast.connectivity(tail, samples, method=method)
    assert torch.equal(L, lmnfast.connectivity(original_of(tail), samples, method=method))
    assert len(rows) == ran and len(graphs) == 1
    assert torch.equal(lmnfast.jacobians(tail, samples), lmnfast.jacobians(original_of(tail), samples))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
        nn.Sequential(nn.Identity(), nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)),
    ],
    ids=["chain", "block"],
)
def test_what_a_kernel_measures_is_not_compiled(model, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    tail, samples = lmnfast.cut(model, "0", torch.randn(9, 4), compile=True)
    assert isinstance(tail, fx.GraphModule) and lmnfast.lmn(tail, samples) > 1


def test_a_compiled_tail_is_copied_and_pickled(backend):
    model, x = made()
    tail, samples = lmnfast.cut(model, "first", x, compile=True)
    L = lmnfast.connectivity(tail, samples)
    torch._dynamo.reset()
    for again in (copy.deepcopy(tail), pickle.loads(pickle.dumps(original_of(tail)))):
        assert (lmnfast.connectivity(again, samples) - L).abs().max() < 1e-6
    assert (lmnfast.connectivity(original_of(tail), samples) - L).abs().max() < 1e-6


def test_what_is_no_graph_is_refused_with_the_reason():
    model, x = made(Reads)
    with pytest.raises(
        ValueError, match=r"compile: the part behind 'first' is no graph .* as the model reads values"
    ):
        lmnfast.cut(model, "first", x, compile=True)
    with pytest.raises(ValueError, match="compile: expected without stacked"):
        stacked = torch.func.stack_module_state([made()[0], made()[0]])[0]
        lmnfast.cut(made()[0], "first", x, stacked=stacked, compile=True)


def test_without_a_compiler_one_error_says_so(monkeypatch):
    model, x = made()
    monkeypatch.setattr(
        torch, "compile", partial(compile_by_torch, backend=lambda graph, inputs: no_compiler())
    )
    expected = r"compile: torch.compile fails on the part behind 'first' .*; expected .* a compiler .* or compile=False"
    with pytest.raises(RuntimeError, match=expected):
        lmnfast.cut(model, "first", x, compile=True)
    with pytest.raises(RuntimeError, match=expected):
        lmnfast.Probe(model, x, "first", compile=True)
    assert model.training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    torch._dynamo.reset()


def no_compiler():
    raise RuntimeError("No working C++ compiler found")


def test_compiled_code_with_other_outputs_is_refused(monkeypatch):
    model, x = made()
    wrong = partial(
        compile_by_torch, backend=lambda graph, inputs: lambda *args: [y * 1.1 for y in graph(*args)]
    )
    monkeypatch.setattr(torch, "compile", wrong)
    tail, samples = lmnfast.cut(model, "first", x, compile=True)
    with pytest.raises(RuntimeError, match="f: has other outputs on the samples compiled by torch.compile"):
        lmnfast.connectivity(tail, samples)
    with (
        lmnfast.Probe(model, x, "first", every=1, compile=True) as probe,
        pytest.raises(RuntimeError, match="other outputs"),
    ):
        probe(0)
    torch._dynamo.reset()


def test_torchs_own_compiler_gives_the_numbers():
    """With code in C++, which takes seconds."""
    torch._dynamo.reset()
    model, x = made()
    with torch._dynamo.config.patch(error_on_recompile=True):
        try:
            tail, samples = lmnfast.cut(model, "first", x, compile=True)
        except RuntimeError as error:
            pytest.skip(f"torch.compile does not work here: {error}")
        L = lmnfast.connectivity(tail, samples)
    exact = copy.deepcopy(model).double()
    expected = lmnfast.connectivity(original_of(lmnfast.cut(exact, "first", x.double())[0]), samples.double())
    assert (L - expected).abs().max() < 1e-5
