"""Blocks of a transformer, in the ways in which they are written, are recognised as what they compute."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrizations

from lmnfast import cut
from lmnfast._chain import Activation
from lmnfast._recognise import NotAChain
from lmnfast._recognise_block import block_or_reason
from lmnfast._undisturbed import evaluating

WIDTH, UNITS = 6, 10


class Written(nn.Module):
    """A forward as it is written, with the parts that it may use."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.gate = nn.Linear(WIDTH, UNITS), nn.Linear(WIDTH, UNITS, bias=False)
        self.both, self.last = nn.Linear(WIDTH, 2 * UNITS), nn.Linear(UNITS, WIDTH)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.5)
        self.scale, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.table, self.units = nn.Parameter(torch.randn(WIDTH, UNITS)), nn.Parameter(torch.randn(UNITS))
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def written(forward):
    torch.manual_seed(0)
    model = Written(forward)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def mlp(m, n):
    return m.last(F.gelu(m.first(n)))


def rms(x, epsilon=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def old_rms(m, x):
    """As in the first Llama and T5: the norm of x over the root of the width."""
    return m.scale * (x / (x.square().sum(dim=-1, keepdim=True) / x.shape[-1] + 1e-5).sqrt())


def centered(m, x):
    y = x - x.mean(-1, keepdim=True)
    return y / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-12) * m.scale + m.shift


def new_gelu(z):
    return 0.5 * z * (1.0 + torch.tanh(0.7978845608028654 * (z + 0.044715 * torch.pow(z, 3.0))))


def gated(m, n, activation=F.silu):
    return m.last(activation(m.first(n)) * m.gate(n))


def chunked(m, x):
    first, gate = m.both(x).chunk(2, dim=-1)
    return m.last(F.silu(first) * gate)


def split(m, x):
    gate, first = torch.split(m.both(x), UNITS, dim=-1)
    return m.last(gate * F.gelu(first, approximate="tanh"))


def sliced(m, x):
    h = x @ m.both.weight.t()
    h += m.both.bias
    return m.last(torch.tanh(h[..., : h.shape[-1] // 2]) * h[..., UNITS:])


def in_place(m, x):
    y = m.first(m.norm(x))
    y = m.last(F.relu(y, inplace=True))
    y += x
    return y


def in_rows(m, x):
    rows = x.reshape(-1, x.size(-1))
    y = torch.addmm(m.units, rows, m.table).sigmoid()
    return m.last(y).view(x.size()[:-1] + (WIDTH,)) + x  # noqa: RUF005  # as Hugging Face's Conv1D


def with_tokens(m, x):
    n, t, d = x.shape
    y = mlp(m, x.view(n * t, d)).view(n, t, -1)
    return (x + y).flatten(1)


def with_width(m, x):
    n, t, d = x.shape
    rows = x.view(-1, d)
    return rows.view(n, t, d) + mlp(m, m.norm(rows)).view(n, t, d).view(x.shape)


gelu, tanh_gelu, silu = Activation("gelu"), Activation("gelu_tanh"), Activation("silu")
layer_norm, root = (True, 1e-5), (False, 1e-6)

# The forward; and the activation, what normalises, whether there is a gate and whether x is added.
FORMS = {
    "an MLP": (mlp, gelu, None, False, False),
    "x plus a normalised MLP": (lambda m, x: x + mlp(m, m.norm(x)), gelu, layer_norm, False, True),
    "torch.add": (lambda m, x: torch.add(mlp(m, m.norm(x)), x), gelu, layer_norm, False, True),
    "F.layer_norm": (
        lambda m, x: mlp(m, F.layer_norm(x, (WIDTH,), m.scale, bias=m.shift, eps=1e-3)) + x,
        *(gelu, (True, 1e-3), False, True),
    ),
    "F.layer_norm of the last shape": (
        lambda m, x: mlp(m, F.layer_norm(x, x.shape[-1:])),
        gelu,
        layer_norm,
        False,
        False,
    ),
    "F.rms_norm": (lambda m, x: gated(m, F.rms_norm(x, (WIDTH,), m.scale, 1e-6)), silu, root, True, False),
    "a root of squares": (lambda m, x: x + gated(m, m.scale * rms(x)), silu, root, True, True),
    "1 + scale": (lambda m, x: gated(m, rms(x) * (1 + m.scale), new_gelu), tanh_gelu, root, True, False),
    "without a scale": (lambda m, x: mlp(m, rms(x, 0.1)), gelu, (False, 0.1), False, False),
    "an old root of squares": (lambda m, x: mlp(m, old_rms(m, x)), gelu, (False, 1e-5), False, False),
    "a scale's shape": (
        lambda m, x: x + mlp(m, F.layer_norm(x, m.scale.shape, m.scale, m.shift, 1e-5)),
        *(gelu, layer_norm, False, True),
    ),
    "a mean of products": (
        lambda m, x: gated(m, (x * torch.rsqrt(torch.mean(x * x, -1, True) + 1e-6)).to(x.dtype) * m.scale),
        *(silu, root, True, False),
    ),
    "a variance": (lambda m, x: x + mlp(m, centered(m, x)), gelu, (True, 1e-12), False, True),
    "conversions to its dtype": (
        lambda m, x: x + gated(m, m.scale * rms(x.to(x.dtype)).type_as(x).to(m.scale.dtype)),
        *(silu, root, True, True),
    ),
    "chunks": (chunked, silu, None, True, False),
    "parts": (split, tanh_gelu, None, True, False),
    "slices": (sliced, Activation("tanh"), None, True, False),
    "a gated linear unit": (lambda m, x: m.last(F.glu(m.both(x))), Activation("sigmoid"), None, True, False),
    "a product": (lambda m, x: m.last(m.first(x) * m.gate(x)), Activation("identity"), None, True, False),
    "in place": (in_place, Activation("relu"), layer_norm, False, True),
    "rows": (in_rows, Activation("sigmoid"), None, False, True),
    "tokens, flattened": (with_tokens, gelu, None, False, True),
    "tokens of the samples' width": (with_width, gelu, layer_norm, False, True),
    "dropout and factors of 1": (
        lambda m, x: x + 1.0 * m.drop(m.last(m.drop(F.silu(m.first(m.norm(x * 1)))) / 1)).contiguous(),
        *(silu, layer_norm, False, True),
    ),
    "relu by clamp": (lambda m, x: m.last(m.first(x).clamp(min=0)), Activation("relu"), None, False, False),
    "leaky": (
        lambda m, x: m.last(F.leaky_relu(m.first(x), 0.2)),
        *(Activation("leaky_relu", 0.2), None, False, False),
    ),
    "elu": (lambda m, x: m.last(F.elu(m.first(x), 0.3)), Activation("elu", 0.3), None, False, False),
    "softplus": (
        lambda m, x: m.last(F.softplus(m.first(x), beta=2, threshold=9)),
        *(Activation("softplus", 2.0, 9.0), None, False, False),
    ),
    "gelu by erf": (
        lambda m, x: m.last((z := m.first(x)) * 0.5 * (1.0 + torch.erf(z / 2**0.5))),
        *(gelu, None, False, False),
    ),
    "gelu by tanh": (lambda m, x: m.last(new_gelu(m.first(x))), tanh_gelu, None, False, False),
    "silu by sigmoid": (lambda m, x: m.last((z := m.first(x)) * torch.sigmoid(z)), silu, None, False, False),
    "silu by exp": (lambda m, x: m.last((z := m.first(x)) / (1 + (-z).exp())), silu, None, False, False),
    "sigmoid by tanh": (
        lambda m, x: m.last(0.5 * (1 - torch.tanh(-0.5 * m.first(x)))),
        *(Activation("sigmoid"), None, False, False),
    ),
    "sin": (lambda m, x: m.last(m.first(x).sin()), Activation("sin"), None, False, False),
    "no activation": (lambda m, x: m.last(m.first(x)), Activation("identity"), None, False, False),
    "tied": (
        lambda m, x: F.linear(F.gelu(F.linear(x, m.gate.weight)), m.gate.weight.T),
        *(gelu, None, False, False),
    ),
}


def check(f, block, x, tolerance=1e-12):
    """The block gives f's outputs, and they depend on the samples."""
    with evaluating(f), torch.no_grad():
        y = f(x)
        torch.testing.assert_close(block(x).reshape(y.shape), y, rtol=tolerance, atol=tolerance)
        assert not torch.equal(y[0], y[1])


def described(block):
    norm = None if block.norm is None else (block.norm.centers, block.norm.epsilon)
    return block.activation, norm, block.gate is not None, block.adds_input


def inputs(*shape, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)


def changed(f):
    """Changes the weights in place, as a step of training does."""
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.mul_(1.1).add_(0.01)


@pytest.mark.parametrize("name", FORMS)
def test_a_written_block_is_what_it_computes(name):
    forward, *expected = FORMS[name]
    f = written(forward).double()
    block = block_or_reason(f)
    assert described(block) == tuple(expected)
    shapes = [(7, 3), (2, 5)] if name.startswith("tokens") else [(7,), (7, 3)]
    for shape in shapes:
        for scale in (1e-4, 1.0, 30.0):
            check(f, block, inputs(*shape, scale=scale))
    changed(f)
    assert f.training
    if name != "1 + scale":  # its tensors are the model's own
        check(f, block, inputs(*shapes[0]))
    check(f, block_or_reason(f), inputs(*shapes[0]))


@pytest.mark.parametrize("name", FORMS)
def test_a_written_block_is_the_same_in_its_traced_graph_and_behind_a_cut(name):
    forward, *expected = FORMS[name]
    f = written(forward)
    traced = fx.symbolic_trace(f.eval())
    assert described(block_or_reason(traced)) == tuple(expected)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), f).double()
    tail, samples = cut(model, "0", inputs(7, 3))
    block = block_or_reason(tail)
    assert described(block) == tuple(expected)
    check(tail, block, samples)
    changed(model)
    check(tail, block_or_reason(tail), samples)


SEQUENCES = {
    "layer norm": nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)),
    "nested": nn.Sequential(
        nn.RMSNorm(6, eps=1e-3),
        nn.Sequential(nn.Linear(6, 9, bias=False), nn.ELU(0.7, inplace=True)),
        nn.Linear(9, 6),
    ),
    "default epsilon": nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 9), nn.LeakyReLU(0.3), nn.Linear(9, 6)),
    "more": nn.Sequential(
        *(nn.Identity(), nn.LayerNorm(6, elementwise_affine=False), nn.Dropout(), nn.Linear(6, 10), nn.GLU()),
        *(nn.Dropout(), nn.Linear(5, 4), nn.Identity(), nn.Flatten()),
    ),
    "no norm": nn.Sequential(nn.Linear(6, 9), nn.Softplus(2, 5), nn.Linear(9, 6)),
    "parametrised": nn.Sequential(
        nn.LayerNorm(6), parametrizations.weight_norm(nn.Linear(6, 9)), nn.Tanh(), nn.Linear(9, 6)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SEQUENCES)
def test_modules_in_order_are_read_without_a_trace(name, dtype):
    f = copy.deepcopy(SEQUENCES[name]).to(dtype)
    block = block_or_reason(f)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for shape in ((7,), (7, 3)):
        check(f, block, inputs(*shape).to(dtype), tolerance)
    if name != "parametrised":
        shared = {t.untyped_storage().data_ptr() for t in f.parameters()}
        assert {t.untyped_storage().data_ptr() for t in (block.first, block.last)} <= shared
    changed(f)
    check(f, block_or_reason(f), inputs(7).to(dtype), tolerance)


def test_a_module_that_stands_twice_counts_twice():
    linear = nn.Linear(6, 6)
    block = block_or_reason(nn.Sequential(linear, nn.GELU(), linear))
    assert block.first.data_ptr() == block.last.data_ptr() == linear.weight.data_ptr()
    act = nn.GELU()
    with pytest.raises(NotAChain, match="gelu|GELU"):
        block_or_reason(nn.Sequential(linear, act, nn.Linear(6, 6), act))


def test_wrappers_are_looked_through_and_nothing_is_changed():
    f = written(FORMS["x plus a normalised MLP"][0])
    state, random = copy.deepcopy(f.state_dict()), torch.get_rng_state()
    wrapped = nn.DataParallel(f)
    assert described(block_or_reason(wrapped)) == FORMS["x plus a normalised MLP"][1:]
    assert described(block_or_reason(torch.compile(f))) == FORMS["x plus a normalised MLP"][1:]
    assert f.training and all(torch.equal(value, state[name]) for name, value in f.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    undone = []
    with evaluating(f):
        block_or_reason(f, lambda: undone.append(1))
    assert undone == [1]


def test_constants_that_float32_rounds_are_recognised_in_float32_alone():
    """sqrt(2 / pi) to 8 digits differs by less than float32 sees, to 6 digits by more."""

    def with_root(root):
        def forward(m, x):
            z = m.first(x)
            return m.last(0.5 * z * (1 + torch.tanh(root * (z + 0.044715 * z * z * z))))

        return written(forward)

    eight = with_root(0.79788456)
    assert block_or_reason(eight).activation == tanh_gelu
    check(eight, block_or_reason(eight), inputs(50, scale=2.0).float(), 3e-7)
    for f in (eight.double(), with_root(0.79788), with_root(0.79788).double()):
        with pytest.raises(NotAChain, match="no activation that the kernels know"):
            block_or_reason(f)


def test_a_fixed_number_of_tokens_is_that_of_the_cut():
    f = nn.Sequential(nn.Linear(WIDTH, WIDTH), written(FORMS["rows"][0])).double()
    tail, samples = cut(f, "0", inputs(7, 3))
    check(tail, block_or_reason(tail), samples)
    traced = block_or_reason(f[1])
    for tokens in (1, 4):
        check(f[1], traced, inputs(7, tokens))


@pytest.mark.parametrize(
    "add", [operator.add, operator.iadd, torch.add, lambda y, x: y.add_(x), lambda y, x: sum([y, x])]
)
def test_a_sum_with_x_is_read_in_each_spelling(add):
    f = written(lambda m, x: add(mlp(m, m.norm(x)), x)).double()
    assert described(block_or_reason(f)) == (gelu, layer_norm, False, True)
    check(f, block_or_reason(f), inputs(7, 3))
