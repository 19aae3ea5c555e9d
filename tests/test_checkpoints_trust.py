"""Checkpoints that need code to be read: refused, and read where the user trusts them."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from checkpointed import command, failure, table

from lmnfast import cli
from lmnfast.checkpoints import measure_checkpoints, read_state


class Ran(dict):
    """Leaves a folder where it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def whole(trained):
    """Modules of nets:make with the weights of the trained checkpoints, at places where people leave them."""
    models = []
    for step in trained:
        model = sys.modules["nets"].make()
        model.load_state_dict(trained[step])
        models.append(model)
    return models


def numbers(path="lmn/lmn.csv"):
    return [{name: value for name, value in row.items() if name != "checkpoint"} for row in table(path)]


@pytest.mark.parametrize("legacy", [False, True])
def test_trusted_modules_have_the_numbers_of_their_state_dicts(legacy, trained, capsys):
    assert cli.main(command("--out=plain")) == 0
    first, second, third = whole(trained)
    contents = first, {"epoch": 3, "net": second}, {"model": third, "args": Ran}
    for content, step in zip(contents, trained):
        torch.save(content, f"step_{step}.pt", _use_new_zipfile_serialization=not legacy)
    assert "where you trust it, --trust (trust=True) runs it, or save" in failure(capsys, command())
    assert cli.main(command("--trust")) == 0
    assert "lmnfast: warning: --trust: code that is in the checkpoints is run" in capsys.readouterr().err
    assert numbers() == numbers("plain/lmn.csv")
    assert "trust" not in json.loads(Path("lmn/lmn.json").read_text())


def test_code_of_a_file_runs_only_if_it_is_trusted_and_needed(trained, capsys):
    torch.save({"model": trained[2], "hook": Ran()}, "step_2.pt")
    failure(capsys, command())
    assert not Path("ran").exists()
    state = read_state("step_2.pt", trust=True)
    assert Path("ran").exists() and all(torch.equal(state[name], value) for name, value in trained[2].items())
    Path("ran").rmdir()
    assert cli.main(command("--trust", checkpoint="step_10.pt")) == 0  # can be read without code
    assert not Path("ran").exists()


def test_a_key_leads_into_a_trusted_module(trained):
    torch.save({"student": whole(trained)[0], "teacher": whole(trained)[1]}, "two.pt")
    with pytest.raises(
        ValueError, match="holds several state dicts; choose with --key among student, teacher"
    ):
        read_state("two.pt", trust=True)
    state = read_state("two.pt", "teacher", trust=True)
    assert all(torch.equal(state[name], value) for name, value in trained[10].items())


def test_processes_read_what_is_trusted(trained):
    alone = measure_checkpoints("nets:make", "step_*.pt", "x.npy", "0")
    for model, step in zip(whole(trained), trained):
        torch.save(model, f"step_{step}.pt")
    assert measure_checkpoints("nets:make", "step_*.pt", "x.npy", "0", trust=True, jobs=2) == alone


def test_a_trusted_file_whose_classes_are_not_there_is_named(trained, capsys):
    module = sys.modules["nets"]
    module.Gone = type("Gone", (torch.nn.Linear,), {"__module__": "nets"})
    torch.save(module.Gone(6, 2), "step_2.pt")
    del module.Gone
    said = failure(capsys, command("--trust"))
    assert said.startswith("checkpoint: cannot read step_2.pt, though trusted: AttributeError: ")
