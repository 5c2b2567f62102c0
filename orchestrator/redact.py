"""Secrets out of texts: what is shown, logged or kept says that there was one, never which. Pure.

Hidden are passwords in URLs, secrets in query strings, values of settings and headers whose names say that they are
secret, and any text that the caller names, such as the values of secret environment variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

__all__ = ["HIDDEN", "environment_secrets", "redact", "redact_plain"]

HIDDEN = "***"
SHORTEST_SECRET = 6
"""Characters. A shorter value of an environment variable could be any word: hiding it would garble what is shown."""

WORDS = r"(?:secret|passw(?:or)?d|passphrase|token|api[-_]?key|access[-_]?key|secret[-_]?key|private[-_]?key|connection[-_]?string)"
USER_AND_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://[^\s/?#:@'\"]*):[^\s/?#'\"]*@", re.IGNORECASE)
TOKEN_AS_USER = re.compile(r"(https?://)[^\s/?#:@'\"]+@", re.IGNORECASE)
QUERY = re.compile(rf"([?&;][\w.-]*(?:{WORDS}|signature|credential)=|[?&;]sig=)[^&;\s#'\"]+", re.IGNORECASE)
VALUE = r"(?!(?:true|false|null|none)\b)(?:\"[^\"\n]+\"|'[^'\n]+'|[^\s,;&}\])\"']+)"
FIELD = re.compile(
    rf"((?<![\w?&;/])(?:[\w.-]*{WORDS}\s*=\s*|[\"'][\w.-]*{WORDS}[\"']\s*[:=]\s*)){VALUE}", re.IGNORECASE
)
"""``password=x`` and ``"password": "x"``; not ``password: x``, which is how we write where a mistake is."""
SUSPICIOUS = re.compile(r"[=:\s]")
"""Without any of these, a text holds no URL, field, query or header: most values of settings are so."""
HEADER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
SECRET_NAME = re.compile(rf"[\w.-]*{WORDS}", re.IGNORECASE)
SECRET_VARIABLE = re.compile(
    r".*(PASSW(OR)?D|PASSPHRASE|SECRET|TOKEN|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CONNECTION_STRING).*",
    re.IGNORECASE,
)
NO_SECRET_VARIABLE = re.compile(r".*(_|^)(PATH|FILE|DIR|ID|NAME|URL|URI|MODE|SECONDS|TTL)", re.IGNORECASE)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` with every secret in it replaced. Redacting twice changes nothing more.

    Args:
        secrets: Further texts to hide wherever they stand, for instance from ``environment_secrets``.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if SUSPICIOUS.search(text) is None:
        return text
    text = USER_AND_PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    text = TOKEN_AS_USER.sub(rf"\1{HIDDEN}@", text)
    text = QUERY.sub(rf"\1{HIDDEN}", text)
    text = HEADER.sub(rf"\1 {HIDDEN}", text)
    return FIELD.sub(rf"\1{HIDDEN}", text)


def redact_plain(value: Any, secrets: Iterable[str] = ()) -> Any:
    """A copy of nested plain data with every string redacted, and what stands under a secret's name hidden."""
    secrets = tuple(secrets)
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, Mapping):
        return {
            name: HIDDEN
            if isinstance(item, str) and item and _is_secret_field(str(name))
            else redact_plain(item, secrets)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_plain(item, secrets) for item in value]
    return value


@lru_cache(4096)
def _is_secret_field(name: str) -> bool:
    return SECRET_NAME.fullmatch(name) is not None


def environment_secrets(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values of the variables whose names say that they are secret: ``MLFLOW_TRACKING_PASSWORD`` and its like."""
    values = [environment[name] for name in environment if _names_secret(name)]
    return tuple(value for value in values if len(value) >= SHORTEST_SECRET)


@lru_cache(4096)
def _names_secret(variable: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return SECRET_VARIABLE.fullmatch(variable) is not None and NO_SECRET_VARIABLE.fullmatch(variable) is None
