"""The fused kernel against the float64 reference: every activation, instruction set, dtype, odd size, limit case."""

import pytest
import torch
from chains import activation, cast, random_chain, samples

from lmnfast import _native, ops, reference
from lmnfast.network import ACTIVATIONS, Chain
from lmnfast.quadrature import path_nodes

UNIFORM = path_nodes("uniform", 21)
LANES = 16  # of the widest vectors in float32


def condition(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    """(N, N): mean over outputs of magnitude over spread along the path, what a rounding of the output costs r2."""
    t = UNIFORM[0][:, None]
    y = chain(torch.lerp(x[:, None, None], x[None, :, None], t).flatten(0, 2)).unflatten(
        0, (len(x), len(x), -1)
    )
    return (y.abs().amax(2) / y.std(2).clamp_min(1e-300)).mean(-1)


def assert_as_right_as_pytorch(chain: Chain, x: torch.Tensor, dtype: torch.dtype, rule=UNIFORM) -> None:
    """At most twice the largest error of the float32 reference; float64 to 1e-12; and a few roundings of the outputs."""
    truth = reference.path_connectivity(chain, x, *rule)
    ours = ops.path_connectivity(cast(chain, dtype), x.to(dtype), *rule)
    assert ours.dtype == dtype and ours.shape == truth.shape
    assert torch.equal(ours, ours.mT) and (ours.diagonal() == 1).all()
    error = (ours.double() - truth).abs()
    allowed = 1e-12
    if dtype == torch.float32:
        plain = reference.path_connectivity(cast(chain, dtype), x.to(dtype), *rule)
        allowed = 2 * (plain.double() - truth).abs().max()
    assert (error <= allowed + 4 * torch.finfo(dtype).eps * (1 + condition(chain, x))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_on_the_input_and_between_layers(name, isa, dtype):
    chain = random_chain([9, 33, 20, 5], [name, name, name, "identity"])
    x = 2 * samples(37, 9)
    assert_as_right_as_pytorch(chain, x, dtype)
    if name != "identity":
        truth = reference.path_connectivity(chain, x, *UNIFORM)
        assert truth.min() < 0.9, "the input does not exercise the nonlinearity"


@pytest.mark.parametrize("name", ["silu", "sigmoid", "tanh", "relu"])
def test_activation_on_the_output(name, isa, dtype):
    chain = random_chain([5, 12, 4], ["identity", "silu", name], scale=0.7)
    assert_as_right_as_pytorch(chain, samples(20, 5), dtype)


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_one_linear_layer_and_an_activation(name, isa, dtype):
    assert_as_right_as_pytorch(random_chain([6, 4], ["identity", name]), 3 * samples(20, 6), dtype)


@pytest.mark.parametrize("n", [1, 2, 3, LANES - 1, LANES, LANES + 1, 63, 64, 65, 130])
def test_any_number_of_samples(n, isa, dtype):
    assert_as_right_as_pytorch(
        random_chain([4, 10, 3], ["identity", "silu", "identity"]), samples(n, 4), dtype
    )


@pytest.mark.parametrize(
    "widths", [[1, 1, 1], [1, 2, 7], [3, 7, 8], [5, 8, 9], [2, 9, 17], [6, 65, 31], [4, 3, 64]]
)
@pytest.mark.parametrize("bias", [True, False])
def test_any_width(widths, bias, isa, dtype):
    chain = random_chain(widths, ["tanh", "silu", "identity"], bias=bias, seed=sum(widths))
    assert_as_right_as_pytorch(chain, samples(21, widths[0]), dtype)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_any_depth(depth, isa, dtype):
    chain = random_chain([6] + [13] * depth + [4], ["identity"] + ["silu"] * depth + ["identity"])
    assert_as_right_as_pytorch(chain, samples(19, 6), dtype)


@pytest.mark.parametrize(
    "rule", [("uniform", p) for p in (2, 3, 4, 8, 51)] + [("lobatto", p) for p in (2, 3, 5, 9, 21)]
)
def test_any_nodes_and_weights(rule, isa, dtype):
    chain = random_chain([5, 30, 6], ["identity", "silu", "identity"])
    assert_as_right_as_pytorch(chain, samples(20, 5), dtype, path_nodes(*rule))


@pytest.mark.parametrize("name", ["silu", "sigmoid", "tanh"])
@pytest.mark.parametrize("magnitude", [1e-4, 0.1, 30.0, 79.0, 81.0, 1e4])
def test_separated_exponentials_and_direct_evaluation_agree_with_the_reference(name, magnitude, isa, dtype):
    x = samples(33, 8)
    x *= magnitude / x.abs().max()
    assert_as_right_as_pytorch(random_chain([8, 6], [name, "identity"], bias=False), x, dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_coincident_samples_are_connected_by_exactly_one(name, isa, dtype):
    chain = cast(random_chain([7, 20, 12, 3], [name, name, name, "identity"]), dtype)
    x = samples(40, 7).to(dtype)
    x[1::2] = x[::2]
    L = ops.path_connectivity(chain, x, *UNIFORM)
    assert (L.diagonal(1)[::2] == 1).all()


def test_units_that_do_not_move_leave_no_residual(isa, dtype):
    """Samples that differ only where the network does not look: outputs constant to rounding, not noise."""
    chain = cast(random_chain([8, 16, 5], ["silu", "silu", "identity"]), dtype)
    chain.weights[0][:, 4:] = 0
    x = samples(30, 8).to(dtype)
    x[:, :4] = x[0, :4]
    assert (ops.path_connectivity(chain, x, *UNIFORM) == 1).all()


@pytest.mark.parametrize(
    "name, shift",
    [("relu", -1e3), ("sigmoid", 1e3), ("sigmoid", -1e3), ("tanh", 1e3), ("tanh", -1e3), ("elu", -1e3)],
)
def test_dead_and_saturated_units_give_exactly_one(name, shift, isa, dtype):
    chain = cast(random_chain([6, 24, 4], ["identity", name, "identity"]), dtype)
    chain.biases[0].add_(shift)
    assert (ops.path_connectivity(chain, samples(20, 6).to(dtype), *UNIFORM) == 1).all()


def test_an_affine_network_has_exactly_one_everywhere(isa, dtype):
    chain = cast(random_chain([6, 9, 4], ["identity"] * 3), dtype)
    assert (ops.path_connectivity(chain, samples(20, 6).to(dtype), *UNIFORM) == 1).all()


def test_a_constant_output_counts_one(isa, dtype):
    chain = random_chain([6, 20, 4], ["identity", "silu", "identity"])
    x = samples(25, 6)
    without = Chain(
        (chain.weights[0], chain.weights[1][1:]), (chain.biases[0], chain.biases[1][1:]), chain.activations
    )
    chain.weights[1][0] = 0
    L = ops.path_connectivity(cast(chain, dtype), x.to(dtype), *UNIFORM).double()
    truth = (1 + 3 * reference.path_connectivity(without, x, *UNIFORM)) / 4
    assert (L - truth).abs().max() < 1e-5


def test_an_offset_costs_no_digits(isa):
    """float32 outputs near 100 with a spread of 1: PyTorch loses two digits, the chord residual none."""
    chain = cast(random_chain([6, 20, 4], ["identity", "silu", "identity"]), torch.float32)
    x = samples(25, 6).float()
    L = ops.path_connectivity(chain, x, *UNIFORM)
    chain.biases[1].add_(100)
    assert (ops.path_connectivity(chain, x, *UNIFORM) - L).abs().max() < 1e-6


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_the_scale_of_the_outputs_does_not_matter(factor, isa):
    chain = cast(random_chain([6, 20, 4], ["identity", "silu", "identity"]), torch.float32)
    x = samples(25, 6).float()
    scaled = Chain(
        (chain.weights[0], chain.weights[1] * factor),
        (chain.biases[0], chain.biases[1] * factor),
        chain.activations,
    )
    assert torch.equal(ops.path_connectivity(scaled, x, *UNIFORM), ops.path_connectivity(chain, x, *UNIFORM))


def test_the_same_bits_for_any_thread_count(isa, dtype, threads):
    chain = cast(random_chain([6, 30, 20, 7], ["identity", "silu", "tanh", "identity"]), dtype)
    x = samples(150, 6).to(dtype)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(ops.path_connectivity(chain, x, *UNIFORM))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_integers_agree_to_the_bit_across_instruction_sets(dtype):
    """Integer weights and dyadic nodes make every product and sum exact, fused or not."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    chain = Chain((integers(11, 5),), (integers(11),), (activation("relu"), activation("identity")))
    nodes = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    weights = torch.tensor([1, 2, 2, 2, 1], dtype=torch.float64) / 8
    x, results, before = 4 * integers(40, 5), [], _native._C.isa()
    for isa in _native._C.isas():
        _native._C.use_isa(isa)
        results.append(ops.path_connectivity(chain, x, nodes, weights))
    _native._C.use_isa(before)
    truth = reference.path_connectivity(cast(chain, torch.float64), x.double(), nodes, weights)
    assert 0.2 < truth.min() < 0.9
    assert (results[0].double() - truth).abs().max() < 1e-6
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_strided_expanded_and_tracked_tensors(isa):
    chain = cast(random_chain([6, 20, 4], ["identity", "silu", "identity"]), torch.float32)
    strided = Chain(
        tuple(w.mT.contiguous().mT.requires_grad_() for w in chain.weights),
        tuple(b[:1].expand(len(b)) for b in chain.biases),
        chain.activations,
    )
    plain = Chain(chain.weights, tuple(b.detach().contiguous() for b in strided.biases), chain.activations)
    x = samples(40, 6).float()
    with torch.no_grad():
        L = ops.path_connectivity(strided, x[::2], *UNIFORM)
    assert torch.equal(L, ops.path_connectivity(plain, x[::2].contiguous(), *UNIFORM))


def raw(n: int = 12, dtype: torch.dtype = torch.float32):
    """Arguments of the registered op."""
    chain = cast(random_chain([5, 7, 3], ["silu", "relu", "identity"]), dtype)
    codes = [ACTIVATIONS.index(a.name) for a in chain.activations]
    return [samples(n, 5).to(dtype), list(chain.weights), list(chain.biases), codes, [0.0] * 6, *UNIFORM]


def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.lmnfast.path_connectivity.default, raw(dtype=dtype))


def test_torch_compile_gives_the_same_bits():
    def measured(z, weights, biases, *rest):
        return torch.ops.lmnfast.path_connectivity(z * 2, weights, biases, *rest) + 1

    z, *rest = raw()
    compiled = torch.compile(measured, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, *rest), measured(z, *rest))


@pytest.mark.parametrize(
    "position, value, error, message",
    [
        (
            0,
            torch.zeros(4, 5, dtype=torch.float16),
            TypeError,
            "z: expected float32 or float64 on the CPU, got torch.float16",
        ),
        (0, torch.zeros(0, 5), ValueError, "z: expected samples"),
        (0, torch.zeros(5), ValueError, "z: expected samples"),
        (
            1,
            [torch.zeros(7, 5), torch.zeros(3, 8)],
            ValueError,
            r"weights\[1\]: expected \(out, 7\), got shape \(3, 8\)",
        ),
        (
            1,
            [torch.zeros(7, 5), torch.zeros(3, 7).double()],
            TypeError,
            r"weights\[1\]: expected torch.float32",
        ),
        (2, [None, torch.zeros(4)], ValueError, r"biases\[1\]: expected \(3,\), got shape \(4,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(position, value, error, message):
    arguments = raw()
    arguments[position] = value
    with pytest.raises(error, match=message):
        torch.ops.lmnfast.path_connectivity(*arguments)


def test_kernel_and_python_count_the_same_activations():
    assert _native._C.activation_count == len(ACTIVATIONS)
