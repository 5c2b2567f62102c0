"""Reading features out of a network by module path, without editing the network.

Hooks are placed for one call and removed again, so a network stays free of hooks: it can be copied, wrapped in DDP,
saved, or tapped by several readers. Two threads must not run the same network at the same time.

Shape legend: B = batch, C = classes, D = pooled feature width, H, W = image sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from methods.models.compiled import CompiledPass
from methods.models.pass_memory import PassMemory
from methods.names import did_you_mean

Recorded = tuple[Tensor, int]
"""A tensor and how often it had been changed in place when it was read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taps:
    """Module paths whose first input, or whose output, is to be recorded."""

    inputs: tuple[str, ...] = ()
    """Paths as in ``named_modules()``, for instance ``classifier``."""
    outputs: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """How ``run`` names what it recorded: first the inputs, then the outputs."""
        return (*(f"{path}:input" for path in self.inputs), *self.outputs)

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, with near names, when a path does not exist in ``network``."""
        for path in (*self.inputs, *self.outputs):
            find_module(network, path)

    def run(self, network: nn.Module, images: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Run ``network`` on ``images``: its result, and ``PATH`` -> output, ``PATH:input`` -> first input.

        Raises ValueError for a path that does not exist, RuntimeError for one that did not run, ran twice, or whose tensor was changed in place later.
        """
        recorded: dict[str, Recorded] = {}
        with ExitStack() as hooks:
            for path in set(self.inputs):
                hook = find_module(network, path).register_forward_pre_hook(_input_recorder(path, recorded))
                hooks.callback(hook.remove)
            for path in set(self.outputs):
                after = find_module(network, path).register_forward_hook(_output_recorder(path, recorded))
                hooks.callback(after.remove)
            result = network(images)
        self._refuse_what_cannot_be_read(network, recorded)
        return result, {path: value for path, (value, _) in recorded.items()}

    def _refuse_what_cannot_be_read(self, network: nn.Module, recorded: dict[str, Recorded]) -> None:
        missing = set(self.names) - recorded.keys()
        if missing:
            raise RuntimeError(
                f"{type(network).__name__} did not run its modules {sorted(missing)}: tap others"
            )
        changed = [path for path, (value, version) in recorded.items() if _version(value) != version]
        if changed:
            raise RuntimeError(
                f"{type(network).__name__} changes in place what its modules {sorted(changed)} pass: tap the module "
                "behind them, or build the network without in-place operations"
            )


class Features(NamedTuple):
    """What a network says of a batch, with what was read inside it."""

    logits: Tensor
    """``[B, C]``"""
    pooled: Tensor
    """The vector that enters the classifier, ``[B, D]``."""
    maps: tuple[Tensor, ...] = ()
    """One tensor for each tap that was asked for."""


NO_TAPS = Taps()


class Tapped(nn.Module):
    """A network that also gives the vector entering its classifier: ``images -> (logits, pooled)``."""

    def __init__(self, network: nn.Module, classifier_path: str) -> None:
        """Wrap ``network``; its own weights get the prefix ``network.`` in the state dict.

        Raises:
            ValueError: ``classifier_path`` does not exist (near names are given), or is not one linear layer.
        """
        super().__init__()
        self.network = network
        self.classifier_path = classifier_path
        self.num_features = _input_width(find_module(network, classifier_path), classifier_path)
        self._memory: PassMemory[Features] | None = None
        self._compiled: dict[Taps, CompiledPass] = {}
        self._compiled_mode: bool | None = None

    def remember_passes(self) -> None:
        """From now on, a pass without gradient over images that are still alive is not computed twice.

        For a frozen network that several students learn from. What it gives must not be changed in place.
        """
        self._memory = PassMemory()

    def compile_passes(self, *, in_training: bool) -> None:
        """From now on torch compiles the passes in training mode, or else those in evaluation mode. Weights keep their names."""
        self._compiled_mode = in_training

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, C]`` and pooled features ``[B, D]`` of images ``[B, 3, H, W]``."""
        logits, pooled, _ = self.features(images)
        return logits, pooled

    def features(self, images: Tensor, taps: Taps = NO_TAPS) -> Features:
        """Logits, pooled features, and what ``taps`` read: first their inputs, then their outputs."""
        if self._memory is None or torch.is_grad_enabled():
            return self._features(images, taps)
        return self._memory.once(images, taps, lambda: self._features(images, taps))

    def _features(self, images: Tensor, taps: Taps) -> Features:
        every = Taps(inputs=(self.classifier_path, *taps.inputs), outputs=taps.outputs)
        logits, recorded = self._run(images, every)
        pooled = recorded[f"{self.classifier_path}:input"]
        if pooled.dim() == 4 and pooled.shape[2:] == (1, 1):  # a classifier written as a 1x1 convolution
            pooled = pooled.flatten(1)
        if pooled.dim() != 2:
            shape = list(pooled.shape)
            raise ValueError(
                f"{self.classifier_path!r} takes {shape}, not a pooled vector [B, D]: choose another"
            )
        return Features(logits, pooled, tuple(recorded[name] for name in taps.names))

    def _run(self, images: Tensor, taps: Taps) -> tuple[Any, dict[str, Tensor]]:
        if self.training != self._compiled_mode:
            return taps.run(self.network, images)
        if taps not in self._compiled:
            with torch.no_grad(), evaluating(self.network):
                taps.run(self.network, images[:1])  # refuses what cannot be read; compiled passes do not look
            self._compiled[taps] = CompiledPass(self.network, taps)
        return self._compiled[taps](images)


def find_module(network: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, or a ValueError that suggests near paths."""
    try:
        module = network.get_submodule(path)
    except AttributeError:
        module = network
    if module is not network:
        return module
    known = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    children = ", ".join(name for name, _ in network.named_children())
    hint = did_you_mean(path, known)
    raise ValueError(f"{path!r} is not a module of {type(network).__name__}{hint} (its children: {children})")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards each module is in the mode it had."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _input_width(classifier: nn.Module, path: str) -> int:
    if isinstance(classifier, nn.Linear):
        return classifier.in_features
    if isinstance(classifier, nn.Conv2d):
        return classifier.in_channels
    raise ValueError(
        f"{path!r} is a {type(classifier).__name__}; the classifier must be one nn.Linear (or Conv2d)"
    )


def _record(path: str, value: Any, recorded: dict[str, Recorded]) -> Tensor:
    if path in recorded:
        raise RuntimeError(f"module {path!r} ran twice in one forward pass: its feature is ambiguous")
    if not isinstance(value, Tensor):
        raise RuntimeError(
            f"module {path!r} passes a {type(value).__name__}, not a tensor: tap another module"
        )
    recorded[path] = value, _version(value)
    return value


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _input_recorder(
    path: str, recorded: dict[str, Recorded]
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        value = _record(f"{path}:input", arguments[0] if arguments else None, recorded)
        # A module that works in place gets its own copy, so that what was read stays as it was.
        return (value.clone(), *arguments[1:]) if getattr(module, "inplace", False) else None

    return before


def _output_recorder(
    path: str, recorded: dict[str, Recorded]
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        _record(path, output, recorded)

    return after
