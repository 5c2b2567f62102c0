"""The command line: ``stillhouse plan | run | results | submit | export | ... | doctor``.

Exit codes: 0 done; 1 some trials failed; 2 the experiment file, or the machine, is wrong; 3 stopped at the budget;
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli_cluster import add_cluster_commands
from orchestrator.cli_predict import add_predict_command
from orchestrator.errors import ConfigurationError, StillhouseError
from orchestrator.secrecy import hide, hide_in_logs

if TYPE_CHECKING:
    from orchestrator.store import Store

__all__ = ["main"]

EPILOG = """\
An override is PATH=VALUE: a section (search.seeds=3, run.storage=/data/runs, data.root=PATH) or a stage
(views.margin=0.3, student.train.epochs=60). Fixing a setting takes it out of the search space.

exit codes: 0 done, 1 some trials failed, 2 the experiment file is wrong, 3 stopped at the budget, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    hide_in_logs()
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except ConfigurationError as error:
        for problem in error.problems:
            print(f"error: {hide(problem)}", file=sys.stderr)
        return 2
    except StillhouseError as error:
        print(f"error: {hide(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the store", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillhouse",
        description="Sweeps of knowledge distillation for vision models, in which shared stages run once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, function, help_text in (
        ("plan", _plan, "show the stage graph, what is shared, what is stored, and the cost; starts nothing"),
        (
            "run",
            _run,
            "run what is missing; the same command resumes an interrupted sweep and extends a finished one",
        ),
        ("results", _results, "show the table from what the store holds"),
    ):
        command = commands.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".", epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.add_argument("experiment", metavar="EXPERIMENT", help="the experiment file (YAML)")
        command.add_argument("overrides", metavar="PATH=VALUE", nargs="*", help="settings laid over the file")
        command.set_defaults(command=function)
    add_cluster_commands(commands, EPILOG)
    _add_artifact_commands(commands)
    add_predict_command(commands, _existing_store)
    _add_listings(commands)
    _add_doctor(commands)
    return parser


def _add_listings(commands: Any) -> None:
    for name, function, help_text in (
        ("methods", _methods, "what can be learnt from what, with settings and defaults"),
        ("models", _models, "the networks, with their parameter counts"),
    ):
        listing = commands.add_parser(name, help=help_text)
        listing.add_argument("name", nargs="?", help="show only this one")
        listing.set_defaults(command=function)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="look for what is wrong with this machine or cluster")
    doctor.add_argument("--storage", default="runs", help="the storage to try (default: runs)")
    doctor.add_argument("--tracking", default=None, help="an MLflow tracking URI to try")
    doctor.add_argument(
        "--allow-open", action="append", default=[], metavar="ADDRESS",
        help="accept that jobs are taken from anybody at this address (also STILLHOUSE_ALLOW_OPEN, by commas)",
    )  # fmt: skip
    doctor.set_defaults(command=_doctor)


def _add_artifact_commands(commands: Any) -> None:
    """Commands about one artifact."""
    for name, function, help_text in (
        ("show", _show, "manifest and lineage of an artifact"),
        ("export", _export, "write a trained network as ONNX, checked against the original"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("key", metavar="KEY", help="its key, or the first digits of it")
        command.add_argument("--storage", default="runs", help="where the artifacts are (default: runs)")
        command.set_defaults(command=function)
        if name == "export":
            command.add_argument("--output", metavar="FILE", help="the file to write (default: KEY.onnx)")


def _plan(options: argparse.Namespace) -> int:
    from orchestrator.api import Experiment

    print(Experiment.load(options.experiment, options.overrides).plan())
    return 0


def _run(options: argparse.Namespace) -> int:
    from orchestrator.api import Experiment

    return finish(Experiment.load(options.experiment, options.overrides))


def finish(experiment: object) -> int:
    """Plan, run and show an experiment; returns the exit code. Shared with ``cluster/sweep.py``."""
    from orchestrator.api import Experiment

    assert isinstance(experiment, Experiment)
    print(experiment.plan(), flush=True)
    result = experiment.run()
    print()
    print(result.text(_width()))
    print(f"report:  {result.folder / 'report' / 'report.md'}")
    print(f"MLflow:  {result.tracking_command}")
    for point, reason in result.broken:
        print(f"impossible point {dict(point.values)}: {reason}", file=sys.stderr)
    if result.interrupted:
        print("interrupted; the same command goes on from the store", file=sys.stderr)
        return 130
    if result.budget_reached:
        print(
            f"stopped at the budget: {result.budget_reached}; the same command with a larger budget goes on from the store",
            file=sys.stderr,
        )
        return 3
    return 1 if result.num_failed else 0


def _results(options: argparse.Namespace) -> int:
    from orchestrator.api import Experiment

    result = Experiment.load(options.experiment, options.overrides).result()
    print(result.text(_width()))
    print(f"report:  {result.write()}")
    print(f"MLflow:  {result.tracking_command}")
    return 1 if result.num_failed else 0


def _show(options: argparse.Namespace) -> int:
    from orchestrator.describe import artifact_text

    print(artifact_text(_existing_store(options.storage), options.key))
    return 0


def _export(options: argparse.Namespace) -> int:
    from orchestrator.export import export_artifact

    store = _existing_store(options.storage)
    key = store.find(options.key)
    path = Path(options.output or f"{key[:12]}.onnx")
    difference = export_artifact(store, key, path)
    print(f"{path}: largest difference from the network {difference:.1e} of the largest logit")
    return 0


def _existing_store(storage: str) -> Store:
    from orchestrator.store import Store

    if "://" not in storage and not Path(storage).is_dir():
        raise ConfigurationError(
            f"--storage: {storage!r} is not a folder; name the run.storage of the experiment"
        )
    return Store(storage)


def _methods(options: argparse.Namespace) -> int:
    from orchestrator.describe import methods_text

    print(methods_text(options.name))
    return 0


def _models(options: argparse.Namespace) -> int:
    from orchestrator.describe import models_text

    print(models_text(options.name))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from orchestrator.doctor import examine
    from orchestrator.endpoints import allowed_open

    findings = examine(options.storage, options.tracking, allowed_open() | set(options.allow_open))
    for finding in findings:
        print(finding)
    return 2 if any(finding.level == "wrong" for finding in findings) else 0


def _width() -> int:
    return shutil.get_terminal_size((140, 24)).columns


if __name__ == "__main__":
    sys.exit(main())
