"""Pictures of any shape as LLaVA-NeXT shows them to the language model: small and whole, then in tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches


def tiles_per_picture(config: LlavaConfig | LlavaNextConfig, size: Sequence[int]) -> int:
    """What the tower sees of a picture of `size` (height, width) in pixels: itself, and with LLaVA-NeXT its tiles."""
    if config.model_type != "llava_next":
        return 1
    return image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size)


class JoinTiles(nn.Module):
    """Tiles put side by side again, without the margins that filled them up, `image_newline` at the end of each row.

    transformers' own function does it. A module of its own so that ZeRO-3 gathers `image_newline`, a bare parameter of
    a model whose forward does not run here.
    """

    def __init__(self, model: LlavaNextModel):
        super().__init__()
        self.config = model.config
        self.image_newline = model.image_newline
        self.pack = model.pack_image_features

    def forward(self, features: Tensor, image_sizes: Sequence[Sequence[int]]) -> Tensor:
        """`[tiles, patches, D]` of all pictures -> `[tokens, D]`.

        Args:
            features: of each picture the whole one, then its tiles; one lone tile if there is no picture.
            image_sizes: (height, width) of each picture in pixels.
        """
        config = self.config
        tiles = [tiles_per_picture(config, size) for size in image_sizes]
        packed, _ = self.pack(features.split(tiles or [len(features)]), [list(size) for size in image_sizes],
                              config.vision_feature_select_strategy, self.image_newline)
        return torch.cat(packed)
