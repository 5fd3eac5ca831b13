"""One rank of the contrastive loss on a fixed batch: `torchrun ... encoder_loss_worker.py OUTPUT.safetensors`."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from clipmoe_vlm.runs import init_distributed
from train_encoder.loss import contrastive_loss
from train_encoder.train import average_gradients, mean_over_ranks

distributed = init_distributed()
torch.manual_seed(0)
pictures, texts = torch.randn(8, 6), torch.randn(8, 6)
valid = torch.tensor([True, True, False, True, True, True, True, True])
towers = [torch.nn.Linear(6, 4) for _ in range(2)]
parameters = [parameter for tower in towers for parameter in tower.parameters()]
share = 8 // distributed.world_size
mine = slice(distributed.rank * share, (distributed.rank + 1) * share)
image, text = (F.normalize(tower(rows[mine]), dim=-1) for tower, rows in zip(towers, (pictures, texts), strict=True))
loss = contrastive_loss(image, text, valid[mine], label_smoothing=0.1, world_size=distributed.world_size)
loss.backward()
average_gradients(parameters, distributed.world_size)
value, = mean_over_ranks(loss.detach()[None].clone(), distributed.world_size)
if distributed.is_main:
    save_file({"loss": torch.tensor(value), **{str(n): p.grad for n, p in enumerate(parameters)}}, sys.argv[1])
