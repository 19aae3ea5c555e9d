"""The commands for many samples: what they write, go on with, and refuse."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from support import COMPILED, samples

import lmnfast
from lmnfast import _commands_scale, cli
from lmnfast.checkpoints import read_state
from lmnfast.checkpoints.weights import made

HOW = ["--model=nets:make", "--inputs=x.npy", "--layer=1", "--points=5"]


@pytest.fixture
def at(place):
    """A folder with samples and a checkpoint of nets.make."""
    np.save("x.npy", samples(60, 6).numpy())
    model = made("nets:make")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    torch.save({"model": model.state_dict(), "step": 3}, "step_3.pt")
    return place


def said(capsys, *words):
    code = cli.main([*words, "-q"])
    out = capsys.readouterr()
    return code, out.out, out.err


@COMPILED
def test_shards_and_a_solve_give_the_measurement(at, capsys):
    for k in (2, 1):
        arguments = ["tiles", *HOW, "--checkpoint=step_3.pt", "--out=d", f"--shard={k}/2"]
        assert said(capsys, *arguments) == (0, f"shard {k}/2: 6 tiles in d\n", "")
    code, out, _ = said(capsys, "solve", "d")
    model = made("nets:make")
    model.load_state_dict(read_state("step_3.pt"))
    m = lmnfast.measure(*lmnfast.cut(model, "1", samples(60, 6)), points=5)
    assert code == 0 and f"lmn               {m.lmn:.6g}\n" in out and "written: d/lmn.json" in out
    values = json.loads(Path("d/lmn.json").read_text())
    assert values == {name: getattr(m, name) for name in values} and values["lmn"] == m.lmn
    assert np.array_equal(np.load("d/connectivity.npy"), m.connectivity.numpy())


def test_missing_tiles_are_named_with_the_command_that_makes_them(at, capsys):
    assert said(capsys, "tiles", *HOW, "--samples=50", "--out=d e", "--shard=1/12")[0] == 0
    code, _, err = said(capsys, "solve", "d e")
    command = "lmnfast tiles --model nets:make --inputs x.npy --layer 1 --points 5 --samples 50 --out 'd e'"
    assert code == 2 and err.endswith(f"; to make them: {command}\n") and "11 missing: tile-00001.npy" in err
    assert said(capsys, *shlex.split(command)[1:])[:2] == (0, "shard 1/1: 12 tiles in d e\n")
    assert said(capsys, "solve", "d e")[0] == 0


def test_other_weights_are_refused(at, capsys):
    assert said(capsys, "tiles", *HOW, "--out=d")[0] == 0
    code, _, err = said(capsys, "tiles", *HOW, "--out=d", "--checkpoint=step_3.pt")
    assert code == 2 and "holds tiles of another network and other samples;" in err


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1/0", "2", "1/2/3", "a/b", "-1/3", "1.0/3"])
def test_a_shard_out_of_range_is_refused_before_any_work(shard, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tiles", "--model=no:model", "--inputs=no.npy", "--layer=1", f"--shard={shard}"])
    expected = f"argument --shard: expected K/N with K from 1 to N, as 3/8, got {shard!r}"
    assert expected in capsys.readouterr().err


def test_wrong_arguments_are_one_line(at, capsys):
    np.save("wrong.npy", samples(60, 5).numpy())
    for words, expected in (
        (["tiles", "--model=nets:make", "--inputs=x.npy", "--layer=9"], "layer: '9' is not in the model"),
        (["tiles", "--model=nets:make", "--inputs=wrong.npy", "--layer=1"], "'1': RuntimeError: "),
        (["tiles", "--model=nets:make", "--inputs=x.npy", "--layer=1", "--points=1"], "points: "),
        (
            ["tiles", "--model=nets:make", "--inputs=x.npy", "--layer=1", "--checkpoint=no.pt"],
            "no file is 'no.pt'",
        ),
        (["solve", "."], "out: expected a folder of lmnfast tiles, . has no tiles.json"),
        (["plan", "--widths", "6", "3"], "samples: expected a number with --widths, as --samples 20000"),
        (["plan", "--widths", "6", "--samples=100"], "widths: expected two or more of at least 1, got 6"),
        (
            ["plan", "--model=nets:make", "--inputs=x.npy"],
            "model: expected --inputs with it, and --layer or --block",
        ),
        (["plan", "--widths", "6", "3", "--samples=1"], "samples: expected 2 or more, got 1"),
        (["plan", *HOW, "--activation=relu"], "activation: expected --widths with it"),
        (["tiles", *HOW, "--samples=61"], "samples: expected 1 to 60, what the inputs have, got 61"),
        (
            ["tiles", *HOW, "--samples=9", "--batch-dim=-5"],
            "batch_dim: expected a dimension, counted from 0 on, ",
        ),
        (["tiles", *HOW, "--samples=9", "--batch-dim=2"], "of the inputs, which has 2, got 2"),
        (["tiles", *HOW[:-1], "--points=9007199254740991"], "MemoryError: Unable to allocate "),
        (["plan", *HOW[:-1], "--points=9007199254740991"], "MemoryError: Unable to allocate "),
        (["tiles", *HOW, "--samples=1"], "x: expected two samples or more, got 1"),
        (["tiles", *HOW, "--out="], "out: expected the path of a folder, got ''"),
        (["tiles", *HOW, "--out=x.npy"], "out: expected a folder, x.npy is a file"),
        (["solve", ""], "out: expected the path of a folder, got ''"),
        (["solve", "x.npy"], "out: expected a folder, x.npy is a file"),
        (["solve", "none"], "out: expected a folder of lmnfast tiles, there is no none"),
    ):
        code, out, err = said(capsys, *words)
        assert (code, out) == (2, "") and expected in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("command", ["tiles", "plan"])
def test_a_checkpoint_is_one_file_and_its_options_need_it(command, at, capsys):
    for step in range(10, 15):
        torch.save({"model": made("nets:make").state_dict()}, f"step_{step}.pt")
    for words, expected in (
        (
            ["--checkpoint=step_*.pt"],
            "expected one file, got 6: step_3.pt, step_10.pt, step_11.pt, step_12.pt and 2 more",
        ),
        (["--checkpoint=step_1[01].pt"], "expected one file, got 2: step_10.pt, step_11.pt"),
        (["--checkpoint=step_2*.pt"], "no file matches 'step_2*.pt'"),
    ):
        assert said(capsys, command, *HOW, *words) == (2, "", f"lmnfast: error: checkpoint: {expected}\n")
    for words in (["--key=model"], ["--trust"], ["--key=model", "--trust"]):
        name = words[0].partition("=")[0].removeprefix("--")
        expected = f"lmnfast: error: {name}: expected --checkpoint with it\n"
        assert said(capsys, command, *HOW, *words) == (2, "", expected)
        assert said(capsys, command, *HOW, *words, "--checkpoint=step_[3].pt")[0] == 0


@pytest.mark.parametrize("option", ["layer", "block", "key"])
@pytest.mark.parametrize("command", ["tiles", "plan", "checkpoints"])
def test_an_empty_name_is_refused(command, option, at, capsys):
    place = [] if option in ("layer", "block") else ["--layer=1"]
    words = [command, "--model=nets:make", "--inputs=x.npy", "--checkpoint=step_3.pt", *place, f"--{option}="]
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"lmnfast {command}: error: argument --{option}") or f"/--{option}: " in last
    assert last.endswith(": expected a name, got ''")


def test_a_plan_of_too_many_samples_is_refused_before_any_work(at, capsys, monkeypatch):
    monkeypatch.setattr(_commands_scale, "_planned", lambda _: pytest.fail("a network was made"))
    for count in (2**24 + 1, 10**12, 10**400):
        expected = f"samples: expected 16777216 or fewer, as many as tiles can be of, got {count}\n"
        for words in (["--widths", "5", "5"], HOW):
            assert said(capsys, "plan", *words, f"--samples={count}") == (
                2,
                "",
                f"lmnfast: error: {expected}",
            )
    expected = "lmnfast: error: ranks: expected 1 or more, got 0\n"
    assert said(capsys, "plan", *HOW, "--ranks=0") == (2, "", expected)


@pytest.mark.parametrize("free", [True, False], ids=["memory known", "memory unknown"])
def test_widths_that_cannot_be_made_are_one_line(free, capsys, monkeypatch):
    monkeypatch.setattr(_commands_scale, "available", lambda _: 10**9 if free else None)
    big = 2**53 - 1
    # With the memory unknown only sizes that no address space has: others some systems lend, and kill the process later.
    large = [(99999999999, 5), (5, 99999999999)] if free else []
    for widths in (*large, (5, 10**22, 5), (2**32, 2**32), (big, big), (5, 10**400)):
        words = [*map(str, widths)]
        code, out, err = said(capsys, "plan", "--widths", *words, "--samples=100")
        assert code == 2 and out == "" and len(err.splitlines()) == 1
        assert err.startswith(f"lmnfast: error: widths: cannot make a network of {' '.join(words)}: ")
    if free:
        assert said(capsys, "plan", "--widths", "5", "99999999999", "--samples=100")[2].endswith(
            " are free\n"
        )


def test_a_plan_of_a_model_and_of_widths(at, capsys):
    code, out, _ = said(capsys, "plan", *HOW, "--ranks=4")
    assert code == 0 and out.startswith("N = 60: 12 tiles, ") and " by 4 processes" in out
    code, out, _ = said(capsys, "plan", "--widths", "6", "9", "3", "--samples=1e5", "--activation=relu")
    assert code == 0 and out.startswith("N = 100000: 992 tiles, ") and "dense: 160 GB" in out


def test_the_output_and_the_place_of_a_cut(at, capsys):
    torch.save({"tokens": torch.randint(7, (40, 2)), "scale": torch.rand(40, 8)}, "tokens.pt")
    arguments = [
        "--model=nets:Tokens",
        "--inputs=tokens.pt",
        "--layer=first",
        "--output=logits",
        "--points=5",
    ]
    assert said(capsys, "tiles", *arguments, "--out=d") == (0, "shard 1/1: 12 tiles in d\n", "")
    assert said(capsys, "solve", "d")[0] == 0


@pytest.mark.parametrize(
    "option",
    [
        "checkpoint=step_3.pt",
        "inputs=x.npy",
        "layer=1",
        "block=1",
        "until=1",
        "output=0",
        "batch-dim=0",
        "forward=nets:make",
        "key=model",
        "trust",
    ],
)
def test_a_plan_of_widths_takes_no_option_of_a_model(option, at, capsys):
    words = ["plan", "--widths", "6", "9", "3", "--samples=100", "--points=5"]
    name = option.partition("=")[0]
    expected = f"lmnfast: error: widths: expected no option of a model with it, got --{name}\n"
    assert said(capsys, *words, f"--{option}") == (2, "", expected)
    assert said(capsys, *words, "--rule=lobatto", "--ranks=2", "--device=cpu")[0] == 0


def test_a_number_is_printed_also_where_its_file_cannot_be_written(at, capsys, monkeypatch):
    assert said(capsys, "tiles", *HOW, "--out=d")[0] == 0 and said(capsys, "solve", "d")[0] == 0

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_commands_scale, "write_json", refused)
    code, out, err = said(capsys, "solve", "d")
    assert code == 2 and out.startswith("lmn  ") and "written" not in out
    assert err == "lmnfast: error: out: cannot write d/lmn.json: Permission denied\n"
