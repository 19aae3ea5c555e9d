"""What the tests of the integrations share: samples, and what was logged."""

import csv
import glob

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


def scalars(folder, part=""):
    """{name: [(step, value), ...]} of TensorBoard's event files below a folder."""
    found = {}
    for path in sorted(glob.glob(f"{folder}/**/events*", recursive=True)):
        events = EventAccumulator(path).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((e.step, e.value) for e in events.Scalars(name))
    return {name: values for name, values in found.items() if part in name}


def same_weights(a, b):
    return all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def steps(callback):
    return [r["step"] for r in callback.history]
