"""Who may submit jobs: looks at a job endpoint as a stranger would, without a token."""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from enum import Enum

from orchestrator.findings import Finding

__all__ = ["Access", "allowed_open", "judge_endpoint", "knock"]

TIMEOUT_SECONDS = 3.0
ALLOW_VARIABLE = "STILLHOUSE_ALLOW_OPEN"


class Access(Enum):
    """What a stranger meets at an endpoint."""

    NONE = "nobody listens"
    CLOSED = "a token is asked for"
    OPEN = "jobs are taken from anybody"
    OTHER = "something else listens"


def allowed_open() -> frozenset[str]:
    """Addresses on which the user accepts an endpoint that the network reaches: ``STILLHOUSE_ALLOW_OPEN``, by commas."""
    named = os.environ.get(ALLOW_VARIABLE, "").split(",")
    return frozenset(address.strip() for address in named if address.strip())


def knock(host: str, port: int) -> Access:
    """Ask the endpoint for its list of jobs, without a token. Submits nothing."""
    name = f"[{host}]" if ":" in host else host
    request = urllib.request.Request(f"http://{name}:{port}/api/jobs/")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=TIMEOUT_SECONDS) as answer:
            told = answer.read(1).decode(errors="replace")
        return Access.OPEN if told in ("[", "{") else Access.OTHER
    except urllib.error.HTTPError as refusal:
        return Access.CLOSED if refusal.code in (401, 403) else Access.OTHER
    except (OSError, ValueError):
        return _listens(host, port)


def judge_endpoint(host: str, port: int, allow_open: Collection[str] = ()) -> Iterator[Finding]:
    """What there is to say about the job endpoint at an address; nothing where nobody listens.

    Whoever submits a job runs code on every node. So an endpoint that takes jobs from anybody is wrong where other
    machines reach it, unless its address is named in ``allow_open``.
    """
    access = knock(host, port)
    place = f"job endpoint {host}:{port}"
    if access is Access.NONE or access is Access.OTHER:
        return
    closed = access is Access.CLOSED
    asks = "asks for a token" if closed else "takes jobs from anybody, without a token"
    if is_loopback(host):
        remedy = (
            ""
            if closed
            else ": every user of this machine can run code as you; set RAY_AUTH_MODE=token before `ray start`"
        )
        yield Finding("good" if closed else "note", f"{place} {asks}{remedy}")
    elif closed:
        yield Finding(
            "note", f"{place} {asks}, which travels unencrypted: rather start the head with --dashboard-host 127.0.0.1 and use an SSH tunnel",
        )  # fmt: skip
    elif host in allow_open or f"{host}:{port}" in allow_open:
        yield Finding(
            "note",
            f"{place} {asks}, which you allow by name: every machine that reaches it can run code here",
        )
    else:
        yield Finding(
            "wrong", f"{place} {asks}: set RAY_AUTH_MODE=token and start the head with --dashboard-host 127.0.0.1, reached through an SSH tunnel; or allow it by name, {ALLOW_VARIABLE}={host}",
        )  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. A name counts by what it resolves to."""
    try:
        found = {str(item[4][0]) for item in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _listens(host: str, port: int) -> Access:
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_SECONDS).close()
    except OSError:
        return Access.NONE
    return Access.OTHER
