"""Cost of refinement in sweeps of version 0.1: processor time of each stage, in one run and one thread.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.refinement_cost            700 patterns, zone plate
    OMP_NUM_THREADS=1 python -m tests.benchmarks.refinement_cost --patterns 4000

One sweep is the time per pattern of `called_for`, the function of version 0.1 below, times the patterns. The stages are
those of `reconstruct` with its defaults, in one process, with all that they read and write; the network's own time is
told beside them. A transform of N² is timed too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft

from ptychodask.forward import footprint_corners, project_modulus, shift_ramp
from ptychodask.reconstruction import reconstruct, stages
from ptychodask.scan import Scan
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from tests.benchmarks.measuring import parser, tell

NETWORK = "pretrained:pinn-n64-c4"


def called_for(object_: Any, corner: tuple[int, int], scan: Scan, index: Any) -> tuple[Any, list[float]]:
    """Sum of a sweep as version 0.1 had it: change of an object, and its misfits."""
    n_pixels = scan.n_pixels
    change, totals = np.zeros(object_.shape, np.complex128), np.zeros(3)
    spectrum = scipy.fft.fft2(scan.probe)
    position = scan.position_yx_px[index]
    start = footprint_corners(position, n_pixels) - corner
    for first in range(0, len(index), 64):
        batch = np.arange(first, min(first + 64, len(index)))
        measured = scipy.fft.ifftshift(scan.amplitude(index[batch]), axes=(1, 2))
        for j, amplitude in zip(batch, measured, strict=True):
            frame = tuple(slice(side, side + n_pixels) for side in start[j])
            ramp = shift_ramp(position[j] - np.floor(position[j]), n_pixels, scan.probe.dtype)
            shifted = scipy.fft.ifft2(spectrum * ramp)
            wave, model = project_modulus(shifted * object_[frame], amplitude, None)
            change[frame] += (np.conj(shifted) * wave).sum(axis=0)
            difference = (model - amplitude).astype(np.float64)
            totals += np.abs(difference).sum(), amplitude.sum(dtype=np.float64), (difference**2).sum()
    return change, totals.tolist()


def processor_s(function: Callable[[], Any], repeats: int = 3) -> float:
    """Shortest processor time of some calls."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return min(found)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--patterns", type=int, default=700)
    flags.add_argument("--probe", default="zone_plate")
    given = flags.parse_args()
    spent: dict[str, float] = {"slow_phase": 0.0, "sweeps": 0.0, "whole": 0.0}

    def timed(name: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.process_time()
            try:
                return honest(*arguments)
            finally:
                spent[name] += time.process_time() - started

        return run

    for method, name in (("_solve", "slow_phase"), ("_sweep", "sweeps"), ("run", "whole")):
        setattr(stages.Refinement, method, timed(name, getattr(stages.Refinement, method)))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "scan.zarr")
        fields = {"step_px": 7.0, "dose": 1e6, "n_patterns": given.patterns, "probe": given.probe}
        simulate(store, seed=2, progress=False, **fields)
        scan = open_scan(store)
        started = time.process_time()
        ds = reconstruct(store, NETWORK, progress=False)
        total = time.process_time() - started
        index = np.arange(min(700, given.patterns))
        corners = footprint_corners(scan.position_yx_px[index], scan.n_pixels)
        flat = np.ones(tuple(np.ptp(corners, axis=0) + scan.n_pixels), np.complex64)
        sweep = processor_s(lambda: called_for(flat, tuple(corners.min(axis=0)), scan, index)) / len(index)
        pattern = np.ones((scan.n_pixels, scan.n_pixels), np.complex64)
        transform = processor_s(lambda: [scipy.fft.fft2(pattern) for _ in range(1000)]) / 1000
    one = sweep * given.patterns
    record = ds.ptycho.records["refinement"]
    tell(
        "refinement_cost",
        patterns=given.patterns,
        sweep_ms_per_pattern=1e3 * sweep,
        transforms_per_sweep_and_pattern=sweep / transform,
        slow_phase_in_sweeps=spent["slow_phase"] / one,
        sweeps_in_sweeps=spent["sweeps"] / one,
        refinement_in_sweeps=spent["whole"] / one,
        all_in_sweeps=total / one,
        stages=len(record["stages"]) - 1,
        solves=sum(stage["stage"] == "slow_phase" for stage in record["stages"]),
    )


if __name__ == "__main__":
    main()
