"""The tower in a host with LLaVA-NeXT's calling sequence: a stand-in, since that program is in no package.

What such a host does: it builds the tower from its configuration (with `delay_load` or without) or from the training
arguments, hands it to the builder of a resampler and its `config` to the builder of the projector, takes the
projector's input size from it, joins the tiles of all pictures ("anyres") into one batch, and splits the features
again.
"""

import types

import pytest
import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, SiglipVisionConfig, SiglipVisionModel
from transformers import CLIPVisionModel as HFCLIPVisionModel

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel, CLIPMoEVisionTower
from clipmoe_vlm.convert import save_folder

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12, "num_attention_heads": 2,
         "image_size": 32, "patch_size": 8}
SLICES = {"slicefour_patch": [1, 4, 7, 10], "slice_m25811_f6_patch": [11, 8, 5, 2, 6]}  # of 13, at layer -2


# --- the host ------------------------------------------------------------------------------------------------------


class PoolingResampler(nn.Module):
    """Halves the grid and, like NeXT's resamplers, has a size of its own for the projector."""

    def __init__(self, arguments, vision_tower):
        super().__init__()
        self.hidden_size = getattr(arguments, "mm_spatial_pool_out_channels", vision_tower.hidden_size)
        self.pool = nn.Conv2d(vision_tower.hidden_size, self.hidden_size, 2, 2)


class PoolingProjector(nn.Module):
    """Lays the patches out by the numbers in the tower's configuration."""

    def __init__(self, config, vision_cfg):
        super().__init__()
        self.side = vision_cfg.image_size // vision_cfg.patch_size
        self.linear = nn.Linear(config.mm_hidden_size, config.hidden_size)

    def forward(self, features):
        grid = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.linear(nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2))


class Host(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.vision_tower = config, None
        if hasattr(config, "mm_vision_tower"):
            self.build(config, delay_load=config.delay_load)

    def build(self, arguments, **kwargs):
        name = getattr(arguments, "mm_vision_tower", getattr(arguments, "vision_tower", None))
        self.vision_tower = CLIPMoEVisionTower(name, args=arguments, **kwargs)
        self.resampler = (PoolingResampler(arguments, vision_tower=self.vision_tower)
                          if getattr(arguments, "mm_resampler_type", None) else None)
        if not hasattr(self.config, "mm_hidden_size"):
            self.config.mm_hidden_size = getattr(self.resampler, "hidden_size", self.vision_tower.hidden_size)
        self.projector = PoolingProjector(self.config, vision_cfg=self.vision_tower.config)

    def initialize_vision_modules(self, arguments):
        self.config.mm_vision_tower = arguments.vision_tower
        if self.vision_tower is None:
            self.build(arguments)
        else:
            self.vision_tower.load_model()

    def encode(self, pictures):
        features = self.vision_tower(torch.cat(pictures))
        return [self.projector(part) for part in features.split([len(tiles) for tiles in pictures])]


def namespace(**values):
    return types.SimpleNamespace(**{"hidden_size": 24, "mm_vision_select_layer": -2, **values})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP-MoE of twelve blocks, half of them with experts."""
    torch.manual_seed(0)
    moe = {"num_experts": 2, "num_experts_per_tok": 1, "first_moe_layer": 6}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPMoEModel(CLIPMoEConfig(vision_config={**SIZES, **moe}, text_config={**text, "vocab_size": 50}))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    path = tmp_path_factory.mktemp("next") / "moe"
    save_folder(model, path, processor)
    return str(path)


def hidden_states(folder, pixels):
    model = CLIPMoEModel.from_pretrained(folder).eval()
    return model.vision_model(pixels, output_hidden_states=True).hidden_states


# --- the tower in it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_load", [True, False])
@torch.no_grad()
def test_host_built_from_its_configuration(folder, delay_load):
    host = Host(namespace(mm_vision_tower=folder, delay_load=delay_load, mm_hidden_size=32))
    tower = host.vision_tower
    assert tower.is_loaded != delay_load
    if delay_load:
        assert not list(tower.parameters())
        with pytest.raises(RuntimeError, match=r"not loaded yet \(delay_load\): call load_model\(\) first"):
            tower(torch.zeros(1, 3, 32, 32))
        tower.load_model(device_map="auto")
    tower.to(device="cpu", dtype=torch.float32)
    pictures = [torch.randn(count, 3, 32, 32) for count in (3, 1, 5)]  # a whole picture and its tiles
    features = host.encode(pictures)
    assert [part.shape for part in features] == [(3, 4, 24), (1, 4, 24), (5, 4, 24)]
    for tiles, part in zip(pictures, features, strict=True):
        expected = host.projector(hidden_states(folder, tiles)[-2][:, 1:])
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
    assert (tower.image_size, tower.config.image_size, tower.num_patches_per_side, tower.num_patches) == (32, 32, 4, 16)
    processor = tower.image_processor
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (32, 32)


@pytest.mark.parametrize("feature", [*SLICES, *(name.replace("patch", "cls_patch") for name in SLICES)])
@torch.no_grad()
def test_features_of_several_layers(folder, feature, tmp_path):
    HFCLIPVisionModel(CLIPVisionConfig(**SIZES)).save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    dense = HFCLIPVisionModel.from_pretrained(tmp_path)(pixels, output_hidden_states=True).hidden_states
    layers = SLICES[feature.replace("cls_", "")]
    for source, states in ((str(tmp_path), dense), (folder, hidden_states(folder, pixels))):
        host = Host(namespace(delay_load=False))
        host.initialize_vision_modules(namespace(vision_tower=source, mm_vision_select_feature=feature))
        tower = host.vision_tower
        expected = torch.cat([states[layer] for layer in layers], dim=-1)[:, 0 if "cls" in feature else 1:]
        torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)
        assert (tower.num_patches, tower.hidden_size) == expected.shape[1:] == (
            16 + ("cls" in feature), 32 * len(layers))
        assert host.projector.linear.in_features == tower.hidden_size == tower.dummy_feature.shape[1]


def test_blocks_behind_the_last_slice_are_not_computed(folder):
    tower = CLIPMoEVisionTower(folder, namespace(mm_vision_select_feature="slicefour_patch"))
    calls = []
    for block in tower.vision_tower.vision_model.encoder.layers:
        block.register_forward_hook(lambda *call: calls.append(call))
    tower(torch.randn(1, 3, 32, 32))
    assert len(calls) == 10


@torch.no_grad()
def test_siglip_is_read_one_block_before_its_last(tmp_path):
    """NeXT's own SigLIP tower deletes the last block, whatever `mm_vision_select_layer` says: that is layer -2."""
    theirs = SiglipVisionModel(SiglipVisionConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path)
    host = Host(namespace(mm_vision_tower=str(tmp_path), delay_load=False, mm_hidden_size=32))
    pixels = torch.randn(2, 3, 32, 32)
    features = host.vision_tower(pixels)
    del getattr(theirs, "vision_model", theirs).encoder.layers[-1:]
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_projector_behind_a_resampler_takes_what_that_gives(folder):
    resampled = {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_out_channels": 40}
    host = Host(namespace(delay_load=False))
    host.initialize_vision_modules(namespace(vision_tower=folder, **resampled))
    assert host.config.mm_hidden_size == 40 and host.resampler.pool.in_channels == 32
    Host(namespace(mm_vision_tower=folder, delay_load=True, mm_hidden_size=40, **resampled))


def test_slices_that_do_not_exist_are_refused_with_one_sentence(folder, tmp_path):
    HFCLIPVisionModel(CLIPVisionConfig(**{**SIZES, "num_hidden_layers": 6})).save_pretrained(tmp_path)
    for source, layer, feature, message in (
        (folder, 2, "slicefour_patch", "mm_vision_select_layer 2 picks 3 hidden states of the 12 blocks of .*, not 4"),
        (str(tmp_path), -2, "slicefour_patch", "picks 8 hidden states of the 6 blocks"),
        (str(tmp_path), -2, "slice_m25811_f6_patch", r"_f6_patch': hidden state -8 is out of range.*-7\.\.6"),
        (folder, -2, "slicetwo_patch", "'slicetwo_patch' must be one of patch, cls_patch, slicefour_patch"),
    ):
        with pytest.raises(ValueError, match=message):
            CLIPMoEVisionTower(source, namespace(mm_vision_select_layer=layer, mm_vision_select_feature=feature),
                               delay_load=True)
