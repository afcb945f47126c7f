"""Reconstructor for Ptychodus.

The input from Ptychodus is written as a scan, and the result is returned as a product. The interface is that of
AdvancedPhotonSource/ptychodus 1.7, ``ptychodus.api.reconstruct``. Ptychodus is imported only when
`reconstructor_library` is called.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import xarray as xr

from ptychodask.errors import PtychodaskError
from ptychodask.export import export
from ptychodask.export.content import Picture
from ptychodask.io.ingest import ingest
from ptychodask.io.quantities import SQUARENESS
from ptychodask.models import Model, load_model, save_model
from ptychodask.models.contract import MinimalModel
from ptychodask.progress import progress_bar
from ptychodask.reconstruction import reconstruct
from ptychodask.scan import Calibration, Scan
from ptychodask.store.write import write_scan
from ptychodask.training.train import train

logger = logging.getLogger(__name__)


MODULES = ("geometry", "object", "probe", "product", "reconstruct")
"""Modules of ``ptychodus.api`` that are imported."""


NEEDED = ("LossValue", "Object", "ObjectCenter", "ProbeSequence", "ReconstructOutput", "ReconstructorLibrary",
          "TrainableReconstructor", "TrainOutput")  # fmt: skip
"""Names from these modules that are used; older versions of Ptychodus lack some of them."""


NAME = "ptychodask"


MODEL_SUFFIX = ".model"
"""Suffix of a model bundle, which is a folder."""


def reconstructor_library(
    model: str | Path | MinimalModel | None = None,
    *,
    calibration: Calibration = "mean_counts",
    training: dict[str, Any] | None = None,
    **spec_fields: Any,
) -> Any:
    """Library for Ptychodus with one reconstructor, ptychodask's network.

    Parameters
    ----------
    model : path or model, optional
        Model to predict with, as for `reconstruct`; by default the user opens or trains one in Ptychodus.
    calibration : {"mean_counts", "as_given"}
        ``mean_counts`` scales the product's probe to the patterns, so that the object is relative to the mean
        transmission; ``as_given`` is for a probe with the photon counts of the patterns.
    training : dict, optional
        Fields of `TrainingSpec` for training in Ptychodus.
    **spec_fields
        Fields of `ReconstructionSpec`.

    Returns
    -------
    ptychodus.api.reconstruct.ReconstructorLibrary
        Its reconstructor is a ``TrainableReconstructor``. Ptychodus does not discover libraries: add this one to the
        list in ``model/core.py``.

    Raises
    ------
    PtychodaskError
        If Ptychodus is not installed, or has another interface.

    Examples
    --------
    Instead of Ptychodus' libraries, or in addition to them::

        ProcessingCore(task_manager, settings, product_api, [reconstructor_library("scan.pinn.model")])
    """
    api = _interface()
    kind = type("PtychodaskReconstructor", (_Reconstructor, api.TrainableReconstructor), {})
    one = kind(api, model, calibration, training or {}, spec_fields)
    library = type("PtychodaskLibrary", (_Library, api.ReconstructorLibrary), {})
    return library(one)


def _interface() -> SimpleNamespace:
    """Classes of Ptychodus that are used."""
    available: dict[str, Any] = {}
    try:
        for module in MODULES:
            available |= vars(importlib.import_module(f"ptychodus.api.{module}"))
    except ModuleNotFoundError as error:
        raise PtychodaskError(f"ptychodus: no module {error.name}; install Ptychodus 1.7 or newer (pip)") from error
    missing = [name for name in NEEDED if name not in available]
    if missing:
        raise PtychodaskError(f"ptychodus: its interface has no {', '.join(missing)}; install Ptychodus 1.7 or newer")
    return SimpleNamespace(**{name: available[name] for name in NEEDED})


class _Library:
    """Methods of a ``ReconstructorLibrary``."""

    def __init__(self, reconstructor: Any) -> None:
        super().__init__(NAME)  # type: ignore[call-arg]
        self._reconstructor = reconstructor

    @property
    def name(self) -> str:
        return NAME

    def __iter__(self) -> Iterator[Any]:
        yield self._reconstructor


class _Reconstructor:
    """Methods of a ``TrainableReconstructor``."""

    def __init__(
        self,
        api: SimpleNamespace,
        model: str | Path | MinimalModel | None,
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
        """Predict the object of a ``ReconstructInput``; yields one ``ReconstructOutput``."""
        if self._model is None:
            raise PtychodaskError("ptychodask: no model is open; open or train one")
        with tempfile.TemporaryDirectory() as folder:
            scan = scan_of(parameters, Path(folder) / "scan.zarr", self._calibration)
            result = reconstruct(str(scan.store), self._model, progress=False, **self._spec_fields)
            product = self._product(parameters.product, result, scan)
        yield self._api.ReconstructOutput(product=product, progress=self.get_progress_goal())

    def _product(self, given: Any, result: xr.Dataset, scan: Scan) -> Any:
        """Product with the object of a result and the scan's probe."""
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
        """Open a bundle or an archive of PtychoPINN.

        A bundle is given by its folder or the ``model.json`` in it.
        """
        path = Path(file_path)
        self._model = load_model(path.parent if path.name == "model.json" else path)

    def get_model_file_extension(self) -> str:
        return MODEL_SUFFIX

    def save_model(self, file_path: Path) -> None:
        """Write the open model as a bundle, which is a folder."""
        if not isinstance(self._model, Model):
            raise PtychodaskError(f"{file_path}: only a model of ptychodask's networks can be saved; open or train one")
        self._model = save_model(self._model, file_path, overwrite=True)

    def get_training_data_file_filter(self) -> str:
        return "NumPy Zipped Archive (*.npz)"

    def export_training_data(self, file_path: Path, parameters: Any) -> None:
        """Write a ``ReconstructInput`` as an NPZ of PtychoPINN.

        `train` and ``ptychodask ingest`` read this file.
        """
        with tempfile.TemporaryDirectory() as folder:
            scan = scan_of(parameters, Path(folder) / "scan.zarr", self._calibration)
            export(scan, file_path, format="ptychopinn", overwrite=True, progress=False)

    def train(self, input_path: Path, output_path: Path) -> Iterator[Any]:
        """Train a network and open it as the model.

        Trained on an NPZ, or on all in a folder; the bundle is written to `output_path`.
        """
        source = Path(input_path)
        files = sorted(source.glob("*.npz")) if source.is_dir() else [source]
        if not files:
            raise PtychodaskError(f"{source}: contains no .npz to train on; export training data into it")
        with tempfile.TemporaryDirectory() as folder:
            stores = [Path(folder) / f"{index}.zarr" for index in range(len(files))]
            for file, store in zip(files, stores, strict=True):
                ingest(file, store, format="ptychopinn", progress=False)
            out = Path(output_path) / f"{NAME}{MODEL_SUFFIX}"
            out.parent.mkdir(parents=True, exist_ok=True)
            trained = train(stores, out=out, overwrite=True, progress=False, **self._training)
        self._model = trained
        curves = {
            name: [self._api.LossValue(ceil(row["epoch"]), float(row[key])) for row in trained.history if key in row]
            for name, key in (("training_loss", "loss"), ("validation_loss", "held_out_loss"))
        }
        yield self._api.TrainOutput(**curves, progress=self.get_progress_goal())


def scan_of(parameters: Any, store: Path, calibration: Calibration) -> Scan:
    """Write the input of a Ptychodus reconstructor as a scan.

    Parameters
    ----------
    parameters : ptychodus.api.reconstruct.ReconstructInput
        Patterns (pattern, h, w) of counts with DC in the middle; bad pixels; a product with one position per pattern,
        in the same order.
    store : Path
        Store to write.
    calibration : str
        See `calibrate_probe`.

    Returns
    -------
    Scan
        Positions are in object pixels (metres over the pixel size); of a probe that varies (OPR), the first.

    Raises
    ------
    PtychodaskError
        If the object's pixels are not square, or `write_scan` refuses the scan.
    """
    product = parameters.product
    pixel = product.object_.get_pixel_geometry()
    if not (pixel.height_m > 0 and abs(pixel.width_m / pixel.height_m - 1) <= SQUARENESS):
        raise PtychodaskError(
            f"ptychodus: the object's pixels are {pixel.height_m:g} x {pixel.width_m:g} m, expected square ones; "
            "resample it to square pixels"
        )
    positions, probe = product.probe_positions, np.asarray(product.probes.get_array())
    if len(probe) > 1:
        logger.warning("the product has %d OPR modes of the probe; only the first is used", len(probe))
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
