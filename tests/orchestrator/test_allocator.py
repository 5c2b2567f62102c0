"""Freed memory stays with the process: the variables do what they are set for, wherever processes are started."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.allocator import ENVIRONMENT

CLUSTER = Path(__file__).parents[2] / "cluster"
STEPS = """
import resource, threading
import numpy as np

def step():
    return [np.ones(500_000) for _ in range(40)]

def train():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

trial = threading.Thread(target=train)
trial.start()
trial.join()
"""
"""As a training does it: blocks of some megabytes, freed together, in a thread."""


def num_faults(environment: dict[str, str]) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    told = subprocess.run(
        [sys.executable, "-c", STEPS],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(told.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are glibc's")
def test_memory_is_not_given_back_between_steps() -> None:
    assert num_faults(ENVIRONMENT) < 1000 < num_faults({}) / 5


@pytest.mark.parametrize("file", ["environment.sh", "Dockerfile"])
def test_nodes_of_a_cluster_are_told_the_same(file: str) -> None:
    text = (CLUSTER / file).read_text()
    assert all(f"{name}={value}" in text for name, value in ENVIRONMENT.items())
