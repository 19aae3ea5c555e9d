"""The LMN of a model's checkpoints: rows, their order, inputs, the documentation's example."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpointed import LAYERS, command, failure, random_state, table
from fresh import run_fresh
from torch import nn

import lmnfast
from lmnfast import _observables, cli
from lmnfast.checkpoints import find_checkpoints, first_samples, load_inputs, measure_checkpoints
from lmnfast.checkpoints import measure as measuring
from lmnfast.runs.progress import move
from lmnfast.spectrum import SETTINGS

DOCS = Path(__file__).parent.parent / "docs/checkpoints.md"


def by_hand(model, state, layer, x, **settings):
    model.load_state_dict(state)
    return float(f"{lmnfast.measure(*lmnfast.cut(model, layer, x), **settings).lmn:.7g}")


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
        "step checkpoint lmn_1 lmn_3 samples outputs points rule method precision solver negative stabiliser "
        "constant_share_1 constant_share_3 negative_share_1 negative_share_3"
    )
    assert list(rows[0]) == columns.split()
    assert [line.split()[0] for line in lines] == [row["step"] for row in rows] == ["2", "10", "100"]
    assert [row["checkpoint"] for row in rows] == ["step_2.pt", "step_10.pt", "step_100.pt"]
    settings = ("9", "3", "21", "uniform", "path", "highest", "cpu", "absolute", "0.0")
    assert all(tuple(row[name] for name in SETTINGS) == settings for row in rows)
    assert (written, drawn) == ("written: lmn/lmn.csv", "written: lmn/lmn.png")
    assert Path("lmn/lmn.png").read_bytes().startswith(b"\x89PNG")
    import nets

    x = torch.from_numpy(np.load("x.npy")).float()[:9]
    assert float(rows[0]["lmn_1"]) == by_hand(nets.make(), trained[2], "1", x)


def test_maps_between_layers_modules_alone_and_the_inputs_go_into_tables(trained, capsys):
    import nets

    torch.manual_seed(3)
    model, x = nets.Residual(), torch.from_numpy(np.load("x.npy")).float()
    torch.save(model.state_dict(), "residual_5.pt")

    def number(**how):
        return float(f"{lmnfast.measure(*lmnfast.cut(model, inputs=x, **how)).lmn:.7g}")

    given = {"factory": "nets:Residual", "checkpoints": "residual_5.pt", "inputs": "x.npy"}
    (row,) = measure_checkpoints(**given, blocks="blocks.*", out="blocks")
    assert [row[f"lmn_blocks.{n}"] for n in range(2)] == [number(block=f"blocks.{n}") for n in range(2)]
    (row,) = measure_checkpoints(**given, layers=["stem", "inputs"], until="head")
    assert row["lmn_stem"] == number(layer="stem", until="head") and row["lmn_inputs"] == number(layer="")
    (row,) = measure_checkpoints(**given, layers="inputs", until="blocks.0", jobs=1)
    assert row["lmn_inputs"] == number(layer="", until="blocks.0") != number(layer="")
    with pytest.warns(
        UserWarning, match=r"layers: '\*' also matches .*'blocks.0', 'blocks.1' \(.* blocks= measures"
    ):
        (row,) = measure_checkpoints(**given, layers="*")
    assert [name for name in row if name.startswith("lmn_")] == ["lmn_stem", "lmn_head"]
    words = ["checkpoints", "--model=nets:Residual", "--checkpoint=residual_5.pt", "--inputs=x.npy"]
    assert cli.main([*words, "--block", "blocks.*"]) == 0
    assert float(table()[0]["lmn_blocks.1"]) == number(block="blocks.1")
    assert cli.main([*words, "--layer=stem", "--until=head", "--out=until"]) == 0
    capsys.readouterr()
    for options, said in {
        (
            "--layer=blocks.0",
            "--layer=blocks.1",
            "--force",
        ): "depends on the inputs also by another way .* block='blocks.0'",
        (
            "--layer=blocks.*",
            "--force",
        ): "layers: nothing that matches 'blocks.\\*' can be measured: 'blocks.0', 'blocks.1'",
        ("--layer=stem", "--out=until"): "until is head there, None here",
        ("--block=stem", "--until=head"): "until: expected with a layer alone",
        ("--layer=head", "--until=stem", "--out=new"): "until: 'stem' runs before 'head'",
    }.items():
        assert cli.main([*words, *options]) == 2
        assert re.search(said, capsys.readouterr().err), options
    with pytest.raises(ValueError, match="layers: expected either layers or blocks, got neither"):
        measure_checkpoints(**given)


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


def test_samples_along_another_dimension(trained, capsys):
    import nets

    x = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    np.save("second.npy", x)
    shared = {"inputs": "second.npy", "layers": ["0"]}
    assert cli.main(command("--batch-dim=1", "--samples=3", **shared)) == 0
    capsys.readouterr()
    rows, model = table(), nets.make()
    model.load_state_dict(trained[2])
    expected = lmnfast.cut(model, "0", torch.from_numpy(x)[:, :3], batch_dim=1)
    assert float(rows[0]["lmn_0"]) == float(f"{lmnfast.lmn(*expected):.7g}") and rows[0]["samples"] == "3"
    assert cli.main(command("--batch-dim=1", "--out=all", **shared)) == 0
    said = failure(capsys, command("--out=all", **shared))
    assert "all holds a table with other settings: batch_dim is 1 there, None here" in said
    (row,) = measure_checkpoints(nets.make, "step_2.pt", torch.from_numpy(x)[:, :3], "0", batch_dim=1)
    assert row["lmn_0"] == float(rows[0]["lmn_0"])
    assert "samples: expected 1 to 4" in failure(
        capsys, command("--batch-dim=1", "--samples=5", "--out=b", **shared)
    )


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


def test_the_example_of_the_documentation_runs(place, capsys):
    script, commands, program = re.findall(r"```(?:python|sh)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    Path("digits.py").write_text(script)
    train, measure = commands.strip().splitlines()
    python, script, *arguments = train.split()
    assert python == "python"
    done = run_fresh(place / script, place, *arguments)
    assert done.returncode == 0, done.stderr
    assert cli.main([word.strip("'") for word in measure.split()[1:]]) == 0
    assert [row["step"] for row in table()] == ["0", "10", "20", "30", "40"]
    capsys.readouterr()
    exec(program, {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [float(word) for line in printed for word in line] == [
        float(row[name]) for row in table() for name in ("step", "lmn_1", "lmn_3")
    ]


def test_observables_go_into_the_table_and_are_a_setting_of_it(trained, capsys):
    import nets

    names = ["pooled_curvature", "l2_norm", "jacobian_rank"]
    for jobs in (1, 2):
        options = (f"--observables={','.join(names)}", f"--jobs={jobs}", "--out", f"with{jobs}")
        assert cli.main([*command(layers=["1"]), *options]) == 0
        header = capsys.readouterr().out.splitlines()[0].split()
        assert header == ["step", "lmn_1", *(f"{name}_1" for name in names)]
        rows = measure_checkpoints(
            "nets:make", "step_*.pt", "x.npy", ["1"], observables=names, out=f"with{jobs}"
        )
        assert list(rows[0])[-3:] == [f"{name}_1" for name in names]
    model, x = nets.make(), torch.from_numpy(np.load("x.npy")).float()
    for row in rows:
        model.load_state_dict(trained[row["step"]])
        m = lmnfast.measure(*lmnfast.cut(model, "1", x), observables=names)
        norm = torch.nn.utils.parameters_to_vector(model.parameters()).norm().item()
        expected = m.observables | {"l2_norm": norm}
        assert {name: row[f"{name}_1"] for name in names} == pytest.approx(expected, rel=1e-6)
    with pytest.raises(
        ValueError, match="observables is None there|observables is pooled_curvature, .* there, None here"
    ):
        measure_checkpoints("nets:make", "step_*.pt", "x.npy", ["1"], out="with1")
    with pytest.raises(ValueError, match="observables: expected among lmn, .*, got 'speed'"):
        measure_checkpoints("nets:make", "step_*.pt", "x.npy", ["1"], observables="speed")
    assert failure(capsys, [*command(layers=["1"]), "--observables=speed", "--out=new"]).startswith(
        "observables: expected"
    )


def test_a_table_keeps_what_does_not_apply(trained, monkeypatch):
    monkeypatch.setattr(_observables, "_registry", dict(_observables._registry))
    lmnfast.register_observable("nowhere", lambda o: None)
    given = {
        "factory": "nets:make",
        "checkpoints": "step_2.pt",
        "inputs": "x.npy",
        "layers": "1",
        "out": "lmn",
    }
    with pytest.warns(UserWarning, match="^layer '1': observable 'nowhere' does not apply, its value is NaN"):
        rows = measure_checkpoints(**given, observables="nowhere")
    again = measure_checkpoints(**given, observables="nowhere")  # reads the table
    assert np.isnan(rows[0]["nowhere_1"]) and np.isnan(again[0]["nowhere_1"])
    assert rows[0]["lmn_1"] == again[0]["lmn_1"] > 1


def test_the_bar_moves_within_a_checkpoint_and_ends_with_the_last(trained, monkeypatch, capsys):
    places = []
    monkeypatch.setattr(measuring, "move", lambda bar, done: (places.append(done), move(bar, done)))
    assert cli.main(command()) == 0
    assert places == sorted(places) and {1 / len(LAYERS), 1, 1 + 1 / len(LAYERS), 2, 3} <= set(places)
    assert places[-1] == 3 and "3/3" in capsys.readouterr().err
    assert cli.main(command("--quiet", "--force")) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines()[-1] == "written: lmn/lmn.png"
