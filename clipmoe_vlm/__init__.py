"""CLIP-MoE as a plugin for vision-language models: replace `vision_tower`, keep everything else."""

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from .hf import add_router_aux_loss, register
from .modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel
from .tower import CLIPMoEVisionTower
from .versions import warn_if_untested

warn_if_untested()
register()

__all__ = [
    "CLIPMoEConfig",
    "CLIPMoEModel",
    "CLIPMoETextConfig",
    "CLIPMoEVisionConfig",
    "CLIPMoEVisionModel",
    "CLIPMoEVisionTower",
    "add_router_aux_loss",
]
