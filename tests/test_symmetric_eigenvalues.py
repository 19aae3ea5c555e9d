"""Eigenvalues of symmetric matrices, against LAPACK's in float64, and the linear mapping number that follows."""

import math
import sys

import pytest
import torch
from chains import assert_refused

from lmnfast import ops, reference

MODULE = sys.modules["lmnfast.ops.symmetric_eigenvalues"]
EIGENVALUE_ERROR = (
    1e-12  # of the largest magnitude: 2e-14 is the multisection's, the rest is the reduction's rounding
)
LMN_ERROR = 1e-9


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(*shape: int, seed: int = 0) -> torch.Tensor:
    A = random(*shape, seed=seed)
    return (A + A.mT) / 2


def zero_columns(n: int) -> torch.Tensor:
    A = symmetric(n, n)
    A[1::3] = A[:, 1::3] = 0
    return A


def repeated(n: int) -> torch.Tensor:
    which = torch.arange(n) * 7 % max(1, n // 4)
    return symmetric(n, n)[which][:, which]


def near_ones(n: int) -> torch.Tensor:
    return (1 - 1e-7 * symmetric(n, n).abs()).fill_diagonal_(1)


def gram(n: int) -> torch.Tensor:
    X = random(n, max(1, n // 10))
    return X @ X.mT / n


def blocks(n: int) -> torch.Tensor:
    sizes = [n // 3, n // 5, 1, n - n // 3 - n // 5 - 1] if n > 4 else [n]
    return torch.block_diag(
        *[torch.full((k, k), 1 - 0.1 * i, dtype=torch.float64) for i, k in enumerate(sizes)]
    )


CASES = {
    "ones": lambda n: torch.ones(
        n, n, dtype=torch.float64
    ),  # exact collapse: columns of 1e-110 after the first
    "near_ones": near_ones,
    "identity": lambda n: torch.eye(n, dtype=torch.float64),
    "clusters": lambda n: (torch.arange(n)[:, None] % 7 == torch.arange(n) % 7).double(),
    "blocks": blocks,
    "repeated": repeated,
    "zero_columns": zero_columns,
    "gram": gram,
    "random": lambda n: symmetric(n, n),
    "negative": lambda n: -gram(n) - torch.eye(n, dtype=torch.float64),
    "no_diagonal": lambda n: (
        symmetric(n, n).fill_diagonal_(0) if n > 1 else torch.ones(1, 1, dtype=torch.float64)
    ),
    "tiny": lambda n: symmetric(n, n) * 1e-8,
    "huge": lambda n: symmetric(n, n) * 1e8,
    "graded": lambda n: (
        symmetric(n, n)
        * torch.logspace(-12, 0, n, dtype=torch.float64).outer(torch.logspace(-12, 0, n, dtype=torch.float64))
    ),
}


def assert_right(matrices: torch.Tensor, device: torch.device, again: bool = True) -> None:
    """again: also twice the same bits."""
    ours = ops.symmetric_eigenvalues(matrices.to(device))
    expected = reference.symmetric_eigenvalues(matrices)
    assert (
        ours.dtype == torch.float64 and ours.shape == matrices.shape[:-1] and ours.device.type == device.type
    )
    assert not again or torch.equal(ours, ops.symmetric_eigenvalues(matrices.to(device)))
    ours = ours.cpu()
    largest = expected.abs().amax(-1, keepdim=True)
    assert bool(((ours - expected).abs() <= EIGENVALUE_ERROR * largest).all())
    assert bool((ours.diff() >= -EIGENVALUE_ERROR * largest).all())
    bits, truth = reference.spectral_entropy(ours), reference.spectral_entropy(expected)
    assert torch.allclose(torch.exp2(bits), torch.exp2(truth), rtol=LMN_ERROR, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 30])
@pytest.mark.parametrize("case", CASES)
def test_a_kind_of_matrix(case, n, device):
    assert_right(CASES[case](n), device)


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (5, 6, 6), (2, 3, 9, 9), (4, 1, 1)])
def test_any_shape(shape, device, dtype):
    assert_right(symmetric(*shape).to(dtype), device)


@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 2, 2)])
def test_no_matrices(shape, device, dtype):
    assert ops.symmetric_eigenvalues(torch.empty(shape, dtype=dtype, device=device)).shape == shape[:-1]


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_any_scale(scale, device):
    assert_right(symmetric(20, 20) * scale, device)


def test_numbers_that_are_not_normal(device):
    smallest = torch.full((12, 12), 5e-324, dtype=torch.float64, device=device)
    assert ops.symmetric_eigenvalues(smallest)[-1].item() == pytest.approx(12 * 5e-324, abs=0)


def test_all_zero(device, dtype):
    assert torch.equal(
        ops.symmetric_eigenvalues(torch.zeros(2, 9, 9, dtype=dtype, device=device)).cpu(),
        torch.zeros(2, 9, dtype=torch.float64),
    )


def test_the_lower_triangle_is_read(device, dtype):
    A = symmetric(20, 20).to(dtype)
    upper = torch.full_like(A, math.nan).triu(1)
    assert torch.equal(
        ops.symmetric_eigenvalues((A.tril() + upper).to(device)), ops.symmetric_eigenvalues(A.to(device))
    )


def test_strided_matrices(device, dtype):
    part = symmetric(3, 18, 18).to(dtype).to(device)[:, ::2, ::2]
    assert torch.equal(ops.symmetric_eigenvalues(part), ops.symmetric_eigenvalues(part.contiguous()))


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 7])
def test_several_emulated_matrices_at_once_and_one_after_the_other(multiprocessors, emulated, monkeypatch):
    monkeypatch.setenv("LMNFAST_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    A = torch.stack(
        [symmetric(20, 20, seed=1), torch.eye(20).double(), CASES["ones"](20), *symmetric(4, 20, 20)]
    )
    assert MODULE.fits(A)
    assert_right(A, emulated)


# Several layouts of csrc/cuda/eigenvalues/plan.cuh: rows of a block from 8 to 192.
@pytest.mark.parametrize(
    "n, multiprocessors", [(41, 6), (48, 6), (49, 6), (60, 4), (97, 4), (100, 3), (144, 3)]
)
@pytest.mark.parametrize("case", ["ones", "random"])
def test_emulated_cards_with_few_multiprocessors(case, n, multiprocessors, emulated, monkeypatch):
    monkeypatch.setenv("LMNFAST_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    assert MODULE.fits(torch.empty(n, n))
    assert_right(CASES[case](n), emulated)


# The first ones are too many to be there at once before some columns are gone. Of 229 and 265 a part is in global memory.
@pytest.mark.parametrize(
    "case, n, batch, multiprocessors, kilobytes",
    [
        ("near_ones", 101, 4, 2, 6),
        ("ones", 117, 3, 2, 6),
        ("graded", 133, 4, 10, 10),
        ("clusters", 197, 4, 4, 48),
        ("near_ones", 229, 1, 10, 8),
        ("graded", 265, 1, 17, 13),
        ("random", 270, 1, 23, 14),
    ],
)
def test_emulated_matrices_in_several_phases(
    case, n, batch, multiprocessors, kilobytes, emulated, monkeypatch
):
    monkeypatch.setenv("LMNFAST_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    monkeypatch.setenv("LMNFAST_EMULATED_SHARED", str(kilobytes * 1024))
    A = torch.stack([CASES[case](n), *symmetric(batch - 1, n, n)])
    in_one_phase = 8 * batch * (4 * (n + 1) + 2 * n + 2) + 6 * 64
    assert MODULE._workspace_bytes(A) > in_one_phase + 8 * batch * (n // 2) ** 2
    assert_right(A, emulated, again=n < 200)  # the larger ones take seconds


def test_an_emulated_matrix_that_is_not_finite_is_nan_in_several_phases(emulated, monkeypatch):
    monkeypatch.setenv("LMNFAST_EMULATED_MULTIPROCESSORS", "2")
    monkeypatch.setenv("LMNFAST_EMULATED_SHARED", str(6 * 1024))
    A = symmetric(3, 101, 101)
    expected = reference.symmetric_eigenvalues(A)
    A[1, 40, 20] = math.nan
    w = ops.symmetric_eigenvalues(A)
    assert w[1].isnan().all() and torch.allclose(w[::2], expected[::2], atol=1e-11)


def test_what_does_not_fit_on_an_emulated_card_is_solved_elsewhere(emulated, monkeypatch):
    monkeypatch.setenv("LMNFAST_EMULATED_MULTIPROCESSORS", "1")
    assert MODULE.fits(torch.empty(192, 192)) and not MODULE.fits(torch.empty(193, 193))
    assert_right(symmetric(200, 200), emulated)
    monkeypatch.setenv("LMNFAST_EMULATED_SHARED", "2048")
    assert not MODULE.fits(torch.empty(2, 2))
    assert_right(symmetric(10, 10), emulated)


@pytest.mark.parametrize(
    "multiprocessors, kilobytes, most", [(132, 227, 2304), (108, 163, 2304), (16, 227, 768)]
)
def test_the_largest_matrix_of_an_emulated_card(multiprocessors, kilobytes, most, emulated, monkeypatch):
    """An H100 or H200, an A100, and a seventh of an H100, by what they say of themselves."""
    monkeypatch.setenv("LMNFAST_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    monkeypatch.setenv("LMNFAST_EMULATED_SHARED", str(kilobytes * 1024))
    assert MODULE.fits(torch.empty(most, most))
    assert not MODULE.fits(torch.empty(most + 1, most + 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_emulated_matrix_that_is_not_finite_is_nan_and_the_others_are_right(value, emulated):
    A = symmetric(3, 10, 10)
    expected = reference.symmetric_eigenvalues(A)
    A[1, 4, 2] = value
    w = ops.symmetric_eigenvalues(A)
    assert w[1].isnan().all() and torch.allclose(w[::2], expected[::2], atol=1e-12)


def test_the_same_bits_for_any_thread_count(device, dtype, threads):
    A = symmetric(3, 30, 30).to(dtype).to(device)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(ops.symmetric_eigenvalues(A))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.lmnfast.symmetric_eigenvalues.default, (symmetric(3, 5, 5).to(dtype),))


def test_torch_compile_gives_the_same_bits():
    compiled = torch.compile(
        lambda A: ops.symmetric_eigenvalues(A * 2) + 1, fullgraph=True, backend="aot_eager"
    )
    A = symmetric(3, 5, 5)
    assert torch.equal(compiled(A), ops.symmetric_eigenvalues(A * 2) + 1)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "expected float32 or float64, got torch.int64"),
        (torch.ones(3, 3).to_sparse(), TypeError, "expected a dense tensor, got a torch.sparse_coo one"),
        (torch.ones(3, 4), ValueError, r"expected \(..., N, N\) with N > 0, got shape \(3, 4\)"),
        (torch.ones(3), ValueError, r"expected \(..., N, N\) with N > 0, got shape \(3,\)"),
        (torch.ones(2, 0, 0), ValueError, r"expected \(..., N, N\) with N > 0, got shape \(2, 0, 0\)"),
    ],
)
def test_what_is_no_square_matrix_is_refused(value, error, message):
    assert_refused(torch.ops.lmnfast.symmetric_eigenvalues, [value], error, f"matrices: {message}")
