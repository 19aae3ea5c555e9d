"""The fused kernel against the float64 reference, which takes its slopes from automatic differentiation."""

import pytest
import torch
from chains import (
    FOR_STATISTICS,
    LAYERS_THAT_DO_NOT_FIT,
    RULE,
    RULES_THAT_DO_NOT_FIT,
    SUMS,
    assert_refused,
    assert_stack_is_its_networks,
    assert_statistics_right,
    cast,
    chain_with,
    hermite_condition,
    hermite_truth,
    random_chain,
    random_sums,
    samples,
)
from support import COMPILED, fewer

from lmnfast import ops, reference
from lmnfast._chain import ACTIVATIONS, Chain
from lmnfast.quadrature import path_nodes

UNIFORM = path_nodes("uniform", 21)
MIDPOINT = pytest.mark.parametrize("midpoint", [False, True], ids=["cubic", "quartic"])


def measured(chain, x, device, dtype, midpoint, rule=UNIFORM) -> torch.Tensor:
    """The kernel's matrix, brought to the CPU."""
    L = ops.hermite_connectivity(cast(chain, dtype, device), x.to(device, dtype), *rule, midpoint)
    assert L.dtype == dtype and L.shape == (len(x), len(x)) and L.device.type == device.type
    return L.cpu()


def assert_right(chain, x, device, dtype, midpoint, rule=UNIFORM) -> torch.Tensor:
    """At most twice the largest error of the float32 reference, and a few roundings of the outputs. Returns the reference's."""
    truth = hermite_truth(chain, x, *rule, midpoint)
    ours = measured(chain, x, device, dtype, midpoint, rule)
    assert torch.equal(ours, ours.mT) and (ours.diagonal() == 1).all()
    allowed = 4 * torch.finfo(dtype).eps * (1 + hermite_condition(chain, x, rule[0], midpoint))
    if dtype == torch.float32:
        plain = hermite_truth(cast(chain, dtype), x.to(dtype), *rule, midpoint)
        allowed += 2 * (plain.double() - truth).abs().max()
    assert ((ours.double() - truth).abs() <= allowed).all()
    return truth


@MIDPOINT
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_on_the_input_and_between_layers(name, midpoint, device, dtype):
    chain = random_chain([9, 33, 20, 5], [name, name, name, "identity"])
    truth = assert_right(chain, 2 * samples(fewer(21, 13), 9), device, dtype, midpoint)
    if name != "identity":
        assert truth.min() < 0.95, "the input does not exercise the nonlinearity"


@MIDPOINT
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_samples_of_huge_size_have_the_slopes_of_pytorch(name, midpoint, device):
    """At 1e34 and above a slope that only nearly vanishes, times the sample, would not be small."""
    if name == "sin":
        pytest.skip("its float32 argument of that size has no digit behind the point")
    chain, x = random_chain([8, 4, 2], ["identity", name, "identity"]), 1e36 * samples(fewer(20, 8), 8)
    truth = reference.hermite_connectivity(chain, x, *UNIFORM, midpoint)
    assert (measured(chain, x, device, torch.float32, midpoint) - truth).abs().max() < 1e-4


@MIDPOINT
@pytest.mark.parametrize(
    "names", [["identity", "silu", "tanh"], ["identity", "silu"], ["silu", "identity", "identity"]]
)
def test_activations_anywhere(names, midpoint, device, dtype):
    chain = random_chain([5, 12, 4][: len(names)], names, scale=0.7)
    assert_right(chain, samples(20, 5), device, dtype, midpoint)


@MIDPOINT
@pytest.mark.parametrize("sums", SUMS)
def test_sums_with_earlier_values(sums, midpoint, device, dtype):
    chain = chain_with(sums, scale=1.0)
    assert_right(chain, samples(fewer(20, 11), len(chain.weights[0].mT)), device, dtype, midpoint)


@MIDPOINT
@pytest.mark.parametrize("seed", range(6))
def test_any_sums_in_any_chain(seed, midpoint, device, dtype):
    chain = random_sums(seed)
    assert_right(chain, samples(fewer(18, 11), len(chain.weights[0].mT)), device, dtype, midpoint)


@MIDPOINT
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 33, 65])
def test_any_number_of_samples(n, midpoint, device, dtype):
    chain = random_chain([4, 10, 3], ["identity", "silu", "identity"])
    assert_right(chain, samples(n, 4), device, dtype, midpoint)


@MIDPOINT
@pytest.mark.parametrize("widths", [[1, 1, 1], [1, 2, 7], [5, 8, 9], [2, 9, 17], [6, 65, 31], [4, 3, 70]])
def test_any_width(widths, midpoint, device, dtype):
    chain = random_chain(widths, ["tanh", "silu", "identity"], bias=False, seed=sum(widths))
    assert_right(chain, samples(18, widths[0]), device, dtype, midpoint)


@MIDPOINT
@pytest.mark.parametrize("rule", [("uniform", 3), ("uniform", 51), ("lobatto", 9)])
def test_any_nodes_and_weights(rule, midpoint, device, dtype):
    chain = random_chain([5, 30, 6], ["identity", "silu", "identity"])
    assert_right(chain, samples(20, 5), device, dtype, midpoint, path_nodes(*rule))


@MIDPOINT
def test_coincident_samples_dead_units_and_affine_networks_are_exactly_one(midpoint, device, dtype):
    x = samples(24, 7)
    x[1::2] = x[::2]
    chain = random_chain([7, 20, 12, 3], ["silu", "gelu", "tanh", "identity"])
    assert (measured(chain, x, device, dtype, midpoint).diagonal(1)[::2] == 1).all()
    chain.biases[0].sub_(1e3)
    dead = Chain(
        chain.weights,
        chain.biases,
        (chain.activations[-1], *random_chain([1, 1], ["relu", "relu"]).activations, chain.activations[-1]),
    )
    assert (measured(dead, x, device, dtype, midpoint) == 1).all()
    affine = random_chain([6, 9, 4], ["identity"] * 3)
    assert (measured(affine, samples(20, 6), device, dtype, midpoint) == 1).all()


@MIDPOINT
@pytest.mark.parametrize("name", FOR_STATISTICS)
def test_stabilised_and_pooled_r2(name, midpoint, device, dtype):
    def measured(chain, x, **options):
        return ops.hermite_connectivity(chain, x, *UNIFORM, midpoint, **options)

    def truth(chain, x, **options):
        return hermite_truth(chain, x, *UNIFORM, midpoint, **options)

    assert_statistics_right(measured, truth, FOR_STATISTICS[name](), device, dtype)


def test_between_close_samples_the_polynomials_become_the_path(device):
    """Relative to 1 - r2, the network's own distance from a straight line."""
    chain = random_chain([6, 30, 5], ["identity", "silu", "identity"])
    x = samples(1, 6) + 0.1 * samples(30, 6, seed=3)
    bend = 1 - reference.path_connectivity(chain, x, *UNIFORM) + torch.eye(30)
    errors = [
        ((1 - measured(chain, x, device, torch.float64, midpoint) - bend).abs() / bend)
        .fill_diagonal_(0)
        .max()
        for midpoint in (False, True)
    ]
    assert 5e-3 < errors[0] < 0.2 and errors[1] < 5e-3


@MIDPOINT
@pytest.mark.parametrize("matmul, bound", [("highest", 2e-5), ("high", 1e-3)])
def test_errors_at_each_matmul_precision(matmul, bound, midpoint, device, precision):
    chain, x = (
        random_chain([20, 60, 50, 10], ["identity", "silu", "silu", "identity"], scale=1.0),
        2 * samples(24, 20),
    )
    precision(matmul)
    truth = reference.hermite_connectivity(chain, x, *UNIFORM, midpoint)
    L = measured(chain, x, device, torch.float32, midpoint)
    assert truth.min() < 0.9 and (L.double() - truth).abs().max() < bound


@COMPILED
def test_the_same_bits_for_any_thread_count(device, dtype, threads):
    chain, x = (
        random_chain([6, 30, 20, 7], ["identity", "silu", "tanh", "identity"]),
        samples(fewer(70, 35), 6),
    )
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(measured(chain, x, device, dtype, True))
    assert all(torch.equal(results[0], other) for other in results[1:])


@MIDPOINT
@pytest.mark.parametrize("sums", ["block(h) + h, twice", "to outputs behind an activation"])
def test_sums_of_a_stack_have_the_bits_that_each_network_has_alone(sums, midpoint, device, dtype):
    chains = [chain_with(sums, seed=seed) for seed in range(2)]
    x = torch.stack([samples(19, len(chains[0].weights[0].mT), seed=seed) for seed in range(2)])
    x[0, 4], x[1, 3] = x[0, 2], x[1, 1] * (1 + 1e-6)
    assert_stack_is_its_networks(chains, x, device, dtype, midpoint)


@pytest.mark.parametrize("widths", [[5, 20, 9], [5, 90, 70, 9]], ids=["one hidden layer", "two"])
def test_a_stack_for_the_registered_op(widths, device, dtype):
    op, count = torch.ops.lmnfast.hermite_connectivity, 3
    names = ["identity", *["silu"] * (len(widths) - 2), "identity"]
    chains = [cast(random_chain(widths, names, seed=seed), dtype, device) for seed in range(count)]
    z = torch.stack([samples(12, 5, seed=seed) for seed in range(count)]).to(device, dtype)
    codes = [ACTIVATIONS.index(name) for name in names]
    rest = [codes, [0.0] * 2 * len(codes), [], [], *UNIFORM, False]
    together = [list(map(torch.stack, zip(*(tensors(c) for c in chains)))) for tensors in (_weights, _biases)]
    L, counts, _ = op(z, *together, *rest)
    assert L.shape == (count, 12, 12) and counts.shape == (count, 2) and not torch.equal(L[0], L[1])
    for n, chain in enumerate(chains):
        one, its_counts, _ = op(z[n], list(chain.weights), list(chain.biases), *rest)
        assert torch.equal(L[n], one) and torch.equal(counts[n], its_counts)


def _weights(chain: Chain) -> tuple[torch.Tensor, ...]:
    return chain.weights


def _biases(chain: Chain) -> tuple[torch.Tensor | None, ...]:
    return chain.biases


def raw(dtype: torch.dtype) -> list:
    """Arguments of the registered op."""
    chain = cast(random_chain([5, 7, 3], ["silu", "relu", "identity"]), dtype)
    codes = [ACTIVATIONS.index(a.name) for a in chain.activations]
    return [
        samples(12, 5).to(dtype),
        list(chain.weights),
        list(chain.biases),
        codes,
        [0.0] * 6,
        [],
        [],
        *UNIFORM,
        True,
    ]


def test_ctrl_c_ends_it_and_the_next_result_is_right(interrupted):
    chain = cast(random_chain([8, 100, 100, 9], ["identity", "silu", "gelu", "identity"]), torch.float32)
    x = samples(4000, 8).float()
    before = ops.hermite_connectivity(chain, x[:70], *UNIFORM, True)
    interrupted(lambda: ops.hermite_connectivity(chain, x, *UNIFORM, True))
    assert torch.equal(ops.hermite_connectivity(chain, x[:70], *UNIFORM, True), before)


def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.lmnfast.hermite_connectivity.default, raw(dtype))


def test_torch_compile_gives_the_same_bits(dtype):
    def measured(z, *rest):
        return torch.ops.lmnfast.hermite_connectivity(z * 2, *rest)[0] + 1

    arguments = raw(dtype)
    compiled = torch.compile(measured, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), measured(*arguments))


@pytest.mark.parametrize("position, value, error, message", LAYERS_THAT_DO_NOT_FIT)
def test_layers_that_do_not_fit_are_named(position, value, error, message):
    arguments = raw(torch.float32)
    arguments[position] = value
    assert_refused(torch.ops.lmnfast.hermite_connectivity, arguments, error, message)


@pytest.mark.parametrize("position, value, error, message", RULES_THAT_DO_NOT_FIT)
def test_rules_that_do_not_fit_are_named(position, value, error, message):
    arguments = raw(torch.float32)
    arguments[7:9] = RULE
    arguments[7 + position] = value
    assert_refused(
        torch.ops.lmnfast.hermite_connectivity, arguments, error, message.replace("weights", "node_weights")
    )
