"""The networks an experiment may name, and how one is built for a task."""

from __future__ import annotations

import torch
from torch import nn

from methods.base import ModelFactory, ModelSettings, Task
from methods.models.maps import Activation, MapReader, MapTaps, map_taps, stage_taps
from methods.models.mobilenet_v2_cifar import mobilenet_v2_half
from methods.models.resnet50_cifar import resnet50
from methods.models.resnet_cifar import (
    resnet8,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet56,
    resnet110,
)
from methods.models.shufflenet_cifar import shuffle_v1, shuffle_v2
from methods.models.tapped import Features, Tapped, Taps, evaluating
from methods.models.timm_factory import TimmFactory, timm_factory
from methods.models.tiny import mini_cnn, tiny_cnn, tiny_mlp
from methods.models.vgg_cifar import vgg8, vgg13
from methods.models.weights import apply_weights, load_weights
from methods.models.wide_resnet import wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "MODELS",
    "Activation",
    "Features",
    "MapReader",
    "MapTaps",
    "Tapped",
    "Taps",
    "build_model",
    "classifier_path",
    "map_taps",
    "stage_taps",
    "timm_factory",
]

MODELS: dict[str, ModelFactory] = {
    "mini_cnn": mini_cnn,
    "mobilenet_v2_half": mobilenet_v2_half,
    "resnet8": resnet8,
    "resnet8x4": resnet8x4,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet32x4": resnet32x4,
    "resnet50": resnet50,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "shuffle_v1": shuffle_v1,
    "shuffle_v2": shuffle_v2,
    "tiny_cnn": tiny_cnn,
    "tiny_mlp": tiny_mlp,
    "vgg8": vgg8,
    "vgg13": vgg13,
    "wrn_16_2": wrn_16_2,
    "wrn_40_1": wrn_40_1,
    "wrn_40_2": wrn_40_2,
}
"""Name -> ``factory(num_classes=..., in_channels=...)``; the networks give plain logits. See also ``timm/NAME``."""


def build_model(factory: ModelFactory, settings: ModelSettings, task: Task) -> Tapped:
    """Build the network for ``task``, load its first weights, and find and check the input of its classifier.

    Weights that no file gives are drawn from torch's global generator, so the caller seeds it. Raises ValueError when the
    network does not fit the task, when the classifier is not found, or when the checkpoint does not fit.
    """
    if isinstance(factory, TimmFactory):
        network = factory(
            num_classes=task.num_classes,
            in_channels=task.in_channels,
            image_size=task.image_size,
            pretrained=settings.pretrained,
        )
    else:
        network = factory(num_classes=task.num_classes, in_channels=task.in_channels)
    if settings.checkpoint is not None:
        apply_weights(network, load_weights(settings.checkpoint), f"checkpoint {settings.checkpoint}")
    tapped = Tapped(network, classifier_path(network, task.num_classes))
    _check(tapped, settings.name, task)
    return tapped


def classifier_path(network: nn.Module, num_classes: int) -> str:
    """Where the classifier sits: the network's own ``classifier_path``, timm's entry, or the last fitting linear layer.

    Raises ValueError when there is none, or when timm names several (a distilled transformer with two heads).
    """
    own = getattr(network, "classifier_path", None)
    if own is not None:
        return str(own)
    config = getattr(network, "default_cfg", None) or {}
    path = config.get("classifier")
    if isinstance(path, str):
        return path
    if path:
        raise ValueError(
            f"{type(network).__name__} has several classifiers {tuple(path)}; one is needed for tapping"
        )
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    fitting: list[str] = [name for name, module in linear.items() if module.out_features == num_classes]
    if not fitting:
        raise ValueError(
            f"{type(network).__name__} has no nn.Linear with {num_classes} outputs (linear layers: "
            f"{', '.join(linear) or 'none'}): set classifier_path on the network to its classifier's module path"
        )
    return fitting[-1]


@torch.no_grad()
def _check(tapped: Tapped, name: str, task: Task) -> None:
    """Run one blank image, so that a network which does not fit the task fails here and not in the first epoch."""
    images = torch.zeros(1, task.in_channels, task.image_size, task.image_size)
    try:
        with evaluating(tapped):
            logits, pooled = tapped(images)
    except (RuntimeError, TypeError, AssertionError, IndexError) as error:
        raise ValueError(f"model {name!r} fails on one image of {list(images.shape[1:])}: {error}") from error
    if logits.shape != (1, task.num_classes):
        raise ValueError(
            f"model {name!r} gives {list(logits.shape)} for one image, expected [1, {task.num_classes}]"
        )
    if pooled.shape != (1, tapped.num_features):
        raise ValueError(
            f"the classifier {tapped.classifier_path!r} of model {name!r} takes {list(pooled.shape)}, expected "
            f"[1, {tapped.num_features}]"
        )
