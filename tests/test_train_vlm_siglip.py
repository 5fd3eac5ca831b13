"""A VLM on a tower without a class token."""


import pytest
import torch
from test_train_vlm import LLAVA_TRAIN, settings
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
)
from vlm_world import save_siglip

from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError
from clipmoe_vlm.vlm import tokens_per_picture
from train_vlm.loss import VLMLoss, labelled
from train_vlm.model import build
from train_vlm.tuning import set_trainable


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> str:
    return save_siglip(tmp_path_factory.mktemp("siglip"), 28, 14)


def test_every_patch_becomes_a_token_in_training_and_in_transformers(siglip, tmp_path):
    config = settings(tmp_path, vision_tower=str(siglip), tower="full")
    model, processor = build(config)
    set_trainable(model, config)
    assert tokens_per_picture(model.config) == 4
    picture = open_rgb(LLAVA_TRAIN / "images/scene03.png")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    is_picture = inputs.input_ids == model.config.image_token_id
    assert int(is_picture.sum()) == 4
    assert inputs.pixel_values.shape == (1, 3, 28, 28)
    labels = inputs.input_ids.masked_fill(is_picture, -100)
    loss, *_ = VLMLoss(model)(inputs.input_ids, *labelled(labels), inputs.pixel_values, 1)
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any("post_layernorm" in name or ".head." in name for name in trained)

    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    loaded = AutoProcessor.from_pretrained(tmp_path / "model", backend="pil")
    same = loaded(images=picture, text=text, return_tensors="pt")
    assert all(torch.equal(same[name], value) for name, value in inputs.items())
    with torch.no_grad():
        torch.testing.assert_close(again(**same).logits, model.eval()(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_there_is_no_class_token_to_keep(siglip, tmp_path):
    with pytest.raises(UserError, match="select_feature: cls_patch: the vision tower has no class token"):
        build(settings(tmp_path, vision_tower=str(siglip), select_feature="cls_patch"))
