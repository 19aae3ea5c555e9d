"""The fused gradients against autograd of the float64 reference: activations, sums, sizes, statistics, limit cases, bits."""

import itertools
from dataclasses import replace

import pytest
import torch
from chains import SUMS, chain_with, random_chain, random_sums, remembered, samples
from support import fewer
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lmnfast import _native, ops, reference
from lmnfast._chain import ACTIVATIONS, Chain
from lmnfast._settings import Statistic
from lmnfast.ops._hoisted import hoisted
from lmnfast.ops.path_connectivity_backward import chain_gradients
from lmnfast.quadrature import path_nodes

SEVEN = path_nodes("lobatto", 7)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-4}
STATISTICS = [Statistic(*each) for each in itertools.product((0.0, 1e-2), (False, True))]


def tensors_of(chain: Chain) -> list[Tensor]:
    return [*chain.weights, *(b for b in chain.biases if b is not None)]


def with_tensors(chain: Chain, tensors: list[Tensor]) -> Chain:
    weights, biases = tensors[: len(chain.weights)], iter(tensors[len(chain.weights) :])
    return replace(
        chain, weights=tuple(weights), biases=tuple(b if b is None else next(biases) for b in chain.biases)
    )


def cast(chain: Chain, dtype: torch.dtype, device: torch.device) -> Chain:
    return with_tensors(chain, [t.to(device, dtype) for t in tensors_of(chain)])


@remembered
def truth_of(
    chain: Chain, x: Tensor, gradient: Tensor, rule=SEVEN, statistic: Statistic = STATISTICS[0]
) -> list[Tensor]:
    leaves = [t.detach().double().cpu().requires_grad_() for t in tensors_of(chain)]
    given = x.double().cpu(), gradient.double().cpu(), *rule
    return reference.path_connectivity_backward(
        with_tensors(chain, leaves), *given, leaves, **statistic._asdict()
    )


def assert_same(ours: list[Tensor], truth: list[Tensor], chain: Chain, tolerance: float) -> None:
    """The last bias of a chain that ends linear has no gradient: the truth's is rounding, and ours is 0."""
    assert len(ours) == len(truth)
    largest = max(float(t.abs().max()) for t in truth)
    rounding = 1e-12 if tolerance <= 1e-10 else 1e-6  # of sums whose terms cancel
    for n, (own, true) in enumerate(zip(ours, truth)):
        assert own.shape == true.shape
        own = own.double().cpu()
        if n == len(truth) - 1 and chain.biases[-1] is not None and chain.activations[-1].name == "identity":
            assert (own == 0).all() and true.abs().max() <= 1e-8 * largest + 1e-12
        else:
            assert (own - true).abs().max() <= tolerance * true.abs().max() + rounding * largest, n


def check(
    chain: Chain,
    x: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    rule=SEVEN,
    statistic: Statistic = STATISTICS[0],
    tolerance: float | None = None,
) -> None:
    own = cast(chain, dtype, device)
    x = x.to(device, dtype)
    gradient = torch.randn(len(x), len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient = gradient.to(device, dtype)
    ours = ops.path_connectivity_backward(own, x, gradient, *rule, **statistic._asdict())
    assert all(g.dtype == dtype for g in ours)
    truth = truth_of(own, x, gradient, rule, statistic)
    assert max(float(t.abs().max()) for t in truth) > 1e-4, "there is no gradient to compare"
    assert_same(ours, truth, chain, tolerance or TOLERANCES[dtype])


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
def test_every_activation_on_the_input_and_between_layers(name, device, dtype):
    chain = random_chain([9, 33, 20, 5], [name, name, name, "identity"])
    check(chain, 2 * samples(fewer(37, 19), 9), device, dtype)


@pytest.mark.parametrize("name", ["silu", "sigmoid", "tanh", "relu"])
def test_activation_on_the_output(name, device, dtype):
    check(random_chain([5, 12, 4], ["identity", "silu", name], scale=0.7), samples(20, 5), device, dtype)


@pytest.mark.parametrize("sums", [name for name in SUMS if name != "no nonlinearity"])
def test_sums(sums, device, dtype):
    chain = chain_with(sums, scale=0.8)
    check(chain, samples(fewer(35, 18), chain.weights[0].shape[1]), device, dtype)


@pytest.mark.parametrize("seed", range(8))
def test_any_sums(seed, device):
    chain = random_sums(seed)
    check(chain, samples(21, chain.weights[0].shape[1]), device, torch.float64)


@pytest.mark.parametrize("statistic", STATISTICS, ids=str)
@pytest.mark.parametrize("sums", [None, "block(h) + h, twice"])
def test_statistics(statistic, sums, device, dtype):
    chain = random_chain([6, 30, 7], ["identity", "silu", "identity"]) if sums is None else chain_with(sums)
    check(chain, samples(20, chain.weights[0].shape[1]), device, dtype, statistic=statistic)


@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 63, 64, 65, 130])
def test_any_number_of_samples(n, device, dtype):
    check(random_chain([4, 10, 3], ["identity", "silu", "identity"]), samples(n, 4), device, dtype)


@pytest.mark.parametrize(
    "widths", [[1, 2, 1], [1, 2, 7], [3, 7, 8], [5, 8, 9], [2, 9, 17], [6, 65, 31], [4, 3, 64]]
)
@pytest.mark.parametrize("bias", [True, False])
def test_any_width(widths, bias, device, dtype):
    chain = random_chain(widths, ["tanh", "silu", "identity"], bias=bias, seed=sum(widths))
    check(chain, samples(fewer(21, 14), widths[0]), device, dtype)


@pytest.mark.parametrize(
    "rule", [("uniform", p) for p in (3, 4, 8, 51)] + [("lobatto", p) for p in (3, 5, 9, 21)]
)
def test_any_nodes_and_weights(rule, device, dtype):
    chain = random_chain([5, 30, 6], ["identity", "silu", "identity"])
    check(chain, samples(20, 5), device, dtype, path_nodes(*rule))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_outputs_of_any_size(factor, pooled, device, dtype):
    chain = random_chain([5, 20, 6], ["identity", "silu", "identity"])
    chain = replace(
        chain, weights=(chain.weights[0], chain.weights[1] * factor), biases=(chain.biases[0], None)
    )
    check(chain, samples(20, 5), device, dtype, statistic=Statistic(pooled=pooled))


def test_a_list_of_pairs(dtype):
    chain = cast(random_chain([5, 20, 6], ["identity", "silu", "identity"]), dtype, torch.device("cpu"))
    x = samples(30, 5).to(dtype)
    every = torch.combinations(torch.arange(30))
    some = every[torch.randperm(len(every))[:101]]
    values = torch.randn(len(some), dtype=dtype)
    matrix = torch.zeros(30, 30, dtype=dtype)
    matrix[some[:, 1], some[:, 0]] = values  # below the diagonal: both triangles count
    found = chain_gradients(hoisted(chain, x), x, values, *SEVEN, Statistic(), *some.T)
    whole = chain_gradients(hoisted(chain, x), x, matrix, *SEVEN, Statistic())
    for own, other in ((found.z, whole.z), (found.weights[0], whole.weights[0])):
        assert (own - other).abs().max() <= TOLERANCES[dtype] * other.abs().max()
    apart = found.entries.L - whole.entries.L[some[:, 0], some[:, 1]]
    assert apart.abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)


# ---- limit cases ----


def test_constant_outputs_and_equal_samples_have_no_gradient(device, dtype):
    chain = random_chain([5, 20, 4], ["identity", "relu", "identity"])
    weights = chain.weights[1].clone()
    weights[2] = 0.0  # one output is constant
    chain = replace(chain, weights=(chain.weights[0], weights))
    x = samples(20, 5)
    x[7] = x[3]
    check(chain, x, device, dtype)


def test_a_dead_network_has_no_gradient(device, dtype):
    chain = random_chain([5, 20, 4], ["identity", "relu", "identity"])
    chain = cast(replace(chain, biases=(chain.biases[0] - 100, None)), dtype, device)
    x = samples(20, 5).to(device, dtype)
    for gradient in ops.path_connectivity_backward(chain, x, x.new_ones(20, 20), *SEVEN):
        assert (gradient == 0).all()


def test_pairs_that_float32_cannot_resolve(device):
    """The outputs hardly vary against an offset, and two samples are close. Both are differentiated in float64."""
    chain = random_chain([5, 20, 4], ["identity", "silu", "silu"])
    chain = replace(
        chain,
        weights=(chain.weights[0], 0.05 * chain.weights[1]),
        biases=(chain.biases[0], chain.biases[1] * 0 + 300),
    )
    x = samples(16, 5)
    x[5] = x[4] + 5e-4
    own = cast(chain, torch.float32, device)
    x = x.to(device, torch.float32)
    found = chain_gradients(hoisted(own, x), x, x.new_ones(16, 16), *SEVEN, Statistic())
    assert int(found.entries.counts[1]) > 10
    ours = ops.path_connectivity_backward(own, x, x.new_ones(16, 16), *SEVEN)
    truth = truth_of(own, x, x.new_ones(16, 16))
    for own_gradient, true in zip(ours[:3], truth[:3]):
        assert own_gradient.isfinite().all()
        assert (own_gradient.double().cpu() - true).abs().max() <= 1e-3 * true.abs().max()


def test_one_sample(device, dtype):
    chain = cast(random_chain([4, 10, 3], ["identity", "silu", "identity"]), dtype, device)
    x = samples(1, 4).to(device, dtype)
    for gradient in ops.path_connectivity_backward(chain, x, x.new_ones(1, 1), *SEVEN):
        assert (gradient == 0).all()


def test_shifting_and_scaling_outputs_changes_nothing(device):
    """So the gradient in the last layer's rows is orthogonal to them."""
    chain = cast(random_chain([5, 20, 6], ["identity", "silu", "identity"]), torch.float64, device)
    x = samples(20, 5).to(device)
    gradient = torch.randn(20, 20, dtype=torch.float64, device=device)
    _, _, last, *_ = ops.path_connectivity_backward(chain, x, gradient, *SEVEN)
    along = (last * chain.weights[1]).sum(1).abs()
    assert (along <= 1e-12 * last.norm(dim=1) * chain.weights[1].norm(dim=1)).all()


def test_against_finite_differences():
    chain = random_chain([3, 8, 2], ["identity", "tanh", "identity"])
    x, gradient = samples(7, 3), torch.randn(7, 7, dtype=torch.float64)
    ours = ops.path_connectivity_backward(chain, x, gradient, *SEVEN)
    direction = torch.randn_like(chain.weights[0])

    def value(step: float) -> Tensor:
        moved = replace(chain, weights=(chain.weights[0] + step * direction, chain.weights[1]))
        return (gradient * ops.path_connectivity(moved, x, *SEVEN)).sum()

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    assert abs(slope - (ours[1] * direction).sum()) <= 1e-7 * abs(slope)


# ---- the op ----


def arguments_of(n: int, dtype: torch.dtype, pooled: bool = False) -> tuple[tuple, dict]:
    chain = chain_with("block(h) + h, twice")
    chain = cast(chain, dtype, torch.device("cpu"))
    x = samples(n, 6).to(dtype)
    parts = hoisted(chain, x)
    return (*parts.arguments(dtype), *SEVEN, torch.randn(n, n, dtype=dtype)), {"pooled": pooled}


def test_the_bits_do_not_depend_on_the_thread_count(device, dtype, threads):
    given, more = arguments_of(fewer(150, 50), dtype)
    results = []
    for count in (1, 2, 5):
        threads(count)
        L, _, counts, z, *lists = torch.ops.lmnfast.path_connectivity_backward(*given, **more)
        results.append([L, counts, z, *(t for each in lists for t in each)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_entries_are_those_of_path_connectivity(device, dtype):
    given, more = arguments_of(40, dtype, pooled=True)
    if _native.emulates_cuda(given[0]):
        pytest.skip("on CUDA the sums of the two kernels have other orders")
    L, pooled, counts, *_ = torch.ops.lmnfast.path_connectivity_backward(*given, **more)
    for own, other in zip((L, counts, pooled), torch.ops.lmnfast.path_connectivity(*given[:9], pooled=True)):
        assert torch.equal(own, other)


@pytest.mark.parametrize("pooled", [False, True])
def test_opcheck(pooled, dtype):
    given, more = arguments_of(6, dtype, pooled)
    torch.library.opcheck(torch.ops.lmnfast.path_connectivity_backward.default, given, more)


def test_fake_tensors():
    given, more = arguments_of(6, torch.float32)
    real = torch.ops.lmnfast.path_connectivity_backward(*given, **more)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, given)
        fake = torch.ops.lmnfast.path_connectivity_backward(*fakes, **more)
    for own, other in zip(torch.utils._pytree.tree_leaves(fake), torch.utils._pytree.tree_leaves(real)):
        assert own.shape == other.shape and own.dtype == other.dtype


def test_torch_compile_gives_the_same_bits():
    given, more = arguments_of(6, torch.float64)

    def scaled(z: Tensor) -> Tensor:
        return 2 * torch.ops.lmnfast.path_connectivity_backward(z, *given[1:], **more)[3]

    assert torch.equal(torch.compile(scaled, backend="aot_eager", fullgraph=True)(given[0]), scaled(given[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[:, 1:], r"gradient: expected \(6, 6\), got shape \(6, 5\)"),
        (lambda g: g.double(), r"gradient: expected .*float32"),
    ],
)
def test_refusals(change, message):
    given, more = arguments_of(6, torch.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.lmnfast.path_connectivity_backward(*given[:-1], change(given[-1]), **more)
