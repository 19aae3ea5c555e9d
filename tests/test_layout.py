"""Every op is found under its name in every folder; this walks the list and fails when one is not."""

import ast
import inspect
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from fresh import run_fresh

import lmnfast
from lmnfast import _native, ops, reference

ROOT = Path(__file__).parent.parent


LAPACKS = {"symmetric_eigenvalues"}  # ops without a CPU kernel of the package's own


@pytest.mark.parametrize("name", ops.__all__)
def test_an_op_has_its_kernel_reference_test_and_bench(name):
    for place in (
        *([] if name in LAPACKS else [f"csrc/cpu/{name}.cpp"]),
        f"csrc/cuda/{name}.cu",
        f"lmnfast/ops/{name}.py",
        f"tests/test_{name}.py",
        f"bench/bench_{name}.py",
    ):
        assert (ROOT / place).is_file(), place
    assert callable(getattr(reference, name))
    struct = "".join(word.capitalize() for word in name.split("_"))
    on_both = f"#define LMN_ON_{'CUDA_ALONE' if name in LAPACKS else 'BOTH'}(N, X)"
    listed = (ROOT / "csrc/ops.h").read_text().partition(on_both)[2].partition("\n\n")[0]
    assert f"N(X, {struct})" in listed, f"csrc/ops.h does not list {struct}"
    assert hasattr(_native._C, struct) == _native.HAS_CORE
    assert hasattr(torch.ops.lmnfast, name)
    tests = (ROOT / f"tests/test_{name}.py").read_text()
    for part in (f"reference.{name}", "opcheck", "torch.compile"):
        assert part in tests, f"tests/test_{name}.py does not use {part}"
    for fixture in ("device", "dtype"):
        assert re.search(rf"def test_\w+\([^)]*\b{fixture}\b", tests), (
            f"tests/test_{name}.py has no test on every {fixture}"
        )


def test_every_kernel_has_one_name():
    """A struct of csrc/ops.h, and the function that calls it, in a registered op's file or for `Linear` in the seam."""
    lists = (ROOT / "csrc/ops.h").read_text().partition("#define LMN_ON_BOTH")[2].partition("\n\n")[0]
    structs = re.findall(r"N\(X, (\w+)\)", lists)
    assert len(structs) > len(ops.__all__)
    homes = [_native, *(sys.modules[f"lmnfast.ops.{name}"] for name in ops.__all__)]
    for struct in structs:
        name = re.sub("(?<!^)(?=[A-Z])", "_", struct).lower().replace("path_r_2", "path_r2")
        assert any(inspect.isfunction(getattr(home, name, None)) for home in homes), name


def test_no_kernel_file_is_without_an_op():
    folders = ("csrc/cpu", "csrc/cuda", "lmnfast/ops")
    files = {
        p.stem for folder in folders for p in (ROOT / folder).iterdir() if p.suffix in (".cpp", ".cu", ".py")
    }
    parts = {"linear"}  # of path_connectivity: its first Linear, in float64
    assert files - {"__init__", "_checks", "_hoisted", "_by_reference", "_gradients"} - parts == set(
        ops.__all__
    )


def test_the_reference_does_not_know_the_compiled_core():
    assert "_native" not in inspect.getsource(reference) and "_C" not in inspect.getsource(reference)


def files_of(cell: str) -> list[str]:
    """The files and folders of a table's cell; a name without a folder is beside the first."""
    names = re.findall(r"`([\w./<>]+)`", cell)
    folder = names[0].rpartition("/")[0] if names else ""
    return [name if "/" in name.rstrip("/") else f"{folder}/{name}" for name in names]


def modules() -> dict[str, Path]:
    """The files of the package's modules, by the modules' names."""
    files = (ROOT / "lmnfast").rglob("*.py")
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imports_of(file: Path, known: set[str]) -> set[str]:
    """Those of the known modules that a file of the package imports, anywhere in it."""
    package = file.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            full = [f"{module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else module for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def roles(root: str) -> dict[Path, str]:
    """The role of each source file whose place begins like this, by the table of section 1 of architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    found: dict[Path, str] = {}
    for role, cell in re.findall(rf"^\| \*\*(.*)\*\* \| (`(?:{root})/[^|]*) \|", text, re.MULTILINE):
        for place in files_of(cell):
            for file in ROOT.glob(
                f"{place}**/*.*" if place.endswith("/") else re.sub("<.*>", "[!_]*", place)
            ):
                if file.suffix in (".py", ".h", ".cpp", ".cuh", ".cu"):
                    assert found.setdefault(file, role) == role, f"{file} has two roles"
    return found


def order(first: str) -> dict[str, int]:
    """The line of each role in the list of section 2 of architecture.md that begins with this role, counted from above."""
    text = (ROOT / "docs/architecture.md").read_text()
    lines = re.search(rf"```text\n({first}\n.*?)```", text, re.DOTALL)[1].splitlines()
    named = [(n, role) for n, line in enumerate(lines) for role in re.split(" {2,}", line)[0].split(", ")]
    found = {role: n for n, role in named}
    assert len(found) == len(named), "a role stands twice"
    return found


def test_modules_import_from_below_alone():
    files, of_file, line = modules(), roles("lmnfast"), order("command line")
    role = {name: of_file[file] for name, file in files.items() if file in of_file}
    assert set(role) == set(files) - {"lmnfast"}, "every module has a role"
    assert set(role.values()) == set(line), "every role has its line"
    core = "lmnfast._C"
    graph = {name: imports_of(file, {core, *files}) - {core, name} for name, file in files.items()}
    assert len(graph["lmnfast.probe"]) > 5 and "lmnfast.ops._checks" in graph["lmnfast.ops.path_r2"]
    # The surface of the library: its names come from it, and the application may take them.
    place = {"lmnfast": line["probe"] - 0.5, **{name: line[of] for name, of in role.items()}}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if place[other] <= place[name] and role.get(name) != role.get(other)
    ]
    assert not wrong, wrong
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_sources_include_from_below_alone():
    role, line = roles("csrc|tests/emulator"), order("binding")
    files = {file for file in (ROOT / "csrc").rglob("*.*") if file.suffix in (".h", ".cpp", ".cuh", ".cu")}
    assert files <= set(role), "every source has a role"
    assert set(role.values()) == set(line), "every role has its line"
    graph = {
        file: {
            (ROOT / "tests" / name if name.startswith("emulator/") else file.parent / name).resolve()
            for name in re.findall(r'^#include "(.*)"', file.read_text(), re.MULTILINE)
        }
        for file in role
    }
    assert sum(map(len, graph.values())) > 50
    wrong = [
        f"{file.relative_to(ROOT)} includes {other.relative_to(ROOT)}"
        for file, others in graph.items()
        for other in others
        if (line[role[other]] <= line[role[file]] and role[other] != role[file])
        or {"CPU", "CUDA"} == {role[file].split()[0], role[other].split()[0]}
    ]
    assert not wrong, wrong
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_compiled_core_is_used_by_its_seam_and_by_the_ops_alone():
    users = {
        name
        for name, file in modules().items()
        if re.search(r"(?<!torch\.)\b_C\b", file.read_text()) and not name.startswith("lmnfast.ops.")
    }
    assert users == {"lmnfast._native"}


def test_every_package_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    packages = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "lmnfast").rglob("__init__.py")
    }
    assert {f'"{package}",' in text for package in packages} == {True} and len(packages) == 7


@pytest.mark.parametrize("name", lmnfast.__all__)
def test_public_names_are_documented_and_typed(name):
    item = getattr(lmnfast, name)
    assert item.__doc__
    if inspect.isfunction(item):
        assert set(inspect.signature(item).parameters) | {"return"} == set(item.__annotations__)


def test_importing_neither_draws_nor_seeds():
    code = (
        "import sys, torch; before = torch.get_rng_state(); import lmnfast; "
        "assert torch.equal(before, torch.get_rng_state()); "
        "assert not {'matplotlib', 'torch._dynamo'} & set(sys.modules); assert not torch.cuda.is_initialized()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_environment_chooses_the_instruction_set(tmp_path):
    script = tmp_path / "code.py"
    script.write_text("import lmnfast; print(lmnfast._native.info()['isa'])")
    for isa in _native._C.isas():
        assert run_fresh(script, tmp_path, LMNFAST_ISA=isa).stdout.strip() == isa
    done = run_fresh(script, tmp_path, LMNFAST_ISA="mmx")
    assert (
        done.returncode
        and f"LMNFAST_ISA: expected one of {_native._C.isas()[0]}" in done.stderr
        and "got 'mmx'" in done.stderr
    )


def test_the_readmes_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1 and blocks[0].count("torch.randn(500, 64)") == 1
    exec(blocks[0].replace("500", "60"), {})  # the time grows with the square of the number of samples
    said = capsys.readouterr().out
    assert "Measurement(lmn=" in said and "'layer': '1'" in said


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/mathematics.md", "CONTRIBUTING.md"])
def test_documents_for_developers_name_files_that_exist(name):
    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:lmnfast|csrc|tests|bench|docs|examples)/[\w./-]+)`", text)
    links = [(ROOT / name).parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    assert len(paths) > 2 and links
    for place in [*(ROOT / path for path in paths), *links]:
        assert place.exists(), place


FILE = r"`((?:lmnfast|csrc|tests|bench|docs|examples)/[\w./-]+\.\w+)`"
NAMES = r"`[\w.]+(?:\([^`]*\))?`"


def names_and_files(text: str) -> list[tuple[str, list[str]]]:
    """What a document quotes together with files: "`name`, `name` in `folder/file`", and the rows of a table of files."""
    text = re.sub("```.*?```", "", text, flags=re.DOTALL)
    found = []
    for names, file in re.findall(rf"({NAMES}(?:(?:, |,? and ){NAMES})*)\s+(?:in|of)\s+{FILE}", text):
        found += [(name, [file]) for name in re.findall(r"`(\w[\w.]*)", names)]
    for files, words in re.findall(r"^\| \*\*.*\*\* \| (`\w+/[^|]*) \| ([^|]*) \|$", text, re.MULTILINE):
        row = [file for file in files_of(files) if file.endswith((".py", ".h", ".cpp", ".cuh"))]
        found += [(name, row) for name in re.findall(r"`(\w+)`", words) if row]
    return found


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/mathematics.md", "CONTRIBUTING.md"])
def test_a_name_that_a_document_quotes_with_a_file_occurs_in_it(name):
    found = names_and_files((ROOT / name).read_text())
    for word, files in found:
        texts = [(ROOT / file).read_text() for file in files]
        last = word.rpartition(".")[2]
        assert any(re.search(rf"\b{last}\b", text) for text in texts), f"{name}: {word} is not in {files}"
    least = {"docs/architecture.md": 10, "docs/mathematics.md": 10}
    assert len(found) >= least.get(name, 0)


def test_a_name_that_is_not_in_its_file_is_found():
    assert names_and_files("(`a_name` in `lmnfast/cli.py`)") == [("a_name", ["lmnfast/cli.py"])]
    assert names_and_files("`one` and `two.three(4)`\nof `csrc/ops.h`") == [
        ("one", ["csrc/ops.h"]),
        ("two.three", ["csrc/ops.h"]),
    ]
    assert names_and_files("| **role** | `lmnfast/a.py`, `b.py` | what `c` is |") == [
        ("c", ["lmnfast/a.py", "lmnfast/b.py"])
    ]


FAKE_CMAKE = """#!{python}
import sys
print("called", sys.argv[1:], flush=True)
"""


def build(tmp_path, *options, **environment):
    """What setup.py build_ext prints with a cmake that only says how it was called."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "cmake").write_text(FAKE_CMAKE.format(python=sys.executable))
    (tools / "cmake").chmod(0o755)
    (tools / "pybind11.py").write_text("print('.')")
    plain = {n: v for n, v in os.environ.items() if n not in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL")}
    paths = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(tools)}
    command = [sys.executable, ROOT / "setup.py", "build_ext", f"--build-temp={tmp_path}/temp", *options]
    command += [f"--build-lib={tmp_path}/lib"]
    environment = plain | paths | environment
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "options, environment, jobs",
    [
        ([], {"MAX_JOBS": "3"}, 3),
        ([], {"CMAKE_BUILD_PARALLEL_LEVEL": "5", "MAX_JOBS": ""}, 5),
        (["--parallel=2"], {"MAX_JOBS": "3"}, 2),
        ([], {}, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    ],
)
def test_a_build_honours_the_number_of_jobs(options, environment, jobs, tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools")
    said = build(tmp_path, *options, **environment).stdout
    assert f"'--parallel', '{jobs}']" in said


def test_a_wrong_number_of_jobs_is_refused_before_the_build(tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools")
    done = build(tmp_path, MAX_JOBS="all")
    assert done.returncode and "MAX_JOBS: expected a number of jobs, at least 1, got 'all'" in done.stderr
    assert "called" not in done.stdout


def test_one_version_of_cmake_and_one_of_torch_are_asked_for():
    texts = {name: (ROOT / name).read_text() for name in ("pyproject.toml", "CMakeLists.txt", "setup.py")}
    patterns = (
        "cmake>=([0-9.]+)",
        r"cmake_minimum_required\(VERSION ([0-9.]+)",
        "needs CMake ([0-9.]+) or newer",
    )
    versions = [re.search(pattern, text)[1] for pattern, text in zip(patterns, texts.values(), strict=True)]
    assert len(set(versions)) == 1 and tuple(map(int, versions[0].split("."))) >= (3, 24)  # for --fresh
    torch_version = re.search("torch>=([0-9.]+)", texts["pyproject.toml"])[1]
    assert tuple(map(int, torch_version.split("."))) >= (2, 6)  # CVE-2025-32434


def test_the_version_is_the_same_wherever_it_stands():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings and (not released or released[0] == version)


def test_the_changelog_has_the_headings_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for part in re.split(r"^## \[(?:Unreleased|[\d.]+\] - \d{4}-\d\d-\d\d)\]?$", text, flags=re.MULTILINE)[
        1:
    ]:
        found = re.findall(r"^##+ (.*)$", part, re.MULTILINE)
        assert found and len(set(found)) == len(found) and set(found) <= kinds, found


def test_one_sentence_says_what_the_package_is():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^description = "(.*)"$', text, re.MULTILINE)[1] == lmnfast.__doc__


def test_the_metadata_name_the_pythons_that_are_tested():
    classifiers = re.findall(
        r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    assert (
        classifiers == re.search(r"set -- (3.*)$", (ROOT / ".ci/matrix").read_text(), re.MULTILINE)[1].split()
    )


def test_no_file_of_code_is_longer_than_500_lines():
    files = [path for folder in ("lmnfast", "csrc", "tests", "bench") for path in (ROOT / folder).rglob("*")]
    code = [path for path in files if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in code}
    assert len(lengths) > 200 and {name for name, length in lengths.items() if length > 500} == set()


def test_a_package_index_shows_no_link_into_the_checkout(tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools")
    for name in ("setup.py", "README.md", "lmnfast"):
        (tmp_path / name).symlink_to(ROOT / name)
    project = (ROOT / "pyproject.toml").read_text()
    relative = r"\]\((?!https?:)"

    def shown(text: str) -> str:
        (tmp_path / "pyproject.toml").write_text(text)
        command = [sys.executable, "setup.py", "-q", "--long-description"]
        environment = {**os.environ, "LMNFAST_CORE": "off"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    without = shown(project)
    assert "linear mapping number" in without and "What the number means" in without and ".png" not in without
    assert not re.search(relative, without) and re.search(relative, (ROOT / "README.md").read_text())
    address = "https://example.org/lmnfast"
    known = shown(project.replace("[project.urls]\n", f'[project.urls]\nRepository = "{address}"\n'))
    version = re.search(r'^version = "(.*)"', project, re.MULTILINE)[1]
    assert not re.search(relative, known)
    assert f"]({address}/blob/v{version}/docs/number.md)" in known
    assert re.search(rf"!\[[^\]]*\]\({address}/raw/v{version}/docs/modular-addition\.png\)", known)
