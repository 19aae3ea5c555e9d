"""Code shared by the benchmarks: devices, timing, floors, and the table at the end. All numbers are from the same run.

The benchmarks of a group solve the same problem. The one whose ``extra_info["bar"]`` is "ours" is compared with the others.
``floor_s`` in extra_info is a predicted time: the work divided by a rate that is measured in this run. If an execution unit of
a card is the limit, the rate is that of the vendor's tables at the card's highest clock.
"""

import functools
from pathlib import Path

import pytest
import torch
from results import machine, table
from timing import (
    DEVICES,
    FP32_PER_ACTIVATION,
    FP32_RATE,
    HALF_RATE,
    MUFU_RATE,
    best_of,
    clock,
    copy_rate,
    synchronised,
    up_to_8,
)

from lmnfast import ops
from lmnfast._chain import Activation, Chain
from lmnfast.quadrature import path_nodes

LONG_ENOUGH = 2e-3  # seconds; in a longer call the time of the launches does not matter
BAR_SECONDS, FEWEST_ROUNDS = 3.0, 3  # a slow rival gets fewer rounds, but at least 3


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=10**6, help="at most so many calls of a bar are timed")


def pytest_configure(config):
    config.addinivalue_line("markers", "benchmark: of pytest-benchmark, which only timing needs")


def pytest_collection_modifyitems(items):
    for item in items:
        # One call of pytest may collect tests too.
        if item.path.parent != Path(__file__).parent:
            continue
        item.add_marker(pytest.mark.benchmark(timer=synchronised))
        # torch itself causes this warning when it compiles vmap(jacrev)
        item.add_marker(pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning"))


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def measure(request, benchmark, device):
    """A function that times a call.

    On CUDA the result is the time for which the device is busy. A short call is replayed from a CUDA graph, back to back, so
    that the time contains neither Python nor launches. ``call_ms`` in extra_info is the time of one call and the wait for its
    end. If the call itself waits for the device, `enqueued` is the same call without this wait.
    """

    most = request.config.getoption("rounds")

    def run(call, arguments, rounds: int, warmup_rounds: int = 1, enqueued=None) -> None:
        if device.type == "cpu":
            start = synchronised()
            call(*arguments)
            affordable = int(BAR_SECONDS / (synchronised() - start))
            rounds = min(rounds, most, max(FEWEST_ROUNDS, affordable))
            benchmark.pedantic(call, arguments, rounds=rounds, warmup_rounds=warmup_rounds - 1)
            return
        seconds = best_of(lambda: call(*arguments))
        benchmark.extra_info["call_ms"] = seconds * 1e3
        enqueued = enqueued or call
        replay = _captured(enqueued, arguments) if seconds < LONG_ENOUGH else None
        timed = replay or functools.partial(enqueued, *arguments)
        iterations = max(1, round(10 * LONG_ENOUGH / best_of(timed)))
        benchmark.extra_info["graph"] = replay is not None
        benchmark.pedantic(timed, rounds=rounds, iterations=iterations, warmup_rounds=1)

    return run


def _captured(call, arguments):
    """The call's work on the device as one launch; None if it cannot be captured because the call waits."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call(*arguments)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


@pytest.fixture
def sgemm_rate() -> float:
    """Multiply-adds per second of a large float32 matrix product. It is measured now, because the machines' rates drift."""
    n = 3072
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return n**3 / best_of(lambda: torch.mm(a, b, out=c))


@pytest.fixture
def activation_rate() -> float:
    """SiLUs per second, measured now: of our kernel with a very small product, or of PyTorch in cache; the higher rate."""
    z, out = torch.randn(2**17), torch.empty(2**17)
    pytorchs = 50 * len(z) / best_of(lambda: [torch.ops.aten.silu.out(z, out=out) for _ in range(50)])
    chain = Chain((torch.randn(1, 100),), (None,), (Activation("silu"), Activation("identity")))
    n, rule = 400, path_nodes("uniform", 21)
    ours = (
        n * (n - 1) / 2 * 19 * 100 / best_of(lambda: ops.path_connectivity(chain, torch.randn(n, 100), *rule))
    )
    return max(pytorchs, ours)


@pytest.fixture
def path_connectivity_floor(request, device):
    """A function that predicts the seconds of the fused kernel, for SiLU between layers of these widths.

    The work has one part per execution unit. The first Linear works only on the samples and is left out. On the CPU the parts
    add up. On a card they overlap, so the floor is the largest part.
    """

    def floor(n: int, interior: int, widths: tuple[int, ...]) -> dict[str, float]:
        points, hidden = n * (n - 1) / 2 * interior, widths[1:-1]
        layers = list(zip(hidden, widths[2:]))
        if device.type == "cpu":
            sgemm, activation = (request.getfixturevalue(f"{of}_rate") for of in ("sgemm", "activation"))
            parts = {
                "products_s": points * sum(k * m for k, m in layers) / sgemm,
                "activations_s": points * sum(hidden) / activation,
            }
            return {"floor_s": sum(parts.values()), **parts}
        card = torch.cuda.get_device_properties(0)
        kind, cycles = (card.major, card.minor), card.multi_processor_count * clock()
        parts = {
            "MUFU_s": points * sum(map(up_to_8, hidden)) / (MUFU_RATE * cycles),
            "memory_s": 4 * n * (n + widths[1]) / copy_rate(),
        }
        if kind in HALF_RATE:
            products = 3 if torch.get_float32_matmul_precision() == "highest" else 1  # a split into two parts
            multiply_adds = points * sum(up_to_8(k) * up_to_8(m) for k, m in layers)
            parts["halves_s"] = products * multiply_adds / (HALF_RATE[kind] * cycles)
            parts["FP32_s"] = FP32_PER_ACTIVATION * points * sum(hidden) / (FP32_RATE[kind] * cycles)
        return {"floor_s": max(parts.values()), **parts}

    return floor


@pytest.fixture
def precision(request):
    """torch.set_float32_matmul_precision for one benchmark; "highest" unless parametrised."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(getattr(request, "param", "highest"))
    yield torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    terminalreporter.section("ratios")
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in machine().items()))
    for line in table([bench.as_dict(include_data=False) for bench in session.benchmarks]):
        terminalreporter.write_line(line)
