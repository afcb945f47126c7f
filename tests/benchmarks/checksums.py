"""Cost of the checksums of stored chunks: processor time of writing and reading patterns with them and without.

python -m tests.benchmarks.checksums
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from ptychodask.storage.zarr_checks import COMPRESSORS
from tests.benchmarks.measuring import parser, tell

CHUNK = 64


def processor_s(function: Callable[[], Any]) -> float:
    """Processor time of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--patterns", type=int, default=16_384)
    flags.add_argument("--rounds", type=int, default=5)
    given = flags.parse_args()
    rng = np.random.default_rng(0)
    mean = 1e5 * np.exp(-np.hypot(*np.indices((64, 64)) - 32) / 4)
    patterns = rng.poisson(mean / mean.sum() * 1e6, size=(given.patterns, 64, 64)).astype(np.uint16)
    without = tuple(codec for codec in COMPRESSORS if not isinstance(codec, Crc32cCodec))
    seconds: dict[str, list[float]] = {name: [] for name in ("write", "write_plain", "read", "read_plain")}
    for number in range(given.rounds):
        for suffix, codecs in (("", COMPRESSORS), ("_plain", without)):
            with tempfile.TemporaryDirectory() as folder:
                array = zarr.create_array(
                    Path(folder, f"{number}.zarr"),
                    shape=patterns.shape,
                    chunks=(CHUNK, 64, 64),
                    shards=(16 * CHUNK, 64, 64),
                    dtype=np.uint16,
                    compressors=codecs,
                )
                seconds[f"write{suffix}"].append(
                    processor_s(lambda array=array: array.set_basic_selection(..., patterns))
                )
                seconds[f"read{suffix}"].append(processor_s(lambda array=array: array[...]))
    best = {name: min(times) for name, times in seconds.items()}
    tell(
        "checksums",
        patterns=given.patterns,
        write_ratio=best["write"] / best["write_plain"],
        read_ratio=best["read"] / best["read_plain"],
    )


if __name__ == "__main__":
    main()
