"""How LLaVA builds a vision tower: a CLIP-MoE folder becomes ours, everything else stays LLaVA's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..configuration_clipmoe import CLIPMoEConfig, CLIPMoEVisionConfig
from ..tower import CLIPMoEVisionTower

MODEL_TYPES = (CLIPMoEConfig.model_type, CLIPMoEVisionConfig.model_type)


def build_vision_tower(theirs: Callable, vision_tower_cfg: Any, **kwargs: Any) -> nn.Module:
    source = tower_source(vision_tower_cfg)
    if not is_clip_moe(source):
        return theirs(vision_tower_cfg, **kwargs)
    tower = CLIPMoEVisionTower(source, args=vision_tower_cfg, **kwargs)
    vision = tower.config
    experts = f"{vision.num_experts} experts, top {vision.num_experts_per_tok}" if vision.num_experts > 1 else "dense"
    say(f"vision tower {source} ({experts})")
    return tower


def tower_source(config: Any) -> str | None:
    """The vision tower's folder or hub name in LLaVA's arguments or in a checkpoint's configuration."""
    return getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)


def is_clip_moe(source: str | None) -> bool:
    """Whether a folder or hub name is that of a CLIP-MoE (or of a dense CLIP in its format)."""
    try:
        values, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError, TypeError):  # LLaVA says what it thinks of it
        return False
    return values.get("model_type") in MODEL_TYPES


def say(text: str) -> None:
    """Prints for people, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"clipmoe_vlm: {text}", flush=True)
