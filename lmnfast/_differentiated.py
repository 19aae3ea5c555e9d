"""Jacobians of a function that is no chain, by automatic differentiation."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import Checks, all_finite, first_sample
from ._outputs import Calls, out_of_memory, outputs_of, widened
from ._tiles import CPU_TILE_DIFFERENTIATED

Rows = Callable[[int, int], Tensor]  # features of the samples from one number to another


def check_jacobian(J: Tensor, begin: int = 0) -> None:
    if all_finite(J):
        return
    good = J.isfinite().flatten(1).all(1)
    first = begin + int((~good).nonzero()[0])
    raise ValueError(f"f: NaN or Inf in the Jacobian of {first_sample(first, int((~good).sum()))}")


def differentiated_features(
    f: Calls, x: Tensor, y: Tensor, allocated: int, affine: bool, checks: Checks
) -> Rows:
    differentiated = Differentiated(f, x, y, allocated, CPU_TILE_DIFFERENTIATED // 4, checks)

    def rows(begin: int, end: int) -> Tensor:
        J = differentiated(begin, end).double()
        check_jacobian(J, begin)
        if not affine:
            return J.flatten(1)
        samples = x[begin:end].flatten(1).double()
        offsets = y[begin:end].double() - (J @ samples[:, :, None]).squeeze(2)
        return torch.cat((J.flatten(1), offsets), 1)

    return rows


class Differentiated:
    """Jacobians of any f at samples from begin to end, (end - begin, K, D), by the first way of torch that works."""

    def __init__(self, f: Calls, x: Tensor, y: Tensor, allocated: int, budget: int, checks: Checks) -> None:
        self.f, self.x, self.y, self.checks = f, x.clone() if x.is_inference() else x, y, checks
        self.inputs, self.outputs = x[0].numel(), y.shape[1]
        sample = -(-allocated // len(x))  # bytes per sample
        directions = min(self.inputs, self.outputs)
        self.chunk = max(1, budget // (sample * (directions + 1)))
        self.chunk_outputs = max(1, budget // sample)
        self.ways = [self._forwards] if self.inputs < self.outputs else []
        self.ways += [self._backwards, self._output_by_output]
        self.gradient: Tensor | None = None
        self.constant = self._is_constant()
        if self.gradient is not None and self.ways[0] == self._forwards:
            self._check_forwards(self.gradient.flatten())

    def __call__(self, begin: int, end: int) -> Tensor:
        J = widened(self.y.new_empty(end - begin, self.outputs, self.inputs))
        if self.constant:
            return J.zero_()
        for start in range(begin, end, self.chunk):
            samples = self.x[start : min(start + self.chunk, end)]
            J[start - begin : start - begin + len(samples)], y = self._differentiate(samples)
            self.checks.repeats(
                self.f, self.x, self.y, y, list(range(start, start + len(samples))), "it alone, or on a few"
            )
        return J

    def _differentiate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Jacobians and f's outputs, from the same calls."""
        while True:
            try:
                with torch.inference_mode(False):
                    J, y = self.ways[0](x)
                return J.detach().reshape(len(x), self.outputs, self.inputs), y.detach()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                if len(self.ways) == 1:
                    raise ValueError(f"f: cannot be differentiated: {error}") from error
                self.ways.pop(0)  # never tried again: the next chunk would fail as well

    def _is_constant(self) -> bool:
        """Whether no autograd graph leads from the outputs to the samples. Raises ValueError if the outputs still vary."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = self.x[:1].clone().requires_grad_()
            y = self._with_graph(leaf)
            if y.requires_grad:
                try:
                    (self.gradient,) = torch.autograd.grad(self._mixed(y), leaf, allow_unused=True)
                    if self.gradient is not None:
                        return False
                except RuntimeError as error:
                    raise ValueError(f"f: cannot be differentiated: {error}") from error
        if (self.y != self.y[0]).any():
            raise ValueError(
                "f: cannot be differentiated: its outputs differ from sample to sample, but no graph leads back from "
                "them to the samples (a detach, no_grad, or a layer without a derivative)"
            )
        return True

    def _mixed(self, y: Tensor) -> Tensor:
        """A sum over outputs (..., K) with unequal weights: a plain sum of a softmax has the derivative 0."""
        return y @ torch.arange(y.shape[-1], device=y.device).sin().add(1).to(y.dtype)

    def _check_forwards(self, gradient: Tensor) -> None:
        """Gives up differentiation forwards if it does not give the gradient of the mixed outputs at the first sample.

        Forwards, a region without gradients has a derivative, and an autograd.Function may have another than its backward.
        """
        try:
            J = self._differentiate(self.x[:1])[0][0].T.to(gradient.dtype)
        except ValueError:
            return  # and so will the measurement
        if self.ways[0] == self._forwards:
            tolerance = min(0.1, 64 * torch.finfo(gradient.dtype).eps ** 0.75)
            difference, size = (
                (self._mixed(J) - gradient).abs(),
                self._mixed(J.abs()).max() + gradient.abs().max(),
            )
            if not (difference <= tolerance * size).all():
                self.ways.pop(0)

    def _with_graph(self, leaf: Tensor) -> Tensor:
        try:
            return outputs_of(self.f, leaf.clone())
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ValueError(f"f: cannot be differentiated: {error}") from error

    def _of_one(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        y = self.f(sample[None].clone()).flatten()
        return y, y

    def _forwards(self, x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian = torch.func.jacfwd(self._of_one, has_aux=True, randomness="different")
        with warnings.catch_warnings():  # torch warns about itself at its first forward differentiation
            for kind in (
                DeprecationWarning,
                FutureWarning,
            ):  # the latter from torch 2.14 on, which every user would see
                warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated", kind)
            return torch.func.vmap(jacobian, randomness="different")(x)

    def _backwards(self, x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian = torch.func.jacrev(self._of_one, has_aux=True, chunk_size=self.chunk_outputs)
        return torch.func.vmap(jacobian, randomness="different")(x)

    def _output_by_output(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            y = outputs_of(self.f, leaf.clone())
            rows = [
                torch.autograd.grad(
                    total, leaf, retain_graph=True, allow_unused=True, materialize_grads=True
                )[0]
                for total in y.sum(0)
            ]
        return torch.stack(rows, 1), y
