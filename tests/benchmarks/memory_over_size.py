"""Peak memory above the loaded model's of worker, client and scheduler, for scans of growing size.

Each size runs in fresh processes: a client (this module again), a scheduler and one worker. A small scan comes first;
what is resident then is the baseline. The network gives constants. Scan and groups are made before, elsewhere.

    python -m tests.benchmarks.memory_over_size                          10^4, 10^5, 10^6 patterns
    python -m tests.benchmarks.memory_over_size --groups-per-chunk 512 --tile 256  the same cut whatever the size
    python -m tests.benchmarks.memory_over_size --quick                  10^3, 10^4
    python -m tests.benchmarks.memory_over_size --refined --n-pixels 32  2 10^4, 10^5, refined: slow phase, two sweeps
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ptychodask.bench import forget_peak, on_all, peak_above_baseline
from ptychodask.grouping import GroupingSpec
from ptychodask.reconstruction import reconstruct
from ptychodask.store.groups import group
from tests.benchmarks.measuring import CheapModel, cluster, noisy_scan, parser, tell

N_PIXELS = 16
MEMBERS = 4
SMALL = 1000


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--groups-per-chunk", type=int)
    flags.add_argument("--tile", type=int)
    flags.add_argument("--n-pixels", type=int, default=N_PIXELS)
    flags.add_argument("--refined", action="store_true", help="refine objects of scans with a step of half a pattern")
    flags.add_argument("--of", nargs=2, help="store of the small scan, and of the one that is measured")
    given = flags.parse_args()
    asked = {"groups_per_chunk": given.groups_per_chunk, "tile": given.tile}
    sizes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    sizes |= {"polish": 2, "slow_phase": True} if given.refined else {"polish": 0, "slow_phase": False}
    step_px = given.n_pixels / 2 if given.refined else 2.0
    if given.of:
        sys.stdout.write(json.dumps(measure(*map(Path, given.of), given.n_pixels, sizes)))
        return
    with tempfile.TemporaryDirectory() as folder:
        small = make(Path(folder, "small.zarr"), SMALL, given.n_pixels, step_px)
        unrefined = (10**3, 10**4) if given.quick else (10**4, 10**5, 10**6)
        for n_patterns in (2 * 10**4, 10**5) if given.refined else unrefined:
            store = make(Path(folder, f"{n_patterns}.zarr"), n_patterns, given.n_pixels, step_px)
            again = [sys.executable, "-m", "tests.benchmarks.memory_over_size", *sys.argv[1:]]
            told = subprocess.run([*again, "--of", small, store], check=True, capture_output=True).stdout
            tell("memory_over_size", patterns=n_patterns, **json.loads(told))


def make(store: Path, n_patterns: int, n_pixels: int, step_px: float) -> Path:
    noisy_scan(store, n_patterns, n_pixels, step_px=step_px)
    group(store, GroupingSpec(members=MEMBERS))
    return store


def measure(small: Path, store: Path, n_pixels: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """Peaks in MiB, and how long it took."""
    model = CheapModel(n_pixels=n_pixels, members=MEMBERS)
    with cluster(1) as (client, _):
        reconstruct(
            small,
            model,
            out=store.with_name("small.object.zarr"),
            client=client,
            overwrite=True,
            progress=False,
            **sizes,
        )
        on_all(client, forget_peak)
        result = reconstruct(
            store, model, out=store.with_name("object.zarr"), client=client, overwrite=True, progress=False, **sizes
        )
        peaks = on_all(client, peak_above_baseline)
    names = ("client_mib", "scheduler_mib", "worker_mib")
    found = {name: (peak.peak_above_baseline or 0) / 2**20 for name, peak in zip(names, peaks.values(), strict=True)}
    plan = {name: result.ptycho.records["plan"][name] for name in ("groups_per_chunk", "tile", "n_chunks", "n_tiles")}
    found["object_mib"] = result["object"].nbytes / 2**20
    return found | plan | {"seconds": result.ptycho.records["seconds"]["total"]}


if __name__ == "__main__":
    main()
