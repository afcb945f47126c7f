"""Locations in an object store, with a claim instead of a lock."""

from __future__ import annotations

import errno
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, ClassVar, Self
from uuid import uuid4

from zarr.abc.store import Store

from ptychodask.errors import PtychodaskError
from ptychodask.storage.atomic import DAMAGED, LEDGER, StoreKind, Writing, from_json

logger = logging.getLogger(__name__)


CLAIM = "claim"
"""Object beside an unfinished store; its content is a random text that only its writer knows."""


@dataclass(frozen=True)
class ObjectLocation(ABC):
    """Object or prefix in a bucket, with the methods of `Location`.

    A subclass adds the requests to its object store. It contains no credentials: each process that receives it uses
    those of its environment.

    Notes
    -----
    Nothing can be renamed in a bucket. An existing store is removed first, and the new one is written under its name;
    the last put marks it as complete. A writer that is killed leaves a store that readers refuse.
    """

    scheme: ClassVar[str]
    """First part of its URLs."""

    bucket: str

    key: str
    """Names joined by slashes, without one at either end."""

    @abstractmethod
    def is_object(self) -> bool:
        """True if there is an object of this name."""

    @abstractmethod
    def below(self) -> Iterator[tuple[Self, int]]:
        """Objects below this name, each with its size in bytes."""

    @abstractmethod
    def read_bytes(self) -> bytes:
        """Content of an object; raises `FileNotFoundError` if there is none."""

    @abstractmethod
    def write_bytes(self, data: Any, /) -> None:
        """Create or replace an object; it appears only when complete."""

    @abstractmethod
    def create(self, content: bytes) -> bool:
        """Create an object; False if one exists already."""

    @abstractmethod
    def delete(self, keys: list[str]) -> None:
        """Remove objects of this bucket, if they exist."""

    @abstractmethod
    def zarr_store(self, *, read_only: bool = False) -> Store:
        """Store that Zarr and xarray open; its attribute `location` is this one."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str, /) -> Self:
        return replace(self, key=f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> Self:
        return replace(self, key=self.key.rpartition("/")[0])

    @property
    def local_path(self) -> None:
        return None

    def with_name(self, name: str) -> Self:
        return self.parent / name

    def resolve(self) -> Self:
        return self

    def exists(self) -> bool:
        return self.is_object() or self.is_dir()

    def is_dir(self) -> bool:
        return next(self.below(), None) is not None

    def make_folder(self) -> None:
        return  # a bucket has no folders

    def read_buffer(self) -> bytes:
        return self.read_bytes()

    def unlink(self, *, missing_ok: bool = False) -> None:
        # An object store answers the delete of a missing object as that of an existing one; only a question before
        # shows the difference.
        if not missing_ok and not self.is_object():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        self.delete([self.key])

    def remove(self) -> None:
        # Removal is not atomic, and Zarr reads a missing chunk as fill values. Without its root, the rest is no store
        # to any reader, however far the removal got.
        self.delete([(self / "zarr.json").key])
        self.delete([location.key for location, _ in self.below()])

    def add_lines(self, lines: Mapping[str, str]) -> None:
        # Nothing can be appended to an object: each line is one, below the name of the file.
        for name, line in lines.items():
            (self / name).write_bytes(line.encode())

    def lines(self) -> list[str]:
        keys = sorted((key for key, _ in self.below()), key=str)
        return [key.read_bytes().decode(errors="replace").strip() for key in keys]

    def recorded_format(self) -> str | None:
        return self._root().get("format")

    def is_complete(self) -> bool:
        # Objects are there from the first put on.
        return self._root().get("state") == "complete"

    def is_resumable(self) -> bool:
        return (self._beside / LEDGER).exists()

    def unfinished(self, noun: str, again: str) -> None:
        return None

    def _root(self) -> dict[str, Any]:
        """Root attributes of a Zarr store; their format is `DAMAGED` if unreadable."""
        try:
            attributes = from_json((self / "zarr.json").read_bytes().decode())["attributes"]
            return attributes if isinstance(attributes, dict) else {"format": DAMAGED}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            return {"format": DAMAGED}

    @property
    def _beside(self) -> Self:
        return self.with_name(f".{self.name}.writing")

    def check_vacant(self, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> None:
        complete, claimed, resumable = self.is_complete(), (self._beside / CLAIM).exists(), self.is_resumable()
        if claimed and not (overwrite or resume):
            raise self._at_work()
        if resumable and not complete and not (overwrite or resume):
            raise PtychodaskError(
                f"{self}: a stopped run left finished parts; continue it with resume=True (--resume), or start again "
                "with overwrite=True (--overwrite)"
            )
        if not self.exists():
            return
        if not overwrite and (complete or not (resume or claimed)):
            raise PtychodaskError(f"{self}: exists already; pass overwrite=True (--overwrite), or another name")
        # The root goes first: a writer killed while it removed the existing store leaves objects without a root, and
        # its claim, which it got only because the root was of this kind.
        format_name = self.recorded_format() or (kind.name if claimed else "something of another kind")
        if format_name not in (kind.name, DAMAGED):
            raise PtychodaskError(
                f"{self}: is {format_name}, and overwrite=True (--overwrite) replaces only a {kind.name}; pass another "
                "name, or remove it first"
            )

    @contextmanager
    def atomic_store(self, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> Iterator[Writing[Self]]:
        claim = self._claimed(overwrite=overwrite, kind=kind, resume=resume)
        try:
            yield Writing(self, self._beside, partial(self._check_held, claim))
        except BaseException:
            self._leave(claim)
            raise
        # Last: a writer that is killed just before leaves a claim, by which the next one is refused until it takes
        # over, and never an unfinished store that looks free.
        self._beside.remove()

    def _claimed(self, *, overwrite: bool, kind: StoreKind, resume: bool) -> bytes:
        """Claim the name for this writer, and remove an existing store."""
        self.check_vacant(overwrite=overwrite, kind=kind, resume=resume)
        claim, resuming = uuid4().hex.encode(), resume and self.is_resumable()
        # A bucket has no lock that ends with a process, so the claim is an object, and one of a killed writer stays.
        # With overwrite or resume the user has stated that no other run is at work: its claim goes.
        if resuming:
            (self._beside / CLAIM).unlink(missing_ok=True)
        else:
            self._beside.remove()
        # Of several writers that come this far, the conditional put lets one through.
        if not (self._beside / CLAIM).create(claim):
            raise self._at_work()
        # Only the one that has the claim removes the existing store.
        if not resuming:
            self.remove()
        return claim

    def _is_held(self, claim: bytes) -> bool:
        try:
            return (self._beside / CLAIM).read_bytes() == claim
        except FileNotFoundError:
            return False

    def _check_held(self, claim: bytes) -> None:
        # Asked just before the store is marked as complete: the objects may by now be those of the other writer.
        if not self._is_held(claim):
            raise PtychodaskError(
                f"{self}: another run took over with overwrite=True or resume=True while this one was writing "
                "it; wait until that run has finished, and check its result"
            )

    def _leave(self, claim: bytes) -> None:
        """Remove an unfinished store, unless it is resumable or another writer's."""
        try:
            if not self._is_held(claim):
                return
            # What a ledger lists is kept. Only the claim goes, so that the next run sees that no writer is at work.
            if self.is_resumable():
                (self._beside / CLAIM).unlink(missing_ok=True)
                return
            self.remove()
            self._beside.remove()
        except PtychodaskError as error:
            # The error that ended the writing is on its way; a second one must not hide it.
            logger.warning("%s; the unfinished store is left there, and cannot be opened", error)

    def _at_work(self) -> PtychodaskError:
        resuming = "continue with resume=True (--resume), or " if self.is_resumable() else ""
        return PtychodaskError(
            f"{self}: another run is writing it, or was killed ({self._beside / CLAIM} exists); wait for it, or, "
            f"if no run is at work, {resuming}start again with overwrite=True (--overwrite)"
        )
