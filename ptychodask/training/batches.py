"""Batches of groups: shuffled reading, streams over several scans, datasets."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.grouping import GroupingSpec
from ptychodask.models.backend import keras
from ptychodask.scan import Scan
from ptychodask.store import open_scan
from ptychodask.training.data import (
    GroupArrays,
    GroupReader,
    PatternBuffer,
    TargetOf,
    amplitude_target,
    patch_target,
)

logger = logging.getLogger(__name__)


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


class Share(NamedTuple):
    """Part of the groups that one process of a distributed training has."""

    rank: int = 0
    """Number of the process, from 0."""

    n_ranks: int = 1
    """Number of processes."""

    @classmethod
    def given(cls, rank: int | None, n_ranks: int | None, function: str) -> Share | None:
        """Share from a function's arguments; None without them."""
        if rank is None and n_ranks is None:
            return None
        are_whole = all(isinstance(each, Integral) and not isinstance(each, bool) for each in (rank, n_ranks))
        if rank is None or n_ranks is None or not are_whole or not 0 <= rank < n_ranks:
            raise PtychodaskError(
                f"{function}: rank is {rank!r} and n_ranks {n_ranks!r}, expected whole numbers, 0 <= rank < n_ranks; "
                "pass both or neither"
            )
        return cls(int(rank), int(n_ranks))

    def n_groups(self, n_groups: int, *, drop_last: bool) -> int:
        """Number of groups of each share of `n_groups`, the same for all.

        Raises `PtychodaskError` if there are fewer groups than processes.
        """
        if n_groups < self.n_ranks:
            raise PtychodaskError(f"{n_groups} groups cannot be shared by {self.n_ranks} ranks; train on fewer")
        return n_groups // self.n_ranks if drop_last else -(-n_groups // self.n_ranks)

    def of(self, order: NDArray[np.int64], n_groups: int) -> NDArray[np.int64]:
        """Share of an order, `n_groups` consecutive entries.

        After the end of the order it continues from the beginning.

        Examples
        --------
        >>> [Share(rank, 2).of(np.arange(5), 3).tolist() for rank in (0, 1)]
        [[0, 1, 2], [3, 4, 0]]
        """
        return order.take(np.arange(self.rank * n_groups, (self.rank + 1) * n_groups), mode="wrap")


class GroupBatches:
    """Batches of groups from a reader, in bounded memory, optionally shuffled.

    The groups are cut into short runs along the Hilbert curve, whose patterns are neighbours in the store. An order
    takes the runs at random, several per buffer; the patterns of a buffer are read once, and its groups are shuffled
    into batches.

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
    drop_last : bool
        Leave groups that do not fill a batch out of an order; without it they are its last, smaller batch.
    share : Share
        Part of the groups that these batches contain.
    """

    def __init__(
        self,
        reader: GroupReader,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        buffer_bytes: int | None = None,
        drop_last: bool = True,
        share: Share = Share(),
    ) -> None:
        self._reader, self._share, self._drop_last = reader, share, drop_last
        self.n_groups = share.n_groups(len(reader), drop_last=drop_last)
        self.batch_size = min(batch_size, self.n_groups)
        self._seed = seed if shuffle else None
        batch_bytes = 4 * reader.member.shape[1] * reader.scan.n_pixels**2 * self.batch_size
        self._buffer_batches = max(1, (buffer_bytes or BUFFER_BYTES) // batch_bytes)
        self._begin()
        self.reorder()

    def _begin(self) -> None:
        self.n_orders = 0
        self._rng = None if self._seed is None else np.random.default_rng(self._seed)
        self._current: tuple[int, PatternBuffer] | None = None

    def __len__(self) -> int:
        return self.n_groups // self.batch_size if self._drop_last else -(-self.n_groups // self.batch_size)

    def __iter__(self) -> Iterator[GroupArrays]:
        for index in range(len(self)):
            yield self[index]

    def reorder(self) -> None:
        """Put the groups into a new order."""
        self.n_orders += 1
        n_groups = len(self._reader)
        if self._rng is None:
            self._order = self._share.of(np.arange(n_groups), self.n_groups)
            return
        runs = np.array_split(np.arange(n_groups), -(-n_groups // RUN_GROUPS))
        # The same for all shares, each of which then shuffles its own part with the same numbers.
        order = self._share.of(np.concatenate([runs[i] for i in self._rng.permutation(len(runs))]), self.n_groups)
        size = self._buffer_batches * self.batch_size
        self._order = np.concatenate(
            [self._rng.permutation(order[start : start + size]) for start in range(0, len(order), size)]
        )
        # One buffer that contains every group stays valid in any order.
        if n_groups > size or self._share.n_ranks > 1:
            self._current = None

    def set_epoch(self, epoch: int) -> None:
        """Put the groups into the order of an epoch, counted from 0."""
        if epoch < self.n_orders - 1:
            self._begin()
        while self.n_orders < epoch + 1:
            self.reorder()

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


Target = Literal["amplitude", "patch"] | TargetOf
"""Target of a dataset: the measured amplitude, the known patches, or a function of the groups."""


def _batches_of(
    function: str,
    share: Share,
    *,
    store: str | Path | Scan,
    grouping: GroupingSpec,
    batch_size: int,
    shuffle: bool,
    seed: int,
    exclude: Sequence[int] | NDArray[np.integer[Any]],
    member: NDArray[np.integer[Any]] | None,
    target: Target,
    drop_last: bool,
) -> GroupBatches:
    """Batches of a dataset, from the arguments of its function."""
    for name, value, lowest in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < lowest:
            raise PtychodaskError(f"{function}: {name} is {value!r}, expected a whole number of at least {lowest}")
    scan = store if isinstance(store, Scan) else open_scan(store)
    if not callable(target):
        check_choice("target", target, ("amplitude", "patch", "a function"), function)
        target = patch_target(scan) if target == "patch" else amplitude_target(scan)
    reader = GroupReader(scan, grouping, member=member, target_of=target, exclude=exclude)
    batches = GroupBatches(
        reader, batch_size=int(batch_size), shuffle=shuffle, seed=int(seed), drop_last=drop_last, share=share
    )
    if share.n_ranks > 1:
        logger.info("%s: rank %d of %d has %d of %d groups", function, *share, batches.n_groups, len(reader))
    return batches


def as_tf_dataset(
    store: str | Path | Scan,
    grouping: GroupingSpec = GroupingSpec(),
    *,
    batch_size: int = 16,
    shuffle: bool = True,
    seed: int = 0,
    exclude: Sequence[int] | NDArray[np.integer[Any]] = (),
    member: NDArray[np.integer[Any]] | None = None,
    target: Target = "amplitude",
    drop_last: bool = False,
    rank: int | None = None,
    n_ranks: int | None = None,
) -> Any:
    """Groups of a scan as a ``tf.data.Dataset``, streamed in bounded memory.

    Parameters
    ----------
    store : path or Scan
    grouping : GroupingSpec
        How groups are drawn.
    batch_size : int
        Groups in one batch.
    shuffle : bool
        Use another order in each epoch.
    seed : int
        Seed of the order, the same for all ranks.
    exclude : int array (k,), optional
        Patterns that no group contains.
    member : int array (group, channel), optional
        Groups, in place of those drawn by `grouping`.
    target : str or callable
        ``amplitude``: measured amplitude (group, C, N, N); ``patch``: labels or known patches of the object, real and
        imaginary part (group, C, N, N, 2); or a function of the members (group, C) and their X (group, C, N, N).
    drop_last : bool
        Leave an incomplete last batch out of an epoch.
    rank, n_ranks : int, optional
        Number of this process, from 0, and of all processes of a distributed training, each of which gets its own share
        of the groups. By default the dataset has all of them, and TensorFlow's strategies divide its batches.

    Returns
    -------
    tf.data.Dataset
        Elements ``((X, offsets), target)`` as for Keras' ``fit``; shapes as from `GroupReader`. Only one iteration at a
        time.

    Raises
    ------
    PtychodaskError
        If an argument is invalid, or there is no group, or no known patch for the target "patch".

    Notes
    -----
    All ranks have the same number of batches, or the process with one more would wait for the others for ever: shares
    are filled with a few groups from the beginning of the order, or cut if `drop_last`.
    """
    import tensorflow as tf

    share = Share.given(rank, n_ranks, "as_tf_dataset") or Share()
    batches = _batches_of(
        "as_tf_dataset",
        share,
        store=store,
        grouping=grouping,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        exclude=exclude,
        member=member,
        target=target,
        drop_last=drop_last,
    )
    size = batches.batch_size if batches.n_groups % batches.batch_size == 0 or drop_last else None
    x, offset, values = (tf.TensorSpec((size, *array.shape[1:]), array.dtype) for array in batches[0])

    def epoch() -> Iterator[Any]:
        for x, offset, values in batches:
            yield (x, offset), values
        batches.reorder()

    dataset = tf.data.Dataset.from_generator(epoch, output_signature=((x, offset), values))
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))
    if n_ranks is None:
        return dataset
    options = tf.data.Options()
    # A strategy would divide the share again.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)


def as_torch_dataset(
    store: str | Path | Scan,
    grouping: GroupingSpec = GroupingSpec(),
    *,
    batch_size: int = 16,
    shuffle: bool = True,
    seed: int = 0,
    exclude: Sequence[int] | NDArray[np.integer[Any]] = (),
    member: NDArray[np.integer[Any]] | None = None,
    target: Target = "amplitude",
    drop_last: bool = False,
    rank: int | None = None,
    n_ranks: int | None = None,
) -> Any:
    """Groups of a scan as a ``torch.utils.data.IterableDataset``, streamed in bounded memory.

    Parameters
    ----------
    store, grouping, batch_size, shuffle, seed, exclude, member, target, drop_last
        As in `as_tf_dataset`.
    rank, n_ranks : int, optional
        As in `as_tf_dataset`; by default those of ``torch.distributed``, if it is initialised, else of the variables
        ``RANK`` and ``WORLD_SIZE`` that ``torchrun`` sets, else a single process.

    Returns
    -------
    torch.utils.data.IterableDataset
        Elements are batches ``(X, offsets, target)`` of tensors, shapes as from `GroupReader`: pass it to
        ``DataLoader(dataset, batch_size=None)``. Several workers divide the batches of an epoch among them; they need
        ``persistent_workers=True``, or ``dataset.set_epoch(epoch)`` before each epoch, for another order in each.

    Raises
    ------
    PtychodaskError
        If PyTorch is not installed, or as `as_tf_dataset`.
    """
    try:
        import torch
    except ImportError as error:
        raise PtychodaskError("as_torch_dataset: PyTorch is not installed; pip install torch") from error

    given = Share.given(rank, n_ranks, "as_torch_dataset")
    share = given or _torch_share(torch)
    arguments: dict[str, Any] = {
        "store": store,
        "grouping": grouping,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "seed": seed,
        "exclude": exclude,
        "member": member,
        "target": target,
        "drop_last": drop_last,
    }
    batches = _batches_of("as_torch_dataset", share, **arguments)

    class TorchGroups(torch.utils.data.IterableDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Iterator[tuple[Any, ...]]:
            worker = torch.utils.data.get_worker_info()
            if worker is None and given is None and _torch_share(torch) != share:
                raise PtychodaskError(
                    f"as_torch_dataset: was called when there was {share.n_ranks} rank, and torch.distributed now has "
                    f"{_torch_share(torch).n_ranks}; call it once that is initialised, or pass rank= and n_ranks="
                )
            first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
            for index in range(first, len(batches), step):
                yield tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in batches[index])
            batches.reorder()

        def set_epoch(self, epoch: int) -> None:
            batches.set_epoch(epoch)

        def __reduce__(self) -> tuple[Any, ...]:
            # For loader workers that are not forked: the class depends on PyTorch, which is imported here only.
            return _torch_dataset_again, (arguments | share._asdict(), batches.n_orders - 1)

    return TorchGroups()


def _torch_dataset_again(arguments: dict[str, Any], epoch: int) -> Any:
    """The dataset of `as_torch_dataset` in another process."""
    dataset = as_torch_dataset(**arguments)
    dataset.set_epoch(epoch)
    return dataset


def _torch_share(torch: Any) -> Share:
    """Share of this process in a distributed training of PyTorch."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Share(torch.distributed.get_rank(), torch.distributed.get_world_size())
    try:
        return Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except (KeyError, ValueError):
        return Share()
