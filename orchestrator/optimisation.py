"""Training settings and what follows from them: optimizer, learning rate, guarded update, weight average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from methods.base import PLAIN_RULE, UpdateRule
from orchestrator.errors import ConfigurationError
from orchestrator.workers import SOLO, Workers

__all__ = ["TrainSettings", "Updater", "WeightAverage", "learning_rate_factor", "make_optimizer"]

SCHEDULES = ("step", "cosine", "poly", "constant")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_PATIENCE = 20
"""Broken fp16 steps in a row that count as divergence: the loss scale halves at each, from 2**16 to below 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How a stage is trained. The defaults are the CIFAR-100 recipe of the distillation literature."""

    epochs: int = 240
    """Passes over the training data. 0 keeps the initial weights."""
    batch_size: int = 64
    """Images per optimizer step, over all workers and micro-batches. The last, smaller batch is kept."""
    optimizer: str = "sgd"
    """``sgd``, ``adamw``, or ``timm/NAME`` for any optimizer of timm."""
    learning_rate: float = 0.05
    """Highest learning rate, before the schedule's factor."""
    momentum: float = 0.9
    """Momentum of ``sgd`` and of those timm optimizers that take one."""
    nesterov: bool = False
    """Nesterov's form of the momentum (``sgd`` only)."""
    weight_decay: float = 5e-4
    """Decay of all parameters, batch norm and biases included."""
    schedule: Literal["step", "cosine", "poly", "constant"] = "step"
    """``step`` (per epoch), ``cosine``, ``poly`` (per optimizer step) or ``constant``."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Fractions of the run after which ``step`` multiplies the learning rate by ``decay``."""
    decay: float = 0.1
    """Factor at each milestone of ``step``."""
    power: float = 0.9
    """Exponent of ``poly``: the factor is (1 - progress) ** power."""
    warmup: float = 0.0
    """Fraction of the run in which the learning rate first rises linearly, per optimizer step."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Training arithmetic: ``float32``, or autocast to ``bf16`` or ``fp16``. Evaluation is float32 always."""
    compile: bool = False
    """Let torch compile the passes of the networks: the student's in training, and the frozen teacher's. Pays for long
    trainings; the first step on a node waits for the compiler. It rounds differently, so it is part of the key. Such
    stages share their process with no other."""
    accumulate: int = 1
    """Micro-batches into which each worker splits its share of a batch, to save memory."""
    min_micro_batch: int = 0
    """A stage that runs out of memory is tried again with ``accumulate`` doubled, as long as a micro-batch keeps this
    many images (over all workers). 0 never does. The global batch stays the same, and so do the results up to
    rounding, but not where the network has batch norm, which sees each micro-batch alone: then it is another recipe."""
    clip_norm: float = 0.0
    """Largest gradient norm; longer gradients are shortened to it. 0 turns it off."""
    ema_decay: float = 0.0
    """Decay per step of the weight average that is evaluated and kept. 0 keeps the plain weights."""
    evaluate_every: int = 1
    """Epochs between evaluations on the validation split. The last epoch is always evaluated."""
    keep: Literal["last", "best"] = "last"
    """Which epoch's weights and metrics the artifact keeps: ``last``, or the ``best`` one on validation."""
    objective: str = ""
    """Validation metric by which ``best`` is chosen. Empty: the method's first evaluation metric."""
    objective_mode: Literal["max", "min"] = "max"
    """Whether ``best`` means the ``max`` or the ``min`` of the objective."""

    def __post_init__(self) -> None:
        for name, (valid, expected) in self._rules().items():
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _rules(self) -> dict[str, tuple[bool, str]]:
        """Setting -> whether its value is possible, and what is."""
        steps = (0.0, *self.milestones, 1.0)
        timm_name = self.optimizer.removeprefix("timm/")
        return {
            "epochs": (self.epochs >= 0, "at least 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "optimizer": (
                self.optimizer in ("sgd", "adamw") or "" != timm_name != self.optimizer,
                "'sgd', 'adamw' or 'timm/NAME'",
            ),
            "learning_rate": (0 < self.learning_rate < math.inf, "greater than 0 and finite"),
            "momentum": (0 <= self.momentum < 1, "from 0 to below 1"),
            "nesterov": (
                not self.nesterov or self.momentum > 0,
                "false where momentum is 0",
            ),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "milestones": (
                all(before < after for before, after in pairwise(steps)),
                "rising fractions of the run between 0 and 1",
            ),
            "decay": (0 < self.decay <= 1, "above 0 and at most 1"),
            "power": (0 < self.power < math.inf, "greater than 0 and finite"),
            "warmup": (0 <= self.warmup < 1, "from 0 to below 1, a fraction of the run"),
            "precision": (self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            "accumulate": (
                1 <= self.accumulate <= self.batch_size,
                f"from 1 to batch_size ({self.batch_size})",
            ),
            "min_micro_batch": (
                self.min_micro_batch == 0 or 2 <= self.min_micro_batch <= self.batch_size,
                f"0 (off), or from 2 to batch_size ({self.batch_size})",
            ),
            "clip_norm": (0 <= self.clip_norm < math.inf, "at least 0 (0 is off) and finite"),
            "ema_decay": (0 <= self.ema_decay < 1, "from 0 (off) to below 1"),
            "evaluate_every": (self.evaluate_every >= 1, "at least 1"),
            "keep": (self.keep in ("last", "best"), "'last' or 'best'"),
            "objective_mode": (self.objective_mode in ("max", "min"), "'max' or 'min'"),
        }

    @classmethod
    def inactive(cls, settings: TrainSettings) -> frozenset[str]:
        """Names of settings that change nothing at these values, so that equal work gets equal keys."""
        if settings.epochs == 0:
            return frozenset(field.name for field in fields(cls)) - {"epochs"}
        groups = {
            ("milestones", "decay"): settings.schedule != "step"
            or settings.decay == 1
            or not settings.milestones,
            ("power",): settings.schedule != "poly",
            ("momentum",): settings.optimizer == "adamw",
            ("nesterov",): settings.optimizer != "sgd",
            ("objective", "objective_mode"): settings.keep != "best",
            ("compile",): not settings.compile,
            ("min_micro_batch",): not settings.min_micro_batch
            or settings.batch_size // (2 * settings.accumulate) < settings.min_micro_batch,
        }
        return frozenset(name for names, without_effect in groups.items() if without_effect for name in names)


def learning_rate_factor(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """Factor on the learning rate of optimizer step ``step``, counted from 0 over the whole run.

    An epoch is past a milestone when at least that fraction of the run lies before it: with 240 epochs counted
    from 1 the steps come when epoch > 150, > 180, > 210; with 60 when > 38 (37.5 rounded up), > 45, > 53. Very
    short runs lose the last steps, and one epoch has none. Warm-up multiplies ``step``, and shortens the others.
    """
    num_steps = settings.epochs * steps_per_epoch
    num_warmup = round(settings.warmup * num_steps)
    if settings.schedule == "step":
        epoch = step // steps_per_epoch
        num_passed = sum(epoch >= milestone * settings.epochs - 1e-9 for milestone in settings.milestones)
        return float(settings.decay**num_passed * min(1.0, (step + 1) / max(num_warmup, 1)))
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / (num_steps - num_warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return float((1 - progress) ** settings.power) if settings.schedule == "poly" else 1.0


def make_optimizer(
    settings: TrainSettings, parameters: Sequence[nn.Parameter], rules: Sequence[UpdateRule] = ()
) -> Optimizer:
    """The optimizer over ``parameters``, in the fused implementation where there is one.

    They are in one group for each distinct one of ``rules`` (which are as many as parameters, or none).
    """
    groups = _grouped(settings, parameters, rules)
    if settings.optimizer not in ("sgd", "adamw"):
        return _timm_optimizer(settings, groups)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    shared: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "fused": fused,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **shared)
    sgd = torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, **shared)
    if settings.momentum > 0:
        # Torch leaves fused buffers uninitialised when the very first step is skipped. Starting from zero is the
        # same arithmetic, and safe.
        for parameter in parameters:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def _grouped(
    settings: TrainSettings, parameters: Sequence[nn.Parameter], rules: Sequence[UpdateRule]
) -> list[dict[str, Any]]:
    """Groups as torch takes them. Their learning rate is set at every step, by the factor that they carry."""
    members: dict[UpdateRule, list[nn.Parameter]] = {}
    for parameter, rule in zip(parameters, rules or [PLAIN_RULE] * len(parameters), strict=True):
        members.setdefault(rule, []).append(parameter)
    return [
        {
            "params": group,
            "learning_rate_factor": rule.learning_rate_factor,
            "weight_decay": settings.weight_decay if rule.is_decayed else 0.0,
        }
        for rule, group in members.items()
    ]


def _timm_optimizer(settings: TrainSettings, groups: list[dict[str, Any]]) -> Optimizer:
    from timm.optim import create_optimizer_v2

    try:
        optimizer: Optimizer = create_optimizer_v2(
            groups,
            opt=settings.optimizer.removeprefix("timm/"),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            filter_bias_and_bn=False,
        )
    except ValueError as error:
        raise ConfigurationError(
            f"optimizer {settings.optimizer}: {error}; see timm.optim.list_optimizers()"
        ) from error
    return optimizer


class Updater:
    """One optimizer step per call, never with a gradient that is not finite.

    On the CPU, and with an optimizer that has no fused kernel, the verdict is read before the step. On a GPU that
    would stall the queue at every step, so the fused kernel is told by a flag on the device to change nothing, and
    the host reads ``broken_steps`` now and then. fp16 steps are guarded by the gradient scaler, which skips as a
    matter of course; only ``FP16_PATIENCE`` broken ones in a row are divergence.
    """

    def __init__(
        self,
        settings: TrainSettings,
        parameters: Sequence[nn.Parameter],
        *,
        device: torch.device,
        workers: Workers = SOLO,
        rules: Sequence[UpdateRule] = (),
    ) -> None:
        self.settings, self.parameters, self.workers = settings, parameters, workers
        self.optimizer = make_optimizer(settings, parameters, rules)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        is_fused = all(group.get("fused") for group in self.optimizer.param_groups)
        self.is_deferred = device.type != "cpu" and (is_fused or self.scaler.is_enabled())
        self.patience = FP16_PATIENCE if self.scaler.is_enabled() else 1
        self._streak: Tensor | int = (
            torch.zeros((), dtype=torch.int64, device=device) if self.is_deferred else 0
        )
        self._worst = self._streak

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, scaled where fp16 needs it."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, loss: Tensor, learning_rate: float) -> None:
        """Clip, check, update and clear the gradients. ``loss`` is the detached total that was minimised."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("learning_rate_factor", 1.0)
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = _norm(gradients, loss)
        finite = self._all_finite(norm, loss)
        if self.settings.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        self._update(finite)
        self._count(finite)
        for parameter in self.parameters:  # what zero_grad does, without what torch.compile needs around it
            parameter.grad = None

    def has_diverged(self) -> bool:
        """Whether broken steps have come ``patience`` times in a row. Waits for the device."""
        return int(self._worst) >= self.patience

    def state(self) -> dict[str, Any]:
        """Plain tree of the optimizer's and the scaler's state. Its tensors are live."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, tree: Mapping[str, Any]) -> None:
        """Continue from what ``state`` gave, with its tensors."""
        self.optimizer.load_state_dict(tree["optimizer"])
        for parameter, kept in self.optimizer.state.items():
            kept.update({name: _laid_out_like(parameter, value) for name, value in kept.items()})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(tree["scaler"])

    def _all_finite(self, *scalars: Tensor) -> Tensor | bool:
        """Whether they are finite on every worker: a flag on the device where the verdict is deferred."""
        if self.is_deferred:
            return self.workers.all_true(torch.isfinite(torch.stack(scalars)).all())
        finite = all(math.isfinite(scalar.item()) for scalar in scalars)
        return finite if self.workers.size == 1 else bool(self.workers.all_true(torch.tensor(finite)))

    def _update(self, finite: Tensor | bool) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif isinstance(finite, Tensor):
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            self.optimizer.step()

    def _count(self, finite: Tensor | bool) -> None:
        """Broken steps in a row, and the longest such row, without waiting for the device."""
        if isinstance(finite, Tensor):
            self._streak = torch.where(finite, 0, self._streak + 1)
            self._worst = torch.maximum(torch.as_tensor(self._worst), self._streak)
        else:
            self._streak = 0 if finite else self._streak + 1
            self._worst = max(self._worst, self._streak)


def _laid_out_like(parameter: Tensor, value: Any) -> Any:
    """``value`` with its numbers in the order in memory that ``parameter`` has, where it has one for each weight.

    Fused kernels pair weights and state by their place in memory. What comes from a checkpoint is contiguous, and weights
    of convolutions are channels-last: each would get the momentum of another.
    """
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    layout = torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False)
    return layout.copy_(value)


def _norm(gradients: list[Tensor], like: Tensor) -> Tensor:
    """Length of all gradients together. What ``torch.nn.utils.get_total_norm`` does, without its sorting by device."""
    if not gradients:
        return torch.zeros_like(like)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


class WeightAverage:
    """Exponential moving average of everything a module learns and tracks, its buffers included.

    ``average = decay * average + (1 - decay) * weights`` after each step, from the initial weights. Whole numbers,
    such as batch counters, are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.average = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self._lerp = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights."""
        # Asked anew at each step: a method may assign a new tensor to a buffer.
        own = self.module.state_dict()
        floats = [name for name, average in self.average.items() if average.is_floating_point()]
        self._lerp([self.average[name] for name in floats], [own[name] for name in floats], None)
        self._copy(own, {name: self.average[name] for name in own.keys() - set(floats)})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Scope in which the module holds the average; its own weights come back bit for bit."""
        own = self.module.state_dict()
        backup = {name: tensor.clone() for name, tensor in own.items()}
        self._copy(self.average, own)
        try:
            yield
        finally:
            self._copy(backup, self.module.state_dict())

    def load_state(self, tree: Mapping[str, Tensor]) -> None:
        """Continue from a saved ``average``."""
        self._copy(tree, self.average)

    @staticmethod
    @torch.no_grad()
    def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        for name, tensor in target.items():
            tensor.copy_(source[name])
