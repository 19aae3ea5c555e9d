"""What follows a layer, recognised as a chain, however it is spelled."""

import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from spellings import TOKENS, Added, FunctionalLinear, Network, Steps, residual
from torch import fx, nn

from lmnfast._chain import ACTIVATIONS, Activation
from lmnfast._connectivity import connectivity
from lmnfast._enqueue import enqueue
from lmnfast._recognise import recognise
from lmnfast._settings import Settings
from lmnfast.cutting import cut

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


def test_flattens_tells_whether_flattening_comes_before_the_first_weight():
    assert recognise(nn.Sequential(nn.Flatten(), nn.Linear(3, 2))).flattens
    assert not recognise(nn.Sequential(nn.Linear(3, 2), nn.Flatten())).flattens
