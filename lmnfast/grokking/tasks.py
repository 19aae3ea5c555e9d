"""The paper's three tasks (arXiv 2310.05918, section 3): all pairs of tokens, each with its answer."""

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

# For each task the number that sets its size, if it has one: the paper's, the smallest that can be split, and the largest. The
# largest gives four million pairs of tokens, which form one batch.
TASKS = {"modular-addition": {"p": (31, 2, 2048)}, "s4": {}, "xor": {"bits": (5, 1, 11)}}


@dataclass(frozen=True)
class Task:
    """All pairs of tokens, split into training and test pairs. Inputs (pairs, 2) and labels (pairs,) are int64."""

    vocabulary: int
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def task_sizes(name: str, **sizes: int | None) -> dict[str, int]:
    """The number that sets the size of the task, as {"p": 31}. It is the paper's if it is None or missing in `sizes`.

    Raises:
        ValueError: an unknown task; a size that the task does not have, or that is too small or too large.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    result = {size: default for size, (default, _, _) in TASKS[name].items()}
    for size, value in sizes.items():
        if value is None:
            continue
        if size not in result:
            raise ValueError(f"{size}: the task {name} has no such size")
        _, smallest, largest = TASKS[name][size]
        if value < smallest:
            raise ValueError(f"{size}: expected at least {smallest}, got {value}")
        if value > largest:
            raise ValueError(f"{size}: expected at most {largest}, got {value}")
        result[size] = value
    return result


def training_samples(name: str, **sizes: int | None) -> int:
    """The number of training pairs, four fifths of all pairs: 768 of 961, 460 of 576, 819 of 1024, as in the paper."""
    return len(_tokens(name, task_sizes(name, **sizes))) ** 2 * 4 // 5


def _tokens(name: str, sizes: dict[str, int]) -> range:
    return range(24 if name == "s4" else sizes["p"] if name == "modular-addition" else 2 ** sizes["bits"])


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
    tokens = torch.tensor(_tokens(name, known))
    a, b = tokens[:, None], tokens
    return (a + b) % len(tokens) if name == "modular-addition" else a ^ b


def make_task(name: str, generator: torch.Generator, **sizes: int | None) -> Task:
    """All pairs with their answers, split at random: 80 % for training, 20 % for testing.

    Args:
        name: one of TASKS.
        generator: draws the split, on the CPU.
        sizes: p (modular-addition, 31 by default) or bits (xor, 5 by default).

    Raises:
        ValueError: as `task_sizes`.
    """
    labels = answers(name, **sizes)
    tokens = torch.arange(len(labels))
    pairs = torch.cartesian_prod(tokens, tokens)  # (pairs, 2), in the order of labels.flatten()
    order = torch.randperm(len(pairs), generator=generator)
    train, test = order.tensor_split([training_samples(name, **sizes)])
    labels = labels.flatten()
    return Task(len(tokens), pairs[train], labels[train], pairs[test], labels[test])
