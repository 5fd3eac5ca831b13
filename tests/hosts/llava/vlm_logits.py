"""What transformers' VLMs compute, in the form of plain_llava.py: vlm_logits.py JOBS REAL FILE

JOBS is a list of `convert_vlm`'s arguments, which are done first. REAL is plain_llava.py's file: its pixels are taken
where this transformers cannot pad pictures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from plain_llava import PICTURES, QUESTION, REFERENCE
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor

from clipmoe_vlm.llava_layout import convert_vlm

MODELS = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
NEWEST = int(transformers.__version__.split(".")[0]) >= 5


def computed(folder: Path, real: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`ids` (-200: the picture), `pixels`, `logits` (with a position per picture token) and `answer`, per picture."""
    model = getattr(transformers, MODELS[AutoConfig.from_pretrained(folder).model_type]).from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, **({"backend": "pil"} if NEWEST else {}))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION.split("\n")[1]}]}]
    renders = processor if NEWEST else processor.tokenizer
    prompt = renders.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    found, image = {}, model.config.image_token_index
    for name in PICTURES:
        picture = Image.open(REFERENCE / "images" / f"{name}.png").convert("RGB")
        inputs = dict(processor(text=prompt, images=picture, return_tensors="pt"))
        if not NEWEST:
            inputs["pixel_values"] = real[f"{folder.name}.{name}.pixels"]
        row = inputs["input_ids"][0].tolist()
        ids = [-200 if token == image else token for place, token in enumerate(row)
               if not (place and token == row[place - 1] == image)]
        with torch.inference_mode():
            logits = model(**inputs).logits
            answer = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, len(row):]
        values = {"ids": torch.tensor([ids]), "pixels": inputs["pixel_values"], "logits": logits[..., :-1],
                  "answer": answer}
        found |= {f"{folder.name}.{name}.{key}": value.clone() for key, value in values.items()}
    return found


if __name__ == "__main__":
    jobs, real = json.loads(Path(sys.argv[1]).read_text()), load_file(sys.argv[2])
    for job in jobs:
        convert_vlm(**job)
    folders = [Path(job["target"]) for job in jobs if job.get("to") != "llava"]
    save_file({key: value for folder in folders for key, value in computed(folder, real).items()}, sys.argv[3])
