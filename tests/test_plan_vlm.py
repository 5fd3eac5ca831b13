"""The plan of a VLM run against what torch counts, what training takes, and LLaVA-1.5's published hours."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, LlavaConfig

from benchmarks import plan_vlm
from clipmoe_vlm import CLIPMoEVisionConfig
from clipmoe_vlm.chat_templates import chat_template
from clipmoe_vlm.planning import A100_TFLOPS, hours
from clipmoe_vlm.runs import UserError, load_config
from train_vlm import flops, plan
from train_vlm.chat import ChatEncoder
from train_vlm.config import LoraSettings, VLMConfig
from train_vlm.meta import MetaRun, micro_batch, on_meta
from train_vlm.model import as_asked
from train_vlm.samples import read_samples
from train_vlm.tuning import quantize

RECIPES = Path(plan.__file__).parent / "configs" / "llava-1.5-7b"
LLAVA_TRAIN = Path(__file__).parent / "reference" / "llava_train"


def small_model() -> LlavaConfig:
    vision = CLIPMoEVisionConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                                 image_size=56, patch_size=14, num_experts=4, num_experts_per_tok=2)
    text = LlamaConfig(hidden_size=128, intermediate_size=400, num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=1001)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1000, projector_hidden_act="gelu")
    config.vision_feature_layer, config.vision_feature_select_strategy = -2, "default"
    return config


def settings(**changes) -> VLMConfig:
    return VLMConfig(output_dir="", data="", llm="", vision_tower="", lora=LoraSettings(r=8), **changes)


def recipe(name: str, *more: str) -> VLMConfig:
    return load_config(VLMConfig, [str(RECIPES / f"{name}.yaml"), *more], "")


@pytest.mark.parametrize("changes", [
    {}, {"llm_tuning": "frozen"}, {"tower": "experts"}, {"tower": "last_n", "llm_tuning": "frozen"},
    {"tower": "full", "projector": "frozen"}, {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "llm_tuning": "lora", "tower": "routers"}, {"llm_tuning": "dora"},
    {"image_aspect_ratio": "anyres"}, {"feature_cache": "folder"}, {"packing": False}], ids=str)
def test_flops_are_those_that_torch_counts(changes):
    config = settings(micro_batch_size=2, **changes)
    length = 4000 if config.llm_tuning == "dora" else 200  # beside which DoRA's norms, which are left out, are little
    module = on_meta(as_asked(small_model(), config, ""), config)
    with FlopCounterMode(display=False) as counter, MetaRun(module):
        losses = module(**micro_batch(module, config, length, 20, [(56, 112), (112, 90)]))
        torch.autograd.backward(losses[0] + losses[1].sum())
    tiles = 2 * (3 + 5) if config.image_aspect_ratio == "anyres" else 4
    counts = {"tokens": 2 * length, "label_tokens": 40, "tiles": tiles, "samples": 2}
    assert flops.StepFlops(module.model, config)(counts) == pytest.approx(counter.get_total_flops(), rel=0.001)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_memory_is_what_training_takes(tmp_path):
    """`python -m benchmarks.plan_vlm` compares more cases."""
    plan_vlm.make_inputs(tmp_path, layers=4)
    changes = plan_vlm.CASES["full"]
    assert plan_vlm.planned(tmp_path, changes) == pytest.approx(plan_vlm.measure(tmp_path, changes), rel=0.15)


@pytest.mark.parametrize("name, samples, published", [("pretrain", 558_128, 3.5), ("finetune", 665_298, 10)])
def test_hours_are_near_those_that_llava_took(name, samples, published):
    config = recipe(name)
    model_config = plan.shape_of(config, str(RECIPES / "shape.json"))
    lengths = plan.assumed_lengths(config, model_config)
    step_flops = flops.StepFlops(on_meta(model_config, config).model, config)
    planned = hours(step_flops(lengths.counts) * samples, 8, A100_TFLOPS, plan.UTILISATION)
    assert planned == pytest.approx(published, rel=0.3)


@pytest.mark.parametrize("name", ["pretrain", "finetune", "finetune_lora"])
def test_the_figures_in_a_recipe_are_those_of_its_plan(name, capsys, monkeypatch):
    monkeypatch.chdir(RECIPES.parent.parent.parent)
    text = (RECIPES / f"{name}.yaml").read_text()
    comments = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    command = re.search(r"python -m train_vlm\.plan (\S+) \\ (.+?shape\.json)", " ".join(comments))
    plan.main([*command[1].split(), *command[2].split()])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    figures = [line for line in lines if line.startswith(("GiB per GPU", "ZeRO 0  ", "together", "steps:", "time on"))]
    assert len(figures) == 5 and [line for line in comments if line in lines] == figures
    if name == "finetune":
        assert "llm         6,738,423,808  6,738,423,808  2e-05" in lines
        assert "ZeRO 1, 2, 3 fit in 80 GiB; this run asks for ZeRO 3" in lines


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    plan_vlm.make_inputs(folder, layers=2)
    return folder


def lines(inputs: Path, *more: str, **options) -> list[str]:
    config = load_config(VLMConfig, [*plan_vlm.arguments(inputs, {"max_steps": 5}), *more], "")
    return plan.plan(config, **{"gpus": 1, "gpu_memory": 80, "samples": None, "tokens": None, "shape": None,
                                "tflops": 1, "utilisation": 0.5, **options})


def numbers(output: list[str], start: str) -> list[float]:
    line = next(line for line in output if line.startswith(start))
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line.removeprefix(start))]


def test_lengths_are_those_of_the_data(inputs, tmp_path):
    config = load_config(VLMConfig, plan_vlm.arguments(inputs, {}), "")
    count, lengths = plan.read_lengths(config, plan.shape_of(config))
    tokenizer = AutoTokenizer.from_pretrained(inputs / "llm")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sample = read_samples(config.data, "", tmp_path)[0]
    ids, labels = ChatEncoder(tokenizer, chat_template("v1", tokenizer)).encode(sample["conversations"])
    assert (count, lengths.tiles, lengths.largest) == (16, 1, [(112, 112)])
    assert lengths.tokens == lengths.longest == len(ids) + 63  # 64 patches in the place of one mark
    assert lengths.label_tokens == lengths.most_labels == sum(label >= 0 for label in labels)


def test_lengths_of_weighted_sources_and_of_tiles(inputs):
    """One picture of 112 x 224 in two tiles beside the whole one; a weight of 3 for a source without pictures."""
    Image.new("RGB", (224, 112)).save(inputs / "wide.png")
    words = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "a"}]
    looks = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a"}]
    for name, sample in (("text", {"conversations": words}), ("wide", {"image": "wide.png", "conversations": looks})):
        (inputs / f"{name}.json").write_text(json.dumps([sample] * 4))
    config = load_config(VLMConfig, plan_vlm.arguments(inputs, {"image_aspect_ratio": "anyres"}), "")
    config.data = [{"path": str(inputs / "text.json"), "weight": 3}, {"path": str(inputs / "wide.json")}]
    count, lengths = plan.read_lengths(config, plan.shape_of(config))
    assert (count, lengths.tiles, lengths.largest) == (16, 3 / 4, [(112, 224)])
    assert 64 + 8 * 17 < lengths.longest < 64 + 8 * 17 + 50  # rows of two tiles, each with a line's end
    output = plan.plan(config, gpus=1, gpu_memory=80, samples=None, tokens=None, shape=None, tflops=1, utilisation=1)
    assert any(line.endswith("pictures or tiles: 0.8 (of 16 of the run's samples)") for line in output)
    assert plan.assumed_lengths(config, plan.shape_of(config)).tiles == 5


def test_a_folder_of_tiles_keeps_its_grid(tmp_path):
    grid = [[56, 112]]
    values = small_model().to_dict() | {"model_type": "llava_next", "image_grid_pinpoints": grid}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = settings(image_aspect_ratio="anyres")
    for where in ({"shape": str(tmp_path / "config.json")}, {"vlm": str(tmp_path)}):
        found = plan.shape_of(replace(config, vlm=where.get("vlm")), where.get("shape"))
        assert (found.model_type, found.image_grid_pinpoints) == ("llava_next", grid)
    with pytest.raises(UserError, match="set image_aspect_ratio: anyres"):
        plan.shape_of(settings(), str(tmp_path / "config.json"))


def test_four_bits_are_those_of_bitsandbytes():
    model = LlamaModel(LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=4,
                                   vocab_size=9))
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    numbers = sum(model.get_submodule(name).weight.numel() for name in names)
    quantize(model, names)
    weights = [model.get_submodule(name).weight for name in names]
    states = [weight.quant_state for weight in weights]
    parts = [*weights, *(state.absmax for state in states), *(state.state2.absmax for state in states)]
    assert sum(part.nbytes for part in parts) == plan.FOUR_BITS * numbers


def test_options_move_memory_the_right_way():
    def stages(gpus: int = 1, **changes) -> list[plan.Memory]:
        config = settings(global_batch_size=32, micro_batch_size=8, **changes)
        footprint = plan.Footprint(small_model(), config, gpus, plan.Lengths(100, 50, 1, 200, 100, [(56, 56)]))
        return [footprint.memory(stage) for stage in footprint.stages]

    usual, four = stages(), stages(gpus=4)
    assert [one.optimizer / other.optimizer for one, other in zip(usual, four, strict=True)] == [1, 4, 4, 4]
    assert [one.weights / other.weights for one, other in zip(usual, four, strict=True)] == [1, 1, 1, 4]
    assert stages(gradient_checkpointing=True)[2].working < 0.7 * usual[2].working
    assert stages(offload=True)[2].optimizer == stages(offload=True)[3].weights == 0
    lora, qlora, single = stages(llm_tuning="lora"), stages(llm_tuning="qlora"), stages(precision="fp32")
    assert len(qlora) == 3 and len(lora) == 4  # ZeRO 3 can't split 4-bit weights
    assert stages(feature_cache="folder")[0].working < usual[0].working
    assert lora[2].optimizer < usual[2].optimizer / 5 and qlora[2].weights < 0.8 * lora[2].weights
    # Of float32 weights there are no float32 copies.
    assert single[0].weights == 2 * usual[0].weights and usual[0].optimizer == 1.5 * single[0].optimizer


def test_what_to_change_is_said(inputs):
    usual = lines(inputs, "liger=true")  # which needs a GPU, as the plan does not
    assert numbers(usual, "steps: ") [:2] == [2, 8]
    assert any(line == "ZeRO 0, 1, 2, 3 fit in 80 GiB; this run asks for ZeRO 0" for line in usual)
    assert any("but this run asks for ZeRO 3: set zero_stage=0" in line
               for line in lines(inputs, "zero_stage=3", gpu_memory=1.3))
    little, nothing = lines(inputs, gpu_memory=1.15), lines(inputs, gpu_memory=0.5)
    assert "no ZeRO stage fits in 1.15 GiB" in little and "no ZeRO stage fits in 0.5 GiB" in nothing
    assert any(line.startswith("with zero_stage=3 gradient_checkpointing=true") for line in little)
    assert nothing[-4] == "take more GPUs, larger ones, or a smaller model" and nothing[-4] not in little


@pytest.mark.parametrize("arguments, sentence", [
    (["--gpus", "0"], "--gpus must be above 0"), (["--gpus", "7"], "times 7 processes"),
    (["--gpu-memory", "-1"], "--gpu-memory must be above 0"), (["--samples", "9"], "vlm: .*give --shape FILE"),
    (["--shape", "nowhere.json"], "--shape: .*nowhere.json"),
    (["--shape", str(LLAVA_TRAIN / "llama" / "config.json")], "is not the config.json of a VLM"),
    (["--shape", str(RECIPES / "shape.json")], "how many samples there are with --samples N"),
    (["--shape", str(RECIPES / "shape.json"), "--samples", "9", "image_aspect_ratio=anyres"], "leaves no room"),
    (["--shape", str(RECIPES / "shape.json"), "select_layer=99"], "select_layer: 99"),
    (["vlm=null", "llm=nowhere", "vision_tower=nowhere"], "llm: nowhere: .*give --shape FILE"),
    (["zero=3"], "did you mean 'zero_stage'")])
def test_mistakes_end_in_a_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        plan.main([str(RECIPES / "finetune.yaml"), *arguments])


def test_no_configuration_is_a_sentence():
    with pytest.raises(UserError, match="no such configuration file"):
        plan.main(["nowhere.yaml", "--gpus", "8"])


@pytest.mark.parametrize("name, expected", [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12),
                                            ("NVIDIA H100 80GB HBM3", 989e12)])
def test_a_known_gpu_does_what_its_data_sheet_says(name, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak_flops(torch.device("cuda"), "bf16") == expected


def test_a_cpu_is_measured():
    assert 1e8 < flops.peak_flops(torch.device("cpu"), "fp32") < 1e14
