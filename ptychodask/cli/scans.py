"""Commands that look at scans, and make and improve their stores: inspect, ingest, simulate, group, refine-probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptychodask.cli.flags import (
    Affine,
    Beam,
    Bin,
    Centre,
    DetectorPixelM,
    DistanceM,
    DropFrames,
    EnergyEv,
    FarField,
    FlipX,
    FlipY,
    Format,
    FrameAxes,
    Key,
    MaskFile,
    NPixels,
    Overwrite,
    PatternDomain,
    PatternsFile,
    PixelSizeM,
    Quiet,
    Recipe,
    Scratch,
    Store,
    SwapXY,
    Units,
    WavelengthM,
    check_folders,
    given,
    named,
    progress_option,
    reading_options,
)
from ptychodask.scan import PtychodaskError


def inspect(
    source: Annotated[Path, typer.Argument(help="NPZ (or .npz.bz2) or HDF5 file, or a store.", show_default=False)],
    check_axes: Annotated[
        bool, typer.Option("--check-axes", help="Try the positions swapped and flipped, by how patterns agree.")
    ] = False,
    rotation: Annotated[bool, typer.Option("--rotation", help="With --check-axes: turned by any angle too.")] = False,
    png: Annotated[Path | None, typer.Option(help="Picture of patterns and positions to write.")] = None,
    yaml: Annotated[Path | None, typer.Option(help="File to write the options of ingest to.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    format: Format = None,
    recipe: Recipe = None,
    diffraction: PatternsFile = None,
    key: Key = None,
    domain: PatternDomain = None,
    axes: FrameAxes = None,
    dc: Beam = None,
    units: Units = None,
    flip_y: FlipY = False,
    flip_x: FlipX = False,
    swap_xy: SwapXY = False,
    affine: Affine = None,
    n_pixels: NPixels = None,
    bin: Bin = None,
    centre: Centre = None,
    energy_ev: EnergyEv = None,
    wavelength_m: WavelengthM = None,
    distance_m: DistanceM = None,
    detector_pixel_m: DetectorPixelM = None,
    pixel_size_m: PixelSizeM = None,
    mask: MaskFile = None,
    drop_frames: DropFrames = None,
    far_field: FarField = False,
    scratch: Scratch = None,
    quiet: Quiet = False,
) -> None:
    """Say what a file or a store holds, and which command to run next; nothing is changed.

    Example: ptychodask inspect raw.h5 --png raw.png --yaml raw.yaml

    Example: ptychodask inspect scan.zarr --check-axes

    What is known of a file is passed with the flags of ingest: it is checked, and becomes part of the command.
    """
    from json import dumps

    from ptychodask.inspection import check_axes as judge_axes
    from ptychodask.inspection import inspect_file, plot_preview
    from ptychodask.plotting import check_figure_path

    if rotation and not check_axes:
        raise PtychodaskError("--rotation: goes with --check-axes")
    if png is not None:
        check_figure_path(png)
    check_folders(yaml)
    options = reading_options(
        key=key,
        domain=domain,
        axes=axes,
        dc=dc,
        units=units,
        flip_y=flip_y,
        flip_x=flip_x,
        swap_xy=swap_xy,
        affine=affine,
        n_pixels=n_pixels,
        bin=bin,
        centre=centre,
        energy_ev=energy_ev,
        wavelength_m=wavelength_m,
        distance_m=distance_m,
        detector_pixel_m=detector_pixel_m,
        pixel_size_m=pixel_size_m,
        diffraction=diffraction,
        far_field=far_field,
        mask=mask,
        drop_frames=drop_frames,
        scratch=scratch,
    )
    found = inspect_file(source, format=format, recipe=recipe, **options)
    if yaml is not None:
        yaml.write_text(found.as_yaml())
    if png is not None and found.preview is not None:
        plot_preview(found.preview, png)
    if not check_axes:
        typer.echo(dumps(found.as_json(), indent=2) if json else str(found))
        return
    verdict = judge_axes(source, rotation=rotation, progress=progress_option(quiet), format=format, **found.options)
    typer.echo(dumps(verdict.as_json(), indent=2) if json else str(verdict))


def ingest(
    source: Annotated[
        Path, typer.Argument(help="NPZ (or .npz.bz2) or HDF5 file; with --finish alone, the store.", show_default=False)
    ],
    store: Annotated[
        Path | None,
        typer.Argument(help="The scan's store, as in other commands.", show_default=False),
    ] = None,
    format: Format = None,
    recipe: Recipe = None,
    diffraction: PatternsFile = None,
    key: Key = None,
    domain: PatternDomain = None,
    axes: FrameAxes = None,
    dc: Beam = None,
    units: Units = None,
    flip_y: FlipY = False,
    flip_x: FlipX = False,
    swap_xy: SwapXY = False,
    affine: Affine = None,
    n_pixels: NPixels = None,
    bin: Bin = None,
    centre: Centre = None,
    energy_ev: EnergyEv = None,
    wavelength_m: WavelengthM = None,
    distance_m: DistanceM = None,
    detector_pixel_m: DetectorPixelM = None,
    pixel_size_m: PixelSizeM = None,
    probe: Annotated[str | None, typer.Option(help="file, disc, zone_plate, estimate, or a .npy or .npz.")] = None,
    probe_diameter_px: Annotated[float | None, typer.Option(help="Of the disc, or of the zone plate's pupil.")] = None,
    probe_stop_px: Annotated[float | None, typer.Option(help="Diameter of the zone plate's stop.")] = None,
    probe_defocus: Annotated[float | None, typer.Option(help="Defocus at the pupil's rim, radians.")] = None,
    probe_defocus_m: Annotated[float | None, typer.Option(help="Distance from the focus, metres.")] = None,
    calibration: Annotated[str | None, typer.Option(help="as_given, incident or mean_counts.")] = None,
    incident_counts: Annotated[float | None, typer.Option(help="Photons per pattern on the sample.")] = None,
    mask: MaskFile = None,
    drop_frames: DropFrames = None,
    far_field: FarField = False,
    scratch: Scratch = None,
    append: Annotated[bool, typer.Option("--append", help="The file is a segment of a scan that grows.")] = False,
    finish: Annotated[bool, typer.Option("--finish", help="The scan is whole: nothing is appended any more.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a store from a file of another program, or add it to a scan that grows.

    Example: ptychodask ingest scan.npz scan.zarr

    Example: ptychodask ingest part2.npz scan.zarr --append

    Example: ptychodask ingest --finish scan.zarr

    Example: ptychodask ingest raw.h5 scan.zarr --key diffraction=entry/data --key y=pos/y --key x=pos/x --domain counts
    """
    from ptychodask.growing import finish_scan
    from ptychodask.io import ingest

    if store is None and not finish:
        raise PtychodaskError(f"ingest: {source} is the file, and the store is missing; name it after the file")
    if store is not None and finish and not append:
        raise PtychodaskError("ingest: --finish goes with --append, or with the store alone")
    options = reading_options(
        key=key,
        domain=domain,
        axes=axes,
        dc=dc,
        units=units,
        flip_y=flip_y,
        flip_x=flip_x,
        swap_xy=swap_xy,
        affine=affine,
        n_pixels=n_pixels,
        bin=bin,
        centre=centre,
        energy_ev=energy_ev,
        wavelength_m=wavelength_m,
        distance_m=distance_m,
        detector_pixel_m=detector_pixel_m,
        pixel_size_m=pixel_size_m,
        probe=probe,
        probe_diameter_px=probe_diameter_px,
        probe_stop_px=probe_stop_px,
        probe_defocus=probe_defocus,
        probe_defocus_m=probe_defocus_m,
        calibration=calibration,
        incident_counts=incident_counts,
        diffraction=diffraction,
        far_field=far_field,
        mask=mask,
        drop_frames=drop_frames,
        scratch=scratch,
    )
    if store is None:
        if options or append or overwrite or format is not None or recipe is not None:
            raise PtychodaskError("ingest: --finish with the store alone takes no other option; name a file too")
        scan = finish_scan(source)
    else:
        scan = ingest(
            source,
            store,
            format=format,
            recipe=recipe,
            append=append,
            overwrite=overwrite,
            progress=progress_option(quiet),
            **options,
        )
        scan = finish_scan(store) if finish else scan
    kept = "" if scan.attributes["state"] == "complete" else ", still growing"
    typer.echo(f"{scan.store}: {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}, {scan.domain}{kept}")


def simulate(
    store: Store,
    object: Annotated[str | None, typer.Option(help="lines, star, field, or a .npy or image file.")] = None,
    probe: Annotated[str | None, typer.Option(help="disc or zone_plate.")] = None,
    n_pixels: Annotated[int | None, typer.Option(help="Pixels across a pattern.")] = None,
    n_patterns: Annotated[int | None, typer.Option(help="How many patterns.")] = None,
    dose: Annotated[float | None, typer.Option(help="Photons per pattern.")] = None,
    step_px: Annotated[float | None, typer.Option(help="Mean distance of neighbours, object pixels.")] = None,
    path: Annotated[
        str | None, typer.Option(help="raster, spiral, random, or a scan's store for its positions.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of object, path and noise.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a scan of a known object.

    Example: ptychodask simulate lines.zarr --object lines --probe zone_plate --dose 1e6
    """
    from ptychodask.simulate import simulate

    options = given(
        object=object,
        probe=probe,
        n_pixels=n_pixels,
        n_patterns=n_patterns,
        dose=dose,
        step_px=step_px,
        path=path,
        seed=seed,
    )
    scan = simulate(store, overwrite=overwrite, progress=progress_option(quiet), **options)
    typer.echo(f"{scan.store}: {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}, with their truth")


def group(
    store: Store,
    members: Annotated[int | None, typer.Option(help="Patterns in one group.")] = None,
    neighbours: Annotated[int | None, typer.Option(help="Nearest positions that members are drawn from.")] = None,
    oversampling: Annotated[int | None, typer.Option(help="Groups that each pattern seeds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw.")] = None,
    halves: Annotated[bool, typer.Option("--halves", help="Groups of even patterns and of odd ones.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the table; by default the spec's.")] = None,
) -> None:
    """Store a table of groups; training and reconstruction make theirs when there is none.

    Example: ptychodask group scan.zarr --members 4 --neighbours 7
    """
    from ptychodask.grouping import GroupingSpec
    from ptychodask.store import group

    spec = GroupingSpec(
        **given(members=members, neighbours=neighbours, oversampling=oversampling, seed=seed, halves=halves or None)
    )
    groups = group(store, spec, name=name)
    typer.echo(f"{named(store)}: {len(groups)} groups of {spec.members} as '{groups.name}'")


def refine_probe(
    store: Store,
    n_sweeps: Annotated[int | None, typer.Option(help="Times that each pattern is visited.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the patterns that is used.")] = None,
    held_out: Annotated[float | None, typer.Option(help="Share of the used patterns that only score.")] = None,
    search_defocus: Annotated[bool, typer.Option("--search-defocus", help="Try starts out of focus as well.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the order and of the held-out patterns.")] = None,
    quiet: Quiet = False,
) -> None:
    """Improve the stored probe by iterative sweeps over the patterns; the probe as ingested is kept.

    Example: ptychodask refine-probe scan.zarr
    """
    from ptychodask.iterative import refine_probe

    options = given(n_sweeps=n_sweeps, fraction=fraction, held_out=held_out, seed=seed)
    found = refine_probe(store, search_defocus=search_defocus, progress=progress_option(quiet), **options)
    kept = "stored" if found.stored else "not better, so the stored probe stays"
    typer.echo(
        f"{named(store)}: R {found.r_before:.4f} -> {found.r_after:.4f} on {found.n_held_out} unseen patterns; {kept}"
    )
