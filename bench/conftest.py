"""The table at the end of a benchmark run: ours, the rivals, the floor, and their ratios, all from this run.

A benchmark's group is one problem; in it, the benchmark whose ``extra_info["bar"]`` is "ours" is compared with the
others. ``floor_s`` in extra_info is a predicted time: work over a rate measured in this run.
"""

import platform
import subprocess
import time
from collections import defaultdict

import pytest
import torch

from lmnfast import ops
from lmnfast.network import Activation, Chain
from lmnfast.quadrature import path_nodes


def best_of(call, repeats: int = 5) -> float:
    """Seconds of the fastest of a few calls, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.fixture
def sgemm_rate() -> float:
    """Multiply-adds per second of a large float32 matrix product, measured now: these machines drift."""
    n = 3072
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return n**3 / best_of(lambda: torch.mm(a, b, out=c))


@pytest.fixture
def activation_rate() -> float:
    """SiLUs per second, measured now: of our kernel where the product is next to nothing, or of PyTorch in cache."""
    z, out = torch.randn(2**17), torch.empty(2**17)
    pytorchs = 50 * len(z) / best_of(lambda: [torch.ops.aten.silu.out(z, out=out) for _ in range(50)])
    chain = Chain((torch.randn(1, 100),), (None,), (Activation("silu"), Activation("identity")))
    n, rule = 400, path_nodes("uniform", 21)
    ours = (
        n * (n - 1) / 2 * 19 * 100 / best_of(lambda: ops.path_connectivity(chain, torch.randn(n, 100), *rule))
    )
    return max(pytorchs, ours)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    groups = defaultdict(list)
    for bench in session.benchmarks:
        groups[bench.group].append(bench)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    terminalreporter.section("ratios")
    terminalreporter.write_line(
        f"{_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}"
    )
    terminalreporter.write_line("| problem | bar | median ms | min ms | median over ours | over its floor |")
    terminalreporter.write_line("|---|---|--:|--:|--:|--:|")
    for group, benches in groups.items():
        ours = next((b for b in benches if b.extra_info.get("bar") == "ours"), None)
        for b in sorted(benches, key=lambda b: b.stats.median):
            ratio = f"{b.stats.median / ours.stats.median:.3g}" if ours else ""
            floor = b.extra_info.get("floor_s")
            over = f"{b.stats.median / floor:.2f}" if floor else ""
            terminalreporter.write_line(
                f"| {group} | {b.extra_info.get('bar', b.name)} | {b.stats.median * 1e3:.3f} "
                f"| {b.stats.min * 1e3:.3f} | {ratio} | {over} |"
            )


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
