"""Every op is found under its name in every folder; this walks the list and fails when one is not."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmnfast
from lmnfast import _native, ops, reference

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ops.__all__)
def test_an_op_has_its_kernel_reference_test_and_bench(name):
    for place in (
        f"csrc/cpu/{name}.cpp",
        f"csrc/cuda/{name}.cu",
        f"lmnfast/ops/{name}.py",
        f"tests/test_{name}.py",
        f"bench/bench_{name}.py",
    ):
        assert (ROOT / place).is_file(), place
    assert callable(getattr(reference, name))
    for entry in (f"{name}_cpu", f"{name}_cuda"):
        assert entry in (ROOT / "csrc/ops.h").read_text(), entry
    assert hasattr(torch.ops.lmnfast, name)
    tests = (ROOT / f"tests/test_{name}.py").read_text()
    for part in (f"reference.{name}", "opcheck", "torch.compile", "device", "dtype"):
        assert part in tests, f"tests/test_{name}.py does not use {part}"


def test_no_kernel_file_is_without_an_op():
    folders = ("csrc/cpu", "csrc/cuda", "lmnfast/ops")
    files = {
        p.stem for folder in folders for p in (ROOT / folder).iterdir() if p.suffix in (".cpp", ".cu", ".py")
    }
    assert files - {"__init__"} == set(ops.__all__)


def test_the_reference_does_not_know_the_compiled_core():
    assert "_native" not in inspect.getsource(reference) and "_C" not in inspect.getsource(reference)


@pytest.mark.parametrize("name", lmnfast.__all__)
def test_public_names_are_documented_and_typed(name):
    item = getattr(lmnfast, name)
    assert item.__doc__
    if inspect.isfunction(item):
        assert set(inspect.signature(item).parameters) | {"return"} == set(item.__annotations__)


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_importing_neither_draws_nor_seeds():
    code = (
        "import sys, torch; before = torch.get_rng_state(); import lmnfast; "
        "assert torch.equal(before, torch.get_rng_state()); "
        "assert not {'matplotlib', 'torch._dynamo'} & set(sys.modules); assert not torch.cuda.is_initialized()"
    )
    assert in_a_new_process(code).returncode == 0


def test_the_environment_chooses_the_instruction_set():
    for isa in _native._C.isas():
        done = in_a_new_process("import lmnfast; print(lmnfast._native.info()['isa'])", LMNFAST_ISA=isa)
        assert done.stdout.strip() == isa
    done = in_a_new_process("import lmnfast", LMNFAST_ISA="mmx")
    assert (
        done.returncode
        and "LMNFAST_ISA: expected one of baseline" in done.stderr
        and "got 'mmx'" in done.stderr
    )


def test_the_readmes_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    said = capsys.readouterr().out
    assert "Measurement(lmn=" in said and "'layer': '1'" in said
