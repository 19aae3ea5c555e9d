"""What public calls cost, counted."""

import importlib.util
from pathlib import Path

import torch

FILE = Path(__file__).parent.parent / "bench" / "calls.py"


def test_a_row_counts_what_a_call_does():
    spec = importlib.util.spec_from_file_location("calls", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROUNDS = 2
    known = module.calls(6, "cpu")
    assert module.counted(lambda: torch.ones(3).add(1).mul(2), "cpu")["torch calls"] == 3
    line = module.row("model(inputs)", known["model(inputs)"], "cpu")
    _, calls, kernels, copies, waits, *times, command = line.strip("| ").split(" | ")
    assert int(calls) == 5 and (kernels, copies, waits) == ("0", "0", "0")
    assert all(float(time) >= 0 for time in times) and command == "`python bench/calls.py 'model(inputs)'`"
    for call in known.values():
        call()
