"""What must hold after a sweep, whatever happened to it."""

from __future__ import annotations

import time

from chaos import LEASE_SECONDS, Sweep
from chaos_cluster import NODES, Cluster, wait_until
from chaos_watch import leftovers, table, weights
from mlflow import MlflowClient

from orchestrator.store import Store


def check_results(sweep: Sweep, undisturbed: Sweep) -> None:
    """The same bits, made once, and nothing left behind. The sweep may hold a part of the undisturbed one's stages."""
    expected, found = weights(undisturbed.storage), weights(sweep.storage)
    assert found.keys() == sweep.watch.finished.keys()
    assert found == {key: expected[key] for key in found}
    lines = table(undisturbed.storage, undisturbed.name)
    if found.keys() == expected.keys():
        assert table(sweep.storage, sweep.name) == lines
    assert sweep.watch.broken == []
    store = Store(str(sweep.storage), lease_seconds=LEASE_SECONDS)
    # That of a process which was killed runs out; to see it, all are watched from the beginning.
    held = lambda: [key for key in found if store.holder(key) is not None]  # noqa: E731
    wait_until(lambda: not held(), 10 * LEASE_SECONDS, "leases to be given back")
    assert leftovers(sweep.storage) == []


def check_losses(sweep: Sweep) -> None:
    """No epoch that a checkpoint held was trained again, and nothing older than the interval was lost."""
    for loss in sweep.losses():
        assert not loss.lost_checkpoint, loss
        assert loss.seconds <= loss.allowed_seconds, loss


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


def everything_is_returned(cluster: Cluster, timeout_seconds: float = 300) -> None:
    """Wait until no process of a sweep is left and nobody holds a resource."""
    wait_until(lambda: not cluster.of_sweeps(), timeout_seconds, "processes of the sweep to end")
    deadline = time.monotonic() + timeout_seconds
    while True:
        total, free = cluster.resources()
        if free == total and total["CPU"] == len(NODES):
            return
        assert time.monotonic() < deadline, f"held resources: all {total}, free {free}"
        time.sleep(1.0)
