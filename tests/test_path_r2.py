"""The generic route's reduction against the float64 reference."""

import pytest
import torch
from chains import RULES_THAT_DO_NOT_FIT, STATISTICS, assert_refused

from lmnfast import _native, ops, reference
from lmnfast._settings import PLAIN
from lmnfast.quadrature import path_nodes

LANES = 16


def problem(pairs, outputs, rule=("uniform", 21), seed=0, samples=6):
    """Smooth curves with a chord: interior, ends, first, second, nodes, weights; float64."""
    g = torch.Generator().manual_seed(seed)
    nodes, weights = path_nodes(*rule)
    ends = torch.randn(samples, outputs, generator=g, dtype=torch.float64)
    first, second = (torch.randint(samples, (pairs,), generator=g) for _ in range(2))
    t = nodes[1:-1, None]
    bend = torch.randn(pairs, 1, outputs, generator=g, dtype=torch.float64)
    interior = torch.lerp(ends[first][:, None], ends[second][:, None], t) + bend * t * (1 - t) * (2 - t)
    return interior, ends, first, second, nodes, weights


def on(device, dtype, arguments):
    """Arguments as the op takes them: outputs and indices on the device, the rule in float64 on the CPU."""
    interior, ends, first, second, *rule = arguments
    return interior.to(device, dtype), ends.to(device, dtype), first.to(device), second.to(device), *rule


def assert_right(arguments, device, dtype, statistic=PLAIN):
    interior, ends, *rest = arguments
    options = statistic._asdict()
    truth = reference.path_r2(*arguments, **options)
    ours = ops.path_r2(*on(device, dtype, arguments), **options)
    assert ours.dtype == dtype and ours.shape == truth.shape and ours.device.type == device.type
    if truth.numel() == 0:
        return
    # Twice what PyTorch loses, which in float64 is the truth itself, and a few roundings: outputs vary as much as they
    # are large.
    plain = reference.path_r2(interior.to(dtype), ends.to(dtype), *rest, **options)
    allowed = (
        2 * (plain.double() - truth).abs().max()
        + (2 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    )
    assert (ours.cpu().double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("outputs", [1, 2, 3, 7, 8, 9, LANES - 1, LANES, LANES + 1, 31, 32, 33, 100])
@pytest.mark.parametrize("pairs", [0, 1, 2, 15, 16, 17, 50])
def test_any_number_of_pairs_and_outputs(pairs, outputs, device, dtype):
    arguments = problem(pairs, outputs)
    assert_right(arguments, device, dtype)
    if pairs == 50:
        assert reference.path_r2(*arguments).min() < 0.9, "the curves are straight"


@pytest.mark.parametrize(
    "rule", [("uniform", 3), ("uniform", 4), ("uniform", 40), ("lobatto", 4), ("lobatto", 9)]
)
@pytest.mark.parametrize("outputs", [3, 20])
def test_any_nodes_and_weights(rule, outputs, device, dtype):
    assert_right(problem(30, outputs, rule), device, dtype)


@pytest.mark.parametrize("outputs", [1, 5, 40])
def test_constant_outputs_are_exactly_one(outputs, device, dtype):
    interior, ends, *rest = problem(20, outputs)
    interior[:] = 3.25
    ends[:] = 3.25
    rounding = torch.finfo(dtype).eps * 3.25 * torch.randint(-1, 2, interior.shape)
    for y in (interior, interior + rounding):
        assert (ops.path_r2(*on(device, dtype, (y, ends, *rest))) == 1).all()


@pytest.mark.parametrize("outputs", [1, 5, 40])
def test_straight_lines_are_one_and_bumps_without_chord_zero(outputs, device, dtype):
    _, ends, first, second, nodes, weights = problem(20, outputs)
    t = nodes[1:-1, None]
    line = torch.lerp(ends[first][:, None], ends[second][:, None], t)
    r2 = ops.path_r2(*on(device, dtype, (line, ends, first, second, nodes, weights))).cpu()
    assert (r2[first != second] - 1).abs().max() < 1e-6
    bump = (t * (1 - t)).expand(20, -1, outputs)
    r2 = ops.path_r2(*on(device, dtype, (bump, torch.zeros_like(ends), first, second, nodes, weights)))
    assert r2.abs().max() < 1e-6


@pytest.mark.parametrize("outputs", [1, 5, 40])
@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_the_scale_of_the_outputs_does_not_matter(outputs, factor, device):
    interior, ends, *rest = on(device, torch.float32, problem(20, outputs))
    plain = ops.path_r2(interior, ends, *rest)
    assert torch.equal(ops.path_r2(interior * factor, ends * factor, *rest), plain)


@pytest.mark.parametrize("outputs", [1, 4, 40])
def test_integers_agree_to_the_bit_across_devices(outputs, device, dtype):
    """Sums over outputs run in another order in wider vectors: their last bits may differ, r2 itself may not."""
    g = torch.Generator().manual_seed(0)
    nodes = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    weights = torch.tensor([1, 2, 2, 2, 1], dtype=torch.float64) / 8
    first, second = torch.randint(7, (2, 40), generator=g)
    interior = torch.randint(-9, 9, (40, 3, outputs), generator=g)
    ends = 4 * torch.randint(-9, 9, (7, outputs), generator=g)
    arguments = (interior, ends, first, second, nodes, weights)
    ours = ops.path_r2(*on(device, dtype, arguments)).cpu()
    _native._C.use_isa("baseline")  # the fixture puts back what was before
    ulps = 0 if outputs == 1 else 4 * torch.finfo(dtype).eps
    assert (ours - ops.path_r2(*on("cpu", dtype, arguments))).abs().max() <= ulps


@pytest.mark.parametrize("outputs", [110, 257, 1000, 1001])
@pytest.mark.parametrize("pairs", [1, 3])
def test_more_outputs_than_a_block_takes_at_once(pairs, outputs, device, dtype):
    assert_right(problem(pairs, outputs), device, dtype)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("outputs", [1, 2, 5, 16, 33, 130, 300, 301])
def test_stabilised_and_pooled_r2(outputs, statistic, device, dtype):
    """Also of outputs of very different sizes, some of them constant."""
    interior, ends, *rest = problem(20, outputs)
    assert_right((interior, ends, *rest), device, dtype, statistic)
    sizes = torch.logspace(-6, 6, outputs, dtype=torch.float64)
    sizes[outputs // 2 :: 3] = 0
    offset = torch.where(sizes == 0, 1e-3, 0.0)
    assert_right((interior * sizes + offset, ends * sizes + offset, *rest), device, dtype, statistic)


@pytest.mark.parametrize("outputs", [1, 5, 40, 300])
def test_constant_outputs_have_no_part_in_pooled_r2(outputs, device, dtype):
    interior, ends, *rest = problem(20, outputs)
    both = [torch.cat([y, torch.full_like(y, 3.25)], -1) for y in (interior, ends)]
    for stabiliser in (0.0, 0.3):
        options = {"stabiliser": stabiliser, "pooled": True}
        alone = ops.path_r2(*on(device, dtype, (interior, ends, *rest)), **options)
        together = ops.path_r2(*on(device, dtype, (*both, *rest)), **options)
        assert (together - alone).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
        constant = [y[..., outputs:] for y in both]
        assert (ops.path_r2(*on(device, dtype, (*constant, *rest)), **options) == (stabiliser == 0)).all()


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("outputs", [2, 7, 16, 256])
def test_values_that_begin_anywhere(outputs, offset, device, dtype):
    """Sixteen bytes at a time only where the address allows it."""
    interior, ends, *rest = on(device, dtype, problem(20, outputs))
    moved = [
        torch.empty(v.numel() + offset, dtype=dtype, device=device)[offset:].view(v.shape)
        for v in (interior, ends)
    ]
    for to, v in zip(moved, (interior, ends)):
        to.copy_(v)
    difference = ops.path_r2(*moved, *rest) - ops.path_r2(interior, ends, *rest)
    assert difference.abs().max() <= 4 * torch.finfo(dtype).eps


def test_the_same_bits_for_any_thread_count(device, dtype, threads):
    arguments = on(device, dtype, problem(101, 31))
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(ops.path_r2(*arguments))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_nan_in_an_output_is_a_nan_in_its_path_only(device, dtype):
    arguments = problem(20, 5)
    arguments[0][7, 3, 2] = float("nan")
    r2 = ops.path_r2(*on(device, dtype, arguments))
    assert r2.isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_opcheck_of_statistics(statistic, dtype):
    arguments = on("cpu", dtype, problem(9, 5))
    torch.library.opcheck(torch.ops.lmnfast.path_r2.default, arguments, statistic._asdict())


def test_opcheck(dtype):
    arguments = on("cpu", dtype, problem(9, 5))
    torch.library.opcheck(torch.ops.lmnfast.path_r2.default, arguments)


def test_torch_compile_gives_the_same_bits():
    def measured(y, *rest):
        return torch.ops.lmnfast.path_r2(y * 2, *rest)[0] + 1

    arguments = problem(9, 5)
    compiled = torch.compile(measured, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), measured(*arguments))


@pytest.mark.parametrize(
    "position, value, error, message",
    [
        (
            0,
            torch.zeros(9, 19, 5, dtype=torch.int32),
            TypeError,
            "interior: expected torch.float32 or torch.float64",
        ),
        (0, torch.zeros(9, 18, 5).double(), ValueError, r"interior: expected \(pairs, 19, outputs\)"),
        (1, torch.zeros(6, 5), TypeError, "ends: expected torch.float64"),
        (1, torch.zeros(6, 4).double(), ValueError, r"ends: expected \(samples, 5\)"),
        (0, torch.zeros(9, 19, 5).to_sparse(), TypeError, "interior: expected a dense tensor"),
        (1, torch.zeros(6, 5).double().to("meta"), TypeError, "ends: expected torch.float64 on cpu"),
        (2, torch.zeros(9), TypeError, "first: expected torch.int64"),
        (2, torch.full((9,), -1), ValueError, "first: expected samples 0 to 5, got -1 to -1"),
        (3, torch.zeros(9).long().to("meta"), TypeError, "second: expected torch.int64 on cpu"),
        (3, torch.zeros(8).long(), ValueError, r"second: expected \(9,\)"),
        (3, torch.full((9,), 6), ValueError, "second: expected samples 0 to 5, got 6 to 6"),
    ],
)
def test_arguments_that_do_not_fit_are_named(position, value, error, message):
    arguments = list(problem(9, 5))
    arguments[position] = value
    if "expected samples 0" in message:  # which the fake implementation cannot see
        with pytest.raises(error, match=message):
            ops.path_r2(*arguments)
    else:
        assert_refused(torch.ops.lmnfast.path_r2, arguments, error, message)


@pytest.mark.parametrize("position, value, error, message", RULES_THAT_DO_NOT_FIT)
def test_rules_that_do_not_fit_are_named(position, value, error, message):
    arguments = list(problem(9, 5, ("uniform", 5)))
    arguments[4 + position] = value
    assert_refused(torch.ops.lmnfast.path_r2, arguments, error, message)
