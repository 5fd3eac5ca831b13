"""A tiny VLM, tiny POPE and MME files, and ways to run eval_vlm on them, for its tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from clipmoe_vlm import CLIPMoEVisionConfig
from clipmoe_vlm.runs import load_config
from eval_vlm.config import EvalConfig
from eval_vlm.run import main
from eval_vlm.suites import pope

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"
TEMPLATE = ("A chat between a curious human and an assistant. {% for message in messages %}USER: {% for part in "
            "message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endfor %} ASSISTANT:")


def make_vlm(folder: Path, template: str = TEMPLATE, logit_scale: float = 1.0) -> Path:
    """Writes a tiny LLaVA with a CLIP-MoE tower and random weights: its answers are arbitrary words, but long ones."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "llava_train" / "llama")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tower = CLIPMoEVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                                image_size=32, patch_size=8, num_experts=3, num_experts_per_tok=2)
    llm = LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2,
                      bos_token_id=1, pad_token_id=0, initializer_range=0.2)
    config = LlavaConfig(vision_config=tower.to_dict(), text_config=llm.to_dict(), vision_feature_layer=-2,
                         image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name or "projector" in name:
                parameter.normal_(0, 0.3)
        model.lm_head.weight.mul_(logit_scale)
    model.generation_config.eos_token_id = 2
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=template)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_questions(folder: Path, pictures: int = 5) -> Path:
    """POPE and MME files about coloured noise: 6 POPE questions per picture and set, 2 MME questions per picture."""
    generator = torch.Generator().manual_seed(1)
    things = ["cat", "big red truck", "tree", "cup of tea", "dog", "boat with three sails"]

    def draw(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)

    for index in range(pictures):
        draw(folder / "images" / f"{index}.png")
    (folder / "pope").mkdir()
    for category in pope.SETS:
        rows = [{"question_id": 6 * index + number + 1, "image": f"{index}.png",
                 "text": f"Is there a {thing} in the image?", "label": "yes" if number % 2 else "no"}
                for index in range(pictures) for number, thing in enumerate(things)]
        (folder / "pope" / f"coco_pope_{category}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for index in range(3):
        texts = f"Is a {things[index]} here? Please answer yes or no.\tYes\nIs it night? Please answer yes or no.\tNo\n"
        draw(folder / "mme" / "existence" / f"{index}.png")
        (folder / "mme" / "existence" / f"{index}.txt").write_text(texts)
        draw(folder / "mme" / "artwork" / "images" / f"{index}.jpg")
        (folder / "mme" / "artwork" / "questions_answers_YN").mkdir(exist_ok=True)
        (folder / "mme" / "artwork" / "questions_answers_YN" / f"{index}.txt").write_text(texts)
    return folder


def config_file(folder: Path, vlm: Path, questions: Path, **more) -> Path:
    values = {"model": str(vlm), "output_dir": str(folder / "run"),
              "pope": {"questions_dir": str(questions / "pope"), "image_folder": str(questions / "images")},
              "mme": {"folder": str(questions / "mme")}, "max_new_tokens": 6, **more}
    file = folder / "config.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


def command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "eval_vlm.run", str(config), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300)


def execute(config: Path, *overrides: str) -> None:
    """The program in this process: starting another costs seconds."""
    main(load_config(EvalConfig, [str(config), *overrides], "python -m eval_vlm.run"))


def load_answers(run_folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for file in sorted((run_folder / "predictions").glob("*.jsonl"))
            if not file.name.endswith(".routing.jsonl") for line in file.read_text().splitlines()]
    answers = {f"{row['suite']}/{row['id']}": row["answer"] for row in rows}
    assert len(answers) == len(rows)  # no question twice
    return answers
