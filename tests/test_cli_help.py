"""The command line before a command runs: help, version, numbers, and how a command is stopped."""

import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import run_fresh

import lmnfast
from lmnfast import _commands, cli
from lmnfast._parser import parser
from lmnfast.checkpoints import load_inputs

COMMANDS = ("grok", "measure", "checkpoints", "paper", "tiles", "solve", "plan", "info")
DOCS = Path(__file__).parent.parent / "docs"


def run(*words, **options):
    """A process of its own, as a user starts it."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, **options)


def test_help_and_version_do_not_import_torch():
    code = f"""
import sys
from lmnfast.cli import main
for words in (["--version"], ["--help"], *([name, "--help"] for name in {COMMANDS})):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0, words
for words in (["grok"], ["measure", "RUN", "--points=many"]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 2, words
assert not {{"torch", "numpy", "matplotlib", "tqdm"}} & set(sys.modules)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_python_m_is_the_command_line():
    assert run("-m", "lmnfast", "--version").stdout == f"lmnfast {lmnfast.__version__}\n"
    done = run("-m", "lmnfast", "measure")
    assert done.returncode == 2 and "lmnfast measure: error: the following arguments" in done.stderr


def help_of(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    return capsys.readouterr().out


def examples_of(text):
    lines = text.partition("\nexamples")[2].splitlines()
    return [line.strip().partition("   ")[0] for line in lines if line.startswith("  ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_are_right(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(name, capsys)
    examples = examples_of(text)
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)
        words = words[words.index("lmnfast") + 1 :]
        assert parser().parse_args(words).command == name
    sentences = {
        "tasks: modular-addition": {"grok", "paper"},
        "methods: path is": {"grok", "measure", "checkpoints", "tiles"},
    }
    rules = {"rules: uniform": {"grok", "measure", "checkpoints", "tiles"}}
    for words, commands in (sentences | rules).items():
        assert (words in text) == (name in commands)
    assert ("--quiet" in text) == (name != "info")
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith(" "))


def test_the_examples_of_grok_and_measure_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--steps=4", "--every=2", "--width=4", "--device=cpu", "--threads=1", "--quiet"]
    for example in examples_of(help_of("grok", capsys))[1:]:
        words = shlex.split(example)[1:]
        size = {"modular-addition": ["--p=7", "--samples=10"], "xor": ["--bits=2"], "s4": ["--samples=20"]}[
            words[1]
        ]
        assert cli.main([*words, *size, *small]) == 0
    for example in examples_of(help_of("measure", capsys)):
        assert cli.main([*shlex.split(example)[1:], "--points=5", "--quiet"]) == 0
        assert "written: runs/xor-seed1/measure-" in capsys.readouterr().out


def test_the_examples_of_checkpoints_run(place, capsys):
    code = re.search(r"```python\n(.*?)```", (DOCS / "checkpoints.md").read_text(), re.DOTALL)[1]
    Path("digits.py").write_text(code)
    runpy.run_path("digits.py", run_name="__main__")
    assert len(load_inputs("x.npy")) == 100
    for example in examples_of(help_of("checkpoints", capsys)):
        assert cli.main([*shlex.split(example)[1:], "--samples=20", "--points=5", "--quiet"]) == 0
    assert Path("first-and-last/lmn.csv").exists() and Path("block/lmn.csv").exists()
    for example in examples_of(help_of("tiles", capsys)):
        assert cli.main([*shlex.split(example)[1:], "--samples=20", "--points=5", "--quiet"]) == 0
        assert "tiles in" in capsys.readouterr().out
    for example in examples_of(help_of("solve", capsys)):
        assert cli.main(shlex.split(example)[1:]) == 0
        said = capsys.readouterr()
        assert re.search(r"^lmn +\d+\.\d+\n", said.out) and "samples           20" in said.out
        assert said.err.startswith("solver dense, N = 20: ") and len(said.err.splitlines()) == 1
    for example in examples_of(help_of("plan", capsys)):
        assert cli.main(shlex.split(example)[1:]) == 0
        assert capsys.readouterr().out.startswith("N = 20000: 992 tiles, ")


@pytest.mark.parametrize(
    "text, value", [("300", 300), ("1e4", 10_000), ("2.5e3", 2500), ("1_000", 1000), ("+2", 2), ("1.0", 1)]
)
def test_integers_may_be_written_as_people_write_them(text, value):
    options = parser().parse_args(["grok", "s4", f"--steps={text}"])
    assert options.steps == value and type(options.steps) is int


@pytest.mark.parametrize("text", ["1.5", "1e-1", "many", "nan", "inf", "1e300", "1e16", ""])
def test_what_is_no_integer_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["grok", "s4", f"--steps={text}"])
    said = capsys.readouterr().err
    assert f"argument --steps: expected an integer, as 10000 or 1e4, got {text!r}" in said


def test_quiet_leaves_the_results(tmp_path, capsys):
    command = ["grok", "modular-addition", "--p=5", "--steps=10", "--every=5", "--threads=1", "--device=cpu"]
    said = {}
    for more in ([], ["--quiet"]):
        assert cli.main([*command, *more, f"--out={tmp_path}/{len(more)}"]) == 0
        said[len(more)] = capsys.readouterr()
    assert "10/10" in said[0].err and said[1].err == ""
    assert said[1].out.startswith("modular-addition, seed 0: 10 steps")
    assert cli.main([*command, "-q", f"--out={tmp_path}/1"]) == 0  # finished before
    assert capsys.readouterr().out.startswith("modular-addition, seed 0: 10 steps")
    assert cli.main(["measure", "-q", f"{tmp_path}/1"]) == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = run(
        "-P", "-m", "lmnfast", "info", env={"PYTHONPATH": f"{tmp_path}:{Path(cli.__file__).parent.parent}"}
    )
    assert (done.returncode, done.stderr) == (130, "\nlmnfast: interrupted\n")


def test_sigterm_ends_as_ctrl_c_and_the_run_continues(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    command = ["grok", "modular-addition", "--p=5", "--steps=10", "--every=5", "--threads=1", "--device=cpu"]
    with monkeypatch.context() as patched:
        patched.setattr("lmnfast.grokking.training._evaluate", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert cli.main([*command, f"--out={tmp_path}"]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "lmnfast: terminated; the same command continues the run"
    assert signal.getsignal(signal.SIGTERM) == before == signal.SIG_DFL
    assert cli.main([*command, f"--out={tmp_path}"]) == 0


def test_a_handler_of_ones_own_for_sigterm_stays(monkeypatch, capsys):
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        monkeypatch.setitem(_commands.COMMANDS, "info", lambda _: signal.raise_signal(signal.SIGTERM))
        assert cli.main(["info"]) == 0 and came == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_ends_a_process_that_swallows_the_first(tmp_path):
    code = """
import signal
from lmnfast import _commands, cli
def stubborn(options):
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        signal.raise_signal(signal.SIGTERM)
_commands.COMMANDS["info"] = stubborn
cli.main(["info"])
"""
    (tmp_path / "code.py").write_text(code)
    assert run_fresh(tmp_path / "code.py", tmp_path).returncode == -signal.SIGTERM
