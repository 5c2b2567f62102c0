"""Run one stage: from its inputs in the store to a finished artifact."""

from __future__ import annotations

import json
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from methods.base import Method, ModelSettings, Source, Teacher
from methods.catalog import Catalog
from methods.data.base import LoadedData, SampleStream, StreamSettings
from methods.data.randomness import derive_seed
from orchestrator.behind import BackgroundSlot
from orchestrator.cost import stage_resources
from orchestrator.data_section import DataSettings
from orchestrator.errors import ConfigurationError, DamagedArtifactError, OutOfMemoryError
from orchestrator.fence import OPEN, Fence, FencedSlot
from orchestrator.loop import Row, Training, evaluate, train
from orchestrator.measure import size_and_speed
from orchestrator.memory_share import memory_share_bytes
from orchestrator.optimisation import TrainSettings
from orchestrator.pictures import Drawn, draw_stage
from orchestrator.plan import PlannedStage
from orchestrator.run_state import is_out_of_memory, peak_memory_bytes
from orchestrator.settings import Problems, parse, to_plain
from orchestrator.signals import StageSignals
from orchestrator.spec import RunSettings
from orchestrator.store import Store
from orchestrator.training import untrained
from orchestrator.workers import SOLO, Workers

__all__ = ["StageRunner", "load_source"]

EVALUATION_BATCH_SIZE = 500


def load_source(store: Store, key: str, catalog: Catalog, *, with_inputs: bool = True) -> Source:
    """The artifact ``key`` and, through it, its inputs, as methods see them. Checksums are verified.

    Without inputs it is as if it had none: for an artifact that needs none to be used, whose teachers may be gone.
    """
    manifest = store.manifest(key)
    problems = Problems()
    method = catalog.method(manifest["content"]["method"])
    settings = parse(method.Settings, manifest["settings"], "settings", problems)
    model = parse(ModelSettings, manifest["model"], "model", problems) if manifest["model"] else None
    task = parse(method.task_type, manifest["task"], "task", problems)
    if problems or task is None:
        raise DamagedArtifactError(
            f"artifact {key}: its manifest cannot be understood: {'; '.join(problems)}"
        )
    inputs = manifest["inputs"] if with_inputs else {}
    return Source(
        key=key,
        method=manifest["content"]["method"],
        settings=settings,
        model=model,
        task=task,
        weights=_weights(key, store.read(key, "weights.safetensors")),
        inputs={role: load_source(store, source, catalog) for role, source in inputs.items()},
        catalog=catalog,
    )


def _weights(key: str, data: bytes) -> dict[str, torch.Tensor]:
    try:
        return dict(load_tensors(data))
    except (
        SafetensorError
    ) as error:  # for instance a pickle, planted by somebody who can write to the storage
        raise DamagedArtifactError(
            f"artifact {key}: weights.safetensors is no safetensors file ({error}); it was not loaded"
        ) from error


@dataclass(frozen=True)
class StageRunner:
    """Everything that stages of one experiment have in common, on one process or as one of several workers."""

    store: Store
    catalog: Catalog
    run: RunSettings
    load_data: Callable[[DataSettings], LoadedData]
    workers: Workers = SOLO
    fence: Fence = OPEN
    """Refuses what this process would write when another has taken over its stage."""
    shared_signals: frozenset[str] = frozenset()
    """Recordings of teacher signals that more than one stage of the sweep wants."""

    def execute(self, stage: PlannedStage, report: Callable[[Row], bool | None]) -> None:
        """Train ``stage`` (from its last checkpoint, if there is one) and put its artifact into the store.

        ``report`` gets each epoch's row on the first worker; it may raise, or return True, to stop.
        """
        wanted = self.run.for_stage(stage.name)
        torch.set_num_threads(wanted.cpus_per_worker)
        device = pick_device(wanted.gpus_per_worker)
        data = self.load_data(stage.data)
        task = data.task()
        with out_of_memory_named(stage, device):
            signals = StageSignals(stage, self.run, self.store.url, self.shared_signals, self.workers, device)
            method = self._build(stage, task, device, signals)
            streams = data.streams(self._stream_settings(stage, device))
            with signals.watching(streams["training"]) as watched:
                training = self._train(stage, method, {**streams, "training": watched}, device, report)
            self._finish(stage, task, data, method, training, streams, device, signals)

    def _finish(
        self, stage: PlannedStage, task: Any, data: LoadedData, method: Method, training: Training,
        streams: Mapping[str, SampleStream], device: torch.device, signals: StageSignals,
    ) -> None:  # fmt: skip
        """Look at the test split, and put the artifact into the store."""
        method.artifact().load_state_dict(training.weights)
        test = evaluate(method, streams["test"], device=device, workers=self.workers)
        if self.workers.rank == 0:
            drawn = draw_stage(stage, method, streams["validation"])
            self._put(stage, task, data, method, training, test, device, signals, drawn)

    def _train(
        self, stage: PlannedStage, method: Method, streams: Mapping[str, SampleStream], device: torch.device,
        report: Callable[[Row], bool | None],
    ) -> Training:  # fmt: skip
        validation = streams["validation"] if stage.data.validation > 0 else None
        if not method.trains:
            metrics = evaluate(method, validation, device=device, workers=self.workers) if validation else {}
            return untrained(method, metrics)
        labels = torch.from_numpy(streams["training"].known_labels())
        method.prepare(labels, num_epochs=stage.spec.train.epochs)
        with BackgroundSlot(self.store.checkpoints(stage.key), self.fence) as slot:
            return train(
                method,
                settings=stage.spec.train,
                training=streams["training"],
                validation=validation,
                seed=derive_seed(stage.seed, "train", stage.spec.method),
                device=device,
                workers=self.workers,
                checkpoints=FencedSlot(slot, self.fence),
                observe=report,
                checkpoint_seconds=self.run.checkpoint_seconds,
            )

    def _build(self, stage: PlannedStage, task: Any, device: torch.device, signals: StageSignals) -> Method:
        spec = stage.spec
        method_class = self.catalog.method(spec.method)
        sources = {role: load_source(self.store, key, self.catalog) for role, key in stage.inputs.items()}
        inputs = {
            role: signals.teacher(role, source, self._teacher(source).to(device))
            for role, source in sources.items()
        }
        for role, teacher in inputs.items():
            if reason := method_class.teacher_refusal(teacher, task):
                raise ConfigurationError(f"stages.{stage.name}.{role}: {reason}")
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(stage.seed, "initialise", spec.method))
            model = self.catalog.build_model(spec.model, task) if spec.model else None
            method = method_class(spec.settings, task=task, model=model, inputs=inputs)
        for network in (method, *(teacher.network for teacher in inputs.values())):
            network.to(memory_format=torch.channels_last)  # convolutions run about 1.5 x faster, on CPU too
        method = method.to(device)
        if spec.train.compile and spec.train.epochs > 0:
            from orchestrator.compiling import compile_networks  # takes a second, and few stages want it

            compile_networks(stage.name, method, inputs.values(), torch.get_num_threads())
        return method

    def _teacher(self, source: Source) -> Teacher:
        return source.teacher()

    def _stream_settings(self, stage: PlannedStage, device: torch.device) -> StreamSettings:
        data = stage.data
        return StreamSettings(
            batch_size=stage.spec.train.batch_size,
            evaluation_batch_size=EVALUATION_BATCH_SIZE,
            seed=data.seed_of_stream(stage.seed, stage.spec.method),
            augment=data.active_augment,
            strong=self.catalog.method(stage.spec.method).needs_strong,
            validation=data.validation,
            split_seed=data.split_seed,
            fraction=data.fraction,
            imbalance=data.imbalance,
            device=device,
            rank=self.workers.rank,
            num_workers=self.workers.size,
        )

    def _put(
        self, stage: PlannedStage, task: Any, data: LoadedData, method: Method, training: Training,
        test: Mapping[str, float], device: torch.device, signals: StageSignals, drawn: Drawn,
    ) -> None:  # fmt: skip
        metrics = {**training.metrics, **{f"test_{name}": value for name, value in test.items()}}
        metrics |= best_epoch(training.history, stage.spec.train, method.evaluation_metrics[0])
        metrics |= self._size(method, task, device)
        manifest = {
            **self._identity(stage),
            "task": to_plain(task),
            **data.described(),
            "metrics": {**metrics, "seconds": training.seconds},
            "cost": self._cost(stage, training, device),
            **({"signals": told} if (told := signals.summary()) else {}),
            **drawn.told,
            "placement": {
                "host": socket.gethostname(),
                "device": device_name(device),
                "workers": self.workers.size,
                "batch_per_worker": stage.spec.train.batch_size // self.workers.size,
                "accumulate": stage.spec.train.accumulate,
                "batch_scale": stage.spec.batch_scale,
            },
            "versions": versions(),
            "finished": time.time(),
        }
        weights = {name: tensor.contiguous() for name, tensor in training.weights.items()}
        files = {
            "weights.safetensors": save_tensors(weights),
            "history.json": json.dumps(training.history).encode(),
            **drawn.files,
        }
        self.fence.check()
        self.store.put(stage.key, files, manifest)
        self.store.checkpoints(stage.key).delete()

    def _size(self, method: Method, task: Any, device: torch.device) -> dict[str, float]:
        """What the artifact weighs; for a network also what an image costs it."""
        if method.keeps_network():
            return size_and_speed(method.artifact(), task, device)
        return {"num_parameters": float(sum(item.numel() for item in method.artifact().parameters()))}

    def _identity(self, stage: PlannedStage) -> dict[str, Any]:
        """What the stage is, complete enough to rebuild what it emits."""
        return {
            "name": stage.name,
            "content": dict(stage.content),
            "settings": to_plain(stage.spec.settings),
            "model": to_plain(stage.spec.model),
            "train": to_plain(stage.spec.train),
            "dataset": stage.data.dataset,
            "seed": stage.seed,
            "inputs": dict(stage.inputs),
            "signature": stage.signature,
            "epochs": stage.epochs,
        }

    def _cost(self, stage: PlannedStage, training: Training, device: torch.device) -> dict[str, float]:
        """``cpu_seconds`` were used by the processes; ``held_cpu_seconds`` and ``gpu_seconds`` were reserved.

        ``memory_share_bytes`` is what one of them could use, ``peak_memory_bytes`` what it did.
        """
        held = stage_resources(self.run, stage.name)
        return {
            "seconds": training.seconds,
            "cpu_seconds": training.cpu_seconds,
            "held_cpu_seconds": training.worker_seconds * held.cpus_per_worker,
            "gpu_seconds": training.worker_seconds * held.gpus_per_worker,
            "peak_memory_bytes": training.peak_memory_bytes,
            "memory_share_bytes": memory_share_bytes(
                device, cpus=held.cpus_per_worker, gpus=held.gpus_per_worker
            ),
            "resumed_epochs": training.resumed_epochs,
        }


def best_epoch(history: list[Row], train: TrainSettings, first_metric: str) -> dict[str, float]:
    """``best_METRIC`` on validation and ``best_epoch``: what other tables report, kept beside the last epoch's."""
    name = train.objective or first_metric
    evaluated = [row for row in history if name in row]
    if not evaluated:
        return {}
    sign = 1 if train.objective_mode == "max" else -1
    best = max(evaluated, key=lambda row: sign * row[name])
    return {f"best_{name}": best[name], "best_epoch": best["epoch"]}


def pick_device(gpus_per_worker: float) -> torch.device:
    """The GPU that Ray made visible when the worker was given one, else the CPU."""
    if gpus_per_worker == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "run.gpus_per_worker is set, but torch sees no GPU on this node; check the driver, or set it to 0"
        )
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def versions() -> dict[str, str]:
    return {name: installed_version(name) for name in ("stillhouse", "torch", "ray", "numpy")}


@contextmanager
def out_of_memory_named(stage: PlannedStage, device: torch.device) -> Iterator[None]:
    """Turn every way of running out of memory into our own error, with the stage, the device and the peak."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        peak = peak_memory_bytes(device)
        raise OutOfMemoryError(
            f"stage {stage.name} ({stage.key[:8]}) ran out of memory on {device_name(device)}, peak {peak / 2**20:.0f} MiB, "
            f"batch_size {stage.spec.train.batch_size} in {stage.spec.train.accumulate} micro-batch(es); make the batch smaller, "
            "train.accumulate larger, or let train.min_micro_batch allow smaller micro-batches",
            device=device_name(device), peak_memory_bytes=peak,
        ) from error  # fmt: skip
