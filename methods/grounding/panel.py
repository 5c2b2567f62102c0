"""What a trained grounder does with a few validation pictures, as one PNG.

Columns: the picture with its sentence, the truth, the prediction with its overlap, the probability of each pixel, and
for networks with latent expressions (Latent-VG) a map for the sentence and one for each latent expression. Those are
``GroundingOutput.expression_logits`` as probabilities: what the mask would be if this vector alone were asked for,
before the maps are averaged. They are no attention weights of the encoder.

Shape legend: B = pictures shown, N = latent expressions, S = side of the square input, h, w = sides of the pixel map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from methods.data.randomness import hashes
from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.drawing import TRUTH, PanelRow, Tile, draw_panel
from methods.grounding.metrics import Judged, judge, judged_ious, judged_none
from methods.grounding.protocols import EvaluationProtocol, protocol_named
from methods.grounding.stream import GroundingStream

NUM_PICTURES = 6
MAX_EXPRESSIONS = 8
SEED = 0
"""Of the choice of pictures: the same for all trials on the same data."""


@torch.no_grad()
def grounding_panel(network: nn.Module, stream: GroundingStream) -> bytes | None:
    """PNG of at most ``NUM_PICTURES`` pictures; None where the split has none.

    Overlaps are those that enter the metrics, by the protocol of the data set; masks are shown at the input's size.
    """
    positions = shown_positions(stream)
    if not len(positions):
        return None
    batch = stream.batch_of(positions)
    output = _in_evaluation(network, batch)
    rules = protocol_named(stream.source.protocol)
    rows = list(_rows(stream, positions, output, judge(output, batch, rules, with_boxes=False), rules))
    maps = _map_titles(output.expression_logits)
    titles = ["picture", "truth", "prediction", "probability", *maps]
    legend = "probabilities from 0 (dark) to 1 (bright)"
    note = f"validation pictures, chosen by seed {SEED}; {legend}; overlap by protocol {rules.name}"
    return draw_panel(rows, titles, note)


def shown_positions(stream: GroundingStream) -> np.ndarray:
    """Positions in ``stream.indices`` of the expressions that are shown: each about another picture, in a seeded order."""
    order = np.lexsort((stream.indices, hashes(SEED, "panel", 0, stream.indices)))
    _, first = np.unique(stream.expressions.pictures[stream.indices][order], return_index=True)
    return order[np.sort(first)][:NUM_PICTURES]


def _in_evaluation(network: nn.Module, batch: GroundingBatch) -> GroundingOutput:
    was_training = network.training
    network.eval()
    try:
        output: GroundingOutput = network(batch)
    finally:
        network.train(was_training)
    return output


def _rows(
    stream: GroundingStream, positions: np.ndarray, output: GroundingOutput, judged: Judged,
    rules: EvaluationProtocol,
) -> Iterator[PanelRow]:  # fmt: skip
    ids = stream.indices[positions]
    labels = _labels(judged, rules)
    masks = output.mask_logits[:, 0] > math.log(rules.threshold / (1 - rules.threshold))
    for row, (index, sentence) in enumerate(zip(ids.tolist(), stream.expressions.sentences(ids), strict=True)):  # fmt: skip
        sample = stream.expressions.sample(index)
        tiles = [
            Tile(),
            Tile(mask=sample.mask, colour=TRUTH, label="names nothing" if sample.is_empty else ""),
            Tile(mask=masks[row].cpu().numpy(), label=labels[row]),
            *(Tile(scores=scores) for scores in _scores(output, row)),
        ]
        yield PanelRow(
            pixels=np.ascontiguousarray(sample.image.transpose(1, 2, 0)),
            size=sample.size if sample.frame is None else sample.image.shape[1:],  # its margins are shown too
            caption=f"{sentence}   [{stream.expressions.sample_id(index)}]",
            tiles=tiles,
        )


def _scores(output: GroundingOutput, row: int) -> Iterator[np.ndarray]:
    maps: Tensor | None = output.expression_logits
    yield output.mask_logits[row, 0].float().sigmoid().cpu().numpy()
    if maps is not None:
        yield from maps[row, : 1 + MAX_EXPRESSIONS].float().sigmoid().cpu().numpy()


def _map_titles(expression_logits_BNhw: Tensor | None) -> list[str]:
    if expression_logits_BNhw is None:
        return []
    num_expressions = expression_logits_BNhw.shape[1] - 1
    shown = range(1, 1 + min(num_expressions, MAX_EXPRESSIONS))
    return ["sentence", *(f"latent {number}/{num_expressions}" for number in shown)]


def _labels(judged: Judged, rules: EvaluationProtocol) -> list[str]:
    """A few words on each prediction: its overlap, or whether it was right about a sentence that names nothing."""
    columns = (judged_ious(judged, rules), judged.is_empty, judged_none(judged, rules))
    return [_label(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _label(iou: float, is_empty: bool, rejects: bool) -> str:
    if is_empty:
        return "none: right" if rejects else "none: missed"
    return f"{'none, ' if rejects else ''}IoU {100 * iou:.1f}"
