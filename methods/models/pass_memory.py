"""What a frozen network said of images that are still in use: computed once, given to all who ask."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class PassMemory(Generic[T]):
    """Results by the very tensor that went in, not by its values. They are forgotten when it is freed."""

    def __init__(self) -> None:
        self._results: Any = WeakTensorKeyDictionary()

    def once(self, images: Tensor, question: Hashable, compute: Callable[[], T]) -> T:
        """The result of ``compute``, from memory where the same question was asked of ``images`` before.

        Under autocast the same question has another answer, so the precision is part of it.
        """
        device = images.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        answers: dict[Hashable, T] = self._results.setdefault(images, {})
        if (question, precision) not in answers:
            answers[question, precision] = compute()
        return answers[question, precision]
