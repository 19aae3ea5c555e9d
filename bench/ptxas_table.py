"""Registers, stack, spills and static shared memory of every CUDA kernel, from the build's output:

NVCC_APPEND_FLAGS="-Xptxas -v" pip install -v . 2>&1 | python bench/ptxas_table.py

The exit code is 1 if a kernel spills registers, or if the output has no kernel.
"""

import re
import subprocess
import sys
from pathlib import Path

LINES = {
    "entry": re.compile(r"Compiling entry function '(\w+)' for '(\w+)'"),
    "properties": re.compile(r"Function properties for (\w+)"),
    "stack": re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"),
    "registers": re.compile(r"Used (\d+) registers"),
}
COLUMNS = ("target", "registers", "stack", "spill stores", "spill loads", "static shared")


def kernels(log: str) -> dict[tuple[str, str], list[int]]:
    """From (mangled name, target) to registers, and bytes of stack frame, spill stores, spill loads, static shared memory."""
    found: dict[tuple[str, str], list[int]] = {}
    entry, described = None, None
    for line in log.splitlines():
        if match := LINES["entry"].search(line):
            entry = match.groups()
        elif match := LINES["properties"].search(line):
            described = match[1]  # the kernel, or after it a function that the kernel calls
        elif (match := LINES["stack"].search(line)) and entry and described == entry[0]:
            found[entry] = [0, *map(int, match.groups()), 0]
        elif match and entry in found:  # the spills of such a function count as spills of its kernel
            found[entry][2] += int(match[2])
            found[entry][3] += int(match[3])
        elif (match := LINES["registers"].search(line)) and entry in found:
            shared = re.search(r"(\d+) bytes smem", line)
            found[entry][0], found[entry][-1] = int(match[1]), int(shared[1]) if shared else 0
    return found


def readable(names: list[str]) -> list[str]:
    plain = subprocess.run(
        ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [re.sub(r"lmn::|\(anonymous namespace\)::", "", name) for name in plain.stdout.splitlines()]


def main() -> int:
    found = kernels(Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else sys.stdin.read())
    names = readable([name for name, _ in found])
    rows = sorted(
        (name, target, *numbers) for name, (_, target), numbers in zip(names, found, found.values())
    )
    width = max(map(len, names), default=0)
    print(f"{'kernel':{width}}", *COLUMNS, sep="  ")
    for name, *values in rows:
        cells = (f"{value:>{len(column)}}" for value, column in zip(values, COLUMNS))
        print(f"{name:{width}}", *cells, sep="  ")
    spilling = sorted({name for name, _, _, _, stores, loads, _ in rows if stores or loads})
    if spilling or not rows:
        print("registers spilled in:" if rows else "no kernel found", *spilling, sep="\n  ", file=sys.stderr)
    return 1 if spilling or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
