"""Measurements as files, rows of every table of ours read back, rows that JSON and pandas take, tables for notebooks."""

import copy
import gzip
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from tiny import TINY
from torch import nn

import lmnfast
from lmnfast import Measurement
from lmnfast.checkpoints import measure_checkpoints
from lmnfast.grokking import read_run, train
from lmnfast.grokking.measure import measure
from lmnfast.grokking.run import read_rows
from lmnfast.integrations import CSVWriter

ROOT = Path(__file__).parent.parent
F = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3))


def measured(dtype=torch.float32, **settings):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3)).to(dtype)
    return lmnfast.measure(f, x.to(dtype), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "jacobian"},
        {"rule": "lobatto", "points": 9, "negative": "clip", "stabiliser": 8e-8},
        {"observables": ["lmn", "curvature", "l2_norm"]},
    ],
)
def test_a_measurement_comes_back_equal_in_every_field_and_type(dtype, settings, tmp_path):
    m = measured(dtype, **settings)
    m.save(tmp_path / "new" / "m.dat")  # no suffix is added, a missing folder is made
    found = Measurement.load(str(tmp_path / "new" / "m.dat"))
    assert found == m and [p.name for p in (tmp_path / "new").iterdir()] == ["m.dat"]
    for each in fields(Measurement):
        old, new = getattr(m, each.name), getattr(found, each.name)
        assert type(new) is type(old), each.name
        if isinstance(old, torch.Tensor):
            assert new.dtype == old.dtype and torch.equal(new, old)
    assert repr(found) == repr(m) and float(found) == m.lmn


def test_observables_that_do_not_apply_come_back_as_nan_and_numbers_to_the_last_bit(tmp_path):
    m = replace(
        measured(), observables={"a": math.nan, "b": math.inf, "c": 0.1 + 0.2, "d": -0.0, "e": 5e-324}
    )
    m.save(tmp_path / "m.npz")
    found = Measurement.load(tmp_path / "m.npz").observables
    assert found.keys() == m.observables.keys() and math.isnan(found["a"])
    assert all(found[name].hex() == m.observables[name].hex() for name in "bcde")


def test_numpy_reads_a_file_without_lmnfast(tmp_path):
    m = measured()
    m.save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as members:
        assert np.array_equal(members["connectivity"], m.connectivity.numpy())
        about = json.loads(members["lmnfast"].item())
    assert about["values"]["lmn"] == m.lmn and (about["kind"], about["version"]) == ("Measurement", 1)


def test_a_measurement_without_the_fields_that_came_later_has_their_defaults(tmp_path):
    m = measured()
    plain = {n: v for n, v in m.to_dict().items() if not isinstance(v, torch.Tensor)}
    del plain["stabiliser"], plain["observables"]
    arrays = {name: getattr(m, name).numpy() for name in ("eigenvalues", "connectivity")}
    lmnfast._kept.write_values(tmp_path / "m.npz", "Measurement", plain, arrays)
    assert Measurement.load(tmp_path / "m.npz") == m


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def other_files(path):
    """Files that are no measurement, and a part of the reason that is given."""
    m = measured()
    m.save(path)
    content = path.read_bytes()
    plain = {n: v for n, v in m.to_dict().items() if not isinstance(v, torch.Tensor)}
    arrays = {name: getattr(m, name).numpy() for name in ("eigenvalues", "connectivity")}

    def written(kind="Measurement", changed=None, **others):
        lmnfast._kept.write_values(path, kind, plain | (changed or {}), arrays | others)
        return path.read_bytes()

    def later():
        about = {"kind": "Measurement", "version": 2, "values": plain}
        return saved(lmnfast=np.array(json.dumps(about)), **arrays)

    def saved(**members):
        with path.open("wb") as file:
            np.savez(file, **members)
        return path.read_bytes()

    yield b"", "EOFError"
    yield b"no archive", ""
    yield content[: len(content) // 2], ""
    flipped = bytearray(content)
    flipped[content.index(m.connectivity.numpy().tobytes()) + 5] ^= 1
    yield bytes(flipped), "Bad CRC-32"
    yield saved(a=np.ones(3)), "KeyError"
    yield saved(a=np.array([Evil()], dtype=object)), "allow_pickle=False"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    yield path.read_bytes(), ""
    yield written(kind="Estimate"), "it is a Estimate"
    yield later(), "its format is 2; this version of lmnfast knows 1 to 1"
    yield written(changed={"more": 1}), "it has the fields"
    yield written(changed={"samples": "12"}), "samples is a str"
    yield written(changed={"observables": [1.0]}), "observables is a list"
    yield written(changed={"samples": 13}), "for 13 samples"
    yield written(eigenvalues=np.ones((2, 2))), "for 12 samples"


def test_a_damaged_or_foreign_file_is_one_error_that_names_it_and_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (content, reason) in enumerate(other_files(tmp_path / "made")):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            Measurement.load(path)
        text = str(error.value)
        assert text.startswith(f"path: expected a file of Measurement.save, got {path}: ") and reason in text
        assert "\n" not in text and len(text) < 600
    assert not Path("ran").exists()
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        Measurement.load("absent.npz")


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path, m = tmp_path / "m.npz", measured()
    m.save(path)
    content = path.read_bytes()

    def full(file, **members):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        measured(torch.float64).save(path)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["m.npz"]


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells, self.open, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.attributes += attrs
        self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells[-1] += data


def table(item):
    parser = Cells()
    parser.feed(item._repr_html_())
    assert parser.open == []
    assert not [value for _, value in parser.attributes if "color" in value or "background" in value]
    cells = [cell for cell in parser.cells if cell]
    return dict(zip(cells[1::2], cells[2::2]))


def test_a_notebook_shows_a_measurement_as_a_table_without_colours(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    m = measured(observables=["curvature"])
    found = table(m)
    assert found["lmn"] == f"{m.lmn:.6g}" and found["method"] == "path" and found["samples"] == "12"
    assert found["curvature"] == f"{m.observables['curvature']:.6g}"
    unsaid = {"eigenvalues", "connectivity", "observables", "standard_error", "bound"}
    assert set(found) == {f.name for f in fields(m)} - unsaid | {"curvature"}
    assert table(replace(m, rule="<b>&"))["rule"] == "<b>&"
    estimate = lmnfast.curvature(F, torch.randn(12, 4))
    assert table(estimate)["value"] == f"{estimate.value:.6g}" and table(estimate)["pairs"] == "66"


@pytest.mark.parametrize(
    "step",
    [
        3,
        np.int64(3),
        np.int32(3),
        np.array(3),
        torch.tensor(3),
        torch.tensor([3]),
        Fraction(3),
        Decimal(3),
        True,
    ],
    ids=lambda step: type(step).__name__,
)
def test_rows_hold_whole_steps_as_int_whatever_type_came_in(step):
    with lmnfast.Probe(F, torch.randn(8, 4), "0", every=1) as probe:
        assert probe(step)
    (row,) = probe.history
    assert type(row["step"]) is int and row["step"] == int(step)
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    "step",
    [0.5, np.float32(0.5), torch.tensor(0.5), Fraction(1, 2), Decimal("0.5")],
    ids=lambda s: type(s).__name__,
)
def test_rows_hold_other_steps_and_extras_as_float(step):
    with lmnfast.Probe(F, torch.randn(8, 4), "0", every=lambda step: True) as probe:
        probe(step, extra=step, word="a")
    (row,) = probe.history
    assert type(row["step"]) is float and row["step"] == 0.5 and row["extra"] == 0.5 and row["word"] == "a"
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    "step, kind", [("3", TypeError), (None, None), (math.nan, ValueError), (torch.ones(2), TypeError)]
)
def test_a_step_that_is_no_number_is_refused(step, kind):
    with lmnfast.Probe(F, torch.randn(8, 4), "0", every=1) as probe:
        if kind is None:
            assert probe(step)
            return
        with pytest.raises(kind, match="step: expected a (finite )?number, got"):
            probe(step)
        with pytest.raises(kind, match="step: expected a (finite )?number, got"):
            probe.reach(step)
        assert probe.history == [] and probe.next_step == 0


def test_a_probes_rows_are_a_data_frame(monkeypatch):
    with lmnfast.Probe(F, torch.randn(8, 4), ["0", "1"], every=1) as probe:
        for step in range(3):
            probe(step, loss=0.5 * step)
    frame = probe.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame.to_dict("records") == probe.history
    assert list(frame["loss"]) == [0, 0, 0.5, 0.5, 1, 1]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pandas: not installed; pip install lmnfast\[pandas\]"):
        probe.to_pandas()


def test_a_probes_rows_come_back_from_its_file_with_their_types(tmp_path):
    path = tmp_path / "lmn.csv"
    how = {"every": 1, "observables": ["lmn", "curvature"], "writers": [CSVWriter(path)]}
    with lmnfast.Probe(F, torch.randn(8, 4), ["0", "1"], **how) as probe:
        probe(0, loss=1.0, epoch=1, phase="7", best=True)
        probe(1, loss=math.nan, epoch=2, phase="8", best=False)
        probe(2, loss=0.1 + 0.2, epoch=2, phase="8", best=False)
    found, rows = lmnfast.history(path), probe.history
    assert [list(row) for row in found] == [list(row) for row in rows]
    for new, old in zip(found, rows, strict=True):
        assert [type(value) for value in new.values()] == [type(value) for value in old.values()]
        assert all(a == b or (a != a and b != b) for a, b in zip(new.values(), old.values(), strict=True))
    assert lmnfast.history(tmp_path) == lmnfast.history(str(path)) or math.isnan(found[2]["loss"])


def test_numbers_that_a_probe_has_not_measured_come_back_as_none(tmp_path):
    path = tmp_path / "lmn.csv"
    with lmnfast.Probe(
        F, torch.randn(8, 4), "0", every=1, observables="curvature", writers=[CSVWriter(path)]
    ) as probe:
        probe(0)
        probe(1, loss=0.5)  # a new column: empty in the row before
    first, second = lmnfast.history(path)
    assert first == probe.history[0] | {"loss": None} and second == probe.history[1]
    assert first["lmn"] is None and first["solver"] is None


def test_the_tables_of_a_run_and_of_checkpoints_come_back_as_our_readers_have_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(TINY, "run")
    assert lmnfast.history("run") == lmnfast.history("run/metrics.csv") == run.rows == read_run("run").rows
    assert all(
        type(row["step"]) is int and type(row["lmn_hidden_1"]) is float for row in lmnfast.history("run")
    )
    path, rows = measure("run", method=("path", "jacobian"))
    assert lmnfast.history(path) == [dict(row) for row in read_rows(path)] and len(rows) == 5
    for step in (0, 10):
        torch.save(F.state_dict(), f"step_{step}.pt")
    made = measure_checkpoints(
        lambda: copy.deepcopy(F), "step_*.pt", torch.randn(8, 4), layers="0", out="table"
    )
    found = lmnfast.history("table")
    assert [row["step"] for row in found] == [0, 10] and type(found[0]["step"]) is int
    assert [row["checkpoint"] for row in found] == [row["checkpoint"] for row in made]
    assert found[0]["lmn_0"] == pytest.approx(made[0]["lmn_0"], rel=1e-6)  # written with 7 digits


def test_the_studys_results_come_back():
    rows = lmnfast.history(ROOT / "docs/paper/results.csv.gz")
    assert len(rows) > 1000
    first = rows[0]
    assert (first["task"], first["seed"], first["step"], first["layer"], first["lmn"]) == (
        *("modular-addition", 0, 0, "hidden_1"),
        21.84484,
    )
    assert type(first["lmn"]) is float and type(first["samples"]) is int and first["phase"] == "memorising"


def test_an_unfinished_last_line_is_left_out_with_a_warning(tmp_path):
    path = tmp_path / "lmn.csv"
    path.write_text("step,layer,lmn\n0,0,6.5\n10,0,53")
    with pytest.warns(UserWarning, match=r"path: the last line of .*lmn\.csv has no end and is left out"):
        assert lmnfast.history(path) == [{"step": 0, "layer": "0", "lmn": 6.5}]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "its first line names no column step or samples"),
        (b"a,b\n1,2\n", "its first line names no column step or samples"),
        (b"step,step\n1,2\n", "or one twice"),
        (b"step,lmn\n1\n", "expected 2 entries in line 2, got 1"),
        (b"step,lmn\n1,many\n", "expected numbers in column lmn"),
        (b'step,lmn\n1,"2\n', "unexpected end of data"),
        (b"step,lmn\n1,\xff\n", "codec can't decode"),
        (gzip.compress(b"step,lmn\n1,2.5\n" * 99, mtime=0)[:-20], ""),
    ],
)
def test_a_file_that_is_no_table_of_ours_is_one_error_that_names_it(content, reason, tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        lmnfast.history(path)
    text = str(error.value)
    assert text.startswith(f"path: expected a table of lmnfast, got {path}: ") and reason in text


def test_a_directory_must_have_one_table(tmp_path):
    with pytest.raises(
        ValueError, match=r"path: expected a directory with one of metrics.csv, .* with none of them"
    ):
        lmnfast.history(tmp_path)
    for name in ("lmn.csv", "metrics.csv"):
        (tmp_path / name).write_text("step\n1\n")
    with pytest.raises(ValueError, match=r"with metrics\.csv and lmn\.csv"):
        lmnfast.history(tmp_path)
    with pytest.raises(FileNotFoundError):
        lmnfast.history(tmp_path / "absent.csv")


def test_threads_that_save_to_one_path_leave_a_whole_file(tmp_path):
    m, path = measured(), tmp_path / "m.npz"
    m.save(path)
    with ThreadPoolExecutor(4) as pool:
        saves = [pool.submit(m.save, path) for _ in range(40)]
        assert all(Measurement.load(path) == m for _ in range(40)) and not any(s.exception() for s in saves)
    assert [each.name for each in tmp_path.iterdir()] == ["m.npz"]


def test_what_is_no_file_is_not_replaced_and_a_link_is_followed(tmp_path):
    m = measured()
    (tmp_path / "link.npz").symlink_to(tmp_path / "m.npz")
    m.save(tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink() and Measurement.load(tmp_path / "m.npz") == m
    os.mkfifo(tmp_path / "pipe")
    for place, what in (("pipe", "device or a pipe"), ("", "directory")):
        with pytest.raises(OSError, match=f"expected a file to write, or none, got a {what}"):
            m.save(tmp_path / place)
    assert (tmp_path / "pipe").is_fifo()


def test_text_with_ends_of_lines_and_columns_named_like_ours_are_read_back(tmp_path):
    said = {"note": "a\rb\nc", "lmn_foo": "abc", "curvature_note": "x"}
    with lmnfast.Probe(
        F, torch.randn(9, 4), "0", every=1, writers=[CSVWriter(tmp_path / "lmn.csv")]
    ) as probe:
        probe(0, **said)
    (row,) = lmnfast.history(tmp_path / "lmn.csv")
    assert {name: row[name] for name in said} == said and row == probe.history[0]


def test_a_file_whose_values_were_edited_is_named(tmp_path):
    m = measured(observables="curvature")
    m.save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as members:
        whole = dict(members)
    for name, value, message in (
        ("connectivity", np.full((12, 12), "a"), "connectivity is an array of <U1"),
        ("connectivity", np.ones((12, 12), dtype=np.int64), "connectivity is of torch.int64"),
        (
            "lmnfast",
            np.array(str(whole["lmnfast"]).replace('"version": 1', '"version": 0')),
            "its format is 0",
        ),
    ):
        np.savez(tmp_path / "edited.npz", **{**whole, name: value})
        with pytest.raises(
            ValueError, match=rf"path: expected a file of Measurement.save, got .*: {message}"
        ):
            Measurement.load(tmp_path / "edited.npz")
