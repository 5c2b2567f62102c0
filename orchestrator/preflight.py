"""Is this cluster fit for this sweep? What every node told, judged against the driver and shown as one table."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.findings import Finding
from orchestrator.preflight_judge import Expected, NodeReport, judge_cluster, judge_node
from orchestrator.preflight_probe import erase_marker, look, read_markers

if TYPE_CHECKING:
    from orchestrator.ray_preflight import Answer, Node

__all__ = ["Preflight", "run_preflight"]

NODE_SECONDS = 180.0
"""How long a node may take to answer the first question: it may have to start a process and fetch the job's files."""
DRIVER = "driver"


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Made by ``Experiment.preflight``. Prints as a table with a row per host, and what is to be said about them."""

    rows: Sequence[Sequence[str]]
    """A heading, then a row per node."""
    findings: Sequence[Finding]

    @property
    def problems(self) -> list[str]:
        """What keeps a sweep from working, each with host, value and remedy."""
        return [f"{item.host}: {item.text}" for item in self.findings if item.level == "wrong"]

    def __str__(self) -> str:
        widths = [max(len(row[column]) for row in self.rows) for column in range(len(self.rows[0]))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in self.rows
        ]
        order = {"wrong": 0, "note": 1, "good": 2}
        told = sorted(self.findings, key=lambda item: order[item.level])
        return "\n".join([*lines, "", *(str(item) for item in told)])


def run_preflight(
    storage: str, tracking_uri: str, needed: Sequence[str], *, lease_seconds: float, needs_gpu: bool, allow_open: Collection[str] = (),
) -> Preflight:  # fmt: skip
    """Ask every node of the cluster that this process has joined, and judge. Leaves nothing behind.

    Args:
        needed: Paths that every node has to have: checkpoints, and data that is read while it is used.
        allow_open: Addresses on which a job endpoint may be open to the network.
    """
    from orchestrator.ray_preflight import alive_nodes

    nodes = alive_nodes()
    own, rounds = _ask_all(storage, nodes, needed)
    left = [node for node in nodes if any(node.id in told and told[node.id].gone for told in rounds)]
    for node in left:
        erase_marker(storage, node.id)
    nodes = [node for node in nodes if node not in left]
    names_of = _names(nodes, rounds[0])
    reports = [
        NodeReport(
            name=names_of[node.id], address=node.address, num_gpus=node.num_gpus,
            answers=tuple(answers[node.id] for answers in rounds if node.id in answers),
        )
        for node in nodes
    ]  # fmt: skip
    hosts = {DRIVER: "the driver"} | {
        node.id: report.name for node, report in zip(nodes, reports, strict=True)
    }
    expected = Expected(facts=own, lease_seconds=lease_seconds, needs_gpu=needs_gpu, hosts=hosts)
    findings = [finding for report in reports for finding in judge_node(report, expected)]
    findings += judge_cluster(reports)
    findings += [Finding("note", "has left the cluster since it was listed", node.address) for node in left]
    findings += _driver_findings(own, tracking_uri, [node.address for node in nodes], allow_open)
    return Preflight(rows=[HEADING, *(_row(report, findings) for report in reports)], findings=findings)


def _ask_all(
    storage: str, nodes: Sequence[Node], needed: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Answer]]]:
    """What the driver sees itself, and three rounds: each node looks and leaves a marker, reads all, erases its own."""
    from orchestrator.ray_preflight import ask

    run = uuid.uuid4().hex
    own = look(storage, run, DRIVER, needed)
    first = ask(nodes, look, lambda node: (storage, run, node.id, needed), NODE_SECONDS)
    wrote = [node for node in nodes if (answer := first[node.id].facts) and not answer["storage"]]
    names = [DRIVER, *(node.id for node in wrote)]
    second = ask(wrote, read_markers, lambda node: (storage, run, names), NODE_SECONDS)
    third = ask(wrote, erase_marker, lambda node: (storage, node.id), NODE_SECONDS)
    erase_marker(storage, DRIVER)
    return own, [first, second, third]


def _driver_findings(
    own: dict[str, Any], tracking_uri: str, addresses: Sequence[str], allow_open: Collection[str]
) -> list[Finding]:
    from orchestrator.endpoints import judge_endpoint
    from orchestrator.ray_preflight import dashboard_address
    from orchestrator.tracking_uri import reach

    findings = []
    trouble = reach(tracking_uri)
    if trouble:
        findings.append(
            Finding(
                "note",
                f"{trouble}. The sweep would go on and send its journal when the server is back",
                DRIVER,
            )
        )
    else:
        findings.append(
            Finding("good", f"tracking {tracking_uri} answers (only the driver writes to it)", DRIVER)
        )
    if own["storage"]:
        findings.append(Finding("wrong", f"the storage cannot be used here: {own['storage']}", DRIVER))
    if endpoint := dashboard_address():
        host, _, port = endpoint.rpartition(":")
        findings += [
            Finding(item.level, item.text, "head") for item in judge_endpoint(host, int(port), allow_open)
        ]
    return findings


HEADING = (
    "host",
    "address",
    "stillhouse",
    "python",
    "ray",
    "torch",
    "GPUs",
    "memory",
    "free disk",
    "clock",
    "verdict",
)


def _row(report: NodeReport, findings: Sequence[Finding]) -> tuple[str, ...]:
    levels = {item.level for item in findings if item.host == report.name}
    verdict = "wrong" if "wrong" in levels else "note" if "note" in levels else "good"
    facts = report.facts
    if facts is None:
        return (report.name, report.address, *(["-"] * (len(HEADING) - 3)), verdict)
    gpus = ", ".join(f"{gpu['name']} {gpu['memory_gb']:.0f} GB" for gpu in facts["gpus"]) or "none"
    free = facts["free_gb"].get("storage", facts["free_gb"]["temporary"])
    return (
        report.name,
        report.address,
        facts["versions"]["stillhouse"],
        facts["python"],
        facts["versions"]["ray"],
        facts["versions"]["torch"],
        gpus,
        f"{facts['memory_gb']:.0f} GB",
        f"{free:.0f} GB",
        report.clock.text,
        verdict,
    )


def _names(nodes: Sequence[Node], answers: Mapping[str, Answer]) -> dict[str, str]:
    """Id of each node -> its host name, or address; with a part of the id where several would be called the same."""
    plain = {node.id: _host(node, answers[node.id]) for node in nodes}
    counts = Counter(plain.values())
    return {id: f"{name} ({id[:6]})" if counts[name] > 1 else name for id, name in plain.items()}


def _host(node: Node, answer: Answer) -> str:
    return str(answer.facts["host"]) if answer.facts else node.address
