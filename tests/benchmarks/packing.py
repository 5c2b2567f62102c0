"""K students behind one teacher pass: a loop over them, or their weights stacked under ``torch.func``?

    python tests/benchmarks/packing.py

Arms, for one distillation step (batch 64, 32x32 images, resnet20 teacher, resnet8 students): *alone*, K times teacher
and student; *loop*, ``orchestrator.pack`` as it is; *stacked*, the teacher once and all students as one vectorised call
with gradients by ``vmap(grad_and_value)``, batch norm by batch statistics only. Times are medians of rounds in which
the arms take turns, per student and step, so that other load falls on all arms alike; ratios are within one run. CPU time.

Measured on two shared cores of an x86-64 server, one thread, under heavy other load; GPU numbers are still to come::

    students  alone ms  loop ms  stacked ms  alone/loop  alone/stacked
           1     154.7    177.6       232.7        0.87           0.66
           2     146.3    124.3       201.2        1.18           0.73
           4     149.4    102.6       189.1        1.46           0.79

One student is the same work in both of the first arms, so 0.87 is how noisy that run was. Alone, every student pays for
the teacher's pass; in the loop K share it. Stacking costs more than it saves on a CPU, where convolutions with other
weights for each student become grouped ones, and it rounds differently. Hence the loop.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from methods import BUILTIN, METHODS, ModelSettings, Task
from methods.base import Method, Teacher
from methods.data.base import Augment, Images
from methods.data.stream import Stream
from methods.losses import cross_entropy, softened_kl
from methods.teachers import freeze
from orchestrator.loop import train
from orchestrator.optimisation import TrainSettings
from orchestrator.pack import PackMember, train_pack

TASK = Task(num_classes=100)
DEVICE = torch.device("cpu")
BATCH_SIZE = 64


@dataclass(frozen=True)
class Arms:
    """The three ways, for ``num_students`` students and ``num_steps`` steps."""

    num_students: int
    num_steps: int

    def alone(self) -> None:
        for number in range(self.num_students):
            train(
                student(number, teacher()), settings=self.settings, training=self.stream(), validation=None,
                seed=0, device=DEVICE,
            )  # fmt: skip

    def loop(self) -> None:
        shared = teacher()
        network: Any = shared.network
        network.remember_passes()
        members = [
            PackMember(
                build=lambda number=number: student(number, shared),  # type: ignore[misc]
                settings=self.settings, seed=0, checkpoints=None, observe=lambda row: None,
            )
            for number in range(self.num_students)
        ]  # fmt: skip
        for result in train_pack(members, training=self.stream(), validation=None, device=DEVICE):
            if isinstance(result, Exception):
                raise result

    def stacked(self) -> None:
        shared = teacher()
        students = [build("resnet8", number).train() for number in range(self.num_students)]
        for module in [module for network in students for module in network.modules()]:
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        parameters, buffers = stack_module_state(students)  # type: ignore[no-untyped-call]
        momentum = {name: torch.zeros_like(value) for name, value in parameters.items()}
        weights = torch.linspace(0.5, 2.0, self.num_students)
        step = vmap(grad_and_value(loss_of(students[0])), in_dims=(0, 0, 0, None, None, None))
        for batch in self.stream().batches(0):
            with torch.no_grad():
                target = shared(batch.images).logits
            gradients, _ = step(parameters, buffers, weights, batch.images, batch.labels, target)
            update(parameters, gradients, momentum)

    @property
    def settings(self) -> TrainSettings:
        return TrainSettings(epochs=1, batch_size=BATCH_SIZE, schedule="constant")

    def stream(self) -> Stream:
        random = np.random.default_rng(0)
        num = self.num_steps * BATCH_SIZE
        pixels = random.integers(0, 255, size=(num, 3, 32, 32)).astype(np.uint8)
        return Stream(
            Images(pixels, random.integers(100, size=num)), indices=np.arange(num), batch_size=BATCH_SIZE,
            seed=1, mean=(0.5,) * 3, std=(0.25,) * 3, augment=Augment(pad=4, flip=True), shuffle=True,
            device=DEVICE,
        )  # fmt: skip


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return BUILTIN.build_model(ModelSettings(name=name), TASK).to(memory_format=torch.channels_last)


def teacher() -> Teacher:
    network: Any = freeze(build("resnet20", 0))
    return Teacher(network=network, num_features=network.num_features, num_classes=TASK.num_classes)


def student(number: int, shared: Teacher) -> Method:
    settings = METHODS["kd"].Settings(kd_weight=0.5 + number)
    return METHODS["kd"](settings, task=TASK, model=build("resnet8", number), inputs={"teacher": shared})


def loss_of(network: nn.Module) -> Callable[..., Tensor]:
    def loss(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], weight: Tensor,
        images: Tensor, labels: Tensor, target: Tensor,
    ) -> Tensor:  # fmt: skip
        plain: Any = network
        inner = {name.removeprefix("network."): value for name, value in (parameters | buffers).items()}
        logits = functional_call(plain.network, inner, (images,))
        return 0.1 * cross_entropy(logits, labels) + weight * softened_kl(logits, target.softmax(-1), 4.0)

    return loss


@torch.no_grad()
def update(parameters: dict[str, Tensor], gradients: dict[str, Tensor], momentum: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        momentum[name].mul_(0.9).add_(gradients[name].add(parameter, alpha=5e-4))
        parameter.sub_(momentum[name], alpha=0.05)


def measure(arms: Arms, num_rounds: int) -> Iterator[tuple[str, float]]:
    """Seconds per student and step of each arm."""
    names = ("alone", "loop", "stacked")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(num_rounds):
        for name in names:
            started = time.process_time()
            getattr(arms, name)()
            seconds[name].append(time.process_time() - started)
    for name in names:
        yield name, statistics.median(seconds[name]) / arms.num_students / arms.num_steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    Arms(1, 1).loop()
    print("students  alone ms  loop ms  stacked ms  alone/loop  alone/stacked")
    for num_students in options.students:
        found = dict(measure(Arms(num_students, options.steps), options.rounds))
        alone, loop, stacked = (1000 * found[name] for name in ("alone", "loop", "stacked"))
        ratios = f"{alone / loop:10.2f}  {alone / stacked:13.2f}"
        print(f"{num_students:8d}  {alone:8.1f}  {loop:7.1f}  {stacked:10.1f}  {ratios}", flush=True)


if __name__ == "__main__":
    main()
