"""Every supported class of model against the library that it comes from, and every other class refused."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from convert_cases import (
    CASES,
    PIXELS,
    README,
    REFUSED,
    VOCABULARY,
    outputs_of_blocks,
    register_small_timm_models,
    with_table,
)

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.convert import convert, load_dense, save_official
from clipmoe_vlm.open_clip_layout import config_of_open_clip
from clipmoe_vlm.openai_layout import names_to_ours
from clipmoe_vlm.upcycling import dense_expert, ffn_parameters, upcycle


@pytest.fixture(scope="module", params=CASES, ids=str)
def source(request, tmp_path_factory):
    torch.manual_seed(0)
    return request.param.build(tmp_path_factory.mktemp("case") / "source")


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of several lengths, ended by the largest id and padded with 0, and pictures."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY - 2, (5, 20))
    for row, end in enumerate((3, 19, 7, 12, 1)):
        ids[row, end] = VOCABULARY - 1
        ids[row, end + 1:] = 0
    return ids, torch.randn(4, 3, PIXELS, PIXELS)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def check_equal(ours: CLIPMoEModel, source) -> None:
    ids, pixels = inputs()
    for tower, features, run, blocks, argument in (
        (ours.vision_model, ours.get_image_features, source.image, source.vision_blocks, pixels),
        (ours.text_model, ours.get_text_features, source.text, source.text_blocks, ids),
    ):
        expected, hidden_states = outputs_of_blocks(blocks, run, argument)
        close(features(argument), expected)
        mine = tower(argument, output_hidden_states=True).hidden_states[1:]
        assert len(mine) == len(hidden_states) >= 2
        for one, other in zip(mine, hidden_states, strict=True):
            close(one, other)
    image, text = F.normalize(source.image(pixels), dim=-1), F.normalize(source.text(ids), dim=-1)
    logits = source.model.logit_scale.exp() * image @ text.T
    if getattr(source.model, "logit_bias", None) is not None:
        logits = logits + source.model.logit_bias
    close(ours(input_ids=ids, pixel_values=pixels).logits_per_image, logits)


def test_features_and_every_block_equal_the_source(source, tmp_path):
    check_equal(load_dense(source.path, source.architecture), source)
    convert(str(source.path), str(tmp_path / "ours"), architecture=source.architecture)
    check_equal(CLIPMoEModel.from_pretrained(tmp_path / "ours").eval(), source)


@torch.no_grad()
def test_every_class_becomes_a_mixture_of_experts(source):
    base = load_dense(source.path, source.architecture)
    ids, pixels = inputs()
    other = load_dense(source.path, source.architecture)
    for name, parameter in ffn_parameters(other):
        assert ".encoder.layers." in name  # no pooling head's
        parameter.mul_(1.5)
    same = upcycle([base, base, base], expert_dropout=0.0).eval()
    close(same.get_image_features(pixels), base.get_image_features(pixels))
    close(same.get_text_features(ids), base.get_text_features(ids))
    mixed = upcycle([base, other], num_experts_per_tok=1).eval()
    assert not torch.allclose(mixed.get_image_features(pixels), base.get_image_features(pixels), atol=1e-3)
    for index, dense in enumerate((base, other)):
        expert = dense_expert(mixed, index)
        assert torch.equal(expert.get_image_features(pixels), dense.get_image_features(pixels))
        assert torch.equal(expert.get_text_features(ids), dense.get_text_features(ids))


@pytest.mark.parametrize(("name", "values", "found"), REFUSED, ids=[f"{row[0]}: {row[2]}" for row in REFUSED])
def test_what_is_not_plain_is_refused_with_what_was_found_and_what_is_supported(name, values, found):
    register_small_timm_models()
    with pytest.raises(ValueError, match=f"{found}.*supported are") as error:
        config_of_open_clip(values, "model.json")
    assert "\n" not in str(error.value)


def test_architectures_of_open_clip_fit_tensor_for_tensor_or_are_refused():
    """The names that open_clip knows, one of those that differ in depth or picture size, without memory for weights."""
    import open_clip

    fitting, refused, seen = [], [], set()
    for name in open_clip.list_models():
        values = open_clip.get_model_config(name)
        for part in ("vision_cfg", "text_cfg"):
            if isinstance(values[part].get("layers"), int):
                values[part]["layers"] = 2
        kind = re.sub(r"_?[2-5]\d\d\b", "", json.dumps(values))
        if kind in seen:
            continue
        seen.add(kind)
        try:
            config = config_of_open_clip(values, name)
        except ValueError as error:
            assert "supported are" in str(error) and "\n" not in str(error)
            refused.append(name)
            continue
        fitting.append(name)
        custom_text = values.pop("custom_text", False)
        with torch.device("meta"):
            ours = CLIPMoEModel(config).state_dict()
            theirs = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**values).state_dict()
        converted = names_to_ours(theirs, config, name)
        assert {key: tensor.shape for key, tensor in converted.items()} == {
            key: tensor.shape for key, tensor in ours.items()}, name
    for plain in ("ViT-B-32-quickgelu", "ViT-bigG-14", "ViT-H-14-CLIPA", "ViT-B-16-SigLIP", "MobileCLIP2-L-14"):
        assert plain in fitting
    families = ("RN", "convnext", "EVA", "PE-", "coca", "roberta", "xlm", "mt5", "nllb", "swin", "ViTamin",
                "MobileCLIP", "vit_", "ViT-M-16-alt")
    assert [name for name in refused if not name.startswith(families)] == []


def test_only_what_the_official_code_is_can_become_official(source, tmp_path):
    model = load_dense(source.path, source.architecture)
    with pytest.raises(ValueError, match="the official code"):
        save_official(model, tmp_path / "official.pt")


def test_the_readme_says_what_is_tested():
    readme = README.read_text(encoding="utf-8")
    assert readme == with_table(readme), "the README's table is not of today: python -m tests.convert_cases"

