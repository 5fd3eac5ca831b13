"""Checkpoints that the real LLaVA writes, converted: the same logits and answers; and back: LLaVA loads them.

In this environment's transformers, and, where it is installed, in the newest (`.venv` of this repository, or
TODAYS_PYTHON).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_llava import REFERENCE
from safetensors.torch import load_file
from transformers import CLIPImageProcessor
from vlm_logits import PICTURES, computed

from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel
from clipmoe_vlm.llava_layout import convert_vlm

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
TODAY = Path(os.environ.get("TODAYS_PYTHON", ROOT / ".venv/bin/python"))
WHOLE, ON_BASE = ("llava-stage2", "llava-mistral"), ("llava-stage1", "llava-lora")
BASE = {name: REFERENCE / "llama" for name in ON_BASE}


def python(*command: object, interpreter: Path | str = sys.executable) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(interpreter), *map(str, command)], env=environment, cwd=REFERENCE, capture_output=True,
                          text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The folder of LLaVA's checkpoints, and `logits.safetensors` with what LLaVA computes with each."""
    folder = tmp_path_factory.mktemp("real")
    python(HERE / "plain_llava.py", "make", folder)
    named = [f"{folder / name},{BASE[name]}" for name in ON_BASE]
    python(HERE / "plain_llava.py", "logits", folder / "logits.safetensors", *named,
           *(folder / name for name in (*WHOLE, "llava-tiles")))
    return folder


@pytest.fixture(scope="module")
def converted(real, tmp_path_factory) -> Path:
    """Each but the tiles, which this transformers does not have, in transformers' layout."""
    folder = tmp_path_factory.mktemp("converted")
    for name in (*WHOLE, *ON_BASE):
        convert_vlm(real / name, folder / name, BASE.get(name), REFERENCE / "tower", "v1", say=lambda line: None)
    return folder


def assert_same(found: dict[str, torch.Tensor], real: dict[str, torch.Tensor], name: str, tolerance: float) -> None:
    for picture in PICTURES:
        ours, theirs = ({key: tensors[f"{name}.{picture}.{key}"] for key in ("ids", "pixels", "logits", "answer")}
                        for tensors in (found, real))
        assert torch.equal(ours["ids"], theirs["ids"])
        pixels = ours["pixels"].reshape(theirs["pixels"].shape)
        torch.testing.assert_close(pixels, theirs["pixels"], atol=1e-6, rtol=0)
        torch.testing.assert_close(ours["logits"], theirs["logits"], atol=tolerance, rtol=tolerance)
        # Here transformers 4.36 gives LLaVA's answers behind an <s>; both end at </s>.
        answers = [row[0].tolist()[row[0, 0].item() == 1:] for row in (ours["answer"], theirs["answer"])]
        length = min(map(len, answers))
        assert answers[0][:length] == answers[1][:length] and (length >= 7 or answers[0][length - 1] == 2)


@pytest.mark.parametrize("name", [*WHOLE, *ON_BASE])
def test_this_transformers_computes_what_llava_does(real, converted, name):
    logits = load_file(real / "logits.safetensors")
    assert_same(computed(converted / name, logits), logits, name, 1e-4)
    values = json.loads((converted / name / "config.json").read_text())
    assert values["text_config"]["model_type"] == ("mistral" if name == "llava-mistral" else "llama")


def test_llava_loads_what_comes_back(real, converted, tmp_path):
    """To the bit: whole, and with LoRA merged as LLaVA's own loader merges it."""
    names = (*WHOLE, *ON_BASE)
    for name in names:
        convert_vlm(converted / name, tmp_path / name, to="llava", say=lambda line: None)
    python(HERE / "plain_llava.py", "logits", tmp_path / "logits.safetensors", *(tmp_path / name for name in names))
    again, first = load_file(tmp_path / "logits.safetensors"), load_file(real / "logits.safetensors")
    for key in again:
        assert torch.equal(again[key], first[key]), key


def test_mixture_of_experts_goes_back_to_llava(real, tmp_path):
    torch.manual_seed(0)
    tower = CLIPMoEVisionModel(CLIPMoEVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
        num_experts=3, num_experts_per_tok=2, first_moe_layer=1)).eval()
    tower.save_pretrained(tmp_path / "tower")
    CLIPImageProcessor.from_pretrained(REFERENCE / "tower").save_pretrained(tmp_path / "tower")
    source = shutil.copytree(real / "llava-stage2", tmp_path / "source")
    state = load_file(source / "model.safetensors")
    torch.save({name: tensor for name, tensor in state.items() if "vision_tower" not in name},
               source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert_vlm(source, tmp_path / "llava-stage2", tower=tmp_path / "tower", say=lambda line: None)
    found = computed(tmp_path / "llava-stage2", load_file(real / "logits.safetensors"))
    convert_vlm(tmp_path / "llava-stage2", tmp_path / "back" / "llava-stage2", to="llava", say=lambda line: None)
    python("-m", "clipmoe_vlm.llava", HERE / "plain_llava.py", "logits", tmp_path / "back.safetensors",
           tmp_path / "back/llava-stage2")
    assert_same(found, load_file(tmp_path / "back.safetensors"), "llava-stage2", 1e-4)


@pytest.mark.skipif(not TODAY.is_file(), reason="no environment with the newest transformers: make setup")
def test_newest_transformers_and_back(real, tmp_path):
    """Also pictures in tiles (LLaVA-NeXT's), which this transformers does not have."""
    names = [*WHOLE, *ON_BASE, "llava-tiles"]
    there = [{"source": str(real / name), "target": str(tmp_path / "hf" / name), "tower": str(REFERENCE / "tower"),
              "base": str(BASE[name]) if name in BASE else None, "template": "v1"} for name in names]
    back = [{"source": one["target"], "target": str(tmp_path / "back" / Path(one["target"]).name), "to": "llava"}
            for one in there]
    (tmp_path / "jobs.json").write_text(json.dumps([*there, *back]))
    python(HERE / "vlm_logits.py", tmp_path / "jobs.json", real / "logits.safetensors", tmp_path / "hf.safetensors",
           interpreter=TODAY)
    python(HERE / "plain_llava.py", "logits", tmp_path / "back.safetensors",
           *(tmp_path / "back" / name for name in names))
    found, again, first = (load_file(file) for file in (tmp_path / "hf.safetensors", tmp_path / "back.safetensors",
                                                        real / "logits.safetensors"))
    for name in names:
        assert_same(found, first, name, 1e-4)
    for key in again:
        assert torch.equal(again[key], first[key]), key
