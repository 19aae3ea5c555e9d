"""Seeds that train together: each as its run alone, in files of its own."""

import shutil
from dataclasses import replace

import pytest
import torch
from support import CUDA, Killed, killed_at
from tiny import TINY
from torch.nn.functional import cross_entropy

import lmnfast
from lmnfast.grokking import record, together
from lmnfast.grokking.config import Config, start
from lmnfast.grokking.gradients import Gradients
from lmnfast.grokking.run import read_run
from lmnfast.grokking.stacked import OBSERVED, Networks, stacked_model
from lmnfast.grokking.together import bytes_of_a_seed, seeds_at_once, train_together
from lmnfast.grokking.training import train
from lmnfast.runs import files as run_files
from lmnfast.runs import tables
from lmnfast.runs.files import read_tensors

OBSERVING = replace(TINY, observables=tuple(OBSERVED), points=5, rule="lobatto")
# The tasks of the paper, with fewer pairs for two of them.
TASKS = {
    "modular-addition": Config("modular-addition", p=7, threads=1, device="cpu"),
    "s4": Config("s4", threads=1, device="cpu"),
    "xor": Config("xor", bits=3, threads=1, device="cpu"),
}


def seeds_of(config, count):
    return [replace(config, seed=seed) for seed in range(count)]


def all_together(config, count, out):
    """The runs of the seeds from 0 on, in directories with their numbers as names."""
    paths = [out / str(seed) for seed in range(count)]
    train_together(seeds_of(config, count), paths)
    return [read_run(path) for path in paths]


def assert_same_run(run, alone, rel):
    """Whether all files of two runs agree: words and integers exactly, other numbers to `rel`."""
    assert run.config == alone.config and len(run.rows) == len(alone.rows)
    for row, own in zip(run.rows, alone.rows, strict=True):
        assert list(row) == list(own)
        for name, value in own.items():
            is_float = isinstance(value, float)
            expected = pytest.approx(value, rel=rel, abs=1e-12, nan_ok=True) if is_float else value
            assert row[name] == expected, (row["step"], name)
    kept = [
        sorted(path.relative_to(each.path) for path in each.path.rglob("*") if path.is_file())
        for each in (run, alone)
    ]
    assert kept[0] == kept[1]
    for name in kept[0]:
        if name.suffix == ".pt":
            assert_same_state(*(read_tensors(each.path / name) for each in (run, alone)))


def assert_same_state(found, expected):
    if isinstance(expected, torch.Tensor):
        assert found.untyped_storage().nbytes() == expected.nbytes  # no file has the tensors of other seeds
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            if name != "seconds":
                assert_same_state(found[name], expected[name])
    else:
        assert found == expected


# Updates


def double(config, seed):
    task, model = start(replace(config, seed=seed))
    return task, model.double()


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("name", TASKS)
def test_the_gradients_of_stacked_networks_are_autograds_of_each(name, activation):
    tasks, models = zip(*(double(replace(TASKS[name], activation=activation), seed) for seed in range(3)))
    stack = stacked_model(models)
    inputs, labels = (
        torch.stack([getattr(task, f"train_{what}") for task in tasks]) for what in ("inputs", "labels")
    )
    gradients = Gradients(stack, inputs, labels)
    gradients()
    gradients()  # finds the buffers as the first call left them
    for number, (task, model) in enumerate(zip(tasks, models, strict=True)):
        loss = cross_entropy(model(task.train_inputs), task.train_labels)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, autograds in zip(stack.parameters(), expected, strict=True):
            assert autograds.abs().max() > 0
            torch.testing.assert_close(parameter.grad[number], autograds, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", TASKS)
def test_hundreds_of_updates_in_float64_are_those_of_each_network_alone(name, optimizer):
    config = replace(TASKS[name], optimizer=optimizer).settled()
    steps = 100 if name == "s4" else 300
    tasks, models = zip(*(double(config, seed) for seed in range(2)))
    stack = stacked_model(models)
    inputs, labels = (
        torch.stack([getattr(task, f"train_{what}") for task in tasks]) for what in ("inputs", "labels")
    )
    parts = [(stack, inputs, labels)] + [
        (model, task.train_inputs, task.train_labels) for task, model in zip(tasks, models, strict=True)
    ]
    for model, *samples in parts:
        optimiser = together.optimiser_of(model.parameters(), config)
        gradients = Gradients(model, *samples)
        for _ in range(steps):
            gradients()
            optimiser.step()
    for number, model in enumerate(models):
        for parameter, own in zip(stack.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(parameter[number], own, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", TASKS)
def test_each_seed_has_the_rows_and_files_of_its_run_alone(name, tmp_path):
    config = replace(
        TASKS[name], steps=200, every=50, points=5, rule="lobatto", observables=tuple(OBSERVED), samples=30
    )
    for run in all_together(config, 2, tmp_path):
        assert_same_run(run, train(run.config, tmp_path / f"alone-{run.path.name}"), rel=2e-4)


def test_few_steps_agree_to_rounding(tmp_path):
    """The curvature is 1 minus a mean near 1, so float32's rounding of the entries is 5e-6 of it."""
    for run in all_together(OBSERVING, 3, tmp_path):
        assert_same_run(run, train(run.config, tmp_path / f"alone-{run.path.name}"), rel=1e-5)


# Measuring


def networks(count, config, spoil=lambda model: None):
    config = config.settled()
    pairs = [start(each) for each in seeds_of(config, count)]
    for _, model in pairs:
        with torch.no_grad():
            spoil(model)
    return pairs, Networks([model for _, model in pairs], [task for task, _ in pairs], config)


def dead_units(model):
    """The Jacobians have no part of these units, and neither do the samples of the last."""
    model.hidden_2_pre.weight[:7] = 0
    model.output.weight[:, 5:11] = 0
    model.hidden_1_pre.weight[-3:] = 0
    model.hidden_1_pre.bias[-3:] = 0


OTHERWISE = {"points": 6, "rule": "uniform", "stabiliser": 1e-3, "negative": "clip", "activation": "relu"}


@pytest.mark.parametrize(
    "change", [{}, {"p": 13}, OTHERWISE], ids=["few samples", "many samples", "other settings"]
)
@pytest.mark.parametrize("spoil", [lambda model: None, dead_units], ids=["all units", "dead units"])
def test_observables_of_all_networks_are_those_of_each(spoil, change):
    config = replace(OBSERVING, **change)
    pairs, stack = networks(2, config, spoil)
    for (task, model), row in zip(pairs, stack.measure(), strict=True):
        f, x = lmnfast.cut(model, "hidden_1", task.train_inputs)
        how = {name: getattr(config, name) for name in ("points", "rule", "stabiliser", "negative")}
        m = lmnfast.measure(f, x, observables=config.observables, **how)
        for name, value in {**m.observables, "lmn": m.lmn, "constant_share": m.constant_share}.items():
            assert row[name] == pytest.approx(value, rel=1e-6), name
        assert (row["samples"], row["outputs"], row["solver"]) == (m.samples, m.outputs, m.solver)


def test_a_rank_of_nothing_is_nan():
    def dead(model):
        model.output.weight[:] = 0
        model.hidden_2_pre.bias[:] = 1

    _, stack = networks(2, replace(OBSERVING, observables=("jacobian_rank", "lmn")), dead)
    for row in stack.measure():
        assert row["jacobian_rank"] != row["jacobian_rank"] and row["lmn"] == pytest.approx(1)


def test_emulated_all_networks_are_measured_by_one_launch_with_the_numbers_of_the_cpu(
    emulated, monkeypatch, tmp_path
):
    launches, run = [], lmnfast._native.run

    def noted(call, *results, **how):
        launches.append(type(call).__name__)
        return run(call, *results, **how)

    monkeypatch.setattr(lmnfast._native, "run", noted)
    config = replace(OBSERVING, p=4)
    _, stack = networks(3, config)
    found = stack.measure()
    assert launches.count("PathConnectivity") == 1 and launches.count("SymmetricEigenvalues") == 3
    assert {row["solver"] for row in found} == {"cuda"}
    assert lmnfast._native._C.use_isa(lmnfast._native._C.isas()[0])
    for row, own in zip(found, stack.measure(), strict=True):
        for name in ("lmn", "constant_share", *OBSERVED):
            assert row[name] == pytest.approx(own[name], rel=1e-4, abs=1e-7), name


# Runs on disk


def test_a_run_begun_by_either_trainer_is_continued_by_the_other(tmp_path):
    half = replace(OBSERVING, steps=10)
    never = all_together(OBSERVING, 2, tmp_path / "never")
    all_together(half, 2, tmp_path / "begun")
    for config, run in zip(seeds_of(OBSERVING, 2), never, strict=True):
        assert_same_run(train(config, tmp_path / "begun" / str(config.seed)), run, rel=1e-5)
    for config in seeds_of(half, 2):
        train(config, tmp_path / "alone" / str(config.seed))
    for run, other in zip(all_together(OBSERVING, 2, tmp_path / "alone"), never, strict=True):
        assert_same_run(run, other, rel=1e-5)


def test_runs_at_different_steps_meet(tmp_path, monkeypatch):
    for seed, steps in ((0, 5), (2, 10), (3, 20)):
        train(replace(TINY, seed=seed, steps=steps), tmp_path / "met" / str(seed))
    groups, begin = [], together._Together.__init__

    def noted(self, seeds, until, meanwhile):
        groups.append(([seed.config.seed for seed in seeds], seeds[0].step, until))
        begin(self, seeds, until, meanwhile)

    monkeypatch.setattr(together._Together, "__init__", noted)
    runs = all_together(TINY, 4, tmp_path / "met")
    assert groups == [([1], -1, 5), ([0, 1], 5, 10), ([0, 1, 2], 10, 20)]
    for run in runs:
        assert_same_run(run, train(run.config, tmp_path / f"alone-{run.path.name}"), rel=1e-5)


def test_a_kill_before_or_within_any_write_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "MOST_UNWRITTEN", 1)
    never = all_together(TINY, 2, tmp_path / "never")
    fatal, survived = 0, False

    while not survived:
        fatal += 3
        out, write = tmp_path / f"killed-{fatal}", killed_at(fatal)
        with monkeypatch.context() as patched:
            for place in (run_files, tables):
                patched.setattr(place, "write_file", write)
            try:
                all_together(TINY, 2, out)
                survived = True
            except Killed:
                pass
        for run, whole in zip(all_together(TINY, 2, out), never, strict=True):
            assert_same_run(run, whole, rel=1e-5)
        shutil.rmtree(out)
    assert fatal > 20  # two configs, ten checkpoints, three tables and states of each run


def test_what_is_finished_is_left_as_it_is_and_chunks_are_taken_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "MOST", 2)
    calls, begin = [], together._Together.__init__
    monkeypatch.setattr(
        together._Together,
        "__init__",
        lambda self, seeds, *rest: calls.append(len(seeds)) or begin(self, seeds, *rest),
    )
    all_together(TINY, 3, tmp_path)
    assert calls == [2, 1]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    all_together(TINY, 3, tmp_path)
    assert calls == [2, 1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_cannot_be_continued_is_left_out_and_left_as_it_is(tmp_path):
    for seed in range(3):
        train(replace(TINY, seed=seed, steps=10), tmp_path / str(seed))
    damaged = tmp_path / "1" / "metrics.csv"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    train(replace(TINY, seed=9), tmp_path / "2", force=True)  # another run than that of the config

    def kept():
        files = [path for name in "12" for path in (tmp_path / name).rglob("*.*")]
        return {path: path.read_bytes() for path in files if path.suffix in (".csv", ".pt")}

    before = kept()
    train_together(seeds_of(TINY, 4), [tmp_path / str(seed) for seed in range(4)])
    assert [read_run(tmp_path / name).rows[-1]["step"] for name in "03"] == [20, 20]
    assert kept() == before
    with pytest.raises(ValueError, match="metrics.csv"):
        train(replace(TINY, seed=1), tmp_path / "1")


def test_a_run_begun_on_another_device_is_left_to_it(tmp_path, monkeypatch):
    begun = together.begun
    monkeypatch.setattr(
        together,
        "begun",
        lambda config, path: replace(begun(config, path), device=("cpu", "cuda")[config.seed]),
    )
    train_together(seeds_of(TINY, 2), [tmp_path / "0", tmp_path / "1"])
    assert (tmp_path / "0" / "state.pt").exists() and not (tmp_path / "1" / "state.pt").exists()


def test_the_seconds_of_a_run_are_its_share(tmp_path):
    runs = all_together(TINY, 3, tmp_path)
    assert len({tuple(run.seconds.values()) for run in runs}) == 1
    assert all(0 < value < 60 for value in runs[0].seconds.values())


def test_a_deleted_directory_and_a_loss_that_is_not_finite_are_errors(tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match=r"/0: training diverged: train_loss is .* at step 5"):
        all_together(replace(TINY, learning_rate=1e30), 2, tmp_path / "diverged")
    keep, out = record.Record.keep_weights, tmp_path / "deleted"

    def deleted(self, step, weights):
        if step == 10:
            shutil.rmtree(out / "1", ignore_errors=True)
        keep(self, step, weights)

    monkeypatch.setattr(record.Record, "keep_weights", deleted)
    with pytest.raises(FileNotFoundError, match="out: .*1 was deleted while the run was at work"):
        all_together(TINY, 2, out)
    assert not (out / "1").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 5}, "batch: expected None for seeds that train together, got 5"),
        ({"penalty": "curvature", "penalty_weight": 1.0}, "penalty: expected None .*, got curvature"),
        ({"layers": ("hidden_2",)}, r"layers: expected \('hidden_1',\) .*, got \('hidden_2',\)"),
        ({"depth": 3}, "depth: expected 2 .*, got 3"),
        ({"method": "hermite"}, "method: expected path .*, got hermite"),
        ({"until_accurate": True}, "until_accurate: expected False .*, got True"),
    ],
)
def test_what_cannot_be_trained_together_is_refused_before_any_work(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        all_together(replace(TINY, **change), 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configs_that_differ_in_more_than_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="configs: expected settings that differ in the seed alone"):
        train_together([TINY, replace(TINY, seed=1, steps=25)], [tmp_path / "a", tmp_path / "b"])
    train_together([], [])
    assert not list(tmp_path.iterdir())


def test_an_observable_of_the_user_is_refused(tmp_path, monkeypatch):
    lmnfast.register_observable(
        "worst_pair_of_all", lambda o: 1 - o.connectivity.min(), reads=["connectivity"]
    )
    try:
        with pytest.raises(ValueError, match=r"observables: expected some of .*, got worst_pair_of_all"):
            all_together(replace(TINY, observables=("worst_pair_of_all",)), 2, tmp_path / "out")
    finally:
        del lmnfast._observables._registry["worst_pair_of_all"]


def test_256_seeds_of_the_papers_tasks_take_5_gigabytes_of_a_card(monkeypatch):
    for name in ("modular-addition", "s4", "xor"):
        config = Config(name)
        assert 5e6 < bytes_of_a_seed(config) < 20e6
        for free, most in ((80e9, 256), (1e9, int(0.6e9 / bytes_of_a_seed(config))), (1e6, 1)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (int(free), int(80e9)))
            assert seeds_at_once(replace(config, device="cuda")) == most


@CUDA
def test_seeds_on_cuda_have_the_rows_of_their_runs_alone_and_resume(tmp_path):
    config = replace(OBSERVING, device="cuda")
    whole = all_together(config, 3, tmp_path / "whole")
    all_together(replace(config, steps=10), 3, tmp_path / "stopped")
    for run, again in zip(whole, all_together(config, 3, tmp_path / "stopped"), strict=True):
        alone = train(run.config, tmp_path / f"alone-{run.path.name}")
        for row, resumed, own in zip(run.rows, again.rows, alone.rows, strict=True):
            for name in ("train_loss", "test_loss", "l2_norm", "lmn_hidden_1", "jacobian_rank_hidden_1"):
                assert row[name] == pytest.approx(own[name], rel=1e-3), name
                assert row[name] == pytest.approx(resumed[name], rel=1e-3), name
