"""Readers of foreign formats, one module each.

Renaming, flips, cropping, binning and conversion of units happen here and nowhere else.
"""

import sys

import lazy_loader

import ptychodask

# Reading a spec must not import the readers.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ingest": ["ingest"],
        "products": ["ForeignResult", "read_foreign_result"],
        "source": ["IngestSpec"],
    },
)

# `ingest` stays the function when the module of that name is imported, as in the package itself.
sys.modules[__name__].__class__ = type(ptychodask)
