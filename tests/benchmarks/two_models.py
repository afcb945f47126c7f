"""Time of two networks in one pass over the patterns, over the sum of what each takes alone.

Untrained networks, a PINN of four members and a baseline, in one process. Each is called once before, so that starting
up is left out. The two alone are measured before the pass and after it, for a machine's load changes.

    python -m tests.benchmarks.two_models            10 000 groups
    python -m tests.benchmarks.two_models --quick    400 groups
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
"""Part of the object whose few groups warm a network up."""

SPECS = {"PtychoPINN": ModelSpec(n_pixels=N_PIXELS), "Baseline": ModelSpec(kind="baseline", members=1)}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--n-groups", type=int, default=10_000)
    given = flags.parse_args()
    n_groups = 400 if given.quick else given.n_groups
    with tempfile.TemporaryDirectory() as folder, client_for_run(None) as client:
        store = Path(folder, "scan.zarr")
        optics = Optics.of(noisy_scan(store, n_groups, N_PIXELS, step_px=STEP_PX))
        networks = {
            label: models.save_model(models.untrained_model(spec, optics), Path(folder, f"{label}.model"))
            for label, spec in SPECS.items()
        }

        def seconds(model: Any, **fields: Any) -> float:
            started = time.perf_counter()
            out = Path(folder, "object.zarr")
            reconstruct(
                store, model, out=out, client=client, overwrite=True, progress=False, batch_size=BATCH_SIZE, **fields
            )
            return time.perf_counter() - started

        seconds(networks, roi=SMALL)
        before = [seconds(network) for network in networks.values()]
        both = seconds(networks)
        after = [seconds(network) for network in networks.values()]
    tell(
        "two_models",
        groups=n_groups,
        models=list(networks),
        alone_before_s=before,
        both_s=both,
        alone_after_s=after,
        ratio=2 * both / (sum(before) + sum(after)),
    )


if __name__ == "__main__":
    main()
