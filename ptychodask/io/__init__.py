"""Foreign formats: one file each behind a table; renaming, flips, cropping, binning and units end here."""

from ptychodask.io.ingestion import ingest
from ptychodask.io.products import ForeignResult, read_foreign_result
from ptychodask.io.source import IngestSpec

__all__ = ["ForeignResult", "IngestSpec", "ingest", "read_foreign_result"]
