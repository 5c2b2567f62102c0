"""From the images of a classification data set to the batches that a stage trains and is judged on."""

from __future__ import annotations

from typing import Any

import numpy as np

from methods.data.base import ImageData, StreamSettings
from methods.data.split import stratified_split
from methods.data.stream import Stream
from methods.data.thin import thin


def image_streams(data: ImageData, settings: StreamSettings) -> dict[str, Stream]:
    """``training``, ``validation`` and ``test``: the first two share the training images, class by class."""
    labels = data.train.labels
    kept, held_out = stratified_split(labels, settings.validation, settings.split_seed)
    kept = thin(
        labels, kept, fraction=settings.fraction, imbalance=settings.imbalance, seed=settings.split_seed
    )
    common: dict[str, Any] = {
        "mean": data.mean, "std": data.std, "device": settings.device,
        "rank": settings.rank, "num_workers": settings.num_workers,
    }  # fmt: skip
    fixed: dict[str, Any] = {
        "batch_size": settings.evaluation_batch_size, "seed": 0, "augment": None, "shuffle": False, **common,
    }  # fmt: skip
    return {
        "training": Stream(
            data.train, indices=kept, batch_size=settings.batch_size, seed=settings.seed, augment=settings.augment,
            shuffle=True, strong=settings.strong, **common,
        ),
        "validation": Stream(data.train, indices=held_out, **fixed),
        "test": Stream(data.test, indices=np.arange(len(data.test)), **fixed),
    }  # fmt: skip
