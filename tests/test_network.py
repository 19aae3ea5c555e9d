"""Cutting a network at a layer, and recognising what follows as a chain."""

import itertools
import operator
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import prune

from lmnfast._chain import ACTIVATIONS, Activation, Chain
from lmnfast._connectivity import connectivity
from lmnfast._enqueue import enqueue
from lmnfast._recognise import recognise
from lmnfast._settings import Settings
from lmnfast._undisturbed import evaluating
from lmnfast.cutting import cut


class Steps(nn.Module):
    """Applies modules and functions one after the other, as a hand-written forward does."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class FunctionalLinear(nn.Module):
    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


class Network(nn.Module):
    """The paper's shape: tokens, an embedding, two hidden layers, with all that training needs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(8, 10)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(10, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, tokens, return_hidden=False):
        h = self.drop(self.act(self.hidden(self.embedding(tokens).flatten(1))))
        if return_hidden:
            return h
        return self.out(F.dropout(F.silu(self.second(h)), training=self.training))


TOKENS = torch.arange(14).remainder(7).reshape(7, 2)

SPELLINGS = [
    (Activation("relu"), nn.ReLU()),
    (Activation("relu"), nn.ReLU(inplace=True)),
    (Activation("relu"), F.relu),
    (Activation("relu"), lambda h: F.relu(h, inplace=True)),
    (Activation("relu"), F.relu_),
    (Activation("relu"), torch.relu),
    (Activation("relu"), lambda h: h.relu()),
    (Activation("relu"), lambda h: h.relu_()),
    (Activation("leaky_relu", 0.01), nn.LeakyReLU()),
    (Activation("leaky_relu", 0.3), nn.LeakyReLU(0.3, inplace=True)),
    (Activation("leaky_relu", 0.01), F.leaky_relu),
    (Activation("leaky_relu", 0.2), lambda h: F.leaky_relu(h, 0.2)),
    (Activation("leaky_relu", 0.2), lambda h: F.leaky_relu(input=h, negative_slope=0.2, inplace=True)),
    (Activation("leaky_relu", 0.2), lambda h: F.leaky_relu_(h, 0.2)),
    (Activation("elu", 1.0), nn.ELU()),
    (Activation("elu", 0.5), nn.ELU(0.5)),
    (Activation("elu", 1.0), F.elu),
    (Activation("elu", 0.5), lambda h: F.elu(h, alpha=0.5)),
    (Activation("elu", 0.5), lambda h: F.elu_(h, 0.5)),
    (Activation("silu"), nn.SiLU()),
    (Activation("silu"), F.silu),
    (Activation("silu"), lambda h: F.silu(h, True)),
    (Activation("gelu"), nn.GELU()),
    (Activation("gelu"), F.gelu),
    (Activation("gelu_tanh"), nn.GELU(approximate="tanh")),
    (Activation("gelu_tanh"), lambda h: F.gelu(h, approximate="tanh")),
    (Activation("tanh"), nn.Tanh()),
    (Activation("tanh"), F.tanh),
    (Activation("tanh"), torch.tanh),
    (Activation("tanh"), lambda h: h.tanh_()),
    (Activation("sigmoid"), nn.Sigmoid()),
    (Activation("sigmoid"), F.sigmoid),
    (Activation("sigmoid"), torch.sigmoid),
    (Activation("sigmoid"), lambda h: h.sigmoid()),
    (Activation("softplus", 1.0, 20.0), nn.Softplus()),
    (Activation("softplus", 2.0, 3.0), nn.Softplus(2, 3)),
    (Activation("softplus", 1.0, 20.0), F.softplus),
    (Activation("softplus", 2.0, 3.0), lambda h: F.softplus(h, 2, threshold=3)),
    (Activation("sin"), torch.sin),
    (Activation("sin"), lambda h: h.sin()),
]
FILLERS = [
    nn.Identity(),
    nn.Dropout(0.5),
    nn.AlphaDropout(0.5),
    nn.Flatten(),
    lambda h: h.flatten(1),
    lambda h: torch.flatten(h, start_dim=1),
    lambda h: h.contiguous(),
    lambda h: F.dropout(h, 0.5, training=False),
    lambda h: F.dropout(h, p=0.0),
]


def weight_normed(inputs, outputs, bias):
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(inputs, outputs, bias=bias))


def batch_norm(width, bias):
    norm = nn.BatchNorm1d(width, affine=bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 2)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def normed_after(inputs, outputs, bias):
    return nn.Sequential(nn.Linear(inputs, outputs, bias=bias), batch_norm(outputs, bias))


def normed_before(inputs, outputs, bias):
    return nn.Sequential(batch_norm(inputs, not bias), nn.Linear(inputs, outputs, bias=bias))


LINEARS = [nn.Linear, FunctionalLinear, weight_normed, normed_after, normed_before]


@pytest.mark.parametrize(("activation", "spelling"), SPELLINGS)
def test_every_spelling_of_an_activation_is_recognised(activation, spelling):
    model = Steps(nn.Linear(3, 4), spelling, nn.Linear(4, 2))
    chain = recognise(model)
    assert chain.activations == (Activation("identity"), activation, Activation("identity"))
    x = 4 * torch.randn(50, 3)
    torch.testing.assert_close(chain(x), model(x).detach())


def test_the_spellings_cover_every_activation():
    assert {activation.name for activation, _ in SPELLINGS} == set(ACTIVATIONS) - {"identity"}


class Added(nn.Module):
    """A residual block: the sum, by some spelling, of its input and of what a block makes of it."""

    def __init__(self, block, add=operator.add):
        super().__init__()
        self.block, self.add = block, add

    def forward(self, h):
        return self.add(h, self.block(h))


ADDITIONS = {
    "h + block(h)": operator.add,
    "block(h) + h": lambda h, block: block + h,
    "torch.add": torch.add,
    "torch.add by keyword": lambda h, block: torch.add(other=h, input=block),
    "method": lambda h, block: h.add(block),
    "h += block(h)": operator.iadd,
    "block(h) += h": lambda h, block: operator.iadd(block, h),
    "in place": lambda h, block: block.add_(h),
    "in place, of the skip": lambda h, block: h.add_(block),
    "copy of the skip": lambda h, block: h.clone() + block,
    "dropout on the skip": lambda h, block: F.dropout(h, training=False) + block,
    "dropout on the block": lambda h, block: h + F.dropout(block, training=False).contiguous(),
    "flattened block": lambda h, block: h + block.flatten(1),
}


@st.composite
def chains(draw, residual=False):
    """(model, input width): linear maps of random shape and form, at most one activation after each, and residual blocks
    between."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    widths = draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))
    fillers = st.lists(st.sampled_from(FILLERS), max_size=2)
    activations = st.lists(st.sampled_from([spelling for _, spelling in SPELLINGS]), max_size=1)
    # A first activation may not work in place here: it would change the caller's input.
    steps = draw(st.sampled_from([[], [], [torch.sin], [nn.GELU()]]))
    for inputs, outputs in itertools.pairwise(widths):
        linear = draw(st.sampled_from(LINEARS))
        steps = [
            *steps,
            *draw(fillers),
            linear(inputs, outputs, bias=draw(st.booleans())),
            *draw(fillers),
            *draw(activations),
            *draw(fillers),
        ]
        for _ in range(draw(st.integers(0, 2)) if residual else 0):
            inner, add = draw(st.integers(1, 7)), draw(st.sampled_from(list(ADDITIONS.values())))
            shallow = draw(st.booleans())
            block = [linear(outputs, outputs, bias=draw(st.booleans())), *draw(fillers), *draw(activations)]
            if not shallow:
                block = [
                    linear(outputs, inner, bias=draw(st.booleans())),
                    *draw(activations),
                    draw(st.sampled_from(LINEARS))(inner, outputs, bias=draw(st.booleans())),
                    *draw(fillers),
                ]
            steps += [Added(Steps(*block), add), *draw(fillers), *([] if shallow else draw(activations))]
    model = Steps(*steps).double()
    return (nn.Sequential(nn.Identity(), model) if draw(st.booleans()) else model), widths[0]


@settings(max_examples=60, deadline=None)
@given(chains(residual=True))
def test_a_recognised_chain_agrees_with_the_network(case):
    model, width = case
    chain = recognise(model)
    assert chain is not None
    model.eval()
    x = 3 * torch.randn(20, width, dtype=torch.float64)
    torch.testing.assert_close(chain(x), model(x).detach(), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(chains(residual=True))
def test_the_connectivity_of_a_chain_is_that_of_the_network(case):
    """The fused route and the generic one, both in float64: what float32 loses of a small bump depends on the network."""
    model, width = case
    x = 2 * torch.randn(9, width, dtype=torch.float64)
    # Not by connectivity, which warns where a drawn network hides its outputs beside an offset.
    fused, generic = enqueue(model, x).L, enqueue(model, x, fuse=False).L
    assert recognise(model) is not None and (fused - generic).abs().max() < 1e-7


@settings(max_examples=25, deadline=None)
@given(chains(), st.data())
def test_every_tail_of_a_chain_gives_the_networks_output_and_is_recognised(case, data):
    model, width = case
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm1d)]
    # Between a Linear and its batch norm is no place of a chain: an activation may follow the latter.
    torn = {f"{name.rpartition('.')[0]}.0" for name in norms if name.endswith(".1")}
    names = [
        name
        for name, _ in model.named_modules()
        if "parts." in name and "parametrizations" not in name and name not in torn
    ]
    layer = data.draw(st.sampled_from(names))
    x = 3 * torch.randn(20, width, dtype=torch.float64)
    try:
        tail, samples = cut(model, layer, x)
    except ValueError:  # a filler is one module, so one that is drawn twice is called twice
        assert (
            sum(
                step is model.get_submodule(layer)
                for m in model.modules()
                if isinstance(m, Steps)
                for step in m.steps
            )
            > 1
        )
        return
    model.eval()
    expected = model(x).detach()
    torch.testing.assert_close(tail(samples).detach(), expected, rtol=1e-12, atol=1e-12)
    chain = recognise(tail)
    if chain is not None:
        torch.testing.assert_close(chain(samples), expected, rtol=1e-12, atol=1e-12)
    else:
        assert not any(isinstance(m, (nn.Linear, FunctionalLinear)) for m in tail.modules())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.first(x)
        return h + self.second(F.relu(h))


class HiddenInPlace(nn.Module):
    """relu_ changes h, though nothing uses what it returns."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.first(x)
        F.relu_(h)
        return self.second(h)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        return self.first(x) if x.sum() > 0 else x


class TransposedWeight(FunctionalLinear):
    def forward(self, x):
        return F.linear(x, self.weight.t())


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return F.linear(x, y)


class TwoOutputs(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(self.out_features)


def with_hook(kind, path):
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    getattr(model.get_submodule(path), f"register_{kind}")(lambda module, *args: None)
    return model


def own_forward():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model[0].forward = lambda x: x
    return model


def own_forward_traced():
    model = fx.symbolic_trace(nn.Linear(3, 3))
    model.forward = lambda x: x
    return model


def hooked_traced():
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))
    model.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def pruned():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


class Tangled(nn.Module):
    """A forward of three Linear layers that is given as a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))
        self.shift = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.function(self, self.first(x))


def residual(add=operator.add, block=None):
    block = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)) if block is None else block
    return nn.Sequential(nn.Linear(3, 3), Added(block, add), nn.Linear(3, 2))


NO_CHAINS = {
    "two activations in a row": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Tanh()),
    "two activations before the first weight": lambda: nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Linear(3, 3)),
    "no weight": lambda: nn.Sequential(nn.ReLU()),
    "in place, result unused": HiddenInPlace,
    "branch on data": Branching,
    "computed weight": lambda: TransposedWeight(3, 3),
    "two inputs": TwoInputs,
    "two outputs": lambda: TwoOutputs(3, 3),
    "noise": lambda: Noisy(3, 3),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
    "batch norm after an activation": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3)),
    "batch norm before an activation": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)),
    "batch norm of the batch": lambda: nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)
    ),
    "parametric relu": lambda: nn.Sequential(nn.Linear(3, 3), nn.PReLU()),
    "softmax": lambda: Steps(nn.Linear(3, 3), lambda h: h.softmax(-1)),
    "scaling": lambda: Steps(nn.Linear(3, 3), lambda h: 2 * h),
    "clamped relu": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU6()),
    "bilinear": lambda: Steps(nn.Linear(3, 3), lambda h: h * h),
    "flattened batch": lambda: Steps(nn.Linear(3, 3), lambda h: h.flatten()),
    "dropout that stays on": lambda: Steps(nn.Linear(3, 3), F.dropout),
    "unfitting widths": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 3)),
    "mixed dtypes": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double()),
    "complex weights": lambda: nn.Linear(3, 3, dtype=torch.complex64),
    "lazy weights": lambda: nn.LazyLinear(3),
    "hook on a layer": lambda: with_hook("forward_hook", "1"),
    "pre-hook on a layer": lambda: with_hook("forward_pre_hook", "0.0"),
    "hook on a container": lambda: with_hook("forward_hook", "0"),
    "hook on the root": lambda: with_hook("forward_hook", ""),
    "pruned by a hook": pruned,
    "sum of a result with itself": lambda: Steps(nn.Linear(3, 3), lambda h: h + h),
    "sum with a number": lambda: Steps(nn.Linear(3, 3), lambda h: h + 1),
    "sum with a parameter": lambda: Tangled(lambda m, h: h + m.shift),
    "scaled sum": lambda: residual(lambda h, block: torch.add(h, block, alpha=2)),
    "difference": lambda: residual(operator.sub),
    "gate": lambda: residual(operator.mul),
    "sum of three": lambda: residual(lambda h, block: h + block + h),
    "two branches": lambda: Tangled(lambda m, h: m.second(h) + m.third(h)),
    "projected skip": lambda: Tangled(lambda m, h: m.second(h) + m.third(torch.relu(h))),
    "sum that broadcasts": lambda: Added(nn.Linear(3, 1)),
    "sum across a flatten": lambda: Added(nn.Sequential(nn.Flatten(), nn.Linear(3, 3))),
    "sum with what relu_ has changed": lambda: residual(block=Steps(F.relu_, nn.Linear(3, 3))),
    "sum with what relu_ has changed by a view": lambda: residual(
        block=Steps(nn.Flatten(), F.relu_, nn.Linear(3, 3))
    ),
    "sum with what an inplace ReLU has changed": lambda: residual(
        block=nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    ),
    "sum with what a sum in place has changed": lambda: Tangled(
        lambda m, h: m.third(torch.relu(h.add_(m.second(h)))) + h
    ),
    "sum in place with what is used again": lambda: Tangled(
        lambda m, h: m.third(torch.relu(operator.iadd(m.second(h), h))) + h.relu_()
    ),
    "term of a sum used again": lambda: Tangled(
        lambda m, h: (lambda term: m.third(torch.relu(term + h)) + term)(m.second(h))
    ),
    "activation of an earlier result": lambda: Tangled(lambda m, h: m.second(torch.relu(h)) + torch.tanh(h)),
    "sum with what is before a batch norm": lambda: Added(
        nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    ),
    "batch norm between a sum and an activation": lambda: nn.Sequential(
        Added(nn.Linear(3, 3)), nn.BatchNorm1d(3), nn.ReLU()
    ),
    "activation after an activated sum": lambda: nn.Sequential(
        Added(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), nn.Tanh()
    ),
    "layer norm in a block": lambda: residual(block=nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))),
    "a forward of its own": own_forward,
    "a graph module with a forward of its own": own_forward_traced,
    "a graph module with a hook": hooked_traced,
}


@pytest.mark.parametrize("case", NO_CHAINS)
def test_what_is_no_chain_is_not_recognised(case):
    assert recognise(NO_CHAINS[case]()) is None


@pytest.mark.parametrize("add", ADDITIONS)
def test_every_spelling_of_a_sum_is_recognised(add):
    model, x = residual(ADDITIONS[add]), torch.randn(20, 3)
    chain = recognise(model)
    assert chain.skips == ((6, 2),)
    torch.testing.assert_close(chain(x), model(x).detach())


def linears(activation):
    return Steps(nn.Linear(3, 4), activation, nn.Linear(4, 3))


# A block, and what is added to what where it is there twice.
BLOCKS = {
    "act(h + block(h))": (
        lambda: nn.Sequential(Added(linears(torch.tanh)), nn.ReLU(inplace=True)),
        ((4, 0), (8, 5)),
    ),
    "h + W act(h)": (lambda: Added(Steps(F.silu, nn.Linear(3, 3))), ((2, 0), (4, 2))),
    "h + W act(W act(h))": (lambda: Added(Steps(F.gelu, linears(torch.relu))), ((4, 0), (8, 4))),
    "h + act(W h)": (lambda: Added(Steps(nn.Linear(3, 3), F.silu)), ((3, 0), (5, 3))),
    "h + block(h)": (lambda: Added(linears(nn.ReLU(inplace=True))), ((4, 0), (8, 4))),
    "one in another": (
        lambda: Added(Steps(nn.Linear(3, 3), torch.tanh, Added(linears(F.gelu)), F.gelu, nn.Linear(3, 3))),
        ((6, 3), (8, 0), (14, 11), (16, 8)),
    ),
    "between batch norms": (
        lambda: Added(nn.Sequential(normed_before(3, 4, True), nn.SiLU(), normed_after(4, 3, False))),
        ((4, 0), (8, 4)),
    ),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_residual_blocks_are_recognised_and_measured_as_the_network(block):
    make, skips = BLOCKS[block]
    torch.manual_seed(0)
    model = nn.Sequential(make(), make(), nn.Linear(3, 2)).double().eval()
    x = 2 * torch.randn(15, 3, dtype=torch.float64)
    chain = recognise(model)
    assert chain.skips == skips
    torch.testing.assert_close(chain(x), model(x).detach())
    for method in ("path", "hermite", "hermite-midpoint"):
        L = connectivity(model, x, method=method)
        assert (L - enqueue(model, x, Settings(method), fuse=False).L).abs().max() < 1e-9 and L.min() < 0.99


def test_a_batch_norm_is_not_taken_into_what_is_added_later():
    model = Steps(nn.Linear(3, 3), Added(normed_before(3, 3, False)), batch_norm(3, True), nn.Linear(3, 2))
    chain, x = recognise(model), torch.randn(20, 3)
    assert chain.skips == ((4, 2),)
    torch.testing.assert_close(chain(x), model.eval()(x).detach(), rtol=1e-5, atol=1e-5)


def aliased(m, h):
    """x += y changes what another name has; to torch.fx it makes a new value."""
    before = h
    h += m.second(F.silu(h))
    return m.third(F.silu(h)) + before


def test_a_sum_that_a_trace_shows_wrongly_is_not_used():
    model, x = Tangled(aliased), torch.randn(12, 3)
    assert (recognise(model)(x) - model(x)).abs().max() > 0.01
    assert torch.equal(connectivity(model, x), enqueue(model, x, fuse=False).L)
    tail, samples = cut(nn.Sequential(nn.Identity(), model), "0", x)
    assert recognise(tail) is None and torch.equal(tail(samples), model(x))


def test_functions_are_not_traced():
    linear = nn.Linear(3, 3)
    assert recognise(lambda x: linear(x)) is None
    assert recognise(linear.forward) is None


def test_a_global_hook_prevents_recognition():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: 2 * output)
    try:
        assert recognise(nn.Linear(3, 3)) is None
    finally:
        handle.remove()


def test_hooks_are_not_run_on_proxies():
    seen = []
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert recognise(model) is None and seen == []
    tail, _ = cut(model, "0", torch.randn(5, 3))
    assert recognise(tail) is not None
    assert all(isinstance(value, torch.Tensor) for value in seen)


def test_default_arguments_keep_their_values():
    chain = recognise(fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    assert chain.activations[1] == Activation("relu")
    tail, _ = cut(Network(), "embedding", TOKENS)
    assert recognise(tail).activations == tuple(map(Activation, ("identity", "relu", "silu", "identity")))


def test_chain_weights_are_detached_and_follow_training():
    model = nn.Linear(3, 2)
    chain = recognise(model)
    assert not chain.weights[0].requires_grad and not chain.biases[0].requires_grad
    with torch.no_grad():
        model.weight.fill_(5.0)
    assert (chain.weights[0] == 5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_chains_of_every_real_dtype_are_recognised(dtype):
    assert recognise(nn.Linear(3, 2, dtype=dtype)).weights[0].dtype == dtype


def test_a_chain_refuses_samples_of_another_width():
    chain = recognise(nn.Linear(3, 2))
    assert chain(torch.zeros(5, 3, 1)).shape == (5, 2)
    assert chain(torch.zeros(0, 3)).shape == (0, 2)
    with pytest.raises(ValueError, match=r"x: expected samples of 3 elements, got shape \(5, 4, 3\)"):
        chain(torch.zeros(5, 4, 3))


def test_flattens_tells_whether_flattening_comes_before_the_first_weight():
    assert recognise(nn.Sequential(nn.Flatten(), nn.Linear(3, 2))).flattens
    assert not recognise(nn.Sequential(nn.Linear(3, 2), nn.Flatten())).flattens


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="name: expected one of identity, relu, .*, sin, got 'swish'"):
        Activation("swish")


@pytest.mark.parametrize("layer", ["embedding", "hidden", "act", "drop", "second", "out"])
def test_the_tail_of_every_layer_gives_the_networks_output(layer):
    model = Network()
    tail, samples = cut(model, layer, TOKENS)
    assert isinstance(tail, fx.GraphModule) and not samples.requires_grad
    with evaluating(model):
        before = samples.clone()
        assert torch.equal(tail(samples), model(TOKENS))
        assert torch.equal(samples, before), "an in-place layer reached the samples"
    expected = {"embedding": 3, "hidden": 2, "act": 2, "drop": 2, "second": 1, "out": 0}[layer]
    chain = recognise(tail)
    assert (0 if chain is None else len(chain.weights)) == expected


def test_samples_are_the_layers_output_before_anything_works_on_it_in_place():
    model = Network()
    _, samples = cut(model, "hidden", TOKENS)
    with torch.no_grad():
        assert torch.equal(samples, model.hidden(model.embedding(TOKENS).flatten(1)))
    assert (samples < 0).any()


def test_a_tail_follows_training():
    model = Network().eval()
    tail, samples = cut(model, "second", TOKENS)
    with torch.no_grad():
        model.out.weight.mul_(2)
        model.out.bias.zero_()
        assert torch.equal(tail(samples), model(TOKENS))
    assert {id(p) for p in tail.parameters()} == {id(p) for p in model.out.parameters()}


def test_what_is_computed_from_parameters_alone_belongs_to_the_tail():
    model = Steps(nn.Linear(3, 3), TransposedWeight(3, 3))
    x = torch.randn(5, 3)
    tail, samples = cut(model, "parts.0", x)
    assert isinstance(tail, fx.GraphModule)
    assert [id(p) for p in tail.parameters()] == [id(model.parts[1].weight)]
    with torch.no_grad():
        model.parts[1].weight.mul_(2)
        assert torch.equal(tail(samples), model(x))


def test_a_container_can_be_cut_at():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2))
    tail, samples = cut(model, "0", torch.randn(5, 3))
    assert len(recognise(tail).weights) == 1
    assert (samples >= 0).all()


class Untraceable(nn.Module):
    """A loop over data, which torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, scale=None):
        h = self.first(x)
        for _ in range(int((x[0, 0] > 1e9).item()) + 2):
            h = F.tanh(h)
        h = self.second(h)
        return h if scale is None else h * scale


def test_what_cannot_be_traced_runs_with_a_hook():
    model = Untraceable()
    x = torch.randn(5, 3)
    tail, samples = cut(model, "first", x)
    assert not isinstance(tail, fx.GraphModule) and recognise(tail) is None
    with torch.no_grad():
        assert torch.equal(tail(samples), model(x))
        other = torch.randn(9, 4)
        assert torch.equal(tail(other), model.second(other.tanh().tanh()))
    assert not model.first._forward_hooks


class TakesTracedForOther(nn.Module):
    """What torch.fx sees is not what runs: its stand-ins are no tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        return self.second(h.sigmoid() if isinstance(h, torch.Tensor) else h)


def test_a_trace_that_differs_from_the_model_is_not_used():
    model = TakesTracedForOther()
    x = torch.randn(5, 3)
    tail, samples = cut(model, "first", x)
    assert recognise(tail) is None
    with torch.no_grad():
        assert torch.equal(tail(samples), model(x))


def test_a_hook_tail_does_not_change_its_samples():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), Untraceable())
    tail, samples = cut(model, "0", torch.randn(50, 3))
    assert not isinstance(tail, fx.GraphModule)
    assert (samples < 0).any()


def test_both_kinds_of_tail_agree():
    class Traceable(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.second(self.model.first(x).tanh().tanh())

    model = Untraceable()
    x = torch.randn(5, 3)
    traced, _ = cut(Traceable(model), "model.first", x)
    hooked, _ = cut(model, "first", x)
    assert type(traced) is not type(hooked)
    points = torch.randn(30, 4)
    torch.testing.assert_close(traced(points), hooked(points))


def test_several_inputs_are_passed_as_positional_arguments():
    model = Untraceable().eval()
    x, scale = torch.randn(5, 3), torch.rand(5, 1)
    with pytest.raises(ValueError, match="layer: the model's output depends on the inputs also by"):
        cut(model, "first", (x, scale))
    tail, samples = cut(model, "first", (x, torch.tensor(3.0)))
    assert torch.equal(tail(samples), model(x, torch.tensor(3.0)))

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.second(self.first(x + y))

    tail, samples = cut(Sum(), "first", [x, x])
    assert len(recognise(tail).weights) == 1 and samples.shape == (5, 4)


def test_a_skip_connection_around_the_layer_is_refused():
    with pytest.raises(ValueError, match="depends on the inputs also by another way than through 'second'"):
        cut(Residual(), "second", torch.randn(5, 3))
    tail, _ = cut(Residual(), "first", torch.randn(5, 3))  # the skip starts there: all passes through
    assert isinstance(tail, fx.GraphModule)


def test_work_in_place_that_the_graph_does_not_show_is_not_lost():
    model = HiddenInPlace()
    x = torch.randn(5, 3)
    tail, samples = cut(model, "first", x)
    with torch.no_grad():
        assert torch.equal(tail(samples), model(x))


# What shares memory with a layer's output: h is the layer's input.
ALIASES = {
    "skip from before": lambda m, z, h: m.third(m.second(z) + h),
    "view from before": lambda m, z, h: m.third(m.second(z)) + h.view(-1, 3)[:, :3],
    "worked on in place": lambda m, z, h: m.third(torch.tanh(h) + z.mul_(2)),
    "sum in place": lambda m, z, h: (operator.iadd(z, 1), m.third(torch.tanh(h)))[1],
    "result not used": lambda m, z, h: m.third(torch.tanh(m.second(h))),
}


class Aliasing(Tangled):
    def __init__(self, function, layer):
        super().__init__(function)
        self.layer = layer

    def forward(self, x):
        h = self.first(x)
        return self.function(self, self.layer(h), h)


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.5), nn.Flatten()])
def test_what_shares_memory_with_a_layers_output_passes_through_it(layer, alias):
    torch.manual_seed(0)
    model = Aliasing(ALIASES[alias], layer).eval()
    x = 2 * torch.randn(8, 3)
    tail, samples = cut(model, "layer", x)
    points = torch.rand(11, 3)
    before = points.clone()
    with torch.no_grad():
        torch.testing.assert_close(tail(samples), model(x))
        expected = model.function(model, *[points.clone()] * 2)
        torch.testing.assert_close(tail(points), expected)
    assert torch.equal(points, before)
    for method in ("path", "hermite"):
        truth = enqueue(lambda z: model.function(model, *[z.clone()] * 2), samples, Settings(method)).L
        assert (connectivity(tail, samples, method=method) - truth).abs().max() < 1e-5
    with pytest.raises(ValueError, match="also by another way than through 'layer'"):
        cut(Aliasing(ALIASES[alias], nn.Tanh()), "layer", x)


def test_a_parameter_that_a_layer_hands_on_is_not_written_to():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Parameter(torch.randn(5, 3)), nn.Identity()

        def forward(self, x):
            return torch.tanh(self.layer(self.table) + x) + self.table

    model = Own()
    before, version = model.table.clone(), model.table._version
    with pytest.raises(ValueError, match="also by another way than through 'layer'"):
        cut(model, "layer", torch.randn(5, 3))
    assert torch.equal(model.table, before) and model.table._version == version


def test_a_traced_tail_can_be_pickled():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    tail, samples = cut(model, "0", torch.randn(5, 3))
    again = pickle.loads(pickle.dumps(tail))
    assert torch.equal(again(samples), tail(samples)) and recognise(again) is not None


def test_attention_takes_its_fast_path_again_when_the_last_measurement_is_over():
    enabled = torch.backends.mha.get_fastpath_enabled
    assert enabled()
    with evaluating():
        with evaluating():
            assert not enabled()
        assert not enabled()
    assert enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating():
            pass
        assert not enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_layer_that_does_not_exist_is_refused_with_those_that_do():
    message = "layer: 'hiden' is not in the model; it has hidden, embedding, act, drop, second, out"
    with pytest.raises(ValueError, match="layer: '17' is not in the model; it has 1, 0, 2$"):
        cut(nn.Sequential(*[nn.Identity() for _ in range(3)]), "17", TOKENS)
    with pytest.raises(ValueError, match="layer: 'x' is not in the model; it has 0, 1, .*, 19 and 5 more$"):
        cut(nn.Sequential(*[nn.Identity() for _ in range(25)]), "x", TOKENS)
    with pytest.raises(ValueError, match=message):
        cut(Network(), "hiden", TOKENS)
    with pytest.raises(ValueError, match="layer: '' is not in the model"):
        cut(Network(), "", TOKENS)
    with pytest.raises(TypeError, match="layer: expected a name, got int"):
        cut(Network(), 0, TOKENS)


def test_a_layer_called_never_or_twice_is_refused():
    shared = nn.Linear(3, 3)
    model = Steps(shared, torch.relu, shared)
    with pytest.raises(
        ValueError, match="layer: 'parts.0' was called 2 times in one forward pass; expected once; which call"
    ):
        cut(model, "parts.0", torch.randn(5, 3))
    with pytest.raises(ValueError, match="layer: 'parts' was called 0 times"):
        cut(model, "parts", torch.randn(5, 3))


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (lambda h: (h.long(), 1), TypeError, "layer: the output of 'parts.1' is tuple; expected a floating"),
        (lambda h: h.long(), TypeError, r"layer: the output of 'parts.1' is a tensor of torch\.int64"),
        (lambda h: h.flatten(), ValueError, r"layer: the output of 'parts.1' has shape \(15,\) for 5 inputs"),
    ],
)
def test_a_layer_whose_output_is_no_batch_of_samples_is_refused(step, error, message):
    model = Steps(nn.Linear(3, 3), Steps(step), lambda h: torch.zeros(5, 1))
    with pytest.raises(error, match=message):
        cut(model, "parts.1", torch.randn(5, 3))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("text", TypeError, "inputs: expected a tensor, or a tuple or a dict of tensors, got str"),
        ((), TypeError, "inputs: expected a tensor, or a tuple or a dict of tensors, got nothing"),
        (torch.zeros(0, 3), ValueError, r"inputs: expected at least one sample, got shape \(0, 3\)"),
        (torch.tensor(1.0), ValueError, r"inputs: expected at least one sample, got shape \(\)"),
    ],
)
def test_inputs_that_are_no_samples_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        cut(nn.Sequential(nn.Linear(3, 3)), "0", inputs)


def test_models_that_return_no_tensor_are_refused():
    with pytest.raises(TypeError, match="model: its output is tuple; expected a floating-point tensor"):
        cut(nn.Sequential(nn.Identity(), TwoOutputs(3, 3)), "0", torch.randn(5, 3))
    with pytest.raises(TypeError, match="model: expected an nn.Module, got function"):
        cut(lambda x: x, "0", torch.randn(5, 3))


def test_inputs_that_require_grad_are_taken_and_nothing_returned_does():
    x = torch.randn(5, 3, requires_grad=True)
    for model in (Untraceable(), nn.Sequential(nn.Linear(3, 3), nn.ReLU())):
        _, samples = cut(model, next(model.named_children())[0], x)
        assert not samples.requires_grad
    assert x.grad is None


def test_inputs_that_the_model_would_change_in_place_are_kept():
    x = torch.randn(5, 3)
    before = x.clone()
    cut(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), "1", x)
    cut(Steps(nn.ReLU(inplace=True), Untraceable()), "parts.1.first", x)
    assert torch.equal(x, before)


def test_compiled_models_are_cut_under_the_names_of_the_original():
    model = torch.compile(Network(), backend="eager")
    tail, _ = cut(model, "hidden", TOKENS)
    assert len(recognise(tail).weights) == 2
    assert recognise(torch.compile(nn.Linear(3, 3), backend="eager")) is not None


def test_models_compiled_in_place_are_measured_uncompiled():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = Steps(nn.Linear(3, 4), torch.relu, nn.Linear(4, 2))
    model.compile(backend=backend)
    x = torch.randn(5, 3)
    model(x)
    tail, _ = cut(model, "parts.0", x)
    assert recognise(model) is not None and recognise(tail) is not None
    model(x)
    assert len(compilations) == 1
    inner = nn.Sequential(nn.Linear(3, 3), torch.compile(Steps(nn.Linear(3, 4), torch.relu), backend=backend))
    with torch.no_grad():
        inner(x)
        tail, _ = cut(inner, "1.parts.0", x)
        assert recognise(inner) is not None and isinstance(tail, fx.GraphModule)
        inner(x)
    assert len(compilations) == 2


class Talkative(nn.Module):
    """Does in forward all that a measure must undo: keeps tensors, counts, draws random numbers."""

    def __init__(self, failing_calls=()):
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.count = 0
        self.failing_calls = list(failing_calls)
        self.ever = SimpleNamespace(calls=0)  # an object of a class that measuring leaves alone

    def forward(self, x):
        self.calls += 1
        self.count = self.count + 1
        self.hidden = self.drop(self.first(x))
        self.ever.calls += 1
        if self.ever.calls in self.failing_calls:
            raise OverflowError("model failed")
        noise = torch.randn(1)
        self.last = noise.clone()
        return self.second(self.hidden) + 0 * noise


def state(model):
    """All that measuring could change."""
    return {
        "attributes": {name: sorted(vars(part)) for name, part in model.named_modules()},
        "modes": [part.training for part in model.modules()],
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()],
        "tensors": {name: value.tolist() for name, value in model.state_dict().items()},
        "versions": [p._version for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "count": getattr(model, "count", None),
        "random": torch.get_rng_state().tolist(),
        "grad_mode": torch.is_grad_enabled(),
    }


def mixed_modes(model):
    """A model in training, but for one frozen part."""
    model.train()
    next(model.children()).eval()
    return model


@pytest.mark.parametrize("model", [Network(), Talkative(), Residual()])
def test_cutting_and_recognising_leave_no_trace(model):
    mixed_modes(model)
    inputs = TOKENS if isinstance(model, Network) else torch.randn(5, 3)
    before = state(model)
    recognise(model)
    cut(model, "first" if isinstance(model, Residual) else "drop", inputs)
    assert state(model) == before


@pytest.mark.parametrize("failing_calls", [[1], [2, 3]], ids=["for the samples", "traced, and with the hook"])
def test_errors_leave_no_trace(failing_calls):
    model = mixed_modes(Talkative(failing_calls))
    x = torch.randn(5, 3)
    before = state(model)
    with pytest.raises(OverflowError, match="model failed"):
        cut(model, "first", x)
    assert state(model) == before and model.ever.calls == failing_calls[-1]


def test_dropout_in_training_is_measured_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 30), nn.Dropout(0.5), Untraceable())
    model[2].first, model[2].drop = nn.Linear(30, 4), nn.Dropout(0.5)
    x = torch.randn(5, 3)
    for layer in ("0", "1", "2.first"):
        tail, samples = cut(model, layer, x)
        with evaluating(tail):
            assert torch.equal(tail(samples), model(x))
        assert model.training and model[1].training


def test_evaluating_restores_every_modules_own_mode_also_after_an_error():
    model = mixed_modes(Network())
    modes = [part.training for part in model.modules()]
    with pytest.raises(OverflowError), evaluating(model, torch.relu):
        assert not any(part.training for part in model.modules()) and not torch.is_grad_enabled()
        raise OverflowError
    assert [part.training for part in model.modules()] == modes and torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is, but its modules are about
def test_evaluating_restores_scripted_modules():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert all(part.training for part in model.modules())


def test_evaluating_does_not_call_train():
    class Rewrites(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("rewrote its weights")

    with evaluating(Rewrites(3, 3)):
        pass


def test_chain_evaluates_the_formula():
    torch.manual_seed(0)
    w, v, b = torch.randn(4, 3), torch.randn(2, 4), torch.randn(4)
    chain = Chain((w, v), (b, None), tuple(map(Activation, ("sin", "relu", "tanh"))))
    x = torch.randn(6, 3)
    torch.testing.assert_close(chain(x), torch.tanh(torch.relu(x.sin() @ w.T + b) @ v.T))
    activations = chain.activations[1:2] * 3 + chain.activations[2:]
    z = x.relu() @ w.T + b
    s = (z.relu() + z) @ w + x.relu()
    u = s.relu() @ v[:, :3].T
    chain = Chain((w, w.T, v[:, :3]), (b, None, None), activations, skips=((3, 2), (4, 1), (7, 6)))
    torch.testing.assert_close(chain(x), u.tanh() + u)


@pytest.mark.parametrize(
    "part, value, error, message",
    [
        ("weights", (), ValueError, "weights: expected one or more, got none"),
        (
            "weights",
            (torch.ones(3), torch.ones(2, 4)),
            ValueError,
            r"weights\[0\]: expected \(out, in\), got shape \(3,\)",
        ),
        (
            "weights",
            (torch.ones(4, 3), torch.ones(2, 5)),
            ValueError,
            r"weights\[1\]: expected \(out, 4\), got shape \(2, 5\)",
        ),
        (
            "weights",
            (torch.ones(4, 3), torch.ones(2, 4).double()),
            TypeError,
            r"weights\[1\]: expected torch.float32",
        ),
        (
            "weights",
            (torch.ones(4, 3), torch.ones(2, 4, device="meta")),
            TypeError,
            r"weights\[1\]: .* on meta",
        ),
        (
            "weights",
            (torch.ones(4, 3).int(), torch.ones(2, 4).int()),
            TypeError,
            r"weights\[0\]: .* got torch.int32",
        ),
        ("biases", (None,), ValueError, "biases: expected 2, a tensor or None for each weight, got 1"),
        ("biases", (torch.ones(3), None), ValueError, r"biases\[0\]: expected \(4,\), got shape \(3,\)"),
        ("biases", (torch.ones(4).half(), None), TypeError, r"biases\[0\]: expected torch.float32"),
        (
            "activations",
            (Activation("relu"),) * 2,
            ValueError,
            "activations: expected 3 for 2 weights, got 2",
        ),
        ("skips", ((6, 0),), ValueError, "skips: .* is no earlier value for a later one, once"),
        ("skips", ((2, 1),), ValueError, r"skips: \(2, 1\) adds a value of width 3 to one of width 4"),
    ],
)
def test_a_chain_refuses_what_does_not_fit(part, value, error, message):
    parts = {
        "weights": (torch.ones(4, 3), torch.ones(2, 4)),
        "biases": (None, None),
        "activations": (Activation("relu"),) * 3,
    }
    Chain(**parts)
    with pytest.raises(error, match=message):
        Chain(**{**parts, part: value})
