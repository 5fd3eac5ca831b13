"""The routers' auxiliary loss under this environment's `Trainer`, for each VLM class that transformers has here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, Trainer, TrainingArguments

from clipmoe_vlm import CLIPMoEVisionConfig, add_router_aux_loss
from clipmoe_vlm.upcycling import router_parameters

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
IMAGE_TOKEN = 90
COEF = 2.0
CLASSES = {
    "Llava": {"vision_feature_layer": -2},
    "VipLlava": {"vision_feature_layers": [-2, 1]},
    "LlavaNext": {"vision_feature_layer": -2, "image_grid_pinpoints": [[28, 56], [56, 28]]},
}


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its one step."""

    def step(self, closure: Any = None) -> None:
        self.gradients = [parameter.grad.clone() for parameter in self.param_groups[0]["params"]]


def make_vlm(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    vision = CLIPMoEVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                                 image_size=28, patch_size=14, num_experts=4, num_experts_per_tok=2,
                                 initializer_range=0.1)
    text = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=2, initializer_range=0.1)
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    config = config_class(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, pad_token_id=95,
                          **CLASSES[name])
    model = model_class(config).requires_grad_(False)
    # As far as the language model reads: under DDP a trained parameter must have a gradient.
    for _, parameter in router_parameters(tower_of(model).vision_model.encoder.layers[:-1]):
        parameter.requires_grad_(True)
    return model


def make_samples(name: str, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(count):
        # LlavaNext: the whole picture and two tiles, with a mark at the end of the one row of each of two rows.
        tokens, tiles = (4 + 8 + 2, 3) if name == "LlavaNext" else (4, 1)
        words = torch.randint(3, 80, (5,), generator=generator)
        ids, labels = (torch.cat([torch.tensor([1] + [IMAGE_TOKEN] * marks), words]) for marks in (
            tokens if VERSION >= (5, 0) else 1,  # transformers 4 puts the picture in the place of one mark
            1 if VERSION == (4, 37) else tokens))  # and 4.36 forgets the labels when it does
        pixels = torch.randn(tiles, 3, 28, 28, generator=generator)
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
                  "labels": labels.masked_fill(labels == IMAGE_TOKEN, -100)}
        if name == "LlavaNext":
            sample["image_sizes"] = torch.tensor([28, 56])
        else:
            sample["pixel_values"] = pixels[0]
        samples.append(sample)
    return samples


def train(name: str, accumulation: int, coef: float, folder: Path | str,
          **changes: Any) -> tuple[list[Tensor], list[tuple[tuple, dict]], float]:
    """One update: its gradients, what the host called the tower with, and the logged aux loss."""
    model = make_vlm(name)
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
                                  max_steps=1, max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no",
                                  disable_tqdm=True, logging_steps=1, remove_unused_columns=False, **changes)
    optimizer = Recorder([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    trainer = Trainer(model, arguments, train_dataset=make_samples(name, 4 * accumulation),
                      optimizers=(optimizer, None))
    add_router_aux_loss(trainer, coef)
    calls = []
    tower_of(model).register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    trainer.train()
    return optimizer.gradients, calls, trainer.state.log_history[0]["aux_loss"]


def tower_of(model: torch.nn.Module) -> torch.nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("vision_tower"))


def check(name: str, without: list[Tensor], gradients: list[Tensor], calls: list, logged: float) -> None:
    """The gradients differ by that of the mean aux loss of `calls`, each made anew."""
    model = make_vlm(name)
    aux_loss = sum(tower_of(model)(*args, **kwargs).aux_loss for args, kwargs in calls) / len(calls)
    expected = torch.autograd.grad(COEF * aux_loss, [weight for weight in model.parameters() if weight.requires_grad])
    for before, after, gradient in zip(without, gradients, expected, strict=True):
        assert before.norm() > 0
        torch.testing.assert_close(after - before, gradient, rtol=1e-4, atol=1e-6)
    assert logged == pytest.approx(aux_loss.item(), rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", CLASSES)
def test_auxiliary_loss_is_added_once_whatever_the_accumulation(name, accumulation, tmp_path):
    if not hasattr(transformers, f"{name}ForConditionalGeneration"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    without, *_ = train(name, accumulation, 0.0, tmp_path)
    gradients, calls, logged = train(name, accumulation, COEF, tmp_path)
    assert len(calls) == accumulation  # one call of the tower a micro-batch, tiles too
    check(name, without, gradients, calls, logged)


def test_two_processes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([sys.executable, *launcher, __file__, str(tmp_path)], env=environment, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    calls = [call for _, (_, calls, _) in ranks for call in calls]
    for (without, *_), (gradients, _, logged) in ranks:
        check("Llava", without, gradients, calls, logged)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, reentrant):
    plain, *_ = train("Llava", 1, COEF, tmp_path)
    changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    torch.testing.assert_close(train("Llava", 1, COEF, tmp_path, **changes)[0], plain)


if __name__ == "__main__":  # one of two processes
    results = [train("Llava", 2, coef, sys.argv[1]) for coef in (0.0, COEF)]
    torch.save(results, f"{sys.argv[1]}/rank{torch.distributed.get_rank()}.pt")
