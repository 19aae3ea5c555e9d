"""The paper's three tasks (arXiv 2310.05918, section 3): all pairs of tokens, each with its answer."""

from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations

import torch
from torch import Tensor

TRAIN_FRACTION = 0.8  # the paper's share of the pairs for training
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


def training_samples(name: str, *, fraction: float = TRAIN_FRACTION, **sizes: int | None) -> int:
    """The number of training pairs, a share of all pairs, rounded down. The paper's are 768 of 961, 460 of 576, 819 of 1024.

    Args:
        name: one of TASKS.
        fraction: the share, as the decimal number that Python prints for it.
        sizes: as in `make_task`.

    Raises:
        ValueError: as `task_sizes`; fewer than 2 pairs would be left for training, or none for testing.
    """
    pairs = len(_tokens(name, task_sizes(name, **sizes))) ** 2
    count = int(Fraction(str(fraction)) * pairs) if 0 < fraction < 1 else 0
    if not 2 <= count < pairs:
        raise ValueError(
            f"train_fraction: expected a share between 0 and 1 that leaves at least 2 of the {pairs} pairs for training and "
            f"1 for testing, got {fraction}"
        )
    return count


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
