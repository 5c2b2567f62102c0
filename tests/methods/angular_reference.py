"""Written-out loops for every angular loss, and view geometries with known angles. No tensors' tricks, one number
at a time: what the vectorised code is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: list[float]) -> list[float]:
    length = math.sqrt(dot(a, a) + 1e-12)
    return [x / length for x in a]


def unit_over_views(views: list[list[float]]) -> list[list[float]]:
    lengths = [math.sqrt(sum(v[k] ** 2 for v in views) + 1e-12) for k in range(len(views[0]))]
    return [[x / length for x, length in zip(v, lengths, strict=True)] for v in views]


def contrast(
    anchors: list[list[float]], views: list[list[list[float]]], margin: float, tau: float, extra: bool
) -> float:
    terms = []
    for b, sample in enumerate(views):
        for view in sample:
            logits = [dot(view, anchor) for anchor in anchors]
            if logits[b] >= 1 - margin:
                logits[b] = 1.0
            scaled = [logit / tau for logit in logits]
            peak = max(scaled)
            terms.append(peak + math.log(sum(math.exp(s - peak) for s in scaled)) - scaled[b])
    return sum(terms) / len(terms) / (len(views[0]) if extra else 1)


def hinge(anchors: list[list[float]], views: list[list[list[float]]], margin: float) -> float:
    terms = [
        max(0.0, 1 - margin - dot(view, anchors[b])) for b, sample in enumerate(views) for view in sample
    ]
    return sum(terms) / len(terms)


def inter(
    reference: Tensor,
    views: Tensor,
    *,
    margin: float,
    tau: float,
    constraint: str = "contrastive",
    extra: bool = True,
    geometry: str = "cosine",
) -> tuple[float, float, list[bool]]:
    raw_views, raw_anchors = views.tolist(), reference.tolist()
    if geometry == "product":
        anchors, near = raw_anchors, raw_views
    else:
        anchors = [unit(anchor) for anchor in raw_anchors]
        near = [[unit(view) for view in sample] for sample in raw_views]
    spread = [unit_over_views(sample) for sample in raw_views] if geometry == "coordinate" else near
    num_samples, num_views = len(near), len(near[0])
    if constraint == "hinge":
        proximity = hinge(anchors, near, margin)
    else:
        proximity = contrast(anchors, near, margin, tau, extra)
    gates = [min(dot(view, anchors[b]) for view in sample) > 1 - margin for b, sample in enumerate(spread)]
    total = 0.0
    for sample, is_open in zip(spread, gates, strict=True):
        for i in range(num_views):
            for j in range(num_views):
                total += softplus(dot(sample[i], sample[j])) if is_open and i != j else 0.0
    pairs = num_samples * num_views * (num_views - 1)
    return proximity, total / pairs if pairs else 0.0, gates


def intra(reference: Tensor, views: Tensor, *, per_sample: bool = False, unit_space: bool = False) -> float:
    num_samples, num_views, _ = views.shape
    if num_views == 1:
        return 0.0
    offsets = []
    for anchor, sample in zip(reference.tolist(), views.tolist(), strict=True):
        pairs = [(unit(anchor), unit(view)) if unit_space else (anchor, view) for view in sample]
        offsets.append([unit([a - v for a, v in zip(*pair, strict=True)]) for pair in pairs])
    total = 0.0
    for i in range(num_views):
        for j in range(num_views):
            if i == j:
                continue
            cosines = [dot(sample[i], sample[j]) for sample in offsets]
            if per_sample:
                total += sum(softplus(cosine) for cosine in cosines) / num_samples
            else:
                total += softplus(sum(cosines) / num_samples)
    return total / (num_views * (num_views - 1))


def label(view_logits: Tensor, labels: Tensor) -> float:
    total = 0.0
    for sample, target in zip(view_logits.tolist(), labels.tolist(), strict=True):
        total += sum(math.log(sum(math.exp(z) for z in logits)) - logits[target] for logits in sample)
    return total / len(labels)


def golden_inputs(scale: float) -> tuple[Tensor, Tensor]:
    """The reference ``[3, 4]`` and its views ``[3, 3, 4]`` of the published check values, float64."""
    b, n, k = (torch.arange(size, dtype=torch.float64) for size in (3, 3, 4))
    reference = 1 + torch.sin(1 + 4 * b[:, None] + k)
    wave = torch.cos(0.5 + 12 * b[:, None, None] + 4 * n[None, :, None] + k)
    return reference, reference[:, None] + scale * wave


def random_inputs(
    num_samples: int = 5, num_views: int = 4, width: int = 6, *, spread: float = 0.7, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A reference and views around it, float64. A spread below 1 leaves some gates open and some closed."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(num_samples, width, dtype=torch.float64, generator=generator)
    noise = torch.randn(num_samples, num_views, width, dtype=torch.float64, generator=generator)
    return reference, reference[:, None] + spread * noise


def simplex(num_views: int) -> Tensor:
    """N unit vectors in N dimensions that add up to 0 and have the lowest possible mutual cosine."""
    centred = torch.eye(num_views, dtype=torch.float64) - 1 / num_views
    return centred / centred.norm(dim=1, keepdim=True)


def cone(num_views: int, own_cosine: float) -> tuple[Tensor, Tensor]:
    """One sample: views at ``own_cosine`` to their teacher, spread as far apart as that allows."""
    reference = torch.zeros(1, num_views + 1, dtype=torch.float64)
    reference[0, 0] = 1.0
    axis = torch.full((num_views, 1), own_cosine, dtype=torch.float64)
    around = math.sqrt(1 - own_cosine**2) * simplex(num_views)
    return reference, torch.cat([axis, around], dim=1)[None]
