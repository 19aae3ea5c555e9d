"""Builds the extension by CMake. CMakeLists.txt is the only description of the build; the metadata is in pyproject.toml.

LMNFAST_CORE=off leaves the extension out, and so does LMNFAST_CORE=auto, the default, where there is no compiler or no CMake.
The package is then pure Python, and a file in it says why (lmnfast/_without_core.py).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError

ROOT = Path(__file__).parent.resolve()
LEFT_OUT = "_without_core.txt"
NO_CMAKE = "lmnfast needs CMake 3.24 or newer to build: pip install cmake"
NO_COMPILER = "lmnfast needs a C++17 compiler to build (Debian: apt install g++), or CXX set to one"


def _jobs() -> int:
    """The number of compilers that run at the same time.

    It is MAX_JOBS, as for torch's own extensions; else CMAKE_BUILD_PARALLEL_LEVEL; else the number of cores that this process
    may use.
    """
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        if given := os.environ.get(name):
            if not given.isdecimal() or int(given) < 1:
                raise ExecError(f"{name}: expected a number of jobs, at least 1, got {given!r}")
            return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_compiler() -> bool:
    """Whether CXX is set, or a compiler can be called. macOS has a c++ that only says how to install one."""
    if os.environ.get("CXX"):
        return True
    return any(
        shutil.which(name)
        and subprocess.run([name, "--version"], capture_output=True, check=False).returncode == 0
        for name in ("c++", "g++", "clang++")
    )


def _left_out() -> str | None:
    """Why this build leaves the extension out, in words that can follow "as"; None if it builds the extension."""
    wanted = os.environ.get("LMNFAST_CORE") or "auto"
    if wanted not in ("auto", "on", "off"):
        sys.exit(f"LMNFAST_CORE: expected auto, on or off, got {wanted!r}")
    if wanted == "off":
        return "LMNFAST_CORE is off"
    if wanted == "on":
        return None
    if shutil.which("cmake") is None:
        return "no CMake was found when it was installed"
    return None if _has_compiler() else "no C++ compiler was found when it was installed"


def _description() -> str:
    """The README as a package index can show it, which has none of the checkout's files.

    Links and pictures get the address that [project.urls] has as Repository, at the tag of this version. Without an address,
    links become their text, and pictures are left out with their captions. Empty if only the extension's sources are there.
    """
    if not (ROOT / "README.md").is_file():
        return ""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"', project, re.MULTILINE)
    address = re.search(r'^Repository = "(.*)"', project, re.MULTILINE)
    assert version is not None
    if address is None:
        text = re.sub(r"!\[[^\]]*\]\((?!\w+:)[^)]*\)\n\n\*[^\n]*\*\n\n", "", text)
        return re.sub(r"\[([^\]]*)\]\((?!\w+:)[^)]*\)", r"\1", text)
    files = f"{address[1].rstrip('/')}/%s/v{version[1]}/"
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:)", lambda link: link[1] + files % "raw", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!\w+:)", lambda link: link[1] + files % "blob", text)


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package folder that setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise ExecError(NO_CMAKE)
        if not _has_compiler():
            raise ExecError(NO_COMPILER)
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": package.parent,
            "Python_EXECUTABLE": sys.executable,
            "PYBIND11_FINDPYTHON": "ON",
            "pybind11_DIR": subprocess.check_output(
                [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
            ).strip(),
            **{
                name: os.environ[name]
                for name in ("LMNFAST_CUDA", "LMNFAST_CUDA_ARCHS", "LMNFAST_LEVELS", "LMNFAST_SANITIZE")
                if name in os.environ
            },
        }
        jobs = self.parallel or _jobs()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        try:
            # --fresh: the cache of another Python or of another build environment contains paths to a deleted folder.
            self._run([cmake, "--fresh", "-S", str(ROOT), "-B", str(build), *generator, *definitions])
            self._run([cmake, "--build", str(build), "--parallel", str(jobs)])
            self._run([cmake, "--install", str(build)])
        except subprocess.CalledProcessError as error:
            raise ExecError(
                "lmnfast: the build failed; the reason is in CMake's messages above. LMNFAST_CORE=off installs without the "
                "compiled core"
            ) from error
        (package / LEFT_OUT).unlink(missing_ok=True)  # of an earlier build in this folder

    def _run(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=2)
        subprocess.run(command, check=True)


class WithoutCore(build_py):
    """Writes the reason why the extension is left out into the package."""

    def run(self) -> None:
        super().run()
        package = ROOT / "lmnfast" if self.editable_mode else Path(self.build_lib) / "lmnfast"
        (package / LEFT_OUT).write_text(f"{left_out}\n", encoding="utf-8")
        self.warn(
            f"lmnfast: the compiled core is left out, as {left_out}; all numbers take up to hundreds of times as long"
        )


left_out = _left_out()
description: dict[str, Any] = {
    "long_description": _description(),
    "long_description_content_type": "text/markdown",
}
if left_out is None:
    setup(
        ext_modules=[Extension("lmnfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild}, **description
    )
else:
    setup(cmdclass={"build_py": WithoutCore}, **description)
