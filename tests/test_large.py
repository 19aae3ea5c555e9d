"""Beyond 2^31 values: the CUDA kernels' last blocks, emulated, in memory that they alone touch."""

import itertools
import mmap

import pytest
import torch

from lmnfast import _native, ops, reference
from lmnfast._chain import Activation, Chain
from lmnfast.quadrature import path_nodes

BEYOND = 2**31
LAST = 32  # blocks of each grid that run


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that take no memory until they are written."""
    size = torch.Size(shape).numel() * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, max(size, 1), flags=flags), dtype=dtype).view(shape)


@pytest.fixture
def last_blocks(emulated, monkeypatch):
    def empty(like, *shape, dtype=None):
        return untouched(*shape, dtype=dtype or like.dtype)

    monkeypatch.setenv("LMNFAST_EMULATED_LAST_BLOCKS", str(LAST))
    monkeypatch.setattr(_native, "empty", empty)


@pytest.mark.parametrize("symmetric", [False, True])
def test_distances_of_50_000_samples(symmetric, last_blocks):
    n = 50_000
    assert n * n > BEYOND
    u = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = u if symmetric else u[: n - 1] + 1
    d = ops.jacobian_distance(u, v, False, torch.float32)
    truth = reference.jacobian_distance(u[-8:], v[-8:], False)
    assert (d[-8:, -8:] - truth).abs().max() <= 1e-6 * truth.max() and truth.max() > 1


@pytest.mark.parametrize("widths", [(600, 6, 620), (620, 6, 600), (620, 600), (70, 6, 6, 650)])
def test_jacobians(widths, last_blocks):
    """One launch for all samples, but for the last widths', whose workspace takes a few thousand at a time."""
    n = BEYOND // (widths[0] * widths[-1]) + 9
    generator = torch.Generator().manual_seed(0)
    weights = tuple(torch.randn(o, i, generator=generator) / i**0.5 for i, o in itertools.pairwise(widths))
    names = ["silu"] * len(weights) + ["identity"]
    chain = Chain(weights, (None,) * len(weights), tuple(map(Activation, names)))
    x = torch.randn(n, widths[0], generator=generator)
    J = ops.jacobian(chain, x)
    ours, truth = J[-1].flatten()[-500:], reference.jacobian(chain, x[-1:]).flatten()[-500:]
    assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max() and truth.abs().max() > 0.01


@pytest.mark.parametrize("outputs", [100, 110, 112])
def test_outputs_along_paths(outputs, last_blocks):
    """By way of shared memory, straight from memory, and there 16 bytes at a time."""
    nodes, weights = path_nodes("uniform", 21)
    pairs, some = -(-BEYOND // (19 * outputs)) + 9, 5
    interior = untouched(pairs, 19, outputs)
    interior[-some:] = torch.randn(some, 19, outputs, generator=torch.Generator().manual_seed(0))
    ends = torch.randn(3, outputs, generator=torch.Generator().manual_seed(1))
    first, second = torch.zeros(pairs, dtype=torch.int64), torch.ones(pairs, dtype=torch.int64)
    r2, _, _ = torch.ops.lmnfast.path_r2(interior, ends, first, second, nodes, weights)
    truth = reference.path_r2(
        interior[-some:].double(), ends.double(), first[-some:], second[-some:], nodes, weights
    )
    assert (r2[-some:] - truth).abs().max() < 1e-5 and truth.max() > 0.01


def test_many_spectra(last_blocks):
    samples, some = 1000, 5
    batch = BEYOND // samples + 9
    eigenvalues, bits = untouched(batch, samples), torch.zeros(batch, dtype=torch.float64)
    eigenvalues[-some:] = torch.rand(some, samples, generator=torch.Generator().manual_seed(0))
    _native.run(_native._C.SpectralEntropy(False, eigenvalues.data_ptr(), batch, samples), bits)
    assert (bits[-some:] - reference.spectral_entropy(eigenvalues[-some:])).abs().max() < 1e-9 < bits[-1]
