"""The estimate of LMN from products with a matrix, held to eigenvalues of numpy in float64."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebval
from scipy import stats
from torch import nn

import lmnfast
from lmnfast import _deflated, _eigenvalues, _krylov
from lmnfast._kink import Kink
from lmnfast._krylov import estimate, student

N = 320


def lmn_of(w, clip=False):
    a = np.clip(w, 0, None) if clip else np.abs(w)
    p = a[a > 0] / a.sum()
    return math.exp(-(p * np.log(p)).sum())


def spectra():
    draw = np.random.default_rng(0)
    normal = draw.standard_normal(N)
    return {
        "one large, normal bulk": np.concatenate([[200.0, -9.0, 7.0], 0.5 * normal[3:]]),
        "power law of both signs": 100 * np.sign(normal) * np.arange(1, N + 1) ** -1.2,
        "dense at 0": normal * np.abs(normal),
        "no kink": np.concatenate([[50.0], 1 + 0.2 * normal[1:]]),
        "forty equal ones, more than a block has vectors": np.concatenate([[5.0] * 40, 0.3 * normal[40:]]),
    }


SPECTRA = spectra()


def run(w, seed=0, **options):
    """The estimate for a matrix with these eigenvalues. As random vectors have no preferred direction, it may be diagonal."""
    values = torch.from_numpy(np.asarray(w, dtype=float))
    options = {"dimension": min(48, len(w)), "tolerance": 0.05} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_deflated, "BLOCK", 4)  # as many steps as for a large matrix
        return estimate(
            lambda v: values.to(v.dtype)[:, None] * v,
            len(w),
            squares=float(values.square().sum()),
            trace=float(values.sum()),
            generator=torch.Generator().manual_seed(seed),
            like=torch.empty(0, dtype=torch.float64),
            **options,
        )


@cache
def runs(name):
    return [run(SPECTRA[name], seed) for seed in range(40)]


@pytest.mark.parametrize("name", SPECTRA)
def test_the_interval_contains_the_exact_lmn(name):
    """If an interval missed in 5 % of draws, five of 40 or more would miss with a probability of 5 %."""
    exact = lmn_of(SPECTRA[name])
    inside = sum(low <= exact <= high for low, high in (found.interval() for found in runs(name)))
    assert inside >= 36
    assert all(found.interval()[1] / found.lmn - 1 < 0.06 for found in runs(name))


@pytest.mark.parametrize(
    "name", sorted(SPECTRA.keys() - {"no kink"})
)  # there the two known traces say nearly all
def test_the_standard_error_is_the_spread_of_the_estimates(name):
    values = [math.log(found.lmn) for found in runs(name)]
    said = np.sqrt(np.mean([(found.standard_error / found.lmn) ** 2 for found in runs(name)]))
    assert 0.7 < np.std(values, ddof=1) / said < 1.3
    assert abs(np.mean(values) - math.log(lmn_of(SPECTRA[name]))) < 4 * said / math.sqrt(40) + 0.01


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("negative", ["absolute", "clip"])
def test_with_a_vector_for_each_eigenvalue_the_bound_holds_without_chance(name, negative, monkeypatch):
    monkeypatch.setattr(_krylov, "PROBES", 60)
    w = SPECTRA[name][:60]
    found = run(w, dimension=24, tolerance=0.03, negative=negative)
    assert found.probes == 60 - len(found.eigenvalues) and found.standard_error == 0
    assert abs(math.log(found.lmn / lmn_of(w, negative == "clip"))) <= found.bound / found.lmn <= 0.03


@pytest.mark.parametrize("degree", [48, 131])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("slope", [1.0, 6.0])
def test_the_upper_polynomial_lies_nowhere_below_the_error(degree, clip, slope):
    radius = 3.7
    kink = Kink(degree, radius, clip)
    y = np.concatenate(
        [np.random.default_rng(1).uniform(-1, 1, 20_000), np.geomspace(1e-9, 1, 20_000), [0, 1, -1]]
    )
    w = radius * (y.clip(min=0) if clip else np.abs(y))
    exact = w * (slope - np.log(np.where(w > 0, w, 1)))
    error = exact - chebval(y, slope * kink.magnitude - kink.logged)
    upper = chebval(y, kink.upper(slope))
    assert (np.abs(error) <= upper + 1e-13).all()
    assert np.abs(error).max() > 0.5 * upper.max()  # and not far above it where it counts
    assert len(kink.magnitude) == len(kink.upper(slope)) == degree + 1


def test_the_mean_of_the_upper_polynomial_falls_with_the_square_of_the_degree():
    first, second = (Kink(degree, 1.0).upper(5.0)[0] for degree in (64, 256))
    assert 10 < first / second < 20


def blocks(n, groups):
    return torch.block_diag(*[torch.ones(n // groups, n // groups)] * groups)


def low_rank(n, rank):
    vectors = torch.randn(n, rank, generator=torch.Generator().manual_seed(0))
    return vectors @ vectors.T / rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "L",
    [
        *(torch.ones(1, 1), torch.eye(2), torch.ones(2, 2), torch.tensor([[1, 0.5], [0.5, 1]])),
        *(torch.ones(300, 300), blocks(400, 10), blocks(400, 100), low_rank(350, 7)),
        *(torch.eye(100), torch.zeros(40, 40).fill_diagonal_(2.0)),
    ],
    ids=lambda L: f"{len(L)}, rank {int(torch.linalg.matrix_rank(L))}",
)
def test_what_is_deflated_is_exact(L, dtype):
    w = np.linalg.eigvalsh(L.double().numpy())
    found = _krylov.of_matrix(L.to(dtype), "absolute")
    assert found.lmn == pytest.approx(lmn_of(w), rel=1e-4 if dtype == torch.float32 else 1e-6)
    share = np.abs(w[w < 0]).sum() / np.abs(w).sum()
    assert found.negative_share == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_eigenvalues_that_no_krylov_space_shows_are_seen_by_their_growth(dtype):
    """Of 300 equal eigenvalues a space of blocks of 16 vectors finds 16; in the identity it is all of the space."""
    low, high = _krylov.of_matrix(torch.eye(600, dtype=dtype), "absolute").interval()
    assert low * (1 - 1e-9) <= 600 <= high * (1 + 1e-9)


def clusters(multiplicity, bulk):
    """Eight eigenvalues, each with a multiplicity above that of a block of vectors, and normal others."""
    normal = np.random.default_rng(1).standard_normal(640 - 8 * multiplicity)
    return torch.from_numpy(
        np.concatenate([np.repeat([30.0, -24, 19, -15, 12, -9, 7, 5], multiplicity), bulk * normal])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("multiplicity, bulk", [(18, 0.05), (20, 0.05), (40, 0.05), (20, 0.0)])
def test_more_equal_eigenvalues_than_a_block_has_vectors_are_deflated(multiplicity, bulk, dtype):
    """If they were not, the interval would have to hold them, and the others in it would need degree 4096."""
    w = clusters(multiplicity, bulk)
    found = _krylov.of_matrix(w.diag().to(dtype), "absolute")
    assert found.degree < 1000 and found.products < 15_000
    low, high = found.interval()
    assert low <= lmn_of(w.to(dtype).double().numpy()) <= high < 1.02 * low


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_krylov_space_may_end_in_some_of_its_columns(dtype):
    """Of 30 equal eigenvalues two blocks of 16 vectors see all, and the last two columns are rounding."""
    w = torch.where(torch.arange(300) < 30, 1.0, -1.0).to(torch.float64)
    basis = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(0), dtype=w.dtype))[
        0
    ]
    L = (basis * w) @ basis.T
    found = _krylov.of_matrix(((L + L.T) / 2).to(dtype), "clip")
    assert found.lmn == pytest.approx(30, rel=1e-5)


def test_vectors_of_the_dtype_are_multiplied_and_counted():
    seen = []
    values = torch.rand(300, dtype=torch.float64) + 0.5

    def product(v):
        seen.append((v.dtype, v.shape[1]))
        return values.to(v.dtype)[:, None] * v

    options = {"squares": float(values.square().sum()), "trace": float(values.sum()), "dimension": 40}
    found = estimate(product, 300, **options)
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert found.products == sum(width for _, width in seen)
    assert float(found) == found.lmn == pytest.approx(2**found.complexity_bits)


def test_the_same_generator_gives_the_same_bits():
    w = SPECTRA["one large, normal bulk"]
    first, again, other = run(w, 3), run(w, 3), run(w, 4)
    assert (first.lmn, first.bound, first.standard_error) == (again.lmn, again.bound, again.standard_error)
    assert first.lmn != other.lmn


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_students_quantiles(level):
    assert student(level) == pytest.approx(stats.t.ppf((1 + level) / 2, 29), rel=1e-4)
    assert student(level, 200) == pytest.approx(stats.t.ppf((1 + level) / 2, 200), rel=1e-6)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)).requires_grad_(False)
    return f, torch.randn(600, 8)


@pytest.fixture(scope="module")
def measured(network):
    return lmnfast.measure(*network, points=7, rule="lobatto", solver="estimate")


def test_a_measurement_has_the_estimate_and_its_errors(network, measured):
    dense = lmnfast.measure(*network, points=7, rule="lobatto")
    assert measured.solver == "krylov-chebyshev" and dense.solver == "cpu"
    low, high = measured.interval()
    assert low < dense.lmn < high < 1.025 * low
    assert low < measured.interval(0.5)[0] < measured.lmn < high
    assert measured.standard_error > 0 < measured.bound
    assert measured.negative_share == pytest.approx(dense.negative_share, rel=0.01)
    found = len(measured.eigenvalues)
    assert 5 < found < 600
    assert torch.allclose(measured.eigenvalues[:5], dense.eigenvalues[:5], rtol=1e-5)
    assert torch.equal(measured.connectivity, dense.connectivity)
    assert dense.standard_error == dense.bound == 0 and dense.interval() == (dense.lmn, dense.lmn)
    assert "standard_error" in repr(measured) and "standard_error" not in repr(dense)
    assert "bound" in measured._repr_html_() and "bound" not in dense._repr_html_()


def test_an_estimate_is_kept_and_compared(measured, tmp_path):
    measured.save(tmp_path / "m.npz")
    assert lmnfast.Measurement.load(tmp_path / "m.npz") == measured
    assert lmnfast.Measurement(**measured.to_dict() | {"bound": 0.0}) != measured


@pytest.mark.parametrize("power", [-60, -20, 20, 60])
def test_a_matrix_times_a_power_of_two_has_the_same_estimate_to_the_bit(power, measured):
    found = _krylov.of_matrix(measured.connectivity * 2.0**power, "absolute")
    for name in ("lmn", "complexity_bits", "standard_error", "bound", "negative_share"):
        assert getattr(found, name) == getattr(measured, name)
    assert torch.equal(found.eigenvalues, measured.eigenvalues * 2.0**power)


@pytest.mark.parametrize(
    "dtype, close, factors",
    [(torch.float32, 1e-5, (1e7, 1e-7, 1e30, 1e-30)), (torch.float64, 1e-9, (1e7, 1e200, 1e-200))],
)
def test_an_lmn_has_no_scale(dtype, close, factors, measured):
    L = measured.connectivity.to(dtype)
    first = _krylov.of_matrix(L, "absolute")
    for factor in factors:
        found = _krylov.of_matrix(L * factor, "absolute")
        assert found.lmn == pytest.approx(first.lmn, rel=close)
        assert found.interval() == pytest.approx(first.interval(), rel=close)
        assert torch.allclose(found.eigenvalues, first.eigenvalues * factor, rtol=close, atol=0)


def test_numbers_by_the_estimate_are_those_of_the_measurement(network, measured):
    before = torch.get_rng_state()
    assert float(lmnfast.lmn(*network, points=7, rule="lobatto", solver="estimate")) == measured.lmn
    assert torch.equal(torch.get_rng_state(), before)
    L = measured.connectivity
    number = lmnfast.linear_mapping_number(L, solver="estimate")
    assert number.dtype == torch.float64 and float(number) == pytest.approx(measured.lmn, rel=1e-12)
    bits = lmnfast.nonlinear_complexity(L, negative="clip", solver="estimate")
    assert float(bits) == pytest.approx(float(lmnfast.nonlinear_complexity(L, negative="clip")), abs=0.02)


def test_under_a_low_precision_of_products_the_estimate_is_in_float64(measured):
    L = measured.connectivity
    expected = lmnfast.linear_mapping_number(L.double(), solver="estimate")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = lmnfast.linear_mapping_number(L, solver="estimate")
    finally:
        torch.set_float32_matmul_precision(before)
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_a_bar_above_the_tolerance_is_said(measured, monkeypatch):
    monkeypatch.setattr(_krylov, "MOST_DEGREE", 48)
    with pytest.warns(UserWarning, match="solver: the estimated LMN of .* may be up to .* %|from its value"):
        lmnfast.linear_mapping_number(measured.connectivity, solver="estimate")


WRONG = [
    (
        {"product": lambda v: v[:-1]},
        ValueError,
        r"product: expected a tensor of shape \(100, 16\), got \(99, 16\)",
    ),
    ({"product": lambda v: None}, ValueError, "product: expected a tensor of shape .* NoneType"),
    ({"product": lambda v: v * float("nan")}, ValueError, "product: expected finite values"),
    (
        {"product": lambda v: v.roll(1, 0)},
        ValueError,
        "product: expected the products of a symmetric matrix",
    ),
    ({"squares": 10.0}, ValueError, "squares: expected the sum of the squares of all entries, got 10"),
    ({"squares": 0.0}, ValueError, "squares: expected a finite sum"),
    ({"squares": 1e210}, ValueError, "squares: expected a finite sum"),
    ({"trace": math.nan}, ValueError, "trace: expected a finite number"),
    ({"samples": 0}, ValueError, "samples: expected at least 1"),
    ({"tolerance": 0.0}, ValueError, "tolerance: expected a share"),
    ({"dimension": 101}, ValueError, "dimension: expected 1 to 100"),
    (
        {"like": torch.empty(0, dtype=torch.int64)},
        TypeError,
        "like: expected a tensor of float32 or float64",
    ),
    ({"negative": "drop"}, ValueError, "negative: expected one of absolute, clip"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG)
def test_wrong_arguments_of_the_core(wrong, error, message):
    right = {"product": lambda v: v, "samples": 100, "squares": 100.0}
    with pytest.raises(error, match=message):
        estimate(**right | wrong)


@pytest.mark.parametrize("call", [lmnfast.measure, lmnfast.lmn])
def test_an_unknown_solver_is_refused_before_any_work(call, network):
    with pytest.raises(ValueError, match="solver: expected one of dense, estimate, got 'krylov'"):
        call(lambda x: pytest.fail("called"), network[1], solver="krylov")


def test_an_estimate_has_no_graph_and_is_of_one_matrix(network):
    f, x = network
    with pytest.raises(ValueError, match="solver: 'estimate' does not go together with differentiable=True"):
        lmnfast.lmn(f, x, differentiable=True, solver="estimate")
    stacked = torch.func.stack_module_state([f, f])
    with pytest.raises(ValueError, match="solver: 'estimate' does not go together with stacked networks"):
        lmnfast.lmn(f, x.expand(2, -1, -1), stacked=stacked, solver="estimate")
    with pytest.raises(
        ValueError, match=r"L: expected one matrix \(N, N\) for solver='estimate', got shape \(2, 3, 3\)"
    ):
        lmnfast.linear_mapping_number(torch.ones(2, 3, 3), solver="estimate")
    with pytest.raises(ValueError, match="sum"):
        lmnfast.linear_mapping_number(torch.zeros(3, 3), solver="estimate")


def test_too_many_samples_for_the_dense_solver_are_refused_before_any_work(network, monkeypatch):
    f, x = network
    monkeypatch.setattr(_eigenvalues, "available", lambda device: 16 * 599**2)
    monkeypatch.setattr(_eigenvalues, "LARGE", 500)
    message = "solver: 'dense' needs 5.76 MB of memory for N = 600, and 5.74 MB are free on cpu; expected solver 'estimate'"
    for call in (lmnfast.measure, lmnfast.lmn):
        with pytest.raises(ValueError, match=message):
            call(lambda x: pytest.fail("called"), x)
    with pytest.raises(ValueError, match=message):
        lmnfast.linear_mapping_number(torch.eye(600))
    assert lmnfast.measure(f, x[:599], points=3).samples == 599
    assert lmnfast.measure(f, x, points=3, solver="estimate").samples == 600


def test_tiles_of_a_folder_are_estimated(network, tmp_path, measured):
    lmnfast.tiles(*network, tmp_path / "tiles", points=7, rule="lobatto")
    assert lmnfast.solve(tmp_path / "tiles", solver="estimate", device="cpu") == measured


@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("n", [300, 640])
def test_a_matrix_near_ones_has_its_lmn(n, size):
    u = size * torch.rand(n, n, generator=torch.Generator().manual_seed(0)).triu(1)
    L = 1 - u - u.T  # float32
    exact = lmn_of(np.linalg.eigvalsh(L.numpy().astype(float)))
    found = _krylov.of_matrix(L, "absolute")
    low, high = found.interval()
    assert low <= exact <= high and found.lmn >= 1 and found.lmn - 1 == pytest.approx(exact - 1, rel=0.1)


@pytest.mark.parametrize("seed", [1, 24, 28, 34])
def test_a_matrix_near_ones_with_few_other_entries_has_its_lmn(seed):
    """Beside an eigenvalue of about N, which is known, a second Krylov space has little but rounding."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.zeros(300, 300)
    u.view(-1)[torch.randint(90_000, (120,), generator=generator)] = 0.01 * torch.rand(
        120, generator=generator
    )
    L = 1 - (u + u.T).fill_diagonal_(0)
    exact = lmn_of(np.linalg.eigvalsh(L.numpy().astype(float)))
    low, high = _krylov.of_matrix(L, "absolute").interval()
    assert low <= exact <= high


def test_an_interval_has_no_lmn_below_1_or_above_n():
    assert _krylov.interval(1.0, 0.01, 0.01, 0.95)[0] == 1 < _krylov.interval(1.0, 0.01, 0.01, 0.95)[1]
    low, high = _krylov.interval(599.0, 1.0, 2.0, 0.95, 600)
    assert 590 < low < 599 and high == 600
    assert _krylov.interval(2.0, 1e9, 0.0, 0.95, 600) == (1, 600)
    assert _krylov.interval(1 - 1e-12, 0.0, 0.0, 0.95, 600) == (1 - 1e-12, 1 - 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-3])
def test_an_estimate_is_no_lmn_above_n(size, dtype):
    """Near as many equal magnitudes as samples the error of the polynomials would lead there."""
    w = np.sign(np.arange(N) - N / 2 + 0.5) * (1 + size * np.random.default_rng(0).standard_normal(N))
    found = _krylov.of_matrix(torch.from_numpy(w).diag().to(dtype), "absolute")
    low, high = found.interval()
    assert low <= lmn_of(w) <= high == N and found.lmn <= N and found.complexity_bits <= math.log2(N)


def test_what_a_product_rounds_within_the_deflated_span_is_in_the_bound():
    """If all is deflated there is no other error."""
    for seed in range(20):
        x = torch.randn(100, 100, generator=torch.Generator().manual_seed(seed))
        L = x @ x.T / 100
        L = (L + L.T) / 2
        low, high = _krylov.of_matrix(L, "absolute").interval()
        assert low <= lmn_of(np.linalg.eigvalsh(L.double().numpy())) <= high < (1 + 1e-4) * low
