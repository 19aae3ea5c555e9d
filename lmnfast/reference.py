"""The definitions of arXiv 2310.05918 in plain PyTorch: any dtype, any device, no compiled code.

The truth in the tests, the rival in the benchmarks, the fallback where a kernel does not apply.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# An output whose standard deviation along a path is at most this many machine epsilons of its magnitude is
# constant: four covers the rounding of a product of a few hundred terms, and nothing that can be called a slope.
CONSTANT_ULPS = 4.0


def r2_along_path(
    y: Tensor, nodes: Tensor, weights: Tensor, *, stabiliser: float = 0.0, pooled: bool = False
) -> Tensor:
    """Squared Pearson correlation of each output with t, averaged over the outputs or pooled over them.

    Averaged: the mean of ``cov(y_k, t)^2 / (var(t) var(y_k) + stabiliser)``. Pooled:
    ``sum_k cov(y_k, t)^2 / (var(t) sum_k var(y_k) + stabiliser)``. An output that is constant to rounding has a correlation
    of 1 (0 with a stabiliser) and no part in the sums.

    Args:
        y: (..., nodes, outputs), the outputs at every node, the path's ends first and last.
        nodes: (nodes,) float64, the values of t, 0 first and 1 last.
        weights: (nodes,) float64, sum 1.
        stabiliser: 0 or more, in the square of the outputs' unit.
        pooled: whether the outputs are pooled.

    Returns:
        (...) of y's dtype.

    Source:
        arXiv 2310.05918, Eq. 1, without a stabiliser, averaged; docs/mathematics.md, "Pooled over the outputs".
    """
    if pooled:
        return pooled_r2_of_outputs(y, nodes, weights, stabiliser=stabiliser)
    return r2_of_outputs(y, nodes, weights, stabiliser=stabiliser)[0].mean(-1)


def r2_of_outputs(
    y: Tensor, nodes: Tensor, weights: Tensor, rounding: Tensor | None = None, *, stabiliser: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Squared Pearson correlation of each output with t, and which outputs are constant to rounding (r2 = 1).

    Args:
        y, nodes, weights, stabiliser: as in `r2_along_path`.
        rounding: (..., outputs), an output whose standard deviation is at most CONSTANT_ULPS times this is constant;
            None: the machine epsilon of y's dtype times the larger magnitude of the path's two ends.

    Returns:
        (..., outputs) of y's dtype, and (..., outputs) bool.
    """
    covariance, variance, variance_t, scale, constant, _ = _moments(y, nodes, weights, rounding)
    # In the units of the other two. A float over a tensor would be the float times 1 / tensor, which overflows. The 1 keeps
    # autograd from 0 / 0.
    added = scale.new_tensor(stabiliser) / scale / scale
    r2 = covariance**2 / torch.where(constant, 1.0, variance_t * variance + added)
    return torch.where(constant, 0.0 if stabiliser else 1.0, r2), constant


def pooled_r2_of_outputs(
    y: Tensor, nodes: Tensor, weights: Tensor, rounding: Tensor | None = None, *, stabiliser: float = 0.0
) -> Tensor:
    """The outputs' variance along the path that lies on their regression lines in t, as a share of all their variance.

    Args:
        y, nodes, weights, stabiliser: as in `r2_along_path`.
        rounding: as in `r2_of_outputs`.

    Returns:
        (...) of y's dtype; 1 where all outputs are constant, 0 with a stabiliser.
    """
    covariance, variance, variance_t, scale, constant, _ = _moments(y, nodes, weights, rounding)
    common = torch.where(constant, 0.0, scale).amax(-1, keepdim=True)
    common = torch.where(common > 0, common, 1.0)
    factor = torch.where(constant, 0.0, (scale / common) ** 2)
    on_line, all_of_it = (covariance**2 * factor).sum(-1), variance_t * (variance * factor).sum(-1)
    common = common.squeeze(-1)
    none = constant.all(-1)
    r2 = on_line / torch.where(none, 1.0, all_of_it + common.new_tensor(stabiliser) / common / common)
    return torch.where(none, 0.0 if stabiliser else 1.0, r2)


def _moments(
    y: Tensor, nodes: Tensor, weights: Tensor, rounding: Tensor | None
) -> tuple[Tensor, Tensor, float, Tensor, Tensor, Tensor]:
    """Covariance with t and variance of each output over its `scale`; t's variance; the scale; which are constant; and y."""
    t = nodes - weights @ nodes
    variance_t = float(weights @ t**2)
    weights, t = (v.to(y)[:, None] for v in (weights, t))
    if rounding is None:
        rounding = torch.finfo(y.dtype).eps * torch.maximum(y[..., 0, :].abs(), y[..., -1, :].abs())
    y = y - y[..., :1, :]
    centred = y - (weights * y).sum(-2, keepdim=True)
    scale = centred.abs().amax(-2, keepdim=True)  # r2 does not see it; squares of tiny or huge outputs do
    centred = centred / torch.where(scale > 0, scale, 1.0)
    covariance, variance = (weights * t * centred).sum(-2), (weights * centred**2).sum(-2)
    scale = scale.squeeze(-2)
    constant = scale * variance.sqrt() <= CONSTANT_ULPS * rounding
    return covariance, variance, variance_t, torch.where(scale > 0, scale, 1.0), constant, centred


def path_r2(
    interior: Tensor,
    ends: Tensor,
    first: Tensor,
    second: Tensor,
    nodes: Tensor,
    weights: Tensor,
    *,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> Tensor:
    """:func:`r2_along_path` where the paths' ends are the samples' own outputs.

    Args:
        interior: (pairs, nodes - 2, outputs), the outputs at the nodes between the ends.
        ends: (samples, outputs).
        first, second: (pairs,) int64, the samples at t = 0 and t = 1.
        nodes, weights: (nodes,) float64, as above.
        stabiliser, pooled: as in :func:`r2_along_path`.

    Returns:
        (pairs,) of interior's dtype.

    Example:
        >>> nodes, weights = lmnfast.quadrature.path_nodes("uniform", 3)
        >>> ends, i, j = torch.tensor([[0.0], [2.0]]), torch.tensor([0]), torch.tensor([1])
        >>> lmnfast.reference.path_r2(torch.tensor([[[1.0]]]), ends, i, j, nodes, weights)  # 0, 1, 2: a line
        tensor([1.])
    """
    y = torch.cat([ends[first][:, None], interior, ends[second][:, None]], 1)
    return r2_along_path(y, nodes, weights, stabiliser=stabiliser, pooled=pooled)


def path_connectivity(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    nodes: Tensor,
    weights: Tensor,
    *,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> Tensor:
    """Linear connectivity matrix: r2 of f's outputs along the straight line between every two samples.

    Args:
        f: maps (B, *in) to (B, *out); the outputs are flattened.
        x: (N, *in), the samples.
        nodes, weights: (nodes,) float64, as above.
        stabiliser, pooled: as in :func:`r2_along_path`.

    Returns:
        (N, N) of f's dtype, symmetric, ones on the diagonal and between equal samples.

    Source:
        arXiv 2310.05918, Eq. 1-2.

    Example:
        >>> rule = lmnfast.quadrature.path_nodes("uniform", 21)
        >>> L = lmnfast.reference.path_connectivity(torch.square, torch.tensor([[-1.0], [0.0], [1.0]]), *rule)
        >>> [round(abs(float(v)), 3) for v in L[0]]  # a parabola is nearly straight from -1 to 0, and level from -1 to 1
        [1.0, 0.932, 0.0]
    """
    result = torch.ones(len(x), len(x), dtype=f(x[:1]).dtype, device=x.device)
    t = nodes.to(x).reshape(-1, *[1] * (x.dim() - 1))
    for i in range(len(x) - 1):
        others = x[i + 1 :, None]
        y = f(torch.lerp(x[i], others, t).flatten(0, 1)).reshape(len(others), len(nodes), -1)
        coincident = (others == x[i]).flatten(1).all(1)
        r2 = r2_along_path(y, nodes, weights, stabiliser=stabiliser, pooled=pooled)
        result[i, i + 1 :] = torch.where(coincident, 1.0, r2)
    return result.triu() + result.triu(1).mT


def path_connectivity_backward(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    gradient: Tensor,
    nodes: Tensor,
    weights: Tensor,
    parameters: Sequence[Tensor] = (),
    *,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> list[Tensor]:
    """Gradients of ``(gradient * L).sum()`` with L of :func:`path_connectivity`, by automatic differentiation.

    Args:
        f: maps (B, *in) to (B, *out), differentiable; the outputs are flattened.
        x: (N, *in), the samples.
        gradient: (N, N), for every entry of L.
        parameters: the tensors beside x in which the gradients are taken. They require grad.
        nodes, weights, stabiliser, pooled: as in :func:`path_connectivity`.

    Returns:
        The gradients in x and in each of the parameters, of their shapes.

    Example:
        >>> rule = lmnfast.quadrature.path_nodes("uniform", 21)
        >>> x, weight = torch.randn(5, 3), torch.randn(2, 3, requires_grad=True)
        >>> f = lambda x: (x @ weight.T).tanh()
        >>> [tuple(g.shape) for g in lmnfast.reference.path_connectivity_backward(f, x, torch.ones(5, 5), *rule, [weight])]
        [(5, 3), (2, 3)]
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        L = path_connectivity(f, x, nodes, weights, stabiliser=stabiliser, pooled=pooled)
        return list(torch.autograd.grad(L, [x, *parameters], gradient, materialize_grads=True))


def block_coefficients(
    z: Tensor,
    first: Tensor,
    second: Tensor,
    activation: Callable[[Tensor], Tensor],
    nodes: Tensor,
    polynomials: Tensor,
    *,
    gated: bool = False,
    normalisation: tuple[Tensor, Tensor, float] | None = None,
    shift: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Coefficients, in polynomials, of the hidden layer of a transformer's block along paths, without its chord.

    Args:
        z: (samples, units), the pre-activations at the samples; with a gate (samples, 2 * units), the gate's units last.
        first, second: (rows,) int64, the samples at t = 0 and t = 1.
        activation: of the hidden layer.
        nodes: (nodes,) float64, 0 first and 1 last.
        polynomials: (degrees, nodes) float64, each polynomial's values times the nodes' weights.
        gated: whether the layer is ``activation(a) * g``.
        normalisation: own (samples,), cross (rows,) and epsilon: pre-activations are divided by the root of
            ``(1 - t)^2 own[first] + 2 t (1 - t) cross + t^2 own[second] + epsilon``. None: they are not divided.
        shift: as a row of z, added to the pre-activations.
        scale: factor of the coefficients in the energy.

    Returns:
        (degrees, rows, units), and the sums over units of the squared, scaled coefficients, (rows, degrees).

    Example:
        >>> nodes, weights = lmnfast.quadrature.path_nodes("uniform", 3)
        >>> z, i, j = torch.tensor([[-1.0], [1.0]]), torch.tensor([0]), torch.tensor([1])
        >>> lmnfast.reference.block_coefficients(z, i, j, torch.relu, nodes, weights[None])[0]
        tensor([[[-0.1667]]])
    """
    t = nodes.to(z)[:, None]
    a = torch.lerp(z[first][:, None], z[second][:, None], t)
    if normalisation is not None:
        own, cross, epsilon = normalisation
        s = nodes.to(own)
        square = (1 - s) ** 2 * own[first, None] + 2 * s * (1 - s) * cross[:, None] + s**2 * own[second, None]
        a = a * torch.rsqrt(square.clamp(min=0) + epsilon).to(z)[..., None]
    a = a if shift is None else a + shift
    if gated:
        a, gate = a.chunk(2, -1)
        h = activation(a) * gate
    else:
        h = activation(a)
    residual = h - torch.lerp(h[:, :1], h[:, -1:], t)
    coefficients = torch.einsum("dm,rmu->dru", polynomials.to(z), residual)
    return coefficients, (coefficients * scale).double().square().sum(-1).mT.contiguous()


def hermite_connectivity(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool,
    *,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> Tensor:
    """:func:`path_connectivity` of polynomials in place of f along the paths, which f's Jacobians make cheap.

    For each output the cubic that has f's values at both ends and the slopes ``J_i (x_j - x_i)`` and
    ``J_j (x_j - x_i)`` there; with the midpoint the quartic that also has f's value half way.

    Args:
        f: maps (B, *in) to (B, *out), differentiable; the outputs are flattened.
        x: (N, *in), the samples.
        nodes, weights: (nodes,) float64, as above.
        midpoint: whether the midpoint is matched.
        stabiliser, pooled: as in :func:`r2_along_path`.

    Returns:
        (N, N) of f's dtype, symmetric, ones on the diagonal.

    Example:
        >>> rule = lmnfast.quadrature.path_nodes("uniform", 21)
        >>> x = torch.randn(5, 3)
        >>> L = lmnfast.reference.hermite_connectivity(torch.square, x, *rule, False)
        >>> torch.allclose(L, lmnfast.reference.path_connectivity(torch.square, x, *rule), atol=1e-5)
        True
    """
    y = f(x).flatten(1)
    J = jacobian(f, x)
    result = torch.ones(len(x), len(x), dtype=y.dtype, device=x.device)
    for i in range(len(x) - 1):
        others = x[i + 1 :]
        step = others - x[i]
        start = torch.einsum("kd,nd->nk", J[i], step.flatten(1))
        end = torch.einsum("nkd,nd->nk", J[i + 1 :], step.flatten(1))
        half = f(torch.lerp(x[i], others, 0.5)).flatten(1) if midpoint else None
        path = hermite_path(y[i], y[i + 1 :], start, end, half, nodes)
        r2 = r2_along_path(path, nodes, weights, stabiliser=stabiliser, pooled=pooled)
        coincident = (others == x[i]).flatten(1).all(1)
        result[i, i + 1 :] = torch.where(coincident, 1.0, r2)
    return result.triu() + result.triu(1).mT


def hermite_path(
    first: Tensor, second: Tensor, start: Tensor, end: Tensor, half: Tensor | None, nodes: Tensor
) -> Tensor:
    """The cubic of given ends and end slopes at the nodes, or with a value half way the quartic.

    Args:
        first, second: (..., outputs), the values at t = 0 and t = 1; they may be broadcast.
        start, end: (..., outputs), the derivatives by t there.
        half: (..., outputs), the value at t = 1/2, or None.
        nodes: (nodes,) float64.

    Returns:
        (..., nodes, outputs).
    """
    chord = second - first
    t = nodes.to(chord)[:, None]
    start, end = start - chord, end - chord
    e = start[..., None, :] * t * (1 - t) ** 2 - end[..., None, :] * t**2 * (1 - t)
    if half is not None:
        bump = half - torch.lerp(first.expand_as(second), second, 0.5) - (start - end) / 8
        e = e + 16 * t**2 * (1 - t) ** 2 * bump[..., None, :]
    return first[..., None, :] + t * chord[..., None, :] + e


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Jacobians of f at the samples, by automatic differentiation.

    Args:
        f: maps (B, *in) to (B, *out), differentiable, one row independent of the others; both are flattened.
        x: (N, *in), the samples.

    Returns:
        (N, K, D) of f's dtype.

    Example:
        >>> lmnfast.reference.jacobian(torch.square, torch.tensor([[1.0, 2.0]]))
        tensor([[[2., 0.],
                 [0., 4.]]])
    """
    J = torch.func.vmap(torch.func.jacrev(lambda sample: f(sample[None]).flatten()))(x)
    return J.reshape(len(x), J.shape[1], -1)


def jacobian_distance(first: Tensor, second: Tensor, squared: bool) -> Tensor:
    """Euclidean distances of rows, by direct differences: ``d[m, n]^2 = sum_f (first[m, f] - second[n, f])^2``.

    Args:
        first: (M, F), features of samples.
        second: (N, F).
        squared: d^2 in place of d.

    Returns:
        (M, N) of their dtype.

    Example:
        >>> lmnfast.reference.jacobian_distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), squared=False)
        tensor([[5.]])
    """
    square = torch.stack([(second - row).square().sum(-1) for row in first])
    return square if squared else square.sqrt()


def jacobian_connectivity(first: Tensor, second: Tensor) -> Tensor:
    """``L[m, n] = 1 - |first[m] - second[n]|^2 / (|first[m]|^2 + |second[n]|^2)``, 1 where both rows are zeros.

    Args:
        first: (M, F), features of samples.
        second: (N, F).

    Returns:
        (M, N) of their dtype.
    """
    square = jacobian_distance(first, second, True)
    norms = first.square().sum(-1)[:, None] + second.square().sum(-1)
    return torch.where(square == 0, 1.0, 1 - square / norms)


def symmetric_eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices.

    Args:
        matrices: (..., N, N), of which the lower triangles are read.

    Returns:
        (..., N) float64, rising.

    Example:
        >>> lmnfast.reference.symmetric_eigenvalues(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    return torch.linalg.eigvalsh(matrices.double())


def check_outputs(
    x: Tensor,
    y: Tensor,
    again: Tensor | None,
    expected: Tensor | None,
    matrix: Tensor | None,
    counts: Tensor | None,
    epsilon: float,
) -> Tensor:
    """What a call has to know of its numbers before they count.

    Args:
        x: (N, D), the samples.
        y: (N, K), f's outputs there.
        again: (N, K), those of the chain that f is taken for, or None.
        expected: (N, K), those of the model that f was cut from, or None.
        matrix: (N, M), the connectivity or Jacobians, or None.
        counts: (2,) int64, or None.
        epsilon: of the dtype that f's outputs come in.

    Returns:
        (12,) int64. Twice two numbers, of x's rows and of y's: how many are not finite, and how many rows there are from the
        first of these on. Of expected three: how many values are not finite in y and there alike; and, as the bits of float64,
        the largest ``|y - expected| / (32 epsilon) - |expected|``, 0 if that is below, and the largest ``|expected|``. The
        outputs are the same where the first is 0 and the second is at most the third. How many outputs k have an
        ``|again_k - y_k|`` above ``(max y_k - min y_k) / 1000 + 8 epsilon max |y_k| + 1e-30``. As for the rows, of the entries
        of the matrix. The counts. Where something is None, zeros.

    Example:
        >>> x, y = torch.zeros(4, 2), torch.tensor([[1.0], [2.0], [float("nan")], [3.0]])
        >>> found = lmnfast.reference.check_outputs(x, y, None, None, None, None, 1e-7)
        >>> found[:4].tolist()  # of x nothing; of y one row, which is followed by one more
        [0, 0, 1, 2]
    """

    def failing(bad: Tensor) -> list[Tensor]:
        places = bad.flatten().nonzero()
        return [bad.sum(), bad.numel() - places.amin() if len(places) else bad.sum()]

    found = [*failing(~x.isfinite().all(1)), *failing(~y.isfinite().all(1))]
    wide = y.double()
    zero = torch.zeros((), dtype=torch.float64)
    unlike, excess, magnitude = zero, zero, zero
    if expected is not None:
        other = expected.double()
        over = (wide - other).abs() / (32 * epsilon) - other.abs()
        finite, equal = other.isfinite(), (wide == other) | (wide.isnan() & other.isnan())
        unlike = torch.where(finite, ~over.isfinite(), ~equal).sum()
        excess = torch.where(finite & over.isfinite(), over, 0.0).amax().clamp(min=0)
        magnitude = torch.where(finite, other.abs(), 0.0).amax()
    bits = torch.tensor([float(excess), float(magnitude)], dtype=torch.float64).view(torch.int64)
    others = zero
    if again is not None:
        apart, high, low = (again - y).abs().amax(0).double(), wide.amax(0), wide.amin(0)
        same = apart <= 1e-3 * (high - low) + 8 * epsilon * torch.maximum(high.abs(), low.abs()) + 1e-30
        others = (~(same & apart.isfinite())).sum()
    entries = [0, 0] if matrix is None else failing(~matrix.isfinite())
    found += [unlike, *bits, others, *entries, *([0, 0] if counts is None else counts)]
    return torch.tensor([int(number) for number in found], device=y.device)


def spectral_entropy(eigenvalues: Tensor) -> Tensor:
    """Nonlinear complexity S_NL = -sum p log2 p with p = |w| / sum |w|, in bits; 0 log 0 = 0.

    Args:
        eigenvalues: (..., N), any order and sign.

    Returns:
        (...) float64.

    Source:
        arXiv 2310.05918, Eq. 3.

    Example:
        >>> lmnfast.reference.spectral_entropy(torch.ones(8))
        tensor(3., dtype=torch.float64)
    """
    p = eigenvalues.double().abs()
    p = p / p.amax(-1, keepdim=True)  # a sum of the largest numbers would not be finite
    p = p / p.sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def linear_mapping_number(connectivity: Tensor, negative: str = "absolute") -> Tensor:
    """2 ** S_NL of a connectivity matrix (..., N, N), float64. Source: arXiv 2310.05918, Eq. 3.

    negative: "absolute" (the paper's) counts a negative eigenvalue by its magnitude, "clip" as 0.
    """
    w = symmetric_eigenvalues(connectivity)
    return 2 ** spectral_entropy(w.clamp(min=0) if negative == "clip" else w)
