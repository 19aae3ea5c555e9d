"""The names of the package are imported at their first use, and a user sees no difference."""

import ast
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from fresh import run_fresh

import lmnfast
from lmnfast import grokking
from lmnfast._choices import OBSERVABLES

PACKAGES = (lmnfast, grokking)


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_and_python_see_the_same_names(package):
    tree = ast.parse(Path(package.__file__).read_text())
    (choice,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in choice.body if isinstance(node, ast.ImportFrom)]
    imported = {(node.module, alias.name) for node in imports if node.module for alias in node.names}
    modules = {alias.name for node in imports if not node.module for alias in node.names}
    homes = next(node for node in ast.walk(choice.orelse[0]) if isinstance(node, ast.Dict))
    lazily = {(home, name) for home, names in ast.literal_eval(homes).items() for name in names.split()}
    assert lazily == imported
    assert sorted([*modules, *(name for _, name in imported)]) == sorted(package.__all__)
    assert all(inspect.ismodule(getattr(package, name)) for name in modules)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_has_the_name_of_something_else_that_is_public(package):
    modules = {path.stem for path in Path(package.__file__).parent.iterdir()}
    assert all(inspect.ismodule(getattr(package, name)) for name in modules & set(package.__all__))


def test_torch_is_imported_at_the_first_use(tmp_path):
    code = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
    del sys.modules[name]  # the process came with torch
import lmnfast
assert {"measure", "Probe", "__version__"} <= set(dir(lmnfast)), dir(lmnfast)
assert not hasattr(lmnfast, "__wrapped__") and not hasattr(lmnfast, "nothing")
assert "torch" not in sys.modules
"""
    (tmp_path / "code.py").write_text(code)
    done = run_fresh(tmp_path / "code.py", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "use",
    [
        "from lmnfast import *; assert callable(lmn) and callable(measure)",
        "import lmnfast; lmnfast.match_layers",
        "from lmnfast import match_layers",
        "import lmnfast.spectrum",
        "import lmnfast; lmnfast.ops.path_r2",
        "import lmnfast; lmnfast.checkpoints.load_inputs; lmnfast.Probe",
        "import lmnfast.grokking; lmnfast.grokking.train; lmnfast.quadrature.path_nodes",
    ],
)
def test_every_use_registers_the_ops(use, tmp_path):
    ops = ("path_connectivity", "path_r2", "jacobian", "spectral_entropy")
    (tmp_path / "code.py").write_text(
        f"{use}\nimport torch, lmnfast\nassert all(hasattr(torch.ops.lmnfast, op) for op in {ops})\n"
        "assert callable(lmnfast.measure) and lmnfast.measure.__name__ == 'measure'\n"
    )
    done = run_fresh(tmp_path / "code.py", tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error_and_an_import_error():
    with pytest.raises(AttributeError, match="^module 'lmnfast' has no attribute 'mesure'"):
        _ = lmnfast.mesure
    with pytest.raises(ImportError, match="cannot import name 'mesure' from 'lmnfast'"):
        from lmnfast import mesure  # noqa: F401


def test_a_core_that_does_not_load_is_named_at_the_first_use(tmp_path):
    code = """
import sys
sys.modules["lmnfast._C"] = None
import lmnfast
try:
    lmnfast.lmn
except ImportError as error:
    print(error)
"""
    (tmp_path / "code.py").write_text(code)
    done = run_fresh(tmp_path / "code.py", tmp_path)
    assert done.stdout.startswith("lmnfast's compiled core is missing or does not load ("), done.stderr


def test_what_is_public_can_be_pickled_by_its_place():
    for each in (lmnfast.measure, lmnfast.Measurement, grokking.Config):
        assert pickle.loads(pickle.dumps(each)) is each
    m = lmnfast.measure(torch.tanh, torch.randn(5, 2))
    assert pickle.loads(pickle.dumps(m)) == m


def test_the_list_of_observables_that_needs_no_torch_is_that_of_the_registry():
    assert [each.name for each in lmnfast.observables() if not each.own] == list(OBSERVABLES)
