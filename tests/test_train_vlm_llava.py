"""train_vlm after what the original LLaVA computes: samples, pictures, one forward pass, whole trajectories."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from llava_runs import (
    LLAVA_TRAIN,
    REFERENCE,
    RUNS,
    after_stage1,
    compare_with_reference,
    follow,
    furthest,
    losses,
    settings,
    vlm_folder,
)
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from clipmoe_vlm.runs import load_config
from train_vlm import train as train_module
from train_vlm.config import LoraSettings, VLMConfig
from train_vlm.data import make_dataset
from train_vlm.loss import VLMLoss, labelled
from train_vlm.model import build
from train_vlm.samples import read_samples
from train_vlm.train import train
from train_vlm.tuning import set_trainable

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    """What every run but stage 1 starts from."""
    return str(after_stage1(tmp_path_factory.mktemp("start")))


@pytest.mark.parametrize("stage, template, aspect", [("stage1", "plain", "square"), ("stage2", "v1", "pad")])
def test_samples_and_pixels_equal_llavas(start, tmp_path, stage, template, aspect):
    """Ids and labels token for token and pixels to the bit, through the data set; LLaVA's cut of two samples aside."""
    model, processor = build(settings("unused", vlm=start, template=template, image_aspect_ratio=aspect))
    samples = read_samples(str(LLAVA_TRAIN / f"{stage}.json"), str(LLAVA_TRAIN / "images"), tmp_path)
    dataset, _ = make_dataset(settings("unused"), samples, model, processor)
    pixels = load_file(LLAVA_TRAIN / "pixels.safetensors")
    truncated = []
    for index, expected in enumerate(json.loads((LLAVA_TRAIN / "samples.json").read_text())[stage]):
        item = dataset[index]
        assert item["id"] == expected["id"]
        ids, labels = [], []
        for token, label in zip(expected["input_ids"], expected["labels"], strict=True):
            ids += [model.config.image_token_id] * 16 if token == -200 else [token]
            labels += [-100] * 16 if token == -200 else [label]
        if item["truncated"]:  # LLaVA cuts at 160 tokens, inside a question here; ours ends with the answer before it
            truncated.append(item["id"])
            assert len(ids) == 160 and set(labels[len(item["labels"]):]) == {-100}
            ids, labels = ids[: len(item["input_ids"])], labels[: len(item["labels"])]
        assert item["input_ids"].tolist() == ids and item["labels"].tolist() == labels
        for picture in samples[index]["image"]:
            name = f"{aspect}.{Path(picture).stem}"
            assert torch.equal(item["pictures"], pixels[name].unsqueeze(0)), name
    assert truncated == (["ins16", "ins33"] if stage == "stage2" else [])


def test_forward_equals_llava():
    """Loss, projector gradients and labelled logits of the original LLaVA's forward, 1e-4."""
    data = load_file(REFERENCE / "llava/forward.safetensors")
    model, _ = build(settings("unused"))
    state = {}
    for name, value in data.items():
        kind, _, rest = name.partition(".")
        if kind == "vision":
            state["model.vision_tower." + rest] = value
        elif kind == "projector":
            state["model.multi_modal_projector." + rest.replace("0.", "linear_1.").replace("2.", "linear_2.")] = value
        elif kind == "llm":
            if value.shape[:1] == (1200,):  # our vocabulary has one more row, for <image>
                value = torch.cat([value, torch.zeros(1, value.shape[1])])
            state[rest if rest.startswith("lm_head") else "model.language_model." + rest[len("model."):]] = value
    model.load_state_dict(state)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    ids, labels, mask = (data[f"in.{name}"] for name in ("input_ids", "labels", "attention_mask"))
    rows, row_labels = [], []
    for row, row_label, length in zip(ids.tolist(), labels.tolist(), mask.sum(1).tolist(), strict=True):
        row = [(token, label) for token, label in zip(row, row_label, strict=True)][:length]
        row = [pair for token, label in row for pair in ([(1200, -100)] * 16 if token == -200 else [(token, label)])]
        rows.append(torch.tensor([token for token, _ in row]))
        row_labels.append(torch.tensor([label for _, label in row]))
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    long_labels = torch.nn.utils.rnn.pad_sequence(row_labels, batch_first=True, padding_value=-100)
    attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    pixel_values = data["in.pixel_values"]
    loss_sum, router_losses, routing = VLMLoss(model)(
        input_ids, *labelled(long_labels), pixel_values, len(pixel_values))
    count = (long_labels[:, 1:] != -100).sum()
    assert not router_losses.any() and routing is None
    assert (loss_sum / count).item() == pytest.approx(data["out.loss"].item(), abs=1e-4)
    (loss_sum / count).backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        expected = data["grad.projector." + name.replace("linear_1", "0").replace("linear_2", "2")]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values).logits
        features = model.get_image_features(pixel_values).pooler_output
    answers = long_labels != -100
    torch.testing.assert_close(logits[answers][:, :1200], data["out.logits"][:, : logits.shape[1]][answers],
                               atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(list(features)), data["out.projected"], atol=1e-4, rtol=1e-4)


def test_stage1_follows_llava(tmp_path, monkeypatch):
    start = vlm_folder(tmp_path / "start", load_file(LLAVA_TRAIN / "projector.safetensors"))
    follow(monkeypatch, "stage1")
    train(settings(tmp_path / "run", vlm=str(start), template="plain", data=str(LLAVA_TRAIN / "stage1.json"),
                   image_aspect_ratio="square", llm_tuning="frozen", learning_rate=2e-3,
                   group_by_modality_length=False))
    compare_with_reference(tmp_path / "run", "stage1")
    assert furthest(tmp_path / "run", "stage1.safetensors", "final") < 1e-5


def test_stage2_follows_llava(start, tmp_path, monkeypatch):
    follow(monkeypatch, "stage2")
    train(settings(tmp_path, vlm=start))
    compare_with_reference(tmp_path, "stage2")
    assert furthest(tmp_path, "stage2.safetensors", "final") < 2e-5


def test_lora_follows_llava_and_spares_the_tower(start, tmp_path, monkeypatch):
    reference = load_file(LLAVA_TRAIN / "lora.safetensors")

    def with_reference_adapters(model, config):
        set_trainable(model, config)
        adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
        assert adapted and all(name.startswith("model.language_model.") for name in adapted)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                key = name.removeprefix("model.language_model.").replace(".default", "")
                parameter.data.copy_(reference[f"initial.lora.model.{key}"])

    follow(monkeypatch, "lora")
    monkeypatch.setattr(train_module, "set_trainable", with_reference_adapters)
    train(settings(tmp_path, vlm=start, llm_tuning="lora", learning_rate=2e-3, projector_learning_rate=5e-4,
                   lora=LoraSettings(r=8, alpha=16, dropout=0.0)))
    compare_with_reference(tmp_path, "lora")
    assert furthest(tmp_path, "lora.safetensors", "final", "projector.") < 1e-5
    before, after = (LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
                     for folder in (start, tmp_path / "model"))
    assert before.keys() == after.keys()
    for name, value in after.items():
        if "vision_tower" in name:
            assert torch.equal(value, before[name])
    key = "layers.1.mlp.down_proj"
    down, up = (reference[f"final.lora.model.{key}.lora_{x}.weight"] for x in "AB")
    change = after[f"model.language_model.{key}.weight"] - before[f"model.language_model.{key}.weight"]
    torch.testing.assert_close(change, 2 * up @ down, atol=1e-5, rtol=0)


TWO_BY_TWO = {"micro_batch_size": 2, "loss_normalization": "llava"}


@pytest.mark.parametrize("run, changes", [
    ("batch4", {"loss_normalization": "llava"}),
    ("batch2_accumulate2", TWO_BY_TWO),
    ("grouped_batch2_accumulate2", TWO_BY_TWO),
    ("decay", {"weight_decay": 0.1, "projector_learning_rate": 2e-4, "max_grad_norm": 0.0}),
    ("batch4", {"micro_batch_size": 1}),  # by label tokens accumulation changes nothing
])
def test_variants_follow_llava(start, tmp_path, monkeypatch, run, changes):
    follow(monkeypatch, run)
    train(settings(tmp_path, vlm=start, max_steps=6, **changes))
    compare_with_reference(tmp_path, run)
    assert furthest(tmp_path, "variants.safetensors", run) < 1e-5


def test_bfloat16_stays_near_llava(start, tmp_path, monkeypatch):
    """Loosely: LLaVA's run has nothing but bfloat16 weights, ours float32 ones behind them."""
    follow(monkeypatch, "stage2_bf16")
    train(settings(tmp_path, vlm=start, precision="bf16", zero_stage=2))
    assert losses(tmp_path) == pytest.approx([step["loss"] for step in RUNS["stage2_bf16"]["steps"]], rel=3e-2)


# --- LLaVA-1.5's scripts -------------------------------------------------------------------------------------------

SCRIPTS = ("pretrain", "finetune", "finetune_lora")
FILE_NAMES = {"model_name_or_path", "pretrain_mm_mlp_adapter", "data_path", "image_folder", "vision_tower",
              "output_dir"}
# scripts/v1_5/*.sh; three values where they differ, "-" where a script does not have the flag.
FLAGS = {
    "deepspeed": "zero2.json, zero3.json, zero3.json", "version": "plain, v1, v1", "mm_projector_type": "mlp2x_gelu",
    "tune_mm_mlp_adapter": "True, -, -", "lora_enable": "-, -, True", "lora_r": "-, -, 128", "lora_alpha": "-, -, 256",
    "mm_projector_lr": "-, -, 2e-5", "mm_vision_select_layer": "-2", "mm_use_im_start_end": "False",
    "mm_use_im_patch_token": "False", "image_aspect_ratio": "-, pad, pad", "group_by_modality_length": "-, True, True",
    "bf16": "True", "num_train_epochs": "1", "per_device_train_batch_size": "32, 16, 16",
    "gradient_accumulation_steps": "1", "per_device_eval_batch_size": "4", "evaluation_strategy": "no",
    "save_strategy": "steps", "save_steps": "24000, 50000, 50000", "save_total_limit": "1",
    "learning_rate": "1e-3, 2e-5, 2e-4", "weight_decay": "0.", "warmup_ratio": "0.03", "lr_scheduler_type": "cosine",
    "logging_steps": "1", "tf32": "True", "model_max_length": "2048", "gradient_checkpointing": "True",
    "dataloader_num_workers": "4", "lazy_preprocess": "True", "report_to": "wandb",
}


def of_script(values: str, script: str) -> str:
    """One script's value among those of all three."""
    parts = values.split(", ")
    return parts[SCRIPTS.index(script)] if len(parts) > 1 else parts[0]


def as_llava(config: VLMConfig) -> dict[str, str]:
    """The flags that a configuration of ours amounts to, on 8 GPUs."""
    lora, frozen = config.llm_tuning == "lora", config.llm_tuning == "frozen"
    assert config.projector == "train" and config.tower == "frozen" and config.global_batch_size % 8 == 0
    return {
        "deepspeed": f"zero{config.zero_stage}.json", "version": config.template,
        "tune_mm_mlp_adapter": str(frozen), "lora_enable": str(lora),
        "lora_r": str(config.lora.r) if lora else "-", "lora_alpha": str(config.lora.alpha) if lora else "-",
        "mm_projector_lr": str(config.projector_learning_rate or "-") if not frozen else "-",
        "mm_vision_select_layer": str(config.select_layer),
        "image_aspect_ratio": config.image_aspect_ratio,
        "group_by_modality_length": str(config.group_by_modality_length), "bf16": str(config.precision == "bf16"),
        "num_train_epochs": str(config.epochs), "per_device_train_batch_size": str(config.micro_batch_size),
        "gradient_accumulation_steps": str(config.global_batch_size / 8 / config.micro_batch_size),
        "save_steps": str(config.checkpoint_every),
        "learning_rate": str(config.projector_learning_rate if frozen else config.learning_rate),
        "weight_decay": str(config.weight_decay), "warmup_ratio": str(config.warmup_ratio),
        "model_max_length": str(config.max_length), "gradient_checkpointing": str(config.gradient_checkpointing),
        "dataloader_num_workers": str(config.workers),
    }


def same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def recipe(script: str) -> VLMConfig:
    return load_config(VLMConfig, [f"train_vlm/configs/llava-1.5-7b/{script}.yaml"], "train_vlm/run.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_recipe_differs_from_llavas_script_in_file_names_only(script):
    config = recipe(script)
    defaults = {"tune_mm_mlp_adapter": "False", "lora_enable": "False", "image_aspect_ratio": "square",
                "group_by_modality_length": "False"}
    for flag, ours in as_llava(config).items():
        llavas = of_script(FLAGS[flag], script)
        assert same(ours, defaults.get(flag, "-") if llavas == "-" else llavas), flag
    assert (config.select_feature, config.lora.dropout, config.max_grad_norm, config.loss_normalization) == (
        "patch", 0.05, 0.0, "llava")
    named = {"output_dir", "data", "image_folder", "llm", "vision_tower", "vlm"}  # file names
    compared = {"zero_stage", "template", "llm_tuning", "projector", "tower", "lora", "projector_learning_rate",
                "select_layer", "image_aspect_ratio", "group_by_modality_length", "precision", "epochs",
                "micro_batch_size", "global_batch_size", "checkpoint_every", "learning_rate", "weight_decay",
                "warmup_ratio", "max_length", "gradient_checkpointing", "workers", "select_feature", "max_grad_norm",
                "loss_normalization"}
    for key in dataclasses.fields(VLMConfig):  # all else is off, as it is by default
        if key.name not in named | compared:
            assert getattr(config, key.name) == getattr(VLMConfig(), key.name), key.name


def test_table_of_the_recipe_tells_llavas_values_and_ours():
    text = Path("docs/training.md").read_text(encoding="utf-8")
    table = text.split("| LLaVA's flag |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    flags = {flag.strip("`-"): value for flag, value, _ in rows if flag.startswith("`--")}
    assert {flag: value for flag, value in flags.items() if flag not in FILE_NAMES} == FLAGS
    assert flags.keys() - FLAGS.keys() == FILE_NAMES
    told = 0
    for flag, _, ours in rows:
        settings_told = re.findall(r"`([\w.]+): ([^`]+)`", ours)
        assert settings_told or ours.startswith(("none: ", "file name: ")), flag
        for key, values in settings_told:
            for script in SCRIPTS:
                value = recipe(script)
                for name in key.split("."):
                    value = getattr(value, name)
                assert str(value) == of_script(values, script), (flag, key, script)
                told += 1
    assert told > 60
