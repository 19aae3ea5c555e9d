"""Jacobians of any network, their distances, and linear regions."""

import copy
import sys

import pytest
import support
import torch
from torch import nn

import lmnfast
from lmnfast import _features, _native, _route, reference
from lmnfast._enqueue import enqueue
from lmnfast._settings import Settings

F64 = torch.float64


def network(*widths, activation=nn.SiLU, end=None, seed=0):
    return nn.Sequential(*support.mlp(*widths, activation=activation, seed=seed), *([end()] if end else []))


def samples(n, *shape, seed=1):
    return support.samples(n, *shape, seed=seed)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(27, 2)
        )

    def forward(self, x):
        return self.layers(x).tanh() * 2


NETWORKS = {
    "one hidden layer": (network(5, 20, 3), (5,)),
    "deep": (network(5, 20, 15, 3), (5,)),
    "more outputs than inputs": (network(3, 20, 15, 40, activation=nn.ReLU), (3,)),
    "activation at the end": (network(5, 20, 3, end=nn.Tanh), (5,)),
    "residual": (support.Residual(6, 4), (6,)),
    "residual, more outputs": (support.Residual(3, 9), (3,)),
    "convolution": (Convolution(), (1, 5, 5)),
    "function": (lambda x: torch.stack((x.prod(1), x.sin().sum(1)), 1), (4,)),
    "one of each": (network(1, 8, 1), (1,)),
}


@pytest.mark.parametrize("budget", [1, 256 * 2**20])
@pytest.mark.parametrize("name", NETWORKS)
def test_jacobians_are_those_of_vmap_and_jacrev(name, budget):
    f, shape = NETWORKS[name]
    x = samples(11, *shape)
    if isinstance(f, nn.Module):
        f.eval()
    truth = reference.jacobian(f, x).detach()
    J = lmnfast.jacobians(f, x, budget=budget)
    assert J.shape == truth.shape and J.dtype == torch.float32 and not J.requires_grad
    assert (J - truth).abs().max() <= 1e-5 * truth.abs().max() and truth.abs().max() > 0.02


def plain_distances(f, x, affine=False):
    """Of float64 Jacobians, and offsets where asked for."""
    f = copy.deepcopy(f).double().eval()
    x = x.double()
    J = reference.jacobian(f, x).detach()
    features = J.flatten(1)
    if affine:
        offsets = f(x).detach().flatten(1) - (J @ x.flatten(1)[:, :, None]).squeeze(2)
        features = torch.cat((features, offsets), 1)
    return reference.jacobian_distance(features, features, False)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "function"])
def test_distances_are_those_of_the_jacobians(name, affine):
    f, shape = NETWORKS[name]
    x = samples(23, *shape)
    truth = plain_distances(f, x, affine)
    d = lmnfast.jacobian_distances(f, x, affine=affine)
    bound = 1e-5 * truth + (0 if "residual" not in name and name != "convolution" else 1e-5)
    assert d.dtype == torch.float32 and ((d - truth).abs() <= bound).all()
    squared = lmnfast.jacobian_distances(f, x, affine=affine, squared=True)
    assert ((squared - d.square()).abs() <= 1e-5 * d.square()).all()


@pytest.mark.parametrize("widths", [(30, 40, 10), (30, 40, 20, 10), (2, 40, 1), (4, 12, 200)])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("closeness", [1e-2, 1e-3, 1e-5, 1e-7])
def test_close_pairs_keep_their_digits(widths, affine, closeness):
    f, x = network(*widths), samples(20, widths[0]).double()
    x = torch.cat((x, x + closeness * samples(20, widths[0], seed=2)))
    f.double()
    truth = plain_distances(f, x, affine)
    d = lmnfast.jacobian_distances(f, x, affine=affine)
    close = truth.diagonal(20)
    assert ((d - truth).abs() <= 1e-6 * truth + 1e-14).all() and 0 < close.median() < 20 * closeness


@pytest.mark.parametrize("widths", [(6, 15, 4), (6, 15, 10, 4), (6, 3, 40)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize("affine", [False, True])
def test_samples_in_one_linear_region_are_exactly_zero_apart(widths, activation, affine):
    f = network(*widths, activation=activation)
    x = torch.lerp(samples(12, 6)[:, None], samples(12, 6)[0], torch.linspace(0, 1e-4, 5)[:, None]).flatten(
        0, 1
    )
    d = lmnfast.jacobian_distances(f, x, affine=affine)
    z, patterns = x, []
    for layer in f:
        z = layer(z)
        if isinstance(layer, nn.Linear) and layer is not f[-1]:
            patterns.append(z > 0)
    pattern = torch.cat(patterns, 1)
    same = (pattern[:, None] == pattern).all(2)
    assert same.sum() > len(x) and (d[same] == 0).all() and (d[~same] > 0).all()
    assert lmnfast.linear_regions(f, x) == len(pattern.unique(dim=0))


@pytest.mark.parametrize("widths", [(7, 20, 4), (7, 20, 15, 4)])
@pytest.mark.parametrize("affine", [False, True])
def test_tiles_give_the_same_distances(widths, affine, monkeypatch):
    f, x = network(*widths), samples(50, 7)
    whole = lmnfast.jacobian_distances(f, x, affine=affine)
    monkeypatch.setattr(_features, "ALL_FEATURES", 0)
    for rows in (1, 7, 50):
        monkeypatch.setattr(_features, "TILE_ROWS", rows)
        d = lmnfast.jacobian_distances(f, x, affine=affine)
        assert torch.equal(d, d.mT) and (d.diagonal() == 0).all()
        assert (d - whole).abs().max() <= 1e-6 * whole.max()


def test_memory_beyond_the_result_is_bounded():
    """Two tiles of features, where all Jacobians would be 1.6 GB."""
    f, x = network(40, 30, 30, 1000), samples(300, 40)
    sizes = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.untyped_storage().nbytes())
            return result

    with Count():
        lmnfast.jacobian_distances(f, x)
    assert max(sizes) <= _features.ALL_FEATURES


def test_affine_networks_and_dead_units_have_one_linear_map():
    affine = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    x = samples(9, 4)
    assert (lmnfast.jacobian_distances(affine, x, affine=True) == 0).all()
    assert lmnfast.linear_regions(affine, x) == 1
    dead = network(4, 6, 3, activation=nn.ReLU)
    with torch.no_grad():
        dead[0].bias.fill_(-1e3)
    assert (lmnfast.jacobians(dead, x) == 0).all() and (lmnfast.jacobian_distances(dead, x) == 0).all()
    assert lmnfast.linear_regions(dead, x) == 1


def test_outputs_that_do_not_depend_on_the_samples_have_zero_jacobians():
    def constant(x):
        return torch.ones(len(x), 3)

    x = samples(5, 2)
    assert (lmnfast.jacobians(constant, x) == 0).all()
    assert (lmnfast.jacobian_distances(constant, x) == 0).all()


def test_relu_exactly_at_zero_has_pytorchs_slope():
    f = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    x = torch.zeros(2, 2)
    assert (lmnfast.jacobians(f, x) == 0).all() and (lmnfast.jacobian_distances(f, x) == 0).all()
    assert lmnfast.linear_regions(f, x) == 1


def test_layers_that_vmap_cannot_run_are_differentiated_output_by_output():
    class Branch(support.Residual):
        def forward(self, x):
            return super().forward(x) * (2 if x.sum().item() > -1e9 else 1)

    x = samples(7, 6)
    truth = 2 * reference.jacobian(support.Residual(6, 4), x)
    assert (lmnfast.jacobians(Branch(6, 4), x) - truth).abs().max() <= 1e-5


def test_networks_that_work_in_place_do_not_change_the_samples():
    def f(x):
        return x.mul_(2).sin_()

    x = samples(6, 3)
    before = x.clone()
    J = lmnfast.jacobians(f, x)
    assert torch.equal(x, before)
    assert (J - torch.diag_embed(2 * (2 * x).cos())).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.detach().sin(),
        lambda x: torch.from_numpy(x.detach().numpy().copy()),
    ],
)
def test_what_cannot_be_differentiated_is_an_error(f):
    for measure in (lmnfast.jacobians, lmnfast.jacobian_distances):
        with pytest.raises(ValueError, match="f: cannot be differentiated"):
            measure(f, samples(4, 3))


def test_the_network_stays_as_it_was():
    f = Convolution().train()
    x = samples(5, 1, 5, 5).requires_grad_()
    before, random = copy.deepcopy(f.state_dict()), torch.get_rng_state()
    lmnfast.jacobians(f, x)
    lmnfast.jacobian_distances(f, x)
    assert all(part.training for part in f.modules()) and x.grad is None
    assert all(p.grad is None and p.requires_grad for p in f.parameters())
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["one hidden layer", "deep", "residual"])
def test_any_grad_mode(name, context):
    f, shape = NETWORKS[name]
    plain = lmnfast.jacobians(f, samples(5, *shape)), lmnfast.jacobian_distances(f, samples(5, *shape))
    with context():
        x = samples(5, *shape)
        assert torch.equal(lmnfast.jacobians(f, x), plain[0])
        assert torch.equal(lmnfast.jacobian_distances(f, x), plain[1])


@pytest.mark.parametrize("measure", [lmnfast.jacobians, lmnfast.jacobian_distances, lmnfast.linear_regions])
def test_bad_input_is_named(measure):
    f, x = network(3, 5, 2, activation=nn.ReLU), samples(6, 3)
    bad = x.clone()
    bad[4, 1] = float("nan")
    for arguments, error, message in [
        ((f, [1.0]), TypeError, "x: expected a tensor"),
        ((f, torch.ones(2, 3, dtype=torch.int64)), TypeError, "x: expected floating-point samples"),
        ((f, torch.ones(0, 3)), ValueError, "x: expected samples"),
        ((f, x.double()), TypeError, "convert one of them"),
        ((f, bad), ValueError, "x: NaN or Inf in sample 4"),
        ((lambda x: x.log(), -x.abs()), ValueError, r"f\(x\): NaN or Inf in sample 0"),
    ]:
        with pytest.raises(error, match=message):
            measure(*arguments)


@pytest.mark.parametrize("measure", [lmnfast.jacobians, lmnfast.jacobian_distances])
def test_a_jacobian_that_is_not_finite_names_its_sample(measure):
    x = samples(6, 3).abs()
    x[2, 0] = 0
    with pytest.raises(ValueError, match="f: NaN or Inf in the Jacobian of sample 2$"):
        measure(lambda x: x.sqrt(), x)


def test_only_piecewise_linear_chains_have_linear_regions():
    with pytest.raises(ValueError, match="f: expected activations among .* got silu"):
        lmnfast.linear_regions(network(3, 5, 2), samples(4, 3))
    with pytest.raises(ValueError, match="f: expected a chain of Linear"):
        lmnfast.linear_regions(lambda x: x, samples(4, 6))
    convolution = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="piecewise-linear activations; Conv1d '0' is neither a Linear nor"):
        lmnfast.linear_regions(convolution, samples(4, 6)[:, None])


def test_budgets_are_positive():
    with pytest.raises(ValueError, match="budget: expected a positive number of bytes, got 0"):
        lmnfast.jacobians(network(3, 5, 2), samples(4, 3), budget=0)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_head_of_zeros_has_one_linear_map(depth):
    torch.manual_seed(0)
    hidden = [part for _ in range(depth - 1) for part in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), *hidden, nn.Linear(16, 4))
    nn.init.zeros_(model[-1].weight)
    x = torch.randn(10, 8)
    for affine in (False, True):
        assert (lmnfast.jacobian_distances(model, x, affine=affine) == 0).all()
    for f in (model, lambda z: model(z)):
        assert (lmnfast.connectivity(f, x, method="jacobian") == 1).all()


def test_jacobian_connectivity_is_symmetric_to_the_last_bit():
    for seed in range(155, 160):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        for n in (37, 300):
            x = torch.randn(n, 5, dtype=torch.float64)
            L = lmnfast.connectivity(model, x, method="jacobian")
            assert torch.equal(L, L.mT) and (L.diagonal() == 1).all()


@pytest.fixture
def waits(monkeypatch):
    """How often a value is fetched from the device."""
    counted = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        plain = getattr(torch.Tensor, name)

        def fetch(self, plain=plain):
            counted.append(self.device)
            return plain(self)

        monkeypatch.setattr(torch.Tensor, name, fetch)
    return counted


@pytest.mark.parametrize(
    "widths", [(5, 20, 3), (100, 100, 31), (3, 40, 200), (30, 300, 20), (2, 40, 1), (5, 20, 15, 3)]
)
@pytest.mark.parametrize("affine", [False, True])
def test_distances_on_every_device(widths, affine, device):
    f, x = network(*widths), samples(33, widths[0])
    x[1] = x[0]
    x[3] = x[2] + 1e-5
    truth = plain_distances(f, x, affine)
    f.to(device)
    d = lmnfast.jacobian_distances(f, x.to(device), affine=affine).cpu()
    assert (
        ((d - truth).abs() <= 1e-5 * truth + 1e-15).all() and torch.equal(d, d.mT) and d[0, 1] == 0 < d[2, 3]
    )


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_one_linear_region_on_every_device(activation, device):
    f = network(6, 15, 4, activation=activation).to(device)
    x = torch.lerp(samples(12, 6)[:, None], samples(12, 6)[0], torch.linspace(0, 1e-4, 5)[:, None]).flatten(
        0, 1
    )
    x = x.to(device)
    d, pattern = lmnfast.jacobian_distances(f, x), f[0](x) > 0
    same = (pattern[:, None] == pattern).all(2)
    assert same.sum() > len(x) and (d[same] == 0).all() and (d[~same] > 0).all()


def test_units_that_do_the_same_on_every_device(device):
    f, x = network(9, 12, 5), samples(20, 9)
    with torch.no_grad():
        f[0].weight[3], f[0].bias[3] = f[0].weight[8], f[0].bias[8]
        f[2].weight[:, 3] = f[2].weight[:, 8]
    truth = plain_distances(f, x)
    f.to(device)
    d = lmnfast.jacobian_distances(f, x.to(device)).cpu()
    assert ((d - truth).abs() <= 1e-5 * truth).all() and truth.max() > 0.1
    L = lmnfast.connectivity(f, x.to(device), method="jacobian").cpu()
    J = reference.jacobian(f.cpu().double(), x.double()).flatten(1)
    norms = J.square().sum(1)
    assert (L - (1 - truth**2 / (norms[:, None] + norms))).abs().max() < 1e-5


def test_jacobian_connectivity_on_every_device(device):
    f, x = network(20, 30, 9), samples(40, 20)
    truth = plain_distances(f, x)
    norms = reference.jacobian(copy.deepcopy(f).double(), x.double()).flatten(1).square().sum(1)
    L = lmnfast.connectivity(f.to(device), x.to(device), method="jacobian").cpu()
    assert (L - (1 - truth**2 / (norms[:, None] + norms))).abs().max() < 1e-5


class Own(nn.Module):
    """Its forward is the user's, so that its outputs are compared with the chain's."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def connectivity(f, x):
    return lmnfast.connectivity(f, x, method="jacobian")


def connectivity_on_a_card(f, x):
    enqueued = enqueue(f, x, Settings("jacobian"), deferred=True)
    enqueued.check()
    return enqueued.L


CALLS = pytest.mark.parametrize("measure", [lmnfast.jacobians, lmnfast.jacobian_distances, connectivity])


@pytest.mark.parametrize("measure", [lmnfast.jacobians, lmnfast.jacobian_distances, connectivity_on_a_card])
@pytest.mark.parametrize("wrap", [lambda net: net, Own], ids=["torch's own", "the user's"])
@pytest.mark.parametrize("widths", [(20, 30, 9), (20, 30, 25, 9)])
def test_cuda_is_waited_for_once(measure, wrap, widths, device, waits, monkeypatch):
    if not _native.on_cuda(torch.empty(0, device=device)):
        pytest.skip("the CPU is not waited for")
    # The emulated kernels' distances are scaled as the CPU's are.
    monkeypatch.setattr(sys.modules["lmnfast.ops.jacobian_distance"], "largest_magnitude", lambda *_: 1.0)
    f, x = wrap(network(*widths)).to(device), samples(40, 20).to(device)
    measure(f, x)
    assert len(waits) == 1


@CALLS
def test_a_function_that_is_not_its_chain_is_measured_as_it_is(measure, device, monkeypatch):
    """The checks behind the kernels say so, and what they have made is not used."""
    f, x = Own(network(20, 30, 9)).to(device), samples(12, 20).to(device)
    truth = measure(f, x)
    if truth.dim() == 2:
        assert (measure(lambda x: f(x), x) - truth).abs().max() < 1e-5
    other = _route.chain_or_reason(network(20, 30, 9, seed=1).to(device))
    monkeypatch.setattr(_route, "chain_or_reason", lambda f, *_: other)
    assert (measure(f, x) - truth).abs().max() < 1e-5 * truth.abs().max()


@CALLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_modules_in_order_give_the_same_whether_they_are_called_or_not(measure, dtype, device):
    """On CUDA the kernels give their outputs, but for half types."""
    f, x = network(20, 30, 9).to(device, dtype), samples(12, 20).to(device, dtype)
    result = measure(f, x)
    assert (measure(Own(f), x) - result).abs().max() <= 1e-12 * result.abs().max()
    x[7, 3] = float("inf")
    with pytest.raises(ValueError, match="x: NaN or Inf in sample 7$"):
        measure(f, x)


@CALLS
def test_samples_that_do_not_fit_are_torchs_own_error_on_every_device(measure, device):
    f = network(20, 30, 9).to(device)
    for x in (samples(12, 19), samples(12, 1, 19)):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            measure(f, x.to(device))
    assert measure(f, samples(12, 1, 20).to(device)).shape[0] == 12


@pytest.mark.parametrize("measure", [lmnfast.jacobians, lmnfast.jacobian_distances])
@pytest.mark.parametrize("widths", [(3, 30, 9), (3, 30, 20, 9)])
def test_what_is_not_finite_is_named_on_every_device(measure, widths, device):
    x = samples(6, 3).to(device)
    bad = x.clone()
    bad[4, 1] = float("nan")
    f = network(*widths).to(device)
    for samples_, place in ((bad, 4), (bad[4:5], 0)):
        with pytest.raises(ValueError, match=f"x: NaN or Inf in sample {place}$"):
            measure(f, samples_)
    with torch.no_grad():
        f[-1].weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"f\(x\): NaN or Inf in sample \d"):
        measure(f, x)
    with torch.no_grad():  # outputs of 1e38 are finite, Jacobians are not
        f = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)).to(device)
        f[0].weight.fill_(1e20)
        f[0].bias.fill_(1.0)
        f[2].weight.fill_(1e20)
    with pytest.raises(ValueError, match=r"f: NaN or Inf in the Jacobian of sample \d"):
        lmnfast.jacobians(f, 1e-30 * x.abs())


def test_modules_that_work_in_place_leave_the_samples_on_every_device(device):
    layers = network(3, 30, 9)
    for first, x in ((nn.ReLU(inplace=True), samples(6, 3)), (nn.Flatten(), samples(6, 3)[:, None])):
        f = nn.Sequential(first, layers[0], nn.SiLU(inplace=True), layers[2], nn.Dropout(0.5, inplace=True))
        x = x.to(device)
        kept = x.clone()
        J, y = lmnfast.jacobians(f.to(device), x), f.eval()(x.clone())
        lmnfast.jacobian_distances(f, x)
        lmnfast.connectivity(f, x)
        assert torch.equal(x, kept) and torch.equal(f(x.clone()), y)
        rows = [
            torch.autograd.functional.jacobian(lambda row, f=f: f(row.clone()[None])[0], row) for row in x
        ]
        assert (J - torch.stack(rows).flatten(2)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_on_every_device(dtype, device):
    f, x = network(20, 30, 9).to(dtype), samples(25, 20).to(dtype)
    f[2].weight.data *= 2.0**20
    truth = plain_distances(f, x)
    d = lmnfast.jacobian_distances(f.to(device), x.to(device)).cpu()
    assert d.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((d - truth).abs() <= (1e-9 if dtype == torch.float64 else 1e-5) * truth).all()


def test_float64_beyond_float32_is_finite_on_every_device(device):
    f, x = network(20, 30, 9).double(), samples(25, 20).double()
    with torch.no_grad():
        f[2].weight *= 1e60
        f[2].bias *= 1e60
    J = lmnfast.jacobians(f.to(device), x.to(device)).cpu()
    assert J.isfinite().all() and J.abs().max() > 1e58
    d = lmnfast.jacobian_distances(f, x.to(device)).cpu()
    truth = plain_distances(f.cpu(), x)
    assert ((d - truth).abs() <= 1e-9 * truth).all()
