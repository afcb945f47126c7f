"""Writes a small scan, result, cache of patches, stopped run and model bundle, as the installed version stores them.

    python -m tests.stored.make FOLDER      then zip the folder's content as version_X.zip

`version_0_1.zip` was written by version 0.1; tests/test_stored_versions.py opens it with the present version.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

import ptychodask
from ptychodask.models import ModelSpec, Optics, save_model, untrained_model
from ptychodask.reconstruction.ledger import Ledger

VARIABLES = ("object", "weight", "uncertainty", "count")
SIZES = {"groups_per_chunk": 12, "tile": 16, "batch_size": 12}


class FixedModel:
    """A network of sums and products of its inputs, the same bits on any machine."""

    content_hash, kind, path, output, members, n_pixels = "fixed", "fixed", None, "member", 4, 16

    def bind(self, scan):
        return self

    def compile(self, batch_size):
        def call(x, offset_yx_px):
            member = np.moveaxis(x, -1, 1)
            patches = np.empty(member.shape, np.complex64)
            patches.real = member + np.float32(0.5)
            patches.imag = member[:, :1] * np.float32(0.25) + offset_yx_px[..., 0, None, None] * np.float32(0.125)
            return patches

        return call


def stop_after_two_tiles() -> None:
    add, finished = Ledger.add, []

    def interrupted(self, kind, *rest):
        add(self, kind, *rest)
        finished.append(kind)
        if finished.count("tile") == 2:
            raise KeyboardInterrupt

    Ledger.add = interrupted


def main(folder: Path) -> None:
    store = folder / "scan.zarr"
    scan = ptychodask.simulate(store, n_patterns=60, n_pixels=16, step_px=3.0, dose=1e5, seed=5, progress=False)
    ptychodask.group(store)
    result = folder / "result.zarr"
    ptychodask.reconstruct(store, FixedModel(), out=result, split_half=True, pyramid=True, progress=False, **SIZES)
    for name in ("predicted", "from_cache"):
        plain = ptychodask.reconstruct(store, FixedModel(), cache=folder / "patches.zarr", progress=False, **SIZES)
        np.savez(folder / f"{name}.npz", **{one: plain[one].values for one in VARIABLES})
    spec = ModelSpec(n_pixels=16, members=4, levels=1, projections_before=1, projections_after=1)
    model = untrained_model(spec, Optics.of(scan))
    save_model(model, folder / "small.model")
    x = np.linspace(0, 1, 2 * 16 * 16 * 4, dtype=np.float32).reshape(2, 16, 16, 4)
    patches = model.bind(scan).predict(x, np.zeros((2, 4, 2), np.float32))
    np.savez(folder / "small_predictions.npz", x=x, patches=patches)
    stop_after_two_tiles()
    with suppress(KeyboardInterrupt):
        ptychodask.reconstruct(store, FixedModel(), out=folder / "stopped.zarr", progress=False, **SIZES)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True)
    main(Path(sys.argv[1]))
