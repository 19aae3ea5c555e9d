"""Blocks of a transformer, through the public functions: the same numbers as the definition, however many terms they take."""

import itertools
import warnings

import pytest
import torch
from support import samples
from torch import Tensor, nn

import lmnfast
from lmnfast import _block_paths, reference
from lmnfast._block import Block, Norm, wide_block
from lmnfast._chain import Activation
from lmnfast._settings import Statistic
from lmnfast.ops import recognise
from lmnfast.quadrature import path_nodes

WIDTH, UNITS = 12, 40
# A float32 entry's own rounding, and what the terms that are left out may change.
ALLOWED = {torch.float32: 4e-6, torch.float64: 1e-12}


class Mlp(nn.Module):
    """A block by torch's modules: [norm], one hidden layer, gated or not, [+ x]."""

    def __init__(
        self,
        *,
        norm: str | None = None,
        gated: bool = False,
        adds: bool = False,
        activation: type[nn.Module] = nn.GELU,
        outputs: int = WIDTH,
        gain: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
            self.norm = None if norm is None else kinds[norm](WIDTH, eps=1e-5)
            for parameter in () if self.norm is None else self.norm.parameters():
                parameter.add_(torch.randn(WIDTH) * 0.3)
            self.first, self.last = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, outputs)
            self.gate = nn.Linear(WIDTH, UNITS) if gated else None
            self.first.weight.mul_(3 * gain)
            self.activation, self.adds = activation(), adds

    def forward(self, x: Tensor) -> Tensor:
        n = x if self.norm is None else self.norm(x)
        h = self.activation(self.first(n))
        y = self.last(h if self.gate is None else h * self.gate(n))
        return x + y if self.adds else y


def truth(f: nn.Module, x: Tensor, rule: tuple[str, int] = ("uniform", 21)) -> Tensor:
    dtype = x.dtype
    L = reference.path_connectivity(f.double(), x.double(), *path_nodes(*rule))
    f.to(dtype)
    return L.detach()


def route_of(f: nn.Module, x: Tensor) -> str:
    return lmnfast.explain(nn.Sequential(nn.Identity(), f).eval(), "0", x)["0"].route


def assert_right(f: nn.Module, x: Tensor, rule: tuple[str, int] = ("uniform", 21)) -> None:
    f.to(x.dtype)
    assert route_of(f, x) == "block"
    L = lmnfast.connectivity(f, x, points=rule[1], rule=rule[0])
    assert L.dtype == x.dtype and torch.equal(L, L.mT)
    assert (L.double() - truth(f, x, rule)).abs().max() <= ALLOWED[x.dtype]


@pytest.mark.parametrize("positions", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize(
    "norm, gated, adds", [*itertools.product([None, "layer", "rms"], [False, True], [False, True])]
)
def test_every_kind_of_block(norm, gated, adds, positions, device, dtype):
    if not (norm or gated or positions):
        pytest.skip("a chain")
    f = Mlp(norm=norm, gated=gated, adds=adds).to(device)
    assert_right(f, samples(9, *positions, WIDTH, dtype=dtype).to(device))


@pytest.mark.parametrize(
    "activation", [nn.SiLU, nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Softplus, nn.ELU, nn.LeakyReLU]
)
def test_every_activation_with_and_without_kinks(activation, dtype):
    assert_right(Mlp(norm="layer", activation=activation), samples(9, WIDTH, dtype=dtype))


@pytest.mark.parametrize(
    "rule", [("uniform", 3), ("uniform", 4), ("uniform", 65), ("lobatto", 3), ("lobatto", 9)]
)
def test_any_rule(rule, dtype):
    assert_right(Mlp(gated=True), samples(8, WIDTH, dtype=dtype), rule)


def test_more_points_than_terms_take_another_route():
    f, x = Mlp(gated=True), samples(5, WIDTH, dtype=torch.float64)
    L = lmnfast.connectivity(f.double(), x, points=80)
    assert (L - truth(f, x, ("uniform", 80))).abs().max() < 1e-10


@pytest.mark.parametrize("gain", [1e-3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_flat_and_steep_layers(gain, norm, dtype):
    assert_right(Mlp(norm=norm, gated=True, gain=gain), samples(9, WIDTH, dtype=dtype))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_tiny_and_huge_outputs(size, dtype):
    f = Mlp(norm="rms", gated=True)
    with torch.no_grad():
        f.last.weight.mul_(size)
        f.last.bias.mul_(size)
        f.last.weight[0] *= 1e-6
        f.last.bias[0] *= 1e-6
    assert_right(f, samples(9, WIDTH, dtype=dtype))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15])
def test_tiny_and_huge_samples(size, dtype):
    f = Mlp(gated=True, activation=nn.SiLU)
    with torch.no_grad():
        for layer in (f.first, f.gate, f.last):  # beside a bias of the last Linear, PyTorch loses the outputs
            layer.bias.zero_()
    x = size * samples(9, WIDTH, dtype=dtype)
    assert (lmnfast.connectivity(f.to(dtype), x).double() - truth(f, x)).abs().max() <= 10 * ALLOWED[dtype]


@pytest.mark.parametrize("size", [1e-200, 1e-170, 1e160, 1e200])
def test_outputs_whose_squares_leave_the_range(size):
    f = Mlp(norm="layer", gated=True)
    f.double()
    with torch.no_grad():
        f.last.weight.mul_(size)
        f.last.bias.mul_(size)
    assert_right(f, samples(9, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("size", [1e15, 1e20, 1e23, 1e36])
def test_a_huge_unit_that_no_output_uses(size, dtype):
    f, x = Mlp(gated=True, activation=nn.ReLU), samples(10, WIDTH, dtype=dtype)
    f.to(dtype)
    with torch.no_grad():
        f.first.weight[0], f.first.bias[0], f.last.weight[:, 0] = 0, 0, 0
        f.first.weight[0, 0] = size if dtype == torch.float32 else size**8
        x[:, 0] = -x[:, 0].abs()
        x[0, 0] = 1  # the unit is dead on all paths but this sample's: their energies underflow
    assert_right(f, x)


@pytest.mark.parametrize("size", [1e-20, 1e-40])
def test_a_tiny_hidden_layer(size):
    f = Mlp(gated=True)
    with torch.no_grad():
        f.gate.weight.mul_(size)
        f.gate.bias.mul_(size)
    assert lmnfast.connectivity(f, samples(6, WIDTH)).isfinite().all()


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_samples_that_nearly_cancel_behind_a_normalisation(norm, size, dtype):
    f, x = Mlp(norm=norm, gated=True), size * samples(20, WIDTH, dtype=dtype)
    f.norm.eps = 1e-30
    x[19] = -x[18] * (1 + 3e-4)
    assert_right(f, x)


def test_samples_that_cancel_where_the_model_divides_by_zero(dtype):
    f, x = Mlp(norm="rms", gated=True).to(dtype), samples(6, WIDTH, dtype=dtype)
    f.norm.eps = 0.0
    x[1] = -x[0]
    assert route_of(f, x[1:]) == "block"
    with pytest.raises(ValueError, match="on the path from sample 0 to sample 1"):
        lmnfast.connectivity(f, x)


@pytest.mark.parametrize("norm", [None, "layer"])
def test_a_large_last_bias_changes_nothing(norm):
    f, x = Mlp(norm=norm, gated=norm is None, outputs=200), samples(9, WIDTH)
    expected = truth(f, x)
    with torch.no_grad():
        f.last.bias.add_(1e6)
        f.last.weight[:4] = 0  # constant by right
    assert route_of(f, x) == "block"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        L = lmnfast.connectivity(f, x)
    f.last.bias.data.zero_()
    assert (L.double() - truth(f, x)).abs().max() <= ALLOWED[torch.float32]
    assert (L.double() - expected).abs().max() > 1e-4


def test_tiles_of_few_units_and_many_outputs_are_small(monkeypatch):
    rows = []
    real = torch.ops.lmnfast.block_coefficients

    def counting(*arguments, **more):
        rows.append(len(arguments[1]))
        return real(*arguments, **more)

    monkeypatch.setattr(torch.ops.lmnfast, "block_coefficients", counting)
    f, x = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 2), nn.GELU(), nn.Linear(2, 1000)), samples(60, 12)
    lmnfast.connectivity(f, x, budget=2**22)
    assert 2 < max(rows) <= 2**22 // (4 * 8 * 1000)


def test_dead_and_repeated_outputs(dtype):
    f = Mlp(norm="layer", outputs=20)
    with torch.no_grad():
        f.last.weight[3:6] = 0
        f.last.weight[6:12] = f.last.weight[12]
    assert_right(f, samples(9, WIDTH, dtype=dtype))


def test_equal_and_close_samples_and_positions(dtype):
    x = samples(8, 3, WIDTH, dtype=dtype)
    x[1] = x[0]
    x[2] = x[0] * (1 + 1e-6)
    x[3] = x[0] + 1e-9
    x[:, 1] = x[0, 1]  # the same token for all samples: its outputs are constant on every path
    f = Mlp(norm="layer", gated=True)
    L = lmnfast.connectivity(f.to(dtype), x)
    assert L[0, 1] == 1
    far = (2 * truth(f, x[:, ::2]) + 1) / 3  # constant outputs have r2 = 1
    assert (L.double() - far)[4:, 4:].abs().max() <= ALLOWED[dtype]
    # Between close samples the truth is what float64 sees.
    wide = lmnfast.connectivity(f.double(), x.double())
    assert (L.double() - wide).abs().max() <= 1e-4


@pytest.mark.parametrize("seed", range(8))
def test_what_is_left_out_is_bounded(seed):
    f = Mlp(
        norm=[None, "layer", "rms"][seed % 3],
        gated=bool(seed % 2),
        activation=[nn.GELU, nn.ReLU, nn.SiLU][seed % 3],
        outputs=[1, 3, 16, 64][seed % 4],
        seed=seed,
    ).double()
    with torch.no_grad():
        if seed % 4 == 2:  # directions that add up
            f.last.weight[:8] = f.last.weight[8] * torch.logspace(-3, 3, 8, dtype=torch.float64)[:, None]
        elif seed % 4 == 3:
            f.last.weight.mul_(1e-3).add_(f.last.weight[:1].clone())
    block = _block_of(f)
    x = samples(10, WIDTH, dtype=torch.float64)
    nodes, weights = path_nodes("uniform", 21)
    with torch.no_grad():
        rows = _block_paths._Rows.of(block, x)
        outputs = _block_paths._Outputs(block, rows, 1, nodes, weights, None, Statistic(pooled=True))
        measured = _block_paths._Measured(block, rows, outputs, nodes, weights)
        first, second = torch.triu_indices(10, 10, 1)
        measured.turn(first[:16], second[:16])
        how = {"polynomials": measured.polynomials, "cross": rows.cross(first, second)}
        hidden, energy = measured.hidden(first, second, begin=0, end=20, **how)
        coefficients = outputs.of(hidden)
    whole = outputs.shares(coefficients, first, second)
    weight = f.last.weight.detach()
    directions = weight / weight.norm(dim=1, keepdim=True)
    exact = float(torch.linalg.matrix_norm(directions, 2)) ** 2
    assert exact <= _block_paths.squared_norm_bound(directions) <= 2 * exact
    for terms in range(2, 20):
        part = outputs.shares(coefficients[:terms], first, second)
        bound = part.sensitivity * energy[:, terms:].sum(1)
        pooled, all_pooled = (found.sums[:, 0] / found.sums[:, 1] for found in (part, whole))
        for share, truth in ((part.nonlinear, whole.nonlinear), (pooled, all_pooled)):
            assert (share <= truth + 1e-14).all() and (truth - share <= bound + 1e-14).all()


def _block_of(f: Mlp) -> Block:
    norm = None
    if f.norm is not None:
        norm = Norm(
            isinstance(f.norm, nn.LayerNorm), 1e-5, f.norm.weight.detach(), getattr(f.norm, "bias", None)
        )
    gate = (None, None) if f.gate is None else (f.gate.weight.detach(), f.gate.bias.detach())
    name = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu"}[type(f.activation)]
    first, last = f.first, f.last
    return Block(
        first.weight.detach(),
        first.bias.detach(),
        Activation(name),
        last.weight.detach(),
        last.bias.detach(),
        norm,
        *gate,
        f.adds,
    )


def test_few_terms_are_enough_for_a_smooth_layer(monkeypatch):
    taken = []
    real = torch.ops.lmnfast.block_coefficients

    def counting(*arguments, begin, end, **more):
        taken.append((len(arguments[1]), begin, end))
        return real(*arguments, begin=begin, end=end, **more)

    monkeypatch.setattr(torch.ops.lmnfast, "block_coefficients", counting)
    f = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512))
    x = samples(60, 64)
    L = lmnfast.connectivity(f, x)
    assert (L.double() - truth(f, x)).abs().max() <= ALLOWED[torch.float32]
    products = sum(rows * (end - begin) for rows, begin, end in taken[1:])  # the first turns the polynomials
    assert products < 10 * 60 * 59 // 2, "half the nodes would do as well"


def test_a_wide_chain_is_a_block_and_others_are_not():
    def chain(*modules):
        return recognise(nn.Sequential(*modules))

    assert wide_block(chain(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 512))) is not None
    assert wide_block(chain(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 511))) is None
    assert wide_block(chain(nn.Linear(8, 511), nn.GELU(), nn.Linear(511, 512))) is None
    assert wide_block(chain(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 512))) is None
    assert wide_block(chain(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())) is None
    assert wide_block(chain(nn.GELU(), nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 512))) is None
    assert (
        wide_block(chain(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)))
        is None
    )


def test_training_is_followed_and_nothing_is_disturbed():
    f, x = Mlp(norm="layer", gated=True).train(), samples(9, WIDTH)
    before = lmnfast.connectivity(f, x)
    with torch.no_grad():
        f.first.weight.mul_(0.5)
        f.norm.weight.add_(1)
    after = lmnfast.connectivity(f, x)
    assert f.training and all(p.grad is None for p in f.parameters())
    assert (after - before).abs().max() > 1e-3
    assert (after.double() - truth(f, x)).abs().max() <= ALLOWED[torch.float32]


def test_a_block_that_is_not_what_it_looks_like_takes_another_route(monkeypatch):
    f, x = Mlp(norm="layer"), samples(9, WIDTH, dtype=torch.float64)
    f.double()
    wrong = _block_of(Mlp(norm="layer", seed=1).double())
    monkeypatch.setattr("lmnfast._route.block_or_reason", lambda *_: wrong)
    assert route_of(f, x) == "generic"
    assert (lmnfast.connectivity(f, x) - truth(f, x)).abs().max() < 1e-12


def test_a_block_that_is_another_function_between_the_samples_takes_another_route():
    class Stepped(Mlp):
        def forward(self, x):
            return super().forward(x)

    f, x = Stepped(norm="layer"), torch.randn(9, WIDTH, dtype=torch.float64).round()
    f.double()
    other = _block_of(f)
    f.register_forward_hook(lambda module, args, y: torch.where(args[0] == args[0].round(), y, y.abs()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmnfast._route.block_or_reason", lambda *_: other)
        assert route_of(f, x) == "generic"


def test_calls_fail_as_on_every_route():
    f, x = Mlp(norm="layer"), samples(6, WIDTH)
    x[2, 3] = float("nan")
    with pytest.raises(ValueError, match="x: "):
        lmnfast.connectivity(f, x)
    with pytest.raises(RuntimeError, match="normalized_shape"):  # torch's own
        lmnfast.connectivity(f, samples(6, WIDTH + 1))


def test_low_precision_and_autocast_take_another_route():
    f, x = Mlp(norm="layer"), samples(6, WIDTH)
    assert route_of(f.bfloat16(), x.bfloat16()) == "generic"
    f.float()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert route_of(f, x) == "generic"


def test_other_methods_take_another_route():
    f, x = Mlp(norm="layer").double(), samples(6, WIDTH, dtype=torch.float64)
    for method in ("hermite", "hermite-midpoint", "jacobian"):
        assert lmnfast.connectivity(f, x, method=method).isfinite().all()


def test_progress_reaches_one_and_budgets_change_nothing_but_rounding():
    f, x = Mlp(norm="layer"), samples(20, 4, WIDTH)
    seen: list[float] = []
    whole = lmnfast.connectivity(f, x, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1
    assert (lmnfast.connectivity(f, x, budget=20_000) - whole).abs().max() <= ALLOWED[torch.float32]


def test_unresolved_pairs_are_measured_in_float64():
    f, x = Mlp(norm="layer", adds=True), samples(6, WIDTH)
    with torch.no_grad():
        x[:, 0] = 1e5  # an output is this and a small number, which float32 rounds more than it varies
        f.last.weight.mul_(1e-4)
    measured = _block_paths.BlockPaths(
        _block_of(f), x, *path_nodes("uniform", 21), 2**20, x.nbytes * 20
    ).all()
    assert int(measured.counts[1]) > 0
    measured.resolve()
    assert int(measured.counts[1]) == 0
    assert measured.L.isfinite().all() and (measured.L >= 0).all()
