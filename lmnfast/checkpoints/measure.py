"""Measures a model at each of its checkpoints: loads the checkpoint, cuts the model, measures, and updates the table."""

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._eigenvalues import check_negative
from .._layers import for_layers, is_pattern, match_layers
from .._measured import measured, share_of, warn_of_offsets
from .._native import Progress
from .._nested import first_names, mapped, tensors_in
from .._observables import Chosen, settings_for
from .._run_to import Cutting
from .._settings import Settings
from .._threads import cores
from .._tracing import Forward, Output
from ..cutting import chosen, cut_at
from ..runs.device import settled_device
from ..runs.files import claimed
from ..runs.pool import Pool
from ..runs.progress import move, progress_bar
from ..runs.tables import joined
from ..spectrum import SETTINGS, SHARES, measurement, with_observables
from .sources import find_checkpoints, in_one_line, load_inputs, read_state
from .table import Table, read_settings
from .weights import imported, load_state, made, plain


def measure_checkpoints(
    factory: Callable[[], nn.Module] | str,
    checkpoints: str | os.PathLike | Sequence[str | os.PathLike],
    inputs: Any,
    layers: str | Sequence[str] | None = None,
    *,
    until: str | None = None,
    blocks: str | Sequence[str] | None = None,
    forward: Forward | str = None,
    output: Output = None,
    batch_dim: int | None = None,
    key: str | None = None,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    negative: str = "absolute",
    stabiliser: float = 0.0,
    observables: str | Sequence[str] = (),
    device: str = "auto",
    jobs: int = 1,
    out: str | os.PathLike | None = None,
    force: bool = False,
    progress: bool = False,
    trust: bool = False,
) -> list[dict[str, Any]]:
    """Linear mapping number of a model at each of its checkpoints.

    It is ``measure(*cut(model, layer, inputs))`` for each layer and each checkpoint, with the checkpoint's weights in the
    model. No code from a checkpoint is run without `trust`: see `read_state`. Any number of processes gives the same numbers.

    Args:
        factory: a function without arguments that returns the model, or its place as text, "package.module:factory".
        checkpoints: files of torch.save or safetensors with any suffix, or patterns of files (glob, with **).
        inputs: as in `cut`, tensors in tuples, lists and dicts; or a file, see `load_inputs`. Floating-point
            inputs are converted to the model's dtype.
        layers: names or patterns as in `match_layers`. What a pattern matches and cannot be measured (a skip connection goes
            around it) is left out, with a warning.
        until: as in `cut`, for all layers.
        blocks: in place of `layers`, names or patterns of blocks as in `cut`.
        forward: as in `cut`, or the function's place as text, "package.module:function".
        output: as in `cut`.
        batch_dim: as in `cut`.
        key: the place of the state dict in a checkpoint, "a.b" for `["a"]["b"]`; None: see `read_state`.
        method: as in `connectivity`.
        points: as in `connectivity`.
        rule: as in `connectivity`.
        negative: as in `lmn`.
        stabiliser: as in `connectivity`.
        observables: as in `measure`. With several processes, the factory's module registers observables of your own.
        device: "cpu", "cuda" or "auto". "auto" is the device of the table in `out`. Without a table it is "cuda" if there is a
            CUDA device, else "cpu".
        jobs: number of processes. More than one are spawned, so a script must call this function under
            ``if __name__ == "__main__"``, and the factory, forward and output must be importable.
        out: a directory for the table. The same call continues the table in it. Rows of checkpoints whose files are gone
            remain. A file is measured again if its size, its time of change or its bytes at 16 places have changed.
        force: begin a new table, whatever is in `out`.
        progress: show a bar with the time that is left (needs tqdm).
        trust: read checkpoints that hold other objects, such as whole modules, and run the code in them: see `read_state`.

    Returns:
        One dict per checkpoint, by rising step: step, checkpoint, lmn_LAYER for each layer, samples, outputs, points, rule,
        method, precision, solver, negative, stabiliser, constant_share_LAYER, negative_share_LAYER and OBSERVABLE_LAYER for
        each layer, all as in `Measurement`. Numbers have seven digits, as many as float32 holds, as in lmn.csv. Steps are as in
        `steps_of`. If no name has a number, the steps are 0, 1, 2 and so on, in the order of the names.

    Raises:
        TypeError: points is not an integer, or the stabiliser is not a number.
        ValueError: a wrong argument; a checkpoint that cannot be read, does not fit the model, or cannot be measured (the
            message names it, and the results of the checkpoints that have begun are kept); the names do not determine the
            steps, see `steps_of`; `out` holds a damaged table, or a table with other settings (the message names them);
            another process is at work in `out`.
        OSError: `out` cannot be written; processes died again and again.

    Example:
        >>> from lmnfast.checkpoints import measure_checkpoints
        >>> def make():
        ...     return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> for step in (0, 10):
        ...     torch.save(make().state_dict(), f"step_{step}.pt")
        >>> rows = measure_checkpoints(make, "step_*.pt", torch.randn(30, 8), ["0", "2"])
        >>> [(row["step"], 1 < row["lmn_0"] < 30, row["lmn_2"]) for row in rows]  # layer 2 is the last: nothing is behind it
        [(0, True, 1.0), (10, True, 1.0)]
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    settled = Settings(method, points, rule, stabiliser=stabiliser)
    check_negative(negative)
    asked = Chosen(observables).names
    patterns = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else list(checkpoints)
    paths = find_checkpoints(patterns)
    if isinstance(inputs, (str, os.PathLike)):
        inputs = load_inputs(inputs)
    model = made(factory)
    call = imported(forward, "forward", "function") if isinstance(forward, str) else forward
    how = Cutting(call, output, until, blocks is not None, batch_dim)
    names = _names(model, inputs, layers, blocks, how)
    with nullcontext() if out is None else claimed(Path(out)):
        stored = None if out is None or force else read_settings(Path(out))
        work = _Work(
            factory, forward, output, batch_dim, until, blocks is not None, key, names, method, settled.points, rule, negative,
            settled.stabiliser, asked,
            settled_device(device, stored["device"] if stored else None), torch.get_float32_matmul_precision(), trust,
        )  # fmt: skip
        settings = work.settings() | {"checkpoints": [*map(str, patterns)], "inputs": _fingerprint(inputs)}
        table = Table(None if out is None else Path(out), settings, stored, paths)
        waiting = [path for path in paths if not table.has(path)]
        if progress and table.rows:
            print(f"{out}: {len(table.rows)} checkpoints measured before, {len(waiting)} to go")
        workers = min(jobs, len(waiting))
        done = len(table.rows)
        with progress_bar(done + len(waiting), done, progress, "checkpoint") as bar:
            if workers > 1:
                rows = _in_processes(work, inputs, waiting, workers)
            else:
                report = (lambda share: move(bar, len(table.rows) + share)) if bar else None
                rows = _in_this_process(work, model, call, inputs, waiting, report)
            with closing(rows):
                for row in rows:
                    table.add(row)
                    move(bar, len(table.rows))
    return table.rows


def tail_at(
    model: Callable[[], nn.Module] | str,
    inputs: Any,
    layer: str | None = None,
    block: str | None = None,
    *,
    checkpoint: str | None = None,
    until: str | None = None,
    forward: Forward | str = None,
    output: Output = None,
    batch_dim: int | None = None,
    key: str | None = None,
    device: str = "auto",
    trust: bool = False,
) -> tuple[nn.Module, Tensor]:
    """The tail of a model behind a layer, or a block, and its samples, as `measure_checkpoints` measures them.

    checkpoint: a file with weights, or a pattern that matches one file. None: the weights that the factory gives. Other
    arguments and errors as in `measure_checkpoints`.
    """
    name = chosen(layer, block, ("layer", "block"))
    assert isinstance(name, str)
    call = imported(forward, "forward", "function") if isinstance(forward, str) else forward
    how = Cutting(call, output, until, block is not None, batch_dim)
    files = [] if checkpoint is None else find_checkpoints([checkpoint])
    if len(files) > 1:
        raise ValueError(f"checkpoint: expected one file, got {len(files)}: {first_names(files)}")
    network = made(model)
    how.check(network)
    for path in files:
        load_state(network, read_state(path, key, trust=trust), path)
    network, inputs = _on_device(network, inputs, settled_device(device))
    try:
        return cut_at(network, name, inputs, how)
    except Exception as error:  # the user's model can raise any error
        raise ValueError(f"{name!r}: {in_one_line(error)}{_hint(error, inputs)}") from error


def _names(
    model: nn.Module,
    inputs: Any,
    layers: str | Sequence[str] | None,
    blocks: str | Sequence[str] | None,
    how: Cutting,
) -> tuple[str, ...]:
    """The layers or blocks to measure. Those that a pattern matches are cut once, with the weights that the factory gives."""
    patterns = chosen(layers, blocks, ("layers", "blocks"))
    argument = "layers" if blocks is None else "blocks"
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    how.check(model)
    if not any(isinstance(name, str) and is_pattern(name) for name in patterns):
        names = match_layers(model, patterns)
    else:
        model, inputs = _on_device(model, inputs, "cpu")

        def shape(name: str) -> tuple[int, ...]:
            try:
                return tuple(cut_at(model, name, inputs, how)[1].shape)
            except TypeError as error:
                raise ValueError(str(error)) from error

        names = tuple(for_layers(model, patterns, shape, argument))
    if not names:
        raise ValueError(f"{argument}: expected at least one, got {patterns!r}")
    return names


@dataclass(frozen=True)
class _Work:
    """Everything that a process needs to measure a checkpoint, except the inputs."""

    factory: Callable[[], nn.Module] | str
    forward: Forward | str
    output: Output
    batch_dim: int | None
    until: str | None
    block: bool
    key: str | None
    layers: tuple[str, ...]
    method: str
    points: int
    rule: str
    negative: str
    stabiliser: float
    observables: tuple[str, ...]
    device: str
    precision: str
    trust: bool

    def settings(self) -> dict[str, Any]:
        """All settings that determine the numbers, as plain values for JSON."""
        named = {"factory": "model"}
        settings = {
            named.get(name, name): plain(value) for name, value in vars(self).items() if name != "trust"
        }
        # None, as in tables from before there were blocks and observables.
        return settings | {"block": self.block or None, "observables": settings["observables"] or None}

    def cutting(self, forward: Forward) -> Cutting:
        return Cutting(forward, self.output, self.until, self.block, self.batch_dim)


def _measured(
    work: _Work, model: nn.Module, call: Forward, inputs: Any, path: str, report: Progress | None = None
) -> dict[str, Any]:
    """The row of one checkpoint. Its step is None, because `Table` reads the steps from all names together.

    report: receives the share of this checkpoint that is done.
    """
    load_state(model, read_state(path, work.key, trust=work.trust), path)
    row: dict[str, Any] = {"step": None, "checkpoint": path}
    asked = Chosen(work.observables)
    for number, layer in enumerate(work.layers):
        try:
            tail, samples = cut_at(model, layer, inputs, work.cutting(call))
            settings = Settings(work.method, work.points, work.rule, stabiliser=work.stabiliser)
            settings = settings_for(asked, settings)
            share = share_of(report, number, len(work.layers))
            (enqueued,) = measured(tail, samples, settings, progress=share or False)
            warn_of_offsets([enqueued], f"checkpoint: {path}, layer {layer!r}")
            m = measurement(enqueued, settings, work.negative)
            m, problems = with_observables(m, enqueued, asked, samples, tail, model)
        except Exception as error:  # the user's model can raise any error
            said = f"checkpoint: {path}, layer {layer!r}: {in_one_line(error)}{_hint(error, inputs)}"
            raise ValueError(said) from error
        for problem in problems:
            warnings.warn(f"layer {layer!r}: {problem}", stacklevel=2)
        numbers = {name: getattr(m, name) for name in ("lmn", *SHARES)} | m.observables
        row |= {f"{name}_{layer}": float(f"{value:.7g}") for name, value in numbers.items()}
        before = dict(row)
        row |= {name: getattr(m, name) for name in SETTINGS}
        for name in ("precision", "solver"):  # these may differ between layers
            row[name] = joined(before.get(name, row[name]), row[name])
    return row


def _hint(error: Exception, inputs: Any) -> str:
    """What to do, for an error of torch that comes of inputs that are not floating-point."""
    kinds = {
        str(tensor.dtype).removeprefix("torch.")
        for tensor in tensors_in(inputs)
        if not tensor.is_floating_point()
    }
    if not kinds or "dtype" not in str(error):
        return ""
    return f"; the inputs are {' and '.join(sorted(kinds))}, save them as float32 if the model takes numbers and no tokens"


def _in_this_process(
    work: _Work, model: nn.Module, call: Forward, inputs: Any, paths: Sequence[str], report: Progress | None
) -> Generator[dict[str, Any], None, None]:
    model, inputs = _on_device(model, inputs, work.device)
    for path in paths:
        yield _measured(work, model, call, inputs, path, report)


def _in_processes(
    work: _Work, inputs: Any, paths: Sequence[str], count: int
) -> Generator[dict[str, Any], None, None]:
    """The rows, in the order in which they are ready. If a checkpoint fails, those that have begun are finished, and the others
    are not measured."""
    try:
        pickle.dumps(work)
    except Exception as error:
        raise ValueError(
            f"jobs: {count} processes need a factory, forward and output that can be imported: {in_one_line(error)}"
        ) from None
    threads = max(1, min(torch.get_num_threads(), cores() // count))
    # The inputs are sent as bytes. If tensors were sent, torch would move the caller's tensors to shared memory.
    content = io.BytesIO()
    torch.save(mapped(inputs, lambda tensor: tensor.detach().cpu()), content)
    failed: BaseException | None = None
    with Pool(count, _start_process, (work, content.getvalue(), threads)) as pool:
        for outcome in pool.outcomes(_measure_here, [(path,) for path in paths]):
            if outcome.error is None:
                yield outcome.result
            elif failed is None:
                failed = outcome.error
                pool.leave_waiting()
    if failed is not None:
        raise failed


# Set in each spawned process by _start_process: the work, and the inputs as torch.save writes them.
_process_work: tuple[_Work, bytes]


def _start_process(work: _Work, content: bytes, threads: int) -> None:
    # A global variable is the only way to keep a value that the initializer of a process has made.
    global _process_work  # noqa: PLW0603
    _process_work = work, content
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(work.precision)


@cache
def _process_model() -> tuple[nn.Module, Forward, Any]:
    """The model, forward and inputs of a spawned process. `_start_process` does not make them: its errors would be lost."""
    work, content = _process_work
    call = imported(work.forward, "forward", "function") if isinstance(work.forward, str) else work.forward
    inputs = torch.load(io.BytesIO(content), weights_only=True)
    model, inputs = _on_device(made(work.factory), inputs, work.device)
    return model, call, inputs


def _measure_here(path: str) -> dict[str, Any]:
    try:
        model, call, inputs = _process_model()
    except Exception as error:
        raise ValueError(f"checkpoint: {path}: {in_one_line(error)}") from error
    return _measured(_process_work[0], model, call, inputs, path)


def _on_device(model: nn.Module, inputs: Any, device: str) -> tuple[nn.Module, Any]:
    """The model and its inputs on the device. Floating-point inputs get the model's dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return model.to(device), mapped(inputs, place)


def _fingerprint(inputs: Any) -> str:
    """A short text that is equal for equal inputs."""
    structure = mapped(inputs, lambda tensor: (str(tensor.dtype), tuple(tensor.shape)))
    digest = hashlib.sha256(repr(structure).encode())
    for tensor in tensors_in(inputs):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256 {digest.hexdigest()[:16]}"
