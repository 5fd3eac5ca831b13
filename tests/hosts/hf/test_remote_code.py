"""Saved folders in a Python that has transformers but not our package: `trust_remote_code=True`."""

import os
import subprocess
import sys
import textwrap

import torch
from llava_family import SIZES, tower_config

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel, CLIPMoEVisionModel

PROGRAM = textwrap.dedent("""
    import sys, torch
    sys.modules["clipmoe_vlm"] = None  # as if it were not installed
    from transformers import AutoModel
    for name in ("tower", "whole"):
        model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        pixels, expected = torch.load(name + ".pt")
        with torch.no_grad():
            torch.testing.assert_close(model.vision_model(pixels).pooler_output, expected)
        try:
            AutoModel.from_pretrained(name)
        except ValueError as error:
            assert "trust_remote_code" in str(error)
        else:
            raise SystemExit(name + " was loaded without leave")
""")


def test_saved_folders_load_without_the_package(tmp_path):
    vision = tower_config()
    text = {name: value for name, value in SIZES.items() if name not in ("image_size", "patch_size")}
    whole = CLIPMoEModel(CLIPMoEConfig(
        vision_config=vision, text_config={**text, "vocab_size": 50, "max_position_embeddings": 12}, projection_dim=16))
    pixels = torch.randn(2, 3, 32, 32)
    for name, model in (("tower", CLIPMoEVisionModel(vision)), ("whole", whole)):
        model.eval().save_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.save((pixels, model.vision_model(pixels).pooler_output), tmp_path / f"{name}.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, timeout=150,
                             capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert process.returncode == 0, process.stderr[-2000:]
