"""How the rows (..., width) of a tensor lie, in symbols: sizes that a forward reads, and views that keep each row whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ._recognise import NotAChain


class Size(Enum):
    """A size that a graph does not say. The samples are (N, d) or (N, T, d)."""

    SAMPLES = "N"
    TOKENS = "T"
    ROWS = "N T, or N without T"
    LEADING = "N and T, or N: two entries or one"
    WIDTH = "d"


class Layout(Enum):
    """How the rows of a tensor lie. All have the same rows in the same order in memory."""

    OWN = "as the samples: (N, T, width) or (N, width)"
    TOKENS = "(N, T, width), also if the samples are (N, d)"
    ROWS = "(N T, width)"
    FLAT = "(N, T width)"


@dataclass(frozen=True)
class Sizes:
    """The shape of a tensor. width: a number, or Size.WIDTH."""

    layout: Layout
    width: Any

    def entries(self) -> tuple[Any, ...]:
        if self.layout == Layout.OWN:
            return Size.LEADING, self.width
        if self.layout == Layout.ROWS:
            return Size.ROWS, self.width
        if self.layout == Layout.TOKENS:
            return Size.SAMPLES, Size.TOKENS, self.width
        raise NotAChain("a shape is read behind a flatten")

    def __getitem__(self, index: Any) -> Any:
        """An entry, or the leading entries. An index 1 or 2 of a shape like the samples' is that of (N, T, d)."""
        entries = self.entries()
        if index == slice(None, -1, None):
            return entries[:-1]
        if index == slice(-1, None, None):
            return entries[-1:]
        entries = (Size.SAMPLES, Size.TOKENS, self.width) if self.layout == Layout.OWN else entries
        if index == slice(None, 2, None) and len(entries) == 3:
            return entries[:2]
        if index in (0, 1, 2, -1) and index < len(entries):
            return entries[index]
        raise NotAChain(f"the entry {index} of a shape")


def product(one: Any, other: Any) -> Any:
    """A product of two sizes."""
    if one == Size.SAMPLES and _is_tokens(other):
        return Size.ROWS
    raise NotAChain("arithmetic with sizes")


def viewed(lead: tuple[Any, ...], last: Any, width: Any) -> Layout:
    """The layout of a view of rows with these sizes. Raises NotAChain unless it keeps each row whole, or is flat.

    A number in place of T holds for samples with as many tokens. On others the view fails, or its result has another number of
    rows along the first dimension, and f with it.

    lead, last: the sizes; -1 is left to the view. width: of the rows.
    """
    kept = last == width
    if lead in ((-1,), (Size.SAMPLES,), (Size.ROWS,)) and kept:
        return Layout.ROWS
    if lead in ((Size.LEADING,), (Size.ROWS,)) and (kept or last == -1):
        return Layout.OWN if lead == (Size.LEADING,) else Layout.ROWS
    if len(lead) == 2 and _is_tokens(lead[1]):
        if lead[0] == Size.SAMPLES and (kept or last == -1):
            return Layout.OWN
        if lead[0] == -1 and kept:
            return Layout.OWN
    if lead == (Size.SAMPLES, -1) and kept:
        return Layout.TOKENS
    if lead == (Size.SAMPLES,) and type(last) is int:
        return Layout.FLAT
    raise NotAChain("a view that may take rows apart")


def _is_tokens(size: Any) -> bool:
    """Whether a size is T. A number 1 is not, as a view to (N, 1, d) is possible for samples (N, d)."""
    return size == Size.TOKENS or (type(size) is int and size > 1)
