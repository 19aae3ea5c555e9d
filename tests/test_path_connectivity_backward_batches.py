"""On CUDA gradients come from batches of pairs. In the emulator: any batches, the same bits on each run, bounded memory."""

from itertools import pairwise

import pytest
import torch
from chains import SUMS, cast, chain_with, random_chain, samples
from torch import Tensor

from lmnfast import _native, ops, reference
from lmnfast._chain import Chain
from lmnfast.ops.path_connectivity import native_call
from lmnfast.quadrature import path_nodes

RULE = path_nodes("lobatto", 5)
ONE_PAIR, SOME, ALL = "1", "8000", str(2**26)  # bytes of a batch
STATISTICS = [{"stabiliser": 0.0, "pooled": False}, {"stabiliser": 0.2, "pooled": True}]


def gradients(chain: Chain, x: Tensor, dtype: torch.dtype, **statistic) -> list[Tensor]:
    g = samples(len(x), len(x), seed=3).to(dtype)
    return ops.path_connectivity_backward(cast(chain, dtype), x.to(dtype), g, *RULE, **statistic)


def truth(chain: Chain, x: Tensor, **statistic) -> list[Tensor]:
    """In float64 by automatic differentiation, for the biases that are not None after the weights."""
    parameters = [t.requires_grad_() for t in (*chain.weights, *chain.biases) if t is not None]
    g = samples(len(x), len(x), seed=3)
    return reference.path_connectivity_backward(chain, x, g, *RULE, parameters, **statistic)


@pytest.mark.parametrize("statistic", STATISTICS, ids=["mean", "pooled"])
@pytest.mark.parametrize("name", ["three layers", "wide", *SUMS])
def test_any_batches_give_the_gradient(name, statistic, emulated, dtype, monkeypatch):
    """A batch of one pair, a few groups of samples with a smaller last one, and all pairs at once."""
    if name in SUMS:
        chain = chain_with(name, scale=0.8)
    else:
        widths = [6, 70, 130, 40] if name == "wide" else [6, 9, 20, 5]
        chain = random_chain(widths, ["tanh", "silu", "gelu", "identity"], scale=1.0)
    x = samples(7, chain.weights[0].shape[1])
    straight = name == "no nonlinearity" and not statistic["stabiliser"]
    expected = truth(chain, x, **statistic)
    size = max(float(each.abs().max()) for each in expected)
    assert size < 1e-20 if straight else size > 1e-3
    for bytes_of_batch in (ONE_PAIR, SOME, ALL):
        monkeypatch.setenv("LMNFAST_EMULATED_BATCH", bytes_of_batch)
        for ours, right in zip(gradients(chain, x, dtype, **statistic), expected, strict=True):
            allowed = 1e-20 if straight else size * (1e-4 if dtype == torch.float32 else 1e-11)
            assert ours.dtype == dtype and (ours - right).abs().max() <= allowed


def test_many_rows_are_shared_by_many_blocks(emulated, dtype):
    """Sums over 11 thousand rows, by 43 blocks for each tile."""
    chain, x = random_chain([5, 40, 6], ["identity", "silu", "identity"], scale=1.0), samples(86, 5)
    for ours, right in zip(gradients(chain, x, dtype), truth(chain, x), strict=True):
        assert (ours - right).abs().max() <= (1e-4 if dtype == torch.float32 else 1e-11) * 86**2


def test_each_run_gives_the_same_bits(emulated, dtype, monkeypatch):
    """Whichever blocks run first."""
    monkeypatch.setenv("LMNFAST_EMULATED_BATCH", "40000")
    chain, x = chain_with("one for all", scale=0.8), samples(30, 9)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        runs.append(gradients(chain, x, dtype, stabiliser=0.1))
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_an_unresolved_pair_has_no_part_even_if_it_is_not_finite(emulated, dtype):
    """The kernel's own results: paths to an infinite sample leave the other samples' sums as they are."""
    z, weight = torch.randn(9, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    z[8, 2] = torch.inf
    softplus, identity = 9, 0
    arguments = [[softplus, identity], [1.0, 20.0, 0.0, 0.0], [], []]

    def results(z: Tensor) -> list[Tensor]:
        g = torch.ones(len(z), len(z), dtype=dtype)
        op = torch.ops.lmnfast.path_connectivity_backward
        return op(z, [weight], [None], *arguments, *RULE, g)

    L, _, counts, own, *_ = results(z)
    without = results(z[:8])
    assert (L[8, :8] == -1).all() and int(counts[1]) == 8 + int(without[2][1])
    assert torch.equal(L[:8, :8], without[0]) and own[:8].isfinite().all() and not own[8].any()
    assert (own[:8] - without[3]).abs().max() <= 1e-5 * without[3].abs().max()


def made(samples: int, nodes: int, widths: tuple[int, ...], pairs: Tensor | None = None) -> tuple:
    """The compiled core's call, and what must live as long."""
    z = torch.empty(samples, widths[0])
    weights = [torch.empty(units, depth) for depth, units in pairwise(widths)]
    codes = [4] * len(weights) + [0]
    chain = z, weights, [None] * len(weights), codes, [0.0] * 2 * len(codes), [], []
    rule, gradient = path_nodes("uniform", nodes), torch.empty(3)
    lists = (None, None) if pairs is None else pairs
    kind = _native._C.PathConnectivityBackward
    call, kept = native_call(
        kind, chain, [*widths], rule, 0.0, False, *lists, more=[_native.address(gradient)]
    )
    return call, [kept, gradient]


@pytest.mark.parametrize("widths", [(100, 31), (100, 100, 31), (512, 512, 512, 10), (3, 2000, 5)])
def test_the_workspace_is_bounded(widths, emulated):
    """Beside the layers at the samples it grows with the pairs, and with the nodes, up to a limit."""
    at_a_sample = 4 * 6 * sum(width + 16 for width in widths)  # bytes, of padded rows
    weights = 8 * sum((o + 8) * (i + 8) for i, o in pairwise(widths))
    for nodes in (3, 21, 201):
        for n in (40, 4000, 40000):
            size = made(n, nodes, widths)[0].workspace(1)
            assert size < n * at_a_sample + weights + 2**26 + 2**26
    assert made(20, 5, widths)[0].workspace(1) < made(4000, 5, widths)[0].workspace(1) / 2


def test_lists_of_pairs_are_refused(emulated):
    call, kept = made(4, 5, (5, 3), torch.tensor([[0, 1], [2, 3]]))
    with pytest.raises(RuntimeError, match="path_connectivity_backward: lists of pairs are for the CPU"):
        _native.run(call, torch.empty(2), None, *(torch.empty(99) for _ in range(4)))
    del kept
