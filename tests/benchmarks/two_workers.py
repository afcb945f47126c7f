"""Groups per second of two single-thread worker processes over those of one, end to end, with a real network.

The same workload is measured on one worker, on two, and on one again, each by `bench`.

    python -m tests.benchmarks.two_workers            4 000 groups of PtychoPINN's network
    python -m tests.benchmarks.two_workers --quick    500 groups
"""

from __future__ import annotations

from ptychodask.bench import BenchSpec, bench
from ptychodask.cluster.job import THREAD_VARIABLES
from tests.benchmarks.measuring import cluster, parser, tell


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--network", choices=("pinn", "ptychopinn"), default="ptychopinn")
    flags.add_argument("--n-groups", type=int, default=4000)
    given = flags.parse_args()
    spec = BenchSpec(network=given.network, n_groups=500 if given.quick else given.n_groups)
    reports = []
    for n_workers in (1, 2, 1):
        with cluster(n_workers, environment=dict.fromkeys(THREAD_VARIABLES, "1")) as (client, _):
            reports.append(bench(spec=spec, client=client, progress=False))
    one, two, again = (report["end_to_end"]["groups_per_s"] for report in reports)
    tell(
        "two_workers",
        network=given.network,
        groups=spec.n_groups,
        one_groups_per_s=[one, again],
        two_groups_per_s=two,
        ratio=2 * two / (one + again),
        bare_groups_per_s=[report["bare"]["before_groups_per_s"] for report in reports],
        efficiency=[report["end_to_end"]["efficiency"] for report in reports],
    )


if __name__ == "__main__":
    main()
