"""The kernel on CUDA for pairs that float32 cannot resolve: it measures what Python does."""

import pytest
import torch
from chains import (
    FOR_STATISTICS,
    STATISTICS,
    assert_refused,
    cast,
    in_dtype,
    random_chain,
    random_sums,
    samples,
    truth,
)
from support import UNIFORM

from lmnfast import _native, reference
from lmnfast._chain import ACTIVATIONS, Chain
from lmnfast._settings import PLAIN, Statistic
from lmnfast._unresolved import UNRESOLVED, Entries, resolve
from lmnfast.ops._hoisted import hoisted
from lmnfast.ops.path_connectivity import chain_connectivity
from lmnfast.quadrature import path_nodes


def measured_by(
    chain: Chain, x: torch.Tensor, midpoint: bool | None, rule=UNIFORM, statistic: Statistic = PLAIN
):
    """L, counts and pooled as the device leaves them, of a float32 chain; and those that Python gives for the same unresolved
    pairs, with how many these were."""
    parts = hoisted(chain, x)
    op = torch.ops.lmnfast.path_connectivity if midpoint is None else torch.ops.lmnfast.hermite_connectivity
    arguments = (*parts.arguments(torch.float32), *rule, *(() if midpoint is None else (midpoint,)))
    options = statistic._asdict()
    found = op(*arguments, exact=parts.samples(), inputs=x, **options)
    L, counts, pooled = op(*arguments, **options)
    pairs, settings = int(counts[1]), {"points": 2**18, "midpoint": midpoint, "inputs": x}
    assert pairs == int((L == UNRESOLVED).sum()) // 2
    assert not statistic.pooled or torch.equal(pooled == UNRESOLVED, L == UNRESOLVED)
    entries = Entries(L, pooled if statistic.pooled else None, counts, statistic.stabiliser)
    resolve(parts.values(), parts.samples(), entries, *rule, **settings)
    return found, (L, counts, pooled), pairs


def assert_measured_on_the_device(
    chain: Chain,
    x: torch.Tensor,
    midpoint: bool | None,
    rule=UNIFORM,
    tolerance: float = 3e-7,
    statistic: Statistic = PLAIN,
) -> None:
    (L, counts, pooled), (expected, expected_counts, expected_pooled), pairs = measured_by(
        chain, x, midpoint, rule, statistic
    )
    assert pairs > 0, "nothing to measure"
    assert counts.tolist() == expected_counts.tolist() and torch.equal(L, L.mT)
    assert (L - expected).abs().max() < tolerance
    if statistic.pooled:
        assert torch.equal(pooled, pooled.mT) and (pooled - expected_pooled).abs().max() < tolerance


@pytest.fixture
def on_cuda(device):
    if not _native.on_cuda(torch.empty(0, device=device)):
        pytest.skip("for CUDA's kernels alone")
    return device


def short_chords(width: int, distance: float, seed: int = 1, n: int = 4) -> torch.Tensor:
    """Samples, each again close by, and some of them twice."""
    x = samples(n, width, seed=seed)
    return torch.cat([x, x * (1 + distance * samples(n, width, seed=seed + 1)), x[:2]]).float()


@pytest.mark.parametrize("midpoint", [None, False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_device_measures_chains_with_sums_as_python_does(seed, midpoint, on_cuda):
    chain = cast(random_sums(seed), torch.float32, on_cuda)
    x = short_chords(len(chain.weights[0].mT), 10.0 ** -(3 + seed % 5), seed).to(on_cuda)
    assert_measured_on_the_device(chain, x, midpoint)


@pytest.mark.parametrize("midpoint", [None, False, True])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_device_measures_every_activation_as_python_does(name, last, midpoint, on_cuda):
    chain = random_chain([6, 17, 9, 5], ["identity", name, name, name if last else "identity"], seed=3)
    assert_measured_on_the_device(
        cast(chain, torch.float32, on_cuda), short_chords(6, 1e-5).to(on_cuda), midpoint
    )


@pytest.mark.parametrize("midpoint", [None, True])  # the cubic's statistics: test_hermite_connectivity
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", FOR_STATISTICS)
def test_the_device_measures_stabilised_and_pooled_r2_as_python_does(name, statistic, midpoint, on_cuda):
    chain = cast(FOR_STATISTICS[name](), torch.float32, on_cuda)
    x = short_chords(chain.weights[0].shape[1], 1e-4).to(on_cuda)
    assert_measured_on_the_device(chain, x, midpoint, tolerance=1e-6, statistic=statistic)


@pytest.mark.parametrize("midpoint", [None, True])
@pytest.mark.parametrize(
    "widths", [[7, 7, 1], [7, 33, 70], [130, 64, 130, 31], [5, 100, 100, 100, 31], [3, 512, 9], [4, 40, 1000]]
)
def test_the_device_measures_every_width_as_python_does(widths, midpoint, on_cuda):
    """512 units of paths do not fit in shared memory, nor 1000 outputs."""
    names = ["identity", *["silu"] * (len(widths) - 2), "identity"]
    chain = cast(random_chain(widths, names), torch.float32, on_cuda)
    assert_measured_on_the_device(chain, short_chords(widths[0], 1e-6, n=3).to(on_cuda), midpoint)


@pytest.mark.parametrize("midpoint", [None, True])
@pytest.mark.parametrize("rule", [("uniform", 3), ("uniform", 40), ("uniform", 64), ("lobatto", 9)])
def test_the_device_measures_by_every_rule_as_python_does(rule, midpoint, on_cuda):
    chain = cast(random_chain([6, 20, 4], ["identity", "tanh", "identity"]), torch.float32, on_cuda)
    assert_measured_on_the_device(chain, short_chords(6, 1e-6).to(on_cuda), midpoint, path_nodes(*rule))


@pytest.mark.parametrize("midpoint", [None, True])
def test_what_the_device_does_not_measure_is_left_to_python(midpoint, on_cuda):
    """More nodes than its kernel takes, and outputs that are not finite."""
    chain = cast(random_chain([6, 20, 4], ["identity", "tanh", "identity"]), torch.float32, on_cuda)
    x = short_chords(6, 1e-6).to(on_cuda)
    (L, counts, _), _, pairs = measured_by(chain, x, midpoint, path_nodes("uniform", 65))
    assert counts[1] == pairs and (L == UNRESOLVED).sum() == 2 * pairs > 0
    chain.weights[1].mul_(3e38)  # beyond float32 and not float64
    assert_measured_on_the_device(chain, x, midpoint)
    huge = cast(random_chain([6, 20, 4], ["identity", "relu", "relu"]), torch.float32, on_cuda)
    huge.weights[1].fill_(torch.inf)
    (L, counts, _), _, pairs = measured_by(huge, x[:4], midpoint)
    assert counts[1] == pairs > 0 and (L == UNRESOLVED).sum() == 2 * pairs


@pytest.mark.parametrize("midpoint", [None, False, True])
@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "sigmoid"])
def test_the_device_finds_dead_outputs_as_python_does(name, midpoint, on_cuda):
    """Outputs that vary by a millionth of their size, that are dead, and that hardly live."""
    chain = random_chain([6, 24, 70], ["identity", name, name])
    chain.weights[1].mul_(1e-6 if name == "sigmoid" else 1.0)
    chain.biases[1][::3] = -60.0
    chain.biases[1][1::3] = -9.0
    x = torch.cat([short_chords(6, 1e-4), samples(5, 6, seed=5).float()]).to(on_cuda)
    # Between close samples outputs vary by 1e-10 of what they are computed from: float64's rounding shows in 1 - r2.
    assert_measured_on_the_device(cast(chain, torch.float32, on_cuda), x, midpoint, tolerance=1e-5)


@pytest.mark.parametrize("midpoint", [None, False])
def test_the_device_measures_the_same_bits_every_time(midpoint, on_cuda):
    chain = cast(random_sums(4), torch.float32, on_cuda)
    x = short_chords(len(chain.weights[0].mT), 1e-6).to(on_cuda)
    results = [chain_connectivity(chain, x, *UNIFORM, midpoint) for _ in range(3)]
    assert all(torch.equal(r.L, results[0].L) and r.counts[1] == 0 for r in results)


@pytest.mark.parametrize("midpoint", [None, True])
def test_exact_samples_are_optional_arguments_of_the_ops(midpoint):
    chain = cast(random_chain([6, 12, 4], ["identity", "tanh", "identity"]), torch.float32)
    x = short_chords(6, 1e-6)
    parts = hoisted(chain, x)
    op = torch.ops.lmnfast.path_connectivity if midpoint is None else torch.ops.lmnfast.hermite_connectivity
    arguments = (*parts.arguments(torch.float32), *UNIFORM, *(() if midpoint is None else (midpoint,)))
    torch.library.opcheck(op.default, arguments, {"exact": parts.samples(), "inputs": x})


@pytest.mark.parametrize("midpoint", [None, True])
def test_equal_inputs_are_one_sample_on_the_device_whatever_rounding_made_of_them(midpoint, on_cuda):
    """A ReLU has its kink between the first two samples."""
    one, half = torch.ones(1, 1, device=on_cuda), torch.full((1,), -0.5, device=on_cuda)
    exact = torch.tensor([[0.5 - 1e-6], [0.5 + 1e-6], [1.0], [2.0]], dtype=torch.float64, device=on_cuda)
    codes = [ACTIVATIONS.index(name) for name in ("identity", "relu", "identity")]
    op = torch.ops.lmnfast.path_connectivity if midpoint is None else torch.ops.lmnfast.hermite_connectivity
    arguments = (exact.float(), [one, one], [half, None], codes, [0.0] * 6, [], [], *UNIFORM)
    arguments = (*arguments, *(() if midpoint is None else (midpoint,)))
    L, counts, _ = op(*arguments)
    assert L[0, 1] == UNRESOLVED and counts[1] == 1
    for inputs, same in (
        (torch.tensor([1.0, 1, 2, 3], device=on_cuda)[:, None], True),
        (exact.float(), False),
    ):
        L, counts, _ = op(*arguments, exact=exact, inputs=inputs)
        assert counts.tolist() == [0, 0] and (L[0, 1] == 1 if same else 0.7 < L[0, 1] < 0.95)


@pytest.mark.parametrize("midpoint", [None, True])
def test_short_chords_on_the_device_agree_with_float64(midpoint, on_cuda):
    chain = random_chain([6, 30, 20, 5], ["identity", "gelu", "tanh", "identity"])
    x = short_chords(6, 1e-3)
    exact = Chain(*in_dtype(chain, torch.float32))
    expected = truth(exact, x)
    if midpoint:
        expected = reference.hermite_connectivity(exact, x.double(), *UNIFORM, midpoint=True)
    measured = chain_connectivity(cast(chain, torch.float32, on_cuda), x.to(on_cuda), *UNIFORM, midpoint)
    assert measured.counts[1] == 0
    assert (measured.L.cpu() - expected).diagonal(4)[:4].abs().max() < 1e-6
    assert (measured.L.cpu() - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "exact, inputs, error, message",
    [
        (None, torch.zeros(9, 6), ValueError, "exact, inputs: expected both or neither"),
        (torch.zeros(9, 12), torch.zeros(9, 6), TypeError, "exact: expected torch.float64"),
        (torch.zeros(9, 11).double(), torch.zeros(9, 6), ValueError, r"exact: expected \(9, 12\)"),
        (
            torch.zeros(9, 12).double(),
            torch.zeros(9, 6).double(),
            TypeError,
            "inputs: expected torch.float32",
        ),
        (torch.zeros(9, 12).double(), torch.zeros(8, 6), ValueError, r"inputs: expected \(9, \*\)"),
    ],
)
def test_exact_samples_that_do_not_fit_are_refused(exact, inputs, error, message):
    chain = cast(random_chain([6, 12, 4], ["identity", "tanh", "identity"]), torch.float32)
    arguments = hoisted(chain, torch.zeros(9, 6)).arguments(torch.float32)
    for op, more in (
        (torch.ops.lmnfast.path_connectivity, ()),
        (torch.ops.lmnfast.hermite_connectivity, (True,)),
    ):
        assert_refused(op, [*arguments, *UNIFORM, *more, exact, inputs], error, message)
