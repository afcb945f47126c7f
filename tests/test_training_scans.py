"""Several scans at once, each with its own probe, mask and scale."""

from __future__ import annotations

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec
from ptychodask.models import ModelSpec, Optics
from ptychodask.models.networks import build_autoencoder, build_network
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.write import write_scan
from ptychodask.training import (
    GroupStream,
    MixedStream,
    amplitude_loss,
    amplitude_target,
    groups_within,
    mae_loss,
    member_offsets,
    patch_loss,
    poisson_loss,
    train,
)
from ptychodask.training.batches import with_scan_number

N = 16

SMALL = {
    "members": 2,
    "neighbours": 3,
    "levels": 1,
    "projections_before": 1,
    "projections_after": 1,
    "batch_size": 8,
    "epochs": 2,
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two scans of different probes, numbers of modes, doses, masks and sizes."""
    folder = tmp_path_factory.mktemp("scans")
    simulate(folder / "a.zarr", n_pixels=N, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate", seed=2)
    b = simulate(folder / "plain.zarr", n_pixels=N, n_patterns=30, step_px=3.0, dose=1e3, probe="disc", seed=3)
    write_scan(
        folder / "b.zarr",
        diffraction=b.diffraction[:],
        position_yx_px=b.position_yx_px,
        probe=np.concatenate([b.probe, 0.1 * b.probe]),
        mask=np.random.default_rng(0).random((N, N)) > 0.1,
        domain="counts",
        calibration="as_given",
        truth=b.truth,
    )
    return folder / "a.zarr", folder / "b.zarr"


@pytest.fixture(scope="module")
def scans(stores):
    return [open_scan(store) for store in stores]


def streams_of(scans, **options):
    members = [groups_within(s, np.arange(s.n_patterns), GroupingSpec(members=2, neighbours=4)) for s in scans]
    fields = {"batch_size": 8, "shuffle": True, "seed": 0} | options
    return [GroupStream(s, m, amplitude_target(s), **fields) for s, m in zip(scans, members, strict=True)]


def test_batches_come_from_one_scan_each_in_proportion_and_in_a_new_order(scans):
    mixed = MixedStream(streams_of(scans), shuffle=True, seed=0)

    def epoch():
        numbers = []
        for i in range(len(mixed)):
            (x, _, scan), target = mixed[i]
            number = int(scan[0, 0])
            assert (scan == number).all()
            assert (target[:, -1] == number).all()
            np.testing.assert_allclose(np.moveaxis(x, -1, 1) / scans[number].normalization, target[:, :-1], rtol=1e-5)
            numbers.append(number)
        return numbers

    first = epoch()
    mixed.on_epoch_end()
    second = epoch()
    assert np.bincount(first).tolist() == np.bincount(second).tolist() == [60 // 8, 30 // 8]
    assert first != second
    assert mixed.groups_per_epoch == 8 * (60 // 8 + 30 // 8)


@pytest.mark.parametrize("number", [0, 1])
def test_a_shared_network_does_for_each_scan_what_its_own_network_does(scans, number):
    spec = ModelSpec(n_pixels=N, members=2, levels=1, projections_before=2, projections_after=1)
    optics = [Optics.of(scan) for scan in scans]
    shared = build_network(spec, optics)
    rng = np.random.default_rng(0)
    weights = [rng.normal(scale=0.1, size=w.shape).astype(np.float32) for w in shared.get_weights()]
    shared.set_weights(weights)
    alone = build_network(spec, optics[number])
    alone.set_weights(weights)
    scan = scans[number]
    member = groups_within(scan, np.arange(30), GroupingSpec(members=2, neighbours=4))[:4]
    x = np.moveaxis(scan.network_input(np.arange(30))[member], 1, -1)
    offset, which = member_offsets(scan, member), np.full((4, 1), number, np.int32)
    for both, one in ((shared, alone), (build_autoencoder(shared, optics), build_autoencoder(alone, optics[number]))):
        expected = np.asarray(one([x, offset]))
        np.testing.assert_allclose(np.asarray(both([x, offset, which])), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [0, 1])
def test_a_shared_loss_is_the_loss_of_the_batch_s_scan(scans, number):
    optics = [Optics.of(scan) for scan in scans]
    rng = np.random.default_rng(0)
    amplitude = scans[number].amplitude(np.arange(8)).reshape(4, 2, N, N)
    counts = amplitude**2 * rng.uniform(0.5, 1.5, amplitude.shape).astype(np.float32)
    for make in (amplitude_loss, mae_loss, poisson_loss):
        alone = float(make(optics[number])(amplitude, counts))
        assert float(make(optics)(with_scan_number(amplitude, number), counts)) == pytest.approx(alone, rel=1e-5)
    label, patches = rng.normal(size=(2, 4, 1, N, N, 2)).astype(np.float32)
    alone = float(patch_loss(optics[number], 0.7)(label, patches))
    assert float(patch_loss(optics, 0.7)(with_scan_number(label, number), patches)) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", ["pinn", "baseline"])
def test_a_model_of_several_scans_is_recorded_in_each_and_predicts_each(stores, scans, tmp_path, kind):
    fields = SMALL | {"members": 2 if kind == "pinn" else 1, "loss": "amplitude"}
    model = train(stores, model=kind, out=tmp_path / "both.model", validation_fraction=0.2, **fields)
    for store in stores:
        assert open_scan(store).attributes["models"][-1]["hash"] == model.content_hash
    assert [each["store"] for each in model.trained_on["scans"]] == [str(store) for store in stores]
    for scan in scans:
        member = groups_within(scan, np.arange(30), GroupingSpec(members=model.members, neighbours=4))
        x = np.moveaxis(scan.network_input(np.arange(30))[member], 1, -1)
        assert np.isfinite(model.bind(scan).predict(x, member_offsets(scan, member))).all()


def test_scans_that_do_not_go_together_are_refused(stores, tmp_path):
    other = tmp_path / "other.zarr"
    simulate(other, n_pixels=24, n_patterns=20, step_px=3.0, dose=1e3, probe="disc")
    with pytest.raises(PtychodaskError, match=r"scans differ in size \(.*has N=16, .*has N=24\)"):
        train([stores[0], other], out=tmp_path / "x.model")
    with pytest.raises(PtychodaskError, match="exclude names patterns of one scan, found 2 scans"):
        train(stores, out=tmp_path / "x.model", exclude=[3])
    with pytest.raises(PtychodaskError, match="no store was given"):
        train([], out=tmp_path / "x.model")
