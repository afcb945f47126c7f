"""Options shared by several commands, and parsers of their values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError

Store = Annotated[
    Path,
    typer.Argument(help="Store of the scan: a folder ending in .zarr, or s3://bucket/name.", show_default=False),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output, once the new one is complete.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")]
Workers = Annotated[
    int | None, typer.Option(help="Number of worker processes to start; by default everything runs in this process.")
]
Host = Annotated[
    str | None, typer.Option(help="Address on which --workers listen; by default only this machine (loopback).")
]
Scheduler = Annotated[
    str | None, typer.Option(help="Address of a running Dask scheduler, or path of its scheduler file.")
]
Tls = Annotated[bool, typer.Option("--tls", help="Encrypt and authenticate the connections between --workers (TLS).")]
TlsFolder = Annotated[
    Path | None, typer.Option(help="Folder with ca.pem, cert.pem and key.pem, for a --scheduler that uses TLS.")
]

Format = Annotated[
    str | None,
    typer.Option(
        help="File format: ptychopinn, tike, ptychodus, nexus, cxi, hxn or mapping; by default detected from the keys."
    ),
]
Recipe = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with these options, as written by inspect --yaml.")
]


def pairs(keys: list[str]) -> dict[str, str]:
    for text in keys:
        if "=" not in text:
            raise PtychodaskError(f"--key {text}: expected NAME=KEY, for example --key diffraction=entry/data")
    return dict(text.split("=", 1) for text in keys)


def progress_option(quiet: bool) -> bool | None:
    return False if quiet else None


def given(**options: Any) -> dict[str, Any]:
    """Options that were set; for the others, the function's own defaults apply."""
    return {name: value for name, value in options.items() if value is not None}


def numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise PtychodaskError(f"{flag} {text}: expected {count} numbers separated by commas")
    return values


def whole_numbers(flag: str, text: str, count: int) -> tuple[int, ...]:
    values = numbers(flag, text, count)
    if not all(value.is_integer() for value in values):
        raise PtychodaskError(f"{flag} {text}: expected whole numbers")
    return tuple(int(value) for value in values)


def numbers_in(flag: str, path: Path, content: str) -> NDArray[Any]:
    from ptychodask.io.npy_stream import read_npy

    try:
        return np.atleast_1d(read_npy(path))
    except PtychodaskError as error:
        raise PtychodaskError(f"{flag} {error}; expected a .npy file of {content}") from error


def numbers_or_file(flag: str, given: str, content: str) -> NDArray[Any] | list[int]:
    """Whole numbers separated by commas, or those in a .npy file."""
    parts = given.split(",")
    if all(part.strip().isdecimal() for part in parts):
        return [int(part) for part in parts]
    return numbers_in(flag, Path(given), content)


def check_one_cluster(command: str, workers: int | None, scheduler: str | None) -> None:
    if workers is not None and scheduler is not None:
        raise PtychodaskError(
            f"{command}: --workers starts a cluster, but --scheduler names a running one; pass one of them"
        )


def client_for(
    workers: int | None,
    scheduler: str | None,
    tls: bool = False,
    tls_folder: Path | None = None,
    host: str | None = None,
) -> AbstractContextManager[Any]:
    """Dask client of new workers or of a running scheduler, else None."""
    from ptychodask.cluster.clients import connected_client, local_client
    from ptychodask.cluster.tls import credentials_in, temporary_credentials

    if tls and workers is None:
        raise PtychodaskError("--tls: needs --workers; for a running --scheduler use --tls-folder")
    if tls_folder is not None and scheduler is None:
        raise PtychodaskError(f"--tls-folder {tls_folder}: needs --scheduler; for new --workers use --tls")
    if host is not None and workers is None:
        raise PtychodaskError(f"--host {host}: needs --workers, which listen there; pass both or neither")
    if workers is not None:
        return local_client(workers, security=temporary_credentials() if tls else None, **given(host=host))
    if scheduler is None:
        return nullcontext()
    return connected_client(scheduler, security=None if tls_folder is None else credentials_in(tls_folder))


def named(path: Path) -> Any:
    """Location on disk, or in a bucket for an s3:// URL."""
    from ptychodask.storage.location import parse_location

    return parse_location(path)


def beside(path: Any, name: str) -> Path:
    """File beside a path; for a bucket, in the current folder."""
    return (path.local_path or Path(name)).with_name(name)


def check_vacant_files(overwrite: bool, *paths: Path | None) -> None:
    """Raise `PtychodaskError` if a file would be replaced unasked."""
    for path in paths:
        if path is not None and path.is_file() and not overwrite:
            raise PtychodaskError(f"{path} exists already; pass --overwrite, or name another file")


def check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and path.is_dir():
            raise PtychodaskError(f"cannot write {path}: it is a folder; name a file")
        if path is not None and not path.parent.is_dir():
            raise PtychodaskError(f"cannot write {path}: folder {path.parent} does not exist; make it first")
