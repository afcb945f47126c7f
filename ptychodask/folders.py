"""What appears whole or not at all: folders of a form that they record (scans, results, models, caches), and files."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ptychodask.scan import PtychodaskError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

WHOLE = "whole"
"""What takes its name in the end, inside the folder in which it is written."""

LOCK = "lock"
"""File beside it; its writer holds it locked, and the lock goes with the process."""

LEDGER = "ledger.jsonl"
"""File beside it that says what of it is finished: where it is, the writing can be gone on with."""

DAMAGED = "damaged"
"""What stands for the form of a folder whose root file cannot be read."""

CLEAR_ATTEMPTS = 50
"""Times that the remains of a store are removed, a tenth of a second apart, until they are gone."""


@dataclass(frozen=True)
class StoreKind:
    """What tells one kind of folder that this package writes from another, and how its users speak of it."""

    name: str
    """The root attribute ``format``."""

    version: int
    """The newest ``format_version`` that is read."""

    noun: str
    """What it is called."""

    maker: str
    """The command that makes one."""


def check_vacant(path: Path, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> None:
    """Raise `PtychodaskError` unless `path` can be written: its folder is there, and nothing is in the way.

    Parameters
    ----------
    path : Path
        What shall be written.
    overwrite : bool
        Whether what is there and of the same form, and what a stopped writer left, may be replaced; never anything
        else.
    kind : StoreKind
        What it shall be: a scan, a result or a model.
    resume : bool
        What a stopped writer left is not in the way.
    """
    # A writer that was killed between its two renames left the previous version under another name: `path` is not free,
    # and the next writer brings that version back. A check changes nothing on the disk.
    previous = path if path.exists() or not replaced_path(path).exists() else replaced_path(path)
    if previous.exists() and not overwrite:
        raise _exists(path)
    if previous.exists() and not (
        previous.is_dir() and (not any(previous.iterdir()) or recorded_folder_format(previous) in (kind.name, DAMAGED))
    ):
        raise PtychodaskError(
            f"{previous}: is {recorded_folder_format(previous) or 'something of another kind'}, and overwrite=True "
            f"(--overwrite) replaces a {kind.name} alone; pass another name, or remove it first"
        )
    if not path.parent.is_dir():
        raise PtychodaskError(f"{path}: its folder {path.parent} does not exist; make it first")
    building = building_path(path)
    if not building.exists():
        return
    locked = is_locked(building)
    if locked:
        raise _at_work(path)
    if is_resumable(path) and not (overwrite or resume):
        raise PtychodaskError(
            f"{path}: a run was stopped before its end, and what it finished is kept ({building}); go on with "
            "resume=True (--resume), or pass overwrite=True (--overwrite) to start again"
        )
    if locked is None and not (overwrite or resume):
        raise PtychodaskError(
            f"{path}: another run is writing it, or was stopped before its end ({building} is there); "
            "wait for it, or pass overwrite=True (--overwrite) to start again"
        )


def _exists(path: Path) -> PtychodaskError:
    kept = "" if path.exists() else f" (as {replaced_path(path)}, since its writer was stopped)"
    return PtychodaskError(f"{path}: exists already{kept}; pass overwrite=True (--overwrite), or another name")


def _at_work(path: Path) -> PtychodaskError:
    return PtychodaskError(
        f"{path}: another run is writing it ({building_path(path)}); wait for its end, or pass another name"
    )


def is_resumable(path: Path) -> bool:
    """Whether a stopped writer of `path` left something to go on with."""
    building = building_path(path)
    return (building / LEDGER).exists() and (building / WHOLE).exists()


def is_locked(building: Path) -> bool | None:
    """Whether a process that is at work holds a folder that is being written; None where that cannot be known."""
    try:
        with (building / LOCK).open() as file:
            return not _lock(file)
    except FileNotFoundError:
        return False
    except OSError:
        return None


def _lock(file: IO[str]) -> bool:
    """Lock a file for as long as it is open; False where another one holds it. Raises `OSError` where none can be."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "files cannot be locked on this system")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _held(path: Path, *, resume: bool) -> Iterator[Path]:
    """The folder that `path` is written in, for this process alone: empty, or with what a stopped writer finished."""
    building = building_path(path)
    going_on = resume and is_resumable(path)
    if not going_on:
        _remove(building)
    try:
        building.mkdir(exist_ok=going_on)
    except FileExistsError:
        raise _at_work(path) from None
    with (building / LOCK).open("a") as file:
        try:
            if not _lock(file):
                raise _at_work(path)
        except OSError as error:
            logger.warning("%s: cannot be locked (%s): a second run on it would not be noticed", building, error)
        (building / WHOLE).mkdir(exist_ok=True)
        yield building


@contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder that is there already for this process alone; the hold goes with the process.

    Parameters
    ----------
    folder : Path
    wait : bool
        Wait until another one lets go of it.

    Raises
    ------
    BlockingIOError
        If another one holds it, and this one does not wait.
    """
    if fcntl is None:
        logger.warning("%s: cannot be locked on this system: a second writer would not be noticed", folder)
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            logger.warning("%s: cannot be locked (%s): a second writer would not be noticed", folder, error)
        yield
    finally:
        os.close(descriptor)


def recorded_folder_format(path: Path) -> str | None:
    """The format that a folder records of itself in the root of a Zarr store or a model bundle; None without such."""
    for name, parents in (("zarr.json", ("attributes",)), ("model.json", ())):
        if (path / name).is_file():
            try:
                found = read_json(path / name)
                for parent in parents:
                    found = found[parent]
                return str(found["format"]) if "format" in found else None
            except (OSError, ValueError, KeyError, TypeError):
                return DAMAGED
    return None


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises `OSError`, or `ValueError` where it is no JSON that can be read."""
    return from_json(path.read_text())


def from_json(text: str) -> Any:
    """What a JSON text says; raises `ValueError` where it is none, or has more brackets inside each other than Python
    follows."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def building_path(path: Path) -> Path:
    """Where a folder is written before it takes its name."""
    return path.with_name(f".{path.name}.writing")


def replaced_path(path: Path) -> Path:
    """Path the previous version is moved to while the new one is renamed."""
    return path.with_name(f".{path.name}.replaced")


def _restore_previous(path: Path) -> None:
    """Rename the previous version back to `path` if a writer was killed between its two renames."""
    if replaced_path(path).exists() and not path.exists():
        replaced_path(path).rename(path)


def _take_place(new: Path, path: Path) -> None:
    """Give `new` the name `path`; what had it goes, but comes back if the new one cannot take its place."""
    old = replaced_path(path)
    _remove(old)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clear_away(building: Path) -> None:
    """Remove what was being written, also while a task that was not reached in time still adds a file to it."""
    for _ in range(CLEAR_ATTEMPTS):
        shutil.rmtree(building, ignore_errors=True)
        if not building.exists():
            return
        time.sleep(0.1)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not.

    Parameters
    ----------
    path : Path
        What shall exist in the end.
    overwrite : bool
        Replace what is there (only once the new one is whole), and what a stopped writer left.
    kind : StoreKind
        What it shall be; something of another form is never replaced.
    resume : bool
        Go on in the folder that a stopped writer left, where there is a file `LEDGER` beside it.

    Yields
    ------
    Path
        The folder to write into. The one that it lies in is the writer's too; it goes in the end. A process that is
        killed leaves both; so does a block that fails once there is a file `LEDGER` in the latter, which says what is
        finished.

    Raises
    ------
    PtychodaskError
        If `path` exists already, is of another form, another writer is at work on it, a stopped one left finished
        work, its parent folder is missing, or the disk refuses the writing.
    """
    check_vacant(path, overwrite=overwrite, kind=kind, resume=resume)
    try:
        with _held(path, resume=resume) as building:
            try:
                # Under the lock, no other writer can be between its two renames. It may have finished since the check.
                _restore_previous(path)
                if path.exists() and not overwrite:
                    raise _exists(path)
                yield building / WHOLE
                _take_place(building / WHOLE, path)
            finally:
                if not is_resumable(path):
                    _clear_away(building)
    except OSError as error:
        kept, way_out = "nothing was kept of it", "free space"
        if is_resumable(path):
            kept = "what was finished is kept"
            way_out = "free space and go on with resume=True (--resume)"
        raise PtychodaskError(
            f"{path}: cannot be written ({error.strerror or error}); {kept}, and what was there before is untouched: "
            f"{way_out}, or name another place"
        ) from error


@contextmanager
def atomic_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path to write a file to, which takes the name `path` when the block ends well and vanishes when it does not.

    Parameters
    ----------
    path : Path
        The file that shall exist in the end.
    overwrite : bool
        Replace a file that is there (only once the new one is whole); never a folder.

    Yields
    ------
    Path
        Beside `path`, with its suffix; of this process alone, so that two writers do not meet before the end.

    Raises
    ------
    PtychodaskError
        If a file is there already, `path` is a folder or lies in none, or the disk refuses the writing.
    """
    if path.is_dir():
        raise PtychodaskError(f"{path}: is a folder, expected the name of a file; name a file in it")
    if path.exists() and not overwrite:
        raise PtychodaskError(f"{path}: exists already; pass overwrite=True (--overwrite), or another name")
    if not path.parent.is_dir():
        raise PtychodaskError(f"{path}: its folder {path.parent} does not exist; make it first")
    building = path.with_name(f".{path.stem}.{os.getpid()}.writing{path.suffix}")
    try:
        try:
            yield building
            building.replace(path)
        finally:
            building.unlink(missing_ok=True)
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was kept of it, and what was there before "
            "is untouched: free space, or name another place"
        ) from error
