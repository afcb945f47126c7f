"""Files of other programs, written by what is known of their formats: for tests of the readers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

ENERGY_EV, DISTANCE_M, DETECTOR_PIXEL_M = 8800.0, 2.0, 75e-6

HC_EV_M = 1.239841984332e-6
JOULE_PER_EV = 1.602176634e-19


@dataclass(frozen=True, eq=False)
class Measured:
    """What each of the files holds, in the order and units of `ptychodask`."""

    patterns: np.ndarray
    position_yx_m: np.ndarray
    probe: np.ndarray
    mask: np.ndarray

    @property
    def n_pixels(self):
        return self.patterns.shape[1]

    @property
    def pixel_m(self):
        return HC_EV_M / ENERGY_EV * DISTANCE_M / (self.n_pixels * DETECTOR_PIXEL_M)


def measured(n_patterns=24, n_pixels=16, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.indices((n_pixels, n_pixels)) - n_pixels // 2
    light = 400 * np.exp(-(y**2 + x**2) / (n_pixels / 6) ** 2)
    mask = np.ones((n_pixels, n_pixels), bool)
    mask[0, 3] = False
    return Measured(
        patterns=rng.poisson(light, (n_patterns, n_pixels, n_pixels)).astype(np.uint16) * mask,
        position_yx_m=rng.uniform(-3e-7, 5e-7, (n_patterns, 2)),
        probe=(rng.normal(size=(2, n_pixels, n_pixels)) + 1j * rng.normal(size=(2, n_pixels, n_pixels))).astype("c8"),
        mask=mask,
    )


def write_product(path, of: Measured, indexes=None, **attributes):
    """Ptychodus' ``h5_product_file.py``."""
    n = len(of.position_yx_m)
    with h5py.File(path, "w") as file:
        file.attrs.update(
            {
                "name": "star",
                "comments": "",
                "detector_object_distance_m": DISTANCE_M,
                "probe_energy_eV": ENERGY_EV,
                "probe_photon_count": 1e5,
                "exposure_time_s": 0.1,
                "mass_attenuation_m2_kg": 0.0,
            }
            | attributes
        )
        file["probe_position_indexes"] = np.arange(n, dtype=np.int32) if indexes is None else np.asarray(indexes)
        file["probe_position_x_m"], file["probe_position_y_m"] = of.position_yx_m[:, 1], of.position_yx_m[:, 0]
        file["probe"] = of.probe[None]
        file["object"] = np.ones((1, 60, 70), np.complex64)
        for name in ("probe", "object"):
            file[name].attrs.update({"pixel_width_m": of.pixel_m, "pixel_height_m": of.pixel_m})
        file["object"].attrs.update({"center_x_m": 1e-7, "center_y_m": 2e-7})
        file["object_layer_spacing_m"] = np.zeros(0)
        file["loss_epochs"], file["loss_values"] = np.arange(3), np.ones(3)
    return path


def write_product_npz(path, of: Measured):
    """Its twin in NPZ: attributes as keys."""
    np.savez(
        path,
        name="star",
        detector_object_distance_m=DISTANCE_M,
        probe_energy_eV=ENERGY_EV,
        probe_position_indexes=np.arange(len(of.position_yx_m)),
        probe_position_x_m=of.position_yx_m[:, 1],
        probe_position_y_m=of.position_yx_m[:, 0],
        probe=of.probe,
        probe_pixel_width_m=of.pixel_m,
        probe_pixel_height_m=of.pixel_m,
        object=np.ones((60, 70), np.complex64),
    )
    return path


def write_patterns(path, of: Measured, indexes=None):
    """Ptychodus' patterns, in HDF5 or NPZ."""
    arrays = {
        "indexes": np.arange(len(of.patterns)) if indexes is None else np.asarray(indexes),
        "patterns": of.patterns,
        "bad_pixels": ~of.mask,
    }
    if Path(path).suffix == ".npz":
        np.savez(path, **arrays)
        return path
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, compression="lzf" if values.ndim == 3 else None)
    return path


def write_pair(folder, of: Measured, name="scan1"):
    """``NAME_dp.hdf5`` and ``NAME_para.hdf5``, as pty-chi's tests have them."""
    para = write_product(folder / f"{name}_para.hdf5", of)
    with h5py.File(folder / f"{name}_dp.hdf5", "w") as file:
        file["dp"] = of.patterns.astype(np.float32)
    return para


def write_cxi(path, of: Measured, *, basis=None, **changed):
    """Version 1.6; `changed` replaces values by their last name."""
    values = {
        "energy": ENERGY_EV * JOULE_PER_EV,
        "distance": DISTANCE_M,
        "x_pixel_size": DETECTOR_PIXEL_M,
        "y_pixel_size": DETECTOR_PIXEL_M,
    } | changed
    with h5py.File(path, "w") as file:
        file["cxi_version"] = 160
        source = file.create_group("entry_1/instrument_1/source_1")
        source["energy"] = values.pop("energy")
        source["illumination"] = of.probe
        detector = file.create_group("entry_1/instrument_1/detector_1")
        for name, value in values.items():
            detector[name] = value
        detector["data"] = of.patterns
        detector["mask"] = np.where(of.mask, 0, 1).astype(np.uint32)
        xyz = np.zeros((len(of.position_yx_m), 3))
        xyz[:, :2] = of.position_yx_m[:, ::-1]
        if basis is not None:
            detector["basis_vectors"] = basis
        file["entry_1/sample_1/geometry_1/translation"] = xyz
        file["entry_1/data_1/data"] = h5py.SoftLink("/entry_1/instrument_1/detector_1/data")
        file["entry_1/data_1/translation"] = h5py.SoftLink("/entry_1/sample_1/geometry_1/translation")
    return path


def write_nexus(path, of: Measured, *, raster=None, units="um", link=None):
    """NXcxi_ptycho; patterns (npts_x, npts_y, h, w) of a raster, in the file or behind a link to another."""
    metres = {"m": 1.0, "um": 1e-6, "nm": 1e-9}[units]
    patterns = of.patterns if raster is None else of.patterns.reshape(*raster, *of.patterns.shape[1:])

    def put(group, name, value, unit):
        group[name] = value
        group[name].attrs["units"] = unit

    with h5py.File(path, "w") as file:
        file["entry_1/definition"] = "NXcxi_ptycho"
        instrument = file.create_group("entry_1/instrument_1")
        put(instrument.create_group("source_1"), "energy", 3.0, "GeV")
        put(instrument.create_group("beam_1"), "energy", ENERGY_EV / 1e3, "keV")
        detector = instrument.create_group("detector_1")
        put(detector, "distance", DISTANCE_M * 1e3, "mm")
        put(detector, "x_pixel_size", DETECTOR_PIXEL_M * 1e6, "um")
        put(detector, "y_pixel_size", DETECTOR_PIXEL_M * 1e6, "um")
        xyz = np.zeros((len(of.position_yx_m), 3))
        xyz[:, :2] = of.position_yx_m[:, ::-1] / metres
        put(detector, "translation", xyz, units)
        data = file.create_group("entry_1/data_1")
        data["translation"] = h5py.SoftLink("/entry_1/instrument_1/detector_1/translation")
        if link is None:
            detector["data"] = patterns
            data["data"] = h5py.SoftLink("/entry_1/instrument_1/detector_1/data")
        else:
            with h5py.File(link, "w") as other:
                other["frames"] = patterns
            detector["data"] = h5py.ExternalLink(Path(link).name, "/frames")
    return path


def write_hxn(path, of: Measured):
    """Amplitudes with the direct beam at [0, 0], positions (2, n) in micrometres, x first."""
    with h5py.File(path, "w") as file:
        file["diffamp"] = np.fft.ifftshift(np.sqrt(of.patterns.astype(np.float32)), axes=(1, 2))
        file["points"] = of.position_yx_m[:, ::-1].T * 1e6
        file["lambda_nm"] = HC_EV_M / ENERGY_EV * 1e9
        file["z_m"] = DISTANCE_M
        file["ccd_pixel_um"] = DETECTOR_PIXEL_M * 1e6
    return path
