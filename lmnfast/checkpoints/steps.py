"""Reads steps of training from the names of checkpoints."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

STEP = "(?:steps?|iter(?:ation)?s?|updates?)"
LABELS = {"step": STEP, "epoch": "(?:epochs?|(?<![a-z])ep)", "checkpoint": "(?:checkpoint|ckpt)"}
SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
LIMIT = 10**15  # larger numbers are identifiers; above 2^53 float64 cannot distinguish neighbours
# Digits that are not a number: those of a date and time, a version, a hash, a suffix.
OTHER = re.compile(
    r"(?<![0-9])[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[T_ -][0-9]{2}[-:.]?[0-9]{2}(?:[-:.]?[0-9]{2})?)?(?![0-9])"
    r"|[0-9]+(?:\.[0-9]+){2,}"
    r"|(?<![0-9A-Za-z])(?<![0-9][.,])(?![0-9]+e[0-9]+(?![0-9a-f]))(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{7,}"
    r"(?![0-9A-Za-z])"
    r"|\.(?:pt2|h5|hdf5)$"
)
NUMBER = re.compile(
    r"(?P<digits>[0-9]+(?:[.,][0-9]+)*)(?P<exponent>[eE][+-]?[0-9]+)?"
    rf"(?:(?P<scale>[kKmMbBgG])(?=(?:{STEP}|tok(?:en)?s?|img)?(?![0-9A-Za-z])))?"
)


@dataclass(frozen=True)
class _Number:
    """A number in a name."""

    text: str
    value: int | float | None  # None: the notation is ambiguous
    label: str | None  # one of LABELS
    before: str  # letters immediately before the number
    unit: str  # letters immediately after the number


def steps_of(checkpoints: Sequence[str]) -> list[int | float] | None:
    """The step in each name.

    The step is the number after "step", "iter" or "update", or directly before such a word. If there is none, it is the number
    after "epoch". If there is none, it is the number after "checkpoint". If there is none, it is the number in which the names
    differ. 5e3, 1k, 2M, 1,000 and 0.25 are read by their values. A single file has a step if its name has such a word, or if
    its only number has no letters beside it. If its name has no number, the name of its folder is used.

    Args:
        checkpoints: names of files of one training.

    Returns:
        The steps, in the order of the arguments; None if no name has a number.

    Raises:
        ValueError: some names have such a number and others have none; two names have the same number; several numbers
            could be the step; or the notation of the number is ambiguous.
    """
    found = [_numbers(name) for name in _apart(checkpoints)]
    if not any(found):
        return None
    labelled = {label: column for label in LABELS if (column := _labelled(found, label))}
    step = labelled.pop("step", None) or next(filter(_differ, labelled.values()), None)
    if step is None and len(found) == 1:
        (numbers,) = found
        if len(numbers) > 1 or numbers[0].before or numbers[0].unit:
            return None
        step = numbers
    if step is None and len({len(numbers) for numbers in found}) == 1:
        columns = [list(column) for column in zip(*found, strict=True) if _differ(column)]
        # Beside an epoch, a number without a word is the step within the epoch. A number with a word, such as a seed, is not.
        if "epoch" in labelled:
            columns = [column for column in columns if not any(number.before for number in column)]
        orders = {tuple(sorted(range(len(found)), key=lambda k: column[k].value)) for column in columns}
        step = columns[0] if len(orders) == 1 else None
    if step is None:
        bare = [name for name, numbers in zip(checkpoints, found, strict=True) if not numbers]
        if bare:
            raise ValueError(
                f"steps: {bare[0]!r} has no number that could be its step, others have; leave it out"
            )
        raise ValueError(
            f"steps: cannot tell the step from the numbers in {checkpoints[0]!r} and {checkpoints[-1]!r}; expected "
            "one after 'step', as in step_100.pt"
        )
    first: dict[int | float | None, str] = {}
    for name, number in zip(checkpoints, step, strict=True):
        if number.value is None or number.unit != step[0].unit:
            raise ValueError(f"steps: cannot read {number.text + number.unit!r} in {name!r}; rename the file")
        if number.value in first:
            raise ValueError(
                f"steps: {first[number.value]!r} and {name!r} are both of step {number.text}; expected one training"
            )
        first[number.value] = name
    return [number.value for number in step if number.value is not None]


def _labelled(found: Sequence[Sequence[_Number]], label: str) -> list[_Number]:
    """The last number with the label in each name; [] if a name has no such number."""
    last = [[number for number in numbers if number.label == label][-1:] for numbers in found]
    return [number for numbers in last for number in numbers] if all(last) else []


def _differ(column: Sequence[_Number]) -> bool:
    """Whether the numbers are readable, have the same unit, and are all different."""
    values = {number.value for number in column} - {None}
    return len(values) == len(column) and len({number.unit for number in column}) == 1


def _apart(checkpoints: Sequence[str]) -> list[str]:
    """The names without the folders that all names share."""
    paths = [os.path.abspath(path) for path in checkpoints]
    if len(paths) == 1:
        folder, name = os.path.split(paths[0])
        folder = os.path.basename(folder)
        in_folder = not _numbers(name) and any(number.label for number in _numbers(folder))
        return [folder if in_folder else name]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def _numbers(name: str) -> list[_Number]:
    name = OTHER.sub(lambda match: "#" * len(match[0]), name)
    matches = list(NUMBER.finditer(name))
    ends = [0, *(match.end() for match in matches)]
    starts = [*(match.start() for match in matches), len(name)]
    found = []
    for k, match in enumerate(matches):
        text, behind = name[ends[k] : starts[k]], name[ends[k + 1] : starts[k + 1]]
        before, unit = re.search("[A-Za-z]*$", text)[0], re.match("[A-Za-z]*", behind)[0]  # type: ignore[index]
        labels = [
            label for label, words in LABELS.items() if re.search(f"{words}[^0-9a-z]*$", text, re.IGNORECASE)
        ]
        label = labels[0] if labels else None
        value = _value(match)
        if match["exponent"] and (unit or (before and label is None)):
            value = None  # bs32e10: a batch size and an epoch
        if label is None and re.match(f"[ _-]?{STEP}(?![a-z])", behind, re.IGNORECASE):
            label, unit = "step", ""
        grouped = re.match(r"[0-9]{1,3}[_. '][0-9]{3}(?![0-9A-Za-z])", name[match.start() :])
        if label == "step" and (grouped or isinstance(value, float)):
            value = None  # 1_000 and 12.500 may or may not mean thousands
        found.append(_Number((grouped or match)[0], value, label, before, unit))
    return found


def _value(match: re.Match[str]) -> int | float | None:
    digits, exponent, scale = match["digits"], match["exponent"] or "", match["scale"] or ""
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", digits):
        digits = digits.replace(",", "")
    if (
        "," in digits
        or len(exponent) > 4
        or (exponent and not re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", digits))
    ):
        return None
    value = Decimal(digits + exponent) * SCALES[scale.lower()]
    if value >= LIMIT:
        return None
    return int(value) if value == int(value) else float(value)
