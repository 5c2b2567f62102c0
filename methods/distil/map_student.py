"""The base of criteria that compare feature maps: which maps are read, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from methods.base import InputStage, ModelSettings, Task, Teacher
from methods.distil.adapters import MapShape
from methods.distil.settings import TemperedSettings
from methods.distil.student import FeatureStudent
from methods.distil.teaching import Outputs
from methods.models import Activation, MapReader, stage_taps
from methods.models.tapped import Tapped


@dataclass(frozen=True, kw_only=True)
class MapSettings(TemperedSettings):
    """Settings of every criterion on feature maps."""

    kd_weight: float = 0.0
    """Weight of the divergence from the teacher's probabilities, added to the comparison of features."""
    student_maps: tuple[str, ...] = ()
    """Where the student's maps are read: module paths, shallow to deep (``layer1``, ``block.0.act:input``,
    ``blocks.3:tokens``). Empty: the stages that the network declares."""
    teacher_maps: tuple[str, ...] = ()
    """Where the teacher's maps are read, as many as of the student."""


class MapStudent(FeatureStudent):
    """A student that compares feature maps, stage by stage, with those of one network."""

    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"logits", "pooled", "maps"})}
    allows_many: ClassVar[frozenset[str]] = frozenset()
    teacher_activation: ClassVar[Activation] = "after"
    """On which side of their activation the teacher's maps are read."""
    settings: MapSettings

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        network: Any = self.teacher.network
        self._student_reader = _reader(self.model, settings.student_maps, "after")
        teacher_reader = _reader(network, settings.teacher_maps, self.teacher_activation)
        self.teacher = replace(self.teacher, read_maps=teacher_reader)
        self.teachers = (self.teacher,)
        image_shape = (task.in_channels, task.image_size, task.image_size)
        self.student_shapes = self._student_reader.shapes(image_shape)
        self.teacher_shapes = teacher_reader.shapes(image_shape)
        for reason in self.shape_refusals(settings, self.student_shapes, self.teacher_shapes):
            raise ValueError(reason)

    @classmethod
    def shape_refusals(
        cls, settings: Any, student: tuple[MapShape, ...], teacher: tuple[MapShape, ...]
    ) -> Iterator[str]:
        """Why maps of these shapes cannot be compared."""
        if len(student) != len(teacher):
            yield (
                f"maps are compared stage by stage, but the student has {len(student)} and the teacher "
                f"{len(teacher)}: name equally many in student_maps and teacher_maps"
            )

    @classmethod
    def pair_refusals(
        cls, settings: Any, model: ModelSettings | None, inputs: Mapping[str, InputStage]
    ) -> Iterable[str]:
        teacher = inputs["teacher"].network() if "teacher" in inputs else None
        if model is None or teacher is None or teacher.model is None:
            return
        shapes = []
        sides: tuple[tuple[str, ModelSettings, Activation, tuple[str, ...]], ...] = (
            ("student", model, "after", settings.student_maps),
            ("teacher", teacher.model, cls.teacher_activation, settings.teacher_maps),
        )
        for side, network, activation, taps in sides:
            try:
                shapes.append(teacher.catalog.map_shapes(network, activation=activation, taps=taps))
            except ValueError as error:
                yield f"{side} {network.name}: {error}"
        if len(shapes) == 2 and shapes[0] is not None and shapes[1] is not None:
            yield from cls.shape_refusals(settings, shapes[0], shapes[1])

    def student(self, images: Tensor) -> Outputs:
        return Outputs(*self._student_reader(images))


def _reader(network: nn.Module, taps: tuple[str, ...], activation: Activation) -> MapReader:
    """The reader of named taps, or of the stages that the network declares."""
    if not isinstance(network, Tapped):
        raise ValueError(f"{type(network).__name__} is not tapped: build it through the catalog")
    return MapReader(network, taps or stage_taps(network.network, activation))
