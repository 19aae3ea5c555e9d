"""Tiles in a folder: the same bits as in one process, whatever stops in between, and one clear error for what is wrong."""

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import CONTEXT
from support import COMPILED, mlp, samples
from tiled import FEW, made, network, unused
from torch import nn

import lmnfast
from lmnfast import _eigenvalues, _folder, _matrix_file, _memory, scale
from lmnfast._files import part_name
from lmnfast._matrix_file import mapped, read_about, write_matrix
from lmnfast._plane import Plane


def contents(path):
    """The entries and the facts of each tile, without the hash, which is the folder's own."""
    return {
        file.name: (mapped(file).tobytes(), {**read_about(file), "hash": ""})
        for file in path.glob("tile-*.npy")
    }


@COMPILED
@pytest.mark.parametrize("shards", [1, 2, 5, 20])
def test_any_number_of_shards_gives_the_measurement_of_one_process(shards, tmp_path):
    f, x = network(), samples(500, 6)
    files = [
        file
        for k in reversed(range(1, shards + 1))
        for file in lmnfast.tiles(f, x, tmp_path, shard=(k, shards), **FEW)
    ]
    assert len(set(files)) == len(files) == 12 and set(files) == set(tmp_path.glob("tile-*"))
    m = lmnfast.solve(tmp_path)
    assert m == lmnfast.measure(f, x, **FEW)
    assert np.array_equal(np.load(tmp_path / "connectivity.npy"), m.connectivity.numpy())
    assert lmnfast.solve(tmp_path, negative="clip") == lmnfast.measure(f, x, negative="clip", **FEW)


@COMPILED
def test_settings_and_kinds_of_samples(tmp_path):
    f, x = network(), samples(60, 6)
    how = {"points": 7, "rule": "uniform", "stabiliser": 1e-3}
    lmnfast.tiles(f, x, tmp_path / "a", **how)
    assert lmnfast.solve(tmp_path / "a") == lmnfast.measure(f, x, **how)
    lmnfast.tiles(f, x, tmp_path / "b", method="hermite-midpoint")
    assert lmnfast.solve(tmp_path / "b") == lmnfast.measure(f, x, method="hermite-midpoint")
    lmnfast.tiles(f, x, tmp_path / "h", method="hermite")
    assert lmnfast.solve(tmp_path / "h") == lmnfast.measure(f, x, method="hermite")
    lmnfast.tiles(f, x, tmp_path / "j", method="jacobian")  # the same to rounding
    m, whole = lmnfast.solve(tmp_path / "j"), lmnfast.measure(f, x, method="jacobian")
    torch.testing.assert_close(m.connectivity, whole.connectivity, rtol=0, atol=1e-6)
    assert m.lmn == pytest.approx(whole.lmn, rel=1e-5) and whole.lmn > 3
    lmnfast.tiles(f.double(), x.double(), tmp_path / "c")
    m = lmnfast.solve(tmp_path / "c")
    assert m.connectivity.dtype == torch.float64 and m == lmnfast.measure(f, x.double())
    with torch.no_grad():  # outputs that are constant between many samples
        f = nn.Sequential(*mlp(6, 10, 3, activation=nn.ReLU, gain=3.0), nn.ReLU())
    lmnfast.tiles(f, x, tmp_path / "d")
    m = lmnfast.solve(tmp_path / "d")
    assert m.constant_share > 0.01 and m == lmnfast.measure(f, x)


def test_samples_of_a_file_that_is_mapped_into_memory(folder, tmp_path):
    np.save(tmp_path / "x.npy", samples(60, 6).numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    before = made(folder)
    (folder / "tile-00003.npy").unlink()
    lmnfast.tiles(network(), x, folder, **FEW)  # the same samples, so the same folder
    assert made(folder) == before
    with pytest.raises(TypeError, match="x: expected floating-point samples"):
        lmnfast.tiles(network(), np.array([["a"]]), tmp_path / "no")
    with pytest.raises(TypeError, match="x: expected floating-point samples"):
        lmnfast.tiles(network(), np.zeros((9, 6), dtype=int), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_matrix_is_made_some_rows_at_a_time(folder, monkeypatch):
    L = lmnfast.solve(folder).connectivity.clone()
    (folder / "connectivity.npy").unlink()
    monkeypatch.setattr(_folder, "STRIP", 7 * 60 * 4)
    assert torch.equal(lmnfast.solve(folder).connectivity, L)
    assert torch.equal(L, L.T) and (L.diagonal() == 1).all()


def test_tiles_that_are_there_are_not_measured_again(folder, monkeypatch):
    before = made(folder)
    monkeypatch.setattr(scale, "measured_tile", lambda *_: pytest.fail("measured again"))
    shares = []
    lmnfast.tiles(network(), samples(60, 6), folder, progress=shares.append, **FEW)
    assert made(folder) == before and shares[-1] == 1.0 and len(shares) == 12


def test_missing_and_damaged_tiles_are_named_and_made_again(folder):
    before, m = made(folder), lmnfast.solve(folder)
    (folder / "tile-00002.npy").unlink()
    for place in (0, 200, -1):
        content = bytearray(before["tile-00004.npy"])
        content[place] ^= 1
        (folder / "tile-00004.npy").write_bytes(content)
        with pytest.raises(ValueError) as error:
            lmnfast.solve(folder)
        assert str(error.value).startswith(
            f"out: of 12 tiles in {folder} there are 1 missing: tile-00002.npy and 1 damaged: tile-00004.npy (it"
        )
        assert str(error.value).endswith(f"; to make them: lmnfast.tiles(f, x, {str(folder)!r}, ...)")
    (folder / "tile-00005.npy").write_bytes(before["tile-00005.npy"][:-30])
    (folder / "tile-00006.npy").write_bytes(before["tile-00007.npy"])
    (folder / "tile-00008.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 missing: .* and 4 damaged: .*\(it is cut off.*\(it is tile 7\)"):
        lmnfast.solve(folder)
    lmnfast.tiles(network(), samples(60, 6), folder, **FEW)
    assert made(folder) == before and lmnfast.solve(folder) == m


def test_a_matrix_that_is_damaged_or_of_other_tiles_is_made_again(folder, tmp_path):
    m = lmnfast.solve(folder)
    whole = (folder / "connectivity.npy").read_bytes()
    lmnfast.tiles(network(), samples(60, 6, seed=1), tmp_path / "others", **FEW)
    lmnfast.solve(tmp_path / "others")
    for other in (whole[:-40], b"", (tmp_path / "others/connectivity.npy").read_bytes()):
        (folder / "connectivity.npy").write_bytes(other)
        assert lmnfast.solve(folder) == m and (folder / "connectivity.npy").read_bytes() == whole


def test_a_tile_of_another_measurement_is_not_taken(folder, tmp_path):
    before = made(folder)
    lmnfast.tiles(network(), samples(60, 6, seed=1), tmp_path / "others", **FEW)
    (folder / "tile-00001.npy").write_bytes((tmp_path / "others/tile-00001.npy").read_bytes())
    with pytest.raises(
        ValueError, match="1 damaged: tile-00001.npy .it is of another network, other samples or settings"
    ):
        lmnfast.solve(folder)
    lmnfast.tiles(network(), samples(60, 6), folder, **FEW)
    assert made(folder) == before


def test_a_folder_of_another_measurement_is_refused(folder, tmp_path):
    f, x, before = network(), samples(60, 6), made(folder)
    changed = network()
    with torch.no_grad():
        changed[2].bias[0] += 1e-6
    begin = f"out: {folder} holds tiles of "
    for own, y, how, said in (
        (changed, x, FEW, "another network"),
        (f, x + 1e-6, FEW, "other samples"),
        (f, x, {"points": 5, "rule": "uniform"}, "other settings (rule lobatto there, uniform here)"),
        (f, x[:50], FEW, "other samples and other settings (samples 60 there, 50 here)"),
    ):
        with pytest.raises(ValueError) as error:
            lmnfast.tiles(own, y, folder, **how)
        assert str(error.value) == f"{begin}{said}; expected a folder for each measurement"
    # Of a function that is no module its outputs are all that is known.
    g = lambda z: torch.sin(f(z))  # noqa: E731
    lmnfast.tiles(g, x, tmp_path / "function", shard=(1, 12), **FEW)
    lmnfast.tiles(lambda z: g(z) * (1 + 1e-6), x, tmp_path / "function", shard=(1, 12), **FEW)
    with pytest.raises(ValueError, match="holds tiles of another network;"):
        lmnfast.tiles(lambda z: 2 * g(z), x, tmp_path / "function", **FEW)
    assert made(folder) == before


def killed(path, after):
    """Is killed while it writes a tile."""
    write, count = scale.Folder.write, []

    def writing(self, *arguments):
        count.append(1)
        if len(count) > after:
            _matrix_file.write_file = lambda path, content: (
                path.with_name(part_name(path.name, os.getpid())).write_bytes(b"half"),
                os.kill(os.getpid(), signal.SIGKILL),
            )
        return write(self, *arguments)

    scale.Folder.write = writing
    lmnfast.tiles(network(), samples(60, 6), path, **FEW)


def test_a_killed_process_loses_no_finished_tile(folder, tmp_path, monkeypatch):
    whole, path = contents(folder), tmp_path / "killed"
    process = CONTEXT.Process(target=killed, args=(path, 5))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(made(path)) == 5 and len(list(path.glob("*.part"))) == 1
    assert all(whole[name] == own for name, own in contents(path).items())
    measured, again = scale.measured_tile, []
    monkeypatch.setattr(scale, "measured_tile", lambda *a, **k: (again.append(a[3]), measured(*a, **k))[1])
    lmnfast.tiles(network(), samples(60, 6), path, **FEW)
    assert contents(path) == whole and len(again) == 7 and not list(path.glob("*.part"))


def shard_of(path, k):
    torch.set_num_threads(1)
    lmnfast.tiles(network(), samples(60, 6), path, shard=(k, 3), **FEW)


def test_shards_work_in_one_folder_at_once(folder, tmp_path):
    path = tmp_path / "together"
    processes = [CONTEXT.Process(target=shard_of, args=(path, k)) for k in (1, 2, 3, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert contents(path) == contents(folder) and lmnfast.solve(path) == lmnfast.solve(folder)


def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    path, opened = tmp_path / "full", Path.open
    lmnfast.tiles(network(), samples(60, 6), path, shard=(1, 2), **FEW)
    before = sorted(path.iterdir())

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 300

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def limited(self, mode="r", *more, **how):
        file = opened(self, mode, *more, **how)
        return Full(file) if self.suffix == ".part" else file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", limited)
        with pytest.raises(OSError) as error:
            lmnfast.tiles(network(), samples(60, 6), path, **FEW)
        assert str(error.value) == f"out: cannot write {path}/tile-00006.npy: No space left on device"
        assert sorted(path.iterdir()) == before
        with pytest.raises(OSError, match="out: cannot write .*connectivity.npy: No space left on device"):
            lmnfast.solve(folder)
        assert {file.name for file in folder.iterdir()} == {*made(folder), "tiles.json", ".lock"}
    lmnfast.tiles(network(), samples(60, 6), path, **FEW)
    assert contents(path) == contents(folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"out: cannot write to {tmp_path}/file/tiles: "):
        lmnfast.tiles(network(), samples(60, 6), tmp_path / "file" / "tiles")


@pytest.mark.parametrize(
    "shard, kind, said",
    [
        ((0, 3), ValueError, "shard: expected k of n with k from 1 to n, got 0 of 3"),
        ((4, 3), ValueError, "shard: expected k of n with k from 1 to n, got 4 of 3"),
        ((1, 0), ValueError, "shard: expected k of n with k from 1 to n, got 1 of 0"),
        ("1/3", TypeError, "shard: expected two integers (k, n), got '1/3'"),
        ((1.0, 3), TypeError, "shard: expected two integers (k, n), got (1.0, 3)"),
    ],
)
def test_a_shard_out_of_range_is_refused_before_any_work(shard, kind, said, tmp_path):
    with pytest.raises(kind) as error:
        lmnfast.tiles(lambda _: pytest.fail("f was called"), samples(60, 6), tmp_path / "no", shard=shard)
    assert str(error.value) == said and not (tmp_path / "no").exists()


def test_what_is_no_folder_of_tiles_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="out: expected a folder of lmnfast tiles, .* has no tiles.json"):
        lmnfast.solve(tmp_path)
    with pytest.raises(ValueError, match="x: expected two samples or more, got 1"):
        lmnfast.tiles(network(), samples(1, 6), tmp_path / "no")
    manifest = json.loads((folder / "tiles.json").read_text())
    for content in (
        "{",
        "[]",
        json.dumps(manifest | {"version": 9}),
        json.dumps(manifest | {"identity": {}}),
    ):
        (folder / "tiles.json").write_text(content)
        with pytest.raises(ValueError, match="out: cannot read .*tiles.json: "):
            lmnfast.solve(folder)
    for arguments, said in (
        ({"solver": "none"}, "solver: expected one of dense, estimate, got 'none'"),
        ({"negative": "none"}, "negative: expected one of absolute, clip, got 'none'"),
        ({"device": "none"}, "device: expected one of auto, cpu, cuda, got 'none'"),
    ):
        with pytest.raises(ValueError, match=said):
            lmnfast.solve(folder, **arguments)


def test_a_solve_says_what_it_needs_and_refuses_what_does_not_fit(folder, monkeypatch):
    said = []
    lmnfast.solve(folder, say=said.append, device="cpu")
    assert len(said) == 1 and said[0].startswith("solver dense, N = 60: 57.6 kB of memory, about ")
    (folder / "connectivity.npy").unlink()
    monkeypatch.setattr(_eigenvalues, "available", lambda _: 50_000)
    with pytest.raises(ValueError) as error:
        lmnfast.solve(folder, say=said.append, device="cpu")
    assert str(error.value) == (
        "solver: 'dense' needs 57.6 kB of memory for N = 60, and 50 kB are free on cpu; expected solver 'estimate', or a "
        "machine with more memory"
    )
    assert len(said) == 1 and not (folder / "connectivity.npy").exists()


def test_a_warning_for_an_offset_comes_with_the_number(tmp_path):
    lmnfast.tiles(lambda z: torch.sin(z @ torch.ones(6, 3)) * 1e-4 + 1e4, samples(60, 6), tmp_path, **FEW)
    with pytest.warns(UserWarning, match="constant to rounding"):
        m = lmnfast.solve(tmp_path)
    assert m.constant_share > 0.002


@pytest.mark.parametrize("method", ["path", "hermite-midpoint"])
def test_what_is_constant_to_rounding_is_the_same_in_tiles_and_at_once(method, tmp_path):
    """Between samples at which a softmax is saturated, its outputs vary about as much as float32 rounds."""
    torch.manual_seed(14)
    f = nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1))
    x = 100 * torch.randn(100, 3)
    files = lmnfast.tiles(f, x, tmp_path, method=method)
    at_once, of_tiles = lmnfast.measure(f, x, method=method), lmnfast.solve(tmp_path, device="cpu")
    assert at_once.constant_share > 0.01 and len(files) == 12
    torch.testing.assert_close(of_tiles.connectivity, at_once.connectivity, rtol=0, atol=1e-5)
    assert of_tiles.constant_share == pytest.approx(at_once.constant_share, rel=1e-3)


@pytest.mark.parametrize("wide", ["samples", "outputs"])
def test_outputs_of_another_dtype_than_the_samples(wide, tmp_path):
    dtypes = (torch.float64, torch.float32) if wide == "samples" else (torch.float32, torch.float64)
    x = samples(40, 6, dtype=dtypes[0])

    def f(z):
        return torch.tanh(3 * z.double()).to(dtypes[1])

    lmnfast.tiles(f, x, tmp_path, **FEW)
    at_once, of_tiles = lmnfast.connectivity(f, x, **FEW), lmnfast.solve(tmp_path, device="cpu").connectivity
    torch.testing.assert_close(of_tiles, at_once, rtol=0, atol=1e-6)  # the dtypes, too


def test_no_batch_of_one_sample_is_called(tmp_path):
    W = samples(6, 4)
    files = lmnfast.tiles(lambda z: torch.softmax(z @ W, 1).squeeze(), samples(513, 6), tmp_path, **FEW)
    assert len(files) == 12


def test_a_plan_counts_what_there_is_to_do(folder):
    plan = lmnfast.plan(network(), samples(60, 6), samples=20_000, ranks=4, **FEW)
    assert (plan.samples, plan.ranks, plan.tiles) == (20_000, 4, 992)
    plane = Plane(20_000)
    assert plan.pairs == pytest.approx(sum(map(plane.pairs, plane.each())), rel=1e-3)
    assert plan.tiles_seconds == pytest.approx(plan.pairs / 4 * plan.pair_seconds, rel=0.01)
    assert plan.dense_bytes == 16 * 20_000**2
    assert plan.gathered_bytes == pytest.approx(4 * 20_000**2 * (1 + 1 / 4 * 32 / 31), rel=0.01)
    assert plan.row_bytes == pytest.approx(20_000**2 * (1 + 32 / 31), rel=0.01)
    assert plan.estimate_bytes == 4 * 20_000 * (20_000 + 4 * 1024)
    assert plan.pair_seconds > 0 and plan.dense_seconds > 0 and plan.estimate_seconds > 0
    assert plan.to_dict()["dense_fits"] == plan.dense_fits
    lines = str(plan).splitlines()
    assert [line.split()[0] for line in lines] == ["N", "tiles", "memory", "solve", "estimate"]
    assert (
        "992 tiles" in lines[0] and "1.65 GB" in lines[1] and "6.4 GB" in lines[3] and "1.93 GB" in lines[4]
    )
    small = lmnfast.plan(network(), samples(60, 6), **FEW)
    files = sum(mapped(file).nbytes for file in folder.glob("tile-*.npy"))
    assert (small.samples, small.tiles) == (60, 12)
    assert small.disk_bytes == pytest.approx(files, rel=0.01)
    assert "does not fit" in str(lmnfast.plan(network(), samples(60, 6), samples=10**7))
    for many in (2**24 + 1, 10**12):
        with pytest.raises(ValueError, match=f"^samples: expected 16777216 or fewer, .* got {many}$"):
            lmnfast.plan(unused, samples(60, 6), samples=many)
    with pytest.raises(ValueError, match="^x: expected 16777216 samples or fewer, got 16777217$"):
        lmnfast.plan(unused, torch.zeros(1, 1).expand(2**24 + 1, 1))
    with pytest.raises(ValueError, match="^x: expected two samples or more, got 1$"):
        lmnfast.plan(unused, samples(1, 6), samples=100)
    assert lmnfast.plan(network(), samples(60, 6), samples=2**24).tiles == Plane(2**24).tiles
    for wrong, said in (({"samples": 1}, "samples: expected 2"), ({"ranks": 0}, "ranks: expected 1")):
        with pytest.raises(ValueError, match=f"{said} or more, got"):
            lmnfast.plan(network(), samples(60, 6), **wrong)


def test_the_files_of_matrices(tmp_path):
    path, matrix = tmp_path / "m.npy", np.arange(12, dtype=np.float64).reshape(3, 4)
    write_matrix(path, [matrix[:2], matrix[2:]], (3, 4), "float64", {"name": "one"})
    assert np.array_equal(np.load(path), matrix) and np.array_equal(mapped(path), matrix)
    assert read_about(path) == {"name": "one"}
    np.save(path, matrix)
    with pytest.raises(ValueError, match="another file"):
        read_about(path)


def test_memory_is_the_least_of_the_machine_and_its_containers(tmp_path, monkeypatch):
    now = _memory.available(torch.device("cpu"))
    assert now is None or now > 0
    names = [tmp_path / name for name in ("max", "current", "stat")]
    for file, text in zip(names, ("5000", "3000", "anon 1\ninactive_file 500\n")):
        file.write_text(text)
    monkeypatch.setattr(_memory, "CGROUPS", (names,))
    monkeypatch.setattr(_memory, "_of_machine", lambda: 10_000)
    assert _memory.available(torch.device("cpu")) == 2500
    names[0].write_text("max")
    assert _memory.available(torch.device("cpu")) == 10_000


@pytest.mark.parametrize(
    "number, said",
    [(17, "17 bytes"), (1.6e9, "1.6 GB"), (4e13, "40 TB")],
)
def test_bytes_are_said_as_people_say_them(number, said):
    assert _memory.said_bytes(number) == said


@pytest.mark.parametrize(
    "number, said", [(0.2, "0.2 s"), (600, "10 minutes"), (7200, "2 hours"), (8.64e5, "10 days")]
)
def test_times_are_said_as_people_say_them(number, said):
    assert _memory.said_seconds(number) == said


def functions():
    """Pairs that measure other things, with the difference that a folder cannot see in the parameters."""
    W, V = samples(6, 5), samples(6, 5) * 2
    relu, sine = (lambda x: (x @ W).relu()), (lambda x: torch.sin(3 * (x @ V)))
    large = [lambda x, f=f: torch.cat([1e5 * x[:, :1] + 1e6, f(x)], 1) for f in (relu, sine)]
    leaky = [nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(slope)).bfloat16() for slope in (0.1, 0.2)]
    leaky[1].load_state_dict(leaky[0].state_dict())
    return {"functions": (relu, sine), "one large output": large, "arguments in bfloat16": leaky}


@pytest.mark.parametrize("case", functions())
def test_shards_of_other_functions_are_refused_and_never_taken_after_the_manifest_is_gone(case, tmp_path):
    one, other = functions()[case]
    x = samples(60, 6).to(torch.bfloat16 if "bfloat16" in case else torch.float32)
    lmnfast.tiles(one, x, tmp_path, **FEW)
    lmnfast.solve(tmp_path)
    with pytest.raises(ValueError, match="holds tiles of another network"):
        lmnfast.tiles(other, x, tmp_path, **FEW)
    (tmp_path / "tiles.json").unlink()
    lmnfast.tiles(other, x, tmp_path, **FEW)
    assert lmnfast.solve(tmp_path).lmn == pytest.approx(lmnfast.measure(other, x, **FEW).lmn, rel=1e-6)


def test_autocast_is_a_setting(tmp_path):
    f, x = network(), samples(60, 6)
    lmnfast.tiles(f, x, tmp_path, shard=(1, 2), **FEW)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="autocast None there, torch.bfloat16 here"),
    ):
        lmnfast.tiles(f, x, tmp_path, shard=(2, 2), **FEW)


@pytest.mark.parametrize("n", [2, 3])
def test_a_plan_of_few_samples(n):
    plan = lmnfast.plan(network(), samples(n, 6), samples=n)
    assert plan.samples == n and plan.pairs >= 0 and plan.pair_seconds > 0
