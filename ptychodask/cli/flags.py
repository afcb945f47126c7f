"""What the commands share: options that several of them have, and how their texts are read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ptychodask.scan import PtychodaskError

Store = Annotated[Path, typer.Argument(help="The scan's store, a folder ending in .zarr.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new one is whole.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")]
Workers = Annotated[int | None, typer.Option(help="Worker processes to start; by default this one.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of a running Dask scheduler.")]
Tls = Annotated[bool, typer.Option("--tls", help="Encrypt and authenticate what --workers say to each other.")]
TlsFolder = Annotated[
    Path | None, typer.Option(help="Folder with ca.pem, cert.pem and key.pem for a --scheduler that speaks TLS.")
]


def bar(quiet: bool) -> bool | None:
    return False if quiet else None


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, so that every default stays where it is written."""
    return {name: value for name, value in options.items() if value is not None}


def numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise PtychodaskError(f"{flag} {text}: expected {count} numbers with commas between them")
    return values


def whole_numbers(flag: str, text: str, count: int) -> tuple[int, ...]:
    values = numbers(flag, text, count)
    if not all(value.is_integer() for value in values):
        raise PtychodaskError(f"{flag} {text}: expected whole numbers")
    return tuple(int(value) for value in values)


def numbers_in(flag: str, path: Path, what: str) -> NDArray[Any]:
    from ptychodask.io.npy_stream import read_npy

    try:
        return np.atleast_1d(read_npy(path))
    except PtychodaskError as error:
        raise PtychodaskError(f"{flag} {error}; expected a .npy of {what}") from error


def check_one_cluster(command: str, workers: int | None, scheduler: str | None) -> None:
    if workers is not None and scheduler is not None:
        raise PtychodaskError(f"{command}: --workers starts a cluster and --scheduler names one; pass one of them")


def client_for(
    workers: int | None, scheduler: str | None, tls: bool = False, tls_folder: Path | None = None
) -> AbstractContextManager[Any]:
    """A client of new worker processes or of a running scheduler; None where neither is asked for."""
    from ptychodask.cluster import connected_client, credentials_in, local_client, temporary_credentials

    if tls and workers is None:
        raise PtychodaskError("--tls: goes with --workers; a running --scheduler is reached with --tls-folder")
    if tls_folder is not None and scheduler is None:
        raise PtychodaskError(f"--tls-folder {tls_folder}: goes with --scheduler; new --workers take --tls")
    if workers is not None:
        return local_client(workers, security=temporary_credentials() if tls else None)
    if scheduler is None:
        return nullcontext()
    return connected_client(scheduler, security=None if tls_folder is None else credentials_in(tls_folder))


def check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise PtychodaskError(f"{path}: is a folder, or lies in no folder that exists; name another file")
