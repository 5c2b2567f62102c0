"""The batches of one split, epoch after epoch: one worker's share, augmented and normalised on its device.

The order of an epoch sorts the samples by a hash of (seed, epoch, sample id). Workers share each global batch row by
row, so the global batches are the same for any number of workers. An epoch can be entered at any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from methods.base import Batch
from methods.data.augment import Draws, Normalise, apply_draws, draw
from methods.data.base import Augment, Images
from methods.data.randomness import hashes
from methods.data.strong import strong_view

RESIDENT_BYTES = 1 << 30
"""Arrays below this size are kept on a CUDA device as a whole."""
MIN_SAMPLES_PER_WORKER = 2
"""What batch normalisation needs in training."""


class Stream:
    """Batches of some samples of a split, as functions of (seed, epoch, sample id) only.

    The last, partial batch of an epoch is kept. Only while shuffling (training) is it dropped, on every worker,
    when it would leave a worker with fewer than two samples. Without shuffling each sample comes exactly once over
    all workers, in the order of ``indices``; a worker without a share of the last batch does not get that batch.
    """

    def __init__(
        self,
        images: Images,
        *,
        indices: np.ndarray,
        batch_size: int,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: Augment | None,
        shuffle: bool,
        device: torch.device,
        rank: int = 0,
        num_workers: int = 1,
        strong: bool = False,
    ) -> None:
        """Prepare the batches.

        Args:
            images: The split.
            indices: Which of its samples, ``[n]``: each one's identity in every epoch.
            batch_size: Samples of a batch over all workers together.
            seed: Of the order and the augmentation.
            mean: Per channel, of pixels scaled to 0..1.
            std: Per channel, of pixels scaled to 0..1.
            augment: How images are varied; None leaves them as they are.
            shuffle: Whether this is for training.
            device: Where batches are made.
            rank: This worker, from 0.
            num_workers: Workers that share each batch.
            strong: Whether batches bring a strongly varied view of each image as well.
        """
        self.images, self.device, self.seed = images, device, seed
        self.batch_size, self.augment, self.shuffle = batch_size, augment, shuffle
        self.rank, self.num_workers = rank, num_workers
        self.strong = strong
        self.indices = np.asarray(indices, dtype=np.int64)
        self._refuse_impossible()
        self._normalise = Normalise(mean, std, device)
        self._resident = self._upload()
        self.num_batches = self._count_batches()

    @property
    def num_samples(self) -> int:
        """Samples over all workers, including those of a batch that is dropped."""
        return len(self.indices)

    def known_labels(self) -> np.ndarray:
        """Label of each sample of the whole split by its index, int64; -1 for samples that do not come up here."""
        labels = np.full(len(self.images), -1, dtype=np.int64)
        labels[self.indices] = self.images.labels[self.indices]
        return labels

    def sample_ids(self, epoch: int) -> list[np.ndarray]:
        """Which samples this worker's share of each batch of ``epoch`` holds, ``[B]`` each, in their order."""
        order = self._order(epoch)
        shares = (self._share(order, number) for number in range(self.num_batches))
        return [self.indices[share] for share in shares if len(share)]

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This worker's share of the batches of ``epoch`` (counted from 0), from batch number ``start`` on."""
        order = self._order(epoch)
        shares = [self._share(order, number) for number in range(start, self.num_batches)]
        shares = [share for share in shares if len(share)]
        if not shares:
            return
        positions = np.concatenate(shares)
        ids = self.indices[positions]
        # Everything that is small goes to the device once per epoch, so that a step copies nothing but pixels.
        labels = self._to_device(self.images.labels[ids])
        draws = self._draws(epoch, ids)
        lengths = np.cumsum([0, *map(len, shares)])
        parts = [slice(int(low), int(high)) for low, high in pairwise(lengths)]
        ids_on_device = self._to_device(ids)
        for part, pixels in zip(parts, self._pixels(positions, ids, parts), strict=True):
            varied = pixels if draws is None else apply_draws(pixels, draws.select(part))
            strong = self._strong_view(pixels, epoch, ids[part]) if self.strong else None
            yield Batch(self._normalise(varied), labels[part], ids_on_device[part], epoch, strong)

    def _order(self, epoch: int) -> np.ndarray:
        """Positions in ``self.indices``, in the order of this epoch."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        # By id where two hashes were equal, so that the order of ``indices`` never matters.
        return np.lexsort((self.indices, hashes(self.seed, "order", epoch, self.indices)))

    def _share(self, order: np.ndarray, number: int) -> np.ndarray:
        batch = order[number * self.batch_size : (number + 1) * self.batch_size]
        return batch[self.rank :: self.num_workers]

    def _draws(self, epoch: int, ids: np.ndarray) -> Draws | None:
        if self.augment is None or self.augment == Augment():
            return None
        return draw(self.augment, seed=self.seed, epoch=epoch, ids=ids, device=self.device)

    def _strong_view(self, pixels: Tensor, epoch: int, ids: np.ndarray) -> Tensor:
        augment = self.augment or Augment()
        return self._normalise(strong_view(pixels, augment, seed=self.seed, epoch=epoch, ids=ids))

    def _pixels(self, positions: np.ndarray, ids: np.ndarray, parts: list[slice]) -> Iterator[Tensor]:
        """uint8 images ``[B, C, H, W]`` of each part, on the device."""
        if self._resident is not None:
            where = self._to_device(positions)
            yield from (self._resident.index_select(0, where[part]) for part in parts)
        elif self.device.type == "cpu" and isinstance(self.images.pixels, np.ndarray):
            yield from (torch.from_numpy(self.images.gather(ids[part])) for part in parts)
        else:
            staged = _one_ahead(self._stage, [ids[part] for part in parts])
            yield from (pixels.to(self.device, non_blocking=True) for pixels in staged)

    def _stage(self, ids: np.ndarray) -> Tensor:
        """Pixels of ``ids``, from where the device fetches them by itself. Runs beside the training."""
        pixels = torch.from_numpy(self.images.gather(ids))
        if self.device.type != "cuda":
            return pixels
        with torch.cuda.device(self.device):  # each thread has a device of its own
            return pixels.pin_memory()

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _upload(self) -> Tensor | None:
        """This stream's images on the GPU, where they are few enough; rows as in ``self.indices``."""
        pixels = self.images.pixels
        if (
            self.device.type != "cuda"
            or not isinstance(pixels, np.ndarray)
            or pixels.nbytes >= RESIDENT_BYTES
        ):
            return None
        return torch.from_numpy(self.images.gather(self.indices)).to(self.device)

    def _count_batches(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        too_few = self.num_workers * MIN_SAMPLES_PER_WORKER if self.shuffle else 1
        return whole + (rest >= too_few)

    def _refuse_impossible(self) -> None:
        if not 0 <= self.rank < self.num_workers:
            raise ValueError(f"rank must lie in 0..{self.num_workers - 1}, got {self.rank}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.num_samples and not 0 <= self.indices.min() <= self.indices.max() < len(self.images):
            raise ValueError(f"indices must lie in 0..{len(self.images) - 1}, got up to {self.indices.max()}")
        if not self.shuffle:
            return
        needed = self.num_workers * MIN_SAMPLES_PER_WORKER
        for name, value in (
            ("batch_size", self.batch_size),
            ("number of training samples", self.num_samples),
        ):
            if value < needed:
                raise ValueError(
                    f"{name} {value} is too small for {self.num_workers} worker(s): batch normalisation needs "
                    f"{MIN_SAMPLES_PER_WORKER} samples on each, so at least {needed}"
                )


def _one_ahead(prepare: Callable[[np.ndarray], Tensor], batches: Iterable[np.ndarray]) -> Iterator[Tensor]:
    """Prepare the next batch while the current one is being learnt from."""
    with ThreadPoolExecutor(1) as background:
        pending = None
        for ids in batches:
            following = background.submit(prepare, ids)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
