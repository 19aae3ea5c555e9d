"""Saves and restores everything that a forward pass may change, so that measuring leaves no trace."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._threads import alone, uninterrupted

# Classes, beside modules, in which containers and tensors are searched that a forward pass may change.
CONTAINERS = (dict, list, set, deque)
LEVELS = 3  # a module's attributes, the containers among them, and containers in those
PLAIN = {type(None), bool, int, float, str}
NOTHING: dict[Any, Any] = {}

# A container with more entries is not searched: large containers (vocabularies, replay buffers) hold plain values.
LARGE = 1000

# A tensor that is no buffer is copied, to be restored, up to this many bytes. A data set in an attribute is larger.
LARGE_TENSOR = 2**24

# Attributes that get another value during a measurement, and that value. Without _compiled_call_impl = None a hook would make
# a module compiled in place compile again. DistributedDataParallel would wait in its forward pass for processes that do not
# measure.
SWITCHES = {
    "training": False,
    "_compiled_call_impl": None,
    "require_forward_param_sync": False,
    "require_backward_grad_sync": False,
}


def _is_torchs(function: Any) -> bool:
    """Whether a function comes from torch's own files, and is not a replacement by another library."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(os.path.dirname(torch.__file__) + os.sep)


# torch's own functions at the time of import: a library may replace them later, or may have replaced them before.
FORWARDS = {
    kind: kind.forward
    for kind in vars(nn).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and _is_torchs(kind.forward)
}
_CALL = nn.Module.__call__ if _is_torchs(nn.Module.__call__) else None
_FUNCTIONS = dict(vars(F))

# torch's files with modules that change nothing in a forward pass in eval mode. If a network has only such modules, its state
# is not saved: with three of them `evaluating` then takes 0.17 ms instead of 0.32 ms.
STATELESS = tuple(
    f"torch.nn.modules.{name}" for name in ("activation", "container", "conv", "dropout", "flatten", "linear")
)

# On each thread, what the measurements in progress have saved, the innermost last.
_measuring = threading.local()

# Modules whose generated forward only calls torch's functions and the module's parts, and that forward; see `keeps_nothing`.
_generated: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def sharding_of(model: nn.Module) -> str | None:
    """The method that distributes a model's parameters over processes, by name; None if this process has the whole model."""
    return _sharding_of(model.modules())


def _sharding_of(parts: Iterable[nn.Module]) -> str | None:
    for part in parts:
        if type(part).__name__ == "FullyShardedDataParallel":
            return "FullyShardedDataParallel"
        for parameter in part._parameters.values():
            if hasattr(parameter, "ds_id"):
                return "DeepSpeed ZeRO stage 3"
            if type(parameter) is not nn.Parameter and any(
                kind.__name__ == "DTensor" for kind in type(parameter).__mro__
            ):
                return "DTensor parameters"
    return None


def refuse_sharded(model: nn.Module) -> None:
    """Raises ValueError for a model that no process has whole.

    All processes must run the forward pass of such a model together, and its modules exchange their parameters meanwhile.
    """
    _refuse_sharded(model.modules())


def _refuse_sharded(parts: Iterable[nn.Module]) -> None:
    if (sharding := _sharding_of(parts)) is not None:
        raise ValueError(
            f"model: its parameters are sharded over processes ({sharding}); expected a model that this process has whole "
            "(one device, DDP); measure saved checkpoints instead"
        )


@contextmanager
def evaluating(*modules: Any, changed: bool = False) -> Iterator[Kept]:
    """Eval mode without gradients, for as long as the context lasts. Afterwards, also after an error, everything is restored.

    The context gives a `Kept`. Its `put_back` restores everything but the random states at once, so that the next forward pass
    behaves like the first.

    Restored are: the training flag, attributes, buffers and other tensors of every submodule (a forward pass may set or count
    something); lists, dicts, sets and deques among the attributes, and in these, in place; the random states of torch on the
    CPU and CUDA, of Python's `random` and of numpy; the grad mode. Not restored are: objects of other classes; containers
    deeper down or elsewhere (for example a list that a hook or a closure fills); tensors over 16 MB that are no buffers;
    anything outside the process.

    Flags are set directly, not by train(), where some modules rewrite their weights. Modules compiled in place, and compiled
    parts of other modules, run uncompiled. DistributedDataParallel runs without its collectives. Observers of quantisation
    stand still. Attention runs as in training, see `without_fast_path`. Arguments that are no nn.Module are ignored. One
    thread at a time is in this context, see `alone`. changed: whether the caller itself changes state that must be restored.

    Raises ValueError for a model whose parameters are sharded. Raises RuntimeError at the end if the forward pass has
    overwritten a parameter or a large tensor.
    """
    roots = [module for module in modules if isinstance(module, nn.Module)]
    parts = dict.fromkeys(part for module in roots for part in module.modules())
    with alone():
        _refuse_sharded(parts)
        switched = []
        for part in parts:
            own = vars(part)
            for name, value in SWITCHES.items():
                if name in own:
                    if own[name] != value:
                        switched.append((part, name, own[name]))
                elif name == "training" and part.training != value:  # a property, as in scripted modules
                    switched.append((part, name, part.training))
        kept, stack = Kept(parts), ExitStack()
        measuring = _measuring.__dict__.setdefault("kept", [])
        try:
            with uninterrupted():
                measuring.append(kept)
                stack.callback(measuring.remove, kept)
                if not changed and len(roots) == len(modules) > 0 and vars(F) == _FUNCTIONS:
                    kept.stateless = all(map(_is_stateless, parts))
                    kept.in_order = kept.stateless and not any(part in _generated for part in parts)
                stack.enter_context(torch.no_grad())
                stack.callback(_set_all, switched)
                _set_all((part, name, SWITCHES[name]) for part, name, _ in switched)
                if not kept.stateless:
                    stack.enter_context(_random_states())
                    stack.enter_context(without_fast_path())
                    for part in parts:
                        _stand_still(part, inner=not any(part is root for root in roots), stack=stack)
                    stack.callback(kept.put_back, values=True)
                kept.keep(parts)
            yield kept
        finally:
            with uninterrupted():
                stack.close()
        kept.check()


def measurement_of(part: nn.Module) -> Kept | None:
    """The innermost measurement in progress on this thread that covers the module; None if there is none.

    During a measurement the module's parameters stay as they are, and its state is put back between calls.
    """
    measuring = _measuring.__dict__.get("kept", [])
    return next((kept for kept in reversed(measuring) if part in kept.parts), None)


def _set_all(values: Iterable[tuple[nn.Module, str, Any]]) -> None:
    for part, name, value in values:
        own = vars(part)
        if name in own:  # takes a tenth of the time of nn.Module's __setattr__
            own[name] = value
        else:  # a property, as in scripted modules
            setattr(part, name, value)


def _stand_still(part: nn.Module, inner: bool, stack: ExitStack) -> None:
    """Turns off observers, which make a call depend on earlier calls, and compiled parts, in which hooks fail.

    Lasts until the stack is closed.
    """
    if isinstance(part._buffers, dict) and "observer_enabled" in part._buffers:  # torch.ao's FakeQuantizeBase
        enabled = part._buffers["observer_enabled"]
        assert enabled is not None
        part._buffers["observer_enabled"] = torch.zeros_like(enabled)
        stack.callback(part._buffers.__setitem__, "observer_enabled", enabled)
    if inner and "_orig_mod" in part._modules:  # torch.compile's
        own = vars(part)
        undo = (
            (own.__setitem__, "forward", own["forward"]) if "forward" in own else (own.pop, "forward", None)
        )
        stack.callback(*undo)
        own["forward"] = part._orig_mod


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Runs transformer layers of torch.nn as in training. This changes their results by rounding alone.

    In eval mode with a padding mask nn.TransformerEncoder would pass nested tensors, which have no shape, from layer to layer,
    and would call no part of a layer. The setting applies to the whole process.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def hooked(module: nn.Module, backward: bool = False) -> bool:
    """Whether a call of the module runs hooks; with `backward`, whether its differentiation runs hooks."""
    everywhere = nn.modules.module
    if backward:
        return bool(
            module._backward_hooks
            or module._backward_pre_hooks
            or everywhere._global_backward_hooks
            or everywhere._global_backward_pre_hooks
        )
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    )


def torchs_own() -> tuple[bool, ...]:
    """Whether torch's functions are the ones of the import, and whether hooks of each kind run for every module."""
    everywhere = nn.modules.module
    hooks = (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)
    return vars(F) == _FUNCTIONS, *map(bool, hooks)


def keeps_nothing(part: nn.Module) -> None:
    """Declares that the generated forward of a module changes nothing beyond the changes that its parts make."""
    _generated[part] = type(part).forward


def _is_stateless(part: nn.Module) -> bool:
    """Whether a module changes nothing in a forward pass in eval mode and runs no code of the user.

    This holds for certain modules of torch, and for generated modules that call only those.
    """
    kind = type(part)
    if part in _generated:
        own_forward = _generated[part] is kind.forward and "forward" not in vars(part)
        return own_forward and not hooked(part) and not hooked(part, backward=True)
    return (
        (kind.__module__ in STATELESS or kind is nn.Module)  # in a graph, nn.Module is a folder of parts
        and kind in FORWARDS
        and kind.forward is FORWARDS[kind]
        and kind.__call__ is _CALL
        and "max_norm" not in vars(part)  # it makes a call renormalise rows of the weight
        and not any(map(callable, vars(part).values()))
        and not hooked(part)
        and not hooked(part, backward=True)
    )


@contextmanager
def _random_states() -> Iterator[None]:
    numpy = sys.modules.get("numpy.random")
    with torch.random.fork_rng(_cuda_devices()), ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        if numpy is not None:
            stack.callback(numpy.set_state, numpy.get_state(legacy=False))
        yield


def _cuda_devices() -> list[int]:
    """CUDA devices whose random state may be in use. Before the first use of CUDA there are none."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


class Kept:
    """Saved state of modules: everything that a forward pass may change and that can be restored."""

    def __init__(self, parts: Collection[nn.Module] = ()) -> None:
        self.parts = parts
        """All modules that are covered."""
        self.stateless = False
        """Whether all modules are torch's own modules without a state, or graphs of these."""
        self.in_order = False
        """Whether all modules are torch's own modules without a state, so that every forward is torch's."""
        self.trained = False
        """Whether the derivative in parameters is measured: no part may be replaced by a result without a graph."""
        self._seen: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._unkept: list[tuple[str, Tensor, int]] = []  # tensors without a copy
        self._storages: list[tuple[Tensor, Tensor, int]] = []

    def keep(self, parts: Iterable[nn.Module]) -> None:
        """Saves the state of the parts. For stateless parts this is only the versions of parameters.

        Another thread may change the parameters.
        """
        with torch._C.DisableTorchFunction():  # a mode around f, for example of float64, must not act here
            for part in parts:
                self._keep_part(part)

    def _keep_part(self, part: nn.Module) -> None:
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in self._seen:
                self._seen.add(id(parameter))
                self._keep_parameter(part, name, parameter)
        if self.stateless:
            return
        for buffer in part._buffers.values():
            if buffer is not None:
                self._keep_tensor(buffer, buffer=True)
        own = vars(part)
        if isinstance(own, dict):  # in a scripted module it is not a dict
            self._keep(own, LEVELS)

    def _keep_parameter(self, part: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if type(parameter) is nn.Parameter and not parameter.is_inference():
            if not self.stateless:
                data = parameter.detach()
                self._storages.append(
                    (parameter, data, data.data_ptr() if data.layout == torch.strided else 0)
                )
                if getattr(part, "max_norm", None) is not None:  # calls renormalise rows in place
                    self._tensors.append((parameter, parameter._version, data.clone()))
                    return
            self._unkept.append(
                (f"parameter {name!r} of a {type(part).__name__}", parameter, parameter._version)
            )

    def _keep_tensor(self, tensor: Tensor, buffer: bool) -> None:
        if id(tensor) in self._seen or tensor.is_inference() or isinstance(tensor, nn.Parameter):
            return
        self._seen.add(id(tensor))
        if buffer or (tensor.layout == torch.strided and tensor.nbytes <= LARGE_TENSOR):
            self._tensors.append((tensor, tensor._version, tensor.clone()))
        else:
            self._unkept.append((f"a tensor of shape {tuple(tensor.shape)}", tensor, tensor._version))

    def _keep(self, value: Any, levels: int) -> None:
        if isinstance(value, CONTAINERS):
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
            self._containers.append((value, _copy_of(value)))
        elif not isinstance(value, tuple):
            return
        if levels > 1 and len(value) <= LARGE:
            for entry in value.values() if isinstance(value, dict) else value:
                if type(entry) in PLAIN:
                    continue
                if isinstance(entry, Tensor):
                    self._keep_tensor(entry, buffer=False)
                elif isinstance(entry, (*CONTAINERS, tuple)):
                    if entry or type(entry) is not OrderedDict:
                        self._keep(entry, levels - 1)
                    else:  # an empty dict of hooks; a module has many
                        self._containers.append((entry, NOTHING))

    def put_back(self, values: bool = False) -> None:
        """Restores the saved state. values: also compare values, as a change of .data does not change a tensor's version."""
        for now, before in self._containers:
            # Most are empty dicts of hooks, and most others are dicts of a module that stay as they are.
            if now or before:
                is_dict = type(now) is dict and len(now) == len(before)
                if not (
                    is_dict and all(map(is_, now, before)) and all(map(is_, now.values(), before.values()))
                ):
                    _put_back(now, before)
        with torch._C.DisableTorchFunction():  # see `keep`
            for parameter, data, address in self._storages:
                if address and parameter.data_ptr() != address:
                    parameter.data = data
            for tensor, version, value in self._tensors:
                if tensor._version != version:
                    tensor.copy_(value)
                elif values and not (tensor.device.type == "cpu" and torch.equal(tensor, value)):
                    tensor.data.copy_(value)  # on other devices a comparison would wait

    def is_changed(self) -> bool:
        """Whether a forward pass has changed something of what is saved, since it was saved or put back."""
        with torch._C.DisableTorchFunction():
            return any(_differs(now, before) for now, before in self._containers) or any(
                tensor._version != version for tensor, version, _ in self._tensors
            )

    def check(self) -> None:
        with torch._C.DisableTorchFunction():
            changed = [name for name, tensor, version in self._unkept if tensor._version != version]
        if changed:
            raise RuntimeError(
                f"f: its forward pass in eval mode, or another thread, has overwritten {changed[0]}, which cannot be put "
                "back; expected that it stays as it is while f is measured"
            )


def _copy_of(value: Any) -> Any:
    if isinstance(value, OrderedDict):
        return OrderedDict(value) if value else {}
    if isinstance(value, dict):
        return dict(value)
    return set(value) if isinstance(value, set) else list(value)


def _put_back(now: Any, before: Any) -> None:
    """Restores the entries of a container, if they differ, by the methods of its built-in base class."""
    if isinstance(now, dict):
        if not _differs(now, before):
            return
        base = OrderedDict if isinstance(now, OrderedDict) else dict
        for key in [key for key in now if key not in before]:
            base.__delitem__(now, key)
        for key, value in before.items():
            base.__setitem__(now, key, value)
        if not _same(now, before):  # in another order
            base.clear(now)
            for key, value in before.items():
                base.__setitem__(now, key, value)
    elif isinstance(now, set):
        if now != before:
            set.clear(now)
            set.update(now, before)
    elif not _same(now, before):
        sequence: Any = deque if isinstance(now, deque) else list
        sequence.clear(now)
        sequence.extend(now, before)


def _differs(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        return not (_same(now, before) and _same(now.values(), before.values()))
    return now != before if isinstance(now, set) else not _same(now, before)


def _same(now: Any, before: Any) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))
