"""Ptychodus takes ptychodask for one of its reconstructors; against a stand-in of its interface, and the package."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from models_for_tests import LinearModel

from ptychodask.errors import PtychodaskError
from ptychodask.models import Model, ModelSpec, Optics
from ptychodask.models.networks import build_network
from ptychodask.ptychodus_plugin import reconstructor_library, scan_of
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate
from ptychodask.store import open_scan

N = 16
PIXEL_M = 7e-9


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate(
        tmp_path_factory.mktemp("ptychodus") / "a.zarr", n_pixels=N, n_patterns=60, step_px=3.0, dose=1e4,
        probe="zone_plate",
    )  # fmt: skip


@dataclass(frozen=True)
class PixelGeometry:
    width_m: float
    height_m: float


@dataclass(frozen=True)
class ObjectCenter:
    x_m: float
    y_m: float


class Object:
    def __init__(self, array, pixel_geometry, center, layer_spacing_m=()):
        self._array, self._pixel, self._center = (array if array.ndim == 3 else array[None]), pixel_geometry, center
        assert len(layer_spacing_m) + 1 == len(self._array)

    def get_array(self):
        return self._array

    def get_pixel_geometry(self):
        return self._pixel

    def get_center(self):
        return self._center


class ProbeSequence:
    def __init__(self, array, opr_weights, pixel_geometry):
        assert array.ndim == 4
        self._array, self._pixel = array, pixel_geometry

    def get_array(self):
        return self._array

    def get_pixel_geometry(self):
        return self._pixel


@dataclass(frozen=True)
class ProbePosition:
    index: int
    x_m: float
    y_m: float
    probe_photon_count: float | None = None


class ProbePositionSequence:
    def __init__(self, points):
        self._points = points

    def get_indexes(self):
        return np.array([point.index for point in self._points])

    def get_coordinates_x_m(self):
        return np.array([point.x_m for point in self._points])

    def get_coordinates_y_m(self):
        return np.array([point.y_m for point in self._points])

    def get_probe_photon_counts(self):
        counts = [point.probe_photon_count for point in self._points]
        return None if counts[0] is None else np.array(counts)


@dataclass(frozen=True)
class ProductMetadata:
    name: str
    comments: str
    detector_distance_m: float
    photon_energy_eV: float  # noqa: N815 the name is Ptychodus'
    probe_photon_count: float
    exposure_time_s: float
    mass_attenuation_m2_per_kg: float
    tomography_angle_deg: float


@dataclass(frozen=True)
class Product:
    metadata: ProductMetadata
    probe_positions: ProbePositionSequence
    probes: ProbeSequence
    object_: Object
    losses: list


@dataclass(frozen=True)
class LossValue:
    epoch: int
    value: float


@dataclass(frozen=True)
class ReconstructInput:
    diffraction_patterns: np.ndarray
    bad_pixels: np.ndarray
    product: Product


@dataclass(frozen=True)
class ReconstructOutput:
    product: Product
    progress: int = 0
    status: int = 0


@dataclass(frozen=True)
class TrainOutput:
    training_loss: list = field(default_factory=list)
    validation_loss: list = field(default_factory=list)
    progress: int = 0
    status: int = 0


def interface(*methods):
    """An abstract class with these methods."""
    return ABC.__class__("Interface", (ABC,), {name: abstractmethod(lambda self: None) for name in methods})


TrainableReconstructor = interface(
    "name", "get_progress_goal", "reconstruct", "is_model_loaded", "get_model_file_filter", "load_model_from_file",
    "get_model_file_extension", "save_model", "get_training_data_file_filter", "export_training_data", "train",
)  # fmt: skip


class ReconstructorLibrary(Iterable, ABC):
    def __init__(self, logger_name):
        super().__init__()
        self.logger_name = logger_name

    @property
    @abstractmethod
    def name(self): ...


STAND_IN = {
    "geometry": [PixelGeometry],
    "object": [Object, ObjectCenter],
    "probe": [ProbeSequence],
    "product": [Product, ProductMetadata, LossValue],
    "probe_positions": [ProbePosition, ProbePositionSequence],
    "reconstruct": [ReconstructInput, ReconstructOutput, ReconstructorLibrary, TrainOutput],
}


@pytest.fixture(params=["stand-in", "package"])
def api(request, monkeypatch):
    """The interface of Ptychodus: written down from its source, and the installed one."""
    if request.param == "stand-in":
        for name, classes in STAND_IN.items():
            module = ModuleType(f"ptychodus.api.{name}")
            vars(module).update({each.__name__: each for each in classes})
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for name in ("ptychodus", "ptychodus.api"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["ptychodus.api.reconstruct"].TrainableReconstructor = TrainableReconstructor
    else:
        pytest.importorskip("ptychodus.api.reconstruct", reason="needs the package ptychodus")
    found = {}
    for name in STAND_IN:
        found |= vars(__import__(f"ptychodus.api.{name}", fromlist=["*"]))
    return SimpleNamespace(**found)


def input_of(api, scan, object_yx=(30, 40), **changes):
    """What Ptychodus hands over for a scan."""
    pixel = api.PixelGeometry(width_m=PIXEL_M, height_m=PIXEL_M)
    points = [
        api.ProbePosition(index=int(i), x_m=float(x * PIXEL_M), y_m=float(y * PIXEL_M))
        for i, (y, x) in zip(scan.source_index, scan.position_yx_px, strict=True)
    ]
    product = api.Product(
        metadata=api.ProductMetadata("gold", "", 1.9, 8800.0, 1e4, 0.0, 0.0, 0.0),
        probe_positions=api.ProbePositionSequence(points),
        probes=api.ProbeSequence(scan.probe[None] / 3, None, pixel),
        object_=api.Object(np.ones(object_yx, np.complex64), pixel, api.ObjectCenter(x_m=0.0, y_m=0.0)),
        losses=[],
    )
    bad = np.zeros((N, N), bool)
    return api.ReconstructInput(scan.diffraction[:], bad, replace(product, **changes))


def only(library):
    (reconstructor,) = library
    return reconstructor


def test_the_library_has_one_reconstructor_that_fulfils_the_contract(api):
    library = reconstructor_library(LinearModel(members=1))
    assert isinstance(library, api.ReconstructorLibrary)
    assert isinstance(only(library), api.TrainableReconstructor)
    assert (library.name, only(library).name) == ("ptychodask", "Network")


def test_a_product_gets_the_object_that_ptychodask_makes(api, scan):
    """The same model on the same scan gives the same object, in the place that Ptychodus reads from the product."""
    model = LinearModel(members=1)
    given = input_of(api, scan)
    (output,) = only(reconstructor_library(model, groups_per_chunk=7)).reconstruct(given)
    expected = reconstruct(scan.store, model, groups_per_chunk=7, progress=False)
    assert (output.progress, output.status) == (1, 0)
    found = output.product.object_.get_array()
    assert (found.ndim, found.dtype) == (3, np.complex64)
    centre = output.product.object_.get_center()
    corner = [centre.y_m / PIXEL_M - found.shape[1] / 2, centre.x_m / PIXEL_M - found.shape[2] / 2]
    top, left = (round(float(value)) for value in np.array([expected.y[0], expected.x[0]]) - corner)
    inside = found[0, top : top + expected.sizes["y"], left : left + expected.sizes["x"]]
    # A probe of another scale gives other weights by rounding alone.
    np.testing.assert_allclose(inside, np.nan_to_num(expected["object"].values, nan=0.0), atol=1e-4)
    kept = replace(output.product, object_=given.product.object_, probes=given.product.probes)
    assert kept == given.product


@pytest.mark.parametrize(("calibration", "factor"), [("mean_counts", None), ("as_given", 1 / 9)])
def test_the_probe_of_the_answer_is_the_one_that_was_used(api, scan, calibration, factor):
    given = input_of(api, scan)
    (output,) = only(reconstructor_library(LinearModel(members=1), calibration=calibration)).reconstruct(given)
    total = (np.abs(output.product.probes.get_array()) ** 2).sum()
    expected = (
        scan.diffraction[:].sum(axis=(1, 2)).mean() if factor is None else factor * (np.abs(scan.probe) ** 2).sum()
    )
    assert total == pytest.approx(expected, rel=1e-5)


def test_what_ptychodus_hands_over_becomes_a_scan(api, scan, tmp_path):
    given = input_of(api, scan)
    bad = np.zeros((N, N), bool)
    bad[2, 5] = True
    made = scan_of(replace(given, bad_pixels=bad), tmp_path / "a.zarr", "as_given")
    order = np.argsort(made.source_index)
    np.testing.assert_allclose(made.position_yx_px[order], scan.position_yx_px, atol=1e-9)
    np.testing.assert_array_equal(made.diffraction[:][order], scan.diffraction[:])
    np.testing.assert_array_equal(made.mask, ~bad)
    assert (made.pixel_size_m, made.energy_ev, made.distance_m) == (PIXEL_M, 8800.0, 1.9)
    assert made.flux is None


def test_measured_photon_counts_become_the_flux(api, scan, tmp_path):
    counts = np.linspace(50, 150, scan.n_patterns)
    points = [
        api.ProbePosition(index=i, x_m=x * PIXEL_M, y_m=y * PIXEL_M, probe_photon_count=float(count))
        for i, ((y, x), count) in enumerate(zip(scan.position_yx_px, counts, strict=True))
    ]
    given = input_of(api, scan, probe_positions=api.ProbePositionSequence(points))
    made = scan_of(given, tmp_path / "a.zarr", "as_given")
    np.testing.assert_allclose(made.flux, (counts / counts.mean())[made.source_index], rtol=1e-6)


def test_pixels_that_are_not_square_are_refused(api, scan, tmp_path):
    oblong = api.Object(
        np.ones((9, 9), np.complex64),
        api.PixelGeometry(width_m=1e-9, height_m=2e-9),
        api.ObjectCenter(x_m=0.0, y_m=0.0),
    )
    with pytest.raises(PtychodaskError, match="the object's pixels are 2e-09 x 1e-09 m, expected square ones"):
        scan_of(input_of(api, scan, object_=oblong), tmp_path / "a.zarr", "as_given")


def test_without_a_model_nothing_is_predicted(api, scan):
    reconstructor = only(reconstructor_library())
    assert not reconstructor.is_model_loaded()
    with pytest.raises(PtychodaskError, match="no model is open; open or train one"):
        next(reconstructor.reconstruct(input_of(api, scan)))
    with pytest.raises(PtychodaskError, match="only a model of ptychodask's networks can be saved"):
        reconstructor.save_model("a.model")


def test_models_are_saved_and_opened(api, scan, tmp_path):
    spec, optics = ModelSpec(n_pixels=N, members=1, levels=2), Optics.of(scan)
    model = Model(spec, build_network(spec, optics).get_weights(), optics)
    first, second = only(reconstructor_library(model)), only(reconstructor_library())
    path = tmp_path / f"model{first.get_model_file_extension()}"
    first.save_model(path)
    for chosen in (path, path / "model.json"):
        second.load_model_from_file(chosen)
        assert second.is_model_loaded()
        assert second._model.content_hash == model.content_hash


def test_a_network_is_trained_on_what_was_exported_and_opened(api, scan, tmp_path):
    reconstructor = only(reconstructor_library(training={"epochs": 1, "levels": 2, "members": 1}))
    (tmp_path / "data").mkdir()
    with pytest.raises(PtychodaskError, match=r"data: contains no .npz to train on"):
        next(reconstructor.train(tmp_path / "data", tmp_path / "out"))
    reconstructor.export_training_data(tmp_path / "data" / "train_data.npz", input_of(api, scan))
    (output,) = reconstructor.train(tmp_path / "data", tmp_path / "out")
    assert len(output.training_loss) == len(output.validation_loss) == 1
    assert np.isfinite(output.training_loss[0].value)
    assert reconstructor.is_model_loaded()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ptychodask.model"]
    (predicted,) = reconstructor.reconstruct(input_of(api, scan))
    assert np.isfinite(predicted.product.object_.get_array()).all()


def test_ptychodus_can_choose_it(scan):
    """By the name that its settings file keeps."""
    pytest.importorskip("ptychodus.api.reconstruct", reason="needs the package ptychodus")
    from ptychodus.api.settings import SettingsRegistry
    from ptychodus.model.processing.api import ProcessingAlgorithmParameter
    from ptychodus.model.processing.settings import ProcessingSettings

    library = reconstructor_library(LinearModel(members=1))
    settings = ProcessingSettings(SettingsRegistry())
    chosen = ProcessingAlgorithmParameter(settings.algorithm, [library])
    chosen.set_value("ptychodask_network")
    assert chosen.get_current_reconstructor() is only(library)


def test_an_absent_or_older_ptychodus_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ptychodus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ptychodus", None)
    with pytest.raises(PtychodaskError, match=r"ptychodus: no module ptychodus.*; install Ptychodus 1.7 or newer"):
        reconstructor_library()
    older = {f"ptychodus.api.{name}": ModuleType(name) for name in STAND_IN}
    for name, module in ({"ptychodus": ModuleType("ptychodus"), "ptychodus.api": ModuleType("api")} | older).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(PtychodaskError, match=r"its interface has no LossValue, .*; install Ptychodus 1.7 or newer"):
        reconstructor_library()


def test_the_scan_that_it_reads_is_left_alone(api, scan):
    before = open_scan(scan.store).attributes
    list(only(reconstructor_library(LinearModel(members=1))).reconstruct(input_of(api, scan)))
    assert open_scan(scan.store).attributes == before
