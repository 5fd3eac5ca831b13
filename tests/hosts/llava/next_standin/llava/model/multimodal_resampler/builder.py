from torch import nn


class NoResampler(nn.Module):
    config = {"mm_resampler_type": None}

    def forward(self, features, *args, **kwargs):
        return features


def build_vision_resampler(model_args, delay_load=False, vision_tower=None):
    assert vision_tower.hidden_size > 0
    return NoResampler()
