"""The panel of pictures of a stage: drawn when the stage is stored, kept in its artifact, copied to where people look."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.base import Method
from methods.data.base import SampleStream
from orchestrator.errors import StorageError
from orchestrator.plan import PlannedStage
from orchestrator.secrecy import hide
from orchestrator.store import Store

__all__ = ["PANEL", "Drawn", "copy_panel", "draw_stage"]

logger = logging.getLogger(__name__)

PANEL = "panel.png"
"""The file of an artifact."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a look at a trained stage has given."""

    files: Mapping[str, bytes]
    """For the artifact."""
    told: Mapping[str, str]
    """For the manifest: why there is no panel, where it could not be drawn."""


def draw_stage(stage: PlannedStage, method: Method, validation: SampleStream) -> Drawn:
    """Let a trained method draw its panel. A failure is told and costs the stage nothing but its pictures."""
    try:
        panel = method.panel(method.artifact(), validation)
    except Exception as error:  # whatever goes wrong here, hours of training are worth more
        reason = hide(f"{type(error).__name__}: {error}")
        logger.warning(
            "stage %s (%s) is trained, but its pictures could not be drawn: %s", stage.name, stage.key[:8], reason
        )  # fmt: skip
        return Drawn(files={}, told={"panel": f"not drawn: {reason}"})
    return Drawn(files={} if panel is None else {PANEL: panel}, told={})


def copy_panel(store: Store, key: str, manifest: Mapping[str, Any], path: Path) -> str:
    """Write the panel of an artifact to ``path``; gives why there is none, or an empty text.

    A picture that cannot be read or written is told and stops nothing. Without a panel, and without a reason for that
    (a method that has nothing to show), nothing is written and nothing told.
    """
    if PANEL not in manifest["files"]:
        return str(manifest.get("panel", ""))
    try:
        content = store.read(key, PANEL, manifest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except (OSError, StorageError) as error:
        logger.warning("the pictures of %s are not shown: %s", key[:8], error)
        return f"not shown: {hide(str(error))}"
    return ""
