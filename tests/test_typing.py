"""The public surface, as a strict type checker sees it from outside."""

import os
import subprocess
import sys
from pathlib import Path

import lmnfast

CODE = """
from typing import Any

import torch
from torch import Tensor, nn

import lmnfast
from lmnfast.checkpoints import measure_checkpoints
from lmnfast.integrations import CSVWriter, TensorBoardWriter, WandbWriter
from lmnfast.integrations.lightning import LMNCallback
from lmnfast.integrations.transformers import LMNCallback as TransformersCallback

f, x = nn.Linear(3, 2), torch.randn(4, 3)
stacked = torch.func.stack_module_state([f, f])
L: Tensor = lmnfast.connectivity(f, x, method="path", points=9, rule="lobatto", budget=2**20)
value: Tensor = lmnfast.lmn(torch.tanh, x.expand(2, 4, 3), stacked=stacked)
numbers: tuple[Tensor, ...] = (
    lmnfast.eigenvalues(L, solver="cpu"),
    lmnfast.nonlinear_complexity(L),
    lmnfast.linear_mapping_number(L, negative="clip"),
    lmnfast.jacobians(f, x),
    lmnfast.jacobian_distances(f, x, affine=True, squared=True),
)
regions: int = lmnfast.linear_regions(f, x)
names: tuple[str, ...] = lmnfast.match_layers(f, ["*"])


def forward(model: nn.Module, batch: Any) -> Any:
    return model(batch["x"])


tail, samples = lmnfast.cut(f, "0", {"x": x}, forward=forward, output=lambda result: result[0])
module: nn.Module = tail
m: lmnfast.Measurement = lmnfast.measure(tail, samples)
bits: float = m.complexity_bits + float(lmnfast.Measurement(**m.to_dict()))
lmnfast.explain(f, "0", x, forward=forward, output="logits")
with lmnfast.Probe(f, x, "0", every=10, writers=[CSVWriter("lmn.csv"), TensorBoardWriter("runs")]) as probe:
    measured: bool = probe(3, loss=0.5)
    rows: list[dict[str, Any]] = probe.history + probe.new_rows(wait=True)
    probe.load_state_dict(probe.state_dict())
callbacks = LMNCallback(x, "0", every=2, points=9), TransformersCallback({"x": x}, "0"), WandbWriter(None)
table: list[dict[str, Any]] = measure_checkpoints("package:make", "*.pt", "x.npy", ["0"], jobs=2, out="lmn")
"""
WRONG = """
lmnfast.lmn(f)
bits = m.connectivity
lmnfast.cut(f, 0, x)
lmnfast.Probe(f, x, "0", writers=[print])
"""
# Packages that no annotation of ours comes from: with them mypy takes twice as long.
NOT_READ = (
    "lightning",
    "numpy",
    "sympy",
    "tensorboard",
    "torch._dynamo",
    "torch._export",
    "torch._functorch",
    "torch._higher_order_ops",
    "torch._inductor",
    "torch.ao",
    "torch.distributed",
    "torch.export",
    "torch.fx.experimental",
    "torch.fx.passes",
    "torch.onnx",
    "torch.profiler",
    "torch.testing",
    "torch.utils.tensorboard",
    "transformers",
)


def test_strict_code_that_uses_everything_passes_and_mistakes_do_not(tmp_path):
    (tmp_path / "code.py").write_text(CODE + WRONG)
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in NOT_READ)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\nfollow_imports = silent\n{skipped}")
    call = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "code.py"]
    # An editable install is found by Python alone.
    paths = {**os.environ, "MYPYPATH": str(Path(lmnfast.__file__).parent.parent)}
    found = subprocess.run(call, cwd=tmp_path, env=paths, capture_output=True, text=True, check=False).stdout
    wrong = CODE.count("\n") + 1
    reported = {
        int(line.split(":")[1])
        for line in found.splitlines()
        if line.startswith("code.py:") and "error" in line
    }
    assert reported == {wrong + 1, wrong + 2, wrong + 3, wrong + 4}, found
