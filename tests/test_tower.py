"""The LLaVA vision tower against LLaVA's recorded features, transformers' CLIP, and plain versions."""

import json
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers import CLIPModel as HFCLIPModel
from transformers import CLIPVisionModel as HFCLIPVisionModel

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel, CLIPMoEVisionTower
from clipmoe_vlm.convert import save_folder
from clipmoe_vlm.upcycling import router_parameters

REFERENCE = Path(__file__).parent / "reference"
DENSE = REFERENCE / "llava_train" / "tower"
TOWER_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


def arguments(**values) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{"mm_vision_select_layer": -2, **values})


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory) -> Path:
    """A CLIP-MoE of four blocks, the last three with experts, 32 pixels, patch 8."""
    torch.manual_seed(0)
    moe = {"num_experts": 3, "num_experts_per_tok": 2, "expert_dropout": 0.5}
    model = CLIPMoEModel(CLIPMoEConfig(
        vision_config={**TOWER_SIZES, **moe, "image_size": 32, "patch_size": 8, "first_moe_layer": 1,
                       "router_z_loss_coef": 0.1},
        text_config={**TOWER_SIZES, **moe, "vocab_size": 50, "max_position_embeddings": 12},
        projection_dim=16,
    ))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("tower") / "moe"
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    save_folder(model, folder, processor)
    return folder


def pictures(batch: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def all_hidden_states(tower: CLIPMoEVisionTower, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tower.vision_tower(images, output_hidden_states=True).hidden_states


# --- agreement -----------------------------------------------------------------------------------------------------


def test_patch_features_are_those_of_llava(tmp_path):
    reference = load_file(REFERENCE / "llava" / "forward.safetensors")
    prefix = "vision."
    save_file({name[len(prefix):]: tensor for name, tensor in reference.items() if name.startswith(prefix)},
              tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((DENSE / "config.json").read_bytes())
    tower = CLIPMoEVisionTower(str(tmp_path), arguments(mm_vision_select_feature="patch"))
    features = tower(reference["in.pixel_values"])
    torch.testing.assert_close(features, reference["out.patch_features"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", range(-4, 4))
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_dense_vision_folder_equals_transformers(layer, feature):
    theirs = HFCLIPVisionModel.from_pretrained(DENSE)
    images = pictures(2, 56)
    expected = theirs(images, output_hidden_states=True).hidden_states[layer]
    tower = CLIPMoEVisionTower(str(DENSE), arguments(mm_vision_select_layer=layer, mm_vision_select_feature=feature))
    features = tower(images)
    torch.testing.assert_close(features, expected[:, 1:] if feature == "patch" else expected, rtol=1e-5, atol=1e-5)
    assert tower.routing is None and tower.aux_loss == 0


def test_vision_folder_of_this_transformers_version(tmp_path):
    config = CLIPVisionConfig(**TOWER_SIZES, image_size=32, patch_size=8)
    theirs = HFCLIPVisionModel(config).eval()
    theirs.save_pretrained(tmp_path)
    images = pictures()
    tower = CLIPMoEVisionTower(str(tmp_path), arguments())
    expected = theirs(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(tower(images), expected, rtol=1e-5, atol=1e-5)


def test_whole_clips_of_transformers_and_open_clip_serve_as_towers(tmp_path):
    images = pictures()
    config = CLIPConfig(vision_config={**TOWER_SIZES, "image_size": 32, "patch_size": 8},
                        text_config={**TOWER_SIZES, "vocab_size": 49408}, projection_dim=16)
    theirs = HFCLIPModel(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    expected = theirs.vision_model(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    tower = CLIPMoEVisionTower(str(tmp_path / "hf"), arguments())
    torch.testing.assert_close(tower(images), expected, rtol=1e-5, atol=1e-5)
    assert tower.image_processor.size["shortest_edge"] == 32

    import open_clip

    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**architecture).eval()
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}))
    save_file(model.state_dict(), tmp_path / "open_clip" / "open_clip_model.safetensors")
    blocks = []
    model.visual.transformer.resblocks[0].register_forward_hook(lambda *call: blocks.append(call[-1]))
    model.encode_image(images)
    features = CLIPMoEVisionTower(str(tmp_path / "open_clip"), arguments())(images)
    torch.testing.assert_close(features, blocks[0][:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["whole", "vision tower alone"])
def test_siglip_gives_all_its_tokens(kind, tmp_path):
    sizes = {**TOWER_SIZES, "image_size": 32, "patch_size": 8}
    if kind == "whole":
        theirs = SiglipModel(SiglipConfig(vision_config=sizes, text_config={**TOWER_SIZES, "vocab_size": 50}))
        vision = theirs.vision_model
    else:
        vision = theirs = SiglipVisionModel(SiglipVisionConfig(**sizes))
    theirs.eval().save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images = pictures()
    tower = CLIPMoEVisionTower(str(tmp_path), arguments())
    expected = vision(images, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tower(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape[1] == tower.num_patches == 16
    with pytest.raises(ValueError, match="has no class token"):
        CLIPMoEVisionTower(str(tmp_path), arguments(mm_vision_select_feature="cls_patch"))


def test_siglip_image_processor_is_as_llava_uses_it(tmp_path):
    """Nothing is cut off, and still LLaVA's code finds the sizes where it looks for them."""
    SiglipModel(SiglipConfig(vision_config={**TOWER_SIZES, "image_size": 32, "patch_size": 8},
                             text_config={**TOWER_SIZES, "vocab_size": 50})).save_pretrained(tmp_path)
    for values, side in (({}, 32), ({"s2": True, "s2_scales": "32,64"}, 64)):
        processor = CLIPMoEVisionTower(str(tmp_path), arguments(**values), delay_load=True).image_processor
        assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (side, side)
        edge = Image.new("RGB", (90, 30))
        edge.paste((255, 255, 255), (0, 0, 45, 30))
        for call in (processor.preprocess, processor):
            pixels = call(edge, return_tensors="pt")["pixel_values"]
            assert pixels.shape == (1, 3, side, side)
            assert pixels[0, 0, 0, 0] == 1 and pixels[0, 0, 0, -1] == -1
    assert list(processor.image_mean) == [0.5] * 3


def test_moe_folder_gives_the_models_hidden_state(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments())
    images = pictures()
    model = CLIPMoEModel.from_pretrained(moe_folder)
    expected = model.vision_model(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(tower(images), expected, rtol=1e-6, atol=1e-6)


# --- LLaVA's interface ---------------------------------------------------------------------------------------------


def test_sizes_are_known_before_loading(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments(), delay_load=True)
    assert not tower.is_loaded and not list(tower.parameters())
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (32, 16, 4)
    assert tower.config.num_experts == 3
    tower.load_model(device_map={"": "cpu"})
    loaded = tower.vision_tower
    tower.load_model()
    assert tower.is_loaded and tower.vision_tower is loaded
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (32, 16, 4)
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_unfreeze_loads_at_once_and_leaves_the_weights_trainable(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments(unfreeze_mm_vision_tower=True), delay_load=True)
    assert tower.is_loaded and all(parameter.requires_grad for parameter in tower.parameters())


def test_image_processor_is_as_llava_uses_it(moe_folder):
    processor = CLIPMoEVisionTower(str(moe_folder), arguments()).image_processor
    picture = Image.new("RGB", (50, 40), (255, 0, 0))
    for result in (processor.preprocess(picture, return_tensors="pt"), processor(picture, return_tensors="pt")):
        assert result["pixel_values"].shape == (1, 3, 32, 32)
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (32, 32)
    assert tuple(int(value * 255) for value in processor.image_mean) == (122, 116, 104)


def test_list_of_pictures_gives_a_list(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments())
    images = pictures()
    features = tower(list(images))
    assert [feature.shape for feature in features] == [(1, 16, 32)] * 3
    torch.testing.assert_close(torch.cat(features), tower(images), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="must have one size"):
        tower([torch.zeros(3, 32, 32), torch.zeros(3, 32, 40)])
    with pytest.raises(ValueError, match="32x32 pixels, got 40x40"):
        tower(pictures(1, 40))


def test_dtype_of_the_pictures_comes_back(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments())
    images = pictures()
    assert tower(images.double()).dtype == torch.float64
    expected = tower(images)
    tower.to(dtype=torch.bfloat16)
    assert tower.dtype == torch.bfloat16 and tower.device == torch.device("cpu")
    assert (tower.dummy_feature.shape, tower.dummy_feature.dtype) == ((1, 32), torch.bfloat16)
    features = tower(images)
    assert features.dtype == torch.float32
    # Fewer digits may send a token on the edge between two experts to the other one, but not many.
    assert (features - expected).abs().median() < 0.1


# --- what is computed, what trains ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "blocks"), [(-2, 3), (-1, 4), (4, 4), (2, 2), (0, 0), (-5, 0)])
def test_blocks_behind_the_selected_layer_are_not_computed(moe_folder, layer, blocks):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments(mm_vision_select_layer=layer))
    images = pictures()
    expected = all_hidden_states(tower, images)[layer][:, 1:]
    calls = []
    for index, block in enumerate(tower.vision_tower.vision_model.encoder.layers):
        block.register_forward_hook(lambda module, inputs, output, index=index: calls.append(index))
    assert torch.equal(tower(images), expected)
    assert calls == list(range(blocks))


def test_gradients_follow_requires_grad(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments()).train()
    images = pictures()
    assert not tower(images).requires_grad and not tower.aux_loss.requires_grad and tower.aux_loss == 0

    for _, weight in router_parameters(tower.vision_tower):
        weight.requires_grad_(True)
    features = tower(images)
    assert tower.aux_loss.requires_grad and tower.aux_loss > 0
    (features.square().mean() + tower.aux_loss).backward()
    layers = tower.vision_tower.vision_model.encoder.layers
    # Block 3 is not needed by layer -2; blocks 1 and 2 hold the routers that are.
    assert all(layers[index].mlp.router.weight.grad.abs().sum() > 0 for index in (1, 2))
    with_gradient = [name for name, parameter in tower.named_parameters() if parameter.grad is not None]
    assert len(with_gradient) == 2

    tower.requires_grad_(False)
    layers[0].mlp.fc1.weight.requires_grad_(True)
    features = tower(images)
    assert features.requires_grad and tower.aux_loss == 0
    features.square().mean().backward()
    assert layers[0].mlp.fc1.weight.grad.abs().sum() > 0

    tower.requires_grad_(False)
    prompt = images.clone().requires_grad_(True)
    tower(prompt).square().mean().backward()
    assert prompt.grad.abs().sum() > 0
    with torch.no_grad():
        layers[0].mlp.fc1.weight.requires_grad_(True)
        assert not tower(images).requires_grad


def test_aux_loss_is_balance_loss_and_z_loss(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments(mm_vision_select_layer=-1)).eval()
    for _, weight in router_parameters(tower.vision_tower):
        weight.requires_grad_(True)
    images = pictures()
    tower(images)
    logits = torch.stack(tower.vision_tower(images).router_logits).flatten(0, 1)
    chosen = F.one_hot(logits.topk(2).indices, 3).float().mean(0)
    balance = 3 * (chosen * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(tower.aux_loss, balance + 0.1 * logits.logsumexp(-1).square().mean())


def test_expert_dropout_only_while_the_moe_trains(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments()).train()
    images = pictures()
    assert torch.equal(tower(images), tower(images))
    for _, weight in router_parameters(tower.vision_tower):
        weight.requires_grad_(True)
    assert not torch.equal(tower(images), tower(images))
    tower.eval()
    assert torch.equal(tower(images), tower(images))


def test_routing_statistics(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments())
    assert tower.routing is None
    images = pictures()
    tower(images)
    logits = tower.vision_tower(images).router_logits[:2]  # layer -2 leaves the last MoE block out
    load = torch.stack([torch.bincount(layer.topk(2).indices.flatten(), minlength=3) / (2 * len(layer))
                        for layer in logits])
    torch.testing.assert_close(tower.routing["load"], load)
    entropy = torch.stack([torch.distributions.Categorical(logits=layer).entropy().mean() for layer in logits])
    torch.testing.assert_close(tower.routing["entropy"], entropy)


# --- several scales ------------------------------------------------------------------------------------------------


def plain_s2(tower: CLIPMoEVisionTower, image: torch.Tensor, scales: list[int]) -> torch.Tensor:
    """One picture `[3, S, S]`, tile by tile, each patch written to its place."""
    side, dim, size = tower.num_patches_per_side, tower.config.hidden_size, scales[0]
    result = []
    for scale in scales:
        resized = F.interpolate(image[None], size=(scale, scale), mode="bicubic")
        count = scale // size
        grid = torch.zeros(count * side, count * side, dim)
        for row in range(count):
            for column in range(count):
                tile = resized[:, :, row * size:(row + 1) * size, column * size:(column + 1) * size]
                features = all_hidden_states(tower, tile)[tower.select_layer][0, 1:].reshape(side, side, dim)
                grid[row * side:(row + 1) * side, column * side:(column + 1) * side] = features
        result.append(torch.stack([
            grid[row * count:(row + 1) * count, column * count:(column + 1) * count].mean((0, 1))
            for row in range(side) for column in range(side)]))
    return torch.cat(result, dim=1)


def test_s2_equals_a_plain_version(moe_folder):
    tower = CLIPMoEVisionTower(str(moe_folder), arguments(s2=True, s2_scales="64,32,96"), delay_load=True)
    assert (tower.hidden_size, tower.num_patches) == (96, 16)
    tower.load_model()
    processor = tower.image_processor
    assert processor(Image.new("RGB", (120, 100)), return_tensors="pt")["pixel_values"].shape == (1, 3, 96, 96)
    images = pictures(2, 96)
    features = tower(images)
    assert features.shape == (2, 16, 96) and tower.dummy_feature.shape == (1, 96)
    expected = torch.stack([plain_s2(tower, image, [32, 64, 96]) for image in images])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(tower(list(images))), features, rtol=1e-6, atol=1e-6)


def test_s2_arguments_are_checked(moe_folder):
    with pytest.raises(ValueError, match="s2_scales '336,672,1008' must start at 32"):
        CLIPMoEVisionTower(str(moe_folder), arguments(s2=True))
    with pytest.raises(ValueError, match="set it to 'patch'"):
        CLIPMoEVisionTower(str(moe_folder), arguments(s2=True, s2_scales="32,64", mm_vision_select_feature="cls_patch"))


# --- wrong input ---------------------------------------------------------------------------------------------------


def test_wrong_folders_fail_with_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CLIPMoEVisionTower(str(tmp_path / "nothing"), arguments())
    with pytest.raises(ValueError, match="neither a config.json with a model_type nor an open_clip_config.json"):
        CLIPMoEVisionTower(str(tmp_path), arguments())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(ValueError, match="model_type 'dinov2'; supported are"):
        CLIPMoEVisionTower(str(tmp_path), arguments(), delay_load=True)


def test_wrong_arguments_fail_with_one_sentence(moe_folder):
    for layer in (5, -6):
        with pytest.raises(ValueError, match=rf"mm_vision_select_layer {layer} is out of range.*4 blocks, so -5\.\.4"):
            CLIPMoEVisionTower(str(moe_folder), arguments(mm_vision_select_layer=layer), delay_load=True)
    with pytest.raises(ValueError, match="'cls' must be one of patch, cls_patch"):
        CLIPMoEVisionTower(str(moe_folder), arguments(mm_vision_select_feature="cls"))


@pytest.mark.parametrize("first", ["", "0."])
def test_projector_of_another_size_is_refused_with_both_sizes(moe_folder, first, tmp_path):
    adapter = tmp_path / "mm_projector.bin"
    torch.save({f"model.mm_projector.{first}weight": torch.zeros(16, 64),
                f"model.mm_projector.{first}bias": torch.zeros(16)}, adapter)
    for given in ({"mm_hidden_size": 64}, {"pretrain_mm_mlp_adapter": str(adapter)}):
        with pytest.raises(ValueError, match="gives features of size 32, but the projector takes 64"):
            CLIPMoEVisionTower(str(moe_folder), arguments(**given), delay_load=True)
        scaled = CLIPMoEVisionTower(str(moe_folder), arguments(s2=True, s2_scales="32,64", **given), delay_load=True)
        assert scaled.hidden_size == 64


def test_configurations_of_another_version_are_refused_with_one_sentence(moe_folder, tmp_path):
    for part in (None, "vision_config", "text_config"):
        values = json.loads((moe_folder / "config.json").read_text())
        (values[part] if part else values)["rotary_positions"] = True
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match="config.json: a clip_moe.* has no field rotary_positions: .* a newer"):
            CLIPMoEVisionTower(str(tmp_path), arguments(), delay_load=True)


@pytest.mark.parametrize("device_map", [None, "auto", "balanced", "sequential", "cpu", torch.device("cpu"), {"": "cpu"},
                                        {"model.vision_tower": 0}])
def test_every_device_map_that_llava_knows(moe_folder, device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tower = CLIPMoEVisionTower(str(moe_folder), arguments(), delay_load=True)
    tower.load_model(device_map=device_map)
    assert tower.device == torch.device("cpu")
