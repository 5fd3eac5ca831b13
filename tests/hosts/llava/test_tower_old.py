"""Our tower beside the original LLaVA's own `CLIPVisionTower`, in the environment that LLaVA pins."""

import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from PIL import Image

from clipmoe_vlm import CLIPMoEVisionModel, CLIPMoEVisionTower
from clipmoe_vlm.convert import convert, load_vision

FOLDER = str(Path(__file__).parents[2] / "reference" / "llava_train" / "tower")  # 56 px, patch 14, 3 blocks


def arguments(**values):
    return types.SimpleNamespace(**{"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", **values})


def pictures(size=56):
    torch.manual_seed(0)
    return torch.randn(2, 3, size, size)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=["the CLIP's folder", "the folder that convert writes"])
def folder(request, tmp_path_factory):
    if request.param == "the CLIP's folder":
        return FOLDER
    target = str(tmp_path_factory.mktemp("old") / "ours")
    convert(FOLDER, target)
    return target


@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 2])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_features_are_llavas(folder, layer, feature):
    given = arguments(mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    theirs, ours = CLIPVisionTower(FOLDER, given), CLIPMoEVisionTower(folder, given)
    images = pictures()
    close(ours(images), theirs(images))
    for one, other in zip(ours(list(images)), theirs(list(images)), strict=True):
        close(one, other)
    for name in ("is_loaded", "select_layer", "select_feature", "hidden_size", "num_patches_per_side", "dtype",
                 "device"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert torch.equal(ours.dummy_feature, theirs.dummy_feature)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert ours.num_patches == theirs.num_patches + (feature == "cls_patch")  # theirs forgets the class token


def test_image_processor_is_llavas(folder):
    theirs = CLIPVisionTower(FOLDER, arguments()).image_processor
    ours = CLIPMoEVisionTower(folder, arguments(), delay_load=True).image_processor
    picture = Image.effect_noise((90, 61), 80).convert("RGB")
    close(*(processor.preprocess(picture, return_tensors="pt")["pixel_values"] for processor in (ours, theirs)))
    for name in ("size", "crop_size", "image_mean", "image_std"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, {"": torch.device("cpu")}])
def test_loading_later(folder, device_map):
    theirs = CLIPVisionTower(FOLDER, arguments(), delay_load=True)
    ours = CLIPMoEVisionTower(folder, arguments(), delay_load=True)
    for name in ("is_loaded", "hidden_size", "num_patches", "num_patches_per_side"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.config.hidden_size == theirs.config.hidden_size
    for tower in (ours, theirs):
        tower.load_model(device_map=device_map)
        loaded = tower.vision_tower
        tower.load_model(device_map=device_map)
        assert tower.is_loaded and tower.vision_tower is loaded
    images = pictures()
    close(ours(images), theirs(images))


def test_dtypes(folder):
    theirs, ours = CLIPVisionTower(FOLDER, arguments()), CLIPMoEVisionTower(folder, arguments())
    images = pictures()
    for dtype in (torch.float64, torch.bfloat16):
        for tower in (ours, theirs):
            tower.to(device="cpu", dtype=dtype)
        assert ours.dtype == theirs.dtype == ours.dummy_feature.dtype == dtype
        for cast in (images, images.to(torch.float64)):
            assert ours(cast).dtype == theirs(cast).dtype == cast.dtype
        tolerance = 1e-5 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(ours(images), theirs(images), rtol=tolerance, atol=tolerance)


def test_several_scales(folder):
    """What LLaVA's later `CLIPVisionTowerS2` gives, tile by tile through LLaVA's own tower."""
    theirs = CLIPVisionTower(FOLDER, arguments())
    ours = CLIPMoEVisionTower(folder, arguments(s2=True, s2_scales="56,112"))
    images = pictures(112)
    small = theirs(F.interpolate(images, size=(56, 56), mode="bicubic"))
    rows = [torch.cat([_grid(theirs(images[:, :, top:top + 56, left:left + 56])) for left in (0, 56)], dim=3)
            for top in (0, 56)]
    large = F.avg_pool2d(torch.cat(rows, dim=2), 2).flatten(2).transpose(1, 2)
    close(ours(images), torch.cat([small, large], dim=-1))
    assert ours.hidden_size == 2 * theirs.hidden_size
    assert ours.image_processor.crop_size["height"] == ours.image_processor.size["shortest_edge"] == 112


def _grid(features):
    return features.transpose(1, 2).unflatten(2, (4, 4))


def test_another_picture_size(tmp_path):
    convert(FOLDER, str(tmp_path / "sized"), image_size=84)
    ours = CLIPMoEVisionTower(str(tmp_path / "sized"), arguments())
    assert ours(pictures(84)).shape == (2, 36, ours.hidden_size) and ours.num_patches == 36
    prepared = ours.image_processor.preprocess(Image.new("RGB", (90, 61)), return_tensors="pt")["pixel_values"]
    assert prepared.shape == (1, 3, 84, 84)


def test_saved_tower_comes_back(folder, tmp_path):
    tower = load_vision(folder)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(1.25)
    tower.save_pretrained(tmp_path)
    images = pictures()
    for again in (load_vision(tmp_path), CLIPMoEVisionModel.from_pretrained(tmp_path).eval()):
        close(again(images, output_hidden_states=True).hidden_states[-2],
              tower(images, output_hidden_states=True).hidden_states[-2])
