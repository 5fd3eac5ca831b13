"""A tiny dense CLIP and tiny pictures with captions, for the tests of train_encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel
from clipmoe_vlm.convert import save_folder

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "white": (240, 240, 240)}
PLACES = {"left": 0, "right": 8}
ROOT = Path(__file__).parent.parent


def save_tiny_clip(folder: Path) -> None:
    """A random dense CLIP: 2 layers, width 32, pictures of 16 px, 16 text positions, a tokenizer of words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "square", "on", "the", "of", "number", *COLORS, *PLACES,
             *map(str, range(10))]
    torch.manual_seed(1)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPMoEModel(CLIPMoEConfig(
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        text_config={**tower, "vocab_size": len(words), "max_position_embeddings": 16, "pad_token_id": 0,
                     "bos_token_id": 1, "eos_token_id": 3}, projection_dim=16))
    with torch.no_grad():  # random features of a fresh model barely differ: make them tell pictures apart
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.config.text_config.eos_token_id = words.index("</s>")
    words_of = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    words_of.pre_tokenizer = pre_tokenizers.Whitespace()
    words_of.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", words.index("</s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_of, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", padding_side="right")
    size = {"height": 16, "width": 16}
    save_folder(model, folder, CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), tokenizer)


def save_scenes(folder: Path, count: int, name: str, seed: int) -> Path:
    """`count` pictures of a coloured square on a grey ground, and `<name>.csv` with a caption each."""
    random = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    rows, hard = ["image,caption"], []
    for number in range(count):
        color, place = random.choice(list(COLORS)), random.choice(list(PLACES))
        pixels = random.integers(90, 150, (16, 16, 3)).astype(np.uint8)
        pixels[4:12, PLACES[place]:PLACES[place] + 8] = COLORS[color]
        Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
        digits = " ".join(str(number))
        caption = f"a {color} square on the {place} number {digits}"
        rows.append(f"{name}/{number:03}.png,{caption}")
        other = random.choice([c for c in COLORS if c != color])
        hard += [{"id": 2 * number, "image": f"{name}/{number:03}.png", "true": caption, "kind": "color",
                  "false": caption.replace(color, other)},
                 {"id": 2 * number + 1, "image": f"{name}/{number:03}.png", "true": caption, "kind": "place",
                  "false": caption.replace(place, "left" if place == "right" else "right")}]
    (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
    (folder / f"{name}_hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hard))
    return folder / f"{name}.csv"


def tiny_config(world: Path, output: Path, **changes) -> Path:
    """Writes a configuration for the data of `make_world`; nested keys as dictionaries."""
    training = {"batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "max_steps": 4}
    values = {"model": str(world / "clip"), "output_dir": str(output), "train_data": str(world / "train.csv"),
              "validation_data": str(world / "test.csv"), "hard_captions": str(world / "test_hard.jsonl"),
              "num_experts": 3, "num_clusters": 2, "text_length": None, "workers": 0, "checkpoint_every": 2,
              "mcl": {**training, **changes.pop("mcl", {})}, "router": {**training, **changes.pop("router", {})},
              **changes}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values))
    return file


def make_world(folder: Path) -> Path:
    """A tiny CLIP, 64 training scenes and 12 test scenes."""
    save_tiny_clip(folder / "clip")
    save_scenes(folder, 64, "train", 1)
    save_scenes(folder, 12, "test", 2)
    return folder


def command(config: Path, *arguments: str, processes: int = 1) -> list[str]:
    program = ["-m", "train_encoder.run", str(config), *arguments]
    if processes == 1:
        return [sys.executable, *program]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *program]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def run(config: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    """The command line as a user types it."""
    return subprocess.run(command(config, *arguments, processes=processes), cwd=ROOT, env=environment(), text=True,
                          capture_output=True, timeout=500)
