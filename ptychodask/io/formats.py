"""Table of formats, and detection of a file's format by its content."""

from __future__ import annotations

import bz2
import importlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.io.folders import open_folder
from ptychodask.io.npy_stream import reading
from ptychodask.io.parts import JoinedContainer
from ptychodask.io.raw import scratch_file, writing_scratch
from ptychodask.io.second_file import PairedContainer, is_table, open_table
from ptychodask.io.source import BLOCK_BYTES, FORMAT_OPTIONS, Container, IngestSpec, SourceScan, listed_keys

READERS = {
    "ptychopinn": "ptychodask.io.ptychopinn",
    "tike": "ptychodask.io.tike",
    "ptychodus": "ptychodask.io.ptychodus",
    "nexus": "ptychodask.io.nexus",
    "cxi": "ptychodask.io.cxi",
    "hxn": "ptychodask.io.hxn",
    "mapping": "ptychodask.io.mapping",
}
"""Format -> module with `read(container, spec)`, `recognises(keys)` and `OPTIONS`; tried in this order.

A format of two files has `companion(path, keys, spec)` and `read_pair(container, other, spec)` in place of `read`.
"""

CONTAINERS = {
    b"PK\x03\x04": ("ptychodask.io.npy_stream", "NpzFile"),
    b"\x89HDF\r\n\x1a\n": ("ptychodask.io.hdf5_stream", "Hdf5File"),
    b"MATLAB 5.0": ("ptychodask.io.matlab", "MatlabFile"),
}
"""First bytes of a file -> module and class to open it."""

UNPACKED_AT_MOST = 1000
"""Largest accepted compression ratio of bzip2: patterns with hardly any photons come close to it."""

SMALL_BYTES = 2**26
"""Unpacked files up to this size are accepted at any compression ratio."""

MATLAB_HEADER_BYTES = 512
"""Length of the header of a MATLAB 7.3 file, which is followed by HDF5."""


def open_container(path: Path, scratch: Path, stack: ExitStack) -> Container:
    """Open an NPZ, HDF5 or MATLAB 5 file by its first bytes.

    A bzip2 archive is first unpacked into a scratch file.

    Parameters
    ----------
    path : Path
        The file, or a folder of .npy files or Zarr.
    scratch : Path
        Folder for scratch files with unpacked or transposed arrays.
    stack : ExitStack
        Closes the file and removes the scratch files.

    Raises
    ------
    PtychodaskError
        If the file does not exist, is empty, or is not NPZ, HDF5 or MATLAB 5.
    """
    if not path.exists():
        raise PtychodaskError(f"{path}: no such file")
    if path.is_dir():
        return JoinedContainer(open_folder(path))
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
            return JoinedContainer(opened)
    raise PtychodaskError(
        f"{path}: begins with {start[:8]!r}, expected an NPZ or HDF5 file; convert it, or copy it again "
        "if it should be one"
    )


def open_for(spec: IngestSpec, path: Path, scratch: Path, stack: ExitStack) -> Container:
    """Open a source as `open_container` does, with a second file of positions.

    Parameters
    ----------
    spec : IngestSpec
        Names the file of positions, if there is one.
    path, scratch, stack
        As for `open_container`.
    """
    container = open_container(path, scratch, stack)
    if spec.positions is None:
        return container
    second = Path(spec.positions)
    if not second.exists():
        raise PtychodaskError(f"{second}: no such file, expected the positions; pass positions= (--positions)")
    other = open_table(second) if is_table(second) else open_container(second, scratch, stack)
    return PairedContainer(container, other)


def _unbzipped(path: Path, scratch: Path, stack: ExitStack) -> IO[bytes]:
    file = stack.enter_context(scratch_file(scratch, 0, f"{path}: unpacking bzip2"))
    n_bytes = path.stat().st_size
    with reading(str(path)), bz2.open(path) as packed:
        while piece := packed.read(BLOCK_BYTES):
            with writing_scratch(scratch):
                file.write(piece)
            if file.tell() > max(SMALL_BYTES, UNPACKED_AT_MOST * n_bytes):
                raise PtychodaskError(
                    f"{path}: {n_bytes} bytes unpack to more than {UNPACKED_AT_MOST} times as many, which measured "
                    "data do not; unpack the file yourself if you trust it"
                )
    with writing_scratch(scratch):
        file.seek(0)
    return file


def detect_format(container: Container, spec: IngestSpec) -> str:
    """Name of a file's format; "mapping" if `spec.keys` is given.

    Raises
    ------
    PtychodaskError
        If the keys match no format; the message lists them.
    """
    if spec.keys is not None:
        return "mapping"
    keys = container.keys()
    for name, module in READERS.items():
        if importlib.import_module(module).recognises(keys):
            return name
    raise PtychodaskError(
        f"{container.label}: its keys match no known format; keys found: {listed_keys(keys)}; "
        "map them with keys= (--key diffraction=... --key y=... --key x=...)"
    )


def options_of(name: str) -> tuple[str, ...]:
    """Options of `FORMAT_OPTIONS` for properties that a format does not define."""
    options: tuple[str, ...] = importlib.import_module(READERS[name]).OPTIONS
    return options


@dataclass(frozen=True)
class Source:
    """An open foreign file and its content."""

    container: Container
    """The file."""

    format: str
    """Name of its format."""

    scan: SourceScan
    """Its content."""

    companion: Path | None
    """The second file, if the format has two."""


def read_source(
    path: Path, container: Container, name: str, spec: IngestSpec, scratch: Path, stack: ExitStack
) -> Source:
    """Read a file with the reader of its format.

    Given options must have a meaning for the format.

    Parameters
    ----------
    path : Path
        Path of the file.
    container : Container
        The file, open.
    name : str
        Name of the format.
    spec : IngestSpec
        Options.
    scratch : Path
        Folder for scratch files of a second file.
    stack : ExitStack
        Closes the second file and removes its scratch files.

    Raises
    ------
    PtychodaskError
        If the format is unknown, an option does not apply to it, or the file does not follow it.
    """
    check_choice("format", name, tuple(READERS), container.label)
    module = importlib.import_module(READERS[name])
    for option in sorted(set(spec.given()) & (set(FORMAT_OPTIONS) - set(module.OPTIONS))):
        raise PtychodaskError(
            f"{container.label}: {option} does not apply to format {name!r}, which defines it; leave it out, "
            "or map the file's keys with keys="
        )
    if not hasattr(module, "companion"):
        second = None if spec.positions is None else Path(spec.positions)
        return Source(container, name, module.read(container, spec), second)
    companion: Path = module.companion(path, container.keys(), spec)
    return Source(
        container, name, module.read_pair(container, open_container(companion, scratch, stack), spec), companion
    )
