"""Simulated scans: objects, scan paths, forward model and photon noise.

Everything is a pure function of its arguments and the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy.ndimage import gaussian_filter

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.forward import expected_counts
from ptychodask.grouping import curve_order, mean_spacing_px
from ptychodask.io.npy_stream import read_npy
from ptychodask.probes import disc_probe, zone_plate_probe
from ptychodask.scan import Scan, Truth, check_pattern_shape
from ptychodask.storage.location import LocationLike, parse_location
from ptychodask.store import StoredScan, open_scan
from ptychodask.store.write import write_scan

OBJECTS = ("lines", "star", "field")
"""Names of the objects that `simulate` can generate."""


PROBES = ("disc", "zone_plate")
"""Names of the probes that `simulate` can generate."""


AMPLITUDE_RANGE = (0.5, 1.0)
"""Lowest and highest amplitude of an object from grey values."""


PHASE_RANGE_RAD = (-0.6, 0.6)
"""Lowest and highest phase of an object from grey values."""


def crossing_lines(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.complex64]:
    """Object of crossing straight lines.

    Amplitude 0.5 to 1 and phase −0.6 to 0.6 rad, drawn independently.

    Parameters
    ----------
    shape : (int, int)
        Pixels (y, x).
    rng : numpy.random.Generator

    Returns
    -------
    complex64 array (y, x)
    """
    return from_grey(_lines(shape, rng), _lines(shape, rng))


def _lines(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Lines with sharp core and wide halo; density independent of shape."""
    diagonal = float(np.hypot(*shape))
    steps = np.arange(-diagonal, diagonal)
    image = np.zeros(shape[0] * shape[1], np.float32)
    for angle, distance in rng.uniform((0, -diagonal / 2), (np.pi, diagonal / 2), (int(diagonal / 2), 2)):
        direction_y, direction_x = np.sin(angle), np.cos(angle)
        y = np.rint(shape[0] / 2 + distance * direction_x + steps * direction_y).astype(np.int64)
        x = np.rint(shape[1] / 2 - distance * direction_y + steps * direction_x).astype(np.int64)
        inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
        image[y[inside] * shape[1] + x[inside]] += 1
    drawn = image.reshape(shape)
    return gaussian_filter(drawn, 1) + 2 * gaussian_filter(drawn, 5) + 5 * gaussian_filter(drawn, 10)


def siemens_star(shape: tuple[int, int], *, n_spokes: int = 36) -> NDArray[np.complex64]:
    """Siemens star of dark, phase-shifting spokes, averaged over each pixel's area.

    Parameters
    ----------
    shape : (int, int)
        Pixels (y, x); the star fills the shorter side.
    n_spokes : int
        Spokes around the circle.

    Returns
    -------
    complex64 array (y, x)
        Amplitude 1 and phase −0.6 rad off the spokes, 0.5 and 0.6 rad on them.
    """
    radius_px = 0.48 * min(shape)
    star = np.zeros(shape, np.float32)
    samples = (np.arange(4) + 0.5) / 4 - 0.5
    for sample_y in samples:
        y = (np.arange(shape[0]) - shape[0] // 2 + sample_y)[:, None]
        for sample_x in samples:
            x = np.arange(shape[1]) - shape[1] // 2 + sample_x
            share = np.hypot(y, x) / radius_px
            spoke = np.cos(n_spokes * np.arctan2(y, x)) > 0
            gap = (share > 0.48) & (share < 0.52)
            star += spoke & (share > 0.05) & (share < 1) & ~gap
    return from_grey(-star, star)


def random_field(
    shape: tuple[int, int], rng: np.random.Generator, *, correlation_px: float = 6.0
) -> NDArray[np.complex64]:
    """Smooth random object: white noise blurred by a Gaussian.

    Amplitude and phase are drawn independently.

    Parameters
    ----------
    shape : (int, int)
        Pixels (y, x).
    rng : numpy.random.Generator
    correlation_px : float
        Standard deviation of the blur, pixels.

    Returns
    -------
    complex64 array (y, x)
    """

    def smooth() -> NDArray[np.float32]:
        return gaussian_filter(rng.standard_normal(shape, np.float32), correlation_px, mode="wrap")

    return from_grey(smooth(), smooth())


def from_grey(amplitude: NDArray[Any], phase: NDArray[Any]) -> NDArray[np.complex64]:
    """Object from two grey-value images, amplitude and phase.

    Parameters
    ----------
    amplitude, phase : real array (y, x)
        Grey values in any unit; lowest and highest are mapped to the ends of `AMPLITUDE_RANGE` and `PHASE_RANGE_RAD`.

    Returns
    -------
    complex64 array (y, x)

    Examples
    --------
    >>> grey = np.array([[0, 255]])
    >>> np.abs(from_grey(grey, grey)).tolist()
    [[0.5, 1.0]]
    """
    amplitude = _stretch(amplitude, AMPLITUDE_RANGE)
    return (amplitude * np.exp(1j * _stretch(phase, PHASE_RANGE_RAD))).astype(np.complex64)


def _stretch(grey: NDArray[Any], ends: tuple[float, float]) -> NDArray[np.float32]:
    low, high = float(grey.min()), float(grey.max())
    if not high > low:
        raise PtychodaskError(f"object: every grey value is {low}, expected an image with some contrast")
    return np.interp(grey, (low, high), ends).astype(np.float32)


def raster_positions(
    n_patterns: int, step_px: float, rng: np.random.Generator, *, jitter: float = 0.2
) -> NDArray[np.float64]:
    """Raster scan with random jitter of each position.

    Parameters
    ----------
    n_patterns : int
    step_px : float
        Distance between neighbours, pixels.
    rng : numpy.random.Generator
    jitter : float
        Largest displacement along each axis, in steps.

    Returns
    -------
    float64 array (pattern, 2)
        (y, x), pixels, around (0, 0), row by row.
    """
    across = int(np.ceil(np.sqrt(n_patterns)))
    grid = np.stack(np.divmod(np.arange(n_patterns), across), axis=1).astype(np.float64)
    grid -= (grid.max(axis=0) + grid.min(axis=0)) / 2
    return step_px * (grid + rng.uniform(-jitter, jitter, grid.shape))


def spiral_positions(n_patterns: int, step_px: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Fermat spiral, rotated by a random angle.

    Parameters
    ----------
    n_patterns : int
    step_px : float
        Square root of the area per position, pixels.
    rng : numpy.random.Generator

    Returns
    -------
    float64 array (pattern, 2)
        (y, x), pixels, around (0, 0), from the middle outwards.

    Notes
    -----
    H. Vogel, Math. Biosci. 44 (1979) 179: radius ∝ √k, angle k times the golden angle.
    """
    k = np.arange(n_patterns)
    radius = step_px * np.sqrt(k / np.pi)
    angle = rng.uniform(0, 2 * np.pi) + k * np.pi * (3 - np.sqrt(5))
    return np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1)


def random_positions(n_patterns: int, step_px: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Independent positions, uniform over a square.

    Parameters
    ----------
    n_patterns : int
    step_px : float
        Square root of the area per position, pixels: the square's side is ``step_px * sqrt(n_patterns)``.
    rng : numpy.random.Generator

    Returns
    -------
    float64 array (pattern, 2)
        (y, x), pixels, around (0, 0).
    """
    half = step_px * np.sqrt(n_patterns) / 2
    return rng.uniform(-half, half, (n_patterns, 2))


PATHS: dict[str, Callable[[int, float, np.random.Generator], NDArray[np.float64]]] = {
    "random": random_positions,
    "raster": raster_positions,
    "spiral": spiral_positions,
}
"""Scan paths by name."""


def make_positions(path: str, n_patterns: int, step_px: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Positions of a simulated scan.

    Parameters
    ----------
    path : str
        A name of `PATHS`; or the store of a scan, whose positions are thinned along a space-filling curve to `step_px`
        and cropped to the `n_patterns` nearest to the middle.
    n_patterns : int
    step_px : float
        Mean spacing, pixels.
    rng : numpy.random.Generator

    Returns
    -------
    float64 array (pattern, 2)
        (y, x), pixels, around (0, 0).

    Raises
    ------
    PtychodaskError
        If the name is unknown, or the scan's positions are further apart (`mean_spacing_px`) or too few.
    """
    if path in PATHS:
        return PATHS[path](n_patterns, step_px, rng)
    if not parse_location(path).exists():
        check_choice("path", path, (*PATHS, "the store of a scan"), "simulate")
    known = open_scan(path).position_yx_px
    spacing_px = mean_spacing_px(known)
    # A small tolerance, so that the scan's spacing can be passed as it is printed, rounded.
    if step_px < 0.999 * spacing_px:
        raise PtychodaskError(
            f"simulate: step_px is {step_px:.4g}, but the mean spacing of the positions of {path} is "
            f"{spacing_px:.4g} px; pass {spacing_px:.4g} or more"
        )
    n_left = min(len(known), round(len(known) * (spacing_px / step_px) ** 2))
    if n_left < n_patterns:
        raise PtychodaskError(
            f"simulate: {path} has {n_left} positions at step_px={step_px:.4g}, expected at least "
            f"n_patterns={n_patterns}; pass n_patterns={n_left}, or a step_px down to {spacing_px:.4g}"
        )
    left = known[curve_order(known)[np.linspace(0, len(known) - 1, n_left).round().astype(int)]]
    left = left - (left.max(axis=0) + left.min(axis=0)) / 2
    return left[np.sort(np.argsort(np.hypot(*left.T), kind="stable")[:n_patterns])]


def _keep_measured(store: LocationLike) -> None:
    """Raise `PtychodaskError` if a store holds a scan that was not simulated."""
    try:
        provenance = StoredScan(store).attributes["provenance"]
    except PtychodaskError:
        return
    if provenance.get("source") != "simulation":
        raise PtychodaskError(
            f"simulate: {store} holds a scan that was not simulated, from {provenance.get('source', 'Python')}; name "
            "another store, or remove it yourself"
        )


class SimulatedPatterns:
    """Noisy patterns, simulated when they are indexed.

    A pattern depends only on its index and the seed.
    """

    def __init__(
        self, truth: Truth, probe: NDArray[np.complex128], position_yx_px: NDArray[np.float64], seed: int
    ) -> None:
        self._truth = truth
        self._probe = probe
        self._position = position_yx_px
        self._seed = seed
        self._dtype = _counts_dtype(truth.object, probe)

    @property
    def shape(self) -> tuple[int, ...]:
        n_pixels = self._probe.shape[-1]
        return (len(self._position), n_pixels, n_pixels)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    def __getitem__(self, index: Any, /) -> NDArray[Any]:
        wanted = np.atleast_1d(np.arange(len(self._position))[index])
        patterns = np.empty((len(wanted), *self.shape[1:]), self._dtype)
        # One at a time: a batched transform may round differently, and a pattern must not depend on its batch.
        for row, pattern in enumerate(wanted):
            rng = np.random.default_rng([self._seed, int(pattern)])
            truth, position = self._truth, self._position[pattern]
            patterns[row] = rng.poisson(expected_counts(truth.object, truth.corner_yx_px, self._probe, position))
        return patterns


def _counts_dtype(object_: NDArray[np.complex64], probe: NDArray[np.complex128]) -> np.dtype[Any]:
    """Smallest unsigned type for patterns, even with all counts in one pixel."""
    total = float((np.abs(probe) ** 2).sum()) * float(np.abs(object_).max()) ** 2
    brightest = total + 10 * np.sqrt(total)
    for dtype in (np.dtype(np.uint16), np.dtype(np.uint32)):
        if brightest < np.iinfo(dtype).max:
            return dtype
    raise PtychodaskError(f"simulate: patterns of {total:.3g} photons overflow 32 bits; pass a dose below 4e9")


def simulate(
    store: str | Path,
    *,
    object: str | Path | NDArray[Any] = "lines",
    probe: str | NDArray[Any] = "disc",
    n_pixels: int = 64,
    n_patterns: int = 2000,
    dose: float = 1e9,
    step_px: float = 8.0,
    path: str = "random",
    seed: int = 0,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Scan:
    """Simulate a scan of a known object into a new store.

    Parameters
    ----------
    store : path or ``s3://`` URL
        Path of the new store.
    object : str, path or array (y, x)
        A name of `OBJECTS`; or a complex array, used as it is; or a real array or an image file (``.npy``, ``.png``,
        ...) whose grey values become amplitude and phase (`from_grey`). The scan is centred on it.
    probe : str or complex array (N, N) or (mode, N, N)
        A name of `PROBES`, or a probe whose scale is set by the dose.
    n_pixels : int
        Pixels across a pattern, N, divisible by 4.
    n_patterns : int
    dose : float
        Photons of the probe in one pattern, Σ|P|².
    step_px : float
        Mean spacing of the positions, pixels: the scan covers ``n_patterns * step_px**2``.
    path : str
        A name of `PATHS`, or the store of a scan whose positions are used (`make_positions`).
    seed : int
        Seed of object, positions and noise; the noise of a pattern depends only on the seed and its index.
    overwrite : bool
        Replace an existing store.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    Scan
        Counts as uint16 if they fit, else uint32; the probe calibrated ``as_given``; the truth extends more than N/2
        beyond every position. Patterns are simulated and written a shard at a time; the complete object is in memory.

    Raises
    ------
    PtychodaskError
        If a name is unknown, a number is out of range, a scan's positions are too far apart or too few, an image cannot
        be read or is too small, the store exists, or it is to be overwritten and holds a measured scan.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     scan = simulate(f"{folder}/scan.zarr", n_pixels=16, n_patterns=20, dose=1e4, progress=False)
    >>> scan.n_patterns, scan.calibration, scan.diffraction.dtype.name
    (20, 'as_given', 'uint16')
    """
    for name, value in (("n_patterns", n_patterns), ("dose", dose), ("step_px", step_px)):
        if not (np.isfinite(value) and value > 0):
            raise PtychodaskError(f"simulate: {name} is {value}, expected a positive number")
    if seed < 0:
        raise PtychodaskError(f"simulate: seed is {seed}, expected 0 or more")
    check_pattern_shape((n_patterns, n_pixels, n_pixels), "simulate")
    if overwrite:
        _keep_measured(store)
    rng_path, rng_object = np.random.default_rng(seed).spawn(2)
    position = make_positions(path, n_patterns, step_px, rng_path)
    half = np.ceil(np.abs(position).max(axis=0)).astype(int) + n_pixels // 2 + 1
    truth = _centred_truth(object, (2 * int(half[0]), 2 * int(half[1])), rng_object)
    illuminating = scaled_probe(probe, n_pixels, dose)
    return write_scan(
        store,
        diffraction=SimulatedPatterns(truth, illuminating, position, seed),
        position_yx_px=position,
        probe=illuminating,
        domain="counts",
        calibration="as_given",
        truth=truth,
        provenance={
            "source": "simulation",
            "object": "array" if isinstance(object, np.ndarray) else str(object),
            "probe": "array" if isinstance(probe, np.ndarray) else probe,
            "n_pixels": n_pixels,
            "n_patterns": n_patterns,
            "dose": float(dose),
            "step_px": float(step_px),
            "path": path,
            "seed": seed,
        },
        overwrite=overwrite,
        progress=progress,
    )


def _centred_truth(source: str | Path | NDArray[Any], needed: tuple[int, int], rng: np.random.Generator) -> Truth:
    """Object of `source`, at least `needed` pixels, centred on (0, 0)."""
    object_ = _make_object(source, needed, rng)
    if object_.ndim != 2 or object_.shape[0] < needed[0] or object_.shape[1] < needed[1]:
        raise PtychodaskError(
            f"simulate: the object has shape {object_.shape}, the scan needs at least (y, x) = {needed}; "
            "pass fewer patterns, a smaller step_px, or a larger object"
        )
    if not np.isfinite(object_).all():
        raise PtychodaskError("simulate: the object has values that are not finite; replace them first")
    corner = (-(object_.shape[0] // 2), -(object_.shape[1] // 2))
    return Truth(object_.astype(np.complex64), (float(corner[0]), float(corner[1])))


def _make_object(source: str | Path | NDArray[Any], shape: tuple[int, int], rng: np.random.Generator) -> NDArray[Any]:
    if isinstance(source, np.ndarray):
        return source if np.iscomplexobj(source) else from_grey(source, source)
    if isinstance(source, str) and source in OBJECTS:
        if source == "star":
            return siemens_star(shape)
        return crossing_lines(shape, rng) if source == "lines" else random_field(shape, rng)
    if not Path(source).suffix:
        check_choice("object", source, (*OBJECTS, "a path to an image"), "simulate")
    image = _read_image(Path(source))
    return image if np.iscomplexobj(image) else from_grey(image, image)


def _read_image(path: Path) -> NDArray[Any]:
    try:
        if path.suffix == ".npy":
            return read_npy(path)
        with Image.open(path) as image:
            return np.asarray(image.convert("F"))
    except (OSError, ValueError, EOFError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise PtychodaskError(f"{path}: cannot be read as an image ({error}); pass a .npy or .png file") from error


def scaled_probe(probe: str | NDArray[Any], n_pixels: int, dose: float) -> NDArray[np.complex128]:
    """Probe of a simulation, scaled to the dose.

    Parameters
    ----------
    probe : str or complex array (N, N) or (mode, N, N)
        A name of `PROBES`, or a probe whose scale is set by the dose.
    n_pixels : int
        Pixels across a pattern, N.
    dose : float
        Photons of the probe in one pattern.

    Returns
    -------
    complex128 array (mode, N, N)
        Σ|P|² equals the dose.

    Raises
    ------
    PtychodaskError
        If the name is unknown, the shape does not fit, or the total intensity is zero.
    """
    if isinstance(probe, str):
        check_choice("probe", probe, PROBES, "simulate")
        if probe == "disc":
            unscaled = disc_probe(n_pixels, diameter_px=0.35 * n_pixels)
        else:
            # Defocused until the annulus has half the diameter of the frame, for any N.
            unscaled = zone_plate_probe(
                n_pixels, outer_px=0.5 * n_pixels, stop_px=0.2 * n_pixels, defocus=np.pi / 16 * n_pixels
            )
    else:
        unscaled = np.asarray(probe)
    modes = unscaled[None] if unscaled.ndim == 2 else unscaled
    if modes.ndim != 3 or modes.shape[1:] != (n_pixels, n_pixels):
        raise PtychodaskError(
            f"simulate: the probe has shape {unscaled.shape}, expected ({n_pixels}, {n_pixels}) or (mode, {n_pixels}, "
            f"{n_pixels}); pass n_pixels={unscaled.shape[-1] if unscaled.ndim else 0} or another probe"
        )
    total = float((np.abs(modes) ** 2).sum(dtype=np.float64))
    if not (np.isfinite(total) and total > 0):
        raise PtychodaskError(f"simulate: the probe's total intensity is {total}, expected a positive number")
    return modes.astype(np.complex128) * np.sqrt(dose / total)
