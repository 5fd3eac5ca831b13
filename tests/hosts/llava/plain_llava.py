"""The original LLaVA without this package, in a process of its own, kept in float32.

    plain_llava.py make FOLDER                      trains llava-stage1, -stage2, -lora; makes llava-mistral, -tiles
    plain_llava.py logits FILE FOLDER[,BASE] ...    loads each and writes what it computes

What is changed: LLaVA casts towers and loaded models to float16, which a CPU can't convolve, and asks DeepSpeed for
parameters even where there is none.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

REFERENCE = Path(__file__).parents[2] / "reference" / "llava_train"
PICTURES = ("scene03", "scene05")  # both oblong, one of them grey
QUESTION = "<image>\nWhat is this?"


def trained(folder: Path) -> None:
    """Four updates each of the recorded stage 1, stage 2 and LoRA."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.train import train as llava_train

    to = CLIPVisionTower.to
    CLIPVisionTower.to = lambda self, *args, dtype=None, **kwargs: to(self, *args, **kwargs)
    llava_train.maybe_zero_3 = lambda parameter, **_: parameter.detach().cpu().clone()
    projector = folder / "projector.bin"
    torch.save({f"model.mm_projector.{name}": tensor
                for name, tensor in load_file(REFERENCE / "projector.safetensors").items()}, projector)
    recorded = json.loads((REFERENCE / "runs.json").read_text())
    for name in ("stage1", "stage2", "lora"):
        arguments = {**recorded[name]["arguments"], "report_to": "none", "tf32": "False", "max_steps": "4",
                     "output_dir": str(folder / f"llava-{name}"), "pretrain_mm_mlp_adapter": str(projector)}
        sys.argv = ["train.py", *(word for pair in arguments.items() for word in (f"--{pair[0]}", pair[1]))]
        llava_train.train()
        projector = folder / "llava-stage1" / "mm_projector.bin"


def untrained(folder: Path) -> None:
    """A Mistral, and a LLaVA that cuts pictures into tiles, with random weights."""
    from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralConfig
    from transformers import AutoTokenizer

    sizes = {name: value for name, value in json.loads((REFERENCE / "llama/config.json").read_text()).items()
             if name not in ("architectures", "model_type")}
    tiles = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
             "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]}
    for name, model_class, config in (
        ("mistral", LlavaMistralForCausalLM, LlavaMistralConfig(**sizes)),
        ("tiles", LlavaLlamaForCausalLM, LlavaConfig(**sizes)),
    ):
        torch.manual_seed(0)
        config.update({"mm_vision_tower": "tower", "mm_hidden_size": 64, "mm_projector_type": "mlp2x_gelu",
                       "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
                       "mm_use_im_patch_token": False, **(tiles if name == "tiles" else {})})
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.05)
        model.save_pretrained(folder / f"llava-{name}")
        AutoTokenizer.from_pretrained(REFERENCE / "llama", use_fast=False).save_pretrained(folder / f"llava-{name}")


def logits(file: Path, checkpoints: list[str]) -> None:
    """Per folder and picture: `ids` (-200: the picture), `pixels`, `logits`, and the question's `answer`."""
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model import builder

    builder.torch = types.SimpleNamespace(**{**vars(torch), "float16": torch.float32})
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], QUESTION)
    conversation.append_message(conversation.roles[1], None)
    found = {}
    for checkpoint in checkpoints:
        path, _, base = checkpoint.partition(",")
        os.chdir(path if (Path(path) / "vision_tower").is_dir() else REFERENCE)  # mm_vision_tower is relative
        tokenizer, model, image_processor, _ = builder.load_pretrained_model(path, base or None, Path(path).name,
                                                                             device_map="cpu", device="cpu")
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, -200, return_tensors="pt")[None]
        for name in PICTURES:
            picture = Image.open(REFERENCE / "images" / f"{name}.png").convert("RGB")
            pixels = process_images([picture], image_processor, model.config)
            pixels = torch.stack(list(pixels)) if isinstance(pixels, list) else pixels
            with torch.inference_mode():
                output = model(input_ids=ids, images=pixels, image_sizes=[picture.size]).logits
                answer = model.generate(ids, images=pixels, image_sizes=[picture.size], do_sample=False,
                                        max_new_tokens=8)
            values = {"ids": ids, "pixels": pixels, "logits": output, "answer": answer}
            found |= {f"{Path(path).name}.{name}.{key}": value.clone() for key, value in values.items()}
    save_file(found, file)


if __name__ == "__main__":
    what, target, *checkpoints = sys.argv[1:]
    os.chdir(REFERENCE)
    if what == "make":
        trained(Path(target))
        untrained(Path(target))
    else:
        logits(Path(target), checkpoints)
