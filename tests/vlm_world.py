"""A small tower, a small language model and configurations of train_vlm, for runs in processes of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel
from clipmoe_vlm.runs import read_jsonl

LLAVA_TRAIN = Path(__file__).parent / "reference" / "llava_train"


def save_moe_tower(folder: Path, patch_size: int = 14, idle_expert: bool = False) -> str:
    """Three blocks of four experts, pictures of 28 px, with an image processor; returns the folder.

    Args:
        idle_expert: in block 0 expert 3 gets no token.
    """
    torch.manual_seed(0)
    config = CLIPMoEVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                                 image_size=28, patch_size=patch_size, num_experts=4, num_experts_per_tok=2)
    model = CLIPMoEVisionModel(config)
    if idle_expert:
        block = model.vision_model.encoder.layers[0]
        with torch.no_grad():
            block.layer_norm2.bias.fill_(5)
            block.mlp.router.weight[3] = -1
    model.save_pretrained(folder)
    values = json.loads((LLAVA_TRAIN / "tower/preprocessor_config.json").read_text())
    values |= {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return str(folder)


def save_siglip(folder: Path, image_size: int, patch_size: int) -> str:
    """A tower without class token, with an image processor; returns the folder."""
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=image_size,
        patch_size=patch_size)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return str(folder)


def save_tied_llm(folder: Path) -> None:
    """A Llama of two layers whose head is its embedding."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=1200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, max_position_embeddings=512)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLAVA_TRAIN / "llama").save_pretrained(folder)


def make_vlm_world(folder: Path) -> Path:
    save_moe_tower(folder / "tower", idle_expert=True)
    save_tied_llm(folder / "llm")
    shutil.copytree(LLAVA_TRAIN / "images", folder / "images")
    return folder


def vlm_config(world: Path, output: Path, **changes) -> Path:
    """Writes a configuration: experts, projector and language model train; in random order, so that pictures and text
    alone meet on different processes."""
    values = {"llm": str(world / "llm"), "vision_tower": str(world / "tower"),
              "data": str(LLAVA_TRAIN / "stage2.json"), "image_folder": str(world / "images"),
              "tower": "experts", "tower_learning_rate": 1e-3, "llm_tuning": "full", "learning_rate": 1e-3,
              "max_length": 400, "global_batch_size": 4, "micro_batch_size": 1, "group_by_modality_length": False,
              "max_steps": 6, "checkpoint_every": 2, "precision": "fp32", "zero_stage": 0, "workers": 0,
              "output_dir": str(output), **changes}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values))
    return file


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(output / "metrics.jsonl") if "loss" in row]


def assert_same_end(one: Path, other: Path) -> None:
    """Two output folders hold the same model and losses, to the last bit, and nothing half-done."""
    assert losses(one) == losses(other)
    states = [load_file(output / "model" / "model.safetensors") for output in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    assert not [file for file in one.rglob("*") if file.name.startswith(".")]
    assert not (one / "checkpoints").exists()
