"""The axis doctor: which way round the positions of a scan must be for neighbouring patterns to agree."""

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

from ptychodask.inspection.command import Origin, PositionTurn, turned_command
from ptychodask.io import IngestSpec, ingest
from ptychodask.io.formats import detect_format, open_container, read_source
from ptychodask.io.ingestion import on_grid
from ptychodask.iterative import (
    Measured,
    around_middle,
    defocus_starts,
    defocused,
    measure,
    predicted_amplitude,
    run_sweeps,
)
from ptychodask.progress import Progress, progress_bar
from ptychodask.scan import PtychodaskError, Scan, with_fields
from ptychodask.store import open_scan

FEWEST_PATTERNS = 40
"""Patterns below which nothing is said: a handful explains itself whichever way round."""

HELD_OUT = 6
"""One pattern of so many only judges."""

MARGIN = 0.03
"""By how much the R of all others must exceed the lowest, relative to it, for that one to be named."""

STANDARD_ERRORS = 3.0
"""And by how many standard errors of the difference over the patterns that judge."""

PHASELESS = 0.9
"""Likeness of a probe to its own conjugate mirror image from which on it cannot tell a scan from its inversion."""

COARSE_STEP_DEG = 15.0
"""Step of the search of a rotation: overlap shows within about twice this angle of the right one."""

FINEST_STEP_DEG = 0.25
"""Where that search ends."""


_ABOUT_A_TIE = (
    "Patterns cannot tell these two: positions, object and probe turned by half a turn, the latter two conjugated,",
    "make the same. A probe whose phase is known (the sign of its defocus) breaks the tie; this one is its own twin.",
)

_ABOUT_THE_PROBE = (
    "That it is not the point inversion rests on the phase of the probe, the sign of its defocus: with the probe's",
    "conjugate, turned by half a turn, the point inversion explains the patterns as well.",
)


@dataclass(frozen=True)
class _Effort:
    """How well an orientation is judged."""

    n_patterns: int
    n_sweeps: int


_COARSE, _FINE = _Effort(64, 4), _Effort(200, 6)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to turn the positions, and how well overlapping patterns then agree."""

    turn: PositionTurn
    """What the positions are multiplied with."""

    r_factor: float
    """R of the patterns that were left out of the fit."""

    excess: float = 0.0
    """How far its R is above the lowest, relative to that."""

    standard_errors: float = 0.0
    """The same in standard errors of the mean over the patterns that judge."""

    misfit: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False)
    """R of each of these patterns (k,)."""

    @property
    def is_apart(self) -> bool:
        """Whether it is worse than the best beyond doubt."""
        return self.excess >= MARGIN and self.standard_errors >= STANDARD_ERRORS


@dataclass(frozen=True, eq=False)
class AxesVerdict:
    """What `check_axes` found."""

    label: str
    """The file or store."""

    candidates: tuple[Candidate, ...]
    """From the lowest R to the highest."""

    n_patterns: int
    """Patterns of the region that was looked at."""

    probe_is_phaseless: bool
    """Whether the probe cannot tell a scan from its point inversion."""

    command: str | None
    """The `ingest` that turns the positions as the best candidate does; None where nothing is named."""

    @property
    def likely(self) -> tuple[Candidate, ...]:
        """The best candidate and those that are not worse beyond doubt."""
        return tuple(candidate for candidate in self.candidates if not candidate.is_apart)

    @property
    def is_certain(self) -> bool:
        """Whether one candidate, or one and its point inversion, is better than all others."""
        best, *others = self.likely
        return not others or (len(others) == 1 and others[0].turn.inverts(best.turn))

    def __str__(self) -> str:
        return "\n".join([*self._table(), "", *self._conclusion()])

    def _table(self) -> Iterator[str]:
        yield f"{self.label}: positions turned {len(self.candidates)} ways, {self.n_patterns} patterns of its middle"
        yield f"{'R':>8}  {'above':>7}  {'std errors':>10}  positions"
        for one in self.candidates:
            above, errors = (f"+{100 * one.excess:.0f} %", f"{one.standard_errors:.1f}") if one.excess else ("", "")
            yield f"{one.r_factor:8.4f}  {above:>7}  {errors:>10}  {one.turn.name}"

    def _conclusion(self) -> Iterator[str]:
        if not self.is_certain:
            yield f"It cannot tell. About as good: {'; '.join(one.turn.name for one in self.likely)}."
            yield "Too little overlap, contrast or light there, or a wrong probe, pixel size or scale of positions."
            return
        best, *twin = (one.turn.name for one in self.likely)
        yield f"One of two: {best}; or its point inversion, {twin[0]}." if twin else f"Right: {best}."
        worse = next((one for one in self.candidates if one.is_apart), None)
        if worse is not None:
            yield f"The next is worse by {100 * worse.excess:.0f} % ({worse.standard_errors:.0f} standard errors)."
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
    """Find which way round the positions of a scan must be: swapped or flipped, and by what angle.

    Parameters
    ----------
    source : path
        A store, or a file that `ingest` takes.
    rotation : bool
        Search the angle between stage and detector too, as 4D-STEM needs it; else the 8 orientations alone.
    seed : int
        Seed of the choice of the patterns that judge, and of the order of the others.
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
        If the file or an option is not as `ingest` needs it, or the scan has fewer than `FEWEST_PATTERNS` patterns.

    Notes
    -----
    Each orientation gets an object and a probe of its own, by `run_sweeps` from a flat object over the patterns nearest
    to the middle of the scan, and is judged by R on every sixth pattern, which was left out. Where positions are wrong,
    what one pattern says of the object contradicts what its neighbours say.

    Two orientations that are point inversions of each other cannot be told apart by patterns alone. Let f(r) be an exit
    wave: that of conj(f(−r)) has the same modulus in the far field. With P'(r) = conj(P(−r)) and O'(r) = conj(O(−r)),
    the product P'(r) O'(r − R) is conj(f(−r)) for f(r) = P(r) O(r + R), so that positions −R go with the twins P' and
    O'. The tie is broken by the probe that the sweeps start from, as far as it differs from its twin: they keep the
    sign of its defocus. A probe that equals its twin (a disc, one estimated from the mean pattern) breaks none: then
    the probe is tried at several defoci as well, and both inversions take the lower R of the two.
    """
    scan, origin = _part_of(Path(source), format, reader_options)
    judge = _Judge(scan, seed)
    phaseless = twin_similarity(judge.probe) >= PHASELESS
    turns = _angles() if rotation else _orientations()
    starts = defocus_starts(judge.probe) if phaseless else (0.0,)
    # Out of focus one way is enough: the other way does the same for the inversion.
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
    """How alike a probe is to its own conjugate mirror image, wherever that lies: 1 is the same.

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
    # The spectrum of conj(P(-r)) is the conjugate of that of P, up to the shift that is searched anyway.
    overlap = np.abs(scipy.fft.ifft2(np.conj(scipy.fft.fft2(probe)) ** 2)).sum(axis=0)
    return float(overlap.max() / (np.abs(probe) ** 2).sum())


class _Judge:
    """Judges orientations on the patterns of the middle of a scan."""

    def __init__(self, scan: Scan, seed: int) -> None:
        self._scan, self._seed = scan, seed
        self.probe = scan.probe
        """The probe that the sweeps start from (mode, N, N)."""

    def n_patterns(self, effort: _Effort) -> int:
        return min(effort.n_patterns, self._scan.n_patterns)

    def __call__(self, turn: PositionTurn, probe: NDArray[np.complex64], effort: _Effort, bar: Progress) -> Candidate:
        """Fit an object and a probe to most patterns, and predict the others."""
        n_patterns = self.n_patterns(effort)
        scan = replace(self._scan, position_yx_px=self._scan.position_yx_px @ turn.matrix.T)
        measured = measure(scan, np.arange(n_patterns))
        shuffled = np.random.default_rng(self._seed).permutation(n_patterns)
        judging, fitted = np.split(shuffled, [n_patterns // HELD_OUT])
        object_, refined = run_sweeps(
            _only(measured, fitted), probe, n_sweeps=effort.n_sweeps, update_probe=True, seed=self._seed
        )
        scan = replace(scan, probe=refined)
        amplitude = scan.amplitude(judging)
        made = np.stack([predicted_amplitude(object_, measured.corner_yx_px, scan, int(j)) for j in judging])
        wrong = np.abs(made - amplitude).sum(axis=(1, 2), dtype=np.float64)
        light = amplitude.sum(axis=(1, 2), dtype=np.float64)
        if not light.all():
            raise PtychodaskError(
                f"{scan.store}: patterns of its middle have no light; leave them out with drop_frames="
            )
        bar.advance(1)
        return Candidate(turn, float(wrong.sum() / light.sum()), misfit=wrong / light)


def _only(measured: Measured, index: NDArray[np.int64]) -> Measured:
    """Some of the patterns, with the object that covers all."""
    return replace(
        measured,
        amplitude=measured.amplitude[index],
        row_yx=measured.row_yx[index],
        fraction_yx_px=measured.fraction_yx_px[index],
    )


def _orientations() -> list[PositionTurn]:
    """The 8 ways to swap and flip."""
    signs = (1.0, -1.0)
    axes = (np.eye(2), np.eye(2)[::-1])
    return [PositionTurn.of(np.diag([y, x]) @ axis) for axis in axes for y in signs for x in signs]


def _angles() -> list[PositionTurn]:
    """Rotations all the way round, of the positions and of their mirror image."""
    angles = np.arange(0, 360, COARSE_STEP_DEG)
    return [PositionTurn.by(float(angle), mirrored=mirrored) for mirrored in (False, True) for angle in angles]


def _refined(found: dict[PositionTurn, float], judge: Callable[[PositionTurn], Candidate]) -> list[PositionTurn]:
    """The best rotation of the positions and of their mirror image, by ever smaller steps, and their inversions."""
    best = []
    for mirrored in (False, True):
        mine = {turn: r for turn, r in found.items() if turn.is_mirrored == mirrored}
        turn, step = min(mine, key=mine.__getitem__), COARSE_STEP_DEG / 2
        lowest = mine[turn]
        while step >= FINEST_STEP_DEG:
            around = [PositionTurn.by(turn.angle_deg + sign * step, mirrored=mirrored) for sign in (-1, 1)]
            scores = [judge(one).r_factor for one in around]
            if min(scores) < lowest:
                lowest, turn = min(scores), around[int(np.argmin(scores))]
            step /= 2
        best += [turn, PositionTurn.by(turn.angle_deg + 180, mirrored=mirrored)]
    return best


def _as_pairs(judged: Sequence[Candidate]) -> list[Candidate]:
    """Each orientation with the better fit of itself and its inversion: what one probe's defocus suits, its twin's does
    for the other."""
    better = [
        min((o for o in judged if o is one or o.turn.inverts(one.turn)), key=lambda o: o.r_factor) for one in judged
    ]
    return [replace(fit, turn=one.turn, r_factor=fit.r_factor) for one, fit in zip(judged, better, strict=True)]


def _ranked(judged: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Candidates from the lowest R on, compared with it pattern by pattern; of equals the least turned comes first."""
    ordered = sorted(judged, key=lambda one: (one.r_factor, one.turn.effort))
    best = ordered[0]
    return tuple(
        replace(
            one, excess=one.r_factor / best.r_factor - 1, standard_errors=_standard_errors(one.misfit - best.misfit)
        )
        for one in ordered
    )


def _standard_errors(difference: NDArray[np.float64]) -> float:
    """Mean of differences in units of its standard error; 0 where all are the same."""
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return float(difference.mean() / error) if error > 0 else 0.0


def _part_of(source: Path, format: str | None, reader_options: dict[str, Any]) -> tuple[Scan, Origin | None]:
    """The patterns of the middle of a scan in memory, nearest first, and where it comes from."""
    if source.is_dir():
        if format is not None or reader_options:
            named = ", ".join(["format"] * (format is not None) + sorted(reader_options))
            raise PtychodaskError(f"{source}: is a store, whose axes are fixed; leave out {named}, or name its source")
        scan = open_scan(source)
        return _middle(scan), Origin.of(scan)
    spec = with_fields(IngestSpec(), reader_options)
    with tempfile.TemporaryDirectory(prefix="ptychodask-") as folder:
        rows, n_frames = _middle_rows(source, format, spec, Path(folder))
        options = reader_options | {"drop_frames": _all_but(rows, n_frames)}
        scan = ingest(source, Path(folder) / "part.zarr", format=format, progress=False, **options)
        origin = Origin.of(scan)
        assert origin is not None
        return _middle(scan), replace(origin, source=source, options=spec.given())


def _middle_rows(source: Path, format: str | None, spec: IngestSpec, scratch: Path) -> tuple[NDArray[np.int64], int]:
    """Rows of a file whose patterns lie in the middle of its scan, ascending, and how many rows it has."""
    with ExitStack() as stack:
        container = open_container(source, scratch if spec.scratch is None else Path(spec.scratch), stack)
        name = format or detect_format(container, spec)
        found = read_source(source, container, name, spec, scratch, stack).scan
        gridded = on_grid(found, spec, container.label)
        scan_index = None if found.scan_index is None else found.scan_index[gridded.kept]
        near = nearest_to_middle(gridded.position_yx_px, scan_index, str(source))
        return np.sort(gridded.kept[near]), int(found.frames.shape[0])


def _all_but(rows: NDArray[np.int64], n_frames: int) -> list[slice]:
    """What lies between ascending rows."""
    starts, stops = [0, *(rows + 1).tolist()], [*rows.tolist(), n_frames]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]


def nearest_to_middle(
    position_yx_px: NDArray[np.float64], scan_index: NDArray[np.int64] | None, label: str
) -> NDArray[np.int64]:
    """The patterns around the middle of the largest experiment, nearest first.

    Raises
    ------
    PtychodaskError
        If there are fewer than `FEWEST_PATTERNS`.
    """
    mine = around_middle(position_yx_px, scan_index)
    if len(mine) < FEWEST_PATTERNS:
        raise PtychodaskError(
            f"{label}: {len(mine)} patterns are too few to tell the axes by, expected {FEWEST_PATTERNS} or more; "
            "take a larger part of the scan"
        )
    return mine[: _FINE.n_patterns]


def _middle(scan: Scan) -> Scan:
    """The patterns around the middle of a scan, nearest first, in memory, with the probe as it was ingested."""
    near = nearest_to_middle(scan.position_yx_px, scan.scan_index, scan.store or "scan")
    on_grid = np.sort(near)
    order = np.searchsorted(on_grid, near)
    return Scan(
        diffraction=np.asarray(scan.diffraction[on_grid])[order],
        position_yx_px=scan.position_yx_px[near],
        probe=scan.probe if scan.probe_initial is None else scan.probe_initial,
        domain=scan.domain,
        normalization=scan.normalization,
        mask=scan.mask,
        flux=None if scan.flux is None else scan.flux[near],
        store=scan.store,
    )
