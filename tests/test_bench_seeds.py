"""The check of seeds that train together for a card, here small and on the CPU."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "bench" / "seeds.py"


@pytest.mark.parametrize("tolerance", [1e-3, -1.0])
def test_it_times_seeds_together_and_fails_if_one_is_not_its_run_alone(tolerance, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("seeds", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TOLERANCE = tolerance
    monkeypatch.setattr(
        sys, "argv", ["seeds.py", "--seeds", "3", "--steps", "4", "--task", "s4", "--device", "cpu"]
    )
    assert module.main() == (tolerance < 0)
    printed = capsys.readouterr()
    assert ("expected differences of at most" in printed.err) == (tolerance < 0)
    rows = [line for line in printed.out.splitlines() if "largest relative difference" in line]
    assert [line.split(",")[0] for line in rows[:: len(rows) // 3]] == ["| seed 0", "| seed 1", "| seed 2"]
