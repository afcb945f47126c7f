"""Ingest of an HDF5 file four times as large as the memory that the process may take.

The limit is a control group (version 1) where this user may make one: it counts page cache, too, which the system takes
back first. Where not, RLIMIT_DATA, which leaves the page cache out.

    python -m tests.benchmarks.ingest_under_limit            512 MiB for a file of 2 GiB
    python -m tests.benchmarks.ingest_under_limit --quick    256 MiB for a file of 1 GiB
"""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from tests.benchmarks.measuring import NoisyPatterns, parser, tell

N_PIXELS = 128
GROUPS = Path("/sys/fs/cgroup/memory")
MIB = 2**20


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--limit-mib", type=int, default=512)
    flags.add_argument("--rlimit", action="store_true", help="RLIMIT_DATA even where there are control groups")
    given = flags.parse_args()
    limit = (256 if given.quick else given.limit_mib) * MIB
    with tempfile.TemporaryDirectory() as folder, limited(limit, given.rlimit) as (kind, enter):
        source, store = Path(folder, "scan.h5"), Path(folder, "scan.zarr")
        write_source(source, 4 * limit)
        keys = [f"--key={name}={name}" for name in ("diffraction", "y", "x", "probe")]
        command = ["ptychodask", "ingest", source, store, *keys, "--domain=counts", "--units=px", "--quiet"]
        started = time.perf_counter()
        words = [str(word) for word in command]
        process = subprocess.Popen(words, preexec_fn=enter, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, status, used = os.wait4(process.pid, 0)
        tell(
            "ingest_under_limit",
            limit=kind,
            limit_mib=limit / MIB,
            file_mib=source.stat().st_size / MIB,
            succeeded=status == 0 and store.is_dir(),
            exit_status=os.waitstatus_to_exitcode(status),
            peak_resident_mib=used.ru_maxrss / 1024,
            seconds=time.perf_counter() - started,
            said="" if process.stderr is None else process.stderr.read().decode()[-500:],
        )


@contextmanager
def limited(n_bytes: int, rlimit: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """What the limit is, and what a new process calls to be under it."""
    if rlimit or not os.access(GROUPS, os.W_OK):
        yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
        return
    group = GROUPS / f"ptychodask-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(n_bytes))
        yield "control group", lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def write_source(path: Path, n_bytes: int) -> None:
    """Frames of uint16 in HDF5's own layout, as a detector writes them, and what goes with them."""
    n_patterns = n_bytes // (2 * N_PIXELS**2)
    frames = NoisyPatterns(512, N_PIXELS)[:]
    shape = (n_patterns, N_PIXELS, N_PIXELS)
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("diffraction", shape, np.uint16, chunks=(16, N_PIXELS, N_PIXELS))
        for start in range(0, n_patterns, len(frames)):
            stop = min(start + len(frames), n_patterns)
            stored[start:stop] = frames[: stop - start]
        rows, columns = np.divmod(np.arange(n_patterns), int(np.ceil(np.sqrt(n_patterns))))
        file["y"], file["x"] = 4.0 * rows, 4.0 * columns
        file["probe"] = np.ones((N_PIXELS, N_PIXELS), np.complex64)


if __name__ == "__main__":
    main()
