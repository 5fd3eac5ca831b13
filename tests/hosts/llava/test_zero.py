"""Routers and experts that train under DeepSpeed's ZeRO, two processes on a CPU: saved as without it.

DeepSpeed 0.12, of LLaVA's own pins, cannot run on a CPU without Intel's extension.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from answers import reloaded
from host import HERE, TRAIN, train
from safetensors.torch import load_file

from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel
from clipmoe_vlm.convert import load_vision
from clipmoe_vlm.processors import image_processor_of

TUNED_TRAIN = str(HERE / "tuned_train.py")
EXPERTS = ("--tower", "experts", "--tower_learning_rate", "1e-3")
pytestmark = pytest.mark.skipif(torch.__version__ < "2.6", reason="needs DeepSpeed 0.16, and that torch 2.6")


@pytest.fixture(scope="session")
def idle(towers) -> Path:
    """The tower of three experts, the last of which no token ever chooses."""
    moe = load_vision(towers / "moe")
    model = CLIPMoEVisionModel(CLIPMoEVisionConfig(**{**moe.config.to_dict(), "balance_bias": True}))
    model.load_state_dict(moe.state_dict(), strict=False)
    for name, buffer in model.named_buffers():
        if name.endswith("balance_bias"):
            buffer[:] = torch.tensor([0.0, 0.0, -1e4])
    model.save_pretrained(towers / "idle")
    image_processor_of(TRAIN / "tower", model.config.image_size).save_pretrained(towers / "idle")
    return towers / "idle"


@pytest.fixture(scope="session")
def runs(idle, tmp_path_factory):
    """`runs(stage, recorded)`: the folder of three updates under a ZeRO stage (None: plain data parallelism)."""
    folders = {}

    def make(stage: int | None, recorded: str = "stage2") -> Path:
        if (stage, recorded) not in folders:
            folder = tmp_path_factory.mktemp("zero") / f"{recorded}_{stage}"
            changed = zero(folder.with_suffix(".json"), stage) if stage else {}
            train(folder, idle, recorded, EXPERTS, processes=2, script=TUNED_TRAIN, timeout=150, max_steps="3",
                  per_device_train_batch_size="2", save_strategy="steps", save_steps="2", max_grad_norm="0", **changed)
            folders[stage, recorded] = folder
        return folders[stage, recorded]

    return make


def zero(file: Path, stage: int) -> dict[str, str | None]:
    """LLaVA's arguments for its scripts/zero2.json or zero3.json, with every parameter split up, however small.

    Without `overlap_comm`, since a CPU has no streams to overlap.
    """
    values = {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"},
              "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
              "gradient_accumulation_steps": "auto",
              "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": True,
                                    "sub_group_size": 1e9, "reduce_bucket_size": "auto"}}
    if stage == 3:
        values["zero_optimization"] |= {"stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 0,
                                        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
                                        "stage3_gather_16bit_weights_on_model_save": True}
    file.write_text(json.dumps(values))
    return {"deepspeed": str(file), "use_cpu": None}  # with --use_cpu transformers leaves DeepSpeed out


def assert_close(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32's rounding, which AdamW enlarges where gradients are small."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(("stage", "recorded"), [(2, "stage2"), (3, "stage2"), (3, "lora"), (3, "stage1")])
def test_the_saved_tower_is_that_of_a_plain_run(runs, idle, stage, recorded):
    folder, plain = runs(stage, recorded), runs(None, recorded)
    for checkpoint, updates in (("checkpoint-2", 2), (".", 3)):
        saved, witness = (load_file(folder / checkpoint / "vision_tower" / "model.safetensors"),
                          torch.load(folder / f"truth_{updates}.pt"))
        expected = load_file(plain / checkpoint / "vision_tower" / "model.safetensors")
        assert saved.keys() == witness.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(saved[name], witness[name]), name
            assert_close(name, saved[name], tensor)
    start = load_file(idle / "model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], saved[name])}
    assert moved == {name for name in start
                     if ".mlp." in name and ".layers.2." not in name and "balance_bias" not in name}
    for name in moved:  # the expert that is idle
        if ".experts." in name:
            assert torch.equal(saved[name][2], start[name][2])
    base, host_name = (None, "llava") if recorded == "stage2" else (TRAIN / "llama", f"llava-{recorded}")
    found, of_plain = reloaded(folder, base, host_name), reloaded(plain, base, host_name)
    assert all(torch.equal(found["tower"][name], tensor) for name, tensor in saved.items())
    torch.testing.assert_close(found["logits"], of_plain["logits"], rtol=0, atol=1e-4)
    assert torch.equal(found["tokens"], of_plain["tokens"])


def test_zero3_resumes_with_the_tuned_tower(runs, idle, tmp_path, monkeypatch):
    unbroken, resumed = runs(3), tmp_path / "run"
    shutil.copytree(unbroken / "checkpoint-2", resumed / "checkpoint-2")
    # transformers 4.37 reads random states in a way that torch 2.6 refuses by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    train(resumed, idle, "stage2", EXPERTS, processes=2, script=TUNED_TRAIN, timeout=150, max_steps="3",
          per_device_train_batch_size="2", **zero(tmp_path / "zero.json", 3))
    monkeypatch.undo()
    begun = torch.load(unbroken / "truth_2.pt")
    for name, tensor in torch.load(resumed / "begun_2.pt").items():
        assert torch.equal(tensor, begun[name]), name
    saved = load_file(resumed / "vision_tower" / "model.safetensors")
    for name, tensor in torch.load(unbroken / "truth_3.pt").items():
        assert_close(name, saved[name], tensor)
