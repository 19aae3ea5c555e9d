"""The generic route: which pairs are near, and the tiles that path points are taken in."""

import math

import pytest
import torch
from torch import nn

import lmnfast
from lmnfast import _generic, _tiles
from lmnfast._generic import _near, pairs_apart
from lmnfast._unresolved import InDouble, _largest, are_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def with_near(samples, dtype, shape=(3, 2)):
    """Samples of which some are equal, and some differ by little."""
    x = torch.randn(samples, *shape).to(dtype)
    x[samples // 2 :: 3] = x[0].clone()
    x[samples // 2 + 1 :: 3] = x[1 % samples] * (1 + 2 ** torch.arange(-14.0, -4)[samples % 10].to(dtype))
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 2, 3, 8, 21])
def test_near_samples_are_found_as_pair_by_pair(dtype, samples):
    torch.manual_seed(samples)
    for x in (
        torch.randn(samples, 3, 2).to(dtype),
        with_near(samples, dtype),
        torch.zeros(samples, 4, dtype=dtype),
    ):
        i, j = torch.triu_indices(samples, samples, 1)
        expected = (x[i] == x[j]).flatten(1).all(1) if dtype == torch.float64 else are_close(x[i], x[j])
        near = _near(x)
        assert (near is None and not expected.any()) or torch.equal(near, expected)
        first, second = (
            (torch.cat(part) for part in zip(*pairs_apart(x, 4, near), strict=True))
            if samples > 1
            else (i, j)
        )
        assert torch.equal(first, i[~expected]) and torch.equal(second, j[~expected])


@pytest.mark.parametrize("block", [1, 5, 2**14])
@pytest.mark.parametrize("tile", [1, 30_000, 2**23])
def test_tiles_and_blocks_of_any_size_give_the_same_connectivity(monkeypatch, block, tile):
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3))
    x = with_near(17, torch.float32, (6,))
    expected = lmnfast.connectivity(lambda x: f(x), x)
    monkeypatch.setattr(_generic, "BLOCK", block)
    monkeypatch.setattr(_tiles, "CPU_TILE", tile)
    shares = []
    L = lmnfast.connectivity(lambda x: f(x), x, progress=shares.append)
    assert (L - expected).abs().max() < 1e-5 and shares[-1] == 1 and shares == sorted(shares)
    exact = lmnfast.connectivity(lambda x: f.double()(x), x.double())
    assert (L - exact).abs().max() < 1e-4


def test_a_function_that_changes_later_is_refused_in_the_tile_where_it_does(monkeypatch):
    monkeypatch.setattr(_tiles, "CPU_TILE", 3_000)
    weight, calls = torch.randn(6, 3), []

    def f(x):
        calls.append(len(x))
        return torch.tanh(x @ weight) + (len(calls) > 8) * 0.1

    with pytest.raises(ValueError, match="f: gives other outputs|rounding decides"):
        lmnfast.connectivity(f, torch.randn(12, 6))
    assert 8 < len(calls) < 20, "at once, and not behind all tiles"


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ([], 0.0),
        ([1.0, -3.0, 2.0], 3.0),
        ([1.0, -math.inf], 1.0),
        ([math.nan, -2.0], 2.0),
        ([1e9, 5.0, -7.0], 7.0),
        ([-4.0, -5.0], 5.0),
    ],
)
def test_masks_are_not_the_size_of_the_terms(values, largest):
    assert _largest(torch.tensor(values, dtype=torch.float64)) == largest
    mode = InDouble()
    mode.largest = 0.0
    with mode:
        torch.tensor(values, dtype=torch.float32).clone()
    assert mode.largest == largest
