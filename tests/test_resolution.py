"""How fine two halves agree: known blur, known noise, windows in their places."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage

from ptychodask.errors import PtychodaskError
from ptychodask.judging.resolution import resolution
from ptychodask.result import Layers, make_dataset

SIDE = 192


def halves_result(one, other, weight=None, pixel_size_m=None):
    weight = np.ones(one.shape, np.float32) if weight is None else weight
    return make_dataset(
        one,
        weight,
        weight,
        weight,
        (-10, 20),
        pixel_size_m=pixel_size_m,
        attributes={},
        layers=Layers(split_half=True),
        object_half=np.stack([one, other]),
        weight_half=np.stack([weight, weight]),
    )


def noise(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((SIDE, SIDE)) + 1j * rng.standard_normal((SIDE, SIDE))


def band_limited(object_, cut):
    """Frequencies up to `cut` cycles per pixel alone."""
    frequency = np.fft.fftfreq(SIDE)
    keep = np.hypot(frequency[:, None], frequency) <= cut
    return np.fft.ifft2(np.fft.fft2(object_) * keep)


def test_equal_halves_are_known_to_two_pixels():
    found = resolution(halves_result(noise(0), noise(0)))
    assert float(found["resolution_px"]) == 2
    assert (found["local_resolution_px"] == 2).all()
    np.testing.assert_allclose(found["frc"], 1)


@pytest.mark.parametrize("cut", [0.1, 0.2])
def test_halves_that_share_low_frequencies_end_where_these_do(cut):
    shared = band_limited(noise(0), cut) * 3
    one, other = shared + noise(1), shared + noise(2)
    found = resolution(halves_result(one, other, pixel_size_m=1e-8), criterion="1/2")
    assert float(found["resolution_px"]) == pytest.approx(1 / cut, rel=0.05)
    assert float(found["resolution_m"]) == pytest.approx(1e-8 / cut, rel=0.05)
    assert float(found["local_resolution_px"].median()) == pytest.approx(1 / cut, rel=0.15)


def test_the_map_is_coarse_where_the_object_is():
    fine = noise(0) * 20
    smooth = np.where(np.arange(SIDE) < SIDE // 2, fine, scipy.ndimage.gaussian_filter(fine.real, 6) * 20)
    found = resolution(halves_result(smooth + noise(1), smooth + noise(2)), window_px=32, step_px=32)
    left, right = found["local_resolution_px"][:, :2], found["local_resolution_px"][:, -2:]
    assert float(left.max()) < 3 < 4 < float(right.min())
    assert found["window_x"].values[0] == 20 + 16
    assert found["window_y"].values[1] == -10 + 32 + 16


def test_windows_that_are_not_seen_say_nothing():
    weight = np.ones((SIDE, SIDE), np.float32)
    weight[:, :100] = 0
    found = resolution(halves_result(noise(0), noise(0), weight), window_px=32, step_px=32)
    assert np.isnan(found["local_resolution_px"][:, :3]).all()
    assert (found["local_resolution_px"][:, 4:] == 2).all()


def test_what_cannot_be_judged_is_refused():
    ds = halves_result(noise(0), noise(0))
    with pytest.raises(PtychodaskError, match=r"no object_half .*reconstruct with split_half=True"):
        resolution(ds.drop_vars(["object_half", "weight_half"]))
    with pytest.raises(PtychodaskError, match="window_px is 33, expected an even number from 8 to"):
        resolution(ds, window_px=33)
    with pytest.raises(PtychodaskError, match=r"criterion is '0\.143', expected one of: 1/7"):
        resolution(ds, criterion="0.143")
    with pytest.raises(PtychodaskError, match="step_px is 0"):
        resolution(ds, step_px=0)
    dark = np.zeros((SIDE, SIDE), np.float32)
    with pytest.raises(PtychodaskError, match="no pixel is well lit in both halves"):
        resolution(halves_result(noise(0), noise(0), dark))
