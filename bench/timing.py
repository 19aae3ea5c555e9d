"""How benchmarks time a call, and the rates from which floors are computed: measured in the same run, or from a card's
tables."""

import functools
import subprocess
import time

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Rates per multiprocessor and clock, by compute capability. HALF_RATE: dense multiply-adds of halves in the matrix units. FP32
# lanes and special functions (MUFU) are 128 and 16 on sm_90, and 64 and 16 on sm_80.
HALF_RATE = {(8, 0): 1024, (9, 0): 2048}
FP32_RATE = {(8, 0): 64, (9, 0): 128}
MUFU_RATE = 16
FP32_PER_ACTIVATION = 9  # interpolation, chord, product with the sigmoid, rounding to halves: an estimate


def synchronised() -> float:
    """The time in seconds, after the device has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def best_of(call, repeats: int = 5) -> float:
    """The seconds of the fastest of a few calls, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = synchronised()
        call()
        times.append(synchronised() - start)
    return min(times)


def product_s(multiply_adds: float, dtype=torch.float32, device="cpu") -> float:
    """The seconds of one square matrix product with so many multiply-adds, measured now."""
    side = max(1, round(multiply_adds ** (1 / 3)))
    a, b, c = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(3))
    return best_of(lambda: torch.mm(a, b, out=c))


@functools.cache
def copy_rate() -> float:
    """Bytes per second that a large copy within the card's memory reads and writes together."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_of(lambda: target.copy_(source), 10)


@functools.cache
def clock() -> float:
    """The card's highest clock rate in Hz."""
    kilohertz = getattr(torch.cuda.get_device_properties(0), "clock_rate", 0)
    if kilohertz:
        return 1e3 * kilohertz
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "-i0"]
    return 1e6 * float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def up_to_8(width: int) -> int:
    return (width + 7) // 8 * 8
