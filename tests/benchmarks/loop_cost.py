"""What our training loop costs beyond a bare PyTorch loop that does the same work to the same bits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from methods import BUILTIN, ModelSettings
from methods.data.augment import Normalise, apply_draws, draw
from methods.data.base import Augment, ImageData, Images, channel_statistics
from methods.data.randomness import hashes
from methods.data.stream import Stream
from methods.supervised import Supervised, SupervisedSettings
from orchestrator.loop import train
from orchestrator.optimisation import TrainSettings

CPU = torch.device("cpu")
EVALUATION_BATCH_SIZE = 500


@dataclass(frozen=True, kw_only=True)
class LoopCase:
    """One network on generated images. Both loops evaluate after each epoch."""

    model: str
    num_training: int
    num_validation: int
    channels: int
    image_size: int
    epochs: int
    batch_size: int = 64
    augment: Augment


CASES = (
    LoopCase(
        model="resnet8", num_training=2560, num_validation=640, channels=3, image_size=32, epochs=1,
        augment=Augment(pad=4, flip=True),
    ),
    LoopCase(model="mini_cnn", num_training=1088, num_validation=256, channels=1, image_size=8, epochs=40, augment=Augment(pad=1)),
    LoopCase(model="tiny_mlp", num_training=1088, num_validation=256, channels=1, image_size=8, epochs=40, augment=Augment(pad=1)),
)  # fmt: skip
"""A small network on CIFAR-sized images, and two of digits, where a step takes about a millisecond or less."""


@dataclass(frozen=True, kw_only=True)
class LoopCost:
    """Medians over pairs of runs that took turns."""

    case: LoopCase
    bare_seconds_per_step: float
    ratio: float
    """Wall time, ours over bare."""
    cpu_ratio: float
    """The same of CPU time, which other work on the machine disturbs less."""
    ratios: tuple[float, ...]


def measure(case: LoopCase, num_pairs: int) -> LoopCost:
    """Run both loops in turns, on one thread, each time from the same weights."""
    torch.set_num_threads(1)
    data, settings, network = make_data(case), make_settings(case), make_method(case).model
    times: dict[Callable[..., object], list[tuple[float, float]]] = {train_bare: [], train_ours: []}
    for number in range(num_pairs + 1):
        for run, measured in times.items():
            own = copy.deepcopy(network)
            started = time.perf_counter(), time.process_time()
            run(case, data, settings, own)
            seconds = time.perf_counter() - started[0], time.process_time() - started[1]
            if number > 0:  # the first pair warms caches up
                measured.append(seconds)
    num_steps = case.epochs * -(-case.num_training // case.batch_size)
    pairs = list(zip(times[train_ours], times[train_bare], strict=True))
    return LoopCost(
        case=case,
        bare_seconds_per_step=median(bare[0] for _, bare in pairs) / num_steps,
        ratio=median(ours[0] / bare[0] for ours, bare in pairs),
        cpu_ratio=median(ours[1] / bare[1] for ours, bare in pairs),
        ratios=tuple(ours[0] / bare[0] for ours, bare in pairs),
    )


def make_settings(case: LoopCase) -> TrainSettings:
    return TrainSettings(epochs=case.epochs, batch_size=case.batch_size, schedule="constant")


def make_data(case: LoopCase) -> ImageData:
    """Random pixels with random labels."""
    generator = np.random.default_rng(0)

    def images(number: int) -> Images:
        shape = (number, case.channels, case.image_size, case.image_size)
        return Images(generator.integers(0, 256, shape, dtype=np.uint8), generator.integers(0, 10, number))

    train, validation = images(case.num_training), images(case.num_validation)
    mean, std = channel_statistics(train.pixels)
    return ImageData(train=train, test=validation, class_names=tuple("0123456789"), mean=mean, std=std)


def make_method(case: LoopCase, network: nn.Module | None = None) -> Supervised:
    """The method around ``network``, or around a new one."""
    task = make_data(case).task()
    if network is None:
        torch.manual_seed(0)
        network = BUILTIN.build_model(ModelSettings(name=case.model), task)
        network.to(memory_format=torch.channels_last)
    return Supervised(SupervisedSettings(), task=task, model=network, inputs={})


def train_ours(case: LoopCase, data: ImageData, settings: TrainSettings, network: nn.Module) -> None:
    """The product's loop, stream and method. ``network`` gives (logits, pooled)."""
    fixed: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": CPU}
    train(
        make_method(case, network),
        settings=settings,
        training=Stream(
            data.train, indices=np.arange(len(data.train)), batch_size=case.batch_size, seed=0,
            augment=case.augment, shuffle=True, **fixed,
        ),
        validation=Stream(
            data.test, indices=np.arange(len(data.test)), batch_size=EVALUATION_BATCH_SIZE, seed=0,
            augment=None, shuffle=False, **fixed,
        ),
        seed=0,
        device=CPU,
    )  # fmt: skip


def train_bare(case: LoopCase, data: ImageData, settings: TrainSettings, network: nn.Module) -> None:
    """A textbook loop without guard, taps, history or checkpoints; order and augmentation are those of ours."""
    model, normalise = network.get_submodule("network"), Normalise(data.mean, data.std, CPU)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.learning_rate, momentum=settings.momentum,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
    ids = np.arange(len(data.train))
    for epoch in range(case.epochs):
        model.train()
        order = np.argsort(hashes(0, "order", epoch, ids))
        draws = draw(case.augment, seed=0, epoch=epoch, ids=order, device=CPU)
        for start in range(0, len(order), case.batch_size):
            part = slice(start, start + case.batch_size)
            images = apply_draws(torch.from_numpy(data.train.gather(order[part])), draws.select(part))
            labels = torch.from_numpy(data.train.labels[order[part]])
            loss = F.cross_entropy(model(normalise(images)), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        evaluate_bare(model, data.test, normalise)


@torch.no_grad()
def evaluate_bare(model: nn.Module, images: Images, normalise: Normalise) -> tuple[float, float]:
    """Accuracy in percent and mean loss."""
    model.eval()
    num_correct = total = 0.0
    ids = np.arange(len(images))
    for start in range(0, len(images), EVALUATION_BATCH_SIZE):
        part = slice(start, start + EVALUATION_BATCH_SIZE)
        labels = torch.from_numpy(images.labels[part])
        logits = model(normalise(torch.from_numpy(images.gather(ids[part]))))
        num_correct += (logits.argmax(1) == labels).sum().item()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
    return 100 * num_correct / len(images), total / len(images)
