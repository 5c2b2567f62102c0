"""The long form of the chaos run: a whole sweep per seed, on hosts made for it, and long cuts of the network.

``python tests/cluster/chaos_loop.py --seeds 1 2 3 --faults 15 --partition-seconds 30``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from chaos import BASELINE, Sweep, disturb_network, drawn_kinds, make_faults
from chaos_checks import check_losses, check_results, check_tracking, everything_is_returned
from chaos_cluster import EVERY_HOST, Cluster
from chaos_report import markdown
from hosts import make_hosts


def main() -> int:
    """Stops at the first promise that is broken, with what was seen; the seeds that led there are printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one broken sweep for each")
    parser.add_argument("--faults", type=int, default=15, help="how many faults each sweep meets")
    parser.add_argument("--partition-seconds", type=float, default=30.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, make_hosts(EVERY_HOST, Path(name)) as hosts:
        cluster = Cluster(hosts, Path(name))
        cluster.start()
        undisturbed = Sweep(cluster, "undisturbed")
        undisturbed.run_to_end()
        broken = []
        for seed in options.seeds:
            print(f"sweep of seed {seed}", flush=True)
            sweep = Sweep(cluster, f"seed{seed}")
            sweep.start()
            for fault in make_faults(drawn_kinds(seed, options.faults), 1000 * seed):
                sweep.inject(fault)
            sweep.run_to_end()
            check_results(sweep, undisturbed)
            check_losses(sweep)
            check_tracking(cluster, sweep)
            everything_is_returned(cluster)
            broken.append(sweep)
        network = Sweep(cluster, "network", BASELINE)
        disturb_network(network, milliseconds=100, seconds=options.partition_seconds)
        network.run_to_end()
        check_results(network, undisturbed)
        print(markdown(broken))
    return 0


if __name__ == "__main__":
    sys.exit(main())
