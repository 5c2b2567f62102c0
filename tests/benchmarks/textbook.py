"""Knowledge distillation as public repositories write it: PIL images one by one, DataLoader workers, a plain loop.

Written for these benchmarks from the usual recipe (crop with padding 4, flip, normalise; SGD with momentum; meters
that read the loss and the accuracy at each step).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from methods.data.base import Images
from methods.data.cifar import Cifar100

BATCH_SIZE = 64
NUM_LOADER_WORKERS = 2
TEMPERATURE = 4.0


class PilDataset(Dataset):  # type: ignore[type-arg]
    """Each image by itself: array, PIL image, transforms, tensor."""

    def __init__(self, images: Images) -> None:
        self.pixels = images.gather(range(len(images))).transpose(0, 2, 3, 1)  # type: ignore[arg-type]
        self.labels = images.labels
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(Cifar100.mean, Cifar100.std),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def batches(images: Images, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch, shuffled."""
    is_cuda = device.type == "cuda"
    loader = DataLoader(
        PilDataset(images), BATCH_SIZE, shuffle=True, num_workers=NUM_LOADER_WORKERS, pin_memory=is_cuda
    )
    for pictures, labels in loader:
        yield pictures.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def train(
    student: nn.Module, teacher: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], kd_weight: float = 0.9
) -> tuple[float, float, float]:
    """Distil ``teacher`` (logits) into ``student``; gives mean loss, top-1 and top-5."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    student.train()
    teacher.eval()
    total_loss = num_top1 = num_top5 = num_seen = 0.0
    for images, labels in loader:
        logits = student(images)
        with torch.no_grad():
            teacher_logits = teacher(images)
        loss = 0.1 * F.cross_entropy(logits, labels) + kd_weight * distillation(logits, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        top5 = logits.topk(5, dim=1).indices == labels[:, None]
        num_top1, num_top5 = num_top1 + top5[:, 0].sum().item(), num_top5 + top5.any(dim=1).sum().item()
        total_loss += loss.item() * len(labels)
        num_seen += len(labels)
    return total_loss / num_seen, num_top1 / num_seen, num_top5 / num_seen


def distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Divergence at a temperature, times its square."""
    log_probabilities = F.log_softmax(logits / TEMPERATURE, dim=1)
    targets = F.softmax(teacher_logits / TEMPERATURE, dim=1)
    return F.kl_div(log_probabilities, targets, reduction="batchmean") * TEMPERATURE**2
