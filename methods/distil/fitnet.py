"""FitNet: a layer of the student, regressed to the shape of the teacher's, should give the same hint.

Romero et al.: "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550, in the single-stage form of the CRD and mdistiller
benchmarks: the regressor trains with the student, and

    L = ce_weight CE + hint_weight * mean((reg(f_S) - f_T)^2)

The hint is the second stage (``hint_layer`` 2; 0 would be the stem). Expected top-1 on CIFAR-100, 240 epochs: resnet32x4
-> resnet8x4 73.50, WRN-40-2 -> WRN-16-2 73.58. Batch norm in the regressor sees each worker's own share of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from methods.base import Batch, Loss, Task, Teacher
from methods.checks import check_weights
from methods.distil.adapters import MapShape, Regressor
from methods.distil.map_student import MapSettings, MapStudent
from methods.distil.teaching import Outputs, Teaching
from methods.losses import in_full_precision


@dataclass(frozen=True, kw_only=True)
class FitNetSettings(MapSettings):
    """Settings of ``fitnet``."""

    hint_weight: float = 100.0
    """Weight of the distance to the hint. 0 turns it off."""
    hint_layer: int = 2
    """Which of the maps is compared, counted from 1."""

    def __post_init__(self) -> None:
        MapSettings.__post_init__(self)
        check_weights(self, "hint_weight")
        if self.hint_layer < 1:
            raise ValueError(f"hint_layer must be at least 1 (the first stage), got {self.hint_layer!r}")


class FitNet(MapStudent):
    """Matches one layer of the teacher through a regressor. Losses ``ce``, ``kd``, ``hint``."""

    Settings = FitNetSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **MapStudent.ranges,
        "hint_weight": {"loguniform": [1, 1000]},
        "hint_layer": {"grid": [1, 2, 3]},
    }
    settings: FitNetSettings

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        layer = settings.hint_layer - 1
        self.regressor = Regressor(self.student_shapes[layer], self.teacher_shapes[layer])

    @classmethod
    def shape_refusals(
        cls, settings: Any, student: tuple[MapShape, ...], teacher: tuple[MapShape, ...]
    ) -> Iterator[str]:
        fewest = min(len(student), len(teacher))
        if settings.hint_layer > fewest:
            yield f"hint_layer is {settings.hint_layer}, but student or teacher has only {fewest} maps"
            return
        try:
            Regressor(student[settings.hint_layer - 1], teacher[settings.hint_layer - 1])
        except ValueError as error:
            yield str(error)

    def feature_losses(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        layer = self.settings.hint_layer - 1
        distance = hint_distance(self.regressor(student.maps[layer]), teaching.maps[layer])
        return {"hint": Loss(distance, self.settings.hint_weight)}


@in_full_precision
def hint_distance(regressed: Tensor, hint: Tensor) -> Tensor:
    """Mean squared difference of two maps of one shape, scalar."""
    return (regressed - hint).square().mean()
