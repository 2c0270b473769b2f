"""What is public is documented as it is: parameters, results, errors and an example for every name."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest
from requirements import missing

import comq_np

ADAPTERS = {"comq_torch": "torch", "comq_keras": "keras", "comq_onnx": "onnx"}
PACKAGES = ["comq_np", *(package for package, purpose in ADAPTERS.items() if not missing(purpose))]
SECTIONS = ("Parameters", "Returns", "Raises", "References", "Examples")


def public():
    """Every public function, class and method, by its dotted name."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                yield f"{package}.{name}", thing
            if inspect.isclass(thing):
                for method, member in vars(thing).items():
                    function = member.__func__ if isinstance(member, classmethod) else member
                    if not method.startswith("_") and inspect.isfunction(function):
                        yield f"{package}.{name}.{method}", function


PUBLIC = dict(public())
ERRORS = {name for name, thing in PUBLIC.items() if inspect.isclass(thing) and issubclass(thing, Exception)}


def sections(thing):
    """Sections of a numpydoc docstring, by title."""
    lines = inspect.getdoc(thing).splitlines()
    starts = [k for k in range(len(lines) - 1) if lines[k] in SECTIONS and set(lines[k + 1]) == {"-"}]
    ends = [*starts[1:], len(lines)]
    return {lines[k]: lines[k + 2 : end] for k, end in zip(starts, ends, strict=True)}


def documented(thing):
    entries = [line for line in sections(thing).get("Parameters", ()) if re.match(r"\S.* : ", line)]
    return [name.strip() for entry in entries for name in entry.split(" : ")[0].split(",")]


def accepted(thing):
    found = []
    for name, parameter in inspect.signature(thing).parameters.items():
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        found.append(stars + name)
    return [name for name in found if name not in ("self", "cls")]


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - ERRORS))
def test_parameters_are_those_of_the_signature(name):
    assert documented(PUBLIC[name]) == accepted(PUBLIC[name])


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - ERRORS))
def test_every_public_name_has_an_example(name):
    assert any(line.lstrip().startswith(">>>") for line in sections(PUBLIC[name])["Examples"])


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_summary_is_one_sentence_on_one_line(name):
    first, *rest = inspect.getdoc(PUBLIC[name]).splitlines()
    assert first.endswith((".", "``", ":")), first
    assert not rest or rest[0] == ""


def test_what_returns_says_so():
    for name, thing in PUBLIC.items():
        if inspect.isfunction(thing):
            returns = thing.__annotations__.get("return")
            assert ("Returns" in sections(thing)) == (returns != "None"), name


def modules():
    """Names of all modules of the package and its adapters."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        yield package
        yield from (info.name for info in pkgutil.walk_packages(module.__path__, f"{package}."))


@pytest.mark.parametrize("name", list(modules()))
def test_examples_do_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_dir_lists_every_public_name():
    assert set(comq_np.__all__) <= set(dir(comq_np))
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        comq_np.quantise  # noqa: B018
