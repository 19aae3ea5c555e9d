"""What f may do, and what is refused: rows that depend on each other, states, randomness, other numbers of samples."""

import copy

import pytest
import support
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmnfast
from lmnfast import _undisturbed, reference
from lmnfast._outputs import rows_again
from lmnfast._tiles import AllocationCount
from lmnfast.quadrature import path_nodes

METHODS = ("path", "hermite", "hermite-midpoint", "jacobian")
REFUSED = "f: gives other outputs for sample .* rows of a batch depend on each other"


def samples(n: int, *shape: int, seed: int = 0) -> Tensor:
    return support.samples(n, *(shape or (6,)), seed=seed)


def mlp() -> nn.Sequential:
    return support.mlp(6, 16, 3)


def truth(f, x: Tensor) -> float:
    with torch.no_grad():
        L = reference.path_connectivity(f, x, *path_nodes("uniform", 21))
    return float(reference.linear_mapping_number(L))


# Rows that depend on other rows ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    """batch_first forgotten: the batch is taken for a sequence."""

    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        return self.encoder(x, src_mask=mask, is_causal=True)


FUNCTIONS = {
    "sum of the rows before": lambda z: torch.tanh(z).cumsum(0),
    "sum of the rows behind": lambda z: torch.tanh(z).flip(0).cumsum(0).flip(0),
    "difference to the row before": lambda z: torch.tanh(z).diff(dim=0, prepend=torch.zeros_like(z[:1])),
    "difference to the row behind": lambda z: torch.tanh(z).diff(dim=0, append=torch.zeros_like(z[:1])),
    "mean of the batch": lambda z: torch.tanh(z) - z.mean(0),
    "scale of the batch": lambda z: torch.tanh(z / z.abs().amax()),
}


@pytest.mark.parametrize("n", [2, 3, 4, 25])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_that_depend_on_other_rows_are_refused(name, n):
    for method in METHODS:
        with pytest.raises(ValueError, match=REFUSED):
            lmnfast.connectivity(FUNCTIONS[name], samples(n), method=method)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_forgotten_batch_first_is_refused(kind):
    torch.manual_seed(0)
    for x in (2 * samples(25), 2 * samples(9, 5, 6)):
        with pytest.raises(ValueError, match="batch_first=True is forgotten"):
            lmnfast.lmn(Recurrent(kind), x)
    with pytest.raises(ValueError, match="batch_first=True is forgotten"):
        lmnfast.lmn(Causal(), samples(9, 5, 6))


def test_only_one_of_all_samples_matters_to_the_others_and_that_is_refused():
    for outlier in (0, 7, 19):
        x = samples(20)
        x[outlier] *= 9
        with pytest.raises(ValueError, match=REFUSED):
            lmnfast.lmn(FUNCTIONS["scale of the batch"], x)


@pytest.mark.parametrize("method", ["path", "hermite-midpoint"])
def test_a_function_that_does_something_else_on_more_rows_than_samples_is_refused(method):
    net = mlp()

    def f(z):
        return torch.sin(3 * net(z)) if len(z) > 40 else net(z)

    with pytest.raises(ValueError, match="f: gives other outputs .* a batch of"):
        lmnfast.connectivity(f, samples(25), method=method)


def test_products_that_torch_rounds_for_large_batches_only_are_allowed_where_that_was_asked_for(precision):
    net = mlp()

    def f(z):  # as on a CPU with AMX
        if len(z) <= 40:
            return net(z)
        rounded = copy.deepcopy(net).bfloat16()
        return rounded.float()(z.bfloat16().float())

    precision("medium")
    assert lmnfast.measure(f, samples(25)).precision == "medium"
    precision("highest")
    with pytest.raises(ValueError, match="f: gives other outputs .* a batch of"):
        lmnfast.measure(f, samples(25))


@pytest.mark.parametrize("measure", [lmnfast.jacobians, lmnfast.jacobian_distances])
def test_jacobians_of_rows_that_depend_on_each_other_are_refused(measure):
    with pytest.raises(ValueError, match=REFUSED):
        measure(FUNCTIONS["sum of the rows before"], samples(8))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 100])
def test_the_second_look_is_at_both_ends_at_another_number_of_samples(n):
    last, first = rows_again(n)
    assert len(last) == len(first) and (n == 1 or (len(last) < n and not set(last) & set(first)))
    assert last[0] == n - 1 and first[-1] == 0 and sorted(first, reverse=True) == first


# States and randomness -------------------------------------------------------------------------------------


class Keeping(nn.Module):
    """Runs on with a state from call to call, as long as the batch's shape stays."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.network, self.where = mlp(), where
        self.state: Tensor | None = None
        self.states: list[Tensor] = []
        self.by_name: dict[str, dict] = {"state": {}}
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z):
        y = self.network(z)
        if self.where == "buffer":
            self.calls += 1
            return torch.tanh(self.calls * y)
        if self.where == "attribute":
            self.state = y if self.state is None or self.state.shape != y.shape else self.state / 2 + y
            return torch.tanh(self.state)
        if self.where == "list":
            self.states.append(y)
            fitting = [s for s in self.states if s.shape == y.shape]
            return torch.tanh(torch.stack(fitting).sum(0))
        own = self.by_name["state"]
        own[y.shape] = own.get(y.shape, 0) + y
        return torch.tanh(own[y.shape])


@pytest.mark.parametrize("where", ["attribute", "buffer", "list", "dict"])
def test_a_state_that_a_module_keeps_between_calls_is_begun_anew(where):
    model, x = Keeping(where), samples(30)
    right = truth(lambda z: torch.tanh(model.network(z)), x)
    for _ in range(2):
        assert float(lmnfast.lmn(model, x, budget=2**15)) == pytest.approx(right, rel=1e-4)
    assert (model.state, model.states, model.by_name, float(model.calls)) == (None, [], {"state": {}}, 0)
    J = lmnfast.jacobians(lambda z: torch.tanh(model.network(z)), x)
    torch.testing.assert_close(lmnfast.jacobians(model, x), J)


@pytest.mark.parametrize("where", ["attribute", "buffer", "list", "dict"])
def test_a_state_begins_anew_also_where_pairs_are_measured_in_float64(where):
    model, x = Keeping(where), samples(12)
    x = torch.cat((x, x[:3] * (1 + 1e-6)))
    right = truth(lambda z: torch.tanh(model.network.double()(z)), x.double())
    model.float()
    assert float(lmnfast.lmn(model, x, budget=2**15)) == pytest.approx(right, rel=1e-3)
    assert (model.state, model.states, model.by_name, float(model.calls)) == (None, [], {"state": {}}, 0)


@pytest.mark.parametrize("where", ["attribute", "list", "dict", "buffer"])
@pytest.mark.parametrize("method", METHODS)
def test_a_state_in_the_closure_of_a_function_is_refused(where, method):
    model = Keeping(where)
    with pytest.raises(ValueError, match="keeps a state between calls|cannot be differentiated"):
        lmnfast.connectivity(lambda z: model(z), samples(30), method=method, budget=2**15)


def test_a_state_kept_from_tile_to_tile_is_refused():
    calls = {}

    def f(z):
        calls[len(z)] = calls.get(len(z), -1) + (len(z) > 30)
        return torch.tanh(z * (1 + max(0, calls[len(z)])))

    with pytest.raises(ValueError, match="keeps a state between calls"):
        lmnfast.lmn(f, samples(30), budget=2**15)


@pytest.mark.parametrize("n", [2, 3, 30])
@pytest.mark.parametrize("noise", [1e-3, 1e-2])
def test_a_random_function_is_refused(noise, n):
    net = mlp()
    dropping = nn.Sequential(net, nn.Dropout(0.5))
    for f in (lambda z: net(z) + noise * torch.randn(len(z), 3), lambda z: dropping(10 * noise * z + 1)):
        with pytest.raises(ValueError, match="it is random"):
            lmnfast.lmn(f, samples(n))


@pytest.mark.parametrize("n", [2, 3])
def test_rounding_is_no_reason_to_refuse(n):
    for seed in range(30):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 1000))
        assert 1 <= float(lmnfast.lmn(net, torch.randn(n, 32), rule="lobatto", points=5)) <= n


def test_a_network_that_multiplies_rounding_is_not_refused():
    for seed in range(5):
        torch.manual_seed(seed)
        layers = [layer for _ in range(8) for layer in (nn.Linear(20, 20), nn.Hardtanh())]
        net = nn.Sequential(nn.Linear(6, 20), *layers, nn.Linear(20, 3))
        for layer in net[1::2]:
            layer.weight.data.mul_(8)
        lmnfast.lmn(net, samples(20), rule="lobatto", points=5)


@pytest.mark.parametrize("method", METHODS)
def test_a_function_may_return_the_same_buffer_each_time(method):
    net, buffer = mlp(), torch.empty(10_000, 3)

    def f(z):
        if torch.is_grad_enabled():
            return net(z)
        buffer[: len(z)] = net(z)
        return buffer[: len(z)]

    x = samples(20)
    expected = lmnfast.connectivity(lambda z: net(z), x, method=method)
    assert torch.equal(lmnfast.connectivity(f, x, method=method), expected)


def test_a_cut_compares_with_outputs_that_the_tail_does_not_overwrite():
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
            self.out = torch.zeros(20, 3)

        def forward(self, x):
            h = self.first(x)
            self.out[: len(x)] = self.last(torch.tanh(h)) + x[:, :3]
            return self.out[: len(x)]

    with pytest.raises(ValueError, match="depends on the inputs also by another way"):
        lmnfast.cut(Static(), "first", samples(20))


# Chains ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:f. .* constant to rounding:UserWarning")
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("what", ["forward of a class", "functional", "forward of Linear"])
def test_what_a_library_has_put_in_place_of_torchs_own_counts(what, offset, monkeypatch):
    net, x = mlp(), samples(25)
    net[2].bias.data.fill_(offset)
    if what == "forward of a class":
        monkeypatch.setattr(nn.SiLU, "forward", lambda self, z: torch.sin(3 * z))
    elif what == "functional":
        monkeypatch.setattr(F, "silu", lambda z, inplace=False: torch.sin(3 * z))
    else:  # quantised to steps of 2^-9
        own = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, z: own(self, (z * 512).round() / 512))
    generic = lmnfast.connectivity(lambda z: net(z), x)
    assert torch.equal(lmnfast.connectivity(net, x), generic)


def test_a_chain_that_differs_by_much_of_the_spread_is_not_used_however_large_the_outputs():
    class Odd(nn.Linear):
        def forward(self, z):
            return F.linear(z, self.weight, self.bias + (torch.sin(5 * self.weight.sum()) if len(z) else 0))

    net, x = mlp(), samples(25)
    model = nn.Sequential(net[0], net[1], net[2])
    model[2].bias.data.fill_(1e3)

    class Kinked(nn.Module):
        """Reads as a chain to torch.fx, which takes one branch."""

        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, z):
            return self.net(z * (1.0 if type(z) is not Tensor else 1.1))

    f = Kinked()
    assert torch.equal(lmnfast.connectivity(f, x), lmnfast.connectivity(lambda z: f(z), x))


# Other numbers of samples, other tensors -------------------------------------------------------------------


def test_what_fails_on_another_number_of_samples_says_so():
    table = samples(20, 3, seed=1)
    for f in (lambda z: z[:, :3] + table, lambda z: torch.tanh(z @ torch.ones(6, 3)) * table[:, :1]):
        with pytest.raises(ValueError, match=r"f: fails on another number of samples, 5 for 20") as caught:
            lmnfast.lmn(f, samples(20))
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_outputs_of_another_shape_on_another_number_of_samples_say_so():
    with pytest.raises(ValueError, match=r"f: expected outputs \(5, 20\) for 5 samples, got shape \(5, 5\)"):
        lmnfast.lmn(lambda z: z @ z.T, samples(20))
    with pytest.raises(
        ValueError, match=r"got shape \(7, 3\), though .* the first dimension \(batch_first=True\)"
    ):
        lmnfast.lmn(lambda z: z[-1], samples(7, 7, 3))


@pytest.mark.parametrize("measure", [lmnfast.connectivity, lmnfast.jacobians, lmnfast.jacobian_distances])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_samples_that_are_no_dense_tensors_of_a_known_type_are_refused(measure):
    x = samples(8)
    others = [x.to_sparse(), x.to_sparse_csr(), x.to(torch.float8_e4m3fn)]
    others.append(torch.nested.nested_tensor([x[0], x[1]]))
    if torch.backends.mkldnn.is_available():
        others.append(x.to_mkldnn())
    for other in others:
        with pytest.raises(TypeError, match="x: expected a dense tensor of"):
            measure(mlp(), other)


def test_a_model_of_inference_tensors_is_measured_or_refused_in_words():
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        x = samples(9)
    assert lmnfast.lmn(net, x.clone()) >= 1
    with pytest.raises(ValueError, match="f: cannot be differentiated: Inference tensors"):
        lmnfast.jacobians(net, x)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda z: net(z)], ids=["fused", "generic"])
def test_a_default_device_changes_nothing(wrap):
    f, x = wrap(mlp()), samples(12)
    measures = [lmnfast.jacobians, lmnfast.jacobian_distances, lmnfast.lmn]
    measures += [lambda f, x, m=m: lmnfast.connectivity(f, x, method=m) for m in METHODS]
    for measure in measures:
        expected = measure(f, x)
        with torch.device("meta"):
            assert torch.equal(measure(f, x), expected)


def test_what_differs_in_float64_is_no_rounding():
    """Noise by a row's place, in every call the same; and rows that depend on each other beside a cast."""
    torch.manual_seed(0)
    x, net = torch.randn(40, 8), nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4))

    def noisy(z, size):
        torch.manual_seed(0)
        y = net(z)
        return y + size * torch.randn_like(y)

    def cast(z):
        return net(z).bfloat16().float() + 0.005 * z.mean(0)[:4]

    for f in (lambda z: noisy(z, 1e-3), lambda z: noisy(z, 0.3), cast):
        with pytest.raises(ValueError, match="f: gives other outputs for sample"):
            lmnfast.lmn(f, x)


def test_a_refusal_says_where_rounding_decides_the_outputs():
    torch.manual_seed(0)
    weight = 1e6 * torch.randn(200, 40)

    def f(z):  # sums in another order for another number of rows
        order = torch.randperm(200, generator=torch.Generator().manual_seed(len(z))).tolist()
        return torch.sin(sum(z[:, n, None] * weight[n] for n in order))

    with pytest.raises(ValueError, match="f: rounding decides its outputs: called on"):
        lmnfast.lmn(f, torch.randn(40, 200))


def test_bytes_are_counted_of_all_results_or_of_those_there_are_at_a_time():
    layers = nn.Sequential(
        nn.Linear(6, 100), nn.ReLU(inplace=True), nn.Linear(100, 50), nn.Flatten(), nn.Linear(50, 2)
    )
    x, a_float = samples(10), 4

    def f(z):
        y = layers(z)
        kept = torch.stack([y, y], 1)
        return kept[:, 0] + kept[:, 1].view(-1, 2)

    with torch.no_grad():
        with AllocationCount() as together:
            first = f(x)
        with AllocationCount(live=True) as at_a_time:
            second = f(x)
            third = f(x)  # what the calls return stays
    assert torch.equal(first, second) and torch.equal(first, third)
    # Both sides of the second Linear are there together, and nothing else; a view takes nothing.
    assert at_a_time.bytes == 10 * a_float * (100 + 50 + 2)
    assert together.bytes > 10 * a_float * (100 + 100 + 50 + 50)
    del second, third
    assert at_a_time._live == 0 and not at_a_time._storages and not at_a_time._tensors


def test_bytes_held_at_a_time_are_counted_of_results_without_a_storage_and_not_of_views_of_more():
    data = torch.randn(1000, 10)
    with AllocationCount(live=True) as count:
        torch.vmap(torch.func.grad(lambda row: row.square().sum()))(data[:5])
        data[:5].to_sparse()
    assert 1 < count.bytes < 4 * data.numel()


class Widening(nn.Module):
    """Parameters of two dtypes, with or without the cast between them."""

    def __init__(self, casts):
        super().__init__()
        self.first, self.second, self.casts = nn.Linear(6, 5), nn.Linear(5, 3).double(), casts

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.second(h.double() if self.casts else h)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        return self.inner(x)


def regions(f, x):
    """Also of an f that has none."""
    try:
        return lmnfast.linear_regions(f, x)
    except ValueError:
        return None


@pytest.mark.parametrize("make", [mlp, Own, lambda: Widening(True), lambda: torch.tanh])
@pytest.mark.parametrize(
    "measure", [lmnfast.connectivity, lmnfast.jacobians, lmnfast.jacobian_distances, regions]
)
def test_a_model_is_put_into_eval_mode_once_for_each_measurement(measure, make, monkeypatch):
    entered, begin = [], _undisturbed.Kept.__init__
    monkeypatch.setattr(_undisturbed.Kept, "__init__", lambda *given: entered.append(begin(*given)))
    measure(make(), samples(9))
    assert len(entered) == 1


@pytest.mark.parametrize("measure", [lmnfast.connectivity, lmnfast.jacobians, lmnfast.jacobian_distances])
def test_dtypes_that_do_not_fit_are_named_where_the_model_does_not_cast(measure):
    measure(Widening(True), samples(9))
    with pytest.raises(TypeError, match=r"'second.weight' is torch.float64; convert one of them"):
        measure(Widening(False), samples(9))


@pytest.mark.parametrize("method", METHODS)
def test_a_network_in_float32_may_give_float64(method):
    f, x = Widening(True), samples(12)
    x[1] = x[0] + 1e-6  # of such a path float32 resolves nothing
    L = lmnfast.connectivity(f, x, method=method)
    wide = nn.Sequential(f.first, nn.Tanh(), f.second).double()
    assert (L - lmnfast.connectivity(wide, x.double(), method=method)).abs().max() < 1e-5
