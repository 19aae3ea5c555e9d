"""Watch the linear mapping number of a network while it trains."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .connectivity import connectivity
from .network import cut
from .spectrum import measurement

# Bounds the memory of waiting connectivity matrices when solving falls behind measuring: 64 MB at N = 1000.
MOST_PENDING = 16

COLUMNS = ("step", "layer", "lmn", "complexity_bits", "samples", "points", "rule", "method", "precision")


class Probe:
    """Measures a model's linear mapping number every so many training steps.

        probe = Probe(model, inputs, "hidden.1", every=100)
        for step in range(steps):
            probe(step, loss=loss.item())
            ...
        probe.history       # [{"step": 0, "layer": "hidden.1", "lmn": 22.9, ..., "loss": 3.4}, ...]

    Measures lmn(tail, samples) with tail, samples = cut(model, layer, inputs), cut anew each time. The
    connectivity is computed on the calling thread, the eigenproblem on one background thread and one core.
    Training with a probe is bit-identical to training without: see `network.evaluating`.

    model, inputs: as in `cut`. layers: one name or several. every: measures when step % every == 0.
    method, points, rule, budget: as in `connectivity`.
    Raises, beside what `cut` raises: ValueError for no layers, a layer named twice, or every < 1.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor | tuple[Tensor, ...],
        layers: str | Sequence[str],
        *,
        every: int = 100,
        method: str = "path",
        points: int = 21,
        rule: str = "uniform",
        budget: int = 256 * 2**20,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers: expected one name or several different ones, got {layers!r}")
        self.model = model
        self.inputs = inputs
        self.every = every
        self.seconds = 0.0  # wall time the calling thread has spent in here, waiting included
        self._settings = {"method": method, "points": points, "rule": rule}
        self._budget = budget
        self._next_step = 0
        self._rows: dict[int, list[Future]] = {}
        self._waiting: deque[Future] = deque()  # one thread solves them, so they end in order
        self._solver = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="lmnfast-probe", initializer=_work_on_one_core
        )
        with self._timed():
            for layer in self.layers:
                cut(model, layer, inputs)

    def __call__(self, step: int | None = None, **extra: float) -> bool:
        """Call once per training step; returns whether it measured.

        step: None counts on from the last call, from 0 at first. extra: numbers for this step's rows.
        Raises as `cut` and `connectivity` do, and then leaves no row for this step; ValueError for an extra
        named like a column; RuntimeError when the probe is closed.
        """
        if step is None:
            step = self._next_step
        self._next_step = step + 1
        if step % self.every:
            return False
        if clash := set(extra) & set(COLUMNS):
            raise ValueError(f"extra: expected names not the probe's own, got {', '.join(sorted(clash))}")
        if self._solver is None:
            raise RuntimeError("probe: closed; expected an open one")
        extra = {name: value.item() if hasattr(value, "item") else value for name, value in extra.items()}
        with self._timed():
            tails = (cut(self.model, layer, self.inputs) for layer in self.layers)
            matrices = [
                connectivity(tail, samples, budget=self._budget, **self._settings) for tail, samples in tails
            ]
            for layer in self.layers:
                self._submit(step, layer, matrices.pop(0), extra)
            while self.pending > MOST_PENDING:
                self._waiting[0].exception()
        return True

    def _submit(self, step: int, layer: str, L: Tensor, extra: dict[str, Any]) -> None:
        stream = None
        if L.is_cuda:  # a stream of its own, so that the solver does not queue between training kernels
            stream = torch.cuda.Stream(L.device)
            stream.wait_stream(torch.cuda.current_stream(L.device))
            L.record_stream(stream)
        row = self._solver.submit(self._solve, step, layer, L, extra, stream)
        self._rows.setdefault(step, []).append(row)
        self._waiting.append(row)

    def _solve(self, step: int, layer: str, L: Tensor, extra: dict[str, Any], stream) -> dict[str, Any]:
        try:
            with torch.cuda.stream(stream):  # None: no effect
                m = measurement(L, **self._settings)
        except Exception as error:
            raise RuntimeError(f"probe: solving layer {layer!r} at step {step} failed: {error}") from error
        measured = {name: getattr(m, name) for name in COLUMNS[2:]}
        return {"step": step, "layer": layer, **measured, **extra}

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per step and layer, in order: step, layer, lmn, complexity_bits, samples, points, rule,
        method, precision, and the step's extra.

        Waits for pending rows; raises RuntimeError when one failed.
        """
        with self._timed():
            return [dict(row.result()) for rows in self._rows.values() for row in rows]

    @property
    def pending(self) -> int:
        """Rows whose eigenproblem is not solved yet."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        return len(self._waiting)

    def ready(self, step: int) -> bool:
        """Whether the rows of a step are all there, or failed; False for a step that was not measured."""
        return step in self._rows and all(row.done() for row in self._rows[step])

    def close(self) -> None:
        """Waits for pending rows and ends the thread; the history stays."""
        if self._solver is not None:
            with self._timed():
                self._solver.shutdown()
            self._solver = None

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


def _work_on_one_core() -> None:
    """Runs first in the solver's thread. Had that OpenMP threads of its own, there would be more of them than
    cores, and the runtime then lets the training's sleep between operations: measured on 2 cores, 3.6 ms for a
    training step of 1.5 ms, for as long as the process lives."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch also takes it for threads to come; whoever sets the old number last, sets it for them.
    restore = threading.Thread(target=torch.set_num_threads, args=(count,))
    restore.start()
    restore.join()
