"""The contract between a method, the training loop and the artifacts that stages leave behind.

Shape legend: B = batch, C = classes, D = pooled feature width, N = teacher branches, H, W = image sides.

A *method* says what is learnt from what. The loop calls it for a training step (a ``Step`` of named, weighted
losses) and for evaluation (statistics that can be added up over batches and workers). It never sees files, Ray or
a schedule. What a finished stage left comes back as a ``Source``; what a teacher emits for a batch is ``Signals``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from methods.catalog import Catalog


class Batch(NamedTuple):
    """What the loop hands to a method: augmented, normalised images with their labels and identity."""

    images: Tensor
    """Float images, ``[B, 3, H, W]`` (or as many channels as the data set has)."""
    labels: Tensor
    """Class indices, ``[B]``, int64."""
    indices: Tensor
    """Position of each sample in the data set, ``[B]``, int64: its identity in every epoch."""
    epoch: int = 0
    """Epoch that this batch belongs to, counted from 0."""
    strong: Tensor | None = None
    """The same images, varied more strongly, ``[B, 3, H, W]``: only for methods with ``needs_strong``."""


AnyBatch = Any
"""A named tuple with one row per sample in each of its tensors, ``indices`` among them: ``Batch``, or what another
kind of data set gives (``GroundingBatch``)."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One named loss: its plain value and the weight with which it enters the sum."""

    value: Tensor
    weight: float = 1.0


WeightSource = Literal["timm", "hub"]
"""What a setting that names first weights may name beside a local path: see ``Method.weight_sources``."""


class UpdateRule(NamedTuple):
    """How the optimizer treats a parameter, relative to the stage's training settings."""

    learning_rate_factor: float = 1.0
    """Multiplies the learning rate."""
    is_decayed: bool = True
    """Whether weight decay applies."""


PLAIN_RULE = UpdateRule()


@dataclass(frozen=True, slots=True)
class Step:
    """What a training step gives: losses (a loss of weight 0 is logged, never summed) and detached metrics."""

    losses: Mapping[str, Loss]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The weighted sum that is minimised, a scalar."""
        active = [loss for loss in self.losses.values() if loss.weight != 0.0]
        weighted = [loss.value if loss.weight == 1.0 else loss.weight * loss.value for loss in active]
        return sum(weighted[1:], weighted[0])


class Signals(NamedTuple):
    """What a teacher emits for a batch. Views are absent from a plain teacher.

    Views are whatever else votes beside the first member: the branches of a teacher, noisy copies of what it says,
    or other teachers (whose features stay absent when their widths differ).
    """

    logits: Tensor
    """``[B, C]``"""
    pooled: Tensor
    """The vector that enters the classifier, ``[B, D]``."""
    view_logits: Tensor | None = None
    """``[B, N, C]``"""
    view_pooled: Tensor | None = None
    """``[B, N, D]``"""
    maps: tuple[Tensor, ...] = ()
    """Feature maps of the network itself, ``[B, C_k, H_k, W_k]`` each; empty unless they were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be predicted: fixed by the data set."""

    num_classes: int
    in_channels: int = 3
    image_size: int = 32

    def example(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """What a network of this task is called with, for one blank sample: it is measured on that."""
        sides = (self.in_channels, self.image_size, self.image_size)
        return (torch.zeros(1, *sides, device=device, dtype=dtype),)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which network, and where its first weights come from."""

    name: str
    """A name from the model table, or ``timm/NAME`` for any timm model."""
    pretrained: bool = False
    """Start from timm's published weights (downloaded once by timm)."""
    checkpoint: str | None = None
    """Start from this local safetensors or weights-only file instead."""

    def __post_init__(self) -> None:
        if self.pretrained and not self.name.startswith("timm/"):
            raise ValueError(f"pretrained weights exist only for timm/NAME models, not for {self.name!r}")
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint exclude each other: choose one source of weights")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A finished artifact as a method sees it: enough to rebuild what it emits."""

    key: str
    method: str
    settings: Any
    model: ModelSettings | None
    task: Any
    """The task that it was trained for, of the method's ``task_type``."""
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Source]
    catalog: Catalog

    def teacher(self) -> Teacher:
        """Rebuild the teacher that this artifact emits, frozen and in evaluation mode."""
        return self.catalog.method(self.method).emit(self)


@dataclass(frozen=True, kw_only=True)
class InputStage:
    """A stage that another one refers to, as far as it is known before anything has run."""

    name: str
    method: type[Method]
    settings: Any
    model: ModelSettings | None
    inputs: Mapping[str, InputStage]
    catalog: Catalog

    def network(self) -> InputStage:
        """The stage whose network this one emits: itself, or the one that its branches or noise stand on."""
        return self if self.model is not None or not self.inputs else self.inputs["teacher"].network()

    def num_features(self) -> int | None:
        """Pooled width of that network; None where it cannot be told without the data set."""
        model = self.network().model
        return None if model is None else self.catalog.num_features(model)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen network with, optionally, branch heads on its pooled feature.

    Not an ``nn.Module`` on purpose: a method that holds it does not thereby put the teacher into its own
    parameters, checkpoints or DDP buckets.
    """

    network: nn.Module
    """Maps images to ``(logits, pooled)``; frozen, in evaluation mode."""
    num_features: int
    num_classes: int
    key: str = ""
    heads: nn.Module | None = None
    """Maps pooled ``[B, D]`` to ``(view_pooled [B, N, D], view_logits [B, N, C])``."""
    head_settings: Any = None
    """The settings of the method that trained the heads."""
    read_maps: Callable[[Tensor], tuple[Tensor, Tensor, tuple[Tensor, ...]]] | None = None
    """Gives logits, pooled feature and feature maps, where a student asked for maps; stands in for the network."""
    noise: Any = None
    """The settings of the noisy copies that are to be made of each signal (a ``tekap`` stage)."""
    reads: tuple[str, ...] = ("images",)
    """Fields of a batch on which depends what the network says. If that is more than images, it takes the whole batch."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Signals:
        """Signals for ``images`` ``[B, 3, H, W]``, without gradient. Heads are *not* run here."""
        if self.read_maps is not None:
            logits, pooled, maps = self.read_maps(images)
            return Signals(logits=logits, pooled=pooled, maps=maps)
        logits, pooled = self.network(images)
        return Signals(logits=logits, pooled=pooled)

    def to(self, device: torch.device) -> Teacher:
        """Move the networks; returns itself."""
        self.network.to(device)
        if self.heads is not None:
            self.heads.to(device)
        return self


class Method(nn.Module, ABC):
    """Base of every trained method: the networks that learn, and the losses by which they do.

    Sub-classes name their paper in the module docstring, list ``inputs`` and ``emits``, and implement
    ``forward`` (training step), ``statistics`` (evaluation) and ``artifact`` (what is kept).
    """

    version: ClassVar[int] = 1
    """Raised whenever the same settings would give other numbers: part of every content key."""
    task_type: ClassVar[type] = Task
    """What its data sets ask for: a data set of another kind is refused before anything starts."""
    Settings: ClassVar[type]
    """Frozen, keyword-only dataclass of the method's own settings."""
    inputs: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Role -> signals that its artifact must emit, for instance ``{"teacher": {"logits"}}``."""
    allows_many: ClassVar[frozenset[str]] = frozenset()
    """Roles that take a list of stages: ``teacher: [$a, $b]`` arrives as ``teacher.0`` and ``teacher.1``."""
    emits: ClassVar[frozenset[str]] = frozenset()
    """Signals that the finished artifact can emit: of ``logits``, ``pooled``, ``maps``, ``views``, ``copies``."""
    needs_model: ClassVar[bool] = True
    """Whether the stage names a ``model`` that this method trains."""
    trains: ClassVar[bool] = True
    """Whether it learns anything. If not, its stage is evaluated and kept, without a training loop."""
    can_be_compiled: ClassVar[bool] = True
    """Whether the networks that it runs are ``Tapped``, whose passes torch can compile (``train.compile``)."""
    needs_strong: ClassVar[bool] = False
    """Whether it wants ``Batch.strong`` in training."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Name -> settings that ``preset: NAME`` lays under those of the stage, such as published weights of a pair."""
    same_classes: ClassVar[bool] = True
    """Whether the inputs must tell the same classes apart as the data set."""
    weight_sources: ClassVar[Mapping[str, WeightSource]] = {}
    """Settings that name first weights: a local path, whose bytes count and not its place, or what else they may name
    (``timm/NAME``; anything on a hub)."""
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Setting -> domain worth sweeping, as it stands in a search space: ``{"loguniform": [0.1, 10]}``."""
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the training settings where this method differs from the loop's."""
    evaluation_metrics: ClassVar[tuple[str, ...]] = ("top1", "top5", "loss")
    """Names that ``summarise`` returns, so that a misspelt objective is found before anything starts."""

    def __init__(
        self, settings: Any, *, task: Any, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__()
        self.settings = settings
        self.task = task

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        """Names of settings that have no effect at this point, such as the margin of a loss of weight zero."""
        return frozenset()

    @classmethod
    def inactive_for(cls, settings: Any, inputs: Mapping[str, InputStage]) -> frozenset[str]:
        """The same, knowing what the stage refers to: a weight of views changes nothing for a plain teacher."""
        return cls.inactive(settings)

    @classmethod
    def refusals(cls, settings: Any, inputs: Mapping[str, InputStage]) -> Iterable[str]:
        """Why these inputs cannot be learnt from with these settings, found before anything starts. Pure."""
        return ()

    @classmethod
    def pair_refusals(
        cls, settings: Any, model: ModelSettings | None, inputs: Mapping[str, InputStage]
    ) -> Iterable[str]:
        """Why ``model`` cannot be trained by this method on these inputs, found before anything starts. Pure."""
        return ()

    @classmethod
    def data_refusals(cls, settings: Any, source: Any) -> Iterable[str]:
        """Why this method cannot learn from a data set (its settings), found before anything starts. Pure."""
        return ()

    @classmethod
    def teacher_refusal(cls, teacher: Teacher, task: Any) -> str | None:
        """Why ``teacher`` cannot teach on data of ``task``, found when both are there; None when it can."""
        if cls.same_classes and teacher.num_classes != task.num_classes:
            return f"teacher {teacher.key[:8]} has {teacher.num_classes} classes, the data set {task.num_classes}"
        return None

    @classmethod
    def asks(cls, settings: Any) -> tuple[str, ...] | None:
        """What it reads of a teacher's answer that has named parts, such as ``mask_logits``: these can be recorded.

        None: it does not tell, so that nothing of such an answer can be.
        """
        return None

    @classmethod
    def keeps_network(cls) -> bool:
        """Whether the artifact is a network that can be called as ``task.example`` says; only then it is measured."""
        return cls.needs_model

    def prepare(self, labels_n: Tensor, *, num_epochs: int) -> None:
        """Called once before training, by whoever knows the data: for methods that remember something per sample.

        Args:
            labels_n: Label of each sample of the training split by its index, ``[n]``; -1 where it is held out.
            num_epochs: How many epochs will be trained.
        """

    def update_rule(self, name: str, parameter: nn.Parameter) -> UpdateRule:
        """How the optimizer treats the parameter of this name; by default as all others."""
        return PLAIN_RULE

    @abstractmethod
    def forward(self, batch: AnyBatch) -> Step:
        """Losses of one training step. A batch of one sample is allowed."""

    @abstractmethod
    def statistics(self, batch: AnyBatch) -> dict[str, Tensor]:
        """Sums over the batch, in evaluation mode and without gradient. Must contain ``count`` (B)."""

    def summarise(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """Turn summed statistics into metrics. Default: divide every sum by ``count``."""
        count = float(totals["count"])
        return {name: float(total) / count for name, total in totals.items() if name != "count"}

    @classmethod
    def panel(cls, network: nn.Module, validation: Any) -> bytes | None:
        """A PNG that shows what the trained network does with a few samples of ``validation`` (a stream of the data set).

        ``network`` is what ``artifact`` gives. The choice of samples must not depend on the trial, so that trials can be
        compared. None where there is nothing to see.
        """
        return None

    @abstractmethod
    def artifact(self) -> nn.Module:
        """The module whose weights are kept. Branch heads of a student, or a teacher, are not part of it."""

    @classmethod
    @abstractmethod
    def emit(cls, source: Source) -> Teacher:
        """Rebuild the teacher that a finished artifact of this method is."""


ModelFactory = Callable[..., nn.Module]
"""``factory(num_classes=..., in_channels=...) -> network`` that maps images to logits."""
