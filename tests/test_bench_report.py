"""The benchmarks' document: fits, tables, figures, options. Nothing is timed here."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # last, so that lmnfast stays the installed one

from bench import report  # noqa: E402


def record(group, bar, median, floor=None, part="path_r2"):
    info = {"bar": bar, **({"floor_s": floor} if floor else {})}
    stats = {"median": median, "min": median, "rounds": 1, "iterations": 1}
    return {"part": part, "group": group, "name": f"bench[{bar}]", "extra_info": info, "stats": stats}


RECORDS = [
    record("wide, cpu, highest", "eager, reference", 0.5, 0.05),
    record("wide, cpu, highest", "eager", 0.4, 0.05),
    record("wide, cpu, highest", "ours, lobatto 9", 0.04, 0.05),
    record("wide, cpu, highest", "ours", 0.1, 0.05),
    record("wide, cpu, highest", "torch.compile, by hand", 0.25, 0.05),
    record("narrow, cpu", "ours", 0.00123),
    record("no bar of ours, cpu", "eager", 1.0),
]
SWEEP = {
    "name": "product",
    "variable": "N",
    "order": "2",
    "bars": {
        "ours": [[n, 1e-6 * n**2] for n in (10, 20, 40, 80)],
        "eager": [[n, 1e-5 * n**1.5] for n in (10, 20, 40)],
    },
    "work": [[n, n**2.5] for n in (10, 20, 40, 80)],
}


def results(**changes):
    return {
        "date": "2026-01-02",
        "command": "python -m bench.report",
        "seconds": 600.0,
        "quick": False,
        "machine": {"processor": "a processor"},
        "failed": [],
        "benchmarks": RECORDS,
        "scaling": [SWEEP],
        **changes,
    }


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.7, 3.0])
def test_a_fit_recovers_the_exponent_of_a_power_law(exponent):
    line = report.fit((value, 3.0 * value**exponent) for value in (1024, 128, 256, 2048))
    assert line.exponent == pytest.approx(exponent, abs=1e-12) and line.factor == pytest.approx(3)
    assert line.error < 1e-12 and (line.first, line.last) == (128, 2048)
    assert line(500.0) == pytest.approx(3 * 500**exponent)


def test_the_error_of_a_fit_is_the_least_squares_one():
    value = np.geomspace(1, 100, 9)
    seconds = value**2 * np.exp(np.random.default_rng(0).normal(0, 0.1, 9))
    line = report.fit(zip(value, seconds))
    (exponent, _), covariance = np.polyfit(np.log(value), np.log(seconds), 1, cov=True)
    assert line.exponent == pytest.approx(exponent)
    assert line.error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert str(line) == f"{line.exponent:.2f} ± {line.error:.2f}"


def test_two_points_have_an_exponent_without_an_error_and_one_has_none():
    line = report.fit([(1, 4.0), (2, 2.0)])
    assert line.exponent == pytest.approx(-1) and math.isnan(line.error) and str(line) == "-1.00"
    with pytest.raises(ValueError, match="points: expected two different values at least, got 1"):
        report.fit([(2, 4.0), (2, 5.0)])


def test_the_table_has_the_fastest_rival_of_every_kind_and_not_our_approximations():
    assert report.bars_table(RECORDS)[2:] == [
        "| wide | **100** | 400 (4x) | 250 (2.5x) |  | 50.0 | 2 |",
        "| narrow | **1.23** |  |  |  |  |  |",
    ]


def test_exponents_stand_beside_the_expected_ones():
    (row,) = report.scaling_table([SWEEP])[2:]
    assert row == "| product | N | 10, 80 | **2.00 ± 0.00** | 1.50 ± 0.00, to 40 | 2.50 | 2 |"


def test_the_document_shows_only_what_was_run_and_says_what_failed():
    text = report.document(results(failed=["probe (exit code 1)"]))
    for said in ("a processor", "### path_r2", "missing here: probe (exit code 1)", "benchmarks-scaling.png"):
        assert said in text
    assert "### probe" not in text and "--quick" not in text
    text = report.document(results(quick=True, scaling=[]))
    assert "benchmarks-scaling.png" not in text and "not to be believed" in text and "Failed" not in text


def test_figures_are_drawn_of_what_there_is():
    drawn = report.figures(results())
    assert sorted(drawn) == ["benchmarks-bars.png", "benchmarks-scaling.png"]
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    assert report.figures(results(benchmarks=[], scaling=[])) == {}


def test_every_bench_file_is_a_part():
    assert set(report.PARTS) == {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")}


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: True)
    monkeypatch.setattr(report, "facts", lambda: {"processor": "a processor"})
    monkeypatch.setattr(report, "run", lambda part, quick, results: results["benchmarks"].extend(RECORDS))


def test_the_document_can_be_drawn_anew_from_its_numbers(nothing_runs, tmp_path, capsys):
    assert report.main(["path_r2", f"--out={tmp_path}"]) == 0
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(written) == ["benchmarks-bars.png", "benchmarks.json", "benchmarks.md"]
    (tmp_path / "benchmarks.md").unlink()
    assert report.main(["--redraw", f"--out={tmp_path}"]) == 0
    assert (tmp_path / "benchmarks.md").read_bytes() == written["benchmarks.md"]
    assert "| wide | **100** |" in capsys.readouterr().out


def test_a_part_that_fails_is_named_and_the_exit_code_is_1(nothing_runs, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "run", lambda part, quick, results: results["failed"].append(part))
    assert report.main(["probe", f"--out={tmp_path}"]) == 1
    assert "**Failed, and missing here: probe.**" in (tmp_path / "benchmarks.md").read_text()


def failure(capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    try:
        code = report.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    (line,) = said.err.splitlines()
    return line.removeprefix("bench.report: error: ")


def test_bad_options_are_one_line(nothing_runs, monkeypatch, tmp_path, capsys):
    assert failure(capsys, "path").endswith("probe, scaling, got 'path'")
    assert failure(capsys, "--redraw", "probe").startswith("--redraw: expected without PART")
    assert "No such file" in failure(capsys, "--redraw", f"--out={tmp_path / 'empty'}")
    (tmp_path / "file").touch()
    assert "file" in failure(capsys, "probe", f"--out={tmp_path / 'file'}")
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert failure(capsys, "probe").startswith("this needs matplotlib and pytest and pytest_benchmark: pip")
