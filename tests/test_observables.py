"""Numbers beside the linear mapping number, each against its formula in float64 PyTorch."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmnfast
from lmnfast import _observables, _observed
from lmnfast.probe import COLUMNS
from lmnfast.quadrature import path_nodes

NAMES = [each.name for each in _observables.BUILT_IN]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A test begins with the package's own observables. What it registers is gone after it."""
    own = {each.name: each for each in _observables.BUILT_IN}
    monkeypatch.setattr(_observables, "_registry", own)


def mlp(activation=nn.SiLU, dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), activation(), nn.Linear(9, 4)).to(dtype)


def samples(n=14, dtype=torch.float64):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(2), dtype=dtype)


def pooled_matrix(f, x):
    """R2 pooled over outputs along every path, from its definition."""
    t, w = path_nodes("uniform", 21)
    centred = t - w @ t
    R = torch.ones(len(x), len(x), dtype=torch.float64)
    for i, a in enumerate(x):
        for j, b in enumerate(x):
            if i != j:
                y = f(a + t[:, None] * (b - a)).detach()
                y = y - w @ y
                c, q = (w * centred) @ y, w @ y**2
                R[i, j] = (c**2).sum() / ((w @ centred**2) * q.sum())
    return R


def effective_rank(values):
    p = values[values > 0] / values.sum()
    return torch.exp(-(p * p.log()).sum()).item()


def expected_values(f, x):
    """All observables of a network whose first hidden layer is f[0], in plain torch."""
    L = lmnfast.connectivity(f, x)
    w = torch.linalg.eigvalsh(L)
    p = w.abs() / w.abs().sum()
    above = torch.triu_indices(len(x), len(x), 1)
    J = torch.func.vmap(torch.func.jacrev(f))(x).flatten(1).detach()
    z = f[0](x).detach()
    crossings = [(z[i] * z[j] < 0).sum() for i, j in above.T.tolist()]
    bits = -(p * p.log2()).sum().item()
    return {
        "lmn": 2**bits,
        "complexity_bits": bits,
        "curvature": 1 - L[above[0], above[1]].mean().item(),
        "pooled_curvature": 1 - pooled_matrix(f, x)[above[0], above[1]].mean().item(),
        "participation_ratio": (w.sum() ** 2 / (w**2).sum()).item(),
        "negative_share": (-w[w < 0].sum() / w.abs().sum()).item(),
        "jacobian_rank": effective_rank(torch.linalg.eigvalsh(J @ J.T).clamp(min=0)),
        "local_complexity": torch.stack(crossings).double().mean().item(),
        "representation_rank": effective_rank(torch.linalg.svdvals(x)),
        "l2_norm": nn.utils.parameters_to_vector(f.parameters()).norm().item(),
    }


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.GELU, nn.Tanh])
def test_every_observable_is_its_formula(activation):
    f, x = mlp(activation), samples()
    m = lmnfast.measure(f, x, observables=NAMES)
    assert list(m.observables) == NAMES
    assert m.observables == pytest.approx(expected_values(f, x), rel=1e-9)
    assert m.observables["lmn"] == m.lmn and m.observables["negative_share"] == m.negative_share


def test_in_float32_they_are_those_of_float64_to_rounding():
    f, x = mlp(), samples()
    expected = expected_values(f, x)
    m = lmnfast.measure(mlp(dtype=torch.float32), x.float(), observables=NAMES)
    assert m.observables == pytest.approx(expected, rel=1e-4)


def test_the_curvatures_are_those_of_the_estimate_from_all_pairs():
    f, x = mlp(), samples()
    m = lmnfast.measure(f, x, observables=["curvature", "pooled_curvature"])
    for name, pooled in (("curvature", False), ("pooled_curvature", True)):
        assert m.observables[name] == pytest.approx(lmnfast.curvature(f, x, pooled=pooled).value, rel=1e-9)


def test_pooled_curvature_does_not_see_a_rotation_of_the_outputs():
    f, x = mlp(), samples()
    Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    g = nn.Sequential(f, nn.Linear(4, 4, bias=False, dtype=torch.float64))
    g[1].weight.data = Q
    values = []
    for network in (f, g):
        m = lmnfast.measure(network, x, observables=["curvature", "pooled_curvature"])
        values.append(m.observables)
    assert values[0]["pooled_curvature"] == pytest.approx(values[1]["pooled_curvature"], rel=1e-9)
    assert values[0]["curvature"] != pytest.approx(values[1]["curvature"], rel=1e-3)


@pytest.mark.parametrize("n", [5, 40])
def test_the_jacobian_rank_is_the_same_by_every_route(n, monkeypatch):
    """A chain by features, smaller or larger than N; the same network differentiated, at once and by tiles."""
    f, x = mlp(), samples(n)
    J = torch.func.vmap(torch.func.jacrev(f))(x).flatten(1)
    expected = effective_rank(torch.linalg.eigvalsh(J @ J.T).clamp(min=0).detach())
    deep = nn.Sequential(f, nn.Identity(), nn.Tanh(), nn.Linear(4, 2, dtype=torch.float64))
    for most in (_observed.ALL_JACOBIANS, 16 * 24 * 3):
        monkeypatch.setattr(_observed, "ALL_JACOBIANS", most)
        for function in (f, lambda t: f(t)):
            found = lmnfast.measure(function, x, observables="jacobian_rank").observables["jacobian_rank"]
            assert found == pytest.approx(expected, rel=1e-9)
        J = torch.func.vmap(torch.func.jacrev(deep))(x).flatten(1)
        found = lmnfast.measure(deep, x, observables="jacobian_rank").observables["jacobian_rank"]
        assert found == pytest.approx(
            effective_rank(torch.linalg.eigvalsh(J @ J.T).clamp(min=0).detach()), rel=1e-9
        )


def test_a_linear_map_has_one_jacobian_no_bend_and_no_crossing():
    m = lmnfast.measure(nn.Linear(6, 3), samples(dtype=torch.float32), observables=NAMES[2:3] + NAMES[6:8])
    assert m.observables == pytest.approx(
        {"curvature": 0, "jacobian_rank": 1, "local_complexity": 0}, abs=1e-5
    )


def test_a_zero_counts_on_neither_side():
    f = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    x = torch.tensor([[-1.0], [0.0], [2.0], [3.0]])
    f[0].weight.data.fill_(1.0)
    m = lmnfast.measure(f, x, observables="local_complexity")
    assert m.observables == {"local_complexity": 2 / 6}


def test_local_complexity_of_samples_that_are_the_pre_activations():
    tail, x = nn.Sequential(nn.SiLU(), nn.Linear(6, 3)), samples(dtype=torch.float32)
    crossings = [(x[i] * x[j] < 0).sum() for i in range(len(x)) for j in range(i)]
    m = lmnfast.measure(tail, x, observables="local_complexity")
    expected = torch.stack(crossings).double().mean().item()
    assert m.observables["local_complexity"] == pytest.approx(expected)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_local_complexity_of_a_block_counts_ends_on_two_sides():
    f, x = Block(), samples(dtype=torch.float32)
    z = f.up(f.norm(x)).detach()
    crossings = [(z[i] * z[j] < 0).sum() for i in range(len(x)) for j in range(i)]
    m = lmnfast.measure(f, x, observables="local_complexity")
    expected = torch.stack(crossings).double().mean().item()
    assert m.observables["local_complexity"] == pytest.approx(expected)


class Sin(nn.Module):
    def forward(self, x):
        return torch.sin(x)


@pytest.mark.parametrize(
    "f, name, why",
    [
        (lambda x: x.cumsum(1).tanh(), "local_complexity", "its first hidden layer is not known"),
        (nn.Sequential(nn.Linear(6, 3), Sin()), "local_complexity", "sin"),
        (lambda x: x.tanh(), "l2_norm", "it is no nn.Module"),
        (lambda x: x.detach().tanh(), "jacobian_rank", "cannot be differentiated"),
    ],
)
def test_what_does_not_apply_is_named_once_and_the_others_are_measured(f, name, why):
    with pytest.warns(
        UserWarning, match=f"^f: observable '{name}' does not apply, its value is NaN: .*{why}"
    ) as said:
        m = lmnfast.measure(f, samples(dtype=torch.float32), observables=[name, "curvature"])
    assert len(said) == 1
    assert math.isnan(m.observables[name]) and 0 <= m.observables["curvature"] < 1
    assert m == lmnfast.Measurement(**m.to_dict()) and hash(m)


def test_without_paths_there_is_no_pooled_curvature():
    with pytest.warns(
        UserWarning, match="'pooled_curvature' does not apply, .*: the method gives no pooled matrix"
    ):
        m = lmnfast.measure(
            mlp(), samples(), method="jacobian", observables=["curvature", "pooled_curvature"]
        )
    assert math.isnan(m.observables["pooled_curvature"]) and m.observables["curvature"] > 0


def test_observables_follow_the_stabiliser():
    f, x = mlp(), samples()
    plain, bent = (
        lmnfast.measure(f, x, stabiliser=s, observables=["curvature", "pooled_curvature"]).observables
        for s in (0, 1e-3)
    )
    assert all(bent[name] > plain[name] for name in plain)


def test_of_zeros_there_is_no_rank():
    f = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        f[2].weight.zero_()
    with pytest.warns(UserWarning, match="does not apply") as said:
        m = lmnfast.measure(f, torch.zeros(4, 6), observables=["jacobian_rank", "representation_rank"])
    assert len(said) == 2 and all(map(math.isnan, m.observables.values()))


def test_one_sample_has_no_pairs():
    names = ["curvature", "local_complexity", "participation_ratio", "jacobian_rank", "representation_rank"]
    m = lmnfast.measure(mlp(), samples(1), observables=names)
    assert list(m.observables.values()) == pytest.approx([0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    "given, message",
    [
        ("lmm", f"observables: expected among {', '.join(NAMES)}, got 'lmm'"),
        (["lmn", "rank", "x"], f"observables: expected among {', '.join(NAMES)}, got 'rank'"),
        (["lmn", "lmn"], "observables: expected different ones, got lmn, lmn"),
    ],
)
def test_wrong_names_are_refused_before_any_work(given, message):
    def never(x):
        raise AssertionError

    with pytest.raises(ValueError) as error:
        lmnfast.measure(never, samples(), observables=given)
    assert str(error.value) == message


def test_a_measurement_with_observables_is_kept_and_shown():
    f, x = mlp(), samples()
    plain, m = lmnfast.measure(f, x), lmnfast.measure(f, x, observables="curvature")
    assert plain.observables == {} and "observables" not in repr(plain)
    assert "curvature" in repr(m) and m != plain and m.lmn == plain.lmn
    assert m == lmnfast.measure(f, x, observables=["curvature"])


def test_ratios_are_batched_and_in_float64():
    L = torch.stack([torch.eye(6), torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))])
    assert lmnfast.participation_ratio(L).tolist() == pytest.approx([6, 2])
    assert lmnfast.participation_ratio(L).dtype == torch.float64
    A = torch.randn(2, 3, 7, 7)
    A = A + A.mT
    w = torch.linalg.eigvalsh(A.double())
    assert torch.allclose(lmnfast.negative_share(A), -w.clamp(max=0).sum(-1) / w.abs().sum(-1), atol=1e-12)
    A.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    w = torch.linalg.eigvalsh(A.double())
    assert torch.allclose(lmnfast.participation_ratio(A), w.sum(-1) ** 2 / (w**2).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("ratio", [lmnfast.participation_ratio, lmnfast.negative_share])
@pytest.mark.parametrize(
    "L, kind",
    [
        (np.eye(3), TypeError),
        (torch.ones(2, 3), ValueError),
        (torch.full((2, 2), torch.nan), ValueError),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), ValueError),
        (torch.zeros(3, 3), ValueError),
    ],
)
def test_ratios_refuse_what_their_neighbours_refuse(ratio, L, kind):
    with pytest.raises(kind, match="^L: expected"):
        ratio(L)


def test_the_list_is_text_and_plain_values():
    listed = lmnfast.observables()
    assert len(listed) == 10 and json.loads(json.dumps(listed.as_dict())) == listed.as_dict()
    for each in listed:
        assert each.name in str(listed) and each.formula in str(listed)
        assert all(listed.as_dict()[each.name].values())
        assert max(map(len, str(each).splitlines())) < 400
    assert listed["l2_norm"].reads == ("model",) and repr(listed) == str(listed)


def test_a_registered_observable_is_measured_and_listed():
    seen = []

    def weight(o):
        seen.append(o)
        return o.network[0].weight.sum() + o.samples.sum() + o.connectivity.sum()

    lmnfast.register_observable("weight", weight, formula="W", limits="all")
    lmnfast.register_observable("bits", lambda o: o.spectrum.lmn**2, reads=["spectrum"])
    lmnfast.register_observable("none", lambda o: None, reads="samples")
    lmnfast.register_observable("later", lambda o: lambda: torch.tensor(3), reads="network")
    f, x = mlp(), samples()
    with pytest.warns(UserWarning, match="'none' does not apply, its value is NaN: its function says so"):
        m = lmnfast.measure(f, x, observables=["weight", "bits", "none", "later"])
    expected = f[0].weight.detach().sum() + x.sum() + m.connectivity.sum()
    assert m.observables["weight"] == pytest.approx(expected.item())
    assert m.observables["bits"] == m.lmn**2 and m.observables["later"] == 3
    assert seen[0].model is f and seen[0].spectrum is None  # not among those it reads
    assert lmnfast.observables()["weight"].limits == "all" and "weight:\n  formula: W" in str(
        lmnfast.observables()
    )
    lmnfast.register_observable("weight", lambda o: 5)
    assert lmnfast.measure(f, x, observables="weight").observables == {"weight": 5.0}


def test_a_registered_function_may_draw_and_train_without_a_trace():
    def disturbs(o):
        assert not o.model.training and not torch.is_grad_enabled()
        o.model.counted = 1
        return torch.rand(()) + o.network(o.samples).sum()

    lmnfast.register_observable("disturbs", disturbs, reads=["network", "model", "samples"])
    f, x = mlp().train(), samples()
    before = torch.get_rng_state()
    first = lmnfast.measure(f, x, observables="disturbs")
    assert f.training and torch.is_grad_enabled() and not hasattr(f, "counted")
    assert torch.equal(before, torch.get_rng_state())
    assert first == lmnfast.measure(f, x, observables="disturbs")


@pytest.mark.parametrize(
    "name, function, reads, message",
    [
        ("two words", len, ["samples"], "name: expected a Python identifier, got 'two words'"),
        (3, len, ["samples"], "name: expected a Python identifier, got 3"),
        ("lmn", len, ["samples"], "name: expected one that is not the package's own, got 'lmn'"),
        ("good", 3, ["samples"], "function: expected a function of an Observation, got int"),
        ("good", len, ["weights"], "reads: expected among connectivity, .*, got 'weights'"),
        (
            "good",
            len,
            ["spectrum", "model"],
            "reads: expected 'spectrum' without 'network' and 'model', got both",
        ),
    ],
)
def test_wrong_registrations_are_refused(name, function, reads, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}$"):
        lmnfast.register_observable(name, function, reads=reads)
    assert [each.name for each in lmnfast.observables()] == NAMES


@pytest.mark.parametrize("name", COLUMNS)
def test_no_column_of_a_row_can_be_registered(name):
    with pytest.raises(ValueError, match="name: expected one that is not the package's own"):
        lmnfast.register_observable(name, len)


def test_without_observables_nothing_is_computed(monkeypatch):
    monkeypatch.setattr(_observables.Values, "observe", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lmnfast.measure(mlp(), samples())


def test_what_a_registered_function_does_to_parameters_is_put_back():
    def harmful(o):
        for p in o.model.parameters():
            p.zero_()
        o.model[0].weight.requires_grad_(False)
        return 1.0

    lmnfast.register_observable("harmful", harmful, reads=["model"])
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(16, 4)
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(x).square().sum()  # a graph over the measurement, as with accumulated gradients
    assert lmnfast.measure(model, x, observables="harmful").observables == {"harmful": 1.0}
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.requires_grad for p in model.parameters())
    loss.backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_the_model_is_withheld_from_those_who_do_not_read_it():
    seen = []
    lmnfast.register_observable("blind", lambda o: seen.append(o.model) or 1, reads=["connectivity"])
    lmnfast.register_observable("caller", lambda o: o.network(o.samples).sum(), reads=["samples"])
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(16, 4)
    lmnfast.measure(model, x, observables="blind")
    assert seen == [None]
    lmnfast.register_observable(
        "blind", lambda o: seen.append((o.spectrum, o.pooled)) or 1, reads=["connectivity"]
    )
    lmnfast.measure(model, x, observables=("blind", "lmn", "pooled_curvature"))
    assert seen[1:] == [(None, None)]
    with pytest.raises(ValueError, match="observable 'caller': ValueError: expected 'network' among `reads`"):
        lmnfast.measure(model, x, observables="caller")


@pytest.mark.parametrize(
    "result", [torch.ones(2), "abc", "3.5", [1], float, lambda: "later"], ids=lambda value: str(value)[:9]
)
def test_a_function_that_returns_no_number_is_named(result):
    lmnfast.register_observable("wrong", lambda o: result, reads=["connectivity"])
    lmnfast.register_observable("raises", lambda o: 1 / 0, reads=["connectivity"])
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(9, 4)
    with pytest.raises(
        ValueError, match="^observable 'wrong': .*; expected a function that returns a number"
    ):
        lmnfast.measure(model, x, observables="wrong")
    with pytest.raises(
        ValueError, match="^observable 'raises': ZeroDivisionError: division by zero; expected"
    ):
        lmnfast.measure(model, x, observables="raises")


@pytest.mark.parametrize("names", [None, 3, [["lmn"]], [1]])
def test_names_that_are_none_are_refused_by_the_arguments_name(names):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), torch.randn(9, 4)
    with pytest.raises(TypeError, match="^observables: expected a name or a sequence of names, got"):
        lmnfast.measure(model, x, observables=names)
    with pytest.raises(TypeError, match="^reads: expected a name or a sequence of names, got"):
        lmnfast.register_observable("mine", len, reads=names)
