"""Which teachers a criterion can learn from: decided from the experiment alone, before anything has run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from methods.base import InputStage

Kind = Literal["plain", "views", "copies", "several", "none"]
"""Where a teacher signal comes from: a network, its angular views, its noisy copies, or several networks."""


def kind_of(inputs: Mapping[str, InputStage]) -> Kind:
    """The kind of source that fills the role ``teacher``."""
    teachers = teachers_of(inputs)
    if len(teachers) > 1:
        return "several"
    if not teachers:
        return "none"
    return kind_of_stage(teachers[0])


def kind_of_stage(stage: InputStage) -> Literal["plain", "views", "copies"]:
    if "views" in stage.method.emits:
        return "views"
    return "copies" if "copies" in stage.method.emits else "plain"


def teachers_of(inputs: Mapping[str, InputStage]) -> list[InputStage]:
    """The stages of the role ``teacher``, one or many."""
    return [stage for role, stage in inputs.items() if role.partition(".")[0] == "teacher"]


def teacher_refusals(inputs: Mapping[str, InputStage], needs: frozenset[str]) -> Iterator[str]:
    """Why a criterion that needs these signals cannot learn from these stages."""
    teachers = teachers_of(inputs)
    if len(teachers) < 2:
        return
    for stage in teachers:
        if kind_of_stage(stage) != "plain":
            yield (
                f"several teachers must be plain networks, but {stage.name} emits {kind_of_stage(stage)}: "
                f"refer to {stage.inputs['teacher'].name} instead, or to {stage.name} alone"
            )
    if "maps" in needs:
        yield "a criterion on feature maps follows one network, and several teachers were named: name one of them"
    elif "pooled" in needs:
        widths = {stage.name: stage.num_features() for stage in teachers}
        if len({width for width in widths.values() if width is not None}) > 1:
            shown = ", ".join(f"{name} {width}" for name, width in widths.items())
            yield (
                f"pooled features of several teachers are averaged, but their widths differ ({shown}): "
                "name teachers of one width, or use a criterion on logits"
            )


def plain_only(inputs: Mapping[str, InputStage], purpose: str) -> Iterator[str]:
    """Refuse every teacher that is more than a network, for a stage that would silently ignore the rest."""
    for stage in teachers_of(inputs):
        if (kind := kind_of_stage(stage)) != "plain":
            yield f"{purpose} one plain network, but {stage.name} emits {kind}: refer to {stage.inputs['teacher'].name}"
