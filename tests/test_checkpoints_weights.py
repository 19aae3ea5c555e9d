"""State dicts found in files of every kind, and refused where they are none or would run code."""

import argparse
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpointed import LAYERS, command, failure
from torch import nn

from lmnfast.checkpoints import find_checkpoints, measure_checkpoints, read_state
from lmnfast.checkpoints import measure as measuring
from lmnfast.checkpoints.weights import load_state


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": {"model_state_dict": s}, "loss": torch.tensor(1.0)},
    lambda s: {"module": s},
    lambda s: {f"module.{name}": value for name, value in s.items()},
    lambda s: {f"_orig_mod.module.{name}": value for name, value in s.items()},
    lambda s: {"state_dict": {f"model._orig_mod.{name}": value for name, value in s.items()}},
])  # fmt: skip
def test_nested_and_prefixed_state_dicts_are_found(wrap, trained):
    plain = measure_checkpoints("nets:make", "step_2.pt", "x.npy", "1")
    torch.save(wrap(trained[2]), "wrapped_2.pth")
    wrapped = measure_checkpoints("nets:make", "wrapped_2.pth", "x.npy", "1")
    assert wrapped[0]["lmn_1"] == plain[0]["lmn_1"]


def loaded(model, state):
    """Whether the model gets the values, all others than its own, that its own state dict's order gives it."""
    load_state(model, state, "a.pt")
    return all(
        torch.equal(mine, value)
        for mine, value in zip(model.state_dict().values(), state.values(), strict=True)
    )


def changed(model, names=lambda name: name):
    return {names(name): value + 1 for name, value in model.state_dict().items()}


def stack():
    return nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 2)))


WRAPPERS = ("_orig_mod", "module", "_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrappers_are_left_out_and_put_in_wherever_they_are(wrapper):
    def inside(name):
        return name.replace(".", f".{wrapper}.", 1)

    for names in (inside, lambda name: f"{wrapper}.{name}", lambda name: f"{wrapper}.{inside(name)}"):
        assert loaded(stack(), changed(stack(), names))
    wrapped = stack()
    wrapped[0] = nn.ModuleDict({wrapper: wrapped[0]})
    assert loaded(wrapped, changed(stack()))


def test_a_module_named_like_a_wrapper_keeps_its_name():
    outer = nn.ModuleDict({"module": stack()})
    for front in ("", "module.", "model._orig_mod."):
        assert loaded(outer, changed(outer, lambda name, front=front: front + name))
    teacher = stack()
    teacher.module = stack()  # so that each name is in it with and without "module."
    assert loaded(teacher, changed(teacher))
    assert loaded(teacher, changed(nn.DataParallel(teacher)))


def test_a_state_dict_with_every_weight_twice_is_refused_until_one_is_chosen(trained, capsys):
    both = trained[2] | {f"module.{name}": value for name, value in trained[10].items()}
    for state in (both, dict(reversed(both.items()))):
        torch.save({"state_dict": state}, "both.pt")
        line = failure(capsys, command(checkpoint="both.pt"))
        name = next(iter(trained[2] if state is both else reversed(trained[2])))
        assert line == (
            f"checkpoint: both.pt holds {name} of the model twice, as {name} and as module.{name}; choose with "
            "--key, which takes names by what they begin with, as --key module"
        )
    assert read_state("both.pt", "state_dict.module").keys() == trained[10].keys()
    chosen = measure_checkpoints("nets:make", "both.pt", "x.npy", "1", key="state_dict.module")
    assert chosen[0]["lmn_1"] == measure_checkpoints("nets:make", "step_10.pt", "x.npy", "1")[0]["lmn_1"]


def test_of_several_state_dicts_one_has_to_be_chosen(trained, capsys):
    torch.save({"state_dict": trained[2], "model": {"module": trained[10]}}, "both.pt")
    torch.save({"net": trained[2], "ema": trained[10], "epoch": 3}, "other.pt")
    for file, keys in (("both.pt", "state_dict, model.module"), ("other.pt", "net, ema")):
        line = f"checkpoint: {file} holds several state dicts; choose with --key among {keys}"
        assert failure(capsys, command(checkpoint=file)) == line
        for key, step in zip(keys.split(", "), (2, 10), strict=True):
            assert torch.equal(read_state(file, key)["0.bias"], trained[step]["0.bias"])
    torch.save({"net": trained[2], "optimiser": {"state": {0: {"mean": torch.ones(1)}}}}, "one.pt")
    assert read_state("one.pt").keys() == trained[2].keys()


class Versioned(nn.Module):
    """Reads its version, and that of a module without weights, from the state dict's metadata."""

    _version = 3

    def __init__(self, inner=None):
        super().__init__()
        self.inner = stack() if inner is None else inner

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version") != 3:
            raise AssertionError
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def versioned():
    model = Versioned()
    model.inner[0][1] = Versioned(nn.Identity())
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        nn.DataParallel,
        lambda model: nn.ModuleDict({"model": nn.ModuleDict({"_orig_mod": model})}),
        lambda model: setattr(model.inner, "0", nn.ModuleDict({"module": model.inner[0]})) or model,
        lambda model: nn.DataParallel(setattr(model, "inner", nn.DataParallel(model.inner)) or model),
    ],
    ids=["plain", "DataParallel", "compiled in Lightning", "wrapped inside", "wrapped twice"],
)
def test_the_versions_in_a_state_dict_are_kept(wrap, place):
    state = wrap(versioned()).state_dict()
    for content, key in ((state, None), ({"state_dict": state}, None), ({"a": {"b": state}}, "a.b")):
        torch.save(content, "step_1.pt")
        load_state(versioned(), read_state("step_1.pt", key), "step_1.pt")
    torch.save(nn.ModuleDict({"net": wrap(versioned()), "head": stack()}).state_dict(), "step_1.pt")
    load_state(versioned(), read_state("step_1.pt", "net"), "step_1.pt")
    with pytest.raises(ValueError, match="^checkpoint: step_1.pt does not fit the model: AssertionError$"):
        load_state(versioned(), dict(state), "step_1.pt")


def test_dtypes_that_do_not_fit_are_refused_and_named(place):
    def model():
        made = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        made.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        return made

    plain = model().state_dict()
    weight = plain["0.weight"]
    for name, value, said in (
        ("0.weight", weight.mul(100).to(torch.int8), "int8 in the file, float32 in the model"),
        ("0.weight", weight.bool(), "bool in the file, float32 in the model"),
        ("0.weight", weight.to(torch.complex64), "complex64 in the file, float32 in the model"),
        ("0.weight", weight.to(torch.float8_e4m3fn), "float8_e4m3fn in the file, float32 in the model"),
        ("mask", torch.tensor([2, 1]), "int64 in the file, bool in the model"),
        ("1.num_batches_tracked", torch.tensor(0.5), "float32 in the file, int64 in the model"),
    ):
        torch.save(plain | {name: value}, "a.pt")
        with pytest.raises(ValueError) as error:
            load_state(model(), read_state("a.pt"), "a.pt")
        assert str(error.value).startswith(f"checkpoint: a.pt does not fit the model: {name} is {said}")
    for name, value in (
        ("0.weight", weight.double()),
        ("0.weight", weight.bfloat16()),
        ("mask", torch.tensor([0, 1], dtype=torch.uint8)),
        ("1.num_batches_tracked", torch.tensor(7.0)),
    ):
        fitting = model()
        load_state(fitting, plain | {name: value}, "a.pt")
        assert torch.equal(fitting.state_dict()[name], value.to(plain[name].dtype))


def test_a_part_of_a_weight_does_not_stand_for_the_whole(place):
    """They begin at one address, as tied weights do."""
    model = nn.Linear(3, 4, bias=False)
    model.register_buffer("part", model.weight.detach()[:2])
    with pytest.raises(ValueError, match="does not fit the model: it lacks weight"):
        load_state(model, {"part": torch.ones(2, 3)}, "a.pt")


def test_a_key_names_the_state_dict(trained):
    torch.save({"model": trained[2], "averages": {"ema": trained[10]}}, "both.pt")
    for key, step in ((None, 2), ("averages.ema", 10)):
        for name, value in read_state("both.pt", key).items():
            assert torch.equal(value, trained[step][name])


def test_safetensors_are_read_tied_weights_too(trained):
    files = pytest.importorskip("safetensors.torch", reason="needs the safetensors package")
    for step, state in trained.items():
        files.save_file(state, f"step_{step}.safetensors")
    files.save_file({"x": torch.from_numpy(np.load("x.npy"))}, "inputs.safetensors")
    pickles = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS)
    rows = measure_checkpoints("nets:make", "step_*.safetensors", "inputs.safetensors", LAYERS)
    for row, expected in zip(rows, pickles, strict=True):
        assert row == expected | {"checkpoint": expected["checkpoint"].replace(".pt", ".safetensors")}
    import nets

    model = nets.Tied()
    files.save_model(model, "tied.safetensors")
    assert len(read_state("tied.safetensors")) == 1
    load_state(nets.Tied(), read_state("tied.safetensors"), "tied.safetensors")


def test_without_the_safetensors_package_the_error_says_what_to_install(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    Path("a.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    line = failure(capsys, command(checkpoint="a.safetensors"))
    assert line.startswith("checkpoint: a.safetensors needs") and "pip install 'lmnfast[safetensors]'" in line


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


class Settings(dict):
    """A class that a checkpoint may name."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("content", [Evil(), {"model": {"0.weight": torch.ones(1)}, "hook": Evil()}])
def test_a_pickle_that_needs_code_is_refused_and_not_run(content, legacy, trained, monkeypatch, capsys):
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=not legacy)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    line = failure(capsys, command(checkpoint="evil.pt"))
    assert (
        line.startswith("checkpoint: evil.pt holds more than tensors and plain values (") and "mkdir" in line
    )
    assert "no code of a file is run" in line
    assert "torch.save(torch.load('evil.pt', weights_only=False)['state_dict'], 'plain.pt')" in line
    assert failure(capsys, command(inputs="evil.pt")).startswith("inputs: evil.pt holds more than")
    np.save("evil.npy", np.array([Evil()]), allow_pickle=True)
    assert failure(capsys, command(inputs="evil.npy")).startswith("inputs: cannot read evil.npy: ")
    assert not Path("executed").exists()


def test_values_of_other_classes_beside_the_weights_are_left_out(trained):
    """None of them is made: their classes need not be there, and what they do is not done."""
    import nets

    nets.Config = type(
        "Config", (), {"__module__": "nets", "__setstate__": lambda self, state: os.mkdir("executed")}
    )
    beside = {
        "best": np.float64(0.3), "epoch": np.int64(3), "done": np.bool_(True), "random": np.random.get_state(),
        "args": argparse.Namespace(lr=0.1, out=Path("runs")), "config": nets.Config(),
    }  # fmt: skip
    beside["config"].width = 3
    torch.save({**beside, "model": trained[2]}, "step_2.pt")
    before = set(torch.serialization.get_safe_globals())
    for config in (nets.Config, None):
        nets.Config = config
        state = read_state("step_2.pt")
        assert all(torch.equal(state[name], value) for name, value in trained[2].items())
    assert not Path("executed").exists() and set(torch.serialization.get_safe_globals()) == before


def test_a_state_of_a_module_that_was_left_out_does_not_reach_the_model(place):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"scales": [np.float64(2)]}

        def set_extra_state(self, state):
            raise AssertionError

    torch.save({"state_dict": Extra(3, 2).state_dict()}, "extra.pt")
    with pytest.raises(ValueError, match=r"^checkpoint: extra.pt holds more than .* \(scalar\)") as error:
        read_state("extra.pt")
    assert "torch.load('extra.pt', weights_only=False)['state_dict'], 'plain.pt')" in str(error.value)


def test_a_checkpoint_that_holds_itself_is_refused(place):
    content = {"epoch": 3}
    content["model"] = content["module"] = content
    torch.save(content, "endless.pt")
    with pytest.raises(ValueError, match="^checkpoint: no state dict in endless.pt, which holds a dict of"):
        read_state("endless.pt")


def test_whole_modules_and_other_classes_of_dicts_are_refused_with_what_to_do(trained, capsys):
    model = sys.modules["nets"].make()
    for content, key, where in (
        (model, [], ".state_dict()"),
        ({"epoch": 3, "net": model}, [], "['net'].state_dict()"),
        ({"a": {"net": model}}, ["--key=a"], "['a']['net'].state_dict()"),
        ({"a": {"net": model}}, ["--key=a.net"], "['a']['net'].state_dict()"),
    ):
        torch.save(content, "whole.pt")
        line = failure(capsys, command(*key, checkpoint="whole.pt"))
        assert line.startswith("checkpoint: whole.pt holds more than tensors and plain values (Sequential)")
        assert line.endswith(f"torch.save(torch.load('whole.pt', weights_only=False){where}, 'plain.pt')")
    torch.save({"net": trained[2], "settings": Settings(a=1)}, "settings.pt")
    line = failure(capsys, command(checkpoint="settings.pt"))
    assert "Settings)" in line and line.endswith("with the key that is there for 'state_dict'")
    torch.save({"args": argparse.Namespace(lr=1)}, "none.pt")
    line = failure(capsys, command(checkpoint="none.pt"))
    assert line.startswith(
        "checkpoint: no state dict in none.pt, which holds a dict of 'args', ['args'] a Namespace"
    )


@pytest.mark.parametrize(
    "name", ["step_2.pth.tar", "step_2", "step_2.model", "step_2.safetensors", "step_2.npz"]
)
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_checkpoint_is_read_for_what_it_holds_whatever_its_name(name, kind, trained):
    if kind == "safetensors":
        files = pytest.importorskip("safetensors.torch", reason="needs the safetensors package")
        files.save_file(trained[2], name)
    else:
        torch.save(trained[2], name, _use_new_zipfile_serialization=kind == "zip")
    assert find_checkpoints([name]) == [name]
    state = read_state(name)
    assert all(torch.equal(state[key], value) for key, value in trained[2].items()) and len(state) == 4 + 2


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4096\n"


@pytest.mark.parametrize(
    "content, said",
    [
        (LFS, "FILE is a Git LFS pointer; git lfs pull fetches the file itself"),
        (b"\n<!DOCTYPE html>\n<html>", "FILE is an HTML page; download the file itself"),
        (b"<?xml version='1.0'?><Error/>", "FILE is an XML text; download the file itself"),
        (b"", "FILE is empty"),
        (b"a plain text\n", "expected a file of torch.save or safetensors, FILE begins with b'a plain text"),
        (b'{"weight_map": {}}', "expected a file of torch.save or safetensors, FILE begins with b'{\"weight"),
    ],
    ids=["LFS", "HTML", "XML", "empty", "text", "JSON"],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_what_is_no_checkpoint_is_refused_before_any_is_measured(
    content, said, suffix, trained, capsys, monkeypatch
):
    monkeypatch.setattr(measuring, "_measured", None)
    file = Path(f"step_500{suffix}")
    file.write_bytes(content)
    said = f"checkpoint: {said.replace('FILE', str(file))}"
    assert failure(capsys, command(checkpoint="step_*")).startswith(said)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_state(file)
    if content == LFS:
        for inputs in ("x.npy", "x.npz", "x.pt"):
            Path(inputs).write_bytes(content)
            assert failure(capsys, command(inputs=inputs)).startswith(
                f"inputs: {inputs} is a Git LFS pointer"
            )


def test_a_damaged_checkpoint_is_one_line_that_names_it(trained, capsys):
    whole = Path("step_2.pt").read_bytes()
    place = whole.index(trained[2]["0.weight"].numpy().tobytes())
    flipped = bytearray(whole)
    flipped[place + 3] ^= 1  # the sign and exponent of a weight, so a number all the same
    torch.save(trained[2], "legacy.pt", _use_new_zipfile_serialization=False)
    for content in (
        flipped, whole[: len(whole) // 2], whole[:-1], Path("legacy.pt").read_bytes()[:400],
        b"PK\3\4", b"\x80\2}q\0.", (99).to_bytes(8, "little") + b'{"0.weight": ',
    ):  # fmt: skip
        Path("bad.pt").write_bytes(content)
        assert failure(capsys, command(checkpoint="bad.pt")).startswith("checkpoint: cannot read bad.pt: ")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(trained[2], "unsummed.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_state("unsummed.pt").keys() == trained[2].keys()
