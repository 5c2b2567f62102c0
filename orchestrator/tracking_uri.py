"""Reading a tracking URI without MLflow: is it one, does somebody answer there, how is its UI opened."""

from __future__ import annotations

import os
import shlex
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from orchestrator.errors import ConfigurationError
from orchestrator.redact import redact

__all__ = ["absolute", "artifact_folder", "reach", "ui_command"]

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
OTHER_SCHEMES = ("databricks", "uc")
SQLITE = "sqlite:///"


def absolute(tracking_uri: str) -> str:
    """The same URI with a relative SQLite path made absolute; refuses what MLflow cannot use as a tracking server.

    Raises:
        ConfigurationError: for a folder (MLflow has given up its file store), an unknown scheme, or no path or host.
    """
    scheme = _scheme(tracking_uri)
    if scheme in ("", "file"):
        folder = Path(tracking_uri.removeprefix("file://")).absolute()
        raise ConfigurationError(
            f"tracking uri {tracking_uri!r} is a folder, which MLflow no longer writes to; "
            f"use {SQLITE}{folder}/mlflow.db or the http address of a server"
        )
    if scheme == "sqlite":
        return SQLITE + str(_sqlite_path(tracking_uri))
    if scheme in DATABASE_PORTS or scheme in ("http", "https"):
        if not urlsplit(tracking_uri).hostname:
            raise ConfigurationError(f"tracking uri {redact(tracking_uri)!r} names no host")
    elif scheme not in OTHER_SCHEMES and scheme not in _plugin_schemes():
        raise ConfigurationError(
            f"tracking uri {redact(tracking_uri)!r}: MLflow does not know the scheme {scheme!r}; "
            "use sqlite:///PATH/mlflow.db, http://HOST:PORT or https://HOST"
        )
    return tracking_uri


def reach(tracking_uri: str, timeout_seconds: float = 4.0) -> str | None:
    """None when somebody answers at ``tracking_uri``, else one sentence saying why not. Bounded in time."""
    scheme = _scheme(tracking_uri)
    if scheme == "sqlite":
        return _reach_file(_sqlite_path(tracking_uri))
    if scheme in ("http", "https"):
        return _reach_server(tracking_uri, timeout_seconds)
    if scheme in DATABASE_PORTS:
        return _reach_database(tracking_uri, timeout_seconds)
    return None


def ui_command(tracking_uri: str) -> str:
    """What to type, or to open in a browser, to see the runs."""
    if _scheme(tracking_uri) in ("http", "https"):
        return redact(tracking_uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(redact(tracking_uri))}"


def artifact_folder(tracking_uri: str) -> str | None:
    """Where the artifacts of a SQLite tracking file lie: beside it, as an absolute URI. None for all others."""
    if _scheme(tracking_uri) != "sqlite":
        return None
    path = _sqlite_path(tracking_uri)
    return (path.parent / f"{path.stem}-artifacts").as_uri()


def _scheme(tracking_uri: str) -> str:
    """``postgresql`` of ``postgresql+psycopg://...``; empty for a plain path; ``databricks`` needs no slashes."""
    head, separator, _ = tracking_uri.partition(":")
    if not separator:
        return tracking_uri if tracking_uri in OTHER_SCHEMES else ""
    return head.partition("+")[0].lower()


def _sqlite_path(tracking_uri: str) -> Path:
    _, _, path = tracking_uri.partition(":///")
    path = path.partition("?")[0]
    if not path or path == ":memory:":
        raise ConfigurationError(f"tracking uri {tracking_uri!r} names no file; use {SQLITE}PATH/mlflow.db")
    return Path(path).expanduser().absolute()


def _plugin_schemes() -> set[str]:
    """Schemes that installed MLflow plugins add."""
    from importlib.metadata import entry_points

    return {entry.name for entry in entry_points(group="mlflow.tracking_store")}


def _reach_file(path: Path) -> str | None:
    if path.is_dir():
        return f"the tracking file {path} is a folder; name a file in it, such as {path}/mlflow.db"
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return f"the tracking file {path} cannot be written: no write permission on {existing}"
    if existing != path and not existing.is_dir():
        return f"the tracking file {path} cannot be made: {existing} is not a folder"
    return None


def _reach_server(tracking_uri: str, timeout_seconds: float) -> str | None:
    where = f"the MLflow server {redact(tracking_uri)}"
    parts = urlsplit(tracking_uri)
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    try:
        with urllib.request.urlopen(plain.rstrip("/") + "/health", timeout=timeout_seconds):
            return None
    except urllib.error.HTTPError as answer:
        if answer.code in (401, 403):
            return None
        if answer.code == 404:
            return f"something answers at {redact(tracking_uri)}, but it is not an MLflow server (no /health page)"
        return f"{where} answers with HTTP {answer.code}"
    except urllib.error.URLError as problem:
        return f"{where} cannot be reached: {problem.reason}"
    except OSError as problem:
        return f"{where} does not answer within {timeout_seconds:g} s: {problem}"
    except ValueError as problem:
        raise ConfigurationError(
            f"tracking uri {redact(tracking_uri)!r} is not an address: {problem}"
        ) from None


def _reach_database(tracking_uri: str, timeout_seconds: float) -> str | None:
    parts = urlsplit(tracking_uri)
    port = parts.port or DATABASE_PORTS[_scheme(tracking_uri)]
    try:
        socket.create_connection((str(parts.hostname), port), timeout=timeout_seconds).close()
    except OSError as problem:
        return f"the database {redact(tracking_uri)} cannot be reached: {problem}"
    return None
