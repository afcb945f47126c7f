"""Studies over dose, overlap, gridsize and network on simulated scans."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import threading
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.cluster.clients import active_client, in_process_client
from ptychodask.cluster.executor import AnyClient, Executor, executor_for_run
from ptychodask.errors import PtychodaskError, check_choice, with_fields
from ptychodask.judging.compare import compare, find_truth, truth_on_pixels
from ptychodask.judging.metrics import METRICS, align_gauge, well_lit
from ptychodask.judging.plotting import plot_contact_sheet, plot_study
from ptychodask.judging.refinements import refinement_text
from ptychodask.models import ModelSpec, load_model
from ptychodask.models.spec import Kind
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.probes import probe_diameter_px
from ptychodask.progress import Progress, progress_bar
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.scheduler import Scheduler, TaskGraph
from ptychodask.result import open_result
from ptychodask.simulate import make_positions, scaled_probe, simulate
from ptychodask.storage.atomic import read_json, renamed_file
from ptychodask.storage.records import differences, plain
from ptychodask.training import TrainingSpec
from ptychodask.training.train import train

logger = logging.getLogger(__name__)

SIMULATE_KEYS: dict[str, type | tuple[type, ...]] = {
    "object": str,
    "probe": str,
    "n_pixels": int,
    "n_patterns": int,
    "path": str,
}
"""Keys of the table [simulate]: arguments of `simulate` that the matrix does not set."""

COMPARE_KEYS: dict[str, type | tuple[type, ...]] = {
    "register": bool,
    "ramp": bool,
    "scale": bool,
    "peak": (int, float, str),
    "min_weight": (int, float),
}
"""Keys of the table [compare]: arguments of `compare`."""

SET_BY_MATRIX = ("model", "members", "seed")
"""Fields of `TrainingSpec` that the matrix sets."""

TRAINING_SEED = 1000
"""Added to the seed for the scan that a baseline is trained on: the same instrument, another object."""

PLAIN: dict[str, Any] = {"slow_phase": False, "polish": 0}
"""Fields of `ReconstructionSpec` for the network's own object, which a study judges unless [reconstruct] sets them."""

SPEC_FILE, RECORD_FILE = "spec.json", "record.json"
"""Files in the folder of a cell: its specification, written first, and its metrics, written last."""

DRAWN_METRICS = tuple(name for name, metric in METRICS.items() if metric.is_drawn)
"""Metrics that are plotted over the dose."""

THUMBNAIL_PIXELS = 128
"""Largest number of pixels along one side of a picture in the contact sheet."""

# Keras has state that is global in a process, and several trainings would share the cores anyway.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """Axes and options of a study: every combination of six axes."""

    dose: tuple[float, ...]
    """Photons in the probe for one pattern."""

    overlap: tuple[float, ...] | None = None
    """1 − spacing / diameter of the probe (`probe_diameter_px`), between 0 and 1; or give `step_px`."""

    step_px: tuple[float, ...] | None = None
    """Mean spacing of the positions, pixels, below the diameter of the probe; or give `overlap`."""

    gridsize: tuple[int, ...] = (2,)
    """A PINN reads gridsize² patterns at once; a baseline always one."""

    model: tuple[str, ...] = get_args(Kind)
    """Networks: pinn, baseline."""

    seed: tuple[int, ...] = (0,)
    """Seeds of object, positions, noise and training."""

    simulate: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `simulate` (`SIMULATE_KEYS`)."""

    train: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainingSpec`, except `SET_BY_MATRIX`."""

    reconstruct: dict[str, Any] = field(default_factory=dict)
    """Fields of `ReconstructionSpec`; without them objects are not refined (`PLAIN`), so that networks are judged."""

    compare: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `compare` (`COMPARE_KEYS`)."""

    def __post_init__(self) -> None:
        if (self.overlap is None) == (self.step_px is None):
            raise PtychodaskError("study: the matrix needs overlap or step_px, and not both")
        for name, kinds in (("dose", (int, float)), (self.spacing, (int, float)), ("gridsize", int), ("seed", int)):
            _check_axis(name, getattr(self, name), kinds)
        _check_axis("model", self.model, str)
        for model in self.model:
            check_choice("model", model, get_args(Kind), "study")
        _check_positive("dose", self.dose)
        _check_positive("gridsize", self.gridsize)
        _check_keys("simulate", self.simulate, SIMULATE_KEYS)
        _check_positive("n_patterns", (_simulate_arguments(self)["n_patterns"],))
        _check_keys("compare", self.compare, COMPARE_KEYS)
        allowed = [each.name for each in fields(TrainingSpec) if each.name not in SET_BY_MATRIX]
        _check_names("train", self.train, allowed)
        _check_names("reconstruct", self.reconstruct, [each.name for each in fields(ReconstructionSpec)])
        cells_of(self)

    @property
    def refinement(self) -> dict[str, Any]:
        """Fields that refine the objects of all cells, with their values."""
        refining = (*PLAIN, "refine_positions", "refine_flux")
        return {name: value for name, value in (PLAIN | self.reconstruct).items() if name in refining}

    @property
    def spacing(self) -> str:
        """Name of the axis of spacings: overlap or step_px."""
        return "overlap" if self.step_px is None else "step_px"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One scan and network: all inputs of its metrics, as plain values."""

    name: str
    """Name of its folder."""

    simulate: dict[str, Any]
    train: dict[str, Any]
    reconstruct: dict[str, Any]
    compare: dict[str, Any]


def read_study(path: str | Path) -> StudySpec:
    """Read the TOML file of a study.

    Parameters
    ----------
    path : path
        With the table ``[matrix]`` (`dose`, `overlap` or `step_px`, `gridsize`, `model`, `seed`: lists) and optionally
        ``[simulate]``, ``[train]``, ``[reconstruct]`` and ``[compare]``.

    Returns
    -------
    StudySpec

    Raises
    ------
    PtychodaskError
        If the file cannot be read, or has an unknown or wrong entry.

    Examples
    --------
    >>> import tempfile
    >>> text = '''
    ... [matrix]
    ... dose = [1e4, 1e6]
    ... overlap = [0.6, 0.8]    # 1 - spacing / diameter of the probe
    ... gridsize = [1, 2]
    ... model = ["pinn", "baseline"]
    ...
    ... [simulate]
    ... n_pixels = 64
    ... n_patterns = 1000
    ...
    ... [train]
    ... max_minutes = 5
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "study.toml"
    ...     _ = file.write_text(text)
    ...     len({cell.name for cell in cells_of(read_study(file)).values()})
    12
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            given = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PtychodaskError(f"{path}: is no TOML ({error}); correct that line") from error
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be read ({error.strerror or error}); pass a study's TOML file"
        ) from error
    tables = ("matrix", "simulate", "train", "reconstruct", "compare")
    for name, table in given.items():
        if name not in tables or not isinstance(table, dict):
            raise PtychodaskError(f"{path}: {name} is no table of a study; the tables are: {', '.join(tables)}")
    axes = [each.name for each in fields(StudySpec) if each.name not in tables]
    matrix = given.pop("matrix", {})
    _check_names("matrix", matrix, axes)
    if "dose" not in matrix:
        raise PtychodaskError(f"{path}: [matrix] has no dose, expected a list of photons in a pattern")
    for name, values in matrix.items():
        if not isinstance(values, list):
            raise PtychodaskError(f"{path}: [matrix] {name} is {values!r}, expected a list")
    fields_given: dict[str, Any] = {name: tuple(values) for name, values in matrix.items()} | given
    return StudySpec(**fields_given)


def _check_axis(name: str, values: tuple[Any, ...], kinds: type | tuple[type, ...]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise PtychodaskError(f"study: {name} contains {value!r}, expected {_kind_name(kinds)}")
    if not values or len(set(values)) < len(values):
        raise PtychodaskError(f"study: {name} is {list(values)}, expected one or more different values")


def _check_positive(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise PtychodaskError(f"study: {name} contains {value}, expected positive numbers")


def _check_names(table: str, given: dict[str, Any], allowed: Sequence[str]) -> None:
    for name in given:
        if name not in allowed:
            raise PtychodaskError(f"study: [{table}] has no key {name}; its keys are: {', '.join(allowed)}")


def _check_keys(table: str, given: dict[str, Any], kinds: dict[str, type | tuple[type, ...]]) -> None:
    _check_names(table, given, list(kinds))
    for name, value in given.items():
        expected = kinds[name]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise PtychodaskError(f"study: [{table}] {name} is {value!r}, expected {_kind_name(expected)}")


def _kind_name(kinds: type | tuple[type, ...]) -> str:
    names = {
        str: "text",
        int: "a whole number",
        bool: "true or false",
        (int, float): "a number",
        (int, float, str): "a number or text",
    }
    return names[kinds]


def cells_of(spec: StudySpec) -> dict[tuple[Any, ...], Cell]:
    """The cells of a study.

    Parameters
    ----------
    spec : StudySpec

    Returns
    -------
    dict of (dose, spacing, gridsize, model, seed) to Cell
        Every combination of the axes. A baseline reads one pattern at a time, so its cells are the same for every
        gridsize.

    Raises
    ------
    PtychodaskError
        If a spacing is impossible for the probe or for the path of positions, or a field of training or reconstruction
        is wrong.
    """
    steps = dict(zip(getattr(spec, spec.spacing), steps_px(spec), strict=True))
    _checked("reconstruct", ReconstructionSpec, spec.reconstruct)
    given = _simulate_arguments(spec)
    for step in steps.values():
        make_positions(given["path"], given["n_patterns"], step, np.random.default_rng(0))
    cells = {}
    for dose, spacing, gridsize, model, seed in itertools.product(*_axes(spec).values()):
        size = 1 if model == "baseline" else gridsize
        train_fields = {**spec.train, "model": model, "members": size**2, "seed": seed}
        _checked("train", TrainingSpec, train_fields)
        network = {each.name: train_fields[each.name] for each in fields(ModelSpec) if each.name in train_fields}
        _checked("train", ModelSpec, network | {"kind": model, "n_pixels": given["n_pixels"]})
        cells[dose, spacing, gridsize, model, seed] = Cell(
            name=f"dose{dose:.12g}-{spec.spacing.removesuffix('_px')}{spacing:.12g}-g{size}-{model}-s{seed}",
            simulate={**spec.simulate, "dose": float(dose), "step_px": steps[spacing], "seed": seed},
            train=train_fields,
            reconstruct=PLAIN | spec.reconstruct,
            compare=dict(spec.compare),
        )
    return cells


def _axes(spec: StudySpec) -> dict[str, tuple[Any, ...]]:
    names = ("dose", spec.spacing, "gridsize", "model", "seed")
    return {name: getattr(spec, name) for name in names}


def _checked(table: str, kind: Callable[..., Any], values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except TypeError as error:
        raise PtychodaskError(f"study: [{table}] has a value of the wrong type: {error}") from error


def steps_px(spec: StudySpec) -> list[float]:
    """Mean spacing of the positions for each spacing of a study, pixels.

    Raises
    ------
    PtychodaskError
        If neighbouring probes would not overlap, or would coincide.
    """
    diameter = _diameter_px(spec)
    if spec.step_px is not None:
        for step in spec.step_px:
            if not 0 < step < diameter:
                raise PtychodaskError(
                    f"study: step_px contains {step}, expected more than 0 and less than {diameter:.4g}, the diameter "
                    "of the probe: at larger steps neighbours do not overlap"
                )
        return [float(step) for step in spec.step_px]
    assert spec.overlap is not None
    for overlap in spec.overlap:
        if not 0 < overlap < 1:
            raise PtychodaskError(
                f"study: overlap contains {overlap}, expected more than 0 and less than 1, for a spacing between 0 and "
                f"{diameter:.4g} px, the diameter of the probe"
            )
    return [(1 - overlap) * diameter for overlap in spec.overlap]


def _simulate_arguments(spec: StudySpec) -> dict[str, Any]:
    """Arguments of [simulate], completed with the defaults."""
    return {name: parameter.default for name, parameter in signature(simulate).parameters.items()} | spec.simulate


def _diameter_px(spec: StudySpec) -> float:
    given = _simulate_arguments(spec)
    return probe_diameter_px(scaled_probe(given["probe"], given["n_pixels"], 1.0))


def run_study(
    study: StudySpec | str | Path,
    out: str | Path,
    *,
    recompute: Sequence[str] = (),
    client: AnyClient | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Simulate, train, reconstruct and compare for every cell of a study.

    Parameters
    ----------
    study : StudySpec or path
        The study, or its TOML file (`read_study`).
    out : path
        Output folder: ``cells/<name>/`` with scan, network, result and ``record.json``; ``metrics.csv`` (a row for each
        cell, part and metric), ``table.md``, a figure for each of `DRAWN_METRICS`, and the objects side by side in
        ``amplitude.png`` and ``phase.png``. If all cells are finished, the same call only returns the Dataset again.
    recompute : sequence of str
        Names of cells to compute again, with the wildcards ``*`` and ``?``.
    client : distributed.Client or Executor, optional
        Client to run on, one cell for each worker at a time; by default the active client, else this thread.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    xarray.Dataset
        ``value`` (dose, overlap or step_px, gridsize, model, seed, part, metric), as `compare` returns it against
        the truth, and ``r_factor`` without part and metric. The other measure of the spacing is a further coordinate.

    Raises
    ------
    PtychodaskError
        If the study is wrong, a finished cell had other values and is not named in `recompute`, or cells fail (after
        the others are done).

    Notes
    -----
    Objects are not refined unless [reconstruct] sets ``slow_phase`` or ``polish``: refined objects of different
    networks are alike, so that their metrics do not rank the networks.

    Generated objects (``lines``, ...) depend on the size of the field, so they differ between spacings; a picture
    (``object = "picture.png"``) is the same for all.

    A cell that has its record is not computed again; an unfinished one continues from its finished steps, a training
    from its last epoch. So the same call resumes a study that was stopped, or lost a worker.

    A PINN is trained on the scan that it reconstructs, without its truth; a baseline on a second scan with the same
    probe, dose and spacing and another object. Each cell simulates its own scan, so that no two tasks write to one
    store: it is the same scan in all cells of one dose, spacing and seed. A process trains one network at a time.
    """
    spec = study if isinstance(study, StudySpec) else read_study(study)
    out = Path(out).resolve()
    cells = cells_of(spec)
    pending = _unfinished({cell.name: cell for cell in cells.values()}, out / "cells", recompute)
    logger.info("%s: %d cells, %d of them to compute", out, len({cell.name for cell in cells.values()}), len(pending))
    used = client if client is not None else active_client()
    with progress_bar("study", len(pending), "cells", progress) as bar:
        if used is None:
            _run_here(pending, out / "cells", bar)
        else:
            with executor_for_run(used) as executor:
                _run_on(executor, pending, out / "cells", bar)
    results = _gather(spec, cells, out / "cells")
    _write_all(spec, results, cells, out)
    return results


def _unfinished(cells: dict[str, Cell], folder: Path, recompute: Sequence[str]) -> list[Cell]:
    """Cells without a record; raises `PtychodaskError` if a finished one differs."""
    for pattern in recompute:
        if not any(fnmatchcase(name, pattern) for name in cells):
            raise PtychodaskError(f"study: no cell is named {pattern}; the cells are: {', '.join(cells)}")
    again = {name for name in cells if any(fnmatchcase(name, pattern) for pattern in recompute)}
    for name, cell in cells.items():
        recorded = _read_json(folder / name / SPEC_FILE)
        changed = [] if recorded is None or name in again else differences(_with_plain(recorded), plain(cell))
        if not changed:
            continue
        if (folder / name / RECORD_FILE).exists():
            raise PtychodaskError(
                f"{folder / name}: was computed with other values: {'; '.join(changed)}; "
                f"recompute it by name (--recompute '{name}', or '*' for all), or give another --out"
            )
        # An unfinished cell with other values is computed anew: nothing finished is lost.
        again.add(name)
    for name in again:
        if (folder / name / SPEC_FILE).exists():
            shutil.rmtree(folder / name)
    return [cell for name, cell in cells.items() if not (folder / name / RECORD_FILE).exists()]


def _with_plain(recorded: Any) -> Any:
    """Specification of a stored cell, with refinement off if it records none."""
    fields_given = recorded.get("reconstruct") if isinstance(recorded, dict) else None
    return {**recorded, "reconstruct": PLAIN | fields_given} if isinstance(fields_given, dict) else recorded


def _run_here(cells: list[Cell], folder: Path, bar: Progress) -> None:
    failed = {}
    for cell in cells:
        bar.note(cell.name)
        failed[cell.name] = _failure(cell, folder / cell.name)
        bar.advance()
    _check_failed(failed)


def _failure(cell: Cell, folder: Path) -> str | None:
    """Compute a cell; returns its error message, or None."""
    # Returned, not raised: an error of a cell comes again, so that no other attempt is worth its time.
    try:
        run_cell(cell, folder)
    except PtychodaskError as error:
        return str(error)
    return None


def _run_on(executor: Executor, cells: list[Cell], folder: Path, bar: Progress) -> None:
    """Run as many cells at a time as there are workers.

    Each worker trains one network at a time.
    """
    failed: dict[str, str | None] = {}

    def record(index: int, failure: str | None) -> None:
        failed[cells[index].name] = failure
        bar.note(cells[index].name)

    graph = TaskGraph(
        n_units=[1] * len(cells),
        chunk_task=lambda index: (_failure, cells[index], folder / cells[index].name),
        chunk_name=lambda index: f"the cell {cells[index].name}",
        command="study",
        remedy_ended="start again, which continues from the finished cells",
        fetch_results=True,
        chunks_per_worker=1,
        # Both would write into the folder of the cell.
        once_at_a_time=True,
        lost_chunk_result=lambda index: (
            "the workers that it ran on died; give them more memory, or choose a smaller network or scan"
        ),
    )
    Scheduler(executor, graph).complete(bar, on_chunk=record)
    _check_failed(failed)


def _check_failed(failures: dict[str, str | None]) -> None:
    failed = {name: message for name, message in failures.items() if message is not None}
    if failed:
        name, message = next(iter(failed.items()))
        raise PtychodaskError(
            f"study: {len(failed)} of {len(failures)} cells failed, the others are done; the first is {name}: {message}"
        )


def run_cell(cell: Cell, folder: Path) -> None:
    """Compute one cell into its folder, or resume it.

    Parameters
    ----------
    cell : Cell
    folder : Path
        Gets spec.json first and record.json last.
    """
    store, bundle = folder / "scan.zarr", folder / "network.model"
    training_store = folder / "lesson.zarr" if cell.train["model"] == "baseline" else store
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / SPEC_FILE, plain(cell))
    with _ONE_AT_A_TIME:
        if not store.exists():
            simulate(store, **cell.simulate, progress=False)
        if not training_store.exists():
            seed = cell.simulate["seed"] + TRAINING_SEED
            simulate(training_store, **cell.simulate | {"seed": seed}, progress=False)
        if not bundle.exists():
            train(training_store, with_fields(TrainingSpec(), cell.train), out=bundle, resume=True, progress=False)
        with in_process_client() as client:
            result = reconstruct(
                store,
                load_model(bundle),
                out=folder / "object.zarr",
                client=client,
                overwrite=True,
                progress=False,
                **cell.reconstruct,
            )
        comparison = compare({cell.name: result}, truth=store, scan=store, **cell.compare)
    record = {
        "r_factor": float(comparison["r_factor"][0]),
        "part": comparison["part"].values.tolist(),
        "metric": comparison["metric"].values.tolist(),
        "refinement": refinement_text(result.attrs),
        "value": comparison["value"][0].transpose("part", "metric").values.tolist(),
    }
    _write_json(folder / RECORD_FILE, record)


def _write_json(path: Path, values: Any) -> None:
    with renamed_file(path) as building:
        building.write_text(json.dumps(values, indent=1) + "\n")


def _read_json(path: Path) -> Any:
    """Content of a JSON file, None if there is none."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PtychodaskError(f"{path}: cannot be read ({error}); remove its folder, or give another --out") from error


def _gather(spec: StudySpec, cells: dict[tuple[Any, ...], Cell], folder: Path) -> xr.Dataset:
    """Metrics of all cells."""
    axes = _axes(spec)
    shape = [len(values) for values in axes.values()]
    records = [_read_json(folder / cell.name / RECORD_FILE) for cell in cells.values()]
    # A cell that an earlier version computed lacks the metrics that came later.
    parts, metrics = records[0]["part"], list(dict.fromkeys(name for record in records for name in record["metric"]))
    value = np.array([_values(record, metrics) for record in records]).reshape(*shape, len(parts), len(metrics))
    r_factor = np.array([record["r_factor"] for record in records]).reshape(shape)
    diameter, steps = _diameter_px(spec), np.array(steps_px(spec))
    other_spacing = {"step_px": steps} if spec.spacing == "overlap" else {"overlap": 1 - steps / diameter}
    return xr.Dataset(
        {"value": ([*axes, "part", "metric"], value), "r_factor": (list(axes), r_factor)},
        coords={
            **{name: list(values) for name, values in axes.items()},
            "part": parts,
            "metric": metrics,
            **{name: (spec.spacing, values) for name, values in other_spacing.items()},
        },
        attrs={
            "probe_diameter_px": diameter,
            "study": json.dumps(asdict(spec)),
            "refinement": json.dumps(spec.refinement),
        },
    )


def _values(record: dict[str, Any], metrics: list[str]) -> NDArray[np.float64]:
    """Values (part, metric) of a cell; NaN for metrics that it lacks."""
    values = np.full((len(record["part"]), len(metrics)), np.nan)
    values[:, [metrics.index(name) for name in record["metric"]]] = record["value"]
    return values


def to_markdown(study: xr.Dataset) -> str:
    """Markdown table of a study, one row for each cell and part.

    Baselines appear once, with gridsize 1. A line below the table names the refinement of all objects.

    Parameters
    ----------
    study : xarray.Dataset
        From `run_study`.

    Returns
    -------
    str
    """
    metrics = [str(metric) for metric in study["metric"].values]
    axes = [str(axis) for axis in study["r_factor"].dims]
    rows = [[*axes, "part", *metrics, "r_factor"]]
    for key in itertools.product(*(study[axis].values.tolist() for axis in axes)):
        dose, spacing, gridsize, model, seed = key
        if model == "baseline" and gridsize != study["gridsize"].values[0]:
            continue
        labels = [f"{dose:g}", f"{spacing:g}", "1" if model == "baseline" else str(gridsize), model, str(seed)]
        for part in study["part"].values:
            figures = [*study["value"].loc[(*key, part)].values, study["r_factor"].loc[key].values]
            rows.append([*labels, str(part), *("" if np.isnan(figure) else f"{figure:.4g}" for figure in figures)])
    rows.insert(1, [*("---" for _ in (*axes, "part")), *("---:" for _ in (*metrics, "r_factor"))])
    refinement = ", ".join(f"{name} = {value}" for name, value in json.loads(study.attrs["refinement"]).items())
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\nRefinement of all objects: {refinement}.\n"


def _write_all(spec: StudySpec, results: xr.Dataset, cells: dict[tuple[Any, ...], Cell], out: Path) -> None:
    """Write metrics, table and figures of a study."""
    results.to_dataframe().reset_index().dropna(subset="value").to_csv(out / "metrics.csv", index=False)
    (out / "table.md").write_text(to_markdown(results))
    for metric in DRAWN_METRICS:
        plot_study(results, metric, path=out / f"{metric}.png")
    pictures = _thumbnails(spec, cells, out / "cells")
    for part, picture_of in (("amplitude", np.abs), ("phase", np.angle)):
        plot_contact_sheet({key: picture_of(picture) for key, picture in pictures.items()}, path=out / f"{part}.png")


def _thumbnails(
    spec: StudySpec, cells: dict[tuple[Any, ...], Cell], folder: Path
) -> dict[tuple[str, str], NDArray[np.complexfloating[Any, Any]]]:
    """Objects of the first seed by (network, scan), with each scan's truth.

    Every k-th pixel, gauge removed.
    """
    pictures: dict[tuple[str, str], NDArray[np.complexfloating[Any, Any]]] = {}
    for (dose, spacing, gridsize, model, seed), cell in cells.items():
        row = model if model == "baseline" else f"{model}, gridsize {gridsize}"
        column = f"dose {dose:g}, {spec.spacing.replace('_', ' ')} {spacing:g}"
        if seed != spec.seed[0] or (row, column) in pictures:
            continue
        ds = open_result(folder / cell.name / "object.zarr")[["object", "weight"]]
        step = -(-max(ds.sizes.values()) // THUMBNAIL_PIXELS)
        ds = ds.isel(y=slice(None, None, step), x=slice(None, None, step)).compute()
        lit = well_lit(ds["weight"].values)
        truth = truth_on_pixels(find_truth(folder / cell.name / "scan.zarr"), ds["y"].values, ds["x"].values)
        pictures.setdefault(("truth", column), truth)
        pictures[row, column] = align_gauge(np.where(lit, ds["object"].values, np.complex64(np.nan)), truth)[0]
    return pictures
