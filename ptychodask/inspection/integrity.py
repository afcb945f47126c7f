"""Integrity of finished stores: checksums of chunks, and recorded hashes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from ptychodask.errors import PtychodaskError
from ptychodask.models.bundle import load_model
from ptychodask.models.description import MODEL
from ptychodask.progress import Progress, progress_bar
from ptychodask.reconstruction.patch_cache import PATCHES
from ptychodask.result import RESULT, STORED_CHUNKS
from ptychodask.storage.atomic import StoreKind
from ptychodask.storage.location import LocationLike, parse_location
from ptychodask.storage.zarr_checks import DAMAGE, check_codecs, codec_names, open_root
from ptychodask.store import SCAN, StoredScan

KINDS = {kind.name: kind for kind in (SCAN, RESULT, PATCHES)}
"""Zarr stores that can be checked, by their format."""

CHECKSUM = "crc32c"
"""Codec whose checksum reveals a damaged chunk."""


@dataclass(frozen=True)
class ArrayCheck:
    """One array of a store, read to the end."""

    name: str

    n_chunks: int
    """Chunks in it."""

    damaged: tuple[tuple[int, ...], ...]
    """Chunks that cannot be read, by their indices."""

    n_missing: int
    """Files that were written and are not there."""

    has_checksum: bool
    """True if a single changed bit would be noticed."""


@dataclass(frozen=True)
class StoreCheck:
    """Outcome of a check."""

    label: str
    """The store, as it was named."""

    noun: str
    """Kind of store."""

    arrays: tuple[ArrayCheck, ...]

    problems: tuple[str, ...]
    """A line for each defect; empty if the store is whole."""

    def __str__(self) -> str:
        lines = [f"{self.label}: {self.noun}"]
        width = max((len(array.name) for array in self.arrays), default=0)
        for array in self.arrays:
            state = "damaged" if array.damaged or array.n_missing else "whole"
            unsure = "" if array.has_checksum else ", without checksums: an older store"
            lines.append(f"  {array.name:<{width}}  {array.n_chunks} chunks, {state}{unsure}")
        return "\n".join([*lines, *self.problems, *([] if self.problems else ["whole"])])


def check_store(path: LocationLike, *, progress: bool | None = None) -> StoreCheck:
    """Integrity of a scan, result, cache of patches or model.

    Every chunk is read, and recorded hashes are compared.

    Parameters
    ----------
    path : path or ``s3://`` URL
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    StoreCheck
        With a line for each problem. Nothing is changed.

    Raises
    ------
    PtychodaskError
        If there is no such store, or it is unfinished.
    """
    location, label = parse_location(path), str(path)
    kind = _kind_of(location, label)
    if kind is None:
        load_model(label)
        return StoreCheck(label, MODEL.noun, (), ())
    root = open_root(location, kind)
    arrays = dict(_arrays_below(root))
    n_chunks = sum(array.nchunks for array in arrays.values())
    with progress_bar("check", n_chunks, "chunks", progress) as bar:
        checked = tuple(_check_array(name, array, root, kind, label, bar) for name, array in arrays.items())
    remedy = {
        SCAN: "ingest again with overwrite=True (--overwrite)",
        RESULT: "reconstruct again with overwrite=True (--overwrite)",
        PATCHES: "remove it and reconstruct again",
    }[kind]
    problems = []
    for array in checked:
        if array.damaged:
            shown = ", ".join(map(str, array.damaged[:10])) + (", ..." if len(array.damaged) > 10 else "")
            problems.append(f"array '{array.name}': {len(array.damaged)} chunks are damaged: {shown}; {remedy}")
        if array.n_missing:
            problems.append(f"array '{array.name}': {array.n_missing} files are missing; {remedy}")
    if kind is SCAN and not problems:
        problems += _check_hashes(label, remedy)
    return StoreCheck(label, kind.noun, checked, tuple(problems))


def _kind_of(location: Any, label: str) -> StoreKind | None:
    """Kind of a Zarr store; None for what may be a model."""
    if not location.exists():
        raise PtychodaskError(f"{label}: no such store; name a scan, a result, a cache of patches or a model")
    try:
        attributes = zarr.open_group(location.resolve().zarr_store(read_only=True), mode="r", zarr_format=3).attrs
        return KINDS.get(str(attributes.get("format")))
    except DAMAGE:
        return None


def _arrays_below(root: zarr.Group) -> Iterator[tuple[str, zarr.Array]]:
    for name, node in sorted(root.members(max_depth=None), key=lambda member: member[0]):
        if isinstance(node, zarr.Array):
            yield name, node


def _check_array(
    name: str, array: zarr.Array, root: zarr.Group, kind: StoreKind, label: str, bar: Progress
) -> ArrayCheck:
    check_codecs(array, label, f"make it again with 'ptychodask {kind.maker}'")
    metadata: Any = array.metadata
    described = [codec.to_dict() for codec in metadata.codecs]
    # Within a shard the codecs of its chunks count, not those of its index.
    inner = [each for codec in described for each in codec.get("configuration", {}).get("codecs", ())]
    has_checksum = CHECKSUM in codec_names(inner or described)
    damaged = []
    for index in itertools.product(*(range(-(-n // size)) for n, size in zip(array.shape, array.chunks, strict=True))):
        region = tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, array.chunks, strict=True))
        try:
            array[region]
        except DAMAGE:
            damaged.append(index)
        bar.advance(1)
    n_missing = 0
    written = root.attrs.get(STORED_CHUNKS) if kind is RESULT else None
    if isinstance(written, dict) and isinstance(written.get(name), int):
        n_missing = max(written[name] - array.nchunks_initialized, 0)
    elif kind is SCAN and (name == "diffraction" or has_checksum):
        n_missing = array.nchunks - array.nchunks_initialized
    return ArrayCheck(name, array.nchunks, tuple(damaged), n_missing, has_checksum)


def _check_hashes(label: str, remedy: str) -> list[str]:
    """Problems of a scan whose chunks can all be read."""
    stored = StoredScan(label)
    try:
        stored.check()
    except PtychodaskError as error:
        return [str(error)]
    attributes = stored.attributes
    segments = attributes.get("segments") or [
        {"n_patterns": stored.n_patterns, "diffraction_hash": attributes["diffraction_hash"]}
    ]
    first, problems = 0, []
    for segment in segments:
        stop, digest = first + int(segment["n_patterns"]), hashlib.sha256()
        for start in range(first, stop, stored.stored_chunk_patterns):
            rows = np.arange(start, min(start + stored.stored_chunk_patterns, stop))
            digest.update(np.ascontiguousarray(stored.part(rows).diffraction[rows - start]).data)
        if digest.hexdigest() != segment["diffraction_hash"]:
            problems.append(
                f"patterns {first}..{stop - 1} are not those that were stored: their hash differs; {remedy}"
            )
        first = stop
    return problems
