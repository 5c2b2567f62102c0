"""Send an experiment to a cluster through Ray's job API.

The experiment travels inside the job's working folder, as the file ``experiment.yaml``: neither the job's entrypoint
nor its metadata shows what is in it. Beside it lie this installation's identity and the code that compares it with
the cluster's, which is the first thing that the job does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import source
from orchestrator.errors import ConfigurationError
from orchestrator.submit_jobs import connect_jobs, follow_job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = ["Job", "submit_job"]

AGENT_SECONDS = 60.0
STOP_WAIT_SECONDS = 600
"""How long a stopped job may take to finish its running epochs before Ray kills it; Ray's own default is 3 s.
``RAY_JOB_STOP_WAIT_TIME_S`` in the submitter's environment replaces it."""

SCRIPT = """\
import json
import sys
from pathlib import Path

from stillhouse_source import difference, identity

problem = difference(json.loads(Path("submitter.json").read_text()), identity())
if problem:
    print(f"error: this job was submitted by another version. {problem}", file=sys.stderr)
    sys.exit(2)

from orchestrator.cli import main

sys.exit(main(["run", "experiment.yaml"]))
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """An experiment that was handed to a cluster."""

    id: str
    """Ray's name of the job."""
    address: str
    """The dashboard of the cluster."""
    exit_code: int | None = None
    """What ``stillhouse run`` ended with there. None: it was not followed to its end."""

    def __str__(self) -> str:
        return self.id


def submit_job(address: str, name: str, document_text: str, *, follow: bool) -> Job:
    """Submit the experiment. The job refuses to run under another version, or other source, of Stillhouse than ours.

    Args:
        address: The dashboard of the head, for instance ``http://127.0.0.1:8265``.
        follow: Show the job's log until it ends. Ctrl-C stops following; the job goes on.

    Raises:
        ConfigurationError: No job endpoint answers there, or it refuses our token.
    """
    client = connect_jobs(address)
    with tempfile.TemporaryDirectory(prefix="stillhouse-submit-") as folder:
        _pack(Path(folder), document_text)
        job = _submit_patiently(client, folder, name)
    if not follow:
        return Job(id=job, address=address)
    print(f"job {job} is submitted; Ctrl-C stops following it, not the job", file=sys.stderr)
    return Job(id=job, address=address, exit_code=follow_job(client, job, address))


def _pack(folder: Path, document_text: str) -> None:
    own = Path(source.__file__).read_text(encoding="utf-8")
    contents = {
        "experiment.yaml": document_text,
        "submitter.json": json.dumps(source.identity()),
        "stillhouse_source.py": own,
        "sweep.py": SCRIPT,
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")


def _submit_patiently(client: JobSubmissionClient, folder: str, name: str) -> str:
    """A head that has just started has no agent yet, and says so: wait for it a while."""
    wait_seconds = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", str(STOP_WAIT_SECONDS))
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            job: str = client.submit_job(
                entrypoint="python sweep.py",
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": wait_seconds},
                },
                metadata={"stillhouse": name},
            )
            return job
        except RuntimeError as error:
            if "try again later" not in str(error):
                raise ConfigurationError(f"submit: the cluster does not take the job: {error}") from error
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"submit: the head has had no job agent for {AGENT_SECONDS:.0f} s: look at its dashboard_agent.log ({error})"
                ) from error
            time.sleep(1.0)
