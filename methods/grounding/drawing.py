"""Pictures of masks and score maps, and panels of them: arrays in, images and PNG out.

Shape legend: H, W = sides of a picture, h, w = sides of a map.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

TRUTH, PREDICTION = (86, 180, 233), (240, 170, 20)
"""Told apart also with the common kinds of colour blindness."""
MAX_PANEL_BYTES = 300_000
TILE_SIDES = (144, 112, 80, 56, 36)
"""Pixels of a panel's tiles; smaller ones are taken until the panel is small enough."""
PAPER, INK = (250, 250, 250), (40, 40, 40)
GAP, LINE, FONT_SIZE = 6, 16, 11
DIMMED = 0.35
HEAT = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], dtype=np.float64)
"""Colours of 0, 1/4, ... 1, from dark to bright also in grey."""
_CORNERS = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One view of a row's picture: as it is, with a mask, or with a map of scores."""

    mask: np.ndarray | None = None
    """Bool ``[H, W]``: all outside is dimmed, and its outline drawn."""
    scores: np.ndarray | None = None
    """Float ``[h, w]`` in 0..1, drawn as heat over the grey picture."""
    colour: tuple[int, int, int] = PREDICTION
    """Of the outline."""
    label: str = ""
    """A few words in its lower left corner."""


@dataclass(frozen=True, kw_only=True)
class PanelRow:
    """One picture, what is said about it, and the ways in which it is shown."""

    pixels: np.ndarray
    """uint8 ``[H, W, 3]``"""
    size: tuple[int, int]
    """Height and width of the stored picture: tiles have its proportions, whatever the network saw."""
    caption: str
    tiles: Sequence[Tile]


def spotlight(
    pixels_HW3: np.ndarray, mask_HW: np.ndarray, colour: tuple[int, int, int], *, thickness: int = 1
) -> np.ndarray:
    """The picture, dimmed outside the mask, with an outline of ``thickness`` pixels just inside it; uint8 ``[H, W, 3]``."""
    light = np.where(mask_HW, 1.0, DIMMED)[..., None]
    shown: np.ndarray = (pixels_HW3 * light).astype(np.uint8)
    shown[mask_HW & ~_eroded(mask_HW, thickness)] = colour
    return shown


def _eroded(mask_HW: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of the mask whose whole neighbourhood is in it. A blur finds them in a time that ``thickness`` does not change."""
    padded = Image.fromarray(np.pad(mask_HW, thickness).astype(np.uint8) * 255)
    blurred = np.asarray(padded.filter(ImageFilter.BoxBlur(thickness)))
    inner: np.ndarray = blurred[thickness:-thickness, thickness:-thickness] == 255
    return inner


def heat(pixels_HW3: np.ndarray, scores_HW: np.ndarray) -> np.ndarray:
    """Scores in 0..1 as colours over the grey picture, uint8 ``[H, W, 3]``. What is not finite counts as 0."""
    scores = np.nan_to_num(scores_HW, posinf=0.0, neginf=0.0).clip(0, 1)
    anchors = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(scores, anchors, HEAT[:, channel]) for channel in range(3)], axis=-1)
    grey = pixels_HW3.mean(axis=-1, keepdims=True)
    shown: np.ndarray = (0.7 * colours + 0.3 * grey).astype(np.uint8)
    return shown


def overlay(pixels_HW3: np.ndarray, mask_HW: np.ndarray, box: _CORNERS | None) -> bytes:
    """PNG of the picture at its own size with a predicted mask and, where there is one, its box (corners in pixels)."""
    thickness = max(1, round(min(mask_HW.shape) / 200))
    image = Image.fromarray(spotlight(pixels_HW3, mask_HW, PREDICTION, thickness=thickness))
    if box is not None:
        x0, y0, x1, y1 = box
        inside = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
        ImageDraw.Draw(image).rectangle(inside, outline=(255, 255, 255), width=thickness)
    return _png(image)


def draw_panel(
    rows: Sequence[PanelRow], titles: Sequence[str], note: str, *, max_bytes: int = MAX_PANEL_BYTES
) -> bytes:
    """PNG of all rows below each other.

    Args:
        rows: Each with one tile per column.
        titles: One per column.
        note: A line above all.
        max_bytes: The largest tiles are taken with which the file stays below this (the smallest, if none does).
    """
    for side in TILE_SIDES:
        data = _png(_with_palette(_panel(rows, titles, note, side)))
        if len(data) <= max_bytes:
            break
    return data


def _panel(rows: Sequence[PanelRow], titles: Sequence[str], note: str, side: int) -> Image.Image:
    width = GAP + len(titles) * (side + GAP)
    head, heights = 2 * (LINE + GAP), [LINE + _sides(row, side)[0] + GAP for row in rows]
    sheet = Image.new("RGB", (width, head + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (GAP, GAP // 2), note, width - 2 * GAP)
    lefts = [GAP + column * (side + GAP) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        _write(draw, (left, LINE + GAP), title, side)
    for row, top in zip(rows, accumulate([head, *heights[:-1]]), strict=True):
        _write(draw, (GAP, top), row.caption, width - 2 * GAP)
        for left, tile in zip(lefts, row.tiles, strict=True):
            image = _tile(row, tile, side)
            sheet.paste(image, (left, top + LINE))
            _label(draw, (left, top + LINE + image.height), tile.label, side)
    return sheet


def _tile(row: PanelRow, tile: Tile, side: int) -> Image.Image:
    height, width = _sides(row, side)
    pixels = np.asarray(Image.fromarray(row.pixels).resize((width, height), Image.Resampling.BILINEAR))
    if tile.mask is not None:
        mask = Image.fromarray(tile.mask).resize((width, height), Image.Resampling.NEAREST)
        pixels = spotlight(pixels, np.asarray(mask, dtype=bool), tile.colour, thickness=2)
    if tile.scores is not None:
        scores = Image.fromarray(tile.scores.astype(np.float32))
        pixels = heat(pixels, np.asarray(scores.resize((width, height), Image.Resampling.BILINEAR)))
    return Image.fromarray(pixels)


def _sides(row: PanelRow, side: int) -> tuple[int, int]:
    """Height and width of a row's tiles, the longer of which is ``side``."""
    height, width = (max(1, round(side * length / max(row.size))) for length in row.size)
    return height, width


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    draw.text(place, fitting(text, width), fill=INK, font=_font())


def _label(draw: ImageDraw.ImageDraw, corner: tuple[int, int], label: str, width: int) -> None:
    """Light words on a dark strip, just above ``corner``."""
    if label:
        text, (left, bottom) = fitting(label, width - 4), corner
        right = left + 4 + int(_font().getlength(text))
        draw.rectangle((left, bottom - LINE + 1, right, bottom - 1), fill=(0, 0, 0))
        draw.text((left + 2, bottom - LINE + 1), text, fill=(255, 255, 255), font=_font())


def fitting(text: str, width: int) -> str:
    """``text`` on one line, cut with dots where it is wider than ``width`` pixels."""
    line, font = " ".join(text.split()), _font()
    if font.getlength(line) <= width:
        return line
    num_kept = (
        bisect_right(range(len(line)), float(width), key=lambda end: font.getlength(f"{line[:end]}...")) - 1
    )
    return f"{line[: max(0, num_kept)].rstrip()}..."


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib and knows most alphabets; Pillow's own font knows English only."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", FONT_SIZE)


def _with_palette(image: Image.Image) -> Image.Image:
    """With 256 colours. An octree keeps rare ones, such as that of a single red mug; a median cut loses them."""
    return image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
