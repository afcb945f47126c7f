"""CXI, the HDF5 format of the Coherent X-ray Imaging Data Bank.

Groups follow the CXI specification 1.6 (cxidb.org), in SI units: ``image_1`` is the probe, ``image_2`` the object, each
with the coordinates of its middle; positions are in ``sample_1/geometry_1/translation``. Data that the specification
does not cover are in ``entry_1/ptychodus``, as in CXI files from Ptychodus.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from ptychodask.export.content import Content, counts, counts_dtype, pattern_rows
from ptychodask.export.hdf5_disk import Hdf5Disk
from ptychodask.io.geometry import HC_EV_M
from ptychodask.progress import Progress

CXI_VERSION = 160
"""Version of the specification times 100."""

INVALID = 1
"""Bit of a CXI mask for invalid pixels."""

JOULE_PER_EV = 1.602176634e-19
"""Elementary charge, exact (CODATA 2018)."""

ENTRY = "entry_1"
DETECTOR = f"{ENTRY}/instrument_1/detector_1"
SOURCE = f"{ENTRY}/instrument_1/source_1"
TRANSLATION = f"{ENTRY}/sample_1/geometry_1/translation"


def write(content: Content, path: Path, bar: Progress) -> None:
    """Write an object with probe and positions, or a scan with patterns.

    Notes
    -----
    Translations (pattern, 3) are x, y, z of the probe in scan coordinates, metres, z = 0. Patterns are counts, as
    stored or as the squares of amplitudes; the detector's mask is 0 for good pixels. Unseen pixels of the object are 0,
    and marked in its mask. Energy is in joules.
    """
    with Hdf5Disk(path) as disk, h5py.File(disk, "w") as file:
        file["cxi_version"] = CXI_VERSION
        file[f"{ENTRY}/title"] = content.name
        file[f"{ENTRY}/sample_1/name"] = content.name
        _put_positions(file, content)
        _put_instrument(file, content)
        _put_probe(file, content)
        if content.picture is None:
            _put_patterns(file, content, disk, bar)
        else:
            _put_object(file, content, disk, bar)


def _put_positions(file: h5py.File, content: Content) -> None:
    x_m, y_m = content.position_xy_m
    file[TRANSLATION] = np.stack([x_m, y_m, np.zeros_like(x_m)], axis=1)
    file[f"{ENTRY}/data_1/translation"] = h5py.SoftLink(f"/{TRANSLATION}")
    file[f"{ENTRY}/ptychodus/probe_position_indexes"] = content.frame


def _put_instrument(file: h5py.File, content: Content) -> None:
    detector = file.create_group(DETECTOR)
    if content.energy_ev is not None:
        file[f"{SOURCE}/energy"] = content.energy_ev * JOULE_PER_EV
        file[f"{SOURCE}/wavelength"] = HC_EV_M / content.energy_ev
    if content.distance_m is not None:
        detector["distance"] = content.distance_m
    if content.energy_ev is not None and content.distance_m is not None:
        detector["x_pixel_size"] = detector["y_pixel_size"] = content.detector_pixel_m
    if content.measured.mask is not None:
        detector["mask"] = np.where(content.measured.mask, 0, INVALID).astype(np.uint32)


def _put_probe(file: h5py.File, content: Content) -> None:
    probe = content.measured.probe
    group = _image(file, "image_1", probe.shape[1:], (0.0, 0.0), content)
    group["data"] = probe
    group["data"].attrs["axes"] = "mode:y:x"
    for name in ("width", "height"):
        file[f"{ENTRY}/ptychodus/probe_pixel_{name}_m"] = content.known("pixel_size_m")
    file[f"{SOURCE}/illumination"] = h5py.SoftLink(f"/{ENTRY}/image_1/data")


def _put_object(file: h5py.File, content: Content, disk: Hdf5Disk, bar: Progress) -> None:
    shape, middle_xy_m = content.object.shape, content.middle_xy_m
    group = _image(file, "image_2", shape, middle_xy_m, content)
    data = group.create_dataset("data", shape, np.complex64)
    data.attrs["axes"] = "y:x"
    mask = group.create_dataset("mask", shape, np.uint32, chunks=True, compression="lzf")
    for rows, values, seen in disk.between(content.object.seen_rows(bar)):
        data[rows] = values
        mask[rows] = np.where(seen, 0, INVALID)
    geometry = dict(zip(("center_x", "center_y"), middle_xy_m, strict=True))
    geometry |= dict.fromkeys(("pixel_width", "pixel_height"), content.known("pixel_size_m"))
    for name, value in geometry.items():
        file[f"{ENTRY}/ptychodus/object_{name}_m"] = value


def _image(
    file: h5py.File, name: str, shape: tuple[int, ...], middle_xy_m: tuple[float, float], content: Content
) -> h5py.Group:
    """Group for a real-space image, with its geometry; `shape` is (y, x)."""
    group = file.create_group(f"{ENTRY}/{name}")
    pixel_m = content.known("pixel_size_m")
    group["image_size"] = np.array([shape[1] * pixel_m, shape[0] * pixel_m, 0.0])
    group["image_center"] = np.array([*middle_xy_m, 0.0])
    group["data_space"], group["data_type"] = "real", "amplitude"
    group["source_1"] = h5py.SoftLink(f"/{SOURCE}")
    group["detector_1"] = h5py.SoftLink(f"/{DETECTOR}")
    return group


def _put_patterns(file: h5py.File, content: Content, disk: Hdf5Disk, bar: Progress) -> None:
    scan = content.measured
    shape = (scan.n_patterns, scan.n_pixels, scan.n_pixels)
    data = file.create_dataset(
        f"{DETECTOR}/data", shape, counts_dtype(scan), chunks=(1, *shape[1:]), compression="gzip", shuffle=True
    )
    file[f"{ENTRY}/data_1/data"] = h5py.SoftLink(f"/{DETECTOR}/data")
    for rows, block in disk.between((rows, counts(scan, rows)) for rows in pattern_rows(scan, bar)):
        data[rows] = block
