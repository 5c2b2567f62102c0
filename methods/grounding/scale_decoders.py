"""From maps of four scales to a mask (MagNet): a pyramid, or Mask2Former's two decoders from transformers.

Published, for the second: a deformable pixel decoder of four layers and one object query through nine masked-attention layers.
Different from the release: transformers' decoder attends over the three coarser maps and joins the finest by a pyramid
step; and there is no class score, which over a single query would always be 1.

Shape legend: B = batch, C = decoder width, c, h, w = width and sides of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from methods.grounding.pixel_decoder import ConvolutionBlock, resized
from methods.grounding.pretrained import transformers_part

MODELING = "transformers.models.mask2former.modeling_mask2former"


class DeformableScales(nn.Module):
    """Deformable attention over the three coarser maps, and a pyramid step to the finest one."""

    def __init__(
        self, widths: Sequence[int], strides: Sequence[int], channels: int, *, num_layers: int, num_heads: int
    ) -> None:
        super().__init__()
        config = _config(channels, strides, num_heads, encoder_layers=num_layers)
        decoder = transformers_part(MODELING, "Mask2FormerPixelDecoder")(
            config, feature_channels=list(widths)
        )
        # The projection of the finest map is the network's own ``pixel_decoder``, so that it can be tapped.
        decoder.mask_projection = nn.Identity()
        _initialise(decoder, config)
        self.decoder = decoder

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The finest map ``[B, C, h, w]`` and the three coarser ones, coarse to fine, from maps fine to coarse."""
        output = self.decoder(list(maps))
        return output.mask_features, tuple(output.multi_scale_features)


class QueryHead(nn.Module):
    """One object query that looks at the coarser maps within the mask found so far; its vector is the mask's."""

    def __init__(self, channels: int, strides: Sequence[int], *, num_layers: int, num_heads: int) -> None:
        super().__init__()
        # transformers counts the prediction before the first layer as a layer.
        config = _config(channels, strides, num_heads, decoder_layers=num_layers + 1)
        self.query = transformers_part(MODELING, "Mask2FormerTransformerModule")(channels, config)
        _initialise(self.query, config)

    def forward(self, pixels_BChw: Tensor, coarse_maps: Sequence[Tensor]) -> Tensor:
        """Mask logits, ``[B, 1, h, w]``."""
        output = self.query(multi_scale_features=list(coarse_maps), mask_features=pixels_BChw)
        logits_B1hw: Tensor = output.masks_queries_logits[-1]
        return logits_B1hw


class FourScalePyramid(nn.Module):
    """The small alternative: 1x1 convolutions to one width, added from coarse to fine, each sum with a 3x3 block beside it.

    The blocks' padding is what tells a coarse map where it is: nothing else in the trunk knows left from right in a picture,
    and without blocks there, sentences that name a side are hardly learnt. Beside the map and not in its way, since
    a norm after every addition holds up the first steps.
    """

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.blocks = nn.ModuleList(ConvolutionBlock(channels, channels) for _ in widths)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The finest map, ``[B, C, h, w]``, from maps fine to coarse."""
        *finer, joined = [lateral(each) for lateral, each in zip(self.lateral, maps, strict=True)]
        for block, fine in list(zip(self.blocks[1:], finer, strict=True))[::-1]:
            joined = fine + resized(joined + block(joined), fine.shape[2:])
        pixels: Tensor = self.blocks[0](joined)
        return pixels


def _config(channels: int, strides: Sequence[int], num_heads: int, **layers: int) -> Any:
    return transformers_part("transformers", "Mask2FormerConfig")(
        feature_size=channels,
        mask_feature_size=channels,
        hidden_dim=channels,
        encoder_feedforward_dim=4 * channels,
        dim_feedforward=8 * channels,
        num_attention_heads=num_heads,
        num_queries=1,
        dropout=0.0,
        common_stride=strides[0],
        feature_strides=list(strides),
        **layers,
    )


def _initialise(module: nn.Module, config: Any) -> None:
    """First weights as transformers gives them; its parts, built alone, would keep uninitialised memory."""
    module.apply(
        transformers_part(MODELING, "Mask2FormerPreTrainedModel")(config)._init_weights
    )  # children first, as transformers does
