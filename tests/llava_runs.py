"""The runs that the original LLaVA trainer recorded (reference/llava_train), and ours after them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from clipmoe_vlm.runs import read_jsonl
from train_vlm.config import VLMConfig
from train_vlm.model import build
from train_vlm.sampler import BatchPlan

REFERENCE = Path(__file__).parent / "reference"
LLAVA_TRAIN = REFERENCE / "llava_train"
RUNS = json.loads((LLAVA_TRAIN / "runs.json").read_text())


def settings(output, **changes) -> VLMConfig:
    values = dict(
        output_dir=str(output), data=str(LLAVA_TRAIN / "stage2.json"), image_folder=str(LLAVA_TRAIN / "images"),
        llm=str(LLAVA_TRAIN / "llama"), vision_tower=str(LLAVA_TRAIN / "tower"), max_length=160, global_batch_size=4,
        micro_batch_size=4, precision="fp32", zero_stage=0, workers=0, learning_rate=1e-3)
    values |= changes
    if "vlm" in values:
        values |= {"llm": None, "vision_tower": None}
    return VLMConfig(**values)


def losses(output) -> list[float]:
    return [row["lm_loss"] for row in read_jsonl(Path(output) / "metrics.jsonl")]


def vlm_folder(folder: Path, projector: dict[str, torch.Tensor]) -> Path:
    """The reference's tower and language model with a projector of LLaVA's names."""
    model, processor = build(settings(folder, template="plain"))
    names = {"0": "linear_1", "2": "linear_2"}
    model.model.multi_modal_projector.load_state_dict(
        {f"{names[key[0]]}{key[1:]}": value for key, value in projector.items()})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def after_stage1(folder: Path) -> Path:
    """What every run but stage 1 starts from."""
    tensors, prefix = load_file(LLAVA_TRAIN / "stage1.safetensors"), "final.projector."
    return vlm_folder(folder, {name[len(prefix):]: value for name, value in tensors.items() if prefix in name})


def steps_of(run: str) -> list[list[dict]]:
    """Per step what each process recorded."""
    ranks = [RUNS[run]] if run in RUNS else [RUNS[f"{run}:{rank}"] for rank in (0, 1)]
    return list(zip(*(rank["steps"] for rank in ranks), strict=True))


def follow(monkeypatch, run: str) -> None:
    """Makes training take the samples in the order that the reference run recorded."""
    order = [index for step in steps_of(run) for micro in range(len(step[0]["micro"])) for rank in step
             for index in rank["micro"][micro]["samples"]]
    monkeypatch.setattr(BatchPlan, "order", lambda plan, epoch: order)


def compare_with_reference(output: Path, run: str, loss: float = 1e-4, norm: float = 1e-4) -> None:
    """Losses and gradient norms within these relative differences, learning rates to the last bit."""
    rows, steps = read_jsonl(output / "metrics.jsonl"), steps_of(run)
    assert len(rows) == len(steps)
    for row, ranks in zip(rows, steps, strict=True):
        assert row["lm_loss"] == pytest.approx(sum(rank["loss"] for rank in ranks) / len(ranks), rel=loss)
        assert row["grad_norm"] == pytest.approx(ranks[0]["grad_norm"], rel=norm)
        assert row["label_tokens"] == sum(micro["targets"] for rank in ranks for micro in rank["micro"])
        assert set(row["lr"].values()) == set(ranks[0]["lr"])


def llava_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under the reference's names."""
    names = {}
    for name, value in state.items():
        if name.startswith("model.language_model."):
            names["llm.model." + name.removeprefix("model.language_model.")] = value
        elif name.startswith("model.multi_modal_projector."):
            part = name.removeprefix("model.multi_modal_projector.")
            names["projector." + part.replace("linear_1", "0").replace("linear_2", "2")] = value
        elif name == "lm_head.weight":
            names["llm.lm_head.weight"] = value
    return names


def furthest(folder: Path, file: str, prefix: str, part: str = "") -> float:
    """Largest difference between a finished model's tensors and the reference's `PREFIX.PART...` ones in `file`."""
    ours = llava_names(LlavaForConditionalGeneration.from_pretrained(folder / "model").state_dict())
    expected = {name.removeprefix(f"{prefix}."): value for name, value in load_file(LLAVA_TRAIN / file).items()
                if name.startswith(f"{prefix}.{part}")}
    assert expected
    # Our vocabulary has one more row, for <image>.
    return max((ours[name][: len(value)] - value).abs().max().item() for name, value in expected.items())
