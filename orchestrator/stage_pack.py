"""Run several stages side by side, from their inputs in the store to finished artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import nn

from methods.base import Method, Source, Teacher
from methods.data.base import LoadedData, SampleStream
from methods.data.randomness import derive_seed
from methods.models.tapped import Tapped
from orchestrator.behind import BackgroundSlot
from orchestrator.fence import OPEN, Fence, FencedSlot
from orchestrator.pack import PackMember, train_pack
from orchestrator.packing import stream_signature
from orchestrator.plan import PlannedStage
from orchestrator.signals import StageSignals
from orchestrator.stage import StageRunner, out_of_memory_named, pick_device
from orchestrator.training import Observer, Training

__all__ = ["StageJob", "StagePack"]


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """One of the stages."""

    stage: PlannedStage
    report: Observer
    """Gets each epoch's row; may raise, or return True, to stop this stage alone."""
    fence: Fence = OPEN


@dataclass(frozen=True)
class StagePack(StageRunner):
    """A ``StageRunner`` for stages that ask for the same batches. Frozen networks are loaded once for all of them."""

    networks: dict[str, nn.Module] = field(default_factory=dict)
    """Key of an artifact -> its network, which remembers what it said of the current batch."""

    @classmethod
    def of(cls, stages: StageRunner) -> StagePack:
        """As ``stages``, for one pack."""
        return cls(**{item.name: getattr(stages, item.name) for item in fields(StageRunner)})

    def execute_all(self, jobs: Sequence[StageJob]) -> list[Exception | None]:
        """Train all stages and store their artifacts; gives for each why it is not finished, or None.

        Raises ValueError for stages that do not ask for the same batches.
        """
        first = jobs[0].stage
        if len({stream_signature(job.stage) for job in jobs}) > 1:
            raise ValueError(
                f"stages named {first.name} with different batches cannot be trained side by side"
            )
        wanted = self.run.for_stage(first.name)
        torch.set_num_threads(wanted.cpus_per_worker)
        device = pick_device(wanted.gpus_per_worker)
        data = self.load_data(first.data)
        streams = data.streams(self._stream_settings(first, device))
        results = train_pack(
            [self._member(job, data, streams, device) for job in jobs],
            training=streams["training"],
            validation=streams["validation"] if first.data.validation > 0 else None,
            device=device,
            checkpoint_seconds=self.run.checkpoint_seconds,
        )
        return [_failure(job.stage, result, device) for job, result in zip(jobs, results, strict=True)]

    def _member(
        self, job: StageJob, data: LoadedData, streams: Mapping[str, SampleStream], device: torch.device
    ) -> PackMember:
        stage, own = job.stage, replace(self, fence=job.fence)
        slot = BackgroundSlot(self.store.checkpoints(stage.key), job.fence)
        return PackMember(
            build=partial(own._prepared, stage, data, streams["training"], device),
            settings=stage.spec.train,
            seed=derive_seed(stage.seed, "train", stage.spec.method),
            checkpoints=FencedSlot(slot, job.fence),
            observe=job.report,
            writing=slot,
            finish=lambda method, training: own._finish(
                stage, data.task(), data, method, training, streams, device, own._live(stage, device)
            ),
        )

    def _prepared(
        self, stage: PlannedStage, data: LoadedData, training: SampleStream, device: torch.device
    ) -> Method:
        method = self._build(stage, data.task(), device, self._live(stage, device))
        method.prepare(torch.from_numpy(training.known_labels()), num_epochs=stage.spec.train.epochs)
        return method

    def _live(self, stage: PlannedStage, device: torch.device) -> StageSignals:
        """Signals of a pack are computed: it has one pass for all."""
        run = replace(self.run, signals="live")
        return StageSignals(stage, run, self.store.url, self.shared_signals, self.workers, device)

    def _teacher(self, source: Source) -> Teacher:
        """The teacher on a network that all stages share where it is the same."""
        teacher = super()._teacher(source)
        key = _network_key(source) if isinstance(teacher.network, Tapped) else source.key
        if key not in self.networks:
            self.networks[key] = teacher.network
            for module in teacher.network.modules():
                if isinstance(module, Tapped):
                    module.remember_passes()
        return replace(teacher, network=self.networks[key])


def _network_key(source: Source) -> str:
    """Key of the artifact whose network ``source`` emits: its own, or the one below its branches or noise."""
    return source.key if source.model is not None else _network_key(source.inputs["teacher"])


def _failure(stage: PlannedStage, result: Training | Exception, device: torch.device) -> Exception | None:
    """Why the stage is not finished; running out of memory by our own name."""
    if isinstance(result, Training):
        return None
    try:
        with out_of_memory_named(stage, device):
            raise result
    except Exception as error:
        return error
