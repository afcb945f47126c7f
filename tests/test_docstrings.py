"""The examples in docstrings return what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import numpy as np
import pytest
from test_imports import ALIASES

import ptychodask

MODULES = [
    module.name
    for module in pkgutil.walk_packages(ptychodask.__path__, "ptychodask.")
    if module.name.removeprefix("ptychodask.") not in ALIASES
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_return_what_they_show(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"np": np}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = map(importlib.import_module, MODULES)
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) > 50
