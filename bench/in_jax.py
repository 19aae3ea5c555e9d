"""The rivals in JAX: jax.jit on the CPU, for tails of Linear layers with SiLU between them.

XLA uses one thread per processor that the process may use. torch.set_num_threads does not change that.
"""

from functools import partial

import jax
import jax.numpy as jnp
import torch
from jax.nn import silu
from torch import Tensor, nn

from lmnfast.quadrature import path_nodes

jax.config.update("jax_platforms", "cpu")
NODES = path_nodes("uniform", 21)[0].numpy()
CENTRED = NODES - NODES.mean()
VARIANCE_T = float((CENTRED**2).mean())


def _arrays(*tensors: Tensor) -> list[jax.Array]:
    return [jnp.asarray(tensor.detach().numpy()) for tensor in tensors]


def _layers(f) -> list[tuple[jax.Array, jax.Array]]:
    """The weights (out, in) and biases of a Sequential or a Chain."""
    if isinstance(f, nn.Sequential):
        return [tuple(_arrays(m.weight, m.bias)) for m in f if isinstance(m, nn.Linear)]
    return [tuple(_arrays(*layer)) for layer in zip(f.weights, f.biases, strict=True)]


def _tensor(result: jax.Array) -> Tensor:
    return torch.from_dlpack(jax.block_until_ready(result))


def _mlp(layers, x):
    for weight, bias in layers[:-1]:
        x = silu(x @ weight.T + bias)
    return x @ layers[-1][0].T + layers[-1][1]


def _past_first(layers, z):
    """The outputs from the arguments z of the first activation, without the last bias, which does not change r2."""
    for weight, bias in layers[1:-1]:
        z = silu(z) @ weight.T + bias
    return silu(z) @ layers[-1][0].T


@jax.jit
def _r2_of_pairs(layers, x, first, second):
    """r2 of pairs, with the savings of `eager_best`: the first layer is applied to the samples, the outputs at the ends come
    from the samples, and nodes are the outer dimension of a chunk."""
    z = x @ layers[0][0].T + layers[0][1]
    ends = _past_first(layers, z)

    def r2(pairs):
        first, second = pairs
        zi, yi = z[first], ends[first]
        zs, ys = z[second] - zi, ends[second] - yi
        t, centred = jnp.asarray(NODES, x.dtype), jnp.asarray(CENTRED, x.dtype)

        def add(m, sums):
            y = _past_first(layers, zi + t[m] * zs) - yi
            return sums[0] + y, sums[1] + centred[m] * y, sums[2] + y * y

        sums = jax.lax.fori_loop(1, len(t) - 1, add, (ys, centred[-1] * ys, ys * ys))
        mean, covariance, square = (s / len(t) for s in sums)
        return (covariance**2 / (VARIANCE_T * (square - mean**2))).mean(1)

    return jax.lax.map(r2, (first, second)).reshape(-1)


def path_connectivity(net: nn.Sequential, x: Tensor, chunk: int) -> Tensor:
    n = len(x)
    pairs = torch.triu_indices(n, n, 1)
    padded = nn.functional.pad(pairs, (0, -pairs.shape[1] % chunk)).int()
    r2 = _tensor(_r2_of_pairs(_layers(net), *_arrays(x, *padded.unflatten(1, (-1, chunk)))))
    L = torch.ones(n, n)
    L[pairs[0], pairs[1]] = L[pairs[1], pairs[0]] = r2[: pairs.shape[1]]
    return L


@jax.jit
def _jacobian(layers, x):
    return jax.vmap(jax.jacrev(partial(_mlp, layers)))(x)


def jacobian(f, x: Tensor) -> Tensor:
    return _tensor(_jacobian(_layers(f), *_arrays(x)))


@jax.jit
def _jacobian_distances(layers, x):
    J = _jacobian(layers, x).reshape(len(x), -1)
    gram = J @ J.T
    norms = jnp.diagonal(gram)
    return jnp.sqrt(jnp.maximum(norms[:, None] + norms - 2 * gram, 0))


def jacobian_distances(f, x: Tensor) -> Tensor:
    """Distances by the Gram form, which has no correct digits for close pairs."""
    return _tensor(_jacobian_distances(_layers(f), *_arrays(x)))


@jax.jit
def _hermite_connectivity(layers, x):
    y, J = _mlp(layers, x), _jacobian(layers, x)
    moved = jnp.einsum("ikd,jd->ikj", J, x)
    own = jnp.einsum("ikd,id->ik", J, x)
    chord = y.T - y[:, :, None]  # [i, outputs, j]
    start = moved - own[:, :, None] - chord
    end = own.T - moved.transpose(2, 1, 0) - chord
    first, second, w = NODES * (1 - NODES) ** 2, -(NODES**2) * (1 - NODES), 1 / len(NODES)
    e, te = (start * float(w * (v * first).sum()) + end * float(w * (v * second).sum()) for v in (1, CENTRED))
    squares = (float(w * v.sum()) for v in (first**2, 2 * first * second, second**2))
    ee = sum(s * v for s, v in zip(squares, (start**2, start * end, end**2), strict=True))
    covariance = chord * VARIANCE_T + te
    variance = chord**2 * VARIANCE_T + 2 * chord * te + ee - e**2
    return jnp.where(jnp.eye(len(x), dtype=bool), 1, (covariance**2 / (VARIANCE_T * variance)).mean(1))


def hermite_connectivity(net: nn.Sequential, x: Tensor) -> Tensor:
    return _tensor(_hermite_connectivity(_layers(net), *_arrays(x)))
