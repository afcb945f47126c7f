"""What a sample of frames says: counts or amplitude, where the beam is, which pixels are bad, how wide the probe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from ptychodask.io.source import Dc, Frames
from ptychodask.scan import Domain

Certainty = Literal["defined", "noted", "measured", "guess", "open"]
"""How a finding is known: the format defines it, the file notes it, the data show it, it is likely, nothing tells."""

SAMPLE_FRAMES = 64
"""Frames that are looked at, at the most."""

SAMPLE_PIXELS = 2**23
"""Pixels of them, at the most: 64 MiB once they are float64."""

RUN_FRAMES = 8
"""Frames that are taken from one place of a file, so that a stored chunk of frames is read once."""

STREAM_BYTES = 512 * 2**20
"""Bytes of a stream that are read to sample it; what comes later is not looked at."""

FEWEST_PAIRS = 200
"""Pairs of neighbouring pixels from which their scatter is told: to a tenth of it, √(2/200)."""

MOST_CLASSES = 40
"""Classes of brightness that scatter is told for."""

BELOW_POISSON = 0.7
"""Variance of whole numbers over their mean below which they are no counts: structure adds to the 1 of Poisson's law,
nothing takes from it."""

NEAR_POISSON = (0.9, 1.3)
"""Between these it is that law which is seen, for the dim pixels, where structure adds little."""

CENTRED_SHARE = 0.6
"""Share of the light within a quarter of the frame around a place, from which on the beam is there."""

OFF_CENTRE = 0.02
"""Distance of the centre of mass from the middle, in frames, from which on it is worth saying."""

HOT_FACTOR = 8.0
"""Times that a pixel is brighter than the brightest of its neighbours, in the mean pattern, to be called hot."""

DEAD_COUNTS = 12.0
"""Counts that a pixel as bright as those around it has in all frames, for it not to be dark by chance (e⁻¹²)."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Some frames of a scan."""

    frames: NDArray[Any]
    """Patterns (k, h, w)."""

    rows: NDArray[np.int64]
    """Which (k,)."""

    n_frames: int
    """How many there are in all."""

    reached: int
    """Frames from the start that could be had: all, but of a stream its beginning."""

    @property
    def told(self) -> str:
        """What the sample is, in words."""
        if len(self.rows) == self.n_frames:
            return f"all {self.n_frames} patterns"
        where = "" if self.reached == self.n_frames else f" of the first {self.reached}, since the file is a stream"
        return f"{len(self.rows)} of {self.n_frames} patterns{where}"


def take_sample(frames: Frames) -> Sample:
    """A few frames from all over a file, or from the beginning of a stream, in runs of `RUN_FRAMES`.

    Memory holds `SAMPLE_PIXELS` of them, or one frame.
    """
    n_frames = int(frames.shape[0])
    frame_pixels = int(frames.shape[1]) * int(frames.shape[2])
    in_stream = max(1, STREAM_BYTES // (frame_pixels * frames.dtype.itemsize))
    reached = n_frames if frames.seekable else min(n_frames, in_stream)
    rows = spread_rows(reached, min(SAMPLE_FRAMES, max(1, SAMPLE_PIXELS // frame_pixels)))
    values = frames[rows] if frames.seekable else np.concatenate(list(_from_stream(frames, rows)))
    return Sample(values, rows, n_frames, reached)


def spread_rows(n_rows: int, wanted: int) -> NDArray[np.int64]:
    """Rows spread over all, in runs of `RUN_FRAMES`.

    Examples
    --------
    >>> spread_rows(100, 16).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 92, 93, 94, 95, 96, 97, 98, 99]
    """
    if n_rows <= wanted:
        return np.arange(n_rows)
    run = min(RUN_FRAMES, wanted)
    starts = np.linspace(0, n_rows - run, max(1, wanted // run)).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(run))


def _from_stream(frames: Frames, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    start = 0
    for block in frames.blocks():
        mine = rows[(rows >= start) & (rows < start + len(block))] - start
        yield block[mine]
        start += len(block)
        if start > rows[-1]:
            return


def mean_pattern(sample: Sample, domain: Domain) -> NDArray[np.float64]:
    """Mean counts (h, w) of the sampled patterns; what is negative or not finite counts as 0."""
    total = np.zeros(sample.frames.shape[1:])
    for frame in sample.frames:
        counts = np.nan_to_num(frame.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        total += np.maximum(counts, 0) if domain == "counts" else np.square(counts)
    return total / len(sample.frames)


def domain_of(frames: NDArray[Any]) -> tuple[Domain | None, Certainty, str]:
    """Whether values are counts or amplitudes, how that is known, and the evidence.

    Parameters
    ----------
    frames : array (k, h, w)

    Returns
    -------
    domain : {"counts", "amplitude"} or None
        None where the values do not tell.
    certainty : Certainty
    evidence : str

    Notes
    -----
    Counts are whole numbers whose variance is their mean (Poisson) or more, where the pattern changes from one pixel to
    the next. Amplitudes √n have squares that are whole numbers, and a variance near 1/4 whatever their mean, so that
    whole numbers with less scatter than Poisson's law allows are rounded amplitudes, or counts that were averaged.

    Examples
    --------
    >>> counts = np.random.default_rng(0).poisson(9, (4, 32, 32))
    >>> domain_of(counts)[0], domain_of(np.sqrt(counts))[0], domain_of(np.round(np.sqrt(counts)))[0]
    ('counts', 'amplitude', 'amplitude')
    """
    values = frames[np.isfinite(frames) & (frames != 0)] if frames.dtype.kind == "f" else frames[frames != 0]
    if not values.size:
        return None, "open", "every value is 0"
    largest = float(np.abs(values.astype(np.float64)).max())
    if frames.dtype.kind in "iub" or bool((values == np.rint(values)).all()):
        kind = "integers" if frames.dtype.kind in "iub" else "whole numbers"
        return _of_whole_numbers(frames, f"{kind} up to {largest:.0f}")
    squares = np.square(values[np.abs(values) < 30], dtype=np.float64)
    if squares.size >= FEWEST_PAIRS and bool(
        (np.abs(squares - np.rint(squares)) <= 1e-4 * np.maximum(squares, 1)).all()
    ):
        return "amplitude", "measured", "values whose squares are whole numbers"
    return None, "open", f"values that are no whole numbers, nor are their squares (up to {largest:.4g})"


def _of_whole_numbers(frames: NDArray[Any], what: str) -> tuple[Domain | None, Certainty, str]:
    mean, ratio = scatter(frames)
    dim = (mean >= 1.5) & (mean <= 8)
    if not dim.any():
        return "counts", "guess", f"{what}; too few dim pixels to compare their scatter with Poisson's law"
    lowest = float(ratio[mean >= 1.5].min())
    if lowest < BELOW_POISSON:
        where = f"{what}, but neighbouring pixels scatter less than Poisson's law allows (variance {lowest:.2f} x mean)"
        return "amplitude", "guess", f"{where}: rounded amplitudes, or averaged counts"
    dimmest = float(ratio[dim].min())
    low, high = NEAR_POISSON
    certainty: Certainty = "measured" if low <= dimmest <= high else "guess"
    return "counts", certainty, f"{what}; the variance of dim pixels is {dimmest:.2f} x their mean (Poisson: 1)"


def scatter(frames: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean of neighbouring pixels, and the variance of a pixel about it over that mean, from dim to bright.

    Parameters
    ----------
    frames : array (k, h, w)

    Returns
    -------
    mean, ratio : float64 array (bin,)
        Pairs of horizontal neighbours, by their mean in classes of as many pairs.
    """
    n_pairs = frames.shape[2] // 2
    means, variances = [], []
    for frame in frames:
        left, right = (frame[:, side : 2 * n_pairs : 2].astype(np.float64).ravel() for side in (0, 1))
        means.append((left + right) / 2)
        variances.append((left - right) ** 2 / 2)
    mean, variance = np.concatenate(means), np.concatenate(variances)
    lit = np.isfinite(mean) & (mean > 0)
    mean, variance = mean[lit], variance[lit]
    if not mean.size:
        return np.empty(0), np.empty(0)
    n_classes = min(MOST_CLASSES, max(1, len(mean) // (2 * FEWEST_PAIRS)))
    edges = np.unique(np.quantile(mean, np.linspace(0, 1, n_classes + 1)))
    of = np.clip(np.searchsorted(edges, mean, side="right") - 1, 0, len(edges) - 1)
    n_in = np.bincount(of)
    kept = n_in >= FEWEST_PAIRS
    mean_of = np.bincount(of, mean)[kept] / n_in[kept]
    return mean_of, np.bincount(of, variance)[kept] / n_in[kept] / mean_of


def beam_of(mean: NDArray[np.float64]) -> tuple[Dc | None, str]:
    """Whether the direct beam is in the middle of a mean pattern or at [0, 0], and the evidence; None where unclear.

    Examples
    --------
    >>> middle = np.zeros((8, 8))
    >>> middle[4, 4] = 1
    >>> beam_of(middle)[0], beam_of(np.fft.ifftshift(middle))[0]
    ('centre', 'corner')
    """
    total = mean.sum()
    if not total > 0:
        return None, "the mean pattern is dark"
    rows, columns = (np.arange(n) - n // 2 for n in mean.shape)
    near = np.hypot(rows[:, None] / mean.shape[0], columns / mean.shape[1]) <= 0.25
    centre, corner = (float(image[near].sum() / total) for image in (mean, np.fft.fftshift(mean)))
    evidence = f"{100 * centre:.0f} % of the light lies around the middle, {100 * corner:.0f} % around [0, 0]"
    if max(centre, corner) < CENTRED_SHARE:
        return None, evidence
    return ("centre" if centre > corner else "corner"), evidence


def off_centre_px(mean: NDArray[np.float64]) -> tuple[float, float] | None:
    """Centre of mass (y, x) of a mean pattern that has its beam near the middle, where it is worth saying.

    Only the light above a hundredth of the brightest pixels counts, so that a background does not pull it.
    """
    level = np.where(mean > 0.01 * np.quantile(mean, 0.999), mean, 0)
    if not level.sum() > 0:
        return None
    y, x = (float(value) for value in scipy.ndimage.center_of_mass(level))
    height, width = mean.shape
    off = max(abs(y - height // 2) / height, abs(x - width // 2) / width)
    return (y, x) if off > OFF_CENTRE else None


def bad_pixels(
    sample: Sample, mean: NDArray[np.float64], good: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pixels (h, w) are hot in all frames, and which are dark in all though those around them are not.

    Those that a mask (h, w) marks as bad are neither.
    """
    good = np.ones(mean.shape, bool) if good is None else good
    brightest_around = scipy.ndimage.rank_filter(mean, rank=-2, size=3, mode="wrap")
    median_around = scipy.ndimage.median_filter(mean, size=5, mode="wrap")
    lowest, highest = (np.nan_to_num(end(sample.frames, axis=0), nan=0.0) for end in (np.min, np.max))
    hot = (mean > HOT_FACTOR * np.maximum(brightest_around, mean.mean() / 100)) & (lowest > 0)
    dead = (highest <= 0) & (median_around * len(sample.frames) > DEAD_COUNTS)
    return hot & good, dead & good


def n_saturated(frames: NDArray[Any]) -> int:
    """Pixels of one frame, at the most, that hold the largest value of their type (k, h, w)."""
    if frames.dtype.kind not in "iu":
        return 0
    return int((frames == np.iinfo(frames.dtype).max).sum(axis=(1, 2)).max())


def least_probe_diameter_px(patterns: NDArray[np.float64]) -> float | None:
    """Diameter that a probe has at least, from the finest speckles of patterns of counts, object pixels.

    Parameters
    ----------
    patterns : float array (k, h, w)
        Counts, wherever the beam is.

    Returns
    -------
    float or None
        None where no pattern has light.

    Notes
    -----
    The Fourier transform of a pattern is the autocorrelation of its exit wave, which reaches as far as the probe is
    wide. The radius of a disc as large as the area where it stays above twice the noise, which is found far from the
    middle, is a diameter of the probe; what is lost in the noise makes it too small.
    """
    height, width = patterns.shape[1:]
    power = np.zeros((height, width))
    for pattern in patterns:
        power += np.abs(scipy.fft.fft2(pattern)) ** 2
    if not power[0, 0] > 0:
        return None
    lag = np.hypot(scipy.fft.fftfreq(height)[:, None], scipy.fft.fftfreq(width))
    noise = np.median(power[lag > 0.45])
    reached = power > max(2 * noise, 1e-6 * power[0, 0])
    return float(np.sqrt(reached.sum() / np.pi))
