"""A measure as a term of a loss: value, gradient, what stays as it was, and how often a model is cut."""

import copy
import itertools
import pickle

import pytest
import torch
from graphs import DOUBLE, LOBATTO, assert_same_gradients, by_autograd, plain_r2
from support import mlp, samples
from torch import Tensor, nn

import lmnfast
from lmnfast import penalty as penalty_module

OF = ["pooled_curvature", "curvature", "lmn", "complexity_bits"]


class Classifier(nn.Module):
    """Tokens to logits; its tail behind "hidden" is a chain, or with a softmax none."""

    def __init__(self, softmax: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(7, 4), nn.Linear(12, 10)
        self.last, self.softmax, self.scale, self.stopped = nn.Linear(10, 5), softmax, 1.0, False

    def head(self, tokens: Tensor) -> Tensor:
        return self.hidden(self.embedding(tokens).flatten(1))

    def tail(self, h: Tensor) -> Tensor:
        if self.stopped:
            h = h.detach()
        y = self.last(torch.tanh(self.scale * h) if self.scale != 1.0 else torch.tanh(h))
        return torch.softmax(y, 1) if self.softmax else y

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tail(self.head(tokens))


TOKENS = torch.randint(7, (9, 3), generator=torch.Generator().manual_seed(1))


def entropy(L: Tensor) -> Tensor:
    p = torch.linalg.eigvalsh(L).abs()
    p = p / p.sum()
    return -(p * torch.log2(p)).sum()


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("of", OF)
def test_value_and_gradient_are_those_of_autograd_through_the_whole_model(of, softmax):
    model = Classifier(softmax).double()
    penalty = lmnfast.Penalty(model, "hidden", of=of, weight=0.3)
    value = penalty(TOKENS)
    assert value.dim() == 0 and value.dtype == DOUBLE
    own = torch.autograd.grad(value, list(model.parameters()))

    h = model.head(TOKENS)
    first, second = torch.triu_indices(9, 9, 1)
    r2 = plain_r2(model.tail, h, first, second, pooled=of == "pooled_curvature")
    if "curvature" in of:
        measure = (1 - r2).mean()
    else:
        L = torch.eye(9, dtype=DOUBLE).index_put((first, second), r2).index_put((second, first), r2)
        measure = entropy(L) if of == "complexity_bits" else torch.exp2(entropy(L))
    expected = torch.autograd.grad(0.3 * measure, list(model.parameters()))
    assert float(value.detach()) == pytest.approx(0.3 * float(measure.detach()), rel=1e-10)
    assert (
        float(penalty.value) == pytest.approx(float(measure.detach()), rel=1e-10)
        and not penalty.value.requires_grad
    )
    assert_same_gradients(own, expected, 1e-9)


@pytest.mark.parametrize("softmax", [False, True])
def test_the_value_is_that_of_a_measurement(softmax):
    model = Classifier(softmax)
    tail, h = lmnfast.cut(model, "hidden", TOKENS)
    for of in OF:
        penalty = lmnfast.Penalty(model, "hidden", of=of)
        assert penalty(TOKENS).dtype == torch.float32
        if "curvature" in of:
            assert (
                float(penalty.value) == lmnfast.curvature(tail, h, pooled=of != "curvature", **LOBATTO).value
            )
        else:
            m = lmnfast.measure(tail, h, **LOBATTO)
            assert float(penalty.value) == pytest.approx(getattr(m, of), rel=1e-12)


def test_pairs_are_drawn_anew_at_each_call():
    model = Classifier()
    tail, h = lmnfast.cut(model, "hidden", TOKENS)
    penalty = lmnfast.Penalty(model, "hidden", pairs=5, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    values = []
    for _ in range(3):
        penalty(TOKENS).backward()
        values.append(float(penalty.value))
    assert values == [
        lmnfast.curvature(tail, h, pairs=5, generator=generator, **LOBATTO).value for _ in range(3)
    ]
    assert len(set(values)) == 3 and model.embedding.weight.grad.any()


def test_on_steps_that_are_not_due_it_is_zero_without_a_graph():
    model = Classifier()
    penalty = lmnfast.Penalty(model, "hidden", every=3)
    seen = []
    for step in range(7):
        value = penalty(TOKENS)
        seen.append(value.requires_grad)
        assert penalty.step == step + 1 and (value.requires_grad or float(value) == 0)
        if step == 0:
            last = float(penalty.value)
        assert float(penalty.value) == last
    assert seen == [True, False, False, True, False, False, True]
    with torch.no_grad():
        assert not penalty(TOKENS)  # step 7 is not due, so nothing is asked for


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.ReLU(), nn.Linear(9, 4)
        )
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


@pytest.mark.parametrize("layer", ["net.0", "net.1", ""])
def test_a_training_model_stays_as_it_was(layer):
    model, x = Noisy().train(), samples(8, 6)
    model(x)
    state, rng, grads = (
        copy.deepcopy(model.state_dict()),
        torch.get_rng_state(),
        [p.grad for p in model.parameters()],
    )
    penalty = lmnfast.Penalty(model, layer)
    value = penalty(x)
    value.backward()
    assert all(part.training for part in model.modules()) and model.calls == 1
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and grads == [None] * len(grads)
    assert not any(part._forward_hooks for part in model.modules())
    assert model.net[0].weight.grad.any() or (layer == "net.0" and model.net[4].weight.grad.any())


def test_the_gradient_also_reaches_inputs_that_require_grad():
    model, x = mlp(6, 9, 8, 4).double(), samples(7, 6, dtype=DOUBLE).requires_grad_()
    lmnfast.Penalty(model, None, of="curvature")(x).backward()
    gradient = torch.full((7, 7), -1 / 42, dtype=DOUBLE)
    assert_same_gradients([x.grad], by_autograd(model, x, gradient, [x]), 1e-10)


def count_cuts(monkeypatch) -> list[str]:
    cuts: list[str] = []

    def counted(model, name, *rest):
        cuts.append(name)
        return cut_at(model, name, *rest)

    cut_at = penalty_module.cut_at
    monkeypatch.setattr(penalty_module, "cut_at", counted)
    return cuts


@pytest.mark.parametrize("softmax", [False, True])
def test_a_cut_is_kept_while_the_model_trains(softmax, monkeypatch):
    cuts = count_cuts(monkeypatch)
    model = Classifier(softmax)
    penalty, optimizer = lmnfast.Penalty(model, "hidden"), torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        model.train(step % 2 == 0)
        optimizer.zero_grad()
        (model(TOKENS).square().mean() + penalty(TOKENS)).backward()
        optimizer.step()
        tail, h = lmnfast.cut(model, "hidden", TOKENS)
        penalty(TOKENS)
        assert float(penalty.value) == lmnfast.curvature(tail, h, **LOBATTO).value
    assert cuts == ["hidden"]


def test_a_model_that_has_changed_is_cut_again(monkeypatch):
    cuts = count_cuts(monkeypatch)
    model = Classifier()
    penalty = lmnfast.Penalty(model, "hidden")

    def gradient() -> Tensor:
        model.zero_grad()
        penalty(TOKENS).backward()
        tail, h = lmnfast.cut(model, "hidden", TOKENS)
        assert float(penalty.value) == lmnfast.curvature(tail, h, **LOBATTO).value
        return model.embedding.weight.grad

    first = gradient().clone()
    model.scale = 2.0  # a constant of the graph
    assert not torch.equal(gradient(), first)
    model.scale, model.last = 1.0, nn.Linear(10, 5)
    gradient()
    penalty(TOKENS[:7])
    assert len(cuts) == 4
    model.stopped = True  # the same outputs, and another derivative
    model.zero_grad()
    penalty(TOKENS[:7]).backward()
    assert len(cuts) == 5 and not (
        model.embedding.weight.grad is not None and model.embedding.weight.grad.any()
    )
    assert model.last.weight.grad.any()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last((self.hidden(x) * mask).tanh())


def test_other_inputs_than_the_samples_are_those_of_the_call():
    model, x = Masked().double(), samples(8, 6, dtype=DOUBLE)
    penalty = lmnfast.Penalty(model, "hidden", of="curvature")
    gradient = torch.full((8, 8), -1 / 56, dtype=DOUBLE)
    for mask in (torch.ones(9, dtype=DOUBLE), torch.arange(9, dtype=DOUBLE)):
        own = torch.autograd.grad(penalty({"x": x, "mask": mask}), [model.hidden.weight, model.last.weight])
        h = model.hidden(x)
        total = by_autograd(
            lambda h, m=mask: model.last((h * m).tanh()),
            h,
            gradient,
            [model.hidden.weight, model.last.weight],
        )
        assert_same_gradients(own, total, 1e-10)


def test_under_autocast_it_is_computed_in_float32():
    model = Classifier()
    penalty = lmnfast.Penalty(model, "hidden")
    expected = penalty(TOKENS)
    expected.backward()
    before = model.embedding.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS).float().square().mean()
        value = penalty(TOKENS)
    assert torch.equal(value, expected) and value.dtype == torch.float32
    value.backward()
    assert torch.equal(model.embedding.weight.grad, before) and loss.isfinite()


@pytest.mark.parametrize("softmax", [False, True])
def test_a_grad_scaler_scales_its_gradient(softmax):
    model = Classifier(softmax)
    penalty, parameters = lmnfast.Penalty(model, "hidden"), list(model.parameters())
    plain = torch.autograd.grad(penalty(TOKENS), parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(parameters, 0.1)
    scaler.scale(penalty(TOKENS)).backward()
    scaler.unscale_(optimizer)
    for p, g in zip(parameters, plain, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)


def test_it_makes_a_network_straighter_without_shrinking_its_outputs():
    model, x = mlp(6, 20, 20, 3, activation=nn.Tanh, gain=2.0), samples(24, 6)
    penalty, optimizer = lmnfast.Penalty(model, "", weight=1.0), torch.optim.SGD(model.parameters(), 0.3)
    size = float(model(x).detach().std())
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        penalty(x).backward()
        optimizer.step()
        values.append(float(penalty.value))
    assert values[-1] < 0.5 * values[0]
    assert float(model(x).detach().std()) > 0.5 * size


def test_a_negative_weight_and_one_that_a_schedule_changes():
    model = Classifier()
    penalty = lmnfast.Penalty(model, "hidden", weight=-2)
    first = float(penalty(TOKENS).detach())
    penalty.weight = 0.5
    assert first == pytest.approx(-4 * float(penalty(TOKENS).detach()))


def test_a_compiled_model_and_a_data_parallel_one():
    model = Classifier()
    expected = torch.autograd.grad(lmnfast.Penalty(model, "hidden")(TOKENS), list(model.parameters()))
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        own = torch.autograd.grad(lmnfast.Penalty(wrapped, "hidden")(TOKENS), list(model.parameters()))
        assert_same_gradients(own, expected, 1e-6)


@pytest.mark.parametrize("find_unused", [False, True])
def test_the_processes_of_ddp_have_the_gradient_of_loss_and_penalty(find_unused, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = Classifier()
        (model(TOKENS).square().mean() + lmnfast.Penalty(model, "hidden")(TOKENS)).backward()
        expected = [p.grad.clone() for p in model.parameters()]
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
        penalty = lmnfast.Penalty(wrapped, "hidden")
        for _ in range(2):
            model.zero_grad()
            (wrapped(TOKENS).square().mean() + penalty(TOKENS)).backward()
            assert_same_gradients([p.grad for p in model.parameters()], expected, 1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_copies_are_penalties_of_the_copied_model():
    model = Classifier()
    penalty = lmnfast.Penalty(model, "hidden", weight=0.5)
    value = float(penalty(TOKENS).detach())
    for copied in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert copied.model is not model and copied.step == 1
        assert float(copied(TOKENS).detach()) == value
        with torch.no_grad():
            copied.model.last.weight.zero_()
    assert float(penalty(TOKENS).detach()) == value


M = Classifier()
ERRORS = {
    "of": (ValueError, "of: expected one of", lambda: lmnfast.Penalty(M, "hidden", of="curve")),
    "model": (TypeError, "model: expected an nn.Module", lambda: lmnfast.Penalty(M.forward, "hidden")),
    "pairs of lmn": (
        ValueError,
        "pairs: expected None",
        lambda: lmnfast.Penalty(M, "hidden", of="lmn", pairs=4),
    ),
    "too many pairs": (
        ValueError,
        "pairs: expected 2 to 36",
        lambda: lmnfast.Penalty(M, "hidden", pairs=40)(TOKENS),
    ),
    "weight": (
        ValueError,
        "weight: expected a finite",
        lambda: lmnfast.Penalty(M, "hidden", weight=float("nan")),
    ),
    "weight's type": (
        TypeError,
        "weight: expected a number",
        lambda: lmnfast.Penalty(M, "hidden", weight="1"),
    ),
    "every": (ValueError, "every: expected", lambda: lmnfast.Penalty(M, "hidden", every=0)),
    "generator": (TypeError, "generator: expected", lambda: lmnfast.Penalty(M, "hidden", generator=3)),
    "layer": (ValueError, "hiden", lambda: lmnfast.Penalty(M, "hiden")),
    "tokens": (TypeError, "integers", lambda: lmnfast.Penalty(M)(TOKENS)),
    "one sample": (ValueError, "two samples", lambda: lmnfast.Penalty(M, "hidden")(TOKENS[:1])),
    "frozen": (
        RuntimeError,
        "no graph",
        lambda: lmnfast.Penalty(copy.deepcopy(M).requires_grad_(False), "hidden")(TOKENS),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_named(name):
    error, message, call = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_gradients_must_be_on():
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(RuntimeError, match="gradients on"):
            lmnfast.Penalty(M, "hidden")(TOKENS)


def test_parameters_behind_the_layer_alone_or_in_front_of_it_alone_may_be_trained():
    for frozen, layer in itertools.product(("last", "hidden"), ("hidden",)):
        model = Classifier()
        getattr(model, frozen).requires_grad_(False)
        lmnfast.Penalty(model, layer)(TOKENS).backward()
        assert model.embedding.weight.grad.any() and getattr(model, frozen).weight.grad is None
