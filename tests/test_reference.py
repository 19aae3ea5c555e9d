"""The reference against what was not made here: numpy's statistics, fractions, closed forms, and the identities of
docs/mathematics.md.

Kernels are held to `lmnfast.reference`, so nothing but this file would notice a wrong definition.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lmnfast import reference
from lmnfast.quadrature import orthonormal_polynomials, path_nodes

F64 = torch.float64
UNIFORM = path_nodes("uniform", 21)
EPSILON = torch.finfo(F64).eps
RULES = [("uniform", 21), ("uniform", 4), ("lobatto", 9), ("lobatto", 3)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def r2(y: list | Tensor, nodes: Tensor = UNIFORM[0], weights: Tensor = UNIFORM[1]) -> float:
    """Of one output at the nodes."""
    return reference.r2_along_path(torch.as_tensor(y, dtype=F64)[:, None], nodes, weights).item()


def exact_r2(y: list[Fraction], t: list[Fraction], weights: list[Fraction]) -> Fraction:
    """Squared Pearson correlation in rational arithmetic."""

    def mean(values: list[Fraction]) -> Fraction:
        return sum((w * v for w, v in zip(weights, values, strict=True)), Fraction(0))

    def covariance(a: list[Fraction], b: list[Fraction]) -> Fraction:
        return mean([p * q for p, q in zip(a, b)]) - mean(a) * mean(b)

    return covariance(y, t) ** 2 / (covariance(y, y) * covariance(t, t))


def equidistant(points: int) -> tuple[list[Fraction], list[Fraction]]:
    return [Fraction(m, points - 1) for m in range(points)], [Fraction(1, points)] * points


# ---- one path ----


def test_r2_is_the_square_of_numpys_correlation_averaged_over_outputs():
    y = draw(7, 21, 5) + torch.arange(5) * UNIFORM[0][:, None]
    ours = reference.r2_along_path(y, *UNIFORM)
    t = UNIFORM[0].numpy()
    for pair in range(7):
        numpys = [np.corrcoef(t, y[pair, :, k])[0, 1] ** 2 for k in range(5)]
        assert ours[pair].item() == pytest.approx(np.mean(numpys), abs=1e-14)
        assert 2 * min(numpys) < max(numpys)


@pytest.mark.parametrize("seed", range(3))
def test_weights_that_are_not_uniform_count_as_numpys_weights_do(seed):
    generator = np.random.default_rng(seed)
    inner, weights = np.sort(generator.random(6)), generator.random(8)
    t, weights = np.concatenate([[0.0], inner, [1.0]]), weights / weights.sum()
    y = generator.normal(size=8)
    covariance = np.cov(np.stack([t, y]), aweights=weights, ddof=0)
    numpys = covariance[0, 1] ** 2 / (covariance[0, 0] * covariance[1, 1])
    assert r2(y, torch.from_numpy(t), torch.from_numpy(weights)) == pytest.approx(numpys, abs=1e-14)


def test_a_parabola_by_hand():
    """y = t^2 at 0, 1/2, 1. Equal weights: cov = 1/6, var t = 1/6, var y = 13/72. Simpson's: cov = 1/12, var t = 1/12,
    var y = 7/72."""
    nodes = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    y = nodes**2
    assert r2(y, nodes, torch.full((3,), 1 / 3, dtype=F64)) == pytest.approx(12 / 13, abs=1e-15)
    assert r2(y, nodes, torch.tensor([1, 4, 1], dtype=F64) / 6) == pytest.approx(6 / 7, abs=1e-15)


@pytest.mark.parametrize("degree", [1, 2, 3, 7])
@pytest.mark.parametrize("points", [3, 11, 21])
def test_powers_in_rational_arithmetic(degree, points):
    t, weights = equidistant(points)
    exact = exact_r2([x**degree for x in t], t, weights)
    nodes, weights = path_nodes("uniform", points)
    assert r2(nodes**degree, nodes, weights) == pytest.approx(float(exact), abs=1e-14)
    assert degree == 1 or exact < 1


@pytest.mark.parametrize("points", [3, 5, 21, 101])
def test_a_relu_kink_half_way_in_closed_form(points):
    """With u = -n ... n, the positive part is (u + |u|) / 2, and u and |u| are uncorrelated: r2 = 1 / (1 + var |u| / var u)."""
    n = points // 2
    closed = 1 / (2 - 3 * n * (n + 1) / (2 * n + 1) ** 2)  # 4 / 5 of infinitely many
    nodes, weights = path_nodes("uniform", points)
    assert r2((nodes - 0.5).clamp(min=0), nodes, weights) == pytest.approx(closed, abs=1e-14)
    x = torch.tensor([[-2.0], [2.0], [5.0]], dtype=F64)
    L = reference.path_connectivity(torch.relu, x, nodes, weights)
    assert L[0, 1].item() == pytest.approx(closed, abs=1e-14) and L[1, 2].item() == pytest.approx(
        1, abs=1e-14
    )
    L = reference.path_connectivity(torch.abs, x, nodes, weights)
    assert L[0, 1].item() == pytest.approx(0, abs=1e-14), "|x| is even about the middle"


def test_a_relu_kink_anywhere_in_rational_arithmetic():
    t, weights = equidistant(21)
    for at in (Fraction(1, 4), Fraction(9, 20), Fraction(71, 100)):
        exact = exact_r2([max(x - at, Fraction(0)) for x in t], t, weights)
        x = torch.tensor([[-float(at)], [1 - float(at)]], dtype=F64)
        L = reference.path_connectivity(torch.relu, x, *UNIFORM)
        assert L[0, 1].item() == pytest.approx(float(exact), abs=1e-13) and exact < 0.98


@pytest.mark.parametrize("rule", RULES)
def test_r2_lies_between_0_and_1_and_sees_neither_offset_nor_scale(rule):
    nodes, weights = path_nodes(*rule)
    y = draw(200, len(nodes), 3) + torch.tensor([0, 2, 9]) * nodes[:, None]
    r = reference.r2_of_outputs(y, nodes, weights)[0]
    assert 0 <= r.min() < 0.3 and 0.9 < r.max() <= 1 + 4 * EPSILON
    for a, b in ((-3.0, 7.0), (1e-150, 0.0), (1e150, 0.0)):
        assert (reference.r2_of_outputs(a * y + b, nodes, weights)[0] - r).abs().max() < 1e-12
    assert (reference.r2_of_outputs(y.flip(1), nodes, weights)[0] - r).abs().max() < 1e-13, (
        "walked from the other end"
    )


def test_a_constant_output_counts_as_straight_up_to_four_epsilons():
    """The outputs are 1, and q epsilons more at every second node: a standard deviation of q sqrt(110) / 21 epsilons."""
    for q in (0, 1, 4, 8):  # 8: 3.995 epsilons
        y = 1 + q * EPSILON * (torch.arange(21, dtype=F64) % 2)
        found, constant = reference.r2_of_outputs(y[:, None], *UNIFORM)
        assert found.item() == 1 and constant.item()
    for q in (9, 100):  # 9: 4.495 epsilons
        y = 1 + q * EPSILON * (torch.arange(21, dtype=F64) % 2)
        found, constant = reference.r2_of_outputs(y[:, None], *UNIFORM)
        assert found.item() == pytest.approx(0, abs=1e-14) and not constant.item()


def test_the_magnitude_of_a_constant_output_is_that_of_the_ends_in_its_own_dtype():
    for dtype in (torch.float32, F64):
        step = 8 * torch.finfo(dtype).eps
        y = (1 + step * (torch.arange(21) % 2)).to(dtype)
        assert reference.r2_along_path(y[:, None], *UNIFORM) == 1
        y[0] = y[-1] = 0  # no magnitude is left to round
        assert reference.r2_along_path(y[:, None], *UNIFORM) < 0.1
    wide = y.double()[:, None]
    assert reference.r2_of_outputs(wide, *UNIFORM, rounding=torch.ones(1, dtype=F64))[1].item()


def test_dead_outputs_and_coincident_samples_are_exactly_one_and_average_with_the_others():
    x = torch.tensor([[-1.0], [1.0], [1.0]], dtype=F64)

    def f(z: Tensor) -> Tensor:
        return torch.cat([z.abs(), 0 * z, 0 * z + 0.1], 1)

    L = reference.path_connectivity(f, x, *UNIFORM)
    assert L[1, 2] == 1 and (L.diagonal() == 1).all() and torch.equal(L, L.mT)
    assert L[0, 1].item() == pytest.approx(2 / 3, abs=1e-14), "0, 1 and 1"
    assert reference.path_r2(f(torch.linspace(-1, 1, 21)[1:-1, None].double())[None], f(x), *map(torch.tensor, ([0], [1])),
                             *UNIFORM).item() == pytest.approx(2 / 3, abs=1e-14)  # fmt: skip


def test_a_nan_is_no_constant():
    y = torch.linspace(0, 1, 21, dtype=F64)
    y[3] = math.nan
    assert math.isnan(r2(y))


# ---- all pairs ----


def net(widths: list[int], activation: Callable[[Tensor], Tensor] = torch.sin) -> Callable[[Tensor], Tensor]:
    """Linear layers without bias and an activation between them, float64."""
    weights = [1.5 * draw(o, i, seed=o) / i**0.5 for i, o in pairwise(widths)]

    def f(x: Tensor) -> Tensor:
        for n, weight in enumerate(weights):
            x = (activation(x) if n else x) @ weight.mT
        return x

    return f


def test_a_matrix_is_numpys_correlations_of_all_paths():
    f, x = net([3, 8, 2]), draw(6, 3)
    L = reference.path_connectivity(f, x, *UNIFORM)
    t = UNIFORM[0].numpy()[:, None]
    for i in range(6):
        for j in range(6):
            if i != j:
                y = f(torch.from_numpy((1 - t) * x[i].numpy() + t * x[j].numpy())).numpy()
                numpys = np.mean([np.corrcoef(t[:, 0], y[:, k])[0, 1] ** 2 for k in range(2)])
                assert L[i, j].item() == pytest.approx(numpys, abs=1e-12)
    assert L.min() < 0.9


def test_an_affine_map_before_commutes_with_the_path():
    f, x, weight, bias = net([4, 9, 3]), draw(8, 6), draw(4, 6, seed=3), draw(4, seed=4)

    def whole(x: Tensor) -> Tensor:
        return f(x @ weight.mT + bias)

    hoisted = x @ weight.mT + bias
    L = reference.path_connectivity(whole, x, *UNIFORM)
    assert (L - reference.path_connectivity(f, hoisted, *UNIFORM)).abs().max() < 1e-12 and L.min() < 0.9
    for midpoint in (False, True):
        L = reference.hermite_connectivity(whole, x, *UNIFORM, midpoint)
        truth = reference.hermite_connectivity(f, hoisted, *UNIFORM, midpoint)
        assert (L - truth).abs().max() < 1e-12 and L.min() < 0.9


def test_a_rotation_of_the_outputs_is_seen():
    f, x = net([4, 9, 3]), draw(8, 4)
    rotation = torch.linalg.qr(draw(3, 3, seed=5)).Q
    L = reference.path_connectivity(f, x, *UNIFORM)
    assert (reference.path_connectivity(lambda x: f(x) @ rotation, x, *UNIFORM) - L).abs().max() > 1e-3


# ---- polynomials ----


def powers(degree: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """All powers up to a degree, mixed, of one number; and samples."""
    mix = draw(3, degree, seed=degree)
    return lambda x: torch.cat([x**n for n in range(1, degree + 1)], 1) @ mix.mT, 2 * draw(7, 1)


@pytest.mark.parametrize("midpoint, degree", [(False, 3), (True, 4)])
def test_hermite_of_a_cubic_and_with_the_midpoint_of_a_quartic_is_the_path(midpoint, degree):
    f, x = powers(degree)
    truth = reference.path_connectivity(f, x, *UNIFORM)
    assert (
        reference.hermite_connectivity(f, x, *UNIFORM, midpoint) - truth
    ).abs().max() < 1e-12 and truth.min() < 0.9
    f, x = powers(degree + 1)
    truth = reference.path_connectivity(f, x, *UNIFORM)
    assert (reference.hermite_connectivity(f, x, *UNIFORM, midpoint) - truth).abs().max() > 1e-3


@pytest.mark.parametrize("midpoint", [False, True], ids=["cubic", "quartic"])
def test_a_hermite_path_is_numpys_polynomial_of_the_same_values_and_slopes(midpoint):
    nodes = UNIFORM[0]
    for seed in range(5):
        first, second, start, end, half = draw(5, seed=seed).tolist()
        rows = [[0.0**n for n in range(5)], [1.0] * 5, [float(n == 1) for n in range(5)], [*range(5)]]
        rows.append([0.5**n for n in range(5)])
        values = [first, second, start, end, half]
        size = 5 if midpoint else 4
        coefficients = np.linalg.solve(np.array(rows)[:size, :size], values[:size])
        expected = np.polynomial.Polynomial(coefficients)(nodes.numpy())
        given = [torch.tensor([v], dtype=F64) for v in values]
        ours = reference.hermite_path(*given[:4], given[4] if midpoint else None, nodes)[:, 0]
        assert np.abs(ours.numpy() - expected).max() < 1e-13


@pytest.mark.parametrize("midpoint, enough", [(False, 5), (True, 6)], ids=["cubic", "quartic"])
def test_lobatto_sums_of_a_polynomial_path_are_those_of_21_points(midpoint, enough):
    """e^2 of a polynomial of degree d wants 2 d <= 2 M - 3."""
    f, x = net([4, 9, 3]), draw(7, 4)
    truth = reference.hermite_connectivity(f, x, *UNIFORM, midpoint)
    for points in range(3, 10):
        L = reference.hermite_connectivity(f, x, *path_nodes("lobatto", points), midpoint)
        error = (L - truth).abs().max()
        assert error < 1e-13 if points >= enough else error > 1e-4


# ---- Jacobians ----


def test_the_jacobian_of_two_linear_maps_with_a_sine_between():
    first, last, x = draw(5, 4, seed=1), draw(3, 5, seed=2), draw(6, 4)
    J = reference.jacobian(lambda x: torch.sin(x @ first.mT) @ last.mT, x)
    closed = np.einsum("kh,nh,hd->nkd", last, np.cos(x.numpy() @ first.numpy().T), first)
    assert J.shape == (6, 3, 4) and np.abs(J.numpy() - closed).max() < 1e-14
    J = reference.jacobian(lambda x: x.square().reshape(len(x), 2, 2), x.reshape(6, 2, 2))
    assert torch.equal(J, torch.diag_embed(2 * x))


@pytest.mark.parametrize("squared", [False, True])
def test_distances_are_numpys_norms(squared):
    first, second = draw(5, 7, seed=1), draw(4, 7, seed=2)
    norms = np.linalg.norm(first.numpy()[:, None] - second.numpy(), axis=-1)
    ours = reference.jacobian_distance(first, second, squared).numpy()
    assert np.abs(ours - (norms**2 if squared else norms)).max() < 1e-13


def test_jacobians_of_one_nonlinearity_are_as_far_apart_as_slopes_in_the_metric_of_both_weights():
    """|J_i - J_j|^2 = (s_i - s_j)^T M (s_i - s_j), M = (last^T last) o (first first^T)."""
    first, last, x = draw(5, 4, seed=1), draw(3, 5, seed=2), draw(6, 4)
    J = reference.jacobian(lambda x: torch.sin(x @ first.mT) @ last.mT, x).flatten(1)
    s, M = torch.cos(x @ first.mT), (last.mT @ last) * (first @ first.mT)
    B = torch.linalg.cholesky(M).mT
    d = reference.jacobian_distance(J, J, False)
    assert (reference.jacobian_distance(s @ B.mT, s @ B.mT, False) - d).abs().max() < 1e-12 and d.max() > 1


# ---- eigenvalues ----

ROOT2 = 2**0.5


def entropy(*shares: float) -> float:
    """In bits."""
    return -sum(p * math.log2(p) for p in np.array(shares) / sum(shares))


def blocks(*sizes: int) -> Tensor:
    return torch.block_diag(*(torch.ones(n, n, dtype=F64) for n in sizes))


@pytest.mark.parametrize(
    "matrix, lmn, clipped",
    [
        (torch.eye(7, dtype=F64), 7, 7),
        (torch.ones(7, 7, dtype=F64), 1, 1),
        (blocks(2, 2, 2), 3, 3),
        (blocks(1, 3), 4 / 3**0.75, 4 / 3**0.75),  # shares 1/4 and 3/4
        # Eigenvalues 1, 1 + sqrt 2, 1 - sqrt 2.
        (
            torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=F64),
            2 ** entropy(1, ROOT2 + 1, ROOT2 - 1),
            2 ** entropy(1, ROOT2 + 1),
        ),
        # 1 - a twice, and 1 + 2 a.
        (
            torch.tensor([[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]], dtype=F64),
            2 ** entropy(0.5, 0.5, 2),
            2 ** entropy(0.5, 0.5, 2),
        ),
    ],
    ids=["identity", "ones", "equal blocks", "unequal blocks", "indefinite", "all alike"],
)
def test_linear_mapping_numbers_by_hand(matrix, lmn, clipped):
    assert reference.linear_mapping_number(matrix).item() == pytest.approx(lmn, rel=1e-12)
    assert reference.linear_mapping_number(matrix, "clip").item() == pytest.approx(clipped, rel=1e-12)
    assert reference.linear_mapping_number(torch.stack([matrix, matrix])).shape == (2,)
    w = reference.symmetric_eigenvalues(matrix)
    assert w.sum().item() == pytest.approx(len(matrix)), "ones on the diagonal"
    assert w.abs().sum().item() == pytest.approx(len(matrix) + 2 * w.clamp(max=0).abs().sum().item())
    assert reference.spectral_entropy(w).item() == pytest.approx(math.log2(lmn), abs=1e-12)


def test_symmetric_eigenvalues_rise_and_are_those_of_the_lower_triangle():
    w = reference.symmetric_eigenvalues(torch.tensor([[2.0, 99.0], [1.0, 2.0]]))
    assert w.dtype == F64 and w.tolist() == pytest.approx([1, 3])


def test_an_entropy_sees_no_scale_no_sign_and_no_zeros():
    assert reference.spectral_entropy(torch.tensor([1.0, 0.0, -1.0])).item() == pytest.approx(1, abs=1e-15)
    assert reference.spectral_entropy(torch.tensor([0.0, 5.0])).item() == 0
    for scale in (1e-300, 1e300):
        w = scale * torch.tensor([4.0, -2.0, 1.0, 1.0], dtype=F64)
        assert reference.spectral_entropy(w).item() == pytest.approx(1.75, abs=1e-14)  # 1/2, 1/4, 1/8, 1/8


def test_an_affine_network_has_lmn_one_and_one_relu_more():
    x = draw(12, 3)
    weight = draw(4, 3, seed=1)
    L = reference.path_connectivity(lambda x: x @ weight.mT + 1, x, *UNIFORM)
    assert (L - 1).abs().max() < 1e-13
    assert reference.linear_mapping_number(L).item() == pytest.approx(1, abs=1e-9)
    L = reference.path_connectivity(lambda x: torch.relu(x @ weight.mT), x, *UNIFORM)
    assert 1.5 < reference.linear_mapping_number(L).item() < 12


# ---- a block's hidden layer ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_blocks_coefficients_are_those_of_its_hidden_layer_in_numpy(rule, gated, normalised):
    """The layer is evaluated at points of the path, in place of pre-activations between the samples'."""
    nodes, weights = path_nodes(*rule)
    x, linear, bias = draw(5, 7), draw(14, 7, seed=1), draw(14, seed=2)
    first, second = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 4, 0, 2])
    centred = x - x.mean(1, keepdim=True) if normalised else x
    norm = None
    if normalised:
        norm = (centred.square().mean(1), (centred[first] * centred[second]).mean(1), 0.01)
    polynomials = orthonormal_polynomials(nodes, weights)
    coefficients, energy = reference.block_coefficients(
        centred @ linear.mT,
        first,
        second,
        torch.tanh,
        nodes,
        polynomials,
        gated=gated,
        normalisation=norm,
        shift=bias,
        scale=0.5,
    )
    t, w = nodes.numpy(), weights.numpy()
    basis = np.polynomial.polynomial.polyvander(2 * t - 1, min(4, len(t) - 1))
    q, r = np.linalg.qr(np.sqrt(w)[:, None] * basis)
    q *= np.sign(np.diag(r))
    for row, (i, j) in enumerate(zip(first, second)):
        points = x[i].numpy() + t[:, None] * (x[j] - x[i]).numpy()
        if normalised:
            points = points - points.mean(1, keepdims=True)
            points /= np.sqrt(points.var(1, keepdims=True) + 0.01)
        a = points @ linear.numpy().T + bias.numpy()
        hidden = np.tanh(a[:, :7]) * a[:, 7:] if gated else np.tanh(a)
        residual = hidden - (1 - t)[:, None] * hidden[0] - t[:, None] * hidden[-1]
        numpys = q.T @ (np.sqrt(w)[:, None] * residual)
        ours = coefficients[: len(numpys) - 1, row].numpy()
        assert np.abs(ours - numpys[1:]).max() < 1e-13 and np.abs(numpys[1:]).max() > 0.1
        # Parseval: the squares of all degrees sum to the variance of the residual, times 0.5^2 for the scale.
        variance = w @ residual**2 - (w @ residual) ** 2
        assert float(energy[row].sum()) == pytest.approx(variance.sum() / 4, rel=1e-12)
