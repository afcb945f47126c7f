"""The table of formats, and what a file's content says about its own."""

from __future__ import annotations

import bz2
import importlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ptychodask.io.npy_stream import reading
from ptychodask.io.raw import scratch_file, writing_scratch
from ptychodask.io.source import BLOCK_BYTES, FORMAT_OPTIONS, Container, IngestSpec, SourceScan, listed_keys
from ptychodask.scan import PtychodaskError, check_choice

READERS = {
    "ptychopinn": "ptychodask.io.ptychopinn",
    "tike": "ptychodask.io.tike",
    "ptychodus": "ptychodask.io.ptychodus",
    "nexus": "ptychodask.io.nexus",
    "cxi": "ptychodask.io.cxi",
    "hxn": "ptychodask.io.hxn",
    "mapping": "ptychodask.io.mapping",
}
"""Format -> module with `read(container, spec)`, `recognises(keys)` and `OPTIONS`; tried in this order. A format of two
files has `companion(path, keys, spec)` and `read_pair(container, other, spec)` in place of `read`."""

CONTAINERS = {
    b"PK\x03\x04": ("ptychodask.io.npy_stream", "NpzFile"),
    b"\x89HDF\r\n\x1a\n": ("ptychodask.io.hdf5_stream", "Hdf5File"),
}
"""First bytes of a file -> module and class that opens it."""

UNPACKED_AT_MOST = 1000
"""Times that a file is larger than its bzip2, at the most: patterns almost without light come close."""

SMALL_BYTES = 2**26
"""Files up to this size are unpacked whatever packed them so well."""

MATLAB_HEADER_BYTES = 512
"""A MATLAB 7.3 file is HDF5 behind a header of this length."""


def open_container(path: Path, scratch: Path, stack: ExitStack) -> Container:
    """Open a file of named arrays by its first bytes; a bzip2 archive is unpacked into scratch first.

    Parameters
    ----------
    path : Path
    scratch : Path
        Folder for what has to be unpacked or turned.
    stack : ExitStack
        Closes the file and removes the scratch.

    Raises
    ------
    PtychodaskError
        If there is no such file, it is empty, or it is neither NPZ nor HDF5.
    """
    if not path.exists():
        raise PtychodaskError(f"{path}: no such file")
    if not path.is_file():
        raise PtychodaskError(f"{path}: is a folder, expected an NPZ or HDF5 file")
    try:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        start = file.read(MATLAB_HEADER_BYTES + 8)
    except OSError as error:
        raise PtychodaskError(f"{path}: cannot be opened ({error.strerror or error})") from error
    if not start:
        raise PtychodaskError(f"{path}: the file is empty (0 bytes); copy it again")
    if start.startswith(b"BZh"):
        file = _unbzipped(path, scratch, stack)
        start = file.read(MATLAB_HEADER_BYTES + 8)
    for magic, (module, name) in CONTAINERS.items():
        if start.startswith(magic) or (start[MATLAB_HEADER_BYTES:] == magic):
            opened: Container = getattr(importlib.import_module(module), name)(file, str(path), scratch, stack)
            return opened
    raise PtychodaskError(
        f"{path}: begins with {start[:8]!r}, expected an NPZ or HDF5 file; convert it, or copy it again if it is one"
    )


def _unbzipped(path: Path, scratch: Path, stack: ExitStack) -> IO[bytes]:
    file = stack.enter_context(scratch_file(scratch, 0, f"{path}: unpacking bzip2"))
    n_bytes = path.stat().st_size
    with reading(str(path)), bz2.open(path) as packed:
        while piece := packed.read(BLOCK_BYTES):
            with writing_scratch(scratch):
                file.write(piece)
            if file.tell() > max(SMALL_BYTES, UNPACKED_AT_MOST * n_bytes):
                raise PtychodaskError(
                    f"{path}: {n_bytes} bytes unpack to more than {UNPACKED_AT_MOST} times as many; it does not hold "
                    "what is measured: unpack it yourself if you trust it"
                )
    with writing_scratch(scratch):
        file.seek(0)
    return file


def detect_format(container: Container, spec: IngestSpec) -> str:
    """Name of the format that a file's keys belong to; `keys` in the spec means a mapping.

    Raises
    ------
    PtychodaskError
        If no format knows these keys; the message lists them.
    """
    if spec.keys is not None:
        return "mapping"
    found = container.keys()
    for name, module in READERS.items():
        if importlib.import_module(module).recognises(found):
            return name
    raise PtychodaskError(
        f"{container.label}: its keys belong to no known format; keys found: {listed_keys(found)}; "
        "map them with keys= (--key diffraction=... --key y=... --key x=...)"
    )


def options_of(name: str) -> tuple[str, ...]:
    """Those of `FORMAT_OPTIONS` that a format leaves open."""
    options: tuple[str, ...] = importlib.import_module(READERS[name]).OPTIONS
    return options


@dataclass(frozen=True)
class Source:
    """A foreign file, open."""

    container: Container
    format: str
    scan: SourceScan
    """What the reader found."""

    companion: Path | None
    """The second file of a format of two."""


def read_source(
    path: Path, container: Container, name: str, spec: IngestSpec, scratch: Path, stack: ExitStack
) -> Source:
    """What the reader of a format finds in a file, after a check that each given option means something to it.

    Parameters
    ----------
    path : Path
        Of the file.
    container : Container
        The file, open.
    name : str
        Of the format.
    spec : IngestSpec
    scratch : Path
        Folder for what has to be unpacked or turned, of a second file.
    stack : ExitStack
        Closes that.

    Raises
    ------
    PtychodaskError
        If there is no such format, an option has no meaning for it, or the file is not as it must be.
    """
    check_choice("format", name, tuple(READERS), container.label)
    module = importlib.import_module(READERS[name])
    for option in sorted(set(spec.given()) & (set(FORMAT_OPTIONS) - set(module.OPTIONS))):
        raise PtychodaskError(
            f"{container.label}: {option} has no meaning for format {name!r}, which fixes it; leave it out, "
            "or map the file's keys with keys="
        )
    if not hasattr(module, "companion"):
        return Source(container, name, module.read(container, spec), None)
    companion: Path = module.companion(path, container.keys(), spec)
    return Source(
        container, name, module.read_pair(container, open_container(companion, scratch, stack), spec), companion
    )
