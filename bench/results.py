"""The table of a benchmark run, and the machine on which it ran.

python bench/results.py DIRECTORY COMMAND PART.json...   merges pytest-benchmark's files into DIRECTORY/<card>.json and .md
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import torch

from lmnfast.runs.device import processor

COLUMNS = {  # columns that are computed from extra_info
    "over its floor": lambda stats, info: stats["median"] / info["floor_s"] if info.get("floor_s") else None,
    "one call ms": lambda stats, info: info.get("call_ms"),
    "error of L": lambda stats, info: info.get("L error"),
    "error of LMN": lambda stats, info: info.get("LMN error"),
}


def table(records: list[dict], commands: bool = False) -> list[str]:
    """Lines of Markdown. A record has group, name, extra_info and stats, as pytest-benchmark saves them. With `commands` it
    also has fullname, and each row has the command that makes only this row."""
    groups = defaultdict(list)
    for record in records:
        groups[record["group"]].append(record)
    shown = [
        c for c, of in COLUMNS.items() if any(of(r["stats"], r["extra_info"]) is not None for r in records)
    ]
    head = ["problem", "bar", "median ms", "min ms", "median over ours", *shown, *["command"] * commands]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "--:|" * (3 + len(shown)) + "---|" * commands]
    for group, members in groups.items():
        ours = next((r["stats"]["median"] for r in members if r["extra_info"].get("bar") == "ours"), None)
        for row, r in enumerate(sorted(members, key=lambda r: r["stats"]["median"])):
            stats, info = r["stats"], r["extra_info"]
            numbers = [of(stats, info) for of in (COLUMNS[c] for c in shown)]
            cells = [
                "" if row else group,
                info.get("bar", r["name"]),
                f"{stats['median'] * 1e3:.4g}",
                f"{stats['min'] * 1e3:.4g}",
                f"{stats['median'] / ours:.3g}" if ours else "",
                *("" if number is None else f"{number:.2g}" for number in numbers),
                *[f"`pytest '{r.get('fullname')}'`"] * commands,
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def machine() -> dict[str, str]:
    """Facts about the machine that affect the numbers, with the card if there is one."""
    facts = {
        "processor": f"{processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": _output("git", "describe", "--always", "--dirty", "--exclude=*") or "unknown",
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i0")
        facts = {
            "card": f"{card.name}, {card.multi_processor_count} SMs, {card.total_memory / 2**30:.0f} GiB",
            "driver": driver or "unknown",
            "CUDA of torch": str(torch.version.cuda),
            **facts,
        }
    return facts


def _output(*command: str) -> str:
    """The first line that a command prints; empty if the command does not run."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.strip().partition("\n")[0]


def main(directory: str, command: str, *parts: str) -> None:
    merged = [json.loads(Path(part).read_text()) for part in parts]
    records = [record for part in merged for record in part["benchmarks"]]
    facts = machine()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    stem = Path(directory) / re.sub(r"\W+", "-", card).strip("-").lower()
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(
        json.dumps(
            {"date": str(date.today()), "command": command, "machine": facts, "benchmarks": records}, indent=1
        )
    )
    heading = [f"# Benchmarks on {card}", "", f"- date: {date.today()}", f"- command: `{command}`"]
    heading += [f"- {name}: {value}" for name, value in facts.items()]
    stem.with_suffix(".md").write_text("\n".join([*heading, "", *table(records, commands=True), ""]))
    print(f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    main(*sys.argv[1:])
