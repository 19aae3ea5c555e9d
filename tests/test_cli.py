import os
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from fresh import run_fresh

from lmnfast import _commands, _native, cli
from lmnfast._threads import cores
from lmnfast.grokking import read_run

TINY = ["grok", "modular-addition", "--p=5", "--steps=10", "--every=5", "--threads=1", "--device=cpu"]


def failure(capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("lmnfast: error: ")
    return lines[0].removeprefix("lmnfast: error: ")


def test_grok_trains_measures_draws_and_sums_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TINY, "--seed=4"]) == 0
    said = capsys.readouterr().out
    for line in (
        "modular-addition, seed 4: 10 steps, measured every 5 on 20 samples (path, 21 uniform points)",
        "memorised at    -",
        "generalised at  -",
        "LMN             hidden_1: peak ",
        "Pearson r       of test loss while generalising, with LMN hidden_1 -, L2 norm -",
        "time            training ",
        "left in         runs/modular-addition-seed4",
    ):
        assert line in said
    run = tmp_path / "runs/modular-addition-seed4"
    assert {path.name for path in run.iterdir()} == {
        ".lock", "config.json", "metrics.csv", "state.pt", "checkpoints", "figures"
    }  # fmt: skip
    (run / "figures/figure2-hidden_1.png").unlink()
    assert cli.main([*TINY, "--seed=4"]) == 0
    assert "finished at step 10" in capsys.readouterr().out
    assert (run / "figures/figure2-hidden_1.png").exists()


@pytest.mark.parametrize("task", [["s4"], ["xor", "--bits=2"]])
def test_grok_runs_every_task(task, tmp_path):
    assert cli.main(["grok", *task, "--steps=2", "--every=1", "--init=lecun-first", f"--out={tmp_path}"]) == 0


def test_grok_says_when_round_off_reaches_gradients(tmp_path, capsys):
    command = ["grok", "modular-addition", "--p=5", "--steps=100", "--every=100", "--lr=0.01", "--threads=1"]
    for dtype in ("float32", "float64"):
        out = tmp_path / dtype
        assert cli.main([*command, "--device=cpu", f"--loss-dtype={dtype}", f"--out={out}"]) == 0
        lost = read_run(out).rows[-1]["lost_gradients"]
        line = f"round-off       reaches true-class gradients from step 100 on, at most {lost} of 20\n"
        said = capsys.readouterr().out
        assert (line in said) == (dtype == "float32") == ("round-off" in said) == (lost > 0)


def test_measure_prints_and_writes_a_table(tmp_path, capsys):
    assert cli.main([*TINY, f"--out={tmp_path}"]) == 0
    capsys.readouterr()
    assert (
        cli.main(["measure", str(tmp_path), "--layers", "embedding", "hidden_1", "--points=11", "--every=10"])
        == 0
    )
    header, *rows, written = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "lmn_embedding", "lmn_hidden_1"]
    assert [row.split()[0] for row in rows] == ["0", "10"]
    assert written == f"written: {tmp_path}/measure-embedding+hidden_1-path-uniform11.csv"


def test_measure_puts_methods_side_by_side_in_one_table_and_one_figure(tmp_path, capsys):
    assert cli.main([*TINY, f"--out={tmp_path}"]) == 0
    capsys.readouterr()
    methods = ["path", "hermite", "jacobian"]
    assert cli.main(["measure", str(tmp_path), f"--method={','.join(methods)}"]) == 0
    header, *rows, table, figure = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", *(f"lmn_hidden_1_{method}" for method in methods)]
    assert [row.split()[0] for row in rows] == ["0", "5", "10"]
    name = "hidden_1-path+hermite+jacobian-uniform21"
    assert table == f"written: {tmp_path}/measure-{name}.csv"
    assert figure == f"written: {tmp_path}/figures/methods-{name}.png"
    assert (tmp_path / f"figures/methods-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_grok_says_how_many_of_the_samples_are_measured(tmp_path, capsys):
    assert cli.main([*TINY, "--samples=8", f"--out={tmp_path}"]) == 0
    assert "10 steps, measured every 5 on 8 of 20 samples (path" in capsys.readouterr().out
    assert cli.main(["measure", str(tmp_path), "--samples=12"]) == 0
    assert "uniform21-12samples.csv" in capsys.readouterr().out
    assert "samples is 8 there, None here" in failure(capsys, *TINY, f"--out={tmp_path}")


def test_the_commands_take_the_convention_for_negative_eigenvalues(tmp_path, capsys):
    assert cli.main([*TINY, "--negative=clip", f"--out={tmp_path}"]) == 0
    assert "(path, 21 uniform points, negative eigenvalues clipped)" in capsys.readouterr().out
    assert cli.main(["measure", str(tmp_path), "--negative=absolute"]) == 0
    *_, written = capsys.readouterr().out.splitlines()
    assert written == f"written: {tmp_path}/measure-hidden_1-path-uniform21.csv"
    with pytest.raises(SystemExit):
        cli.main([*TINY, "--negative=drop"])
    assert "invalid choice: 'drop'" in capsys.readouterr().err


@pytest.mark.parametrize("method, how", [("hermite", "hermite, 21 uniform points"), ("jacobian", "jacobian")])
def test_grok_names_another_method_with_its_numbers(method, how, tmp_path, capsys):
    assert cli.main([*TINY, f"--method={method}", f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert f"on 20 samples ({how})" in said
    assert f"LMN ({method})" in said and f"with LMN ({method}) hidden_1 -" in said


def facts(said):
    """What info printed, by name."""
    return {line[:15].rstrip(): line[17:] for line in said.splitlines()}


def test_info_works_without_the_extra(tmp_path):
    blocked = "import sys; sys.modules.update(tqdm=None, matplotlib=None); "
    (tmp_path / "code.py").write_text(blocked + "from lmnfast.cli import main; main(['info'])")
    done = run_fresh(tmp_path / "code.py", tmp_path)
    assert done.returncode == 0, done.stderr
    native, said = _native.info(), facts(done.stdout)
    assert said["lmnfast"] == version("lmnfast")
    assert said["torch"].startswith(torch.__version__)
    assert said["instruction set"].startswith(native["isa"]) and said["compiled core"] == native["core"]
    assert said["CUDA kernels"].startswith("for sm_") == native["cuda_built"]
    assert ("CUDA device" in said) != torch.cuda.is_available()


def fake_card(monkeypatch, major, minor):
    card = SimpleNamespace(name="Card", major=major, minor=minor, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(
        _native,
        "cuda_problem",
        lambda device=None: "older than sm_80" if (major, minor) < (8, 0) else None,
    )
    monkeypatch.setattr(_native, "cuda_built", lambda: True)


@pytest.mark.parametrize(
    "capability, line",
    [
        ((9, 0), "Card, compute capability 9.0, 16.0 GiB"),
        ((7, 0), "Card, compute capability 7.0, 16.0 GiB; not usable: older than sm_80"),
    ],
)
def test_info_names_the_card(capability, line, monkeypatch, capsys):
    fake_card(monkeypatch, *capability)
    assert cli.main(["info"]) == 0
    assert facts(capsys.readouterr().out)["CUDA device 0"] == line


@pytest.mark.parametrize(
    "built, refusal, reason",
    [
        (False, None, f"torch {torch.__version__} is a CPU build; install one for CUDA"),
        (
            True,
            "The NVIDIA driver is too old (found version 11040).\nUpdate it.",
            "The NVIDIA driver is too old",
        ),
        (True, None, "torch does not say why; look at the driver"),
    ],
)
def test_info_and_grok_say_why_there_is_no_card(built, refusal, reason, tmp_path, monkeypatch, capsys):
    def init():
        if refusal:
            raise RuntimeError(refusal)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert cli.main(["info"]) == 0
    assert facts(capsys.readouterr().out)["CUDA device"].startswith(f"none: {reason}")
    for command in ([*TINY, f"--out={tmp_path}/run"], ["measure", tmp_path / "run"]):
        said = failure(capsys, *command, "--device=cuda")
        assert said.startswith(f"device: cuda is not available: {reason}")
        assert said.endswith("; --device=cpu computes on the CPU")


def test_a_card_older_than_the_build_is_refused_by_name(tmp_path, monkeypatch, capsys):
    fake_card(monkeypatch, 7, 0)
    said = failure(capsys, *TINY, "--device=cuda", f"--out={tmp_path}/run")
    assert said.startswith("device: cuda is not available: older than sm_80; --device=cpu")


def test_info_says_why_there_are_no_cuda_kernels(monkeypatch, capsys):
    native = {"core": "compiled", "isa": "avx2", "isas": ["avx2"], "cuda_archs": ""}
    monkeypatch.setattr(_native, "info", lambda: native)
    monkeypatch.setattr(_native, "cuda_problem", lambda device=None: "this build of lmnfast has none")
    assert cli.main(["info"]) == 0
    assert facts(capsys.readouterr().out)["CUDA kernels"] == "none: this build of lmnfast has none"


@pytest.mark.parametrize(
    "command",
    [
        ["grok", "s4"],
        ["measure", "run"],
        ["checkpoints", "--model=a:b", "--checkpoint=a", "--inputs=x.npy", "--layer=1"],
    ],
)
def test_without_the_extra_the_other_commands_say_what_to_install(command, monkeypatch, capsys):
    monkeypatch.setattr(_commands, "find_spec", lambda name: None)
    assert failure(capsys, *command) == "this command needs matplotlib and tqdm: pip install 'lmnfast[grok]'"


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "out: cannot write to" in failure(capsys, *TINY, f"--out={tmp_path}/file/run")
    assert "hidden_2_pre" in failure(capsys, *TINY, "--layers", "hidden_9", f"--out={tmp_path}/run")
    assert "points: expected at least 3" in failure(capsys, *TINY, "--points=2", f"--out={tmp_path}/run")
    assert "bits: the task" in failure(capsys, *TINY, "--bits=5", f"--out={tmp_path}/run")
    assert "holds no config.json" in failure(capsys, "measure", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert cli.main([*TINY, f"--out={tmp_path}/run"]) == 0
    capsys.readouterr()
    assert "points: expected at least 3" in failure(capsys, "measure", tmp_path / "run", "--points=2")


def test_measure_and_checkpoints_say_what_they_need(tmp_path, capsys):
    for arguments, said in (
        (["measure"], "the following arguments are required: RUN"),
        (["measure", "run", "--jobs=2"], "unrecognized arguments: --jobs=2"),
        (["checkpoints", "--model=a:b"], "arguments are required: --checkpoint, --inputs"),
        (
            ["checkpoints", "--model=a:b", "--checkpoint=c", "--inputs=d"],
            "one of the arguments --layers/--layer --blocks/--block is required",
        ),
        (
            ["checkpoints", "run", "--model=a:b", "--checkpoint=a", "--inputs=x.npy", "--layer=1"],
            "unrecognized arguments: run",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert said in capsys.readouterr().err
    assert "run is not a run" in failure(capsys, "measure", tmp_path / "run", "--samples=5", "--force")


@pytest.mark.parametrize(
    "order",
    ["RUN --points=5 --layers embedding", "--points=5 RUN --layer embedding", "--layers embedding -- RUN"],
)
def test_measure_takes_its_run_among_options(order, tmp_path, capsys):
    assert cli.main([*TINY, f"--out={tmp_path}"]) == 0
    capsys.readouterr()
    assert cli.main(["measure", *(str(tmp_path) if word == "RUN" else word for word in order.split())]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["step", "lmn_embedding"]


def test_another_run_in_the_directory_needs_force(tmp_path, capsys):
    assert cli.main([*TINY, f"--out={tmp_path}"]) == 0
    assert "seed is 0 there, 1 here" in failure(capsys, *TINY, "--seed=1", f"--out={tmp_path}")
    assert cli.main([*TINY, "--seed=1", "--force", f"--out={tmp_path}"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["grok", "addition"],
        ["grok", "s4", "--method=guess"],
        ["measure", "run", "--method=path,guess"],
        ["info", "x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lmnfast.grokking.training._evaluate", interrupted)
        assert cli.main([*TINY, f"--out={tmp_path}"]) == 130
    assert "interrupted; the same command continues the run" in capsys.readouterr().err
    assert cli.main([*TINY, f"--out={tmp_path}"]) == 0


def test_cores_are_counted_where_a_process_has_no_affinity(monkeypatch):
    """As on macOS."""
    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores() == 7
