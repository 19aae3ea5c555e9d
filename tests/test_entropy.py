"""The gradient of the entropy and of the linear mapping number in the matrix."""

import pytest
import torch
from torch import Tensor

import lmnfast
from lmnfast._entropy import slopes

DOUBLE = torch.float64


def symmetric(n: int, seed: int = 0) -> Tensor:
    A = torch.randn(n, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return (A + A.T) / 2


def clusters(*sizes: int) -> Tensor:
    """Equal rows within each cluster: all eigenvalues but one for each cluster are 0."""
    return torch.block_diag(*[torch.ones(n, n, dtype=DOUBLE) for n in sizes])


def bent(n: int, by: float) -> Tensor:
    """A connectivity with entries between 1 - 2 by and 1."""
    L = 1 - by * (1 + symmetric(n).tanh())
    return L.fill_diagonal_(1)


def entropy(w: Tensor) -> Tensor:
    p = w.abs() / w.abs().sum()
    return -(p * torch.log2(p)).sum()


MATRICES = {
    "random": symmetric(12) + 3 * torch.eye(12, dtype=DOUBLE),
    "indefinite": symmetric(12, 1).fill_diagonal_(1),
    "bent": bent(20, 0.2),
    "near ones": bent(20, 1e-3),
    "identity": torch.eye(6, dtype=DOUBLE),
    "one": torch.ones(1, 1, dtype=DOUBLE),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("of", ["complexity", "lmn"])
def test_the_gradient_is_that_of_autograd_through_the_eigenvalues(name, of):
    L = MATRICES[name].clone().requires_grad_()
    number = {"complexity": lmnfast.nonlinear_complexity, "lmn": lmnfast.linear_mapping_number}[of]
    value = number(L, differentiable=True)
    assert float(value.detach()) == pytest.approx(float(number(L)), rel=1e-12, abs=1e-12)
    (own,) = torch.autograd.grad(value, L)
    bits = entropy(torch.linalg.eigvalsh(L))
    (other,) = torch.autograd.grad(bits if of == "complexity" else torch.exp2(bits), L)
    other = (other + other.T) / 2
    torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()) + 1e-12)


@pytest.mark.parametrize("sizes", [(5, 5, 5), (4, 3, 1), (6,)])
def test_clusters_have_the_finite_difference_along_what_keeps_their_rows_equal(sizes):
    """Eigenvalues of 0 with many directions, and equal ones: the derivative is one function of the matrix."""
    L, among = clusters(*sizes), symmetric(len(sizes), 3)
    which = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    direction = among[which][:, which]

    def bits(step: float) -> float:
        w = torch.linalg.eigvalsh(L + step * direction)
        return float(entropy(w[w.abs() > 1e-9]))

    G = L.clone().requires_grad_()
    lmnfast.nonlinear_complexity(G, differentiable=True).backward()
    assert G.grad.isfinite().all()
    assert float((G.grad * direction).sum()) == pytest.approx((bits(1e-5) - bits(-1e-5)) / 2e-5, abs=1e-8)


def test_an_eigenvalue_that_is_zero_to_rounding_has_no_side():
    """Of equal rows the rest of the spectrum is rounding of either sign, and the entropy has a kink there."""
    w = torch.tensor([3.0, 1e-15, -1e-15, 0.0], dtype=DOUBLE)
    g = slopes(w, entropy(w[:1]), "absolute")
    assert g[1:].eq(0).all() and abs(float(g[0])) < 1e-15
    w = torch.tensor([3.0, 1e-9, -1e-9, 1e-7], dtype=DOUBLE)  # small, and no rounding: clamped
    g = slopes(w, torch.zeros((), dtype=DOUBLE), "absolute")
    assert g[1] == -g[2] == g[3] and float(g[1]) == pytest.approx(
        -float(torch.tensor(1e-6 / 4, dtype=DOUBLE).log2()) / 3
    )


def test_scaling_the_matrix_changes_nothing():
    L = MATRICES["bent"].clone().requires_grad_()
    lmnfast.linear_mapping_number(L, differentiable=True).backward()
    assert float((L.grad * L.detach()).sum()) == pytest.approx(0, abs=1e-12)


def test_clipped_eigenvalues_have_no_gradient():
    L = MATRICES["indefinite"].clone().requires_grad_()
    value = lmnfast.nonlinear_complexity(L, negative="clip", differentiable=True)
    assert float(value.detach()) == pytest.approx(
        float(lmnfast.nonlinear_complexity(L, negative="clip")), rel=1e-12
    )
    value.backward()
    w, U = torch.linalg.eigh(L.detach())
    assert (w < 0).any()
    in_basis = U.T @ L.grad @ U
    torch.testing.assert_close(
        in_basis.diagonal()[w < 0], torch.zeros(int((w < 0).sum()), dtype=DOUBLE), atol=1e-12, rtol=0
    )
    kept = w[w > 0].requires_grad_()
    (expected,) = torch.autograd.grad(entropy(kept), kept)
    torch.testing.assert_close(in_basis.diagonal()[w > 0], expected, rtol=1e-10, atol=1e-12)


def test_batches_and_float32_matrices():
    each = [MATRICES["bent"], bent(20, 0.05)]
    L = torch.stack(each).float().requires_grad_()
    values = lmnfast.linear_mapping_number(L, differentiable=True)
    assert values.dtype == DOUBLE and values.shape == (2,)
    values.sum().backward()
    for n, own in enumerate(each):
        alone = own.float().requires_grad_()
        lmnfast.linear_mapping_number(alone, differentiable=True).backward()
        torch.testing.assert_close(L.grad[n], alone.grad)
    assert L.grad.dtype == torch.float32


def test_the_participation_ratio_has_the_gradient_of_its_formula():
    L = MATRICES["bent"].clone().requires_grad_()
    ratio = lmnfast.participation_ratio(L, differentiable=True)
    ratio.backward()
    torch.testing.assert_close(L.grad, -2 * float(ratio.detach()) ** 2 * L.detach() / 400)


def test_there_is_no_second_derivative():
    L = MATRICES["bent"].clone().requires_grad_()
    (g,) = torch.autograd.grad(lmnfast.nonlinear_complexity(L, differentiable=True), L, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()
