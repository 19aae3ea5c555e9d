"""Networks of a stack in one launch of the fused kernel: the bits that each has alone."""

import math
from functools import partial

import pytest
import torch
from chains import (
    STATISTICS,
    SUMS,
    assert_refused,
    assert_stack_is_its_networks,
    cast,
    random_chain,
    raw,
    samples,
)
from support import fewer

from lmnfast import reference
from lmnfast._chain import Chain
from lmnfast._settings import PLAIN, Statistic
from lmnfast.ops.path_connectivity import chain_connectivity
from lmnfast.quadrature import path_nodes

# Chains and numbers of samples of stacks, so that each kernel is taken, and the names of the activations.
STACKS = {
    "one hidden layer": ([7, 20, 5], "identity silu identity", (), 17),
    "one hidden layer, 20 outputs": ([9, 33, 20], "identity gelu identity", (), 7),
    "two hidden layers": ([6, 40, 50, 9], "identity silu silu identity", (), 9),
    "three hidden layers": ([5, 30, 20, 17, 6], "tanh silu relu elu identity", (), 7),
    "few outputs behind a wide layer": ([3, 17, 272, 10], "identity silu gelu identity", (), 5),
    "an activation on the output": ([5, 12, 4], "identity silu sigmoid", (), 7),
    "many outputs": ([5, 20, 70], "identity softplus identity", (), 7),
    "no hidden layer": ([6, 4], "silu identity", (), 9),
    **{name: (widths, names, skips, 7) for name, (widths, names, skips) in SUMS.items()},
}


def stack(name: str, networks: int, seed: int = 0) -> tuple[list[Chain], torch.Tensor]:
    """Networks of one structure, and samples (networks, N, D), some of which are close or equal."""
    widths, names, skips, n = STACKS[name]
    chains = [random_chain(widths, names.split(), skips, seed=seed + k) for k in range(networks)]
    x = torch.stack([samples(n, widths[0], seed=seed + k) for k in range(networks)])
    x[-1, 2], x[0, 3] = x[-1, 1], x[0, 1] * (1 + 1e-6)
    return chains, x


@pytest.mark.parametrize("midpoint", [None, False, True], ids=["path", "cubic", "quartic"])
@pytest.mark.parametrize("matmul", ["highest", "high"])
@pytest.mark.parametrize("name", STACKS)
def test_networks_of_a_stack_have_the_bits_that_each_has_alone(
    name, matmul, midpoint, device, dtype, precision
):
    if dtype == torch.float64 and matmul == "high":
        pytest.skip("precision is of float32 alone")
    precision(matmul)
    assert_stack_is_its_networks(*stack(name, fewer(3, 2)), device, dtype, midpoint)


@pytest.mark.parametrize("midpoint", [None, True], ids=["path", "quartic"])
@pytest.mark.parametrize("networks, n", [(1, 12), (2, 1), (2, 2), (7, 5)])
def test_any_number_of_networks_and_samples(networks, n, midpoint, device, dtype):
    chains, x = stack("one hidden layer", networks)
    assert_stack_is_its_networks(chains, x[:, :n], device, dtype, midpoint)


@pytest.mark.parametrize("midpoint", [None, True], ids=["path", "quartic"])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", ["one hidden layer", "block(h) + h, twice"])
def test_stabilised_and_pooled_r2_of_a_stack(name, statistic, midpoint, device, dtype, monkeypatch):
    """In the emulator of three networks in two launches."""
    monkeypatch.setenv("LMNFAST_EMULATED_STACK", str(200 * 1024))
    assert_stack_is_its_networks(*stack(name, 3), device, dtype, midpoint, statistic=statistic)


@pytest.mark.parametrize("kilobytes", [48, 227])
@pytest.mark.parametrize("widths", [[3, 600, 17, 33], [130, 130, 130, 150]])
@pytest.mark.parametrize("midpoint", [None, True], ids=["path", "quartic"])
@pytest.mark.parametrize("statistic", [PLAIN, Statistic(0.1, True)], ids=["plain", "pooled"])
def test_emulated_stacks_in_any_shared_memory(
    widths, kilobytes, midpoint, statistic, emulated, dtype, monkeypatch
):
    """Panels of paths, of sums and of unresolved pairs in shared memory and in the device's."""
    monkeypatch.setenv("LMNFAST_EMULATED_SHARED", str(kilobytes * 1024))
    skips = ((3, 1), (4, 2)) if widths[0] == widths[1] else ()
    names = ["silu", "tanh", "gelu", "identity"]
    chains = [random_chain(widths, names, skips, seed=seed, scale=0.7) for seed in range(2)]
    x = torch.stack([samples(5, widths[0], seed=seed) for seed in range(2)])
    x[:, 4] = x[:, 1] * (1 + 1e-6)
    rule = path_nodes("lobatto", 5)
    assert_stack_is_its_networks(chains, x, emulated, dtype, midpoint, rule, statistic)
    if statistic != PLAIN:
        L = chain_connectivity(cast(chains[0], dtype), x[0].to(dtype), *rule, midpoint, statistic)
        L.resolve()
        f = (
            reference.path_connectivity
            if midpoint is None
            else partial(reference.hermite_connectivity, midpoint=True)
        )
        expected = f(chains[0], x[0], *rule, **statistic._asdict())
        far = ~torch.eye(5).bool() & ((x[0] - x[0][:, None]).abs().amax(2) > 1e-3)
        assert (L.pooled - expected)[far].abs().max() < (1e-3 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("name", ["one hidden layer", "three hidden layers", "block(h) + h, twice"])
@pytest.mark.parametrize("midpoint", [None, True], ids=["path", "quartic"])
def test_emulated_stacks_in_parts(name, midpoint, emulated, dtype, monkeypatch):
    """Of which the workspace holds one network, or a few."""
    chains, x = stack(name, 5)
    for kilobytes in (1, 100):
        monkeypatch.setenv("LMNFAST_EMULATED_STACK", str(kilobytes * 1024))
        assert_stack_is_its_networks(chains, x, emulated, dtype, midpoint)


@pytest.mark.parametrize("midpoint", [None, True], ids=["path", "quartic"])
def test_unresolved_pairs_of_a_stack(midpoint, device, dtype):
    """In one network dead outputs, in another cancelling ones, in the third samples that are not finite."""
    widths, names = [6, 12, 4], ["identity", "tanh", "identity"]
    chains = [random_chain(widths, names, seed=seed) for seed in range(4)]
    x = torch.stack([samples(11, 6, seed=seed) for seed in range(4)])
    chains[0].biases[0].add_(1e3)
    chains[1].weights[1].mul_(1e-30)[2] = 0
    x[1] = x[1, :1] + 1e-5 * x[1]
    x[2, 4] = math.nan
    assert_stack_is_its_networks(chains, x, device, dtype, midpoint)


def test_a_stack_for_the_registered_op(device, dtype):
    """Strided stacks, one that all networks share, and samples that all share."""
    arguments, count = raw(dtype=dtype), 3
    z, (first, last), biases = arguments[:3]
    alone = [z, [first, last], biases]
    many = [
        z.expand(count, *z.shape),
        [torch.stack([first * k for k in (1, 2, 3)], 2).permute(2, 0, 1), last.expand(count, *last.shape)],
        [b.expand(count, *b.shape) for b in biases],
    ]
    many = [v.to(device) if isinstance(v, torch.Tensor) else [w.to(device) for w in v] for v in many]
    L, counts, _ = torch.ops.lmnfast.path_connectivity(*many, *arguments[3:])
    assert L.shape == (count, 12, 12) and counts.shape == (count, 2) and not torch.equal(L[0], L[1])
    for k in range(count):
        own = [
            alone[0].to(device),
            [((k + 1) * first).to(device), last.to(device)],
            [b.to(device) for b in biases],
        ]
        one, its_counts, _ = torch.ops.lmnfast.path_connectivity(*own, *arguments[3:])
        assert torch.equal(L[k], one) and torch.equal(counts[k], its_counts)


def several(networks: int = 2, dtype: torch.dtype = torch.float32):
    """Arguments of the registered op, of several networks."""
    each = [[k * t for t in [a[0], *a[1], *a[2]]] for k, a in enumerate([raw(dtype=dtype)] * networks, 1)]
    z, *weights_and_biases = map(torch.stack, zip(*each))
    return [z, weights_and_biases[:2], weights_and_biases[2:], *raw(dtype=dtype)[3:]]


def test_opcheck_of_a_stack(dtype):
    torch.library.opcheck(torch.ops.lmnfast.path_connectivity.default, several(dtype=dtype))
    torch.library.opcheck(torch.ops.lmnfast.hermite_connectivity.default, [*several(dtype=dtype), True])


@pytest.mark.parametrize(
    "position, change, message",
    [
        (0, lambda z: z[:0], "z: expected samples of one or more networks"),
        (0, lambda z: z[:1], r"weights\[0\]: expected \(1, ...\), a network each, got shape \(2, 7, 5\)"),
        (
            1,
            lambda w: [w[0], w[1][0]],
            r"weights\[1\]: expected \(2, ...\), a network each, got shape \(3, 7\)",
        ),
        (1, lambda w: [w[0], w[1][:, :, 1:]], r"weights\[1\]: expected \(out, 7\)"),
        (2, lambda b: [b[0], b[1].repeat(2, 1)], r"biases\[1\]: expected \(2, ...\), a network each"),
    ],
)
def test_stacks_that_do_not_fit_are_named(position, change, message):
    arguments = several()
    arguments[position] = change(arguments[position])
    assert_refused(torch.ops.lmnfast.path_connectivity, arguments, ValueError, message)
