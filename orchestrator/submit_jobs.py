"""Submitted jobs seen from outside: what they are, what they print, how they are stopped. Through Ray's job API."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ConfigurationError, StillhouseError
from orchestrator.redact import redact

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = ["JobState", "connect_jobs", "follow_job", "job_log", "job_states", "jobs_text", "stop_job"]

ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}
INTERRUPTED = 130
SETTLE_SECONDS = 20.0
"""A job's log ends a little before its state says how it ended."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """One submitted job."""

    id: str
    experiment: str
    """Name of its experiment; empty for a job that is not ours."""
    state: str
    """As Ray calls it: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    since: float
    """Unix seconds: its start, or its end once it has ended."""
    message: str
    exit_code: int | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def connect_jobs(address: str) -> JobSubmissionClient:
    """A client of the job endpoint. ``ConfigurationError`` when there is none, or when it does not take our token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not re.match(r"https?://[^/\s]", address):  # Ray would import a module named by any other scheme
        raise ConfigurationError(
            f"--address: {address!r} is not the http address of a Ray dashboard, for instance http://127.0.0.1:8265"
        )
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, OSError, AuthenticationError) as error:
        raise ConfigurationError(
            f"submit: no Ray job endpoint takes us at {address}: {error}. Is the SSH tunnel to the head open, and are "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) set?"
        ) from error


def job_states(client: JobSubmissionClient, job: str | None = None) -> list[JobState]:
    """All submitted jobs, the newest first, or the one that is named."""
    if job is not None:
        name = _checked(job)
        return [_state(_asked(lambda: client.get_job_info(name), job))]
    found = [details for details in _asked(client.list_jobs, "jobs") if details.submission_id]
    return sorted((_state(details) for details in found), key=lambda state: -state.since)


def jobs_text(states: list[JobState], *, complete: bool = False) -> str:
    """A table for a terminal; ``complete`` shows whole messages instead of their first line."""
    rows = [("job", "experiment", "state", "since", "message")]
    for state in states:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.since))
        message = state.message if complete else (state.message.splitlines() or [""])[0][:100]
        rows.append((state.id, state.experiment or "-", state.state, since, redact(message)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def job_log(client: JobSubmissionClient, job: str) -> str:
    """What a job has printed so far."""
    name = _checked(job)
    return str(_asked(lambda: client.get_job_logs(name), job))


def follow_job(client: JobSubmissionClient, job: str, address: str) -> int:
    """Show a job's log until it ends; returns its exit code. Ctrl-C stops following, not the job, and gives 130.

    Raises:
        StillhouseError: The connection broke; the job may well go on.
    """
    again = f"stillhouse logs {job} --follow --address {redact(address)}"
    _checked(job)
    try:
        asyncio.run(_show(client, job))
        return _exit_code(client, job)
    except KeyboardInterrupt:
        print(f"\nno longer following; job {job} goes on. To follow it again: {again}", file=sys.stderr)
        return INTERRUPTED
    except (RuntimeError, OSError) as error:
        raise StillhouseError(
            f"the log of job {job} cannot be followed any more: {error}. The job may go on: {again}"
        ) from error


def stop_job(client: JobSubmissionClient, job: str) -> bool:
    """Ask a job to stop, as Ctrl-C would: its running epochs end first. False if it had ended already. Does not wait."""
    name = _checked(job)
    return bool(_asked(lambda: client.stop_job(name), job))


async def _show(client: JobSubmissionClient, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def _exit_code(client: JobSubmissionClient, job: str) -> int:
    deadline = time.monotonic() + SETTLE_SECONDS
    while not (state := job_states(client, job)[0]).ended:
        if time.monotonic() > deadline:
            raise RuntimeError(f"its log has ended but its state is still {state.state}")
        time.sleep(0.2)
    if state.state == "STOPPED":
        return INTERRUPTED
    if state.state == "SUCCEEDED":
        return 0
    if state.exit_code is None:  # it never started: the log says nothing, the message does
        print(redact(state.message), file=sys.stderr)
    return state.exit_code or 1


def _state(details: Any) -> JobState:
    return JobState(
        id=str(details.submission_id),
        experiment=str((details.metadata or {}).get("stillhouse", "")),
        state=str(details.status.value),
        since=(details.end_time or details.start_time or 0) / 1000,
        message=str(details.message or ""),
        exit_code=details.driver_exit_code,
    )


def _asked(question: Callable[[], Any], what: str) -> Any:
    """The endpoint's answer; what it refuses becomes an error that names the job."""
    try:
        return question()
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            raise ConfigurationError(f"{what}: no such job; `stillhouse status` lists them") from error
        raise StillhouseError(f"{what}: the job endpoint refuses: {error}") from error


def _checked(job: str) -> str:
    """A job's name becomes a part of a URL."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", job) or ".." in job:
        raise ConfigurationError(f"a job is named by letters, digits, '_', '.' and '-', got {job!r}")
    return job
