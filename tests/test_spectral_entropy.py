"""Eigenvalues to bits, against the float64 reference."""

import math

import pytest
import torch
from chains import assert_refused

from lmnfast import ops, reference


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 7), (4, 8), (2, 3, 9), (0, 5), (5, 768)])
def test_any_shape(shape, device, dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    ours = ops.spectral_entropy(w.to(device))
    assert ours.dtype == torch.float64 and ours.shape == shape[:-1] and ours.device.type == device.type
    assert torch.allclose(ours.cpu(), reference.spectral_entropy(w), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 100])
def test_n_equal_eigenvalues_are_log2_n_bits(n, device, dtype):
    bits = ops.spectral_entropy(torch.full((n,), -2.5, dtype=dtype, device=device))
    assert bits.item() == pytest.approx(math.log2(n), abs=1e-13)


def test_zeros_and_signs_do_not_count(device, dtype):
    w = torch.tensor([3.0, -1.0, 0.0, 0.0, -0.0], dtype=dtype, device=device)
    assert ops.spectral_entropy(w).item() == pytest.approx(
        0.25 * 2 + 0.75 * (2 - 1.584962500721156), abs=1e-14
    )
    assert ops.spectral_entropy(torch.tensor([0.0, 5.0, 0.0], dtype=dtype, device=device)).item() == 0


def test_eigenvalues_far_below_the_largest_keep_their_digits(device):
    w = torch.tensor([1.0, 1e-12, 1e-100, 1e-300], dtype=torch.float64)
    assert ops.spectral_entropy(w.to(device)).item() == pytest.approx(
        reference.spectral_entropy(w).item(), rel=1e-6
    )


def test_nan_stays_nan(device, dtype):
    assert ops.spectral_entropy(torch.tensor([1.0, float("nan")], dtype=dtype, device=device)).isnan()


def test_strided_rows(device, dtype):
    w = torch.rand(9, 6, dtype=dtype, device=device).mT
    assert torch.equal(ops.spectral_entropy(w), ops.spectral_entropy(w.contiguous()))


def test_the_same_bits_for_any_thread_count(device, dtype, threads):
    w = torch.rand(17, 100, dtype=dtype, device=device)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(ops.spectral_entropy(w))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.lmnfast.spectral_entropy.default, (torch.rand(3, 5, dtype=dtype),))


def test_torch_compile_gives_the_same_bits():
    compiled = torch.compile(lambda w: ops.spectral_entropy(w * 2) + 1, fullgraph=True, backend="aot_eager")
    w = torch.rand(3, 5)
    assert torch.equal(compiled(w), ops.spectral_entropy(w * 2) + 1)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (torch.ones(3, dtype=torch.int64), TypeError, "expected float32 or float64, got torch.int64"),
        (torch.ones(3).to_sparse(), TypeError, "expected a dense tensor, got a torch.sparse_coo one"),
        (torch.ones(3, 0), ValueError, r"expected \(..., N\) with N > 0, got shape \(3, 0\)"),
        (torch.tensor(1.0), ValueError, r"expected \(..., N\) with N > 0, got shape \(\)"),
    ],
)
def test_what_is_no_row_of_eigenvalues_is_refused(value, error, message):
    assert_refused(torch.ops.lmnfast.spectral_entropy, [value], error, f"eigenvalues: {message}")


def test_zeros_alone_are_refused():
    with pytest.raises(ValueError, match="eigenvalues: expected one or more in a row that are not 0"):
        ops.spectral_entropy(torch.tensor([[1.0, 2.0], [0.0, -0.0]]))


@pytest.mark.parametrize("size", [1e308, 5e-324])
def test_the_largest_and_the_smallest_numbers(size, device):
    w = torch.full((4,), size, dtype=torch.float64, device=device)
    assert ops.spectral_entropy(w).item() == pytest.approx(2, abs=1e-13)
    assert reference.spectral_entropy(w).item() == pytest.approx(2, abs=1e-13)


def test_inf_is_no_eigenvalue(device):
    assert ops.spectral_entropy(torch.tensor([1.0, float("inf")], device=device)).isnan()
