"""A task, batches and small networks for the tests of grounding methods."""

from __future__ import annotations

import torch

from methods.grounding.contracts import GroundingBatch, GroundingTask

TASK = GroundingTask(
    image_size=48, text_length=12, vocabulary_size=34, start_id=1, end_id=3, pad_id=0, mask_id=2
)
GENERALISED = GroundingTask(
    image_size=48, text_length=12, vocabulary_size=34, start_id=1, end_id=3, pad_id=0, mask_id=2, may_be_empty=True
)  # fmt: skip


def make_batch(
    size: int = 2, *, seed: int = 1, task: GroundingTask = TASK, empty: bool = False
) -> GroundingBatch:
    """Noise with one rectangle each, and sentences of three to eight words."""
    generator = torch.Generator().manual_seed(seed)
    side, length = task.image_size, task.text_length
    ids = torch.zeros(size, length, dtype=torch.int64)
    masks, boxes = torch.zeros(size, 1, side, side), torch.zeros(size, 4)
    for row in range(size):
        num_words = int(torch.randint(3, length - 3, (), generator=generator))
        ids[row, 0], ids[row, num_words + 1] = task.start_id, task.end_id
        ids[row, 1 : num_words + 1] = torch.randint(
            5, task.vocabulary_size, (num_words,), generator=generator
        )
        if not empty:
            left, top = (int(value) for value in torch.randint(0, side - 16, (2,), generator=generator))
            width, height = (int(value) for value in torch.randint(8, 16, (2,), generator=generator))
            masks[row, 0, top : top + height, left : left + width] = 1
            boxes[row] = torch.tensor([left + width / 2, top + height / 2, width, height]) / side
    return GroundingBatch(
        images=torch.randn(size, 3, side, side, generator=generator) + 2 * masks,
        token_ids=ids,
        token_mask=ids != task.pad_id,
        masks=masks,
        boxes=boxes,
        is_empty=torch.full((size,), empty),
        indices=torch.arange(size) + 100 * seed,
        original_sizes=torch.full((size, 2), side),
    )
