"""What `train_vlm.plan` says of memory against what training takes: `python -m benchmarks.plan_vlm [FOLDER]`.

Small random VLMs train for two steps in float32 on this machine's CPU, each in a process of its own, through the real
`train(config)`. What was taken is the most memory that the process held while it trained, less what it held before it
loaded the model; before that it trained a tiny VLM, so that all libraries were there. Prints a Markdown table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

TINY = Path(__file__).parent.parent / "tests" / "reference" / "llava_train"
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"llm_tuning": "lora", "lora.r": 32},
    "LoRA, checkpointing": {"llm_tuning": "lora", "lora.r": 32, "gradient_checkpointing": True},
    "projector alone (stage 1)": {"llm_tuning": "frozen"},
    "projector alone, checkpointing": {"llm_tuning": "frozen", "gradient_checkpointing": True},
    "full, tower too": {"tower": "full"},
    "full, ZeRO 1": {"zero_stage": 1},
    "full, ZeRO 2": {"zero_stage": 2},
    "full, ZeRO 3": {"zero_stage": 3},
    "full, ZeRO 2, two micro-batches a step": {"zero_stage": 2, "micro_batch_size": 4},
    "full, two micro-batches a step": {"micro_batch_size": 4},
}


def make_inputs(folder: Path, layers: int = 8, hidden: int = 256, words: int = 120) -> None:
    """A random language model and tower, and samples of about `words` words with a picture each, under `folder`."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=layers, num_attention_heads=4,
        vocab_size=8192, max_position_embeddings=2048)).save_pretrained(folder / "llm")
    AutoTokenizer.from_pretrained(TINY / "llama").save_pretrained(folder / "llm")
    CLIPMoEVisionModel(CLIPMoEVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=112,
        patch_size=14)).save_pretrained(folder / "tower")
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 112},
        "crop_size": {"height": 112, "width": 112}, "do_center_crop": True, "do_resize": True, "do_normalize": True,
        "do_rescale": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    Image.new("RGB", (112, 112), "teal").save(folder / "picture.png")
    conversation = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a " * words}]
    (folder / "data.json").write_text(json.dumps(
        [{"id": str(i), "image": "picture.png", "conversations": conversation} for i in range(16)]))


def arguments(folder: Path, changes: dict[str, Any]) -> list[str]:
    """The command line of a case, its configuration file included."""
    values = {"llm": folder / "llm", "vision_tower": folder / "tower", "data": folder / "data.json",
              "output_dir": folder / "run", "max_length": 512, "precision": "fp32", "zero_stage": 0,
              "global_batch_size": 8, "micro_batch_size": 8, "workers": 0, "max_steps": 2, **changes}
    (folder / "empty.yaml").write_text("{}\n")
    return [str(folder / "empty.yaml"), *(f"{key}={json.dumps(value) if isinstance(value, bool) else value}"
                                          for key, value in values.items())]


def measure(folder: Path, changes: dict[str, Any]) -> int:
    """Bytes that training takes, by a process of its own."""
    # Every large tensor has pages of its own, which go back to the system when it goes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "benchmarks.plan_vlm", "--one", *arguments(folder, changes)],
                          capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.splitlines()[-1])


def planned(folder: Path, changes: dict[str, Any]) -> float:
    """Bytes that the plan says, without the libraries' own."""
    from clipmoe_vlm.runs import load_config
    from train_vlm import plan
    from train_vlm.config import VLMConfig

    config = load_config(VLMConfig, arguments(folder, changes), "")
    model_config = plan.shape_of(config)
    _, lengths = plan.read_lengths(config, model_config)
    return plan.Footprint(model_config, config, 1, lengths).memory(config.zero_stage).total


def train_and_measure(line: list[str]) -> None:
    """Trains, and prints the bytes taken as the last line."""
    from clipmoe_vlm.runs import load_config
    from train_vlm import train
    from train_vlm.config import VLMConfig

    config = load_config(VLMConfig, line, "")
    for folder in ("tiny", "run"):
        shutil.rmtree(Path(config.output_dir).with_name(folder), ignore_errors=True)
    tiny = {"llm": str(TINY / "llama"), "vision_tower": str(TINY / "tower"), "max_steps": 1,
            "output_dir": str(Path(config.output_dir).with_name("tiny")), "tower": "frozen"}
    train.train(replace(config, **tiny))
    build, gather, held = train.build, train.gather_weights, {}

    def build_and_look(*args: Any) -> Any:
        held["before"] = _status("VmRSS")
        built = build(*args)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: loading is not training
        return built

    def look_and_gather(*args: Any) -> Any:
        held["peak"] = _status("VmHWM")
        return gather(*args)

    train.build, train.gather_weights = build_and_look, look_and_gather
    train.train(config)
    print(held["peak"] - held["before"])


def _status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    make_inputs(folder)
    print("| | plan, MiB | taken, MiB | plan / taken |\n|---|---:|---:|---:|")
    for name, changes in CASES.items():
        ours, taken = planned(folder, changes), measure(folder, changes)
        print(f"| {name} | {ours / 2**20:.0f} | {taken / 2**20:.0f} | {ours / taken:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        train_and_measure(sys.argv[2:])
    else:
        main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/plan-vlm"))
