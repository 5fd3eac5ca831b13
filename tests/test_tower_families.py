"""Every family that the converter reads as a LLaVA tower and in transformers' Llava, dense and as a mixture of experts.

Expected features are the source library's own: the outputs of its blocks, and for the mixtures those of its blocks with
a plain mixture put in the place of their feed-forward layers.
"""

import copy
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from convert_cases import CASES, PIXELS, outputs_of_blocks
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from clipmoe_vlm import CLIPMoEVisionTower
from clipmoe_vlm.__main__ import main
from clipmoe_vlm.convert import convert, load_dense, load_model, load_vision, save_folder
from clipmoe_vlm.processors import resize_processor
from clipmoe_vlm.upcycling import ffn_parameters, resize_pictures, upcycle

PATCHES = (PIXELS // 8) ** 2
LAYERS = (-1, -2, 2)


@pytest.fixture(scope="module", params=CASES, ids=str)
def family(request, tmp_path_factory):
    """A source, the folder that it is converted to, and the folder of a mixture of it and a changed copy."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("family")
    source = request.param.build(folder / "source")
    convert(str(source.path), str(folder / "dense"), architecture=source.architecture)
    base, other = (load_dense(folder / "dense") for _ in range(2))
    with torch.no_grad():
        for _, parameter in ffn_parameters(other):
            parameter.mul_(1.5)
    moe = upcycle([base, other])
    save_folder(moe, folder / "moe")
    return types.SimpleNamespace(source=source, dense=folder / "dense", moe=folder / "moe")


def pictures(size: int = PIXELS) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, size, size)


def tower_of(folder, layer: int = -2, feature: str = "patch") -> CLIPMoEVisionTower:
    return CLIPMoEVisionTower(str(folder), types.SimpleNamespace(mm_vision_select_layer=layer,
                                                                 mm_vision_select_feature=feature))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def mixed_blocks(source, model, pixels) -> list[torch.Tensor]:
    """Each block's output in the source library, its feed-forward layers mixed with copies by `model`'s routers.

    Both of two experts take part, so their weights are the router's probabilities.
    """
    hooks = []
    for theirs, ours in zip(source.vision_blocks, model.vision_model.encoder.layers, strict=True):
        other = copy.deepcopy(theirs.mlp)
        for parameter in other.parameters():
            parameter.mul_(1.5)

        def mix(module, inputs, output, other=other, weight=ours.mlp.router.weight):
            shares = (inputs[0] @ weight.T).softmax(-1)
            return shares[..., :1] * output + shares[..., 1:] * other(inputs[0])

        hooks.append(theirs.mlp.register_forward_hook(mix))
    outputs = outputs_of_blocks(source.vision_blocks, source.image, pixels)[1]
    for hook in hooks:
        hook.remove()
    return outputs


def check_tower(folder, blocks: list[torch.Tensor], pixels: torch.Tensor) -> None:
    class_token = blocks[0].shape[1] - PATCHES
    assert class_token in (0, 1)
    features = ("patch", "cls_patch") if class_token else ("patch",)
    for feature in features:
        tower = tower_of(folder, -2, feature)
        assert (tower.hidden_size, tower.num_patches) == (blocks[0].shape[-1], PATCHES + (feature == "cls_patch"))
        for layer in LAYERS:
            tower.select_layer = layer
            expected = blocks[layer - 1 if layer > 0 else layer]
            close(tower(pixels), expected if feature == "cls_patch" else expected[:, class_token:])
    if not class_token:
        with pytest.raises(ValueError, match="has no class token; set it to 'patch', which gives all its tokens"):
            tower_of(folder, -2, "cls_patch")


@torch.no_grad()
def test_dense_features_are_the_sources(family):
    pixels = pictures()
    blocks = outputs_of_blocks(family.source.vision_blocks, family.source.image, pixels)[1]
    check_tower(family.dense, blocks, pixels)
    if family.source.path.is_dir():
        check_tower(family.source.path, blocks, pixels)
    else:
        with pytest.raises(ValueError, match=r"is a file.*python -m clipmoe_vlm convert .* FOLDER`$"):
            tower_of(family.source.path)


@torch.no_grad()
def test_mixture_features_are_those_of_a_plain_mixture(family):
    pixels = pictures()
    blocks = mixed_blocks(family.source, load_model(family.moe), pixels)
    dense = outputs_of_blocks(family.source.vision_blocks, family.source.image, pixels)[1]
    assert (blocks[-1] - dense[-1]).abs().max() > 1e-2
    check_tower(family.moe, blocks, pixels)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.no_grad()
def test_in_transformers_llava(family, kind):
    folder = getattr(family, kind)
    vision = load_vision(folder)
    language = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision.config, text_config=language, image_token_index=49, image_seq_length=PATCHES,
        vision_feature_select_strategy="default" if vision.config.class_token else "full")).eval()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids = torch.tensor([[1, *[49] * PATCHES, 5, 6]] * 2)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures()}
    tower = tower_of(folder)
    for layer in LAYERS:
        assert model(**call, vision_feature_layer=layer).logits.shape == (2, PATCHES + 3, 50)
        tower.select_layer = layer
        close(seen[-1], tower(call["pixel_values"]))
    assert model.generate(**call, max_new_tokens=1, do_sample=False).shape == (2, PATCHES + 4)


# --- other picture sizes -------------------------------------------------------------------------------------------


def resized(positions: torch.Tensor, class_tokens: int, size: int) -> torch.Tensor:
    """transformers' rule, channel by channel."""
    side = size // 8
    grid = positions[class_tokens:].reshape(PIXELS // 8, PIXELS // 8, -1)
    channels = [F.interpolate(grid[None, None, ..., channel], (side, side), mode="bicubic").flatten()
                for channel in range(grid.shape[-1])]
    return torch.cat([positions[:class_tokens], torch.stack(channels, dim=1)])


def for_pictures_of(source, size: int, run) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Feature and block outputs of the source library's model at another picture size."""
    visual = getattr(source.model, "visual", None)
    if visual is None:  # transformers
        return outputs_of_blocks(source.vision_blocks, lambda pixels: _feature(source.model.get_image_features(
            pixels, interpolate_pos_encoding=True)), run)
    own = copy.deepcopy(visual)
    if hasattr(own, "trunk"):
        tokens = own.trunk.pos_embed.shape[1] - PATCHES
        positions = resized(own.trunk.pos_embed[0], tokens, size)
        own.trunk.set_input_size(img_size=size)
        own.trunk.pos_embed = nn.Parameter(positions[None])
        blocks = own.trunk.blocks
    else:
        own.positional_embedding = nn.Parameter(resized(own.positional_embedding, 1, size))
        blocks = own.transformer.resblocks
    return outputs_of_blocks(blocks, lambda pixels: _feature(own(pixels)), run)


def _feature(output):
    if hasattr(output, "pooler_output"):
        return output.pooler_output
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def test_converted_to_another_picture_size(family, tmp_path):
    source = family.source
    for size in (48,) if hasattr(source.model, "visual") else (48, 24):
        said = convert(str(source.path), str(tmp_path / "sized"), architecture=source.architecture, image_size=size)
        assert f"{size} px, patch 8" in said
        pixels = pictures(size)
        feature, blocks = for_pictures_of(source, size, pixels)
        close(load_model(tmp_path / "sized").get_image_features(pixels), feature)
        tower = tower_of(tmp_path / "sized")
        close(tower(pixels), blocks[-2][:, -((size // 8) ** 2):])
        assert (tower.num_patches, tower.image_size) == ((size // 8) ** 2, size)
        processor = tower.image_processor
        assert processor(Image.new("RGB", (90, 61)), return_tensors="pt")["pixel_values"].shape == (1, 3, size, size)
        assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (size, size)


@torch.no_grad()
def test_mixture_converted_to_another_picture_size(family, tmp_path):
    convert(str(family.moe), str(tmp_path / "moe"), image_size=48)
    base, other = (resize_pictures(load_dense(family.dense), 48) for _ in range(2))
    for _, parameter in ffn_parameters(other):
        parameter.mul_(1.5)
    expected = upcycle([base, other], expert_dropout=0.0).eval()
    pixels = pictures(48)
    close(load_model(tmp_path / "moe").get_image_features(pixels), expected.get_image_features(pixels))
    assert tower_of(tmp_path / "moe")(pixels).shape[1] == 36


# --- one source ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_vision_tower_alone_to_another_picture_size(tmp_path):
    source = Path(__file__).parent / "reference" / "llava_train" / "tower"  # 56 px, patch 14
    assert "84 px, patch 14" in convert(str(source), str(tmp_path / "sized"), image_size=84)
    pixels = pictures(84)
    theirs = CLIPVisionModel.from_pretrained(source)(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    tower = tower_of(tmp_path / "sized", -2, "cls_patch")
    close(tower(pixels), theirs.hidden_states[-2])
    assert tower.image_processor.crop_size["height"] == 84
    convert(str(tmp_path / "sized"), str(tmp_path / "again"))
    assert torch.equal(tower_of(tmp_path / "again", -2, "cls_patch")(pixels), tower(pixels))
    mine = load_vision(tmp_path / "again")
    mine.save_pretrained(tmp_path / "tower alone")
    assert torch.equal(tower_of(tmp_path / "tower alone", -2, "cls_patch")(pixels), tower(pixels))


@torch.no_grad()
def test_published_layout_at_another_picture_size_and_back(tmp_path):
    file = Path(__file__).parent / "reference" / "clip_moe" / "golden_full.safetensors"
    state = {name[len("state."):]: tensor for name, tensor in load_file(file).items() if name.startswith("state.")}
    torch.save(state, tmp_path / "official.pt")
    size = load_model(tmp_path / "official.pt", top_k=2).config.vision_config.image_size * 2
    convert(str(tmp_path / "official.pt"), str(tmp_path / "folder"), top_k=2, image_size=size)
    convert(str(tmp_path / "official.pt"), str(tmp_path / "sized.pt"), top_k=2, image_size=size, to="official")
    folder, official = load_model(tmp_path / "folder"), load_model(tmp_path / "sized.pt", top_k=2)
    pixels = pictures(size)
    assert torch.equal(folder.get_image_features(pixels), official.get_image_features(pixels))


@torch.no_grad()
def test_pictures_that_are_no_whole_patches_to_another_size(tmp_path):
    """As SigLIP's 384 px at patch 14: the rest is left out."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=38, patch_size=8)).eval()
    theirs.save_pretrained(tmp_path / "siglip")
    for folder, size in (("siglip", 38), ("sized", 48)):
        if folder == "sized":
            convert(str(tmp_path / "siglip"), str(tmp_path / "sized"), image_size=48)
        pixels = pictures(size)
        expected = theirs(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
        close(tower_of(tmp_path / folder)(pixels), expected)
        assert tower_of(tmp_path / folder).num_patches == expected.shape[1] == (size // 8) ** 2


def test_margins_that_are_cut_off_keep_their_share(tmp_path):
    processor = CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    larger = resize_processor(processor, 448)
    assert (larger.size["shortest_edge"], larger.crop_size["height"], larger.crop_size["width"]) == (512, 448, 448)
    assert larger.image_mean == processor.image_mean


@pytest.mark.parametrize(("size", "nearest"), [(60, "56 and 70"), (5, "14"), (0, "14"), (-56, "14")])
def test_picture_size_that_is_no_multiple_of_the_patch(size, nearest, tmp_path, capsys, monkeypatch):
    source = Path(__file__).parent / "reference" / "llava_train" / "tower"
    monkeypatch.setattr("sys.argv", ["clipmoe_vlm", "convert", str(source), str(tmp_path / "sized"),
                                     "--image-size", str(size)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and not list(tmp_path.iterdir())
    assert f"{size} px is no multiple of this tower's patch size of 14 px; the nearest are {nearest}\n" in said
