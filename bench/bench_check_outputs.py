"""The checks of a call's numbers against the same checks in PyTorch, and against reading the same values once.

pytest bench/bench_check_outputs.py
"""

import pytest
import torch
from timing import best_of

from lmnfast import ops, reference


def one_by_one(x, y, again, expected, L, counts, epsilon):
    """The same results from one torch call per step. Nothing is read from the device."""

    def failing(bad):
        return torch.stack((bad.sum(), bad.byte().argmax()))

    finite = [failing(~t.isfinite().all(1)) for t in (x, y)]
    magnitude = torch.where(expected.isfinite(), expected.abs(), 0)
    agree = (y - expected).abs() <= 32 * epsilon * (magnitude + magnitude.amax())
    high, low = y.max(0).values, y.min(0).values
    rounding = 8 * epsilon * torch.maximum(high.abs(), low.abs())
    same = (again - y).abs().amax(0) <= 1e-3 * (high - low) + rounding + 1e-30
    entries = failing(~L.isfinite().flatten())
    return torch.cat([*finite, failing(~agree.flatten()), failing(~same), entries, counts])


BARS = {"ours": ops.check_outputs, "eager": one_by_one, "torch.compile": torch.compile(one_by_one)}


@pytest.mark.parametrize("samples, outputs", [(768, 31), (961, 31), (961, 1000), (4096, 31)])
@pytest.mark.parametrize("bar", [*BARS, "aminmax of the same values"])
def bench_check_outputs(benchmark, measure, device, samples, outputs, bar):
    benchmark.group = f"check_outputs N={samples} K={outputs}, {device.type}"
    benchmark.extra_info["bar"] = bar
    generator = torch.Generator().manual_seed(0)
    shapes = (samples, 100), (samples, outputs), (samples, samples)
    x, y, L = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    arguments = (x, y, y.clone(), y.clone(), L, torch.tensor([3, 4], device=device), 2.0**-23)
    expected = reference.check_outputs(*arguments).tolist()
    assert ops.check_outputs(*arguments).tolist() == expected and expected[7:] == [0, 0, 0, 3, 4]
    values = torch.cat([t.flatten() for t in arguments[:5]])
    benchmark.extra_info["floor_s"] = best_of(lambda: torch.aminmax(values), 20)
    call = BARS.get(bar, lambda *_: torch.aminmax(values))
    measure(call, arguments, rounds=100 if device.type == "cpu" else 15)
