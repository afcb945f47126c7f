"""Commands for scans: inspect, check, ingest, simulate, group, refine-probe, set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ptychodask.cli.fields import options_of
from ptychodask.cli.flags import Format, Overwrite, Quiet, Recipe, Store, check_folders, given, named, progress_option
from ptychodask.errors import PtychodaskError


@options_of("ptychodask.io.source", "IngestSpec", inspected=True)
def inspect(
    source: Annotated[
        Path, typer.Argument(help="NPZ, HDF5 or MATLAB file, folder of arrays, or store of a scan.", show_default=False)
    ],
    check_axes: Annotated[
        bool,
        typer.Option(
            "--check-axes",
            help="Find the orientation of the positions (swap, flips) in which overlapping patterns agree.",
        ),
    ] = False,
    rotation: Annotated[
        bool, typer.Option("--rotation", help="With --check-axes: also search the rotation angle.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Figure of patterns and positions to write.")] = None,
    yaml: Annotated[Path | None, typer.Option(help="YAML file to write the options of ingest to.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the output as JSON.")] = False,
    format: Format = None,
    recipe: Recipe = None,
    *,
    quiet: Quiet = False,
    **fields: Any,
) -> None:
    """Show the contents of a file or store, and the next command.

    Example: ptychodask inspect raw.h5 --png raw.png --yaml raw.yaml

    Example: ptychodask inspect scan.zarr --check-axes

    Nothing is changed. Pass known facts about a file as flags of ingest:
    they are checked, and become part of the command.
    """
    from json import dumps

    from ptychodask.inspection import check_axes as judge_axes
    from ptychodask.inspection import inspect_file, plot_preview
    from ptychodask.judging.figure import check_figure_path

    if rotation and not check_axes:
        raise PtychodaskError("--rotation: needs --check-axes; pass both or neither")
    if png is not None:
        check_figure_path(png)
    check_folders(yaml)
    inspection = inspect_file(source, format=format, recipe=recipe, **fields)
    if yaml is not None:
        yaml.write_text(inspection.as_yaml())
    if png is not None and inspection.preview is not None:
        plot_preview(inspection.preview, png)
    if not check_axes:
        typer.echo(dumps(inspection.as_json(), indent=2) if json else str(inspection))
        return
    verdict = judge_axes(
        source, rotation=rotation, progress=progress_option(quiet), format=format, **inspection.options
    )
    typer.echo(dumps(verdict.as_json(), indent=2) if json else str(verdict))


def check(
    stores: Annotated[
        list[str],
        typer.Argument(help="Stores of scans, results, caches of patches, or models.", show_default=False),
    ],
    *,
    quiet: Quiet = False,
) -> None:
    """Read every chunk of stores, and compare the recorded hashes.

    Example: ptychodask check scan.zarr scan.object.zarr

    Nothing is changed. Chunks whose checksum is wrong are named, with
    the remedy; the command then ends with exit code 2.
    """
    from ptychodask.inspection.integrity import check_store

    damaged = []
    for store in stores:
        checked = check_store(store, progress=progress_option(quiet))
        typer.echo(str(checked))
        if checked.problems:
            damaged.append(str(store))
    if damaged:
        raise PtychodaskError(f"{', '.join(damaged)}: damaged, see above")


@options_of("ptychodask.io.source", "IngestSpec")
def ingest(
    source: Annotated[
        Path,
        typer.Argument(
            help="NPZ (or .npz.bz2), HDF5 or MATLAB file, or folder of arrays; with only --finish, the store.",
            show_default=False,
        ),
    ],
    store: Annotated[
        Path | None,
        typer.Argument(
            help="Store of the scan to write: a folder ending in .zarr, or s3://bucket/name.", show_default=False
        ),
    ] = None,
    format: Format = None,
    recipe: Recipe = None,
    *,
    append: Annotated[bool, typer.Option("--append", help="Add the file to a growing scan, as a new segment.")] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="Mark a growing scan as complete; no more segments can be added.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **fields: Any,
) -> None:
    """Convert a file of another program to a store.

    With --append, the file is added to a growing scan.

    Example: ptychodask ingest scan.npz scan.zarr

    Example: ptychodask ingest part2.npz scan.zarr --append

    Example: ptychodask ingest --finish scan.zarr

    Example: ptychodask ingest raw.h5 scan.zarr --key diffraction=entry/data --key y=pos/y --key x=pos/x --domain counts
    """
    from ptychodask.io.ingest import ingest
    from ptychodask.store.append import finish_scan

    if store is None and not finish:
        raise PtychodaskError(f"ingest: {source} is the file, but the store is missing; name the store after the file")
    if store is not None and finish and not append:
        raise PtychodaskError("ingest: --finish needs --append, or only the store as argument; add --append")
    if store is None:
        if fields or append or overwrite or format is not None or recipe is not None:
            raise PtychodaskError(
                "ingest: --finish without a file accepts no other option; leave the others out, or name a file"
            )
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
            **fields,
        )
        scan = finish_scan(store) if finish else scan
    state = "" if scan.attributes["state"] == "complete" else ", still growing"
    typer.echo(f"{scan.store}: {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}, {scan.domain}{state}")


def simulate(
    store: Store,
    object: Annotated[str | None, typer.Option(help="Object: lines, star, field, or a .npy or image file.")] = None,
    probe: Annotated[str | None, typer.Option(help="Probe: disc or zone_plate.")] = None,
    n_pixels: Annotated[int | None, typer.Option(help="Pixels across a pattern.")] = None,
    n_patterns: Annotated[int | None, typer.Option(help="Number of patterns.")] = None,
    dose: Annotated[float | None, typer.Option(help="Photons per pattern.")] = None,
    step_px: Annotated[float | None, typer.Option(help="Mean spacing of the positions, object pixels.")] = None,
    path: Annotated[
        str | None,
        typer.Option(help="Scan path: raster, spiral, random, or store of a scan whose positions are used."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of object, path and noise.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate the scan of a known object.

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
    typer.echo(f"{scan.store}: {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}, with the true object")


@options_of("ptychodask.grouping", "GroupingSpec")
def group(
    store: Store,
    *,
    name: Annotated[
        str | None, typer.Option(help="Name of the table; by default made from the options, such as c4-k7-s0.")
    ] = None,
    **fields: Any,
) -> None:
    """Group neighbouring patterns, and store the table of groups.

    Optional: training and reconstruction make a default table if there is none.

    Example: ptychodask group scan.zarr --members 4 --neighbours 7
    """
    from ptychodask.grouping import GroupingSpec
    from ptychodask.store.groups import group

    spec = GroupingSpec(**fields)
    groups = group(store, spec, name=name)
    typer.echo(f"{named(store)}: {len(groups)} groups of {spec.members} as '{groups.name}'")


def refine_probe(
    store: Store,
    n_sweeps: Annotated[int | None, typer.Option(help="Number of sweeps over the patterns.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Fraction of the patterns to use, nearest to the middle of the scan.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Fraction of these patterns that is held out for scoring.")
    ] = None,
    search_defocus: Annotated[
        bool, typer.Option("--search-defocus", help="Also try initial probes that are out of focus.")
    ] = False,
    experiment: Annotated[
        int | None,
        typer.Option(help="Experiment whose patterns are used, of a scan of several; by default the largest."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the order and of the held-out patterns.")] = None,
    quiet: Quiet = False,
) -> None:
    """Refine the stored probe by iterative sweeps over the patterns.

    It is only replaced by a better one. The ingested probe is kept.

    Example: ptychodask refine-probe scan.zarr
    """
    from ptychodask.iterative import refine_probe

    options = given(n_sweeps=n_sweeps, fraction=fraction, held_out=held_out, experiment=experiment, seed=seed)
    refined = refine_probe(store, search_defocus=search_defocus, progress=progress_option(quiet), **options)
    change = f"R {refined.r_before:.4f} -> {refined.r_after:.4f} on {refined.n_held_out} held-out patterns"
    outcome = "stored" if refined.stored else f"stored probe unchanged: {refined.problem}"
    typer.echo(f"{named(store)}: {change}; {outcome}")


def set(
    store: Store,
    *,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Result with refined positions of this scan (reconstruct --refine-positions), and flux if refined.",
            show_default=False,
        ),
    ] = None,
    pixel_size_m: Annotated[
        float | None, typer.Option(help="Size of an object pixel, metres.", show_default=False)
    ] = None,
    energy_ev: Annotated[float | None, typer.Option(help="Photon energy, eV.", show_default=False)] = None,
    distance_m: Annotated[
        float | None, typer.Option(help="Distance from sample to detector, metres.", show_default=False)
    ] = None,
) -> None:
    """Write refined positions, or metadata not known at ingest, into a scan.

    With --positions, the measured positions are kept. Stored group tables are removed, and drawn again by the next run.

    Example: ptychodask set scan.zarr --positions object.zarr

    Example: ptychodask set scan.zarr --pixel-size-m 12e-9 --energy-ev 8800 --distance-m 2
    """
    import numpy as np

    from ptychodask.refinement.apply import apply_positions
    from ptychodask.store.annotate import set_metadata

    metadata = given(pixel_size_m=pixel_size_m, energy_ev=energy_ev, distance_m=distance_m)
    if positions is None and not metadata:
        raise PtychodaskError(
            f"set: nothing to set in {store}; pass --positions RESULT, --pixel-size-m, --energy-ev or --distance-m"
        )
    if metadata:
        set_metadata(store, **metadata)
        typer.echo(f"{named(store)}: {', '.join(f'{name} {value:g}' for name, value in metadata.items())}")
    if positions is None:
        return
    scan = apply_positions(store, positions)
    assert scan.position_measured_yx_px is not None
    moved = scan.position_yx_px - scan.position_measured_yx_px
    rms = float(np.sqrt((moved**2).sum(axis=1).mean()))
    typer.echo(f"{named(store)}: positions of {scan.n_patterns} patterns, {rms:.3g} px (rms) from those measured")
