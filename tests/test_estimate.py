"""Curvature: all pairs and draws of pairs, and the errors of both."""

import subprocess
import sys
from itertools import combinations

import pytest
import torch
from support import samples
from torch import nn

import lmnfast
from lmnfast import _pairs, reference
from lmnfast._pairs import Moments, draw_pairs
from lmnfast.quadrature import path_nodes


def mlp(activation: type = nn.SiLU, outputs: int = 5, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), activation(), nn.Linear(24, outputs))
    net[0].weight.data.mul_(scale)
    return net


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm, self.first, self.last = nn.LayerNorm(6), nn.Linear(6, 32), nn.Linear(32, 6)

    def forward(self, x):
        return x + self.last(nn.functional.gelu(self.first(self.norm(x))))


def routes():
    net = mlp()
    return {"fused": net, "block": Block(), "generic": lambda x: net(x)}


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("name", routes())
def test_all_pairs_give_the_mean_of_the_matrix_and_a_draw_its_own_pairs(name, pooled):
    f, x = routes()[name], samples(40, 6)
    x[7] = x[3] * (1 + 1e-6)
    L = lmnfast.connectivity(f, x, pooled=pooled).double()
    i, j = torch.triu_indices(40, 40, 1)
    every = lmnfast.curvature(f, x, pooled=pooled)
    assert every.value == pytest.approx(float((1 - L[i, j]).mean()), abs=1e-7)
    assert (every.standard_error, every.pairs, every.samples, every.pooled) == (0.0, 780, 40, pooled)
    for pairs in (2, 33, 700, 780):
        part = lmnfast.curvature(f, x, pooled=pooled, pairs=pairs, generator=torch.Generator().manual_seed(1))
        first, second = draw_pairs(40, pairs, torch.Generator().manual_seed(1))
        own = 1 - L[first, second]
        assert part.value == pytest.approx(float(own.mean()), abs=2e-6) and part.pairs == pairs
        share = 1 - pairs / 780
        assert part.standard_error == pytest.approx(float((share * own.var() / pairs).sqrt()), abs=1e-6)
    assert float(part) == part.value


def test_a_draw_is_uniform_without_repeats():
    for count, pairs in ((6, 4), (30, 2), (200, 19_900), (200, 9_000), (5_000, 400)):
        first, second = draw_pairs(count, pairs, torch.Generator().manual_seed(0))
        assert len(first) == pairs and (first < second).all() and first.min() >= 0 and second.max() < count
        assert len(set(zip(first.tolist(), second.tolist()))) == pairs
    # Each of the 15 pairs of 6 samples is in 3 of 15 draws; a draw one by one, and a permutation.
    for permuted in (0, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_pairs, "PERMUTED", permuted)
            generator, counts = torch.Generator().manual_seed(0), torch.zeros(6, 6)
            for _ in range(3000):
                counts[draw_pairs(6, 3, generator)] += 1
        found = counts[tuple(torch.triu_indices(6, 6, 1))] / 3000
        assert (found - 0.2).abs().max() < 0.03  # four standard errors


@pytest.mark.parametrize("f", [mlp(), mlp(nn.ReLU, 1, 3.0), mlp(nn.Tanh, 31, 2.0)])
def test_the_interval_contains_the_mean_over_all_pairs_as_often_as_it_says(f):
    x = samples(200, 6)
    h = 1 - lmnfast.connectivity(f, x, pooled=True).double()
    i, j = torch.triu_indices(200, 200, 1)
    truth, inside = float(h[i, j].mean()), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):  # from the matrix: `curvature` of the same pairs is tested above
        first, second = draw_pairs(200, 2000, generator)
        moments = Moments.of_list(h[first, second], first, second, 200)
        inside += abs(moments.mean - truth) < 1.96 * moments.of_pairs**0.5
    assert 930 <= inside <= 970


def test_ten_thousand_pairs_of_961_samples():
    f, x = mlp(outputs=31), samples(961, 6)
    truth = lmnfast.curvature(f, x)
    generator = torch.Generator().manual_seed(0)
    draws = [lmnfast.curvature(f, x, pairs=10_000, generator=generator) for _ in range(20)]
    inside = sum(low < truth.value < high for low, high in (draw.interval() for draw in draws))
    assert inside >= 16  # less would come once in 390 draws of 20
    errors = torch.tensor([draw.value - truth.value for draw in draws])
    assert 0.6 < float(errors.square().mean().sqrt()) / draws[0].standard_error < 1.5


def test_the_moments_are_those_of_a_sum_over_all_pairs_of_pairs():
    """Written out: pairs that share a sample, and pairs that share none."""
    h = samples(12, 12, dtype=torch.float64).square()
    h = h + h.mT
    h.fill_diagonal_(0)
    first, second = draw_pairs(12, 25, torch.Generator().manual_seed(3))
    for moments, pairs in (
        (Moments.of_matrix(h), list(combinations(range(12), 2))),
        (Moments.of_list(h[first, second], first, second, 12), list(zip(first.tolist(), second.tolist()))),
    ):
        values = torch.stack([h[pair] for pair in pairs])
        centred = dict(zip(pairs, (values - values.mean()).tolist()))
        sharing = [centred[p] * centred[q] for p, q in combinations(pairs, 2) if len({*p, *q}) == 3]
        apart = [centred[p] * centred[q] for p, q in combinations(pairs, 2) if len({*p, *q}) == 4]
        level = sum(apart) / len(apart)
        assert moments.mean == pytest.approx(float(values.mean()), rel=1e-12)
        assert moments.variance == pytest.approx(float(values.var()), rel=1e-12)
        assert moments.between == pytest.approx(
            max(0, sum(sharing) / len(sharing) - level), rel=1e-9, abs=1e-12
        )
        assert moments.single == pytest.approx(
            float((values - values.mean()).square().mean()) - level, rel=1e-9
        )


@pytest.mark.parametrize("pairs", [None, 300])
def test_the_error_of_the_samples_is_that_of_fresh_draws_of_samples(pairs):
    f, generator = mlp(scale=2.0), torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(150):
        estimate = lmnfast.curvature(
            f, torch.randn(60, 6, generator=generator), pairs=pairs, generator=generator
        )
        values.append(estimate.value)
        errors.append(estimate.sample_standard_error)
        assert estimate.sample_standard_error > estimate.standard_error
        low, high = estimate.interval(0.5, of="samples")
        assert (low + high) / 2 == pytest.approx(estimate.value)
    spread, said = torch.tensor(values).std(), torch.tensor(errors).square().mean().sqrt()
    assert 0.8 < float(spread / said) < 1.25


def test_f_is_called_on_the_samples_of_the_draw_alone_and_errors_name_them():
    seen = set()

    def f(x):
        seen.update(x[:, 0].tolist())
        return x.sin()

    x = samples(1000, 3)
    first, second = draw_pairs(1000, 5, torch.Generator().manual_seed(0))
    lmnfast.curvature(f, x, pairs=5, generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([first, second]).unique()
    assert seen & set(x[:, 0].tolist()) == set(x[drawn, 0].tolist())
    bad = int(second[2])
    value = x[bad, 0].clone()
    with pytest.raises(ValueError, match=rf"f\(x\): NaN or Inf in sample {bad}\b"):
        lmnfast.curvature(
            lambda x: torch.where(x == value, torch.nan, x),
            x,
            pairs=5,
            generator=torch.Generator().manual_seed(0),
        )
    undrawn = next(n for n in range(1000) if n not in drawn)
    for wrong in (bad, undrawn):  # all samples are the user's data, also those that no pair needs
        x[wrong] = torch.inf
        with pytest.raises(ValueError, match=rf"x: NaN or Inf in sample {wrong}\b"):
            lmnfast.curvature(f, x, pairs=5, generator=torch.Generator().manual_seed(0))
        x[wrong] = 0


def test_settings_reach_the_pairs():
    f, x, rule = mlp(), samples(12, 6), path_nodes("lobatto", 7)
    how = {"points": 7, "rule": "lobatto", "stabiliser": 0.02, "pooled": False}
    with torch.no_grad():
        L = reference.path_connectivity(f.double(), x.double(), *rule, stabiliser=0.02)
    i, j = torch.triu_indices(12, 12, 1)
    for pairs in (None, 66):
        estimate = lmnfast.curvature(f.float(), x, pairs=pairs, **how)
        assert estimate.value == pytest.approx(float((1 - L[i, j]).mean()), abs=1e-6)
        assert (estimate.points, estimate.rule, estimate.stabiliser) == (7, "lobatto", 0.02)
        assert (estimate.outputs, estimate.precision, estimate.constant_share) == (5, "highest", 0.0)


def test_the_same_pairs_give_the_same_bits_and_the_generator_is_the_callers():
    f, x = mlp(), samples(100, 6)
    state = torch.random.get_rng_state()
    one, two = (
        lmnfast.curvature(f, x, pairs=64, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert one == two and torch.equal(state, torch.random.get_rng_state())
    lmnfast.curvature(f, x, pairs=64)
    assert not torch.equal(state, torch.random.get_rng_state())


def test_fifty_thousand_samples_take_little_memory(tmp_path):
    script = """
import resource, torch, lmnfast
from torch import nn
net = nn.Sequential(nn.Linear(64, 100), nn.SiLU(), nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 31))
x = torch.randn(50_000, 64)
lmnfast.curvature(net, x[:200], pairs=2000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
estimate = lmnfast.curvature(net, x, pairs=10_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, estimate.samples, estimate.pairs)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    grown, count, pairs = map(int, done.stdout.split())
    assert grown < 64 * 1024 and (count, pairs) == (50_000, 10_000)


def test_two_samples_have_one_pair():
    x = samples(2, 6)
    estimate = lmnfast.curvature(mlp(), x)
    assert estimate.pairs == 1 and estimate.standard_error == 0
    assert estimate.sample_standard_error != estimate.sample_standard_error, "not known from one pair"


@pytest.mark.parametrize("pairs", [1, 0, -3, 46])
def test_a_number_of_pairs_that_there_are_not_is_refused(pairs):
    calls = []
    with pytest.raises(ValueError, match=rf"^pairs: expected 2 to 45, .* of 10 samples, .* got {pairs}$"):
        lmnfast.curvature(lambda x: calls.append(1) or x, samples(10, 6), pairs=pairs)
    assert not calls


def test_other_bad_input_is_one_error():
    f, x = mlp(), samples(10, 6)
    with pytest.raises(TypeError, match=r"^pairs: expected an integer or None, got 2\.5"):
        lmnfast.curvature(f, x, pairs=2.5)
    with pytest.raises(ValueError, match=r"^x: expected two samples or more, got 1"):
        lmnfast.curvature(f, x[:1])
    estimate = lmnfast.curvature(f, x, pairs=20)
    for level in (0, 1, -0.5, 95, 1 - 1e-16):
        with pytest.raises(ValueError, match="^level: expected a number above 0 and below 1"):
            estimate.interval(level)
    for level in ("0.9", None):
        with pytest.raises(TypeError, match="^level: expected a number"):
            estimate.interval(level)
    with pytest.raises(ValueError, match="^of: expected 'pairs' or 'samples'"):
        estimate.interval(of="networks")
    for pairs in (None, 20):
        with pytest.raises(TypeError, match=r"^generator: expected a torch\.Generator or None, got 3"):
            lmnfast.curvature(f, x, pairs=pairs, generator=3)
        with pytest.raises(TypeError, match=r"^budget: expected a number of bytes or None, got '1'"):
            lmnfast.curvature(f, x, pairs=pairs, budget="1")
    with pytest.raises(ValueError, match="^pairs: expected None for two samples"):
        lmnfast.curvature(f, x[:2], pairs=2)


def test_another_default_device_of_torch_does_not_matter():
    f, x = mlp(), samples(40, 6)
    expected = [
        lmnfast.curvature(f, x, pairs=p, generator=torch.Generator().manual_seed(0)) for p in (9, 700)
    ]
    with torch.device("meta"):
        generator = [torch.Generator("cpu").manual_seed(0) for _ in range(2)]
        found = [lmnfast.curvature(f, x, pairs=p, generator=g) for p, g in zip((9, 700), generator)]
    assert found == expected
