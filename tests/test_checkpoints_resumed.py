"""A table of checkpoints that is gone on with: after a kill, with more checkpoints, damaged, with other settings."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpointed import LAYERS, command, failure, table

from lmnfast import cli
from lmnfast._measured import measured
from lmnfast.checkpoints import measure as measuring
from lmnfast.checkpoints import measure_checkpoints
from lmnfast.runs import pool


def test_a_killed_command_goes_on_where_it_was(trained):
    """Killed with -9 in its second checkpoint."""
    whole = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS)
    script = Path("run.py")
    script.write_text("import sys\nfrom lmnfast.cli import main\nif __name__ == '__main__': sys.exit(main())")
    arguments = [sys.executable, "run.py", *command(model="nets:slow")]
    killed = subprocess.Popen(
        arguments, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        until(lambda: Path("lmn/lmn.csv").exists())
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    (first,) = table()
    assert first["step"] == "2" and float(first["lmn_1"]) == whole[0]["lmn_1"]
    os.utime("step_10.pt")  # changed before it was measured, so of no effect
    Path("loaded").unlink()
    import nets

    nets.time.sleep, loads = lambda seconds: None, []
    plain = nets.Slow.load_state_dict
    nets.Slow.load_state_dict = lambda self, *args, **kwargs: loads.append(1) or plain(self, *args, **kwargs)
    assert cli.main(command(model="nets:slow")) == 0
    assert len(loads) == 2
    assert measure_checkpoints("nets:slow", "step_*.pt", "x.npy", LAYERS, out="lmn") == whole


def until(holds):
    deadline = time.monotonic() + 300  # a busy machine takes long to start a process
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_more_checkpoints_are_added_and_changed_ones_measured_anew(trained):
    assert cli.main(command()) == 0
    before = table()
    os.remove("step_2.pt")
    torch.save(trained[2], "step_10.pt")
    torch.save({"state_dict": trained[100]}, "step_1000.pt")
    assert cli.main(command()) == 0
    after = table()
    assert [row["step"] for row in after] == ["2", "10", "100", "1000"]
    assert after[0] == before[0] and after[2] == before[2]
    assert after[1]["lmn_1"] == before[0]["lmn_1"] and after[3]["lmn_1"] == before[2]["lmn_1"]
    torch.save(trained[10], "later_20.pt")
    assert cli.main(command("--checkpoint", "later_*.pt", os.path.abspath("step_*.pt"))) == 0
    assert [row["step"] for row in table()] == ["2", "10", "20", "100", "1000"]


def test_finished_is_finished(trained, capsys, monkeypatch):
    assert cli.main(command()) == 0
    monkeypatch.setattr(measuring, "_measured", None)
    said = capsys.readouterr().out
    content = Path("lmn/lmn.csv").read_bytes()
    assert cli.main(command()) == 0
    assert capsys.readouterr().out == "lmn: 3 checkpoints measured before, 0 to go\n" + said
    assert Path("lmn/lmn.csv").read_bytes() == content


def test_a_table_of_another_version_is_an_error_until_forced(trained, capsys):
    assert cli.main(command()) == 0
    settings = json.loads(Path("lmn/lmn.json").read_text())
    del settings["negative"]
    Path("lmn/lmn.json").write_text(json.dumps(settings))
    assert "negative is None there, absolute here; choose another --out" in failure(capsys, command())


def test_points_that_make_every_network_linear_are_refused(trained, capsys):
    assert failure(capsys, command("--points=2")).startswith("points: expected at least 3")
    assert not Path("lmn").exists()


def test_an_offset_that_hides_outputs_is_warned_of_with_the_layer(trained, monkeypatch):
    def hidden(*arguments, **settings):
        (enqueued,) = measured(*arguments, **settings)
        counted = enqueued.measured._replace(counts=torch.tensor([99, 0]))  # of 66 pairs, 3 outputs
        return [replace(enqueued, measured=counted, offset=torch.tensor(1e4))]

    monkeypatch.setattr(measuring, "measured", hidden)
    with pytest.warns(
        UserWarning, match="checkpoint: step_2.pt, layer '[13]': 50.0% of the outputs' paths"
    ) as said:
        rows = measure_checkpoints("nets:make", "step_2.pt", "x.npy", LAYERS)
    assert len(said) == 2 and rows[0]["constant_share_1"] == rows[0]["constant_share_3"] == 0.5


def test_other_settings_are_an_error_until_forced(trained, capsys):
    assert cli.main(command()) == 0
    for change, said in (
        ("--points=11", "points is 21 there, 11 here"),
        ("--rule=lobatto", "rule is uniform there, lobatto here"),
        ("--method=hermite", "method is path there, hermite here"),
        ("--negative=clip", "negative is absolute there, clip here"),
        ("--layer=0", "layers is 1, 3 there, 1, 3, 0 here"),
        ("--samples=5", "inputs is sha256 "),
        ("--model=nets:slow", "model is nets:make there, nets:slow here"),
        ("--forward=nets:twice", "forward is None there, nets:twice here"),
    ):
        line = failure(capsys, command(change))
        assert line.startswith("out: lmn holds a table with other settings: ") and said in line
        assert line.endswith("; choose another --out, or --force to begin anew")
    line = failure(capsys, command(checkpoint="step_1*.pt"))
    assert "checkpoints is step_*.pt there, step_1*.pt here" in line
    assert len(table()) == 3
    assert cli.main(command("--force", checkpoint="step_1*.pt")) == 0
    assert [row["step"] for row in table()] == ["10", "100"]


def test_a_table_of_unknown_origin_is_kept(trained, capsys):
    Path("lmn").mkdir()
    Path("lmn/lmn.csv").write_text("mine")
    assert failure(capsys, command()) == "out: lmn holds lmn.csv but no lmn.json; --force deletes it"
    assert Path("lmn/lmn.csv").read_text() == "mine"
    Path("lmn/lmn.json").write_text("{")
    assert failure(capsys, command()).startswith("out: cannot read lmn/lmn.json: ")
    Path("file").touch()
    assert failure(capsys, command("--out=file/lmn")).startswith("out: cannot write to file/lmn")


def test_what_fails_names_its_checkpoint_and_those_before_are_kept(trained, capsys):
    Path("step_50.pt").write_bytes(Path("step_2.pt").read_bytes()[:200])
    assert failure(capsys, command()).startswith("checkpoint: cannot read step_50.pt: ")
    assert [row["step"] for row in table()] == ["2", "10"]
    torch.save(trained[2], "step_50.pt")
    assert cli.main(command()) == 0
    assert [row["step"] for row in table()] == ["2", "10", "50", "100"]


DAMAGES = {
    "lmn.json": [
        b"{",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"device": 3, "files": {}, "checkpoints": []}',
        b'{"device": "cpu", "files": [], "checkpoints": []}',
        b'{"device": "cpu", "files": {}, "checkpoints": [{}]}',
        b"\xff\xfe{",
    ],
    "lmn.csv": [
        b"\xff\xfe",
        b"",
        b"mine\n",
        lambda rows: rows[:-3],
        lambda rows: rows[:-1],
        lambda rows: rows.rpartition(b",")[0] + b"\n",
        lambda rows: rows.replace(b"lmn_3", b"lmn_2"),
        lambda rows: rows.replace(b",21,", b",many,"),
        lambda rows: rows.replace(b",21,", b",11,"),
        lambda rows: rows.replace(b"step_2.pt,", b"step_2.pt,nan"),
        lambda rows: rows.replace(b"step_2.pt", b"step_10.pt"),
        lambda rows: rows.replace(b"step_2.pt", b'"step_2".pt'),
    ],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_table_is_one_line_that_names_the_file(name, trained, capsys):
    whole = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn")
    path = Path("lmn") / name
    before = path.read_bytes()
    for damage in DAMAGES[name]:
        content = damage(before) if callable(damage) else damage
        path.write_bytes(content)
        line = failure(capsys, command())
        assert line.startswith(f"out: cannot read lmn/{name}: ") and line.endswith("; --force begins anew")
        assert path.read_bytes() == content
    assert measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn", force=True) == whole


def test_a_table_that_an_editor_marked_as_utf_8_is_read(trained, monkeypatch):
    whole = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn")
    for path in (Path("lmn/lmn.csv"), Path("lmn/lmn.json")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    monkeypatch.setattr(measuring, "_measured", None)
    assert measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn") == whole


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_measured_anew(trained):
    _, second, third = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn")
    status = os.stat("step_2.pt")
    torch.save(trained[10], "step_2.pt")
    os.utime("step_2.pt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (os.stat("step_2.pt").st_size, os.stat("step_2.pt").st_mtime_ns) == (
        status.st_size,
        status.st_mtime_ns,
    )
    again = measure_checkpoints("nets:make", "step_*.pt", "x.npy", LAYERS, out="lmn")
    assert again == [second | {"step": 2, "checkpoint": "step_2.pt"}, second, third]


def test_a_process_that_dies_is_said(trained, capsys, monkeypatch):
    monkeypatch.setattr(pool, "DEATHS", 0)
    line = failure(capsys, command("--jobs=2", model="nets:dies"))
    assert line.startswith("jobs: a process died")


def test_ctrl_c_says_how_to_go_on(trained, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "_measured", interrupted)
    assert cli.main(command()) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
