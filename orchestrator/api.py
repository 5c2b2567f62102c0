"""The Python face: an experiment that can be planned, run here or submitted to a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from methods import BUILTIN
from methods.base import Method, ModelFactory
from methods.data.base import DataSource
from orchestrator.document import SECTIONS, apply_overrides, dump_document, read_document
from orchestrator.errors import ConfigurationError
from orchestrator.facts import checkpoint_paths, data_roots
from orchestrator.plan import Plan
from orchestrator.portable import left_behind
from orchestrator.reader import parse_experiment
from orchestrator.result import Result
from orchestrator.secrecy import hide, hide_plain
from orchestrator.space import Domain
from orchestrator.sweep import Sweep

if TYPE_CHECKING:
    from orchestrator.preflight import Preflight
    from orchestrator.submit import Job

__all__ = ["Experiment"]


class Experiment:
    """What to train, what to vary and how to choose; valid from the moment it exists.

    The sections are those of an experiment file. A search space may hold domains made by ``grid``, ``choice``,
    ``uniform``, ``loguniform`` and ``randint``. ``methods``, ``models`` and ``datasets`` add your own by name.

    Raises:
        ConfigurationError: With every mistake that was found, each with its path, value and nearest valid name.
    """

    def __init__(
        self,
        *,
        name: str,
        data: Mapping[str, Any],
        stages: Mapping[str, Mapping[str, Any]],
        search: Mapping[str, Any],
        baselines: Mapping[str, Mapping[str, Any]] | None = None,
        controls: bool = False,
        run: Mapping[str, Any] | None = None,
        methods: Mapping[str, type[Method]] | None = None,
        models: Mapping[str, ModelFactory] | None = None,
        datasets: Mapping[str, type[DataSource]] | None = None,
        command: str = "",
    ) -> None:
        document = {
            "name": name,
            "data": data,
            "stages": stages,
            "baselines": baselines or {},
            "controls": controls,
            "search": search,
        }
        self.document: dict[str, Any] = _plain({**document, "run": run or {}})
        """The experiment as plain data, ready to be written as YAML."""
        self._uses_own_code = bool(methods or models or datasets)
        catalog = BUILTIN.extended(methods, models, datasets)
        shown = dump_document(hide_plain(self.document))
        self._sweep = Sweep(parse_experiment(self.document, catalog), shown, command)

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        *,
        methods: Mapping[str, type[Method]] | None = None,
        models: Mapping[str, ModelFactory] | None = None,
        datasets: Mapping[str, type[DataSource]] | None = None,
    ) -> Experiment:
        """Read an experiment file and lay overrides such as ``views.margin=0.3`` over it."""
        document = apply_overrides(read_document(Path(path)), overrides)
        unknown = [key for key in document if key not in SECTIONS]
        sections = {key: document.get(key) for key in SECTIONS if key != "controls"}
        sections["controls"] = document.get("controls", False)
        if unknown:  # the reader reports them together with every other mistake
            parse_experiment(document, BUILTIN.extended(methods, models, datasets))
        command = hide(" ".join(["stillhouse run", str(path), *overrides]))  # for readers of the report
        return cls(**sections, methods=methods, models=models, datasets=datasets, command=command)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return self._sweep.spec.name

    def plan(self) -> Plan:
        """The stages that would run, what is shared, what the store holds, what it will cost. Prints well."""
        return self._sweep.plan()

    def run(self, *, quiet: bool = False) -> Result:
        """Run what is missing on the cluster at hand, or on this machine. Resumes and extends earlier runs."""
        return self._sweep.run(quiet)

    def result(self) -> Result:
        """What the store holds of this experiment, without running anything."""
        return self._sweep.result()

    def preflight(self) -> Preflight:
        """Look at every node of the cluster at hand: storage, versions, GPUs, clock, disk, data. Prints well."""
        return self._sweep.preflight()

    def submit(self, address: str, *, follow: bool = True) -> Job:
        """Run on a cluster through Ray's job API, for instance ``http://127.0.0.1:8265``.

        The job refuses to run under another version of Stillhouse than ours. With ``follow`` its log is shown until
        it ends; Ctrl-C then stops following, not the job.
        """
        from orchestrator.submit import submit_job

        if self._uses_own_code:
            raise ConfigurationError(
                "submit: an experiment with methods, models or data sets of your own cannot travel as YAML; submit your own script with `ray job submit`, which calls Experiment(...).run()"
            )
        spec = self._sweep.spec
        if problems := left_behind(spec.run, data_roots(spec), checkpoint_paths(spec)):
            raise ConfigurationError(*problems)
        return submit_job(address, self.name, dump_document(self.document), follow=follow)


def _plain(value: Any) -> Any:
    """Nested copies with domains in their YAML form and NumPy's scalars as Python's."""
    if isinstance(value, Domain):
        return _plain(value.to_plain())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
