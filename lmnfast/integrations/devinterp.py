"""Local learning coefficients of devinterp as columns of our rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The mean over the chains and its standard deviation: in devinterp 2 (llc, compute_llc) and in devinterp 1 (get_results).
NAMES = {"llc_mean": ("llc_mean", "llc/mean"), "llc_std": ("llc_std", "llc/std")}


def with_llc(
    rows: Sequence[Mapping[str, Any]], results: Mapping[Any, Any], by: str = "step"
) -> list[dict[str, Any]]:
    """Rows with the local learning coefficients that devinterp estimated at the same steps.

    The coefficient is one number of the whole network, so all layers of a step get the same one. `lmnfast.plot.against` and
    `lmnfast.plot.history` draw the columns. devinterp need not be installed.

    Args:
        rows: as `Probe.history`, `lmnfast.history` and `measure_checkpoints` return them.
        results: for each step (or checkpoint) what devinterp returned: the dataset of llc() or compute_llc() of version 2, or
            the dict of version 1 ("llc/mean", "llc/std").
        by: the column of the rows that the keys of results stand in: "step", or "checkpoint".

    Returns:
        Copies of the rows with two columns more, llc_mean and llc_std; None where there is no result.

    Raises:
        ValueError: rows without the column, or with one of the new ones; a result for none of the rows, or without the two
            numbers, as that of an online estimator, which has one for each draw.

    Example:
        >>> from lmnfast.integrations import with_llc
        >>> rows = [{"step": 0, "layer": "0", "lmn": 1.5}, {"step": 100, "layer": "0", "lmn": 2.5}]
        >>> results = {100: {"llc_mean": 8.25, "llc_std": 0.5}}  # {step: devinterp.slt.llc.llc(model, ...)}
        >>> [(row["lmn"], row["llc_mean"]) for row in with_llc(rows, results)]
        [(1.5, None), (2.5, 8.25)]
    """
    for row in rows:
        if by not in row:
            raise ValueError(f"by: expected a column of the rows, got {by!r}; they have {', '.join(row)}")
        if clash := set(NAMES) & set(row):
            raise ValueError(
                f"rows: expected none with {', '.join(sorted(clash))}, got them at {by} {row[by]!r}"
            )
    if unknown := set(results) - {row[by] for row in rows}:
        raise ValueError(
            f"results: expected a {by} of the rows for each, got {sorted(unknown, key=str)[0]!r}"
        )
    found = {key: _columns(key, result) for key, result in results.items()}
    return [{**row, **found.get(row[by], dict.fromkeys(NAMES))} for row in rows]


def _columns(key: Any, result: Any) -> dict[str, float]:
    columns = {}
    for column, names in NAMES.items():
        present = [name for name in names if name in result]
        if not present:
            raise ValueError(
                f"results: expected {' or '.join(names)} in each, got at {key!r} {', '.join(map(str, result))}"
            )
        columns[column] = float(result[present[0]])
    return columns
