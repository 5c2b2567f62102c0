"""Keeps the secrets of this process out of what it shows and writes: ``redact`` with the environment it runs in."""

from __future__ import annotations

import logging
import os
from typing import Any

from orchestrator.redact import environment_secrets, redact, redact_plain

__all__ = ["hide", "hide_in_logs", "hide_plain"]


def hide(text: str) -> str:
    """``text`` without passwords, tokens, and values of secret environment variables."""
    return redact(text, environment_secrets(os.environ))


def hide_plain(value: Any) -> Any:
    """The same for nested plain data."""
    return redact_plain(value, environment_secrets(os.environ))


def hide_in_logs() -> None:
    """Let everything that this process logs, tracebacks included, pass through ``hide``. A second call changes nothing."""
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for handler in root.handlers:
        if not isinstance(handler.formatter, _Hiding):
            handler.setFormatter(_Hiding(handler.formatter or logging.Formatter()))


class _Hiding(logging.Formatter):
    """Formats as another formatter does, and hides."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return hide(self._inner.format(record))
