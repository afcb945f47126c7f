"""Batches of groups as Keras datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from ptychodask.scan import Scan
from ptychodask.training.data import GroupBatches, GroupReader, TargetOf


class GroupStream(keras.utils.PyDataset):
    """Batches ((X, offsets), target) of one scan, in the order of `GroupBatches`."""

    def __init__(
        self,
        scan: Scan,
        member: NDArray[np.int32],
        target_of: TargetOf,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        buffer_bytes: int | None = None,
    ) -> None:
        super().__init__()
        reader = GroupReader(scan, member=member, target_of=target_of)
        self._batches = GroupBatches(
            reader, batch_size=batch_size, shuffle=shuffle, seed=seed, buffer_bytes=buffer_bytes
        )

    @property
    def n_orders(self) -> int:
        """Number of times the groups were put into an order."""
        return self._batches.n_orders

    @property
    def groups_per_epoch(self) -> int:
        """Groups in all batches of an epoch."""
        return len(self._batches) * self._batches.batch_size

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[Any, NDArray[np.float32]]:
        x, offset, target = self._batches[index]
        return (x, offset), target

    def on_epoch_end(self) -> None:
        """Put the groups into a new order."""
        self._batches.reorder()


class MixedStream(keras.utils.PyDataset):
    """Batches of several scans, each batch from a single scan.

    Batches are ((X, offsets, scan number), target), as many of each scan as it has. The target has an additional
    channel with the number of the scan: see `with_scan_number`.
    """

    def __init__(self, streams: Sequence[GroupStream], *, shuffle: bool, seed: int) -> None:
        super().__init__()
        self._streams = streams
        self._rng = np.random.default_rng(seed) if shuffle else None
        self.n_orders = 1
        self._mix()

    @property
    def groups_per_epoch(self) -> int:
        """Groups in all batches of an epoch."""
        return sum(stream.groups_per_epoch for stream in self._streams)

    def __len__(self) -> int:
        return sum(len(stream) for stream in self._streams)

    def __getitem__(self, index: int) -> tuple[Any, NDArray[np.float32]]:
        number, batch = self._batches[index]
        (x, offset), target = self._streams[number][batch]
        scan = np.full((len(x), 1), number, np.int32)
        return (x, offset, scan), with_scan_number(target, number)

    def on_epoch_end(self) -> None:
        """Put groups of each scan into a new order; mix batches."""
        self.n_orders += 1
        for stream in self._streams:
            stream.on_epoch_end()
        self._mix()

    def _mix(self) -> None:
        number = np.repeat(np.arange(len(self._streams)), [len(stream) for stream in self._streams])
        if self._rng is not None:
            number = self._rng.permutation(number)
        batch = np.empty(len(number), np.int64)
        for each, stream in enumerate(self._streams):
            batch[number == each] = np.arange(len(stream))
        self._batches = [(int(n), int(b)) for n, b in zip(number, batch, strict=True)]


def with_scan_number(target: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    """Target (group, C, ...) with the scan's number as additional channel.

    A Keras loss receives only the target and the prediction, so that the number is passed in the target.
    """
    return np.concatenate([target, np.full_like(target[:, :1], number)], axis=1)
