"""Bytes decompressed for each byte of patterns that is needed, by scan path and by the order of the store.

Counted from positions, group table and chunk sizes: nothing is read. Along the curve groups take their patterns from
few chunks of the store; as given, from the chunks that the scan happened to fill.

    python -m tests.benchmarks.read_amplification            10^5 patterns of 64 x 64
    python -m tests.benchmarks.read_amplification --quick    10^4
"""

from __future__ import annotations

import numpy as np

from ptychodask.grouping import GroupingSpec, curve_order, group_positions
from ptychodask.simulate import PATHS
from ptychodask.store.write import chunk_patterns, storage_order
from tests.benchmarks.measuring import parser, tell

ITEM_BYTES = 2


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--n-patterns", type=int, default=10**5)
    flags.add_argument("--n-pixels", type=int, default=64)
    flags.add_argument("--members", type=int, default=4)
    flags.add_argument("--groups-per-chunk", type=int, default=1024, help="as ptychodask plan tells")
    given = flags.parse_args()
    n_patterns = 10**4 if given.quick else given.n_patterns
    per_chunk = chunk_patterns(given.n_pixels, ITEM_BYTES)
    spec = GroupingSpec(members=given.members)
    for path, positions in PATHS.items():
        position = positions(n_patterns, 8.0, np.random.default_rng(0))
        member = group_positions(position, spec)
        chosen = storage_order(position, per_chunk)
        orders = {"as_given": np.arange(n_patterns), "along_the_curve": curve_order(position)}
        tell(
            "read_amplification",
            path=path,
            patterns=n_patterns,
            patterns_per_stored_chunk=per_chunk,
            groups_per_chunk=given.groups_per_chunk,
            **{
                name: amplification(member, np.argsort(order), per_chunk, given.groups_per_chunk)
                for name, order in orders.items()
            },
            stored=next(name for name, order in orders.items() if np.array_equal(order, chosen)),
        )


def amplification(member: np.ndarray, place: np.ndarray, per_chunk: int, size: int) -> dict[str, float]:
    """Bytes decompressed over bytes needed, of each task; and over the scan's, since tasks share patterns."""
    decompressed = needed = 0
    for start in range(0, len(member), size):
        places = place[np.unique(member[start : start + size])]
        needed += len(places)
        decompressed += len(np.unique(places // per_chunk)) * per_chunk
    return {"of_what_tasks_need": decompressed / needed, "of_the_scan": decompressed / len(place)}


if __name__ == "__main__":
    main()
