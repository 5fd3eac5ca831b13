"""Which expert each patch of a picture went to first, block by block, as rows of `predictions/<suite>.routing.jsonl`.

A row: `{"image": name, "grid": [rows, columns], "num_experts": E, "layers": {"0": "0120...", ...}}`. `layers` has each
MoE block that the VLM needs of its tower, by its index; a character is the first-choice expert of a patch, row by row,
as a digit in base 36. Of a picture in tiles (LLaVA-NeXT) it is the tile of the whole picture.
"""

from __future__ import annotations

from typing import Any

import torch

from clipmoe_vlm.modeling_clipmoe import CLIPMoEVisionModel
from clipmoe_vlm.routing import routing_map

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class RoutingRows:
    """Remembers the router logits of the tower's last forward; without a tower with experts it is silent.

    Args:
        model: a VLM of transformers.
    """

    def __init__(self, model: Any):
        tower = next((module for module in model.modules() if isinstance(module, CLIPMoEVisionModel)), None)
        self.config = tower.config if tower is not None and 1 < tower.config.num_experts <= len(DIGITS) else None
        self.logits: tuple[torch.Tensor, ...] = ()
        self.grid = (0, 0)
        if self.config is not None:
            tower.register_forward_hook(self._remember, with_kwargs=True)

    def _remember(self, module: Any, inputs: tuple, kwargs: dict, output: Any) -> None:
        pixel_values = inputs[0] if inputs else kwargs["pixel_values"]
        self.grid = tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])
        self.logits = tuple(output.router_logits or ())

    def take(self, images: list[str], tiles: list[int]) -> list[dict]:
        """The rows of the pictures of the last forward, which are then forgotten; [] without experts.

        Args:
            images: their names.
            tiles: how many of the forward's pictures belong to each, the first of them being the whole picture.
        """
        if not self.logits:
            return []
        total = sum(tiles)
        maps = torch.stack([routing_map(one, total, self.grid) for one in self.logits], 1).flatten(2).tolist()
        self.logits = ()
        first = self.config.first_moe_layer
        starts = [sum(tiles[:index]) for index in range(len(tiles))]
        return [{"image": image, "grid": list(self.grid), "num_experts": self.config.num_experts,
                 "layers": {str(first + index): "".join(DIGITS[expert] for expert in layer)
                            for index, layer in enumerate(maps[start])}}
                for image, start in zip(images, starts, strict=True)]
