"""train_encoder on bases of other libraries, named as they are."""

import json

import pytest
import torch
from convert_cases import architecture, open_clip_model
from encoder_data import make_world, tiny_config
from safetensors.torch import load_file
from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.runs import UserError, load_config
from train_encoder.config import EncoderConfig
from train_encoder.run import main


@pytest.fixture(scope="module")
def siglip_world(tmp_path_factory):
    """The pictures of the other encoder tests, and a small SigLIP in place of their CLIP."""
    world = make_world(tmp_path_factory.mktemp("world"))
    tokenizer = AutoTokenizer.from_pretrained(world / "clip")
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    SiglipModel(SiglipConfig(
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "bos_token_id": 1,
                     "eos_token_id": 2})).save_pretrained(world / "siglip")
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(world / "siglip")
    tokenizer.save_pretrained(world / "siglip")
    return world


def run_here(world, output, **changes):
    torch.set_num_threads(1)
    main(load_config(EncoderConfig, [str(tiny_config(world, output, **changes))], "train_encoder"))


def test_dmu_on_a_siglip_folder(siglip_world, tmp_path):
    run_here(siglip_world, tmp_path / "out", model=str(siglip_world / "siglip"), num_experts=2)
    base, expert = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("base", "stage_1/model"))
    changed = {name for name in base if not torch.equal(base[name], expert[name])}
    assert len(changed) == 2 * 2 * 4 and all(".encoder.layers." in name and ".mlp." in name for name in changed)
    model = CLIPMoEModel.from_pretrained(tmp_path / "out" / "model")
    assert model.config.vision_config.pooling == "map" and model.config.vision_config.num_experts == 2
    assert torch.equal(model.logit_bias, base["logit_bias"])
    assert json.loads((tmp_path / "out" / "evaluation" / "final.json").read_text())


def test_dmu_on_an_open_clip_weights_file(siglip_world, tmp_path):
    values = architecture({"image_size": 16, "layers": 2, "pool_type": "avg"}, {"vocab_size": 49408}, quick_gelu=True)
    (tmp_path / "model.json").write_text(json.dumps(values))
    torch.save(open_clip_model(values).state_dict(), tmp_path / "weights.pt")
    run_here(siglip_world, tmp_path / "out", model=str(tmp_path / "weights.pt"), num_experts=2, hard_captions=None,
             architecture=str(tmp_path / "model.json"), validation_data=None)
    assert CLIPMoEModel.from_pretrained(tmp_path / "out" / "model").config.vision_config.pooling == "avg"


def test_a_siglip_keeps_its_text_positions(siglip_world, tmp_path):
    with pytest.raises(UserError, match="reads its last position.*keep its 16 positions .text_length: null"):
        run_here(siglip_world, tmp_path / "out", model=str(siglip_world / "siglip"), text_length=248)
