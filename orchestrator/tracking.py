"""Sends a sweep's journal to MLflow from one background thread. The only file that imports MLflow.

Nothing that trains ever waits for this: ``orchestrator.journal.Journal`` has written every operation to a local file
before, and a ``Mirror`` follows that file as fast as the tracking server takes it. A server that is slow, locked or
down is tried again, also by a later process. Everything is sent so that sending it twice changes nothing.

Side effects on the whole process, made when the thread starts and kept: ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` 0 and
``MLFLOW_HTTP_REQUEST_TIMEOUT`` 20 (the mirror retries by itself), no MLflow telemetry and no run links on stdout, each
only where the user has set nothing; and quiet ``alembic`` and ``mlflow.store.db`` loggers.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.bundle import BundleSettings, read_bundle, requirements
from orchestrator.errors import StillhouseError
from orchestrator.journal import Record
from orchestrator.mirror import DATA, Failure, Follower
from orchestrator.redact import redact
from orchestrator.tracking_state import MirrorState
from orchestrator.tracking_uri import absolute, artifact_folder, reach, ui_command
from orchestrator.tracking_values import (
    ID_TAG,
    MAX_METRICS,
    MAX_OTHERS,
    PARENT_TAG,
    merged,
    milliseconds,
    run_tags,
    tag_texts,
    tracking_name,
)

__all__ = ["Mirror", "ui_command"]

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
}
QUIET_LOGGERS = {"alembic": logging.ERROR, "mlflow.store.db.utils": logging.CRITICAL}
REJECTED = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
UNAVAILABLE = {"TEMPORARILY_UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
UNAVAILABLE |= {"REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ENDPOINT_NOT_FOUND"}


class Mirror:
    """One sweep's way to MLflow: started by the driver, closed at its end, taken up again by any later process."""

    def __init__(
        self, journal_path: Path, tracking_uri: str, experiment: str, *, retry_seconds: float = 5.0
    ) -> None:
        """Raises ConfigurationError for a tracking URI that MLflow does not understand. Touches no network."""
        self.tracking_uri = absolute(tracking_uri)
        self._experiment = experiment
        self._follower = Follower(
            journal_path, f"{self.tracking_uri} {experiment}", self._connect, retry_seconds=retry_seconds
        )

    def check(self) -> str | None:
        """None, or one sentence why the server cannot be reached now. Takes a few seconds at most."""
        trouble = reach(self.tracking_uri)
        return None if trouble is None else f"{trouble}."

    def start(self) -> None:
        """Start the thread; returns at once."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._follower.start()

    def drain(self, timeout_seconds: float) -> int:
        """Wait until MLflow has everything, at most this long; the number of records still waiting."""
        return self._follower.drain(timeout_seconds)

    def close(self, timeout_seconds: float = 10.0) -> int:
        """Drain and stop; the number of records left for a later process."""
        return self._follower.close(timeout_seconds)

    def run_id(self, id: str) -> str | None:
        """The MLflow run that our ``id`` has become, None before it was sent."""
        return self._follower.state.runs.get(id)

    def run_url(self, id: str) -> str | None:
        """The page of a run on an http server; None for other stores or before it was sent."""
        run_id = self.run_id(id)
        if run_id is None or not self.tracking_uri.startswith("http"):
            return None
        experiment_id = self._follower.state.experiment_id
        return f"{redact(self.tracking_uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"

    @property
    def num_rejected(self) -> int:
        """Values and records that MLflow refused for good; each was named in a warning."""
        return self._follower.state.num_rejected

    def _connect(self, state: MirrorState) -> MlflowTarget:
        from mlflow import MlflowClient

        for name, level in QUIET_LOGGERS.items():
            logging.getLogger(name).setLevel(level)
        client = MlflowClient(tracking_uri=self.tracking_uri)
        found = _experiment(client, self._experiment, artifact_folder(self.tracking_uri))
        if (found.experiment_id, found.creation_time) != (state.experiment_id, state.experiment_created):
            state.restart(found.experiment_id, found.creation_time)
        return MlflowTarget(client, state)


class MlflowTarget:
    """Turns journal records into calls of an ``MlflowClient`` with explicit run ids; safe to repeat."""

    def __init__(self, client: Any, state: MirrorState) -> None:
        self._client = client
        self._state = state
        self._named: set[str] = set()
        self._actions: dict[str, Callable[[str, Record], None]] = {
            "artifact": self._artifact,
            "model": self._model,
            "link": self._link,
            "end": self._end,
        }

    def send(self, group: Sequence[Record]) -> None:
        record = group[0]
        id = record["id"]
        if record["op"] == "run":
            self._declare(id, record)
        elif id not in self._state.runs:
            self._refuse(f"records of {id}, whose run could not be created")
        elif id not in self._state.complete:
            if record["op"] in DATA:
                self._log(self._state.runs[id], id, group)
            else:
                self._actions[record["op"]](self._state.runs[id], record)

    def settle(self) -> None:
        """Delete the empty twin of a run whose first creation was carried out although no answer came back."""
        for id in list(self._state.uncertain):
            own = self._state.runs.get(id)
            for run in self._find(id):
                if (
                    own is not None
                    and run.info.run_id != own
                    and not run.data.metrics
                    and not run.data.params
                ):
                    self._client.delete_run(run.info.run_id)
            self._state.uncertain.remove(id)

    def alive(self) -> bool:
        try:
            self._client.get_experiment(self._state.experiment_id)
        except Exception as problem:
            logger.debug("MLflow does not answer: %s", problem)
            return False
        return True

    def classify(self, problem: Exception) -> Failure:
        from mlflow.exceptions import MlflowException
        from requests import exceptions

        if isinstance(problem, StillhouseError | FileNotFoundError | NotADirectoryError):
            return Failure.REJECTED
        if isinstance(problem, exceptions.ConnectionError | exceptions.Timeout):
            return Failure.UNAVAILABLE
        if not isinstance(problem, MlflowException):
            return Failure.UNKNOWN
        text = str(problem)
        no_answer = text.startswith("API request to") and "exception" in text and "too many 500" not in text
        if problem.error_code in UNAVAILABLE or no_answer:
            return Failure.UNAVAILABLE
        return Failure.REJECTED if problem.error_code in REJECTED else Failure.UNKNOWN

    def _declare(self, id: str, record: Record) -> None:
        """Create a run, or take up the one that this, an interrupted or another sweep has made under the same id."""
        if id in self._state.complete:
            return
        if id in self._state.runs:
            self._open_again(self._state.runs[id], record)
            return
        parent = self._state.runs.get(record["parent"]) if record["parent"] else None
        if record["parent"] and parent is None:
            self._refuse(f"run {id}, whose parent {record['parent']} could not be created")
            return
        found = self._find(id, None if record["kind"] == "stage" else parent)
        if not found:
            self._state.runs[id] = self._create(id, record, parent)
            return
        run = found[0]
        self._state.runs[id] = run.info.run_id
        shared = record["kind"] == "stage" and run.data.tags.get(PARENT_TAG) != parent
        if shared and parent is not None:
            self._client.set_tag(parent, tracking_name(f"stillhouse.shared.{id}"), run.info.run_id)
        if shared and run.info.status == "FINISHED":
            self._state.complete.append(id)
        else:
            self._open_again(run.info.run_id, record)

    def _create(self, id: str, record: Record, parent: str | None) -> str:
        try:
            run = self._client.create_run(
                self._state.experiment_id,
                start_time=milliseconds(record["started"]),
                tags=run_tags(record, parent),
                run_name=record["name"],
            )
        except Exception:
            self._state.uncertain = sorted({*self._state.uncertain, id})
            raise
        return str(run.info.run_id)

    def _open_again(self, run_id: str, record: Record) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, text) for name, text in tag_texts(record["tags"]).items()]
        if tags:
            self._client.log_batch(run_id, tags=tags, synchronous=True)
        self._client.update_run(run_id, status="RUNNING")

    def _find(self, id: str, parent: str | None = None) -> list[Any]:
        """Runs that carry our id, the oldest first."""
        quote = '"' if "'" in id else "'"
        query = f"tags.`{ID_TAG}` = {quote}{id}{quote}"
        if parent is not None:
            query += f" and tags.`{PARENT_TAG}` = '{parent}'"
        found = self._client.search_runs(
            [self._state.experiment_id], query, max_results=100, order_by=["attributes.start_time ASC"]
        )
        return list(found)

    def _log(self, run_id: str, id: str, group: Sequence[Record]) -> None:
        """Send params, metrics and tags of one run in as few calls as MLflow's limits allow."""
        from mlflow.entities import Metric, Param, RunTag

        values = merged(group)
        params = [Param(name, text) for name, text in values.params]
        tags = [RunTag(name, text) for name, text in values.tags.items()]
        metrics = [Metric(*point) for point in values.metrics]
        self._log_in_parts(run_id, id, "params", params, MAX_OTHERS)
        self._log_in_parts(run_id, id, "tags", tags, MAX_OTHERS)
        self._log_in_parts(run_id, id, "metrics", metrics, MAX_METRICS)

    def _log_in_parts(self, run_id: str, id: str, kind: str, entities: list[Any], size: int) -> None:
        """Send ``size`` entities at a time; a part that is refused is halved until the culprit stands alone."""
        for start in range(0, len(entities), size):
            part = entities[start : start + size]
            try:
                self._client.log_batch(run_id, **{kind: part}, synchronous=True)
            except Exception as problem:
                if self.classify(problem) is not Failure.REJECTED:
                    raise
                if self._client.get_run(run_id).info.lifecycle_stage != "active":
                    self._refuse(f"records of {id}, whose run {run_id} was deleted in MLflow")
                    self._state.complete.append(id)
                    return
                if len(part) > 1:
                    self._log_in_parts(run_id, id, kind, part, (len(part) + 1) // 2)
                else:
                    self._refuse(
                        f"{kind} {part[0].key!r} = {part[0].value!r} of {id}: {str(problem).splitlines()[0]}"
                    )

    def _refuse(self, text: str) -> None:
        """Count and name, once, what is left out for good."""
        if text not in self._named:
            self._named.add(text)
            self._state.num_rejected += 1
            logger.warning("MLflow does not take %s; it is left out", text[:500])

    def _artifact(self, run_id: str, record: Record) -> None:
        local_path = Path(record["local_path"])
        if not local_path.exists():
            raise FileNotFoundError(f"{local_path} does not exist any more")
        upload = self._client.log_artifacts if local_path.is_dir() else self._client.log_artifact
        upload(run_id, str(local_path), record["artifact_path"] or None)

    def _link(self, run_id: str, record: Record) -> None:
        target = self._state.runs.get(record["target"])
        if target is None:
            self._refuse(
                f"the link {record['name']} of {record['id']} to {record['target']}, which has no run"
            )
            return
        self._client.set_tag(run_id, tracking_name(f"stillhouse.uses.{record['name']}"), target)

    def _end(self, run_id: str, record: Record) -> None:
        self._client.set_terminated(run_id, record["status"], milliseconds(record["ended"]))

    def _model(self, run_id: str, record: Record) -> None:
        """Log a bundle as MLflow model (pyfunc, safetensors) and as output of its run; once per content key."""
        from mlflow.entities import LoggedModelOutput

        bundle = Path(record["bundle"])
        settings = read_bundle(bundle)
        if settings.key != record["key"]:
            self._refuse(f"model {record['key']} of {record['id']}: {bundle} holds {settings.key} by now")
            return
        logged = self._logged_model(run_id, settings)
        if logged.status != "READY":
            with tempfile.TemporaryDirectory() as folder:
                _save_model(Path(folder) / "model", bundle, settings, logged, run_id)
                self._client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
            self._client.finalize_logged_model(logged.model_id, "READY")
        outputs = self._client.get_run(run_id).outputs
        if logged.model_id not in {output.model_id for output in outputs.model_outputs}:
            self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])

    def _logged_model(self, run_id: str, settings: BundleSettings) -> Any:
        """The logged model of this run and content key, made when there is none."""
        query = f"tags.`stillhouse.key` = '{settings.key}' AND source_run_id = '{run_id}'"
        found = self._client.search_logged_models([self._state.experiment_id], query)
        if found:
            return found[0]
        return self._client.create_logged_model(
            self._state.experiment_id,
            name=re.sub(r"[^\w-]", "_", settings.model),
            source_run_id=run_id,
            tags={"stillhouse.key": settings.key},
            params=self._client.get_run(run_id).data.params,
        )


def _experiment(client: Any, name: str, artifacts: str | None) -> Any:
    """The experiment of this name, made when there is none (by us or, at the same moment, by another sweep)."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as problem:
            if problem.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)
    if found is None:
        raise StillhouseError(f"the MLflow experiment {name!r} neither exists nor can be made")
    if found.lifecycle_stage != "active":
        raise StillhouseError(
            f"the MLflow experiment {name!r} was deleted: restore it with "
            f"'mlflow experiments restore --experiment-id {found.experiment_id}', or choose another name"
        )
    return found


def _save_model(path: Path, bundle: Path, settings: BundleSettings, logged: Any, run_id: str) -> None:
    """Write an MLflow model folder around a bundle, with signature and requirements stated, nothing guessed."""
    import numpy as np
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    task = settings.task
    pixels = TensorSpec(np.dtype("uint8"), (-1, task.in_channels, task.image_size, task.image_size))
    logits = TensorSpec(np.dtype("float32"), (-1, task.num_classes))
    model = Model(
        artifact_path=logged.artifact_location,
        run_id=run_id,
        model_id=logged.model_id,
        model_uuid=logged.model_id,
        signature=ModelSignature(Schema([pixels]), Schema([logits])),
    )
    pyfunc.save_model(
        str(path),
        loader_module="orchestrator.serving",
        data_path=str(bundle),
        mlflow_model=model,
        pip_requirements=requirements(),
        metadata={
            "model": settings.model,
            "key": settings.key,
            "class_names": json.dumps(settings.class_names),
        },
    )
