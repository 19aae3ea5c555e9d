"""Runs of a study without files: rows of given values."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lmnfast.grokking.config import Config
from lmnfast.grokking.run import Run


def run(
    lmn: Sequence[float],
    *,
    memorised: int = 2,
    generalised: int | None = None,
    test_loss: Sequence[float] | None = None,
    l2_norm: Sequence[float] | None = None,
    test_accuracy: Sequence[float] | None = None,
    observables: Mapping[str, Sequence[float]] | None = None,
    every: int = 100,
) -> Run:
    """A run of these values of LMN, one each `every` steps.

    Args:
        lmn: the values; they are also those of the other series that are None.
        memorised: the index of the first row with train accuracy 1.
        generalised: that of the first row with test accuracy 1; None: no row.
        test_loss, l2_norm, test_accuracy: the values.
        observables: the values of further observables of hidden_1, by name.
        every: the steps from row to row.
    """
    more = observables or {}
    n = len(lmn)
    rows = [
        {
            "step": k * every,
            "lmn_hidden_1": float(value),
            "test_loss": float(value if test_loss is None else test_loss[k]),
            "l2_norm": float(1 if l2_norm is None else l2_norm[k]),
            "train_accuracy": float(k >= memorised),
            "test_accuracy": float(
                test_accuracy[k]
                if test_accuracy is not None
                else generalised is not None and k >= generalised
            ),
            **{f"{name}_hidden_1": float(values[k]) for name, values in more.items()},
        }
        for k, value in zip(range(n), lmn)
    ]
    return Run(Path("run"), Config("xor", observables=tuple(more)), rows, {})
