"""Readers of foreign formats, one module each.

Renaming, flips, cropping, binning and conversion of units happen here and nowhere else.
"""

from ptychodask.io.ingest import ingest
from ptychodask.io.products import ForeignResult, read_foreign_result
from ptychodask.io.source import IngestSpec

__all__ = ["ForeignResult", "IngestSpec", "ingest", "read_foreign_result"]
