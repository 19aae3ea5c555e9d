"""Which samples of XOR share a linear map: clusters of the connectivity matrix against the task's bit patterns."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

BITS = 5
# The paper reads the LMN of 15 in the valley as 5 x 3 and that of 20 at the top as 5 x 4: three or four maps for each bit.
READING = {"valley": (15, 3), "top": (20, 4)}


def parity(tokens: np.ndarray, mask: int) -> np.ndarray:
    """The parity of the tokens' bits that are set in the mask. A mask of one bit gives this bit."""
    return np.array([bin(int(token) & mask).count("1") % 2 for token in tokens])


def patterns(pairs: np.ndarray, mask: int, kinds: int) -> np.ndarray:
    """The pattern of a parity in the two tokens of each pair: of 4 kinds 00, 01, 10, 11; of 3 kinds the same without order; of
    2 kinds equal or not."""
    a, b = parity(pairs[:, 0], mask), parity(pairs[:, 1], mask)
    return {2: a ^ b, 3: a + b, 4: 2 * a + b}[kinds]


def groupings(pairs: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Groupings of the pairs (N, 2), by name. The bits are a basis of the parities, and the network does not know which basis,
    because it learns an embedding of each token. So all parities are candidates beside the bits."""
    single, every = [1 << bit for bit in range(BITS)], range(1, 1 << BITS)
    found = {
        f"a bit, {kinds} patterns": [patterns(pairs, mask, kinds) for mask in single] for kinds in (2, 3, 4)
    }
    found |= {
        f"a parity, {kinds} patterns": [patterns(pairs, mask, kinds) for mask in every] for kinds in (2, 3, 4)
    }
    found["the answer"] = [pairs[:, 0] ^ pairs[:, 1]]
    found["a token"] = [pairs[:, 0], pairs[:, 1]]
    return found


def scores(L: Tensor, inputs: Tensor, place: str) -> dict[str, float]:
    """How well groupings by bit patterns explain the matrix of a network at the valley or the top.

    Args:
        L: (N, N), of the samples.
        inputs: (N, 2) int64, their tokens.
        place: "valley" or "top".

    Returns:
        By "index, GROUPING" the largest adjusted Rand index of a grouping of this name, and as many clusters as it has groups;
        by "index of COUNT clusters, GROUPING" that of 15 or 20 clusters; by "share, GROUPING" the share of the variance of L's
        entries beside the diagonal that the groupings of this name explain together, by least squares with weights of at least
        0, on whether the two samples are in the same group. 0 is the expectation of the index of random clusters.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform
    from sklearn.metrics import adjusted_rand_score

    matrix = L.double().cpu().numpy()
    distances = np.clip(1 - (matrix + matrix.T) / 2, 0, None)
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances, checks=False), "average")
    clusters, _ = READING[place]
    many = fcluster(tree, clusters, "maxclust")
    upper = np.triu_indices(len(matrix), 1)
    entries = matrix[upper]
    found = {}
    for name, candidates in groupings(inputs.numpy()).items():
        own = fcluster(tree, len(np.unique(candidates[0])), "maxclust")
        found[f"index, {name}"] = max(adjusted_rand_score(groups, own) for groups in candidates)
        found[f"index of {clusters} clusters, {name}"] = max(
            adjusted_rand_score(groups, many) for groups in candidates
        )
        found[f"share, {name}"] = explained(
            entries, ((groups[:, None] == groups)[upper] for groups in candidates)
        )
    return found


def explained(entries: np.ndarray, same: Iterable[np.ndarray]) -> float:
    """The share of the variance of the entries that these columns explain together, with weights of at least 0: samples that
    share a map have larger entries."""
    from scipy.optimize import nnls

    columns = np.stack([column.astype(float) for column in same])
    columns -= columns.mean(1, keepdims=True)
    centred = entries - entries.mean()
    total = centred @ centred
    if not (total > 0 and columns.any()):
        return 0.0
    # The same least squares with as many equations as columns: r.T @ r is the columns' matrix of products.
    values, vectors = np.linalg.eigh(columns @ columns.T)
    kept = values > 1e-10 * values.max()
    r = np.sqrt(values[kept, None]) * vectors[:, kept].T
    target = vectors[:, kept].T @ (columns @ centred) / np.sqrt(values[kept])
    return float((target @ target - nnls(r, target)[1] ** 2) / total)
