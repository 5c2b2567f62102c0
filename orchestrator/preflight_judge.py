"""Judges what nodes told of themselves, against the driver. Pure: facts in, findings out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.findings import Finding, Level

if TYPE_CHECKING:
    from orchestrator.ray_preflight import Answer

__all__ = ["Clock", "Expected", "NodeReport", "judge_cluster", "judge_node"]

MIN_FREE_GB = 2.0
CLOCK_SHARE = 0.5
"""Clocks may differ by this share of ``run.lease_seconds``."""
LARGEST_CLOCK_DIFFERENCE_SECONDS = 300.0
"""Leases never allow for more, however long they are."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How far a node's clock is ahead of the driver's: somewhere between two bounds."""

    low: float
    """Seconds, negative when it is behind."""
    high: float

    @property
    def proven_seconds(self) -> float:
        """The difference that is certain, whatever the way to the node took. 0 when the clocks may be equal."""
        return max(self.low, -self.high, 0.0)

    @property
    def text(self) -> str:
        return "same" if self.proven_seconds < 1 else f"{(self.low + self.high) / 2:+.1f} s"


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """One node's answers, in the order of the questions."""

    name: str
    address: str
    num_gpus: float
    answers: Sequence[Answer]

    @property
    def facts(self) -> Mapping[str, Any] | None:
        return self.answers[0].facts

    @property
    def clock(self) -> Clock:
        """The tightest bounds that all answers together give."""
        told = [answer for answer in self.answers if answer.facts]
        low = max(answer.facts["time"] - answer.received for answer in told if answer.facts)
        high = min(answer.facts["time"] - answer.sent for answer in told if answer.facts)
        return Clock(low=min(low, high), high=max(low, high))


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What nodes are judged against."""

    facts: Mapping[str, Any]
    """What the driver told of itself."""
    lease_seconds: float
    needs_gpu: bool
    hosts: Mapping[str, str]
    """Name of a marker -> the host that left it."""


def judge_node(report: NodeReport, expected: Expected) -> Iterator[Finding]:
    """Everything about one node; a single ``good`` finding when there is nothing to say."""
    findings = list(_judge(report, expected))
    if not findings:
        findings = [Finding("good", "same code and clock as the driver, shares its storage", report.name)]
    yield from findings


def judge_cluster(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """What shows only when nodes are compared with each other."""
    kinds = Counter(
        f"{gpu['name']} {gpu['memory_gb']:.0f} GB"
        for report in reports
        for gpu in (report.facts or {}).get("gpus", [])
    )
    if len(kinds) > 1:
        listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
        yield Finding(
            "note", f"GPUs of several kinds ({listed}): workers of one stage wait for the slowest, and times are not comparable", "cluster",
        )  # fmt: skip


def _judge(report: NodeReport, expected: Expected) -> Iterator[Finding]:
    facts = report.facts
    if facts is None:
        yield Finding(
            "wrong", f"the node at {report.address} could not be asked: {report.answers[0].error}; see its Ray logs, or take it out of the cluster", report.name,
        )  # fmt: skip
        return
    for check in (_versions, _storage, _clock, _disk, _gpus, _files):
        yield from check(report, facts, expected)


def _versions(report: NodeReport, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    own = expected.facts
    for package in ("stillhouse", "ray", "torch"):
        here, there = own["versions"][package], facts["versions"][package]
        if here == there:
            continue
        # A CPU build on the head and a CUDA build on the workers are one version of torch.
        same = here.partition("+")[0] == there.partition("+")[0]
        yield Finding(
            "note" if same else "wrong", f"{package} {there}, but the driver has {here}; install the same version on every node", report.name,
        )  # fmt: skip
    if facts["source"] != own["source"] and facts["versions"]["stillhouse"] == own["versions"]["stillhouse"]:
        yield Finding(
            "wrong", f"source {facts['source']} of stillhouse, but the driver has {own['source']}: the same version with other files; install or sync the same checkout", report.name,
        )  # fmt: skip
    here, there = own["python"], facts["python"]
    if here != there:
        level: Level = "note" if here.rpartition(".")[0] == there.rpartition(".")[0] else "wrong"
        yield Finding(
            level, f"Python {there}, but the driver has {here}; use one version on every node", report.name
        )


def _storage(report: NodeReport, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    if facts["storage"]:
        yield Finding(
            "wrong", f"the storage cannot be used here: {facts['storage']}; set run.storage to a place that every node reaches", report.name,
        )  # fmt: skip
        return
    answer = report.answers[1]
    if answer.facts is None:
        yield Finding("wrong", f"the storage could not be read here: {answer.error}", report.name)
    elif answer.facts["missing"]:
        hosts = ", ".join(expected.hosts[name] for name in answer.facts["missing"])
        yield Finding(
            "wrong", f"the storage is not shared: what {hosts} wrote is not seen here; set run.storage to a network folder that is mounted at the same path on every node, or to a URL such as s3://BUCKET/runs", report.name,
        )  # fmt: skip


def _clock(report: NodeReport, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    allowed = min(CLOCK_SHARE * expected.lease_seconds, LARGEST_CLOCK_DIFFERENCE_SECONDS)
    found = report.clock
    if found.proven_seconds > allowed:
        yield Finding(
            "wrong", f"its clock is {found.text} against the driver's, leases allow for {allowed:g} s; set it by NTP (chronyd), or raise run.lease_seconds", report.name,
        )  # fmt: skip
    elif found.proven_seconds > allowed / 5:
        yield Finding(
            "note", f"its clock is {found.text} against the driver's; set it by NTP (chronyd)", report.name
        )


def _disk(report: NodeReport, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for what, free in facts["free_gb"].items():
        if free < MIN_FREE_GB:
            remedy = (
                "free some, or set run.storage elsewhere" if what == "storage" else "Ray spills objects there"
            )
            yield Finding(
                "wrong" if what == "storage" else "note", f"{free:.1f} GB free in the {what} folder; {remedy}", report.name,
            )  # fmt: skip


def _gpus(report: NodeReport, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    if report.num_gpus > len(facts["gpus"]):
        yield Finding(
            "wrong" if expected.needs_gpu else "note", f"Ray gives away {report.num_gpus:g} GPUs there, but nvidia-smi shows {len(facts['gpus'])}; check the driver, or start the node with the right --num-gpus", report.name,
        )  # fmt: skip
    elif facts["gpus"] and report.num_gpus < len(facts["gpus"]) and expected.needs_gpu:
        yield Finding(
            "note", f"nvidia-smi shows {len(facts['gpus'])} GPUs, of which Ray gives away {report.num_gpus:g}", report.name
        )  # fmt: skip


def _files(report: NodeReport, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for path in facts["missing"]:
        yield Finding(
            "wrong", f"{path} is not there; stages read it on every node: copy it, or mount it", report.name
        )
