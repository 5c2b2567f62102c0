"""What predictions are worth: one implementation per metric, whatever the batch size, the order or the number of workers.

Each family has *sums* over a batch, which add up over batches and workers (what a method's ``statistics`` gives to the
loop), a function that makes metrics of the sums, and a ``Measure``: a table of one row per sample that is merged from
any parts. Metrics are in percent. Referring segmentation and its protocols are in ``methods.grounding``.
"""

from __future__ import annotations

from methods.measures.classification import classification_sums, ranks

__all__ = ["classification_sums", "ranks"]
