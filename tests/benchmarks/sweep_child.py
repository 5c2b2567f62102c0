"""One sweep of sleeping trials in a process of its own, timed; prints one JSON line. Started by ``sweep_cost``.

``ours`` is the whole product: plan, store, leases, journal, MLflow, report. ``plain`` is a function trainable that
sleeps as long and reports as often, ``plain-torch`` the same with ``import torch`` before it, as any training has it.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

NUM_SLOTS = 2
NUM_EPOCHS = 2


def main() -> None:
    options = parse_options()
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        body_seconds = options.run(options, Path(folder), times)
    gc.collect()
    outcome = {
        "seconds": time.perf_counter() - STARTED,
        "ray_start_seconds": times["ray_started"] - times["ray_starts"],
        "until_ray_seconds": times["ray_starts"] - STARTED,
        "sweep_seconds": times["sweep_ended"] - times["ray_started"],
        "body_seconds": body_seconds,
        "resident_bytes": resident_bytes(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(outcome), flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = {"ours": run_ours, "plain": run_plain, "plain-torch": run_plain}
    parser.add_argument("system", choices=runs)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--trial-seconds", type=float, default=1.0)
    parser.add_argument(
        "--fresh-actors", action="store_true", help="plain only: Tune's default, reuse_actors=False"
    )
    options = parser.parse_args()
    options.run = runs[options.system]
    return options


def run_ours(options: argparse.Namespace, folder: Path, times: dict[str, float]) -> float:
    """Sum of what the stages' manifests say that training took, in seconds."""
    from sleeping import Noise, Sleeping

    from orchestrator import Experiment
    from orchestrator.ray_tune import connect

    experiment = Experiment(
        name="overhead",
        data={"dataset": "noise", "validation": 0.25},
        stages={
            "sleep": {
                "method": "sleeping",
                "model": "tiny_mlp",
                "step_seconds": options.trial_seconds / NUM_EPOCHS,
                "train": {"epochs": NUM_EPOCHS, "batch_size": 48},
            }
        },
        search={
            "space": {"sleep.number": {"grid": list(range(options.trials))}},
            "objective": {"maximize": "sleep.top1"},
        },
        run={"storage": str(folder), "concurrent_trials": NUM_SLOTS},
        methods={"sleeping": Sleeping},
        datasets={"noise": Noise},
    )
    times["ray_starts"] = time.perf_counter()
    connect()
    times["ray_started"] = time.perf_counter()
    result = experiment.run(quiet=True)
    times["sweep_ended"] = time.perf_counter()
    if [row.status for row in result.rows] != ["done"] * options.trials:
        raise RuntimeError(f"not every trial is done: {[(row.status, row.reason) for row in result.rows]}")
    return sum(row.seconds for row in result.rows)


def run_plain(options: argparse.Namespace, folder: Path, times: dict[str, float]) -> float:
    """Seconds that the trials slept."""
    import ray
    from ray import tune

    step_seconds, with_torch = options.trial_seconds / NUM_EPOCHS, options.system == "plain-torch"

    def sleep(config: dict[str, Any]) -> None:
        if with_torch:
            import torch  # noqa: F401
        for epoch in range(NUM_EPOCHS):
            time.sleep(step_seconds)
            tune.report({"top1": 50.0, "epoch": epoch + 1})

    times["ray_starts"] = time.perf_counter()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    times["ray_started"] = time.perf_counter()
    tuner = tune.Tuner(
        tune.with_resources(sleep, {"CPU": 1}),
        param_space={"number": tune.grid_search(list(range(options.trials)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=NUM_SLOTS, reuse_actors=not options.fresh_actors),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    results = tuner.fit()
    times["sweep_ended"] = time.perf_counter()
    if len(results) != options.trials or results.num_errors:
        raise RuntimeError(f"{len(results)} trials ended, {results.num_errors} of them with an error")
    return options.trials * options.trial_seconds


def resident_bytes() -> int:
    """What this process holds in memory now."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
