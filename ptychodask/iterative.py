"""Compact iterative engine in memory, for probe refinement.

Sweeps (`run_sweeps`) visit one pattern at a time in random order, as ePIE does, and update the probe once per batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import scipy.ndimage
import xarray as xr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.forward import PROBE_BATCH, project_modulus, r_factor, shift_probe, shift_ramp
from ptychodask.grouping import check_drop, chosen_patterns, experiment_number
from ptychodask.probes import defocus_starts, defocused, illumination, probe_centroid_px, squared_modulus
from ptychodask.progress import Progress, progress_bar
from ptychodask.result import make_dataset
from ptychodask.scan import Scan
from ptychodask.store import open_scan
from ptychodask.store.annotate import check_probe_is_free, replace_probe

logger = logging.getLogger(__name__)


PROBE_DAMPING = 0.1
"""Fraction of the brightest pixel in the denominator of a probe update; damps weakly determined pixels."""


SCORING_SWEEPS = 5
"""Sweeps with fixed probe that fit the object with which a probe is scored."""

LEAST_GAIN = 0.01
"""Least relative decrease of R on held-out patterns by the fitted object against a uniform one."""

LEAST_COMMON_LIGHT = 0.1
"""Least overlap Σ √(I₀ I₁) of the start's and the refined probe's illumination, each of sum 1."""


@dataclass(frozen=True, eq=False)
class ProbeRefinement:
    """Refined probe and its scores, from `refine_probe`."""

    probe: NDArray[np.complex64] = field(repr=False)
    """Refined probe (mode, N, N), calibrated as the initial one."""

    r_before: float
    """R of the stored probe on the held-out patterns."""

    r_after: float
    """R of the refined probe on the same patterns."""

    stored: bool
    """True if the store now contains the refined probe; False if it was left unchanged, see `problem`."""

    n_sweeps: int
    """Sweeps over the patterns."""

    n_patterns: int
    """Patterns used to refine the probe."""

    n_held_out: int
    """Patterns used only to score both probes, unseen by object and probe."""

    defocus_rad: float
    """Defocus applied to the initial probe before the sweeps, as in `defocused`, radians."""

    r_uniform: float
    """R of the refined probe on the held-out patterns with a uniform object in place of the fitted one."""

    problem: str | None = None
    """Why the refined probe was not stored; None if it was."""


def refine_probe(
    store: str | Path,
    *,
    n_sweeps: int = 16,
    fraction: float = 1.0,
    held_out: float = 0.1,
    exclude: Sequence[int] | NDArray[np.integer[Any]] = (),
    experiment: int | None = None,
    search_defocus: bool = False,
    seed: int = 0,
    step_object: float = 1.0,
    step_probe: float = 1.0,
    progress: bool | None = None,
) -> ProbeRefinement:
    """Refine the probe of a store by iterative sweeps over its patterns.

    The store keeps the better of the refined and the stored probe.

    Parameters
    ----------
    store : path
        Its `probe` is replaced if the refined one predicts the patterns better (see the notes); `probe_initial` is
        kept. A second call starts from `probe_initial` again, and its probe must be better than the stored one.
    n_sweeps : int
        Visits of each pattern, 3 or more; the first and the last sweep do not update the probe.
    fraction : float
        Fraction of the patterns to use: those nearest to the middle of the scan, so that they overlap as much as all
        patterns do.
    held_out : float
        Fraction of the used patterns that only score the probes.
    exclude : int array (k,), optional
        Patterns of the store used neither to refine nor to score.
    experiment : int, optional
        Experiment whose patterns are used, in a scan of several; by default the one with most patterns.
    search_defocus : bool
        Also try defocused initial probes, with both signs, and continue with the start that predicts the held-out
        patterns best (the ones that score the result); for a probe of unknown phase, such as one estimated from the
        mean pattern.
    seed : int
        Seed of the order of the patterns and of the choice of held-out ones.
    step_object, step_probe : float
        Length of each update, more than 0 and at most 1, the full step.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    ProbeRefinement

    Raises
    ------
    PtychodaskError
        If a number is out of range, a pattern does not exist, or the scan has too few patterns.

    Notes
    -----
    See `run_sweeps` for the method. The score is `r_factor` of the held-out patterns, with an object fitted to the
    other patterns in `SCORING_SWEEPS` sweeps with fixed probe, in the same way for both probes. In a scan of several
    experiments, the patterns of one are used, since each may have a different object; the probe is that of all.

    A refined probe is stored only if R decreases on the held-out patterns and on the others, if its object predicts the
    held-out patterns better than a uniform object does, and if its light did not move away from that of the initial
    probe: with a wrong unit of the positions, sweeps otherwise fit the mean pattern.

    Memory: the amplitudes of the used patterns as float32, 4 N² bytes per pattern (three times that while they are
    read), and an object of 8 bytes per pixel that covers them; `fraction` limits both.
    """
    bounded = (
        ("fraction", fraction, 1.0),
        ("held_out", held_out, 0.9),
        ("step_object", step_object, 1.0),
        ("step_probe", step_probe, 1.0),
    )
    for name, value, highest in bounded:
        if not 0 < value <= highest:
            raise PtychodaskError(f"refine_probe: {name} is {value}, expected more than 0 and at most {highest:g}")
    if n_sweeps < 3:
        raise PtychodaskError(f"refine_probe: n_sweeps is {n_sweeps}, expected 3 or more")
    if seed < 0:
        raise PtychodaskError(f"refine_probe: seed is {seed}, expected 0 or more")
    if experiment is not None:
        experiment = experiment_number(experiment, "refine_probe")
    scan = open_scan(store)
    check_probe_is_free(scan)
    used, scored = _split(scan, fraction, held_out, exclude, experiment, seed)
    sweeps = partial(run_sweeps, seed=seed, step_object=step_object, step_probe=step_probe)
    refinement = _refined(scan, used, scored, sweeps, n_sweeps, search_defocus, progress)
    if refinement.stored:
        record = {name: value for name, value in asdict(refinement).items() if name not in ("probe", "problem")}
        replace_probe(store, refinement.probe, record | sweeps.keywords | {"fraction": fraction, "held_out": held_out})
    logger.info(
        "%s: R of %d held-out patterns %.4f before and %.4f after; the store %s",
        store,
        refinement.n_held_out,
        refinement.r_before,
        refinement.r_after,
        "now has the refined probe" if refinement.stored else f"keeps its probe: {refinement.problem}",
    )
    return refinement


def _refined(
    scan: Scan,
    used: NDArray[np.int64],
    scored: NDArray[np.int64],
    sweeps: Callable[..., tuple[NDArray[np.complex64], NDArray[np.complex64]]],
    n_sweeps: int,
    search_defocus: bool,
    progress: bool | None,
) -> ProbeRefinement:
    """Refine the initial probe on some patterns, score it on others."""
    initial = scan.probe if scan.probe_initial is None else scan.probe_initial
    starts = defocus_starts(initial) if search_defocus else ()
    n_visits = n_sweeps + (2 + len(starts)) * SCORING_SWEEPS
    with progress_bar("refine probe", n_visits * len(used), "patterns", progress) as bar:
        measured = measure(scan, used)

        def scores(probe: NDArray[np.complex64], *, update_probe: bool) -> tuple[float, float, float]:
            object_, probe = sweeps(measured, probe, n_sweeps=SCORING_SWEEPS, update_probe=update_probe, bar=bar)
            tested = replace(scan, probe=probe)
            uniform = np.full_like(object_, np.abs(object_[np.abs(object_) > 0]).mean())
            return (
                r_factor(object_, measured.corner_yx_px, tested, scored),
                r_factor(object_, measured.corner_yx_px, tested, used),
                r_factor(uniform, measured.corner_yx_px, tested, scored),
            )

        tried = {rad: scores(defocused(initial, rad), update_probe=True)[0] for rad in starts}
        defocus_rad = min(tried, key=tried.__getitem__) if tried else 0.0
        start = defocused(initial, defocus_rad) if tried else initial
        _, refined = sweeps(measured, start, n_sweeps=n_sweeps, update_probe=True, bar=bar)
        before, after = scores(scan.probe, update_probe=False), scores(refined, update_probe=False)
    problem = _problem(before, after, _common_light(start, refined))
    return ProbeRefinement(
        probe=refined,
        r_before=before[0],
        r_after=after[0],
        stored=problem is None,
        n_sweeps=n_sweeps,
        n_patterns=len(used),
        n_held_out=len(scored),
        defocus_rad=defocus_rad,
        r_uniform=after[2],
        problem=problem,
    )


def _problem(before: tuple[float, float, float], after: tuple[float, float, float], common_light: float) -> str | None:
    """Why a refined probe is not better than the stored one; None if it is.

    Parameters
    ----------
    before, after : tuple of float
        R of both probes on the held-out patterns, on the others, and on the held-out ones with a uniform object.
    common_light : float
        Overlap of the illuminations of the start and the refined probe.
    """
    if not after[0] < before[0]:
        return f"R of the held-out patterns is {after[0]:.4f}, not below {before[0]:.4f}"
    if not after[1] < before[1]:
        return f"R of the patterns that the object is fitted to is {after[1]:.4f}, not below {before[1]:.4f}"
    if not after[0] < (1 - LEAST_GAIN) * after[2]:
        return (
            f"the fitted object predicts the held-out patterns no better (R {after[0]:.4f}) than a uniform one "
            f"({after[2]:.4f}), so positions, their unit or the pixel size are likely wrong"
        )
    if not common_light >= LEAST_COMMON_LIGHT:
        return (
            f"it moved too far: {100 * common_light:.0f} % of its light is where that of the initial probe is, "
            f"expected {100 * LEAST_COMMON_LIGHT:.0f} % or more; pass a better initial probe, or search_defocus=True"
        )
    return None


def _common_light(one: NDArray[np.complexfloating[Any, Any]], other: NDArray[np.complexfloating[Any, Any]]) -> float:
    """Overlap Σ √(I₀ I₁) of two illuminations, each of sum 1: 1 if equal."""
    first, second = ((np.abs(probe) ** 2).sum(axis=0, dtype=np.float64) for probe in (one, other))
    total = first.sum() * second.sum()
    return float(np.sqrt(first * second).sum() / np.sqrt(total)) if np.isfinite(total) and total > 0 else 0.0


def _split(
    scan: Scan,
    fraction: float,
    held_out: float,
    exclude: Sequence[int] | NDArray[np.integer[Any]],
    experiment: int | None,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Patterns to refine on, and patterns to score on, both ascending."""
    if experiment is None:
        experiment = _largest_experiment(scan, exclude)
    index = chosen_patterns(scan, experiment, exclude)
    index = index[around_middle(scan.position_yx_px[index])]
    kept = index[: int(np.ceil(fraction * len(index)))]
    n_scored = max(1, round(held_out * len(kept)))
    if len(kept) - n_scored < PROBE_BATCH:
        raise PtychodaskError(
            f"{scan.store or 'scan'}: {len(kept)} patterns are used and {n_scored} of them held out, which leaves "
            f"fewer than {PROBE_BATCH} to refine the probe on; pass a larger fraction= or a smaller held_out="
        )
    shuffled = np.random.default_rng(seed).permutation(kept)
    return np.sort(shuffled[n_scored:]), np.sort(shuffled[:n_scored])


def _largest_experiment(scan: Scan, exclude: Sequence[int] | NDArray[np.integer[Any]]) -> int | None:
    """Number of the experiment with most patterns; None if unnumbered."""
    check_drop(scan.store or "scan", scan.n_patterns, exclude)
    if scan.scan_index is None:
        return None
    kept = np.delete(scan.scan_index, np.asarray(exclude, np.int64))
    numbers, sizes = np.unique(kept, return_counts=True)
    if len(numbers) > 1:
        logger.info(
            "%s: %d experiments; using the patterns of experiment %d, the largest (experiment= takes another)",
            scan.store,
            len(numbers),
            numbers[sizes.argmax()],
        )
    return int(numbers[sizes.argmax()])


def around_middle(
    position_yx_px: NDArray[np.float64], scan_index: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Patterns of the largest experiment, those nearest to its middle first.

    Parameters
    ----------
    position_yx_px : float64 array (pattern, 2)
    scan_index : int64 array (pattern,), optional
        Experiment of each pattern; one by default.

    Returns
    -------
    int64 array (k,)
        Indices of its patterns, by distance from the mean of its positions.

    Examples
    --------
    >>> around_middle(np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 5.0], [0.0, 9.0]]), np.array([0, 0, 0, 1])).tolist()
    [1, 0, 2]
    """
    index = np.arange(len(position_yx_px))
    if scan_index is not None:
        experiments, sizes = np.unique(scan_index, return_counts=True)
        index = np.flatnonzero(scan_index == experiments[sizes.argmax()])
    position = position_yx_px[index]
    return index[np.argsort(np.hypot(*(position - position.mean(axis=0)).T), kind="stable")]


def iterate_with_probe(
    store: str | Path,
    n_sweeps: int,
    exclude: Sequence[int] | NDArray[np.integer[Any]],
    experiment: int | None,
    seed: int,
    progress: bool | None,
) -> xr.Dataset:
    """Object of a scan by sweeps that refine the probe as well.

    The scan is in memory completely; the sweeps run on one core.

    Parameters
    ----------
    store : path
    n_sweeps : int
        Visits of each pattern, 3 or more.
    exclude : int array (k,)
        Patterns of the store that are left out.
    experiment : int or None
        Experiment to reconstruct; None for the only one.
    seed : int
        Seed of the order of the patterns.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    xarray.Dataset
        See `reconstruct_iterative`.

    Notes
    -----
    See `run_sweeps` for the method and `measure` for the memory.
    """
    scan = open_scan(store)
    used = chosen_patterns(scan, experiment, exclude)
    measured = measure(scan, used)
    with progress_bar("iterate", n_sweeps * len(used), "patterns", progress) as bar:
        object_, probe = run_sweeps(measured, scan.probe, n_sweeps=n_sweeps, update_probe=True, seed=seed, bar=bar)
    weight, count = _illumination_and_count(measured, probe)
    r = r_factor(object_, measured.corner_yx_px, replace(scan, probe=probe), used)
    logger.info("%s: R %.4f after %d sweeps of %d patterns", store, r, n_sweeps, len(used))
    return make_dataset(
        np.where(count > 0, object_, np.complex64(complex(np.nan, np.nan))),
        weight,
        np.full(measured.shape, np.nan, np.float32),
        count,
        (int(measured.corner_yx_px[0]), int(measured.corner_yx_px[1])),
        pixel_size_m=scan.pixel_size_m,
        attributes={
            "store": scan.store,
            "data_hash": scan.data_hash,
            "spec": {
                "engine": "iterative",
                "n_sweeps": n_sweeps,
                "refine_probe": True,
                "n_excluded": len(np.unique(exclude)),
                "seed": seed,
                **({} if experiment is None else {"experiment": experiment}),
            },
            "r_factor": r,
        },
    )


def _illumination_and_count(
    measured: Measured, probe: NDArray[np.complex64]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Relative illumination of each object pixel, and number of patterns."""
    n_pixels = probe.shape[-1]
    weight = np.zeros(measured.shape, np.float32)
    count = np.zeros(measured.shape, np.int32)
    for (row, column), fraction in zip(measured.row_yx, measured.fraction_yx_px, strict=True):
        footprint = slice(row, row + n_pixels), slice(column, column + n_pixels)
        relative = illumination(shift_probe(probe, fraction))
        weight[footprint] += relative
        count[footprint] += relative > 0
    return weight, count


@dataclass(frozen=True, eq=False)
class Measured:
    """Patterns in memory, prepared for the sweeps."""

    amplitude: NDArray[np.float32]
    """Amplitude at mean flux (pattern, N, N), DC at [0, 0], bad pixels 0."""

    good: NDArray[np.bool_] | None
    """True where a detector pixel is good (N, N), DC at [0, 0]; None when all are."""

    row_yx: NDArray[np.int64]
    """First row and column of the object in each footprint (pattern, 2)."""

    fraction_yx_px: NDArray[np.float64]
    """Sub-pixel remainder of each position, 0 ≤ fraction < 1 (pattern, 2)."""

    shape: tuple[int, int]
    """Pixels (y, x) of the object."""

    corner_yx_px: tuple[float, float]
    """Scan coordinates of the object's pixel [0, 0], integers as float."""


def measure(scan: Scan, index: NDArray[np.int64]) -> Measured:
    """Read patterns of a scan into memory and lay out their object.

    Parameters
    ----------
    scan : Scan
    index : int array (k,)
        Indices of the patterns.

    Returns
    -------
    Measured
        4 N² bytes for each pattern, up to three times that while they are read. The object covers the footprints at all
        these positions.
    """
    n_pixels = scan.n_pixels
    whole = np.floor(scan.position_yx_px[index])
    low = whole.min(axis=0) - n_pixels // 2
    shape = (whole.max(axis=0) - low).astype(int) + n_pixels // 2
    amplitude = scipy.fft.ifftshift(scan.amplitude(index), axes=(1, 2))
    if scan.flux is not None:
        amplitude /= np.sqrt(scan.flux[index])[:, None, None]
    return Measured(
        amplitude=amplitude,
        good=None if scan.mask is None else scipy.fft.ifftshift(scan.mask),
        row_yx=(whole - n_pixels // 2 - low).astype(np.int64),
        fraction_yx_px=scan.position_yx_px[index] - whole,
        shape=(int(shape[0]), int(shape[1])),
        corner_yx_px=(float(low[0]), float(low[1])),
    )


def run_sweeps(
    measured: Measured,
    probe: NDArray[np.complex64],
    *,
    n_sweeps: int,
    update_probe: bool = False,
    seed: int = 0,
    step_object: float = 1.0,
    step_probe: float = 1.0,
    bar: Progress | None = None,
) -> tuple[NDArray[np.complex64], NDArray[np.complex64]]:
    """Fit an object, and optionally the probe, to patterns in random order.

    Parameters
    ----------
    measured : Measured
        From `measure`.
    probe : complex64 array (mode, N, N)
        Calibrated probe to start from.
    n_sweeps : int
        Visits of each pattern.
    update_probe : bool
        Update the probe in all sweeps except the first, which finds an object, and the last, which fits the object to
        the final probe.
    seed : int
        Seed of the order of the patterns.
    step_object, step_probe : float
        Length of each update; 1 is the full step.
    bar : Progress, optional
        Advanced by each pattern.

    Returns
    -------
    object : complex64 array (y, x)
        1 where there was no illumination; its pixel [0, 0] is at ``measured.corner_yx_px``.
    probe : complex64 array (mode, N, N)

    Notes
    -----
    The object's update is that of ePIE (A. M. Maiden, J. M. Rodenburg, Ultramicroscopy 109 (2009) 1256), the probe is
    moved to its sub-pixel position by a Fourier shift, and incoherent modes share the modulus constraint (P. Thibault,
    A. Menzel, Nature 494 (2013) 68). The probe's update is the least-squares mean of the estimates from `PROBE_BATCH`
    patterns with the denominator of rPIE (A. Maiden, D. Johnson, P. Li, Optica 4 (2017) 736), which leaves a correct
    probe unchanged. Bad pixels keep the model's value.

    Quantities the data cannot determine: before the last sweep the total Σ|P|² and the centroid of |P|² are restored to
    those of the given probe (the object is scaled and shifted accordingly). The phase ramp shared by probe and object
    stays as sweeps from a flat object leave it: the object has no overall ramp. The mean frequency of the given probe
    cannot fix the ramp, since it depends on the assumed centre of the detector.
    """
    object_ = np.ones(measured.shape, np.complex64)
    initial = probe
    rng = np.random.default_rng(seed)
    for sweep in range(n_sweeps):
        is_updating = update_probe and 0 < sweep < n_sweeps - 1
        order = rng.permutation(len(measured.amplitude))
        for batch in np.split(order, range(PROBE_BATCH, len(order), PROBE_BATCH)):
            update = _update_object(object_, probe, measured, batch, step_object)
            if is_updating:
                probe = probe + np.float32(step_probe) * update
            if bar is not None:
                bar.advance(len(batch))
        if update_probe and sweep == n_sweeps - 2:
            object_, probe = _restore_gauge(object_, probe, initial)
    return object_, probe


def _update_object(
    object_: NDArray[np.complex64],
    probe: NDArray[np.complex64],
    measured: Measured,
    batch: NDArray[np.int64],
    step_object: float,
) -> NDArray[np.complex64]:
    """Update the object in place; return the probe's update (mode, N, N)."""
    n_pixels = probe.shape[-1]
    spectrum = scipy.fft.fft2(probe)
    estimate = np.zeros_like(probe)
    seen = np.zeros(probe.shape[1:], np.float32)
    for j in batch:
        row, column = measured.row_yx[j]
        patch = object_[row : row + n_pixels, column : column + n_pixels]
        ramp = shift_ramp(measured.fraction_yx_px[j], n_pixels, probe.dtype)
        shifted = scipy.fft.ifft2(spectrum * ramp)
        change, _ = project_modulus(shifted * patch, measured.amplitude[j], measured.good)
        estimate += scipy.fft.fft2(np.conj(patch) * change) * np.conj(ramp)
        seen += squared_modulus(patch)
        brightest = squared_modulus(shifted).sum(axis=0).max()
        patch += np.float32(step_object / brightest) * (np.conj(shifted) * change).sum(axis=0)
    return scipy.fft.ifft2(estimate) / ((1 - PROBE_DAMPING) * seen + PROBE_DAMPING * seen.max())


def _restore_gauge(
    object_: NDArray[np.complex64], probe: NDArray[np.complex64], initial: NDArray[np.complex64]
) -> tuple[NDArray[np.complex64], NDArray[np.complex64]]:
    """Equivalent object and probe, with total and centroid of `initial`."""
    shift = probe_centroid_px(initial) - probe_centroid_px(probe)
    probe = shift_probe(probe, shift)
    object_ = scipy.fft.ifft2(scipy.ndimage.fourier_shift(scipy.fft.fft2(object_), shift)).astype(np.complex64)
    scale = np.linalg.norm(initial) / np.linalg.norm(probe)
    return object_ / scale, probe * scale
