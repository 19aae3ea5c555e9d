"""The observable for ComfyResearch, against stand-ins of the names that its documentation has."""

import ast
import copy
import math
import runpy
import sys
from collections import defaultdict
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import lmnfast

FILE = Path(__file__).parent.parent / "examples" / "comfyresearch" / "linear_mapping_number.py"

# The fields of the definitions that the file uses: comfy_research/nodes/schema.py.
SCHEMA = {
    "FrontendSpec": (),
    "IntField": ("key", "label", "default", "min"),
    "StringField": ("key", "label", "default"),
    "SpawnSpec": ("kind", "unit"),
    "VizSpec": ("variant", "title", "info_markdown", "spawns", "user_whitelisted", "spawn"),
    "ObservableDef": ("type", "label", "hint", "viz", "fields", "frontend"),
}


@pytest.fixture
def recorder(monkeypatch):
    """The definition and its recorder, as ComfyResearch finds them."""
    registry, schema, found = ModuleType("registry"), ModuleType("schema"), {}
    registry.observable_def = lambda definition: found.setdefault("definition", definition)

    def recorder_for(definition):
        assert definition is found["definition"]
        return lambda function: found.setdefault("record", function)

    registry.recorder_for = recorder_for
    for name, fields in SCHEMA.items():
        setattr(schema, name, make_dataclass(name, fields, frozen=True))
    for name in ("comfy_research", "comfy_research.nodes"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "comfy_research.nodes.registry", registry)
    monkeypatch.setitem(sys.modules, "comfy_research.nodes.schema", schema)
    runpy.run_path(str(FILE))
    return SimpleNamespace(**found)


def state(model, x):
    return SimpleNamespace(model=model, x_t=x, observable_metric_histories=defaultdict(list))


def test_each_call_appends_the_number_of_the_layer_and_changes_nothing(recorder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(), nn.Linear(8, 3))
    x, before = torch.randn(64, 5), copy.deepcopy(model.state_dict())
    rec, random = state(model, x), torch.get_rng_state()
    nodes = [SimpleNamespace(id="a", data=None), SimpleNamespace(id="b", data={"samples": 20, "layer": "0"})]
    for _ in range(2):
        for node in nodes:
            recorder.record(rec, node)
    first = lmnfast.lmn(*lmnfast.cut(model, "inputs", x)).item()
    second = lmnfast.lmn(*lmnfast.cut(model, "0", x[:20])).item()
    assert rec.observable_metric_histories == {"a": [first] * 2, "b": [second] * 2} and 1 < second < 20
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {field.key: field.default for field in recorder.definition.fields} == {
        "samples": 100, "layer": "inputs"
    }  # fmt: skip


def test_what_cannot_be_measured_is_nan_and_says_why(recorder):
    tokens = torch.randint(0, 9, (30, 4))
    model = nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(20, 8), nn.SiLU(), nn.Linear(8, 3))
    rec = state(model, tokens)
    with pytest.warns(UserWarning, match="linear mapping number: "):
        recorder.record(rec, SimpleNamespace(id="a", data={"layer": "inputs"}))
    recorder.record(rec, SimpleNamespace(id="a", data={"layer": "0"}))
    nan, number = rec.observable_metric_histories["a"]
    assert math.isnan(nan) and number == lmnfast.lmn(*lmnfast.cut(model, "0", tokens)).item()


def test_the_definition_imports_nothing_heavy():
    imported = {
        node.module or "" for node in ast.parse(FILE.read_text()).body if isinstance(node, ast.ImportFrom)
    }
    assert imported == {
        "__future__",
        "typing",
        "comfy_research.nodes.registry",
        "comfy_research.nodes.schema",
    }
    assert not any(isinstance(node, ast.Import) for node in ast.parse(FILE.read_text()).body)
