"""Batches of groups: shuffled reading, streams over several scans, datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec
from ptychodask.scan import Scan
from ptychodask.training.data import GroupArrays, GroupReader, PatternBuffer, TargetOf


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


BUFFER_BYTES = 128 * 2**20
"""Size of the shuffle buffer of network input, bytes; it bounds the memory of training."""


RUN_GROUPS = 64
"""Groups in a run: neighbours along the Hilbert curve, which are read together."""


class GroupBatches:
    """Batches of groups from a reader, in bounded memory, optionally shuffled.

    The groups are cut into short runs along the Hilbert curve, whose patterns are neighbours in the store. An order
    takes the runs at random, several per buffer; the patterns of a buffer are read once, and its groups are shuffled
    into batches. Groups that do not fill a batch are left out of this order.

    Parameters
    ----------
    reader : GroupReader
    batch_size : int
        Groups in one batch, or all of them if there are fewer.
    shuffle : bool
    seed : int
        Seed of the order.
    buffer_bytes : int, optional
        Network input in memory at a time, bytes; by default `BUFFER_BYTES`.
    """

    def __init__(
        self, reader: GroupReader, *, batch_size: int, shuffle: bool, seed: int, buffer_bytes: int | None = None
    ) -> None:
        self._reader = reader
        self.batch_size = min(batch_size, len(reader))
        self.n_orders = 0
        self._rng = np.random.default_rng(seed) if shuffle else None
        batch_bytes = 4 * reader.member.shape[1] * reader.scan.n_pixels**2 * self.batch_size
        self._buffer_batches = max(1, (buffer_bytes or BUFFER_BYTES) // batch_bytes)
        self._current: tuple[int, PatternBuffer] | None = None
        self.reorder()

    def __len__(self) -> int:
        return len(self._reader) // self.batch_size

    def __iter__(self) -> Iterator[GroupArrays]:
        for index in range(len(self)):
            yield self[index]

    def reorder(self) -> None:
        """Put the groups into a new order."""
        self.n_orders += 1
        n_groups = len(self._reader)
        if self._rng is None:
            self._order = np.arange(n_groups)
            return
        runs = np.array_split(np.arange(n_groups), -(-n_groups // RUN_GROUPS))
        order = np.concatenate([runs[i] for i in self._rng.permutation(len(runs))])
        size = self._buffer_batches * self.batch_size
        self._order = np.concatenate(
            [self._rng.permutation(order[start : start + size]) for start in range(0, n_groups, size)]
        )
        # One buffer that contains every group stays valid in any order.
        if n_groups > size:
            self._current = None

    def __getitem__(self, index: int) -> GroupArrays:
        start = index * self.batch_size
        return self._reader.arrays(self._order[start : start + self.batch_size], self._buffer(index))

    def _buffer(self, index: int) -> PatternBuffer:
        number = index // self._buffer_batches
        current = self._current
        if current is None or current[0] != number:
            size = self._buffer_batches * self.batch_size
            self._current = None
            current = (number, self._reader.read_patterns(self._order[number * size : (number + 1) * size]))
            self._current = current
        return current[1]


def as_tf_dataset(
    store: str | Path | Scan,
    grouping: GroupingSpec = GroupingSpec(),
    *,
    batch_size: int = 16,
    shuffle: bool = True,
    seed: int = 0,
) -> Any:
    """Groups of a scan as a ``tf.data.Dataset``, streamed in bounded memory.

    Parameters
    ----------
    store : path or Scan
    grouping : GroupingSpec
        How groups are drawn.
    batch_size : int
        Groups in one batch; an incomplete last batch is left out of an epoch.
    shuffle : bool
        Use another order in each epoch.
    seed : int
        Seed of the order.

    Returns
    -------
    tf.data.Dataset
        Elements ``((X, offsets), amplitude)`` as for Keras' ``fit``; shapes as from `GroupReader`. Only one iteration
        at a time.
    """
    import tensorflow as tf

    batches = GroupBatches(GroupReader(store, grouping), batch_size=batch_size, shuffle=shuffle, seed=seed)
    n_pixels, members = batches[0][0].shape[2:]
    shapes = ((n_pixels, n_pixels, members), (members, 2), (members, n_pixels, n_pixels))
    x, offset, amplitude = (tf.TensorSpec((batches.batch_size, *shape), tf.float32) for shape in shapes)

    def epoch() -> Iterator[Any]:
        for x, offset, amplitude in batches:
            yield (x, offset), amplitude
        batches.reorder()

    dataset = tf.data.Dataset.from_generator(epoch, output_signature=((x, offset), amplitude))
    return dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))


def as_torch_dataset(
    store: str | Path | Scan,
    grouping: GroupingSpec = GroupingSpec(),
    *,
    batch_size: int = 16,
    shuffle: bool = True,
    seed: int = 0,
) -> Any:
    """Groups of a scan as a ``torch.utils.data.IterableDataset``, streamed in bounded memory.

    Parameters
    ----------
    store, grouping, batch_size, shuffle, seed
        As in `as_tf_dataset`.

    Returns
    -------
    torch.utils.data.IterableDataset
        Elements are batches ``(X, offsets, amplitude)`` of tensors, shapes as from `GroupReader`: pass it to
        ``DataLoader(dataset, batch_size=None)``. Several workers divide the batches of an epoch among them; they need
        ``persistent_workers=True`` for another order in each epoch.

    Raises
    ------
    PtychodaskError
        If PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise PtychodaskError("as_torch_dataset: PyTorch is not installed; pip install torch") from error

    batches = GroupBatches(GroupReader(store, grouping), batch_size=batch_size, shuffle=shuffle, seed=seed)

    class TorchGroups(torch.utils.data.IterableDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Iterator[tuple[Any, ...]]:
            worker = torch.utils.data.get_worker_info()
            first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
            for index in range(first, len(batches), step):
                yield tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in batches[index])
            batches.reorder()

    return TorchGroups()
