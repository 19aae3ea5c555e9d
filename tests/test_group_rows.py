"""Rows of a matrix that processes share: products, estimates, and one error on all."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from support import COMPILED, samples
from tiled import FEW, network

import lmnfast


def rows(rank):
    f, x = network(), samples(500, 6)
    kept = lmnfast.connectivity(f, x, **FEW, group=dist.group.WORLD, gather=False)
    V = samples(500, 2, dtype=torch.float64)
    try:
        kept.product(V[1:])
    except ValueError as error:
        said = str(error)
    one = lmnfast.connectivity(f, x[:1], **FEW, group=dist.group.WORLD, gather=False)
    assert float(one.product(torch.ones(1, 1))) == 1.0  # one process holds the row
    with pytest.raises(TypeError, match="V: expected floating-point numbers, got torch.int64"):
        one.product(torch.ones(1, 1, dtype=torch.int64))
    return kept.first, kept.values, kept.samples, kept.product(V), kept.product(V.float()), said


@COMPILED
def test_each_process_keeps_some_rows(tmp_path):
    L = lmnfast.connectivity(network(), samples(500, 6), **FEW)
    V = samples(500, 2, dtype=torch.float64)
    at = 0
    for first, values, n, wide, narrow, said in on_ranks(3, rows, tmp_path):
        assert first == at and n == 500 and len(values) in (166, 167)
        assert torch.equal(values, L[first : first + len(values)])
        torch.testing.assert_close(wide, L.double() @ V, rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(narrow, L @ V.float(), rtol=1e-4, atol=1e-3)
        assert said == "V: expected (500, vectors), got shape (499, 2)"
        at += len(values)
    assert at == 500


def estimates(rank):
    world, f = dist.group.WORLD, network()
    x = samples(420, 6)
    rows = lmnfast.connectivity(f, x, **FEW, group=world, gather=False)
    V = samples(420, 20)
    near = lmnfast.connectivity(f, 1e-3 * x, **FEW, group=world, gather=False)
    return {
        "product": rows.product(V),
        "estimate": rows.estimate(),
        "clipped": rows.estimate(negative="clip"),
        "near a linear map": near.estimate(),
        "lmn": lmnfast.lmn(f, x, **FEW, group=world, solver="estimate"),
        "double": lmnfast.lmn(f.double(), x.double(), **FEW, group=world, solver="estimate"),
    }


@COMPILED
def test_an_estimate_of_rows_has_the_same_bits_for_any_number_of_processes(tmp_path):
    (one,) = on_ranks(1, estimates, tmp_path)
    for of_rank in on_ranks(3, estimates, tmp_path):
        assert not isinstance(of_rank, Exception), of_rank
        assert torch.equal(of_rank["product"], one["product"])
        for name in ("estimate", "clipped", "near a linear map"):
            mine, other = dict(vars(of_rank[name])), dict(vars(one[name]))
            assert torch.equal(mine.pop("eigenvalues"), other.pop("eigenvalues")) and mine == other
        assert (of_rank["lmn"], of_rank["double"]) == (one["lmn"], one["double"])
    f, x = network(), samples(420, 6)
    for name, z, how in (
        ("estimate", x, {}),
        ("clipped", x, {"negative": "clip"}),
        ("near a linear map", 1e-3 * x, {}),
    ):
        low, high = one[name].interval()
        assert low <= lmnfast.lmn(f, z, **FEW, **how) <= high < 1.03 * low
    assert one["lmn"] == one["estimate"].lmn and one["lmn"].dtype == torch.float64
    assert float(one["double"]) == pytest.approx(one["estimate"].lmn, rel=0.01)


def failing_estimate(rank):
    rows = lmnfast.connectivity(network(), samples(420, 6), **FEW, group=dist.group.WORLD, gather=False)
    said = []
    if rank == 1:
        rows.values[3, 4] = torch.nan
    for negative in ("none" if rank else "clip", "clip"):
        try:
            rows.estimate(negative=negative)
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_an_estimate_that_fails_on_one_process_ends_on_all(tmp_path):
    first, second = on_ranks(2, failing_estimate, tmp_path)
    assert first[0] == f"group: another process failed, rank 1: ValueError: {second[0]}"
    assert second[0].startswith("negative: expected one of")
    assert "expected a finite sum of squares" in first[1]
    assert second[1] == f"group: another process failed, rank 0: ValueError: {first[1]}"


def mixed_rows(rank):
    """What one process has otherwise: the matrix, an argument, the call, autocast, a graph."""
    f, x, world = network(), samples(300, 6), dist.group.WORLD
    one = lmnfast.connectivity(f, x, **FEW, group=world, gather=False)
    two = lmnfast.connectivity(f, x + 1, **FEW, group=world, gather=False)
    V = samples(300, 4)
    said = {}

    def note(name, call):
        try:
            said[name] = call()
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    mine = two if rank else one
    note("product of two", lambda: mine.product(V))
    note("estimate of two", lambda: mine.estimate())
    note("negative", lambda: one.estimate(negative="clip" if rank else "absolute"))
    note("calls", lambda: one.product(V) if rank else lmnfast.lmn(f, x, **FEW, group=world))
    note("more calls", lambda: one.estimate() if rank else one.product(V))
    with torch.autocast("cpu", torch.bfloat16, enabled=rank == 1):
        note("autocast", lambda: one.product(V))
        note("estimate", lambda: one.estimate().lmn)
    note("graph", lambda: one.product(V.clone().requires_grad_()).requires_grad)
    note("last", lambda: one.product(V))
    return said


@COMPILED
def test_rows_are_of_one_matrix_and_for_one_call(tmp_path):
    L = lmnfast.connectivity(network(), samples(300, 6), **FEW)
    for said in on_ranks(2, mixed_rows, tmp_path):
        for name in ("product of two", "estimate of two"):
            expected = "rows: expected those of one matrix, got others on rank 1 than on rank 0"
            assert said[name] == f"ValueError: {expected}"
        assert said["negative"] == (
            "ValueError: negative: expected the same on all ranks, got 'clip' on rank 1 and 'absolute' on rank 0"
        )
        assert said["calls"] == (
            "RuntimeError: group: expected the same calls on all ranks, got a product of rows on rank 1 and a beginning of a "
            "measurement on rank 0"
        )
        assert (
            "got a beginning of an estimate on rank 1 and a product of rows on rank 0" in said["more calls"]
        )
        assert torch.equal(said["autocast"], said["last"]) and said["graph"] is False
        torch.testing.assert_close(said["last"], L @ samples(300, 4), rtol=1e-4, atol=1e-3)
        assert said["estimate"] == pytest.approx(float(lmnfast.linear_mapping_number(L)), rel=0.01)


def warned_on_one(rank):
    """A warning that is an error on one process comes behind the last exchange."""
    net, x, world = network(), samples(300, 6), dist.group.WORLD
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rank else "ignore")
        try:
            said.append(lmnfast.lmn(lambda z: net(z) * 1e-4 + 1e4, x, **FEW, group=world, solver="estimate"))
        except UserWarning as warning:
            said.append(str(warning))
    return [*said, lmnfast.lmn(net, x, **FEW, group=world, solver="estimate")]


@COMPILED
def test_warnings_as_errors_leave_the_group_in_step(tmp_path):
    first, second = on_ranks(2, warned_on_one, tmp_path)
    assert "constant to rounding" in second[0] and first[0] > 1
    assert (
        first[1]
        == second[1]
        == pytest.approx(float(lmnfast.lmn(network(), samples(300, 6), **FEW)), rel=0.01)
    )


def with_an_offset(rank):
    f, x, said = network(), samples(60, 6), []
    for gather in (False, True):
        with pytest.warns(UserWarning, match="constant to rounding") as warned:
            lmnfast.connectivity(lambda z: f(z) * 1e-4 + 1e4, x, **FEW, group=dist.group.WORLD, gather=gather)
        said += [str(warning.message) for warning in warned]
    return said


def test_rows_warn_of_an_offset_as_the_matrix_does(tmp_path):
    for of_rank in on_ranks(2, with_an_offset, tmp_path):
        rows, matrix = of_rank
        assert rows == matrix
