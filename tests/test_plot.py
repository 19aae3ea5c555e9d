"""The figures: what their lines, dots, colours and labels say, in light and dark, in new figures and in given axes."""

import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fresh import run_fresh
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import nn

import lmnfast
from lmnfast import plot

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda: None)
    with matplotlib.rc_context():
        pyplot.switch_backend("agg")
        yield
    pyplot.close("all")


def probe_rows(steps=(0, 1, 10, 100), layers=("a", "b"), scale=1.0):
    """As a probe has them: one row for each step and layer; LMN of layer k at step s is scale (s + k)."""
    return [
        {
            "step": s,
            "layer": layer,
            "lmn": scale * (s + k),
            "samples": 50,
            "method": "path",
            "negative": "absolute",
        }
        | {"loss": float(s) / 2, "curvature": 0.1 * k}
        for s in steps
        for k, layer in enumerate(layers)
    ]


def run_rows(offset=0.0, steps=range(0, 60, 10)):
    """As a run has them: one row for each step, with columns for the layers."""
    return [
        {
            "step": s,
            "lmn_hidden_1": offset + s,
            "lmn_hidden_2": 1.0,
            "test_loss": 3.0 * s,
            "l2_norm": s % 20,
            "samples": 7,
        }
        for s in steps
    ]


def data(line):
    return [*zip(line.get_xdata(), line.get_ydata())]


def small_figure(count=1):
    return Figure(figsize=(4 * count, 4), layout="constrained").subplots(1, count)


def test_history_draws_one_labelled_curve_for_each_layer_of_a_probe():
    ax = plot.history(probe_rows())
    assert [data(line) for line in ax.lines] == [
        [(0, 0), (1, 1), (10, 10), (100, 100)],
        [(0, 1), (1, 2), (10, 11), (100, 101)],
    ]
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("Training step", "LMN (N = 50)", "")
    assert [text.get_text() for text in ax.figure.legends[0].get_texts()] == ["a", "b"]
    assert ax.get_xscale() == "linear" and pyplot.get_fignums()


def test_history_of_columns_by_layer_of_one_layer_and_of_a_column():
    ax = plot.history(run_rows())
    assert [line.get_label() for line in ax.lines] == ["hidden_1", "hidden_2"]
    ax = plot.history(run_rows(), layers="hidden_1")
    assert data(ax.lines[0]) == [(s, s) for s in range(0, 60, 10)] and len(ax.lines) == 1
    assert ax.get_title() == "hidden_1" and not ax.figure.legends
    ax = plot.history(run_rows(), "lmn_hidden_2")
    assert ax.get_ylabel() == "LMN of hidden_2 (N = 7)" and set(ax.lines[0].get_ydata()) == {1.0}
    ax = plot.history(run_rows(), "test_loss", x="l2_norm")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("L2 norm", "Test loss")
    assert data(ax.lines[0]) == [(0, 120), (10, 150)]  # of rows with equal x the last counts


def test_several_numbers_are_panels_and_a_number_of_no_layer_is_one_curve():
    axes = plot.history(probe_rows(), ["lmn", "curvature", "loss"])
    assert axes.shape == (3,) and [len(ax.lines) for ax in axes] == [2, 2, 1]
    assert [ax.get_ylabel() for ax in axes] == ["LMN (N = 50)", "Curvature, 1 - r²", "Loss"]
    assert [ax.get_xlabel() for ax in axes] == ["", "", "Training step"]
    assert data(axes[2].lines[0]) == [(0, 0), (1, 0.5), (10, 5), (100, 50)]


def test_without_lmn_the_observables_that_have_numbers_are_drawn():
    rows = [row | {"lmn": None, "negative_share": None} for row in probe_rows()]
    assert plot.history(rows).get_ylabel() == "Curvature, 1 - r²"


def test_several_runs_are_their_median_middle_half_and_range_at_the_steps_of_all():
    runs = [run_rows(offset) for offset in (0, 1, 2, 10)]
    runs[3] = runs[3][:4]  # a run that was stopped
    ax = plot.history(runs, layers="hidden_1")
    assert data(ax.lines[0]) == [(s, s + 1.5) for s in (0, 10, 20, 30)]
    outer, inner = (band.get_paths()[0].get_extents() for band in ax.collections)
    assert (outer.y0, outer.y1) == (0, 40) and (inner.y0, inner.y1) == (0.75, 34)
    assert ax.get_title() == "hidden_1: median, middle half and range of 4 runs"
    ax = plot.history(runs[:2], "test_loss")
    assert ax.get_title() == "Median, middle half and range of 2 runs"


def test_a_dict_names_the_curves():
    ax = plot.history({"one": run_rows(), "two": [run_rows(1), run_rows(3)]}, layers="hidden_1")
    assert [line.get_label() for line in ax.lines] == ["one", "two, 2 runs"]
    assert data(ax.lines[1])[0] == (0, 2) and len(ax.collections) == 2
    assert len({line.get_color() for line in ax.lines}) == 2


def test_a_logarithmic_axis_has_step_0_and_plain_numbers():
    ax = plot.history(probe_rows(), log=True)
    ax.figure.canvas.draw()
    labels = [text.get_text() for text in ax.get_xticklabels() if text.get_text()]
    assert ax.get_xscale() == "symlog" and labels == ["0", "1", "10", "100"]
    ax = plot.history(probe_rows(steps=(20, 30, 90)), log=True)
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    shown = [t.get_text() for t, at in zip(ax.get_xticklabels(), ax.get_xticks()) if low <= at <= high]
    assert ax.get_xscale() == "log" and shown == ["20", "50"]


def test_missing_numbers_are_gaps():
    rows = probe_rows(layers=("a",))
    rows[1]["lmn"], rows[2]["lmn"] = None, float("nan")
    y = plot.history(rows).lines[0].get_ydata()
    assert np.isnan(y[1]) and np.isnan(y[2]) and list(y[[0, 3]]) == [0, 100]


def test_many_layers_have_colours_by_depth_and_a_legend_at_the_side():
    ax = plot.history(probe_rows(layers=[f"blocks.{k}" for k in range(14)]))
    ax.figure.draw_without_rendering()
    box, legend = ax.get_window_extent(), ax.figure.legends[0].get_window_extent()
    assert len({tuple(line.get_color()) for line in ax.lines}) == 14
    assert legend.x0 > box.x1 and legend.x1 <= ax.figure.bbox.x1 and legend.y0 >= 0


@pytest.mark.parametrize("names", [["a" * 40, "b" * 40, "c" * 30], ["a", "b", "c", "d", "e"]])
def test_a_legend_above_fits_its_figure(names):
    ax = plot.history(probe_rows(layers=names))
    ax.figure.draw_without_rendering()
    box = ax.figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= ax.figure.bbox.x1


def test_an_lmn_names_the_settings_that_are_not_the_papers():
    changes = {"method": "hermite", "negative": "clip", "stabiliser": 8e-8}
    ax = plot.history([row | changes for row in probe_rows()])
    assert ax.get_ylabel() == "LMN (N = 50, hermite, negative ones clipped, stabiliser 8e-08)"
    ax = plot.history([probe_rows(), [row | {"samples": 90} for row in probe_rows()]])
    assert ax.get_ylabel() == "LMN (N = 50 to 90)"


def test_a_data_frame_is_drawn_as_its_rows():
    import pandas

    rows = probe_rows()
    assert [data(line) for line in plot.history(pandas.DataFrame(rows)).lines] == [
        data(line) for line in plot.history(rows).lines
    ]


def test_the_rows_of_a_table_of_several_seeds_are_their_runs():
    rows = [dict(r, task="xor", seed=s) for s in range(3) for r in probe_rows(layers="a", scale=1 + s)]
    ax = plot.history(rows)
    assert ax.get_title() == "a: median, middle half and range of 3 runs"
    assert list(ax.lines[0].get_ydata()) == [2 * s for s in (0, 1, 10, 100)]  # of the seed in the middle
    with pytest.raises(ValueError, match="rows: expected rows of one task, got xor, s4; choose"):
        plot.history([*rows, dict(rows[0], task="s4")])
    with pytest.raises(ValueError, match="rows: expected runs with the same layers, got a and b"):
        plot.history([probe_rows(layers="a"), probe_rows(layers="b")])


def test_names_that_matplotlib_would_hide_or_set_as_mathematics_are_shown():
    rows = probe_rows(layers=("_orig_mod.0", "cost $x", "0"))
    rows = [{**row, "layer": {"0": 0}.get(row["layer"], row["layer"])} for row in rows]  # as pandas has it
    figure = plot.history(rows).figure
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [" _orig_mod.0", r"cost \$x", "0"]
    figure.canvas.draw()
    assert plot.history(rows, layers="cost $x").get_title() == r"cost \$x"
    with pytest.raises(ValueError, match="layer: expected None, as the rows name no layer, got '9'"):
        plot.against([{"step": 0, "l2_norm": 1.0, "loss": 2.0}], x="l2_norm", y="loss", layer="9")
    with pytest.raises(ValueError, match="rows: expected rows, or groups of them, got none"):
        plot.history({})


def test_against_has_a_dot_for_each_row_and_pearsons_r():
    rows = [row | {"test_loss": row["test_loss"] ** 2} for row in run_rows()]
    ax = plot.against(rows, layer="hidden_1")
    (dots,) = ax.collections
    x, y = [row["lmn_hidden_1"] for row in rows], [row["test_loss"] for row in rows]
    assert dots.get_offsets().tolist() == [[a, b] for a, b in zip(x, y)]
    assert ax.get_title() == f"r = {np.corrcoef(x, y)[0, 1]:.3f}"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("LMN of hidden_1 (N = 7)", "Test loss")
    assert list(dots.get_array()) == [row["step"] for row in rows]
    assert [each.get_ylabel() for each in ax.figure.axes[1:]] == ["Training step"]  # of the colour bar
    ax = plot.against(probe_rows(), "lmn", "loss", layer="b")
    assert ax.collections[0].get_offsets().tolist() == [[1, 0], [2, 0.5], [11, 5], [101, 50]]


def test_against_colours_phases_and_says_r_of_one():
    phases = ["memorising", "generalising", "generalising", "generalising", "finalising", "finalising"]
    rows = [row | {"phase": phase} for row, phase in zip(run_rows(), phases)]
    rows[0]["test_loss"] = 1e3
    ax = plot.against(rows, layer="hidden_1", phase="generalising")
    assert ax.get_title() == "generalising: r = 1.000"
    assert [(dots.get_label(), len(dots.get_offsets())) for dots in ax.collections] == [
        *(("memorising", 1), ("generalising", 3), ("finalising", 2)),
    ]
    assert len({tuple(dots.get_facecolor()[0]) for dots in ax.collections}) == 3
    assert plot.against(rows[:2], layer="hidden_1").get_title() == ""  # two rows have no correlation
    assert [dots.get_label() for dots in plot.against(rows[:2], layer="hidden_1").collections] == phases[:2]
    assert plot.against(rows, layer="hidden_1", colour="step").collections[0].get_array()[1] == 10


def test_against_of_several_runs_says_the_median_of_their_correlations():
    up, down = run_rows(), [row | {"test_loss": -row["test_loss"]} for row in run_rows()]
    ax = plot.against([up, up, down], layer="hidden_1")
    assert ax.get_title() == "r = 1.000, median of 3 runs" and len(ax.collections[0].get_offsets()) == 18


def matrix(n=12, seed=0):
    torch.manual_seed(seed)
    f = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))
    return lmnfast.measure(f, torch.randn(n, 3)), f


def test_connectivity_shows_the_matrix_and_its_lmn():
    m, _ = matrix()
    for given in (m, m.connectivity):
        ax = plot.connectivity(given)
        (image,) = ax.images
        assert np.array_equal(image.get_array(), m.connectivity.double()) and image.get_clim() == (0, 1)
        assert ax.get_title() == f"LMN {m.lmn:.4g}, N = 12"
        assert (ax.get_xlabel(), ax.figure.axes[1].get_ylabel()) == ("Sample", "r²")
    opposite = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    assert plot.connectivity(opposite).images[0].get_clim() == (-1, 1)
    stand_in = lmnfast.measure(matrix()[1], torch.randn(5, 3), method="jacobian")
    ax = plot.connectivity(stand_in)
    assert ax.get_title().endswith("N = 5, jacobian") and "J" in ax.figure.axes[1].get_ylabel()


def test_clusters_stand_together_and_no_entry_changes():
    groups = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0])
    L = torch.where(groups[:, None] == groups, 1.0, 0.1).double()
    shown = plot.connectivity(L, cluster=True).images[0].get_array()
    assert not np.array_equal(shown, L)
    assert sorted(shown.reshape(-1)) == sorted(L.reshape(-1).tolist()) and np.array_equal(shown, shown.T)
    changes = (np.diff(shown[:, :], axis=0) != 0).any(1).sum()
    assert changes == 2  # three blocks
    assert plot.connectivity(torch.ones(1, 1), cluster=True).images[0].get_array().shape == (1, 1)


def test_spectrum_has_all_eigenvalues_by_magnitude_and_marks_negative_ones():
    m, _ = matrix(30)
    ax = plot.spectrum(m)
    w = torch.linalg.eigvalsh(m.connectivity.double()).numpy()
    w = w[np.argsort(-np.abs(w))]
    drawn = {line.get_label().partition(",")[0]: data(line) for line in ax.lines}
    for name, which in (("positive", w > 0), ("negative", w < 0)):
        assert np.allclose(drawn[name], [*zip(np.flatnonzero(which) + 1, np.abs(w[which]))])
    share = f"{100 * m.negative_share:.2g} % of the sum"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["positive", f"negative, {share}"]
    assert ax.get_yscale() == "log" and ax.get_title() == f"LMN {m.lmn:.4g}, N = 30"
    low, high = ax.get_ylim()
    assert low < np.abs(w).min() and np.abs(w).max() < high
    clipped = lmnfast.measure(matrix()[1], torch.randn(30, 3), negative="clip")
    ax = plot.spectrum(clipped)
    assert ax.get_title().endswith("negative ones clipped") and "count as 0" in ax.lines[1].get_label()


def test_the_spectrum_of_one_linear_map_is_one_eigenvalue_without_rounding():
    ax = plot.spectrum(torch.ones(20, 20) - 1e-13 * torch.eye(20))
    assert data(ax.lines[0]) == [(1, pytest.approx(20))] and len(ax.lines) == 1 and ax.get_legend() is None


def test_paths_draw_the_outputs_at_the_nodes_and_the_chords_with_the_entries_of_the_matrix():
    x, f = torch.randn(12, 3), matrix()[1]
    L = lmnfast.connectivity(f, x)
    ax = plot.paths(f, x, [(0, 1), (5, 2)], output=1)
    for k, (i, j) in enumerate([(0, 1), (5, 2)]):
        t = torch.linspace(0, 1, 21)[:, None]
        with torch.no_grad():
            y = f(x[i] + t * (x[j] - x[i]))[:, 1]
        curve, chord = ax.lines[2 * k], ax.lines[2 * k + 1]
        assert np.allclose(curve.get_ydata(), y, atol=1e-6) and np.allclose(curve.get_xdata(), t[:, 0])
        assert np.allclose(data(chord), [(0, y[0]), (1, y[-1])], atol=1e-6)
        assert chord.get_color() == curve.get_color() and chord.get_linestyle() == ":"
        assert curve.get_label() == f"{i} → {j}: r² = {L[i, j]:.3f}"
    assert ax.get_ylabel() == "Output 1 (of 0 to 1)"
    assert ax.get_legend().get_title().get_text() == "r²: mean over 2 outputs"
    assert f.training


def test_paths_draw_the_output_that_varies_most_and_the_names_that_were_given():
    def f(x):
        return torch.cat([x, 10 * x.abs(), x], 1)

    ax = plot.paths(f, torch.tensor([[-1.0], [1.0], [2.0]]), [(0, 1), (1, 2)], labels=["bent", "straight"])
    assert ax.get_ylabel() == "Output 1 (of 0 to 2)" and ax.lines[0].get_ydata().max() == 10
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["bent: r² = 0.667", "straight: r² = 1.000"]


def test_a_measurement_draws_its_matrix_beside_its_spectrum():
    m, _ = matrix()
    left, right = m.plot(cluster=True)
    assert left.figure is right.figure and left.images and right.get_yscale() == "log"
    given = small_figure(2)
    assert list(m.plot(ax=given)) == list(given)


DRAWINGS = {
    "history": lambda ax=None: plot.history([run_rows(), run_rows(3)], ax=ax),
    "against": lambda ax=None: plot.against(run_rows(), layer="hidden_1", ax=ax),
    "phases": lambda ax=None: plot.against([r | {"phase": "p"} for r in run_rows()], layer="hidden_1", ax=ax),
    "connectivity": lambda ax=None: plot.connectivity(matrix()[0], ax=ax),
    "spectrum": lambda ax=None: plot.spectrum(matrix()[0], ax=ax),
    "paths": lambda ax=None: plot.paths(matrix()[1], torch.randn(5, 3), [(0, 1), (1, 2)], ax=ax),
}


@pytest.mark.parametrize("drawing", DRAWINGS)
def test_given_axes_are_drawn_into_and_no_figure_of_pyplot_is_made(drawing):
    ax = small_figure()
    assert DRAWINGS[drawing](ax) is ax
    assert not pyplot.get_fignums() and ax.has_data()


@pytest.mark.parametrize("drawing", DRAWINGS)
def test_every_call_has_a_new_figure_with_letters_of_13_points(drawing):
    one, two = DRAWINGS[drawing](), DRAWINGS[drawing]()
    assert one.figure is not two.figure and len(pyplot.get_fignums()) == 2
    one.figure.canvas.draw()  # ticks are made now
    texts = [text for axes in one.figure.axes for text in (axes.xaxis.label, axes.yaxis.label, axes.title)]
    texts += [text for axes in one.figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert min(text.get_fontsize() for text in texts if text.get_text()) >= 13
    assert matplotlib.rcParams["font.size"] == 10


def brightness(colour):
    """Relative luminance, as in WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


def colours_of(figure):
    """The colours of all text, and of all lines and dots."""
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text()]
    marks = [line.get_color() for axes in figure.axes for line in axes.lines]
    for axes in figure.axes:
        for dots in axes.collections:
            if hasattr(dots, "get_offsets") and len(dots.get_offsets()) > 1:
                marks += list(dots.get_facecolor())
    return [t.get_color() for t in texts], marks


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("drawing", DRAWINGS)
def test_text_has_the_colour_of_the_style_and_marks_stand_out(drawing, style):
    matplotlib.style.use(style)
    figure = DRAWINGS[drawing]().figure
    figure.canvas.draw()
    texts, marks = colours_of(figure)
    ink, paper = matplotlib.rcParams["text.color"], matplotlib.rcParams["axes.facecolor"]
    assert to_rgb(ink) == ((1, 1, 1) if style == "dark_background" else (0, 0, 0))
    assert texts and {to_rgb(colour) for colour in texts} == {to_rgb(ink)}
    assert all(contrast(mark, paper) >= 1.8 for mark in marks)


ROWS = run_rows()
WRONG = {
    "no rows": (lambda: plot.history([]), "rows: expected one row or more in every run, got none"),
    "no rows in a run": (lambda: plot.history([ROWS, []]), "rows: expected one row or more in every run"),
    "no list": (lambda: plot.history(3), "rows: expected a list of rows, got int"),
    "numbers": (
        lambda: plot.history([1, 2]),
        "rows: expected a list of rows, or of such lists, got int in it",
    ),
    "column": (lambda: plot.history(ROWS, "test"), "observables: expected a column of the rows"),
    "nothing": (lambda: plot.history([{"step": 1}]), "observables: expected the names of columns"),
    "names": (lambda: plot.history(ROWS, []), "observables: expected a name or several, got"),
    "layer": (lambda: plot.history(ROWS, layers="c"), "layers: expected among hidden_1, hidden_2, got 'c'"),
    "words": (
        lambda: plot.history([{"step": 1, "lmn": "many"}], "lmn"),
        "rows: expected numbers in column 'lmn', got 'many'",
    ),
    "x": (
        lambda: plot.history(ROWS, x="epoch"),
        "x: expected a column of the rows with numbers, got 'epoch'",
    ),
    "nothing in common": (
        lambda: plot.history([ROWS, run_rows(steps=[5, 15])]),
        "x: expected runs that have some step in common, got none",
    ),
    "axes": (
        lambda: plot.history(ROWS, ["lmn", "l2_norm"], ax=small_figure()),
        "ax: expected 2 Axes of matplotlib or None",
    ),
    "no axes": (
        lambda: plot.spectrum(torch.eye(2), ax=3),
        "ax: expected 1 Axes of matplotlib or None, got 3",
    ),
    "layers": (lambda: plot.against(ROWS), "layer: expected one of hidden_1, hidden_2, got None"),
    "a layer": (
        lambda: plot.against(probe_rows(), y="loss", layer="c"),
        "layer: expected one of a, b, got 'c'",
    ),
    "y": (lambda: plot.against(ROWS, y="f1", layer="hidden_1"), "y: expected a column of the rows"),
    "phase": (
        lambda: plot.against(ROWS, layer="hidden_1", phase="x"),
        "phase: expected one of the rows' (None), got 'x'",
    ),
    "array": (lambda: plot.connectivity(np.eye(3)), "L: expected a floating-point tensor, got a numpy array"),
    "matrices": (
        lambda: plot.spectrum(torch.eye(3).expand(2, 3, 3)),
        "L: expected one matrix (N, N), got shape (2, 3, 3)",
    ),
    "no pairs": (
        lambda: plot.paths(torch.abs, torch.ones(3, 1), []),
        "pairs: expected one pair or more, got none",
    ),
    "pair": (lambda: plot.paths(torch.abs, torch.ones(3, 1), [(0, 3)]), "samples from 0 to 2, got (0, 3)"),
    "same": (
        lambda: plot.paths(torch.abs, torch.ones(3, 1), [(1, 1)]),
        "two different samples from 0 to 2, got (1, 1)",
    ),
    "ints": (
        lambda: plot.paths(torch.abs, torch.ones(3, 1), [0, 1]),
        "pairs: expected pairs (i, j) of samples, got [0, 1]",
    ),
    "labels": (
        lambda: plot.paths(torch.abs, torch.ones(3, 1), [(0, 1)], labels=["a", "b"]),
        "labels: expected 1, one for each pair, got 2",
    ),
    "output": (
        lambda: plot.paths(torch.abs, torch.randn(3, 1), [(0, 1)], output=1),
        "output: expected 0 to 0, got 1",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_one_error_and_leaves_no_empty_figure(wrong):
    call, text = WRONG[wrong]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert text in str(error.value)
    assert not pyplot.get_fignums()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib: not installed; pip install lmnfast\[plot\]"):
        plot.history(ROWS)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    with pytest.raises(
        ImportError, match=r"scipy.cluster.hierarchy: not installed; pip install lmnfast\[plot\]"
    ):
        plot.connectivity(torch.eye(3), cluster=True)


def test_importing_the_module_of_figures_imports_no_matplotlib(tmp_path):
    script = tmp_path / "code.py"
    script.write_text(
        "import sys, lmnfast; lmnfast.plot.history; print({'matplotlib', 'scipy', 'pandas'} & set(sys.modules))"
    )
    assert run_fresh(script, tmp_path).stdout == "set()\n"


def test_the_pages_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plots.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 6 and len(pyplot.get_fignums()) == 10 and len(names["axes"]) == 3
