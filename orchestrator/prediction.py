"""Use a stored grounder: an image and sentences in, masks and boxes out. The data set need not be there.

The image is turned as its EXIF entry says, transparent parts are laid on white, and it is then prepared as in training.
Masks have its size. The network, its vocabulary and its normalisation come from the artifact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from methods import BUILTIN
from methods.base import Method
from methods.catalog import Catalog, UnknownNameError
from methods.data.base import DataError
from methods.grounding.annotation_masks import encode_mask
from methods.grounding.contracts import GroundingTask
from methods.grounding.drawing import overlay
from methods.grounding.prediction import Grounder, Prediction
from orchestrator.errors import ConfigurationError
from orchestrator.stage import load_source
from orchestrator.store import Store

__all__ = ["Predictions", "load_grounder", "predict", "read_image"]

MAX_SLUG = 40


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a grounder has found in one image."""

    key: str
    stage: str
    method: str
    protocol: str
    """By which a probability becomes a pixel of a mask, and a mask may be emptied."""
    image: str
    """Where the image came from."""
    pixels: np.ndarray
    """The image upright, uint8 ``[H, W, 3]``."""
    items: Sequence[Prediction]
    """One per text."""

    def document(self) -> dict[str, Any]:
        """All of it as plain values: masks as COCO run lengths, boxes as x, y, width, height."""
        return {
            "key": self.key,
            "stage": self.stage,
            "method": self.method,
            "protocol": self.protocol,
            "image": self.image,
            "size": list(self.pixels.shape[:2]),
            "predictions": [_plain(item) for item in self.items],
        }

    def write(self, folder: Path | str) -> list[Path]:
        """Write ``NAME-KEY.json`` and one overlay per text into ``folder``; the paths, the document first.

        Raises:
            ConfigurationError: The folder cannot be written.
        """
        base, document = f"{_slug(Path(self.image).stem)}-{self.key[:8]}", self.document()
        paths = [Path(folder) / f"{base}.json"]
        try:
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            for number, item in enumerate(self.items, 1):
                paths.append(Path(folder) / f"{base}-{number}-{_slug(item.text)}.png")
                paths[-1].write_bytes(overlay(self.pixels, item.mask, item.box if any(item.box) else None))
                document["predictions"][number - 1]["overlay"] = paths[-1].name
            paths[0].write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"--out: {folder} cannot be written: {error}") from error
        return paths


def predict(
    key: str,
    image: Path | str | np.ndarray,
    texts: str | Sequence[str],
    *,
    storage: str | Store = "runs",
    device: str | None = None,
    methods: Mapping[str, type[Method]] | None = None,
) -> Predictions:
    """What each text names in an image, by the grounder that the artifact ``key`` holds.

    Args:
        key: Its key, or the first digits of it.
        image: A file, or upright pixels, uint8 ``[H, W, 3]``.
        texts: One or several.
        storage: Where the artifacts are.
        device: As torch names it; by default the GPU where there is one.
        methods: Your own methods by name, where one of them has made the artifact.

    Raises:
        ConfigurationError: The artifact is no grounder, the image cannot be read, a text is empty, or there is no such device.
        MissingArtifactError: There is no such key; the text names near ones.
    """
    wanted = [texts] if isinstance(texts, str) else list(texts)
    if not wanted or not all(text.strip() for text in wanted):
        raise ConfigurationError(f"--text: a text is empty (got {wanted!r}): write what is to be found")
    pixels = _checked(image) if isinstance(image, np.ndarray) else read_image(Path(image))
    store = storage if isinstance(storage, Store) else Store(storage)
    full = store.find(key)
    grounder = load_grounder(store, full, device=device, catalog=BUILTIN.extended(methods))
    manifest = store.manifest(full)
    try:
        items = list(grounder.predict(pixels, wanted))
    except DataError as error:
        raise ConfigurationError(f"--text: {error}") from error
    return Predictions(
        key=full,
        stage=manifest["name"],
        method=manifest["content"]["method"],
        protocol=grounder.rules.name,
        image="image" if isinstance(image, np.ndarray) else str(image),
        pixels=pixels,
        items=items,
    )


def load_grounder(
    store: Store, key: str, *, device: str | None = None, catalog: Catalog = BUILTIN
) -> Grounder:
    """The grounder that the artifact ``key`` holds, ready for any number of images.

    Raises:
        ConfigurationError: It is no grounder, its method or tokenizer is not here, or there is no such device.
    """
    manifest = store.manifest(key)
    _refuse_others(key, manifest, catalog)
    where = _device(device)
    source = load_source(store, key, catalog, with_inputs=False)  # a student needs no teacher any more
    try:
        return Grounder(source.teacher().network, source.task, manifest, where)
    except DataError as error:
        raise ConfigurationError(f"artifact {key[:8]}: {error}") from error


def _refuse_others(key: str, manifest: Mapping[str, Any], catalog: Catalog) -> None:
    name = manifest["content"]["method"]
    what = f"artifact {key[:8]} (stage {manifest['name']!r}) was made by {name!r}"
    try:
        method = catalog.method(name)
    except UnknownNameError as error:
        raise ConfigurationError(
            f"{what}, a method that is not ours: use orchestrator.predict(..., methods={{{name!r}: YourClass}})"
        ) from error
    if not issubclass(method.task_type, GroundingTask):
        grounders = (name for name, each in catalog.methods.items() if issubclass(each.task_type, GroundingTask))  # fmt: skip
        raise ConfigurationError(
            f"{what}, which takes no sentences; predict needs a grounder: {', '.join(grounders)}"
        )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(f"--device: {name!r} cannot be used here: {reason}") from error
    return device


def read_image(path: Path) -> np.ndarray:
    """The image upright and in RGB, uint8 ``[H, W, 3]``; of several frames the first.

    Raises:
        ConfigurationError: It is absent, or no image.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # Pillow would cut 16 bits of grey at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise ConfigurationError(f"--image: {path}: there is no such file") from None
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise ConfigurationError(f"--image: {path} is not a readable image: {error}") from error


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ConfigurationError(
            f"image: pixels must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels


def _plain(item: Prediction) -> dict[str, Any]:
    left, top, right, bottom = item.box
    return {
        "text": item.text,
        "segmentation": encode_mask(item.mask),
        "area": int(item.mask.sum()),
        "bbox": [left, top, right - left, bottom - top],
        "bbox_from": item.box_from,
        "names_nothing": item.names_nothing,
        "no_target_probability": item.no_target_probability,
        "unknown_words": list(item.unknown_words),
        "num_tokens_left_out": item.num_tokens_left_out,
    }


def _slug(text: str) -> str:
    """``text`` as part of a file name."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-_")[:MAX_SLUG] or "text"
