"""A reconstructor for Ptychodus: what its interface hands over becomes a scan, and the result a product.

The interface is that of AdvancedPhotonSource/ptychodus 1.7, ``ptychodus.api.reconstruct``. Ptychodus is imported when
`reconstructor_library` is called, and only then.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import xarray as xr

from ptychodask.export import export
from ptychodask.export.content import Picture
from ptychodask.io import ingest
from ptychodask.io.quantities import SQUARENESS
from ptychodask.models import Model, load_model, save_model
from ptychodask.prediction import PatchModel
from ptychodask.progress import progress_bar
from ptychodask.reconstruction import reconstruct
from ptychodask.scan import Calibration, PtychodaskError, Scan
from ptychodask.store import write_scan
from ptychodask.training import train

logger = logging.getLogger(__name__)

MODULES = ("geometry", "object", "probe", "product", "reconstruct")
"""Modules of ``ptychodus.api`` that are used."""

NEEDED = ("LossValue", "Object", "ObjectCenter", "ProbeSequence", "ReconstructOutput", "ReconstructorLibrary",
          "TrainableReconstructor", "TrainOutput")  # fmt: skip
"""Names of theirs that are used: an older Ptychodus has no such modules, or not all of these."""

NAME = "ptychodask"

MODEL_SUFFIX = ".model"
"""Ending of a bundle, which is a folder."""


def reconstructor_library(
    model: str | Path | PatchModel | None = None,
    *,
    calibration: Calibration = "mean_counts",
    training: dict[str, Any] | None = None,
    **spec_fields: Any,
) -> Any:
    """ptychodask as a library of reconstructors of Ptychodus, with one of them.

    Parameters
    ----------
    model : path or model, optional
        What to predict with, as `reconstruct` takes it; else the user opens or trains one there.
    calibration : {"mean_counts", "as_given"}
        ``mean_counts`` scales the product's probe to the patterns, the object is then relative to the mean
        transmission; ``as_given`` is for a probe in photons of the patterns.
    training : dict, optional
        Fields of `TrainingSpec` for training there.
    **spec_fields
        Fields of `ReconstructionSpec`.

    Returns
    -------
    ptychodus.api.reconstruct.ReconstructorLibrary
        Its reconstructor is a ``TrainableReconstructor``. Ptychodus lists its libraries where it is put together
        (``model/core.py``); it finds none by itself.

    Raises
    ------
    PtychodaskError
        If there is no Ptychodus, or one with another interface.

    Examples
    --------
    In place of Ptychodus' own libraries, or beside them::

        ProcessingCore(task_manager, settings, product_api, [reconstructor_library("scan.pinn.model")])
    """
    api = _interface()
    kind = type("PtychodaskReconstructor", (_Reconstructor, api.TrainableReconstructor), {})
    one = kind(api, model, calibration, training or {}, spec_fields)
    library = type("PtychodaskLibrary", (_Library, api.ReconstructorLibrary), {})
    return library(one)


def _interface() -> SimpleNamespace:
    """The names of Ptychodus that are used."""
    found: dict[str, Any] = {}
    try:
        for module in MODULES:
            found |= vars(importlib.import_module(f"ptychodus.api.{module}"))
    except ModuleNotFoundError as error:
        raise PtychodaskError(f"ptychodus: no module {error.name}; install Ptychodus 1.7 or newer (pip)") from error
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise PtychodaskError(f"ptychodus: its interface has no {', '.join(missing)}; install Ptychodus 1.7 or newer")
    return SimpleNamespace(**{name: found[name] for name in NEEDED})


class _Library:
    """The methods of a ``ReconstructorLibrary``."""

    def __init__(self, reconstructor: Any) -> None:
        super().__init__(NAME)  # type: ignore[call-arg]
        self._reconstructor = reconstructor

    @property
    def name(self) -> str:
        return NAME

    def __iter__(self) -> Iterator[Any]:
        yield self._reconstructor


class _Reconstructor:
    """The methods of a ``TrainableReconstructor``."""

    def __init__(
        self,
        api: SimpleNamespace,
        model: str | Path | PatchModel | None,
        calibration: Calibration,
        training: dict[str, Any],
        spec_fields: dict[str, Any],
    ) -> None:
        self._api, self._calibration, self._training, self._spec_fields = api, calibration, training, spec_fields
        self._model = load_model(model) if isinstance(model, str | Path) else model

    @property
    def name(self) -> str:
        return "Network"

    def get_progress_goal(self) -> int:
        return 1

    def reconstruct(self, parameters: Any) -> Iterator[Any]:
        """Predict the object of a ``ReconstructInput`` at once: one ``ReconstructOutput``."""
        if self._model is None:
            raise PtychodaskError("ptychodask: no model is open; open one, or train one")
        with tempfile.TemporaryDirectory() as folder:
            scan = scan_of(parameters, Path(folder) / "scan.zarr", self._calibration)
            result = reconstruct(str(scan.store), self._model, progress=False, **self._spec_fields)
            product = self._product(parameters.product, result, scan)
        yield self._api.ReconstructOutput(product=product, progress=self.get_progress_goal())

    def _product(self, given: Any, result: xr.Dataset, scan: Scan) -> Any:
        """The given product with the object of a result, and the probe that it was predicted with."""
        pixel = given.object_.get_pixel_geometry()
        picture = Picture(result).covering(scan)
        with progress_bar("object", picture.shape[0], "rows", progress=False) as bar:
            object_ = np.concatenate([values for _, values, _ in picture.seen_rows(bar)])
        y_px, x_px = picture.middle_yx_px
        centre = self._api.ObjectCenter(x_m=x_px * pixel.width_m, y_m=y_px * pixel.height_m)
        return replace(
            given,
            object_=self._api.Object(object_, pixel, centre),
            probes=self._api.ProbeSequence(scan.probe[None], None, given.probes.get_pixel_geometry()),
        )

    def is_model_loaded(self) -> bool:
        return self._model is not None

    def get_model_file_filter(self) -> str:
        return "ptychodask or PtychoPINN models (model.json *.zip)"

    def load_model_from_file(self, file_path: Path) -> None:
        """Open a bundle, named by its folder or the ``model.json`` in it, or an archive of PtychoPINN."""
        path = Path(file_path)
        self._model = load_model(path.parent if path.name == "model.json" else path)

    def get_model_file_extension(self) -> str:
        return MODEL_SUFFIX

    def save_model(self, file_path: Path) -> None:
        """Write the open model as a bundle, which is a folder."""
        if not isinstance(self._model, Model):
            raise PtychodaskError(f"{file_path}: only a model of ptychodask's own networks is saved; open or train one")
        self._model = save_model(self._model, file_path, overwrite=True)

    def get_training_data_file_filter(self) -> str:
        return "NumPy Zipped Archive (*.npz)"

    def export_training_data(self, file_path: Path, parameters: Any) -> None:
        """Write a ``ReconstructInput`` as PtychoPINN's NPZ, which `train` takes and ``ptychodask ingest`` reads."""
        with tempfile.TemporaryDirectory() as folder:
            scan = scan_of(parameters, Path(folder) / "scan.zarr", self._calibration)
            export(scan, file_path, format="ptychopinn", overwrite=True, progress=False)

    def train(self, input_path: Path, output_path: Path) -> Iterator[Any]:
        """Train a network on an NPZ, or on all that a folder holds, and open it; its bundle goes into `output_path`."""
        source = Path(input_path)
        files = sorted(source.glob("*.npz")) if source.is_dir() else [source]
        if not files:
            raise PtychodaskError(f"{source}: holds no .npz to train on; export training data into it")
        with tempfile.TemporaryDirectory() as folder:
            stores = [Path(folder) / f"{place}.zarr" for place in range(len(files))]
            for file, store in zip(files, stores, strict=True):
                ingest(file, store, format="ptychopinn", progress=False)
            out = Path(output_path) / f"{NAME}{MODEL_SUFFIX}"
            out.parent.mkdir(parents=True, exist_ok=True)
            trained = train(stores, out=out, overwrite=True, progress=False, **self._training)
        self._model = trained
        curves = {
            name: [self._api.LossValue(int(row["epoch"]), float(row[key])) for row in trained.history if key in row]
            for name, key in (("training_loss", "loss"), ("validation_loss", "held_out_loss"))
        }
        yield self._api.TrainOutput(**curves, progress=self.get_progress_goal())


def scan_of(parameters: Any, store: Path, calibration: Calibration) -> Scan:
    """What Ptychodus hands to a reconstructor, as a scan in a store.

    Parameters
    ----------
    parameters : ptychodus.api.reconstruct.ReconstructInput
        Patterns (pattern, h, w) of counts with DC in the middle; bad pixels; a product whose positions are those of
        the patterns, one for one.
    store : Path
        Store to make.
    calibration : str
        See `calibrate_probe`.

    Returns
    -------
    Scan
        Positions are metres over the size of the object's pixel; the probe is the first one where it varies (OPR).

    Raises
    ------
    PtychodaskError
        If the object's pixels are not square, or `write_scan` refuses the rest.
    """
    product = parameters.product
    pixel = product.object_.get_pixel_geometry()
    if not (pixel.height_m > 0 and abs(pixel.width_m / pixel.height_m - 1) <= SQUARENESS):
        raise PtychodaskError(
            f"ptychodus: the object's pixels are {pixel.height_m:g} x {pixel.width_m:g} m, expected square ones; "
            "bring them to one size"
        )
    positions, probe = product.probe_positions, np.asarray(product.probes.get_array())
    if len(probe) > 1:
        logger.warning("the product has %d OPR modes of the probe, of which the first is used", len(probe))
    bad = np.asarray(parameters.bad_pixels, bool)
    flux = positions.get_probe_photon_counts()
    return write_scan(
        store,
        diffraction=np.asarray(parameters.diffraction_patterns),
        position_yx_px=np.stack(
            [positions.get_coordinates_y_m() / pixel.height_m, positions.get_coordinates_x_m() / pixel.width_m], axis=1
        ),
        probe=probe[0],
        domain="counts",
        calibration=calibration,
        mask=~bad if bad.any() else None,
        flux=None if flux is None else np.asarray(flux, np.float32),
        source_index=np.asarray(positions.get_indexes()),
        pixel_size_m=float(pixel.height_m),
        energy_ev=float(product.metadata.photon_energy_eV) or None,
        distance_m=float(product.metadata.detector_distance_m) or None,
        provenance={"source": f"Ptychodus product {product.metadata.name!r}"},
        progress=False,
    )
