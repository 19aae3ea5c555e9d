"""Stands in for the compiled core in an install without it. The ops then run by ``lmnfast.reference``.

It has what callers ask the compiled core before they call an op, and none of the core's ops.
"""

from pathlib import Path

# The build writes this file if it leaves the core out. It holds the reason, in words that can follow "as".
LEFT_OUT = Path(__file__).with_suffix(".txt")
ON_REQUEST = "LMNFAST_CORE is off"  # the reason if the user asked for it

cuda_archs = ""
findings = 12  # kFindings in csrc/ops.h
isometry_units = 0


def left_out() -> str | None:
    """Why the build left the core out; None if it did not."""
    try:
        return LEFT_OUT.read_text(encoding="utf-8").strip() or ON_REQUEST
    except FileNotFoundError:
        return None


def isa() -> str:
    """What takes the place of an instruction set."""
    return "reference"


def isas() -> list[str]:
    """All that can be chosen."""
    return ["reference"]


def use_isa(name: str) -> bool:
    """Whether this can be chosen."""
    return name == "reference"


def advise_huge_pages(address: int, count: int) -> None:
    """Torch's operations gain nothing by it."""
