"""Checkpoints that are written behind the training: serialised at once, written by a thread while the run goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from orchestrator.checkpoint import Checkpoints, to_bytes
from orchestrator.fence import OPEN, Fence
from orchestrator.training import StopTraining

__all__ = ["BackgroundSlot"]

logger = logging.getLogger(__name__)


class BackgroundSlot:
    """A slot whose ``save`` returns as soon as the bytes are taken; at most one checkpoint is on its way.

    A write that failed raises its error at the next ``save``, or when the slot is closed. Use it as a context: leaving
    it waits for what is on its way. When it is left by an error, that one stays, and the failed write is logged; who
    stops on purpose counts on the checkpoint, and hears of the failure. It may be entered again afterwards.
    """

    def __init__(
        self, checkpoints: Checkpoints, fence: Fence = OPEN, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Write to ``checkpoints``, looking at ``fence`` again right before each write."""
        self._checkpoints, self._fence, self._clock = checkpoints, fence, clock
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self.lag_seconds = 0.0
        """How long the last write took: what is trained meanwhile would be lost with it."""

    def load(self) -> Mapping[str, Any] | None:
        """The newest intact tree, or None."""
        self.finish()
        return self._checkpoints.load()

    def save(self, tree: Mapping[str, Any]) -> None:
        """Keep ``tree`` as the newest checkpoint, soon. Waits for the one before, and raises what became of it."""
        contents = to_bytes(tree)
        self.finish()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(self._write, contents)

    def finish(self) -> None:
        """Wait until everything is written. Raises the error of the last write."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, contents: Mapping[str, bytes]) -> None:
        started = self._clock()
        self._fence.check()
        self._checkpoints.write(contents)
        self.lag_seconds = self._clock() - started

    def __enter__(self) -> BackgroundSlot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except Exception as failure:
            if error is None or isinstance(error, StopTraining):
                raise
            logger.warning("the last checkpoint was not written: %s", failure)
        finally:
            thread, self._thread = self._thread, None
            if thread is not None:
                thread.shutdown()
