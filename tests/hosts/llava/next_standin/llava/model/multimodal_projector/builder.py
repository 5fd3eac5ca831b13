from torch import nn


def build_vision_projector(config, delay_load=False, vision_cfg=None):
    assert vision_cfg.hidden_size == config.mm_hidden_size and vision_cfg.image_size % vision_cfg.patch_size == 0
    return nn.Sequential(nn.Linear(config.mm_hidden_size, config.hidden_size), nn.GELU(),
                         nn.Linear(config.hidden_size, config.hidden_size))
