"""VLM folders whose parts do not fit each other end training and evaluation in one sentence."""

import json
from functools import partial

import pytest
import torch
from eval_data import make_vlm
from test_train_vlm import settings

from clipmoe_vlm import CLIPMoEVisionConfig
from clipmoe_vlm.runs import UserError
from eval_vlm.models import load_vlm
from train_vlm.model import build


def test_training_refuses_a_projector_of_another_width(tmp_path):
    folder = make_vlm(tmp_path / "vlm")
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values["vision_config"]["hidden_size"] = 48
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"multi_modal_projector.linear_1.weight.*\[48, 32\].*\[48, 48\]"):
        build(settings(tmp_path, vlm=str(folder), llm=None, vision_tower=None))


def test_evaluation_refuses_a_processor_that_writes_too_few_tokens(tmp_path):
    folder = make_vlm(tmp_path / "vlm")
    file = folder / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_additional_image_tokens": 0}))
    with pytest.raises(UserError, match="15 tokens for a picture of which the model makes 16 features"):
        load_vlm(folder, torch.device("cpu"))


def test_evaluation_refuses_a_host_that_drops_a_patch(tmp_path, monkeypatch):
    monkeypatch.setattr("eval_data.CLIPMoEVisionConfig", partial(CLIPMoEVisionConfig, class_token=False, pooling="avg"))
    folder = make_vlm(tmp_path / "vlm")
    with pytest.raises(UserError, match="no class token, so that of its 16 patches only 15 .* set it to 'full'"):
        load_vlm(folder, torch.device("cpu"))
