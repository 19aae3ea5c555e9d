"""One small call of every op and of its routes on a device, each result held to the CPU's; for compute-sanitizer.

python -P tests/smoke_gpu.py cuda

Every shape has a remainder somewhere. bench/gpu.sh runs it under memcheck and racecheck, tests/test_smoke_gpu.py on the
CPU and in the emulator.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmnfast import ops
from lmnfast._chain import Activation
from lmnfast._recognise import recognise
from lmnfast.ops.block_coefficients import Normalisation
from lmnfast.quadrature import orthonormal_polynomials, path_nodes

RULE = path_nodes("uniform", 21)
DTYPES = (torch.float32, torch.float64)
ACTIVATIONS = (nn.SiLU, nn.GELU, nn.ReLU)
SAMPLES = 37
STATISTIC: dict[str, Any] = {"stabiliser": 0.1, "pooled": True}


class Call(NamedTuple):
    name: str
    on: Callable[[str], Tensor]  # the result on a device
    bound: Tensor | float  # of what it may differ from the CPU's
    precision: str = "highest"  # torch's float32 matmul precision


def network(widths: tuple[int, ...], activation: type[nn.Module], dtype: torch.dtype) -> nn.Sequential:
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).requires_grad_(False).to(dtype)


def eleven_bits(net: nn.Sequential, x: Tensor) -> Tensor:
    """(N, N): mean over outputs of what 11 bits of the last hidden units, beside their chords, are of the output on a path.

    It is much where an output hardly varies beside them, and few outputs do not level it. In the emulator errors at
    "high" are up to half of it.
    """
    t = RULE[0][:, None]
    units, last = net[:-1](torch.lerp(x[:, None, None], x[None, :, None], t)), net[-1]
    bent = units - torch.lerp(units[:, :, :1], units[:, :, -1:], t)
    of_outputs = (bent.square().mean(2) @ last.weight.square().mT).sqrt()
    return 2.0**-11 * (of_outputs / last(units).std(2, correction=0)).nan_to_num(0.0).mean(-1)


def path_r2() -> Iterator[Call]:
    for dtype, (pairs, k) in product(DTYPES, ((37, 1), (37, 10), (19, 31), (5, 300), (5, 301))):
        y, ends = torch.randn(pairs, 19, k, dtype=dtype), torch.randn(9, k, dtype=dtype)
        arguments = (y, ends, *torch.randint(9, (2, pairs)))
        yield Call(
            f"{dtype} {pairs} x 19 x {k}",
            lambda device, arguments=arguments: ops.path_r2(*(v.to(device) for v in arguments), *RULE),
            1e-4 if dtype == torch.float32 else 1e-10,
        )
        yield Call(
            f"{dtype} {pairs} x 19 x {k} pooled",
            lambda device, arguments=arguments: ops.path_r2(
                *(v.to(device) for v in arguments), *RULE, **STATISTIC
            ),
            1e-4 if dtype == torch.float32 else 1e-10,
        )


def block_coefficients() -> Iterator[Call]:
    """Both results in one tensor. 29 degrees take more than one pass."""
    rule = path_nodes("uniform", 30)
    polynomials = orthonormal_polynomials(*rule)
    for dtype, units, gated in product(DTYPES, (1, 33, 131), (False, True)):
        z = torch.randn(9, units * (2 if gated else 1), dtype=dtype)
        norm = Normalisation(torch.rand(9).double(), torch.rand(37).double(), 1e-3) if gated else None
        first, second = torch.randint(9, (2, 37))

        def on(device: str, z=z, first=first, second=second, gated=gated, norm=norm) -> Tensor:
            coefficients, energy = ops.block_coefficients(
                *(v.to(device) for v in (z, first, second)),
                Activation("gelu"),
                rule[0],
                polynomials,
                gated=gated,
                normalisation=norm
                and Normalisation(norm.own.to(device), norm.cross.to(device), norm.epsilon),
                shift=z[0].to(device) if gated else None,
                begin=1,
                end=23,
                scale=2.0**-5,
            )
            return torch.cat([coefficients.double().flatten(), energy.flatten()])

        yield Call(f"{dtype} {units} {gated=}", on, 1e-4 if dtype == torch.float32 else 1e-10)


def path_connectivity() -> Iterator[Call]:
    shapes = ((7, 10, 3), (20, 100, 31), (20, 40, 50, 33))
    for dtype, widths, activation in product(DTYPES, shapes, ACTIVATIONS):
        net = network(widths, activation, dtype)
        x = torch.randn(SAMPLES, widths[0], dtype=dtype)
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            bound: Tensor | float = 1e-4 if dtype == torch.float32 else 1e-10
            if precision == "high":
                bound = bound + 2 * eleven_bits(copy.deepcopy(net).double(), x.double())
            yield Call(
                f"{dtype} {precision} {widths} {activation.__name__}",
                lambda device, net=net, x=x: ops.path_connectivity(
                    recognise(net.to(device)), x.to(device), *RULE
                ),
                bound,
                precision,
            )
        yield Call(
            f"{dtype} {widths} {activation.__name__} pooled",
            lambda device, net=net, x=x: ops.path_connectivity(
                recognise(net.to(device)), x.to(device), *RULE, **STATISTIC
            ),
            1e-4 if dtype == torch.float32 else 1e-10,
        )


def path_connectivity_backward() -> Iterator[Call]:
    """All gradients in one tensor, of the order of 1."""
    shapes = ((7, 10, 3), (20, 100, 31), (20, 40, 50, 33))
    for dtype, widths, activation in product(DTYPES, shapes, ACTIVATIONS):
        net, x = network(widths, activation, dtype), torch.randn(SAMPLES, widths[0], dtype=dtype)
        gradient = torch.randn(SAMPLES, SAMPLES, dtype=dtype) / SAMPLES
        for statistic in ({}, STATISTIC):

            def on(device: str, net=net, x=x, gradient=gradient, statistic=statistic) -> Tensor:
                chain, given = recognise(net.to(device)), (x.to(device), gradient.to(device))
                found = ops.path_connectivity_backward(chain, *given, *RULE, **statistic)
                return torch.cat([each.flatten() for each in found])

            pooled = " pooled" if statistic else ""
            # The stabiliser of `statistic` leaves a pair no weight whose outputs hardly vary.
            bound = (1e-5 if pooled else 1e-3) if dtype == torch.float32 else 1e-10
            yield Call(f"{dtype} {widths} {activation.__name__}{pooled}", on, bound)


def hermite_connectivity() -> Iterator[Call]:
    """At "high" with the bound of tests/test_hermite_connectivity.py."""
    shapes = ((7, 10, 3), (20, 40, 33))
    for dtype, widths, midpoint in product(DTYPES, shapes, (False, True)):
        net, x = network(widths, nn.SiLU, dtype), torch.randn(SAMPLES, widths[0], dtype=dtype)
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            yield Call(
                f"{dtype} {precision} {widths} {'midpoint' if midpoint else ''}",
                lambda device, net=net, x=x, midpoint=midpoint: ops.hermite_connectivity(
                    recognise(net.to(device)), x.to(device), *RULE, midpoint
                ),
                1e-3 if precision == "high" else 1e-4 if dtype == torch.float32 else 1e-10,
                precision,
            )
        yield Call(
            f"{dtype} {widths} {'midpoint' if midpoint else ''} pooled",
            lambda device, net=net, x=x, midpoint=midpoint: ops.hermite_connectivity(
                recognise(net.to(device)), x.to(device), *RULE, midpoint, **STATISTIC
            ),
            1e-4 if dtype == torch.float32 else 1e-10,
        )


def jacobian() -> Iterator[Call]:
    for dtype, widths in product(DTYPES, ((7, 3), (7, 10, 3), (20, 100, 31), (20, 40, 50, 33))):
        net, x = network(widths, nn.GELU, dtype), torch.randn(SAMPLES, widths[0], dtype=dtype)
        yield Call(
            f"{dtype} {widths}",
            lambda device, net=net, x=x: ops.jacobian(recognise(net.to(device)), x.to(device)),
            1e-5 if dtype == torch.float32 else 1e-13,
        )


def jacobian_distance() -> Iterator[Call]:
    """Every second row is close to another."""
    for dtype, (m, n, features) in product(DTYPES, ((37, 37, 33), (19, 70, 301), (1, 5, 7))):
        first, second = torch.randn(m, features, dtype=torch.float64), torch.randn(n, features).double()
        second[::2] = first[0] + 1e-9 * second[::2]
        for other in (first, second):
            arguments = (first, first if other is first else other)
            yield Call(
                f"{dtype} {m} x {len(arguments[1])} x {features}",
                lambda device, pair=arguments, dtype=dtype: ops.jacobian_distance(
                    *there(pair, device), dtype=dtype
                ),
                1e-4 if dtype == torch.float32 else 1e-11,
            )


def there(pair: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    """Both on the device; one tensor stays one."""
    first = pair[0].to(device)
    return first, first if pair[1] is pair[0] else pair[1].to(device)


def check_outputs() -> Iterator[Call]:
    for dtype, (n, d, k) in product(DTYPES, ((37, 5, 3), (40, 65, 70))):
        x, y, L = (torch.randn(shape, dtype=dtype) for shape in ((n, d), (n, k), (n, n)))
        L[3, 4], y[7, 1] = float("nan"), float("inf")
        arguments = (x, y, y + 1e-3, y.flip(0), L, torch.tensor([3, 4]))
        yield Call(
            f"{dtype} {n} {d} {k}",
            lambda device, arguments=arguments: ops.check_outputs(*(v.to(device) for v in arguments), 1e-7),
            1e-30,
        )


def spectral_entropy() -> Iterator[Call]:
    for dtype in DTYPES:
        w = torch.randn(3, 101, dtype=dtype)
        yield Call(str(dtype), lambda device, w=w: ops.spectral_entropy(w.to(device)), 1e-10)


def symmetric_eigenvalues() -> Iterator[Call]:
    for dtype, n in product(DTYPES, (1, 33, 97)):
        A = torch.randn(2, n, n, dtype=dtype)
        A = torch.stack([A[0] + A[0].mT, torch.ones(n, n, dtype=dtype)])
        yield Call(f"{dtype} {n}", lambda device, A=A: ops.symmetric_eigenvalues(A.to(device)), 1e-12 * n)


CALLS: dict[str, Callable[[], Iterator[Call]]] = {name: globals()[name] for name in ops.__all__}


def error(call: Call, device: str, on_cpu: Tensor) -> float:
    """Its largest difference from the CPU's result on a device. Raises AssertionError where that is beyond the bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(call.precision)
    try:
        result = call.on(device).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    assert result.shape == on_cpu.shape and result.dtype == on_cpu.dtype, call.name
    difference = (result.double() - on_cpu.double()).abs()
    assert bool((difference < call.bound).all()), (call.name, float(difference.max()))
    return float(difference.max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("device", help="cuda, or cpu to try the script itself")
    device = parser.parse_args().device
    torch.manual_seed(0)
    for op in ops.__all__:
        for call in CALLS[op]():
            print(op, call.name, error(call, device, call.on("cpu")), flush=True)


if __name__ == "__main__":
    main()
