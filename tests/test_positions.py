"""Refined positions and flux: the derivatives, whole runs, and positions that are applied to the scan."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from models_for_tests import LinearModel
from scipy.ndimage import gaussian_filter

from ptychodask import apply_positions
from ptychodask.cluster.clients import local_client
from ptychodask.errors import PtychodaskError
from ptychodask.forward import expected_counts
from ptychodask.grouping import GroupingSpec
from ptychodask.inspection import inspect_file
from ptychodask.reassembly import Box
from ptychodask.reconstruction import reconstruct, refine_tasks, stages
from ptychodask.refinement.positions import affine_step, position_steps, position_sums, source_box, stretched
from ptychodask.result import open_result
from ptychodask.scan import Scan
from ptychodask.simulate import simulate
from ptychodask.store import StoredScan, annotate, open_scan
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan

pytestmark = pytest.mark.usefixtures("empty_caches")

N = 16
CORNER = (-20, -20)
RUN = {"polish": "auto", "slow_phase": "auto", "refine_positions": True, "tile": 128, "groups_per_chunk": 110}


def smooth_object(seed, shape=(80, 80)):
    rng = np.random.default_rng(seed)
    real, imaginary = (gaussian_filter(rng.normal(size=shape), 2.5) for _ in range(2))
    return ((0.9 + 0.5 * real) * np.exp(4j * imaginary)).astype(np.complex64)


def small_probe(modes):
    y, x = np.mgrid[:N, :N] - N // 2
    spot = np.exp(-(y**2 + x**2) / 18 + 0.05j * (y**2 + x**2))
    return np.stack([spot, 0.4 * spot * x / 3][:modes]).astype(np.complex64) * 30


def scan_of(object_, position, domain="counts", modes=1, mask=None, flux=None):
    """A scan without noise."""
    probe = small_probe(modes)
    counts = np.array([expected_counts(object_, CORNER, probe, one) for one in position])
    counts *= 1 if flux is None else flux[:, None, None]
    return Scan(
        diffraction=(counts if domain == "counts" else np.sqrt(counts)).astype(np.float32),
        position_yx_px=position,
        probe=probe,
        domain=domain,
        normalization=1.0,
        mask=mask,
        flux=flux,
    )


def some_positions(k, seed=0):
    return np.random.default_rng(seed).uniform(2, 35, size=(k, 2))


def sums_of(object_, scan):
    everyone = np.arange(scan.n_patterns)
    return position_sums(object_, CORNER, scan, everyone, np.ones(len(everyone), bool))


def misfits(object_, scan, position, flux=1.0):
    """Half the sum of squares of the amplitude, or a quarter of the Poisson likelihood, for each pattern."""
    found = []
    for measured, place in zip(scan.diffraction, position, strict=True):
        model = flux * expected_counts(object_.astype(complex), CORNER, scan.probe.astype(complex), place)
        n = measured.astype(float)
        each = (model - n * np.log(model)) / 4 if scan.domain == "counts" else (n - np.sqrt(model)) ** 2 / 2
        found.append(each.sum() if scan.mask is None else each[scan.mask].sum())
    return np.array(found)


def half_masked():
    mask = np.random.default_rng(5).random((N, N)) > 0.3
    mask[N // 2, N // 2] = False
    return mask


CASES = {
    "counts": {},
    "amplitudes": {"domain": "amplitude"},
    "mask": {"mask": half_masked()},
    "modes": {"modes": 2},
    "amplitudes, mask and modes": {"domain": "amplitude", "mask": half_masked(), "modes": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_slope_of_positions_is_that_of_the_misfit(case):
    measured = scan_of(smooth_object(0), some_positions(4), **CASES[case])
    guess = smooth_object(1)
    scan = replace(measured, position_yx_px=measured.position_yx_px + 0.13)
    slope = sums_of(guess, scan).slope
    step = 1e-3
    for axis in range(2):
        away = step * np.eye(2)[axis]
        higher, lower = (misfits(guess, scan, scan.position_yx_px + sign * away) for sign in (1, -1))
        expected = -(higher - lower) / (2 * step)
        np.testing.assert_allclose(slope[:, axis], expected, rtol=0.02, atol=0.01 * np.abs(slope).max())


@pytest.mark.parametrize("case", CASES)
def test_steps_lead_to_the_true_positions(case):
    true = some_positions(40, seed=2)
    object_ = smooth_object(0)
    scan = scan_of(object_, true, **CASES[case])
    error = np.random.default_rng(3).uniform(-0.4, 0.4, true.shape)
    error -= error.mean(axis=0)
    for _ in range(3):
        error = error + position_steps(sums_of(object_, replace(scan, position_yx_px=true + error)))
    assert np.sqrt((error**2).mean()) < 0.02


@pytest.mark.parametrize("case", CASES)
def test_the_best_flux_is_the_minimum_of_the_misfit(case):
    flux = np.array([0.7, 1.0, 1.3], np.float32)
    object_, guess = smooth_object(0), smooth_object(1)
    scan = scan_of(object_, some_positions(3), flux=flux, **CASES[case])
    np.testing.assert_allclose(sums_of(object_, scan).flux, flux, rtol=1e-3)
    best = sums_of(guess, scan).flux
    for j, one in enumerate(best):
        at, above, below = (misfits(guess, scan, scan.position_yx_px, one * f)[j] for f in (1, 1.02, 0.98))
        assert at < min(above, below)


def test_a_known_flux_scales_the_model_of_the_positions():
    flux = np.array([0.5, 2.0], np.float32)
    object_, position = smooth_object(0), some_positions(2)
    at_truth = sums_of(object_, scan_of(object_, position, flux=flux))
    ignored = sums_of(object_, replace(scan_of(object_, position, flux=flux), flux=None))
    assert np.abs(at_truth.slope).max() < 1e-3 * np.abs(ignored.slope).max()


@pytest.mark.parametrize(
    "affine", [[[0.01, 0.0], [0.0, 0.01]], [[0.0, -0.012], [0.012, 0.0]], [[-0.01, 0.006], [0, 0]]]
)
@pytest.mark.parametrize("domain", ["counts", "amplitude"])
def test_the_affine_part_of_a_stretched_object_is_found(affine, domain):
    object_, true = smooth_object(0), some_positions(60)
    scan = scan_of(object_, true, domain=domain)
    centre, affine = true.mean(axis=0), np.array(affine)
    inverse = np.linalg.inv(np.eye(2) + affine)
    # The object that wrong positions lead to is stretched as they are.
    wrong = centre + (true - centre) @ inverse.T
    whole = Box(*(side for start, n in zip(CORNER, object_.shape, strict=True) for side in (start, start + n)))
    adapted = stretched(object_, whole, whole, inverse - np.eye(2), centre)
    found = affine_step(sums_of(adapted, replace(scan, position_yx_px=wrong)))
    np.testing.assert_allclose(found, affine, atol=0.002)


def test_stretching_moves_a_point_as_its_position():
    affine, centre = np.array([[0.02, -0.01], [0.03, 0.01]]), np.array([30.0, 25.0])
    y, x = np.mgrid[:60, :60]
    place = np.array([40.0, 31.0])
    object_ = np.exp(-((y - place[0]) ** 2 + (x - place[1]) ** 2) / 30).astype(np.complex64)
    box = Box(15, 58, 10, 55)
    source = source_box(box, affine, centre)
    inside = source.overlap(Box(0, 60, 0, 60))
    moved = stretched(object_[inside.y0 : inside.y1, inside.x0 : inside.x1], inside, box, affine, centre).real
    found = [(moved * grid).sum() / moved.sum() for grid in np.mgrid[15:58, 10:55]]
    np.testing.assert_allclose(found, centre + (np.eye(2) + affine) @ (place - centre), atol=0.05)


def test_a_pattern_without_light_has_no_flux():
    scan = scan_of(smooth_object(0), some_positions(2))
    sums = sums_of(np.zeros((80, 80), np.complex64), scan)
    assert np.isnan(sums.flux).all()
    assert np.isfinite(position_steps(sums)).all()
    np.testing.assert_array_equal(affine_step(sums), 0)


# Whole runs


@pytest.fixture(scope="module")
def true(tmp_path_factory):
    path = tmp_path_factory.mktemp("true") / "scan.zarr"
    return simulate(path, n_pixels=32, n_patterns=220, dose=1e6, step_px=2.0, path="random", seed=4)


def store_like(scan, path, **changes):
    kept = {
        "diffraction": scan.diffraction[:],
        "position_yx_px": scan.position_yx_px,
        "probe": scan.probe,
        "domain": scan.domain,
    }
    return write_scan(path, calibration="as_given", progress=False, **kept | changes)


@pytest.fixture(scope="module")
def wrong(true, tmp_path_factory):
    """The scan with positions that are 1 % too far apart and up to 1 px off."""
    centre = true.position_yx_px.mean(axis=0)
    jitter = np.random.default_rng(0).uniform(-1, 1, true.position_yx_px.shape)
    position = centre + 1.01 * (true.position_yx_px - centre) + jitter
    # Rows of the true scan, in case the patterns are sorted along another curve.
    path = tmp_path_factory.mktemp("wrong") / "scan.zarr"
    return store_like(true, path, position_yx_px=position, source_index=np.arange(true.n_patterns))


@pytest.fixture(scope="module")
def refined(wrong):
    return reconstruct(wrong.store, "iterative", **RUN)


def rms_error(true, scan, position):
    """Error of positions without a common shift, pixels."""
    error = position - true.position_yx_px[scan.source_index]
    return np.sqrt(((error - error.mean(axis=0)) ** 2).sum(axis=1).mean())


def test_positions_of_a_run_are_refined(true, wrong, refined):
    assert rms_error(true, wrong, wrong.position_yx_px) > 0.8
    assert refined["position_refined_yx_px"].dims == ("pattern", "yx")
    assert "flux_refined" not in refined
    assert rms_error(true, wrong, refined["position_refined_yx_px"].values) < 0.3
    kept = [one for one in refined.ptycho.records["refinement"]["stages"] if one["stage"] == "positions"]
    assert kept


SHORT = {"polish": 5, "slow_phase": False, "refine_positions": True, "refine_flux": True, "progress": False}
PIECES = {"tile": 32, "groups_per_chunk": 40}
REFINED = ("object", "position_refined_yx_px", "flux_refined")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "scan.zarr"
    return simulate(path, n_pixels=16, n_patterns=120, dose=1e6, step_px=2.0, path="raster", seed=3)


@pytest.fixture(scope="module")
def drawn(small, tmp_path_factory):
    """The small scan with wrong positions and the drawn flux of each pattern, which the store does not hold."""
    rng = np.random.default_rng(1)
    flux = rng.uniform(0.7, 1.3, small.n_patterns)
    dimmed = rng.poisson(small.diffraction[:] * flux[:, None, None]).astype(np.uint32)
    position = small.position_yx_px + rng.uniform(-0.5, 0.5, small.position_yx_px.shape)
    path = tmp_path_factory.mktemp("drawn") / "scan.zarr"
    rows = np.arange(small.n_patterns)
    return store_like(small, path, diffraction=dimmed, position_yx_px=position, source_index=rows), flux / flux.mean()


@pytest.fixture(scope="module")
def whole(drawn):
    return reconstruct(drawn[0].store, "iterative", **SHORT, **PIECES)


def assert_same_refinement(ds, other):
    for name in REFINED:
        np.testing.assert_array_equal(ds[name].values, other[name].values)


def test_workers_and_disk_give_the_same_bits(drawn, whole, tmp_path):
    assert [one["stage"] for one in whole.ptycho.records["refinement"]["stages"]].count("positions") >= 1
    with local_client(2):
        there = reconstruct(drawn[0].store, "iterative", **SHORT, **PIECES)
        written = reconstruct(drawn[0].store, "iterative", **SHORT, **PIECES, out=tmp_path / "object.zarr")
    assert_same_refinement(there, whole)
    assert_same_refinement(written, whole)
    assert_same_refinement(open_result(tmp_path / "object.zarr"), whole)


def test_a_run_that_stopped_after_positions_moved_is_resumed(drawn, whole, tmp_path, monkeypatch):
    fields = SHORT | PIECES | {"out": tmp_path / "object.zarr"}
    honest, n_moves = refine_tasks.take_step, []
    monkeypatch.setattr(stages.Refinement, "_move", _noted(stages.Refinement._move, n_moves))

    def step(*arguments):
        if n_moves:
            raise RuntimeError("power cut")
        return honest(*arguments)

    monkeypatch.setattr(refine_tasks, "take_step", step)
    with pytest.raises(PtychodaskError, match="power cut"):
        reconstruct(drawn[0].store, "iterative", **fields)
    monkeypatch.undo()
    resumed_moves = []
    monkeypatch.setattr(stages.Refinement, "_move", _noted(stages.Refinement._move, resumed_moves))
    resumed = reconstruct(drawn[0].store, "iterative", resume=True, **fields)
    assert_same_refinement(resumed, whole)
    stages_of_both = [ds.ptycho.records["refinement"]["stages"] for ds in (resumed, whole)]
    assert stages_of_both[0] == stages_of_both[1]
    names = [one["stage"] for one in stages_of_both[1]]
    assert len(resumed_moves) == names.count("positions") - 1
    assert [path.name for path in tmp_path.iterdir()] == ["object.zarr"]


def _noted(honest, calls):
    def move(self, state):
        honest(self, state)
        calls.append(state.n_moves)

    return move


def test_flux_is_recovered_but_for_slow_variations_over_the_field(small, tmp_path):
    rng = np.random.default_rng(2)
    flux = rng.uniform(0.7, 1.3, small.n_patterns)
    dimmed = rng.poisson(small.diffraction[:] * flux[:, None, None]).astype(np.uint32)
    scan = store_like(small, tmp_path / "scan.zarr", diffraction=dimmed, source_index=np.arange(small.n_patterns))
    ds = reconstruct(scan.store, "iterative", slow_phase="auto", polish="auto", refine_flux=True, progress=False)
    assert "position_refined_yx_px" not in ds
    found, wanted = ds["flux_refined"].values, flux[scan.source_index]
    error = np.log(found / wanted)
    # Slow variations of flux and of transmission give the same patterns, so they are left out of the error.
    y, x = (scan.position_yx_px - scan.position_yx_px.mean(axis=0)).T / 10
    slow = np.stack([y**i * x**j for i in range(5) for j in range(5 - i)], axis=1)
    rest = error - slow @ np.linalg.lstsq(slow, error, rcond=None)[0]
    assert np.std(np.log(wanted)) > 0.15
    assert np.std(rest) < 0.03
    assert np.std(error) < 0.1


@pytest.mark.parametrize("name", ["refine_positions", "refine_flux"])
def test_combinations_that_cannot_be_are_refused(small, name):
    for polish in (0, 2):
        with pytest.raises(PtychodaskError, match=rf"{name}=True with polish={polish}: each step follows two sweeps"):
            reconstruct(small.store, "iterative", polish=polish, **{name: True})
    with pytest.raises(PtychodaskError, match=rf"{name} is 1, expected True or False"):
        reconstruct(small.store, "iterative", polish="auto", **{name: 1})
    with pytest.raises(PtychodaskError, match=rf"position_yx_px.*{name}|{name}.*position_yx_px"):
        reconstruct(
            small.store,
            LinearModel(members=1),
            cache="patches",
            position_yx_px=small.position_yx_px,
            polish="auto",
            **{name: True},
        )


# Positions that are applied to the scan


@pytest.fixture
def scan(true, tmp_path):
    shutil.copytree(true.store, tmp_path / "scan.zarr")
    return open_scan(tmp_path / "scan.zarr")


def result_of(scan, *, flux=False, seed=0, **attributes):
    """A short result of a scan, with positions and flux that were moved by drawn numbers."""
    rng = np.random.default_rng(seed)
    moved = scan.position_yx_px + rng.normal(scale=0.5, size=scan.position_yx_px.shape)
    ds = reconstruct(scan.store, LinearModel(members=1, n_pixels=32), progress=False, tile=64)
    ds = ds.assign(position_refined_yx_px=(("pattern", "yx"), moved)).assign_attrs(attributes)
    drawn = rng.uniform(0.5, 1.5, scan.n_patterns).astype(np.float32)
    return ds.assign(flux_refined=(("pattern",), drawn)) if flux else ds


def test_positions_are_applied_and_those_measured_are_kept(scan):
    first = result_of(scan)
    changed = apply_positions(scan.store, first)
    np.testing.assert_array_equal(changed.position_yx_px, first["position_refined_yx_px"])
    np.testing.assert_array_equal(changed.position_measured_yx_px, scan.position_yx_px)
    assert changed.data_hash != scan.data_hash
    assert changed.flux is None
    second = result_of(changed, seed=1)
    again = apply_positions(scan.store, second)
    np.testing.assert_array_equal(again.position_yx_px, second["position_refined_yx_px"])
    np.testing.assert_array_equal(again.position_measured_yx_px, scan.position_yx_px)
    assert again.attributes["earlier_data_hashes"] == [scan.data_hash, changed.data_hash]
    root = zarr.open_group(scan.store, mode="r")
    assert dict(root["y_measured_px"].attrs) == {"units": "px"}
    np.testing.assert_array_equal(
        np.stack([root["y_measured_px"][:], root["x_measured_px"][:]], 1), scan.position_yx_px
    )
    assert "refined" in str(inspect_file(scan.store))


def test_flux_is_applied_and_the_measured_one_is_kept(true, tmp_path):
    measured = np.linspace(0.9, 1.1, true.n_patterns, dtype=np.float32)
    for name, flux in (("with", measured), ("without", None)):
        scan = store_like(true, tmp_path / f"{name}.zarr", flux=flux)
        ds = result_of(scan, flux=True)
        changed = apply_positions(scan.store, ds)
        drawn = ds["flux_refined"].values
        np.testing.assert_allclose(changed.flux, drawn / drawn.mean(), rtol=1e-6)
        root = zarr.open_group(scan.store, mode="r")
        assert ("flux_measured" in root) == (flux is not None)
        if flux is not None:
            np.testing.assert_array_equal(root["flux_measured"][:], scan.flux)


def test_group_tables_are_drawn_anew(scan, told):
    spec = GroupingSpec(members=4)
    before = group(scan.store, spec)
    group(scan.store, GroupingSpec(members=2), name="mine")
    changed = apply_positions(scan.store, result_of(scan))
    assert StoredScan(scan.store).table_names() == []
    removed = [message for message in told if "removed the group table" in message]
    assert len(removed) == 1
    assert "'mine'" in removed[0]
    after = group(scan.store, spec)
    np.testing.assert_array_equal(after.member, StoredScan(scan.store).draw(spec)[0])
    assert not np.array_equal(after.member, before.member)
    assert changed.n_patterns == scan.n_patterns


def test_the_next_run_uses_the_applied_positions(scan):
    ds = result_of(scan)
    apply_positions(scan.store, ds)
    run = {"model": LinearModel(members=1, n_pixels=32), "progress": False, "tile": 64}
    moved = reconstruct(scan.store, **run)
    assert not np.array_equal(moved["object"].values, ds["object"].values)


@pytest.mark.parametrize("writes", range(5))
def test_a_stopped_change_is_refused_until_the_same_one_completes_it(scan, tmp_path, monkeypatch, run, writes):
    group(scan.store)
    ds = result_of(scan, flux=True)
    ds.ptycho.save(tmp_path / "object.zarr")
    left = iter(range(writes))
    places = {"_array": annotate._array, "_remove_tables": annotate._remove_tables, "open_scan": annotate.open_scan}

    def counted(honest):
        def call(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return honest(*arguments)

        return call

    for name, honest in places.items():
        monkeypatch.setattr(annotate, name, counted(honest))
    with pytest.raises(KeyboardInterrupt):
        apply_positions(scan.store, ds)
    monkeypatch.undo()
    if writes < 2:
        # The measured positions were copied, no more.
        np.testing.assert_array_equal(open_scan(scan.store).position_yx_px, scan.position_yx_px)
    else:
        with pytest.raises(
            PtychodaskError, match=r"a change of its positions was stopped; complete it with the result"
        ):
            open_scan(scan.store)
        with pytest.raises(PtychodaskError, match=r"a change to other positions was stopped"):
            apply_positions(scan.store, result_of_stopped(ds))
    code, _out, err = run("set", scan.store, "--positions", tmp_path / "object.zarr")
    assert code == 0, err
    changed = open_scan(scan.store)
    np.testing.assert_array_equal(changed.position_yx_px, ds["position_refined_yx_px"])
    np.testing.assert_array_equal(changed.position_measured_yx_px, scan.position_yx_px)
    assert StoredScan(scan.store).table_names() == []


def result_of_stopped(ds):
    return ds.assign(position_refined_yx_px=ds["position_refined_yx_px"] + 1)


def test_what_does_not_fit_is_refused(scan, true):
    ds = result_of(scan)
    with pytest.raises(PtychodaskError, match=r"the result: has no refined positions .*; reconstruct with refine_pos"):
        apply_positions(scan.store, ds.drop_vars("position_refined_yx_px"))
    with pytest.raises(PtychodaskError, match=r"the result is of another scan \(data hash 0123, expected"):
        apply_positions(scan.store, ds.assign_attrs(data_hash="0123"))
    short = ds.drop_vars("position_refined_yx_px").assign(position_refined_yx_px=(("pattern", "yx"), np.zeros((9, 2))))
    with pytest.raises(PtychodaskError, match=r"shape \(9, 2\) or values that are not finite; expected \(220, 2\)"):
        apply_positions(scan.store, short)
    unknown = ds.copy(deep=True)
    unknown["position_refined_yx_px"][3] = np.nan
    with pytest.raises(PtychodaskError, match="not finite"):
        apply_positions(scan.store, unknown)
    dark = ds.assign(flux_refined=(("pattern",), np.zeros(scan.n_patterns, np.float32)))
    with pytest.raises(PtychodaskError, match="flux has values that are not positive"):
        apply_positions(scan.store, dark)
    assert open_scan(scan.store).data_hash == true.data_hash
    assert "y_measured_px" not in zarr.open_group(scan.store, mode="r")
    apply_positions(scan.store, ds)
    with pytest.raises(PtychodaskError, match=r"is of earlier positions of this scan, which have been replaced since"):
        apply_positions(scan.store, ds)


def test_a_growing_scan_keeps_its_positions(true, tmp_path):
    scan = store_like(true, tmp_path / "growing.zarr", growing=True)
    with pytest.raises(PtychodaskError, match=r"still growing.*'ptychodask ingest --finish"):
        annotate.replace_positions(scan.store, scan.position_yx_px + 1)


def test_a_cache_of_earlier_positions_is_recognised(scan, tmp_path):
    run = {"model": LinearModel(members=1, n_pixels=32), "progress": False, "tile": 64, "cache": tmp_path / "patches"}
    ds = reconstruct(scan.store, **run)
    refined = scan.position_yx_px + 0.25
    # Asked for, the cached patches are stitched at other positions.
    reconstruct(scan.store, **run, position_yx_px=refined)
    apply_positions(scan.store, ds.assign(position_refined_yx_px=(("pattern", "yx"), refined)))
    for more in ({}, {"position_yx_px": refined}):
        with pytest.raises(PtychodaskError, match=r"contains patches of the positions that .* had before refined ones"):
            reconstruct(scan.store, **run, **more)


def test_the_command_sets_positions(scan, tmp_path, run, refused):
    ds = result_of(scan)
    ds.ptycho.save(tmp_path / "object.zarr")
    assert "nothing to set" in refused("set", scan.store)
    assert "no such result" in refused("set", scan.store, "--positions", tmp_path / "none.zarr")
    code, out, err = run("set", scan.store, "--positions", tmp_path / "object.zarr")
    assert code == 0, err
    assert "positions of 220 patterns, 0.7" in out
    np.testing.assert_array_equal(open_scan(scan.store).position_yx_px, ds["position_refined_yx_px"])
    assert "earlier positions" in refused("set", scan.store, "--positions", tmp_path / "object.zarr")
