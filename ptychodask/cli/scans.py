"""Commands that make and improve a scan's store: ingest, simulate, group, refine-probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptychodask.cli.flags import Overwrite, Quiet, Store, bar, given, numbers
from ptychodask.scan import PtychodaskError


def ingest(
    source: Annotated[Path, typer.Argument(help="NPZ (or .npz.bz2) or HDF5 file.", show_default=False)],
    store: Store,
    format: Annotated[
        str | None, typer.Option(help="ptychopinn, tike or mapping; by default what the keys say.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="NAME=KEY: the file's key of diffraction, y, x, position, probe, mask, object, label, flux."),
    ] = None,
    domain: Annotated[str | None, typer.Option(help="counts or amplitude.")] = None,
    axes: Annotated[str | None, typer.Option(help="pattern,qy,qx or qy,qx,pattern.")] = None,
    dc: Annotated[str | None, typer.Option(help="Where the direct beam is: centre or corner.")] = None,
    units: Annotated[str | None, typer.Option(help="Of the positions: px, um or m.")] = None,
    flip_y: Annotated[bool, typer.Option("--flip-y", help="y becomes -y.")] = False,
    flip_x: Annotated[bool, typer.Option("--flip-x", help="x becomes -x.")] = False,
    swap_xy: Annotated[bool, typer.Option("--swap-xy", help="y and x change places.")] = False,
    n_pixels: Annotated[int | None, typer.Option(help="Pixels across a stored pattern: crops or pads.")] = None,
    bin: Annotated[int | None, typer.Option(help="Detector pixels, along each axis, summed into one.")] = None,
    centre: Annotated[str | None, typer.Option(help="The beam's centre: dc, auto, or y,x in pixels.")] = None,
    energy_ev: Annotated[float | None, typer.Option(help="Photon energy.")] = None,
    wavelength_m: Annotated[float | None, typer.Option(help="Wavelength, in place of the energy.")] = None,
    distance_m: Annotated[float | None, typer.Option(help="Sample to detector.")] = None,
    detector_pixel_m: Annotated[float | None, typer.Option(help="Size of a detector pixel.")] = None,
    pixel_size_m: Annotated[float | None, typer.Option(help="Size of an object pixel, as stored.")] = None,
    probe: Annotated[str | None, typer.Option(help="file, disc, zone_plate, estimate, or a .npy or .npz.")] = None,
    probe_diameter_px: Annotated[float | None, typer.Option(help="Of the disc, or of the zone plate's pupil.")] = None,
    probe_stop_px: Annotated[float | None, typer.Option(help="Diameter of the zone plate's stop.")] = None,
    probe_defocus: Annotated[float | None, typer.Option(help="Defocus at the pupil's rim, radians.")] = None,
    probe_defocus_m: Annotated[float | None, typer.Option(help="Distance from the focus, metres.")] = None,
    calibration: Annotated[str | None, typer.Option(help="as_given, incident or mean_counts.")] = None,
    incident_counts: Annotated[float | None, typer.Option(help="Photons per pattern on the sample.")] = None,
    mask: Annotated[Path | None, typer.Option(help=".npy, True where a detector pixel is good.")] = None,
    drop_frames: Annotated[str | None, typer.Option(help='Rows of the file to leave out: "3,10:20".')] = None,
    scratch: Annotated[Path | None, typer.Option(help="Folder for unpacked data; beside the store by default.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a store from a file of another program.

    Example: ptychodask ingest scan.npz scan.zarr

    Example: ptychodask ingest raw.h5 scan.zarr --key diffraction=entry/data --key y=pos/y --key x=pos/x --domain counts
    """
    from ptychodask.io import ingest

    options = given(
        keys=pairs(key),
        domain=domain,
        axes=axes,
        dc=dc,
        units=units,
        n_pixels=n_pixels,
        bin=bin,
        centre=None if centre is None else centre_yx(centre),
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
        mask=mask,
        drop_frames=drop_frames,
        scratch=scratch,
        # A format that fixes its axes refuses these flags, so only those that were set are handed on.
        **{name: True for name, set_ in (("flip_y", flip_y), ("flip_x", flip_x), ("swap_xy", swap_xy)) if set_},
    )
    scan = ingest(source, store, format=format, overwrite=overwrite, progress=bar(quiet), **options)
    typer.echo(f"{store}: {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}, {scan.domain}")


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
    scan = simulate(store, overwrite=overwrite, progress=bar(quiet), **options)
    typer.echo(f"{store}: {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}, with their truth")


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
    typer.echo(f"{store}: {len(groups)} groups of {spec.members} as '{groups.name}'")


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
    found = refine_probe(store, search_defocus=search_defocus, progress=bar(quiet), **options)
    kept = "stored" if found.stored else "not better, so the stored probe stays"
    typer.echo(f"{store}: R {found.r_before:.4f} -> {found.r_after:.4f} on {found.n_held_out} unseen patterns; {kept}")


def pairs(keys: list[str] | None) -> dict[str, str] | None:
    if not keys:
        return None
    for text in keys:
        if "=" not in text:
            raise PtychodaskError(f"--key {text}: expected NAME=KEY, for example --key diffraction=entry/data")
    return dict(text.split("=", 1) for text in keys)


def centre_yx(text: str) -> str | tuple[float, float]:
    if text in ("dc", "auto"):
        return text
    y, x = numbers("--centre", text, 2)
    return y, x
