"""Phases and correlations of a run, and the figures of them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tiny import TINY

import lmnfast
from lmnfast.grokking import figures
from lmnfast.grokking.config import Config
from lmnfast.grokking.figures import draw, draw_methods, paper_curves
from lmnfast.grokking.run import METRICS, Run, write_rows
from lmnfast.runs.files import save_tensors


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
    setting |= {"samples": 20 if config.p else 819, "negative": "absolute", "stabiliser": 0.0}
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
