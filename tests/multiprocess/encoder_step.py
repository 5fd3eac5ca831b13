"""One step's loss and gradients on a fixed batch: for tests to import, and for torchrun with the file of the result."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel
from clipmoe_vlm.runs import Distributed, init_distributed
from train_encoder.loss import contrastive_loss, total_loss
from train_encoder.step import step_gradients
from train_encoder.train import average_gradients, mean_over_ranks

SAMPLES = 40


def moe_model(expert_dropout: float = 0.0) -> CLIPMoEModel:
    """Two blocks, three experts, features of 48 numbers (more than Long-CLIP's 32 components); all parameters train."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_experts": 3, "num_experts_per_tok": 2, "expert_dropout": expert_dropout}
    return CLIPMoEModel(CLIPMoEConfig(
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        text_config={**tower, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 29}, projection_dim=48))


def batch(short_captions: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 29, (2, SAMPLES, 8), generator=generator)
    ids[..., -1] = 29
    valid = torch.ones(SAMPLES, dtype=torch.bool)
    valid[[2, 30]] = False
    short = {"short_input_ids": ids[1]} if short_captions else {}
    return {"pixel_values": torch.randn(SAMPLES, 3, 16, 16, generator=generator), "input_ids": ids[0], **short,
            "valid": valid}


def step(model: CLIPMoEModel, inputs: dict, micro_batch_size: int | None, distributed: Distributed) -> dict:
    """Losses and gradients of the global batch, averaged over the ranks as training does."""
    share = SAMPLES // distributed.world_size
    mine = slice(distributed.rank * share, (distributed.rank + 1) * share)
    model.train().zero_grad()
    losses = step_gradients(
        model, {name: value[mine] for name, value in inputs.items()},
        lambda rows, valid: total_loss(rows, valid, logit_scale=10.0, label_smoothing=0.1, balance_coef=0.5,
                                       z_loss_coef=0.1, world_size=distributed.world_size),
        micro_batch_size=micro_batch_size, seed=5, amp=torch.autocast("cpu", enabled=False),
        scaler=torch.amp.GradScaler("cpu", enabled=False))
    parameters = dict(model.named_parameters())
    average_gradients(list(parameters.values()), distributed.world_size)
    losses = {name: torch.tensor(value) for name, value in mean_over_ranks(losses, distributed).items()}
    return losses | {name: parameter.grad.clone() for name, parameter in parameters.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Each loss, and the gradient as one long vector, to a relative error of `tolerance`."""
    assert found.keys() == expected.keys()
    losses = [name for name, value in expected.items() if not value.ndim and name != "logit_scale"]
    for name in losses:
        assert abs(found[name] - expected[name]) <= tolerance * abs(expected[name]), name
    ours, theirs = (torch.cat([values[name].flatten() for name in expected if name not in losses])
                    for values in (found, expected))
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= tolerance, error


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made within."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def largest_tensor_of_the_loss(distributed: Distributed) -> int:
    """In forward and backward, for features so short that the logits are what is large."""
    share = SAMPLES // distributed.world_size
    image, text = (F.normalize(torch.randn(share, 4), dim=-1).requires_grad_() for _ in range(2))
    with Largest() as largest:
        contrastive_loss(image, text, torch.ones(share, dtype=torch.bool), label_smoothing=0.1,
                         world_size=distributed.world_size).backward()
    return largest.numel


if __name__ == "__main__":
    distributed = init_distributed()
    result = {f"{short_captions}.{size}.{name}": value for short_captions in (True, False) for size in (None, 7)
              for name, value in step(moe_model(), batch(short_captions), size, distributed).items()}
    result["largest"] = torch.tensor(largest_tensor_of_the_loss(distributed))
    if distributed.is_main:
        save_file(result, sys.argv[1])
