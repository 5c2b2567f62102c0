"""Reading features out of a network by module path, without editing the network.

Hooks are placed for one call and removed again, so a network stays free of hooks: it can be copied, wrapped in DDP,
saved, or tapped by several readers. Two threads must not run the same network at the same time.

Shape legend: B = batch, C = classes, D = pooled feature width, H, W = image sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from methods.names import did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Taps:
    """Module paths whose first input, or whose output, is to be recorded."""

    inputs: tuple[str, ...] = ()
    """Paths as in ``named_modules()``, for instance ``classifier``."""
    outputs: tuple[str, ...] = ()

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, with near names, when a path does not exist in ``network``."""
        for path in (*self.inputs, *self.outputs):
            find_module(network, path)

    def run(self, network: nn.Module, images: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Run ``network`` on ``images``: its result, and path -> recorded tensor.

        A path that stands in both ``inputs`` and ``outputs`` gives its output. Raises ValueError for a path that
        does not exist, RuntimeError for one that did not run, or ran twice.
        """
        recorded: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for path in set(self.inputs) - set(self.outputs):
                hook = find_module(network, path).register_forward_pre_hook(_input_recorder(path, recorded))
                hooks.callback(hook.remove)
            for path in self.outputs:
                after = find_module(network, path).register_forward_hook(_output_recorder(path, recorded))
                hooks.callback(after.remove)
            result = network(images)
        missing = {*self.inputs, *self.outputs} - recorded.keys()
        if missing:
            raise RuntimeError(
                f"{type(network).__name__} did not run its modules {sorted(missing)}: tap others"
            )
        return result, recorded


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

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, C]`` and pooled features ``[B, D]`` of images ``[B, 3, H, W]``."""
        logits, recorded = Taps(inputs=(self.classifier_path,)).run(self.network, images)
        pooled = recorded[self.classifier_path]
        if pooled.dim() == 4 and pooled.shape[2:] == (1, 1):  # a classifier written as a 1x1 convolution
            pooled = pooled.flatten(1)
        if pooled.dim() != 2:
            shape = list(pooled.shape)
            raise ValueError(
                f"{self.classifier_path!r} takes {shape}, not a pooled vector [B, D]: choose another"
            )
        return logits, pooled


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


def _record(path: str, value: Any, recorded: dict[str, Tensor]) -> None:
    if path in recorded:
        raise RuntimeError(f"module {path!r} ran twice in one forward pass: its feature is ambiguous")
    if not isinstance(value, Tensor):
        raise RuntimeError(
            f"module {path!r} passes a {type(value).__name__}, not a tensor: tap another module"
        )
    recorded[path] = value


def _input_recorder(path: str, recorded: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        _record(path, arguments[0] if arguments else None, recorded)

    return before


def _output_recorder(
    path: str, recorded: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        _record(path, output, recorded)

    return after
