"""Samples along other dimensions than the first: named by batch_dim, or found by calls on some of the samples."""

import pytest
import torch
from architectures import FLOAT32, truth
from torch import nn

import lmnfast
from lmnfast._hook_tail import HookTail
from lmnfast._layout import MOST_READINGS
from lmnfast.checkpoints import first_samples, measure_checkpoints
from lmnfast.integrations.common import Plan, new_state

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


def recurrent(kind):
    return lambda batch_first: kind(6, 6, 2, batch_first=batch_first)


def encoder(batch_first):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=batch_first), 2)


MIXERS = {"lstm": recurrent(nn.LSTM), "gru": recurrent(nn.GRU), "encoder": encoder}


class Sequence(nn.Module):
    """Linear, a mixer along time, Linear, on (T, N, 6), or (N, T, 6) with batch_first."""

    def __init__(self, mixer="lstm", batch_first=False, last=True, depends=False):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.mixer, self.head = nn.Linear(6, 6), MIXERS[mixer](batch_first), nn.Linear(6, 3)
        self.batch_first, self.last, self.depends = batch_first, last, depends

    def forward(self, x, *others):
        mixed = self.mixer(self.first(x), *others)
        hidden = mixed[0] if isinstance(self.mixer, nn.RNNBase) else mixed
        if self.depends and float(hidden.sum()) > 1e9:  # no graph of such a model
            return x
        if self.last:
            hidden = hidden[:, -1] if self.batch_first else hidden[-1]
        return self.head(hidden)


def samples(rows=7, time=5):
    return torch.randn(rows, time, 6, generator=torch.Generator().manual_seed(0))


def L(*args, **settings):
    return lmnfast.connectivity(*lmnfast.cut(*args, **settings))


def test_a_two_layer_lstm_is_measured_as_the_definition_says():
    model, x = Sequence(last=False), samples()
    tail, h = lmnfast.cut(model, "first", x.transpose(0, 1), batch_dim=1)
    assert torch.equal(h, model.first(x))
    assert torch.equal(tail(h), model(x.transpose(0, 1)).transpose(0, 1))
    exact = Sequence(last=False).double()
    expected = truth(lambda h: exact.head(exact.mixer(h.transpose(0, 1))[0]).transpose(0, 1), h)
    assert (lmnfast.connectivity(tail, h) - expected).abs().max() < FLOAT32 and expected.min() < 0.99


@pytest.mark.parametrize("time", [5, 7])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("depends", [False, True])
def test_a_batch_second_model_has_the_numbers_of_the_batch_first_model(mixer, last, time, depends):
    x = samples(time=time)
    first, second = (Sequence(mixer, batch_first, last, depends) for batch_first in (True, False))
    layers = ["first", "mixer.layers.0"] if mixer == "encoder" else ["first"]
    for layer in layers:
        expected = L(first, layer, x)
        tail, h = lmnfast.cut(second, layer, x.transpose(0, 1), batch_dim=1)
        assert isinstance(tail, HookTail) is depends and h.shape == (7, time, 6)
        assert (lmnfast.connectivity(tail, h) - expected).abs().max() < 1e-6 and expected.min() < 0.99


def test_an_attention_of_torch_as_it_is_by_default():
    class Attending(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            torch.manual_seed(4)
            self.first = nn.Linear(6, 6)
            self.layer = nn.TransformerDecoderLayer(6, 2, 12, batch_first=batch_first)

        def forward(self, x, memory):
            return self.layer(self.first(x), memory)

    x, memory = samples(), torch.randn(1, 4, 6)
    expected = L(Attending(True), "first", (x, memory.expand(7, 4, 6)))
    measured = L(
        Attending(False), "first", (x.transpose(0, 1), memory.transpose(0, 1).expand(4, 7, 6)), batch_dim=1
    )
    assert (measured - expected).abs().max() < 1e-6 and expected.min() < 0.999


class TimeFirst(nn.Module):
    """Takes (N, T, 6), and has time as first dimension inside. The output is (N, 3), or (T, N, 3)."""

    def __init__(self, last=True):
        super().__init__()
        self.inner = Sequence(last=last)

    def forward(self, x):
        return self.inner(x.transpose(0, 1))


def test_samples_are_found_where_shapes_show_that_they_are_not_in_front():
    x = samples()
    expected = L(Sequence(batch_first=True), "first", x)
    for model, layer, inputs in (
        (Sequence(), "first", x.transpose(0, 1)),  # the layer's output and the inputs, not the model's output
        (TimeFirst(), "inner.first", x),  # the layer's output alone
    ):
        tail, h = lmnfast.cut(model, layer, inputs)
        assert h.shape == (7, 5, 6) and (lmnfast.connectivity(tail, h) - expected).abs().max() < 1e-6
    tail, h = lmnfast.cut(nn.Sequential(nn.Identity(), TimeFirst(False)), "0", x)  # the model's output alone
    assert torch.equal(h, x) and torch.equal(tail(x), TimeFirst(False)(x).transpose(0, 1))
    assert lmnfast.connectivity(tail, h).min() < 0.99


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_what_shapes_do_not_show_is_refused_and_the_refusal_names_batch_dim(batch_dim):
    for rows, model in ((7, Sequence(last=False)), (5, Sequence(last=False))):
        with pytest.raises(ValueError, match="f: gives other outputs .* lmnfast.cut takes batch_dim=1"):
            L(model, "first", samples(rows).transpose(0, 1), batch_dim=batch_dim)
    with pytest.raises(ValueError, match=r"f: expected outputs .* those along another by batch_dim="):
        L(Sequence(), "first", samples(5).transpose(0, 1), batch_dim=batch_dim)
    with pytest.raises(ValueError, match=r"f: .* the first dimension \(batch_first=True\)"):
        L(TimeFirst(), "inner.first", samples(7, 7), batch_dim=batch_dim)


def test_batch_dim_holds_where_the_samples_lie_along_it():
    """With as many times as samples no shape says that inputs and output have the samples first, the layer second."""
    x = samples(7, 7)
    measured = L(TimeFirst(), "inner.first", x, batch_dim=1)
    assert (measured - L(Sequence(batch_first=True), "first", x)).abs().max() < 1e-6
    square = Sequence()
    square.head = nn.Linear(6, 7)  # (N, 7), with samples in front
    tail, h = lmnfast.cut(square, "first", x.transpose(0, 1), batch_dim=1)
    assert torch.equal(tail(h), square(x.transpose(0, 1)))


@pytest.mark.parametrize("time", [5, 7])
def test_a_padding_mask_beside_a_batch_second_model_keeps_its_own_dimension(time):
    x, padded = samples(time=time), torch.zeros(7, time, dtype=torch.bool)
    padded[:, 1] = True

    def forward(model, inputs):
        x, padded = inputs
        return model.head(model.mixer(model.first(x), src_key_padding_mask=padded))

    expected = L(Sequence("encoder", True), "mixer.layers.0", (x, padded), forward=forward)
    inputs = (x.transpose(0, 1), padded)
    measured = L(Sequence("encoder"), "mixer.layers.0", inputs, forward=forward, batch_dim=1)
    assert (measured - expected).abs().max() < 1e-6 and expected.min() < 0.999
    unmasked = (x.transpose(0, 1), torch.zeros_like(padded))
    unpadded = L(Sequence("encoder"), "mixer.layers.0", unmasked, forward=forward, batch_dim=1)
    assert (measured - unpadded).abs().max() > 1e-4
    padded[4:, 2] = True
    message = r"through the input \[1\], not the same .* largest such group has 4 of 7 samples, sample 0 and"
    with pytest.raises(ValueError, match=message.replace(r"\[1\]", "1")):
        L(Sequence("encoder"), "mixer.layers.0", inputs, forward=forward, batch_dim=1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_state_of_each_sample_has_its_samples_second(batch_first):
    x = samples() if batch_first else samples().transpose(0, 1)
    state = torch.randn(2, 1, 6).expand(2, 7, 6)
    settings = {} if batch_first else {"batch_dim": 1}
    model, h = Sequence("gru", batch_first), Sequence("gru").first(samples())
    tail, found = lmnfast.cut(model, "first", (x, state), **settings)
    assert torch.equal(found, h)
    exact = Sequence("gru", True).double()

    def f(h):
        return exact.head(exact.mixer(h, state[:, :1].double().expand(2, len(h), 6).contiguous())[0][:, -1])

    expected = truth(f, h)
    assert (lmnfast.connectivity(tail, h) - expected).abs().max() < FLOAT32 and expected.min() < 0.99
    message = (
        "hidden state or a mask may have that of one batch"
        if batch_first
        else "through the input 1, not the same"
    )
    with pytest.raises(ValueError, match=message):
        L(model, "first", (x, torch.randn(2, 7, 6)), forward=lambda m, inputs: m(*inputs), **settings)


def test_where_no_samples_lie_is_an_error_that_says_why():
    x = samples()
    message = (
        r"batch_dim: .* got 2: along dimension 2 .* 6 samples, and not in both the layer's output \(5, 7, 6\) and the model's "
        r"\(5, 7, 3\); along dimension 0 .* 5 samples; called on 4 of them the model gives them other outputs"
    )
    with pytest.raises(ValueError, match=message):
        lmnfast.cut(Sequence(last=False), "first", x.transpose(0, 1), batch_dim=2)
    with pytest.raises(
        ValueError, match=r"batch_dim: expected a dimension along which the samples lie, got 4"
    ):
        lmnfast.cut(Sequence(last=False), "first", x.transpose(0, 1), batch_dim=4)
    random = Sequence(last=False)
    random.head = nn.Sequential(random.head, Noise())
    with pytest.raises(
        ValueError,
        match="batch_dim: .* gives them other outputs: they depend on each other, or",
    ):
        lmnfast.cut(random, "first", x.transpose(0, 1), batch_dim=1)
    message = r"model: its output has shape \(5, 7, 3\) for 7 inputs; .* batch_dim= names, .*gives them other outputs"
    with pytest.raises(ValueError, match=message):
        lmnfast.cut(nn.Sequential(nn.Identity(), TimeFirst(False), Noise()), "0", x)
    fixed = nn.Sequential(nn.Identity(), TimeFirst(False), Fixed())
    with pytest.raises(
        ValueError, match=r"model: .* called on 6 of them the model fails \(RuntimeError: The size of tensor"
    ):
        lmnfast.cut(fixed, "0", x)
    for wrong, error in (("1", TypeError), (True, TypeError), (-1, ValueError)):
        with pytest.raises(error, match="^batch_dim: expected"):
            lmnfast.cut(Sequence(), "first", x, batch_dim=wrong)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Fixed(nn.Module):
    """For seven samples alone."""

    def forward(self, x):
        return x + torch.zeros(7, 1)


def test_one_and_two_samples_are_found_too():
    for rows in (1, 2):
        tail, h = lmnfast.cut(Sequence(last=False), "first", samples(rows).transpose(0, 1), batch_dim=1)
        assert h.shape == (rows, 5, 6) and lmnfast.connectivity(tail, h).shape == (rows, rows)


def test_many_square_inputs_are_read_in_few_calls():
    """Each of the inputs may have its samples along either dimension, or be the same for all samples: 3 ** 6 readings."""

    class Summing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.calls = nn.Linear(6, 6), []

        def forward(self, x, *others):
            COUNTED.append(None)
            return (self.first(x) + sum(other.sum() for other in others)).transpose(0, 1)

    COUNTED.clear()
    with pytest.raises(ValueError, match="batch_dim"):
        lmnfast.cut(Summing(), "first", (samples(7, 7), *torch.randn(6, 7, 7)), batch_dim=1)
    assert MOST_READINGS < len(COUNTED) <= 1 + 2 * MOST_READINGS


COUNTED: list[None] = []


def test_a_probe_measures_along_batch_dim_and_leaves_the_training_as_it_was():
    x = samples().transpose(0, 1)
    models = [Sequence(last=False) for _ in range(2)]
    optimisers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    with lmnfast.Probe(models[0], x, ["first", "mixer"], every=1, batch_dim=1) as probe:
        for step in range(2):
            expected = [
                float(lmnfast.lmn(*lmnfast.cut(models[1], layer, x, batch_dim=1))) for layer in probe.layers
            ]
            probe(step)
            assert [row["lmn"] for row in probe.history[-2:]] == pytest.approx(expected, rel=1e-12)
            for model, optimiser in zip(models, optimisers):
                optimiser.zero_grad()
                model(x).square().mean().backward()
                optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert probe.history[0]["lmn"] > 1.0 and probe.history[0]["lmn"] != probe.history[2]["lmn"]


def test_a_callback_hands_batch_dim_to_its_probe():
    model, x = Sequence(last=False), samples().transpose(0, 1)
    plan = Plan(x, "first", 1, {"batch_dim": 1})
    with plan.probe(model, lambda tensor: tensor, 0, new_state(), lambda step, values: None) as probe:
        probe(0)
    expected = float(lmnfast.lmn(*lmnfast.cut(model, "first", x, batch_dim=1)))
    assert probe.history[0]["lmn"] == pytest.approx(expected, rel=1e-12) and plan.identity["batch_dim"] == 1


def test_explain_and_stacked_networks_take_batch_dim(capsys):
    x, models = samples().transpose(0, 1), [Sequence(last=False), Sequence(last=False)]
    route = lmnfast.explain(models[0], "first", x, batch_dim=1)["first"]
    assert route.samples == (7, 5, 6) and "7 samples of shape (5, 6)" in capsys.readouterr().out
    torch.nn.init.normal_(models[1].head.weight)
    stacked = torch.func.stack_module_state(models)
    _, h = lmnfast.cut(models[0], "first", x, stacked=stacked, batch_dim=1)
    assert h.shape == (2, 7, 5, 6)
    torch.testing.assert_close(h[1], lmnfast.cut(models[1], "first", x, batch_dim=1)[1])


def test_checkpoints_are_measured_along_batch_dim(tmp_path):
    model, x = Sequence(last=False), samples().transpose(0, 1)
    torch.save(model.state_dict(), tmp_path / "step_3.pt")
    settings = {"batch_dim": 1, "out": tmp_path / "out", "device": "cpu"}
    (row,) = measure_checkpoints(lambda: Sequence(last=False), tmp_path / "step_3.pt", x, "first", **settings)
    assert row["lmn_first"] == pytest.approx(
        float(lmnfast.lmn(*lmnfast.cut(model, "first", x, batch_dim=1))), rel=1e-6
    )
    with pytest.raises(ValueError, match="batch_dim"):
        settings = {"batch_dim": 2, "out": tmp_path / "out", "device": "cpu"}
        measure_checkpoints(lambda: Sequence(last=False), tmp_path / "step_3.pt", x, "first", **settings)
    shapes = [tuple(t.shape) for t in first_samples((x, torch.zeros(7, 2), torch.zeros(3)), 4, batch_dim=1)]
    assert shapes == [(5, 4, 6), (4, 2), (3,)]


@pytest.mark.parametrize("depends", [False, True])
@pytest.mark.parametrize(
    "layer, until", [("first", "mixer.layers.1"), ("inputs", "mixer.layers.0"), ("inputs", None)]
)
def test_the_dimension_holds_from_layer_to_layer_and_from_the_inputs_on(layer, until, depends):
    x = samples()
    first, second = (Sequence("encoder", batch_first, True, depends).eval() for batch_first in (True, False))
    expected = L(first, layer, x, until=until)
    tail, h = lmnfast.cut(second, layer, x.transpose(0, 1), until=until, batch_dim=1)
    known, rows = lmnfast.cut(first, layer, x, until=until)
    with torch.no_grad():
        assert torch.allclose(h, rows, atol=1e-6) and torch.allclose(tail(h), known(rows), atol=1e-6)
    assert (lmnfast.connectivity(tail, h) - expected).abs().max() < FLOAT32
    with lmnfast.Probe(second, x.transpose(0, 1), layer, until=until, batch_dim=1) as probe:
        probe(0)
        probe(100)
    lmns = [row["lmn"] for row in probe.history]
    assert lmns == pytest.approx([float(lmnfast.lmn(known, rows))] * 2, rel=1e-4)


@pytest.mark.parametrize("named", [1, None])
def test_states_beside_replaced_inputs_keep_their_own_dimension(named):
    model, x = Sequence(), samples(rows=7, time=5)
    state = torch.randn(2, 1, 6).expand(-1, 7, -1).contiguous()
    inputs = {"x": x.transpose(0, 1), "state": state}

    def forward(model, inputs):
        return model(inputs["x"], (inputs["state"], inputs["state"]))

    tail, h = lmnfast.cut(model, "inputs", inputs, forward=forward, batch_dim=named)
    assert torch.equal(h, x) and torch.allclose(tail(x), forward(model, inputs), atol=1e-6)
    assert torch.allclose(tail(x[:3]), forward(model, inputs)[:3], atol=1e-6)


def test_a_block_takes_no_batch_dim(tmp_path):
    model, x = Sequence("encoder"), samples().transpose(0, 1)
    torch.save(model.state_dict(), tmp_path / "step_0.pt")
    calls = [
        lambda: lmnfast.cut(model, block="mixer", inputs=x, batch_dim=1),
        lambda: lmnfast.explain(model, block="mixer.layers.*", inputs=x, batch_dim=1),
        lambda: lmnfast.explain(model, block="mixer", batch_dim=1),
        lambda: lmnfast.Probe(model, x, blocks="mixer.layers.*", batch_dim=1),
        lambda: measure_checkpoints(
            lambda: Sequence("encoder"), tmp_path / "step_0.pt", x, blocks="mixer", batch_dim=1
        ),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match="^batch_dim: expected with a layer alone, got 1 with block, whose samples"
        ):
            call()
    with pytest.raises(ValueError, match="expected one row per input") as refused:
        lmnfast.cut(model, block="mixer", inputs=x, output=lambda y: y.transpose(0, 1))
    assert "batch_dim" not in str(refused.value)


def test_a_skip_connection_around_a_layer_gets_advice_that_its_dimension_allows():
    first, second = Sequence("encoder", True), Sequence("encoder")
    x, layer = samples(), "mixer.layers.0.linear1"
    with pytest.raises(ValueError, match="as 'mixer.layers.0' is; block='mixer.layers.0.linear1' measures"):
        lmnfast.cut(first, layer, x)
    with pytest.raises(ValueError, match="as 'mixer.layers.0' is; until= ends a map before") as refused:
        lmnfast.cut(second, layer, x.transpose(0, 1), batch_dim=1)
    assert "block=" not in str(refused.value)


@pytest.mark.parametrize("until", [None, "layers.1"])
@pytest.mark.parametrize("layer", ["layers.0", "inputs"])
def test_a_mask_of_samples_first_beside_samples_second(layer, until):
    model = encoder(False).eval()
    inputs = {"x": samples().transpose(0, 1), "mask": torch.zeros(7, 5, dtype=torch.bool)}

    def forward(model, inputs):
        return model(inputs["x"], src_key_padding_mask=inputs["mask"])

    inputs["mask"][:, 4] = True
    tail, h = lmnfast.cut(model, layer, inputs, forward=forward, until=until, batch_dim=1)
    with torch.no_grad():
        expected = forward(model, inputs).transpose(0, 1)
        assert torch.allclose(tail(h[:3]), expected[:3], atol=1e-6)
    inputs["mask"][3:, 3] = True
    what = "the model's output" if until is None else "the output of 'layers.1'"
    with pytest.raises(
        ValueError, match=f"^layer: {what} depends .* the input 'mask', not the same for all samples"
    ):
        lmnfast.cut(model, layer, inputs, forward=forward, until=until, batch_dim=1)
