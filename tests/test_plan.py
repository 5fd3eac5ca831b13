"""The plan of a run against what a small model really counts and keeps, and the figures in the recipes against it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel
from clipmoe_vlm.planning import A100_TFLOPS
from clipmoe_vlm.runs import UserError
from clipmoe_vlm.upcycling import ffn_parameters, router_parameters
from train_encoder import plan

RECIPES = sorted((Path(plan.__file__).parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_the_figures_in_a_recipe_are_those_of_its_plan(recipe, capsys, monkeypatch):
    monkeypatch.chdir(Path(plan.__file__).parent.parent)
    comments = [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    command = re.search(r"python -m train_encoder\.plan (.+?) \\ (\S.*? --samples \d+\S*( --tflops \S+)?)",
                        " ".join(comments))
    plan.main(shlex.split(f"{command[1]} {command[2]}"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and [line for line in comments if line in lines] == lines


def small_config(experts: int, dropout: float = 0.0) -> CLIPMoEConfig:
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_experts": experts, "num_experts_per_tok": min(experts, 2), "expert_dropout": dropout}
    return CLIPMoEConfig(vision_config={**tower, "image_size": 32, "patch_size": 4},
                         text_config={**tower, "vocab_size": 100, "max_position_embeddings": 48, "bos_token_id": 98,
                                      "eos_token_id": 99}, projection_dim=32)


def step(model: CLIPMoEModel, parameters, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of `batch` pairs, with `parameters` of the model training."""
    model.train().requires_grad_(False)
    for _, parameter in parameters(model):
        parameter.requires_grad_(True)
    ids = torch.randint(0, 100, (batch, 48))
    return model.get_image_features(torch.randn(batch, 3, 32, 32)), model.get_text_features(ids)


CASES = [("MCL", 1, ffn_parameters, lambda config: plan.mcl_cost(config, 0)),
         ("router tuning", 4, router_parameters, plan.router_cost)]


@pytest.mark.parametrize("name, experts, parameters, cost_of", CASES, ids=[case[0] for case in CASES])
def test_flops_are_those_counted_on_the_real_model(name, experts, parameters, cost_of):
    config = small_config(experts)
    model = CLIPMoEModel(config)
    # The math backend, because the counter does not know the CPU's fused attention. A GPU's computes the scores again
    # for the backward, which the attention before the first trained layer has not.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            features = step(model, parameters)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])
    scores_again = sum(2 * tokens**2 * 64 * layers for tokens, layers in ((65, 2), (48, 2)))
    cost = cost_of(config)
    assert cost.forward == pytest.approx(forward.get_total_flops(), rel=1e-3)
    assert cost.backward == pytest.approx(backward.get_total_flops() + scores_again, rel=1e-3)
    assert cost.trainable == sum(parameter.numel() for _, parameter in parameters(model))


@pytest.mark.parametrize("name, experts, parameters, cost_of", CASES, ids=[case[0] for case in CASES])
def test_activations_are_those_that_autograd_keeps_under_autocast(name, experts, parameters, cost_of):
    config = small_config(experts)
    model, kept = CLIPMoEModel(config), []
    for batch in (1, 3):
        sizes: dict[int, torch.UntypedStorage] = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, sizes=sizes: sizes.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
                and tensor, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            features = step(model, parameters, batch)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept.append(sum(storage.nbytes() for number, storage in sizes.items() if number not in own))
        del features
    assert cost_of(config).kept == pytest.approx((kept[1] - kept[0]) / 2, rel=0.1)


def test_dropout_keeps_a_byte_for_each_hidden_unit():
    without, with_dropout = (plan.router_cost(small_config(4, dropout)) for dropout in (0.0, 0.1))
    assert with_dropout.kept - without.kept == (65 + 48) * 3 * 2 * 256


def test_the_assumed_utilisation_is_the_papers():
    """8 A100 took half an hour for an MCL stage and for router tuning each, under 2.5 hours in all."""
    config = plan.load_config(plan.EncoderConfig, [str(RECIPES[0].with_name("vit-l-14.yaml")),
                                                   "architecture=ViT-L-14-quickgelu"], "")
    base = plan.shape_of(config)
    mcl, router = plan.mcl_cost(base, 0), plan.router_cost(plan.mixture_of(base, config))
    could = 8 * A100_TFLOPS * 1e12 * 3600
    stage, tuning = mcl.forward + mcl.backward, router.forward + router.backward
    assert 1_246_901 * stage / (0.5 * could) == pytest.approx(plan.UTILISATION, abs=0.01)
    assert 1_246_901 * tuning / (0.5 * could) == pytest.approx(plan.UTILISATION, abs=0.05)
    assert 1_246_901 * (3 * (mcl.forward + stage) + tuning) / (2.5 * could) == pytest.approx(plan.UTILISATION, abs=0.02)


def test_options_move_the_figures_the_right_way(tmp_path):
    architecture = tmp_path / "tiny.json"
    architecture.write_text(json.dumps({
        "embed_dim": 64, "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "patch_size": 4},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3}}))

    def lines(*more: str, **options) -> list[str]:
        config = plan.load_config(plan.EncoderConfig, [str(RECIPES[0].with_name("vit-b-32.yaml")),
                                                       f"architecture={architecture}", *more], "")
        return plan.plan(config, **{"gpus": 1, "samples": 10**9, "tflops": 100, "utilisation": 0.5, **options})

    def numbers(line: str) -> list[float]:
        return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line.partition(": ")[2])]

    usual, twice = lines(), lines(gpus=2)
    assert numbers(twice[-1]) == pytest.approx([value / 2 for value in numbers(usual[-1])], abs=0.1)
    checkpointing, at_once = lines("gradient_checkpointing=true"), lines("micro_batch_size=null")
    assert numbers(checkpointing[3])[1] < numbers(usual[3])[1] / 2
    assert numbers(checkpointing[-1])[0] > numbers(usual[-1])[0] > numbers(at_once[-1])[0]
    assert numbers(at_once[3])[-1] == 800 and numbers(usual[3])[-1] == 25


@pytest.mark.parametrize("arguments, sentence", [
    (["architecture=ViT-X"], "neither a file nor a name"),
    (["architecture=null", "model=nowhere"], "add architecture=NAME"),
    (["method=direct"], "has no plan"),
    (["first_moe_layer=99"], "leaves no MoE layer"),
    (["--gpus", "7"], "must be a multiple of the 7 processes"),
    (["--gpus", "0"], "--gpus must be above 0")])
def test_mistakes_end_in_a_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        plan.main([str(RECIPES[0]), "architecture=ViT-B-32-quickgelu", *arguments])
