"""A network's pass as one compiled function that also gives what was tapped inside of it.

Hooks that come and go would be compiled into the first pass and never looked at again, so here they stay. The network
keeps its modules and the names of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from methods.models.tapped import Taps


class CompiledPass:
    """Does what ``Taps.run`` does, without its checks, compiled at the first call for images of each size.

    Every size gets kernels of its own, so that results do not depend on which size was seen first.
    """

    def __init__(self, network: nn.Module, taps: Taps) -> None:
        recorded: dict[str, Tensor] = {}
        self._recorded = recorded
        for path in set(taps.inputs):
            module = network.get_submodule(path)
            module.register_forward_pre_hook(_input_keeper(f"{path}:input", recorded))
        for path in set(taps.outputs):
            network.get_submodule(path).register_forward_hook(_output_keeper(path, recorded))

        def run(images: Tensor) -> tuple[Any, dict[str, Tensor]]:
            result = network(images)
            return result, {name: recorded.pop(name) for name in taps.names}

        self._run = torch.compile(run, dynamic=False)

    def __call__(self, images: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """What the network gives, and ``PATH`` -> output, ``PATH:input`` -> first input."""
        self._recorded.clear()  # passes that were not compiled leave something too
        return self._run(images)


def _input_keeper(
    name: str, recorded: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        recorded[name] = arguments[0]
        return (arguments[0].clone(), *arguments[1:]) if getattr(module, "inplace", False) else None

    return before


def _output_keeper(
    path: str, recorded: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        recorded[path] = output

    return after
