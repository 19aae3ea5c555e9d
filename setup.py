"""Builds the extension by CMake. CMakeLists.txt is the only description of the build; the metadata is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).parent.resolve()


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


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package folder that setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise ExecError("lmnfast needs CMake 3.24 or newer to build: pip install cmake")
        if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
            raise ExecError(
                "lmnfast needs a C++17 compiler to build (Debian: apt install g++), or CXX set to one"
            )
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
                for name in ("LMNFAST_CUDA", "LMNFAST_CUDA_ARCHS", "LMNFAST_SANITIZE")
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
            raise ExecError("lmnfast: the build failed; the reason is in CMake's messages above") from error

    def _run(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=2)
        subprocess.run(command, check=True)


setup(ext_modules=[Extension("lmnfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
