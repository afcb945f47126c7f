"""Names, types and completion of the public interface, as editors see them."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import ptychodask
from ptychodask.errors import PtychodaskError

STUB = Path(ptychodask.__file__).with_suffix(".pyi")


NAMES = [
    (each.name, f"ptychodask.{node.module}")
    for node in ast.parse(STUB.read_text()).body
    if isinstance(node, ast.ImportFrom)
    for each in node.names
]
"""Public names, each with the module that the stub states."""


def test_the_package_is_marked_as_typed_and_states_its_version():
    assert STUB.with_name("py.typed").exists()
    assert ptychodask.__version__ == version("ptychodask")


@pytest.mark.parametrize(("name", "module"), NAMES)
def test_the_stub_names_modules_that_type_checkers_can_follow(name, module):
    """A package that loads its names lazily hides them from a type checker, which then finds a module or nothing."""
    bound = set()
    for node in ast.parse(inspect.getsource(import_module(module))).body:
        if isinstance(node, ast.ImportFrom):
            bound |= {each.asname or each.name for each in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
    assert name in bound
    assert name in ptychodask.__all__


def test_jupyter_shows_an_error_of_the_package_in_one_line():
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    shown = []
    shell = interactive.InteractiveShell()
    shell._showtraceback = lambda kind, error, lines: shown.extend(lines)
    shell.run_cell("import ptychodask\nptychodask.open_scan('/nowhere/scan.zarr')")
    assert len(shown) == 1
    assert shown[0].startswith("PtychodaskError: /nowhere/scan.zarr")
    assert issubclass(ptychodask.FailedScansError, PtychodaskError)
