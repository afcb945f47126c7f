"""Groups for other people's loops: the same arrays by slice, by TensorFlow and by PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

import ptychodask
from ptychodask.grouping import GroupingSpec
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.groups import group
from ptychodask.training import GroupReader, as_tf_dataset, as_torch_dataset, member_offsets

N = 16

PAIRS = GroupingSpec(members=2, neighbours=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "scan.zarr"
    simulate(path, n_pixels=N, n_patterns=50, step_px=3.0, dose=1e4, probe="disc", seed=2)
    return path


def test_a_slice_of_a_reader_gives_what_the_networks_see(store):
    scan, member = open_scan(store), group(store, PAIRS).member
    reader = GroupReader(store, PAIRS)
    x, offset, amplitude = reader[3:10]
    np.testing.assert_array_equal(x, np.moveaxis(scan.network_input(np.arange(50))[member[3:10]], 1, -1))
    np.testing.assert_array_equal(offset, member_offsets(scan, member[3:10]))
    np.testing.assert_allclose(amplitude, scan.amplitude(np.arange(50))[member[3:10]], rtol=1e-6)
    assert len(reader) == 50
    for part, whole in zip(reader[np.array([9, 3])], (x, offset, amplitude), strict=True):
        np.testing.assert_array_equal(part, whole[[6, 0]])


def test_reading_in_pieces_changes_nothing(store, monkeypatch):
    whole = GroupReader(store, PAIRS)[:]
    monkeypatch.setattr("ptychodask.training.data.READ_BYTES", 7 * 4 * N * N)
    for found, expected in zip(GroupReader(store, PAIRS)[:], whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def rows(offset):
    return {tuple(row) for row in np.asarray(offset).reshape(len(offset), -1)}


def epoch_of(dataset):
    return [(np.array(x), np.array(offset), np.array(amplitude)) for (x, offset), amplitude in dataset]


def test_a_tensorflow_dataset_streams_each_group_once_in_a_new_order(store):
    dataset = as_tf_dataset(store, PAIRS, batch_size=10, seed=1)
    first, second = epoch_of(dataset), epoch_of(dataset)
    assert len(dataset) == len(first) == 5
    everything = rows(GroupReader(store, PAIRS)[:][1])
    for epoch in (first, second):
        assert set.union(*(rows(offset) for _, offset, _ in epoch)) == everything
    assert rows(first[0][1]) != rows(second[0][1])
    for x, _, amplitude in first:
        np.testing.assert_allclose(
            np.moveaxis(x, -1, 1), amplitude * np.float32(open_scan(store).normalization), rtol=1e-6
        )


def test_without_shuffling_batches_are_slices(store):
    reader = GroupReader(store, PAIRS)
    for number, batch in enumerate(epoch_of(as_tf_dataset(store, PAIRS, batch_size=10, shuffle=False))):
        for found, expected in zip(batch, reader[number * 10 : (number + 1) * 10], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_torch_loader_streams_the_same_batches(store):
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(as_torch_dataset(store, PAIRS, batch_size=10, shuffle=False), batch_size=None)
    reader = GroupReader(store, PAIRS)
    assert len(loader) == 5
    for number, batch in enumerate(loader):
        for found, expected in zip(batch, reader[number * 10 : (number + 1) * 10], strict=True):
            np.testing.assert_array_equal(found.numpy(), expected)


def test_torch_that_is_not_there_is_named(store, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ptychodask.PtychodaskError, match="PyTorch is not installed; pip install torch"):
        as_torch_dataset(store, PAIRS)


def test_the_readers_are_offered_at_the_top_of_the_package():
    assert (ptychodask.GroupReader, ptychodask.as_tf_dataset, ptychodask.as_torch_dataset) == (
        GroupReader,
        as_tf_dataset,
        as_torch_dataset,
    )
