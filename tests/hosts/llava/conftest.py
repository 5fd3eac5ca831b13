"""Towers and projectors that LLaVA's runs start from."""

import os
from pathlib import Path

# The tests fork this process, and a fork of one that has used OpenMP's threads hangs.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from host import TRAIN
from safetensors.torch import load_file

from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel
from clipmoe_vlm.convert import load_vision
from clipmoe_vlm.processors import image_processor_of


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> Path:
    """A folder of `dense`, the recorded runs' CLIP under our names, `moe`, three experts of it, and the projectors."""
    folder = tmp_path_factory.mktemp("towers")
    dense = load_vision(TRAIN / "tower")
    config = CLIPMoEVisionConfig(**{**dense.config.to_dict(), "num_experts": 3, "num_experts_per_tok": 2})
    torch.manual_seed(0)
    moe = CLIPMoEVisionModel(config)
    state, dense_state = moe.state_dict(), dense.state_dict()
    for name in state:
        if ".mlp.experts." in name:
            base = dense_state[name.replace(".experts.fc1_", ".fc1.").replace(".experts.fc2_", ".fc2.")]
            state[name] = torch.stack([base, *(base + 0.02 * torch.randn(base.shape) for _ in range(2))])
        elif name in dense_state:
            state[name] = dense_state[name]
    moe.load_state_dict(state)
    for name, model in (("dense", dense), ("moe", moe)):
        model.save_pretrained(folder / name)
        image_processor_of(TRAIN / "tower", config.image_size).save_pretrained(folder / name)
    start = load_file(TRAIN / "projector.safetensors")
    stage1 = {name[len("final.projector."):]: tensor for name, tensor in load_file(TRAIN / "stage1.safetensors").items()
              if name.startswith("final.projector.")}
    for name, state in (("start", start), ("stage1", stage1)):
        torch.save({f"model.mm_projector.{key}": tensor for key, tensor in state.items()},
                   folder / f"projector_{name}.bin")
    return folder
