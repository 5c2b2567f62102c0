"""The exception family. The type says what should happen next; the text says what to do."""

from __future__ import annotations

from orchestrator.redact import redact

__all__ = [
    "ConfigurationError",
    "DamagedArtifactError",
    "DivergedError",
    "MissingArtifactError",
    "OutOfMemoryError",
    "StageFailedError",
    "StillhouseError",
    "StorageError",
]


class StillhouseError(Exception):
    """Base of everything that we raise on purpose. Its text holds no password of a URL: it may be logged anywhere."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redact(item) if isinstance(item, str) else item for item in arguments))


class ConfigurationError(StillhouseError):
    """What the user asked for cannot be done. Never retried. Carries every problem found, not only the first."""

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(redact(problem) for problem in problems)
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[ConfigurationError], tuple[str, ...]]:
        return type(self), self.problems


class StorageError(StillhouseError):
    """The storage refused or failed: not writable, full, gone. Retried with a pause, a bounded number of times."""


class MissingArtifactError(StorageError):
    """An artifact that should be there is not. The stage that makes it is run again."""


class DamagedArtifactError(StorageError):
    """An artifact's bytes do not match its manifest. It is set aside, named, and built again."""


class DivergedError(StillhouseError):
    """Training left the finite numbers. This is a result: recorded, shown in the table, not retried."""


class OutOfMemoryError(StillhouseError):
    """The device had too little memory. Recorded with device and peak; not retried with the same settings."""


class StageFailedError(StillhouseError):
    """A stage that this trial needs has already failed, with the reason of that failure."""
