"""Atomic creation of folders and files on a disk.

A folder or file is written under another name and renamed when it is complete; a lock keeps a second writer out.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar
from uuid import uuid4

from ptychodask.errors import PtychodaskError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


WHOLE = "whole"
"""Subfolder of the building folder that is renamed to the final path."""


LOCK = "lock"
"""File in the building folder, locked by the writer; the lock ends with its process."""


LEDGER = "ledger.jsonl"
"""File in the building folder that lists the finished parts; with it, the writing can be resumed."""


DAMAGED = "damaged"
"""Format reported for a folder whose root file cannot be read."""


CLEAR_ATTEMPTS = 50
"""Attempts to remove the building folder, 0.1 s apart."""


READ_ONLY_ERRORS = {errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors of a disk or folder that this user cannot write."""


REPORTED_AFTER_S = 10.0
"""Wait for another process after which a warning is logged."""


LOCK_POLL_S = 0.05
"""Time between two attempts at a lock, before that warning."""


@dataclass(frozen=True)
class StoreKind:
    """Kind of folder this package writes: format, version, words for messages."""

    name: str
    """The root attribute ``format``."""

    version: int
    """The newest ``format_version`` that is read."""

    noun: str
    """Word for it in messages."""

    maker: str
    """Subcommand that makes one."""

    may_grow: bool = False
    """True if readers open it while it is still growing."""


L_co = TypeVar("L_co", covariant=True)


@dataclass(frozen=True)
class Writing(Generic[L_co]):
    """Store that is being written, with the files of its writer."""

    whole: L_co
    """Location to write into: a folder is renamed at the end, objects have their final names from the beginning."""

    beside: L_co
    """Ledger, sums and lock or claim of the writer; removed at the end."""

    check_held: Callable[[], None] = lambda: None
    """Raises `PtychodaskError` if another writer has taken over; called just before the store is marked as complete."""


def check_vacant_folder(path: Path, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> None:
    """Raise `PtychodaskError` unless `path` can be written.

    Parameters
    ----------
    path : Path
        Folder to be written; its parent must exist.
    overwrite : bool
        True if an existing folder of the same kind, and files of a stopped writer, may be replaced; a folder of another
        kind never is.
    kind : StoreKind
        Kind of the new folder.
    resume : bool
        True if the finished parts of a stopped writer may be continued.
    """
    # A writer killed between its two renames left the previous version under another name: `path` is not free, and the
    # next writer restores that version under its lock. A check may run beside any writer, so it changes nothing on
    # disk.
    previous = path if path.exists() or not replaced_path(path).exists() else replaced_path(path)
    if previous.exists() and not overwrite:
        raise _exists(path)
    # A mistyped --out must never cost the user a folder that this package did not write.
    if previous.exists() and not (
        previous.is_dir() and (not any(previous.iterdir()) or recorded_folder_format(previous) in (kind.name, DAMAGED))
    ):
        raise PtychodaskError(
            f"{previous}: is {recorded_folder_format(previous) or 'something of another kind'}, and overwrite=True "
            f"(--overwrite) replaces only a {kind.name}; pass another name, or remove it first"
        )
    if not path.parent.is_dir():
        raise PtychodaskError(f"{path}: its folder {path.parent} does not exist; make it first")
    building = building_path(path)
    if not building.exists():
        return
    locked = is_locked(building)
    if locked:
        raise _folder_at_work(path)
    if is_resumable_folder(path) and not (overwrite or resume):
        raise PtychodaskError(
            f"{path}: a stopped run left finished parts ({building}); continue it with resume=True (--resume), or "
            "start again with overwrite=True (--overwrite)"
        )
    # Without locks a running writer looks like a killed one; only the user knows.
    if locked is None and not (overwrite or resume):
        raise PtychodaskError(
            f"{path}: another run is writing it, or was stopped ({building} exists); wait for it, or start again with "
            "overwrite=True (--overwrite)"
        )


def _exists(path: Path) -> PtychodaskError:
    kept = "" if path.exists() else f" (as {replaced_path(path)}, since its writer was stopped)"
    return PtychodaskError(f"{path}: exists already{kept}; pass overwrite=True (--overwrite), or another name")


def _folder_at_work(path: Path) -> PtychodaskError:
    return PtychodaskError(
        f"{path}: another run is writing it ({building_path(path)}); wait until it has finished, or pass another name"
    )


def is_resumable_folder(path: Path) -> bool:
    """True if a stopped writer left a ledger and its data."""
    building = building_path(path)
    return (building / LEDGER).exists() and (building / WHOLE).exists()


def is_locked(building: Path) -> bool | None:
    """True if a process has locked a building folder; None if unknown."""
    try:
        with (building / LOCK).open() as file:
            return not _lock(file)
    except FileNotFoundError:
        return False
    except OSError:
        return None


def _lock(file: IO[str]) -> bool:
    """Lock an open file; False if another process has locked it.

    Raises
    ------
    OSError
        If the system or file system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "files cannot be locked on this system")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked_building(path: Path, *, resume: bool) -> Iterator[Path]:
    """Building folder of `path`, locked for this process: empty, or resumed."""
    building = building_path(path)
    resuming = resume and is_resumable_folder(path)
    if not resuming:
        remove_path(building)
    # Of two writers that start together, mkdir lets one through; of two that resume, the lock below does.
    try:
        building.mkdir(exist_ok=resuming)
    except FileExistsError:
        raise _folder_at_work(path) from None
    # The kernel frees the lock when the process ends, however it ends: no process id or time limit can be mistaken.
    with (building / LOCK).open("a") as file:
        try:
            if not _lock(file):
                raise _folder_at_work(path)
        except OSError as error:
            logger.warning("%s: cannot be locked (%s): a second run on it would not be noticed", building, error)
        (building / WHOLE).mkdir(exist_ok=True)
        yield building


@contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Lock an existing folder until the block or the process ends.

    Parameters
    ----------
    folder : Path
    wait : bool
        Wait until another process has released it.

    Raises
    ------
    BlockingIOError
        If another process has locked it, and `wait` is False.
    """
    if fcntl is None:
        logger.warning("%s: cannot be locked on this system: a second writer would not be noticed", folder)
        yield
        return
    # The folder itself is locked, so that no lock file is left in a store that others copy and list.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            _lock_folder(descriptor, folder, wait=wait)
        except BlockingIOError:
            raise
        except OSError as error:
            logger.warning("%s: cannot be locked (%s): a second writer would not be noticed", folder, error)
        yield
    finally:
        os.close(descriptor)


def _lock_folder(descriptor: int, folder: Path, *, wait: bool) -> None:
    deadline = time.monotonic() + REPORTED_AFTER_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
        if time.monotonic() > deadline:
            logger.warning("%s: another process is writing it: waiting until it has finished", folder)
            return fcntl.flock(descriptor, fcntl.LOCK_EX)
        time.sleep(LOCK_POLL_S)


def recorded_folder_format(path: Path) -> str | None:
    """Format in the root of a store or bundle; None without one."""
    for name, parents in (("zarr.json", ("attributes",)), ("model.json", ())):
        if (path / name).is_file():
            try:
                attributes = read_json(path / name)
                for parent in parents:
                    attributes = attributes[parent]
                return str(attributes["format"]) if "format" in attributes else None
            except (OSError, ValueError, KeyError, TypeError):
                return DAMAGED
    return None


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not valid JSON.
    """
    return from_json(path.read_text())


def from_json(text: str) -> Any:
    """Value of a JSON text.

    Raises
    ------
    ValueError
        If it is not valid JSON, or nested deeper than Python's parser allows.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def building_path(path: Path) -> Path:
    """Path of the building folder, on the same file system as `path`."""
    return path.with_name(f".{path.name}.writing")


def replaced_path(path: Path) -> Path:
    """Path of the previous version while the new one is renamed."""
    return path.with_name(f".{path.name}.replaced")


def unfinished_folder(path: Path, noun: str, again: str) -> str | None:
    """Reason why a missing folder is unfinished; None if nobody began it."""
    if replaced_path(path).exists():
        return (
            f"its writer is at work, or was stopped, while it replaced the {noun}; the previous one "
            f"is {replaced_path(path)}: wait for the writer, or rename that folder to {path.name}"
        )
    if building_path(path).exists():
        return (
            f"the {noun} is unfinished: its writer is still at work, or was stopped "
            f"({building_path(path)}); wait for it, or {again}"
        )
    return None


def _restore_previous(path: Path) -> None:
    """Restore the previous version if its writer was killed between renames."""
    if replaced_path(path).exists() and not path.exists():
        replaced_path(path).rename(path)


def _rename_into_place(new: Path, path: Path) -> None:
    """Rename `new` to `path`; the previous version returns if that fails."""
    old = replaced_path(path)
    # Left by a writer that was killed while it removed this folder; its new version has the name `path`.
    remove_path(old)
    # No rename replaces a folder that is not empty, so it takes two. The previous version is deleted last: a writer
    # that is killed anywhere leaves either version complete.
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    remove_path(old)


def remove_path(path: Path) -> None:
    """Remove a file, or a folder with its content, if any."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clear_away(building: Path) -> None:
    """Remove a building folder, even if a task still writes to it."""
    # A task on a worker may still run after the run has failed; rmtree fails if it adds a file at that moment.
    for _ in range(CLEAR_ATTEMPTS):
        shutil.rmtree(building, ignore_errors=True)
        if not building.exists():
            return
        time.sleep(0.1)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> Iterator[Path]:
    """Folder to write into, renamed to `path` if the block succeeds.

    It is removed if the block fails.

    Parameters
    ----------
    path : Path
        Final path of the folder.
    overwrite : bool
        Replace an existing folder (only once the new one is complete), and files of a stopped writer.
    kind : StoreKind
        Kind of the new folder; one of another kind is never replaced.
    resume : bool
        Continue in the folder that a stopped writer left, if there is a file `LEDGER` beside it.

    Yields
    ------
    Path
        The folder to write into. Its parent is the writer's too, and is removed at the end. Both stay if the process is
        killed, or if the block fails once the parent contains a file `LEDGER`, which lists the finished parts.

    Raises
    ------
    PtychodaskError
        If `path` exists already or is of another kind, another writer is running, a stopped one left finished parts,
        the parent folder is missing, or writing fails.
    """
    check_vacant_folder(path, overwrite=overwrite, kind=kind, resume=resume)
    try:
        with _locked_building(path, resume=resume) as building:
            try:
                # Under the lock, no other writer can be between its two renames. One may have finished since the check,
                # and its result is not replaced unless the user allowed it.
                _restore_previous(path)
                if path.exists() and not overwrite:
                    raise _exists(path)
                yield building / WHOLE
                _rename_into_place(building / WHOLE, path)
            finally:
                # After the rename nothing is resumable. The lock is released only when the folder is gone.
                if not is_resumable_folder(path):
                    _clear_away(building)
    except OSError as error:
        kept, remedy = "nothing of it was kept", "free space"
        if is_resumable_folder(path):
            kept = "its finished parts are kept"
            remedy = "free space and continue with resume=True (--resume)"
        raise PtychodaskError(
            f"{path}: cannot be written ({error.strerror or error}); {kept}, and an earlier version is unchanged: "
            f"{remedy}, or choose another location"
        ) from error


@contextmanager
def atomic_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Path to write to, renamed to `path` if the block succeeds.

    It is removed if the block fails.

    Parameters
    ----------
    path : Path
        Final path of the file.
    overwrite : bool
        Replace an existing file (only once the new one is complete); never a folder.

    Yields
    ------
    Path
        In the same folder, with the suffix of `path`.

    Raises
    ------
    PtychodaskError
        If the file exists already, `path` is a folder, its parent folder is missing, or writing fails.
    """
    if path.is_dir():
        raise PtychodaskError(f"{path}: is a folder, expected the name of a file; name a file in it")
    if path.exists() and not overwrite:
        raise PtychodaskError(f"{path}: exists already; pass overwrite=True (--overwrite), or another name")
    if not path.parent.is_dir():
        raise PtychodaskError(f"{path}: its folder {path.parent} does not exist; make it first")
    try:
        with renamed_file(path) as building:
            yield building
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be written ({error.strerror or error}); nothing of it was kept, and an earlier version is "
            "unchanged: free space, or choose another location"
        ) from error


@contextmanager
def renamed_file(path: Path) -> Iterator[Path]:
    """As `atomic_file`, replacing any file, without its checks and messages.

    Raises
    ------
    OSError
        If writing fails.
    """
    # A name of its own keeps two writers apart, also on two machines, until the rename, which the later one wins; the
    # suffix stays, for some libraries choose the format by it.
    building = Path(path.with_name(f".{path.stem}.{uuid4().hex}.writing{path.suffix}"))
    try:
        yield building
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)
