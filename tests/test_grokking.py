import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import lmnfast
from lmnfast.grokking import train as training
from lmnfast.grokking.figures import draw, paper_curves
from lmnfast.grokking.gradients import Gradients
from lmnfast.grokking.model import ACTIVATIONS, LAYERS, make_model
from lmnfast.grokking.tasks import answers, make_task
from lmnfast.grokking.train import Config, Run, measure, read_run, train

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


@pytest.mark.parametrize("activation", ACTIVATIONS)
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
        assert all(row[name] == known[name] for name in (*training.METRICS, "negative_share_hidden_1"))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(finished, tmp_path):
    train(TINY, tmp_path / "again")
    train(replace(TINY, seed=1), tmp_path / "other")
    metrics = [
        (path / "metrics.csv").read_bytes()
        for path in (finished.path, tmp_path / "again", tmp_path / "other")
    ]
    assert metrics[0] == metrics[1] != metrics[2]


def test_training_leaves_thread_count_and_random_state_alone(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(replace(TINY, threads=1 if threads > 1 else 2), tmp_path)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_killed_before_or_within_any_write_ends_as_one_never_stopped(finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    write_file, writes, fatal = training.write_file, 0, 0

    def fatal_write(path, content):
        nonlocal writes
        writes += 1
        if writes == fatal:
            path.parent.mkdir(exist_ok=True)
            path.with_name(path.name + ".part").write_bytes(content[: len(content) // 2])
            raise Killed
        write_file(path, content)

    survived = False
    while not survived:
        fatal += 1
        writes, path = 0, tmp_path / f"killed-{fatal}"
        with monkeypatch.context() as patched:
            patched.setattr(training, "write_file", fatal_write)
            try:
                train(TINY, path)
                survived = True
            except Killed:
                pass
        assert train(TINY, path).rows == finished.rows
        assert (path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()
    assert fatal > 8  # config, five checkpoints, metrics and state at least once


def test_a_run_ended_by_sigkill_continues_to_the_same_bytes(tmp_path):
    config = replace(TINY, steps=1000, every=50)
    path, command = tmp_path / "killed", [sys.executable, "-m", "lmnfast.cli", "grok", "modular-addition"]
    options = ["--p=5", "--steps=1000", "--every=50", "--threads=1", "--device=cpu", f"--out={path}"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (path / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(int.from_bytes(os.urandom(1), "big") / 2000)  # up to 0.13 s: anywhere in most of the run
    process.kill()
    assert process.wait() == -signal.SIGKILL
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
    (path / "measure-x.csv").touch()
    (path / "notes.txt").touch()
    before = files(path)
    with pytest.raises(ValueError, match=r"steps is 25 there, 20 here; seed is 3 there, 0 here; .*--force"):
        train(TINY, path)
    assert files(path) == before
    train(TINY, path, force=True)
    assert (path / "metrics.csv").read_bytes() == (finished.path / "metrics.csv").read_bytes()
    assert not (path / "measure-x.csv").exists() and not (path / "checkpoints/step_00000025.pt").exists()
    assert (path / "notes.txt").exists()


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


def test_a_directory_at_work_is_refused(tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is at work"):
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
    assert run_of([(0, 0)] * 5, test_loss=[1] * 5, line=[1] * 5).correlation("line") != 0


@pytest.mark.parametrize("content", [None, "{", '{"task": "s4", "colour": 1}'])
def test_what_is_not_a_run_is_named(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        measure(tmp_path)


def test_a_run_that_has_measured_nothing_yet_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task": "s4"}))
    with pytest.raises(ValueError, match="has no metrics.csv yet"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no checkpoints"):
        measure(tmp_path)


def test_measuring_the_checkpoints_again_gives_the_runs_numbers(finished):
    path, rows = measure(finished.path)
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
        alone = measure(finished.path, method=method, every=10)[1]
        assert [row["lmn_hidden_1"] for row in alone] == [row[f"lmn_hidden_1_{method}"] for row in rows]
    for method in ([], ["path", "path"]):
        with pytest.raises(ValueError, match="method: expected some of path, hermite, .*, each once"):
            measure(finished.path, method=method)


def test_a_run_by_another_method_trains_the_same_network(finished, tmp_path):
    run = train(replace(TINY, method="hermite"), tmp_path)
    for row, known in zip(run.rows, finished.rows, strict=True):
        assert row["method"] == "hermite" and row["lmn_hidden_1"] != known["lmn_hidden_1"]
        assert all(row[name] == known[name] for name in training.METRICS)


# Figures


@pytest.mark.parametrize(
    "config", [TINY, Config("xor", steps=300, every=300, layers=("hidden_2", "hidden_1"))]
)
def test_draw_writes_a_picture_for_each_layer(config, tmp_path):
    layers = {f"lmn_{layer}": 2.0 for layer in config.layers}
    metrics = dict.fromkeys(training.METRICS, 1.0)
    shares = {f"{kind}_{layer}": 0.1 for kind in lmnfast.spectrum.SHARES for layer in config.layers}
    setting = dict.fromkeys(lmnfast.spectrum.SETTINGS, "path") | {"samples": 20, "outputs": 5, "points": 21}
    rows = [
        {"step": step} | metrics | layers | setting | shares
        for step in range(0, config.steps + 1, config.every)
    ]
    training._write_csv(tmp_path / "metrics.csv", rows, training.METRICS)
    training.save_tensors(tmp_path / "state.pt", {"seconds": {}})
    (tmp_path / "config.json").write_text(json.dumps(training.asdict(config)))
    drawn = draw(tmp_path)
    assert [path.name for path in drawn] == [f"figure2-{layer}.png" for layer in config.layers]
    for path in drawn:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 20_000


@pytest.mark.parametrize(
    "task, peak, norm", [("modular-addition", 53.9, 44.3), ("s4", 28.75, 38.3), ("xor", 34.7, 41.2)]
)
def test_the_papers_curves_come_with_the_package(task, peak, norm):
    curves = paper_curves(task)
    assert max(value for value in curves["lmn"] if value == value) == pytest.approx(peak, abs=0.15)
    assert max(value for value in curves["l2_norm"] if value == value) == pytest.approx(norm, abs=0.25)
