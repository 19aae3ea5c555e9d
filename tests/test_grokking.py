import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

import lmnfast
from lmnfast.grokking import figures
from lmnfast.grokking import measure as measuring
from lmnfast.grokking import train as training
from lmnfast.grokking.config import Config, start
from lmnfast.grokking.figures import draw, draw_methods, paper_curves
from lmnfast.grokking.gradients import Gradients
from lmnfast.grokking.measure import measure
from lmnfast.grokking.model import ACTIVATION_MODULES, LAYERS, make_model
from lmnfast.grokking.run import METRICS, Run, load_checkpoint, read_run, write_rows
from lmnfast.grokking.tasks import answers, make_task
from lmnfast.grokking.train import train
from lmnfast.runs import files as run_files
from lmnfast.runs import tables
from lmnfast.runs.files import claimed, read_tensors, save_tensors, write_file

GONE = 2**22 + 1  # no process has this number: Linux counts to 2 ** 22
TINY = Config("modular-addition", p=5, steps=20, every=5, threads=1, device="cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def files(path):
    return {file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run never stopped. Tests only read it."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return train(TINY, path)


# Tasks


def test_s4_is_a_group_and_not_commutative():
    table = answers("s4")
    elements = torch.arange(24)
    assert torch.equal(table[0], elements) and torch.equal(table[:, 0], elements)  # the identity
    assert torch.equal(table.sort(0).values, elements[:, None].expand(24, 24))  # every a has its inverse
    assert torch.equal(table.sort(1).values, elements.expand(24, 24))
    assert torch.equal(table[table], table[:, table])  # (a b) c = a (b c)
    assert not torch.equal(table, table.T)


def test_modular_addition_and_xor_are_what_they_say():
    for a in range(7):
        for b in range(7):
            assert answers("modular-addition", p=7)[a, b] == (a + b) % 7
    for a in range(8):
        for b in range(8):
            assert answers("xor", bits=3)[a, b] == a ^ b


@pytest.mark.parametrize(
    "name, train_pairs, pairs", [("modular-addition", 768, 961), ("s4", 460, 576), ("xor", 819, 1024)]
)
def test_a_split_has_the_papers_sizes_and_every_pair_once(name, train_pairs, pairs):
    task = make_task(name, seeded())
    assert len(task.train_inputs) == len(task.train_labels) == train_pairs
    inputs = torch.cat([task.train_inputs, task.test_inputs])
    assert inputs.shape == (pairs, 2) == inputs.unique(dim=0).shape
    assert torch.equal(answers(name)[inputs.unbind(1)], torch.cat([task.train_labels, task.test_labels]))


def test_a_split_depends_on_its_generator_only():
    first, again, other = (make_task("s4", seeded(seed)).train_inputs for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Model


def test_default_and_lecun_first_differ_in_the_first_linear_layers_scale():
    default, lecun = (make_model(31, seeded(), init=init) for init in ("default", "lecun-first"))
    assert default.hidden_1_pre.weight.std().item() == pytest.approx(1 / (8 * 3**0.5), rel=0.02)
    assert lecun.hidden_1_pre.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    for name, weight in default.state_dict().items():
        assert torch.equal(weight, lecun.state_dict()[name]) == (name != "hidden_1_pre.weight")


def test_a_model_draws_from_its_generator_and_leaves_the_global_one_alone():
    before, generator = torch.get_rng_state(), seeded()
    first, second = make_model(5, generator), make_model(5, generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.output.weight, second.output.weight)
    assert torch.equal(first.output.weight, make_model(5, seeded()).output.weight)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_model_can_be_cut_at_every_named_layer(layer):
    model, tokens = make_model(5, seeded()), make_task("modular-addition", seeded(), p=5).train_inputs
    tail, samples = lmnfast.cut(model, layer, tokens)
    assert samples.shape == (20, 64 if layer == "embedding" else 100)
    torch.testing.assert_close(tail(samples), model(tokens))


@pytest.mark.parametrize("activation", ACTIVATION_MODULES)
@pytest.mark.parametrize("name, sizes", [("modular-addition", {"p": 7}), ("s4", {}), ("xor", {"bits": 1})])
def test_the_gradients_are_autograds(name, sizes, activation):
    generator = seeded()
    task = make_task(name, generator, **sizes)
    model = make_model(task.vocabulary, generator, activation=activation).double()
    gradients = Gradients(model, task.train_inputs, task.train_labels)
    for _ in range(2):  # the second call finds the buffers as the first left them
        gradients()
        ours = [parameter.grad.clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), ours):
                parameter -= 0.1 * gradient
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), ours):
            parameter += 0.1 * gradient
    loss = cross_entropy(model(task.train_inputs), task.train_labels)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, autograds in zip(ours, expected, strict=True):
        assert autograds.abs().max() > 0
        torch.testing.assert_close(gradient, autograds, rtol=1e-10, atol=1e-12)


# Config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "addition"}, "task: expected one of modular-addition, s4, xor, got 'addition'"),
        ({"task": "s4"}, "p: the task s4 has no such size"),
        ({"p": 1}, "p: expected at least 2, got 1"),
        ({"steps": -5}, "steps: expected at least 0"),
        ({"every": 0}, "every: expected at least 1"),
        ({"steps": 21}, "steps: expected a multiple of every"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"threads": 0}, "threads: expected at least 1"),
        (
            {"layers": ("hidden_3",)},
            "layers: expected some of embedding, hidden_1_pre, hidden_1, .*got hidden_3",
        ),
        ({"layers": ("hidden_1", "hidden_1")}, "layers: .*each once"),
        ({"points": 2}, "points"),
        ({"negative": "drop"}, "negative"),
        ({"rule": "simpson"}, "rule: expected one of uniform, lobatto, got 'simpson'"),
        ({"method": "guess"}, "method: expected one of path.*, got 'guess'"),
        ({"init": "zero"}, "init: expected one of default, lecun-first, got 'zero'"),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda, got 'tpu'"),
        ({"seed": 1.5}, "seed: expected an integer, got 1.5"),
        ({"p": 1e6}, "p: expected an integer, got 1000000.0"),
        ({"p": 10**6}, "p: expected at most 2048, got 1000000"),
        ({"weight_decay": "0.2"}, "weight_decay: expected a number, got '0.2'"),
        ({"samples": 1}, "samples: expected 2 to 20, all that are trained on, got 1"),
        ({"samples": 21}, "samples: expected 2 to 20, all that are trained on, got 21"),
    ],
)
def test_a_config_that_no_run_can_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


# Training


def test_rows_are_the_network_after_that_many_updates(finished):
    assert [row["step"] for row in finished.rows] == [0, 5, 10, 15, 20]
    generator = seeded(TINY.seed)
    task = make_task("modular-addition", generator, p=5)
    model = make_model(task.vocabulary, generator)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.2)
    for step in range(21):
        if step % 5 == 0:
            row = finished.rows[step // 5]
            weights = torch.load(finished.path / f"checkpoints/step_{step:08}.pt", weights_only=True)
            with torch.no_grad():
                logits, unseen = model(task.train_inputs), model(task.test_inputs)
            expected = {
                "train_loss": cross_entropy(logits, task.train_labels),
                "test_loss": cross_entropy(unseen, task.test_labels),
                "train_accuracy": (logits.argmax(1) == task.train_labels).double().mean(),
                "test_accuracy": (unseen.argmax(1) == task.test_labels).double().mean(),
                "l2_norm": sum(p.double().square().sum() for p in model.parameters()).sqrt(),
                "lmn_hidden_1": lmnfast.lmn(*lmnfast.cut(model, "hidden_1", task.train_inputs)),
            }
            for name, value in expected.items():
                assert row[name] == pytest.approx(value.item(), rel=1e-4), name
            for name, weight in model.state_dict().items():
                torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)
        optimiser.zero_grad()
        cross_entropy(model(task.train_inputs), task.train_labels).backward()
        optimiser.step()


def test_every_row_carries_what_its_lmn_depends_on(finished):
    with open(finished.path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == (
        "step,train_loss,test_loss,train_accuracy,test_accuracy,l2_norm,lmn_hidden_1,samples,outputs,points,rule,method,"
        "precision,solver,negative,constant_share_hidden_1,negative_share_hidden_1"
    )
    settings = ("20", "5", "21", "uniform", "path", "highest", "cpu", "absolute")
    assert all(tuple(row[name] for name in lmnfast.spectrum.SETTINGS) == settings for row in rows)
    assert all(0 < float(row["negative_share_hidden_1"]) < 1 for row in rows)


def test_a_table_without_the_columns_of_today_is_refused(finished, tmp_path):
    path = Path(shutil.copytree(finished.path, tmp_path / "run"))
    old = [line.split(",") for line in (path / "metrics.csv").read_text().splitlines()]
    left_out = old[0].index("outputs")
    (path / "metrics.csv").write_text(
        "".join(",".join(line[:left_out] + line[left_out + 1 :]) + "\n" for line in old)
    )
    for read in (lambda: read_run(path), lambda: train(replace(TINY, steps=20), path)):
        with pytest.raises(
            ValueError, match="metrics.csv lacks the columns outputs, .*--force starts the run anew"
        ):
            read()


def test_a_run_may_clip_negative_eigenvalues_and_says_so(finished, tmp_path):
    path, rows = measure(finished.path, negative="clip", every=10)
    assert path.name == "measure-hidden_1-path-uniform21-clip.csv"
    run = train(replace(TINY, negative="clip"), tmp_path)
    assert {row["negative"] for row in run.rows} == {row["negative"] for row in rows} == {"clip"}
    for name in ("lmn_hidden_1", "negative_share_hidden_1"):
        assert [row[name] for row in rows] == pytest.approx(
            [row[name] for row in run.rows if row["step"] % 10 == 0]
        )
    for row, known in zip(run.rows, finished.rows, strict=True):
        assert row["lmn_hidden_1"] < known["lmn_hidden_1"]
        assert all(row[name] == known[name] for name in (*METRICS, "negative_share_hidden_1"))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(finished, tmp_path):
    train(TINY, tmp_path / "again")
    train(replace(TINY, seed=1), tmp_path / "other")
    metrics = [
        (path / "metrics.csv").read_bytes()
        for path in (finished.path, tmp_path / "again", tmp_path / "other")
    ]
    assert metrics[0] == metrics[1] != metrics[2]


@pytest.fixture
def settling_late(monkeypatch):
    """As on a card, what a measurement took is checked and saved at the next one."""
    begin = training._Training.__init__

    def late(self, config, path):
        begin(self, config, path)
        self.settles_late = True

    monkeypatch.setattr(training._Training, "__init__", late)


def test_a_measurement_that_is_settled_late_leaves_the_same_files(finished, settling_late, tmp_path):
    train(replace(TINY, steps=TINY.steps // 2 // TINY.every * TINY.every), tmp_path / "late")
    train(TINY, tmp_path / "late")  # and one that is resumed
    for kept in (finished.path, tmp_path / "late"):
        assert sorted(p.name for p in kept.rglob("*.pt"))
    names = [p.relative_to(finished.path) for p in finished.path.rglob("*.pt")]
    for name in (*names, Path("metrics.csv")):
        if name.name != "state.pt":  # which has seconds
            assert (tmp_path / "late" / name).read_bytes() == (finished.path / name).read_bytes()
    states = [read_tensors(p / "state.pt") for p in (finished.path, tmp_path / "late")]
    assert states[0]["step"] == states[1]["step"] == TINY.steps
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name])


def test_a_training_that_diverges_says_so_when_it_is_settled_late(settling_late, tmp_path, monkeypatch):
    probe = sys.modules["lmnfast.probe"]
    monkeypatch.setattr(probe, "enqueue", partial(probe.enqueue, deferred=True))  # as on a card
    with pytest.raises(FloatingPointError, match="training diverged: train_loss is .* at step 5"):
        train(replace(TINY, learning_rate=1e30), tmp_path)


def test_training_leaves_thread_count_and_random_state_alone(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(replace(TINY, threads=1 if threads > 1 else 2), tmp_path)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_killed_before_or_within_any_write_ends_as_one_never_stopped(finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    writes, fatal = 0, 0

    def fatal_write(path, content):
        nonlocal writes
        writes += 1
        if writes == fatal:
            path.parent.mkdir(exist_ok=True)
            path.with_name(f"{path.name}.{GONE}.part").write_bytes(content[: len(content) // 2])
            raise Killed
        write_file(path, content)

    survived = False
    while not survived:
        fatal += 1
        writes, path = 0, tmp_path / f"killed-{fatal}"
        with monkeypatch.context() as patched:
            for place in (run_files, tables):
                patched.setattr(place, "write_file", fatal_write)
            try:
                train(TINY, path)
                survived = True
            except Killed:
                pass
        assert train(TINY, path).rows == finished.rows
        assert (path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()
        assert not list(path.rglob("*.part"))
    assert fatal > 8  # config, five checkpoints, metrics and state at least once


def test_a_run_ended_by_sigkill_continues_to_the_same_bytes(tmp_path):
    config = replace(TINY, steps=1000, every=50)
    command = [sys.executable, "-m", "lmnfast.cli", "grok", "modular-addition"]
    for attempt in range(10):  # on a busy machine a run may end before the signal comes
        path = tmp_path / f"killed-{attempt}"
        options = ["--p=5", "--steps=1000", "--every=50", "--threads=1", "--device=cpu", f"--out={path}"]
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (path / "state.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(int.from_bytes(os.urandom(1), "big") / 2000)  # up to 0.13 s: anywhere in most of the run
        process.kill()
        if process.wait() == -signal.SIGKILL and read_run(path).rows[-1]["step"] < 1000:
            break
    assert torch.load(path / "state.pt", weights_only=True)["step"] < 1000
    train(config, path)
    train(config, tmp_path / "never")
    assert (path / "metrics.csv").read_bytes() == (tmp_path / "never" / "metrics.csv").read_bytes()


def test_a_finished_run_is_left_as_it_is_and_more_steps_continue_it(finished, tmp_path, capsys):
    path = tmp_path / "run"
    train(replace(TINY, steps=10), path)
    before = files(path)
    train(replace(TINY, steps=10), path, progress=True)
    assert "finished at step 10" in capsys.readouterr().out
    assert files(path) == before
    train(TINY, path)
    assert (path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()


def test_left_open_threads_and_device_are_those_the_run_was_started_with(tmp_path):
    threads = 1 if torch.get_num_threads() > 1 else 2
    train(replace(TINY, steps=5, threads=threads), tmp_path)
    assert train(replace(TINY, threads=None, device="auto"), tmp_path).config == replace(
        TINY, threads=threads
    )


def test_another_config_is_refused_by_its_differences_and_force_starts_anew(finished, tmp_path):
    path = tmp_path / "run"
    train(replace(TINY, seed=3, steps=25), path)
    measure(path)
    before = files(path)
    with pytest.raises(ValueError, match=r"steps is 25 there, 20 here; seed is 3 there, 0 here; .*--force"):
        train(TINY, path)
    assert files(path) == before
    train(TINY, path, force=True)
    assert (path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()
    assert not list(path.glob("measure-*")) and not (path / "checkpoints/step_00000025.pt").exists()


def test_force_deletes_only_files_that_a_run_writes(tmp_path):
    path = tmp_path / "run"
    train(replace(TINY, steps=25, seed=1), path)
    draw(path)
    (path / "state.pt.123.part").touch()
    mine = [
        "notes.txt",
        "measure-mine.csv",
        "checkpoints/mine.pt",
        "checkpoints/step_best.pt",
        "figures/figure2-mine.png",
    ]
    for name in mine:
        (path / name).write_text("mine")
    (path / "checkpoints" / "more").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (path / "figures/figure2-hidden_2.png").symlink_to(elsewhere)
    train(TINY, path, force=True)
    assert all((path / name).read_text() == "mine" for name in mine) and (path / "checkpoints/more").is_dir()
    assert elsewhere.read_text() == "mine"
    steps = [f"checkpoints/step_{step:08}.pt" for step in range(0, 21, 5)]
    left = {".lock", "config.json", "metrics.csv", "state.pt", *steps}
    assert {str(name) for name in files(path)} == {*mine, *left}


@pytest.mark.parametrize(
    "config", [None, "{}", '{"task": "translation", "steps": 3, "every": 1, "seed": 0}', "[]", "model: x"]
)
def test_force_refuses_a_directory_that_is_no_run(config, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_00000001.pt").write_text("mine")
    if config:
        (tmp_path / "config.json").write_text(config)
    before = files(tmp_path)
    with pytest.raises(
        ValueError, match="out: .* no run; choose another|no run's, and --force deletes runs alone"
    ):
        train(TINY, tmp_path, force=True)
    assert {**files(tmp_path), Path(".lock"): b""} == {**before, Path(".lock"): b""}


def test_force_follows_no_link_out_of_the_run(tmp_path):
    path, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(replace(TINY, steps=5), path)
    (path / "checkpoints").rename(elsewhere)
    (path / "checkpoints").symlink_to(elsewhere)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="checkpoints is a symbolic link, which --force does not follow"):
        train(TINY, path, force=True)
    assert files(tmp_path) == before


def test_a_run_whose_directory_is_deleted_ends_and_leaves_none(tmp_path, monkeypatch):
    evaluate, path = training._evaluate, tmp_path / "run"

    def deleted(*arguments):
        if len(list(path.glob("checkpoints/*"))) == 2:
            shutil.rmtree(path)
        return evaluate(*arguments)

    monkeypatch.setattr(training, "_evaluate", deleted)
    with pytest.raises(FileNotFoundError, match="out: .*run was deleted while the run was at work"):
        train(TINY, path)
    assert not path.exists()


def test_a_directory_with_parts_of_a_run_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("mine")
    with pytest.raises(ValueError, match="holds metrics.csv but no config.json"):
        train(TINY, tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "mine"
    path = tmp_path / "run"
    train(replace(TINY, steps=5), path)
    (path / "metrics.csv").unlink()
    with pytest.raises(ValueError, match="lacks rows that it had"):
        train(TINY, path)


@pytest.mark.parametrize("name", ["state.pt", "metrics.csv"])
def test_a_damaged_run_is_refused_and_left_as_it_is(name, finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    damaged = tmp_path / "run" / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    before = damaged.read_bytes()
    with pytest.raises(ValueError, match=f"^out: .*{name}.*--force starts the run anew"):
        train(replace(TINY, steps=25), tmp_path / "run")
    assert damaged.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-3],  # within the last word
        lambda text: text[:-1],
        lambda text: text[: text.rindex(b"\n", 0, -1) + 1],  # a row less
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"lmn_hidden_1", b"lmn_hidden_2"),
        lambda text: text.replace(b"\n5,", b"\n6,"),
        lambda text: text.replace(b",path,", b",pbth,", 1),
        lambda text: text.replace(b",21,", b",,", 1),
        lambda text: text.replace(b"\n10,", b"\n10,nan,", 1),
        lambda text: b"\xff" + text,
        lambda text: b"",
    ],
)
def test_a_damaged_table_of_metrics_is_named_and_not_gone_on_with(damage, finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    (path / "metrics.csv").write_bytes(damage((path / "metrics.csv").read_bytes()))
    with pytest.raises(ValueError, match=r"^run: .*metrics\.csv"):
        read_run(path)
    with pytest.raises(ValueError, match=r"^out: .*metrics\.csv.*; --force starts the run anew"):
        train(replace(TINY, steps=25), path)


def test_any_changed_byte_of_a_file_of_tensors_is_noticed(tmp_path):
    path, content = tmp_path / "tensors.pt", {"step": 5, "weights": torch.arange(40.0)}
    save_tensors(path, content)
    for read in (read_tensors(path), torch.load(path, weights_only=True)):
        assert read["step"] == 5 and torch.equal(read["weights"], content["weights"])
    whole = path.read_bytes()
    for position in {*range(0, len(whole), 5), *range(len(whole) - 200, len(whole))}:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"cannot read .*tensors.pt, .*checksum"):
            read_tensors(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="checksum"):
        read_tensors(path)
    torch.save(content, path)  # without a checksum of the whole file
    assert torch.equal(read_tensors(path)["weights"], content["weights"])
    whole = path.read_bytes()
    position = whole.index(content["weights"].numpy().tobytes()) + 70
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
    with pytest.raises(ValueError, match="the checksum of .*data/0 is wrong"):
        read_tensors(path)


def changed(file, position=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 0x40
    file.write_bytes(content)


def test_a_changed_byte_of_a_checkpoint_or_a_state_stops_what_would_use_it(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    changed(path / "checkpoints/step_00000010.pt")
    with pytest.raises(
        ValueError, match=r"run: cannot read .*step_00000010.pt, .*checksum.*delete .*run to run it"
    ):
        measure(path)
    changed(path / "state.pt")
    with pytest.raises(
        ValueError, match=r"out: cannot read .*state.pt, .*checksum.*--force starts the run anew"
    ):
        train(replace(TINY, steps=25), path)
    with pytest.raises(ValueError, match=r"run: cannot read .*state.pt, .*checksum"):
        read_run(path)


@pytest.mark.parametrize(
    "change", [{"step": 10.0}, {"step": 7}, {"seconds": None}, {"seconds": {"training": 1.0}}, {"model": {}}]
)
def test_a_state_that_no_run_writes_is_named(change, finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    state = read_tensors(path / "state.pt")
    save_tensors(path / "state.pt", {**state, **change})
    with pytest.raises(ValueError, match=r"^out: cannot read .*state\.pt, .*; --force starts the run anew"):
        train(replace(TINY, steps=25), path)


def test_what_a_killed_write_has_left_is_deleted_by_the_next_and_others_parts_are_not(tmp_path):
    for pid in (GONE, os.getppid()):
        (tmp_path / f"a.csv.{pid}.part").touch()
    (tmp_path / f"b.csv.{GONE}.part").touch()
    write_file(tmp_path / "a.csv", b"x")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.csv", f"a.csv.{os.getppid()}.part", f"b.csv.{GONE}.part"
    }  # fmt: skip
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", b"x")
    assert not list(tmp_path.glob("folder*part"))


def test_a_directory_at_work_is_refused(tmp_path):
    with claimed(tmp_path), pytest.raises(ValueError, match="out: another process is at work"):
        train(TINY, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_directory_that_cannot_be_written_is_one_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_Training", None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="out: cannot write to .*file/run: Not a directory"):
        train(TINY, tmp_path / "file" / "run")


def test_a_diverged_training_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match="training diverged: train_loss is .* at step 5"):
        train(replace(TINY, learning_rate=1e30), tmp_path)


def test_tensors_come_in_one_copy_as_they_were():
    tensors = [
        torch.randn(3, 5).T,
        torch.tensor(7),
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.zeros(0, 4),
        torch.randn(3).bfloat16(),
        torch.nn.Parameter(torch.randn(2, 2)),
    ]
    copies = training.unpacked(training.packed(tensors), tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor) and not copy.requires_grad
        assert copy.untyped_storage().nbytes() == tensor.nbytes  # what torch.save would write


def test_a_copy_for_later_does_not_change_with_what_was_copied():
    content = {"step": 3, "model": {"weight": torch.ones(2)}, "groups": [{"lr": 0.1, "betas": (0.9, 0.98)}]}
    copy = training.HostCopy(content)
    content["model"]["weight"].mul_(2)
    content["groups"][0]["lr"] = 0.2
    read = copy.read()
    assert read["model"]["weight"].tolist() == [1, 1] and read["groups"] == [
        {"lr": 0.1, "betas": (0.9, 0.98)}
    ]


@pytest.mark.parametrize("updates_before", [0, 3], ids=["from the start", "resumed"])
def test_warming_up_changes_nothing_and_keeps_every_address(updates_before, tmp_path):
    warm, cold = (training._Training(TINY, tmp_path) for _ in range(2))
    for run in (warm, cold):
        for _ in range(updates_before):
            run._update()
    weights = [p.data_ptr() for p in warm.model.parameters()]
    moments = [m.data_ptr() for state in warm.optimiser.state.values() for m in state.values()]
    training._warm_up(warm._update, warm.model, warm.optimiser)
    assert [p.data_ptr() for p in warm.model.parameters()] == weights
    now = [m for state in warm.optimiser.state.values() for m in state.values()]
    assert not moments or [m.data_ptr() for m in now] == moments
    assert now and (updates_before or not any(m.any() for m in now))
    for run in (warm, cold):
        for _ in range(2):
            run._update()
    for ours, plain in zip(warm.model.parameters(), cold.model.parameters(), strict=True):
        assert torch.equal(ours, plain) and torch.equal(ours.grad, plain.grad)
        for name, value in cold.optimiser.state[plain].items():
            assert torch.equal(warm.optimiser.state[ours][name], value)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@CUDA
def test_a_run_on_cuda_takes_the_steps_of_one_on_the_cpu_and_resumes(finished, tmp_path):
    config = replace(TINY, device="cuda")
    run = train(config, tmp_path / "at once")
    train(replace(config, steps=10), tmp_path / "stopped")
    for other in (run, train(config, tmp_path / "stopped")):
        assert [row["step"] for row in other.rows] == [0, 5, 10, 15, 20]
        for row, on_cpu in zip(other.rows, finished.rows, strict=True):
            for name in ("train_loss", "test_loss", "l2_norm", "lmn_hidden_1"):
                assert row[name] == pytest.approx(on_cpu[name], rel=1e-3), name


@CUDA
def test_a_diverged_training_on_cuda_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match="training diverged: train_loss is .* at step 5"):
        train(replace(TINY, learning_rate=1e30, device="cuda"), tmp_path)


# What a run says


def run_of(accuracies, **columns):
    rows = [
        {"step": 10 * i, "train_accuracy": seen, "test_accuracy": unseen}
        | {name: c[i] for name, c in columns.items()}
        for i, (seen, unseen) in enumerate(accuracies)
    ]
    return Run(Path(), TINY, rows, {})


def test_phases_are_memorising_generalising_finalising():
    run = run_of([(0.1, 0), (0.9, 0), (1, 0.1), (0.99, 0.9), (1, 1), (0.9, 0.9)])
    assert (run.memorised, run.generalised) == (20, 40)
    assert [run.phase(row)[0] for row in run.rows] == list("mmggff")


def test_correlation_is_pearsons_over_the_generalising_phase_only():
    accuracies = [(0, 0), (1, 0), (1, 0), (1, 0), (1, 1)]
    run = run_of(
        accuracies, test_loss=[9, 3, 2, 1, 9], line=[5, -3, -2, -1, 5], bent=[0, 1, 0, 0, 0], flat=[1] * 5
    )
    assert run.correlation("line") == pytest.approx(-1)
    assert run.correlation("bent") == pytest.approx(3**0.5 / 2)
    assert run.correlation("flat") != run.correlation("flat")


def test_a_run_that_has_not_generalised_has_no_correlation_while_generalising_and_no_title_of_one():
    columns = {
        "test_loss": [9, 3, 2, 1, 9],
        "lmn_hidden_1": [5, -3, -2, -1, 5],
        "l2_norm": [5, -3, -2, -1, 5],
    }
    for last, titled in ((1, True), (0.99, False)):
        run = run_of([(0, 0), (1, 0), (1, 0), (1, 0), (1, last)], **columns)
        assert (run.correlation("lmn_hidden_1") == pytest.approx(-1)) == titled
        figure = Figure().subfigures()
        figures._draw_losses(figure, run, "hidden_1")
        assert [axes.get_title().startswith("generalising: r") for axes in figure.axes] == [titled] * 2


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"{",
        b'{"task": "s4", "colour": 1}',
        b'{"task": "s4", "seed": 1.5}',
        b'{"task": ["s4"]}',
        b'{"task": "modular-addition", "p": 1000000}',
        b"[]",
        b"[" * 100_000,
        b'{"task": "s\xff"}',
    ],
)
def test_what_is_not_a_run_is_named(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"):
        measure(tmp_path)


def test_a_run_that_has_measured_nothing_yet_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task": "s4"}))
    with pytest.raises(ValueError, match="has no metrics.csv yet"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no checkpoints"):
        measure(tmp_path)


def test_measuring_the_checkpoints_again_gives_the_runs_numbers(finished):
    path, _ = measure(finished.path)
    assert path.name == "measure-hidden_1-path-uniform21.csv"
    with open(path) as again, open(finished.path / "metrics.csv") as first:
        for row, known in zip(csv.DictReader(again), csv.DictReader(first), strict=True):
            assert row == {name: known[name] for name in row}


def test_checkpoints_can_be_measured_at_other_layers_nodes_and_steps(finished):
    path, rows = measure(finished.path, layers=["embedding", "hidden_2"], rule="lobatto", points=9, every=10)
    assert path.name == "measure-embedding+hidden_2-path-lobatto9.csv"
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert all(row["lmn_embedding"] > 2 and row["lmn_hidden_2"] == pytest.approx(1, abs=1e-3) for row in rows)
    with pytest.raises(ValueError, match="every"):
        measure(finished.path, every=0)


def test_a_table_that_has_more_steps_is_replaced_only_by_force(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    table, rows = measure(path)
    before = table.read_bytes()
    with pytest.raises(ValueError, match=r"run: .*uniform21.csv has 2 more steps .* 5 for one; move it away"):
        measure(path, every=10)
    assert table.read_bytes() == before and measure(path)[1] == rows
    assert len(measure(path, every=10, force=True)[1]) == 3
    assert measure(path)[1] == rows  # more steps than there are replace them without a word
    table.write_bytes(before[:-3])
    with pytest.raises(ValueError, match=r"run: cannot read .*uniform21.csv, .*; move it away, or --force"):
        measure(path)


def test_a_run_at_work_is_not_measured_and_a_file_that_is_no_checkpoint_is_named(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    with claimed(path), pytest.raises(ValueError, match="run: another process is at work in .*run"):
        measure(path)
    (path / "checkpoints/step_foo.pt").touch()
    with pytest.raises(
        ValueError, match="run: expected checkpoints named step_ and a number, got .*step_foo.pt"
    ):
        measure(path)


def test_fewer_samples_are_the_same_of_every_step_and_named_wherever_their_number_is(finished, tmp_path):
    run = train(replace(TINY, samples=8), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["samples"] == 8
    task, model = start(TINY)
    for row, known in zip(run.rows, finished.rows, strict=True):
        load_checkpoint(model, finished.path, row["step"])
        expected = lmnfast.lmn(*lmnfast.cut(model, "hidden_1", task.train_inputs[:8])).item()
        assert row["lmn_hidden_1"] == pytest.approx(expected, rel=1e-6) and row["samples"] == 8
        assert all(row[name] == known[name] for name in METRICS)
    path, rows = measure(finished.path, samples=8)
    assert path.name == "measure-hidden_1-path-uniform21-8samples.csv"
    assert [row["lmn_hidden_1"] for row in rows] == pytest.approx([row["lmn_hidden_1"] for row in run.rows])
    assert measure(tmp_path)[0].name == path.name
    assert figures.named(run.config) == "LMN (8 samples)" and figures.named(TINY) == "LMN"
    with pytest.raises(ValueError, match="samples is 8 there, None here"):
        train(TINY, tmp_path)


def test_a_long_measurement_is_announced_by_trials_of_few_samples(finished, monkeypatch, capsys):
    now, sizes = [0.0], []

    def connectivity(f, x, **settings):
        sizes.append(len(x))
        now[0] += 1e-3 * len(x) ** 2
        return torch.eye(len(x))

    def linear_mapping_number(L):
        now[0] += 1e-4 * len(L) ** 3
        return torch.ones(())

    monkeypatch.setattr(measuring, "TRIAL", 8)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measuring, "connectivity", connectivity)
    monkeypatch.setattr(measuring, "linear_mapping_number", linear_mapping_number)
    config = replace(TINY, p=31, layers=("hidden_1", "embedding"))
    task, model = start(config)
    seconds = 2 * (1e-3 * 768**2 + 1e-4 * 768**3)
    assert measuring.expected_seconds(model, task.train_inputs, config) == pytest.approx(seconds)
    assert max(sizes) <= 16 and now[0] < 3
    measuring.say_how_long(Path("run"), model, task.train_inputs, (config,), 5)
    assert capsys.readouterr().out == (
        "run: a measurement of 768 samples will take about 25 h, 5 of them about 127 h; --samples takes fewer samples\n"
    )
    measuring.say_how_long(Path("run"), model, task.train_inputs[:20], (config,), 5)
    assert capsys.readouterr().out == ""  # no 10 s


def test_several_methods_are_measured_side_by_side(finished):
    path, rows = measure(
        finished.path, layers=["hidden_1", "embedding"], method=["path", "jacobian"], every=10
    )
    assert path.name == "measure-hidden_1+embedding-path+jacobian-uniform21.csv"
    with open(path) as file:
        read = list(csv.DictReader(file))
    names = [
        f"lmn_{layer}_{method}" for method in ("path", "jacobian") for layer in ("hidden_1", "embedding")
    ]
    shares = [name.replace("lmn", kind) for kind in lmnfast.spectrum.SHARES for name in names]
    assert list(read[0]) == ["step", *names, *lmnfast.spectrum.SETTINGS, *shares]
    assert {row["method"] for row in read} == {"path+jacobian"}
    for method in ("path", "jacobian"):
        alone = measure(finished.path, method=method, every=10, force=True)[1]
        assert [row["lmn_hidden_1"] for row in alone] == [row[f"lmn_hidden_1_{method}"] for row in rows]
    for method in ([], ["path", "path"]):
        with pytest.raises(ValueError, match="method: expected some of path, hermite, .*, each once"):
            measure(finished.path, method=method)


def test_a_run_by_another_method_trains_the_same_network(finished, tmp_path):
    run = train(replace(TINY, method="hermite"), tmp_path)
    for row, known in zip(run.rows, finished.rows, strict=True):
        assert row["method"] == "hermite" and row["lmn_hidden_1"] != known["lmn_hidden_1"]
        assert all(row[name] == known[name] for name in METRICS)


# Figures


@pytest.mark.parametrize(
    "config", [TINY, Config("xor", steps=300, every=300, layers=("hidden_2", "hidden_1"))]
)
def test_draw_writes_a_picture_for_each_layer(config, tmp_path):
    layers = {f"lmn_{layer}": 2.0 for layer in config.layers}
    metrics = dict.fromkeys(METRICS, 1.0)
    shares = {f"{kind}_{layer}": 0.1 for kind in lmnfast.spectrum.SHARES for layer in config.layers}
    setting = dict.fromkeys(lmnfast.spectrum.SETTINGS, "uniform") | {
        "outputs": 5,
        "points": 21,
        "method": "path",
    }
    setting |= {"samples": 20 if config.p else 819, "negative": "absolute"}
    rows = [
        {"step": step} | metrics | layers | setting | shares
        for step in range(0, config.steps + 1, config.every)
    ]
    write_rows(tmp_path / "metrics.csv", rows, METRICS)
    seconds = {"training": 0.0, "measuring": 0.0}
    save_tensors(tmp_path / "state.pt", {"step": config.steps, "seconds": seconds})
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    drawn = draw(tmp_path)
    assert [path.name for path in drawn] == [f"figure2-{layer}.png" for layer in config.layers]
    for path in drawn:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 20_000


def test_a_legend_of_methods_fits_its_figure(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure) or path)
    methods = list(figures.METHOD_LINES)
    rows = [
        {"step": s, "samples": 20, "method": "+".join(methods)} | {f"lmn_a_{m}": 2.0 for m in methods}
        for s in (0, 1)
    ]
    draw_methods(tmp_path / "measure-x.csv", rows)
    kept[0].draw_without_rendering()
    box = kept[0].legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= kept[0].bbox.x1
    assert "(20 samples)" in kept[0].axes[0].get_ylabel()


@pytest.mark.parametrize(
    "task, peak, norm", [("modular-addition", 53.9, 44.3), ("s4", 28.75, 38.3), ("xor", 34.7, 41.2)]
)
def test_the_papers_curves_come_with_the_package(task, peak, norm):
    curves = paper_curves(task)
    assert max(value for value in curves["lmn"] if value == value) == pytest.approx(peak, abs=0.15)
    assert max(value for value in curves["l2_norm"] if value == value) == pytest.approx(norm, abs=0.25)
