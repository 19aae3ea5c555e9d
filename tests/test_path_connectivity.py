"""The fused kernel against the float64 reference: every activation, instruction set, dtype, odd size, limit case."""

import math

import pytest
import torch
from chains import (
    FOR_STATISTICS,
    SUMS,
    activation,
    assert_as_right_as_pytorch,
    assert_statistics_right,
    cast,
    chain_with,
    measured,
    path_truth,
    random_chain,
    random_sums,
    raw,
    samples,
)
from support import COMPILED, EMULATED, UNIFORM, fewer

from lmnfast import _native, ops, reference
from lmnfast._chain import ACTIVATIONS, Activation, Chain
from lmnfast.ops.path_connectivity import chain_connectivity
from lmnfast.quadrature import path_nodes

LANES = 16  # of the widest vectors in float32


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_on_the_input_and_between_layers(name, device, dtype):
    chain = random_chain([9, 33, 20, 5], [name, name, name, "identity"])
    x = 2 * samples(fewer(37, 19), 9)
    assert_as_right_as_pytorch(chain, x, device, dtype)
    if name != "identity":
        truth = reference.path_connectivity(chain, x, *UNIFORM)
        assert truth.min() < 0.9, "the input does not exercise the nonlinearity"


@pytest.mark.parametrize("name", ["silu", "sigmoid", "tanh", "relu"])
def test_activation_on_the_output(name, device, dtype):
    chain = random_chain([5, 12, 4], ["identity", "silu", name], scale=0.7)
    assert_as_right_as_pytorch(chain, samples(20, 5), device, dtype)


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_one_linear_layer_and_an_activation(name, device, dtype):
    assert_as_right_as_pytorch(random_chain([6, 4], ["identity", name]), 3 * samples(20, 6), device, dtype)


@pytest.mark.parametrize("n", [1, 2, 3, LANES - 1, LANES, LANES + 1, 63, 64, 65, 130])
def test_any_number_of_samples(n, device, dtype):
    assert_as_right_as_pytorch(
        random_chain([4, 10, 3], ["identity", "silu", "identity"]), samples(n, 4), device, dtype
    )


@pytest.mark.parametrize(
    "widths", [[1, 1, 1], [1, 2, 7], [3, 7, 8], [5, 8, 9], [2, 9, 17], [6, 65, 31], [4, 3, 64]]
)
@pytest.mark.parametrize("bias", [True, False])
def test_any_width(widths, bias, device, dtype):
    chain = random_chain(widths, ["tanh", "silu", "identity"], bias=bias, seed=sum(widths))
    assert_as_right_as_pytorch(chain, samples(fewer(21, 14), widths[0]), device, dtype)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_any_depth(depth, device, dtype):
    chain = random_chain([6] + [13] * depth + [4], ["identity"] + ["silu"] * depth + ["identity"])
    assert_as_right_as_pytorch(chain, samples(19, 6), device, dtype)


@pytest.mark.parametrize(
    "rule", [("uniform", p) for p in (3, 4, 8, 51)] + [("lobatto", p) for p in (3, 5, 9, 21)]
)
def test_any_nodes_and_weights(rule, device, dtype):
    chain = random_chain([5, 30, 6], ["identity", "silu", "identity"])
    assert_as_right_as_pytorch(chain, samples(20, 5), device, dtype, path_nodes(*rule))


@pytest.mark.parametrize("name", ["silu", "sigmoid", "tanh"])
@pytest.mark.parametrize("magnitude", [1e-4, 0.1, 30.0, 79.0, 81.0, 1e4])
def test_separated_exponentials_and_direct_evaluation_agree_with_the_reference(
    name, magnitude, device, dtype
):
    x = samples(fewer(33, 18), 8)
    x *= magnitude / x.abs().max()
    assert_as_right_as_pytorch(random_chain([8, 6], [name, "identity"], bias=False), x, device, dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_coincident_samples_are_connected_by_exactly_one(name, device, dtype):
    chain = random_chain([7, 20, 12, 3], [name, name, name, "identity"])
    x = samples(fewer(40, 22), 7)
    x[1::2] = x[::2]
    L = measured(chain, x, device, dtype)
    assert (L.diagonal(1)[::2] == 1).all()


def test_units_that_do_not_move_leave_no_residual(device, dtype):
    """Samples that differ only where the network does not look: outputs constant to rounding, not noise."""
    chain = random_chain([8, 16, 5], ["silu", "silu", "identity"])
    chain.weights[0][:, 4:] = 0
    x = samples(30, 8)
    x[:, :4] = x[0, :4]
    assert (measured(chain, x, device, dtype) == 1).all()


@pytest.mark.parametrize(
    "name, shift",
    [("relu", -1e3), ("sigmoid", 1e3), ("sigmoid", -1e3), ("tanh", 1e3), ("tanh", -1e3), ("elu", -1e3)],
)
def test_dead_and_saturated_units_give_exactly_one(name, shift, device, dtype):
    chain = random_chain([6, 24, 4], ["identity", name, "identity"])
    chain.biases[0].add_(shift)
    assert (measured(chain, samples(20, 6), device, dtype) == 1).all()


def test_an_affine_network_has_exactly_one_everywhere(device, dtype):
    chain = random_chain([6, 9, 4], ["identity"] * 3)
    assert (measured(chain, samples(20, 6), device, dtype) == 1).all()


def test_a_constant_output_counts_one(device, dtype):
    chain = random_chain([6, 20, 4], ["identity", "silu", "identity"])
    x = samples(25, 6)
    without = Chain(
        (chain.weights[0], chain.weights[1][1:]), (chain.biases[0], chain.biases[1][1:]), chain.activations
    )
    chain.weights[1][0] = 0
    L = measured(chain, x, device, dtype).double()
    truth = (1 + 3 * reference.path_connectivity(without, x, *UNIFORM)) / 4
    assert (L - truth).abs().max() < 1e-5


def test_an_offset_costs_no_digits(device):
    """float32 outputs near 100 with a spread of 1: PyTorch loses two digits, the chord residual none."""
    chain = random_chain([6, 20, 4], ["identity", "silu", "identity"])
    x = samples(25, 6)
    L = measured(chain, x, device, torch.float32)
    chain.biases[1].add_(100)
    assert (measured(chain, x, device, torch.float32) - L).abs().max() < 1e-6


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_the_scale_of_the_outputs_does_not_matter(factor, device):
    chain = random_chain([6, 20, 4], ["identity", "silu", "identity"])
    x = samples(25, 6)
    scaled = Chain(
        (chain.weights[0], chain.weights[1] * factor),
        (chain.biases[0], chain.biases[1] * factor),
        chain.activations,
    )
    assert torch.equal(*(measured(c, x, device, torch.float32) for c in (scaled, chain)))


@COMPILED
def test_the_same_bits_for_any_thread_count(device, dtype, threads):
    chain = random_chain([6, 30, 20, 7], ["identity", "silu", "tanh", "identity"])
    x = samples(fewer(70, 35), 6)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(measured(chain, x, device, dtype))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("outputs", [1, 11])
def test_integers_agree_to_the_bit_across_devices(outputs, device, dtype):
    """Integer weights and dyadic nodes make every product and sum exact, fused or not. Not the mean of r2 over outputs:
    CUDA adds them up in float64, the CPU with compensation."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).double()

    chain = Chain((integers(outputs, 5),), (integers(outputs),), (activation("relu"), activation("identity")))
    assert_integers_agree(chain, 4 * integers(40, 5), device, dtype, outputs > 1)


def test_integers_agree_to_the_bit_across_levels_with_sums(device, dtype):
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-1, 2, shape, generator=generator).double()

    names = ("identity", "relu", "leaky_relu", "identity")  # leaky by 0: a relu in other words
    activations = tuple(Activation(name) for name in names)
    weights, biases = tuple(integers(5, 5) for _ in range(3)), tuple(integers(5) for _ in range(3))
    chain = Chain(weights, biases, activations, skips=((3, 0), (4, 2), (5, 3), (6, 5)))
    assert_integers_agree(chain, 4 * integers(40, 5), device, dtype, True)


def assert_integers_agree(
    chain: Chain, x: torch.Tensor, device: torch.device, dtype: torch.dtype, several: bool
) -> None:
    nodes = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    weights = torch.tensor([1, 2, 2, 2, 1], dtype=torch.float64) / 8
    truth = reference.path_connectivity(chain, x, nodes, weights)
    assert truth.min() < 0.9
    ours = measured(chain, x, device, dtype, (nodes, weights))
    assert (ours.double() - truth).abs().max() < 1e-6
    on_cuda = device.type == "cuda" or _native._C.isa() == EMULATED
    _native._C.use_isa("baseline")  # the fixture puts back what was before
    difference = (ours - measured(chain, x, torch.device("cpu"), dtype, (nodes, weights))).abs().max()
    # In float32 a card, and the emulator, divide by a reciprocal that is right to about an ulp.
    assert difference <= (torch.finfo(dtype).eps if on_cuda and (several or dtype == torch.float32) else 0)


TAILS = {
    "silu": ([100, 100, 31], "silu"),
    "gelu": ([100, 100, 31], "gelu"),
    "tanh": ([100, 100, 31], "tanh"),
    "relu": ([100, 100, 31], "relu"),
    "two hidden layers": ([20, 60, 50, 10], "silu"),
    "40 outputs": ([20, 50, 40], "silu"),
    "130 outputs": ([20, 50, 130], "gelu"),
    "150 units": ([20, 150, 9], "tanh"),
    "300 units": ([20, 300, 9], "silu"),
}


def tail(name: str) -> Chain:
    """A network as wide as the paper's, or one that a kernel with fixed tiles has to take in parts."""
    widths, activation = TAILS[name]
    return random_chain(widths, ["identity", *[activation] * (len(widths) - 2), "identity"], scale=1.0)


@pytest.mark.parametrize("name", TAILS)
# highest: on an H200 at most 1.9e-5 (bench/results/nvidia-h200.md). high: 11 bits of the last units' residuals, see
# docs/mathematics.md, section 13.
@pytest.mark.parametrize("matmul, bound", [("highest", 2e-5), ("high", 1e-3)])
def test_errors_at_each_matmul_precision(name, matmul, bound, device, precision):
    widths = TAILS[name][0]
    chain, x = tail(name), 2 * samples(fewer(40 if widths[0] == 100 else 24, 18), widths[0])
    precision(matmul)
    if matmul == "highest":
        L, truth = assert_as_right_as_pytorch(chain, x, device, torch.float32)
    else:
        L, truth = measured(chain, x, device, torch.float32), reference.path_connectivity(chain, x, *UNIFORM)
    assert truth.min() < 0.9
    assert (L.double() - truth).abs().max() < bound
    lmn, true_lmn = map(reference.linear_mapping_number, (L, truth))
    assert (lmn / true_lmn - 1).abs() < 1e-4


@pytest.mark.parametrize("kilobytes", [48, 64, 99, 163])  # without asking, sm_75, sm_86, sm_80
@pytest.mark.parametrize("name", ["silu", "relu", "two hidden layers", "130 outputs", "300 units"])
def test_emulated_cards_with_less_shared_memory(name, kilobytes, emulated, dtype, monkeypatch):
    monkeypatch.setenv("LMNFAST_EMULATED_SHARED", str(kilobytes * 1024))
    assert_as_right_as_pytorch(tail(name), samples(12, TAILS[name][0][0]), emulated, dtype)


@pytest.mark.parametrize("kilobytes", [48, 99, 227])
@pytest.mark.parametrize("rule", [("uniform", 21), ("lobatto", 5)])
def test_emulated_wide_sums_in_any_shared_memory(kilobytes, rule, emulated, dtype, monkeypatch):
    """Nodes in one pass and in several, panels in shared memory and in the device's, outputs in one part and in several."""
    monkeypatch.setenv("LMNFAST_EMULATED_SHARED", str(kilobytes * 1024))
    names = ["silu", "tanh", "gelu", "identity"]
    skips = ((3, 1), (4, 2), (5, 3))
    chain = random_chain([130, 130, 130, 150], names, skips, scale=0.7)
    assert_as_right_as_pytorch(chain, samples(6, 130), emulated, dtype, path_nodes(*rule))


@pytest.mark.parametrize(
    "widths, kilobytes",
    [
        ([3, 600, 17, 1], 227),
        ([3, 17, 272, 10], 227),  # few outputs behind a wide layer
        ([3, 40, 129, 272, 20], 227),
        ([3, 600, 10], 227),
        ([3, 40, 272, 10], 48),  # the same in more passes
        ([3, 600, 17, 33], 48),  # no panel fits
        ([3, 129, 1, 33], 227),
        ([5, 20, 1000], 99),
        ([5, 40, 30, 20, 130], 48),
    ],
)
@pytest.mark.parametrize("name", ["silu", "gelu"])
@pytest.mark.parametrize("matmul, bound", [("highest", 2e-5), ("high", 2e-3)])
def test_emulated_panels_of_every_shape(
    widths, kilobytes, name, matmul, bound, emulated, precision, monkeypatch
):
    monkeypatch.setenv("LMNFAST_EMULATED_SHARED", str(kilobytes * 1024))
    chain = random_chain(widths, ["identity", *[name] * (len(widths) - 2), "identity"], scale=1.0)
    x, rule = 2 * samples(6, widths[0]), path_nodes("uniform", 21 if name == "silu" else 9)
    precision(matmul)
    L, truth = measured(chain, x, emulated, torch.float32, rule), reference.path_connectivity(chain, x, *rule)
    assert torch.equal(L, L.mT) and truth.min() < 0.95
    assert (L.double() - truth).abs().max() < bound


@pytest.mark.parametrize("width", [3, 300])
@pytest.mark.parametrize("name", ["silu", "tanh", "relu"])
@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_what_no_half_can_hold_is_unresolved(width, name, matmul, emulated, precision):
    """The second layer's units are 3e-3 at all samples and a thousand times as large, or not, between those on both sides:
    a tent made of three ReLUs."""
    precision(matmul)
    x = torch.tensor([[-3, 0.2], [-2.5, 3], [2.5, 3], [3, 0.2]], dtype=torch.float64)
    for height, fits in ((4, False), (2**-4, True)):
        first = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1e-3]], dtype=torch.float64)
        second = torch.tensor([[1.0, -2, 1, 0]], dtype=torch.float64) * height
        second = (second + torch.tensor([0, 0, 0, 1])) * (1 + torch.arange(width)[:, None] / width)
        chain = Chain(
            (first, second, samples(2, width)),
            (torch.tensor([1, 0, -1, 0], dtype=torch.float64), None, None),
            tuple(map(activation, ("identity", "relu", name, "identity"))),
        )
        found = chain_connectivity(cast(chain, torch.float32), x.float(), *UNIFORM)
        assert torch.equal(found.L[:2, 2:] >= 0, torch.full((2, 2), fits))
        found.resolve()
        assert (found.L - reference.path_connectivity(chain, x, *UNIFORM)).abs().max() < 1e-3


@pytest.mark.parametrize("far", [1e3, 1e5, 1e7, 1e9])
@pytest.mark.parametrize("alone", [False, True])  # the sample in one unit
@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("widths", [(24, 8), (24, 20, 8), (24, 40)])
def test_a_sample_far_away_costs_the_others_no_digits(far, alone, name, widths, device):
    """Where numbers have the range of halves, one scale has to do for all samples."""
    chain = random_chain(list(widths), [name] * (len(widths) - 1) + ["identity"], scale=1.0)
    x = samples(12, 24)
    x[3, 0 if alone else slice(None)] *= far
    others = torch.arange(12) != 3
    L, truth = measured(chain, x, device, torch.float32), reference.path_connectivity(chain, x, *UNIFORM)
    assert truth[others][:, others].min() < 0.99
    assert (L.double() - truth)[others][:, others].abs().max() < 2e-5


def test_a_sample_that_is_not_finite_spoils_its_own_pairs_alone(device):
    chain = random_chain([24, 8], ["relu", "identity"], scale=1e6)
    x = 1e-6 * samples(12, 24)
    truth = reference.path_connectivity(chain, x, *UNIFORM)
    x[3, 2] = math.nan
    others = torch.arange(12) != 3
    L = chain_connectivity(cast(chain, torch.float32, device), x.float().to(device), *UNIFORM).L.cpu()
    assert (L.double() - truth)[others][:, others].abs().max() < 2e-5


def test_strided_expanded_and_tracked_tensors(device):
    chain = cast(random_chain([6, 20, 4], ["identity", "silu", "identity"]), torch.float32, device)
    strided = Chain(
        tuple(w.mT.contiguous().mT.requires_grad_() for w in chain.weights),
        tuple(b[:1].expand(len(b)) for b in chain.biases),
        chain.activations,
    )
    plain = Chain(chain.weights, tuple(b.detach().contiguous() for b in strided.biases), chain.activations)
    x = samples(40, 6).to(device, torch.float32)
    with torch.no_grad():
        L = ops.path_connectivity(strided, x[::2], *UNIFORM)
    assert torch.equal(L, ops.path_connectivity(plain, x[::2].contiguous(), *UNIFORM))


def test_ctrl_c_ends_it_and_the_next_result_is_right(interrupted):
    chain = cast(random_chain([8, 100, 100, 9], ["identity", "silu", "gelu", "identity"]), torch.float32)
    x = samples(4000, 8).float()
    before = ops.path_connectivity(chain, x[:70], *UNIFORM)
    interrupted(lambda: ops.path_connectivity(chain, x, *UNIFORM))
    assert torch.equal(ops.path_connectivity(chain, x[:70], *UNIFORM), before)


@pytest.mark.parametrize("name", FOR_STATISTICS)
def test_stabilised_and_pooled_r2(name, device, dtype):
    def measured(chain, x, **options):
        return ops.path_connectivity(chain, x, *UNIFORM, **options)

    def truth(chain, x, **options):
        return path_truth(chain, x, *UNIFORM, **options)

    assert_statistics_right(measured, truth, FOR_STATISTICS[name](), device, dtype)


@pytest.mark.parametrize("stabiliser, pooled", [(0.0, True), (0.3, False), (0.3, True)])
def test_opcheck_of_statistics(stabiliser, pooled, dtype):
    options = {"stabiliser": stabiliser, "pooled": pooled}
    torch.library.opcheck(torch.ops.lmnfast.path_connectivity.default, raw(dtype=dtype), options)


def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.lmnfast.path_connectivity.default, raw(dtype=dtype))


def test_torch_compile_gives_the_same_bits():
    def measured(z, weights, biases, *rest):
        return torch.ops.lmnfast.path_connectivity(z * 2, weights, biases, *rest)[0] + 1

    z, *rest = raw()
    compiled = torch.compile(measured, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, *rest), measured(z, *rest))


def test_kernel_and_python_count_the_same_activations():
    assert _native._C.activation_count == len(ACTIVATIONS)


@pytest.mark.parametrize("widths", [[1, 1, 1], [2, 3, 4], [3, 5, 7, 2]])
def test_units_that_are_off_at_both_ends_stay_off_where_rounding_leaves_more_than_zero(widths, device, dtype):
    """Outputs -|W| relu(...) behind a ReLU are 0 everywhere, and where the units before are off 0 is all but reached."""
    chain = random_chain(widths, ["identity", *["relu"] * (len(widths) - 1)], bias=False)
    chain = Chain(
        (*chain.weights[:-1], -chain.weights[-1].abs()), (None,) * len(chain.weights), chain.activations
    )
    x = samples(40, widths[0])
    assert chain(x).abs().max() == 0
    L = ops.path_connectivity(cast(chain, dtype, device), x.to(device, dtype), *path_nodes("uniform", 21))
    assert torch.equal(L.cpu(), torch.ones(40, 40, dtype=dtype))


@pytest.mark.parametrize("sums", SUMS)
def test_sums_with_earlier_values(sums, device, dtype):
    chain = chain_with(sums, scale=1.0)
    x = 2 * samples(fewer(37, 19), len(chain.weights[0].mT))
    _, truth = assert_as_right_as_pytorch(chain, x, device, dtype)
    assert truth.min() < 0.9 or sums == "no nonlinearity", "the input does not exercise the nonlinearity"


@pytest.mark.parametrize("seed", range(12))
def test_any_sums_in_any_chain(seed, device, dtype):
    chain = random_sums(seed)
    x = samples(fewer(18, 11), len(chain.weights[0].mT))
    assert_as_right_as_pytorch(chain, x, device, dtype)


@COMPILED
def test_sums_have_the_same_bits_for_any_thread_count(device, dtype, threads):
    chain, x = chain_with("one in another"), samples(fewer(70, 35), 9)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(measured(chain, x, device, dtype))
    assert torch.equal(*results)


def test_a_dead_block_leaves_its_skip_exactly_straight(device, dtype):
    chain = random_chain([5, 9, 7, 9, 3], ["identity", "identity", "relu", "identity", "identity"], ((6, 2),))
    chain.biases[1].sub_(1e3)
    assert (measured(chain, samples(20, 5), device, dtype) == 1).all()


def test_coincident_samples_are_connected_by_exactly_one_with_sums(device, dtype):
    x = samples(40, 9)
    x[1::2] = x[::2]
    assert (measured(chain_with("one in another"), x, device, dtype).diagonal(1)[::2] == 1).all()


def test_opcheck_with_sums(dtype):
    z, weights, biases, codes, parameters, _, _, *rule = raw(dtype=dtype)
    weights[1], biases[1] = weights[1].new_ones(7, 7), None
    sums = [-1, -1, -1, 2, -1, -1], [None, None, None, None, z.new_ones(12, 7), None]
    torch.library.opcheck(
        torch.ops.lmnfast.path_connectivity.default, [z, weights, biases, codes, parameters, *sums, *rule]
    )


def test_more_nodes_than_32_bits_count_in_a_product(device):
    """Blocks of nodes times nodes is beyond 2^31 here."""
    rule = path_nodes("uniform", 90_001)
    chain = random_chain([1, 1], ["silu", "identity"])
    x = torch.tensor([[-4.0], [3.0]], dtype=torch.float64)
    L, truth = measured(chain, x, device, torch.float32, rule), reference.path_connectivity(chain, x, *rule)
    assert (L - truth).abs().max() < 1e-3 and truth.min() < 0.99


def test_lazily_negated_and_unaligned_tensors(device):
    arguments = [v.to(device) if isinstance(v, torch.Tensor) and n < 7 else v for n, v in enumerate(raw())]
    for n in (1, 2):
        arguments[n] = [v.to(device) for v in arguments[n]]
    expected = torch.ops.lmnfast.path_connectivity(*arguments)[0]
    z = arguments[0]
    negated = torch.complex(z, -z).conj().imag
    assert negated.is_neg()
    arguments[0] = negated
    assert torch.equal(torch.ops.lmnfast.path_connectivity(*arguments)[0], expected)
    if device.type == "cpu":
        buffer = torch.empty(4 * z.numel() + 1, dtype=torch.uint8)
        arguments[0] = torch.frombuffer(buffer.numpy(), dtype=torch.float32, offset=1, count=z.numel()).view(
            z.shape
        )
        arguments[0].copy_(z)
        assert arguments[0].data_ptr() % 4
        assert torch.equal(torch.ops.lmnfast.path_connectivity(*arguments)[0], expected)
