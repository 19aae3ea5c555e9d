"""Pooled curvature from a draw of pairs: ours, and PyTorch by hand on the same pairs; and ours from all pairs. And all
observables of a probe beside LMN alone.

pytest bench/bench_estimate.py
"""

import functools

import pytest
import torch
from timing import best_of
from torch import nn

import lmnfast
from lmnfast import observables
from lmnfast._pairs import draw_pairs

PAIRS = 10_000
T = torch.linspace(0, 1, 21)


@functools.cache
def problem(samples: int, device: torch.device):
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.SiLU(), nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 31))
        .requires_grad_(False)
        .to(device)
    )
    return net, torch.randn(samples, 100).to(device)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def by_hand(f, x, chunk):
    """f at the points of a chunk of pairs, at the used samples once, and then the definition in a few large operations."""
    first, second = (ends.to(x.device) for ends in draw_pairs(len(x), PAIRS, generator()))
    t = T.to(x)
    centred, inner = (t - 0.5)[:, None], t[1:-1, None]
    used, places = torch.stack([first, second]).unique(return_inverse=True)
    x = x[used]
    ends, (first, second) = f(x), places
    found = []
    for i, j in zip(first.split(chunk), second.split(chunk)):
        y = f(torch.lerp(x[i, None], x[j, None], inner).flatten(0, 1)).unflatten(0, (-1, 19))
        y = torch.cat((ends[i, None], y, ends[j, None]), 1)
        y = y - y.mean(1, keepdim=True)
        on_line = (centred * y).mean(1).square().sum(1)
        found.append(1 - on_line / ((centred**2).mean() * y.square().mean(1).sum(1)))
    h = torch.cat(found)
    return h.mean(), h.std() / len(h) ** 0.5


@pytest.mark.parametrize("samples", [961, 50_000])
@pytest.mark.parametrize("bar", ["ours", "ours, generic route", "eager, by hand", "ours, all pairs"])
def bench_curvature(benchmark, measure, device, samples, bar):
    """Predicted, of the time for all pairs of 961 samples: the 46th part of their work, and the draw. Measured on one core with
    AVX-512, in processor time: a 28th.
    """
    if bar == "ours, all pairs" and samples > 1000:
        pytest.skip("1.2 thousand million pairs")
    f, x = problem(samples, device)
    benchmark.group = f"curvature, {PAIRS} pairs of {samples} samples, 100-100-31, {device.type}"
    benchmark.extra_info["bar"] = bar
    if bar == "eager, by hand":
        chunk = min([2**k for k in range(4, 14, 2)], key=lambda c: best_of(lambda: by_hand(f, x, c), 2))
        value = by_hand(f, x, chunk)[0]
        call, arguments = by_hand, (f, x, chunk)
    else:
        pairs = None if "all" in bar else PAIRS
        g = (lambda points: f(points)) if "generic" in bar else f

        def call(f, x):
            return lmnfast.curvature(f, x, pairs=pairs, generator=generator())

        arguments = g, x
        value = call(*arguments).value
    truth = lmnfast.curvature(f, x, pairs=PAIRS, generator=generator())
    assert abs(float(value) - truth.value) <= 5 * truth.standard_error + 1e-6
    measure(call, arguments, rounds=9)


@pytest.mark.parametrize("names", ["LMN alone", "all", "all but jacobian_rank"])
def bench_observables(benchmark, measure, device, names):
    """Predicted: 1.1 of LMN alone, with the second eigenproblem of jacobian_rank (100 x 100 features); measured 1.09."""
    f, x = problem(768, device)
    benchmark.group = f"all observables of a measurement, 100-100-31, N=768, {device.type}"
    benchmark.extra_info["bar"] = "ours" if names == "LMN alone" else names
    every = [name for name in observables().as_dict() if name != "l2_norm"]
    chosen = {
        "LMN alone": (),
        "all": every,
        "all but jacobian_rank": [n for n in every if n != "jacobian_rank"],
    }[names]
    m = lmnfast.measure(f, x, observables=chosen)
    assert set(m.observables) == set(chosen) and all(value == value for value in m.observables.values())
    measure(lambda f, x: lmnfast.measure(f, x, observables=chosen), (f, x), rounds=9)
