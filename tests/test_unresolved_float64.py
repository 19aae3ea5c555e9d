"""Networks in float32 that are evaluated in float64, for the pairs that float32 cannot resolve."""

import copy
import warnings

import pytest
import torch
from chains import nearly_equal
from torch import nn

import lmnfast
from lmnfast._unresolved import Widened


class Casting(nn.Module):
    """Says its dtypes itself, in every usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.register_buffer("shift", torch.linspace(0, 1, 4))

    def forward(self, z):
        z = z.to(self.linear.weight.dtype).float()
        h = self.linear(z).to(torch.float32) + self.shift.type_as(z)
        return torch.softmax(h, -1, dtype=torch.float32) + torch.zeros(4, dtype=torch.float32)


class InPlace(nn.Module):
    """Fills a new tensor column by column, and changes what it has."""

    def forward(self, z):
        out = torch.zeros(len(z), 3)
        for k in range(3):
            out[:, k] = torch.tanh(z[:, k] * z[:, -1])
        return out.mul_(2).add_(torch.ones(3)).relu_()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten()),
        lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.GRU(1, 4, batch_first=True)),
        lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.LayerNorm(4), nn.Flatten()),
        Casting,
        InPlace,
    ],
)
def test_a_network_in_float32_is_evaluated_in_float64(make):
    torch.manual_seed(0)
    net = make().requires_grad_(False).eval()
    recurrent = isinstance(net, nn.Sequential) and isinstance(net[-1], nn.GRU)
    last = (lambda z: net(z)[0][:, -1]) if recurrent else net
    x = torch.randn(7, 5)
    exact = copy.deepcopy(net).double()
    if isinstance(net, InPlace):
        expected = torch.relu(2 * torch.tanh(x[:, :3].double() * x[:, -1:].double()) + 1)
    elif isinstance(net, Casting):
        h = torch.nn.functional.linear(x.double(), exact.linear.weight, exact.linear.bias) + exact.shift
        expected = torch.softmax(h, -1)
    else:
        expected = exact(x.double())
        expected = expected[0][:, -1] if isinstance(expected, tuple) else expected
    y, _ = Widened(last, x, last(x).flatten(1)).values().at(x.double())
    assert y.dtype == torch.float64
    assert (y - expected.flatten(1)).abs().max() < 1e-14
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda z: torch.from_numpy(z.float().numpy()) if z.dtype == torch.float32 else 1 / 0,
        lambda z: z.abs() if z.dtype == torch.float32 else z.square(),
    ],
)
def test_what_cannot_be_evaluated_in_float64_says_so_and_is_measured_as_it_is(spoil):
    x = torch.randn(6, 3)
    with pytest.warns(UserWarning, match="^f: cannot be evaluated in float64"):
        values = Widened(spoil, x, spoil(x)).values()
    y, _ = values.at(x.double())
    assert y.dtype == torch.float64 and torch.equal(y.float(), spoil(x))


@pytest.mark.parametrize("shift", [12.0, 15.0, 18.0, 25.0])
@pytest.mark.parametrize("head", ["log_softmax", "loss", "complement"])
def test_outputs_that_are_nothing_but_rounding_in_float32(head, shift):
    """Numbers near 0 that are computed from numbers near 1, as the losses of a confident classifier."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 5)).requires_grad_(False)
    net[2].bias[0] += shift
    x = torch.randn(16, 8)

    def f(z):
        y = net(z) if z.dtype == torch.float32 else exact(z)
        if head == "loss":
            return torch.logsumexp(y, 1, keepdim=True) - y[:, :1]
        return torch.log_softmax(y, 1) if head == "log_softmax" else 1 - torch.sigmoid(y[:, :1])

    exact = copy.deepcopy(net).double()
    right = lmnfast.lmn(f, x.double())
    assert lmnfast.lmn(lambda z: f(z), x) == pytest.approx(right.item(), rel=0.01)


@pytest.mark.parametrize("warm", [True, False])
def test_a_buffer_that_a_forward_pass_writes_and_reads(warm):
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
            self.register_buffer("gate", torch.zeros(4096, 16))

        def forward(self, z):
            h = self.first(z)
            self.gate[: len(h)] = torch.sigmoid(h)
            return self.last(h * self.gate[: len(h)])

    torch.manual_seed(0)
    net, x = Static().requires_grad_(False), nearly_equal(1e-6)
    right = lmnfast.lmn(copy.deepcopy(net).double(), x.double())
    if warm:
        net(x)
    assert lmnfast.lmn(net, x) == pytest.approx(right.item(), rel=1e-3)


def test_a_scripted_network_is_evaluated_in_float64_as_a_copy():
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 3)),
        nearly_equal(1e-6),
    )
    right = lmnfast.lmn(copy.deepcopy(net).double(), x.double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(net, x)
    assert lmnfast.lmn(scripted, x) == pytest.approx(right.item(), rel=1e-3)
    assert all(p.dtype == torch.float32 for p in scripted.parameters())


@pytest.mark.parametrize("convert", [lambda y: y.type(torch.FloatTensor), lambda y: torch.tensor(y.tolist())])
def test_outputs_that_f_converts_to_float32_are_no_float64(convert):
    net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)).requires_grad_(False)
    with pytest.warns(UserWarning, match="it converts its outputs to float32"):
        lmnfast.lmn(lambda z: convert(net(z)), nearly_equal(1e-6))


def test_equal_samples_need_no_second_look():
    x = torch.randn(6, 3).repeat(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        L = lmnfast.connectivity(lambda z: torch.tanh(z) if z.dtype == torch.float32 else 1 / 0, x)
    assert (L.diagonal(6) == 1).all()


def test_no_warning_where_nothing_is_unresolved():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lmnfast.lmn(lambda z: torch.tanh(z) if z.dtype == torch.float32 else 1 / 0, torch.randn(9, 3))
