"""Observables of the paper's training, and of its checkpoints."""

from dataclasses import replace

import pytest
from tiny import TINY

from lmnfast import cli
from lmnfast.grokking.measure import measure
from lmnfast.grokking.training import train


def test_a_run_with_observables_has_their_columns_and_is_measured_again_with_others(tmp_path, capsys):
    config = replace(TINY, layers=("hidden_1",), observables=("curvature", "l2_norm", "jacobian_rank"))
    run = train(config, tmp_path / "run")
    plain = train(replace(config, observables=()), tmp_path / "plain")
    for row, other in zip(run.rows, plain.rows, strict=True):
        assert {name: row[name] for name in other} == other, "the training is the same"
        assert list(row)[-2:] == ["curvature_hidden_1", "jacobian_rank_hidden_1"]
        assert 0 < row["curvature_hidden_1"] < 1 < row["jacobian_rank_hidden_1"]
    with pytest.raises(ValueError, match="observables is .* there"):
        train(replace(config, observables=("curvature",)), tmp_path / "run")
    table, rows = measure(run.path)
    assert table.name.endswith("-and-curvature+l2_norm+jacobian_rank.csv")
    for again, row in zip(rows, run.rows, strict=True):
        for name in ("curvature_hidden_1", "jacobian_rank_hidden_1"):
            assert again[name] == pytest.approx(row[name], rel=1e-6)
        assert again["l2_norm_hidden_1"] == pytest.approx(row["l2_norm"], rel=1e-6)
    capsys.readouterr()
    assert cli.main(["measure", str(run.path), "--observables=participation_ratio,lmn"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["step", "lmn_hidden_1", "participation_ratio_hidden_1"]
    train(config, tmp_path / "run", force=True)
    assert not list(run.path.glob("measure*.csv"))
