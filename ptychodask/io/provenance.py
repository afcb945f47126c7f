"""Provenance of a scan: file, hash, reader, options."""

from __future__ import annotations

import hashlib
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptychodask.io.formats import Source, detect_format, open_for, read_source
from ptychodask.io.npy_stream import reading
from ptychodask.io.source import BLOCK_BYTES, IngestSpec
from ptychodask.storage.location import Location
from ptychodask.storage.records import plain


@contextmanager
def open_source(
    source: Path, store: Location, format: str | None, spec: IngestSpec
) -> Iterator[tuple[Source, Path, ExitStack]]:
    """Open a file with its reader; yields its scratch folder too."""
    with ExitStack() as stack:
        scratch = scratch_folder(spec, store, stack)
        container = open_for(spec, source, scratch, stack)
        name = detect_format(container, spec) if format is None else format
        yield read_source(source, container, name, spec, scratch, stack), scratch, stack


def scratch_folder(spec: IngestSpec, store: Location, stack: ExitStack) -> Path:
    """Folder for scratch files; by default the store's, if on disk."""
    if spec.scratch is not None:
        return Path(spec.scratch)
    if store.local_path is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ptychodask-")))
    return store.local_path.parent


def provenance_of(source: Path, opened: Source, spec: IngestSpec) -> dict[str, Any]:
    packages = ("ptychodask", "numpy", "zarr")
    second = opened.companion
    return {
        "source": str(source.resolve()),
        "sha256": _sha256(source),
        **({} if second is None else {"second_source": str(second.resolve()), "second_sha256": _sha256(second)}),
        "reader": opened.format,
        "options": plain(spec.given()),
        **({"metadata": dict(opened.scan.metadata)} if opened.scan.metadata else {}),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _sha256(path: Path) -> str:
    """Hash of a file, or of all files in a folder."""
    digest = hashlib.sha256()
    with reading(str(path)):
        for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if path.is_dir():
                digest.update(f"{part.relative_to(path).as_posix()}\0".encode())
            if part.is_file():
                with part.open("rb") as file:
                    while block := file.read(BLOCK_BYTES):
                        digest.update(block)
    return digest.hexdigest()
