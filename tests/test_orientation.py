"""Which way round positions are: what the axis doctor names, what it cannot tell, and the flags that make it right."""

from __future__ import annotations

import bz2
import io
import shlex

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.forward import expected_counts
from ptychodask.inspection import check_axes
from ptychodask.inspection.command import PositionTurn
from ptychodask.inspection.orientation import twin_similarity
from ptychodask.io import ingest
from ptychodask.probes import disc_probe, zone_plate_probe
from ptychodask.simulate import simulate
from ptychodask.store import open_scan

N = 32
EIGHT = [
    PositionTurn.of(np.diag([y, x]) @ axes) for axes in (np.eye(2), np.eye(2)[::-1]) for y in (1, -1) for x in (1, -1)
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A simulated scan with a probe of known phase."""
    path = tmp_path_factory.mktemp("orientation") / "scan.zarr"
    return simulate(path, object="star", probe="zone_plate", n_pixels=N, n_patterns=120, dose=1e6, step_px=2.5)


def save(path, scan, turn, **changes):
    """A file whose positions are to be turned to be right."""
    position = scan.position_yx_px @ np.linalg.inv(turn.matrix).T
    arrays = {"dp": scan.diffraction[:], "y": position[:, 0], "x": position[:, 1], "P": scan.probe[0]}
    np.savez(path, **arrays | changes)
    return path


KEYS = {"diffraction": "dp", "y": "y", "x": "x", "probe": "P"}
MAPPED = {"keys": KEYS, "domain": "counts", "units": "px", "calibration": "as_given"}


def positions_in_file_order(scan):
    return scan.position_yx_px[np.argsort(scan.source_index)]


@pytest.fixture
def run_printed(run, tmp_path, monkeypatch):
    """Run a command as it is printed, in the folder of the test."""

    def call(command):
        monkeypatch.chdir(tmp_path)
        code, _, err = run(*shlex.split(command)[1:], "-q", "--overwrite")
        assert code == 0, err

    return call


# What the doctor names


@pytest.mark.parametrize("turn", [EIGHT[0], EIGHT[1], EIGHT[3], EIGHT[5]], ids=lambda turn: turn.name)
def test_the_orientation_is_named_and_its_flags_make_it_right(turn, measured, tmp_path, run_printed):
    path = save(tmp_path / "scan.npz", measured, turn)
    verdict = check_axes(path, progress=False, **MAPPED)
    assert [one.turn for one in verdict.likely] == [turn]
    assert verdict.is_certain
    assert len(verdict.candidates) == 8
    if turn.flags == {}:
        assert verdict.command is None
        return
    run_printed(verdict.command)
    found = open_scan(tmp_path / "scan.zarr")
    np.testing.assert_allclose(positions_in_file_order(found), measured.position_yx_px, atol=1e-9)


def test_a_store_is_told_what_to_ingest_again(measured, tmp_path, run_printed):
    """The command undoes the flags that made the store wrong."""
    path = save(tmp_path / "scan.npz", measured, PositionTurn.of(np.eye(2)[::-1]))
    ingest(path, tmp_path / "scan.zarr", flip_y=True, progress=False, **MAPPED)
    verdict = check_axes(tmp_path / "scan.zarr", progress=False)
    assert "--swap-xy" in verdict.command
    assert "flip" not in verdict.command
    run_printed(verdict.command)
    found = open_scan(tmp_path / "scan.zarr")
    np.testing.assert_allclose(positions_in_file_order(found), measured.position_yx_px, atol=1e-9)


def test_a_rotation_of_the_mirror_image_is_found(measured, tmp_path):
    turn = PositionTurn.by(37.0, mirrored=True)
    verdict = check_axes(save(tmp_path / "scan.npz", measured, turn), rotation=True, progress=False, **MAPPED)
    assert verdict.is_certain
    best = verdict.candidates[0].turn
    assert best.is_mirrored
    # The search ends in steps of a quarter of a degree; over this scan's 14 px one degree is a quarter of a pixel.
    assert best.angle_deg == pytest.approx(37, abs=1)
    assert "--affine=" in verdict.command


def test_a_scan_that_ingest_left_an_object_with_is_read_by_keys(measured, tmp_path):
    """PtychoPINN's files have an object, which positions that are turned leave behind."""
    turn = EIGHT[4]
    y, x = (measured.position_yx_px @ np.linalg.inv(turn.matrix).T).T
    truth = np.exp(1j * np.random.default_rng(0).random((9, 9))).astype(np.complex64)
    path = tmp_path / "scan.npz"
    np.savez(
        path, diff3d=measured.diffraction[:], ycoords=y, xcoords=x, probeGuess=measured.probe[0], objectGuess=truth
    )
    verdict = check_axes(path, progress=False, domain="counts")
    assert "--key y=ycoords --key x=xcoords" in verdict.command
    assert "object" not in verdict.command
    assert verdict.command.endswith("--calibration as_given --swap-xy")


@pytest.mark.long
@pytest.mark.parametrize("turn", EIGHT, ids=lambda turn: turn.name)
def test_the_siemens_star_is_turned_right_from_any_orientation(turn, shared, tmp_path):
    with bz2.open(shared / "data" / "siemens-star-small.npz.bz2") as packed:
        arrays = dict(np.load(io.BytesIO(packed.read())))
    position = arrays["scan"].astype(float)
    np.savez(tmp_path / "star.npz", **arrays | {"scan": position @ np.linalg.inv(turn.matrix).T})
    verdict = check_axes(tmp_path / "star.npz", progress=False)
    assert [one.turn for one in verdict.likely] == [turn]
    assert verdict.candidates[1].excess > 0.2


# What it cannot tell


def test_a_probe_that_is_its_own_twin_leaves_two(tmp_path):
    scan = simulate(tmp_path / "a.zarr", object="lines", probe="disc", n_pixels=N, n_patterns=120, dose=1e6, step_px=2)
    turn = EIGHT[1]
    verdict = check_axes(save(tmp_path / "scan.npz", scan, turn), progress=False, **MAPPED)
    assert verdict.probe_is_phaseless
    assert {one.turn for one in verdict.likely} == {EIGHT[1], EIGHT[2]}
    assert verdict.likely[0].turn.inverts(verdict.likely[1].turn)
    assert verdict.is_certain
    assert "Best: --flip-x; or its point inversion, --flip-y." in str(verdict)


def test_positions_without_meaning_name_nothing(measured, tmp_path):
    shuffled = np.random.default_rng(0).permutation(measured.position_yx_px)
    path = save(tmp_path / "scan.npz", measured, EIGHT[0], y=shuffled[:, 0], x=shuffled[:, 1])
    verdict = check_axes(path, progress=False, **MAPPED)
    assert not verdict.is_certain
    assert verdict.command is None
    assert "Undecided" in str(verdict)


def test_the_point_inversion_makes_the_same_patterns_with_the_twins_of_object_and_probe():
    """The law that the doctor's caveat rests on: conj(f(-r)) has the modulus of f in the far field."""
    rng = np.random.default_rng(0)
    probe, object_ = (rng.normal(size=size) + 1j * rng.normal(size=size) for size in ((2, N, N), (99, 99)))
    # What an even frame has at its first row and column has no place in its mirror image.
    probe[:, 0], probe[:, :, 0] = 0, 0
    turned = slice(None, None, -1)
    # Pixel N//2 is the middle of an even frame, so the mirror image is rolled by one.
    twin_probe = np.conj(np.roll(probe[:, turned, turned], 1, axis=(1, 2)))
    twin_object = np.conj(object_[turned, turned])
    for position in rng.integers(-20, 20, (5, 2)).astype(float):
        ours = expected_counts(object_, (-49, -49), probe, position)
        theirs = expected_counts(twin_object, (-49, -49), twin_probe, -position)
        np.testing.assert_allclose(theirs, ours, rtol=1e-9, atol=1e-9)


def test_a_probe_is_compared_with_its_twin_wherever_it_lies():
    disc = disc_probe(32, diameter_px=10)
    assert twin_similarity(disc) == pytest.approx(1, abs=1e-6)
    assert twin_similarity(np.roll(disc, (3, -5), axis=(1, 2))) == pytest.approx(1, abs=1e-6)
    assert twin_similarity(zone_plate_probe(32, outer_px=16, stop_px=6, defocus=20)) < 0.5


def test_too_few_patterns_are_refused(measured, tmp_path):
    few = {"dp": measured.diffraction[slice(0, 20)]}
    few |= {name: values[:20] for name, values in zip("yx", measured.position_yx_px.T, strict=True)}
    path = save(tmp_path / "scan.npz", measured, EIGHT[0], **few)
    with pytest.raises(PtychodaskError, match="20 patterns are too few to check the axes, expected 40 or more"):
        check_axes(path, progress=False, **MAPPED)


def test_the_axes_of_a_store_are_not_chosen(measured):
    with pytest.raises(PtychodaskError, match="is a store, whose axes are fixed; leave out units"):
        check_axes(measured.store, units="px")


# Turning positions


@pytest.mark.parametrize("turn", EIGHT, ids=lambda turn: turn.name)
def test_flags_and_matrix_do_the_same(turn, measured, tmp_path):
    path = save(tmp_path / "scan.npz", measured, EIGHT[0])
    options = {"progress": False, "overwrite": True, **MAPPED}
    by_flags = positions_in_file_order(ingest(path, tmp_path / "a.zarr", **options, **turn.flags))
    by_matrix = positions_in_file_order(ingest(path, tmp_path / "b.zarr", **options, affine=turn.rows))
    np.testing.assert_array_equal(by_flags, by_matrix)
    np.testing.assert_array_equal(by_flags, measured.position_yx_px @ turn.matrix.T)


def test_a_matrix_comes_after_the_flips_and_before_the_units(measured, tmp_path):
    position = measured.position_yx_px * 1e-8
    path = save(tmp_path / "scan.npz", measured, EIGHT[0], y=position[:, 0], x=position[:, 1])
    affine = (0.9, -0.2, 0.3, 1.1)
    options = MAPPED | {"units": "m", "pixel_size_m": 2e-8, "flip_x": True, "swap_xy": True, "affine": affine}
    scan = ingest(path, tmp_path / "scan.zarr", progress=False, **options)
    y, x = position[:, 1], -position[:, 0]
    expected = np.stack([0.9 * y - 0.2 * x, 0.3 * y + 1.1 * x], axis=1) / 2e-8
    np.testing.assert_allclose(positions_in_file_order(scan), expected, rtol=1e-12)
    assert scan.attributes["provenance"]["options"]["affine"] == list(affine)


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        ((1, 2, 2, 4), "singular"),
        ((0, 0, 0, 0), "singular"),
        ((1, 0, 0), "expected four numbers"),
        ((1, 0, 0, np.nan), "expected four numbers"),
        (("a", "b", "c", "d"), "expected four numbers"),
    ],
)
def test_matrices_that_cannot_be_are_refused(affine, reason, measured, tmp_path):
    path = save(tmp_path / "scan.npz", measured, EIGHT[0])
    with pytest.raises(PtychodaskError, match=reason):
        ingest(path, tmp_path / "scan.zarr", affine=affine, **MAPPED)
    assert not (tmp_path / "scan.zarr").exists()


def test_a_matrix_is_refused_together_with_an_object(measured, tmp_path):
    path = save(tmp_path / "scan.npz", measured, EIGHT[0], obj=np.ones((99, 99), np.complex64))
    with pytest.raises(
        PtychodaskError, match="affine= changes the positions, so that they no longer fit the object in the file"
    ):
        ingest(path, tmp_path / "a.zarr", **MAPPED | {"keys": KEYS | {"object": "obj"}, "affine": (0, 1, 1, 0)})


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle", [0.0, 37.5, 90.0, 200.25, 315.0])
def test_a_turn_knows_its_angle(angle, mirrored):
    turn = PositionTurn.by(angle, mirrored=mirrored)
    assert turn.angle_deg == pytest.approx(angle)
    assert turn.is_mirrored == mirrored
    np.testing.assert_allclose(turn.matrix @ turn.matrix.T, np.eye(2), atol=1e-8)
    assert turn.inverts(PositionTurn.by(angle + 180, mirrored=mirrored))


def test_a_turn_goes_from_x_toward_y():
    """A quarter turn takes +x (right) to +y (down): clockwise on a screen."""
    np.testing.assert_allclose(PositionTurn.by(90).matrix @ [0, 1], [1, 0], atol=1e-8)
