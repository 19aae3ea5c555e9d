"""The examples run, print a table of LMN over steps, and go on where they say so."""

import csv
import re
import runpy
import sys
from pathlib import Path

import pytest
from fresh import run_fresh

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(example: Path, folder: Path, *arguments: str) -> str:
    done = run_fresh(example, folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_prints_numbers(example, tmp_path):
    few = ["--samples", "10"] if example.stem == "block_by_block" else []
    said = run(example, tmp_path, "--steps", "4", *few)
    assert re.search(r"\d\.\d", said) and "LMN" in said and "nan" not in said.lower(), said


@pytest.mark.parametrize("model, samples", [("gpt2", 10), ("vit", 10), ("lstm", 40)])
def test_every_network_is_measured_block_by_block(model, samples, capsys, monkeypatch):
    """In this process, which has imported transformers before."""
    example = str(EXAMPLES[0].parent / "block_by_block.py")
    arguments = ["--steps", "4", "--samples", str(samples), "--model", model]
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    runpy.run_path(example, run_name="__main__")
    numbers = [line.split()[-2:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(numbers) == 3 * (2 if model == "lstm" else 4) and all(
        float(n) > 1 for pair in numbers for n in pair
    )


def test_the_plain_loop_resumes_to_the_same_rows(tmp_path):
    example = Path(EXAMPLES[0].parent, "plain_loop.py")
    for steps, folder in (("4", "stopped"), ("8", "stopped"), ("8", "straight")):
        said = run(example, tmp_path, "--steps", steps, "--every", "2", "--run", folder)
        assert ("resumed at step 5" in said) == ((steps, folder) == ("8", "stopped"))
    stopped, straight = ((tmp_path / folder / "lmn.csv").read_text() for folder in ("stopped", "straight"))
    assert stopped == straight
    assert [row["step"] for row in csv.DictReader(straight.splitlines())] == [
        s for s in "02468" for _ in "01"
    ]
