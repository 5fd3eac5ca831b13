"""train_vlm under DeepSpeed's own launcher: two processes on CPU, gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel
from clipmoe_vlm.runs import read_jsonl

ROOT = Path(__file__).parents[2]
LLAVA_TRAIN = ROOT / "tests/reference/llava_train"
SECONDS = 400


def launch(script: str, *arguments: str, processes: int = 2) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    port = str(20000 + os.getpid() % 20000)
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(processes), "--master_port",
               port, script, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"hangs after {SECONDS} s:\n{output[-3000:]}")
    assert process.returncode == code, output[-3000:]
    return output


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """Routers, projector and LoRA train; pictures and text alone come in random order, so on different processes."""
    folder = tmp_path_factory.mktemp("train_vlm")
    torch.manual_seed(0)
    tower = CLIPMoEVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                                image_size=28, patch_size=14, num_experts=4, num_experts_per_tok=2)
    CLIPMoEVisionModel(tower).save_pretrained(folder / "tower")
    values = json.loads((LLAVA_TRAIN / "tower/preprocessor_config.json").read_text())
    values |= {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (folder / "tower/preprocessor_config.json").write_text(json.dumps(values))
    (folder / "config.yaml").write_text(f"""
llm: {LLAVA_TRAIN}/llama
vision_tower: {folder}/tower
data: {LLAVA_TRAIN}/stage2.json
image_folder: {LLAVA_TRAIN}/images
tower: routers
tower_learning_rate: 1.0e-3
llm_tuning: full
learning_rate: 1.0e-3
max_length: 160
global_batch_size: 4
micro_batch_size: 1
group_by_modality_length: false
max_steps: 8
checkpoint_every: 3
precision: fp32
workers: 0
output_dir: {folder}/run
""")
    return str(folder / "config.yaml")


def losses(folder: Path) -> list[float]:
    return [row["lm_loss"] for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def zero_stages(config, tmp_path_factory) -> Path:
    """A finished run of each ZeRO stage: `zero0` to `zero3`."""
    folder = tmp_path_factory.mktemp("zero_stages")
    finish(launch("tests/multiprocess/zero_stages.py", config, f"output_dir={folder}"))
    return folder


def test_zero_stages_agree_with_each_other_and_with_one_process(config, zero_stages, tmp_path):
    """Losses and final weights; under ZeRO-3 batches with and without pictures meet and nothing hangs."""
    finish(launch("train_vlm/run.py", config, f"output_dir={tmp_path}/one", "zero_stage=0", processes=1))
    one = load_file(tmp_path / "one/model/model.safetensors")
    for stage in (0, 1, 2, 3):
        folder = zero_stages / f"zero{stage}"
        assert losses(folder) == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
        found = load_file(folder / "model/model.safetensors")
        assert found.keys() == one.keys()
        # Adam turns rounding of near-zero gradients into steps of the size of the learning rate; few are so small.
        differ = sum(((found[name] - one[name]).abs() > 1e-4).sum().item() for name in one)
        assert differ < 0.001 * sum(value.numel() for value in one.values()), stage
    rows = read_jsonl(zero_stages / "zero3/metrics.jsonl")
    assert all(row["aux_loss"] > 0 for row in rows) and any(row["pictures"] < row["samples"] for row in rows)


def test_killed_zero3_run_goes_on_to_the_same_weights(config, zero_stages, tmp_path):
    arguments = ["train_vlm/run.py", config, "zero_stage=3", f"output_dir={tmp_path}/broken"]
    broken = launch(*arguments)
    started = time.time()
    while not (tmp_path / "broken/checkpoints/latest").exists():
        assert time.time() - started < SECONDS and broken.poll() is None, broken.communicate()[0][-3000:]
        time.sleep(0.02)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.communicate()
    assert not (tmp_path / "broken/model").exists()
    finish(launch(*arguments))
    assert losses(tmp_path / "broken") == losses(zero_stages / "zero3")
    states = [load_file(path / "model/model.safetensors") for path in (tmp_path / "broken", zero_stages / "zero3")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_mistake_ends_in_one_sentence(config, tmp_path):
    result = subprocess.run([sys.executable, "train_vlm/run.py", config, f"output_dir={tmp_path}", "vision_towr=x"],
                            cwd=ROOT, text=True, capture_output=True, timeout=SECONDS)
    assert result.returncode == 2
    assert "there is no key 'vision_towr'; did you mean 'vision_tower'?" in result.stderr
    assert "Traceback" not in result.stderr
