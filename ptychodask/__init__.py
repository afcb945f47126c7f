"""Chunked, Dask-distributed inference for ptychography networks."""

import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

import lazy_loader

# The names and their modules are in `__init__.pyi`, which type checkers and editors read too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = version("ptychodask")


class _Package(ModuleType):
    """Module type that keeps functions when submodules of equal names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self.__all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
