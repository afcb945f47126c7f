"""Refinement of one object of a run, stage by stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.cluster.executor import Executor, Future
from ptychodask.cluster.watch import Watch, wait_for
from ptychodask.prediction import PredictionJob, stage
from ptychodask.progress import Progress, progress_bar
from ptychodask.reassembly import Box
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.reconstruction.refine_tasks import (
    RECENT_BYTES,
    AmplitudeSums,
    MovedPatterns,
    ObjectLayer,
    PatternPart,
    SlowStep,
    TileChange,
    amplitude_sums,
    change_part,
    change_tile,
    equations_of_part,
    fill_tile,
    is_whole,
    judge_part,
    judge_step,
    keep,
    opened,
    step_tile,
    stitched_layer,
    stretch_tile,
    sums_of_positions,
    turn_tile,
    weigh_tile,
)
from ptychodask.reconstruction.run import Run
from ptychodask.reconstruction.scheduler import Scheduler, TaskGraph, check_done
from ptychodask.refinement.judges import Judgement, is_better, is_judge
from ptychodask.refinement.polishing import DIM_FROM_FLAT, PRIOR_PHOTONS, Misfit, StepProducts
from ptychodask.refinement.positions import PositionSums, affine_step, position_steps, source_box
from ptychodask.refinement.slow_phase import (
    NotConvergedError,
    SlowPhaseRecord,
    frames_box,
    merge,
    plan_slow_phase,
    solve,
)
from ptychodask.scan import Scan
from ptychodask.storage.location import Location

logger = logging.getLogger(__name__)

MOST_SWEEPS = 8
"""Most sweeps of ``polish="auto"`` after a network."""

MOST_FROM_FLAT = 24
"""Most sweeps of ``polish="auto"`` from a flat object."""

SWEEPS_UNJUDGED = 2
"""Sweeps of ``polish="auto"`` on scans that are too small for judges."""

PATIENCE = 3
"""Sweeps in a row without a lower misfit of the judges after which ``polish="auto"`` stops. A step may raise it for one
or two sweeps, while the slow part of the phase still improves."""

MOST_MOVES = 8
"""Most steps of positions and flux."""

SWEEPS_PER_MOVE = 2
"""Sweeps before each of them, in which the object adapts to the one before."""

LEAST_AFFINE_PX = 0.25
"""Displacement at the rim of the field below which the affine part of a step is left out: interpolating the object
costs detail, and steps of single positions reach as far."""

MARGIN_SHARE = 0.02
"""Displacement that refined positions may reach, relative to the size of the field; a quarter of a pattern is added."""

MOST_SOLVES = 3
"""Most solutions of the slow phase."""

SWEEPS_PER_SOLVE = 2
"""Sweeps after which the slow phase may be solved again."""

PART_PATTERNS = 1024
"""Most consecutive patterns of the curve in one part: a plan's chunks grow with the scan, and their boxes with them."""

FLAT = 1e-3
"""Relative standard deviation of an object below which it is flat: it has no detail that could show a slow phase, so
that one sweep comes first."""


class TileArrays:
    """Arrays of the tiles of one object, by kind and version.

    Parameters
    ----------
    executor : Executor
    folder : Location or None
        Folder of files; None: the arrays stay in the memory of the workers.
    ledger : Ledger or None
        Records finished stages, if there is a folder.
    layer : int
        Number of the object.
    """

    def __init__(self, executor: Executor, folder: Location | None, ledger: Ledger | None, layer: int) -> None:
        self._executor, self._folder, self._ledger, self._layer = executor, folder, ledger, layer
        self._lists: dict[tuple[str, int], list[Any]] = {}

    def path(self, kind: str, version: int, number: int) -> Location | None:
        """File of the array of one tile or part; None in memory."""
        return None if self._folder is None else self._folder / f"{self._layer}-{kind}-{version}-{number}.npy"

    def run(
        self,
        tasks: Sequence[tuple[Any, ...]],
        name: Callable[[int], str],
        bar: Progress | None = None,
        n_units: Sequence[int] | None = None,
        *,
        fetch: bool = False,
    ) -> list[Any]:
        """Results of tasks, in their order.

        Futures if arrays stay in memory, unless fetched.
        """
        results: dict[int, Any] = {}
        graph = TaskGraph(
            n_units=n_units or [0] * len(tasks),
            chunk_task=tasks.__getitem__,
            chunk_name=name,
            fetch_results=fetch or self._folder is not None,
            remedy_lost="give workers more memory, or fewer threads",
        )
        with progress_bar("refine", 0, "tiles", False) as silent:
            Scheduler(self._executor, graph).complete(bar or silent, on_chunk=results.__setitem__)
        return [results[number] for number in range(len(tasks))]

    def sweep(self, graph: TaskGraph, bar: Progress) -> list[Any]:
        """Results of the tiles of a graph, in their order."""
        results: dict[int, Any] = {}
        graph = replace(graph, fetch_results=self._folder is not None)
        Scheduler(self._executor, graph).complete(bar, on_tile=results.__setitem__)
        return [results[number] for number in range(len(graph.chunks_of))]

    def values(self, results: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
        """Values of a function of results, on the client."""
        if self._folder is not None:
            return [function(result) for result in results]
        futures = [self._executor.submit(function, result, priority=1) for result in results]
        return gather_results(self._executor, futures)

    def parts(self, results: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
        """Parts of results that stay where they are."""
        if self._folder is not None:
            return [function(result) for result in results]
        return [self._executor.submit(function, result, priority=1) for result in results]

    def __getitem__(self, name: tuple[str, int]) -> list[Any]:
        return self._lists[name]

    def __setitem__(self, name: tuple[str, int], results: list[Any]) -> None:
        self._lists[name] = results

    def keep_only(self, names: Sequence[tuple[str, int]]) -> None:
        """Forget all others, and remove their files."""
        for kind, version in [name for name in self._lists if name not in names]:
            self.remove(kind, version, len(self._lists.pop((kind, version))))

    def remove(self, kind: str, version: int, n_files: int) -> None:
        """Remove the files of some tiles or parts, if there are any."""
        for number in range(n_files):
            path = self.path(kind, version, number)
            if path is not None:
                path.unlink(missing_ok=True)

    def save_moved(self, version: int, moved: MovedPatterns) -> None:
        """Write refined positions and flux, if there is a folder."""
        path = self.path("moved", version, 0)
        if path is not None:
            keep(np.column_stack([moved.position_yx_px, moved.flux.astype(np.float64)]), path)

    def open_moved(self, version: int) -> MovedPatterns:
        """Refined positions and flux that were written."""
        table = np.array(opened(_known(self.path("moved", version, 0))))
        return MovedPatterns(np.arange(len(table)), table[:, :2], table[:, 2].astype(np.float32))

    def record(self, state: RefinementState) -> None:
        """Record a finished stage, from which a stopped run continues."""
        if self._ledger is not None and self._folder is not None:
            self._ledger.add("stage", self._layer, asdict(state))

    def recorded(self, n_tiles: int) -> RefinementState | None:
        """State of a stopped run, if all of its files are whole."""
        stage = None if self._ledger is None or self._folder is None else self._ledger.stages.get(self._layer)
        if stage is None:
            return None
        names = {each.name for each in fields(RefinementState)}
        state = RefinementState(**{name: value for name, value in stage.items() if name in names})
        files = [self.path(kind, version, number) for kind, version in state.arrays() for number in range(n_tiles)]
        if state.moved is not None:
            files.append(self.path("moved", state.moved, 0))
        if not all(self.run([(is_whole, path) for path in files], lambda _: "checking a tile", fetch=True)):
            logger.warning("files of the refinement are damaged: refining again")
            return None
        for kind, version in state.arrays():
            self[kind, version] = [self._stored(kind, version, number) for number in range(n_tiles)]
        return state

    def _stored(self, kind: str, version: int, number: int) -> Any:
        path = self.path(kind, version, number)
        return TileChange(path, StepProducts(), 0.0, {}) if kind == "change" and path is not None else path


@dataclass
class RefinementState:
    """State of a refinement between two stages; plain values, for the ledger."""

    from_flat: bool = False
    """True if the stitched object is flat."""

    newest: int = 0
    """Newest version of an object; each stage makes another."""

    object: int = 0
    """Version of the object."""

    anchor: int | None = None
    """Version that sweeps are held near; None before the first."""

    weights: int | None = None
    """Version of the weights of sweeps."""

    before: int | None = None
    """Version before the latest sweep; None for the first one, and after a slow phase."""

    best: int = 0
    """Version with the lowest misfit of the judges."""

    best_misfit: float | None = None

    best_sweeps: int = 0
    """Sweeps that made it."""

    n_sweeps: int = 0

    n_since_best: int = 0
    """Sweeps since the lowest misfit."""

    initial: float = 0.0
    """Objective at the start of the sweeps."""

    moved: int | None = None
    """Version of the refined positions and flux; None for the stored ones."""

    n_moves: int = 0
    """Steps of positions and flux."""

    sweeps_at_move: int = 0
    """Sweeps before the latest of them."""

    n_solves: int = 0
    """Slow phases that were solved for."""

    sweeps_at_solve: int = 0
    """Sweeps before the latest of them."""

    misfit_at_solve: float | None = None
    """Misfit of the judges after it."""

    gain_of_solve: float = 0.0
    """Fall of their misfit by it."""

    slow_phase: dict[str, Any] | None = None
    """Record of the first that was kept, or of the first."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    """Judges' misfit before refinement and after each stage."""

    is_done: bool = False

    def arrays(self) -> list[tuple[str, int]]:
        """Kinds and versions of the arrays that the next stage needs."""
        needed = [("object", self.object), ("object", self.best)]
        if self.anchor is not None and self.weights is not None:
            needed += [("object", self.anchor), ("weights", self.weights)]
        if self.before is not None:
            needed += [("object", self.before), ("change", self.before)]
        return list(dict.fromkeys(needed))


class Refinement:
    """Refinement of one object, stage by stage.

    Parameters
    ----------
    run, executor, layer, stitched, tiles
        See `refine_layer`.
    job : PredictionJob
        Of tasks that need the scan.
    scan : Scan
        The complete scan.
    index : int64 array (k,)
        Patterns that take part or judge, in the order of the curve.
    """

    def __init__(
        self,
        run: Run,
        executor: Executor,
        layer: ObjectLayer,
        stitched: Sequence[Any],
        job: PredictionJob,
        scan: Scan,
        index: NDArray[np.int64],
        tiles: TileArrays,
    ) -> None:
        self._run, self._executor, self._layer, self._stitched = run, executor, layer, stitched
        self._job, self._scan, self._tiles = job, scan, tiles
        around = frames_box(scan, index)
        self._margin_px = 0.0
        if run.spec.refine_positions:
            self._margin_px = float(np.ceil(scan.n_pixels / 4 + MARGIN_SHARE * max(around.shape)))
            more = int(self._margin_px) + 1
            around = Box(around.y0 - more, around.y1 + more, around.x0 - more, around.x1 + more)
        self.boxes = tuple(_extended(tile.box, run.plan.box, around) for tile in run.plan.tiles)
        """Box of each tile while it is refined: those at the edge hold all frames."""
        judges = is_judge(scan, index)
        self._index, self._free, self._judges = index, index[~judges], index[judges]
        self._moved: MovedPatterns | None = None
        self._stored = scan
        self._cut_parts()
        self._bar: Progress | None = None
        self.objects: list[Any] = []
        """The refined object over each of `boxes`, once it has run."""

    def _cut_parts(self) -> None:
        self._parts = self._cut(self._free)
        self._parts_of = [
            tuple(number for number, part in enumerate(self._parts) if tile in part.tiles and len(part.index))
            for tile in range(len(self.boxes))
        ]

    @property
    def of_patterns(self) -> dict[str, NDArray[Any]]:
        """Refined positions and flux of all stored patterns, by name."""
        moved, spec = self._moved, self._run.spec
        if moved is None:
            return {}
        flux = np.ones(self._scan.n_patterns, np.float32) if self._scan.flux is None else self._scan.flux.copy()
        flux[moved.index] = moved.flux
        refined: dict[str, NDArray[Any]] = {"position_refined_yx_px": self._scan.position_yx_px, "flux_refined": flux}
        is_asked = spec.refine_positions, spec.refine_flux
        return {name: values for (name, values), asked in zip(refined.items(), is_asked, strict=True) if asked}

    def run(self, seconds: dict[str, float], progress: bool | None) -> dict[str, Any]:
        """Refine the object; returns the record for the attribute ``refinement``."""
        spec, n_patterns = self._run.spec, len(self._index)
        label = f"refine {self._layer.label}".strip()
        state = self._tiles.recorded(len(self.boxes)) or self._begin()
        if state.moved is not None:
            self._move_to(self._tiles.open_moved(state.moved))
        most = MOST_FROM_FLAT if state.from_flat else MOST_SWEEPS
        if spec.polish != "auto":
            most = int(spec.polish)
        elif not len(self._judges):
            most = SWEEPS_UNJUDGED
        if self._moves and spec.polish == "auto":
            most += MOST_MOVES * SWEEPS_PER_MOVE
        with progress_bar(label, (most + 1) * n_patterns, "patterns", progress) as bar:
            self._bar = bar
            bar.advance(state.n_sweeps * n_patterns)
            while not state.is_done:
                if self._solves_now(state, most):
                    with stage(seconds, "slow_phase"):
                        self._solve(state)
                elif self._moves_now(state, most):
                    with stage(seconds, "positions"):
                        self._move(state)
                elif most:
                    with stage(seconds, "polish"):
                        self._sweep(state, most)
                state.is_done = state.is_done or (not most and state.n_solves > 0)
                # Recorded first: a run that is killed in between finds all files that its record names.
                self._tiles.record(state)
                self._tiles.keep_only(state.arrays())
        self.objects = self._tiles["object", state.best]
        return self._record(state)

    def _begin(self) -> RefinementState:
        """State with the stitched object."""
        self._tiles["object", 0] = self._tiles.run(
            [
                (stitched_layer, stitched, tile, box, self._run.start_yx(tile), self._layer, path)
                for stitched, tile, box, path in zip(
                    self._stitched, self._run.plan.tiles, self.boxes, self._paths("object", 0), strict=True
                )
            ],
            lambda number: f"opening the stitched tile {tuple(self.boxes[number])}",
        )
        sums = self._amplitude_sums(self._tiles["object", 0])
        variance = sums.square / sums.n_pixels - abs(sums.value / sums.n_pixels) ** 2
        return RefinementState(from_flat=bool(variance <= FLAT**2 * sums.square / sums.n_pixels))

    def _solves_now(self, state: RefinementState, most: int) -> bool:
        """True if the next stage is a slow phase.

        It comes first, after one sweep if the object is flat. It is solved again where sweeps have since changed the
        fine detail so much that they lowered the misfit more than it did.
        """
        if not self._run.spec.slow_phase or state.n_solves >= MOST_SOLVES:
            return False
        if state.n_solves == 0:
            return state.n_sweeps > 0 or not most or not state.from_flat
        if state.n_sweeps >= most or state.n_sweeps - state.sweeps_at_solve < SWEEPS_PER_SOLVE:
            return False
        latest = state.stages[-1]["misfit"]
        if latest is None or state.misfit_at_solve is None:
            return False
        return bool(state.misfit_at_solve - latest > state.gain_of_solve)

    @property
    def _moves(self) -> bool:
        return self._run.spec.refine_positions or self._run.spec.refine_flux

    def _moves_now(self, state: RefinementState, most: int) -> bool:
        """True if the next stage is a step of positions and flux."""
        if not self._moves or state.n_moves >= MOST_MOVES or state.n_sweeps >= most:
            return False
        return state.n_sweeps - state.sweeps_at_move >= SWEEPS_PER_MOVE

    def _move(self, state: RefinementState) -> None:
        """One step of positions and flux, kept if the judges do."""
        spec, objects = self._run.spec, self._tiles["object", state.object]
        before = self._judge(objects)
        sums = self._position_sums(objects)
        index = np.sort(self._index)
        position, flux = self._scan.position_yx_px.copy(), np.ones(len(index), np.float32)
        if self._scan.flux is not None:
            flux = self._scan.flux[index]
        affine, centre = np.zeros((2, 2)), position[index].mean(axis=0)
        if spec.refine_positions:
            affine = affine_step(sums)
            reach = np.abs(position[index] - centre).max()
            if np.abs(affine).max() * reach < LEAST_AFFINE_PX:
                affine = np.zeros((2, 2))
            position = centre + (position - centre) @ (np.eye(2) + affine).T
            position[index] += position_steps(sums)
            stored = self._stored.position_yx_px
            position = np.clip(position, stored - self._margin_px, stored + self._margin_px)
        if spec.refine_flux:
            known = np.isfinite(sums.flux)
            flux[known] = sums.flux[known] / sums.flux[known].mean()
        earlier, scan = self._moved, self._scan
        self._move_to(MovedPatterns(np.arange(scan.n_patterns), position, _spread(flux, index, scan)))
        version, newest = state.object, state.newest
        if affine.any():
            state.newest += 1
            self._tiles["object", state.newest] = self._stretched(objects, affine, centre, state.newest)
            version = state.newest
        after = self._judge(self._tiles["object", version])
        state.sweeps_at_move = state.n_sweeps
        state.n_moves += 1
        kept = not len(self._judges) or is_better(before.misfit, after.misfit)
        state.stages.append(_stage("positions", after if len(self._judges) else None, kept=kept))
        if not kept:
            state.n_moves, state.newest = MOST_MOVES, newest
            self._move_to(earlier)
            return
        if affine.any() and state.anchor is not None:
            state.newest += 1
            anchor = self._tiles["object", state.anchor]
            self._tiles["object", state.newest] = self._stretched(anchor, affine, centre, state.newest)
            state.anchor = state.newest
        state.object, state.before = version, None
        # An earlier object belongs to other positions, and cannot be returned to.
        state.best, state.best_misfit, state.best_sweeps = version, after.misfit, state.n_sweeps
        state.n_since_best = 0
        state.moved = state.newest
        self._tiles.save_moved(state.moved, _known(self._moved))
        self._weigh(state)

    def _position_sums(self, objects: list[Any]) -> PositionSums:
        """Sums of all patterns, ascending."""
        tasks = [(sums_of_positions, self._job, part, self._on(part, objects)) for part in self._parts]
        n_units = [len(part.index) + len(part.judges) for part in self._parts]
        each = self._tiles.run(tasks, _named("the positions", self._parts), self._bar, n_units, fetch=True)
        rows = np.concatenate([np.sort(np.concatenate([part.index, part.judges])) for part in self._parts])
        order = np.argsort(rows)
        curvature, slope, flux = (
            np.concatenate([getattr(one, name) for one in each])[order] for name in ("curvature", "slope", "flux")
        )
        affine_curvature = np.sum([one.affine_curvature for one in each], axis=0)
        affine_slope = np.sum([one.affine_slope for one in each], axis=0)
        return PositionSums(curvature, slope, affine_curvature, affine_slope, flux)

    def _move_to(self, moved: MovedPatterns | None) -> None:
        """Continue with other positions and flux of the patterns."""
        self._moved = moved
        if moved is None:
            self._scan = self._stored
        else:
            self._scan = replace(self._scan, position_yx_px=moved.position_yx_px, flux=moved.flux)
        self._cut_parts()

    def _stretched(
        self, objects: list[Any], affine: NDArray[np.float64], centre_yx_px: NDArray[np.float64], version: int
    ) -> list[Any]:
        """Object after a stretching around a point."""
        y0, x0 = np.min([box.corner for box in self.boxes], axis=0)
        y1, x1 = np.max([(box.y1, box.x1) for box in self.boxes], axis=0)
        whole, tasks = Box(int(y0), int(y1), int(x0), int(x1)), []
        for box, path in zip(self.boxes, self._paths("object", version), strict=True):
            source = source_box(box, affine, centre_yx_px).overlap(whole)
            near = [number for number, other in enumerate(self.boxes) if other.overlap(source).n_pixels]
            pieces = [self.boxes[number] for number in near], [objects[number] for number in near]
            tasks.append((stretch_tile, box, source, *pieces, affine, centre_yx_px, path))
        return self._tiles.run(tasks, _named_boxes(self.boxes))

    def _amplitude_sums(self, objects: Sequence[Any]) -> AmplitudeSums:
        tasks = [(amplitude_sums, object_) for object_ in objects]
        each = self._tiles.run(tasks, lambda number: f"the amplitude of tile {number}", fetch=True)
        return AmplitudeSums(*(sum(values) for values in zip(*each, strict=True)))

    def _solve(self, state: RefinementState) -> None:
        """Solve for the slow phase, and keep it if the judges do."""
        scan, objects = self._scan, self._tiles["object", state.object]
        plan = plan_slow_phase(scan, self._run.plan.box, self._index)
        chosen = [part for part in self._cut(plan.chosen) if len(part.index)]
        tasks = [(equations_of_part, self._job, plan.nodes, part, self._on(part, objects)) for part in chosen]
        name = _named("the slow phase of the patterns", chosen)
        equations = self._tiles.run(tasks, name, self._bar, _n_patterns(chosen), fetch=True)
        before = after = Judgement()
        try:
            coefficients = solve(merge(*equations), plan.nodes)
        except NotConvergedError as error:
            record = plan.rejected(str(error))
        else:
            # One copy for all tasks: with many nodes it is larger than a part's own input.
            step = self._executor.submit(SlowStep, plan.nodes, coefficients)
            judging = [part for part in self._parts if len(part.judges)]
            judging_tasks = [(judge_step, self._job, step, part, self._on(part, objects)) for part in judging]
            judged = self._tiles.run(judging_tasks, _named("judging the slow phase", judging), fetch=True)
            before = sum((one for one, _ in judged), Judgement())
            after = sum((other for _, other in judged), Judgement())
            record = plan.record(before.misfit, after.misfit)
            if record.kept:
                state.object = self._turned(state, state.object, step)
                if state.anchor is not None:
                    state.anchor = self._turned(state, state.anchor, step)
        self._note_solve(state, record, before, after)

    def _turned(self, state: RefinementState, version: int, step: Any) -> int:
        """Version of the object times exp(i slow phase)."""
        state.newest += 1
        columns = self.boxes, self._tiles["object", version], self._paths("object", state.newest)
        tasks = [(turn_tile, step, *row) for row in zip(*columns, strict=True)]
        self._tiles["object", state.newest] = self._tiles.run(tasks, _named_boxes(self.boxes))
        return state.newest

    def _note_solve(self, state: RefinementState, record: SlowPhaseRecord, before: Judgement, after: Judgement) -> None:
        judged = record.misfit_before is not None
        name = f"sweep {state.n_sweeps}" if state.n_sweeps else "stitched"
        if name not in [one["stage"] for one in state.stages]:
            state.stages.append(_stage(name, before if judged else None, kept=True))
        state.stages.append(_stage("slow_phase", after if judged else None, kept=record.kept))
        if state.slow_phase is None or (record.kept and not state.slow_phase["kept"]):
            state.slow_phase = asdict(record)
        state.n_solves += 1
        state.sweeps_at_solve = state.n_sweeps
        if judged:
            state.misfit_at_solve = after.misfit if record.kept else before.misfit
            state.gain_of_solve = before.misfit - state.misfit_at_solve
        if record.kept:
            # The sweeps start anew: the memory of the latest step is that of the object before.
            state.before = None
            if not judged or state.best_misfit is None or after.misfit < state.best_misfit:
                state.best, state.best_misfit = state.object, after.misfit if judged else None
                state.best_sweeps = state.n_sweeps

    def _sweep(self, state: RefinementState, most: int) -> None:
        """Judge the object; then, if more sweeps follow, one step of it."""
        is_last = state.n_sweeps >= most
        if is_last and not len(self._judges):
            state.stages.append(_stage(f"sweep {state.n_sweeps}", None, kept=True))
            state.is_done = True
            return
        if state.anchor is None and not is_last:
            self._prepare(state)
        changes = [] if is_last else self._changes(state)
        objects = self._tiles["object", state.object]
        judgement, misfit = (self._judge(objects), None) if is_last else self._sums(changes)
        self._note_sweep(state, judgement, misfit)
        tired = self._run.spec.polish == "auto" and len(self._judges) > 0 and state.n_since_best >= PATIENCE
        if is_last or tired:
            state.is_done = True
            return
        self._step(state, changes, misfit)

    def _prepare(self, state: RefinementState) -> None:
        """Start and weights of the sweeps that follow."""
        objects = self._tiles["object", state.object]
        sums = self._amplitude_sums(objects)
        version = state.newest = state.newest + 1
        mean = sums.amplitude / sums.n_pixels
        paths = self._paths("object", version)
        tasks = [(fill_tile, object_, mean, path) for object_, path in zip(objects, paths, strict=True)]
        self._tiles["object", version] = self._tiles.run(tasks, _named_boxes(self.boxes))
        if state.best == state.object:
            state.best = version
        state.anchor = state.object = version
        self._weigh(state)

    def _weigh(self, state: RefinementState) -> None:
        """Weights of the sweeps that follow."""
        # Only training is knowledge to hold on to; and without counts nobody knows what one photon weighs.
        prior = PRIOR_PHOTONS if self._scan.domain == "counts" and self._layer.is_learnt else 0.0
        held = prior, DIM_FROM_FLAT if state.from_flat else 1.0
        state.weights = state.newest
        tasks = [
            (
                weigh_tile,
                self._job,
                self._scan.position_yx_px[_rows([self._parts[number] for number in self._parts_of[tile]])],
                box,
                held,
                path,
            )
            for (tile, box), path in zip(enumerate(self.boxes), self._paths("weights", state.weights), strict=True)
        ]
        self._tiles["weights", state.weights] = self._tiles.run(tasks, _named_boxes(self.boxes))

    def _changes(self, state: RefinementState) -> list[Any]:
        """Change of each tile for all patterns."""
        tiles, parts = self._tiles, self._parts
        objects, anchors = tiles["object", state.object], tiles["object", _known(state.anchor)]
        weights = tiles["weights", _known(state.weights)]
        before: list[Any] = [None] * len(self.boxes)
        earlier: list[Any] = before
        if state.before is not None:
            before, earlier = tiles["object", state.before], tiles["change", state.before]
        paths = self._paths("change", state.object)

        def part_task(number: int) -> tuple[Any, ...]:
            path = tiles.path("part", state.object, number)
            return change_part, self._job, parts[number], self._on(parts[number], objects), path

        def tile_task(tile: int, changes: list[Any]) -> tuple[Any, ...]:
            now = anchors[tile], weights[tile], objects[tile], before[tile], earlier[tile]
            return change_tile, self.boxes[tile], *now, changes, self._parts_of[tile], paths[tile]

        graph = TaskGraph(
            chunks_of=self._parts_of,
            n_units=_n_patterns(parts),
            chunk_task=part_task,
            tile_task=tile_task,
            chunk_name=_named("polishing with the patterns", parts),
            tile_name=_named_boxes(self.boxes),
            every_tile=True,
        )
        changes = tiles.sweep(graph, _known(self._bar))
        tiles.remove("part", state.object, len(parts))
        return changes

    def _sums(self, changes: list[Any]) -> tuple[Judgement, _Objective]:
        """Judgement of all judges, and the sums of the objective."""
        parts: dict[int, tuple[Misfit, Judgement]] = {}
        products, proximal = StepProducts(), 0.0
        for change in self._tiles.values(changes, _without_array):
            # Each tile that a part reaches reports its sums, which count once.
            parts |= change.parts
            products, proximal = products + change.products, proximal + change.proximal
        misfit = sum((parts[number][0] for number in sorted(parts)), Misfit())
        judgement = sum((parts[number][1] for number in sorted(parts)), Judgement())
        return judgement, _Objective(misfit.square + proximal, products, misfit)

    def _judge(self, objects: list[Any]) -> Judgement:
        """Judgement of an object."""
        judging = [part for part in self._parts if len(part.judges)]
        tasks = [(judge_part, self._job, part, self._on(part, objects)) for part in judging]
        each = self._tiles.run(tasks, _named("judging with the patterns", judging), fetch=True)
        return sum(each, Judgement())

    def _note_sweep(self, state: RefinementState, judgement: Judgement, objective: _Objective | None) -> None:
        """Record an object that was judged, before its next step."""
        is_judged = len(self._judges) > 0
        name = f"sweep {state.n_sweeps}" if state.n_sweeps else "stitched"
        if state.n_solves and state.n_sweeps == state.sweeps_at_solve:
            # The slow phase was judged already: this is the same object, with a value in its unseen pixels.
            name = ""
        is_best = not is_judged or self._run.spec.polish != "auto"
        if is_judged and (state.best_misfit is None or is_better(state.best_misfit, judgement.misfit)):
            is_best, state.n_since_best = True, 0
        elif state.n_sweeps:
            state.n_since_best += 1
        if is_best:
            state.best, state.best_misfit = state.object, judgement.misfit if is_judged else None
            state.best_sweeps = state.n_sweeps
        if name:
            shown = judgement if is_judged else None
            r_factor = None if is_judged or objective is None else objective.misfit.r_factor
            state.stages.append(_stage(name, shown, kept=is_best, r_factor=r_factor))
        shown_r = state.stages[-1]["r_factor"]
        if self._bar is not None:
            r_text = "" if shown_r is None else f", R {shown_r:.4f}"
            self._bar.note(f"{state.n_sweeps} sweeps{r_text}")

    def _step(self, state: RefinementState, changes: list[Any], objective: _Objective | None) -> None:
        """One step of the object."""
        assert objective is not None
        tiles, version = self._tiles, state.object
        state.newest += 1
        if state.before is None:
            state.initial = objective.value
        # The plain step never raises the objective, so it recovers a run that has diverged.
        mix = objective.products.mix() if objective.value <= state.initial else StepProducts().mix()
        empty: list[Any] = [None] * len(self.boxes)
        before = empty if state.before is None else tiles["object", state.before]
        earlier = empty if state.before is None else tiles["change", state.before]
        columns = tiles["weights", _known(state.weights)], tiles["object", version], before, changes, earlier
        paths = self._paths("object", state.newest)
        tasks = [(step_tile, *row, mix, path) for *row, path in zip(*columns, paths, strict=True)]
        tiles["object", state.newest] = tiles.run(tasks, _named_boxes(self.boxes))
        tiles["change", version] = changes
        state.before, state.object = version, state.newest
        state.n_sweeps += 1
        if self._run.spec.polish != "auto" or not len(self._judges):
            state.best, state.best_sweeps = state.object, state.n_sweeps

    def _record(self, state: RefinementState) -> dict[str, Any]:
        """Outcome, for the attribute ``refinement``."""
        last_kept = max((number for number, one in enumerate(state.stages) if one["kept"]), default=-1)
        stages = [
            one | {"kept": one["kept"] and number <= last_kept if one["stage"] != "slow_phase" else one["kept"]}
            for number, one in enumerate(state.stages)
        ]
        is_counts = self._scan.domain == "counts"
        first, last = (stages[0], stages[last_kept]) if stages else ({}, {})
        if first.get("misfit") is not None:
            logger.info(
                "%s: misfit of %d judges %.6g after stitching and %.6g after refinement (%d sweeps)",
                self._run.plan.store,
                len(self._judges),
                first["misfit"],
                last["misfit"],
                state.best_sweeps,
            )
        return {
            "slow_phase": state.slow_phase,
            "sweeps": state.best_sweeps,
            "stages": stages,
            "n_patterns": len(self._index) - len(self._judges),
            "n_judges": len(self._judges),
            "measure": "poisson deviance" if is_counts else "squared amplitude",
        }

    def _cut(self, among: NDArray[np.int64]) -> tuple[PatternPart, ...]:
        """Parts of the curve with some patterns, and its judges."""
        size = min(self._run.plan.groups_per_chunk, PART_PATTERNS)
        return curve_parts(self._scan, self._index, size, self.boxes, among, self._judges, self._moved)

    def _on(self, part: PatternPart, objects: list[Any]) -> list[Any]:
        return [objects[tile] for tile in part.tiles]

    def _paths(self, kind: str, version: int) -> list[Location | None]:
        return [self._tiles.path(kind, version, number) for number in range(len(self.boxes))]


@dataclass(frozen=True)
class _Objective:
    """Sums over all tiles that a step needs."""

    value: float
    """Objective, Σ(√I_pred − √I)² plus the proximal term."""

    products: StepProducts
    misfit: Misfit


def _stage(name: str, judgement: Judgement | None, *, kept: bool, r_factor: float | None = None) -> dict[str, Any]:
    """Entry of ``stages``.

    Without judges the misfit is None, and `r_factor` that of all patterns.
    """
    return {
        "stage": name,
        "misfit": None if judgement is None else judgement.misfit,
        "r_factor": r_factor if judgement is None else judgement.r_factor,
        "kept": kept,
    }


def _spread(flux: NDArray[np.float32], index: NDArray[np.int64], scan: Scan) -> NDArray[np.float32]:
    """Flux of all patterns, from that of some."""
    spread = np.ones(scan.n_patterns, np.float32) if scan.flux is None else scan.flux.copy()
    spread[index] = flux
    return spread


def _known(value: Any) -> Any:
    assert value is not None
    return value


def _without_array(change: TileChange) -> TileChange:
    return change._replace(change=np.empty(0, np.complex64))


def _n_patterns(parts: Sequence[PatternPart]) -> list[int]:
    return [len(part.index) for part in parts]


def _rows(parts: Sequence[PatternPart]) -> NDArray[np.int64]:
    """Patterns of some parts, ascending."""
    return np.sort(np.concatenate([np.empty(0, np.int64), *(part.index for part in parts)]))


def _named(task: str, parts: Sequence[PatternPart]) -> Callable[[int], str]:
    return lambda number: f"{task} over {tuple(parts[number].box)}"


def _named_boxes(boxes: Sequence[Box]) -> Callable[[int], str]:
    return lambda number: f"refining the tile {tuple(boxes[number])}"


def gather_results(executor: Executor, futures: list[Future]) -> list[Any]:
    """Gather results of small tasks, raising the first error."""
    wait_for(executor, futures, Watch(executor, "reconstruct"))
    for future in futures:
        check_done(future, "refining")
    return executor.gather(futures)


def curve_parts(
    scan: Scan,
    index: NDArray[np.int64],
    size: int,
    boxes: tuple[Box, ...],
    among: NDArray[np.int64],
    judges: NDArray[np.int64],
    moved: MovedPatterns | None = None,
) -> tuple[PatternPart, ...]:
    """Parts of some patterns, cut from the curve.

    Parameters
    ----------
    scan : Scan
    index : int64 array (k,)
        Patterns in the order of the curve.
    size : int
        Consecutive patterns of the curve that a part takes its own from, so that its box is no larger than theirs.
    boxes : tuple of Box
        One per tile.
    among, judges : int64 arrays
        Patterns of `index` whose sums the parts make, and those that judge.
    moved : MovedPatterns, optional
        Refined positions and flux, of `scan` too.

    Returns
    -------
    tuple of PatternPart
        Without empty ones.
    """
    kind = np.zeros(scan.n_patterns, np.int8)
    kind[among], kind[judges] = 1, 2
    # Stages that read the same patterns find them in memory.
    reads_all = len(index) * scan.n_pixels**2 * scan.diffraction.dtype.itemsize <= RECENT_BYTES
    parts = []
    for first in range(0, len(index), size):
        read = np.sort(index[first : first + size])
        rows = read[kind[read] > 0]
        if len(rows):
            box = frames_box(scan, rows)
            tiles = tuple(number for number, tile_box in enumerate(boxes) if tile_box.overlap(box).n_pixels)
            tile_boxes = tuple(boxes[number] for number in tiles)
            read = read if reads_all else rows
            of_part = None if moved is None else moved.of(read)
            of_kind = rows[kind[rows] == 1], rows[kind[rows] == 2]
            parts.append(PatternPart(*of_kind, read, of_part, box, tiles, tile_boxes))
    return tuple(parts)


def _extended(tile: Box, whole: Box, around: Box) -> Box:
    """Box of a tile; edges shared with `whole` moved to `around`."""
    return Box(
        min(tile.y0, around.y0) if tile.y0 == whole.y0 else tile.y0,
        max(tile.y1, around.y1) if tile.y1 == whole.y1 else tile.y1,
        min(tile.x0, around.x0) if tile.x0 == whole.x0 else tile.x0,
        max(tile.x1, around.x1) if tile.x1 == whole.x1 else tile.x1,
    )
