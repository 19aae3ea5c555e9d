"""Tables and numbers in the Markdown of the reports."""

import math
from collections.abc import Iterable, Sequence


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def number(value: float) -> str:
    """A number as text: three digits, more if there are more before the point; "-" for NaN, "never" for infinity."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "never"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
