"""The vision tower that LLaVA's code calls: any CLIP-MoE or dense CLIP folder behind LLaVA's own interface.

Shapes: B pictures, S their side in pixels, P patches, D hidden size.
"""

from __future__ import annotations

import re
from pathlib import Path
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
from .weights import read_weights

SELECT_FEATURES = ("patch", "cls_patch", "slicefour_patch", "slicefour_cls_patch", "slice_m25811_f6_patch",
                   "slice_m25811_f6_cls_patch")


class CLIPMoEVisionTower(nn.Module):
    """A vision tower for LLaVA.

    Unlike LLaVA's own, gradients follow `requires_grad`, and blocks behind the selected layer are not computed.

    Args:
        vision_tower: folder of a CLIP-MoE, or of a dense CLIP (transformers' `CLIPModel`, `SiglipModel` or their vision
            towers alone, or open_clip's with open_clip_config.json).
        args: LLaVA's arguments. `mm_vision_select_layer` (index into the hidden states, usually -2);
            `mm_vision_select_feature` ('patch', or 'cls_patch' to keep the class token, where there is one; LLaVA-
            NeXT's 'slicefour_*' and 'slice_m25811_f6_*' put several hidden states side by side: `selected_layers`);
            `unfreeze_mm_vision_tower` (load at once, and leave the weights trainable);
            `s2` and `s2_scales` (several scales, their features side by side: arXiv 2403.13043);
            `mm_hidden_size` or `pretrain_mm_mlp_adapter`, where a projector exists already: it must fit.
        delay_load: read the configuration only; `load_model` reads the weights.

    Attributes:
        aux_loss: balance and z-loss of the last forward; differentiable if routers train, else zero.
        picture_mask: `[B]`, set before a forward: which of its pictures count in the balance loss (default: all).

    Raises:
        FileNotFoundError, ValueError: no such folder, one that holds something else, an argument out of range, or a
            projector for features of another size.
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
        self._check_projector(args)
        self._prepare_image_processor()
        self.aux_loss = torch.zeros(())
        self.picture_mask: Tensor | None = None
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
        if self.select_feature not in SELECT_FEATURES:
            raise ValueError(f"mm_vision_select_feature '{self.select_feature}' must be one of "
                             f"{', '.join(SELECT_FEATURES)}")
        if "cls_patch" in self.select_feature and not self.cfg_only.class_token:
            without = self.select_feature.replace("cls_patch", "patch")
            raise ValueError(f"mm_vision_select_feature '{self.select_feature}': {self.vision_tower_name} has no class "
                             f"token; set it to '{without}', which gives all its tokens")
        depth, layers = self.cfg_only.num_hidden_layers, self.selected_layers
        if self.select_feature.startswith("slicefour") and len(layers) != 4:
            raise ValueError(f"mm_vision_select_feature '{self.select_feature}' with mm_vision_select_layer "
                             f"{self.select_layer} picks {len(layers)} hidden states of the {depth} blocks of "
                             f"{self.vision_tower_name}, not 4")
        for layer in layers:
            if not -depth - 1 <= layer <= depth:
                name = "mm_vision_select_layer" if len(layers) == 1 else f"'{self.select_feature}': hidden state"
                raise ValueError(f"{name} {layer} is out of range: {self.vision_tower_name} has {depth} blocks, so "
                                 f"{-depth - 1}..{depth}")

    def _check_projector(self, args: Any) -> None:
        if getattr(args, "mm_resampler_type", None) is not None:
            return  # The projector then takes what the resampler gives.
        found = {"mm_hidden_size": getattr(args, "mm_hidden_size", None)}
        adapter = getattr(args, "pretrain_mm_mlp_adapter", None)
        if adapter is not None and Path(adapter).is_file():
            weights = [tensor for name, tensor in read_weights(Path(adapter)).items()
                       if re.search(r"mm_projector\.(0\.)?weight$", name)]
            found[f"pretrain_mm_mlp_adapter {adapter}"] = weights[0].shape[1] if weights else None
        for name, size in found.items():
            if size is not None and size != self.hidden_size:
                raise ValueError(f"{self.vision_tower_name} gives features of size {self.hidden_size}, but the "
                                 f"projector takes {size} ({name}): use the tower and the mm_vision_select_feature "
                                 "(or s2) that the projector was trained with, or train a new one")

    def load_model(self, device_map: Any = None) -> None:
        """Reads the weights, frozen unless `unfreeze_mm_vision_tower`; does nothing the second time.

        Args:
            device_map: LLaVA's: None (CPU), a device, `{"": device}`, or any other plan of transformers' ('auto',
                'balanced', ...), which means the GPU if there is one. The tower is never split.
        """
        if self.is_loaded:
            return
        if isinstance(device_map, dict):
            device_map = device_map.get("", "auto")
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            device_map = "cuda" if torch.cuda.is_available() else "cpu"
        self.vision_tower = load_vision(self.vision_tower_name).to(device_map or "cpu")
        self.vision_tower.requires_grad_(self.trainable)
        self.is_loaded = True

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Pictures `[B, 3, S, S]` -> features `[B, P, D]`, in the pictures' dtype.

        A list of pictures `[3, S, S]` gives a list of features `[1, P, D]`, as in LLaVA (`P + 1` with 'cls_patch').
        """
        if not self.is_loaded:
            raise RuntimeError(f"{self.vision_tower_name} is not loaded yet (delay_load): call load_model() first")
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
                return self._encode(images, self.picture_mask)
            return self._encode_scales(images)

    def _encode(self, images: Tensor, picture_mask: Tensor | None) -> Tensor:
        output = self.vision_tower(images, output_hidden_states=self.selected_layers, picture_mask=picture_mask)
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
        mask = self.picture_mask
        if mask is not None:
            mask = torch.cat([mask.repeat_interleave(count**2) for count in counts])
        # All scales go through in one batch, so the auxiliary loss counts every token once.
        features = self._encode(torch.cat(tiles), mask).split([len(part) for part in tiles])
        side = self.num_patches_per_side
        maps = [F.interpolate(_join(part, count, side).float(), size=(side, side), mode="area").to(part.dtype)
                for part, count in zip(features, counts, strict=True)]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    @property
    def selected_layers(self) -> list[int]:
        """Indices into the `depth + 1` hidden states; negative ones count from the end.

        `mm_vision_select_layer` alone, but for LLaVA-NeXT's 'slicefour_*' every `n`th of them, `n = (depth + 1) // 4`,
        from `n + mm_vision_select_layer` on, and for 'slice_m25811_f6_*' those of its name: -2, -5, -8, -11, 6.
        """
        if self.select_feature.startswith("slicefour"):
            states = self.cfg_only.num_hidden_layers + 1
            return list(range(states // 4 + self.select_layer, states, max(1, states // 4)))
        if self.select_feature.startswith("slice_m25811_f6"):
            return [-2, -5, -8, -11, 6]
        return [self.select_layer]

    def feature_select(self, image_forward_outs: CLIPMoETowerOutput) -> Tensor:
        """The selected hidden states, `[B, P, D]` (side by side), with the class token in front for 'cls_patch'."""
        features = torch.cat([image_forward_outs.hidden_states[layer] for layer in self.selected_layers], dim=-1)
        keeps_all = "cls_patch" in self.select_feature or not self.config.class_token
        return features if keeps_all else features[:, 1:]

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
        """Channels of the features, which the projector takes."""
        return self.config.hidden_size * len(self.selected_layers) * max(1, len(self.scales))

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Features per picture: with 'cls_patch' one more than patches, as in LLaVA-NeXT."""
        return self.num_patches_per_side**2 + ("cls_patch" in self.select_feature)


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
