"""Every public name is documented in one form, and its example runs."""

import doctest
import inspect
import re

import pytest
import torch
from torch import nn

import lmnfast
from lmnfast import ops, quadrature, reference
from lmnfast.integrations import writers

PUBLIC = {
    **{name: getattr(lmnfast, name) for name in lmnfast.__all__},
    **{f"ops.{name}": getattr(ops, name) for name in ops.__all__},
    **{f"reference.{name}": getattr(reference, name) for name in ops.__all__},
    "quadrature.path_nodes": quadrature.path_nodes,
    **{
        f"writers.{name}": getattr(writers, name)
        for name in ("CSVWriter", "TensorBoardWriter", "WandbWriter")
    },
}
METHODS = {
    f"{name}.{method}": value
    for name in ("Probe", "Measurement")
    for method, value in vars(PUBLIC[name]).items()
    if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
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
    if inspect.isclass(PUBLIC[name]):
        return
    parameters = inspect.signature(PUBLIC[name]).parameters
    described = re.findall(r"^    (\w[\w, ]*):", section(text, "Args"), re.MULTILINE)
    assert {word for words in described for word in words.split(", ")} == set(parameters)
    assert section(text, "Returns")
    assert section(text, "Raises") or name.startswith("reference.")  # plain PyTorch


@pytest.mark.parametrize("name", METHODS)
def test_every_public_method_is_described(name):
    value = METHODS[name]
    assert inspect.getdoc(value.fget if isinstance(value, property) else value)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=FLAGS)
    names = {"torch": torch, "nn": nn, "lmnfast": lmnfast}
    (test,) = finder.find(PUBLIC[name], name, module=False, globs=names)
    assert test.examples, "no example"
    said: list[str] = []
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
