"""Stillhouse: sweeps of knowledge distillation in which shared stages run once."""

from orchestrator.api import Experiment
from orchestrator.errors import ConfigurationError, StillhouseError
from orchestrator.prediction import Predictions, predict
from orchestrator.result import Result
from orchestrator.space import choice, grid, loguniform, randint, uniform

__all__ = [
    "ConfigurationError",
    "Experiment",
    "Predictions",
    "Result",
    "StillhouseError",
    "choice",
    "grid",
    "loguniform",
    "predict",
    "randint",
    "uniform",
]
