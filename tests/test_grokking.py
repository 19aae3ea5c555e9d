"""The paper's tasks, model and training."""

import csv
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support import CUDA
from tiny import TINY
from torch.nn.functional import cross_entropy

import lmnfast
from lmnfast.grokking import training
from lmnfast.grokking.choices import ACTIVATIONS, LAYERS
from lmnfast.grokking.gradients import Gradients
from lmnfast.grokking.measure import measure
from lmnfast.grokking.model import make_model
from lmnfast.grokking.run import METRICS, read_run
from lmnfast.grokking.tasks import answers, make_task
from lmnfast.grokking.training import train
from lmnfast.runs.files import read_tensors


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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
        "step,train_loss,test_loss,train_accuracy,test_accuracy,l2_norm,lost_gradients,lmn_hidden_1,samples,outputs,points,"
        "rule,method,precision,solver,negative,stabiliser,constant_share_hidden_1,negative_share_hidden_1"
    )
    settings = ("20", "5", "21", "uniform", "path", "highest", "cpu", "absolute", "0.0")
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


def test_a_run_by_another_method_trains_the_same_network(finished, tmp_path):
    run = train(replace(TINY, method="hermite"), tmp_path)
    for row, known in zip(run.rows, finished.rows, strict=True):
        assert row["method"] == "hermite" and row["lmn_hidden_1"] != known["lmn_hidden_1"]
        assert all(row[name] == known[name] for name in METRICS)


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
