"""``train.compile``: the networks of a stage compiled by torch, warmed once per node.

What is compiled are passes: the student's in training, and the frozen teacher's. Losses, evaluation, checkpoints and
artifacts are those of networks that are not compiled. Torch's cache of compiled code lies in the cache folder of the
user on each node, never in the storage: torch unpickles what it finds there.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor

from methods.base import Method, Teacher
from methods.models.tapped import Tapped
from orchestrator.errors import ConfigurationError

__all__ = ["cache_folder", "compile_networks"]

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
MOST_SIZES = 64
"""Kinds of passes (network, size of a batch, precision) that one stage may compile before that is taken for a mistake."""


def compile_networks(stage_name: str, method: Method, teachers: Iterable[Teacher], num_threads: int) -> None:
    """Let the passes of ``method`` and of its ``teachers`` be compiled, each when it is first needed.

    Raises:
        ConfigurationError: No network of theirs can be compiled, or this node has no compiler that works.
    """
    path = f"stages.{stage_name}.train.compile"
    students = _tapped([method])
    taught_by = _tapped(teacher.network for teacher in teachers)
    if not students and not taught_by:
        raise ConfigurationError(f"{path}: {type(method).__name__} runs no network that can be compiled; set it to false")  # fmt: skip
    _use_cache_folder(path)
    torch.compiler.reset()  # networks of earlier stages are gone
    torch._dynamo.config.recompile_limit = MOST_SIZES
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # not: go on uncompiled and say nothing
    torch._inductor.config.compile_threads = num_threads
    device = next(method.parameters()).device
    if reason := _why_not(device.type):
        raise ConfigurationError(
            f"{path} is true, but torch cannot compile for {device.type} on {platform.node()}: {reason}; install a C++ "
            "compiler (g++) and Python's headers there, or set it to false"
        )
    for network in students:
        network.compile_passes(in_training=True)
    for network in taught_by:
        network.compile_passes(in_training=False)


def cache_folder() -> Path:
    """Where this node keeps compiled code: the user's, unless the environment says otherwise."""
    given = os.environ.get(CACHE_VARIABLE)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else home / "stillhouse" / "compiled"


def _use_cache_folder(path: str) -> None:
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{path} is true, but the folder for compiled code cannot be made on {platform.node()}: {error}; "
            f"set {CACHE_VARIABLE} to a folder of yours on a disk of each node"
        ) from error
    os.environ[CACHE_VARIABLE] = str(folder)


def _tapped(modules: Iterable[torch.nn.Module]) -> list[Tapped]:
    return [part for module in modules for part in module.modules() if isinstance(part, Tapped)]


@cache
def _why_not(device_type: str) -> str:
    """Why nothing can be compiled here: torch's own word, from compiling next to nothing. Empty if it can."""
    try:
        torch.compile(_next_to_nothing, dynamic=False)(torch.ones(8, device=device_type))
    except RuntimeError as error:  # every error of torch's compiler is one
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    return ""


def _next_to_nothing(values: Tensor) -> Tensor:
    return values * 2 + 1
