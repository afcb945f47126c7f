"""Batches of groups in the form that Keras takes them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from ptychodask.scan import Scan
from ptychodask.training.data import GroupBatches, GroupReader, TargetOf


class GroupStream(keras.utils.PyDataset):
    """Batches ((X, offsets), target) of the groups of one scan, as `GroupBatches` deals them."""

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
    def deals(self) -> int:
        """How often the groups were put into an order."""
        return self._batches.deals

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
        """Deal the groups anew."""
        self._batches.deal()
