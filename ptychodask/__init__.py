"""Chunked, Dask-distributed inference for ptychography networks."""

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "scan": ["PtychodaskError", "Scan"],
        "grouping": ["GroupingSpec", "Groups"],
        "store": ["group", "open_scan"],
        "io": ["IngestSpec", "ingest"],
        "result": ["open_result"],
        "plan": ["Plan", "ReconstructionSpec", "plan"],
        "reconstruction": ["reconstruct"],
    },
)


class _Package(ModuleType):
    """A package whose `plan` stays the function when the module of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
