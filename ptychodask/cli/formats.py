"""Commands for the formats of other programs: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptychodask.cli.flags import Overwrite, Quiet, given, progress_option


def export(
    source: Annotated[Path, typer.Argument(help="Result, or store of a scan.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(
            help="Format to write: ptychodus, cxi, ptychopinn, netcdf, tiff, ome-zarr or png.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write; a folder for ome-zarr.", show_default=False)],
    scan: Annotated[
        Path | None, typer.Option(help="Store of the scan that the result was made from; by default the recorded one.")
    ] = None,
    network: Annotated[str | None, typer.Option(help="Network to export, if the result has several.")] = None,
    method: Annotated[str | None, typer.Option(help="Former name of --network.", hidden=True)] = None,
    experiment: Annotated[
        int | None, typer.Option(help="Experiment to export, if the scan has several; by default that of the result.")
    ] = None,
    pixel_size_m: Annotated[
        float | None, typer.Option(help="Size of an object pixel, metres, if not recorded.")
    ] = None,
    energy_ev: Annotated[float | None, typer.Option(help="Photon energy, eV, if not recorded.")] = None,
    distance_m: Annotated[
        float | None, typer.Option(help="Distance from sample to detector, metres, if not recorded.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a result or a scan in the format of another program.

    Example: ptychodask export scan.object.zarr --format tiff --out scan.tif

    Example: ptychodask export scan.object.zarr --format ptychodus --out product.h5 --scan scan.zarr

    For a result, the object is written (all formats); for a scan, the patterns
    (ptychodus, cxi, ptychopinn).
    """
    from ptychodask.export import export

    written = export(
        source,
        out,
        format=format,
        overwrite=overwrite,
        progress=progress_option(quiet),
        **given(
            scan=scan,
            network=network or method,
            experiment=experiment,
            pixel_size_m=pixel_size_m,
            energy_ev=energy_ev,
            distance_m=distance_m,
        ),
    )
    typer.echo(f"{written}: {format}")
