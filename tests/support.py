"""What tests share: the levels that were built, nodes, networks and samples. Fixtures are in conftest.py."""

import itertools
import platform

import pytest
import torch
from torch import Tensor, nn

from lmnfast import _native
from lmnfast._files import part_name, write_file
from lmnfast.quadrature import path_nodes

LEVELS = ["baseline", "avx2", "avx512"] if platform.machine() == "x86_64" else ["baseline"]
if not _native.HAS_CORE:
    LEVELS = _native._C.isas()  # the references, in place of kernels
EMULATED = "emulated-cuda"  # the CUDA kernels on the CPU, in a build with LMNFAST_CUDA=emulated
if EMULATED in _native._C.isas():
    LEVELS.append(EMULATED)
# What only kernels promise: their bits, threads, memory, progress and speed. In a run without the core such a test is skipped.
COMPILED = pytest.mark.skipif(not _native.HAS_CORE, reason="without the compiled core")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

UNIFORM = path_nodes("uniform", 21)


def has_cuda() -> bool:
    return _native.cuda_built() and torch.cuda.is_available()


def samples(n: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fewer(many: int, few: int) -> int:
    """How many samples: few in the emulator, which takes a thousand times as long."""
    return few if _native._C.isa() == EMULATED else many


def mlp(
    *widths: int, activation: type[nn.Module] = nn.SiLU, seed: int = 0, gain: float = 1.0
) -> nn.Sequential:
    """Linear layers with an activation between; PyTorch's initialisation, times gain. Leaves the random state."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Linear(i, o), activation()]
        net = nn.Sequential(*layers[:-1])
        for parameter in net.parameters():
            parameter.mul_(gain)
    return net


class Residual(nn.Module):
    """A residual block, then a Linear: fused on the CPU, and a network as any other on CUDA and for its Jacobians."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + torch.tanh(self.first(x)))


GONE = 2**22 + 1  # no process has this number: Linux counts to 2 ** 22


class Killed(BaseException):
    """A process was killed."""


def killed_at(fatal):
    """`write_file` of a process that is killed within its write of this number: half of the file lies beside its place."""
    left = fatal

    def write(path, content):
        nonlocal left
        left -= 1
        if left == 0:
            path.parent.mkdir(exist_ok=True)
            path.with_name(part_name(path.name, GONE)).write_bytes(content[: len(content) // 2])
            raise Killed
        write_file(path, content)

    return write
