"""Any timm model as ``timm/NAME``. timm is imported only when such a name is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from methods.names import UnknownNameError, did_you_mean


@dataclass(frozen=True, slots=True)
class TimmFactory:
    """Builds one timm model: a factory like those of the model table, which also knows published weights."""

    architecture: str
    """timm's own name, with or without a tag: ``resnet50``, ``vit_small_patch16_224.augreg_in1k``."""

    def __call__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | None = None,
        pretrained: bool = False,
    ) -> nn.Module:
        """Build the network. ``image_size`` reaches timm only where the architecture has a fixed one (ViT)."""
        import timm

        settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
        config = timm.models.get_pretrained_cfg(self.architecture)
        if image_size is not None and config is not None and config.fixed_input_size:
            settings["img_size"] = image_size
        if pretrained:
            self._require_published_weights(config)
        try:
            network: nn.Module = timm.create_model(self.architecture, pretrained=pretrained, **settings)
        except Exception as error:  # timm's download goes through several libraries, each with its own errors
            if not pretrained:
                raise
            raise OSError(
                f"timm could not load the published weights of {self.architecture!r}: {error}. Check the network (or "
                "fill timm's cache on a machine that has one), or give model.checkpoint a local file"
            ) from error
        return network

    def _require_published_weights(self, config: Any) -> None:
        import timm

        if config is not None and config.has_weights:
            return
        known = timm.list_pretrained(f"{self.architecture.split('.')[0]}*")
        named = f" Those of this family: {', '.join(known[:8])}" if known else ""
        raise ValueError(
            f"timm publishes no weights for {self.architecture!r}: set pretrained to false.{named}"
        )


def timm_factory(name: str) -> TimmFactory:
    """The factory of ``timm/NAME``. Raises UnknownNameError, with near names, for one that timm does not have."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{name!r} needs the package timm: pip install timm") from error
    architecture = name.removeprefix("timm/")
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise UnknownNameError(f"timm has no model {architecture!r}{hint} (all: timm.list_models())")
    return TimmFactory(architecture)
