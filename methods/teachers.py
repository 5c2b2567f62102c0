"""Frozen teachers: rebuilt from what a stage left, and looked up by the method that learns from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from methods.base import Source, Task, Teacher

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Evaluation mode and no gradients; returns the module itself."""
    module.requires_grad_(False)
    module.eval()
    return module


def network_teacher(source: Source) -> Teacher:
    """The teacher that a stage with a network of its own (``supervised``, ``kd``, ...) has become.

    The network is built without pretrained weights or a checkpoint, since the artifact holds every weight, and
    loaded strictly. The caller's random numbers are left where they were.
    """
    if source.model is None:
        raise ValueError(f"artifact {source.key} of method {source.method!r} names no model to rebuild")
    architecture = replace(source.model, pretrained=False, checkpoint=None)
    with torch.random.fork_rng(devices=[]):
        tapped = source.catalog.build_model(architecture, source.task)
    tapped.network.load_state_dict(dict(source.weights), strict=True)
    return Teacher(
        network=freeze(tapped),
        num_features=tapped.num_features,
        num_classes=source.task.num_classes,
        key=source.key,
    )


def teacher_for(task: Task, inputs: Mapping[str, Teacher], *, needs_views: bool = False) -> Teacher:
    """The input named ``teacher``, refused when its classes are not the task's or views are missing."""
    teacher = inputs["teacher"]
    _check_classes(task, teacher)
    if needs_views and teacher.heads is None:
        raise ValueError(
            f"the teacher ({teacher.key or 'without key'}) has no branches: refer to an angular_views stage"
        )
    return teacher


def teachers_for(task: Task, inputs: Mapping[str, Teacher]) -> tuple[Teacher, ...]:
    """All inputs of the role ``teacher``, in the order of the experiment: one, or ``teacher.0``, ``teacher.1``, ..."""
    if "teacher" in inputs:
        return (teacher_for(task, inputs),)
    numbered = [role for role in inputs if role.startswith("teacher.")]
    teachers = tuple(inputs[f"teacher.{number}"] for number in range(len(numbered)))
    for teacher in teachers:
        _check_classes(task, teacher)
    return teachers


def _check_classes(task: Task, teacher: Teacher) -> None:
    if teacher.num_classes != task.num_classes:
        raise ValueError(
            f"the teacher ({teacher.key or 'without key'}) tells {teacher.num_classes} classes apart, "
            f"the data set has {task.num_classes}: train the teacher on the same classes"
        )
