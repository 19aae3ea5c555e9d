"""LMN in a hand-written training loop, logged to a CSV file. If the training is stopped, the same command continues it.

python examples/plain_loop.py --steps 600 --run runs/plain
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lmnfast
from lmnfast.integrations import CSVWriter

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--every", type=int, default=50)
parser.add_argument("--run", type=Path, default=Path("runs/plain"))
arguments = parser.parse_args()

torch.manual_seed(0)
inputs = torch.randn(256, 10)
labels = (inputs[:, :2].prod(1) > 0).long()  # exclusive or of two signs: no linear map can learn it
model = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

arguments.run.mkdir(parents=True, exist_ok=True)
checkpoint = arguments.run / "checkpoint.pt"
writer = CSVWriter(arguments.run / "lmn.csv", resume=True)  # the run's folder has only rows of this run
start = 0
with lmnfast.Probe(model, inputs, ["0", "1"], every=arguments.every, writers=[writer]) as probe:
    if checkpoint.exists():
        state = torch.load(checkpoint)
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        probe.load_state_dict(state["probe"])
        print(f"resumed at step {start}")
    for step in range(start, arguments.steps + 1):
        loss = F.cross_entropy(model(inputs), labels)
        probe(step, loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % arguments.every == 0:
            state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "probe": probe.state_dict()}, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

for row in probe.history:
    print(f"step {row['step']:5d}   layer {row['layer']}   loss {row['loss']:.4f}   LMN {row['lmn']:.2f}")
print(f"written to {writer.path}")
