"""Distances of features against direct differences in float64."""

import pytest
import torch
from chains import activation, assert_refused

from lmnfast import _native, ops, reference
from lmnfast._chain import ACTIVATIONS, IDENTITY, Chain
from lmnfast.ops.jacobian_distance import (
    has_isometry,
    isometry_distance,
    jacobian_connectivity,
    jacobian_features,
    jacobian_isometry,
)

F64 = torch.float64


def features(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=F64)


def measured(first, second, device, dtype, squared=False):
    """The kernel's matrix, brought to the CPU."""
    to = first.to(device)
    d = ops.jacobian_distance(to, to if second is first else second.to(device), squared, dtype)
    assert d.dtype == dtype and d.shape == (len(first), len(second)) and d.device.type == device.type
    return d.cpu()


def assert_right(first, second, device, dtype, squared=False):
    truth = reference.jacobian_distance(first, second, squared)
    ours = measured(first, second, device, dtype, squared).double()
    # In float32 rows are rounded and summed: 2e-6. In float64 it is the reference's and the kernel's order of summing.
    ulps = 16 if dtype == torch.float32 else max(4, first.shape[1] ** 0.5)
    tolerance = ulps * torch.finfo(dtype).eps
    assert ((ours - truth).abs() <= tolerance * truth).all()
    return ours


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 23, 24, 25, 63, 64, 65, 100])
def test_any_number_of_samples_against_themselves(n, squared, device, dtype):
    u = features(n, 5)
    d = assert_right(u, u, device, dtype, squared)
    assert torch.equal(d, d.mT) and (d.diagonal() == 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (1, 97), (97, 1), (25, 65), (70, 130)])
def test_any_number_of_samples_against_others(shape, device, dtype):
    if 0 in shape:
        assert measured(features(shape[0], 4), features(shape[1], 4), device, dtype).shape == shape
    else:
        assert_right(features(shape[0], 4), features(shape[1], 4, seed=1), device, dtype)


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 257])
def test_any_number_of_features(width, device, dtype):
    u = features(30, width)
    assert_right(u, u, device, dtype)
    assert_right(u, features(41, width, seed=1), device, dtype)


@pytest.mark.parametrize("closeness", [1e-2, 1e-3, 1e-5, 1e-7, 1e-12])
def test_close_rows_keep_their_digits(closeness, device, dtype):
    """The Gram form in float64 would be wrong here by 1e-16 / closeness^2 relatively."""
    u = features(12, 50)
    close = u + closeness * features(12, 50, seed=2)
    d = assert_right(u, close, device, dtype)
    assert (d.diagonal() > 0).all()


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e6])
def test_clusters_keep_their_digits_wherever_they_lie(offset, device, dtype):
    """In float32 the kernel's own centre must not matter, nor that most pairs are close in their clusters."""
    cluster = torch.arange(90) % 3
    u = offset + 10 * features(3, 40, seed=4)[cluster] + 0.01 * features(90, 40)
    assert_right(u, u, device, dtype)
    assert_right(u, u[:37] + 0.3, device, dtype)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_tiny_and_huge_rows_keep_their_digits(size, device, dtype):
    u = size * features(60, 30)
    u[::2] *= 1e-6
    truth = reference.jacobian_distance(u, u, False)
    ours = measured(u, u, device, dtype).double()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((ours - truth).abs() <= 16 * torch.finfo(dtype).eps * truth + smallest).all()
    assert (ours[1::2, 1::2].fill_diagonal_(1) > 0).all()


@pytest.mark.parametrize("width", [255, 256, 600])
def test_many_features_are_summed_in_parts(width, device, dtype):
    u = features(52, width)
    assert_right(u, u, device, dtype)
    assert_right(u, features(49, width, seed=1) + 0.5, device, dtype)


@pytest.mark.parametrize("n", [200, 450])  # of more samples CUDA's tiles are larger
def test_whole_tiles_off_the_diagonal(n, device, dtype):
    u = features(n, 19)
    d = assert_right(u, u, device, dtype)
    assert torch.equal(d, d.mT)
    assert_right(u, features(n - 7, 19, seed=1), device, dtype)


def test_rows_the_same_to_rounding_are_exactly_zero_apart(device, dtype):
    u = features(20, 30)
    noisy = u * (1 + torch.finfo(F64).eps * features(20, 30, seed=3).sign())
    assert (measured(u, noisy, device, dtype).diagonal() == 0).all()
    assert (measured(u, u * (1 + 1e-14), device, dtype).diagonal() > 0).all()


def test_a_nan_is_a_nan_in_its_row_and_column_only(device, dtype):
    u = features(40, 6)
    u[[0, 13], 2] = float("nan")
    d = measured(u, u, device, dtype)
    there = torch.zeros(40, 40, dtype=torch.bool)
    there[[0, 13]] = there[:, [0, 13]] = True
    assert torch.equal(d.isnan(), there)


def test_integers_agree_to_the_bit_across_devices(device, dtype):
    u = torch.randint(-9, 9, (50, 12), generator=torch.Generator().manual_seed(0)).double()
    ours = measured(u, u, device, dtype)
    _native._C.use_isa("baseline")  # the fixture puts back what was before
    assert torch.equal(ours, measured(u, u, torch.device("cpu"), dtype))


def test_the_same_bits_for_any_thread_count(device, dtype, threads):
    u, results = features(150, 20), []
    for count in (1, 2, 5):
        threads(count)
        results.append(measured(u, u, device, dtype))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_ctrl_c_ends_it_and_the_next_result_is_right(interrupted):
    u = features(300, 4000).repeat(10, 1)
    interrupted(lambda: ops.jacobian_distance(u, u))
    assert_right(u[:9], u[:9], torch.device("cpu"), F64)


def test_opcheck(dtype):
    arguments = (features(9, 5), features(7, 5, seed=1), True, dtype)
    torch.library.opcheck(torch.ops.lmnfast.jacobian_distance.default, arguments)


def test_torch_compile_gives_the_same_bits():
    def distances(u, v):
        return ops.jacobian_distance(u * 2, v, False, torch.float32) + 1

    compiled = torch.compile(distances, fullgraph=True, backend="aot_eager")
    arguments = features(9, 5), features(7, 5, seed=1)
    assert torch.equal(compiled(*arguments), distances(*arguments))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            (torch.zeros(3, 4), features(3, 4)),
            TypeError,
            "first: expected torch.float64 .* got torch.float32",
        ),
        ((features(3, 4), torch.zeros(3, 4)), TypeError, "second: expected torch.float64"),
        ((features(3, 4).to_sparse(), features(3, 4)), TypeError, "first: expected a dense tensor"),
        ((features(3, 4), features(3, 4).to("meta")), TypeError, "second: expected torch.float64 on cpu"),
        ((features(3, 4)[0], features(3, 4)), ValueError, r"first: expected \(M, F\)"),
        ((features(3, 4)[:, :0], features(3, 4)), ValueError, r"first: expected \(M, F\) with F > 0"),
        ((features(3, 4), features(3, 5)), ValueError, r"second: expected \(N, 4\), got shape \(3, 5\)"),
        ((features(3, 4), features(3, 4), False, torch.int32), TypeError, "dtype: expected torch.float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, error, message):
    first, second, squared, dtype = (*arguments, *(False, torch.float64)[len(arguments) - 2 :])
    assert_refused(torch.ops.lmnfast.jacobian_distance, [first, second, squared, dtype], error, message)


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e155, 1e300])
def test_features_whose_squares_have_no_number(size, device, dtype):
    """Inf is within rounding of Inf: such rows would be 0 apart."""
    u = features(12, 9)
    plain = measured(u, u[:5], device, torch.float64)
    d = measured(u * size, (u * size)[:5], device, torch.float64)
    if device.type == "cuda":  # where nobody waits for the largest of them
        assert size < 1 or d.isnan().all()
        return
    lost = 2.0**-1074 / size  # of digits below the smallest number
    assert ((d / size - plain).abs() <= 1e-14 * plain + 8 * lost).all()
    assert (measured(u * size, u * size, device, dtype).diagonal() == 0).all()


def test_an_infinite_row_is_no_distance_at_all(device, dtype):
    u = features(40, 6)
    u[13, 2] = float("inf")
    d = measured(u, u, device, dtype)
    there = torch.zeros(40, 40, dtype=torch.bool)
    there[13] = there[:, 13] = True
    assert torch.equal(d.isnan(), there)


# Features on CUDA


@pytest.fixture
def kernels(device):
    if not _native.on_cuda(torch.empty(0, device=device)):
        pytest.skip("these features are made on CUDA alone")
    return device


def weights(inputs, units, outputs, seed=0):
    """Rows of very different sizes: what is scaled must be scaled back."""
    sizes = 10 ** features(1, units, seed=seed + 7)[0].clamp(-2, 2)
    first, last = features(units, inputs, seed=seed) / inputs**0.5, features(outputs, units, seed=seed + 1)
    return first * sizes[:, None], last, features(1, units, seed=seed + 2)[0]


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 2, 1), (9, 31, 5), (8, 32, 33), (7, 33, 12), (100, 100, 31), (40, 170, 6), (20, 256, 16)],
)
def test_features_are_as_far_apart_as_the_jacobians(shape, kernels, dtype):
    """Of weights and samples of a dtype, to float64's rounding."""
    given = [v.to(dtype) for v in (*weights(*shape), features(37, shape[0], seed=5))]
    first, last, bias, x = (v.double() for v in given)
    on_device = [v.to(kernels) for v in given]
    B, lost = jacobian_isometry(*on_device[:2])
    M = (last.mT @ last) * (first @ first.mT)
    diagonal = M.diagonal().sqrt()
    assert ((B @ B.mT).cpu() - M).abs().div(diagonal * diagonal[:, None]).max() < 1e-13
    inverse_trace = torch.linalg.inv(M / diagonal / diagonal[:, None]).trace()
    assert lost.shape == (2,) and lost[1] == 0
    assert abs(lost[0].cpu() / (shape[1] * 2.0**-52 * inverse_trace) - 1) < 1e-6
    rows = jacobian_features(on_device[3], on_device[0], on_device[2], activation("silu"), B)
    z = x @ first.mT + bias
    slopes = z.sigmoid() * (1 + z * (1 - z.sigmoid()))
    J = torch.einsum("kh,nh,hd->nkd", last, slopes, first).flatten(1)
    truth = reference.jacobian_distance(J, J, False)
    d = reference.jacobian_distance(rows.cpu(), rows.cpu(), False)
    assert ((d - truth).abs() <= 1e-9 * truth.max()).all() and truth.max() > 0.1


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 7), (31, 64, 65), (70, 3, 32)])
def test_a_linear_layer_is_summed_in_float64_from_weights_of_any_kind(shape, kernels, dtype):
    """Views, too, whose numbers lie apart, begin between boundaries, or are negative ones of a conjugate's."""
    samples, inputs, outputs = shape
    x, weight = (features(n, inputs, seed=n).to(dtype) for n in (samples, outputs))
    bias = features(1, outputs, seed=5)[0].to(dtype)
    negative = torch.complex(weight, weight).conj().imag
    assert negative.is_neg()
    truth = x.double() @ weight.double().mT
    for w, sign in ((weight, 1), (weight.mT.contiguous().mT, 1), (negative, -1)):
        for b in (None, bias):
            z = _native.linear(*(None if v is None else v.to(kernels) for v in (x, w, b)))
            assert z.dtype == F64 and z.shape == (samples, outputs)
            expected = sign * truth + (0 if b is None else b.double())
            assert (z.cpu() - expected).abs().max() < 1e-13 * inputs


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_features_of_every_activation(name, with_bias, kernels):
    first, _, bias = (v.to(kernels) for v in weights(6, 13, 5))
    f = activation(name)
    x = features(19, 6, seed=5).to(kernels)
    rows = jacobian_features(
        x, first, bias if with_bias else None, f, torch.eye(13, dtype=F64, device=kernels)
    )
    z = (x @ first.mT + bias * with_bias).cpu().requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(f(z).sum(), z)
    assert (rows.cpu() - slopes).abs().max() < 1e-13 and slopes.abs().max() > 0.1


def test_dead_units_are_left_out(kernels):
    first, last, _ = weights(9, 12, 5)
    first[[0, 7]] = 0
    last[:, [4, 11]] = 0
    B, lost = jacobian_isometry(first.to(kernels), last.to(kernels))
    M = (last.mT @ last) * (first @ first.mT)
    assert (B[[0, 4, 7, 11]] == 0).all() and lost[0].item() < 1e-10
    assert ((B @ B.mT).cpu() - M).abs().max() < 1e-13 * M.max()
    none, lost = jacobian_isometry(0 * first.to(kernels), last.to(kernels))
    assert (none == 0).all() and lost[0].item() == 0


def test_units_that_do_the_same_are_told(kernels):
    first, last, _ = weights(9, 12, 5)
    first[3], last[:, 3] = first[8], last[:, 8]
    _, lost = jacobian_isometry(first.to(kernels), last.to(kernels))
    assert not lost[0].item() <= 1e-6
    first[2, 2] = float("nan")
    assert not jacobian_isometry(first.to(kernels), last.to(kernels))[1][0].item() <= 1e-6


def test_a_factor_that_does_not_fit_into_shared_memory(kernels, monkeypatch):
    first, last, _ = (v.to(kernels) for v in weights(30, 90, 8))
    whole = jacobian_isometry(first, last)
    monkeypatch.setenv("LMNFAST_EMULATED_SHARED", str(48 * 1024))
    for ours, expected in zip(jacobian_isometry(first, last), whole):
        assert torch.equal(ours, expected)


def test_weights_that_begin_between_boundaries_of_16_bytes(kernels):
    first, last, bias = (v.to(kernels) for v in weights(7, 12, 5))

    def moved(tensor):
        memory = tensor.new_empty(tensor.numel() + 1)[1:]
        return memory.copy_(tensor.flatten()).view(tensor.shape)

    B, _ = jacobian_isometry(moved(first), moved(last))
    assert torch.equal(B, jacobian_isometry(first, last)[0])
    x = features(11, 7).to(kernels)
    f = activation("tanh")
    moved_rows = jacobian_features(moved(x), moved(first), moved(bias), f, moved(B))
    assert torch.equal(moved_rows, jacobian_features(x, first, bias, f, B))
    d = ops.jacobian_distance(moved(x), moved(x[:4]), False, F64)
    assert torch.equal(d, ops.jacobian_distance(x, x[:4], False, F64))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 70, 3), (33, 2, 9), (65, 64, 1), (140, 150, 100)])
def test_the_connectivity_of_any_rows(shape, kernels, dtype):
    first, second = features(shape[0], shape[2]), features(shape[1], shape[2], seed=1)
    second[::2] *= 1e-3
    for u, v in (
        (first, second),
        (second, second),
        (1e-140 * first, 1e-140 * second),
        (1e153 * first, 1e150 * second),
    ):
        on_device = u.to(kernels)
        L = jacobian_connectivity(on_device, on_device if v is u else v.to(kernels), dtype).cpu()
        size = v.abs().max()  # the reference's own squares would not be numbers
        truth = reference.jacobian_connectivity(u / size, v / size)
        assert (
            L.dtype == dtype and (L - truth).abs().max() <= max(8, shape[2] ** 0.5) * torch.finfo(dtype).eps
        )
        if v is u:
            assert torch.equal(L, L.mT) and (L.diagonal() == 1).all()


def test_the_connectivity_of_rows_that_are_zeros_the_same_opposite_or_no_numbers(kernels, dtype):
    u = features(40, 7)
    u[[3, 5]] = 0
    u[8] = -u[7]
    u[10] = u[9] * (1 + torch.finfo(F64).eps)
    L = jacobian_connectivity(u.to(kernels), u.to(kernels), dtype).cpu()  # not as one tensor
    assert L[3, 5] == 1 and (L[3, :3].abs() < 1e-15).all() and L[9, 10] == 1
    assert abs(L[7, 8] + 1) < 1e-6  # 1 - 4 / 2
    u[13, 2], u[14, 3] = float("nan"), float("inf")
    u[15] = 1e160  # whose square overflows
    on_device = u.to(kernels)
    L, bad = jacobian_connectivity(on_device, on_device, dtype).cpu(), torch.zeros(40, 40, dtype=torch.bool)
    bad[13:16] = bad[:, 13:16] = True
    assert torch.equal(L.isnan(), bad)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 12), (100, 100, 31), (20, 256, 16)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_call_gives_the_bits_of_its_parts(shape, with_bias, kernels, dtype):
    first, last, bias = (v.to(dtype).to(kernels) for v in weights(*shape))
    x, f = features(37, shape[0], seed=5).to(dtype).to(kernels), activation("silu")
    bias, last_bias = (bias, last[:, 0].clone()) if with_bias else (None, None)
    B, lost = jacobian_isometry(first, last)
    rows = jacobian_features(x, first, bias, f, B)
    for squared in (False, True):
        d, bits, y = isometry_distance(x, first, bias, last, last_bias, f, squared=squared)
        # Of an emulated card the op is scaled as the CPU's is, which changes no digit here.
        assert torch.equal(d, ops.jacobian_distance(rows, rows, squared, dtype)) and y is None
        assert bits.dtype == torch.int64 and torch.equal(bits.view(F64), lost)
    L, _, y = isometry_distance(x, first, bias, last, last_bias, f, connectivity=True, with_outputs=True)
    assert torch.equal(L, jacobian_connectivity(rows, rows, dtype))
    assert torch.equal(L, L.mT) and (L.diagonal() == 1).all()
    biases = tuple(None if b is None else b.double() for b in (bias, last_bias))
    wide = Chain((first.double(), last.double()), biases, (IDENTITY, f, IDENTITY))
    truth = wide(x.double())
    assert y.dtype == dtype and (y - truth).abs().max() <= 16 * torch.finfo(dtype).eps * truth.abs().max()


def test_where_there_are_such_features(kernels):
    first, last, _ = (v.to(kernels) for v in weights(7, 12, 5))
    assert has_isometry(first, last)
    assert not has_isometry(first[:, :1], last[:1])  # Jacobians are smaller
    many = torch.zeros(_native._C.isometry_units + 1, 300, dtype=F64, device=kernels)
    assert not has_isometry(many, many.mT)
    with pytest.raises(RuntimeError, match="jacobian_isometry: a number of units"):
        jacobian_isometry(many, many.mT.contiguous())


def test_wrong_arguments_of_the_kernels_for_one_hidden_layer_are_refused():
    """Before any kernel: without these checks a shorter tensor would be read past its end."""
    first, last, bias = weights(7, 12, 5)
    x, f, B = features(9, 7), activation("silu"), torch.eye(12, dtype=F64)
    half = torch.float16
    for wrong in (
        lambda: jacobian_isometry(first[0], last),
        lambda: jacobian_isometry(first[:0], last[:, :0]),
        lambda: jacobian_isometry(first, last[:, :-1]),
        lambda: jacobian_isometry(first, last[0]),
        lambda: jacobian_isometry(first, last[:0]),
        lambda: jacobian_features(x[:, :-1], first, bias, f, B),
        lambda: jacobian_features(x[0], first, bias, f, B),
        lambda: jacobian_features(x, first, bias[:-1], f, B),
        lambda: jacobian_features(x, first, bias, f, B[:-1]),
        lambda: isometry_distance(x[:, :-1], first, bias, last, None, f),
        lambda: isometry_distance(x, first, bias[:-1], last, None, f),
        lambda: isometry_distance(x, first, bias, last[:, :-1], None, f),
        lambda: isometry_distance(x, first, bias, last, last[:-1, 0], f),
        lambda: jacobian_connectivity(x, x[:, :-1], F64),
        lambda: jacobian_connectivity(x[0], x, F64),
    ):
        with pytest.raises(
            ValueError, match="^(first|second|last|last_bias|x|bias|isometry): expected .* got"
        ):
            wrong()
    for wrong in (
        lambda: jacobian_isometry(first, last.float()),
        lambda: jacobian_isometry(first.to(half), last.to(half)),
        lambda: jacobian_isometry(first.to("meta"), last.to("meta")),
        lambda: jacobian_isometry(first.to_sparse(), last),
        lambda: jacobian_features(x.float(), first, bias, f, B),
        lambda: jacobian_features(x, first, bias.float(), f, B),
        lambda: jacobian_features(x, first, bias, f, B.float()),
        lambda: isometry_distance(x, first, bias, last, last[:, 0].float(), f),
        lambda: isometry_distance(x.to("meta"), first, bias, last, None, f),
        lambda: jacobian_connectivity(x.float(), x.float(), F64),
        lambda: jacobian_connectivity(x, x, half),
        lambda: jacobian_connectivity(x, x.to("meta"), F64),
    ):
        with pytest.raises(TypeError, match=": expected "):
            wrong()


def test_wrong_arguments_of_a_linear_layer_are_refused():
    x, weight, bias = features(9, 7), features(4, 7), features(1, 4)[0]
    for wrong in (
        lambda: _native.linear(x, weight[:, :-1], None),
        lambda: _native.linear(x[:, :-1], weight, None),
        lambda: _native.linear(x[0], weight, None),
        lambda: _native.linear(x, weight[0], None),
        lambda: _native.linear(x, weight, bias[:-1]),
        lambda: _native.linear(x, weight, bias[None]),
        lambda: _native.linear(x, weight.to("meta"), None),
        lambda: _native.linear(x, weight, bias.to("meta")),
        lambda: _native.linear(x.expand(3, 9, 7), weight.expand(2, 4, 7), None),
        lambda: _native.linear(x.expand(3, 9, 7), weight.expand(3, 4, 7), bias.expand(2, 4)),
    ):
        with pytest.raises(ValueError, match="^(weight|bias): expected .* got"):
            wrong()
    # Of another dtype than the weights the bias is converted.
    narrow = _native.linear(x, weight, bias.float())
    assert torch.equal(narrow, _native.linear(x, weight, bias.float().double()))
