"""New processes, for code that must not find what other tests imported or that runs beside this process.

Each is forked from a server that has imported PyTorch alone, with the parts that an optimiser imports. A process that
imports these by itself spends 4 s of a core on them.
"""

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo"])


@dataclass
class Done:
    """How a process ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_fresh(script: Path, folder: Path, *arguments: str, **environment: str) -> Done:
    """Runs a script as `python script arguments` in the folder would, with these environment variables besides its own.

    What reads its environment while PyTorch is imported, as OpenMP does, finds the one of the server's start.
    """
    process = start_fresh(script, folder, *arguments, **environment)
    process.join(600)
    if process.is_alive():
        process.kill()
        process.join()
    return Done(process.exitcode, *((folder / name).read_text() for name in ("stdout", "stderr")))


def start_fresh(script: Path, folder: Path, *arguments: str, **environment: str) -> BaseProcess:
    """As `run_fresh`, without waiting for the end. What the process writes is in the folder's files stdout and stderr."""
    files = folder / "stdout", folder / "stderr"
    environment = {**os.environ, **environment}  # the server has those of its start
    process = CONTEXT.Process(target=_run, args=(script, folder, files, arguments, environment))
    process.start()
    return process


def _run(
    script: Path, folder: Path, files: tuple[Path, Path], arguments: list[str], environment: dict[str, str]
) -> None:
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    assert not any(name.startswith("lmnfast") for name in sys.modules)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
