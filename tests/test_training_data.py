"""Groups for other people's loops: the same arrays by slice, by TensorFlow and by PyTorch."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import ptychodask
from ptychodask.grouping import GroupingSpec
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.groups import group
from ptychodask.training import GroupBatches, GroupReader, as_tf_dataset, as_torch_dataset, member_offsets
from ptychodask.training.batches import Share
from ptychodask.training.data import patch_target

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


def test_one_index_gives_one_group(store):
    reader = GroupReader(store, PAIRS)
    for index in (5, np.int64(5), -45):
        for found, expected in zip(reader[index], reader[5:6], strict=True):
            np.testing.assert_array_equal(found, expected[0])
    assert [array.shape for array in reader[0]] == [(N, N, 2), (2, 2), (2, N, N)]


def test_iteration_and_lists_give_what_slices_give(store, monkeypatch):
    monkeypatch.setattr("ptychodask.training.data.GROUPS_AT_ONCE", 7)
    reader = GroupReader(store, PAIRS)
    whole = reader[:]
    for selected in (
        [np.stack(arrays) for arrays in zip(*reader, strict=True)],
        reader[list(range(50))],
        reader[np.ones(50, bool)],
        [np.stack(arrays) for arrays in zip(*reader.__getitems__(list(range(50))), strict=True)],
    ):
        for found, expected in zip(selected, whole, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "selection", [1.5, "3", (0, 1, ...), None, [[0, 1]], np.zeros((2, 2), int), [True, False], True]
)
def test_what_selects_no_groups_is_refused(store, selection):
    with pytest.raises(ptychodask.PtychodaskError, match="selects no groups; pass an index, a slice, or a list"):
        GroupReader(store, PAIRS)[selection]


@pytest.mark.parametrize("selection", [50, -51, [0, 50], np.array([-51])])
def test_groups_beyond_the_last_are_an_index_error(store, selection):
    with pytest.raises(IndexError, match=r"expected 0\.\.49"):
        GroupReader(store, PAIRS)[selection]


def test_excluded_patterns_are_in_no_group(store):
    exclude = [0, 7, 21]
    drawn = GroupReader(store, PAIRS, exclude=exclude)
    assert set(drawn.member.ravel()) == set(range(50)) - set(exclude)
    named = GroupReader(store, member=GroupReader(store, PAIRS).member, exclude=exclude)
    assert 0 < len(named) < 50
    assert not np.isin(named.member, exclude).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"member": [[0, 50]]}, r"member contains patterns 0\.\.50, expected 0\.\.49"),
        ({"member": [0, 1]}, r"member has shape \(2,\) and type int64"),
        ({"member": [[0.0, 1.0]]}, "type float64, expected indices of patterns"),
        ({"member": [[0, 1]], "grouping": PAIRS}, "both name the groups; pass one of them"),
        ({"member": [[0, 1]], "exclude": [1]}, "each group contains an excluded pattern"),
        ({"exclude": [50]}, r"expected indices 0\.\.49"),
    ],
)
def test_groups_that_are_none_of_the_scan_are_refused(store, options, message):
    for make in (GroupReader, as_tf_dataset):
        with pytest.raises(ptychodask.PtychodaskError, match=message):
            make(store, **options)


def test_the_last_batch_is_kept_unless_told(store):
    batches = epoch_of(as_tf_dataset(store, PAIRS, batch_size=16, shuffle=True))
    assert [len(x) for x, _, _ in batches] == [16, 16, 16, 2]
    assert len(set.union(*(rows(offset) for _, offset, _ in batches))) == len(rows(GroupReader(store, PAIRS)[:][1]))
    assert [len(x) for x, _, _ in epoch_of(as_tf_dataset(store, PAIRS, batch_size=16, drop_last=True))] == [16] * 3
    assert len(as_tf_dataset(store, PAIRS, batch_size=16)) == 4


def test_a_dataset_takes_groups_and_targets(store):
    scan, member = open_scan(store), np.array([[3, 4], [5, 6], [9, 8]])
    (batch,) = epoch_of(as_tf_dataset(store, member=member, target="patch", shuffle=False))
    np.testing.assert_array_equal(batch[1], member_offsets(scan, member))
    np.testing.assert_array_equal(batch[2], patch_target(scan)(member, batch[0]))
    assert batch[2].shape == (3, 2, N, N, 2)
    (batch,) = epoch_of(as_tf_dataset(store, member=member, shuffle=False, target=lambda member, x: member * 2.0))
    np.testing.assert_array_equal(batch[2], member * 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7.0}, "batch_size is 7.0, expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"target": "phase"}, "target is 'phase', expected one of: amplitude, patch, a function"),
        ({"rank": 0}, "rank is 0 and n_ranks None, expected whole numbers, 0 <= rank < n_ranks"),
        ({"rank": 2, "n_ranks": 2}, "rank is 2 and n_ranks 2"),
        ({"rank": 0, "n_ranks": 51}, "50 groups cannot be shared by 51 ranks"),
    ],
)
def test_a_dataset_refuses_what_it_cannot_do(store, options, message):
    with pytest.raises(ptychodask.PtychodaskError, match=message):
        as_tf_dataset(store, PAIRS, **options)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_groups_and_have_as_many_batches(store, n_ranks, drop_last):
    reader = GroupReader(store, PAIRS)
    shares = [
        GroupBatches(reader, batch_size=4, shuffle=True, seed=3, drop_last=drop_last, share=Share(rank, n_ranks))
        for rank in range(n_ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    for _ in range(2):
        orders = [share._order for share in shares]
        together = np.concatenate(orders)
        if drop_last:
            assert len(set(together)) == len(together) > 50 - n_ranks
        else:
            assert set(together) == set(range(50))
            assert len(together) < 50 + n_ranks
        for share in shares:
            share.reorder()
        assert any((share._order != order).any() for share, order in zip(shares, orders, strict=True))


def test_ranks_of_a_tensorflow_dataset_see_all_groups_between_them(store):
    seen = [
        np.concatenate([offset for _, offset, _ in epoch_of(as_tf_dataset(store, PAIRS, rank=rank, n_ranks=2))])
        for rank in (0, 1)
    ]
    assert [len(offset) for offset in seen] == [25, 25]
    assert rows(seen[0]) | rows(seen[1]) == rows(GroupReader(store, PAIRS)[:][1])


def test_an_epoch_has_its_order_whenever_it_is_asked_for(store):
    batches = GroupBatches(GroupReader(store, PAIRS), batch_size=4, shuffle=True, seed=3)
    orders = []
    for _ in range(3):
        orders.append(batches._order)
        batches.reorder()
    for epoch in (2, 0, 1, 1):
        batches.set_epoch(epoch)
        np.testing.assert_array_equal(batches._order, orders[epoch])


@pytest.mark.parametrize("target", ["amplitude", "patch"])
def test_a_reader_survives_the_way_to_another_process(store, target):
    scan = open_scan(store)
    target_of = patch_target(scan) if target == "patch" else None
    reader = GroupReader(scan, PAIRS, target_of=target_of)
    for found, expected in zip(pickle.loads(pickle.dumps(reader))[3:5], reader[3:5], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_map_style_loader_collates_single_groups(store):
    torch = pytest.importorskip("torch")
    reader = GroupReader(store, PAIRS)
    batches = list(torch.utils.data.DataLoader(reader, batch_size=16))
    assert [len(x) for x, _, _ in batches] == [16, 16, 16, 2]
    for number, arrays in enumerate(zip(*batches, strict=True)):
        np.testing.assert_array_equal(torch.cat(arrays).numpy(), reader[:][number])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_torch_loader_divide_an_epoch(store, start):
    torch = pytest.importorskip("torch")
    dataset = as_torch_dataset(store, PAIRS, batch_size=8, seed=1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=start)
    everything, epochs = rows(GroupReader(store, PAIRS)[:][1]), []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append(np.concatenate([offset.numpy() for _, offset, _ in loader]))
        assert len(epochs[-1]) == 50
        assert rows(epochs[-1]) == everything
    assert (epochs[0] != epochs[1]).any()


def test_a_torch_dataset_has_the_share_of_its_rank(store, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    by_variables = [offset.numpy() for _, offset, _ in as_torch_dataset(store, PAIRS)]
    monkeypatch.delenv("RANK")
    given = [offset.numpy() for _, offset, _ in as_torch_dataset(store, PAIRS, rank=1, n_ranks=2)]
    assert sum(map(len, given)) == 25
    for found, expected in zip(by_variables, given, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_torch_dataset_that_is_older_than_its_ranks_is_refused(store, monkeypatch):
    torch = pytest.importorskip("torch")
    dataset = as_torch_dataset(store, PAIRS)
    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 4}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(ptychodask.PtychodaskError, match=r"now has 4; call it once that is initialised"):
        next(iter(dataset))


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
