"""An install without the compiled core: how it is built, what it says, and that its numbers are those of the kernels."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import run_fresh
from support import COMPILED

from lmnfast import _native, _without_core

ROOT = Path(__file__).parent.parent

NUMBERS = """
import copy
import torch, lmnfast
from torch import nn

torch.manual_seed(0)
chain = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 4))
x = torch.randn(24, 6)
x[5] = x[4]
x[7] = x[6] + 1e-5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, h):
        return h + self.down(nn.functional.gelu(self.up(self.norm(h))))


numbers = {}
low = copy.deepcopy(chain).bfloat16()
for name, f in {"chain": chain, "low": low, "block": Block(), "other": lambda v: chain(v).cumsum(1)}.items():
    own = x.bfloat16() if name == "low" else x
    for method in ("path", "hermite", "hermite-midpoint", "jacobian"):
        if name == "block" and method.startswith("hermite"):
            continue
        numbers[name, method] = lmnfast.lmn(f, own, method=method).item()
numbers["stabilised"] = lmnfast.lmn(chain, x, stabiliser=0.01).item()
numbers["curvature"] = float(lmnfast.curvature(chain, x, pairs=50, generator=torch.Generator().manual_seed(0)))
numbers["distances"] = lmnfast.jacobian_distances(chain, x).sum().item()
numbers["jacobians"] = lmnfast.jacobians(chain, x).abs().sum().item()
probe = lmnfast.Probe(chain, x, "2", every=1)
probe(0)
numbers["probe"] = probe.history[0]["lmn"]
print(lmnfast._native.HAS_CORE)
for name, number in numbers.items():
    print(name, repr(number))
"""


def numbers(script: Path, **environment: str) -> tuple[str, dict[str, float]]:
    done = run_fresh(script, script.parent, **environment)
    assert done.returncode == 0, done.stderr
    core, *lines = done.stdout.splitlines()
    return core, {name: float(number) for name, _, number in (line.rpartition(" ") for line in lines)}


@COMPILED
def test_every_number_is_that_of_the_kernels(tmp_path):
    script = tmp_path / "numbers.py"
    script.write_text(NUMBERS)
    with_core, ours = numbers(script)
    without, by_reference = numbers(script, LMNFAST_CORE="off")
    assert (with_core, without) == ("True", "False") and len(ours) > 15
    for name, number in ours.items():
        assert by_reference[name] == pytest.approx(number, rel=1e-4), name


def test_the_environment_leaves_the_core_out_and_information_and_explanations_say_so(tmp_path):
    script = tmp_path / "said.py"
    script.write_text(
        "import torch, lmnfast; from torch import nn; print(lmnfast._native.info())\n"
        "model = nn.Sequential(nn.Linear(2, 3), nn.SiLU(), nn.Linear(3, 2))\n"
        "assert lmnfast.explain(model, '0')['0'].route == 'reference'\n"
    )
    said = run_fresh(script, tmp_path, LMNFAST_CORE="off").stdout
    assert "'core': 'none, as LMNFAST_CORE is off', 'isa': 'reference'" in said
    assert "by reference, without the compiled core, as LMNFAST_CORE is off: 3 silu -> 2" in said
    for name, value, message in (
        ("LMNFAST_ISA", "avx2", "LMNFAST_ISA: expected one of reference on this machine, got 'avx2'"),
        ("LMNFAST_CORE", "no", "LMNFAST_CORE: expected auto, on or off, got 'no'"),
    ):
        done = run_fresh(script, tmp_path, **{"LMNFAST_CORE": "off", name: value})
        assert done.returncode and message in done.stderr


@pytest.fixture
def left_out(monkeypatch, tmp_path):
    """Writes the reason that a build leaves in the package, and loads the core as an import does."""
    monkeypatch.delenv("LMNFAST_CORE", raising=False)
    monkeypatch.setattr(_without_core, "LEFT_OUT", tmp_path / "reason.txt")

    def load(reason: str) -> tuple[object, str | None]:
        (tmp_path / "reason.txt").write_text(f"{reason}\n")
        return _native._load()

    return load


def test_an_install_without_the_core_on_purpose_says_nothing(left_out):
    assert left_out(_without_core.ON_REQUEST) == (_without_core, _without_core.ON_REQUEST)


def test_an_install_without_a_compiler_warns(left_out):
    with pytest.warns(
        UserWarning, match=r"without its compiled core, as no C\+\+ compiler was found: numbers are right"
    ):
        assert left_out("no C++ compiler was found")[0] is _without_core


def test_a_core_that_is_asked_for_and_is_not_there_is_an_error(left_out, monkeypatch):
    monkeypatch.setenv("LMNFAST_CORE", "on")
    with pytest.raises(ImportError, match="installed without its compiled core, as LMNFAST_CORE is off"):
        left_out(_without_core.ON_REQUEST)


def test_a_broken_core_of_a_usual_install_is_an_error(monkeypatch, tmp_path):
    monkeypatch.delenv("LMNFAST_CORE", raising=False)
    monkeypatch.setattr(_without_core, "LEFT_OUT", tmp_path / "absent.txt")
    monkeypatch.setitem(sys.modules, "lmnfast._C", None)
    monkeypatch.delattr(sys.modules["lmnfast"], "_C", raising=False)
    with pytest.raises(ImportError, match="compiled core is missing or does not load"):
        _native._load()


@COMPILED
def test_the_stand_in_has_what_is_asked_of_the_core():
    for name in ("cuda_archs", "findings", "isometry_units", "isa", "isas", "use_isa", "advise_huge_pages"):
        assert type(getattr(_without_core, name)) is type(getattr(_native._C, name)) or callable(
            getattr(_native._C, name)
        )
    assert _without_core.findings == _native._C.findings


def built(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py, with an empty folder as PATH beside what the environment gives."""
    (tmp_path / "none").mkdir(exist_ok=True)
    plain = {name: value for name, value in os.environ.items() if name not in ("CXX", "LMNFAST_CORE")}
    command = [sys.executable, str(ROOT / "setup.py"), "-q", *arguments]
    environment = plain | {"PATH": str(tmp_path / "none")} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def build(tmp_path: Path, **environment: str) -> tuple[str, list[str]]:
    """What a build of the package says, and the files that it would install."""
    pytest.importorskip("setuptools", reason="needs setuptools")
    folders = [f"--build-base={tmp_path}/build", f"--build-lib={tmp_path}/lib"]
    egg = ["egg_info", f"--egg-base={tmp_path}"]
    done = built(tmp_path, *egg, "build", *folders, **environment)
    assert done.returncode == 0, done.stderr
    return done.stderr, sorted(path.name for path in (tmp_path / "lib/lmnfast").iterdir())


def test_a_build_on_request_is_pure_python_and_holds_the_reason(tmp_path):
    _, files = build(tmp_path, LMNFAST_CORE="off")
    assert _without_core.LEFT_OUT.name in files and not any(name.startswith("_C.c") for name in files)
    assert (
        tmp_path / "lib/lmnfast" / _without_core.LEFT_OUT.name
    ).read_text().strip() == _without_core.ON_REQUEST


def test_a_build_without_a_compiler_is_pure_python_and_says_so(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no CMake")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/cmake").symlink_to(cmake)
    said, _ = build(tmp_path)
    reason = (tmp_path / "lib/lmnfast" / _without_core.LEFT_OUT.name).read_text().strip()
    assert reason == "no C++ compiler was found when it was installed"
    assert f"the compiled core is left out, as {reason}" in said


def test_a_build_that_asks_for_the_core_fails_without_a_compiler(tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools")
    done = built(
        tmp_path, "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}/lib", LMNFAST_CORE="on"
    )
    assert done.returncode and re.search("lmnfast needs (CMake|a C)", done.stderr)
    done = built(tmp_path, "--version", LMNFAST_CORE="perhaps")
    assert done.returncode and "LMNFAST_CORE: expected auto, on or off, got 'perhaps'" in done.stderr
