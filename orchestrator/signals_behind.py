"""One thread that does, in order, what a training step must not wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

__all__ = ["Behind"]

BEAT_SECONDS = 60.0
MAX_WAITING_BYTES = 2**28
"""More than this is not kept in memory for a slow disk; what does not fit is not recorded."""

Work = Callable[[], None]


class Behind:
    """Runs what is submitted, and in between ``beat``, at most once a minute."""

    def __init__(self, beat: Work, beat_seconds: float = BEAT_SECONDS) -> None:
        self._beat, self._beat_seconds = beat, beat_seconds
        self._waiting: queue.Queue[tuple[Work, int] | None] = queue.Queue()
        self._waiting_bytes = 0
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def submit(self, work: Work, num_bytes: int = 0) -> bool:
        """Have ``work`` done; False where so many bytes wait already that it is left out."""
        with self._lock:
            if num_bytes and self._waiting_bytes + num_bytes > MAX_WAITING_BYTES:
                return False
            self._waiting_bytes += num_bytes
        self._waiting.put((work, num_bytes))
        return True

    def wait(self) -> None:
        """Return when all that was submitted is done. Raises what any of it has raised."""
        self._waiting.join()
        self.check()

    def check(self) -> None:
        """Raise what the work has raised, if anything."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Do what is left, and end the thread."""
        self._waiting.put(None)
        self._thread.join()
        self.check()

    def _run(self) -> None:
        is_open = True
        while is_open:
            try:
                item = self._waiting.get(timeout=self._beat_seconds)
            except queue.Empty:
                self._do(self._beat)
                continue
            if item is None:
                is_open = False
            else:
                self._do(item[0])
                with self._lock:
                    self._waiting_bytes -= item[1]
            self._waiting.task_done()

    def _do(self, work: Work) -> None:
        try:
            work()
        except Exception as error:  # raised in the thread that trains, at its next check
            self._error = error
