"""Objects of other programs: each file as its program documents it."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.io import read_foreign_result
from ptychodask.simulate import random_field

PIXEL_M = 5e-9


@pytest.fixture
def field():
    return random_field((30, 41), np.random.default_rng(1))


def numbers(center_y_m=2e-7, center_x_m=-1e-7, pixel_height_m=PIXEL_M, pixel_width_m=PIXEL_M):
    return locals()


def write_hdf5_product(path, object_, **attributes):
    with h5py.File(path, "w") as file:
        file.attrs["name"] = "sample"
        file["object"] = object_
        file["object"].attrs.update(attributes)
        file["probe"] = np.ones((1, 8, 8), np.complex64)
        file["probe_position_x_m"] = np.zeros(3)
    return path


def write_npz_product(path, object_, **attributes):
    positions = {"probe_position_x_m": np.zeros(3), "probe": np.ones((1, 8, 8), np.complex64)}
    np.savez(path, object=object_, **{f"object_{name}": value for name, value in attributes.items()}, **positions)
    return path


@pytest.mark.parametrize("algorithm", ["pty-chi", None])
def test_files_of_tike_and_pty_chi_have_no_frame(tmp_path, field, algorithm):
    # Tike's metadata are pickled, and stay unread.
    more = {"metadata": np.array([{"algorithm": "tike"}], object)} if algorithm is None else {"algorithm": algorithm}
    np.savez_compressed(tmp_path / "a.npz", reconstructed_object=field, reconstructed_probe=field[:8, :8], **more)
    found = read_foreign_result(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.object, field)
    assert (found.corner_yx_px, found.pixel_size_m, found.program) == (None, None, algorithm)


@pytest.mark.parametrize("write", [write_hdf5_product, write_npz_product])
def test_a_product_of_ptychodus_lies_where_it_says(tmp_path, field, write):
    path = write(tmp_path / ("a.h5" if write is write_hdf5_product else "a.npz"), field[None], **numbers())
    found = read_foreign_result(path)
    np.testing.assert_array_equal(found.object, field)
    # x_px = (x_m - center_x_m) / pixel_width_m + W / 2, so the pixel at x_px = 0 lies at center / pixel - W / 2.
    np.testing.assert_allclose(found.corner_yx_px, (40 - 15, -20 - 20.5))
    assert found.pixel_size_m == PIXEL_M


def test_layers_of_a_product_are_multiplied(tmp_path, field):
    path = write_hdf5_product(tmp_path / "a.h5", np.stack([field, 2j * field]), **numbers())
    np.testing.assert_allclose(read_foreign_result(path).object, 2j * field**2, rtol=1e-6)


def test_a_product_without_a_place_is_a_plain_array(tmp_path, field):
    path = write_hdf5_product(tmp_path / "a.h5", field.astype(np.complex128))
    with h5py.File(path, "a") as file:
        del file["probe"]
    found = read_foreign_result(path)
    np.testing.assert_array_equal(found.object, field)
    assert found.corner_yx_px is None


def test_plain_arrays_are_read(tmp_path, field):
    np.save(tmp_path / "a.npy", field)
    np.savez(tmp_path / "one.npz", obj=field[None], positions=np.zeros((5, 2)))
    np.savez(tmp_path / "two.npz", a=field, b=2 * field)
    np.testing.assert_array_equal(read_foreign_result(tmp_path / "a.npy").object, field)
    np.testing.assert_array_equal(read_foreign_result(tmp_path / "one.npz").object, field)
    np.testing.assert_array_equal(read_foreign_result(tmp_path / "two.npz", key="b").object, 2 * field)


def test_what_is_no_object_is_refused(tmp_path, field):
    np.savez(tmp_path / "two.npz", a=field, b=2 * field)
    np.savez(tmp_path / "real.npz", reconstructed_object=np.abs(field))
    np.savez(tmp_path / "pickled.npz", reconstructed_object=np.array([{}], object))
    (tmp_path / "text.npz").write_text("no archive")
    for name, key, message in (
        ("none.npz", None, "none.npz: no such file"),
        ("text.npz", None, "expected an NPZ or HDF5 file"),
        ("two.npz", None, r"has 2 complex arrays, expected one, .*; keys found: a, b; pass that of the object as key="),
        ("two.npz", "c", "two.npz: has no array 'c'; keys found: a, b"),
        ("real.npz", None, r"found float32 of shape \(30, 41\), expected a complex object"),
        ("pickled.npz", None, "contains pickled Python objects, which are never loaded"),
    ):
        with pytest.raises(PtychodaskError, match=message):
            read_foreign_result(tmp_path / name, key=key)
    np.save(tmp_path / "a.npy", field)
    with pytest.raises(PtychodaskError, match="contains one array without a name"):
        read_foreign_result(tmp_path / "a.npy", key="a")


def test_a_product_whose_place_makes_no_sense_is_refused(tmp_path, field):
    with pytest.raises(PtychodaskError, match="has no center_x_m; pass key='object'"):
        read_foreign_result(
            write_npz_product(tmp_path / "a.npz", field, **{k: v for k, v in numbers().items() if k != "center_x_m"})
        )
    with pytest.raises(PtychodaskError, match=r"pixels of 5e-09 x 6e-09 m .*, expected square pixels"):
        read_foreign_result(write_hdf5_product(tmp_path / "a.h5", field, **numbers(pixel_width_m=6e-9)))
