"""Random chains of Linear and activations, shared by the tests of the fused route."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from support import UNIFORM
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from lmnfast import ops, reference
from lmnfast._chain import ACTIVATIONS, Activation, Chain
from lmnfast._settings import PLAIN, Statistic
from lmnfast._stacked import ChainStack
from lmnfast.ops.path_connectivity import chain_connectivity, stack_connectivity
from lmnfast.quadrature import path_nodes


def _contents(value: Any) -> Any:
    """What makes two arguments equal, as a key of a dictionary."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(value, Chain):
        return tuple(_contents(each) for each in vars(value).values())
    return tuple(map(_contents, value)) if isinstance(value, (tuple, list)) else value


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, computed once for equal chains and tensors: a truth is the same on every level. Results are only read."""
    results: dict[Any, Any] = {}

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if not isinstance(arguments[0], Chain):
            return function(*arguments, **options)
        key = _contents((*arguments, *options.items()))
        if key not in results:
            results[key] = function(*arguments, **options)
        return results[key]

    return call


path_truth = remembered(reference.path_connectivity)
hermite_truth = remembered(reference.hermite_connectivity)

PARAMETERS = {"leaky_relu": (0.1, 0.0), "elu": (0.7, 0.0), "softplus": (1.5, 20.0)}


def activation(name: str) -> Activation:
    return Activation(name, *PARAMETERS.get(name, (0.0, 0.0)))


def random_chain(
    widths: list[int],
    names: list[str],
    skips: tuple[tuple[int, int], ...] = (),
    *,
    seed: int = 0,
    scale: float = 1.5,
    bias: bool = True,
) -> Chain:
    """float64; as many Linear layers as steps in widths, names[l] after the l-th (names[0] on the input)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Chain(
        weights=tuple(scale * draw(o, i) / i**0.5 for i, o in itertools.pairwise(widths)),
        biases=tuple(draw(o) if bias else None for o in widths[1:]),
        activations=tuple(map(activation, names)),
        skips=skips,
    )


# Widths, activations, and what is added to what: see Chain.
SUMS = {
    "block(h) + h, twice": (
        [6, 9, 7, 9, 5, 9, 4],
        "identity identity silu identity gelu identity identity",
        ((6, 2), (10, 6)),
    ),
    "act(block(h) + h)": ([5, 9, 7, 9, 3], "identity relu tanh relu identity", ((6, 3),)),
    "W act(h) + h": ([9, 9, 9, 33], "silu gelu tanh identity", ((2, 0), (4, 2))),
    "act(W h) + h": ([9, 9, 9, 4], "identity silu elu identity", ((3, 0), (5, 3))),
    "both of one layer": ([9, 9, 9], "tanh leaky_relu identity", ((1, 0), (2, 1), (3, 1))),
    "one for all": ([9, 9, 9, 9, 9], "silu sigmoid softplus sin identity", ((3, 1), (4, 1), (5, 1), (8, 1))),
    "one in another": ([9] * 6, "silu silu silu silu silu identity", ((3, 1), (6, 5), (8, 5), (10, 3))),
    "to outputs behind an activation": ([9, 9, 9], "identity gelu tanh", ((4, 3), (5, 3))),
    "to outputs from the samples alone": ([9, 9, 9], "identity silu identity", ((4, 0),)),
    "no nonlinearity": ([9, 9, 9], "identity identity identity", ((2, 0), (4, 2))),
}


def chain_with(sums: str, **settings) -> Chain:
    widths, names, skips = SUMS[sums]
    return random_chain(widths, names.split(), skips, **settings)


def random_sums(seed: int, scale: float = 0.8) -> Chain:
    """Two odd widths, any activations, and at most places where a sum is possible one with anything earlier."""
    generator = torch.Generator().manual_seed(seed)

    def draw(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    layers = 2 + draw(5)
    widths = [(7, 13)[draw(2)] for _ in range(layers + 1)]
    names = [ACTIVATIONS[draw(len(ACTIVATIONS))] for _ in range(layers + 1)]
    values = [v for v in range(2 * layers + 2) if v % 2 == 0 or names[v // 2] != "identity"]
    skips = []
    for into in values[1:]:
        fitting = [v for v in values if v < into and widths[v // 2] == widths[into // 2]]
        if fitting and draw(3):
            skips.append((into, fitting[draw(len(fitting))]))
    return random_chain(widths, names, tuple(skips), seed=seed, scale=scale)


def cast(chain: Chain, dtype: torch.dtype, device: torch.device | str = "cpu") -> Chain:
    return Chain(
        tuple(w.to(device, dtype) for w in chain.weights),
        tuple(None if b is None else b.to(device, dtype) for b in chain.biases),
        chain.activations,
        skips=chain.skips,
    )


def stack_of_chains(chains: list[Chain]) -> ChainStack:
    def together(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
        return None if tensors[0] is None else torch.stack(tensors)

    weights = tuple(map(together, zip(*(chain.weights for chain in chains))))
    biases = tuple(map(together, zip(*(chain.biases for chain in chains))))
    return ChainStack(weights, biases, chains[0].activations, chains[0].skips)


def assert_stack_is_its_networks(
    chains: list[Chain],
    x: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    midpoint: bool | None,
    rule: tuple[Tensor, Tensor] = path_nodes("uniform", 21),
    statistic: Statistic = PLAIN,
) -> None:
    """Measured together, and one after the other: the same bits, before unresolved pairs are measured in torch and after."""
    chains = [cast(chain, dtype, device) for chain in chains]
    x = x.to(device, dtype)
    expected = [chain_connectivity(chain, own, *rule, midpoint, statistic) for chain, own in zip(chains, x)]
    L, counts, pooled, each = stack_connectivity(stack_of_chains(chains), x, *rule, midpoint, statistic)
    assert (pooled is None) != statistic.pooled
    assert L.dtype == dtype and L.shape == (len(x), x.shape[1], x.shape[1]) and L.device.type == device.type
    for _ in range(2):
        for n, (one, alone) in enumerate(zip(each, expected, strict=True)):
            assert one.L.data_ptr() == L[n].data_ptr() and torch.equal(L[n].isnan(), alone.L.isnan()), n
            assert torch.equal(L[n].nan_to_num(7), alone.L.nan_to_num(7)), n
            if pooled is not None:
                assert one.pooled.data_ptr() == pooled[n].data_ptr(), n
                assert torch.equal(pooled[n].nan_to_num(7), alone.pooled.nan_to_num(7)), n
            assert torch.equal(counts[n], alone.counts) and torch.equal(one.counts, alone.counts), n
            if alone.L.isfinite().all():
                one.resolve(), alone.resolve()
    if len(x) > 1 and x.shape[1] > 2 and (L[0] < 0.99).any():
        assert not torch.equal(L[0], L[1]), "the networks are all the same"


# Stabilisers of outputs of order 1: none, one that is above float32's rounding, and one that dominates; and what is pooled.
STATISTICS = [
    Statistic(stabiliser, pooled)
    for stabiliser in (0.0, 8e-8, 0.3)
    for pooled in (False, True)
    if stabiliser or pooled
]


def _of_sizes(chain: Chain, sizes: Tensor) -> Chain:
    """The chain with each output times its size."""
    weights = (*chain.weights[:-1], chain.weights[-1] * sizes[:, None])
    return Chain(weights, (*chain.biases[:-1], chain.biases[-1] * sizes), chain.activations)


def _silu(*widths: int, last: str = "identity") -> Chain:
    return random_chain([*widths], ["identity", *["silu"] * (len(widths) - 2), last], scale=1.0)


# Networks for tests of stabilised and of pooled r2.
FOR_STATISTICS: dict[str, Callable[[], Chain]] = {
    "one hidden layer": lambda: _silu(7, 20, 5),
    "one output": lambda: _silu(5, 12, 1),
    "two hidden layers": lambda: _silu(6, 40, 90, 9),
    "three hidden layers": lambda: _silu(6, 20, 30, 11, 4),
    "residual sums": lambda: chain_with("block(h) + h, twice", scale=1.0),
    "behind an activation": lambda: _silu(6, 20, 7, last="sigmoid"),
    "one Linear and an activation": lambda: _silu(6, 4, last="silu"),
    "130 outputs": lambda: _silu(5, 20, 130),
    "a wide layer": lambda: _silu(5, 300, 6),
    "sizes from 1e-6 to 1e6": lambda: _of_sizes(_silu(6, 20, 5), torch.logspace(-6, 6, 5).double()),
    "dead outputs": lambda: _of_sizes(_silu(6, 20, 5), torch.tensor([1.0, 0, 1, 0, 0]).double()),
    "nothing but dead outputs": lambda: _of_sizes(_silu(6, 20, 3), torch.zeros(3).double()),
}


def assert_statistics_right(
    measured: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    chain: Chain,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Every statistic of the chain, also between equal and nearly equal samples, as the reference has it in float64.

    measured: `op(chain, x, stabiliser=..., pooled=...)`. truth: the same of the reference. In float32 at most twice the
    reference's own error in float32 between distant samples is allowed.
    """
    n, width = support.fewer(19, 13), chain.weights[0].shape[1]
    x = samples(n, width).to(dtype)
    x[3], x[6] = x[1], x[2] * (1 + 1e-6)
    chain = cast(cast(chain, dtype), torch.float64)  # the same numbers in both dtypes
    found = []
    for statistic in STATISTICS:
        options = statistic._asdict()
        expected = truth(chain, x.double(), **options)
        ours = measured(cast(chain, dtype, device), x.to(device), **options).cpu()
        assert ours.dtype == dtype and torch.equal(ours, ours.mT), statistic
        assert (ours.diagonal() == 1).all() and ours[1, 3] == 1, statistic
        allowed = torch.full((n, n), 1e-10, dtype=torch.float64)
        if dtype == torch.float32:
            error = (truth(cast(chain, dtype), x, **options).double() - expected).abs()
            error[2, 6] = error[6, 2] = 0
            allowed[:] = 1e-6 + 2 * error.max()
            assert error.max() < 1e-4, "the reference leaves too much room"
        allowed[2, 6] = allowed[6, 2] = 1e-5
        error = (ours.double() - expected).abs()
        assert (error <= allowed).all(), (statistic, float((error - allowed).max()))
        found.append(expected)
    assert found[0].min() < 0.95 or not chain.weights[-1].any(), "the network is straight"


def samples(n: int, width: int, *, seed: int = 1) -> Tensor:
    return support.samples(n, width, seed=seed, dtype=torch.float64)


@remembered
def hermite_condition(f: Callable[[Tensor], Tensor], x: Tensor, nodes: Tensor, midpoint: bool) -> Tensor:
    """(N, N): mean over outputs of magnitude over spread along the polynomials' paths, what a rounding of the outputs costs r2.

    f and x: float64.
    """
    y, J, step = f(x).flatten(1), reference.jacobian(f, x), (x - x[:, None]).flatten(2)
    start, end = torch.einsum("ikd,ijd->ijk", J, step), torch.einsum("jkd,ijd->ijk", J, step)
    middle = torch.lerp(x[:, None], x, 0.5).flatten(0, 1)
    half = f(middle).unflatten(0, (len(x), len(x))).flatten(2) if midpoint else None
    first, second = y[:, None].expand_as(start), y.expand_as(start)
    path = reference.hermite_path(first, second, start, end, half, nodes)
    return (path.abs().amax(2) / path.std(2).clamp_min(1e-300)).mean(-1)


assert len(ACTIVATIONS) == 11


# What does not fit in the first arguments of the registered ops of chains, for samples (N, 5) and weights (7, 5), (3, 7)
# in float32: position, value, error, message.
LAYERS_THAT_DO_NOT_FIT = [
    (0, torch.zeros(4, 5).half(), TypeError, "[zx]: expected float32 or float64 on the CPU or on CUDA, got"),
    (0, torch.zeros(4, 5).to(torch.complex64), TypeError, "[zx]: expected float32 or float64"),
    (
        0,
        torch.zeros(4, 5).to_sparse(),
        TypeError,
        "[zx]: expected a dense tensor, got a torch.sparse_coo one",
    ),
    (0, torch.zeros(0, 5), ValueError, r"[zx]: expected samples \(N, D\) with N > 0"),
    (0, torch.zeros(5), ValueError, r"[zx]: expected samples \(N, D\)"),
    (1, [torch.zeros(7, 5)], ValueError, "biases: expected 1, a tensor or None for each weight, got 2"),
    (
        1,
        [torch.zeros(7, 5), torch.zeros(3, 8)],
        ValueError,
        r"weights\[1\]: expected \(out, 7\), got shape \(3, 8\)",
    ),
    (
        1,
        [torch.zeros(7, 5), torch.zeros(0, 7)],
        ValueError,
        r"weights\[1\]: expected \(out, 7\), got shape \(0, 7\)",
    ),
    (
        1,
        [torch.zeros(7, 5), torch.zeros(3, 7).double()],
        TypeError,
        r"weights\[1\]: expected torch.float32 on cpu",
    ),
    (1, [torch.zeros(7, 5, device="meta"), torch.zeros(3, 7)], TypeError, r"weights\[0\]: .* got .* on meta"),
    (
        1,
        [torch.zeros(7, 5).to_sparse(), torch.zeros(3, 7)],
        TypeError,
        r"weights\[0\]: expected a dense tensor",
    ),
    (2, [None, torch.zeros(4)], ValueError, r"biases\[1\]: expected \(3,\), got shape \(4,\)"),
    (2, [torch.zeros(7).double(), None], TypeError, r"biases\[0\]: expected torch.float32"),
    (2, [None], ValueError, "biases: expected 2"),
    (3, [4, 1], ValueError, "activations: expected 3 for 2 weights, got 2"),
    (3, [4, 1, 0, 0], ValueError, "activations: expected 3 for 2 weights, got 4"),
    (3, [4, 11, 0], ValueError, r"activations\[1\]: expected a code from 0 to 10, got 11"),
    (3, [-1, 1, 0], ValueError, r"activations\[0\]: expected a code from 0 to 10, got -1"),
    (4, [], ValueError, "parameters: expected 6, two for each activation, got 0"),
    (4, [0.0] * 5, ValueError, "parameters: expected 6, two for each activation, got 5"),
    (4, [0.0] * 5 + [math.nan], ValueError, r"parameters\[5\]: expected a finite number, got nan"),
]
_t, _w = path_nodes("uniform", 5)
# What does not fit in a rule: whether it is the nodes or their weights, value, error, message.
RULES_THAT_DO_NOT_FIT = [
    (0, _t.float(), TypeError, "nodes: expected torch.float64 on cpu, got torch.float32"),
    (0, _t[None], ValueError, r"nodes: expected \(nodes,\), three or more, got shape \(1, 5\)"),
    (0, _t[::4], ValueError, r"nodes: expected \(nodes,\), three or more, got shape \(2,\)"),
    (0, _t[:4], ValueError, r"weights: expected \(4,\), got shape \(5,\)"),
    (0, _t.flip(0), ValueError, "nodes: expected rising numbers from 0 to 1, got 1.0 to 0.0"),
    (0, _t[[0, 2, 1, 3, 4]], ValueError, "nodes: expected rising numbers from 0 to 1"),
    (0, _t[[0, 1, 1, 3, 4]], ValueError, "nodes: expected rising numbers from 0 to 1"),
    (0, _t * torch.tensor([1, 1, math.nan, 1, 1]), ValueError, "nodes: expected rising numbers"),
    (1, _w.float(), TypeError, "weights: expected torch.float64 on cpu"),
    (1, _w * 5, ValueError, "weights: expected numbers of at least 0 with sum 1, got sum 5"),
    (1, _w * math.nan, ValueError, "weights: expected numbers of at least 0 with sum 1, got sum nan"),
    (1, _w + 0.3 * torch.tensor([1, -1, 0, 0, 0]), ValueError, "weights: expected numbers of at least 0"),
    (1, torch.eye(5).double()[2], ValueError, "weights: expected two or more above 0"),
]
RULE = _t, _w


def assert_refused(op, arguments: list, error: type[Exception], message: str) -> None:
    """By the op, and by its fake implementation, but for what only the values of tensors show."""
    with pytest.raises(error, match=message):
        op(*arguments)
    if any(part in message for part in ("rising", "at least 0", "above 0")):
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = tree_map_only(Tensor, lambda t: t if t.is_meta else mode.from_tensor(t), arguments)
        with pytest.raises(error, match=message):
            op(*fakes)


def truth(f, x):
    """float64, by the definition."""
    with torch.no_grad():
        return reference.path_connectivity(f, x.double(), *UNIFORM)


def in_dtype(chain: Chain, dtype: torch.dtype) -> tuple:
    """The chain's weights as they are in a dtype, in float64."""
    return (
        tuple(w.to(dtype).double() for w in chain.weights),
        tuple(None if b is None else b.to(dtype).double() for b in chain.biases),
        chain.activations,
    )


def nearly_equal(distance: float, width: int = 8, n: int = 10) -> torch.Tensor:
    """n float32 samples, and each again a relative `distance` off."""
    x = samples(n, width).float()
    return torch.cat([x, x * (1 + distance * samples(n, width, seed=2).float())])


@remembered
def condition(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    """(N, N): mean over outputs of magnitude over spread along the path, what a rounding of the output costs r2.

    GELU is z (1 + erf(z / sqrt 2)) / 2, whose rounding is that of 1 + erf times z: far below zero there is nothing else
    of it, in PyTorch, too, and another erf has another one. So the magnitude is z's there.
    """
    t = UNIFORM[0][:, None]
    *_, z, y = (
        value.unflatten(0, (len(x), len(x), -1))
        for value in chain.values(torch.lerp(x[:, None, None], x[None, :, None], t).flatten(0, 2))
    )
    size = torch.maximum(y.abs(), z.abs()) if chain.activations[-1].name == "gelu" else y.abs()
    return (size.amax(2) / y.std(2).clamp_min(1e-300)).mean(-1)


def measured(
    chain: Chain, x: torch.Tensor, device: torch.device, dtype: torch.dtype, rule=UNIFORM
) -> torch.Tensor:
    """The kernel's matrix, brought to the CPU."""
    L = ops.path_connectivity(cast(chain, dtype, device), x.to(device, dtype), *rule)
    assert L.dtype == dtype and L.shape == (len(x), len(x)) and L.device.type == device.type
    return L.cpu()


def assert_as_right_as_pytorch(
    chain: Chain, x: torch.Tensor, device: torch.device, dtype: torch.dtype, rule=UNIFORM
) -> tuple[torch.Tensor, torch.Tensor]:
    """At most a few roundings of the outputs, and twice the largest error of the reference in this dtype beside them.

    In float64 the reference is the truth. Its own error is counted as 4 more roundings: 1.5 of these were measured against
    80-bit numbers.

    Returns the kernel's matrix and the reference's.
    """
    truth = path_truth(chain, x, *rule)
    ours = measured(chain, x, device, dtype, rule)
    assert torch.equal(ours, ours.mT) and (ours.diagonal() == 1).all()
    error = (ours.double() - truth).abs()
    allowed, roundings = 0.0, 8
    if dtype == torch.float32:
        plain = path_truth(cast(chain, dtype), x.to(dtype), *rule)
        allowed, roundings = 2 * (plain.double() - truth).abs().max(), 4
    assert (error <= allowed + roundings * torch.finfo(dtype).eps * (1 + condition(chain, x))).all()
    return ours, truth


def raw(n: int = 12, dtype: torch.dtype = torch.float32):
    """Arguments of the registered op."""
    chain = cast(random_chain([5, 7, 3], ["silu", "relu", "identity"]), dtype)
    codes = [ACTIVATIONS.index(a.name) for a in chain.activations]
    return [
        samples(n, 5).to(dtype),
        list(chain.weights),
        list(chain.biases),
        codes,
        [0.0] * 6,
        [],
        [],
        *UNIFORM,
    ]
