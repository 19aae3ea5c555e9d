"""The pages of the documentation: their code prints what they say, and their links lead somewhere."""

import importlib.util
import re
import runpy
import shlex
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fresh import run_fresh

import lmnfast
from lmnfast import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


@pytest.mark.parametrize("name, least", [("number", 10), ("index", 3)])
def test_a_page_says_what_its_code_prints(name, least, capsys):
    page = (ROOT / f"docs/{name}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") >= least
    names, number = {}, r"(?<!\w)\d[\d.]*(?:e[+-]\d+)?"
    for code, said in blocks:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "f: .* constant to rounding")
            exec(code, names)
        printed = capsys.readouterr().out
        assert re.sub(number, "#", printed) == re.sub(number, "#", said)
        values = ([float(value) for value in re.findall(number, text)] for text in (printed, said))
        # Offsets and bfloat16 leave few digits, which differ from one instruction set to another.
        assert next(values) == pytest.approx(next(values), rel=0.03, abs=0.006)


def test_the_penalties_of_training_loops_run(tmp_path, monkeypatch, capsys):
    section = (
        (ROOT / "docs/training-loops.md")
        .read_text()
        .partition("\n## A measure as a penalty\n")[2]
        .partition("\n## ")[0]
    )
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for code, needed in zip(blocks, (None, "lightning", "transformers"), strict=True):
        if needed is None or importlib.util.find_spec(needed):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(code, names)
            value = float(re.findall(r"\d\.\d+(?:e-\d+)?", capsys.readouterr().out)[-1])
            assert 0 < value < 1, needed


def test_two_processes_print_what_the_page_on_many_samples_says(tmp_path):
    """As torchrun starts them, which only sets these variables."""
    page = (ROOT / "docs/scale.md").read_text()
    script = re.search(r"```python\n(# sharded.py\n.*?)```", page, re.DOTALL)[1]
    said = re.search(r"torchrun .*?```text\n(.*?)```", page, re.DOTALL)[1].splitlines()
    (tmp_path / "sharded.py").write_text(script)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    places = [tmp_path / str(rank) for rank in range(2)]
    for place in places:
        place.mkdir()
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(
            lambda rank: run_fresh(tmp_path / "sharded.py", places[rank], **shared, RANK=str(rank)), range(2)
        )
    printed = []
    for one in done:
        assert one.returncode == 0, one.stderr
        printed += one.stdout.splitlines()
    assert printed == said


def test_the_commands_of_the_page_on_many_samples_run(place, capsys):
    page = (ROOT / "docs/scale.md").read_text()
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/checkpoints.md").read_text(), re.DOTALL)[1]
    Path("digits.py").write_text(code)
    runpy.run_path("digits.py", run_name="__main__")
    commands = [
        line.removesuffix(" &")
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("lmnfast ")
    ]
    assert [command.split()[1] for command in commands] == ["plan", "plan", "tiles", "tiles", "solve"]
    printed = []
    for command in commands:
        assert cli.main([*shlex.split(command)[1:], "--quiet"]) == 0
        printed.append(capsys.readouterr().out)
    planned, _, found, _ = re.findall(r"```text\n(N =.*?|shard.*?|solver.*?)```", page, re.DOTALL)
    assert without_times(printed[0]) == without_times(planned)
    number = r"(?<![\w/])\d+\.?\d*(?!/)"
    there, said = ("".join(printed[2:]), found)
    assert re.sub(number, "#", there) == re.sub(number, "#", said)
    values = ([float(value) for value in re.findall(number, text)] for text in (there, said))
    assert next(values) == pytest.approx(next(values), rel=0.03)


def test_the_python_of_the_page_on_many_samples_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """Each block alone, as it is pasted."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/scale.md").read_text()
    blocks = re.findall(r"```python\n(?!# sharded.py)(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) + 1 == page.count("```python") == 3
    for code, said in blocks:
        names: dict[str, object] = {}
        exec(code, names)
        assert without_times(capsys.readouterr().out) == without_times(said)
    assert names["m"] == lmnfast.measure(names["f"], names["x"], points=9, rule="lobatto")


def without_times(text: str) -> str:
    """What `plan` and `solve` say, but for the times, and the memory that is free."""
    text = re.sub(r"[\d.e+-]+ (us|s|minutes|hours|days)\b", "#", text)
    return re.sub(r"; [\d.]+ \w+ are free.*", "", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        place = page.parent / target if target else page
        left_out = (
            place.suffix in (".png", ".gz") and not (ROOT / ".git").exists()
        )  # of a source distribution
        assert place.exists() or left_out, f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], (
                anchor
            )


def test_every_page_is_in_the_contents_of_the_site():
    contents = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r": ([\w/.-]+\.(?:md|ipynb))$", contents, re.MULTILINE))
    there = {
        path.relative_to(ROOT / "docs").as_posix()
        for kind in ("md", "ipynb")
        for path in (ROOT / "docs").rglob(f"*.{kind}")
    }
    assert named == there and len(there) > 20


def test_notebooks_are_kept_without_what_they_print():
    """The site's build runs them; what they print would only grow old in the repository."""
    import json

    notebooks = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
    assert len(notebooks) == 4
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells), path
