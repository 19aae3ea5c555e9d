import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import lmnfast
from lmnfast import _eigenvalues, reference
from lmnfast._enqueue import Enqueued
from lmnfast._settings import DEFAULT
from lmnfast.ops.path_connectivity import ChainConnectivity
from lmnfast.spectrum import Measurement, measurement

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def symmetric(*shape, seed=0):
    A = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (A + A.mT) / 2


def enqueued(L):
    return Enqueued(ChainConnectivity(L, torch.zeros(2, dtype=torch.int64), lambda: None), "highest", 1)


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


@pytest.mark.parametrize("negative", _eigenvalues.NEGATIVE)
def test_numbers_by_either_convention_are_the_definitions(negative, dtype):
    A = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0), dtype=dtype)
    L = A + A.mT
    ours = lmnfast.linear_mapping_number(L, negative=negative)
    assert torch.allclose(ours, reference.linear_mapping_number(L, negative), rtol=1e-12, atol=0)
    assert torch.equal(ours, torch.exp2(lmnfast.nonlinear_complexity(L, negative=negative)))


def test_clipped_negative_eigenvalues_count_nothing():
    L = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # 3 and -1
    assert lmnfast.linear_mapping_number(L, negative="clip").item() == pytest.approx(1, abs=1e-12)
    assert lmnfast.linear_mapping_number(L).item() > 1.7


def test_a_number_of_nothing_is_refused():
    for L in (torch.zeros(3, 3), torch.stack([torch.eye(3), torch.zeros(3, 3)])):
        with pytest.raises(
            ValueError,
            match="L: expected eigenvalues whose magnitudes have a finite sum above 0, got a sum of 0",
        ):
            lmnfast.linear_mapping_number(L)
    with pytest.raises(ValueError, match=r"got a sum of 0.0 \(negative='clip'\)"):
        lmnfast.linear_mapping_number(-torch.eye(3), negative="clip")
    with pytest.raises(ValueError, match="got a sum of inf"):
        lmnfast.nonlinear_complexity(torch.eye(3, dtype=torch.float64) * 1e308)


def test_an_unknown_convention_is_refused_before_the_work():
    def f(x):
        raise AssertionError

    x, message = torch.randn(4, 3), "negative: expected one of absolute, clip, got 'drop'"
    for call in (
        lambda: lmnfast.lmn(f, x, negative="drop"),
        lambda: lmnfast.measure(f, x, negative="drop"),
        lambda: lmnfast.nonlinear_complexity(torch.eye(3), negative="drop"),
        lambda: lmnfast.linear_mapping_number(torch.eye(3), negative="drop"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("method", ["path", "hermite", "hermite-midpoint", "jacobian"])
def test_two_points_are_refused_by_every_number(method):
    f, x = nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 3)), torch.randn(20, 4)
    for number in (lmnfast.lmn, lmnfast.measure, lmnfast.connectivity):
        for points in (2, 1, 0, -3):
            with pytest.raises(ValueError, match="points: expected at least 3"):
                number(f, x, method=method, points=points)


def tail_and_samples(seed=0, outputs=3, n=30):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.SiLU(), nn.Linear(20, outputs)), 3 * torch.randn(n, 6)


def test_lmn_measure_and_the_matrix_agree_on_clipping():
    f, x = tail_and_samples()
    m = lmnfast.measure(f, x, negative="clip")
    assert m.negative == "clip" and m.lmn == lmnfast.lmn(f, x, negative="clip").item()
    assert m.lmn == pytest.approx(
        lmnfast.linear_mapping_number(m.connectivity, negative="clip").item(), rel=1e-12
    )
    w = m.eigenvalues
    assert m.negative_share == pytest.approx(float(-w[w < 0].sum() / w.abs().sum()), rel=1e-12)
    assert m.negative_share == lmnfast.measure(f, x).negative_share > 0
    state = torch.func.stack_module_state([f, f])
    both = lmnfast.lmn(f, x.expand(2, *x.shape), stacked=state, negative="clip")
    assert both.tolist() == pytest.approx([m.lmn, m.lmn], rel=1e-12)


def test_the_dict_of_a_measurement_is_read_by_torch_load(tmp_path):
    m = lmnfast.measure(*tail_and_samples())
    torch.save(m.to_dict(), tmp_path / "measurement.pt")
    read = Measurement(**torch.load(tmp_path / "measurement.pt", weights_only=True))
    assert read == m and hash(read) == hash(m) and repr(read) == repr(m)
    assert float(m) == m.lmn
    assert {type(value) for value in m.to_dict().values()} == {float, int, str, dict, torch.Tensor}


def test_measurements_are_equal_where_all_their_values_are():
    m = lmnfast.measure(*tail_and_samples())
    L = m.connectivity.clone()
    L[0, 1] += 1e-3
    assert m == replace(m, connectivity=m.connectivity.clone())
    others = {"lmn": 2.0, "rule": "lobatto", "connectivity": L, "eigenvalues": m.eigenvalues[1:]}
    assert all(m != replace(m, **{name: value}) for name, value in others.items())
    assert m != replace(m, connectivity=m.connectivity.double()) and m != m.lmn


def test_the_precision_is_that_of_the_work(precision):
    f, x = tail_and_samples()
    precision("medium")
    assert lmnfast.measure(f, x).precision == "highest"  # the fused kernel on the CPU
    assert lmnfast.measure(lambda t: f(t), x).precision == "medium"  # torch's own products
    assert lmnfast.measure(f.double(), x.double()).precision == "float64"
    assert lmnfast.measure(lambda t: f(t), x.double()).precision == "float64"
    f = f.bfloat16()
    assert lmnfast.measure(f, x.bfloat16()).precision == "highest"  # widened for the fused kernel
    assert lmnfast.measure(lambda t: f(t), x.bfloat16()).precision == "bfloat16"
    f = f.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert lmnfast.measure(lambda t: f(t), x).precision == "bfloat16"


@pytest.mark.parametrize("points", [np.int64(9), np.int32(9), torch.tensor(9)])
def test_points_of_any_integer_type_are_kept_as_an_int(points):
    m = lmnfast.measure(*tail_and_samples(), points=points, rule="lobatto")
    assert type(m.points) is int and m == lmnfast.measure(*tail_and_samples(), points=9, rule="lobatto")


# Outputs that are constant to rounding


def test_an_offset_in_float32_is_warned_of_and_in_float64_is_none():
    f, x = tail_and_samples()
    with pytest.warns(UserWarning, match="% of the outputs' paths .* constant to rounding"):
        m = lmnfast.measure(lambda t: f(t) + 1e5, x)
    assert 0.01 < m.constant_share < 1
    f, x = f.double(), x.double()
    exact = lmnfast.measure(lambda t: f(t) + 1e5, x)
    assert exact.constant_share == 0 and exact.lmn == pytest.approx(lmnfast.lmn(f, x).item(), rel=1e-6)


@pytest.fixture
def counted(monkeypatch):
    """Sets how many pairs, over all outputs, the kernels count as constant."""

    def count(pairs):
        monkeypatch.setattr(Enqueued, "constants", property(lambda _: pairs))

    return count


PUBLIC = (lmnfast.lmn, lmnfast.measure, lmnfast.connectivity)


@pytest.mark.parametrize("public", PUBLIC)
def test_an_offset_that_hides_outputs_is_warned_of_once(public, counted):
    f, x = tail_and_samples(outputs=4)
    counted(174)  # of 435 pairs and 4 outputs
    with pytest.warns(UserWarning) as said:
        public(lambda t: f(t) + 1e4, x)
    (warning,) = said
    assert warning.filename == __file__
    assert re.match(
        r"f: 10.0% of the outputs' paths .* constant to rounding .* some outputs are \d.\de\+03 times as large as their "
        r"range .* float64, or subtract it",
        str(warning.message),
    )


def test_stacked_networks_with_an_offset_warn_once_together(counted):
    x = tail_and_samples()[1]
    f = nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.SiLU(), nn.Linear(20, 3))  # no chain
    with torch.no_grad():
        f[3].bias += 1e4
    counted(500)
    with pytest.warns(UserWarning, match="38.3% of the outputs' paths") as said:
        lmnfast.lmn(f, x.expand(2, *x.shape), stacked=torch.func.stack_module_state([f, f]))
    assert len(said) == 1


@pytest.mark.parametrize(
    "offset, pairs",
    [
        (0.0, 1000),  # dead or saturated units: constant by right
        (100.0, 1000),  # rounding hides nothing of an offset so small
        (1e4, 2),  # fewer than two of a thousand
    ],
)
def test_outputs_that_are_constant_by_right_are_no_matter_for_a_warning(offset, pairs, counted):
    f, x = tail_and_samples()
    counted(pairs)
    m = lmnfast.measure(lambda t: f(t) + offset, x)  # warnings are errors here
    assert m.constant_share == pairs / (435 * 3) and m.outputs == 3


def test_the_last_bias_of_a_chain_is_no_offset(counted):
    f, x = tail_and_samples()
    with torch.no_grad():
        f[2].bias += 1e4
    counted(500)
    assert lmnfast.measure(f, x).lmn == pytest.approx(lmnfast.lmn(*tail_and_samples()).item(), rel=1e-4)
    with torch.no_grad():
        f[2].weight[0] = 0  # a dead output, which is its bias
    lmnfast.measure(f, x)


def test_outputs_that_an_offset_has_made_all_the_same_are_warned_of(counted):
    f, x = tail_and_samples()
    counted(435 * 3)
    with pytest.warns(UserWarning, match="100.0% .* some outputs are the same large value for all samples"):
        m = lmnfast.measure(lambda t: f(t) + 1e9, x)
    assert m.lmn == pytest.approx(1) and m.constant_share == 1
    lmnfast.measure(lambda t: f(t) * 0 + 1, x)  # a dead or saturated unit, which a warning is not for


def test_one_sample_and_jacobians_have_no_constant_paths():
    f, x = tail_and_samples()
    assert lmnfast.measure(f, x[:1]).constant_share == 0
    assert lmnfast.measure(f, x, method="jacobian").constant_share == 0


def test_a_measurement_carries_what_its_value_depends_on():
    torch.manual_seed(0)
    f, x = nn.Sequential(nn.Linear(6, 20), nn.SiLU(), nn.Linear(20, 3)), 3 * torch.randn(30, 6)
    m = lmnfast.measure(f, x, points=9, rule="lobatto")
    assert (m.samples, m.outputs, m.points, m.rule, m.method) == (30, 3, 9, "lobatto", "path")
    assert (m.precision, m.solver, m.negative, m.constant_share) == ("highest", "cpu", "absolute", 0)
    assert torch.equal(m.connectivity, lmnfast.connectivity(f, x, points=9, rule="lobatto"))
    assert torch.equal(m.eigenvalues, lmnfast.eigenvalues(m.connectivity))
    assert m.lmn == pytest.approx(2**m.complexity_bits, rel=1e-12)
    assert m.lmn == lmnfast.lmn(f, x, points=9, rule="lobatto").item() != lmnfast.lmn(f, x).item()
    assert 1 < m.lmn < 30 and "lmn=" in repr(m) and "tensor" not in repr(m)
    assert (
        "precision='highest', solver='cpu', negative='absolute', constant_share=0, negative_share=0.14"
        in repr(m)
    )
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
@pytest.mark.parametrize("solver", _eigenvalues.SOLVERS)
@pytest.mark.parametrize("shape", [(30, 30), (3, 30, 30)])
def test_solvers_agree_and_the_result_is_on_the_matrix_device(solver, shape, dtype):
    L = symmetric(*shape).to(dtype)
    values = lmnfast.eigenvalues(L.cuda(), solver=solver)
    assert values.device.type == "cuda" and values.dtype == torch.float64
    assert torch.allclose(values.abs().cpu(), lmnfast.eigenvalues(L).abs(), rtol=0, atol=1e-12)


@CUDA
def test_the_card_solves_its_own_matrices_and_is_named():
    for n in (1, 7, 300):
        L = symmetric(n, n)
        m = measurement(enqueued(L.cuda()), DEFAULT)
        assert m.solver == "cuda" and m.eigenvalues.device.type == "cuda"
        assert m.lmn == pytest.approx(lmnfast.linear_mapping_number(L).item(), rel=1e-9)


def test_the_emulated_kernel_gives_what_lapack_gives_and_what_it_gives_up_is_solved_again(
    emulated, monkeypatch
):
    for n in (1, 7, 60):
        L = symmetric(n, n)
        expected = lmnfast.eigenvalues(L)
        m = measurement(enqueued(L), DEFAULT)
        assert m.solver == "cuda" and m.lmn == pytest.approx(
            lmnfast.linear_mapping_number(L).item(), rel=1e-9
        )
        assert torch.allclose(m.eigenvalues.abs(), expected.abs(), rtol=0, atol=1e-11)
        share = expected.clamp(max=0).abs().sum() / expected.abs().sum()
        assert m.negative_share == pytest.approx(share.item(), abs=1e-9)
    solve, calls = _eigenvalues.ops.symmetric_eigenvalues, []

    def gives_up_once(matrices):
        calls.append(matrices)
        return solve(matrices) * (torch.nan if len(calls) == 1 else 1)

    monkeypatch.setattr(_eigenvalues.ops, "symmetric_eigenvalues", gives_up_once)
    again = measurement(enqueued(L), DEFAULT)
    assert len(calls) == 2 and again.solver == "cpu" and again.lmn == pytest.approx(m.lmn, rel=1e-9)


def test_a_spectrum_of_which_nothing_is_left_is_refused_by_the_emulated_kernel_too(emulated):
    L = -torch.eye(5)
    assert measurement(enqueued(L), DEFAULT).lmn == pytest.approx(5)
    with pytest.raises(ValueError, match="all 0 have no shares"):
        measurement(enqueued(L), DEFAULT, "clip")


def in_place_of_the_kernel(monkeypatch, kernel):
    """kernel(matrices) or None: none fits."""
    module = sys.modules["lmnfast.ops.symmetric_eigenvalues"]
    if kernel is None:
        monkeypatch.setattr(module, "_workspace_bytes", lambda matrices: 0)
    else:
        monkeypatch.setattr(_eigenvalues.ops, "symmetric_eigenvalues", kernel)


@CUDA
@pytest.mark.parametrize("given_up", [False, True])
def test_where_the_kernel_does_not_solve_cusolver_does_and_is_named(given_up, monkeypatch):
    L = symmetric(9, 9).cuda()
    expected = lmnfast.eigenvalues(L)
    in_place_of_the_kernel(monkeypatch, (lambda L: expected * torch.nan) if given_up else None)
    m = measurement(enqueued(L), DEFAULT)
    assert m.solver == "cusolver" and torch.allclose(m.eigenvalues, expected, rtol=0, atol=1e-12)


@CUDA
def test_where_the_card_fails_the_cpu_solves_and_is_named(monkeypatch):
    solve, L = torch.linalg.eigvalsh, symmetric(9, 9).cuda()
    calls = []

    def failing(L):
        calls.append(L.device.type)
        if L.is_cuda:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(L)

    in_place_of_the_kernel(monkeypatch, None)
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    m = measurement(enqueued(L), DEFAULT)
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
        (np.eye(3), TypeError, r"L: .* got a numpy array; torch.from_numpy\(L\) is one"),
        (torch.ones(3, 4), ValueError, r"L: expected square matrices .* got shape \(3, 4\)"),
        (torch.ones(0, 0), ValueError, "L: expected square"),
        (torch.ones(5), ValueError, "L: expected square"),
        (torch.full((2, 2), float("nan")), ValueError, "L: expected finite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), ValueError, "L: expected a symmetric matrix"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]) * 1e-6, ValueError, "L: expected a symmetric matrix"),
        (
            torch.stack([torch.eye(600), torch.eye(600).roll(1, 1)]),
            ValueError,
            "L: expected a symmetric matrix",
        ),
    ],
)
def test_what_is_no_connectivity_matrix_is_refused(L, error, message):
    for measure in (lmnfast.eigenvalues, lmnfast.nonlinear_complexity, lmnfast.linear_mapping_number):
        with pytest.raises(error, match=message):
            measure(L)


@pytest.mark.parametrize("i, j", [(0, 1), (0, 599), (255, 256), (598, 599), (300, 310)])
def test_one_entry_that_differs_from_its_mirror_image_is_found(i, j):
    L = torch.ones(600, 600)
    L[i, j] = 0.99
    with pytest.raises(ValueError, match="L: expected a symmetric matrix"):
        lmnfast.eigenvalues(L)


def test_a_matrix_that_the_package_made_is_not_checked_again(monkeypatch):
    f, x = tail_and_samples()
    monkeypatch.setattr(_eigenvalues, "check_matrix", None)
    assert lmnfast.lmn(f, x).item() == lmnfast.measure(f, x).lmn
