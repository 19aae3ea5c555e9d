"""What every op promises on CUDA besides its numbers: the caller's stream and device, no waiting, no memory of its own."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from chains import random_chain, samples
from support import has_cuda
from torch import Tensor

from lmnfast import ops
from lmnfast._chain import ACTIVATIONS, Activation, Chain
from lmnfast.ops.block_coefficients import Normalisation
from lmnfast.ops.path_connectivity import chain_connectivity
from lmnfast.quadrature import orthonormal_polynomials, path_nodes

pytestmark = pytest.mark.skipif(not has_cuda(), reason="no CUDA device")

features = import_module("lmnfast.ops.jacobian_distance")  # the op hides its module
LONG = 200_000_000  # cycles, a tenth of a second
RULE = path_nodes("uniform", 21)


def path_connectivity(x: Tensor) -> Callable[[], Tensor]:
    chain = random_chain([12, 40, 7], ["silu", "silu", "identity"], bias=False)
    weights = tuple(w.to(x) for w in chain.weights)
    return lambda: chain_connectivity(Chain(weights, chain.biases, chain.activations), x, *RULE).L


def path_connectivity_backward(x: Tensor) -> Callable[[], Tensor]:
    weights = [w.to(x) for w in random_chain([12, 40, 7], ["silu"] * 3, bias=False).weights]
    silu = ACTIVATIONS.index("silu")
    chain = weights, [None, None], [silu, silu, 0], [0.0] * 6, [], []

    def call() -> Tensor:
        L, _, _, z, of_weights, *_ = torch.ops.lmnfast.path_connectivity_backward(x, *chain, *RULE, x @ x.mT)
        return torch.cat([each.double().flatten() for each in (L, z, *of_weights)])

    return call


def hermite_connectivity(x: Tensor) -> Callable[[], Tensor]:
    chain = random_chain([12, 40, 7], ["silu", "silu", "identity"], bias=False)
    weights = tuple(w.to(x) for w in chain.weights)
    return lambda: chain_connectivity(Chain(weights, chain.biases, chain.activations), x, *RULE, True).L


def path_r2(x: Tensor) -> Callable[[], Tensor]:
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    interior = torch.empty(len(first), len(RULE[0]) - 2, x.shape[1], device=x.device)

    def call() -> Tensor:
        interior.copy_(x[first][:, None].expand_as(interior))
        return torch.ops.lmnfast.path_r2(interior.sin_(), x, first, second, *RULE)[0]

    return call


def block_coefficients(x: Tensor) -> Callable[[], Tensor]:
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    rule = [v.to(x.device) for v in (RULE[0], orthonormal_polynomials(*RULE))]

    def call() -> Tensor:
        norm = Normalisation(x.double().square().mean(1), (x[first] * x[second]).double().mean(1), 1e-5)
        results = ops.block_coefficients(
            x, first, second, Activation("silu"), *rule, gated=True, normalisation=norm, shift=x[0], end=5
        )
        return torch.cat([result.double().flatten() for result in results])

    return call


def check_outputs(x: Tensor) -> Callable[[], Tensor]:
    return lambda: ops.check_outputs(x, x.sin(), None, x, None, None, 1e-7)


def spectral_entropy(x: Tensor) -> Callable[[], Tensor]:
    return lambda: ops.spectral_entropy(x)


def symmetric_eigenvalues(x: Tensor) -> Callable[[], Tensor]:
    return lambda: ops.symmetric_eigenvalues(x @ x.mT)


def jacobian(x: Tensor) -> Callable[[], Tensor]:
    chain = random_chain([12, 40, 9, 7], ["identity", "silu", "silu", "identity"], bias=False)
    weights = tuple(w.to(x) for w in chain.weights)
    return lambda: ops.jacobian(Chain(weights, chain.biases, chain.activations), x)


def jacobian_distance(x: Tensor) -> Callable[[], Tensor]:
    return lambda: ops.jacobian_distance(x.double(), x[:50].double(), False, torch.float32)


def jacobian_features(x: Tensor) -> Callable[[], Tensor]:
    chain = random_chain([12, 40, 7], ["identity", "silu", "identity"], bias=False)
    first, last = (w.to(x.device) for w in chain.weights)

    def call() -> Tensor:
        B, _ = features.jacobian_isometry(first, last)
        return features.jacobian_features(x.double(), first, None, chain.activations[1], B)

    return call


def isometry_distance(x: Tensor) -> Callable[[], Tensor]:
    chain = random_chain([12, 40, 7], ["identity", "silu", "identity"], bias=False)
    first, last = (w.to(x) for w in chain.weights)

    def call() -> Tensor:
        L, _, y = features.isometry_distance(
            x, first, None, last, None, chain.activations[1], connectivity=True, with_outputs=True
        )
        return torch.cat((L, y), 1)

    return call


def jacobian_connectivity(x: Tensor) -> Callable[[], Tensor]:
    return lambda: features.jacobian_connectivity(x.double(), x[:50].double(), torch.float32)


# Every registered op has a function above, and so have three kernels that are called without the dispatcher.
OPS = [globals()[name] for name in ops.__all__]


@pytest.fixture(
    params=[*OPS, jacobian_features, isometry_distance, jacobian_connectivity], ids=lambda op: op.__name__
)
def op(request):
    """From samples on a device, a function without arguments that calls the op on them."""
    return request.param


def inputs(seed: int = 1, device: str = "cuda") -> Tensor:
    return samples(60, 12, seed=seed).to(device, torch.float32)


def test_the_work_is_on_the_callers_stream(op):
    x, later = inputs(1), inputs(2)
    expected = op(later)()
    call = op(x)
    call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        x.copy_(later)  # only what waits behind this sees it
        result = call()
    stream.synchronize()
    assert torch.equal(result, expected)


def test_the_call_returns_before_the_work_is_done(op):
    call = op(inputs())
    expected = call()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    result = call()
    assert not torch.cuda.current_stream().query()
    assert torch.equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_on_another_device_than_the_current_one(op):
    result = op(inputs(device="cuda:1"))()
    assert result.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(result.cpu(), op(inputs(device="cuda:0"))().cpu())


def test_a_captured_graph_computes_again_from_changed_inputs(op):
    x = inputs(1)
    call = op(x)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for seed in (1, 2):
        x.copy_(inputs(seed))
        graph.replay()
        assert torch.equal(result, op(inputs(seed))())


def outside_of_torch() -> int:
    """Bytes of the card that are neither free nor this process's torch's. Those of other processes, whose tests run
    beside these, are among them."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def test_all_memory_comes_from_torch(op):
    call = op(inputs())
    call()  # its kernels are loaded
    torch.cuda.synchronize()
    allocated, grown = torch.cuda.memory_allocated(), []
    # The card gives memory in pieces of 2 MB: a call that took 35 KB would leave no round without one. Other processes
    # disturb some.
    while grown.count(0) < 3 and len(grown) < 50:
        before = outside_of_torch()
        for _ in range(60):
            call()
        grown.append(outside_of_torch() - before)
    assert grown.count(0) == 3, grown
    assert torch.cuda.memory_allocated() == allocated
