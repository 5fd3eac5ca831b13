"""The options beyond the paper on two processes (gloo) do what they do on one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipmoe_vlm.runs import load_config, read_jsonl
from train_encoder.config import EncoderConfig
from train_encoder.run import main

sys.path.insert(0, str(Path(__file__).parent.parent))
from encoder_data import make_world, run, tiny_config  # noqa: E402


def test_two_processes_end_like_one(tmp_path):
    world = make_world(tmp_path)
    options = {"mcl": {"distillation": 10.0}, "validation_data": None, "hard_captions": None,
               "router": {"init": "centroids", "balancing": "bias", "bias_rate": 0.25, "base_gate": 0.6,
                          "distillation": 10.0, "expert_dropout": 0.0}}  # each rank draws its own dropout
    outputs = [tmp_path / "one", tmp_path / "two"]
    torch.set_num_threads(1)
    main(load_config(EncoderConfig, [str(tiny_config(world, outputs[0], **dict(options)))], "train_encoder"))
    result = run(tiny_config(world, outputs[1], **dict(options)), processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (read_jsonl(output / "metrics.jsonl") for output in outputs)
    for ours, theirs in zip(two, one, strict=True):
        for key in ("loss", "contrastive", "distillation"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4)
    one, two = (load_file(output / "model" / "model.safetensors") for output in outputs)
    for name, tensor in one.items():
        atol = 1e-6 if name.endswith("balance_bias") else 2e-3
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=atol, msg=name)
    assert all(tensor.abs().max() > 0.1 for name, tensor in one.items() if name.endswith("balance_bias"))
