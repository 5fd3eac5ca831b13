"""The vision tower that LLaVA's code calls: any CLIP-MoE or dense CLIP folder behind LLaVA's own interface.

Shapes: B pictures, S their side in pixels, P patches, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_clipmoe import CLIPMoEVisionConfig
from .convert import load_vision, vision_config_of
from .modeling_clipmoe import CLIPMoETowerOutput
from .processors import image_processor_of
from .routing import expert_load, router_entropy
from .upcycling import expert_parameters, router_parameters


class CLIPMoEVisionTower(nn.Module):
    """A vision tower for LLaVA.

    Unlike LLaVA's own, gradients follow `requires_grad`, and blocks behind the selected layer are not computed.

    Args:
        vision_tower: folder of a CLIP-MoE, or of a dense CLIP (transformers' `CLIPModel`, `SiglipModel` or their vision
            towers alone, or open_clip's with open_clip_config.json).
        args: LLaVA's arguments. `mm_vision_select_layer` (index into the hidden states, usually -2);
            `mm_vision_select_feature` ('patch', or 'cls_patch' to keep the class token, where there is one);
            `unfreeze_mm_vision_tower` (load at once, and leave the weights trainable);
            `s2` and `s2_scales` (several scales, their features side by side: arXiv 2403.13043).
        delay_load: read the configuration only; `load_model` reads the weights.

    Attributes:
        aux_loss: balance and z-loss of the last forward; differentiable if routers train, else zero.

    Raises:
        FileNotFoundError, ValueError: no such folder, one that holds something else, or an argument out of range.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = int(args.mm_vision_select_layer)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self.trainable = bool(getattr(args, "unfreeze_mm_vision_tower", False))
        self.cfg_only = vision_config_of(vision_tower)
        self.image_processor = image_processor_of(vision_tower, self.cfg_only.image_size)
        self.scales = self._read_scales(args) if getattr(args, "s2", False) else []
        self._check_arguments()
        self._prepare_image_processor()
        self.aux_loss = torch.zeros(())
        self._router_logits: tuple[Tensor, ...] = ()
        if not delay_load or self.trainable:
            self.load_model()

    def _read_scales(self, args: Any) -> list[int]:
        text = getattr(args, "s2_scales", "336,672,1008")
        scales = sorted(int(scale) for scale in text.split(","))
        size = self.cfg_only.image_size
        if scales[0] != size or any(scale % size for scale in scales):
            raise ValueError(f"s2_scales '{text}' must start at {size}, the picture size of {self.vision_tower_name}, "
                             "and go on with multiples of it")
        if self.select_feature != "patch":
            raise ValueError(f"s2 has no use for mm_vision_select_feature '{self.select_feature}': set it to 'patch'")
        return scales

    def _prepare_image_processor(self) -> None:
        """Answers what LLaVA's code asks, `crop_size['height']` and `size['shortest_edge']`, also where nothing is cut.

        With several scales, pictures come at the size of the largest.
        """
        processor = self.image_processor
        if "shortest_edge" not in processor.size:
            processor.size = SquareSize(height=processor.size["height"], width=processor.size["width"])
        if self.scales:
            sizes = [processor.crop_size, processor.size]
            for values, key in ((values, key) for values in sizes for key in ("height", "width", "shortest_edge")):
                if key in values:
                    values[key] = self.scales[-1]

    def _check_arguments(self) -> None:
        depth = self.cfg_only.num_hidden_layers
        if not -depth - 1 <= self.select_layer <= depth:
            raise ValueError(f"mm_vision_select_layer {self.select_layer} is out of range: {self.vision_tower_name} "
                             f"has {depth} blocks, so {-depth - 1}..{depth}")
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature '{self.select_feature}' must be 'patch' or 'cls_patch'")
        if self.select_feature == "cls_patch" and not self.cfg_only.class_token:
            raise ValueError(f"mm_vision_select_feature 'cls_patch': {self.vision_tower_name} has no class token; set "
                             "it to 'patch', which gives all its tokens")

    def load_model(self, device_map: Any = None) -> None:
        """Reads the weights, frozen unless `unfreeze_mm_vision_tower`; does nothing the second time.

        Args:
            device_map: LLaVA's: None (CPU), 'auto' (the GPU if there is one), a device, or `{"": device}`. The tower
                is never split.
        """
        if self.is_loaded:
            return
        if isinstance(device_map, dict):
            device_map = device_map.get("", "auto")
        if device_map == "auto":
            device_map = "cuda" if torch.cuda.is_available() else "cpu"
        self.vision_tower = load_vision(self.vision_tower_name).to(device_map or "cpu")
        self.vision_tower.requires_grad_(self.trainable)
        self.is_loaded = True

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Pictures `[B, 3, S, S]` -> features `[B, P, D]`, in the pictures' dtype.

        A list of pictures `[3, S, S]` gives a list of features `[1, P, D]`, as in LLaVA (`P + 1` with 'cls_patch').
        """
        if isinstance(images, list):
            if len({image.shape for image in images}) != 1:
                raise ValueError(f"the pictures of one call must have one size, got {[tuple(i.shape) for i in images]}")
            features = self._features(torch.stack(images))
            return [feature.unsqueeze(0).to(image.dtype) for feature, image in zip(features, images, strict=True)]
        return self._features(images).to(images.dtype)

    def _features(self, images: Tensor) -> Tensor:
        images = images.to(device=self.device, dtype=self.dtype)
        weights_train = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        moe_trains = any(parameter.requires_grad for parameters in (router_parameters, expert_parameters)
                         for _, parameter in parameters(self.vision_tower))
        # Expert dropout is for training experts and routers; a frozen tower gives the same features in every mode.
        self.vision_tower.train(self.training and moe_trains)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (weights_train or images.requires_grad)):
            if not self.scales:
                return self._encode(images)
            return self._encode_scales(images)

    def _encode(self, images: Tensor) -> Tensor:
        output = self.vision_tower(images, output_hidden_states=self.select_layer)
        self.aux_loss = output.aux_loss
        self._router_logits = tuple(logits.detach() for logits in output.router_logits)
        return self.feature_select(output)

    def _encode_scales(self, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` -> `[B, P, D * scales]`.

        Each scale is cut into tiles of the tower's size; its features are put together again, averaged down to the
        smallest scale's grid, and stacked along the channels.
        """
        tiles, counts = [], []
        for scale in self.scales:
            resized = F.interpolate(images.float(), size=(scale, scale), mode="bicubic").to(images.dtype)
            counts.append(scale // self.scales[0])
            tiles.append(_cut(resized, counts[-1]))
        # All scales go through in one batch, so the auxiliary loss counts every token once.
        features = self._encode(torch.cat(tiles)).split([len(part) for part in tiles])
        side = self.num_patches_per_side
        maps = [F.interpolate(_join(part, count, side).float(), size=(side, side), mode="area").to(part.dtype)
                for part, count in zip(features, counts, strict=True)]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    def feature_select(self, image_forward_outs: CLIPMoETowerOutput) -> Tensor:
        """The selected hidden state, `[B, P, D]`, with the class token in front for 'cls_patch'."""
        features = image_forward_outs.hidden_states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" and self.config.class_token else features

    @property
    def routing(self) -> dict[str, Tensor] | None:
        """Statistics of the last forward per computed MoE layer: `load` `[layers, E]`, `entropy` `[layers]`.

        None for a dense tower or before the first forward.
        """
        if not self._router_logits:
            return None
        return {"load": expert_load(self._router_logits, self.config.num_experts_per_tok),
                "entropy": router_entropy(self._router_logits)}

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> CLIPMoEVisionConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size * max(1, len(self.scales))

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


class SquareSize(dict):
    """The size of an image processor that resizes to a square, answering LLaVA's question for the shorter side too."""

    def __missing__(self, key: str) -> int:
        if key != "shortest_edge":
            raise KeyError(key)
        return self["height"]


def _cut(images: Tensor, count: int) -> Tensor:
    """`[B, 3, count * s, count * s]` -> `[B * count * count, 3, s, s]`, row by row."""
    batch, channels, size, _ = images.shape
    tile = size // count
    grid = images.reshape(batch, channels, count, tile, count, tile).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(batch * count * count, channels, tile, tile)


def _join(features: Tensor, count: int, side: int) -> Tensor:
    """Undoes `_cut` on feature maps: `[B * count * count, side * side, D]` -> `[B, D, count * side, count * side]`."""
    grid = features.reshape(-1, count, count, side, side, features.shape[-1]).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(len(grid), features.shape[-1], count * side, count * side)
