"""The logit criteria as plain loops in float64: slow, obvious, and without anything of the product."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_inputs(num_samples: int = 5, num_classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits and teacher logits ``[B, C]``, float64, and labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(num_samples, num_classes, generator=generator, dtype=torch.float64) for _ in range(2))  # fmt: skip
    return student, teacher, torch.randint(num_classes, (num_samples,), generator=generator)


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(target: list[float], other: list[float]) -> float:
    return sum(t * math.log(t / o) for t, o in zip(target, other, strict=True) if t > 0)


def kd(student: Tensor, target: Tensor, temperature: float) -> float:
    rows = [divergence(t, softmax(s, temperature)) for s, t in zip(student.tolist(), target.tolist(), strict=True)]  # fmt: skip
    return temperature**2 * sum(rows) / len(rows)


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> tuple[list[float], list[float]]:
    """TCKD and NCKD of each sample, from teacher *logits*."""
    label_class, others = [], []
    for s_row, t_row, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        s, t = softmax(s_row, temperature), softmax(t_row, temperature)
        label_class.append(temperature**2 * divergence([t[y], 1 - t[y]], [s[y], 1 - s[y]]))
        s_others = softmax([value for c, value in enumerate(s_row) if c != y], temperature)
        t_others = softmax([value for c, value in enumerate(t_row) if c != y], temperature)
        others.append(temperature**2 * divergence(t_others, s_others))
    return label_class, others


def correlation(first: list[float], second: list[float]) -> float:
    mean_first, mean_second = sum(first) / len(first), sum(second) / len(second)
    product = sum((a - mean_first) * (b - mean_second) for a, b in zip(first, second, strict=True))
    length_first = math.sqrt(sum((a - mean_first) ** 2 for a in first))
    length_second = math.sqrt(sum((b - mean_second) ** 2 for b in second))
    return product / (length_first * length_second + 1e-8)


def dist(student: Tensor, target: Tensor) -> tuple[float, float]:
    """Inter and intra distances of probabilities."""
    inter = [correlation(s, t) for s, t in zip(student.tolist(), target.tolist(), strict=True)]
    intra = [correlation(s, t) for s, t in zip(student.T.tolist(), target.T.tolist(), strict=True)]
    return 1 - sum(inter) / len(inter), 1 - sum(intra) / len(intra)


def standardised(logits: Tensor) -> Tensor:
    rows = []
    for row in logits.tolist():
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / (len(row) - 1))
        rows.append([(value - mean) / (1e-7 + deviation) for value in row])
    return torch.tensor(rows, dtype=torch.float64)


def levels(
    student: Tensor, teacher: Tensor, temperature: float
) -> tuple[list[float], list[float], list[float]]:
    """Parts of MLKD's instance, batch and class terms at one temperature, from teacher *logits*."""
    s = [softmax(row, temperature) for row in student.tolist()]
    t = [softmax(row, temperature) for row in teacher.tolist()]
    num_samples, num_classes = student.shape
    instance = [temperature**2 * divergence(t_row, s_row) for t_row, s_row in zip(t, s, strict=True)]

    def gram(rows: list[list[float]], b: int, other: int) -> float:
        return sum(x * y for x, y in zip(rows[b], rows[other], strict=True))

    batch = [
        sum((gram(t, b, other) - gram(s, b, other)) ** 2 for other in range(num_samples))
        for b in range(num_samples)
    ]
    s_columns, t_columns = list(map(list, zip(*s, strict=True))), list(map(list, zip(*t, strict=True)))
    classes = [
        sum((gram(t_columns, c, other) - gram(s_columns, c, other)) ** 2 for other in range(num_classes))
        for c in range(num_classes)
    ]
    return instance, batch, classes


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def mlkd(
    weak: tuple[Tensor, Tensor], strong: tuple[Tensor, Tensor], temperatures: tuple[float, ...], variant: str
) -> tuple[float, float, float]:
    """Instance, batch and class terms of two views, each ``(student logits, teacher logits)``."""
    confident = [softmax(row, 1.0) for row in weak[1].tolist()]
    by_sample = [max(row) for row in confident]
    by_class = [sum(column) for column in zip(*confident, strict=True)]
    samples = [float(value <= median(by_sample)) for value in by_sample]
    classes = [float(value <= median(by_class)) for value in by_class]
    totals = [0.0, 0.0, 0.0]
    for temperature in temperatures:
        at_weak, at_strong = levels(*weak, temperature), levels(*strong, temperature)
        for level, mask in enumerate((samples, samples, classes)):
            if variant == "clean":
                for view in (at_weak, at_strong):
                    totals[level] += sum(m * v for m, v in zip(mask, view[level], strict=True)) / len(mask)
            else:
                totals[level] += sum(at_weak[level]) / len(mask) * sum(mask) / len(mask)
        if variant == "released":
            outer = temperature in (temperatures[0], temperatures[-1])
            instance = (at_weak if outer else at_strong)[0]
            totals[0] += sum(instance) / len(instance)
    return totals[0], totals[1], totals[2]
