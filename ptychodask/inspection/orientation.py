"""Check of the position axes: orientation in which overlapping patterns agree."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, with_fields
from ptychodask.forward import predicted_amplitude, r_ratio, r_sums
from ptychodask.inspection.command import Origin, PositionTurn, turned_command
from ptychodask.io.folders import is_foreign_folder
from ptychodask.io.formats import detect_format, open_for, read_source
from ptychodask.io.grid import on_grid
from ptychodask.io.ingest import ingest
from ptychodask.io.source import IngestSpec
from ptychodask.iterative import Measured, around_middle, measure, run_sweeps
from ptychodask.probes import defocus_starts, defocused
from ptychodask.progress import Progress, progress_bar
from ptychodask.scan import Scan
from ptychodask.store import open_scan

FEWEST_PATTERNS = 40
"""Smallest number of patterns for a verdict: an object can be fitted to fewer in any orientation."""

HELD_OUT = 6
"""Every `HELD_OUT`-th pattern is held out of the fit for scoring."""

MARGIN = 0.03
"""Least excess of R over the lowest, relative to it, for an orientation to be ruled out."""

STANDARD_ERRORS = 3.0
"""The same in standard errors of the difference over the held-out patterns; both must be exceeded."""

PHASELESS = 0.9
"""Twin similarity of the probe from which it cannot distinguish a scan from its point inversion."""

COARSE_STEP_DEG = 15.0
"""Step of the rotation search: a rotation is detected within about twice this angle of the right one."""

FINEST_STEP_DEG = 0.25
"""Final step of the rotation search."""


_ABOUT_A_TIE = (
    "The patterns cannot distinguish these two: rotating positions, object and probe by 180 degrees and conjugating",
    "object and probe gives the same patterns. A probe of known phase (sign of its defocus) decides; this one equals",
    "its own twin.",
)

_ABOUT_THE_PROBE = (
    "This relies on the phase of the probe (sign of its defocus): with the conjugate probe, rotated by 180 degrees,",
    "the point inversion fits the patterns equally well.",
)


@dataclass(frozen=True)
class _Effort:
    """Number of patterns and sweeps in the fit of one orientation."""

    n_patterns: int
    n_sweeps: int


_COARSE, _FINE = _Effort(64, 4), _Effort(200, 6)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One orientation of the positions, and its fit to the patterns."""

    turn: PositionTurn
    """Matrix applied to the positions."""

    r_factor: float
    """R of the held-out patterns."""

    excess: float = 0.0
    """Excess of R over the lowest, relative to the lowest."""

    standard_errors: float = 0.0
    """The same in standard errors of the mean over the held-out patterns."""

    misfit: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False)
    """R of each held-out pattern (k,)."""

    @property
    def is_apart(self) -> bool:
        """True if it is significantly worse than the best."""
        return self.excess >= MARGIN and self.standard_errors >= STANDARD_ERRORS


@dataclass(frozen=True, eq=False)
class AxesVerdict:
    """Result of `check_axes`."""

    label: str
    """The file or store."""

    candidates: tuple[Candidate, ...]
    """Orientations from the lowest R to the highest."""

    n_patterns: int
    """Patterns in the examined region."""

    probe_is_phaseless: bool
    """True if the probe cannot distinguish a scan from its point inversion."""

    command: str | None
    """`ingest` command that applies the best orientation; None if it is uncertain or nothing changes."""

    @property
    def likely(self) -> tuple[Candidate, ...]:
        """The best candidate and those not significantly worse."""
        return tuple(candidate for candidate in self.candidates if not candidate.is_apart)

    @property
    def is_certain(self) -> bool:
        """True if one candidate, or one and its inversion, beats all others."""
        best, *others = self.likely
        return not others or (len(others) == 1 and others[0].turn.inverts(best.turn))

    def __str__(self) -> str:
        return "\n".join([*self._table(), "", *self._conclusion()])

    def _table(self) -> Iterator[str]:
        yield f"{self.label}: {len(self.candidates)} orientations, fitted to {self.n_patterns} patterns of the middle"
        yield f"{'R':>8}  {'above':>7}  {'std errors':>10}  positions"
        for one in self.candidates:
            above, errors = (f"+{100 * one.excess:.0f} %", f"{one.standard_errors:.1f}") if one.excess else ("", "")
            yield f"{one.r_factor:8.4f}  {above:>7}  {errors:>10}  {one.turn.name}"

    def _conclusion(self) -> Iterator[str]:
        if not self.is_certain:
            yield f"Undecided. These fit about equally well: {'; '.join(one.turn.name for one in self.likely)}."
            yield "Causes: too little overlap, contrast or signal; or a wrong probe, pixel size or scale of positions."
            return
        best, *twin = (one.turn.name for one in self.likely)
        yield f"Best: {best}; or its point inversion, {twin[0]}." if twin else f"Best: {best}."
        worse = next((one for one in self.candidates if one.is_apart), None)
        if worse is not None:
            errors = f"{worse.standard_errors:.0f} standard errors"
            yield f"The R of the next one is {100 * worse.excess:.0f} % higher ({errors})."
        yield from _ABOUT_A_TIE if twin else _ABOUT_THE_PROBE
        if self.command:
            yield f"\n  {self.command}"

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return {
            "where": self.label,
            "n_patterns": self.n_patterns,
            "certain": self.is_certain,
            "probe_is_phaseless": self.probe_is_phaseless,
            "likely": [candidate.turn.name for candidate in self.likely],
            "command": self.command,
            "candidates": [
                {
                    "positions": candidate.turn.name,
                    "affine": candidate.turn.rows,
                    "r_factor": candidate.r_factor,
                    "excess": candidate.excess,
                    "standard_errors": candidate.standard_errors,
                }
                for candidate in self.candidates
            ],
        }


def check_axes(
    source: str | Path,
    *,
    rotation: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    format: str | None = None,
    **reader_options: Any,
) -> AxesVerdict:
    """Find the orientation of the positions: swap, flips and rotation.

    Parameters
    ----------
    source : path
        A store, or a file that `ingest` can read.
    rotation : bool
        Also search the angle between stage and detector, as needed for 4D-STEM; otherwise only the 8 orientations.
    seed : int
        Seed of the choice of the held-out patterns, and of the order of the others.
    progress : bool, optional
        See `progress_bar`.
    format, **reader_options
        As for `ingest`, for a file.

    Returns
    -------
    AxesVerdict

    Raises
    ------
    PtychodaskError
        If `ingest` would refuse the file or an option, or the scan has fewer than `FEWEST_PATTERNS` patterns.

    Notes
    -----
    For each orientation, `run_sweeps` fits an object, initially flat, and the probe to the patterns nearest to the
    middle of the scan. The score is R on every sixth pattern, held out of the fit. With wrong positions, overlapping
    patterns contradict each other, and R is higher.

    Two orientations that are point inversions of each other cannot be distinguished by patterns alone. Let f(r) be an
    exit wave: conj(f(−r)) has the same modulus in the far field. With P'(r) = conj(P(−r)) and O'(r) = conj(O(−r)), the
    product P'(r) O'(r − R) is conj(f(−r)) for f(r) = P(r) O(r + R), so positions −R belong to the twins P' and O'. The
    initial probe decides if it differs from its twin, since the sweeps keep the sign of its defocus. A probe that
    equals its twin (a disc, or one estimated from the mean pattern) cannot decide: it is then tried at several defoci
    as well, and both inversions get the lower R of the two.
    """
    scan, origin = _part_of(Path(source), format, reader_options)
    judge = _Judge(scan, seed)
    phaseless = twin_similarity(judge.probe) >= PHASELESS
    turns = _angles() if rotation else _orientations()
    starts = defocus_starts(judge.probe) if phaseless else (0.0,)
    # One sign of the defocus is enough: the other does the same for the inversion.
    probes = [defocused(judge.probe, rad) for rad in starts if rad >= 0]
    probe = judge.probe
    with progress_bar("check axes", len(turns) * len(probes), "orientations", progress) as bar:
        if phaseless or rotation:
            tried = [{turn: judge(turn, one, _COARSE, bar).r_factor for turn in turns} for one in probes]
            which = min(range(len(probes)), key=lambda k: min(tried[k].values()))
            probe = probes[which]
            if rotation:
                turns = _refined(tried[which], partial(judge, probe=probe, effort=_COARSE, bar=bar))
        judged = [judge(turn, probe, _FINE, bar) for turn in turns]
    candidates = _ranked(_as_pairs(judged) if phaseless else judged)
    verdict = AxesVerdict(str(source), candidates, judge.n_patterns(_FINE), phaseless, None)
    command = turned_command(origin, candidates[0].turn) if verdict.is_certain else None
    return replace(verdict, command=command)


def twin_similarity(probe: NDArray[np.complex64]) -> float:
    """Similarity of a probe to its conjugate mirror image, 0 to 1.

    1 means equal up to a shift.

    Parameters
    ----------
    probe : complex array (mode, N, N)

    Returns
    -------
    float
        The highest |Σ conj(P(r)) P'(r + s)| over shifts s, summed over modes and divided by Σ|P|², with
        P'(r) = conj(P(−r)).

    Examples
    --------
    >>> disc = np.zeros((1, 8, 8), complex)
    >>> disc[0, 2:5, 3:6] = 1
    >>> round(twin_similarity(disc), 6)
    1.0
    """
    # The spectrum of conj(P(-r)) is the conjugate of the spectrum of P, up to a shift, and all shifts are searched.
    overlap = np.abs(scipy.fft.ifft2(np.conj(scipy.fft.fft2(probe)) ** 2)).sum(axis=0)
    return float(overlap.max() / (np.abs(probe) ** 2).sum())


class _Judge:
    """Scores orientations on patterns from the middle of a scan."""

    def __init__(self, scan: Scan, seed: int) -> None:
        self._scan, self._seed = scan, seed
        self.probe = scan.probe
        """Initial probe of the sweeps (mode, N, N)."""

    def n_patterns(self, effort: _Effort) -> int:
        return min(effort.n_patterns, self._scan.n_patterns)

    def __call__(self, turn: PositionTurn, probe: NDArray[np.complex64], effort: _Effort, bar: Progress) -> Candidate:
        """Fit an object and a probe, and score them on held-out patterns."""
        n_patterns = self.n_patterns(effort)
        scan = replace(self._scan, position_yx_px=self._scan.position_yx_px @ turn.matrix.T)
        measured = measure(scan, np.arange(n_patterns))
        shuffled = np.random.default_rng(self._seed).permutation(n_patterns)
        held_out, fitted = np.split(shuffled, [n_patterns // HELD_OUT])
        object_, refined = run_sweeps(
            _only(measured, fitted), probe, n_sweeps=effort.n_sweeps, update_probe=True, seed=self._seed
        )
        scan = replace(scan, probe=refined)
        amplitude = scan.amplitude(held_out)
        predicted = np.stack([predicted_amplitude(object_, measured.corner_yx_px, scan, int(j)) for j in held_out])
        residual, total = r_sums(predicted - amplitude, amplitude)
        if not total.all():
            raise PtychodaskError(
                f"{scan.store}: some patterns near the middle of the scan are all zero; exclude them with drop_frames="
            )
        bar.advance(1)
        r_factor = r_ratio(float(residual.sum()), float(total.sum()), str(scan.store))
        return Candidate(turn, r_factor, misfit=residual / total)


def _only(measured: Measured, index: NDArray[np.int64]) -> Measured:
    """Subset of the patterns, with the object that covers all of them."""
    return replace(
        measured,
        amplitude=measured.amplitude[index],
        row_yx=measured.row_yx[index],
        fraction_yx_px=measured.fraction_yx_px[index],
    )


def _orientations() -> list[PositionTurn]:
    """The 8 combinations of swap and flips."""
    signs = (1.0, -1.0)
    axes = (np.eye(2), np.eye(2)[::-1])
    return [PositionTurn.of(np.diag([y, x]) @ axis) for axis in axes for y in signs for x in signs]


def _angles() -> list[PositionTurn]:
    """Rotations over 360 degrees, of the positions and of their mirror image."""
    angles = np.arange(0, 360, COARSE_STEP_DEG)
    return [PositionTurn.by(float(angle), mirrored=mirrored) for mirrored in (False, True) for angle in angles]


def _refined(r_factors: dict[PositionTurn, float], judge: Callable[[PositionTurn], Candidate]) -> list[PositionTurn]:
    """Best rotation with and without mirroring, refined, and their inversions.

    The angle is refined by steps that are halved down to `FINEST_STEP_DEG`.
    """
    best = []
    for mirrored in (False, True):
        tried = {turn: r for turn, r in r_factors.items() if turn.is_mirrored == mirrored}
        turn, step = min(tried, key=tried.__getitem__), COARSE_STEP_DEG / 2
        lowest = tried[turn]
        while step >= FINEST_STEP_DEG:
            around = [PositionTurn.by(turn.angle_deg + sign * step, mirrored=mirrored) for sign in (-1, 1)]
            scores = [judge(one).r_factor for one in around]
            if min(scores) < lowest:
                lowest, turn = min(scores), around[int(np.argmin(scores))]
            step /= 2
        best += [turn, PositionTurn.by(turn.angle_deg + 180, mirrored=mirrored)]
    return best


def _as_pairs(judged: Sequence[Candidate]) -> list[Candidate]:
    """Each orientation with the better fit of itself and its inversion.

    A probe that fits one of them has a twin of opposite defocus that fits the other.
    """
    better = [
        min((o for o in judged if o is one or o.turn.inverts(one.turn)), key=lambda o: o.r_factor) for one in judged
    ]
    return [replace(fit, turn=one.turn, r_factor=fit.r_factor) for one, fit in zip(judged, better, strict=True)]


def _ranked(judged: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Candidates by increasing R, compared with the best pattern by pattern.

    Of candidates with equal R, the one that needs the fewest flags comes first.
    """
    ordered = sorted(judged, key=lambda one: (one.r_factor, one.turn.effort))
    best = ordered[0]
    return tuple(
        replace(
            one, excess=one.r_factor / best.r_factor - 1, standard_errors=_standard_errors(one.misfit - best.misfit)
        )
        for one in ordered
    )


def _standard_errors(difference: NDArray[np.float64]) -> float:
    """Mean difference in standard errors; 0 if all are equal."""
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return float(difference.mean() / error) if error > 0 else 0.0


def _part_of(source: Path, format: str | None, reader_options: dict[str, Any]) -> tuple[Scan, Origin | None]:
    """Patterns from the middle of a scan, nearest first, and their source."""
    if source.is_dir() and not is_foreign_folder(source):
        if format is not None or reader_options:
            names = ", ".join(["format"] * (format is not None) + sorted(reader_options))
            raise PtychodaskError(
                f"{source}: is a store, whose axes are fixed; leave out {names}, or pass the file it was made from"
            )
        scan = open_scan(source)
        return _middle(scan), Origin.of(scan)
    spec = with_fields(IngestSpec(), reader_options)
    with tempfile.TemporaryDirectory(prefix="ptychodask-") as folder:
        rows, n_frames = _middle_rows(source, format, spec, Path(folder))
        # Rows that match unequal numbers of frames and positions have to be dropped as given.
        part = {} if rows is None else {"drop_frames": _all_but(rows, n_frames)}
        options = reader_options | part
        scan = ingest(source, Path(folder) / "part.zarr", format=format, progress=False, **options)
        origin = Origin.of(scan)
        assert origin is not None
        return _middle(scan), replace(origin, source=source, options=spec.given())


def _middle_rows(
    source: Path, format: str | None, spec: IngestSpec, scratch: Path
) -> tuple[NDArray[np.int64] | None, int]:
    """Rows of a scan's middle, ascending, and the number of rows.

    None in place of rows if the numbers of frames and positions differ.
    """
    with ExitStack() as stack:
        container = open_for(spec, source, scratch if spec.scratch is None else Path(spec.scratch), stack)
        name = format or detect_format(container, spec)
        scan = read_source(source, container, name, spec, scratch, stack).scan
        if len(scan.position_yx) != scan.frames.shape[0]:
            return None, int(scan.frames.shape[0])
        gridded = on_grid(scan, spec, container.label)
        scan_index = None if scan.scan_index is None else scan.scan_index[gridded.kept]
        near = nearest_to_middle(gridded.position_yx_px, scan_index, str(source))
        return np.sort(gridded.kept[near]), int(scan.frames.shape[0])


def _all_but(rows: NDArray[np.int64], n_frames: int) -> list[slice]:
    """Slices of all rows except the given ascending ones."""
    starts, stops = [0, *(rows + 1).tolist()], [*rows.tolist(), n_frames]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]


def nearest_to_middle(
    position_yx_px: NDArray[np.float64], scan_index: NDArray[np.int64] | None, label: str
) -> NDArray[np.int64]:
    """Patterns around the middle of the largest experiment, nearest first.

    Raises
    ------
    PtychodaskError
        If there are fewer than `FEWEST_PATTERNS`.
    """
    near = around_middle(position_yx_px, scan_index)
    if len(near) < FEWEST_PATTERNS:
        raise PtychodaskError(
            f"{label}: {len(near)} patterns are too few to check the axes, expected {FEWEST_PATTERNS} or more; "
            "use a larger part of the scan"
        )
    return near[: _FINE.n_patterns]


def _middle(scan: Scan) -> Scan:
    """Patterns around the middle in memory, nearest first, with the ingested probe."""
    near = nearest_to_middle(scan.position_yx_px, scan.scan_index, scan.store or "scan")
    ascending = np.sort(near)
    order = np.searchsorted(ascending, near)
    return Scan(
        diffraction=np.asarray(scan.diffraction[ascending])[order],
        position_yx_px=scan.position_yx_px[near],
        probe=scan.probe if scan.probe_initial is None else scan.probe_initial,
        domain=scan.domain,
        normalization=scan.normalization,
        mask=scan.mask,
        flux=None if scan.flux is None else scan.flux[near],
        store=scan.store,
    )
