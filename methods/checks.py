"""Refusals that settings share: each names the setting, the value found and what is possible."""

from __future__ import annotations

import math
from typing import Any


def check_weights(settings: Any, *names: str) -> None:
    """Every named setting is a finite number of at least 0."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_positive(settings: Any, *names: str) -> None:
    """Every named setting is a finite number above 0."""
    for name in names:
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_choice(settings: Any, **choices: tuple[str, ...]) -> None:
    """Every named setting is one of its choices."""
    for name, known in choices.items():
        value = getattr(settings, name)
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_learns(settings: Any, *names: str) -> None:
    """At least one of the named weights is above 0: else the student would have nothing to learn from."""
    if all(getattr(settings, name) == 0 for name in names):
        raise ValueError(
            f"{' and '.join(names)} are all 0: the student would learn nothing; raise one of them"
        )
