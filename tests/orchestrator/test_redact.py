"""Secrets out of texts: what has to disappear, and what has to stay."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from orchestrator.errors import ConfigurationError, StorageError
from orchestrator.filesystem import storage_errors
from orchestrator.journal import Journal, read_records
from orchestrator.redact import environment_secrets, redact, redact_plain
from orchestrator.secrecy import hide, hide_in_logs
from orchestrator.store import Store

SECRET = "hunter2-Xyz"

HIDDEN = [
    (f"http://me:{SECRET}@host:5000/x", "http://me:***@host:5000/x"),
    (f"postgresql+psycopg://me:{SECRET}@db/x", "postgresql+psycopg://me:***@db/x"),
    (f"http://:{SECRET}@host", "http://:***@host"),
    (f"http://me:a@b{SECRET}@host", "http://me:***@host"),
    (f"https://{SECRET}@host/x", "https://***@host/x"),
    (f"two http://a:{SECRET}@b, ftp://c:{SECRET}@d.", "two http://a:***@b, ftp://c:***@d."),
    (f"s3://bucket/runs?token={SECRET}&x=1", "s3://bucket/runs?token=***&x=1"),
    (f"https://h/x?X-Amz-Signature={SECRET}#f", "https://h/x?X-Amz-Signature=***#f"),
    (f"https://h/x?sv=1&sig={SECRET}", "https://h/x?sv=1&sig=***"),
    (f"/data/runs?access_token={SECRET}", "/data/runs?access_token=***"),
    (f"password={SECRET} host=x", "password=*** host=x"),
    (f"run.storage_options.secret={SECRET}", "run.storage_options.secret=***"),
    (f"{{'aws_secret_access_key': '{SECRET}', 'a': 1}}", "{'aws_secret_access_key': ***, 'a': 1}"),
    (f'{{"token": "{SECRET}"}}', '{"token": ***}'),
    (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
]
KEPT = [
    "http://host:5000/x?page=2",
    "s3://bucket/runs",
    "someone@host",
    "mlflow ui --backend-store-uri sqlite:////data/mlflow.db",
    "stages.student.cls_token: expected int, got 'x'",
    "num_tokens=5, tokens: 7",
    "cls_token=true",
    "the token is missing",
    "at 12:30:05 user@host said 3:4",
]


@pytest.mark.parametrize(("text", "expected"), HIDDEN)
def test_a_secret_disappears(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected
    assert SECRET not in str(StorageError(text))
    assert SECRET not in str(ConfigurationError("fine", text)) + repr(ConfigurationError(text).problems)


@pytest.mark.parametrize("text", KEPT)
def test_anything_else_stays(text: str) -> None:
    assert redact(text) == text


def test_nested_data() -> None:
    found = redact_plain(
        {"run": {"tracking": f"http://a:{SECRET}@h", "options": [{"secret": SECRET, "n": 1}]}}
    )
    assert found == {"run": {"tracking": "http://a:***@h", "options": [{"secret": "***", "n": 1}]}}


def test_secret_variables() -> None:
    environment = {
        "MLFLOW_TRACKING_PASSWORD": "abcdef1",
        "AWS_SECRET_ACCESS_KEY": "abcdef2",
        "RAY_AUTH_TOKEN": "abcdef3",
        "RAY_AUTH_TOKEN_PATH": "/home/token",
        "AWS_ACCESS_KEY_ID": "AKIA123",
        "MY_PASSWORD": "short",
        "HOME": "/home/user",
    }
    assert environment_secrets(environment) == ("abcdef1", "abcdef2", "abcdef3")
    assert redact("x abcdef2 y", environment_secrets(environment)) == "x *** y"


def test_journal_and_logs_hide_what_the_environment_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.run("sweep:a", name="a", parent=None, kind="sweep", tags={"reason": f"denied for {SECRET}"})
    journal.params("sweep:a", {"tracking": "http://a:b@c", "rows": 3})
    journal.artifact("sweep:a", tmp_path / SECRET)
    journal.close()
    records = [record for record, _ in read_records(journal.path)]
    assert records[0]["tags"] == {"reason": "denied for ***"}
    assert records[1]["values"] == {"tracking": "http://a:***@c", "rows": "3"}
    assert records[2]["local_path"] == str(tmp_path / SECRET)  # a path of ours has to lead to its file
    assert hide(f"x {SECRET}") == "x ***"
    logger = logging.getLogger("some.library")
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    hide_in_logs()
    hide_in_logs()
    try:
        raise OSError(f"no access with {SECRET}")
    except OSError:
        logger.warning("cannot read http://a:%s@b", SECRET, exc_info=True)
    shown = capsys.readouterr().err
    assert "OSError: no access with ***" in shown
    assert SECRET not in shown


def test_a_storage_with_a_password_does_not_show_it() -> None:
    store = Store(f"memory://me:{SECRET}@host/runs?token={SECRET}")
    store.write_json("failures/abcd.json", {})
    assert store.read_json("failures/abcd.json") == {}
    with pytest.raises(StorageError) as refusal:
        store.read("abcd", "x")
    assert SECRET not in f"{store!r} {refusal.value}"


def test_the_chain_of_a_storage_error_ends_before_the_secret() -> None:
    for text, shown in ((f"denied: http://a:{SECRET}@b", False), ("denied", True)):
        with pytest.raises(StorageError) as refusal, storage_errors("x", "read"):
            raise OSError(text)
        assert (refusal.value.__cause__ is not None) == shown
        assert refusal.value.__suppress_context__
        assert SECRET not in json.dumps(str(refusal.value))
