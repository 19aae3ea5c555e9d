"""Of the last token-wise steps only the token that counts is computed, where its outputs need no other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import lmnfast
from lmnfast._selected import selected
from lmnfast._undisturbed import evaluating

TOKENS, WIDTH = 5, 8


class Base(nn.Module):
    """A layer that mixes tokens, then token-wise steps, then one token."""

    token = -1

    def __init__(self):
        super().__init__()
        self.first, self.mix = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.behind(self.first(x))

    def behind(self, h):
        h = h + torch.softmax(h @ h.mT, -1) @ self.mix(h)
        return self.head(self.steps(h))[:, self.token]

    def steps(self, h):
        return h + self.down(F.gelu(self.up(self.norm(h))))


class First(Base):
    token = 0


class Middle(Base):
    token = 3


class Flat(Base):
    """As Conv1D of GPT-2."""

    def steps(self, h):
        rows = h.shape[0]
        flat = torch.addmm(self.bias, h.view(-1, WIDTH), self.weight)
        return h + torch.tanh(flat.view(rows, TOKENS, WIDTH))


class RootMeanSquare(Base):
    def steps(self, h):
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return F.dropout(self.bias * h.to(h.dtype), 0.1, False) + h[:, :, :]


class Twice(Base):
    """What the second mixing needs of all tokens is not computed twice."""

    def steps(self, h):
        h = super().steps(h)
        return super().steps(h + torch.softmax(h @ h.mT, -1) @ h)


class Placed(Base):
    """Something that differs between the tokens."""

    def steps(self, h):
        return super().steps(h) * torch.arange(1.0, TOKENS + 1, dtype=h.dtype)[None, :, None]


MOVED = [Base, First, Middle, Flat, RootMeanSquare, Twice, Placed]


class Sums(Base):
    """Over the tokens, behind the products."""

    def steps(self, h):
        return torch.cumsum(super().steps(h), 1)

    def behind(self, h):
        return self.steps(h)[:, -1]


class AcrossTokens(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((TOKENS, WIDTH))

    def behind(self, h):
        return self.norm(h)[:, -1]


class Writes(Base):
    def steps(self, h):
        h = super().steps(h)
        h[:, 0] = 1
        return h


class Slices(Base):
    """More than one token."""

    def behind(self, h):
        return self.head(self.steps(h))[:, 1:3]


class SquareFlat(Base):
    """A flat product that is no product of tokens."""

    def behind(self, h):
        flat = torch.addmm(self.bias, h.transpose(0, 1).reshape(-1, WIDTH), self.weight)
        return flat.view(TOKENS, h.shape[0], WIDTH).transpose(0, 1)[:, -1]


KEPT = [Sums, AcrossTokens, Writes, Slices, SquareFlat]


def cut(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(11, TOKENS, 3)
    return model, *lmnfast.cut(model, "first", x)


@pytest.mark.parametrize("kind", MOVED)
def test_only_the_token_that_counts_is_computed(kind):
    model, tail, samples = cut(kind)
    assert isinstance(tail, fx.GraphModule)
    with evaluating(tail):
        moved = selected(tail, samples)
        assert moved is not None
        torch.testing.assert_close(moved(samples), tail(samples))
        assert work(moved, samples) < work(tail, samples)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = lmnfast.connectivity(exact.behind, samples.double())
    assert (lmnfast.connectivity(tail, samples) - expected).abs().max() < 1e-5


def work(f, x):
    """Multiply-adds."""
    with FlopCounterMode(display=False) as count:
        f(x)
    return count.get_total_flops()


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_not_token_wise_stays(kind):
    model, tail, samples = cut(kind)
    with evaluating(tail):
        moved = selected(tail, samples)
        if moved is not None:
            torch.testing.assert_close(moved(samples), tail(samples))
        assert moved is None
    expected = lmnfast.connectivity(copy.deepcopy(model).double().behind, samples.double())
    assert (lmnfast.connectivity(tail, samples) - expected).abs().max() < 1e-5


def test_a_graph_is_made_once_and_follows_parameters():
    _, tail, samples = cut(Base)
    with evaluating(tail):
        moved = selected(tail, samples)
        assert selected(tail, samples) is moved
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(moved(samples), tail(samples))
    head = tail.model.head
    head.weight = nn.Parameter(torch.randn(4, WIDTH))
    tail.model.up = nn.Linear(WIDTH, 16)
    with evaluating(tail):
        torch.testing.assert_close(selected(tail, samples)(samples), tail(samples))


def test_as_many_tokens_as_rows_of_the_trial_are_left_alone():
    model = Base().eval()
    tail, samples = lmnfast.cut(model, "first", torch.randn(4, 61, 3))
    with evaluating(tail):
        assert selected(tail, samples) is None


def test_a_graph_with_other_outputs_is_not_taken(monkeypatch):
    _, tail, samples = cut(Base)
    expected = lmnfast.connectivity(tail, samples)
    wrong = fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(TOKENS * WIDTH, 4)))
    monkeypatch.setattr(lmnfast._prepare, "selected", lambda f, x: wrong)
    assert torch.allclose(lmnfast.connectivity(tail, samples), expected, atol=1e-6)
