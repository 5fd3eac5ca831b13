"""LLaVA's own training, kept in float32, with what it computes written down.

Run in place of llava/train/train.py. LLaVA casts its tower to float16, which a CPU can't convolve; that is undone, and
nothing else of LLaVA's is changed. Writes `losses_RANK.json` into the output folder: the loss of each micro-batch
before it is divided by the accumulation steps, and for each update what was logged and each group's learning rate.
Environment:

    RECORD=1              also `record_RANK.pt`: each micro-batch, each update's gradients, the tower's final weights
    LORA_START=file       the adapters' first weights, which LLaVA's --seed does not reach
"""

import json
import os
import sys
from pathlib import Path

import torch

from clipmoe_vlm import CLIPMoEVisionTower

if "deepspeed" in " ".join(sys.argv):
    torch.cuda.synchronize = lambda *_: None  # LLaVA calls it whenever DeepSpeed is on

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.train import train as llava_train
from llava.train.llava_trainer import LLaVATrainer

for tower_class in (CLIPMoEVisionTower, CLIPVisionTower):
    def to(self, *args, theirs=tower_class.to, **kwargs):
        return theirs(self, *args, **{name: torch.float32 if value is torch.float16 else value
                                      for name, value in kwargs.items()})
    tower_class.to = to

losses, updates, rates = [], [], []
record = {"batches": [], "gradients": [], "groups": [], "tower": {}}


def compute_loss(self, model, inputs, *args, theirs=LLaVATrainer.compute_loss, **kwargs):
    rates[:] = [group["lr"] for group in self.optimizer.param_groups]
    if "RECORD" in os.environ:
        record["batches"].append({name: value.clone() for name, value in inputs.items()})
    loss = theirs(self, model, inputs, *args, **kwargs)
    losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
    return loss


def log(self, logs, *args, theirs=LLaVATrainer.log, **kwargs):
    theirs(self, logs, *args, **kwargs)
    if "loss" in logs:
        updates.append({"logged": self.state.log_history[-1], "lr": list(rates)})


def create_optimizer(self, theirs=LLaVATrainer.create_optimizer):
    optimizer = theirs(self)
    names = {id(parameter): name for name, parameter in self.model.named_parameters()}

    def before_step(*_):
        record["groups"] = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
        record["gradients"].append({name: None if parameter.grad is None else parameter.grad.clone()
                                    for name, parameter in self.model.named_parameters() if parameter.requires_grad})

    if "RECORD" in os.environ:
        optimizer.register_step_pre_hook(before_step)
    return optimizer


def train(self, *args, theirs=LLaVATrainer.train, **kwargs):
    result = theirs(self, *args, **kwargs)
    record["tower"] = {name: tensor.detach().clone() for name, tensor in
                       self.model.get_vision_tower().vision_tower.state_dict().items()}
    return result


LLaVATrainer.compute_loss = compute_loss
LLaVATrainer.log = log
LLaVATrainer.create_optimizer = create_optimizer
LLaVATrainer.train = train

if "LORA_START" in os.environ:
    import peft
    from safetensors.torch import load_file

    def get_peft_model(*args, theirs=peft.get_peft_model, **kwargs):
        model, start = theirs(*args, **kwargs), load_file(os.environ["LORA_START"])
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                key = name.replace("base_model.model.", "").replace(".default", "")
                parameter.data.copy_(start.pop(f"initial.lora.{key}"))
        return model

    peft.get_peft_model = get_peft_model

llava_train.train()
output, rank = Path(sys.argv[sys.argv.index("--output_dir") + 1]), os.environ.get("RANK", 0)
(output / f"losses_{rank}.json").write_text(json.dumps({"losses": losses, "updates": updates}))
if "RECORD" in os.environ:
    torch.save(record, output / f"record_{rank}.pt")
