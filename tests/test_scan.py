"""What a scan checks, and how its patterns become amplitudes and network input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.probes import illuminated_radius_px, illumination
from ptychodask.scan import Scan, calibrate_probe, input_normalization


def make_scan(**changes: Any) -> Scan:
    fields: dict[str, Any] = {
        "diffraction": np.full((5, 8, 8), 9, np.uint16),
        "position_yx_px": np.arange(10.0).reshape(5, 2),
        "probe": np.ones((1, 8, 8), np.complex64),
        "domain": "counts",
        "normalization": 0.5,
    }
    return Scan(**(fields | changes))


def test_amplitude_of_counts_is_their_root_taken_in_float():
    counts = np.full((2, 8, 8), 40_000, np.uint16)
    scan = make_scan(diffraction=counts, position_yx_px=np.zeros((2, 2)))
    np.testing.assert_allclose(scan.amplitude(slice(None)), 200.0)


def test_stored_amplitudes_are_handed_out_as_they_are():
    scan = make_scan(domain="amplitude")
    np.testing.assert_array_equal(scan.amplitude([3, 1]), np.full((2, 8, 8), 9, np.float32))


def test_bad_pixels_are_zero_in_the_amplitude_and_the_network_input():
    mask = np.ones((8, 8), bool)
    mask[2, 5] = False
    scan = make_scan(mask=mask)
    assert scan.amplitude([0])[0, 2, 5] == 0
    assert scan.network_input([0])[0, 2, 5] == 0
    assert scan.network_input([0])[0, 0, 0] == 1.5


def test_bad_pixels_may_hold_anything():
    patterns = np.full((5, 8, 8), 4, np.float32)
    patterns[:, 2, 5], patterns[:, 2, 6] = np.nan, -1
    mask = np.ones((8, 8), bool)
    mask[2, 5:7] = False
    np.testing.assert_array_equal(make_scan(diffraction=patterns, mask=mask).amplitude([1])[0], 2 * mask)


def test_reading_amplitudes_leaves_the_patterns_alone():
    patterns = np.full((5, 8, 8), 4, np.float32)
    make_scan(diffraction=patterns).network_input(slice(None))
    assert (patterns == 4).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffraction": np.ones((5, 8, 7))}, r"shape \(5, 8, 7\), expected \(pattern, N, N\)"),
        ({"diffraction": np.ones((0, 8, 8))}, "contains no pattern"),
        ({"diffraction": np.ones((5, 66, 66))}, "66 pixels wide, expected a multiple of 4.*n_pixels=64"),
        ({"position_yx_px": np.zeros((4, 2))}, "5 patterns but 4 positions"),
        ({"position_yx_px": np.zeros((5, 3))}, r"positions have shape \(5, 3\)"),
        ({"position_yx_px": np.full((5, 2), np.nan)}, r"5 of 5 positions are not finite \(patterns 0:5\)"),
        ({"domain": "photons"}, "domain is 'photons', expected one of: counts, amplitude"),
        ({"calibration": "none"}, "calibration is 'none'"),
        ({"probe": np.ones((8, 8), np.complex64)}, r"probe has shape \(8, 8\)"),
        ({"normalization": 0.0}, "normalization is 0.0"),
        ({"mask": np.ones((4, 4), bool)}, r"mask has shape \(4, 4\)"),
        ({"flux": np.ones(3, np.float32)}, "flux has 3 entries for 5 patterns"),
    ],
)
def test_a_scan_that_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(PtychodaskError, match=message):
        make_scan(**changes)


def test_network_input_has_the_size_the_networks_are_trained_on():
    rng = np.random.default_rng(0)
    counts = rng.poisson(50, (7, 16, 16))
    factor = input_normalization(counts.sum() / 7, 16)
    assert np.mean(((np.sqrt(counts) * factor) ** 2).sum(axis=(1, 2))) == pytest.approx((16 / 2) ** 2)


def test_a_scan_of_zeros_has_no_normalization():
    with pytest.raises(PtychodaskError, match="every pattern is zero"):
        input_normalization(0.0, 16)


@pytest.mark.parametrize(("calibration", "total"), [("as_given", 256.0), ("mean_counts", 10.0), ("incident", 30.0)])
def test_calibration_sets_the_light_of_all_modes_together(calibration, total):
    probe = np.full((2, 8, 8), np.sqrt(2.0) * np.exp(0.3j))
    incident = 30.0 if calibration == "incident" else None
    scaled = calibrate_probe(probe, calibration, mean_counts=10.0, incident_counts=incident)
    assert (np.abs(scaled) ** 2).sum() == pytest.approx(total, rel=1e-6)
    np.testing.assert_allclose(np.angle(scaled), 0.3, rtol=1e-5)


def test_an_incident_calibration_without_its_flux_is_refused():
    with pytest.raises(PtychodaskError, match=r"needs incident_counts=.*found None"):
        calibrate_probe(np.ones((1, 8, 8)), "incident", mean_counts=1.0)


def test_a_dark_probe_is_refused():
    with pytest.raises(PtychodaskError, match=r"total intensity is 0\.0"):
        calibrate_probe(np.zeros((1, 8, 8)), "mean_counts", mean_counts=1.0)


def test_illumination_sums_the_modes_and_drops_faint_light():
    probe = np.zeros((2, 8, 8), np.complex64)
    probe[0, 4, 4], probe[1, 4, 4], probe[1, 4, 6], probe[0, 0, 0] = 3.0, 4.0, 2.5, 0.01
    light = illumination(probe)
    assert light[4, 4] == 1
    assert light[4, 6] == pytest.approx(0.25)
    assert light[0, 0] == 0
    assert illuminated_radius_px(probe) == 2
