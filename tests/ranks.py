"""Runs a function in several processes that form a group of torch.distributed by gloo."""

import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fresh import CONTEXT

DEAD = "dead"  # of a process that ended without a result


def on_ranks(count: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` returns or raises in each process."""
    folder = Path(folder, work.__name__, str(count))
    folder.mkdir(parents=True)
    processes = [
        CONTEXT.Process(target=_run, args=(rank, count, work, folder, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError("a process of the group hangs")
    files = [folder / str(rank) for rank in range(count)]
    return [pickle.loads(file.read_bytes()) if file.exists() else DEAD for file in files]


def _run(rank: int, count: int, work: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/init", timeout=timedelta(seconds=100), rank=rank, world_size=count
    )
    try:
        result = work(rank, *arguments)
    except Exception as error:
        result = error
    (folder / str(rank)).write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
