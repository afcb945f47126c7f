"""Ptychodus files (HDF5 or NPZ): products and patterns.

A product is object, probe and positions. Names and shapes are those of AdvancedPhotonSource/ptychodus,
``h5_product_file.py``, ``npz_product_file.py`` and ``api/io.py``. Two attributes were renamed in about version 1.6
(``probe_energy_eV`` is ``photon_energy_eV`` now, ``mass_attenuation_m2_kg`` is ``mass_attenuation_m2_per_kg``): both
are written, so that every version reads the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ptychodask.export.content import Content, counts, counts_dtype, pattern_rows
from ptychodask.export.hdf5_disk import Hdf5Disk
from ptychodask.export.npz_stream import NpzWriter
from ptychodask.progress import Progress

UNKNOWN = 0.0
"""Value that Ptychodus itself writes for an unknown quantity."""


def write(content: Content, path: Path, bar: Progress) -> None:
    """Write a product if there is an object, else a scan's patterns.

    Notes
    -----
    Positions are those of the scan times the pixel size. Ptychodus records the centre of the object: a patch of N
    pixels at x_m begins at column (x_m − center_x_m) / pixel_width_m + (W − N) / 2, so the centre is
    `Content.middle_xy_m`. Unseen pixels are 0. Losses are empty: they are not part of a result.
    """
    if content.picture is None:
        _write_patterns(content, path, bar)
    elif path.suffix == ".npz":
        _write_npz(content, path, bar)
    else:
        _write_hdf5(content, path, bar)


def _metadata(content: Content) -> dict[str, Any]:
    energy_ev = content.known("energy_ev")
    return {
        "name": content.name,
        "comments": "reconstructed with ptychodask",
        "detector_object_distance_m": content.known("distance_m"),
        "photon_energy_eV": energy_ev,
        "probe_energy_eV": energy_ev,
        "probe_photon_count": float((np.abs(content.measured.probe) ** 2).sum(dtype=np.float64)),
        "exposure_time_s": UNKNOWN,
        "mass_attenuation_m2_per_kg": UNKNOWN,
        "mass_attenuation_m2_kg": UNKNOWN,
        "tomography_angle_deg": UNKNOWN,
    }


def _arrays(content: Content) -> dict[str, Any]:
    """All arrays of a product except the object.

    The probe has a leading axis of OPR modes, of length one.
    """
    x_m, y_m = content.position_xy_m
    return {
        "probe_position_indexes": content.frame,
        "probe_position_x_m": x_m,
        "probe_position_y_m": y_m,
        "probe": content.measured.probe[None],
        "object_layer_spacing_m": np.zeros(0),
        "loss_epochs": np.zeros(0, np.int64),
        "loss_values": np.zeros(0),
    }


def _pixel(content: Content) -> dict[str, float]:
    return {name: content.known("pixel_size_m") for name in ("pixel_width_m", "pixel_height_m")}


def _centre(content: Content) -> dict[str, float]:
    return dict(zip(("center_x_m", "center_y_m"), content.middle_xy_m, strict=True))


def _write_hdf5(content: Content, path: Path, bar: Progress) -> None:
    with Hdf5Disk(path) as disk, h5py.File(disk, "w") as file:
        file.attrs.update(_metadata(content))
        for name, values in _arrays(content).items():
            file[name] = values
        file["probe"].attrs.update(_pixel(content))
        object_ = file.create_dataset("object", (1, *content.object.shape), np.complex64)
        object_.attrs.update(_centre(content) | _pixel(content))
        for rows, values, _ in disk.between(content.object.seen_rows(bar)):
            object_[0, rows] = values


def _write_npz(content: Content, path: Path, bar: Progress) -> None:
    numbers = {f"probe_{name}": value for name, value in _pixel(content).items()}
    numbers |= {f"object_{name}": value for name, value in (_centre(content) | _pixel(content)).items()}
    with NpzWriter(path) as file:
        for name, values in (_metadata(content) | _arrays(content) | numbers).items():
            file.put(name, values)
        blocks = (values for _, values, _ in content.object.seen_rows(bar))
        file.put_blocks("object", (1, *content.object.shape), np.complex64, blocks)


def _write_patterns(content: Content, path: Path, bar: Progress) -> None:
    """Write patterns as counts, with their rows in the source.

    The row pairs a pattern with a position of a product.
    """
    scan = content.measured
    shape, dtype = (scan.n_patterns, scan.n_pixels, scan.n_pixels), counts_dtype(scan)
    others = {"indexes": content.frame, "bad_pixels": np.zeros(shape[1:], bool) if scan.mask is None else ~scan.mask}
    blocks = ((rows, counts(scan, rows)) for rows in pattern_rows(scan, bar))
    if path.suffix == ".npz":
        with NpzWriter(path) as npz:
            for name, values in others.items():
                npz.put(name, values)
            npz.put_blocks("patterns", shape, dtype, (block for _, block in blocks))
        return
    with Hdf5Disk(path) as disk, h5py.File(disk, "w") as file:
        for name, values in others.items():
            file[name] = values
        patterns = file.create_dataset("patterns", shape, dtype, chunks=(1, *shape[1:]), compression="lzf")
        for side in ("width", "height"):
            patterns.attrs[f"detector_pixel_{side}_m"] = content.detector_pixel_m
        for rows, block in disk.between(blocks):
            patterns[rows] = block
