"""Properties estimated from a sample of frames.

Counts or amplitude, position of the direct beam, bad pixels, diameter of the probe.
"""

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
"""Basis of a finding: format definition, record in the file, the data, a guess, or none ("open")."""

SAMPLE_FRAMES = 64
"""Largest number of sampled frames."""

SAMPLE_PIXELS = 2**23
"""Largest number of sampled pixels: 64 MiB as float64."""

RUN_FRAMES = 8
"""Consecutive frames sampled together, so that a stored chunk of frames is read once."""

STREAM_BYTES = 512 * 2**20
"""Bytes of a stream that are read to sample it; later frames are ignored."""

FEWEST_PAIRS = 200
"""Smallest number of pixel pairs for a variance estimate: its relative error is √(2/200), a tenth."""

MOST_CLASSES = 40
"""Largest number of brightness classes with a variance estimate each."""

BELOW_POISSON = 0.7
"""Ratio of variance to mean below which whole numbers are not counts: it is 1 for Poisson noise, and structure in the
pattern can only increase it."""

NEAR_POISSON = (0.9, 1.3)
"""Range of variance over mean of dim pixels that confirms Poisson noise; structure adds little there."""

CENTRED_SHARE = 0.6
"""Least share of the intensity within a quarter frame of a point for the direct beam to be there."""

OFF_CENTRE = 0.02
"""Distance of the centre of mass from the middle, as a fraction of the frame, above which it is reported."""

HOT_FACTOR = 8.0
"""Ratio of a hot pixel to its brightest neighbours in the mean pattern, at least."""

DEAD_COUNTS = 12.0
"""Expected counts over all frames above which a dark pixel is dead: dark by chance with probability e⁻¹²."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Some frames of a scan."""

    frames: NDArray[Any]
    """Patterns (k, h, w)."""

    rows: NDArray[np.int64]
    """Row of each frame in the file (k,)."""

    n_frames: int
    """Frames in the file."""

    reached: int
    """Frames from the start that were accessible: all, or only the first of a stream."""

    good: NDArray[np.bool_] | None = None
    """True where a pixel holds counts in all sampled frames (h, w); None if all do."""

    @property
    def description(self) -> str:
        """The size of the sample in words."""
        if len(self.rows) == self.n_frames:
            return f"all {self.n_frames} patterns"
        limit = "" if self.reached == self.n_frames else f" of the first {self.reached}, since the file is a stream"
        return f"{len(self.rows)} of {self.n_frames} patterns{limit}"


def take_sample(frames: Frames) -> Sample:
    """Sample of frames spread over a file, or a stream's beginning.

    Frames are taken in runs of `RUN_FRAMES`, up to `SAMPLE_PIXELS` pixels but at least one frame.
    """
    n_frames = int(frames.shape[0])
    frame_pixels = int(frames.shape[1]) * int(frames.shape[2])
    in_stream = max(1, STREAM_BYTES // (frame_pixels * frames.dtype.itemsize))
    reached = n_frames if frames.seekable else min(n_frames, in_stream)
    rows = spread_rows(reached, min(SAMPLE_FRAMES, max(1, SAMPLE_PIXELS // frame_pixels)))
    values = frames[rows] if frames.seekable else np.concatenate(list(_from_stream(frames, rows)))
    return Sample(values, rows, n_frames, reached)


def spread_rows(n_rows: int, wanted: int) -> NDArray[np.int64]:
    """Rows spread over the scan, in runs of `RUN_FRAMES`.

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
    """Mean counts (h, w) of a sample; negative or non-finite are 0."""
    total = np.zeros(sample.frames.shape[1:])
    for frame in sample.frames:
        counts = np.nan_to_num(frame.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        total += np.maximum(counts, 0) if domain == "counts" else np.square(counts)
    return total / len(sample.frames)


def domain_of(frames: NDArray[Any]) -> tuple[Domain | None, Certainty, str]:
    """Unit of the patterns, counts or amplitude, with certainty and evidence.

    Parameters
    ----------
    frames : array (k, h, w)

    Returns
    -------
    domain : {"counts", "amplitude"} or None
        None if the values fit neither.
    certainty : Certainty
    evidence : str

    Notes
    -----
    Counts are whole numbers whose variance equals their mean (Poisson), or exceeds it where the pattern changes from
    one pixel to the next. Amplitudes √n have squares that are whole numbers, and a variance near 1/4 for any mean, so
    whole numbers with a variance below Poisson's are rounded amplitudes, or averaged counts.

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
    return None, "open", f"neither the values nor their squares are whole numbers (up to {largest:.4g})"


def _of_whole_numbers(frames: NDArray[Any], values: str) -> tuple[Domain | None, Certainty, str]:
    mean, ratio = scatter(frames)
    dim = (mean >= 1.5) & (mean <= 8)
    if not dim.any():
        return "counts", "guess", f"{values}; too few dim pixels to compare their variance with Poisson noise"
    lowest = float(ratio[mean >= 1.5].min())
    if lowest < BELOW_POISSON:
        evidence = f"{values}, but the variance of neighbouring pixels is below Poisson noise ({lowest:.2f} x mean)"
        return "amplitude", "guess", f"{evidence}: rounded amplitudes, or averaged counts"
    dimmest = float(ratio[dim].min())
    low, high = NEAR_POISSON
    certainty: Certainty = "measured" if low <= dimmest <= high else "guess"
    return "counts", certainty, f"{values}; the variance of dim pixels is {dimmest:.2f} x their mean (Poisson: 1)"


def scatter(frames: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean of neighbouring pixels, and ratio of variance to mean.

    Parameters
    ----------
    frames : array (k, h, w)

    Returns
    -------
    mean, ratio : float64 array (bin,)
        Of pairs of horizontal neighbours, binned by their mean into classes of equal size, from dim to bright.
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
    """Position of the direct beam, "centre" or "corner", and the evidence.

    "corner" is [0, 0]; None if unclear.

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
    evidence = f"{100 * centre:.0f} % of the intensity is around the middle, {100 * corner:.0f} % around [0, 0]"
    if max(centre, corner) < CENTRED_SHARE:
        return None, evidence
    return ("centre" if centre > corner else "corner"), evidence


def off_centre_px(mean: NDArray[np.float64]) -> tuple[float, float] | None:
    """Centre of mass (y, x) of a mean pattern if off centre.

    None if it is within `OFF_CENTRE` of the middle. The beam must be near the middle. Only pixels above a hundredth
    of the brightest count, so that the background does not shift the result.
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
    """Masks (h, w) of hot and of dead pixels.

    Hot pixels are much brighter than their neighbours in all frames; dead pixels are 0 in all frames while their
    neighbours are not. Pixels where `good` (h, w) is False are in neither.
    """
    good = np.ones(mean.shape, bool) if good is None else good
    brightest_around = scipy.ndimage.rank_filter(mean, rank=-2, size=3, mode="wrap")
    median_around = scipy.ndimage.median_filter(mean, size=5, mode="wrap")
    lowest, highest = (np.nan_to_num(extreme(sample.frames, axis=0), nan=0.0) for extreme in (np.min, np.max))
    hot = (mean > HOT_FACTOR * np.maximum(brightest_around, mean.mean() / 100)) & (lowest > 0)
    dead = (highest <= 0) & (median_around * len(sample.frames) > DEAD_COUNTS)
    return hot & good, dead & good


def n_saturated(frames: NDArray[Any]) -> int:
    """Largest number of saturated pixels in a frame (k, h, w).

    Saturated pixels have the largest value of their integer type; 0 for floats.
    """
    if frames.dtype.kind not in "iu":
        return 0
    return int((frames == np.iinfo(frames.dtype).max).sum(axis=(1, 2)).max())


def least_probe_diameter_px(patterns: NDArray[np.float64]) -> float | None:
    """Lower bound of the probe diameter in object pixels, from speckle size.

    Parameters
    ----------
    patterns : float array (k, h, w)
        Counts; the beam may be anywhere.

    Returns
    -------
    float or None
        None if all patterns are dark.

    Notes
    -----
    The Fourier transform of a pattern is the autocorrelation of its exit wave, whose radius is the diameter of the
    probe. It is estimated as the radius of a disc with the area where the autocorrelation exceeds twice the noise; the
    noise is measured far from the middle. Parts below the noise make the estimate too small.
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
