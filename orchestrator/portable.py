"""What of an experiment would be left behind on the machine that submits it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from orchestrator.spec import RunSettings

__all__ = ["left_behind"]

SQLITE = "sqlite:///"


def left_behind(run: RunSettings, roots: Iterable[str], checkpoints: Iterable[str]) -> list[str]:
    """One problem, with its remedy, for each path that means something else on the cluster: every relative one.

    Args:
        roots: The ``data.root`` settings of the experiment and its stages.
        checkpoints: The ``model.checkpoint`` settings.
    """
    return [
        f"{setting}: {path!r} is relative to a folder that the cluster does not have; give {remedy}"
        for setting, path, remedy in _paths(run, roots, checkpoints)
        if not path.startswith("/")
    ]


def _paths(
    run: RunSettings, roots: Iterable[str], checkpoints: Iterable[str]
) -> Iterator[tuple[str, str, str]]:
    storage = run.storage.removeprefix("file://")
    if "://" not in storage:
        yield "run.storage", storage, "an absolute path or a URL that every node reaches"
    tracking = run.tracking or ""
    if tracking.startswith(SQLITE):
        yield (
            "run.tracking",
            tracking.removeprefix(SQLITE),
            "the address of a server, or sqlite:////ABSOLUTE/PATH",
        )
    for root in roots:
        if "://" not in root:
            yield "data.root", root, "the absolute path of the data on the head"
    for path in sorted(set(checkpoints)):
        yield "model.checkpoint", path, "an absolute path that every node has"
