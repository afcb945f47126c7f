"""Figures of results, comparisons, residuals, studies and patterns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, hsv_to_rgb, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.judging.compare import find_truth, truth_on_pixels
from ptychodask.judging.figure import empty_figure, saved
from ptychodask.judging.metrics import BAND_EDGES, WELL_LIT, align_gauge, frc, half_bit, well_lit
from ptychodask.judging.refinements import AddedPhase, Refinement, Shifts, added_phase, refinement_of, shifts_of
from ptychodask.scan import Scan, Truth
from ptychodask.store import open_scan

LIMIT_PERCENTILES = (1.0, 99.0)
"""Percentiles of the well-lit pixels at the ends of a colour scale."""


LARGEST_PIXELS = 2048
"""Maximum pixels along one side of a picture; larger objects are subsampled."""


ELONGATED = 2.0
"""Ratio of the sides of an object from which on panels are stacked along its short side."""


MOST_ELONGATED = 20.0
"""Largest ratio of the sides of a picture; longer objects are stretched along their short side."""


LONG_SIDE_IN = 9.0
"""Length of the picture of an elongated object, inches."""


UNSEEN_COLOUR = "lightsteelblue"
"""Colour of unseen pixels (covered by no patch)."""


CONTOURS: dict[float, Literal["dashed", "solid"]] = {WELL_LIT: "dashed", 0.5: "solid"}
"""Contour levels of the weight, relative to the median, and their line styles."""


RESIDUALS = {"r_factor": "R-factor", "poisson_deviance": "Poisson deviance"}
"""Residuals per pattern that are drawn, and their titles."""


LONGEST_LABEL = 24
"""Maximum characters of a result's label in a figure."""


WORST_NAMED = 10
"""Number of patterns with the highest residuals that a figure marks."""


WIDEST_LINEAR = 10.0
"""Ratio of highest to median residual above which the scale is logarithmic; R of a dark frame may be 100."""


PATTERN_DECADES = 1e6
"""Dynamic range of figures of patterns, brightest over darkest value."""


MOST_POSITIONS = 20_000
"""Maximum positions in a figure; more are subsampled."""


MOST_ARROWS = 2000
"""Maximum arrows of a figure of displacements; more are subsampled."""


FREQUENCY_TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Frequencies, cycles per pixel, that ring correlations have ticks at."""


FINEST_PX = 2.0
"""Finest possible resolution, a full period in pixels."""


Panel = Callable[[Axes], None]
"""Function that draws one panel of a figure."""


def plot(
    ds: xr.Dataset,
    panels: str | Sequence[str] | None = None,
    *,
    scan: Scan | str | Path | None = None,
    refinement: bool = True,
    crop: tuple[float, float, float, float] | None = None,
    show_dim: bool = False,
    cmap: str | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
    dpi: float | None = None,
) -> Figure:
    """Figure of a result: amplitude, phase, weight and uncertainty.

    If it was refined, also the phase that was added and the displacement of positions.

    Parameters
    ----------
    ds : xarray.Dataset
        From `reconstruct`, `reconstruct_iterative` or `open_result`.
    panels : str or sequence of str, optional
        Some of "amplitude", "phase", "weight" and "uncertainty"; by default all that the result has.
    scan : Scan or path, optional
        The scan that it was made from: the displacement of refined positions is drawn from its positions.
    refinement : bool
        Add panels of the refinement, if the result records any (see `plot_refinement`) and no `panels` are chosen.
    crop : (float, float, float, float), optional
        Part to show: first and last y, first and last x, in pixels of the scan's frame.
    show_dim : bool
        Show amplitude and phase also where less than a tenth of the median weight fell, which is mostly noise.
    cmap, vmin, vmax : str, float, float, optional
        Colour map and limits of a single panel.
    title : str, optional
        Title of the figure; by default the name of the scan and R of the refined object, if they are recorded.
    ax : matplotlib axes, optional
        Axes to draw a single panel into.
    path : path, optional
        File to write the figure to; the suffix sets the format (``.png``, ``.pdf``, ...).
    dpi : float, optional
        Dots per inch of the file.

    Returns
    -------
    matplotlib.figure.Figure
        Up to six panels, pictures each with a colour bar and a scale bar (in metres if the pixel size is known, else
        in pixels); +y down, +x right. Colour scales span the 1st to the 99th percentile of the well-lit pixels, which
        are those with at least a tenth of the median weight; all others, unless `show_dim`, and unseen pixels are light
        blue. A phase that spans more than π is shown with a cyclic colour map from -π to π. Panels of an object more
        than `ELONGATED` times as long as wide, or the reverse, are stacked along its short side; above `MOST_ELONGATED`
        that side is stretched by the factor in its label.

    Raises
    ------
    PtychodaskError
        If the Dataset is not a result, has no seen pixel, a panel is unknown or several are to share one colour map or
        axes, or the figure cannot be written.
    """
    shown = thinned(ds if crop is None else _cropped(ds, crop))
    pictures = _pictures_of(shown, show_dim=show_dim)
    chosen = _chosen_panels(panels, pictures)
    of_one = {"cmap": cmap, "vmin": vmin, "vmax": vmax, "ax": ax}
    if len(chosen) > 1 and (given := [name for name, value in of_one.items() if value is not None]):
        raise PtychodaskError(f"plot: {', '.join(given)} with {len(chosen)} panels; choose one, for instance 'phase'")
    extras: list[Panel] = []
    if panels is None and refinement and ax is None:
        extras = [*_added_phase_panels(shown), *_displacement_panels(shown, scan)]
    if ax is None:
        figure, axes = _result_layout(shown, len(chosen) + len(extras))
        figure.suptitle(_title_of(ds) if title is None else title)
    else:
        figure, axes = cast(Figure, ax.get_figure(root=True)), np.array([ax])
    for one, name in zip(axes, chosen, strict=False):
        picture = pictures[name]
        limits = picture.limits[0] if vmin is None else vmin, picture.limits[1] if vmax is None else vmax
        heading = picture.title if ax is None or title is None else title
        _panel(one, picture.values, heading, shown, limits, picture.colours if cmap is None else cmap)
    _draw_each(axes[len(chosen) :], extras)
    return saved(figure, path, dpi)


class _Picture(NamedTuple):
    """Picture of one variable, with its scale."""

    values: NDArray[np.floating[Any]]
    title: str
    limits: tuple[float, float]
    colours: str = "gray"


def _pictures_of(shown: xr.Dataset, *, show_dim: bool) -> dict[str, _Picture]:
    """Pictures of a result by name; uncertainty only if it is known."""
    object_, weight, uncertainty = (shown[name].values for name in ("object", "weight", "uncertainty"))
    lit = _well_lit(shown)
    drawn = np.isfinite(object_) if show_dim else lit
    amplitude, phase = np.abs(object_), np.angle(object_ * _mean_phase_factor(object_[lit]))
    pictures = {
        "amplitude": _Picture(np.where(drawn, amplitude, np.nan), "amplitude", _limits(amplitude[lit])),
        "phase": _Picture(np.where(drawn, phase, np.nan), "phase (rad)", *_phase_scale(phase[lit])),
        "weight": _Picture(np.where(np.isfinite(object_), weight, np.nan), "weight", (0, weight.max()), "viridis"),
    }
    known = uncertainty[lit & np.isfinite(uncertainty)]
    if known.size:
        pictures["uncertainty"] = _Picture(uncertainty, "uncertainty", _limits(known), "magma")
    return pictures


def _chosen_panels(panels: str | Sequence[str] | None, pictures: dict[str, _Picture]) -> list[str]:
    """Names of the panels to draw."""
    if panels is None:
        return list(pictures)
    chosen = [panels] if isinstance(panels, str) else list(panels)
    if not chosen or (unknown := [name for name in chosen if name not in pictures]):
        wrong = ", ".join(map(repr, unknown)) if chosen else repr(panels)
        raise PtychodaskError(f"plot: panels is {wrong}, expected some of: {', '.join(pictures)}")
    return chosen


def _cropped(ds: xr.Dataset, crop: tuple[float, float, float, float]) -> xr.Dataset:
    """Part of a result between coordinates."""
    try:
        y0, y1, x0, x1 = map(float, crop)
        part = ds.sel(y=slice(y0, y1), x=slice(x0, x1))
    except (TypeError, ValueError, KeyError) as error:
        raise PtychodaskError(
            f"plot: crop is {crop!r}, expected first and last y, first and last x, in pixels"
        ) from error
    if not part.sizes["y"] or not part.sizes["x"]:
        y, x = ds["y"].values, ds["x"].values
        raise PtychodaskError(
            f"plot: crop {tuple(crop)} holds no pixel; the object reaches from y {y[0]:g} to {y[-1]:g}, "
            f"x {x[0]:g} to {x[-1]:g}"
        )
    return part


def _title_of(ds: xr.Dataset) -> str:
    """Name of a result's scan, and its R if that is recorded."""
    name = Path(str(ds.attrs.get("store", ""))).name.removesuffix(".zarr")
    record = refinement_of(ds.attrs)
    kept = [stage.r_factor for stage in record.stages if stage.kept and np.isfinite(stage.r_factor)]
    of_judges = " of held-out patterns" if record.n_judges else ""
    return ", ".join([*([name] if name else []), *([f"R {kept[-1]:.4f}{of_judges}"] if kept else [])])


def _result_layout(ds: xr.Dataset, n_panels: int) -> tuple[Figure, NDArray[Any]]:
    """Figure with axes for panels of a result."""
    if _orientation(ds) == "compact":
        n_columns = n_panels if n_panels < 4 else -(-n_panels // 2)
        n_rows = -(-n_panels // n_columns)
        figure = empty_figure(5.5 * n_columns, 4.75 * n_rows)
        return figure, figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    figure = empty_figure(*_size_in(ds, 1, n_panels, (0, 0)))
    return figure, _pictures(figure, ds, 1, n_panels).ravel()


def plot_refinement(ds: xr.Dataset, *, scan: Scan | str | Path | None = None, path: str | Path | None = None) -> Figure:
    """Figure of the refinement of a result.

    The phase before and after, the phase that was added, misfit over the stages, and displacements of positions.

    Parameters
    ----------
    ds : xarray.Dataset
        A result of one method.
    scan : Scan or path, optional
        As for `plot`.
    path : path, optional
        File to write the figure to.

    Returns
    -------
    matplotlib.figure.Figure
        One panel for each of these that the result records:
        the phases of the stitched and the refined object on one scale, if the result has ``object_stitched``;
        the phase that was added, in radians and in cycles (2π): the slow phase if its nodes are recorded, else all that
        refinement changed;
        the misfit of the judges (patterns that take no part) after each stage relative to the first, a rejected stage
        as a red cross, and R of the patterns after each stage that was kept;
        the displacement of each refined position, as arrows that are enlarged to be visible.

    Raises
    ------
    PtychodaskError
        If the Dataset is not a result of one method or records no refinement, the scan is another one, or the figure
        cannot be written.
    """
    shown = thinned(ds)
    panels = refinement_panels(shown, scan)
    if not panels:
        raise PtychodaskError(
            "plot_refinement: the result records no refinement; reconstruct with slow_phase=True or polish=5"
        )
    n_columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    n_columns = {"compact": n_columns, "wide": 1, "tall": len(panels)}[_orientation(shown)]
    n_rows = -(-len(panels) // n_columns)
    width, height = _size_in(shown, 1, 1, (5.5, 4.75))
    figure = empty_figure(max(width, 4.0) * n_columns, max(height, 3.0) * n_rows)
    _draw_each(figure.subplots(n_rows, n_columns, squeeze=False).ravel(), panels)
    return saved(figure, path)


def refinement_panels(shown: xr.Dataset, scan: Scan | str | Path | None = None) -> list[Panel]:
    """Functions that draw the panels of `plot_refinement`, empty without a refinement.

    Parameters
    ----------
    shown : xarray.Dataset
        From `thinned`.
    scan : Scan or path, optional
        As for `plot`.
    """
    record = refinement_of(shown.attrs)
    panels = [*_before_and_after(shown), *_added_phase_panels(shown)]
    if np.isfinite([*record.relative_misfit, *(stage.r_factor for stage in record.stages)]).sum() > 1:
        panels.append(lambda axes: _draw_stages(axes, record))
    return [*panels, *_displacement_panels(shown, scan)]


def _draw_each(axes: NDArray[Any], panels: list[Panel]) -> None:
    """Draw panels into axes; those left stay empty."""
    for one, draw in zip(axes, panels, strict=False):
        draw(one)
    for one in axes[len(panels) :]:
        one.set_axis_off()


def _before_and_after(shown: xr.Dataset) -> list[Panel]:
    """Panels of the stitched and the refined phase on one scale."""
    if "object_stitched" not in shown:
        return []
    lit = _well_lit(shown)
    after = shown["object"].values
    middle = _mean_phase_factor(after[lit])
    before, _ = align_gauge(shown["object_stitched"].values, after, ramp=False)
    phases = {"stitched": np.angle(before * middle), "refined": np.angle(after * middle)}
    scale = _phase_scale(phases["refined"][lit])

    def panel(name: str) -> Panel:
        return lambda axes: _panel(axes, phases[name], f"{name}: phase (rad)", shown, *scale)

    return [panel(name) for name in phases]


def _added_phase_panels(shown: xr.Dataset) -> list[Panel]:
    added = added_phase(shown)
    return [] if added is None else [lambda axes: _draw_added_phase(axes, added, shown)]


def _displacement_panels(shown: xr.Dataset, scan: Scan | str | Path | None) -> list[Panel]:
    shifts = shifts_of(shown, open_scan(scan) if isinstance(scan, str | Path) else scan)
    return [] if shifts is None else [lambda axes: _draw_displacements(axes, shifts)]


def _draw_added_phase(axes: Axes, added: AddedPhase, ds: xr.Dataset) -> None:
    """Draw a phase with its colour bar in radians and in cycles."""
    low, high = _limits(added.phase[_well_lit(ds)])
    size, colours = max(-low, high), "RdBu_r"
    if not added.is_slow and high - low > np.pi:
        size, colours = np.pi, "twilight"
    image = axes.imshow(
        added.phase,
        cmap=colours,
        vmin=-size,
        vmax=size,
        origin="upper",
        extent=_extent(ds),
        aspect=_stretch(ds),
    )
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.ax.secondary_yaxis("left", functions=(partial(np.multiply, 0.5 / np.pi), partial(np.multiply, 2 * np.pi)))
    bar.ax.set_title("cycles | rad", fontsize="small")
    _frame(axes, "slow phase added" if added.is_slow else "phase added by refinement", ds)


def _draw_displacements(axes: Axes, shifts: Shifts) -> None:
    """Draw the displacement of each position as an enlarged arrow."""
    step = -(-len(shifts.position_yx_px) // MOST_ARROWS)
    (y, x), (dy, dx) = shifts.position_yx_px[::step].T, shifts.shift_yx_px[::step].T
    length = np.hypot(dy, dx)
    longest = float(np.percentile(length, LIMIT_PERCENTILES[1])) or 1.0
    span = float(max(np.ptp(y), np.ptp(x))) or 1.0
    # As long as some neighbours are apart, so that arrows are seen and do not hide each other.
    drawn = 2.5 * span / max(np.sqrt(len(y)), 4.0)
    shape: dict[str, Any] = {"width": 0.003, "headwidth": 4, "headlength": 5, "minlength": 0.5, "cmap": "viridis"}
    arrows = axes.quiver(x, y, dx, dy, length, angles="xy", scale_units="xy", scale=longest / drawn, **shape)
    arrows.set_clim(0, longest)
    key_px = nice_length(longest)
    axes.quiverkey(arrows, 0.83, 1.02, key_px, f"{key_px:g} px", labelpos="E")
    axes.set(aspect="equal", xlabel="x (px)", ylabel="y (px)")
    axes.set_title(f"displacement, rms {shifts.rms_px:.2g} px", loc="left")
    axes.margins(0.08)
    axes.invert_yaxis()
    assert axes.figure is not None
    axes.figure.colorbar(arrows, ax=axes, shrink=0.85, extend="max", label="px")


def _draw_stages(axes: Axes, record: Refinement) -> None:
    """Draw the judges' misfit after each stage, and R beside it."""
    at = np.arange(len(record.stages))
    kept = np.array([stage.kept for stage in record.stages])
    misfit, r_factor = record.relative_misfit, np.array([stage.r_factor for stage in record.stages])
    axes.set_xticks(at, [drawn_label(stage.title) for stage in record.stages], rotation=45, ha="right")
    titles = []
    if np.isfinite(misfit).any():
        titles.append("judges' misfit")
        _draw_curve(axes, misfit[kept], at[kept], "judges' misfit, relative to the first", "tab:blue", "o-")
        _draw_rejected(axes, at, misfit, kept)
    if np.isfinite(r_factor).any():
        _draw_curve(axes.twinx() if titles else axes, r_factor[kept], at[kept], "R", "tab:gray", "s--")
        titles.append("R")
    axes.set_title(f"{' and '.join(titles)} after each stage")


def _draw_curve(
    axes: Axes, values: NDArray[np.float64], at: NDArray[np.int64], label: str, colour: str, style: str
) -> None:
    axes.plot(at, values, style, color=colour, markersize=5, label=label)
    axes.set_ylabel(label, color=colour)
    axes.tick_params(axis="y", labelcolor=colour)


def _draw_rejected(axes: Axes, at: NDArray[np.int64], values: NDArray[np.float64], kept: NDArray[np.bool_]) -> None:
    """Draw rejected stages, each joined to the last one that was kept."""
    for k in np.flatnonzero(~kept & np.isfinite(values)):
        before = np.flatnonzero(kept[:k] & np.isfinite(values[:k]))
        path = [*before[-1:], k]
        axes.plot(at[path], values[path], color="tab:red", linewidth=0.8, linestyle="dotted")
    rejected = ~kept & np.isfinite(values)
    if rejected.any():
        axes.plot(at[rejected], values[rejected], "x", color="tab:red", label="rejected")
        axes.legend(handles=axes.lines[-1:], frameon=False)


def plot_complex(ds: xr.Dataset, *, path: str | Path | None = None) -> Figure:
    """Figure of a complex object: phase as hue, amplitude as brightness.

    Parameters
    ----------
    ds : xarray.Dataset
        As for `plot`.
    path : path, optional
        File to write the figure to.

    Returns
    -------
    matplotlib.figure.Figure
        The object and a colour wheel: phase as angle, amplitude from the centre to the rim (the 99th percentile of the
        well-lit pixels). The mean phase is set to zero. Contour lines are at a weight of 0.1 and 0.5 of the median.

    Raises
    ------
    PtychodaskError
        As for `plot`.
    """
    shown = thinned(ds)
    lit = _well_lit(shown)
    object_ = shown["object"].values
    full = float(np.percentile(np.abs(object_[lit]), LIMIT_PERCENTILES[1])) or 1.0
    figure, axes, wheel, legend = _wheel_layout(shown)
    colours = complex_colours(object_ * _mean_phase_factor(object_[lit]), full)
    axes.imshow(colours, origin="upper", extent=_extent(shown), aspect=_stretch(shown))
    between = "\n" if _orientation(shown) == "tall" else " "
    _frame(axes, f"phase as hue,{between}amplitude as brightness", shown)
    _draw_wheel(wheel, full)
    _add_contours(axes, shown, legend)
    return saved(figure, path)


def _wheel_layout(ds: xr.Dataset) -> tuple[Figure, Axes, Axes, Axes]:
    """Figure with axes for a picture, the colour wheel and the legend."""
    orientation = _orientation(ds)
    if orientation == "compact":
        figure = empty_figure(9, 7)
        axes = figure.subplots()
        return figure, axes, axes.inset_axes((1.08, 0.72, 0.24, 0.24)), axes
    # Beside an elongated object the wheel, which is as wide as high, has a panel of its own.
    width, height = _size_in(ds, 1, 1, (9, 7))
    wheel_in = 2.2
    if orientation == "wide":
        figure = empty_figure(width, height + wheel_in)
        axes, wheel = figure.subplots(2, 1, height_ratios=[height, wheel_in])
    else:
        figure = empty_figure(width + wheel_in + 1.0, height)
        axes, wheel = figure.subplots(1, 2, width_ratios=[width, wheel_in])
    return figure, axes, wheel, wheel


def complex_colours(object_: NDArray[np.complexfloating[Any, Any]], full: float) -> NDArray[np.float64]:
    """Colours of a complex array.

    Parameters
    ----------
    object_ : complex array (y, x)
    full : float
        Amplitude of full brightness; larger ones are clipped.

    Returns
    -------
    float64 array (y, x, 3)
        RGB from 0 to 1: hue from the phase (0 is red, 2π/3 green, -2π/3 blue), value from the amplitude.
        Unseen pixels (NaN) are light blue.

    Examples
    --------
    >>> complex_colours(np.array([[2.0, 1.0, 0.0, -1.0 + 0j]]), 2.0).tolist()
    [[[1.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.5]]]
    """
    seen = np.isfinite(object_)
    filled = np.where(seen, object_, 0)
    hue = np.angle(filled) / (2 * np.pi) % 1.0
    value = np.minimum(np.abs(filled) / full, 1.0)
    colours = hsv_to_rgb(np.stack([hue, np.ones_like(hue), value], axis=-1))
    return np.asarray(np.where(seen[..., None], colours, to_rgb(UNSEEN_COLOUR)))


def _draw_wheel(axes: Axes, full: float) -> None:
    """Draw a colour wheel: real part to the right, imaginary part up."""
    across = np.linspace(-1, 1, 201)
    disc = across + 1j * across[::-1, None]
    colours = complex_colours(disc, 1.0)
    colours[np.abs(disc) > 1] = 1.0
    axes.imshow(colours, extent=(-1, 1, -1, 1))
    for angle, label in ((0, "0"), (0.5, "π/2"), (1, "π"), (1.5, "-π/2")):
        at = 1.25 * np.exp(1j * np.pi * angle)
        axes.text(at.real, at.imag, label, ha="center", va="center")
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), title=f"phase (rad)\nrim: |O| ≥ {full:.3g}")
    axes.set_axis_off()


def plot_comparison(
    results: Mapping[str, xr.Dataset],
    truth: Truth | Scan | str | Path | None = None,
    *,
    comparison: xr.Dataset | None = None,
    ramp: bool = True,
    scale: bool = False,
    path: str | Path | None = None,
) -> Figure:
    """Figure of several results and their differences from the reference.

    Parameters
    ----------
    results : dict of label to Dataset
        In common pixel coordinates: see `compare.align`.
    truth : Truth, Scan or path, optional
        The known object, or a scan (store) that has one; drawn first. Without it the first result is the reference.
    comparison : xarray.Dataset, optional
        From `compare` of the same results: adds the ring correlations.
    ramp, scale : bool
        Remove a phase ramp and a factor of the amplitude, besides the global phase, relative to the reference.
    path : path, optional
        File to write the figure to.

    Returns
    -------
    matplotlib.figure.Figure
        One column for the truth and for each result, on the pixels of the first result: amplitude, phase, and the
        amplitude of the complex difference from the reference, with one colour scale per row. Below, with `comparison`,
        the Fourier ring correlation of amplitude and phase with the reference.

    Raises
    ------
    PtychodaskError
        If there is no result, or a result and the reference have no seen pixel in common.
    """
    if not results:
        raise PtychodaskError("plot_comparison: found no result, expected at least one")
    first = thinned(next(iter(results.values())))
    objects = _aligned_objects(results, truth, first, ramp, scale)
    judged = _well_lit(first) & np.all([np.isfinite(object_) for object_ in objects.values()], axis=0)
    if not judged.any():
        raise PtychodaskError("plot_comparison: no well-lit pixel of the first result is seen in all results")
    rows = 2 if len(objects) == 1 else 3
    width, height = _size_in(first, rows, len(objects), (4.2 * len(objects), 3.7 * rows))
    ratios = [height] if comparison is None else [height, 3.7]
    figure = empty_figure(max(width, 8.0) if comparison is not None else width, sum(ratios))
    grid = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
    axes = _pictures(figure.add_subfigure(grid[0]), first, rows, len(objects))
    _draw_objects(axes, objects, judged, first)
    if len(objects) > 1:
        _draw_differences(axes[2], objects, judged, first)
    if comparison is not None:
        panels = figure.add_subfigure(grid[1]).subplots(1, 2)
        _draw_frcs(panels, comparison, first.attrs.get("pixel_size_m"))
    return saved(figure, path)


def _aligned_objects(
    results: Mapping[str, xr.Dataset],
    truth: Truth | Scan | str | Path | None,
    first: xr.Dataset,
    ramp: bool,
    scale: bool,
) -> dict[str, NDArray[np.complex64]]:
    """Truth, if given, and results on the pixels of the first result.

    All have the gauge of the first object returned, which is the reference.
    """
    y, x = first["y"].values, first["x"].values
    objects = {label: _on_pixels(ds, y, x) for label, ds in results.items()}
    if truth is not None:
        objects = {"truth": truth_on_pixels(find_truth(truth), y, x), **objects}
    reference = next(iter(objects.values()))
    return {label: align_gauge(object_, reference, ramp=ramp, scale=scale)[0] for label, object_ in objects.items()}


def _draw_objects(
    axes: NDArray[Any], objects: Mapping[str, NDArray[np.complex64]], judged: NDArray[np.bool_], first: xr.Dataset
) -> None:
    """Draw amplitudes and phases in two rows, scaled to the first object."""
    reference = next(iter(objects.values()))
    middle = _mean_phase_factor(reference[judged])
    amplitude_limits = _limits(np.abs(reference)[judged])
    phase_scale = _phase_scale(np.angle(reference * middle)[judged])
    for column, (label, object_) in enumerate(objects.items()):
        label = drawn_label(label)
        _panel(axes[0, column], np.abs(object_), f"{label}: amplitude", first, amplitude_limits)
        _panel(axes[1, column], np.angle(object_ * middle), f"{label}: phase (rad)", first, *phase_scale)


def _draw_differences(
    axes: NDArray[Any], objects: Mapping[str, NDArray[np.complex64]], judged: NDArray[np.bool_], first: xr.Dataset
) -> None:
    """Draw differences from the first object, whose axes stay empty."""
    (name, reference), *others = objects.items()
    differences = [np.abs(object_ - reference) for _, object_ in others]
    limits = (0.0, _limits(np.concatenate([difference[judged] for difference in differences]))[1])
    axes[0].set_axis_off()
    for panel, (label, _), difference in zip(axes[1:], others, differences, strict=True):
        title = f"|{drawn_label(label)} − {drawn_label(name)}|"
        _panel(panel, difference, title, first, limits, "magma")


def _draw_frcs(axes: NDArray[Any], comparison: xr.Dataset, pixel_size_m: float | None) -> None:
    """Draw ring correlations of all results but the reference, by part."""
    frequency = comparison["frequency"].values
    methods = [method for method in comparison["method"].values if method != comparison.attrs["reference"]]
    for panel, part in zip(axes, comparison["part"].values, strict=True):
        curves = {str(method): comparison["frc"].loc[method, part].values for method in methods}
        _draw_frc(panel, frequency, curves, f"FRC of the {part}", pixel_size_m)


def _draw_frc(
    axes: Axes,
    frequency: NDArray[np.float64],
    curves: Mapping[str, NDArray[np.floating[Any]]],
    title: str,
    pixel_size_m: float | None,
) -> None:
    """Draw ring correlations over frequency, with the usual thresholds.

    The axis is logarithmic, because the slow part of a phase is in the first few rings; the middle band of `BAND_EDGES`
    is shaded. If the pixel size is known, a second axis has periods.
    """
    # The ring of zero frequency is left out, since it depends on the means.
    lowest = min((float(np.nanmin(curve[1:])) for curve in curves.values() if np.isfinite(curve).any()), default=0.0)
    for label, curve in curves.items():
        axes.plot(frequency[1:], curve[1:], ".-", markersize=3, linewidth=1.2, label=drawn_label(label))
    axes.plot(frequency[1:], half_bit(frequency)[1:], color="gray", linewidth=0.8, linestyle="dotted", label="half bit")
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle="dashed", label="1/2")
    axes.axhline(1 / 7, color="gray", linewidth=0.8, linestyle="dashdot", label="1/7")
    axes.axvspan(*BAND_EDGES, color="gray", alpha=0.2, linewidth=0)
    axes.set(
        xscale="log",
        xlim=(0.9 * frequency[1], frequency[-1]),
        ylim=(min(-0.2, 1.05 * lowest), 1.05),
        xlabel="frequency (cycles per pixel)",
        ylabel="correlation",
    )
    axes.set_title(title)
    axes.legend(loc="best", fontsize="small")
    ticks = [tick for tick in FREQUENCY_TICKS if frequency[1] <= tick <= frequency[-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    if pixel_size_m is not None:
        # Labels with units are wider than those of frequencies.
        few = ticks[::-1][::2]
        above = axes.secondary_xaxis("top")
        above.set_xticks(few, [length_label(float(f"{pixel_size_m / tick:.3g}")) for tick in few])
        above.minorticks_off()


def plot_residuals(residuals: xr.Dataset, *, path: str | Path | None = None) -> Figure:
    """Figure of the residuals of patterns, over the scan and by index.

    Parameters
    ----------
    residuals : xarray.Dataset
        From `residuals`.
    path : path, optional
        File to write the figure to.

    Returns
    -------
    matplotlib.figure.Figure
        A row for R and, if known, one for the Poisson deviance. Left: values as colours at the positions, +y down,
        without patterns that have no residual. Right: values in the order of the source file if known, else of the
        store (dots), and sorted (line). Rings mark the ten worst, listed in the title by index in the store; an
        infinite R is drawn at the upper edge.

    Raises
    ------
    PtychodaskError
        If the Dataset has no residuals, or the figure cannot be written.
    """
    if missing := [name for name in (*RESIDUALS, "y_px", "x_px") if name not in residuals.variables]:
        raise PtychodaskError(f"plot_residuals: the Dataset has no {', '.join(missing)} (pattern)")
    known = {name: title for name, title in RESIDUALS.items() if np.isfinite(residuals[name]).any()}
    if not known:
        raise PtychodaskError("plot_residuals: no pattern has a residual, so there is nothing to show")
    figure = empty_figure(12, 4.8 * len(known))
    for axes, (name, title) in zip(figure.subplots(len(known), 2, squeeze=False), known.items(), strict=True):
        values = residuals[name].values
        values = np.where(np.isposinf(values), 1.05 * values[np.isfinite(values)].max(), values)
        worst = worst_patterns(residuals, name)
        _draw_over_scan(axes[0], residuals, values, title, worst)
        _draw_by_index(axes[1], residuals, values, title, worst)
    return saved(figure, path)


def worst_patterns(residuals: xr.Dataset, name: str = "r_factor") -> list[int]:
    """Positions along ``pattern`` of the ten patterns with the highest residuals.

    The worst is first; dropped patterns are left out.

    Examples
    --------
    >>> worst_patterns(xr.Dataset({"r_factor": ("pattern", [0.2, np.nan, 0.4, np.inf])}))
    [3, 2, 0]
    """
    values = residuals[name].values
    if "dropped" in residuals.coords:
        values = np.where(residuals["dropped"].values, np.nan, values)
    judged = np.flatnonzero(~np.isnan(values))
    return judged[np.argsort(-values[judged], kind="stable")][:WORST_NAMED].tolist()


def _draw_over_scan(
    axes: Axes, residuals: xr.Dataset, values: NDArray[np.floating[Any]], title: str, worst: list[int]
) -> None:
    y, x = residuals["y_px"].values, residuals["x_px"].values
    judged = ~np.isnan(values)
    low, high = _limits(values[judged])
    # Dots of a dense scan are small enough not to overlap.
    size = float(np.clip(2e4 / len(values), 1, 60))
    dots = axes.scatter(x[judged], y[judged], c=values[judged], s=size, vmin=low, vmax=high, linewidths=0)
    axes.scatter(x[worst], y[worst], s=size + 60, facecolors="none", edgecolors="red", linewidths=1.2)
    axes.set(aspect="equal", xlabel="x (px)", ylabel="y (px)", title=f"{title} over the scan")
    axes.invert_yaxis()
    axes.figure.colorbar(dots, ax=axes, shrink=0.85, extend="both")


def _draw_by_index(
    axes: Axes, residuals: xr.Dataset, values: NDArray[np.floating[Any]], title: str, worst: list[int]
) -> None:
    known = "source_index" in residuals.coords
    index = residuals["source_index"].values if known else residuals["pattern"].values
    ranked = np.sort(values[~np.isnan(values)])[::-1]
    axes.plot(np.linspace(index.min(), index.max(), len(ranked)), ranked, color="tab:gray", label="sorted")
    axes.plot(index, values, ".", markersize=3, color="tab:blue", label="one pattern")
    axes.plot(index[worst], values[worst], "o", markerfacecolor="none", color="red", label=f"the {len(worst)} worst")
    axes.set(xlabel="pattern, row in the source file" if known else "pattern, index in the store", ylabel=title)
    if ranked[0] > WIDEST_LINEAR * np.median(ranked):
        axes.set_yscale("log")
    axes.set_title(
        f"worst, by index in the store: {', '.join(map(str, residuals['pattern'].values[worst]))}", fontsize="small"
    )
    axes.legend(frameon=False)


def plot_split_half(ds: xr.Dataset, *, resolution: xr.Dataset | None = None, path: str | Path | None = None) -> Figure:
    """Figure of the objects from two half data sets and their correlation.

    Parameters
    ----------
    ds : xarray.Dataset
        A result with ``object_half``, ``weight_half`` (half, y, x).
    resolution : xarray.Dataset, optional
        From `resolution`: adds the map of the local resolution.
    path : path, optional
        File to write the figure to.

    Returns
    -------
    matplotlib.figure.Figure
        The phase of each half, the amplitude of their complex difference, and the Fourier ring correlation of the
        complex objects, over the pixels that are well lit in both. The halves are not aligned with each other.

    Raises
    ------
    PtychodaskError
        If the Dataset has no halves, these have no well-lit pixel in common, or the figure cannot be written.
    """
    missing = [name for name in ("object_half", "weight_half") if name not in ds]
    if missing:
        raise PtychodaskError(f"plot_split_half: the Dataset has no {', '.join(missing)} (half, y, x)")
    shown = ds[["object_half", "weight_half"]].ptycho.compute()
    one, other = shown["object_half"].values
    lit = np.logical_and(*map(well_lit, shown["weight_half"].values))
    lit &= np.isfinite(one) & np.isfinite(other)
    if not lit.any():
        raise PtychodaskError("plot_split_half: no pixel is well lit in both halves, so they cannot be compared")
    middle = _mean_phase_factor(one[lit])
    phases = [np.angle(half * middle) for half in (one, other)]
    n_columns = 2 if resolution is None else 3
    figure, pictures, curves = _half_layout(shown, n_columns)
    for panel, phase, label in zip(pictures[:2], phases, ("first", "second"), strict=True):
        _panel(panel, phase, f"{label} half: phase (rad)", shown, *_phase_scale(phases[0][lit]))
    difference = np.abs(one - other)
    _panel(pictures[2], difference, "|first − second|", shown, (0.0, _limits(difference[lit])[1]), "magma")
    frequency, curve = frc(*(np.where(lit, half, np.complex64(np.nan)) for half in (one, other)))
    _draw_frc(curves, frequency, {"object": curve}, "FRC of the halves", ds.attrs.get("pixel_size_m"))
    if resolution is not None:
        _draw_local_resolution(pictures[3], resolution, shown)
    return saved(figure, path)


def _half_layout(ds: xr.Dataset, n_columns: int) -> tuple[Figure, list[Axes], Axes]:
    """Figure with axes for pictures and one for curves."""
    n_pictures = n_columns + 1
    orientation = _orientation(ds)
    if orientation == "compact":
        figure = empty_figure(5.5 * n_columns, 10)
        grid = figure.add_gridspec(2, n_columns)
        top = [figure.add_subplot(grid[0, column]) for column in range(n_columns)]
        pictures = [*top[:2], figure.add_subplot(grid[1, 0]), *top[2:]]
        return figure, pictures, figure.add_subplot(grid[1, 1:], box_aspect=0.8 / (n_columns - 1))
    width, height = _size_in(ds, 1, 1, (0, 0))
    curves_in = 4.5
    if orientation == "wide":
        figure = empty_figure(width, n_pictures * height + curves_in)
        axes = figure.subplots(n_pictures + 1, 1, height_ratios=[*[height] * n_pictures, curves_in])
    else:
        figure = empty_figure(n_pictures * width + curves_in, height)
        axes = figure.subplots(1, n_pictures + 1, width_ratios=[*[width] * n_pictures, curves_in])
        axes[-1].set_box_aspect(1.0)
    return figure, list(axes[:-1]), axes[-1]


def _draw_local_resolution(axes: Axes, resolution: xr.Dataset, ds: xr.Dataset) -> None:
    """Draw the resolution of each window as a square.

    Squares have the size of the step; the colour scale starts at the finest possible resolution.
    """
    y, x, half = resolution["window_y"].values, resolution["window_x"].values, resolution.attrs["step_px"] / 2
    local = resolution["local_resolution_px"].values
    known = local[np.isfinite(local)]
    coarsest = max(2 * FINEST_PX, _limits(known)[1]) if known.size else 2 * FINEST_PX
    image = axes.imshow(
        local,
        cmap="viridis_r",
        vmin=FINEST_PX,
        vmax=coarsest,
        origin="upper",
        extent=(x[0] - half, x[-1] + half, y[-1] + half, y[0] - half),
        aspect=_stretch(ds),
    )
    _frame(axes, f"local resolution (px), FRC at {resolution.attrs['criterion']}", ds)
    left, right, bottom, top = _extent(ds)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    _add_colour_bar(axes, image, ds, extend="max")


Orientation = Literal["compact", "wide", "tall"]
"""Shape of a picture: its sides are alike, or one is `ELONGATED` times the other."""


def _ratio(ds: xr.Dataset) -> float:
    """Width of a picture over its height."""
    left, right, bottom, top = _extent(ds)
    return (right - left) / (bottom - top)


def _orientation(ds: xr.Dataset) -> Orientation:
    ratio = _ratio(ds)
    return "wide" if ratio > ELONGATED else "tall" if ratio < 1 / ELONGATED else "compact"


def _stretch(ds: xr.Dataset) -> float:
    """Drawn length of a pixel along y over that along x."""
    ratio = _ratio(ds)
    return ratio / min(max(ratio, 1 / MOST_ELONGATED), MOST_ELONGATED)


def _add_colour_bar(axes: Axes, image: AxesImage, ds: xr.Dataset, extend: str = "neither") -> None:
    figure = axes.figure
    assert figure is not None
    if _orientation(ds) == "wide":
        # As high as the picture, which is less high than its place in the figure.
        figure.colorbar(image, cax=axes.inset_axes((1.015, 0, 0.01, 1)), ticks=MaxNLocator(3), extend=extend)
    else:
        figure.colorbar(image, ax=axes, shrink=0.85, extend=extend)


def _size_in(ds: xr.Dataset, n_rows: int, n_columns: int, compact: tuple[float, float]) -> tuple[float, float]:
    """Size of a figure of pictures, inches, with titles and labels.

    `compact` is that for an object whose sides are alike.
    """
    ratio = min(max(_ratio(ds), 1 / MOST_ELONGATED), MOST_ELONGATED)
    orientation = _orientation(ds)
    if orientation == "wide":
        return LONG_SIDE_IN + 2.0, n_rows * n_columns * (LONG_SIDE_IN / ratio + 1.3)
    if orientation == "tall":
        return n_rows * n_columns * (LONG_SIDE_IN * ratio + 1.9), LONG_SIDE_IN + 1.0
    return compact


def _pictures(figure: Figure | SubFigure, ds: xr.Dataset, n_rows: int, n_columns: int) -> NDArray[Any]:
    """Axes of pictures (row, column).

    Those of an elongated object are stacked along its short side.
    """
    orientation = _orientation(ds)
    if orientation == "compact":
        return figure.subplots(n_rows, n_columns, squeeze=False)
    n_pictures = n_rows * n_columns
    stacked = (n_pictures, 1) if orientation == "wide" else (1, n_pictures)
    return figure.subplots(*stacked, squeeze=False).reshape(n_rows, n_columns)


def thinned(ds: xr.Dataset) -> xr.Dataset:
    """Result in memory, subsampled along sides longer than `LARGEST_PIXELS`.

    Raises
    ------
    PtychodaskError
        If the Dataset is not a result of one method.
    """
    missing = [name for name in ("object", "weight", "uncertainty") if name not in ds or ds[name].dims != ("y", "x")]
    if missing:
        raise PtychodaskError(f"plot: the Dataset has no {', '.join(missing)} (y, x); select one method of a result")
    steps = {dim: -(-ds.sizes[dim] // LARGEST_PIXELS) for dim in ("y", "x")}
    # Along its short side an elongated object has few pixels, and none of them to spare.
    if _orientation(ds) == "compact":
        steps = dict.fromkeys(steps, max(steps.values()))
    return ds.isel({dim: slice(None, None, step) for dim, step in steps.items()}).ptycho.compute()


def _on_pixels(ds: xr.Dataset, y_px: NDArray[np.float64], x_px: NDArray[np.float64]) -> NDArray[np.complex64]:
    """Object at the given coordinates, NaN outside of the result."""
    return ds[["object"]].reindex(y=y_px, x=x_px, fill_value=complex(np.nan, np.nan)).ptycho.compute()["object"].values


def _mean_phase_factor(object_: NDArray[np.complexfloating]) -> np.complexfloating:
    """Phase factor that sets the mean phase to zero, against wraps."""
    return np.exp(-1j * np.angle(object_.sum()))


def _well_lit(ds: xr.Dataset) -> NDArray[np.bool_]:
    """Mask of the seen, well-lit pixels, which set the colour scales."""
    seen = np.isfinite(ds["object"].values)
    if not seen.any():
        raise PtychodaskError("plot: the object has no seen pixel, so there is nothing to show")
    return seen & well_lit(np.where(seen, ds["weight"].values, 0))


def _step_px(at: NDArray[np.float64]) -> float:
    """Distance of the pixels along one axis."""
    return float(at[1] - at[0]) if len(at) > 1 else 1.0


def _extent(ds: xr.Dataset) -> tuple[float, float, float, float]:
    """Left, right, lower and upper edge of a picture, scan coordinates."""
    y, x = ds["y"].values, ds["x"].values
    half_y, half_x = _step_px(y) / 2, _step_px(x) / 2
    return x[0] - half_x, x[-1] + half_x, y[-1] + half_y, y[0] - half_y


def _limits(values: NDArray[np.floating]) -> tuple[float, float]:
    low, high = (float(end) for end in np.percentile(values, LIMIT_PERCENTILES))
    # A constant picture still needs a colour scale with distinct limits.
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _phase_scale(phase: NDArray[np.floating]) -> tuple[tuple[float, float], str]:
    """Limits and colour map for a phase."""
    low, high = _limits(phase)
    return ((-np.pi, np.pi), "twilight") if high - low > np.pi else ((low, high), "gray")


def _panel(
    axes: Axes,
    values: NDArray[np.floating],
    title: str,
    ds: xr.Dataset,
    limits: tuple[float, float],
    colours: str = "gray",
) -> None:
    """Draw a picture with colour bar, scale bar and axes in pixels."""
    image = axes.imshow(
        values,
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        origin="upper",
        extent=_extent(ds),
        aspect=_stretch(ds),
    )
    _add_colour_bar(axes, image, ds)
    _frame(axes, title, ds)


def _frame(axes: Axes, title: str, ds: xr.Dataset) -> None:
    axes.set_facecolor(UNSEEN_COLOUR)
    orientation, stretch = _orientation(ds), _stretch(ds)
    times = {"x": f" × {1 / stretch:.3g}" if stretch < 1 else "", "y": f" × {stretch:.3g}" if stretch > 1 else ""}
    axes.set(xlabel=f"x (px){times['x']}", ylabel=f"y (px){times['y']}")
    for axis, is_short in ((axes.xaxis, orientation == "tall"), (axes.yaxis, orientation == "wide")):
        axis.set_major_locator(MaxNLocator(2 if is_short else "auto", integer=True))
    if orientation == "compact":
        axes.set_title(title)
        _add_scale_bar(axes, ds)
        return
    if orientation == "tall":
        axes.tick_params(axis="x", rotation=90)
    axes.set_title(title, fontsize="medium", pad=6.0 if orientation == "wide" else 22.0)
    _add_scale_bar_above(axes, ds)


def _add_contours(axes: Axes, ds: xr.Dataset, beside: Axes) -> None:
    """Draw contours of the weight, with a legend on axes `beside`."""
    weight = ds["weight"].values
    relative = weight / np.median(weight[weight > 0])
    levels = {level: style for level, style in CONTOURS.items() if relative.min() < level < relative.max()}
    if min(weight.shape) < 2 or not levels:
        return
    axes.contour(
        ds["x"].values,
        ds["y"].values,
        relative,
        levels=list(levels),
        linestyles=list(levels.values()),
        colors="white",
        linewidths=1.2,
    )
    lines = [Line2D([], [], color="white", linestyle=style) for style in levels.values()]
    labels = [f"{level:.0%} of the median weight" for level in levels]
    anchor: dict[str, Any] = {"loc": "upper right"}
    if beside is not axes:
        is_below = _orientation(ds) == "wide"
        anchor = {"loc": "center left", "bbox_to_anchor": (1.05, 0.5)}
        if not is_below:
            anchor = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.05)}
    beside.legend(lines, labels, facecolor="black", labelcolor="white", fontsize="small", **anchor)


def _scale(ds: xr.Dataset, longest_px: float) -> tuple[float, str]:
    """Length of a scale bar up to `longest_px`, and its label."""
    pixel_size_m = ds.attrs.get("pixel_size_m")
    unit_per_px = 1.0 if pixel_size_m is None else float(pixel_size_m)
    length = nice_length(longest_px * unit_per_px)
    return length / unit_per_px, f"{length:g} px" if pixel_size_m is None else length_label(length)


def _add_scale_bar_above(axes: Axes, ds: xr.Dataset) -> None:
    """Draw a scale bar above a picture too thin to contain it."""
    left, right = axes.get_xlim()
    is_wide = _orientation(ds) == "wide"
    width_px, label = _scale(ds, (0.2 if is_wide else 1.0) * (right - left))
    figure = axes.get_figure(root=True)
    assert figure is not None
    above, beside = (
        axes.get_xaxis_transform() + ScaledTranslation(dx / 72, dy / 72, figure.dpi_scale_trans)
        for dx, dy in ((0, 4), (4, 1) if is_wide else (0, 7))
    )
    bar = Line2D((left, left + width_px), (1, 1), transform=above, color="black", linewidth=3, clip_on=False)
    bar.set_solid_capstyle("butt")
    axes.add_line(bar)
    at, alignment = (left + width_px, "left") if is_wide else (left + width_px / 2, "center")
    axes.text(at, 1, label, transform=beside, ha=alignment, va="bottom", fontsize="small")


def _add_scale_bar(axes: Axes, ds: xr.Dataset) -> None:
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    width_px, label = _scale(ds, 0.3 * (right - left))
    x, y = left + 0.05 * (right - left), bottom + 0.05 * (top - bottom)
    height = 0.015 * (top - bottom)
    axes.add_patch(Rectangle((x, y), width_px, height, facecolor="white", edgecolor="black", linewidth=0.8))
    axes.text(
        x + width_px / 2,
        y + 1.5 * height,
        label,
        ha="center",
        va="bottom",
        bbox={"facecolor": "white", "alpha": 0.7, "pad": 1, "edgecolor": "none"},
    )


def nice_length(longest: float) -> float:
    """Largest round length up to `longest`: 1, 2 or 5 times 10ⁿ.

    Examples
    --------
    >>> nice_length(37.0), nice_length(1.2e-6)
    (20.0, 1e-06)
    """
    power = 10.0 ** np.floor(np.log10(longest) + 1e-9)
    factor = max(factor for factor in (1, 2, 5) if factor * power <= longest * (1 + 1e-9))
    return float(f"{factor * power:.3g}")


def length_label(length_m: float) -> str:
    """Text of a length with a suitable prefix of metre.

    Examples
    --------
    >>> length_label(5e-7), length_label(2e-6)
    ('500 nm', '2 µm')
    """
    for unit_m, name in ((1.0, "m"), (1e-3, "mm"), (1e-6, "µm"), (1e-9, "nm"), (1e-12, "pm")):
        if length_m >= unit_m * (1 - 1e-9):
            return f"{length_m / unit_m:g} {name}"
    return f"{length_m:g} m"


def drawn_label(label: str) -> str:
    """Label for a figure: one line, shortened, with $ escaped.

    Examples
    --------
    >>> drawn_label("a $x$"), drawn_label("a label that is far too long")
    ('a \\\\$x\\\\$', 'a label that is far too…')
    """
    line = " ".join(label.split())
    return (line if len(line) <= LONGEST_LABEL else f"{line[: LONGEST_LABEL - 1].rstrip()}…").replace("$", r"\$")


def plot_study(study: xr.Dataset, metric: str, *, path: str | Path | None = None) -> Figure:
    """Figure of a study: one metric over the dose.

    Parameters
    ----------
    study : xarray.Dataset
        From `run_study`.
    metric : str
        A value of the coordinate ``metric``.
    path : path, optional
        File to write the figure to.

    Returns
    -------
    matplotlib.figure.Figure
        A row for each part of the object, a column for each spacing, a line for each network and gridsize: the mean
        over the seeds, with the range over the seeds shaded. A network with identical values for every gridsize has one
        line.

    Raises
    ------
    PtychodaskError
        If the study has no such metric, or the figure cannot be written.
    """
    if metric not in study["metric"].values:
        listed = ", ".join(map(str, study["metric"].values))
        raise PtychodaskError(f"plot_study: metric is {metric}, expected one of: {listed}")
    spacing = "overlap" if "overlap" in study.dims else "step_px"
    parts = [part for part in study["part"].values if study["value"].sel(part=part, metric=metric).notnull().any()]
    if not parts:
        raise PtychodaskError(f"plot_study: no cell has a value of {metric}, so there is nothing to show")
    figure = empty_figure(4.5 * study.sizes[spacing] + 1.5, 3.5 * len(parts))
    panels = figure.subplots(len(parts), study.sizes[spacing], squeeze=False, sharex=True, sharey="row")
    for row, part in zip(panels, parts, strict=True):
        for axes, step in zip(row, study[spacing].values, strict=True):
            _draw_over_dose(axes, study["value"].sel({"part": part, "metric": metric, spacing: step}))
            axes.set(xscale="log", title=f"{part}, {spacing.replace('_', ' ')} {step:g}")
        row[0].set_ylabel(metric)
    for axes in panels[-1]:
        axes.set_xlabel("dose (photons per pattern)")
    panels[0, 0].legend(frameon=False)
    return saved(figure, path)


def _draw_over_dose(axes: Axes, values: xr.DataArray) -> None:
    for model in values["model"].values:
        curves = values.loc[{"model": model}].transpose("gridsize", "dose", "seed")
        identical = all(np.array_equal(curve, curves[0], equal_nan=True) for curve in curves)
        for gridsize, curve in zip(curves["gridsize"].values, curves[:1] if identical else curves, strict=False):
            label = str(model) if identical else f"{model}, gridsize {gridsize}"
            (line,) = axes.plot(curve["dose"], curve.mean("seed"), "o-", label=label)
            axes.fill_between(curve["dose"], curve.min("seed"), curve.max("seed"), color=line.get_color(), alpha=0.2)


def plot_patterns(
    mean: NDArray[np.floating[Any]],
    patterns: Mapping[str, NDArray[np.floating[Any]]],
    position_yx: NDArray[np.floating[Any]] | None = None,
    *,
    unit: str = "px",
    path: str | Path | None = None,
) -> Figure:
    """Figure of measured data: mean pattern, single patterns and scan positions.

    Parameters
    ----------
    mean : float array (h, w)
        Counts of the mean pattern.
    patterns : dict of label to float array (h, w)
        Counts of single patterns.
    position_yx : float array (pattern, 2), optional
        Positions (y, x); non-finite ones are left out.
    unit : str
        Unit of the positions.
    path : path, optional
        File to write the figure to.

    Returns
    -------
    matplotlib.figure.Figure
        Patterns on one logarithmic scale up to the brightest pixel; positions joined in the order of the file, +y
        down.

    Raises
    ------
    PtychodaskError
        If all patterns are zero, or the figure cannot be written.
    """
    shown = {"mean": mean, **patterns}
    highest = max(float(np.nanmax(image)) for image in shown.values())
    if not highest > 0:
        raise PtychodaskError("plot_patterns: all patterns are zero, so there is nothing to show")
    lowest = max(highest / PATTERN_DECADES, float(np.min(mean, where=mean > 0, initial=highest)))
    scale = LogNorm(lowest, highest) if lowest < highest else LogNorm(highest / 10, highest)
    n_panels = len(shown) + (position_yx is not None)
    figure = empty_figure(3.2 * -(-n_panels // 2), 6.2)
    panels = figure.subplots(2, -(-n_panels // 2), squeeze=False).ravel()
    for axes, (label, image) in zip(panels, shown.items(), strict=False):
        picture = axes.imshow(np.maximum(image, lowest), cmap="viridis", norm=scale, origin="upper")
        axes.set(title=drawn_label(label), xlabel="qx (pixel)", ylabel="qy (pixel)")
    figure.colorbar(picture, ax=list(panels[: len(shown)]), shrink=0.6, label="counts")
    if position_yx is not None:
        _draw_positions(panels[len(shown)], position_yx, unit)
    for axes in panels[n_panels:]:
        axes.set_axis_off()
    return saved(figure, path)


def _draw_positions(axes: Axes, position_yx: NDArray[np.floating[Any]], unit: str) -> None:
    finite = position_yx[np.isfinite(position_yx).all(axis=1)]
    few = finite[:: -(-max(1, len(finite)) // MOST_POSITIONS)]
    axes.plot(few[:, 1], few[:, 0], "-", color="lightgrey", linewidth=0.5)
    axes.plot(few[:, 1], few[:, 0], ".", markersize=2)
    axes.set(title=f"{len(position_yx)} positions", xlabel=f"x ({unit})", ylabel=f"y ({unit})", aspect="equal")
    axes.invert_yaxis()


def plot_contact_sheet(
    pictures: Mapping[tuple[str, str], NDArray[np.floating[Any]]], *, path: str | Path | None = None
) -> Figure:
    """Contact sheet of small pictures in rows and columns.

    Parameters
    ----------
    pictures : dict of (row, column) to float array (y, x)
        Labels and pictures, NaN where unseen; a column has the colour scale of its first picture.
    path : path, optional
        File to write the figure to.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    PtychodaskError
        If there is no picture, or the figure cannot be written.
    """
    if not pictures:
        raise PtychodaskError("plot_contact_sheet: found no picture, expected at least one")
    rows, columns = (list(dict.fromkeys(labels)) for labels in zip(*pictures, strict=True))
    figure = empty_figure(2.2 * len(columns) + 0.6, 2.3 * len(rows) + 0.3)
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    limits: dict[str, tuple[float, float]] = {}
    for (row, column), picture in pictures.items():
        limits.setdefault(column, _limits(picture[np.isfinite(picture)]))
        axes = panels[rows.index(row), columns.index(column)]
        axes.imshow(picture, cmap="gray", vmin=limits[column][0], vmax=limits[column][1], origin="upper")
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[], facecolor=UNSEEN_COLOUR)
    for axes, column in zip(panels[0], columns, strict=True):
        axes.set_title(column, fontsize="small")
    for axes, row in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(row, fontsize="small")
    return saved(figure, path)
