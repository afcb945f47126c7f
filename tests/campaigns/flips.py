"""Single bits flipped in stored data: each must be named, and none may change an answer.

    python -m tests.campaigns.flips --flips 200

A scan, a result and a cache of patches are made; each flip changes one bit of one of their files of data, drawn over
all arrays alike. `check_store` must name the array, and reading all of it must fail in one line or give the same
values. Afterwards the bit is turned back.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ptychodask.errors import PtychodaskError
from ptychodask.inspection.integrity import check_store
from ptychodask.reconstruction import reconstruct
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.store import StoredScan
from ptychodask.store.groups import group

sys.path.insert(0, str(Path(__file__).parents[1]))

from models_for_tests import LinearModel

RIGHT = ("named, refused", "named, same")
"""Outcomes of a flip that harms nobody."""


def make_stores(folder: Path, model: Any, n_patterns: int) -> dict[str, Path]:
    """A scan, its result and its cache of patches."""
    scan = simulate(folder / "scan.zarr", n_pixels=16, n_patterns=n_patterns, dose=1e6, step_px=2.0, progress=False)
    group(folder / "scan.zarr")
    reconstruct(
        scan.store,
        model,
        out=folder / "object.zarr",
        cache=folder / "patches.zarr",
        polish=1,
        pyramid=True,
        split_half=True,
        progress=False,
    )
    return {name: folder / f"{name}.zarr" for name in ("scan", "object", "patches")}


def data_files(store: Path) -> dict[str, list[Path]]:
    """Files of data of each array."""
    arrays = {}
    for described in sorted(store.rglob("zarr.json")):
        files = [path for path in sorted(described.parent.glob("c/**/*")) if path.is_file()]
        if files:
            arrays[described.parent.relative_to(store).as_posix()] = files
    return arrays


def values_of(store: Path) -> dict[str, Any]:
    """All that a reader gets from a store."""
    if store.name == "scan.zarr":
        scan = StoredScan(store).scan
        names = "probe", "probe_initial", "position_yx_px", "scan_index", "source_index", "mask", "flux"
        stored = StoredScan(store)
        tables = [stored.table(name) for name in stored.table_names()]
        groups = [table.rows(0, len(table)) for table in tables if table is not None]
        arrays = {name: getattr(scan, name) for name in names if getattr(scan, name) is not None}
        truth = {} if scan.truth is None else {"truth": scan.truth.object}
        return {"diffraction": scan.diffraction[:], "groups": np.concatenate(groups), **truth, **arrays}
    if store.name == "object.zarr":
        ds = open_result(store).ptycho.compute()
        return {str(name): ds[name].values for name in ds.variables}
    scan = store.with_name("scan.zarr")
    ds = reconstruct(scan, LinearModel(), cache=store, split_half=True, polish=0, slow_phase=False, progress=False)
    return {str(name): ds[name].values for name in ds.variables}


def is_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """True if all values have the same bytes."""
    return all(np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes() for name in one)


def play(stores: dict[str, Path], n_flips: int, seed: int, tell: Callable[[str], None] = print) -> Counter[str]:
    """Flip bits one by one; returns how often each outcome was seen."""
    rng, outcomes = np.random.default_rng(seed), Counter[str]()
    targets = [(store, name, files) for store in stores.values() for name, files in data_files(store).items()]
    honest = {store: values_of(store) for store in stores.values()}
    for number in range(n_flips):
        store, name, files = targets[number % len(targets)]
        path = files[int(rng.integers(len(files)))]
        content = bytearray(path.read_bytes())
        bit = int(rng.integers(8 * len(content)))
        content[bit // 8] ^= 1 << bit % 8
        before = path.read_bytes()
        path.write_bytes(bytes(content))
        try:
            problems = check_store(store, progress=False).problems
            is_named = any(f"'{name}'" in problem for problem in problems)
        except PtychodaskError as error:
            is_named = name in str(error)
        try:
            reads = "same" if is_equal(honest[store], values_of(store)) else "CHANGED"
        except PtychodaskError:
            reads = "refused"
        except Exception as error:  # noqa: BLE001 - any other is what this looks for
            reads = f"TRACEBACK {type(error).__name__}"
        outcome = f"{'named' if is_named else 'UNNAMED'}, {reads}"
        outcomes[outcome] += 1
        if outcome not in RIGHT:
            tell(f"{store.name}: {name}: bit {bit} of {path.name}: {outcome}")
        path.write_bytes(before)
    return outcomes


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--flips", type=int, default=200)
    flags.add_argument("--patterns", type=int, default=300)
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stores = make_stores(Path(folder), LinearModel(), given.patterns)
        outcomes = play(stores, given.flips, given.seed)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:5d}  {outcome}")
    return int(any(outcome not in RIGHT for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
