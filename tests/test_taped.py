"""Tails that torch.fx cannot trace: written down while the model runs, or the model with what precedes the layer replayed."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import UNIFORM
from torch import fx, nn
from torch._dynamo.testing import CompileCounter

import lmnfast
from lmnfast import reference
from lmnfast._hook_tail import HookTail
from lmnfast._undisturbed import evaluating, measurement_of


class Base(nn.Module):
    """h = first(x), then the rest of a network, which torch.fx cannot trace."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.ran = 0

    def forward(self, x):
        if x.sum() > 1e9:  # torch.fx fails here
            return x
        self.prepare(x)
        return self.rest(torch.tanh(self.first(x)))

    def prepare(self, x):
        pass

    def rest(self, h):
        return self.last(torch.tanh(self.hidden(h)))


class Reshapes(Base):
    """Numbers that follow the rows, in shapes and in arithmetic."""

    def rest(self, h):
        rows, width = h.shape
        parts = torch.tanh(self.hidden(h)).view(rows * 2, width // 2).repeat(1, 2)
        places = torch.arange(rows * 2).reshape(rows, 2)
        h = parts[places.flatten() + 0 * len(parts)].reshape(-1, 2, width)
        return self.last(h.sum(1) * h.shape[0] / rows)


class WritesInPlace(Base):
    """Into results, into views of them, and into new tensors with a row per sample."""

    def rest(self, h):
        h = self.hidden(h).tanh_()
        h[:, 1:3] *= 2
        h[:, 0].sub_(1).mul_(h[:, 3])
        out = torch.zeros(len(h), 2)
        out[:, 0] = h.sum(1).sin()
        out += self.last(h)
        return out


class TakesWhatIsFixed(Base):
    """Values that do not depend on the layer: with a row per sample, several rows per sample, and none."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("shift", torch.rand(1, 4))
        self.plain = torch.rand(4)

    def prepare(self, x):
        ones = torch.ones(len(x), 2)
        self.mask = F.pad(ones, (1, 1), value=0.5) * self.scale.exp()
        self.flat = ones.reshape(-1, 1) * self.plain[:2]

    def rest(self, h):
        h = torch.tanh(self.hidden(h) * self.mask + self.shift + torch.arange(4.0))
        return self.last(h) + self.flat.view(len(h), 2, 2)[:, 1]


class Recurs(Base):
    def __init__(self):
        super().__init__(6)
        self.lstm = nn.LSTM(2, 5, 2, batch_first=True)

    def rest(self, h):
        y, (hidden, _) = self.lstm(h.view(-1, 3, 2))
        return y[:, -1] * hidden[0]


class Autocasts(Base):
    def rest(self, h):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return super().rest(h)


TAPED = [Base, Reshapes, WritesInPlace, TakesWhatIsFixed, Recurs, Autocasts]


class ReadsValues(Base):
    """Python code that depends on values of the samples."""

    def rest(self, h):
        h = torch.tanh(self.hidden(h))
        return self.last(h if float(h.sum()) < 1e9 else -h)


class Routes(Base):
    """A hard mixture of experts: which rows an expert gets depends on their values."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def rest(self, h):
        out, expert = torch.zeros(len(h), 2), h[:, :3].argmax(1)
        for number, each in enumerate(self.experts):
            rows = (expert == number).nonzero()[:, 0]
            out[rows] = torch.tanh(each(h[rows]))
        return out


class SelectsByMask(Base):
    def rest(self, h):
        out = self.hidden(h)
        positive = out[:, 0] > 0
        return self.last(torch.cat([out[positive], out[~positive]])) * 0 + self.last(torch.tanh(out))


class Scripted(Base):
    """A part whose functions a tape does not see."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.rand(2, 4))


REPLAYED = [ReadsValues, Routes, SelectsByMask, Scripted]


@pytest.fixture
def x():
    return torch.randn(11, 3)


def model_behind(model, h):
    model.prepare(torch.ones(len(h), 3))
    return model.rest(torch.tanh(h))


def truth(model, samples):
    with torch.no_grad():
        return reference.path_connectivity(lambda h: model_behind(model, h), samples, *UNIFORM)


@pytest.mark.parametrize("make", TAPED)
def test_a_tape_is_a_graph_with_the_numbers_of_the_model(make, x):
    model = make().eval()
    tail, samples = lmnfast.cut(model, "first", x)
    assert isinstance(tail, fx.GraphModule)
    with torch.no_grad():
        assert torch.equal(tail(samples), model(x))
        for rows in (1, 2, 3, 40):
            other = torch.randn(rows, samples.shape[1])
            expected = torch.cat([model_behind(model, row[None]) for row in other])
            assert torch.allclose(tail(other), expected, atol=1e-6), "another number of rows"
    assert (lmnfast.connectivity(tail, samples) - truth(model, samples)).abs().max() < 2e-5


@pytest.mark.parametrize("make", REPLAYED)
@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:f. cannot be evaluated in float64"
)
def test_what_depends_on_values_runs_with_a_hook_and_has_the_same_numbers(make, x):
    model = make().eval()
    tail, samples = lmnfast.cut(model, "first", x)
    assert isinstance(tail, HookTail) and tail.replays == "views"
    L = lmnfast.connectivity(tail, samples)
    tail.replays = None  # the whole model for each point
    assert torch.equal(L, lmnfast.connectivity(tail, samples))
    with torch.no_grad():
        expected = reference.path_connectivity(tail, samples, *UNIFORM)
    assert (L - expected).abs().max() < 1e-5


class Counts(nn.Module):
    """Two stages before the layer; only the second one's module is the layer."""

    def __init__(self):
        super().__init__()
        self.encoder, self.layer = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 4)
        self.table, self.last = nn.Embedding(5, 4), nn.Linear(4, 2)
        self.reads = True

    def forward(self, x):
        around = self.table(torch.arange(1)).expand(len(x), 4)
        h = torch.tanh(self.layer(self.encoder(x)) + around)
        return self.last(-h if self.reads and h.sum() > 1e9 else h)


def test_modules_before_the_layer_run_once_in_a_measurement(x):
    model, calls = Counts(), []
    encoder = model.encoder[0]
    tail, samples = lmnfast.cut(model, "layer", x)
    before = encoder.forward
    encoder.forward = lambda h: calls.append(len(h)) or before(h)
    assert isinstance(tail, HookTail)
    L = lmnfast.connectivity(tail, samples)
    assert calls == [1], "one sample"
    assert (L.double() - truth_of(model, samples)).abs().max() < 2e-5


def truth_of(model, samples):
    wide = copy.deepcopy(model).double()

    def f(h):
        return wide.last(torch.tanh(h + wide.table.weight[0]))

    with torch.no_grad():
        return reference.path_connectivity(f, samples.double(), *UNIFORM)


@pytest.mark.parametrize("reads", [True, False], ids=["hook", "tape"])
def test_a_tail_follows_the_training_also_of_what_goes_around_the_layer(reads, x):
    model = Counts()
    model.reads = reads
    tail, samples = lmnfast.cut(model, "layer", x)
    if not reads:  # only then is it no part of the graph
        model.reads = True
    first = lmnfast.connectivity(tail, samples)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.1)
    second = lmnfast.connectivity(tail, samples)
    assert (first - second).abs().max() > 1e-3
    assert (second.double() - truth_of(model, samples)).abs().max() < 2e-5


@pytest.mark.parametrize("make", [Base, TakesWhatIsFixed, Counts])
def test_a_tail_is_left_as_it_was_and_can_be_copied(make, x):
    model = make().eval()
    tail, samples = lmnfast.cut(model, "layer" if make is Counts else "first", x)
    forwards = [vars(part).get("forward") for part in tail.modules()]
    L = lmnfast.connectivity(tail, samples)
    assert [vars(part).get("forward") for part in tail.modules()] == forwards
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in tail.modules())
    assert torch.equal(lmnfast.connectivity(copy.deepcopy(tail), samples), L)
    if make is Base:
        assert torch.equal(lmnfast.connectivity(pickle.loads(pickle.dumps(tail)), samples), L)


def test_outside_of_a_measurement_a_hook_tail_runs_the_whole_model_with_gradients(x):
    tail, samples = lmnfast.cut(Counts(), "layer", x)
    with evaluating(tail) as kept:
        assert measurement_of(tail) is kept is measurement_of(tail.model.encoder)
    assert measurement_of(tail) is None
    tail(samples).sum().backward()
    assert tail.model.table.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["path", "hermite", "hermite-midpoint", "jacobian"])
@pytest.mark.parametrize("make", [Base, TakesWhatIsFixed])
def test_every_method_takes_such_tails(make, method, x):
    model = make().eval()
    tail, samples = lmnfast.cut(model, "first", x)

    def by_hand(h):
        return model_behind(model, h)

    L, expected = (lmnfast.connectivity(f, samples, method=method) for f in (tail, by_hand))
    assert (L - expected).abs().max() < 2e-5


class Mixing(Base):
    """Rows that depend on other rows: a tape for two samples is not one for more."""

    def rest(self, h):
        return self.last(torch.tanh(h - h.mean(0, keepdim=True)))


def test_a_model_that_mixes_its_samples_is_refused_as_before(x):
    tail, samples = lmnfast.cut(Mixing(), "first", x)
    with pytest.raises(ValueError, match="rows of a batch depend on each other"):
        lmnfast.connectivity(tail, samples)


def test_a_compiled_tail_is_compiled_once_for_all_tiles(x):
    torch._dynamo.reset()
    tail, samples = lmnfast.cut(TakesWhatIsFixed().eval(), "first", x)
    L, graphs = lmnfast.connectivity(tail, samples), CompileCounter()
    compiled = torch.compile(tail, backend=graphs, dynamic=True)
    assert torch.allclose(lmnfast.connectivity(compiled, samples, budget=10_000), L, atol=1e-6)
    assert graphs.frame_count == 1


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return torch.round(h * 4) / 4

    @staticmethod
    def backward(ctx, slope):
        return slope


def without_gradient(h):
    with torch.no_grad():
        return torch.exp(h)


def scripted(h):
    return torch.jit.trace(torch.tanh, torch.rand(2, 4))(h)


REFUSED = {
    "reads values of the network (__bool__)": lambda h: h if (h > -9).all() else -h,
    "reads values of the network (item)": lambda h: h * (1 if h.sum().item() < 1e9 else 2),
    "Can't call numpy() on Tensor that requires grad": lambda h: h + torch.from_numpy(h.numpy()),
    "reads values of the network (equal)": lambda h: h * (1 + torch.equal(h, -h)),
    "follow values of the network (nonzero)": lambda h: h + len((h > 9).nonzero()),
    "follow values of the network (where)": lambda h: h + len(torch.where(h > 9)[0]),
    "follow values of the network (one_hot)": lambda h: h + F.one_hot((h > 9).long()).shape[-1],
    "follow values of the network (__getitem__)": lambda h: h + len(h[h > 9]),
    "follow values of the network (repeat_interleave)": lambda h: (
        h + len(h.repeat_interleave((h[:, 0] > 9).int(), 0))
    ),
    "turns gradients off, or has a backward of its own": without_gradient,
    "turns gradients off, or has a backward of": StraightThrough.apply,
    "in other ways than by functions": lambda h: (
        torch.vmap(torch.sin)(h) if torch.vmap(torch.sin)(h).any() else h
    ),
    "sparse": lambda h: h + h.to_sparse().to_dense(),
    "follow values of the network (zeros)": lambda h: h + len(torch.zeros((h > 9).sum(), 1)),
    "runs differently on two samples and on three": lambda h: torch.stack([row * 2 for row in h]),
    "computes in other ways than by functions of torch": lambda h: h + scripted(h),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_tape_says_why_it_is_none(why, x):
    model = Base()
    model.rest = lambda h: model.last(REFUSED[why](torch.tanh(model.hidden(h))))
    tail, samples = lmnfast.cut(model.eval(), "first", x)
    assert isinstance(tail, HookTail) and why in tail.why
    with torch.no_grad():
        assert torch.equal(tail(samples), model(x))


def test_parts_that_leave_something_for_later_are_not_replayed(x):
    class Leaves(nn.Module):
        def forward(self, h):
            model.gain = model.table.weight[0].exp()
            return h

    model = Counts()
    model.encoder.append(Leaves())
    last = model.last
    model.last = nn.Sequential(last)
    model.last.register_forward_pre_hook(lambda module, args: (args[0] * model.gain,))
    model(x)
    tail, samples = lmnfast.cut(model, "layer", x)
    assert isinstance(tail, HookTail) and tail.replays is None
    with torch.no_grad():
        model.table.weight.add_(0.1)

    def by_hand(h):
        h = torch.tanh(h + model.table.weight[0]) * model.table.weight[0].exp()
        return last(h)

    L, expected = lmnfast.connectivity(tail, samples), lmnfast.connectivity(by_hand, samples)
    assert (L - expected).abs().max() < 1e-5


def test_a_tape_knows_no_autocast(x):
    tail, samples = lmnfast.cut(Autocasts().eval(), "first", x)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="expected to be cut in it"):
            tail(samples)
        tail, _ = lmnfast.cut(Base().eval(), "first", x)
        assert isinstance(tail, HookTail) and "autocast" in tail.why
