"""Run an experiment where this script runs.

On a cluster:   ray submit cluster.yaml sweep.py -- EXPERIMENT [PATH=VALUE ...]
On a laptop:    python cluster/sweep.py EXPERIMENT [PATH=VALUE ...]

It joins the Ray cluster of the machine it runs on, after waiting for the nodes that the cluster file promises, and
starts a local one where there is none. It is the only file that `ray submit` sends, so it carries the version that the
nodes must have installed.
"""

import sys
from importlib.metadata import PackageNotFoundError, version

VERSION = "0.1.0"
"""Of Stillhouse, where this script comes from."""


def version_problem() -> str | None:
    """What is wrong with the Stillhouse installed here, seen from the one that this script was sent from."""
    try:
        installed = version("stillhouse")
    except PackageNotFoundError:
        return f"no Stillhouse is installed for {sys.executable}; the cluster file's setup_commands install {VERSION}: run `ray up` again"
    if installed != VERSION:
        return f"Stillhouse {installed} is installed here, but {VERSION} sent this script: build the wheel and run `ray up` again"
    return None


def main(arguments: list[str]) -> int:
    if problem := version_problem():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    from orchestrator.cli import main as run_command

    return run_command(["run", *(argument for argument in arguments if argument != "--")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
