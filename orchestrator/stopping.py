"""Ending a run before its time: nothing new starts, running stages leave after their epoch with a checkpoint."""

from __future__ import annotations

import time
from typing import Literal

from orchestrator.dispatch import Dispatcher
from orchestrator.errors import StorageError
from orchestrator.progress import Display
from orchestrator.store import Store
from orchestrator.trial import stop_path

__all__ = ["Stopper"]


class Stopper:
    """Stops one run of a sweep, once, on behalf of the user (Ctrl-C) or of the budget."""

    def __init__(self, dispatcher: Dispatcher, store: Store, display: Display, run_id: str) -> None:
        self._dispatcher = dispatcher
        self._store = store
        self._display = display
        self._path = stop_path(run_id)
        self.cause: Literal["", "interrupt", "budget"] = ""
        """What asked first."""

    def interrupt(self) -> None:
        """For the first Ctrl-C."""
        self._stop(
            "interrupt",
            "interrupted: running stages stop after their epoch and keep a checkpoint; Ctrl-C again stops now",
        )

    def budget_reached(self, limits: list[str]) -> None:
        """For a budget that is used up; ``limits`` say which."""
        self._stop(
            "budget",
            f"budget reached: {'; '.join(limits)}. Running stages stop after their epoch and keep a checkpoint",
        )

    def clear(self) -> None:
        """Take the request back: the run has ended."""
        if self.cause:
            self._store.delete_json(self._path)

    def _stop(self, cause: Literal["interrupt", "budget"], text: str) -> None:
        if self.cause:
            self._display.event("the run is stopping already; Ctrl-C again stops now")
            return
        self.cause = cause
        self._dispatcher.cancel_waiting()
        self._display.event(text)
        try:
            self._store.write_json(self._path, {"at": time.time()})
        except StorageError as error:
            self._display.event(
                f"running stages could not be asked to stop, they run to their end ({error}); Ctrl-C stops now"
            )
