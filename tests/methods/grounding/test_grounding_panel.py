"""Pictures of what a grounder does: what is drawn, which pictures are chosen, and how large the file becomes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from refer_files import write_pack
from torch import nn

from methods.data.base import Augment, StreamSettings
from methods.grounding import drawing
from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.drawing import PanelRow, Tile, draw_panel, fitting, heat, overlay, spotlight
from methods.grounding.metrics import grounding_sums, summarise_grounding
from methods.grounding.panel import NUM_PICTURES, grounding_panel, shown_positions
from methods.grounding.refer import Refer
from methods.grounding.shapes_ref import ShapesRef
from methods.grounding.shared_ris import SharedRIS
from methods.grounding.stream import GroundingStream

RED = (255, 0, 0)


def validation(source: object, **changes: object) -> GroundingStream:
    settings = {"batch_size": 4, "evaluation_batch_size": 3, "seed": 5, "augment": Augment(), "validation": 0.25, "device": torch.device("cpu")}  # fmt: skip
    return source.load().streams(StreamSettings(**{**settings, **changes}))["validation"]


SHAPES = ShapesRef(num_train=4, num_validation=12, num_test=4, image_size=24)


class Shows(nn.Module):
    """Says that red pixels are meant, whatever the sentence; notes the mode in which it was called."""

    def __init__(self, num_expressions: int | None = None, empty_logit: float | None = None) -> None:
        super().__init__()
        self.num_expressions, self.empty_logit = num_expressions, empty_logit
        self.modes: list[bool] = []

    def forward(self, batch: GroundingBatch) -> GroundingOutput:
        self.modes.append(self.training)
        logits = 20 * batch.images[:, :1]
        size = len(logits)
        maps = None
        if self.num_expressions is not None:
            maps = torch.zeros(size, 1 + self.num_expressions, 4, 4)
        empty = None if self.empty_logit is None else torch.full((size,), self.empty_logit)
        return GroundingOutput(mask_logits=logits, pixel_embed=logits, sentence_embed=logits, expression_logits=maps, empty_logit=empty)  # fmt: skip


def decoded(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def test_a_spotlight_dims_all_but_the_mask_and_outlines_it() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:7, 2:7] = True
    shown = spotlight(np.full((9, 9, 3), 200, np.uint8), mask, RED)
    assert (shown[~mask] == 70).all()
    assert (shown[3:6, 3:6] == 200).all()
    assert (shown[2, 2:7] == RED).all()
    assert (shown[2:7, 6] == RED).all()


def test_a_mask_at_the_border_of_the_picture_is_outlined_too() -> None:
    shown = spotlight(np.full((8, 8, 3), 200, np.uint8), np.ones((8, 8), dtype=bool), RED, thickness=2)
    assert (shown[:2] == RED).all()
    assert (shown[:, -2:] == RED).all()
    assert (shown[2:6, 2:6] == 200).all()


def test_heat_rises_with_the_score_and_takes_what_is_not_finite_for_nothing() -> None:
    scores = np.array([[0.0, 0.3, 0.6, 1.0, np.nan, np.inf]])
    (brightness,) = heat(np.zeros((1, 6, 3), np.uint8), scores).astype(int).sum(axis=-1)
    assert (np.diff(brightness[:4]) > 0).all()
    assert brightness[4] == brightness[5] == brightness[0]


def test_an_overlay_has_the_size_of_the_picture_and_its_box() -> None:
    mask = np.zeros((30, 50), dtype=bool)
    mask[5:10, 10:20] = True
    png = overlay(np.full((30, 50, 3), 100, np.uint8), mask, (8.0, 3.0, 22.0, 12.0))
    pixels = np.asarray(decoded(png))
    assert pixels.shape == (30, 50, 3)
    assert {tuple(pixels[row, column]) for row, column in ((3, 8), (11, 21), (3, 21), (11, 8))} == {
        (255,) * 3
    }
    assert (pixels[7, 15] == 100).all()
    assert (np.asarray(decoded(overlay(pixels, np.zeros_like(mask), None))).max()) < 100


def noise(num_rows: int, size: tuple[int, int]) -> list[PanelRow]:
    random = np.random.default_rng(0)
    tiles = [Tile(), Tile(mask=random.random((99, 99)) > 0.5), *([Tile(scores=random.random((30, 30)))] * 3)]
    pixels = random.integers(0, 256, (99, 99, 3), dtype=np.uint8)
    return [PanelRow(pixels=pixels, size=size, caption="a " * 400, tiles=tiles) for _ in range(num_rows)]


def test_tiles_shrink_until_the_file_is_small_enough() -> None:
    rows, titles = noise(3, (427, 640)), ["title"] * 5
    large, small = (draw_panel(rows, titles, "note", max_bytes=limit) for limit in (drawing.MAX_PANEL_BYTES, 30_000))  # fmt: skip
    assert len(small) <= 30_000 < len(large) <= drawing.MAX_PANEL_BYTES
    assert 0.2 < decoded(small).width / decoded(large).width < 0.9


def test_tiles_have_the_proportions_of_the_stored_picture() -> None:
    (flat, tall) = (decoded(draw_panel(noise(2, size), ["t"] * 5, "", max_bytes=10**9)) for size in ((50, 100), (100, 50)))  # fmt: skip
    side = drawing.TILE_SIDES[0]
    assert flat.width == tall.width
    assert tall.height - flat.height == 2 * (side - side // 2)


def test_words_of_any_alphabet_are_drawn_and_long_ones_cut() -> None:
    assert fitting("две\nкружки", 500) == "две кружки"
    cut = fitting("a very long sentence " * 20, 100)
    assert cut.endswith("...")
    assert 5 < len(cut) < 30
    assert drawing._font().getlength(cut) <= 100
    assert fitting("a very long sentence", 1) == "..."
    pictures = [draw_panel([PanelRow(pixels=np.zeros((9, 9, 3), np.uint8), size=(9, 9), caption=text, tiles=[Tile()])], ["t"], "") for text in ("é", "ж")]  # fmt: skip
    assert pictures[0] != pictures[1]  # a font that lacks both would draw the same box twice


def test_the_choice_is_of_different_pictures_and_the_same_for_every_trial(tmp_path) -> None:
    chosen = shown_positions(validation(SHAPES))
    assert len(set(chosen.tolist())) == NUM_PICTURES
    assert chosen.tolist() != sorted(chosen.tolist())
    other = validation(SHAPES, seed=77, batch_size=8, rank=1, num_workers=2, evaluation_batch_size=9)
    assert shown_positions(other).tolist() == chosen.tolist()
    source = Refer(root=str(write_pack(tmp_path)), collection="pack", image_size=16)
    stream = validation(source)
    pictures = stream.expressions.pictures[stream.indices[shown_positions(stream)]]
    assert 0 < len(pictures) == len(set(pictures.tolist())) <= NUM_PICTURES


def test_a_letterboxed_picture_is_shown_with_its_margins(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    source = Refer(root=str(write_pack(tmp_path)), collection="pack", image_size=16, fit="letterbox")
    _, rows = titles_and_rows(monkeypatch, Shows(), source)
    assert {row.size for row in rows} == {(16, 16)}


def test_no_pictures_no_panel() -> None:
    stream = validation(SHAPES)
    stream.indices = stream.indices[:0]
    assert grounding_panel(Shows(), stream) is None


def titles_and_rows(monkeypatch: pytest.MonkeyPatch, network: nn.Module, source: object = SHAPES) -> tuple[list[str], list[PanelRow]]:  # fmt: skip
    seen: list[tuple[list[str], list[PanelRow]]] = []

    def keep(rows: list[PanelRow], titles: list[str], note: str) -> bytes:
        seen.append((titles, rows))
        return draw_panel(rows, titles, note)

    monkeypatch.setattr("methods.grounding.panel.draw_panel", keep)
    png = grounding_panel(network, validation(source))
    assert png is not None
    assert decoded(png).width > 300
    return seen[0]


def test_rows_show_what_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Shows().train()
    titles, rows = titles_and_rows(monkeypatch, network)
    assert network.modes == [False]
    assert network.training
    assert titles == ["picture", "truth", "prediction", "probability"]
    stream = validation(SHAPES)
    batch = stream.batch_of(shown_positions(stream))
    scores = summarise_grounding(grounding_sums(network(batch), batch))
    overlaps = [float(row.tiles[2].label.rpartition(" ")[2]) for row in rows]
    assert np.mean(overlaps) == pytest.approx(scores["miou"], abs=0.05)
    assert max(overlaps) > 0
    for row, index in zip(rows, batch.indices.tolist(), strict=True):
        sample = stream.expressions.sample(index)
        assert np.array_equal(row.pixels, sample.image.transpose(1, 2, 0))
        assert np.array_equal(row.tiles[1].mask, sample.mask)
        assert np.array_equal(row.tiles[2].mask, sample.image[0] > 127)
        assert row.caption.startswith(stream.expressions.sentences(np.array([index]))[0])


@pytest.mark.parametrize(
    ("num_expressions", "expected"),
    [(0, []), (2, ["latent 1/2", "latent 2/2"]), (11, [f"latent {number}/11" for number in range(1, 9)])],
)
def test_latent_expressions_have_a_map_each(
    monkeypatch: pytest.MonkeyPatch, num_expressions: int, expected: list[str]
) -> None:
    titles, rows = titles_and_rows(monkeypatch, Shows(num_expressions))
    assert titles[4:] == ["sentence", *expected]
    assert all((row.tiles[-1].scores == 0.5).all() for row in rows)


@pytest.mark.parametrize(("empty_logit", "expected"), [(3.0, "none: right"), (-3.0, "none: missed")])
def test_sentences_that_name_nothing_are_told(
    monkeypatch: pytest.MonkeyPatch, empty_logit: float, expected: str
) -> None:
    source = ShapesRef(num_train=4, num_validation=20, num_test=4, image_size=24, generalised=True, seed=2)
    _, rows = titles_and_rows(monkeypatch, Shows(empty_logit=empty_logit), source)
    labels = {row.tiles[1].label: set() for row in rows}
    for row in rows:
        labels[row.tiles[1].label].add(row.tiles[2].label.rpartition(" IoU")[0] or row.tiles[2].label)
    assert labels["names nothing"] == {expected}
    assert labels[""] == ({"none,"} if empty_logit > 0 else labels[""])


def test_a_method_without_latent_expressions_draws_itself() -> None:
    source = ShapesRef(num_train=4, num_validation=3, num_test=4)
    settings = SharedRIS.Settings(**{**SharedRIS.presets["shared_ris_small"], "width": 48, "channels": 16})
    method = SharedRIS(settings, task=source.load().task(), model=None, inputs={})
    png = method.panel(method.artifact(), validation(source))
    assert png is not None
    assert decoded(png).height > 300
