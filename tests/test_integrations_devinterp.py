"""Columns of local learning coefficients, from results of both versions of devinterp."""

import math

import numpy
import pytest
import torch

import lmnfast
from lmnfast.integrations import with_llc

ROWS = [{"step": step, "layer": layer, "lmn": 1.0 + step} for step in (0, 10, 20) for layer in ("0", "1")]


class Dataset(dict):
    """As xarray.Dataset here: names in it, items by name; an item is no float, but converts to one."""

    def __init__(self, **values):
        super().__init__({name: numpy.array(value) for name, value in values.items()})


def test_results_of_both_versions_become_columns():
    second = Dataset(llc_mean=4.5, llc_std=0.5, llc_per_chain=[4.0, 5.0], llc_scalar=4.5, init_loss=0.1)
    first = {"llc/mean": 3.5, "llc/std": math.nan, "llc-chain/0": 3.5, "loss/trace": numpy.zeros((1, 2))}
    rows = with_llc(ROWS, {0: first, 20: second})
    assert [row["llc_mean"] for row in rows] == [3.5, 3.5, None, None, 4.5, 4.5]
    assert [row["llc_std"] for row in rows[2:]] == [None, None, 0.5, 0.5] and math.isnan(rows[0]["llc_std"])
    assert all(type(row["llc_mean"]) is float for row in rows if row["llc_mean"] is not None)
    assert [{name: row[name] for name in ROWS[0]} for row in rows] == ROWS and "llc_mean" not in ROWS[0]
    by_file = [{"checkpoint": f"{n}.pt", "lmn": 2.0} for n in (1, 2)]
    rows = with_llc(by_file, {"2.pt": {"llc_mean": torch.tensor(1.25), "llc_std": 0}}, by="checkpoint")
    assert [row["llc_mean"] for row in rows] == [None, 1.25]


def test_the_columns_are_drawn():
    pytest.importorskip("matplotlib")
    rows = with_llc(ROWS, {step: {"llc_mean": step / 2, "llc_std": 0.1} for step in (0, 20)})
    axes = lmnfast.plot.against(rows, x="lmn", y="llc_mean", layer="0")
    assert axes.get_ylabel() == "Llc mean"
    points = [tuple(point) for drawn in axes.collections for point in drawn.get_offsets().data]
    assert sorted(set(points)) == [(1, 0), (21, 10)], "the step without a result is left out"


@pytest.mark.parametrize(
    "rows, results, by, message",
    [
        (ROWS, {5: {"llc_mean": 1, "llc_std": 0}}, "step", "results: expected a step of the rows for each, got 5"),
        (ROWS, {0: {"llc/means": [1], "llc/stds": [0]}}, "step",
         "results: expected llc_mean or llc/mean in each, got at 0 llc/means, llc/stds"),
        (ROWS, {0: {"llc_mean": 1}}, "step", "results: expected llc_std or llc/std in each"),
        (ROWS, {}, "epoch", "by: expected a column of the rows, got 'epoch'; they have step, layer, lmn"),
        ([{"step": 0, "llc_std": 1}], {}, "step", "rows: expected none with llc_std, got them at step 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_an_error_that_says_why(rows, results, by, message):
    with pytest.raises(ValueError, match=message):
        with_llc(rows, results, by)
