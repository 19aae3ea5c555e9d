"""Affine maps at the start of a tail run on the samples alone."""

import pytest
import torch
import torch.nn.functional as F
from architectures import ResidualMLP, images, normed, trained_a_little, vectors
from support import UNIFORM
from torch import nn

import lmnfast
from lmnfast import _prepare, reference
from lmnfast._affine import affine_start


class Starts(nn.Module):
    """Affine maps of every kind behind the layer, then no chain."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3)
        self.affine = nn.Sequential(
            nn.Dropout(),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(45, 7),
        )
        self.weight = nn.Parameter(torch.randn(6, 7))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(F.linear(self.affine(self.layer(x)), self.weight)))


def test_affine_maps_at_the_start_run_on_the_samples_alone(monkeypatch):
    x = images()
    model = trained_a_little(Starts(), x)
    tail, samples = lmnfast.cut(model, "layer", x)
    with torch.no_grad():
        truth = reference.path_connectivity(tail.double().eval(), samples.double(), *UNIFORM)
    tail.float()
    hoisted = affine_start(tail)
    assert hoisted[0](samples).shape == (9, 6)
    rows = []
    model.affine[1].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    lmnfast.connectivity(tail, samples)
    assert max(rows) > 9, "a hook of the user's sees every point, as it may do anything"
    model.affine[1]._forward_hooks.clear()
    calls = []
    outputs_of = _prepare.outputs_of
    monkeypatch.setattr(_prepare, "outputs_of", lambda f, x: calls.append(x.shape[1:]) or outputs_of(f, x))
    L = lmnfast.connectivity(tail, samples)
    assert calls[-1] == (6,) and (L - truth).abs().max() < 2e-5
    assert torch.equal(lmnfast.connectivity(tail, samples, method="hermite").diagonal(), torch.ones(9))


def test_an_affine_end_at_the_last_position_has_lmn_1():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 64), nn.Linear(64, 3)

        def forward(self, x):
            return self.head(self.first(x)[:, -1])

    tail, samples = lmnfast.cut(Last(), "first", 30 * torch.randn(20, 5, 6))
    first, rest = affine_start(tail)
    assert first(samples).shape == (20, 3) and torch.equal(rest(first(samples)), tail(samples))
    assert float(lmnfast.lmn(tail, samples)) == pytest.approx(1, abs=1e-9)
    moved = lmnfast.cut(nn.Sequential(nn.Identity(), RowsMoved()), "0", vectors())[0]
    assert affine_start(moved) is None  # an index of rows is none of values


class RowsMoved(nn.Linear):
    def __init__(self):
        super().__init__(6, 2)

    def forward(self, x):
        return super().forward(x[[*range(len(x))], :] if isinstance(x, torch.Tensor) else x[0:])


def test_what_is_used_again_later_is_not_taken_off_the_start():
    x = vectors()
    tail, _ = lmnfast.cut(ResidualMLP(), "stem", x)
    assert affine_start(tail) is None  # the block and the sum both take the samples
    tail, _ = lmnfast.cut(nn.Sequential(nn.Identity(), ResidualMLP()), "0", x)
    first, _ = affine_start(tail)
    assert first(x).shape == (14, 10)
    for other in (nn.Linear(3, 2), torch.tanh, lmnfast.cut(normed(), "0", x)[0]):
        assert affine_start(other) is None
    batch = nn.Sequential(
        nn.Identity(), nn.BatchNorm1d(6, track_running_stats=False), nn.PReLU(), nn.Linear(6, 2)
    )
    assert affine_start(lmnfast.cut(batch, "0", x)[0]) is None
