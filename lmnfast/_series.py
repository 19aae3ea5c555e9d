"""Numbers of rows, as figures need them: the curves of a column, their labels, and correlations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ._nested import first_names
from ._observables import observables

Row = Mapping[str, Any]
Curve = dict[float, float]

# How columns are named on an axis, with their units. Any other column is named by itself.
NAMES = {
    "step": "Training step",
    "lmn": "LMN",
    "complexity_bits": "Complexity in bits",
    "curvature": "Curvature, 1 - r²",
    "pooled_curvature": "Pooled curvature",
    "negative_share": "Negative share",
    "constant_share": "Constant share",
    "jacobian_rank": "Rank of Jacobians",
    "local_complexity": "Crossings per path",
    "representation_rank": "Rank of samples",
    "l2_norm": "L2 norm",
}


def runs_of(rows: Any) -> dict[str, list[list[Row]]]:
    """The runs in the argument `rows`, by the names of the groups that they belong to; one group without names has "".

    Raises:
        TypeError, ValueError: no rows, or none in a group.
    """
    groups = rows if isinstance(rows, Mapping) else {"": rows}
    if not groups:
        raise ValueError("rows: expected rows, or groups of them, got none")
    return {str(name): _runs(group) for name, group in groups.items()}


def _runs(group: Any) -> list[list[Row]]:
    if hasattr(group, "to_dict"):  # a pandas.DataFrame
        group = group.to_dict("records")
    if not isinstance(group, Iterable) or isinstance(group, (str, bytes)):
        raise TypeError(f"rows: expected a list of rows, got {type(group).__name__}")
    whole: list[Any] = list(group)
    runs = _apart(whole) if all(isinstance(each, Mapping) for each in whole) else list(map(_run, whole))
    if not all(runs):
        raise ValueError("rows: expected one row or more in every run, got none")
    return runs


def _apart(rows: list[Row]) -> list[list[Row]]:
    """The runs in the rows of one table: those of a study have the columns task and seed."""
    tasks = list(dict.fromkeys(row.get("task") for row in rows))
    if len(tasks) > 1:
        raise ValueError(
            f"rows: expected rows of one task, got {first_names(map(str, tasks))}; choose among them"
        )
    runs: dict[Any, list[Row]] = {}
    for row in rows:
        runs.setdefault((row.get("run"), row.get("seed")), []).append(row)
    return list(runs.values()) or [rows]


def layer_of(row: Row) -> str:
    """The name of a row's layer; "" for a row of none."""
    layer = row.get("layer")
    return "" if layer is None or layer != layer else str(layer)  # NaN: an empty entry of pandas


def _run(run: Any) -> list[Row]:
    if hasattr(run, "to_dict"):
        run = run.to_dict("records")
    if not isinstance(run, (list, tuple)) or not all(isinstance(row, Mapping) for row in run):
        raise TypeError(f"rows: expected a list of rows, or of such lists, got {type(run).__name__} in it")
    return list(run)


def kinds() -> list[str]:
    """The numbers that each layer has: the observables, and the shares."""
    return [*(each.name for each in observables()), "constant_share"]


def number(value: Any, column: str) -> float:
    """A value as a float, NaN for an empty one. Raises ValueError if it is no number."""
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"rows: expected numbers in column {column!r}, got {value!r}") from None


def columns_of(rows: Sequence[Row], name: str, argument: str) -> dict[str, list[tuple[Row, str]]]:
    """The rows and the column that have a quantity, by layer; "" where it belongs to no layer.

    A quantity is a column (in rows with a column "layer": one for each layer), or the beginning of columns such as lmn_LAYER.

    Raises:
        ValueError: the rows have no such columns.
    """
    if any(name in row for row in rows):
        having = [row for row in rows if name in row]
        layers = dict.fromkeys(map(layer_of, having))
        return {layer: [(row, name) for row in having if layer_of(row) == layer] for layer in layers}
    if name in kinds():
        columns = dict.fromkeys(c for row in rows for c in row if c.startswith(f"{name}_") and c not in NAMES)
        if columns:
            return {c.removeprefix(f"{name}_"): [(row, c) for row in rows if c in row] for c in columns}
    known = dict.fromkeys(column for row in rows for column in row)
    raise ValueError(f"{argument}: expected a column of the rows ({first_names(known)}), got {name!r}")


def curves_of(rows: Sequence[Row], name: str, x: str, argument: str) -> dict[str, Curve]:
    """The curves of a quantity over a column x, by layer. Of rows with equal x the last counts.

    Where all layers have the same numbers, as a loss that stands in the row of every layer, there is one curve, of no layer.
    """
    found = {}
    for layer, entries in columns_of(rows, name, argument).items():
        points = {number(row.get(x), x): number(row[c], c) for row, c in entries}
        found[layer] = {place: points[place] for place in sorted(points) if not math.isnan(place)}
        if not found[layer]:
            raise ValueError(f"x: expected a column of the rows with numbers, got {x!r}")
    curves = list(found.values())
    if name not in kinds() and len(curves) > 1 and all(_equal(curve, curves[0]) for curve in curves):
        return {"": curves[0]}
    return found


def _equal(one: Curve, other: Curve) -> bool:
    return list(one) == list(other) and all(
        a == b or (a != a and b != b) for a, b in zip(one.values(), other.values())
    )


def points_of(rows: Sequence[Row], x: str, y: str, layer: str | None) -> list[tuple[float, float, Row]]:
    """The numbers of two quantities in the rows that have both, of one layer.

    Raises:
        ValueError: the rows lack one of them, or the layer; several layers and none is named.
    """
    there = dict.fromkeys(filter(None, map(layer_of, rows)))
    if there:
        layer = _one_of(there, layer)
        rows = [row for row in rows if layer_of(row) == layer]
    elif layer is not None and all(list(columns_of(rows, name, name)) == [""] for name in (x, y)):
        raise ValueError(f"layer: expected None, as the rows name no layer, got {layer!r}")
    columns = [_column(rows, name, argument, layer) for argument, name in (("x", x), ("y", y))]
    first, second = ([number(row.get(column), column) for row in rows] for column in columns)
    return [(a, b, row) for a, b, row in zip(first, second, rows) if not (math.isnan(a) or math.isnan(b))]


def label_of_layer(rows: Sequence[Row], name: str, argument: str, layer: str | None) -> str:
    """`label_of` a quantity in the rows of one layer, with the layer's name, which `points_of` has checked."""
    columns = {of: entries[0][1] for of, entries in columns_of(rows, name, argument).items()}
    of = layer if layer in columns else next(iter(columns))
    return label_of(name, rows, of if name in kinds() else "")


def _column(rows: Sequence[Row], name: str, argument: str, layer: str | None) -> str:
    columns = {of: entries[0][1] for of, entries in columns_of(rows, name, argument).items()}
    return columns[""] if list(columns) == [""] else columns[_one_of(columns, layer)]


def _one_of(layers: Iterable[str], layer: str | None) -> str:
    known = list(layers)
    if layer is None and len(known) == 1:
        return known[0]
    if layer not in known:
        raise ValueError(f"layer: expected one of {', '.join(known)}, got {layer!r}")
    return layer


def observables_in(groups: Mapping[str, list[list[Row]]]) -> list[str]:
    """LMN if the rows have it, otherwise the observables that have numbers in them."""
    first = next(iter(groups.values()))[0]
    there = {c for row in first for c, v in row.items() if isinstance(v, (int, float)) and not math.isnan(v)}
    found = [k for k in kinds() if k in there or any(c.startswith(f"{k}_") for c in there)]
    if not found:
        raise ValueError(
            "observables: expected the names of columns, as the rows have neither LMN nor an observable"
        )
    return found[:1] if found[0] == "lmn" else [k for k in found if k != "constant_share"] or found


def label_of(name: str, rows: Iterable[Row], layer: str = "") -> str:
    """The label of a quantity: its name with its unit; for LMN also the settings that the number depends on."""
    return _label_of(name, list(rows), layer).replace("$", r"\$")  # matplotlib takes $ for mathematics


def _label_of(name: str, rows: Sequence[Row], layer: str) -> str:
    if layer and name in NAMES:
        return _label_of(f"{name}_{layer}", rows, "")
    label = NAMES.get(name)
    if label is None:
        kind = next((kind for kind in kinds() if name.startswith(f"{kind}_") and kind in NAMES), None)
        if kind is None:
            return (name[:1].upper() + name[1:]).replace("_", " ")
        label = f"{NAMES[kind]} of {name.removeprefix(f'{kind}_')}"
    if not name.startswith(("lmn", "complexity_bits")):
        return label
    said = settings_of(rows)
    return f"{label} ({said})" if said else label


def settings_of(rows: Iterable[Row]) -> str:
    """What an LMN depends on, as far as rows say it: the number of samples, and settings other than the paper's."""
    rows = list(rows)

    def values(column: str) -> list[Any]:
        return list(dict.fromkeys(row[column] for row in rows if row.get(column) not in (None, "")))

    samples = sorted(values("samples"))
    said = [f"N = {samples[0]}" + (f" to {samples[-1]}" if len(samples) > 1 else "")] if samples else []
    methods = [m for m in values("method") if "+" not in str(m)]
    said += ["+".join(map(str, methods))] if methods and methods != ["path"] else []
    said += ["negative ones clipped"] if values("negative") == ["clip"] else []
    said += [f"stabiliser {s:g}" for s in values("stabiliser") if s and isinstance(s, (int, float))]
    return ", ".join(said)


def pearson(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's r; NaN for fewer than 3 pairs, or if one of the two series is constant."""
    if len(pairs) < 3 or min(len(set(series)) for series in zip(*pairs)) == 1:
        return float("nan")
    return torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1].item()
