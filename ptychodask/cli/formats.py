"""Commands that speak to other programs: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptychodask.cli.flags import Overwrite, Quiet, given, progress_option


def export(
    source: Annotated[Path, typer.Argument(help="A result, or a scan's store.", show_default=False)],
    format: Annotated[
        str, typer.Option(help="ptychodus, cxi, ptychopinn, netcdf, tiff, ome-zarr or png.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="File to write; a folder for ome-zarr.", show_default=False)],
    scan: Annotated[
        Path | None, typer.Option(help="Store that a result was made from; by default the one it records.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Which method of a result that has several.")] = None,
    pixel_size_m: Annotated[float | None, typer.Option(help="Size of an object pixel, where it is not known.")] = None,
    energy_ev: Annotated[float | None, typer.Option(help="Photon energy, where it is not known.")] = None,
    distance_m: Annotated[float | None, typer.Option(help="Sample to detector, where it is not known.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a result or a scan as another program reads it.

    Example: ptychodask export scan.object.zarr --format tiff --out scan.tif

    Example: ptychodask export scan.object.zarr --format ptychodus --out product.h5 --scan scan.zarr

    A scan gives its patterns (ptychodus, cxi, ptychopinn), a result its object (all formats).
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
            method=method,
            pixel_size_m=pixel_size_m,
            energy_ev=energy_ev,
            distance_m=distance_m,
        ),
    )
    typer.echo(f"{written}: {format}")
