"""The one training loop: any trained method, one process or many, resumable to the same numbers.

The loop knows no method, no Ray and no file. It is handed streams of batches, fellow workers, a slot that keeps
the latest checkpoint, and somebody who observes finished epochs and may say stop. With several workers (or
micro-batches) the gradient is the mean over all rows of the batch, however unevenly they are shared, as long as
the method's losses are means over rows; batch norm statistics remain those of each share.

A run is a generator that yields where it needs the next batch; ``lockstep`` advances one, or several side by side.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from methods.base import AnyBatch, Method
from orchestrator.errors import ConfigurationError
from orchestrator.evaluation import Evaluation, evaluate
from orchestrator.lockstep import Lockstep, Member, Need, Served, Steps
from orchestrator.optimisation import PRECISIONS, TrainSettings, learning_rate_factor
from orchestrator.run_state import RunState
from orchestrator.training import (
    BatchStream,
    CheckpointSlot,
    Clock,
    Observer,
    Row,
    StopTraining,
    Training,
    checkpoint_interval,
)
from orchestrator.workers import SOLO, Workers

__all__ = ["CheckpointSlot", "Row", "StopTraining", "Training", "begin", "evaluate", "train"]

STEPS_BETWEEN_LOOKS = 20
"""How often several workers agree on a checkpoint, and a GPU is asked whether its steps were finite."""
NOT_METRICS = ("epoch", "time", "learning_rate")


def ignore(row: Row) -> bool | None:
    """Observe nothing."""


def train(
    method: Method,
    *,
    settings: TrainSettings,
    training: BatchStream,
    validation: BatchStream | None,
    seed: int,
    device: torch.device,
    workers: Workers = SOLO,
    checkpoints: CheckpointSlot | None = None,
    observe: Observer = ignore,
    checkpoint_seconds: float = 30.0,
    clock: Clock = time.monotonic,
) -> Training:
    """Train ``method`` in place, from the checkpoint in the slot if there is one.

    On the CPU an interrupted and resumed run gives the same bits as an uninterrupted one. Checkpoints are written
    by worker 0 when ``checkpoint_seconds`` have passed, within an epoch too, and at the latest when ``observe``
    stops the run. The random state of the caller is left as it was.

    Args:
        observe: Called on worker 0 with each finished epoch; returns True to stop all workers. May raise. The
            last row before a checkpoint is shown again after resuming, so that no row goes unseen.

    Raises:
        ConfigurationError: Settings and method do not fit each other.
        DivergedError: Loss or gradient left the finite numbers; no weight has.
        StopTraining: ``observe`` asked for it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    member = begin(
        method,
        settings=settings,
        training=training,
        validation=validation,
        seed=seed,
        device=device,
        workers=workers,
        checkpoints=checkpoints,
        observe=observe,
        checkpoint_seconds=checkpoint_seconds,
        clock=clock,
    )
    Lockstep([member], training=training, validation=validation, device=device).run()
    if isinstance(member.result, Exception):
        raise member.result
    assert member.result is not None
    return member.result


def begin(
    method: Method,
    *,
    settings: TrainSettings,
    training: BatchStream,
    validation: BatchStream | None,
    seed: int,
    device: torch.device,
    workers: Workers = SOLO,
    checkpoints: CheckpointSlot | None = None,
    observe: Observer = ignore,
    checkpoint_seconds: float = 30.0,
    **clocks: Clock,
) -> Member:
    """A run that is ready to be advanced, alone or beside others: see ``train``; ``clocks`` as for ``RunState``."""
    _refuse_misfit(method, settings, training, validation is not None)
    clocks = {"clock": time.monotonic, **clocks}
    run = _Run(
        RunState(method, settings, device=device, workers=workers, **clocks),
        settings,
        training=training,
        validation=validation,
        slot=checkpoints,
        observe=observe,
        checkpoint_seconds=checkpoint_seconds,
    )
    worker_seed = (seed + workers.rank * 0x9E3779B97F4A7C15) % 2**63
    return Member(run.steps(), seed=worker_seed, save=run.save)


class _Objective(nn.Module):
    """A method as something DDP understands: tensors out. Values are its losses, metrics and their total."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.names: list[str] = []

    def forward(self, batch: AnyBatch) -> tuple[Tensor, Tensor]:
        step = self.method(batch)
        total = step.total
        values = {name: loss.value for name, loss in step.losses.items()} | dict(step.metrics)
        values["loss"] = total
        if (names := list(values)) != self.names:  # a module takes its time to set an attribute
            self.names = names
        return total, torch.stack([value.detach() for value in values.values()])


class _Run:
    """The state of a run with what moves it: streams, slot, observer."""

    def __init__(
        self,
        state: RunState,
        settings: TrainSettings,
        *,
        training: BatchStream,
        validation: BatchStream | None,
        slot: CheckpointSlot | None,
        observe: Observer,
        checkpoint_seconds: float,
    ) -> None:
        self.state, self.settings, self.training, self.validation = state, settings, training, validation
        self.slot, self.observe, self.checkpoint_seconds = slot, observe, checkpoint_seconds
        self.method, self.workers, self.device = state.method, state.workers, state.device
        self.objective = _Objective(self.method)
        self.parallel = self.workers.parallel(self.objective)
        self.saved_at = state.clock()

    def steps(self) -> Steps:
        """The whole run, from the checkpoint in the slot if there is one."""
        state = self.state
        state.restore(None if self.slot is None else self.slot.load())
        if state.history and state.position == 0:
            self._show(state.history[-1], is_saved=True)
        while state.epoch < self.settings.epochs:
            yield from self._train_epoch()
            yield from self._finish_epoch()
            is_saved = state.epoch < self.settings.epochs and self._save_when_due()
            self._show(state.history[-1], is_saved)
        return (yield from self._result())

    def _train_epoch(self) -> Generator[Need, Served | None, None]:
        state, num_batches = self.state, self.training.num_batches
        self.method.train()
        while (served := (yield Need(state.epoch, False, state.position))) is not None:
            values = self._step(served)
            state.position += 1
            is_last = state.position == num_batches
            is_look = is_last or state.position % STEPS_BETWEEN_LOOKS == 0
            if is_look or not state.updater.is_deferred:
                state.refuse_divergence(values)
            if state.average is not None:
                state.average.update()
            if not is_last and (is_look or self.workers.size == 1):
                self._save_when_due()
        if state.position != num_batches:
            raise RuntimeError(f"the stream gave {state.position} batches of {num_batches}")

    def _step(self, served: Served) -> Tensor:
        """One optimizer step; gives the values of the last micro-batch."""
        state, stream = self.state, self.training
        num_rows = min(stream.batch_size, stream.num_samples - state.position * stream.batch_size)
        micro_batches = served.split(self.settings.accumulate, num_rows // self.workers.size)
        totals = []
        for micro in micro_batches:
            share = len(micro.indices) * self.workers.size / num_rows
            with nullcontext() if micro is micro_batches[-1] else self.workers.no_sync(self.parallel):
                with self._autocast():
                    loss, values = self.parallel(micro)
                loss = loss if share == 1 else loss * share
                state.updater.backward(loss)
            totals.append(loss.detach())
            state.add(self.objective.names, values, len(micro.indices))
        step = state.epoch * stream.num_batches + state.position
        factor = learning_rate_factor(self.settings, step, stream.num_batches)
        state.learning_rate = self.settings.learning_rate * factor
        state.updater.step(sum(totals[1:], totals[0]), state.learning_rate)
        return cast(Tensor, values)

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = PRECISIONS[self.settings.precision]
        return nullcontext() if precision is torch.float32 else torch.autocast(self.device.type, precision)

    def _finish_epoch(self) -> Generator[Need, Served | None, None]:
        """Add the row of this epoch, evaluated where that is due, and keep its weights if they are the best."""
        state, settings = self.state, self.settings
        means = state.finish_epoch()
        row: Row = {"epoch": state.epoch, "time": time.time(), "learning_rate": state.learning_rate}
        row |= {f"train_{name}": mean for name, mean in means.items()}
        is_due = state.epoch % settings.evaluate_every == 0 or state.epoch == settings.epochs
        if self.validation is not None and is_due:
            with self._evaluated_weights():
                row |= yield from self._evaluate()
                if settings.keep == "best" and self._is_best(row):
                    state.best = {"row": row, "weights": self._artifact_weights()}
        state.history.append(row)

    def _evaluate(self) -> Generator[Need, Served | None, Row]:
        evaluation, position = Evaluation(self.method, device=self.device, workers=self.workers), 0
        while (served := (yield Need(self.state.epoch - 1, True, position))) is not None:
            evaluation.add(served.batch)
            position += 1
        return evaluation.metrics()

    def _is_best(self, row: Row) -> bool:
        best, name = self.state.best, self.settings.objective or self.method.evaluation_metrics[0]
        sign = 1 if self.settings.objective_mode == "max" else -1
        return best is None or sign * row[name] > sign * best["row"][name]

    @contextmanager
    def _evaluated_weights(self) -> Iterator[None]:
        """Scope in which the method holds what is evaluated and kept: the average if there is one."""
        average = self.state.average
        with nullcontext() if average is None else average.applied():
            self.workers.broadcast_tensors(self.method.buffers())
            yield

    def _artifact_weights(self) -> dict[str, Tensor]:
        state = self.method.artifact().state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def _show(self, row: Row, is_saved: bool) -> None:
        """Let worker 0 observe the row, and leave on all workers if it says stop. The last epoch ends anyway."""
        epoch, num_epochs = self.state.epoch, self.settings.epochs
        is_stopped = False
        try:
            if self.workers.rank == 0:
                is_stopped = bool(self.observe(dict(row))) and epoch < num_epochs
        except BaseException:
            self.workers.broadcast_flag(True)
            self.workers.broadcast_flag(False)
            raise
        if self.workers.broadcast_flag(is_stopped):
            if self.workers.broadcast_flag(not is_saved and self.slot is not None):
                self.save()
            raise StopTraining(f"stopped after epoch {epoch} of {num_epochs}: the observer said so")

    def _save_when_due(self) -> bool:
        """Save if worker 0 finds that it is time; gives whether that was done."""
        interval = checkpoint_interval(self.slot, self.checkpoint_seconds)
        is_due = self.state.clock() - self.saved_at >= interval
        if is_due := self.workers.broadcast_flag(is_due):
            self.save()
        return is_due

    def save(self) -> None:
        """Keep the state as the latest checkpoint. Only between two steps."""
        tree = self.state.tree()
        if self.workers.rank == 0 and self.slot is not None:
            self.slot.save(tree)
        self.saved_at = self.state.clock()

    def _result(self) -> Steps:
        state = self.state
        with self._evaluated_weights():
            row = state.history[-1] if state.history else {}
            if not row and self.validation is not None:
                row = yield from self._evaluate()
            kept = state.best or {"row": row, "weights": self._artifact_weights()}
        held = state.held()
        return Training(
            history=state.history,
            weights=kept["weights"],
            metrics={name: value for name, value in kept["row"].items() if name not in NOT_METRICS},
            seconds=held.seconds,
            worker_seconds=held.worker_seconds,
            cpu_seconds=held.cpu_seconds,
            peak_memory_bytes=state.peak_memory_bytes,
            resumed_epochs=state.resumed_epochs,
        )


def _refuse_misfit(
    method: Method, settings: TrainSettings, training: BatchStream, has_validation: bool
) -> None:
    name, metrics = type(method).__name__, method.evaluation_metrics
    problems = []
    if not any(parameter.requires_grad for parameter in method.parameters()):
        problems.append(f"{name} has no parameter to train")
    if training.batch_size != settings.batch_size:
        problems.append(f"batch_size is {settings.batch_size}, but the stream's is {training.batch_size}")
    if settings.keep == "best" and not has_validation:
        problems.append("keep='best' needs a validation split: set data.validation, or keep='last'")
    if settings.keep == "best" and settings.objective not in ("", *metrics):
        problems.append(f"objective {settings.objective!r} is not a metric of {name}: {', '.join(metrics)}")
    if problems:
        raise ConfigurationError(*problems)
