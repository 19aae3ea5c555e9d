"""The fused kernel against automatic differentiation in float64."""

import itertools

import pytest
import torch
from chains import LAYERS_THAT_DO_NOT_FIT, assert_refused, cast, random_chain, samples

from lmnfast import _native, ops, reference
from lmnfast._chain import ACTIVATIONS, Activation, Chain
from lmnfast.ops.jacobian import at_once


def measured(chain, x, device, dtype):
    """The kernel's Jacobians, brought to the CPU."""
    J = ops.jacobian(cast(chain, dtype, device), x.to(device, dtype))
    shape = (len(x), len(chain.weights[-1]), chain.weights[0].shape[1])
    assert J.dtype == dtype and J.shape == shape and J.device.type == device.type
    return J.cpu()


def assert_right(chain, x, device, dtype):
    truth = reference.jacobian(chain, x)
    allowed = 1e-13 * truth.abs().max()
    if dtype == torch.float32:
        plain = reference.jacobian(cast(chain, dtype), x.to(dtype))
        allowed = 2 * (plain.double() - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (measured(chain, x, device, dtype).double() - truth).abs().max() <= allowed
    return truth


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_on_the_input_and_between_layers(name, device, dtype):
    chain = random_chain([9, 33, 20, 5], [name, name, name, name])
    truth = assert_right(chain, samples(21, 9), device, dtype)
    if name != "identity":
        assert (truth - truth[0]).abs().max() > 0.1 * truth.abs().max(), (
            "the input does not exercise the nonlinearity"
        )


@pytest.mark.parametrize(
    "widths", [[1, 1], [4, 7], [1, 1, 1], [1, 9, 40], [40, 9, 1], [5, 16, 17], [50, 33, 31], [100, 100, 31]]
)
def test_any_width_of_one_or_two_layers(widths, device, dtype):
    chain = random_chain(widths, ["identity", "silu", "tanh"][: len(widths)], seed=sum(widths))
    assert_right(chain, samples(18, widths[0]), device, dtype)


@pytest.mark.parametrize("n", [1, 127, 128, 129])
@pytest.mark.parametrize("widths", [[1, 3, 1], [7, 20, 7], [8, 16, 6], [50, 33, 31], [3, 5, 97], [150, 4, 2]])
def test_one_hidden_layer_as_one_product(widths, n, device, dtype):
    chain = random_chain(widths, ["identity", "silu", "identity"], seed=sum(widths))
    assert_right(chain, samples(n, widths[0]), device, dtype)


@pytest.mark.parametrize(
    "widths", [[3, 40, 8, 70], [70, 8, 40, 3], [6, 65, 64, 6], [2, 128, 130, 9, 33], [33, 9, 128, 130, 2]]
)
@pytest.mark.parametrize("bias", [False, True])
def test_deep_chains_from_either_side(widths, bias, device, dtype):
    names = ["tanh", *["silu", "gelu", "sin"][: len(widths) - 2], "sigmoid"]
    assert_right(random_chain(widths, names, bias=bias), samples(18, widths[0]), device, dtype)


@pytest.mark.parametrize("names", ["same", "linear", "bent in the middle"])
@pytest.mark.parametrize("widths", [[1, 1], [4, 7], [5, 33, 3], [100, 100, 31], [9, 40, 8, 70]])
@pytest.mark.parametrize("bias", [False, True])
def test_cuda_kernels_give_the_outputs_too(widths, names, bias, device, dtype):
    if not _native.on_cuda(torch.empty(0, device=device)):
        pytest.skip("the CPU's kernel does not")
    layers = len(widths)
    kinds = {"same": ["gelu"] * layers, "linear": ["identity"] * layers}
    kinds["bent in the middle"] = ["identity", *["silu"] * (layers - 2), "identity"]
    chain = random_chain(widths, kinds[names], bias=bias)
    some, x = cast(chain, dtype, device), samples(37, widths[0]).to(device, dtype)
    J, y = at_once(some, x, with_outputs=True)
    assert torch.equal(J, ops.jacobian(some, x)) and at_once(some, x)[1] is None
    truth = cast(some, torch.float64, "cpu")(x.cpu().double())
    assert y.dtype == dtype and y.shape == truth.shape
    assert (y.cpu() - truth).abs().max() <= 64 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 33, 65])
def test_any_number_of_samples(n, device, dtype):
    assert_right(random_chain([4, 10, 3], ["identity", "silu", "identity"]), samples(n, 4), device, dtype)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu"])
def test_kinks_have_pytorchs_slope(name, device, dtype):
    chain = random_chain([3, 8, 2], [name, name, "identity"], bias=False)
    x = torch.zeros(5, 3, dtype=torch.float64)
    x[1:, 0] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    assert_right(chain, x, device, dtype)


def test_large_samples_saturate_instead_of_overflowing(device, dtype):
    for name in ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus", "elu"):
        chain = random_chain([3, 8, 2], [name, name, "identity"])
        assert measured(chain, 1e4 * samples(9, 3), device, dtype).isfinite().all(), name


def test_the_same_bits_for_any_thread_count_and_any_place(device, dtype, threads):
    chain, x = random_chain([6, 30, 20, 7], ["identity", "silu", "tanh", "identity"]), samples(70, 6)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(measured(chain, x, device, dtype))
    results.append(measured(chain, x.flip(0), device, dtype).flip(0))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_half_precision_is_widened(device):
    chain, x = random_chain([4, 10, 3], ["identity", "silu", "identity"]), samples(5, 4)
    half = ops.jacobian(cast(chain, torch.bfloat16, device), x.to(device, torch.bfloat16))
    wide = cast(cast(chain, torch.bfloat16), torch.float32, device)
    assert torch.equal(half, ops.jacobian(wide, x.to(device, torch.bfloat16).float()))


@pytest.mark.parametrize("widths", [[8, 20, 4], [4, 20, 8], [7, 12, 3], [3, 5], [8, 12, 9, 4]])
def test_views_that_begin_between_boundaries_of_16_bytes(widths, device, dtype):
    def moved(tensor):
        memory = tensor.new_empty(tensor.numel() + 1)[1:]
        return memory.copy_(tensor.flatten()).view(tensor.shape)

    chain = random_chain(widths, [*["identity", "silu", "tanh", "identity"][: len(widths) - 1], "sigmoid"])
    chain, x = cast(chain, dtype, device), samples(21, widths[0]).to(device, dtype)
    biases = tuple(map(moved, chain.biases))
    elsewhere = Chain(tuple(map(moved, chain.weights)), biases, chain.activations)
    assert torch.equal(ops.jacobian(elsewhere, moved(x)), ops.jacobian(chain, x))


@pytest.mark.parametrize("names", ["identity", "identity silu", "silu identity"])
def test_linear_layers_at_either_end_and_between(names, device, dtype):
    """They have no slopes, and nobody asks for values behind the last nonlinearity."""
    names = names.split()
    for widths in ([6, 9, 20, 9, 4], [4, 9, 20, 9, 6]):
        chain = random_chain(widths, (names * 5)[:5])
        assert_right(chain, samples(19, widths[0]), device, dtype)


def raw(dtype: torch.dtype) -> list:
    """Arguments of the registered op."""
    chain = cast(random_chain([5, 7, 3], ["silu", "relu", "identity"]), dtype)
    codes = [ACTIVATIONS.index(a.name) for a in chain.activations]
    return [samples(12, 5).to(dtype), list(chain.weights), list(chain.biases), codes, [0.0] * 6]


@pytest.mark.parametrize("widths", [[8, 1500, 1500, 8], [100, 2000, 100]])
def test_ctrl_c_ends_it_and_the_next_result_is_right(widths, interrupted):
    """Layer by layer, and one hidden layer in one product."""
    weights = tuple(torch.full((o, i), 1 / i) for i, o in itertools.pairwise(widths))
    names = ("identity", *["silu"] * (len(widths) - 2), "identity")
    chain = Chain(weights, (None,) * len(weights), tuple(map(Activation, names)))
    x = samples(4000, widths[0]).float()
    before = ops.jacobian(chain, x[:9])
    interrupted(lambda: ops.jacobian(chain, x))
    assert torch.equal(ops.jacobian(chain, x[:9]), before)


def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.lmnfast.jacobian.default, raw(dtype))


def test_torch_compile_gives_the_same_bits(dtype):
    def measured(x, *rest):
        return torch.ops.lmnfast.jacobian(x * 2, *rest) + 1

    arguments = raw(dtype)
    compiled = torch.compile(measured, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), measured(*arguments))


@pytest.mark.parametrize(
    "position, value, error, message",
    [(1, [], ValueError, "weights: expected one or more"), *LAYERS_THAT_DO_NOT_FIT],
)
def test_arguments_that_do_not_fit_are_named(position, value, error, message):
    arguments = raw(torch.float32)
    arguments[position] = value
    assert_refused(torch.ops.lmnfast.jacobian, arguments, error, message)


@pytest.mark.parametrize("shape", [(5, 9), (5, 11), (10,), (5, 2, 4)])
def test_samples_that_are_not_the_chains_are_refused_before_the_kernel(shape):
    chain = random_chain([10, 8, 3], ["identity", "silu", "identity"])
    with pytest.raises(ValueError, match="^x: expected samples of 10 elements"):
        at_once(chain, torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="on meta"):
        at_once(chain, torch.zeros(5, 10, device="meta"))


def test_a_chain_with_skips_is_refused():
    """The kernels would leave the skips out."""
    plain = random_chain([8, 8, 8], ["identity", "silu", "identity"])
    chain = Chain(plain.weights, plain.biases, plain.activations, skips=((4, 2),))
    for call in (ops.jacobian, at_once):
        with pytest.raises(ValueError, match="^chain: expected one without skips"):
            call(chain, samples(5, 8))
