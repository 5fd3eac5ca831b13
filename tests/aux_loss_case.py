"""A small VLM whose routers train under `Trainer` or TRL's `SFTTrainer`, and the same updates by train_vlm's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
)

from clipmoe_vlm import CLIPMoEVisionConfig, add_router_aux_loss
from clipmoe_vlm.moe import Experts, Router
from train_vlm.loss import VLMLoss, labelled

LLAMA = Path(__file__).parent / "reference/llava_train/llama"
COEF, RATE, UPDATES, BATCH = 0.5, 0.1, 3, 2
WORDS = "the quick brown fox jumps over a lazy dog and then sleeps under some old tree".split()


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the gradient of every update."""

    def __init__(self, model: torch.nn.Module):
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.gradients: list[dict[str, Tensor]] = []
        super().__init__([parameter for parameter in model.parameters() if parameter.requires_grad], lr=RATE)

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        self.gradients.append({name: parameter.grad.clone() for name, parameter in zip(self.names, parameters,
                                                                                       strict=True)})
        super().step()


def make_processor() -> LlavaProcessor:
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.pad_token = tokenizer.unk_token
    # <image> is not the last row, so our own loss and transformers' take the softmax over the same rows.
    tokens = [AddedToken(token, special=True, normalized=False) for token in ("<image>", "<last>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    square = {"height": 28, "width": 28}
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square)
    return LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1)


def make_vlm(processor: LlavaProcessor, trained: str) -> LlavaForConditionalGeneration:
    """A VLM of which the routers train, or with `trained="experts"` the experts too."""
    torch.manual_seed(0)
    vision = CLIPMoEVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                                 image_size=28, patch_size=14, num_experts=4, num_experts_per_tok=2,
                                 router_z_loss_coef=0.1, initializer_range=0.1)
    text = LlamaConfig(vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                       num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, initializer_range=0.1)
    image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text,
                                                      image_token_index=image_token_id, vision_feature_layer=-1))
    model.requires_grad_(False)
    kinds = (Router, Experts) if trained == "experts" else (Router,)
    for module in model.model.vision_tower.vision_model.modules():
        if isinstance(module, kinds):
            module.requires_grad_(True)
    return model


def make_samples(count: int) -> list[dict[str, Any]]:
    """Pictures with answers of 1 to 14 words, so that every micro-batch has another number of label tokens."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(count):
        pixels = torch.randint(0, 256, (28, 28, 3), generator=generator, dtype=torch.uint8)
        answer = " ".join(WORDS[: 1 + index * 5 % 14])
        samples.append({"images": [Image.fromarray(pixels.numpy())], "prompt": "<image>\nwhat is it?",
                        "completion": " " + answer})
    return samples


class Collator:
    """What a user of `Trainer` writes: the labels are the answer's tokens. Keeps its batches."""

    def __init__(self, processor: LlavaProcessor):
        self.processor = processor
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [sample["prompt"] + sample["completion"] for sample in samples]
        pictures = [sample["images"][0] for sample in samples]
        batch = dict(self.processor(images=pictures, text=texts, padding=True, padding_side="right",
                                    return_tensors="pt"))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, sample in zip(labels, samples, strict=True):
            prompt = self.processor(images=sample["images"], text=sample["prompt"], return_tensors="pt")["input_ids"]
            row[: prompt.shape[1]] = -100
        self.batches.append(batch | {"labels": labels})
        return dict(self.batches[-1])


def make_trainer(library: str, model: torch.nn.Module, processor: LlavaProcessor, accumulation: int, folder: Path,
                 **changes: Any) -> Trainer:
    """A trainer of `transformers` or `trl`, whose optimizer is a `Recorder` and whose collator keeps its batches."""
    arguments = dict(output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=UPDATES, use_cpu=True,
                     gradient_accumulation_steps=accumulation, max_grad_norm=0.0, lr_scheduler_type="constant",
                     logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
                     remove_unused_columns=False, prediction_loss_only=True) | changes
    samples = make_samples(BATCH * UPDATES * 8)
    optimizer = Recorder(model)
    if library == "transformers":
        return Trainer(model, TrainingArguments(**arguments), train_dataset=samples, eval_dataset=samples[:4],
                       data_collator=Collator(processor), optimizers=(optimizer, None))
    import datasets
    from trl import SFTConfig, SFTTrainer

    data = datasets.Dataset.from_list(samples)
    trainer = SFTTrainer(model, SFTConfig(**arguments, bf16=False), train_dataset=data,
                         eval_dataset=data.select(range(4)), processing_class=processor, optimizers=(optimizer, None))
    collate = trainer.data_collator

    def keep(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        keep.batches.append(dict(collate(samples)))
        return dict(keep.batches[-1])

    keep.batches = []
    trainer.data_collator = keep
    return trainer


def trained_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def run(library: str, accumulation: int, trained: str, folder: Path) -> dict[str, Any]:
    """Trains, and gives this process's batches, gradients, final weights and logs."""
    processor = make_processor()
    model = make_vlm(processor, trained)
    trainer = make_trainer(library, model, processor, accumulation, folder)
    add_router_aux_loss(trainer, COEF)
    trainer.train()
    logs = [{name: row[name] for name in ("loss", "aux_loss")} for row in trainer.state.log_history if "loss" in row]
    return {"batches": trainer.data_collator.batches[: UPDATES * accumulation],
            "gradients": trainer.optimizer.optimizer.gradients, "weights": trained_weights(model), "logs": logs}


def own_loop(batches: list[list[dict[str, Tensor]]], accumulation: int, trained: str) -> dict[str, Any]:
    """The same by train_vlm's rule, in one process: `batches` of each process in their order."""
    model = make_vlm(make_processor(), trained)
    vlm_loss, optimizer = VLMLoss(model), Recorder(model)
    logs = []
    for update in range(UPDATES):
        micro_batches = [batch for own in batches for batch in own[update * accumulation: (update + 1) * accumulation]]
        label_tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        optimizer.zero_grad()
        lm_loss = aux_loss = 0.0
        for batch in micro_batches:
            loss_sum, (balance_loss, z_loss), _ = vlm_loss(batch["input_ids"], *labelled(batch["labels"]),
                                                           batch["pixel_values"], BATCH)
            aux = balance_loss + model.config.vision_config.router_z_loss_coef * z_loss
            lm_loss, aux_loss = lm_loss + loss_sum / label_tokens, aux_loss + aux / len(micro_batches)
        (lm_loss + COEF * aux_loss).backward()
        optimizer.step()
        logs.append({"loss": (lm_loss + COEF * aux_loss).item(), "aux_loss": aux_loss.item()})
    return {"gradients": optimizer.gradients, "weights": trained_weights(model), "logs": logs}


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Over the gradients of every update, the final weights and the logs: |found - expected| / |expected|."""
    rows = [*zip(found["gradients"], expected["gradients"], strict=True), (found["weights"], expected["weights"])]
    rows += [({name: torch.tensor(value) for name, value in log.items()} for log in logs)
             for logs in zip(found["logs"], expected["logs"], strict=True)]
    differences = []
    for ours, theirs in rows:
        assert ours.keys() == theirs.keys()
        differences += [(ours[name] - value).norm() / value.norm() for name, value in theirs.items()]
    return max(differences).item()
