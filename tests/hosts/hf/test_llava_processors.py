"""`clipmoe_vlm.vlm`: processor, tower and projector of a VLM fit each other, or are refused with both numbers."""

import copy

import pytest
import torch
import transformers
from llava_family import (
    KINDS,
    NO_CLASS_TOKEN,
    PROCESSOR_EXPANDS,
    SIZES,
    VERSION,
    answer,
    ask,
    image_processor,
    logits_of,
    make_config,
    make_processor,
    make_tokenizer,
    make_vlm,
    tower_config,
)
from transformers import AutoProcessor, CLIPVisionConfig, LlavaForConditionalGeneration

from clipmoe_vlm import CLIPMoEVisionModel
from clipmoe_vlm.vlm import (
    body,
    build_processor,
    check_config,
    check_processor,
    check_projector,
    save_vlm,
    set_tower,
    tokens_per_picture,
)

NEEDS_FIELDS = pytest.mark.skipif(not PROCESSOR_EXPANDS, reason="processors of this version do not know the tower")


# transformers 4.36 has no SigLIP.
SIGLIP = [(transformers.SiglipVisionConfig(**SIZES), "full", 16)] if hasattr(transformers, "SiglipVisionConfig") else []


# --- how many tokens a picture has ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vision, strategy, tokens", [
    (tower_config(), "default", 16), (tower_config(), "full", 17), (tower_config(**NO_CLASS_TOKEN), "full", 16),
    (CLIPVisionConfig(**SIZES), "default", 16), (CLIPVisionConfig(**SIZES), "full", 17), *SIGLIP,
    (tower_config(image_size=38), "full", 17),  # SigLIP so400m too has pixels beyond its last whole patch
])
def test_the_processor_writes_as_many_tokens_as_the_model_has_features(vision, strategy, tokens):
    model = make_vlm("llava", vision, vision_feature_select_strategy=strategy)
    assert tokens_per_picture(model.config) == tokens
    inputs = ask(make_processor(model), 3, 5)
    if PROCESSOR_EXPANDS:
        assert (inputs["input_ids"] == 1200).sum(1).tolist() == [tokens] * 2
    with torch.no_grad():  # raises if tokens and features differ
        length = model(**inputs).logits.shape[1]
    assert length - (inputs["input_ids"] != 1200).sum(1)[0] == tokens


@pytest.mark.parametrize("class_token", [True, False])
def test_so_does_that_of_llava_next(class_token):
    tower = tower_config() if class_token else tower_config(**NO_CLASS_TOKEN)
    model = make_vlm("llava_next", tower, vision_feature_select_strategy="default" if class_token else "full")
    processor = make_processor(model)
    assert isinstance(processor, transformers.LlavaNextProcessor)
    for number in (3, 5, 7):
        inputs = ask(processor, number)
        assert inputs["pixel_values"].shape[-2:] == (32, 32)
        logits_of(model, inputs)  # raises if tokens and features differ


def test_a_tower_without_class_token_saves_loads_and_answers(tmp_path):
    model = make_vlm("llava", tower_config(**NO_CLASS_TOKEN), vision_feature_select_strategy="full")
    inputs = ask(make_processor(model), 3, 5)
    save_vlm(model, make_processor(model), tmp_path / "vlm")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "vlm").eval()
    assert torch.equal(answer(again, inputs), answer(model, inputs))
    loaded = AutoProcessor.from_pretrained(tmp_path / "vlm")
    check_processor(again.config, loaded)
    assert torch.equal(ask(loaded, 3, 5)["input_ids"], inputs["input_ids"])


# --- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, changes, words", [
    ("llava", {"vision_config": NO_CLASS_TOKEN},
     ["no class token", "16 patches only 15", "vision_feature_select_strategy", "'full'"]),
    ("llava_next", {"vision_config": NO_CLASS_TOKEN}, ["no class token", "16 patches only 15", "'full'"]),
    ("vipllava", {"vision_config": NO_CLASS_TOKEN}, ["no class token", "16 patches only 15", "VipLlava"]),
    ("llava", {"vision_feature_layer": 4}, ["vision_feature_layer 4", "3 blocks", "-4..3"]),
    ("llava", {"vision_feature_layer": -5}, ["vision_feature_layer -5", "-4..3"]),
])
def test_towers_that_a_host_would_misread_are_refused(kind, changes, words):
    changes = dict(changes)
    config = make_config(kind, tower_config(**changes.pop("vision_config", {})), **changes)
    for check in (check_config, lambda c: build_processor(c, image_processor(), make_tokenizer())):
        with pytest.raises(ValueError) as error:
            check(config)
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("kind, layers", [("vipllava", [-2, 4]), ("llava", [-2, 9])])
def test_each_of_several_layers_must_exist(kind, layers):
    if kind == "llava" and VERSION < (5, 0):
        pytest.skip("one layer only in this version")
    name = "vision_feature_layers" if kind == "vipllava" and VERSION < (5, 0) else "vision_feature_layer"
    with pytest.raises(ValueError, match=f"vision_feature_layer {layers[1]} does not exist"):
        check_config(make_config(kind, tower_config(), **{name: layers}))


@NEEDS_FIELDS
@pytest.mark.parametrize("changes, words", [
    ({"num_additional_image_tokens": 0}, ["15 tokens", "16 features"]),
    ({"vision_feature_select_strategy": "full"}, ["17 tokens", "16 features"]),
    ({"patch_size": 16}, ["4 tokens", "16 features", "patch_size 16"]),
    ({"patch_size": None}, ["1 tokens", "16 features", "patch_size None"]),
])
def test_a_processor_of_another_tower_is_refused_and_nothing_is_written(changes, words, tmp_path):
    model = make_vlm("llava")
    processor = make_processor(model)
    save_vlm(model, processor, tmp_path / "vlm")
    before = {file.name: file.read_bytes() for file in (tmp_path / "vlm").iterdir()}
    for name, value in changes.items():
        setattr(processor, name, value)
    with pytest.raises(ValueError) as error:
        save_vlm(model, processor, tmp_path / "vlm")
    assert all(word in str(error.value) for word in [*words, "build_processor"]), str(error.value)
    assert {file.name: file.read_bytes() for file in (tmp_path / "vlm").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]


@NEEDS_FIELDS
def test_the_classic_729_tokens_against_728_features_is_told_beforehand():
    vision = tower_config(image_size=378, patch_size=14, **NO_CLASS_TOKEN)
    config = make_config("llava", vision, vision_feature_select_strategy="full")
    processor = build_processor(config, image_processor(378), make_tokenizer())
    processor.vision_feature_select_strategy = "default"
    with pytest.raises(ValueError, match="728 tokens for a picture of which the model makes 729 features"):
        check_processor(config, processor)
    config.vision_feature_select_strategy = "default"
    with pytest.raises(ValueError, match="of its 729 patches only 728"):
        check_processor(config, processor)


def test_pictures_of_another_size_and_another_image_token_are_refused():
    config = make_config("llava", tower_config())
    with pytest.raises(ValueError, match="pictures of 48x48 pixels, but the tower takes 32x32"):
        build_processor(config, image_processor(48), make_tokenizer())
    config.image_token_index = 7
    with pytest.raises(ValueError, match="id of <image> is 1200, but the model's image_token_index is 7"):
        build_processor(config, image_processor(), make_tokenizer())


def test_another_grid_of_llava_next_is_refused():
    config = make_config("llava_next", tower_config())
    processor = build_processor(config, image_processor(), make_tokenizer())
    processor.image_processor.image_grid_pinpoints = [[64, 64]]
    with pytest.raises(ValueError, match=r"image_grid_pinpoints \[\[64, 64\]\].*\[\[32, 64\], \[64, 32\]\]"):
        check_processor(config, processor)


def test_other_models_are_refused():
    config = make_config("llava", tower_config())
    with pytest.raises(ValueError, match="'clip_moe_vision_model' is no VLM of the LLaVA family"):
        check_config(config.vision_config)
    config.vision_config = transformers.ViTConfig(num_hidden_layers=3)
    with pytest.raises(ValueError, match="model_type 'vit'; supported are clip_moe_vision_model"):
        check_config(config)


# --- another tower for a VLM ---------------------------------------------------------------------------------------


def save_tower(folder, **values):
    torch.manual_seed(1)
    tower = CLIPMoEVisionModel(tower_config(**values))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    tower.save_pretrained(folder)
    return tower.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_moe_takes_the_place_of_a_clip(kind, tmp_path):
    model = make_vlm(kind, CLIPVisionConfig(**SIZES))
    before = logits_of(model, ask(make_processor(model)))
    tower = save_tower(tmp_path / "tower")
    set_tower(model, tmp_path / "tower")
    processor = make_processor(model)
    inputs = ask(processor)
    assert not torch.allclose(logits_of(model, inputs), before)
    state = body(model).vision_tower.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tower.state_dict().items())
    save_vlm(model, processor, tmp_path / "vlm")
    again = type(model).from_pretrained(tmp_path / "vlm").eval()
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=0, atol=0)


def test_patches_stay_patches_with_or_without_class_token(tmp_path):
    model = make_vlm("llava", CLIPVisionConfig(**SIZES))
    save_tower(tmp_path / "without", **NO_CLASS_TOKEN)
    save_tower(tmp_path / "with")
    for name, strategy in (("without", "full"), ("with", "default")):
        set_tower(model, tmp_path / name)
        assert model.config.vision_feature_select_strategy == strategy
        assert tokens_per_picture(model.config) == 16
        logits_of(model, ask(make_processor(model)))
    model.config.vision_feature_select_strategy = "full"  # the class token too
    with pytest.raises(ValueError, match="no class token to keep"):
        set_tower(model, tmp_path / "without")


@pytest.mark.parametrize("kind, values, words", [
    ("llava", {"hidden_size": 48}, ["features of 32 channels", "tower has 48"]),
    ("llava", {"num_hidden_layers": 1}, ["vision_feature_layer -3", "-2..1"]),
    ("vipllava", {"hidden_size": 48}, ["features of 96 channels", "tower has 48", "3 hidden states, 144 together"]),
    ("vipllava", NO_CLASS_TOKEN, ["no class token", "VipLlava"]),
])
def test_a_tower_that_does_not_fit_is_refused_and_the_model_stays(kind, values, words, tmp_path):
    model = make_vlm(kind, **({"vision_feature_layer": -3} if kind == "llava" else {}))
    inputs = ask(make_processor(model))
    before, config = logits_of(model, inputs), copy.deepcopy(model.config.to_dict())
    save_tower(tmp_path / "tower", **values)
    with pytest.raises(ValueError) as error:
        set_tower(model, tmp_path / "tower")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert model.config.to_dict() == config
    assert torch.equal(logits_of(model, inputs), before)


def test_a_projector_must_fit_both_sides():
    config = make_config("llava", tower_config())
    check_projector((32, 32), config)
    with pytest.raises(ValueError, match="gives features of 64 channels, but the language model takes 32"):
        check_projector((64, 32), config)


def test_a_tower_put_in_by_hand_is_not_saved_under_the_old_ones_configuration(tmp_path):
    model = make_vlm("llava", CLIPVisionConfig(**SIZES))
    processor = make_processor(model)
    body(model).vision_tower = save_tower(tmp_path / "tower")
    with pytest.raises(ValueError, match="not the one that config.vision_config describes.*set_tower"):
        save_vlm(model, processor, tmp_path / "vlm")
    assert not (tmp_path / "vlm").exists()
