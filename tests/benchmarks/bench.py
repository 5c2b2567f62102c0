"""Run every benchmark of this folder, each in a process of its own, and keep one Markdown table.

    python tests/benchmarks/bench.py [--full] [--only NAME ...] [--table FILE]

A benchmark is a module here with a function ``measure(quick: bool) -> Iterable[Measurement]``. Nothing is listed
anywhere: a new file takes part. Compare ratios, which come from runs that took turns in one sitting, and not seconds,
which are those of the machine named at the foot of the table. Exit status 1 when a benchmark failed, not when a target
was missed: a busy machine misses targets.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from measurement import Measurement, machine, markdown
from processes import descendants

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
QUICK_SECONDS, FULL_SECONDS = 600.0, 7200.0
"""How long one benchmark may take before it is ended and shown as failed: more than twice what it needs on an idle
machine. One in which every sweep starts a Ray of its own needs ten times as long beside fifteen other processes."""
MARK = "measurement: "


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    options = parse_options(arguments)
    if options.child:
        return run_here(options.child, quick=not options.full)
    names = [name for name in benchmarks(folder) if not options.only or name in options.only]
    started, measured, failed = time.monotonic(), [], {}
    for name in names:
        print(f"-- {name}", flush=True)
        try:
            measured += run_apart(folder / f"{name}.py", quick=not options.full)
        except RuntimeError as error:
            failed[name] = str(error)
            print(error, file=sys.stderr, flush=True)
    text = markdown(measured, failed, machine(time.monotonic() - started))
    print(text, flush=True)
    if options.table:
        options.table.write_text(text)
    return 1 if failed else 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more rounds and steps (default: quick)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these benchmarks instead of all")
    parser.add_argument("--table", type=Path, help="file for the table; with all of them: RESULTS.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.table is None and not options.only:
        options.table = RESULTS
    return options


def benchmarks(folder: Path) -> list[str]:
    """Modules of ``folder`` that define ``measure(quick)``, found without importing them."""
    return [path.stem for path in sorted(folder.glob("*.py")) if _is_benchmark(path)]


def _is_benchmark(path: Path) -> bool:
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return any(
        function.name == "measure" and [argument.arg for argument in function.args.args] == ["quick"]
        for function in functions
    )


def run_apart(path: Path, *, quick: bool) -> list[Measurement]:
    """Run one benchmark in a new process. Raises RuntimeError with its last words when it fails."""
    command = [sys.executable, __file__, "--child", str(path), *([] if quick else ["--full"])]
    seconds = QUICK_SECONDS if quick else FULL_SECONDS
    with tempfile.TemporaryDirectory(prefix="b-") as folder:  # short: Ray's sockets lie below it
        own = {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"} | own
        child = subprocess.Popen(
            command, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            end(child)
            raise RuntimeError(f"{path.stem}: not ready after {seconds:.0f} s") from error
    if child.returncode != 0:
        raise RuntimeError(f"{path.stem}: ended with {child.returncode}: {err[-2000:]}")
    return list(read_measurements(out))


def end(child: subprocess.Popen[str]) -> None:
    """Kill a benchmark with all that it started: Ray's processes are in sessions of their own."""
    below = descendants(child.pid)
    os.killpg(child.pid, signal.SIGKILL)
    for process in below:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    child.wait()


def read_measurements(text: str) -> Iterator[Measurement]:
    """Those that a child printed, among whatever else it printed."""
    for line in text.splitlines():
        if line.startswith(MARK):
            yield Measurement(**json.loads(line.removeprefix(MARK)))


def run_here(path: str, *, quick: bool) -> int:
    """What the child does: print a line of JSON for each measurement."""
    sys.path.insert(0, str(Path(path).parent))
    for measurement in import_module(Path(path).stem).measure(quick):
        print(MARK + json.dumps(asdict(measurement)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
