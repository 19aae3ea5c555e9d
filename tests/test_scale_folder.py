"""A folder that is damaged, read-only or none, and arguments that cannot be: one clear error, or work as far as it goes."""

import json
import os
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from support import COMPILED, samples
from tiled import FEW, made, network, unused

import lmnfast
from lmnfast import _files, _folder, scale
from lmnfast._choices import SOLVERS
from lmnfast._matrix_file import mapped, read_about, write_matrix

MISSING = object()
WRONG = {
    "version": ["1", 1.0, True, 0, None],
    "dtype": ["int32", "object", "float16", ["float32"], 32],
    "command": [5, None, ["lmnfast"]],
    "mark": [5, "", None, "z" * 32],
    "identity": [None, [], "x"],
    "identity.network": [0, None, "x", "F" * 64],
    "identity.samples": ["", 60, None],
    "identity.outputs": [[], [1.0], [[]], [["x"]], [[1.0], [1.0, 2.0]], [[True]], {}, "x", [[10**400]]],
    "identity.tolerance": ["x", -1.0, 2.0, float("nan"), None, True],
    "identity.rounding": ["x", -1.0, float("inf"), None],
    "identity.settings": [None, [], "x"],
    "identity.settings.samples": ["60", 0, 1, -60, 1e99, 10**30, 60.0, None, True],
    "identity.settings.method": ["x", 5, None],
    "identity.settings.points": ["x", 2, -5, 5.0, None, True, 22],
    "identity.settings.rule": ["x", 5, None, []],
    "identity.settings.stabiliser": ["x", -1.0, None, float("nan"), True],
    "identity.settings.pooled": [1, None, "x", True],
    "identity.settings.float32_matmul_precision": [5, None],
    "identity.settings.outputs": [5, None],
    "identity.settings.autocast": [5, False],
    "identity.settings.lmnfast": [1.0, None],
}


def changed(manifest, name, value):
    """A copy with another value at a name; MISSING: without it."""
    first, _, rest = name.partition(".")
    if rest:
        return {**manifest, first: changed(manifest[first], rest, value)}
    kept = {key: old for key, old in manifest.items() if key != first}
    return kept if value is MISSING else {**kept, first: value}


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_with_a_wrong_value_is_one_error(name, folder):
    file, x = folder / "tiles.json", samples(60, 6)
    manifest = json.loads(file.read_text())
    for value in (MISSING, *WRONG[name]):
        file.write_text(json.dumps(changed(manifest, name, value)))
        for call in (lambda: lmnfast.solve(folder), lambda: lmnfast.tiles(network(), x, folder, **FEW)):
            with pytest.raises(ValueError) as error:
                call()
            said = str(error.value)
            assert said.startswith(f"out: cannot read {file}: ") and "\n" not in said and len(said) < 300, (
                said
            )
            if value is MISSING:
                assert said.endswith(f": {name} is missing")
    file.write_text(json.dumps(manifest))
    assert lmnfast.solve(folder).samples == 60


def test_every_value_of_a_manifest_is_checked(folder):
    def leaves(value, name=""):
        if not isinstance(value, dict):
            return {name}
        return {leaf for key, own in value.items() for leaf in leaves(own, f"{name}.{key}" if name else key)}

    manifest = json.loads((folder / "tiles.json").read_text())
    assert leaves(manifest) | {"identity", "identity.settings"} == _folder.VALUES.keys() == WRONG.keys()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "null", "5", '"x"', "[]", "\xff", "", '{"version": ' + "9" * 5000]
)
def test_a_manifest_that_is_no_manifest_is_one_error(content, folder):
    (folder / "tiles.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="^out: cannot read .*tiles.json: "):
        lmnfast.solve(folder)


def test_a_manifest_of_another_dtype_than_the_samples_is_damaged(folder):
    manifest = json.loads((folder / "tiles.json").read_text())
    (folder / "tiles.json").write_text(json.dumps(manifest | {"dtype": "float64"}))
    with pytest.raises(ValueError, match="cannot read .*tiles.json: dtype: expected float32, got float64"):
        lmnfast.tiles(network(), samples(60, 6), folder, **FEW)
    with pytest.raises(ValueError, match="12 damaged: tile-00000.npy .it holds float32 of shape"):
        lmnfast.solve(folder)


def rewritten(file, about=None, matrix=None, dtype="float32"):
    """Writes a file again with a right checksum, but with other facts or another matrix."""
    matrix = mapped(file).copy() if matrix is None else matrix
    write_matrix(file, [matrix], matrix.shape, dtype, read_about(file) if about is None else about)


def test_tiles_with_wrong_facts_or_another_matrix_are_damaged_and_made_again(folder):
    before, m, file = made(folder), lmnfast.solve(folder), folder / "tile-00004.npy"
    about, matrix = read_about(file), mapped(file).copy()
    facts = {
        "outputs": (MISSING, "3", 3.0, -1, 0, None, True, 10**30),
        "precision": (MISSING, 5, None),
        "kind": (MISSING, 5, None),
        "constants": (MISSING, "0", 0.0, -1, None, 10**30),
        "within": (MISSING, [], -1, None),
        "offset": (MISSING, "0", -1.0, None, float("nan"), True),
    }
    wrong = [
        ({"about": changed(about, name, value)}, f"its {name} is ") for name in facts for value in facts[name]
    ]
    wrong += [
        ({"matrix": matrix[:-1]}, "it holds float32 of shape (19, 20), not float32 of (20, 20)"),
        ({"matrix": matrix.reshape(10, 40)}, "it holds float32 of shape (10, 40)"),
        ({"dtype": "float64"}, "it holds float64 of shape"),
        ({"dtype": ">f4"}, "it holds >f4 of shape"),
        ({"dtype": "int32"}, "it holds int32 of shape"),
    ]
    assert matrix.shape == (20, 20) and len(wrong) > 25
    for arguments, said in wrong:
        rewritten(file, **arguments)
        with pytest.raises(ValueError) as error:
            lmnfast.solve(folder)
        assert f"there are 1 damaged: tile-00004.npy ({said}" in str(error.value), arguments
        file.write_bytes(before[file.name])
    for arguments in (wrong[0][0], wrong[-1][0]):
        rewritten(file, **arguments)
        lmnfast.tiles(network(), samples(60, 6), folder, **FEW)
        assert made(folder) == before and lmnfast.solve(folder) == m


def test_a_matrix_of_another_shape_or_dtype_is_made_again(folder):
    m, file = lmnfast.solve(folder), folder / "connectivity.npy"
    whole = file.read_bytes()
    for arguments in ({"matrix": np.eye(59, dtype=np.float32)}, {"dtype": "float64"}, {"about": {}}):
        rewritten(file, **arguments)
        assert lmnfast.solve(folder) == m and file.read_bytes() == whole


def read_only(monkeypatch, folder):
    """Refuses every writing in a folder, as a file system does that is mounted for reading alone."""
    opened = Path.open

    def refused(self, mode="r", *more, **how):
        if folder in self.parents and set(mode) & set("wax+"):
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *more, **how)

    def no_lock(*_, **__):
        raise PermissionError(13, "Permission denied", str(folder / ".lock"))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(_folder, "FileLock", no_lock)
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == folder and mode & os.W_OK))


@COMPILED
def test_a_read_only_folder_that_is_whole_is_enough(folder, monkeypatch):
    m, x = lmnfast.solve(folder), samples(60, 6)
    monkeypatch.setattr(scale, "measured_tile", lambda *_: pytest.fail("measured again"))
    read_only(monkeypatch, folder)
    assert len(lmnfast.tiles(network(), x, folder, **FEW)) == 12
    assert lmnfast.solve(folder) == m == lmnfast.measure(network(), x, **FEW)


def test_a_read_only_folder_that_lacks_something_is_one_error(folder, monkeypatch):
    (folder / "tile-00007.npy").unlink()
    monkeypatch.setattr(scale, "measured_tile", lambda *_: pytest.fail("measured in vain"))
    with monkeypatch.context() as patched:
        read_only(patched, folder)
        assert len(lmnfast.tiles(network(), samples(60, 6), folder, shard=(1, 2), **FEW)) == 6
        with pytest.raises(OSError, match=f"^out: cannot write to {folder}, and tiles are missing there$"):
            lmnfast.tiles(network(), samples(60, 6), folder, **FEW)
    monkeypatch.undo()
    lmnfast.tiles(network(), samples(60, 6), folder, **FEW)
    read_only(monkeypatch, folder)
    with pytest.raises(OSError, match=f"^out: cannot write {folder}/connectivity.npy: Permission denied$"):
        lmnfast.solve(folder)


def test_no_lock_is_held_where_the_manifest_is_there(folder, tmp_path):
    with filelock.FileLock(folder / ".lock"):  # a second lock would wait for ever
        lmnfast.tiles(network(), samples(60, 6), folder, **FEW)


def test_machines_that_make_the_same_tiles_at_once(folder, tmp_path, monkeypatch):
    path, write, x = tmp_path / "both", _files.write_file, samples(60, 6)

    def as_another():
        with monkeypatch.context() as patched:
            patched.setattr(_files, "machine", lambda: "0123abcd")
            patched.setattr(_files, "_alive", lambda _: False)
            lmnfast.tiles(network(), x, path, **FEW)

    def both(target, content):
        def between(file):
            content(file)
            file.flush()
            monkeypatch.undo()
            as_another()

        write(target, between)

    monkeypatch.setattr("lmnfast._matrix_file.write_file", both)
    lmnfast.tiles(network(), x, path, **FEW)
    assert made(path).keys() == made(folder).keys() and not list(path.glob("*.part"))
    assert lmnfast.solve(path) == lmnfast.solve(folder)


def views(x):
    """Arrays that torch cannot hold as they are."""
    record = np.zeros(len(x), dtype=[("flag", "i1"), ("values", x.dtype, x.shape[1:])])
    record["values"] = x
    return {"backwards": x[::-1], "byte order": x.astype(">f4"), "fields": record["values"]}


@pytest.mark.parametrize("kind", views(np.zeros((2, 2), np.float32)))
def test_arrays_in_memory_that_torch_cannot_hold_are_copied(kind, tmp_path):
    x = samples(60, 6).numpy()
    view = views(x)[kind]
    with pytest.raises((TypeError, ValueError)):
        torch.from_numpy(view)
    lmnfast.tiles(network(), view, tmp_path / "a", **FEW)
    lmnfast.tiles(network(), torch.tensor(np.array(view, dtype=np.float32)), tmp_path / "a", **FEW)
    assert np.array_equal(views(x)[kind], view)  # what the user has is as before


def test_a_file_that_torch_cannot_hold_is_not_read_into_memory(tmp_path):
    x = samples(60, 6).numpy()
    for name, array in {"native": x, "swapped": x.astype(">f4")}.items():
        np.save(tmp_path / f"{name}.npy", array)
    native, swapped = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("native", "swapped"))
    for view, order in ((native[::-1], "<f4"), (np.asarray(native)[::-1][3:], "<f4"), (swapped, ">f4")):
        with pytest.raises(ValueError) as error:
            lmnfast.tiles(unused, view, tmp_path / "no", **FEW)
        said = str(error.value)
        assert said.startswith("x: is a view of a file that torch cannot hold as it is, with steps of ")
        assert f" and dtype {order!r}; numpy.ascontiguousarray(x, dtype='float32') reads it" in said
    lmnfast.tiles(network(), native[10:40:2], tmp_path / "a", shard=(1, 12), **FEW)


@pytest.mark.parametrize(
    "array, kind",
    [
        (np.zeros((9, 6), dtype=object), "one of object"),
        (np.array([["a"]]), "one of <U1"),
        (np.zeros((9, 6), dtype=int), "one of int64"),
        (np.zeros((9, 6), dtype=">i4"), "one of >i4"),
        (np.zeros((9, 6), dtype=bool), "one of bool"),
        (np.zeros((9, 6), dtype=complex), "one of complex128"),
        (np.zeros((9, 6), dtype="M8[s]"), r"one of datetime64\[s\]"),
        (np.ma.masked_array(np.zeros((9, 6)), mask=np.eye(9, 6)), "one with a mask"),
        *(
            [(np.zeros((9, 6), np.longdouble), "one of float")]
            if np.dtype(np.longdouble).itemsize > 8
            else []
        ),
    ],
)
def test_arrays_of_other_numbers_are_refused(array, kind, tmp_path):
    expected = f"^x: expected floating-point samples, a numpy array of at most 64 bits, got {kind}"
    with pytest.raises(TypeError, match=expected):
        lmnfast.tiles(unused, array, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("out", ["", 5, None, b"tiles", "a\0b", ["tiles"]])
def test_what_is_no_path_is_refused_before_any_work(out):
    for call in (lambda: lmnfast.tiles(unused, samples(60, 6), out), lambda: lmnfast.solve(out)):
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert str(error.value).startswith("out: expected ") and str(error.value).endswith(f"got {out!r}")


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(tmp_path / "nothing")
    for call in (lambda out: lmnfast.tiles(unused, samples(60, 6), out), lmnfast.solve):
        for out, said in ((file, f"{file} is a file"), (link, f"{link} is no folder")):
            with pytest.raises(ValueError, match=f"^out: expected a folder, {said}$"):
                call(out)
    assert file.read_text() == "mine"
    with pytest.raises(
        ValueError, match=f"^out: expected a folder of lmnfast tiles, there is no {tmp_path}/none$"
    ):
        lmnfast.solve(tmp_path / "none")


def test_other_arguments_are_refused_before_any_work(folder, tmp_path):
    for progress in (5, "yes", None):
        with pytest.raises(
            TypeError, match="^progress: expected a bool or a function of the share done, got "
        ):
            lmnfast.tiles(unused, samples(60, 6), tmp_path / "no", progress=progress)
    assert not (tmp_path / "no").exists()
    for say in (5, "x", True):
        for solver in SOLVERS:
            with pytest.raises(TypeError, match="^say: expected a function of a line of text or None, got "):
                lmnfast.solve(tmp_path / "no", solver=solver, say=say)


def test_more_samples_than_a_folder_can_be_of_are_refused(tmp_path):
    x = torch.zeros(1, 1).expand(2**24 + 1, 1)
    with pytest.raises(ValueError, match="^x: expected 16777216 samples or fewer, got 16777217$"):
        lmnfast.tiles(unused, x, tmp_path / "no")


def test_a_shard_of_another_run_is_refused_and_harms_no_tile(tmp_path):
    f, x = network(), samples(60, 6)
    lmnfast.tiles(f, x, tmp_path, shard=(1, 2), **FEW)
    before = made(tmp_path)
    with pytest.raises(ValueError, match="holds tiles of other samples; expected a folder for each"):
        lmnfast.tiles(f, x + 1, tmp_path, shard=(2, 2), **FEW)
    with pytest.raises(ValueError, match="of 12 tiles in .* there are 6 missing: tile-00006.npy"):
        lmnfast.solve(tmp_path)
    assert made(tmp_path) == before
