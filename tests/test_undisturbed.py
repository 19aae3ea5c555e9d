"""What measuring leaves behind: nothing."""

import collections
import copy
import functools
import os
import pickle
import random
import signal

import numpy as np
import pytest
import support
import torch
from spellings import Network, mixed_modes
from torch import Tensor, nn

import lmnfast
from lmnfast import _threads, _undisturbed
from lmnfast._undisturbed import evaluating


def samples(n: int, *shape: int) -> Tensor:
    return support.samples(n, *(shape or (6,)))


def mlp() -> nn.Sequential:
    return support.mlp(6, 16, 3)


def measure_all(model: nn.Module, layer: str, x: Tensor) -> None:
    lmnfast.lmn(model, x)
    lmnfast.jacobians(model, x)
    lmnfast.lmn(*lmnfast.cut(model, layer, x))
    with lmnfast.Probe(model, x, layer, every=1) as probe:
        probe(0)


# Containers, tensors, random states ------------------------------------------------------------------------


class Fills(nn.Module):
    """Changes everything that it has."""

    def __init__(self):
        super().__init__()
        self.network = mlp()
        self.seen: list[Tensor] = []
        self.stats = {"calls": 0, "by": {"rows": 1}}
        self.shapes = {1}
        self.last = collections.deque([1, 2], maxlen=2)
        self.counter = collections.Counter(a=3)
        self.order = collections.OrderedDict(a=1, b=2)
        self.many = collections.defaultdict(list)
        self.plain = torch.zeros(3)
        self.inside = [torch.zeros(3)]
        self.register_buffer("counted", torch.zeros(3))
        self.register_buffer("quietly", torch.zeros(3))

    def forward(self, z):
        y = self.network(z)
        self.seen.append(y)
        self.stats["calls"] += 1
        self.stats["by"]["rows"] += len(z)
        self.stats["by"]["more"] = 1
        self.shapes.add(len(z))
        self.last.append(len(z))
        self.counter.update("ab")
        self.order.move_to_end("a")
        self.many[len(z)].append(1)
        self.plain += 1
        self.inside[0] += 1
        self.counted += 1
        self.quietly.data += 1
        self.new = y
        return y


def contents(model: Fills) -> dict:
    lists = ("seen", "stats", "shapes", "last", "counter", "order", "many", "plain", "inside")
    return {name: getattr(model, name) for name in (*lists, "counted", "quietly")}


def test_containers_and_tensors_that_a_forward_changes_are_put_back_in_place():
    model, x = Fills(), samples(12)
    before, objects = repr(contents(model)), list(map(id, contents(model).values()))
    inner = model.stats["by"], model.inside[0]
    measure_all(model, "network.0", x)
    assert repr(contents(model)) == before and list(map(id, contents(model).values())) == objects
    assert model.stats["by"] is inner[0] and model.inside[0] is inner[1]
    assert not hasattr(model, "new") and list(model.order) == ["a", "b"]
    with pytest.raises(ValueError, match="NaN"):
        lmnfast.lmn(model, x * float("inf"))
    assert repr(contents(model)) == before


def test_a_forward_that_renormalises_its_weights_leaves_them_as_they_were():
    class MaxNorm(nn.Linear):
        def forward(self, z):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
            return super().forward(z)

    embedding = nn.Sequential(nn.Embedding(20, 6, max_norm=0.1), mlp())
    constrained = nn.Sequential(MaxNorm(6, 6), mlp())
    for model, x in ((embedding, torch.arange(20)), (constrained, samples(12))):
        before = copy.deepcopy(model.state_dict())
        addresses = [p.data_ptr() for p in model.parameters()]
        lmnfast.lmn(*lmnfast.cut(model, "0", x))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert addresses == [p.data_ptr() for p in model.parameters()]


def test_a_forward_that_overwrites_its_weights_in_eval_mode_is_refused():
    class Decays(nn.Linear):
        def forward(self, z):
            with torch.no_grad():
                self.weight.mul_(0.99)
            return super().forward(z)

    with pytest.raises(RuntimeError, match="f: .* overwritten parameter 'weight' of a Decays"):
        lmnfast.cut(nn.Sequential(Decays(6, 6), mlp()), "0", samples(9))


def test_random_states_of_python_and_numpy_are_put_back():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = mlp()

        def forward(self, z):
            random.random(), np.random.rand(), torch.rand(1)
            return self.network(z)

    def states():
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    measure_all(Draws(), "network.0", samples(12))
    with pytest.raises(ValueError):
        lmnfast.lmn(Draws(), samples(12) * float("nan"))
    assert states() == before


def drawing(module: nn.Module, *_) -> None:
    np.random.rand()
    module.calls = getattr(module, "calls", 0) + 1


class Drawing(nn.Linear):
    def forward(self, z):
        drawing(self)
        return super().forward(z)


def by_forward(part: nn.Linear) -> nn.Linear:
    def forward(z):
        drawing(part)
        return nn.Linear.forward(part, z)

    part.forward = forward
    return part


def by_hook(part: nn.Linear) -> nn.Linear:
    part.register_forward_hook(drawing)
    return part


def by_pre_hook(part: nn.Linear) -> nn.Linear:
    part.register_forward_pre_hook(drawing)
    return part


def by_parametrization(part: nn.Linear) -> nn.Linear:
    class Draws(nn.Module):
        def forward(self, w):
            drawing(self)
            return w

    return nn.utils.parametrize.register_parametrization(part, "weight", Draws())


def by_backward_hook(part: nn.Linear) -> nn.Linear:
    part.register_full_backward_hook(drawing)
    return part


def by_call(part: nn.Linear) -> nn.Linear:
    part._call_impl = by_forward(nn.Linear(6, 6)).forward
    return part


@pytest.mark.parametrize(
    "drawn",
    [
        lambda part: Drawing(6, 6),
        by_forward,
        by_hook,
        by_pre_hook,
        by_backward_hook,
        by_call,
        by_parametrization,
    ],
    ids=["subclass", "forward", "hook", "pre-hook", "backward hook", "call", "parametrization"],
)
def test_state_in_one_of_the_modules_of_torch_is_put_back(drawn):
    # Networks of torch's own modules alone change nothing, and their state is not kept.
    model, x = nn.Sequential(drawn(nn.Linear(6, 6)), *mlp()), samples(12)

    def kept():
        return repr(np.random.get_state()), [getattr(part, "calls", None) for part in model.modules()]

    before = kept()  # a parametrization has been called when it was registered
    model(x.clone().requires_grad_()).sum().backward()
    assert kept() != before
    before = kept()
    for method in ("path", "hermite", "jacobian"):
        lmnfast.lmn(model, x, method=method)
    assert kept() == before


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_state_from_a_hook_on_all_modules_is_put_back(kind):
    model, before = nn.Sequential(*mlp(), nn.Mish()), repr(np.random.get_state())
    with getattr(nn.modules.module, f"register_module_{kind}")(drawing):
        lmnfast.lmn(model, samples(12), method="hermite")
    assert repr(np.random.get_state()) == before
    assert not any(hasattr(part, "calls") for part in model.modules())


def test_state_from_a_class_of_torch_that_someone_has_patched_is_put_back(monkeypatch):
    plain = nn.Mish.forward

    @functools.wraps(plain)
    def forward(self, z):
        drawing(self)
        return plain(self, z)

    monkeypatch.setattr(nn.Mish, "forward", forward)
    model, before = nn.Sequential(nn.Linear(6, 4), nn.Mish()), repr(np.random.get_state())
    lmnfast.lmn(model, samples(12))
    assert repr(np.random.get_state()) == before and not hasattr(model[1], "calls")


def test_state_from_a_function_of_torch_that_someone_has_patched_is_put_back(monkeypatch):
    plain = nn.functional.mish
    model, before = nn.Sequential(nn.Linear(6, 4), nn.Mish()), repr(np.random.get_state())

    def mish(z, inplace=False):
        drawing(model[1])
        return plain(z, inplace)

    monkeypatch.setattr(nn.functional, "mish", mish)
    lmnfast.lmn(model, samples(12))
    assert repr(np.random.get_state()) == before and not hasattr(model[1], "calls")


# Copies ----------------------------------------------------------------------------------------------------


def test_a_probe_can_be_copied_and_pickled_with_its_model():
    model, x = mlp(), samples(9)
    with lmnfast.Probe(model, x, "0", every=1) as probe:
        probe(0)
        model.probe = probe
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with copied.probe as other:
                assert other.model is copied and other.history == probe.history
                copied[2].weight.data.mul_(2)
                copied[0].weight.data.mul_(2)
                other()
                assert [row["step"] for row in other.history] == [0, 1] and len(probe.history) == 1
                assert other.history[1]["lmn"] != other.history[0]["lmn"]
        del model.probe
    assert not copy.deepcopy(probe).pending
    with pytest.raises(RuntimeError, match="closed"):
        copy.deepcopy(probe)(5)


def test_nested_contexts_put_back_what_each_found():
    model = Fills()
    with evaluating(model):
        model.stats["calls"] = 5
        with evaluating(model) as kept:
            model(samples(3))
            kept.put_back()
            assert model.stats["calls"] == 5 and not model.training
        assert model.stats["calls"] == 5 and not model.training
    assert model.stats["calls"] == 0 and model.training


# Ctrl-C


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_of_a_block(interruptible):
    done = []
    with pytest.raises(KeyboardInterrupt), _threads.uninterrupted():
        interrupt()
        done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("method", ["keep", "put_back"])
def test_an_interrupt_while_the_state_is_kept_or_put_back_loses_none_of_it(
    method, interruptible, monkeypatch
):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads, random_state = torch.is_grad_enabled(), torch.get_rng_state()
    original = getattr(_undisturbed.Kept, method)

    def interrupted(self, *args, **kwargs):
        interrupt()
        original(self, *args, **kwargs)

    monkeypatch.setattr(_undisturbed.Kept, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        lmnfast.lmn(model, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    assert all(part.training for part in model.modules()) and torch.is_grad_enabled() is grads
    assert torch.equal(torch.get_rng_state(), random_state) and torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_interrupt_while_a_model_is_traced_leaves_torch_as_it_was(interruptible):
    class Interrupting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, z):
            if isinstance(z, torch.fx.Proxy):
                interrupt()
            return self.linear(z).tanh()

    call = nn.Module.__call__
    with pytest.raises(KeyboardInterrupt):
        lmnfast.lmn(Interrupting(), torch.randn(6, 4))
    assert nn.Module.__call__ is call
    nn.Linear(2, 2)(torch.zeros(1, 2))


def test_a_forward_or_a_call_that_is_not_torchs_is_no_network_that_keeps_no_state(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
    with _undisturbed.evaluating(model) as kept:
        assert kept.stateless and kept.in_order
    original = nn.ReLU.__call__
    monkeypatch.setattr(nn.ReLU, "__call__", lambda self, z: original(self, z) + z**2)
    with _undisturbed.evaluating(model) as kept:
        assert not kept.stateless
    expected = lmnfast.connectivity(lambda z: model(z), x)
    assert (lmnfast.connectivity(model, x) - expected).abs().max() < 1e-5


def test_a_linear_with_a_norm_of_the_users_is_measured():
    model = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3))
    model[0].max_norm = 1.0
    assert lmnfast.lmn(model, torch.randn(8, 4)) >= 1


# Modes ---------------------------------------------------------------------------------------------------


def test_evaluating_restores_every_modules_own_mode_also_after_an_error():
    model = mixed_modes(Network())
    modes = [part.training for part in model.modules()]
    with pytest.raises(OverflowError), evaluating(model, torch.relu):
        assert not any(part.training for part in model.modules()) and not torch.is_grad_enabled()
        raise OverflowError
    assert [part.training for part in model.modules()] == modes and torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is, but its modules are about
def test_evaluating_restores_scripted_modules():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert all(part.training for part in model.modules())


def test_evaluating_does_not_call_train():
    class Rewrites(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("rewrote its weights")

    with evaluating(Rewrites(3, 3)):
        pass
