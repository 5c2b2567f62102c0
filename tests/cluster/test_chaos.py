"""Promise 1 on a real cluster: kill anything, run the same command, get the same table. Hosts are namespaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chaos import BASELINE, NUM_STAGES, Sweep, disturb_network, make_faults
from chaos_checks import check_losses, check_results, check_tracking, everything_is_returned
from chaos_cluster import EVERY_HOST, Cluster
from chaos_report import markdown
from hosts import make_hosts, require_hosts

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]

FIRST_SEED = 20
KINDS = [
    ("worker", "group"), ("trial", "group"), ("node", "group"), ("tracking", "group"),
    ("worker", "single"), ("node", "single"), ("tracking", "single"), ("trial", "single"),
    ("driver", "single"), ("head", "single"),
]  # fmt: skip
"""Each with a seed of its own; ``make chaos`` draws longer lists."""
PARTITION_SECONDS = 30.0
SLOW_MILLISECONDS = 100


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_hosts()
    folder = tmp_path_factory.mktemp("cluster")
    with make_hosts(EVERY_HOST, folder) as hosts:
        made = Cluster(hosts, folder)
        made.start()
        yield made


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Sweep:
    sweep = Sweep(cluster, "undisturbed")
    sweep.run_to_end()
    assert len(sweep.watch.finished) == NUM_STAGES
    return sweep


def test_killed_again_and_again_gives_the_same_table(cluster: Cluster, undisturbed: Sweep) -> None:
    sweep = Sweep(cluster, "chaos")
    sweep.start()
    for fault in make_faults(KINDS, FIRST_SEED):
        sweep.inject(fault)
    sweep.run_to_end()
    print(markdown([sweep]))
    assert len(sweep.injected) == len(KINDS)
    assert len(sweep.watch.finished) == NUM_STAGES
    check_results(sweep, undisturbed)
    check_losses(sweep)
    check_tracking(cluster, sweep)
    everything_is_returned(cluster)
    assert sweep.watch.peak_driver_bytes < 1.5 * undisturbed.watch.peak_driver_bytes


def test_slow_and_cut_networks_change_nothing(cluster: Cluster, undisturbed: Sweep) -> None:
    sweep = Sweep(cluster, "network", BASELINE)
    disturb_network(sweep, milliseconds=SLOW_MILLISECONDS, seconds=PARTITION_SECONDS)
    sweep.run_to_end()
    assert len(sweep.watch.finished) == 2
    check_results(sweep, undisturbed)
    everything_is_returned(cluster)
