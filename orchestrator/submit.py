"""Send an experiment to a cluster through Ray's job API."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from orchestrator.errors import ConfigurationError

__all__ = ["submit_job"]

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
        ConfigurationError: No job endpoint answers there.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"submit: no Ray job endpoint answers at {address}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="stillhouse-submit-") as folder:
        (Path(folder) / "experiment.yaml").write_text(document_text, encoding="utf-8")
        (Path(folder) / "sweep.py").write_text(SCRIPT, encoding="utf-8")
        job: str = client.submit_job(
            entrypoint="python sweep.py", runtime_env={"working_dir": folder}, metadata={"stillhouse": name}
        )
    if follow:
        try:
            asyncio.run(_follow(client, job))
        except KeyboardInterrupt:
            print(
                f"no longer following; job {job} goes on: ray job logs {job} --follow --address {address}",
                file=sys.stderr,
            )
    return job


async def _follow(client: object, job: str) -> None:
    from ray.job_submission import JobSubmissionClient

    assert isinstance(client, JobSubmissionClient)
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)
