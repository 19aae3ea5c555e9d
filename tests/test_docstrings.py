"""Every public name is documented in one form, and its example runs: here, or as a file that tests/test_examples.py runs."""

import ast
import doctest
import inspect
import itertools
import re
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import lmnfast
from lmnfast import checkpoints, grokking, integrations, ops, plot, quadrature, reference
from lmnfast.integrations import lightning, transformers

PUBLIC = {
    **{name: getattr(lmnfast, name) for name in lmnfast.__all__ if name != "plot"},  # its functions are below
    **{f"ops.{name}": getattr(ops, name) for name in ops.__all__},
    **{f"reference.{name}": getattr(reference, name) for name in ops.__all__},
    "quadrature.path_nodes": quadrature.path_nodes,
    **{f"plot.{name}": getattr(plot, name) for name in plot.__all__},
    **{f"checkpoints.{name}": getattr(checkpoints, name) for name in checkpoints.__all__},
    **{f"grokking.{name}": getattr(grokking, name) for name in grokking.__all__},
    **{f"integrations.{name}": getattr(integrations, name) for name in integrations.__all__},
    "integrations.lightning.LMNCallback": lightning.LMNCallback,
    "integrations.transformers.LMNCallback": transformers.LMNCallback,
}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
METHODS = {
    f"{name}.{method}": value
    for name, of in CLASSES.items()
    for method, value in vars(of).items()
    if not method.startswith("_")
    and (inspect.isfunction(value) or isinstance(value, property))
    and not any(hasattr(base, method) for base in of.__mro__[1:])  # the frameworks' own events
}
SECTIONS = ("Args", "Returns", "Raises", "Warns", "Source", "Example")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def section(text: str, name: str) -> str:
    found = re.search(rf"^{name}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_what_it_takes_gives_and_raises(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert text.splitlines()[0].endswith((".", ":"))
    where = [text.find(f"\n{title}:\n") for title in SECTIONS]
    present = [place for place in where if place >= 0]
    assert present == sorted(present), "sections in the order of all other docstrings"
    if is_dataclass(PUBLIC[name]):
        assert documented_fields(PUBLIC[name]) == [field.name for field in fields(PUBLIC[name])]
        return
    parameters = inspect.signature(PUBLIC[name]).parameters
    described = re.findall(r"^    (\w[\w, ]*):", section(text, "Args"), re.MULTILINE)
    assert {word for words in described for word in words.split(", ")} == set(parameters)
    if name not in CLASSES:
        assert section(text, "Returns")
    assert section(text, "Raises") or name.startswith("reference.")  # plain PyTorch


def documented_fields(of: type) -> list[str]:
    """The fields of a dataclass that a text follows."""
    body = ast.parse(textwrap.dedent(inspect.getsource(of))).body[0].body
    return [
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_every_public_method_is_described_with_its_arguments(name):
    function = METHODS[name].fget if isinstance(METHODS[name], property) else METHODS[name]
    text = inspect.getdoc(function) or ""
    assert text.partition("\n")[0].endswith((".", ":"))
    for parameter in list(inspect.signature(function).parameters)[1:]:
        assert re.search(rf"\b{parameter}\b", text), parameter


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=FLAGS)
    names = {"torch": torch, "nn": nn, "lmnfast": lmnfast}
    (test,) = finder.find(PUBLIC[name], name, module=False, globs=names)
    whole = re.search(r"Whole in (examples/\w+\.py)::", test.docstring)
    if whole and not test.examples:
        text = (Path(__file__).parent.parent / whole[1]).read_text()
        assert PUBLIC[name].__name__ in text and PUBLIC[name].__module__ in text
        return
    assert test.examples, "no example"
    assert not any(doctest.SKIP in example.options for example in test.examples)
    said: list[str] = []
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
