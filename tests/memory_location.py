"""A location in memory: the shortest backend that stores scans and results, one file as any other."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from ptychodask.storage import location
from ptychodask.storage.objects import ObjectLocation

OBJECTS: dict[tuple[str, str], bytes] = {}
"""Content of all objects, by bucket and key."""


class MemoryLocation(ObjectLocation):
    """Object or prefix in the memory of this process."""

    scheme = "memory"

    def is_object(self) -> bool:
        return (self.bucket, self.key) in OBJECTS

    def below(self) -> Iterator[tuple[MemoryLocation, int]]:
        for (bucket, key), content in list(OBJECTS.items()):
            if bucket == self.bucket and key.startswith(f"{self.key}/"):
                yield MemoryLocation(bucket, key), len(content)

    def read_bytes(self) -> bytes:
        if not self.is_object():
            raise FileNotFoundError(str(self))
        return OBJECTS[self.bucket, self.key]

    def write_bytes(self, data: Any, /) -> None:
        OBJECTS[self.bucket, self.key] = bytes(data)

    def create(self, content: bytes) -> bool:
        return OBJECTS.setdefault((self.bucket, self.key), content) is content

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            OBJECTS.pop((self.bucket, key), None)

    def zarr_store(self, *, read_only: bool = False) -> MemoryZarrStore:
        return MemoryZarrStore(self, read_only=read_only)


class Below(MutableMapping[str, Buffer]):
    """Objects below a location, by the rest of their keys, as Zarr's store in memory takes them."""

    def __init__(self, location: MemoryLocation) -> None:
        self.location = location

    def __getitem__(self, key: str) -> Buffer:
        try:
            return cpu.Buffer.from_bytes((self.location / key).read_bytes())
        except FileNotFoundError:
            raise KeyError(key) from None

    def __setitem__(self, key: str, value: Buffer) -> None:
        (self.location / key).write_bytes(value.to_bytes())

    def __delitem__(self, key: str) -> None:
        self.location.delete([(self.location / key).key])

    def __iter__(self) -> Iterator[str]:
        return (found.key.removeprefix(f"{self.location.key}/") for found, _ in self.location.below())

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MemoryZarrStore(MemoryStore):
    """Zarr store at a location in memory, pickled as that location."""

    def __init__(self, location: MemoryLocation, *, read_only: bool = False) -> None:
        super().__init__(Below(location), read_only=read_only)
        self.location = location

    def with_read_only(self, read_only: bool = False) -> MemoryZarrStore:
        return MemoryZarrStore(self.location, read_only=read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MemoryZarrStore) and self.location == other.location

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.location, self.read_only)


def _reopened(location: MemoryLocation, read_only: bool) -> MemoryZarrStore:
    return MemoryZarrStore(location, read_only=read_only)


location.SCHEMES[MemoryLocation.scheme] = MemoryLocation
