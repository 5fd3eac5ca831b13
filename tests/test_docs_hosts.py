"""The lines of docs/hosts.md that need no other host than today's transformers, typed in order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel
from clipmoe_vlm.convert import save_folder

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hosts.md").read_text()
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def blocks(section: str) -> list[tuple[str, str]]:
    """Language and text of the section's code blocks."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.S | re.M)
    assert found, section
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory that has what the page takes for granted."""
    folder = tmp_path_factory.mktemp("user")
    torch.manual_seed(0)
    picture = {"image_size": 56, "patch_size": 14}
    moe = {"num_experts": 3, "num_experts_per_tok": 2}
    text = {**TOWER, "vocab_size": 50, "max_position_embeddings": 12}
    size = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    model = CLIPMoEModel(CLIPMoEConfig({**TOWER, **picture, **moe}, {**text, **moe}))
    save_folder(model, folder / "clip-moe-folder", size)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/reference/llava_train/llama")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, **picture),
        text_config=LlamaConfig(**TOWER, vocab_size=len(tokenizer), max_position_embeddings=256),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projector_hidden_act="gelu")
    LlavaForConditionalGeneration(config).save_pretrained(folder / "llava-folder")
    tokenizer.save_pretrained(folder / "llava-folder")
    Image.new("RGB", (80, 60), "olive").save(folder / "picture.png")
    return folder


def type_line(line: str) -> None:
    assert line.startswith("python -m clipmoe_vlm")
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, timeout=200)


def test_transformers_and_trainer(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for _, text in (*blocks("transformers"), *blocks("Trainer and TRL")):
        values: dict = {}
        exec(compile(text, "docs/hosts.md", "exec"), values)
        if "pipe" in values:
            assert "generated_text" in capsys.readouterr().out
        if "LoraConfig" in values:
            adapted = [name for name, _ in values["model"].named_modules() if "lora_A" in name]
            assert adapted and not any("vision_tower" in name for name in adapted)
    assert hasattr(values["trainer"].compute_loss, "adds_router_aux_loss")


def test_whole_checkpoints(folder, monkeypatch):
    """After the test above, whose VLM goes to LLaVA's layout first."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    type_line("python -m clipmoe_vlm convert-vlm --to llava vlm-folder llava-checkpoint")
    for _, text in blocks("Checkpoints of whole VLMs"):
        for line in text.splitlines():
            type_line(line)
    first, again = (LlavaForConditionalGeneration.from_pretrained(name).state_dict()
                    for name in ("vlm-folder", "vlm-of-llava"))
    assert first.keys() == again.keys()
    words = len(AutoTokenizer.from_pretrained("vlm-folder")) - 1  # the row of <image>, never read, is made anew
    for name in first:
        rows = words if "embed_tokens" in name or "lm_head" in name else None
        assert torch.equal(first[name][:rows], again[name][:rows]), name


def test_another_picture_size(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    lines = [line for _, text in blocks("The original LLaVA") for line in text.splitlines() if " convert " in line]
    assert len(lines) == 1
    type_line(lines[0])
