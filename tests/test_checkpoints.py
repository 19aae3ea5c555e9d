import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lmnfast
from lmnfast import cli
from lmnfast._connectivity import measured
from lmnfast.checkpoints import find_checkpoints, first_samples, load_inputs, measure_checkpoints, read_state
from lmnfast.checkpoints import measure as measuring
from lmnfast.checkpoints.weights import imported, load_state
from lmnfast.spectrum import SETTINGS

DOCS = Path(__file__).parent.parent / "docs/checkpoints.md"
LAYERS = ("1", "3")

NETS = """
import os, time, torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 10), nn.SiLU(), nn.Linear(10, 3))

class Noisy(nn.Module):
    "Has something random that no checkpoint has."
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)
        self.register_buffer("mask", torch.randn(10), persistent=False)
    def forward(self, x):
        return self.last(torch.tanh(self.first(x) * self.mask))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(7, 4), nn.Linear(8, 9), nn.Linear(9, 3)
    def forward(self, tokens, scale=None):
        x = self.embedding(tokens).flatten(1)
        x = x if scale is None else x * scale
        return {"logits": self.last(torch.tanh(self.first(x))), "other": x}

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 7), nn.Linear(7, 7, bias=False)
        self.head.weight = self.embedding.weight
    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)))

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 5)
    def forward(self, x):
        x = torch.tanh(2 * self.hidden(x))
        return self.a(x), self.b(x)

class Slow(nn.Sequential):
    "Takes its time for all checkpoints but the first."
    def load_state_dict(self, *args, **kwargs):
        if os.path.exists("loaded"):
            time.sleep(60)
        open("loaded", "w").close()
        return super().load_state_dict(*args, **kwargs)

def slow():
    return Slow(*make())

def dies():
    if "spawn" in __import__("multiprocessing").current_process().name.lower():
        os._exit(1)
    return make()

def twice(model, inputs):
    return model(2 * inputs)

def fails():
    raise RuntimeError("out of\\nluck")

def needs(width):
    return make()

def number():
    return 3

net = make()
table = {}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty current directory with the module nets, and what imports leave undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("nets.py").write_text(NETS)
    yield tmp_path
    for name in ("nets", "broken", "absent", "digits"):
        sys.modules.pop(name, None)


@pytest.fixture
def trained(place):
    """step_2.pt, step_10.pt, step_100.pt of nets:make, and x.npy."""
    sys.path.insert(0, str(place))
    import nets

    generator = torch.Generator().manual_seed(0)
    states = {}
    for step in (2, 10, 100):
        states[step] = random_state(nets.make(), generator)
        torch.save(states[step], f"step_{step}.pt")
    np.save("x.npy", torch.randn(12, 6, generator=generator, dtype=torch.float64).numpy())
    return states


def random_state(model, generator):
    return {
        name: torch.randn(value.shape, generator=generator).clone()
        for name, value in model.state_dict().items()
    }


def by_hand(model, state, layer, x, **settings):
    model.load_state_dict(state)
    return float(f"{lmnfast.measure(*lmnfast.cut(model, layer, x), **settings).lmn:.7g}")


def command(*more, model="nets:make", checkpoint="step_*.pt", inputs="x.npy", layers=LAYERS):
    given = [f"--layer={layer}" for layer in layers]
    return [
        "checkpoints", f"--model={model}", f"--checkpoint={checkpoint}", f"--inputs={inputs}", *given, *more
    ]  # fmt: skip


def failure(capsys, arguments):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith("lmnfast: error: ")
    return lines[0].removeprefix("lmnfast: error: ")


def table(path="lmn/lmn.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# Values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"method": "hermite"}, {"points": 9, "rule": "lobatto"}, {"negative": "clip"}]
)
def test_rows_are_what_measure_gives_by_hand(settings, trained):
    import nets

    rows = measure_checkpoints(nets.make, "step_*.pt", "x.npy", LAYERS, **settings)
    x = torch.from_numpy(np.load("x.npy")).float()
    assert [row["step"] for row in rows] == [2, 10, 100]
    for row in rows:
        for layer in LAYERS:
            assert row[f"lmn_{layer}"] == by_hand(nets.make(), trained[row["step"]], layer, x, **settings)
        assert row["samples"] == 12 and row["method"] == settings.get("method", "path")
    assert len({row["lmn_1"] for row in rows}) == 3
    assert not Path("lmn").exists()


def test_the_command_prints_and_leaves_a_table_and_a_figure(trained, capsys):
    assert cli.main(command("--samples=9", layers=["[13]"])) == 0
    header, *lines, written, drawn = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "lmn_1", "lmn_3"]
    rows = table()
    columns = (
        "step checkpoint lmn_1 lmn_3 samples outputs points rule method precision solver negative constant_share_1 "
        "constant_share_3 negative_share_1 negative_share_3"
    )
    assert list(rows[0]) == columns.split()
    assert [line.split()[0] for line in lines] == [row["step"] for row in rows] == ["2", "10", "100"]
    assert [row["checkpoint"] for row in rows] == ["step_2.pt", "step_10.pt", "step_100.pt"]
    settings = ("9", "3", "21", "uniform", "path", "highest", "cpu", "absolute")
    assert all(tuple(row[name] for name in SETTINGS) == settings for row in rows)
    assert (written, drawn) == ("written: lmn/lmn.csv", "written: lmn/lmn.png")
    assert Path("lmn/lmn.png").read_bytes().startswith(b"\x89PNG")
    import nets

    x = torch.from_numpy(np.load("x.npy")).float()[:9]
    assert float(rows[0]["lmn_1"]) == by_hand(nets.make(), trained[2], "1", x)


def test_the_old_spelling_works_and_names_the_new(trained, capsys):
    old = ["measure", *command()[1:]]
    for arguments in (command(), old, [word.replace("--model", "--mod") for word in old]):
        assert cli.main(arguments) == 0
        said = capsys.readouterr()
        notes = [line for line in said.err.splitlines() if line.startswith("lmnfast: ")]
        note = "lmnfast: measure --model has a name of its own now: lmnfast checkpoints --model ..."
        assert notes == ([] if arguments[0] == "checkpoints" else [note])
        assert said.out.splitlines()[-2:] == ["written: lmn/lmn.csv", "written: lmn/lmn.png"]


def test_several_processes_give_the_same_table_and_keep_what_they_have_when_one_fails(trained, capsys):
    assert cli.main(command("--out=one", "--forward=nets:twice")) == 0
    Path("step_50.pt").write_bytes(Path("step_2.pt").read_bytes()[:200])
    several = command("--out=two", "--forward=nets:twice", "--jobs=2")
    assert failure(capsys, several).startswith("checkpoint: cannot read step_50.pt: ")
    assert {row["step"] for row in table("two/lmn.csv")} >= {"2", "10"}
    os.remove("step_50.pt")
    assert cli.main(several) == 0
    assert Path("one/lmn.csv").read_bytes() == Path("two/lmn.csv").read_bytes()


def test_a_model_with_something_random_is_the_same_each_time(trained):
    import nets

    before = torch.get_rng_state()
    torch.save(random_state(nets.Noisy(), torch.Generator().manual_seed(1)), "noisy.pt")
    torch.set_rng_state(before)
    rows = [measure_checkpoints("nets:Noisy", "noisy.pt", "x.npy", "first") for _ in range(2)]
    assert rows[0] == rows[1] and torch.equal(before, torch.get_rng_state())


def test_tokens_named_arguments_and_one_of_several_outputs(trained):
    import nets

    generator = torch.Generator().manual_seed(0)
    model = nets.Tokens()
    torch.save(random_state(model, generator), "tokens.pt")
    tokens, scale = torch.randint(7, (12, 2), generator=generator), torch.rand(12, 8, generator=generator)
    np.savez("named.npz", tokens=tokens.numpy(), scale=scale.numpy())
    np.savez("ordered.npz", tokens.numpy(), scale.numpy())
    expected = by_hand(LogitsOnly(model), {f"model.{k}": v for k, v in torch.load("tokens.pt").items()},
                       "model.first", (tokens, scale))  # fmt: skip
    for file in ("named.npz", "ordered.npz"):
        (row,) = measure_checkpoints(nets.Tokens, "tokens.pt", file, "first", output="logits")
        assert row["lmn_first"] == expected and row["step"] == 0
    shapes = [tuple(t.shape) for t in first_samples((tokens, scale, torch.ones(3)), 5)]
    assert shapes == [(5, 2), (5, 8), (3,)]


class LogitsOnly(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs)["logits"]


def test_an_output_of_digits_is_an_index(trained, capsys):
    torch.save(random_state(sys.modules["nets"].Pair(), torch.Generator().manual_seed(0)), "pair.pt")
    shared = {"model": "nets:Pair", "checkpoint": "pair.pt", "layers": ["hidden"]}
    for output in ("0", "-2", "1"):
        assert cli.main(command(f"--output={output}", f"--out=of{output}", **shared)) == 0
    numbers = [table(f"of{output}/lmn.csv")[0]["lmn_hidden"] for output in ("0", "-2", "1")]
    assert numbers[0] == numbers[1] != numbers[2]
    assert "output: no 2 in what the model returns" in failure(capsys, command("--output=2", **shared))


# Files -----------------------------------------------------------------------------------------------------


def test_numbers_in_names_count_by_their_value(place):
    names = ["run_2/step_10.pt", "run_2/step_9.pt", "run_10/step_1.pt", "a.pt"]
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        torch.save({}, name)
    expected = ["a.pt", "run_2/step_9.pt", "run_2/step_10.pt", "run_10/step_1.pt"]
    assert find_checkpoints(["*/*.pt", "./a.pt", place / "a.pt"]) == expected
    assert find_checkpoints(["**/*.pt"]) == expected
    torch.save({}, "odd[1].pt")
    assert find_checkpoints(["odd[1].pt"]) == ["odd[1].pt"]


@pytest.mark.parametrize(
    "names, steps",
    [
        ("step_5e3 step_1e4 step_2e4", [5000, 10_000, 20_000]),
        ("m_500 m_1k m_2k", [500, 1000, 2000]),
        ("c_0.25 c_0.5 c_1.0", [0.25, 0.5, 1]),
        ("early final last", [0, 1, 2]),
    ],
)
def test_rows_come_in_the_order_of_training_each_with_its_step(names, steps, trained):
    files = [f"{name}.pth" for name in names.split()]
    for file, state in zip(files, trained.values(), strict=True):
        torch.save(state, file)
    numbers = [row["lmn_1"] for row in measure_checkpoints("nets:make", "step_*.pt", "x.npy", "1")]
    for _ in range(2):  # measured, then read from the table
        rows = measure_checkpoints("nets:make", "*.pth", "x.npy", "1", out="lmn")
        expected = [*zip(steps, files, numbers, strict=True)]
        assert [(row["step"], row["checkpoint"], row["lmn_1"]) for row in rows] == expected
        assert [row["step"] for row in table()] == [str(step) for step in steps]


def test_steps_are_printed_whole_and_as_fractions(trained, capsys):
    for step, name in ((2, "epoch_0.25"), (10, "epoch_1"), (100, "epoch_12345678")):
        os.rename(f"step_{step}.pt", f"{name}.pt")
    assert cli.main(command(checkpoint="epoch_*.pt")) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]]
    assert shown == ["0.25", "1", "12345678"]


def test_names_that_do_not_tell_the_steps_are_an_error_before_any_work(trained, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "_measured", None)
    os.rename("step_100.pt", "last.pt")
    assert failure(capsys, command(checkpoint="*.pt")).startswith(
        "steps: 'last.pt' has no number that could be "
    )
    assert not Path("lmn/lmn.csv").exists()


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


def test_inputs_of_every_kind_are_read(place):
    x, y = torch.rand(3, 2), torch.arange(3)
    np.save("x.npy", x.numpy())
    np.savez("one.npz", x=x.numpy())
    for name, content in {"tensor": x, "pair": (x, y), "named": {"x": x}}.items():
        torch.save(content, f"{name}.pt")
    for name in ("x.npy", "one.npz", "tensor.pt"):
        assert torch.equal(load_inputs(name), x)
    assert all(torch.equal(a, b) for a, b in zip(load_inputs("pair.pt"), (x, y), strict=True))
    assert torch.equal(load_inputs("named.pt")["x"], x)


# Going on --------------------------------------------------------------------------------------------------


def test_a_killed_command_goes_on_where_it_was(trained):
    """Killed with -9 in its second checkpoint."""
    whole = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS)
    script = Path("run.py")
    script.write_text("import sys\nfrom lmnfast.cli import main\nif __name__ == '__main__': sys.exit(main())")
    arguments = [sys.executable, "run.py", *command(model="nets:slow")]
    killed = subprocess.Popen(
        arguments, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        until(lambda: Path("lmn/lmn.csv").exists())
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    (first,) = table()
    assert first["step"] == "2" and float(first["lmn_1"]) == whole[0]["lmn_1"]
    os.utime("step_10.pt")  # changed before it was measured, so of no effect
    Path("loaded").unlink()
    import nets

    nets.time.sleep, loads = lambda seconds: None, []
    plain = nets.Slow.load_state_dict
    nets.Slow.load_state_dict = lambda self, *args, **kwargs: loads.append(1) or plain(self, *args, **kwargs)
    assert cli.main(command(model="nets:slow")) == 0
    assert len(loads) == 2
    assert measure_checkpoints("nets:slow", "step_*.pt", "x.npy", LAYERS, out="lmn") == whole


def until(holds):
    deadline = time.monotonic() + 300  # a busy machine takes long to start a process
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_more_checkpoints_are_added_and_changed_ones_measured_anew(trained):
    assert cli.main(command()) == 0
    before = table()
    os.remove("step_2.pt")
    torch.save(trained[2], "step_10.pt")
    torch.save({"state_dict": trained[100]}, "step_1000.pt")
    assert cli.main(command()) == 0
    after = table()
    assert [row["step"] for row in after] == ["2", "10", "100", "1000"]
    assert after[0] == before[0] and after[2] == before[2]
    assert after[1]["lmn_1"] == before[0]["lmn_1"] and after[3]["lmn_1"] == before[2]["lmn_1"]
    torch.save(trained[10], "later_20.pt")
    assert cli.main(command("--checkpoint", "later_*.pt", os.path.abspath("step_*.pt"))) == 0
    assert [row["step"] for row in table()] == ["2", "10", "20", "100", "1000"]


def test_finished_is_finished(trained, capsys, monkeypatch):
    assert cli.main(command()) == 0
    monkeypatch.setattr(measuring, "_measured", None)
    said = capsys.readouterr().out
    content = Path("lmn/lmn.csv").read_bytes()
    assert cli.main(command()) == 0
    assert capsys.readouterr().out == "lmn: 3 checkpoints measured before, 0 to go\n" + said
    assert Path("lmn/lmn.csv").read_bytes() == content


def test_a_table_of_another_version_is_an_error_until_forced(trained, capsys):
    assert cli.main(command()) == 0
    settings = json.loads(Path("lmn/lmn.json").read_text())
    del settings["negative"]
    Path("lmn/lmn.json").write_text(json.dumps(settings))
    assert "negative is None there, absolute here; choose another --out" in failure(capsys, command())


def test_points_that_make_every_network_linear_are_refused(trained, capsys):
    assert failure(capsys, command("--points=2")).startswith("points: expected at least 3")
    assert not Path("lmn").exists()


def test_an_offset_that_hides_outputs_is_warned_of_with_the_layer(trained, monkeypatch):
    def hidden(*arguments, **settings):
        (enqueued,) = measured(*arguments, **settings)
        counted = enqueued.measured._replace(counts=torch.tensor([99, 0]))  # of 66 pairs, 3 outputs
        return [replace(enqueued, measured=counted, offset=torch.tensor(1e4))]

    monkeypatch.setattr(measuring, "measured", hidden)
    with pytest.warns(
        UserWarning, match="checkpoint: step_2.pt, layer '[13]': 50.0% of the outputs' paths"
    ) as said:
        rows = measure_checkpoints("nets:make", "step_2.pt", "x.npy", LAYERS)
    assert len(said) == 2 and rows[0]["constant_share_1"] == rows[0]["constant_share_3"] == 0.5


def test_other_settings_are_an_error_until_forced(trained, capsys):
    assert cli.main(command()) == 0
    for change, said in (
        ("--points=11", "points is 21 there, 11 here"),
        ("--rule=lobatto", "rule is uniform there, lobatto here"),
        ("--method=hermite", "method is path there, hermite here"),
        ("--negative=clip", "negative is absolute there, clip here"),
        ("--layer=0", "layers is 1, 3 there, 1, 3, 0 here"),
        ("--samples=5", "inputs is sha256 "),
        ("--model=nets:slow", "model is nets:make there, nets:slow here"),
        ("--forward=nets:twice", "forward is None there, nets:twice here"),
    ):
        line = failure(capsys, command(change))
        assert line.startswith("out: lmn holds a table with other settings: ") and said in line
        assert line.endswith("; choose another --out, or --force to begin anew")
    line = failure(capsys, command(checkpoint="step_1*.pt"))
    assert "checkpoints is step_*.pt there, step_1*.pt here" in line
    assert len(table()) == 3
    assert cli.main(command("--force", checkpoint="step_1*.pt")) == 0
    assert [row["step"] for row in table()] == ["10", "100"]


def test_a_table_of_unknown_origin_is_kept(trained, capsys):
    Path("lmn").mkdir()
    Path("lmn/lmn.csv").write_text("mine")
    assert failure(capsys, command()) == "out: lmn holds lmn.csv but no lmn.json; --force deletes it"
    assert Path("lmn/lmn.csv").read_text() == "mine"
    Path("lmn/lmn.json").write_text("{")
    assert failure(capsys, command()).startswith("out: cannot read lmn/lmn.json: ")
    Path("file").touch()
    assert failure(capsys, command("--out=file/lmn")).startswith("out: cannot write to file/lmn")


def test_what_fails_names_its_checkpoint_and_those_before_are_kept(trained, capsys):
    Path("step_50.pt").write_bytes(Path("step_2.pt").read_bytes()[:200])
    assert failure(capsys, command()).startswith("checkpoint: cannot read step_50.pt: ")
    assert [row["step"] for row in table()] == ["2", "10"]
    torch.save(trained[2], "step_50.pt")
    assert cli.main(command()) == 0
    assert [row["step"] for row in table()] == ["2", "10", "50", "100"]


DAMAGES = {
    "lmn.json": [
        b"{",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"device": 3, "files": {}, "checkpoints": []}',
        b'{"device": "cpu", "files": [], "checkpoints": []}',
        b'{"device": "cpu", "files": {}, "checkpoints": [{}]}',
        b"\xff\xfe{",
    ],
    "lmn.csv": [
        b"\xff\xfe",
        b"",
        b"mine\n",
        lambda rows: rows[:-3],
        lambda rows: rows[:-1],
        lambda rows: rows.rpartition(b",")[0] + b"\n",
        lambda rows: rows.replace(b"lmn_3", b"lmn_2"),
        lambda rows: rows.replace(b",21,", b",many,"),
        lambda rows: rows.replace(b",21,", b",11,"),
        lambda rows: rows.replace(b"step_2.pt,", b"step_2.pt,nan"),
        lambda rows: rows.replace(b"step_2.pt", b"step_10.pt"),
        lambda rows: rows.replace(b"step_2.pt", b'"step_2".pt'),
    ],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_table_is_one_line_that_names_the_file(name, trained, capsys):
    whole = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn")
    path = Path("lmn") / name
    before = path.read_bytes()
    for damage in DAMAGES[name]:
        content = damage(before) if callable(damage) else damage
        path.write_bytes(content)
        line = failure(capsys, command())
        assert line.startswith(f"out: cannot read lmn/{name}: ") and line.endswith("; --force begins anew")
        assert path.read_bytes() == content
    assert measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn", force=True) == whole


def test_a_table_that_an_editor_marked_as_utf_8_is_read(trained, monkeypatch):
    whole = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn")
    for path in (Path("lmn/lmn.csv"), Path("lmn/lmn.json")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    monkeypatch.setattr(measuring, "_measured", None)
    assert measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn") == whole


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_measured_anew(trained):
    _, second, third = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn")
    status = os.stat("step_2.pt")
    torch.save(trained[10], "step_2.pt")
    os.utime("step_2.pt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (os.stat("step_2.pt").st_size, os.stat("step_2.pt").st_mtime_ns) == (
        status.st_size,
        status.st_mtime_ns,
    )
    again = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn")
    assert again == [second | {"step": 2, "checkpoint": "step_2.pt"}, second, third]


def test_a_process_that_dies_is_said(trained, capsys):
    line = failure(capsys, command("--jobs=2", model="nets:dies"))
    assert line.startswith("jobs: a process died")


def test_ctrl_c_says_how_to_go_on(trained, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "_measured", interrupted)
    assert cli.main(command()) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


# Errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, said",
    [
        ("nets", "model: expected package.module:factory, got 'nets'"),
        ("absent:make", "model: no module 'absent' in the current directory or installed, for 'absent:make'"),
        (
            "nets.sub:make",
            "model: no module 'nets.sub' in the current directory or installed, for 'nets.sub:make'",
        ),
        ("broken:make", "model: importing 'broken' failed: ModuleNotFoundError: No module named 'nowhere'"),
        ("nets:mak", "model: no 'mak' in 'nets', for 'nets:mak'"),
        ("nets:table", "model: expected a factory, 'nets:table' is a dict"),
        ("nets:net", "model: expected a factory, 'nets:net' is a Sequential"),
        ("nets:number", "model: expected 'nets:number' to return an nn.Module, got a int"),
        ("nets:fails", "model: 'nets:fails', called without arguments, failed: RuntimeError: out of"),
        ("nets:needs", "model: 'nets:needs', called without arguments, failed: needs() missing 1 required"),
    ],
)
def test_a_wrong_factory_is_one_line(model, said, trained, capsys):
    Path("broken.py").write_text("import nowhere")
    assert failure(capsys, command(model=model)).startswith(said)


IMPOSTOR = "open('executed', 'w').close()"


def test_a_folder_of_checkpoints_lends_no_code_to_what_is_installed(trained):
    """Modules in the current directory come last, and only where the factory is there."""
    here = str(Path.cwd())
    sys.path.remove(here)
    for name in ("safetensors", "matplotlib", "tqdm"):
        Path(f"{name}.py").write_text(IMPOSTOR)
    sys.modules.pop("nets")
    before = sys.path[:]
    imported("torch.nn:Identity", "model", "factory")
    assert sys.path == before
    imported("nets:make", "model", "factory")
    assert sys.path == [*before, here]


def test_a_module_that_is_installed_and_in_the_current_directory_is_refused(trained, capsys):
    sys.path.remove(str(Path.cwd()))
    Path("this.py").write_text(IMPOSTOR)  # of the standard library; nothing imports it
    line = failure(capsys, command(model="this:make"))
    assert line.startswith("model: 'this' is in the current directory and also ") and "PYTHONPATH=." in line
    assert not Path("executed").exists() and "this" not in sys.modules


def test_wrong_checkpoints_are_one_line(trained, capsys):
    generator = torch.Generator().manual_seed(0)
    torch.save({"a": {"b": {"d": torch.ones(1)}}, "c": 1}, "nested.pt")
    torch.save([1], "list.pt")
    torch.save({name: value for name, value in trained[2].items() if name != "0.bias"}, "less.pt")
    torch.save({f"net.{name}": value for name, value in trained[2].items()}, "other.pt")
    torch.save(random_state(nn.Sequential(nn.Linear(6, 9)), generator) | trained[2] | {
        "0.weight": torch.ones(9, 6)}, "wide.pt")  # fmt: skip
    for file, more, said in (
        ("none.pt", [], "checkpoint: no file is 'none.pt'"),
        ("none_*.pt", [], "checkpoint: no file matches 'none_*.pt'"),
        (".", [], "checkpoint: expected files, as './*.pt', got a directory"),
        (
            "nested.pt",
            [],
            "checkpoint: no state dict in nested.pt, which holds a dict of 'a', 'c'; looked for state_dict, ",
        ),
        ("list.pt", [], "checkpoint: no state dict in list.pt, which holds a list of 1; "),
        ("nested.pt", ["--key=a.x"], "key: no 'x' of 'a.x' in nested.pt, which holds a dict of 'b'"),
        ("nested.pt", ["--key=c"], "key: no state dict in nested.pt, which holds a int"),
        ("less.pt", [], "checkpoint: less.pt does not fit the model: it lacks 0.bias"),
        (
            "other.pt",
            [],
            "checkpoint: other.pt does not fit the model: it lacks 0.weight, 0.bias, 2.weight, 2.bias and "
            "2 more; it has, unexpected, net.0.weight, net.0.bias, net.2.weight, net.2.bias and 2 more",
        ),
        ("wide.pt", [], "checkpoint: wide.pt does not fit the model: size mismatch for 0.weight: "),
    ):
        assert failure(capsys, command(*more, checkpoint=file)).startswith(said)


def test_wrong_inputs_layers_and_settings_are_one_line(trained, capsys):
    np.save("narrow.npy", np.ones((3, 2)))
    np.save("nan.npy", np.full((3, 6), np.nan))
    np.save("tokens.npy", np.ones((3, 6), dtype=np.int64))
    torch.save({"x": 3}, "numbers.pt")
    Path("torn.npz").write_bytes(b"PK")
    Path("x.csv").touch()
    for arguments, said in (
        (command(inputs="none.npy"), "inputs: no file is 'none.npy'"),
        (command(inputs="x.csv"), "inputs: expected a file .npy, .npz, .pt or .safetensors, got 'x.csv'"),
        (command(inputs="torn.npz"), "inputs: cannot read torn.npz: "),
        (
            command(inputs="numbers.pt"),
            "inputs: expected a tensor, or a tuple or a dict of tensors, in numbers.pt",
        ),
        (command("--samples=13"), "samples: expected 1 to 12, what the inputs have, got 13"),
        (command("--samples=0"), "samples: expected 1 to 12, what the inputs have, got 0"),
        (
            command(inputs="narrow.npy"),
            "checkpoint: step_2.pt, layer '1': RuntimeError: mat1 and mat2 shapes",
        ),
        (command(inputs="tokens.npy"), "checkpoint: step_2.pt, layer '1': RuntimeError: mat1 and mat2 must"),
        (command(inputs="nan.npy"), "checkpoint: step_2.pt, layer '1': x: NaN or Inf in sample 0"),
        (command(layers=["hidden"]), "layer: 'hidden' is not in the model; it has 0, 1, 2, 3, 4"),
        (command(layers=["blocks.*"]), "layer: nothing matches 'blocks.*'; "),
        (
            command("--output=logits"),
            "checkpoint: step_2.pt, layer '1': output: no 'logits' in what the model",
        ),
        (command("--forward=nets:none"), "forward: no 'none' in 'nets'"),
        (command("--forward=nets"), "forward: expected package.module:function, got 'nets'"),
        (command("--points=1"), "points: "),
        (
            command("--method=path,hermite"),
            "method: expected one of path, hermite, hermite-midpoint, jacobian, got 'path,hermite'",
        ),
        (command("--jobs=0"), "jobs: expected at least 1, got 0"),
    ):
        assert failure(capsys, arguments).startswith(said)


def test_more_processes_than_cores_are_said_and_used(trained, monkeypatch, capsys):
    monkeypatch.setattr(cli, "cores", lambda: 1)
    monkeypatch.setattr(measuring, "_in_processes", lambda *_: (row for row in ()))
    assert cli.main(command()) == 0
    assert "jobs: " not in capsys.readouterr().err
    assert cli.main(command("--jobs=2")) == 0
    assert "jobs: 2 processes on 1 cores\n" in capsys.readouterr().err


def test_the_api_refuses_what_it_cannot_use(trained):
    for change, said in (
        ({"method": "guess"}, "method: expected one of path, "),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda, got 'tpu'"),
        ({"checkpoints": []}, "checkpoint: expected at least one file, got none"),
        ({"layers": ()}, "layers: expected at least one, got ()"),
        (
            {"factory": lambda: nn.Sequential(nn.ReLU()), "layers": "0", "jobs": 2},
            "jobs: 2 processes need a ",
        ),
    ):
        given = {
            "factory": "nets:make",
            "checkpoints": "step_*.pt",
            "inputs": "x.npy",
            "layers": "1",
        } | change
        with pytest.raises(ValueError, match="^" + re.escape(said)):
            measure_checkpoints(**given)


def test_the_example_of_the_documentation_runs(place, capsys):
    script, commands, program = re.findall(r"```(?:python|sh)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    Path("digits.py").write_text(script)
    train, measure = commands.strip().splitlines()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *train.split()[1:]], check=True, env=environment)
    assert cli.main([word.strip("'") for word in measure.split()[1:]]) == 0
    assert [row["step"] for row in table()] == ["0", "10", "20", "30", "40"]
    capsys.readouterr()
    exec(program, {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [float(word) for line in printed for word in line] == [
        float(row[name]) for row in table() for name in ("step", "lmn_1", "lmn_3")
    ]
