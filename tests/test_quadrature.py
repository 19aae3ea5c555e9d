import numpy as np
import pytest
import torch

from lmnfast.quadrature import PAPER_POINTS, orthonormal_polynomials, path_nodes

GRID = np.linspace(0, 1, PAPER_POINTS)


def test_uniform_is_the_papers_rule():
    nodes, weights = path_nodes("uniform", 21)
    assert nodes.dtype == weights.dtype == torch.float64
    assert np.allclose(nodes, np.arange(21) * 0.05, atol=1e-15) and np.allclose(weights, 1 / 21)


@pytest.mark.parametrize("points", range(3, 22))
def test_lobatto_gives_the_21_point_sums_of_polynomials_up_to_degree_2m_minus_3(points):
    nodes, weights = (v.numpy() for v in path_nodes("lobatto", points))
    assert nodes[0] == 0 and nodes[-1] == 1 and (np.diff(nodes) > 0).all() and (weights > 0).all()
    for degree in range(2 * points - 2):
        assert weights @ nodes**degree == pytest.approx((GRID**degree).mean(), abs=1e-15)
    if points < 10:
        degree = 2 * points - 2
        assert abs(weights @ nodes**degree - (GRID**degree).mean()) > 1e-11, "more exact than the claim"


def test_lobatto_with_21_points_is_the_grid_itself():
    nodes, weights = path_nodes("lobatto", 21)
    assert np.allclose(nodes, GRID, atol=1e-15) and np.allclose(weights, 1 / 21, atol=1e-14)


@pytest.mark.parametrize("points", [3, 5, 8, 21])
def test_lobatto_is_symmetric_to_the_last_bits(points):
    nodes, weights = path_nodes("lobatto", points)
    assert torch.equal(weights, weights.flip(0)) and (nodes + nodes.flip(0) - 1).abs().max() < 3e-16


def test_a_rule_handed_out_can_be_changed_without_harm():
    path_nodes("lobatto", 9)[0].zero_()
    assert path_nodes("lobatto", 9)[0][-1] == 1


@pytest.mark.parametrize("points", [np.int64(9), np.uint8(9), torch.tensor(9)])
def test_points_may_be_of_any_integer_type(points):
    for ours, known in zip(path_nodes("lobatto", points), path_nodes("lobatto", 9)):
        assert torch.equal(ours, known)


@pytest.mark.parametrize(
    "rule, points, error, message",
    [
        ("simpson", 21, ValueError, "rule: expected one of uniform, lobatto, got 'simpson'"),
        ("uniform", 2, ValueError, "points: expected at least 3, as 2 always lie on a straight line, got 2"),
        ("lobatto", 2, ValueError, "points: expected at least 3, .* got 2"),
        ("uniform", 0, ValueError, "points"),
        ("uniform", -21, ValueError, "points"),
        ("lobatto", 22, ValueError, "points: the lobatto rule has at most 21 points, got 22"),
        ("uniform", 2.0, TypeError, "points: expected an integer, got 2.0"),
        ("uniform", True, TypeError, "points: expected an integer, got True"),
        ("uniform", np.bool_(True), TypeError, "points: expected an integer"),
        ("uniform", "21", TypeError, "points: expected an integer, got '21'"),
        ("uniform", None, TypeError, "points: expected an integer, got None"),
    ],
)
def test_bad_rules_are_refused(rule, points, error, message):
    with pytest.raises(error, match=message):
        path_nodes(rule, points)


def test_numpys_integers_are_integers():
    for given, expected in zip(path_nodes("lobatto", np.int64(9)), path_nodes("lobatto", 9)):
        assert torch.equal(given, expected)
    for points in (np.float64(9), np.bool_(True), "9"):
        with pytest.raises(TypeError, match="points: expected an integer"):
            path_nodes("lobatto", points)


@pytest.mark.parametrize("rule, points", [("uniform", 3), ("uniform", 21), ("lobatto", 5), ("lobatto", 9)])
def test_the_residuals_moments_keep_their_digits(rule, points):
    """Of residuals e that are 0 at both ends, var(t) var(e) - cov(e, t)^2 is at least c var(t) E[e^2], and for one of
    them no more: docs/mathematics.md, section 5."""
    t, w = (v.numpy() for v in path_nodes(rule, points))
    t = t - w @ t
    v, ends = w @ t**2, w[0] + w[-1]
    form = v * (np.diag(w) - np.outer(w, w)) - np.outer(w * t, w * t)
    root = np.sqrt(w[1:-1])
    shares = np.linalg.eigvalsh(form[1:-1, 1:-1] / (root[:, None] * root)) / v
    assert shares.min() == pytest.approx(min(ends, ends / (4 * v)), rel=1e-9) and shares.min() > 0.09


RULES = [("uniform", points) for points in (3, 4, 21, 40, 66)] + [("lobatto", 3), ("lobatto", 9)]


@pytest.mark.parametrize("rule, points", RULES)
def test_polynomials_are_orthonormal_and_each_of_its_degree(rule, points):
    nodes, weights = path_nodes(rule, points)
    weighted = orthonormal_polynomials(nodes, weights)
    assert weighted.dtype == torch.float64 and weighted.shape == (points - 1, points)
    gram = weighted / weights @ weighted.mT
    assert (gram - torch.eye(points - 1)).abs().max() < 1e-13
    # Degree d is orthogonal to Legendre's polynomials of degrees 0 to d - 1, and not to the one of degree d.
    legendre = torch.from_numpy(np.polynomial.legendre.legvander(2 * nodes.numpy() - 1, points - 1))
    products = weighted @ legendre
    assert products.tril(0).abs().max() < 1e-13
    leading = products.diagonal(1)[
        : min(points - 1, 12)
    ]  # on more points Legendre's own are soon almost dependent
    assert (leading > 0.1).all()


def test_the_first_polynomials_by_hand():
    """t = 0, 1/2, 1 with equal weights: sqrt(3/2) (2 t - 1), and sqrt(2) (-1/2, 1, -1/2) but for the sign."""
    weighted = orthonormal_polynomials(*path_nodes("uniform", 3))
    expected = torch.tensor([[-(1.5**0.5), 0, 1.5**0.5], [0.5**0.5, -(2**0.5), 0.5**0.5]]) / 3
    assert (weighted - expected).abs().max() < 1e-7


def test_nodes_without_a_weight_take_no_part():
    nodes, weights = path_nodes("uniform", 9)
    weights[[0, 4, 8]] = 0
    weights /= weights.sum()
    weighted = orthonormal_polynomials(nodes, weights)
    assert weighted.shape == (5, 9) and (weighted[:, [0, 4, 8]] == 0).all()
    some = weights > 0
    alone = orthonormal_polynomials(nodes[some], weights[some])
    assert (weighted[:, some] - alone).abs().max() < 1e-15
    gram = weighted[:, some] / weights[some] @ weighted[:, some].mT
    assert (gram - torch.eye(5)).abs().max() < 1e-13
    assert weighted.sum(1).abs().max() < 1e-15
