import numpy as np
import pytest
import torch
from torch import nn

import lmnfast
from lmnfast import spectrum
from lmnfast.spectrum import measurement

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def symmetric(*shape, seed=0):
    A = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (A + A.mT) / 2


def blocks(sizes, dtype=torch.float64):
    return torch.block_diag(*[torch.ones(n, n, dtype=dtype) for n in sizes])


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 4, 30])
def test_k_equal_blocks_have_lmn_k(k, size, dtype):
    L = blocks([size] * k, dtype)
    assert lmnfast.linear_mapping_number(L).item() == pytest.approx(k, rel=1e-9)
    assert lmnfast.nonlinear_complexity(L).item() == pytest.approx(np.log2(k), abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 17, 100])
def test_the_identity_has_lmn_n(n, dtype):
    assert lmnfast.linear_mapping_number(torch.eye(n, dtype=dtype)).item() == pytest.approx(n, rel=1e-12)


def test_eigenvalues_come_by_falling_magnitude_and_in_float64(dtype):
    A = torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=dtype)
    w = lmnfast.eigenvalues(A + A.mT)
    assert w.dtype == torch.float64 and (w < 0).any()
    assert (w.abs().diff() <= 0).all()
    assert np.allclose(np.sort(w), np.linalg.eigvalsh((A + A.mT).double()), atol=1e-12)


def test_negative_eigenvalues_count_by_their_magnitude():
    L = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # 3 and -1
    assert lmnfast.nonlinear_complexity(L).item() == pytest.approx(
        -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    )


def test_batches_are_measured_one_by_one(dtype):
    A = torch.rand(2, 3, 9, 9, dtype=dtype)
    L = (A + A.mT) / 2
    lmn = lmnfast.linear_mapping_number(L)
    assert lmn.shape == (2, 3) and lmn.dtype == torch.float64
    for index in np.ndindex(2, 3):
        assert lmn[index].item() == pytest.approx(lmnfast.linear_mapping_number(L[index]).item(), rel=1e-12)
    assert lmnfast.eigenvalues(L).shape == (2, 3, 9)


def test_lmn_lies_between_1_and_n():
    for seed in range(5):
        A = torch.rand(12, 12, generator=torch.Generator().manual_seed(seed))
        assert 1 <= lmnfast.linear_mapping_number((A + A.mT) / 2) <= 12


def test_a_matrix_near_rank_one_in_float32_is_one_map():
    noise = torch.randn(400, 400, generator=torch.Generator().manual_seed(0)) * 1e-7
    L = 1 - (noise + noise.mT).abs()
    assert lmnfast.linear_mapping_number(L).item() == pytest.approx(1, abs=1e-3)


def test_a_tracked_matrix_gives_a_detached_number():
    L = torch.eye(3, requires_grad=True)
    assert not lmnfast.linear_mapping_number(L).requires_grad


def test_a_measurement_carries_what_its_value_depends_on():
    torch.manual_seed(0)
    f, x = nn.Sequential(nn.Linear(6, 20), nn.SiLU(), nn.Linear(20, 3)), 3 * torch.randn(30, 6)
    m = lmnfast.measure(f, x, points=9, rule="lobatto")
    assert (m.samples, m.points, m.rule, m.method) == (30, 9, "lobatto", "path")
    assert m.precision == torch.get_float32_matmul_precision() and m.solver == "cpu"
    assert torch.equal(m.connectivity, lmnfast.connectivity(f, x, points=9, rule="lobatto"))
    assert torch.equal(m.eigenvalues, lmnfast.eigenvalues(m.connectivity))
    assert m.lmn == pytest.approx(2**m.complexity_bits, rel=1e-12)
    assert m.lmn == lmnfast.lmn(f, x, points=9, rule="lobatto").item() != lmnfast.lmn(f, x).item()
    assert 1 < m.lmn < 30 and "lmn=" in repr(m) and "tensor" not in repr(m)
    assert "precision='highest', solver='cpu')" in repr(m)
    assert measurement(m.connectivity, points=9, rule="lobatto", precision="medium").precision == "medium"
    with pytest.raises(AttributeError):
        m.lmn = 2.0


@pytest.mark.parametrize("method", ["hermite", "hermite-midpoint", "jacobian"])
def test_a_stand_in_goes_by_its_name(method):
    f, x = nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 3)), torch.randn(20, 4)
    m = lmnfast.measure(f, x, method=method, points=9, rule="lobatto")
    assert (m.method, m.points, m.rule) == (method, 9, "lobatto") and f"method={method!r}" in repr(m)
    assert m.lmn == lmnfast.lmn(f, x, method=method, points=9, rule="lobatto").item()
    assert m.lmn != lmnfast.lmn(f, x).item()


def test_the_solver_of_a_matrix_on_the_cpu_is_the_cpu():
    L = symmetric(2, 5, 5)
    assert torch.equal(lmnfast.eigenvalues(L, "auto"), lmnfast.eigenvalues(L, solver="cpu"))
    with pytest.raises(ValueError, match="solver: 'cuda' solves matrices on a CUDA device, got one on cpu"):
        lmnfast.eigenvalues(L, solver="cuda")
    with pytest.raises(ValueError, match="solver: expected one of auto, cpu, cuda, got 'magma'"):
        lmnfast.eigenvalues(L, solver="magma")


@CUDA
@pytest.mark.parametrize("solver", spectrum.SOLVERS)
@pytest.mark.parametrize("shape", [(30, 30), (3, 30, 30)])
def test_solvers_agree_and_the_result_is_on_the_matrix_device(solver, shape, dtype):
    L = symmetric(*shape).to(dtype)
    values = lmnfast.eigenvalues(L.cuda(), solver=solver)
    assert values.device.type == "cuda" and values.dtype == torch.float64
    assert torch.allclose(values.abs().cpu(), lmnfast.eigenvalues(L).abs(), rtol=0, atol=1e-12)


@CUDA
def test_small_matrices_are_solved_on_the_cpu_and_large_ones_on_the_card(monkeypatch):
    monkeypatch.setattr(spectrum, "CUDA_SOLVES_FROM", 8)
    for n, where in ((7, "cpu"), (8, "cuda")):
        m = measurement(symmetric(n, n).cuda(), points=21, rule="uniform")
        assert m.solver == where and m.eigenvalues.device.type == "cuda"


@CUDA
def test_where_the_card_fails_the_cpu_solves_and_is_named(monkeypatch):
    solve, L = torch.linalg.eigvalsh, symmetric(9, 9).cuda()
    calls = []

    def failing(L):
        calls.append(L.device.type)
        if L.is_cuda:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(L)

    monkeypatch.setattr(spectrum, "CUDA_SOLVES_FROM", 1)
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    m = measurement(L, points=21, rule="uniform")
    assert calls == ["cuda", "cpu"] and m.solver == "cpu"
    assert m.eigenvalues.device == L.device


def test_lmn_is_a_0_dim_float64_tensor():
    value = lmnfast.lmn(nn.Linear(3, 2), torch.randn(5, 3))
    assert value.shape == () and value.dtype == torch.float64


@pytest.mark.parametrize(
    "L, error, message",
    [
        (
            torch.ones(3, 3, dtype=torch.int64),
            TypeError,
            "L: expected a floating-point tensor, got torch.int64",
        ),
        ([[1.0]], TypeError, "L: expected a floating-point tensor, got list"),
        (torch.ones(3, 4), ValueError, r"L: expected square matrices .* got shape \(3, 4\)"),
        (torch.ones(0, 0), ValueError, "L: expected square"),
        (torch.ones(5), ValueError, "L: expected square"),
        (torch.full((2, 2), float("nan")), ValueError, "L: expected finite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), ValueError, "L: expected a symmetric matrix"),
    ],
)
def test_what_is_no_connectivity_matrix_is_refused(L, error, message):
    for measure in (lmnfast.eigenvalues, lmnfast.nonlinear_complexity, lmnfast.linear_mapping_number):
        with pytest.raises(error, match=message):
            measure(L)
