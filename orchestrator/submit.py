"""Send an experiment to a cluster through Ray's job API."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import ConfigurationError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = ["submit_job"]

AGENT_SECONDS = 60.0

SCRIPT = """\
import sys

from orchestrator.cli import main

sys.exit(main(["run", "experiment.yaml"]))
"""


def submit_job(address: str, name: str, document_text: str, *, follow: bool) -> str:
    """Submit the experiment; returns the job's id. The cluster needs the same version of Stillhouse installed.

    Args:
        address: The dashboard of the head, for instance ``http://127.0.0.1:8265``.
        follow: Show the job's log until it ends. Ctrl-C stops following; the job goes on.

    Raises:
        ConfigurationError: No job endpoint answers there, or it refuses our token.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise ConfigurationError(f"submit: no Ray job endpoint takes us at {address}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="stillhouse-submit-") as folder:
        (Path(folder) / "experiment.yaml").write_text(document_text, encoding="utf-8")
        (Path(folder) / "sweep.py").write_text(SCRIPT, encoding="utf-8")
        job = _submit_patiently(client, folder, name)
    if follow:
        try:
            asyncio.run(_follow(client, job))
        except KeyboardInterrupt:
            print(
                f"no longer following; job {job} goes on: ray job logs {job} --follow --address {address}",
                file=sys.stderr,
            )
    return job


def _submit_patiently(client: JobSubmissionClient, folder: str, name: str) -> str:
    """A head that has just started has no agent yet, and says so: wait for it a while."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            job: str = client.submit_job(
                entrypoint="python sweep.py",
                runtime_env={"working_dir": folder},
                metadata={"stillhouse": name},
            )
            return job
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)
