"""Calls the registered ops with random arguments, right and wrong, on every instruction set of the build.

A call may return or raise ValueError, TypeError or RuntimeError; a crash, another exception, or an error for arguments
that fit ends the run with the command that repeats it. Best in a build with LMNFAST_SANITIZE=address,undefined.

    python tests/fuzz_ops.py --seconds 60
"""

import argparse
import itertools
import math
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmnfast import _native, ops
from lmnfast._chain import ACTIVATIONS
from lmnfast.quadrature import orthonormal_polynomials, path_nodes

REFUSALS = (ValueError, TypeError, RuntimeError)
MAGNITUDES = (0.0, 1e-320, 1e-200, 1e-38, 1e-3, 1.0, 1.0, 1.0, 30.0, 1e5, 1e38, 1e200, 1e308)


class Case:
    """The arguments of one call, all of them from one seed."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.dtype = self.random.choice((torch.float32, torch.float64))
        self.op: str = self.random.choice([name for name in MAKERS for _ in range(WEIGHTS.get(name, 1))])
        self.arguments: list[Any] = MAKERS[self.op](self)
        self.fits = True

    def size(self, most: int) -> int:
        """Mostly small, sometimes about a multiple of the lanes."""
        near = self.random.choice((8, 16, 24, 32, 48, 64, 96)) + self.random.choice((-1, 0, 1))
        return min(most, self.random.choice((1, 2, 3, self.random.randint(1, most), near)))

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        values = (values * self.random.choice(MAGNITUDES)).to(dtype or self.dtype)
        if values.numel() and self.random.random() < 0.1:
            some = torch.randint(values.numel(), (1 + values.numel() // 20,), generator=self.generator)
            values.view(-1)[some] = self.random.choice((0.0, -0.0, math.nan, math.inf, -math.inf))
        return self.placed(values)

    def placed(self, values: Tensor) -> Tensor:
        """The same values, elsewhere or otherwise in memory."""
        way = self.random.randrange(8)
        if way == 0 and values.dim() > 1:
            return values.mT.contiguous().mT
        if way == 1:
            offset = self.random.randint(1, 3)
            moved = torch.empty(values.numel() + offset, dtype=values.dtype)[offset:].view(values.shape)
            return moved.copy_(values)
        if way == 2:
            return torch.stack((values, values), -1)[..., 0]
        if way == 3 and values.is_floating_point():
            return torch.complex(values, -values).conj().imag
        if way == 4 and values.dim():
            return values[:1].expand(values.shape) if values.shape[0] else values
        return values

    def rule(self) -> list[Tensor]:
        points = self.random.choice((3, 4, 5, 7, 9, 21, 33))
        return list(
            path_nodes("lobatto" if points <= 21 and self.random.random() < 0.5 else "uniform", points)
        )

    def layers(self, least: int) -> list[Any]:
        widths = [self.size(70) for _ in range(self.random.randint(least, 4) + 1)]
        if self.random.random() < 0.3:
            widths = widths[:1] * len(widths)
        codes = [self.random.randrange(len(ACTIVATIONS)) for _ in widths]
        if self.random.random() < 0.5:
            codes[0], codes[-1] = 0, self.random.choice((0, codes[-1]))
        self.widths, self.codes, samples = widths, codes, self.size(34)  # seconds in the emulator
        return [
            self.tensor(samples, widths[0]),
            [self.tensor(o, i) for i, o in itertools.pairwise(widths)],
            [self.random.choice((None, self.tensor(o))) for o in widths[1:]],
            codes,
            [self.random.choice((0.0, 0.01, 1.0, 20.0, -1.0)) for _ in range(2 * len(codes))],
        ]

    def statistic(self) -> list[Any]:
        """A stabiliser and whether r2 is pooled, as the last arguments."""
        return [
            self.random.choice((0.0, 5e-324, 8e-8, 0.3, 1e38, 1.7e308)),
            self.random.random() < 0.5,
        ]

    def path(self) -> list[Any]:
        arguments = self.layers(0)
        samples, values = len(arguments[0]), 2 * len(self.codes)
        skips, shifts = [-1] * values, [None] * values
        if self.random.random() < 0.5:
            for into in range(1, values):
                if into % 2 and self.codes[into // 2] == 0:
                    continue
                width = self.widths[into // 2]
                earlier = [v for v in range(1, into) if self.widths[v // 2] == width]
                if earlier and self.random.random() < 0.4:
                    skips[into] = self.random.choice(earlier)
                if self.random.random() < 0.2:
                    shifts[into] = self.tensor(samples, width)
            return [*arguments, skips, shifts, *self.rule()]
        return [*arguments, [], [], *self.rule()]

    def spoil(self) -> None:
        """Makes one argument another, which mostly does not fit."""
        self.fits = False
        place = self.random.randrange(len(self.arguments))
        value = self.arguments[place]
        if isinstance(value, list) and value and self.random.random() < 0.6:
            value = list(value)
            inner = self.random.randrange(len(value))
            value[inner] = self.spoilt(value[inner])
        else:
            value = self.spoilt(value)
        self.arguments[place] = value

    def spoilt(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            try:
                return self.random.choice(SPOILS)(self, value)
            except RuntimeError:  # of a tensor that is no array of numbers any more
                return value
        if isinstance(value, list):
            return self.random.choice((value[:-1], value[1:], value + value[:1], [], value * 2))
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return self.random.choice((-1, -2, 0, 10, 11, 99, 2**31, -(2**31), 2**62, value + 1))
        if isinstance(value, float):
            return self.random.choice((math.nan, math.inf, -math.inf, 1e308, 0.0))
        return (
            self.random.choice((torch.float16, torch.int64))
            if isinstance(value, torch.dtype)
            else self.tensor(3)
        )


def _elsewhere(case: Case, t: Tensor) -> Tensor:
    return t.to("meta")


def _values(case: Case, t: Tensor) -> Tensor:
    t = t.clone()
    if t.numel():
        bad = (-1, len(t), 2**40, -(2**62)) if t.dtype == torch.int64 else (math.nan, math.inf, -1e300, 2.0)
        t.view(-1)[case.random.randrange(t.numel())] = case.random.choice(bad)
    return t


SPOILS: tuple[Callable[[Case, Tensor], Tensor], ...] = (
    _elsewhere,
    _values,
    lambda case, t: t[:-1],
    lambda case, t: torch.cat((t, t)) if t.dim() else t,
    lambda case, t: t[..., :0],
    lambda case, t: t[:0],
    lambda case, t: t[None],
    lambda case, t: t.flatten(),
    lambda case, t: t.mT if t.dim() > 1 else t.flip(0),
    lambda case, t: t.to(
        case.random.choice((torch.float16, torch.float32, torch.float64, torch.int32, torch.bool))
    ),
    lambda case, t: t.to(torch.complex64),
    lambda case, t: t.to_sparse() if t.dim() and t.numel() < 2**30 else t,  # it looks at all of 2^60 copies
    lambda case, t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda case, t: torch.nested.nested_tensor([t, t]),
    lambda case, t: t.to_mkldnn() if t.dtype == torch.float32 and t.dim() else t,
    lambda case, t: t[:1].expand(2**60, *t.shape[1:]) if t.dim() and len(t) else t,
    lambda case, t: t.double().requires_grad_() if t.is_floating_point() else t,
)


def _path_r2(case: Case) -> list[Any]:
    nodes, weights = case.rule()
    pairs, outputs, samples = case.size(70), case.size(130), case.size(20)
    indices = [case.placed(torch.randint(samples, (pairs,), generator=case.generator)) for _ in range(2)]
    return [
        case.tensor(pairs, len(nodes) - 2, outputs),
        case.tensor(samples, outputs),
        *indices,
        nodes,
        weights,
        case.random.choice((None, case.tensor(2, outputs).abs())),
        *case.statistic(),
    ]


def _block(case: Case) -> list[Any]:
    nodes, weights = case.rule()
    polynomials = orthonormal_polynomials(nodes, weights)
    polynomials = polynomials[: case.size(len(polynomials))]
    rows, samples, units, gated = case.size(40), case.size(20), case.size(130), case.random.random() < 0.5
    width = units * (2 if gated else 1)
    own = cross = None
    if case.random.random() < 0.5:
        own, cross = (case.tensor(n, dtype=torch.float64) for n in (samples, rows))
    end = case.random.randint(0, len(polynomials))
    return [
        case.tensor(samples, width),
        *(case.placed(torch.randint(samples, (rows,), generator=case.generator)) for _ in range(2)),
        case.random.randrange(len(ACTIVATIONS)),
        [case.random.choice((0.0, 0.01, 1.0, 20.0, -1.0)) for _ in range(2)],
        nodes,
        case.placed(polynomials),
        gated,
        case.random.choice((None, case.tensor(width))),
        own,
        cross,
        case.random.choice((0.0, 1e-5, 1.0)),
        case.random.randint(0, end),
        end,
        2.0 ** case.random.randint(-20, 20),
    ]


def _distances(case: Case) -> list[Any]:
    features = case.size(300)
    first = case.tensor(case.size(130), features, dtype=torch.float64)
    same = case.random.random() < 0.5
    second = first if same else case.tensor(case.size(130), features, dtype=torch.float64)
    return [first, second, case.random.random() < 0.5, case.dtype]


def _eigenvalues(case: Case) -> list[Any]:
    shape = [case.size(5) for _ in range(case.random.randint(0, 2))]
    return [case.tensor(*shape, case.size(130))]


def _matrices(case: Case) -> list[Any]:
    n = case.size(60)  # some are more than the emulated card holds
    return [case.tensor(*[case.size(4) for _ in range(case.random.randint(0, 2))], n, n)]


def _outputs(case: Case) -> list[Any]:
    samples, outputs = case.size(70), case.size(40)

    def maybe(*shape: int) -> Tensor | None:
        return case.tensor(*shape) if case.random.random() < 0.6 else None

    counts = case.placed(torch.randint(9, (2,), generator=case.generator))
    return [
        case.tensor(samples, case.size(70)),
        case.tensor(samples, outputs),
        maybe(samples, outputs),
        maybe(samples, outputs),
        maybe(samples, case.size(70)),
        case.random.choice((None, counts)),
        case.random.choice((2.0**-23, 2.0**-52, 2.0**-10)),
    ]


def _backward(case: Case) -> list[Any]:
    path = case.path()
    return [*path, case.tensor(len(path[0]), len(path[0])), *case.statistic()]


MAKERS: dict[str, Callable[[Case], list[Any]]] = {
    "block_coefficients": _block,
    "check_outputs": _outputs,
    "path_connectivity": lambda case: [*case.path(), None, None, *case.statistic()],
    "hermite_connectivity": lambda case: [
        *case.path(),
        case.random.random() < 0.5,
        None,
        None,
        *case.statistic(),
    ],
    "jacobian": lambda case: case.layers(1),
    "jacobian_distance": _distances,
    "path_connectivity_backward": _backward,
    "path_r2": _path_r2,
    "spectral_entropy": _eigenvalues,
    "symmetric_eigenvalues": _matrices,
}
assert set(MAKERS) == set(ops.__all__), "an op of the package is left out"
WEIGHTS = {"path_connectivity": 2, "hermite_connectivity": 2}
# What values that fit may be refused for: a row of zeros alone, and by LAPACK a NaN.
ACCEPTED = {"spectral_entropy": "not 0", "symmetric_eigenvalues": "linalg.eig"}


def run(seed: int, number: int) -> bool:
    """Makes one call; whether it was refused."""
    case = Case(seed, number)
    while case.random.random() < 0.4:
        case.spoil()
    torch.set_num_threads(case.random.choice((1, 2, 3)))
    torch.set_float32_matmul_precision(case.random.choice(("highest", "high")))
    try:
        getattr(torch.ops.lmnfast, case.op)(*case.arguments)
    except REFUSALS as error:
        if case.fits and ACCEPTED.get(case.op, "\0") not in str(error):
            raise AssertionError(f"{case.op}: arguments that fit are refused") from error
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each instruction set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", help="one instruction set, in this process")
    parser.add_argument("--only", type=int, help="this call alone")
    options = parser.parse_args()
    if options.isa is None:
        for isa in _native._C.isas():
            command = [sys.executable, __file__, "--isa", isa, "--seed", str(options.seed)]
            command += ["--seconds", str(options.seconds)]
            environment = {**os.environ, "LMNFAST_ISA": isa}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            print(done.stdout.splitlines()[-1], flush=True)
            if done.returncode:
                print(f"{isa}: ended with {done.returncode} in the call above", file=sys.stderr)
                return 1
        return 0
    if not _native._C.use_isa(options.isa):
        parser.error(f"--isa: expected one of {', '.join(_native._C.isas())}, got {options.isa}")
    warnings.simplefilter("ignore")
    begin, number, refused = time.monotonic(), options.only or 0, 0
    while time.monotonic() < begin + options.seconds:
        # Before the call: a crash leaves no other trace of it.
        print(f"python {__file__} --isa {options.isa} --seed {options.seed} --only {number}", flush=True)
        refused += run(options.seed, number)
        if options.only is not None:
            break
        number += 1
    print(f"{options.isa}: {number} calls, {refused} of them refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
