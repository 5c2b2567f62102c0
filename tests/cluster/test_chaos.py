"""Promise 1 on a real cluster: kill anything, run the same command, get the same table. Hosts are namespaces."""

from __future__ import annotations

from collections.abc import Iterator

import chaos
import pytest
from chaos import NUM_STAGES, Sweep, everything_is_returned, make_faults
from chaos_cluster import EVERY_HOST, Cluster
from chaos_report import markdown
from chaos_watch import leftovers, table, weights
from hosts import make_hosts, require_hosts
from mlflow import MlflowClient

from orchestrator.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]

FIRST_SEED = 20
LAST = ("head", "single")
KINDS = [
    ("worker", "group"), ("trial", "group"), ("node", "group"), ("tracking", "group"),
    ("trial", "single"), ("node", "single"), ("tracking", "single"), ("trial", "single"),
    ("driver", "single"), ("trial", "single"), ("driver", "single"), LAST,
]  # fmt: skip
PARTITION_SECONDS = 8.0
SLOW_MILLISECONDS = 100
FEW = ("student.kd_weight=1.0", "search.seeds=1")
"""One student and one baseline: stages that the whole sweep has too."""


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
    sweep.start()
    assert sweep.finish() == 0, sweep.said()
    assert len(sweep.watch.finished) == NUM_STAGES
    return sweep


def test_killed_again_and_again_gives_the_same_table(cluster: Cluster, undisturbed: Sweep) -> None:
    sweep = Sweep(cluster, "chaos")
    sweep.start()
    for fault in make_faults(KINDS, FIRST_SEED):
        sweep.inject(fault)
    assert sweep.finish() == 0, sweep.said()
    print(markdown([sweep]))
    check_results(sweep, undisturbed)
    assert table(sweep.storage, sweep.name) == table(undisturbed.storage, undisturbed.name)
    assert len(sweep.injected) == len(KINDS)
    for loss in sweep.losses():
        assert not loss.lost_checkpoint, loss
        assert loss.seconds <= loss.allowed_seconds, loss
    everything_is_returned(cluster)
    assert sweep.watch.peak_driver_bytes < 1.5 * undisturbed.watch.peak_driver_bytes
    check_tracking(cluster, sweep)


def test_slow_and_cut_networks_change_nothing(cluster: Cluster, undisturbed: Sweep) -> None:
    sweep = Sweep(cluster, "network", FEW)
    chaos.disturb_network(sweep, SLOW_MILLISECONDS, PARTITION_SECONDS)
    assert sweep.finish() == 0, sweep.said()
    check_results(sweep, undisturbed)
    everything_is_returned(cluster)


def check_results(sweep: Sweep, undisturbed: Sweep) -> None:
    """The same bits, made once, and nothing left behind."""
    expected, found = weights(undisturbed.storage), weights(sweep.storage)
    assert found.keys() == sweep.watch.finished.keys()
    assert found == {key: expected[key] for key in found}
    assert sweep.watch.repeated == []
    store = Store(str(sweep.storage))
    assert [key for key in found if store.holder(key) is not None] == []
    assert leftovers(sweep.storage) == []


def check_tracking(cluster: Cluster, sweep: Sweep) -> None:
    """Every stage is there once and finished, although the server was away and drivers died."""
    client = MlflowClient(tracking_uri=cluster.tracking_uri)
    experiment = client.get_experiment_by_name(sweep.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    ids = [run.data.tags["stillhouse.id"] for run in runs]
    assert len(set(ids)) == len(ids)
    stages = [run for run in runs if run.data.tags["stillhouse.id"].startswith("stage:")]
    assert {run.info.status for run in stages} == {"FINISHED"}
    assert {run.data.tags["stillhouse.key"] for run in stages} == set(weights(sweep.storage))
