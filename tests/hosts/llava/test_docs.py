"""The lines that docs/hosts.md has for the original LLaVA, typed; `...` and LLaVA's script stand for the tests' own."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from host import FLOAT32_TRAIN, REPOSITORY, arguments, free_port, read, run, train

PAGE = (REPOSITORY / "docs" / "hosts.md").read_text().split("\n## The original LLaVA\n")[1].split("\n## ")[0]
LINES = [line for text in re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.S | re.M) for line in text.splitlines()]
TRAINING = [line for line in LINES if "clipmoe_vlm.llava" in line]


def typed(line: str, folder: Path, tower: Path) -> list[str]:
    words = shlex.split(line)
    here = words.index("llava/train/train_mem.py")
    assert words[-1] == "..." and words[here + 1:-1] == ["--vision_tower", "clip-moe-folder"]
    started = {"python": [sys.executable], "torchrun": ["torchrun", "--master_port", str(free_port())]}
    if words[0] == "deepspeed":  # which takes the number of processes from GPUs, or else from a list of machines
        (folder / "hosts").write_text("localhost slots=2\n")
        started["deepspeed"] = ["deepspeed", "--hostfile", str(folder / "hosts"), "--no_ssh_check", "--master_addr",
                                "127.0.0.1", "--master_port", str(free_port())]
    stage = {"python": "stage1", "torchrun": "stage2", "deepspeed": "lora"}[words[0]]
    return [*started[words[0]], *words[1:here], FLOAT32_TRAIN,
            *arguments(folder / "llava", tower, stage, max_steps="3", dataloader_num_workers="2")]


@pytest.mark.parametrize("line", TRAINING)
def test_lines_that_train(towers, tmp_path, line):
    done = run(typed(line, tmp_path, towers / "moe"))
    trained = read(tmp_path / "llava", done.stdout + done.stderr)
    assert len(trained.losses) == (1 if line.startswith("python") else 2) and len(trained.updates) == 3
    assert all(("router_aux_loss" in update["logged"]) == ("--tower routers" in line) for update in trained.updates)
    assert (tmp_path / "llava" / "vision_tower").is_dir() == ("--tower routers" in line)


def test_lines_that_load(towers, tmp_path):
    train(tmp_path / "llava-checkpoint", towers / "moe", "stage2", ("--tower", "routers"), max_steps="2")
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.S | re.M)
    shown = 'tower = model.get_vision_tower(); print(type(tower).__name__, tower.config.num_experts, tower.is_loaded)'
    done = run([sys.executable, "-c", code + shown], cwd=tmp_path)
    assert done.stdout.endswith("CLIPMoEVisionTower 3 True\n")
