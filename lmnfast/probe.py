"""Measures the linear mapping number of a network while it trains."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._eigenvalues import check_negative
from ._enqueue import enqueue, on_stream
from ._extras import required
from ._group import ALONE, Group, check_same, in_all, is_alone, refused_together, sharded
from ._layers import for_layers
from ._layout import plain_layout
from ._observables import Chosen, Values, problem_of, settings_for
from ._probed import NumberOnDevice, Pending, Tail, Writer
from ._python_state import python_state
from ._run_to import Cutting, run_to
from ._schedule import Every, Schedule, plain, plain_step
from ._settings import Settings, completed
from ._threads import alone, on_one_core
from ._tracing import Forward, Output
from .cutting import chosen, cut_at
from .spectrum import SETTINGS, SHARES, measurement, spectrum_of, unsolved

# Limits the memory of waiting connectivity matrices if solving is slower than measuring: 64 MB at N = 1000.
MOST_PENDING = 16

COLUMNS = ("step", "layer", "lmn", "complexity_bits", *SETTINGS, *SHARES)


class Probe:
    """Measures a model's linear mapping number every so many training steps.

    Measures lmn(tail, samples) with tail, samples = cut(model, layer, inputs, until=, forward=, output=, batch_dim=), or with
    block= in place of the layer. The probe keeps the tail. It cuts again when anything in the model except the parameters'
    values has changed (see `python_state`), or when the tail's outputs on the samples are no longer the model's. The
    connectivity is computed on the calling thread. A background thread solves the eigenproblem, on one core, or on the CUDA
    device that has the matrix; only numbers are copied from that device.

    Training with a probe is bit-identical to training without a probe. The exception is a forward pass in eval mode that
    changes things which `_undisturbed.evaluating` does not restore: containers outside the model that hooks fill, files,
    objects of other classes. A copy of a probe (copy.deepcopy, pickle) has only the rows. A probe works only in the
    process that made it.

    On CUDA the connectivity is computed on a stream of the probe, while the current stream continues. The weights of a fused
    chain are copied first. For any other network the current stream waits until the connectivity is done. The calling thread
    does not wait for the device, unless it cuts, measures a network that is no chain, or has too many rows pending. Errors in
    values on the device are therefore raised later, by `history`: NaN or Inf, or outputs that are no longer the model's after a
    change that only outputs show.

    A probe warns as `measure` does, once for each layer, with the layer's name: at the first call, or reading of rows, after
    the row is ready.

    Args:
        model: as in `cut`.
        inputs: as in `cut`.
        layers: names or patterns as in `match_layers`, one or several. What a pattern matches and cannot be measured (a skip
            connection goes around it) is left out, with a warning. The attribute `layers` has the names that are measured.
        until: as in `cut`, for all layers.
        blocks: in place of `layers`, names or patterns of blocks as in `cut`. Their names are in the column "layer".
        every: a number: the probe measures when step % every == 0. A sequence of steps: at these. "log": at 0, 1, 2, 5, 10, 20,
            50, 100, ... A function of a step: where it returns True.
        method, points, rule, budget: as in `connectivity`.
        forward, output, batch_dim: as in `cut`.
        observables: names of numbers to measure beside LMN, as `lmnfast.observables` lists them; each is a column. If none of
            them needs eigenvalues, no eigenproblem is solved, and the columns of LMN have None. Observables of the network or
            the model are computed on the calling thread, and on CUDA may wait for the device.
        compile: as in `cut`. Tails are compiled when the probe is made, and again when it cuts again.
        negative, stabiliser: as in `measure`.
        writers: receive finished rows, in order, on the thread that calls the probe: at its next calls, and when the probe is
            closed.
        group: as in `connectivity`: all its processes make this probe and call it at the same steps. Each has every row.

    Raises:
        ValueError: as `cut`; no layers, a layer named twice, layers and blocks both or neither, every < 1 or without a
            step, an unknown method, rule, negative or observable, points, budget or stabiliser out of range, a stabiliser
            with method "jacobian".
        TypeError: as `cut`; points is not an integer; the stabiliser is not a number.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> probe = lmnfast.Probe(model, torch.randn(30, 8), "0", every=100)
        >>> for step in range(150):
        ...     measured = probe(step, loss=0.5)  # and a training step
        >>> probe.close()
        >>> [(row["step"], row["layer"], row["loss"]) for row in probe.history]
        [(0, '0', 0.5), (100, '0', 0.5)]
        >>> 1 < probe.history[0]["lmn"] < 30
        True
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        layers: str | Sequence[str] | None = None,
        *,
        until: str | None = None,
        blocks: str | Sequence[str] | None = None,
        every: Every = 100,
        method: str = "path",
        points: int = 21,
        rule: str = "uniform",
        budget: int | None = None,
        forward: Forward = None,
        output: Output = None,
        batch_dim: int | None = None,
        compile: bool = False,
        negative: str = "absolute",
        stabiliser: float = 0.0,
        observables: str | Sequence[str] = (),
        writers: Sequence[Writer] = (),
        group: Group = ALONE,
    ) -> None:
        with refused_together(group):
            schedule, chosen_observables = Schedule(every), Chosen(observables)
            self._group = None if is_alone(group) else group
            named = chosen(layers, blocks, ("layers", "blocks"))
            argument = "layers" if blocks is None else "blocks"
            how = Cutting(forward, output, until, blocks is not None, batch_dim, compile)
            how.check(model)
            patterns = (named,) if isinstance(named, str) else tuple(named)
            if not patterns or len(set(patterns)) != len(patterns):
                raise ValueError(f"{argument}: expected one name or several different ones, got {named!r}")
            settings = settings_for(chosen_observables, Settings(method, points, rule, budget, stabiliser))
            check_negative(negative)
        self.model, self.inputs, self.every = model, inputs, every
        self.seconds = 0.0  # wall time of the calling thread in this class, waiting included
        self._schedule, self._observables = schedule, chosen_observables
        self._settings, self._negative = settings, negative
        # Warnings not given yet, by layer and observable, "" for offsets.
        self._problems: dict[tuple[str, str], str] = {}
        self._warned: set[tuple[str, str]] = set()
        self._how = how
        self._writers = tuple(writers)
        self.next_step: float = 0  # the step of a call without a step
        self._before: list[dict[str, Any]] = []  # rows of the earlier run that this probe continues
        self._rows: dict[float, list[Future]] = {}
        self._unread: deque[Future] = deque()  # rows that new_rows has not returned yet
        self._waiting: deque[Future] = deque()  # one thread solves them, so they end in order
        for writer in self._writers:
            if hasattr(writer, "expect"):
                writer.expect(chosen_observables.names)
        self._start()
        with self._timed(), alone(), refused_together(group):
            tails = for_layers(model, patterns, self._tail, argument)
            state = python_state(model, inputs)
            self._tails |= {layer: (tail, state) for layer, tail in tails.items()}
            self.layers = tuple(tails)
        check_same(self._group, self.layers, argument, "beginning of a probe")

    def _tail(self, layer: str) -> Tail:
        return Tail(cut_at(self.model, layer, self.inputs, self._how)[0], self._settings.method)

    def _start(self) -> None:
        """Creates everything that belongs to this process: the thread, the streams, the tails."""
        self._process = os.getpid()
        self._solver: ThreadPoolExecutor | None = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="lmnfast-probe", initializer=on_one_core
        )
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
        self._tails: dict[str, tuple[Tail, list]] = {}  # by layer, each with the model's state at its cut

    def __getstate__(self) -> dict[str, Any]:
        """A copy, deep or by pickle, is a probe of the copied model. It continues with the rows, without writers or group."""
        own = ("_solver", "_streams", "_tails", "_process", "_rows", "_unread", "_waiting", "_group")
        kept = {name: value for name, value in vars(self).items() if name not in own}
        return {**kept, "_before": self.history, "_writers": (), "open": self._solver is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_open = state.pop("open")
        vars(self).update(state)
        self._rows, self._unread, self._waiting, self._group = {}, deque(), deque(), None
        self._start()
        if not is_open:
            self._solver = None

    def __repr__(self) -> str:
        s = self._settings
        return f"Probe(layers={self.layers}, every={self.every!r}, method={s.method!r}, points={s.points}, rule={s.rule!r})"

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                "probe: made before this process was forked, whose thread that solves the rows is in the parent; expected a "
                "probe made in this process"
            )

    def __call__(self, step: float | None = None, **extra: float | Tensor) -> bool:
        """Call once per training step; measures at the steps that `every` says.

        Args:
            step: the number of the step, of any type that is a number; rows have it as int or float. None: one more than in
                the last call, 0 in the first.
            extra: numbers for the rows of this step.

        Returns:
            Whether the probe measured.

        Raises:
            Exception: the errors of `cut` and `connectivity`; on CUDA not those that depend on values. The step then has no
                row.
            ValueError: an extra has the name of a column.
            RuntimeError: the probe is closed, or was made before this process was forked; or a row failed, and there are
                writers that lack it.
        """
        self._check_process()
        step = self.next_step if step is None else plain_step(step)
        due = self._schedule.due(step)
        self.next_step = step + 1
        if due:
            self._measure_all(step, extra)
        else:
            self._warn()
        self.flush()
        return due

    def reach(self, step: float) -> bool:
        """Call in place of the probe itself if the step number may jump or repeat, as with several optimisers.

        Measures at the first step that reaches or passes a step that is due by `every`. Writers get nothing before the next
        `flush`.

        Args:
            step: the number of steps so far.

        Returns:
            Whether the probe measured.

        Raises:
            RuntimeError: the measurement failed; the message has the step and the layers.
        """
        step = plain_step(step)
        due = self._schedule.passed(self.next_step - 1, step)
        self.next_step = step + 1
        if due:
            try:
                self._check_process()
                self._measure_all(step, {})
            except Exception as error:
                raise RuntimeError(f"LMN at step {step}, layers {', '.join(self.layers)}: {error}") from error
        return due

    def _measure_all(self, step: float, extra: dict[str, Any]) -> None:
        """Measures all layers. The rows are ready when the solver's thread has solved them."""
        with refused_together(self._group):
            self._warn()
            if clash := set(extra) & {*COLUMNS, *self._observables.names}:
                raise ValueError(f"extra: expected names not the probe's own, got {', '.join(sorted(clash))}")
            if self._solver is None:
                raise RuntimeError("probe: closed; expected an open one")
            extra = {name: self._number(value) for name, value in extra.items()}
        with self._timed(), alone():
            state = python_state(self.model, self.inputs)
            pending = [self._enqueue(layer, state, step) for layer in self.layers]
            for layer in self.layers:
                row = self._solver.submit(self._solve, step, layer, pending.pop(0), extra)
                self._rows.setdefault(step, []).append(row)
                self._waiting.append(row)
                self._unread.append(row)
            while self.pending > MOST_PENDING:
                self._waiting[0].exception()

    def _enqueue(self, layer: str, state: list[Any], step: float) -> Pending:
        """Enqueues the connectivity of a layer, and computes the observables of the step."""
        kept = self._tails.get(layer)
        pending = None
        try:
            if kept is not None and kept[1] == state and self._group is None:
                known = replace(self._how, batch_dim=kept[0].layout or plain_layout(self.inputs))
                samples, output = run_to(self.model, layer, self.inputs, known)
                with suppress(Exception):  # this tail may be outdated; only an error with a new tail counts
                    pending = self._measure(kept[0], samples, output, step=step, layer=layer)
            if pending is None:
                with refused_together(self._group):
                    tail, samples = cut_at(self.model, layer, self.inputs, self._how)
                self._tails[layer] = Tail(tail, self._settings.method), state
                pending = self._measure(self._tails[layer][0], samples, None, step=step, layer=layer)
            in_all(self._group, partial(pending.observe_now, self._number), "reading of observables")
            return pending
        except (ValueError, TypeError) as error:
            raise type(error)(f"{error} (probe of layer {layer!r}, step {step})") from error

    def _measure(self, tail: Tail, samples: Tensor, output: Tensor | None, **place: Any) -> Pending:
        """Enqueues the connectivity of a tail. output: the expected outputs; None: not compared. place: step and layer."""
        chain = tail.chain()
        if self._group is not None:
            place |= {"negative": self._negative, "observables": self._observables.names, "function": "Probe"}
            enqueued, _ = sharded(tail.module, samples, self._settings, self._group, known=chain, **place)
            return Pending(enqueued, None, Values(self._observables), samples, tail.module, self.model)
        stream = self._streams_on(samples.device)[0] if samples.is_cuda else None
        enqueued = enqueue(tail.module, samples, self._settings, expected=output, known=chain, stream=stream)
        done = None
        if stream is not None:
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
        return Pending(enqueued, done, Values(self._observables), samples, tail.module, self.model)

    def _solve(self, step: float, layer: str, pending: Pending, extra: dict[str, Any]) -> dict[str, Any]:
        enqueued = pending.enqueued
        L = enqueued.L
        # Solving has its own stream, so that the next connectivity, and a training that waits for it, do not wait for this.
        stream = self._streams_on(L.device)[1] if L.is_cuda else None
        try:
            with on_stream(stream):
                if pending.done is not None:
                    pending.done.synchronize()
                enqueued.check()
                numbers = {k: v.read() if isinstance(v, NumberOnDevice) else v for k, v in extra.items()}
                measured, spectrum = dict.fromkeys(COLUMNS[2:]), None
                if self._observables.solves:
                    m = measurement(enqueued, self._settings, self._negative)
                    measured, spectrum = {name: getattr(m, name) for name in measured}, spectrum_of(m)
                else:
                    known = unsolved(enqueued, self._settings, self._negative)
                    measured |= {name: known[name] for name in measured if name in known}
                measured |= pending.observe_later(spectrum)
                problems = {name: problem_of(name, why) for name, why in pending.values.problems.items()}
                if (layer, "") not in self._warned and (problem := enqueued.offset_problem()):
                    problems[""] = problem
        except Exception as error:
            self._tails.pop(layer, None)  # if the tail was outdated, the next row need not fail as well
            m = None
            del L, enqueued, pending  # the traceback keeps this frame; the frame must not keep the matrix
            raise RuntimeError(
                f"probe: solving layer {layer!r} at step {step} failed: {error}"
            ) from error.with_traceback(None)
        self._problems |= {(layer, name): problem for name, problem in problems.items()}
        return {"step": step, "layer": layer, **measured, **numbers}

    def _warn(self) -> None:
        """Gives the warnings, on the training's thread: its filters may turn warnings into errors."""
        for about, problem in list(self._problems.items()):
            del self._problems[about]
            if about not in self._warned:
                self._warned.add(about)
                warnings.warn(f"layer {about[0]!r}: {problem}", stacklevel=3)

    def _streams_on(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """The stream for connectivities, and the stream for solving."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

    def _number(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_cuda and value.numel() == 1:
            return NumberOnDevice(value, self._streams_on(value.device)[1])
        return plain(value.item() if hasattr(value, "item") else value)

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per step and layer, in order.

        A row has step, layer, lmn, complexity_bits, all other fields of a `Measurement` except its tensors, the observables,
        and the step's extra. Waits for pending rows.

        Raises:
            RuntimeError: a row failed.
        """
        self._check_process()
        with self._timed():
            rows = [dict(row) for row in self._before]
            rows += [dict(row.result()) for rows in list(self._rows.values()) for row in rows]
        self._warn()
        return rows

    def to_pandas(self) -> Any:
        """The `history` as a pandas.DataFrame.

        Raises:
            ImportError: pandas is not installed.
            RuntimeError: a row failed.
        """
        return required("pandas", "pandas").DataFrame(self.history)

    def new_rows(self, wait: bool = False) -> list[dict[str, Any]]:
        """Rows that were finished since the last call, in order.

        If the probe has writers, they receive the rows, and this method returns none.

        Args:
            wait: also wait for pending rows.

        Raises:
            RuntimeError: a row failed. It is raised once, by the call after the one that returns the rows before it.
        """
        self._check_process()
        rows: list[dict[str, Any]] = []
        with self._timed():
            while self._unread and (wait or self._unread[0].done()):
                if rows and self._unread[0].exception():
                    break
                rows.append(dict(self._unread.popleft().result()))
        return rows

    def flush(self, wait: bool = False) -> None:
        """Gives the writers the rows that were finished since the last time, in order.

        Args:
            wait: also wait for pending rows.

        Raises:
            RuntimeError: a row failed. The writers have the rows before it.
        """
        while self._writers and (rows := self.new_rows(wait)):
            for row in rows:
                for writer in self._writers:
                    writer.write(row)

    def state_dict(self) -> dict[str, Any]:
        """The probe's part of a training checkpoint: its rows and the next step, as plain values.

        Waits for pending rows. Writers receive the rows first, as loaded rows go to no writer.
        """
        self.flush(wait=True)
        return {"next_step": self.next_step, "rows": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`. The rows of this probe are dropped. The loaded rows go to no writer.

        Calls resume() of every writer that has it: the writers then continue with the rows of the earlier run.

        Args:
            state: a result of `state_dict`. Rows of versions without the column stabiliser get stabiliser 0.
        """
        self._check_process()
        for writer in self._writers:
            if hasattr(writer, "resume"):
                writer.resume()
        with self._timed():
            for row in self._waiting:
                row.exception()
        self.next_step = state["next_step"]
        self._before = [completed(row) for row in state["rows"]]
        self._rows.clear()
        self._unread.clear()

    @property
    def pending(self) -> int:
        """Rows whose eigenproblem is not solved yet."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        return len(self._waiting)

    def ready(self, step: float) -> bool:
        """Whether all rows of a step are ready or failed. False for a step that was not measured."""
        return step in self._rows and all(row.done() for row in self._rows[step])

    def close(self) -> None:
        """Waits for pending rows, gives them to the writers, closes the writers, and ends the thread. The history stays.

        Does nothing in a process that was forked after the probe was made: thread, rows and writers belong to the parent.

        Raises:
            RuntimeError: a row failed, and there are writers that lack it. The writers have the other rows.
        """
        if self._solver is not None and self._process == os.getpid():
            with self._timed():
                self._solver.shutdown()
            self._solver = None
            failure = None
            try:
                while self._writers and self._unread:
                    try:
                        self.flush(wait=True)
                    except RuntimeError as error:  # a row failed; the rows after it are still written
                        failure = failure or error
            finally:
                for writer in self._writers:
                    writer.close()
            if failure:
                raise failure
            self._warn()

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
