"""The spectral entropy of eigenvalues against PyTorch.

pytest bench/bench_spectral_entropy.py
"""

import pytest
import torch
from timing import best_of

from lmnfast import ops, reference

compiled = torch.compile(reference.spectral_entropy, dynamic=False)
BARS = {
    "ours": ops.spectral_entropy,
    "eager": reference.spectral_entropy,
    "torch.compile": compiled,
    "sum of the same values": lambda w: w.sum(-1),
}


@pytest.mark.parametrize("shape", [(768,), (4096,), (64, 768), (201, 961)])
@pytest.mark.parametrize("bar", BARS)
def bench_spectral_entropy(benchmark, measure, device, shape, bar):
    benchmark.group = f"spectral_entropy {' x '.join(map(str, shape))}, {device.type}"
    benchmark.extra_info["bar"] = bar
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    if not bar.startswith("sum"):
        assert torch.allclose(BARS[bar](w), reference.spectral_entropy(w), rtol=1e-12)
    benchmark.extra_info["floor_s"] = best_of(lambda: w.sum(-1), 50)
    measure(BARS[bar], (w,), rounds=300 if device.type == "cpu" else 15)
