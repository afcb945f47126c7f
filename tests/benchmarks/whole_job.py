"""Wall time and peak memory of one `ptychodask reconstruct` command, Python's start and the picture included.

python -m tests.benchmarks.whole_job --model wts.h5.zip    10 000 groups, a bundle of PtychoPINN's (or of ours)
python -m tests.benchmarks.whole_job --quick               300 groups, an untrained network of our own
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.measuring import parser, tell

MAKE_MODEL = """
import sys
from ptychodask import models, open_scan
scan = open_scan(sys.argv[1])
spec = models.ModelSpec(n_pixels=scan.n_pixels, n_filters_scale=int(sys.argv[3]))
models.save_model(models.untrained_model(spec, models.Optics.of(scan)), sys.argv[2])
"""


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", type=Path, help="by default an untrained network of our own is made")
    flags.add_argument("--n-filters-scale", type=int, default=2, help="width of that one")
    flags.add_argument("--n-groups", type=int, default=10_000)
    flags.add_argument("--precision", default="float32")
    flags.add_argument("--workers", type=int, help="worker processes; by default the command's own")
    given = flags.parse_args()
    n_groups = 300 if given.quick else given.n_groups
    with tempfile.TemporaryDirectory() as folder:
        store, model = Path(folder, "scan.zarr"), given.model or Path(folder, "bench.model")
        made = ["--n-patterns", str(n_groups), "--dose", "6e4", "--step-px", "6", "--probe", "zone_plate", "--quiet"]
        subprocess.run(["ptychodask", "simulate", store, *made], check=True, stdout=subprocess.DEVNULL)
        if given.model is None:
            command = [sys.executable, "-c", MAKE_MODEL, store, model, str(given.n_filters_scale)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        workers = [] if given.workers is None else ["--workers", str(given.workers)]
        asked = ["--model", model, "--precision", given.precision, *workers]
        started = time.perf_counter()
        process = subprocess.Popen(["ptychodask", "reconstruct", store, "--quiet", *asked], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        tell(
            "whole_job",
            model=str(given.model or "untrained pinn"),
            precision=given.precision,
            groups=n_groups,
            exit_status=os.waitstatus_to_exitcode(status),
            seconds=time.perf_counter() - started,
            cpu_s=used.ru_utime + used.ru_stime,
            peak_resident_mib=used.ru_maxrss / 1024,
        )


if __name__ == "__main__":
    main()
