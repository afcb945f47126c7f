"""Folders that appear whole or not at all, of a form that they record: scans, results, models, caches of patches."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ptychodask.scan import PtychodaskError

DAMAGED = "damaged"
"""What stands for the form of a folder whose root file cannot be read."""

CLEAR_ATTEMPTS = 50
"""Times that the remains of a store are removed, a tenth of a second apart, until they are gone."""


@dataclass(frozen=True)
class Form:
    """What tells one kind of folder that this package writes from another, and how its users speak of it."""

    name: str
    """The root attribute ``format``."""

    version: int
    """The newest ``format_version`` that is read."""

    noun: str
    """What it is called."""

    maker: str
    """The command that makes one."""


def check_vacant(path: Path, *, overwrite: bool, form: Form) -> None:
    """Raise `PtychodaskError` unless `path` can be written: its folder is there, and nothing is in the way.

    Parameters
    ----------
    path : Path
        What shall be written.
    overwrite : bool
        Whether what is there and of the same form, and leftovers of a killed writer, may be replaced; never anything
        else.
    form : Form
        What it shall be: a scan, a result or a model.
    """
    if path.exists() and not overwrite:
        raise PtychodaskError(f"{path}: exists already; pass overwrite=True (--overwrite), or another name")
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or _form(path) in (form.name, DAMAGED))):
        raise PtychodaskError(
            f"{path}: is {_form(path) or 'something of another kind'}, and overwrite=True (--overwrite) replaces a "
            f"{form.name} alone; pass another name, or remove it first"
        )
    if not path.parent.is_dir():
        raise PtychodaskError(f"{path}: its folder {path.parent} does not exist; make it first")
    if building_path(path).exists() and not overwrite:
        raise PtychodaskError(
            f"{path}: another run is writing it, or was stopped before its end ({building_path(path)} is there); "
            "wait for it, or pass overwrite=True (--overwrite) to start again"
        )


def _form(path: Path) -> str | None:
    """The format that a folder records of itself in the root of a Zarr store or a model bundle; None without such."""
    for name, parents in (("zarr.json", ("attributes",)), ("model.json", ())):
        if (path / name).is_file():
            try:
                found = json.loads((path / name).read_text())
                for parent in parents:
                    found = found[parent]
                return str(found["format"])
            except (OSError, ValueError, KeyError, TypeError):
                return DAMAGED
    return None


def building_path(path: Path) -> Path:
    """Where a folder is written before it takes its name."""
    return path.with_name(f".{path.name}.writing")


def _take_place(new: Path, path: Path) -> None:
    """Give `new` the name `path`; what had it goes, but comes back if the new one cannot take its place."""
    old = path.with_name(f".{path.name}.replaced")
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
def whole_or_nothing(path: Path, *, overwrite: bool, form: Form) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not.

    Parameters
    ----------
    path : Path
        What shall exist in the end.
    overwrite : bool
        Replace what is there (only once the new one is whole), and leftovers of a killed writer.
    form : Form
        What it shall be; something of another form is never replaced.

    Yields
    ------
    Path
        The folder beside `path` to write into.

    Raises
    ------
    PtychodaskError
        If `path` exists already, is of another form, another writer is (or was) at work on it, its parent
        folder is missing, or the disk refuses the writing.
    """
    check_vacant(path, overwrite=overwrite, form=form)
    building = building_path(path)
    try:
        _remove(building)
        building.mkdir()
        yield building
        _take_place(building, path)
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was kept of it, and what was there before "
            "is untouched: free space or name another place"
        ) from error
    finally:
        _clear_away(building)
