"""What is no block, or does not show whether it is one, is refused with the reason."""

import pytest
import torch
import torch.nn.functional as F
from test_recognise_block import UNITS, WIDTH, gated, mlp, new_gelu, rms, written
from torch import fx, nn

from lmnfast._recognise import NotAChain
from lmnfast._recognise_block import block_or_reason

NORM = "what precedes the first Linear is no LayerNorm or RMSNorm over the last dimension"
ACTIVATION = "the hidden layer is no activation that the kernels know"
REDUCED = "a mean or a sum over other dimensions than the last, or without keepdim"
SUM = "a sum with something other than x itself"
COMPUTED = "a Linear whose weight or bias is computed in the forward"
OVERWRITTEN = "an earlier result is used after it was overwritten"


def square(x):
    return x.pow(2).mean(-1, keepdim=True)


def centered(x):
    return x - x.mean(-1, keepdim=True)


# Normalisations of x that look like one of the two.
NORMS = {
    "epsilon outside of the root": (lambda m, x: x / (square(x).sqrt() + 1e-3), NORM),
    "a small epsilon outside of the root": (lambda m, x: x / (square(x).sqrt() + 1e-8), NORM),
    "epsilon inside and outside": (lambda m, x: x / ((square(x) + 1e-5).sqrt() + 1e-6), NORM),
    "epsilon by a clamp": (lambda m, x: x / square(x).clamp(min=1e-6).sqrt(), NORM),
    "an unbiased variance": (lambda m, x: centered(x) / (x.var(-1, keepdim=True) + 1e-5).sqrt(), NORM),
    "a variance without the mean": (
        lambda m, x: x / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
        NORM,
    ),
    "a mean over squares of other values": (lambda m, x: centered(x) * torch.rsqrt(square(x) + 1e-5), NORM),
    "the mean of absolute values": (lambda m, x: x / (x.abs().mean(-1, keepdim=True) + 1e-5), NORM),
    "the mean without its sign": (
        lambda m, x: (x - x.mean(-1, keepdim=True).abs()) / (x.var(-1, False, True) + 1e-5).sqrt(),
        NORM,
    ),
    "positive means alone": (
        lambda m, x: (x - x.mean(-1, keepdim=True).clamp(min=0)) / (x.var(-1, False, True) + 1e-5).sqrt(),
        NORM,
    ),
    "positive means alone, in the root": (
        lambda m, x: x * torch.rsqrt(square(x) + 1e-5 + 1e-3 * x.mean(-1, keepdim=True).clamp(max=0)),
        NORM,
    ),
    "a sum in place of a mean": (
        lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5),
        NORM,
    ),
    "a sum over another number": (
        lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (WIDTH - 1) + 1e-5),
        NORM,
    ),
    "a factor": (lambda m, x: 1.001 * rms(x), NORM),
    "a shift by a number": (lambda m, x: rms(x) + 1e-4, NORM),
    "the power 3": (lambda m, x: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-5), NORM),
    "centered alone": (lambda m, x: centered(x), NORM),
    "scaled alone": (lambda m, x: x * m.scale, NORM),
    "another position of the scale": (lambda m, x: rms(x * m.scale), NORM),
    "two scales": (lambda m, x: m.norm(x) * m.scale, NORM),
    "a norm of a norm": (lambda m, x: rms(m.norm(x)), NORM),
    "torch's norm of a norm": (
        lambda m, x: m.norm(rms(x)),
        "a normalisation of other values than the samples",
    ),
    "tokens": (lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), REDUCED),
    "tokens, from behind": (lambda m, x: x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-5), REDUCED),
    "tokens and units": (lambda m, x: x - x.mean((-1, -2), keepdim=True), REDUCED),
    "all": (lambda m, x: x - x.mean(), REDUCED),
    "no keepdim": (lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1) + 1e-5), REDUCED),
    "F.layer_norm of tokens": (
        lambda m, x: F.layer_norm(x, (3, WIDTH)),
        "a normalisation over more than the last",
    ),
    "a scale for each token": (lambda m, x: rms(x) * m.table.t()[:3], "an index of other values"),
    "a scale of one number": (lambda m, x: rms(x) * m.scale.sum(), "a mean or a sum of other values"),
    "positions": (lambda m, x: x + m.scale, NORM),
    "a number of samples": (
        lambda m, x: rms(x) * x.shape[0],
        "values depend on the number of samples or tokens",
    ),
    "softmax": (lambda m, x: torch.softmax(x, -1), "softmax.. is no part of a block"),
    "an activation": (lambda m, x: F.gelu(x), "gelu.. before the first Linear"),
}

# Functions of one Linear's result that look like an activation of the kernels.
ACTIVATIONS = {
    "quick gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "gelu with another cubic part": lambda z: 0.5 * z * (1 + torch.tanh(0.79788456 * (z + 0.0447 * z**3))),
    "squared relu": lambda z: torch.relu(z).square(),
    "relu up to 6": lambda z: z.clamp(0, 6),
    "relu up to 1000": lambda z: z.clamp(0, 1000),
    "relu from 0.001 on": lambda z: z.clamp(min=0.001),
    "silu, shifted": lambda z: F.silu(z) + 1e-6,
    "silu, scaled": lambda z: F.silu(z) * (1 + 1e-6),
    "a sum of two": lambda z: F.silu(z) + z,
    "softplus that overflows": lambda z: torch.log(1 + torch.exp(z)),
    "sigmoid that overflows": lambda z: torch.exp(z) / (1 + torch.exp(z)),
    "tanh of twice": lambda z: torch.tanh(2 * z),
    "cos": lambda z: torch.cos(z),
    "a power": lambda z: z.pow(3),
    "0": lambda z: z * 0,
    "elu twice": lambda z: F.elu(F.elu(z, 0.5), 0.5),
}
GATES = {
    "a clipped gate": lambda z, v: F.silu(z) * v.clamp(-7, 7),
    "a clipped gate, far": lambda z, v: F.silu(z) * v.clamp(max=1e6),
    "1 + gate": lambda z, v: F.silu(z) * (v + 1),
    "two activations": lambda z, v: F.silu(z) * torch.sigmoid(v),
    "a sum": lambda z, v: F.silu(z) + v,
    "a quotient": lambda z, v: F.silu(z) / v,
    "a square": lambda z, v: z * v * v,
    "the sign lost": lambda z, v: F.silu(z) * v.abs(),
    "the larger": lambda z, v: torch.maximum(z, v),
}


def overwritten_view(m, x):
    y = m.first(x)
    y.view(-1, UNITS).mul_(2)
    return m.last(F.gelu(y))


def overwritten_samples(m, x):
    before = x
    x.mul_(2)
    return before + mlp(m, m.norm(before))


def overwritten_part(m, x):
    both = m.both(x)
    first, gate = both.chunk(2, -1)
    F.silu(first, inplace=True)
    return m.last(both[..., :UNITS] * gate)


def in_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return mlp(m, x)


WHOLES = {
    "x twice": (lambda m, x: 2 * x + mlp(m, x), SUM),
    "the normalised x": (lambda m, x: (n := m.norm(x)) + mlp(m, n), SUM),
    "a difference": (lambda m, x: mlp(m, x) - x, "beyond one sum with x"),
    "half of it": (lambda m, x: x + 0.5 * mlp(m, x), "beyond one sum with x"),
    "alpha": (lambda m, x: torch.add(x, mlp(m, x), alpha=2), "add.. with alpha"),
    "a scaled result": (lambda m, x: x + m.scale * mlp(m, x), "of a parameter and other values than samples"),
    "x added twice": (lambda m, x: x + (x + mlp(m, x)), "beyond one sum with x"),
    "two results": (lambda m, x: mlp(m, x) + m.last(m.gate(x)), SUM),
    "a product with x": (lambda m, x: x * mlp(m, x), "beyond one sum with x"),
    "a norm behind": (lambda m, x: m.norm(x + mlp(m, x)), "a normalisation of other values than the samples"),
    "an activation behind": (lambda m, x: torch.tanh(mlp(m, x)), "tanh.. behind the last Linear"),
    "a clamp behind": (lambda m, x: mlp(m, x).clamp(-9, 9), "beyond one sum with x"),
    "the hidden layer": (lambda m, x: F.gelu(m.first(x)), "its output is no Linear of a hidden layer"),
    "x alone": (lambda m, x: x, "its output is no Linear of a hidden layer"),
    "three layers": (
        lambda m, x: mlp(m, mlp(m, x)),
        "a Linear of other values than samples or the hidden layer",
    ),
    "a hidden layer with x": (
        lambda m, x: F.linear(m.last(F.gelu(m.first(x)) + F.pad(x, (0, 4))), m.scale),
        "pad.. is no part of a block",
    ),
    "a hidden layer and a mean of x": (
        lambda m, x: m.last(F.gelu(m.first(x)) * x.mean(-1, keepdim=True)),
        "the hidden layer is joined with the samples",
    ),
    "different inputs": (
        lambda m, x: m.last(F.silu(m.first(m.norm(x))) * m.gate(x)),
        "the Linear maps of the hidden layer have different inputs",
    ),
    "three parts": (
        lambda m, x: m.last(F.silu(m.first(x)) * m.gate(x) * (x @ m.table)),
        "a hidden layer of 3 Linear maps; expected 1, or 2 with a gate",
    ),
    "a computed weight": (
        lambda m, x: m.last(F.gelu(F.linear(x, 2 * m.gate.weight))),
        "a weight that is computed",
    ),
    "a computed bias": (lambda m, x: m.last(F.gelu(F.linear(x, m.gate.weight, m.units + 1))), COMPUTED),
    "a weight from the samples": (lambda m, x: m.last(F.gelu(x @ x)), "a product of other tensors"),
    "a bias for each token": (
        lambda m, x: m.last(F.gelu(x @ m.table + m.both.weight[:3])),
        "an index of other",
    ),
    "a second bias": (lambda m, x: m.last(F.gelu(m.first(x) + m.units)), "and its bias"),
    "a bias of one number": (lambda m, x: m.last(F.gelu(m.gate(x) + m.one)), "and its bias"),
    "a bias behind the activation": (lambda m, x: m.last(F.gelu(m.first(x)) + m.units), "and its bias"),
    "a scaled hidden layer": (
        lambda m, x: m.last(F.gelu(m.first(x)) * m.units),
        "of a parameter and other values",
    ),
    "a part of the activated": (
        lambda m, x: m.last(F.gelu(m.both(x)).chunk(2, -1)[0]),
        "a part of other values than the first Linear's result",
    ),
    "parts of tokens": (
        lambda m, x: m.last(m.both(x).chunk(2, 1)[0]),
        "or along another dimension than the last",
    ),
    "parts by default": (
        lambda m, x: m.last(m.both(x).chunk(2)[0]),
        "or along another dimension than the last",
    ),
    "a token": (lambda m, x: mlp(m, x[:, 0]), "an index of other values"),
    "a part of the flattened": (
        lambda m, x: mlp(m, x).flatten(1)[..., :4],
        "a part of other values than the first Linear's result",
    ),
    "a part of the result": (
        lambda m, x: (x + mlp(m, x))[..., :4],
        "a part of other values than the first Linear's result",
    ),
    "a negative epsilon": (
        lambda m, x: mlp(m, F.layer_norm(x, (WIDTH,), eps=-1.0)),
        "a normalisation with the epsilon -1",
    ),
    "every second unit": (lambda m, x: m.last(F.gelu(m.both(x)[..., ::2])), "an index of other values"),
    "mixed tokens": (lambda m, x: mlp(m, x.transpose(1, 2)), "a transposition of other values than weights"),
    "a flatten before": (lambda m, x: mlp(m, x.flatten(1)), "a flatten before the last Linear"),
    "a view that mixes": (lambda m, x: mlp(m, x.view(-1, 3)), "widths that do not fit together"),
    "a view to the samples' width": (
        lambda m, x: m.last(F.gelu(m.first(x)).view(-1, x.size(-1)).view(-1, UNITS)),
        "widths that do not fit together",
    ),
    "rows and x": (lambda m, x: x + mlp(m, x.reshape(-1, WIDTH)), "add.. of tensors of other shapes"),
    "one token and x": (
        lambda m, x: x + mlp(m, x.view(x.size(0), -1, WIDTH)),
        "add.. of tensors of other shapes",
    ),
    "dropout in training": (
        lambda m, x: m.last(F.dropout(m.first(x), 0.1, True)),
        "dropout.. in training mode",
    ),
    "an overwritten view": (overwritten_view, OVERWRITTEN),
    "overwritten samples": (overwritten_samples, OVERWRITTEN),
    "an overwritten part": (overwritten_part, OVERWRITTEN),
    "an overwritten parameter": (lambda m, x: mlp(m, rms(x) * m.scale.add_(1)), "a parameter is overwritten"),
    "noise": (lambda m, x: mlp(m, x + torch.randn_like(x)), "randn_like.. is no part of a block"),
    "low precision in between": (
        lambda m, x: mlp(m, x.bfloat16().float()),
        "bfloat16.. is no part of a block",
    ),
    "another dtype in between": (
        lambda m, x: mlp(m, x.to(torch.bfloat16).float()),
        "its forward converts to .*bfloat16",
    ),
    "autocast": (in_autocast, "its forward turns autocast on or off"),
    "two results at once": (lambda m, x: (mlp(m, x), x), "its output is no single tensor"),
    "a branch": (lambda m, x: mlp(m, x) if x.sum() > 0 else x, "torch.fx cannot trace its forward"),
    "a part that it does not know": (lambda m, x: mlp(m, m.conv(x)), "Conv1d 'conv' is no part of a block"),
}


def refused(f, reason):
    with pytest.raises(NotAChain, match=reason):
        block_or_reason(f)


def with_more(forward):
    f = written(forward)
    f.conv = nn.Conv1d(3, 3, 1)
    f.one = nn.Parameter(torch.randn(1))
    return f


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_is_neither_is_refused(name):
    norm, reason = NORMS[name]
    for f in (with_more(lambda m, x: mlp(m, norm(m, x))), with_more(lambda m, x: x + gated(m, norm(m, x)))):
        for dtype in (torch.float32, torch.float64):
            refused(f.to(dtype), reason)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_that_the_kernels_do_not_have_is_refused(name):
    function = ACTIVATIONS[name]
    for f in (
        written(lambda m, x: m.last(function(m.first(m.norm(x))))),
        written(lambda m, x: m.last(function(m.first(x)) * m.gate(x))),
    ):
        for dtype in (torch.float32, torch.float64):
            refused(f.to(dtype), ACTIVATION)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_that_the_kernels_do_not_have_is_refused(name):
    f = written(lambda m, x: m.last(GATES[name](m.first(x), m.gate(x))))
    refused(f, ACTIVATION)
    refused(f.double(), ACTIVATION)


@pytest.mark.parametrize("name", WHOLES)
def test_what_is_no_block_is_refused(name):
    forward, reason = WHOLES[name]
    f = with_more(forward)
    before = {key: value.clone() for key, value in f.state_dict().items()}
    refused(f, reason)
    assert all(torch.equal(value, before[key]) for key, value in f.state_dict().items())


def test_a_variance_by_the_mean_of_squares_is_the_variance():
    """E[x^2] - E[x]^2 is the same function. Its values differ by rounding, by as much as the mean exceeds the deviation."""

    def norm(x):
        variance = square(x) - x.mean(-1, keepdim=True).square()
        return centered(x) / torch.sqrt(variance + 1e-5)

    f = written(lambda m, x: mlp(m, norm(x))).double()
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    assert block_or_reason(f).norm.epsilon == 1e-5
    torch.testing.assert_close(block_or_reason(f)(x), f(x), rtol=1e-12, atol=1e-12)


def own_forward():
    f = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    f[1].forward = lambda x: x
    return f


def with_hook(part):
    f = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    (f if part is None else f[part]).register_forward_hook(lambda module, args, output: 2 * output)
    return f


def mixed():
    f = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    f[2].double()
    return f


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = (
            nn.Linear(6, 6),
            nn.Linear(6, 2, bias=False),
            nn.Linear(2, 6, bias=False),
        )

    def forward(self, x):
        return self.base(x) + 2.0 * self.up(self.down(x))


class TwoArguments(nn.Module):
    def forward(self, x, mask):
        return x * mask


class Tagged(nn.Parameter):
    """A tensor of another class, whose operations may be others."""


def with_tagged(part):
    f = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    f[part].weight = Tagged(f[part].weight.detach())
    return f


def norm_of_another_dtype():
    f = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    f[0].double()
    return f


LINEAR = nn.Linear(6, 6)
MODULES = {
    "a function": (lambda x: x, "'<lambda>' is no nn.Module"),
    "a forward of its own": (own_forward(), "GELU '1' has hooks, or a forward of its own"),
    "a hook on a part": (with_hook(0), "LayerNorm '0' has hooks, or a forward of its own"),
    "a hook on the whole": (with_hook(None), "Sequential 'model' has hooks"),
    "half": (nn.Sequential(LINEAR, nn.GELU(), LINEAR).half(), "weights are torch.float16 on cpu"),
    "bfloat16": (
        nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)).bfloat16(),
        "weights are torch.bfloat16",
    ),
    "two dtypes": (mixed(), "weights are torch.float32 on cpu and torch.float64 on cpu"),
    "a norm of another dtype": (norm_of_another_dtype(), "a scale or shift of another shape or dtype"),
    "a weight of another class": (with_tagged(1), "a weight that is no plain dense tensor"),
    "a scale of another class": (with_tagged(0), "a scale or shift of another shape or dtype"),
    "a subclass": (nn.Sequential(nn.Linear(6, 6), nn.GELU(), Doubling(6, 6)), "beyond one sum with x"),
    "an adapter": (nn.Sequential(LowRank(), nn.GELU(), nn.Linear(6, 6)), "beyond one sum with x"),
    "widths": (
        nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(6, 6)),
        "shapes of weights that do not fit",
    ),
    "a norm of another width": (
        nn.Sequential(nn.LayerNorm(5), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)),
        "widths that do not fit together",
    ),
    "a norm of tokens": (
        nn.Sequential(nn.LayerNorm((3, 6)), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)),
        "a normalisation over more than the last dimension",
    ),
    "two arguments": (TwoArguments(), "torch.fx cannot trace its forward .TypeError"),
    "one Linear": (nn.Linear(6, 6), "its output is no Linear of a hidden layer"),
    "batch norm": (
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 6)),
        "BatchNorm1d '1' is no part of a block",
    ),
    "an activation of torch that the kernels lack": (
        nn.Sequential(nn.Linear(6, 6), nn.Mish(), nn.Linear(6, 6)),
        "Mish '1' is no part of a block",
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_is_no_block_is_refused(name):
    refused(*MODULES[name])


def test_a_sum_of_other_widths_is_refused_although_torch_broadcasts_it():
    for outputs in (1, 4):
        f = written(lambda m, x: x + m.last(F.gelu(m.first(x))))
        f.last = nn.Linear(UNITS, outputs)
        refused(f, "widths that do not fit together")


def test_a_graph_of_two_arguments_is_refused():
    refused(fx.symbolic_trace(TwoArguments()), "it takes more than one argument")


@pytest.mark.filterwarnings("ignore")  # torch's quantisation is deprecated
def test_a_quantised_model_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    refused(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), "Linear '0' is no part of a block")


def test_a_function_that_a_library_has_replaced_is_not_taken_for_torchs(monkeypatch):
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    block_or_reason(model)
    own = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *args: 2 * own(x, *args))
    refused(model, "LayerNorm '0' calls a function that is not torch's own")
    monkeypatch.undo()
    monkeypatch.setattr(F, "gelu", lambda z, approximate: z)
    refused(model, "has hooks, or a forward of its own")


def test_a_conversion_to_float32_is_refused_in_float64_alone():
    def forward(m, x):
        y = x.to(torch.float32)
        y = (y * torch.rsqrt(square(y) + 1e-6)).to(x.dtype)
        return gated(m, y * m.scale, new_gelu)

    f = written(forward)
    assert block_or_reason(f).norm.epsilon == 1e-6
    refused(f.double(), "its forward converts to torch.float32")
