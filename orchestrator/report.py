"""The result of a sweep, for readers: the table (pandas), the table as text, and a complete ``report.md``."""

from __future__ import annotations

from orchestrator.report_cost import cost_lines, cost_table
from orchestrator.report_table import Cost, Objective, TrialRow, best, cost, table
from orchestrator.report_text import Report, to_markdown, to_text

__all__ = [
    "Cost",
    "Objective",
    "Report",
    "TrialRow",
    "best",
    "cost",
    "cost_lines",
    "cost_table",
    "table",
    "to_markdown",
    "to_text",
]
