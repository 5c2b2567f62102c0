"""Commands that speak with a cluster: ``preflight``, ``submit``, ``status``, ``logs``, ``stop``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from orchestrator.errors import StillhouseError

__all__ = ["add_cluster_commands"]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_MARGIN_SECONDS = 30.0


def add_cluster_commands(commands: Any, epilog: str) -> None:
    """Add the commands to the parser."""
    for name, function, help_text in (
        ("preflight", _preflight, "look at every node of the cluster, before a sweep is entrusted to it"),
        ("submit", _submit, "run an experiment on a cluster, through Ray's job API"),
    ):
        command = commands.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".", epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.add_argument("experiment", metavar="EXPERIMENT", help="the experiment file (YAML)")
        command.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="settings laid over the file")
        command.set_defaults(command=function)
        if name == "submit":
            command.add_argument(
                "--detach", action="store_true", help="do not follow the log; print the job and return"
            )
            _add_address(command)
    for name, function, help_text in (
        ("status", _status, "list the submitted jobs, or show one"),
        ("logs", _logs, "show what a job prints"),
        ("stop", _stop, "stop a job as Ctrl-C would: running epochs end first; it can be submitted again"),
    ):
        command = commands.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + "."
        )
        command.add_argument(
            "job", metavar="JOB", nargs="?" if name == "status" else None, help="as `status` lists it"
        )
        if name == "logs":
            command.add_argument(
                "--follow", action="store_true", help="until it ends; its exit code becomes ours"
            )
        _add_address(command)
        command.set_defaults(command=function)


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS,
        help=f"the dashboard of the head (default: RAY_API_SERVER_ADDRESS, else {DEFAULT_ADDRESS})",
    )


def _preflight(options: argparse.Namespace) -> int:
    from orchestrator.api import Experiment

    report = Experiment.load(options.experiment, options.overrides).preflight()
    print(report)
    return 2 if report.problems else 0


def _submit(options: argparse.Namespace) -> int:
    from orchestrator.api import Experiment

    experiment = Experiment.load(options.experiment, options.overrides)
    job = experiment.submit(options.address, follow=not options.detach)
    if options.detach:
        print(job)
    return job.exit_code or 0


def _status(options: argparse.Namespace) -> int:
    from orchestrator.submit_jobs import connect_jobs, job_states, jobs_text

    states = job_states(connect_jobs(options.address), options.job)
    print(jobs_text(states, complete=options.job is not None) if states else "no jobs")
    return 0


def _logs(options: argparse.Namespace) -> int:
    from orchestrator.submit_jobs import connect_jobs, follow_job, job_log

    client = connect_jobs(options.address)
    if options.follow:
        return follow_job(client, options.job, options.address)
    print(job_log(client, options.job), end="")
    return 0


def _stop(options: argparse.Namespace) -> int:
    """Asks once, then waits for the job to end. Ctrl-C stops the waiting, not the stopping."""
    from orchestrator.submit import STOP_WAIT_SECONDS
    from orchestrator.submit_jobs import connect_jobs, job_states, stop_job

    client = connect_jobs(options.address)
    (state,) = job_states(client, options.job)
    if state.ended or not stop_job(client, options.job):
        print(f"job {options.job} has ended already: {state.state}")
        return 0
    print(
        f"job {options.job} stops after its running epochs, and is killed after {STOP_WAIT_SECONDS} s",
        file=sys.stderr,
    )
    deadline = time.monotonic() + STOP_WAIT_SECONDS + STOP_MARGIN_SECONDS
    while not (state := job_states(client, options.job)[0]).ended:
        if time.monotonic() > deadline:
            raise StillhouseError(f"job {options.job} is still {state.state}: look at the head")
        time.sleep(0.5)
    print(f"job {options.job}: {state.state}")
    return 0
