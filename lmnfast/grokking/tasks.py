"""The paper's three tasks (arXiv 2310.05918, section 3): all pairs of tokens, each with its answer."""

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from .choices import TRAIN_FRACTION, task_sizes, tokens_of, training_samples


@dataclass(frozen=True)
class Task:
    """All pairs of tokens, split into training and test pairs. Inputs (pairs, 2) and labels (pairs,) are int64."""

    vocabulary: int
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def answers(name: str, **sizes: int | None) -> Tensor:
    """The answer to each pair of tokens (a, b), (vocabulary, vocabulary) int64.

    modular-addition: (a + b) mod p. s4: a after b, for the 24 permutations of four things, in lexicographic
    order. xor: a ^ b, for numbers of ``bits`` bits.

    Raises:
        ValueError: as `task_sizes`.
    """
    known = task_sizes(name, **sizes)
    if name == "s4":
        elements = list(permutations(range(4)))
        return torch.tensor([[elements.index(tuple(a[i] for i in b)) for b in elements] for a in elements])
    tokens = torch.tensor(tokens_of(name, known))
    a, b = tokens[:, None], tokens
    return (a + b) % len(tokens) if name == "modular-addition" else a ^ b


def make_task(
    name: str, generator: torch.Generator, *, fraction: float = TRAIN_FRACTION, **sizes: int | None
) -> Task:
    """All pairs with their answers, split at random into pairs for training and pairs for testing.

    Args:
        name: one of TASKS.
        generator: draws the split, on the CPU.
        fraction: the share of the pairs that is for training.
        sizes: p (modular-addition, 31 by default) or bits (xor, 5 by default).

    Raises:
        ValueError: as `training_samples`.
    """
    labels = answers(name, **sizes)
    tokens = torch.arange(len(labels))
    pairs = torch.cartesian_prod(tokens, tokens)  # (pairs, 2), in the order of labels.flatten()
    order = torch.randperm(len(pairs), generator=generator)
    train, test = order.tensor_split([training_samples(name, fraction=fraction, **sizes)])
    labels = labels.flatten()
    return Task(len(tokens), pairs[train], labels[train], pairs[test], labels[test])
