"""CLIP-MoE as a plugin for vision-language models: replace `vision_tower`, keep everything else."""

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from .hf import register
from .modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel
from .tower import CLIPMoEVisionTower

register()

__all__ = [
    "CLIPMoEConfig",
    "CLIPMoEModel",
    "CLIPMoETextConfig",
    "CLIPMoEVisionConfig",
    "CLIPMoEVisionModel",
    "CLIPMoEVisionTower",
]
