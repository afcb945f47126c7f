"""Chunked, Dask-distributed inference for ptychography networks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "scan": ["PtychodaskError", "Scan"],
        "grouping": ["GroupingSpec", "Groups"],
        "store": ["group", "open_scan"],
        "io": ["IngestSpec", "ingest"],
    },
)
