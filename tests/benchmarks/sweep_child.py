"""One sweep of sleeping trials in a process of its own, timed; prints one JSON line. Started by ``sweep_cost``.

``ours`` is the whole product: plan, store, leases, journal, MLflow, report. ``sleep`` is plain Ray Tune with a function
that sleeps as long and reports its epochs as often; ``train`` is the same with one bare PyTorch step per epoch of the
same small network, as our trials have it.
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
    times = time_ray_start()
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        run = run_ours if options.system == "ours" else run_plain
        body_seconds = run(options, Path(folder))
    gc.collect()
    outcome = {
        "seconds": time.perf_counter() - STARTED,
        "before_ray_seconds": times["ray_starts"] - STARTED,
        "ray_seconds": times["ray_started"] - times["ray_starts"],
        "body_seconds": body_seconds,
        "cpu_seconds": time.process_time(),
        "resident_bytes": resident_bytes(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(outcome), flush=True)


def time_ray_start() -> dict[str, float]:
    """Note when ``ray.init`` is called and when it returns."""
    import ray

    times: dict[str, float] = {}
    start_ray = ray.init

    def timed(*arguments: Any, **options: Any) -> Any:
        times["ray_starts"] = time.perf_counter()
        context = start_ray(*arguments, **options)
        times["ray_started"] = time.perf_counter()
        return context

    ray.init = timed
    return times


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="one timed sweep of sleeping trials")
    parser.add_argument("system", choices=["ours", "sleep", "train"])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--trial-seconds", type=float, default=1.0)
    parser.add_argument(
        "--fresh-actors", action="store_true", help="plain Tune's default: reuse_actors=False"
    )
    return parser.parse_args()


def run_ours(options: argparse.Namespace, folder: Path) -> float:
    """Sum of the training times in the stages' manifests, in seconds."""
    from sleeping import Noise, Sleeping

    from orchestrator import Experiment

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
    result = experiment.run(quiet=True)
    if [row.status for row in result.rows] != ["done"] * options.trials:
        raise RuntimeError(f"not every trial is done: {[(row.status, row.reason) for row in result.rows]}")
    return sum(row.seconds for row in result.rows)


def run_plain(options: argparse.Namespace, folder: Path) -> float:
    """Seconds that the trials of plain Ray Tune slept."""
    import ray
    from ray import tune

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    function = train_bare if options.system == "train" else sleep_only
    tuner = tune.Tuner(
        tune.with_resources(function, {"CPU": 1}),
        param_space={
            "number": tune.grid_search(list(range(options.trials))),
            "step_seconds": options.trial_seconds / NUM_EPOCHS,
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=NUM_SLOTS, reuse_actors=not options.fresh_actors),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    results = tuner.fit()
    if len(results) != options.trials or results.num_errors:
        raise RuntimeError(f"{len(results)} trials ended, {results.num_errors} of them with an error")
    return float(options.trials * options.trial_seconds)


def sleep_only(config: dict[str, Any]) -> None:
    """A trial that does nothing at all."""
    from ray import tune

    for epoch in range(NUM_EPOCHS):
        time.sleep(config["step_seconds"])
        tune.report({"top1": 50.0, "epoch": epoch + 1})


def train_bare(config: dict[str, Any]) -> None:
    """A trial that sleeps and takes one optimizer step per epoch, written as one would without us."""
    import torch
    from ray import tune
    from torch import nn

    images, labels = torch.rand(64, 64), torch.arange(64) % 2
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(NUM_EPOCHS):
        time.sleep(config["step_seconds"])
        loss = nn.functional.cross_entropy(model(images[:48]), labels[:48])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            top1 = 100 * (model(images[48:]).argmax(1) == labels[48:]).float().mean().item()
        tune.report({"top1": top1, "epoch": epoch + 1})


def resident_bytes() -> int:
    """What this process holds in memory now."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
