"""What a task and a network of the paper's experiment may be, and the paper's values, without torch."""

from fractions import Fraction

from .._choices import PENALTIES as _PENALTIES

INITS = ("default", "lecun-first")
ACTIVATIONS = ("silu", "relu")  # the paper uses the first
OPTIMIZERS = ("adamw", "sgd")
LOSS_DTYPES = ("float64", "float32")
# What can be added to the loss: measures of the tail behind the paper's layer.
PENALTIES = (*_PENALTIES, "jacobian_norm")
SPLITS = ("train", "test")  # the samples of a run that can be measured
# The paper's widths of an embedding and of a hidden layer, and its number of hidden layers.
EMBEDDING, HIDDEN, DEPTH = 32, 100, 2
TRAIN_FRACTION = 0.8  # the paper's share of the pairs for training
# For each task the number that sets its size, if it has one: the paper's, the smallest that can be split, and the largest. The
# largest gives four million pairs of tokens, which form one batch.
TASKS = {"modular-addition": {"p": (31, 2, 2048)}, "s4": {}, "xor": {"bits": (5, 1, 11)}}


def layers_of(depth: int) -> tuple[str, ...]:
    """The layers to cut at in a network with so many hidden layers: "embedding", "hidden_1_pre", "hidden_1" and so on."""
    hidden = (f"hidden_{number}{end}" for number in range(1, depth + 1) for end in ("_pre", ""))
    return ("embedding", *hidden)


LAYERS = layers_of(DEPTH)


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
    pairs = len(tokens_of(name, task_sizes(name, **sizes))) ** 2
    count = int(Fraction(str(fraction)) * pairs) if 0 < fraction < 1 else 0
    if not 2 <= count < pairs:
        raise ValueError(
            f"train_fraction: expected a share between 0 and 1 that leaves at least 2 of the {pairs} pairs for training and "
            f"1 for testing, got {fraction}"
        )
    return count


def tokens_of(name: str, sizes: dict[str, int]) -> range:
    """The tokens of a task with these sizes."""
    return range(24 if name == "s4" else sizes["p"] if name == "modular-addition" else 2 ** sizes["bits"])
