"""Run an experiment where this script runs.

On a cluster:   ray submit cluster.yaml sweep.py -- EXPERIMENT [PATH=VALUE ...]
On a laptop:    python cluster/sweep.py EXPERIMENT [PATH=VALUE ...]

It joins the Ray cluster of the machine it runs on, and starts a local one where there is none.
"""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--"]
    sys.exit(main(["run", *arguments]))
