"""Time of stitching cached patches with another window, over that of predicting them.

An untrained PINN of four members, in one process, called once before. The cache is read soon after it was written, so
where memory suffices the system still holds its files.

    python -m tests.benchmarks.restitch            20 000 groups; the cache takes 1.3 GB
    python -m tests.benchmarks.restitch --quick    400 groups
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from ptychodask import models
from ptychodask.cluster.clients import client_for_run
from ptychodask.models import ModelSpec, Optics
from ptychodask.reconstruction import reconstruct
from tests.benchmarks.measuring import noisy_scan, parser, tell

N_PIXELS = 64
STEP_PX = 6.0
BATCH_SIZE = 16
SMALL = (0, 8, 0, 8)
"""Part of the object whose few groups warm the network up."""


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--n-groups", type=int, default=20_000)
    flags.add_argument("--n-filters-scale", type=int, default=1, help="width of the network")
    given = flags.parse_args()
    n_groups = 400 if given.quick else given.n_groups
    with tempfile.TemporaryDirectory() as folder, client_for_run(None) as client:
        store, cache = Path(folder, "scan.zarr"), Path(folder, "patches.zarr")
        scan = noisy_scan(store, n_groups, N_PIXELS, step_px=STEP_PX)
        spec = ModelSpec(n_pixels=N_PIXELS, n_filters_scale=given.n_filters_scale)
        network = models.save_model(models.untrained_model(spec, Optics.of(scan)), Path(folder, "pinn.model"))

        def seconds(**fields: Any) -> float:
            started = time.perf_counter()
            out = Path(folder, "object.zarr")
            reconstruct(
                store, network, out=out, client=client, overwrite=True, progress=False, batch_size=BATCH_SIZE, **fields
            )
            return time.perf_counter() - started

        seconds(roi=SMALL)
        predict_s = seconds()
        fill_s = seconds(cache=cache)
        restitch_s = seconds(cache=cache, window="cosine")
        cache_bytes = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    tell(
        "restitch",
        groups=n_groups,
        n_filters_scale=given.n_filters_scale,
        predict_s=predict_s,
        predict_and_keep_s=fill_s,
        restitch_s=restitch_s,
        ratio=restitch_s / predict_s,
        cache_mib=cache_bytes / 2**20,
    )


if __name__ == "__main__":
    main()
