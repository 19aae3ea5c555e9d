"""The paper's networks, at initialisation and after memorisation, and limit cases: 1, never NaN, never noise."""

import copy

import pytest
import torch
from networks import counted, inputs, mlp
from support import UNIFORM
from torch import nn

import lmnfast
from lmnfast import reference
from lmnfast.grokking.model import make_model
from lmnfast.grokking.tasks import make_task


@pytest.fixture(scope="module", params=[nn.SiLU, nn.GELU, nn.Tanh, nn.ReLU])
def memorised(request):
    """(activation, tail before training, its samples, tail at train accuracy 1, its samples); modular addition."""
    generator = torch.Generator().manual_seed(0)
    task = make_task("modular-addition", generator)
    model = make_model(task.vocabulary, generator)
    model.hidden_1, model.hidden_2 = request.param(), request.param()
    before = lmnfast.cut(copy.deepcopy(model), "hidden_1", task.train_inputs)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.2)
    for _ in range(1000):
        logits = model(task.train_inputs)
        if (logits.argmax(1) == task.train_labels).all():
            break
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits, task.train_labels).backward()
        optimiser.step()
    else:
        pytest.fail("did not memorise")
    return request.param, before, lmnfast.cut(model, "hidden_1", task.train_inputs)


def test_float32_is_right_to_2e_5_on_the_papers_networks(memorised):
    for tail, samples in memorised[1:]:
        x = samples[::7]
        ours = lmnfast.connectivity(tail, x)
        wide = copy.deepcopy(tail).double()
        with torch.no_grad():
            truth = reference.path_connectivity(wide, x.double(), *UNIFORM)
            plain = reference.path_connectivity(tail, x, *UNIFORM)
        assert truth.min() < 0.9
        error = (ours - truth).abs().max()
        assert error < 2e-5 and error <= 2 * (plain - truth).abs().max()
        assert (lmnfast.connectivity(wide, x.double()) - truth).abs().max() < 1e-12


def test_nine_lobatto_points_give_the_lmn_of_memorised_networks(memorised):
    activation, _, (tail, samples) = memorised
    exact = lmnfast.lmn(tail, samples)
    lobatto = lmnfast.lmn(tail, samples, rule="lobatto", points=9)
    assert 10 < exact < 768
    assert abs(lobatto / exact - 1) < (2e-3 if activation is nn.ReLU else 5e-4)


@pytest.mark.parametrize("wrap", [lambda net: net, counted], ids=["fused", "generic"])
class TestLimits:
    def test_one_sample_has_lmn_one(self, wrap):
        assert lmnfast.lmn(wrap(mlp(5, 9, 3)), inputs(1, 5)).item() == 1

    def test_an_affine_network_has_lmn_one(self, wrap):
        # float32 rounding where an output hardly changes between two samples leaves a few 1e-5 in the generic route.
        assert lmnfast.lmn(wrap(mlp(5, 3)), inputs(60, 5)).item() == pytest.approx(1, abs=1e-3)

    def test_one_output(self, wrap):
        net, x = mlp(5, 9, 1).double(), inputs(12, 5).double()
        with torch.no_grad():
            truth = reference.path_connectivity(net, x, *UNIFORM)
        assert (lmnfast.connectivity(wrap(net), x) - truth).abs().max() < 1e-11

    def test_coincident_samples(self, wrap):
        x = inputs(5, 6).repeat(3, 1)
        L = lmnfast.connectivity(wrap(mlp(6, 20, 20, 4)), x)
        assert (L[:5, 5:10].diagonal() == 1).all() and (L[:5, 10:].diagonal() == 1).all()

    def test_all_samples_the_same(self, wrap):
        x = inputs(1, 6).expand(9, 6)
        assert lmnfast.lmn(wrap(mlp(6, 20, 4)), x).item() == pytest.approx(1, abs=1e-12)

    def test_a_constant_network(self, wrap):
        net = mlp(6, 20, 4)
        with torch.no_grad():
            net[2].weight.zero_()
        assert (lmnfast.connectivity(wrap(net), inputs(20, 6)) == 1).all()

    def test_dead_relu_units(self, wrap):
        net = mlp(6, 20, 4, activation=nn.ReLU)
        with torch.no_grad():
            net[0].bias.fill_(-1e3)
        assert (lmnfast.connectivity(wrap(net), inputs(20, 6)) == 1).all()

    @pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
    def test_saturated_units(self, activation, wrap):
        net = mlp(6, 20, 4, activation=activation)
        with torch.no_grad():
            net[0].bias.fill_(1e3)
        assert (lmnfast.connectivity(wrap(net), inputs(20, 6)) == 1).all()

    @pytest.mark.parametrize("activation", [nn.SiLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.GELU])
    def test_pre_activations_of_1e4(self, activation, wrap):
        net, x = nn.Sequential(activation(), nn.Linear(6, 4, bias=False)), inputs(20, 6) * 1e4
        with (
            torch.no_grad()
        ):  # no cancellation: PyTorch rounds equal rows of a batch differently, and f may do as it likes
            net[1].weight.copy_(torch.tensor([1, 2, 4, 8, 16, 32]).expand(4, 6))
        with torch.no_grad():
            truth = reference.path_connectivity(net.double(), x.double(), *UNIFORM)
        L = lmnfast.connectivity(wrap(net.float()), x)
        assert L.isfinite().all() and (L - truth).abs().max() < 2e-5

    def test_strided_and_expanded_samples(self, wrap):
        net, x = mlp(6, 20, 4), inputs(6, 24)
        assert torch.equal(
            lmnfast.connectivity(wrap(net), x.mT[::2]),
            lmnfast.connectivity(wrap(net), x.mT[::2].contiguous()),
        )
        expanded = inputs(10, 1).expand(10, 6)
        assert torch.equal(
            lmnfast.connectivity(wrap(net), expanded), lmnfast.connectivity(wrap(net), expanded.contiguous())
        )

    def test_the_result_is_detached(self, wrap):
        L = lmnfast.connectivity(wrap(mlp(6, 20, 4)), inputs(9, 6).requires_grad_())
        assert not L.requires_grad and L.grad_fn is None

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite_samples_are_named(self, bad, wrap):
        x = inputs(9, 6)
        x[4, 2] = x[7, 0] = bad
        with pytest.raises(ValueError, match="x: NaN or Inf in sample 4, the first of 2 found$"):
            lmnfast.connectivity(wrap(mlp(6, 20, 4)), x)

    def test_not_finite_outputs_are_named(self, wrap):
        net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            net[0].weight.fill_(1e30)
            net[2].weight.fill_(1e30)
        with pytest.raises(ValueError, match=r"f\(x\): NaN or Inf in sample 1, the first of 2 found$"):
            lmnfast.connectivity(wrap(net), torch.tensor([[-1.0], [1.0], [-2.0], [3.0]]))


def test_outputs_that_are_not_finite_between_the_samples_are_named():
    with pytest.raises(ValueError, match="f: NaN or Inf in an output on the path from sample 0 to sample 1"):
        lmnfast.connectivity(lambda x: 1 / (x - 1), torch.tensor([[4.0], [0.0], [2.0]]))
