"""What the commands share: options that several of them have, and how their texts are read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ptychodask.scan import PtychodaskError

Store = Annotated[
    Path, typer.Argument(help="The scan's store, a folder ending in .zarr; or s3://bucket/name.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new one is whole.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")]
Workers = Annotated[int | None, typer.Option(help="Worker processes to start; by default this one.")]
Host = Annotated[str | None, typer.Option(help="What --workers listen on; by default the loopback interface alone.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of a running Dask scheduler, or its --scheduler-file.")]
Tls = Annotated[bool, typer.Option("--tls", help="Encrypt and authenticate what --workers say to each other.")]
TlsFolder = Annotated[
    Path | None, typer.Option(help="Folder with ca.pem, cert.pem and key.pem for a --scheduler that speaks TLS.")
]

Format = Annotated[
    str | None,
    typer.Option(help="ptychopinn, tike, ptychodus, nexus, cxi, hxn or mapping; by default what the keys say."),
]
Key = Annotated[
    list[str] | None,
    typer.Option(help="NAME=KEY: the file's key of diffraction, y, x, position, probe, mask, object, label, flux."),
]
PatternDomain = Annotated[str | None, typer.Option("--domain", help="counts or amplitude.")]
FrameAxes = Annotated[str | None, typer.Option("--axes", help="pattern,qy,qx or qy,qx,pattern.")]
Beam = Annotated[str | None, typer.Option("--dc", help="Where the direct beam is: centre or corner.")]
Units = Annotated[str | None, typer.Option(help="Of the positions: px, um or m.")]
FlipY = Annotated[bool, typer.Option("--flip-y", help="y becomes -y.")]
FlipX = Annotated[bool, typer.Option("--flip-x", help="x becomes -x.")]
SwapXY = Annotated[bool, typer.Option("--swap-xy", help="y and x change places.")]
Affine = Annotated[
    str | None, typer.Option(help="a,b,c,d: after the flips, (y, x) becomes (a y + b x, c y + d x). For every format.")
]
NPixels = Annotated[int | None, typer.Option(help="Pixels across a stored pattern: crops or pads.")]
Bin = Annotated[int | None, typer.Option(help="Detector pixels, along each axis, summed into one.")]
Centre = Annotated[str | None, typer.Option(help="The beam's centre: dc, auto, or y,x in pixels.")]
EnergyEv = Annotated[float | None, typer.Option(help="Photon energy.")]
WavelengthM = Annotated[float | None, typer.Option(help="Wavelength, in place of the energy.")]
DistanceM = Annotated[float | None, typer.Option(help="Sample to detector.")]
DetectorPixelM = Annotated[float | None, typer.Option(help="Size of a detector pixel.")]
PixelSizeM = Annotated[float | None, typer.Option(help="Size of an object pixel, as stored.")]
Recipe = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file of these options, as inspect --yaml writes it.")
]
PatternsFile = Annotated[
    Path | None, typer.Option("--diffraction", help="File with the patterns, where the format keeps them apart.")
]
FarField = Annotated[
    bool, typer.Option("--far-field", help="Take patterns for far-field ones though they look like near-field shadows.")
]
MaskFile = Annotated[Path | None, typer.Option("--mask", help=".npy, True where a detector pixel is good.")]
DropFrames = Annotated[str | None, typer.Option(help='Rows of the file to leave out: "3,10:20".')]
Scratch = Annotated[Path | None, typer.Option(help="Folder for unpacked data; beside the store by default.")]


def reading_options(
    *,
    key: list[str] | None,
    centre: str | None,
    affine: str | None,
    flip_y: bool,
    flip_x: bool,
    swap_xy: bool,
    far_field: bool,
    **plain: Any,
) -> dict[str, Any]:
    """Fields of `IngestSpec` from the flags that were given; those of `plain` are fields already."""
    return given(
        keys=pairs(key),
        centre=None if centre is None else centre_yx(centre),
        affine=None if affine is None else numbers("--affine", affine, 4),
        # A format that fixes its axes refuses these flags, so only those that were set are handed on.
        **given(flip_y=flip_y or None, flip_x=flip_x or None, swap_xy=swap_xy or None, far_field=far_field or None),
        **plain,
    )


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


def progress_option(quiet: bool) -> bool | None:
    return False if quiet else None


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, so that every default stays where it is written."""
    return {name: value for name, value in options.items() if value is not None}


def numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise PtychodaskError(f"{flag} {text}: expected {count} numbers with commas between them")
    return values


def whole_numbers(flag: str, text: str, count: int) -> tuple[int, ...]:
    values = numbers(flag, text, count)
    if not all(value.is_integer() for value in values):
        raise PtychodaskError(f"{flag} {text}: expected whole numbers")
    return tuple(int(value) for value in values)


def numbers_in(flag: str, path: Path, what: str) -> NDArray[Any]:
    from ptychodask.io.npy_stream import read_npy

    try:
        return np.atleast_1d(read_npy(path))
    except PtychodaskError as error:
        raise PtychodaskError(f"{flag} {error}; expected a .npy of {what}") from error


def check_one_cluster(command: str, workers: int | None, scheduler: str | None) -> None:
    if workers is not None and scheduler is not None:
        raise PtychodaskError(f"{command}: --workers starts a cluster and --scheduler names one; pass one of them")


def client_for(
    workers: int | None,
    scheduler: str | None,
    tls: bool = False,
    tls_folder: Path | None = None,
    host: str | None = None,
) -> AbstractContextManager[Any]:
    """A client of new worker processes or of a running scheduler; None where neither is asked for."""
    from ptychodask.cluster import connected_client, credentials_in, local_client, temporary_credentials

    if tls and workers is None:
        raise PtychodaskError("--tls: goes with --workers; a running --scheduler is reached with --tls-folder")
    if tls_folder is not None and scheduler is None:
        raise PtychodaskError(f"--tls-folder {tls_folder}: goes with --scheduler; new --workers take --tls")
    if host is not None and workers is None:
        raise PtychodaskError(f"--host {host}: goes with --workers, which listen there")
    if workers is not None:
        return local_client(workers, security=temporary_credentials() if tls else None, **given(host=host))
    if scheduler is None:
        return nullcontext()
    return connected_client(scheduler, security=None if tls_folder is None else credentials_in(tls_folder))


def named(path: Path) -> Any:
    """A path or, where its name says so, a place in a bucket."""
    from ptychodask.places import parse_location

    return parse_location(path)


def beside(path: Any, name: str) -> Path:
    """A file beside a path; here, where the path is in a bucket."""
    return path.with_name(name) if isinstance(path, Path) else Path(name)


def check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise PtychodaskError(f"{path}: is a folder, or lies in no folder that exists; name another file")
