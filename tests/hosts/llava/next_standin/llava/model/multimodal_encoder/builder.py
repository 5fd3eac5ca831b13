import os

from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel


class CLIPVisionTower(nn.Module):
    def __init__(self, vision_tower, args, delay_load=False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name, self.select_layer = vision_tower, args.mm_vision_select_layer
        tunable = getattr(args, "mm_tunable_parts", None) or ""
        if not delay_load or getattr(args, "unfreeze_mm_vision_tower", False) or "mm_vision_tower" in tunable:
            self.load_model()
        else:
            self.cfg_only = CLIPVisionConfig.from_pretrained(vision_tower)

    def load_model(self, device_map=None):
        self.image_processor = CLIPImageProcessor.from_pretrained(self.vision_tower_name)
        self.vision_tower = CLIPVisionModel.from_pretrained(self.vision_tower_name, device_map=device_map)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    @property
    def config(self):
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self):
        return self.config.hidden_size

    def forward(self, images):
        return self.vision_tower(images, output_hidden_states=True).hidden_states[self.select_layer][:, 1:]


class SigLipVisionTower(CLIPVisionTower):
    pass


class EvaClipVisionTower(CLIPVisionTower):
    pass


def build_vision_tower(vision_tower_cfg, **kwargs):
    vision_tower = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if os.path.exists(vision_tower) or vision_tower.startswith("openai"):
        return CLIPVisionTower(vision_tower, args=vision_tower_cfg, **kwargs)
    if "siglip" in vision_tower:
        return SigLipVisionTower(vision_tower, args=vision_tower_cfg, **kwargs)
    if "eva" in vision_tower:
        return EvaClipVisionTower(vision_tower, args=vision_tower_cfg, **kwargs)
    raise ValueError(f"Unknown vision tower: {vision_tower}")
