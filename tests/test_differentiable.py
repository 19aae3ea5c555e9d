"""Connectivities with a graph: values and gradients, against autograd through all paths in float64."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from graphs import DOUBLE, LOBATTO, assert_same_gradients, by_autograd, evaluated
from support import Residual, mlp, samples
from torch import Tensor, fx, nn

import lmnfast
from lmnfast._block import WIDE
from lmnfast._differentiable import with_graph
from lmnfast._settings import Settings


class Block(nn.Module):
    """A transformer's feed-forward block on tokens."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)


def closure() -> nn.Module:
    """A network behind a function that is no module; its tensors are found all the same."""
    net = nn.Sequential(mlp(6, 9, 5, seed=1), nn.Softmax(1))
    return lambda x: net(x) * net[0][0].bias[:5].exp()  # type: ignore[return-value]


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.Flatten(), nn.Linear(12, 5), nn.Softmax(1)
    )


def normalised_chain() -> nn.Module:
    """A chain whose weights are computed."""
    net = mlp(6, 9, 8, 5)
    nn.utils.parametrizations.weight_norm(net[2])
    return nn.Sequential(net, nn.BatchNorm1d(5))


# Networks with the shape of a sample, and the route that measures them.
NETWORKS = {
    "chain": (lambda: mlp(6, 9, 8, 4, activation=nn.Tanh), (6,), "fused"),
    "residual chain": (lambda: Residual(6, 4), (6,), "fused"),
    "chain with computed weights": (normalised_chain, (6,), "fused"),
    "chain with a wide last layer": (lambda: mlp(6, WIDE, WIDE), (6,), "block"),
    "chain that flattens": (
        lambda: nn.Sequential(nn.Flatten(), mlp(6, 9, 4, activation=nn.GELU)),
        (2, 3),
        "fused",
    ),
    "affine maps first": (
        lambda: fx.symbolic_trace(nn.Sequential(nn.Linear(6, 9), nn.Softmax(1), nn.Linear(9, 4))),
        (6,),
        "hoisted",
    ),
    "convolution": (convolution, (2, 4, 4), "generic"),
    "feed-forward block": (Block, (3, 6), "block"),
    "attention": (Attention, (3, 6), "generic"),
    "closure": (closure, (6,), "generic"),
}
STATISTICS = [{}, {"pooled": True}, {"stabiliser": 0.01}, {"pooled": True, "stabiliser": 0.01}]


def network(name: str):
    make, shape, kind = NETWORKS[name]
    torch.manual_seed(0)
    f = make()
    if isinstance(f, nn.Module):
        f = f.double()
        leaves = [p for p in f.parameters() if p.requires_grad]
    else:
        net = f.__closure__[0].cell_contents.double()
        leaves = list(net.parameters())
    return f, leaves, samples(8, *shape, dtype=DOUBLE), kind


@pytest.mark.parametrize("listed", [False, True], ids=["all pairs", "some pairs"])
@pytest.mark.parametrize("statistic", STATISTICS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_values_are_the_same_and_gradients_those_of_autograd(name, statistic, listed):
    f, leaves, x, kind = network(name)
    x.requires_grad_()
    settings = Settings("path", 7, "lobatto", **statistic)
    pairs = (torch.tensor([0, 2, 2, 5]), torch.tensor([1, 3, 6, 7])) if listed else None
    found = with_graph(f, x, settings, pairs=pairs)
    assert found.enqueued.kind == kind
    L = lmnfast.connectivity(f, x, **LOBATTO, **statistic)
    if pairs is None:
        assert torch.equal(found.entries, L)
    else:
        torch.testing.assert_close(found.entries, L[pairs], rtol=1e-12, atol=0)
    gradient = samples(*found.entries.shape, seed=3, dtype=DOUBLE)
    own = torch.autograd.grad((gradient * found.entries).sum(), [x, *leaves], materialize_grads=True)
    expected = by_autograd(evaluated(f), x, gradient, [x, *leaves], pairs, **statistic)
    assert_same_gradients(own, expected, 1e-10)


@pytest.mark.parametrize("name", ["chain", "closure"])
def test_float32_gradients_are_those_of_float64_to_rounding(name):
    f, leaves, x, _ = network(name)
    gradient = samples(8, 8, seed=3, dtype=DOUBLE)
    expected = by_autograd(f, x, gradient, leaves)
    for leaf in leaves:
        leaf.data = leaf.data.float()
    L = lmnfast.connectivity(f, x.float(), **LOBATTO, differentiable=True)
    own = torch.autograd.grad((gradient * L).sum(), leaves)
    assert {each.dtype for each in own} == {torch.float32}
    assert_same_gradients(own, expected, 1e-4)


@pytest.mark.parametrize("name", ["chain", "feed-forward block"])
def test_gradcheck(name):
    f, _, x, _ = network(name)
    assert torch.autograd.gradcheck(
        lambda x: lmnfast.connectivity(f, x, **LOBATTO, differentiable=True),
        x[:4].requires_grad_(),
        fast_mode=False,
    )

    def of_parameters(*tensors: Tensor) -> Tensor:
        given = dict(zip(dict(f.named_parameters()), tensors, strict=True))
        return lmnfast.curvature(
            lambda z: torch.func.functional_call(f, given, z), x[:5].detach(), **LOBATTO, differentiable=True
        )

    assert torch.autograd.gradcheck(of_parameters, [p.detach().requires_grad_() for p in f.parameters()])


@pytest.mark.parametrize("measure", ["lmn", "curvature", "complexity", "ratio"])
def test_numbers_have_their_values_and_finite_differences(measure):
    f, x = mlp(6, 9, 8, 4).double(), samples(12, 6, dtype=DOUBLE)

    def value(differentiable: bool):
        if measure == "lmn":
            return lmnfast.lmn(f, x, **LOBATTO, differentiable=differentiable)
        if measure == "curvature":
            generator = torch.Generator().manual_seed(1)
            return lmnfast.curvature(
                f, x, pairs=30, generator=generator, **LOBATTO, differentiable=differentiable
            )
        L = lmnfast.connectivity(f, x, **LOBATTO, differentiable=differentiable)
        of = lmnfast.nonlinear_complexity if measure == "complexity" else lmnfast.participation_ratio
        return of(L, differentiable=differentiable)

    own = value(True)
    assert own.dtype == DOUBLE and own.dim() == 0
    assert float(own.detach()) == pytest.approx(float(value(False)), rel=1e-12)
    own.backward()
    step, slope = 1e-6, 0.0
    for sign in (1, -1):
        with torch.no_grad():
            for p in f.parameters():
                p += sign * step * p.cos()
            slope += sign * float(value(False)) / (2 * step)
            for p in f.parameters():
                p -= sign * step * p.cos()
    assert sum(float((p.grad * p.detach().cos()).sum()) for p in f.parameters()) == pytest.approx(
        slope, rel=1e-6
    )


@pytest.mark.parametrize("name", ["chain", "feed-forward block"])
@pytest.mark.parametrize("pooled", [False, True])
def test_scaling_and_shifting_the_outputs_changes_nothing(name, pooled):
    """So a penalty is not paid by small outputs: its gradient is orthogonal to each row that makes an output."""
    f, _, x, _ = network(name)
    g = f if name == "chain" else nn.Sequential(f, nn.Flatten(), nn.Linear(18, 4).double())
    last = list(g.modules())[-1]
    lmnfast.curvature(g, x, pooled=pooled, differentiable=True).backward()
    weight, bias = last.weight.grad.clone(), last.bias.grad.clone()
    along = (weight * last.weight.detach()).sum(1)
    along = along.sum() if pooled else along  # pooled, a common scale alone changes nothing
    assert float(along.abs().max()) <= 1e-12 * float(weight.norm() * last.weight.detach().norm())
    assert float(bias.abs().max()) <= 1e-12 * float(weight.abs().max())
    with torch.no_grad():
        last.weight *= 3
        last.bias += 5
    g.zero_grad()
    lmnfast.curvature(g, x, pooled=pooled, differentiable=True).backward()
    torch.testing.assert_close(
        3 * last.weight.grad, weight, rtol=1e-9, atol=1e-12 * float(weight.abs().max())
    )


class Dead(nn.Module):
    """Outputs that are constant, dead, straight and bent."""

    def __init__(self, as_chain: bool) -> None:
        super().__init__()
        self.first, self.last, self.as_chain = nn.Linear(6, 8), nn.Linear(8, 5), as_chain
        with torch.no_grad():
            self.first.bias[:4] = -100.0  # dead
            self.first.bias[4:6] = 100.0  # straight
            self.last.weight[0] = 0.0
            self.last.weight[1, 4:] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(F.relu(self.first(x)))
        return y if self.as_chain else y + torch.zeros_like(y).cumsum(1)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("as_chain", [True, False])
@pytest.mark.parametrize("statistic", STATISTICS[:3], ids=str)
def test_constant_outputs_dead_units_and_equal_samples_have_finite_gradients(dtype, as_chain, statistic):
    torch.manual_seed(0)
    f = Dead(as_chain).to(dtype)
    x = samples(8, 6, dtype=dtype)
    x[3], x[4], x[5] = x[2], x[2] * (1 + 2 * torch.finfo(dtype).eps), x[2] + 1e-4
    x.requires_grad_()
    found = with_graph(f, x, Settings("path", 7, "lobatto", **statistic))
    assert (found.enqueued.kind == "fused") == as_chain
    assert torch.equal(found.entries, lmnfast.connectivity(f, x, **LOBATTO, **statistic))
    found.entries.sum().backward()
    for each in (x, *f.parameters()):
        assert each.grad.isfinite().all()
    assert statistic or not f.last.weight.grad[0].any()  # a constant output
    assert f.first.weight.grad[6:].any() and not f.first.weight.grad[:4].any()


def test_a_network_that_is_constant_has_gradients_of_zero():
    for f in (nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), nn.Sequential(nn.Linear(6, 3), nn.ReLU())):
        with torch.no_grad():
            f[0].weight.zero_()
        x = samples(5, 6).requires_grad_()
        lmnfast.curvature(f, x, differentiable=True).backward()
        assert not x.grad.any() and all(not p.grad.any() for p in f.parameters())


def test_close_samples_in_float32_are_differentiated_in_float64():
    """In float32 a path between them has few distinct points; the entry comes from float64, and so does the gradient."""
    f, leaves, x, _ = network("closure")
    x = x.float().double()
    x[1] = (x[0] + 5e-4 * x[2]).float()
    pairs = torch.tensor([0]), torch.tensor([1])
    for leaf in leaves:
        leaf.data = leaf.data.float().double()
    expected = by_autograd(f, x, torch.ones(1, dtype=DOUBLE), leaves, pairs)
    for leaf in leaves:
        leaf.data = leaf.data.float()
    found = with_graph(f, x.float(), Settings("path", 7, "lobatto"), pairs=pairs)
    assert_same_gradients(torch.autograd.grad(found.entries.sum(), leaves), expected, 1e-2)


def test_the_backward_pass_of_any_function_stays_within_the_budget():
    """Counted: all results of f for the rows of a call, and a gradient of each."""
    rows: list[int] = []
    net = nn.Sequential(nn.Linear(6, 50), nn.Softmax(1), nn.Linear(50, 3)).double()

    def f(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            rows.append(len(x))
        return net(x)

    x, budget = samples(40, 6, dtype=DOUBLE), 200_000
    lmnfast.curvature(f, x, **LOBATTO, budget=budget, differentiable=True).backward()
    a_row = 2 * 8 * (50 + 50 + 3)
    assert max(rows) * a_row <= budget < 780 * 5 * a_row
    assert len(rows) > 10 and max(rows) > 5


@pytest.mark.parametrize("name", ["chain", "feed-forward block"])
def test_gradients_have_the_same_bits_for_any_budget_and_in_every_call(name):
    f, leaves, x, _ = network(name)

    def once() -> tuple[Tensor, ...]:
        return torch.autograd.grad(lmnfast.curvature(f, x, differentiable=True), leaves)

    assert all(map(torch.equal, once(), once()))


def test_tensors_that_f_uses_are_found_wherever_they_are():
    """In a closure, computed before the call, shared by two layers, in a dict; and those that are frozen are left alone."""
    source, shared = (samples(6, 6, seed=seed, dtype=DOUBLE).requires_grad_() for seed in (1, 2))
    frozen = samples(6, 6, seed=3, dtype=DOUBLE)
    computed = source.sin()  # no leaf

    def f(x: Tensor) -> Tensor:
        return torch.softmax((x @ shared).tanh() @ shared @ frozen, 1) @ computed

    x, gradient = samples(7, 6, dtype=DOUBLE), samples(7, 7, seed=4, dtype=DOUBLE)
    L = lmnfast.connectivity(f, x, **LOBATTO, differentiable=True)
    own = torch.autograd.grad((gradient * L).sum(), [source, shared], retain_graph=True)
    assert_same_gradients(own, by_autograd(f, x, gradient, [source, shared]), 1e-10)
    (
        computed.sum() + (gradient * L).sum()
    ).backward()  # one backward pass through the captured tensor's own graph
    assert_same_gradients([source.grad - source.detach().cos(), shared.grad], own, 1e-10)


def test_a_chain_with_shared_and_frozen_weights():
    one = nn.Linear(6, 6).double()
    f = nn.Sequential(one, nn.Tanh(), one, nn.SiLU(), nn.Linear(6, 3).double().requires_grad_(False))
    x, gradient = samples(7, 6, dtype=DOUBLE), samples(7, 7, seed=4, dtype=DOUBLE)
    found = with_graph(f, x, Settings("path", 7, "lobatto"))
    assert found.enqueued.kind == "fused"
    own = torch.autograd.grad((gradient * found.entries).sum(), [one.weight, one.bias])
    assert_same_gradients(own, by_autograd(f, x, gradient, [one.weight, one.bias]), 1e-10)
    found = with_graph(f, x, Settings("path", 7, "lobatto"))
    found.entries.sum().backward()
    assert f[4].weight.grad is None


def test_hooks_of_parameters_see_the_whole_gradient_once():
    f, leaves, x, _ = network("closure")
    seen: list[Tensor] = []
    leaves[0].register_hook(lambda g: seen.append(g) or 3 * g)
    (expected,) = torch.autograd.grad(lmnfast.curvature(f, x, **LOBATTO, differentiable=True), leaves[1:2])
    seen.clear()
    lmnfast.curvature(f, x, **LOBATTO, differentiable=True, budget=1000).backward()
    assert len(seen) == 1 and torch.equal(leaves[0].grad, 3 * seen[0])
    torch.testing.assert_close(leaves[1].grad, expected, rtol=1e-10, atol=1e-14)


def test_a_compiled_function_has_the_gradients_of_its_original():
    f, leaves, x, _ = network("affine maps first")
    own = torch.autograd.grad(
        lmnfast.curvature(torch.compile(f, backend="eager"), x, **LOBATTO, differentiable=True), leaves
    )
    expected = torch.autograd.grad(lmnfast.curvature(f, x, **LOBATTO, differentiable=True), leaves)
    assert_same_gradients(own, expected, 1e-10)


def test_autocast_holds_in_the_backward_pass_as_in_the_forward_pass():
    dtypes: set[torch.dtype] = set()
    net = mlp(6, 9, 5)

    def f(x: Tensor) -> Tensor:
        y = net(x)
        dtypes.add(y.dtype)
        return torch.softmax(y.float(), 1)

    with torch.autocast("cpu", torch.bfloat16):
        c = lmnfast.curvature(f, samples(6, 6), **LOBATTO, differentiable=True)
    c.backward()
    assert dtypes == {torch.bfloat16} and net[0].weight.grad.dtype == torch.float32
    assert net[0].weight.grad.any() and net[0].weight.grad.isfinite().all()


def test_f_is_differentiated_in_eval_mode_and_left_as_it_was():
    f = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Softmax(1)).double().train()
    x, gradient = samples(8, 6, dtype=DOUBLE), samples(8, 8, seed=3, dtype=DOUBLE)
    f(x)
    before, rng = copy.deepcopy(f.state_dict()), torch.get_rng_state()
    L = lmnfast.connectivity(f, x, **LOBATTO, differentiable=True)
    own = torch.autograd.grad((gradient * L).sum(), list(f.parameters()))
    assert f.training and f[1].training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in f.state_dict().items())
    assert all(p.grad is None for p in f.parameters())
    assert_same_gradients(own, by_autograd(evaluated(f), x, gradient, list(f.parameters())), 1e-10)


def graph_of(kind: str) -> tuple[Tensor, nn.Module]:
    f = mlp(6, 9, 4) if kind == "chain" else nn.Sequential(mlp(6, 9, 4), nn.Softmax(1))
    return lmnfast.curvature(f, samples(6, 6), **LOBATTO, differentiable=True), f


@pytest.mark.parametrize("kind", ["chain", "function"])
def test_a_change_in_place_before_the_backward_pass_is_an_error(kind):
    c, f = graph_of(kind)
    with torch.no_grad():
        next(f.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        c.backward()


@pytest.mark.parametrize("kind", ["chain", "function"])
def test_there_is_no_second_derivative_and_no_second_pass(kind):
    c, f = graph_of(kind)
    (first,) = torch.autograd.grad(c, [next(f.parameters())], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    c, f = graph_of(kind)
    c.backward()
    with pytest.raises(RuntimeError, match="second time"):
        c.backward()


class Tails(nn.Module):
    """Something that depends on parameters alone goes around the layer. How it is cut depends on what its forward asks."""

    def __init__(self, asks: str) -> None:
        super().__init__()
        self.asks = asks
        self.layer, self.around, self.last = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 5)

    def around_layer(self) -> Tensor:
        return self.around(torch.ones(1, 3, dtype=DOUBLE)).exp()

    def behind(self, h: Tensor, around: Tensor) -> Tensor:
        return self.last(torch.softmax(h * around, -1)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        around = self.around_layer()
        h = self.layer(x)
        if self.asks == "class":
            assert type(h) is Tensor
        if self.asks == "values" and bool((h > 1e9).any()):
            h = -h
        return self.behind(h, around)


@pytest.mark.parametrize("asks", ["nothing", "class", "values"])
def test_tails_of_every_kind_have_the_gradients_of_the_model(asks):
    """Traced by torch.fx, written down as it runs, and the model with a hook."""
    torch.manual_seed(0)
    model, x = Tails(asks).double(), samples(7, 6, dtype=DOUBLE)
    tail, h = lmnfast.cut(model, "layer", x)
    assert (type(tail).__name__ == "HookTail") == (asks == "values")
    leaves = [*model.around.parameters(), *model.last.parameters()]
    gradient = samples(7, 7, seed=3, dtype=DOUBLE)
    L = lmnfast.connectivity(tail, h, **LOBATTO, differentiable=True)
    own = torch.autograd.grad((gradient * L).sum(), leaves)
    expected = by_autograd(lambda h: model.behind(h, model.around_layer()), h, gradient, leaves)
    assert_same_gradients(own, expected, 1e-10)


CHAIN, X = mlp(6, 9, 4), samples(6, 6)
FROZEN = mlp(6, 9, 4).requires_grad_(False)
ERRORS = {
    "method": (
        ValueError,
        "method 'path'",
        lambda: lmnfast.connectivity(CHAIN, X, method="hermite", differentiable=True),
    ),
    "stacked": (
        ValueError,
        "without stacked",
        lambda: lmnfast.lmn(CHAIN, X, stacked=torch.func.stack_module_state([CHAIN]), differentiable=True),
    ),
    "frozen": (RuntimeError, "no graph", lambda: lmnfast.lmn(FROZEN, X, differentiable=True)),
    "frozen function": (
        RuntimeError,
        "no graph",
        lambda: lmnfast.lmn(lambda x: torch.softmax(FROZEN(x), 1), X, differentiable=True),
    ),
    "detached": (
        RuntimeError,
        "no grad_fn",
        lambda: lmnfast.curvature(
            lambda x: CHAIN(x).detach(), X.clone().requires_grad_(), differentiable=True
        ),
    ),
    "one sample": (ValueError, "two samples", lambda: lmnfast.curvature(CHAIN, X[:1], differentiable=True)),
    "no pairs": (
        ValueError,
        "pairs: expected 2",
        lambda: lmnfast.curvature(CHAIN, X, pairs=0, differentiable=True),
    ),
    "L": (
        RuntimeError,
        "does not require grad",
        lambda: lmnfast.participation_ratio(torch.eye(3), differentiable=True),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_has_no_gradient_is_an_error(name):
    error, message, call = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_gradients_must_be_on():
    L = lmnfast.connectivity(CHAIN, X, differentiable=True)
    for off, call in itertools.product(
        (torch.no_grad, torch.inference_mode),
        (
            lambda: lmnfast.connectivity(CHAIN, X, differentiable=True),
            lambda: lmnfast.nonlinear_complexity(L, differentiable=True),
        ),
    ):
        with off(), pytest.raises(RuntimeError, match="gradients"):
            call()


def test_a_chain_with_a_region_without_gradients_is_differentiated_as_it_is():
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(6, 9, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.net[0](x)
            return self.net[2](self.net[1](h))

    f, x = Region().double(), samples(6, 6, dtype=DOUBLE)
    L = lmnfast.connectivity(f, x, differentiable=True)
    L.sum().backward()
    assert f.net[0].weight.grad is None and f.net[2].weight.grad.any()  # as autograd has it
