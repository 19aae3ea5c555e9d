"""Networks that are no plain PyTorch: exported, scripted, compiled, copied by DDP, quantised."""

import copy

import pytest
import torch
from architectures import FLOAT32, history_of, snapshot, truth, vectors
from torch import nn

import lmnfast
from lmnfast._recognise import recognise


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 3))


@pytest.mark.filterwarnings("ignore")  # of torch.export
def test_exported_programs_are_measured_where_they_take_any_number_of_samples():
    model, x = mlp(), vectors()
    right = lmnfast.lmn(model, x)
    fixed = torch.export.export(model, (x,))
    for program in (
        fixed.module(),
        torch.export.unflatten(fixed),
        nn.Sequential(fixed.module(), nn.Identity()),
    ):
        for measure in (lmnfast.lmn, lmnfast.jacobians):
            with pytest.raises(
                ValueError, match="f: .* for batches of 14 samples alone, .* dynamic first dimension"
            ):
                measure(program, x)
    dynamic = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("samples")},))
    assert float(lmnfast.lmn(dynamic.module(), x)) == pytest.approx(float(right), rel=1e-5)
    with pytest.raises(ValueError, match="'0' was called 0 times .* torch.export.unflatten"):
        lmnfast.cut(dynamic.module(), "0", x)
    tail, samples = lmnfast.cut(torch.export.unflatten(dynamic), "0", x)
    right = lmnfast.lmn(*lmnfast.cut(model, "0", x))
    assert float(lmnfast.lmn(tail, samples)) == pytest.approx(float(right), rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, but its modules are about
def test_scripted_parts_are_measured_and_their_insides_refused():
    model, x = mlp(), vectors()
    right = float(lmnfast.lmn(*lmnfast.cut(model, "0", x)))
    partly = nn.Sequential(torch.jit.script(model[0]), model[1:])
    assert float(lmnfast.lmn(*lmnfast.cut(partly, "0", x))) == pytest.approx(right, rel=1e-5)
    for compiled in (torch.jit.script(model), torch.jit.trace(model, x)):
        assert float(lmnfast.lmn(compiled, x)) == pytest.approx(float(lmnfast.lmn(model, x)), rel=1e-5)
        with pytest.raises(ValueError, match="'0' was called 0 times .* lies in a scripted or traced module"):
            lmnfast.cut(compiled, "0", x)


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_names_need_not_have_what_wrappers_put_into_them():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, x = nn.Sequential(nn.Linear(6, 6), mlp()), vectors()
    right = float(lmnfast.lmn(*lmnfast.cut(model, "1.0", x)))
    wrapped = {
        "module.1.0": nn.DataParallel(model),
        "_orig_mod.1.0": torch.compile(model, backend="eager"),
        "_orig_mod.module.1.0": torch.compile(nn.DataParallel(model), backend="eager"),
        "1._checkpoint_wrapped_module.0": nn.Sequential(model[0], checkpoint_wrapper(model[1])),
        "1._orig_mod.0": nn.Sequential(model[0], torch.compile(model[1], backend="eager")),
    }
    for name, wrapper in wrapped.items():
        if name == "1._orig_mod.0":
            wrapper(x)  # compiled by now, without the hook
        for layer in (name, "1.0"):
            tail, samples = lmnfast.cut(wrapper, layer, x)
            assert float(lmnfast.lmn(tail, samples)) == pytest.approx(right, rel=1e-5)
        assert lmnfast.match_layers(wrapper, "1.?") == ("1.0", "1.1", "1.2")
        assert history_of(wrapper, x, "1.0")[0]["lmn"] == pytest.approx(right, rel=1e-5)
    assert lmnfast.match_layers(nn.DataParallel(model), "module.1.?")[0] == "module.1.0"
    assert recognise(nn.DataParallel(mlp())) is not None
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        wrapper.register_forward_hook(lambda module, args, output: output.sin())
        tail, samples = lmnfast.cut(wrapper, "1.0", x)
        torch.testing.assert_close(tail(samples), model(x).sin())
    owner = nn.DataParallel(nn.Sequential())
    owner.module.module = nn.Sequential(mlp())  # a part that is called module is the user's
    assert torch.equal(lmnfast.cut(owner, "module.module.0.0", x)[1], owner.module.module[0][0](x).detach())


def test_the_copies_that_ddp_keeps_in_step_are_left_out_of_a_measurement():
    """On one rank alone its forward, which broadcasts the buffers, would wait for the others."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), vectors()
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.forward = None
        right = lmnfast.lmn(*lmnfast.cut(model, "0", x))
        for layer in ("0", "module.0"):
            assert torch.equal(lmnfast.lmn(*lmnfast.cut(parallel, layer, x)), right)
    finally:
        dist.destroy_process_group()


class Around(nn.Module):
    """A part with a skip connection around it."""

    def __init__(self, part):
        super().__init__()
        self.stem, self.part, self.head = nn.Linear(6, 6), part, nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.part(x))


DYNAMIC = {"dynamic_shapes": ({0: torch.export.Dim("samples")},)}
WRAPPED = {
    "scripted": lambda part, x: torch.jit.script(part),
    "traced": lambda part, x: torch.jit.trace(part, x),
    "compiled": lambda part, x: torch.compile(part, backend="eager"),
    "data parallel": lambda part, x: nn.DataParallel(part),
    "exported": lambda part, x: torch.export.export(part, (x,), **DYNAMIC).module(),
    "unflattened": lambda part, x: torch.export.unflatten(torch.export.export(part, (x,), **DYNAMIC)),
}
INSIDE = {
    "scripted": "it lies in a scripted or traced module",
    "traced": "it lies in a scripted or traced module",
    "exported": "it lies in a graph that calls single operations, as a program of torch.export",
}


@pytest.mark.filterwarnings("ignore")  # of torch.jit and torch.export
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_part_is_measured_whole_and_its_insides_where_they_are_called(kind, capfd):
    torch.manual_seed(0)
    x, part = vectors(), nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6))
    model, wrapped = Around(part), Around(WRAPPED[kind](part, vectors()))
    wrapped.stem, wrapped.head = model.stem, model.head
    for how in ({"block": "part"}, {"layer": "stem", "until": "part"}, {"layer": ""}, {"layer": "stem"}):
        right = float(lmnfast.lmn(*lmnfast.cut(model, inputs=x, **how)))
        assert float(lmnfast.lmn(*lmnfast.cut(wrapped, inputs=x, **how))) == pytest.approx(right, rel=1e-5)
    for argument, how in {
        "block": {"block": "part.0"},
        "until": {"layer": "stem", "until": "part.0"},
    }.items():
        if kind in INSIDE:
            with pytest.raises(
                ValueError, match=f"{argument}: 'part.0' was called 0 times .* {INSIDE[kind]}"
            ):
                lmnfast.cut(wrapped, inputs=x, **how)
        else:
            tail, samples = lmnfast.cut(wrapped, inputs=x, **how)
            torch.testing.assert_close(tail(samples), model.part[0](model.stem(x)))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_dynamically_quantised_layers_are_refused_and_those_behind_them_measured():
    from torch.ao.quantization import quantize_dynamic

    x = vectors()
    half = nn.Sequential(
        quantize_dynamic(nn.Sequential(nn.Linear(6, 8)), {nn.Linear}), nn.Tanh(), nn.Linear(8, 3)
    )
    with pytest.raises(
        ValueError, match="f: its part '0.0' is quantised dynamically: no scale is part of its state"
    ):
        lmnfast.lmn(half, x)
    with pytest.raises(ValueError, match="f: its part '0' is quantised dynamically"):
        lmnfast.lmn(*lmnfast.cut(half, block="0", inputs=x))
    tail, samples = lmnfast.cut(half, "0", x)
    L = truth(copy.deepcopy(half[1:]).double(), samples)
    assert (lmnfast.connectivity(tail, samples) - L).abs().max() < FLOAT32


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_observers_of_quantisation_stand_still():
    from torch.ao import quantization

    model = nn.Sequential(quantization.QuantStub(), mlp(), quantization.DeQuantStub()).train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)
    x = vectors(20)
    x[-1] *= 5
    model(x[:10])
    before = snapshot(model)
    values = [float(lmnfast.lmn(model, x)) for _ in range(2)]
    for (_, tensor, value, _), (_, now, _, _) in zip(before, snapshot(model), strict=True):
        assert tensor is now and torch.equal(tensor, value)
    model.eval().apply(quantization.disable_observer)
    expected = truth(lambda z: model(z.float()), x)
    assert values == pytest.approx([float(lmnfast.linear_mapping_number(expected))] * 2, rel=0.01)


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_statically_quantised_networks_are_measured_between_floating_point_tensors():
    from torch.ao import quantization

    model = nn.Sequential(
        quantization.QuantStub(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), quantization.DeQuantStub()
    ).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    quantization.prepare(model, inplace=True)
    x = vectors()
    model(x)
    quantization.convert(model, inplace=True)
    expected = lmnfast.linear_mapping_number(truth(lambda z: model(z.float()), x))
    assert float(lmnfast.lmn(model, x)) == pytest.approx(float(expected), rel=0.01)
    with pytest.raises(TypeError, match="quint8; .* cut behind the DeQuantStub"):
        lmnfast.cut(model, "1", x)
    with pytest.raises(
        TypeError, match="until: the output of '3' is .*quint8; .* cut behind the DeQuantStub"
    ):
        lmnfast.cut(model, "", x, until="3")
    with pytest.raises(
        TypeError, match="block: '1' takes no .*quint8; .* name a block behind the DeQuantStub"
    ):
        lmnfast.cut(model, block="1", inputs=x)
    tail, samples = lmnfast.cut(model, "inputs", x, until="4")
    assert float(lmnfast.lmn(tail, samples)) == pytest.approx(float(expected), rel=0.01)
