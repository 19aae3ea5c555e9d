"""A wrong factory, checkpoint, input or setting is one line."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpointed import command, failure, random_state
from torch import nn

from lmnfast import _commands, cli
from lmnfast.checkpoints import measure as measuring
from lmnfast.checkpoints import measure_checkpoints
from lmnfast.checkpoints.weights import imported


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
    monkeypatch.setattr(_commands, "cores", lambda: 1)
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


def test_integers_in_place_of_numbers_are_named(trained, capsys):
    np.save("x.npy", np.ones((12, 6), dtype=np.int64))
    said = failure(capsys, command())
    assert said.startswith("checkpoint: step_2.pt, layer '1': RuntimeError: ")
    assert said.endswith(
        "; the inputs are int64, save them as float32 if the model takes numbers and no tokens"
    )
