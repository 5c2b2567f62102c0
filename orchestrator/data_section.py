"""The data section of an experiment, or of one of its stages: which images are learnt from, and how they vary."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any

from methods.catalog import Catalog, UnknownNameError
from methods.data.base import Augment, DataSource
from methods.data.randomness import derive_seed
from orchestrator.settings import Problems, Typed, as_mapping, nearest, parse, to_plain

__all__ = ["DataSettings", "parse_data"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Which data set, what is held out, what is left out, how training images are augmented."""

    source: DataSource
    """The data set with its own settings."""
    dataset: str
    """A name from the data set table."""
    validation: float = 0.1
    """Fraction of the training data held out, stratified by class. Every choice reads this split."""
    split_seed: int = 0
    """Which validation split is drawn."""
    fraction: float = 1.0
    """Share of each class's training images (after validation is held out) that is used: few-shot training."""
    imbalance: float = 1.0
    """Largest class over smallest: class c of C keeps ``imbalance ** (-c / (C - 1))`` of its training images."""
    augment: Augment | None = None
    """Augmentation of training images; the data set's own by default."""
    stream_seed: int | None = None
    """One order of samples and one augmentation for all seeds and methods, so that all students of a teacher read the
    same recorded signals. By default each seed and method has its own. It costs statistics: seeds then differ in
    their first weights and dropout only, so the spread over them is too small, and what is found holds for this one
    stream; paired differences between methods get sharper."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation < 1.0:
            raise ValueError(f"validation must be a fraction in [0, 1), got {self.validation}")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction must be above 0 and at most 1, got {self.fraction}")
        if not 1.0 <= self.imbalance < math.inf:
            raise ValueError(f"imbalance must be finite and at least 1, got {self.imbalance}")
        for reason in getattr(self.source, "refusals", _nothing)(self):
            raise ValueError(reason)
        if self.stream_seed is not None and self.stream_seed < 0:
            raise ValueError(f"stream_seed must be a whole number from 0, got {self.stream_seed}")

    @property
    def active_augment(self) -> Augment:
        return self.source.default_augment if self.augment is None else self.augment

    @property
    def source_id(self) -> str:
        """Names the data set with its own settings: what is loaded, whatever is then left out of it."""
        return json.dumps([self.dataset, to_plain(self.source)], sort_keys=True, default=str)

    def content(self, fingerprint: str) -> dict[str, Any]:
        """What of this section changes the bytes of an artifact. Thinning and a seed stand here only where they are set."""
        content = {
            "fingerprint": fingerprint,
            "validation": self.validation,
            "split_seed": self.split_seed,
            "augment": to_plain(self.active_augment),
        }
        thinned = {"fraction": self.fraction, "imbalance": self.imbalance}
        content |= {name: value for name, value in thinned.items() if value != 1.0}
        return content if self.stream_seed is None else content | {"stream_seed": self.stream_seed}

    def seed_of_stream(self, stage_seed: int, method: str) -> int:
        """From which the order and the augmentation of a stage's training images follow."""
        if self.stream_seed is not None:
            return derive_seed(self.stream_seed, "data")
        return derive_seed(stage_seed, "data", method)


def _nothing(section: DataSettings) -> tuple[str, ...]:
    """What a data set refuses that says nothing of it."""
    return ()


COMMON = tuple(item.name for item in fields(DataSettings) if item.name not in ("source", "dataset"))


def parse_data(
    value: Any, path: str, catalog: Catalog, problems: Problems, base: DataSettings | None = None
) -> DataSettings | None:
    """Type a data section. One without ``dataset`` changes settings of ``base``; one with it stands alone."""
    settings = as_mapping(value, path, problems)
    dataset = settings.pop("dataset", None)
    if dataset is None and base is not None:
        dataset, settings = base.dataset, {**_plain(base), **settings}
    source_class = _source_class(dataset, f"{path}.dataset", catalog, problems)
    if source_class is None:
        return None
    own = {item.name for item in fields(source_class)}  # type: ignore[arg-type]
    for name in [name for name in settings if name not in own.union(COMMON)]:
        hint = nearest(name, own.union(COMMON))
        problems.add(f"{path}.{name}", f"{name!r} is not a setting of data set {dataset!r}{hint}")
        settings.pop(name)
    source = parse(source_class, {key: item for key, item in settings.items() if key in own}, path, problems)
    if source is None:
        return None
    shared = {key: item for key, item in settings.items() if key in COMMON}
    return parse(DataSettings, {"dataset": dataset, "source": Typed(source), **shared}, path, problems)


def _plain(data: DataSettings) -> dict[str, Any]:
    return {**to_plain(data.source), **{name: Typed(getattr(data, name)) for name in COMMON}}


def _source_class(dataset: Any, path: str, catalog: Catalog, problems: Problems) -> type[DataSource] | None:
    if not isinstance(dataset, str):
        known = ", ".join(sorted(catalog.datasets))
        problems.add(path, f"expected the name of a data set, got {dataset!r}. Known: {known}")
        return None
    try:
        return catalog.dataset(dataset)
    except UnknownNameError as error:
        problems.add(path, str(error))
        return None
